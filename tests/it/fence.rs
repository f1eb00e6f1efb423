//! Several servers on one PostgreSQL: what one of them has changed, all of them know when the call returns.

use std::time::{Duration, Instant};

use keyward::proto::{self, PropagationState, TokenState, Verdict, replica_service_client::ReplicaServiceClient};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    proxy::Proxy,
    world::{self, Actor, Backend, World, eventually},
};

/// How a look at the log is sent: at most 50,000 changes.
pub const LOOK_AT_THE_LOG: &[u8] = b"\0\0\0\x08\0\0\0\0\0\0\xc3\x50";

/// Servers beside each other, the first of which is in `0`.
struct Servers(Vec<World>);

impl Servers {
    /// So many of them, each with its own settings beside the common ones.
    async fn start(count: usize, settings: &[(&'static str, &str)]) -> Self {
        let mut first = World::unstarted(Backend::Postgres).await;
        first.settings.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        first.start_server().await;
        let mut servers = vec![first];
        while servers.len() < count {
            let next = servers[0].beside(&[]).await;
            servers.push(next);
        }
        Self(servers)
    }

    /// One more, which reaches the database through a proxy.
    async fn add_behind_proxy(&mut self, settings: &[(&'static str, &str)]) -> Proxy {
        let postgres = world::postgres().expect("PostgreSQL");
        let proxy = Proxy::start(postgres.port).await;
        let url = self.0[0].settings["database_url"].replace(&format!(":{}/", postgres.port), &format!(":{}/", proxy.port));
        let mut own = vec![("database_url", url.as_str())];
        own.extend(settings);
        let next = self.0[0].beside(&own).await;
        self.0.push(next);
        proxy
    }

    /// The same caller at each of them.
    async fn everywhere(&self, caller: &Actor) -> Vec<Actor> {
        let mut actors = Vec::new();
        for world in &self.0 {
            actors.push(world.bearer(caller.token.as_ref().expect("a token")).await);
        }
        actors
    }
}

fn run(test: impl AsyncFnOnce()) {
    if world::postgres().is_none() {
        return world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
    }
    world::runtime().block_on(async { test().await });
}

async fn verdicts(actors: &[Actor], secret: &str) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for actor in actors {
        verdicts.push(actor.verdict(secret).await);
    }
    verdicts
}

/// Revokes a token, and answers how far that has got.
async fn revoke(actor: &Actor, id: &str, deadline: Option<Duration>) -> Result<proto::Propagation, Status> {
    let mut request = actor.request(proto::RevokeTokenRequest { id: id.to_owned(), ..Default::default() });
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    let answer = actor.tokens().revoke_token(request).await?.into_inner();
    assert_eq!(answer.token.expect("a token").state(), TokenState::Revoked);
    Ok(answer.propagation.expect("how far it has got"))
}

#[test]
fn a_revocation_is_effective_on_every_server_when_it_returns() {
    run(async || {
        let servers = Servers::start(3, &[]).await;
        let admins = servers.everywhere(&servers.0[0].admin().await).await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        for round in 0..60 {
            let (token, secret) = admins[round % 3].issue("t", &[]).await;
            assert_eq!(verdicts(&validators, &secret).await, [Verdict::Valid; 3]);
            assert_eq!(verdicts(&validators, &secret).await, [Verdict::Valid; 3], "from memory");
            let propagation = revoke(&admins[(round + 1) % 3], &token.id, None).await.expect("revoked");
            assert_eq!(verdicts(&validators, &secret).await, [Verdict::Revoked; 3], "round {round}");
            assert_eq!((propagation.state(), propagation.replicas.len()), (PropagationState::Complete, 0));
        }
    });
}

#[test]
fn every_kind_of_change_reaches_every_server() {
    run(async || {
        let servers = Servers::start(2, &[]).await;
        let roots = servers.everywhere(&servers.0[0].root().await).await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        let there = &validators[1];
        let (token, secret) = roots[0].issue("t", &[]).await;
        assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        roots[0].deactivate(&token.id).await.expect("off");
        assert_eq!(there.verdict(&secret).await, Verdict::Inactive);
        roots[0].activate(&token.id).await.expect("on");
        assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        let renewed = roots[0].regenerate(&token.id, 0).await.expect("renewed");
        assert_eq!((there.verdict(&secret).await, there.verdict(&renewed.secret).await), (Verdict::Unknown, Verdict::Valid));
        let target = || proto::SuspendPrincipalRequest { workspace: String::new(), id: token.principal.clone(), ..Default::default() };
        let (_, of_user) = roots[0]
            .create(proto::CreateTokenRequest { principal: "user".to_owned(), ..world::new_token("u", &[]) })
            .await
            .map(|made| (made.token, made.secret))
            .expect("created");
        assert_eq!(there.verdict(&of_user).await, Verdict::Valid);
        let suspend = proto::SuspendPrincipalRequest { id: "user".to_owned(), ..target() };
        roots[0].principals().suspend_principal(roots[0].request(suspend)).await.expect("suspended");
        assert_eq!(there.verdict(&of_user).await, Verdict::PrincipalSuspended);
        let resume = proto::ResumePrincipalRequest { id: "user".to_owned(), ..Default::default() };
        roots[0].principals().resume_principal(roots[0].request(resume)).await.expect("resumed");
        assert_eq!(there.verdict(&of_user).await, Verdict::Valid);
        let _workspace = servers.0[0].add_workspace("other", "oth").await;
        let inside = servers.0[0].actor_in("other", "someone", &["keyward:validate"]).await;
        let inside = servers.everywhere(&inside).await;
        assert_eq!(inside[1].verdict("nothing").await, Verdict::Unknown, "a good caller");
        let suspend = proto::SuspendWorkspaceRequest { id: "other".to_owned(), ..Default::default() };
        roots[0].workspaces().suspend_workspace(roots[0].request(suspend)).await.expect("suspended");
        let refused = inside[1].ask(proto::ValidateTokenRequest { token: "nothing".to_owned(), ..Default::default() }).await;
        assert_eq!(refused.expect_err("suspended").code(), Code::Unauthenticated);
        roots[0].delete(&token.id).await.expect("deleted");
        assert_eq!(there.verdict(&renewed.secret).await, Verdict::Unknown);
    });
}

/// The one that died is waited for once, until it cannot answer from memory any more.
#[test]
fn a_server_that_died_delays_changes_for_one_lease_and_once() {
    run(async || {
        let mut servers = Servers::start(2, &[("lease", "4s")]).await;
        let admin = servers.0[0].admin().await;
        let (first, secret) = admin.issue("first", &[]).await;
        let (second, _) = admin.issue("second", &[]).await;
        let there = servers.everywhere(&servers.0[0].validator().await).await.remove(1);
        assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        // As if it were killed: it does not say that it goes.
        drop(servers.0.pop().expect("the second").take_server());
        let begin = Instant::now();
        let propagation = revoke(&admin, &first.id, None).await.expect("revoked");
        let waited = begin.elapsed();
        assert_eq!(propagation.state(), PropagationState::Complete);
        println!("waited {waited:?}");
        assert!(waited < Duration::from_secs(7), "{waited:?}");
        let evicted = "SELECT COUNT(*) FROM replica WHERE evicted";
        eventually("it is evicted", async || (servers.0[0].db_number(evicted).await == 1).then_some(())).await;
        let begin = Instant::now();
        revoke(&admin, &second.id, None).await.expect("revoked");
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    });
}

#[test]
fn a_server_that_stops_delays_nothing() {
    run(async || {
        let mut servers = Servers::start(2, &[("lease", "60s")]).await;
        let admin = servers.0[0].admin().await;
        let (token, _) = admin.issue("t", &[]).await;
        servers.0.pop().expect("the second").stop_server().await;
        assert_eq!(servers.0[0].db_number("SELECT COUNT(*) FROM replica").await, 1);
        let propagation = revoke(&admin, &token.id, Some(Duration::from_secs(5))).await.expect("revoked");
        assert_eq!(propagation.state(), PropagationState::Complete);
    });
}

#[test]
fn a_deadline_that_comes_first_is_told() {
    run(async || {
        let mut servers = Servers::start(1, &[("lease", "8s")]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let admin = servers.0[0].admin().await;
        let there = servers.everywhere(&servers.0[0].validator().await).await.remove(1);
        let (token, secret) = admin.issue("t", &[]).await;
        assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        proxy.cut();
        let begin = Instant::now();
        let pending = revoke(&admin, &token.id, Some(Duration::from_secs(2))).await.expect("revoked");
        assert!(begin.elapsed() < Duration::from_secs(2));
        assert_eq!((pending.state(), pending.replicas.len()), (PropagationState::Pending, 1));
        assert!(pending.complete_by.is_some());
        assert_eq!(there.verdict(&secret).await, Verdict::Valid, "it cannot know, and its lease has not ended: that is what PENDING says");
        // To repeat the call is to wait for it.
        let complete = revoke(&admin, &token.id, None).await.expect("revoked");
        assert_eq!(complete.state(), PropagationState::Complete);
        let asked = there.ask(proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() }).await;
        assert_eq!(asked.expect_err("past its lease, without a database").code(), Code::Unavailable);
        proxy.heal();
        let healed = Instant::now();
        eventually("it is back", async || {
            let asked = there.ask(proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() }).await;
            asked.ok().map(|answer| assert_eq!(answer.verdict(), Verdict::Revoked))
        })
        .await;
        println!("back after {:?}", healed.elapsed());
    });
}

#[test]
fn a_database_that_is_away_for_less_than_a_lease_costs_no_answer_from_memory() {
    run(async || {
        let mut servers = Servers::start(1, &[("lease", "6s")]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let there = servers.everywhere(&servers.0[0].validator().await).await.remove(1);
        let (_, secret) = servers.0[0].admin().await.issue("t", &[]).await;
        assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        proxy.cut();
        let begin = Instant::now();
        let mut answers = 0;
        while begin.elapsed() < Duration::from_secs(2) {
            assert_eq!(there.verdict(&secret).await, Verdict::Valid);
            answers += 1;
        }
        proxy.heal();
        assert!(answers > 100, "{answers}");
        // The lease goes on from the first look that succeeds.
        while begin.elapsed() < Duration::from_secs(9) {
            assert_eq!(there.verdict(&secret).await, Verdict::Valid);
        }
    });
}

#[test]
fn health_tells_that_nothing_can_be_answered() {
    run(async || {
        let mut servers = Servers::start(1, &[("lease", "1s")]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let channel = servers.0[1].channel().await;
        let health = async || {
            let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
            let asked = tonic_health::pb::HealthCheckRequest { service: "keyward.v1.ValidationService".to_owned() };
            client.check(asked).await.expect("an answer").into_inner().status()
        };
        assert_eq!(health().await, ServingStatus::Serving);
        proxy.cut();
        eventually("it says so", async || (health().await == ServingStatus::NotServing).then_some(())).await;
        proxy.heal();
        let healed = Instant::now();
        eventually("it says so", async || (health().await == ServingStatus::Serving).then_some(())).await;
        println!("back after {:?}", healed.elapsed());
    });
}

#[test]
fn changes_wait_for_a_server_that_must_confirm_until_it_is_released() {
    run(async || {
        let mut first = World::unstarted(Backend::Postgres).await;
        first.settings.insert("lease", "1s".to_owned());
        first.limits.control_calls_max = 8;
        first.start_server().await;
        let mut servers = Servers(vec![first]);
        let proxy = servers.add_behind_proxy(&[("fence_mode", "acked_only"), ("replica_name", "silent")]).await;
        let admin = servers.0[0].admin().await;
        let (token, _) = admin.issue("t", &[]).await;
        proxy.cut();
        let pending = revoke(&admin, &token.id, Some(Duration::from_secs(3))).await.expect("revoked");
        assert_eq!((pending.state(), pending.replicas.len()), (PropagationState::Pending, 1));
        assert_eq!(pending.complete_by, None, "nobody knows when");
        assert_eq!(servers.0[0].db_number("SELECT COUNT(*) FROM replica WHERE evicted").await, 0);
        // What is not there is answered without waiting for anybody.
        let begin = Instant::now();
        assert_eq!(admin.delete("tok_0000000000000000000000").await.expect_err("nothing").code(), Code::NotFound);
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        // Those who wait leave room for the one who ends it.
        let waiting: Vec<_> = (0..20)
            .map(|_| {
                let (admin, id) = (admin.clone(), token.id.clone());
                tokio::spawn(async move {
                    loop {
                        match revoke(&admin, &id, Some(Duration::from_secs(12))).await {
                            Err(status) if status.code() == Code::ResourceExhausted => tokio::time::sleep(Duration::from_millis(20)).await,
                            answer => return answer,
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let root = servers.0[0].root().await;
        let release = async |id: &str| {
            let request = root.request(proto::ReleaseReplicaRequest { id: id.to_owned() });
            ReplicaServiceClient::new(root.channel.clone()).release_replica(request).await.map(tonic::Response::into_inner)
        };
        let list = root.request(proto::ListReplicasRequest {});
        let listed = ReplicaServiceClient::new(root.channel.clone()).list_replicas(list).await.expect("listed").into_inner();
        let own = listed.replicas.iter().find(|replica| replica.self_).expect("itself");
        assert_eq!(release(&own.id).await.expect_err("its lease is enough").code(), Code::FailedPrecondition);
        assert!(release(&pending.replicas[0]).await.expect("released").replica.expect("the server").evicted);
        for done in waiting {
            assert_eq!(done.await.expect("a task").expect("revoked").state(), PropagationState::Complete);
        }
        let complete = revoke(&admin, &token.id, Some(Duration::from_secs(3))).await.expect("revoked");
        assert_eq!(complete.state(), PropagationState::Complete);
    });
}

/// The first call was made by another server, and this one has not heard of it yet.
#[test]
fn a_repeated_change_is_in_force_here_as_well() {
    run(async || {
        let mut servers = Servers::start(1, &[]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let admins = servers.everywhere(&servers.0[0].admin().await).await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        for round in 0..3 {
            let principal = format!("p{round}");
            let request = proto::CreateTokenRequest { principal: principal.clone(), ..world::new_token("t", &[]) };
            let secret = admins[0].create(request).await.expect("created").secret;
            assert_eq!(verdicts(&validators, &secret).await, [Verdict::Valid; 2]);
            // It asks what has changed, and the answer does not come.
            proxy.hold_after(LOOK_AT_THE_LOG.to_vec());
            eventually("it asks", async || proxy.is_holding().then_some(())).await;
            let revoke_all = async |actor: &Actor, deadline: u64| {
                let mut request = actor.request(proto::RevokePrincipalTokensRequest { principal: principal.clone(), ..Default::default() });
                request.set_timeout(Duration::from_millis(deadline));
                let answer = actor.tokens().revoke_principal_tokens(request).await.expect("revoked").into_inner();
                (answer.revoked_count, answer.propagation.expect("how far it has got").state())
            };
            assert_eq!(revoke_all(&admins[0], 600).await, (1, PropagationState::Pending));
            assert_eq!(validators[1].verdict(&secret).await, Verdict::Valid, "it cannot know");
            assert_eq!(revoke_all(&admins[1], 14_000).await, (0, PropagationState::Complete));
            assert_eq!(validators[1].verdict(&secret).await, Verdict::Revoked);
            proxy.release();
            let lease = async || servers.0[1].metric("keyward_fence_lease_seconds").await;
            eventually("it hears again", async || (lease().await > 9.0).then_some(())).await;
        }
    });
}

/// As in a rolling upgrade, when a later version has changed something that this one does not know.
#[test]
fn a_change_of_an_unknown_kind_makes_servers_forget_and_go_on() {
    run(async || {
        let servers = Servers::start(1, &[]).await;
        let (world, admin, validator) = (&servers.0[0], servers.0[0].admin().await, servers.0[0].validator().await);
        let (token, secret) = admin.issue("t", &[]).await;
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
        world.db_execute(&format!("UPDATE token SET state = 3 WHERE id = '{}'", token.id)).await;
        assert_eq!(validator.verdict(&secret).await, Verdict::Valid, "from memory");
        let row = "INSERT INTO change_log (seq, item, kind, subject, change_time, workspace, token_id) \
                   SELECT seq + 1, 0, 99, decode('00', 'hex'), 0, '', '' FROM change_head; UPDATE change_head SET seq = seq + 1";
        world.db_execute(row).await;
        eventually("it is forgotten", async || (validator.verdict(&secret).await == Verdict::Revoked).then_some(())).await;
        let (one, _) = admin.issue("one", &[]).await;
        assert_eq!(revoke(&admin, &one.id, None).await.expect("revoked").state(), PropagationState::Complete);
    });
}

/// Whatever it was that a server has missed: what it knew is gone before it answers from memory again.
#[test]
fn a_server_that_missed_something_begins_anew() {
    run(async || {
        let servers = Servers::start(1, &[]).await;
        let (world, admin, validator) = (&servers.0[0], servers.0[0].admin().await, servers.0[0].validator().await);
        for (what, sql) in [
            ("an eviction", "UPDATE replica SET evicted = TRUE"),
            ("its row is gone", "DELETE FROM replica"),
            ("a database that was put back", "UPDATE change_head SET epoch = epoch + 1"),
            (
                "a head that went back",
                "DELETE FROM change_log WHERE seq = (SELECT seq FROM change_head); UPDATE change_head SET seq = seq - 1",
            ),
            ("a log that does not reach back", "UPDATE change_head SET seq = seq + 5, pruned_seq = seq + 5"),
        ] {
            let (token, secret) = admin.issue("t", &[]).await;
            admin.deactivate(&token.id).await.expect("something in the log");
            admin.activate(&token.id).await.expect("something in the log");
            let one = "SELECT COUNT(*) FROM replica WHERE NOT evicted";
            eventually("it is there", async || (world.db_number(one).await == 1).then_some(())).await;
            let lease = async || world.metric("keyward_fence_lease_seconds").await;
            eventually("it answers from memory", async || (lease().await > 5.0).then_some(())).await;
            assert_eq!(validator.verdict(&secret).await, Verdict::Valid);
            let before = world.queries("register").await;
            // What is changed past every server, nobody hears of; what was known would be told for ever.
            world.db_execute(&format!("UPDATE token SET state = 3 WHERE id = '{}'", token.id)).await;
            assert_eq!(validator.verdict(&secret).await, Verdict::Valid, "from memory");
            world.db_execute(sql).await;
            eventually(what, async || (world.queries("register").await > before).then_some(())).await;
            eventually(what, async || (validator.verdict(&secret).await == Verdict::Revoked).then_some(())).await;
            eventually("it is there again", async || (world.db_number(one).await == 1).then_some(())).await;
        }
    });
}

/// A standby that takes over may not have heard of the last servers that came.
#[test]
fn after_a_failover_changes_wait_for_those_who_are_forgotten() {
    run(async || {
        let servers = Servers::start(2, &[]).await;
        let admin = servers.0[0].admin().await;
        let (one, _) = admin.issue("one", &[]).await;
        assert_eq!(revoke(&admin, &one.id, None).await.expect("revoked").state(), PropagationState::Complete, "on the first timeline");
        for (sql, minute) in [
            // As the head of an older timeline looks to the one that follows it.
            ("UPDATE change_head SET timeline = '00000000'", true),
            ("UPDATE change_head SET history_time = history_time - 59000", false),
        ] {
            servers.0[0].db_execute(sql).await;
            let (token, secret) = admin.issue("t", &[]).await;
            let pending = revoke(&admin, &token.id, Some(Duration::from_secs(if minute { 2 } else { 8 }))).await.expect("revoked");
            let expected = if minute { PropagationState::Pending } else { PropagationState::Complete };
            assert_eq!((pending.state(), pending.replicas.len(), pending.complete_by.is_some()), (expected, 0, minute));
            assert_eq!(servers.0[1].validator().await.verdict(&secret).await, Verdict::Revoked);
        }
    });
}

/// The order of numbers is the order of commits: whoever reads the log never meets a number that comes later and is smaller.
#[test]
fn a_change_that_is_slow_to_commit_is_not_missed() {
    run(async || {
        let mut servers = Servers::start(2, &[]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let admins = servers.everywhere(&servers.0[0].admin().await).await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        for _ in 0..3 {
            let (slow, slow_secret) = admins[2].issue("slow", &[]).await;
            let (quick, quick_secret) = admins[0].issue("quick", &[]).await;
            for secret in [&slow_secret, &quick_secret] {
                assert_eq!(verdicts(&validators, secret).await, [Verdict::Valid; 3]);
            }
            proxy.hold_before(b"COMMIT".to_vec());
            let first = tokio::spawn({
                let (admin, id) = (admins[2].clone(), slow.id.clone());
                async move { revoke(&admin, &id, None).await }
            });
            eventually("the first has its number", async || proxy.is_holding().then_some(())).await;
            let second = tokio::spawn({
                let (admin, id) = (admins[0].clone(), quick.id.clone());
                async move { revoke(&admin, &id, None).await }
            });
            // The second cannot have its number before the first is through.
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(!second.is_finished());
            proxy.release();
            for done in [first, second] {
                assert_eq!(done.await.expect("a task").expect("revoked").state(), PropagationState::Complete);
            }
            for secret in [&slow_secret, &quick_secret] {
                assert_eq!(verdicts(&validators, secret).await, [Verdict::Revoked; 3]);
            }
        }
    });
}

/// The reply of the store comes after the revocation has returned elsewhere.
#[test]
fn who_joins_a_flight_after_a_revocation_elsewhere_reads_anew() {
    run(async || {
        let mut servers = Servers::start(1, &[]).await;
        let proxy = servers.add_behind_proxy(&[]).await;
        let admin = servers.0[0].admin().await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        let (token, secret) = admin.issue("t", &[]).await;
        validators[1].verdict("warm").await;
        proxy.hold_after(servers.0[0].db_digest(&token.id).await);
        let ask = || {
            let (validator, secret) = (validators[1].clone(), secret.clone());
            tokio::spawn(async move { validator.verdict(&secret).await })
        };
        let early = ask();
        eventually("the flight is in the air", async || proxy.is_holding().then_some(())).await;
        assert_eq!(revoke(&admin, &token.id, None).await.expect("revoked").state(), PropagationState::Complete);
        let misses = servers.0[1].metric("keyward_cache_misses_total").await;
        let late = ask();
        eventually("it has joined", async || (servers.0[1].metric("keyward_cache_misses_total").await > misses).then_some(())).await;
        proxy.release();
        assert_eq!(late.await.expect("an answer"), Verdict::Revoked);
        assert!(matches!(early.await.expect("an answer"), Verdict::Valid | Verdict::Revoked));
        assert_eq!(validators[1].verdict(&secret).await, Verdict::Revoked);
    });
}

/// A server that was evicted registers anew; meanwhile no change waits for it.
#[test]
fn what_is_read_before_a_server_is_registered_is_not_kept() {
    run(async || {
        let mut servers = Servers::start(1, &[]).await;
        let proxy = servers.add_behind_proxy(&[("replica_name", "returning")]).await;
        let admin = servers.0[0].admin().await;
        let validators = servers.everywhere(&servers.0[0].validator().await).await;
        let (token, secret) = admin.issue("t", &[]).await;
        validators[1].verdict("warm").await;
        // Its name is sent when it registers.
        proxy.hold_before(b"returning".to_vec());
        servers.0[0].db_execute("UPDATE replica SET evicted = TRUE WHERE address = 'returning'").await;
        eventually("it has forgotten everything", async || proxy.is_holding().then_some(())).await;
        proxy.hold_after(servers.0[0].db_digest(&token.id).await);
        let early = tokio::spawn({
            let (validator, secret) = (validators[1].clone(), secret.clone());
            async move { validator.verdict(&secret).await }
        });
        eventually("the token is being read", async || proxy.is_holding().then_some(())).await;
        assert_eq!(revoke(&admin, &token.id, None).await.expect("revoked").state(), PropagationState::Complete);
        proxy.release_requests();
        let lease = async || servers.0[1].metric("keyward_fence_lease_seconds").await;
        eventually("it answers from memory again", async || (lease().await > 0.0).then_some(())).await;
        proxy.release();
        assert!(matches!(early.await.expect("an answer"), Verdict::Valid | Verdict::Revoked));
        assert_eq!(validators[1].verdict(&secret).await, Verdict::Revoked);
    });
}

/// As in a folder that they share.
#[test]
fn servers_that_start_at_once_with_the_place_of_a_keyring_in_common_have_one_keyring() {
    run(async || {
        let first = World::unstarted(Backend::Postgres).await;
        let keyring = first.folder.path().join("keyring").display().to_string();
        let mut starts = Vec::new();
        for _ in 0..3 {
            let mut world = World::unstarted(Backend::Postgres).await;
            world.settings.insert("database_url", first.settings["database_url"].clone());
            world.settings.insert("keyring_file", keyring.clone());
            starts.push(tokio::spawn(async move { world.try_start_server().await.map(|()| world) }));
        }
        let mut worlds = Vec::new();
        for start in starts {
            worlds.push(start.await.expect("a task").expect("a server"));
        }
        let root = worlds.iter().find(|world| !world.root_token().is_empty()).expect("somebody was shown it").root_token().to_owned();
        for world in &worlds {
            assert_eq!(world.bearer(&root).await.verdict(&root).await, Verdict::Valid);
        }
    });
}

/// Servers that are restarted one after the other know each other's tokens at any time.
#[test]
fn a_keyring_is_rotated_in_two_steps_while_servers_serve() {
    run(async || {
        let mut servers = Servers::start(2, &[]).await;
        let keyrings = [0, 1].map(|number: usize| servers.0[number].folder.path().join("own keyring"));
        let common = servers.0[0].folder.path().join("data/keyring");
        let root = servers.0[0].root_token().to_owned();
        for (step, made_with) in [("add", "A"), ("promote", "B")] {
            let output = world::keyward().args(["keyring", step, "--keyring-file"]).arg(&common).output().expect("it runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            for number in 0..2 {
                std::fs::copy(&common, &keyrings[number]).expect("copied");
                servers.0[number].settings.insert("keyring_file", keyrings[number].display().to_string());
                servers.0[number].restart().await;
                let mut secrets = vec![root.clone()];
                for world in &servers.0 {
                    secrets.push(world.bearer(&root).await.issue("t", &[]).await.1);
                }
                assert_eq!(&secrets[number + 1][3..4], made_with);
                for world in &servers.0 {
                    for secret in &secrets {
                        assert_eq!(world.bearer(&root).await.verdict(secret).await, Verdict::Valid, "{step} {number}");
                    }
                }
            }
        }
    });
}

/// Each of them would make a keyring of its own.
#[test]
fn servers_that_start_on_an_empty_database_at_once_have_one_keyring_and_one_root_token() {
    run(async || {
        let first = World::unstarted(Backend::Postgres).await;
        let mut starts = Vec::new();
        for number in 0..3 {
            let mut world = World::unstarted(Backend::Postgres).await;
            world.settings.insert("database_url", first.settings["database_url"].clone());
            world.settings.insert("replica_name", format!("server {number}"));
            starts.push(tokio::spawn(async move {
                let started = world.try_start_server().await;
                (world, started)
            }));
        }
        let mut serving = 0;
        for start in starts {
            match start.await.expect("a task") {
                (mut world, Ok(())) => {
                    serving += 1;
                    world.stop_server().await;
                }
                (_, Err(said)) => assert!(said.contains("keyring"), "{said}"),
            }
        }
        assert_eq!(serving, 1, "the others have another keyring");
        assert_eq!(first.db_number("SELECT COUNT(*) FROM token WHERE is_root").await, 1);
    });
}
