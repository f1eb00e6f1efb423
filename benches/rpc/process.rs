//! The processes that are measured, and those that measure: pinned to cores, read in nanoseconds, ended with the bench.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// What is measured runs here.
pub const SERVER_CORE: &str = "0";
/// What sends calls runs here.
pub const CLIENT_CORE: &str = "1";
pub const BOTH_CORES: &str = "0,1";

/// How large the cache of a server is that has to hold every token: the setting and its value.
pub const CACHE: [&str; 2] = ["--cache-bytes", "1000000000"];

/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(40);

/// Ends the bench if a program is missing.
pub fn need(program: &str, package: &str) {
    assert!(is_installed(program), "{program} is missing (Debian: apt-get install {package})");
}

pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// A program on these cores, without settings of Keyward that the bench was started with.
pub fn pinned(cores: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", cores]).arg(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KEYWARD_")) {
        command.env_remove(name);
    }
    command
}

/// A server, killed with its owner.
pub struct Server {
    child: Child,
    pub port: u16,
    /// What each thread has used and waited for so far; those that have ended are remembered.
    threads: RefCell<BTreeMap<String, [u64; 2]>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Server {
    /// Starts it, and waits until it listens. What it says goes to `log`.
    pub fn start(mut command: Command, port: u16, log: &Path) -> Self {
        let file = File::create(log).expect("a log");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().expect("taskset");
        let mut server = Self { child, port, threads: RefCell::default() };
        let begin = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let is_gone = server.child.try_wait().expect("a child").is_some();
            let said = || fs::read_to_string(log).unwrap_or_default();
            assert!(!is_gone && begin.elapsed() < PATIENCE, "{command:?} does not listen: {}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// User and system time of all of its threads so far, in nanoseconds.
    pub fn cpu(&self) -> f64 {
        self.times()[0]
    }

    /// How long its threads could have run so far and did not get a core, in nanoseconds.
    pub fn waited(&self) -> f64 {
        self.times()[1]
    }

    fn times(&self) -> [f64; 2] {
        let mut threads = self.threads.borrow_mut();
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("a process").flatten() {
            // A thread may end while it is looked at.
            let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
            let mut fields = text.split(' ').map_while(|field| field.parse().ok());
            let times = std::array::from_fn(|_| fields.next().expect("two times"));
            threads.insert(task.file_name().to_string_lossy().into_owned(), times);
        }
        std::array::from_fn(|field| threads.values().map(|times| times[field]).sum::<u64>() as f64)
    }

    /// Waits until what it does after calls is done: counted uses are written once a second.
    pub fn settle(&self) {
        std::thread::sleep(Duration::from_millis(1_100));
        let begin = Instant::now();
        loop {
            let before = self.cpu();
            std::thread::sleep(Duration::from_millis(200));
            if self.cpu() - before < 2e6 {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "the server does not come to rest");
        }
    }

    /// Memory that it holds now, in MiB.
    pub fn rss(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
    }

    /// SIGTERM, and the clean end that it leads to.
    pub fn stop(self) {
        let status = self.end();
        assert!(status.success(), "the server did not stop cleanly: {status}");
    }

    /// SIGTERM, and whatever end it leads to.
    pub fn end(mut self) -> ExitStatus {
        let sent = Command::new("sh").args(["-c", &format!("kill -TERM {}", self.child.id())]).status();
        assert!(sent.expect("a shell").success(), "the server was gone before");
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "the server does not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// How a Keyward is started.
pub struct Settings<'a> {
    pub cores: &'a str,
    pub workers: u32,
    /// Where it answers HTTP, if anywhere.
    pub http: Option<u16>,
    pub more: Vec<String>,
}

impl Default for Settings<'_> {
    fn default() -> Self {
        Self { cores: SERVER_CORE, workers: 1, http: None, more: Vec::new() }
    }
}

/// A Keyward with its data.
pub struct Keyward {
    pub server: Server,
    metrics: u16,
}

impl Keyward {
    /// On the data in `folder`, which is made if it is not there.
    pub fn start(folder: &Path, settings: &Settings<'_>) -> Self {
        let (port, metrics) = (free_port(), free_port());
        let mut command = pinned(settings.cores, env!("CARGO_BIN_EXE_keyward"));
        command.args(["serve", "--workers", &settings.workers.to_string()]).args(CACHE).args(&settings.more);
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--metrics-listen", &format!("127.0.0.1:{metrics}")]);
        let http = settings.http.map_or("off".to_owned(), |port| format!("127.0.0.1:{port}"));
        command.args(["--http-listen", &http]);
        command.arg("--data-dir").arg(folder.join("data")).arg("--root-token-file").arg(folder.join("root"));
        Self { server: Server::start(command, port, &folder.join("log")), metrics }
    }

    /// The number that its metrics page shows for this name; none shows as 0.
    pub fn metric(&self, name: &str) -> u64 {
        let mut page = String::new();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.metrics)).expect("the metrics");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: keyward\r\nconnection: close\r\n\r\n").expect("sent");
        stream.read_to_string(&mut page).expect("a page");
        let count = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        count.map_or(0, |count| count.trim().parse().expect("a number"))
    }

    /// How often it has come to this verdict.
    pub fn verdicts(&self, verdict: &str) -> u64 {
        self.metric(&format!("keyward_verdicts_total{{verdict=\"{verdict}\"}}"))
    }
}

/// The bench itself as a client in a process of its own, so that what it uses is not counted. It is told a line, and answers with numbers.
pub struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Client {
    /// Asks the server at `port`, as `caller`, about the tokens in this file.
    pub fn start(cores: &str, port: u16, caller: &str, tokens: &Path) -> Self {
        let mut command = pinned(cores, own_path());
        command.args(["--client", &port.to_string(), caller]).arg(tokens).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("taskset");
        let (input, output) = (child.stdin.take().expect("piped"), BufReader::new(child.stdout.take().expect("piped")));
        Self { child, input, output }
    }

    pub fn run(&mut self, order: &str) -> Vec<f64> {
        writeln!(self.input, "{order}").expect("the client is gone");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("an answer");
        let numbers: Vec<f64> = answer.split_whitespace().map(|number| number.parse().expect("a number")).collect();
        assert!(!numbers.is_empty(), "the client gave up at: {order}");
        numbers
    }
}

pub fn own_path() -> PathBuf {
    std::env::current_exe().expect("a path")
}
