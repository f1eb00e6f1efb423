//! What is written down, for how long it is kept, and how it goes: the audit and the retention.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use keyward::proto::{self, TokenState, Verdict, create_token_request::Lifetime};
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, Statement};
use tonic::Code;

use crate::{
    acts::{fields, refusal, setting, wire_days},
    world::{Actor, BEGINNING, Backend, World, eventually, new_token},
};

const DAY: Duration = Duration::from_hours(24);

crate::on_both_databases!(
    refused_calls_are_sampled,
    ended_tokens_stay_for_their_time_and_go,
    audit_events_go_by_their_own_time,
    a_purge_does_not_hold_up_changes,
    an_event_shows_a_change_before_and_after,
    the_audit_filters_by_every_field,
    the_audit_pages_through_every_event_once,
    the_audit_is_only_ever_added_to,
    audit_filters_name_every_wrong_field,
);

type Asked = proto::ListAuditEventsRequest;

fn instant(time: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds: BEGINNING.micros() / 1_000_000 + time, nanos: 0 })
}

/// The refused calls that the audit of workspace `default` holds.
async fn refusals(admin: &Actor) -> Vec<proto::AuditEvent> {
    let all = Asked { page_size: 1_000, ..Default::default() };
    admin.events(all).await.expect("events").into_iter().filter(|event| event.code != "OK").collect()
}

async fn refused_calls_are_sampled(world: World) {
    let (root, admin, member) = (world.root().await, world.admin().await, world.member("mallory").await);
    let gone = world.actor("gone", &["keyward:admin"]).await;
    let (member_id, gone_id) = (member.own_id().await, gone.own_id().await);
    admin.revoke(&gone_id).await.expect("done");
    // One of each kind, with who it was.
    assert_eq!(refusal(member.get("tok_0000000000000000000000").await), Code::PermissionDenied);
    assert_eq!(refusal(admin.get("tok_0000000000000000000000").await), Code::NotFound);
    assert_eq!(refusal(gone.list(proto::ListTokensRequest::default()).await), Code::Unauthenticated);
    assert_eq!(refusal(admin.activate(&gone_id).await), Code::FailedPrecondition);
    // Nobody, and what is no matter of rights.
    assert_eq!(refusal(world.stranger().await.get(&gone_id).await), Code::Unauthenticated);
    assert_eq!(refusal(world.bearer("kw_nonsense").await.get(&gone_id).await), Code::Unauthenticated);
    assert_eq!(refusal(admin.get("nonsense").await), Code::InvalidArgument);
    let events = eventually("they are written", async || Some(refusals(&admin).await).filter(|events| events.len() >= 4)).await;
    let seen: BTreeSet<_> = events
        .iter()
        .map(|event| (event.code.as_str(), event.method.as_str(), event.actor_principal.as_str(), event.actor_token_id.as_str()))
        .collect();
    let admin_id = admin.own_id().await;
    let wanted = BTreeSet::from([
        ("PERMISSION_DENIED", "GetToken", "mallory", member_id.as_str()),
        ("NOT_FOUND", "GetToken", "admin", admin_id.as_str()),
        ("UNAUTHENTICATED", "ListTokens", "gone", gone_id.as_str()),
        ("FAILED_PRECONDITION", "ActivateToken", "admin", admin_id.as_str()),
    ]);
    assert_eq!(seen, wanted);
    for event in &events {
        assert_eq!(
            (event.workspace.as_str(), event.actor_workspace.as_str(), event.actor_address.as_str()),
            ("default", "default", "127.0.0.1")
        );
        assert_eq!((event.token_id.as_str(), event.principal.as_str(), &event.before, &event.after), ("", "", &None, &None));
        assert_eq!(event.event_time, instant(0));
    }
    // A flood, while the clock stands still: what is kept of it does not grow with it, and nobody waits for it to be written.
    let (written, begin) = (world.queries("audit").await, Instant::now());
    for _ in 0..400 {
        assert_eq!(refusal(member.get(&gone_id).await), Code::PermissionDenied);
    }
    let ticks = begin.elapsed().as_secs_f64() + 2.0;
    let written = world.queries("audit").await - written;
    assert!(written <= ticks, "{written} statements for 400 calls in {ticks} s");
    let unsampled = world.metric("keyward_audit_unsampled_total").await;
    eventually("the rest is written", async || (refusals(&admin).await.len() >= 100).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(refusals(&admin).await.len(), 100, "a burst of 100");
    assert_eq!(unsampled, 400.0 - 96.0, "the rest is counted");
    // One more for each 10 seconds.
    world.advance(Duration::from_secs(109));
    for _ in 0..100 {
        assert_eq!(refusal(member.get(&gone_id).await), Code::PermissionDenied);
    }
    eventually("more is written", async || (refusals(&admin).await.len() >= 110).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(refusals(&admin).await.len(), 110);
    // What is asked of the data plane is judged, and no event.
    assert_eq!(refusal(member.ask(proto::ValidateTokenRequest::default()).await), Code::PermissionDenied);
    // What waits is not lost with a clean stop.
    world.advance(Duration::from_hours(1));
    assert_eq!(refusal(admin.get("tok_0000000000000000000001").await), Code::NotFound);
    let mut world = world;
    world.restart().await;
    let root_again = world.root().await;
    assert_eq!(refusals(&root_again).await.len(), 111);
    drop(root);
}

async fn ended_tokens_stay_for_their_time_and_go(world: World) {
    world.relax().await;
    let root = world.root().await;
    let forever = proto::CreateTokenRequest {
        lifetime: Some(Lifetime::Never(true)),
        principal: "admin".to_owned(),
        ..new_token("admin", &["keyward:admin"])
    };
    let admin = world.bearer(&root.create(forever).await.expect("created").secret).await;
    let (canary, _) = admin.issue("canary", &[]).await;
    admin.revoke(&canary.id).await.expect("done");
    world.add_workspace("shop", "shop").await;
    let theirs = world.actor_in("shop", "ann", &["keyward:self"]).await;
    for _ in 0..3 {
        theirs.create_own(proto::CreateMyTokenRequest { display_name: "t".to_owned(), ..Default::default() }).await.expect("created");
    }
    let theirs = theirs.token.expect("a token");
    world.advance(DAY);
    let short = proto::CreateTokenRequest {
        lifetime: Some(Lifetime::Ttl(wire_days(1))),
        audiences: vec!["billing".to_owned()],
        ..new_token("expired", &[])
    };
    let short = admin.create(short).await.expect("created");
    let (expired, expired_secret) = (short.token.expect("a token").id, short.secret);
    world.advance(DAY);
    let (revoked, revoked_secret) = admin.issue("revoked", &[]).await;
    let (deleted, deleted_secret) = admin.issue("deleted", &[]).await;
    let (_, alive_secret) = admin.issue("alive", &[]).await;
    let (off, off_secret) = admin.issue("off", &[]).await;
    assert_eq!(admin.use_token(&revoked_secret).await, Verdict::Valid);
    admin.revoke(&revoked.id).await.expect("done");
    admin.delete(&deleted.id).await.expect("done");
    admin.deactivate(&off.id).await.expect("done");
    root.delete_workspace("shop").await.expect("done");
    let rows = async |table: &str, id: &str| {
        let column = if table == "token" { "id" } else { "token_id" };
        world.db_number(&format!("SELECT COUNT(*) FROM {table} WHERE {column} = '{id}'")).await
    };
    let in_shop = async |table: &str| world.db_number(&format!("SELECT COUNT(*) FROM {table} WHERE workspace = 'shop'")).await;
    eventually("the use is written", async || (rows("token_usage", &revoked.id).await == 1).then_some(())).await;
    let listed = async || {
        let list = admin.list(proto::ListTokensRequest { page_size: 1_000, ..Default::default() }).await.expect("a list");
        list.tokens.into_iter().map(|token| token.display_name).collect::<BTreeSet<_>>()
    };
    let all = [&*revoked_secret, &*expired_secret, &*off_secret, &*alive_secret, &*deleted_secret, &*theirs];

    // After 29 days: what ended 31 days ago goes, what ended 29 days ago stays.
    world.advance(29 * DAY);
    eventually("the canary goes", async || (rows("token", &canary.id).await == 0).then_some(())).await;
    assert_eq!(refusal(admin.get(&canary.id).await), Code::NotFound);
    assert_eq!(admin.get(&revoked.id).await.expect("listed").state(), TokenState::Revoked);
    assert_eq!(admin.get(&expired).await.expect("listed").state(), TokenState::Expired);
    let names = listed().await;
    assert!(["revoked", "expired", "alive", "off"].into_iter().all(|name| names.contains(name)) && !names.contains("canary"), "{names:?}");
    assert_eq!(rows("token", &deleted.id).await, 1, "for the audit");
    assert_eq!((in_shop("token").await, in_shop("principal").await, in_shop("prefix").await), (4, 1, 1));
    // These are now in memory, each by itself, with what they were.
    let kept = [Verdict::Revoked, Verdict::Expired, Verdict::Inactive, Verdict::Valid, Verdict::Unknown, Verdict::Unknown];
    assert_eq!(root.verdicts(&all).await, kept);
    let shop = |id: &str, prefix: &str| proto::Workspace {
        id: id.to_owned(),
        display_name: "Shop".to_owned(),
        prefix: prefix.to_owned(),
        ..Default::default()
    };
    assert_eq!(refusal(root.create_workspace(shop("shop", "other")).await), Code::AlreadyExists, "the id is not free yet");
    assert_eq!(refusal(root.create_workspace(shop("other", "shop")).await), Code::AlreadyExists, "the prefix neither");

    // After 31 days.
    world.advance(2 * DAY);
    eventually("the rest goes", async || {
        (rows("token", &revoked.id).await + rows("token", &expired).await + rows("token", &deleted.id).await == 0).then_some(())
    })
    .await;
    eventually("what is in the workspace goes", async || {
        (world.db_number("SELECT COUNT(*) FROM workspace WHERE id = 'shop' AND emptied").await == 1).then_some(())
    })
    .await;
    assert_eq!((in_shop("token").await, in_shop("principal").await, in_shop("prefix").await), (0, 0, 1));
    assert_eq!((rows("token_usage", &revoked.id).await, rows("token_audience", &expired).await), (0, 0));
    let names = listed().await;
    assert!(!names.contains("revoked") && !names.contains("expired"), "{names:?}");
    assert!(names.contains("alive") && names.contains("off"), "what has not ended stays: {names:?}");
    let gone = [Verdict::Unknown, Verdict::Unknown, Verdict::Inactive, Verdict::Valid, Verdict::Unknown, Verdict::Unknown];
    assert_eq!(root.verdicts(&all).await, gone, "also what was in memory");
    assert_eq!(admin.verdict(&revoked_secret).await, Verdict::Unknown);
    assert_eq!(root.verdict(&theirs).await, Verdict::Unknown);
    assert_eq!(refusal(root.create_workspace(shop("shop", "other")).await), Code::AlreadyExists, "its audit is still there");
    let events = admin.events(Asked { token_id: revoked.id.clone(), ..Default::default() }).await.expect("events");
    let methods: BTreeSet<_> = events.iter().map(|event| event.method.as_str()).collect();
    assert_eq!(methods, BTreeSet::from(["RevokeToken", "CreateToken"]), "their audit stays");
    assert_eq!(world.metric("keyward_removed_total{kind=\"token\"}").await, 8.0, "{}", removed(&world).await);
    assert_eq!(world.metric("keyward_removed_total{kind=\"audit_event\"}").await, 0.0);
    // When its audit is gone too, its id and its prefix are free, and nobody finds anything of those who had them.
    world.advance(365 * DAY);
    eventually("the workspace goes", async || {
        (world.db_number("SELECT COUNT(*) FROM workspace WHERE id = 'shop'").await + in_shop("prefix").await == 0).then_some(())
    })
    .await;
    assert_eq!(world.metric("keyward_removed_total{kind=\"workspace\"}").await, 1.0);
    let made = root.create_workspace(shop("shop", "shop")).await.expect("both are free");
    assert_eq!((made.id.as_str(), made.suspended), ("shop", false));
    assert_eq!(refusal(root.principal("shop", "ann").await), Code::NotFound, "nobody came back");
    let events = root.events(Asked { workspace: "shop".to_owned(), ..Default::default() }).await.expect("events");
    assert_eq!(events.iter().map(|event| event.method.as_str()).collect::<Vec<_>>(), ["CreateWorkspace"]);
}

async fn removed(world: &World) -> String {
    world.metrics().await.lines().filter(|line| line.contains("removed")).collect::<Vec<_>>().join("; ")
}

async fn audit_events_go_by_their_own_time(mut world: World) {
    world.stop_server().await;
    world.settings.insert("audit_retention", "40d".to_owned());
    world.settings.insert("token_retention", "60d".to_owned());
    world.start_server().await;
    let root = world.root().await;
    let (token, _) = root.issue("t", &[]).await;
    let about = async || {
        let events = root.events(Asked { token_id: token.id.clone(), ..Default::default() }).await.expect("events");
        events.into_iter().map(|event| event.method).collect::<Vec<_>>()
    };
    let rows = async |before: i64| {
        let micros = BEGINNING.micros() + before * 86_400_000_000;
        world.db_number(&format!("SELECT COUNT(*) FROM audit_event WHERE event_time < {micros}")).await
    };
    world.advance(2 * DAY);
    root.deactivate(&token.id).await.expect("done");
    world.advance(DAY);
    root.revoke(&token.id).await.expect("done");
    assert_eq!(about().await, ["RevokeToken", "DeactivateToken", "CreateToken"]);
    // 41 days after the first, 39 after the second.
    world.advance(38 * DAY);
    eventually("the first events go", async || (rows(1).await == 0).then_some(())).await;
    assert_eq!(about().await, ["RevokeToken", "DeactivateToken"]);
    assert_eq!(root.get(&token.id).await.expect("tokens have their own time").state(), TokenState::Revoked);
    world.advance(3 * DAY);
    eventually("all of them go", async || about().await.is_empty().then_some(())).await;
    assert_eq!(rows(4).await, 0);
    assert!(world.metric("keyward_removed_total{kind=\"audit_event\"}").await >= 4.0, "{}", removed(&world).await);
    assert_eq!(world.metric("keyward_removed_total{kind=\"token\"}").await, 0.0);
    root.get(&token.id).await.expect("still there");
}

/// Adds tokens that ended long ago, and events from long ago, past the server.
async fn db_add_ended(world: &World, count: u64) {
    let (numbers, digest, padded) = match world.backend {
        Backend::Sqlite => (
            "(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}) SELECT n FROM numbers)",
            "randomblob(24)",
            "printf('%022d', n)",
        ),
        Backend::Postgres => (
            "(SELECT n FROM generate_series(CAST(1 AS BIGINT), {rows}) AS numbers(n)) AS numbers",
            "substr(sha256(CAST(random() AS TEXT)::bytea), 1, 24)",
            "lpad(CAST(n AS TEXT), 22, '0')",
        ),
    };
    for sql in [
        "INSERT INTO token (id, workspace, digest, display_name, principal, kind, state, hint, scopes, audiences, allowed_cidrs, metadata, session_id,
            created_by, create_time, update_time, expire_time, revoke_reason, version)
         SELECT 'tok_' || {padded}, 'default', {digest}, 'old', 'crowd', 1, 1, 'kw_00000', '', 'billing', '', '{}', '', 'admin', 0, 0, 1000000 + n, '', 1
         FROM {numbers}",
        "INSERT INTO token_audience SELECT workspace, audiences, id FROM token WHERE principal = 'crowd'",
        "INSERT INTO token_usage SELECT id, 1, 0, '' FROM token WHERE principal = 'crowd'",
        "INSERT INTO audit_event (id, workspace, event_time, method, actor_workspace, actor_principal, actor_address, principal, reason)
         SELECT 'evt_' || {padded}, 'default', n, 'CreateToken', 'default', 'admin', '127.0.0.1', 'crowd', '' FROM {numbers}",
    ] {
        let sql = sql.replace("{numbers}", numbers).replace("{digest}", digest).replace("{padded}", padded);
        world.db_execute(&sql.replace("{rows}", &count.to_string())).await;
    }
}

async fn a_purge_does_not_hold_up_changes(world: World) {
    const ROWS: u64 = 8_000;
    let mut world = world;
    world.relax().await;
    world.stop_server().await;
    // While no server looks.
    let made = {
        db_add_ended(&world, ROWS).await;
        world.db_number("SELECT COUNT(*) FROM token WHERE principal = 'crowd'").await
    };
    assert_eq!(made, ROWS as i64);
    world.start_server().await;
    let root = world.root().await;
    let removed = async || world.metric("keyward_removed_total{kind=\"token\"}").await;
    let (mut slowest, mut meanwhile, mut partly) = (Duration::ZERO, 0, BTreeSet::new());
    let begin = Instant::now();
    loop {
        let before = removed().await;
        let change = Instant::now();
        let (token, secret) = root.issue("t", &[]).await;
        root.revoke(&token.id).await.expect("done");
        assert_eq!(root.verdict(&secret).await, Verdict::Revoked);
        slowest = slowest.max(change.elapsed());
        let after = removed().await;
        if after > 0.0 && before < ROWS as f64 {
            meanwhile += 1;
            partly.insert(after as u64);
        }
        if before >= ROWS as f64 {
            break;
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "{before} rows are gone");
    }
    assert!(meanwhile >= 5 && partly.len() >= 3, "{meanwhile} changes while rows went: {partly:?}");
    assert!(partly.iter().all(|rows| rows % 200 == 0), "{partly:?}");
    assert!(slowest < Duration::from_secs(2), "a change took {slowest:?}");
    for table in ["token WHERE principal = 'crowd'", "token_audience", "token_usage WHERE last_used_time = 0"] {
        assert_eq!(world.db_number(&format!("SELECT COUNT(*) FROM {table}")).await, 0, "{table}");
    }
    let events = "SELECT COUNT(*) FROM audit_event WHERE principal = 'crowd'";
    eventually("the events go", async || (world.db_number(events).await == 0).then_some(())).await;
}

async fn an_event_shows_a_change_before_and_after(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let admin_id = admin.own_id().await;
    let (token, _) = admin.issue("old name", &["a:b"]).await;
    world.advance(Duration::from_secs(5));
    admin
        .update(proto::Token { id: token.id.clone(), display_name: "new name".to_owned(), ..Default::default() }, &["display_name"])
        .await
        .expect("done");
    admin.revoke(&token.id).await.expect("done");
    admin.delete(&token.id).await.expect("done");
    let events = admin.events(Asked { token_id: token.id.clone(), ..Default::default() }).await.expect("events");
    let by: BTreeMap<_, _> = events.iter().map(|event| (event.method.as_str(), event)).collect();
    assert_eq!(events.len(), 4);
    for event in &events {
        assert_eq!((event.workspace.as_str(), event.code.as_str(), event.principal.as_str()), ("default", "OK", "admin"));
        assert_eq!(
            (event.actor_workspace.as_str(), event.actor_principal.as_str(), event.actor_token_id.as_str()),
            ("default", "admin", admin_id.as_str())
        );
        assert_eq!((event.actor_address.as_str(), event.token_id.as_str()), ("127.0.0.1", token.id.as_str()));
        assert!(event.id.starts_with("evt_"), "{}", event.id);
    }
    let pair = |method: &str, name: &str| (setting(by[method].before.as_ref(), name), setting(by[method].after.as_ref(), name));
    let (created, deleted) = (by["CreateToken"], by["DeleteToken"]);
    assert_eq!((&created.before, created.event_time), (&None, instant(0)));
    assert_eq!((&deleted.after, deleted.event_time), (&None, instant(5)));
    assert_eq!(setting(deleted.before.as_ref(), "state"), "REVOKED");
    assert_eq!(setting(created.after.as_ref(), "display_name"), "old name");
    assert_eq!(pair("UpdateToken", "display_name"), ("old name".to_owned(), "new name".to_owned()));
    assert_eq!(pair("UpdateToken", "version"), ("1".to_owned(), "2".to_owned()));
    assert_eq!(pair("RevokeToken", "state"), ("ACTIVE".to_owned(), "REVOKED".to_owned()));
    assert_eq!(by["RevokeToken"].reason, "test");

    // Workspaces and principals, by somebody from elsewhere.
    world.add_workspace("shop", "shop").await;
    let policy = proto::Policy { allow_never: false, ..Default::default() };
    root.set_policy("shop", policy, &["policy.allow_never"]).await.expect("changed");
    let ann = |role: proto::Role| proto::Principal {
        workspace: "shop".to_owned(),
        id: "ann".to_owned(),
        role: role.into(),
        ..Default::default()
    };
    root.upsert(ann(proto::Role::Member)).await.expect("made");
    root.upsert(ann(proto::Role::Admin)).await.expect("changed");
    root.upsert(ann(proto::Role::Admin)).await.expect("as it is");
    root.suspend_principal("shop", "ann").await.expect("done");
    root.suspend_principal("shop", "ann").await.expect("as it is");
    root.delete_principal("shop", "ann").await.expect("done");
    let new = proto::CreateTokenRequest { workspace: "shop".to_owned(), principal: "bob".to_owned(), ..new_token("t", &[]) };
    let bobs = root.create(new).await.expect("created").token.expect("a token").id;
    root.suspend_workspace("shop").await.expect("done");
    let events = root.events(Asked { workspace: "shop".to_owned(), ..Default::default() }).await.expect("events");
    assert!(
        events.iter().all(|event| (event.workspace.as_str(), event.actor_workspace.as_str(), event.actor_principal.as_str())
            == ("shop", "default", "root"))
    );
    let mut said: Vec<_> = events.iter().map(|event| (event.method.as_str(), event.principal.as_str(), event.token_id.as_str())).collect();
    said.sort_unstable();
    let mut wanted = [
        ("CreateWorkspace", "", ""),
        ("UpdateWorkspace", "", ""),
        ("UpsertPrincipal", "ann", ""),
        ("UpsertPrincipal", "ann", ""),
        ("SuspendPrincipal", "ann", ""),
        ("DeletePrincipal", "ann", ""),
        ("CreateToken", "bob", ""),
        ("CreateToken", "bob", bobs.as_str()),
        ("SuspendWorkspace", "", ""),
    ];
    wanted.sort_unstable();
    assert_eq!(said, wanted, "what changes nothing leaves nothing");
    let by: BTreeMap<_, _> = events.iter().map(|event| (event.method.as_str(), event)).collect();
    let pair = |method: &str, name: &str| (setting(by[method].before.as_ref(), name), setting(by[method].after.as_ref(), name));
    assert_eq!(pair("SuspendWorkspace", "suspended"), ("false".to_owned(), "true".to_owned()));
    assert_eq!(pair("SuspendPrincipal", "suspended"), ("false".to_owned(), "true".to_owned()));
    assert_eq!(pair("SuspendPrincipal", "role").1, "ADMIN");
    let (before, after) = pair("UpdateWorkspace", "policy");
    assert!(before.contains("BoolValue(true)") && after != before, "{before} {after}");
    assert_eq!((setting(by["DeletePrincipal"].before.as_ref(), "role"), &by["DeletePrincipal"].after), ("ADMIN".to_owned(), &None));
    assert_eq!(by["DeletePrincipal"].reason, "left");
}

async fn the_audit_filters_by_every_field(world: World) {
    let (admin, deputy) = (world.admin().await, world.actor("deputy", &["keyward:admin"]).await);
    let create = async |actor: &Actor, principal: &str| {
        let new = proto::CreateTokenRequest { principal: principal.to_owned(), ..new_token("t", &[]) };
        actor.create(new).await.expect("created").token.expect("a token").id
    };
    world.advance(Duration::from_secs(100));
    let first = create(&admin, "alice").await;
    world.advance(Duration::from_secs(100));
    let second = create(&deputy, "alice").await;
    world.advance(Duration::from_secs(100));
    deputy.revoke(&first).await.expect("done");
    admin.deactivate(&second).await.expect("done");
    world.advance(Duration::from_secs(100));
    admin.suspend_principal("", "alice").await.expect("done");
    let seen = async |asked: Asked| {
        let events = admin.events(asked).await.expect("events");
        assert!(
            events.windows(2).all(|pair| pair[0].event_time.as_ref().unwrap().seconds >= pair[1].event_time.as_ref().unwrap().seconds),
            "the latest first"
        );
        let mut seen: Vec<_> = events.into_iter().map(|event| (event.method, event.token_id)).collect();
        seen.sort();
        seen
    };
    let event = |method: &str, id: &str| (method.to_owned(), id.to_owned());
    let (create, revoke, off, suspend) = ("CreateToken", "RevokeToken", "DeactivateToken", "SuspendPrincipal");
    let late = Asked { start_time: instant(100), ..Default::default() };
    let everything =
        [event(create, ""), event(create, &first), event(create, &second), event(off, &second), event(revoke, &first), event(suspend, "")];
    let sorted = |events: &[(String, String)]| {
        let mut events = events.to_vec();
        events.sort();
        events
    };
    assert_eq!(seen(late.clone()).await, sorted(&everything));
    let of_first = Asked { token_id: first.clone(), ..Default::default() };
    assert_eq!(seen(of_first.clone()).await, [event(create, &first), event(revoke, &first)]);
    assert_eq!(seen(Asked { principal: "alice".to_owned(), ..Default::default() }).await, sorted(&everything));
    assert_eq!(seen(Asked { principal: "bob".to_owned(), ..Default::default() }).await, []);
    assert_eq!(
        seen(Asked { actor: "deputy".to_owned(), ..Default::default() }).await,
        sorted(&[event(create, &second), event(revoke, &first)])
    );
    let methods = vec![revoke.to_owned(), suspend.to_owned()];
    assert_eq!(seen(Asked { methods, ..Default::default() }).await, [event(revoke, &first), event(suspend, "")]);
    let between = Asked { start_time: instant(200), end_time: instant(400), ..Default::default() };
    assert_eq!(seen(between.clone()).await, sorted(&[event(create, &second), event(off, &second), event(revoke, &first)]), "half open");
    assert_eq!(seen(Asked { actor: "deputy".to_owned(), ..of_first }).await, [event(revoke, &first)], "joined by and");
    assert_eq!(seen(Asked { methods: vec![create.to_owned()], ..between }).await, [event(create, &second)]);
    assert_eq!(seen(Asked { token_id: "tok_0000000000000000000000".to_owned(), ..Default::default() }).await, []);
}

async fn the_audit_pages_through_every_event_once(world: World) {
    let admin = world.admin().await;
    for number in 0..12 {
        // Some at the same instant.
        world.advance(Duration::from_millis(number % 3));
        admin.issue(&format!("t{number}"), &[]).await;
    }
    let ask = async |asked: Asked| admin.audit().list_audit_events(admin.request(asked)).await.map(tonic::Response::into_inner);
    let asked = Asked { methods: vec!["CreateToken".to_owned()], actor: "admin".to_owned(), ..Default::default() };
    let all: Vec<_> = ask(asked.clone()).await.expect("a page").events.into_iter().map(|event| event.id).collect();
    assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (12, 12));
    let (mut paged, mut token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = ask(Asked { page_size: 5, page_token: token.clone(), ..asked.clone() }).await.expect("a page");
        pages += 1;
        assert!(page.events.len() <= 5);
        paged.extend(page.events.into_iter().map(|event| event.id));
        if pages == 1 {
            // What is written meanwhile comes before the first page.
            admin.issue("meanwhile", &[]).await;
        }
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    assert_eq!((paged, pages), (all, 3));
    let other = Asked { actor: String::new(), page_token: token.clone(), ..asked.clone() };
    assert_eq!(fields(ask(other).await), ["page_token"], "bound to its arguments");
    assert_eq!(fields(ask(Asked { start_time: instant(0), page_token: token.clone(), ..asked.clone() }).await), ["page_token"]);
    ask(Asked { page_size: 1, page_token: token.clone(), ..asked.clone() }).await.expect("another size is the same list");
    let of_workspaces = admin.list_workspaces(1, &token).await;
    assert_eq!(fields(of_workspaces), ["page_token"], "another method");
    let mut forged = token.into_bytes();
    forged[3] = if forged[3] == b'a' { b'b' } else { b'a' };
    assert_eq!(fields(ask(Asked { page_token: String::from_utf8(forged).unwrap(), ..asked }).await), ["page_token"]);
}

async fn the_audit_is_only_ever_added_to(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let dump = async || {
        let db = world.db().await;
        let sql = "SELECT id || '|' || method || '|' || actor_principal || '|' || COALESCE(before, '') || '|' || COALESCE(after, '') || '|' || reason \
                   FROM audit_event ORDER BY id";
        let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect("rows");
        rows.iter().map(|row| row.try_get_by_index::<String>(0).expect("text")).collect::<BTreeSet<_>>()
    };
    let mut before = dump().await;
    let mut count = before.len();
    world.add_workspace("shop", "shop").await;
    let (token, secret) = admin.issue("t", &[]).await;
    let mut step = async |what: &str| {
        let after = dump().await;
        assert!(after.is_superset(&before) && after.len() > count, "{what}: {} rows, then {}", count, after.len());
        count = after.len();
        before = after;
    };
    step("create").await;
    admin
        .update(proto::Token { id: token.id.clone(), display_name: "u".to_owned(), ..Default::default() }, &["display_name"])
        .await
        .expect("done");
    step("update").await;
    admin.regenerate(&token.id, 0).await.expect("done");
    step("regenerate").await;
    admin.delete(&token.id).await.expect("done");
    step("delete").await;
    world.member("alice").await;
    admin.delete_principal("", "alice").await.expect("done");
    step("the end of a principal").await;
    root.delete_workspace("shop").await.expect("done");
    step("the end of a workspace").await;
    let (leaked, text) = admin.issue("t", &[]).await;
    world.stranger().await.report(&[&text]).await.expect("taken");
    step("a leak").await;
    admin.delete(&leaked.id).await.expect("done");
    step("its end").await;
    assert!(!dump().await.iter().any(|row| row.contains(&secret[8..]) || row.contains(&text[8..])), "no secret is among them");
    // There is nothing to change an event with.
    let methods = keyward::api::gate::METHODS.iter().filter(|method| method.path.contains("Audit"));
    assert_eq!(methods.map(|method| method.path).collect::<Vec<_>>(), ["/keyward.v1.AuditService/ListAuditEvents"]);
}

async fn audit_filters_name_every_wrong_field(world: World) {
    let admin = world.admin().await;
    let bad = Some(Timestamp { seconds: i64::MAX, nanos: 0 });
    let asked = Asked {
        token_id: "tok_1".to_owned(),
        principal: "a b".to_owned(),
        actor: "\u{e9}".to_owned(),
        methods: vec!["RevokeToken".to_owned(), String::new(), "a b".to_owned(), "x".repeat(64)],
        start_time: bad,
        end_time: bad,
        page_size: -1,
        page_token: "nonsense".to_owned(),
        ..Default::default()
    };
    let named: BTreeSet<_> = fields(admin.events(asked).await).into_iter().collect();
    let wanted =
        ["actor", "end_time", "methods[1]", "methods[2]", "methods[3]", "page_size", "page_token", "principal", "start_time", "token_id"];
    assert_eq!(named.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
    assert_eq!(fields(admin.events(Asked { methods: vec!["A".to_owned(); 21], ..Default::default() }).await), ["methods"]);
    let most = Asked {
        methods: vec!["A".to_owned(); 20],
        principal: "p".repeat(128),
        actor: "p".repeat(128),
        page_size: i32::MAX,
        ..Default::default()
    };
    assert_eq!(admin.events(most).await.expect("the most that is allowed"), []);
    assert_eq!(fields(admin.events(Asked { principal: "p".repeat(129), ..Default::default() }).await), ["principal"]);
    assert_eq!(refusal(world.member("alice").await.events(Asked::default()).await), Code::PermissionDenied);
    assert_eq!(refusal(world.stranger().await.events(Asked::default()).await), Code::Unauthenticated);
}
