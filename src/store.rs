//! Every query as one verb, domain types in and out: embedded SQLite, or PostgreSQL.
//!
//! Reads go through [`Store`]; changes through a [`Tx`], which takes the next change number first, so that the order of numbers is the
//! order of commits, and which carries the audit rows of the change.
//!
//! Invariant: nothing outside this room knows the database; no statement or parameter is ever logged (test `no_secret_is_anywhere`).
//! Invariant: work waits for a connection for a bounded time only, and ends in a bounded time (test `a_database_that_is_gone_is_unavailable`).

mod audit;
mod connection;
mod directory;
mod entity;
mod migrations;
mod notices;
mod purge;
mod replicas;
mod tokens;
mod transaction;
mod usage;

use std::{
    fmt,
    fs::{File, OpenOptions, TryLockError},
    future::Future,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use connection::Line;
use parking_lot::Mutex;
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, RuntimeErr, Statement, TransactionTrait as _,
    sqlx::{
        self,
        sqlite::{SqliteJournalMode, SqliteSynchronous},
    },
};
use sea_orm_migration::{MigratorTrait as _, SchemaManager};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

pub use audit::{AuditEvent, AuditFilter, AuditRecord};
pub use notices::{Claimed, FaultCounts, FaultFilter, FaultRecord, Followed, NoticeRecord, Settled, Step};
pub use purge::Expendable;
pub use replicas::{Change, Log, NewReplica, Renewal, Replica};
pub use tokens::{Cursor, Filter, Order, OrderKey};
pub use transaction::{Claim, Tx};
pub use usage::UseDelta;

use crate::{
    ambient::{Stopwatch, Time},
    error::{Error, Result},
    token::{Keyring, Kid},
};

/// Tokens up to which a database is small.
const SMALL_ROWS_MAX: u32 = 10_000;
/// How long work waits for its turn and then for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one verb may take. PostgreSQL is told to give up a little earlier, so that it does not go on for nobody.
const WORK_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a start tries what fails because the database does not answer.
const START_PATIENCE: Duration = Duration::from_secs(8);
const START_PAUSE: Duration = Duration::from_millis(50);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(6);
/// How long SQLite may look how its tables have grown, when the database is closed.
const STATISTICS_TIMEOUT: Duration = Duration::from_secs(2);
/// Two more than work may take at once: those are for the fence.
const POSTGRES_CONNECTIONS: u32 = 18;
const POSTGRES_WORK: usize = 16;
const SQLITE_READERS: u32 = 6;
/// Of each connection. The tokens of a workspace lie apart when there are many workspaces: a thousand of them, each on a page of its own, find room.
const SQLITE_CACHE_KIB: &str = "-8192";
/// SQLite 3.7.0 to 3.51.2 can corrupt a database when its WAL is reset.
const SQLITE_VERSION_MIN: (u32, u32, u32) = (3, 51, 3);
/// "keyward" in a PostgreSQL advisory lock, for migrations.
const LOCK_MIGRATE: i64 = 0x6b65_7977_6172_6401;

/// Told of every verb: its name, how long it took, and whether it failed.
pub type Observer = Box<dyn Fn(&'static str, Duration, bool) + Send + Sync>;

/// Which database.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// A file; made if missing.
    Sqlite(PathBuf),
    /// `postgres://user:password@host:port/database`.
    Postgres(String),
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
            Self::Postgres(_) => f.write_str("postgres://…"),
        }
    }
}

impl std::str::FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        const RULE: &str = "must be sqlite://path/to/file.db or postgres://user:password@host:port/database";
        match text.split_once("://") {
            Some(("sqlite", path)) if !path.is_empty() && !path.contains('?') => Ok(Self::Sqlite(path.into())),
            Some(("postgres" | "postgresql", _)) => text
                .parse::<sqlx::postgres::PgConnectOptions>()
                .map(|_| Self::Postgres(text.to_owned()))
                // The parser's own message may quote the URL, password and all.
                .map_err(|_| RULE.to_owned()),
            _ => Err(RULE.to_owned()),
        }
    }
}

/// The open database. Reads and changes have connections of their own on SQLite, where there is one writer.
pub struct Store {
    reader: DatabaseConnection,
    writer: DatabaseConnection,
    facts_permits: Semaphore,
    read_permits: Semaphore,
    write_permits: Semaphore,
    /// When the database last did what it was asked.
    success: Mutex<Stopwatch>,
    observer: Observer,
    sharing: Sharing,
}

/// Who else may use the database.
enum Sharing {
    /// Nobody, as long as this lock is held.
    Alone { _lock: File },
    /// Other servers. What they change is asked for on a line of its own.
    Shared { url: DatabaseUrl, line: Line },
}

/// How the schema in the database compares with the one that this program needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schema {
    /// The same, or a newer one that this program can work with.
    Current,
    /// Migrations are missing, perhaps all.
    Old,
    /// It has migrations that this program does not know, and cannot work with.
    Newer,
}

impl Store {
    /// Opens the database and brings its schema up to date if `migrate`: the embedded one alone, PostgreSQL beside other servers.
    ///
    /// # Errors
    /// A sentence for the operator: what is wrong and what to do.
    pub async fn open(url: &DatabaseUrl, migrate: bool, observer: Observer) -> std::result::Result<Self, String> {
        let store = match url {
            DatabaseUrl::Sqlite(path) => Self::open_sqlite(path, observer).await?,
            url @ DatabaseUrl::Postgres(_) => Self::open_postgres(url, observer).await?,
        };
        store.settle_schema(migrate).await?;
        Ok(store)
    }

    async fn open_sqlite(path: &Path, observer: Observer) -> std::result::Result<Self, String> {
        let lock = lock_folder(path)?;
        // SQLite gives the files beside it the mode of the database.
        own_file(path)?;
        let shown = path.display();
        let failed = |error: DbErr| format!("the database {shown} cannot be opened: {}", cause(&error));
        let writer = Database::connect(sqlite_options(path, 1, false)).await.map_err(failed)?;
        let version: String = single(&writer, "SELECT sqlite_version()").await.map_err(failed)?;
        if parse_version(&version) < Some(SQLITE_VERSION_MIN) {
            let (major, minor, fix) = SQLITE_VERSION_MIN;
            return Err(format!("SQLite {version} can damage its database: this program needs {major}.{minor}.{fix} or later; rebuild it"));
        }
        let reader = Database::connect(sqlite_options(path, SQLITE_READERS, true)).await.map_err(failed)?;
        Ok(Self {
            reader,
            writer,
            // Some connections are left for facts, however many lists are asked for.
            facts_permits: Semaphore::new(SQLITE_READERS as usize),
            read_permits: Semaphore::new(SQLITE_READERS as usize / 2),
            write_permits: Semaphore::new(1),
            success: Mutex::new(Stopwatch::start()),
            observer,
            sharing: Sharing::Alone { _lock: lock },
        })
    }

    async fn open_postgres(url: &DatabaseUrl, observer: Observer) -> std::result::Result<Self, String> {
        connection::refuse_standby(url).await?;
        let pool = connection::connect_pool(url, POSTGRES_CONNECTIONS).await.map_err(|error| connection::refused(&error))?;
        Ok(Self {
            reader: pool.clone(),
            writer: pool,
            facts_permits: Semaphore::new(POSTGRES_WORK / 2),
            read_permits: Semaphore::new(POSTGRES_WORK / 4),
            write_permits: Semaphore::new(POSTGRES_WORK / 4),
            success: Mutex::new(Stopwatch::start()),
            observer,
            sharing: Sharing::Shared { url: url.clone(), line: Line::new(url.clone()) },
        })
    }

    async fn settle_schema(&self, migrate: bool) -> std::result::Result<(), String> {
        let failed = |error: Error| {
            format!(
                "the database's schema cannot be read or brought up to date: {}",
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
            )
        };
        match self.patiently(|| async move { self.schema().await.map_err(translate) }).await.map_err(failed)? {
            Schema::Current => Ok(()),
            Schema::Old if migrate => self.migrate().await.map_err(|error| failed(translate(error))),
            Schema::Old => Err("the database's schema is older than this program needs: run `keyward migrate`".to_owned()),
            Schema::Newer => Err("the database was brought up to date by a newer keyward than this one: run that version, or go back \
                                  to the backup from before"
                .to_owned()),
        }
    }

    /// Tries something that a start needs for some time: a database that others keep busy may let a connection wait.
    async fn patiently<T, W: Future<Output = Result<T>>>(&self, work: impl Fn() -> W) -> Result<T> {
        let begin = Stopwatch::start();
        loop {
            match work().await {
                Err(Error::Unavailable(_)) if !self.is_alone() && begin.elapsed() < START_PATIENCE => tokio::time::sleep(START_PAUSE).await,
                outcome => return outcome,
            }
        }
    }

    async fn schema(&self) -> std::result::Result<Schema, DbErr> {
        let known: Vec<String> = migrations::Migrator::migrations().iter().map(|migration| migration.name().to_owned()).collect();
        if !SchemaManager::new(&self.writer).has_table("seaql_migrations").await? {
            return Ok(Schema::Old);
        }
        let statement = Statement::from_string(self.backend(), "SELECT version FROM seaql_migrations");
        let rows = self.writer.query_all_raw(statement).await?;
        let applied = rows.iter().map(|row| row.try_get_by_index(0)).collect::<std::result::Result<Vec<String>, _>>()?;
        if known.iter().any(|version| !applied.contains(version)) {
            return Ok(Schema::Old);
        }
        if applied.len() == known.len() {
            return Ok(Schema::Current);
        }
        // Migrations expand before they contract: the database says which version a program must know at least.
        let floor = Statement::from_string(self.backend(), "SELECT version FROM schema_floor WHERE id = 1");
        let floor: Option<String> = self.writer.query_one_raw(floor).await?.map(|row| row.try_get_by_index(0)).transpose()?;
        Ok(if floor.is_some_and(|floor| known.contains(&floor)) { Schema::Current } else { Schema::Newer })
    }

    /// Migrations take no lock of their own; on SQLite the folder's lock serves.
    async fn migrate(&self) -> std::result::Result<(), DbErr> {
        if self.backend() != DbBackend::Postgres {
            return migrations::Migrator::up(&self.writer, None).await;
        }
        let Sharing::Shared { url, .. } = &self.sharing else { return Ok(()) };
        // Connections of their own: building an index may take longer than a call may.
        let pool = connection::connect_for_migrations(url).await?;
        // The lock ends with its transaction, however that ends.
        let lock = pool.begin().await?;
        lock.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({LOCK_MIGRATE})")).await?;
        let result = migrations::Migrator::up(&pool, None).await;
        let unlocked = lock.commit().await;
        let closed = pool.close().await;
        result.and(unlocked).and(closed)
    }

    /// Whether nobody else uses this database.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        matches!(self.sharing, Sharing::Alone { .. })
    }

    fn backend(&self) -> DbBackend {
        self.writer.get_database_backend()
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// `Unavailable` if not.
    pub async fn ping(&self) -> Result<()> {
        self.reading("ping", async { self.reader.execute_unprepared("SELECT 1").await.map(drop) }).await
    }

    /// Waits for what is under way and closes the database.
    ///
    /// # Errors
    /// `Unavailable` if it does not close cleanly.
    pub async fn close(&self) -> Result<()> {
        self.reader.close_by_ref().await.map_err(translate)?;
        match timeout(STATISTICS_TIMEOUT, self.refresh_statistics()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "SQLite's statistics could not be refreshed: it may be slower than it could"),
            Err(_) => {
                // SQLite goes on with that, and the process ends before it; nothing else is left to be written.
                tracing::info!("SQLite's statistics take too long: they stay as they are");
                return Ok(());
            }
        }
        self.writer.close_by_ref().await.map_err(translate)
    }

    /// Lets SQLite look how its tables have grown, by a few rows of each index. Not while they are small: it would then read the whole of what they grow into, since it has seen that this
    /// costs nothing (<https://sqlite.org/lang_analyze.html>). Without statistics it takes every table for a large one.
    async fn refresh_statistics(&self) -> Result<()> {
        let many = format!("SELECT 1 FROM token LIMIT 1 OFFSET {SMALL_ROWS_MAX}");
        let refresh = async {
            let backend = self.backend();
            let is_large =
                backend == DbBackend::Sqlite && self.writer.query_one_raw(Statement::from_string(backend, many)).await?.is_some();
            let optimize = "PRAGMA analysis_limit = 100; PRAGMA optimize";
            if is_large { self.writer.execute_unprepared(optimize).await.map(drop) } else { Ok(()) }
        };
        self.writing("optimize", refresh).await
    }

    /// Refuses a keyring that is not the one that this store's tokens were made with; notes keys that are new to the store.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub async fn settle_keyring(&self, keyring: &Keyring) -> std::result::Result<(), String> {
        let settled = self.patiently(|| async move {
            // Under the lock of changes: of two servers that start on an empty store one comes first.
            let tx = self.begin_unnumbered().await?;
            tx.execute("UPDATE change_head SET seq = seq WHERE id = 1", vec![]).await?;
            let known = tx.known_keys().await?;
            match keyring_mistake(keyring, &known) {
                Some(mistake) => Ok(Err(mistake)),
                None => tx.add_keys(keyring).await.map(Ok),
            }
        });
        settled.await.map_err(|error: Error| error.to_string())?
    }

    /// Whether this store has ever had a keyring.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn has_keys(&self) -> Result<bool> {
        Ok(!self.patiently(|| self.known_keys()).await?.is_empty())
    }

    async fn known_keys(&self) -> Result<Vec<(Kid, Vec<u8>)>> {
        let statement = Statement::from_string(self.backend(), KNOWN_KEYS);
        let rows = self.reading("keyring", self.reader.query_all_raw(statement)).await?;
        rows.iter().map(known_key).collect()
    }

    /// Runs a read in its turn and in bounded time.
    async fn reading<T>(&self, verb: &'static str, work: impl Future<Output = std::result::Result<T, DbErr>>) -> Result<T> {
        self.bounded(verb, &self.read_permits, work).await
    }

    /// Runs a statement of a change that is a transaction by itself.
    async fn writing<T>(&self, verb: &'static str, work: impl Future<Output = std::result::Result<T, DbErr>>) -> Result<T> {
        self.bounded(verb, &self.write_permits, work).await
    }

    /// Runs a read of facts, which lists do not keep waiting.
    async fn reading_facts<T>(&self, work: impl Future<Output = std::result::Result<T, DbErr>>) -> Result<T> {
        self.bounded("facts", &self.facts_permits, work).await
    }

    async fn bounded<T>(
        &self,
        verb: &'static str,
        permits: &Semaphore,
        work: impl Future<Output = std::result::Result<T, DbErr>>,
    ) -> Result<T> {
        let _permit = self.permit(permits).await?;
        let watch = Stopwatch::start();
        let result = match timeout(WORK_TIMEOUT, work).await {
            Ok(result) => result.map_err(translate),
            Err(elapsed) => Err(Error::Unavailable(elapsed.into())),
        };
        self.observe(verb, watch, result.is_err());
        result
    }

    /// Waits for a turn. That none comes means too much work if the database works, and an outage if it does not.
    async fn permit<'a>(&self, permits: &'a Semaphore) -> Result<SemaphorePermit<'a>> {
        match timeout(ACQUIRE_TIMEOUT, permits.acquire()).await {
            Ok(permit) => permit.map_err(|closed| Error::Unavailable(closed.into())),
            Err(_) if self.success.lock().elapsed() < ACQUIRE_TIMEOUT => Err(Error::Overloaded("the store is busy; try again")),
            Err(elapsed) => Err(Error::Unavailable(elapsed.into())),
        }
    }

    fn observe(&self, verb: &'static str, watch: Stopwatch, failed: bool) {
        if !failed {
            *self.success.lock() = Stopwatch::start();
        }
        (self.observer)(verb, watch.elapsed(), failed);
    }
}

impl Tx<'_> {
    async fn known_keys(&self) -> Result<Vec<(Kid, Vec<u8>)>> {
        let rows = self.bounded(self.inner().query_all_raw(Statement::from_string(self.store().backend(), KNOWN_KEYS))).await?;
        rows.iter().map(known_key).collect()
    }

    async fn add_keys(self, keyring: &Keyring) -> Result<()> {
        for (kid, _, fingerprint) in &keyring.fingerprints() {
            let sql = "INSERT INTO keyring (kid, fingerprint) VALUES ($1, $2) ON CONFLICT (kid) DO NOTHING";
            self.execute(sql, vec![kid.as_char().to_string().into(), fingerprint.as_bytes().to_vec().into()]).await?;
        }
        // Nothing is logged, so that it does not matter when.
        self.commit(Time::from_micros(0)).await
    }
}

const KNOWN_KEYS: &str = "SELECT kid, fingerprint FROM keyring ORDER BY kid";

fn known_key(row: &sea_orm::QueryResult) -> Result<(Kid, Vec<u8>)> {
    let kid: String = row.try_get_by_index(0).map_err(translate)?;
    let kid = kid.bytes().next().and_then(Kid::from_byte).ok_or_else(|| damaged("keyring.kid"))?;
    Ok((kid, row.try_get_by_index(1).map_err(translate)?))
}

/// Why a keyring does not fit to the keys that the store knows of.
fn keyring_mistake(keyring: &Keyring, known: &[(Kid, Vec<u8>)]) -> Option<String> {
    let fingerprints = keyring.fingerprints();
    let ours = |kid: Kid| fingerprints.iter().find(|(other, ..)| *other == kid).map(|(.., fingerprint)| fingerprint);
    let foreign = known.iter().any(|(kid, bytes)| ours(*kid).is_some_and(|fingerprint| fingerprint.as_bytes() != bytes));
    let stranger = !known.is_empty() && known.iter().all(|(kid, _)| ours(*kid).is_none());
    if foreign || stranger {
        let mistake = "the keyring is not the one that this database's tokens were made with, and every token would look forged: \
                       put the right keyring file in its place (setting keyring_file); all servers of a database have the same";
        return Some(mistake.to_owned());
    }
    for (kid, _) in known.iter().filter(|(kid, _)| ours(*kid).is_none()) {
        tracing::warn!(kid = %kid.as_char(), "a key was removed from the keyring: tokens made with it are unknown from now on");
    }
    None
}

/// Takes the lock on the folder of the database, so that no second process writes to it.
fn lock_folder(path: &Path) -> std::result::Result<File, String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let shown = folder.display();
    std::fs::create_dir_all(folder).map_err(|error| format!("the folder {shown} cannot be made: {error}"))?;
    let lock = folder.join("keyward.lock");
    let file = own_file(&lock)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(format!("another keyward is using the folder {shown}: stop it, or name another one with data_dir"))
        }
        Err(TryLockError::Error(error)) => Err(format!("{} cannot be locked: {error}", lock.display())),
    }
}

/// Opens a file, made for our eyes only if it is missing.
fn own_file(path: &Path) -> std::result::Result<File, String> {
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    open.map_err(|error| format!("{} cannot be opened: {error}", path.display()))
}

fn sqlite_options(path: &Path, connections: u32, read_only: bool) -> ConnectOptions {
    let path = path.to_owned();
    let mut options = ConnectOptions::new("sqlite::memory:");
    options
        .max_connections(connections)
        .min_connections(connections)
        .connect_timeout(ACQUIRE_TIMEOUT)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .sqlx_logging(false)
        .record_stmt_in_spans(false)
        .map_sqlx_sqlite_opts(move |options| {
            options
                .in_memory(false)
                .shared_cache(false)
                .filename(&path)
                .create_if_missing(!read_only)
                .read_only(read_only)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .busy_timeout(ACQUIRE_TIMEOUT)
                .pragma("cache_size", SQLITE_CACHE_KIB)
        });
    options
}

async fn single<T: sea_orm::TryGetable>(connection: &DatabaseConnection, sql: &'static str) -> std::result::Result<T, DbErr> {
    let statement = Statement::from_string(connection.get_database_backend(), sql);
    let row = connection.query_one_raw(statement).await?;
    row.ok_or_else(|| DbErr::RecordNotFound(sql.to_owned()))?.try_get_by_index(0)
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

fn sqlx_error(error: sqlx::Error) -> DbErr {
    DbErr::Conn(RuntimeErr::SqlxError(error.into()))
}

/// What the operator may read of a failure while opening: the database's own words, which hold no password.
fn cause(error: &DbErr) -> String {
    match error {
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => error.to_string(),
        other => other.to_string(),
    }
}

/// A row that does not read as what we write.
fn damaged(column: &'static str) -> Error {
    Error::Internal(format!("the column {column} holds something that keyward never writes").into())
}

/// Sorts the database's failures: it cannot be reached or does not take the change now, or we asked for something wrong.
fn translate(error: DbErr) -> Error {
    if is_outage(&error) { Error::Unavailable(error.into()) } else { Error::Internal(error.into()) }
}

fn is_outage(error: &DbErr) -> bool {
    match error {
        DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => true,
        DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error)) => match error.as_ref() {
            sqlx::Error::Database(error) => error.code().is_some_and(|code| is_outage_code(&code)),
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => true,
            _ => false,
        },
        _ => false,
    }
}

/// PostgreSQL's five-character SQLSTATE, or SQLite's number, whose low byte is the primary code.
fn is_outage_code(code: &str) -> bool {
    const SQLITE: [u32; 8] = [5, 6, 7, 8, 9, 10, 13, 14]; // BUSY LOCKED NOMEM READONLY INTERRUPT IOERR FULL CANTOPEN
    const POSTGRES: [&str; 8] = ["08", "53", "57", "58", "40", "55", "25006", "F0"];
    match code.parse::<u32>() {
        Ok(number) if code.len() < 5 => SQLITE.contains(&(number & 0xff)),
        _ => POSTGRES.iter().any(|class| code.starts_with(class)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_none_is_refused_without_being_quoted() {
        for text in ["", "mysql://u:hunter2@h/d", "postgres://u:hunter2@:99999999/d", "sqlite://", "hunter2"] {
            let error = text.parse::<DatabaseUrl>().expect_err(text);
            assert!(error.starts_with("must be") && !error.contains("hunter2"), "{error}");
        }
        assert_eq!(format!("{:?}", "postgres://u:hunter2@h/d".parse::<DatabaseUrl>()), "Ok(postgres://…)");
        assert!("sqlite:///var/lib/keyward/keyward.db".parse::<DatabaseUrl>().is_ok());
    }

    #[test]
    fn outages_are_told_from_faults_of_ours() {
        for code in ["13", "10", "778", "5", "57P01", "08006", "53100", "40P01"] {
            assert!(is_outage_code(code), "{code}");
        }
        for code in ["19", "2067", "1", "23505", "42601", "22P02"] {
            assert!(!is_outage_code(code), "{code}");
        }
    }
}
