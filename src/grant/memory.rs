//! Facts as memory holds them.
//!
//! In this order: the id (16 bytes), when the token and when the secret ends (8 each), the number of address ranges (1), flags (1), the ranges (18 each:
//! whether IPv6, the length of the network's prefix, 16 bytes of address), and then what a `ValidateTokenResponse` says of the token as it goes over
//! the wire: its fields from `token_id` to `expire_time`, with all names, scopes and audiences. Numbers are little-endian.
//!
//! Invariant: what is read out is what was put in (test `facts_survive_memory`).
//! Invariant: where the part of fixed length is cut, a token is read that has ended (test `nothing_reads_as_a_good_token`).

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use prost::Message as _;
use smallvec::SmallVec;

use super::{Facts, Kind, State};
use crate::{ambient::Time, proto, token::TokenId};

const EXPIRE_TIME: usize = 16;
const SECRET_EXPIRE_TIME: usize = 24;
const RANGES: usize = 32;
const FLAGS: usize = 33;
const FIXED_BYTES: usize = 34;
const RANGE_BYTES: usize = 18;
/// Fields of a `ValidateTokenResponse`.
const WORKSPACE: u8 = 4;
const PRINCIPAL: u8 = 5;
const SCOPES: u8 = 7;
const AUDIENCES: u8 = 8;
const DISPLAY_NAME: u8 = 9;

/// The facts of a token, laid out for memory. No allocation, unless there are unusually many of them.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Grant(SmallVec<[u8; 320]>);

/// What is so or is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flag {
    Active = 1,
    Inactive = 2,
    PrincipalSuspended = 4,
    PrincipalIsAdmin = 8,
    WorkspaceSuspended = 16,
}

impl Grant {
    /// Lays out facts.
    #[must_use]
    pub fn of(facts: &Facts) -> Self {
        let flags = [
            (Flag::Active, facts.state == State::Active),
            (Flag::Inactive, facts.state == State::Inactive),
            (Flag::PrincipalSuspended, facts.principal_suspended),
            (Flag::PrincipalIsAdmin, facts.principal_is_admin),
            (Flag::WorkspaceSuspended, facts.workspace_suspended),
        ];
        // The rules allow 50 ranges. If there were more, the token would be good from fewer addresses.
        let ranges = facts.allowed_cidrs.get(..usize::from(u8::MAX)).unwrap_or(&facts.allowed_cidrs);
        let mut bytes = SmallVec::new();
        bytes.extend_from_slice(&facts.token_id.to_bytes());
        bytes.extend_from_slice(&facts.expire_time.micros().to_le_bytes());
        bytes.extend_from_slice(&facts.secret_expire_time.micros().to_le_bytes());
        bytes.push(u8::try_from(ranges.len()).unwrap_or(u8::MAX));
        bytes.push(flags.iter().filter(|(_, is_so)| *is_so).fold(0, |flags, (flag, _)| flags | *flag as u8));
        for range in ranges {
            bytes.extend_from_slice(&range_bytes(*range));
        }
        bytes.extend_from_slice(&answer(facts).encode_to_vec());
        Self(bytes)
    }

    /// All of it; nothing of one that is empty.
    #[must_use]
    pub fn as_memory(&self) -> &[u8] {
        &self.0
    }

    /// Where what [`Grant::as_memory`] gave can be put back.
    pub fn memory_mut(&mut self) -> &mut SmallVec<[u8; 320]> {
        &mut self.0
    }

    /// The fields of a `ValidateTokenResponse` that tell about the token, as they go over the wire.
    #[must_use]
    pub fn answer(&self) -> &[u8] {
        self.0.get(FIXED_BYTES + RANGE_BYTES * self.ranges()..).unwrap_or_default()
    }

    /// The token's id.
    #[must_use]
    pub fn token_id(&self) -> TokenId {
        TokenId::from_bytes(self.number(0))
    }

    /// The workspace it belongs to.
    #[must_use]
    pub fn workspace(&self) -> &str {
        self.texts(WORKSPACE).next().unwrap_or_default()
    }

    /// Whom it stands for.
    #[must_use]
    pub fn principal(&self) -> &str {
        self.texts(PRINCIPAL).next().unwrap_or_default()
    }

    /// Its name.
    #[must_use]
    pub fn display_name(&self) -> &str {
        self.texts(DISPLAY_NAME).next().unwrap_or_default()
    }

    /// What it may do: scopes, as their texts.
    pub fn scopes(&self) -> impl Iterator<Item = &str> {
        self.texts(SCOPES)
    }

    /// The products it is for; none: any.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        self.texts(AUDIENCES)
    }

    /// What people made of it.
    #[must_use]
    pub fn state(&self) -> State {
        match (self.has(Flag::Active), self.has(Flag::Inactive)) {
            (true, false) => State::Active,
            (false, true) => State::Inactive,
            _ => State::Revoked,
        }
    }

    /// Whether its principal has the role of an administrator.
    #[must_use]
    pub fn principal_is_admin(&self) -> bool {
        self.has(Flag::PrincipalIsAdmin)
    }

    /// When it ends.
    #[must_use]
    pub fn expire_time(&self) -> Time {
        Time::from_micros(i64::from_le_bytes(self.number(EXPIRE_TIME)))
    }

    /// Until when the secret that was presented is good.
    #[must_use]
    pub fn secret_end(&self) -> Time {
        self.expire_time().min(self.secret_expire_time())
    }

    pub(super) fn secret_expire_time(&self) -> Time {
        Time::from_micros(i64::from_le_bytes(self.number(SECRET_EXPIRE_TIME)))
    }

    pub(super) fn allowed_cidrs(&self) -> impl Iterator<Item = IpNet> {
        let bytes = self.0.get(FIXED_BYTES..FIXED_BYTES + RANGE_BYTES * self.ranges()).unwrap_or_default();
        bytes.chunks_exact(RANGE_BYTES).filter_map(range)
    }

    pub(super) fn has_ranges(&self) -> bool {
        self.ranges() > 0
    }

    pub(super) fn has(&self, flag: Flag) -> bool {
        self.number::<1>(FLAGS).iter().any(|flags| flags & flag as u8 != 0)
    }

    fn ranges(&self) -> usize {
        usize::from(u8::from_le_bytes(self.number(RANGES)))
    }

    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }

    fn texts(&self, number: u8) -> impl Iterator<Item = &str> {
        let of_this_number =
            Fields(self.answer()).skip_while(move |(found, _)| *found < number).take_while(move |(found, _)| *found == number);
        of_this_number.map(|(_, bytes)| std::str::from_utf8(bytes).unwrap_or_default())
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Grant({})", self.token_id())
    }
}

/// What an answer says of a token; whether it is good is said before it.
fn answer(facts: &Facts) -> proto::ValidateTokenResponse {
    let kind = match facts.kind {
        Kind::Permanent => proto::TokenKind::Permanent,
        Kind::Temporary => proto::TokenKind::Temporary,
    };
    proto::ValidateTokenResponse {
        token_id: facts.token_id.to_string(),
        workspace: facts.workspace.clone(),
        principal: facts.principal.clone(),
        kind: kind.into(),
        scopes: facts.scopes.iter().map(ToString::to_string).collect(),
        audiences: facts.audiences.clone(),
        display_name: facts.display_name.clone(),
        metadata: facts.metadata.clone(),
        // A secret within its grace ends before its token.
        expire_time: facts.expire_time.min(facts.secret_expire_time).to_timestamp(),
        ..Default::default()
    }
}

/// The fields of a message of ours, in the order of their numbers, which are below 16: a number's bytes are of no concern here.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const LENGTH_DELIMITED: u8 = 2;
        let (tag, rest) = self.0.split_first()?;
        let (value, rest) = varint(rest)?;
        let (bytes, rest) = if tag & 7 == LENGTH_DELIMITED { rest.split_at_checked(value)? } else { (&[][..], rest) };
        self.0 = rest;
        Some((tag >> 3, bytes))
    }
}

/// Seven bits a byte, the lowest first (<https://protobuf.dev/programming-guides/encoding/#varints>).
fn varint(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    if *first < 0x80 {
        return Some((usize::from(*first), rest));
    }
    let last = bytes.iter().position(|byte| *byte < 0x80)?;
    let (number, rest) = bytes.split_at_checked(last + 1)?;
    Some((number.iter().rev().fold(0, |value, byte| value << 7 | usize::from(byte & 0x7f)), rest))
}

fn range_bytes(range: IpNet) -> [u8; RANGE_BYTES] {
    let mut bytes = [0; RANGE_BYTES];
    let (head, address) = bytes.split_at_mut(2);
    head.copy_from_slice(&[u8::from(range.addr().is_ipv6()), range.prefix_len()]);
    match range.addr() {
        IpAddr::V4(ip) => address.split_at_mut(4).0.copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => address.copy_from_slice(&ip.octets()),
    }
    bytes
}

fn range(bytes: &[u8]) -> Option<IpNet> {
    let (head, address) = bytes.split_first_chunk::<2>()?;
    let ip = match head[0] {
        0 => IpAddr::from(*address.first_chunk::<4>()?),
        _ => IpAddr::from(*address.first_chunk::<16>()?),
    };
    IpNet::new(ip, head[1]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_survive_memory() {
        let long = "x".repeat(300);
        let facts = Facts {
            scopes: ["a:b", "c:*", "*"].map(|scope| scope.parse().expect("a scope")).to_vec(),
            audiences: vec!["one".to_owned(), long.clone()],
            allowed_cidrs: ["10.1.2.3/32", "0.0.0.0/0", "2001:db8::/33"].map(|range| range.parse().expect("a range")).to_vec(),
            metadata: [("key".to_owned(), long.clone()), ("other".to_owned(), String::new())].into(),
            expire_time: Time::from_micros(1_800_000_000_123_456),
            state: State::Inactive,
            principal_is_admin: true,
            kind: Kind::Temporary,
            ..Facts::example(&long)
        };
        let grant = Grant::of(&facts);
        let mut copy = Grant::default();
        copy.memory_mut().extend_from_slice(grant.as_memory());
        assert_eq!(grant, copy);
        assert_eq!((grant.token_id(), grant.workspace(), grant.principal()), (facts.token_id, "default", "alice"));
        assert_eq!((grant.display_name(), grant.state(), grant.expire_time()), (long.as_str(), State::Inactive, facts.expire_time));
        assert_eq!(grant.secret_expire_time(), Time::NEVER);
        assert_eq!(grant.scopes().collect::<Vec<_>>(), ["a:b", "c:*", "*"]);
        assert_eq!(grant.audiences().collect::<Vec<_>>(), facts.audiences);
        assert_eq!(grant.allowed_cidrs().collect::<Vec<_>>(), facts.allowed_cidrs);
        let flags = [Flag::Active, Flag::Inactive, Flag::PrincipalSuspended, Flag::PrincipalIsAdmin, Flag::WorkspaceSuspended];
        assert_eq!(flags.map(|flag| grant.has(flag)), [false, true, false, true, false]);
        let answer = proto::ValidateTokenResponse::decode(grant.answer()).expect("a message");
        assert_eq!((answer.kind(), answer.metadata), (proto::TokenKind::Temporary, facts.metadata));
    }

    #[test]
    fn nothing_reads_as_a_good_token() {
        let whole = Grant::of(&Facts { allowed_cidrs: Vec::new(), audiences: Vec::new(), ..Facts::example("ci") });
        let fixed = whole.as_memory().get(..FIXED_BYTES).expect("longer");
        for length in 0..FIXED_BYTES {
            let mut cut = Grant::default();
            cut.memory_mut().extend_from_slice(fixed.get(..length).expect("shorter"));
            let now = Time::from_micros(1);
            assert_ne!(cut.judge(&super::super::Need::default(), now), super::super::Verdict::Valid, "{length} bytes");
        }
    }

    #[test]
    fn a_token_takes_few_bytes() {
        let facts = Facts {
            scopes: ["agents:list", "storage:upload"].map(|scope| scope.parse().expect("a scope")).to_vec(),
            allowed_cidrs: Vec::new(),
            ..Facts::example("ci")
        };
        assert!(Grant::of(&facts).as_memory().len() <= 160, "{}", Grant::of(&facts).as_memory().len());
    }
}
