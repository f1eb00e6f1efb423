//! Which mail server, and how it is reached.
//!
//! Invariant: a password goes only through TLS, or to this very machine (tests `urls_of_mail_servers_are_read`, `a_password_needs_tls`).
//! Invariant: the URL of the mail server is never printed (test `the_url_of_the_mail_server_is_never_printed`).

use std::{borrow::Cow, fmt, str::FromStr};

use percent_encoding::percent_decode_str;
use url::{Host, Url};
use zeroize::Zeroizing;

/// How the connection is protected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protection {
    /// TLS from the first byte.
    Tls,
    /// TLS after a first greeting, or no mail.
    StartTls,
    /// None.
    Off,
}

/// Which mail server, and how it is reached. Prints as its scheme.
#[derive(Clone, PartialEq, Eq)]
pub struct SmtpUrl {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) protection: Protection,
    pub(super) user: String,
    pub(super) password: Zeroizing<String>,
}

impl fmt::Debug for SmtpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.protection == Protection::Tls { "smtps://…" } else { "smtp://…" })
    }
}

impl FromStr for SmtpUrl {
    type Err = String;

    /// The errors never quote the text, which may hold a password.
    fn from_str(text: &str) -> Result<Self, String> {
        const RULE: &str = "must be smtps://user:password@host:465 (TLS), smtp://user:password@host:587 (STARTTLS) or \
                            smtp://host:25?tls=off (no TLS); write what is special in the user and the password as %40 and the like";
        let url = Url::parse(text.trim()).map_err(|_| RULE)?;
        let (protection, port) = match (url.scheme(), url.query()) {
            ("smtps", None) => (Protection::Tls, 465),
            ("smtp", None) => (Protection::StartTls, 587),
            ("smtp", Some("tls=off")) => (Protection::Off, 25),
            _ => return Err(RULE.to_owned()),
        };
        let decoded = |part: &str| percent_decode_str(part).decode_utf8().map(Cow::into_owned).map_err(|_| RULE);
        // To the library, the host of such a scheme is a text.
        let host = Host::parse(&decoded(url.host_str().filter(|host| !host.is_empty()).ok_or(RULE)?)?).map_err(|_| RULE)?;
        let (user, password) = (decoded(url.username())?, Zeroizing::new(decoded(url.password().unwrap_or_default())?));
        let is_whole = matches!(url.path(), "" | "/") && url.fragment().is_none() && user.is_empty() == password.is_empty();
        if !is_whole || user.chars().chain(password.chars()).any(char::is_control) {
            return Err(RULE.to_owned());
        }
        if protection == Protection::Off && !user.is_empty() && !is_loopback(&host) {
            return Err("sends a password without TLS: leave out tls=off, or the user and the password".to_owned());
        }
        Ok(Self { host, port: url.port().unwrap_or(port), protection, user, password })
    }
}

fn is_loopback(host: &Host) -> bool {
    match host {
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
        Host::Domain(name) => name.trim_end_matches('.').eq_ignore_ascii_case("localhost"),
    }
}

impl SmtpUrl {
    /// The host as sockets and certificates have it: IPv6 without brackets.
    pub(super) fn host_text(&self) -> String {
        match &self.host {
            Host::Ipv6(address) => address.to_string(),
            other => other.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> SmtpUrl {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn urls_of_mail_servers_are_read() {
        let read = |text: &str| {
            let url = url(text);
            (url.host.to_string(), url.port, url.protection, url.user.clone(), url.password.to_string())
        };
        let of = |host: &str, port, protection, user: &str, password: &str| {
            (host.to_owned(), port, protection, user.to_owned(), password.to_owned())
        };
        assert_eq!(read("smtps://mail.example.com"), of("mail.example.com", 465, Protection::Tls, "", ""));
        assert_eq!(read("smtps://u:p@mail.example.com:4650/"), of("mail.example.com", 4650, Protection::Tls, "u", "p"));
        assert_eq!(read("smtp://a%40b:p%3A%2F%25@mail.example.com"), of("mail.example.com", 587, Protection::StartTls, "a@b", "p:/%"));
        assert_eq!(read("smtp://10.0.0.1:25?tls=off"), of("10.0.0.1", 25, Protection::Off, "", ""));
        assert_eq!(read("smtp://[::1]?tls=off"), of("[::1]", 25, Protection::Off, "", ""));
        assert_eq!(url("smtp://[::1]?tls=off").host_text(), "::1");
        for bad in [
            "",
            "mail.example.com",
            "http://mail.example.com",
            "smtp://",
            "smtps://:465",
            "smtps://host?tls=off",
            "smtp://host?tls=on",
            "smtp://host?x",
            "smtp://host/path",
            "smtp://host#x",
            "smtp://user@host",
            "smtp://:password@host",
            "smtp://host:99999",
            "smtp://u:%00@host",
            "smtp://u:%ff@host",
            "smtp://u:a%0d%0ab@host",
            "smtp://ho st",
        ] {
            assert!(bad.parse::<SmtpUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_password_needs_tls() {
        for good in ["smtp://u:p@localhost?tls=off", "smtp://u:p@127.0.0.1?tls=off", "smtp://u:p@[::1]:2525?tls=off"] {
            assert!(good.parse::<SmtpUrl>().is_ok(), "{good}");
        }
        for bad in ["smtp://u:p@mail.example.com?tls=off", "smtp://u:p@10.0.0.1?tls=off", "smtp://u:p@localhost.example.com?tls=off"] {
            assert!(bad.parse::<SmtpUrl>().expect_err(bad).contains("without TLS"), "{bad}");
        }
    }

    #[test]
    fn the_url_of_the_mail_server_is_never_printed() {
        assert_eq!(format!("{:?}", url("smtps://user:hunter2@mail.example.com")), "smtps://…");
        for bad in ["smtp://user:hunter2@host?tls=off", "smtp://user:hunter2@ho st", "hunter2", "smtp://u:hunter2@host/hunter2"] {
            assert!(!bad.parse::<SmtpUrl>().expect_err(bad).contains("hunter2"), "{bad}");
        }
    }
}
