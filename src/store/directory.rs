//! Workspaces and principals: reading and changing them.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use sea_orm::{
    ActiveModelTrait as _,
    ActiveValue::Set,
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, ExprTrait as _, FromQueryResult, IntoActiveModel as _, Iterable as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, Statement,
    sea_query::{Condition, Expr, Func, LikeExpr, LockType, OnConflict},
};
use serde_json::{Value, json};

use super::{
    Store, Tx, damaged,
    entity::{principal, split, workspace},
    notices, translate,
};
use crate::{
    ambient::Time,
    error::Result,
    grant::{Kind, Subject},
    scope::{Operation, Resource},
    workspace::{Brief, Policy, Principal, PrincipalKind, Role, Workspace},
};

/// Whether a principal or its workspace is suspended or is not there, and whether it is an administrator.
pub(super) const STANDING: &str = "SELECT w.suspended OR COALESCE(p.suspended, TRUE), COALESCE(p.role, 1) = 2 FROM workspace w \
     LEFT JOIN principal p ON p.workspace = w.id AND p.id = $2 WHERE w.id = $1 AND w.delete_time IS NULL";

impl Store {
    /// One workspace, if it was not deleted.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn workspace(&self, id: &str) -> Result<Option<Workspace>> {
        let row = self.reading("workspace", standing_workspace(id).one(&self.reader)).await?;
        row.map(workspace_of).transpose()
    }

    /// What the creation of a token needs to know of a workspace, if it was not deleted. Lists do not keep it waiting.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn brief(&self, id: &str) -> Result<Option<Brief>> {
        let row = self.bounded("workspace", &self.facts_permits, brief_workspace(id).one(&self.reader)).await?;
        row.map(brief_of).transpose()
    }

    /// What can be reached with the tokens of a workspace; nothing if it was deleted. For judging tokens.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn resources(&self, workspace: &str) -> Result<Vec<Resource>> {
        let row = self.reading_facts(standing_workspace(workspace).one(&self.reader)).await?;
        row.map_or(Ok(Vec::new()), |row| resources_of(&row.resources))
    }

    /// A page of workspaces by id, without their resources, at most `limit`, those after the given one if there is one.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn workspaces(&self, after: Option<&str>, limit: u64) -> Result<Vec<Workspace>> {
        let condition =
            Condition::all().add(workspace::Column::DeleteTime.is_null()).add_option(after.map(|id| workspace::Column::Id.gt(id)));
        let query = workspace::Entity::find().filter(condition).order_by_asc(workspace::Column::Id).limit(limit);
        let query = without_resources(query).column_as(Expr::val("[]"), "resources").into_model::<workspace::Model>();
        let rows = self.reading("workspaces", query.all(&self.reader)).await?;
        rows.into_iter().map(workspace_of).collect()
    }

    /// One principal.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn principal(&self, workspace: &str, id: &str) -> Result<Option<Principal>> {
        let query = principal::Entity::find_by_id((workspace.to_owned(), id.to_owned()));
        let row = self.bounded("principal", &self.facts_permits, query.one(&self.reader)).await?;
        row.map(principal_of).transpose()
    }

    /// A page of principals by id, at most `limit`, those after the given one if there is one; with this text in id, name or mail address.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn principals(&self, workspace: &str, query: Option<&str>, after: Option<&str>, limit: u64) -> Result<Vec<Principal>> {
        let condition = Condition::all()
            .add(principal::Column::Workspace.eq(workspace))
            .add_option(after.map(|id| principal::Column::Id.gt(id)))
            .add_option(query.map(|text| {
                [principal::Column::Id, principal::Column::DisplayName, principal::Column::Email]
                    .into_iter()
                    .fold(Condition::any(), |any, column| any.add(holds(column.into_expr(), text)))
            }));
        let query = principal::Entity::find().filter(condition).order_by_asc(principal::Column::Id).limit(limit);
        let rows = self.reading("principals", query.all(&self.reader)).await?;
        rows.into_iter().map(principal_of).collect()
    }

    /// Whether a principal or its workspace is suspended or is not there, and whether it has the role of an administrator.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn standing(&self, workspace: &str, principal: &str) -> Result<(bool, bool)> {
        let sql = STANDING;
        let statement = Statement::from_sql_and_values(self.backend(), sql, [workspace.into(), principal.into()]);
        match self.reading_facts(self.reader.query_one_raw(statement)).await? {
            None => Ok((true, false)),
            Some(row) => Ok((row.try_get_by_index(0).map_err(translate)?, row.try_get_by_index(1).map_err(translate)?)),
        }
    }

    /// The workspace that was deleted first, before this instant, of those whose tokens and principals are gone or of those where they are not.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn deleted_workspace(&self, before: Time, is_emptied: bool) -> Result<Option<String>> {
        let sql =
            "SELECT id FROM workspace WHERE emptied = $1 AND delete_time <= $2 AND delete_time IS NOT NULL ORDER BY delete_time LIMIT 1";
        let statement = Statement::from_sql_and_values(self.backend(), sql, [is_emptied.into(), before.micros().into()]);
        let row = self.reading("workspaces", self.reader.query_one_raw(statement)).await?;
        row.map(|row| row.try_get_by_index(0).map_err(translate)).transpose()
    }
}

impl Tx<'_> {
    /// One workspace, if it was not deleted.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn workspace(&self, id: &str) -> Result<Option<Workspace>> {
        let row = self.bounded(standing_workspace(id).one(self.inner())).await?;
        row.map(workspace_of).transpose()
    }

    /// As [`Store::brief`].
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn brief(&self, id: &str) -> Result<Option<Brief>> {
        let row = self.bounded(brief_workspace(id).one(self.inner())).await?;
        row.map(brief_of).transpose()
    }

    /// Adds a workspace; says whether its id was free.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn insert_workspace(&mut self, workspace: &Workspace) -> Result<bool> {
        // Whoever came with a certificate for it was told that it is not there.
        self.touch(Subject::Workspace(workspace.id.clone()));
        let insert = workspace::Entity::insert(row_of_workspace(workspace).into_active_model());
        // Also one that has its own prefix again: the table keeps one workspace for each.
        let insert = insert.on_conflict(OnConflict::new().do_nothing().to_owned());
        self.bounded(insert.exec_without_returning(self.inner())).await.map(|rows| rows == 1)
    }

    /// Keeps a prefix for a workspace; says whether it was free or its own.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn claim_prefix(&self, prefix: &str, workspace: &str) -> Result<bool> {
        let insert = "INSERT INTO prefix (prefix, workspace) VALUES ($1, $2) ON CONFLICT (prefix) DO NOTHING";
        self.execute(insert, vec![prefix.into(), workspace.into()]).await?;
        let row =
            self.query_one("SELECT 1 FROM prefix WHERE prefix = $1 AND workspace = $2", vec![prefix.into(), workspace.into()]).await?;
        Ok(row.is_some())
    }

    /// Writes what may change of a workspace.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn update_workspace(&mut self, workspace: &Workspace) -> Result<()> {
        self.touch(Subject::Workspace(workspace.id.clone()));
        let row = row_of_workspace(workspace);
        let mut changed = row.clone().into_active_model().reset_all();
        changed.id = sea_orm::ActiveValue::Unchanged(row.id);
        changed.create_time = sea_orm::ActiveValue::NotSet;
        changed.delete_time = sea_orm::ActiveValue::NotSet;
        self.bounded(workspace::Entity::update(changed).exec(self.inner())).await.map(drop)
    }

    /// Takes a workspace and all that is in it out of every list and look-up. The rows stay until they are purged.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn delete_workspace(&mut self, id: &str, now: Time) -> Result<()> {
        self.touch(Subject::Workspace(id.to_owned()));
        self.execute("UPDATE workspace SET delete_time = $1 WHERE id = $2", vec![now.micros().into(), id.into()]).await.map(drop)
    }

    /// Removes some principals of a deleted workspace whose tokens are gone; says whether there are none left.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn empty_workspace(&self, id: &str, rows_max: u64) -> Result<bool> {
        let some = "DELETE FROM principal WHERE workspace = $1 AND id IN (SELECT id FROM principal WHERE workspace = $1 LIMIT $2)";
        let limit = i64::try_from(rows_max).unwrap_or(i64::MAX);
        if self.execute(some, vec![id.into(), limit.into()]).await? == rows_max {
            return Ok(false);
        }
        let emptied = "UPDATE workspace SET emptied = TRUE WHERE id = $1 AND delete_time IS NOT NULL";
        self.execute(emptied, vec![id.into()]).await.map(|_| true)
    }

    /// Removes the rest of a workspace that was emptied: its id and its prefixes become free.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn purge_workspace(&self, id: &str) -> Result<()> {
        for table in ["prefix", "fault", "notice", "webhook_secret"] {
            self.execute(&format!("DELETE FROM {table} WHERE workspace = $1"), vec![id.into()]).await?;
        }
        self.execute("DELETE FROM workspace WHERE id = $1 AND emptied", vec![id.into()]).await.map(drop)
    }

    /// One principal, which nobody else changes, and for which nobody else creates a token, until this transaction ends.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn principal(&self, workspace: &str, id: &str) -> Result<Option<Principal>> {
        let query = principal::Entity::find_by_id((workspace.to_owned(), id.to_owned())).lock(LockType::Update);
        let row = self.bounded(query.one(self.inner())).await?;
        row.map(principal_of).transpose()
    }

    /// Takes up a principal; says whether it was not there. In a creation of a token it must be one that is judged as one that was never heard of: nothing is
    /// announced then.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn insert_principal(&mut self, principal: &Principal) -> Result<bool> {
        if self.is_change() {
            self.touch(subject(principal));
        }
        let key = [principal::Column::Workspace, principal::Column::Id];
        let insert = principal::Entity::insert(row_of_principal(principal).into_active_model());
        let insert = insert.on_conflict(OnConflict::columns(key).do_nothing().to_owned());
        self.bounded(insert.exec_without_returning(self.inner())).await.map(|rows| rows == 1)
    }

    /// Writes what may change of a principal.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn update_principal(&mut self, principal: &Principal) -> Result<()> {
        self.touch(subject(principal));
        let changed = principal::ActiveModel {
            workspace: sea_orm::ActiveValue::Unchanged(principal.workspace.clone()),
            id: sea_orm::ActiveValue::Unchanged(principal.id.clone()),
            kind: Set(kind_number(principal.kind)),
            display_name: Set(principal.display_name.clone()),
            suspended: Set(principal.suspended),
            update_time: Set(principal.update_time.micros()),
            version: Set(principal.version),
            email: Set(principal.email.clone()),
            role: Set(role_number(principal.role)),
            ..Default::default()
        };
        self.bounded(principal::Entity::update(changed).exec(self.inner())).await.map(drop)
    }

    /// Forgets a principal.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn delete_principal(&mut self, principal: &Principal) -> Result<()> {
        self.touch(subject(principal));
        let sql = "DELETE FROM principal WHERE workspace = $1 AND id = $2";
        self.execute(sql, vec![principal.workspace.clone().into(), principal.id.clone().into()]).await.map(drop)
    }

    /// How many live tokens of a kind a principal has, counted up to `count_max`.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn live_token_count(&self, workspace: &str, principal: &str, kind: Kind, count_max: u32, now: Time) -> Result<i64> {
        let sql = "SELECT COUNT(*) FROM (SELECT 1 FROM token WHERE workspace = $1 AND principal = $2 AND kind = $3 AND expire_time > $4 \
                   AND delete_time IS NULL AND state <> 3 LIMIT $5) AS live";
        let kind = super::entity::kind_number(kind);
        let values = vec![workspace.into(), principal.into(), kind.into(), now.micros().into(), i64::from(count_max).into()];
        let row = self.query_one(sql, values).await?;
        row.map_or(Ok(0), |row| row.try_get_by_index(0).map_err(translate))
    }

    /// Whether any token with `keyward:root` works from this address, or from anywhere, until some time, as things stand in this transaction.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn a_root_token_works(&self, address: Option<IpAddr>, until: Time, from_anywhere: bool) -> Result<bool> {
        let sql = "SELECT t.allowed_cidrs FROM token t JOIN workspace w ON w.id = t.workspace \
                   LEFT JOIN principal p ON p.workspace = t.workspace AND p.id = t.principal \
                   WHERE t.is_root AND t.delete_time IS NULL AND t.state = 1 AND t.expire_time > $1 \
                   AND w.delete_time IS NULL AND NOT w.suspended AND NOT COALESCE(p.suspended, FALSE) ORDER BY t.id LIMIT 1000";
        let statement = Statement::from_sql_and_values(self.store().backend(), sql, [until.micros().into()]);
        for row in self.bounded(self.inner().query_all_raw(statement)).await? {
            let ranges: Vec<IpNet> = split("token.allowed_cidrs", &row.try_get_by_index::<String>(0).map_err(translate)?)?;
            if from_anywhere
                || ranges.is_empty()
                || address.is_some_and(|address| ranges.iter().any(|range| range.contains(&address.to_canonical())))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn subject(principal: &Principal) -> Subject {
    Subject::Principal { workspace: principal.workspace.clone(), id: principal.id.clone() }
}

fn standing_workspace(id: &str) -> sea_orm::Select<workspace::Entity> {
    workspace::Entity::find_by_id(id.to_owned()).filter(workspace::Column::DeleteTime.is_null())
}

/// A workspace as [`Brief`]: its resources may be large.
#[derive(FromQueryResult)]
struct BriefRow {
    id: String,
    prefix: String,
    suspended: bool,
    default_ttl_seconds: i64,
    max_permanent_ttl_seconds: i64,
    max_temporary_ttl_seconds: i64,
    allow_never: bool,
    permanent_requires_admin: bool,
    principals_on_first_use: bool,
    max_tokens_per_principal: i64,
    display_name: String,
    notices: String,
    raise_faults: bool,
}

fn brief_workspace(id: &str) -> sea_orm::Selector<sea_orm::SelectModel<BriefRow>> {
    without_resources(standing_workspace(id)).into_model::<BriefRow>()
}

fn without_resources(query: sea_orm::Select<workspace::Entity>) -> sea_orm::Select<workspace::Entity> {
    query.select_only().columns(workspace::Column::iter().filter(|column| !matches!(column, workspace::Column::Resources)))
}

fn brief_of(row: BriefRow) -> Result<Brief> {
    Ok(Brief {
        prefix: row.prefix.parse().map_err(|_| damaged("workspace.prefix"))?,
        policy: Policy {
            default_ttl: span(row.default_ttl_seconds)?,
            max_permanent_ttl: span(row.max_permanent_ttl_seconds)?,
            max_temporary_ttl: span(row.max_temporary_ttl_seconds)?,
            allow_never: row.allow_never,
            permanent_requires_admin: row.permanent_requires_admin,
            principals_on_first_use: row.principals_on_first_use,
            max_tokens_per_principal: u32::try_from(row.max_tokens_per_principal)
                .map_err(|_| damaged("workspace.max_tokens_per_principal"))?,
        },
        id: row.id,
        suspended: row.suspended,
        display_name: row.display_name,
        notices: notices::wishes_of(&row.notices, row.raise_faults)?,
    })
}

/// Whether a column holds a text, whatever its case in ASCII letters.
pub(super) fn holds(column: Expr, text: &str) -> Expr {
    let literal = text.to_ascii_lowercase().replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
    Expr::expr(Func::lower(column)).like(LikeExpr::new(format!("%{literal}%")).escape('\\'))
}

fn seconds(span: Duration) -> i64 {
    i64::try_from(span.as_secs()).unwrap_or(i64::MAX)
}

fn span(seconds: i64) -> Result<Duration> {
    u64::try_from(seconds).map(Duration::from_secs).map_err(|_| damaged("workspace.…_ttl_seconds"))
}

fn workspace_of(row: workspace::Model) -> Result<Workspace> {
    let resources = resources_of(&row.resources)?;
    let version = row.version;
    let (create_time, update_time) = (Time::from_micros(row.create_time), Time::from_micros(row.update_time));
    let Brief { id, prefix, policy, suspended, display_name, notices } = brief_of(BriefRow {
        id: row.id,
        prefix: row.prefix,
        suspended: row.suspended,
        default_ttl_seconds: row.default_ttl_seconds,
        max_permanent_ttl_seconds: row.max_permanent_ttl_seconds,
        max_temporary_ttl_seconds: row.max_temporary_ttl_seconds,
        allow_never: row.allow_never,
        permanent_requires_admin: row.permanent_requires_admin,
        principals_on_first_use: row.principals_on_first_use,
        max_tokens_per_principal: row.max_tokens_per_principal,
        display_name: row.display_name,
        notices: row.notices,
        raise_faults: row.raise_faults,
    })?;
    Ok(Workspace { id, display_name, prefix, policy, resources, notices, suspended, create_time, update_time, version })
}

fn row_of_workspace(workspace: &Workspace) -> workspace::Model {
    workspace::Model {
        id: workspace.id.clone(),
        display_name: workspace.display_name.clone(),
        prefix: workspace.prefix.as_str().to_owned(),
        suspended: workspace.suspended,
        create_time: workspace.create_time.micros(),
        update_time: workspace.update_time.micros(),
        version: workspace.version,
        default_ttl_seconds: seconds(workspace.policy.default_ttl),
        max_permanent_ttl_seconds: seconds(workspace.policy.max_permanent_ttl),
        max_temporary_ttl_seconds: seconds(workspace.policy.max_temporary_ttl),
        allow_never: workspace.policy.allow_never,
        permanent_requires_admin: workspace.policy.permanent_requires_admin,
        principals_on_first_use: workspace.policy.principals_on_first_use,
        max_tokens_per_principal: workspace.policy.max_tokens_per_principal.into(),
        resources: resources_text(&workspace.resources),
        delete_time: None,
        emptied: false,
        notices: notices::wishes_text(&workspace.notices),
        raise_faults: workspace.notices.raise_faults,
    }
}

fn resources_text(resources: &[Resource]) -> String {
    let operation = |operation: &Operation| json!([operation.operation, operation.method, operation.path]);
    let resource =
        |resource: &Resource| json!([resource.resource, resource.endpoint, resource.operations.iter().map(operation).collect::<Vec<_>>()]);
    Value::from(resources.iter().map(resource).collect::<Vec<_>>()).to_string()
}

fn resources_of(text: &str) -> Result<Vec<Resource>> {
    type Row = (String, String, Vec<(String, String, String)>);
    let rows: Vec<Row> = serde_json::from_str(text).map_err(|_| damaged("workspace.resources"))?;
    let operation = |(operation, method, path)| Operation { operation, method, path };
    let resource = |(resource, endpoint, operations): Row| Resource {
        resource,
        endpoint,
        operations: operations.into_iter().map(operation).collect(),
    };
    Ok(rows.into_iter().map(resource).collect())
}

fn principal_of(row: principal::Model) -> Result<Principal> {
    Ok(Principal {
        kind: match row.kind {
            1 => PrincipalKind::User,
            2 => PrincipalKind::Service,
            _ => return Err(damaged("principal.kind")),
        },
        role: role_of(row.role)?,
        workspace: row.workspace,
        id: row.id,
        display_name: row.display_name,
        email: row.email,
        suspended: row.suspended,
        create_time: Time::from_micros(row.create_time),
        update_time: Time::from_micros(row.update_time),
        version: row.version,
    })
}

fn row_of_principal(principal: &Principal) -> principal::Model {
    principal::Model {
        workspace: principal.workspace.clone(),
        id: principal.id.clone(),
        kind: kind_number(principal.kind),
        display_name: principal.display_name.clone(),
        suspended: principal.suspended,
        create_time: principal.create_time.micros(),
        update_time: principal.update_time.micros(),
        version: principal.version,
        email: principal.email.clone(),
        role: role_number(principal.role),
    }
}

fn kind_number(kind: PrincipalKind) -> i16 {
    match kind {
        PrincipalKind::User => 1,
        PrincipalKind::Service => 2,
    }
}

fn role_number(role: Role) -> i16 {
    match role {
        Role::Member => 1,
        Role::Admin => 2,
    }
}

pub(super) fn role_of(number: i16) -> Result<Role> {
    match number {
        1 => Ok(Role::Member),
        2 => Ok(Role::Admin),
        _ => Err(damaged("principal.role")),
    }
}
