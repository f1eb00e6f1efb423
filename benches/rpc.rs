//! What a `ValidateToken` costs on the wire, beside a handler of the framework that does nothing: same messages, same client, same run.
//!
//! `cargo bench --bench rpc` starts the release server and a tonic server that answers a constant, pins both to one core and h2load to another, and
//! sends rounds of calls to them in turn. It prints the CPU time that the server took per call (user and system), the median over the rounds with
//! the spread, and the median of the ratios round by round: on a busy machine only these mean anything.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    missing_docs,
    reason = "a bench fails by panicking, and speaks to people"
)]

use std::{
    fs,
    io::{Read as _, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use keyward::proto::{self, validation_service_server as service};
use prost_reflect::prost::Message as _;
use tonic::{Request, Response, Status};

const ROUNDS: usize = 15;
/// Of one round: enough that a tick of the processor's clock is a hundredth of what they take.
const CALLS: u64 = 100_000;
/// Ticks of `/proc/PID/stat` in a second (`getconf CLK_TCK`).
const TICKS_PER_SECOND: f64 = 100.0;

/// The service that does nothing.
struct Empty;

#[tonic::async_trait]
impl service::ValidationService for Empty {
    async fn validate_token(&self, _: Request<proto::ValidateTokenRequest>) -> Result<Response<proto::ValidateTokenResponse>, Status> {
        Ok(Response::new(constant()))
    }

    async fn batch_validate_tokens(
        &self,
        _: Request<proto::BatchValidateTokensRequest>,
    ) -> Result<Response<proto::BatchValidateTokensResponse>, Status> {
        Ok(Response::new(proto::BatchValidateTokensResponse::default()))
    }
}

/// What Keyward answers to the bench's question, give or take a few bytes.
fn constant() -> proto::ValidateTokenResponse {
    proto::ValidateTokenResponse {
        valid: true,
        verdict: proto::Verdict::Valid.into(),
        token_id: "tok_0000000000000000000000".to_owned(),
        workspace: "default".to_owned(),
        principal: "root".to_owned(),
        kind: proto::TokenKind::Permanent.into(),
        scopes: vec!["agents:list".to_owned(), "storage:upload".to_owned()],
        audiences: vec!["billing".to_owned()],
        display_name: "bench".to_owned(),
        expire_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 1_000_000 }),
        ..Default::default()
    }
}

/// A server on one core, ended with the bench.
struct Server {
    name: &'static str,
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Server {
    fn start(name: &'static str, program: &Path, arguments: &[&str], port: u16) -> Self {
        let mut command = Command::new("taskset");
        let child = command.args(["-c", "0"]).arg(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let server = Self { name, child: child.expect("taskset (Debian: util-linux)"), port };
        let begin = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{name} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// User and system time so far, in seconds.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a process");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        let ticks: f64 = [fields[11], fields[12]].iter().map(|field| field.parse::<f64>().expect("a number")).sum();
        ticks / TICKS_PER_SECOND
    }

    /// One round: microseconds of CPU per call, and calls per second.
    fn round(&self, body: &Path, token: &str) -> (f64, f64) {
        let (cpu, begin) = (self.cpu(), Instant::now());
        let mut command = Command::new("taskset");
        command.args(["-c", "1", "h2load", "-c", "8", "-m", "32", "-n", &CALLS.to_string(), "-d"]).arg(body);
        command.args(["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", &format!("authorization: Bearer {token}")]);
        command.arg(format!("http://127.0.0.1:{}/keyward.v1.ValidationService/ValidateToken", self.port));
        let output = command.output().expect("h2load (Debian: nghttp2-client)");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(&format!("{CALLS} succeeded, 0 failed")), "{}: {said}", self.name);
        let calls = CALLS as f64;
        ((self.cpu() - cpu) * 1e6 / calls, calls / begin.elapsed().as_secs_f64())
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn serve_empty(port: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let address = format!("127.0.0.1:{port}").parse().expect("an address");
    let server = tonic::transport::Server::builder().add_service(service::ValidationServiceServer::new(Empty));
    runtime.block_on(server.serve(address)).expect("it serves");
}

/// A token of Keyward's own command line, and the question about it as a gRPC message.
fn question(keyward: &Path, port: u16, folder: &Path) -> (String, String) {
    let root = fs::read_to_string(folder.join("root")).expect("written").trim().to_owned();
    let create = |arguments: &[&str]| {
        let mut command = Command::new(keyward);
        command.args(["token", "create", "--name", "bench"]).args(arguments).env("KEYWARD_TOKEN", &root);
        let output = command.env("KEYWARD_ADDRESS", format!("127.0.0.1:{port}")).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    let caller = create(&["--scope", "keyward:validate"]);
    let asked = create(&["--scope", "agents:list,storage:upload", "--audience", "billing"]);
    let message = proto::ValidateTokenRequest {
        token: asked.clone(),
        audience: "billing".to_owned(),
        required_scopes: vec!["agents:list".to_owned()],
        client_ip: "192.0.2.7".to_owned(),
        ..Default::default()
    };
    let bytes = message.encode_to_vec();
    let mut file = fs::File::create(folder.join("body")).expect("writable");
    let length = u32::try_from(bytes.len()).expect("small");
    file.write_all(&[&[0], length.to_be_bytes().as_slice(), &bytes].concat()).expect("writable");
    (caller, asked)
}

/// How often Keyward has said VALID, by its own count.
fn valid_verdicts(metrics: &str) -> u64 {
    let mut page = String::new();
    let mut stream = std::net::TcpStream::connect(metrics).expect("the metrics");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: keyward\r\n\r\n").expect("sent");
    stream.read_to_string(&mut page).expect("a page");
    let count = page.lines().find_map(|line| line.strip_prefix("keyward_verdicts_total{verdict=\"VALID\"} "));
    count.map_or(0, |count| count.trim().parse().expect("a number"))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, port, ..] = arguments.as_slice()
        && flag == "--empty"
    {
        return serve_empty(port);
    }
    let folder = std::env::temp_dir().join(format!("keyward-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let keyward = Path::new(env!("CARGO_BIN_EXE_keyward"));
    let (port, empty_port, metrics_port) = (free_port(), free_port(), free_port());
    let data = folder.join("data").display().to_string();
    let root = folder.join("root").display().to_string();
    let (listen, metrics) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{metrics_port}"));
    let serve =
        ["serve", "--workers", "1", "--metrics-listen", &metrics, "--listen", &listen, "--data-dir", &data, "--root-token-file", &root];
    let ours = Server::start("Keyward, everything on", keyward, &serve, port);
    let own = std::env::current_exe().expect("a path");
    let empty = Server::start("tonic, empty handler", &own, &["--empty", &empty_port.to_string()], empty_port);
    let begin = Instant::now();
    while !fs::read_to_string(&root).is_ok_and(|text| text.ends_with('\n')) {
        assert!(begin.elapsed() < Duration::from_secs(10), "no root token");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (caller, _) = question(keyward, port, &folder);
    let body = folder.join("body");
    let servers = [&empty, &ours];
    for server in servers {
        server.round(&body, &caller);
    }
    let mut rounds: Vec<[(f64, f64); 2]> = Vec::new();
    for _ in 0..ROUNDS {
        rounds.push(servers.map(|server| server.round(&body, &caller)));
    }
    // The client cannot see what a reply says: whatever was measured must have been the answer that a good token gets.
    assert_eq!(valid_verdicts(&metrics), CALLS * (ROUNDS as u64 + 1), "calls that were judged VALID");
    println!("ValidateToken, warm, one core, {ROUNDS} rounds of {CALLS} calls, h2load -c 8 -m 32\n");
    println!("| handler | CPU µs per call (median, min–max) | ratio | calls per second |");
    println!("| --- | --- | --- | --- |");
    for (index, server) in servers.iter().enumerate() {
        let (cpu, min, max) = median(rounds.iter().map(|round| round[index].0).collect());
        let (ratio, ..) = median(rounds.iter().map(|round| round[index].0 / round[0].0).collect());
        let (rate, ..) = median(rounds.iter().map(|round| round[index].1).collect());
        println!("| {} | {cpu:.1} ({min:.1}–{max:.1}) | {ratio:.2} | {rate:.0} |", server.name);
    }
    drop((ours, empty));
    let _removed = fs::remove_dir_all(&folder);
}
