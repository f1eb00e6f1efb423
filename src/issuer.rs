//! The control plane: tokens are created, listed, changed, given new secrets and ended.
//!
//! Invariant: a change runs to its end once it has begun, whether or not its caller still waits, and is announced to the cache before the
//! call returns (tests `a_cancelled_change_is_whole`, `a_change_is_effective_when_its_call_returns`).
//! Invariant: while it is uncertain whether a change was made, nothing is kept of what is read of its token (test
//! `a_commit_that_comes_late_leaves_no_old_fact`).
//! Invariant: nobody grants what they do not hold, or changes a token that holds more than they do (test
//! `an_administrator_cannot_take_over_a_root_token`).
//! Invariant: what belongs to another workspace is not found (test `tokens_of_another_workspace_are_not_found`).

mod listing;
mod replay;
mod rules;

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use replay::{Replay, answer_again};

pub use listing::ListRequest;
pub use replay::RequestId;
pub use rules::Lifetime;

use crate::{
    ambient::Time,
    cache::Cache,
    caller::Caller,
    error::{Error, Result, Violations},
    grant::{Kind, ShownState, State, Token},
    scope::Scope,
    store::{AuditEvent, Store, Tx},
    token::{Digest, Issued, Keyring, Prefix, Secret, TokenId},
};

/// How long the log of changes is kept.
const LOG_LIFETIME: Duration = Duration::from_hours(1);
/// How often a change whose outcome is uncertain is asked about.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);
/// Changes that are made or wait for their turn; more are refused rather than queued. They outlive their callers.
const CHANGES_MAX: usize = 512;

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
    cache: Arc<Cache>,
    store: Arc<Store>,
    changes: Arc<Semaphore>,
}

impl Issuer {
    /// One that issues tokens of this keyring.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, cache: Arc<Cache>, store: Arc<Store>) -> Arc<Self> {
        Arc::new(Self { keyring, cache, store, changes: Arc::new(Semaphore::new(CHANGES_MAX)) })
    }

    /// On a store where nothing was ever made: makes the workspace `default` and one root token. `keep` gets the secret before it counts.
    ///
    /// # Errors
    /// `Unavailable`, and whatever `keep` fails with.
    pub async fn bootstrap(&self, now: Time, keep: impl FnOnce(&Secret) -> Result<()>) -> Result<()> {
        let tx = self.store.begin_change().await?;
        if !tx.is_empty().await? {
            return Ok(());
        }
        let prefix = "kw".parse::<Prefix>().map_err(|rule| Error::Internal(rule.into()))?;
        let root = "keyward:root".parse::<Scope>().map_err(|rule| Error::Internal(rule.into()))?;
        tx.insert_workspace("default", "Default", &prefix, now).await?;
        tx.ensure_principal("default", "root", now).await?;
        let issued = self.keyring.issue(&prefix)?;
        let token = Token {
            id: TokenId::new(now)?,
            workspace: "default".to_owned(),
            display_name: "Root token of the first start".to_owned(),
            principal: "root".to_owned(),
            kind: Kind::Permanent,
            state: State::Active,
            hint: issued.secret.hint(),
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
        tx.insert_token(&token, &issued.digest).await?;
        tx.audit([event("Bootstrap", None, &token, "", None, Some(&token), now)]).await?;
        keep(&issued.secret)?;
        tx.commit(now).await
    }

    /// Creates a token.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (a scope that the caller does not hold), `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn create(self: &Arc<Self>, caller: Caller, new: NewToken, request: RequestId, now: Time) -> Result<(Token, Secret)> {
        let issuer = Arc::clone(self);
        self.detached(async move { issuer.create_now(&caller, new, &request, now).await }).await
    }

    async fn create_now(self: &Arc<Self>, caller: &Caller, new: NewToken, request: &RequestId, now: Time) -> Result<(Token, Secret)> {
        let drafted = match draft(caller, new, request, now) {
            Err(error) if !request.is_named() => return Err(error),
            drafted => drafted,
        };
        let tx = self.store.begin_creation().await?;
        // First what was answered: what it asked for may have been possible then and not be now.
        let replay = match self.claim(&tx, "CreateToken", caller, request, now).await? {
            Replay::Answered(kept) => return answer_again(&kept, caller, false, &tx).await.map(|token| (token, kept.secret)),
            Replay::New(replay) => replay,
        };
        let mut token = drafted?;
        let prefix = tx.prefix(&token.workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let issued = self.keyring.issue(&prefix)?;
        token.hint = issued.secret.hint();
        tx.ensure_principal(&token.workspace, &token.principal, now).await?;
        tx.insert_token(&token, &issued.digest).await?;
        tx.audit([event("CreateToken", Some(caller), &token, "", None, Some(&token), now)]).await?;
        self.keep(&tx, replay, token.id, &issued.secret, None).await?;
        tx.commit(now).await?;
        Ok((token, issued.secret))
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
    pub async fn update(self: &Arc<Self>, caller: Caller, target: Target, patch: TokenPatch, now: Time) -> Result<Token> {
        let patch = rules::Patch::check(patch, &target.id, now)?;
        let change = move |token: &mut Token, caller: &Caller| {
            require_live(token, now)?;
            patch.apply(token, now)?;
            caller.outranks(&token.scopes)
        };
        self.change("UpdateToken", caller, target, String::new(), change, now).await
    }

    /// Switches a token on.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn activate(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<Token> {
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
    pub async fn deactivate(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<Token> {
        let change = move |token: &mut Token, _: &Caller| {
            if token.state == State::Revoked {
                return Err(Error::Precondition(REVOKED));
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
    pub async fn revoke(self: &Arc<Self>, caller: Caller, target: Target, reason: &str, now: Time) -> Result<Token> {
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
    pub async fn revoke_self(self: &Arc<Self>, caller: Caller, reason: &str, now: Time) -> Result<Token> {
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
        self.detached(async move { issuer.change_now("RevokeSelf", &caller, &target, &reason, true, change, now).await }).await
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
    ) -> Result<Regenerated> {
        let issuer = Arc::clone(self);
        self.detached(async move { issuer.regenerate_now("RegenerateToken", &caller, &target, grace, &request, false, now).await }).await
    }

    /// Gives the token that the caller presented a new secret.
    ///
    /// # Errors
    /// `Precondition` if the caller came with a certificate; `Invalid`, `Unavailable`, `Overloaded`.
    pub async fn regenerate_self(self: &Arc<Self>, caller: Caller, grace: Grace, request: RequestId, now: Time) -> Result<Regenerated> {
        let target = Target { id: presented_id(&caller)?.to_string(), etag: String::new() };
        let issuer = Arc::clone(self);
        self.detached(async move { issuer.regenerate_now("RegenerateSelf", &caller, &target, grace, &request, true, now).await }).await
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
    ) -> Result<Regenerated> {
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
                let token = answer_again(&kept, caller, own, &tx).await?;
                return Ok(Regenerated { token, secret: kept.secret, grace_time: kept.grace_time });
            }
            Replay::New(replay) => replay,
        };
        let (mut token, digests) = self.find(&tx, caller, id, own).await?;
        check_etag(&token, target)?;
        require_live(&token, now)?;
        let grace_time = rules::grace_time(grace, token.expire_time, now).map_err(|rule| Error::invalid("grace", rule))?;
        let prefix = tx.prefix(&token.workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let Issued { secret, digest } = self.keyring.issue(&prefix)?;
        let before = token.clone();
        token.hint = secret.hint();
        token.version += 1;
        token.update_time = now;
        tx.update_token(&token, &digests).await?;
        tx.replace_digest(id, &digest, grace_time).await?;
        tx.audit([event(method, Some(caller), &token, "", Some(&before), Some(&token), now)]).await?;
        self.keep(&tx, replay, id, &secret, grace_time).await?;
        self.conclude(tx, &digests, now).await?;
        Ok(Regenerated { token, secret, grace_time })
    }

    /// Ends a token and takes it out of every list.
    ///
    /// # Errors
    /// As [`Issuer::update`].
    pub async fn delete(self: &Arc<Self>, caller: Caller, target: Target, now: Time) -> Result<()> {
        let issuer = Arc::clone(self);
        self.detached(async move {
            let id = parse_id("id", &target.id)?;
            let mut tx = issuer.store.begin_change().await?;
            let found = issuer.find(&tx, &caller, id, false).await;
            if matches!(found, Err(Error::NotFound(_))) {
                // A call before may have deleted it and failed: what is known of it ends now at the latest.
                issuer.bury(&tx.digests(id).await?);
            }
            let (token, digests) = found?;
            check_etag(&token, &target)?;
            tx.delete_token(id, &digests, now).await?;
            tx.audit([event("DeleteToken", Some(&caller), &token, "", Some(&token), None, now)]).await?;
            issuer.conclude(tx, &digests, now).await
        })
        .await
    }

    /// Ends every live token of a principal, and says how many.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (one of them holds more than the caller), `NotFound` (the workspace), `Unavailable`, `Overloaded`: then none is ended.
    pub async fn revoke_principal(
        self: &Arc<Self>,
        caller: Caller,
        workspace: &str,
        principal: &str,
        reason: &str,
        now: Time,
    ) -> Result<usize> {
        let workspace = caller.workspace(workspace)?.to_owned();
        let mut violations = Violations::default();
        violations.take("principal", rules::principal(principal));
        let reason = violations.take("reason", rules::reason(reason)).unwrap_or_default();
        violations.finish()?;
        let (issuer, principal) = (Arc::clone(self), principal.to_owned());
        self.detached(async move {
            let mut tx = issuer.store.begin_change().await?;
            tx.prefix(&workspace).await?.ok_or(Error::NotFound("workspace"))?;
            let live = tx.live_tokens(&workspace, &principal, now).await?;
            for (token, _) in &live {
                caller.outranks(&token.scopes)?;
            }
            let digests: Vec<Digest> = live.iter().flat_map(|(_, digests)| digests).copied().collect();
            let ids: Vec<TokenId> = live.iter().map(|(token, _)| token.id).collect();
            tx.revoke_tokens(&ids, &reason, &digests, now).await?;
            tx.audit(live.iter().map(|(token, _)| {
                let mut ended = token.clone();
                end(&mut ended, &reason, now);
                ended.version += 1;
                event("RevokePrincipalTokens", Some(&caller), token, &reason, Some(token), Some(&ended), now)
            }))
            .await?;
            issuer.conclude(tx, &digests, now).await?;
            Ok(live.len())
        })
        .await
    }

    /// Removes what nobody needs any more. For space only.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn tick(&self, now: Time) -> Result<()> {
        self.cache.prune();
        self.store.prune(now, now - LOG_LIFETIME).await
    }

    async fn change(
        self: &Arc<Self>,
        method: &'static str,
        caller: Caller,
        target: Target,
        reason: String,
        change: impl FnOnce(&mut Token, &Caller) -> Result<()> + Send + 'static,
        now: Time,
    ) -> Result<Token> {
        let issuer = Arc::clone(self);
        self.detached(async move { issuer.change_now(method, &caller, &target, &reason, false, change, now).await }).await
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
    ) -> Result<Token> {
        let id = parse_id("id", &target.id)?;
        let mut tx = self.store.begin_change().await?;
        let (before, digests) = self.find(&tx, caller, id, own).await?;
        check_etag(&before, target)?;
        let mut token = before.clone();
        change(&mut token, caller)?;
        if settings(&token) == settings(&before) {
            self.bury(&digests);
            return Ok(before);
        }
        token.version += 1;
        token.update_time = now;
        tx.update_token(&token, &digests).await?;
        if token.audiences != before.audiences {
            tx.replace_audiences(&token).await?;
        }
        tx.audit([event(method, Some(caller), &token, reason, Some(&before), Some(&token), now)]).await?;
        self.conclude(tx, &digests, now).await?;
        Ok(token)
    }

    async fn find(&self, tx: &Tx<'_>, caller: &Caller, id: TokenId, own: bool) -> Result<(Token, Vec<Digest>)> {
        let found = tx.token(id, caller.management_reach()).await?.ok_or(Error::NotFound("token"))?;
        if !own {
            caller.outranks(&found.0.scopes)?;
        }
        Ok(found)
    }

    /// Commits and announces the change. From before the commit until it is certain what became of it, nothing that is read of these
    /// digests is kept: a commit may be made although its answer is late, or fails to come.
    async fn conclude(self: &Arc<Self>, tx: Tx<'_>, digests: &[Digest], now: Time) -> Result<()> {
        for digest in digests {
            self.cache.embargo(digest);
        }
        let committed = tx.commit(now).await;
        if committed.is_err() {
            tokio::spawn(settle(Arc::downgrade(self), digests.to_vec()));
        } else {
            self.lift(digests);
        }
        committed
    }

    fn lift(&self, digests: &[Digest]) {
        for digest in digests {
            self.cache.lift(digest);
        }
    }

    /// Runs a change to its end, whether or not its caller still waits.
    async fn detached<T: Send + 'static>(&self, change: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let permit = Arc::clone(&self.changes).try_acquire_owned();
        let permit = permit.map_err(|_| Error::Overloaded("too many changes are waiting; try again"))?;
        let task = async move {
            let _permit = permit;
            change.await
        };
        tokio::spawn(task).await.map_err(|error| Error::Internal(error.into()))?
    }

    fn bury(&self, digests: &[Digest]) {
        for digest in digests {
            self.cache.bury(digest);
        }
    }
}

const REVOKED: &str = "the token was revoked, which is for good; create a new one";
const EXPIRED: &str = "the token has expired; create a new one";

/// Lifts an embargo. Whoever holds the lock of changes knows that the changes before have ended, one way or the other.
async fn settle(issuer: Weak<Issuer>, digests: Vec<Digest>) {
    while let Some(issuer) = issuer.upgrade() {
        match issuer.store.begin_change().await {
            Ok(_lock) => return issuer.lift(&digests),
            Err(error) => tracing::warn!(%error, "a change whose outcome is uncertain is not settled yet"),
        }
        drop(issuer);
        tokio::time::sleep(SETTLE_INTERVAL).await;
    }
}

/// The token that is asked for, without its secret.
fn draft(caller: &Caller, new: NewToken, request: &RequestId, now: Time) -> Result<Token> {
    let workspace = caller.workspace(&new.workspace)?.to_owned();
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
    let expire_time = rules::expire_time(new.lifetime, kind, now).map_err(|(field, rule)| violations.add(field, rule)).unwrap_or(now);
    if !request.id.is_empty() {
        violations.take("request_id", rules::request_id(&request.id));
    }
    violations.finish()?;
    if let Some(scope) = scopes.iter().find(|scope| !caller.can_grant(scope)) {
        return Err(Error::Denied(format!("the caller cannot grant `{scope}`, since they do not hold it")));
    }
    Ok(Token {
        id: TokenId::new(now)?,
        workspace,
        display_name,
        principal,
        kind,
        state: State::Active,
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
        ShownState::Revoked => Err(Error::Precondition(REVOKED)),
        ShownState::Expired => Err(Error::Precondition(EXPIRED)),
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
        .ok_or(Error::Precondition("the caller came with a client certificate; this method is about the token that is presented"))
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
        "expire_time_micros": (token.expire_time != Time::NEVER).then(|| token.expire_time.micros()),
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
        actor,
        token_id: token.id,
        principal: &token.principal,
        reason,
        before: before.map(settings),
        after: after.map(settings),
    }
}
