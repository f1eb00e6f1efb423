//! The rules of what a workspace wants to be told: addresses, steps, URLs.

use url::Url;

use super::email;
use crate::{error::Violations, notice::Wishes};

const URL_CHARS_MAX: usize = 512;
const EMAILS_MAX: usize = 20;
const DAYS_MAX: usize = 20;
const DAYS_BEFORE_MAX: u16 = 3_650;
const QUOTED_CHARS_MAX: usize = 60;

/// Where notices are posted; empty is nowhere. `allows_http` is whether the server's setting `webhook_allowed_cidrs` names anything.
pub fn webhook_url(text: &str, allows_http: bool) -> Result<String, String> {
    let Some(read) = url(text)? else { return Ok(String::new()) };
    match read.scheme() {
        "https" => Ok(text.trim().to_owned()),
        "http" if allows_http => Ok(text.trim().to_owned()),
        "http" => {
            Err("must begin with https://; http is only for networks that the server's setting webhook_allowed_cidrs names".to_owned())
        }
        _ => Err("must begin with https://, such as https://hooks.example.com/keyward".to_owned()),
    }
}

/// Where people get a new token; empty is nowhere.
pub fn renew_url(text: &str) -> Result<String, String> {
    match url(text)? {
        None => Ok(String::new()),
        Some(read) if read.scheme() == "https" => Ok(text.trim().to_owned()),
        Some(_) => Err("must begin with https://, such as https://example.com/tokens".to_owned()),
    }
}

/// What both have in common. Blanks inside are refused, since those who read URLs skip some of them.
fn url(text: &str) -> Result<Option<Url>, String> {
    let text = text.trim();
    let count = text.chars().count();
    if text.is_empty() {
        return Ok(None);
    }
    if count > URL_CHARS_MAX {
        return Err(format!("must be at most {URL_CHARS_MAX} characters; it has {count}"));
    }
    if text.chars().any(|letter| letter.is_whitespace() || letter == '\\' || super::is_invisible(letter)) {
        return Err("must not contain blanks, backslashes or control characters: write them as %20 and the like".to_owned());
    }
    let read = Url::parse(text).map_err(|_| "must be a URL such as https://hooks.example.com/keyward".to_owned())?;
    if read.host_str().is_none_or(str::is_empty) {
        Err("must name a host, as https://hooks.example.com/keyward does".to_owned())
    } else if !read.username().is_empty() || read.password().is_some() || authority(text).contains('@') {
        Err("must not contain a user name or a password: calls are signed instead".to_owned())
    } else if read.fragment().is_some() {
        Err("must not contain a fragment: leave out # and what follows it".to_owned())
    } else {
        Ok(Some(read))
    }
}

/// What stands between the scheme and the path.
fn authority(text: &str) -> &str {
    let rest = text.split_once("//").map_or("", |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

/// Mail addresses in one text, separated by semicolons: at most 20, each kept once whatever its case.
pub fn emails(field: &str, text: &str, violations: &mut Violations) -> Vec<String> {
    let parts: Vec<&str> = text.split(';').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.len() > EMAILS_MAX {
        violations.add(field, format!("must have at most {EMAILS_MAX} addresses; it has {}", parts.len()));
        return Vec::new();
    }
    let mut kept: Vec<String> = Vec::with_capacity(parts.len());
    for part in parts {
        match violations.take(field, email(part).map_err(|_| bad_address(part))) {
            Some(address) if !kept.iter().any(|other| other.to_lowercase() == address.to_lowercase()) => kept.push(address),
            _ => {}
        }
    }
    kept
}

fn bad_address(text: &str) -> String {
    let shown: String = text.chars().map(|letter| if super::is_invisible(letter) { ' ' } else { letter }).take(QUOTED_CHARS_MAX).collect();
    let cut = if text.chars().count() > QUOTED_CHARS_MAX { "…" } else { "" };
    let hint = if text.contains(',') { ": separate addresses with semicolons" } else { ", such as ada@example.com" };
    format!("`{shown}{cut}` is not a mail address{hint}")
}

/// Steps before the end of a token, from the farthest to the nearest; none named are the usual ones.
pub fn days_before(field: &str, days: &[i32], violations: &mut Violations) -> Vec<u16> {
    if days.is_empty() {
        return Wishes::default().days_before;
    }
    if days.len() > DAYS_MAX {
        violations.add(field, format!("must have at most {DAYS_MAX} entries; it has {}", days.len()));
        return Vec::new();
    }
    let mut steps = Vec::with_capacity(days.len());
    for (index, days) in days.iter().enumerate() {
        let step = u16::try_from(*days).ok().filter(|step| *step <= DAYS_BEFORE_MAX);
        let rule = || format!("must be 0 to {DAYS_BEFORE_MAX} days; 0 is when the token has expired");
        steps.extend(violations.take(&format!("{field}[{index}]"), step.ok_or_else(rule)));
    }
    steps.sort_unstable_by(|a, b| b.cmp(a));
    steps.dedup();
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked<T>(read: impl FnOnce(&mut Violations) -> T) -> (T, Option<String>) {
        let mut violations = Violations::default();
        let value = read(&mut violations);
        (value, violations.finish().err().map(|error| error.to_string()))
    }

    #[test]
    fn webhooks_are_https() {
        for good in
            ["https://hooks.example.com/keyward?a=b", "https://exämple.com:8443/", "https://203.0.113.7/x", "https://[2001:db8::1]/", ""]
        {
            assert_eq!(webhook_url(good, false).as_deref(), Ok(good));
        }
        assert_eq!(webhook_url(" https://example.com\n", false).as_deref(), Ok("https://example.com"));
        assert_eq!(webhook_url("http://10.0.0.1/x", true).as_deref(), Ok("http://10.0.0.1/x"));
        assert!(webhook_url("http://10.0.0.1/x", false).expect_err("no TLS").contains("webhook_allowed_cidrs"));
        for (bad, words) in [
            ("example.com/x", "must be a URL"),
            ("ftp://example.com/", "https://"),
            ("javascript:alert(1)", "must name a host"),
            ("https://", "must be a URL"),
            ("https://user@example.com/", "user name"),
            ("https://user:secret@example.com/", "user name"),
            ("https://@example.com/", "user name"),
            ("https://example.com/#x", "fragment"),
            ("https://example.com/#", "fragment"),
            ("https://example.com/a b", "blanks"),
            ("https://exam\tple.com/", "blanks"),
            ("https://example.com\\@10.0.0.1/", "backslashes"),
            ("https://example.com/\u{202e}", "control characters"),
        ] {
            let rule = webhook_url(bad, true).expect_err(bad);
            assert!(rule.contains(words), "{bad}: {rule}");
        }
        let long = format!("https://example.com/{}", "ä".repeat(492));
        assert_eq!(webhook_url(&long, false).as_deref(), Ok(long.as_str()));
        assert!(webhook_url(&format!("{long}x"), false).expect_err("too long").contains("513"));
        assert_eq!(webhook_url("https://example.com/a@b", false).as_deref(), Ok("https://example.com/a@b"));
    }

    #[test]
    fn people_renew_at_https_only() {
        assert_eq!(renew_url("https://example.com/tokens").as_deref(), Ok("https://example.com/tokens"));
        assert_eq!(renew_url("  ").as_deref(), Ok(""));
        for bad in ["http://example.com/", "javascript:alert(1)", "https://user@example.com/", "data:text/html,x"] {
            assert!(renew_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_separated_by_semicolons() {
        let read = |text: &str| checked(|violations| emails("emails", text, violations));
        let two = vec!["ada@example.com".to_owned(), "bob@example.com".to_owned()];
        for good in [
            "ada@example.com;bob@example.com",
            " ada@example.com ; bob@example.com ; ",
            "\tada@example.com;\n bob@example.com;\n",
            "ada@example.com;;bob@example.com;ADA@Example.com",
        ] {
            assert_eq!(read(good), (two.clone(), None), "{good:?}");
        }
        assert_eq!(read(""), (Vec::new(), None));
        assert_eq!(read(" ; \n"), (Vec::new(), None));
        let (kept, error) = read("ada@example.com; bob at example.com");
        assert_eq!(kept, ["ada@example.com"]);
        assert!(error.expect("a bad one").contains("`bob at example.com` is not a mail address"));
        assert!(read("ada@example.com, bob@example.com").1.expect("commas").contains("semicolons"));
        assert!(read(&"a".repeat(61)).1.expect("no address").contains(&format!("`{}…`", "a".repeat(60))));
        let many = |count: usize| (0..count).map(|index| format!("a{index}@x.com")).collect::<Vec<_>>().join(";");
        assert_eq!(read(&many(20)).0.len(), 20);
        assert!(read(&many(21)).1.expect("too many").contains("21"));
    }

    #[test]
    fn steps_go_from_the_farthest_to_the_nearest() {
        let read = |days: &[i32]| checked(|violations| days_before("days_before", days, violations));
        assert_eq!(read(&[]), (vec![30, 14, 7, 1, 0], None));
        assert_eq!(read(&[0, 7, 3650, 7]), (vec![3650, 7, 0], None));
        for bad in [-1, 3651, 65_543, i32::MIN, i32::MAX] {
            let (kept, error) = read(&[7, bad]);
            assert_eq!(kept, [7]);
            assert!(error.expect("out of range").contains("days_before[1]"), "{bad}");
        }
        assert_eq!(read(&[1; 20]), (vec![1], None));
        assert!(read(&[1; 21]).1.expect("too many").contains("21"));
    }
}
