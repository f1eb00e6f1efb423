//! The rules that the settings of a token follow. Each broken one is named by the field that breaks it, with what it must be.

use std::{collections::BTreeMap, time::Duration};

use ipnet::IpNet;

use super::TokenPatch;
use crate::{
    ambient::Time,
    error::{Error, Result as Outcome, Violations},
    grant::{Kind, Token},
    scope::Scope,
    token::TokenId,
};

const NAME_CHARS_MAX: usize = 100;
const REASON_CHARS_MAX: usize = 200;
const PRINCIPAL_CHARS_MAX: usize = 128;
const SESSION_CHARS_MAX: usize = 128;
const AUDIENCE_CHARS_MAX: usize = 63;
const METADATA_KEY_CHARS_MAX: usize = 63;
const METADATA_VALUE_CHARS_MAX: usize = 256;
const SCOPES_MAX: usize = 100;
const AUDIENCES_MAX: usize = 20;
const CIDRS_MAX: usize = 50;
const METADATA_MAX: usize = 32;

const PAST: &str = "must be in the future; to end the token now, revoke it";

const DAY: Duration = Duration::from_hours(24);
const LIFETIME_DEFAULT: Duration = Duration::from_hours(90 * 24);
const LIFETIME_MIN: Duration = Duration::from_secs(1);
const LIFETIME_MAX: Duration = Duration::from_hours((100 * 365 + 25) * 24);
const GRACE_MAX: Duration = Duration::from_hours(7 * 24);

/// When a new token ends, as its creator says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// As usual for its kind.
    #[default]
    Usual,
    /// This long after its creation.
    For(Duration),
    /// At this instant.
    Until(Time),
    /// Never.
    Never,
}

/// A name that people read: 1 to 100 characters, trimmed.
pub(super) fn display_name(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.is_empty() {
        return Err("must not be empty: give it a name that people recognise".to_owned());
    }
    line(name, NAME_CHARS_MAX).map(str::to_owned)
}

/// Why something was done: at most 200 characters, trimmed.
pub(super) fn reason(text: &str) -> Result<String, String> {
    line(text.trim(), REASON_CHARS_MAX).map(str::to_owned)
}

/// A part of a name to look for.
pub(super) fn query(text: &str) -> Result<String, String> {
    line(text, NAME_CHARS_MAX).map(str::to_owned)
}

fn line(text: &str, chars_max: usize) -> Result<&str, String> {
    if text.chars().count() > chars_max {
        Err(format!("must be at most {chars_max} characters; it has {}", text.chars().count()))
    } else if text.chars().any(is_invisible) {
        Err("must not contain control characters, line breaks or characters that change the direction of writing".to_owned())
    } else {
        Ok(text)
    }
}

/// Characters that make a name look like another: controls, line separators, bidirectional marks, tags (Unicode TR 9 and 36). The joiners
/// U+200C and U+200D are not among them: Persian and emoji are written with them.
fn is_invisible(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{034f}' | '\u{061c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}'
                | '\u{fff9}'..='\u{fffb}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// The id of a principal.
pub(super) fn principal(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._@+:-".contains(&byte);
    if (1..=PRINCIPAL_CHARS_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {PRINCIPAL_CHARS_MAX} characters of A-Z a-z 0-9 . _ @ + : -"))
    }
}

/// The login session of a temporary token.
pub(super) fn session_id(text: &str, kind: Kind) -> Result<String, String> {
    if !text.is_empty() && kind == Kind::Permanent {
        Err("is only for TOKEN_KIND_TEMPORARY".to_owned())
    } else {
        line(text, SESSION_CHARS_MAX).map(str::to_owned)
    }
}

/// A product.
pub(super) fn audience(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    if (1..=AUDIENCE_CHARS_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {AUDIENCE_CHARS_MAX} characters of a-z 0-9 . _ -"))
    }
}

pub(super) fn scopes(field: &str, texts: &[String], violations: &mut Violations) -> Vec<Scope> {
    list(field, texts, SCOPES_MAX, violations, |text| text.parse().map_err(str::to_owned))
}

pub(super) fn audiences(field: &str, texts: &[String], violations: &mut Violations) -> Vec<String> {
    list(field, texts, AUDIENCES_MAX, violations, audience)
}

pub(super) fn allowed_cidrs(field: &str, texts: &[String], violations: &mut Violations) -> Vec<IpNet> {
    list(field, texts, CIDRS_MAX, violations, cidr)
}

/// A range, or a single address as a range of one. Bits behind the prefix are refused: they are most often a slip.
fn cidr(text: &str) -> Result<IpNet, String> {
    const RULE: &str = "must be an address range such as 10.0.0.0/8 or 2001:db8::/32, or a single address";
    let range = match text.parse::<std::net::IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse::<IpNet>().map_err(|_| RULE.to_owned())?,
    };
    if range.addr() != range.network() {
        return Err(format!("has bits set behind its prefix length: write {}", range.trunc()));
    }
    if matches!(range, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some()) {
        return Err("is an IPv4 address written as IPv6: write it as IPv4".to_owned());
    }
    Ok(range)
}

/// Checks every element; one that stands there twice is kept once.
fn list<T: PartialEq>(
    field: &str,
    texts: &[String],
    entries_max: usize,
    violations: &mut Violations,
    rule: impl Fn(&str) -> Result<T, String>,
) -> Vec<T> {
    if texts.len() > entries_max {
        violations.add(field, format!("must have at most {entries_max} entries; it has {}", texts.len()));
        return Vec::new();
    }
    let mut values = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match violations.take(&format!("{field}[{index}]"), rule(text)) {
            Some(value) if !values.contains(&value) => values.push(value),
            _ => {}
        }
    }
    values
}

pub(super) fn metadata(field: &str, entries: &BTreeMap<String, String>, violations: &mut Violations) {
    if entries.len() > METADATA_MAX {
        violations.add(field, format!("must have at most {METADATA_MAX} keys; it has {}", entries.len()));
    }
    for (key, value) in entries.iter().take(METADATA_MAX) {
        if key.is_empty() || key.chars().count() > METADATA_KEY_CHARS_MAX || key.chars().any(is_invisible) {
            violations.add(field, format!("keys must be 1 to {METADATA_KEY_CHARS_MAX} characters without control characters"));
        } else if value.chars().count() > METADATA_VALUE_CHARS_MAX
            || value.chars().any(|letter| is_invisible(letter) && !"\n\t".contains(letter))
        {
            let rule =
                format!("must be at most {METADATA_VALUE_CHARS_MAX} characters, without control characters but line breaks and tabs");
            violations.add(format!("{field}[{key}]"), rule);
        }
    }
}

/// The end of a new token. Says which field is wrong.
pub(super) fn expire_time(lifetime: Lifetime, kind: Kind, now: Time) -> Result<Time, (&'static str, String)> {
    let longest = match kind {
        Kind::Permanent => LIFETIME_MAX,
        Kind::Temporary => DAY,
    };
    let too_long = || match kind {
        Kind::Permanent => "must be at most 100 years away".to_owned(),
        Kind::Temporary => "must be at most 24 hours away for TOKEN_KIND_TEMPORARY".to_owned(),
    };
    match lifetime {
        Lifetime::Usual => Ok(now + longest.min(LIFETIME_DEFAULT)),
        Lifetime::Never if kind == Kind::Temporary => {
            Err(("never", "is not for TOKEN_KIND_TEMPORARY: give a ttl of at most 24 hours".to_owned()))
        }
        Lifetime::Never => Ok(Time::NEVER),
        Lifetime::For(ttl) if ttl < LIFETIME_MIN => Err(("ttl", "must be at least 1 second".to_owned())),
        Lifetime::For(ttl) if ttl > longest => Err(("ttl", too_long())),
        Lifetime::For(ttl) => Ok(now + ttl),
        Lifetime::Until(end) if end <= now => Err(("expire_time", "must be in the future".to_owned())),
        Lifetime::Until(end) if end > now + longest => Err(("expire_time", too_long())),
        Lifetime::Until(end) => Ok(end),
    }
}

/// Another end for a token that exists; its longest life counts from its creation.
pub(super) fn moved_expire_time(end: Time, kind: Kind, create_time: Time, now: Time) -> Result<Time, String> {
    if end <= now {
        return Err(PAST.to_owned());
    }
    let lifetime = if end == Time::NEVER { Lifetime::Never } else { Lifetime::Until(end) };
    expire_time(lifetime, kind, create_time).map_err(|(_, rule)| rule)
}

/// Until when the old secret stays good.
pub(super) fn grace_time(grace: Duration, expire_time: Time, now: Time) -> Result<Option<Time>, String> {
    if grace > GRACE_MAX {
        return Err("must be at most 7 days (604800s)".to_owned());
    }
    Ok((!grace.is_zero()).then(|| (now + grace).min(expire_time)))
}

/// A patch whose fields follow the rules, but for those that need the token to say.
pub(super) struct Patch {
    display_name: Option<String>,
    scopes: Option<Vec<Scope>>,
    audiences: Option<Vec<String>>,
    allowed_cidrs: Option<Vec<IpNet>>,
    metadata: Option<BTreeMap<String, String>>,
    expire_time: Option<Time>,
}

impl Patch {
    /// Checks everything that can be checked without the token.
    pub(super) fn check(patch: TokenPatch, id: &str, now: Time) -> Outcome<Self> {
        let mut violations = patch.violations;
        if patch.expire_time.is_some_and(|end| end <= now) {
            violations.add("token.expire_time", PAST);
        }
        violations.take("token.id", self::id(id));
        let display_name = patch.display_name.and_then(|name| violations.take("token.display_name", display_name(&name)));
        if let Some(metadata) = &patch.metadata {
            self::metadata("token.metadata", metadata, &mut violations);
        }
        let checked = Self {
            display_name,
            scopes: patch.scopes.map(|scopes| self::scopes("token.scopes", &scopes, &mut violations)),
            audiences: patch.audiences.map(|audiences| self::audiences("token.audiences", &audiences, &mut violations)),
            allowed_cidrs: patch.allowed_cidrs.map(|cidrs| self::allowed_cidrs("token.allowed_cidrs", &cidrs, &mut violations)),
            metadata: patch.metadata,
            expire_time: patch.expire_time,
        };
        violations.finish()?;
        Ok(checked)
    }

    /// Takes over what the patch names.
    pub(super) fn apply(self, token: &mut Token, now: Time) -> Outcome<()> {
        if let Some(end) = self.expire_time {
            let end = moved_expire_time(end, token.kind, token.create_time, now);
            token.expire_time = end.map_err(|rule| Error::invalid("token.expire_time", rule))?;
        }
        token.display_name = self.display_name.unwrap_or_else(|| token.display_name.clone());
        token.scopes = self.scopes.unwrap_or_else(|| token.scopes.clone());
        token.audiences = self.audiences.unwrap_or_else(|| token.audiences.clone());
        token.allowed_cidrs = self.allowed_cidrs.unwrap_or_else(|| token.allowed_cidrs.clone());
        token.metadata = self.metadata.unwrap_or_else(|| token.metadata.clone());
        Ok(())
    }
}

/// The id of a token.
pub(super) fn id(text: &str) -> Result<TokenId, &'static str> {
    TokenId::parse(text).ok_or("must be the id of a token: tok_ and 22 characters")
}

/// The caller's own name for a request.
pub(super) fn request_id(text: &str) -> Result<(), String> {
    if (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("must be 1 to 128 printable ASCII characters without blanks, such as a UUID".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time::from_micros(1_800_000_000_000_000);

    #[test]
    fn names_are_counted_in_characters_and_show_what_they_are() {
        assert_eq!(display_name("  Déploiement ").as_deref(), Ok("Déploiement"));
        assert!(display_name(&"ä".repeat(100)).is_ok());
        assert!(display_name(&"ä".repeat(101)).expect_err("too long").contains("101"));
        assert!(display_name("👩\u{200d}🚀 نامه\u{200c}ای").is_ok());
        for bad in ["", "   ", "a\u{e0041}", "a\u{ad}b", "a\nb", "a\u{7}b", "a\u{202e}b", "a\u{200f}b", "a\u{2066}b", "a\u{0}"] {
            assert!(display_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_are_exact() {
        assert_eq!(cidr("10.0.0.0/8").map(|range| range.to_string()).as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(cidr("10.1.2.3").map(|range| range.to_string()).as_deref(), Ok("10.1.2.3/32"));
        assert_eq!(cidr("2001:db8::1").map(|range| range.to_string()).as_deref(), Ok("2001:db8::1/128"));
        assert!(cidr("10.1.2.3/8").expect_err("bits behind the prefix").contains("10.0.0.0/8"));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "2001:db8::/129", "localhost", "10.0.0.0/8 ", "::ffff:10.0.0.0/104"] {
            assert!(cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lifetimes_stay_within_their_kind() {
        let end = |lifetime, kind| expire_time(lifetime, kind, NOW).map_err(|(field, _)| field);
        assert_eq!(end(Lifetime::Usual, Kind::Permanent), Ok(NOW + 90 * DAY));
        assert_eq!(end(Lifetime::Usual, Kind::Temporary), Ok(NOW + DAY));
        assert_eq!(end(Lifetime::Never, Kind::Permanent), Ok(Time::NEVER));
        assert_eq!(end(Lifetime::Never, Kind::Temporary), Err("never"));
        assert_eq!(end(Lifetime::For(Duration::from_millis(999)), Kind::Permanent), Err("ttl"));
        assert_eq!(end(Lifetime::For(DAY), Kind::Temporary), Ok(NOW + DAY));
        assert_eq!(end(Lifetime::For(DAY + LIFETIME_MIN), Kind::Temporary), Err("ttl"));
        assert_eq!(end(Lifetime::For(2 * LIFETIME_MAX), Kind::Permanent), Err("ttl"));
        assert_eq!(end(Lifetime::Until(NOW), Kind::Permanent), Err("expire_time"));
        assert_eq!(end(Lifetime::Until(Time::NEVER), Kind::Permanent), Err("expire_time"));
        assert!(moved_expire_time(NOW + DAY, Kind::Temporary, NOW - DAY, NOW).is_err(), "counted from creation");
    }

    #[test]
    fn grace_ends_with_the_token() {
        assert_eq!(grace_time(Duration::ZERO, Time::NEVER, NOW), Ok(None));
        assert_eq!(grace_time(DAY, NOW + DAY / 2, NOW), Ok(Some(NOW + DAY / 2)));
        assert!(grace_time(8 * DAY, Time::NEVER, NOW).is_err());
    }
}
