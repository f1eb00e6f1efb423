//! The statements that the store really sends, on full tables: each list and look-up is served by an index.
//!
//! A server is asked for everything that reads. PostgreSQL then has each plan in its log (`auto_explain`); of SQLite, the texts of the prepared
//! statements are read in the memory of the server's process, since it logs none, and explained. What the questions took is printed, and never
//! judged. `KEYWARD_TEST_PLAN_ROWS` is the number of tokens.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use keyward::proto;
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, Statement};

use crate::{
    process::{Site, rows, text},
    world::{self, Actor, Backend, Postgres},
};

const ROWS: u64 = 1_000_000;
/// How often each question is asked: on either of two connections more than five times, since PostgreSQL may then take a plan for any values.
const TIMES: usize = 14;
/// After this a question is not asked again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What makes PostgreSQL log each plan.
const EXPLAINING: [&str; 8] = [
    "-c",
    "session_preload_libraries=auto_explain",
    "-c",
    "auto_explain.log_min_duration=0",
    "-c",
    "log_line_prefix=%a|",
    "-c",
    "fsync=off",
];

/// Tables that grow, with their names in statements. None is ever read from end to end.
const LARGE: [&str; 9] = ["token", "t", "principal", "p", "token_usage", "token_audience", "audit_event", "change_log", "replay"];

/// Filters that may find few tokens, and the index that then has to be used.
const RARE: [(&str, &str); 4] = [
    (r#""token"."principal" ="#, "token_by_principal"),
    (r#""token"."created_by" ="#, "token_by_created_by"),
    (r#""token_audience"."audience" ="#, "token_audience"),
    (STATE, "token_by_state"),
];
const STATE: &str = r#"AND ("token"."state" ="#;

/// What must be among the statements that were seen. The lists are looked for by themselves.
const LOOK_UPS: [&str; 8] = [
    "WHERE t.digest IN",
    "WHERE t.previous_digest IN",
    r#"WHERE "token"."id" = "#,
    "FROM replay WHERE id = $1 AND expire_time <=",
    "SELECT request, answer FROM replay WHERE id = $1",
    "DELETE FROM replay WHERE expire_time <= $1",
    "DELETE FROM change_log WHERE change_time <= $1",
    r#""token"."state" <> "#,
];

/// What people ask the audit for; no method does yet.
const AUDIT: [&str; 2] = [
    "SELECT * FROM audit_event WHERE token_id = 'tok_0000000000000000001000' ORDER BY event_time, id",
    "SELECT * FROM audit_event WHERE workspace = 'default' AND event_time >= {now} ORDER BY event_time, id LIMIT 50",
];

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
        let site = Site::at(backend, url);
        // The first process makes the tables.
        site.start().await.kill();
        let count = std::env::var("KEYWARD_TEST_PLAN_ROWS").map_or(ROWS, |text| text.parse().expect("a whole number"));
        let begin = Instant::now();
        fill(&site, count).await;
        println!("{backend:?}: {count} tokens, made in {:.1} s", begin.elapsed().as_secs_f64());
        let log = postgres.map(|postgres| (postgres.folder.join("postgres.log"), postgres));
        let before = log.as_ref().map_or(0, |(log, _)| read(log).len());
        let process = site.start().await;
        ask_everything(&site, &site.root(&process).await).await;
        let db = site.db().await;
        let mut planned = match &log {
            Some((log, _)) => logged(&read(log)[before..]),
            None => explained(&db, process.id()).await,
        };
        check(&planned);
        check_presence(&planned);
        planned.clear();
        for sql in AUDIT {
            planned.insert(explain(&db, &sql.replace("{now}", &micros().to_string()), Values::Rare).await.expect("a plan"));
        }
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
    });
}

/// What a plan was made for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Values {
    Any,
    Frequent,
    Rare,
}

/// A statement with the steps of its plan.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Planned {
    sql: String,
    values: Values,
    steps: Vec<String>,
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
        self.steps.iter().find(by_itself).or(along_an_index.map(|pair| &pair[0]))
    }

    fn sorts(&self) -> bool {
        self.steps.iter().any(|step| step.contains("Sort Key") || step.contains("TEMP B-TREE"))
    }
}

fn check(planned: &BTreeSet<Planned>) {
    for one in planned {
        for table in LARGE {
            assert!(one.looks_at_everything() || one.scan_of(table).is_none(), "{table} is read from end to end: {one:#?}");
        }
        assert!(!one.is_list() || one.may_sort() || !one.sorts(), "the workspace is sorted: {one:#?}");
        for (filter, index) in RARE {
            let served = one.steps.iter().any(|step| step.contains(index));
            assert!(one.values != Values::Rare || !one.sql.contains(filter) || served, "{index} is not used: {one:#?}");
        }
    }
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

fn read(path: &Path) -> String {
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
        let is_rare = |step: &String| ["'person-77'", "'rare-admin'", "'rare'", "(state = '2'"].iter().any(|value| step.contains(value));
        let values = if steps.iter().any(is_rare) { Values::Rare } else { Values::Any };
        Some(Planned { sql, values, steps })
    };
    entries.lines().filter_map(plan).collect()
}

fn without_cost(step: &str) -> String {
    step.split_once("(cost=").map_or_else(|| step.to_owned(), |(step, _)| step.to_owned())
}

/// SQLite's plans for the statements that a process has prepared: for any values, for those that many tokens have, for those that few have.
async fn explained(db: &DatabaseConnection, process: u32) -> BTreeSet<Planned> {
    let mut planned = BTreeSet::new();
    for sql in statements_in_memory(process) {
        for values in [Values::Any, Values::Frequent, Values::Rare] {
            // What SQLite does not take is the rest of a statement, in memory that was given back.
            planned.extend(explain(db, &sql, values).await);
        }
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
fn statements_in_memory(process: u32) -> Vec<String> {
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
    // A text that was written over a longer one is found with the rest of that at its end, and once more as SQLite's own copy.
    let mut whole: Vec<String> = Vec::new();
    for sql in found {
        if whole.last().is_none_or(|shorter| !sql.starts_with(shorter.as_str())) {
            whole.push(sql);
        }
    }
    whole
}

/// The statement in a piece of memory, behind at most a few bytes of the allocator.
fn statement(piece: &[u8]) -> Option<String> {
    let is_verb = |start: &usize| ["SELECT ", "UPDATE ", "DELETE "].iter().any(|verb| piece[*start..].starts_with(verb.as_bytes()));
    let sql = &piece[(0..piece.len().min(8)).find(is_verb)?..];
    let is_text = sql.iter().all(|byte| (b' '..=b'~').contains(byte));
    is_text.then(|| String::from_utf8_lossy(sql).into_owned())
}

/// Puts values in the places of `?`, by the names of the columns before them.
fn with_values(sql: &str, values: Values) -> String {
    const NAMES: [&str; 11] = [
        r#""workspace""#,
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
        let back = if piece.starts_with(", ?") || piece == ", " { 2 } else { 1 };
        let name = before.len().checked_sub(back).map_or("", |index| before[index].1);
        filled += &value(name, values == Values::Rare);
        filled += piece;
    }
    filled
}

fn value(name: &str, rare: bool) -> String {
    let text = |few: &str, many: &str| format!("'{}'", if rare { few } else { many });
    match name {
        r#""workspace""# => "'default'".to_owned(),
        r#""kind""# => "1".to_owned(),
        r#""state""# => if rare { "2" } else { "1" }.to_owned(),
        r#""principal""# => text("person-77", "person-0"),
        r#""created_by""# => text("rare-admin", "admin"),
        r#""audience""# => text("rare", "billing"),
        r#""display_name""# => "'service 5'".to_owned(),
        r#""id""# => "'tok_0000000000000000001000'".to_owned(),
        "_time\"" => micros().to_string(),
        "LIKE" => text("%nothing%", "%service%"),
        "LIMIT" => "51".to_owned(),
        _ => "?".to_owned(),
    }
}

/// Asks for everything that reads tokens, and says what it took.
async fn ask_everything(site: &Site, root: &Actor) {
    for (name, request) in lists() {
        let page = ask(&name, async || root.list(request.clone()).await.expect("a page")).await;
        if !page.next_page_token.is_empty() {
            let next = proto::ListTokensRequest { page_token: page.next_page_token, ..request };
            ask(&format!("{name}, page 2"), async || root.list(next.clone()).await.expect("a page")).await;
        }
    }
    let id = text(&site.db().await, "SELECT id FROM token WHERE principal = 'person-77' AND delete_time IS NULL").await;
    ask("GetToken", async || root.get(&id).await.expect("found")).await;
    let (token, secret) = ask("CreateToken", async || root.issue("new", &[]).await).await;
    let again = proto::CreateTokenRequest { request_id: "again".to_owned(), ..world::new_token("new", &[]) };
    ask("CreateToken, request_id repeated", async || root.create(again.clone()).await.expect("created")).await;
    ask("RegenerateToken", async || root.regenerate(&token.id, 60).await.expect("done")).await;
    ask("ValidateToken", async || root.verdict(&secret).await).await;
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
    ask("RevokePrincipalTokens", async || root.revoke_principal("person-78").await.expect("done")).await;
    root.delete(&token.id).await.expect("done");
    root.get(&id).await.expect("found");
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

/// The rows, for the numbers `n` from 1: a large workspace and two smaller ones, tokens that many and that few have something in common with.
const FILL: [&str; 8] = [
    "INSERT INTO workspace VALUES ('small', 'Small', 'sm', false, 0, 0, 1), ('other', 'Other', 'ot', false, 0, 0, 1)",
    "INSERT INTO principal SELECT 'default', 'person-' || n, 1, 'Person', false, 0, 0, 1 FROM {numbers} WHERE n <= 20000",
    "INSERT INTO token (id, workspace, digest, previous_digest, previous_expire_time, display_name, principal, kind, state, hint, scopes, audiences,
        allowed_cidrs, metadata, session_id, created_by, create_time, update_time, expire_time, revoke_time, revoke_reason, delete_time, version)
     SELECT 'tok_' || {padded}, CASE WHEN n % 50 = 1 THEN 'other' WHEN n % 1000 = 2 THEN 'small' ELSE 'default' END, {digest},
        CASE WHEN n % 100 = 3 THEN {digest} END, CASE WHEN n % 100 = 3 THEN {now} END, 'service ' || (n * 7919 % 1000003),
        CASE WHEN n % 20 = 4 THEN 'person-0' ELSE 'person-' || (n % 20000) END, CASE WHEN n % 10 = 5 THEN 2 ELSE 1 END,
        CASE WHEN n % 40000 = 6 THEN 2 WHEN n % 25 = 7 THEN 3 ELSE 1 END, 'kw_00000', 'agents:list storage:read',
        CASE WHEN n % 10 = 8 THEN 'billing' WHEN n % 40000 = 9 THEN 'rare' ELSE '' END, '', '{}', '',
        CASE WHEN n % 40000 = 10 THEN 'rare-admin' ELSE 'admin' END, {now} - ({rows} - n) * 1000000, {now} - ({rows} - n) * 1000000,
        CASE WHEN n % 20 = 11 THEN 9223372036854775807 WHEN n % 10 = 2 THEN {now} - n * 1000000 ELSE {now} + n * 8000000 END,
        CASE WHEN n % 25 = 7 THEN {now} END, '', CASE WHEN n % 100 = 14 THEN {now} END, 1
     FROM {numbers}",
    "INSERT INTO token_audience SELECT workspace, audiences, id FROM token WHERE audiences <> '' AND delete_time IS NULL",
    "INSERT INTO token_usage SELECT 'tok_' || {padded}, n, {now} - n, '' FROM {numbers} WHERE n % 2 = 0",
    "INSERT INTO audit_event SELECT 'evt_' || {padded}, 'default', {now} - ({rows} - n) * 1000000, 'CreateToken', 'default', 'admin', NULL,
        '127.0.0.1', 'tok_' || {padded}, 'person-1', '', NULL, '{}' FROM {numbers} WHERE n % 5 = 0",
    "INSERT INTO change_log SELECT 1000000 + n, 0, 1, {digest}, {now} + n FROM {numbers} WHERE n % 5 = 0",
    "INSERT INTO replay SELECT {digest}, {digest}, {digest}, {now} + 3600000000 + n FROM {numbers} WHERE n % 5 = 0",
];

/// Fills the tables, past the server, and has the database take its statistics.
async fn fill(site: &Site, count: u64) {
    let (numbers, digest, padded, indexes) = match site.backend {
        Backend::Sqlite => (
            "(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}) SELECT n FROM numbers)",
            "randomblob(24)",
            "printf('%022d', n)",
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND name LIKE 'token_by_%'",
        ),
        Backend::Postgres => (
            "(SELECT n FROM generate_series(CAST(1 AS BIGINT), {rows}) AS numbers(n)) AS numbers",
            "substr(sha256(CAST(random() AS TEXT)::bytea), 1, 24)",
            "lpad(CAST(n AS TEXT), 22, '0')",
            "SELECT CAST(indexname AS TEXT), indexdef FROM pg_indexes WHERE indexname LIKE 'token_by_%'",
        ),
    };
    let (db, now) = (site.db().await, micros().to_string());
    let execute = async |sql: &str| db.execute_unprepared(sql).await.map(drop).expect(sql);
    if site.backend == Backend::Sqlite {
        execute("PRAGMA cache_size = -500000; PRAGMA synchronous = OFF").await;
    }
    // It is faster to make the indexes afterwards.
    let column = |row: &sea_orm::QueryResult, index| row.try_get_by_index::<String>(index).expect("text");
    let indexes: Vec<_> = rows(&db, indexes).await.iter().map(|row| (column(row, 0), column(row, 1))).collect();
    assert!(indexes.len() > 5, "{indexes:?}");
    for (name, _) in &indexes {
        execute(&format!("DROP INDEX {name}")).await;
    }
    for sql in FILL {
        let sql = sql.replace("{numbers}", numbers).replace("{digest}", digest).replace("{padded}", padded);
        execute(&sql.replace("{rows}", &count.to_string()).replace("{now}", &now)).await;
    }
    for (_, sql) in &indexes {
        execute(sql).await;
    }
    execute("ANALYZE").await;
}

/// Microseconds since 1970.
fn micros() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_micros()).unwrap()
}
