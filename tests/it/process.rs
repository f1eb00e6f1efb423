//! The program itself as a process of its own, with a database: started, asked through gRPC, killed.

use std::{
    fs::{self, File},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use sea_orm::{ConnectionTrait as _, DatabaseConnection, QueryResult, Statement};
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::world::{self, Actor, Backend, keyward};

/// The place of a database and of the processes that serve it, one after the other.
pub struct Site {
    pub backend: Backend,
    pub folder: TempDir,
    pub database_url: String,
    /// Settings besides those that every process gets.
    pub arguments: Vec<String>,
}

impl Site {
    pub async fn new(backend: Backend) -> Self {
        match backend {
            Backend::Sqlite => Self::at(backend, String::new()),
            Backend::Postgres => Self::at(backend, world::new_postgres_database().await),
        }
    }

    /// On this database; on SQLite always one of its own.
    pub fn at(backend: Backend, database_url: String) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = format!("sqlite://{}/data/keyward.db", folder.path().display());
        Self { backend, database_url: if backend == Backend::Sqlite { file } else { database_url }, folder, arguments: Vec::new() }
    }

    /// One connection, past the server.
    pub async fn db(&self) -> DatabaseConnection {
        world::connect(self.database_url.clone(), 1).await
    }

    /// Starts a process. It logs to a file.
    pub fn spawn(&self) -> Process {
        let mut command = keyward();
        let (data, root, log) = (self.folder.path().join("data"), self.folder.path().join("root"), self.folder.path().join("log"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off", "--metrics-listen", "off"]);
        command.arg("--data-dir").arg(data).arg("--database-url").arg(&self.database_url).arg("--root-token-file").arg(root);
        command.args(&self.arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(log).expect("a log"));
        Process { child: command.spawn().expect("it runs"), address: String::new() }
    }

    /// Starts a process and waits until it serves.
    pub async fn start(&self) -> Process {
        self.try_start().await.unwrap_or_else(|said| panic!("the server does not start: {said}"))
    }

    /// As [`Site::start`]; what the process said, if it gives up.
    pub async fn try_start(&self) -> Result<Process, String> {
        let (mut process, begin) = (self.spawn(), Instant::now());
        loop {
            let ended = process.child.try_wait().expect("a child").is_some();
            let said = fs::read_to_string(self.folder.path().join("log")).expect("a log");
            // The address is whole when something follows it.
            if let Some((address, _)) = said.split_once("serving address=").and_then(|(_, rest)| rest.split_once(' ')) {
                process.address = format!("http://{address}");
                return Ok(process);
            }
            if ended {
                return Err(said);
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "the server does not serve within 30 s: {said}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// May do everything.
    pub async fn root(&self, process: &Process) -> Actor {
        let token = fs::read_to_string(self.folder.path().join("root")).expect("written at the first start");
        Actor { channel: process.channel().await, token: Some(token.trim().to_owned()) }
    }
}

/// A process that serves. It is killed with its owner.
pub struct Process {
    child: Child,
    address: String,
}

impl Process {
    /// A connection of one's own.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).expect("an address").connect().await.expect("a connection")
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL: the process has no say in it.
    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn rows(db: &DatabaseConnection, sql: &str) -> Vec<QueryResult> {
    db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect(sql)
}

pub async fn number(db: &DatabaseConnection, sql: &str) -> i64 {
    rows(db, sql).await.first().expect("a row").try_get_by_index(0).expect("a number")
}

pub async fn text(db: &DatabaseConnection, sql: &str) -> String {
    rows(db, sql).await.first().expect("a row").try_get_by_index(0).expect("text")
}
