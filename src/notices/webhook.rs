//! How a notice is posted to a workspace's webhook, and what the answer means.
//!
//! Invariant: the address that was checked is the one that is connected to: names are resolved by a resolver that gives out only what may be
//! reached, anew for every call, and addresses in the URL are checked before it (tests `addresses_that_may_not_be_reached_get_no_call`,
//! `plain_http_goes_only_where_the_setting_says`).
//! Invariant: a redirect leads nowhere (test `redirects_are_not_followed`).
//! Invariant: an error quotes nothing of the answer and nothing of the URL (test `errors_quote_nothing_of_the_receiver`).

use std::{fmt, net::IpAddr, time::Duration};

use reqwest::{
    Certificate, Client, ClientBuilder, Response, StatusCode,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect,
};
use url::{Host, Url};

use super::{reach::Reach, words};
use crate::{ambient::Time, notice::Outcome, token::WebhookSecret};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WHOLE_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer is read this far and this long, so that a receiver can write it to its end; what it says is of no interest.
const ANSWER_BYTES_MAX: usize = 4096;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes calls of webhooks.
pub struct Webhooks {
    reach: Reach,
    secure: Client,
    plain: Client,
}

/// One call.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Where it goes.
    pub url: &'a str,
    /// The id of the notice: the same at every attempt.
    pub id: &'a str,
    /// When this attempt is made.
    pub time: Time,
    /// The JSON text.
    pub body: &'a str,
    /// It is signed with each of these.
    pub secrets: &'a [WebhookSecret],
}

impl Webhooks {
    /// For these addresses; certificates are trusted by the system's roots and those of `ca`, in PEM.
    ///
    /// # Errors
    /// A sentence, if `ca` holds no certificates.
    pub fn new(reach: Reach, ca: Option<&[u8]>) -> Result<Self, String> {
        Self::with_timeouts(reach, ca, CONNECT_TIMEOUT, WHOLE_TIMEOUT)
    }

    fn with_timeouts(reach: Reach, ca: Option<&[u8]>, connect: Duration, whole: Duration) -> Result<Self, String> {
        let roots = ca.map(certificates).transpose()?.unwrap_or_default();
        let client = |plain| {
            let build = || builder(Guard { reach: reach.clone(), plain }).connect_timeout(connect).timeout(whole);
            // A system without any roots is no reason not to start: the calls themselves say what is missing.
            let built = build().tls_certs_merge(roots.clone()).build().or_else(|_| build().tls_certs_only(roots.clone()).build());
            built.map_err(|error| format!("calls of webhooks cannot be made: {}", words::cause(&error)))
        };
        Ok(Self { secure: client(false)?, plain: client(true)?, reach })
    }

    /// Makes the call and says what became of it.
    pub async fn post(&self, call: Call<'_>) -> Outcome {
        let client = match self.client(call.url) {
            Ok(client) => client,
            Err(error) => return refused(error),
        };
        let signatures: Vec<String> = call.secrets.iter().map(|secret| secret.sign(call.id, call.time, call.body.as_bytes())).collect();
        let request = client
            .post(call.url)
            .header("content-type", "application/json")
            .header("webhook-id", call.id)
            .header("webhook-timestamp", call.time.seconds())
            .header("webhook-signature", signatures.join(" "))
            .body(call.body.to_owned());
        match request.send().await {
            Ok(response) => {
                let status = response.status();
                drain(response).await;
                answered(status)
            }
            Err(error) => failed(&error),
        }
    }

    /// The client for this URL, if its scheme and its host, as far as that is an address, are right. Names are the resolver's.
    fn client(&self, text: &str) -> Result<&Client, &'static str> {
        let url = Url::parse(text).map_err(|_| "the webhook has no URL that can be read")?;
        let plain = match url.scheme() {
            "https" => false,
            "http" => true,
            _ => return Err("the URL of the webhook must begin with https://"),
        };
        let guard = Guard { reach: self.reach.clone(), plain };
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::from(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::from(address)),
            Some(Host::Domain(_)) => None,
            None => return Err("the URL of the webhook names no host"),
        };
        if address.is_some_and(|address| !guard.allows(address)) {
            return Err(guard.rule());
        }
        Ok(if plain { &self.plain } else { &self.secure })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate>, String> {
    let read = Certificate::from_pem_bundle(pem).unwrap_or_default();
    if read.is_empty() { Err("holds no certificates in PEM that can be read".to_owned()) } else { Ok(read) }
}

fn builder(guard: Guard) -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("keyward/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .redirect(redirect::Policy::none())
        .referer(false)
        .retry(reqwest::retry::never())
        .http1_only()
        // A connection that is kept would be used for a name that has meanwhile come to mean something else.
        .pool_max_idle_per_host(0)
        .dns_resolver(guard)
}

/// Gives out those addresses of a name that may be reached.
struct Guard {
    reach: Reach,
    plain: bool,
}

impl Guard {
    fn allows(&self, address: IpAddr) -> bool {
        if self.plain { self.reach.is_inside(address) } else { self.reach.may_reach(address) }
    }

    fn rule(&self) -> &'static str {
        if self.plain {
            "http is only for networks that the server's setting webhook_allowed_cidrs names: use https"
        } else {
            "the host has an address that is not public, and that the server's setting webhook_allowed_cidrs does not name"
        }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = Self { reach: self.reach.clone(), plain: self.plain };
        Box::pin(async move {
            let mut found = tokio::net::lookup_host((name.as_str(), 0)).await?.peekable();
            let is_known = found.peek().is_some();
            let allowed: Vec<_> = found.filter(|address| guard.allows(address.ip())).collect();
            if allowed.is_empty() && is_known {
                return Err(Forbidden(guard.rule()).into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// Why a name was not resolved although it has addresses.
#[derive(Debug)]
struct Forbidden(&'static str);

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Forbidden {}

async fn drain(mut response: Response) {
    let mut left = ANSWER_BYTES_MAX;
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                break;
            }
        }
    };
    // The status is the answer; a body that does not end changes nothing.
    let _too_slow = tokio::time::timeout(ANSWER_TIMEOUT, read).await;
}

fn refused(error: &str) -> Outcome {
    Outcome::Refused { error: words::error(error), is_final: false }
}

/// What a status means. Nothing else of an answer is looked at.
fn answered(status: StatusCode) -> Outcome {
    let error = format!("the webhook answered with status {}", status.as_u16());
    match status.as_u16() {
        200..=299 => Outcome::Delivered,
        300..=399 => refused(&format!("{error}: redirects are not followed")),
        410 => Outcome::Refused { error: format!("{error}: it is gone"), is_final: true },
        429 | 502..=504 => Outcome::Unreachable { error },
        _ => refused(&error),
    }
}

fn failed(error: &reqwest::Error) -> Outcome {
    let mut causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    if let Some(forbidden) = causes.find_map(|cause| cause.downcast_ref::<Forbidden>()) {
        return refused(forbidden.0);
    }
    if error.is_builder() {
        return refused("the call cannot be made: its URL or its id is not fit for HTTP");
    }
    let text = match (error.is_timeout(), error.is_connect()) {
        (true, true) => "no connection to the webhook in time".to_owned(),
        (true, false) => "no answer of the webhook in time".to_owned(),
        (false, true) if error.is_dns() => format!("the webhook's host was not found: {}", words::cause(error)),
        (false, true) => format!("no connection to the webhook: {}", words::cause(error)),
        // What is wrong with an answer may quote it.
        (false, false) => "the webhook broke off the connection, or its answer is not HTTP".to_owned(),
    };
    Outcome::Unreachable { error: words::error(&text) }
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::{Arc, Mutex},
    };

    use tokio::{
        io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const NOW: Time = Time::from_micros(1_800_000_000_900_000);
    const BODY: &str = r#"{"type":"test"}"#;

    fn local() -> Reach {
        Reach::new(vec!["127.0.0.0/8".parse().expect("a range"), "::1/128".parse().expect("a range")])
    }

    fn webhooks(reach: Reach, ca: Option<&[u8]>) -> Webhooks {
        crate_provider();
        Webhooks::with_timeouts(reach, ca, Duration::from_secs(2), Duration::from_secs(3)).expect("a client")
    }

    fn crate_provider() {
        let _already = rustls::crypto::ring::default_provider().install_default();
    }

    async fn post(webhooks: &Webhooks, url: &str) -> Outcome {
        let secrets = [secret(1), secret(2)];
        webhooks.post(Call { url, id: "msg_1", time: NOW, body: BODY, secrets: &secrets }).await
    }

    fn secret(byte: u8) -> WebhookSecret {
        WebhookSecret::from_bytes(&[byte; 32]).expect("32 bytes")
    }

    /// What a server does with a call that it has read.
    #[derive(Clone, Copy)]
    enum Answer {
        Text(&'static str),
        Hang,
        Endless,
    }

    async fn read_call(stream: &mut (impl AsyncRead + Unpin)) -> String {
        let (mut seen, mut buffer) = (Vec::new(), [0; 1024]);
        while !String::from_utf8_lossy(&seen).ends_with(BODY) {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => seen.extend_from_slice(&buffer[..count]),
            }
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    async fn give(stream: &mut (impl AsyncWrite + Unpin), answer: Answer) {
        match answer {
            Answer::Text(text) => {
                let _gone = stream.write_all(text.as_bytes()).await;
                let _gone = stream.shutdown().await;
            }
            Answer::Hang => std::future::pending().await,
            Answer::Endless => {
                let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
                while stream.write_all(format!("1000\r\n{}\r\n", "x".repeat(4096)).as_bytes()).await.is_ok() {}
            }
        }
    }

    /// A server on a free port, and what it has seen.
    async fn server(answer: Answer) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let noted = Arc::clone(&noted);
                tokio::spawn(async move {
                    let call = read_call(&mut stream).await;
                    noted.lock().expect("not poisoned").push(call);
                    give(&mut stream, answer).await;
                });
            }
        });
        (address, seen)
    }

    fn words_of(outcome: &Outcome) -> &str {
        match outcome {
            Outcome::Delivered => "delivered",
            Outcome::Refused { error, .. } | Outcome::Unreachable { error } => error,
        }
    }

    #[tokio::test]
    async fn a_call_arrives_signed() {
        let (address, seen) = server(Answer::Text("HTTP/1.1 204 No Content\r\n\r\n")).await;
        let outcome = post(&webhooks(local(), None), &format!("http://{address}/hook?a=b")).await;
        assert_eq!(outcome, Outcome::Delivered);
        let call = seen.lock().expect("not poisoned").first().cloned().expect("a call");
        let (head, body) = call.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("POST /hook?a=b HTTP/1.1\r\n"), "{head}");
        assert_eq!(body, BODY);
        let signed = format!("{} {}", secret(1).sign("msg_1", NOW, BODY.as_bytes()), secret(2).sign("msg_1", NOW, BODY.as_bytes()));
        for header in [
            "content-type: application/json",
            "webhook-id: msg_1",
            "webhook-timestamp: 1800000000",
            &format!("webhook-signature: {signed}"),
            concat!("user-agent: keyward/", env!("CARGO_PKG_VERSION")),
        ] {
            assert!(head.lines().any(|line| line == header), "{header} is not in {head}");
        }
        assert!(!head.contains("referer") && !head.contains("cookie"), "{head}");
    }

    #[test]
    fn statuses_say_whether_to_try_again() {
        let of = |code| answered(StatusCode::from_u16(code).expect("a status"));
        assert!([200, 201, 202, 204, 299].into_iter().all(|code| of(code) == Outcome::Delivered));
        assert!(matches!(of(410), Outcome::Refused { is_final: true, .. }));
        for code in [301, 302, 307, 400, 401, 403, 404, 413, 500, 501, 505] {
            assert!(matches!(of(code), Outcome::Refused { is_final: false, error } if error.contains(&code.to_string())), "{code}");
        }
        for code in [429, 502, 503, 504] {
            assert!(matches!(of(code), Outcome::Unreachable { error } if error.contains(&code.to_string())), "{code}");
        }
    }

    #[tokio::test]
    async fn redirects_are_not_followed() {
        let (second, seen) = server(Answer::Text("HTTP/1.1 200 OK\r\n\r\n")).await;
        for code in [301, 302, 303, 307, 308] {
            let text = format!("HTTP/1.1 {code} Elsewhere\r\nlocation: http://{second}/\r\ncontent-length: 0\r\n\r\n");
            let (first, _) = server(Answer::Text(Box::leak(text.into_boxed_str()))).await;
            let outcome = post(&webhooks(local(), None), &format!("http://{first}/")).await;
            assert!(matches!(&outcome, Outcome::Refused { is_final: false, error } if error.contains("redirects")), "{outcome:?}");
        }
        assert!(seen.lock().expect("not poisoned").is_empty());
    }

    #[tokio::test]
    async fn errors_quote_nothing_of_the_receiver() {
        let webhooks = webhooks(local(), None);
        for (text, is_refusal) in [
            ("HTTP/1.1 500 hunter2\r\nx-secret: hunter2\r\ncontent-length: 7\r\n\r\nhunter2", true),
            ("HTTP/1.1 302 hunter2\r\nlocation: http://hunter2/\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nhunter2 hunter2\r\n\r\n", false),
            ("hunter2\r\n\r\n", false),
            ("HTTP/1.1 200", false),
            ("", false),
        ] {
            let (address, _) = server(Answer::Text(text)).await;
            let outcome = post(&webhooks, &format!("http://{address}/hunter2?hunter2=hunter2")).await;
            assert_eq!(matches!(outcome, Outcome::Refused { is_final: false, .. }), is_refusal, "{text:?}: {outcome:?}");
            assert_eq!(matches!(outcome, Outcome::Unreachable { .. }), !is_refusal, "{text:?}: {outcome:?}");
            assert!(!words_of(&outcome).contains("hunter2"), "{outcome:?}");
        }
    }

    #[tokio::test]
    async fn a_receiver_that_hangs_or_never_ends_holds_nothing_up() {
        let (hanging, _) = server(Answer::Hang).await;
        let outcome = post(&webhooks(local(), None), &format!("http://{hanging}/")).await;
        assert!(matches!(&outcome, Outcome::Unreachable { error } if error.contains("no answer")), "{outcome:?}");
        let (endless, _) = server(Answer::Endless).await;
        assert_eq!(post(&webhooks(local(), None), &format!("http://{endless}/")).await, Outcome::Delivered);
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_does_not_undo_the_status() {
        let (address, _) = server(Answer::Text("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx")).await;
        assert_eq!(post(&webhooks(local(), None), &format!("http://{address}/")).await, Outcome::Delivered);
    }

    #[tokio::test]
    async fn nobody_there_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        drop(listener);
        let outcome = post(&webhooks(local(), None), &format!("http://{address}/secret")).await;
        assert!(matches!(&outcome, Outcome::Unreachable { error } if error.contains("refused")), "{outcome:?}");
        let outcome = post(&webhooks(local(), None), "https://nobody.invalid/secret").await;
        assert!(matches!(&outcome, Outcome::Unreachable { error } if !error.contains("secret")), "{outcome:?}");
    }

    #[tokio::test]
    async fn addresses_that_may_not_be_reached_get_no_call() {
        let (address, seen) = server(Answer::Text("HTTP/1.1 200 OK\r\n\r\n")).await;
        let port = address.port();
        for reach in [Reach::new(Vec::new()), Reach::new(vec!["10.0.0.0/8".parse().expect("a range")])] {
            let webhooks = webhooks(reach, None);
            for host in ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "169.254.169.254", "0"] {
                for scheme in ["https", "http"] {
                    let outcome = post(&webhooks, &format!("{scheme}://{host}:{port}/")).await;
                    let said = matches!(&outcome, Outcome::Refused { is_final: false, error } if error.contains("webhook_allowed_cidrs"));
                    assert!(said, "{scheme}://{host}: {outcome:?}");
                }
            }
        }
        assert!(seen.lock().expect("not poisoned").is_empty());
    }

    #[tokio::test]
    async fn plain_http_goes_only_where_the_setting_says() {
        let outcome = post(&webhooks(local(), None), "http://8.8.8.8/").await;
        assert!(matches!(&outcome, Outcome::Refused { is_final: false, error } if error.contains("use https")), "{outcome:?}");
        let outcome = post(&webhooks(local(), None), "ftp://127.0.0.1/").await;
        assert!(matches!(&outcome, Outcome::Refused { is_final: false, .. }), "{outcome:?}");
        let (address, _) = server(Answer::Text("HTTP/1.1 200 OK\r\n\r\n")).await;
        let outcome = post(&webhooks(local(), None), &format!("http://localhost:{}/", address.port())).await;
        assert_eq!(outcome, Outcome::Delivered);
    }

    /// A server with a certificate of its own making for `localhost`; its certificate in PEM.
    async fn secure_server() -> (SocketAddr, String) {
        crate_provider();
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("a certificate");
        let key_der = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![certificate.der().clone()], key_der).expect("a pair");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                read_call(&mut stream).await;
                give(&mut stream, Answer::Text("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).await;
            }
        });
        (address, certificate.pem())
    }

    #[tokio::test]
    async fn a_certificate_must_be_trusted() {
        let (address, pem) = secure_server().await;
        let url = format!("https://localhost:{}/", address.port());
        let outcome = post(&webhooks(local(), None), &url).await;
        assert!(matches!(&outcome, Outcome::Unreachable { error } if error.contains("certificate")), "{outcome:?}");
        assert_eq!(post(&webhooks(local(), Some(pem.as_bytes())), &url).await, Outcome::Delivered);
        let outcome = post(&webhooks(local(), Some(pem.as_bytes())), &format!("https://{address}/")).await;
        assert!(matches!(&outcome, Outcome::Unreachable { .. }), "another name: {outcome:?}");
        assert!(Webhooks::new(local(), Some(b"nonsense")).is_err());
    }
}
