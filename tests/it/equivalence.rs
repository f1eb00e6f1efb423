//! Facts that are kept are judged as facts that were just read, whatever was changed meanwhile.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use keyward::{
    ambient::{Clock, Time},
    cache::Cache,
    caller::Caller,
    directory::{Certificate, Directory, Outlets, PrincipalInput, PrincipalTarget, WorkspacePatch, WorkspaceTarget},
    error::{Error, Result},
    fence::{self, Fence},
    grant::{Need, Verdict},
    issuer::{Grace, Issuer, NewToken, RequestId, Target, TokenPatch},
    retention::{Periods, Retention},
    rules::Lifetime,
    scope::{Operation, Resource},
    store::Store,
    token::Keyring,
    usage::Usage,
    validator::{HttpRequest, Question, Validator},
    workspace::Role,
};

use crate::world::{BEGINNING, Backend, World};

crate::on_both_databases!(a_cached_judgement_is_a_fresh_one);

const CHANGES: usize = 600;
const WORKSPACES: [&str; 2] = ["default", "other"];
const PRINCIPALS: [&str; 3] = ["ada", "bob", "cy"];
const SCOPES: [&[&str]; 4] = [&["agents:list"], &["agents:*"], &["*"], &[]];
const HOUR: Duration = Duration::from_hours(1);
const LEASE: Duration = Duration::from_secs(10);

/// Numbers that a seed decides.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % sides
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }
}

/// The rooms of a server, without the server: what is asked here is asked at instants of our own.
struct Rooms {
    store: Arc<Store>,
    keyring: Arc<Keyring>,
    issuer: Arc<Issuer>,
    directory: Arc<Directory>,
    retention: Arc<Retention>,
    /// Keeps what it has read.
    cached: Arc<Validator>,
    /// Every secret that was ever made, with the id of its token.
    secrets: Vec<(String, String)>,
    now: Time,
}

fn validator(keyring: &Arc<Keyring>, cache: Arc<Cache>, store: &Arc<Store>) -> Arc<Validator> {
    Validator::new(Arc::clone(keyring), cache, Arc::clone(store), Arc::new(Usage::default()))
}

fn root() -> Caller {
    Caller {
        token_id: None,
        digest: None,
        workspace: "headquarters".into(),
        principal: "operator".into(),
        scopes: Arc::new(["keyward:root".parse().expect("a scope")]),
        has_admin_role: false,
        address: None,
    }
}

fn headquarters() -> Vec<Certificate> {
    let root = root();
    vec![Certificate { workspace: root.workspace.to_string(), principal: root.principal.to_string(), scopes: root.scopes.to_vec() }]
}

/// A cache that is served as that of a server that is alone.
fn serving() -> Arc<Cache> {
    let cache = Arc::new(Cache::new(0, LEASE));
    cache.serve_for_ever();
    cache
}

fn settings() -> fence::Settings {
    fence::Settings { name: "test".to_owned(), version: "0".to_owned(), lease: LEASE, is_acked_only: false }
}

impl Rooms {
    async fn open(store: Store) -> Self {
        let store = Arc::new(store);
        let keyring = Arc::new(Keyring::generate().expect("randomness"));
        let cache = serving();
        let fence = Fence::new(Arc::clone(&cache), Arc::clone(&store), Clock::system(), settings());
        let issuer = Issuer::new(Arc::clone(&keyring), Arc::clone(&store), Arc::clone(&fence));
        issuer.bootstrap(BEGINNING, |_| Ok(())).await.expect("a first workspace");
        let periods = Periods { tokens: 30 * 24 * HOUR, audit: 365 * 24 * HOUR };
        let rooms = Self {
            cached: validator(&keyring, cache, &store),
            directory: Directory::new(
                Arc::clone(&keyring),
                Arc::clone(&store),
                Arc::clone(&fence),
                headquarters(),
                Outlets { mail: false, http: false },
            ),
            retention: Retention::new(Arc::clone(&store), fence, periods),
            issuer,
            store,
            keyring,
            secrets: Vec::new(),
            now: BEGINNING,
        };
        let patch = WorkspacePatch { display_name: Some("HQ".into()), prefix: Some("hq".into()), ..WorkspacePatch::default() };
        let bootstrap = Caller { workspace: "default".into(), principal: "root".into(), ..root() };
        let _made = rooms.directory.create_workspace(bootstrap, "headquarters", patch, rooms.now).await.expect("a workspace of our own");
        rooms.directory.make_certificates_principals(rooms.now).await.expect("a principal of our own");
        rooms.add_other().await.expect("a second workspace");
        rooms
    }

    async fn add_other(&self) -> Result<()> {
        let patch = WorkspacePatch { display_name: Some("Other".into()), prefix: Some("ot".into()), ..WorkspacePatch::default() };
        self.directory.create_workspace(root(), "other", patch, self.now).await.map(drop)
    }

    /// One random change. What the domain refuses is no change, and as good.
    async fn change(&mut self, dice: &mut Dice) -> Result<()> {
        let (workspace, principal) = (dice.pick(&WORKSPACES).to_owned(), dice.pick(&PRINCIPALS).to_owned());
        let token = self.secrets.get(dice.roll(self.secrets.len().max(1))).map(|(_, id)| id.clone()).unwrap_or_default();
        let target = || Target { id: token.clone(), etag: String::new() };
        let someone = PrincipalTarget { workspace: workspace.clone(), id: principal.clone(), etag: String::new() };
        let place = WorkspaceTarget { id: workspace.clone(), etag: String::new() };
        let (issuer, directory, now) = (&self.issuer, &self.directory, self.now);
        match dice.roll(24) {
            0..=4 => self.create(dice, workspace, principal).await?,
            5 => issuer.revoke(root(), target(), "", now).await.map(drop)?,
            6 => issuer.delete(root(), target(), now).await.map(drop)?,
            7 => issuer.deactivate(root(), target(), now).await.map(drop)?,
            8 => issuer.activate(root(), target(), now).await.map(drop)?,
            9 | 10 => self.update(dice, target()).await?,
            11 | 12 => {
                let grace = Grace { grace: dice.pick(&[Duration::ZERO, HOUR]), ..Grace::default() };
                let request = RequestId { id: String::new(), request: Vec::new() };
                let made = issuer.regenerate(root(), target(), grace, request, now).await?;
                self.secrets.push((made.value.secret.reveal().to_owned(), token));
            }
            13 => directory.suspend_principal(root(), someone, "", now).await.map(drop)?,
            14 | 15 => directory.resume_principal(root(), someone, now).await.map(drop)?,
            16 => directory.delete_principal(root(), someone, "", now).await.map(drop)?,
            17 => {
                let role = dice.pick(&[Role::Member, Role::Admin]);
                directory
                    .upsert_principal(root(), PrincipalInput { target: someone, role, ..PrincipalInput::default() }, now)
                    .await
                    .map(drop)?;
            }
            18 => directory.suspend_workspace(root(), place, "", now).await.map(drop)?,
            19 | 20 => directory.resume_workspace(root(), place, now).await.map(drop)?,
            21 => {
                let patch = WorkspacePatch { resources: Some(table(dice.roll(4))), ..WorkspacePatch::default() };
                directory.update_workspace(root(), place, patch, now).await.map(drop)?;
            }
            22 => issuer.revoke_principal(root(), &workspace, &principal, "", now).await.map(drop)?,
            _ => self.pass_time(dice).await?,
        }
        Ok(())
    }

    async fn create(&mut self, dice: &mut Dice, workspace: String, principal: String) -> Result<()> {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let new = NewToken {
            workspace,
            principal,
            display_name: "t".to_owned(),
            scopes: texts(dice.pick(&SCOPES)),
            audiences: texts(dice.pick(&[&[][..], &["billing"]])),
            allowed_cidrs: texts(dice.pick(&[&[][..], &["10.0.0.0/8"]])),
            lifetime: dice.pick(&[Lifetime::Usual, Lifetime::For(HOUR)]),
            ..NewToken::default()
        };
        let request = RequestId { id: String::new(), request: Vec::new() };
        let (token, secret) = self.issuer.create(root(), new, request, self.now).await?.value;
        self.secrets.push((secret.reveal().to_owned(), token.id.to_string()));
        if self.secrets.len() > 40 {
            self.secrets.remove(dice.roll(20));
        }
        Ok(())
    }

    async fn update(&self, dice: &mut Dice, target: Target) -> Result<()> {
        let texts = |texts: &[&str]| Some(texts.iter().map(|text| (*text).to_owned()).collect());
        let patch = match dice.roll(4) {
            0 => TokenPatch { scopes: texts(dice.pick(&SCOPES)), ..TokenPatch::default() },
            1 => TokenPatch { audiences: texts(dice.pick(&[&[][..], &["billing"]])), ..TokenPatch::default() },
            2 => TokenPatch { allowed_cidrs: texts(dice.pick(&[&[][..], &["10.0.0.0/8"]])), ..TokenPatch::default() },
            _ => TokenPatch { expire_time: Some(self.now + dice.pick(&[HOUR, 20 * HOUR])), ..TokenPatch::default() },
        };
        self.issuer.update(root(), target, patch, self.now).await.map(drop)
    }

    /// Time passes; seldom so much that what has ended is removed, or that a workspace goes and comes again.
    async fn pass_time(&mut self, dice: &mut Dice) -> Result<()> {
        match dice.roll(8) {
            0 => {
                self.now = self.now + 40 * 24 * HOUR;
                while self.retention.tick(self.now).await? {}
            }
            1 => {
                let other = WorkspaceTarget { id: "other".to_owned(), etag: String::new() };
                let _deleted = self.directory.delete_workspace(root(), other, "", self.now).await?;
                self.now = self.now + 40 * 24 * HOUR;
                while self.retention.tick(self.now).await? {}
                self.add_other().await?;
            }
            _ => self.now = self.now + HOUR / 2,
        }
        Ok(())
    }

    /// Asks the validator that keeps facts and one that knows nothing yet; answers how many verdicts there were of each kind.
    async fn compare(&self, verdicts: &mut std::collections::BTreeMap<Verdict, usize>) {
        let fresh = validator(&self.keyring, serving(), &self.store);
        let list = ["agents:list"];
        for (secret, _) in &self.secrets {
            for question in questions(secret, &list) {
                let judged = async |validator: &Arc<Validator>| {
                    let answer = validator.validate(question, self.now).await.expect("an answer");
                    (answer.verdict, answer.grant, answer.derived_scope)
                };
                let (kept, read) = (judged(&self.cached).await, judged(&fresh).await);
                assert_eq!(kept, read, "{:?} {:?}", question.need, question.http);
                *verdicts.entry(kept.0).or_default() += 1;
            }
        }
    }
}

fn questions<'a>(secret: &'a str, scopes: &'a [&'a str]) -> [Question<'a>; 4] {
    let inside: Option<IpAddr> = "10.1.2.3".parse().ok();
    let need = |audience, client_ip, scopes| Need { audience, client_ip, scopes, ..Need::default() };
    let ask = |need, http| Question { text: secret.as_bytes(), need, http, peek: true };
    let http = |method, path| Some(HttpRequest { method, path });
    [
        ask(need(None, inside, &[]), None),
        ask(need(Some("billing"), inside, scopes), None),
        ask(need(None, None, &[]), http("GET", "/api/agents/7")),
        ask(Need { workspace: Some("default"), ..need(None, inside, &[]) }, http("POST", "/api/agents")),
    ]
}

/// Some tables of routes, the first one empty.
fn table(number: usize) -> Vec<Resource> {
    let operation = |operation: &str, method: &str, path: &str| Operation {
        operation: operation.to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
    };
    let agents = |operations| vec![Resource { resource: "agents".to_owned(), endpoint: "/api/agents".to_owned(), operations }];
    match number {
        0 => Vec::new(),
        1 => agents(vec![operation("list", "GET", "/{id}")]),
        2 => agents(vec![operation("read", "GET", "/{id}"), operation("install", "POST", "")]),
        _ => agents(vec![operation("list", "*", ""), operation("list", "GET", "/7")]),
    }
}

async fn a_cached_judgement_is_a_fresh_one(mut world: World) {
    let (url, seed) = (world.config().database_url, u64::from_ne_bytes(keyward::ambient::random().expect("randomness")));
    if world.backend == Backend::Postgres {
        world = World::unstarted(Backend::Postgres).await;
    } else {
        world.stop_server().await;
        std::fs::remove_file(world.folder.path().join("data/keyward.db")).expect("a database");
    }
    let url = if world.backend == Backend::Postgres { world.config().database_url } else { url };
    let mut rooms = Rooms::open(Store::open(&url, true, Box::new(|_, _, _| ())).await.expect("a store")).await;
    println!("seed {seed}");
    let (mut dice, mut verdicts, mut changes, mut outages) = (Dice(seed), std::collections::BTreeMap::new(), 0, 0);
    for _ in 0..CHANGES {
        // Whoever asks meanwhile brings reads on their way while the change is made.
        let (over, cached) = (Arc::new(AtomicBool::new(false)), Arc::clone(&rooms.cached));
        let (ended, secrets, now) = (Arc::clone(&over), rooms.secrets.clone(), rooms.now);
        let reader = tokio::spawn(async move {
            while !ended.load(Ordering::SeqCst) {
                for (secret, _) in secrets.iter().rev().take(8) {
                    for question in questions(secret, &[]) {
                        cached.validate(question, now).await.expect("an answer");
                    }
                }
                tokio::task::yield_now().await;
            }
        });
        match rooms.change(&mut dice).await {
            Ok(()) => changes += 1,
            Err(Error::Invalid(_) | Error::NotFound(_) | Error::Precondition(_) | Error::Exists(_)) => {}
            // Nobody knows whether it was made; what is judged must be right all the same.
            Err(Error::Unavailable(_) | Error::Overloaded(_)) => outages += 1,
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
        over.store(true, Ordering::SeqCst);
        reader.await.expect("a reader");
        rooms.compare(&mut verdicts).await;
    }
    println!("{changes} changes of {CHANGES}, {outages} outages: {verdicts:?}");
    let kinds = verdicts.keys().filter(|verdict| verdicts[verdict] > 0).count();
    assert!(kinds >= 8 && changes > CHANGES / 3 && outages < 5, "{changes} changes, {verdicts:?}");
}
