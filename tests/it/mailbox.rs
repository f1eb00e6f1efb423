//! A mail server for a test: aiosmtpd, a real one that nobody here wrote, as a process of its own that ends with the test.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::{
    tls::{self, Authority, Credential},
    world::{skip, tools},
};

/// How a mailbox is spoken to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MailTls {
    /// In plain text; `smtp://…`.
    None,
    /// In TLS after STARTTLS, without which it takes nothing; `smtp://…?tls=required`.
    StartTls,
    /// In TLS from the first byte; `smtps://…`.
    Implicit,
}

/// What a mailbox does with mails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Takes them.
    Ok,
    /// Accepts connections, and says nothing.
    Hang,
    /// Reads a mail, and never answers.
    HangAfterData,
    /// Closes when the first line of a mail has come.
    CloseInData,
    /// Takes a mail, and closes without an answer.
    CloseAfterData,
    /// Reads a mail, and answers 451.
    Busy,
    /// Reads a mail, and answers 552.
    Full,
    /// Closes what is open, and refuses connections on its port.
    Down,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Hang => "hang",
            Self::HangAfterData => "hang_after_data",
            Self::CloseInData => "close_in_data",
            Self::CloseAfterData => "close_after_data",
            Self::Busy => "busy",
            Self::Full => "full",
            Self::Down => "down",
        }
    }
}

/// What a mailbox is. Default: it speaks plain text, takes everything, and wants no login.
pub struct MailboxOptions {
    pub tls: MailTls,
    /// Whose certificate it shows. Default: an authority of its own.
    pub authority: Authority,
    pub credential: Credential,
    /// Who may send: a name and a password.
    pub login: Option<(String, String)>,
    /// Recipients that get a 550.
    pub reject: Vec<String>,
    /// Recipients that get a 451.
    pub temporary: Vec<String>,
    pub mode: Mode,
}

impl Default for MailboxOptions {
    fn default() -> Self {
        Self {
            tls: MailTls::None,
            authority: Authority::new(),
            credential: Credential::Good,
            login: None,
            reject: Vec::new(),
            temporary: Vec::new(),
            mode: Mode::Ok,
        }
    }
}

/// A mail that was taken.
#[derive(Clone, Debug)]
pub struct Mail {
    /// Of the envelope.
    pub from: String,
    /// Of the envelope.
    pub to: Vec<String>,
    /// In their order, decoded.
    pub headers: Vec<(String, String)>,
    pub subject: String,
    /// With its angle brackets.
    pub message_id: String,
    pub text: Option<String>,
    pub html: Option<String>,
    /// As it came.
    pub raw: String,
    pub tls: bool,
    /// Who had logged in.
    pub user: Option<String>,
    /// The sender's name for itself, in EHLO.
    pub greeting: String,
}

impl Mail {
    fn from_json(value: &Value) -> Self {
        let optional = |name: &str| value[name].as_str().map(str::to_owned);
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let list = |name: &str| value[name].as_array().expect("a list").clone();
        Self {
            from: optional("from").unwrap_or_default(),
            to: list("to").iter().map(text).collect(),
            headers: list("headers").iter().map(|pair| (text(&pair[0]), text(&pair[1]))).collect(),
            subject: text(&value["subject"]),
            message_id: text(&value["message_id"]),
            text: optional("text"),
            html: optional("html"),
            raw: text(&value["raw"]),
            tls: value["tls"].as_bool().expect("a choice"),
            user: optional("user"),
            greeting: optional("greeting").unwrap_or_default(),
        }
    }

    /// The header of this name, in any case; of several the first.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(each, _)| each.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// What has happened so far.
#[derive(Default)]
struct Seen {
    mails: Vec<Mail>,
    connections: usize,
    open: usize,
    hanging: usize,
}

/// The mail server.
pub struct Mailbox {
    port: u16,
    tls: MailTls,
    authority: Authority,
    seen: watch::Receiver<Seen>,
    orders: Mutex<Option<ChildStdin>>,
    answers: Mutex<mpsc::Receiver<Value>>,
    child: Child,
    folder: TempDir,
}

impl Mailbox {
    /// Nothing where the server is not installed; that is said.
    pub fn start(options: MailboxOptions) -> Option<Self> {
        let python = tools().map(|tools| tools.join("venv/bin/python")).filter(|python| python.exists());
        let Some(python) = python else {
            skip("no mail server (tests/run installs it)");
            return None;
        };
        let folder = tempfile::tempdir().expect("a folder");
        tls::write(folder.path(), &options.authority.credential(options.credential));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/smtp/serve.py");
        let mut command = Command::new(python);
        command.arg("-B").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it runs");
        let (tell, seen) = watch::channel(Seen::default());
        let (answer, answers) = mpsc::sync_channel(16);
        let stdout = child.stdout.take().expect("piped");
        std::thread::spawn(move || listen(stdout, &tell, &answer));
        let mut mailbox = Self {
            port: 0,
            tls: options.tls,
            authority: options.authority,
            seen,
            orders: Mutex::new(child.stdin.take()),
            answers: Mutex::new(answers),
            child,
            folder,
        };
        let path = |name: &str| mailbox.folder.path().join(name).display().to_string();
        let (user, password) = options.login.unzip();
        let settings = json!({
            "tls": match options.tls { MailTls::None => "none", MailTls::StartTls => "starttls", MailTls::Implicit => "implicit" },
            "cert": path("cert.pem"), "key": path("key.pem"),
            "user": user, "password": password,
            "mode": options.mode.name(), "reject": options.reject, "temporary": options.temporary,
        });
        mailbox.port = mailbox.order(&settings)["port"].as_u64().and_then(|port| port.try_into().ok()).expect("a port");
        Some(mailbox)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// As the setting `smtp_url` takes it; an empty user logs nobody in.
    pub fn url(&self, user: &str, password: &str) -> String {
        let escaped = |text| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let login = if user.is_empty() { String::new() } else { format!("{}:{}@", escaped(user), escaped(password)) };
        let port = self.port;
        match self.tls {
            MailTls::None => format!("smtp://{login}127.0.0.1:{port}"),
            MailTls::StartTls => format!("smtp://{login}127.0.0.1:{port}?tls=required"),
            MailTls::Implicit => format!("smtps://{login}127.0.0.1:{port}"),
        }
    }

    /// The certificate of its authority.
    pub fn ca_pem(&self) -> String {
        self.authority.pem()
    }

    /// What it took until now, in order.
    pub fn mails(&self) -> Vec<Mail> {
        self.catch_up();
        self.seen.borrow().mails.clone()
    }

    /// Waits until it has taken so many, and shows them all.
    pub async fn wait_for(&self, count: usize, deadline: Duration) -> Vec<Mail> {
        self.until(&format!("{count} mails"), deadline, |seen| seen.mails.len() >= count).await;
        self.seen.borrow().mails.clone()
    }

    /// Waits until it leaves so many senders without an answer, all in all.
    pub async fn wait_until_hanging(&self, count: usize, deadline: Duration) {
        self.until(&format!("{count} senders without an answer"), deadline, |seen| seen.hanging >= count).await;
    }

    async fn until(&self, what: &str, deadline: Duration, holds: impl Fn(&Seen) -> bool) {
        let mut seen = self.seen.clone();
        let outcome = tokio::time::timeout(deadline, seen.wait_for(|seen| holds(seen))).await;
        let Ok(Ok(_)) = outcome else { panic!("{what} were not seen within {deadline:?}; mails: {:?}", self.mails()) };
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        self.catch_up();
        self.seen.borrow().connections
    }

    /// How many connections there are.
    pub fn open_connections(&self) -> usize {
        self.catch_up();
        self.seen.borrow().open
    }

    /// Changes what it does from now on. Whoever hangs already goes on hanging.
    pub fn mode(&self, mode: Mode) {
        self.order(&json!({ "mode": mode.name() }));
    }

    /// Refuses these recipients, for good, and those for now.
    pub fn refuse(&self, reject: &[&str], temporary: &[&str]) {
        self.order(&json!({ "reject": reject, "temporary": temporary }));
    }

    /// Wants another login on new connections, if it wants one.
    pub fn change_login(&self, user: &str, password: &str) {
        self.order(&json!({ "user": user, "password": password }));
    }

    /// Hears all that the server has said.
    fn catch_up(&self) {
        self.order(&json!({}));
    }

    /// Is obeyed when this returns.
    fn order(&self, settings: &Value) -> Value {
        let mut orders = self.orders.lock().expect("not poisoned");
        writeln!(orders.as_mut().expect("open"), "{settings}").expect("it reads");
        let answer = self.answers.lock().expect("not poisoned").recv_timeout(Duration::from_secs(30));
        answer.unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout => panic!("the mail server does not answer"),
            RecvTimeoutError::Disconnected => panic!("the mail server has ended"),
        })
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // The end of its standard input would do; this does not wait for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads what the server says, to its end.
fn listen(stdout: ChildStdout, tell: &watch::Sender<Seen>, answer: &mpsc::SyncSender<Value>) {
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        let event: Value = serde_json::from_str(&line).expect("JSON");
        match event["event"].as_str().expect("a name") {
            "connected" => tell.send_modify(|seen| {
                seen.connections += 1;
                seen.open += 1;
            }),
            "closed" => tell.send_modify(|seen| seen.open -= 1),
            "hanging" => tell.send_modify(|seen| seen.hanging += 1),
            "mail" => tell.send_modify(|seen| seen.mails.push(Mail::from_json(&event))),
            _ => drop(answer.send(event)),
        }
    }
}
