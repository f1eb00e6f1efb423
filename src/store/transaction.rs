//! Changes: everything that one call writes, in one transaction.
//!
//! Invariant: a change of an existing token takes its number before it reads what it changes, so that changes are made one after the
//! other, and the order of numbers is the order of commits (test `numbers_come_in_the_order_of_commits`).
//! Invariant: a change is there with its audit row, or not at all (test `no_acknowledged_change_is_lost_by_kill_nine`).

use std::time::Duration;

use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait as _, DatabaseTransaction, DbBackend, DbErr, EntityTrait as _,
    IntoActiveModel as _, QueryFilter as _, QueryOrder as _, Statement, TransactionTrait as _, Value, sea_query::Condition,
};
use tokio::{sync::SemaphorePermit, time::timeout};

use super::{
    AuditEvent, Store, WORK_TIMEOUT, damaged, directory,
    entity::{self, audience, audit, change, token, usage},
    replicas::TIMELINE,
    tokens, translate,
};
use crate::{
    ambient::{Stopwatch, Time},
    caller::Caller,
    error::{Error, Result},
    grant::{State, Subject, Token},
    scope::Scope,
    token::{Digest, TokenId},
};

/// Rows of one statement: below the databases' limits on parameters.
const ROWS_MAX: usize = 1_000;
/// Kinds of changes in the log: of the token with the digest that is the row's subject, of a principal, of a workspace.
const CHANGE_OF_TOKEN: i16 = 1;
const CHANGE_OF_PRINCIPAL: i16 = 2;
const CHANGE_OF_WORKSPACE: i16 = 3;
pub(super) const KINDS: [i16; 3] = [CHANGE_OF_TOKEN, CHANGE_OF_PRINCIPAL, CHANGE_OF_WORKSPACE];
/// Old log rows are removed about so many numbers at a time.
const PRUNED_AT_ONCE: i64 = 1_000;

/// A change takes its number, and notes the first time that it does so on another timeline than before: numbers may then mean something else than they did.
const NUMBERED_ON_POSTGRES: &str = "UPDATE change_head SET seq = seq + 1, timeline = {timeline}, \
    epoch = CASE WHEN timeline IN ('', {timeline}) THEN epoch ELSE epoch + 1 END, \
    history_time = CASE WHEN timeline IN ('', {timeline}) THEN history_time ELSE CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) END \
    WHERE id = 1 RETURNING seq, CASE WHEN history_time > 0 THEN CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) - history_time END";

/// What is kept of a `request_id`.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nothing: the call is the first with it, and holds it until the end of its transaction.
    Mine,
    /// The sealed answer of the same request.
    Answered(Vec<u8>),
    /// Another request came with it.
    Misused,
}

/// Something that a change is about, and what those who ask know it by.
#[derive(Clone, Debug)]
struct Touched {
    subject: Subject,
    workspace: String,
    token_id: Option<TokenId>,
}

/// A transaction. Dropped without [`Tx::commit`] it leaves no trace.
pub struct Tx<'a> {
    store: &'a Store,
    inner: DatabaseTransaction,
    seq: Option<i64>,
    /// How long ago the database was put back or another one took over, if that ever happened.
    history_age: Option<Duration>,
    touched: Vec<Touched>,
    watch: Stopwatch,
    _permit: SemaphorePermit<'a>,
}

impl Store {
    /// Begins a change of tokens that exist: waits for the changes before it.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn begin_change(&self) -> Result<Tx<'_>> {
        let mut tx = self.begin().await?;
        let sql = match self.backend() {
            DbBackend::Postgres => NUMBERED_ON_POSTGRES.replace("{timeline}", TIMELINE),
            _ => "UPDATE change_head SET seq = seq + 1 WHERE id = 1 RETURNING seq, NULL".to_owned(),
        };
        let row = tx.query_one(&sql, vec![]).await?.ok_or_else(|| damaged("change_head"))?;
        tx.seq = Some(row.try_get_by_index(0).map_err(translate)?);
        let age: Option<i64> = row.try_get_by_index(1).map_err(translate)?;
        tx.history_age = age.map(|millis| Duration::from_millis(u64::try_from(millis).unwrap_or(0)));
        Ok(tx)
    }

    /// As [`Store::begin_change`], for a caller who still stands when their turn has come: they may have waited long.
    ///
    /// # Errors
    /// `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn begin_change_by(&self, caller: &Caller, now: Time) -> Result<Tx<'_>> {
        let tx = self.begin_change().await?;
        tx.require(caller, now).await?;
        Ok(tx)
    }

    /// Begins what takes no number: it adds tokens, which nobody can know yet, or is about notices, on which no verdict hangs. It waits for nobody.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn begin_unnumbered(&self) -> Result<Tx<'_>> {
        self.begin().await
    }

    async fn begin(&self) -> Result<Tx<'_>> {
        let permit = self.permit(&self.write_permits).await?;
        let watch = Stopwatch::start();
        let tx = timeout(WORK_TIMEOUT, self.writer.begin()).await.map_err(|elapsed| Error::Unavailable(elapsed.into()))?;
        Ok(Tx { store: self, inner: tx.map_err(translate)?, seq: None, history_age: None, touched: Vec::new(), watch, _permit: permit })
    }

    /// Removes log rows and kept answers that are too old for anybody to need. For space only.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn prune(&self, now: Time, log_before: Time) -> Result<()> {
        let answers = Statement::from_sql_and_values(self.backend(), "DELETE FROM replay WHERE expire_time <= $1", [now.micros().into()]);
        self.writing("prune", self.writer.execute_raw(answers)).await?;
        let old = "SELECT MAX(seq) FROM change_log WHERE change_time <= $1";
        let old = Statement::from_sql_and_values(self.backend(), old, [log_before.micros().into()]);
        let row = self.reading("prune", self.reader.query_one_raw(old)).await?;
        let last: Option<i64> = row.map_or(Ok(None), |row| row.try_get_by_index(0)).map_err(translate)?;
        let Some(last) = last else { return Ok(()) };
        // First, so that who knows less than that finds in any look that the log does not tell them.
        let told = Statement::from_sql_and_values(
            self.backend(),
            "UPDATE change_head SET pruned_seq = $1 WHERE id = 1 AND pruned_seq < $1",
            [last.into()],
        );
        self.writing("prune", self.writer.execute_raw(told)).await?;
        loop {
            let piece = "DELETE FROM change_log WHERE seq <= $1 AND seq < (SELECT MIN(seq) FROM change_log) + $2";
            let piece = Statement::from_sql_and_values(self.backend(), piece, [last.into(), PRUNED_AT_ONCE.into()]);
            if self.writing("prune", self.writer.execute_raw(piece)).await?.rows_affected() == 0 {
                return Ok(());
            }
        }
    }
}

impl Tx<'_> {
    /// Makes the change last.
    ///
    /// # Errors
    /// `Unavailable`: then it may or may not have been made; whoever asks again finds out.
    pub async fn commit(mut self, now: Time) -> Result<()> {
        self.write_log(now).await?;
        let Self { inner, store, watch, .. } = self;
        let result = match timeout(WORK_TIMEOUT, inner.commit()).await {
            Ok(result) => result.map_err(translate),
            Err(elapsed) => Err(Error::Unavailable(elapsed.into())),
        };
        store.observe("change", watch, result.is_err());
        result
    }

    async fn write_log(&mut self, now: Time) -> Result<()> {
        let touched = std::mem::take(&mut self.touched);
        let numbered: Vec<(i64, Touched)> = (0..).zip(touched).collect();
        for chunk in numbered.chunks(ROWS_MAX) {
            let seq = self.seq.ok_or_else(|| Error::Internal("a change without a number".into()))?;
            let rows = chunk.iter().map(|(item, touched)| {
                let (kind, subject) = logged(&touched.subject);
                change::ActiveModel {
                    seq: Set(seq),
                    item: Set(*item),
                    kind: Set(kind),
                    subject: Set(subject),
                    change_time: Set(now.micros()),
                    workspace: Set(touched.workspace.clone()),
                    token_id: Set(touched.token_id.map(|id| id.to_string()).unwrap_or_default()),
                }
            });
            self.bounded(change::Entity::insert_many(rows).exec_without_returning(&self.inner)).await?;
        }
        Ok(())
    }

    pub(super) async fn query_one(&self, sql: &str, values: Vec<Value>) -> Result<Option<sea_orm::QueryResult>> {
        let statement = Statement::from_sql_and_values(self.store.backend(), sql, values);
        self.bounded(self.inner.query_one_raw(statement)).await
    }

    pub(super) async fn execute(&self, sql: &str, values: Vec<Value>) -> Result<u64> {
        let statement = Statement::from_sql_and_values(self.store.backend(), sql, values);
        self.bounded(self.inner.execute_raw(statement)).await.map(|done| done.rows_affected())
    }

    pub(super) async fn bounded<T>(&self, work: impl Future<Output = std::result::Result<T, DbErr>>) -> Result<T> {
        let done = timeout(WORK_TIMEOUT, work).await.map_err(|elapsed| Error::Unavailable(elapsed.into()))?;
        done.map_err(translate)
    }

    pub(super) fn store(&self) -> &Store {
        self.store
    }

    pub(super) fn inner(&self) -> &DatabaseTransaction {
        &self.inner
    }

    /// Whether this is a change, which has a number, and not a creation.
    pub(super) fn is_change(&self) -> bool {
        self.seq.is_some()
    }

    /// Notes that what is known about a principal or a workspace is out of date once the change is committed.
    pub(super) fn touch(&mut self, subject: Subject) {
        let workspace = match &subject {
            Subject::Principal { workspace, .. } | Subject::Workspace(workspace) => workspace.clone(),
            Subject::Token(_) => String::new(),
        };
        self.touched.push(Touched { subject, workspace, token_id: None });
    }

    /// As [`Tx::touch`], a token by all that it may be known by.
    pub(super) fn touch_token(&mut self, id: TokenId, workspace: &str, digests: &[Digest]) {
        let touched = |digest: &Digest| Touched { subject: Subject::Token(*digest), workspace: workspace.to_owned(), token_id: Some(id) };
        self.touched.extend(digests.iter().map(touched));
    }

    /// What this change is about.
    #[must_use]
    pub fn touched(&self) -> Vec<Subject> {
        self.touched.iter().map(|touched| touched.subject.clone()).collect()
    }

    /// How long ago the database was put back to an earlier state, or another one took over; nothing if that never happened.
    #[must_use]
    pub fn history_age(&self) -> Option<Duration> {
        self.history_age
    }

    /// The number of this change, if it is one of what exists.
    #[must_use]
    pub fn seq(&self) -> Option<i64> {
        self.seq
    }

    /// Refuses a caller who was judged before this transaction and does not stand any more. The caller's token cannot be ended until this transaction has.
    ///
    /// # Errors
    /// `Unauthenticated`, `Unavailable`.
    pub async fn require(&self, caller: &Caller, now: Time) -> Result<()> {
        let stands = match (caller.token_id, &caller.digest) {
            (Some(id), Some(digest)) => self.token_stands(id, digest, &caller.scopes, now).await?,
            (None, _) | (_, None) => self.certificate_stands(caller).await?,
        };
        let refusal = "the caller was revoked, suspended or changed while the call waited; look with WhoAmI what is left";
        if stands { Ok(()) } else { Err(Error::Unauthenticated(refusal)) }
    }

    async fn token_stands(&self, id: TokenId, digest: &Digest, scopes: &[Scope], now: Time) -> Result<bool> {
        let lock = if self.store.backend() == DbBackend::Postgres { "FOR SHARE OF t" } else { "" };
        let sql = format!(
            "SELECT t.scopes FROM token t JOIN workspace w ON w.id = t.workspace \
             LEFT JOIN principal p ON p.workspace = t.workspace AND p.id = t.principal \
             WHERE t.id = $1 AND t.state = 1 AND t.delete_time IS NULL AND t.expire_time > $2 \
             AND (t.digest = $3 OR (t.previous_digest = $3 AND t.previous_expire_time > $2)) \
             AND w.delete_time IS NULL AND NOT w.suspended AND NOT COALESCE(p.suspended, FALSE) {lock}"
        );
        let values = vec![id.to_string().into(), now.micros().into(), digest.as_bytes().to_vec().into()];
        let row = self.query_one(&sql, values).await?;
        row.map_or(Ok(false), |row| row.try_get_by_index::<String>(0).map(|held| held == entity::join(scopes)).map_err(translate))
    }

    async fn certificate_stands(&self, caller: &Caller) -> Result<bool> {
        let values = vec![(&*caller.workspace).into(), (&*caller.principal).into()];
        let row = self.query_one(directory::STANDING, values).await?;
        row.map_or(Ok(false), |row| row.try_get_by_index::<bool>(0).map(|is_suspended| !is_suspended).map_err(translate))
    }

    /// One token and the digests under which it may be known, if it is of this workspace (nothing: of any) and not deleted.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn token(&self, id: TokenId, workspace: Option<&str>) -> Result<Option<(Token, Vec<Digest>)>> {
        let query = tokens::token_query(id, workspace);
        let found = self.bounded(query.find_also_related(usage::Entity).one(&self.inner)).await?;
        found.map(|(row, usage)| with_digests(row, usage)).transpose()
    }

    /// Every token of a principal that is not deleted, not revoked and not expired, with its digests.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn live_tokens(&self, workspace: &str, principal: &str, now: Time) -> Result<Vec<(Token, Vec<Digest>)>> {
        self.live(Condition::all().add(token::Column::Workspace.eq(workspace)).add(token::Column::Principal.eq(principal)), now).await
    }

    /// The scopes that are held by the live tokens of a principal.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn live_scopes(&self, workspace: &str, principal: &str, now: Time) -> Result<Vec<Scope>> {
        let sql = "SELECT DISTINCT scopes FROM token WHERE workspace = $1 AND principal = $2 AND expire_time > $3 \
                   AND delete_time IS NULL AND state <> 3";
        let statement =
            Statement::from_sql_and_values(self.store.backend(), sql, [workspace.into(), principal.into(), now.micros().into()]);
        let rows = self.bounded(self.inner.query_all_raw(statement)).await?;
        let mut held = Vec::new();
        for row in rows {
            held.extend(entity::split::<Scope>("token.scopes", &row.try_get_by_index::<String>(0).map_err(translate)?)?);
        }
        Ok(held)
    }

    /// As [`Tx::live_tokens`], every token of a login session; of one principal if it is named.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn live_session(
        &self,
        workspace: &str,
        session_id: &str,
        principal: Option<&str>,
        now: Time,
    ) -> Result<Vec<(Token, Vec<Digest>)>> {
        let condition = Condition::all()
            .add(token::Column::Workspace.eq(workspace))
            .add(token::Column::SessionId.eq(session_id))
            .add(token::Column::SessionId.ne(""))
            .add_option(principal.map(|principal| token::Column::Principal.eq(principal)));
        self.live(condition, now).await
    }

    async fn live(&self, condition: Condition, now: Time) -> Result<Vec<(Token, Vec<Digest>)>> {
        let query = token::Entity::find()
            .filter(condition)
            .filter(token::Column::DeleteTime.is_null())
            .filter(token::Column::State.ne(entity::state_number(State::Revoked)))
            .filter(token::Column::ExpireTime.gt(now.micros()))
            .order_by_asc(token::Column::CreateTime);
        let rows = self.bounded(query.find_also_related(usage::Entity).all(&self.inner)).await?;
        rows.into_iter().map(|(row, usage)| with_digests(row, usage)).collect()
    }

    /// The token behind a digest, and whether the digest is that of its present secret (and not of the one before), if it is not deleted.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn token_of_digest(&self, digest: &Digest) -> Result<Option<(Token, Vec<Digest>, bool)>> {
        for (column, is_present) in [(token::Column::Digest, true), (token::Column::PreviousDigest, false)] {
            let query = token::Entity::find().filter(column.eq(digest.as_bytes().to_vec())).filter(token::Column::DeleteTime.is_null());
            if let Some((row, usage)) = self.bounded(query.find_also_related(usage::Entity).one(&self.inner)).await? {
                let (token, digests) = with_digests(row, usage)?;
                return Ok(Some((token, digests, is_present)));
            }
        }
        Ok(None)
    }

    /// Ends the grace of a token's secret before the present one.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn end_grace(&mut self, token: &Token, digests: &[Digest]) -> Result<()> {
        self.touch_token(token.id, &token.workspace, digests);
        let sql = "UPDATE token SET previous_digest = NULL, previous_expire_time = NULL WHERE id = $1";
        self.execute(sql, vec![token.id.to_string().into()]).await.map(drop)
    }

    /// Adds a token.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn insert_token(&self, token: &Token, digest: &Digest) -> Result<()> {
        let row = entity::row_of(token, digest.as_bytes().to_vec()).into_active_model();
        self.bounded(token::Entity::insert(row).exec_without_returning(&self.inner)).await?;
        self.insert_audiences(token).await
    }

    async fn insert_audiences(&self, token: &Token) -> Result<()> {
        if token.audiences.is_empty() {
            return Ok(());
        }
        let rows = token.audiences.iter().map(|name| audience::ActiveModel {
            workspace: Set(token.workspace.clone()),
            audience: Set(name.clone()),
            token_id: Set(token.id.to_string()),
        });
        self.bounded(audience::Entity::insert_many(rows).exec_without_returning(&self.inner)).await.map(drop)
    }

    /// Writes what may change of a token: settings, expiry, state.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn update_token(&mut self, token: &Token, digests: &[Digest]) -> Result<()> {
        self.touch_token(token.id, &token.workspace, digests);
        let changed = token::ActiveModel {
            id: Set(token.id.to_string()),
            display_name: Set(token.display_name.clone()),
            state: Set(entity::state_number(token.state)),
            hint: Set(token.hint.clone()),
            scopes: Set(entity::join(&token.scopes)),
            is_root: Set(entity::is_root(token)),
            audiences: Set(token.audiences.join(" ")),
            allowed_cidrs: Set(entity::join(&token.allowed_cidrs)),
            metadata: Set(entity::metadata_text(&token.metadata)),
            update_time: Set(token.update_time.micros()),
            expire_time: Set(token.expire_time.micros()),
            revoke_time: Set(token.revoke_time.map(Time::micros)),
            revoke_reason: Set(token.revoke_reason.clone()),
            version: Set(token.version),
            ..Default::default()
        };
        self.bounded(token::Entity::update(changed).exec(&self.inner)).await.map(drop)
    }

    /// Ends tokens: those that were read, and no other that may have come since.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn revoke_tokens(&mut self, live: &[(Token, Vec<Digest>)], reason: &str, now: Time) -> Result<()> {
        for (token, digests) in live {
            self.touch_token(token.id, &token.workspace, digests);
        }
        for chunk in live.chunks(ROWS_MAX) {
            let places = (4..4 + chunk.len()).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
            let sql = format!(
                "UPDATE token SET state = $1, revoke_time = $2, update_time = $2, revoke_reason = $3, version = version + 1 WHERE id IN ({places})"
            );
            let mut values = vec![entity::state_number(State::Revoked).into(), now.micros().into(), reason.into()];
            values.extend(chunk.iter().map(|(token, _)| Value::from(token.id.to_string())));
            self.execute(&sql, values).await?;
        }
        Ok(())
    }

    /// Replaces a token's audiences in the list of the tokens of a product.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn replace_audiences(&self, token: &Token) -> Result<()> {
        let old = audience::Entity::delete_many().filter(audience::Column::TokenId.eq(token.id.to_string()));
        self.bounded(old.exec(&self.inner)).await?;
        self.insert_audiences(token).await
    }

    /// Gives a token a new secret; the present one stays good until `grace_time`, if that is set, and an earlier one dies.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn replace_digest(&self, id: TokenId, digest: &Digest, grace_time: Option<Time>) -> Result<()> {
        let previous = if grace_time.is_some() { "digest" } else { "NULL" };
        let sql = format!("UPDATE token SET previous_digest = {previous}, previous_expire_time = $1, digest = $2 WHERE id = $3");
        let values = vec![grace_time.map(Time::micros).into(), digest.as_bytes().to_vec().into(), id.to_string().into()];
        self.execute(&sql, values).await.map(drop)
    }

    /// The digests of a token, also of a deleted one, if it is of this workspace (nothing: of any).
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn digests(&self, id: TokenId, workspace: Option<&str>) -> Result<Vec<Digest>> {
        let condition = Condition::all().add_option(workspace.map(|workspace| token::Column::Workspace.eq(workspace)));
        let query = token::Entity::find_by_id(id.to_string()).filter(condition);
        let found = self.bounded(query.one(&self.inner)).await?;
        found.map_or(Ok(Vec::new()), |row| digests_of(&row))
    }

    /// Takes a token out of every list and look-up. The row stays for the audit.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn delete_token(&mut self, token: &Token, digests: &[Digest], now: Time) -> Result<()> {
        self.touch_token(token.id, &token.workspace, digests);
        let id = token.id.to_string();
        self.execute("DELETE FROM token_audience WHERE token_id = $1", vec![id.clone().into()]).await?;
        self.execute(
            "UPDATE token SET delete_time = $1, update_time = $1, version = version + 1 WHERE id = $2",
            vec![now.micros().into(), id.into()],
        )
        .await
        .map(drop)
    }

    /// Whether nothing was ever made in this store.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn is_empty(&self) -> Result<bool> {
        Ok(self.query_one("SELECT 1 FROM workspace LIMIT 1", vec![]).await?.is_none())
    }

    /// Writes audit rows.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn audit(&self, events: impl IntoIterator<Item = AuditEvent<'_>>) -> Result<()> {
        let rows = events.into_iter().map(AuditEvent::into_row).collect::<Result<Vec<_>>>()?;
        for chunk in rows.chunks(ROWS_MAX) {
            let rows = chunk.iter().cloned().map(sea_orm::IntoActiveModel::into_active_model);
            self.bounded(audit::Entity::insert_many(rows).exec_without_returning(&self.inner)).await?;
        }
        Ok(())
    }

    /// Claims a `request_id` for this transaction, or finds what was answered to it. A second call with it waits for the first.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn claim(&self, id: &[u8; 32], request: &[u8; 32], expire_time: Time, now: Time) -> Result<Claim> {
        let (id, request) = (id.to_vec(), request.to_vec());
        self.execute("DELETE FROM replay WHERE id = $1 AND expire_time <= $2", vec![id.clone().into(), now.micros().into()]).await?;
        let inserted = self
            .execute(
                "INSERT INTO replay (id, request, answer, expire_time) VALUES ($1, $2, $2, $3) ON CONFLICT (id) DO NOTHING",
                vec![id.clone().into(), request.clone().into(), expire_time.micros().into()],
            )
            .await?;
        if inserted == 1 {
            return Ok(Claim::Mine);
        }
        let row = self.query_one("SELECT request, answer FROM replay WHERE id = $1", vec![id.into()]).await?;
        let row = row.ok_or(Error::Overloaded("a call with the same request_id is just ending; try again"))?;
        let known: Vec<u8> = row.try_get_by_index(0).map_err(translate)?;
        if known != request {
            return Ok(Claim::Misused);
        }
        row.try_get_by_index(1).map(Claim::Answered).map_err(translate)
    }

    /// Keeps the sealed answer to a claimed `request_id`.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn keep_answer(&self, id: &[u8; 32], answer: Vec<u8>) -> Result<()> {
        self.execute("UPDATE replay SET answer = $1 WHERE id = $2", vec![answer.into(), id.to_vec().into()]).await.map(drop)
    }
}

fn with_digests(row: token::Model, usage: Option<usage::Model>) -> Result<(Token, Vec<Digest>)> {
    let digests = digests_of(&row)?;
    Ok((entity::token_of(row, usage)?, digests))
}

fn digests_of(row: &token::Model) -> Result<Vec<Digest>> {
    let digests = std::iter::once(&row.digest).chain(&row.previous_digest);
    digests.map(|bytes| Digest::from_slice(bytes).ok_or_else(|| damaged("token.digest"))).collect()
}

/// A subject as it stands in the log of changes.
pub(super) fn logged(subject: &Subject) -> (i16, Vec<u8>) {
    match subject {
        Subject::Token(digest) => (CHANGE_OF_TOKEN, digest.as_bytes().to_vec()),
        // No id of a workspace holds a slash.
        Subject::Principal { workspace, id } => (CHANGE_OF_PRINCIPAL, format!("{workspace}/{id}").into_bytes()),
        Subject::Workspace(id) => (CHANGE_OF_WORKSPACE, id.as_bytes().to_vec()),
    }
}

/// What stands in the log of changes.
pub(super) fn subject_of(kind: i16, subject: &[u8]) -> Option<Subject> {
    let text = || std::str::from_utf8(subject).ok();
    match kind {
        CHANGE_OF_TOKEN => Digest::from_slice(subject).map(Subject::Token),
        CHANGE_OF_PRINCIPAL => {
            text()?.split_once('/').map(|(workspace, id)| Subject::Principal { workspace: workspace.to_owned(), id: id.to_owned() })
        }
        CHANGE_OF_WORKSPACE => text().map(|id| Subject::Workspace(id.to_owned())),
        _ => None,
    }
}
