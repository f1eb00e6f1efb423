//! Audit rows: who changed what, from where. They are written in the transaction of the change and never changed.

use serde_json::Value;

use super::entity::audit;
use crate::{
    ambient::Time,
    caller::Caller,
    error::Result,
    token::{self, TokenId},
};

/// One change, as the audit keeps it.
#[derive(Debug)]
pub struct AuditEvent<'a> {
    /// The workspace of what was changed.
    pub workspace: &'a str,
    /// When.
    pub time: Time,
    /// The method that was called.
    pub method: &'static str,
    /// Who called it; nobody: Keyward itself.
    pub actor: Option<&'a Caller>,
    /// The token that was changed.
    pub token_id: TokenId,
    /// Whose it is.
    pub principal: &'a str,
    /// The reason that was given; may be empty.
    pub reason: &'a str,
    /// The settings before; none: there was nothing.
    pub before: Option<Value>,
    /// The settings after; none: there is nothing left.
    pub after: Option<Value>,
}

impl AuditEvent<'_> {
    pub(super) fn into_row(self) -> Result<audit::Model> {
        let text = |part: fn(&Caller) -> String| self.actor.map(part).unwrap_or_default();
        Ok(audit::Model {
            id: token::event_id(self.time)?,
            workspace: self.workspace.to_owned(),
            event_time: self.time.micros(),
            method: self.method.to_owned(),
            actor_workspace: text(|caller| caller.workspace.to_string()),
            actor_principal: text(|caller| caller.principal.to_string()),
            actor_token_id: self.actor.and_then(|caller| caller.token_id).map(|id| id.to_string()),
            actor_address: text(|caller| caller.address.map(|address| address.to_string()).unwrap_or_default()),
            token_id: Some(self.token_id.to_string()),
            principal: self.principal.to_owned(),
            reason: self.reason.to_owned(),
            before: self.before.map(|settings| settings.to_string()),
            after: self.after.map(|settings| settings.to_string()),
        })
    }
}
