//! A server that is killed at any moment: what it acknowledged is there when the next one starts, and nothing is there by half.
//!
//! One database goes through all rounds. In each, clients change tokens, each its own, until the process gets SIGKILL. Then the next process
//! is asked and the tables are read: a change that was acknowledged must be there, with its audit row; the one that a client was waiting for may
//! be there or not, but as a whole, and asking again with its `request_id` makes it exactly once. `KEYWARD_TEST_CRASHES` is the number of
//! rounds, `KEYWARD_TEST_SEED` what chance begins with (the operating system's scheduling remains chance).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use keyward::proto::{self, Verdict};
use sea_orm::{DatabaseConnection, QueryResult};
use tokio::task::{JoinHandle, JoinSet};
use tonic::{Code, Status};

use crate::{
    process::{Process, Site, number, rows, text},
    world::{self, Actor, Backend, eventually},
};

const ROUNDS: u64 = 200;
const CLIENTS: u64 = 8;
/// Tokens that are not revoked, of one client.
const LIVE_MAX: usize = 20;
/// How long PostgreSQL may take to notice that a process is gone.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(20);

mod sqlite {
    #[test]
    fn no_acknowledged_change_is_lost_by_kill_nine() {
        super::run(crate::world::Backend::Sqlite);
    }
}

mod postgres {
    #[test]
    fn no_acknowledged_change_is_lost_by_kill_nine() {
        super::run(crate::world::Backend::Postgres);
    }
}

/// What would be half a change: each counts the rows that must not be there, among those that changed since `{since}`.
const HALVES: [(&str, &str); 11] = [
    (
        "a token without one audit row for each of its versions",
        "SELECT COUNT(*) FROM token t WHERE t.update_time >= {since} AND t.version <> (SELECT COUNT(*) FROM audit_event a WHERE a.token_id = t.id)",
    ),
    (
        "an audit row without its token",
        "SELECT COUNT(*) FROM audit_event a WHERE a.workspace = 'default' AND a.event_time >= {since} \
         AND a.token_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM token t WHERE t.id = a.token_id)",
    ),
    (
        "a revoked token without its time, or the reverse",
        "SELECT COUNT(*) FROM token WHERE update_time >= {since} AND (state = 3) <> (revoke_time IS NOT NULL)",
    ),
    (
        "an old secret without its end, or the reverse",
        "SELECT COUNT(*) FROM token WHERE update_time >= {since} AND (previous_digest IS NULL) <> (previous_expire_time IS NULL)",
    ),
    (
        "a token whose principal is missing",
        "SELECT COUNT(*) FROM token t WHERE t.update_time >= {since} \
         AND NOT EXISTS (SELECT 1 FROM principal p WHERE p.workspace = t.workspace AND p.id = t.principal)",
    ),
    (
        "a principal that was made without an audit row",
        "SELECT COUNT(*) FROM principal p WHERE p.create_time >= {since} AND p.id <> 'root' AND NOT EXISTS (SELECT 1 FROM audit_event a \
         WHERE a.workspace = p.workspace AND a.principal = p.id AND a.token_id IS NULL AND a.code = 'OK')",
    ),
    (
        "a token whose audiences are not all listed",
        "SELECT COUNT(*) FROM token t WHERE t.update_time >= {since} AND (SELECT COUNT(*) FROM token_audience a WHERE a.token_id = t.id) <> \
         CASE WHEN audiences = '' THEN 0 ELSE LENGTH(audiences) - LENGTH(REPLACE(audiences, ' ', '')) + 1 END",
    ),
    (
        "a listed audience that its token does not name",
        "SELECT COUNT(*) FROM token_audience a LEFT JOIN token t ON t.id = a.token_id \
         WHERE t.id IS NULL OR ' ' || t.audiences || ' ' NOT LIKE '% ' || a.audience || ' %'",
    ),
    (
        "a change number without its audit row, or the reverse",
        "SELECT COUNT(*) FROM change_head WHERE seq <> (SELECT COUNT(*) FROM audit_event WHERE method <> 'CreateToken' AND code = 'OK')",
    ),
    (
        "a change number without its log row, or the reverse",
        "SELECT COUNT(*) FROM change_head h, (SELECT MIN(seq) AS low, MAX(seq) AS high, COUNT(DISTINCT seq) AS many FROM change_log) l \
         WHERE l.many > 0 AND (h.seq <> l.high OR l.many <> l.high - l.low + 1)",
    ),
    ("a request_id without its answer", "SELECT COUNT(*) FROM replay WHERE answer = request"),
];

fn run(backend: Backend) {
    if backend == Backend::Postgres && world::postgres().is_none() {
        return world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    }
    world::runtime().block_on(rounds(backend, number_from("KEYWARD_TEST_CRASHES").unwrap_or(ROUNDS)));
}

async fn rounds(backend: Backend, rounds: u64) {
    let seed = number_from("KEYWARD_TEST_SEED").unwrap_or_else(|| u64::try_from(micros()).unwrap());
    println!("{backend:?}: {rounds} rounds, KEYWARD_TEST_SEED={seed}");
    let mut random = Random(seed);
    let mut story = Rounds::new(backend).await;
    let mut clients: Vec<Client> = (0..CLIENTS).map(|number| Client::new(number, random.next())).collect();
    let begin = Instant::now();
    // The first start makes the keyring, the tables and the root token, and has to stand being killed as well.
    for _ in 0..5 {
        story.kill_early(&mut random).await;
    }
    let mut process = story.serve(&mut random).await;
    let mut since = micros();
    for _ in 0..rounds {
        clients = story.traffic(process, clients, Duration::from_micros(20_000 + random.below(130_000))).await;
        let ended = story.sessions_end_after_kill().await;
        process = story.serve(&mut random).await;
        story.sessions_end = story.sessions_end.max(ended.await.expect("the sessions of the killed process end"));
        let read = micros();
        story.examine(&mut clients, &process, since).await;
        since = read;
    }
    for client in &mut clients {
        client.touched = client.held.keys().map(|id| (id.clone(), 0)).collect();
    }
    story.examine(&mut clients, &process, 0).await;
    if backend == Backend::Sqlite {
        assert_eq!(text(&story.site.db().await, "PRAGMA integrity_check").await, "ok");
    }
    let acknowledged: usize = clients.iter().map(|client| client.acknowledged).sum();
    println!(
        "{backend:?}: {rounds} rounds in {:.1} s: {acknowledged} acknowledged changes, none lost; {}",
        begin.elapsed().as_secs_f64(),
        story.story()
    );
    assert!(acknowledged as u64 > rounds, "the clients hardly changed anything");
}

/// One database through all rounds, and what happened in them.
struct Rounds {
    site: Site,
    /// Changes that were under way at a kill: all, and those that were made.
    pending: (usize, usize),
    /// Processes that were killed while they started.
    killed_early: usize,
    /// The longest time that PostgreSQL took to end the sessions of a process that was killed.
    sessions_end: Duration,
}

impl Rounds {
    async fn new(backend: Backend) -> Self {
        let mut site = Site::new(backend).await;
        // Changes wait for the process before until its lease has ended.
        site.arguments = ["--lease", "1s"].map(str::to_owned).to_vec();
        Self { site, pending: (0, 0), killed_early: 0, sessions_end: Duration::ZERO }
    }

    fn story(&self) -> String {
        let ((under_way, made), early) = (self.pending, self.killed_early);
        let sessions = match self.site.backend {
            Backend::Sqlite => String::new(),
            Backend::Postgres => format!("; its sessions ended within {:?}", self.sessions_end),
        };
        format!("{under_way} were under way at a kill, {made} of them made; {early} processes were killed while they started{sessions}")
    }

    /// Starts a process that serves; kills one while it starts, now and then.
    async fn serve(&mut self, random: &mut Random) -> Process {
        while random.below(8) == 0 {
            self.kill_early(random).await;
        }
        self.site.start().await
    }

    /// Starts a process and kills it, most often before it serves.
    async fn kill_early(&mut self, random: &mut Random) {
        let early = self.site.spawn();
        tokio::time::sleep(Duration::from_micros(random.below(40_000))).await;
        early.kill();
        self.killed_early += 1;
    }

    /// Lets the clients work, and kills the process amid that.
    async fn traffic(&mut self, process: Process, clients: Vec<Client>, span: Duration) -> Vec<Client> {
        let killed = Arc::new(AtomicBool::new(false));
        let mut work = JoinSet::new();
        for client in clients {
            let (actor, killed) = (self.site.root(&process).await, Arc::clone(&killed));
            work.spawn(client.work(actor, killed));
        }
        tokio::time::sleep(span).await;
        killed.store(true, Ordering::SeqCst);
        process.kill();
        let mut clients = work.join_all().await;
        clients.sort_unstable_by_key(|client| client.number);
        clients
    }

    /// Waits until the sessions of the process that was killed have ended, and says how long that took: PostgreSQL finishes what it has
    /// received, COMMIT too, before it notices that its client is gone. SQLite has none.
    async fn sessions_end_after_kill(&self) -> JoinHandle<Duration> {
        if self.site.backend == Backend::Sqlite {
            return tokio::spawn(std::future::ready(Duration::ZERO));
        }
        let (begin, db) = (Instant::now(), self.site.db().await);
        let now = text(&db, "SELECT CAST(clock_timestamp() AS TEXT)").await;
        let sql = format!(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_start < '{now}'"
        );
        tokio::spawn(async move {
            while number(&db, &sql).await > 0 {
                assert!(begin.elapsed() < SESSIONS_TIMEOUT, "sessions of a process that is gone remain");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            begin.elapsed()
        })
    }

    /// Compares what the clients know with what is there.
    async fn examine(&mut self, clients: &mut [Client], process: &Process, since: i64) {
        let db = self.site.db().await;
        let mut ledger = Ledger::read(&db, since).await;
        let mut again = Vec::new();
        for client in clients.iter_mut() {
            if let Some(step) = client.pending.take() {
                let made = ledger.made(client, &step);
                self.pending = (self.pending.0 + 1, self.pending.1 + usize::from(made.is_some()));
                if let Some(id) = &made {
                    client.take(&step, id, None);
                }
                again.push((client.number, step, made));
            }
            for (id, seen) in std::mem::take(&mut client.touched) {
                ledger.compare(&id, &client.held[&id], seen);
                client.asked.push(id);
            }
        }
        assert!(ledger.tokens.is_empty(), "tokens that nobody asked for: {:?}", ledger.tokens);
        assert!(ledger.audit.is_empty(), "audit rows of nothing: {:?}", ledger.audit);
        let root = self.site.root(process).await;
        for (number, step, made) in again.into_iter().filter(|(_, step, _)| step.has_request_id()) {
            let (token, secret) = eventually("the second answer", async || match step.send(&root).await {
                Err(status) if is_busy(&status) => None,
                answer => Some(answer),
            })
            .await
            .unwrap_or_else(|status| panic!("{step:?} cannot be asked again: {status:?}"));
            let client = &mut clients[usize::try_from(number).unwrap()];
            match made {
                Some(id) => {
                    assert_eq!(id, token.id, "asking again made another token");
                    client.held.get_mut(&id).expect("taken").secret = secret;
                }
                None => client.take(&step, &token.id, secret),
            }
        }
        let expected = clients.iter().flat_map(|client| {
            let changed = client.asked.iter().chain(client.touched.keys());
            changed.flat_map(|id| client.held[id].expected())
        });
        judge(&root, &expected.collect::<Vec<_>>()).await;
        for client in clients {
            client.asked.clear();
        }
        for (what, sql) in HALVES {
            let count = number(&db, &sql.replace("{since}", &since.to_string())).await;
            assert_eq!(count, 0, "{what}");
        }
    }
}

/// Asks for the verdict on each secret.
async fn judge(actor: &Actor, expected: &[(&str, Verdict)]) {
    for chunk in expected.chunks(1_000) {
        let question =
            |(secret, _): &(&str, Verdict)| proto::ValidateTokenRequest { token: (*secret).to_owned(), peek: true, ..Default::default() };
        let message = proto::BatchValidateTokensRequest { requests: chunk.iter().map(question).collect() };
        let answer = actor.validation().batch_validate_tokens(actor.request(message)).await.expect("an answer").into_inner();
        assert_eq!(answer.responses.len(), chunk.len());
        for ((_, verdict), response) in chunk.iter().zip(&answer.responses) {
            assert_eq!(response.verdict(), *verdict, "token {}", response.token_id);
        }
    }
}

/// One change, as a client asks for it.
#[derive(Clone, Debug)]
enum Step {
    Create(proto::CreateTokenRequest),
    Update { id: String, name: String, audiences: Vec<String> },
    Revoke { id: String },
    Regenerate(proto::RegenerateTokenRequest),
}

impl Step {
    fn method(&self) -> &'static str {
        match self {
            Self::Create(_) => "CreateToken",
            Self::Update { .. } => "UpdateToken",
            Self::Revoke { .. } => "RevokeToken",
            Self::Regenerate(_) => "RegenerateToken",
        }
    }

    fn has_request_id(&self) -> bool {
        match self {
            Self::Create(request) => !request.request_id.is_empty(),
            Self::Regenerate(request) => !request.request_id.is_empty(),
            Self::Update { .. } | Self::Revoke { .. } => false,
        }
    }

    /// The token as it is then, and its new secret if it got one.
    async fn send(&self, actor: &Actor) -> Result<(proto::Token, Option<String>), Status> {
        match self {
            Self::Create(request) => {
                let created = actor.create(request.clone()).await?;
                Ok((created.token.expect("a token"), Some(created.secret)))
            }
            Self::Update { id, name, audiences } => {
                let wish = proto::Token { id: id.clone(), display_name: name.clone(), audiences: audiences.clone(), ..Default::default() };
                Ok((actor.update(wish, &["display_name", "audiences"]).await?, None))
            }
            Self::Revoke { id } => Ok((actor.revoke(id).await?, None)),
            Self::Regenerate(request) => {
                let done = actor.tokens().regenerate_token(actor.request(request.clone())).await?.into_inner();
                Ok((done.token.expect("a token"), Some(done.secret)))
            }
        }
    }
}

/// A token, as its changes left it.
#[derive(Default, Debug)]
struct Held {
    name: String,
    audiences: Vec<String>,
    revoked: bool,
    /// Nothing: a change that was not acknowledged took it along.
    secret: Option<String>,
    /// The one before, in its grace.
    previous: Option<String>,
    /// Secrets whose time is over.
    dead: Vec<String>,
    /// What was done to it: one method for each version.
    methods: Vec<&'static str>,
}

impl Held {
    fn take(&mut self, step: &Step, secret: Option<String>) {
        self.methods.push(step.method());
        match step {
            Step::Create(request) => {
                self.name.clone_from(&request.display_name);
                self.audiences.clone_from(&request.audiences);
                self.secret = secret;
            }
            Step::Update { name, audiences, .. } => {
                self.name.clone_from(name);
                self.audiences.clone_from(audiences);
            }
            Step::Revoke { .. } => self.revoked = true,
            Step::Regenerate(request) => {
                let old = std::mem::replace(&mut self.secret, secret);
                self.dead.extend(self.previous.take());
                if request.grace.is_some() {
                    self.previous = old;
                } else {
                    self.dead.extend(old);
                }
            }
        }
    }

    fn expected(&self) -> impl Iterator<Item = (&str, Verdict)> {
        let verdict = if self.revoked { Verdict::Revoked } else { Verdict::Valid };
        let good = self.secret.iter().chain(&self.previous).map(move |secret| (secret.as_str(), verdict));
        good.chain(self.dead.iter().map(|secret| (secret.as_str(), Verdict::Unknown)))
    }
}

/// Somebody who changes tokens of their own, and remembers what was acknowledged.
struct Client {
    number: u64,
    random: Random,
    names: u64,
    held: HashMap<String, Held>,
    live: Vec<String>,
    /// What changed since the last look at the tables: ids, with the version that was seen then.
    touched: BTreeMap<String, usize>,
    /// Ids to be judged.
    asked: Vec<String>,
    /// The change that was not acknowledged.
    pending: Option<Step>,
    acknowledged: usize,
}

impl Client {
    fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            random: Random(seed),
            names: 0,
            held: HashMap::new(),
            live: Vec::new(),
            touched: BTreeMap::new(),
            asked: Vec::new(),
            pending: None,
            acknowledged: 0,
        }
    }

    /// Changes one token after the other until the server is gone.
    async fn work(mut self, actor: Actor, killed: Arc<AtomicBool>) -> Self {
        loop {
            let step = self.choose();
            self.pending = Some(step.clone());
            match step.send(&actor).await {
                Ok((token, secret)) => {
                    self.pending = None;
                    self.take(&step, &token.id, secret);
                    self.acknowledged += 1;
                    assert_eq!(token.etag, format!("v{}", self.held[&token.id].methods.len()), "{step:?}");
                }
                Err(status) => {
                    assert!(is_busy(&status) || killed.load(Ordering::SeqCst), "a call failed while the server lived: {status:?}");
                    return self;
                }
            }
        }
    }

    fn choose(&mut self) -> Step {
        let dice = self.random.below(20);
        if self.live.is_empty() || dice < 7 && self.live.len() < LIVE_MAX {
            return Step::Create(proto::CreateTokenRequest {
                principal: format!("client-{}", self.number),
                audiences: self.audiences(),
                request_id: self.request_id(),
                ..world::new_token(&self.name(), &["agents:list"])
            });
        }
        let index = usize::try_from(self.random.below(self.live.len() as u64)).unwrap();
        let id = self.live[index].clone();
        match dice {
            ..12 => Step::Update { id, name: self.name(), audiences: self.audiences() },
            12..16 => {
                let grace = (self.random.below(2) == 0).then_some(prost_types::Duration { seconds: 7 * 86_400, nanos: 0 });
                Step::Regenerate(proto::RegenerateTokenRequest { id, grace, request_id: self.request_id(), ..Default::default() })
            }
            _ => Step::Revoke { id },
        }
    }

    /// A name that no token ever had.
    fn name(&mut self) -> String {
        self.names += 1;
        format!("name {} of client {}", self.names, self.number)
    }

    fn audiences(&mut self) -> Vec<String> {
        (0..self.random.below(4)).map(|number| format!("product-{number}")).collect()
    }

    /// None in half of the calls.
    fn request_id(&mut self) -> String {
        self.names += 1;
        if self.random.below(2) == 0 { String::new() } else { format!("{}-{}", self.number, self.names) }
    }

    /// Takes a change for made.
    fn take(&mut self, step: &Step, id: &str, secret: Option<String>) {
        let held = self.held.entry(id.to_owned()).or_default();
        self.touched.entry(id.to_owned()).or_insert(held.methods.len());
        held.take(step, secret);
        match step {
            Step::Create(_) => self.live.push(id.to_owned()),
            Step::Revoke { .. } => self.live.retain(|live| live != id),
            Step::Update { .. } | Step::Regenerate(_) => {}
        }
    }
}

/// What the tables say of the clients' tokens that changed since some instant.
struct Ledger {
    tokens: HashMap<String, Row>,
    /// By token and version.
    audit: HashMap<String, BTreeMap<usize, (String, serde_json::Value)>>,
}

#[derive(Debug)]
struct Row {
    name: String,
    state: i16,
    hint: String,
    audiences: String,
    version: usize,
}

impl Ledger {
    async fn read(db: &DatabaseConnection, since: i64) -> Self {
        let word = |row: &QueryResult, index| row.try_get_by_index::<String>(index).expect("text");
        let sql = format!(
            "SELECT id, display_name, state, hint, audiences, version FROM token WHERE update_time >= {since} AND principal LIKE 'client-%'"
        );
        let token = |row: &QueryResult| Row {
            name: word(row, 1),
            state: row.try_get_by_index(2).expect("a number"),
            hint: word(row, 3),
            audiences: word(row, 4),
            version: usize::try_from(row.try_get_by_index::<i64>(5).expect("a number")).expect("a version"),
        };
        let tokens = rows(db, &sql).await.iter().map(|row| (word(row, 0), token(row))).collect();
        let sql = format!(
            "SELECT token_id, method, after FROM audit_event WHERE workspace = 'default' AND event_time >= {since} AND principal LIKE 'client-%' \
             AND token_id IS NOT NULL"
        );
        let mut audit: HashMap<String, BTreeMap<_, _>> = HashMap::new();
        for row in rows(db, &sql).await {
            let after: serde_json::Value = serde_json::from_str(&word(&row, 2)).expect("settings");
            let version = usize::try_from(after["version"].as_u64().expect("a version")).unwrap();
            let twice = audit.entry(word(&row, 0)).or_default().insert(version, (word(&row, 1), after));
            assert!(twice.is_none(), "two audit rows for version {version} of {}", word(&row, 0));
        }
        Self { tokens, audit }
    }

    /// The token that a change was made to, if it was made.
    fn made(&self, client: &Client, step: &Step) -> Option<String> {
        match step {
            Step::Create(request) => {
                let mut ids = self.tokens.iter().filter(|(_, row)| row.name == request.display_name).map(|(id, _)| id);
                let made = ids.next().cloned();
                assert!(ids.next().is_none(), "{} was created twice", request.display_name);
                made
            }
            Step::Update { id, .. } | Step::Revoke { id } | Step::Regenerate(proto::RegenerateTokenRequest { id, .. }) => {
                self.tokens.get(id).filter(|row| row.version > client.held[id].methods.len()).map(|_| id.clone())
            }
        }
    }

    /// Takes a token out and finds it and its audit rows since the version `seen` as they should be.
    fn compare(&mut self, id: &str, held: &Held, seen: usize) {
        let row = self.tokens.remove(id).unwrap_or_else(|| panic!("{id} is lost: {held:?}"));
        let audit = self.audit.remove(id).unwrap_or_default();
        assert_eq!(
            (row.name.as_str(), row.audiences.as_str()),
            (held.name.as_str(), held.audiences.join(" ").as_str()),
            "{id}: {held:?} {seen} {audit:?}"
        );
        assert_eq!((row.state == 3, row.version), (held.revoked, held.methods.len()), "{id}: {held:?}");
        assert!(held.secret.as_ref().is_none_or(|secret| secret[..8] == row.hint), "{id}: the secret is not the one that was answered");
        let written: Vec<(usize, &str)> = audit.iter().map(|(version, (method, _))| (*version, method.as_str())).collect();
        let done: Vec<(usize, &str)> = (1..).zip(held.methods.iter().copied()).skip(seen).collect();
        assert_eq!(written, done, "{id}: its audit rows");
        let (_, (_, settings)) = audit.last_key_value().expect("at least one");
        let shown = (settings["display_name"].as_str(), settings["hint"].as_str(), settings["state"] == "REVOKED");
        assert_eq!(shown, (Some(row.name.as_str()), Some(row.hint.as_str()), held.revoked), "{id}: its last audit row");
    }
}

/// A simple generator (`SplitMix64`), so that a seed tells what was done.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A disk that stalls keeps changes waiting for longer than they may wait.
fn is_busy(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted
}

fn micros() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_micros()).unwrap()
}

pub fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} must be a whole number")))
}
