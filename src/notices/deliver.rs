//! From the outbox to the receivers: each workspace has queues of its own, which wait by themselves when their receiver fails.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{sync::OwnedSemaphorePermit, task::JoinSet};

use super::{
    Notices,
    letter::{letter, payload},
    webhook::Call,
};
use crate::{
    ambient::{self, Stopwatch, Time},
    error::{Error, Result},
    notice::{Brand, Channel, Event, Notice, Outcome},
    store::{Claimed, Settled},
    token::{self, TokenId, WebhookSecret},
    workspace::Brief,
};

/// For how long nobody else tries what was taken up: longer than a group takes at worst.
const LEASE: Duration = Duration::from_mins(3);
/// Notices that are tried at once, to one receiver. Mails wait for the turns of the mail server, which all of them share.
const CALLS_GROUP: u64 = 16;
const MAILS_GROUP: u64 = 8;
/// How long a receiver is served before others have their turn.
const SERVICE_TIME: Duration = Duration::from_secs(15);
/// The pause before a notice is tried again: as long at first, doubled each time, as long at most; half as much less or more, by chance.
const NOTICE_PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_hours(1));
/// The pause before a receiver that failed is tried again.
const RECEIVER_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(10));

const SUSPENDED: &str = "the workspace is suspended";
pub(super) const NO_MAIL: &str = "this server sends no mail: its operator must set smtp_url and smtp_from";

/// What is known of a receiver: whether it is being served, and whether it failed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Destination {
    is_busy: bool,
    failures: u32,
    retry_time: Option<Time>,
    served_time: Option<Time>,
}

impl Destination {
    /// Forgets that it failed.
    pub(super) fn forgive(&mut self) {
        (self.failures, self.retry_time) = (0, None);
    }
}

impl Notices {
    /// Begins to deliver what is due, in the background; what is being delivered already goes on. Who was served longest ago comes first.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn deliver(self: &Arc<Self>, now: Time) -> Result<()> {
        for channel in Channel::ALL {
            let mut due = self.store.due_destinations(channel, now).await?;
            let served = self.destinations.lock().clone();
            due.sort_by_cached_key(|workspace| served.get(&(channel, workspace.clone())).and_then(|known| known.served_time));
            for workspace in due {
                if let Some(service) = self.engage(channel, &workspace, now) {
                    tokio::spawn(serve(Arc::clone(self), service));
                }
            }
        }
        Ok(())
    }

    /// Takes up nothing more, and waits for what is being delivered.
    pub async fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        self.rest().await;
    }

    /// Waits until nothing is being delivered.
    pub async fn rest(&self) {
        for line in [&self.mail, &self.webhook] {
            // They are never closed.
            let _all = line.workers.acquire_many(line.workers_max).await;
        }
    }

    /// A worker for a receiver that is not being served and may be tried, if there is one left.
    fn engage(self: &Arc<Self>, channel: Channel, workspace: &str, now: Time) -> Option<Service> {
        let mut destinations = self.destinations.lock();
        let known = destinations.get(&(channel, workspace.to_owned())).copied().unwrap_or_default();
        if known.is_busy || known.retry_time.is_some_and(|retry_time| retry_time > now) {
            return None;
        }
        let permit = Arc::clone(&self.line(channel).workers).try_acquire_owned().ok()?;
        let engaged = Destination { is_busy: true, served_time: Some(now), ..known };
        destinations.insert((channel, workspace.to_owned()), engaged);
        Some(Service { notices: Arc::clone(self), channel, workspace: workspace.to_owned(), is_empty: false, _permit: permit })
    }

    /// Notes how a receiver fared; says how often it has failed in a row.
    fn note(&self, channel: Channel, workspace: &str, is_failing: bool, now: Time) -> u32 {
        let mut destinations = self.destinations.lock();
        let known = destinations.entry((channel, workspace.to_owned())).or_default();
        known.failures = if is_failing { known.failures.saturating_add(1) } else { 0 };
        known.retry_time = is_failing.then(|| now + pause(known.failures, RECEIVER_PAUSES));
        known.failures
    }

    /// Serves a queue as far as it goes, but not for long: others wait. A receiver that failed is tried with one notice first. Says whether nothing is due any more.
    async fn empty(self: &Arc<Self>, channel: Channel, workspace: &str) -> Result<bool> {
        let watch = Stopwatch::start();
        let mut failures = self.destinations.lock().get(&(channel, workspace.to_owned())).map_or(0, |known| known.failures);
        while !self.is_stopping.load(Ordering::SeqCst) && watch.elapsed() < SERVICE_TIME {
            let now = self.clock.now();
            let claim = token::notice_id(now)?;
            let limit = match channel {
                _ if failures > 0 => 1,
                Channel::Mail => MAILS_GROUP,
                Channel::Webhook => CALLS_GROUP,
            };
            let claimed = self.store.claim_notices(channel, workspace, &claim, limit, now, now + LEASE).await?;
            if claimed.is_empty() {
                return Ok(true);
            }
            let failure = self.attempt_group(channel, workspace, &claim, claimed).await?;
            let now = self.clock.now();
            failures = self.note(channel, workspace, failure.is_some(), now);
            if let Some(error) = failure {
                self.store.give_up(channel, workspace, &error, now).await?;
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Tries a group at once and writes what became of it; says why the receiver cannot be reached, if it cannot.
    async fn attempt_group(
        self: &Arc<Self>,
        channel: Channel,
        workspace: &str,
        claim: &str,
        claimed: Vec<Claimed>,
    ) -> Result<Option<String>> {
        let now = self.clock.now();
        let unable = match self.store.brief(workspace).await? {
            // It was deleted.
            None => return self.store.settle_notices(claim, &all(&claimed, |_| Settled::Done), now).await.map(|()| None),
            Some(brief) if brief.suspended => SUSPENDED.to_owned(),
            Some(brief) => match self.secrets_for(channel, workspace, now).await {
                Ok(secrets) => return self.attempt_all(channel, Arc::new(brief), claim, claimed, secrets).await,
                // It is for the operator to mend; what waits for it goes on waiting as for a receiver that is away.
                Err(Error::Internal(source)) => source.to_string(),
                Err(error) => return Err(error),
            },
        };
        let again = |claimed: &Claimed| settle(claimed, Outcome::Unreachable { error: unable.clone() }, now);
        self.store.settle_notices(claim, &all(&claimed, again), now).await?;
        Ok(Some(unable))
    }

    async fn secrets_for(&self, channel: Channel, workspace: &str, now: Time) -> Result<Vec<WebhookSecret>> {
        match channel {
            Channel::Mail => Ok(Vec::new()),
            Channel::Webhook => self.secrets(workspace, now).await,
        }
    }

    async fn attempt_all(
        self: &Arc<Self>,
        channel: Channel,
        brief: Arc<Brief>,
        claim: &str,
        claimed: Vec<Claimed>,
        secrets: Vec<WebhookSecret>,
    ) -> Result<Option<String>> {
        let secrets: Arc<[WebhookSecret]> = secrets.into();
        let told = self.told(&claimed).await?;
        let mut attempts = JoinSet::new();
        let mut settled = Vec::with_capacity(claimed.len());
        for claimed in claimed {
            match still_true(claimed, &brief, &told) {
                Err(id) => settled.push((id, Settled::Done)),
                Ok(claimed) => {
                    let (notices, brief, secrets) = (Arc::clone(self), Arc::clone(&brief), Arc::clone(&secrets));
                    attempts.spawn(async move {
                        let outcome = notices.attempt(&claimed.notice, &brief, &secrets).await;
                        (claimed, outcome)
                    });
                }
            }
        }
        let mut failure = None;
        while let Some(attempt) = attempts.join_next().await {
            let (claimed, outcome) = attempt.map_err(|error| Error::Internal(error.into()))?;
            let line = self.line(channel);
            let counter = if outcome == Outcome::Delivered { &line.delivered } else { &line.failed };
            counter.fetch_add(1, Ordering::Relaxed);
            if let Outcome::Unreachable { error } = &outcome {
                failure = Some(error.clone());
            }
            settled.push((claimed.notice.id.clone(), settle(&claimed, outcome, self.clock.now())));
        }
        self.store.settle_notices(claim, &settled, self.clock.now()).await?;
        Ok(failure)
    }

    /// One attempt.
    pub(super) async fn attempt(&self, notice: &Notice, brief: &Brief, secrets: &[WebhookSecret]) -> Outcome {
        let brand = Brand { display_name: brief.display_name.clone(), renew_url: brief.notices.renew_url.clone() };
        let now = self.clock.now();
        match notice.channel {
            Channel::Mail => match &self.mailer {
                None => Outcome::Unreachable { error: NO_MAIL.to_owned() },
                Some(mailer) => mailer.send(&letter(notice, &brand, now)).await,
            },
            Channel::Webhook => {
                let body = payload(notice, &brand);
                let url = &brief.notices.webhook_url;
                self.webhooks.post(Call { url, id: &notice.id, time: now, body: &body, secrets }).await
            }
        }
    }

    /// The ends of the tokens that these notices tell of, and the steps that were told of them last.
    async fn told(&self, claimed: &[Claimed]) -> Result<HashMap<TokenId, (Time, u16)>> {
        let steps = claimed.iter().filter(|claimed| is_step(claimed.notice.event));
        let mut ids: Vec<TokenId> = steps.flat_map(|claimed| &claimed.notice.items).map(|item| item.token_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let told = self.store.told_steps(&ids).await?;
        Ok(told.into_iter().map(|(id, end, days)| (id, (end, days))).collect())
    }

    /// What calls of a workspace's webhook are signed with: the present secret, and those before it as long as they count.
    pub(super) async fn secrets(&self, workspace: &str, now: Time) -> Result<Vec<WebhookSecret>> {
        let sealed = self.store.webhook_secrets(workspace, now).await?;
        if sealed.is_empty() {
            return Ok(vec![self.first_secret(workspace, now).await?]);
        }
        let open =
            |sealed: Vec<u8>| self.keyring.open(&secret_purpose(workspace), &sealed).and_then(|bytes| WebhookSecret::from_bytes(&bytes));
        let secrets: Vec<WebhookSecret> = sealed.into_iter().filter_map(open).collect();
        if secrets.is_empty() {
            return Err(Error::Internal(format!("the webhook secret of {workspace} was sealed with a key that is gone: rotate it").into()));
        }
        Ok(secrets)
    }

    /// If two servers make one at once, both sign until the next rotation.
    async fn first_secret(&self, workspace: &str, now: Time) -> Result<WebhookSecret> {
        let secret = WebhookSecret::generate()?;
        let sealed = self.keyring.seal(&secret_purpose(workspace), secret.as_bytes())?;
        let tx = self.store.begin_unnumbered().await?;
        tx.insert_webhook_secret(&token::notice_id(now)?, workspace, &sealed).await?;
        tx.commit(now).await?;
        Ok(secret)
    }
}

/// A receiver that is being served. However the service ends, another one can begin.
struct Service {
    notices: Arc<Notices>,
    channel: Channel,
    workspace: String,
    is_empty: bool,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Service {
    fn drop(&mut self) {
        let mut destinations = self.notices.destinations.lock();
        let key = (self.channel, std::mem::take(&mut self.workspace));
        match destinations.get_mut(&key) {
            Some(known) if known.failures > 0 || !self.is_empty => known.is_busy = false,
            _ => drop(destinations.remove(&key)),
        }
    }
}

/// Serves a receiver for a while.
async fn serve(notices: Arc<Notices>, mut service: Service) {
    match notices.empty(service.channel, &service.workspace).await {
        Ok(is_empty) => service.is_empty = is_empty,
        Err(error) => {
            let below = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let (channel, workspace) = (service.channel.name(), &service.workspace);
            tracing::warn!(%error, below, channel, workspace, "notices could not be delivered; they are kept");
            notices.note(service.channel, workspace, true, notices.clock.now());
        }
    }
}

/// What seals a workspace's webhook secret.
pub(super) fn secret_purpose(workspace: &str) -> [u8; 32] {
    token::fingerprint(&[b"webhook secret", workspace.as_bytes()])
}

fn is_step(event: Event) -> bool {
    matches!(event, Event::Expiring | Event::Expired)
}

fn all(claimed: &[Claimed], settled: impl Fn(&Claimed) -> Settled) -> Vec<(String, Settled)> {
    claimed.iter().map(|claimed| (claimed.notice.id.clone(), settled(claimed))).collect()
}

/// What is left of a notice when everything is taken out that was overtaken, by a nearer step or by a change of the token or of what the workspace wants; its id
/// if nothing is.
fn still_true(mut claimed: Claimed, brief: &Brief, told: &HashMap<TokenId, (Time, u16)>) -> std::result::Result<Claimed, String> {
    let notice = &mut claimed.notice;
    if is_step(notice.event) {
        notice
            .items
            .retain(|item| told.get(&item.token_id).is_some_and(|(end, days)| *end == item.expire_time && Some(*days) == item.days_before));
    }
    let wishes = &brief.notices;
    let is_wished = match notice.channel {
        Channel::Mail if notice.to_owner => wishes.mail_owner,
        Channel::Mail => wishes.emails.contains(&notice.recipient),
        Channel::Webhook => !wishes.webhook_url.is_empty(),
    };
    if is_wished && !notice.items.is_empty() { Ok(claimed) } else { Err(claimed.notice.id) }
}

fn settle(claimed: &Claimed, outcome: Outcome, now: Time) -> Settled {
    let again = |error: String| {
        let due = now + pause(u32::try_from(claimed.attempts).unwrap_or(u32::MAX), NOTICE_PAUSES);
        if due < claimed.give_up_time { Settled::Again(due, error) } else { Settled::Dead(error) }
    };
    match outcome {
        Outcome::Delivered => Settled::Done,
        Outcome::Refused { error, is_final: true } => Settled::Dead(error),
        Outcome::Refused { error, is_final: false } | Outcome::Unreachable { error } => again(error),
    }
}

/// How long it is waited after so many failures.
fn pause(failures: u32, (first, longest): (Duration, Duration)) -> Duration {
    let doubled = first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1).min(16))).min(longest);
    // From half of it to half as much again; without randomness just it.
    let chance = ambient::random::<2>().map_or(0x8000, u16::from_be_bytes);
    doubled / 2 + doubled.mul_f64(f64::from(chance) / f64::from(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_growing() {
        for (failures, shortest, longest) in [(1, 5, 15), (2, 10, 30), (5, 80, 240), (1_000, 1_800, 5_400)] {
            for _ in 0..50 {
                let pause = pause(failures, NOTICE_PAUSES).as_secs_f64();
                assert!((f64::from(shortest)..=f64::from(longest)).contains(&pause), "{failures}: {pause}");
            }
        }
    }
}
