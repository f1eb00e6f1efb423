//! What a mail looks like: the same words as plain text and as HTML.
//!
//! Invariant: nothing that somebody else wrote is markup in a mail (test `texts_of_others_are_no_markup`).

use std::fmt::Write as _;

use crate::notices::words;

/// Where lines of plain text are broken.
pub(super) const WIDTH: usize = 76;

/// What a mail says, before it is text or HTML.
pub(super) struct Content {
    pub(super) headline: String,
    /// What there is to know of the only token.
    pub(super) facts: Vec<(&'static str, String)>,
    /// One row for each of several tokens.
    pub(super) rows: Vec<Row>,
    /// How many more there are than rows.
    pub(super) unlisted: usize,
    pub(super) advice: Vec<String>,
    pub(super) link: Option<String>,
    pub(super) footer: String,
}

/// One of several tokens.
pub(super) struct Row {
    pub(super) token: String,
    pub(super) owner: String,
    /// `ends` or `expired`.
    pub(super) ends: &'static str,
    pub(super) end: String,
    pub(super) last_use: String,
}

impl Content {
    /// As plain text.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        paragraph(&mut text, &self.headline, "");
        text.push('\n');
        let width = self.facts.iter().map(|(label, _)| label.len()).max().unwrap_or(0) + 1;
        for (label, value) in &self.facts {
            let _never_fails = writeln!(text, "{:width$}  {}", format!("{label}:"), one_line(value));
        }
        for row in &self.rows {
            let line = format!("- {}, of {}: {} {}, last used {}", row.token, row.owner, row.ends, row.end, row.last_use);
            paragraph(&mut text, &line, "  ");
        }
        if self.unlisted > 0 {
            let _never_fails = writeln!(text, "- and {} more", self.unlisted);
        }
        if !(self.facts.is_empty() && self.rows.is_empty()) {
            text.push('\n');
        }
        for line in &self.advice {
            paragraph(&mut text, line, "");
        }
        text.extend(self.link.iter().map(|link| format!("{link}\n")));
        if !self.advice.is_empty() {
            text.push('\n');
        }
        text.push_str("-- \n");
        paragraph(&mut text, &self.footer, "");
        text
    }

    /// As HTML, which refers to nothing outside but where tokens are renewed.
    pub(super) fn html(&self, title: &str) -> String {
        let paragraph = |text: &str| format!("<p>{}</p>\n", words::escaped(text));
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{}</title></head>\n<body>\n",
            words::escaped(title)
        );
        html.push_str(&paragraph(&self.headline));
        html.push_str(&self.html_facts());
        html.push_str(&self.html_rows());
        self.advice.iter().for_each(|line| html.push_str(&paragraph(line)));
        if let Some(link) = &self.link {
            let link = words::escaped(link);
            let _never_fails = writeln!(html, "<p><a href=\"{link}\" rel=\"noreferrer\">{link}</a></p>");
        }
        let _never_fails = write!(html, "<hr>\n<p><small>{}</small></p>\n</body>\n</html>\n", words::escaped(&self.footer));
        html
    }

    fn html_facts(&self) -> String {
        let row = |(label, value): &(&str, String)| format!("<tr><th align=\"left\">{label}</th><td>{}</td></tr>\n", isolated(value));
        table(&self.facts.iter().map(row).collect::<String>())
    }

    fn html_rows(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let mut rows = String::from("<tr><th align=\"left\">Token</th><th align=\"left\">Owner</th>");
        rows.push_str("<th align=\"left\">Ends</th><th align=\"left\">Last used</th></tr>\n");
        for row in &self.rows {
            let cells = [&row.token, &row.owner, &row.end, &row.last_use].map(|cell| format!("<td>{}</td>", isolated(cell)));
            let _never_fails = writeln!(rows, "<tr>{}</tr>", cells.concat());
        }
        if self.unlisted > 0 {
            let _never_fails = writeln!(rows, "<tr><td colspan=\"4\">and {} more</td></tr>", self.unlisted);
        }
        table(&rows)
    }
}

fn table(rows: &str) -> String {
    if rows.is_empty() { String::new() } else { format!("<table border=\"1\" cellpadding=\"5\" cellspacing=\"0\">\n{rows}</table>\n") }
}

/// Text in HTML whose direction of writing does not spill over.
fn isolated(text: &str) -> String {
    format!("<bdi>{}</bdi>", words::escaped(text))
}

fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// Adds a paragraph, broken at blanks; `indent` stands before every line but the first.
fn paragraph(text: &mut String, line: &str, indent: &str) {
    let mut width = 0;
    for word in one_line(line).split_whitespace() {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > WIDTH {
            text.push('\n');
            text.push_str(indent);
            width = indent.len();
        } else if width > 0 {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += length;
    }
    text.push('\n');
}
