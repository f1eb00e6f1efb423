//! One server among others: it registers itself, hears what the others have changed, and answers from memory as long as it hears.
//!
//! Each look at the log counts from before it was sent. What it brings is announced to the cache first and confirmed in the database after that; and only what the database has
//! recorded extends the lease, counted from that look. Whoever cannot confirm any more has been evicted, and begins anew with an empty memory.
//!
//! Invariant: a change is announced to the cache before it is confirmed (test `a_revocation_is_effective_on_every_server_when_it_returns`).
//! Invariant: the lease counts from before the log was asked, and nothing but a recorded renewal extends it (test
//! `a_deadline_that_comes_first_is_told`).
//! Invariant: what a server began to read before it was registered is never kept (test `what_is_read_before_a_server_is_registered_is_not_kept`).
//! Invariant: a server that was evicted, or that the log tells nothing any more, or whose database was put back, empties its memory and registers anew
//! (test `a_server_that_missed_something_begins_anew`).

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Fence, barrier};
use crate::{
    ambient::{self, Stopwatch},
    error::Result,
    store::{Log, NewReplica, Renewal},
    token,
};

/// How often the log is asked without a hint.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// As that, if nobody else changes anything.
const ALONE_INTERVAL: Duration = Duration::from_secs(1);
/// Things that are told at once. If more have changed, everything is forgotten.
const CHANGES_MAX: u32 = 50_000;
/// A sign of life is due so many times in a lease, if there is nothing to confirm.
const RENEWALS_PER_LEASE: u32 = 10;
/// How long a statement may take, at most; with a short lease, this part of it.
const PATIENCE_MAX: Duration = Duration::from_secs(1);
const PATIENCES_PER_LEASE: u32 = 4;
/// How long a server that starts tries to become one of the others.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// How long a server that stops tries to say so.
const DEPART_PATIENCE: Duration = Duration::from_secs(1);
/// How long it is waited before the way for hints is opened anew.
const HINTS_PAUSE: Duration = Duration::from_secs(1);

/// Where this server stands.
#[derive(Debug)]
pub(super) struct Place {
    id: String,
    /// The last change that was announced to the cache.
    applied: i64,
    /// The last change that was confirmed.
    acked: i64,
    renewal: i64,
    /// The look at the log that the last renewal counts from.
    renewed: Option<Stopwatch>,
    /// Which epoch and timeline of the database this is about, once that is known.
    history: Option<(i64, String)>,
}

impl Place {
    /// Why this server cannot go on from what it knows.
    fn outdated_by(&self, log: &Log) -> Option<&'static str> {
        match &self.history {
            Some((epoch, _)) if *epoch != log.epoch => Some("the database was put back to an earlier state"),
            Some((_, timeline)) if *timeline != log.timeline => Some("another database server has taken over"),
            _ if log.head < self.applied => Some("the database knows less than before: was it put back to an earlier state?"),
            _ if self.applied < log.pruned => Some("the log does not reach back to what this server knows"),
            _ => None,
        }
    }
}

/// What keeps a server among the others. It ends when this is dropped, or better with [`Membership::leave`].
pub struct Membership {
    fence: Arc<Fence>,
    tasks: JoinSet<()>,
}

impl Membership {
    /// Stops answering from memory and tells the others that they need not wait for this server.
    ///
    /// # Errors
    /// `Unavailable`: they will find out by themselves.
    pub async fn leave(mut self) -> Result<()> {
        self.tasks.shutdown().await;
        self.fence.cache.stop_serving();
        let mut left = std::mem::take(&mut *self.fence.left.lock());
        left.extend(self.fence.coming.lock().take());
        left.extend(self.fence.me.lock().await.take().map(|place| place.id));
        for id in left {
            self.depart(&id).await?;
        }
        Ok(())
    }

    /// A statement may take as long as a part of a lease, which may be short: it is tried more than once.
    async fn depart(&self, id: &str) -> Result<()> {
        let begin = Stopwatch::start();
        loop {
            match self.fence.store.depart(id, self.fence.patience()).await {
                Err(_) if begin.elapsed() < DEPART_PATIENCE => sleep(POLL_INTERVAL).await,
                outcome => return outcome,
            }
        }
    }
}

impl Fence {
    /// Becomes one of the servers of this database, and answers from memory from now on.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn join(self: &Arc<Self>) -> Result<Membership> {
        let begin = Stopwatch::start();
        while !self.cache.is_serving() {
            match self.step().await {
                // A single statement has to be done in a part of a lease, which may be short for a machine that is busy.
                Err(_) if begin.elapsed() < START_PATIENCE => sleep(POLL_INTERVAL).await,
                outcome => outcome?,
            }
        }
        let mut tasks = JoinSet::new();
        let interval = if self.store.is_alone() { ALONE_INTERVAL } else { POLL_INTERVAL };
        tasks.spawn(follow(Arc::downgrade(self), Arc::clone(&self.wake), interval));
        if !self.store.is_alone() {
            tasks.spawn(listen(Arc::downgrade(self)));
            tasks.spawn(barrier::watch(Arc::downgrade(self), Arc::clone(&self.watch), self.settings.lease / 3));
        }
        Ok(Membership { fence: Arc::clone(self), tasks })
    }

    /// Asks once what has changed, and confirms it.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn step(&self) -> Result<()> {
        let mut me = self.me.lock().await;
        let outcome = self.advance(&mut me).await;
        self.able.send_if_modified(|able| {
            let is_able = outcome.is_ok() || self.cache.is_serving();
            std::mem::replace(able, is_able) != is_able
        });
        outcome
    }

    async fn advance(&self, me: &mut Option<Place>) -> Result<()> {
        let place = match me {
            Some(place) => place,
            None => me.insert(self.register().await?),
        };
        let since = Stopwatch::start();
        let as_of = self.clock.now();
        let log = self.store.changes_after(place.applied, CHANGES_MAX, self.patience()).await?;
        if let Some(why) = place.outdated_by(&log) {
            self.begin_anew(me, why);
            return Ok(());
        }
        if place.history.is_none() {
            place.history = Some((log.epoch, log.timeline.clone()));
        }
        self.apply(place, log, as_of);
        if self.store.is_alone() {
            place.acked = place.applied;
            self.acknowledged.store(place.acked, Ordering::SeqCst);
            return Ok(());
        }
        let is_due = |renewed: Stopwatch| renewed.until(since) >= self.settings.lease / RENEWALS_PER_LEASE;
        if place.acked == place.applied && !place.renewed.is_none_or(is_due) {
            return Ok(());
        }
        let Some((epoch, timeline)) = &place.history else { return Ok(()) };
        match self.store.renew(&place.id, place.renewal, place.applied, (*epoch, timeline), self.patience()).await? {
            Renewal::Recorded(renewal) => {
                (place.renewal, place.acked, place.renewed) = (renewal, place.applied, Some(since));
                self.acknowledged.store(place.acked, Ordering::SeqCst);
                self.cache.serve(since);
            }
            // What it says of us is true, but it is not known from which look on.
            Renewal::Ahead(renewal) => {
                place.renewal = renewal;
                self.wake.notify_one();
            }
            Renewal::Evicted => self.begin_anew(me, "this server was silent for too long, and changes do not wait for it any more"),
        }
        Ok(())
    }

    /// Announces what has changed.
    fn apply(&self, place: &mut Place, log: Log, as_of: ambient::Time) {
        if log.is_cut || log.is_foreign {
            tracing::warn!(
                "more has changed at once than can be told one by one, or something that a later version has changed: everything known is forgotten"
            );
            self.cache.clear();
        }
        for change in &log.changes {
            self.cache.bury(&change.subject);
        }
        place.applied = log.head;
        self.head.store(log.head, Ordering::SeqCst);
        self.recent.add(log, as_of);
    }

    /// Becomes one of the servers that changes wait for. Its memory is empty.
    async fn register(&self) -> Result<Place> {
        self.cache.stop_serving();
        // Rows that changes would wait for.
        loop {
            let Some(left) = self.left.lock().last().cloned() else { break };
            self.store.depart(&left, self.patience()).await?;
            self.left.lock().pop();
        }
        // The same until it is known to be registered, so that no attempt leaves a row of nobody.
        let fresh = token::event_id(self.clock.now())?;
        let id = self.coming.lock().get_or_insert(fresh).clone();
        let replica = NewReplica {
            id: id.clone(),
            name: self.settings.name.clone(),
            version: self.settings.version.clone(),
            lease: self.settings.lease,
            is_acked_only: self.settings.is_acked_only,
            start_time: self.clock.now(),
        };
        let head = self.store.register(&replica, self.patience()).await?;
        *self.coming.lock() = None;
        // Until the row was there no change waited for this server: what it began to read before may be out of date, and nobody will say so.
        self.cache.clear();
        self.head.store(head, Ordering::SeqCst);
        id.clone_into(&mut self.id.lock());
        if self.store.is_alone() {
            self.cache.serve_for_ever();
        }
        Ok(Place { id, applied: head, acked: head, renewal: 0, renewed: None, history: None })
    }

    fn begin_anew(&self, me: &mut Option<Place>, why: &str) {
        self.cache.stop_serving();
        self.cache.clear();
        self.recent.clear();
        self.watch.forget();
        tracing::error!(why, "everything known is forgotten, and this server registers anew");
        self.left.lock().extend(me.take().map(|place| place.id));
        self.wake.notify_one();
    }

    fn patience(&self) -> Duration {
        (self.settings.lease / PATIENCES_PER_LEASE).min(PATIENCE_MAX)
    }
}

/// Asks what has changed, again and again.
async fn follow(fence: Weak<Fence>, wake: Arc<Notify>, interval: Duration) {
    let mut is_silent = false;
    loop {
        let _woken = timeout(interval, wake.notified()).await;
        let Some(fence) = fence.upgrade() else { return };
        let outcome = fence.step().await;
        match (&outcome, is_silent) {
            (Err(error), false) => {
                let below = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
                let seconds = fence.cache.serves_for().as_secs();
                tracing::warn!(%error, below, seconds, "the database does not say what has changed; memory is good for this many seconds more");
            }
            (Ok(()), true) => tracing::info!("the database says what has changed again"),
            _ => {}
        }
        is_silent = outcome.is_err();
    }
}

/// Waits for hints of other servers.
async fn listen(fence: Weak<Fence>) {
    while let Some(hints) = fence.upgrade().map(|fence| Arc::clone(&fence.store)) {
        let hints = hints.hints().await;
        if let Ok(None) = hints {
            return;
        }
        if let Ok(Some(mut hints)) = hints {
            while hints.next().await.is_ok() {
                let Some(fence) = fence.upgrade() else { return };
                fence.wake.notify_one();
            }
        }
        sleep(HINTS_PAUSE).await;
    }
}
