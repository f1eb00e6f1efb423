//! The data plane: is this token good for this need, now?
//!
//! By form (no cache, no store) → digest → cache, or one flight to the store → judged anew → the use is marked.
//!
//! Invariant: a text that was not made with our keys costs no query (test `ten_million_invented_tokens_cost_no_query`).
//! Invariant: however many ask for a missing digest at once, one query answers them (test `one_flight_serves_all_who_wait`).
//! Invariant: who joins a flight gets its answer only if no change was announced since the flight began
//! (test `who_joins_a_flight_after_a_revocation_reads_anew`).

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{
    ambient::Time,
    cache::{Cache, Fact, Ticket},
    caller::Caller,
    error::{Error, Result},
    grant::{Grant, Need, Verdict},
    store::Store,
    token::{Digest, Keyring},
    usage::Usage,
};

/// Missing digests that are read at once; more are refused rather than queued.
const FLIGHTS_MAX: usize = 1_024;

/// The judgement of one token. The grant is there if the caller may see the token.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Why, or why not.
    pub verdict: Verdict,
    /// The facts that were judged.
    pub grant: Option<Arc<Grant>>,
}

/// One question of a batch.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The presented text.
    pub text: &'a [u8],
    /// What the use needs.
    pub need: Need<'a>,
    /// Judge without counting a use.
    pub peek: bool,
}

/// What became of a flight, as those hear it who wait for it.
#[derive(Clone)]
enum Landing {
    /// Everybody may have it.
    Admitted(Fact),
    /// A change was announced meanwhile: only the call that began the flight may have it.
    Overtaken(Fact),
    /// It failed.
    Failed(Arc<Error>),
}

type Flights = Mutex<HashMap<Digest, watch::Receiver<Option<Landing>>>>;

/// How often the cache answered and how often the store was asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Tokens judged by what the cache knew.
    pub hits: u64,
    /// Tokens that the cache did not know.
    pub misses: u64,
    /// Reads of the store on their way.
    pub flights: usize,
    /// Tokens in the cache.
    pub cached: usize,
}

/// Judges tokens.
pub struct Validator {
    keyring: Arc<Keyring>,
    cache: Arc<Cache>,
    store: Arc<Store>,
    usage: Arc<Usage>,
    flights: Flights,
    permits: Arc<Semaphore>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Validator {
    /// One that judges by this store's facts.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, cache: Arc<Cache>, store: Arc<Store>, usage: Arc<Usage>) -> Arc<Self> {
        Arc::new(Self {
            keyring,
            cache,
            store,
            usage,
            flights: Flights::default(),
            permits: Arc::new(Semaphore::new(FLIGHTS_MAX)),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        })
    }

    /// How it has gone so far.
    pub fn stats(&self) -> Stats {
        Stats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            flights: FLIGHTS_MAX - self.permits.available_permits(),
            cached: self.cache.len(),
        }
    }

    /// Judges one token.
    ///
    /// # Errors
    /// `Unavailable` and `Overloaded`, when the store has to be asked and does not answer. Never about the token.
    pub async fn validate(self: &Arc<Self>, question: Question<'_>, now: Time) -> Result<Answer> {
        let Some(digest) = self.keyring.prove(question.text) else {
            return Ok(Answer { verdict: Verdict::Unknown, grant: None });
        };
        let fact = match self.cache.get(&digest) {
            Some(fact) => {
                self.hits.fetch_add(1, Ordering::Relaxed);
                fact
            }
            None => self.fetch(digest).await?,
        };
        Ok(self.judge(&fact, &question, now))
    }

    /// Judges tokens, each by itself; the answers come in the order of the questions. What the cache does not know is read together.
    ///
    /// # Errors
    /// As [`Validator::validate`]; then none is judged.
    pub async fn validate_batch(&self, questions: &[Question<'_>], now: Time) -> Result<Vec<Answer>> {
        let digests: Vec<Option<Digest>> = questions.iter().map(|question| self.keyring.prove(question.text)).collect();
        let known: Vec<Option<Fact>> = digests.iter().map(|digest| digest.and_then(|digest| self.cache.get(&digest))).collect();
        let mut missing: Vec<Digest> =
            digests.iter().zip(&known).filter(|(_, fact)| fact.is_none()).filter_map(|(digest, _)| *digest).collect();
        missing.sort_unstable_by_key(|digest| *digest.as_bytes());
        missing.dedup();
        let hits = known.iter().flatten().count();
        self.hits.fetch_add(u64::try_from(hits).unwrap_or(0), Ordering::Relaxed);
        self.misses.fetch_add(u64::try_from(missing.len()).unwrap_or(0), Ordering::Relaxed);
        let read = self.read(&missing).await?;
        let unknown = Fact::Absent;
        let facts = digests
            .iter()
            .zip(&known)
            .map(|(digest, fact)| fact.as_ref().or_else(|| digest.as_ref().and_then(|digest| read.get(digest))).unwrap_or(&unknown));
        Ok(facts.zip(questions).map(|(fact, question)| self.judge(fact, question, now)).collect())
    }

    /// Who presents this token to Keyward itself.
    ///
    /// # Errors
    /// `Unauthenticated` if the token is not good; otherwise as [`Validator::validate`].
    pub async fn identify(self: &Arc<Self>, text: &[u8], address: Option<IpAddr>, peek: bool, now: Time) -> Result<Caller> {
        let need = Need { client_ip: address, ..Need::default() };
        match self.validate(Question { text, need, peek }, now).await? {
            Answer { verdict: Verdict::Valid, grant: Some(grant) } => Ok(Caller::of_grant(&grant, address)),
            _ => {
                Err(Error::Unauthenticated("the bearer token is unknown, has ended, is switched off or may not be used from this address"))
            }
        }
    }

    fn judge(&self, fact: &Fact, question: &Question<'_>, now: Time) -> Answer {
        let Fact::Grant(grant) = fact else {
            return Answer { verdict: Verdict::Unknown, grant: None };
        };
        let verdict = grant.judge(&question.need, now);
        if verdict == Verdict::Valid && !question.peek {
            self.usage.mark(grant.token_id, question.need.client_ip, now);
        }
        Answer { verdict, grant: (verdict != Verdict::Unknown).then(|| Arc::clone(grant)) }
    }

    /// Reads a digest that the cache does not know, together with everybody else who asks for it now.
    async fn fetch(self: &Arc<Self>, digest: Digest) -> Result<Fact> {
        self.misses.fetch_add(1, Ordering::Relaxed);
        let (flight, began) = self.join(digest)?;
        if let Some(fact) = land(flight, began).await? {
            return Ok(fact);
        }
        // A flight leaves the list before it lands, so that whichever is in the list now began after this call did.
        let (flight, _) = self.join(digest)?;
        land(flight, true).await?.ok_or_else(|| Error::Internal("a look-up ended without an answer".into()))
    }

    /// Joins the flight for a digest, or begins one; says whether it did.
    fn join(self: &Arc<Self>, digest: Digest) -> Result<(watch::Receiver<Option<Landing>>, bool)> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&digest) {
            return Ok((flight.clone(), false));
        }
        let permit = self.permit()?;
        let (landing, flight) = watch::channel(None);
        flights.insert(digest, flight.clone());
        let entry = Entry { validator: Arc::clone(self), digest };
        // On its own, so that the others get their answer even if the first to ask goes away.
        tokio::spawn(entry.fly(landing, self.cache.ticket(), permit));
        Ok((flight, true))
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        permit.map_err(|_| Error::Overloaded("too many tokens are being looked up at once; try again"))
    }

    /// Reads digests for this call alone.
    async fn read(&self, digests: &[Digest]) -> Result<HashMap<Digest, Fact>> {
        if digests.is_empty() {
            return Ok(HashMap::new());
        }
        let _permit = self.permit()?;
        let ticket = self.cache.ticket();
        let found = self.store.facts(digests).await?;
        let mut facts: HashMap<Digest, Fact> = digests.iter().map(|digest| (*digest, Fact::Absent)).collect();
        facts.extend(found.into_iter().map(|(digest, grant)| (digest, Fact::Grant(grant))));
        for (digest, fact) in &facts {
            // Not admitted is fine: this call began before the change was announced.
            let _admitted = self.cache.admit(*digest, fact.clone(), ticket);
        }
        Ok(facts)
    }
}

/// A flight's place in the list of flights, given up when it lands, however it ends.
struct Entry {
    validator: Arc<Validator>,
    digest: Digest,
}

impl Entry {
    async fn fly(self, landing: watch::Sender<Option<Landing>>, ticket: Ticket, permit: OwnedSemaphorePermit) {
        let read = self.validator.store.facts(&[self.digest]).await;
        let (validator, digest) = (Arc::clone(&self.validator), self.digest);
        // First nobody can join any more, then it is seen whether a change was announced: whoever joined had asked before that.
        drop(self);
        let outcome = match read {
            Err(error) => Landing::Failed(Arc::new(error)),
            Ok(found) => {
                let fact = found.into_iter().next().map_or(Fact::Absent, |(_, grant)| Fact::Grant(grant));
                if validator.cache.admit(digest, fact.clone(), ticket) { Landing::Admitted(fact) } else { Landing::Overtaken(fact) }
            }
        };
        drop(permit);
        landing.send_replace(Some(outcome));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.validator.flights.lock().remove(&self.digest);
    }
}

/// What a flight brings; nothing if it is not for this call, or came down without landing.
async fn land(mut flight: watch::Receiver<Option<Landing>>, overtaken_too: bool) -> Result<Option<Fact>> {
    match flight.wait_for(Option::is_some).await.ok().and_then(|landing| landing.clone()) {
        Some(Landing::Admitted(fact)) => Ok(Some(fact)),
        Some(Landing::Overtaken(fact)) if overtaken_too => Ok(Some(fact)),
        Some(Landing::Failed(error)) => Err(shared(&error)),
        Some(Landing::Overtaken(_)) | None => Ok(None),
    }
}

/// The same failure for everybody who waited.
fn shared(error: &Arc<Error>) -> Error {
    match error.as_ref() {
        Error::Overloaded(text) => Error::Overloaded(text),
        Error::Unavailable(_) => Error::Unavailable(Box::new(Arc::clone(error))),
        _ => Error::Internal(Box::new(Arc::clone(error))),
    }
}
