//! Why a question could not be answered.
//!
//! Invariant: `Display` is what a caller may read: fixed text and the names of fields, nothing from below. What lies below
//! goes to the log, once, where the error is turned into a status (test `errors_show_nothing_from_below`).

use std::{borrow::Cow, fmt};

/// Something from below (database, operating system) that only the log gets to see.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// The result of every room.
pub type Result<T> = std::result::Result<T, Error>;

/// Every way in which Keyward, or its caller, can fail. A refused token is not among them: that is an answer.
#[derive(Debug)]
pub enum Error {
    /// The request breaks rules; every broken one is named.
    Invalid(Vec<Violation>),
    /// The caller did not show who they are.
    Unauthenticated(&'static str),
    /// The caller may not do this.
    Denied(String),
    /// There is no such thing, as far as this caller may know.
    NotFound(&'static str),
    /// There is such a thing already: which.
    Exists(&'static str),
    /// The thing is not any more what the caller has seen.
    Conflict,
    /// The thing is in a state that does not allow this.
    Precondition(Cow<'static, str>),
    /// Too much at once; try again shortly.
    Overloaded(&'static str),
    /// The store cannot be reached or does not take the change; try again.
    Unavailable(Source),
    /// A fault of ours.
    Internal(Source),
}

/// A rule that one field of a request breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field, as in the proto: `token.scopes[2]`.
    pub field: String,
    /// What it must be, in a sentence that says how to mend it.
    pub rule: String,
}

impl Error {
    /// The state of something does not allow this.
    pub fn precondition(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Precondition(text.into())
    }

    /// One broken rule.
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), rule: rule.into() }])
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(violations) => {
                if let Some(first) = violations.first() {
                    write!(f, "{}: {}", first.field, first.rule)?;
                }
                if violations.len() > 1 { f.write_str(" (and more, in the details)") } else { Ok(()) }
            }
            Self::Denied(text) => f.write_str(text),
            Self::Precondition(text) => f.write_str(text),
            Self::Unauthenticated(text) | Self::Overloaded(text) => f.write_str(text),
            Self::Exists(what) => write!(f, "there is a {what} already: take another"),
            Self::NotFound(what) => write!(f, "there is no such {what}"),
            Self::Conflict => f.write_str("the etag is not the current one: somebody else changed it; read it again and repeat the change"),
            Self::Unavailable(_) => f.write_str("the store cannot be reached or is full; try again"),
            Self::Internal(_) => f.write_str("internal error; the server's log says more"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unavailable(source) | Self::Internal(source) => Some(source.as_ref()),
            Self::Invalid(_)
            | Self::Unauthenticated(_)
            | Self::Denied(_)
            | Self::NotFound(_)
            | Self::Exists(_)
            | Self::Conflict
            | Self::Precondition(_)
            | Self::Overloaded(_) => None,
        }
    }
}

/// Errors travel in headers, of which clients take 8 KiB by default.
const VIOLATIONS_MAX: usize = 12;

/// Collects every broken rule of a request, so that the caller hears of all of them at once; of very many, of the first 12 and how many
/// there are.
#[derive(Clone, Debug, Default)]
pub struct Violations {
    named: Vec<Violation>,
    unnamed: usize,
}

impl Violations {
    /// Notes a broken rule.
    pub fn add(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        if self.named.len() < VIOLATIONS_MAX {
            self.named.push(Violation { field: field.into(), rule: rule.into() });
        } else {
            self.unnamed += 1;
        }
    }

    /// Takes the value, or notes the rule that it breaks.
    pub fn take<T>(&mut self, field: &str, value: std::result::Result<T, impl Into<String>>) -> Option<T> {
        value.map_err(|rule| self.add(field, rule)).ok()
    }

    /// Takes over what was noted elsewhere.
    pub fn append(&mut self, others: Self) {
        for violation in others.named {
            self.add(violation.field, violation.rule);
        }
        self.unnamed += others.unnamed;
    }

    /// An error if any rule was broken.
    pub fn finish(mut self) -> Result<()> {
        if self.named.is_empty() {
            return Ok(());
        }
        if self.unnamed > 0 {
            self.named.push(Violation { field: "…".to_owned(), rule: format!("{} more rules are broken", self.unnamed) });
        }
        Err(Error::Invalid(self.named))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_show_nothing_from_below() {
        for error in [Error::Unavailable("password=hunter2".into()), Error::Internal("password=hunter2".into())] {
            assert!(!error.to_string().contains("hunter2"), "{error}");
            assert_eq!(std::error::Error::source(&error).map(ToString::to_string).as_deref(), Some("password=hunter2"));
        }
    }

    #[test]
    fn every_violation_is_named() {
        let mut violations = Violations::default();
        violations.add("a", "must be short");
        violations.add("b", "must be long");
        let error = violations.finish().expect_err("two rules are broken");
        assert_eq!(error.to_string(), "a: must be short (and more, in the details)");
        assert!(matches!(error, Error::Invalid(named) if named.len() == 2));
    }

    #[test]
    fn very_many_violations_are_counted() {
        let mut violations = Violations::default();
        for number in 0..60_000 {
            violations.add(format!("field[{number}]"), "must be short");
        }
        let Err(Error::Invalid(named)) = violations.finish() else { panic!("rules are broken") };
        assert_eq!((named.len(), named[12].rule.as_str()), (13, "59988 more rules are broken"));
    }
}
