//! When is a change in force on every server?
//!
//! A change waits for each other server until it has confirmed the change, or has left, or was evicted, or has been silent for longer than it may answer from memory. What the
//! database says of the servers counts only if it was asked after the commit. Whoever waits shares one look at it.
//!
//! Invariant: no change returns before this server itself has heard of all changes before it, also if it changed nothing (test `a_repeated_change_is_in_force_here_as_well`).
//! Invariant: after the database was put back, or another one has taken over, no change returns before servers that it may have forgotten cannot answer from memory any more (test
//! `after_a_failover_changes_wait_for_those_who_are_forgotten`).
//! Invariant: a server counts as silent by its own lease and by this server's clock, from the commit on (test `the_barrier_waits_for_each_servers_own_lease`).
//! Invariant: who is evicted has given no sign of life for longer than its lease while this server watched (test
//! `a_silent_server_is_evicted_and_a_living_one_is_not`).

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use super::Fence;
use crate::{
    ambient::{Stopwatch, Time},
    error::{Error, Result},
    store::Replica,
};

/// How often the servers are looked at while somebody waits: at first, and after a while.
const LOOK_INTERVAL: Duration = Duration::from_millis(3);
const LONG_LOOK_INTERVAL: Duration = Duration::from_millis(30);
/// How many looks come soon after each other.
const SOON_LOOKS: u32 = 40;
/// How much later than its lease a server counts as silent, whose clock may be slower than ours.
const CLOCK_SKEW_PERCENT: u32 = 1;
/// Longer than any deadline of a call.
const CALLERS_PATIENCE: Duration = Duration::from_secs(20);
const CLOCK_SLACK: Duration = Duration::from_millis(50);
/// The longest lease that the settings allow.
pub const LEASE_MAX: Duration = Duration::from_mins(1);

/// A change that was made.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    seq: Option<i64>,
    since: Stopwatch,
    /// How long servers that the database has forgotten may still answer from memory.
    forgotten: Duration,
}

impl Change {
    /// It was made before now, so long after the database was put back or another one took over.
    pub(super) fn committed(seq: Option<i64>, history_age: Option<Duration>) -> Self {
        let forgotten = history_age.map_or(Duration::ZERO, |age| silence_of(LEASE_MAX).saturating_sub(age));
        Self { seq, since: Stopwatch::start(), forgotten }
    }

    /// What a change answers.
    pub fn of<T>(self, value: T) -> Changed<T> {
        Changed { value, change: Some(self) }
    }
}

/// What a change answers, and the change.
#[derive(Debug)]
#[must_use = "a change is in force everywhere only after `Fence::propagate`"]
pub struct Changed<T> {
    /// What it answers.
    pub value: T,
    /// The change; nothing if nobody can know what it is about.
    pub change: Option<Change>,
}

impl<T> Changed<T> {
    /// An answer about something that is new.
    pub fn new(value: T) -> Self {
        Self { value, change: None }
    }
}

/// How far a change has got.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Propagation {
    /// It is in force everywhere.
    Complete,
    /// It is made.
    Pending {
        /// When it will be in force at the latest; nothing if nobody knows.
        complete_by: Option<Time>,
        /// The ids of the servers that have not confirmed it.
        replicas: Vec<String>,
    },
}

/// What the servers looked like, and when the database was asked.
struct Look {
    began: Stopwatch,
    replicas: Vec<Replica>,
    head: i64,
}

/// The last look at the servers, and who waits for the next one.
#[derive(Default)]
pub(super) struct Watch {
    look: watch::Sender<Option<Arc<Look>>>,
    waiting: AtomicUsize,
    wanted: Notify,
}

/// One of those who wait, until it is dropped.
struct Waiting<'a>(&'a Watch);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Watch {
    fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.wanted.notify_one();
        Waiting(self)
    }

    /// What was seen was another history.
    pub(super) fn forget(&self) {
        self.look.send_replace(None);
    }

    /// Up to which number changes are in force on every server, as far as that was looked at; nothing: it was not.
    pub(super) fn settled(&self) -> Option<i64> {
        let look = self.look.borrow();
        let look = look.as_ref()?;
        look.replicas.iter().filter(|replica| !replica.is_evicted).map(|replica| replica.acked).chain([look.head]).min()
    }

    /// Returns when the servers were looked at once more. As long as somebody waits for that, they are looked at often.
    pub(super) async fn looked(&self) {
        let _waiting = self.wait();
        // Nobody closes it as long as this is borrowed.
        let _looked = self.look.subscribe().changed().await;
    }

    /// The servers that changes wait for, and those of them that do not know the last change.
    pub(super) fn counts(&self) -> (usize, usize) {
        let look = self.look.borrow();
        let Some(look) = look.as_ref() else { return (0, 0) };
        let present = || look.replicas.iter().filter(|replica| !replica.is_evicted);
        (present().count(), present().filter(|replica| replica.acked < look.head).count())
    }
}

/// How long a server that does not confirm a change may still answer from memory.
fn silence_max(replica: &Replica) -> Option<Duration> {
    (!replica.is_acked_only).then(|| silence_of(replica.lease))
}

fn silence_of(lease: Duration) -> Duration {
    lease + lease * CLOCK_SKEW_PERCENT / 100 + CLOCK_SLACK
}

/// The servers that may not know a change yet, and for how much longer; nothing: nobody knows how long.
fn behind<'a>(look: &'a Look, me: &str, seq: i64, since: Stopwatch) -> Vec<(&'a Replica, Option<Duration>)> {
    let others = look.replicas.iter().filter(|replica| replica.id != me && !replica.is_evicted && replica.acked < seq);
    let left = others.map(|replica| (replica, silence_max(replica).map(|longest| longest.saturating_sub(since.elapsed()))));
    left.filter(|(_, left)| *left != Some(Duration::ZERO)).collect()
}

impl Fence {
    /// Waits until a change is in force on every server, but not for longer than this.
    pub async fn propagate(&self, change: Option<Change>, patience: Duration) -> Propagation {
        let Some(Change { seq: Some(seq), since, forgotten }) = change else { return Propagation::Complete };
        if self.store.is_alone() {
            return Propagation::Complete;
        }
        let begin = Stopwatch::start();
        let (_waiting, mut looks, me) = (self.watch.wait(), self.watch.look.subscribe(), self.id.lock().clone());
        loop {
            let look = looks.borrow_and_update().clone().filter(|look| look.began >= since);
            let late = look.as_ref().map(|look| behind(look, &me, seq, since));
            // The database may have forgotten servers: they are waited for without their rows. And this server knows by itself what it has heard of.
            let unseen = forgotten.saturating_sub(since.elapsed()).max(self.unheard(seq, since));
            if unseen.is_zero() && late.as_ref().is_some_and(Vec::is_empty) {
                return Propagation::Complete;
            }
            let left = patience.saturating_sub(begin.elapsed());
            if left.is_zero() {
                let longest =
                    late.as_ref().and_then(|late| late.iter().try_fold(unseen, |longest, (_, left)| left.map(|left| longest.max(left))));
                let late = late.unwrap_or_default().into_iter().map(|(replica, _)| replica.id.clone());
                let replicas = late.chain((!self.unheard(seq, since).is_zero()).then_some(me)).collect();
                return Propagation::Pending { complete_by: longest.map(|longest| self.clock.now() + longest), replicas };
            }
            // Nobody closes it as long as this is borrowed.
            let _looked = timeout(left.min(LONG_LOOK_INTERVAL), looks.changed()).await;
        }
    }

    /// For how much longer this server may answer from memory without a change that it has not heard of; no longer if it has.
    fn unheard(&self, seq: i64, since: Stopwatch) -> Duration {
        if self.head.load(Ordering::SeqCst) >= seq {
            Duration::ZERO
        } else {
            silence_of(self.settings.lease).saturating_sub(since.elapsed())
        }
    }

    /// As [`Fence::run`], for a change of what may be gone by a call before, whose change is answered then: once that is in force on every server, or its caller waits no longer, there is no such thing.
    ///
    /// # Errors
    /// Those of the change; `NotFound`; `Overloaded` if too many are under way.
    pub async fn run_unless_gone<T: Send + 'static>(
        &self,
        thing: &'static str,
        change: impl Future<Output = Result<std::result::Result<Changed<T>, Change>>> + Send + 'static,
    ) -> Result<Changed<T>> {
        match self.run(change).await? {
            Ok(changed) => Ok(changed),
            Err(before) => {
                let _in_force = self.propagate(Some(before), CALLERS_PATIENCE).await;
                Err(Error::NotFound(thing))
            }
        }
    }

    /// The servers that there are, with those that were evicted not long ago, and the number of the last change.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn replicas(&self) -> Result<(Vec<Replica>, i64)> {
        self.store.replicas().await
    }

    /// Looks at the servers once, and evicts those that were silent for too long.
    async fn look(&self, known: &mut Signs) -> Result<()> {
        let began = Stopwatch::start();
        let (replicas, head) = self.store.replicas().await?;
        let me = self.id.lock().clone();
        let look = Arc::new(Look { began, replicas, head });
        // First, since an eviction may have to wait for its turn.
        self.watch.look.send_replace(Some(Arc::clone(&look)));
        for replica in known.silent(&look.replicas, &me) {
            if self.store.evict(&replica.id, replica.renewal, self.clock.now()).await? {
                tracing::warn!(
                    replica = %replica.id, name = %replica.name,
                    "a server has been silent for longer than its lease: changes do not wait for it any more"
                );
            }
        }
        Ok(())
    }
}

/// The last sign of life of each server, and since when there was none after it.
#[derive(Default)]
pub(super) struct Signs(HashMap<String, (i64, Stopwatch)>);

impl Signs {
    /// Notes what was seen, and answers who has been silent for longer than it may answer from memory.
    fn silent<'a>(&mut self, replicas: &'a [Replica], me: &str) -> Vec<&'a Replica> {
        let now = Stopwatch::start();
        let before = std::mem::take(&mut self.0);
        let mut silent = Vec::new();
        for replica in replicas.iter().filter(|replica| replica.id != me && !replica.is_evicted) {
            let known = before.get(&replica.id).filter(|(renewal, _)| *renewal == replica.renewal);
            let since = known.map_or(now, |(_, since)| *since);
            if silence_max(replica).is_some_and(|longest| since.until(now) >= longest) {
                silent.push(replica);
            }
            self.0.insert(replica.id.clone(), (replica.renewal, since));
        }
        silent
    }
}

/// Looks at the servers: often while somebody waits, now and then otherwise.
pub(super) async fn watch(fence: Weak<Fence>, watch: Arc<Watch>, idle: Duration) {
    let mut known = Signs::default();
    let mut looks = 0;
    loop {
        let is_wanted = watch.waiting.load(Ordering::SeqCst) > 0;
        looks = if is_wanted { looks + 1 } else { 0 };
        match (is_wanted, looks) {
            (false, _) => {
                let _woken = timeout(idle, watch.wanted.notified()).await;
            }
            (true, 0..=SOON_LOOKS) => sleep(LOOK_INTERVAL).await,
            (true, _) => sleep(LONG_LOOK_INTERVAL).await,
        }
        let Some(fence) = fence.upgrade() else { return };
        if let Err(error) = fence.look(&mut known).await {
            tracing::debug!(%error, "the servers could not be looked at");
            drop(fence);
            sleep(LONG_LOOK_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(id: &str, acked: i64, lease: u64) -> Replica {
        Replica {
            id: id.to_owned(),
            name: id.to_owned(),
            version: String::new(),
            lease: Duration::from_millis(lease),
            is_acked_only: false,
            start_time: Time::from_micros(0),
            acked,
            renewal: 1,
            is_evicted: false,
        }
    }

    fn names(late: &[(&Replica, Option<Duration>)]) -> Vec<String> {
        late.iter().map(|(replica, _)| replica.id.clone()).collect()
    }

    #[test]
    fn the_barrier_waits_for_each_servers_own_lease() {
        let since = Stopwatch::start();
        let mut replicas = vec![replica("me", 0, 60_000), replica("knows", 7, 60_000), replica("short", 6, 1), replica("long", 6, 60_000)];
        let look = |replicas: &[Replica]| Look { began: Stopwatch::start(), replicas: replicas.to_vec(), head: 7 };
        assert_eq!(names(&behind(&look(&replicas), "me", 7, since)), ["short", "long"]);
        while since.elapsed() < Duration::from_millis(60) {
            std::thread::yield_now();
        }
        assert_eq!(names(&behind(&look(&replicas), "me", 7, since)), ["long"], "the short lease is over, by a hundredth and 50 ms");
        let fresh = look(&replicas);
        let left = behind(&fresh, "me", 7, since)[0].1.expect("a time");
        assert!(left > Duration::from_mins(1) && left < Duration::from_millis(60_650), "{left:?}");
        replicas[2].is_acked_only = true;
        replicas[3].is_evicted = true;
        let look = look(&replicas);
        assert_eq!(
            behind(&look, "me", 7, since).iter().map(|(replica, left)| (&*replica.id, *left)).collect::<Vec<_>>(),
            [("short", None)]
        );
    }

    #[test]
    fn a_silent_server_is_evicted_and_a_living_one_is_not() {
        let mut signs = Signs::default();
        let mut replicas = vec![replica("me", 0, 1), replica("silent", 0, 1), replica("living", 0, 1), replica("patient", 0, 1)];
        replicas[3].is_acked_only = true;
        assert!(signs.silent(&replicas, "me").is_empty(), "nobody has been watched for long enough");
        let since = Stopwatch::start();
        while since.elapsed() < Duration::from_millis(55) {
            std::thread::yield_now();
        }
        replicas[2].renewal += 1;
        assert_eq!(signs.silent(&replicas, "me").iter().map(|replica| &*replica.id).collect::<Vec<_>>(), ["silent"]);
        replicas[1].is_evicted = true;
        assert!(signs.silent(&replicas, "me").is_empty());
    }
}
