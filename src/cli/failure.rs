//! Why a command did not do what it was asked to, and the exit code that says so to scripts.
//!
//! Invariant: every status of gRPC has one exit code (test `every_status_has_its_exit_code`).

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{
    session::Format,
    table::{escape, is_steering},
};
use crate::error::Violation;

/// How a command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Exit {
    /// Done; the token is valid; the service is serving.
    Good = 0,
    /// The answer is no.
    Refused = 1,
    /// The command line is not well formed.
    Usage = 2,
    /// There was no answer: Keyward cannot be reached, is overloaded or failed. Trying again may help.
    Unreachable = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failure with everything that is known about it.
#[derive(Debug)]
pub(super) struct Failure(Box<Cause>);

#[derive(Debug)]
struct Cause {
    exit: Exit,
    code: &'static str,
    /// What it is about, if several things were asked for.
    subject: String,
    message: String,
    reason: String,
    violations: Vec<Violation>,
    retry_delay: Option<Duration>,
    hint: String,
}

impl Failure {
    fn new(exit: Exit, code: &'static str, message: String) -> Self {
        let (subject, reason, violations, retry_delay, hint) = Default::default();
        Self(Box::new(Cause { exit, code, subject, message, reason, violations, retry_delay, hint }))
    }

    /// What was typed cannot be done.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "USAGE", message.into())
    }

    /// What was typed, or the file that was named, breaks rules.
    pub(super) fn mistakes(message: impl Into<String>, violations: Vec<Violation>) -> Self {
        let mut failure = Self::usage(message);
        failure.0.violations = violations;
        failure
    }

    /// Keyward could not be asked.
    pub(super) fn unreachable(message: impl Into<String>) -> Self {
        Self::new(Exit::Unreachable, "UNAVAILABLE", message.into())
    }

    /// The answer could not be shown.
    pub(super) fn output(message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, "OUTPUT", message.into())
    }

    /// Nobody reads the answer any more, as in `keyward token list | head -1`: nothing to complain about.
    pub(super) fn silent() -> Self {
        Self::output("")
    }

    /// Names what it is about, where several things were asked for.
    #[must_use]
    pub(super) fn about(mut self, subject: &str) -> Self {
        self.0.subject = format!("{subject}: ");
        self
    }

    /// Adds what may help, if it is not known whether the call took effect.
    #[must_use]
    pub(super) fn hint_if_unanswered(mut self, hint: impl FnOnce() -> String) -> Self {
        if self.0.exit == Exit::Unreachable {
            self.0.hint = hint();
        }
        self
    }

    /// Adds what is wrong most often when two sides do not understand each other's first bytes: one speaks TLS and the other does not.
    #[must_use]
    pub(super) fn hint_scheme(self) -> Self {
        let (frame, record) = (self.0.message.contains(NO_FRAME), self.0.message.contains(NO_TLS_RECORD));
        match (frame, record) {
            (true, _) => self.hint_if_unanswered(|| "if that server uses TLS, the address must start with https://".to_owned()),
            (_, true) => self.hint_if_unanswered(|| "that server does not use TLS: the address must start with http://".to_owned()),
            (false, false) => self,
        }
    }

    pub(super) fn exit(&self) -> Exit {
        self.0.exit
    }

    /// Says what went wrong. A terminal that is gone cannot be told.
    pub(super) fn print(&self, format: Format, err: &mut dyn Write) {
        if !self.0.message.is_empty() {
            let text = if format == Format::Json { self.json() } else { self.text() };
            let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
        }
    }

    fn text(&self) -> String {
        let cause = &self.0;
        let colon = if cause.violations.is_empty() { "" } else { ":" };
        let mut text = format!("keyward: {}{}{colon}\n", escape(&cause.subject), escape(self.headline()));
        // Writing to a String cannot fail.
        for Violation { field, rule } in &cause.violations {
            let _ = writeln!(text, "  {}: {}", escape(field), escape(rule));
        }
        if let Some(delay) = cause.retry_delay {
            let _ = writeln!(text, "  try again in {delay:?}");
        }
        if !cause.hint.is_empty() {
            let _ = writeln!(text, "  {}", escape(&cause.hint));
        }
        text
    }

    /// The message, which the server takes from the first violation if there are some: they are listed below it.
    fn headline(&self) -> &str {
        let is_own = self.0.violations.is_empty() || self.0.exit == Exit::Usage;
        if is_own { &self.0.message } else { "the request breaks rules" }
    }

    fn json(&self) -> String {
        let cause = &self.0;
        let violations: Vec<_> =
            cause.violations.iter().map(|violation| serde_json::json!({ "field": violation.field, "rule": violation.rule })).collect();
        let mut object = serde_json::Map::from_iter([
            ("code".to_owned(), cause.code.into()),
            ("message".to_owned(), format!("{}{}", cause.subject, cause.message).into()),
            ("reason".to_owned(), cause.reason.clone().into()),
            ("violations".to_owned(), violations.into()),
        ]);
        if let Some(delay) = cause.retry_delay {
            object.insert("retryDelay".to_owned(), format!("{}s", delay.as_secs_f64()).into());
        }
        if !cause.hint.is_empty() {
            object.insert("hint".to_owned(), cause.hint.clone().into());
        }
        let object = serde_json::Value::Object(object);
        disarm(&format!("{object:#}\n"))
    }
}

/// JSON whose texts cannot steer a terminal: JSON itself escapes only the controls of ASCII.
pub(super) fn disarm(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character != '\n' && is_steering(character) {
            let _ = write!(text, "\\u{:04x}", u32::from(character));
        } else {
            text.push(character);
        }
    }
    text
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        // Nothing that came over the wire has a source: the call broke on the way.
        if let Some(source) = status.source() {
            let cause = root(source);
            return if cause == TIMED_OUT { late() } else { Self::unreachable(format!("the connection broke: {cause}")).hint_scheme() };
        }
        let (exit, code) = meaning(status.code());
        let message = if status.message().is_empty() { status.code().description() } else { status.message() };
        let mut failure = Self::new(exit, code, message.to_owned());
        let details = status.get_error_details();
        failure.0.reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
        failure.0.retry_delay = details.retry_info().and_then(|info| info.retry_delay);
        let violations = details.bad_request().map(|request| request.field_violations.as_slice()).unwrap_or_default();
        failure.0.violations =
            violations.iter().map(|violation| Violation { field: violation.field.clone(), rule: violation.description.clone() }).collect();
        failure
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::silent(),
            _ => Self::output(format!("the answer cannot be written: {error}")),
        }
    }
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        Self::new(Exit::Unreachable, "INTERNAL", error.to_string())
    }
}

/// What tonic says when the deadline of a call passes on our side.
const TIMED_OUT: &str = "Timeout expired";

/// What h2 says when the answer is not HTTP/2.
const NO_FRAME: &str = "frame with invalid size";
/// What rustls says when the answer is not TLS.
const NO_TLS_RECORD: &str = "InvalidContentType";

/// Nobody answered in time.
pub(super) fn late() -> Failure {
    Failure::new(Exit::Unreachable, "DEADLINE_EXCEEDED", "no answer in time; --timeout gives it longer".to_owned())
}

/// The deepest cause, which is the one that says something.
pub(super) fn root(error: &dyn Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

/// Only what is about the request or the caller is a refusal. A fault of the server says nothing about a token, so scripts must not take
/// it for a no.
fn meaning(code: Code) -> (Exit, &'static str) {
    match code {
        Code::Ok => (Exit::Good, "OK"),
        Code::InvalidArgument => (Exit::Refused, "INVALID_ARGUMENT"),
        Code::NotFound => (Exit::Refused, "NOT_FOUND"),
        Code::AlreadyExists => (Exit::Refused, "ALREADY_EXISTS"),
        Code::PermissionDenied => (Exit::Refused, "PERMISSION_DENIED"),
        Code::Unauthenticated => (Exit::Refused, "UNAUTHENTICATED"),
        Code::FailedPrecondition => (Exit::Refused, "FAILED_PRECONDITION"),
        Code::Aborted => (Exit::Refused, "ABORTED"),
        Code::OutOfRange => (Exit::Refused, "OUT_OF_RANGE"),
        Code::Unimplemented => (Exit::Refused, "UNIMPLEMENTED"),
        Code::Cancelled => (Exit::Unreachable, "CANCELLED"),
        Code::Unknown => (Exit::Unreachable, "UNKNOWN"),
        Code::DeadlineExceeded => (Exit::Unreachable, "DEADLINE_EXCEEDED"),
        Code::ResourceExhausted => (Exit::Unreachable, "RESOURCE_EXHAUSTED"),
        Code::Internal => (Exit::Unreachable, "INTERNAL"),
        Code::Unavailable => (Exit::Unreachable, "UNAVAILABLE"),
        Code::DataLoss => (Exit::Unreachable, "DATA_LOSS"),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    /// An error around another, as those of tonic's transport are.
    #[derive(Debug)]
    struct Transport(tonic::TimeoutExpired);

    impl std::fmt::Display for Transport {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("transport error")
        }
    }

    impl Error for Transport {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    fn printed(failure: &Failure, format: Format) -> String {
        let mut err = Vec::new();
        failure.print(format, &mut err);
        String::from_utf8(err).expect("text")
    }

    fn broken_rules() -> Failure {
        let mut details = ErrorDetails::with_bad_request_violation("display_name", "must not be empty");
        details.add_bad_request_violation("scopes[1]", "must be \u{9b}2J lower case").set_error_info(
            "INVALID",
            "keyward",
            [("a".to_owned(), "b".to_owned())],
        );
        Status::with_error_details(
            Code::InvalidArgument,
            "display_name: must not be empty; scopes[1]: must be \u{9b}2J lower case",
            details,
        )
        .into()
    }

    #[test]
    fn every_status_has_its_exit_code() {
        let refused = [3, 5, 6, 7, 9, 10, 11, 12, 16];
        for number in 1..=16 {
            let failure = Failure::from(Status::new(Code::from_i32(number), "why"));
            let expected = if refused.contains(&number) { Exit::Refused } else { Exit::Unreachable };
            assert_eq!(failure.exit(), expected, "{number}");
        }
        assert_eq!(Exit::Refused as u8 + Exit::Usage as u8 + Exit::Unreachable as u8, 6);
    }

    #[test]
    fn people_see_each_broken_rule_on_a_line() {
        let text = printed(&broken_rules(), Format::Table);
        let expected = "keyward: the request breaks rules:\n  display_name: must not be empty\n  scopes[1]: must be \\u{9b}2J lower case\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn programs_see_an_object() {
        let text = printed(&broken_rules(), Format::Json);
        let object: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(object["code"], "INVALID_ARGUMENT");
        assert_eq!(object["reason"], "INVALID");
        assert_eq!(object["violations"][0]["field"], "display_name");
        assert_eq!(object["violations"][1]["rule"], "must be \u{9b}2J lower case");
        assert!(!text.contains('\u{9b}'));
    }

    #[test]
    fn people_are_told_when_to_try_again() {
        let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1500)));
        let failure = Failure::from(Status::with_error_details(Code::ResourceExhausted, "too much at once", details));
        assert_eq!(printed(&failure, Format::Table), "keyward: too much at once\n  try again in 1.5s\n");
        assert!(printed(&failure, Format::Json).contains("\"retryDelay\": \"1.5s\""));
    }

    #[test]
    fn a_call_that_broke_on_the_way_is_no_refusal() {
        let failure = Failure::from(Status::from_error(Box::new(io::Error::other("reset by peer"))));
        assert_eq!(failure.exit(), Exit::Unreachable);
        assert_eq!(printed(&failure, Format::Table), "keyward: the connection broke: reset by peer\n");
        let failure = Failure::from(Status::from_error(Box::new(Transport(tonic::TimeoutExpired(())))));
        assert!(printed(&failure, Format::Json).contains("DEADLINE_EXCEEDED"));
        let failure = Failure::from(Status::from_error(Box::new(io::Error::other(NO_FRAME))));
        assert!(printed(&failure, Format::Table).ends_with("\n  if that server uses TLS, the address must start with https://\n"));
    }

    #[test]
    fn hints_come_only_where_the_outcome_is_open() {
        let hinted = |code| printed(&Failure::from(Status::new(code, "why")).hint_if_unanswered(|| "again".to_owned()), Format::Table);
        assert_eq!(hinted(Code::Unavailable), "keyward: why\n  again\n");
        assert_eq!(hinted(Code::NotFound), "keyward: why\n");
    }
}
