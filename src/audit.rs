//! Who did what: the list of events, and the sample of calls that were refused.
//!
//! Changes write their events themselves, in their own transaction. A refused call changes nothing, so that its event waits in memory for the next tick.
//!
//! Invariant: however many calls are refused, few events are written, and none while the caller waits (test `refused_calls_are_sampled`).

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    rules,
    store::{AuditEvent, AuditFilter, Store},
    token::{self, Keyring, TokenId},
};

pub use crate::store::AuditRecord;

/// Refused calls that are kept at once, and how soon there is room for another one.
const REFUSALS_MAX: u32 = 50;
const REFUSAL_INTERVAL: Duration = Duration::from_millis(200);
const METHODS_MAX: usize = 20;
const METHOD_CHARS_MAX: usize = 63;
/// A page stays below what clients take by default, 4 MiB.
const PAGE_BYTES_MAX: usize = 3 * 1024 * 1024;
/// What an event takes on a page beside its settings, at most.
const EVENT_BYTES: usize = 2_048;

/// A call that was refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Who called, as far as that is known.
    pub caller: Caller,
    /// The method that was called.
    pub method: &'static str,
    /// The gRPC code of the answer.
    pub code: &'static str,
    /// When.
    pub time: Time,
}

/// Which events, how many, from where on, as it was asked for.
#[derive(Clone, Debug, Default)]
pub struct AuditRequest {
    /// Empty: the caller's.
    pub workspace: String,
    /// Empty: any.
    pub token_id: String,
    /// Empty: any.
    pub principal: String,
    /// Empty: anybody.
    pub actor: String,
    /// None: any.
    pub methods: Vec<String>,
    /// At this instant or later.
    pub start_time: Option<Time>,
    /// Before this instant.
    pub end_time: Option<Time>,
    /// 0: as usual.
    pub page_size: i32,
    /// Empty: the first page.
    pub page_token: String,
    /// Rules that were found broken while the request was read; they are reported with those that are found here.
    pub violations: Violations,
}

/// Refused calls on their way to the store, and the room that is left for more.
struct Sample {
    waiting: VecDeque<Refusal>,
    room: u32,
    since: Option<Time>,
}

/// Lists events, and samples calls that were refused.
pub struct Audit {
    keyring: Arc<Keyring>,
    store: Arc<Store>,
    sample: Mutex<Sample>,
}

impl Audit {
    /// One on this store.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, store: Arc<Store>) -> Arc<Self> {
        let sample = Sample { waiting: VecDeque::new(), room: REFUSALS_MAX, since: None };
        Arc::new(Self { keyring, store, sample: Mutex::new(sample) })
    }

    /// Takes note of a refused call, if there is room; says whether there was.
    pub fn refused(&self, refusal: Refusal) -> bool {
        let mut sample = self.sample.lock();
        // A clock that was set back begins anew.
        let since = sample.since.filter(|since| *since <= refusal.time).unwrap_or(refusal.time);
        let elapsed = u64::try_from(refusal.time.micros().saturating_sub(since.micros())).unwrap_or(0);
        let earned = elapsed / u64::try_from(REFUSAL_INTERVAL.as_micros()).unwrap_or(u64::MAX);
        sample.since = Some(since);
        if earned > 0 {
            sample.room = sample.room.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(REFUSALS_MAX);
            sample.since = Some(refusal.time);
        }
        let has_room = sample.room > 0 && sample.waiting.len() < 2 * REFUSALS_MAX as usize;
        if has_room {
            sample.room -= 1;
            sample.waiting.push_back(refusal);
        }
        has_room
    }

    /// Writes what was noted up to now.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: then it is kept for the next time.
    pub async fn tick(&self) -> Result<()> {
        let taken = std::mem::take(&mut self.sample.lock().waiting);
        let written = self.store.add_audit_events(taken.iter().map(event)).await;
        if written.is_err() {
            let mut sample = self.sample.lock();
            taken.into_iter().rev().for_each(|refusal| sample.waiting.push_front(refusal));
        }
        written
    }

    /// A page of events, the latest first, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn list(&self, caller: &Caller, request: AuditRequest) -> Result<(Vec<AuditRecord>, Option<String>)> {
        let workspace = caller.workspace(&request.workspace)?.to_owned();
        let mut violations = request.violations;
        let limit = violations.take("page_size", rules::page_size(request.page_size));
        let token_id = some(request.token_id).and_then(|id| violations.take("token_id", rules::id(&id)));
        let principal = some(request.principal).and_then(|id| violations.take("principal", rules::principal(&id)));
        let actor = some(request.actor).and_then(|id| violations.take("actor", rules::principal(&id)));
        check_methods(&request.methods, &mut violations);
        let (start_time, end_time) = (request.start_time, request.end_time);
        let filter = AuditFilter { workspace, token_id, principal, actor, methods: request.methods, start_time, end_time };
        let purpose = token::fingerprint(&[b"audit", format!("{filter:?}").as_bytes()]);
        let after = some(request.page_token).and_then(|text| violations.take("page_token", self.open_page(&purpose, &text)));
        violations.finish()?;
        let limit = limit.ok_or_else(|| Error::Internal("a violation was lost".into()))?;
        if *filter.workspace != *caller.workspace && self.store.brief(&filter.workspace).await?.is_none() {
            return Err(Error::NotFound("workspace"));
        }
        let after = after.as_ref().map(|(time, id)| (*time, id.as_str()));
        let mut events = self.store.audit_events(&filter, after, limit + 1).await?;
        let found = events.len();
        events.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        cut_to_page(&mut events);
        let more = events.len() < found;
        let cursor = |last: &AuditRecord| self.keyring.seal_text(&purpose, &format!("{} {}", last.event_time.micros(), last.id));
        let next = events.last().filter(|_| more).map(cursor).transpose()?;
        Ok((events, next))
    }

    fn open_page(&self, purpose: &[u8], text: &str) -> std::result::Result<(Time, String), &'static str> {
        let plain = self.keyring.open_text(purpose, text).ok_or(rules::PAGE_TOKEN)?;
        let (time, id) = plain.split_once(' ').ok_or(rules::PAGE_TOKEN)?;
        Ok((Time::from_micros(time.parse().map_err(|_| rules::PAGE_TOKEN)?), id.to_owned()))
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn check_methods(methods: &[String], violations: &mut Violations) {
    if methods.len() > METHODS_MAX {
        violations.add("methods", format!("must have at most {METHODS_MAX} entries; it has {}", methods.len()));
        return;
    }
    for (index, method) in methods.iter().enumerate() {
        if method.is_empty() || method.len() > METHOD_CHARS_MAX || !method.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            violations.add(format!("methods[{index}]"), "must be the name of a method, such as RevokeToken");
        }
    }
}

fn cut_to_page(events: &mut Vec<AuditRecord>) {
    let mut bytes = 0;
    let size = |settings: &Option<serde_json::Map<String, serde_json::Value>>| {
        settings.as_ref().map_or(0, |settings| serde_json::Value::Object(settings.clone()).to_string().len())
    };
    let fits = |event: &AuditRecord| {
        // Numbers and field names take more room in a Struct than in the text.
        bytes += EVENT_BYTES + 2 * (size(&event.before) + size(&event.after));
        bytes <= PAGE_BYTES_MAX
    };
    let count = events.iter().map(fits).take_while(|fits| *fits).count();
    events.truncate(count.max(1));
}

fn event(refusal: &Refusal) -> AuditEvent<'_> {
    AuditEvent {
        workspace: &refusal.caller.workspace,
        time: refusal.time,
        method: refusal.method,
        code: refusal.code,
        actor: Some(&refusal.caller),
        token_id: None::<TokenId>,
        principal: "",
        reason: "",
        before: None,
        after: None,
    }
}
