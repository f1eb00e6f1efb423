//! Audit rows: who changed what, from where. They are written in the transaction of the change and never changed.

use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, ExprTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Statement,
    sea_query::{Condition, Expr, Order},
};
use serde_json::{Map, Value};

use super::{Store, damaged, entity::audit};
use crate::{
    ambient::Time,
    caller::Caller,
    error::Result,
    token::{self, TokenId},
};

/// Which events to list. Everything that is said must hold.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    /// Of this workspace.
    pub workspace: String,
    /// About this token.
    pub token_id: Option<TokenId>,
    /// About this principal or its tokens.
    pub principal: Option<String>,
    /// Caused by this principal.
    pub actor: Option<String>,
    /// Of one of these methods; none: of any.
    pub methods: Vec<String>,
    /// At this instant or later.
    pub start_time: Option<Time>,
    /// Before this instant.
    pub end_time: Option<Time>,
}

/// An event as it is shown.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the proto's comments are these fields' documentation")]
pub struct AuditRecord {
    pub id: String,
    pub workspace: String,
    pub event_time: Time,
    pub method: String,
    pub code: String,
    pub actor_workspace: String,
    pub actor_principal: String,
    pub actor_token_id: String,
    pub actor_address: String,
    pub token_id: String,
    pub principal: String,
    pub reason: String,
    pub before: Option<Map<String, Value>>,
    pub after: Option<Map<String, Value>>,
}

impl Store {
    /// A page of events, the latest first, those after the given one if there is one.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn audit_events(&self, filter: &AuditFilter, after: Option<(Time, &str)>, limit: u64) -> Result<Vec<AuditRecord>> {
        let mut condition = Condition::all()
            .add(audit::Column::Workspace.eq(&filter.workspace))
            .add_option(filter.token_id.map(|id| audit::Column::TokenId.eq(id.to_string())))
            .add_option(filter.principal.as_ref().map(|id| audit::Column::Principal.eq(id)))
            .add_option(filter.actor.as_ref().map(|id| audit::Column::ActorPrincipal.eq(id)))
            .add_option(filter.start_time.map(|time| audit::Column::EventTime.gte(time.micros())))
            .add_option(filter.end_time.map(|time| audit::Column::EventTime.lt(time.micros())));
        if !filter.methods.is_empty() {
            condition = condition.add(audit::Column::Method.is_in(&filter.methods));
        }
        if let Some((time, id)) = after {
            let here = Expr::tuple([audit::Column::EventTime.into_expr(), audit::Column::Id.into_expr()]);
            condition = condition.add(here.lt(Expr::tuple([Expr::val(time.micros()), Expr::val(id)])));
        }
        let query = audit::Entity::find().filter(condition);
        let query = query.order_by(audit::Column::EventTime, Order::Desc).order_by(audit::Column::Id, Order::Desc).limit(limit);
        let rows = self.reading("audit", query.all(&self.reader)).await?;
        rows.into_iter().map(record).collect()
    }

    /// Writes events that are no part of a change: calls that were refused.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn add_audit_events(&self, events: impl IntoIterator<Item = AuditEvent<'_>>) -> Result<()> {
        let rows = events.into_iter().map(AuditEvent::into_row).collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            return Ok(());
        }
        let insert = audit::Entity::insert_many(rows.into_iter().map(sea_orm::IntoActiveModel::into_active_model));
        self.writing("audit", async { insert.exec_without_returning(&self.writer).await.map(drop) }).await
    }

    /// Removes events from before an instant, at most `limit`; says how many.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn purge_audit_events(&self, before: Time, limit: u64) -> Result<u64> {
        let sql = "DELETE FROM audit_event WHERE id IN (SELECT id FROM audit_event WHERE id < $1 ORDER BY id LIMIT $2)";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let statement = Statement::from_sql_and_values(self.backend(), sql, [token::event_floor(before).into(), limit.into()]);
        self.writing("purge", async { self.writer.execute_raw(statement).await.map(|done| done.rows_affected()) }).await
    }
}

fn record(row: audit::Model) -> Result<AuditRecord> {
    let settings = |text: Option<String>| {
        let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
        parsed.map_err(|_| damaged("audit_event.before or after"))
    };
    Ok(AuditRecord {
        id: row.id,
        workspace: row.workspace,
        event_time: Time::from_micros(row.event_time),
        method: row.method,
        code: row.code,
        actor_workspace: row.actor_workspace,
        actor_principal: row.actor_principal,
        actor_token_id: row.actor_token_id.unwrap_or_default(),
        actor_address: row.actor_address,
        token_id: row.token_id.unwrap_or_default(),
        principal: row.principal,
        reason: row.reason,
        before: settings(row.before)?,
        after: settings(row.after)?,
    })
}

/// One change, as the audit keeps it.
#[derive(Debug)]
pub struct AuditEvent<'a> {
    /// The workspace of what was changed.
    pub workspace: &'a str,
    /// When.
    pub time: Time,
    /// The method that was called.
    pub method: &'static str,
    /// `OK`, or the gRPC code with which the call was refused.
    pub code: &'static str,
    /// Who called it; nobody: Keyward itself.
    pub actor: Option<&'a Caller>,
    /// The token that was changed, if it was one.
    pub token_id: Option<TokenId>,
    /// Whose it is, or the principal that was changed; may be empty.
    pub principal: &'a str,
    /// The reason that was given; may be empty.
    pub reason: &'a str,
    /// The settings before; none: there was nothing.
    pub before: Option<Value>,
    /// The settings after; none: there is nothing left.
    pub after: Option<Value>,
}

impl AuditEvent<'_> {
    /// The code of a change that was made.
    pub const DONE: &'static str = "OK";

    pub(super) fn into_row(self) -> Result<audit::Model> {
        let text = |part: fn(&Caller) -> String| self.actor.map(part).unwrap_or_default();
        Ok(audit::Model {
            id: token::event_id(self.time)?,
            workspace: self.workspace.to_owned(),
            event_time: self.time.micros(),
            method: self.method.to_owned(),
            code: self.code.to_owned(),
            actor_workspace: text(|caller| caller.workspace.to_string()),
            actor_principal: text(|caller| caller.principal.to_string()),
            actor_token_id: self.actor.and_then(|caller| caller.token_id).map(|id| id.to_string()),
            actor_address: text(|caller| caller.address.map(|address| address.to_string()).unwrap_or_default()),
            token_id: self.token_id.map(|id| id.to_string()),
            principal: self.principal.to_owned(),
            reason: self.reason.to_owned(),
            before: self.before.map(|settings| settings.to_string()),
            after: self.after.map(|settings| settings.to_string()),
        })
    }
}
