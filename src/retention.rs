//! What is kept for how long, and removed a few rows at a time.
//!
//! Invariant: an ended token stays listed for as long as the setting says, and goes then (test `ended_tokens_stay_for_their_time_and_go`).
//! Invariant: no removal holds the lock of changes for more than a few rows (test `a_purge_does_not_hold_up_changes`).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    ambient::Time,
    error::Result,
    fence::Fence,
    store::{Expendable, Store},
};

/// Rows that one transaction removes.
const ROWS_MAX: u64 = 200;
/// Transactions of one tick; the rest waits for the next one.
const BATCHES_MAX: usize = 50;

/// For how long what has ended is kept.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// Tokens after their expiry, revocation or deletion; what is in a workspace after its deletion.
    pub tokens: Duration,
    /// Audit events.
    pub audit: Duration,
}

/// How many rows were removed so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Removed {
    /// Tokens.
    pub tokens: u64,
    /// Workspaces.
    pub workspaces: u64,
    /// Audit events.
    pub audit_events: u64,
}

/// Removes what is old enough.
pub struct Retention {
    store: Arc<Store>,
    fence: Arc<Fence>,
    periods: Periods,
    tokens: AtomicU64,
    workspaces: AtomicU64,
    audit_events: AtomicU64,
}

impl Retention {
    /// One that keeps for these periods.
    #[must_use]
    pub fn new(store: Arc<Store>, fence: Arc<Fence>, periods: Periods) -> Arc<Self> {
        let count = AtomicU64::default;
        Arc::new(Self { store, fence, periods, tokens: count(), workspaces: count(), audit_events: count() })
    }

    /// How many rows were removed so far.
    #[must_use]
    pub fn removed(&self) -> Removed {
        Removed {
            tokens: self.tokens.load(Ordering::Relaxed),
            workspaces: self.workspaces.load(Ordering::Relaxed),
            audit_events: self.audit_events.load(Ordering::Relaxed),
        }
    }

    /// Removes some of what is old enough; says whether there may be more.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: the rest waits for the next time.
    pub async fn tick(&self, now: Time) -> Result<bool> {
        let mut more = false;
        for _ in 0..BATCHES_MAX {
            more = self.purge_tokens(now).await? | self.purge_workspaces(now).await? | self.purge_audit(now).await?;
            if !more {
                break;
            }
        }
        Ok(more)
    }

    async fn purge_tokens(&self, now: Time) -> Result<bool> {
        let ended = self.store.ended_tokens(now - self.periods.tokens, ROWS_MAX).await?;
        self.remove(&ended, now).await
    }

    async fn remove(&self, tokens: &[Expendable], now: Time) -> Result<bool> {
        if tokens.is_empty() {
            return Ok(false);
        }
        // A change like any other: who asks about these tokens from now on hears that they are unknown.
        let mut tx = self.store.begin_change().await?;
        tx.purge_tokens(tokens).await?;
        // Nobody waits for it: the other servers hear of it.
        let _change = self.fence.conclude(tx, now).await?;
        self.tokens.fetch_add(u64::try_from(tokens.len()).unwrap_or(0), Ordering::Relaxed);
        Ok(true)
    }

    async fn purge_workspaces(&self, now: Time) -> Result<bool> {
        if let Some(id) = self.store.deleted_workspace(now - self.periods.tokens, false).await? {
            let tokens = self.store.tokens_of_workspace(&id, ROWS_MAX).await?;
            if !self.remove(&tokens, now).await? {
                let tx = self.store.begin_change().await?;
                tx.empty_workspace(&id, ROWS_MAX).await?;
                let _change = self.fence.conclude(tx, now).await?;
            }
            return Ok(true);
        }
        // Whoever gets the id next must not find the audit of those who had it.
        let before = now - self.periods.tokens.max(self.periods.audit);
        let Some(id) = self.store.deleted_workspace(before, true).await? else { return Ok(false) };
        let tx = self.store.begin_change().await?;
        tx.purge_workspace(&id).await?;
        // Nobody waits for it: the other servers hear of it.
        let _change = self.fence.conclude(tx, now).await?;
        self.workspaces.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    async fn purge_audit(&self, now: Time) -> Result<bool> {
        let removed = self.store.purge_audit_events(now - self.periods.audit, ROWS_MAX).await?;
        self.audit_events.fetch_add(removed, Ordering::Relaxed);
        Ok(removed == ROWS_MAX)
    }
}
