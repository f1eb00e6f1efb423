//! Full tables: a million tokens in a thousand workspaces, and a large workspace beside them. They are filled past the server.

use std::time::SystemTime;

use sea_orm::ConnectionTrait as _;

use crate::{
    process::{Site, rows},
    world::Backend,
};

/// How many workspaces there are beside the large one.
pub const TEAMS: u64 = 1_000;

/// The rows, for the numbers `n` from 1: the first are those of a large workspace, of two smaller ones and of one that was deleted long ago; the rest come in
/// turns from the teams. There are tokens that many and that few have something in common with, and tokens that ended long ago.
const FILL: [&str; 11] = [
    "INSERT INTO workspace (id, display_name, prefix, suspended, create_time, update_time, version, delete_time)
     SELECT 'team-' || (n - 1), 'Team', 'team' || (n - 1), false, 0, 0, 1, CAST(NULL AS BIGINT) FROM {numbers} WHERE n <= {teams}
     UNION ALL SELECT 'small', 'Small', 'sm', false, 0, 0, 1, NULL UNION ALL SELECT 'other', 'Other', 'ot', false, 0, 0, 1, NULL
     UNION ALL SELECT 'gone', 'Gone', 'go', false, 0, 0, 1, {long_ago} - 400 * CAST(86400000000 AS BIGINT)",
    "INSERT INTO prefix (prefix, workspace) SELECT prefix, id FROM workspace WHERE id <> 'default'",
    "INSERT INTO principal (workspace, id, kind, display_name, suspended, create_time, update_time, version)
     SELECT 'default', 'person-' || n, 1, 'Person', false, 0, 0, 1 FROM {numbers} WHERE n <= 20000
     UNION ALL SELECT 'gone', 'person-' || n, 1, 'Person', false, 0, 0, 1 FROM {numbers} WHERE n <= 300
     UNION ALL SELECT 'team-' || ((n - 1) / 10), 'member-' || (n % 10), 1, 'Member', n % 100 = 7, 0, 0, 1 FROM {numbers} WHERE n <= {teams} * 10",
    "INSERT INTO token (id, workspace, digest, previous_digest, previous_expire_time, display_name, principal, kind, state, hint, scopes, audiences,
        allowed_cidrs, metadata, session_id, created_by, create_time, update_time, expire_time, revoke_time, revoke_reason, delete_time, version,
        is_root, prefix)
     SELECT 'tok_' || {padded}, {workspace}, {digest},
        CASE WHEN n % 100 = 3 THEN {digest} END, CASE WHEN n % 100 = 3 THEN {now} END, 'service ' || (n * 7919 % 1000003),
        CASE WHEN n > {large} THEN 'member-' || (n / 7 % 10) WHEN n % 20 = 4 THEN 'person-0' ELSE 'person-' || (n % 20000) END,
        CASE WHEN n % 10 = 5 THEN 2 ELSE 1 END,
        CASE WHEN n % 10000 = 6 THEN 2 WHEN n % 25 = 7 OR n % 5000 IN (22, 25) THEN 3 ELSE 1 END, 'kw_00000', 'agents:list storage:read',
        CASE WHEN n % 10 = 8 THEN 'billing' WHEN n % 10000 = 9 THEN 'rare' ELSE '' END, '', '{}',
        CASE WHEN n % 10 = 5 THEN 'session-' || (n / 100) ELSE '' END,
        CASE WHEN n % 10000 = 10 THEN 'rare-admin' ELSE 'admin' END, {now} - ({rows} - n) * 1000000, {now} - ({rows} - n) * 1000000,
        CASE WHEN n % 5000 = 21 THEN {long_ago} WHEN n % 20 = 11 THEN 9223372036854775807 WHEN n % 10 = 2 THEN {now} - n * 1000000
            ELSE {now} + n * 8000000 END,
        CASE WHEN n % 5000 = 22 THEN {long_ago} WHEN n % 25 = 7 OR n % 5000 = 25 THEN {now} END, '',
        CASE WHEN n % 5000 = 23 THEN {long_ago} WHEN n % 100 = 14 THEN {now} END, 1, n % 5000 = 25, 'kw'
     FROM {tokens}",
    "INSERT INTO token_audience SELECT workspace, audiences, id FROM token WHERE audiences <> '' AND delete_time IS NULL",
    "INSERT INTO token_usage SELECT 'tok_' || {padded}, n, {now} - n, '' FROM {tokens} WHERE n % 2 = 0",
    "INSERT INTO audit_event (id, workspace, event_time, method, actor_workspace, actor_principal, actor_token_id, actor_address, token_id,
        principal, reason, before, after)
     SELECT 'evt_7' || substr({padded}, 2), {workspace}, {now} - ({rows} - n) * 1000000,
        CASE WHEN n % 5000 = 25 THEN 'SuspendPrincipal' WHEN n % 10 = 5 THEN 'RevokeToken' ELSE 'CreateToken' END, 'default',
        CASE WHEN n % 5000 = 30 THEN 'rare-admin' ELSE 'admin' END, NULL, '127.0.0.1', 'tok_' || {padded},
        CASE WHEN n % 20 = 15 THEN 'person-0' ELSE 'person-' || (n % 20000) END, '', NULL, '{}' FROM {tokens} WHERE n % 5 = 0",
    // Ids begin with their time: these are older than any server keeps.
    "INSERT INTO audit_event (id, workspace, event_time, method, actor_workspace, actor_principal, actor_token_id, actor_address, token_id,
        principal, reason, before, after)
     SELECT 'evt_' || {padded}, 'default', n, 'CreateToken', 'default', 'admin', NULL, '127.0.0.1', NULL, '', '', NULL, NULL
     FROM {numbers} WHERE n <= 300",
    "INSERT INTO change_log (seq, item, kind, subject, change_time) SELECT 1000000 + n, 0, 1, {digest}, {now} + n FROM {tokens} WHERE n % 5 = 0",
    "UPDATE change_head SET seq = (SELECT MAX(seq) FROM change_log)",
    "INSERT INTO replay SELECT {digest}, {digest}, {digest}, {now} + 3600000000 + n FROM {tokens} WHERE n % 5 = 0",
];

/// Each team gets one token of every thousand in a row.
const WORKSPACE: &str = "CASE WHEN n > {large} THEN 'team-' || (((n - {large}) / {teams} + n * 617) % {teams})
    WHEN n % 50 = 1 THEN 'other' WHEN n % 1000 = 2 THEN 'small' WHEN n % 50 = 24 THEN 'gone' ELSE 'default' END";

/// Fills the tables with so many tokens of the large workspace and of the teams, and has the database take its statistics. If one workspace is named, the same
/// rows of that one are there, and no others.
pub async fn fill(site: &Site, large: u64, of_teams: u64, only: Option<&str>) {
    let (numbers, digest, padded, indexes) = match site.backend {
        Backend::Sqlite => (
            "(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}) SELECT n FROM numbers)",
            "randomblob(24)",
            "printf('%022d', n)",
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL",
        ),
        Backend::Postgres => (
            "(SELECT n FROM generate_series(CAST(1 AS BIGINT), {rows}) AS numbers(n)) AS numbers",
            "substr(sha256(CAST(random() AS TEXT)::bytea), 1, 24)",
            "lpad(CAST(n AS TEXT), 22, '0')",
            "SELECT CAST(indexname AS TEXT), indexdef FROM pg_indexes WHERE indexname LIKE '%\\_by\\_%' AND schemaname = 'public'",
        ),
    };
    let (db, now) = (site.db().await, micros());
    let execute = async |sql: &str| db.execute_unprepared(sql).await.map(drop).expect(sql);
    if site.backend == Backend::Sqlite {
        execute("PRAGMA cache_size = -500000; PRAGMA synchronous = OFF").await;
    }
    // It is faster to make the indexes afterwards.
    let column = |row: &sea_orm::QueryResult, index| row.try_get_by_index::<String>(index).expect("text");
    let indexes: Vec<_> = rows(&db, indexes).await.iter().map(|row| (column(row, 0), column(row, 1))).collect();
    assert!(indexes.len() > 15, "{indexes:?}");
    for (name, _) in &indexes {
        execute(&format!("DROP INDEX {name}")).await;
    }
    let tokens = match only {
        Some(only) => format!("(SELECT n FROM {numbers} WHERE {WORKSPACE} = '{only}') AS tokens"),
        None => numbers.to_owned(),
    };
    for sql in FILL {
        let sql = sql
            .replace("{tokens}", &tokens)
            .replace("{workspace}", WORKSPACE)
            .replace("{numbers}", numbers)
            .replace("{digest}", digest)
            .replace("{padded}", padded);
        let sql = sql.replace("{large}", &large.to_string()).replace("{teams}", &TEAMS.to_string());
        let sql = sql.replace("{long_ago}", &(now - 40 * 86_400_000_000).to_string());
        execute(&sql.replace("{rows}", &(large + of_teams).to_string()).replace("{now}", &now.to_string())).await;
    }
    for (table, column) in [("workspace", "id"), ("prefix", "workspace"), ("principal", "workspace")] {
        if let Some(only) = only {
            execute(&format!("DELETE FROM {table} WHERE {column} NOT IN ('default', '{only}')")).await;
        }
    }
    for (_, sql) in &indexes {
        execute(sql).await;
    }
    execute("ANALYZE").await;
}

/// Microseconds since 1970.
pub fn micros() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_micros()).unwrap()
}
