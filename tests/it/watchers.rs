//! `WatchInvalidations`: callers who keep answers of their own hear which of them are out of date.

use std::time::{Duration, Instant};

use keyward::proto::{self, Verdict, invalidation::Subject};
use tonic::{Code, Status, Streaming, transport::Endpoint};

use crate::{
    fence::LOOK_AT_THE_LOG,
    proxy::Proxy,
    world::{self, Actor, BEGINNING, Backend, World, eventually, new_token, run},
};

crate::on_both_databases!(
    what_has_changed_is_told_and_can_be_resumed,
    a_watcher_hears_of_its_own_workspace_only,
    a_watcher_who_was_revoked_is_told_nothing_more,
    a_watcher_whose_rights_were_narrowed_is_told_nothing_more,
    a_position_that_is_not_known_any_more_is_refused,
    a_watcher_who_does_not_read_is_let_go,
);

type Told = proto::WatchInvalidationsResponse;

async fn watch(actor: &Actor, after: Option<proto::WatchPosition>) -> Result<Streaming<Told>, Status> {
    let request = actor.request(proto::WatchInvalidationsRequest { after });
    actor.validation().watch_invalidations(request).await.map(tonic::Response::into_inner)
}

/// The next message that tells of something.
async fn next(stream: &mut Streaming<Told>) -> Told {
    loop {
        let told = stream.message().await.expect("no error").expect("no end");
        assert!(told.position.is_some());
        if !told.invalidations.is_empty() {
            return told;
        }
    }
}

fn token(workspace: &str, id: &str) -> proto::Invalidation {
    proto::Invalidation { workspace: workspace.to_owned(), subject: Some(Subject::TokenId(id.to_owned())) }
}

async fn what_has_changed_is_told_and_can_be_resumed(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (one, secret) = admin.issue("one", &[]).await;
    let (other, _) = admin.issue("other", &[]).await;
    assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
    let mut stream = watch(&validator, None).await.expect("it opens");
    let first = stream.message().await.expect("no error").expect("a message");
    assert!(first.invalidations.is_empty() && first.as_of_time.is_some(), "{first:?}");
    let begin = Instant::now();
    admin.revoke(&one.id).await.expect("revoked");
    let told = next(&mut stream).await;
    println!("told after {:?}", begin.elapsed());
    assert_eq!(told.invalidations, [token("default", &one.id)]);
    let suspend = proto::SuspendPrincipalRequest { id: "gone".to_owned(), ..Default::default() };
    admin.create(proto::CreateTokenRequest { principal: "gone".to_owned(), ..new_token("of somebody", &[]) }).await.expect("created");
    admin.principals().suspend_principal(admin.request(suspend)).await.expect("suspended");
    let principal = Some(Subject::Principal("gone".to_owned()));
    assert_eq!(next(&mut stream).await.invalidations, [proto::Invalidation { workspace: "default".to_owned(), subject: principal }]);
    world.relax().await;
    let told = next(&mut stream).await;
    assert_eq!(told.invalidations, [proto::Invalidation { workspace: "default".to_owned(), subject: None }]);
    // Without a word from anybody a message comes all the same.
    let heartbeat = stream.message().await.expect("no error").expect("a message");
    assert!(heartbeat.invalidations.is_empty() && heartbeat.position == told.position && heartbeat.as_of_time.is_some());
    drop(stream);
    admin.deactivate(&other.id).await.expect("off");
    admin.activate(&other.id).await.expect("on");
    let mut stream = watch(&validator, told.position).await.expect("it opens");
    let mut missed = next(&mut stream).await.invalidations;
    if missed.len() < 2 {
        missed.extend(next(&mut stream).await.invalidations);
    }
    assert_eq!(missed, [token("default", &other.id), token("default", &other.id)]);
    // As after a restart, when nothing is in memory: the log says it.
    let mut again = watch(&validator, first.position).await.expect("it opens");
    assert_eq!(next(&mut again).await.invalidations[0], token("default", &one.id));
}

async fn a_watcher_hears_of_its_own_workspace_only(world: World) {
    world.add_workspace("other", "oth").await;
    let root = world.root().await;
    let ours = world.validator().await;
    let all = world.actor("everywhere", &["keyward:validate-any"]).await;
    let make = async |workspace: &str| {
        let request = proto::CreateTokenRequest { workspace: workspace.to_owned(), ..new_token("t", &[]) };
        root.create(request).await.expect("created").token.expect("a token").id
    };
    let (own, foreign) = (make("default").await, make("other").await);
    let (mut ours, mut all) = (watch(&ours, None).await.expect("it opens"), watch(&all, None).await.expect("it opens"));
    for stream in [&mut ours, &mut all] {
        stream.message().await.expect("no error").expect("a message");
    }
    root.revoke(&foreign).await.expect("revoked");
    root.revoke(&own).await.expect("revoked");
    assert_eq!(next(&mut ours).await.invalidations, [token("default", &own)]);
    let mut told = next(&mut all).await.invalidations;
    if told.len() < 2 {
        told.extend(next(&mut all).await.invalidations);
    }
    assert_eq!(told, [token("other", &foreign), token("default", &own)]);
    let refused = watch(&world.member("nobody").await, None).await.expect_err("no right");
    assert_eq!(refused.code(), Code::PermissionDenied);
}

async fn a_watcher_who_was_revoked_is_told_nothing_more(world: World) {
    let root = world.root().await;
    let (token, secret) = root.issue("gateway", &["keyward:validate"]).await;
    let (other, _) = root.issue("other", &[]).await;
    let watcher = world.bearer(&secret).await;
    let mut stream = watch(&watcher, None).await.expect("it opens");
    stream.message().await.expect("no error").expect("a message");
    root.revoke(&token.id).await.expect("revoked");
    root.revoke(&other.id).await.expect("revoked");
    let end = loop {
        match stream.message().await {
            Ok(told) => assert!(told.expect("no end").invalidations.is_empty(), "told after the revocation"),
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::Unauthenticated, "{end:?}");
}

async fn a_watcher_whose_rights_were_narrowed_is_told_nothing_more(world: World) {
    world.add_workspace("other", "oth").await;
    let root = world.root().await;
    let (token, secret) = root.issue("gateway", &["keyward:validate-any"]).await;
    let request = proto::CreateTokenRequest { workspace: "other".to_owned(), ..new_token("t", &[]) };
    let other = root.create(request).await.expect("created").token.expect("a token").id;
    let mut stream = watch(&world.bearer(&secret).await, None).await.expect("it opens");
    stream.message().await.expect("no error").expect("a message");
    let narrowed = proto::Token { id: token.id, scopes: vec!["keyward:validate".to_owned()], ..Default::default() };
    root.update(narrowed, &["scopes"]).await.expect("narrowed");
    root.revoke(&other).await.expect("revoked");
    let end = loop {
        match stream.message().await {
            Ok(told) => {
                assert!(told.expect("no end").invalidations.iter().all(|it| it.workspace != "other"), "told of what it may not ask about");
            }
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::PermissionDenied, "{end:?}");
}

async fn a_position_that_is_not_known_any_more_is_refused(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (one, _) = admin.issue("one", &[]).await;
    admin.revoke(&one.id).await.expect("revoked");
    let code = async |epoch: i64, number: i64| {
        let opened = watch(&validator, Some(proto::WatchPosition { epoch, number })).await;
        let mut stream = match opened {
            Ok(stream) => stream,
            Err(status) => return status.code(),
        };
        stream.message().await.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    let head = world.db_number("SELECT seq FROM change_head").await;
    assert_eq!((code(1, head).await, code(1, head - 1).await), (Code::Ok, Code::Ok));
    assert_eq!((code(2, head).await, code(1, head + 1000).await), (Code::FailedPrecondition, Code::FailedPrecondition));
    assert_eq!((code(0, head).await, code(1, -1).await), (Code::InvalidArgument, Code::InvalidArgument));
    world.db_execute("DELETE FROM change_log").await;
    world.db_execute("UPDATE change_head SET pruned_seq = seq").await;
    let (two, _) = admin.issue("two", &[]).await;
    admin.revoke(&two.id).await.expect("revoked");
    assert_eq!(code(1, 0).await, Code::FailedPrecondition, "the log does not reach back");
}

async fn a_watcher_who_does_not_read_is_let_go(world: World) {
    let validator = world.validator().await;
    let narrow = Endpoint::from_shared(format!("http://{}", world.server().address())).expect("an address");
    let channel = narrow.initial_stream_window_size(65_535).initial_connection_window_size(65_535).connect().await.expect("a connection");
    let slow = Actor { channel, ..validator.clone() };
    let mut stream = watch(&slow, None).await.expect("it opens");
    stream.message().await.expect("no error").expect("a message");
    // More than fits into what is on the way and into what waits.
    let head = world.db_number("SELECT seq FROM change_head").await;
    let numbers = "WITH RECURSIVE number(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM number WHERE n < 39999)";
    let (subject, id) = match world.backend {
        Backend::Sqlite => ("randomblob(24)", "'tok_' || printf('%022d', n)"),
        Backend::Postgres => ("substr(sha256(CAST(n AS TEXT)::bytea), 1, 24)", "'tok_' || lpad(CAST(n AS TEXT), 22, '0')"),
    };
    world
        .db_execute(&format!(
            "{numbers} INSERT INTO change_log (seq, item, kind, subject, change_time, workspace, token_id) \
             SELECT {head} + 1 + n / 400, n % 400, 1, {subject}, {}, 'default', {id} FROM number",
            BEGINNING.micros()
        ))
        .await;
    world.db_execute(&format!("UPDATE change_head SET seq = {head} + 100")).await;
    tokio::time::sleep(Duration::from_secs(14)).await;
    let (mut told, mut position) = (0, None);
    let end = loop {
        let message = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("a message or an end");
        match message {
            Ok(message) => {
                let message = message.expect("no end");
                told += message.invalidations.len();
                position = message.position;
            }
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::ResourceExhausted, "{end:?}");
    assert!(told < 40_000, "all of it was waiting for the reader");
    // Nothing is lost.
    let mut stream = watch(&validator, position).await.expect("it opens");
    while told < 40_000 {
        told += next(&mut stream).await.invalidations.len();
    }
    assert_eq!(told, 40_000);
}

/// Another server goes on where the first one has stopped.
#[test]
fn a_position_of_one_server_is_good_at_another() {
    run(Backend::Postgres, async |world| {
        let beside = world.beside(&[]).await;
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (one, _) = admin.issue("one", &[]).await;
        let position = watch(&validator, None).await.expect("it opens").message().await.expect("no error").expect("a message").position;
        admin.revoke(&one.id).await.expect("revoked");
        let there = beside.bearer(validator.token.as_ref().expect("a token")).await;
        let mut stream = watch(&there, position).await.expect("it opens");
        assert_eq!(next(&mut stream).await.invalidations, [token("default", &one.id)]);
        eventually("a heartbeat", async || stream.message().await.ok().flatten()).await;
    });
}

/// Whoever asks any server after a message gets an answer that heeds it.
#[test]
fn a_watcher_hears_of_a_change_when_every_server_knows_it() {
    run(Backend::Postgres, async |world| {
        let proxy = Proxy::start(world::postgres().expect("PostgreSQL").port).await;
        let url = world.settings["database_url"]
            .replace(&format!(":{}/", world::postgres().expect("PostgreSQL").port), &format!(":{}/", proxy.port));
        let slow = world.beside(&[("database_url", url.as_str())]).await;
        let (admin, validator) = (world.admin().await, world.validator().await);
        let there = slow.bearer(validator.token.as_ref().expect("a token")).await;
        for _ in 0..3 {
            let (one, secret) = admin.issue("one", &[]).await;
            assert_eq!(there.verdict(&secret).await, Verdict::Valid);
            let mut stream = watch(&validator, None).await.expect("it opens");
            let first = stream.message().await.expect("no error").expect("a message");
            // The other server asks what has changed, and the answer does not come for some time.
            proxy.hold_after(LOOK_AT_THE_LOG.to_vec());
            eventually("it asks", async || proxy.is_holding().then_some(())).await;
            let revoking = tokio::spawn({
                let (admin, id) = (admin.clone(), one.id.clone());
                async move { admin.revoke(&id).await }
            });
            assert_eq!(next(&mut stream).await.invalidations, [token("default", &one.id)]);
            assert_eq!(there.verdict(&secret).await, Verdict::Revoked, "what was told is in force there");
            revoking.await.expect("a task").expect("revoked");
            proxy.release();
            // A server that has not heard as much as the one before lets a reader wait.
            let position = proto::WatchPosition { number: first.position.expect("a position").number + 1, epoch: 1 };
            let mut again = watch(&there, Some(position)).await.expect("it opens");
            again.message().await.expect("no error").expect("a message");
        }
    });
}

/// The numbers of another database server may mean something else.
#[test]
fn after_a_failover_positions_are_refused() {
    run(Backend::Postgres, async |world| {
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (one, _) = admin.issue("one", &[]).await;
        let position = watch(&validator, None).await.expect("it opens").message().await.expect("no error").expect("a message").position;
        // As the head of an older timeline looks to the one that follows it.
        world.db_execute("UPDATE change_head SET timeline = '00000000'").await;
        let mut request = admin.request(proto::RevokeTokenRequest { id: one.id, ..Default::default() });
        request.set_timeout(Duration::from_secs(2));
        admin.tokens().revoke_token(request).await.expect("revoked");
        let end = eventually("it is refused", async || {
            let mut stream = watch(&validator, position).await.ok()?;
            stream.message().await.err().filter(|end| end.code() != Code::Unavailable)
        })
        .await;
        assert_eq!(end.code(), Code::FailedPrecondition, "{end:?}");
    });
}
