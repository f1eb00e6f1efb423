//! The control plane: what `TokenService` promises.

use std::{collections::HashSet, time::Duration};

use keyward::proto::{self, Verdict, create_token_request::Lifetime};
use prost_types::{Duration as WireDuration, Timestamp};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::world::{BEGINNING, World, new_token};

const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);

crate::on_both_databases!(
    a_created_token_shows_its_settings_and_its_secret_once,
    a_change_is_effective_when_its_call_returns,
    every_wrong_field_is_named,
    lifetimes_are_said_in_four_ways,
    a_repeated_request_id_gets_the_first_answer,
    concurrent_calls_with_one_request_id_create_one_token,
    lists_page_through_every_token_once,
    lists_filter_by_every_field,
    lists_sort_both_ways,
    page_tokens_are_bound_to_their_arguments,
    an_update_changes_what_the_mask_names_and_nothing_else,
    a_stale_etag_changes_nothing,
    revoking_is_for_good,
    an_expired_token_is_not_brought_back,
    regenerating_keeps_everything_but_the_secret,
    grace_lets_the_old_secret_live_on,
    grace_never_outlives_the_token,
    a_deleted_token_is_gone,
    revoking_a_principal_ends_every_live_token,
    tokens_that_come_while_their_principal_is_revoked_are_whole,
    an_administrator_cannot_take_over_a_root_token,
    nobody_grants_what_they_do_not_hold,
    tokens_of_another_workspace_are_not_found,
    every_change_leaves_its_audit_row,
    numbers_come_in_the_order_of_commits,
    a_fault_at_any_statement_leaves_no_half_change,
    a_cancelled_change_is_whole,
    tokens_survive_a_restart,
);

fn seconds(timestamp: Option<&Timestamp>) -> i64 {
    timestamp.map_or(0, |timestamp| timestamp.seconds)
}

fn beginning() -> i64 {
    BEGINNING.micros() / 1_000_000
}

fn after(span: Duration) -> Option<Timestamp> {
    Some(Timestamp { seconds: beginning() + i64::try_from(span.as_secs()).unwrap(), nanos: 0 })
}

fn fields(status: &tonic::Status) -> Vec<String> {
    let violations = status.get_details_bad_request().expect("BadRequest").field_violations;
    violations.into_iter().map(|violation| violation.field).collect()
}

async fn a_created_token_shows_its_settings_and_its_secret_once(world: World) {
    let admin = world.admin().await;
    let request = proto::CreateTokenRequest {
        principal: "ci@example.com".to_owned(),
        audiences: vec!["billing".to_owned(), "billing".to_owned(), "shipping".to_owned()],
        allowed_cidrs: vec!["10.0.0.0/8".to_owned(), "2001:db8::1".to_owned()],
        metadata: [("team".to_owned(), "platform".to_owned())].into(),
        ..new_token("  Nightly build ", &["agents:list", "storage:*"])
    };
    let created = admin.create(request).await.expect("created");
    let token = created.token.expect("a token");
    assert!(token.id.starts_with("tok_") && token.id.len() == 26, "{}", token.id);
    assert_eq!(token.workspace, "default");
    assert_eq!(token.display_name, "Nightly build");
    assert_eq!(token.principal, "ci@example.com");
    assert_eq!(token.created_by, "admin");
    assert_eq!(token.state(), proto::TokenState::Active);
    assert_eq!(token.kind(), proto::TokenKind::Permanent);
    assert_eq!(token.scopes, ["agents:list", "storage:*"]);
    assert_eq!(token.audiences, ["billing", "shipping"]);
    assert_eq!(token.allowed_cidrs, ["10.0.0.0/8", "2001:db8::1/128"]);
    assert_eq!(token.metadata["team"], "platform");
    assert_eq!(seconds(token.create_time.as_ref()), beginning());
    assert_eq!(token.expire_time, after(90 * DAY));
    assert!(created.secret.starts_with("kw_") && created.secret.len() == 48);
    assert_eq!(token.hint, created.secret[..8]);
    assert_eq!(created.propagation.expect("set").state(), proto::PropagationState::Complete);
    let shown = admin.get(&token.id).await.expect("found");
    assert_eq!(shown, token);
    assert!(!format!("{shown:?}").contains(&created.secret));
}

async fn a_change_is_effective_when_its_call_returns(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    for round in 0..20 {
        let (token, secret) = admin.issue(&format!("round {round}"), &[]).await;
        // Once unseen, once from memory: a change must reach both.
        if round % 2 == 0 {
            assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        }
        admin.deactivate(&token.id).await.expect("done");
        assert_eq!(validator.verdict(&secret).await, Verdict::Inactive);
        admin.activate(&token.id).await.expect("done");
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        let ended = proto::Token { expire_time: after(HOUR), ..token.clone() };
        admin.update(proto::Token { etag: String::new(), ..ended }, &["expire_time"]).await.expect("done");
        let answer = validator.ask(proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() }).await.expect("an answer");
        assert_eq!(answer.expire_time, after(HOUR));
        admin.revoke(&token.id).await.expect("done");
        assert_eq!(validator.verdict(&secret).await, Verdict::Revoked);
        admin.delete(&token.id).await.expect("done");
        assert_eq!(validator.verdict(&secret).await, Verdict::Unknown);
    }
}

async fn every_wrong_field_is_named(world: World) {
    let admin = world.admin().await;
    let request = proto::CreateTokenRequest {
        display_name: "a\u{202e}b".to_owned(),
        principal: "who is this".to_owned(),
        kind: 7,
        scopes: vec!["agents:list".to_owned(), "Agents:List".to_owned()],
        audiences: vec!["Billing".to_owned()],
        allowed_cidrs: vec!["10.0.0.1/8".to_owned()],
        metadata: [(String::new(), "x".to_owned())].into(),
        session_id: "s".to_owned(),
        lifetime: Some(Lifetime::ExpireTime(Timestamp { seconds: beginning(), nanos: 0 })),
        request_id: "not one".to_owned(),
        ..Default::default()
    };
    let status = admin.create(request).await.expect_err("wrong in every field");
    assert_eq!(status.code(), Code::InvalidArgument);
    let named: HashSet<String> = fields(&status).into_iter().collect();
    for field in [
        "kind",
        "display_name",
        "principal",
        "scopes[1]",
        "audiences[0]",
        "allowed_cidrs[0]",
        "metadata",
        "session_id",
        "expire_time",
        "request_id",
    ] {
        assert!(named.contains(field), "{field} is not in {named:?}");
    }
    for (name, length) in [("", 0), ("x", 101)] {
        let status = admin.create(new_token(&name.repeat(length), &[])).await.expect_err("a bad name");
        assert_eq!(fields(&status), ["display_name"]);
    }
    let request = proto::ListTokensRequest {
        page_size: -1,
        order_by: "use_count".to_owned(),
        states: vec![0],
        page_token: "x".to_owned(),
        query: "x".repeat(101),
        ..Default::default()
    };
    let status = admin.list(request).await.expect_err("wrong in every field");
    let named: HashSet<String> = fields(&status).into_iter().collect();
    assert_eq!(named, ["page_size", "order_by", "states[0]", "page_token", "query"].map(str::to_owned).into());
    let status =
        admin.update(proto::Token { id: "tok_1".to_owned(), ..Default::default() }, &["display_name", "state"]).await.expect_err("bad");
    assert_eq!(fields(&status), ["update_mask.paths[1]", "token.id", "token.display_name"]);
    let revoke = proto::RevokeTokenRequest { id: "x".to_owned(), reason: "x".repeat(201), ..Default::default() };
    let status = admin.tokens().revoke_token(admin.request(revoke)).await.expect_err("wrong in both fields");
    assert_eq!(fields(&status), ["id", "reason"]);
    let grace = Some(WireDuration { seconds: -1, nanos: 0 });
    let regenerate = proto::RegenerateTokenRequest { id: "x".to_owned(), grace, request_id: "a b".to_owned(), ..Default::default() };
    let status = admin.tokens().regenerate_token(admin.request(regenerate)).await.expect_err("wrong in three fields");
    assert_eq!(fields(&status), ["grace", "id", "request_id"]);
    let named = proto::ListTokensRequest {
        principal: "a b".to_owned(),
        audience: "A".to_owned(),
        created_by: "ä".to_owned(),
        ..Default::default()
    };
    assert_eq!(fields(&admin.list(named).await.expect_err("wrong in three fields")), ["principal", "created_by", "audience"]);
    assert_eq!(admin.list(proto::ListTokensRequest::default()).await.expect("a list").tokens.len(), 2, "nothing was created");
}

async fn lifetimes_are_said_in_four_ways(world: World) {
    world.relax().await;
    let admin = world.admin().await;
    let day = i64::try_from(DAY.as_secs()).unwrap();
    let ends = async |kind: proto::TokenKind, lifetime: Option<Lifetime>| {
        let request = proto::CreateTokenRequest { lifetime, kind: kind.into(), ..new_token("t", &[]) };
        admin.create(request).await.map(|created| created.token.expect("a token").expire_time)
    };
    let ttl = |seconds| Some(Lifetime::Ttl(WireDuration { seconds, nanos: 0 }));
    let until = |seconds| Some(Lifetime::ExpireTime(Timestamp { seconds, nanos: 0 }));
    let permanent = proto::TokenKind::Permanent;
    let temporary = proto::TokenKind::Temporary;
    assert_eq!(ends(permanent, None).await.expect("created"), after(90 * DAY));
    assert_eq!(ends(temporary, None).await.expect("created"), after(DAY));
    assert_eq!(ends(permanent, ttl(7 * day)).await.expect("created"), after(7 * DAY));
    assert_eq!(ends(permanent, until(beginning() + 1)).await.expect("created"), after(Duration::from_secs(1)));
    assert_eq!(ends(permanent, Some(Lifetime::Never(true))).await.expect("created"), None);
    for (kind, lifetime) in [
        (permanent, ttl(0)),
        (permanent, ttl(-1)),
        (permanent, ttl(i64::MAX)),
        (permanent, until(beginning())),
        (permanent, until(i64::MAX)),
        (permanent, Some(Lifetime::Never(false))),
        (temporary, ttl(day + 1)),
        (temporary, Some(Lifetime::Never(true))),
    ] {
        let status = ends(kind, lifetime.clone()).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{kind:?} {lifetime:?}");
    }
}

async fn a_repeated_request_id_gets_the_first_answer(world: World) {
    let admin = world.admin().await;
    let request = proto::CreateTokenRequest { request_id: "b7e2".to_owned(), ..new_token("once", &["a:b"]) };
    let first = admin.create(request.clone()).await.expect("created");
    let second = admin.create(request.clone()).await.expect("answered again");
    assert_eq!((&first.secret, &first.token), (&second.secret, &second.token));
    let other = proto::CreateTokenRequest { display_name: "twice".to_owned(), ..request.clone() };
    assert_eq!(fields(&admin.create(other).await.expect_err("another request")), ["request_id"]);
    let root = world.root().await;
    assert_ne!(root.create(request.clone()).await.expect("somebody else's").secret, first.secret);
    let token = first.token.expect("a token");
    let regenerate = proto::RegenerateTokenRequest { id: token.id, request_id: "c8".to_owned(), ..Default::default() };
    let one = admin.tokens().regenerate_token(admin.request(regenerate.clone())).await.expect("done").into_inner();
    let two = admin.tokens().regenerate_token(admin.request(regenerate)).await.expect("answered again").into_inner();
    assert_eq!(one.secret, two.secret);
    let soon = proto::CreateTokenRequest {
        request_id: "soon-over".to_owned(),
        lifetime: Some(Lifetime::ExpireTime(Timestamp { seconds: beginning() + 2, nanos: 0 })),
        ..new_token("soon over", &[])
    };
    let first_of_soon = admin.create(soon.clone()).await.expect("created");
    world.advance(Duration::from_secs(3));
    assert_eq!(admin.create(soon).await.expect("answered, though too late to be made").secret, first_of_soon.secret);
    world.advance(Duration::from_mins(10));
    assert_ne!(admin.create(request).await.expect("a new one").secret, first.secret, "answers are kept for 10 minutes");
    assert_eq!(world.db_number("SELECT COUNT(*) FROM replay").await, 4, "what has expired is replaced");
}

async fn concurrent_calls_with_one_request_id_create_one_token(world: World) {
    let admin = world.admin().await;
    let request = proto::CreateTokenRequest { request_id: "same".to_owned(), ..new_token("once", &[]) };
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (admin, request) = (admin.clone(), request.clone());
        calls.spawn(async move { admin.create(request).await.expect("answered").secret });
    }
    let secrets: HashSet<String> = calls.join_all().await.into_iter().collect();
    assert_eq!(secrets.len(), 1);
    assert_eq!(world.db_number("SELECT COUNT(*) FROM token WHERE display_name = 'once'").await, 1);
}

async fn lists_page_through_every_token_once(world: World) {
    world.relax().await;
    let admin = world.admin().await;
    let mut expected: Vec<String> = Vec::new();
    for number in 0..25 {
        expected.push(admin.issue(&format!("token {}", number % 5), &[]).await.0.id);
        if number % 3 == 0 {
            world.advance(Duration::from_millis(1));
        }
    }
    for order in ["", "create_time", "display_name", "display_name desc", "expire_time", "expire_time desc"] {
        let mut seen = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = proto::ListTokensRequest {
                page_size: 7,
                page_token,
                order_by: order.to_owned(),
                query: "TOKEN ".to_owned(),
                ..Default::default()
            };
            let page = admin.list(request).await.expect("a page");
            assert!(page.tokens.len() <= 7);
            seen.extend(page.tokens.into_iter().filter(|token| token.created_by == "admin").map(|token| token.id));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(seen.len(), 25, "{order}");
        assert_eq!(seen.iter().collect::<HashSet<_>>(), expected.iter().collect(), "{order}");
    }
    let all = admin.list(proto::ListTokensRequest { page_size: 100_000, ..Default::default() }).await.expect("at most 1000");
    assert!(all.next_page_token.is_empty());
    // Tokens with all the settings that they may have: a page stays below what clients take.
    let metadata: std::collections::BTreeMap<_, _> = (0..32).map(|key| (format!("key {key}"), "€".repeat(256))).collect();
    for number in 0..140 {
        admin
            .create(proto::CreateTokenRequest { metadata: metadata.clone(), ..new_token(&format!("large {number}"), &[]) })
            .await
            .expect("created");
    }
    let (mut seen, mut pages, mut page_token) = (0, 0, String::new());
    loop {
        let request = proto::ListTokensRequest { page_size: 1000, page_token, query: "large".to_owned(), ..Default::default() };
        let page = admin.list(request).await.expect("a page that a client takes");
        (seen, pages, page_token) = (seen + page.tokens.len(), pages + 1, page.next_page_token);
        if page_token.is_empty() {
            break;
        }
    }
    assert!(seen == 140 && pages > 1, "{seen} tokens on {pages} pages");
}

async fn lists_filter_by_every_field(world: World) {
    let admin = world.admin().await;
    let request = proto::CreateTokenRequest {
        principal: "alice".to_owned(),
        audiences: vec!["billing".to_owned()],
        lifetime: Some(Lifetime::Ttl(WireDuration { seconds: 3600, nanos: 0 })),
        ..new_token("100% Alice_1", &[])
    };
    let (alice, alice_secret) =
        admin.create(request).await.map(|created| (created.token.expect("a token").id, created.secret)).expect("created");
    let (bob, _) = admin.issue("Bob\\", &[]).await;
    let session =
        proto::CreateTokenRequest { kind: proto::TokenKind::Temporary.into(), session_id: "s1".to_owned(), ..new_token("login", &[]) };
    let session = admin.create(session).await.expect("created").token.expect("a token").id;
    admin.deactivate(&bob.id).await.expect("done");
    let found = async |request: proto::ListTokensRequest| -> HashSet<String> {
        let page = admin.list(request).await.expect("a page");
        page.tokens.into_iter().filter(|token| token.created_by != "root").map(|token| token.id).collect()
    };
    let only = |id: &String| HashSet::from([id.clone()]);
    let list = proto::ListTokensRequest::default;
    assert_eq!(found(list()).await, HashSet::from([alice.clone(), bob.id.clone()]), "temporary ones only when asked for");
    assert_eq!(found(proto::ListTokensRequest { kind: proto::TokenKind::Temporary.into(), ..list() }).await, only(&session));
    assert_eq!(found(proto::ListTokensRequest { principal: "alice".to_owned(), ..list() }).await, only(&alice));
    assert_eq!(found(proto::ListTokensRequest { audience: "billing".to_owned(), ..list() }).await, only(&alice));
    assert!(found(proto::ListTokensRequest { created_by: "alice".to_owned(), ..list() }).await.is_empty());
    assert_eq!(found(proto::ListTokensRequest { expires_before: after(2 * HOUR), ..list() }).await, only(&alice));
    for (query, id) in [("alice_", &alice), ("100%", &alice), ("ALICE", &alice), ("bob\\", &bob.id)] {
        assert_eq!(found(proto::ListTokensRequest { query: query.to_owned(), ..list() }).await, only(id), "{query}");
    }
    for query in ["alice%", "a_ice", "%", "_"] {
        let everything = found(proto::ListTokensRequest { query: query.to_owned(), ..list() }).await;
        assert!(everything.is_subset(&only(&alice)), "{query} is no pattern");
    }
    let state = |state: proto::TokenState| proto::ListTokensRequest { states: vec![state.into()], ..list() };
    assert_eq!(found(state(proto::TokenState::Active)).await, only(&alice));
    assert_eq!(found(state(proto::TokenState::Inactive)).await, only(&bob.id));
    world.validator().await.use_token(&alice_secret).await;
    world.server();
    crate::world::eventually("the use is written", async || (admin.get(&alice).await.ok()?.use_count == 1).then_some(())).await;
    let unused = found(proto::ListTokensRequest { last_used_before: after(Duration::ZERO), ..list() }).await;
    assert_eq!(unused, only(&bob.id), "never used counts as used before");
    world.advance(HOUR);
    let used = found(proto::ListTokensRequest { last_used_before: after(HOUR), ..list() }).await;
    assert_eq!(used.len(), 2);
    assert_eq!(found(state(proto::TokenState::Expired)).await, only(&alice));
    assert!(found(state(proto::TokenState::Active)).await.is_empty());
    admin.revoke(&alice).await.expect("an expired token may be revoked");
    assert_eq!(found(state(proto::TokenState::Revoked)).await, only(&alice));
    let both = proto::ListTokensRequest { states: vec![proto::TokenState::Revoked.into(), proto::TokenState::Inactive.into()], ..list() };
    assert_eq!(found(both).await.len(), 2);
}

async fn lists_sort_both_ways(world: World) {
    world.relax().await;
    let admin = world.admin().await;
    for (name, hours) in [("b", 2), ("C", 3), ("a", 1), ("ä", 4)] {
        let lifetime = Some(Lifetime::Ttl(WireDuration { seconds: hours * 3600, nanos: 0 }));
        admin.create(proto::CreateTokenRequest { lifetime, principal: "p".to_owned(), ..new_token(name, &[]) }).await.expect("created");
        world.advance(Duration::from_secs(1));
    }
    let request = proto::CreateTokenRequest { lifetime: Some(Lifetime::Never(true)), principal: "p".to_owned(), ..new_token("never", &[]) };
    admin.create(request).await.expect("created");
    let names = async |order: &str| -> Vec<String> {
        let request = proto::ListTokensRequest { order_by: order.to_owned(), principal: "p".to_owned(), ..Default::default() };
        admin.list(request).await.expect("a page").tokens.into_iter().map(|token| token.display_name).collect()
    };
    assert_eq!(names("").await, ["never", "ä", "a", "C", "b"]);
    assert_eq!(names("create_time").await, ["b", "C", "a", "ä", "never"]);
    assert_eq!(names("display_name").await, ["C", "a", "b", "never", "ä"], "by bytes, the same on every database");
    assert_eq!(names("display_name desc").await, ["ä", "never", "b", "a", "C"]);
    assert_eq!(names("expire_time").await, ["a", "b", "C", "ä", "never"]);
    assert_eq!(names("expire_time desc").await, ["never", "ä", "C", "b", "a"]);
}

async fn page_tokens_are_bound_to_their_arguments(world: World) {
    let admin = world.admin().await;
    for number in 0..3 {
        admin.issue(&format!("t{number}"), &[]).await;
    }
    let first = admin.list(proto::ListTokensRequest { page_size: 1, ..Default::default() }).await.expect("a page").next_page_token;
    let with = |request: proto::ListTokensRequest| proto::ListTokensRequest { page_token: first.clone(), ..request };
    admin.list(with(proto::ListTokensRequest { page_size: 2, ..Default::default() })).await.expect("page_size may change");
    for request in [
        proto::ListTokensRequest { principal: "x".to_owned(), ..Default::default() },
        proto::ListTokensRequest { order_by: "display_name".to_owned(), ..Default::default() },
        proto::ListTokensRequest { query: "t".to_owned(), ..Default::default() },
        proto::ListTokensRequest { kind: 2, ..Default::default() },
    ] {
        assert_eq!(fields(&admin.list(with(request)).await.expect_err("other arguments")), ["page_token"]);
    }
    for index in 0..first.len() {
        let mut forged = first.clone().into_bytes();
        forged[index] = if forged[index] == b'A' { b'B' } else { b'A' };
        let page_token = String::from_utf8(forged).expect("ASCII");
        let status = admin.list(proto::ListTokensRequest { page_token, ..Default::default() }).await.expect_err("forged");
        assert_eq!(fields(&status), ["page_token"]);
    }
    world.add_workspace("other", "ot").await;
    let stranger = world.actor_in("other", "admin", &["keyward:admin"]).await;
    assert_eq!(fields(&stranger.list(with(proto::ListTokensRequest::default())).await.expect_err("another workspace")), ["page_token"]);
}

async fn an_update_changes_what_the_mask_names_and_nothing_else(world: World) {
    world.relax().await;
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, secret) = admin.issue("before", &["a:b"]).await;
    world.advance(Duration::from_secs(1));
    let wish = proto::Token {
        id: token.id.clone(),
        display_name: "after".to_owned(),
        scopes: vec!["c:d".to_owned()],
        audiences: vec!["billing".to_owned()],
        allowed_cidrs: vec!["10.0.0.0/8".to_owned()],
        metadata: [("k".to_owned(), "v".to_owned())].into(),
        expire_time: None,
        state: proto::TokenState::Revoked.into(),
        ..Default::default()
    };
    let renamed = admin.update(wish.clone(), &["display_name"]).await.expect("done");
    assert_eq!(renamed.display_name, "after");
    assert_eq!((&renamed.scopes, &renamed.audiences, renamed.expire_time), (&token.scopes, &token.audiences, token.expire_time));
    assert_ne!(renamed.etag, token.etag);
    assert_eq!(seconds(renamed.update_time.as_ref()), beginning() + 1);
    let all = ["scopes", "audiences", "allowed_cidrs", "metadata", "expire_time"];
    let changed = admin.update(wish.clone(), &all).await.expect("done");
    assert_eq!((&changed.scopes, &changed.audiences, &changed.allowed_cidrs), (&wish.scopes, &wish.audiences, &wish.allowed_cidrs));
    assert_eq!((&changed.metadata, changed.expire_time), (&wish.metadata, None));
    assert_eq!(changed.state(), proto::TokenState::Active);
    let need = proto::ValidateTokenRequest {
        token: secret,
        required_scopes: vec!["c:d".to_owned()],
        audience: "billing".to_owned(),
        client_ip: "10.1.1.1".to_owned(),
        ..Default::default()
    };
    assert_eq!(validator.ask(need).await.expect("an answer").verdict(), Verdict::Valid);
    let cleared =
        admin.update(proto::Token { id: token.id.clone(), ..Default::default() }, &["audiences", "metadata"]).await.expect("done");
    assert!(cleared.audiences.is_empty() && cleared.metadata.is_empty());
    let unknown = admin.update(wish.clone(), &["state", "use_count", "display_name"]).await.expect_err("not to be changed");
    assert_eq!(fields(&unknown), ["update_mask.paths[0]", "update_mask.paths[1]"]);
    let empty = admin.update(wish.clone(), &[]).await.expect_err("nothing named");
    assert_eq!(fields(&empty), ["update_mask"]);
    let bad =
        admin.update(proto::Token { display_name: String::new(), scopes: vec!["x".to_owned()], ..wish }, &["display_name", "scopes"]).await;
    assert_eq!(fields(&bad.expect_err("two wrong fields")), ["token.display_name", "token.scopes[0]"]);
    let same = admin.update(cleared.clone(), &["display_name"]).await.expect("nothing to change");
    assert_eq!(same.etag, cleared.etag, "what changes nothing is no change");
}

async fn a_stale_etag_changes_nothing(world: World) {
    let admin = world.admin().await;
    let (token, _) = admin.issue("t", &[]).await;
    admin.update(proto::Token { display_name: "u".to_owned(), ..token.clone() }, &["display_name"]).await.expect("the etag is current");
    let stale = admin.update(proto::Token { display_name: "v".to_owned(), ..token.clone() }, &["display_name"]).await.expect_err("stale");
    assert_eq!(stale.code(), Code::Aborted);
    assert_eq!(stale.get_details_error_info().expect("ErrorInfo").reason, "ETAG_MISMATCH");
    let (id, etag) = (token.id.clone(), token.etag.clone());
    let mut tokens = admin.tokens();
    let revoke = proto::RevokeTokenRequest { id: id.clone(), etag: etag.clone(), ..Default::default() };
    assert_eq!(tokens.revoke_token(admin.request(revoke)).await.expect_err("stale").code(), Code::Aborted);
    let delete = proto::DeleteTokenRequest { id: id.clone(), etag: etag.clone() };
    assert_eq!(tokens.delete_token(admin.request(delete)).await.expect_err("stale").code(), Code::Aborted);
    let regenerate = proto::RegenerateTokenRequest { id: id.clone(), etag, ..Default::default() };
    assert_eq!(tokens.regenerate_token(admin.request(regenerate)).await.expect_err("stale").code(), Code::Aborted);
    let now = admin.get(&id).await.expect("found");
    assert_eq!((now.display_name.as_str(), now.state()), ("u", proto::TokenState::Active));
}

async fn revoking_is_for_good(world: World) {
    let admin = world.admin().await;
    let (token, _) = admin.issue("t", &[]).await;
    let revoked = admin.revoke(&token.id).await.expect("done");
    assert_eq!((revoked.state(), revoked.revoke_reason.as_str()), (proto::TokenState::Revoked, "test"));
    world.advance(HOUR);
    let message = proto::RevokeTokenRequest { id: token.id.clone(), reason: "again".to_owned(), ..Default::default() };
    let again = admin.tokens().revoke_token(admin.request(message)).await.expect("nothing to do").into_inner().token.expect("a token");
    assert_eq!(again, revoked, "the first reason and time stand");
    let illegal = |outcome: Result<proto::Token, tonic::Status>| {
        let status = outcome.expect_err("revoked");
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "ILLEGAL_STATE");
    };
    illegal(admin.activate(&token.id).await);
    illegal(admin.deactivate(&token.id).await);
    illegal(admin.update(proto::Token { id: token.id.clone(), ..Default::default() }, &["metadata"]).await);
    illegal(admin.regenerate(&token.id, 0).await.map(|done| done.token.expect("a token")));
}

async fn an_expired_token_is_not_brought_back(world: World) {
    let admin = world.admin().await;
    let lifetime = Some(Lifetime::Ttl(WireDuration { seconds: 3600, nanos: 0 }));
    let token = admin.create(proto::CreateTokenRequest { lifetime, ..new_token("t", &[]) }).await.expect("created").token.expect("a token");
    world.advance(HOUR);
    assert_eq!(admin.get(&token.id).await.expect("still listed").state(), proto::TokenState::Expired);
    assert_eq!(admin.activate(&token.id).await.expect_err("expired").code(), Code::FailedPrecondition);
    assert_eq!(admin.regenerate(&token.id, 0).await.expect_err("expired").code(), Code::FailedPrecondition);
    let prolonged = proto::Token { id: token.id.clone(), expire_time: after(2 * DAY), ..Default::default() };
    assert_eq!(admin.update(prolonged, &["expire_time"]).await.expect_err("expired").code(), Code::FailedPrecondition);
    let (other, _) = admin.issue("u", &[]).await;
    let past = proto::Token { id: other.id, expire_time: after(Duration::ZERO), ..Default::default() };
    assert_eq!(fields(&admin.update(past, &["expire_time"]).await.expect_err("in the past")), ["token.expire_time"]);
}

async fn regenerating_keeps_everything_but_the_secret(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let request = proto::CreateTokenRequest { audiences: vec!["billing".to_owned()], ..new_token("t", &["a:b"]) };
    let created = admin.create(request).await.expect("created");
    let before = created.token.expect("a token");
    assert_eq!(validator.verdict(&created.secret).await, Verdict::Valid);
    world.advance(HOUR);
    let done = admin.regenerate(&before.id, 0).await.expect("done");
    let after = done.token.expect("a token");
    assert_ne!(done.secret, created.secret);
    assert_eq!(validator.verdict(&created.secret).await, Verdict::Unknown);
    assert_eq!(validator.verdict(&done.secret).await, Verdict::Valid);
    assert_eq!(done.grace_time, None);
    let unchanged = proto::Token { hint: before.hint.clone(), etag: before.etag.clone(), update_time: before.update_time, ..after.clone() };
    assert_eq!(unchanged, before);
    assert_eq!(after.hint, done.secret[..8]);
}

async fn grace_lets_the_old_secret_live_on(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, first) = admin.issue("t", &[]).await;
    let second = admin.regenerate(&token.id, 3600).await.expect("done");
    assert_eq!(second.grace_time, after(HOUR));
    assert_eq!(validator.verdict(&first).await, Verdict::Valid);
    assert_eq!(validator.verdict(&second.secret).await, Verdict::Valid);
    let ends = async |secret: &str| {
        let question = proto::ValidateTokenRequest { token: secret.to_owned(), peek: true, ..Default::default() };
        validator.ask(question).await.expect("an answer").expire_time
    };
    assert_eq!((ends(&first).await, ends(&second.secret).await), (second.grace_time, token.expire_time), "as long as each of them is good");
    let third = admin.regenerate(&token.id, 3600).await.expect("done");
    assert_eq!(validator.verdict(&first).await, Verdict::Unknown, "a second regeneration ends the first grace");
    assert_eq!(validator.verdict(&second.secret).await, Verdict::Valid);
    world.advance(HOUR - Duration::from_micros(1));
    assert_eq!(validator.verdict(&second.secret).await, Verdict::Valid);
    world.advance(Duration::from_micros(1));
    assert_eq!(validator.verdict(&second.secret).await, Verdict::Unknown, "the grace is over");
    assert_eq!(validator.verdict(&third.secret).await, Verdict::Valid);
    let fourth = admin.regenerate(&token.id, 3600).await.expect("done");
    admin.revoke(&token.id).await.expect("done");
    for secret in [&third.secret, &fourth.secret] {
        assert_eq!(validator.verdict(secret).await, Verdict::Revoked, "both secrets are the same token");
    }
    let (token, _) = admin.issue("u", &[]).await;
    assert_eq!(fields(&admin.regenerate(&token.id, 7 * 86_400 + 1).await.expect_err("too long")), ["grace"]);
    assert_eq!(fields(&admin.regenerate(&token.id, -1).await.expect_err("negative")), ["grace"]);
}

async fn grace_never_outlives_the_token(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let lifetime = Some(Lifetime::Ttl(WireDuration { seconds: 60, nanos: 0 }));
    let created = admin.create(proto::CreateTokenRequest { lifetime, ..new_token("t", &[]) }).await.expect("created");
    let done = admin.regenerate(&created.token.expect("a token").id, 3600).await.expect("done");
    assert_eq!(done.grace_time, after(Duration::from_mins(1)));
    world.advance(Duration::from_mins(1));
    assert_eq!(validator.verdict(&created.secret).await, Verdict::Unknown);
    assert_eq!(validator.verdict(&done.secret).await, Verdict::Expired);
}

async fn a_deleted_token_is_gone(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let request = proto::CreateTokenRequest { audiences: vec!["billing".to_owned()], ..new_token("t", &[]) };
    let created = admin.create(request).await.expect("created");
    let id = created.token.expect("a token").id;
    assert_eq!(validator.verdict(&created.secret).await, Verdict::Valid);
    admin.delete(&id).await.expect("done");
    assert_eq!(validator.verdict(&created.secret).await, Verdict::Unknown);
    for status in [
        admin.get(&id).await.expect_err("gone"),
        admin.revoke(&id).await.expect_err("gone"),
        admin.delete(&id).await.expect_err("gone"),
        admin.activate(&id).await.expect_err("gone"),
        admin.regenerate(&id, 0).await.expect_err("gone"),
    ] {
        assert_eq!(status.code(), Code::NotFound);
    }
    for request in [proto::ListTokensRequest::default(), proto::ListTokensRequest { audience: "billing".to_owned(), ..Default::default() }]
    {
        assert!(admin.list(request).await.expect("a page").tokens.iter().all(|token| token.id != id));
    }
}

async fn revoking_a_principal_ends_every_live_token(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let of = |principal: &str, name: &str| proto::CreateTokenRequest { principal: principal.to_owned(), ..new_token(name, &[]) };
    let mut secrets = Vec::new();
    for number in 0..5 {
        secrets.push(admin.create(of("alice", &format!("t{number}"))).await.expect("created"));
    }
    let temporary = proto::CreateTokenRequest { kind: 2, ..of("alice", "session") };
    secrets.push(admin.create(temporary).await.expect("created"));
    let bob = admin.create(of("bob", "t")).await.expect("created");
    for created in &secrets {
        assert_eq!(validator.verdict(&created.secret).await, Verdict::Valid);
    }
    admin.deactivate(&secrets[0].token.as_ref().expect("a token").id).await.expect("done");
    admin.revoke(&secrets[1].token.as_ref().expect("a token").id).await.expect("done");
    assert_eq!(admin.revoke_principal("alice").await.expect("done"), 5);
    for created in &secrets {
        assert_eq!(validator.verdict(&created.secret).await, Verdict::Revoked);
    }
    assert_eq!(validator.verdict(&bob.secret).await, Verdict::Valid);
    assert_eq!(admin.revoke_principal("alice").await.expect("nothing left"), 0);
    assert_eq!(admin.revoke_principal("nobody").await.expect("nothing there"), 0);
    assert_eq!(fields(&admin.revoke_principal("").await.expect_err("whose?")), ["principal"]);
}

async fn tokens_that_come_while_their_principal_is_revoked_are_whole(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut creators = tokio::task::JoinSet::new();
    for creator in 0..4 {
        let (admin, validator) = (admin.clone(), validator.clone());
        creators.spawn(async move {
            let mut created = Vec::new();
            for number in 0..25 {
                let request = proto::CreateTokenRequest { principal: "alice".to_owned(), ..new_token(&format!("{creator} {number}"), &[]) };
                let answer = admin.create(request).await.expect("created");
                validator.verdict(&answer.secret).await;
                created.push((answer.token.expect("a token").id, answer.secret));
            }
            created
        });
    }
    let mut revoked = 0;
    while !creators.is_empty() && revoked < 100 {
        revoked += admin.revoke_principal("alice").await.expect("done");
        if creators.try_join_next().is_some() {
            break;
        }
    }
    // What one pass has ended and what it has not: store and validator agree, and each end has its audit row.
    let rows = "SELECT COUNT(*) FROM audit_event WHERE method = 'RevokePrincipalTokens'";
    let stored = "SELECT COUNT(*) FROM token WHERE principal = 'alice' AND state = 3";
    for created in creators.join_all().await {
        for (id, secret) in created {
            let ended = admin.get(&id).await.expect("found").state() == proto::TokenState::Revoked;
            assert_eq!(validator.verdict(&secret).await == Verdict::Revoked, ended, "{id}");
        }
    }
    assert_eq!(world.db_number(rows).await, world.db_number(stored).await);
    assert_eq!(world.db_number(rows).await, i64::from(revoked));
}

async fn an_administrator_cannot_take_over_a_root_token(world: World) {
    let (admin, root) = (world.admin().await, world.root().await);
    let id = root.own().who_am_i(root.request(proto::WhoAmIRequest {})).await.expect("known").into_inner().token.expect("a token").id;
    let denied = |status: tonic::Status| assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    denied(admin.regenerate(&id, 0).await.expect_err("that would be the root's secret"));
    denied(admin.revoke(&id).await.expect_err("holds more"));
    denied(admin.delete(&id).await.expect_err("holds more"));
    denied(admin.deactivate(&id).await.expect_err("holds more"));
    denied(admin.update(proto::Token { id: id.clone(), ..Default::default() }, &["scopes"]).await.expect_err("holds more"));
    denied(admin.revoke_principal("root").await.expect_err("holds more"));
    admin.get(&id).await.expect("it may be seen");
    root.own().who_am_i(root.request(proto::WhoAmIRequest {})).await.expect("still good");
}

async fn nobody_grants_what_they_do_not_hold(world: World) {
    let (admin, root) = (world.admin().await, world.root().await);
    let (token, _) = admin.issue("t", &["a:b"]).await;
    for scope in ["keyward:root", "keyward:validate-any"] {
        assert_eq!(admin.create(new_token("t", &[scope])).await.expect_err("not held").code(), Code::PermissionDenied, "{scope}");
        let raised = proto::Token { id: token.id.clone(), scopes: vec![scope.to_owned()], ..Default::default() };
        assert_eq!(admin.update(raised, &["scopes"]).await.expect_err("not held").code(), Code::PermissionDenied, "{scope}");
        root.create(new_token("t", &[scope])).await.expect("root holds everything");
    }
    for scope in ["keyward:admin", "keyward:self", "keyward:validate", "*"] {
        admin.create(new_token("t", &[scope])).await.expect("an administrator holds everything in its workspace");
    }
    assert_eq!(admin.get(&token.id).await.expect("found").scopes, ["a:b"]);
}

async fn tokens_of_another_workspace_are_not_found(world: World) {
    world.add_workspace("other", "ot").await;
    let (ours, theirs) = (world.admin().await, world.actor_in("other", "admin", &["keyward:admin"]).await);
    let (token, secret) = theirs.issue("theirs", &[]).await;
    assert!(secret.starts_with("ot_"), "the brand of the workspace");
    let audit_rows = world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await;
    let missing = "tok_0000000000000000000000";
    for id in [token.id.as_str(), missing] {
        let outcomes = [
            ours.get(id).await.map(drop),
            ours.update(proto::Token { id: id.to_owned(), ..Default::default() }, &["metadata"]).await.map(drop),
            ours.activate(id).await.map(drop),
            ours.deactivate(id).await.map(drop),
            ours.revoke(id).await.map(drop),
            ours.regenerate(id, 0).await.map(drop),
            ours.delete(id).await,
            ours.create(proto::CreateTokenRequest { workspace: "other".to_owned(), ..new_token("t", &[]) }).await.map(drop),
            ours.list(proto::ListTokensRequest { workspace: "other".to_owned(), ..Default::default() }).await.map(drop),
        ];
        for outcome in outcomes {
            let status = outcome.expect_err("another workspace");
            assert_eq!(status.code(), Code::NotFound, "{status:?}");
        }
    }
    assert_eq!(theirs.get(&token.id).await.expect("untouched"), token);
    assert_eq!(world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await, audit_rows, "nothing happened");
    assert!(ours.list(proto::ListTokensRequest::default()).await.expect("a page").tokens.iter().all(|token| token.workspace == "default"));
    assert_eq!(world.validator().await.verdict(&secret).await, Verdict::Unknown);
    let root = world.root().await;
    assert_eq!(root.get(&token.id).await.expect("root sees everything").workspace, "other");
    let nowhere = proto::CreateTokenRequest { workspace: "nowhere".to_owned(), ..new_token("t", &[]) };
    assert_eq!(root.create(nowhere).await.expect_err("no such workspace").code(), Code::NotFound);
    let nowhere = proto::ListTokensRequest { workspace: "nowhere".to_owned(), ..Default::default() };
    assert_eq!(root.list(nowhere).await.expect_err("no such workspace").code(), Code::NotFound);
}

async fn every_change_leaves_its_audit_row(world: World) {
    let admin = world.admin().await;
    let (token, _) = admin.issue("t", &[]).await;
    let id = &token.id;
    admin
        .update(proto::Token { id: id.clone(), display_name: "u".to_owned(), ..Default::default() }, &["display_name"])
        .await
        .expect("done");
    admin.deactivate(id).await.expect("done");
    admin.activate(id).await.expect("done");
    admin.regenerate(id, 60).await.expect("done");
    admin.revoke(id).await.expect("done");
    admin.revoke(id).await.expect("nothing to do");
    admin.delete(id).await.expect("done");
    let methods = ["CreateToken", "UpdateToken", "DeactivateToken", "ActivateToken", "RegenerateToken", "RevokeToken", "DeleteToken"];
    for method in methods {
        let rows = format!(
            "SELECT COUNT(*) FROM audit_event WHERE token_id = '{id}' AND method = '{method}' AND actor_principal = 'admin' AND actor_token_id IS NOT NULL \
             AND actor_address = '127.0.0.1' AND workspace = 'default'"
        );
        assert_eq!(world.db_number(&rows).await, 1, "{method}");
    }
    assert_eq!(world.db_number(&format!("SELECT COUNT(*) FROM audit_event WHERE token_id = '{id}'")).await, 7);
    let named = format!(
        "SELECT COUNT(*) FROM audit_event WHERE token_id = '{id}' AND method = 'RevokeToken' AND reason = 'test' AND after LIKE '%REVOKED%'"
    );
    assert_eq!(world.db_number(&named).await, 1);
}

async fn numbers_come_in_the_order_of_commits(world: World) {
    let admin = world.admin().await;
    let before = world.db_number("SELECT seq FROM change_head").await;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..20 {
        let (token, _) = admin.issue(&format!("t{number}"), &[]).await;
        let admin = admin.clone();
        calls.spawn(async move { admin.revoke(&token.id).await.expect("done") });
    }
    calls.join_all().await;
    assert_eq!(world.db_number("SELECT seq FROM change_head").await, before + 20, "creating takes no number");
    let gaps = format!("SELECT COUNT(DISTINCT seq) FROM change_log WHERE seq > {before} AND seq <= {}", before + 20);
    assert_eq!(world.db_number(&gaps).await, 20, "one number for each change, none left out");
}

async fn a_fault_at_any_statement_leaves_no_half_change(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    for (table, event) in [
        ("change_head", "UPDATE"),
        ("token", "UPDATE"),
        ("token_audience", "DELETE"),
        ("token_audience", "INSERT"),
        ("audit_event", "INSERT"),
        ("change_log", "INSERT"),
        ("replay", "UPDATE"),
    ] {
        let created =
            admin.create(proto::CreateTokenRequest { audiences: vec!["a".to_owned()], ..new_token("t", &[]) }).await.expect("created");
        let (token, secret) = (created.token.expect("a token"), created.secret);
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        let rows = world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await;
        world.db_execute(&fault(world.backend, table, event)).await;
        let wish = proto::Token { id: token.id.clone(), audiences: vec!["b".to_owned()], ..Default::default() };
        let request_id = format!("{table}-{event}");
        let regenerate = proto::RegenerateTokenRequest { id: token.id.clone(), request_id, ..Default::default() };
        let mut outcomes = vec![("update", admin.update(wish, &["audiences"]).await.map(drop))];
        outcomes.push(("regenerate", admin.tokens().regenerate_token(admin.request(regenerate)).await.map(drop)));
        if table != "token_audience" && table != "replay" {
            outcomes.push(("revoke", admin.revoke(&token.id).await.map(drop)));
        }
        world.db_execute(&heal(world.backend, table)).await;
        let failed = outcomes.iter().filter(|(_, outcome)| outcome.is_err()).count();
        assert!(failed > 0, "{table} {event} stopped nothing");
        for (name, outcome) in &outcomes {
            if let Err(status) = outcome {
                assert!(matches!(status.code(), Code::Internal | Code::Unavailable), "{name} at {table}: {status:?}");
            }
        }
        let written = world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await - rows;
        assert_eq!(
            usize::try_from(written).unwrap(),
            outcomes.len() - failed,
            "{table} {event}: an audit row for each change that was made, and no other"
        );
        let now = admin.get(&token.id).await.expect("found");
        assert_eq!(now.etag, format!("v{}", 1 + written), "{table} {event}");
        if outcomes.iter().all(|(_, outcome)| outcome.is_err()) {
            assert_eq!((now, validator.verdict(&secret).await), (token, Verdict::Valid));
        }
    }
}

/// Makes every write to a table fail.
fn fault(backend: crate::world::Backend, table: &str, event: &str) -> String {
    match backend {
        crate::world::Backend::Sqlite => format!("CREATE TRIGGER fault BEFORE {event} ON {table} BEGIN SELECT RAISE(ABORT, 'fault'); END"),
        crate::world::Backend::Postgres => format!(
            "CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'fault'; END $$; \
             CREATE TRIGGER fault BEFORE {event} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION fault()"
        ),
    }
}

fn heal(backend: crate::world::Backend, table: &str) -> String {
    match backend {
        crate::world::Backend::Sqlite => "DROP TRIGGER fault".to_owned(),
        crate::world::Backend::Postgres => format!("DROP TRIGGER fault ON {table}"),
    }
}

async fn a_cancelled_change_is_whole(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    for round in 0..30_u64 {
        let (token, secret) = admin.issue(&format!("t{round}"), &[]).await;
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        let message = proto::RevokeTokenRequest { id: token.id.clone(), ..Default::default() };
        let mut tokens = admin.tokens();
        // The caller goes away at a moment of its own: before, during or after the commit.
        let _gone = tokio::time::timeout(Duration::from_micros(150 * round), tokens.revoke_token(admin.request(message))).await;
        let rows = format!("SELECT COUNT(*) FROM audit_event WHERE token_id = '{}' AND method = 'RevokeToken'", token.id);
        crate::world::eventually("store, audit and validator say the same", async || {
            let written = world.db_number(&rows).await == 1;
            let stored = admin.get(&token.id).await.expect("found").state() == proto::TokenState::Revoked;
            let judged = validator.verdict(&secret).await == Verdict::Revoked;
            // And it is known again: nothing that was left half done keeps it from memory.
            let queries = world.queries("facts").await;
            let again = validator.verdict(&secret).await == Verdict::Revoked;
            let known = world.queries("facts").await == queries;
            (written == stored && stored == judged && judged == again && known).then_some(())
        })
        .await;
    }
}

async fn tokens_survive_a_restart(mut world: World) {
    let (token, secret) = world.admin().await.issue("t", &["a:b"]).await;
    world.restart().await;
    assert_eq!(world.root().await.get(&token.id).await.expect("found"), token);
    assert_eq!(world.validator().await.verdict(&secret).await, Verdict::Valid);
}
