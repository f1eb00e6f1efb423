//! The data plane: is this token good for this need, now?
//!
//! By form (no cache, no store) → digest → cache, or one flight to the store → the scope of the route, if a method and path are given → judged anew → the use
//! is marked.
//!
//! Invariant: a text that was not made with our keys costs no query (test `ten_million_invented_tokens_cost_no_query`).
//! Invariant: however many ask for a missing digest at once, one query answers them (test `one_flight_serves_all_who_wait`).
//! Invariant: who joins a flight gets its answer only if no change was announced since the flight began
//! (test `who_joins_a_flight_after_a_revocation_reads_anew`).
//! Invariant: what is judged by cached facts is judged as by facts that were just read (test `a_cached_judgement_is_a_fresh_one`).

mod flights;

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use flights::{Flights, Missing};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    ambient::{Tally, Time},
    cache::{Cache, Fact, Standing},
    caller::Caller,
    error::{Error, Result},
    grant::{Derived, Grant, Need, Verdict},
    scope::{Routes, Scope},
    store::Store,
    token::{Digest, Keyring, TokenId},
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
    pub grant: Option<Grant>,
    /// The scope of the route that the method and path lead to.
    pub derived_scope: Option<Scope>,
}

impl Answer {
    const UNKNOWN: Self = Self { verdict: Verdict::Unknown, grant: None, derived_scope: None };

    /// The same by reference.
    #[must_use]
    pub fn judgement(&self) -> Judgement<'_> {
        Judgement { verdict: self.verdict, grant: self.grant.as_ref(), derived_scope: self.derived_scope.as_ref() }
    }
}

/// As [`Answer`], by reference: nothing was copied for it.
#[derive(Clone, Copy, Debug)]
pub struct Judgement<'a> {
    /// Why, or why not.
    pub verdict: Verdict,
    /// The facts that were judged, if the caller may see the token.
    pub grant: Option<&'a Grant>,
    /// The scope of the route that the method and path lead to.
    pub derived_scope: Option<&'a Scope>,
}

impl Judgement<'_> {
    const UNKNOWN: Self = Self { verdict: Verdict::Unknown, grant: None, derived_scope: None };

    /// The token whose use counts.
    #[must_use]
    pub fn used(&self, question: &Question<'_>) -> Option<TokenId> {
        self.grant.filter(|_| self.verdict == Verdict::Valid && !question.peek).map(Grant::token_id)
    }
}

/// The HTTP request that a token came with, as it was received.
#[derive(Clone, Copy, Debug)]
pub struct HttpRequest<'a> {
    /// Its method.
    pub method: &'a str,
    /// Its path, still encoded.
    pub path: &'a str,
}

/// Who is calling.
#[derive(Clone, Debug)]
pub enum Identity {
    /// A caller who may come in.
    Good(Caller),
    /// Somebody who may not: who it would be, if that is known.
    Refused(Option<Caller>),
}

/// One question of a batch.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The presented text.
    pub text: &'a [u8],
    /// What the use needs.
    pub need: Need<'a>,
    /// The request whose route says which scope the use needs beside that.
    pub http: Option<HttpRequest<'a>>,
    /// Judge without counting a use.
    pub peek: bool,
}

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
    /// Bytes that it has taken.
    pub cached_bytes: usize,
}

/// Judges tokens.
pub struct Validator {
    keyring: Arc<Keyring>,
    cache: Arc<Cache>,
    store: Arc<Store>,
    usage: Arc<Usage>,
    flights: Arc<Flights<Digest, Fact>>,
    route_flights: Arc<Flights<Arc<str>, Arc<Routes>>>,
    permits: Arc<Semaphore>,
    hits: Tally,
    misses: Tally,
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
            flights: Arc::default(),
            route_flights: Arc::default(),
            permits: Arc::new(Semaphore::new(FLIGHTS_MAX)),
            hits: Tally::default(),
            misses: Tally::default(),
        })
    }

    /// How it has gone so far.
    pub fn stats(&self) -> Stats {
        Stats {
            hits: self.hits.sum(),
            misses: self.misses.sum(),
            flights: FLIGHTS_MAX - self.permits.available_permits(),
            cached: self.cache.len(),
            cached_bytes: self.cache.bytes(),
        }
    }

    /// Judges one token.
    ///
    /// # Errors
    /// `Unavailable` and `Overloaded`, when the store has to be asked and does not answer. Never about the token.
    pub async fn validate(self: &Arc<Self>, question: Question<'_>, now: Time) -> Result<Answer> {
        match self.keyring.prove(question.text) {
            Some(digest) => self.validate_digest(digest, question, now).await,
            None => Ok(Answer::UNKNOWN),
        }
    }

    async fn validate_digest(self: &Arc<Self>, digest: Digest, question: Question<'_>, now: Time) -> Result<Answer> {
        let fact = match self.cache.get(&digest) {
            Some(fact) => {
                self.hits.add(1);
                fact
            }
            None => self.fetch(digest).await?,
        };
        let routes = self.routes_for(&fact, &question).await?;
        Ok(self.judge(fact, &question, routes.as_deref(), now))
    }

    /// The digest of a text that was made with one of our keys; nothing for any other text, which no store needs to be asked about.
    #[must_use]
    pub fn prove(&self, text: &[u8]) -> Option<Digest> {
        self.keyring.prove(text)
    }

    /// Judges by what memory knows, at once; nothing if the store has to be asked. `tell` hears the judgement. Nothing is counted yet.
    pub fn judge_known<T>(
        &self,
        digest: Option<Digest>,
        question: &Question<'_>,
        now: Time,
        tell: impl FnOnce(Judgement<'_>) -> T,
    ) -> Option<T> {
        let Some(digest) = digest else { return Some(tell(Judgement::UNKNOWN)) };
        let mut grant = Grant::default();
        if !self.cache.copy(&digest, &mut grant) {
            return None;
        }
        let routes = match workspace_of_routes(&grant, question) {
            Some(workspace) => Some(self.cache.routes(workspace)?),
            None => None,
        };
        Some(tell(judge(&grant, question, routes.as_deref(), now)))
    }

    /// Counts the use that was judged.
    fn count_use(&self, question: &Question<'_>, judgement: Judgement<'_>, now: Time) {
        if let Some(token_id) = judgement.used(question) {
            self.count(token_id, question.need.client_ip, now);
        }
    }

    /// Counts tokens that [`Validator::judge_known`] has judged.
    pub fn count_hits(&self, count: u64) {
        self.hits.add(count);
    }

    /// Counts one use of a token.
    pub fn count(&self, token_id: TokenId, client_ip: Option<IpAddr>, now: Time) {
        self.usage.mark(token_id, client_ip, now);
    }

    /// Says which digests will be asked about: see [`Cache::bring_near`].
    pub fn bring_near(&self, digests: impl Iterator<Item = Digest> + Clone) {
        self.cache.bring_near(digests);
    }

    /// Judges tokens, each by itself; the answers come in the order of the questions. What the cache does not know is read together.
    ///
    /// # Errors
    /// As [`Validator::validate`]; then none is judged.
    pub async fn validate_batch(self: &Arc<Self>, questions: &[Question<'_>], now: Time) -> Result<Vec<Answer>> {
        let digests: Vec<Option<Digest>> = questions.iter().map(|question| self.keyring.prove(question.text)).collect();
        self.cache.bring_near(digests.iter().copied().flatten());
        let known: Vec<Option<Fact>> = digests.iter().map(|digest| digest.and_then(|digest| self.cache.get(&digest))).collect();
        let mut missing: Vec<Digest> =
            digests.iter().zip(&known).filter(|(_, fact)| fact.is_none()).filter_map(|(digest, _)| *digest).collect();
        missing.sort_unstable_by_key(|digest| *digest.as_bytes());
        missing.dedup();
        let hits = known.iter().flatten().count();
        self.hits.add(u64::try_from(hits).unwrap_or(0));
        self.misses.add(u64::try_from(missing.len()).unwrap_or(0));
        let read = self.read(&missing).await?;
        let facts = digests.iter().zip(known).map(|(digest, fact)| {
            let fact = fact.or_else(|| digest.as_ref().and_then(|digest| read.get(digest)).cloned());
            fact.unwrap_or(Fact::Absent)
        });
        let mut answers = Vec::with_capacity(questions.len());
        for (fact, question) in facts.zip(questions) {
            let routes = self.routes_for(&fact, question).await?;
            answers.push((fact, question, routes));
        }
        Ok(answers.into_iter().map(|(fact, question, routes)| self.judge(fact, question, routes.as_deref(), now)).collect())
    }

    /// Who presents this token to Keyward itself.
    ///
    /// # Errors
    /// As [`Validator::validate`].
    pub async fn identify(self: &Arc<Self>, text: &[u8], address: Option<IpAddr>, peek: bool, now: Time) -> Result<Identity> {
        let need = Need { client_ip: address, ..Need::default() };
        let Some(digest) = self.keyring.prove(text) else { return Ok(Identity::Refused(None)) };
        let answer = self.validate_digest(digest, Question { text, need, http: None, peek }, now).await?;
        let caller = |grant: &Grant| Caller::of_grant(grant, Some(digest), address);
        Ok(match answer.grant {
            Some(grant) if answer.verdict == Verdict::Valid => Identity::Good(caller(&grant)),
            grant => Identity::Refused(grant.map(|grant| caller(&grant))),
        })
    }

    /// Who comes with a client certificate that stands for this caller.
    ///
    /// # Errors
    /// As [`Validator::validate`].
    pub async fn identify_certificate(&self, caller: &Caller) -> Result<Identity> {
        let standing = match self.cache.standing(&caller.workspace, &caller.principal) {
            Some(standing) => standing,
            None => self.standing(caller).await?,
        };
        let caller = Caller { has_admin_role: standing.is_admin, ..caller.clone() };
        Ok(if standing.is_suspended { Identity::Refused(Some(caller)) } else { Identity::Good(caller) })
    }

    async fn standing(&self, caller: &Caller) -> Result<Standing> {
        let _permit = self.permit()?;
        let ticket = self.cache.ticket();
        let (is_suspended, is_admin) = self.store.standing(&caller.workspace, &caller.principal).await?;
        let standing = Standing { is_suspended, is_admin };
        // Somebody who is not there yet may be made by the first use of their name, which other servers do not hear of: a refusal is not kept.
        // Not admitted is fine: this call began before the change was announced.
        let _admitted = !is_suspended && self.cache.admit_standing(&caller.workspace, &caller.principal, standing, ticket);
        Ok(standing)
    }

    /// Judges by facts that were read, and counts the use.
    fn judge(&self, fact: Fact, question: &Question<'_>, routes: Option<&Routes>, now: Time) -> Answer {
        let Fact::Grant(grant) = fact else { return Answer::UNKNOWN };
        let judgement = judge(&grant, question, routes, now);
        self.count_use(question, judgement, now);
        let (verdict, is_told, derived_scope) = (judgement.verdict, judgement.grant.is_some(), judgement.derived_scope.cloned());
        Answer { verdict, grant: is_told.then_some(grant), derived_scope }
    }

    /// The routes that a question is about.
    async fn routes_for(self: &Arc<Self>, fact: &Fact, question: &Question<'_>) -> Result<Option<Arc<Routes>>> {
        match fact {
            Fact::Grant(grant) => match workspace_of_routes(grant, question) {
                Some(workspace) => self.routes(&workspace.into()).await.map(Some),
                None => Ok(None),
            },
            Fact::Absent => Ok(None),
        }
    }

    async fn routes(self: &Arc<Self>, workspace: &Arc<str>) -> Result<Arc<Routes>> {
        if let Some(routes) = self.cache.routes(workspace) {
            return Ok(routes);
        }
        let begin = || {
            let (reader, admitter) = (Arc::clone(self), Arc::clone(self));
            let (ours, theirs) = (Arc::clone(workspace), Arc::clone(workspace));
            let ticket = self.cache.ticket();
            let read = async move {
                let resources = reader.store.resources(&ours).await?;
                let compiled = Routes::compile(&resources);
                compiled.map(Arc::new).map_err(|_| Error::Internal("a stored table of routes breaks its rules".into()))
            };
            (read, move |routes: &Arc<Routes>| admitter.cache.admit_routes(&theirs, routes, ticket))
        };
        let look = || self.cache.routes(workspace);
        self.route_flights.fetch(workspace, Missing { look, permit: || self.permit(), begin }).await
    }

    /// Reads a digest that the cache does not know, together with everybody else who asks for it now.
    async fn fetch(self: &Arc<Self>, digest: Digest) -> Result<Fact> {
        self.misses.add(1);
        let begin = || {
            let (reader, admitter) = (Arc::clone(self), Arc::clone(self));
            let ticket = self.cache.ticket();
            let read = async move {
                let found = reader.store.facts(&[digest]).await?;
                Ok(found.into_iter().next().map_or(Fact::Absent, |(_, grant)| Fact::Grant(grant)))
            };
            (read, move |fact: &Fact| admitter.cache.admit(digest, fact, ticket))
        };
        let look = || self.cache.get(&digest);
        self.flights.fetch(&digest, Missing { look, permit: || self.permit(), begin }).await
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
            let _admitted = self.cache.admit(*digest, fact, ticket);
        }
        Ok(facts)
    }
}

/// Judges by facts, by the same rules wherever they came from. An empty grant is that of no token.
fn judge<'a>(grant: &'a Grant, question: &Question<'_>, routes: Option<&'a Routes>, now: Time) -> Judgement<'a> {
    if grant.as_memory().is_empty() {
        return Judgement::UNKNOWN;
    }
    let derived_scope = match (question.http, routes) {
        (Some(http), Some(routes)) => routes.scope_of(http.method, http.path),
        _ => None,
    };
    let derived = match (question.http, derived_scope) {
        (None, _) => Derived::NotAsked,
        (Some(_), None) => Derived::NoRoute,
        (Some(_), Some(scope)) => Derived::Scope(scope.as_str()),
    };
    match grant.judge(&Need { derived, ..question.need }, now) {
        Verdict::Unknown => Judgement::UNKNOWN,
        verdict => Judgement { verdict, grant: Some(grant), derived_scope },
    }
}

/// The workspace whose routes a question is about: the token's, if the caller may ask about it.
fn workspace_of_routes<'a>(grant: &'a Grant, question: &Question<'_>) -> Option<&'a str> {
    let is_asked = question.http.is_some() && question.need.workspace.is_none_or(|reach| reach == grant.workspace());
    (is_asked && !grant.as_memory().is_empty()).then(|| grant.workspace())
}
