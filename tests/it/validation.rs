//! The data plane: what `ValidationService` promises.

use std::time::Duration;

use keyward::proto::{self, Verdict, create_token_request::Lifetime};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    proxy::Proxy,
    world::{self, Actor, Backend, World, eventually, new_token},
};

crate::on_both_databases!(
    every_verdict_has_its_cause,
    a_token_dies_at_the_instant_it_expires,
    an_unknown_token_says_nothing_else,
    neighbours_of_a_live_token_are_unknown,
    one_flight_serves_all_who_wait,
    a_known_token_costs_no_query,
    a_batch_answers_in_order_and_each_alone,
    a_batch_counts_like_single_calls,
    uses_are_counted_exactly_after_a_clean_stop,
    uses_survive_a_failed_flush,
    bad_questions_name_their_fields,
    overload_is_refused_at_once,
    the_reach_of_a_validator_is_its_workspace,
    verdicts_and_codes_are_counted,
);

fn question(token: &str) -> proto::ValidateTokenRequest {
    proto::ValidateTokenRequest { token: token.to_owned(), ..Default::default() }
}

async fn every_verdict_has_its_cause(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let request = proto::CreateTokenRequest {
        audiences: vec!["billing".to_owned()],
        allowed_cidrs: vec!["10.0.0.0/8".to_owned(), "2001:db8::/32".to_owned()],
        lifetime: Some(Lifetime::Ttl(prost_types::Duration { seconds: 3600, nanos: 0 })),
        metadata: [("team".to_owned(), "platform".to_owned())].into(),
        ..new_token("t", &["agents:*", "storage:upload"])
    };
    let created = admin.create(request).await.expect("created");
    let (token, secret) = (created.token.expect("a token"), created.secret);
    let good = proto::ValidateTokenRequest {
        audience: "billing".to_owned(),
        required_scopes: vec!["agents:list".to_owned(), "storage:upload".to_owned()],
        client_ip: "10.9.8.7".to_owned(),
        ..question(&secret)
    };
    let ask = async |question: proto::ValidateTokenRequest| validator.ask(question).await.expect("an answer");
    let answer = ask(good.clone()).await;
    assert!(answer.valid);
    assert_eq!(answer.verdict(), Verdict::Valid);
    let shown = (&answer.token_id, answer.workspace.as_str(), answer.principal.as_str(), answer.display_name.as_str(), answer.kind());
    assert_eq!(shown, (&token.id, "default", "admin", "t", proto::TokenKind::Permanent));
    assert_eq!((&answer.scopes, &answer.audiences, &answer.metadata), (&token.scopes, &token.audiences, &token.metadata));
    assert_eq!(answer.expire_time, token.expire_time);
    for client_ip in ["2001:db8::7", "::ffff:10.1.1.1"] {
        assert!(ask(proto::ValidateTokenRequest { client_ip: client_ip.to_owned(), ..good.clone() }).await.valid);
    }
    let verdict = async |question| {
        let answer = ask(question).await;
        assert_eq!(answer.valid, answer.verdict() == Verdict::Valid);
        answer.verdict()
    };
    assert_eq!(verdict(proto::ValidateTokenRequest { audience: "shipping".to_owned(), ..good.clone() }).await, Verdict::WrongAudience);
    for client_ip in ["11.0.0.1", "2001:db9::1", ""] {
        assert_eq!(verdict(proto::ValidateTokenRequest { client_ip: client_ip.to_owned(), ..good.clone() }).await, Verdict::IpNotAllowed);
    }
    let needs = ["agents:list", "storage:delete", "keyward:root"].map(str::to_owned).to_vec();
    let lacking = ask(proto::ValidateTokenRequest { required_scopes: needs, ..good.clone() }).await;
    assert_eq!(
        (lacking.verdict(), lacking.missing_scopes),
        (Verdict::InsufficientScope, vec!["storage:delete".to_owned(), "keyward:root".to_owned()])
    );
    world.db_execute("UPDATE workspace SET suspended = true WHERE id = 'default'").await;
    let mut world = world;
    world.restart().await;
    let root = Actor { channel: world.channel().await, token: Some(world.root_token().to_owned()) };
    assert_eq!(root.ask(good.clone()).await.expect_err("suspended with all its tokens").code(), Code::Unauthenticated);
    world.db_execute("UPDATE workspace SET suspended = false WHERE id = 'default'").await;
    world.db_execute("UPDATE principal SET suspended = true WHERE id = 'admin'").await;
    world.restart().await;
    let validator = world.validator().await;
    assert_eq!(validator.ask(good.clone()).await.expect("an answer").verdict(), Verdict::PrincipalSuspended);
    let root = world.root().await;
    root.deactivate(&token.id).await.expect("done");
    assert_eq!(validator.ask(good.clone()).await.expect("an answer").verdict(), Verdict::Inactive);
    world.advance(Duration::from_hours(1));
    assert_eq!(validator.ask(good.clone()).await.expect("an answer").verdict(), Verdict::Expired);
    root.revoke(&token.id).await.expect("done");
    assert_eq!(validator.ask(good.clone()).await.expect("an answer").verdict(), Verdict::Revoked);
    root.delete(&token.id).await.expect("done");
    assert_eq!(validator.ask(good).await.expect("an answer").verdict(), Verdict::Unknown);
}

async fn a_token_dies_at_the_instant_it_expires(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let lifetime = Some(Lifetime::Ttl(prost_types::Duration { seconds: 60, nanos: 0 }));
    let secret = admin.create(proto::CreateTokenRequest { lifetime, ..new_token("t", &[]) }).await.expect("created").secret;
    world.advance(Duration::from_mins(1) - Duration::from_micros(1));
    assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
    world.advance(Duration::from_micros(1));
    assert_eq!(validator.verdict(&secret).await, Verdict::Expired);
}

async fn an_unknown_token_says_nothing_else(world: World) {
    let validator = world.validator().await;
    world.add_workspace("other", "ot").await;
    let foreign = world.actor_in("other", "p", &[]).await.token.expect("a token");
    let (deleted, gone) = world.admin().await.issue("t", &[]).await;
    world.admin().await.delete(&deleted.id).await.expect("done");
    for token in ["x", "kw_", "Bearer x", &foreign, &gone, &gone[..47], &"x".repeat(8000)] {
        let answer = validator.ask(question(token)).await.expect("an answer");
        assert_eq!(answer, proto::ValidateTokenResponse { verdict: Verdict::Unknown.into(), ..Default::default() });
    }
}

async fn neighbours_of_a_live_token_are_unknown(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (_, secret) = admin.issue("t", &[]).await;
    let alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_- .,\u{0}é";
    let mut neighbours: Vec<String> = (1..secret.len()).flat_map(|cut| [secret[..cut].to_owned(), secret[cut..].to_owned()]).collect();
    for index in 0..=secret.len() {
        for letter in alphabet.chars() {
            neighbours.push(format!("{}{letter}{}", &secret[..index], &secret[index..]));
            if index < secret.len() {
                neighbours.push(format!("{}{letter}{}", &secret[..index], &secret[index + 1..]));
            }
        }
    }
    neighbours.extend([secret.to_uppercase(), secret.to_lowercase(), format!("{secret}{secret}"), format!("Bearer {secret}")]);
    neighbours.retain(|neighbour| *neighbour != secret);
    assert!(neighbours.len() > 6_000);
    let queries = world.queries("facts").await;
    for chunk in neighbours.chunks(1000) {
        let requests = chunk.iter().map(|neighbour| question(neighbour)).collect();
        let batch = proto::BatchValidateTokensRequest { requests };
        let answers = validator.validation().batch_validate_tokens(validator.request(batch)).await.expect("answers").into_inner().responses;
        for (answer, neighbour) in answers.iter().zip(chunk) {
            assert_eq!(answer.verdict(), Verdict::Unknown, "{neighbour:?}");
        }
    }
    // One for the validator's own token, none for the neighbours.
    assert!(world.queries("facts").await <= queries + 1.0);
    assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
}

async fn one_flight_serves_all_who_wait(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    validator.verdict("warm").await;
    for round in 0..5 {
        let (_, secret) = admin.issue(&format!("t{round}"), &[]).await;
        let before = world.queries("facts").await;
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (validator, secret) = (validator.clone(), secret.clone());
            calls.spawn(async move { validator.verdict(&secret).await });
        }
        assert!(calls.join_all().await.iter().all(|verdict| *verdict == Verdict::Valid));
        assert_eq!(world.queries("facts").await, before + 1.0);
    }
}

async fn a_known_token_costs_no_query(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, secret) = admin.issue("t", &[]).await;
    validator.verdict(&secret).await;
    let before = world.queries("facts").await;
    for _ in 0..50 {
        assert_eq!(validator.use_token(&secret).await, Verdict::Valid);
    }
    assert_eq!(world.queries("facts").await, before);
    admin.delete(&token.id).await.expect("done");
    for _ in 0..50 {
        assert_eq!(validator.use_token(&secret).await, Verdict::Unknown);
    }
    assert_eq!(world.queries("facts").await, before + 1.0, "that it is gone is known, too");
}

async fn a_batch_answers_in_order_and_each_alone(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (first, first_secret) = admin.issue("first", &["a:b"]).await;
    let (second, second_secret) = admin.issue("second", &[]).await;
    admin.revoke(&second.id).await.expect("done");
    let mut requests = Vec::new();
    for number in 0..1000 {
        requests.push(match number % 4 {
            0 => question(&first_secret),
            1 => question(&second_secret),
            2 => question("nonsense"),
            _ => proto::ValidateTokenRequest { required_scopes: vec!["c:d".to_owned()], ..question(&first_secret) },
        });
    }
    let batch = async |requests: Vec<proto::ValidateTokenRequest>| {
        let batch = proto::BatchValidateTokensRequest { requests };
        validator.validation().batch_validate_tokens(validator.request(batch)).await.map(|response| response.into_inner().responses)
    };
    let answers = batch(requests.clone()).await.expect("answers");
    assert_eq!(answers.len(), 1000);
    let expected = [Verdict::Valid, Verdict::Revoked, Verdict::Unknown, Verdict::InsufficientScope];
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer.verdict(), expected[number % 4]);
        assert_eq!(answer.token_id.as_str(), [&first.id, &second.id, "", &first.id][number % 4]);
    }
    requests.push(question("one too many"));
    for wrong in [requests, Vec::new()] {
        let status = batch(wrong).await.expect_err("1 to 1000");
        assert_eq!(status.get_details_bad_request().expect("BadRequest").field_violations[0].field, "requests");
    }
    assert_eq!(batch(vec![question("")]).await.expect("no token is no reason to fail")[0].verdict(), Verdict::Unknown);
    let bad = proto::ValidateTokenRequest { client_ip: "here".to_owned(), audience: "x".repeat(64), ..question("x") };
    let status = batch(vec![question("x"), bad]).await;
    let named = status.expect_err("two wrong fields").get_details_bad_request().expect("BadRequest").field_violations;
    let fields: Vec<_> = named.into_iter().map(|violation| violation.field).collect();
    assert_eq!(fields, ["requests[1].audience", "requests[1].client_ip"]);
}

async fn a_batch_counts_like_single_calls(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, secret) = admin.issue("t", &[]).await;
    let mut requests = vec![question(&secret); 7];
    requests.push(proto::ValidateTokenRequest { peek: true, ..question(&secret) });
    requests.push(proto::ValidateTokenRequest { required_scopes: vec!["a:b".to_owned()], ..question(&secret) });
    let batch = proto::BatchValidateTokensRequest { requests };
    validator.validation().batch_validate_tokens(validator.request(batch)).await.expect("answers");
    eventually("seven uses", async || (admin.get(&token.id).await.ok()?.use_count == 7).then_some(())).await;
}

async fn uses_are_counted_exactly_after_a_clean_stop(mut world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut tokens = Vec::new();
    for number in 0..5_i64 {
        tokens.push((admin.issue(&format!("t{number}"), &[]).await, 10 * number));
    }
    for ((_, secret), count) in &tokens {
        for _ in 0..*count {
            let used = proto::ValidateTokenRequest { client_ip: "192.0.2.7".to_owned(), ..question(secret) };
            assert!(validator.ask(used).await.expect("an answer").valid);
        }
        validator.verdict(secret).await;
    }
    world.advance(Duration::from_secs(1));
    world.restart().await;
    let root = world.root().await;
    for ((token, _), count) in &tokens {
        let now = root.get(&token.id).await.expect("found");
        assert_eq!(now.use_count, *count);
        assert_eq!(now.last_used_time.is_some(), *count > 0);
        assert_eq!(now.last_used_ip, if *count > 0 { "192.0.2.7" } else { "" });
        assert_eq!((&now.etag, now.update_time), (&token.etag, token.update_time), "a use is no change");
    }
}

async fn uses_survive_a_failed_flush(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, secret) = admin.issue("t", &[]).await;
    world.db_execute("ALTER TABLE token_usage RENAME TO token_usage_away").await;
    for _ in 0..9 {
        assert_eq!(validator.use_token(&secret).await, Verdict::Valid);
    }
    eventually("a flush has failed", async || (world.metric("keyward_store_errors_total").await > 0.0).then_some(())).await;
    world.db_execute("ALTER TABLE token_usage_away RENAME TO token_usage").await;
    eventually("nine uses", async || (admin.get(&token.id).await.ok()?.use_count == 9).then_some(())).await;
}

async fn bad_questions_name_their_fields(world: World) {
    let validator = world.validator().await;
    let bad = proto::ValidateTokenRequest {
        required_scopes: vec!["agents:list".to_owned(), "agents:*".to_owned(), "*".to_owned(), "agents".to_owned()],
        client_ip: "10.0.0.1:80".to_owned(),
        audience: "x".repeat(64),
        ..Default::default()
    };
    let named = validator.ask(bad).await.expect_err("wrong").get_details_bad_request().expect("BadRequest").field_violations;
    let mut fields: Vec<_> = named.into_iter().map(|violation| violation.field).collect();
    fields.sort();
    assert_eq!(fields, ["audience", "client_ip", "required_scopes[1]", "required_scopes[2]", "required_scopes[3]"]);
}

async fn overload_is_refused_at_once(mut world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (admin_token, validator_token) = (admin.token.expect("a token"), validator.token.expect("a token"));
    world.limits.control_calls_max = 0;
    world.stop_server().await;
    world.start_server().await;
    let status = world.bearer(&admin_token).await.get("tok_1").await.expect_err("no room");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_details_retry_info().expect("RetryInfo").retry_delay.is_some());
    assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "OVERLOADED");
    assert_eq!(world.bearer(&validator_token).await.verdict("x").await, Verdict::Unknown, "the data plane has room of its own");
    assert_eq!(world.metric("keyward_shed_total").await, 1.0);
}

async fn the_reach_of_a_validator_is_its_workspace(world: World) {
    world.add_workspace("other", "ot").await;
    let theirs = world.actor_in("other", "p", &["a:b"]).await.token.expect("a token");
    let ours = world.actor("p", &["a:b"]).await.token.expect("a token");
    for (scope, own, foreign) in [
        ("keyward:validate", Verdict::Valid, Verdict::Unknown),
        ("keyward:admin", Verdict::Valid, Verdict::Unknown),
        ("keyward:validate-any", Verdict::Valid, Verdict::Valid),
        ("keyward:root", Verdict::Valid, Verdict::Valid),
    ] {
        let validator = world.actor("v", &[scope]).await;
        assert_eq!((validator.verdict(&ours).await, validator.verdict(&theirs).await), (own, foreign), "{scope}");
    }
}

async fn verdicts_and_codes_are_counted(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (_, secret) = admin.issue("t", &[]).await;
    for _ in 0..3 {
        validator.verdict(&secret).await;
    }
    validator.verdict("x").await;
    admin.get("tok_0000000000000000000000").await.expect_err("not there");
    let page = world.metrics().await;
    for line in [
        "keyward_requests_total{method=\"keyward.v1.ValidationService/ValidateToken\",code=\"OK\"} 4",
        "keyward_requests_total{method=\"keyward.v1.TokenService/GetToken\",code=\"NOT_FOUND\"} 1",
        "keyward_verdicts_total{verdict=\"VALID\"} 3",
        "keyward_verdicts_total{verdict=\"UNKNOWN\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
    for name in [
        "keyward_request_seconds_bucket",
        "keyward_cache_tokens",
        "keyward_cache_bytes",
        "keyward_cache_hits_total",
        "keyward_cache_misses_total",
        "keyward_store_seconds_sum",
        "keyward_usage_backlog_tokens",
        "keyward_build_info",
        "keyward_connections",
    ] {
        assert!(page.lines().any(|found| found.starts_with(name)), "{name} is not in\n{page}");
    }
    metrics_have_bounded_labels(&world, &secret).await;
}

/// Nothing that callers send becomes a label.
async fn metrics_have_bounded_labels(world: &World, secret: &str) {
    let lines = world.metrics().await.lines().count();
    let stranger = world.stranger().await;
    let mut grpc = tonic::client::Grpc::new(stranger.channel.clone());
    for number in 0..20 {
        grpc.ready().await.expect("connected");
        let path = format!("/keyward.v1.TokenService/Invented{number}").parse().expect("a path");
        let codec = tonic_prost::ProstCodec::<proto::WhoAmIRequest, proto::WhoAmIResponse>::default();
        let status = grpc.unary(stranger.request(proto::WhoAmIRequest {}), path, codec).await.expect_err("there is no such method");
        assert_eq!(status.code(), Code::Unimplemented);
        assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "UNKNOWN_METHOD");
    }
    let page = world.metrics().await;
    assert_eq!(page.lines().count(), lines);
    assert!(!page.contains("Invented") && !page.contains(secret) && !page.contains("tok_"));
}

/// A world whose PostgreSQL is reached through a proxy.
pub async fn world_behind_proxy() -> Option<(World, Proxy)> {
    let Some(postgres) = world::postgres() else {
        world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
        return None;
    };
    let mut world = World::start(Backend::Postgres).await;
    let proxy = Proxy::start(postgres.port).await;
    let direct = world.settings["database_url"].clone();
    world.settings.insert("database_url", direct.replace(&format!(":{}/", postgres.port), &format!(":{}/", proxy.port)));
    world.stop_server().await;
    world.start_server().await;
    Some((world, proxy))
}

#[test]
fn who_joins_a_flight_after_a_revocation_reads_anew() {
    world::runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (token, secret) = admin.issue("t", &[]).await;
        validator.verdict("warm").await;
        admin.get(&token.id).await.expect("warm");
        // The first to ask the database for this digest has its reply held back.
        proxy.hold_after(world.db_digest(&token.id).await);
        let early = tokio::spawn({
            let (validator, secret) = (validator.clone(), secret.clone());
            async move { validator.verdict(&secret).await }
        });
        eventually("the flight is in the air", async || proxy.is_holding().then_some(())).await;
        let misses = world.metric("keyward_cache_misses_total").await;
        admin.revoke(&token.id).await.expect("done");
        let late = tokio::spawn({
            let (validator, secret) = (validator.clone(), secret.clone());
            async move { validator.verdict(&secret).await }
        });
        eventually("the second call has joined it", async || (world.metric("keyward_cache_misses_total").await > misses).then_some(()))
            .await;
        proxy.release();
        assert_eq!(late.await.expect("an answer"), Verdict::Revoked);
        // The first one overlaps the revocation and may have either answer, but an answer.
        assert!(matches!(early.await.expect("an answer"), Verdict::Valid | Verdict::Revoked));
        assert_eq!(validator.verdict(&secret).await, Verdict::Revoked);
    });
}

#[test]
fn a_commit_that_comes_late_leaves_no_old_fact() {
    world::runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (token, secret) = admin.issue("t", &[]).await;
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        proxy.hold_before(b"COMMIT".to_vec());
        let status = admin.revoke(&token.id).await.expect_err("the commit is on its way");
        assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status:?}");
        assert!(proxy.is_holding());
        // Not revoked yet, and read anew for each call: what is read now may be over in a moment.
        let queries = world.queries("facts").await;
        for _ in 0..3 {
            assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        }
        assert_eq!(world.queries("facts").await, queries + 3.0);
        proxy.release();
        eventually("the commit has come", async || (admin.get(&token.id).await.ok()?.state() == proto::TokenState::Revoked).then_some(()))
            .await;
        assert_eq!(validator.verdict(&secret).await, Verdict::Revoked);
        eventually("the change is settled", async || {
            let queries = world.queries("facts").await;
            assert_eq!(validator.verdict(&secret).await, Verdict::Revoked);
            (world.queries("facts").await == queries).then_some(())
        })
        .await;
    });
}

#[test]
fn a_database_that_is_gone_is_unavailable() {
    world::runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (_, known) = admin.issue("known", &[]).await;
        let (other, unknown) = admin.issue("unknown", &[]).await;
        assert_eq!(validator.verdict(&known).await, Verdict::Valid);
        proxy.cut();
        assert_eq!(validator.use_token(&known).await, Verdict::Valid, "what is known is judged on");
        assert_eq!(validator.verdict("invented").await, Verdict::Unknown);
        for status in [
            validator.ask(question(&unknown)).await.expect_err("nobody knows"),
            admin.revoke(&other.id).await.expect_err("it was not revoked"),
            admin.get(&other.id).await.expect_err("nobody knows"),
            admin.create(new_token("t", &[])).await.expect_err("it was not created"),
        ] {
            assert!(matches!(status.code(), Code::Unavailable), "{status:?}");
            assert!(status.get_details_retry_info().expect("RetryInfo").retry_delay.is_some());
            assert!(!status.message().contains("127.0.0.1"), "nothing from below");
        }
        proxy.heal();
        eventually("the database is back", async || admin.get(&other.id).await.ok()).await;
        assert_eq!(validator.verdict(&unknown).await, Verdict::Valid);
        admin.revoke(&other.id).await.expect("done");
        assert_eq!(validator.verdict(&unknown).await, Verdict::Revoked);
        eventually("the use during the outage is counted", async || {
            let listed = admin.list(proto::ListTokensRequest { query: "known".to_owned(), ..Default::default() }).await.ok()?;
            listed.tokens.iter().any(|token| token.display_name == "known" && token.use_count == 1).then_some(())
        })
        .await;
    });
}

#[test]
fn deadlines_are_kept_and_named() {
    world::runtime().block_on(async {
        let Some((world, proxy)) = world_behind_proxy().await else { return };
        let (admin, validator) = (world.admin().await, world.validator().await);
        let (token, secret) = admin.issue("t", &[]).await;
        validator.verdict("warm").await;
        proxy.hold_after(world.db_digest(&token.id).await);
        let mut request = validator.request(question(&secret));
        request.set_timeout(Duration::from_millis(300));
        let begin = std::time::Instant::now();
        let status = validator.validation().validate_token(request).await.expect_err("the reply is held back");
        assert!(begin.elapsed() < Duration::from_secs(3));
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
        proxy.release();
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid, "the flight went on and landed");
    });
}

/// Random letters and digits, quickly and the same on every run.
struct Letters(u64);

impl Letters {
    fn fill(&mut self, places: &mut [u8]) {
        const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        for place in places {
            // Xorshift, G. Marsaglia 2003.
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *place = ALPHABET[(self.0 >> 33) as usize % 62];
        }
    }
}

/// The base62 digits of the CRC-32 of what stands before them, as anybody can compute it.
fn check(text: &mut [u8]) {
    let (signed, digits) = text.split_at_mut(text.len() - 6);
    let mut number = u64::from(crc32fast::hash(signed));
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[(number % 62) as usize];
        number /= 62;
    }
}

#[test]
fn ten_million_invented_tokens_cost_no_query() {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use keyward::{
        cache::Cache,
        grant::Need,
        store::{DatabaseUrl, Store},
        token::Keyring,
        usage::Usage,
        validator::{Question, Validator},
    };

    const EACH: usize = 5_000_000;
    let folder = tempfile::tempdir().expect("a folder");
    let queries = Arc::new(AtomicU64::new(0));
    let runtime = world::runtime();
    let observed = Arc::clone(&queries);
    let observer = Box::new(move |_, _, _| {
        observed.fetch_add(1, Ordering::Relaxed);
    });
    let url = DatabaseUrl::Sqlite(folder.path().join("keyward.db"));
    let store = Arc::new(runtime.block_on(Store::open(&url, true, observer)).expect("a store"));
    let keyring = Arc::new(Keyring::generate().expect("randomness"));
    let issued = keyring.issue(&"kw".parse().expect("a prefix")).expect("randomness");
    let (cache, usage) = (Arc::new(Cache::new(0, Duration::from_secs(10))), Arc::new(Usage::default()));
    cache.serve_for_ever();
    let validator = Validator::new(keyring, Arc::clone(&cache), store, usage);
    queries.store(0, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for seed in [0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03] {
            let (validator, runtime, own) = (&validator, &runtime, issued.secret.reveal().as_bytes());
            scope.spawn(move || {
                let mut letters = Letters(seed);
                let mut texts = vec![own.to_vec(); 1_000];
                for _ in 0..EACH / texts.len() {
                    for text in &mut texts {
                        // Our own key's name, a right check, everything else invented.
                        letters.fill(&mut text[4..42]);
                        check(text);
                    }
                    let questions: Vec<_> =
                        texts.iter().map(|text| Question { text, need: Need::default(), http: None, peek: false }).collect();
                    let now = keyward::ambient::Time::from_micros(0);
                    let answers = runtime.block_on(validator.validate_batch(&questions, now)).expect("answers");
                    assert!(answers.iter().all(|answer| answer.verdict == keyward::grant::Verdict::Unknown));
                }
            });
        }
    });
    assert_eq!(queries.load(Ordering::Relaxed), 0);
    assert!(cache.is_empty());
    let own = Question { text: issued.secret.reveal().as_bytes(), need: Need::default(), http: None, peek: false };
    let answer = runtime.block_on(validator.validate(own, keyward::ambient::Time::from_micros(0))).expect("an answer");
    assert_eq!(answer.verdict, keyward::grant::Verdict::Unknown, "made with the key, but never stored");
    assert_eq!(queries.load(Ordering::Relaxed), 1, "a token that proves itself is looked up");
}
