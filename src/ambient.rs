//! What time is it, give me random bytes, which thread and which host is this: the only reader of clocks and of the operating system's randomness.
//!
//! Invariant: no other room reads a clock or draws randomness (`clippy.toml` bans the calls; test `owners_are_alone`).

#![expect(clippy::disallowed_methods, reason = "this room is the owner of what is banned elsewhere")]

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use rand::{TryRng, rngs::SysRng};
use rustix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};

/// An instant: microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

impl Time {
    /// Later than every instant that Keyward takes from anybody.
    pub const NEVER: Self = Self(i64::MAX);

    /// From microseconds since 1970.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    #[must_use]
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970.
    #[must_use]
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// As it goes over the wire; nothing if it is [`Time::NEVER`].
    #[must_use]
    pub fn to_timestamp(self) -> Option<prost_types::Timestamp> {
        let nanos = i32::try_from(self.0.rem_euclid(1_000_000) * 1000).unwrap_or(0);
        (self != Self::NEVER).then_some(prost_types::Timestamp { seconds: self.seconds(), nanos })
    }

    /// Milliseconds since 1970, none before it.
    #[must_use]
    pub fn millis(self) -> u64 {
        u64::try_from(self.0 / 1000).unwrap_or(0)
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(span.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl std::ops::Sub<Duration> for Time {
    type Output = Self;

    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(span.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl fmt::Display for Time {
    /// RFC 3339, in UTC.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = i32::try_from(self.0.rem_euclid(1_000_000) * 1000).unwrap_or(0);
        prost_types::Timestamp { seconds: self.seconds(), nanos }.fmt(f)
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}µs", self.0)
    }
}

/// The one clock of a server. Tests turn one by hand.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    by_hand: Option<Arc<AtomicI64>>,
}

impl Clock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that stands still until somebody turns it.
    #[must_use]
    pub fn by_hand(start: Time) -> Self {
        Self { by_hand: Some(Arc::new(AtomicI64::new(start.0))) }
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Time {
        match &self.by_hand {
            Some(micros) => Time(micros.load(Ordering::SeqCst)),
            None => Time(
                SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX)),
            ),
        }
    }

    /// Turns a clock by hand. The system's clock does not turn.
    pub fn advance(&self, span: Duration) {
        if let Some(micros) = &self.by_hand {
            micros.fetch_add(i64::try_from(span.as_micros()).unwrap_or(0), Ordering::SeqCst);
        }
    }
}

/// Counts on while the machine sleeps, so that a lease does not outlive it.
#[cfg(target_os = "linux")]
const BOOT_TIME: ClockId = ClockId::Boottime;
/// Elsewhere there is none, or this one counts on as well.
#[cfg(not(target_os = "linux"))]
const BOOT_TIME: ClockId = ClockId::Monotonic;

/// Nanoseconds since the machine was started.
fn boot_time() -> u64 {
    let time = clock_gettime(BOOT_TIME);
    let (seconds, nanos) = (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// How long something takes; not affected by the clock being set, and going on while the machine sleeps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Stopwatch(u64);

impl Stopwatch {
    /// Starts one.
    #[must_use]
    pub fn start() -> Self {
        Self(boot_time())
    }

    /// The time since the start.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Duration::from_nanos(boot_time().saturating_sub(self.0))
    }

    /// The time from the start of this one to the start of a later one.
    #[must_use]
    pub fn until(self, later: Self) -> Duration {
        Duration::from_nanos(later.0.saturating_sub(self.0))
    }
}

/// Whether something still holds: until an instant that one thread moves and all may look at.
#[derive(Debug, Default)]
pub struct Expiry(AtomicU64);

impl Expiry {
    const NEVER: u64 = u64::MAX;

    /// Holds until so long after the start of a stopwatch.
    pub fn set(&self, start: Stopwatch, span: Duration) {
        self.0.store(start.0.saturating_add(nanos(span)).min(Self::NEVER - 1), Ordering::SeqCst);
    }

    /// Holds for ever.
    pub fn set_never(&self) {
        self.0.store(Self::NEVER, Ordering::SeqCst);
    }

    /// Does not hold any more.
    pub fn expire(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    /// Whether it holds now.
    #[must_use]
    pub fn holds(&self) -> bool {
        let end = self.0.load(Ordering::SeqCst);
        end == Self::NEVER || boot_time() < end
    }

    /// How much longer it holds.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst).saturating_sub(boot_time()))
    }
}

/// What this host calls itself.
#[must_use]
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Random bytes from the operating system.
///
/// # Errors
/// `Internal` if the operating system has none.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    SysRng.try_fill_bytes(&mut bytes).map_err(|error| Error::Internal(error.into()))?;
    Ok(bytes)
}

/// How many lanes there are.
pub const LANES: usize = 16;

static LANES_TAKEN: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LANE: usize = LANES_TAKEN.fetch_add(1, Ordering::Relaxed) % LANES;
}

/// The lane of the calling thread: the first thread that asks has lane 0, the next lane 1, and after [`LANES`] threads they begin anew. What every call counts
/// is kept once for each lane and summed by whoever reads it, so that no two cores write to the same memory. Threads may share a lane: what is kept there is
/// atomic or locked all the same, it just has hardly ever to be waited for.
#[must_use]
pub fn lane() -> usize {
    LANE.with(|lane| *lane)
}

/// A count that many threads add to and few read.
#[derive(Debug, Default)]
pub struct Tally([OwnLine; LANES]);

/// So far from its neighbours that no two lanes' counts share what processors pass to and fro.
#[derive(Debug, Default)]
#[repr(align(128))]
struct OwnLine(AtomicU64);

impl Tally {
    /// Adds.
    pub fn add(&self, count: u64) {
        if let Some(OwnLine(own)) = self.0.get(lane()) {
            own.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The sum of all that was added.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|OwnLine(count)| count.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_thread_keeps_its_lane_and_threads_are_spread_over_lanes() {
        let threads = (0..LANES).map(|_| std::thread::spawn(|| [lane(), lane()])).collect::<Vec<_>>();
        let lanes = threads.into_iter().map(|thread| thread.join().expect("a lane")).collect::<Vec<_>>();
        assert!(lanes.iter().all(|[first, second]| first == second && *first < LANES), "{lanes:?}");
        assert!(lanes.iter().collect::<BTreeSet<_>>().len() > 1, "{lanes:?}");
    }
}
