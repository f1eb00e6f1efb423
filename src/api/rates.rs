//! How often anybody may report leaked tokens, and a principal make tokens for itself or send tests.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};

/// Addresses that are remembered before those that have been quiet are forgotten.
const ADDRESSES_MAX: usize = 10_000;

/// How many calls pass before those who have been quiet are looked for.
const SWEEP_CALLS: usize = 1_000;

/// A bound for each address, and one for all of them together.
pub(super) struct Reports {
    all: DefaultDirectRateLimiter,
    by_address: DefaultKeyedRateLimiter<IpAddr>,
    calls: AtomicUsize,
}

/// A bound for each principal: on the tokens and secrets that it makes for itself, whose rows stay long after they have ended, and on tests of notices, which
/// go to addresses of its choice.
pub(super) struct PerPrincipal {
    by_principal: DefaultKeyedRateLimiter<(Arc<str>, Arc<str>)>,
    calls: AtomicUsize,
}

impl PerPrincipal {
    /// So many at once, and as many in a minute.
    pub(super) fn new(burst: NonZeroU32) -> Self {
        Self { by_principal: RateLimiter::keyed(Quota::per_minute(burst)), calls: AtomicUsize::new(0) }
    }

    /// Whether this principal may do it once more.
    pub(super) fn admit(&self, workspace: &Arc<str>, principal: &Arc<str>) -> bool {
        if self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEP_CALLS) {
            self.by_principal.retain_recent();
        }
        self.by_principal.check_key(&(Arc::clone(workspace), Arc::clone(principal))).is_ok()
    }
}

impl Reports {
    /// For each address so many at once and as many in a minute; for all together so many at once and as many in a second.
    pub(super) fn new(address_burst: NonZeroU32, burst: NonZeroU32) -> Self {
        Self {
            all: RateLimiter::direct(Quota::per_second(burst)),
            by_address: RateLimiter::keyed(Quota::per_minute(address_burst)),
            calls: AtomicUsize::new(0),
        }
    }

    /// Whether one more report may come in from this address.
    pub(super) fn admit(&self, address: IpAddr) -> bool {
        // Now and then, so that a flood of addresses does not pay for all of them with each call.
        if self.by_address.len() > ADDRESSES_MAX && self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEP_CALLS) {
            self.by_address.retain_recent();
        }
        self.by_address.check_key(&network(address)).is_ok() && self.all.check().is_ok()
    }
}

/// One customer of a network has a whole /64 of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_come_at_a_bounded_rate() {
        let number = |count| NonZeroU32::new(count).expect("not zero");
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let reports = Reports::new(number(2), number(5));
        let admitted = |text: &str| (0..10).filter(|_| reports.admit(address(text))).count();
        assert_eq!(admitted("10.0.0.1"), 2);
        assert_eq!(admitted("::ffff:10.0.0.1"), 0, "the same address, written otherwise");
        assert_eq!(admitted("2001:db8::1"), 2);
        assert_eq!(admitted("2001:db8::2"), 0, "the same network");
        assert_eq!(admitted("10.0.0.2"), 1, "all together");
        assert_eq!(admitted("10.0.0.3"), 0);
    }
}
