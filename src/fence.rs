//! How a change takes effect: whole, and on every server before its call returns.
//!
//! Every server answers from memory. Each registers itself in the database, hears what the others have changed, and answers from memory only for a lease after it has last heard
//! (`replica`). A change returns when each other server has confirmed it, or cannot answer from memory any more (`barrier`). What has changed is also told to callers
//! who keep answers of their own (`feed`).
//!
//! Invariant: a change runs to its end once it has begun, whether or not its caller still waits, and is announced to the cache before the
//! call returns (tests `a_cancelled_change_is_whole`, `a_change_is_effective_when_its_call_returns`).
//! Invariant: while it is uncertain whether a change was made, nothing is kept of what is read about its subjects (test
//! `a_commit_that_comes_late_leaves_no_old_fact`).
//! Invariant: no change ends the last token with `keyward:root` that works, but for a leak (test `the_last_root_token_stays`).

mod barrier;
mod feed;
mod replica;

use std::{
    net::IpAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

pub use barrier::{Change, Changed, LEASE_MAX, Propagation};
pub use feed::{Feed, Invalidation, News, Position};
pub use replica::Membership;

use crate::{
    ambient::{Clock, Time},
    cache::Cache,
    caller::Caller,
    error::{Error, Result},
    grant::Subject,
    store::{AuditEvent, Store, Tx},
};

/// A server of the database.
pub type Member = crate::store::Replica;

/// How often a change whose outcome is uncertain is asked about.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long the log of changes is kept.
const LOG_LIFETIME: Duration = Duration::from_hours(1);
/// How long a server that was evicted stays in the list.
const EVICTED_LIFETIME: Duration = Duration::from_hours(24);
/// Changes that are made or wait for their turn; more are refused rather than queued. They outlive their callers.
const CHANGES_MAX: usize = 512;
const REPLICA_ID_BYTES_MAX: usize = 100;

/// How this server stands beside others.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What people call it.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// How long it answers from memory after it has asked what changed.
    pub lease: Duration,
    /// Whether changes wait for it however long it is silent.
    pub is_acked_only: bool,
}

/// How it goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// The number of the last change that this server has heard of.
    pub head: i64,
    /// The number up to which it has confirmed changes.
    pub acknowledged: i64,
    /// For how much longer it may answer from memory; nothing: as long as it is alone.
    pub lease: Option<Duration>,
    /// The servers that changes wait for, this one included.
    pub replicas: usize,
    /// Those of them that have not confirmed the last change.
    pub behind: usize,
}

/// Makes changes take effect.
pub struct Fence {
    cache: Arc<Cache>,
    store: Arc<Store>,
    clock: Clock,
    settings: Settings,
    changes: Arc<Semaphore>,
    /// There may be something new in the log.
    wake: Arc<Notify>,
    /// Held by whoever follows the log.
    me: tokio::sync::Mutex<Option<replica::Place>>,
    /// The present id of this server.
    id: Mutex<String>,
    /// The id under which it is being registered.
    coming: Mutex<Option<String>>,
    /// Ids under which it may still be registered and that it does not use any more.
    left: Mutex<Vec<String>>,
    head: AtomicI64,
    acknowledged: AtomicI64,
    able: watch::Sender<bool>,
    watch: Arc<barrier::Watch>,
    recent: feed::Recent,
}

impl Fence {
    /// One between this store and this cache, which answers from memory once [`Fence::join`] was called.
    #[must_use]
    pub fn new(cache: Arc<Cache>, store: Arc<Store>, clock: Clock, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            cache,
            store,
            clock,
            settings,
            changes: Arc::new(Semaphore::new(CHANGES_MAX)),
            wake: Arc::default(),
            me: tokio::sync::Mutex::default(),
            id: Mutex::default(),
            coming: Mutex::default(),
            left: Mutex::default(),
            head: AtomicI64::new(0),
            acknowledged: AtomicI64::new(0),
            able: watch::Sender::new(true),
            watch: Arc::default(),
            recent: feed::Recent::default(),
        })
    }

    /// How it goes.
    pub fn stats(&self) -> Stats {
        let (replicas, behind) = self.watch.counts();
        Stats {
            head: self.head.load(Ordering::SeqCst),
            acknowledged: self.acknowledged.load(Ordering::SeqCst),
            lease: (!self.store.is_alone()).then(|| self.cache.serves_for()),
            replicas: if self.store.is_alone() { 1 } else { replicas },
            behind,
        }
    }

    /// Whether questions can be answered: from memory, or by the store. It is told to whoever watches.
    #[must_use]
    pub fn able(&self) -> watch::Receiver<bool> {
        self.able.subscribe()
    }

    /// Runs a change to its end, whether or not its caller still waits.
    ///
    /// # Errors
    /// Those of the change; `Overloaded` if too many are under way.
    pub async fn run<T: Send + 'static>(&self, change: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let permit = Arc::clone(&self.changes).try_acquire_owned();
        let permit = permit.map_err(|_| Error::Overloaded("too many changes are waiting; try again"))?;
        let task = async move {
            let _permit = permit;
            change.await
        };
        tokio::spawn(task).await.map_err(|error| Error::Internal(error.into()))?
    }

    /// Commits and announces a change. From before the commit until it is certain what became of it, nothing that is read about its
    /// subjects is kept: a commit may be made although its answer is late, or fails to come. Other servers hear of it; [`Fence::propagate`] waits for them.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn conclude(self: &Arc<Self>, tx: Tx<'_>, now: Time) -> Result<Change> {
        let (subjects, seq, history_age) = (tx.touched(), tx.seq(), tx.history_age());
        for subject in &subjects {
            self.cache.embargo(subject);
        }
        if let Err(error) = tx.commit(now).await {
            tokio::spawn(settle(Arc::downgrade(self), subjects));
            return Err(error);
        }
        self.lift(&subjects);
        self.tell_others();
        Ok(Change::committed(seq, history_age))
    }

    /// Announces what a call before may have changed and failed to announce. That may not have reached the other servers yet either.
    #[must_use]
    pub fn repeat(&self, tx: &Tx<'_>, subjects: &[Subject]) -> Change {
        for subject in subjects {
            self.cache.bury(subject);
        }
        self.wake.notify_one();
        // The change has the lock of changes: the number before its own is that of the last change that was made.
        Change::committed(tx.seq().map(|seq| seq - 1), tx.history_age())
    }

    /// Announces something that has changed and that no fact hangs on elsewhere.
    pub fn bury(&self, subjects: &[Subject]) {
        for subject in subjects {
            self.cache.bury(subject);
        }
    }

    /// Forgets tombstones, log rows, kept answers and evicted servers that are too old for anybody to need. For space only.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn tick(&self, now: Time) -> Result<()> {
        self.cache.prune();
        self.store.forget_evicted(now - EVICTED_LIFETIME).await?;
        self.store.prune(now, now - LOG_LIFETIME).await
    }

    /// The present id of this server.
    #[must_use]
    pub fn id(&self) -> String {
        self.id.lock().clone()
    }

    /// Says that changes do not wait for a server any more that must confirm them.
    ///
    /// # Errors
    /// `Invalid`, `NotFound`, `Precondition` (changes wait for it for no longer than its lease), `Unauthenticated`, `Unavailable`, `Overloaded`.
    pub async fn release(self: &Arc<Self>, caller: Caller, id: &str, now: Time) -> Result<Member> {
        if id.is_empty() || id.len() > REPLICA_ID_BYTES_MAX {
            return Err(Error::invalid("id", "must be the id of a server, as ListReplicas shows it"));
        }
        let (fence, id) = (Arc::clone(self), id.to_owned());
        self.run(async move {
            let tx = fence.store.begin_change_by(&caller, now).await?;
            let Some(released) = tx.release(&id, now).await? else {
                let rule = "changes wait for this server for no longer than its lease (fence_mode is lease): there is nothing to release";
                return Err(if tx.is_replica(&id).await? { Error::precondition(rule) } else { Error::NotFound("server") });
            };
            tx.audit([AuditEvent {
                workspace: &caller.workspace,
                time: now,
                method: "ReleaseReplica",
                code: AuditEvent::DONE,
                actor: Some(&caller),
                token_id: None,
                principal: "",
                reason: &id,
                before: None,
                after: None,
            }])
            .await?;
            let _change = fence.conclude(tx, now).await?;
            Ok(released)
        })
        .await
    }

    fn tell_others(self: &Arc<Self>) {
        self.wake.notify_one();
        if self.store.is_alone() {
            return;
        }
        let store = Arc::clone(&self.store);
        tokio::spawn(async move {
            if let Err(error) = store.hint().await {
                tracing::debug!(%error, "a hint to other servers was lost: they find the change by themselves");
            }
        });
    }

    fn lift(&self, subjects: &[Subject]) {
        for subject in subjects {
            self.cache.lift(subject);
        }
    }
}

/// Lifts an embargo. Whoever holds the lock of changes knows that the changes before have ended, one way or the other.
async fn settle(fence: Weak<Fence>, subjects: Vec<Subject>) {
    while let Some(fence) = fence.upgrade() {
        match fence.store.begin_change().await {
            Ok(_lock) => return fence.lift(&subjects),
            Err(error) => tracing::warn!(%error, "a change whose outcome is uncertain is not settled yet"),
        }
        drop(fence);
        tokio::time::sleep(SETTLE_INTERVAL).await;
    }
}

/// A root token that ends sooner than this is none to rely on.
const ROOT_LIFETIME_MIN: Duration = Duration::from_hours(1);

/// Sees to it that a change leaves a token with `keyward:root` that works from where the caller is, if there was one before it.
#[derive(Clone, Copy)]
pub(crate) struct RootWatch {
    address: Option<IpAddr>,
    until: Time,
    from_anywhere: bool,
    worked: bool,
}

impl RootWatch {
    pub(crate) async fn begin(tx: &Tx<'_>, caller: &Caller, now: Time) -> Result<Self> {
        let (address, until) = (caller.address, now + ROOT_LIFETIME_MIN);
        if tx.a_root_token_works(address, until, false).await? {
            return Ok(Self { address, until, from_anywhere: false, worked: true });
        }
        // If there is none to rely on, one that works from elsewhere or not for long is better than none.
        Ok(Self { address, until: now, from_anywhere: true, worked: tx.a_root_token_works(address, now, true).await? })
    }

    pub(crate) async fn end(self, tx: &Tx<'_>) -> Result<()> {
        if self.worked && !tx.a_root_token_works(self.address, self.until, self.from_anywhere).await? {
            return Err(Error::precondition(
                "this would end the last token with keyward:root that works from your address for another hour: create another one first",
            ));
        }
        Ok(())
    }
}
