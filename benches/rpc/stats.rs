//! Medians with their spread, and ratios round by round: on a busy machine only these mean anything.

/// The middle of some measurements, with the least and the greatest.
#[derive(Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        assert!(!values.is_empty(), "nothing was measured");
        Self { median: values[values.len() / 2], min: values[0], max: values[values.len() - 1] }
    }

    /// Of `above` to `below`, each pair from the same round.
    pub fn of_ratios(above: &[f64], below: &[f64]) -> Self {
        Self::of(above.iter().zip(below).map(|(above, below)| above / below))
    }

    /// `12.3 (11.9–14.0)`.
    pub fn show(self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.min, self.max)
    }
}

/// The value below which this share of the sorted values lies.
pub fn percentile(sorted: &[u64], share: f64) -> u64 {
    let last = sorted.len().checked_sub(1).expect("something was measured");
    sorted[((last as f64) * share).round() as usize]
}

/// A table as Markdown.
pub fn print_table(head: &[&str], rows: &[Vec<String>]) {
    println!("| {} |", head.join(" | "));
    println!("|{}", " --- |".repeat(head.len()));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
    println!();
}
