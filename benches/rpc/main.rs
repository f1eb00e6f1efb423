//! What Keyward costs on the wire, beside servers that do nothing, Redis and PostgreSQL: same messages, same client, same run.
//!
//! `cargo bench --bench rpc` starts the release server and what it is compared with on one core, sends rounds of calls to each in turn from the
//! other core, and prints the CPU time that each server took per call (user and system, of all its threads): the median over the rounds with the
//! spread, and the median of the ratios round by round. On a busy machine only these mean anything. `-- --help` says what else there is.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    missing_docs,
    reason = "a bench fails by panicking, and speaks to people"
)]

mod calls;
mod client;
mod create;
mod empty;
mod gateways;
mod load;
mod many;
mod process;
mod site;
mod soak;
mod stats;
mod wire;

use std::process::ExitCode;

use site::Site;

const HELP: &str = "\
cargo bench --bench rpc [-- OPTIONS]

Without options: single calls, many tokens, latency at half load, two cores. Under three minutes.

  --only PART       calls, many, latency or scaling, and nothing else (latency measures calls as well)
  --rounds N        how often each is measured (default 7; what takes long, half as often)
  --calls N         calls of a round (default 40000)
  --tokens N        how many different tokens (default 100000)
  --create          CreateToken on SQLite and PostgreSQL beside pgbench, instead
  --gateways        what Envoy, Traefik, Caddy, nginx and HAProxy take for a request, with Keyward and without, instead (tests/run installs them)
  --soak SECONDS    full load while tokens come and go, then a comparison of all use counts, instead; exit code 1 if they differ

Needs taskset (Debian: util-linux) and h2load (nghttp2-client); --create needs PostgreSQL with pgbench (postgresql, postgresql-contrib).
Redis is compared if it is there (redis-server, redis-tools).";

/// What was asked for.
pub struct Options {
    only: Option<String>,
    rounds: usize,
    calls: u64,
    tokens: usize,
    create: bool,
    gateways: bool,
    soak: Option<u64>,
}

impl Options {
    /// Reads the command line; nothing if it is a wish for help, or wrong.
    fn read(arguments: &[String]) -> Option<Self> {
        let mut options = Self { only: None, rounds: 7, calls: 40_000, tokens: 100_000, create: false, gateways: false, soak: None };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().cloned();
            match argument.as_str() {
                // Cargo says that it is a bench.
                "--bench" => {}
                "--only" => options.only = Some(value().filter(|part| PARTS.contains(&part.as_str()))?),
                "--rounds" => options.rounds = value()?.parse().ok().filter(|rounds| *rounds > 0)?,
                "--calls" => options.calls = value()?.parse().ok().filter(|calls| *calls > 0)?,
                "--tokens" => options.tokens = value()?.parse().ok().filter(|tokens| *tokens > 0)?,
                "--create" => options.create = true,
                "--gateways" => options.gateways = true,
                "--soak" => options.soak = Some(value()?.parse().ok().filter(|seconds| *seconds > 0)?),
                _ => return None,
            }
        }
        Some(options)
    }

    /// For what takes long.
    fn few_rounds(&self) -> usize {
        self.rounds.div_ceil(2)
    }

    fn wants(&self, part: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == part)
    }
}

const PARTS: [&str; 4] = ["calls", "many", "latency", "scaling"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        // The bench as one of its own processes.
        [flag, kind, port, more @ ..] if flag == "--empty" => empty::serve(kind, port, more.first()),
        [flag, more @ ..] if flag == "--client" => client::run(more),
        _ => match Options::read(&arguments) {
            Some(options) => return measure(&options),
            None => println!("{HELP}"),
        },
    }
    ExitCode::SUCCESS
}

fn measure(options: &Options) -> ExitCode {
    process::need("taskset", "util-linux");
    // Removed when this function ends, also by a panic.
    let folder = tempfile::Builder::new().prefix("keyward-bench-").tempdir().expect("a folder");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if options.create {
        create::compare(options, folder.path(), &runtime);
        return ExitCode::SUCCESS;
    }
    let site = Site::new(folder.path().join("site"));
    if options.gateways {
        process::need("h2load", "nghttp2-client");
        gateways::compare(options, &site);
        return ExitCode::SUCCESS;
    }
    if let Some(seconds) = options.soak {
        return if soak::run(seconds, site) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if options.wants("calls") || options.wants("latency") {
        process::need("h2load", "nghttp2-client");
        let outcome = calls::compare(options, &site);
        if options.wants("latency") {
            load::latency(options, &site, outcome.saturated);
        }
    }
    if options.wants("scaling") {
        load::scaling(options, &site);
    }
    if options.wants("many") {
        many::compare(options, &site, &runtime);
    }
    ExitCode::SUCCESS
}
