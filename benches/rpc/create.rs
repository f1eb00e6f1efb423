//! `--create`: how fast tokens are created, on SQLite and on PostgreSQL, beside the plainest inserts of rows of that size by pgbench.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use keyward::proto;
use prost::Message as _;
use sea_orm::{ConnectionTrait as _, Database};
use tokio::task::JoinSet;

use crate::{
    Options,
    client::{Wire, calls_in_turn},
    process::{BOTH_CORES, Keyward, Settings, free_port, need},
    site::{root_token, rows},
    stats::{Spread, print_table},
    wire,
};

const CLIENTS: usize = 8;
const CALLS: usize = 2_000;
/// A principal may have a hundred live tokens.
const TOKENS_OF_ONE: usize = 50;
/// What PostgreSQL adds to the text of a row in the tables of pgbench: header, number, length.
const ROW_OVERHEAD: i64 = 36;

/// A PostgreSQL of the bench's own, from the machine's binaries, with the settings that it comes with.
struct Postgres {
    port: u16,
    watchdog: Child,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The end of its input tells it to stop and to remove its folder, also if the bench is killed.
        drop(self.watchdog.stdin.take());
        let _ended = self.watchdog.wait();
    }
}

impl Postgres {
    fn start() -> Self {
        let bin = binaries().expect("PostgreSQL is missing (Debian: apt-get install postgresql)");
        let folder = tempfile::Builder::new().prefix("keyward-bench-postgres-").tempdir().expect("a folder").keep();
        let port = free_port();
        // PostgreSQL refuses to run as root: Debian's package brings a user for it.
        let is_root = Command::new("chown").arg("postgres").arg(&folder).status().is_ok_and(|status| status.success());
        let mut command = Command::new(if is_root { "runuser" } else { "sh" });
        if is_root {
            command.args(["-u", "postgres", "--", "sh"]);
        }
        let script = "set -e; bin=$1 dir=$2 port=$3; cd \"$dir\"; \
            \"$bin/initdb\" -D data -U postgres -A trust -E UTF8 --no-sync >initdb.log 2>&1; \
            \"$bin/postgres\" -D data -p \"$port\" -k \"$dir\" -c listen_addresses=127.0.0.1 >postgres.log 2>&1 & pid=$!; \
            cat >/dev/null || true; kill -INT $pid; wait $pid || true; rm -rf \"$dir\"";
        command.args(["-c", script, "sh"]).arg(&bin).arg(&folder).arg(port.to_string());
        let watchdog = command.stdin(Stdio::piped()).spawn().expect("a shell");
        let started = Self { port, watchdog };
        let begin = Instant::now();
        while !started.answers(&bin) {
            assert!(begin.elapsed() < Duration::from_mins(1), "PostgreSQL did not start: see {}", folder.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        started
    }

    fn answers(&self, bin: &Path) -> bool {
        let ready = Command::new(bin.join("pg_isready")).args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]).status();
        ready.is_ok_and(|status| status.success())
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    async fn execute(&self, database: &str, sql: &str) {
        let db = Database::connect(self.url(database)).await.expect("PostgreSQL");
        db.execute_unprepared(sql).await.expect("it is done");
    }

    /// The size of the average row of this table of Keyward's, in bytes.
    async fn row_size(&self, table: &str) -> i64 {
        let db = Database::connect(self.url("keyward")).await.expect("PostgreSQL");
        let sql = format!("SELECT CAST(avg(pg_column_size({table}.*)) AS BIGINT) FROM {table}");
        rows(&db, &sql).await[0].try_get_by_index(0).expect("a number")
    }
}

fn binaries() -> Option<PathBuf> {
    let debian = fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    let mut folders: Vec<PathBuf> = debian.collect();
    folders.sort();
    folders.reverse();
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    folders.into_iter().find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
}

/// A Keyward whose tokens are created.
struct Maker {
    keyward: Keyward,
    root: String,
    made: usize,
}

impl Maker {
    fn start(folder: &Path, more: Vec<String>) -> Self {
        fs::create_dir_all(folder).expect("a folder");
        let keyward = Keyward::start(folder, &Settings { cores: BOTH_CORES, workers: 2, more, ..Settings::default() });
        Self { keyward, root: root_token(folder), made: 0 }
    }

    /// Tokens per second.
    async fn round(&mut self) -> f64 {
        let mut wires = Vec::new();
        for _ in 0..CLIENTS {
            wires.push(Wire::connect(self.keyward.server.port, wire::CREATE, &self.root).await);
        }
        let (mut tasks, begin) = (JoinSet::new(), Instant::now());
        for (part, mut wire) in wires.into_iter().enumerate() {
            let first = self.made + CALLS / CLIENTS * part;
            tasks.spawn(async move {
                let messages = (first..first + CALLS / CLIENTS).map(|number| wire::framed(&wish(number)));
                let check = |answered: &mut crate::client::Answered, received: &[u8]| {
                    wire::unframed(received).expect("a token, not an error");
                    answered.count += 1;
                };
                calls_in_turn(&mut wire, 1, messages, check).await.count
            });
        }
        let created: u64 = tasks.join_all().await.iter().sum();
        assert_eq!(created, CALLS as u64, "tokens that were created");
        self.made += CALLS;
        CALLS as f64 / begin.elapsed().as_secs_f64()
    }
}

fn wish(number: usize) -> Vec<u8> {
    let request = proto::CreateTokenRequest {
        display_name: format!("bench {number}"),
        principal: format!("service-{}", number / TOKENS_OF_ONE),
        scopes: vec!["agents:list".to_owned(), "storage:upload".to_owned()],
        audiences: vec!["billing".to_owned()],
        ..Default::default()
    };
    request.encode_to_vec()
}

/// Transactions per second of pgbench with this script.
fn pgbench(postgres: &Postgres, script: &Path) -> f64 {
    let mut command = Command::new("pgbench");
    command.args(["-n", "-M", "prepared", "-h", "127.0.0.1", "-U", "postgres", "-p", &postgres.port.to_string()]);
    command.args(["-c", &CLIENTS.to_string(), "-j", "2", "-t", &(CALLS / CLIENTS).to_string(), "-f"]).arg(script).arg("plain");
    let output = command.output().expect("pgbench");
    let said = String::from_utf8_lossy(&output.stdout);
    let rate = said.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.unwrap_or_else(|| panic!("{said} {}", String::from_utf8_lossy(&output.stderr)))
}

/// Measures, and prints the table.
pub fn compare(options: &Options, folder: &Path, runtime: &tokio::runtime::Runtime) {
    need("pgbench", "postgresql-contrib");
    let postgres = Postgres::start();
    runtime.block_on(async {
        postgres.execute("postgres", "CREATE DATABASE keyward").await;
        postgres.execute("postgres", "CREATE DATABASE plain").await;
    });
    let mut sqlite = Maker::start(&folder.join("create-sqlite"), Vec::new());
    let url = vec!["--database-url".to_owned(), postgres.url("keyward")];
    let mut keyward = Maker::start(&folder.join("create-postgres"), url);
    runtime.block_on(async { (sqlite.round().await, keyward.round().await) });
    // As autovacuum does within the first minute: until then plans are those of an empty database.
    runtime.block_on(postgres.execute("keyward", "ANALYZE"));
    let script = folder.join("plain.sql");
    let (token, audit) = runtime.block_on(async {
        postgres.execute("plain", "CREATE TABLE token (id BIGSERIAL PRIMARY KEY, body TEXT)").await;
        postgres.execute("plain", "CREATE TABLE audit (id BIGSERIAL PRIMARY KEY, body TEXT)").await;
        (postgres.row_size("token").await, postgres.row_size("audit_event").await)
    });
    let insert = |table, size: i64| format!("INSERT INTO {table} (body) VALUES (repeat('x', {}));\n", size - ROW_OVERHEAD);
    fs::write(&script, format!("BEGIN;\n{}{}COMMIT;\n", insert("token", token), insert("audit", audit))).expect("writable");
    pgbench(&postgres, &script);
    let mut rates: [Vec<f64>; 3] = Default::default();
    for _ in 0..options.rounds {
        rates[0].push(pgbench(&postgres, &script));
        rates[1].push(runtime.block_on(keyward.round()));
        rates[2].push(runtime.block_on(sqlite.round()));
    }
    println!("## `CreateToken`: {} rounds of {CALLS} calls, {CLIENTS} clients; rows of {token} and {audit} bytes\n", options.rounds);
    let names = ["pgbench, two plain inserts in a transaction", "Keyward on the same PostgreSQL", "Keyward on SQLite"];
    let cells = names.iter().zip(&rates).map(|(name, rate)| {
        let ratio = Spread::of_ratios(rate, &rates[0]);
        vec![(*name).to_owned(), Spread::of(rate.iter().copied()).show(0), ratio.show(2)]
    });
    print_table(&["made by", "per second (median, min–max)", "ratio to pgbench"], &cells.collect::<Vec<_>>());
}
