//! Who is calling Keyward, and what they may do.
//!
//! Invariant: nobody grants what they do not hold (test `nobody_grants_more_than_they_hold`).

use std::{net::IpAddr, sync::Arc};

use crate::{
    error::{Error, Result},
    grant::Grant,
    scope::{Right, Scope},
    token::{Digest, TokenId},
};

/// No workspace has a longer id.
const WORKSPACE_CHARS_MAX: usize = 63;

/// What a method asks of its caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing: health and reflection.
    Public,
    /// That they are known.
    Known,
    /// That they may manage their own tokens.
    Own,
    /// That they may manage a workspace.
    Admin,
    /// That they may do everything everywhere.
    Root,
    /// That they may ask about tokens.
    Validate,
}

/// What a caller may do on Keyward itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights(u8);

impl Rights {
    /// Those among these scopes.
    #[must_use]
    pub fn of<'a>(scopes: impl Iterator<Item = &'a str>) -> Self {
        Self(scopes.filter_map(Right::named).fold(0, |rights, right| rights | 1 << right as u8))
    }

    fn hold(self, right: Right) -> bool {
        self.0 & 1 << right as u8 != 0
    }

    fn are_an_admins(self) -> bool {
        self.hold(Right::Root) || self.hold(Right::Admin)
    }

    /// Refuses a method that asks for more.
    ///
    /// # Errors
    /// `Denied`, with the scope that is missing.
    pub fn authorize(self, access: Access) -> Result<()> {
        let (allowed, refusal) = match access {
            Access::Public | Access::Known => return Ok(()),
            Access::Own => (
                self.are_an_admins() || self.hold(Right::Own),
                "this method needs a token with keyward:self, keyward:admin or keyward:root",
            ),
            Access::Admin => (self.are_an_admins(), "this method needs a token with keyward:admin or keyward:root"),
            Access::Root => (self.hold(Right::Root), "this method needs a token with keyward:root"),
            Access::Validate => (
                self.are_an_admins() || self.hold(Right::Validate) || self.hold(Right::ValidateAny),
                "this method needs a token with keyward:validate, keyward:validate-any, keyward:admin or keyward:root",
            ),
        };
        if allowed { Ok(()) } else { Err(Error::Denied(refusal.to_owned())) }
    }

    /// The only workspace whose tokens a holder of `workspace` may ask about; nothing: every one.
    #[must_use]
    pub fn validation_reach(self, workspace: &str) -> Option<&str> {
        if self.hold(Right::Root) || self.hold(Right::ValidateAny) { None } else { Some(workspace) }
    }
}

/// A caller whose token or certificate was found good for this very call.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The token that was presented; none with a certificate.
    pub token_id: Option<TokenId>,
    /// What its secret is known by.
    pub digest: Option<Digest>,
    /// The caller's workspace.
    pub workspace: Arc<str>,
    /// The caller's principal.
    pub principal: Arc<str>,
    /// What the caller may do.
    pub scopes: Arc<[Scope]>,
    /// Whether the caller's principal has the role of an administrator.
    pub has_admin_role: bool,
    /// Where the call came from.
    pub address: Option<IpAddr>,
}

impl Caller {
    /// The caller whom a valid token stands for.
    #[must_use]
    pub fn of_grant(grant: &Grant, digest: Option<Digest>, address: Option<IpAddr>) -> Self {
        Self {
            token_id: Some(grant.token_id()),
            digest,
            workspace: grant.workspace().into(),
            principal: grant.principal().into(),
            scopes: grant.scopes().filter_map(|scope| scope.parse().ok()).collect(),
            has_admin_role: grant.principal_is_admin(),
            address,
        }
    }

    /// Somebody who did not say who they are.
    #[must_use]
    pub fn nobody(address: Option<IpAddr>) -> Self {
        Self {
            token_id: None,
            digest: None,
            workspace: "".into(),
            principal: "".into(),
            scopes: Arc::new([]),
            has_admin_role: false,
            address,
        }
    }

    /// A gateway that is known by its address, and may ask about tokens of every workspace.
    #[must_use]
    pub fn gateway(address: IpAddr) -> Self {
        let scopes = "keyward:validate-any".parse().into_iter().collect();
        Self { principal: "gateway".into(), scopes, ..Self::nobody(Some(address)) }
    }

    fn rights(&self) -> Rights {
        Rights::of(self.scopes.iter().map(Scope::as_str))
    }

    /// Whether the caller may do everything everywhere.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.rights().hold(Right::Root)
    }

    /// Whether the caller may do everything in its workspace.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.rights().are_an_admins()
    }

    /// Refuses the caller a method that asks for more than they hold.
    ///
    /// # Errors
    /// `Denied`, with the scope that is missing.
    pub fn authorize(&self, access: Access) -> Result<()> {
        self.rights().authorize(access)
    }

    /// The only workspace whose tokens the caller may ask about; nothing: every one.
    #[must_use]
    pub fn validation_reach(&self) -> Option<&str> {
        self.rights().validation_reach(&self.workspace)
    }

    /// The only workspace that the caller may manage; nothing: every one.
    #[must_use]
    pub fn management_reach(&self) -> Option<&str> {
        if self.is_root() { None } else { Some(&self.workspace) }
    }

    /// The workspace that a request is about: the one it names, or else the caller's own.
    ///
    /// # Errors
    /// `NotFound` for another workspace than the caller may manage.
    pub fn workspace<'a>(&'a self, asked: &'a str) -> Result<&'a str> {
        match self.management_reach() {
            _ if asked.is_empty() => Ok(&self.workspace),
            _ if asked.len() > WORKSPACE_CHARS_MAX || !asked.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(Error::NotFound("workspace"))
            }
            Some(own) if own != asked => Err(Error::NotFound("workspace")),
            _ => Ok(asked),
        }
    }

    /// Whether the caller may give this scope to a token.
    #[must_use]
    pub fn can_grant(&self, scope: &Scope) -> bool {
        match Right::of(scope) {
            _ if self.is_root() => true,
            Some(Right::Root | Right::ValidateAny) => false,
            _ if self.is_admin() => true,
            _ => self.scopes.iter().any(|held| held.covers(scope)),
        }
    }

    /// Refuses the caller a change to a token that holds more than they do: they could otherwise take it over or shut its holder out.
    ///
    /// # Errors
    /// `Denied`.
    pub fn outranks(&self, scopes: &[Scope]) -> Result<()> {
        match scopes.iter().find(|scope| !self.can_grant(scope)) {
            None => Ok(()),
            Some(scope) => Err(Error::Denied(format!("this holds `{scope}`, which the caller cannot grant"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(scopes: &[&str]) -> Caller {
        Caller {
            token_id: None,
            digest: None,
            workspace: "default".into(),
            principal: "alice".into(),
            scopes: scopes.iter().map(|scope| scope.parse().expect("a scope")).collect(),
            has_admin_role: false,
            address: None,
        }
    }

    #[test]
    fn nobody_grants_more_than_they_hold() {
        let grants = |held: &[&str], scope: &str| caller(held).can_grant(&scope.parse().expect("a scope"));
        for scope in ["keyward:root", "keyward:validate-any", "keyward:admin", "*", "a:b"] {
            assert!(grants(&["keyward:root"], scope), "{scope}");
        }
        for scope in ["keyward:admin", "keyward:self", "keyward:validate", "*", "a:*"] {
            assert!(grants(&["keyward:admin"], scope), "{scope}");
        }
        for scope in ["keyward:root", "keyward:validate-any"] {
            assert!(!grants(&["keyward:admin", "keyward:validate", "*"], scope), "{scope}");
        }
        assert!(!grants(&["keyward:admin", "keyward:validate-any"], "keyward:validate-any"), "only root grants it");
        assert!(grants(&["keyward:self", "a:*"], "a:b"));
        for scope in ["keyward:admin", "keyward:validate", "b:c", "*"] {
            assert!(!grants(&["keyward:self", "a:*"], scope), "{scope}");
        }
        assert!(!grants(&["*"], "keyward:self"));
    }

    #[test]
    fn each_right_opens_its_doors_only() {
        let doors = |scopes: &[&str]| {
            [Access::Known, Access::Own, Access::Admin, Access::Validate, Access::Root]
                .map(|access| caller(scopes).authorize(access).is_ok())
        };
        assert_eq!(doors(&["keyward:root"]), [true, true, true, true, true]);
        assert_eq!(doors(&["keyward:admin"]), [true, true, true, true, false]);
        assert_eq!(doors(&["keyward:self"]), [true, true, false, false, false]);
        assert_eq!(doors(&["keyward:validate"]), [true, false, false, true, false]);
        assert_eq!(doors(&["keyward:validate-any"]), [true, false, false, true, false]);
        assert_eq!(doors(&["*"]), [true, false, false, false, false]);
        assert_eq!(doors(&[]), [true, false, false, false, false]);
    }

    #[test]
    fn only_root_leaves_its_workspace() {
        assert_eq!(caller(&["keyward:root"]).workspace("other").ok(), Some("other"));
        assert_eq!(caller(&["keyward:admin"]).workspace("").ok(), Some("default"));
        assert!(matches!(caller(&["keyward:admin"]).workspace("other"), Err(Error::NotFound("workspace"))));
        for id in ["a\0b", "a b", &"a".repeat(64)] {
            assert!(matches!(caller(&["keyward:root"]).workspace(id), Err(Error::NotFound("workspace"))), "{id:?} is no id");
        }
        assert_eq!(caller(&["keyward:admin"]).validation_reach(), Some("default"));
        assert_eq!(caller(&["keyward:validate-any"]).validation_reach(), None);
    }
}
