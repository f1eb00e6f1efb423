//! The rules that fields follow. A broken one is said as what the field must be, in words that mend it.

mod notices;

use std::{collections::BTreeMap, time::Duration};

use ipnet::IpNet;

pub use notices::{days_before, emails, renew_url, webhook_url};

use crate::{ambient::Time, error::Violations, grant::Kind, scope::Scope, token::TokenId, workspace::Policy};

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

/// Why an end cannot be moved there.
pub const PAST: &str = "must be in the future; to end the token now, revoke it";

const LIFETIME_MIN: Duration = Duration::from_secs(1);
const PERMANENT_MAX: Duration = Duration::from_hours((100 * 365 + 25) * 24);
const TEMPORARY_MAX: Duration = Duration::from_hours(30 * 24);
const GRACE_MAX: Duration = Duration::from_hours(7 * 24);
const TOKENS_PER_PRINCIPAL_MAX: u32 = 100_000;
const WORKSPACE_CHARS_MAX: usize = 63;
/// RFC 5321, section 4.5.3.1.3: a path of 256 characters, less its angle brackets.
const EMAIL_CHARS_MAX: usize = 254;
const PAGE_SIZE_DEFAULT: u64 = 50;
const PAGE_SIZE_MAX: u64 = 1_000;

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
    /// As this day begins.
    UntilDay(Time),
    /// Never.
    Never,
}

/// A name that people read: 1 to 100 characters, trimmed.
pub fn display_name(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.is_empty() {
        return Err("must not be empty: give it a name that people recognise".to_owned());
    }
    line(name, NAME_CHARS_MAX).map(str::to_owned)
}

/// Why something was done: at most 200 characters, trimmed.
pub fn reason(text: &str) -> Result<String, String> {
    line(text.trim(), REASON_CHARS_MAX).map(str::to_owned)
}

/// A part of a name to look for.
pub fn query(text: &str) -> Result<String, String> {
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
pub fn principal(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._@+:-".contains(&byte);
    if (1..=PRINCIPAL_CHARS_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {PRINCIPAL_CHARS_MAX} characters of A-Z a-z 0-9 . _ @ + : -"))
    }
}

/// The login session of a temporary token.
pub fn session_id(text: &str, kind: Kind) -> Result<String, String> {
    if !text.is_empty() && kind == Kind::Permanent { Err("is only for TOKEN_KIND_TEMPORARY".to_owned()) } else { session(text) }
}

/// A login session to look for.
pub fn session(text: &str) -> Result<String, String> {
    line(text, SESSION_CHARS_MAX).map(str::to_owned)
}

/// A product.
pub fn audience(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    if (1..=AUDIENCE_CHARS_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {AUDIENCE_CHARS_MAX} characters of a-z 0-9 . _ -"))
    }
}

/// Scopes of a token: at most 100.
pub fn scopes(field: &str, texts: &[String], violations: &mut Violations) -> Vec<Scope> {
    list(field, texts, SCOPES_MAX, violations, |text| text.parse().map_err(str::to_owned))
}

/// Products of a token: at most 20.
pub fn audiences(field: &str, texts: &[String], violations: &mut Violations) -> Vec<String> {
    list(field, texts, AUDIENCES_MAX, violations, audience)
}

/// Address ranges of a token: at most 50.
pub fn allowed_cidrs(field: &str, texts: &[String], violations: &mut Violations) -> Vec<IpNet> {
    list(field, texts, CIDRS_MAX, violations, cidr)
}

/// A range, or a single address as a range of one. Bits behind the prefix are refused: they are most often a slip.
pub fn cidr(text: &str) -> Result<IpNet, String> {
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

/// Free text of a token: at most 32 keys.
pub fn metadata(field: &str, entries: &BTreeMap<String, String>, violations: &mut Violations) {
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

/// The end of a new token. Says which field is wrong, and the longest life that the policy allows.
pub fn expire_time(lifetime: Lifetime, kind: Kind, policy: &Policy, now: Time) -> Result<Time, (&'static str, String)> {
    let (longest, usual, name) = match kind {
        Kind::Permanent => (policy.max_permanent_ttl, policy.default_ttl, "max_permanent_ttl"),
        Kind::Temporary => (policy.max_temporary_ttl, policy.max_temporary_ttl, "max_temporary_ttl"),
    };
    let too_long = || format!("must be at most {} away, which is the workspace's {name}", span(longest));
    match lifetime {
        Lifetime::Usual => Ok(now + usual.min(longest)),
        Lifetime::Never if kind == Kind::Temporary => {
            Err(("never", format!("is not for TOKEN_KIND_TEMPORARY: give a ttl of at most {}", span(longest))))
        }
        Lifetime::Never if !policy.allow_never => {
            Err(("never", format!("is not allowed by the workspace's policy (allow_never): give a ttl of at most {}", span(longest))))
        }
        Lifetime::Never => Ok(Time::NEVER),
        Lifetime::For(ttl) if ttl < LIFETIME_MIN => Err(("ttl", "must be at least 1 second".to_owned())),
        Lifetime::For(ttl) if ttl > longest => Err(("ttl", too_long())),
        Lifetime::For(ttl) => Ok(now + ttl),
        Lifetime::Until(end) if end <= now => Err(("expire_time", "must be in the future".to_owned())),
        Lifetime::Until(end) if end > now + longest => Err(("expire_time", too_long())),
        Lifetime::Until(end) => Ok(end),
        Lifetime::UntilDay(day) if day <= now => Err(("expire_date", "must be later than today (UTC)".to_owned())),
        Lifetime::UntilDay(day) if day > now + longest => Err(("expire_date", too_long())),
        Lifetime::UntilDay(day) => Ok(day),
    }
}

/// Another end for a token that exists; its longest life counts from its creation.
pub fn moved_expire_time(end: Time, kind: Kind, policy: &Policy, create_time: Time, now: Time) -> Result<Time, String> {
    if end <= now {
        return Err(PAST.to_owned());
    }
    let lifetime = if end == Time::NEVER { Lifetime::Never } else { Lifetime::Until(end) };
    let counted = |rule: String| if end == Time::NEVER { rule } else { format!("{rule}, counted from the token's creation") };
    expire_time(lifetime, kind, policy, create_time).map_err(|(_, rule)| counted(rule))
}

/// A span as people and the settings say it: `90 days (7776000s)`.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (count, unit) = match seconds {
        _ if seconds.is_multiple_of(86_400) => (seconds / 86_400, "day"),
        _ if seconds.is_multiple_of(3_600) => (seconds / 3_600, "hour"),
        _ => return format!("{seconds}s"),
    };
    format!("{count} {unit}{} ({seconds}s)", if count == 1 { "" } else { "s" })
}

/// A policy: each field by itself, and those that must fit together. `path` is what comes before the names of its fields.
pub fn policy(path: &str, policy: &Policy, violations: &mut Violations) {
    policy_fields(path, policy, violations);
    if policy.default_ttl > policy.max_permanent_ttl {
        let rule = format!("must be at most max_permanent_ttl, which is {}: change both", span(policy.max_permanent_ttl));
        violations.add(format!("{path}.default_ttl"), rule);
    }
}

/// The fields of a policy, each by itself.
pub fn policy_fields(path: &str, policy: &Policy, violations: &mut Violations) {
    let mut within = |field: &str, ttl: Duration, longest: Duration| {
        if !(LIFETIME_MIN..=longest).contains(&ttl) || ttl.subsec_nanos() > 0 {
            violations.add(format!("{path}.{field}"), format!("must be from 1 second to {}, in whole seconds", span(longest)));
        }
    };
    within("default_ttl", policy.default_ttl, PERMANENT_MAX);
    within("max_permanent_ttl", policy.max_permanent_ttl, PERMANENT_MAX);
    within("max_temporary_ttl", policy.max_temporary_ttl, TEMPORARY_MAX);
    if !(1..=TOKENS_PER_PRINCIPAL_MAX).contains(&policy.max_tokens_per_principal) {
        violations.add(format!("{path}.max_tokens_per_principal"), format!("must be 1 to {TOKENS_PER_PRINCIPAL_MAX}; left out it is 100"));
    }
}

/// The id of a new workspace (RFC 1035, section 2.3.1, a label in lower case).
pub fn workspace_id(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let shaped = text.starts_with(|first: char| first.is_ascii_lowercase()) && !text.ends_with('-') && text.bytes().all(allowed);
    if shaped && text.len() <= WORKSPACE_CHARS_MAX {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {WORKSPACE_CHARS_MAX} characters of a-z 0-9 -, beginning with a letter and not ending with -"))
    }
}

/// The name of a principal: as [`display_name`], but empty is its id.
pub fn principal_name(text: &str, id: &str) -> Result<String, String> {
    if text.trim().is_empty() { Ok(id.to_owned()) } else { line(text.trim(), NAME_CHARS_MAX).map(str::to_owned) }
}

/// A mail address, as far as that can be told from its form (RFC 5321, section 4.1.2, without quoted names); empty is none.
pub fn email(text: &str) -> Result<String, String> {
    const RULE: &str = "must be a mail address such as ada@example.com, or empty";
    let text = text.trim();
    if text.is_empty() {
        return Ok(String::new());
    }
    let (name, domain) = text.rsplit_once('@').ok_or(RULE)?;
    let in_name = |letter: char| {
        !letter.is_ascii() && !is_invisible(letter) || letter.is_ascii_alphanumeric() || "!#$%&'*+/=?^_`{|}~.-".contains(letter)
    };
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|letter| letter == '-' || letter.is_ascii_alphanumeric() || (!letter.is_ascii() && !is_invisible(letter)))
    };
    let name_is_good = (1..=64).contains(&name.len()) && name.chars().all(in_name) && !name.split('.').any(str::is_empty);
    if text.len() <= EMAIL_CHARS_MAX && name_is_good && domain.split('.').all(is_label) {
        Ok(text.to_owned())
    } else {
        Err(RULE.to_owned())
    }
}

/// What a page token must be.
pub const PAGE_TOKEN: &str =
    "must be the next_page_token of the page before, with the same arguments otherwise; leave it empty to start again";

/// How many entries a page shall have.
pub fn page_size(asked: i32) -> Result<u64, &'static str> {
    match u64::try_from(asked) {
        Err(_) => Err("must not be negative; 0 means 50"),
        Ok(0) => Ok(PAGE_SIZE_DEFAULT),
        Ok(size) => Ok(size.min(PAGE_SIZE_MAX)),
    }
}

/// Until when the old secret stays good.
pub fn grace_time(grace: Duration, expire_time: Time, now: Time) -> Result<Option<Time>, String> {
    if grace > GRACE_MAX {
        return Err("must be at most 7 days (604800s)".to_owned());
    }
    Ok((!grace.is_zero()).then(|| (now + grace).min(expire_time)))
}

/// The id of a token.
pub fn id(text: &str) -> Result<TokenId, &'static str> {
    TokenId::parse(text).ok_or("must be the id of a token: tok_ and 22 characters")
}

/// The id of a fault.
pub fn fault_id(text: &str) -> Result<(), &'static str> {
    if is_sorted_id(text, "flt_") { Ok(()) } else { Err("must be the id of a fault: flt_ and 22 characters") }
}

/// The id of a notice.
pub fn notice_id(text: &str) -> Result<(), &'static str> {
    if is_sorted_id(text, "ntc_") { Ok(()) } else { Err("must be the id of a notice: ntc_ and 22 characters") }
}

fn is_sorted_id(text: &str, kind: &str) -> bool {
    text.strip_prefix(kind).is_some_and(|rest| rest.len() == 22 && rest.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// The caller's own name for a request.
pub fn request_id(text: &str) -> Result<(), String> {
    if (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("must be 1 to 128 printable ASCII characters without blanks, such as a UUID".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

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
    fn lifetimes_stay_within_the_policy() {
        let policy = Policy { max_permanent_ttl: 200 * DAY, ..Policy::default() };
        let end = |lifetime, kind| expire_time(lifetime, kind, &policy, NOW).map_err(|(field, _)| field);
        assert_eq!(end(Lifetime::Usual, Kind::Permanent), Ok(NOW + 90 * DAY));
        assert_eq!(end(Lifetime::Usual, Kind::Temporary), Ok(NOW + DAY));
        assert_eq!(end(Lifetime::Never, Kind::Permanent), Err("never"));
        assert_eq!(end(Lifetime::Never, Kind::Temporary), Err("never"));
        assert_eq!(end(Lifetime::For(Duration::from_millis(999)), Kind::Permanent), Err("ttl"));
        assert_eq!(end(Lifetime::For(DAY), Kind::Temporary), Ok(NOW + DAY));
        assert_eq!(end(Lifetime::For(DAY + LIFETIME_MIN), Kind::Temporary), Err("ttl"));
        assert_eq!(end(Lifetime::For(200 * DAY), Kind::Permanent), Ok(NOW + 200 * DAY));
        assert_eq!(end(Lifetime::Until(NOW + 201 * DAY), Kind::Permanent), Err("expire_time"));
        assert_eq!(end(Lifetime::Until(NOW), Kind::Permanent), Err("expire_time"));
        assert_eq!(end(Lifetime::Until(Time::NEVER), Kind::Permanent), Err("expire_time"));
        assert_eq!(end(Lifetime::UntilDay(NOW), Kind::Permanent), Err("expire_date"));
        let (_, rule) = expire_time(Lifetime::For(201 * DAY), Kind::Permanent, &policy, NOW).expect_err("too long");
        assert!(rule.contains("200 days (17280000s)"), "{rule}");
        let moved = |end, policy| moved_expire_time(end, Kind::Temporary, policy, NOW - DAY, NOW);
        assert!(moved(NOW + DAY, &policy).is_err(), "counted from creation");
        let forever = Policy { allow_never: true, ..policy };
        assert_eq!(expire_time(Lifetime::Never, Kind::Permanent, &forever, NOW), Ok(Time::NEVER));
        assert!(moved(Time::NEVER, &forever).is_err(), "a temporary token ends");
    }

    #[test]
    fn a_policy_fits_together() {
        let fields = |policy: Policy| {
            let mut violations = Violations::default();
            super::policy("policy", &policy, &mut violations);
            violations.finish().err().map(|error| error.to_string())
        };
        let good = Policy::default();
        assert_eq!(fields(good), None);
        let error = fields(Policy { default_ttl: 400 * DAY, ..good }).expect("too long");
        assert!(error.contains("policy.default_ttl") && error.contains("365 days"), "{error}");
        for bad in [
            Policy { default_ttl: Duration::ZERO, ..good },
            Policy { max_permanent_ttl: 2 * PERMANENT_MAX, ..good },
            Policy { max_temporary_ttl: 31 * DAY, ..good },
            Policy { max_tokens_per_principal: 0, ..good },
        ] {
            assert!(fields(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn mail_addresses_have_their_form() {
        for good in ["", "ada@example.com", "ada+ci@xn--bcher-kva.example", "o'neil@localhost", "jörg@exämple.com"] {
            assert_eq!(email(good).as_deref(), Ok(good));
        }
        for bad in [
            "ada",
            "@example.com",
            "ada@",
            "a b@example.com",
            "a@b@c d",
            "ada@-x.com",
            "ada@x..com",
            "a..b@x.com",
            "a\n@x.com",
            &format!("{}@x.com", "a".repeat(65)),
        ] {
            assert!(email(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn workspaces_are_labels() {
        for good in ["a", "default", "acme-2"] {
            assert!(workspace_id(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "2a", "A", "a_b", "a.b", &"a".repeat(64)] {
            assert!(workspace_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn grace_ends_with_the_token() {
        assert_eq!(grace_time(Duration::ZERO, Time::NEVER, NOW), Ok(None));
        assert_eq!(grace_time(DAY, NOW + DAY / 2, NOW), Ok(Some(NOW + DAY / 2)));
        assert!(grace_time(8 * DAY, Time::NEVER, NOW).is_err());
    }
}
