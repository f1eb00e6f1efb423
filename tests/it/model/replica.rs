//! What a replica does: it registers, polls, applies, renews, and fills its cache; it is killed, stopped and started.

use super::{
    Fence, Guard, Step, Steps,
    state::{Flight, GONE, GROUNDED, Link, NONE, Phase, Replica, Row, SILENT, STARTED, Stage, State, Talk, bit, older},
};

impl Fence {
    pub fn replica_steps(&self, state: &State, at: usize, steps: &mut Steps) {
        self.life_steps(state, at, steps);
        self.link_steps(state, at, steps);
        let tokens = if at < self.setup.keepers { self.setup.tokens } else { 0 };
        for token in 0..tokens {
            self.fill_steps(state, at, token, steps);
        }
    }

    /// Time passes for a replica: everything that it measures is one older.
    pub fn age_replica(&self, replica: &mut Replica, at: usize) {
        let lease = self.setup.leases[at];
        replica.lease = replica.lease.saturating_sub(1);
        if replica.link.talk != Talk::Silent {
            replica.link.age = older(replica.link.age, lease);
        }
        for fill in &mut replica.fills {
            // Between the check and the insertion nothing is compared with time.
            if matches!(fill.flight, Flight::Sent | Flight::Read) {
                fill.age = older(fill.age, lease);
                fill.tombstone = older(fill.tombstone, lease);
                // A tombstone need not be kept for longer than a flight may last. The longer it is, the more is refused.
                if fill.tombstone == lease {
                    fill.tombstone = NONE;
                }
            }
        }
    }

    fn life_steps(&self, state: &State, at: usize, steps: &mut Steps) {
        match state.replicas[at].phase {
            Phase::Down => steps.add(Step::Start(at), state, |next| next.replicas[at] = STARTED),
            Phase::Starting => {
                let mut read = *state;
                let replica = &mut read.replicas[at];
                (replica.phase, replica.mine, replica.epoch) = (Phase::Registering, state.head(), state.database.epoch);
                if self.setup.slow_registration {
                    steps.list.push((Step::ReadHead(at), read));
                } else {
                    steps.add(Step::Register(at), &read, |next| register(next, at));
                }
            }
            Phase::Registering => steps.add(Step::Register(at), state, |next| register(next, at)),
            Phase::Up if self.setup.stops => {
                steps.add(Step::StopServing(at), state, |next| next.replicas[at] = Replica { phase: Phase::Stopping, ..STARTED });
                if self.lacks(Guard::RowDeletedLast) {
                    steps.add(Step::DeleteRow(at), state, |next| next.database.rows[at] = GONE);
                }
            }
            Phase::Up => {}
            Phase::Stopping => steps.add(Step::DeleteRow(at), state, |next| {
                next.database.rows[at] = GONE;
                next.replicas[at].phase = Phase::Down;
            }),
        }
        if state.crashes > 0 && state.replicas[at].phase != Phase::Down && !state.database.ghosts[at].there {
            steps.add(Step::Kill(at), state, |next| self.kill(next, at));
        }
    }

    /// SIGKILL: what was in memory is gone, the row stays, and what the process was changing is left as it is.
    fn kill(&self, next: &mut State, at: usize) {
        next.crashes -= 1;
        next.replicas[at] = Replica { phase: Phase::Down, ..STARTED };
        next.database.ghosts[at] = next.database.rows[at];
        next.database.rows[at] = GONE;
        for index in 0..self.setup.changes {
            if self.host(next, index) == Some(at) {
                let change = &mut next.changes[index];
                change.stage = match change.stage {
                    Stage::Begun => Stage::Orphaned,
                    Stage::Committed | Stage::Repeated => Stage::Left,
                    other => other,
                };
            }
        }
    }

    fn link_steps(&self, state: &State, at: usize, steps: &mut Steps) {
        let replica = &state.replicas[at];
        match replica.link.talk {
            Talk::Silent => {
                if replica.phase == Phase::Up {
                    steps.add(Step::SendPoll(at), state, |next| next.replicas[at].link.talk = Talk::Polling);
                }
            }
            Talk::Polling => {
                let mut read = *state;
                let link = &mut read.replicas[at].link;
                (link.talk, link.read) = (Talk::Polled, state.database.committed);
                (link.pruned, link.epoch) = (state.database.pruned, state.database.epoch);
                if self.setup.slow_polls {
                    steps.list.push((Step::ReadLog(at), read));
                } else {
                    self.take_in(&read, at, steps);
                }
                steps.add(Step::GiveUpPoll(at), state, |next| next.replicas[at].link = SILENT);
            }
            Talk::Polled => {
                self.take_in(state, at, steps);
                steps.add(Step::GiveUpPoll(at), state, |next| {
                    let link = &mut next.replicas[at].link;
                    // The retry has a `t0` of its own, and what came is the reply to the attempt before.
                    *link = if self.lacks(Guard::LateReplyDropped) { Link { age: 0, ..*link } } else { SILENT };
                });
                if self.lacks(Guard::AppliedBeforeAcknowledged) && state.database.rows[at].there {
                    steps.add(Step::AcknowledgeFirst(at), state, |next| next.database.rows[at].acked = state.head_of(replica.link.read));
                }
            }
            Talk::Renewing => {
                self.renew(state, at, steps);
                steps.add(Step::GiveUpRenewal(at), state, |next| {
                    next.replicas[at].link = SILENT;
                    if self.setup.late_renewals {
                        next.replicas[at].late = replica.mine;
                    }
                });
            }
            Talk::Renewed => {
                steps.add(Step::HearOfRenewal(at), state, |next| self.extend(&mut next.replicas[at], at));
                steps.add(Step::GiveUpRenewal(at), state, |next| {
                    next.replicas[at].link = SILENT;
                    next.replicas[at].behind = true;
                });
            }
        }
        if replica.late != NONE {
            steps.add(Step::LateRenewal(at), state, |next| late_renewal(next, at));
        }
    }

    /// The reply of a poll: notice that the log does not go on from where one was, or apply what is new.
    fn take_in(&self, state: &State, at: usize, steps: &mut Steps) {
        let replica = &state.replicas[at];
        if self.is_locked(replica) {
            return;
        }
        let (link, head) = (replica.link, state.head_of(replica.link.read));
        let pruned = link.pruned > replica.mine && !self.lacks(Guard::PruningNoticed);
        let backwards = head < replica.mine && !self.lacks(Guard::HeadNoticed);
        let elsewhere = link.epoch != replica.epoch && !self.lacks(Guard::EpochNoticed);
        if pruned || backwards || elsewhere {
            steps.add(Step::NoticeBreak(at), state, |next| self.forget(next, at));
            return;
        }
        steps.add(Step::Apply(at), state, |next| {
            for index in 0..self.setup.changes {
                let number = state.changes[index].number;
                if link.read & bit(index) != 0 && number > replica.mine.max(link.pruned) {
                    next.replicas[at].tombstone(self.setup.subjects[index]);
                }
            }
            let head = if self.lacks(Guard::OneStatement) { state.head() } else { head };
            let replica = &mut next.replicas[at];
            replica.mine = replica.mine.max(head);
            replica.link = Link { talk: Talk::Renewing, age: link.age, ..SILENT };
            if self.lacks(Guard::LeaseFromAsking) {
                replica.link.age = 0;
            }
            if link.read == state.database.committed {
                next.database.unread &= !bit(at);
            }
        });
    }

    /// Nobody writes a tombstone, or empties the cache, while something is being inserted.
    pub fn is_locked(&self, replica: &Replica) -> bool {
        !self.lacks(Guard::AdmissionLocked) && replica.fills.iter().any(|fill| fill.flight == Flight::Admitted)
    }

    /// A renewal arrives: the row is still there, has the renewal number that the replica knows, and is of the replica's epoch.
    fn renew(&self, state: &State, at: usize, steps: &mut Steps) {
        let (replica, row) = (&state.replicas[at], &state.database.rows[at]);
        let same_epoch = replica.epoch == state.database.epoch || self.lacks(Guard::EpochAtRenewal) || self.lacks(Guard::EpochNoticed);
        if self.lacks(Guard::RenewalUnlessEvicted) || (row.there && !replica.behind && same_epoch) {
            steps.add(Step::Renew(at), state, |next| {
                record(next, at, replica.mine.max(row.acked));
                next.replicas[at].late = NONE;
                next.replicas[at].link.talk = Talk::Renewed;
                if !self.setup.slow_replies {
                    self.extend(&mut next.replicas[at], at);
                }
            });
        } else if !self.is_locked(replica) {
            steps.add(Step::FindEvicted(at), state, |next| self.forget(next, at));
        }
    }

    fn extend(&self, replica: &mut Replica, at: usize) {
        replica.lease = replica.lease.max(self.setup.leases[at] - replica.link.age);
        replica.link = SILENT;
    }

    /// It was evicted, or the log broke off: it empties its cache, drops every flight, and registers as a new incarnation.
    fn forget(&self, next: &mut State, at: usize) {
        let before = next.replicas[at];
        next.replicas[at] = STARTED;
        next.database.unread &= !bit(at);
        if self.lacks(Guard::CacheEmptied) {
            next.replicas[at].cache = before.cache;
        }
        if self.lacks(Guard::FlightsDropped) {
            next.replicas[at].fills = before.fills;
        }
    }

    fn fill_steps(&self, state: &State, at: usize, token: usize, steps: &mut Steps) {
        let (replica, setup) = (&state.replicas[at], &self.setup);
        let fill = &replica.fills[token];
        match fill.flight {
            Flight::Grounded => {
                let early = self.lacks(Guard::RowBeforeFill) && matches!(replica.phase, Phase::Starting | Phase::Registering);
                if replica.cache[token] == NONE && (replica.phase == Phase::Up || early) {
                    steps.add(Step::SendFill(at, token), state, |next| next.replicas[at].fills[token].flight = Flight::Sent);
                }
            }
            Flight::Sent => steps.add(Step::ReadFacts(at, token), state, |next| {
                let fill = &mut next.replicas[at].fills[token];
                fill.facts = state.database.committed & setup.of_token(token);
                // Facts that no change is missing from can do no harm, and need not be followed any further.
                if fill.facts == setup.of_token(token) {
                    *fill = GROUNDED;
                } else {
                    fill.flight = Flight::Read;
                }
            }),
            Flight::Read => self.land(state, at, token, steps),
            Flight::Admitted => steps.add(Step::Insert(at, token), state, |next| {
                if self.lacks(Guard::ListLeftFirst) {
                    self.share(next, token, fill.facts);
                }
                insert(&mut next.replicas[at], token);
            }),
        }
        if fill.tombstone != NONE && self.lacks(Guard::TombstoneKept) {
            steps.add(Step::ForgetTombstone(at, token), state, |next| next.replicas[at].fills[token].tombstone = NONE);
        }
    }

    /// A flight has its answer: may it be kept and given to those who joined, or does it belong to the call that began it alone?
    fn land(&self, state: &State, at: usize, token: usize, steps: &mut Steps) {
        let (replica, setup) = (&state.replicas[at], &self.setup);
        if self.is_locked(replica) {
            return;
        }
        let fill = &replica.fills[token];
        let overtaken = fill.tombstone != NONE && !self.lacks(Guard::TombstoneAtFill);
        let old = fill.age >= setup.leases[at] && !self.lacks(Guard::FillAge);
        let past = replica.lease == 0 && !self.lacks(Guard::ShareWithinLease);
        if overtaken || old || past {
            steps.add(Step::KeepToOneself(at, token), state, |next| {
                if self.lacks(Guard::ShareChecked) {
                    self.share(next, token, fill.facts);
                }
                next.replicas[at].fills[token] = GROUNDED;
            });
        } else {
            steps.add(Step::Admit(at, token), state, |next| {
                self.share(next, token, fill.facts);
                let fill = &mut next.replicas[at].fills[token];
                (fill.flight, fill.age, fill.tombstone) = (Flight::Admitted, 0, NONE);
                if !setup.slow_admission {
                    insert(&mut next.replicas[at], token);
                }
            });
        }
    }

    /// Whoever is in the flight gets its answer, and may have joined it just now.
    fn share(&self, next: &mut State, token: usize, facts: u8) {
        next.broken |= next.returned() & self.setup.of_token(token) & !facts != 0;
    }
}

fn insert(replica: &mut Replica, token: usize) {
    replica.cache[token] = replica.fills[token].facts;
    replica.fills[token] = GROUNDED;
}

/// The row of a new incarnation is committed, with the head that was read for it.
fn register(next: &mut State, at: usize) {
    let replica = &mut next.replicas[at];
    replica.phase = Phase::Up;
    (replica.behind, replica.late) = (false, NONE);
    next.database.rows[at] = Row { there: true, acked: replica.mine, watched: NONE };
    next.backup.same &= !bit(at);
}

/// A renewal is written into the row.
fn record(next: &mut State, at: usize, acked: u8) {
    next.database.rows[at] = Row { there: true, acked, watched: NONE };
    next.backup.same &= !bit(at);
}

/// A renewal that was given up is recorded, if its number is still the row's: from then on the replica's own is not.
fn late_renewal(next: &mut State, at: usize) {
    let replica = &mut next.replicas[at];
    let acked = std::mem::replace(&mut replica.late, NONE);
    if next.database.rows[at].there && !replica.behind {
        replica.behind = true;
        record(next, at, acked);
    }
}
