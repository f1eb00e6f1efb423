//! The protocol of the fence as a model, checked in every state that it can come to: a validation which starts after a change has returned is judged
//! with that change, on every replica.
//!
//! What there is: a database with its head, its log and the rows of the replicas; up to two replicas, which register, poll, apply, renew and fill their
//! caches; up to two changes, made by changers who may be replicas themselves. Every step interleaves with every other and with time, so that pauses,
//! crashed processes, lost hints (a poll comes when it comes) and late messages are all among the states. No one setup has everything: each of `CASES` is
//! small enough to be checked to its end. A case also names what it must come to, since a model in which nothing happens is right about everything,
//! and the guards that it needs: without any one of them the checker has to find an answer that breaks the promise.
//!
//! Time is kept as ages, in ticks: since a poll or a fill was sent, since a commit, since a row was last seen to move. An age stops at the lease, the greatest
//! that it is compared with, so that time goes on for ever among finitely many states. A lease is one or two ticks. The model is stricter than the protocol
//! in two ways: changers wait for a lease without the margin for clocks that differ, and tombstones are kept for one lease, not two.
//!
//! Facts of a token are the set of changes that were made to it. An answer is wrong if a change is missing from it that had returned.
//!
//! What one replica keeps touches no other, so that where replicas are alike one of them keeps facts, and stands for all.
//!
//! Left out: clocks that run at different speeds (which is what the margin is for), an old primary that still answers after a failover, calls past the lease
//! (each reads the store for itself), other operations on the store, and whether anything happens in time.

use std::{collections::BTreeSet, time::Instant};

use stateright::{Checker as _, HasDiscoveries, Model, Property};

mod change;
mod replica;
mod state;

use change::Passage;
use state::{Backup, CHANGES, Changes, Database, GONE, NONE, Phase, REPLICAS, STARTED, Stage, State, TOKENS, UNMADE, bit};

/// What a model holds, and what may happen in it.
#[derive(Clone, Copy, Debug)]
struct Setup {
    replicas: usize,
    /// Of each replica's row, in ticks.
    leases: [u8; REPLICAS],
    /// So many of them keep facts.
    keepers: usize,
    tokens: usize,
    changes: usize,
    /// The token that a change is made to.
    subjects: [usize; CHANGES],
    /// The replica that makes a change, if it is one of them.
    hosts: [Option<usize>; CHANGES],
    /// The replica at which a change that was left is made again, if it is one of them.
    again: Option<usize>,
    /// The rows are in the mode `acked_only`.
    acked_only: bool,
    /// Changers evict silent rows, and do not only wait.
    evicts: bool,
    /// The clocks of a replica may stand still.
    frozen: bool,
    crashes: u8,
    restores: u8,
    /// A restore is known as one, by a new epoch or timeline. If not, no change begins before every replica has read.
    marked: bool,
    prunes: bool,
    /// Replicas are stopped cleanly.
    stops: bool,
    /// A caller may have no more time.
    leaves: bool,
    /// These have a pause in their midst.
    slow_polls: bool,
    slow_replies: bool,
    slow_registration: bool,
    slow_admission: bool,
    slow_commits: bool,
    /// A renewal that was given up may arrive all the same.
    late_renewals: bool,
}

/// One replica, one change of one token, and messages without pauses in their midst.
const PLAIN: Setup = Setup {
    replicas: 1,
    keepers: 1,
    leases: [1; REPLICAS],
    tokens: 1,
    changes: 1,
    subjects: [0; CHANGES],
    hosts: [None; CHANGES],
    again: None,
    acked_only: false,
    evicts: true,
    frozen: false,
    crashes: 0,
    restores: 0,
    marked: true,
    prunes: false,
    stops: false,
    leaves: false,
    slow_polls: false,
    slow_replies: false,
    slow_registration: false,
    slow_admission: false,
    slow_commits: false,
    late_renewals: false,
};

impl Setup {
    fn longest_lease(&self) -> u8 {
        self.leases.into_iter().take(self.replicas).max().unwrap_or(0)
    }

    /// All changes of a token.
    fn of_token(&self, token: usize) -> Changes {
        (0..self.changes).filter(|index| self.subjects[*index] == token).fold(0, |changes, index| changes | bit(index))
    }
}

/// The guards, and all of them in a list.
macro_rules! guards {
    ($($(#[doc = $text:literal])+ $guard:ident,)+) => {
        /// Each is a rule of the protocol. A model without it is wrong, and the checker has to find out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Guard {
            $($(#[doc = $text])+ $guard,)+
        }

        const GUARDS: &[Guard] = &[$(Guard::$guard),+];
    };
}

guards! {
    /// A tombstone is kept for as long as a flight may last. (Without: it may be forgotten at any time.)
    TombstoneKept,
    /// A flight that began before a tombstone is neither kept nor shared.
    TombstoneAtFill,
    /// Nor is one that is as old as the lease.
    FillAge,
    /// Sharing stands under the same checks as keeping.
    ShareChecked,
    /// Nothing is kept or shared past the lease.
    ShareWithinLease,
    /// A flight leaves the list, so that nobody joins it any more, before it is checked.
    ListLeftFirst,
    /// From the check to the insertion no tombstone is written, and the cache is not emptied.
    AdmissionLocked,
    /// A new incarnation begins with an empty cache.
    CacheEmptied,
    /// It has none of the flights of the one before.
    FlightsDropped,
    /// The row is committed before the first fill is sent.
    RowBeforeFill,
    /// A server that stops serves no more when its row goes.
    RowDeletedLast,
    /// A change is acknowledged when it has been applied.
    AppliedBeforeAcknowledged,
    /// One statement reads the log and the head. (Without: the head is that of a later moment.)
    OneStatement,
    /// The lease counts from before the poll was sent. (Without: from when its reply came.)
    LeaseFromAsking,
    /// A reply to an attempt that was given up is not taken for that of the next one.
    LateReplyDropped,
    /// A renewal finds the row, or nothing is renewed.
    RenewalUnlessEvicted,
    /// A log that was pruned past one's number is noticed.
    PruningNoticed,
    /// A head below one's number is noticed.
    HeadNoticed,
    /// Another epoch or timeline is noticed, by polls and by renewals.
    EpochNoticed,
    /// Renewals too are good in one epoch and timeline only. (Without: polls alone notice it.)
    EpochAtRenewal,
    /// Numbers are given under a lock that is held to the commit. (Without: they come from a sequence.)
    NumbersInOrder,
    /// A replica that makes a change tells its own cache, since the barrier is about the others.
    OwnCacheTold,
    /// A change returns when every row lets it pass.
    Barrier,
    /// The barrier reads the rows after the commit.
    RowsAfterCommit,
    /// What is waited for is the lease of the very row. (Without: that of the first.)
    EachRowsOwnLease,
    /// A row is evicted when it has not moved for a lease.
    EvictionPatient,
    /// A silent replica is evicted, not only taken for dead.
    EvictedBeforeTakenForDead,
    /// After a restore no change returns before the leases from before it have ended, since their rows may be missing.
    OldLeasesWaitedOut,
    /// A change that is found made stands at the barrier all the same.
    BarrierRepeated,
    /// Who finds it made tells its own cache too.
    RepeatTellsOwnCache,
    /// A row in the mode `acked_only` is waited for without end.
    SilenceIsNoAnswer,
    /// Such a row is released if its process is dead.
    ReleasedOnlyIfDead,
    /// A restore that nobody marks is harmless only if the database was away for a lease,
    UnmarkedOnlyAfterALease,
    /// and if nothing changes until every server has polled.
    UnmarkedOnlyWhileNothingChanges,
}

/// What happens, and at which replica, to which change, or in the flight of which token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Tick,
    TickBut(usize),
    Start(usize),
    ReadHead(usize),
    Register(usize),
    StopServing(usize),
    DeleteRow(usize),
    Kill(usize),
    SendPoll(usize),
    ReadLog(usize),
    GiveUpPoll(usize),
    AcknowledgeFirst(usize),
    NoticeBreak(usize),
    Apply(usize),
    Renew(usize),
    FindEvicted(usize),
    HearOfRenewal(usize),
    GiveUpRenewal(usize),
    LateRenewal(usize),
    SendFill(usize, usize),
    ReadFacts(usize, usize),
    KeepToOneself(usize, usize),
    Admit(usize, usize),
    Insert(usize, usize),
    ForgetTombstone(usize, usize),
    Begin(usize),
    Commit(usize),
    RollBack(usize),
    TellOwnCache(usize),
    Return(usize),
    AnswerPending(usize),
    Repeat(usize),
    Watch(usize),
    Evict(usize),
    Release(usize),
    Prune(u8),
    BackUp,
    Restore,
}

/// The steps that are possible in a state, each with the state that it leads to.
struct Steps {
    list: Vec<(Step, State)>,
}

impl Steps {
    fn add(&mut self, step: Step, state: &State, change: impl FnOnce(&mut State)) {
        let mut next = *state;
        change(&mut next);
        self.list.push((step, next));
    }
}

/// The protocol in one setup, whole or without one of its guards.
#[derive(Clone, Copy, Debug)]
struct Fence {
    setup: Setup,
    without: Option<Guard>,
}

impl Fence {
    fn lacks(&self, guard: Guard) -> bool {
        self.without == Some(guard)
    }

    /// No cache that may be served from lacks a change that was told to be complete.
    fn holds(&self, state: &State) -> bool {
        let returned = state.returned();
        let serves = |at: &usize| state.replicas[*at].lease > 0;
        let stale = |facts: u8, token: usize| facts != NONE && returned & self.setup.of_token(token) & !facts != 0;
        !state.broken && !(0..REPLICAS).filter(serves).any(|at| (0..TOKENS).any(|token| stale(state.replicas[at].cache[token], token)))
    }

    /// A change may return, and its rows are as `is` says.
    fn returns(&self, state: &State, is: impl Fn(&[Passage]) -> bool) -> bool {
        (0..CHANGES).any(|index| {
            matches!(state.changes[index].stage, Stage::Committed | Stage::Repeated)
                && self.is_complete(state, index)
                && is(self.passages(state, index).as_flattened())
        })
    }
}

impl Model for Fence {
    type State = State;
    type Action = (Step, State);

    fn init_states(&self) -> Vec<State> {
        let database =
            Database { committed: 0, pruned: 0, epoch: 0, old_leases: 0, rows: [GONE; REPLICAS], ghosts: [GONE; REPLICAS], unread: 0 };
        let backup = Backup { taken: false, committed: 0, rows: [GONE; REPLICAS], same: 0 };
        let (crashes, restores) = (self.setup.crashes, self.setup.restores);
        vec![State { database, backup, replicas: [STARTED; REPLICAS], changes: [UNMADE; CHANGES], crashes, restores, broken: false }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<(Step, State)>) {
        if !self.holds(state) {
            return;
        }
        let mut steps = Steps { list: std::mem::take(actions) };
        steps.list.push((Step::Tick, self.tick(state, None)));
        for at in 0..self.setup.replicas {
            if self.setup.frozen {
                steps.list.push((Step::TickBut(at), self.tick(state, Some(at))));
            }
            self.replica_steps(state, at, &mut steps);
            self.row_steps(state, at, &mut steps);
        }
        for index in 0..self.setup.changes {
            self.change_steps(state, index, &mut steps);
        }
        self.database_steps(state, &mut steps);
        *actions = steps.list;
    }

    fn next_state(&self, _: &State, (_, next): (Step, State)) -> Option<State> {
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(PROMISE, Fence::holds),
            Property::sometimes(ACKNOWLEDGED, |fence: &Fence, state: &State| {
                fence.returns(state, |rows| rows.contains(&Passage::Acknowledged) && !rows.contains(&Passage::WaitedOut))
            }),
            Property::sometimes(WAITED_OUT, |fence: &Fence, state: &State| fence.returns(state, |rows| rows.contains(&Passage::WaitedOut))),
            Property::sometimes(EVICTED, |fence: &Fence, state: &State| {
                let evicted = |at: usize| !state.database.rows[at].there && state.replicas[at].phase == Phase::Up;
                (0..fence.setup.replicas).any(evicted) && fence.returns(state, |rows| !rows.contains(&Passage::WaitedOut))
            }),
            Property::sometimes(LEASE_ENDED, |_: &Fence, state: &State| {
                state.replicas.iter().any(|replica| replica.lease == 0 && replica.cache[0] != NONE)
            }),
            Property::sometimes(PRUNED, |_: &Fence, state: &State| state.database.pruned > 0 && forgot(state)),
            Property::sometimes(RESTORED, |fence: &Fence, state: &State| state.restores < fence.setup.restores && forgot(state)),
            Property::sometimes(REPEATED, |fence: &Fence, state: &State| {
                (0..CHANGES).any(|index| state.changes[index].stage == Stage::Repeated && fence.is_complete(state, index))
            }),
            Property::sometimes(RESTARTED, |_: &Fence, state: &State| {
                (0..REPLICAS).any(|at| state.database.ghosts[at].there && state.replicas[at].phase == Phase::Up)
            }),
        ]
    }
}

/// A replica has emptied its cache and has not registered anew, and its row was not evicted.
fn forgot(state: &State) -> bool {
    (0..REPLICAS).any(|at| state.replicas[at].phase == Phase::Starting && state.database.rows[at].there)
}

const PROMISE: &str = "no answer lacks a change that had returned before it was asked for";
const ACKNOWLEDGED: &str = "a change returns, acknowledged by all";
const WAITED_OUT: &str = "a change returns, a lease having been waited for";
const EVICTED: &str = "a change returns, a silent replica having been evicted";
const LEASE_ENDED: &str = "a lease ends, and the cache is not empty";
const PRUNED: &str = "a replica notices that the log was pruned past its number";
const RESTORED: &str = "a replica notices a restore";
const REPEATED: &str = "a change that was left is made again and returns";
const RESTARTED: &str = "a replica that was killed is back, and its old row is still there";

/// Everything that goes to and fro has a pause in its midst.
const SLOW: Setup =
    Setup { slow_polls: true, slow_replies: true, slow_registration: true, slow_admission: true, late_renewals: true, ..PLAIN };

/// A setup, what it must come to, and the guards that it cannot do without.
struct Case {
    setup: Setup,
    reached: &'static [&'static str],
    guards: &'static [Guard],
}

const ONE_REPLICA: Case = Case {
    setup: Setup { leases: [2; REPLICAS], ..SLOW },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED],
    guards: &[
        Guard::TombstoneKept,
        Guard::TombstoneAtFill,
        Guard::FillAge,
        Guard::ShareChecked,
        Guard::ShareWithinLease,
        Guard::ListLeftFirst,
        Guard::AdmissionLocked,
        Guard::CacheEmptied,
        Guard::FlightsDropped,
        Guard::RowBeforeFill,
        Guard::AppliedBeforeAcknowledged,
        Guard::OneStatement,
        Guard::LeaseFromAsking,
        Guard::LateReplyDropped,
        Guard::RenewalUnlessEvicted,
        Guard::Barrier,
        Guard::EvictionPatient,
        Guard::EvictedBeforeTakenForDead,
    ],
};

const ONE_REPLICA_THAT_ENDS: Case = Case {
    setup: Setup { slow_commits: true, stops: true, crashes: 1, leaves: true, ..SLOW },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED, REPEATED, RESTARTED],
    guards: &[Guard::RowDeletedLast, Guard::RowsAfterCommit, Guard::BarrierRepeated],
};

const CHANGER_IS_THE_REPLICA: Case = Case {
    setup: Setup { hosts: [Some(0), None], again: Some(0), slow_commits: true, crashes: 1, leaves: true, ..SLOW },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED, REPEATED, RESTARTED],
    guards: &[Guard::OwnCacheTold],
};

const TWO_CHANGES: Case = Case {
    setup: Setup { changes: 2, prunes: true, slow_commits: true, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED, PRUNED],
    guards: &[Guard::PruningNoticed, Guard::NumbersInOrder],
};

const TWO_TOKENS: Case = Case {
    setup: Setup { changes: 2, tokens: 2, subjects: [0, 1], ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED],
    guards: &[Guard::TombstoneAtFill, Guard::CacheEmptied],
};

const TWO_REPLICAS: Case = Case {
    setup: Setup { replicas: 2, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED],
    guards: &[Guard::Barrier, Guard::EvictionPatient, Guard::RenewalUnlessEvicted],
};

const TWO_REPLICAS_TWO_CHANGES: Case = Case {
    setup: Setup { replicas: 2, changes: 2, evicts: false, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED],
    guards: &[Guard::Barrier],
};

const CHANGERS_ARE_REPLICAS: Case = Case {
    setup: Setup { replicas: 2, changes: 2, hosts: [Some(0), Some(1)], evicts: false, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED],
    guards: &[Guard::OwnCacheTold],
};

const CHANGER_DIES: Case = Case {
    setup: Setup {
        replicas: 2,
        keepers: 2,
        hosts: [Some(0), None],
        again: Some(1),
        crashes: 1,
        evicts: false,
        slow_commits: true,
        ..PLAIN
    },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED, REPEATED, RESTARTED],
    guards: &[Guard::BarrierRepeated, Guard::RepeatTellsOwnCache, Guard::OwnCacheTold],
};

const DIFFERENT_LEASES: Case = Case {
    setup: Setup { replicas: 2, keepers: 2, leases: [1, 2], evicts: false, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED],
    guards: &[Guard::EachRowsOwnLease],
};

const RESTORE: Case = Case {
    setup: Setup { changes: 2, restores: 1, evicts: false, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED, RESTORED],
    guards: &[Guard::EpochNoticed, Guard::OldLeasesWaitedOut],
};

const FAILOVER_THAT_LOSES_AN_EVICTION: Case = Case {
    setup: Setup { restores: 1, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED, RESTORED],
    guards: &[Guard::EpochNoticed, Guard::EpochAtRenewal],
};

const UNMARKED_RESTORE: Case = Case {
    setup: Setup { changes: 2, restores: 1, marked: false, evicts: false, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, LEASE_ENDED, RESTORED],
    guards: &[Guard::HeadNoticed, Guard::UnmarkedOnlyWhileNothingChanges],
};

const UNMARKED_FAILOVER: Case = Case {
    setup: Setup { restores: 1, marked: false, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, WAITED_OUT, EVICTED, LEASE_ENDED, RESTORED],
    guards: &[Guard::UnmarkedOnlyAfterALease],
};

const ACKED_ONLY: Case = Case {
    setup: Setup { acked_only: true, frozen: true, crashes: 1, leaves: true, slow_polls: true, ..PLAIN },
    reached: &[ACKNOWLEDGED, LEASE_ENDED, REPEATED, RESTARTED],
    guards: &[Guard::SilenceIsNoAnswer, Guard::ReleasedOnlyIfDead],
};

const ACKED_ONLY_BY_TWO: Case = Case {
    setup: Setup { replicas: 2, acked_only: true, frozen: true, crashes: 1, ..PLAIN },
    reached: &[ACKNOWLEDGED, LEASE_ENDED, RESTARTED],
    guards: &[Guard::SilenceIsNoAnswer],
};

const CASES: [&Case; 16] = [
    &ONE_REPLICA,
    &ONE_REPLICA_THAT_ENDS,
    &CHANGER_IS_THE_REPLICA,
    &TWO_CHANGES,
    &TWO_TOKENS,
    &TWO_REPLICAS,
    &TWO_REPLICAS_TWO_CHANGES,
    &CHANGERS_ARE_REPLICAS,
    &CHANGER_DIES,
    &DIFFERENT_LEASES,
    &RESTORE,
    &FAILOVER_THAT_LOSES_AN_EVICTION,
    &UNMARKED_RESTORE,
    &UNMARKED_FAILOVER,
    &ACKED_ONLY,
    &ACKED_ONLY_BY_TWO,
];

/// Every state is looked at, unless one breaks the promise: then the steps that lead to it are told, and what was reached.
fn check(setup: Setup, without: Option<Guard>) -> (Option<Vec<Step>>, BTreeSet<&'static str>) {
    let began = Instant::now();
    let checker = Fence { setup, without }.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let mut found = checker.discoveries();
    let trace = found.remove(PROMISE).map(|path| path.into_actions().into_iter().map(|(step, _)| step).collect::<Vec<_>>());
    let (states, passed) = (checker.unique_state_count(), began.elapsed());
    println!("without {without:?}: {states} states in {passed:.1?}: {trace:?}");
    (trace, found.into_keys().collect())
}

/// The protocol holds in a case, which comes to everything that it should; without any guard of the case it does not hold.
fn run(case: &Case) {
    let (trace, reached) = check(case.setup, None);
    assert_eq!(trace, None, "the protocol breaks its promise");
    let missed: Vec<_> = case.reached.iter().filter(|what| !reached.contains(*what)).collect();
    assert!(missed.is_empty(), "never happened: {missed:?}");
    let idle: Vec<_> = case.guards.iter().filter(|guard| check(case.setup, Some(**guard)).0.is_none()).collect();
    assert!(idle.is_empty(), "nothing is wrong without {idle:?}");
}

#[test]
fn one_replica_and_one_change() {
    run(&ONE_REPLICA);
}

#[test]
fn a_replica_is_killed_or_stopped_and_comes_back() {
    run(&ONE_REPLICA_THAT_ENDS);
}

#[test]
fn a_replica_makes_the_change_itself() {
    run(&CHANGER_IS_THE_REPLICA);
}

#[test]
fn two_changes_and_a_log_that_is_pruned() {
    run(&TWO_CHANGES);
}

#[test]
fn two_changes_of_two_tokens() {
    run(&TWO_TOKENS);
}

#[test]
fn two_replicas_and_one_change() {
    run(&TWO_REPLICAS);
}

#[test]
fn two_replicas_and_two_changes() {
    run(&TWO_REPLICAS_TWO_CHANGES);
}

#[test]
fn two_replicas_change_something_each() {
    run(&CHANGERS_ARE_REPLICAS);
}

#[test]
fn a_changer_dies_and_another_repeats_the_change() {
    run(&CHANGER_DIES);
}

#[test]
fn two_replicas_have_different_leases() {
    run(&DIFFERENT_LEASES);
}

#[test]
fn a_backup_is_restored_and_marked_as_such() {
    run(&RESTORE);
}

#[test]
fn a_failover_loses_an_eviction() {
    run(&FAILOVER_THAT_LOSES_AN_EVICTION);
}

#[test]
fn a_restore_that_nobody_marks_is_noticed_by_the_head() {
    run(&UNMARKED_RESTORE);
}

#[test]
fn a_restore_that_nobody_marks_loses_an_eviction() {
    run(&UNMARKED_FAILOVER);
}

#[test]
fn acknowledgement_alone_holds_when_clocks_stand_still() {
    run(&ACKED_ONLY);
    run(&ACKED_ONLY_BY_TWO);
}

/// The limit that users are told of: leases hold as long as clocks run.
#[test]
fn leases_do_not_hold_when_clocks_stand_still() {
    assert!(check(Setup { frozen: true, ..PLAIN }, None).0.is_some());
}

#[test]
fn every_guard_is_missed_in_some_case() {
    let needed = |guard: &Guard| CASES.iter().any(|case| case.guards.contains(guard));
    let forgotten: Vec<_> = GUARDS.iter().filter(|guard| !needed(guard)).collect();
    assert!(forgotten.is_empty(), "no case is wrong without {forgotten:?}");
}
