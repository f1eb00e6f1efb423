//! Reading tokens: the facts behind a digest, one token, a page of them.
//!
//! Invariant: every list and look-up is served by an index (test `every_query_has_its_index`).

use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, ExprTrait as _, FromQueryResult, QueryFilter as _, QueryOrder as _,
    QuerySelect as _, QueryTrait as _, Statement,
    sea_query::{Condition, Expr, Order as Direction},
};

use super::{
    Store, damaged, directory,
    entity::{self, audience, token, usage, workspace},
    translate,
};
use crate::{
    ambient::Time,
    error::Result,
    grant::{Facts, Grant, Kind, ShownState, State, Token},
    token::{Digest, TokenId},
    workspace::Role,
};

/// How many digests one statement asks for.
const FACTS_CHUNK: usize = 500;

/// Which tokens to list. Everything that is said must hold.
#[derive(Clone, Debug)]
pub struct Filter {
    /// Of this workspace.
    pub workspace: String,
    /// Of this kind.
    pub kind: Kind,
    /// Of this principal.
    pub principal: Option<String>,
    /// Naming this audience.
    pub audience: Option<String>,
    /// In one of these states; none: in any.
    pub states: Vec<ShownState>,
    /// Created by this principal.
    pub created_by: Option<String>,
    /// Ending before this instant.
    pub expires_before: Option<Time>,
    /// Last used before this instant, or never.
    pub last_used_before: Option<Time>,
    /// With this text in the name, whatever its case in ASCII letters.
    pub query: Option<String>,
}

/// What a list is sorted by; then by id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OrderKey {
    /// When the token was created.
    CreateTime,
    /// Its name, by its bytes.
    DisplayName,
    /// When it ends.
    ExpireTime,
}

/// How a list is sorted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    /// By what.
    pub key: OrderKey,
    /// Largest first.
    pub descending: bool,
}

/// The last token of a page: the next page begins after it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cursor {
    /// What the list is sorted by, as text.
    pub key: String,
    /// The id.
    pub id: TokenId,
}

impl Cursor {
    /// The cursor after this token.
    #[must_use]
    pub fn after(token: &Token, order: Order) -> Self {
        let key = match order.key {
            OrderKey::CreateTime => token.create_time.micros().to_string(),
            OrderKey::ExpireTime => token.expire_time.micros().to_string(),
            OrderKey::DisplayName => token.display_name.clone(),
        };
        Self { key, id: token.id }
    }
}

/// A token's facts as one row.
#[derive(FromQueryResult)]
struct FactsRow {
    presented: Vec<u8>,
    secret_expire_time: i64,
    id: String,
    workspace: String,
    principal: String,
    kind: i16,
    state: i16,
    scopes: String,
    audiences: String,
    allowed_cidrs: String,
    display_name: String,
    metadata: String,
    expire_time: i64,
    workspace_suspended: bool,
    principal_suspended: bool,
    principal_role: i16,
}

impl FactsRow {
    fn into_grant(self) -> Result<(Digest, Grant)> {
        let digest = Digest::from_slice(&self.presented).ok_or_else(|| damaged("token.digest"))?;
        let facts = Facts {
            token_id: TokenId::parse(&self.id).ok_or_else(|| damaged("token.id"))?,
            workspace: self.workspace,
            principal: self.principal,
            kind: entity::kind_of(self.kind)?,
            state: entity::state_of(self.state)?,
            scopes: entity::split("token.scopes", &self.scopes)?,
            audiences: entity::split("token.audiences", &self.audiences)?,
            allowed_cidrs: entity::split("token.allowed_cidrs", &self.allowed_cidrs)?,
            display_name: self.display_name,
            metadata: entity::metadata_of(&self.metadata)?,
            expire_time: Time::from_micros(self.expire_time),
            secret_expire_time: Time::from_micros(self.secret_expire_time),
            principal_suspended: self.principal_suspended,
            principal_is_admin: directory::role_of(self.principal_role)? == Role::Admin,
            workspace_suspended: self.workspace_suspended,
        };
        Ok((digest, Grant::of(&facts)))
    }
}

/// The statement that finds the facts of `count` digests, each of which may be a present or a previous one.
pub(super) fn facts_sql(count: usize) -> String {
    let places = (1..=count).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
    let half = |presented: &str, until: &str| {
        format!(
            "SELECT t.{presented} AS presented, {until} AS secret_expire_time, t.id, t.workspace, t.principal, t.kind, t.state, t.scopes, \
             t.audiences, t.allowed_cidrs, t.display_name, t.metadata, t.expire_time, w.suspended AS workspace_suspended, \
             COALESCE(p.suspended, FALSE) AS principal_suspended, CAST(COALESCE(p.role, 1) AS SMALLINT) AS principal_role \
             FROM token t JOIN workspace w ON w.id = t.workspace \
             LEFT JOIN principal p ON p.workspace = t.workspace AND p.id = t.principal \
             WHERE t.{presented} IN ({places}) AND t.delete_time IS NULL AND w.delete_time IS NULL"
        )
    };
    let never = Time::NEVER.micros();
    format!("{} UNION ALL {}", half("digest", &format!("CAST({never} AS BIGINT)")), half("previous_digest", "t.previous_expire_time"))
}

impl Store {
    /// The facts behind digests. A digest without a token has no facts.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn facts(&self, digests: &[Digest]) -> Result<Vec<(Digest, Grant)>> {
        let mut found = Vec::with_capacity(digests.len());
        for chunk in digests.chunks(FACTS_CHUNK) {
            let values = chunk.iter().map(|digest| digest.as_bytes().to_vec().into());
            let statement = Statement::from_sql_and_values(self.backend(), facts_sql(chunk.len()), values);
            let rows = self.reading_facts(self.reader.query_all_raw(statement)).await?;
            for row in &rows {
                found.push(FactsRow::from_query_result(row, "").map_err(translate)?.into_grant()?);
            }
        }
        Ok(found)
    }

    /// One token, if it is of this workspace (nothing: of any) and not deleted.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn token(&self, id: TokenId, workspace: Option<&str>) -> Result<Option<Token>> {
        let query = token_query(id, workspace);
        let found = self.reading("token", query.find_also_related(usage::Entity).one(&self.reader)).await?;
        found.map(|(row, usage)| entity::token_of(row, usage)).transpose()
    }

    /// A page of tokens, at most `limit`.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn tokens(&self, filter: &Filter, order: Order, after: Option<&Cursor>, limit: u64, now: Time) -> Result<Vec<Token>> {
        let query = list_query(filter, order, after, limit, now).find_also_related(usage::Entity);
        let query = match filter.last_used_before {
            Some(before) => query.filter(usage::Column::LastUsedTime.is_null().or(usage::Column::LastUsedTime.lt(before.micros()))),
            None => query,
        };
        let rows = self.reading("tokens", query.all(&self.reader)).await?;
        rows.into_iter().map(|(row, usage)| entity::token_of(row, usage)).collect()
    }
}

/// One token, if it is of this workspace (nothing: of any that was not deleted) and not deleted.
pub(super) fn token_query(id: TokenId, workspace: Option<&str>) -> sea_orm::Select<token::Entity> {
    let query = token::Entity::find_by_id(id.to_string()).filter(token::Column::DeleteTime.is_null());
    if let Some(workspace) = workspace {
        return query.filter(token::Column::Workspace.eq(workspace));
    }
    // Asked for its own workspace: a list of all of them would be made for each token.
    let own = Expr::col((workspace::Entity, workspace::Column::Id)).equals((token::Entity, token::Column::Workspace));
    let standing = workspace::Entity::find().select_only().column(workspace::Column::Id);
    query.filter(Expr::exists(standing.filter(own).filter(workspace::Column::DeleteTime.is_null()).into_query()))
}

fn list_query(filter: &Filter, order: Order, after: Option<&Cursor>, limit: u64, now: Time) -> sea_orm::Select<token::Entity> {
    let key = match order.key {
        OrderKey::CreateTime => token::Column::CreateTime,
        OrderKey::DisplayName => token::Column::DisplayName,
        OrderKey::ExpireTime => token::Column::ExpireTime,
    };
    let direction = if order.descending { Direction::Desc } else { Direction::Asc };
    let mut condition = Condition::all()
        .add(token::Column::DeleteTime.is_null())
        .add(token::Column::Workspace.eq(&filter.workspace))
        .add(token::Column::Kind.eq(entity::kind_number(filter.kind)))
        .add_option(filter.principal.as_ref().map(|principal| token::Column::Principal.eq(principal)))
        .add_option(filter.created_by.as_ref().map(|principal| token::Column::CreatedBy.eq(principal)))
        .add_option(filter.expires_before.map(|before| token::Column::ExpireTime.lt(before.micros())))
        .add_option(filter.query.as_ref().map(|query| directory::holds(token::Column::DisplayName.into_expr(), query)))
        .add_option(filter.audience.as_ref().map(|audience| names_audience(&filter.workspace, audience)));
    if !filter.states.is_empty() {
        condition = condition.add(filter.states.iter().fold(Condition::any(), |any, state| any.add(shows(*state, now))));
    }
    if let Some(cursor) = after {
        let value: Expr = match order.key {
            OrderKey::DisplayName => Expr::val(cursor.key.as_str()),
            OrderKey::CreateTime | OrderKey::ExpireTime => Expr::val(cursor.key.parse::<i64>().unwrap_or(i64::MAX)),
        };
        let here = Expr::tuple([key.into_expr(), token::Column::Id.into_expr()]);
        let there = Expr::tuple([value, Expr::val(cursor.id.to_string())]);
        condition = condition.add(if order.descending { here.lt(there) } else { here.gt(there) });
    }
    token::Entity::find().filter(condition).order_by(key, direction.clone()).order_by(token::Column::Id, direction).limit(limit)
}

fn names_audience(workspace: &str, name: &str) -> Expr {
    let ids = audience::Entity::find()
        .select_only()
        .column(audience::Column::TokenId)
        .filter(audience::Column::Workspace.eq(workspace))
        .filter(audience::Column::Audience.eq(name));
    token::Column::Id.in_subquery(ids.into_query())
}

/// The stored state and the expiry that make a token show as this.
fn shows(state: ShownState, now: Time) -> Condition {
    let stored = |state| token::Column::State.eq(entity::state_number(state));
    let live = token::Column::ExpireTime.gt(now.micros());
    let expired = token::Column::ExpireTime.lte(now.micros());
    match state {
        ShownState::Active => Condition::all().add(stored(State::Active)).add(live),
        ShownState::Inactive => Condition::all().add(stored(State::Inactive)).add(live),
        ShownState::Expired => Condition::all().add(Condition::any().add(stored(State::Active)).add(stored(State::Inactive))).add(expired),
        ShownState::Revoked => Condition::all().add(stored(State::Revoked)),
    }
}
