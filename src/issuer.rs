//! The control plane: tokens are created, listed, changed, given new secrets and ended.
//!
//! Invariant: a policy is applied when a token is created or its end is moved; a later one never shortens a life (test
//! `a_policy_counts_for_what_comes_after_it`).
//! Invariant: a principal never has more live tokens of a kind than the policy allows (test `a_principal_has_so_many_live_tokens_and_no_more`).
//! Invariant: nobody grants what they do not hold, or changes a token that holds more than they do (test
//! `an_administrator_cannot_take_over_a_root_token`).
//! Invariant: what belongs to another workspace is not found (test `tokens_of_another_workspace_are_not_found`).

mod ending;
mod listing;
mod patch;
mod replay;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use patch::Patch;
use replay::{Replay, answer_again};

pub(crate) use ending::{Ending, end_all};
pub use listing::ListRequest;
pub use replay::RequestId;

use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    fence::{Changed, Fence, RootWatch},
    grant::{Kind, ShownState, State, Subject, Token},
    notice::{Event, Wishes},
    notices::{News, tell},
    rules::{self, Lifetime},
    scope::{Right, Scope},
    store::{AuditEvent, Store, Tx},
    token::{Digest, Issued, Keyring, Prefix, Secret, TokenId},
    workspace::{Brief, Policy, Principal, Workspace},
};

/// What a new token shall be, as it was asked for.
#[derive(Clone, Debug, Default)]
pub struct NewToken {
    /// Empty: the caller's.
    pub workspace: String,
    /// Its name.
    pub display_name: String,
    /// Empty: the caller's.
    pub principal: String,
    /// Temporary rather than permanent.
    pub temporary: bool,
    /// What it may do.
    pub scopes: Vec<String>,
    /// The products it is for.
    pub audiences: Vec<String>,
    /// Where it may be used from.
    pub allowed_cidrs: Vec<String>,
    /// Free text.
    pub metadata: BTreeMap<String, String>,
    /// The login session of a temporary one.
    pub session_id: String,
    /// When it ends.
    pub lifetime: Lifetime,
    /// When it ends at the latest, whatever the policy says.
    pub end_max: Option<Time>,
    /// Rules that were found broken while the request was read; they are reported with those that are found here.
    pub violations: Violations,
}

/// What to change of a token; nothing: leave it.
#[derive(Clone, Debug, Default)]
pub struct TokenPatch {
    /// Its name.
    pub display_name: Option<String>,
    /// What it may do.
    pub scopes: Option<Vec<String>>,
    /// The products it is for.
    pub audiences: Option<Vec<String>>,
    /// Where it may be used from.
    pub allowed_cidrs: Option<Vec<String>>,
    /// Free text.
    pub metadata: Option<BTreeMap<String, String>>,
    /// When it ends.
    pub expire_time: Option<Time>,
    /// As in [`NewToken`].
    pub violations: Violations,
}

/// One existing token, and what the caller has seen of it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its id, as it was sent.
    pub id: String,
    /// Empty: whatever it is.
    pub etag: String,
}

/// How long the old secret lives on beside a new one.
#[derive(Clone, Debug, Default)]
pub struct Grace {
    /// Zero: not at all.
    pub grace: Duration,
    /// As in [`NewToken`].
    pub violations: Violations,
}

/// A token with its new secret.
#[derive(Debug)]
pub struct Regenerated {
    /// The token.
    pub token: Token,
    /// Its new secret.
    pub secret: Secret,
    /// Until when the old one is good.
    pub grace_time: Option<Time>,
}

/// What the caller is shown to compare a token by.
#[must_use]
pub fn etag(token: &Token) -> String {
    format!("v{}", token.version)
}

/// Changes tokens.
pub struct Issuer {
    keyring: Arc<Keyring>,
    store: Arc<Store>,
    fence: Arc<Fence>,
    reports: Arc<Semaphore>,
}

impl Issuer {
    /// One that issues tokens of this keyring.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, store: Arc<Store>, fence: Arc<Fence>) -> Arc<Self> {
        Arc::new(Self { keyring, store, fence, reports: Arc::new(Semaphore::new(ending::REPORTS_MAX)) })
    }

    /// On a store where nothing was ever made: makes the workspace `default` and one root token. `keep` gets the secret before it counts.
    ///
    /// # Errors
    /// `Unavailable`, and whatever `keep` fails with.
    pub async fn bootstrap(&self, now: Time, keep: impl FnOnce(&Secret) -> Result<()>) -> Result<()> {
        let mut tx = self.store.begin_change().await?;
        if !tx.is_empty().await? {
            return Ok(());
        }
        let prefix = "kw".parse::<Prefix>().map_err(|rule| Error::Internal(rule.into()))?;
        let workspace = Workspace {
            id: "default".to_owned(),
            display_name: "Default".to_owned(),
            prefix,
            policy: Policy::default(),
            resources: Vec::new(),
            notices: Wishes::default(),
            suspended: false,
            create_time: now,
            update_time: now,
            version: 1,
        };
        tx.insert_workspace(&workspace).await?;
        tx.claim_prefix(workspace.prefix.as_str(), &workspace.id).await?;
        tx.insert_principal(&Principal::first_used(&workspace.id, "root", now)).await?;
        let secret = self.issue_root(&tx, &workspace, "Root token of the first start", "Bootstrap", now).await?;
        keep(&secret)?;
        tx.commit(now).await
    }

    /// Makes one more root token, for when the last one is lost: in workspace `default` if that is there, for the principal `root`, both of
    /// which are resumed if they were suspended.
    ///
    /// # Errors
    /// `NotFound` (nothing was ever made in this store), `Unavailable`.
    pub async fn recover(&self, now: Time) -> Result<Secret> {
        let first = self.store.workspaces(None, 1).await?.pop();
        let mut tx = self.store.begin_change().await?;
        let id = if tx.brief("default").await?.is_some() { "default" } else { first.as_ref().map_or("", |first| first.id.as_str()) };
        let workspace = tx.workspace(id).await?.ok_or(Error::NotFound("workspace"))?;
        if workspace.suspended {
            tx.update_workspace(&Workspace { suspended: false, version: workspace.version + 1, ..workspace.clone() }).await?;
        }
        match tx.principal(&workspace.id, "root").await? {
            Some(root) if root.suspended => {
                tx.update_principal(&Principal { suspended: false, version: root.version + 1, ..root }).await?;
            }
            Some(_) => {}
            None => {
                tx.insert_principal(&Principal::first_used(&workspace.id, "root", now)).await?;
            }
        }
        let secret = self.issue_root(&tx, &workspace, "Root token of a recovery", "Recover", now).await?;
        tx.commit(now).await?;
        Ok(secret)
    }

    async fn issue_root(&self, tx: &Tx<'_>, workspace: &Workspace, name: &str, method: &'static str, now: Time) -> Result<Secret> {
        let root = "keyward:root".parse::<Scope>().map_err(|rule| Error::Internal(rule.into()))?;
        let Issued { secret, digest } = self.keyring.issue(&workspace.prefix)?;
        let token = Token {
            id: TokenId::new(now)?,
            workspace: workspace.id.clone(),
            display_name: name.to_owned(),
            principal: "root".to_owned(),
            kind: Kind::Permanent,
            state: State::Active,
            prefix: workspace.prefix.clone(),
            hint: secret.hint(),
            scopes: vec![root],
            audiences: Vec::new(),
            allowed_cidrs: Vec::new(),
            metadata: BTreeMap::new(),
            session_id: String::new(),
            created_by: "root".to_owned(),
            create_time: now,
            update_time: now,
            expire_time: Time::NEVER,
            revoke_time: None,
            revoke_reason: String::new(),
            version: 1,
            last_used_time: None,
            last_used_ip: None,
            use_count: 0,
        };
        tx.insert_token(&token, &digest).await?;
        tx.audit([event(method, None, &token, "", None, Some(&token), now)]).await?;
        Ok(secret)
    }

    /// Creates a token.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (a scope that the caller does not hold, or a permanent token that only administrators create), `NotFound` (the workspace),
    /// `Precondition` (the principal is suspended, unknown, or has as many as the policy allows), `Unavailable`, `Overloaded`.
    pub async fn create(
        self: &Arc<Self>,
        caller: Caller,
        new: NewToken,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<(Token, Secret)>> {
        self.create_as("CreateToken", caller, new, request, now).await
    }

    /// Creates a permanent token for the caller's own principal.
    ///
    /// # Errors
    /// As [`Issuer::create`].
    pub async fn create_own(
        self: &Arc<Self>,
        caller: Caller,
        mut new: NewToken,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<(Token, Secret)>> {
        if caller.token_id.is_some() {
            keep_within(&self.presented(&caller).await?, &mut new);
        }
        self.create_as("CreateMyToken", caller, new, request, now).await
    }

    /// Creates a temporary token for the caller's own principal, bound to the session that the presented token is bound to.
    ///
    /// # Errors
    /// As [`Issuer::create`].
    pub async fn issue_temporary(
        self: &Arc<Self>,
        caller: Caller,
        mut new: NewToken,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<(Token, Secret)>> {
        if new.display_name.is_empty() {
            "Temporary token".clone_into(&mut new.display_name);
        }
        if caller.token_id.is_some() {
            let presented = self.presented(&caller).await?;
            keep_within(&presented, &mut new);
            if presented.kind == Kind::Temporary {
                new.end_max = Some(presented.expire_time);
            }
            let session_id = presented.session_id;
            if new.session_id.is_empty() {
                new.session_id = session_id;
            } else if !session_id.is_empty() && session_id != new.session_id {
                new.violations.add("session_id", "must be empty, or the session that the presented token is bound to");
            }
        }
        self.create_as("IssueTemporaryToken", caller, NewToken { temporary: true, ..new }, request, now).await
    }

    async fn create_as(
        self: &Arc<Self>,
        method: &'static str,
        caller: Caller,
        new: NewToken,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<(Token, Secret)>> {
        let issuer = Arc::clone(self);
        self.fence.run(async move { issuer.create_now(method, &caller, new, &request, now).await }).await
    }

    async fn create_now(
        self: &Arc<Self>,
        method: &'static str,
        caller: &Caller,
        new: NewToken,
        request: &RequestId,
        now: Time,
    ) -> Result<Changed<(Token, Secret)>> {
        let workspace = self.store.brief(caller.workspace(&new.workspace)?).await?.ok_or(Error::NotFound("workspace"))?;
        let drafted = match draft(caller, new, &workspace, request, now) {
            Err(error) if !request.is_named() => return Err(error),
            drafted => drafted,
        };
        let mut tx = self.store.begin_unnumbered().await?;
        // First what was answered: what it asked for may have been possible then and not be now.
        let replay = match self.claim(&tx, method, caller, request, now).await? {
            Replay::Answered(kept) => {
                tx.require(caller, now).await?;
                return answer_again(&kept, caller, false, &tx).await.map(|token| Changed::new((token, kept.secret)));
            }
            Replay::New(replay) => replay,
        };
        let mut token = drafted?;
        let made = make_room(&mut tx, &token, &workspace.policy, now).await?;
        // The gate judged the caller before the wait for this turn: who was revoked meanwhile makes nothing more.
        tx.require(caller, now).await?;
        let issued = self.keyring.issue(&token.prefix)?;
        token.hint = issued.secret.hint();
        tx.insert_token(&token, &issued.digest).await?;
        let principal = made.as_ref().map(|principal| principal_event(method, caller, principal, now));
        tx.audit(principal.into_iter().chain([event(method, Some(caller), &token, "", None, Some(&token), now)])).await?;
        let news = News { event: Event::Created, actor: Some(caller), reason: "" };
        tell(&tx, &workspace.id, &workspace.notices, news, &[&token], now).await?;
        self.keep(&tx, replay, token.id, &issued.secret, None).await?;
        tx.commit(now).await?;
        if let Some(Principal { workspace, id, .. }) = made {
            // A certificate that stands for it was refused as long as it was not there.
            self.fence.bury(&[Subject::Principal { workspace, id }]);
        }
        Ok(Changed::new((token, issued.secret)))
    }

    /// One token.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Unavailable`, `Overloaded`.
    pub async fn get(&self, caller: &Caller, id: &str) -> Result<Token> {
        let id = parse_id("id", id)?;
        self.store.token(id, caller.management_reach()).await?.ok_or(Error::NotFound("token"))
    }

    /// The token that the caller presented.
    ///
    /// # Errors
    /// `Precondition` if the caller came with a certificate; `NotFound`, `Unavailable`, `Overloaded`.
    pub async fn presented(&self, caller: &Caller) -> Result<Token> {
        let id = presented_id(caller)?;
        self.store.token(id, None).await?.ok_or(Error::NotFound("token"))
    }

    /// Changes settings.
    ///
    /// # Errors
    /// `Invalid`, `Denied`, `NotFound`, `Conflict`, `Precondition`, `Unavailable`, `Overloaded`.
    pub async fn update(self: &Arc<Self>, caller: Caller, target: Target, patch: TokenPatch, now: Time) -> Result<Changed<Token>> {
        let policy = if patch.expire_time.is_some() { self.policy(&caller, &target.id).await } else { Ok(Policy::default()) };
        let patch = Patch::check(patch, &target.id, now)?;
        let policy = policy?;
        let change = move |token: &mut Token, caller: &Caller| {
            require_live(token, now)?;
            patch.apply(token, &policy, now)?;
            caller.outranks(&token.scopes)
        };
        self.change("UpdateToken", caller, target, String::new(), change, now).await
    }

    /// The policy that a token's end is moved within.
    async fn policy(&self, caller: &Caller, id: &str) -> Result<Policy> {
        let token = self.get(caller, id).await?;
        Ok(self.store.brief(&token.workspace).await?.ok_or(Error::NotFound("workspace"))?.policy)
    }

    /// Switches a token on.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn activate(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<Changed<Token>> {
        let change = move |token: &mut Token, _: &Caller| {
            require_live(token, now)?;
            token.state = State::Active;
            Ok(())
        };
        self.change("ActivateToken", caller, target, String::new(), change, now).await
    }

    /// Switches a token off.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn deactivate(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<Changed<Token>> {
        let change = move |token: &mut Token, _: &Caller| {
            if token.state == State::Revoked {
                return Err(Error::precondition(REVOKED));
            }
            token.state = State::Inactive;
            Ok(())
        };
        self.change("DeactivateToken", caller, target, String::new(), change, now).await
    }

    /// Ends a token for good.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn revoke(self: &Arc<Self>, caller: Caller, target: Target, reason: &str, now: Time) -> Result<Changed<Token>> {
        let mut violations = Violations::default();
        violations.take("id", rules::id(&target.id));
        let reason = violations.take("reason", rules::reason(reason)).unwrap_or_default();
        violations.finish()?;
        let change = {
            let reason = reason.clone();
            move |token: &mut Token, _: &Caller| {
                end(token, &reason, now);
                Ok(())
            }
        };
        self.change("RevokeToken", caller, target, reason, change, now).await
    }

    /// Ends the token that the caller presented.
    ///
    /// # Errors
    /// `Precondition` if the caller came with a certificate; `Invalid`, `Unavailable`, `Overloaded`.
    pub async fn revoke_self(self: &Arc<Self>, caller: Caller, reason: &str, now: Time) -> Result<Changed<Token>> {
        let reason = rules::reason(reason).map_err(|rule| Error::invalid("reason", rule))?;
        let target = Target { id: presented_id(&caller)?.to_string(), etag: String::new() };
        let change = {
            let reason = reason.clone();
            move |token: &mut Token, _: &Caller| {
                end(token, &reason, now);
                Ok(())
            }
        };
        let issuer = Arc::clone(self);
        self.fence.run(async move { issuer.change_now("RevokeSelf", &caller, &target, &reason, true, change, now).await }).await
    }

    /// Gives a token a new secret.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn regenerate(
        self: &Arc<Self>,
        caller: Caller,
        target: Target,
        grace: Grace,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<Regenerated>> {
        let issuer = Arc::clone(self);
        self.fence.run(async move { issuer.regenerate_now("RegenerateToken", &caller, &target, grace, &request, false, now).await }).await
    }

    /// Gives the token that the caller presented a new secret.
    ///
    /// # Errors
    /// `Precondition` if the caller came with a certificate; `Invalid`, `Unavailable`, `Overloaded`.
    pub async fn regenerate_self(
        self: &Arc<Self>,
        caller: Caller,
        grace: Grace,
        request: RequestId,
        now: Time,
    ) -> Result<Changed<Regenerated>> {
        let target = Target { id: presented_id(&caller)?.to_string(), etag: String::new() };
        let issuer = Arc::clone(self);
        self.fence.run(async move { issuer.regenerate_now("RegenerateSelf", &caller, &target, grace, &request, true, now).await }).await
    }

    #[expect(clippy::too_many_arguments, reason = "what the two methods differ in, and what the call brings")]
    async fn regenerate_now(
        self: &Arc<Self>,
        method: &'static str,
        caller: &Caller,
        target: &Target,
        Grace { grace, mut violations }: Grace,
        request: &RequestId,
        own: bool,
        now: Time,
    ) -> Result<Changed<Regenerated>> {
        let id = violations.take("id", rules::id(&target.id));
        violations.take("grace", rules::grace_time(grace, Time::NEVER, now));
        if !request.id.is_empty() {
            violations.take("request_id", rules::request_id(&request.id));
        }
        violations.finish()?;
        let id = id.ok_or_else(|| Error::Internal("a violation was lost".into()))?;
        let mut tx = self.store.begin_change().await?;
        let replay = match self.claim(&tx, method, caller, request, now).await? {
            Replay::Answered(kept) => {
                // Whoever repeats this about their own token came with the secret from before.
                if caller.token_id != Some(kept.id) {
                    tx.require(caller, now).await?;
                }
                let token = answer_again(&kept, caller, own, &tx).await?;
                // The call before may have ended before every server knew that the secret from before has gone.
                return Ok(self.fence.repeat(&tx, &[]).of(Regenerated { token, secret: kept.secret, grace_time: kept.grace_time }));
            }
            Replay::New(replay) => replay,
        };
        tx.require(caller, now).await?;
        let (mut token, digests) = self.find(&tx, caller, id, own).await?;
        check_etag(&token, target)?;
        require_live(&token, now)?;
        let grace_time = rules::grace_time(grace, token.expire_time, now).map_err(|rule| Error::invalid("grace", rule))?;
        let Issued { secret, digest } = self.keyring.issue(&token.prefix)?;
        let before = token.clone();
        token.hint = secret.hint();
        token.version += 1;
        token.update_time = now;
        tx.update_token(&token, &digests).await?;
        tx.replace_digest(id, &digest, grace_time).await?;
        tx.audit([event(method, Some(caller), &token, "", Some(&before), Some(&token), now)]).await?;
        tell_of(&tx, News { event: Event::Regenerated, actor: Some(caller), reason: "" }, &[&token], now).await?;
        self.keep(&tx, replay, id, &secret, grace_time).await?;
        Ok(self.fence.conclude(tx, now).await?.of(Regenerated { token, secret, grace_time }))
    }

    /// Ends a token and takes it out of every list.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn delete(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<Changed<()>> {
        let issuer = Arc::clone(self);
        self.fence
            .run_unless_gone("token", async move {
                let id = parse_id("id", &target.id)?;
                let mut tx = issuer.store.begin_change_by(&caller, now).await?;
                let found = issuer.find(&tx, &caller, id, false).await;
                if matches!(found, Err(Error::NotFound(_))) {
                    let digests = tx.digests(id, caller.management_reach()).await?;
                    if digests.is_empty() {
                        return Err(Error::NotFound("token"));
                    }
                    // A call before may have deleted it and failed: what is known of it ends now at the latest.
                    return Ok(Err(issuer.fence.repeat(&tx, &subjects(&digests))));
                }
                let (token, digests) = found?;
                check_etag(&token, &target)?;
                let watch = watch_root(&tx, &caller, [&token], now).await?;
                tx.delete_token(&token, &digests, now).await?;
                end_watch(watch, &tx).await?;
                tx.audit([event("DeleteToken", Some(&caller), &token, "", Some(&token), None, now)]).await?;
                if matches!(token.shown_state(now), ShownState::Active | ShownState::Inactive) {
                    tell_of(&tx, News { event: Event::Revoked, actor: Some(&caller), reason: "" }, &[&token], now).await?;
                }
                issuer.fence.conclude(tx, now).await.map(|change| Ok(change.of(())))
            })
            .await
    }

    async fn change(
        self: &Arc<Self>,
        method: &'static str,
        caller: Caller,
        target: Target,
        reason: String,
        change: impl FnOnce(&mut Token, &Caller) -> Result<()> + Send + 'static,
        now: Time,
    ) -> Result<Changed<Token>> {
        let issuer = Arc::clone(self);
        self.fence.run(async move { issuer.change_now(method, &caller, &target, &reason, false, change, now).await }).await
    }

    /// Changes one token, unless it is as wished already. Either way the change is announced: a call before may have made it and failed.
    #[expect(clippy::too_many_arguments, reason = "what the methods differ in, and what the call brings")]
    async fn change_now(
        self: &Arc<Self>,
        method: &'static str,
        caller: &Caller,
        target: &Target,
        reason: &str,
        own: bool,
        change: impl FnOnce(&mut Token, &Caller) -> Result<()> + Send,
        now: Time,
    ) -> Result<Changed<Token>> {
        let id = parse_id("id", &target.id)?;
        let mut tx = self.store.begin_change_by(caller, now).await?;
        let (before, digests) = self.find(&tx, caller, id, own).await?;
        check_etag(&before, target)?;
        let mut token = before.clone();
        change(&mut token, caller)?;
        if settings(&token) == settings(&before) {
            return Ok(self.fence.repeat(&tx, &subjects(&digests)).of(before));
        }
        token.version += 1;
        token.update_time = now;
        let watch = watch_root(&tx, caller, [&before], now).await?;
        tx.update_token(&token, &digests).await?;
        end_watch(watch, &tx).await?;
        if token.audiences != before.audiences {
            tx.replace_audiences(&token).await?;
        }
        tx.audit([event(method, Some(caller), &token, reason, Some(&before), Some(&token), now)]).await?;
        if token.state == State::Revoked {
            tell_of(&tx, News { event: Event::Revoked, actor: Some(caller), reason }, &[&token], now).await?;
        }
        Ok(self.fence.conclude(tx, now).await?.of(token))
    }

    async fn find(&self, tx: &Tx<'_>, caller: &Caller, id: TokenId, own: bool) -> Result<(Token, Vec<Digest>)> {
        let found = tx.token(id, caller.management_reach()).await?.ok_or(Error::NotFound("token"))?;
        if !own {
            caller.outranks(&found.0.scopes)?;
        }
        Ok(found)
    }
}

const REVOKED: &str = "the token was revoked, which is for good; create a new one";
const EXPIRED: &str = "the token has expired; create a new one";

/// A token for oneself is good at the products and from the addresses of the presented one at most: at all of them, if none are named.
fn keep_within(presented: &Token, new: &mut NewToken) {
    if new.audiences.is_empty() {
        new.audiences.clone_from(&presented.audiences);
    } else if !presented.audiences.is_empty() {
        for (index, _) in new.audiences.iter().enumerate().filter(|(_, audience)| !presented.audiences.contains(audience)) {
            new.violations.add(format!("audiences[{index}]"), "must be one of the presented token's audiences");
        }
    }
    if new.allowed_cidrs.is_empty() {
        new.allowed_cidrs = presented.allowed_cidrs.iter().map(ToString::to_string).collect();
    } else if !presented.allowed_cidrs.is_empty() {
        let is_within = |text: &str| rules::cidr(text).is_ok_and(|range| presented.allowed_cidrs.iter().any(|held| held.contains(&range)));
        for (index, _) in new.allowed_cidrs.iter().enumerate().filter(|(_, text)| !is_within(text)) {
            new.violations.add(format!("allowed_cidrs[{index}]"), "must lie within one of the presented token's ranges");
        }
    }
}

/// Sees to it that there is room for one more token of this principal, which nobody else takes before this transaction ends. Answers the principal if it
/// was never heard of and was made now.
async fn make_room(tx: &mut Tx<'_>, token: &Token, policy: &Policy, now: Time) -> Result<Option<Principal>> {
    let (principal, made) = match tx.principal(&token.workspace, &token.principal).await? {
        Some(principal) => (principal, false),
        None if !policy.principals_on_first_use => {
            return Err(Error::precondition(format!(
                "there is no principal {}, and the workspace's policy (principals_on_first_use) does not make one: make it with UpsertPrincipal first",
                token.principal
            )));
        }
        None => {
            let made = tx.insert_principal(&Principal::first_used(&token.workspace, &token.principal, now)).await?;
            // Somebody else may have made it just now; either way it is ours until the end.
            (tx.principal(&token.workspace, &token.principal).await?.ok_or(Error::NotFound("principal"))?, made)
        }
    };
    if principal.suspended {
        return Err(Error::precondition(format!("the principal {} is suspended: resume it first", principal.id)));
    }
    let tokens_max = policy.max_tokens_per_principal;
    if tx.live_token_count(&token.workspace, &token.principal, token.kind, tokens_max, now).await? >= i64::from(tokens_max) {
        let kind = match token.kind {
            Kind::Permanent => "permanent",
            Kind::Temporary => "temporary",
        };
        return Err(Error::precondition(format!(
            "the principal {} has {tokens_max} live {kind} tokens, which is the most that the workspace's policy (max_tokens_per_principal) allows: \
             revoke one first",
            principal.id
        )));
    }
    Ok(made.then_some(principal))
}

/// Tells of tokens of one workspace, as far as that wants to hear of it.
async fn tell_of(tx: &Tx<'_>, news: News<'_>, tokens: &[&Token], now: Time) -> Result<()> {
    let Some(first) = tokens.first() else { return Ok(()) };
    match tx.brief(&first.workspace).await? {
        Some(brief) => tell(tx, &brief.id, &brief.notices, news, tokens, now).await,
        None => Ok(()),
    }
}

fn subjects(digests: &[Digest]) -> Vec<Subject> {
    digests.iter().copied().map(Subject::Token).collect()
}

/// Watches over the last root token if one of these is one.
async fn watch_root<'a>(tx: &Tx<'_>, caller: &Caller, tokens: impl IntoIterator<Item = &'a Token>, now: Time) -> Result<Option<RootWatch>> {
    let is_root = |token: &Token| token.scopes.iter().any(|scope| Right::of(scope) == Some(Right::Root));
    if tokens.into_iter().any(is_root) { RootWatch::begin(tx, caller, now).await.map(Some) } else { Ok(None) }
}

async fn end_watch(watch: Option<RootWatch>, tx: &Tx<'_>) -> Result<()> {
    match watch {
        Some(watch) => watch.end(tx).await,
        None => Ok(()),
    }
}

/// The token that is asked for, without its secret.
fn draft(caller: &Caller, new: NewToken, workspace: &Brief, request: &RequestId, now: Time) -> Result<Token> {
    let kind = if new.temporary { Kind::Temporary } else { Kind::Permanent };
    let principal = if new.principal.is_empty() { caller.principal.to_string() } else { new.principal };
    let mut violations = new.violations;
    let display_name = violations.take("display_name", rules::display_name(&new.display_name)).unwrap_or_default();
    violations.take("principal", rules::principal(&principal));
    let scopes = rules::scopes("scopes", &new.scopes, &mut violations);
    let audiences = rules::audiences("audiences", &new.audiences, &mut violations);
    let allowed_cidrs = rules::allowed_cidrs("allowed_cidrs", &new.allowed_cidrs, &mut violations);
    rules::metadata("metadata", &new.metadata, &mut violations);
    violations.take("session_id", rules::session_id(&new.session_id, kind));
    let end = rules::expire_time(new.lifetime, kind, &workspace.policy, now);
    let end = match (end, new.end_max) {
        (Ok(end), Some(latest)) if end > latest && new.lifetime != Lifetime::Usual => {
            Err(("ttl", format!("must not be longer than the presented token lives, until {latest}")))
        }
        (end, latest) => end.map(|end| latest.map_or(end, |latest| end.min(latest))),
    };
    let expire_time = end.map_err(|(field, rule)| violations.add(field, rule)).unwrap_or(now);
    if !request.id.is_empty() {
        violations.take("request_id", rules::request_id(&request.id));
    }
    violations.finish()?;
    if let Some(scope) = scopes.iter().find(|scope| !caller.can_grant(scope)) {
        return Err(Error::Denied(format!("the caller cannot grant `{scope}`, since they do not hold it")));
    }
    if kind == Kind::Permanent && workspace.policy.permanent_requires_admin && !caller.is_admin() && !caller.has_admin_role {
        let rule = "the workspace's policy (permanent_requires_admin) leaves permanent tokens to administrators: ask one, or take a temporary token";
        return Err(Error::Denied(rule.to_owned()));
    }
    if workspace.suspended {
        return Err(Error::precondition("the workspace is suspended: resume it first"));
    }
    Ok(Token {
        id: TokenId::new(now)?,
        workspace: workspace.id.clone(),
        display_name,
        principal,
        kind,
        state: State::Active,
        prefix: workspace.prefix.clone(),
        hint: String::new(),
        scopes,
        audiences,
        allowed_cidrs,
        metadata: new.metadata,
        session_id: new.session_id,
        created_by: caller.principal.to_string(),
        create_time: now,
        update_time: now,
        expire_time,
        revoke_time: None,
        revoke_reason: String::new(),
        version: 1,
        last_used_time: None,
        last_used_ip: None,
        use_count: 0,
    })
}

/// Revokes, once: the first reason and time stand.
fn end(token: &mut Token, reason: &str, now: Time) {
    if token.state != State::Revoked {
        token.state = State::Revoked;
        token.revoke_time = Some(now);
        reason.clone_into(&mut token.revoke_reason);
    }
}

fn require_live(token: &Token, now: Time) -> Result<()> {
    match token.shown_state(now) {
        ShownState::Active | ShownState::Inactive => Ok(()),
        ShownState::Revoked => Err(Error::precondition(REVOKED)),
        ShownState::Expired => Err(Error::precondition(EXPIRED)),
    }
}

fn check_etag(token: &Token, target: &Target) -> Result<()> {
    if target.etag.is_empty() || target.etag == etag(token) { Ok(()) } else { Err(Error::Conflict) }
}

fn parse_id(field: &str, text: &str) -> Result<TokenId> {
    rules::id(text).map_err(|rule| Error::invalid(field, rule))
}

fn presented_id(caller: &Caller) -> Result<TokenId> {
    caller
        .token_id
        .ok_or_else(|| Error::precondition("the caller came with a client certificate; this method is about the token that is presented"))
}

/// What the audit keeps of a token, and what tells whether a change changes anything.
fn settings(token: &Token) -> Value {
    json!({
        "display_name": token.display_name,
        "kind": match token.kind { Kind::Permanent => "PERMANENT", Kind::Temporary => "TEMPORARY" },
        "state": match token.state { State::Active => "ACTIVE", State::Inactive => "INACTIVE", State::Revoked => "REVOKED" },
        "hint": token.hint,
        "scopes": token.scopes.iter().map(Scope::as_str).collect::<Vec<_>>(),
        "audiences": token.audiences,
        "allowed_cidrs": token.allowed_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "metadata": token.metadata,
        "session_id": token.session_id,
        "expire_time": (token.expire_time != Time::NEVER).then(|| token.expire_time.to_string()),
        "revoke_reason": token.revoke_reason,
        "version": token.version,
    })
}

fn event<'a>(
    method: &'static str,
    actor: Option<&'a Caller>,
    token: &'a Token,
    reason: &'a str,
    before: Option<&Token>,
    after: Option<&Token>,
    time: Time,
) -> AuditEvent<'a> {
    AuditEvent {
        workspace: &token.workspace,
        time,
        method,
        code: AuditEvent::DONE,
        actor,
        token_id: Some(token.id),
        principal: &token.principal,
        reason,
        before: before.map(settings),
        after: after.map(settings),
    }
}

fn principal_event<'a>(method: &'static str, actor: &'a Caller, principal: &'a Principal, time: Time) -> AuditEvent<'a> {
    AuditEvent {
        workspace: &principal.workspace,
        time,
        method,
        code: AuditEvent::DONE,
        actor: Some(actor),
        token_id: None,
        principal: &principal.id,
        reason: "",
        before: None,
        after: Some(principal.settings()),
    }
}
