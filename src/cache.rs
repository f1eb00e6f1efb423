//! Bounded maps of facts, and what keeps a slow read from bringing an ended token back.
//!
//! A change puts its subjects under an embargo before its commit and lifts it when the commit is certain. A read of the store takes a [`Ticket`] before its
//! statement is sent. For a token, both ends of an embargo leave a tombstone and remove the entry, and what was read is admitted only if no tombstone is younger
//! than the ticket. A principal or a workspace may have a million entries: its changes raise the [`Mark`] that every entry of it is compared with when it
//! is found, so that all of them are out of date at once and make way one by one.
//!
//! Invariant: what was read before a change is never found after the change was announced (tests `in_no_order_is_an_old_fact_of_a_token_found`,
//! `in_no_order_is_an_old_fact_found_after_a_change_of_all_that_it_hangs_on`).
//! Invariant: without a lease nothing is found and nothing taken up (test `nothing_is_told_or_taken_up_without_a_lease`).
//! Invariant: a hit takes no lock and writes nothing that another reader of the same token writes again; entries age from their write, never from
//! their last use.

#[cfg(test)]
mod interleavings;
mod sync;
mod table;

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, BuildHasherDefault, Hash, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use quick_cache::Weighter;

use crate::{
    ambient::{Expiry, Stopwatch},
    grant::{Grant, Subject},
    scope::Routes,
    token::Digest,
};

use sync::{AtomicU64, Mutex, Ordering};
use table::{Place, Stamp, Table};

/// How long a tombstone is kept, in leases: longer than any read that could still be admitted.
const TOMBSTONE_LEASES: u32 = 2;
const SHARDS: usize = 64;
/// Principals and workspaces share this many marks. Two that share one are out of date together, which costs a read and nothing else.
const MARKS: usize = 1 << 16;
/// Tables of routes, in bytes, all of them together.
const ROUTES_BYTES_MAX: u64 = 64 << 20;
/// Principals who come with client certificates.
const STANDINGS_MAX: usize = 10_000;

/// What the store says of a digest.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most of them are grants")]
pub enum Fact {
    /// A token.
    Grant(Grant),
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
    embargoes: u64,
}

/// What a certificate's principal may do, as far as the store says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Whether the principal or its workspace is suspended or gone.
    pub is_suspended: bool,
    /// Whether the principal has the role of an administrator.
    pub is_admin: bool,
}

/// Which marks an entry is compared with; the first of all marks is never raised.
#[derive(Clone, Copy)]
struct Marks([u16; 2]);

impl Marks {
    const NONE: Self = Self([0; 2]);

    fn of_word(word: u64) -> Self {
        let [a, b, c, d, ..] = word.to_le_bytes();
        Self([u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])])
    }

    fn word(self) -> u64 {
        u64::from(self.0[0]) | u64::from(self.0[1]) << 16
    }
}

/// Tells which mark a subject has. No two processes tell alike, so that nobody finds out whose entries are out of date with whose.
#[derive(Default)]
struct Marker(RandomState);

impl Marker {
    fn of_fact(&self, fact: &Fact) -> Marks {
        match fact {
            Fact::Grant(grant) => Marks([self.workspace(grant.workspace()), self.principal(grant.workspace(), grant.principal())]),
            Fact::Absent => Marks::NONE,
        }
    }

    fn workspace(&self, workspace: &str) -> u16 {
        self.mark((1_u8, workspace))
    }

    fn principal(&self, workspace: &str, id: &str) -> u16 {
        self.mark((2_u8, workspace, id))
    }

    fn mark(&self, subject: impl Hash) -> u16 {
        let [first, second, ..] = self.0.hash_one(subject).to_le_bytes();
        u16::from_le_bytes([first, second]).max(1)
    }
}

/// The generation of the last change, with the number of embargoes above it: a mark under an embargo is later than every ticket.
#[derive(Default)]
struct Mark(AtomicU64);

impl Mark {
    const GENERATION_BITS: u32 = 48;

    fn is_before(&self, ticket: u64) -> bool {
        self.0.load(Ordering::SeqCst) <= ticket
    }

    fn raise(&self, generation: u64, embargoes: impl Fn(u64) -> u64) {
        let raised = |mark: u64| {
            let last = mark & ((1 << Self::GENERATION_BITS) - 1);
            Some((embargoes(mark >> Self::GENERATION_BITS) << Self::GENERATION_BITS) | last.max(generation))
        };
        // It always has a next value.
        let _before = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, raised);
    }
}

/// A value, and what it is compared with when it is found.
#[derive(Clone)]
struct Entry<V> {
    value: V,
    generation: u64,
    marks: Marks,
}

#[derive(Clone)]
struct BytesWeighter;

impl Weighter<Arc<str>, Entry<Arc<Routes>>> for BytesWeighter {
    fn weight(&self, workspace: &Arc<str>, entry: &Entry<Arc<Routes>>) -> u64 {
        u64::try_from(256 + workspace.len() + entry.value.bytes()).unwrap_or(u64::MAX)
    }
}

/// When a read of the store began.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    generation: u64,
    since: Stopwatch,
}

/// Facts by digest.
pub struct Cache {
    facts: Table,
    routes: quick_cache::sync::Cache<Arc<str>, Entry<Arc<Routes>>, BytesWeighter>,
    standings: quick_cache::sync::Cache<(Arc<str>, Arc<str>), Entry<Standing>>,
    marker: Marker,
    marks: Box<[Mark]>,
    tombstones: [Mutex<HashMap<Digest, Tombstone, DigestState>>; SHARDS],
    generation: AtomicU64,
    /// What was read before this generation is not admitted.
    floor: AtomicU64,
    /// Until when what is known may be told.
    served: Expiry,
    lease: Duration,
}

impl Cache {
    /// Room for facts of about this many bytes, all in; at least 4 MiB. Nothing is found and nothing admitted until [`Cache::serve`] or
    /// [`Cache::serve_for_ever`] says so. A read of the store that took as long as `lease` is used by its caller only, and by nobody who joined it.
    #[must_use]
    pub fn new(bytes_max: usize, lease: Duration) -> Self {
        Self {
            served: Expiry::default(),
            lease,
            facts: Table::new(bytes_max),
            routes: quick_cache::sync::Cache::with_weighter(1024, ROUTES_BYTES_MAX, BytesWeighter),
            standings: quick_cache::sync::Cache::new(STANDINGS_MAX),
            marker: Marker::default(),
            marks: std::iter::repeat_with(Mark::default).take(MARKS).collect(),
            tombstones: std::array::from_fn(|_| Mutex::default()),
            generation: AtomicU64::new(0),
            floor: AtomicU64::new(0),
        }
    }

    /// What is known may be told until a lease after this instant, which lies before the store was asked what has changed.
    pub fn serve(&self, since: Stopwatch) {
        self.served.set(since, self.lease);
    }

    /// What is known may be told until it is known to be out of date: nobody else changes the store.
    pub fn serve_for_ever(&self) {
        self.served.set_never();
    }

    /// What is known is not told any more.
    pub fn stop_serving(&self) {
        self.served.expire();
    }

    /// Whether what is known may be told now.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.served.holds()
    }

    /// For how much longer.
    #[must_use]
    pub fn serves_for(&self) -> Duration {
        self.served.remaining()
    }

    /// What is known of a digest.
    #[must_use]
    pub fn get(&self, digest: &Digest) -> Option<Fact> {
        let mut grant = Grant::default();
        self.copy(digest, &mut grant).then(|| if grant.as_memory().is_empty() { Fact::Absent } else { Fact::Grant(grant) })
    }

    /// Copies the facts of a digest into `grant`, where they stay: an empty one if there is no token. Whether anything is known.
    pub fn copy(&self, digest: &Digest, grant: &mut Grant) -> bool {
        let stamp = self.facts.get(digest, grant.memory_mut());
        stamp.is_some_and(|stamp| self.is_current(Marks::of_word(stamp.marks), stamp.generation))
    }

    /// Asked for all digests of a batch before [`Cache::get`] is asked for the first: then the processor waits for memory once and not for each of them.
    pub fn bring_near(&self, digests: impl Iterator<Item = Digest> + Clone) {
        let mut places = smallvec::SmallVec::<[Option<Place>; 128]>::new();
        places.extend(digests.clone().map(|digest| self.facts.locate(&digest)));
        for (digest, place) in digests.zip(places) {
            if let Some(place) = place {
                self.facts.touch(&digest, place);
            }
        }
    }

    /// The routes of a workspace, if they are known.
    #[must_use]
    pub fn routes(&self, workspace: &str) -> Option<Arc<Routes>> {
        self.routes.get(workspace).and_then(|entry| self.current(entry))
    }

    /// The standing of a certificate's principal, if it is known.
    #[must_use]
    pub fn standing(&self, workspace: &Arc<str>, principal: &Arc<str>) -> Option<Standing> {
        self.standings.get(&(Arc::clone(workspace), Arc::clone(principal))).and_then(|entry| self.current(entry))
    }

    fn current<V>(&self, entry: Entry<V>) -> Option<V> {
        self.is_current(entry.marks, entry.generation).then_some(entry.value)
    }

    fn is_current(&self, Marks(marks): Marks, generation: u64) -> bool {
        self.served.holds()
            && marks.into_iter().all(|index| self.marks.get(usize::from(index)).is_some_and(|mark| mark.is_before(generation)))
    }

    /// How many digests are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.facts.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that they take, all in.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.facts.bytes()
    }

    /// To be taken before a read of the store is sent.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { generation: self.generation.load(Ordering::SeqCst), since: Stopwatch::start() }
    }

    /// Takes up what was read, unless it may be out of date. Only what was admitted may be told to those who joined the read.
    #[must_use]
    pub fn admit(&self, digest: Digest, fact: &Fact, ticket: Ticket) -> bool {
        let marks = self.marker.of_fact(fact);
        let tombstones = self.shard(&digest).lock();
        let late = |tombstone: &Tombstone| tombstone.embargoes > 0 || tombstone.generation > ticket.generation;
        let buried = tombstones.get(&digest).is_some_and(late);
        let cleared = ticket.generation < self.floor.load(Ordering::SeqCst);
        if buried || cleared || ticket.since.elapsed() >= self.lease || !self.is_current(marks, ticket.generation) {
            return false;
        }
        // Under the lock, so that no change is announced between the look at its tombstone and the insertion.
        let value = match fact {
            Fact::Grant(grant) => grant.as_memory(),
            Fact::Absent => &[],
        };
        self.facts.insert(&digest, Stamp { generation: ticket.generation, marks: marks.word() }, value);
        true
    }

    /// As [`Cache::admit`], the routes of a workspace.
    #[must_use]
    pub fn admit_routes(&self, workspace: &Arc<str>, routes: &Arc<Routes>, ticket: Ticket) -> bool {
        let marks = Marks([self.marker.workspace(workspace), 0]);
        let entry = Entry { value: Arc::clone(routes), generation: ticket.generation, marks };
        self.admit_marked(&self.routes, Arc::clone(workspace), entry, ticket)
    }

    /// As [`Cache::admit`], the standing of a certificate's principal.
    #[must_use]
    pub fn admit_standing(&self, workspace: &Arc<str>, principal: &Arc<str>, standing: Standing, ticket: Ticket) -> bool {
        let marks = Marks([self.marker.workspace(workspace), self.marker.principal(workspace, principal)]);
        let key = (Arc::clone(workspace), Arc::clone(principal));
        self.admit_marked(&self.standings, key, Entry { value: standing, generation: ticket.generation, marks }, ticket)
    }

    /// What hangs on marks alone is compared with them whenever it is found, so that it does not matter when it is inserted.
    fn admit_marked<K, V, W>(&self, known: &quick_cache::sync::Cache<K, Entry<V>, W>, key: K, entry: Entry<V>, ticket: Ticket) -> bool
    where
        K: Eq + Hash + Clone,
        V: Clone,
        W: Weighter<K, Entry<V>> + Clone,
    {
        let (marks, generation) = (entry.marks, entry.generation);
        let late = ticket.generation < self.floor.load(Ordering::SeqCst) || ticket.since.elapsed() >= self.lease;
        if late || !self.is_current(marks, generation) {
            return false;
        }
        known.insert(key, entry);
        true
    }

    /// Announces a committed change.
    pub fn bury(&self, subject: &Subject) {
        self.announce(subject, |embargoes| embargoes);
    }

    /// Admits nothing about this subject, and finds nothing, until [`Cache::lift`]: a change of it is being made, and nobody knows when it takes effect.
    pub fn embargo(&self, subject: &Subject) {
        self.announce(subject, |embargoes| embargoes + 1);
    }

    /// Announces that a change under an embargo was made or was not: what is read from now on is certain.
    pub fn lift(&self, subject: &Subject) {
        self.announce(subject, |embargoes| embargoes.saturating_sub(1));
    }

    fn announce(&self, subject: &Subject, embargoes: impl Fn(u64) -> u64) {
        let mark = match subject {
            Subject::Token(digest) => return self.entomb(digest, embargoes),
            Subject::Principal { workspace, id } => self.marker.principal(workspace, id),
            Subject::Workspace(id) => self.marker.workspace(id),
        };
        let generation = self.next_generation();
        if let Some(mark) = self.marks.get(usize::from(mark)) {
            mark.raise(generation, embargoes);
        }
    }

    fn entomb(&self, digest: &Digest, embargoes: impl Fn(u64) -> u64) {
        let mut tombstones = self.shard(digest).lock();
        let generation = self.next_generation();
        let before = tombstones.get(digest).map_or(0, |tombstone| tombstone.embargoes);
        tombstones.insert(*digest, Tombstone { generation, since: Stopwatch::start(), embargoes: embargoes(before) });
        self.facts.remove(digest);
    }

    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Forgets everything, and admits nothing that was read before now.
    pub fn clear(&self) {
        let floor = self.next_generation();
        self.floor.store(floor, Ordering::SeqCst);
        // An admission that looked at the floor before it was raised still holds its shard.
        for shard in &self.tombstones {
            drop(shard.lock());
        }
        self.facts.clear();
        // What is inserted behind this was read before, and its marks say so.
        for mark in self.marks.iter().skip(1) {
            mark.raise(floor, |embargoes| embargoes);
        }
        self.routes.clear();
        self.standings.clear();
    }

    /// Forgets tombstones that no read can be older than. For memory only.
    pub fn prune(&self) {
        for shard in &self.tombstones {
            shard.lock().retain(|_, tombstone| tombstone.embargoes > 0 || tombstone.since.elapsed() < TOMBSTONE_LEASES * self.lease);
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
    use crate::grant::Facts;

    fn serving() -> Cache {
        let cache = Cache::new(0, Duration::from_secs(10));
        cache.serve_for_ever();
        cache
    }

    fn digest(byte: u8) -> Digest {
        Digest::from_slice(&[byte; 24]).expect("24 bytes")
    }

    fn token(byte: u8) -> Subject {
        Subject::Token(digest(byte))
    }

    fn grant_of(workspace: &str, principal: &str) -> Fact {
        Fact::Grant(Grant::of(&Facts { workspace: workspace.into(), principal: principal.into(), ..Facts::example("ci") }))
    }

    #[test]
    fn a_change_of_a_workspace_reaches_all_that_hangs_on_it() {
        let cache = serving();
        let (ours, theirs): (Arc<str>, Arc<str>) = ("ours".into(), "theirs".into());
        let known = || [digest(1), digest(2), digest(3)].map(|digest| cache.get(&digest).is_some());
        let fill = || {
            let ticket = cache.ticket();
            cache.admit(digest(1), &grant_of("ours", "alice"), ticket)
                && cache.admit(digest(2), &grant_of("ours", "bob"), ticket)
                && cache.admit(digest(3), &grant_of("theirs", "alice"), ticket)
                && cache.admit_routes(&ours, &Arc::default(), ticket)
                && cache.admit_standing(&theirs, &"alice".into(), Standing { is_suspended: false, is_admin: false }, ticket)
        };
        let alice = Subject::Principal { workspace: "ours".to_owned(), id: "alice".to_owned() };
        assert!(fill());
        assert_eq!(known(), [true, true, true]);
        cache.bury(&alice);
        assert_eq!(known(), [false, true, true], "one principal");
        assert!(fill());
        cache.bury(&Subject::Workspace("ours".to_owned()));
        assert_eq!(known(), [false, false, true], "one workspace");
        assert!(cache.routes("ours").is_none() && cache.standing(&theirs, &"alice".into()).is_some());
        let slow = cache.ticket();
        cache.embargo(&alice);
        assert!(!cache.admit(digest(1), &grant_of("ours", "alice"), slow), "read before the change");
        assert!(!cache.admit(digest(1), &grant_of("ours", "alice"), cache.ticket()), "read during the change");
        let during = cache.ticket();
        cache.lift(&alice);
        assert!(!cache.admit(digest(1), &grant_of("ours", "alice"), during), "read during the change, and late");
        assert!(fill());
        cache.clear();
        assert_eq!(known(), [false; 3]);
        assert!(cache.routes("ours").is_none() && fill());
    }

    #[test]
    fn a_slow_read_is_not_admitted() {
        let cache = serving();
        let before = cache.ticket();
        cache.bury(&token(1));
        assert!(!cache.admit(digest(1), &Fact::Absent, before), "the read began before the change was announced");
        assert!(cache.get(&digest(1)).is_none());
        assert!(cache.admit(digest(2), &Fact::Absent, before), "another token is not touched");
        assert!(cache.admit(digest(1), &Fact::Absent, cache.ticket()), "a read that begins after it is admitted");
        assert!(cache.get(&digest(1)).is_some());
    }

    #[test]
    fn an_embargo_lasts_until_the_change_is_certain() {
        let cache = serving();
        cache.embargo(&token(1));
        cache.embargo(&token(1));
        cache.prune();
        for end in [Cache::bury, Cache::lift, Cache::bury] {
            assert!(!cache.admit(digest(1), &Fact::Absent, cache.ticket()));
            end(&cache, &token(1));
        }
        let before = cache.ticket();
        cache.lift(&token(1));
        assert!(!cache.admit(digest(1), &Fact::Absent, before), "what was read under the embargo may be old");
        assert!(cache.admit(digest(1), &Fact::Absent, cache.ticket()));
    }

    #[test]
    fn clearing_forgets_what_is_known_and_what_is_on_its_way() {
        let cache = serving();
        let before = cache.ticket();
        assert!(cache.admit(digest(1), &Fact::Absent, before));
        cache.clear();
        assert!(cache.is_empty() && !cache.admit(digest(2), &Fact::Absent, before));
        assert!(cache.admit(digest(2), &Fact::Absent, cache.ticket()));
    }

    #[test]
    fn nothing_is_told_or_taken_up_without_a_lease() {
        let cache = Cache::new(0, Duration::from_millis(300));
        assert!(!cache.is_serving() && !cache.admit(digest(1), &Fact::Absent, cache.ticket()), "before the first one");
        let since = Stopwatch::start();
        cache.serve(since);
        assert!(cache.admit(digest(1), &Fact::Absent, cache.ticket()) && cache.get(&digest(1)).is_some());
        let slow = cache.ticket();
        while slow.since.elapsed() < Duration::from_millis(300) {
            std::thread::yield_now();
        }
        assert!(cache.get(&digest(1)).is_none() && !cache.admit(digest(2), &Fact::Absent, cache.ticket()), "it has ended");
        cache.serve(Stopwatch::start());
        assert!(cache.get(&digest(1)).is_some(), "what was known is known again");
        assert!(!cache.admit(digest(2), &Fact::Absent, slow), "a read that took a lease");
        cache.stop_serving();
        assert!(cache.get(&digest(1)).is_none() && !cache.is_serving());
    }

    #[test]
    fn a_change_removes_what_was_known() {
        let cache = serving();
        assert!(cache.admit(digest(1), &Fact::Absent, cache.ticket()));
        cache.bury(&token(1));
        assert!(cache.get(&digest(1)).is_none());
    }

    #[test]
    fn young_tombstones_survive_pruning() {
        let cache = serving();
        let before = cache.ticket();
        cache.bury(&token(1));
        cache.prune();
        assert!(!cache.admit(digest(1), &Fact::Absent, before));
    }

    /// Readers and changers at once: a version that was announced is never undercut by what a reader finds.
    #[test]
    fn no_interleaving_brings_an_old_fact_back() {
        let cache = serving();
        let store = AtomicU64::new(0);
        let announced = AtomicU64::new(0);
        let grant = |version: u64| Fact::Grant(Grant::of(&Facts::example(&version.to_string())));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 1..20_000 {
                    store.store(version, Ordering::SeqCst);
                    cache.bury(&token(1));
                    announced.store(version, Ordering::SeqCst);
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..40_000 {
                        let floor = announced.load(Ordering::SeqCst);
                        if let Some(Fact::Grant(found)) = cache.get(&digest(1)) {
                            assert!(found.display_name().parse::<u64>().expect("a number") >= floor);
                        } else {
                            let ticket = cache.ticket();
                            let read = store.load(Ordering::SeqCst);
                            std::thread::yield_now();
                            let _ = cache.admit(digest(1), &grant(read), ticket);
                        }
                    }
                });
            }
        });
    }
}
