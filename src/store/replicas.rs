//! The servers of a database, and what they tell each other through it: who is there, what has changed, and how far each of them knows.

use std::time::Duration;

use sea_orm::{
    ConnectionTrait as _, DbBackend, QueryResult, Statement, Value,
    sqlx::{self, postgres::PgListener},
};

use super::{
    DatabaseUrl, Sharing, Store, Tx, damaged, sqlx_error,
    transaction::{self, logged},
    translate,
};
use crate::{
    ambient::{Stopwatch, Time},
    error::{Error, Result},
    grant::Subject,
};

/// The timeline of a PostgreSQL: another one after each failover. The first part of the name of a log file
/// (<https://www.postgresql.org/docs/current/functions-admin.html>).
pub(super) const TIMELINE: &str = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)";
/// The channel of PostgreSQL on which servers are told that something has changed.
const CHANNEL: &str = "keyward";

/// A server that starts.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// An id that no start of a server had before.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// How long it answers from memory after it has asked what changed.
    pub lease: Duration,
    /// Whether changes wait for it however long it is silent.
    pub is_acked_only: bool,
    /// When it started.
    pub start_time: Time,
}

/// A server as the others see it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "as in NewReplica")]
pub struct Replica {
    pub id: String,
    pub name: String,
    pub version: String,
    pub lease: Duration,
    pub is_acked_only: bool,
    pub start_time: Time,
    /// The last change that it has confirmed.
    pub acked: i64,
    /// Counts its signs of life.
    pub renewal: i64,
    /// Whether changes do not wait for it any more, and it must begin anew.
    pub is_evicted: bool,
}

/// Something that has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The number of the change.
    pub seq: i64,
    /// What has changed.
    pub subject: Subject,
    /// The workspace that it is of.
    pub workspace: String,
    /// The token, if it is one.
    pub token_id: Option<String>,
}

/// What has changed since some number, in one look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Log {
    /// The number of the last change.
    pub head: i64,
    /// Raised when the database was put back to an earlier state.
    pub epoch: i64,
    /// Another one after each failover.
    pub timeline: String,
    /// The log says nothing of changes up to this number.
    pub pruned: i64,
    /// In the order of their numbers.
    pub changes: Vec<Change>,
    /// Whether there are more than were asked for. The last number may then not be told whole.
    pub is_cut: bool,
    /// Whether there are some of a kind that only later versions of this program know.
    pub is_foreign: bool,
}

/// What became of a sign of life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Renewal {
    /// It is recorded, with this number.
    Recorded(i64),
    /// One before it was recorded although its answer was lost: this is the number.
    Ahead(i64),
    /// The server is not one of those that changes wait for.
    Evicted,
}

impl Store {
    /// Registers a server, which from now on is one that changes wait for; says what the last change was when it was made one. It may be repeated under the same
    /// id. A server that is alone is the only one there is.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn register(&self, replica: &NewReplica, patience: Duration) -> Result<i64> {
        if self.is_alone() {
            let rest = Statement::from_string(self.backend(), "DELETE FROM replica");
            self.writing("register", self.writer.execute_raw(rest)).await?;
        }
        let sql = "INSERT INTO replica (incarnation, address, version, lease_ms, acked_seq, renewal, evicted, start_time, acked_only) \
                   SELECT $1, $2, $3, $4, seq, 0, FALSE, $5, $6 FROM change_head WHERE id = 1 \
                   ON CONFLICT (incarnation) DO NOTHING RETURNING acked_seq";
        let values: [Value; 6] = [
            replica.id.clone().into(),
            replica.name.clone().into(),
            replica.version.clone().into(),
            millis(replica.lease).into(),
            replica.start_time.micros().into(),
            replica.is_acked_only.into(),
        ];
        let mut rows = self.on_line("register", sql, values, patience).await?;
        if rows.is_empty() {
            // An attempt before was made although its answer was lost.
            let sql = "SELECT acked_seq FROM replica WHERE incarnation = $1 AND renewal = 0";
            rows = self.on_line("register", sql, [replica.id.clone().into()], patience).await?;
        }
        number(rows.first().ok_or_else(|| damaged("replica"))?, 0)
    }

    /// What has changed after a number, as the primary knows it now: at most so many things.
    ///
    /// # Errors
    /// `Unavailable`, also if the database is a standby.
    pub async fn changes_after(&self, seq: i64, limit: u32, patience: Duration) -> Result<Log> {
        let rows = self.on_line("changes", &self.changes_sql(), [seq.into(), i64::from(limit).into()], patience).await?;
        log(&rows, limit)
    }

    /// As [`Store::changes_after`], in turn with other reads.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn log_after(&self, seq: i64, limit: u32) -> Result<Log> {
        let values: [Value; 2] = [seq.into(), i64::from(limit).into()];
        let statement = Statement::from_sql_and_values(self.backend(), self.changes_sql(), values);
        let rows = self.reading("log", self.reader.query_all_raw(statement)).await?;
        log(&rows, limit)
    }

    fn changes_sql(&self) -> String {
        let timeline = self.timeline();
        format!(
            "SELECT h.seq, h.epoch, h.pruned_seq, {timeline}, l.seq, l.kind, l.subject, l.workspace, l.token_id FROM change_head h \
             LEFT JOIN change_log l ON l.seq > $1 WHERE h.id = 1 ORDER BY l.seq, l.item LIMIT $2"
        )
    }

    /// Nothing on a standby.
    fn timeline(&self) -> String {
        match self.backend() {
            DbBackend::Postgres => format!("CASE WHEN pg_is_in_recovery() THEN NULL ELSE {TIMELINE} END"),
            _ => "''".to_owned(),
        }
    }

    /// Records a sign of life, and up to which change this server knows, if the database is still in the epoch and on the timeline in which this server has asked: a standby that
    /// takes over may know the change and not that this server was evicted.
    ///
    /// # Errors
    /// `Unavailable`: it may or may not be recorded.
    pub async fn renew(&self, id: &str, renewal: i64, acked: i64, (epoch, timeline): (i64, &str), patience: Duration) -> Result<Renewal> {
        let present = self.timeline();
        let sql = format!(
            "UPDATE replica SET renewal = renewal + 1, acked_seq = $1 WHERE incarnation = $2 AND NOT evicted AND renewal = $3 \
             AND (SELECT epoch FROM change_head WHERE id = 1) = $4 AND {present} = $5 RETURNING renewal"
        );
        let values: [Value; 5] = [acked.into(), id.into(), renewal.into(), epoch.into(), timeline.into()];
        let rows = self.on_line("renew", &sql, values, patience).await?;
        if let Some(row) = rows.first() {
            return number(row, 0).map(Renewal::Recorded);
        }
        let sql = "SELECT renewal FROM replica WHERE incarnation = $1 AND NOT evicted AND renewal = $2";
        let rows = self.on_line("renew", sql, [id.into(), (renewal + 1).into()], patience).await?;
        rows.first().map_or(Ok(Renewal::Evicted), |row| number(row, 0).map(Renewal::Ahead))
    }

    /// Takes a server out of those that changes wait for: it has stopped.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn depart(&self, id: &str, patience: Duration) -> Result<()> {
        self.on_line("depart", "DELETE FROM replica WHERE incarnation = $1 RETURNING renewal", [id.into()], patience).await.map(drop)
    }

    /// The servers that there are, with those that were evicted not long ago, the oldest first; and the number of the last change.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn replicas(&self) -> Result<(Vec<Replica>, i64)> {
        let sql = "SELECT r.incarnation, r.address, r.version, r.lease_ms, r.acked_only, r.start_time, r.acked_seq, r.renewal, r.evicted, h.seq \
                   FROM change_head h LEFT JOIN replica r ON TRUE WHERE h.id = 1 ORDER BY r.start_time, r.incarnation";
        let work = self.reader.query_all_raw(Statement::from_string(self.backend(), sql));
        let watch = Stopwatch::start();
        // Not in turn with lists: changes wait for this.
        let outcome = tokio::time::timeout(super::WORK_TIMEOUT, work).await;
        let rows = outcome.map_err(|elapsed| Error::Unavailable(elapsed.into())).and_then(|rows| rows.map_err(translate));
        self.observe("replicas", watch, rows.is_err());
        let rows = rows?;
        let head = number(rows.first().ok_or_else(|| damaged("change_head"))?, 9)?;
        Ok((rows.iter().filter_map(|row| replica(row).transpose()).collect::<Result<_>>()?, head))
    }

    /// Says that changes do not wait for a server any more, if it has given no sign of life since the one with this number; says whether that is so.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn evict(&self, id: &str, renewal: i64, now: Time) -> Result<bool> {
        let sql = "UPDATE replica SET evicted = TRUE, evict_time = $1 WHERE incarnation = $2 AND renewal = $3 AND NOT evicted";
        let statement = Statement::from_sql_and_values(self.backend(), sql, [now.micros().into(), id.into(), renewal.into()]);
        self.writing("evict", async { self.writer.execute_raw(statement).await.map(|done| done.rows_affected() == 1) }).await
    }

    /// Forgets servers that were evicted before some time.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn forget_evicted(&self, before: Time) -> Result<()> {
        let sql = "DELETE FROM replica WHERE evicted AND evict_time <= $1";
        let statement = Statement::from_sql_and_values(self.backend(), sql, [before.micros().into()]);
        self.writing("prune", async { self.writer.execute_raw(statement).await.map(drop) }).await
    }

    /// Tells the other servers that something has changed. They find it by themselves a little later if this is lost.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn hint(&self) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let work = async { self.writer.execute_unprepared(&format!("NOTIFY {CHANNEL}")).await.map(drop) };
        let outcome = tokio::time::timeout(super::ACQUIRE_TIMEOUT, work).await;
        outcome.map_err(|elapsed| Error::Unavailable(elapsed.into()))?.map_err(translate)
    }

    /// Where hints of other servers come in; nothing if there are no others.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn hints(&self) -> Result<Option<Hints>> {
        let Sharing::Shared { url: DatabaseUrl::Postgres(url), .. } = &self.sharing else { return Ok(None) };
        let failed = |error| translate(sqlx_error(error));
        let mut listener = PgListener::connect(url).await.map_err(failed)?;
        listener.listen(CHANNEL).await.map_err(failed)?;
        Ok(Some(Hints(listener)))
    }

    /// Says that the database was put back to an earlier state: every server forgets what it knows.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn begin_epoch(&self) -> Result<()> {
        let now = match self.backend() {
            DbBackend::Postgres => "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
            _ => "0",
        };
        let sql = format!("UPDATE change_head SET epoch = epoch + 1, seq = seq + 1, history_time = {now} WHERE id = 1");
        let sql = Statement::from_string(self.backend(), sql);
        self.writing("epoch", async { self.writer.execute_raw(sql).await.map(drop) }).await?;
        // Those that run register anew; the others ran when the backup was made.
        let rest = Statement::from_string(self.backend(), "DELETE FROM replica");
        self.writing("epoch", async { self.writer.execute_raw(rest).await.map(drop) }).await
    }

    /// Runs a statement that keeps nobody waiting and that nobody keeps waiting, also while all other connections are taken.
    async fn on_line(
        &self,
        verb: &'static str,
        sql: &str,
        values: impl IntoIterator<Item = Value>,
        patience: Duration,
    ) -> Result<Vec<QueryResult>> {
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        let Sharing::Shared { line, .. } = &self.sharing else {
            let is_read = sql.starts_with("SELECT");
            return if is_read {
                self.reading(verb, self.reader.query_all_raw(statement)).await
            } else {
                self.writing(verb, self.writer.query_all_raw(statement)).await
            };
        };
        let watch = Stopwatch::start();
        let rows = match line.run(statement, patience).await {
            Some(rows) => rows.map_err(translate),
            None => Err(Error::Unavailable("the database did not answer in time".into())),
        };
        self.observe(verb, watch, rows.is_err());
        rows
    }
}

/// Hints of other servers.
pub struct Hints(PgListener);

impl Hints {
    /// Waits for the next one, or for the end of the connection, with which some may have been lost.
    ///
    /// # Errors
    /// `Unavailable`: the connection cannot be had again.
    pub async fn next(&mut self) -> Result<()> {
        self.0.try_recv().await.map(drop).map_err(|error: sqlx::Error| translate(sqlx_error(error)))
    }
}

impl Tx<'_> {
    /// Says that changes do not wait any more for a server that had to confirm them, whatever it does; says which it was. Nothing if there is none, or it had not to.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn release(&self, id: &str, now: Time) -> Result<Option<Replica>> {
        let sql = "UPDATE replica SET evicted = TRUE, evict_time = COALESCE(evict_time, $1) WHERE incarnation = $2 AND (acked_only OR evicted) \
                   RETURNING incarnation, address, version, lease_ms, acked_only, start_time, acked_seq, renewal, evicted";
        let row = self.query_one(sql, vec![now.micros().into(), id.into()]).await?;
        row.map_or(Ok(None), |row| replica(&row))
    }

    /// Whether there is such a server.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn is_replica(&self, id: &str) -> Result<bool> {
        Ok(self.query_one("SELECT 1 FROM replica WHERE incarnation = $1", vec![id.into()]).await?.is_some())
    }
}

fn number(row: &QueryResult, index: usize) -> Result<i64> {
    row.try_get_by_index(index).map_err(translate)
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

fn log(rows: &[QueryResult], limit: u32) -> Result<Log> {
    let head = rows.first().ok_or_else(|| damaged("change_head"))?;
    let timeline: Option<String> = head.try_get_by_index(3).map_err(translate)?;
    let is_of_ours = |row: &&QueryResult| is_known(row).unwrap_or(true);
    let changes = rows.iter().filter(is_of_ours).filter_map(|row| change(row).transpose()).collect::<Result<Vec<_>>>()?;
    Ok(Log {
        head: number(head, 0)?,
        epoch: number(head, 1)?,
        pruned: number(head, 2)?,
        timeline: timeline.ok_or_else(|| Error::Unavailable("the database has become a standby".into()))?,
        is_cut: rows.len() >= limit as usize,
        is_foreign: !rows.iter().all(|row| is_of_ours(&row)),
        changes,
    })
}

/// Whether this version knows this kind of change.
fn is_known(row: &QueryResult) -> Result<bool> {
    let kind: Option<i16> = row.try_get_by_index(5).map_err(translate)?;
    Ok(kind.is_none_or(|kind| transaction::KINDS.contains(&kind)))
}

/// Nothing if the row tells of the head alone.
fn change(row: &QueryResult) -> Result<Option<Change>> {
    let Some(seq) = row.try_get_by_index::<Option<i64>>(4).map_err(translate)? else { return Ok(None) };
    let (kind, subject): (i16, Vec<u8>) = (row.try_get_by_index(5).map_err(translate)?, row.try_get_by_index(6).map_err(translate)?);
    let subject = transaction::subject_of(kind, &subject).ok_or_else(|| damaged("change_log.subject"))?;
    debug_assert_eq!(logged(&subject).0, kind, "a subject is logged as it is read");
    let (workspace, token_id): (String, String) =
        (row.try_get_by_index(7).map_err(translate)?, row.try_get_by_index(8).map_err(translate)?);
    Ok(Some(Change { seq, subject, workspace, token_id: Some(token_id).filter(|id| !id.is_empty()) }))
}

/// Nothing if the row tells of the head alone.
fn replica(row: &QueryResult) -> Result<Option<Replica>> {
    let Some(id) = row.try_get_by_index::<Option<String>>(0).map_err(translate)? else { return Ok(None) };
    Ok(Some(Replica {
        id,
        name: row.try_get_by_index(1).map_err(translate)?,
        version: row.try_get_by_index(2).map_err(translate)?,
        lease: Duration::from_millis(u64::try_from(number(row, 3)?).map_err(|_| damaged("replica.lease_ms"))?),
        is_acked_only: row.try_get_by_index(4).map_err(translate)?,
        start_time: Time::from_micros(number(row, 5)?),
        acked: number(row, 6)?,
        renewal: number(row, 7)?,
        is_evicted: row.try_get_by_index(8).map_err(translate)?,
    }))
}
