//! What a caller who is being shut out may still try, and what a tenant may try beside another: all of it ends at a wall.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use keyward::proto::{self, TokenKind, TokenState, Verdict, create_token_request::Lifetime};
use prost_reflect::prost::Message as _;
use sea_orm::{ConnectionTrait as _, DatabaseTransaction, TransactionTrait as _};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    acts::{fields, refusal},
    tls::{Authority, secured},
    world::{Actor, Backend, World, eventually, new_token, runtime},
};

crate::on_both_databases!(
    a_caller_who_was_revoked_makes_nothing_more,
    what_waits_is_not_done_for_an_administrator_who_was_revoked,
    what_waits_is_not_made_for_a_member_who_was_revoked,
    refused_calls_that_wait_long_are_written_in_the_end,
    one_workspace_does_not_hide_the_refusals_of_another,
    a_page_of_large_events_is_cut_without_reading_them_all,
    a_new_workspace_never_sees_the_audit_of_an_old_one_with_its_id,
    self_service_is_bounded,
    a_report_is_answered_alike_while_the_store_cannot_be_written,
    self_service_grants_no_more_than_the_presented_token_has,
    a_temporary_token_does_not_outlive_the_one_that_issued_it,
    the_last_root_token_cannot_be_locked_out,
    a_root_token_that_ends_soon_is_not_the_other_one,
    a_foreign_token_is_not_touched_by_a_failed_deletion,
    a_kept_answer_is_not_for_a_caller_who_was_lowered,
    a_policy_has_no_fractions_of_a_second,
    a_renewed_token_keeps_the_prefix_that_it_was_made_with,
);

mod by_certificate {
    mod sqlite {
        #[test]
        fn a_deleted_principal_takes_its_certificate_along() {
            super::super::by_a_certificate(crate::world::Backend::Sqlite);
        }
    }
    mod postgres {
        #[test]
        fn a_deleted_principal_takes_its_certificate_along() {
            super::super::by_a_certificate(crate::world::Backend::Postgres);
        }
    }
}

const NO_TOKEN: &str = "tok_0000000000000000000000";
const DAY: Duration = Duration::from_hours(24);

type Asked = proto::ListAuditEventsRequest;

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// Holds up every change of what exists (on the embedded database every write), past the server, until it is rolled back or dropped.
async fn hold_changes(world: &World) -> DatabaseTransaction {
    let held = world.db().await.begin().await.expect("a transaction");
    held.execute_unprepared("UPDATE change_head SET seq = seq").await.expect("held");
    held
}

/// Waits until a change of the server waits for what [`hold_changes`] holds, so that it is the next one whatever comes after it.
async fn first_in_line(world: &World) {
    match world.backend {
        // The server hands its one connection round in the order of arrival.
        Backend::Sqlite => tokio::time::sleep(Duration::from_millis(250)).await,
        Backend::Postgres => {
            let waiting = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
            eventually("a change waits", async || (world.db_number(waiting).await > 0).then_some(())).await;
        }
    }
}

/// Runs a call beside the test.
fn beside<T: Send + 'static>(call: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::spawn(call)
}

/// The tokens of a principal of workspace `default` that may still be used, of both kinds.
async fn live_tokens(admin: &Actor, principal: &str) -> Vec<proto::Token> {
    let mut tokens = Vec::new();
    for kind in [TokenKind::Permanent, TokenKind::Temporary] {
        let asked = proto::ListTokensRequest {
            principal: principal.to_owned(),
            states: vec![TokenState::Active.into(), TokenState::Inactive.into()],
            kind: kind.into(),
            page_size: 1_000,
            ..Default::default()
        };
        tokens.extend(admin.list(asked).await.expect("a list").tokens);
    }
    tokens
}

/// How somebody is shut out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Token,
    AllTokens,
    Principal,
    Session,
}

impl Way {
    const ALL: [Self; 4] = [Self::Token, Self::AllTokens, Self::Principal, Self::Session];

    async fn shut_out(self, admin: &Actor, id: &str, principal: &str) -> Result<(), Status> {
        match self {
            Self::Token => admin.revoke(id).await.map(drop),
            Self::AllTokens => admin.revoke_principal(principal).await.map(drop),
            Self::Principal => admin.delete_principal("default", principal).await.map(drop),
            Self::Session => admin.end_session(principal).await.map(drop),
        }
    }
}

fn named(name: &str) -> proto::CreateMyTokenRequest {
    proto::CreateMyTokenRequest { display_name: name.to_owned(), ..Default::default() }
}

/// Sends calls that make tokens, all at once; says how each ended.
fn make_tokens(caller: &Actor, session: &str, calls: usize) -> JoinSet<Result<String, Status>> {
    let mut making = JoinSet::new();
    for number in 0..calls {
        let (caller, session) = (caller.clone(), session.to_owned());
        making.spawn(async move {
            if number % 2 == 0 || !session.is_empty() {
                Ok(caller.temporary(&session, &[]).await?.1)
            } else {
                Ok(caller.create_own(named("one more")).await?.secret)
            }
        });
    }
    making
}

async fn a_caller_who_was_revoked_makes_nothing_more(world: World) {
    const ROUNDS: u64 = 4;
    const CALLS: usize = 59;
    world.relax().await;
    let (admin, validator) = (world.admin().await, world.validator().await);
    for round in 0..ROUNDS {
        for way in Way::ALL {
            let principal = format!("{way:?}-{round}");
            let member = world.member(&principal).await;
            let (session, caller) = if way == Way::Session {
                let (_, secret) = member.temporary(&principal, &["keyward:self"]).await.expect("issued");
                (principal.clone(), world.bearer(&secret).await)
            } else {
                (String::new(), member)
            };
            let id = caller.own_id().await;
            let making = make_tokens(&caller, &session, CALLS);
            tokio::time::sleep(Duration::from_millis(3 * round)).await;
            way.shut_out(&admin, &id, &principal).await.unwrap_or_else(|status| panic!("{way:?}: {status:?}"));
            let late = refusal(caller.create_own(named("too late")).await);
            assert_eq!(late, Code::Unauthenticated, "{way:?}: what begins later");
            let made = making.join_all().await;
            for refused in made.iter().filter_map(|made| made.as_ref().err()) {
                let expected = [Code::Unauthenticated, Code::ResourceExhausted].contains(&refused.code());
                assert!(expected, "{way:?}: {refused:?}");
            }
            if way == Way::Token {
                continue;
            }
            let mut left = live_tokens(&admin, &principal).await;
            if way == Way::Session {
                left.retain(|token| token.session_id == session);
            }
            let left: Vec<_> = left.iter().map(|token| (&token.id, &token.display_name)).collect();
            assert!(left.is_empty(), "{way:?}, round {round}: {} tokens live on: {left:?}", left.len());
            for secret in made.iter().flatten() {
                assert_eq!(validator.verdict(secret).await, Verdict::Revoked, "{way:?}: what was made before");
            }
            if way == Way::Principal {
                assert_eq!(refusal(admin.principal("", &principal).await), Code::NotFound, "round {round}: nobody comes back");
            }
        }
    }
}

async fn what_waits_is_not_done_for_an_administrator_who_was_revoked(world: World) {
    let (root, ada) = (world.root().await, world.actor("ada", &["keyward:admin"]).await);
    let id = ada.own_id().await;
    let (token, secret) = root.issue("as it was", &[]).await;
    let before = root.workspace("default").await.expect("found");
    let held = hold_changes(&world).await;
    let revoking = beside({
        let root = root.clone();
        async move { root.revoke(&id).await }
    });
    first_in_line(&world).await;
    let change = |name: &str| proto::Token { id: token.id.clone(), display_name: name.to_owned(), ..Default::default() };
    let (renamed, target) = (change("hers"), token.id.clone());
    let caller = || ada.clone();
    let update = beside({
        let ada = caller();
        async move { ada.update(renamed, &["display_name"]).await.map(drop) }
    });
    let revoke = beside({
        let (ada, target) = (caller(), target.clone());
        async move { ada.revoke(&target).await.map(drop) }
    });
    let make = beside({
        let ada = caller();
        let eve = proto::Principal { id: "eve".to_owned(), ..Default::default() };
        async move { ada.upsert(eve).await.map(drop) }
    });
    let rename = beside({
        let ada = caller();
        let mine = proto::Workspace { id: "default".to_owned(), display_name: "hers".to_owned(), ..Default::default() };
        async move { ada.update_workspace(mine, &["display_name"]).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert!(!revoking.is_finished() && !update.is_finished(), "they wait");
    held.rollback().await.expect("let go");
    revoking.await.expect("no panic").expect("revoked");
    for (what, call) in [("UpdateToken", update), ("RevokeToken", revoke), ("UpsertPrincipal", make), ("UpdateWorkspace", rename)] {
        assert_eq!(refusal(call.await.expect("no panic")), Code::Unauthenticated, "{what}");
    }
    assert_eq!(root.get(&token.id).await.expect("found"), token);
    assert_eq!(root.verdict(&secret).await, Verdict::Valid);
    assert_eq!(root.workspace("default").await.expect("found").etag, before.etag);
    assert_eq!(refusal(root.principal("default", "eve").await), Code::NotFound);
}

async fn what_waits_is_not_made_for_a_member_who_was_revoked(world: World) {
    // One caller and one revocation: of several that wait, PostgreSQL lets the first go first and no order stands among the others.
    let (root, ada) = (world.root().await, world.actor("ada", &["keyward:admin", "keyward:self"]).await);
    let id = ada.own_id().await;
    let held = hold_changes(&world).await;
    let revoking = beside({
        let root = root.clone();
        async move { root.revoke(&id).await }
    });
    first_in_line(&world).await;
    let created = beside({
        let ada = ada.clone();
        async move { ada.create(new_token("hers", &["keyward:admin"])).await.map(drop) }
    });
    let own = beside({
        let ada = ada.clone();
        async move { ada.create_own(named("her own")).await.map(drop) }
    });
    let renewed = beside({
        let ada = ada.clone();
        async move { ada.regenerate_own().await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(250)).await;
    // What only adds may be done before the revocation, whose turn has not come.
    let early = [created.is_finished(), own.is_finished()];
    held.rollback().await.expect("let go");
    revoking.await.expect("no panic").expect("revoked");
    for (what, call, early) in [("CreateToken", created, early[0]), ("CreateMyToken", own, early[1]), ("RegenerateSelf", renewed, false)] {
        match call.await.expect("no panic") {
            Ok(()) => assert!(early, "{what} was answered OK after the caller had been revoked"),
            Err(status) => assert_eq!(status.code(), Code::Unauthenticated, "{what}"),
        }
    }
    let expected = early.iter().filter(|early| **early).count();
    assert_eq!(live_tokens(&root, "ada").await.len(), expected);
}

/// Makes every new row of the audit fail, past the server.
async fn break_audit(world: &World) {
    let sql = match world.backend {
        Backend::Sqlite => "CREATE TRIGGER fault BEFORE INSERT ON audit_event BEGIN SELECT RAISE(ABORT, 'fault'); END",
        Backend::Postgres => {
            "CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'fault'; END $$; \
             CREATE TRIGGER fault BEFORE INSERT ON audit_event FOR EACH STATEMENT EXECUTE FUNCTION fault()"
        }
    };
    world.db_execute(sql).await;
}

async fn mend_audit(world: &World) {
    let sql = match world.backend {
        Backend::Sqlite => "DROP TRIGGER fault",
        Backend::Postgres => "DROP TRIGGER fault ON audit_event",
    };
    world.db_execute(sql).await;
}

/// How many refused calls the audit holds of a workspace; of every one, if none is named.
async fn refusals(world: &World, workspace: &str) -> i64 {
    let only = if workspace.is_empty() { String::new() } else { format!("AND workspace = '{workspace}'") };
    world.db_number(&format!("SELECT COUNT(*) FROM audit_event WHERE code <> 'OK' {only}")).await
}

/// Waits for two ticks in which nothing more is written.
async fn settled(world: &World) -> i64 {
    let mut before = refusals(world, "").await;
    loop {
        tokio::time::sleep(Duration::from_millis(2_300)).await;
        let now = refusals(world, "").await;
        if now == before {
            return now;
        }
        before = now;
    }
}

async fn refused_calls_that_wait_long_are_written_in_the_end(world: World) {
    const WORKSPACES: usize = 8;
    /// What a workspace has room for at once, and what waits of all together.
    const BURST: i64 = 100;
    const WAITING: i64 = 1_000;
    let mut tenants = Vec::new();
    for number in 0..WORKSPACES {
        let id = format!("w{number}");
        world.add_workspace(&id, &id).await;
        tenants.push((world.actor_in(&id, "mallory", &["keyward:self"]).await, id));
    }
    let unsampled = async || world.metric("keyward_audit_unsampled_total").await as i64;
    let mut calls = 0;
    let mut all_refused = async |times: i64| {
        for _ in 0..times {
            for (member, _) in &tenants {
                assert_eq!(refusal(member.get(NO_TOKEN).await), Code::PermissionDenied);
                calls += 1;
            }
        }
        calls
    };
    break_audit(&world).await;
    for _ in 0..3 {
        all_refused(BURST).await;
        // Ticks that fail, and a clock that goes on.
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        world.advance(Duration::from_hours(1));
    }
    let calls = all_refused(BURST).await;
    assert_eq!(refusals(&world, "").await, 0);
    mend_audit(&world).await;
    let written = settled(&world).await;
    assert_eq!(written + unsampled().await, calls, "each was written or counted");
    assert_eq!(written, WAITING, "no more waits, however long it takes");
    for (_, id) in &tenants {
        let kept = refusals(&world, id).await;
        assert!(kept >= BURST, "{id}: {kept}");
    }
    // And it goes on.
    world.advance(Duration::from_hours(1));
    let calls = all_refused(1).await;
    eventually("what comes later is written", async || (refusals(&world, "").await == written + WORKSPACES as i64).then_some(())).await;
    assert_eq!(refusals(&world, "").await + unsampled().await, calls);
}

async fn one_workspace_does_not_hide_the_refusals_of_another(world: World) {
    const BURST: i64 = 100;
    for id in ["alpha", "victim"] {
        world.add_workspace(id, id).await;
    }
    let noisy = world.actor_in("alpha", "mallory", &["keyward:self"]).await;
    let (intruder, admin) =
        (world.actor_in("victim", "intruder", &["keyward:self"]).await, world.actor_in("victim", "ann", &["keyward:admin"]).await);
    let refuse = async |member: &Actor, times: usize| {
        for _ in 0..times {
            assert_eq!(refusal(member.get(NO_TOKEN).await), Code::PermissionDenied);
        }
    };
    refuse(&noisy, 400).await;
    refuse(&intruder, 1).await;
    let seen = eventually("the victim sees who tried", async || {
        let events = admin.events(Asked { page_size: 1_000, ..Default::default() }).await.expect("events");
        events.into_iter().find(|event| event.code == "PERMISSION_DENIED")
    })
    .await;
    assert_eq!((seen.workspace.as_str(), seen.method.as_str(), seen.actor_principal.as_str()), ("victim", "GetToken", "intruder"));
    settled(&world).await;
    assert_eq!((refusals(&world, "alpha").await, refusals(&world, "victim").await), (BURST, 1));
    assert_eq!(world.metric("keyward_audit_unsampled_total").await, 400.0 - BURST as f64);
    // One more for every 10 seconds.
    for (span, more) in [(9, 0), (1, 1), (30, 3)] {
        let before = refusals(&world, "alpha").await;
        world.advance(Duration::from_secs(span));
        refuse(&noisy, 10).await;
        settled(&world).await;
        assert_eq!(refusals(&world, "alpha").await - before, more, "after {span} more seconds");
    }
    // The room of a workspace that was quiet is its own.
    refuse(&intruder, 140).await;
    settled(&world).await;
    assert_eq!(refusals(&world, "victim").await, BURST + 1, "a burst, and what came back of the first one");
}

/// A table of resources that takes about 200 KB.
fn large_table() -> Vec<proto::Resource> {
    let operation = |number: usize| proto::Operation {
        operation: format!("op-{number}"),
        method: "GET".to_owned(),
        path: format!("/op-{number}/{}", "x".repeat(170)),
    };
    let resource = |number: usize| proto::Resource {
        resource: format!("resource-{number}"),
        endpoint: format!("/api/resource-{number}"),
        operations: (0..10).map(operation).collect(),
    };
    (0..100).map(resource).collect()
}

async fn a_page_of_large_events_is_cut_without_reading_them_all(world: World) {
    const UPDATES: usize = 40;
    world.add_workspace("shop", "shop").await;
    let root = world.root().await;
    let shop = |name: &str| proto::Workspace {
        id: "shop".to_owned(),
        display_name: name.to_owned(),
        resources: large_table(),
        ..Default::default()
    };
    assert!((190_000..260_000).contains(&shop("").encoded_len()), "{}", shop("").encoded_len());
    root.update_workspace(shop("0"), &["display_name", "resources"]).await.expect("changed");
    for number in 1..UPDATES {
        let named = proto::Workspace { id: "shop".to_owned(), display_name: number.to_string(), ..Default::default() };
        root.update_workspace(named, &["display_name"]).await.expect("changed");
    }
    let (mut pages, mut seen, mut named, mut page_token) = (0, BTreeSet::new(), BTreeSet::new(), String::new());
    let begin = Instant::now();
    loop {
        let asked = Asked { workspace: "shop".to_owned(), page_size: 1_000, page_token: page_token.clone(), ..Default::default() };
        let page = root.audit().list_audit_events(root.request(asked)).await.expect("below what clients take").into_inner();
        pages += 1;
        assert!(page.encoded_len() < 4 << 20, "page {pages}: {} bytes", page.encoded_len());
        assert!(!page.events.is_empty(), "page {pages}");
        for event in page.events {
            if event.method == "UpdateWorkspace" {
                named.insert(crate::acts::setting(event.after.as_ref(), "display_name"));
            }
            assert!(seen.insert(event.id), "twice on page {pages}");
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!((seen.len(), named.len()), (UPDATES + 1, UPDATES), "all of them");
    assert!((5..=UPDATES).contains(&pages), "{pages} pages");
    // Each page reads what it holds and little more; all pages together read less than every page reading everything.
    assert!(begin.elapsed() < Duration::from_secs(30), "{pages} pages took {:?}", begin.elapsed());
}

fn by_a_certificate(backend: Backend) {
    if backend == Backend::Postgres && crate::world::postgres().is_none() {
        return crate::world::skip("no PostgreSQL on this machine");
    }
    runtime().block_on(async {
        let authority = Authority::new();
        let clients = "gateway.internal=default/gateway keyward:validate keyward:self; ops.internal=default/ops keyward:root";
        let mut world = secured(&authority, backend, clients).await;
        let (gateway, ops) = (authority.actor(&world, "gateway.internal").await, authority.actor(&world, "ops.internal").await);
        world.through(authority.channel(&world).await);
        a_deleted_principal_takes_its_certificate_along(world, gateway, ops).await;
    });
}

async fn a_deleted_principal_takes_its_certificate_along(world: World, gateway: Actor, ops: Actor) {
    let (root, admin) = (world.root().await, world.admin().await);
    let root_token = world.root_token();
    for (actor, id) in [(&gateway, "gateway"), (&ops, "ops")] {
        assert_eq!(actor.who().await.expect("known").principal, id);
        let principal = root.principal("default", id).await.expect("made at the start");
        assert!(!principal.suspended);
    }
    assert_eq!(gateway.verdict(root_token).await, Verdict::Valid);
    gateway.create_own(named("of the gateway")).await.expect("created");

    admin.suspend_principal("", "gateway").await.expect("done");
    assert_eq!(refusal(gateway.who().await), Code::Unauthenticated, "suspended");
    admin.resume_principal("", "gateway").await.expect("done");
    gateway.who().await.expect("back");

    assert_eq!(admin.delete_principal("", "gateway").await.expect("done"), 1);
    let refused = [
        refusal(gateway.who().await),
        refusal(gateway.ask(proto::ValidateTokenRequest::default()).await),
        refusal(gateway.create_own(named("too late")).await),
        refusal(gateway.temporary("s", &[]).await),
    ];
    assert_eq!(refused, [Code::Unauthenticated; 4], "deleted");
    assert_eq!(refusal(root.principal("default", "gateway").await), Code::NotFound, "and nothing brought it back");
    let again = proto::Principal { id: "gateway".to_owned(), ..Default::default() };
    assert!(admin.upsert(again).await.expect("made").created);
    assert_eq!(gateway.who().await.expect("known again").principal, "gateway");
    gateway.create_own(named("of the new one")).await.expect("created");

    // A certificate with more rights than an administrator has.
    for round in ["as it is", "suspended"] {
        assert_eq!(refusal(admin.suspend_principal("", "ops").await), Code::PermissionDenied, "{round}");
        assert_eq!(refusal(admin.resume_principal("", "ops").await), Code::PermissionDenied, "{round}");
        assert_eq!(refusal(admin.delete_principal("", "ops").await), Code::PermissionDenied, "{round}");
        if round == "as it is" {
            ops.who().await.expect("untouched");
            root.suspend_principal("default", "ops").await.expect("root may");
        }
        assert!(root.principal("default", "ops").await.expect("there").suspended);
        assert_eq!(refusal(ops.who().await), Code::Unauthenticated);
    }
    root.resume_principal("default", "ops").await.expect("root may");
    assert_eq!(ops.who().await.expect("back").scopes, ["keyward:root"]);
    root.delete_principal("default", "ops").await.expect("root may");
    assert_eq!(refusal(ops.who().await), Code::Unauthenticated);
}

async fn a_new_workspace_never_sees_the_audit_of_an_old_one_with_its_id(world: World) {
    let root = world.root().await;
    world.add_workspace("shop", "shop").await;
    let old = world.actor_in("shop", "ann", &["keyward:admin"]).await;
    old.issue("secret plans", &[]).await;
    root.delete_workspace("shop").await.expect("done");
    let shop = |id: &str, prefix: &str| proto::Workspace {
        id: id.to_owned(),
        display_name: "Shop".to_owned(),
        prefix: prefix.to_owned(),
        ..Default::default()
    };
    let left = async |table: &str| world.db_number(&format!("SELECT COUNT(*) FROM {table} WHERE workspace = 'shop'")).await;
    let taken = async |when: &str| {
        assert_eq!(refusal(root.create_workspace(shop("shop", "new")).await), Code::AlreadyExists, "the id {when}");
        assert_eq!(refusal(root.create_workspace(shop("new", "shop")).await), Code::AlreadyExists, "the prefix {when}");
    };
    taken("at once").await;
    // Its tokens go after 30 days, its audit after 365.
    world.advance(31 * DAY);
    eventually("its tokens go", async || (left("token").await + left("principal").await == 0).then_some(())).await;
    taken("after 31 days").await;
    assert!(left("audit_event").await > 0);
    world.advance(333 * DAY);
    taken("after 364 days").await;
    assert!(left("audit_event").await > 0);
    world.advance(2 * DAY);
    let made = eventually("both are free", async || root.create_workspace(shop("shop", "shop")).await.ok()).await;
    assert_eq!(made.id, "shop");
    let new = world.actor_in("shop", "eve", &["keyward:admin"]).await;
    let events = new.events(Asked { page_size: 1_000, ..Default::default() }).await.expect("events");
    let said: BTreeSet<_> = events.iter().map(|event| (event.method.as_str(), event.principal.as_str())).collect();
    assert_eq!(said, BTreeSet::from([("CreateWorkspace", ""), ("CreateToken", "eve")]), "nothing of before");
}

async fn self_service_is_bounded(world: World) {
    const A_MINUTE: u64 = 60;
    world.relax().await;
    let (alice, bob) = (world.member("alice").await, world.member("bob").await);
    let other = proto::CreateMyTokenRequest { scopes: texts(&["keyward:self"]), ..named("another token of alice") };
    let other = world.bearer(&alice.create_own(other).await.expect("created").secret).await;
    let (begin, mut made, mut refused) = (Instant::now(), 1, Vec::new());
    for number in 0..100 {
        // Two tokens of one principal share its bound.
        let caller = if number % 2 == 0 { &alice } else { &other };
        match caller.create_own(named(&format!("t{number}"))).await {
            Ok(_) => made += 1,
            Err(status) => refused.push(status),
        }
    }
    // By the real clock some room may come back meanwhile.
    let most = A_MINUTE + begin.elapsed().as_secs() + 1;
    assert!((A_MINUTE..=most).contains(&made), "{made} were made, {} refused", refused.len());
    for status in &refused {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        assert!(retry.is_some_and(|delay| delay > Duration::ZERO && delay <= Duration::from_mins(1)), "{status:?}");
    }
    for number in 0..20 {
        bob.create_own(named(&format!("t{number}"))).await.expect("bob is somebody else");
    }
    alice.who().await.expect("only making tokens is bounded");
    world.advance(Duration::from_mins(1));
    eventually("there is room again", async || alice.create_own(named("later")).await.ok()).await;
}

async fn a_report_is_answered_alike_while_the_store_cannot_be_written(world: World) {
    let (stranger, validator) = (world.stranger().await, world.validator().await);
    let live = world.member("alice").await.token.expect("a token");
    assert_eq!(validator.verdict(&live).await, Verdict::Valid);
    let held = hold_changes(&world).await;
    let report = |text: &str| {
        let (stranger, text) = (stranger.clone(), text.to_owned());
        beside(async move {
            let begin = Instant::now();
            (stranger.report(&[&text]).await, begin.elapsed())
        })
    };
    let (of_live, of_junk) = (report(&live), report("kw_junk"));
    // Longer than an answer takes, shorter than a change waits.
    tokio::time::sleep(Duration::from_millis(1_400)).await;
    let waits = [of_live.is_finished(), of_junk.is_finished()];
    assert_eq!(validator.verdict(&live).await, Verdict::Valid, "nothing could be written");
    held.rollback().await.expect("let go");
    assert_eq!(waits, [true, true], "both are answered while nothing can be written");
    for (what, report) in [("live", of_live), ("junk", of_junk)] {
        let (answer, took) = report.await.expect("no panic");
        assert_eq!(answer.expect(what), proto::ReportLeakedTokensResponse {}, "{what}");
        assert!((Duration::from_millis(490)..Duration::from_millis(1_200)).contains(&took), "{what} took {took:?}");
    }
    eventually("it is dead", async || (validator.verdict(&live).await == Verdict::Revoked).then_some(())).await;
    let (admin, mut reasons) = (world.admin().await, BTreeMap::new());
    let asked = proto::ListTokensRequest { principal: "alice".to_owned(), ..Default::default() };
    for token in admin.list(asked).await.expect("a list").tokens {
        *reasons.entry(token.revoke_reason).or_insert(0) += 1;
    }
    assert_eq!(reasons, BTreeMap::from([("LEAKED".to_owned(), 1)]));
}

async fn self_service_grants_no_more_than_the_presented_token_has(world: World) {
    let root = world.root().await;
    let bounded = proto::CreateTokenRequest {
        principal: "alice".to_owned(),
        audiences: texts(&["orders", "billing"]),
        allowed_cidrs: texts(&["127.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"]),
        ..new_token("bounded", &["keyward:self"])
    };
    let bounded = root.create(bounded).await.expect("created");
    let (held, alice) = (bounded.token.expect("a token"), world.bearer(&bounded.secret).await);
    let own = async |audiences: &[&str], cidrs: &[&str]| {
        let request = proto::CreateMyTokenRequest { audiences: texts(audiences), allowed_cidrs: texts(cidrs), ..named("t") };
        alice.create_own(request).await.map(|made| made.token.expect("a token"))
    };
    let temporary = async |audiences: &[&str]| {
        let request = proto::IssueTemporaryTokenRequest { audiences: texts(audiences), ..Default::default() };
        let issued = alice.own().issue_temporary_token(alice.request(request)).await?;
        Ok::<_, Status>(issued.into_inner().token.expect("a token"))
    };
    for inherited in [own(&[], &[]).await, temporary(&[]).await] {
        let inherited = inherited.expect("created");
        assert_eq!(
            (&inherited.audiences, &inherited.allowed_cidrs),
            (&held.audiences, &held.allowed_cidrs),
            "left empty: as the presented one"
        );
    }
    let within = own(&["billing"], &["10.1.2.0/24", "127.0.0.1", "2001:db8:1::/48"]).await.expect("within");
    assert_eq!(within.audiences, ["billing"]);
    assert_eq!(within.allowed_cidrs.len(), 3);
    assert_eq!(own(&["orders"], &[]).await.expect("within").allowed_cidrs, held.allowed_cidrs);
    let issued = temporary(&["orders"]).await.expect("within");
    assert_eq!((issued.audiences, issued.allowed_cidrs), (texts(&["orders"]), held.allowed_cidrs.clone()));

    assert_eq!(fields(own(&["shop"], &[]).await), ["audiences[0]"]);
    assert_eq!(fields(own(&["orders", "shop"], &[]).await), ["audiences[1]"]);
    assert_eq!(fields(temporary(&["shop"]).await), ["audiences[0]"]);
    for beyond in ["0.0.0.0/0", "10.0.0.0/8", "10.2.0.0/16", "::/0", "2001:db8::/31", "192.0.2.1"] {
        assert_eq!(fields(own(&[], &[beyond]).await), ["allowed_cidrs[0]"], "{beyond}");
    }
    assert_eq!(fields(own(&["shop"], &["10.1.0.0/16", "0.0.0.0/0"]).await), ["audiences[0]", "allowed_cidrs[1]"]);

    // Who is bounded by nothing bounds others as they like.
    let free = world.member("bob").await;
    let request = proto::CreateMyTokenRequest { audiences: texts(&["shop"]), allowed_cidrs: texts(&["10.0.0.0/8"]), ..named("t") };
    let made = free.create_own(request).await.expect("created").token.expect("a token");
    assert_eq!((made.audiences, made.allowed_cidrs), (texts(&["shop"]), texts(&["10.0.0.0/8"])));
}

async fn a_temporary_token_does_not_outlive_the_one_that_issued_it(world: World) {
    let member = world.member("alice").await;
    let issue = async |actor: &Actor, ttl: Option<prost_types::Duration>| {
        let request = proto::IssueTemporaryTokenRequest { scopes: texts(&["keyward:self"]), ttl, ..Default::default() };
        let issued = actor.own().issue_temporary_token(actor.request(request)).await?.into_inner();
        Ok::<_, Status>((issued.token.expect("a token"), issued.secret))
    };
    let (first, secret) = issue(&member, seconds(3_600)).await.expect("issued");
    let first_bearer = world.bearer(&secret).await;
    world.advance(Duration::from_mins(10));
    let (second, secret) = issue(&first_bearer, None).await.expect("issued");
    assert_eq!(second.expire_time, first.expire_time, "the same end");
    assert_eq!(fields(issue(&first_bearer, seconds(3_600)).await), ["ttl"]);
    assert_eq!(fields(issue(&first_bearer, seconds(3_001)).await), ["ttl"]);
    let (exact, _) = issue(&first_bearer, seconds(3_000)).await.expect("as long as the first");
    assert_eq!(exact.expire_time, first.expire_time);
    let (short, _) = issue(&first_bearer, seconds(60)).await.expect("shorter");
    assert!(short.expire_time.expect("an end").seconds < first.expire_time.expect("an end").seconds);
    let (third, _) = issue(&world.bearer(&secret).await, None).await.expect("issued");
    assert_eq!(third.expire_time, first.expire_time, "nor does a chain of them");
    let (full, _) = issue(&member, None).await.expect("issued");
    assert!(full.expire_time.expect("an end").seconds > first.expire_time.expect("an end").seconds, "a permanent token bounds none");
}

async fn the_last_root_token_cannot_be_locked_out(world: World) {
    let root = world.root().await;
    let id = root.own_id().await;
    let from = async |actor: &Actor, ranges: &[&str]| {
        actor.update(proto::Token { id: id.clone(), allowed_cidrs: texts(ranges), ..Default::default() }, &["allowed_cidrs"]).await
    };
    for elsewhere in [&["10.0.0.0/8"][..], &["10.0.0.0/8", "192.0.2.1"], &["::/0"], &["127.0.0.2"]] {
        assert_eq!(refusal(from(&root, elsewhere).await), Code::FailedPrecondition, "{elsewhere:?}");
    }
    assert_eq!(root.get(&id).await.expect("still in").allowed_cidrs, Vec::<String>::new());
    from(&root, &["10.0.0.0/8", "127.0.0.0/8"]).await.expect("the caller's own is among them");
    assert_eq!(refusal(from(&root, &["10.0.0.0/8"]).await), Code::FailedPrecondition, "still");
    from(&root, &["127.0.0.1"]).await.expect("the caller's own");
    from(&root, &[]).await.expect("from anywhere");
    // With another one that works it may go.
    let deputy = world.actor("deputy", &["keyward:root"]).await;
    from(&root, &["10.0.0.0/8"]).await.expect("there is another one");
    assert_eq!(refusal(root.who().await), Code::Unauthenticated);
    let deputy_id = deputy.own_id().await;
    assert_eq!(refusal(deputy.revoke(&deputy_id).await), Code::FailedPrecondition, "the other one is locked out");
    from(&deputy, &[]).await.expect("let in again");
    deputy.revoke(&deputy_id).await.expect("now it may end");
    root.who().await.expect("in");
}

async fn a_root_token_that_ends_soon_is_not_the_other_one(world: World) {
    let root = world.root().await;
    let id = root.own_id().await;
    let issue = async |name: &str, minutes: i64| {
        let new = proto::CreateTokenRequest {
            lifetime: Some(Lifetime::Ttl(prost_types::Duration { seconds: minutes * 60, nanos: 0 })),
            ..new_token(name, &["keyward:root"])
        };
        let created = root.create(new).await.expect("created");
        world.bearer(&created.secret).await
    };
    let soon = issue("ends within an hour", 60).await;
    let lock_out = async |actor: &Actor| {
        let elsewhere = proto::Token { id: id.clone(), allowed_cidrs: texts(&["10.0.0.0/8"]), ..Default::default() };
        actor.update(elsewhere, &["allowed_cidrs"]).await
    };
    for actor in [&root, &soon] {
        assert_eq!(refusal(actor.revoke(&id).await), Code::FailedPrecondition);
        assert_eq!(refusal(actor.deactivate(&id).await), Code::FailedPrecondition);
        assert_eq!(refusal(actor.delete(&id).await), Code::FailedPrecondition);
        assert_eq!(refusal(lock_out(actor).await), Code::FailedPrecondition);
    }
    assert_eq!(refusal(root.revoke_own().await), Code::FailedPrecondition);
    let later = issue("ends in two hours", 120).await;
    lock_out(&soon).await.expect("there is another one");
    assert_eq!(refusal(root.who().await), Code::Unauthenticated);
    later.revoke(&soon.own_id().await).await.expect("it is not needed");
    assert_eq!(refusal(later.revoke_own().await), Code::FailedPrecondition);
}

async fn a_foreign_token_is_not_touched_by_a_failed_deletion(world: World) {
    world.add_workspace("other", "oth").await;
    let (root, admin) = (world.root().await, world.admin().await);
    let theirs = world.actor_in("other", "ann", &["keyward:self"]).await;
    let (id, secret) = (theirs.own_id().await, theirs.token.clone().expect("a token"));
    assert_eq!(root.verdict(&secret).await, Verdict::Valid);
    for round in 0..3 {
        assert_eq!(refusal(admin.delete(&id).await), Code::NotFound);
        let before = world.queries("facts").await;
        assert_eq!(root.verdict(&secret).await, Verdict::Valid);
        assert_eq!(world.queries("facts").await, before, "round {round}: it is still in memory");
    }
    // One's own, deleted before, is buried again.
    let (own, own_secret) = admin.issue("own", &[]).await;
    admin.delete(&own.id).await.expect("done");
    assert_eq!(refusal(admin.delete(&own.id).await), Code::NotFound);
    assert_eq!(root.verdict(&own_secret).await, Verdict::Unknown);
}

async fn a_kept_answer_is_not_for_a_caller_who_was_lowered(world: World) {
    let (root, alice) = (world.root().await, world.actor("alice", &["keyward:self", "orders:read"]).await);
    let id = alice.own_id().await;
    let request = proto::CreateMyTokenRequest { scopes: texts(&["orders:read"]), request_id: "r1".to_owned(), ..named("t") };
    let ask = async || alice.create_own(request.clone()).await;
    let first = ask().await.expect("created").secret;
    assert_eq!(ask().await.expect("answered again").secret, first);
    let set = async |scopes: &[&str]| {
        root.update(proto::Token { id: id.clone(), scopes: texts(scopes), ..Default::default() }, &["scopes"]).await.expect("done");
    };
    for lowered in [&["keyward:self"][..], &["keyward:self", "orders:list"], &["orders:read"]] {
        set(lowered).await;
        let status = ask().await.expect_err("lowered");
        assert_eq!(status.code(), Code::PermissionDenied, "{lowered:?}: {status:?}");
        let said = format!("{status:?}");
        assert!(!said.contains(&first) && !status.details().windows(first.len()).any(|part| part == first.as_bytes()), "{said}");
    }
    set(&["keyward:self", "orders:*"]).await;
    assert_eq!(ask().await.expect("raised again").secret, first);
}

async fn a_policy_has_no_fractions_of_a_second(world: World) {
    let root = world.root().await;
    let before = root.workspace("default").await.expect("found");
    let with = |seconds: i64, nanos: i32| Some(prost_types::Duration { seconds, nanos });
    let policies = |seconds: i64, nanos: i32| {
        [
            ("default_ttl", proto::Policy { default_ttl: with(seconds, nanos), ..Default::default() }),
            ("max_permanent_ttl", proto::Policy { max_permanent_ttl: with(90 * 86_400 + seconds, nanos), ..Default::default() }),
            ("max_temporary_ttl", proto::Policy { max_temporary_ttl: with(seconds, nanos), ..Default::default() }),
        ]
    };
    for nanos in [1, 1_000, 500_000_000, 999_999_999] {
        for (field, policy) in policies(3_600, nanos) {
            let path = format!("policy.{field}");
            for asked in [root.set_policy("default", policy, &[&path]).await, root.set_policy("default", policy, &["policy"]).await] {
                let named = fields(asked);
                assert!(matches!(&named[..], [only] if only.ends_with(&path)), "{field} {nanos}: {named:?}");
            }
            let new = proto::Workspace {
                id: "new".to_owned(),
                display_name: "New".to_owned(),
                prefix: "new".to_owned(),
                policy: Some(policy),
                ..Default::default()
            };
            let named = fields(root.create_workspace(new).await);
            assert!(matches!(&named[..], [only] if only.ends_with(&path)), "{field} {nanos}: {named:?}");
        }
    }
    assert_eq!(root.workspace("default").await.expect("found").etag, before.etag);
    for (field, policy) in policies(3_600, 0) {
        root.set_policy("default", policy, &[&format!("policy.{field}")]).await.expect("whole seconds");
    }
    assert_eq!(root.workspace("default").await.expect("found").policy.expect("a policy").max_temporary_ttl, with(3_600, 0));
}

async fn a_renewed_token_keeps_the_prefix_that_it_was_made_with(world: World) {
    let (root, admin, alice) = (world.root().await, world.admin().await, world.member("alice").await);
    let (token, secret) = admin.issue("old", &[]).await;
    assert!(secret.starts_with("kw_") && token.hint.starts_with("kw_"), "{}", token.hint);
    let brand = proto::Workspace { id: "default".to_owned(), prefix: "brand".to_owned(), ..Default::default() };
    root.update_workspace(brand, &["prefix"]).await.expect("changed");
    let (new, new_secret) = admin.issue("new", &[]).await;
    assert!(new_secret.starts_with("brand_") && new.hint.starts_with("brand_"), "{}", new.hint);
    let renewed = admin.regenerate(&token.id, 0).await.expect("renewed");
    let own = alice.regenerate_own().await.expect("renewed");
    for (secret, token) in [(&renewed.secret, renewed.token), (&own.secret, own.token)] {
        assert!(secret.starts_with("kw_"), "{}", &secret[..6]);
        assert_eq!(token.expect("a token").hint, secret[..8]);
        assert_eq!(root.verdict(secret).await, Verdict::Valid);
    }
    assert_eq!(root.verdict(&secret).await, Verdict::Unknown);
    let renewed = admin.regenerate(&new.id, 0).await.expect("renewed");
    assert!(renewed.secret.starts_with("brand_"));
}
