//! Questions and answers as they go over the wire, without the generated messages.
//!
//! Only the plainest encoding is read (<https://protobuf.dev/programming-guides/encoding/>): known fields with their own wire types, tags of one byte. What else the
//! generated code would take, and what it would refuse, is not for here.

use std::net::IpAddr;

use bytes::BufMut as _;
use smallvec::SmallVec;

use crate::{
    api::convert,
    api::validation::AUDIENCE_CHARS_MAX,
    grant::{Derived, Need, Verdict},
    scope::Scope,
    validator::{HttpRequest, Judgement, Question},
};

/// Questions with more scopes are for where the store is: to compare many with many takes its time, and other connections wait for this thread.
const PLAIN_SCOPES_MAX: usize = 16;

/// The number of a field, and that its value has a length.
const fn tag(field: u8) -> u8 {
    field << 3 | 2
}

/// A `ValidateTokenRequest` whose every field obeys its rule.
#[derive(Default)]
pub(super) struct Asked<'a> {
    token: &'a str,
    audience: &'a str,
    required_scopes: SmallVec<[&'a str; 4]>,
    http_method: &'a str,
    path: &'a str,
    client_ip: Option<IpAddr>,
    peek: bool,
}

impl<'a> Asked<'a> {
    /// Reads one; nothing if it is not plain or breaks a rule.
    pub(super) fn read(mut bytes: &'a [u8]) -> Option<Self> {
        const PEEK: u8 = 7 << 3;
        let mut asked = Self::default();
        let mut client_ip = "";
        while let Some((tag, rest)) = bytes.split_first() {
            if *tag == PEEK {
                let (value, rest) = rest.split_first()?;
                asked.peek = (*value < 2).then_some(*value == 1)?;
                bytes = rest;
                continue;
            }
            let (text, rest) = text(rest)?;
            bytes = rest;
            *match *tag {
                0x0a => &mut asked.token,
                0x12 => &mut asked.audience,
                0x1a => {
                    asked.required_scopes.push(text);
                    continue;
                }
                0x22 => &mut asked.http_method,
                0x2a => &mut asked.path,
                0x32 => &mut client_ip,
                _ => return None,
            } = text;
        }
        if !client_ip.is_empty() {
            asked.client_ip = Some(client_ip.parse().ok()?);
        }
        asked.is_well_formed().then_some(asked)
    }

    fn is_well_formed(&self) -> bool {
        self.audience.len() <= AUDIENCE_CHARS_MAX
            && self.required_scopes.len() <= PLAIN_SCOPES_MAX
            && self.required_scopes.iter().all(|scope| Scope::check_single(scope).is_ok())
            && self.http_method.is_empty() == self.path.is_empty()
    }

    pub(super) fn token(&self) -> &'a [u8] {
        self.token.as_bytes()
    }

    /// As the validator takes it, from a caller who may ask about the tokens of this workspace; nothing: of every one.
    pub(super) fn question<'b>(&'b self, reach: Option<&'b str>) -> Question<'b> {
        let http = (!self.path.is_empty()).then_some(HttpRequest { method: self.http_method, path: self.path });
        let audience = Some(self.audience).filter(|audience| !audience.is_empty());
        let need =
            Need { workspace: reach, audience, client_ip: self.client_ip, scopes: &self.required_scopes, derived: Derived::NotAsked };
        Question { text: self.token.as_bytes(), need, http, peek: self.peek }
    }
}

/// The entries of a `BatchValidateTokensRequest`; one that is nothing is not plain.
pub(super) fn entries(mut bytes: &[u8]) -> impl Iterator<Item = Option<&[u8]>> {
    std::iter::from_fn(move || {
        let (first, rest) = bytes.split_first()?;
        let entry = if *first == tag(1) { counted(rest) } else { None };
        bytes = entry.map_or(&[], |(_, rest)| rest);
        Some(entry.map(|(entry, _)| entry))
    })
}

fn text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (value, rest) = counted(bytes)?;
    Some((std::str::from_utf8(value).ok()?, rest))
}

/// A value with its length before it, of at most three bytes, and what follows.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut length = 0;
    for (index, byte) in bytes.iter().take(3).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if *byte < 0x80 {
            return bytes.get(index + 1..)?.split_at_checked(length);
        }
    }
    None
}

/// The texts that an answer adds to what the grant holds, with their fields.
fn added<'a>(judgement: Judgement<'a>, question: &'a Question<'a>) -> impl Iterator<Item = (u8, &'a str)> {
    let derived = judgement.derived_scope.map_or(Derived::NotAsked, |scope| Derived::Scope(scope.as_str()));
    let lacking = judgement.grant.filter(|_| judgement.verdict == Verdict::InsufficientScope);
    let missing = lacking.into_iter().flat_map(move |grant| grant.missing_scopes(&Need { derived, ..question.need }).collect::<Vec<_>>());
    missing.map(|scope| (12, scope)).chain(judgement.derived_scope.map(|scope| (13, scope.as_str())))
}

/// How long a `ValidateTokenResponse` is.
pub(super) fn answer_bytes(judgement: Judgement<'_>, question: &Question<'_>) -> usize {
    let verdict = if judgement.verdict == Verdict::Valid { 4 } else { 2 };
    let told = judgement.grant.map_or(0, |grant| grant.answer().len());
    let added: usize = added(judgement, question).map(|(_, text)| 1 + varint_bytes(text.len()) + text.len()).sum();
    verdict + told + added
}

/// Writes a `ValidateTokenResponse`, its fields in the order of their numbers.
pub(super) fn put_answer(frame: &mut Vec<u8>, judgement: Judgement<'_>, question: &Question<'_>) {
    if judgement.verdict == Verdict::Valid {
        frame.put_slice(&[1 << 3, 1]);
    }
    let verdict = i32::from(convert::verdict(judgement.verdict));
    frame.put_slice(&[2 << 3, u8::try_from(verdict).unwrap_or_default()]);
    if let Some(grant) = judgement.grant {
        frame.put_slice(grant.answer());
    }
    for (field, text) in added(judgement, question) {
        frame.put_u8(tag(field));
        put_varint(frame, text.len());
        frame.put_slice(text.as_bytes());
    }
}

/// Writes one entry of a `BatchValidateTokensResponse`.
pub(super) fn put_entry(frame: &mut Vec<u8>, judgement: Judgement<'_>, question: &Question<'_>) {
    frame.put_u8(tag(1));
    put_varint(frame, answer_bytes(judgement, question));
    put_answer(frame, judgement, question);
}

/// Writes a `StreamValidateTokensResponse` with its frame.
pub(super) fn put_message(frame: &mut Vec<u8>, judgement: Judgement<'_>, question: &Question<'_>) {
    let bytes = answer_bytes(judgement, question);
    frame.put_u8(0);
    // No answer comes near 4 GiB.
    frame.put_u32(u32::try_from(1 + varint_bytes(bytes) + bytes).unwrap_or(u32::MAX));
    frame.put_u8(tag(1));
    put_varint(frame, bytes);
    put_answer(frame, judgement, question);
}

fn varint_bytes(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

fn put_varint(frame: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        frame.put_u8(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    frame.put_u8(value.to_le_bytes()[0]);
}
