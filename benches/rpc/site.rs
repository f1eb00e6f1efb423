//! A data folder with tokens in it: made once, copied for every server that is measured.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use keyward::{
    ambient::Clock,
    proto::envoy::{Address, AttributeContext, CheckRequest, SocketAddress, address, attribute_context},
    token::{Keyring, Prefix, TokenId},
};
use prost::Message as _;
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, QueryResult, Statement, TransactionTrait as _};

use crate::{
    client,
    process::{Keyward, Settings, pinned},
    wire,
};

/// Whom the tokens stand for, in turns.
const PRINCIPALS: usize = 1_000;
/// Rows of one statement.
const ROWS: usize = 500;
const LIFE: Duration = Duration::from_hours(24 * 90);

/// What the first start has made, and the tokens that the command line has made then.
pub struct Site {
    pub folder: PathBuf,
    pub root: String,
    /// May validate.
    pub caller: String,
    /// Is asked about.
    pub asked: String,
}

impl Site {
    pub fn new(folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).expect("a folder");
        let keyward = Keyward::start(&folder, &Settings::default());
        let root = root_token(&folder);
        let create = |arguments: &[&str]| {
            let mut command = pinned("0,1", env!("CARGO_BIN_EXE_keyward"));
            command.args(["token", "create", "--name", "bench"]).args(arguments).env("KEYWARD_TOKEN", &root);
            let output = command.env("KEYWARD_ADDRESS", format!("127.0.0.1:{}", keyward.server.port)).output().expect("it runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).expect("text").trim().to_owned()
        };
        let caller = create(&["--scope", "keyward:validate"]);
        let asked = create(&["--scope", "agents:list,storage:upload", "--audience", "billing"]);
        keyward.server.stop();
        Self { folder, root, caller, asked }
    }

    /// The same data once more, for a server beside the others.
    pub fn copy(&self, name: &str) -> PathBuf {
        let folder = self.folder.with_file_name(name);
        fs::create_dir_all(&folder).expect("a folder");
        let copied = Command::new("cp").arg("-a").arg(self.folder.join("data")).arg(&folder).status();
        assert!(copied.expect("cp").success(), "the data could not be copied");
        folder
    }

    /// A file with the question about this token, as h2load sends it.
    pub fn body(&self, name: &str, token: &str) -> PathBuf {
        self.file(name, &wire::framed(&client::question(token)))
    }

    /// A file with what an Envoy asks about a request with this token, whose headers are those of a usual client.
    pub fn check_body(&self, name: &str, token: &str) -> PathBuf {
        let bearer = format!("Bearer {token}");
        let headers = [
            (":authority", "orders.example.com"),
            (":method", "GET"),
            (":path", "/api/orders/7?full=1"),
            (":scheme", "https"),
            ("accept", "application/json"),
            ("accept-encoding", "gzip, deflate, br"),
            ("authorization", &bearer),
            ("content-type", "application/json"),
            ("user-agent", "orders-client/2.1 (linux; x86_64)"),
            ("x-envoy-external-address", "192.0.2.7"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-proto", "https"),
            ("x-request-id", "6f1c1f0e-2b57-4d8b-9b64-1b8f0c9f2a11"),
        ];
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let http = attribute_context::HttpRequest {
            method: "GET".to_owned(),
            path: "/api/orders/7?full=1".to_owned(),
            headers: headers.map(owned).into(),
            header_map: None,
        };
        let socket = SocketAddress { address: "192.0.2.7".to_owned() };
        let attributes = AttributeContext {
            source: Some(attribute_context::Peer { address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }) }),
            request: Some(attribute_context::Request { http: Some(http) }),
            context_extensions: [("audience", "billing"), ("required_scopes", "agents:list")].map(owned).into(),
        };
        self.file(name, &wire::framed(&CheckRequest { attributes: Some(attributes) }.encode_to_vec()))
    }

    /// A file with tokens, one a line.
    pub fn tokens(&self, name: &str, tokens: &[String]) -> PathBuf {
        self.file(name, tokens.join("\n").as_bytes())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.join(name);
        fs::write(&path, bytes).expect("writable");
        path
    }
}

/// What has the shape and the check of a token, and a proof that was made with another key.
pub fn invented() -> String {
    let keyring = Keyring::generate().expect("randomness");
    keyring.issue(&prefix()).expect("randomness").secret.reveal().to_owned()
}

fn prefix() -> Prefix {
    "kw".parse().expect("a prefix")
}

/// The root token that the first start has written.
pub fn root_token(folder: &Path) -> String {
    let begin = Instant::now();
    loop {
        match fs::read_to_string(folder.join("root")) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(begin.elapsed() < Duration::from_secs(10), "no root token"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The database of a folder, past the server, which must not run.
pub async fn database(folder: &Path) -> DatabaseConnection {
    let mut options = ConnectOptions::new(format!("sqlite://{}/data/keyward.db", folder.display()));
    options.max_connections(1).sqlx_logging(false);
    Database::connect(options).await.expect("the database")
}

pub async fn rows(db: &impl sea_orm::ConnectionTrait, sql: &str) -> Vec<QueryResult> {
    db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect("rows")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

/// A token that was put in.
pub struct Stored {
    pub id: String,
    pub secret: String,
}

/// Puts so many tokens into a folder whose server does not run: two scopes and an audience each, made with its keyring.
pub async fn fill(folder: &Path, count: usize) -> Vec<Stored> {
    let keyring = Keyring::load(&folder.join("data/keyring")).expect("a good keyring").expect("a keyring");
    let db = database(folder).await;
    db.execute_unprepared("PRAGMA synchronous = OFF; PRAGMA cache_size = -500000").await.expect("settings");
    let now = Clock::system().now();
    let tx = db.begin().await.expect("a transaction");
    // It is faster to make the indexes afterwards.
    let indexes =
        rows(&tx, "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name LIKE 'token%'").await;
    let column = |row: &QueryResult, index| row.try_get_by_index::<String>(index).expect("text");
    for row in &indexes {
        tx.execute_unprepared(&format!("DROP INDEX {}", column(row, 0))).await.expect("an index");
    }
    let principals: Vec<_> = (0..PRINCIPALS).map(|n| format!("('default', 'service-{n}', 1, '', false, 0, 0, 1)")).collect();
    let columns = "(workspace, id, kind, display_name, suspended, create_time, update_time, version)";
    tx.execute_unprepared(&format!("INSERT INTO principal {columns} VALUES {}", principals.join(","))).await.expect("principals");
    let mut stored = Vec::with_capacity(count);
    while stored.len() < count {
        let first = stored.len();
        let mut values = Vec::new();
        for number in first..count.min(first + ROWS) {
            let issued = keyring.issue(&prefix()).expect("randomness");
            let id = TokenId::new(now).expect("randomness").to_string();
            let digest = hexadecimal(issued.digest.as_bytes());
            let (now, end, principal) = (now.micros(), (now + LIFE).micros(), number % PRINCIPALS);
            values.push(format!(
                "('{id}', 'default', x'{digest}', 'bench {number}', 'service-{principal}', 1, 1, '{}', 'agents:list storage:upload', \
                 'billing', '', '{{}}', '', 'root', {now}, {now}, {end}, '', 1, 'kw')",
                issued.secret.hint()
            ));
            stored.push(Stored { id, secret: issued.secret.reveal().to_owned() });
        }
        let columns = "(id, workspace, digest, display_name, principal, kind, state, hint, scopes, audiences, allowed_cidrs, metadata, \
                       session_id, created_by, create_time, update_time, expire_time, revoke_reason, version, prefix)";
        tx.execute_unprepared(&format!("INSERT INTO token {columns} VALUES {}", values.join(","))).await.expect("tokens");
    }
    let audiences = "INSERT INTO token_audience SELECT workspace, audiences, id FROM token WHERE principal LIKE 'service-%'";
    tx.execute_unprepared(audiences).await.expect("audiences");
    for row in &indexes {
        tx.execute_unprepared(&column(row, 1)).await.expect("an index");
    }
    tx.commit().await.expect("committed");
    // The first stop has left statistics of empty tables, by which the database would look through all of these.
    db.execute_unprepared("ANALYZE").await.expect("statistics");
    db.close().await.expect("closed");
    stored
}
