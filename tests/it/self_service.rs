//! What the bearer of a token asks and does about themselves.

use std::time::Duration;

use keyward::proto::{self, Verdict};
use tonic::Code;

use crate::world::{World, new_token};

crate::on_both_databases!(
    anybody_known_may_ask_who_they_are,
    members_see_their_own_tokens_only,
    members_renew_their_own_token,
    a_lost_answer_is_asked_for_again_within_the_grace,
    whoever_holds_a_token_may_end_it,
    a_caller_is_judged_anew_for_each_call,
);

async fn anybody_known_may_ask_who_they_are(world: World) {
    let nobody_much = world.actor("alice", &["agents:list"]).await;
    let me = nobody_much.own().who_am_i(nobody_much.request(proto::WhoAmIRequest {})).await.expect("known").into_inner();
    assert_eq!((me.workspace.as_str(), me.principal.as_str(), me.scopes), ("default", "alice", vec!["agents:list".to_owned()]));
    assert_eq!(me.token.expect("a token").display_name, "token of alice");
    let stranger = world.stranger().await;
    let status = stranger.own().who_am_i(stranger.request(proto::WhoAmIRequest {})).await.expect_err("unknown");
    assert_eq!(status.code(), Code::Unauthenticated);
}

async fn members_see_their_own_tokens_only(world: World) {
    let (alice, admin) = (world.member("alice").await, world.admin().await);
    world.member("bob").await;
    for number in 0..3 {
        let request = proto::CreateTokenRequest { principal: "alice".to_owned(), ..new_token(&format!("t{number}"), &[]) };
        admin.create(request).await.expect("created");
    }
    let mut own = alice.own();
    let mut names = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = proto::ListMyTokensRequest { page_size: 2, page_token, ..Default::default() };
        let page = own.list_my_tokens(alice.request(request)).await.expect("a page").into_inner();
        assert!(page.tokens.iter().all(|token| token.principal == "alice"));
        names.extend(page.tokens.into_iter().map(|token| token.display_name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    names.sort();
    assert_eq!(names, ["t0", "t1", "t2", "token of alice"]);
    let others = alice.list(proto::ListTokensRequest::default()).await.expect_err("not for members");
    assert_eq!(others.code(), Code::PermissionDenied);
}

async fn members_renew_their_own_token(world: World) {
    let (alice, validator) = (world.member("alice").await, world.validator().await);
    let old = alice.token.clone().expect("a token");
    let request = proto::RegenerateSelfRequest::default();
    let done = alice.own().regenerate_self(alice.request(request)).await.expect("done").into_inner();
    assert_eq!(validator.verdict(&old).await, Verdict::Unknown);
    assert_eq!(validator.verdict(&done.secret).await, Verdict::Valid);
    let weak = world.actor("bob", &["agents:list"]).await;
    let status = weak.own().regenerate_self(weak.request(proto::RegenerateSelfRequest::default())).await.expect_err("needs keyward:self");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(validator.verdict(weak.token.as_deref().expect("a token")).await, Verdict::Valid);
}

async fn a_lost_answer_is_asked_for_again_within_the_grace(world: World) {
    let alice = world.member("alice").await;
    let grace = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let request = proto::RegenerateSelfRequest { grace, request_id: "r1".to_owned() };
    let first = alice.own().regenerate_self(alice.request(request.clone())).await.expect("done").into_inner();
    let again = alice.own().regenerate_self(alice.request(request.clone())).await.expect("answered again").into_inner();
    assert_eq!((&first.secret, first.grace_time), (&again.secret, again.grace_time));
    world.advance(Duration::from_mins(1));
    let late = alice.own().regenerate_self(alice.request(request)).await.expect_err("the old secret is dead");
    assert_eq!(late.code(), Code::Unauthenticated);
}

async fn whoever_holds_a_token_may_end_it(world: World) {
    let (holder, validator) = (world.actor("alice", &[]).await, world.validator().await);
    let secret = holder.token.clone().expect("a token");
    let request = proto::RevokeSelfRequest { reason: "laptop stolen".to_owned() };
    let token = holder.own().revoke_self(holder.request(request)).await.expect("done").into_inner().token.expect("a token");
    assert_eq!((token.state(), token.revoke_reason.as_str()), (proto::TokenState::Revoked, "laptop stolen"));
    assert_eq!(validator.verdict(&secret).await, Verdict::Revoked);
    let root = world.actor("root", &["keyward:root"]).await;
    root.own().revoke_self(root.request(proto::RevokeSelfRequest::default())).await.expect("also of a root token");
}

async fn a_caller_is_judged_anew_for_each_call(world: World) {
    let (admin, root) = (world.admin().await, world.root().await);
    admin.issue("t", &[]).await;
    let id = admin.own().who_am_i(admin.request(proto::WhoAmIRequest {})).await.expect("known").into_inner().token.expect("a token").id;
    root.deactivate(&id).await.expect("done");
    assert_eq!(admin.create(new_token("t", &[])).await.expect_err("switched off").code(), Code::Unauthenticated);
    root.activate(&id).await.expect("done");
    admin.issue("t", &[]).await;
    root.update(proto::Token { id: id.clone(), scopes: vec!["keyward:self".to_owned()], ..Default::default() }, &["scopes"])
        .await
        .expect("done");
    assert_eq!(admin.create(new_token("t", &[])).await.expect_err("no administrator any more").code(), Code::PermissionDenied);
    root.update(proto::Token { id, allowed_cidrs: vec!["10.0.0.0/8".to_owned()], ..Default::default() }, &["allowed_cidrs"])
        .await
        .expect("done");
    let status = admin.own().who_am_i(admin.request(proto::WhoAmIRequest {})).await.expect_err("not from here");
    assert_eq!(status.code(), Code::Unauthenticated);
}
