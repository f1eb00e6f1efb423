//! A world for a test: the production server on a free port, a store of its own, a clock that is turned by hand, and actors.
//!
//! What bypasses the gRPC interface is named `db_…`.

use std::{
    collections::BTreeMap,
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU16, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::{
    ambient::{Clock, Time},
    api::gate::Limits,
    config::{Config, Sources},
    proto::{
        self, audit_service_client::AuditServiceClient, notice_service_client::NoticeServiceClient,
        principal_service_client::PrincipalServiceClient, self_service_client::SelfServiceClient, token_service_client::TokenServiceClient,
        validation_service_client::ValidationServiceClient, workspace_service_client::WorkspaceServiceClient,
    },
    server::Server,
    token::Secret,
};
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, Statement};
use tempfile::TempDir;
use tonic::{Request, Status, transport::Channel};

/// 2027-01-15T08:00:00Z, where the clock of every world begins.
pub const BEGINNING: Time = Time::from_micros(1_800_000_000_000_000);

/// Which database a world stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    Sqlite,
    Postgres,
}

/// Says that a test cannot run here. Where everything must run, that is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("KEYWARD_TEST_REQUIRE_ALL").is_none(), "must not be skipped: {why}");
    // Past the test harness's capture, so that it is seen.
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// Runs a test in a world of its own.
pub fn run(backend: Backend, test: impl AsyncFnOnce(World)) {
    if backend == Backend::Postgres && postgres().is_none() {
        return skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    }
    runtime().block_on(async { test(World::start(backend).await).await });
}

/// A runtime like the production server's.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Registers each test on both databases.
#[macro_export]
macro_rules! on_both_databases {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[test] fn $name() { $crate::world::run($crate::world::Backend::Sqlite, super::$name) })*
        }
        mod postgres {
            $(#[test] fn $name() { $crate::world::run($crate::world::Backend::Postgres, super::$name) })*
        }
    };
}

/// Registers each test on the embedded database: what it shows does not depend on the database.
#[macro_export]
macro_rules! on_sqlite {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[test] fn $name() { $crate::world::run($crate::world::Backend::Sqlite, super::$name) })*
        }
    };
}

/// Waits until something holds, or fails.
pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{what} did not happen within 30 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Connects to a database, without what the server's own pools go without as well.
pub async fn connect(url: String, connections: u32) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url);
    options.max_connections(connections).idle_timeout(None).max_lifetime(None).sqlx_logging(false);
    Database::connect(options).await.expect("the database")
}

/// A server and all that belongs to it.
pub struct World {
    pub backend: Backend,
    pub clock: Clock,
    pub folder: TempDir,
    pub settings: BTreeMap<&'static str, String>,
    pub limits: Limits,
    server: Option<Server>,
    root_token: String,
    channel: Option<Channel>,
}

impl World {
    pub async fn start(backend: Backend) -> Self {
        Self::start_in(backend, tempfile::tempdir().expect("a folder")).await
    }

    /// In a folder of the test's own.
    pub async fn start_in(backend: Backend, folder: TempDir) -> Self {
        let mut world = Self::unstarted_in(backend, folder).await;
        world.start_server().await;
        world
    }

    /// For clients that have their own idea of time.
    pub async fn start_by_the_real_clock(backend: Backend) -> Self {
        let mut world = Self::unstarted(backend).await;
        world.clock = Clock::system();
        world.start_server().await;
        world
    }

    /// With a database that nobody has used yet.
    pub async fn unstarted(backend: Backend) -> Self {
        Self::unstarted_in(backend, tempfile::tempdir().expect("a folder")).await
    }

    async fn unstarted_in(backend: Backend, folder: TempDir) -> Self {
        let mut settings = BTreeMap::from([
            ("listen", "127.0.0.1:0".to_owned()),
            ("http_listen", "127.0.0.1:0".to_owned()),
            ("metrics_listen", "127.0.0.1:0".to_owned()),
            ("data_dir", folder.path().join("data").display().to_string()),
        ]);
        if backend == Backend::Postgres {
            settings.insert("database_url", new_postgres_database().await);
        }
        Self {
            backend,
            clock: Clock::by_hand(BEGINNING),
            folder,
            settings,
            limits: Limits::default(),
            server: None,
            root_token: String::new(),
            channel: None,
        }
    }

    /// One more server on the same database, with the same keyring, and settings of its own.
    pub async fn beside(&self, settings: &[(&'static str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut own = self.settings.clone();
        own.insert("data_dir", folder.path().join("data").display().to_string());
        own.insert("keyring_file", self.folder.path().join("data/keyring").display().to_string());
        own.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let mut world = Self {
            backend: self.backend,
            clock: self.clock.clone(),
            folder,
            settings: own,
            limits: self.limits,
            server: None,
            root_token: self.root_token.clone(),
            channel: None,
        };
        world.start_server().await;
        world
    }

    pub fn config(&self) -> Config {
        Config::load(&Sources { flags: self.settings.clone(), ..Sources::default() }).expect("good settings")
    }

    pub async fn start_server(&mut self) {
        self.try_start_server().await.expect("a server");
    }

    pub async fn try_start_server(&mut self) -> Result<(), String> {
        let (config, clock) = (self.config(), self.clock.clone());
        let root_token = &mut self.root_token;
        let show = |secret: &Secret, _| {
            secret.reveal().clone_into(root_token);
            Ok(())
        };
        self.server = Some(Server::start(&config, clock, self.limits, show).await?);
        Ok(())
    }

    pub async fn stop_server(&mut self) {
        self.server.take().expect("running").stop().await.expect("a clean stop");
    }

    pub async fn restart(&mut self) {
        self.stop_server().await;
        self.start_server().await;
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("running")
    }

    pub fn take_server(&mut self) -> Server {
        self.server.take().expect("running")
    }

    pub fn advance(&self, span: Duration) {
        self.clock.advance(span);
    }

    /// Actors use this connection from now on, rather than one each.
    pub fn through(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    pub async fn channel(&self) -> Channel {
        if let Some(channel) = &self.channel {
            return channel.clone();
        }
        let address = format!("http://{}", self.server().address());
        Channel::from_shared(address).expect("an address").connect().await.expect("a connection")
    }

    /// Whoever holds this token.
    pub async fn bearer(&self, token: &str) -> Actor {
        Actor { channel: self.channel().await, token: Some(token.to_owned()) }
    }

    /// Somebody without credentials.
    pub async fn stranger(&self) -> Actor {
        Actor { channel: self.channel().await, token: None }
    }

    /// May do everything.
    pub async fn root(&self) -> Actor {
        self.bearer(&self.root_token).await
    }

    pub fn root_token(&self) -> &str {
        &self.root_token
    }

    /// A principal of workspace `default` with these scopes.
    pub async fn actor(&self, principal: &str, scopes: &[&str]) -> Actor {
        self.actor_in("default", principal, scopes).await
    }

    pub async fn actor_in(&self, workspace: &str, principal: &str, scopes: &[&str]) -> Actor {
        let request = proto::CreateTokenRequest {
            workspace: workspace.to_owned(),
            principal: principal.to_owned(),
            ..new_token(&format!("token of {principal}"), scopes)
        };
        let created = self.root().await.create(request).await.expect("created");
        self.bearer(&created.secret).await
    }

    /// May do everything in workspace `default`.
    pub async fn admin(&self) -> Actor {
        self.actor("admin", &["keyward:admin"]).await
    }

    /// May judge tokens of workspace `default`.
    pub async fn validator(&self) -> Actor {
        self.actor("gateway", &["keyward:validate"]).await
    }

    /// May manage their own tokens.
    pub async fn member(&self, principal: &str) -> Actor {
        self.actor(principal, &["keyward:self"]).await
    }

    /// The page that Prometheus reads.
    pub async fn metrics(&self) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let address = self.server().metrics_address().expect("metrics are on");
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: keyward\r\n\r\n").await.expect("sent");
        let mut page = String::new();
        stream.read_to_string(&mut page).await.expect("a page");
        page
    }

    /// One number of that page.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.metrics().await;
        let line =
            page.lines().find(|line| line.starts_with(name) && line.as_bytes().get(name.len()).is_some_and(|byte| b" {".contains(byte)));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    /// How often a verb of the store was called.
    pub async fn queries(&self, verb: &str) -> f64 {
        let name = format!("keyward_store_seconds_count{{verb=\"{verb}\"}}");
        let page = self.metrics().await;
        page.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse().ok()).unwrap_or(0.0)
    }

    /// A connection to the database, past the server.
    pub async fn db(&self) -> DatabaseConnection {
        let url = match self.backend {
            Backend::Sqlite => format!("sqlite://{}/data/keyward.db", self.folder.path().display()),
            Backend::Postgres => self.settings["database_url"].clone(),
        };
        connect(url, 10).await
    }

    /// Runs statements, past the server.
    pub async fn db_execute(&self, sql: &str) {
        self.db().await.execute_unprepared(sql).await.expect(sql);
    }

    /// One number, past the server.
    pub async fn db_number(&self, sql: &str) -> i64 {
        let db = self.db().await;
        let row = db.query_one_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect(sql);
        row.expect("a row").try_get_by_index(0).expect("a number")
    }

    /// What the store keeps of a token's secret, past the server.
    pub async fn db_digest(&self, id: &str) -> Vec<u8> {
        let db = self.db().await;
        let sql = format!("SELECT digest FROM token WHERE id = '{id}'");
        let row = db.query_one_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect("a database");
        row.expect("a row").try_get_by_index(0).expect("bytes")
    }

    /// Adds a workspace with a policy that allows everything.
    pub async fn add_workspace(&self, id: &str, prefix: &str) -> proto::Workspace {
        let workspace = proto::Workspace {
            id: id.to_owned(),
            display_name: id.to_owned(),
            prefix: prefix.to_owned(),
            policy: Some(lax_policy()),
            ..Default::default()
        };
        let root = self.root().await;
        let message = proto::CreateWorkspaceRequest { workspace: Some(workspace) };
        let response = root.workspaces().create_workspace(root.request(message)).await.expect("created").into_inner();
        response.workspace.expect("a workspace")
    }

    /// Makes the policy of workspace `default` one that allows everything: more tokens than a principal usually has, and for ever.
    pub async fn relax(&self) {
        let root = self.root().await;
        let workspace = proto::Workspace { id: "default".to_owned(), policy: Some(lax_policy()), ..Default::default() };
        root.update_workspace(workspace, &["policy"]).await.expect("changed");
    }
}

/// A policy that allows everything that can be allowed.
pub fn lax_policy() -> proto::Policy {
    proto::Policy {
        max_permanent_ttl: Some(prost_types::Duration { seconds: 100 * 365 * 86_400, nanos: 0 }),
        allow_never: true,
        max_tokens_per_principal: 100_000,
        ..Default::default()
    }
}

/// A request for a token with this name.
pub fn new_token(name: &str, scopes: &[&str]) -> proto::CreateTokenRequest {
    proto::CreateTokenRequest {
        display_name: name.to_owned(),
        scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
        ..Default::default()
    }
}

/// Somebody who calls Keyward.
#[derive(Clone)]
pub struct Actor {
    pub channel: Channel,
    pub token: Option<String>,
}

impl Actor {
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header value"));
        }
        request
    }

    pub fn tokens(&self) -> TokenServiceClient<Channel> {
        TokenServiceClient::new(self.channel.clone())
    }

    pub fn workspaces(&self) -> WorkspaceServiceClient<Channel> {
        WorkspaceServiceClient::new(self.channel.clone())
    }

    pub fn principals(&self) -> PrincipalServiceClient<Channel> {
        PrincipalServiceClient::new(self.channel.clone())
    }

    pub fn notices(&self) -> NoticeServiceClient<Channel> {
        NoticeServiceClient::new(self.channel.clone())
    }

    pub fn audit(&self) -> AuditServiceClient<Channel> {
        AuditServiceClient::new(self.channel.clone())
    }

    pub async fn update_workspace(&self, workspace: proto::Workspace, paths: &[&str]) -> Result<proto::Workspace, Status> {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let message = proto::UpdateWorkspaceRequest { workspace: Some(workspace), update_mask: Some(prost_types::FieldMask { paths }) };
        let response = self.workspaces().update_workspace(self.request(message)).await?;
        Ok(response.into_inner().workspace.expect("a workspace"))
    }

    pub fn own(&self) -> SelfServiceClient<Channel> {
        SelfServiceClient::new(self.channel.clone())
    }

    pub fn validation(&self) -> ValidationServiceClient<Channel> {
        ValidationServiceClient::new(self.channel.clone()).max_decoding_message_size(16 << 20)
    }

    pub async fn create(&self, message: proto::CreateTokenRequest) -> Result<proto::CreateTokenResponse, Status> {
        self.tokens().create_token(self.request(message)).await.map(tonic::Response::into_inner)
    }

    /// A token with this name, and its secret.
    pub async fn issue(&self, name: &str, scopes: &[&str]) -> (proto::Token, String) {
        let created = self.create(new_token(name, scopes)).await.expect("created");
        (created.token.expect("a token"), created.secret)
    }

    pub async fn get(&self, id: &str) -> Result<proto::Token, Status> {
        let response = self.tokens().get_token(self.request(proto::GetTokenRequest { id: id.to_owned() })).await?;
        Ok(response.into_inner().token.expect("a token"))
    }

    pub async fn list(&self, message: proto::ListTokensRequest) -> Result<proto::ListTokensResponse, Status> {
        self.tokens().list_tokens(self.request(message)).await.map(tonic::Response::into_inner)
    }

    pub async fn update(&self, token: proto::Token, paths: &[&str]) -> Result<proto::Token, Status> {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let message = proto::UpdateTokenRequest { token: Some(token), update_mask: Some(prost_types::FieldMask { paths }) };
        let response = self.tokens().update_token(self.request(message)).await?;
        Ok(response.into_inner().token.expect("a token"))
    }

    pub async fn activate(&self, id: &str) -> Result<proto::Token, Status> {
        let message = proto::ActivateTokenRequest { id: id.to_owned(), etag: String::new() };
        Ok(self.tokens().activate_token(self.request(message)).await?.into_inner().token.expect("a token"))
    }

    pub async fn deactivate(&self, id: &str) -> Result<proto::Token, Status> {
        let message = proto::DeactivateTokenRequest { id: id.to_owned(), etag: String::new() };
        Ok(self.tokens().deactivate_token(self.request(message)).await?.into_inner().token.expect("a token"))
    }

    pub async fn revoke(&self, id: &str) -> Result<proto::Token, Status> {
        let message = proto::RevokeTokenRequest { id: id.to_owned(), reason: "test".to_owned(), etag: String::new() };
        Ok(self.tokens().revoke_token(self.request(message)).await?.into_inner().token.expect("a token"))
    }

    pub async fn regenerate(&self, id: &str, grace_seconds: i64) -> Result<proto::RegenerateTokenResponse, Status> {
        let grace = Some(prost_types::Duration { seconds: grace_seconds, nanos: 0 });
        let message = proto::RegenerateTokenRequest { id: id.to_owned(), grace, ..Default::default() };
        self.tokens().regenerate_token(self.request(message)).await.map(tonic::Response::into_inner)
    }

    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let message = proto::DeleteTokenRequest { id: id.to_owned(), etag: String::new() };
        self.tokens().delete_token(self.request(message)).await.map(drop)
    }

    pub async fn revoke_principal(&self, principal: &str) -> Result<i32, Status> {
        let message = proto::RevokePrincipalTokensRequest { principal: principal.to_owned(), ..Default::default() };
        Ok(self.tokens().revoke_principal_tokens(self.request(message)).await?.into_inner().revoked_count)
    }

    pub async fn ask(&self, message: proto::ValidateTokenRequest) -> Result<proto::ValidateTokenResponse, Status> {
        self.validation().validate_token(self.request(message)).await.map(tonic::Response::into_inner)
    }

    /// The verdict on a token, without counting a use.
    pub async fn verdict(&self, token: &str) -> proto::Verdict {
        let answer = self.ask(proto::ValidateTokenRequest { token: token.to_owned(), peek: true, ..Default::default() }).await;
        answer.expect("an answer").verdict()
    }

    /// The verdict on a token, counting a use.
    pub async fn use_token(&self, token: &str) -> proto::Verdict {
        let answer = self.ask(proto::ValidateTokenRequest { token: token.to_owned(), ..Default::default() }).await;
        answer.expect("an answer").verdict()
    }
}

/// A PostgreSQL that this process started from the machine's own binaries, and that ends with it.
pub struct Postgres {
    pub port: u16,
    pub folder: PathBuf,
    /// Holds the pipe whose end tells the server to stop.
    _watchdog: Child,
}

static DATABASES: AtomicU32 = AtomicU32::new(0);

/// The process's PostgreSQL, if the machine has one.
pub fn postgres() -> Option<&'static Postgres> {
    static POSTGRES: OnceLock<Option<Postgres>> = OnceLock::new();
    POSTGRES.get_or_init(|| Postgres::start(&["-c", "fsync=off"])).as_ref()
}

/// A new, empty database.
pub async fn new_postgres_database() -> String {
    postgres().expect("PostgreSQL").new_database().await
}

impl Postgres {
    /// Starts a server of its own.
    pub fn start(options: &[&str]) -> Option<Self> {
        let bin = postgres_binaries()?;
        let folder = tempfile::Builder::new().prefix("keyward-postgres-").tempdir().expect("a folder").keep();
        let port = free_port();
        // PostgreSQL refuses to run as root: Debian's package brings a user for it.
        let mut command = if am_root() {
            run_as_root(&["chown", "postgres", &folder.display().to_string()]);
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--", "sh"]);
            command
        } else {
            Command::new("sh")
        };
        // The end of standard input is the end of this process, however it ends.
        let script = "set -e; bin=$1 dir=$2 port=$3; shift 3; cd \"$dir\"; \
            \"$bin/initdb\" -D data -U postgres -A trust -E UTF8 --no-sync >initdb.log 2>&1; \
            \"$bin/postgres\" -D data -p \"$port\" -k \"$dir\" -c listen_addresses=127.0.0.1 -c max_connections=400 \
            -c shared_buffers=256MB -c max_wal_size=4GB \"$@\" >postgres.log 2>&1 & pid=$!; \
            cat >/dev/null || true; kill -INT $pid; wait $pid || true; rm -rf \"$dir\"";
        command.args(["-c", script, "sh", &bin.display().to_string(), &folder.display().to_string(), &port.to_string()]).args(options);
        let watchdog = command.stdin(Stdio::piped()).spawn().expect("a shell");
        let started = Self { port, folder, _watchdog: watchdog };
        let begin = Instant::now();
        while !started.answers(&bin) {
            assert!(begin.elapsed() < Duration::from_mins(1), "PostgreSQL did not start: see {}", started.folder.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(started)
    }

    fn answers(&self, bin: &Path) -> bool {
        let ready = Command::new(bin.join("pg_isready")).args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]).status();
        ready.is_ok_and(|status| status.success())
    }

    /// The URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// A new, empty database.
    pub async fn new_database(&self) -> String {
        let name = format!("world_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let admin = connect(self.url("postgres"), 1).await;
        admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await.expect("a database");
        self.url(&name)
    }
}

fn postgres_binaries() -> Option<PathBuf> {
    let debian = std::fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = debian.collect();
    folders.sort();
    folders.reverse();
    folders.extend(std::env::split_paths(&path));
    folders.into_iter().find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
}

pub fn am_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

pub fn run_as_root(command: &[&str]) {
    let status = Command::new(command[0]).args(&command[1..]).status().expect("a command");
    assert!(status.success(), "{command:?}");
}

/// A port that nobody listens on, and that nobody is given until this process ends: it is below those that the system gives to connections and to whoever asks for any.
pub fn free_port() -> u16 {
    const PORTS: Range<u16> = 12_000..32_000;
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    // Whoever runs beside this process begins elsewhere.
    let begin = u16::try_from(std::process::id() * 100 % u32::from(PORTS.end - PORTS.start)).expect("within the range");
    loop {
        let step = TAKEN.fetch_add(1, Ordering::Relaxed);
        assert!(step < PORTS.end - PORTS.start, "no port is free");
        let port = PORTS.start + (begin + step) % (PORTS.end - PORTS.start);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Where `tests/run` puts the test clients; nothing if it did not run.
pub fn tools() -> Option<PathBuf> {
    let named = std::env::var_os("KEYWARD_TEST_TOOLS").map(PathBuf::from);
    named.or_else(|| Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.tools"))).filter(|path| path.exists())
}

/// The program itself.
pub fn keyward() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KEYWARD_") {
            command.env_remove(name);
        }
    }
    command
}
