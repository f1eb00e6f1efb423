//! What is told of tokens, to whom: each step once, and nothing lost on the way.
//!
//! A scan finds the tokens that have reached a step, and in one transaction notes the step as told, raises its fault, and puts mails and calls of webhooks into
//! the outbox. Events are put there by the change that they are about. Delivering takes them from there.
//!
//! Invariant: a step of a token is told once on each channel, however many servers look at once and however they end (test
//! `each_step_is_told_once_whoever_ticks`).
//! Invariant: a receiver that does not answer holds up nobody else (test `a_receiver_that_hangs_holds_up_nobody_else`).
//! Invariant: what was overtaken, by a nearer step or by a change of the token, is not sent (test `what_was_overtaken_is_not_sent`).

mod deliver;
mod letter;
mod lists;
mod mail;
mod reach;
mod scan;
mod tell;
mod webhook;
mod words;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use self::{deliver::Destination, mail::Mailer, reach::Reach, webhook::Webhooks};
use crate::{ambient::Clock, notice::Channel, store::Store, token::Keyring};

pub(crate) use self::tell::{News, tell};
pub use self::{
    lists::{Delivery, FaultsRequest, NoticesRequest},
    mail::{SmtpUrl, check_from},
};
pub use crate::store::{FaultCounts, FaultRecord, NoticeRecord};

/// How long a notice is tried.
const GIVE_UP: Duration = Duration::from_hours(72);
/// How many receivers are served at once.
const MAIL_WORKERS_MAX: u32 = 4;
const WEBHOOK_WORKERS_MAX: u32 = 32;

/// How notices leave this server.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The mail server, and whom mails come from; none: no mail is sent.
    pub mail: Option<(SmtpUrl, String)>,
    /// Private addresses that webhooks may reach.
    pub webhook_allowed_cidrs: Vec<IpNet>,
    /// Certificates (PEM) that are trusted beside the system's.
    pub ca: Option<Vec<u8>>,
}

/// What Prometheus reads.
#[derive(Clone, Debug)]
pub struct Stats {
    /// What stood at the last scan.
    pub standing: Standing,
    /// How many were delivered since the start, and how many attempts failed.
    pub attempts: [(Channel, u64, u64); 2],
}

/// What stands at a scan.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// How many faults.
    pub faults: FaultCounts,
    /// How many notices wait, or were given up (true).
    pub outbox: Vec<(Channel, bool, i64)>,
}

/// One way out.
struct Line {
    channel: Channel,
    workers: Arc<Semaphore>,
    workers_max: u32,
    delivered: AtomicU64,
    failed: AtomicU64,
}

impl Line {
    fn new(channel: Channel, workers_max: u32) -> Self {
        let workers = Arc::new(Semaphore::new(workers_max as usize));
        Self { channel, workers, workers_max, delivered: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }
}

/// Tells what there is to tell.
pub struct Notices {
    keyring: Arc<Keyring>,
    store: Arc<Store>,
    clock: Clock,
    mailer: Option<Mailer>,
    webhooks: Webhooks,
    mail: Line,
    webhook: Line,
    destinations: Mutex<HashMap<(Channel, String), Destination>>,
    /// Where the next look for faults that are not true any more begins.
    swept: Mutex<String>,
    standing: Mutex<Standing>,
    is_stopping: AtomicBool,
}

impl Notices {
    /// One on this store.
    ///
    /// # Errors
    /// A sentence for the operator: which setting is wrong.
    pub fn new(keyring: Arc<Keyring>, store: Arc<Store>, clock: Clock, settings: Settings) -> Result<Arc<Self>, String> {
        let ca = settings.ca.as_deref();
        let mailer = settings.mail.map(|(url, from)| Mailer::new(&url, &from, ca)).transpose()?;
        let webhooks = Webhooks::new(Reach::new(settings.webhook_allowed_cidrs), ca)?;
        Ok(Arc::new(Self {
            keyring,
            store,
            clock,
            mailer,
            webhooks,
            mail: Line::new(Channel::Mail, MAIL_WORKERS_MAX),
            webhook: Line::new(Channel::Webhook, WEBHOOK_WORKERS_MAX),
            destinations: Mutex::default(),
            swept: Mutex::default(),
            standing: Mutex::default(),
            is_stopping: AtomicBool::new(false),
        }))
    }

    /// What Prometheus reads.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let attempts = [&self.mail, &self.webhook]
            .map(|line| (line.channel, line.delivered.load(Ordering::Relaxed), line.failed.load(Ordering::Relaxed)));
        Stats { standing: self.standing.lock().clone(), attempts }
    }

    fn line(&self, channel: Channel) -> &Line {
        match channel {
            Channel::Mail => &self.mail,
            Channel::Webhook => &self.webhook,
        }
    }
}
