//! Connections to PostgreSQL: those for work, and the one on which a server hears what others have changed.

use std::time::Duration;

use parking_lot::Mutex;
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DbErr, QueryResult, Statement,
    sqlx::{self, ConnectOptions as _, Connection as _, Row as _, postgres::PgConnectOptions},
};
use tokio::time::timeout;

use super::{ACQUIRE_TIMEOUT, DatabaseUrl, STATEMENT_TIMEOUT, cause, sqlx_error};

/// The one connection on which a server hears what others have changed. Nothing else keeps it waiting; and if it does not answer in time it is given up for a new one, so
/// that a way that was cut and is whole again is found at once.
pub(super) struct Line {
    url: DatabaseUrl,
    connection: Mutex<Option<DatabaseConnection>>,
}

impl Line {
    pub(super) fn new(url: DatabaseUrl) -> Self {
        Self { url, connection: Mutex::default() }
    }

    /// Runs a statement; nothing if it took longer.
    pub(super) async fn run(&self, statement: Statement, patience: Duration) -> Option<Result<Vec<QueryResult>, DbErr>> {
        let work = async {
            let known = self.connection.lock().clone();
            let connection = if let Some(connection) = known {
                connection
            } else {
                let connection = connect_pool(&self.url, 1).await?;
                *self.connection.lock() = Some(connection.clone());
                connection
            };
            connection.query_all_raw(statement).await
        };
        let outcome = timeout(patience, work).await.ok();
        if !matches!(outcome, Some(Ok(_))) {
            *self.connection.lock() = None;
        }
        outcome
    }
}

fn postgres_url(url: &DatabaseUrl) -> Result<&str, DbErr> {
    match url {
        DatabaseUrl::Postgres(url) => Ok(url),
        DatabaseUrl::Sqlite(_) => Err(DbErr::Custom("not the URL of a PostgreSQL".to_owned())),
    }
}

/// Connections to a PostgreSQL that takes changes.
pub(super) async fn connect_pool(url: &DatabaseUrl, connections: u32) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(postgres_url(url)?);
    options
        .max_connections(connections)
        .min_connections(connections.min(2))
        .connect_timeout(ACQUIRE_TIMEOUT)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        // With a lifetime sqlx 0.9.0 looks through idle connections now and then, by a count that can have fallen below none: it then looks for ever
        // (https://github.com/transact-rs/sqlx/issues/3645).
        .max_lifetime(None)
        .test_before_acquire_if_idle_for(Duration::from_secs(5))
        .statement_timeout(STATEMENT_TIMEOUT)
        .set_application_name("keyward")
        .sqlx_logging(false)
        .record_stmt_in_spans(false)
        // A standby would not know of the latest changes.
        .map_sqlx_postgres_pool_opts(|options| {
            options.after_connect(|connection, _| {
                Box::pin(async move {
                    if is_standby(connection).await? { Err(sqlx::Error::Configuration("it is a standby".into())) } else { Ok(()) }
                })
            })
        });
    Database::connect(options).await
}

/// Two connections whose statements may take their time: one for a lock, and one for what is done under it.
pub(super) async fn connect_for_migrations(url: &DatabaseUrl) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(postgres_url(url)?);
    options.max_connections(2).max_lifetime(None).sqlx_logging(false).record_stmt_in_spans(false);
    Database::connect(options).await
}

/// A sentence for the operator if the URL leads to a PostgreSQL that takes no changes, or to none.
pub(super) async fn refuse_standby(url: &DatabaseUrl) -> Result<(), String> {
    let text = postgres_url(url).map_err(|error| error.to_string())?;
    let check = async {
        let options: PgConnectOptions = text.parse()?;
        let mut connection = options.disable_statement_logging().connect().await?;
        let is_standby = is_standby(&mut connection).await?;
        connection.close().await.map(|()| is_standby)
    };
    match timeout(ACQUIRE_TIMEOUT, check).await {
        Ok(Ok(false)) => Ok(()),
        Ok(Ok(true)) => Err("database_url leads to a PostgreSQL standby: name the primary".to_owned()),
        Ok(Err(error)) => Err(refused(&sqlx_error(error))),
        Err(_) => Err("PostgreSQL (database_url) does not answer: is it there, and does a firewall let us through?".to_owned()),
    }
}

async fn is_standby(connection: &mut sqlx::PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql("SELECT pg_is_in_recovery()").fetch_one(connection).await?.try_get(0)
}

pub(super) fn refused(error: &DbErr) -> String {
    format!("PostgreSQL (database_url) does not take our connection: {}", cause(error))
}
