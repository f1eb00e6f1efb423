//! Use counts: merged in memory, written in batches.
//!
//! A use is noted in the lane of its thread, in one of two places: the front has a place for each of a thousand tokens, where a token that is used
//! again and again is counted; a token whose place is wanted by another goes to the log. So a use costs neither a search nor memory that another core
//! writes to, whether one token is used or a million are. Full logs go to the backlog, which all lanes share.
//!
//! Invariant: what a clean stop flushes is exact; kill -9 loses at most what was marked since the last flush
//! (test `uses_are_counted_exactly_after_a_clean_stop`).
//! Invariant: what could not be written is kept and written later (test `uses_survive_a_failed_flush`).
//! Invariant: no use is lost or counted twice, whoever marks and flushes at the same time (test `threads_lose_no_use_while_uses_are_taken`).
//! Invariant: memory is bounded by the number of tokens, not of uses, however long nothing is written (test `memory_is_bounded_by_tokens`).

use std::{collections::VecDeque, net::IpAddr};

use parking_lot::Mutex;

use crate::{
    ambient::{self, LANES, Time},
    error::Result,
    store::{Store, UseDelta},
    token::TokenId,
};

/// Places in the front of a lane: few enough to stay in the core's own memory.
const FRONT: usize = 1_024;
/// Uses in the log of a lane.
const LOG_MAX: usize = 8_192;
/// Logs that wait to be merged: usually until the next flush, which no caller waits for.
const LOGS_MAX: usize = 64;
/// Parts of all tokens that are merged one at a time, so that a caller who has to do it is not kept for long.
const PARTS: usize = 64;

/// What one lane has noted. The front of a token is later than what the log has of it.
#[derive(Default)]
struct Tally {
    front: Vec<Option<UseDelta>>,
    log: Vec<UseDelta>,
}

impl Tally {
    fn note(&mut self, used: UseDelta) {
        match self.front.get_mut(used.token_id.shard(FRONT)) {
            Some(Some(known)) if known.token_id == used.token_id => add(known, &used),
            Some(Some(other)) => self.log.push(std::mem::replace(other, used)),
            Some(place) => *place = Some(used),
            // Most lanes of most machines are never used.
            None => {
                self.front.resize(FRONT, None);
                self.log.push(used);
            }
        }
    }

    /// The log, and the memory for another one of this length.
    fn take_log(&mut self) -> Vec<UseDelta> {
        let next = Vec::with_capacity(self.log.len());
        std::mem::replace(&mut self.log, next)
    }

    fn len(&self) -> usize {
        self.log.len() + self.front.iter().flatten().count()
    }
}

/// Lines of memory that no other lane writes to; processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Lane(Mutex<Tally>);

/// What all lanes have handed over, that of one lane from the oldest to the latest: of two uses in the same microsecond the one that was marked later is
/// the last, unless they are in two lanes; then it is either.
struct Backlog {
    /// What a flush could not write.
    unwritten: Vec<UseDelta>,
    parts: [Vec<UseDelta>; PARTS],
    /// Which part is merged next.
    turn: usize,
    logs: VecDeque<Vec<UseDelta>>,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { unwritten: Vec::new(), parts: [const { Vec::new() }; PARTS], turn: 0, logs: VecDeque::new() }
    }
}

impl Backlog {
    /// Takes over a log. If nothing is flushed, the oldest one is divided among the parts, one of which is merged.
    fn push(&mut self, log: Vec<UseDelta>) {
        self.logs.push_back(log);
        if self.logs.len() <= LOGS_MAX {
            return;
        }
        for used in self.logs.pop_front().into_iter().flatten() {
            if let Some(part) = self.parts.get_mut(used.token_id.shard(PARTS)) {
                part.push(used);
            }
        }
        self.turn = (self.turn + 1) % PARTS;
        if let Some(part) = self.parts.get_mut(self.turn) {
            merge(part);
        }
    }

    fn len(&self) -> usize {
        self.unwritten.len() + self.parts.iter().chain(&self.logs).map(Vec::len).sum::<usize>()
    }

    /// Everything, one row for each token, sorted by id: one order for everybody who writes these rows.
    fn into_rows(self) -> Vec<UseDelta> {
        let mut rows = self.unwritten;
        rows.extend(self.parts.into_iter().chain(self.logs).flatten());
        merge(&mut rows);
        rows
    }
}

/// Makes one row of those of each token, and sorts them by id. Rows of one token come in the order of their age.
fn merge(rows: &mut Vec<UseDelta>) {
    rows.sort_by_key(|row| row.token_id);
    rows.dedup_by(|later, known| {
        let is_same = later.token_id == known.token_id;
        if is_same {
            add(known, later);
        }
        is_same
    });
}

fn add(known: &mut UseDelta, later: &UseDelta) {
    known.count += later.count;
    if later.last_time >= known.last_time {
        known.last_time = later.last_time;
        known.last_ip = later.last_ip;
    }
}

/// Uses on their way to the store. What did not arrive, whatever the reason, goes back where it came from.
struct Taken<'a> {
    usage: &'a Usage,
    rows: Vec<UseDelta>,
    written: usize,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.rows.drain(..self.written);
        if !self.rows.is_empty() {
            // Only one flush is under way, and it took what was there.
            self.usage.backlog.lock().unwritten = std::mem::take(&mut self.rows);
        }
    }
}

/// Uses that the store does not know of yet.
#[derive(Default)]
pub struct Usage {
    lanes: [Lane; LANES],
    backlog: Mutex<Backlog>,
    flushing: tokio::sync::Mutex<()>,
}

impl Usage {
    /// Counts one use.
    pub fn mark(&self, token_id: TokenId, ip: Option<IpAddr>, now: Time) {
        let [first, ..] = &self.lanes;
        let mut tally = self.lanes.get(ambient::lane()).unwrap_or(first).0.lock();
        tally.note(UseDelta { token_id, count: 1, last_time: now, last_ip: ip });
        if tally.log.len() >= LOG_MAX {
            // Under the lock of the lane, so that logs of one lane arrive in their order.
            self.backlog.lock().push(tally.take_log());
        }
    }

    /// How many tokens have uses that are not written yet; those that are on their way to the store do not count. A token counts once for each place in
    /// memory where it waits, so this is an upper bound; it is 0 if and only if nothing is left.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.lanes.iter().map(|lane| lane.0.lock().len()).sum::<usize>() + self.backlog.lock().len()
    }

    /// Writes what was marked up to now.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: then it is kept for the next time.
    pub async fn flush(&self, store: &Store) -> Result<()> {
        let _alone = self.flushing.lock().await;
        let mut taken = self.take();
        while let Some((_, rest)) = taken.rows.split_at_checked(taken.written).filter(|(_, rest)| !rest.is_empty()) {
            let chunk = rest.get(..store.uses_max()).unwrap_or(rest);
            store.add_uses(chunk).await?;
            taken.written += chunk.len();
        }
        Ok(())
    }

    fn take(&self) -> Taken<'_> {
        for lane in &self.lanes {
            let mut tally = lane.0.lock();
            let log = tally.take_log();
            let front: Vec<UseDelta> = tally.front.iter_mut().filter_map(Option::take).collect();
            let mut backlog = self.backlog.lock();
            for uses in [log, front].into_iter().filter(|uses| !uses.is_empty()) {
                backlog.push(uses);
            }
        }
        let backlog = std::mem::take(&mut *self.backlog.lock());
        Taken { usage: self, rows: backlog.into_rows(), written: 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn ids(count: usize) -> Vec<TokenId> {
        (0..count).map(|_| TokenId::new(Time::from_micros(0)).expect("randomness")).collect()
    }

    fn time(micros: i64) -> Time {
        Time::from_micros(micros)
    }

    /// What is written when every flush succeeds.
    fn write(usage: &Usage) -> Vec<UseDelta> {
        let mut taken = usage.take();
        taken.written = taken.rows.len();
        taken.rows.clone()
    }

    #[test]
    fn rows_are_sorted_and_have_each_token_once() {
        let (usage, ids) = (Usage::default(), ids(20_000));
        assert_eq!(usage.backlog(), 0);
        for id in ids.iter().chain(&ids) {
            usage.mark(*id, None, time(1));
        }
        assert!(usage.backlog() >= ids.len());
        let rows = write(&usage);
        assert!(rows.is_sorted_by(|a, b| a.token_id < b.token_id) && rows.iter().all(|row| row.count == 2));
        assert_eq!((rows.len(), usage.backlog()), (ids.len(), 0));
        assert!(write(&usage).is_empty());
    }

    #[test]
    fn threads_lose_no_use_while_uses_are_taken() {
        const THREADS: usize = 6;
        const USES: usize = 50_000;
        let (usage, ids) = (Usage::default(), ids(30_000));
        let mut sums: BTreeMap<TokenId, (i64, Time)> = BTreeMap::new();
        let mut gather = |rows: Vec<UseDelta>| {
            for row in rows {
                let sum = sums.entry(row.token_id).or_insert((0, time(0)));
                *sum = (sum.0 + row.count, sum.1.max(row.last_time));
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (usage, ids) = (&usage, &ids);
                    // Every other use is of one hot token.
                    scope.spawn(move || {
                        for round in 0..USES {
                            let id = if round % 2 == 0 { ids[0] } else { ids[(round * 7 + thread) % ids.len()] };
                            usage.mark(id, None, time(i64::try_from(round).expect("small")));
                        }
                    })
                })
                .collect();
            for attempt in 0.. {
                // Of three flushes one writes all, one a part, and one nothing.
                let mut taken = usage.take();
                taken.written = taken.rows.len() * (attempt % 3) / 2;
                gather(taken.rows[..taken.written].to_vec());
                drop(taken);
                if threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                    break;
                }
            }
        });
        gather(write(&usage));
        assert_eq!(usage.backlog(), 0);
        let mut expected: BTreeMap<TokenId, (i64, Time)> = BTreeMap::new();
        for (round, thread) in (0..USES).flat_map(|round| (0..THREADS).map(move |thread| (round, thread))) {
            let id = if round % 2 == 0 { ids[0] } else { ids[(round * 7 + thread) % ids.len()] };
            let sum = expected.entry(id).or_insert((0, time(0)));
            *sum = (sum.0 + 1, time(i64::try_from(round).expect("small")));
        }
        assert!(sums == expected);
    }

    #[test]
    fn memory_is_bounded_by_tokens() {
        // Eight tokens for each place of the front: nearly every use puts another token into the log.
        let (usage, ids) = (Usage::default(), ids(FRONT * 8));
        // Logs that wait, what came to each part since it was merged, and one row for each token.
        let bound = (LOGS_MAX + PARTS + 1) * LOG_MAX + FRONT + ids.len();
        let rounds = 2 * bound / ids.len();
        for round in 0..rounds {
            for id in &ids {
                usage.mark(*id, None, time(i64::try_from(round).expect("small")));
            }
            assert!(usage.backlog() <= bound);
        }
        assert!(!usage.backlog.lock().parts.iter().all(Vec::is_empty));
        let rows = write(&usage);
        let last = time(i64::try_from(rounds - 1).expect("small"));
        assert_eq!(rows.len(), ids.len());
        assert!(rows.iter().all(|row| (row.count, row.last_time) == (i64::try_from(rounds).expect("small"), last)));
    }

    #[test]
    fn the_latest_use_is_kept_and_of_two_at_once_the_later_mark() {
        let (usage, ids) = (Usage::default(), ids(FRONT * 8));
        let address = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        // The other tokens push each use from the front into the log, and some logs into the backlog.
        let mark = |last, micros| {
            usage.mark(ids[0], address(last), time(micros));
            for id in &ids[1..] {
                usage.mark(*id, None, time(0));
            }
        };
        let row = |taken: &Taken<'_>| {
            let place = taken.rows.binary_search_by_key(&ids[0], |row| row.token_id).expect("a row");
            (taken.rows[place].count, taken.rows[place].last_time, taken.rows[place].last_ip)
        };
        mark(1, 5);
        mark(2, 7);
        mark(3, 7);
        mark(4, 6);
        let taken = usage.take();
        assert_eq!(row(&taken), (4, time(7), address(3)));
        // Nothing was written, and uses go on.
        mark(5, 7);
        drop(taken);
        for _ in 0..2 * LOGS_MAX {
            mark(6, 6);
        }
        assert_eq!(row(&usage.take()), (5 + 2 * 64, time(7), address(5)));
    }
}
