//! How a mail goes to the mail server, and what the answer means.
//!
//! Invariant: a connection whose attempt was given up carries no other mail (test `a_given_up_attempt_takes_its_connection_with_it`).
//! Invariant: nothing that somebody else wrote makes a header (test `headers_cannot_be_injected`).

mod smtp_url;

use std::{
    fmt,
    time::{Duration, UNIX_EPOCH},
};

use lettre::{
    Address, Message,
    message::{
        Mailbox, MultiPart,
        header::{HeaderName, HeaderValue},
    },
    transport::smtp::{
        Error,
        authentication::{Credentials, Mechanism},
        client::{AsyncSmtpConnection, Certificate, TlsParameters},
        extension::{ClientId, Extension},
        response::Code,
    },
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use url::Host;

use smtp_url::Protection;
pub use smtp_url::SmtpUrl;

use super::{letter::Letter, words};
use crate::{ambient::Stopwatch, notice::Outcome};

const STEP_TIMEOUT: Duration = Duration::from_secs(10);
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection is used again within this time; servers hang up after minutes.
const IDLE_MAX: Duration = Duration::from_secs(30);
const IDLE_CONNECTIONS_MAX: usize = 2;
/// Mail servers take few from one client.
const CONNECTIONS_MAX: usize = 8;

/// Whether mails can be sent from there: `keyward@example.com`, or `Keyward <keyward@example.com>`.
///
/// # Errors
/// A sentence that says what it must be.
pub fn check_from(text: &str) -> Result<(), String> {
    sender(text).map(|_| ())
}

fn sender(text: &str) -> Result<Mailbox, String> {
    const RULE: &str = "must be a mail address such as keyward@example.com, or one with a name, such as Keyward <keyward@example.com>";
    let mailbox: Mailbox = text.trim().parse().map_err(|_| RULE)?;
    let address = ascii_domain(&mailbox.email).ok_or(RULE)?;
    let is_plain = address.user().is_ascii() && !text.trim().chars().any(char::is_control);
    if is_plain { Ok(Mailbox::new(mailbox.name, address)) } else { Err(RULE.to_owned()) }
}

/// The address with its domain as DNS has it, which needs nothing special of mail servers.
fn ascii_domain(address: &Address) -> Option<Address> {
    let domain = match Host::parse(address.domain()) {
        Ok(Host::Domain(domain)) => domain,
        _ if address.domain().is_ascii() => address.domain().to_owned(),
        _ => return None,
    };
    Address::new(address.user(), domain).ok()
}

/// Sends mails, over connections that it keeps for a moment.
pub struct Mailer {
    url: SmtpUrl,
    from: Mailbox,
    tls: Option<TlsParameters>,
    idle: Mutex<Vec<(AsyncSmtpConnection, Stopwatch)>>,
    turns: Semaphore,
    step: Duration,
    whole: Duration,
}

impl fmt::Debug for Mailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mailer({:?})", self.url)
    }
}

impl Mailer {
    /// For this server and this sender; certificates are trusted by the system's roots and those of `ca`, in PEM.
    ///
    /// # Errors
    /// A sentence, if the sender is no address or `ca` holds no certificates.
    pub fn new(url: &SmtpUrl, from: &str, ca: Option<&[u8]>) -> Result<Self, String> {
        Self::with_timeouts(url, from, ca, STEP_TIMEOUT, WHOLE_TIMEOUT)
    }

    fn with_timeouts(url: &SmtpUrl, from: &str, ca: Option<&[u8]>, step: Duration, whole: Duration) -> Result<Self, String> {
        let tls = if url.protection == Protection::Off { None } else { Some(tls(url, ca)?) };
        Ok(Self { url: url.clone(), from: sender(from)?, tls, idle: Mutex::default(), turns: Semaphore::new(CONNECTIONS_MAX), step, whole })
    }

    /// Sends one and says what became of it.
    pub async fn send(&self, letter: &Letter) -> Outcome {
        let (to, message) = match self.message(letter) {
            Ok(built) => built,
            Err(error) => return Outcome::Refused { error: words::error(error), is_final: true },
        };
        // Never closed. The time of the attempt begins with its turn.
        let _turn = self.turns.acquire().await;
        // A connection whose attempt is given up is dropped with it: nobody else reads an answer that comes too late.
        let late = || unreachable("no answer in time");
        tokio::time::timeout(self.whole, self.attempt(&to, &message)).await.unwrap_or_else(|_| late())
    }

    async fn attempt(&self, to: &Address, message: &Message) -> Outcome {
        let mut connection = match self.connection().await {
            Ok(connection) => connection,
            Err(error) => return error,
        };
        if !to.user().is_ascii() && !connection.server_info().supports_feature(Extension::SmtpUtfEight) {
            self.keep(connection);
            let error = "the mail server does not take addresses with letters beyond ASCII (SMTPUTF8)".to_owned();
            return Outcome::Refused { error, is_final: true };
        }
        match connection.send(message.envelope(), &message.formatted()).await {
            Ok(_) => {
                self.keep(connection);
                Outcome::Delivered
            }
            Err(error) => failed(&error),
        }
    }

    /// A connection that is ready for a mail: one that is left, or a new one.
    async fn connection(&self) -> Result<AsyncSmtpConnection, Outcome> {
        while let Some((mut left, since)) = self.take() {
            let answers = since.elapsed() < IDLE_MAX && tokio::time::timeout(self.step, left.test_connected()).await == Ok(true);
            if answers {
                return Ok(left);
            }
        }
        match tokio::time::timeout(self.step, self.open()).await {
            Ok(opened) => opened,
            Err(_) => Err(unreachable("no connection in time")),
        }
    }

    fn take(&self) -> Option<(AsyncSmtpConnection, Stopwatch)> {
        self.idle.lock().pop()
    }

    fn keep(&self, connection: AsyncSmtpConnection) {
        let mut idle = self.idle.lock();
        idle.retain(|(_, since)| since.elapsed() < IDLE_MAX);
        if idle.len() < IDLE_CONNECTIONS_MAX && !connection.has_broken() {
            idle.push((connection, Stopwatch::start()));
        }
    }

    /// Whatever goes wrong here would go wrong with any mail.
    async fn open(&self) -> Result<AsyncSmtpConnection, Outcome> {
        let failed = |error: Error| unreachable(&said(&error));
        // A machine often has no name that others know: the sender's domain is one.
        let hello = ClientId::Domain(self.from.email.domain().to_owned());
        let server = (self.url.host_text(), self.url.port);
        let implicit = self.tls.clone().filter(|_| self.url.protection == Protection::Tls);
        let opened = AsyncSmtpConnection::connect_tokio1(server, Some(self.step), &hello, implicit, None).await;
        let mut connection = opened.map_err(failed)?;
        if let Some(tls) = self.tls.clone().filter(|_| self.url.protection == Protection::StartTls) {
            if !connection.can_starttls() {
                return Err(unreachable("it does not offer STARTTLS (set smtps:// or tls=off in smtp_url if that is right)"));
            }
            connection.starttls(tls, &hello).await.map_err(failed)?;
        }
        if !self.url.user.is_empty() {
            let credentials = Credentials::new(self.url.user.clone(), self.url.password.to_string());
            let signed_in = connection.auth(&[Mechanism::Plain, Mechanism::Login], &credentials).await;
            signed_in.map_err(|error| unreachable(&sign_in_failed(&error)))?;
        }
        Ok(connection)
    }

    /// The mail as it goes out, and the only address that it goes to.
    fn message(&self, letter: &Letter) -> Result<(Address, Message), &'static str> {
        const NO_ADDRESS: &str = "this is no address that mail can be sent to";
        let to = letter.to.parse::<Address>().ok().and_then(|to| ascii_domain(&to)).ok_or(NO_ADDRESS)?;
        let name =
            Some(words::line(&letter.sender_name, usize::MAX - 1)).filter(|name| !name.is_empty()).or_else(|| self.from.name.clone());
        let id: String = letter.id.chars().filter(|letter| letter.is_ascii_alphanumeric() || "_.-".contains(*letter)).collect();
        let time = UNIX_EPOCH + Duration::from_millis(letter.time.millis());
        let message = Message::builder()
            .from(Mailbox::new(name, self.from.email.clone()))
            .to(Mailbox::new(None, to.clone()))
            .subject(words::line(&letter.subject, usize::MAX - 1))
            .date(time)
            .message_id(Some(format!("<{id}@{}>", self.from.email.domain())))
            // RFC 3834: no automatic answers.
            .raw_header(fixed("Auto-Submitted", "auto-generated"))
            .raw_header(fixed("X-Auto-Response-Suppress", "All"))
            .multipart(MultiPart::alternative_plain_html(letter.text.clone(), letter.html.clone()));
        message.map(|message| (to, message)).map_err(|_| "this mail cannot be written")
    }
}

fn fixed(name: &'static str, value: &str) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned())
}

fn tls(url: &SmtpUrl, ca: Option<&[u8]>) -> Result<TlsParameters, String> {
    const NO_ROOTS: &str = "holds no certificates in PEM that can be read";
    let mut builder = TlsParameters::builder(url.host_text());
    if let Some(pem) = ca {
        // The library takes a file without certificates for one with none to add.
        if !String::from_utf8_lossy(pem).contains("-----BEGIN CERTIFICATE-----") {
            return Err(NO_ROOTS.to_owned());
        }
        builder = builder.add_root_certificate(Certificate::from_pem(pem).map_err(|_| NO_ROOTS)?);
    }
    builder.build_rustls().map_err(|error| if ca.is_some() { NO_ROOTS.to_owned() } else { said(&error) })
}

fn unreachable(error: &str) -> Outcome {
    Outcome::Unreachable { error: words::error(&format!("the mail server cannot be used: {error}")) }
}

/// What an error of the library says, without the library's own words around it.
fn said(error: &Error) -> String {
    format!("{}{}", words::cause(error), code(error))
}

/// What a server says of a sign-in may repeat what it was given: only its code is kept.
fn sign_in_failed(error: &Error) -> String {
    if error.status().is_some() { format!("it does not take the user and the password{}", code(error)) } else { said(error) }
}

fn code(error: &Error) -> String {
    error.status().map(|code| format!(" ({code})")).unwrap_or_default()
}

fn failed(error: &Error) -> Outcome {
    match error.status() {
        Some(status) => answered(status, &words::cause(error)),
        None => unreachable(&said(error)),
    }
}

/// What a server's answer to a mail means.
fn answered(code: Code, text: &str) -> Outcome {
    let number = code.to_string();
    let error = words::error(&format!("the mail server answered {number}: {text}"));
    match number.as_str() {
        "421" | "454" | "530" | "534" | "535" | "538" => Outcome::Unreachable { error },
        "501" | "550" | "551" | "553" => Outcome::Refused { error, is_final: true },
        _ => Outcome::Refused { error, is_final: false },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use lettre::transport::smtp::response::{Category, Detail, Severity};
    use tokio::{
        io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::ambient::Time;

    fn url(text: &str) -> SmtpUrl {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn mailer(text: &str) -> Mailer {
        Mailer::with_timeouts(&url(text), "Keyward <keyward@example.com>", None, Duration::from_secs(1), Duration::from_secs(2))
            .expect("a mailer")
    }

    fn letter(to: &str) -> Letter {
        Letter {
            id: "msg_1".to_owned(),
            to: to.to_owned(),
            sender_name: "Acme".to_owned(),
            subject: "Acme: the token \"déploy\" has expired".to_owned(),
            text: "Plain\n".to_owned(),
            html: "<p>HTML</p>\n".to_owned(),
            time: Time::from_micros(1_800_000_000_000_000),
        }
    }

    fn written(letter: &Letter) -> String {
        let (_, message) = mailer("smtp://localhost:25?tls=off").message(letter).expect("a mail");
        String::from_utf8(message.formatted()).expect("ASCII")
    }

    #[test]
    fn senders_are_addresses() {
        for good in
            ["keyward@example.com", "Keyward <keyward@example.com>", "\"Tokens, Inc.\" <k@example.com>", "Schlüssel <k@bücher.example>"]
        {
            assert_eq!(check_from(good), Ok(()), "{good}");
        }
        for bad in ["", "keyward", "a@b@c", "<>", "k@example.com, l@example.com", "Key\nward <k@example.com>", "schlüssel@example.com"] {
            assert!(check_from(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mailer_does_not_print_its_server() {
        assert_eq!(format!("{:?}", mailer("smtp://user:hunter2@mail.example.com")), "Mailer(smtp://…)");
    }

    #[test]
    fn a_mail_has_its_headers() {
        let text = written(&letter("ada@bücher.example"));
        let again = written(&letter("ada@bücher.example"));
        for header in [
            "From: Acme <keyward@example.com>",
            "To: ada@xn--bcher-kva.example",
            "Date: Fri, 15 Jan 2027 08:00:00 +0000",
            "Message-ID: <msg_1@example.com>",
            "Auto-Submitted: auto-generated",
            "X-Auto-Response-Suppress: All",
            "MIME-Version: 1.0",
        ] {
            assert!(text.lines().any(|line| line == header), "{header} is not in {text}");
            assert!(again.lines().any(|line| line == header), "{header} is not in {again}");
        }
        assert!(text.contains("multipart/alternative") && text.contains("text/plain") && text.contains("text/html"), "{text}");
        assert!(!text.to_lowercase().contains("bcc") && text.is_ascii(), "{text}");
    }

    #[test]
    fn headers_cannot_be_injected() {
        let evil = "a\r\nBcc: eve@example.com\r\n\r\nx";
        let text =
            written(&Letter { id: evil.to_owned(), sender_name: evil.to_owned(), subject: evil.to_owned(), ..letter("ada@example.com") });
        assert!(!text.lines().any(|line| line.starts_with("Bcc")), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("Subject: ")).count(), 1);
        assert!(text.contains("Message-ID: <aBcceveexample.comx@example.com>"), "{text}");
        for to in ["ada@example.com\r\nBcc: eve@example.com", "ada@example.com, eve@example.com", "ada", ""] {
            assert!(mailer("smtp://localhost?tls=off").message(&letter(to)).is_err(), "{to}");
        }
        let (to, message) = mailer("smtp://localhost?tls=off").message(&letter("ada@example.com")).expect("a mail");
        assert_eq!(message.envelope().to(), [to]);
    }

    #[test]
    fn answers_say_whether_to_try_again() {
        let of = |number: u16| {
            let severity = if number < 500 { Severity::TransientNegativeCompletion } else { Severity::PermanentNegativeCompletion };
            let category = [
                Category::Syntax,
                Category::Information,
                Category::Connections,
                Category::Unspecified3,
                Category::Unspecified4,
                Category::MailSystem,
            ];
            let detail = [
                Detail::Zero,
                Detail::One,
                Detail::Two,
                Detail::Three,
                Detail::Four,
                Detail::Five,
                Detail::Six,
                Detail::Seven,
                Detail::Eight,
            ];
            let code = Code::new(severity, category[usize::from(number / 10 % 10)], detail[usize::from(number % 10)]);
            answered(code, "5.1.1 no\r\nsuch\u{7} user")
        };
        for number in [501, 550, 551, 553] {
            assert!(matches!(of(number), Outcome::Refused { is_final: true, .. }), "{number}");
        }
        for number in [450, 451, 452, 500, 552, 554] {
            assert!(matches!(of(number), Outcome::Refused { is_final: false, .. }), "{number}");
        }
        for number in [421, 454, 530, 534, 535, 538] {
            assert!(matches!(of(number), Outcome::Unreachable { .. }), "{number}");
        }
        let Outcome::Refused { error, .. } = of(550) else { panic!("refused") };
        assert_eq!(error, "the mail server answered 550: 5.1.1 no  such  user");
    }

    #[test]
    fn long_lines_are_encoded() {
        let text = written(&Letter { text: "x".repeat(2_000), html: "<p>".repeat(1_000), ..letter("ada@example.com") });
        assert!(text.lines().all(|line| line.len() <= 998));
    }

    /// A mail server without TLS that hangs at the end of a mail whose subject says so. It counts connections and mails.
    async fn server() -> (SocketAddr, Arc<[AtomicUsize; 2]>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let counted = Arc::clone(&counts);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted[0].fetch_add(1, Ordering::SeqCst);
                tokio::spawn(talk(stream, Arc::clone(&counted)));
            }
        });
        (address, counts)
    }

    async fn talk(stream: TcpStream, counted: Arc<[AtomicUsize; 2]>) {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let (mut is_mail, mut hangs, mut answer) = (false, false, "220 ready");
        loop {
            if !answer.is_empty() && write.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
                return;
            }
            let Ok(Some(line)) = lines.next_line().await else { return };
            hangs |= line.starts_with("Subject: hang");
            answer = match line.as_str() {
                "." if hangs => std::future::pending().await,
                "." => {
                    is_mail = false;
                    counted[1].fetch_add(1, Ordering::SeqCst);
                    "250 taken"
                }
                _ if is_mail => "",
                "DATA" => {
                    is_mail = true;
                    "354 go on"
                }
                "RCPT TO:<gone@example.com>" => "550 gone",
                "RCPT TO:<full@example.com>" => "452 full",
                _ => "250 fine",
            };
        }
    }

    #[tokio::test]
    async fn a_given_up_attempt_takes_its_connection_with_it() {
        let (address, counts) = server().await;
        let seen = || counts.each_ref().map(|count| count.load(Ordering::SeqCst));
        let mailer = mailer(&format!("smtp://{address}?tls=off"));
        let good = letter("ada@example.com");
        assert_eq!(mailer.send(&good).await, Outcome::Delivered);
        assert_eq!(mailer.send(&good).await, Outcome::Delivered);
        assert_eq!(seen(), [1, 2], "one connection for two mails");
        let hanging = mailer.send(&Letter { subject: "hang".to_owned(), ..good.clone() }).await;
        assert!(matches!(&hanging, Outcome::Unreachable { error } if error.contains("in time")), "{hanging:?}");
        assert_eq!(mailer.send(&good).await, Outcome::Delivered);
        assert_eq!(seen(), [2, 3]);
        let gone = mailer.send(&letter("gone@example.com")).await;
        assert_eq!(gone, Outcome::Refused { error: "the mail server answered 550: gone".to_owned(), is_final: true });
        let full = mailer.send(&letter("full@example.com")).await;
        assert_eq!(full, Outcome::Refused { error: "the mail server answered 452: full".to_owned(), is_final: false });
        assert_eq!(mailer.send(&good).await, Outcome::Delivered);
    }

    #[tokio::test]
    async fn nobody_there_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let mailer = mailer(&format!("smtp://u:hunter2@{address}?tls=off"));
        let hanging = mailer.send(&letter("ada@example.com")).await;
        assert!(matches!(&hanging, Outcome::Unreachable { error } if error.contains("in time")), "{hanging:?}");
        drop(listener);
        let gone = mailer.send(&letter("ada@example.com")).await;
        assert!(matches!(&gone, Outcome::Unreachable { error } if error.contains("refused")), "{gone:?}");
    }
}
