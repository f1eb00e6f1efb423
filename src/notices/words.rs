//! How notices say things: dates, spans, and texts of others cut to size.

use std::fmt::Write as _;

use crate::ambient::Time;

/// The longest error that is kept of an attempt.
pub(super) const ERROR_CHARS_MAX: usize = 200;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// A text in one line: controls become blanks, and what is longer is cut.
pub(super) fn line(text: &str, chars_max: usize) -> String {
    let clean = text.trim().chars().map(|letter| if letter.is_control() { ' ' } else { letter });
    let mut cut: String = clean.take(chars_max + 1).collect();
    if cut.chars().count() > chars_max {
        let keep = cut.char_indices().nth(chars_max.saturating_sub(1)).map_or(0, |(index, _)| index);
        cut.truncate(keep);
        cut.truncate(cut.trim_end().len());
        cut.push('…');
    }
    cut
}

/// An error of an attempt, as the administrator of a workspace reads it.
pub(super) fn error(text: &str) -> String {
    line(text, ERROR_CHARS_MAX)
}

/// The innermost cause of an error: what those around it say may quote a URL.
pub(super) fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let innermost = std::iter::successors(Some(error), |error| error.source()).last();
    innermost.map(ToString::to_string).unwrap_or_default()
}

/// `7 days`, `1 hour`.
pub(super) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// A distance in the unit that fits it, rounded.
fn distance(seconds: u64) -> String {
    let rounded = |unit: u64| (seconds + unit / 2) / unit;
    match seconds {
        _ if seconds + MINUTE / 2 < MINUTE => "less than a minute".to_owned(),
        _ if rounded(MINUTE) < 60 => count(rounded(MINUTE), "minute"),
        _ if seconds + HOUR / 2 < DAY => count(rounded(HOUR), "hour"),
        _ => count(rounded(DAY), "day"),
    }
}

/// `in 7 days`, `3 hours ago`.
pub(super) fn span(time: Time, now: Time) -> String {
    let distance = distance(time.seconds().abs_diff(now.seconds()));
    if time > now { format!("in {distance}") } else { format!("{distance} ago") }
}

/// `2027-04-11`, in UTC.
pub(super) fn date(time: Time) -> String {
    time.to_string().get(..10).unwrap_or_default().to_owned()
}

/// `2027-04-11 08:00 UTC (in 7 days)`, or `never`.
pub(super) fn instant(time: Time, now: Time) -> String {
    if time == Time::NEVER {
        return "never".to_owned();
    }
    let text = time.to_string();
    format!("{} {} UTC ({})", date(time), text.get(11..16).unwrap_or_default(), span(time, now))
}

/// The text as HTML shows it, inside and outside of attributes.
pub(super) fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' | '<' | '>' | '"' | '\'' | '`' => {
                let _never_fails = write!(html, "&#{};", u32::from(letter));
            }
            _ if letter.is_control() => html.push(' '),
            _ => html.push(letter),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Time = Time::from_micros(1_800_000_000_000_000);

    #[test]
    fn spans_are_rounded_to_what_people_say() {
        let ahead = |seconds| span(NOW + Duration::from_secs(seconds), NOW);
        for (seconds, said) in [
            (1, "in less than a minute"),
            (60, "in 1 minute"),
            (59 * 60, "in 59 minutes"),
            (HOUR - 5, "in 1 hour"),
            (3 * HOUR, "in 3 hours"),
            (23 * HOUR, "in 23 hours"),
            (DAY - 5, "in 1 day"),
            (DAY, "in 1 day"),
            (7 * DAY - 5, "in 7 days"),
            (30 * DAY, "in 30 days"),
        ] {
            assert_eq!(ahead(seconds), said);
        }
        assert_eq!(span(NOW - Duration::from_hours(48), NOW), "2 days ago");
        assert_eq!(span(NOW, NOW), "less than a minute ago");
        assert_eq!(instant(NOW + Duration::from_hours(24), NOW), "2027-01-16 08:00 UTC (in 1 day)");
        assert_eq!(instant(Time::NEVER, NOW), "never");
    }

    #[test]
    fn texts_of_others_are_one_line_of_bounded_length() {
        assert_eq!(line(" a\r\nb\u{7}c ", 10), "a  b c");
        assert_eq!(line("abcdef", 6), "abcdef");
        assert_eq!(line("abcdefg", 6), "abcde…");
        assert_eq!(line("äbcdefg", 6).chars().count(), 6);
        assert_eq!(error(&"x".repeat(1_000)).chars().count(), ERROR_CHARS_MAX);
    }

    #[test]
    fn markup_is_shown_not_read() {
        assert_eq!(escaped("<a href=\"x\" b='y'>&`"), "&#60;a href=&#34;x&#34; b=&#39;y&#39;&#62;&#38;&#96;");
        assert_eq!(escaped("नाम שם"), "नाम שם");
    }
}
