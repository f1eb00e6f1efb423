//! The rows of the tables that are read and written whole, and what they say in the domain's words.

use std::collections::BTreeMap;

use super::damaged;
use crate::{
    ambient::Time,
    error::Result,
    grant::{Kind, State, Token},
    scope::Right,
    token::TokenId,
};

pub(super) mod token {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "token")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub workspace: String,
        pub digest: Vec<u8>,
        pub previous_digest: Option<Vec<u8>>,
        pub previous_expire_time: Option<i64>,
        pub display_name: String,
        pub principal: String,
        pub kind: i16,
        pub state: i16,
        pub hint: String,
        pub scopes: String,
        pub audiences: String,
        pub allowed_cidrs: String,
        pub metadata: String,
        pub session_id: String,
        pub created_by: String,
        pub create_time: i64,
        pub update_time: i64,
        pub expire_time: i64,
        pub revoke_time: Option<i64>,
        pub revoke_reason: String,
        pub delete_time: Option<i64>,
        pub version: i64,
        pub is_root: bool,
        pub prefix: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {
        #[sea_orm(belongs_to = "super::usage::Entity", from = "Column::Id", to = "super::usage::Column::TokenId")]
        Usage,
    }

    impl Related<super::usage::Entity> for Entity {
        fn to() -> RelationDef {
            Relation::Usage.def()
        }
    }

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod workspace {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "workspace")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub display_name: String,
        pub prefix: String,
        pub suspended: bool,
        pub create_time: i64,
        pub update_time: i64,
        pub version: i64,
        pub default_ttl_seconds: i64,
        pub max_permanent_ttl_seconds: i64,
        pub max_temporary_ttl_seconds: i64,
        pub allow_never: bool,
        pub permanent_requires_admin: bool,
        pub principals_on_first_use: bool,
        pub max_tokens_per_principal: i64,
        pub resources: String,
        pub delete_time: Option<i64>,
        pub emptied: bool,
        pub notices: String,
        pub raise_faults: bool,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod principal {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "principal")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub workspace: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub kind: i16,
        pub display_name: String,
        pub suspended: bool,
        pub create_time: i64,
        pub update_time: i64,
        pub version: i64,
        pub email: String,
        pub role: i16,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod usage {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "token_usage")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub token_id: String,
        pub use_count: i64,
        pub last_used_time: i64,
        pub last_used_ip: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod audience {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "token_audience")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub workspace: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub audience: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub token_id: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod change {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "change_log")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub seq: i64,
        #[sea_orm(primary_key, auto_increment = false)]
        pub item: i64,
        pub kind: i16,
        pub subject: Vec<u8>,
        pub change_time: i64,
        pub workspace: String,
        pub token_id: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod audit {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "audit_event")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub workspace: String,
        pub event_time: i64,
        pub method: String,
        pub code: String,
        pub actor_workspace: String,
        pub actor_principal: String,
        pub actor_token_id: Option<String>,
        pub actor_address: String,
        pub token_id: Option<String>,
        pub principal: String,
        pub reason: String,
        pub before: Option<String>,
        pub after: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod notice {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "notice")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub workspace: String,
        pub channel: i16,
        pub event: String,
        pub recipient: String,
        pub to_owner: bool,
        pub token_ids: String,
        pub token_count: i64,
        pub actor: String,
        pub reason: String,
        pub create_time: i64,
        pub dead: bool,
        pub attempts: i64,
        pub due_time: i64,
        pub claim: String,
        pub give_up_time: i64,
        pub last_error: String,
        pub items: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod fault {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "fault")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub workspace: String,
        pub token_id: String,
        pub days_before: i32,
        pub expire_time: i64,
        pub raise_time: i64,
        pub acknowledge_time: Option<i64>,
        pub acknowledged_by: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The stored number of a kind.
pub(super) fn kind_number(kind: Kind) -> i16 {
    match kind {
        Kind::Permanent => 1,
        Kind::Temporary => 2,
    }
}

/// The kind with that number.
pub(super) fn kind_of(number: i16) -> Result<Kind> {
    match number {
        1 => Ok(Kind::Permanent),
        2 => Ok(Kind::Temporary),
        _ => Err(damaged("token.kind")),
    }
}

/// The stored number of a state.
pub(super) fn state_number(state: State) -> i16 {
    match state {
        State::Active => 1,
        State::Inactive => 2,
        State::Revoked => 3,
    }
}

/// The state with that number.
pub(super) fn state_of(number: i16) -> Result<State> {
    match number {
        1 => Ok(State::Active),
        2 => Ok(State::Inactive),
        3 => Ok(State::Revoked),
        _ => Err(damaged("token.state")),
    }
}

/// Words that hold no blank, joined by blanks.
pub(super) fn join<T: ToString>(words: &[T]) -> String {
    words.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// The words of a column that [`join`] wrote.
pub(super) fn split<T: std::str::FromStr>(column: &'static str, text: &str) -> Result<Vec<T>> {
    text.split_ascii_whitespace().map(|word| word.parse().map_err(|_| damaged(column))).collect()
}

pub(super) fn metadata_text(metadata: &BTreeMap<String, String>) -> String {
    serde_json::json!(metadata).to_string()
}

pub(super) fn metadata_of(text: &str) -> Result<BTreeMap<String, String>> {
    serde_json::from_str(text).map_err(|_| damaged("token.metadata"))
}

/// Reads a row, with its use if there was any.
pub(super) fn token_of(row: token::Model, usage: Option<usage::Model>) -> Result<Token> {
    let last_used_ip = usage.as_ref().filter(|usage| !usage.last_used_ip.is_empty());
    Ok(Token {
        id: TokenId::parse(&row.id).ok_or_else(|| damaged("token.id"))?,
        workspace: row.workspace,
        display_name: row.display_name,
        principal: row.principal,
        kind: kind_of(row.kind)?,
        state: state_of(row.state)?,
        prefix: row.prefix.parse().map_err(|_| damaged("token.prefix"))?,
        hint: row.hint,
        scopes: split("token.scopes", &row.scopes)?,
        audiences: split("token.audiences", &row.audiences)?,
        allowed_cidrs: split("token.allowed_cidrs", &row.allowed_cidrs)?,
        metadata: metadata_of(&row.metadata)?,
        session_id: row.session_id,
        created_by: row.created_by,
        create_time: Time::from_micros(row.create_time),
        update_time: Time::from_micros(row.update_time),
        expire_time: Time::from_micros(row.expire_time),
        revoke_time: row.revoke_time.map(Time::from_micros),
        revoke_reason: row.revoke_reason,
        version: row.version,
        last_used_ip: last_used_ip.map(|usage| usage.last_used_ip.parse().map_err(|_| damaged("token_usage.last_used_ip"))).transpose()?,
        last_used_time: usage.as_ref().map(|usage| Time::from_micros(usage.last_used_time)),
        use_count: usage.map_or(0, |usage| usage.use_count),
    })
}

/// Whether a token may do everything everywhere.
pub(super) fn is_root(token: &Token) -> bool {
    token.scopes.iter().any(|scope| Right::of(scope) == Some(Right::Root))
}

/// The row of a token with the secret's digest.
pub(super) fn row_of(token: &Token, digest: Vec<u8>) -> token::Model {
    token::Model {
        id: token.id.to_string(),
        workspace: token.workspace.clone(),
        digest,
        previous_digest: None,
        previous_expire_time: None,
        display_name: token.display_name.clone(),
        principal: token.principal.clone(),
        kind: kind_number(token.kind),
        state: state_number(token.state),
        hint: token.hint.clone(),
        scopes: join(&token.scopes),
        audiences: token.audiences.join(" "),
        allowed_cidrs: join(&token.allowed_cidrs),
        metadata: metadata_text(&token.metadata),
        session_id: token.session_id.clone(),
        created_by: token.created_by.clone(),
        create_time: token.create_time.micros(),
        update_time: token.update_time.micros(),
        expire_time: token.expire_time.micros(),
        revoke_time: token.revoke_time.map(Time::micros),
        revoke_reason: token.revoke_reason.clone(),
        delete_time: None,
        version: token.version,
        is_root: is_root(token),
        prefix: token.prefix.as_str().to_owned(),
    }
}
