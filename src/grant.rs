//! The facts of a token, and what they mean for one use of it at one instant.
//!
//! A [`Grant`] is the facts as memory holds them: one piece of bytes, most of which are the answer that goes over the wire when the token is good.
//! So many of them fit into memory, and nothing is put together anew for each question.
//!
//! Invariant: [`Grant::judge`] is pure and looks at causes in one order, so a cached fact gives the answer that a fresh one gives
//! (test `the_first_cause_decides`).
//! Invariant: intervals are half-open: a token is expired at the very instant `expire_time` (test `a_token_ends_at_its_instant`).

mod memory;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use memory::Flag;
pub use memory::Grant;

use crate::{
    ambient::Time,
    scope::{self, Scope},
    token::{Digest, Prefix, TokenId},
};

/// How long a token is meant to live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// For an application or a person.
    Permanent,
    /// For one login session.
    Temporary,
}

/// What people have made of a token. Its expiry is not stored: time makes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It may be used.
    Active,
    /// Switched off for the time being.
    Inactive,
    /// Ended for good.
    Revoked,
}

/// A state as it is shown: what people made of it, and time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShownState {
    /// It may be used.
    Active,
    /// Switched off for the time being.
    Inactive,
    /// Past its date.
    Expired,
    /// Ended for good.
    Revoked,
}

/// A token with everything that may be shown of it.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// The workspace it belongs to.
    pub workspace: String,
    /// Its name.
    pub display_name: String,
    /// Whom it stands for.
    pub principal: String,
    /// How long it is meant to live.
    pub kind: Kind,
    /// What people made of it.
    pub state: State,
    /// The brand that its secrets begin with, for good.
    pub prefix: Prefix,
    /// The first 8 characters of its text.
    pub hint: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The products it is for; none: any.
    pub audiences: Vec<String>,
    /// Where it may be used from; none: anywhere.
    pub allowed_cidrs: Vec<IpNet>,
    /// Free text of its owner.
    pub metadata: BTreeMap<String, String>,
    /// The login session of a temporary one; may be empty.
    pub session_id: String,
    /// The principal who created it.
    pub created_by: String,
    /// When it was created.
    pub create_time: Time,
    /// When its settings, state or secret last changed.
    pub update_time: Time,
    /// When it ends; [`Time::NEVER`]: never.
    pub expire_time: Time,
    /// When it was revoked.
    pub revoke_time: Option<Time>,
    /// Why; may be empty.
    pub revoke_reason: String,
    /// Counts its changes.
    pub version: i64,
    /// When it was last used.
    pub last_used_time: Option<Time>,
    /// From where, if that was said.
    pub last_used_ip: Option<IpAddr>,
    /// How often it was used.
    pub use_count: i64,
}

impl Token {
    /// Its state at an instant.
    #[must_use]
    pub fn shown_state(&self, now: Time) -> ShownState {
        match self.state {
            State::Revoked => ShownState::Revoked,
            _ if self.expire_time <= now => ShownState::Expired,
            State::Active => ShownState::Active,
            State::Inactive => ShownState::Inactive,
        }
    }
}

/// The facts of a token that its judgement needs and its validator is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Its id.
    pub token_id: TokenId,
    /// The workspace it belongs to.
    pub workspace: String,
    /// Whom it stands for.
    pub principal: String,
    /// How long it is meant to live.
    pub kind: Kind,
    /// What people made of it.
    pub state: State,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The products it is for; none: any.
    pub audiences: Vec<String>,
    /// Where it may be used from; none: anywhere.
    pub allowed_cidrs: Vec<IpNet>,
    /// Its name.
    pub display_name: String,
    /// Free text of its owner.
    pub metadata: BTreeMap<String, String>,
    /// When it ends.
    pub expire_time: Time,
    /// Until when the secret that was presented is good: [`Time::NEVER`], or the end of its grace after a regeneration.
    pub secret_expire_time: Time,
    /// Whether its principal is suspended.
    pub principal_suspended: bool,
    /// Whether its principal has the role of an administrator.
    pub principal_is_admin: bool,
    /// Whether its workspace is suspended.
    pub workspace_suspended: bool,
}

/// What a change can be about: facts that depend on it are out of date once the change is made.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Subject {
    /// The token with this digest.
    Token(Digest),
    /// This principal, and with it all of its tokens.
    Principal {
        /// Its workspace.
        workspace: String,
        /// Its id.
        id: String,
    },
    /// This workspace, its routes, and with it all of its tokens.
    Workspace(String),
}

/// The scope that the method and path of an HTTP request lead to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Derived<'a> {
    /// No method and path were given.
    #[default]
    NotAsked,
    /// They lead nowhere: no token reaches that.
    NoRoute,
    /// They need this.
    Scope(&'a str),
}

/// What one use of a token needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need<'a> {
    /// The only workspace whose tokens may be told apart from unknown ones; nothing: every one.
    pub workspace: Option<&'a str>,
    /// The product that was called; nothing: not checked.
    pub audience: Option<&'a str>,
    /// The client that presented the token, if known.
    pub client_ip: Option<IpAddr>,
    /// The scopes that it takes: each a valid one without a wildcard.
    pub scopes: &'a [&'a str],
    /// The scope that it takes beside them, by the workspace's routes.
    pub derived: Derived<'a>,
}

/// The answer. See `Verdict` in the proto.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[expect(missing_docs, reason = "the proto's comments are these variants' documentation")]
pub enum Verdict {
    Valid,
    Unknown,
    Revoked,
    Expired,
    Inactive,
    PrincipalSuspended,
    WorkspaceSuspended,
    WrongAudience,
    IpNotAllowed,
    InsufficientScope,
}

impl Grant {
    /// Whether the token is good for this need, now. The first cause that applies is the verdict.
    #[must_use]
    pub fn judge(&self, need: &Need<'_>, now: Time) -> Verdict {
        let foreign = need.workspace.is_some_and(|workspace| self.workspace() != workspace);
        if foreign || self.secret_expire_time() <= now {
            Verdict::Unknown
        } else if self.state() == State::Revoked {
            Verdict::Revoked
        } else if self.expire_time() <= now {
            Verdict::Expired
        } else if self.state() == State::Inactive {
            Verdict::Inactive
        } else if self.has(Flag::PrincipalSuspended) {
            Verdict::PrincipalSuspended
        } else if self.has(Flag::WorkspaceSuspended) {
            Verdict::WorkspaceSuspended
        } else if !self.allows_audience(need.audience) {
            Verdict::WrongAudience
        } else if !self.allows_ip(need.client_ip) {
            Verdict::IpNotAllowed
        } else if need.derived == Derived::NoRoute || self.missing_scopes(need).next().is_some() {
            Verdict::InsufficientScope
        } else {
            Verdict::Valid
        }
    }

    /// The scopes that are needed and not held.
    pub fn missing_scopes<'a>(&'a self, need: &Need<'a>) -> impl Iterator<Item = &'a str> {
        let held = |needed: &str| self.scopes().any(|scope| scope::covers(scope, needed));
        let derived = match need.derived {
            Derived::Scope(scope) => Some(scope),
            Derived::NotAsked | Derived::NoRoute => None,
        };
        need.scopes.iter().copied().chain(derived).filter(move |needed| !held(needed))
    }

    fn allows_audience(&self, audience: Option<&str>) -> bool {
        audience.is_none_or(|asked| {
            let mut held = self.audiences().peekable();
            held.peek().is_none() || held.any(|held| held == asked)
        })
    }

    fn allows_ip(&self, client_ip: Option<IpAddr>) -> bool {
        !self.has_ranges()
            || client_ip.is_some_and(|ip| {
                // An IPv4 client of a dual-stack socket shows as ::ffff:a.b.c.d.
                let ip = ip.to_canonical();
                self.allowed_cidrs().any(|range| range.contains(&ip))
            })
    }
}

#[cfg(test)]
impl Facts {
    /// One that is good for `agents:list` at `billing` from 10.0.0.0/8.
    pub(crate) fn example(display_name: &str) -> Self {
        Self {
            token_id: TokenId::new(Time::from_micros(0)).expect("randomness"),
            workspace: "default".into(),
            principal: "alice".into(),
            kind: Kind::Permanent,
            state: State::Active,
            scopes: vec!["agents:list".parse().expect("a scope")],
            audiences: vec!["billing".to_owned()],
            allowed_cidrs: vec!["10.0.0.0/8".parse().expect("a range")],
            display_name: display_name.to_owned(),
            metadata: BTreeMap::new(),
            expire_time: Time::NEVER,
            secret_expire_time: Time::NEVER,
            principal_suspended: false,
            principal_is_admin: false,
            workspace_suspended: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Time = Time::from_micros(1_000_000_000);

    fn facts() -> Facts {
        Facts::example("ci")
    }

    fn judge(facts: &Facts, audience: Option<&str>, ip: Option<&str>, scope: &str, workspace: Option<&str>) -> Verdict {
        let client_ip = ip.map(|ip| ip.parse().expect("an address"));
        Grant::of(facts).judge(&Need { workspace, audience, client_ip, scopes: &[scope], derived: Derived::NotAsked }, NOW)
    }

    /// A cause of a refusal: its verdict, what it does to the facts, or which part of the need it spoils.
    type Cause = (Verdict, fn(&mut Facts), &'static str);

    /// In the order of judgement.
    const CAUSES: [Cause; 11] = [
        (Verdict::Unknown, |_| (), "workspace"),
        (Verdict::Unknown, |facts| facts.secret_expire_time = NOW, ""),
        (Verdict::Revoked, |facts| facts.state = State::Revoked, ""),
        (Verdict::Expired, |facts| facts.expire_time = NOW, ""),
        (Verdict::Inactive, |facts| facts.state = State::Inactive, ""),
        (Verdict::PrincipalSuspended, |facts| facts.principal_suspended = true, ""),
        (Verdict::WorkspaceSuspended, |facts| facts.workspace_suspended = true, ""),
        (Verdict::WrongAudience, |_| (), "audience"),
        (Verdict::IpNotAllowed, |_| (), "ip"),
        (Verdict::IpNotAllowed, |_| (), "no ip"),
        (Verdict::InsufficientScope, |_| (), "scope"),
    ];

    fn judge_with(causes: &[&Cause]) -> Verdict {
        let mut facts = facts();
        for cause in causes {
            cause.1(&mut facts);
        }
        let spoils = |part| causes.iter().any(|cause| cause.2 == part);
        judge(
            &facts,
            Some(if spoils("audience") { "shipping" } else { "billing" }),
            if spoils("no ip") { None } else { Some(if spoils("ip") { "11.0.0.1" } else { "10.1.2.3" }) },
            if spoils("scope") { "agents:delete" } else { "agents:list" },
            Some(if spoils("workspace") { "other" } else { "default" }),
        )
    }

    #[test]
    fn the_first_cause_decides() {
        assert_eq!(judge_with(&[]), Verdict::Valid);
        for (index, first) in CAUSES.iter().enumerate() {
            assert_eq!(judge_with(&[first]), first.0);
            for second in &CAUSES[index..] {
                // A token is revoked or inactive, not both: the later state stands.
                if (first.0, second.0) == (Verdict::Revoked, Verdict::Inactive) {
                    continue;
                }
                assert_eq!(judge_with(&[first, second]), first.0, "{:?} comes before {:?}", first.0, second.0);
            }
        }
    }

    #[test]
    fn a_token_ends_at_its_instant() {
        let mut facts = facts();
        facts.expire_time = NOW + Duration::from_micros(1);
        assert_eq!(judge(&facts, None, Some("10.1.2.3"), "agents:list", None), Verdict::Valid);
        facts.expire_time = NOW;
        assert_eq!(judge(&facts, None, Some("10.1.2.3"), "agents:list", None), Verdict::Expired);
    }

    #[test]
    fn a_mapped_address_is_its_ipv4_address() {
        assert_eq!(judge(&facts(), None, Some("::ffff:10.1.2.3"), "agents:list", None), Verdict::Valid);
        assert_eq!(judge(&facts(), None, Some("::ffff:11.1.2.3"), "agents:list", None), Verdict::IpNotAllowed);
    }

    #[test]
    fn a_token_without_audiences_is_good_at_any() {
        let mut facts = facts();
        facts.audiences.clear();
        assert_eq!(judge(&facts, Some("shipping"), Some("10.1.2.3"), "agents:list", None), Verdict::Valid);
    }

    #[test]
    fn a_path_needs_the_scope_of_its_route() {
        let (held, other) = ("agents:list", "agents:delete");
        let need = |derived| Need { client_ip: Some("10.1.2.3".parse().expect("an address")), derived, ..Need::default() };
        let mut facts = facts();
        assert_eq!(Grant::of(&facts).judge(&need(Derived::Scope(held)), NOW), Verdict::Valid);
        assert_eq!(Grant::of(&facts).judge(&need(Derived::Scope(other)), NOW), Verdict::InsufficientScope);
        assert_eq!(Grant::of(&facts).missing_scopes(&need(Derived::Scope(other))).collect::<Vec<_>>(), [other]);
        facts.scopes = vec!["*".parse().expect("a scope")];
        assert_eq!(
            Grant::of(&facts).judge(&need(Derived::NoRoute), NOW),
            Verdict::InsufficientScope,
            "no scope opens a path without a route"
        );
    }

    #[test]
    fn a_token_without_scopes_reaches_nothing_that_requires_one() {
        let mut facts = facts();
        facts.scopes.clear();
        assert_eq!(judge(&facts, None, Some("10.1.2.3"), "agents:list", None), Verdict::InsufficientScope);
        let need = Need { client_ip: Some("10.1.2.3".parse().expect("an address")), ..Need::default() };
        assert_eq!(Grant::of(&facts).judge(&need, NOW), Verdict::Valid);
    }
}
