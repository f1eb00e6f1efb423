//! Principals: the people and service accounts that tokens stand for.

use std::sync::Arc;

use super::{Certificate, Directory, PageRequest, check_etag};
use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    fence::{Changed, RootWatch},
    grant::Subject,
    issuer::{self, Ending},
    rules,
    store::{AuditEvent, Tx},
    token,
    workspace::{Principal, PrincipalKind, Role},
};

/// What a principal shall be, as it was asked for.
#[derive(Clone, Debug, Default)]
pub struct PrincipalInput {
    /// Which, and what the caller has seen of it.
    pub target: PrincipalTarget,
    /// A person or a program.
    pub kind: PrincipalKind,
    /// Empty: the id.
    pub display_name: String,
    /// Empty: none.
    pub email: String,
    /// What it may do.
    pub role: Role,
    /// Rules that were found broken while the request was read; they are reported with those that are found here.
    pub violations: Violations,
}

/// One principal, and what the caller has seen of it.
#[derive(Clone, Debug, Default)]
pub struct PrincipalTarget {
    /// Empty: the caller's own workspace.
    pub workspace: String,
    /// Its id.
    pub id: String,
    /// Empty: whatever it is.
    pub etag: String,
}

impl Directory {
    /// Makes a principal, or changes it; says whether it made it.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (the caller would raise its own role), `NotFound` (the workspace), `Conflict`, `Unavailable`, `Overloaded`.
    pub async fn upsert_principal(
        self: &Arc<Self>,
        caller: Caller,
        input: PrincipalInput,
        now: Time,
    ) -> Result<Changed<(Principal, bool)>> {
        let workspace = caller.workspace(&input.target.workspace)?.to_owned();
        let mut violations = input.violations;
        let id = violations.take("principal.id", rules::principal(&input.target.id));
        let name = violations.take("principal.display_name", rules::principal_name(&input.display_name, &input.target.id));
        let email = violations.take("principal.email", rules::email(&input.email));
        violations.finish()?;
        let (Some(id), Some(display_name), Some(email)) = (id, name, email) else {
            return Err(Error::Internal("a violation was lost".into()));
        };
        let wished = Principal { kind: input.kind, display_name, email, role: input.role, ..Principal::first_used(&workspace, &id, now) };
        let (directory, etag) = (Arc::clone(self), input.target.etag);
        self.fence.run(async move { directory.upsert_now(&caller, wished, &etag, now).await }).await
    }

    async fn upsert_now(self: &Arc<Self>, caller: &Caller, wished: Principal, etag: &str, now: Time) -> Result<Changed<(Principal, bool)>> {
        let mut tx = self.store.begin_change_by(caller, now).await?;
        tx.brief(&wished.workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let before = tx.principal(&wished.workspace, &wished.id).await?;
        match &before {
            Some(before) => check_etag(before.version, etag)?,
            None if etag.is_empty() => {}
            None => return Err(Error::Conflict),
        }
        let rises = wished.role == Role::Admin && before.as_ref().is_none_or(|before| before.role != Role::Admin);
        if rises && !caller.is_root() && is_caller(caller, &wished) {
            return Err(Error::Denied("nobody raises their own role: ask another administrator".to_owned()));
        }
        if before.is_none() {
            // Who makes it makes its certificate good.
            self.outranks_certificates(caller, &wished.workspace, &wished.id)?;
        }
        let after = match &before {
            None => wished,
            Some(before) => {
                Principal { suspended: before.suspended, create_time: before.create_time, version: before.version + 1, ..wished }
            }
        };
        match &before {
            None if !tx.insert_principal(&after).await? => {
                return Err(Error::Overloaded("the principal is just being made by somebody else; try again"));
            }
            None => {}
            Some(before) if is_same(before, &after) => {
                return Ok(self.fence.repeat(&tx, &[subject(before)]).of((before.clone(), false)));
            }
            Some(_) => tx.update_principal(&after).await?,
        }
        tx.audit([event("UpsertPrincipal", caller, &after, "", before.as_ref(), Some(&after), now)]).await?;
        Ok(self.fence.conclude(tx, now).await?.of((after, before.is_none())))
    }

    /// One principal.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Unavailable`, `Overloaded`.
    pub async fn principal(&self, caller: &Caller, target: &PrincipalTarget) -> Result<Principal> {
        let workspace = caller.workspace(&target.workspace)?;
        let id = rules::principal(&target.id).map_err(|rule| Error::invalid("id", rule))?;
        self.store.brief(workspace).await?.ok_or(Error::NotFound("workspace"))?;
        self.store.principal(workspace, &id).await?.ok_or(Error::NotFound("principal"))
    }

    /// A page of principals, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn principals(
        &self,
        caller: &Caller,
        workspace: &str,
        query: &str,
        page: PageRequest,
    ) -> Result<(Vec<Principal>, Option<String>)> {
        let workspace = caller.workspace(workspace)?;
        let mut violations = Violations::default();
        let purpose = token::fingerprint(&[b"principals", workspace.as_bytes(), query.as_bytes()]);
        let query = violations.take("query", rules::query(query)).unwrap_or_default();
        let (limit, after) = self.open_page(&purpose, &page, violations)?;
        self.store.brief(workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let query = Some(query.as_str()).filter(|query| !query.is_empty());
        let found = self.store.principals(workspace, query, after.as_deref(), limit + 1).await?;
        self.cut(&purpose, found, limit, |principal| &principal.id)
    }

    /// Refuses every token of a principal.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (one of its tokens holds more than the caller), `NotFound`, `Conflict`, `Precondition` (the caller itself, or the last root
    /// token), `Unavailable`, `Overloaded`.
    pub async fn suspend_principal(
        self: &Arc<Self>,
        caller: Caller,
        target: PrincipalTarget,
        reason: &str,
        now: Time,
    ) -> Result<Changed<Principal>> {
        self.set_suspended("SuspendPrincipal", caller, target, reason, true, now).await
    }

    /// Ends a suspension.
    ///
    /// # Errors
    /// As [`Directory::suspend_principal`].
    pub async fn resume_principal(self: &Arc<Self>, caller: Caller, target: PrincipalTarget, now: Time) -> Result<Changed<Principal>> {
        self.set_suspended("ResumePrincipal", caller, target, "", false, now).await
    }

    async fn set_suspended(
        self: &Arc<Self>,
        method: &'static str,
        caller: Caller,
        target: PrincipalTarget,
        reason: &str,
        suspended: bool,
        now: Time,
    ) -> Result<Changed<Principal>> {
        let (workspace, reason) = read_target(&caller, &target, reason)?;
        let directory = Arc::clone(self);
        self.fence
            .run(async move {
                let mut tx = directory.store.begin_change_by(&caller, now).await?;
                let before = directory.find(&tx, &caller, &workspace, &target, now).await?;
                if suspended {
                    refuse_self(&caller, &before)?;
                }
                if before.suspended == suspended {
                    return Ok(directory.fence.repeat(&tx, &[subject(&before)]).of(before));
                }
                let after = Principal { suspended, version: before.version + 1, update_time: now, ..before.clone() };
                let watch = RootWatch::begin(&tx, &caller, now).await?;
                tx.update_principal(&after).await?;
                watch.end(&tx).await?;
                tx.audit([event(method, &caller, &after, &reason, Some(&before), Some(&after), now)]).await?;
                Ok(directory.fence.conclude(tx, now).await?.of(after))
            })
            .await
    }

    /// Revokes every token of a principal and forgets it; says how many there were.
    ///
    /// # Errors
    /// As [`Directory::suspend_principal`].
    pub async fn delete_principal(
        self: &Arc<Self>,
        caller: Caller,
        target: PrincipalTarget,
        reason: &str,
        now: Time,
    ) -> Result<Changed<usize>> {
        let (workspace, reason) = read_target(&caller, &target, reason)?;
        let directory = Arc::clone(self);
        self.fence
            .run_unless_gone("principal", async move {
                let mut tx = directory.store.begin_change_by(&caller, now).await?;
                let before = match directory.find(&tx, &caller, &workspace, &target, now).await {
                    // A call before may have deleted it and failed: what is known of it ends now at the latest.
                    Err(Error::NotFound(_)) => {
                        return Ok(Err(directory.fence.repeat(&tx, &[Subject::Principal { workspace, id: target.id }])));
                    }
                    found => found?,
                };
                refuse_self(&caller, &before)?;
                let watch = RootWatch::begin(&tx, &caller, now).await?;
                let live = tx.live_tokens(&workspace, &before.id, now).await?;
                let ending = Ending { method: "DeletePrincipal", actor: Some(&caller), reason: &reason };
                issuer::end_all(&mut tx, &live, ending, now).await?;
                tx.delete_principal(&before).await?;
                watch.end(&tx).await?;
                tx.audit([event("DeletePrincipal", &caller, &before, &reason, Some(&before), None, now)]).await?;
                Ok(Ok(directory.fence.conclude(tx, now).await?.of(live.len())))
            })
            .await
    }

    fn outranks_certificates(&self, caller: &Caller, workspace: &str, id: &str) -> Result<()> {
        let is_theirs = |certificate: &&Certificate| certificate.workspace == workspace && certificate.principal == id;
        self.certificates.iter().filter(is_theirs).try_for_each(|certificate| caller.outranks(&certificate.scopes))
    }

    /// The principal, if the caller may decide about all that its tokens hold.
    async fn find(&self, tx: &Tx<'_>, caller: &Caller, workspace: &str, target: &PrincipalTarget, now: Time) -> Result<Principal> {
        tx.brief(workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let found = tx.principal(workspace, &target.id).await?.ok_or(Error::NotFound("principal"))?;
        caller.outranks(&tx.live_scopes(workspace, &target.id, now).await?)?;
        self.outranks_certificates(caller, workspace, &target.id)?;
        check_etag(found.version, &target.etag)?;
        Ok(found)
    }
}

fn read_target(caller: &Caller, target: &PrincipalTarget, reason: &str) -> Result<(String, String)> {
    let workspace = caller.workspace(&target.workspace)?.to_owned();
    let mut violations = Violations::default();
    violations.take("id", rules::principal(&target.id));
    let reason = violations.take("reason", rules::reason(reason)).unwrap_or_default();
    violations.finish()?;
    Ok((workspace, reason))
}

fn is_caller(caller: &Caller, principal: &Principal) -> bool {
    *caller.workspace == *principal.workspace && *caller.principal == *principal.id
}

fn refuse_self(caller: &Caller, principal: &Principal) -> Result<()> {
    if is_caller(caller, principal) {
        return Err(Error::precondition("this is the caller's own principal: use a token of another one"));
    }
    Ok(())
}

fn is_same(before: &Principal, after: &Principal) -> bool {
    let shown = |principal: &Principal| (principal.kind, principal.display_name.clone(), principal.email.clone(), principal.role);
    shown(before) == shown(after)
}

fn subject(principal: &Principal) -> Subject {
    Subject::Principal { workspace: principal.workspace.clone(), id: principal.id.clone() }
}

pub(super) fn event<'a>(
    method: &'static str,
    actor: &'a Caller,
    principal: &'a Principal,
    reason: &'a str,
    before: Option<&Principal>,
    after: Option<&Principal>,
    time: Time,
) -> AuditEvent<'a> {
    AuditEvent {
        workspace: &principal.workspace,
        time,
        method,
        code: AuditEvent::DONE,
        actor: Some(actor),
        token_id: None,
        principal: &principal.id,
        reason,
        before: before.map(Principal::settings),
        after: after.map(Principal::settings),
    }
}
