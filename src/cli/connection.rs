//! The way to a Keyward server: its address, TLS, the caller's token, how long to wait.
//!
//! Invariant: the caller's token is in no message (test `the_token_is_in_no_message`).

use std::{fs, time::Duration};

use clap::{Arg, ArgMatches};
use http::{Uri, uri::Scheme};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    arguments::option,
    expiry,
    failure::{Failure, late, root},
    session::{Format, Session, given},
};
use crate::token::Secret;

const ADDRESS_DEFAULT: &str = "http://127.0.0.1:50051";
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// A page of 1,000 tokens with everything that they can hold.
pub(super) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The options of commands that need no token.
pub(super) fn open_args() -> [Arg; 6] {
    [
        option("address", "ADDRESS", "host:port, or https://host:port for TLS [default: http://127.0.0.1:50051] [env: KEYWARD_ADDRESS]"),
        option("ca-file", "FILE", "Who signs the server's certificate (PEM) [default: the system's] [env: KEYWARD_CA_FILE]"),
        option("cert", "FILE", "A client certificate (PEM), in place of a token or beside it").requires("key"),
        option("key", "FILE", "Private key of the client certificate (PEM)").requires("cert"),
        option("timeout", "SPAN", "How long to wait for an answer [default: 10s]").value_parser(timeout),
        Format::arg(),
    ]
    .map(heading)
}

/// The options of all other commands.
pub(super) fn args() -> impl Iterator<Item = Arg> {
    let token =
        option("token", "TOKEN", "Your own token; - reads it from standard input, which other users cannot see [env: KEYWARD_TOKEN]")
            .conflicts_with("token-file");
    let file = option("token-file", "FILE", "A file that holds your own token [env: KEYWARD_TOKEN_FILE]");
    [token, file].map(heading).into_iter().chain(open_args())
}

fn heading(arg: Arg) -> Arg {
    if arg.get_help_heading().is_some() { arg } else { arg.help_heading("Connection") }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match expiry::span(text)? {
        Duration::ZERO => Err("it must be longer than nothing".to_owned()),
        span => Ok(span),
    }
}

/// A server that was reached, and what every request to it carries.
pub(super) struct Connection {
    channel: Channel,
    authorization: Option<MetadataValue<Ascii>>,
    timeout: Duration,
}

impl Connection {
    /// Reaches the server, with the caller's token or certificate.
    ///
    /// # Errors
    /// `usage` if what was given is incomplete, `unreachable` if nobody answers.
    pub(super) async fn open(args: &ArgMatches, session: &mut Session<'_>) -> Result<Self, Failure> {
        let authorization = match own_token(args, session)? {
            Some(token) => Some(bearer(&token)?),
            None if args.contains_id("cert") => None,
            None => return Err(Failure::usage("this needs your own token: set KEYWARD_TOKEN or KEYWARD_TOKEN_FILE, or give --token")),
        };
        Ok(Self { authorization, ..Self::open_bare(args, session).await? })
    }

    /// Reaches the server without saying who is calling.
    ///
    /// # Errors
    /// As `open`.
    pub(super) async fn open_bare(args: &ArgMatches, session: &Session<'_>) -> Result<Self, Failure> {
        let uri = address(&given(args, "address", &session.env, "KEYWARD_ADDRESS").unwrap_or_else(|| ADDRESS_DEFAULT.to_owned()))?;
        let timeout = args.get_one::<Duration>("timeout").copied().unwrap_or(TIMEOUT_DEFAULT);
        let endpoint = endpoint(&uri, tls(args, session)?)?;
        let channel = tokio::time::timeout(timeout, endpoint.connect())
            .await
            .map_err(|_| late())?
            .map_err(|error| unreachable(&uri, &root(&error)))?;
        Ok(Self { channel, authorization: None, timeout })
    }

    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A request with the caller's token and a deadline.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }
}

fn unreachable(uri: &Uri, cause: &str) -> Failure {
    let failure = Failure::unreachable(format!("{} cannot be reached: {cause}", shown(uri)));
    if cause.contains("refused") {
        failure.hint_if_unanswered(|| "is a server running there? --address or KEYWARD_ADDRESS names another".to_owned())
    } else {
        failure.hint_scheme()
    }
}

fn endpoint(uri: &Uri, tls: Option<ClientTlsConfig>) -> Result<Endpoint, Failure> {
    let endpoint = Endpoint::from(uri.clone());
    match (uri.scheme() == Some(&Scheme::HTTPS), tls) {
        (true, tls) => endpoint.tls_config(tls.unwrap_or_else(|| ClientTlsConfig::new().with_native_roots())),
        (false, None) => Ok(endpoint),
        // Whoever names certificates counts on their protection.
        (false, Some(_)) => return Err(Failure::usage("certificates are given, so the address must start with https://")),
    }
    .and_then(|endpoint| endpoint.user_agent(concat!("keyward/", env!("CARGO_PKG_VERSION"))))
    .map_err(|error| Failure::usage(format!("TLS cannot be set up: {}", root(&error))))
}

/// `host:port`, or a URL with nothing behind the port.
fn address(text: &str) -> Result<Uri, Failure> {
    let rule = || Failure::usage("the address must be host:port, http://host:port or https://host:port, with nothing behind it");
    let bare = !text.contains("://");
    let url = if bare { format!("http://{text}") } else { text.to_owned() };
    let uri: Uri = url.parse().map_err(|_| rule())?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    // A user or a password in the address would be lost, and shown in errors.
    let named = uri.authority().is_some_and(|authority| !authority.host().is_empty() && !authority.as_str().contains('@'));
    let alone = matches!(uri.path(), "" | "/") && uri.query().is_none();
    if known && named && alone && (!bare || uri.port_u16().is_some()) { Ok(uri) } else { Err(rule()) }
}

fn shown(uri: &Uri) -> String {
    uri.to_string().trim_end_matches('/').to_owned()
}

/// What was said about certificates; nothing if nothing was.
fn tls(args: &ArgMatches, session: &Session<'_>) -> Result<Option<ClientTlsConfig>, Failure> {
    let ca = given(args, "ca-file", &session.env, "KEYWARD_CA_FILE");
    let own = args.get_one::<String>("cert").zip(args.get_one::<String>("key"));
    if ca.is_none() && own.is_none() {
        return Ok(None);
    }
    let mut tls = match ca {
        Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("the CA file", &path)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some((cert, key)) = own {
        tls = tls.identity(Identity::from_pem(read("the certificate", cert)?, read("the key", key)?));
    }
    Ok(Some(tls))
}

fn read(what: &str, path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::usage(format!("{what} {path} cannot be read: {error}")))
}

/// The caller's own token, from the strongest source that names one.
fn own_token(args: &ArgMatches, session: &mut Session<'_>) -> Result<Option<Secret>, Failure> {
    let variable = |name: &str| session.env.get(name).filter(|value| !value.is_empty()).cloned();
    let (token, file) = match (args.get_one::<String>("token").cloned(), args.get_one::<String>("token-file").cloned()) {
        (None, None) => (variable("KEYWARD_TOKEN"), variable("KEYWARD_TOKEN_FILE")),
        flags => flags,
    };
    match (token.as_deref(), file) {
        (Some(_), Some(_)) => Err(Failure::usage("KEYWARD_TOKEN and KEYWARD_TOKEN_FILE are both set: remove one")),
        (Some("-"), None) => session.read_token().map(Some),
        (Some(token), None) => Ok(Some(Secret::from(token.trim().to_owned()))),
        (None, Some(path)) => read("the token file", &path).map(|text| Some(Secret::from(text.trim().to_owned()))),
        (None, None) => Ok(None),
    }
}

/// Whether the caller's own token will be read from standard input.
pub(super) fn token_is_on_stdin(args: &ArgMatches, session: &Session<'_>) -> bool {
    !args.contains_id("token-file") && given(args, "token", &session.env, "KEYWARD_TOKEN").as_deref() == Some("-")
}

fn bearer(token: &Secret) -> Result<MetadataValue<Ascii>, Failure> {
    let text = token.reveal();
    // A token of two words would be read by the server as something else than what its holder meant.
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::usage("your own token is empty or has characters that no token has"));
    }
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {text}").parse().map_err(|_| Failure::usage("your own token has characters that no token has"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Command;

    use super::*;

    fn with_session<T>(arguments: &[&str], env: &[(&str, &str)], input: &str, act: impl FnOnce(&ArgMatches, &mut Session<'_>) -> T) -> T {
        let matches = Command::new("test").no_binary_name(true).args(args()).try_get_matches_from(arguments).expect("well formed");
        let env: BTreeMap<_, _> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (mut input, mut out, mut err) = (input.as_bytes(), Vec::new(), Vec::new());
        let mut session = Session {
            env,
            now: jiff::Timestamp::UNIX_EPOCH,
            format: Format::Table,
            input: &mut input,
            interactive: false,
            out: &mut out,
            err: &mut err,
        };
        act(&matches, &mut session)
    }

    fn token(arguments: &[&str], env: &[(&str, &str)], input: &str) -> Result<Option<String>, String> {
        with_session(arguments, env, input, own_token)
            .map(|token| token.map(|token| token.reveal().to_owned()))
            .map_err(|failure| format!("{failure:?}"))
    }

    #[test]
    fn addresses_are_hosts_with_ports_or_bare_urls() {
        let shown_as = |text| address(text).ok().map(|uri| shown(&uri));
        for (text, expected) in [
            ("127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("[::1]:50051", "http://[::1]:50051"),
            ("keyward.internal:443", "http://keyward.internal:443"),
            ("https://keyward.example/", "https://keyward.example"),
            ("http://keyward:1", "http://keyward:1"),
        ] {
            assert_eq!(shown_as(text).as_deref(), Some(expected), "{text}");
        }
        for text in
            ["", "keyward", ":50051", "ftp://keyward", "http://u:p@keyward:1", "https://keyward/path", "http://k?q", "a b:1", "unix:/run/k"]
        {
            assert_eq!(shown_as(text), None, "{text}");
        }
    }

    #[test]
    fn the_strongest_source_of_the_token_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        fs::write(&path, "of_file\n").expect("writable");
        let path = path.display().to_string();
        let env = [("KEYWARD_TOKEN", "of_env")];
        assert_eq!(token(&["--token", "of_flag"], &env, ""), Ok(Some("of_flag".to_owned())));
        assert_eq!(token(&["--token-file", &path], &env, ""), Ok(Some("of_file".to_owned())));
        assert_eq!(token(&[], &env, ""), Ok(Some("of_env".to_owned())));
        assert_eq!(token(&[], &[("KEYWARD_TOKEN_FILE", &path)], ""), Ok(Some("of_file".to_owned())));
        assert_eq!(token(&["--token", "-"], &env, "of_stdin\nrest"), Ok(Some("of_stdin".to_owned())));
        assert_eq!(token(&[], &[("KEYWARD_TOKEN", "")], ""), Ok(None));
        assert!(token(&["--token", "-"], &[], "").is_err());
        assert!(token(&[], &[("KEYWARD_TOKEN", "a"), ("KEYWARD_TOKEN_FILE", &path)], "").is_err());
    }

    #[test]
    fn the_token_is_in_no_message() {
        for bad in ["canary two", "canary\u{7f}", "canaryé"] {
            let failure = bearer(&Secret::from(bad.to_owned())).expect_err("not a token");
            assert!(!format!("{failure:?}").contains("canary"));
        }
        let value = bearer(&Secret::from("canary".to_owned())).expect("a token");
        assert!(!format!("{value:?}").contains("canary"), "{value:?}");
    }

    #[test]
    fn certificates_need_https() {
        let config = || Some(ClientTlsConfig::new());
        let uri = |text| address(text).expect("an address");
        assert!(endpoint(&uri("keyward:1"), config()).is_err());
        assert!(endpoint(&uri("keyward:1"), None).is_ok());
    }
}
