//! Use counts: merged in memory, written in batches.
//!
//! Invariant: what a clean stop flushes is exact; kill -9 loses at most what was marked since the last flush
//! (test `uses_are_counted_exactly_after_a_clean_stop`).
//! Invariant: what could not be written is kept and written later (test `uses_survive_a_failed_flush`).

use std::{collections::HashMap, net::IpAddr};

use parking_lot::Mutex;

use crate::{
    ambient::Time,
    error::Result,
    store::{Store, UseDelta},
    token::TokenId,
};

const SHARDS: usize = 64;
/// Tokens whose uses are written at once: below the databases' limits on parameters.
const ROWS_MAX: usize = 5_000;

/// Uses on their way to the store. What did not arrive, whatever the reason, goes back where it came from.
struct Taken<'a> {
    usage: &'a Usage,
    deltas: Vec<UseDelta>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for delta in self.deltas.drain(..) {
            self.usage.add(delta);
        }
    }
}

/// Uses that the store does not know of yet.
pub struct Usage {
    shards: [Mutex<HashMap<TokenId, UseDelta>>; SHARDS],
    flushing: tokio::sync::Mutex<()>,
}

impl Default for Usage {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), flushing: tokio::sync::Mutex::default() }
    }
}

impl Usage {
    /// Counts one use.
    pub fn mark(&self, token_id: TokenId, ip: Option<IpAddr>, now: Time) {
        self.add(UseDelta { token_id, count: 1, last_time: now, last_ip: ip });
    }

    /// How many tokens have uses that are not written yet.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Writes what was marked up to now.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: then it is kept for the next time.
    pub async fn flush(&self, store: &Store) -> Result<()> {
        let _alone = self.flushing.lock().await;
        let deltas = self.shards.iter().flat_map(|shard| std::mem::take(&mut *shard.lock()).into_values()).collect();
        let mut taken = Taken { usage: self, deltas };
        // One order for everybody who writes these rows, from the end, so that what is written can be cut off.
        taken.deltas.sort_unstable_by_key(|delta| std::cmp::Reverse(delta.token_id));
        while !taken.deltas.is_empty() {
            let rest = taken.deltas.len().saturating_sub(ROWS_MAX);
            let (_, chunk) = taken.deltas.split_at(rest);
            store.add_uses(chunk).await?;
            taken.deltas.truncate(rest);
        }
        Ok(())
    }

    fn add(&self, delta: UseDelta) {
        let [first, ..] = &self.shards;
        let mut shard = self.shards.get(delta.token_id.shard(SHARDS)).unwrap_or(first).lock();
        let known = shard.entry(delta.token_id).or_insert(UseDelta { count: 0, ..delta });
        known.count += delta.count;
        if delta.last_time >= known.last_time {
            known.last_time = delta.last_time;
            known.last_ip = delta.last_ip;
        }
    }
}
