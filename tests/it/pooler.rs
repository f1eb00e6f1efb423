//! PgBouncer in transaction mode, between servers and their PostgreSQL: each transaction gets another connection.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::world::{am_root, free_port, run_as_root};

/// As `deploy/RUNNING.md` says.
const SETTINGS: &str = "\
[databases]
* = host=127.0.0.1 port=TARGET user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = PORT
auth_type = any
pool_mode = transaction
max_prepared_statements = 200
ignore_startup_parameters = extra_float_digits,options
max_client_conn = 500
default_pool_size = 30
";

/// The pooler, which ends with this process.
pub struct Pooler {
    pub port: u16,
    /// Holds the pipe whose end tells it to stop.
    _watchdog: Child,
}

impl Pooler {
    /// Starts this program, version 1.21 or later, in front of a PostgreSQL on this machine.
    pub fn start(program: &Path, target: u16) -> Self {
        let folder = tempfile::Builder::new().prefix("keyward-pooler-").tempdir().expect("a folder").keep();
        let port = free_port();
        let settings = SETTINGS.replace("TARGET", &target.to_string()).replace("PORT", &port.to_string());
        fs::write(folder.join("pgbouncer.ini"), settings).expect("written");
        fs::copy(program, folder.join("pgbouncer")).expect("a program");
        let mut command = Command::new("sh");
        if am_root() {
            // It refuses to run as root.
            run_as_root(&["chown", "-R", "postgres", &folder.display().to_string()]);
            command = Command::new("runuser");
            command.args(["-u", "postgres", "--", "sh"]);
        }
        let script = "cd \"$1\"; ./pgbouncer pgbouncer.ini >log 2>&1 & pid=$!; cat >/dev/null; kill -TERM $pid; wait $pid; rm -rf \"$1\"";
        command.args(["-c", script, "sh", &folder.display().to_string()]);
        let watchdog = command.stdin(Stdio::piped()).spawn().expect("a shell");
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "PgBouncer did not start: see {}", folder.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, _watchdog: watchdog }
    }
}
