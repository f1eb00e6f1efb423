//! What the database, the replicas and the changes are at one instant of the model: small, and copied freely.

use std::hash::{Hash, Hasher};

/// The arrays have room for so many; a configuration may use fewer.
pub const REPLICAS: usize = 2;
pub const CHANGES: usize = 2;
pub const TOKENS: usize = 2;

/// No number, no age, no facts.
pub const NONE: u8 = u8::MAX;

/// The changes that something holds, one bit each: the facts of a token are the changes that have been made to it.
pub type Changes = u8;

pub fn bit(index: usize) -> Changes {
    1 << index
}

/// Ages stop at the greatest one that anything is compared with, so that time has no end and the states have one.
pub fn older(age: u8, most: u8) -> u8 {
    if age == NONE { NONE } else { most.min(age + 1) }
}

/// The row of an incarnation. Evicted, released and deleted rows are gone alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub there: bool,
    pub acked: u8,
    /// For how long the changers have watched the renewal number that the row has now, or `NONE` if nobody has seen it.
    pub watched: u8,
}

/// A row that is not there.
pub const GONE: Row = Row { there: false, acked: 0, watched: NONE };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Database {
    pub committed: Changes,
    /// The rows of the log with numbers up to this one are gone.
    pub pruned: u8,
    /// The epoch and the timeline in one: either is new after a restore that is known as one.
    pub epoch: u8,
    /// For how long a lease that was given before the last restore may still last.
    pub old_leases: u8,
    pub rows: [Row; REPLICAS],
    /// The rows of incarnations that were killed.
    pub ghosts: [Row; REPLICAS],
    /// Replicas that have not read since a restore that nobody marked.
    pub unread: u8,
}

/// A copy of the database that may come back: a backup, or a standby that lags behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backup {
    pub taken: bool,
    pub committed: Changes,
    pub rows: [Row; REPLICAS],
    /// Replicas whose rows have been neither renewed nor registered anew since.
    pub same: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not running.
    Down,
    /// Running, its cache empty, without a row.
    Starting,
    /// It has read the head, and its row is about to be committed.
    Registering,
    Up,
    /// It serves no more, and its row is still there.
    Stopping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    Silent,
    /// A poll is on its way to the database.
    Polling,
    /// The database has answered the poll; the replica has not taken the answer in.
    Polled,
    /// What was read has been applied; a renewal is on its way.
    Renewing,
    /// The database has recorded the renewal; the replica does not know it yet.
    Renewed,
}

/// What a replica and the database are saying to each other: poll, apply, renew, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub talk: Talk,
    /// Of `t0`, which was taken before the poll was sent.
    pub age: u8,
    /// What the poll has read.
    pub read: Changes,
    pub pruned: u8,
    pub epoch: u8,
}

pub const SILENT: Link = Link { talk: Talk::Silent, age: 0, read: 0, pruned: 0, epoch: 0 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flight {
    Grounded,
    /// Its statement is on its way.
    Sent,
    /// The store has answered.
    Read,
    /// It has left the list of flights, was found good, and is about to be inserted, under the lock of the cache.
    Admitted,
}

/// A read of one token, with those who have joined it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub flight: Flight,
    /// Since before its statement was sent.
    pub age: u8,
    /// The age of a tombstone that is newer than the flight, as long as it is kept. (One that is older says nothing about it.)
    pub tombstone: u8,
    pub facts: Changes,
}

pub const GROUNDED: Fill = Fill { flight: Flight::Grounded, age: 0, tombstone: NONE, facts: 0 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    pub phase: Phase,
    /// The number up to which it has applied the log.
    pub mine: u8,
    pub epoch: u8,
    /// How long its lease still lasts.
    pub lease: u8,
    /// Its renewal number is not that of its row: an attempt that it gave up was recorded all the same, or the row is a copy from before.
    pub behind: bool,
    /// A renewal that was given up and may still arrive: the number that it acknowledges.
    pub late: u8,
    pub link: Link,
    /// For each token the facts that are kept, or `NONE`.
    pub cache: [u8; TOKENS],
    pub fills: [Fill; TOKENS],
}

/// A process that has just started.
pub const STARTED: Replica = Replica {
    phase: Phase::Starting,
    mine: 0,
    epoch: 0,
    lease: 0,
    behind: false,
    late: NONE,
    link: SILENT,
    cache: [NONE; TOKENS],
    fills: [GROUNDED; TOKENS],
};

impl Replica {
    /// A change is applied: what is kept goes, and what is being read is too old.
    pub fn tombstone(&mut self, token: usize) {
        self.cache[token] = NONE;
        if matches!(self.fills[token].flight, Flight::Sent | Flight::Read) {
            self.fills[token].tombstone = 0;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Unmade,
    /// Its transaction holds the lock of the head.
    Begun,
    /// As `Begun`, but the changer has died.
    Orphaned,
    /// The changer stands at the barrier.
    Committed,
    /// Committed, and the changer died or had no more time: nobody was told that it is complete.
    Left,
    /// Somebody makes it again, finds it made, and stands at the barrier.
    Repeated,
    Returned,
    /// It went with a restore.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub stage: Stage,
    pub number: u8,
    /// Since its commit, on the changer's clock.
    pub since: u8,
    /// The changer's own cache has been told.
    pub told: bool,
    /// The rows that were there when it began.
    pub rows: u8,
}

pub const UNMADE: Change = Change { stage: Stage::Unmade, number: 0, since: 0, told: false, rows: 0 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub database: Database,
    pub backup: Backup,
    pub replicas: [Replica; REPLICAS],
    pub changes: [Change; CHANGES],
    /// How many may still happen.
    pub crashes: u8,
    pub restores: u8,
    /// Somebody who began after a change had returned got an answer without it from a flight.
    pub broken: bool,
}

impl State {
    /// The number of the last change in `changes`.
    pub fn head_of(&self, changes: Changes) -> u8 {
        let numbers = self.changes.iter().enumerate().map(|(index, change)| if changes & bit(index) == 0 { 0 } else { change.number });
        numbers.max().unwrap_or(0)
    }

    pub fn head(&self) -> u8 {
        self.head_of(self.database.committed)
    }

    /// The changes that were told to be complete.
    pub fn returned(&self) -> Changes {
        let returned = self.changes.iter().enumerate().filter(|(_, change)| change.stage == Stage::Returned);
        returned.fold(0, |changes, (index, _)| changes | bit(index))
    }
}

/// All of it in one piece of bytes: hashing is most of the work of a check.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut words = [0_u64; 2 + 4 * REPLICAS + CHANGES];
        let (database, backup) = (&self.database, &self.backup);
        words[0] = u64::from_le_bytes([
            database.committed,
            database.pruned,
            database.epoch,
            database.old_leases,
            database.unread,
            self.crashes,
            self.restores,
            u8::from(self.broken),
        ]);
        words[1] = u64::from_le_bytes([u8::from(backup.taken), backup.committed, backup.same, 0, 0, 0, 0, 0]);
        for index in 0..REPLICAS {
            let (replica, row, ghost, old) = (&self.replicas[index], &database.rows[index], &database.ghosts[index], &backup.rows[index]);
            let link = &replica.link;
            let at = 2 + 4 * index;
            words[at] = u64::from_le_bytes([
                replica.phase as u8,
                replica.mine,
                replica.epoch,
                replica.lease,
                u8::from(replica.behind),
                replica.late,
                replica.cache[0],
                replica.cache[1],
            ]);
            words[at + 1] = u64::from_le_bytes([
                link.talk as u8,
                link.age,
                link.read,
                link.pruned,
                link.epoch,
                u8::from(row.there),
                row.acked,
                row.watched,
            ]);
            words[at + 2] =
                u64::from_le_bytes([u8::from(ghost.there), ghost.acked, ghost.watched, u8::from(old.there), old.acked, 0, 0, 0]);
            let [one, other] = &replica.fills;
            words[at + 3] = u64::from_le_bytes([
                one.flight as u8,
                one.age,
                one.tombstone,
                one.facts,
                other.flight as u8,
                other.age,
                other.tombstone,
                other.facts,
            ]);
        }
        for (word, change) in words[2 + 4 * REPLICAS..].iter_mut().zip(&self.changes) {
            *word = u64::from_le_bytes([change.stage as u8, change.number, change.since, u8::from(change.told), change.rows, 0, 0, 0]);
        }
        words.hash(hasher);
    }
}
