//! Columns and `key: value` lines for people.
//!
//! Invariant: text of others cannot steer the terminal (test `control_sequences_lose_their_power`).

use std::fmt::Write as _;

/// One column of a table.
pub(super) struct Column {
    pub title: &'static str,
    /// Longer values are cut: `--output json` and `get` show them whole.
    pub width_max: usize,
    /// Numbers line up on the right.
    pub right: bool,
}

/// Lays out rows under titles, two blanks between columns.
pub(super) fn table(columns: &[Column], rows: &[Vec<String>]) -> String {
    let titles = columns.iter().map(|column| column.title.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(titles)
        .chain(rows.iter().map(|row| columns.iter().zip(row).map(|(column, value)| cut(&escape(value), column.width_max)).collect()))
        .collect();
    let widths: Vec<usize> =
        (0..columns.len()).map(|index| rows.iter().filter_map(|row| row.get(index)).map(|value| width(value)).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = columns.iter().zip(&widths).zip(row).map(|((column, width), value)| pad(value, *width, column.right));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Lines of `key: value` whose values line up.
#[derive(Default)]
pub(super) struct Details(Vec<(&'static str, String)>);

impl Details {
    pub(super) fn add(&mut self, key: &'static str, value: impl Into<String>) -> &mut Self {
        self.0.push((key, value.into()));
        self
    }

    /// Adds a line if there is something to show.
    pub(super) fn add_if(&mut self, key: &'static str, value: &str) -> &mut Self {
        if !value.is_empty() {
            self.add(key, value);
        }
        self
    }

    pub(super) fn text(&self) -> String {
        let column = self.0.iter().map(|(key, _)| key.len() + 1).max().unwrap_or(0);
        self.0.iter().fold(String::new(), |mut text, (key, value)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{:column$} {}", format!("{key}:"), escape(value));
            text
        })
    }
}

/// Control characters and marks that turn the direction of writing, as `\u{…}`: a name must not move the cursor or look like another.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_steering(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Whether a terminal may act on a character instead of showing it.
pub(super) fn is_steering(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn cut(text: &str, width_max: usize) -> String {
    if width(text) <= width_max {
        return text.to_owned();
    }
    let mut left = width_max.saturating_sub(1);
    let mut kept: String = text
        .chars()
        .take_while(|character| {
            let fits = cells(*character) <= left;
            left = left.saturating_sub(cells(*character));
            fits
        })
        .collect();
    kept.push('…');
    kept
}

fn pad(text: &str, column: usize, right: bool) -> String {
    let blanks = " ".repeat(column.saturating_sub(width(text)));
    if right { blanks + text } else { text.to_owned() + &blanks }
}

fn width(text: &str) -> usize {
    text.chars().map(cells).sum()
}

/// How many cells of a terminal a character takes: the wide blocks of Unicode TR 11, and marks that sit on the character before.
fn cells(character: char) -> usize {
    match character {
        '\u{0300}'..='\u{036f}' | '\u{20d0}'..='\u{20ff}' | '\u{fe00}'..='\u{fe0f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{303e}'
        | '\u{3041}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column { title: "NAME", width_max: 8, right: false },
        Column { title: "USES", width_max: 20, right: true },
        Column { title: "STATUS", width_max: 20, right: false },
    ];

    fn row(values: [&str; 3]) -> Vec<String> {
        values.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_line_up() {
        let text = table(&COLUMNS, &[row(["ci", "7", "Active"]), row(["a long name", "12345", "Revoked"]), row(["日本", "0", ""])]);
        assert_eq!(text, "NAME       USES  STATUS\nci            7  Active\na long …  12345  Revoked\n日本          0\n");
    }

    #[test]
    fn keys_line_up() {
        let text = Details::default().add("id", "tok_1").add_if("session", "").add("last used", "Never").text();
        assert_eq!(text, "id:        tok_1\nlast used: Never\n");
    }

    #[test]
    fn control_sequences_lose_their_power() {
        let hostile = "a\u{1b}[2Jb\r\n\u{9b}31m\u{202e}c\u{7f}";
        let shown = format!("{}{}", table(&COLUMNS, &[row([hostile; 3])]), Details::default().add("name", hostile).text());
        assert!(shown.lines().all(|line| !line.chars().any(is_steering)), "{shown:?}");
        assert_eq!(escape(hostile), "a\\u{1b}[2Jb\\r\\n\\u{9b}31m\\u{202e}c\\u{7f}");
        assert_eq!(escape("Zoë's café \\ 日本 👍"), "Zoë's café \\ 日本 👍");
    }

    #[test]
    fn cutting_counts_cells() {
        assert_eq!(cut("12345678", 8), "12345678");
        assert_eq!(cut("日本語日本", 6), "日本…");
        assert_eq!(width("e\u{301}"), 1);
    }
}
