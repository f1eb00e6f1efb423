//! Real faults: three processes of the server on one real PostgreSQL, each behind a proxy of its own, asked all the time while others revoke.
//!
//! Processes are stopped for several leases and go on, get SIGKILL and start anew; their ways to the database are slow or cut, also for three leases in which the log is pruned; PostgreSQL
//! itself crashes and recovers. Whoever asks notes beforehand whether the revocation had returned: then no answer may be VALID, on no server. (The "new enemy" of the paper on Zanzibar.)
//! `KEYWARD_TEST_REVOCATIONS` is the number of revocations, `KEYWARD_TEST_BUNDLE` of how many tokens each principal has, `KEYWARD_TEST_SEED` what chance begins with; `KEYWARD_TEST_PGBOUNCER`
//! names a PgBouncer (1.21 or later) that is put before PostgreSQL, in transaction mode.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::proto::{self, PropagationState, Verdict};
use sea_orm::ConnectionTrait as _;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::{
    crash::{Random, number_from},
    pooler::Pooler,
    process::{Process, Site, number},
    proxy::Proxy,
    world::{self, Actor, Backend, Postgres},
};

const SERVERS: usize = 3;
const REVOCATIONS: u64 = 250;
const LEASE: Duration = Duration::from_secs(2);
const ASKERS: usize = 6;
const REVOKERS: usize = 6;
/// Tokens that a principal gets, which are revoked one by one or all in one change.
const BUNDLE: u64 = 5;
/// Of a bundle, as many are revoked one by one.
const SINGLY_MAX: usize = 5;
/// How many bundles are asked about at once.
const ALIVE: usize = 12;

#[test]
fn no_revoked_token_is_good_anywhere_whatever_fails() {
    let Some(postgres) = Postgres::start(&["-c", "synchronous_commit=on", "-c", "fsync=off", "-c", "restart_after_crash=on"]) else {
        return world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    };
    world::runtime().block_on(async { Story::new(postgres).await.tell().await });
}

/// A token, and what is known of it.
struct Known {
    id: String,
    secret: String,
    /// The call that revoked it has returned.
    is_revoked: AtomicBool,
}

/// What is revoked.
enum Ending {
    Token(String),
    Principal(String),
}

impl Ending {
    /// How far it has got, if the call was answered.
    async fn try_at(&self, actor: &Actor) -> Option<proto::Propagation> {
        match self {
            Self::Token(id) => {
                let message = proto::RevokeTokenRequest { id: id.clone(), ..Default::default() };
                actor.tokens().revoke_token(actor.request(message)).await.ok()?.into_inner().propagation
            }
            Self::Principal(principal) => {
                let message = proto::RevokePrincipalTokensRequest { principal: principal.clone(), ..Default::default() };
                actor.tokens().revoke_principal_tokens(actor.request(message)).await.ok()?.into_inner().propagation
            }
        }
    }
}

/// Tokens of one principal.
struct Bundle {
    principal: String,
    tokens: Vec<Arc<Known>>,
}

/// A process and its way to the database.
struct Server {
    site: Site,
    proxy: Proxy,
    process: Mutex<Option<Process>>,
    port: Mutex<u16>,
}

struct Story {
    postgres: Postgres,
    /// Past all pooling.
    url: String,
    _pooler: Option<Pooler>,
    root: String,
    servers: Vec<Server>,
    bundles: Mutex<Vec<Arc<Bundle>>>,
    revocations: u64,
    bundle: u64,
    revoked: AtomicU64,
    answers: AtomicU64,
    valid: AtomicU64,
    unavailable: AtomicU64,
    pending: AtomicU64,
    latencies: Mutex<Vec<Duration>>,
    is_over: AtomicBool,
}

impl Story {
    async fn new(postgres: Postgres) -> Arc<Self> {
        let url = postgres.new_database().await;
        let program = std::env::var_os("KEYWARD_TEST_PGBOUNCER").map(PathBuf::from);
        let pooler = program.map(|program| Pooler::start(&program, postgres.port));
        let target = pooler.as_ref().map_or(postgres.port, |pooler| pooler.port);
        let mut servers = Vec::new();
        let mut root = String::new();
        let keyring = tempfile::tempdir().expect("a folder").keep().join("keyring");
        for number in 0..SERVERS {
            let proxy = Proxy::start(target).await;
            let behind = url.replace(&format!(":{}/", postgres.port), &format!(":{}/", proxy.port));
            let mut site = Site::at(Backend::Postgres, behind);
            let lease = format!("{}s", LEASE.as_secs());
            let name = format!("server {number}");
            site.arguments =
                ["--lease", &lease, "--replica-name", &name, "--keyring-file", &keyring.display().to_string()].map(str::to_owned).to_vec();
            let process = site.start().await;
            if number == 0 {
                root = std::fs::read_to_string(site.folder.path().join("root")).expect("a first start");
            }
            let port = Mutex::new(process.port());
            servers.push(Server { site, proxy, process: Mutex::new(Some(process)), port });
        }
        Arc::new(Self {
            postgres,
            url,
            _pooler: pooler,
            root: root.trim().to_owned(),
            servers,
            bundles: Mutex::default(),
            revocations: number_from("KEYWARD_TEST_REVOCATIONS").unwrap_or(REVOCATIONS),
            bundle: number_from("KEYWARD_TEST_BUNDLE").unwrap_or(BUNDLE),
            revoked: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            valid: AtomicU64::new(0),
            unavailable: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            latencies: Mutex::default(),
            is_over: AtomicBool::new(false),
        })
    }

    /// A connection that comes again by itself.
    fn actor(&self, server: usize) -> Actor {
        let port = *self.servers[server].port.lock().expect("not poisoned");
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("an address");
        let channel: Channel = endpoint.connect_timeout(Duration::from_secs(1)).timeout(Duration::from_secs(8)).connect_lazy();
        Actor { channel, token: Some(self.root.clone()) }
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    async fn tell(self: Arc<Self>) {
        let seed = number_from("KEYWARD_TEST_SEED").unwrap_or_else(|| u64::from(std::process::id()));
        println!("{} revocations, KEYWARD_TEST_SEED={seed}", self.revocations);
        let all = proto::Workspace { id: "default".to_owned(), policy: Some(world::lax_policy()), ..Default::default() };
        self.actor(0).update_workspace(all, &["policy"]).await.expect("changed");
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for number in 0..ASKERS {
            tasks.spawn(Arc::clone(&self).ask(number % SERVERS, Random(seed + 1_000 + number as u64)));
        }
        for number in 0..REVOKERS {
            tasks.spawn(Arc::clone(&self).revoke(Random(seed + 2_000 + number as u64)));
        }
        let faults = tokio::spawn(Arc::clone(&self).fail(Random(seed)));
        while let Some(done) = tasks.join_next().await {
            done.expect("nobody was told a lie");
        }
        let troubles = faults.await.expect("the troubles end");
        let mut latencies = std::mem::take(&mut *self.latencies.lock().expect("not poisoned"));
        latencies.sort_unstable();
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
        println!(
            "{} tokens revoked in {:.1} s, {} answers ({} valid, {} unavailable), {} PENDING; a change took {:?} p50, {:?} p99, {:?} at most; {troubles}",
            self.revoked.load(Ordering::SeqCst),
            begin.elapsed().as_secs_f64(),
            self.answers.load(Ordering::SeqCst),
            self.valid.load(Ordering::SeqCst),
            self.unavailable.load(Ordering::SeqCst),
            self.pending.load(Ordering::SeqCst),
            at(0.5),
            at(0.99),
            at(1.0)
        );
        assert!(self.valid.load(Ordering::SeqCst) > self.revocations, "hardly anything was asked while it was good");
    }

    /// Asks one server about all that is known, again and again.
    async fn ask(self: Arc<Self>, server: usize, mut random: Random) {
        let mut actor = self.actor(server);
        while !self.is_over() {
            let bundle = {
                let bundles = self.bundles.lock().expect("not poisoned");
                let place = random.below(bundles.len().max(1) as u64) as usize;
                bundles.get(place).cloned()
            };
            let Some(bundle) = bundle else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            let token = &bundle.tokens[random.below(self.bundle) as usize];
            let was_revoked = token.is_revoked.load(Ordering::SeqCst);
            let asked = actor.ask(proto::ValidateTokenRequest { token: token.secret.clone(), peek: true, ..Default::default() }).await;
            let Ok(answer) = asked else {
                self.unavailable.fetch_add(1, Ordering::SeqCst);
                actor = self.actor(server);
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            self.answers.fetch_add(1, Ordering::SeqCst);
            if answer.verdict() == Verdict::Valid {
                self.valid.fetch_add(1, Ordering::SeqCst);
                assert!(!was_revoked, "server {server} calls {} good, whose revocation had returned before it was asked", token.id);
            }
        }
    }

    /// Makes tokens, has them known for a moment, and revokes them, until there were enough.
    async fn revoke(self: Arc<Self>, mut random: Random) {
        while self.revoked.load(Ordering::SeqCst) < self.revocations {
            let bundle = Arc::new(self.make(&mut random).await);
            {
                let mut bundles = self.bundles.lock().expect("not poisoned");
                bundles.push(Arc::clone(&bundle));
                if bundles.len() > ALIVE {
                    bundles.remove(0);
                }
            }
            // So that every server knows them.
            for server in 0..SERVERS {
                let actor = self.actor(server);
                for token in &bundle.tokens {
                    let question = proto::ValidateTokenRequest { token: token.secret.clone(), peek: true, ..Default::default() };
                    // Who cannot be asked now does not know them.
                    if !matches!(tokio::time::timeout(Duration::from_millis(300), actor.ask(question)).await, Ok(Ok(_))) {
                        break;
                    }
                }
            }
            let singly = if random.below(2) == 0 { bundle.tokens.len().min(SINGLY_MAX) } else { 0 };
            for token in &bundle.tokens[..singly] {
                self.insist(&mut random, Ending::Token(token.id.clone())).await;
                token.is_revoked.store(true, Ordering::SeqCst);
            }
            if singly < bundle.tokens.len() {
                self.insist(&mut random, Ending::Principal(bundle.principal.clone())).await;
            }
            for token in &bundle.tokens {
                token.is_revoked.store(true, Ordering::SeqCst);
            }
            self.revoked.fetch_add(self.bundle, Ordering::SeqCst);
        }
        self.is_over.store(true, Ordering::SeqCst);
    }

    async fn make(&self, random: &mut Random) -> Bundle {
        let principal = format!("p{}", random.next());
        let mut tokens = Vec::new();
        while (tokens.len() as u64) < self.bundle {
            let actor = self.actor(random.below(SERVERS as u64) as usize);
            let request = proto::CreateTokenRequest { principal: principal.clone(), ..world::new_token("enemy", &[]) };
            match actor.create(request).await {
                Ok(made) => {
                    let id = made.token.expect("a token").id;
                    tokens.push(Arc::new(Known { id, secret: made.secret, is_revoked: AtomicBool::new(false) }));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        Bundle { principal, tokens }
    }

    /// Makes a change at any server until it has returned and is in force.
    async fn insist(&self, random: &mut Random, ending: Ending) {
        let begin = Instant::now();
        loop {
            let actor = self.actor(random.below(SERVERS as u64) as usize);
            match ending.try_at(&actor).await.map(|propagation| propagation.state()) {
                Some(PropagationState::Complete) => break,
                Some(_) => {
                    self.pending.fetch_add(1, Ordering::SeqCst);
                }
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            assert!(begin.elapsed() < Duration::from_mins(2), "a change does not come through");
        }
        self.latencies.lock().expect("not poisoned").push(begin.elapsed());
    }

    /// One trouble after the other.
    async fn fail(self: Arc<Self>, mut random: Random) -> String {
        let (mut stops, mut kills, mut slow, mut cuts, mut prunes, mut crashes) = (0, 0, 0, 0, 0, 0);
        while !self.is_over() {
            tokio::time::sleep(Duration::from_millis(200 + random.below(600))).await;
            let server = &self.servers[random.below(SERVERS as u64) as usize];
            let span = Duration::from_millis(100 + random.below(3 * LEASE.as_millis() as u64));
            match random.below(10) {
                0..=2 => {
                    let id = server.process.lock().expect("not poisoned").as_ref().map(Process::id).expect("it runs");
                    signal(id, "STOP");
                    tokio::time::sleep(span).await;
                    signal(id, "CONT");
                    stops += 1;
                }
                3 | 4 => {
                    let process = server.process.lock().expect("not poisoned").take().expect("it runs");
                    process.kill();
                    let again = loop {
                        // PostgreSQL may just be recovering.
                        match server.site.try_start().await {
                            Ok(process) => break process,
                            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                        }
                    };
                    *server.port.lock().expect("not poisoned") = again.port();
                    *server.process.lock().expect("not poisoned") = Some(again);
                    kills += 1;
                }
                5 | 6 => {
                    server.proxy.cut();
                    tokio::time::sleep(span).await;
                    if random.below(2) == 0 {
                        tokio::time::sleep((3 * LEASE).saturating_sub(span)).await;
                        // As if the log were kept for a moment only.
                        let db = world::connect(self.url.clone(), 1).await;
                        let pruned = "WITH old AS (DELETE FROM change_log RETURNING seq) UPDATE change_head SET pruned_seq = seq";
                        prunes += usize::from(db.execute_unprepared(pruned).await.is_ok());
                    }
                    server.proxy.heal();
                    cuts += 1;
                }
                7 | 8 => {
                    server.proxy.delay(Duration::from_millis(10 + random.below(LEASE.as_millis() as u64)));
                    tokio::time::sleep(span).await;
                    server.proxy.heal();
                    slow += 1;
                }
                _ => {
                    // A backend that dies takes all others with it, and PostgreSQL recovers from its log.
                    if let Ok(pid) = self.backend().await {
                        signal(u32::try_from(pid).expect("a process"), "KILL");
                        crashes += 1;
                    }
                }
            }
        }
        format!(
            "{stops} stops, {kills} kills, {slow} times slow, {cuts} cuts, {prunes} prunes, {crashes} crashes of PostgreSQL on port {}",
            self.postgres.port
        )
    }

    async fn backend(&self) -> Result<i64, sea_orm::DbErr> {
        let db = world::connect(self.url.clone(), 1).await;
        Ok(number(
            &db,
            "SELECT CAST(pid AS BIGINT) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() LIMIT 1",
        )
        .await)
    }
}

fn signal(id: u32, name: &str) {
    world::run_as_root(&["kill", &format!("-{name}"), &id.to_string()]);
}
