//! The domain's words and the wire's, one into the other.

use std::{net::IpAddr, time::Duration};

use prost_types::{Duration as WireDuration, Timestamp};

use crate::{
    ambient::Time,
    error::Violations,
    fence::Propagation,
    grant::{Kind, ShownState, Token, Verdict},
    issuer::{self, Grace},
    notice::Event,
    proto,
    scope::Scope,
};

const MICROS_PER_SECOND: i64 = 1_000_000;
/// The range of a Duration: about 10,000 years.
const SPAN_SECONDS_MAX: u64 = 315_576_000_000;
/// 0001-01-01 and 9999-12-31, the range of a Timestamp.
const SECONDS_MIN: i64 = -62_135_596_800;
const SECONDS_MAX: i64 = 253_402_300_799;

/// An instant; nothing for "never".
pub(super) fn timestamp(time: Time) -> Option<Timestamp> {
    time.to_timestamp()
}

/// An instant that was sent, cut to microseconds.
pub(super) fn time(timestamp: &Timestamp) -> Result<Time, &'static str> {
    if (SECONDS_MIN..=SECONDS_MAX).contains(&timestamp.seconds) && (0..1_000_000_000).contains(&timestamp.nanos) {
        Ok(Time::from_micros(timestamp.seconds * MICROS_PER_SECOND + i64::from(timestamp.nanos) / 1000))
    } else {
        Err("must be a valid Timestamp between the years 1 and 9999")
    }
}

/// A span that was sent.
pub(super) fn span(duration: &WireDuration) -> Result<Duration, &'static str> {
    match (u64::try_from(duration.seconds), u32::try_from(duration.nanos)) {
        (Ok(seconds @ ..=SPAN_SECONDS_MAX), Ok(nanos @ ..=999_999_999)) => Ok(Duration::new(seconds, nanos)),
        _ => Err("must be a valid Duration that is not negative"),
    }
}

/// A span, for an answer.
pub(super) fn wire_span(span: Duration) -> WireDuration {
    WireDuration { seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX), nanos: i32::try_from(span.subsec_nanos()).unwrap_or(0) }
}

/// A day that was sent, as it begins (UTC).
pub(super) fn day(text: &str) -> Result<Time, &'static str> {
    const RULE: &str = "must be a day as YYYY-MM-DD, such as 2027-04-11";
    let digit_or_dash = |(index, byte): (usize, u8)| if index == 4 || index == 7 { byte == b'-' } else { byte.is_ascii_digit() };
    if text.len() != 10 || !text.bytes().enumerate().all(digit_or_dash) {
        return Err(RULE);
    }
    let start: Timestamp = format!("{text}T00:00:00Z").parse().map_err(|_| RULE)?;
    // The 30th of February would be taken as some day of March.
    if start.to_string().starts_with(text) { time(&start) } else { Err(RULE) }
}

/// How long an old secret lives on; not said is not at all.
pub(super) fn grace(duration: Option<&WireDuration>) -> Grace {
    let mut violations = Violations::default();
    let grace = duration.and_then(|duration| violations.take("grace", span(duration))).unwrap_or_default();
    Grace { grace, violations }
}

/// An optional instant.
pub(super) fn optional_time(field: &str, timestamp: Option<&Timestamp>, violations: &mut Violations) -> Option<Time> {
    timestamp.and_then(|timestamp| violations.take(field, time(timestamp)))
}

/// What a notice is about, for an answer.
pub(super) fn notice_event(event: Event) -> proto::NoticeEvent {
    match event {
        Event::Expiring => proto::NoticeEvent::TokenExpiring,
        Event::Expired => proto::NoticeEvent::TokenExpired,
        Event::Created => proto::NoticeEvent::TokenCreated,
        Event::Regenerated => proto::NoticeEvent::TokenRegenerated,
        Event::Revoked => proto::NoticeEvent::TokenRevoked,
        Event::Leaked => proto::NoticeEvent::TokenLeaked,
        Event::Test => proto::NoticeEvent::Test,
    }
}

/// The events that a workspace wants to hear of, as they were sent; each once.
pub(super) fn notice_events(field: &str, sent: &[i32], violations: &mut Violations) -> Vec<Event> {
    const RULE: &str =
        "must be NOTICE_EVENT_TOKEN_CREATED, NOTICE_EVENT_TOKEN_REGENERATED, NOTICE_EVENT_TOKEN_REVOKED or NOTICE_EVENT_TOKEN_LEAKED";
    let mut events = Vec::new();
    for (index, number) in sent.iter().enumerate() {
        let known = Event::ALL.into_iter().find(|event| i32::from(notice_event(*event)) == *number);
        match known.filter(|event| event.is_optional()) {
            None => violations.add(format!("{field}[{index}]"), RULE),
            Some(event) if events.contains(&event) => {}
            Some(event) => events.push(event),
        }
    }
    events
}

/// Whether a kind that was sent is the temporary one. Not said is permanent.
pub(super) fn is_temporary(field: &str, kind: i32, violations: &mut Violations) -> bool {
    match proto::TokenKind::try_from(kind) {
        Ok(proto::TokenKind::Unspecified | proto::TokenKind::Permanent) => false,
        Ok(proto::TokenKind::Temporary) => true,
        Err(_) => {
            violations.add(field, "must be TOKEN_KIND_PERMANENT or TOKEN_KIND_TEMPORARY");
            false
        }
    }
}

/// States to list.
pub(super) fn states(field: &str, states: &[i32], violations: &mut Violations) -> Vec<ShownState> {
    let state = |(index, state): (usize, &i32)| match proto::TokenState::try_from(*state) {
        Ok(proto::TokenState::Active) => Some(ShownState::Active),
        Ok(proto::TokenState::Inactive) => Some(ShownState::Inactive),
        Ok(proto::TokenState::Expired) => Some(ShownState::Expired),
        Ok(proto::TokenState::Revoked) => Some(ShownState::Revoked),
        Ok(proto::TokenState::Unspecified) | Err(_) => {
            violations
                .add(format!("{field}[{index}]"), "must be a TokenState other than TOKEN_STATE_UNSPECIFIED; leave the list empty for all");
            None
        }
    };
    states.iter().enumerate().filter_map(state).collect()
}

/// The address of a client; empty: not known.
pub(super) fn client_ip(field: impl Into<String>, text: &str, violations: &mut Violations) -> Option<IpAddr> {
    if text.is_empty() {
        return None;
    }
    text.parse().map_err(|_| violations.add(field, "must be an IPv4 or IPv6 address, without a port")).ok()
}

/// The kind, for an answer.
pub(super) fn kind(kind: Kind) -> proto::TokenKind {
    match kind {
        Kind::Permanent => proto::TokenKind::Permanent,
        Kind::Temporary => proto::TokenKind::Temporary,
    }
}

/// The verdict, for an answer.
pub(super) fn verdict(verdict: Verdict) -> proto::Verdict {
    match verdict {
        Verdict::Valid => proto::Verdict::Valid,
        Verdict::Unknown => proto::Verdict::Unknown,
        Verdict::Revoked => proto::Verdict::Revoked,
        Verdict::Expired => proto::Verdict::Expired,
        Verdict::Inactive => proto::Verdict::Inactive,
        Verdict::PrincipalSuspended => proto::Verdict::PrincipalSuspended,
        Verdict::WorkspaceSuspended => proto::Verdict::WorkspaceSuspended,
        Verdict::WrongAudience => proto::Verdict::WrongAudience,
        Verdict::IpNotAllowed => proto::Verdict::IpNotAllowed,
        Verdict::InsufficientScope => proto::Verdict::InsufficientScope,
    }
}

/// Scopes, for an answer.
pub(super) fn scope_texts<'a>(scopes: impl IntoIterator<Item = &'a Scope>) -> Vec<String> {
    scopes.into_iter().map(|scope| scope.as_str().to_owned()).collect()
}

/// Nothing hangs on the change that any server keeps.
pub(super) fn complete() -> proto::Propagation {
    propagation(Propagation::Complete)
}

/// How far a change has got.
pub(super) fn propagation(propagation: Propagation) -> proto::Propagation {
    match propagation {
        Propagation::Complete => {
            proto::Propagation { state: proto::PropagationState::Complete.into(), complete_by: None, replicas: Vec::new() }
        }
        Propagation::Pending { complete_by, replicas } => {
            proto::Propagation { state: proto::PropagationState::Pending.into(), complete_by: complete_by.and_then(timestamp), replicas }
        }
    }
}

/// A token as it is at this instant.
pub(super) fn token(token: Token, now: Time) -> proto::Token {
    let state = match token.shown_state(now) {
        ShownState::Active => proto::TokenState::Active,
        ShownState::Inactive => proto::TokenState::Inactive,
        ShownState::Expired => proto::TokenState::Expired,
        ShownState::Revoked => proto::TokenState::Revoked,
    };
    proto::Token {
        id: token.id.to_string(),
        etag: issuer::etag(&token),
        kind: kind(token.kind).into(),
        state: state.into(),
        scopes: scope_texts(&token.scopes),
        allowed_cidrs: token.allowed_cidrs.iter().map(ToString::to_string).collect(),
        create_time: timestamp(token.create_time),
        update_time: timestamp(token.update_time),
        expire_time: timestamp(token.expire_time),
        last_used_time: token.last_used_time.and_then(timestamp),
        last_used_ip: token.last_used_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        revoke_time: token.revoke_time.and_then(timestamp),
        workspace: token.workspace,
        display_name: token.display_name,
        principal: token.principal,
        hint: token.hint,
        audiences: token.audiences,
        metadata: token.metadata,
        session_id: token.session_id,
        created_by: token.created_by,
        use_count: token.use_count,
        revoke_reason: token.revoke_reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_begins_at_midnight() {
        assert_eq!(day("2028-02-29").map(Time::micros), Ok(1_835_395_200_000_000));
        for bad in ["", "2027-02-29", "2027-13-01", "2027-4-11", "2027-04-11T10:00Z", "2027-04-31", "0000-00-00", "20270411", "2027/04/11"]
        {
            assert!(day(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn instants_round_trip() {
        for micros in [0, 1, -1, 1_800_000_000_123_456, -62_135_596_800_000_000] {
            let sent = timestamp(Time::from_micros(micros)).expect("not never");
            assert_eq!(time(&sent), Ok(Time::from_micros(micros)));
        }
        assert!(timestamp(Time::NEVER).is_none());
        for (seconds, nanos) in [(i64::MAX, 0), (SECONDS_MAX + 1, 0), (0, -1), (0, 1_000_000_000), (i64::MIN, 0)] {
            assert!(time(&Timestamp { seconds, nanos }).is_err());
        }
        for (seconds, nanos) in [(-1, 0), (i64::MIN, 0), (i64::MAX, 0), (1, -1), (2, 1_999_999_999), (60, i32::MIN)] {
            assert!(span(&WireDuration { seconds, nanos }).is_err(), "{seconds} {nanos}");
        }
    }
}
