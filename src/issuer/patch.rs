//! A change of a token's settings whose fields follow the rules.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::TokenPatch;
use crate::{
    ambient::Time,
    error::{Error, Result},
    grant::Token,
    rules,
    scope::Scope,
    workspace::Policy,
};

/// A patch whose fields follow the rules, but for those that need the token to say.
pub(super) struct Patch {
    display_name: Option<String>,
    scopes: Option<Vec<Scope>>,
    audiences: Option<Vec<String>>,
    allowed_cidrs: Option<Vec<IpNet>>,
    metadata: Option<BTreeMap<String, String>>,
    expire_time: Option<Time>,
}

impl Patch {
    /// Checks everything that can be checked without the token.
    pub fn check(patch: TokenPatch, id: &str, now: Time) -> Result<Self> {
        let mut violations = patch.violations;
        if patch.expire_time.is_some_and(|end| end <= now) {
            violations.add("token.expire_time", rules::PAST);
        }
        violations.take("token.id", rules::id(id));
        let display_name = patch.display_name.and_then(|name| violations.take("token.display_name", rules::display_name(&name)));
        if let Some(metadata) = &patch.metadata {
            rules::metadata("token.metadata", metadata, &mut violations);
        }
        let checked = Self {
            display_name,
            scopes: patch.scopes.map(|scopes| rules::scopes("token.scopes", &scopes, &mut violations)),
            audiences: patch.audiences.map(|audiences| rules::audiences("token.audiences", &audiences, &mut violations)),
            allowed_cidrs: patch.allowed_cidrs.map(|cidrs| rules::allowed_cidrs("token.allowed_cidrs", &cidrs, &mut violations)),
            metadata: patch.metadata,
            expire_time: patch.expire_time,
        };
        violations.finish()?;
        Ok(checked)
    }

    /// Takes over what the patch names.
    pub fn apply(self, token: &mut Token, policy: &Policy, now: Time) -> Result<()> {
        if let Some(end) = self.expire_time {
            let end = rules::moved_expire_time(end, token.kind, policy, token.create_time, now);
            token.expire_time = end.map_err(|rule| Error::invalid("token.expire_time", rule))?;
        }
        token.display_name = self.display_name.unwrap_or_else(|| token.display_name.clone());
        token.scopes = self.scopes.unwrap_or_else(|| token.scopes.clone());
        token.audiences = self.audiences.unwrap_or_else(|| token.audiences.clone());
        token.allowed_cidrs = self.allowed_cidrs.unwrap_or_else(|| token.allowed_cidrs.clone());
        token.metadata = self.metadata.unwrap_or_else(|| token.metadata.clone());
        Ok(())
    }
}
