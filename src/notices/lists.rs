//! What administrators see and do: faults, what is not delivered, the webhook's secret, a test.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::timeout};

use super::{GIVE_UP, Notices, deliver::secret_purpose};
use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    notice::{Channel, Event, Notice, Outcome},
    rules,
    store::{AuditEvent, FaultFilter, FaultRecord, NoticeRecord, Tx},
    token::{self, WebhookSecret},
    workspace::Brief,
};

/// How long the secrets before the present one sign as well.
const PREVIOUS_LIFETIME: Duration = Duration::from_hours(24);
/// How long a test waits for each receiver: less than callers wait.
const TEST_TIMEOUT: Duration = Duration::from_secs(8);

/// Which faults, how many, from where on, as it was asked for.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the proto's comments are these fields' documentation")]
pub struct FaultsRequest {
    pub workspace: String,
    pub principal: String,
    pub token_id: String,
    pub unacknowledged_only: bool,
    pub page_size: i32,
    pub page_token: String,
}

/// Which notices, how many, from where on, as it was asked for.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the proto's comments are these fields' documentation")]
pub struct NoticesRequest {
    pub workspace: String,
    pub is_dead: Option<bool>,
    pub page_size: i32,
    pub page_token: String,
    pub violations: Violations,
}

/// What became of a test.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// How it went out.
    pub channel: Channel,
    /// The mail address, or the webhook's host.
    pub recipient: String,
    /// Why it did not arrive; none: it did.
    pub error: Option<String>,
}

impl Notices {
    /// A page of faults, the latest first, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn faults(&self, caller: &Caller, request: FaultsRequest) -> Result<(Vec<FaultRecord>, Option<String>)> {
        let mut violations = Violations::default();
        let mut some = |field, text: &str, rule: &dyn Fn(&str) -> std::result::Result<(), String>| {
            (!text.is_empty()).then(|| violations.take(field, rule(text)))
        };
        some("principal", &request.principal, &|text| rules::principal(text).map(drop));
        some("token_id", &request.token_id, &|text| rules::id(text).map(drop).map_err(str::to_owned));
        let filter = FaultFilter {
            workspace: caller.workspace(&request.workspace)?.to_owned(),
            principal: Some(request.principal).filter(|text| !text.is_empty()),
            token_id: rules::id(&request.token_id).ok(),
            unacknowledged_only: request.unacknowledged_only,
        };
        let purpose = token::fingerprint(&[b"faults", format!("{filter:?}").as_bytes()]);
        let (limit, after) = self.open_page(&purpose, request.page_size, &request.page_token, violations)?;
        self.require_workspace(caller, &filter.workspace).await?;
        let found = self.store.faults(&filter, after.as_deref(), limit + 1).await?;
        self.cut(&purpose, found, limit, |fault| &fault.id)
    }

    /// A page of notices that are not delivered, the latest first, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn notices(&self, caller: &Caller, request: NoticesRequest) -> Result<(Vec<NoticeRecord>, Option<String>)> {
        let workspace = caller.workspace(&request.workspace)?.to_owned();
        let purpose = token::fingerprint(&[b"notices", workspace.as_bytes(), format!("{:?}", request.is_dead).as_bytes()]);
        let (limit, after) = self.open_page(&purpose, request.page_size, &request.page_token, request.violations)?;
        self.require_workspace(caller, &workspace).await?;
        let found = self.store.notices(&workspace, request.is_dead, after.as_deref(), limit + 1).await?;
        self.cut(&purpose, found, limit, |record| &record.id)
    }

    /// Notes that the caller takes care of a fault.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn acknowledge(&self, caller: &Caller, id: &str, now: Time) -> Result<FaultRecord> {
        rules::fault_id(id).map_err(|rule| Error::invalid("id", rule))?;
        let tx = self.begin(caller, now).await?;
        let fault = tx.fault(id, caller.management_reach()).await?.ok_or(Error::NotFound("fault"))?;
        if !tx.acknowledge_fault(id, &caller.principal, now).await? {
            return Ok(fault);
        }
        let event = AuditEvent {
            token_id: Some(fault.token_id),
            principal: &fault.principal,
            ..event("AcknowledgeFault", caller, &fault.workspace, now)
        };
        tx.audit([event]).await?;
        tx.commit(now).await?;
        Ok(FaultRecord { acknowledge_time: Some(now), acknowledged_by: caller.principal.to_string(), ..fault })
    }

    /// Tries a notice again, at once.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn retry(&self, caller: &Caller, id: &str, now: Time) -> Result<NoticeRecord> {
        rules::notice_id(id).map_err(|rule| Error::invalid("id", rule))?;
        let tx = self.begin(caller, now).await?;
        let reach = caller.management_reach();
        let workspace = tx.notice(id, reach).await?.ok_or(Error::NotFound("notice"))?.workspace;
        tx.retry_notice(id, now + GIVE_UP, now).await?;
        let after = tx.notice(id, reach).await?.ok_or(Error::NotFound("notice"))?;
        tx.audit([event("RetryNotice", caller, &workspace, now)]).await?;
        tx.commit(now).await?;
        // Whoever asks for it knows something that we do not: the receiver is tried at once.
        self.destinations.lock().entry((after.channel, workspace)).and_modify(super::Destination::forgive);
        Ok(after)
    }

    /// Makes a new secret for the webhook of a workspace; says until when the one before signs as well.
    ///
    /// # Errors
    /// `NotFound` (the workspace), `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn rotate_secret(&self, caller: &Caller, workspace: &str, now: Time) -> Result<(WebhookSecret, Option<Time>)> {
        let workspace = caller.workspace(workspace)?;
        let secret = WebhookSecret::generate()?;
        let sealed = self.keyring.seal(&secret_purpose(workspace), secret.as_bytes())?;
        let tx = self.begin(caller, now).await?;
        tx.brief(workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let end = now + PREVIOUS_LIFETIME;
        let has_previous = tx.retire_webhook_secrets(workspace, end, now).await? > 0;
        tx.insert_webhook_secret(&token::notice_id(now)?, workspace, &sealed).await?;
        tx.audit([event("RotateWebhookSecret", caller, workspace, now)]).await?;
        tx.commit(now).await?;
        Ok((secret, has_previous.then_some(end)))
    }

    /// Sends a test to each address and to the webhook, and says what became of each.
    ///
    /// # Errors
    /// `NotFound` (the workspace), `Precondition` (there is nobody to tell), `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn test(self: &Arc<Self>, caller: &Caller, workspace: &str, now: Time) -> Result<Vec<Delivery>> {
        let workspace = caller.workspace(workspace)?;
        let brief = self.store.brief(workspace).await?.ok_or(Error::NotFound("workspace"))?;
        let wishes = &brief.notices;
        if wishes.emails.is_empty() && wishes.webhook_url.is_empty() {
            return Err(Error::precondition("the workspace's notices name neither emails nor a webhook_url: set one of them first"));
        }
        let tx = self.begin(caller, now).await?;
        tx.audit([event("SendTestNotice", caller, workspace, now)]).await?;
        tx.commit(now).await?;
        let webhook = (!wishes.webhook_url.is_empty()).then_some((Channel::Webhook, String::new()));
        let targets = wishes.emails.iter().map(|address| (Channel::Mail, address.clone())).chain(webhook);
        let mut tests = JoinSet::new();
        for (place, (channel, recipient)) in targets.enumerate() {
            let notice = Notice {
                id: token::notice_id(now)?,
                workspace: workspace.to_owned(),
                event: Event::Test,
                channel,
                recipient,
                to_owner: false,
                items: Vec::new(),
                unnamed: 0,
                actor: caller.principal.to_string(),
                reason: String::new(),
                create_time: now,
            };
            let (notices, brief) = (Arc::clone(self), brief.clone());
            tests.spawn(async move { (place, notices.test_one(notice, &brief, now).await) });
        }
        let mut deliveries = tests.join_all().await;
        deliveries.sort_by_key(|(place, _)| *place);
        Ok(deliveries.into_iter().map(|(_, delivery)| delivery).collect())
    }

    async fn test_one(&self, notice: Notice, brief: &Brief, now: Time) -> Delivery {
        let attempt = async {
            let secrets = match notice.channel {
                Channel::Mail => Vec::new(),
                Channel::Webhook => match self.secrets(&brief.id, now).await {
                    Ok(secrets) => secrets,
                    Err(error) => return Some(error.to_string()),
                },
            };
            match self.attempt(&notice, brief, &secrets).await {
                Outcome::Delivered => None,
                Outcome::Refused { error, .. } | Outcome::Unreachable { error } => Some(error),
            }
        };
        let error = timeout(TEST_TIMEOUT, attempt).await.unwrap_or_else(|_| Some(format!("no answer within {} s", TEST_TIMEOUT.as_secs())));
        let recipient = match notice.channel {
            Channel::Mail => notice.recipient,
            Channel::Webhook => host(&brief.notices.webhook_url),
        };
        Delivery { channel: notice.channel, recipient, error }
    }

    /// Begins what a caller does, who still stands.
    async fn begin(&self, caller: &Caller, now: Time) -> Result<Tx<'_>> {
        let tx = self.store.begin_unnumbered().await?;
        tx.require(caller, now).await?;
        Ok(tx)
    }

    async fn require_workspace(&self, caller: &Caller, workspace: &str) -> Result<()> {
        if *workspace == *caller.workspace || self.store.brief(workspace).await?.is_some() {
            Ok(())
        } else {
            Err(Error::NotFound("workspace"))
        }
    }

    fn open_page(&self, purpose: &[u8], size: i32, text: &str, mut violations: Violations) -> Result<(u64, Option<String>)> {
        let limit = violations.take("page_size", rules::page_size(size));
        let open = || self.keyring.open_text(purpose, text).ok_or(rules::PAGE_TOKEN);
        let after = if text.is_empty() { None } else { violations.take("page_token", open()) };
        violations.finish()?;
        Ok((limit.ok_or_else(|| Error::Internal("a violation was lost".into()))?, after))
    }

    fn cut<T>(&self, purpose: &[u8], mut found: Vec<T>, limit: u64, id: impl Fn(&T) -> &String) -> Result<(Vec<T>, Option<String>)> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(|last| self.keyring.seal_text(purpose, id(last))).transpose()?;
        Ok((found, next))
    }
}

/// Where a webhook is, without its path, which may be a secret.
fn host(url: &str) -> String {
    url::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default()
}

fn event<'a>(method: &'static str, actor: &'a Caller, workspace: &'a str, time: Time) -> AuditEvent<'a> {
    AuditEvent {
        workspace,
        time,
        method,
        code: AuditEvent::DONE,
        actor: Some(actor),
        token_id: None,
        principal: "",
        reason: "",
        before: None,
        after: None,
    }
}
