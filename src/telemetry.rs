//! Logs and metrics.
//!
//! What every call counts is counted in the lane of its thread, so that no two cores write to the same memory; the page sums the lanes.
//!
//! Libraries through whose hands tokens and statements pass log warnings at most, whatever the level: what they write at TRACE is theirs to change.
//!
//! Invariant: no call is lost in the counts, however many threads count (test `calls_of_all_threads_are_on_the_page`).
//! Invariant: no label of a metric holds what a caller sent: names come from our own lists (test `metrics_have_bounded_labels`).

mod lanes;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};
use tracing_subscriber::EnvFilter;

use crate::{config::LogFormat, fence, grant::Verdict, notice::Channel, notices, retention::Removed, validator::Stats};
use lanes::Lanes;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// gRPC status codes by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Begins to log, to standard error. The first call counts.
pub fn init_logs(level: &str, format: LogFormat) {
    let others = if matches!(level, "off" | "error") { level } else { "warn" };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{others},keyward={level}")))
        .with_writer(std::io::stderr)
        .with_ansi(false);
    // An error says that somebody has begun to log already, which is then the one who logs.
    let _first = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// The name of a status code in logs.
#[must_use]
pub fn code_name(code: usize) -> &'static str {
    CODES.get(code).copied().unwrap_or("UNKNOWN")
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerbLabels {
    verb: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FaultLabels {
    state: &'static str,
    acknowledged: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutboxLabels {
    channel: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ChannelLabels {
    channel: &'static str,
}

/// Upper ends of the buckets of a latency, in nanoseconds: from 50 µs to 10 s.
const LATENCIES: [u64; 17] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

fn latency() -> Histogram {
    Histogram::new(LATENCIES.map(seconds))
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

/// Everything that Prometheus reads.
pub struct Metrics {
    registry: Registry,
    lanes: Arc<Lanes>,
    store_latency: Family<VerbLabels, Histogram>,
    store_errors: Family<VerbLabels, Counter>,
    shed: Counter,
    unsampled: Counter,
    removed: Family<KindLabels, Counter>,
    faults: Family<FaultLabels, Gauge>,
    outbox: Family<OutboxLabels, Gauge>,
    delivered: Family<ChannelLabels, Counter>,
    undelivered: Family<ChannelLabels, Counter>,
    /// Open connections to the gRPC port.
    pub connections: Gauge,
    cache_hits: Counter,
    cache_misses: Counter,
    cached: Gauge,
    cached_bytes: Gauge,
    flights: Gauge,
    usage_backlog: Gauge,
    head: Gauge,
    acknowledged: Gauge,
    lease: Gauge<f64, AtomicU64>,
    replicas: Gauge,
    behind: Gauge,
    barrier: Histogram,
    pending: Counter,
}

impl Metrics {
    /// Counters for these methods, given by their paths and known by their places from now on.
    #[must_use]
    pub fn new(paths: &[&'static str]) -> Self {
        let mut registry = Registry::with_prefix("keyward");
        let metrics = Self {
            lanes: Arc::new(Lanes::new(paths)),
            store_latency: Family::new_with_constructor(latency),
            store_errors: Family::default(),
            shed: Counter::default(),
            unsampled: Counter::default(),
            removed: Family::default(),
            faults: Family::default(),
            outbox: Family::default(),
            delivered: Family::default(),
            undelivered: Family::default(),
            connections: Gauge::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            cached: Gauge::default(),
            cached_bytes: Gauge::default(),
            flights: Gauge::default(),
            usage_backlog: Gauge::default(),
            head: Gauge::default(),
            acknowledged: Gauge::default(),
            lease: Gauge::default(),
            replicas: Gauge::default(),
            behind: Gauge::default(),
            barrier: latency(),
            pending: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("build", "The running version", Info::new([("version", VERSION)]));
        registry.register("requests", "gRPC calls by method and status code", lanes::Requests(Arc::clone(&metrics.lanes)));
        registry.register("request_seconds", "Time from a call's headers to its answer", lanes::Latencies(Arc::clone(&metrics.lanes)));
        registry.register("verdicts", "Judged tokens by verdict", lanes::Verdicts(Arc::clone(&metrics.lanes)));
        registry.register("store_seconds", "Time of the database by verb", metrics.store_latency.clone());
        registry.register("store_errors", "Failures of the database by verb", metrics.store_errors.clone());
        registry.register("shed", "Calls refused because too many were under way", metrics.shed.clone());
        registry.register("audit_unsampled", "Refused calls that the audit kept no event of", metrics.unsampled.clone());
        registry.register("removed", "Rows removed at the end of their retention, by kind", metrics.removed.clone());
        registry.register(
            "faults",
            "Faults that stand, by whether the token has expired yet and whether somebody takes care",
            metrics.faults.clone(),
        );
        registry.register("notices", "Notices that wait, or were given up, by channel", metrics.outbox.clone());
        registry.register("notices_delivered", "Notices delivered, by channel", metrics.delivered.clone());
        registry.register("notice_failures", "Attempts to deliver a notice that failed, by channel", metrics.undelivered.clone());
        registry.register("connections", "Open connections", metrics.connections.clone());
        registry.register("cache_hits", "Tokens judged by what memory knew", metrics.cache_hits.clone());
        registry.register("cache_misses", "Tokens for which the database was asked", metrics.cache_misses.clone());
        registry.register("cache_tokens", "Tokens in memory", metrics.cached.clone());
        registry.register(
            "cache_bytes",
            "Bytes of memory that they have taken, at most those of the setting",
            metrics.cached_bytes.clone(),
        );
        registry.register("flights", "Look-ups in the database under way", metrics.flights.clone());
        registry.register(
            "usage_backlog_tokens",
            "Upper bound of the tokens whose uses are not written yet",
            metrics.usage_backlog.clone(),
        );
        registry.register("fence_head", "The number of the last change that this server has heard of", metrics.head.clone());
        registry.register("fence_acknowledged", "The number up to which it has confirmed changes", metrics.acknowledged.clone());
        registry.register(
            "fence_lease_seconds",
            "For how much longer it may answer from memory; less than nothing: without end",
            metrics.lease.clone(),
        );
        registry.register("fence_replicas", "The servers that changes wait for", metrics.replicas.clone());
        registry.register("fence_replicas_behind", "Those of them that have not confirmed the last change", metrics.behind.clone());
        registry.register("fence_barrier_seconds", "How long changes waited for the other servers", metrics.barrier.clone());
        registry.register("fence_pending", "Changes that were answered before every server had confirmed them", metrics.pending.clone());
        Self { registry, ..metrics }
    }

    /// One call of the method at this place has been answered.
    pub fn request(&self, method: usize, code: usize, elapsed: Duration) {
        self.lanes.request(method, code, elapsed);
    }

    /// One token has been judged.
    pub fn verdict(&self, verdict: Verdict) {
        self.verdicts(verdict, 1);
    }

    /// So many tokens have been judged alike.
    pub fn verdicts(&self, verdict: Verdict, count: u64) {
        self.lanes.verdicts(verdict, count);
    }

    /// One call was refused for want of room.
    pub fn shed(&self) {
        self.shed.inc();
    }

    /// A change has waited for the other servers.
    pub fn barrier(&self, elapsed: Duration, is_complete: bool) {
        self.barrier.observe(elapsed.as_secs_f64());
        if !is_complete {
            self.pending.inc();
        }
    }

    /// One refused call was left out of the audit's sample.
    pub fn unsampled(&self) {
        self.unsampled.inc();
    }

    /// The database has answered.
    pub fn store(&self, verb: &'static str, elapsed: Duration, failed: bool) {
        self.store_latency.get_or_create(&VerbLabels { verb }).observe(elapsed.as_secs_f64());
        if failed {
            self.store_errors.get_or_create(&VerbLabels { verb }).inc();
        }
    }

    /// The page that Prometheus reads, in the OpenMetrics text format.
    ///
    /// # Errors
    /// If a number cannot be written as text, which it can.
    pub fn page(
        &self,
        stats: Stats,
        usage_backlog: usize,
        removed: Removed,
        notices: &notices::Stats,
        fence: fence::Stats,
    ) -> Result<String, std::fmt::Error> {
        use std::sync::atomic::Ordering::Relaxed;
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.cache_hits.inner().store(stats.hits, Relaxed);
        self.cache_misses.inner().store(stats.misses, Relaxed);
        self.cached.set(count(stats.cached));
        self.cached_bytes.set(count(stats.cached_bytes));
        self.flights.set(count(stats.flights));
        self.usage_backlog.set(count(usage_backlog));
        for (kind, rows) in [("token", removed.tokens), ("workspace", removed.workspaces), ("audit_event", removed.audit_events)] {
            self.removed.get_or_create(&KindLabels { kind }).inner().store(rows, Relaxed);
        }
        self.head.set(fence.head);
        self.acknowledged.set(fence.acknowledged);
        self.lease.set(fence.lease.map_or(-1.0, |left| left.as_secs_f64()));
        self.replicas.set(count(fence.replicas));
        self.behind.set(count(fence.behind));
        self.notices(notices);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn notices(&self, stats: &notices::Stats) {
        use std::sync::atomic::Ordering::Relaxed;
        let faults = &stats.standing.faults;
        for (state, acknowledged, count) in [
            ("expiring", "false", faults.expiring),
            ("expiring", "true", faults.expiring_acknowledged),
            ("expired", "false", faults.expired),
            ("expired", "true", faults.expired_acknowledged),
        ] {
            self.faults.get_or_create(&FaultLabels { state, acknowledged }).set(count);
        }
        for channel in Channel::ALL {
            for (state, is_dead) in [("pending", false), ("dead", true)] {
                let waiting = stats.standing.outbox.iter().find(|(of, dead, _)| *of == channel && *dead == is_dead);
                let labels = OutboxLabels { channel: channel.name(), state };
                self.outbox.get_or_create(&labels).set(waiting.map_or(0, |(.., count)| *count));
            }
        }
        for (channel, delivered, failed) in stats.attempts {
            let labels = ChannelLabels { channel: channel.name() };
            self.delivered.get_or_create(&labels).inner().store(delivered, Relaxed);
            self.undelivered.get_or_create(&labels).inner().store(failed, Relaxed);
        }
    }
}
