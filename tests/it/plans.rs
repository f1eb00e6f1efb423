//! The statements that the store really sends, on full tables: each list and look-up is served by an index.
//!
//! A server is asked for everything that reads. PostgreSQL then has each plan in its log (`auto_explain`); of SQLite, the texts of the prepared
//! statements are read in the memory of the server's process, since it logs none, and explained. What the questions took is printed, and never
//! judged. `KEYWARD_TEST_PLAN_ROWS` is the number of tokens in a thousand workspaces; a large workspace beside them has a quarter of that.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

use keyward::proto::{self, notice_service_client::NoticeServiceClient};
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, Statement};

use crate::{
    process::{Process, Site, number, text},
    scale,
    tables::{self, fill, micros},
    tls::{self, Authority},
    world::{self, Actor, Backend, Postgres},
};

const ROWS: u64 = 1_000_000;
/// How often each question is asked: on either of two connections more than five times, since PostgreSQL may then take a plan for any values.
const TIMES: usize = 14;
/// After this a question is not asked again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What makes PostgreSQL log each plan.
const EXPLAINING: [&str; 12] = [
    "-c",
    "session_preload_libraries=auto_explain",
    "-c",
    "auto_explain.log_min_duration=0",
    // With the rows that each step read.
    "-c",
    "auto_explain.log_analyze=on",
    "-c",
    "auto_explain.log_timing=off",
    "-c",
    "log_line_prefix=%a|",
    "-c",
    "fsync=off",
];

/// Tables that grow, with their names in statements. None is ever read from end to end.
const LARGE: [&str; 18] = [
    "workspace",
    "w",
    "prefix",
    "token",
    "t",
    "principal",
    "p",
    "token_usage",
    "token_audience",
    "audit_event",
    "change_log",
    "replay",
    "notice_mark",
    "m",
    "fault",
    "f",
    "notice",
    "webhook_secret",
];

/// Tables that have few rows here, which PostgreSQL reads from end to end as long as that is so. SQLite's plans show that there are indexes.
const FEW: [&str; 6] = ["notice_mark", "m", "fault", "f", "notice", "webhook_secret"];

/// What may be read from end to end: the table, part of the statement, and part of the step. A page of all workspaces in the order of their ids, and whether
/// there is any; the few tokens that ever were root tokens, which have an index of their own. For a hundred facts at once, and for root tokens,
/// PostgreSQL reads a thousand workspaces rather than finding each. The workspaces that want to be told something have an index of their own. All faults are counted,
/// and all notices, each kind along its index.
const WHOLE: [(&str, &str, &str); 12] = [
    // A thousand of them, found by their ids.
    ("f", "FROM fault WHERE id > $1 ORDER BY id LIMIT 1000) AS f", "SCAN f"),
    ("workspace", "WHERE notices <> '' AND delete_time IS NULL", "workspace_by_notices"),
    ("f", "SELECT COUNT(CASE WHEN f.expire_time", ""),
    ("fault", "SELECT COUNT(CASE WHEN f.expire_time", ""),
    ("notice", "SELECT FALSE, COUNT(CASE WHEN channel", "notice_by_due_time"),
    ("notice", "SELECT FALSE, COUNT(CASE WHEN channel", "notice_by_create_time"),
    ("workspace", r#"ORDER BY "workspace"."id" ASC LIMIT"#, ""),
    ("workspace", "SELECT 1 FROM workspace LIMIT 1", ""),
    ("workspace", "WHERE t.is_root AND", "Seq Scan on workspace w"),
    ("workspace", "$100) AND t.delete_time IS NULL", "Seq Scan on workspace w"),
    ("token", "WHERE t.is_root AND", "token_by_root"),
    ("t", "WHERE t.is_root AND", "token_by_root"),
];

/// Filters that may find few rows, and the index of which one then has to be used.
const RARE: [(&str, &str); 9] = [
    (r#""token"."session_id" ="#, "token_by_session"),
    (r#""token"."principal" ="#, "token_by_principal"),
    (r#""token"."principal" ="#, "token_by_live_principal"),
    (r#""token"."created_by" ="#, "token_by_created_by"),
    (r#""token_audience"."audience" ="#, "token_audience"),
    (STATE, "token_by_state"),
    (r#""audit_event"."principal" ="#, "audit_event_by_principal"),
    (r#""audit_event"."actor_principal" ="#, "audit_event_by_actor"),
    (r#""audit_event"."method" IN"#, "audit_event_by_method"),
];
const STATE: &str = r#"AND ("token"."state" ="#;

/// What must be among the statements that were seen. The lists are looked for by themselves.
const LOOK_UPS: [&str; 48] = [
    "SELECT id, notices, raise_faults FROM workspace WHERE notices <> ''",
    "AS MATERIALIZED (SELECT id, expire_time FROM token WHERE workspace = $1 AND kind = 1",
    "WHERE t.id IN ($1",
    "SELECT COUNT(CASE WHEN f.expire_time",
    "SELECT f.id, f.token_id, t.id IS NULL",
    "SELECT FALSE, COUNT(CASE WHEN channel",
    "SELECT workspace FROM notice WHERE channel = $1",
    "WITH due AS MATERIALIZED",
    "UPDATE notice SET dead = TRUE, claim = ''",
    "WHERE dead AND create_time < $1",
    "FROM fault f CROSS JOIN token t",
    "UPDATE fault SET acknowledge_time",
    "FROM webhook_secret WHERE workspace = $1",
    r#"FROM "notice" WHERE "notice"."workspace" = "#,
    "WHERE t.digest IN",
    "WHERE t.previous_digest IN",
    r#"WHERE "token"."id" = "#,
    r#"WHERE "token"."digest" = "#,
    r#"WHERE "token"."previous_digest" = "#,
    "FROM replay WHERE id = $1 AND expire_time <=",
    "SELECT request, answer FROM replay WHERE id = $1",
    "DELETE FROM replay WHERE expire_time <= $1",
    "SELECT MAX(seq) FROM change_log WHERE change_time <= $1",
    r#""token"."state" <> "#,
    r#""token"."session_id" = "#,
    "SELECT COUNT(*) FROM (SELECT 1 FROM token WHERE workspace = $1 AND principal = $2 AND kind = $3 AND expire_time > $4",
    "WHERE t.is_root AND",
    "FROM token WHERE expire_time + 0 <= $1",
    "FROM token WHERE revoke_time <= $1",
    "FROM token WHERE delete_time <= $1",
    "FROM token WHERE workspace = $1 AND delete_time IS NULL",
    "DELETE FROM token WHERE id IN",
    "DELETE FROM token_usage WHERE token_id IN",
    "DELETE FROM token_audience WHERE token_id IN",
    "DELETE FROM token_audience WHERE token_id = $1",
    "DELETE FROM audit_event WHERE id IN",
    "DELETE FROM principal WHERE workspace = $1 AND id IN",
    "DELETE FROM principal WHERE workspace = $1 AND id = $2",
    "DELETE FROM prefix WHERE workspace = $1",
    "SELECT id FROM workspace WHERE emptied = $1 AND delete_time <= $2",
    r#"WHERE "workspace"."id" = "#,
    r#"WHERE "workspace"."delete_time" IS NULL ORDER BY "workspace"."id" ASC"#,
    r#""workspace"."id" > "#,
    r#"ORDER BY "principal"."id" ASC"#,
    r#""principal"."id" > "#,
    r#"WHERE "principal"."workspace" = "#,
    r#"ORDER BY "audit_event"."event_time" DESC, "audit_event"."id" DESC LIMIT"#,
    r#"("audit_event"."event_time", "audit_event"."id") < ("#,
];

/// What finds tokens near their end.
const NEAR_END: &str = "AS MATERIALIZED (SELECT id, expire_time FROM token";

/// What is asked for those who come with a client certificate.
const OF_CERTIFICATES: &str = "LEFT JOIN principal p ON p.workspace = w.id AND p.id = $2 WHERE w.id = $1";

mod sqlite {
    #[test]
    fn every_query_has_its_index() {
        super::run(crate::world::Backend::Sqlite);
    }
}

mod postgres {
    #[test]
    fn every_query_has_its_index() {
        super::run(crate::world::Backend::Postgres);
    }
}

fn run(backend: Backend) {
    let postgres = if backend == Backend::Postgres { Postgres::start(&EXPLAINING) } else { None };
    if backend == Backend::Postgres && postgres.is_none() {
        return world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    }
    world::runtime().block_on(async {
        let url = match &postgres {
            Some(postgres) => postgres.new_database().await,
            None => String::new(),
        };
        let mut site = Site::at(backend, url);
        // What is told goes nowhere, so that it stays.
        site.arguments = ["--notices-interval", "1s", "--webhook-allowed-cidrs", "127.0.0.0/8"].map(str::to_owned).to_vec();
        // The first process makes the tables.
        site.start().await.kill();
        let count = std::env::var("KEYWARD_TEST_PLAN_ROWS").map_or(ROWS, |text| text.parse().expect("a whole number"));
        let begin = Instant::now();
        fill(&site, count / 4, count, None).await;
        println!(
            "{backend:?}: {count} tokens of {} teams and {} more, made in {:.1} s",
            tables::TEAMS,
            count / 4,
            begin.elapsed().as_secs_f64()
        );
        let log = postgres.as_ref().map(|postgres| postgres.folder.join("postgres.log"));
        let before = log.as_ref().map_or(0, |log| read(log).len());
        let process = site.start().await;
        let root = site.root(&process).await;
        let db = site.db().await;
        // What ended long ago is removed as soon as a server runs.
        let gone = "SELECT COUNT(*) FROM workspace WHERE id = 'gone'";
        world::eventually("what ended long ago is gone", async || (number(&db, gone).await == 0).then_some(())).await;
        ask_everything(&site, &root).await;
        ask_about_notices(&site, &root).await;
        let mut planned = match &log {
            Some(log) => logged(&read(log)[before..]),
            None => explained(&db, process.id()).await,
        };
        check(&planned);
        check_presence(&planned);
        scale::compare(&site, &root, count / 4, count, postgres.as_ref()).await;
        planned.clear();
        if backend == Backend::Sqlite {
            // Until its first clean stop a server has no statistics; the lists without filters do not need any.
            drop(db);
            let db = site.db().await;
            db.execute_unprepared("DROP TABLE sqlite_stat1; DROP TABLE sqlite_stat4").await.expect("dropped");
            drop(db);
            let plain = explained(&site.db().await, process.id()).await.into_iter().filter(|planned| planned.values == Values::Any);
            planned.extend(plain.filter(|planned| !planned.has_filter()));
        }
        check(&planned);
        process.kill();
        let before = log.as_ref().map_or(0, |log| read(log).len());
        let process = come_with_a_certificate(site).await;
        let planned = match &log {
            Some(log) => logged(&read(log)[before..]),
            None => explained(&process.0.db().await, process.1.id()).await,
        };
        check(&planned);
        assert!(planned.iter().any(|one| one.sql.contains(OF_CERTIFICATES)), "no statement with {OF_CERTIFICATES} was seen");
    });
}

/// Has the store asked about somebody who comes with a client certificate.
async fn come_with_a_certificate(mut site: Site) -> (Site, Process) {
    let (authority, folder) = (Authority::new(), site.folder.path().to_owned());
    site.arguments =
        tls::settings(&authority, &folder).into_iter().flat_map(|(name, value)| [format!("--{}", name.replace('_', "-")), value]).collect();
    let process = site.start().await;
    let port = process.port();
    let channel = tls::connect_to(port, &authority, Some(&authority.gateway())).await.expect("a connection");
    let gateway = Actor { channel, token: None };
    gateway.own().who_am_i(gateway.request(proto::WhoAmIRequest {})).await.expect("known");
    (site, process)
}

/// What a plan was made for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Values {
    Any,
    Frequent,
    Rare,
}

/// A statement with the steps of its plan.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Planned {
    pub sql: String,
    pub values: Values,
    pub steps: Vec<String>,
}

impl Planned {
    /// A page of tokens.
    fn is_list(&self) -> bool {
        self.sql.contains(r#"FROM "token" LEFT JOIN"#) && self.sql.contains("ORDER BY") && self.sql.contains("LIMIT")
    }

    /// No order helps to find part of a name, or tokens that nobody used: every token of the workspace may have to be looked at.
    fn looks_at_everything(&self) -> bool {
        self.sql.contains("LIKE") || self.sql.contains(r#""last_used_time" <"#)
    }

    /// The filter finds few tokens, or is no part of the order: what it finds may be sorted.
    fn may_sort(&self) -> bool {
        let ends_before = self.sql.contains(r#""expire_time" <"#) && !self.sql.contains(r#"ORDER BY "token"."expire_time""#);
        ends_before || self.looks_at_everything() || RARE.iter().any(|(filter, _)| *filter != STATE && self.sql.contains(filter))
    }

    fn has_filter(&self) -> bool {
        self.may_sort() || self.sql.contains(r#""token"."state""#)
    }

    /// The step that reads this table from end to end.
    fn scan_of(&self, table: &str) -> Option<&String> {
        let by_itself = |step: &&String| {
            let step = format!("{} ", step.trim().trim_start_matches("-> ").trim_start());
            step.contains(&format!("Seq Scan on {table} ")) || step.starts_with(&format!("SCAN {table} "))
        };
        // PostgreSQL may also walk a whole index: then no condition follows.
        let along_an_index = self.steps.windows(2).find(|pair| {
            let on_the_table = pair[0].contains(" Scan") && pair[0].contains(" using ") && pair[0].contains(&format!(" on {table} "));
            on_the_table && !pair[1].trim().starts_with("Index Cond")
        });
        let scan = self.steps.iter().find(by_itself).or(along_an_index.map(|pair| &pair[0]));
        let is_whole = |step: &&String| {
            let fits = |(whole, sql, index): &(&str, &str, &str)| *whole == table && self.sql.contains(sql) && step.contains(index);
            WHOLE.iter().any(fits) && !self.sorts()
        };
        scan.filter(|step| !(is_whole(step) || (FEW.contains(&table) && step.contains("Seq Scan"))))
    }

    fn sorts(&self) -> bool {
        self.steps.iter().any(|step| step.contains("Sort Key") || step.contains("TEMP B-TREE"))
    }
}

fn check(planned: &BTreeSet<Planned>) {
    // One of each kind is enough to read.
    let mut faults = BTreeMap::new();
    for one in planned {
        for table in LARGE {
            if !one.looks_at_everything() && one.scan_of(table).is_some() {
                faults.insert((format!("{table} is read from end to end"), &one.sql), one);
            }
        }
        if one.sql.contains(NEAR_END) && !one.steps.iter().any(|step| step.contains("token_by_expire_time")) {
            faults.insert(("not by their end".to_owned(), &one.sql), one);
        }
        if one.is_list() && !one.may_sort() && one.sorts() {
            faults.insert(("the workspace is sorted".to_owned(), &one.sql), one);
        }
        let rare: Vec<_> = RARE.iter().filter(|(filter, _)| one.values == Values::Rare && one.sql.contains(filter)).collect();
        if !rare.is_empty() && !one.steps.iter().any(|step| rare.iter().any(|(_, index)| step.contains(index))) {
            faults.insert((format!("none of {rare:?} is used"), &one.sql), one);
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

fn check_presence(planned: &BTreeSet<Planned>) {
    let seen = |parts: &[&str]| planned.iter().any(|one| parts.iter().all(|part| one.sql.contains(part)));
    for part in LOOK_UPS {
        assert!(seen(&[part]), "no statement with {part} was seen");
    }
    for key in ["create_time", "display_name", "expire_time"] {
        for (direction, comparison) in [("ASC", ">"), ("DESC", "<")] {
            let order = format!(r#"ORDER BY "token"."{key}" {direction}, "token"."id" {direction} LIMIT"#);
            let continued = format!(r#"("token"."{key}", "token"."id") {comparison} ("#);
            assert!(seen(&[&order]) && seen(&[&order, &continued]), "no list {order}, or no second page");
        }
    }
    for (filter, _) in RARE {
        assert!(planned.iter().any(|one| one.values == Values::Rare && one.sql.contains(filter)), "no list by {filter} few");
    }
}

pub fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).expect("a log")).into_owned()
}

/// The server's plans in PostgreSQL's log: a line with the name of the program that ends with `plan:`, then lines that begin with a tab.
fn logged(log: &str) -> BTreeSet<Planned> {
    let entries = log.replace("\n\t", "\u{1}");
    let plan = |entry: &str| {
        let (_, explained) = entry.strip_prefix("keyward|")?.split_once("plan:\u{1}Query Text: ")?;
        let mut lines = explained.split('\u{1}');
        let sql = lines.next()?.to_owned();
        let steps: Vec<String> = lines.map(without_cost).collect();
        let is_rare = |step: &String| {
            ["'person-77'", "'session-77'", "'rare-admin'", "'rare'", "(state = '2'", "'SuspendPrincipal'"]
                .iter()
                .any(|value| step.contains(value))
        };
        let values = if steps.iter().any(is_rare) { Values::Rare } else { Values::Any };
        Some(Planned { sql, values, steps })
    };
    entries.lines().filter_map(plan).collect()
}

fn without_cost(step: &str) -> String {
    step.split_once("(cost=").map_or_else(|| step.to_owned(), |(step, _)| step.to_owned())
}

/// SQLite's plans for the statements that a process has prepared: for any values, for those that many tokens have, for those that few have.
pub async fn explained(db: &DatabaseConnection, process: u32) -> BTreeSet<Planned> {
    let mut planned = BTreeSet::new();
    let mut whole: Option<String> = None;
    for sql in statements_in_memory(process) {
        // A text that was written over a longer one is found with the rest of that at its end, and once more as SQLite's own copy.
        if whole.as_ref().is_some_and(|shorter| sql.starts_with(shorter.as_str())) {
            continue;
        }
        // What SQLite does not take is part of a statement, in memory that was given back.
        let Some(any) = explain(db, &sql, Values::Any).await else { continue };
        planned.insert(any);
        for values in [Values::Frequent, Values::Rare] {
            planned.extend(explain(db, &sql, values).await);
        }
        whole = Some(sql);
    }
    planned
}

async fn explain(db: &DatabaseConnection, sql: &str, values: Values) -> Option<Planned> {
    let (explain, column) = match db.get_database_backend() {
        sea_orm::DbBackend::Sqlite => ("EXPLAIN QUERY PLAN", "detail"),
        _ => ("EXPLAIN", "QUERY PLAN"),
    };
    let statement = Statement::from_string(db.get_database_backend(), format!("{explain} {}", with_values(sql, values)));
    let steps = db.query_all_raw(statement).await.ok()?;
    let steps = steps.iter().map(|step| without_cost(&step.try_get::<String>("", column).expect("text"))).collect();
    Some(Planned { sql: sql.to_owned(), values, steps })
}

/// The statements in a process's memory: text that begins with a verb and ends with a zero byte.
fn statements_in_memory(process: u32) -> BTreeSet<String> {
    const PAGE: usize = 4096;
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("Linux");
    let memory = File::open(format!("/proc/{process}/mem")).expect("a child of this process");
    let mut found = BTreeSet::new();
    for map in maps.lines() {
        let words: Vec<&str> = map.split_whitespace().collect();
        // SQLite's own are in the heap, or in memory that the allocator took besides.
        if !words[1].starts_with("rw") || words.get(5).is_some_and(|name| *name != "[heap]") {
            continue;
        }
        let (start, end) = words[0].split_once('-').expect("a range");
        let address = |text| u64::from_str_radix(text, 16).expect("an address");
        let mut bytes = vec![0; usize::try_from(address(end) - address(start)).unwrap()];
        if memory.read_exact_at(&mut bytes, address(start)).is_err() {
            continue;
        }
        // Most of it was never written to.
        let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
        for written in pages.split(|page| **page == [0; PAGE][..page.len()]) {
            found.extend(written.concat().split(|byte| *byte == 0).filter_map(statement));
        }
    }
    found
}

/// The statement in a piece of memory, behind at most a few bytes of the allocator.
fn statement(piece: &[u8]) -> Option<String> {
    let is_verb =
        |start: &usize| ["SELECT ", "UPDATE ", "DELETE ", "WITH "].iter().any(|verb| piece[*start..].starts_with(verb.as_bytes()));
    let sql = &piece[(0..piece.len().min(8)).find(is_verb)?..];
    let is_text = sql.iter().all(|byte| (b' '..=b'~').contains(byte));
    is_text.then(|| String::from_utf8_lossy(sql).into_owned())
}

/// Puts values in the places of `?`, by the names of the columns before them.
fn with_values(sql: &str, values: Values) -> String {
    const NAMES: [&str; 15] = [
        r#""workspace""#,
        r#""session_id""#,
        r#""actor_principal""#,
        r#""method""#,
        r#""token_id""#,
        r#""kind""#,
        r#""state""#,
        r#""principal""#,
        r#""created_by""#,
        r#""audience""#,
        r#""display_name""#,
        r#""id""#,
        "_time\"",
        "LIKE",
        "LIMIT",
    ];
    let mut pieces = sql.split('?');
    let mut filled = pieces.next().unwrap_or_default().to_owned();
    if values == Values::Any {
        return sql.to_owned();
    }
    for piece in pieces {
        let mut before: Vec<(usize, &str)> = NAMES.iter().filter_map(|name| Some((filled.rfind(name)?, *name))).collect();
        before.sort_unstable();
        // The first place of a pair belongs to the last name but one.
        let back = if piece == ", " && !filled.ends_with("IN (") { 2 } else { 1 };
        let name = before.len().checked_sub(back).map_or("", |index| before[index].1);
        filled += &if filled.ends_with("<> ") { excluded(name).to_owned() } else { value(name, values == Values::Rare) };
        filled += piece;
    }
    filled
}

/// What the store asks for everything but.
fn excluded(name: &str) -> &'static str {
    if name == r#""state""# { "3" } else { "''" }
}

fn value(name: &str, rare: bool) -> String {
    let text = |few: &str, many: &str| format!("'{}'", if rare { few } else { many });
    match name {
        r#""workspace""# => "'default'".to_owned(),
        r#""kind""# => "1".to_owned(),
        r#""state""# => if rare { "2" } else { "1" }.to_owned(),
        r#""principal""# => text("person-77", "person-0"),
        r#""created_by""# | r#""actor_principal""# => text("rare-admin", "admin"),
        r#""session_id""# => "'session-77'".to_owned(),
        r#""method""# => text("SuspendPrincipal", "CreateToken"),
        r#""audience""# => text("rare", "billing"),
        r#""display_name""# => "'service 5'".to_owned(),
        r#""id""# | r#""token_id""# => "'tok_0000000000000000001000'".to_owned(),
        "_time\"" => micros().to_string(),
        "LIKE" => text("%nothing%", "%service%"),
        "LIMIT" => "51".to_owned(),
        _ => "?".to_owned(),
    }
}

/// Asks for everything that reads, and says what it took.
async fn ask_everything(site: &Site, root: &Actor) {
    let workspace = proto::Workspace { id: "default".to_owned(), policy: Some(world::lax_policy()), ..Default::default() };
    root.update_workspace(workspace, &["policy"]).await.expect("changed");
    for (name, request) in lists() {
        let page = ask(&name, async || root.list(request.clone()).await.expect("a page")).await;
        if !page.next_page_token.is_empty() {
            let next = proto::ListTokensRequest { page_token: page.next_page_token, ..request };
            ask(&format!("{name}, page 2"), async || root.list(next.clone()).await.expect("a page")).await;
        }
    }
    ask_about_tokens(site, root).await;
    ask_about_many_tokens(root).await;
    ask_about_the_directory(root).await;
    ask_the_audit(root).await;
}

async fn ask_about_tokens(site: &Site, root: &Actor) {
    let id = text(&site.db().await, "SELECT id FROM token WHERE principal = 'person-77' AND delete_time IS NULL").await;
    ask("GetToken", async || root.get(&id).await.expect("found")).await;
    let (token, secret) = ask("CreateToken", async || root.issue("new", &[]).await).await;
    let again = proto::CreateTokenRequest { request_id: "again".to_owned(), ..world::new_token("new", &[]) };
    ask("CreateToken, request_id repeated", async || root.create(again.clone()).await.expect("created")).await;
    ask("RegenerateToken", async || root.regenerate(&token.id, 60).await.expect("done")).await;
    ask("ValidateToken", async || root.verdict(&secret).await).await;
    let by_path = proto::ValidateTokenRequest { token: secret, http_method: "GET".to_owned(), path: "/a".to_owned(), ..Default::default() };
    ask("ValidateToken by path", async || root.ask(by_path.clone()).await.expect("an answer")).await;
    let mut requests = Vec::new();
    for number in 0..100 {
        let token = root.issue(&format!("token {number}"), &[]).await.1;
        requests.push(proto::ValidateTokenRequest { token, peek: true, ..Default::default() });
    }
    let batch = proto::BatchValidateTokensRequest { requests };
    ask("BatchValidateTokens of 100", async || root.validation().batch_validate_tokens(root.request(batch.clone())).await.expect("done"))
        .await;
    let wish = |name: i64| proto::Token { id: token.id.clone(), display_name: name.to_string(), ..Default::default() };
    ask("UpdateToken", async || root.update(wish(micros()), &["display_name"]).await.expect("done")).await;
    ask("RevokeToken", async || root.revoke(&id).await.expect("done")).await;
    root.delete(&token.id).await.expect("done");
    root.get(&id).await.expect("found");
    ask("RevokeToken of a root token", async || {
        let (token, _) = root.issue("root", &["keyward:root"]).await;
        root.revoke(&token.id).await.expect("done")
    })
    .await;
}

async fn ask_about_many_tokens(root: &Actor) {
    ask("RevokePrincipalTokens", async || root.revoke_principal("person-78").await.expect("done")).await;
    let of_few = proto::CreateTokenRequest { principal: "person-77".to_owned(), ..world::new_token("member", &["keyward:self"]) };
    let member = Actor { token: Some(root.create(of_few).await.expect("created").secret), ..root.clone() };
    for (name, actor) in [("EndSession", root), ("EndSession of one's own", &member)] {
        let message = proto::EndSessionRequest { session_id: "session-77".to_owned(), ..Default::default() };
        ask(name, async || actor.own().end_session(actor.request(message.clone())).await.expect("done")).await;
    }
    let (token, old) = root.issue("leaked", &[]).await;
    let new = root.regenerate(&token.id, 600).await.expect("done").secret;
    for (name, text) in [("ReportLeakedTokens of an old secret", old), ("ReportLeakedTokens", new)] {
        let message = proto::ReportLeakedTokensRequest { tokens: vec![text] };
        ask(name, async || root.own().report_leaked_tokens(root.request(message.clone())).await.expect("done")).await;
    }
}

async fn ask_about_the_directory(root: &Actor) {
    let list = proto::ListWorkspacesRequest::default();
    let page = ask("ListWorkspaces", async || root.workspaces().list_workspaces(root.request(list.clone())).await.expect("a page")).await;
    let next = proto::ListWorkspacesRequest { page_token: page.into_inner().next_page_token, ..list };
    ask("ListWorkspaces, page 2", async || root.workspaces().list_workspaces(root.request(next.clone())).await.expect("a page")).await;
    for (name, query) in [("ListPrincipals", ""), ("ListPrincipals with a text that few hold", "person-777")] {
        let list = proto::ListPrincipalsRequest { query: query.to_owned(), page_size: 5, ..Default::default() };
        let page = ask(name, async || root.principals().list_principals(root.request(list.clone())).await.expect("a page")).await;
        let next = proto::ListPrincipalsRequest { page_token: page.into_inner().next_page_token, ..list };
        ask(&format!("{name}, page 2"), async || root.principals().list_principals(root.request(next.clone())).await.expect("a page"))
            .await;
    }
    let (id, workspace) = ("person-80".to_owned(), String::new());
    let get = proto::GetPrincipalRequest { id: id.clone(), workspace: workspace.clone() };
    ask("GetPrincipal", async || root.principals().get_principal(root.request(get.clone())).await.expect("found")).await;
    let (suspend, resume) = (
        proto::SuspendPrincipalRequest { id: id.clone(), ..Default::default() },
        proto::ResumePrincipalRequest { id: id.clone(), ..Default::default() },
    );
    ask("SuspendPrincipal, ResumePrincipal", async || {
        root.principals().suspend_principal(root.request(suspend.clone())).await.expect("done");
        root.principals().resume_principal(root.request(resume.clone())).await.expect("done");
    })
    .await;
    ask("UpsertPrincipal, DeletePrincipal", async || {
        let principal = proto::Principal { id: "new".to_owned(), display_name: micros().to_string(), ..Default::default() };
        let upsert = proto::UpsertPrincipalRequest { principal: Some(principal) };
        root.principals().upsert_principal(root.request(upsert)).await.expect("done");
        let delete = proto::DeletePrincipalRequest { id: "new".to_owned(), ..Default::default() };
        root.principals().delete_principal(root.request(delete)).await.expect("done");
    })
    .await;
    let (suspend, resume) = (
        proto::SuspendWorkspaceRequest { id: "other".to_owned(), ..Default::default() },
        proto::ResumeWorkspaceRequest { id: "other".to_owned(), ..Default::default() },
    );
    ask("SuspendWorkspace, ResumeWorkspace", async || {
        root.workspaces().suspend_workspace(root.request(suspend.clone())).await.expect("done");
        root.workspaces().resume_workspace(root.request(resume.clone())).await.expect("done");
    })
    .await;
}

async fn ask_about_notices(site: &Site, root: &Actor) {
    let notices =
        proto::Notices { days_before: vec![1], raise_faults: true, webhook_url: "http://127.0.0.1:9/".to_owned(), ..Default::default() };
    let workspace = proto::Workspace { id: "default".to_owned(), notices: Some(notices), ..Default::default() };
    root.update_workspace(workspace, &["notices"]).await.expect("changed");
    let db = site.db().await;
    let tried = "SELECT COUNT(*) FROM notice WHERE last_error <> ''";
    world::eventually("tokens near their end are told", async || (number(&db, tried).await > 0).then_some(())).await;
    let service = || NoticeServiceClient::new(root.channel.clone());
    let token_id = text(&db, "SELECT MIN(token_id) FROM fault").await;
    let faults = proto::ListFaultsRequest { page_size: 5, ..Default::default() };
    let lists = [
        ("faults", faults.clone()),
        ("faults of a principal", proto::ListFaultsRequest { principal: "person-7".to_owned(), ..faults.clone() }),
        ("faults of a token", proto::ListFaultsRequest { token_id, ..faults.clone() }),
        ("faults that nobody takes care of", proto::ListFaultsRequest { unacknowledged_only: true, ..faults }),
    ];
    for (name, list) in lists {
        let page = ask(name, async || service().list_faults(root.request(list.clone())).await.expect("a page")).await.into_inner();
        if !page.next_page_token.is_empty() {
            let next = proto::ListFaultsRequest { page_token: page.next_page_token, ..list };
            ask(&format!("{name}, page 2"), async || service().list_faults(root.request(next.clone())).await.expect("a page")).await;
        }
    }
    let id = text(&db, "SELECT MAX(id) FROM fault").await;
    let acknowledge = proto::AcknowledgeFaultRequest { id };
    ask("AcknowledgeFault", async || service().acknowledge_fault(root.request(acknowledge.clone())).await.expect("done")).await;
    for state in 0..3 {
        let list = proto::ListNoticesRequest { page_size: 5, state, ..Default::default() };
        let page = ask("notices", async || service().list_notices(root.request(list.clone())).await.expect("a page")).await.into_inner();
        if !page.next_page_token.is_empty() {
            let next = proto::ListNoticesRequest { page_token: page.next_page_token, ..list };
            ask("notices, page 2", async || service().list_notices(root.request(next.clone())).await.expect("a page")).await;
        }
    }
    let id = text(&db, "SELECT MAX(id) FROM notice").await;
    service().retry_notice(root.request(proto::RetryNoticeRequest { id })).await.expect("done");
    // Looks with what was told meanwhile.
    tokio::time::sleep(Duration::from_secs(3)).await;
}

async fn ask_the_audit(root: &Actor) {
    let list = proto::ListAuditEventsRequest::default;
    let text = str::to_owned;
    let lists = [
        ("audit", list()),
        ("audit of a token", proto::ListAuditEventsRequest { token_id: text("tok_0000000000000000001000"), ..list() }),
        ("audit about a principal with few", proto::ListAuditEventsRequest { principal: text("person-77"), ..list() }),
        ("audit about a principal with many", proto::ListAuditEventsRequest { principal: text("person-0"), ..list() }),
        ("audit of an actor with few", proto::ListAuditEventsRequest { actor: text("rare-admin"), ..list() }),
        ("audit of an actor with many", proto::ListAuditEventsRequest { actor: text("admin"), ..list() }),
        ("audit of a method with few", proto::ListAuditEventsRequest { methods: vec![text("SuspendPrincipal")], ..list() }),
        ("audit of a method with many", proto::ListAuditEventsRequest { methods: vec![text("CreateToken")], ..list() }),
        (
            "audit of two methods",
            proto::ListAuditEventsRequest { methods: vec![text("SuspendPrincipal"), text("ResumePrincipal")], ..list() },
        ),
        (
            "audit of a minute",
            proto::ListAuditEventsRequest {
                start_time: Some(Timestamp { seconds: micros() / 1_000_000 - 1_060, nanos: 0 }),
                end_time: Some(Timestamp { seconds: micros() / 1_000_000 - 1_000, nanos: 0 }),
                ..list()
            },
        ),
    ];
    for (name, list) in lists {
        let list = proto::ListAuditEventsRequest { page_size: 5, ..list };
        let page = ask(name, async || root.audit().list_audit_events(root.request(list.clone())).await.expect("a page")).await.into_inner();
        if !page.next_page_token.is_empty() {
            let next = proto::ListAuditEventsRequest { page_token: page.next_page_token, ..list };
            ask(&format!("{name}, page 2"), async || root.audit().list_audit_events(root.request(next.clone())).await.expect("a page"))
                .await;
        }
    }
}

fn lists() -> Vec<(String, proto::ListTokensRequest)> {
    let list = proto::ListTokensRequest::default;
    let soon = Some(Timestamp { seconds: micros() / 1_000_000 + 1000, nanos: 0 });
    let long_ago = Some(Timestamp { seconds: 1, nanos: 0 });
    let orders = ["create_time", "create_time desc", "display_name", "display_name desc", "expire_time", "expire_time desc"];
    let ordered = orders.map(|order| (format!("by {order}"), proto::ListTokensRequest { order_by: order.to_owned(), ..list() }));
    let states =
        [("active", vec![1]), ("inactive", vec![2]), ("expired", vec![3]), ("revoked", vec![4]), ("inactive or revoked", vec![2, 4])];
    let stated = states.map(|(name, states)| (name.to_owned(), proto::ListTokensRequest { states, ..list() }));
    let filtered = [
        ("temporary", proto::ListTokensRequest { kind: 2, ..list() }),
        ("of a principal with few", proto::ListTokensRequest { principal: "person-77".to_owned(), ..list() }),
        (
            "of a principal with few, by display_name",
            proto::ListTokensRequest { principal: "person-77".to_owned(), order_by: "display_name".to_owned(), ..list() },
        ),
        ("of a principal with many", proto::ListTokensRequest { principal: "person-0".to_owned(), ..list() }),
        ("of a principal with none", proto::ListTokensRequest { principal: "nobody".to_owned(), ..list() }),
        ("created by one who made few", proto::ListTokensRequest { created_by: "rare-admin".to_owned(), ..list() }),
        ("created by one who made many", proto::ListTokensRequest { created_by: "admin".to_owned(), ..list() }),
        ("for an audience with few", proto::ListTokensRequest { audience: "rare".to_owned(), ..list() }),
        ("for an audience with many", proto::ListTokensRequest { audience: "billing".to_owned(), ..list() }),
        ("for an audience with none", proto::ListTokensRequest { audience: "nothing".to_owned(), ..list() }),
        ("ending soon", proto::ListTokensRequest { expires_before: soon, ..list() }),
        ("ending soon, by expire_time", proto::ListTokensRequest { expires_before: soon, order_by: "expire_time".to_owned(), ..list() }),
        ("unused for a day", proto::ListTokensRequest { last_used_before: soon, ..list() }),
        ("never used", proto::ListTokensRequest { last_used_before: long_ago, ..list() }),
        ("with a text that many names hold", proto::ListTokensRequest { query: "service".to_owned(), ..list() }),
        ("with a text that few names hold", proto::ListTokensRequest { query: "service 4711".to_owned(), ..list() }),
        ("with a text that no name holds", proto::ListTokensRequest { query: "nothing".to_owned(), ..list() }),
    ];
    ordered.into_iter().chain(stated).chain(filtered.map(|(name, request)| (name.to_owned(), request))).collect()
}

async fn ask<T>(name: &str, call: impl AsyncFn() -> T) -> T {
    let (begin, mut times) = (Instant::now(), Vec::new());
    loop {
        let watch = Instant::now();
        let answer = call().await;
        times.push(watch.elapsed());
        if times.len() == TIMES || begin.elapsed() > PATIENCE {
            times.sort_unstable();
            let millis = |time: &Duration| time.as_secs_f64() * 1e3;
            println!("{name:48} {:9.2} ms, at worst {:9.2} ms", millis(&times[times.len() / 2]), millis(times.last().expect("one")));
            return answer;
        }
    }
}
