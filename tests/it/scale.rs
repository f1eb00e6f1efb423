//! A workspace among a thousand costs what it costs alone.
//!
//! The same thousand tokens are asked about in turns in a store with a million others and in a store without any. The medians are printed, and never judged;
//! what PostgreSQL says it has read is.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use keyward::proto;
use prost_types::Timestamp;

use crate::{
    plans::read,
    process::{Process, Site},
    tables::{fill, micros},
    world::{self, Actor, Backend, Postgres},
};

/// How often each question is asked of each store.
const TIMES: usize = 40;
/// The workspace that is asked about.
const TEAM: &str = "team-500";

/// A store with its server, and who asks.
struct Place {
    _process: Process,
    _site: Site,
    root: Actor,
}

impl Place {
    /// A store with these tokens alone, or with none.
    async fn new(backend: Backend, url: String, counts: Option<(u64, u64)>) -> Self {
        let site = Site::at(backend, url);
        site.start().await.kill();
        if let Some((large, of_teams)) = counts {
            fill(&site, large, of_teams, Some(TEAM)).await;
        }
        let process = site.start().await;
        let root = site.root(&process).await;
        Self { _process: process, _site: site, root }
    }
}

/// Compares the full store with one that has the same workspace alone, and creation with an empty one.
pub async fn compare(site: &Site, root: &Actor, large: u64, of_teams: u64, postgres: Option<&Postgres>) {
    let url = async || match postgres {
        Some(postgres) => postgres.new_database().await,
        None => String::new(),
    };
    let alone = Place::new(site.backend, url().await, Some((large, of_teams))).await;
    let empty = Place::new(site.backend, url().await, None).await;
    let full = admin(root, TEAM).await;
    let (alone, empty) = (admin(&alone.root, TEAM).await, admin(&empty.root, "default").await);
    println!("{:48} {:>9} {:>9} {:>6}", "a workspace of 1,000 tokens", "alone", "among all", "ratio");
    let log = postgres.map(|postgres| postgres.folder.join("postgres.log"));
    for (name, request) in lists() {
        let before = log.as_deref().map(|log| read(log).len());
        interleaved(name, &alone, &full, async |actor| drop(actor.list(request.clone()).await.expect("a page"))).await;
        if let (Some(log), Some(before)) = (log.as_deref(), before) {
            check_rows_read(name, log, before);
        }
    }
    let page = full.list(proto::ListTokensRequest::default()).await.expect("a page");
    let id = page.tokens.last().expect("some").id.clone();
    interleaved("GetToken", &alone, &full, async |actor| drop(actor.get(&id).await.expect("found"))).await;
    let new = proto::CreateTokenRequest {
        principal: "newcomer".to_owned(),
        audiences: vec!["billing".to_owned()],
        ..world::new_token("new", &[])
    };
    interleaved("CreateToken, beside an empty store", &empty, &full, async |actor| drop(actor.create(new.clone()).await.expect("created")))
        .await;
}

/// An administrator of a workspace.
async fn admin(root: &Actor, workspace: &str) -> Actor {
    let wish = world::new_token("admin", &["keyward:admin"]);
    let wish = proto::CreateTokenRequest { workspace: workspace.to_owned(), principal: "manager".to_owned(), ..wish };
    Actor { token: Some(root.create(wish).await.expect("created").secret), ..root.clone() }
}

fn lists() -> Vec<(&'static str, proto::ListTokensRequest)> {
    let list = proto::ListTokensRequest::default;
    let soon = Some(Timestamp { seconds: micros() / 1_000_000 + 5_000_000, nanos: 0 });
    vec![
        ("a page", list()),
        ("a page by display_name", proto::ListTokensRequest { order_by: "display_name".to_owned(), ..list() }),
        ("of a principal", proto::ListTokensRequest { principal: "member-3".to_owned(), ..list() }),
        ("for an audience", proto::ListTokensRequest { audience: "billing".to_owned(), ..list() }),
        ("active", proto::ListTokensRequest { states: vec![1], ..list() }),
        ("expired", proto::ListTokensRequest { states: vec![3], ..list() }),
        ("revoked", proto::ListTokensRequest { states: vec![4], ..list() }),
        ("ending soon", proto::ListTokensRequest { expires_before: soon, ..list() }),
        ("with a text that many names hold", proto::ListTokensRequest { query: "service 7".to_owned(), ..list() }),
        ("with a text that no name holds", proto::ListTokensRequest { query: "nothing".to_owned(), ..list() }),
    ]
}

/// Asks both in turns, and prints what it took.
async fn interleaved(name: &str, base: &Actor, full: &Actor, call: impl AsyncFn(&Actor)) {
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..TIMES {
        // Neither is always the first.
        for place in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
            let watch = Instant::now();
            call([base, full][place]).await;
            times[place].push(watch.elapsed());
        }
    }
    let [base, full] = times.map(|mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    });
    println!("{name:48} {base:6.2} ms {full:6.2} ms {:6.2}", full / base);
}

/// No list looks at more rows than the workspace has tokens: of each token its own row, that of its uses, and that of its audience.
fn check_rows_read(name: &str, log: &Path, before: usize) {
    let said = read(log)[before..].replace("\n\t", "\u{1}");
    let lists = said.lines().filter(|entry| entry.contains(r#"FROM "token" LEFT JOIN"#) && entry.contains("plan:"));
    let mut seen = 0;
    for entry in lists {
        let rows = rows_read(entry);
        assert!((1..=3 * 1_200).contains(&rows), "{name}: {rows} rows were read: {}", entry.replace('\u{1}', "\n"));
        seen += 1;
    }
    assert!(seen >= TIMES, "{name}: {seen} plans were seen");
}

/// The rows that the scans of a plan have found and thrown away.
fn rows_read(plan: &str) -> u64 {
    let number = |text: &str, name: &str| -> Option<f64> {
        let (_, rest) = text.split_once(name)?;
        rest.split(|char: char| !char.is_ascii_digit() && char != '.').next()?.parse().ok()
    };
    let (mut rows, mut loops) = (0.0, 1.0);
    for step in plan.split('\u{1}') {
        if let Some((_, actual)) = step.split_once("(actual ") {
            loops = number(actual, "loops=").unwrap_or(1.0);
            if step.contains(" Scan") {
                rows += number(actual, "rows=").unwrap_or(0.0) * loops;
            }
        } else if let Some(removed) = number(step, "Rows Removed by Filter: ") {
            rows += removed * loops;
        }
    }
    rows as u64 + 1
}
