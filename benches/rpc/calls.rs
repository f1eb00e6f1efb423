//! Single calls: Keyward, servers that do nothing, and Redis, in turns.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
};

use rcgen::{CertifiedKey, generate_simple_self_signed};

use crate::{
    Options,
    client::{CONNECTIONS, UNDER_WAY},
    process::{CLIENT_CORE, Keyward, SERVER_CORE, Server, Settings, free_port, is_installed, own_path, pinned},
    site::{Site, invented},
    stats::{Spread, print_table},
    wire,
};

const REDIS_CONNECTIONS: u32 = 50;
const REDIS_BYTES: u32 = 100;

/// Who answers, and how it is asked.
enum Target<'a> {
    Empty {
        server: Server,
        path: &'static str,
        body: &'a Path,
        scheme: &'static str,
    },
    /// With the verdict that every answer must hold.
    Keyward {
        keyward: &'a Keyward,
        path: &'static str,
        body: &'a Path,
        scheme: &'static str,
        verdict: &'static str,
    },
    Redis(Server),
    NotInstalled,
}

struct Row<'a> {
    name: &'static str,
    target: Target<'a>,
    /// The row that it is most like, which its second ratio is to.
    beside: usize,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    /// Nanoseconds a call.
    cpu: f64,
    /// Calls per second.
    rate: f64,
}

/// What later parts of the bench go by.
pub struct Outcome {
    /// Calls per second of `ValidateToken` when the server's core is full.
    pub saturated: f64,
}

const BASE: usize = 0;
const GOOD: usize = 3;
const TONIC_TLS: usize = 5;
const TONIC_CHECK: usize = 7;

/// Measures, and prints the table.
pub fn compare(options: &Options, site: &Site) -> Outcome {
    let (body, bad_body) = (site.body("good", &site.asked), site.body("bad", &invented()));
    let check_body = site.check_body("check", &site.asked);
    write_certificate(&site.folder);
    let path = |name: &str| site.folder.join(name).display().to_string();
    let tls = Settings { more: vec!["--tls-cert".into(), path("cert.pem"), "--tls-key".into(), path("key.pem")], ..Settings::default() };
    let plain = Keyward::start(&site.copy("plain"), &Settings::default());
    let secure = Keyward::start(&site.copy("secure"), &tls);
    let empty = |kind: &str, folder: Option<&Path>| start_empty(site, kind, folder);
    let keyward = |keyward, body, scheme, verdict| Target::Keyward { keyward, path: wire::VALIDATE, body, scheme, verdict };
    let nothing = |server, scheme| Target::Empty { server, path: wire::VALIDATE, body: &body, scheme };
    let (check, checked) = (wire::CHECK, &check_body);
    let row = |name, beside, target| Row { name, target, beside, samples: Vec::new() };
    let mut rows = [
        row("tonic, empty handler, multi-thread runtime with one worker", BASE, nothing(empty("tonic-multi", None), "http")),
        row("tonic, empty handler, current-thread runtime", BASE, nothing(empty("tonic-current", None), "http")),
        row("hyper, the same frames, current-thread runtime (the floor)", BASE, nothing(empty("hyper", None), "http")),
        row("Keyward, a good token", BASE, keyward(&plain, &body, "http", "VALID")),
        row("Keyward, an invented token", GOOD, keyward(&plain, &bad_body, "http", "UNKNOWN")),
        row("tonic, empty handler, TLS", BASE, nothing(empty("tonic-multi", Some(&site.folder)), "https")),
        row("Keyward, a good token, TLS", TONIC_TLS, keyward(&secure, &body, "https", "VALID")),
        row(
            "tonic, an Envoy authorization that lets all pass",
            BASE,
            Target::Empty { server: empty("tonic-multi", None), path: check, body: checked, scheme: "http" },
        ),
        row(
            "Keyward, Envoy's Check, a good token",
            TONIC_CHECK,
            Target::Keyward { keyward: &plain, path: check, body: checked, scheme: "http", verdict: "VALID" },
        ),
        row("Redis, GET of 100 bytes, no pipeline (redis-benchmark -c 50 -P 1)", BASE, redis(site)),
    ];
    for round in 0..=options.rounds {
        for turn in 0..rows.len() {
            // Nobody always comes after the same one.
            let count = rows.len();
            let row = &mut rows[(turn + round) % count];
            let sample = row.target.round(options.calls, &site.caller);
            // The first round warms up.
            row.samples.extend(sample.filter(|_| round > 0));
        }
    }
    print(options, &rows);
    Outcome { saturated: Spread::of(rows[GOOD].samples.iter().map(|sample| sample.rate)).median }
}

fn print(options: &Options, rows: &[Row<'_>]) {
    let (rounds, calls) = (options.rounds, options.calls);
    println!(
        "## Single calls: `ValidateToken`, warm, one core, {rounds} rounds of {calls} calls, h2load -c {CONNECTIONS} -m {UNDER_WAY}\n"
    );
    let cpu = |row: &Row<'_>| row.samples.iter().map(|sample| sample.cpu / 1e3).collect::<Vec<_>>();
    let cells = rows.iter().map(|row| {
        if row.samples.is_empty() {
            return vec![row.name.to_owned(), "not installed".to_owned(), String::new(), String::new(), String::new()];
        }
        let ratio = |other: usize| Spread::of_ratios(&cpu(row), &cpu(&rows[other])).median;
        let beside = if row.beside == BASE { String::new() } else { format!("{:.2} × {}", ratio(row.beside), rows[row.beside].name) };
        let rate = Spread::of(row.samples.iter().map(|sample| sample.rate)).median;
        vec![row.name.to_owned(), Spread::of(cpu(row)).show(1), format!("{:.2}", ratio(BASE)), beside, format!("{rate:.0}")]
    });
    let head = ["answers", "server CPU µs per call (median, min–max)", "ratio to the first", "beside", "calls per second"];
    print_table(&head, &cells.collect::<Vec<_>>());
}

impl Target<'_> {
    fn round(&self, calls: u64, caller: &str) -> Option<Sample> {
        match self {
            Self::NotInstalled => None,
            Self::Redis(server) => Some(redis_round(server, calls)),
            Self::Empty { server, path, body, scheme } => Some(h2load(server, calls, (path, body), scheme, caller)),
            Self::Keyward { keyward, path, body, scheme, verdict } => {
                // The client cannot see what an answer says: it must have been the one that is to be measured.
                let before = keyward.verdicts(verdict);
                let sample = h2load(&keyward.server, calls, (path, body), scheme, caller);
                assert_eq!(keyward.verdicts(verdict) - before, calls, "calls that were judged {verdict}");
                Some(sample)
            }
        }
    }
}

fn h2load(server: &Server, calls: u64, (path, body): (&str, &Path), scheme: &str, caller: &str) -> Sample {
    let mut command = pinned(CLIENT_CORE, "h2load");
    command.args(["-c", &CONNECTIONS.to_string(), "-m", &UNDER_WAY.to_string(), "-n", &calls.to_string(), "-d"]).arg(body);
    command.args(["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", &format!("authorization: Bearer {caller}")]);
    command.arg(format!("{scheme}://127.0.0.1:{}{path}", server.port));
    let before = server.cpu();
    let output = command.output().expect("h2load");
    let cpu = (server.cpu() - before) / calls as f64;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(&format!("{calls} succeeded, 0 failed")), "{said}");
    assert!(said.contains("Application protocol: h2"), "another protocol was spoken: {said}");
    // finished in 1.25s, 80123.45 req/s, 10.52MB/s
    let rate = said.lines().find_map(|line| line.strip_prefix("finished in ")?.split(' ').nth(1)?.parse().ok());
    Sample { cpu, rate: rate.expect("a rate") }
}

/// A server that does nothing.
pub fn start_empty(site: &Site, kind: &str, folder: Option<&Path>) -> Server {
    let port = free_port();
    let mut command = pinned(SERVER_CORE, own_path());
    command.args(["--empty", kind, &port.to_string()]).args(folder);
    Server::start(command, port, &site.folder.join(format!("{kind}.log")))
}

/// One certificate for everybody who speaks TLS.
fn write_certificate(folder: &Path) {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).expect("a certificate");
    fs::write(folder.join("cert.pem"), cert.pem()).expect("writable");
    fs::write(folder.join("key.pem"), signing_key.serialize_pem()).expect("writable");
}

fn redis<'a>(site: &Site) -> Target<'a> {
    if !is_installed("redis-server") || !is_installed("redis-benchmark") {
        eprintln!("Redis is left out (Debian: apt-get install redis-server redis-tools)");
        return Target::NotInstalled;
    }
    let folder: PathBuf = site.folder.with_file_name("redis");
    fs::create_dir_all(&folder).expect("a folder");
    let port = free_port();
    let mut command = pinned(SERVER_CORE, "redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]).arg(&folder);
    let server = Server::start(command, port, &folder.join("log"));
    redis_benchmark(&server, "set", 1);
    Target::Redis(server)
}

fn redis_round(server: &Server, calls: u64) -> Sample {
    let (hits, before) = (redis_hits(server), server.cpu());
    let said = redis_benchmark(server, "get", calls);
    let cpu = (server.cpu() - before) / calls as f64;
    assert_eq!(redis_hits(server) - hits, calls, "keys that were found");
    let rate = said.lines().find_map(|line| line.strip_prefix("\"GET\",\"")?.split('"').next()?.parse().ok());
    Sample { cpu, rate: rate.unwrap_or_else(|| panic!("a rate: {said}")) }
}

fn redis_benchmark(server: &Server, test: &str, calls: u64) -> String {
    let mut command = pinned(CLIENT_CORE, "redis-benchmark");
    command.args(["-p", &server.port.to_string(), "-t", test, "-n", &calls.to_string(), "-P", "1", "--csv"]);
    command.args(["-c", &REDIS_CONNECTIONS.to_string(), "-d", &REDIS_BYTES.to_string()]);
    let output = command.output().expect("redis-benchmark");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How often a key was found.
fn redis_hits(server: &Server) -> u64 {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).expect("Redis");
    stream.write_all(b"INFO stats\r\nQUIT\r\n").expect("sent");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("an answer");
    let hits = said.lines().find_map(|line| line.strip_prefix("keyspace_hits:"));
    hits.expect("a count").trim().parse().expect("a number")
}
