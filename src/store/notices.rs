//! What is told of tokens: which have reached a step, what waits to be delivered, which faults stand.
//!
//! Invariant: of several servers that tell a step of a token at once, one does (test `each_step_is_told_once_whoever_ticks`).

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use sea_orm::{
    ActiveValue::Set,
    ColumnTrait as _, ConnectionTrait as _, DbBackend, EntityTrait as _, Iterable as _, QueryFilter as _, QueryOrder as _, QueryResult,
    QuerySelect as _, Statement, Value,
    sea_query::{Condition, Expr},
};
use serde_json::json;

use super::{
    Store, Tx, damaged,
    entity::{fault, notice},
    translate,
};
use crate::{
    ambient::Time,
    error::Result,
    notice::{Channel, Event, Item, Notice, Wishes},
    token::TokenId,
};

/// Tokens near their end that one statement looks at.
const NEAR_MAX: u64 = 20_000;
/// Rows of one statement: below the databases' limits on parameters.
const ROWS_MAX: usize = 500;
/// Secrets of a webhook that sign at once.
const SECRETS_MAX: u32 = 5;
/// A fault is true as long as this holds.
const TRUE_FAULT: &str = "t.id = f.token_id AND t.expire_time = f.expire_time AND t.delete_time IS NULL AND t.state <> 3";
/// A fault is shown as long as this holds.
const WANTED_FAULT: &str = "w.raise_faults AND w.delete_time IS NULL";
/// Bytes of one statement.
const BYTES_MAX: usize = 1 << 20;
/// Tokens of a notice that are shown.
const TOKENS_SHOWN_MAX: usize = 100;

/// A token that has reached a step, and where its owner gets mail.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The token.
    pub item: Item,
    /// Empty: nowhere.
    pub email: String,
}

/// A notice that was taken up for an attempt.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The notice.
    pub notice: Notice,
    /// How often it was tried, this attempt included.
    pub attempts: i64,
    /// When no further attempt is made.
    pub give_up_time: Time,
}

/// What became of a notice that was taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It was delivered, or is not true any more.
    Done,
    /// It is tried again at this instant; why it failed.
    Again(Time, String),
    /// It is not tried again; why.
    Dead(String),
}

/// A notice as it is shown.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the proto's comments are these fields' documentation")]
pub struct NoticeRecord {
    pub id: String,
    pub workspace: String,
    pub event: Event,
    pub channel: Channel,
    pub recipient: String,
    pub token_ids: Vec<String>,
    pub token_count: i64,
    pub create_time: Time,
    pub is_dead: bool,
    pub attempts: i64,
    pub due_time: Time,
    pub last_error: String,
}

/// A step that a token has reached.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The token.
    pub token_id: TokenId,
    /// When it ends.
    pub expire_time: Time,
    /// The step.
    pub days_before: u16,
}

/// Which faults to list. Everything that is said must hold.
#[derive(Clone, Debug)]
pub struct FaultFilter {
    /// Of this workspace.
    pub workspace: String,
    /// Of this principal's tokens.
    pub principal: Option<String>,
    /// Of this token.
    pub token_id: Option<TokenId>,
    /// Only those that nobody takes care of.
    pub unacknowledged_only: bool,
}

/// A fault as it is shown.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the proto's comments are these fields' documentation")]
pub struct FaultRecord {
    pub id: String,
    pub workspace: String,
    pub token_id: TokenId,
    pub display_name: String,
    pub hint: String,
    pub principal: String,
    pub days_before: u16,
    pub expire_time: Time,
    pub raise_time: Time,
    pub acknowledge_time: Option<Time>,
    pub acknowledged_by: String,
}

/// How many faults stand.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "two times two words")]
pub struct FaultCounts {
    pub expiring: i64,
    pub expiring_acknowledged: i64,
    pub expired: i64,
    pub expired_acknowledged: i64,
}

impl Store {
    /// The workspaces that want to be told something, without those that are suspended.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn wishes(&self) -> Result<Vec<(String, Wishes)>> {
        let sql =
            "SELECT id, notices, raise_faults FROM workspace WHERE notices <> '' AND delete_time IS NULL AND NOT suspended ORDER BY id";
        let rows = self.reading("notices", self.reader.query_all_raw(Statement::from_string(self.backend(), sql))).await?;
        let read = |row: &QueryResult| Ok((text(row, 0)?, wishes_of(&text(row, 1)?, row.try_get_by_index(2).map_err(translate)?)?));
        let mut wishes: Vec<(String, Wishes)> = rows.iter().map(read).collect::<Result<_>>()?;
        wishes.retain(|(_, wishes)| wishes.is_on());
        Ok(wishes)
    }

    /// Tokens of a workspace that have reached a step that was not told on all ways, of the next some with an end after the given place; and the place where the rest begins,
    /// if there is a rest.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn near_end(
        &self,
        workspace: &str,
        wishes: &Wishes,
        after: (Time, &str),
        now: Time,
    ) -> Result<(Vec<TokenId>, Option<(Time, String)>)> {
        let mut values: Vec<Value> = vec![workspace.into(), wishes.horizon(now).micros().into(), after.0.micros().into(), after.1.into()];
        let mut steps = wishes.days_before.clone();
        steps.sort_unstable();
        let mut step = String::new();
        for days in steps {
            values.push((now + Duration::from_hours(24) * u32::from(days)).micros().into());
            let _ = write!(step, "WHEN n.expire_time <= ${} THEN {days} ", values.len());
        }
        let ways = wishes.ways();
        // The sum keeps PostgreSQL away from an index that leads through every principal.
        let sql = format!(
            "WITH n AS MATERIALIZED (SELECT id, expire_time FROM token WHERE workspace = $1 AND kind = 1 AND delete_time IS NULL AND state + 0 <> 3 \
             AND expire_time <= $2 AND (expire_time, id) > ($3, $4) ORDER BY expire_time, id LIMIT {NEAR_MAX}) \
             SELECT n.id, n.expire_time, FALSE FROM n LEFT JOIN notice_mark m ON m.token_id = n.id AND m.expire_time = n.expire_time \
             WHERE m.days_before IS NULL OR m.days_before > CASE {step}ELSE 32767 END \
             OR ((m.told & {ways}) <> {ways} AND m.days_before = CASE {step}ELSE 32767 END) UNION ALL \
             SELECT l.id, l.expire_time, TRUE FROM (SELECT id, expire_time FROM n ORDER BY expire_time, id LIMIT 1 OFFSET {}) AS l",
            NEAR_MAX - 1
        );
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        let rows = self.reading("notices_scan", self.reader.query_all_raw(statement)).await?;
        let (mut ids, mut rest) = (Vec::new(), None);
        for row in &rows {
            if row.try_get_by_index::<bool>(2).map_err(translate)? {
                rest = Some((time(row, 1)?, text(row, 0)?));
            } else {
                ids.push(token_id(row, 0)?);
            }
        }
        Ok((ids, rest))
    }

    /// Of these tokens those that live, with their ends and the nearest steps that were told of them.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn told_steps(&self, ids: &[TokenId]) -> Result<Vec<(TokenId, Time, u16)>> {
        let mut told = Vec::with_capacity(ids.len());
        for chunk in ids.chunks(ROWS_MAX) {
            let sql = format!(
                "SELECT t.id, t.expire_time, m.days_before FROM token t \
                 JOIN notice_mark m ON m.token_id = t.id AND m.expire_time = t.expire_time \
                 WHERE t.id IN ({}) AND t.delete_time IS NULL AND t.state <> 3",
                places(1, chunk.len())
            );
            let statement = Statement::from_sql_and_values(self.backend(), sql, chunk.iter().map(|id| Value::from(id.to_string())));
            for row in self.reading("notices", self.reader.query_all_raw(statement)).await? {
                told.push((token_id(&row, 0)?, time(&row, 1)?, days(number(&row, 2)?)?));
            }
        }
        Ok(told)
    }

    /// Workspaces that something waits for that is due, those that have waited longest first.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn due_destinations(&self, channel: Channel, now: Time) -> Result<Vec<String>> {
        let sql =
            "SELECT workspace FROM notice WHERE channel = $1 AND NOT dead AND due_time <= $2 GROUP BY workspace ORDER BY MIN(due_time)";
        let statement = Statement::from_sql_and_values(self.backend(), sql, [channel_number(channel).into(), now.micros().into()]);
        let rows = self.reading("notices_due", self.reader.query_all_raw(statement)).await?;
        rows.iter().map(|row| text(row, 0)).collect()
    }

    /// Takes up notices that are due, which nobody else takes up until the lease ends. `claim` is this caller's own.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn claim_notices(
        &self,
        channel: Channel,
        workspace: &str,
        claim: &str,
        limit: u64,
        now: Time,
        lease_end: Time,
    ) -> Result<Vec<Claimed>> {
        let lock = if self.backend() == DbBackend::Postgres { "FOR UPDATE SKIP LOCKED" } else { "" };
        let sql = format!(
            "WITH due AS MATERIALIZED (SELECT id FROM notice WHERE channel = $1 AND workspace = $2 AND NOT dead AND due_time <= $3 \
             ORDER BY due_time, id LIMIT {limit} {lock}) \
             UPDATE notice SET due_time = $4, claim = $5, attempts = attempts + 1 WHERE id IN (SELECT id FROM due) \
             RETURNING id, workspace, event, recipient, items, actor, reason, create_time, attempts, give_up_time, to_owner, token_count"
        );
        let values: [Value; 5] =
            [channel_number(channel).into(), workspace.into(), now.micros().into(), lease_end.micros().into(), claim.into()];
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        let rows = self.writing("notices_claim", self.writer.query_all_raw(statement)).await?;
        rows.iter()
            .map(|row| {
                let items = items_of(&text(row, 4)?)?;
                let notice = Notice {
                    id: text(row, 0)?,
                    workspace: text(row, 1)?,
                    event: Event::of(&text(row, 2)?).ok_or_else(|| damaged("notice.event"))?,
                    channel,
                    recipient: text(row, 3)?,
                    to_owner: row.try_get_by_index(10).map_err(translate)?,
                    unnamed: usize::try_from(number(row, 11)?).unwrap_or(0).saturating_sub(items.len()),
                    items,
                    actor: text(row, 5)?,
                    reason: text(row, 6)?,
                    create_time: time(row, 7)?,
                };
                Ok(Claimed { notice, attempts: number(row, 8)?, give_up_time: time(row, 9)? })
            })
            .collect()
    }

    /// Writes what became of notices. What was delivered is gone whoever holds it now; the rest counts only for whoever still holds the claim.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: the lease then ends by itself, and what was delivered is delivered once more.
    pub async fn settle_notices(&self, claim: &str, settled: &[(String, Settled)], now: Time) -> Result<()> {
        let tx = self.begin_unnumbered().await?;
        let done: Vec<Value> =
            settled.iter().filter(|(_, settled)| *settled == Settled::Done).map(|(id, _)| Value::from(id.as_str())).collect();
        if !done.is_empty() {
            tx.execute(&format!("DELETE FROM notice WHERE id IN ({})", places(1, done.len())), done).await?;
        }
        for (id, settled) in settled {
            let (set, values): (&str, Vec<Value>) = match settled {
                Settled::Done => continue,
                Settled::Again(due, error) => ("due_time = $3, last_error = $4", vec![due.micros().into(), error.as_str().into()]),
                Settled::Dead(error) => ("dead = TRUE, last_error = $3", vec![error.as_str().into()]),
            };
            let values = [Value::from(id.as_str()), claim.into()].into_iter().chain(values).collect();
            tx.execute(&format!("UPDATE notice SET claim = '', {set} WHERE id = $1 AND claim = $2"), values).await?;
        }
        tx.commit(now).await
    }

    /// Gives up what has waited too long; says how many that were.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn give_up(&self, channel: Channel, workspace: &str, error: &str, now: Time) -> Result<u64> {
        let sql = "UPDATE notice SET dead = TRUE, claim = '', last_error = $4 WHERE channel = $1 AND workspace = $2 AND NOT dead AND give_up_time <= $3";
        let values: [Value; 4] = [channel_number(channel).into(), workspace.into(), now.micros().into(), error.into()];
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        self.writing("notices_settle", async { self.writer.execute_raw(statement).await.map(|done| done.rows_affected()) }).await
    }

    /// The sealed secrets of a workspace's webhook that are in force, the latest first.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn webhook_secrets(&self, workspace: &str, now: Time) -> Result<Vec<Vec<u8>>> {
        let sql =
            format!("SELECT sealed FROM webhook_secret WHERE workspace = $1 AND expire_time > $2 ORDER BY id DESC LIMIT {SECRETS_MAX}");
        let statement = Statement::from_sql_and_values(self.backend(), sql, [workspace.into(), now.micros().into()]);
        let rows = self.reading("notices", self.reader.query_all_raw(statement)).await?;
        rows.iter().map(|row| row.try_get_by_index(0).map_err(translate)).collect()
    }

    /// A page of faults, the latest first, those after the given one if there is one.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn faults(&self, filter: &FaultFilter, after: Option<&str>, limit: u64) -> Result<Vec<FaultRecord>> {
        let mut values: Vec<Value> = vec![filter.workspace.as_str().into()];
        let mut conditions = String::new();
        let token_id = filter.token_id.map(|id| id.to_string());
        for (condition, value) in [("f.id <", after), ("t.principal =", filter.principal.as_deref()), ("f.token_id =", token_id.as_deref())]
        {
            if let Some(value) = value {
                values.push(value.into());
                let _ = write!(conditions, " AND {condition} ${}", values.len());
            }
        }
        if filter.unacknowledged_only {
            conditions.push_str(" AND f.acknowledge_time IS NULL");
        }
        let sql = format!("{FAULTS} AND f.workspace = $1{conditions} ORDER BY f.id DESC LIMIT {limit}");
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        let rows = self.reading("faults", self.reader.query_all_raw(statement)).await?;
        rows.iter().map(fault_of).collect()
    }

    /// How many faults stand in all workspaces.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn fault_counts(&self, now: Time) -> Result<FaultCounts> {
        let sql = format!(
            "SELECT COUNT(CASE WHEN f.expire_time > $1 AND f.acknowledge_time IS NULL THEN 1 END), \
             COUNT(CASE WHEN f.expire_time > $1 AND f.acknowledge_time IS NOT NULL THEN 1 END), \
             COUNT(CASE WHEN f.expire_time <= $1 AND f.acknowledge_time IS NULL THEN 1 END), \
             COUNT(CASE WHEN f.expire_time <= $1 AND f.acknowledge_time IS NOT NULL THEN 1 END) FROM fault f \
             WHERE COALESCE((SELECT TRUE FROM token t JOIN workspace w ON w.id = f.workspace WHERE {TRUE_FAULT} AND {WANTED_FAULT}), FALSE)"
        );
        // The look into `token` is no join, which the databases might begin with all tokens.
        let statement = Statement::from_sql_and_values(self.backend(), sql, [now.micros().into()]);
        let row = self.reading("faults", self.reader.query_one_raw(statement)).await?.ok_or_else(|| damaged("fault"))?;
        Ok(FaultCounts {
            expiring: number(&row, 0)?,
            expiring_acknowledged: number(&row, 1)?,
            expired: number(&row, 2)?,
            expired_acknowledged: number(&row, 3)?,
        })
    }

    /// Removes faults that are not true any more, of the next `limit` after this one. Says where the rest begins; nothing: at the beginning again.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn sweep_faults(&self, after: &str, limit: u64, now: Time) -> Result<Option<String>> {
        let sql = format!(
            "SELECT f.id, f.token_id, t.id IS NULL FROM (SELECT id, token_id, expire_time FROM fault WHERE id > $1 ORDER BY id LIMIT {limit}) AS f \
             LEFT JOIN token t ON {TRUE_FAULT} ORDER BY f.id"
        );
        let statement = Statement::from_sql_and_values(self.backend(), sql, [after.into()]);
        let rows = self.reading("faults", self.reader.query_all_raw(statement)).await?;
        let mut cleared = Vec::new();
        for row in &rows {
            if row.try_get_by_index::<bool>(2).map_err(translate)? {
                cleared.push((text(row, 0)?, text(row, 1)?));
            }
        }
        if !cleared.is_empty() {
            let tx = self.begin_unnumbered().await?;
            tx.remove_faults(&cleared).await?;
            tx.commit(now).await?;
        }
        let is_last = rows.len() < usize::try_from(limit).unwrap_or(usize::MAX);
        if is_last { Ok(None) } else { rows.last().map(|row| text(row, 0)).transpose() }
    }

    /// A page of notices that are not delivered, the latest first, those after the given one if there is one.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn notices(&self, workspace: &str, is_dead: Option<bool>, after: Option<&str>, limit: u64) -> Result<Vec<NoticeRecord>> {
        let condition = Condition::all()
            .add(notice::Column::Workspace.eq(workspace))
            .add_option(is_dead.map(|is_dead| notice::Column::Dead.eq(is_dead)))
            .add_option(after.map(|id| notice::Column::Id.lt(id)));
        let query = without_items(notice::Entity::find()).filter(condition).order_by_desc(notice::Column::Id).limit(limit);
        let rows = self.reading("notices", query.into_model::<notice::Model>().all(&self.reader)).await?;
        rows.into_iter().map(notice_of).collect()
    }

    /// How many notices wait, and how many were given up.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn notice_counts(&self) -> Result<Vec<(Channel, bool, i64)>> {
        // Each from an index of its own; neither sorts.
        const COUNT: &str = "COUNT(CASE WHEN channel = 1 THEN 1 END), COUNT(CASE WHEN channel = 2 THEN 1 END) FROM notice";
        let sql = format!("SELECT FALSE, {COUNT} WHERE NOT dead UNION ALL SELECT TRUE, {COUNT} WHERE dead");
        let rows = self.reading("notices", self.reader.query_all_raw(Statement::from_string(self.backend(), sql))).await?;
        let mut counts = Vec::new();
        for row in &rows {
            let is_dead = row.try_get_by_index(0).map_err(translate)?;
            counts.extend([(Channel::Mail, is_dead, number(row, 1)?), (Channel::Webhook, is_dead, number(row, 2)?)]);
        }
        Ok(counts)
    }

    /// Removes notices that were given up and are older than this, at most `limit`.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn purge_notices(&self, before: Time, limit: u64) -> Result<u64> {
        let sql = format!(
            "DELETE FROM notice WHERE id IN (SELECT id FROM notice WHERE dead AND create_time < $1 ORDER BY create_time LIMIT {limit})"
        );
        let statement = Statement::from_sql_and_values(self.backend(), sql, [before.micros().into()]);
        self.writing("purge", async { self.writer.execute_raw(statement).await.map(|done| done.rows_affected()) }).await
    }
}

/// SQLite begins a `CROSS JOIN` with its first table: there are fewer faults than tokens, whatever it has counted.
const FAULTS: &str = "SELECT f.id, f.workspace, f.token_id, t.display_name, t.hint, t.principal, f.days_before, f.expire_time, f.raise_time, \
                      f.acknowledge_time, f.acknowledged_by FROM fault f CROSS JOIN token t \
                      CROSS JOIN workspace w WHERE t.id = f.token_id AND t.expire_time = f.expire_time AND t.delete_time IS NULL AND t.state <> 3 \
                      AND w.id = f.workspace AND w.raise_faults AND w.delete_time IS NULL";

impl Tx<'_> {
    /// Of these tokens those that live and can end; nobody changes them until this transaction ends. What somebody is just changing is left out.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn followed(&self, ids: &[TokenId]) -> Result<Vec<Followed>> {
        let lock = if self.store().backend() == DbBackend::Postgres { "FOR SHARE OF t SKIP LOCKED" } else { "" };
        let sql = format!(
            "SELECT t.id, t.display_name, t.hint, t.principal, COALESCE(p.display_name, t.principal), t.audiences, t.create_time, t.expire_time, \
             u.last_used_time, CASE WHEN COALESCE(p.suspended, TRUE) THEN '' ELSE p.email END FROM token t \
             LEFT JOIN principal p ON p.workspace = t.workspace AND p.id = t.principal LEFT JOIN token_usage u ON u.token_id = t.id \
             WHERE t.id IN ({}) AND t.kind = 1 AND t.delete_time IS NULL AND t.state <> 3 ORDER BY t.id {lock}",
            places(1, ids.len())
        );
        let statement = Statement::from_sql_and_values(self.store().backend(), sql, ids.iter().map(|id| Value::from(id.to_string())));
        let rows = self.bounded(self.inner().query_all_raw(statement)).await?;
        rows.iter()
            .map(|row| {
                let last_used: Option<i64> = row.try_get_by_index(8).map_err(translate)?;
                let item = Item {
                    token_id: token_id(row, 0)?,
                    display_name: text(row, 1)?,
                    hint: text(row, 2)?,
                    principal: text(row, 3)?,
                    principal_name: text(row, 4)?,
                    audiences: text(row, 5)?.split_ascii_whitespace().map(str::to_owned).collect(),
                    create_time: time(row, 6)?,
                    expire_time: time(row, 7)?,
                    last_used_time: last_used.map(Time::from_micros),
                    days_before: None,
                };
                Ok(Followed { item, email: text(row, 9)? })
            })
            .collect()
    }

    /// Notes steps as told on these ways; says of which tokens they were not told before, nor a nearer one, and on which ways they are told now. The tokens must be in
    /// the order of their ids: others may note the same ones.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn mark_steps(&self, steps: &[Step], ways: i32) -> Result<Vec<(TokenId, i32)>> {
        let mut marked = Vec::with_capacity(steps.len());
        for chunk in steps.chunks(ROWS_MAX) {
            // Whoever comes second waits here for the first, and sees then what that one has told.
            let new = self.write_marks(chunk.iter().map(|step| (*step, 0)), "DO NOTHING").await?;
            let known = self.held_marks(chunk).await?;
            let mut changed = Vec::new();
            for step in chunk {
                let Some((known, told)) = known.get(&step.token_id) else { continue };
                let is_same_end = known.expire_time == step.expire_time;
                let told = if is_same_end && known.days_before == step.days_before { *told } else { 0 };
                let is_overtaken = is_same_end && known.days_before < step.days_before;
                let is_new = new.contains(&step.token_id) || !is_same_end || known.days_before > step.days_before;
                if !is_overtaken && (is_new || ways & !told != 0) {
                    changed.push((*step, told | ways));
                    marked.push((step.token_id, ways & !told));
                }
            }
            let update =
                "(token_id) DO UPDATE SET expire_time = excluded.expire_time, days_before = excluded.days_before, told = excluded.told";
            self.write_marks(changed.into_iter(), update).await?;
        }
        Ok(marked)
    }

    async fn write_marks(&self, marks: impl ExactSizeIterator<Item = (Step, i32)>, conflict: &str) -> Result<Vec<TokenId>> {
        if marks.len() == 0 {
            return Ok(Vec::new());
        }
        let rows = (0..marks.len()).map(|row| format!("({})", places(4 * row + 1, 4))).collect::<Vec<_>>().join(", ");
        let sql = format!(
            "INSERT INTO notice_mark (token_id, expire_time, days_before, told) VALUES {rows} ON CONFLICT {conflict} RETURNING token_id"
        );
        let values = marks.flat_map(|(step, told)| {
            [step.token_id.to_string().into(), step.expire_time.micros().into(), i32::from(step.days_before).into(), Value::from(told)]
        });
        let statement = Statement::from_sql_and_values(self.store().backend(), sql, values);
        let rows = self.bounded(self.inner().query_all_raw(statement)).await?;
        rows.iter().map(|row| token_id(row, 0)).collect()
    }

    /// The marks of these tokens, which nobody else changes until this transaction ends.
    async fn held_marks(&self, steps: &[Step]) -> Result<HashMap<TokenId, (Step, i32)>> {
        let lock = if self.store().backend() == DbBackend::Postgres { "FOR UPDATE" } else { "" };
        let sql = format!(
            "SELECT token_id, expire_time, days_before, told FROM notice_mark WHERE token_id IN ({}) ORDER BY token_id {lock}",
            places(1, steps.len())
        );
        let values = steps.iter().map(|step| Value::from(step.token_id.to_string()));
        let statement = Statement::from_sql_and_values(self.store().backend(), sql, values);
        let rows = self.bounded(self.inner().query_all_raw(statement)).await?;
        rows.iter()
            .map(|row| {
                let step = Step { token_id: token_id(row, 0)?, expire_time: time(row, 1)?, days_before: days(number(row, 2)?)? };
                let told = i32::try_from(number(row, 3)?).map_err(|_| damaged("notice_mark.told"))?;
                Ok((step.token_id, (step, told)))
            })
            .collect()
    }

    /// Raises a fault for each of these steps, under these ids.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn raise_faults(&self, workspace: &str, faults: &[(String, Step)], now: Time) -> Result<()> {
        for chunk in faults.chunks(ROWS_MAX) {
            let rows = chunk.iter().map(|(id, step)| fault::ActiveModel {
                id: Set(id.clone()),
                workspace: Set(workspace.to_owned()),
                token_id: Set(step.token_id.to_string()),
                days_before: Set(i32::from(step.days_before)),
                expire_time: Set(step.expire_time.micros()),
                raise_time: Set(now.micros()),
                acknowledge_time: Set(None),
                acknowledged_by: Set(String::new()),
            });
            // An end that was moved away and back has its fault already.
            let insert = fault::Entity::insert_many(rows).on_conflict(sea_orm::sea_query::OnConflict::new().do_nothing().to_owned());
            self.bounded(insert.exec_without_returning(self.inner())).await?;
        }
        Ok(())
    }

    async fn remove_faults(&self, faults: &[(String, String)]) -> Result<()> {
        for chunk in faults.chunks(ROWS_MAX) {
            let ids = chunk.iter().map(|(id, _)| Value::from(id.as_str())).collect();
            // Looked at once more: an end may have come back meanwhile.
            let sql = format!(
                "DELETE FROM fault WHERE id IN ({}) AND NOT EXISTS (SELECT 1 FROM token t WHERE t.id = fault.token_id \
                 AND t.expire_time = fault.expire_time AND t.delete_time IS NULL AND t.state <> 3)",
                places(1, chunk.len())
            );
            self.execute(&sql, ids).await?;
            // An end that comes back later is told anew.
            let tokens = chunk.iter().map(|(_, token_id)| Value::from(token_id.as_str())).collect();
            let sql = format!(
                "DELETE FROM notice_mark WHERE token_id IN ({}) AND NOT EXISTS \
                 (SELECT 1 FROM token t WHERE t.id = notice_mark.token_id AND t.expire_time = notice_mark.expire_time)",
                places(1, chunk.len())
            );
            self.execute(&sql, tokens).await?;
        }
        Ok(())
    }

    /// Adds notices, which are delivered when this transaction was committed.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn add_notices(&self, notices: &[Notice], give_up_time: Time) -> Result<()> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        for notice in notices {
            let row = row_of(notice, give_up_time);
            bytes += row.items.len();
            rows.push(row);
            if rows.len() == ROWS_MAX || bytes >= BYTES_MAX {
                self.insert_notices(std::mem::take(&mut rows)).await?;
                bytes = 0;
            }
        }
        self.insert_notices(rows).await
    }

    async fn insert_notices(&self, rows: Vec<notice::Model>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let insert = notice::Entity::insert_many(rows.into_iter().map(sea_orm::IntoActiveModel::into_active_model));
        self.bounded(insert.exec_without_returning(self.inner())).await.map(drop)
    }

    /// The names and mail addresses of principals; no address of those that are suspended.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn contacts(&self, workspace: &str, ids: &[&str]) -> Result<Vec<(String, String, String)>> {
        let mut contacts = Vec::with_capacity(ids.len());
        for chunk in ids.chunks(ROWS_MAX) {
            let sql = format!(
                "SELECT id, display_name, CASE WHEN suspended THEN '' ELSE email END FROM principal WHERE workspace = $1 AND id IN ({})",
                places(2, chunk.len())
            );
            let values = std::iter::once(workspace).chain(chunk.iter().copied()).map(Value::from);
            let statement = Statement::from_sql_and_values(self.store().backend(), sql, values);
            for row in self.bounded(self.inner().query_all_raw(statement)).await? {
                contacts.push((text(&row, 0)?, text(&row, 1)?, text(&row, 2)?));
            }
        }
        Ok(contacts)
    }

    /// A fault that stands, if it is of this workspace (nothing: of any).
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn fault(&self, id: &str, workspace: Option<&str>) -> Result<Option<FaultRecord>> {
        let row = self.query_one(&format!("{FAULTS} AND f.id = $1"), vec![id.into()]).await?;
        let fault = row.as_ref().map(fault_of).transpose()?;
        Ok(fault.filter(|fault| workspace.is_none_or(|workspace| *fault.workspace == *workspace)))
    }

    /// Notes who takes care of a fault, if nobody does; says whether that was so.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn acknowledge_fault(&self, id: &str, principal: &str, now: Time) -> Result<bool> {
        let sql = "UPDATE fault SET acknowledge_time = $1, acknowledged_by = $2 WHERE id = $3 AND acknowledge_time IS NULL";
        self.execute(sql, vec![now.micros().into(), principal.into(), id.into()]).await.map(|rows| rows == 1)
    }

    /// A notice that is not delivered, if it is of this workspace (nothing: of any).
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn notice(&self, id: &str, workspace: Option<&str>) -> Result<Option<NoticeRecord>> {
        let condition = Condition::all().add_option(workspace.map(|workspace| notice::Column::Workspace.eq(workspace)));
        let query = without_items(notice::Entity::find_by_id(id.to_owned())).filter(condition);
        self.bounded(query.into_model::<notice::Model>().one(self.inner())).await?.map(notice_of).transpose()
    }

    /// Makes a notice due now, and gives it time until `give_up_time`. What becomes of an attempt that is under way counts only if it is delivered.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn retry_notice(&self, id: &str, give_up_time: Time, now: Time) -> Result<()> {
        let sql = "UPDATE notice SET dead = FALSE, give_up_time = $1, due_time = $2, claim = '' WHERE id = $3";
        self.execute(sql, vec![give_up_time.micros().into(), now.micros().into(), id.into()]).await.map(drop)
    }

    /// Lets the secrets of a workspace's webhook end at this instant, if they do not end sooner; says how many that were. Forgets those that have ended.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn retire_webhook_secrets(&self, workspace: &str, end: Time, now: Time) -> Result<u64> {
        let gone = "DELETE FROM webhook_secret WHERE workspace = $1 AND expire_time <= $2";
        self.execute(gone, vec![workspace.into(), now.micros().into()]).await?;
        let sql = "UPDATE webhook_secret SET expire_time = $1 WHERE workspace = $2 AND expire_time > $1";
        self.execute(sql, vec![end.micros().into(), workspace.into()]).await
    }

    /// Keeps a new secret of a workspace's webhook.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn insert_webhook_secret(&self, id: &str, workspace: &str, sealed: &[u8]) -> Result<()> {
        let sql = "INSERT INTO webhook_secret (id, workspace, sealed, expire_time) VALUES ($1, $2, $3, $4)";
        let values = vec![id.into(), workspace.into(), sealed.to_vec().into(), Time::NEVER.micros().into()];
        self.execute(sql, values).await.map(drop)
    }
}

fn places(first: usize, count: usize) -> String {
    (first..first + count).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ")
}

fn text(row: &QueryResult, index: usize) -> Result<String> {
    row.try_get_by_index(index).map_err(translate)
}

fn number(row: &QueryResult, index: usize) -> Result<i64> {
    // Columns of both widths.
    row.try_get_by_index::<i64>(index).or_else(|_| row.try_get_by_index::<i32>(index).map(i64::from)).map_err(translate)
}

fn time(row: &QueryResult, index: usize) -> Result<Time> {
    number(row, index).map(Time::from_micros)
}

fn token_id(row: &QueryResult, index: usize) -> Result<TokenId> {
    TokenId::parse(&text(row, index)?).ok_or_else(|| damaged("token.id"))
}

fn days(number: i64) -> Result<u16> {
    u16::try_from(number).map_err(|_| damaged("days_before"))
}

fn channel_number(channel: Channel) -> i16 {
    match channel {
        Channel::Mail => 1,
        Channel::Webhook => 2,
    }
}

fn channel_of(number: i16) -> Result<Channel> {
    Channel::ALL.into_iter().find(|channel| channel_number(*channel) == number).ok_or_else(|| damaged("notice.channel"))
}

fn fault_of(row: &QueryResult) -> Result<FaultRecord> {
    let acknowledge_time: Option<i64> = row.try_get_by_index(9).map_err(translate)?;
    Ok(FaultRecord {
        id: text(row, 0)?,
        workspace: text(row, 1)?,
        token_id: token_id(row, 2)?,
        display_name: text(row, 3)?,
        hint: text(row, 4)?,
        principal: text(row, 5)?,
        days_before: days(number(row, 6)?)?,
        expire_time: time(row, 7)?,
        raise_time: time(row, 8)?,
        acknowledge_time: acknowledge_time.map(Time::from_micros),
        acknowledged_by: text(row, 10)?,
    })
}

/// What a notice is about may be long: lists leave it out.
fn without_items(query: sea_orm::Select<notice::Entity>) -> sea_orm::Select<notice::Entity> {
    let columns = notice::Column::iter().filter(|column| !matches!(column, notice::Column::Items));
    query.select_only().columns(columns).column_as(Expr::val("[]"), "items")
}

fn row_of(notice: &Notice, give_up_time: Time) -> notice::Model {
    let shown = notice.items.iter().take(TOKENS_SHOWN_MAX).map(|item| item.token_id.to_string());
    notice::Model {
        id: notice.id.clone(),
        workspace: notice.workspace.clone(),
        channel: channel_number(notice.channel),
        event: notice.event.name().to_owned(),
        recipient: notice.recipient.clone(),
        to_owner: notice.to_owner,
        token_ids: shown.collect::<Vec<_>>().join(" "),
        token_count: i64::try_from(notice.items.len() + notice.unnamed).unwrap_or(i64::MAX),
        actor: notice.actor.clone(),
        reason: notice.reason.clone(),
        create_time: notice.create_time.micros(),
        dead: false,
        attempts: 0,
        due_time: notice.create_time.micros(),
        claim: String::new(),
        give_up_time: give_up_time.micros(),
        last_error: String::new(),
        items: items_text(&notice.items),
    }
}

fn notice_of(row: notice::Model) -> Result<NoticeRecord> {
    Ok(NoticeRecord {
        id: row.id,
        workspace: row.workspace,
        event: Event::of(&row.event).ok_or_else(|| damaged("notice.event"))?,
        channel: channel_of(row.channel)?,
        recipient: row.recipient,
        token_ids: row.token_ids.split_ascii_whitespace().map(str::to_owned).collect(),
        token_count: row.token_count,
        create_time: Time::from_micros(row.create_time),
        is_dead: row.dead,
        attempts: row.attempts,
        due_time: Time::from_micros(row.due_time),
        last_error: row.last_error,
    })
}

/// A token of a notice, in the order of the fields of [`Item`].
type ItemRow = (String, String, String, String, String, Vec<String>, i64, i64, Option<i64>, Option<u16>);

fn items_text(items: &[Item]) -> String {
    let row = |item: &Item| {
        json!([
            item.token_id.to_string(),
            item.display_name,
            item.hint,
            item.principal,
            item.principal_name,
            item.audiences,
            item.create_time.micros(),
            item.expire_time.micros(),
            item.last_used_time.map(Time::micros),
            item.days_before,
        ])
    };
    serde_json::Value::from(items.iter().map(row).collect::<Vec<_>>()).to_string()
}

fn items_of(text: &str) -> Result<Vec<Item>> {
    let rows: Vec<ItemRow> = serde_json::from_str(text).map_err(|_| damaged("notice.items"))?;
    let item =
        |(id, display_name, hint, principal, principal_name, audiences, create_time, expire_time, last_used, days_before): ItemRow| {
            Ok(Item {
                token_id: TokenId::parse(&id).ok_or_else(|| damaged("notice.items"))?,
                display_name,
                hint,
                principal,
                principal_name,
                audiences,
                create_time: Time::from_micros(create_time),
                expire_time: Time::from_micros(expire_time),
                last_used_time: last_used.map(Time::from_micros),
                days_before,
            })
        };
    rows.into_iter().map(item).collect()
}

/// What a workspace wants to be told, in the order of the fields of [`Wishes`], without `raise_faults`, which has a column of its own.
type WishesRow = (Vec<u16>, Vec<String>, bool, String, Vec<String>, String, i64);

/// The column of a workspace's wishes; nothing if they are as usual.
pub(super) fn wishes_text(wishes: &Wishes) -> String {
    if *wishes == (Wishes { since: wishes.since, ..Wishes::default() }) {
        return String::new();
    }
    let events: Vec<&str> = wishes.events.iter().map(|event| event.name()).collect();
    json!([wishes.days_before, wishes.emails, wishes.mail_owner, wishes.webhook_url, events, wishes.renew_url, wishes.since.micros(),])
        .to_string()
}

/// The wishes in these columns.
pub(super) fn wishes_of(text: &str, raise_faults: bool) -> Result<Wishes> {
    if text.is_empty() {
        return Ok(Wishes::default());
    }
    let row: WishesRow = serde_json::from_str(text).map_err(|_| damaged("workspace.notices"))?;
    let (days_before, emails, mail_owner, webhook_url, events, renew_url, since) = row;
    let events = events.iter().map(|name| Event::of(name).ok_or_else(|| damaged("workspace.notices"))).collect::<Result<_>>()?;
    let since = Time::from_micros(since);
    Ok(Wishes { days_before, raise_faults, emails, mail_owner, webhook_url, events, renew_url, since })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_of_wishes_is_read() {
        let wishes = Wishes {
            days_before: vec![3, 0],
            emails: vec!["a@example.com".to_owned()],
            events: vec![Event::Leaked],
            since: Time::from_micros(7),
            ..Wishes::default()
        };
        assert_eq!(wishes_of(&wishes_text(&wishes), false).expect("ours"), wishes);
        assert_eq!(wishes_text(&Wishes { since: Time::from_micros(7), ..Wishes::default() }), "");
        assert_eq!(wishes_of("", false).expect("nothing"), Wishes::default());
    }
}
