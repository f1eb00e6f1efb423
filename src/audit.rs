//! Who did what: the list of events, and the sample of calls that were refused.
//!
//! Changes write their events themselves, in their own transaction. A refused call changes nothing, so that its event waits in memory for the next tick.
//!
//! Invariant: however many calls are refused, few events are written, and none while the caller waits (test `refused_calls_are_sampled`).

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

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

/// Refused calls of one workspace that are kept at once, and how soon there is room for another one. No workspace uses up the room of another.
const REFUSALS_MAX: u32 = 100;
const REFUSAL_INTERVAL: Duration = Duration::from_secs(10);
/// Refused calls that wait for the store, all together.
const WAITING_MAX: usize = 1_000;
/// Workspaces whose room is remembered; those with the most room are forgotten first.
const WORKSPACES_MAX: usize = 10_000;
/// Refused calls that are written in one statement: below the databases' limits on parameters.
const ROWS_MAX: usize = 500;
/// Events that are read at once: their settings may be large.
const CHUNK: u64 = 20;
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

/// The room that is left for refused calls of a workspace.
struct Room {
    left: u32,
    since: Time,
}

impl Room {
    /// Earns room for the time that has passed. A clock that was set back begins anew.
    fn earn(&mut self, now: Time) {
        let passed = u64::try_from(now.micros().saturating_sub(self.since.micros()));
        let earned = passed.map_or(0, |passed| passed / u64::try_from(REFUSAL_INTERVAL.as_micros()).unwrap_or(u64::MAX));
        if earned > 0 || passed.is_err() {
            self.left = self.left.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(REFUSALS_MAX);
            self.since = now;
        }
    }
}

/// Refused calls on their way to the store.
#[derive(Default)]
struct Sample {
    waiting: VecDeque<Refusal>,
    rooms: HashMap<Arc<str>, Room>,
}

impl Sample {
    fn has_room(&mut self, refusal: &Refusal) -> bool {
        if self.waiting.len() >= WAITING_MAX {
            return false;
        }
        if self.rooms.len() >= WORKSPACES_MAX {
            self.rooms.retain(|_, room| {
                room.earn(refusal.time);
                room.left < REFUSALS_MAX
            });
        }
        let room = self.rooms.entry(Arc::clone(&refusal.caller.workspace)).or_insert(Room { left: REFUSALS_MAX, since: refusal.time });
        room.earn(refusal.time);
        let has_room = room.left > 0;
        room.left = room.left.saturating_sub(1);
        has_room
    }
}

/// Lists events, and samples calls that were refused.
pub struct Audit {
    keyring: Arc<Keyring>,
    store: Arc<Store>,
    sample: Mutex<Sample>,
    writing: tokio::sync::Mutex<()>,
}

impl Audit {
    /// One on this store.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, store: Arc<Store>) -> Arc<Self> {
        Arc::new(Self { keyring, store, sample: Mutex::default(), writing: tokio::sync::Mutex::default() })
    }

    /// Takes note of a refused call, if there is room; says whether there was.
    pub fn refused(&self, refusal: Refusal) -> bool {
        let mut sample = self.sample.lock();
        let has_room = sample.has_room(&refusal);
        if has_room {
            sample.waiting.push_back(refusal);
        }
        has_room
    }

    /// Writes what was noted up to now.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`: what is not written is kept for the next time.
    pub async fn tick(&self) -> Result<()> {
        let _alone = self.writing.lock().await;
        loop {
            // It stays where it is until it is written, so that what waits is bounded however long that takes.
            let chunk: Vec<Refusal> = self.sample.lock().waiting.iter().take(ROWS_MAX).cloned().collect();
            if chunk.is_empty() {
                return Ok(());
            }
            self.store.add_audit_events(chunk.iter().map(event)).await?;
            self.sample.lock().waiting.drain(..chunk.len());
        }
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
        let (events, more) = self.read(&filter, after, limit).await?;
        let cursor = |last: &AuditRecord| self.keyring.seal_text(&purpose, &format!("{} {}", last.event_time.micros(), last.id));
        let next = events.last().filter(|_| more).map(cursor).transpose()?;
        Ok((events, next))
    }

    /// Reads at most `limit` events, and no more than fit on a page; says whether there are more.
    async fn read(&self, filter: &AuditFilter, mut after: Option<(Time, String)>, limit: u64) -> Result<(Vec<AuditRecord>, bool)> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut events, mut bytes) = (Vec::new(), 0);
        loop {
            let chunk = self.store.audit_events(filter, after.as_ref().map(|(time, id)| (*time, id.as_str())), CHUNK).await?;
            let is_last = chunk.len() < usize::try_from(CHUNK).unwrap_or(usize::MAX);
            for event in chunk {
                bytes += size(&event);
                if events.len() == limit || (bytes > PAGE_BYTES_MAX && !events.is_empty()) {
                    return Ok((events, true));
                }
                after = Some((event.event_time, event.id.clone()));
                events.push(event);
            }
            if is_last {
                return Ok((events, false));
            }
        }
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

/// What an event takes on a page, roughly: numbers and field names take more room in a Struct than in the text.
fn size(event: &AuditRecord) -> usize {
    let settings = |settings: &Option<serde_json::Map<String, serde_json::Value>>| {
        settings.as_ref().map_or(0, |settings| settings.iter().map(|(name, value)| name.len() + value.to_string().len()).sum())
    };
    let (before, after): (usize, usize) = (settings(&event.before), settings(&event.after));
    EVENT_BYTES + 2 * (before + after)
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
