//! Who may do what to whom: borders between workspaces, suspensions, roles, policies, the last root token, reports of leaks.

use std::time::{Duration, Instant};

use keyward::proto::{self, TokenState, Verdict, create_token_request::Lifetime};
use prost_types::Timestamp;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    acts::{fields, refusal, wire_days},
    tls::{Authority, secured},
    world::{Actor, BEGINNING, Backend, World, new_token, runtime},
};

const DAY: Duration = Duration::from_hours(24);

crate::on_both_databases!(
    an_administrator_sees_nothing_of_another_workspace,
    a_suspension_kills_every_token_at_once_and_a_return_restores_them,
    a_suspended_workspace_refuses_all_that_is_in_it,
    a_session_is_no_way_to_end_what_holds_more,
    nobody_raises_their_own_role,
    a_policy_counts_for_what_comes_after_it,
    a_principal_has_so_many_live_tokens_and_no_more,
    a_report_does_not_tell_a_live_token_from_any_other_text,
    an_old_secret_that_leaked_ends_alone,
    reports_come_at_a_bounded_rate,
);

mod certificates {
    use super::{
        Backend::*, a_certificate_stands_and_falls_with_its_principal as standing, by_a_certificate, the_last_root_token_stays as root,
    };

    mod sqlite {
        #[test]
        fn the_last_root_token_stays() {
            super::by_a_certificate(super::Sqlite, super::root);
        }

        #[test]
        fn a_certificate_stands_and_falls_with_its_principal() {
            super::by_a_certificate(super::Sqlite, super::standing);
        }
    }

    mod postgres {
        #[test]
        fn the_last_root_token_stays() {
            super::by_a_certificate(super::Postgres, super::root);
        }

        #[test]
        fn a_certificate_stands_and_falls_with_its_principal() {
            super::by_a_certificate(super::Postgres, super::standing);
        }
    }
}

/// Runs a test with people who come with certificates: `ops` does everything from workspace `away`, `gateway` judges tokens of `away`.
fn by_a_certificate(backend: Backend, test: impl AsyncFnOnce(World, Actor, Actor)) {
    if backend == Backend::Postgres && crate::world::postgres().is_none() {
        return crate::world::skip("no PostgreSQL on this machine");
    }
    runtime().block_on(async {
        let authority = Authority::new();
        let clients = "gateway.internal=away/gateway keyward:validate keyward:self; ops.internal=away/ops keyward:root";
        let mut world = secured(&authority, backend, clients).await;
        let ops = authority.actor(&world, "ops.internal").await;
        world.through(authority.channel(&world).await);
        world.add_workspace("away", "away").await;
        let gateway = authority.actor(&world, "gateway.internal").await;
        test(world, ops, gateway).await;
    });
}

fn in_days(days: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds: BEGINNING.micros() / 1_000_000 + days * 86_400, nanos: 0 })
}

/// A token of a principal of workspace `default`, and its secret.
async fn issue_for(admin: &Actor, principal: &str, name: &str, scopes: &[&str]) -> (proto::Token, String) {
    let created = admin.create(proto::CreateTokenRequest { principal: principal.to_owned(), ..new_token(name, scopes) }).await;
    let created = created.expect("created");
    (created.token.expect("a token"), created.secret)
}

async fn an_administrator_sees_nothing_of_another_workspace(world: World) {
    world.add_workspace("other", "oth").await;
    let (root, admin) = (world.root().await, world.admin().await);
    let theirs = world.actor_in("other", "ann", &["keyward:self"]).await;
    let (secret, id) = (theirs.token.clone().expect("a token"), theirs.own_id().await);
    let (_, temporary) = theirs.temporary("s1", &["keyward:self"]).await.expect("issued");
    // The same person's id is another person here.
    world.member("ann").await;
    let all = || proto::ListAuditEventsRequest { workspace: "other".to_owned(), page_size: 1_000, ..Default::default() };
    let before = root.events(all()).await.expect("events").len();
    let missing = admin.workspace("nowhere").await.expect_err("there is none");
    for (workspace, code) in [("other", Code::NotFound), ("nowhere", Code::NotFound)] {
        let status = admin.workspace(workspace).await.expect_err("not theirs");
        assert_eq!((status.code(), status.message()), (code, missing.message()), "the one is not told from the other");
        let named = |workspace: &str| proto::Workspace { id: workspace.to_owned(), display_name: "mine".to_owned(), ..Default::default() };
        assert_eq!(refusal(admin.update_workspace(named(workspace), &["display_name"]).await), Code::NotFound);
        assert_eq!(refusal(admin.principal(workspace, "ann").await), Code::NotFound);
        let list = proto::ListPrincipalsRequest { workspace: workspace.to_owned(), ..Default::default() };
        assert_eq!(refusal(admin.list_principals(list).await), Code::NotFound);
        let eve = proto::Principal { workspace: workspace.to_owned(), id: "eve".to_owned(), ..Default::default() };
        assert_eq!(refusal(admin.upsert(eve).await), Code::NotFound);
        assert_eq!(refusal(admin.suspend_principal(workspace, "ann").await), Code::NotFound);
        assert_eq!(refusal(admin.resume_principal(workspace, "ann").await), Code::NotFound);
        assert_eq!(refusal(admin.delete_principal(workspace, "ann").await), Code::NotFound);
        let list = proto::ListTokensRequest { workspace: workspace.to_owned(), ..Default::default() };
        assert_eq!(refusal(admin.list(list).await), Code::NotFound);
        let new = proto::CreateTokenRequest { workspace: workspace.to_owned(), ..new_token("t", &[]) };
        assert_eq!(refusal(admin.create(new).await), Code::NotFound);
        let events = proto::ListAuditEventsRequest { workspace: workspace.to_owned(), ..Default::default() };
        assert_eq!(refusal(admin.events(events).await), Code::NotFound);
        let (workspace, principal) = (workspace.to_owned(), "ann".to_owned());
        let all = proto::RevokePrincipalTokensRequest { workspace: workspace.clone(), principal, ..Default::default() };
        assert_eq!(refusal(admin.tokens().revoke_principal_tokens(admin.request(all)).await), Code::NotFound);
        let session = proto::EndSessionRequest { workspace, session_id: "s1".to_owned() };
        assert_eq!(refusal(admin.own().end_session(admin.request(session)).await), Code::NotFound);
    }
    assert_eq!(refusal(admin.get(&id).await), Code::NotFound);
    assert_eq!(refusal(admin.update(proto::Token { id: id.clone(), ..Default::default() }, &["scopes"]).await), Code::NotFound);
    assert_eq!(refusal(admin.activate(&id).await), Code::NotFound);
    assert_eq!(refusal(admin.deactivate(&id).await), Code::NotFound);
    assert_eq!(refusal(admin.revoke(&id).await), Code::NotFound);
    assert_eq!(refusal(admin.regenerate(&id, 0).await), Code::NotFound);
    assert_eq!(refusal(admin.delete(&id).await), Code::NotFound);
    let seen = admin.list_workspaces(0, "").await.expect("a list");
    assert_eq!(seen.workspaces.iter().map(|workspace| workspace.id.as_str()).collect::<Vec<_>>(), ["default"]);
    assert_eq!((seen.next_page_token.as_str(), admin.workspace("").await.expect("its own").id.as_str()), ("", "default"));
    // What is said of a foreign token is what is said of any text.
    let answer = admin.ask(proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() }).await.expect("an answer");
    assert_eq!(answer, proto::ValidateTokenResponse { verdict: Verdict::Unknown.into(), ..Default::default() });
    assert_eq!(admin.end_session("s1").await.expect("done"), 0, "a session of the same name elsewhere");
    admin.suspend_principal("", "ann").await.expect("their own ann");
    let about_id = proto::ListAuditEventsRequest { token_id: id.clone(), ..Default::default() };
    assert_eq!(admin.events(about_id).await.expect("events"), []);
    // For root alone.
    let new = proto::Workspace { id: "x".to_owned(), display_name: "x".to_owned(), prefix: "xx".to_owned(), ..Default::default() };
    assert_eq!(refusal(admin.create_workspace(new).await), Code::PermissionDenied);
    assert_eq!(refusal(admin.suspend_workspace("other").await), Code::PermissionDenied);
    assert_eq!(refusal(admin.resume_workspace("other").await), Code::PermissionDenied);
    assert_eq!(refusal(admin.delete_workspace("other").await), Code::PermissionDenied);
    let own = proto::Workspace { prefix: "mine".to_owned(), ..Default::default() };
    assert_eq!(refusal(admin.update_workspace(own, &["prefix"]).await), Code::PermissionDenied);
    // Nothing came of it.
    assert_eq!(root.verdicts(&[&secret, &temporary]).await, [Verdict::Valid; 2]);
    assert!(!root.principal("other", "ann").await.expect("there").suspended);
    assert_eq!(refusal(root.principal("other", "eve").await), Code::NotFound);
    assert_eq!(root.workspace("other").await.expect("there").display_name, "other");
    assert_eq!(root.events(all()).await.expect("events").len(), before);
}

async fn a_suspension_kills_every_token_at_once_and_a_return_restores_them(world: World) {
    let (root, admin, validator) = (world.root().await, world.admin().await, world.validator().await);
    let (alice, bob) = (world.member("alice").await, world.member("bob").await);
    let own = alice.token.clone().expect("a token");
    let bobs = bob.token.clone().expect("a token");
    let (active, live) = issue_for(&admin, "alice", "active", &[]).await;
    let (inactive, off) = issue_for(&admin, "alice", "inactive", &[]).await;
    let (revoked, dead) = issue_for(&admin, "alice", "revoked", &[]).await;
    let short = proto::CreateTokenRequest {
        principal: "alice".to_owned(),
        lifetime: Some(Lifetime::Ttl(wire_days(1))),
        ..new_token("expired", &[])
    };
    let expired = admin.create(short).await.expect("created").secret;
    world.advance(DAY);
    let (_, temporary) = alice.temporary("s", &[]).await.expect("issued");
    admin.deactivate(&inactive.id).await.expect("done");
    admin.revoke(&revoked.id).await.expect("done");
    let all = [&*live, &*own, &*temporary, &*off, &*dead, &*expired, &*bobs];
    let [valid, suspended] = [Verdict::Valid, Verdict::PrincipalSuspended];
    let others = [Verdict::Inactive, Verdict::Revoked, Verdict::Expired, valid];
    for round in 0..10 {
        // In every other round nothing of it is kept in memory.
        if round % 2 == 0 {
            let seen = async || validator.verdicts(&all).await;
            assert_eq!((&seen().await[..3], &seen().await[3..]), (&[valid; 3][..], &others[..]));
            assert_eq!(alice.who().await.expect("known").principal, "alice");
        }
        let shown = admin.suspend_principal("", "alice").await.expect("done");
        assert!(shown.suspended);
        assert_eq!(validator.verdict(&live).await, suspended, "round {round}");
        let together = validator.verdicts(&all).await;
        assert_eq!((&together[..3], &together[3..]), (&[suspended; 3][..], &others[..]), "round {round}");
        assert_eq!(refusal(alice.who().await), Code::Unauthenticated, "round {round}");
        assert_eq!(refusal(alice.regenerate_own().await), Code::Unauthenticated);
        bob.who().await.expect("bob is another");
        admin.resume_principal("", "alice").await.expect("done");
        assert_eq!(validator.verdict(&live).await, valid, "round {round}");
    }
    admin.suspend_principal("", "alice").await.expect("done");
    let states = async || {
        [admin.get(&active.id).await, admin.get(&inactive.id).await, admin.get(&revoked.id).await]
            .map(|found| found.expect("found").state())
    };
    assert_eq!(states().await, [TokenState::Active, TokenState::Inactive, TokenState::Revoked], "their own states");
    assert_eq!(
        refusal(admin.create(proto::CreateTokenRequest { principal: "alice".to_owned(), ..new_token("t", &[]) }).await),
        Code::FailedPrecondition
    );
    // What is changed meanwhile counts afterwards.
    admin.activate(&inactive.id).await.expect("done");
    assert_eq!(validator.verdict(&off).await, suspended);
    admin.deactivate(&active.id).await.expect("done");
    assert_eq!(validator.verdict(&live).await, Verdict::Inactive);
    let again = admin.suspend_principal("", "alice").await.expect("twice is once");
    assert!(again.suspended);
    admin.resume_principal("", "alice").await.expect("done");
    assert_eq!(validator.verdicts(&[&off, &live, &own]).await, [valid, Verdict::Inactive, valid]);
    assert_eq!(refusal(admin.suspend_principal("", "nobody").await), Code::NotFound);
    assert_eq!(refusal(admin.suspend_principal("", "admin").await), Code::FailedPrecondition, "themselves");
    assert_eq!(refusal(admin.suspend_principal("", "root").await), Code::PermissionDenied, "it holds more");
    // Revoking all of a suspended principal is not undone by its return.
    root.suspend_principal("default", "alice").await.expect("done");
    admin.revoke_principal("alice").await.expect("done");
    root.resume_principal("default", "alice").await.expect("done");
    assert_eq!(validator.verdicts(&[&off, &live, &own]).await, [Verdict::Revoked; 3]);
}

async fn a_suspended_workspace_refuses_all_that_is_in_it(world: World) {
    world.add_workspace("shop", "shop").await;
    world.add_workspace("bank", "bank").await;
    let root = world.root().await;
    let admin = world.actor_in("shop", "admin", &["keyward:admin"]).await;
    let gateway = world.actor_in("shop", "gateway", &["keyward:validate"]).await;
    let (token, live) = admin.issue("live", &[]).await;
    let (inactive, off) = admin.issue("inactive", &[]).await;
    admin.deactivate(&inactive.id).await.expect("done");
    let (revoked, dead) = admin.issue("revoked", &[]).await;
    admin.revoke(&revoked.id).await.expect("done");
    let (_, suspended_too) = issue_for(&admin, "alice", "of alice", &[]).await;
    admin.suspend_principal("", "alice").await.expect("done");
    let elsewhere = world.actor_in("bank", "bob", &["keyward:self"]).await;
    let theirs = elsewhere.token.clone().expect("a token");
    let all = [&*live, &*off, &*dead, &*suspended_too, &*theirs];
    let usual = [Verdict::Valid, Verdict::Inactive, Verdict::Revoked, Verdict::PrincipalSuspended, Verdict::Valid];
    for round in 0..10 {
        if round % 2 == 0 {
            assert_eq!(root.verdicts(&all).await, usual);
            assert_eq!(gateway.verdict(&live).await, Verdict::Valid);
        }
        assert!(root.suspend_workspace("shop").await.expect("done").suspended);
        assert_eq!(root.verdict(&live).await, Verdict::WorkspaceSuspended, "round {round}");
        let mut now = usual;
        now[0] = Verdict::WorkspaceSuspended;
        assert_eq!(root.verdicts(&all).await, now, "round {round}");
        for inside in [&admin, &gateway] {
            assert_eq!(refusal(inside.who().await), Code::Unauthenticated, "round {round}");
        }
        assert_eq!(refusal(admin.create(new_token("t", &[])).await), Code::Unauthenticated);
        elsewhere.who().await.expect("another workspace");
        root.resume_workspace("shop").await.expect("done");
        assert_eq!(root.verdicts(&all).await, usual, "round {round}");
        admin.who().await.expect("back again");
    }
    root.suspend_workspace("shop").await.expect("done");
    assert_eq!(root.get(&token.id).await.expect("found").state(), TokenState::Active);
    let new = || proto::CreateTokenRequest { workspace: "shop".to_owned(), ..new_token("t", &[]) };
    assert_eq!(refusal(root.create(new()).await), Code::FailedPrecondition);
    root.resume_workspace("shop").await.expect("done");
    root.create(new()).await.expect("created");
    for method in [root.suspend_workspace("default").await.map(drop), root.delete_workspace("default").await] {
        let status = method.expect_err("their own");
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("own workspace"), "{}", status.message());
    }
    root.delete_workspace("shop").await.expect("done");
    assert_eq!(root.verdicts(&all).await, [Verdict::Unknown, Verdict::Unknown, Verdict::Unknown, Verdict::Unknown, Verdict::Valid]);
    assert_eq!(refusal(admin.who().await), Code::Unauthenticated);
    assert_eq!(refusal(root.get(&token.id).await), Code::NotFound);
    assert_eq!(refusal(root.workspace("shop").await), Code::NotFound);
    assert_eq!(refusal(root.resume_workspace("shop").await), Code::NotFound, "it cannot be undone");
    assert_eq!(refusal(root.delete_workspace("shop").await), Code::NotFound);
    assert_eq!(refusal(root.create(new()).await), Code::NotFound);
    let left = root.list_workspaces(0, "").await.expect("a list").workspaces;
    assert!(left.iter().all(|workspace| workspace.id != "shop"));
}

async fn the_last_root_token_stays(world: World, ops: Actor, _: Actor) {
    let root = world.root().await;
    let first = root.own_id().await;
    let scopes = |id: &str, scope: &str| proto::Token { id: id.to_owned(), scopes: vec![scope.to_owned()], ..Default::default() };
    let session = "root's session";
    // Everything that ends it, one after the other, by somebody who may do everything and has no token.
    let try_all = async |id: &str, root: &Actor| {
        let outcomes = [
            ops.revoke(id).await.map(drop),
            ops.delete(id).await,
            ops.deactivate(id).await.map(drop),
            ops.update(scopes(id, "keyward:admin"), &["scopes"]).await.map(drop),
            root.revoke_own().await.map(drop),
            ops.tokens()
                .revoke_principal_tokens(ops.request(proto::RevokePrincipalTokensRequest {
                    workspace: "default".to_owned(),
                    principal: "root".to_owned(),
                    ..Default::default()
                }))
                .await
                .map(drop),
            ops.suspend_principal("default", "root").await.map(drop),
            ops.delete_principal("default", "root").await.map(drop),
            ops.suspend_workspace("default").await.map(drop),
            ops.delete_workspace("default").await,
            ops.own()
                .end_session(ops.request(proto::EndSessionRequest { session_id: session.to_owned(), workspace: "default".to_owned() }))
                .await
                .map(|done| assert_eq!(done.into_inner().revoked_count, 0, "it is bound to no session")),
        ];
        let [rest @ .., ended] = outcomes;
        for (index, outcome) in rest.into_iter().enumerate() {
            let status = outcome.expect_err("it is the last one");
            assert_eq!(status.code(), Code::FailedPrecondition, "way {index}: {status:?}");
            assert!(status.message().contains("last token with keyward:root"), "way {index}: {}", status.message());
        }
        ended
    };
    try_all(&first, &root).await.expect("nothing to end");
    // One that does not work is no second one.
    let second = proto::CreateTokenRequest {
        workspace: "away".to_owned(),
        principal: "deputy".to_owned(),
        ..new_token("second", &["keyward:root"])
    };
    let created = ops.create(second).await.expect("created");
    let (second, secret) = (created.token.expect("a token").id, created.secret);
    ops.deactivate(&second).await.expect("the first one works");
    try_all(&first, &root).await.expect("nothing to end");
    ops.activate(&second).await.expect("done");
    ops.suspend_principal("away", "deputy").await.expect("the first one works");
    try_all(&first, &root).await.expect("nothing to end");
    ops.resume_principal("away", "deputy").await.expect("done");
    assert_eq!(world.root().await.who().await.expect("works").principal, "root");
    assert_eq!(root.verdict(&secret).await, Verdict::Valid);
    // With a second one that works, each is allowed; what can be taken back, is.
    ops.suspend_principal("default", "root").await.expect("a second one works");
    assert_eq!(refusal(root.who().await), Code::Unauthenticated);
    assert_eq!(refusal(ops.revoke(&second).await), Code::FailedPrecondition, "now the second is the last");
    ops.resume_principal("default", "root").await.expect("done");
    ops.suspend_workspace("default").await.expect("a second one works");
    assert_eq!(refusal(ops.deactivate(&second).await), Code::FailedPrecondition);
    ops.resume_workspace("default").await.expect("done");
    ops.deactivate(&first).await.expect("a second one works");
    assert_eq!(refusal(ops.delete_principal("away", "deputy").await), Code::FailedPrecondition);
    ops.activate(&first).await.expect("done");
    ops.update(scopes(&first, "keyward:admin"), &["scopes"]).await.expect("a second one works");
    assert_eq!(refusal(ops.update(scopes(&second, "keyward:self"), &["scopes"]).await), Code::FailedPrecondition);
    ops.update(scopes(&first, "keyward:root"), &["scopes"]).await.expect("done");
    // A temporary one, bound to a session.
    let deputy = world.bearer(&secret).await;
    let (_, short) = deputy.temporary(session, &["keyward:root"]).await.expect("issued");
    let short = world.bearer(&short).await;
    deputy.revoke_own().await.expect("others work");
    root.revoke_own().await.expect("the temporary one works");
    let end = proto::EndSessionRequest { session_id: session.to_owned(), ..Default::default() };
    let status = ops.own().end_session(ops.request(end.clone())).await.expect_err("it holds the last one");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(refusal(short.end_session("").await), Code::FailedPrecondition);
    let third = short
        .create(proto::CreateTokenRequest {
            workspace: "default".to_owned(),
            principal: "heir".to_owned(),
            ..new_token("third", &["keyward:root"])
        })
        .await
        .expect("created");
    assert_eq!(ops.own().end_session(ops.request(end)).await.expect("another works").into_inner().revoked_count, 1);
    assert_eq!(refusal(short.who().await), Code::Unauthenticated);
    let heir = world.bearer(&third.secret).await;
    for (name, method) in [("delete", 0), ("revoke the principal's", 1), ("delete the principal", 2)] {
        let victim = proto::CreateTokenRequest {
            workspace: "away".to_owned(),
            principal: "victim".to_owned(),
            ..new_token(name, &["keyward:root"])
        };
        let id = ops.create(victim).await.expect("created").token.expect("a token").id;
        let all =
            proto::RevokePrincipalTokensRequest { workspace: "away".to_owned(), principal: "victim".to_owned(), ..Default::default() };
        match method {
            0 => heir.delete(&id).await,
            1 => heir.tokens().revoke_principal_tokens(heir.request(all)).await.map(drop),
            _ => heir.delete_principal("away", "victim").await.map(drop),
        }
        .unwrap_or_else(|status| panic!("{name}: {status:?}"));
    }
    heir.delete_workspace("away").await.expect("the heir works");
    // A leak is ended whatever it costs.
    heir.report(&[&third.secret]).await.expect("taken");
    assert_eq!(refusal(heir.who().await), Code::Unauthenticated);
}

async fn a_certificate_stands_and_falls_with_its_principal(world: World, ops: Actor, gateway: Actor) {
    let root = world.root().await;
    let created = root.create(proto::CreateTokenRequest { workspace: "away".to_owned(), ..new_token("t", &[]) }).await;
    let secret = created.expect("created").secret;
    assert_eq!(gateway.verdict(&secret).await, Verdict::Valid, "known by its certificate alone");
    gateway.temporary("", &[]).await.expect("a principal of its own");
    for _ in 0..5 {
        assert_eq!(gateway.who().await.expect("known").principal, "gateway");
        root.suspend_principal("away", "gateway").await.expect("done");
        assert_eq!(refusal(gateway.who().await), Code::Unauthenticated);
        assert_eq!(refusal(gateway.temporary("", &[]).await), Code::Unauthenticated);
        let ask = proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() };
        assert_eq!(refusal(gateway.ask(ask).await), Code::Unauthenticated);
        ops.who().await.expect("another principal");
        root.resume_principal("away", "gateway").await.expect("done");
        assert_eq!(gateway.verdict(&secret).await, Verdict::Valid);
        root.suspend_workspace("away").await.expect("done");
        assert_eq!(refusal(gateway.who().await), Code::Unauthenticated);
        assert_eq!(refusal(ops.who().await), Code::Unauthenticated, "root or not");
        root.resume_workspace("away").await.expect("done");
    }
    assert_eq!(refusal(ops.suspend_principal("away", "ops").await), Code::FailedPrecondition, "it is the caller's own");
    root.delete_workspace("away").await.expect("done");
    for caller in [&gateway, &ops] {
        assert_eq!(refusal(caller.who().await), Code::Unauthenticated);
    }
}

async fn a_session_is_no_way_to_end_what_holds_more(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let (_, roots) = root.temporary("night shift", &["keyward:root"]).await.expect("issued");
    assert_eq!(refusal(admin.end_session("night shift").await), Code::PermissionDenied);
    // An administrator who binds a token of its own to the same session is none the stronger.
    let (_, bound) = admin.temporary("night shift", &["keyward:admin"]).await.expect("issued");
    let bound = world.bearer(&bound).await;
    assert_eq!(refusal(bound.end_session("").await), Code::PermissionDenied);
    assert_eq!(refusal(bound.end_session("night shift").await), Code::PermissionDenied);
    assert_eq!(root.verdict(&roots).await, Verdict::Valid);
    assert_eq!(root.end_session("night shift").await.expect("done"), 2);
}

async fn nobody_raises_their_own_role(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let deputy = world.actor("deputy", &["keyward:admin"]).await;
    let (member, higher) = (proto::Role::Member, proto::Role::Admin);
    assert_eq!(admin.principal("", "admin").await.expect("there").role(), member);
    let status = admin.set_role("admin", higher).await.expect_err("their own");
    assert_eq!(status.code(), Code::PermissionDenied);
    let named = proto::Principal { workspace: "default".to_owned(), id: "admin".to_owned(), role: higher.into(), ..Default::default() };
    assert_eq!(refusal(admin.upsert(named).await), Code::PermissionDenied, "nor by the workspace's name");
    assert_eq!(admin.principal("", "admin").await.expect("there").role(), member);
    let renamed = proto::Principal { id: "admin".to_owned(), display_name: "The admin".to_owned(), ..Default::default() };
    assert_eq!(admin.upsert(renamed).await.expect("what is no role").principal.expect("a principal").display_name, "The admin");
    // By leaving and coming back neither.
    assert_eq!(refusal(admin.delete_principal("", "admin").await), Code::FailedPrecondition);
    deputy.delete_principal("", "admin").await.expect("by another");
    let admin = world.admin().await;
    assert_eq!(admin.principal("", "admin").await.expect("made by its first token").role(), member);
    assert_eq!(refusal(admin.set_role("admin", higher).await), Code::PermissionDenied);
    assert_eq!(deputy.set_role("admin", higher).await.expect("by another").role(), higher);
    assert_eq!(admin.set_role("admin", higher).await.expect("nothing is raised").role(), higher);
    assert_eq!(admin.set_role("admin", member).await.expect("lowered").role(), member);
    assert_eq!(refusal(admin.set_role("admin", higher).await), Code::PermissionDenied, "and not raised again");
    assert_eq!(root.set_role("root", higher).await.expect("root may do everything").role(), higher);
    assert_eq!(refusal(world.member("alice").await.set_role("alice", higher).await), Code::PermissionDenied);
}

async fn a_policy_counts_for_what_comes_after_it(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let long = proto::CreateTokenRequest { lifetime: Some(Lifetime::Ttl(wire_days(300))), ..new_token("long", &[]) };
    let long = admin.create(long).await.expect("created");
    let (usual, _) = admin.issue("usual", &[]).await;
    assert_eq!(usual.expire_time, in_days(90));
    let alice = world.member("alice").await;
    let (_, hours) = alice.temporary("", &[]).await.expect("issued");
    let mine = proto::CreateMyTokenRequest { display_name: "mine".to_owned(), ..Default::default() };
    let kept = alice.create_own(mine.clone()).await.expect("created").secret;
    let strict = proto::Policy {
        default_ttl: Some(wire_days(7)),
        max_permanent_ttl: Some(wire_days(30)),
        max_temporary_ttl: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
        permanent_requires_admin: true,
        max_tokens_per_principal: 1,
        ..Default::default()
    };
    admin.set_policy("default", strict, &["policy"]).await.expect("changed");
    // What exists stays as it is.
    let token = long.token.expect("a token");
    assert_eq!(admin.get(&token.id).await.expect("found").expire_time, in_days(300));
    assert_eq!(validator.verdicts(&[&kept, &hours, &long.secret]).await, [Verdict::Valid; 3]);
    let renamed = proto::Token { id: token.id.clone(), display_name: "renamed".to_owned(), ..Default::default() };
    assert_eq!(admin.update(renamed, &["display_name"]).await.expect("no end is moved").expire_time, in_days(300));
    assert_eq!(admin.regenerate(&token.id, 0).await.expect("no end is moved").token.expect("a token").expire_time, in_days(300));
    // What comes now follows it, also a new end for what exists.
    let move_to = async |days| {
        admin.update(proto::Token { id: token.id.clone(), expire_time: in_days(days), ..Default::default() }, &["expire_time"]).await
    };
    assert_eq!(fields(move_to(200).await), ["token.expire_time"], "even to an earlier day");
    assert_eq!(fields(move_to(31).await), ["token.expire_time"]);
    assert_eq!(refusal(alice.create_own(mine.clone()).await), Code::PermissionDenied);
    let of_bob = |lifetime| proto::CreateTokenRequest { principal: "bob".to_owned(), lifetime, ..new_token("t", &[]) };
    assert_eq!(fields(admin.create(of_bob(Some(Lifetime::Ttl(wire_days(31))))).await), ["ttl"]);
    assert_eq!(fields(admin.create(of_bob(Some(Lifetime::ExpireTime(in_days(31).unwrap())))).await), ["expire_time"]);
    assert_eq!(fields(admin.create(of_bob(Some(Lifetime::ExpireDate("2027-02-15".to_owned())))).await), ["expire_date"]);
    assert_eq!(fields(admin.create(of_bob(Some(Lifetime::Never(true)))).await), ["never"]);
    let created = admin.create(of_bob(None)).await.expect("created").token.expect("a token");
    assert_eq!(created.expire_time, in_days(7), "the new usual end");
    assert_eq!(refusal(admin.create(of_bob(None)).await), Code::FailedPrecondition, "the second of one");
    assert_eq!(refusal(alice.temporary("", &[]).await), Code::FailedPrecondition, "alice has one temporary token already");
    let (short, _) = world.member("carol").await.temporary("", &[]).await.expect("issued");
    let end = short.expire_time.expect("it ends").seconds - short.create_time.expect("set").seconds;
    assert_eq!(end, 3_600);
    assert_eq!(move_to(30).await.expect("as far as the policy goes").expire_time, in_days(30));
    // The life of those whose end was not moved is what it was.
    world.advance(89 * DAY);
    assert_eq!(validator.verdict(&kept).await, Verdict::Valid);
}

async fn a_principal_has_so_many_live_tokens_and_no_more(world: World) {
    let admin = world.admin().await;
    let policy = proto::Policy { max_tokens_per_principal: 10, ..Default::default() };
    admin.set_policy("default", policy, &["policy.max_tokens_per_principal"]).await.expect("changed");
    let of = |principal: &str, kind: proto::TokenKind| proto::CreateTokenRequest {
        principal: principal.to_owned(),
        kind: kind.into(),
        ..new_token("t", &[])
    };
    let (permanent, temporary) = (proto::TokenKind::Permanent, proto::TokenKind::Temporary);
    for principal in ["alice", "bob", "carol"] {
        let creates = (0..30).map(|_| {
            let (admin, request) = (admin.clone(), of(principal, permanent));
            tokio::spawn(async move { admin.create(request).await })
        });
        let mut made = Vec::new();
        for create in creates.collect::<Vec<_>>() {
            match create.await.expect("an end") {
                Ok(created) => made.push(created.token.expect("a token").id),
                Err(status) => {
                    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
                    assert!(status.message().contains("max_tokens_per_principal") && status.message().contains(principal));
                }
            }
        }
        assert_eq!(made.len(), 10, "{principal}");
        let sql = format!("SELECT COUNT(*) FROM token WHERE principal = '{principal}'");
        assert_eq!(world.db_number(&sql).await, 10);
    }
    let ids = async || {
        let list =
            proto::ListTokensRequest { principal: "alice".to_owned(), states: vec![TokenState::Active.into()], ..Default::default() };
        admin.list(list).await.expect("a list").tokens.into_iter().map(|token| token.id).collect::<Vec<_>>()
    };
    let room = async || admin.create(of("alice", permanent)).await;
    let alive = ids().await;
    // One that is switched off is alive all the same; those that are dead do not count.
    admin.deactivate(&alive[0]).await.expect("done");
    assert_eq!(refusal(room().await), Code::FailedPrecondition);
    admin.revoke(&alive[1]).await.expect("done");
    room().await.expect("for one that was revoked");
    assert_eq!(refusal(room().await), Code::FailedPrecondition);
    admin.delete(&alive[2]).await.expect("done");
    room().await.expect("for one that was deleted");
    assert_eq!(refusal(room().await), Code::FailedPrecondition);
    let tomorrow = Some(Timestamp { seconds: in_days(1).unwrap().seconds, nanos: 0 });
    admin.update(proto::Token { id: alive[3].clone(), expire_time: tomorrow, ..Default::default() }, &["expire_time"]).await.expect("done");
    assert_eq!(refusal(room().await), Code::FailedPrecondition);
    world.advance(DAY);
    room().await.expect("for one that expired");
    assert_eq!(refusal(room().await), Code::FailedPrecondition);
    // Of each kind, and of each way to make one.
    for _ in 0..10 {
        admin.create(of("alice", temporary)).await.expect("of the other kind");
    }
    assert_eq!(refusal(admin.create(of("alice", temporary)).await), Code::FailedPrecondition);
    let dave = world.member("dave").await;
    let mine = || proto::CreateMyTokenRequest { display_name: "mine".to_owned(), ..Default::default() };
    for _ in 0..9 {
        dave.create_own(mine()).await.expect("created");
    }
    assert_eq!(refusal(dave.create_own(mine()).await), Code::FailedPrecondition);
    for _ in 0..10 {
        dave.temporary("s", &[]).await.expect("issued");
    }
    assert_eq!(refusal(dave.temporary("s", &[]).await), Code::FailedPrecondition);
    assert_eq!(dave.end_session("s").await.expect("done"), 10);
    dave.temporary("s", &[]).await.expect("there is room again");
    // Changes of those that are there need no room.
    admin.regenerate(&alive[4], 0).await.expect("done");
}

async fn a_report_does_not_tell_a_live_token_from_any_other_text(world: World) {
    let (admin, validator, stranger) = (world.admin().await, world.validator().await, world.stranger().await);
    let (token, live) = admin.issue("live", &[]).await;
    let (revoked, dead) = admin.issue("dead", &[]).await;
    admin.revoke(&revoked.id).await.expect("done");
    let (_, other) = admin.issue("other", &[]).await;
    let (inactive, off) = admin.issue("off", &[]).await;
    admin.deactivate(&inactive.id).await.expect("done");
    assert_eq!(validator.verdict(&live).await, Verdict::Valid, "and is kept in memory");
    // Not one of ours, but of our form.
    let (mut invented, last) = (live.clone(), live.as_bytes()[live.len() - 1]);
    invented.replace_range(live.len() - 1.., if last == b'a' { "b" } else { "a" });
    let mut took = Vec::new();
    for text in ["", "no token at all", "ghp_0123456789", &*invented, &*dead, &*live, &*live, "\u{fffd}"] {
        let begin = Instant::now();
        let answer = stranger.report(&[text]).await.expect("taken");
        took.push(begin.elapsed());
        assert_eq!(answer, proto::ReportLeakedTokensResponse {});
        if text == live {
            assert_eq!(validator.verdict(&live).await, Verdict::Revoked, "when the call returns");
        }
    }
    let (least, most) = (*took.iter().min().unwrap(), *took.iter().max().unwrap());
    assert!(least >= Duration::from_millis(480) && most - least < Duration::from_millis(300), "{took:?}");
    let shown = admin.get(&token.id).await.expect("found");
    assert_eq!((shown.state(), shown.revoke_reason.as_str()), (TokenState::Revoked, "LEAKED"));
    let about = |id: &str| proto::ListAuditEventsRequest {
        token_id: id.to_owned(),
        methods: vec!["ReportLeakedTokens".to_owned()],
        ..Default::default()
    };
    let events = admin.events(about(&token.id)).await.expect("events");
    let [event] = &events[..] else { panic!("one event for two reports: {events:?}") };
    assert_eq!((event.reason.as_str(), event.code.as_str(), event.actor_principal.as_str()), ("LEAKED", "OK", ""));
    assert_eq!((event.actor_address.as_str(), event.principal.as_str()), ("127.0.0.1", "admin"));
    assert_eq!(admin.events(about(&revoked.id)).await.expect("events"), [], "it was dead before");
    assert_eq!(admin.get(&revoked.id).await.expect("found").revoke_reason, "test", "the first reason stands");
    // Among others, more than once, with blanks around it, by somebody who shows who they are; also one that is switched off.
    let bob = world.actor("bob", &[]).await;
    bob.report(&["x", &format!(" {other}\n"), &other, "y", &off]).await.expect("taken");
    assert_eq!(validator.verdicts(&[&other, &off]).await, [Verdict::Revoked; 2]);
    bob.who().await.expect("who reports is not harmed");
    // What cannot be read at all is said, whatever is in it.
    assert_eq!(fields(stranger.report(&[]).await), ["tokens"]);
    assert_eq!(fields(stranger.report(&["x"; 101]).await), ["tokens"]);
    let (_, safe) = admin.issue("safe", &[]).await;
    let long = "x".repeat(257);
    assert_eq!(fields(stranger.report(&["x", &long, &safe, &long]).await), ["tokens[1]", "tokens[3]"]);
    assert_eq!(validator.verdict(&safe).await, Verdict::Valid);
    stranger.report(&["\u{e9}".repeat(256).as_str()]).await.expect("256 characters");
    let mut full = vec!["x"; 99];
    full.push(&safe);
    stranger.report(&full).await.expect("100 texts");
    assert_eq!(validator.verdict(&safe).await, Verdict::Revoked);
}

async fn an_old_secret_that_leaked_ends_alone(world: World) {
    let (admin, validator, stranger) = (world.admin().await, world.validator().await, world.stranger().await);
    let (token, old) = admin.issue("t", &[]).await;
    let new = admin.regenerate(&token.id, 86_400).await.expect("done").secret;
    assert_eq!(validator.verdicts(&[&old, &new]).await, [Verdict::Valid; 2]);
    stranger.report(&[&old]).await.expect("taken");
    assert_eq!(validator.verdicts(&[&old, &new]).await, [Verdict::Unknown, Verdict::Valid]);
    assert_eq!(validator.verdict(&old).await, Verdict::Unknown);
    let shown = admin.get(&token.id).await.expect("found");
    assert_eq!((shown.state(), shown.revoke_reason.as_str()), (TokenState::Active, ""));
    let about =
        proto::ListAuditEventsRequest { token_id: token.id.clone(), methods: vec!["ReportLeakedTokens".to_owned()], ..Default::default() };
    assert_eq!(admin.events(about).await.expect("events").len(), 1);
    stranger.report(&[&new]).await.expect("taken");
    assert_eq!(validator.verdict(&new).await, Verdict::Revoked);
    // Both at once.
    let (token, old) = admin.issue("t", &[]).await;
    let new = admin.regenerate(&token.id, 86_400).await.expect("done").secret;
    stranger.report(&[&new, &old]).await.expect("taken");
    let verdicts = validator.verdicts(&[&old, &new]).await;
    assert!(verdicts.iter().all(|verdict| *verdict != Verdict::Valid), "{verdicts:?}");
    assert_eq!(admin.get(&token.id).await.expect("found").state(), TokenState::Revoked);
}

async fn reports_come_at_a_bounded_rate(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let begin = Instant::now();
    let stranger = world.stranger().await;
    let calls = (0..45).map(|_| {
        let stranger = stranger.clone();
        tokio::spawn(async move { stranger.report(&["x"]).await })
    });
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        answers.push(call.await.expect("an end"));
    }
    let taken = answers.iter().filter(|answer| answer.is_ok()).count();
    // Every two seconds there is room for another one.
    let earned = begin.elapsed().as_secs() as usize / 2 + 1;
    assert!((30..=30 + earned).contains(&taken), "{taken} were taken");
    for status in answers.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "OVERLOADED");
        assert!(status.get_details_retry_info().expect("RetryInfo").retry_delay.is_some());
    }
    // Nobody else is kept out.
    let (_, secret) = admin.issue("t", &[]).await;
    assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
}
