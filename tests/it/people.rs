//! Workspaces, the principals in them, and their sessions: fields and their limits, pages, etags, temporary tokens.

use std::{collections::BTreeSet, time::Duration};

use keyward::proto::{self, TokenKind, TokenState, Verdict, create_my_token_request::Lifetime as Mine, create_token_request::Lifetime};
use prost_types::{Duration as Span, FieldMask, Timestamp};
use tonic::{Code, Status};

use crate::{
    acts::{fields, refusal, wire_days},
    world::{Actor, BEGINNING, World, new_token},
};

const DAY: Duration = Duration::from_hours(24);

crate::on_both_databases!(
    a_temporary_token_is_bound_to_the_session_of_the_token_that_asked_for_it,
    a_session_is_ended_by_those_who_may,
    temporary_tokens_are_listed_when_asked_for,
    permanent_tokens_can_be_left_to_administrators,
    principals_can_be_made_by_hand_only,
    a_prefix_belongs_to_one_workspace_for_good,
    a_stale_etag_changes_no_workspace_and_no_principal,
    what_exists_is_not_made_again,
    a_day_must_be_later_than_today,
    workspaces_name_every_wrong_field,
    principals_name_every_wrong_field,
    an_update_changes_what_its_mask_names,
    workspaces_page_by_id,
    principals_page_by_id,
    an_upsert_makes_or_changes,
    a_principal_goes_with_its_tokens,
);

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn named(workspace: &str, id: &str) -> proto::Principal {
    proto::Principal { workspace: workspace.to_owned(), id: id.to_owned(), ..Default::default() }
}

fn of(principal: &str) -> proto::CreateTokenRequest {
    proto::CreateTokenRequest { principal: principal.to_owned(), ..new_token("t", &[]) }
}

fn mine(lifetime: Option<Mine>) -> proto::CreateMyTokenRequest {
    proto::CreateMyTokenRequest { display_name: "mine".to_owned(), lifetime, ..Default::default() }
}

fn new_workspace(id: &str, prefix: &str) -> proto::Workspace {
    proto::Workspace { id: id.to_owned(), display_name: id.to_owned(), prefix: prefix.to_owned(), ..Default::default() }
}

async fn a_temporary_token_is_bound_to_the_session_of_the_token_that_asked_for_it(world: World) {
    let (alice, validator) = (world.member("alice").await, world.validator().await);
    let (token, login) = alice.temporary("login-1", &["keyward:self"]).await.expect("issued");
    assert_eq!(
        (token.kind(), token.session_id.as_str(), token.display_name.as_str()),
        (TokenKind::Temporary, "login-1", "Temporary token")
    );
    assert_eq!((token.principal.as_str(), token.created_by.as_str()), ("alice", "alice"));
    assert_eq!(token.expire_time.expect("it ends").seconds - BEGINNING.micros() / 1_000_000, 86_400);
    let bound = world.bearer(&login).await;
    let (inherited, below) = bound.temporary("", &["keyward:self"]).await.expect("issued");
    assert_eq!(inherited.session_id, "login-1");
    assert_eq!(bound.temporary("login-1", &[]).await.expect("its own").0.session_id, "login-1");
    assert_eq!(fields(bound.temporary("login-2", &[]).await), ["session_id"]);
    let (inherited, _) = world.bearer(&below).await.temporary("", &[]).await.expect("issued");
    assert_eq!(inherited.session_id, "login-1", "for as many as follow");
    assert_eq!(alice.temporary("", &[]).await.expect("issued").0.session_id, "", "a permanent one is bound to nothing");
    // Nothing that the caller does not hold, and no longer than the policy says.
    assert_eq!(refusal(alice.temporary("", &["agents:list"]).await), Code::PermissionDenied);
    let ask = async |ttl| {
        let message = proto::IssueTemporaryTokenRequest { ttl: Some(Span { seconds: ttl, nanos: 0 }), ..Default::default() };
        alice.own().issue_temporary_token(alice.request(message)).await.map(tonic::Response::into_inner)
    };
    assert_eq!(fields(ask(86_401).await), ["ttl"]);
    assert_eq!(fields(ask(0).await), ["ttl"]);
    let short = ask(60).await.expect("issued").secret;
    assert_eq!(validator.verdict(&short).await, Verdict::Valid);
    world.advance(Duration::from_mins(1));
    assert_eq!(validator.verdict(&short).await, Verdict::Expired);
    let nobody =
        proto::IssueTemporaryTokenRequest { session_id: "s".repeat(129), display_name: "a\u{202e}b".to_owned(), ..Default::default() };
    let status = alice.own().issue_temporary_token(alice.request(nobody)).await;
    let wrong: BTreeSet<_> = fields(status).into_iter().collect();
    assert_eq!(wrong, owned(&["display_name", "session_id"]).into_iter().collect());
    let weak = world.actor("bob", &["agents:list"]).await;
    assert_eq!(refusal(weak.temporary("", &[]).await), Code::PermissionDenied);
    let session = proto::CreateTokenRequest { session_id: "login-1".to_owned(), ..new_token("t", &[]) };
    assert_eq!(fields(world.admin().await.create(session).await), ["session_id"], "a permanent one is bound to no session");
}

async fn a_session_is_ended_by_those_who_may(world: World) {
    let (admin, root, validator) = (world.admin().await, world.root().await, world.validator().await);
    let (alice, bob) = (world.member("alice").await, world.member("bob").await);
    world.add_workspace("shop", "shop").await;
    let elsewhere = world.actor_in("shop", "alice", &["keyward:self"]).await;
    let open = async |actor: &Actor| {
        let (_, first) = actor.temporary("shared", &["keyward:self"]).await.expect("issued");
        let (_, second) = actor.temporary("shared", &[]).await.expect("issued");
        (first, second)
    };
    let (a1, a2) = open(&alice).await;
    let (b1, b2) = open(&bob).await;
    let (theirs, _) = open(&elsewhere).await;
    let (other, apart) = alice.temporary("apart", &[]).await.expect("issued");
    let seen = async || validator.verdicts(&[&a1, &a2, &b1, &b2, &apart]).await;
    assert_eq!(seen().await, [Verdict::Valid; 5]);
    // By a member: what is its own, whatever others call theirs.
    assert_eq!(alice.end_session("shared").await.expect("done"), 2);
    let [valid, dead] = [Verdict::Valid, Verdict::Revoked];
    assert_eq!(seen().await, [dead, dead, valid, valid, valid]);
    assert_eq!(alice.end_session("shared").await.expect("nothing is left"), 0);
    let ended = admin
        .list(proto::ListTokensRequest {
            kind: TokenKind::Temporary.into(),
            states: vec![TokenState::Revoked.into()],
            ..Default::default()
        })
        .await;
    let ended = ended.expect("a list").tokens;
    assert!(
        ended.len() == 2 && ended.iter().all(|token| token.revoke_reason == "SESSION_ENDED" && token.principal == "alice"),
        "{ended:?}"
    );
    assert_eq!(alice.create_own(mine(None)).await.expect("permanent ones go on").token.expect("a token").state(), TokenState::Active);
    // By a bearer without any right: the session that it is bound to, and no other.
    let weak = world.bearer(&b2).await;
    let status = weak.end_session("apart").await.expect_err("not its own");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(refusal(world.actor("carol", &["agents:list"]).await.end_session("shared").await), Code::PermissionDenied);
    assert_eq!(weak.end_session("").await.expect("its own"), 2);
    assert_eq!(seen().await, [dead, dead, dead, dead, valid]);
    assert_eq!(refusal(weak.end_session("").await), Code::Unauthenticated, "it ended itself");
    assert_eq!(root.verdict(&theirs).await, valid, "another workspace has sessions of its own");
    // By an administrator: everybody's.
    let (a1, a2) = open(&alice).await;
    let (b1, b2) = open(&bob).await;
    assert_eq!(admin.end_session("shared").await.expect("done"), 4);
    assert_eq!(validator.verdicts(&[&a1, &a2, &b1, &b2, &apart]).await, [dead, dead, dead, dead, valid]);
    let end = proto::EndSessionRequest { session_id: "shared".to_owned(), workspace: "shop".to_owned() };
    assert_eq!(root.own().end_session(root.request(end)).await.expect("done").into_inner().revoked_count, 2);
    assert_eq!(root.verdict(&theirs).await, dead);
    // One that names none, and is bound to none.
    assert_eq!(refusal(alice.end_session("").await), Code::FailedPrecondition);
    assert_eq!(fields(alice.end_session(&"s".repeat(129)).await), ["session_id"]);
    assert_eq!(alice.end_session(&"s".repeat(128)).await.expect("done"), 0);
    // Each that was ended has its event.
    let asked = proto::ListAuditEventsRequest { methods: owned(&["EndSession"]), ..Default::default() };
    assert_eq!(admin.events(asked.clone()).await.expect("events").len(), 8);
    assert_eq!(admin.events(proto::ListAuditEventsRequest { token_id: other.id, ..asked }).await.expect("events"), []);
}

async fn temporary_tokens_are_listed_when_asked_for(world: World) {
    let (admin, alice) = (world.admin().await, world.member("alice").await);
    let (temporary, _) = alice.temporary("s", &[]).await.expect("issued");
    let own = async |kind: TokenKind| {
        let asked = proto::ListMyTokensRequest { kind: kind.into(), ..Default::default() };
        alice.list_own(asked).await.expect("a list").into_iter().map(|token| token.display_name).collect::<Vec<_>>()
    };
    assert_eq!(own(TokenKind::Unspecified).await, ["token of alice"]);
    assert_eq!(own(TokenKind::Permanent).await, ["token of alice"]);
    assert_eq!(own(TokenKind::Temporary).await, ["Temporary token"]);
    let all = async |kind: TokenKind| {
        let list = admin.list(proto::ListTokensRequest { kind: kind.into(), principal: "alice".to_owned(), ..Default::default() }).await;
        list.expect("a list").tokens.into_iter().map(|token| token.display_name).collect::<Vec<_>>()
    };
    assert_eq!(all(TokenKind::Unspecified).await, ["token of alice"]);
    assert_eq!(all(TokenKind::Temporary).await, ["Temporary token"]);
    assert_eq!(admin.get(&temporary.id).await.expect("by its id").kind(), TokenKind::Temporary);
    let unknown = proto::ListMyTokensRequest { kind: 9, ..Default::default() };
    assert_eq!(fields(alice.list_own(unknown).await), ["kind"]);
}

async fn permanent_tokens_can_be_left_to_administrators(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let alice = world.member("alice").await;
    let strict = proto::Policy { permanent_requires_admin: true, ..Default::default() };
    alice.create_own(mine(None)).await.expect("not yet");
    admin.set_policy("default", strict, &["policy.permanent_requires_admin"]).await.expect("changed");
    let status = alice.create_own(mine(None)).await.expect_err("a member");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("permanent_requires_admin"), "{}", status.message());
    alice.temporary("s", &[]).await.expect("anybody gets a temporary one");
    admin.set_role("alice", proto::Role::Admin).await.expect("done");
    let made = alice.create_own(mine(None)).await.expect("at once").token.expect("a token");
    assert_eq!((made.kind(), made.principal.as_str()), (TokenKind::Permanent, "alice"));
    assert_eq!(refusal(alice.create(new_token("t", &[])).await), Code::PermissionDenied, "the role is for oneself alone");
    admin.set_role("alice", proto::Role::Member).await.expect("done");
    assert_eq!(refusal(alice.create_own(mine(None)).await), Code::PermissionDenied, "at once");
    // The scopes do as well, whatever the role; for themselves and for others.
    for actor in [&admin, &root] {
        actor.create_own(mine(None)).await.expect("an administrator");
        actor.create(of("alice")).await.expect("an administrator");
    }
    assert_eq!(admin.principal("", "admin").await.expect("there").role(), proto::Role::Member);
    admin.set_role("carol", proto::Role::Admin).await.expect("made");
    let (_, weak) = {
        let created = admin.create(proto::CreateTokenRequest { scopes: owned(&["agents:list"]), ..of("carol") }).await.expect("created");
        (created.token, created.secret)
    };
    assert_eq!(
        refusal(world.bearer(&weak).await.create_own(mine(None)).await),
        Code::PermissionDenied,
        "a role without keyward:self is not enough"
    );
}

async fn principals_can_be_made_by_hand_only(world: World) {
    let admin = world.admin().await;
    world.member("known").await;
    let by_hand = proto::Policy { principals_on_first_use: Some(false), ..Default::default() };
    let changed = admin.set_policy("default", by_hand, &["policy.principals_on_first_use"]).await.expect("changed");
    assert_eq!(changed.policy.expect("a policy").principals_on_first_use, Some(false));
    let count = async || {
        let tokens = world.db_number("SELECT COUNT(*) FROM token").await;
        (
            tokens,
            world.db_number("SELECT COUNT(*) FROM principal").await,
            world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await,
        )
    };
    let before = count().await;
    let status = admin.create(of("stranger")).await.expect_err("never heard of");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("stranger") && status.message().contains("principals_on_first_use"), "{}", status.message());
    assert_eq!(count().await, before, "nothing was made");
    assert_eq!(refusal(admin.principal("", "stranger").await), Code::NotFound);
    admin.create(of("known")).await.expect("who is there is served");
    assert!(admin.upsert(named("", "stranger")).await.expect("by hand").created);
    admin.create(of("stranger")).await.expect("created");
    let on_first_use = proto::Policy::default();
    let changed = admin.set_policy("default", on_first_use, &["policy.principals_on_first_use"]).await.expect("changed");
    assert_eq!(changed.policy.expect("a policy").principals_on_first_use, Some(true), "named and not set: the default");
    admin.create(of("another")).await.expect("created");
    let made = admin.principal("", "another").await.expect("made with its first token");
    assert_eq!((made.kind(), made.role(), made.display_name.as_str()), (proto::PrincipalKind::User, proto::Role::Member, "another"));
}

async fn a_prefix_belongs_to_one_workspace_for_good(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let (_, old) = admin.issue("old", &[]).await;
    assert!(old.starts_with("kw_"));
    let rebrand = async |id: &str, prefix: &str| root.update_workspace(new_workspace(id, prefix), &["prefix"]).await;
    assert_eq!(rebrand("default", "acme").await.expect("changed").prefix, "acme");
    let (token, new) = admin.issue("new", &[]).await;
    assert!(new.starts_with("acme_") && token.hint == new[..8], "{}", token.hint);
    assert_eq!(admin.verdicts(&[&old, &new]).await, [Verdict::Valid; 2]);
    admin.who().await.expect("whoever carries an old one is served");
    assert_eq!(refusal(root.create_workspace(new_workspace("thief", "kw")).await), Code::AlreadyExists);
    assert_eq!(refusal(root.create_workspace(new_workspace("thief", "acme")).await), Code::AlreadyExists);
    assert_eq!(refusal(root.workspace("thief").await), Code::NotFound, "nothing of it was made");
    root.create_workspace(new_workspace("shop", "shop")).await.expect("made");
    for taken in ["kw", "acme"] {
        assert_eq!(refusal(rebrand("shop", taken).await), Code::AlreadyExists);
    }
    assert_eq!(root.workspace("shop").await.expect("there").prefix, "shop");
    assert_eq!(rebrand("default", "kw").await.expect("its own from before").prefix, "kw");
    assert!(admin.issue("again", &[]).await.1.starts_with("kw_"));
    assert_eq!(refusal(rebrand("shop", "acme").await), Code::AlreadyExists, "it had it");
    // Two at once.
    let tries = ["a1", "a2", "a3", "a4"].map(|id| {
        let root = root.clone();
        tokio::spawn(async move { root.create_workspace(new_workspace(id, "same")).await.map_err(|status| status.code()) })
    });
    let mut made = 0;
    for one in tries {
        match one.await.expect("an end") {
            Ok(_) => made += 1,
            Err(code) => assert_eq!(code, Code::AlreadyExists),
        }
    }
    assert_eq!(made, 1);
}

async fn a_stale_etag_changes_no_workspace_and_no_principal(world: World) {
    let root = world.root().await;
    let seen = world.add_workspace("shop", "shop").await;
    let rename = async |name: &str, etag: &str| {
        let workspace =
            proto::Workspace { id: "shop".to_owned(), display_name: name.to_owned(), etag: etag.to_owned(), ..Default::default() };
        root.update_workspace(workspace, &["display_name"]).await
    };
    let next = rename("One", &seen.etag).await.expect("as seen");
    assert_ne!(next.etag, seen.etag);
    assert_eq!(refusal(rename("Two", &seen.etag).await), Code::Aborted);
    assert_eq!(rename("One", "").await.expect("as it is").etag, next.etag, "nothing changes, the etag neither");
    assert_eq!(root.workspace("shop").await.expect("there").display_name, "One");
    let routes = proto::Workspace { id: "shop".to_owned(), resources: vec![agents()], ..Default::default() };
    let routed = root.update_workspace(routes, &["resources"]).await.expect("changed");
    assert_ne!(routed.etag, next.etag, "a route counts");
    let stale = next.etag;
    let (id, reason) = ("shop".to_owned(), String::new());
    let suspend = proto::SuspendWorkspaceRequest { id: id.clone(), reason: reason.clone(), etag: stale.clone() };
    assert_eq!(refusal(root.workspaces().suspend_workspace(root.request(suspend)).await), Code::Aborted);
    let resume = proto::ResumeWorkspaceRequest { id: id.clone(), etag: stale.clone() };
    assert_eq!(refusal(root.workspaces().resume_workspace(root.request(resume)).await), Code::Aborted);
    let delete = proto::DeleteWorkspaceRequest { id: id.clone(), reason, etag: stale };
    assert_eq!(refusal(root.workspaces().delete_workspace(root.request(delete)).await), Code::Aborted);
    assert!(!root.workspace("shop").await.expect("there").suspended);
    let suspend = proto::SuspendWorkspaceRequest { id, reason: String::new(), etag: routed.etag.clone() };
    let suspended =
        root.workspaces().suspend_workspace(root.request(suspend)).await.expect("as seen").into_inner().workspace.expect("a workspace");
    assert_ne!(suspended.etag, routed.etag);

    let made = root.upsert(named("", "ann")).await.expect("made").principal.expect("a principal");
    let change = async |name: &str, etag: &str| {
        root.upsert(proto::Principal { display_name: name.to_owned(), etag: etag.to_owned(), ..named("", "ann") }).await
    };
    let next = change("Ann", &made.etag).await.expect("as seen").principal.expect("a principal");
    assert_ne!(next.etag, made.etag);
    assert_eq!(refusal(change("Bea", &made.etag).await), Code::Aborted);
    let (workspace, id, etag) = (String::new(), "ann".to_owned(), made.etag.clone());
    let suspend =
        proto::SuspendPrincipalRequest { workspace: workspace.clone(), id: id.clone(), reason: String::new(), etag: etag.clone() };
    assert_eq!(refusal(root.principals().suspend_principal(root.request(suspend)).await), Code::Aborted);
    let resume = proto::ResumePrincipalRequest { workspace: workspace.clone(), id: id.clone(), etag: etag.clone() };
    assert_eq!(refusal(root.principals().resume_principal(root.request(resume)).await), Code::Aborted);
    let delete = proto::DeletePrincipalRequest { workspace, id, reason: String::new(), etag };
    assert_eq!(refusal(root.principals().delete_principal(root.request(delete)).await), Code::Aborted);
    let shown = root.principal("", "ann").await.expect("there");
    assert_eq!((shown.display_name.as_str(), shown.suspended, shown.etag.as_str()), ("Ann", false, next.etag.as_str()));
    for etag in ["v0", "v1", "nonsense"] {
        assert_eq!(
            refusal(root.upsert(proto::Principal { etag: etag.to_owned(), ..named("", "nobody") }).await),
            Code::Aborted,
            "{etag}: it must be there"
        );
    }
    assert_eq!(refusal(root.principal("", "nobody").await), Code::NotFound);
}

async fn what_exists_is_not_made_again(world: World) {
    let root = world.root().await;
    let made = root.create_workspace(new_workspace("shop", "shop")).await.expect("made");
    let policy = made.policy.expect("a policy");
    assert_eq!(
        (policy.default_ttl, policy.max_permanent_ttl, policy.max_temporary_ttl),
        (Some(wire_days(90)), Some(wire_days(365)), Some(wire_days(1)))
    );
    assert_eq!((policy.allow_never, policy.permanent_requires_admin, policy.principals_on_first_use), (false, false, Some(true)));
    assert_eq!((policy.max_tokens_per_principal, made.suspended), (100, false));
    assert_eq!(made.create_time, Some(Timestamp { seconds: BEGINNING.micros() / 1_000_000, nanos: 0 }));
    assert_eq!(root.workspace("shop").await.expect("there"), made);
    let again = proto::Workspace { display_name: "Thief".to_owned(), ..new_workspace("shop", "thief") };
    assert_eq!(refusal(root.create_workspace(again).await), Code::AlreadyExists);
    assert_eq!(root.workspace("shop").await.expect("there"), made);
    root.create_workspace(new_workspace("thief", "thief")).await.expect("the prefix was not taken by what failed");
    assert_eq!(refusal(root.create_workspace(new_workspace("default", "dd")).await), Code::AlreadyExists);
    root.delete_workspace("shop").await.expect("done");
    assert_eq!(refusal(root.create_workspace(new_workspace("shop", "shop2")).await), Code::AlreadyExists, "its rows are there for a time");
    assert_eq!(refusal(root.create_workspace(new_workspace("shop2", "shop")).await), Code::AlreadyExists);
}

async fn a_day_must_be_later_than_today(world: World) {
    let (admin, alice) = (world.admin().await, world.member("alice").await);
    // It is the 15th, 8 o'clock.
    let day = |day: &str| Some(Mine::ExpireDate(day.to_owned()));
    let (long, script) = (format!("2027-03-0{}", "1".repeat(300)), "<script>");
    for bad in [
        "2027-01-15",
        "2027-01-14",
        "2027-02-30",
        "2027-2-1",
        "",
        "tomorrow",
        "2027-01-16T00:00:00Z",
        "2029-01-01",
        "9999-12-31",
        &long,
        script,
    ] {
        let status = alice.create_own(mine(day(bad))).await;
        assert_eq!(fields(status), ["expire_date"], "{bad}");
        let request = proto::CreateTokenRequest { lifetime: Some(Lifetime::ExpireDate(bad.to_owned())), ..new_token("t", &[]) };
        assert_eq!(fields(admin.create(request).await), ["expire_date"], "{bad}");
    }
    let made = alice.create_own(mine(day("2027-01-16"))).await.expect("tomorrow");
    let midnight = Timestamp { seconds: BEGINNING.micros() / 1_000_000 + 16 * 3_600, nanos: 0 };
    assert_eq!(made.token.expect("a token").expire_time, Some(midnight), "as the day begins");
    let request = proto::CreateTokenRequest { lifetime: Some(Lifetime::ExpireDate("2027-02-28".to_owned())), ..new_token("t", &[]) };
    assert_eq!(
        admin.create(request).await.expect("created").token.expect("a token").expire_time.expect("it ends").seconds - midnight.seconds,
        43 * 86_400
    );
    let status: Result<_, Status> = alice
        .create_own(proto::CreateMyTokenRequest { display_name: String::new(), scopes: owned(&["X"]), ..mine(day("2027-01-15")) })
        .await;
    let wrong: BTreeSet<_> = fields(status).into_iter().collect();
    assert_eq!(wrong, owned(&["display_name", "expire_date", "scopes[0]"]).into_iter().collect(), "with what else is wrong");
    world.advance(Duration::from_hours(16) - Duration::from_millis(1));
    assert_eq!(admin.verdict(&made.secret).await, Verdict::Valid);
    world.advance(Duration::from_millis(1));
    assert_eq!(admin.verdict(&made.secret).await, Verdict::Expired);
    assert_eq!(fields(alice.create_own(mine(day("2027-01-16"))).await), ["expire_date"], "it is today now");
    world.advance(DAY);
}

fn agents() -> proto::Resource {
    let operation = proto::Operation { operation: "list".to_owned(), method: "GET".to_owned(), path: String::new() };
    proto::Resource { resource: "agents".to_owned(), endpoint: "/api/agents".to_owned(), operations: vec![operation] }
}

fn set(texts: &[&str]) -> BTreeSet<String> {
    owned(texts).into_iter().collect()
}

async fn workspaces_name_every_wrong_field(world: World) {
    let root = world.root().await;
    let wrong = async |workspace: proto::Workspace| fields(root.create_workspace(workspace).await).into_iter().collect::<BTreeSet<_>>();
    let negative = Some(Span { seconds: -1, nanos: 0 });
    let policy = proto::Policy {
        default_ttl: Some(Span::default()),
        max_permanent_ttl: Some(wire_days(36_526)),
        max_temporary_ttl: Some(wire_days(31)),
        max_tokens_per_principal: 100_001,
        ..Default::default()
    };
    let all = proto::Workspace { policy: Some(policy), ..new_workspace("Shop", "x") };
    let all = wrong(proto::Workspace { display_name: "a\u{202e}b".to_owned(), ..all }).await;
    let policies = [
        "workspace.policy.default_ttl",
        "workspace.policy.max_permanent_ttl",
        "workspace.policy.max_temporary_ttl",
        "workspace.policy.max_tokens_per_principal",
    ];
    assert_eq!(all, set(&[&["workspace.id", "workspace.display_name", "workspace.prefix"][..], &policies].concat()));
    assert_eq!(wrong(proto::Workspace::default()).await, set(&["workspace.id", "workspace.display_name", "workspace.prefix"]));
    let spans = proto::Policy {
        default_ttl: negative,
        max_permanent_ttl: negative,
        max_temporary_ttl: negative,
        max_tokens_per_principal: -1,
        ..Default::default()
    };
    assert_eq!(wrong(proto::Workspace { policy: Some(spans), ..new_workspace("shop", "shop") }).await, set(&policies));
    for bad in ["", "1shop", "shop-", "-shop", "sh_op", "sh.op", "SHOP", "sh op", "sh\u{f6}p", &"s".repeat(64)] {
        assert_eq!(
            wrong(new_workspace(bad, "shop")).await,
            if bad.is_empty() { set(&["workspace.id", "workspace.display_name"]) } else { set(&["workspace.id"]) },
            "{bad:?}"
        );
    }
    for bad in ["", "s", "1s", "Shop", "sh-op", "sh_op", "shopshopshops"] {
        assert_eq!(wrong(new_workspace("shop", bad)).await, set(&["workspace.prefix"]), "{bad:?}");
    }
    for bad in ["", "  ", "a\nb", &"n".repeat(101)] {
        assert_eq!(
            wrong(proto::Workspace { display_name: bad.to_owned(), ..new_workspace("shop", "shop") }).await,
            set(&["workspace.display_name"]),
            "{bad:?}"
        );
    }
    let long = proto::Policy { default_ttl: Some(wire_days(31)), max_permanent_ttl: Some(wire_days(30)), ..Default::default() };
    assert_eq!(
        wrong(proto::Workspace { policy: Some(long), ..new_workspace("shop", "shop") }).await,
        set(&["workspace.policy.default_ttl"])
    );
    // The same of a change, all at once.
    let change = proto::Workspace {
        id: "default".to_owned(),
        display_name: String::new(),
        prefix: "X".to_owned(),
        policy: Some(policy),
        ..Default::default()
    };
    let message = proto::UpdateWorkspaceRequest {
        workspace: Some(change),
        update_mask: Some(FieldMask { paths: owned(&["display_name", "prefix", "policy", "id", "policy.nothing"]) }),
    };
    let answer = root.workspaces().update_workspace(root.request(message)).await;
    let named: BTreeSet<_> = fields(answer).into_iter().collect();
    assert_eq!(
        named,
        set(&[&["workspace.display_name", "workspace.prefix", "update_mask.paths[3]", "update_mask.paths[4]"][..], &policies].concat())
    );
    for suspend in [true, false] {
        let (id, reason, etag) = (String::new(), "r".repeat(201), String::new());
        let answer = if suspend {
            let message = proto::SuspendWorkspaceRequest { id, reason, etag };
            fields(root.workspaces().suspend_workspace(root.request(message)).await)
        } else {
            let message = proto::DeleteWorkspaceRequest { id, reason, etag };
            fields(root.workspaces().delete_workspace(root.request(message)).await)
        };
        assert_eq!(answer, ["id", "reason"]);
    }
    assert_eq!(fields(root.resume_workspace("").await), ["id"]);
    assert_eq!(fields(root.list_workspaces(-1, "nonsense").await), ["page_size", "page_token"]);
    // The most and the least that is allowed.
    let most = proto::Policy {
        default_ttl: Some(wire_days(36_525)),
        max_permanent_ttl: Some(wire_days(36_525)),
        max_temporary_ttl: Some(wire_days(30)),
        max_tokens_per_principal: 100_000,
        ..Default::default()
    };
    let most =
        proto::Workspace { display_name: "\u{f6}".repeat(100), policy: Some(most), ..new_workspace(&"s".repeat(63), "shopshopshop") };
    assert_eq!(root.create_workspace(most).await.expect("made").policy.expect("a policy").max_tokens_per_principal, 100_000);
    let second = Some(Span { seconds: 1, nanos: 0 });
    let least = proto::Policy {
        default_ttl: second,
        max_permanent_ttl: second,
        max_temporary_ttl: second,
        max_tokens_per_principal: 1,
        ..Default::default()
    };
    root.create_workspace(proto::Workspace { policy: Some(least), ..new_workspace("s", "sh") }).await.expect("made");
}

async fn principals_name_every_wrong_field(world: World) {
    let admin = world.admin().await;
    let bad = proto::Principal { kind: 7, role: 9, display_name: "n".repeat(101), email: "nobody".to_owned(), ..named("", "a b") };
    let wrong: BTreeSet<_> = fields(admin.upsert(bad).await).into_iter().collect();
    assert_eq!(wrong, set(&["principal.id", "principal.kind", "principal.role", "principal.display_name", "principal.email"]));
    for bad in ["", "a b", "a/b", "\u{e9}", "a\nb", &"p".repeat(129)] {
        assert_eq!(fields(admin.upsert(named("", bad)).await), ["principal.id"], "{bad:?}");
        assert_eq!(fields(admin.principal("", bad).await), ["id"], "{bad:?}");
        assert_eq!(fields(admin.suspend_principal("", bad).await), ["id"], "{bad:?}");
        assert_eq!(fields(admin.resume_principal("", bad).await), ["id"], "{bad:?}");
        assert_eq!(fields(admin.delete_principal("", bad).await), ["id"], "{bad:?}");
    }
    for bad in [
        "a",
        "@b",
        "a@",
        "a@b@c d",
        "a b@c.d",
        "a@b..c",
        ".a@b.c",
        "a@-b.c",
        "a@b.c\r\nBcc: x@y.z",
        &format!("{}@b.c", "a".repeat(65)),
        &format!("a@{}", "b.".repeat(130)),
    ] {
        assert_eq!(
            fields(admin.upsert(proto::Principal { email: bad.to_owned(), ..named("", "ann") }).await),
            ["principal.email"],
            "{bad:?}"
        );
    }
    let message = proto::SuspendPrincipalRequest { id: String::new(), reason: "r".repeat(201), ..Default::default() };
    assert_eq!(fields(admin.principals().suspend_principal(admin.request(message)).await), ["id", "reason"]);
    let message = proto::DeletePrincipalRequest { id: String::new(), reason: "r\u{7}".to_owned(), ..Default::default() };
    assert_eq!(fields(admin.principals().delete_principal(admin.request(message)).await), ["id", "reason"]);
    let list =
        proto::ListPrincipalsRequest { query: "q".repeat(101), page_size: -1, page_token: "nonsense".to_owned(), ..Default::default() };
    assert_eq!(fields(admin.list_principals(list).await), ["query", "page_size", "page_token"]);
    let most = proto::Principal {
        display_name: "\u{f6}".repeat(100),
        email: format!("{}@{}.example", "a".repeat(64), "b".repeat(63)),
        ..named("", &"p".repeat(128))
    };
    assert!(admin.upsert(most).await.expect("the most that is allowed").created);
    assert_eq!(refusal(admin.principal("", "nobody").await), Code::NotFound);
}

async fn an_update_changes_what_its_mask_names(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let before = admin.workspace("").await.expect("its own");
    world.advance(Duration::from_secs(7));
    let everything = || proto::Workspace {
        display_name: "New name".to_owned(),
        prefix: "newer".to_owned(),
        policy: Some(proto::Policy {
            default_ttl: Some(wire_days(30)),
            allow_never: true,
            max_tokens_per_principal: 5,
            ..Default::default()
        }),
        resources: vec![agents()],
        suspended: true,
        ..Default::default()
    };
    let alone = admin.update_workspace(everything(), &["policy.default_ttl"]).await.expect("changed");
    let policy = proto::Policy { default_ttl: Some(wire_days(30)), ..before.policy.unwrap() };
    let wanted = proto::Workspace { policy: Some(policy), etag: alone.etag.clone(), update_time: alone.update_time, ..before.clone() };
    assert_eq!(alone, wanted, "and nothing else");
    assert_eq!(alone.update_time.unwrap().seconds, before.update_time.unwrap().seconds + 7);
    assert_eq!(admin.workspace("default").await.expect("its own"), alone);
    let named = admin
        .update_workspace(everything(), &["display_name", "policy.allow_never", "policy.max_tokens_per_principal"])
        .await
        .expect("changed");
    assert_eq!((named.display_name.as_str(), named.prefix.as_str(), named.resources.len(), named.suspended), ("New name", "kw", 0, false));
    let policy = named.policy.expect("a policy");
    assert_eq!((policy.allow_never, policy.max_tokens_per_principal, policy.max_permanent_ttl), (true, 5, Some(wire_days(365))));
    // A field that is named and not set gets its default; a policy that is named is replaced whole.
    let cleared =
        admin.update_workspace(proto::Workspace::default(), &["policy.default_ttl"]).await.expect("changed").policy.expect("a policy");
    assert_eq!((cleared.default_ttl, cleared.allow_never), (Some(wire_days(90)), true));
    let whole = proto::Policy { max_temporary_ttl: Some(wire_days(2)), ..Default::default() };
    let whole = admin.set_policy("", whole, &["policy"]).await.expect("changed").policy.expect("a policy");
    assert_eq!((whole.max_temporary_ttl, whole.allow_never, whole.max_tokens_per_principal), (Some(wire_days(2)), false, 100));
    let routed = admin.update_workspace(everything(), &["resources"]).await.expect("changed");
    assert_eq!((routed.resources.clone(), routed.display_name.as_str()), (vec![agents()], "New name"));
    assert_eq!(admin.workspace("").await.expect("its own").resources, [agents()]);
    assert_eq!(admin.list_workspaces(0, "").await.expect("a list").workspaces[0].resources, [], "lists leave them out");
    let twice = admin.update_workspace(everything(), &["resources", "resources"]).await.expect("as it is");
    assert_eq!(twice.etag, routed.etag);
    // What fits alone must fit what is there.
    let low = proto::Policy { max_permanent_ttl: Some(wire_days(30)), ..Default::default() };
    assert_eq!(fields(admin.set_policy("", low, &["policy.max_permanent_ttl"]).await), ["workspace.policy.default_ttl"]);
    let both = proto::Policy { default_ttl: Some(wire_days(30)), ..low };
    admin.set_policy("", both, &["policy.max_permanent_ttl", "policy.default_ttl"]).await.expect("changed");
    for (paths, wrong) in [
        (&[][..], "update_mask"),
        (&["suspended"], "update_mask.paths[0]"),
        (&["display_name", "Policy"], "update_mask.paths[1]"),
        (&["policy."], "update_mask.paths[0]"),
        (&["*"], "update_mask.paths[0]"),
    ] {
        assert_eq!(fields(admin.update_workspace(everything(), paths).await), [wrong]);
    }
    assert_eq!(refusal(admin.update_workspace(everything(), &["prefix"]).await), Code::PermissionDenied);
    assert_eq!(root.update_workspace(everything(), &["prefix"]).await.expect("root does").prefix, "newer");
}

async fn workspaces_page_by_id(world: World) {
    let root = world.root().await;
    for number in 0..11 {
        root.create_workspace(new_workspace(&format!("w{:02}", number * 7 % 11), &format!("p{number}"))).await.expect("made");
    }
    root.delete_workspace("w04").await.expect("done");
    let mut wanted: Vec<_> = (0..11).filter(|number| *number != 4).map(|number| format!("w{number:02}")).collect();
    wanted.insert(0, "default".to_owned());
    let (mut ids, mut token, mut pages) = (Vec::new(), String::new(), Vec::new());
    loop {
        let page = root.list_workspaces(4, &token).await.expect("a page");
        pages.push(page.workspaces.len());
        ids.extend(page.workspaces.into_iter().map(|workspace| workspace.id));
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    assert_eq!((ids, pages), (wanted.clone(), vec![4, 4, 3]));
    assert_eq!(root.list_workspaces(3, &token).await.expect("another size").workspaces.len(), 3);
    assert_eq!(root.list_workspaces(i32::MAX, "").await.expect("all").workspaces.len(), wanted.len());
    let principals = proto::ListPrincipalsRequest { page_token: token, ..Default::default() };
    assert_eq!(fields(root.list_principals(principals).await), ["page_token"]);
}

async fn principals_page_by_id(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    world.add_workspace("shop", "shop").await;
    root.upsert(named("shop", "p-shop")).await.expect("made");
    for number in 0..9 {
        let principal = proto::Principal {
            display_name: format!("Person {number}%"),
            email: format!("p{number}@Example.com"),
            ..named("", &format!("p-{}", number * 4 % 9))
        };
        admin.upsert(principal).await.expect("made");
    }
    let ask = async |query: &str, page_size: i32, page_token: &str| {
        admin
            .list_principals(proto::ListPrincipalsRequest {
                query: query.to_owned(),
                page_size,
                page_token: page_token.to_owned(),
                ..Default::default()
            })
            .await
    };
    let ids = |page: &proto::ListPrincipalsResponse| page.principals.iter().map(|principal| principal.id.clone()).collect::<Vec<_>>();
    let everybody = ids(&ask("", 0, "").await.expect("a page"));
    assert_eq!(
        everybody,
        ["admin", "p-0", "p-1", "p-2", "p-3", "p-4", "p-5", "p-6", "p-7", "p-8", "root"],
        "and nobody of another workspace"
    );
    let (mut paged, mut token) = (Vec::new(), String::new());
    loop {
        let page = ask("P-", 4, &token).await.expect("a page");
        paged.extend(ids(&page));
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    assert_eq!(paged, everybody[1..10]);
    assert_eq!(fields(ask("", 4, &token).await), ["page_token"], "bound to the query");
    assert_eq!(ids(&ask("P-", 1, &token).await.expect("another size is the same list")), ["p-8"]);
    let elsewhere =
        proto::ListPrincipalsRequest { workspace: "shop".to_owned(), query: "P-".to_owned(), page_token: token, ..Default::default() };
    assert_eq!(fields(root.list_principals(elsewhere.clone()).await), ["page_token"], "and to the workspace");
    assert_eq!(
        ids(&root.list_principals(proto::ListPrincipalsRequest { page_token: String::new(), ..elsewhere }).await.expect("a page")),
        ["p-shop"]
    );
    for (query, found) in [("person 3", 1), ("@EXAMPLE", 9), ("p-3", 1), ("%", 9), ("_", 0), ("\\", 0), ("'", 0), ("nobody", 0)] {
        assert_eq!(ids(&ask(query, 0, "").await.expect("a page")).len(), found, "{query}");
    }
}

async fn an_upsert_makes_or_changes(world: World) {
    let admin = world.admin().await;
    let ann = proto::Principal {
        kind: proto::PrincipalKind::Service.into(),
        display_name: "  Ann's robot ".to_owned(),
        email: " ann@example.com ".to_owned(),
        role: proto::Role::Admin.into(),
        suspended: true,
        ..named("", "ann")
    };
    let made = admin.upsert(ann.clone()).await.expect("made");
    assert!(made.created && made.propagation.expect("set").state() == proto::PropagationState::Complete);
    let first = made.principal.expect("a principal");
    assert_eq!(
        (first.workspace.as_str(), first.id.as_str(), first.display_name.as_str(), first.email.as_str()),
        ("default", "ann", "Ann's robot", "ann@example.com")
    );
    assert_eq!(
        (first.kind(), first.role(), first.suspended),
        (proto::PrincipalKind::Service, proto::Role::Admin, false),
        "a suspension is not among it"
    );
    assert_eq!(admin.principal("", "ann").await.expect("there"), first);
    world.advance(DAY);
    let same = admin.upsert(ann).await.expect("as it is");
    assert_eq!((same.created, same.principal.as_ref()), (false, Some(&first)), "nothing changed, the etag and the time neither");
    admin.suspend_principal("", "ann").await.expect("done");
    // Every field is taken as it is sent.
    let changed = admin.upsert(proto::Principal { email: "a@b.c".to_owned(), ..named("default", "ann") }).await.expect("changed");
    let second = changed.principal.expect("a principal");
    assert!(!changed.created && second.suspended, "a suspension stays");
    assert_eq!(
        (second.kind(), second.role(), second.display_name.as_str(), second.email.as_str()),
        (proto::PrincipalKind::User, proto::Role::Member, "ann", "a@b.c")
    );
    assert_eq!((second.create_time, second.update_time.unwrap().seconds), (first.create_time, first.create_time.unwrap().seconds + 86_400));
    assert_ne!(second.etag, first.etag);
    assert_eq!(refusal(admin.upsert(named("nowhere", "ann")).await), Code::NotFound);
    assert_eq!(refusal(world.root().await.upsert(named("nowhere", "ann")).await), Code::NotFound);
    // Many at once make one.
    let tries = (0..10).map(|_| {
        let admin = admin.clone();
        tokio::spawn(async move { admin.upsert(named("", "crowd")).await.expect("an answer").created })
    });
    let mut made = 0;
    for one in tries.collect::<Vec<_>>() {
        made += i32::from(one.await.expect("an end"));
    }
    assert_eq!(made, 1);
}

async fn a_principal_goes_with_its_tokens(world: World) {
    let (root, admin, validator) = (world.root().await, world.admin().await, world.validator().await);
    let alice = world.member("alice").await;
    let own = alice.token.clone().expect("a token");
    let (_, temporary) = alice.temporary("s", &[]).await.expect("issued");
    let off = admin.create(of("alice")).await.expect("created");
    let off_id = off.token.expect("a token").id;
    admin.deactivate(&off_id).await.expect("done");
    let dead = admin.create(of("alice")).await.expect("created").token.expect("a token").id;
    admin.revoke(&dead).await.expect("done");
    admin.set_role("alice", proto::Role::Admin).await.expect("done");
    admin.suspend_principal("", "alice").await.expect("done");
    assert_eq!(validator.verdict(&own).await, Verdict::PrincipalSuspended);
    assert_eq!(admin.delete_principal("", "alice").await.expect("done"), 3);
    assert_eq!(validator.verdicts(&[&own, &temporary, &off.secret]).await, [Verdict::Revoked; 3]);
    assert_eq!(admin.get(&off_id).await.expect("listed").revoke_reason, "left");
    assert_eq!(admin.get(&dead).await.expect("listed").revoke_reason, "test", "the first reason stands");
    assert_eq!(refusal(admin.principal("", "alice").await), Code::NotFound);
    assert_eq!(refusal(admin.delete_principal("", "alice").await), Code::NotFound);
    // A namesake who comes later is another: neither suspended nor an administrator, and the old tokens stay dead.
    let later = world.member("alice").await;
    let me = admin.principal("", "alice").await.expect("made with its first token");
    assert_eq!((me.suspended, me.role()), (false, proto::Role::Member));
    assert_eq!(later.who().await.expect("known").principal, "alice");
    assert_eq!(validator.verdicts(&[&own, &temporary, &off.secret]).await, [Verdict::Revoked; 3]);
    assert_eq!(refusal(admin.delete_principal("", "root").await), Code::PermissionDenied, "it holds more");
    assert_eq!(refusal(root.delete_principal("", "root").await), Code::FailedPrecondition, "themselves");
}
