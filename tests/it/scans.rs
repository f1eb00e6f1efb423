//! A look for tokens near their end, among a million: what it costs the database, and those whose tokens are judged meanwhile.
//!
//! Times are printed, and never judged; the index that the look takes is. `KEYWARD_TEST_SCAN_ROWS` is the number of tokens: a quarter in one large workspace, whose
//! tokens near their end are a hundredth of all, the rest in a thousand workspaces.

use std::time::{Duration, Instant};

use keyward::proto;
use sea_orm::{ConnectionTrait as _, DatabaseConnection};

use crate::{
    crash::number_from,
    plans::explained,
    process::{Site, number},
    tables::{fill, micros},
    world::{self, Actor, Backend, World, eventually},
};

const ROWS: u64 = 1_000_000;
/// What a look does, by the verbs of the store.
const VERBS: [(&str, &str); 4] = [
    ("notices_scan", "finding"),
    ("change", "telling"),
    ("faults", "faults swept and counted"),
    ("notices", "wishes read, outbox counted"),
];
/// No call of the webhook gets through, so that the outbox stays as it is.
const NOWHERE: &str = "http://127.0.0.1:9/";

mod sqlite {
    #[test]
    fn one_scan_among_a_million_tokens_is_cheap() {
        super::run(crate::world::Backend::Sqlite);
    }
}

mod postgres {
    #[test]
    fn one_scan_among_a_million_tokens_is_cheap() {
        super::run(crate::world::Backend::Postgres);
    }
}

fn run(backend: Backend) {
    if backend == Backend::Postgres && world::postgres().is_none() {
        return world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    }
    world::runtime().block_on(async {
        let count = number_from("KEYWARD_TEST_SCAN_ROWS").unwrap_or(ROWS);
        let mut world = World::unstarted(backend).await;
        world.clock = keyward::ambient::Clock::system();
        world.settings.insert("webhook_allowed_cidrs", "127.0.0.0/8".to_owned());
        world.settings.insert("notices_interval", "1s".to_owned());
        // Nearly every token that is asked about is looked for in the database.
        world.settings.insert("cache_bytes", "4194304".to_owned());
        world.start_server().await;
        world.relax().await;
        world.stop_server().await;
        let begin = Instant::now();
        fill(&site_of(&world), count / 4, count * 3 / 4, None).await;
        println!("{backend:?}: {count} tokens, made in {:.1} s", begin.elapsed().as_secs_f64());
        world.start_server().await;
        look(&world, count).await;
        world.stop_server().await;
    });
}

/// The same database, as a site.
fn site_of(world: &World) -> Site {
    let database_url = match world.backend {
        Backend::Sqlite => format!("sqlite://{}/data/keyward.db", world.folder.path().display()),
        Backend::Postgres => world.settings["database_url"].clone(),
    };
    Site { backend: world.backend, folder: tempfile::tempdir().expect("a folder"), database_url, arguments: Vec::new() }
}

async fn look(world: &World, count: u64) {
    let (db, root) = (world.db().await, world.root().await);
    let mut secrets = Vec::new();
    for number in 0..2_000 {
        let wish = proto::CreateTokenRequest { workspace: format!("team-{}", number % 1_000), ..world::new_token("asked about", &[]) };
        secrets.push(root.create(wish).await.expect("created").secret);
    }
    let mut asking = Asking { root: root.clone(), secrets, next: 0 };
    scans(world, 2).await;
    let alone = asking.for_a_while(Duration::from_secs(4), async || false).await;
    // A hundredth of all tokens are nearer to their end than this.
    let near = format!(
        "SELECT MAX(expire_time) FROM (SELECT expire_time FROM token WHERE workspace = 'default' AND kind = 1 AND delete_time IS NULL AND state <> 3 \
         AND expire_time > {} ORDER BY expire_time LIMIT {}) AS near",
        micros(),
        count / 100
    );
    let days = u16::try_from((number(&db, &near).await - micros()) / 86_400_000_000 + 1).unwrap();
    let before = Cost::now(world).await;
    let told = tell(world, &root, "default", days).await;
    let marks = "SELECT COUNT(*) FROM notice_mark";
    let watch = Instant::now();
    let during = asking.for_a_while(Duration::from_mins(1), async || number(&db, marks).await as u64 >= told).await;
    println!("{:?}: {told} tokens told in {:.1} s, while {} calls were made", world.backend, watch.elapsed().as_secs_f64(), during.len());
    scans(world, 1).await;
    Cost::now(world).await.since(&before, &format!("the looks that tell {told}"));
    uses_the_index(world, &db).await;
    scans(world, 1).await;
    let before = Cost::now(world).await;
    let idle = asking.for_a_while(Duration::from_secs(4), async || false).await;
    Cost::now(world).await.since(&before, "looks that find nothing new");
    // Every workspace wants to hear of its tokens.
    db.execute_unprepared(
        "UPDATE workspace SET notices = (SELECT d.notices FROM workspace d WHERE d.id = 'default') WHERE id LIKE 'team-%'",
    )
    .await
    .expect("changed");
    let marked = async || number(&db, marks).await;
    loop {
        let before = marked().await;
        scans(world, 3).await;
        if marked().await == before {
            break;
        }
    }
    println!("{:?}: {} tokens of a thousand workspaces told", world.backend, marked().await);
    let before = Cost::now(world).await;
    let of_all = asking.for_a_while(Duration::from_secs(4), async || false).await;
    Cost::now(world).await.since(&before, "looks that find nothing new, in a thousand workspaces");
    for (name, mut times) in
        [("nobody is told", alone), ("they are being told", during), ("nothing is new", idle), ("nothing is new in a thousand", of_all)]
    {
        times.sort_unstable();
        let millis = |part: usize| times[times.len() * part / 100].as_secs_f64() * 1e3;
        println!("{:?}: ValidateToken while {name}: p50 {:.2} ms, p99 {:.2} ms of {}", world.backend, millis(50), millis(99), times.len());
    }
}

/// Has a workspace hear of its tokens; says how many are near their end.
async fn tell(world: &World, root: &Actor, workspace: &str, days: u16) -> u64 {
    let end = micros() + i64::from(days) * 86_400_000_000;
    let near = format!(
        "SELECT COUNT(*) FROM token WHERE workspace = '{workspace}' AND kind = 1 AND delete_time IS NULL AND state <> 3 AND expire_time BETWEEN {} AND {end}",
        micros()
    );
    let told = world.db_number(&near).await;
    let notices =
        proto::Notices { days_before: vec![days.into()], raise_faults: true, webhook_url: NOWHERE.to_owned(), ..Default::default() };
    let wish = proto::Workspace { id: workspace.to_owned(), notices: Some(notices), ..Default::default() };
    root.update_workspace(wish, &["notices"]).await.expect("changed");
    told as u64
}

/// Waits for so many looks to end.
async fn scans(world: &World, more: u64) {
    // A look ends by counting what waits; each reads the wishes and counts.
    let done = async || world.queries("purge").await;
    let before = done().await;
    eventually("a look", async || (done().await >= before + more as f64).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
}

/// What the store has taken so far, by verb: how often, and how long.
struct Cost([(f64, f64); VERBS.len()], f64);

impl Cost {
    async fn now(world: &World) -> Self {
        let page = world.metrics().await;
        let read = |name: &str, verb: &str| {
            let name = format!("keyward_store_seconds_{name}{{verb=\"{verb}\"}}");
            page.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse().ok()).unwrap_or(0.0)
        };
        Self(VERBS.map(|(verb, _)| (read("count", verb), read("sum", verb))), read("count", "purge"))
    }

    fn since(&self, before: &Self, what: &str) {
        let looks = self.1 - before.1;
        println!("{what}: {looks} of them; of the database each takes, on average");
        for (index, (verb, does)) in VERBS.iter().enumerate() {
            let (count, seconds) = (self.0[index].0 - before.0[index].0, self.0[index].1 - before.0[index].1);
            println!("  {verb:14} {:9.2} ms in {:8.1} statements ({does})", seconds / looks * 1e3, count / looks);
        }
    }
}

/// What finds the tokens takes the index by their ends, whichever database it is.
async fn uses_the_index(world: &World, db: &DatabaseConnection) {
    const INDEX: &str = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'token_by_expire_time'";
    const WHOLE: &str = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'token'";
    if world.backend == Backend::Sqlite {
        let planned = explained(db, std::process::id()).await;
        let finding: Vec<_> =
            planned.iter().filter(|one| one.sql.contains("LEFT JOIN notice_mark m") && one.sql.contains("FROM token")).collect();
        assert!(!finding.is_empty(), "the statement was not seen");
        for one in finding {
            assert!(one.steps.iter().any(|step| step.contains("SEARCH token USING") && step.contains("token_by_expire_time")), "{one:#?}");
        }
        return;
    }
    let scans = async |sql: &str| number(db, sql).await;
    let (whole, index) = (scans(WHOLE).await, scans(INDEX).await);
    eventually("a look along the index", async || (scans(INDEX).await > index + 3).then_some(())).await;
    assert_eq!(scans(WHOLE).await, whole, "all tokens were read");
}

/// Asks about tokens, one after the other.
struct Asking {
    root: Actor,
    secrets: Vec<String>,
    next: usize,
}

impl Asking {
    /// What each call took, until the time is up or something has happened.
    async fn for_a_while(&mut self, span: Duration, mut happened: impl AsyncFnMut() -> bool) -> Vec<Duration> {
        let (begin, mut times) = (Instant::now(), Vec::new());
        while begin.elapsed() < span {
            for _ in 0..20 {
                let watch = Instant::now();
                self.root.verdict(&self.secrets[self.next % self.secrets.len()]).await;
                times.push(watch.elapsed());
                self.next += 1;
            }
            if happened().await {
                break;
            }
        }
        times
    }
}
