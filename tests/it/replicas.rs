//! Several servers tell of the same tokens, and end at any moment: each step is told once.
//!
//! On PostgreSQL they are processes of this program, which open the database beside each other, look and deliver without a pause, get SIGKILL at random, and lose their
//! connections to the database now and then. On SQLite, where one process has the database, they share it, and their looks are given up at random.
//! Time is turned by hand, and passes quickly, so that what a dead one had taken up comes free again. `KEYWARD_TEST_SEED` is what chance begins with.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::{BufRead as _, Write as _},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use keyward::{
    ambient::{Clock, Time},
    config::{Config, Sources},
    notices::{Notices, Settings},
    proto,
    server::install_crypto_provider,
    store::Store,
    token::Keyring,
};
use sea_orm::{ConnectionTrait as _, DatabaseConnection};
use tokio::sync::watch;

use crate::{
    crash::{Random, number_from},
    mailbox::{Mailbox, MailboxOptions},
    process::number,
    proxy::Proxy,
    receiver::Receiver,
    tables::micros,
    world::{self, BEGINNING, Backend, World},
};

/// Tells a process that it is a replica, and with which settings.
const SETTINGS: &str = "KEYWARD_TEST_REPLICA";
const WORKSPACES: [&str; 4] = ["north", "east", "south", "west"];
const STEPS: [u16; 3] = [30, 7, 0];
/// The tokens of a workspace reach a step one part after the other.
const WAVES: u32 = 5;
const REPLICAS: usize = 3;
const DAY: Duration = Duration::from_hours(24);
/// How often the time is turned, and by how much: what was taken up comes free after three minutes.
const TURN: Duration = Duration::from_millis(150);
const TURNED: Duration = Duration::from_secs(20);
/// For one step, on a slow machine.
/// As in `src/notices/deliver.rs`.
const LEASE: Duration = Duration::from_mins(3);
const PATIENCE: Duration = Duration::from_mins(3);
/// What one replica is trying at once: a group for each workspace, of calls and of mails.
const UNDER_WAY_MAX: usize = 16 * WORKSPACES.len();

mod sqlite {
    #[test]
    fn each_step_is_told_once_whoever_ticks() {
        super::run(crate::world::Backend::Sqlite, 400);
    }
}

mod postgres {
    #[test]
    fn each_step_is_told_once_whoever_ticks() {
        super::run(crate::world::Backend::Postgres, 10_000);
    }
}

/// What the processes of the test above run; nothing by itself.
#[test]
fn a_replica_for_other_tests() {
    if let Ok(settings) = std::env::var(SETTINGS) {
        world::runtime().block_on(tick(serde_json::from_str(&settings).expect("settings")));
    }
}

fn run(backend: Backend, tokens: u64) {
    world::run(backend, async |world| {
        let Some(mailbox) = Mailbox::start(MailboxOptions::default()) else { return };
        let mut story = Story::new(world, mailbox, tokens).await;
        let begin = Instant::now();
        let troubles = if backend == Backend::Sqlite { story.by_tasks().await } else { story.by_processes().await };
        story.examine(&troubles, begin.elapsed()).await;
    });
}

/// What was done to the replicas.
#[derive(Default, Debug)]
struct Troubles {
    kills: usize,
    cuts: usize,
    /// Looks that were given up.
    dropped: usize,
}

/// What came of a notice of one token.
type Seen = HashMap<(String, u16), BTreeSet<String>>;

/// The world, and what it was told.
struct Story {
    world: World,
    db: DatabaseConnection,
    receiver: Receiver,
    mailbox: Mailbox,
    tokens: u64,
    random: Random,
    /// Ids of webhook calls by token and step, and how many came in all.
    calls: (Seen, usize),
    /// Ids of mails by token and step; all mails with how often they came.
    mails: (Seen, BTreeMap<String, usize>),
    /// Mails that were read so far.
    read: usize,
    turns: usize,
}

impl Story {
    async fn new(mut world: World, mailbox: Mailbox, tokens: u64) -> Self {
        let seed = number_from("KEYWARD_TEST_SEED").unwrap_or_else(|| u64::try_from(micros()).unwrap());
        println!("{:?}: {tokens} tokens, KEYWARD_TEST_SEED={seed}", world.backend);
        let receiver = Receiver::start().await;
        world.settings.insert("smtp_url", format!("{}?tls=off", mailbox.url("", "")));
        world.settings.insert("smtp_from", "keyward@example.com".to_owned());
        world.settings.insert("webhook_allowed_cidrs", "127.0.0.0/8".to_owned());
        world.restart().await;
        for id in WORKSPACES {
            world.add_workspace(id, id).await;
            let notices = proto::Notices {
                days_before: STEPS.iter().copied().map(i32::from).collect(),
                raise_faults: true,
                emails: format!("{id}@example.com"),
                webhook_url: receiver.url(&format!("/{id}")),
                ..Default::default()
            };
            let workspace = proto::Workspace { id: id.to_owned(), notices: Some(notices), ..Default::default() };
            world.root().await.update_workspace(workspace, &["notices"]).await.expect("changed");
        }
        // From here on the replicas alone have the database.
        world.stop_server().await;
        let db = world.db().await;
        for first in (0..tokens).step_by(500) {
            let rows: Vec<String> = (first..tokens.min(first + 500)).map(|number| row(world.backend, number)).collect();
            let sql = format!("INSERT INTO token ({COLUMNS}) VALUES {}", rows.join(", "));
            db.execute_unprepared(&sql).await.expect("inserted");
        }
        let random = Random(seed);
        Self {
            world,
            db,
            receiver,
            mailbox,
            tokens,
            random,
            calls: (Seen::new(), 0),
            mails: (Seen::new(), BTreeMap::new()),
            read: 0,
            turns: 0,
        }
    }

    /// Turns the time from step to step, and each time goes on until everybody was told.
    async fn steps(&mut self, mut turn: impl AsyncFnMut(Time, &mut Random)) {
        for step in STEPS {
            let (mut now, begin) = (BEGINNING + 40 * DAY - u32::from(step) * DAY, Instant::now());
            while !self.is_told(step).await {
                turn(now, &mut self.random).await;
                now = now + TURNED;
                self.turns += 1;
                self.read_calls();
                assert!(begin.elapsed() < PATIENCE, "step {step} was not told to everybody: {}", self.standing().await);
            }
            self.read_mails(step);
            println!("step {step}: {:.1} s", begin.elapsed().as_secs_f64());
        }
    }

    async fn is_told(&self, step: u16) -> bool {
        let marked = number(&self.db, &format!("SELECT COUNT(*) FROM notice_mark WHERE days_before = {step}")).await;
        u64::try_from(marked).unwrap() == self.tokens && number(&self.db, "SELECT COUNT(*) FROM notice").await == 0
    }

    async fn standing(&self) -> String {
        let (waiting, dead) = (
            number(&self.db, "SELECT COUNT(*) FROM notice WHERE NOT dead").await,
            number(&self.db, "SELECT COUNT(*) FROM notice WHERE dead").await,
        );
        format!("{waiting} notices wait, {dead} are dead, {} calls came for {} steps of tokens", self.calls.1, self.calls.0.len())
    }

    fn read_calls(&mut self) {
        for call in self.receiver.take() {
            let json = call.json.as_ref().expect("JSON");
            let data = &json["data"];
            let (id, step) = (call.header("webhook-id").expect("an id"), data["days_before"].as_u64().expect("a number"));
            assert_eq!(
                (json["id"].as_str(), json["type"].as_str()),
                (Some(id), Some(if step == 0 { "token.expired" } else { "token.expiring" }))
            );
            let name = data["token"]["display_name"].as_str().expect("a name").to_owned();
            assert_eq!(call.path, format!("/{}", data["workspace"].as_str().expect("a name")));
            let ids = self.calls.0.entry((name.clone(), step as u16)).or_default();
            ids.insert(id.to_owned());
            assert_eq!(ids.len(), 1, "step {step} of {name} was told under several ids");
            self.calls.1 += 1;
        }
    }

    /// A mail that is seen first after a step was told to everybody is of that step: what is tried once more later has the same id.
    fn read_mails(&mut self, step: u16) {
        let mails = self.mailbox.mails();
        for mail in &mails[self.read..] {
            let times = self.mails.1.entry(mail.message_id.clone()).or_default();
            *times += 1;
            if *times > 1 {
                continue;
            }
            let words = mail.text.as_ref().expect("text").split(|letter: char| !letter.is_ascii_alphanumeric());
            for name in words.filter(|word| word.len() == 8 && word.starts_with("svc")) {
                self.mails.0.entry((name.to_owned(), step)).or_default().insert(mail.message_id.clone());
            }
        }
        self.read = mails.len();
    }

    /// Everything was told, once.
    async fn examine(&mut self, troubles: &Troubles, took: Duration) {
        self.read_calls();
        let wanted: BTreeSet<(String, u16)> = (0..self.tokens).flat_map(|token| STEPS.map(|step| (name(token), step))).collect();
        for (what, seen) in [("call", &self.calls.0), ("mail", &self.mails.0)] {
            let told: BTreeSet<(String, u16)> = seen.keys().cloned().collect();
            assert_eq!(told.len(), wanted.len(), "steps that a {what} told of: {}", self.standing().await);
            assert_eq!(told, wanted, "steps that a {what} told of");
            let several: Vec<_> = seen.iter().filter(|(_, ids)| ids.len() != 1).take(5).collect();
            assert!(several.is_empty(), "told in more than one {what}: {several:?}");
        }
        let faults = "SELECT COUNT(*) FROM fault f JOIN token t ON t.id = f.token_id AND t.expire_time = f.expire_time";
        assert_eq!(number(&self.db, faults).await, wanted.len() as i64, "faults");
        let steps = "SELECT COUNT(*) FROM (SELECT DISTINCT token_id, days_before FROM fault) AS f";
        assert_eq!(number(&self.db, steps).await, wanted.len() as i64, "steps with a fault");
        assert_eq!(number(&self.db, "SELECT COUNT(*) FROM notice").await, 0, "notices in the outbox");
        let again = (self.calls.1 - self.calls.0.len(), self.mails.1.values().sum::<usize>() - self.mails.1.len());
        println!(
            "{:?}: {} steps of {} tokens to {} replicas in {:.1} s, {troubles:?}: {} calls and {} mails came, {} and {} of them more than once; no step was told twice",
            self.world.backend,
            STEPS.len(),
            self.tokens,
            REPLICAS,
            took.as_secs_f64(),
            self.calls.1,
            self.mails.1.values().sum::<usize>(),
            again.0,
            again.1
        );
        // What had been taken up by one that was interrupted may come again, and what was under way when its lease ended, by a clock that is turned faster than
        // the time goes; nothing else.
        let leases = self.turns / usize::try_from(LEASE.as_secs() / TURNED.as_secs()).expect("small");
        let bound = UNDER_WAY_MAX * (troubles.kills + REPLICAS * troubles.cuts + leases);
        assert!(again.0 + again.1 <= bound, "{again:?} came more than once, and {bound} at most may");
    }

    async fn by_processes(&mut self) -> Troubles {
        let target = self.world.settings["database_url"].rsplit_once(':').and_then(|(_, rest)| rest.split_once('/'));
        let (port, database) = target.expect("a port and a database");
        let proxy = Proxy::start(port.parse().expect("a port")).await;
        let mut settings = self.world.settings.clone();
        settings.insert("database_url", format!("postgres://postgres@127.0.0.1:{}/{database}", proxy.port));
        let settings = serde_json::to_string(&settings).expect("JSON");
        let mut replicas: Vec<Replica> = (0..REPLICAS).map(|_| Replica::start(&settings)).collect();
        let mut troubles = Troubles::default();
        self.steps(async |now, random| {
            for replica in &mut replicas {
                // One that could not reach the database when it started has ended.
                if !replica.turn(now) {
                    *replica = Replica::start(&settings);
                    replica.turn(now);
                }
            }
            tokio::time::sleep(TURN.mul_f64(random.below(1_000) as f64 / 1e3)).await;
            if random.below(5) == 0 {
                let chosen = random.below(REPLICAS as u64) as usize;
                replicas[chosen] = Replica::start(&settings);
                replicas[chosen].turn(now);
                troubles.kills += 1;
            }
            if random.below(20) == 0 {
                proxy.cut();
                tokio::time::sleep(Duration::from_millis(random.below(100))).await;
                proxy.heal();
                troubles.cuts += 1;
            }
            tokio::time::sleep(TURN / 2).await;
        })
        .await;
        assert!(troubles.kills > 5, "{troubles:?}");
        troubles
    }

    async fn by_tasks(&mut self) -> Troubles {
        let config = self.world.config();
        let store = Arc::new(Store::open(&config.database_url, false, Box::new(|_, _, _| ())).await.expect("open"));
        let keyring = Arc::new(Keyring::load(&config.keyring_file).expect("readable").expect("there"));
        let clock = Clock::by_hand(BEGINNING);
        let replicas: Vec<Arc<Notices>> = (0..REPLICAS)
            .map(|_| Notices::new(Arc::clone(&keyring), Arc::clone(&store), clock.clone(), settings_of(&config)).expect("ready"))
            .collect();
        let mut troubles = Troubles::default();
        self.steps(async |now, random| {
            turn(&clock, now);
            let ticks = replicas.iter().map(|replica| (Arc::clone(replica), Duration::from_millis(random.below(60))));
            let ticks: Vec<_> = ticks
                .map(|(replica, patience)| {
                    tokio::spawn(async move {
                        // It may be given up wherever it stands, and the next one goes on from there.
                        let given_up = tokio::time::timeout(patience, replica.scan(now)).await.is_err();
                        let _busy = replica.deliver(now).await;
                        given_up
                    })
                })
                .collect();
            for tick in ticks {
                troubles.dropped += usize::from(tick.await.expect("no panic"));
            }
        })
        .await;
        for replica in &replicas {
            replica.stop().await;
        }
        store.close().await.expect("closed");
        assert!(troubles.dropped > 0, "{troubles:?}");
        troubles
    }
}

const COLUMNS: &str = "id, workspace, digest, display_name, principal, kind, state, hint, scopes, audiences, allowed_cidrs, metadata, session_id, created_by, \
                       create_time, update_time, expire_time, revoke_reason, version, prefix";

fn row(backend: Backend, number: u64) -> String {
    let workspace = WORKSPACES[number as usize % WORKSPACES.len()];
    let bytes = if backend == Backend::Sqlite { "BLOB" } else { "BYTEA" };
    let wave = (number / WORKSPACES.len() as u64 % u64::from(WAVES)) as u32;
    let end = BEGINNING + 40 * DAY + wave * 3 * TURNED;
    format!(
        "('tok_{number:022}', '{workspace}', CAST('{number:024}' AS {bytes}), '{}', 'owner-{}', 1, 1, '{workspace}_0', '', '', '', '{{}}', '', 'admin', \
         {begin}, {begin}, {}, '', 1, '{workspace}')",
        name(number),
        number % 100,
        end.micros(),
        begin = BEGINNING.micros()
    )
}

fn name(number: u64) -> String {
    format!("svc{number:05}")
}

fn settings_of(config: &Config) -> Settings {
    Settings { mail: config.smtp.clone(), webhook_allowed_cidrs: config.webhook_allowed_cidrs.clone(), ca: None }
}

fn turn(clock: &Clock, now: Time) {
    clock.advance(Duration::from_micros((now.micros() - clock.now().micros()).max(0) as u64));
}

/// A process that tells of tokens, beside others. It is killed with SIGKILL when it is dropped.
struct Replica {
    child: Child,
}

impl Replica {
    fn start(settings: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "replicas::a_replica_for_other_tests"]).env(SETTINGS, settings);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self { child: child.expect("it runs") }
    }

    /// Tells it the time; says whether it still runs.
    fn turn(&mut self, now: Time) -> bool {
        let heard = writeln!(self.child.stdin.as_mut().expect("piped"), "{}", now.micros());
        heard.is_ok() && self.child.try_wait().expect("a child").is_none()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a replica does: looks and delivers, each time as late as it is told, until whoever tells it is gone.
async fn tick(settings: BTreeMap<String, String>) {
    install_crypto_provider();
    let (tell, mut told) = watch::channel(0);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            tell.send_replace(line.parse().expect("microseconds"));
        }
        std::process::exit(0);
    });
    let flags = settings.into_iter().map(|(name, value)| (&*name.leak(), value)).collect();
    let config = Config::load(&Sources { flags, ..Sources::default() }).expect("good settings");
    let store = Arc::new(Store::open(&config.database_url, false, Box::new(|_, _, _| ())).await.expect("open"));
    let keyring = Arc::new(Keyring::load(&config.keyring_file).expect("readable").expect("there"));
    let clock = Clock::by_hand(BEGINNING);
    let notices = Notices::new(keyring, store, clock.clone(), settings_of(&config)).expect("ready");
    loop {
        let now = Time::from_micros(*told.wait_for(|now| *now > 0).await.expect("the time"));
        turn(&clock, now);
        // The database is gone now and then.
        let _unavailable = notices.scan(now).await;
        loop {
            let _unavailable = notices.deliver(now).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
            if told.has_changed().expect("the time") {
                break;
            }
        }
    }
}
