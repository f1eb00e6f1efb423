//! Values by digest in a fixed amount of memory: found without a lock, a reference count or an allocation.
//!
//! Each shard is an index and a ring. A slot of the index is one word: a tag, and the position at which the ring holds the record. Records are appended;
//! what the ring comes round to makes way, and is appended once more if it was used since. A reader takes no lock: it copies a record out, and takes it
//! for what it is only if the ring had not come round to it by then, which the shard's `tail` tells. That is a seqlock whose sequence number is the
//! position (Boehm, "Can seqlocks get along with programming language memory models?", 2012); all that readers and writers share is atomic.
//!
//! Invariant: what is found is what was inserted under this digest, whole (tests `readers_never_see_a_torn_record`,
//! `in_no_order_is_a_record_found_that_was_overwritten_meanwhile`).
//! Invariant: after [`Table::remove`] has returned nobody finds what was there before (test `no_interleaving_brings_an_old_fact_back`).
//! Invariant: memory is bounded, however much is inserted and of whatever size (test `the_table_is_bounded_in_bytes`).

use std::{hint::black_box, sync::OnceLock};

use smallvec::SmallVec;

use super::sync::{AtomicU64, AtomicUsize, Mutex, Ordering, fence};
use crate::token::Digest;

const SHARDS: usize = 16;
const SLOTS: usize = 8;
const WORD_BYTES: usize = 8;
/// Bytes of memory for each slot of the index: about half of a record, so that few buckets overflow.
const BYTES_PER_SLOT: usize = 96;
/// Below this it would be too small for a few of the largest records.
const BYTES_MIN: usize = 4 << 20;
/// 64 KiB: more than the facts of any token take.
const SEGMENT_WORDS: usize = 8_192;
/// Room for what is inserted, for what is appended once more, and for what is left over at the end of a segment.
const SEGMENTS_MIN: usize = 4;
/// Words that one insertion appends once more, if it is not a single record.
const KEPT_WORDS_MAX: usize = 1_024;
/// Lengths, generation, marks, digest.
const HEADER_WORDS: usize = 6;
/// In the first word of a record: how many words it takes. Above it: how many bytes its value has.
const LENGTH: u64 = 0xffff;
const LENGTH_BITS: u32 = 16;
/// The first word of what is left over at the end of a segment.
const FILLER: u64 = 1 << 63;

const POSITION: u64 = (1 << 48) - 1;
/// The record was found since it was appended.
const USED: u64 = 1 << 63;

/// A value: without an allocation, unless it is unusually large.
pub(super) type Value = SmallVec<[u8; 320]>;

/// What is kept with a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    pub(super) generation: u64,
    pub(super) marks: u64,
}

/// Where a record may be.
#[derive(Clone, Copy)]
pub(super) struct Place {
    slot: u64,
    bucket: usize,
    index: usize,
}

/// As long as a line of the processor's cache.
#[repr(align(64))]
#[derive(Default)]
struct Bucket([AtomicU64; SLOTS]);

type Segment = Box<[AtomicU64]>;

#[repr(align(128))]
struct Shard {
    buckets: Box<[Bucket]>,
    segments: Box<[OnceLock<Segment>]>,
    /// What is before this position is overwritten, or may be at any time.
    tail: AtomicU64,
    records: AtomicUsize,
    /// Where the next record goes; held by whoever changes the shard. Positions only grow: 64 KiB a second would take a thousand years to use them up.
    head: Mutex<u64>,
}

pub(super) struct Table {
    shards: Box<[Shard]>,
}

impl Table {
    /// One that takes about this many bytes when it is full, at least 4 MiB: a twelfth for its index at once, the others as it fills.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { shards: std::iter::repeat_with(|| Shard::new(bytes_max.max(BYTES_MIN) / SHARDS)).take(SHARDS).collect() }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.records.load(Ordering::Relaxed)).sum()
    }

    /// Bytes of memory taken so far.
    pub(super) fn bytes(&self) -> usize {
        self.shards.iter().map(Shard::bytes).sum()
    }

    /// Copies what is kept under a digest into `value`; its stamp.
    pub(super) fn get(&self, digest: &Digest, value: &mut Value) -> Option<Stamp> {
        let key = Key::of(digest);
        let shard = self.shard(key)?;
        let mut place = shard.locate(key, 0)?;
        loop {
            if let Some(stamp) = shard.read(key, place, value) {
                return Some(stamp);
            }
            // Another digest with the same tag, or one that has just made way.
            place = shard.locate(key, place.index + 1)?;
        }
    }

    /// Where a digest is likely to be. Asked of many digests before the first of them is looked at, it makes the processor wait for all of them at once.
    pub(super) fn locate(&self, digest: &Digest) -> Option<Place> {
        let key = Key::of(digest);
        self.shard(key)?.locate(key, 0)
    }

    /// Brings a record near before [`Table::get`] reads it.
    pub(super) fn touch(&self, digest: &Digest, place: Place) {
        let Some(words) = self.shard(Key::of(digest)).and_then(|shard| shard.words(place.slot & POSITION)) else { return };
        for line in words.chunks(SLOTS).take(4) {
            black_box(line.first().map(|word| word.load(Ordering::Relaxed)));
        }
    }

    /// What is there already makes way. What is too large for the table is not kept.
    pub(super) fn insert(&self, digest: &Digest, stamp: Stamp, value: &[u8]) {
        let key = Key::of(digest);
        let words = HEADER_WORDS + value.len().div_ceil(WORD_BYTES);
        let Some(shard) = self.shard(key) else { return };
        let mut head = shard.head.lock();
        shard.forget(key);
        if words > SEGMENT_WORDS {
            return;
        }
        for (key, record) in shard.make_way(*head, words) {
            shard.append(&mut head, key, record.len(), record.into_iter());
        }
        let lengths = words as u64 | (value.len() as u64) << LENGTH_BITS;
        let header = [lengths, stamp.generation, stamp.marks, key.0[0], key.0[1], key.0[2]];
        shard.append(&mut head, key, words, header.into_iter().chain(value.chunks(WORD_BYTES).map(word)));
    }

    pub(super) fn remove(&self, digest: &Digest) {
        let key = Key::of(digest);
        if let Some(shard) = self.shard(key) {
            let _alone = shard.head.lock();
            shard.forget(key);
        }
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let _alone = shard.head.lock();
            for slot in shard.buckets.iter().flat_map(|bucket| &bucket.0) {
                slot.store(0, Ordering::SeqCst);
            }
            shard.records.store(0, Ordering::Relaxed);
        }
    }

    fn shard(&self, key: Key) -> Option<&Shard> {
        self.shards.get(key.0[2].to_le_bytes().map(usize::from)[7] % SHARDS)
    }
}

/// Up to eight bytes as a word.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// A digest as words: each by itself as random as a keyed hash is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key([u64; 3]);

impl Key {
    fn of(digest: &Digest) -> Self {
        let mut words = [0; 3];
        for (word, bytes) in words.iter_mut().zip(digest.as_bytes().chunks_exact(WORD_BYTES)) {
            *word = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        Self(words)
    }

    fn is_tagged(self, slot: u64) -> bool {
        slot != 0 && slot & !(POSITION | USED) == self.tag()
    }

    fn tag(self) -> u64 {
        self.0[1] & !(POSITION | USED)
    }

    /// Which of `count` buckets it belongs into.
    fn bucket(self, count: usize) -> usize {
        usize::try_from((u128::from(self.0[0]) * count as u128) >> 64).unwrap_or(0)
    }
}

impl Shard {
    fn new(bytes_max: usize) -> Self {
        let buckets = bytes_max / BYTES_PER_SLOT / SLOTS;
        let segments = (bytes_max.saturating_sub(buckets * size_of::<Bucket>()) / (SEGMENT_WORDS * WORD_BYTES)).max(SEGMENTS_MIN);
        Self {
            buckets: std::iter::repeat_with(Bucket::default).take(buckets).collect(),
            segments: std::iter::repeat_with(OnceLock::new).take(segments).collect(),
            // No position is 0, so that no slot in use is.
            tail: AtomicU64::new(1),
            records: AtomicUsize::new(0),
            head: Mutex::new(1),
        }
    }

    fn bytes(&self) -> usize {
        let taken = self.segments.iter().filter(|segment| segment.get().is_some()).count();
        self.buckets.len() * size_of::<Bucket>() + taken * SEGMENT_WORDS * WORD_BYTES
    }

    fn capacity(&self) -> u64 {
        (self.segments.len() * SEGMENT_WORDS) as u64
    }

    /// The segment of a position, and the place in it.
    fn segment(&self, position: u64) -> Option<(&OnceLock<Segment>, usize)> {
        let at = usize::try_from(position % self.capacity()).ok()?;
        Some((self.segments.get(at / SEGMENT_WORDS)?, at % SEGMENT_WORDS))
    }

    /// From a position to the end of its segment.
    fn words(&self, position: u64) -> Option<&[AtomicU64]> {
        let (segment, at) = self.segment(position)?;
        segment.get()?.get(at..)
    }

    fn bucket(&self, key: Key) -> (usize, &[AtomicU64]) {
        let index = key.bucket(self.buckets.len());
        (index, self.buckets.get(index).map_or(&[], |bucket| &bucket.0))
    }

    /// The first slot from `index` on that has this key's tag.
    fn locate(&self, key: Key, index: usize) -> Option<Place> {
        let (bucket, slots) = self.bucket(key);
        let slots = slots.iter().enumerate().skip(index);
        let mut tagged = slots.map(|(index, slot)| (index, slot.load(Ordering::Acquire)));
        tagged.find(|(_, slot)| key.is_tagged(*slot)).map(|(index, slot)| Place { slot, bucket, index })
    }

    fn read(&self, key: Key, place: Place, value: &mut Value) -> Option<Stamp> {
        let position = place.slot & POSITION;
        let words = self.words(position)?;
        let (header, _) = words.split_first_chunk::<HEADER_WORDS>()?;
        let [lengths, generation, marks, first, second, third] = header.each_ref().map(|word| word.load(Ordering::Relaxed));
        if Key([first, second, third]) != key {
            return None;
        }
        let record = words.get(HEADER_WORDS..usize::try_from(lengths & LENGTH).ok()?)?;
        value.clear();
        value.resize(record.len() * WORD_BYTES, 0);
        for (bytes, word) in value.chunks_exact_mut(WORD_BYTES).zip(record) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        value.truncate(usize::try_from(lengths >> LENGTH_BITS).ok()?);
        // Whoever overwrote any of these words had moved the tail past them before.
        fence(Ordering::Acquire);
        if position < self.tail.load(Ordering::Relaxed) {
            return None;
        }
        self.note_use(place);
        Some(Stamp { generation, marks })
    }

    fn note_use(&self, place: Place) {
        let slot = self.buckets.get(place.bucket).and_then(|bucket| bucket.0.get(place.index));
        if let Some(slot) = slot.filter(|_| place.slot & USED == 0) {
            // If it fails, another reader has noted it, or the record has made way.
            let _noted = slot.compare_exchange(place.slot, place.slot | USED, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    // What follows is for the one who holds the lock.

    /// The slot that leads to this key's record.
    fn slot_of(&self, key: Key) -> Option<&AtomicU64> {
        let tail = self.tail.load(Ordering::Relaxed);
        self.bucket(key).1.iter().find(|slot| {
            let slot = slot.load(Ordering::Relaxed);
            key.is_tagged(slot) && slot & POSITION >= tail && self.record_at(slot & POSITION).is_some_and(|(found, _)| found == key)
        })
    }

    fn record_at(&self, position: u64) -> Option<(Key, &[AtomicU64])> {
        let words = self.words(position)?;
        let (header, _) = words.split_first_chunk::<HEADER_WORDS>()?;
        let [lengths, _, _, first, second, third] = header.each_ref().map(|word| word.load(Ordering::Relaxed));
        Some((Key([first, second, third]), words.get(..usize::try_from(lengths & LENGTH).ok()?)?))
    }

    fn forget(&self, key: Key) {
        if let Some(slot) = self.slot_of(key) {
            slot.store(0, Ordering::SeqCst);
            self.records.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Moves the tail until there is room for a record of this many words, and for those that were used since they were appended, which it returns.
    fn make_way(&self, head: u64, words: usize) -> Vec<(Key, Vec<u64>)> {
        let (mut kept, mut kept_words) = (Vec::new(), 0);
        loop {
            let tail = self.tail.load(Ordering::Relaxed);
            // Twice, since as much may be left over at the end of a segment.
            if head - tail + 2 * (words + kept_words) as u64 <= self.capacity() {
                // Nothing is overwritten before readers can see that it may be, whoever moved the tail.
                fence(Ordering::Release);
                return kept;
            }
            let first = self.words(tail).and_then(<[_]>::first).map_or(FILLER, |word| word.load(Ordering::Relaxed));
            if first & FILLER == 0
                && let Some((key, record)) = self.record_at(tail)
                && let Some(slot) = self.slot_of(key).filter(|slot| slot.load(Ordering::Relaxed) & POSITION == tail)
            {
                // However large the first of them is.
                if slot.load(Ordering::Relaxed) & USED != 0 && (kept_words == 0 || kept_words + record.len() <= KEPT_WORDS_MAX) {
                    kept_words += record.len();
                    kept.push((key, record.iter().map(|word| word.load(Ordering::Relaxed)).collect()));
                }
                slot.store(0, Ordering::Relaxed);
                self.records.fetch_sub(1, Ordering::Relaxed);
            }
            self.tail.store(tail + (first & LENGTH).max(1), Ordering::Relaxed);
        }
    }

    fn append(&self, head: &mut u64, key: Key, words: usize, record: impl Iterator<Item = u64>) {
        let left = SEGMENT_WORDS as u64 - *head % SEGMENT_WORDS as u64;
        if left < words as u64 {
            self.write(*head, std::iter::once(FILLER | left));
            *head += left;
        }
        self.write(*head, record);
        let tail = self.tail.load(Ordering::Relaxed);
        let slots = self.bucket(key).1;
        // An empty slot; or else that of the oldest record that was not used, and only then of one that was.
        let Some(slot) = slots.iter().min_by_key(|slot| slot.load(Ordering::Relaxed) & (USED | POSITION)) else { return };
        if slot.load(Ordering::Relaxed) & POSITION < tail {
            self.records.fetch_add(1, Ordering::Relaxed);
        }
        slot.store(key.tag() | *head & POSITION, Ordering::Release);
        *head += words as u64;
    }

    fn write(&self, position: u64, record: impl Iterator<Item = u64>) {
        let Some((segment, at)) = self.segment(position) else { return };
        let segment = segment.get_or_init(|| std::iter::repeat_with(AtomicU64::default).take(SEGMENT_WORDS).collect());
        for (place, word) in segment.iter().skip(at).zip(record) {
            place.store(word, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ambient;

    fn digest(number: u64) -> Digest {
        let hash = blake3::hash(&number.to_le_bytes());
        Digest::from_slice(hash.as_bytes().split_at(24).0).expect("24 bytes")
    }

    /// A value that says which digest it belongs to, in every byte.
    fn value(number: u64, version: u64) -> Vec<u8> {
        let length = usize::try_from(8 + version * 7 % 900).expect("small");
        (0..length).map(|at| number.to_le_bytes()[at % 8].wrapping_add(version.to_le_bytes()[0])).collect()
    }

    const STAMP: Stamp = Stamp { generation: 7, marks: 3 };

    fn get(table: &Table, digest: &Digest) -> Option<(Stamp, Value)> {
        let mut value = Value::new();
        table.get(digest, &mut value).map(|stamp| (stamp, value))
    }

    #[test]
    fn what_was_inserted_is_found_until_it_is_removed() {
        let table = Table::new(64 << 20);
        for number in 0..5_000 {
            table.insert(&digest(number), STAMP, &value(number, number));
        }
        assert_eq!(table.len(), 5_000);
        for number in 0..5_000 {
            let (stamp, found) = get(&table, &digest(number)).expect("there");
            assert_eq!((stamp, found.as_slice()), (STAMP, value(number, number).as_slice()), "{number}");
        }
        table.insert(&digest(1), Stamp { generation: 8, marks: 0 }, b"");
        assert_eq!(get(&table, &digest(1)), Some((Stamp { generation: 8, marks: 0 }, Value::new())));
        assert_eq!(table.len(), 5_000, "it made way for another");
        table.remove(&digest(1));
        table.remove(&digest(1));
        assert!(get(&table, &digest(1)).is_none() && get(&table, &digest(5_000)).is_none());
        assert_eq!(table.len(), 4_999);
        table.clear();
        assert!(table.len() == 0 && get(&table, &digest(2)).is_none());
    }

    #[test]
    fn the_table_is_bounded_in_bytes() {
        const BYTES_MAX: usize = 8 << 20;
        let table = Table::new(BYTES_MAX);
        for number in 0..200_000 {
            table.insert(&digest(number), STAMP, &value(number, number));
        }
        assert!(table.bytes() <= BYTES_MAX && table.len() > 10_000, "{} bytes, {} records", table.bytes(), table.len());
        let found = (0..200_000).filter(|number| get(&table, &digest(*number)).is_some()).count();
        assert_eq!(found, table.len(), "each is counted once");
        let large = vec![1; SEGMENT_WORDS * WORD_BYTES - HEADER_WORDS * WORD_BYTES];
        for number in 0..1_000 {
            table.insert(&digest(number), STAMP, &large);
            assert_eq!(get(&table, &digest(number)).expect("there").1.as_slice(), large);
        }
        table.insert(&digest(1), STAMP, &[large, vec![1]].concat());
        assert!(get(&table, &digest(1)).is_none(), "too large for a segment");
        assert!(table.bytes() <= BYTES_MAX);
    }

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let table = Table::new(0);
        let used = |number: u64| number.is_multiple_of(100);
        for number in 0..300_000 {
            table.insert(&digest(number), STAMP, &value(number, 10));
            for earlier in (0..number).step_by(100).take(if used(number) { 50 } else { 0 }) {
                get(&table, &digest(earlier));
            }
        }
        let outlived = (0..5_000).filter(|number| used(*number) && get(&table, &digest(*number)).is_some()).count();
        let unused = (0..5_000).filter(|number| !used(*number) && get(&table, &digest(*number)).is_some()).count();
        assert!(outlived >= 45 && unused == 0, "{outlived} of 50 that are used, {unused} of 4950 that are not");
    }

    #[test]
    fn a_shared_tag_hides_nobody() {
        let table = Table::new(0);
        // Same shard, same bucket, same tag.
        let twin = |byte: u8| {
            let mut bytes = [7; 24];
            bytes[16] = byte;
            Digest::from_slice(&bytes).expect("24 bytes")
        };
        for byte in 0..8 {
            table.insert(&twin(byte), STAMP, &[byte]);
        }
        for byte in 0..8 {
            assert_eq!(get(&table, &twin(byte)).expect("there").1.as_slice(), [byte]);
        }
        table.insert(&twin(8), STAMP, &[8]);
        assert!(get(&table, &twin(0)).is_none() && get(&table, &twin(8)).is_some(), "a full bucket loses its oldest");
    }

    /// Two writers let the smallest table run round and round while two readers look.
    #[test]
    fn readers_never_see_a_torn_record() {
        const DIGESTS: u64 = 400;
        let table = Table::new(0);
        let digests: Vec<Digest> = (0..DIGESTS).map(digest).collect();
        let digests = &digests;
        let pick = || u64::from_le_bytes(ambient::random::<8>().expect("randomness"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = |seed: u64| {
                let table = &table;
                move || {
                    for round in 0..60_000_u64 {
                        let number = (round.wrapping_mul(seed)) % DIGESTS;
                        table.insert(&digests[usize::try_from(number).expect("small")], STAMP, &value(number, round % 256));
                    }
                }
            };
            let reader = || {
                let mut found = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    let number = pick() % DIGESTS;
                    let Some((stamp, read)) = get(&table, &digests[usize::try_from(number).expect("small")]) else { continue };
                    let version = u64::from(read[0].wrapping_sub(number.to_le_bytes()[0]));
                    assert_eq!((stamp, read.as_slice()), (STAMP, value(number, version).as_slice()), "{number}");
                    found += 1;
                }
                found
            };
            let writers = [7_919, 104_729].map(|seed| scope.spawn(writer(seed)));
            let readers = [scope.spawn(reader), scope.spawn(reader)];
            for writer in writers {
                writer.join().expect("it writes");
            }
            done.store(true, Ordering::Relaxed);
            assert!(readers.map(|reader| reader.join().expect("it reads")).into_iter().all(|found| found > 0));
        });
    }
}
