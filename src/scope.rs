//! Scopes: their grammar, and which scope covers which.
//!
//! Invariant: `*` never covers a right on Keyward itself (test `no_wildcard_covers_a_right_on_keyward`).

mod routes;

use std::{fmt, str::FromStr};

pub use routes::{Mistake, Operation, Resource, Routes};

/// The resource of the rights on Keyward itself.
const RESERVED: &str = "keyward";

const PART_CHARS_MAX: usize = 63;

/// `resource:operation`, `resource:*` or `*`; or a right on Keyward itself, `keyward:…`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope(Box<str>);

impl Scope {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it stands for more than one operation.
    #[must_use]
    pub fn is_wildcard(&self) -> bool {
        self.0.ends_with('*')
    }

    /// Whether it is a right on Keyward itself.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.resource() == RESERVED
    }

    /// Whether a holder of this may do all that `other` names.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        covers(&self.0, &other.0)
    }

    fn resource(&self) -> &str {
        resource(&self.0)
    }

    /// Refuses a text that is no scope.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn check(text: &str) -> Result<(), &'static str> {
        const RULE: &str = "must be `resource:operation`, `resource:*` or `*`; each part of lower-case letters, digits, `-` and `.`, starting with \
                            a letter, at most 63 characters";
        const RIGHTS: &str =
            "is not a right on Keyward: these are keyward:root, keyward:admin, keyward:self, keyward:validate, keyward:validate-any";
        match text.split_once(':') {
            None if text == "*" => Ok(()),
            Some((RESERVED, _)) => Right::named(text).map(|_| ()).ok_or(RIGHTS),
            Some((resource, operation)) if is_part(resource) && (operation == "*" || is_part(operation)) => Ok(()),
            _ => Err(RULE),
        }
    }

    /// Refuses a text that names no single operation.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn check_single(text: &str) -> Result<(), &'static str> {
        Self::check(text)?;
        if text.ends_with('*') { Err("must not be a wildcard: name the operation that the use needs") } else { Ok(()) }
    }
}

/// Whether a holder of the scope `held` may do all that `other` names; both as their texts.
#[must_use]
pub fn covers(held: &str, other: &str) -> bool {
    held == other
        || match held {
            "*" => resource(other) != RESERVED,
            wildcard => wildcard.strip_suffix(":*").is_some_and(|held| held == resource(other)),
        }
}

fn resource(scope: &str) -> &str {
    scope.split(':').next().unwrap_or_default()
}

impl FromStr for Scope {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::check(text).map(|()| Self(text.into()))
    }
}

/// What a scope of the form `keyward:…` allows on Keyward itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Right {
    /// `keyward:root`: everything everywhere.
    Root,
    /// `keyward:admin`: everything in its workspace.
    Admin,
    /// `keyward:self`: the tokens of its own principal.
    Own,
    /// `keyward:validate`: judging tokens of its workspace.
    Validate,
    /// `keyward:validate-any`: judging tokens of every workspace.
    ValidateAny,
}

impl Right {
    /// The right that a scope is; nothing if it is none.
    #[must_use]
    pub fn of(scope: &Scope) -> Option<Self> {
        Self::named(scope.as_str())
    }

    /// The right that the text of a scope is; nothing if it is none.
    #[must_use]
    pub fn named(scope: &str) -> Option<Self> {
        Some(match scope {
            "keyward:root" => Self::Root,
            "keyward:admin" => Self::Admin,
            "keyward:self" => Self::Own,
            "keyward:validate" => Self::Validate,
            "keyward:validate-any" => Self::ValidateAny,
            _ => return None,
        })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_part(text: &str) -> bool {
    text.len() <= PART_CHARS_MAX
        && text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(text: &str) -> Scope {
        text.parse().expect(text)
    }

    #[test]
    fn the_grammar_takes_what_it_says() {
        for text in ["*", "agents:list", "agents:*", "knowledge-base.v2:search", "keyward:root", "keyward:validate-any"] {
            assert_eq!(scope(text).as_str(), text);
        }
        let long = format!("{}:list", "a".repeat(64));
        for text in [
            "",
            ":",
            "a",
            "a:",
            ":a",
            "a:b:c",
            "A:b",
            "a:B",
            "1a:b",
            "a:1b",
            "a b:c",
            "a:b ",
            "**",
            "*:a",
            "*:*",
            "a:b*",
            "ä:b",
            "keyward:*",
            "keyward:",
            "keyward:Root",
            "keyward:all",
            &long,
        ] {
            assert!(text.parse::<Scope>().is_err(), "{text}");
        }
    }

    #[test]
    fn wildcards_cover_their_resource_only() {
        assert!(scope("agents:*").covers(&scope("agents:list")));
        assert!(scope("agents:*").covers(&scope("agents:*")));
        assert!(scope("*").covers(&scope("agents:*")));
        assert!(scope("*").covers(&scope("*")));
        assert!(!scope("agents:*").covers(&scope("agents.v2:list")));
        assert!(!scope("agents:*").covers(&scope("*")));
        assert!(!scope("agents:list").covers(&scope("agents:*")));
        assert!(!scope("agents:list").covers(&scope("agents:list-all")));
    }

    #[test]
    fn no_wildcard_covers_a_right_on_keyward() {
        for right in ["keyward:root", "keyward:admin", "keyward:self", "keyward:validate", "keyward:validate-any"] {
            assert!(!scope("*").covers(&scope(right)), "{right}");
            assert!(scope(right).covers(&scope(right)), "{right}");
        }
    }
}
