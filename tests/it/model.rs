//! The protocol of the fence as a model.

use stateright::{Checker as _, HasDiscoveries, Model, Property};

mod change;
mod replica;
mod state;

use change::Passage;
use state::{Backup, CHANGES, Changes, Database, GONE, NONE, Phase, REPLICAS, STARTED, Stage, State, TOKENS, Talk, UNMADE, bit};

/// What a model holds, and what may happen in it.
#[derive(Clone, Copy, Debug)]
struct Setup {
    replicas: usize,
    /// Of each replica's row, in ticks.
    leases: [u8; REPLICAS],
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

const PLAIN: Setup = Setup {
    replicas: 1,
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
        let returned = self.returned(state);
        let serves = |at: &usize| state.replicas[*at].lease > 0;
        let stale = |facts: u8, token: usize| facts != NONE && returned & self.setup.of_token(token) & !facts != 0;
        !state.broken && !(0..REPLICAS).filter(serves).any(|at| (0..TOKENS).any(|token| stale(state.replicas[at].cache[token], token)))
    }

    fn any_change(&self, state: &State, is: impl Fn(&[[Passage; 2]; REPLICAS]) -> bool) -> bool {
        (0..CHANGES).any(|index| {
            matches!(state.changes[index].stage, Stage::Committed | Stage::Repeated)
                && self.is_complete(state, index)
                && is(&self.passages(state, index))
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
        vec![State {
            database,
            backup,
            replicas: [STARTED; REPLICAS],
            changes: [UNMADE; CHANGES],
            crashes,
            restores,
            broken: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<(Step, State)>) {
        if !self.holds(state) { return; }
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
            Property::sometimes("acknowledged", |model: &Fence, state: &State| {
                model.any_change(state, |all| all.as_flattened().contains(&Passage::Acknowledged) && !all.as_flattened().contains(&Passage::WaitedOut))
            }),
            Property::sometimes("waited out", |model: &Fence, state: &State| model.any_change(state, |all| all.as_flattened().contains(&Passage::WaitedOut))),
            Property::sometimes("evicted", |model: &Fence, state: &State| {
                let gone = |at: usize| !state.database.rows[at].there && state.replicas[at].phase == Phase::Up;
                model.any_change(state, |all| all.as_flattened().iter().all(|passage| *passage == Passage::Gone)) && (0..model.setup.replicas).all(gone)
            }),
            Property::sometimes("lease ends", |model: &Fence, state: &State| {
                (0..model.setup.replicas).any(|at| state.replicas[at].lease == 0 && state.replicas[at].cache[0] != NONE)
            }),
            Property::sometimes("pruned", |model: &Fence, state: &State| {
                (0..model.setup.replicas).any(|at| state.replicas[at].phase == Phase::Up && state.replicas[at].mine < state.database.pruned)
            }),
            Property::sometimes("restored", |model: &Fence, state: &State| {
                (0..model.setup.replicas).map(|at| &state.replicas[at]).any(|replica| {
                    replica.link.talk == Talk::Polled
                        && (replica.link.epoch != replica.epoch || state.head_of(replica.link.read) < replica.mine)
                })
            }),
        ]
    }
}

const PROMISE: &str = "no answer lacks a change that had returned before it was asked for";

fn setups() -> Vec<(&'static str, Setup)> {
    let slow = Setup { slow_polls: true, slow_replies: true, slow_registration: true, slow_admission: true, late_renewals: true, ..PLAIN };
    vec![
        ("one", Setup { leases: [2; 2], ..slow }),
        ("one-small", Setup { slow_commits: true, stops: true, crashes: 1, leaves: true, ..slow }),
        ("two-changes", Setup { changes: 2, prunes: true, slow_commits: true, slow_polls: true, ..PLAIN }),
        ("two-tokens", Setup { changes: 2, tokens: 2, subjects: [0, 1], ..PLAIN }),
        ("two-replicas", Setup { replicas: 2, ..PLAIN }),
        ("two-two", Setup { replicas: 2, changes: 2, evicts: false, ..PLAIN }),
        ("host", Setup { replicas: 2, hosts: [Some(0), None], again: Some(1), crashes: 1, evicts: false, slow_commits: true, ..PLAIN }),
        ("hosts", Setup { replicas: 2, changes: 2, hosts: [Some(0), Some(1)], evicts: false, ..PLAIN }),
        ("leases", Setup { replicas: 2, leases: [1, 2], evicts: false, ..PLAIN }),
        ("restore", Setup { changes: 2, restores: 1, evicts: false, slow_polls: true, ..PLAIN }),
        ("failover", Setup { restores: 1, slow_polls: true, ..PLAIN }),
        ("unmarked", Setup { changes: 2, restores: 1, marked: false, evicts: false, slow_polls: true, ..PLAIN }),
        ("unmarked-evicts", Setup { restores: 1, marked: false, slow_polls: true, ..PLAIN }),
        ("acked-only", Setup { acked_only: true, frozen: true, crashes: 1, slow_polls: true, leaves: true, ..PLAIN }),
        ("acked-two", Setup { replicas: 2, acked_only: true, frozen: true, crashes: 1,  ..PLAIN }),
    ]
}

#[test]
fn explore() {
    let only = std::env::var("ONLY").ok();
    for (name, setup) in setups() {
        if only.as_ref().is_some_and(|only| only != name) { continue; }
        let t = std::time::Instant::now();
        let checker = Fence { setup, without: None }.checker().timeout(std::time::Duration::from_secs(100)).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let mut names: Vec<_> = checker.discoveries().into_keys().collect();
        names.sort();
        println!("{name}: {} unique of {} depth {} in {:?}: {names:?}", checker.unique_state_count(), checker.state_count(), checker.max_depth(), t.elapsed());
        if let Some(path) = checker.discovery(PROMISE) {
            println!("  TRACE {:?}", path.into_actions().into_iter().map(|(step, _)| step).collect::<Vec<_>>());
        }
    }
}

#[test]
fn mutants() {
    let only = std::env::var("ONLY").ok();
    let from: usize = std::env::var("FROM").map_or(0, |n| n.parse().unwrap());
    for guard in &GUARDS[from..] {
        let mut line = format!("{guard:?}:");
        for (name, setup) in setups() {
            if only.as_ref().is_some_and(|only| only != name) { continue; }
            let t = std::time::Instant::now();
            let checker = Fence { setup, without: Some(*guard) }.checker().timeout(std::time::Duration::from_secs(60)).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
            if let Some(path) = checker.discovery(PROMISE) {
                line += &format!("\n   {name} ({} states, {:?}) {:?}", checker.unique_state_count(), t.elapsed(), path.into_actions().into_iter().map(|(step, _)| step).collect::<Vec<_>>());
            }
        }
        println!("{line}");
    }
}
