//! Workspaces with their policies and routes, and the principals in them.
//!
//! Invariant: what belongs to another workspace is not found (test `an_administrator_sees_nothing_of_another_workspace`).
//! Invariant: a suspension refuses every token at once and leaves their own states alone (test
//! `a_suspension_kills_every_token_at_once_and_a_return_restores_them`).
//! Invariant: nobody raises their own role (test `nobody_raises_their_own_role`).

mod principals;

use std::{sync::Arc, time::Duration};

pub use principals::{PrincipalInput, PrincipalTarget};

use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    fence::{Changed, Fence, RootWatch},
    grant::Subject,
    notice::{Event, Wishes},
    rules,
    scope::{Resource, Routes, Scope},
    store::{AuditEvent, Store, Tx},
    token::{self, Keyring, Prefix},
    workspace::{Policy, Principal, Workspace},
};

const ID_MISSING: &str = "must name the workspace";

/// One existing workspace, and what the caller has seen of it.
#[derive(Clone, Debug)]
pub struct WorkspaceTarget {
    /// Its id; where the method allows it, empty is the caller's own.
    pub id: String,
    /// Empty: whatever it is.
    pub etag: String,
}

/// What to change of a policy; nothing: leave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of `Policy`")]
pub struct PolicyPatch {
    pub default_ttl: Option<Duration>,
    pub max_permanent_ttl: Option<Duration>,
    pub max_temporary_ttl: Option<Duration>,
    pub allow_never: Option<bool>,
    pub permanent_requires_admin: Option<bool>,
    pub principals_on_first_use: Option<bool>,
    pub max_tokens_per_principal: Option<u32>,
}

impl PolicyPatch {
    fn apply(self, policy: Policy) -> Policy {
        Policy {
            default_ttl: self.default_ttl.unwrap_or(policy.default_ttl),
            max_permanent_ttl: self.max_permanent_ttl.unwrap_or(policy.max_permanent_ttl),
            max_temporary_ttl: self.max_temporary_ttl.unwrap_or(policy.max_temporary_ttl),
            allow_never: self.allow_never.unwrap_or(policy.allow_never),
            permanent_requires_admin: self.permanent_requires_admin.unwrap_or(policy.permanent_requires_admin),
            principals_on_first_use: self.principals_on_first_use.unwrap_or(policy.principals_on_first_use),
            max_tokens_per_principal: self.max_tokens_per_principal.unwrap_or(policy.max_tokens_per_principal),
        }
    }
}

/// What to change of what a workspace is told; nothing: leave it.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the fields of `Wishes`, as they were asked for")]
pub struct WishesPatch {
    pub days_before: Option<Vec<i32>>,
    pub raise_faults: Option<bool>,
    pub emails: Option<String>,
    pub mail_owner: Option<bool>,
    pub webhook_url: Option<String>,
    pub events: Option<Vec<Event>>,
    pub renew_url: Option<String>,
}

/// What this server can tell, and where.
#[derive(Clone, Copy, Debug)]
pub struct Outlets {
    /// Whether it sends mail.
    pub mail: bool,
    /// Whether a webhook may be called without TLS.
    pub http: bool,
}

/// What a workspace shall be, or what to change of it; nothing: leave it, or take the default.
#[derive(Clone, Debug, Default)]
pub struct WorkspacePatch {
    /// A name for people.
    pub display_name: Option<String>,
    /// What new tokens begin with.
    pub prefix: Option<String>,
    /// What may be created in it.
    pub policy: PolicyPatch,
    /// What can be reached with its tokens.
    pub resources: Option<Vec<Resource>>,
    /// What is told about its tokens, and where.
    pub notices: WishesPatch,
    /// Rules that were found broken while the request was read; they are reported with those that are found here.
    pub violations: Violations,
}

/// A patch whose fields follow the rules, but for those that need the rest of the workspace to say.
struct Checked {
    display_name: Option<String>,
    prefix: Option<Prefix>,
    policy: PolicyPatch,
    resources: Option<Vec<Resource>>,
    notices: CheckedWishes,
}

/// As [`WishesPatch`], of values that follow the rules.
struct CheckedWishes {
    days_before: Option<Vec<u16>>,
    raise_faults: Option<bool>,
    emails: Option<Vec<String>>,
    mail_owner: Option<bool>,
    webhook_url: Option<String>,
    events: Option<Vec<Event>>,
    renew_url: Option<String>,
}

impl CheckedWishes {
    fn check(patch: WishesPatch, outlets: Outlets, violations: &mut Violations) -> Self {
        const NO_MAIL: &str = "this server sends no mail: its operator must set smtp_url and smtp_from first";
        let path = |field: &str| format!("workspace.notices.{field}");
        if !outlets.mail && patch.mail_owner == Some(true) {
            violations.add(path("mail_owner"), NO_MAIL);
        }
        if !outlets.mail
            && patch.emails.as_ref().is_some_and(|emails| emails.chars().any(|letter| letter != ';' && !letter.is_whitespace()))
        {
            violations.add(path("emails"), NO_MAIL);
        }
        let url =
            |text: String, rule: &dyn Fn(&str) -> std::result::Result<String, String>| if text.is_empty() { Ok(text) } else { rule(&text) };
        let webhook = |text| url(text, &|text| rules::webhook_url(text, outlets.http));
        let webhook_url = patch.webhook_url.and_then(|text| violations.take(&path("webhook_url"), webhook(text)));
        let renew_url = patch.renew_url.and_then(|text| violations.take(&path("renew_url"), url(text, &rules::renew_url)));
        Self {
            days_before: patch.days_before.map(|days| rules::days_before(&path("days_before"), &days, violations)),
            raise_faults: patch.raise_faults,
            emails: patch.emails.map(|text| rules::emails(&path("emails"), &text, violations)),
            mail_owner: patch.mail_owner,
            webhook_url,
            events: patch.events,
            renew_url,
        }
    }

    fn apply(self, wishes: Wishes, now: Time) -> Wishes {
        let was_on = wishes.is_on();
        let mut wishes = Wishes {
            days_before: self.days_before.unwrap_or(wishes.days_before),
            raise_faults: self.raise_faults.unwrap_or(wishes.raise_faults),
            emails: self.emails.unwrap_or(wishes.emails),
            mail_owner: self.mail_owner.unwrap_or(wishes.mail_owner),
            webhook_url: self.webhook_url.unwrap_or(wishes.webhook_url),
            events: self.events.unwrap_or(wishes.events),
            renew_url: self.renew_url.unwrap_or(wishes.renew_url),
            since: wishes.since,
        };
        if wishes.is_on() && !was_on {
            wishes.since = now;
        }
        wishes
    }
}

/// How many, from where on.
#[derive(Clone, Debug, Default)]
pub struct PageRequest {
    /// 0: as usual.
    pub size: i32,
    /// Empty: the first page.
    pub token: String,
}

/// Manages workspaces and principals.
pub struct Directory {
    keyring: Arc<Keyring>,
    store: Arc<Store>,
    fence: Arc<Fence>,
    certificates: Vec<Certificate>,
    outlets: Outlets,
}

/// Whom client certificates stand for, and with which scopes.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The workspace.
    pub workspace: String,
    /// The principal.
    pub principal: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
}

/// What the caller is shown to compare a workspace or a principal by.
#[must_use]
pub fn etag(version: i64) -> String {
    format!("v{version}")
}

impl Directory {
    /// One on this store.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, store: Arc<Store>, fence: Arc<Fence>, certificates: Vec<Certificate>, outlets: Outlets) -> Arc<Self> {
        Arc::new(Self { keyring, store, fence, certificates, outlets })
    }

    /// Makes the principals that certificates stand for, where their workspace is there and they are not: a certificate of somebody who is not there is refused.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn make_certificates_principals(&self, now: Time) -> Result<()> {
        for Certificate { workspace, principal, .. } in &self.certificates {
            if self.store.brief(workspace).await?.is_some() && self.store.principal(workspace, principal).await?.is_none() {
                let mut tx = self.store.begin_change().await?;
                make_principal(&mut tx, workspace, principal, now).await?;
                // Nobody waits for it here: the other servers hear of it.
                let _change = self.fence.conclude(tx, now).await?;
            }
        }
        Ok(())
    }

    /// Makes a workspace.
    ///
    /// # Errors
    /// `Invalid`, `Exists` (the id or the prefix is taken), `Unavailable`, `Overloaded`.
    pub async fn create_workspace(
        self: &Arc<Self>,
        caller: Caller,
        id: &str,
        patch: WorkspacePatch,
        now: Time,
    ) -> Result<Changed<Workspace>> {
        let mut violations = Violations::default();
        let id = violations.take("workspace.id", rules::workspace_id(id));
        let patch = WorkspacePatch {
            display_name: Some(patch.display_name.unwrap_or_default()),
            prefix: Some(patch.prefix.unwrap_or_default()),
            ..patch
        };
        let policy = patch.policy.apply(Policy::default());
        let checked = check(patch, Some(policy), self.outlets, violations)?;
        let (Some(id), Some(prefix)) = (id, checked.prefix) else { return Err(Error::Internal("a violation was lost".into())) };
        let workspace = Workspace {
            id,
            display_name: checked.display_name.unwrap_or_default(),
            prefix,
            policy,
            resources: checked.resources.unwrap_or_default(),
            notices: checked.notices.apply(Wishes::default(), now),
            suspended: false,
            create_time: now,
            update_time: now,
            version: 1,
        };
        let directory = Arc::clone(self);
        self.fence
            .run(async move {
                let mut tx = directory.store.begin_change_by(&caller, now).await?;
                claim_prefix(&tx, &workspace).await?;
                if !tx.insert_workspace(&workspace).await? {
                    return Err(Error::Exists("workspace with this id"));
                }
                tx.audit([event("CreateWorkspace", &caller, &workspace.id, "", None, Some(&workspace), now)]).await?;
                // Certificates may have waited for it.
                for waiting in directory.certificates.iter().filter(|certificate| certificate.workspace == workspace.id) {
                    make_principal(&mut tx, &workspace.id, &waiting.principal, now).await?;
                }
                Ok(directory.fence.conclude(tx, now).await?.of(workspace))
            })
            .await
    }

    /// One workspace.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`, `Overloaded`.
    pub async fn workspace(&self, caller: &Caller, id: &str) -> Result<Workspace> {
        self.store.workspace(caller.workspace(id)?).await?.ok_or(Error::NotFound("workspace"))
    }

    /// A page of the workspaces that the caller may see, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `Unavailable`, `Overloaded`.
    pub async fn workspaces(&self, caller: &Caller, page: PageRequest) -> Result<(Vec<Workspace>, Option<String>)> {
        let purpose = token::fingerprint(&[b"workspaces"]);
        let (limit, after) = self.open_page(&purpose, &page, Violations::default())?;
        if let Some(own) = caller.management_reach() {
            return Ok((self.store.workspace(own).await?.into_iter().collect(), None));
        }
        let found = self.store.workspaces(after.as_deref(), limit + 1).await?;
        self.cut(&purpose, found, limit, |workspace| &workspace.id)
    }

    /// Changes settings.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (the prefix, by others than root), `NotFound`, `Conflict`, `Exists` (the prefix is taken), `Unavailable`, `Overloaded`.
    pub async fn update_workspace(
        self: &Arc<Self>,
        caller: Caller,
        target: WorkspaceTarget,
        patch: WorkspacePatch,
        now: Time,
    ) -> Result<Changed<Workspace>> {
        let id = caller.workspace(&target.id)?.to_owned();
        if patch.prefix.is_some() && !caller.is_root() {
            return Err(Error::Denied("only keyward:root changes the prefix of a workspace".to_owned()));
        }
        let patch = check(patch, None, self.outlets, Violations::default())?;
        let change = move |workspace: &mut Workspace| {
            workspace.display_name = patch.display_name.unwrap_or_else(|| workspace.display_name.clone());
            workspace.prefix = patch.prefix.unwrap_or_else(|| workspace.prefix.clone());
            workspace.policy = patch.policy.apply(workspace.policy);
            workspace.resources = patch.resources.unwrap_or_else(|| workspace.resources.clone());
            workspace.notices = patch.notices.apply(workspace.notices.clone(), now);
            let mut violations = Violations::default();
            rules::policy("workspace.policy", &workspace.policy, &mut violations);
            violations.finish()
        };
        self.change("UpdateWorkspace", caller, WorkspaceTarget { id, ..target }, String::new(), change, now).await
    }

    /// Refuses every token of a workspace.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Conflict`, `Precondition` (the caller's own, or that of the last root token), `Unavailable`, `Overloaded`.
    pub async fn suspend_workspace(
        self: &Arc<Self>,
        caller: Caller,
        target: WorkspaceTarget,
        reason: &str,
        now: Time,
    ) -> Result<Changed<Workspace>> {
        let reason = not_own(&caller, &target, reason)?;
        let change = |workspace: &mut Workspace| {
            workspace.suspended = true;
            Ok(())
        };
        self.change("SuspendWorkspace", caller, target, reason, change, now).await
    }

    /// Ends a suspension.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Conflict`, `Unavailable`, `Overloaded`.
    pub async fn resume_workspace(self: &Arc<Self>, caller: Caller, target: WorkspaceTarget, now: Time) -> Result<Changed<Workspace>> {
        required_id(&target)?;
        let change = |workspace: &mut Workspace| {
            workspace.suspended = false;
            Ok(())
        };
        self.change("ResumeWorkspace", caller, target, String::new(), change, now).await
    }

    /// Deletes a workspace with all that is in it.
    ///
    /// # Errors
    /// As [`Directory::suspend_workspace`].
    pub async fn delete_workspace(
        self: &Arc<Self>,
        caller: Caller,
        target: WorkspaceTarget,
        reason: &str,
        now: Time,
    ) -> Result<Changed<()>> {
        let reason = not_own(&caller, &target, reason)?;
        let id = caller.workspace(&target.id)?.to_owned();
        let directory = Arc::clone(self);
        self.fence
            .run_unless_gone("workspace", async move {
                let mut tx = directory.store.begin_change_by(&caller, now).await?;
                let Some(workspace) = tx.workspace(&id).await? else {
                    // A call before may have deleted it and failed: what is known of it ends now at the latest.
                    return Ok(Err(directory.fence.repeat(&tx, &[Subject::Workspace(id)])));
                };
                check_etag(workspace.version, &target.etag)?;
                let watch = RootWatch::begin(&tx, &caller, now).await?;
                tx.delete_workspace(&id, now).await?;
                watch.end(&tx).await?;
                tx.audit([event("DeleteWorkspace", &caller, &id, &reason, Some(&workspace), None, now)]).await?;
                directory.fence.conclude(tx, now).await.map(|change| Ok(change.of(())))
            })
            .await
    }

    /// Changes one workspace, unless it is as wished already. Either way the change is announced: a call before may have made it and failed.
    async fn change(
        self: &Arc<Self>,
        method: &'static str,
        caller: Caller,
        target: WorkspaceTarget,
        reason: String,
        change: impl FnOnce(&mut Workspace) -> Result<()> + Send + 'static,
        now: Time,
    ) -> Result<Changed<Workspace>> {
        let id = caller.workspace(&target.id)?.to_owned();
        let directory = Arc::clone(self);
        self.fence
            .run(async move {
                let mut tx = directory.store.begin_change_by(&caller, now).await?;
                let before = tx.workspace(&id).await?.ok_or(Error::NotFound("workspace"))?;
                check_etag(before.version, &target.etag)?;
                let mut workspace = before.clone();
                change(&mut workspace)?;
                if workspace.settings() == before.settings() {
                    return Ok(directory.fence.repeat(&tx, &[Subject::Workspace(id)]).of(before));
                }
                workspace.version += 1;
                workspace.update_time = now;
                if workspace.prefix != before.prefix {
                    claim_prefix(&tx, &workspace).await?;
                }
                let watch = RootWatch::begin(&tx, &caller, now).await?;
                tx.update_workspace(&workspace).await?;
                watch.end(&tx).await?;
                tx.audit([event(method, &caller, &id, &reason, Some(&before), Some(&workspace), now)]).await?;
                Ok(directory.fence.conclude(tx, now).await?.of(workspace))
            })
            .await
    }

    fn open_page(&self, purpose: &[u8], page: &PageRequest, mut violations: Violations) -> Result<(u64, Option<String>)> {
        let limit = violations.take("page_size", rules::page_size(page.size));
        let open = |text: &str| self.keyring.open_text(purpose, text).ok_or(rules::PAGE_TOKEN);
        let after = if page.token.is_empty() { None } else { violations.take("page_token", open(&page.token)) };
        violations.finish()?;
        Ok((limit.ok_or_else(|| Error::Internal("a violation was lost".into()))?, after))
    }

    /// Keeps the first `limit` of what was found, and seals what gets the rest.
    fn cut<T>(&self, purpose: &[u8], mut found: Vec<T>, limit: u64, key: impl Fn(&T) -> &String) -> Result<(Vec<T>, Option<String>)> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(|last| self.keyring.seal_text(purpose, key(last))).transpose()?;
        Ok((found, next))
    }
}

fn check(patch: WorkspacePatch, policy: Option<Policy>, outlets: Outlets, mut violations: Violations) -> Result<Checked> {
    violations.append(patch.violations);
    let name = |name: String| violations.take("workspace.display_name", rules::display_name(&name));
    let display_name = patch.display_name.and_then(name);
    let prefix = patch.prefix.and_then(|prefix| violations.take("workspace.prefix", prefix.parse::<Prefix>()));
    match policy {
        Some(policy) => rules::policy("workspace.policy", &policy, &mut violations),
        None => rules::policy_fields("workspace.policy", &patch.policy.apply(Policy::default()), &mut violations),
    }
    if let Some(resources) = &patch.resources
        && let Err(mistakes) = Routes::compile(resources)
    {
        for mistake in mistakes {
            violations.add(format!("workspace.resources{}", mistake.field), mistake.rule);
        }
    }
    let notices = CheckedWishes::check(patch.notices, outlets, &mut violations);
    violations.finish()?;
    Ok(Checked { display_name, prefix, policy: patch.policy, resources: patch.resources, notices })
}

/// Makes the principal of a certificate, if it is not there.
async fn make_principal(tx: &mut Tx<'_>, workspace: &str, principal: &str, now: Time) -> Result<()> {
    let made = Principal::first_used(workspace, principal, now);
    if tx.insert_principal(&made).await? {
        let nobody = Caller::nobody(None);
        tx.audit([AuditEvent { actor: None, ..principals::event("Start", &nobody, &made, "", None, Some(&made), now) }]).await?;
    }
    Ok(())
}

async fn claim_prefix(tx: &Tx<'_>, workspace: &Workspace) -> Result<()> {
    if tx.claim_prefix(workspace.prefix.as_str(), &workspace.id).await? {
        Ok(())
    } else {
        Err(Error::Exists("workspace that has or had this prefix"))
    }
}

/// Refuses what would shut the caller out, and reads the reason.
fn not_own(caller: &Caller, target: &WorkspaceTarget, reason: &str) -> Result<String> {
    let mut violations = Violations::default();
    if target.id.is_empty() {
        violations.add("id", ID_MISSING);
    }
    let reason = violations.take("reason", rules::reason(reason)).unwrap_or_default();
    violations.finish()?;
    if *target.id == *caller.workspace {
        return Err(Error::precondition("this is the caller's own workspace: use a token of another one"));
    }
    Ok(reason)
}

fn required_id(target: &WorkspaceTarget) -> Result<()> {
    if target.id.is_empty() { Err(Error::invalid("id", ID_MISSING)) } else { Ok(()) }
}

fn check_etag(version: i64, etag: &str) -> Result<()> {
    if etag.is_empty() || etag == self::etag(version) { Ok(()) } else { Err(Error::Conflict) }
}

fn event<'a>(
    method: &'static str,
    actor: &'a Caller,
    workspace: &'a str,
    reason: &'a str,
    before: Option<&Workspace>,
    after: Option<&Workspace>,
    time: Time,
) -> AuditEvent<'a> {
    AuditEvent {
        workspace,
        time,
        method,
        code: AuditEvent::DONE,
        actor: Some(actor),
        token_id: None,
        principal: "",
        reason,
        before: before.map(Workspace::settings),
        after: after.map(Workspace::settings),
    }
}
