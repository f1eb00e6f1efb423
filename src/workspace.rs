//! What a workspace is: its brand, its policy, its routes, its people.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    ambient::Time,
    notice::Wishes,
    scope::{Operation, Resource},
    token::Prefix,
};

const DAY: Duration = Duration::from_hours(24);

/// A product or a brand, whose tokens, principals and administrators are apart from those of every other.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// Its id.
    pub id: String,
    /// A name for people.
    pub display_name: String,
    /// What new tokens begin with.
    pub prefix: Prefix,
    /// What may be created in it.
    pub policy: Policy,
    /// What can be reached with its tokens.
    pub resources: Vec<Resource>,
    /// What is told about its tokens, and where.
    pub notices: Wishes,
    /// Whether every token of it is refused.
    pub suspended: bool,
    /// When it was made.
    pub create_time: Time,
    /// When its settings or its suspension last changed.
    pub update_time: Time,
    /// Counts its changes.
    pub version: i64,
}

/// What the creation of a token needs to know of its workspace.
#[derive(Clone, Debug)]
pub struct Brief {
    /// Its id.
    pub id: String,
    /// A name for people.
    pub display_name: String,
    /// What new tokens begin with.
    pub prefix: Prefix,
    /// What may be created in it.
    pub policy: Policy,
    /// What is told about its tokens, and where.
    pub notices: Wishes,
    /// Whether every token of it is refused.
    pub suspended: bool,
}

impl Workspace {
    /// What the audit keeps of it, and what tells whether a change changes anything.
    #[must_use]
    pub fn settings(&self) -> Value {
        let policy = &self.policy;
        let operations = |resource: &Resource| {
            let line =
                |operation: &Operation| [&*operation.operation, &*operation.method, &*operation.path].join(" ").trim_end().to_owned();
            resource.operations.iter().map(line).collect::<Vec<_>>()
        };
        let resources = self.resources.iter();
        json!({
            "display_name": self.display_name,
            "prefix": self.prefix.as_str(),
            "policy": {
                "default_ttl_seconds": policy.default_ttl.as_secs(),
                "max_permanent_ttl_seconds": policy.max_permanent_ttl.as_secs(),
                "max_temporary_ttl_seconds": policy.max_temporary_ttl.as_secs(),
                "allow_never": policy.allow_never,
                "permanent_requires_admin": policy.permanent_requires_admin,
                "principals_on_first_use": policy.principals_on_first_use,
                "max_tokens_per_principal": policy.max_tokens_per_principal,
            },
            "resources": resources
                .map(|resource| json!({"resource": resource.resource, "endpoint": resource.endpoint, "operations": operations(resource)}))
                .collect::<Vec<_>>(),
            "notices": self.notices.settings(),
            "suspended": self.suspended,
            "version": self.version,
        })
    }
}

/// What may be created in a workspace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// The life of a permanent token whose creator names none.
    pub default_ttl: Duration,
    /// The longest life of a permanent token.
    pub max_permanent_ttl: Duration,
    /// The longest life of a temporary token, and its usual one.
    pub max_temporary_ttl: Duration,
    /// Whether a permanent token may never end.
    pub allow_never: bool,
    /// Whether only administrators create permanent tokens.
    pub permanent_requires_admin: bool,
    /// Whether a token for a principal that was never heard of makes that principal.
    pub principals_on_first_use: bool,
    /// How many live tokens of each kind a principal may have.
    pub max_tokens_per_principal: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            default_ttl: 90 * DAY,
            max_permanent_ttl: 365 * DAY,
            max_temporary_ttl: DAY,
            allow_never: false,
            permanent_requires_admin: false,
            principals_on_first_use: true,
            max_tokens_per_principal: 100,
        }
    }
}

/// Who a token stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PrincipalKind {
    /// A person.
    #[default]
    User,
    /// A program.
    Service,
}

/// What a principal may do in its workspace beyond the scopes of its tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Role {
    /// Nothing.
    #[default]
    Member,
    /// What the policy leaves to administrators.
    Admin,
}

/// A person or a service account.
#[derive(Clone, Debug)]
pub struct Principal {
    /// The workspace it belongs to.
    pub workspace: String,
    /// Its id.
    pub id: String,
    /// A person or a program.
    pub kind: PrincipalKind,
    /// A name for people.
    pub display_name: String,
    /// A mail address; may be empty.
    pub email: String,
    /// What it may do beyond the scopes of its tokens.
    pub role: Role,
    /// Whether every token of it is refused.
    pub suspended: bool,
    /// When it was made, or first used.
    pub create_time: Time,
    /// When it last changed.
    pub update_time: Time,
    /// Counts its changes.
    pub version: i64,
}

impl Principal {
    /// One that was never heard of.
    #[must_use]
    pub fn first_used(workspace: &str, id: &str, now: Time) -> Self {
        Self {
            workspace: workspace.to_owned(),
            id: id.to_owned(),
            kind: PrincipalKind::User,
            display_name: id.to_owned(),
            email: String::new(),
            role: Role::Member,
            suspended: false,
            create_time: now,
            update_time: now,
            version: 1,
        }
    }

    /// What the audit keeps of it.
    #[must_use]
    pub fn settings(&self) -> Value {
        json!({
            "kind": match self.kind { PrincipalKind::User => "USER", PrincipalKind::Service => "SERVICE" },
            "display_name": self.display_name,
            "email": self.email,
            "role": match self.role { Role::Member => "MEMBER", Role::Admin => "ADMIN" },
            "suspended": self.suspended,
            "version": self.version,
        })
    }
}
