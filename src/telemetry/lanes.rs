//! What every call counts: once for each lane, summed when the page is read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{CODES, LATENCIES, seconds};
use crate::{
    ambient::{self, LANES},
    grant::Verdict,
};

const VERDICTS: [(Verdict, &str); 10] = [
    (Verdict::Valid, "VALID"),
    (Verdict::Unknown, "UNKNOWN"),
    (Verdict::Revoked, "REVOKED"),
    (Verdict::Expired, "EXPIRED"),
    (Verdict::Inactive, "INACTIVE"),
    (Verdict::PrincipalSuspended, "PRINCIPAL_SUSPENDED"),
    (Verdict::WorkspaceSuspended, "WORKSPACE_SUSPENDED"),
    (Verdict::WrongAudience, "WRONG_AUDIENCE"),
    (Verdict::IpNotAllowed, "IP_NOT_ALLOWED"),
    (Verdict::InsufficientScope, "INSUFFICIENT_SCOPE"),
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerdictLabels {
    verdict: &'static str,
}

/// What one lane knows of one method.
#[derive(Debug, Default)]
struct Calls {
    codes: [AtomicU64; CODES.len()],
    /// By bucket, and those that took longer than any.
    latencies: [AtomicU64; LATENCIES.len()],
    longer: AtomicU64,
    nanos: AtomicU64,
}

/// Lines of memory that no other lane writes to; processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

#[derive(Debug)]
struct Lane {
    methods: Box<[Line<Calls>]>,
    verdicts: Line<[AtomicU64; VERDICTS.len()]>,
}

/// The counts of all lanes.
#[derive(Debug)]
pub(super) struct Lanes {
    methods: Vec<&'static str>,
    lanes: [Lane; LANES],
}

impl Lanes {
    pub(super) fn new(paths: &[&'static str]) -> Self {
        let lane = |_| Lane { methods: paths.iter().map(|_| Line::default()).collect(), verdicts: Line::default() };
        Self { methods: paths.iter().map(|path| path.trim_start_matches('/')).collect(), lanes: std::array::from_fn(lane) }
    }

    pub(super) fn request(&self, method: usize, code: usize, elapsed: Duration) {
        let Some(Line(calls)) = self.own().methods.get(method) else { return };
        if let Some(count) = calls.codes.get(code) {
            count.fetch_add(1, Relaxed);
        }
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let bucket = LATENCIES.partition_point(|end| *end < nanos);
        calls.latencies.get(bucket).unwrap_or(&calls.longer).fetch_add(1, Relaxed);
        calls.nanos.fetch_add(nanos, Relaxed);
    }

    pub(super) fn verdicts(&self, verdict: Verdict, count: u64) {
        let place = VERDICTS.iter().position(|(known, _)| *known == verdict);
        if let Some(counter) = place.and_then(|place| self.own().verdicts.0.get(place)) {
            counter.fetch_add(count, Relaxed);
        }
    }

    fn own(&self) -> &Lane {
        let [first, ..] = &self.lanes;
        self.lanes.get(ambient::lane()).unwrap_or(first)
    }

    /// The sum of one count over all lanes.
    fn sum<'a>(&'a self, count: impl Fn(&'a Lane) -> Option<&'a AtomicU64>) -> u64 {
        self.lanes.iter().filter_map(count).map(|count| count.load(Relaxed)).sum()
    }

    /// The sum of one count of a method over all lanes.
    fn sum_of<'a>(&'a self, method: usize, count: impl Fn(&'a Calls) -> Option<&'a AtomicU64>) -> u64 {
        self.sum(|lane| lane.methods.get(method).and_then(|Line(calls)| count(calls)))
    }
}

/// Calls by method and status code.
#[derive(Debug)]
pub(super) struct Requests(pub(super) Arc<Lanes>);

impl EncodeMetric for Requests {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        for (place, method) in self.0.methods.iter().enumerate() {
            for (number, code) in CODES.iter().enumerate() {
                let count = self.0.sum_of(place, |calls| calls.codes.get(number));
                encoder.encode_family(&RequestLabels { method, code })?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}

/// How long calls took, by method.
#[derive(Debug)]
pub(super) struct Latencies(pub(super) Arc<Lanes>);

impl EncodeMetric for Latencies {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        for (place, method) in self.0.methods.iter().enumerate() {
            let bucket = |(bucket, end): (usize, &u64)| (seconds(*end), self.0.sum_of(place, |calls| calls.latencies.get(bucket)));
            let longer = (f64::INFINITY, self.0.sum_of(place, |calls| Some(&calls.longer)));
            let buckets: Vec<(f64, u64)> = LATENCIES.iter().enumerate().map(bucket).chain([longer]).collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let sum = seconds(self.0.sum_of(place, |calls| Some(&calls.nanos)));
            encoder.encode_family(&MethodLabels { method })?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// Judged tokens by verdict.
#[derive(Debug)]
pub(super) struct Verdicts(pub(super) Arc<Lanes>);

impl EncodeMetric for Verdicts {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        for (place, (_, verdict)) in VERDICTS.iter().enumerate() {
            let count = self.0.sum(|lane| lane.verdicts.0.get(place));
            encoder.encode_family(&VerdictLabels { verdict })?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{
        encoding::text::encode,
        metrics::{counter::Counter, family::Family, histogram::Histogram},
        registry::Registry,
    };

    use super::*;

    fn page(registry: &Registry) -> Vec<String> {
        let mut text = String::new();
        encode(&mut text, registry).expect("text");
        text.lines().map(ToOwned::to_owned).collect()
    }

    fn registered(lanes: &Arc<Lanes>) -> Registry {
        let mut registry = Registry::with_prefix("k");
        registry.register("requests", "R", Requests(Arc::clone(lanes)));
        registry.register("request_seconds", "S", Latencies(Arc::clone(lanes)));
        registry.register("verdicts", "V", Verdicts(Arc::clone(lanes)));
        registry
    }

    #[test]
    fn the_page_is_that_of_the_librarys_own_metrics() {
        let lanes = Arc::new(Lanes::new(&["/a.B/C", "unknown"]));
        let mut registry = Registry::with_prefix("k");
        let requests = Family::<RequestLabels, Counter>::default();
        let latencies = Family::<MethodLabels, Histogram>::new_with_constructor(super::super::latency);
        let verdicts = Family::<VerdictLabels, Counter>::default();
        registry.register("requests", "R", requests.clone());
        registry.register("request_seconds", "S", latencies.clone());
        registry.register("verdicts", "V", verdicts.clone());
        for method in ["a.B/C", "unknown"] {
            for code in CODES {
                drop(requests.get_or_create(&RequestLabels { method, code }));
            }
            drop(latencies.get_or_create(&MethodLabels { method }));
        }
        for (_, verdict) in VERDICTS {
            drop(verdicts.get_or_create(&VerdictLabels { verdict }));
        }
        // Sums that are the same in whatever order they are made, and latencies at the ends of buckets.
        for (nanos, code) in [(0, 0), (50_000, 0), (50_001, 5), (1_000_000_000, 16), (10_000_000_000, 0), (10_000_000_001, 14)] {
            lanes.request(0, code, Duration::from_nanos(nanos));
            requests.get_or_create(&RequestLabels { method: "a.B/C", code: CODES[code] }).inc();
            latencies.get_or_create(&MethodLabels { method: "a.B/C" }).observe(seconds(nanos));
        }
        lanes.verdicts(Verdict::Revoked, 3);
        verdicts.get_or_create(&VerdictLabels { verdict: "REVOKED" }).inc_by(3);
        let sorted = |registry: &Registry| {
            let mut lines = page(registry);
            lines.sort();
            lines
        };
        assert_eq!(sorted(&registered(&lanes)), sorted(&registry));
    }

    #[test]
    fn calls_of_all_threads_are_on_the_page() {
        let lanes = Arc::new(Lanes::new(&["/a.B/C"]));
        std::thread::scope(|scope| {
            for _ in 0..LANES + 4 {
                scope.spawn(|| {
                    for _ in 0..1_000 {
                        lanes.request(0, 0, Duration::from_micros(70));
                        lanes.verdicts(Verdict::Valid, 2);
                    }
                });
            }
        });
        let page = page(&registered(&lanes));
        for line in [
            "k_requests_total{method=\"a.B/C\",code=\"OK\"} 20000",
            "k_request_seconds_count{method=\"a.B/C\"} 20000",
            "k_request_seconds_sum{method=\"a.B/C\"} 1.4",
            "k_request_seconds_bucket{le=\"0.00005\",method=\"a.B/C\"} 0",
            "k_request_seconds_bucket{le=\"0.0001\",method=\"a.B/C\"} 20000",
            "k_verdicts_total{verdict=\"VALID\"} 40000",
        ] {
            assert!(page.iter().any(|found| found == line), "{line} is not in\n{}", page.join("\n"));
        }
    }
}
