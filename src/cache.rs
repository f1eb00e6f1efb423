//! A bounded map from digest to facts, and the tombstones that keep a slow read from bringing an ended token back.
//!
//! A change puts its digests under an embargo before its commit and lifts it when the commit is certain; both leave a tombstone and remove the entry. A read of the store takes a
//! [`Ticket`] before its statement is sent, and what it read is admitted only if no tombstone is younger than the ticket.
//!
//! Invariant: what was read before a change is never found after the change was announced (test `a_slow_read_is_not_admitted`).
//! Invariant: a hit takes no lock that tombstones are under; entries age from their write, never from their last use.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use quick_cache::{UnitWeighter, sync};

use crate::{ambient::Stopwatch, grant::Grant, token::Digest};

/// A read of the store that took longer is used by its caller only, and by nobody who joined it.
const READ_AGE_MAX: Duration = Duration::from_secs(10);
/// Longer than any read that could still be admitted.
const TOMBSTONE_AGE_MAX: Duration = Duration::from_secs(20);
const SHARDS: usize = 64;

/// What the store says of a digest.
#[derive(Clone, Debug)]
pub enum Fact {
    /// A token.
    Grant(Arc<Grant>),
    /// No token. A digest is made once, so this stays true.
    Absent,
}

/// Passes on what a digest hashes to: it is a keyed hash already.
#[derive(Default)]
struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type DigestState = BuildHasherDefault<DigestHasher>;

struct Tombstone {
    generation: u64,
    since: Stopwatch,
    /// Changes of which it is uncertain whether they were made.
    embargoes: u32,
}

/// When a read of the store began.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    generation: u64,
    since: Stopwatch,
}

/// Facts by digest.
pub struct Cache {
    facts: sync::Cache<Digest, Fact, UnitWeighter, DigestState>,
    tombstones: [Mutex<HashMap<Digest, Tombstone, DigestState>>; SHARDS],
    generation: AtomicU64,
    /// What was read before this generation is not admitted.
    floor: AtomicU64,
}

impl Cache {
    /// Room for this many tokens.
    #[must_use]
    pub fn new(tokens_max: usize) -> Self {
        let weight_max = u64::try_from(tokens_max).unwrap_or(u64::MAX);
        Self {
            // The map grows as it fills: a small installation does not pay for the room of a large one.
            facts: sync::Cache::with(
                tokens_max.min(1024),
                weight_max,
                UnitWeighter,
                DigestState::default(),
                sync::DefaultLifecycle::default(),
            ),
            tombstones: std::array::from_fn(|_| Mutex::default()),
            generation: AtomicU64::new(0),
            floor: AtomicU64::new(0),
        }
    }

    /// What is known of a digest.
    #[must_use]
    pub fn get(&self, digest: &Digest) -> Option<Fact> {
        self.facts.get(digest)
    }

    /// How many digests are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.facts.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.facts.is_empty()
    }

    /// To be taken before a read of the store is sent.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { generation: self.generation.load(Ordering::SeqCst), since: Stopwatch::start() }
    }

    /// Takes up what was read, unless it may be out of date. Only what was admitted may be told to those who joined the read.
    #[must_use]
    pub fn admit(&self, digest: Digest, fact: Fact, ticket: Ticket) -> bool {
        let tombstones = self.shard(&digest).lock();
        let late = |tombstone: &Tombstone| tombstone.embargoes > 0 || tombstone.generation > ticket.generation;
        let buried = tombstones.get(&digest).is_some_and(late);
        let cleared = ticket.generation < self.floor.load(Ordering::SeqCst);
        if buried || cleared || ticket.since.elapsed() >= READ_AGE_MAX {
            return false;
        }
        // Under the lock, so that no change is announced between the look at its tombstone and the insertion.
        self.facts.insert(digest, fact);
        true
    }

    /// Announces a committed change of the token with this digest.
    pub fn bury(&self, digest: &Digest) {
        self.entomb(digest, |embargoes| embargoes);
    }

    /// Admits nothing for this digest until [`Cache::lift`]: a change of it is being made, and nobody knows when it takes effect.
    pub fn embargo(&self, digest: &Digest) {
        self.entomb(digest, |embargoes| embargoes + 1);
    }

    /// Announces that a change under an embargo was made or was not: what is read from now on is certain.
    pub fn lift(&self, digest: &Digest) {
        self.entomb(digest, |embargoes| embargoes.saturating_sub(1));
    }

    fn entomb(&self, digest: &Digest, embargoes: impl FnOnce(u32) -> u32) {
        let mut tombstones = self.shard(digest).lock();
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        let before = tombstones.get(digest).map_or(0, |tombstone| tombstone.embargoes);
        tombstones.insert(*digest, Tombstone { generation, since: Stopwatch::start(), embargoes: embargoes(before) });
        self.facts.remove(digest);
    }

    /// Forgets everything, and admits nothing that was read before now.
    pub fn clear(&self) {
        let floor = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        self.floor.store(floor, Ordering::SeqCst);
        // An admission that looked at the floor before it was raised still holds its shard.
        for shard in &self.tombstones {
            drop(shard.lock());
        }
        self.facts.clear();
    }

    /// Forgets tombstones that no read can be older than. For memory only.
    pub fn prune(&self) {
        for shard in &self.tombstones {
            shard.lock().retain(|_, tombstone| tombstone.embargoes > 0 || tombstone.since.elapsed() < TOMBSTONE_AGE_MAX);
        }
    }

    fn shard(&self, digest: &Digest) -> &Mutex<HashMap<Digest, Tombstone, DigestState>> {
        let [first, ..] = &self.tombstones;
        let index = digest.as_bytes().last().map_or(0, |byte| usize::from(*byte) % SHARDS);
        self.tombstones.get(index).unwrap_or(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> Digest {
        Digest::from_slice(&[byte; 24]).expect("24 bytes")
    }

    #[test]
    fn a_slow_read_is_not_admitted() {
        let cache = Cache::new(10);
        let before = cache.ticket();
        cache.bury(&digest(1));
        assert!(!cache.admit(digest(1), Fact::Absent, before), "the read began before the change was announced");
        assert!(cache.get(&digest(1)).is_none());
        assert!(cache.admit(digest(2), Fact::Absent, before), "another token is not touched");
        assert!(cache.admit(digest(1), Fact::Absent, cache.ticket()), "a read that begins after it is admitted");
        assert!(cache.get(&digest(1)).is_some());
    }

    #[test]
    fn an_embargo_lasts_until_the_change_is_certain() {
        let cache = Cache::new(10);
        cache.embargo(&digest(1));
        cache.embargo(&digest(1));
        cache.prune();
        for end in [Cache::bury, Cache::lift, Cache::bury] {
            assert!(!cache.admit(digest(1), Fact::Absent, cache.ticket()));
            end(&cache, &digest(1));
        }
        let before = cache.ticket();
        cache.lift(&digest(1));
        assert!(!cache.admit(digest(1), Fact::Absent, before), "what was read under the embargo may be old");
        assert!(cache.admit(digest(1), Fact::Absent, cache.ticket()));
    }

    #[test]
    fn clearing_forgets_what_is_known_and_what_is_on_its_way() {
        let cache = Cache::new(10);
        let before = cache.ticket();
        assert!(cache.admit(digest(1), Fact::Absent, before));
        cache.clear();
        assert!(cache.is_empty() && !cache.admit(digest(2), Fact::Absent, before));
        assert!(cache.admit(digest(2), Fact::Absent, cache.ticket()));
    }

    #[test]
    fn a_change_removes_what_was_known() {
        let cache = Cache::new(10);
        assert!(cache.admit(digest(1), Fact::Absent, cache.ticket()));
        cache.bury(&digest(1));
        assert!(cache.get(&digest(1)).is_none());
    }

    #[test]
    fn the_cache_is_bounded() {
        let cache = Cache::new(100);
        for _ in 0..10_000 {
            let bytes = crate::ambient::random::<24>().expect("randomness");
            assert!(cache.admit(Digest::from_slice(&bytes).expect("24 bytes"), Fact::Absent, cache.ticket()));
        }
        assert!((50..=100).contains(&cache.len()), "{}", cache.len());
    }

    #[test]
    fn young_tombstones_survive_pruning() {
        let cache = Cache::new(10);
        let before = cache.ticket();
        cache.bury(&digest(1));
        cache.prune();
        assert!(!cache.admit(digest(1), Fact::Absent, before));
    }

    /// Readers and changers at once: a version that was announced is never undercut by what a reader finds.
    #[test]
    fn no_interleaving_brings_an_old_fact_back() {
        let cache = Cache::new(10);
        let store = AtomicU64::new(0);
        let announced = AtomicU64::new(0);
        let grant = |version: u64| Fact::Grant(Arc::new(Grant::example(&version.to_string())));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 1..20_000 {
                    store.store(version, Ordering::SeqCst);
                    cache.bury(&digest(1));
                    announced.store(version, Ordering::SeqCst);
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..40_000 {
                        let floor = announced.load(Ordering::SeqCst);
                        if let Some(Fact::Grant(found)) = cache.get(&digest(1)) {
                            assert!(found.display_name.parse::<u64>().expect("a number") >= floor);
                        } else {
                            let ticket = cache.ticket();
                            let read = store.load(Ordering::SeqCst);
                            std::thread::yield_now();
                            let _ = cache.admit(digest(1), grant(read), ticket);
                        }
                    }
                });
            }
        });
    }
}
