//! When something ends, and how long something takes, as people type it: `30d`, `1h30m`, `2027-04-11`, `2027-04-11T10:00Z`, `never`.
//!
//! Invariant: a date must be later than today and an instant must lie ahead (test `an_expiry_lies_in_the_future`).

use std::{fmt::Write as _, str::FromStr, time::Duration};

use jiff::{Timestamp, civil::Date, tz::TimeZone};

use super::failure::Failure;
use crate::ambient::Time;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;
const YEAR: u64 = 365 * DAY;

/// What `--expires` and the filters by time take. What it means depends on the present instant, which comes later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Expiry {
    Never,
    In(Duration),
    Day(Date),
    At(Timestamp),
}

impl FromStr for Expiry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("never") {
            return Ok(Self::Never);
        }
        // A date alone: jiff would also take the date out of a longer text and drop the rest.
        if text.len() == "2027-04-11".len() && text.contains('-') {
            return text.parse().map(Self::Day).map_err(|_| format!("{text} is not a date of the calendar"));
        }
        if text.contains('-') {
            return text.parse().map(Self::At).map_err(|_| "an instant needs its time zone, such as 2027-04-11T10:00Z".to_owned());
        }
        span(text).map(Self::In)
    }
}

impl Expiry {
    /// The instant at which a token ends; nothing if it never does.
    ///
    /// # Errors
    /// A sentence if the instant does not lie ahead.
    pub(super) fn end(self, now: Timestamp) -> Result<Option<Timestamp>, String> {
        match self {
            Self::Never => Ok(None),
            Self::In(Duration::ZERO) => Err("a token must live for some time".to_owned()),
            Self::In(span) => now.checked_add(span).map(Some).map_err(|_| "that is too far away".to_owned()),
            Self::Day(day) => match start(day)? {
                midnight if midnight > now => Ok(Some(midnight)),
                _ => Err(format!("{day} is not later than today, {} (UTC)", now.to_zoned(TimeZone::UTC).date())),
            },
            Self::At(instant) if instant > now => Ok(Some(instant)),
            Self::At(instant) => Err(format!("{instant} has passed: it is {} now", minutes(now))),
        }
    }

    /// The instant that a filter names. A span is counted back from now if `back`, else ahead.
    ///
    /// # Errors
    /// A sentence if there is no such instant.
    pub(super) fn instant(self, now: Timestamp, back: bool) -> Result<Timestamp, String> {
        match self {
            Self::Never => Err("never is not an instant".to_owned()),
            Self::In(span) if back => now.checked_sub(span).map_err(|_| "that is too long ago".to_owned()),
            Self::In(span) => now.checked_add(span).map_err(|_| "that is too far away".to_owned()),
            Self::Day(day) => start(day),
            Self::At(instant) => Ok(instant),
        }
    }
}

fn start(day: Date) -> Result<Timestamp, String> {
    day.to_zoned(TimeZone::UTC).map(|midnight| midnight.timestamp()).map_err(|_| format!("{day} is too far away"))
}

/// A span such as `10s`, `1h30m` or `2w`. A year has 365 days.
///
/// # Errors
/// A sentence that shows how to write one.
pub(super) fn span(text: &str) -> Result<Duration, String> {
    let malformed = || format!("{text} is not a span of time: write a number with s, m, h, d, w or y, such as 30d or 1h30m");
    let mut seconds = 0_u64;
    let mut number: Option<u64> = None;
    for character in text.chars() {
        if let Some(digit) = character.to_digit(10) {
            let more = number.unwrap_or(0).checked_mul(10).and_then(|tens| tens.checked_add(u64::from(digit)));
            number = Some(more.ok_or_else(malformed)?);
        } else {
            let part = number.take().zip(unit(character)).and_then(|(count, unit)| count.checked_mul(unit));
            seconds = part.and_then(|part| seconds.checked_add(part)).ok_or_else(malformed)?;
        }
    }
    if text.is_empty() || number.is_some() { Err(malformed()) } else { Ok(Duration::from_secs(seconds)) }
}

/// A span of the wire as `span` takes it back, such as `365d` or `1h30m`; nothing if it is not of whole seconds.
pub(super) fn span_text(span: &prost_types::Duration) -> Option<String> {
    let mut left = u64::try_from(span.seconds).ok().filter(|_| span.nanos == 0)?;
    let mut text = String::new();
    for (unit, letter) in [(DAY, 'd'), (HOUR, 'h'), (MINUTE, 'm'), (1, 's')] {
        if left >= unit {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{letter}", left / unit);
        }
        left %= unit;
    }
    Some(if text.is_empty() { "0s".to_owned() } else { text })
}

fn unit(letter: char) -> Option<u64> {
    match letter {
        's' => Some(1),
        'm' => Some(MINUTE),
        'h' => Some(HOUR),
        'd' => Some(DAY),
        'w' => Some(WEEK),
        'y' => Some(YEAR),
        _ => None,
    }
}

/// The instant of a clock, as the calendar knows it.
pub(super) fn timestamp(time: Time) -> Timestamp {
    Timestamp::from_microsecond(time.micros()).unwrap_or(Timestamp::MAX)
}

/// A span as the wire carries it.
///
/// # Errors
/// A usage failure if the wire has no room for it.
pub(super) fn span_to_wire(span: Duration) -> Result<prost_types::Duration, Failure> {
    span.try_into().map_err(|_| Failure::usage("the span is too long"))
}

/// An instant as the wire carries it.
pub(super) fn to_wire(instant: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: instant.as_second(), nanos: instant.subsec_nanosecond() }
}

/// An instant of the wire; nothing if it lies beyond the calendar.
pub(super) fn from_wire(instant: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(instant.seconds, instant.nanos).ok()
}

/// To the minute, in UTC: for tables. `--expires` takes it back.
pub(super) fn minutes(instant: Timestamp) -> String {
    instant.strftime("%Y-%m-%dT%H:%MZ").to_string()
}

/// To the second, in UTC.
pub(super) fn seconds(instant: Timestamp) -> String {
    instant.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2027-04-11T09:30:00Z".parse().expect("well formed")
    }

    fn end(text: &str) -> Result<Option<String>, String> {
        text.parse::<Expiry>()?.end(now()).map(|end| end.map(seconds))
    }

    #[test]
    fn spans_are_numbers_with_units() {
        for (text, seconds) in
            [("10s", 10), ("5m", 300), ("1h", 3_600), ("7d", 604_800), ("2w", 1_209_600), ("1y", 31_536_000), ("1h30m", 5_400), ("0s", 0)]
        {
            assert_eq!(span(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "30", "d", "30 d", "-1d", "1.5h", "30days", "1h30", "9999999999999999999d", "99999999999999999999s", "٣d"] {
            assert!(span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn spans_are_shown_as_they_are_typed() {
        for (seconds, expected) in
            [(0, "0s"), (90, "1m30s"), (86_400, "1d"), (31_536_000, "365d"), (131_400, "1d12h30m"), (7_776_001, "90d1s")]
        {
            let text = span_text(&prost_types::Duration { seconds, nanos: 0 }).expect("whole seconds");
            assert_eq!((text.as_str(), span(&text)), (expected, Ok(Duration::from_secs(u64::try_from(seconds).expect("small")))));
        }
        assert_eq!(span_text(&prost_types::Duration { seconds: 1, nanos: 1 }), None);
        assert_eq!(span_text(&prost_types::Duration { seconds: -1, nanos: 0 }), None);
    }

    #[test]
    fn an_expiry_lies_in_the_future() {
        assert_eq!(end("never"), Ok(None));
        assert_eq!(end("30d"), Ok(Some("2027-05-11T09:30:00Z".to_owned())));
        assert_eq!(end("2027-04-12"), Ok(Some("2027-04-12T00:00:00Z".to_owned())));
        assert_eq!(end("2027-04-11T09:30:01Z"), Ok(Some("2027-04-11T09:30:01Z".to_owned())));
        assert_eq!(end("2027-04-11T12:00+02:00"), Ok(Some("2027-04-11T10:00:00Z".to_owned())));
        assert_eq!(end("2027-04-11"), Err("2027-04-11 is not later than today, 2027-04-11 (UTC)".to_owned()));
        assert_eq!(end("2027-04-11T09:30Z"), Err("2027-04-11T09:30:00Z has passed: it is 2027-04-11T09:30Z now".to_owned()));
        assert_eq!(end("0d"), Err("a token must live for some time".to_owned()));
        for text in ["2027-02-30", "2027-04-12T10:00", "tomorrow", "9999y9999y", "2027-4-12", "9999-12-31T23:59:60-10:00", "-2027-04-12"] {
            assert!(end(text).is_err(), "{text}: {:?}", end(text));
        }
    }

    #[test]
    fn filters_look_back_and_ahead() {
        let instant = |text: &str, back| text.parse::<Expiry>().and_then(|filter| filter.instant(now(), back)).map(minutes);
        assert_eq!(instant("7d", false), Ok("2027-04-18T09:30Z".to_owned()));
        assert_eq!(instant("7d", true), Ok("2027-04-04T09:30Z".to_owned()));
        assert_eq!(instant("2020-01-01", true), Ok("2020-01-01T00:00Z".to_owned()));
        assert!(instant("never", false).is_err());
    }

    #[test]
    fn tables_show_what_the_parser_takes() {
        let shown = minutes(now());
        assert_eq!(shown.parse(), Ok(Expiry::At(now())));
        assert_eq!(from_wire(&to_wire(now())), Some(now()));
        assert_eq!(from_wire(&prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }), None);
    }
}
