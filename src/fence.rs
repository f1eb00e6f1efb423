//! How a change takes effect: whole, and before its call returns.
//!
//! Invariant: a change runs to its end once it has begun, whether or not its caller still waits, and is announced to the cache before the
//! call returns (tests `a_cancelled_change_is_whole`, `a_change_is_effective_when_its_call_returns`).
//! Invariant: while it is uncertain whether a change was made, nothing is kept of what is read about its subjects (test
//! `a_commit_that_comes_late_leaves_no_old_fact`).
//! Invariant: no change ends the last token with `keyward:root` that works, but for a leak (test `the_last_root_token_stays`).

use std::{
    net::IpAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::Semaphore;

use crate::{
    ambient::Time,
    cache::Cache,
    caller::Caller,
    error::{Error, Result},
    grant::Subject,
    store::{Store, Tx},
};

/// How often a change whose outcome is uncertain is asked about.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long the log of changes is kept.
const LOG_LIFETIME: Duration = Duration::from_hours(1);
/// Changes that are made or wait for their turn; more are refused rather than queued. They outlive their callers.
const CHANGES_MAX: usize = 512;

/// Makes changes take effect.
pub struct Fence {
    cache: Arc<Cache>,
    store: Arc<Store>,
    changes: Arc<Semaphore>,
}

impl Fence {
    /// One between this store and this cache.
    #[must_use]
    pub fn new(cache: Arc<Cache>, store: Arc<Store>) -> Arc<Self> {
        Arc::new(Self { cache, store, changes: Arc::new(Semaphore::new(CHANGES_MAX)) })
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
    /// subjects is kept: a commit may be made although its answer is late, or fails to come.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn conclude(self: &Arc<Self>, tx: Tx<'_>, now: Time) -> Result<()> {
        let subjects = tx.touched().to_vec();
        for subject in &subjects {
            self.cache.embargo(subject);
        }
        let committed = tx.commit(now).await;
        if committed.is_err() {
            tokio::spawn(settle(Arc::downgrade(self), subjects));
        } else {
            self.lift(&subjects);
        }
        committed
    }

    /// Announces what a call before may have changed and failed to announce.
    pub fn bury(&self, subjects: &[Subject]) {
        for subject in subjects {
            self.cache.bury(subject);
        }
    }

    /// Forgets tombstones, log rows and kept answers that are too old for anybody to need. For space only.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn tick(&self, now: Time) -> Result<()> {
        self.cache.prune();
        self.store.prune(now, now - LOG_LIFETIME).await
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
