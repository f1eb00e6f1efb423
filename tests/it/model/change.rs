//! What a changer does, from the lock of the head to the barrier; who evicts a silent row; what is pruned and restored.

use super::{
    Fence, Guard, Step, Steps,
    state::{Backup, Database, GONE, NONE, Phase, REPLICAS, Row, Stage, State, bit, older},
};

/// How a row lets a change pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    Gone,
    Acknowledged,
    WaitedOut,
    Blocked,
}

impl Fence {
    /// Where a change is made, if at a replica: elsewhere the changer has no cache that matters.
    pub fn host(&self, state: &State, index: usize) -> Option<usize> {
        if state.changes[index].stage == Stage::Repeated { self.setup.again } else { self.setup.hosts[index] }
    }

    /// Time passes for all, but for a replica whose clocks stand still.
    pub fn tick(&self, state: &State, frozen: Option<usize>) -> State {
        let mut next = *state;
        let most = self.setup.longest_lease();
        for change in &mut next.changes {
            if matches!(change.stage, Stage::Committed | Stage::Repeated) {
                change.since = older(change.since, most);
            }
        }
        for at in 0..self.setup.replicas {
            if frozen != Some(at) {
                self.age_replica(&mut next.replicas[at], at);
            }
            let lease = self.setup.leases[at];
            for row in [&mut next.database.rows[at], &mut next.database.ghosts[at]] {
                row.watched = older(row.watched, lease);
            }
        }
        next.database.old_leases = next.database.old_leases.saturating_sub(1);
        next
    }

    pub fn change_steps(&self, state: &State, index: usize, steps: &mut Steps) {
        let host = self.host(state, index);
        match state.changes[index].stage {
            Stage::Unmade => self.begin(state, index, steps),
            Stage::Begun => steps.add(Step::Commit(index), state, |next| commit(next, index, Stage::Committed)),
            Stage::Orphaned => {
                steps.add(Step::Commit(index), state, |next| commit(next, index, Stage::Left));
                steps.add(Step::RollBack(index), state, |next| next.changes[index].stage = Stage::Unmade);
            }
            Stage::Committed | Stage::Repeated => {
                self.stand_at_the_barrier(state, index, host, steps);
                if self.setup.leaves && (host.is_none() || state.changes[index].told) {
                    steps.add(Step::AnswerPending(index), state, |next| next.changes[index].stage = Stage::Left);
                }
            }
            Stage::Left => self.repeat(state, index, steps),
            Stage::Returned | Stage::Lost => {}
        }
    }

    /// The lock of the head makes the order of numbers the order of commits.
    fn begin(&self, state: &State, index: usize, steps: &mut Steps) {
        let locked = state.changes.iter().any(|change| matches!(change.stage, Stage::Begun | Stage::Orphaned));
        let able = self.setup.hosts[index].is_none_or(|at| state.replicas[at].phase == Phase::Up);
        let sequence = self.lacks(Guard::NumbersInOrder);
        if !able || state.database.unread != 0 || (locked && !sequence) {
            return;
        }
        let mut begun = *state;
        let change = &mut begun.changes[index];
        change.stage = Stage::Begun;
        change.number = 1 + if sequence { state.changes.iter().map(|change| change.number).max().unwrap_or(0) } else { state.head() };
        if self.lacks(Guard::RowsAfterCommit) {
            change.rows = (0..REPLICAS).filter(|at| state.database.rows[*at].there).fold(0, |rows, at| rows | bit(at));
        }
        if self.setup.slow_commits {
            steps.list.push((Step::Begin(index), begun));
        } else {
            steps.add(Step::Commit(index), &begun, |next| commit(next, index, Stage::Committed));
        }
    }

    fn stand_at_the_barrier(&self, state: &State, index: usize, host: Option<usize>, steps: &mut Steps) {
        let change = &state.changes[index];
        let told = change.told || host.is_none() || self.lacks(Guard::OwnCacheTold);
        if let Some(at) = host
            && !change.told
            && !self.is_locked(&state.replicas[at])
        {
            steps.add(Step::TellOwnCache(index), state, |next| {
                next.changes[index].told = true;
                next.replicas[at].tombstone(self.setup.subjects[index]);
            });
        }
        if told && (self.lacks(Guard::Barrier) || self.is_complete(state, index)) {
            steps.add(Step::Return(index), state, |next| finish(next, index));
        }
    }

    /// A change that was left is made again: it is found made, and the barrier is what remains to be done. (Here it is about the number of the change.
    /// Who does not know that takes the head, which is at least as much.)
    fn repeat(&self, state: &State, index: usize, steps: &mut Steps) {
        if self.setup.again.is_some_and(|at| state.replicas[at].phase != Phase::Up) {
            return;
        }
        steps.add(Step::Repeat(index), state, |next| {
            let change = &mut next.changes[index];
            (change.stage, change.since) = (Stage::Repeated, 0);
            change.told = self.lacks(Guard::RepeatTellsOwnCache);
            if self.lacks(Guard::BarrierRepeated) {
                finish(next, index);
            }
        });
    }

    /// Whether every row lets the change pass.
    pub fn is_complete(&self, state: &State, index: usize) -> bool {
        let waits = state.database.old_leases > 0 && !self.lacks(Guard::OldLeasesWaitedOut);
        !waits && self.passages(state, index).into_iter().flatten().all(|passage| passage != Passage::Blocked)
    }

    /// How each row stands to the change: of each replica its own, and that of an incarnation which was killed.
    pub fn passages(&self, state: &State, index: usize) -> [[Passage; 2]; REPLICAS] {
        let mut passages = [[Passage::Gone; 2]; REPLICAS];
        let (change, host) = (&state.changes[index], self.host(state, index));
        for (at, passage) in passages.iter_mut().enumerate().take(self.setup.replicas) {
            let overlooked = self.lacks(Guard::RowsAfterCommit) && change.rows & bit(at) == 0;
            if host != Some(at) && !overlooked {
                passage[0] = self.passage(state.database.rows[at], change.number, change.since, at);
            }
            passage[1] = self.passage(state.database.ghosts[at], change.number, change.since, at);
        }
        passages
    }

    fn passage(&self, row: Row, number: u8, since: u8, at: usize) -> Passage {
        let lease = self.lease_of_row(at);
        let timed = !self.setup.acked_only || self.lacks(Guard::SilenceIsNoAnswer);
        let dead = self.lacks(Guard::EvictedBeforeTakenForDead) && row.watched != NONE && row.watched >= lease;
        match row {
            Row { there: false, .. } => Passage::Gone,
            Row { acked, .. } if acked >= number => Passage::Acknowledged,
            _ if dead || (timed && since >= lease) => Passage::WaitedOut,
            _ => Passage::Blocked,
        }
    }

    /// Changers watch the rows, and evict those that do not move while a change waits.
    pub fn row_steps(&self, state: &State, at: usize, steps: &mut Steps) {
        for dead in [false, true].into_iter().filter(|dead| row_of(&state.database, at, *dead).there) {
            if self.setup.acked_only {
                // It is the administrator who says that the process is dead.
                if dead || self.lacks(Guard::ReleasedOnlyIfDead) {
                    steps.add(Step::Release(at), state, |next| *row_mut(&mut next.database, at, dead) = GONE);
                }
            } else if self.setup.evicts {
                self.watch(state, at, dead, steps);
            }
        }
    }

    fn watch(&self, state: &State, at: usize, dead: bool, steps: &mut Steps) {
        let row = row_of(&state.database, at, dead);
        let waiting = state.changes.iter().any(|change| matches!(change.stage, Stage::Committed | Stage::Repeated));
        if row.watched == NONE {
            steps.add(Step::Watch(at), state, |next| row_mut(&mut next.database, at, dead).watched = 0);
        } else if waiting && (row.watched >= self.lease_of_row(at) || self.lacks(Guard::EvictionPatient)) {
            // By compare-and-set on the renewal number: a renewal in between would have begun another watch.
            steps.add(Step::Evict(at), state, |next| *row_mut(&mut next.database, at, dead) = GONE);
        }
    }

    /// What happens to the database as a whole.
    pub fn database_steps(&self, state: &State, steps: &mut Steps) {
        let database = &state.database;
        if self.setup.prunes {
            for number in database.pruned + 1..=state.head() {
                steps.add(Step::Prune(number), state, |next| next.database.pruned = number);
            }
        }
        if state.restores > 0 {
            if !state.backup.taken {
                let (committed, rows) = (database.committed, database.rows);
                let backup = Backup { taken: true, committed, rows: rows.map(unwatched), same: 0b11 };
                steps.add(Step::BackUp, state, |next| next.backup = backup);
            } else if state.database.unread == 0 {
                steps.add(Step::Restore, state, |next| self.restore(next));
            }
        }
    }

    /// The backup, or a standby that lags behind, takes the place of the database. What was under way there is gone.
    fn restore(&self, next: &mut State) {
        // Whoever restores without a mark has to see to it that the database is away for longer than any lease lasts.
        if !self.setup.marked && !self.lacks(Guard::UnmarkedOnlyAfterALease) {
            for _ in 0..self.setup.longest_lease() {
                *next = self.tick(next, None);
            }
        }
        let backup = next.backup;
        next.restores -= 1;
        next.database.committed = backup.committed;
        if self.setup.marked {
            next.database.epoch += 1;
            next.database.old_leases = self.setup.longest_lease();
        }
        for at in 0..self.setup.replicas {
            let (replica, row) = (&mut next.replicas[at], &mut next.database.rows[at]);
            let same = backup.same & bit(at) != 0;
            let watched = if same { row.watched } else { NONE };
            *row = Row { watched, ..backup.rows[at] };
            replica.behind |= !same;
            replica.late = NONE;
            if replica.phase == Phase::Registering {
                replica.phase = Phase::Starting;
            }
            if replica.phase == Phase::Up && !self.setup.marked && !self.lacks(Guard::UnmarkedOnlyWhileNothingChanges) {
                next.database.unread |= bit(at);
            }
        }
        for (index, change) in next.changes.iter_mut().enumerate() {
            let kept = backup.committed & bit(index) != 0;
            change.stage = match change.stage {
                Stage::Begun | Stage::Orphaned => Stage::Unmade,
                Stage::Committed | Stage::Left | Stage::Repeated if kept => Stage::Left,
                Stage::Committed | Stage::Left | Stage::Repeated | Stage::Returned if !kept => Stage::Lost,
                other => other,
            };
        }
    }

    /// The lease that a changer reckons a row to have.
    fn lease_of_row(&self, at: usize) -> u8 {
        self.setup.leases[if self.lacks(Guard::EachRowsOwnLease) { 0 } else { at }]
    }
}

fn row_of(database: &Database, at: usize, dead: bool) -> &Row {
    if dead { &database.ghosts[at] } else { &database.rows[at] }
}

fn row_mut(database: &mut Database, at: usize, dead: bool) -> &mut Row {
    if dead { &mut database.ghosts[at] } else { &mut database.rows[at] }
}

fn unwatched(row: Row) -> Row {
    Row { watched: NONE, ..row }
}

fn commit(next: &mut State, index: usize, stage: Stage) {
    next.database.committed |= bit(index);
    (next.changes[index].stage, next.changes[index].since) = (stage, 0);
}

/// What a change had besides its number is no longer of interest.
fn finish(next: &mut State, index: usize) {
    let change = &mut next.changes[index];
    (change.stage, change.since, change.told, change.rows) = (Stage::Returned, 0, false, 0);
}
