//! Which addresses a webhook may reach: the public internet, and what the setting `webhook_allowed_cidrs` names besides.
//!
//! Invariant: no address that is special to a machine, a network or a protocol is reached unless the setting names it, however it is
//! written (tests `special_addresses_are_refused`, `spellings_of_an_address_are_that_address`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), prefix))
}

const fn v6(a: u16, b: u16, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix))
}

/// What the registries of special-purpose addresses at IANA (RFC 6890) call not globally reachable, and what leads to such an address in
/// disguise. Of IPv6 everything counts that lies outside of `2000::/3`, which is all that is given out of it.
const SPECIAL: [IpNet; 22] = [
    v4(0, 0, 0, 8),        // This host, this network.
    v4(10, 0, 0, 8),       // Private.
    v4(100, 64, 0, 10),    // Between a carrier and its customers.
    v4(127, 0, 0, 8),      // Loopback.
    v4(169, 254, 0, 16),   // Link-local, with the metadata of clouds.
    v4(172, 16, 0, 12),    // Private.
    v4(192, 0, 0, 24),     // Assignments of protocols.
    v4(192, 0, 2, 24),     // Documentation.
    v4(192, 88, 99, 24),   // Relays of 6to4, given up.
    v4(192, 168, 0, 16),   // Private.
    v4(198, 18, 0, 15),    // Benchmarks.
    v4(198, 51, 100, 24),  // Documentation.
    v4(203, 0, 113, 24),   // Documentation.
    v4(224, 0, 0, 4),      // Multicast.
    v4(240, 0, 0, 4),      // Reserved, and the broadcast address.
    v6(0, 0, 3),           // ::, ::1, IPv4 in IPv6, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), discard-only (100::/64).
    v6(0x2001, 0, 23),     // Assignments of protocols: Teredo, benchmarks, ORCHID and the like.
    v6(0x2001, 0xdb8, 32), // Documentation.
    v6(0x2002, 0, 16),     // 6to4.
    v6(0x3fff, 0, 20),     // Documentation.
    v6(0x4000, 0, 2),      // Not given out; segment routing (5f00::/16).
    v6(0x8000, 0, 1),      // Unique-local (fc00::/7), link-local (fe80::/10), site-local (fec0::/10), multicast (ff00::/8).
];

/// Decides which addresses are reached.
#[derive(Clone, Debug)]
pub struct Reach {
    allowed: Vec<IpNet>,
}

impl Reach {
    /// The public internet and these ranges.
    #[must_use]
    pub fn new(allowed: Vec<IpNet>) -> Self {
        Self { allowed }
    }

    /// Whether a call may go there. Prefixes that a network gives to its own NAT64 are known to nobody else: they look like any other address.
    #[must_use]
    pub fn may_reach(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.is_inside(address) || !SPECIAL.iter().any(|range| range.contains(&address))
    }

    /// Whether the setting names it: only there may calls go without TLS.
    #[must_use]
    pub fn is_inside(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allowed.iter().any(|range| range.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn ranges(texts: &[&str]) -> Reach {
        Reach::new(texts.iter().map(|text| text.parse().expect("a range")).collect())
    }

    #[test]
    fn special_addresses_are_refused() {
        let reach = Reach::new(Vec::new());
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.0.170",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.255",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:7f00:1",
            "64:ff9b::8.8.8.8",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
            "100::1",
            "100:0:0:1::1",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2001:db8:ffff:ffff::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "3fff:fff::1",
            "4000::1",
            "5f00::1",
            "8000::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
        ] {
            assert!(!reach.may_reach(address(text)), "{text}");
            assert!(!reach.is_inside(address(text)), "{text}");
        }
    }

    #[test]
    fn public_addresses_are_reached() {
        let reach = Reach::new(Vec::new());
        for text in [
            "1.0.0.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.0.3.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "203.0.112.255",
            "203.0.114.0",
            "223.255.255.255",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2001:db7::1",
            "2001:db9::1",
            "2003::1",
            "2606:4700::1111",
            "3ffe::1",
            "3fff:1000::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(reach.may_reach(address(text)), "{text}");
        }
    }

    #[test]
    fn what_the_setting_names_is_reached() {
        let reach = ranges(&["10.1.0.0/16", "fd00::/8", "64:ff9b::/96"]);
        for text in ["10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "64:ff9b::8.8.8.8"] {
            assert!(reach.may_reach(address(text)) && reach.is_inside(address(text)), "{text}");
        }
        for text in ["10.2.0.1", "::ffff:10.2.0.1", "fc00::1", "127.0.0.1", "64:ff9b:1::1"] {
            assert!(!reach.may_reach(address(text)), "{text}");
        }
        assert!(reach.may_reach(address("8.8.8.8")) && !reach.is_inside(address("8.8.8.8")));
    }

    #[test]
    fn spellings_of_an_address_are_that_address() {
        let reach = Reach::new(Vec::new());
        for host in [
            "127.0.0.1",
            "127.0.0.1.",
            "2130706433",
            "017700000001",
            "0x7f000001",
            "0x7f.1",
            "0x7F.0.0.0x1",
            "127.1",
            "0177.0.0.1",
            "0",
            "%31%32%37.0.0.1",
            "１２７.0.0.1",
            "127。0。0。1",
            "[::ffff:127.0.0.1]",
            "[::FFFF:7F00:1]",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[64:ff9b::127.0.0.1]",
            "2852039166",
            "0xa9fea9fe",
        ] {
            let address = match url::Url::parse(&format!("http://{host}/")).expect("a URL").host() {
                Some(url::Host::Ipv4(address)) => IpAddr::from(address),
                Some(url::Host::Ipv6(address)) => IpAddr::from(address),
                other => panic!("{host} is {other:?}"),
            };
            assert!(!reach.may_reach(address), "{host} is {address}");
        }
    }
}
