//! What must work, row by row: each test states one thing that users of a source system are shown.

use std::{collections::BTreeSet, process::Command, time::Duration};

use keyward::proto::{self, TokenKind, TokenState, Verdict, create_my_token_request::Lifetime as Mine, create_token_request::Lifetime};
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, Statement};
use tonic::Code;

use crate::{
    acts::{fields, refusal, wire_days},
    notices::{alert, ending, faults, mailbox, wish},
    world::{Actor, BEGINNING, Backend, World, eventually, keyward, new_token},
};

const DAY: Duration = Duration::from_hours(24);

crate::on_both_databases!(
    row_01_a_workspace_lists_all_of_its_tokens_with_their_makers_and_dates,
    row_02_a_token_has_a_meaningful_name_and_a_life_of_7_30_or_90_days_or_for_ever,
    row_03_a_value_is_shown_once_and_never_again,
    row_04_deleting_a_token_ends_its_access_at_once,
    row_05_tokens_carry_the_brand_of_their_workspace,
    row_06_anybody_gets_a_temporary_token_that_ends_with_its_login_session,
    row_07_administrators_alone_create_permanent_tokens_for_one_user_and_a_year_at_most,
    row_08_a_fault_appears_so_many_days_before_a_token_ends,
    row_09_addresses_separated_by_semicolons_get_a_mail_before_a_token_ends,
    row_10_a_token_belongs_to_one_product_and_may_end_at_a_date_and_time,
    row_11_a_token_is_shown_with_name_prefix_dates_usage_and_status,
    row_12_the_prefix_can_be_copied_and_a_token_regenerated_switched_and_revoked,
    row_13_a_token_is_active_inactive_expired_or_revoked,
    row_14_a_token_reaches_what_its_scopes_name_in_the_table_of_resources,
    row_15_each_application_has_a_token_that_is_tracked_and_revoked_alone,
    row_16_an_administrator_sees_every_token_with_masked_value_user_dates_and_status,
    row_17_a_user_creates_a_token_by_name_and_a_date_later_than_today,
    row_18_the_full_value_comes_once_and_the_token_is_listed_as_active,
);

fn at(span: Duration) -> Option<Timestamp> {
    Some(Timestamp { seconds: BEGINNING.micros() / 1_000_000 + span.as_secs() as i64, nanos: 0 })
}

async fn list(actor: &Actor) -> Vec<proto::Token> {
    actor.list(proto::ListTokensRequest::default()).await.expect("a list").tokens
}

async fn row_01_a_workspace_lists_all_of_its_tokens_with_their_makers_and_dates(world: World) {
    world.add_workspace("shop", "shop").await;
    let ann = world.actor_in("shop", "ann", &["keyward:admin"]).await;
    let ben = world.actor_in("shop", "ben", &["keyward:admin"]).await;
    world.advance(DAY);
    ann.issue("Billing export", &[]).await;
    world.advance(DAY);
    let forever =
        proto::CreateTokenRequest { lifetime: Some(Lifetime::Never(true)), principal: "ann".to_owned(), ..new_token("Site search", &[]) };
    ben.create(forever).await.expect("created");
    world.admin().await.issue("of another workspace", &[]).await;
    let tokens = list(&ann).await;
    let shown: Vec<_> =
        tokens.iter().map(|token| (token.display_name.as_str(), token.created_by.as_str(), token.expire_time, token.create_time)).collect();
    let wanted = [
        ("Site search", "ben", None, at(2 * DAY)),
        ("Billing export", "ann", at(91 * DAY), at(DAY)),
        ("token of ben", "root", at(90 * DAY), at(Duration::ZERO)),
        ("token of ann", "root", at(90 * DAY), at(Duration::ZERO)),
    ];
    assert_eq!(shown[..2], wanted[..2], "the newest first");
    assert_eq!(shown.iter().collect::<Vec<_>>().len(), 4);
    assert!(wanted.iter().all(|row| shown.contains(row)), "{shown:?}");
}

async fn row_02_a_token_has_a_meaningful_name_and_a_life_of_7_30_or_90_days_or_for_ever(world: World) {
    world.add_workspace("shop", "shop").await;
    let ann = world.actor_in("shop", "ann", &["keyward:admin"]).await;
    let lives = [Lifetime::Ttl(wire_days(7)), Lifetime::Ttl(wire_days(30)), Lifetime::Ttl(wire_days(90)), Lifetime::Never(true)];
    let mut secrets = Vec::new();
    for (index, lifetime) in lives.into_iter().enumerate() {
        let name = format!("Déploiement {index}");
        let created = ann.create(proto::CreateTokenRequest { lifetime: Some(lifetime), ..new_token(&name, &[]) }).await.expect("created");
        let token = created.token.expect("a token");
        assert_eq!(
            (token.display_name.as_str(), token.expire_time),
            (name.as_str(), [at(7 * DAY), at(30 * DAY), at(90 * DAY), None][index])
        );
        secrets.push(created.secret);
    }
    for bad in ["", "   ", "two\nlines"] {
        assert_eq!(fields(ann.create(new_token(bad, &[])).await), ["display_name"], "{bad:?}");
    }
    // Each ends at its very instant; in between it is good. The asker is to outlive them.
    let all: Vec<&str> = secrets.iter().map(String::as_str).collect();
    let root = world.root().await;
    let instant = Duration::from_micros(1);
    for (gone, days) in [(0, 7), (1, 30), (2, 90)] {
        let passed = Duration::from_micros((world.clock.now().micros() - BEGINNING.micros()) as u64);
        world.advance(days * DAY - instant - passed);
        let before: Vec<_> = (0..4).map(|index| if index < gone { Verdict::Expired } else { Verdict::Valid }).collect();
        assert_eq!(root.verdicts(&all).await, before, "day {days}, nearly");
        world.advance(instant);
        let after: Vec<_> = (0..4).map(|index| if index <= gone { Verdict::Expired } else { Verdict::Valid }).collect();
        assert_eq!(root.verdicts(&all).await, after, "day {days}");
    }
    world.advance(50 * 365 * DAY);
    assert_eq!(root.verdict(all[3]).await, Verdict::Valid);
}

async fn row_03_a_value_is_shown_once_and_never_again(world: World) {
    let (root, admin) = (world.root().await, world.admin().await);
    let (token, secret) = admin.issue("t", &["keyward:self"]).await;
    let holder = world.bearer(&secret).await;
    assert!(!format!("{token:?}").contains(&secret), "not even beside it");
    let name = proto::Token { id: token.id.clone(), display_name: "u".to_owned(), ..Default::default() };
    let ask = proto::ValidateTokenRequest { token: secret.clone(), ..Default::default() };
    let asked = proto::ListAuditEventsRequest { token_id: token.id.clone(), ..Default::default() };
    let said = [
        format!("{:?}", admin.get(&token.id).await.expect("found")),
        format!("{:?}", list(&admin).await),
        format!("{:?}", admin.ask(ask).await.expect("an answer")),
        format!("{:?}", holder.who().await.expect("known")),
        format!("{:?}", holder.list_own(proto::ListMyTokensRequest::default()).await.expect("a list")),
        format!("{:?}", admin.update(name, &["display_name"]).await.expect("done")),
        format!("{:?}", admin.deactivate(&token.id).await.expect("done")),
        format!("{:?}", holder.who().await.expect_err("it is switched off")),
        format!("{:?}", admin.activate(&token.id).await.expect("done")),
        format!("{:?}", admin.create(new_token(&secret.repeat(3), &[&secret])).await.expect_err("neither a name nor a scope")),
        format!("{:?}", admin.get(&secret).await.expect_err("no id")),
        format!("{:?}", admin.revoke(&token.id).await.expect("done")),
        format!("{:?}", admin.events(asked).await.expect("events")),
        world.metrics().await,
    ];
    // What is there may be as little as the hint.
    let (kept, tail) = secret.split_at(8);
    for (index, text) in said.iter().enumerate() {
        assert!(!text.contains(tail) && !text.contains(&secret[..12]), "answer {index}");
    }
    assert_eq!(kept, token.hint);
    // Nor is it in any table.
    let db = world.db().await;
    let tables = match world.backend {
        Backend::Sqlite => "SELECT name FROM sqlite_master WHERE type = 'table'",
        Backend::Postgres => "SELECT CAST(tablename AS TEXT) FROM pg_tables WHERE schemaname = 'public'",
    };
    let rows = async |sql: &str| db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect("rows");
    let tables: Vec<String> = rows(tables).await.iter().map(|row| row.try_get_by_index(0).expect("text")).collect();
    assert!(tables.iter().any(|table| table == "token") && tables.len() >= 8, "{tables:?}");
    for table in tables {
        let columns = match world.backend {
            Backend::Sqlite => format!("SELECT name FROM pragma_table_info('{table}')"),
            Backend::Postgres => format!("SELECT CAST(column_name AS TEXT) FROM information_schema.columns WHERE table_name = '{table}'"),
        };
        for column in rows(&columns).await {
            let column: String = column.try_get_by_index(0).expect("text");
            let found = format!(
                "SELECT COUNT(*) FROM {table} WHERE CAST(\"{column}\" AS TEXT) LIKE '%{tail}%' OR CAST(\"{column}\" AS TEXT) LIKE '%{}%'",
                &secret[..12]
            );
            assert_eq!(world.db_number(&found).await, 0, "{table}.{column}");
        }
    }
    drop(root);
}

async fn row_04_deleting_a_token_ends_its_access_at_once(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let gateways = [world.validator().await, world.actor("second", &["keyward:validate"]).await, world.root().await];
    let (_, neighbour) = admin.issue("neighbour", &[]).await;
    for round in 0..10 {
        let (token, secret) = admin.issue(&format!("round {round}"), &["keyward:self"]).await;
        let holder = world.bearer(&secret).await;
        if round % 2 == 0 {
            for gateway in &gateways {
                assert_eq!(gateway.use_token(&secret).await, Verdict::Valid);
            }
            holder.who().await.expect("known");
        }
        admin.delete(&token.id).await.expect("done");
        for gateway in &gateways {
            assert_eq!(gateway.verdict(&secret).await, Verdict::Unknown, "round {round}");
        }
        assert_eq!(gateways[0].verdicts(&[&secret, &neighbour]).await, [Verdict::Unknown, Verdict::Valid]);
        assert_eq!(refusal(holder.who().await), Code::Unauthenticated);
        assert_eq!(refusal(admin.get(&token.id).await), Code::NotFound);
        assert!(list(&admin).await.iter().all(|other| other.id != token.id));
        assert_eq!(refusal(admin.activate(&token.id).await), Code::NotFound, "it does not come back");
    }
    drop(validator);
}

async fn row_05_tokens_carry_the_brand_of_their_workspace(world: World) {
    world.add_workspace("acme", "acme").await;
    world.add_workspace("globex", "gx9").await;
    let root = world.root().await;
    for (workspace, brand) in [("acme", "acme_"), ("globex", "gx9_"), ("default", "kw_")] {
        let admin = world.actor_in(workspace, "admin", &["keyward:admin", "keyward:self"]).await;
        let (token, secret) = admin.issue("t", &[]).await;
        let (_, temporary) = admin.temporary("s", &[]).await.expect("issued");
        let again = admin.regenerate(&token.id, 0).await.expect("done").secret;
        let own = proto::CreateMyTokenRequest { display_name: "mine".to_owned(), ..Default::default() };
        let own = admin.create_own(own).await.expect("created").secret;
        for text in [&secret, &temporary, &again, &own, admin.token.as_ref().expect("a token")] {
            assert!(text.starts_with(brand) && text.len() == brand.len() + 45, "{workspace}: {}", &text[..8]);
            assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "a double click selects it");
        }
        assert_eq!(
            root.verdicts(&[&secret, &temporary, &again, &own]).await,
            [Verdict::Unknown, Verdict::Valid, Verdict::Valid, Verdict::Valid]
        );
        // Another brand does not make it another's.
        let swapped = secret.replacen(brand, if brand == "acme_" { "gx9_" } else { "acme_" }, 1);
        assert_eq!(root.verdict(&swapped).await, Verdict::Unknown);
        for answer in [admin.workspace("").await.expect("its own").prefix, admin.get(&token.id).await.expect("found").hint] {
            assert!(answer.starts_with(brand.trim_end_matches('_')), "{answer}");
        }
    }
}

async fn row_06_anybody_gets_a_temporary_token_that_ends_with_its_login_session(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (alice, bob) = (world.member("alice").await, world.member("bob").await);
    // At each login one, made by the platform for whoever logged in, or by the user.
    let mut logins = Vec::new();
    for (number, user) in ["alice", "alice", "bob"].iter().enumerate() {
        let request = proto::CreateTokenRequest {
            principal: (*user).to_owned(),
            kind: TokenKind::Temporary.into(),
            session_id: format!("login-{number}"),
            ..new_token("Web session", &["keyward:self"])
        };
        let created = admin.create(request).await.expect("created");
        assert_eq!(created.token.expect("a token").session_id, format!("login-{number}"));
        logins.push(created.secret);
    }
    let (_, asked) = world.bearer(&logins[0]).await.temporary("", &[]).await.expect("any user can get one");
    let (_, bobs) = bob.temporary("login-2", &[]).await.expect("any user can get one");
    let all = [&*logins[0], &*logins[1], &*logins[2], &*asked, &*bobs];
    assert_eq!(validator.verdicts(&all).await, [Verdict::Valid; 5]);
    assert_eq!(world.bearer(&logins[0]).await.end_session("").await.expect("logged out"), 2);
    let [valid, revoked, expired] = [Verdict::Valid, Verdict::Revoked, Verdict::Expired];
    assert_eq!(validator.verdicts(&all).await, [revoked, valid, valid, revoked, valid]);
    assert_eq!(admin.end_session("login-2").await.expect("logged out by the platform"), 2);
    assert_eq!(validator.verdicts(&all).await, [revoked, valid, revoked, revoked, revoked]);
    alice.who().await.expect("what is bound to no session goes on");
    // And a session that nobody ends ends by itself.
    world.advance(DAY);
    assert_eq!(validator.verdict(&logins[1]).await, expired);
}

async fn row_07_administrators_alone_create_permanent_tokens_for_one_user_and_a_year_at_most(world: World) {
    let admin = world.admin().await;
    let policy = proto::Policy { permanent_requires_admin: true, ..Default::default() };
    admin.set_policy("", policy, &["policy.permanent_requires_admin"]).await.expect("changed");
    let alice = world.member("alice").await;
    let mine = || proto::CreateMyTokenRequest { display_name: "mine".to_owned(), ..Default::default() };
    assert_eq!(refusal(alice.create_own(mine()).await), Code::PermissionDenied);
    assert_eq!(refusal(alice.create(new_token("t", &[])).await), Code::PermissionDenied);
    alice.temporary("", &[]).await.expect("a temporary one is for everybody");
    let of = |user: &str, days| {
        let lifetime = Some(if days == 0 { Lifetime::Never(true) } else { Lifetime::Ttl(wire_days(days)) });
        proto::CreateTokenRequest { principal: user.to_owned(), lifetime, ..new_token("t", &["agents:list"]) }
    };
    for user in ["admin", "alice", "somebody.new@example.com"] {
        let created = admin.create(of(user, 365)).await.expect("for themselves or for any user");
        let token = created.token.expect("a token");
        assert_eq!((token.principal.as_str(), token.created_by.as_str(), token.expire_time), (user, "admin", at(365 * DAY)));
        let answer = admin.ask(proto::ValidateTokenRequest { token: created.secret, ..Default::default() }).await.expect("an answer");
        assert_eq!(answer.principal, user, "bound to one user");
        let moved = proto::Token { id: token.id.clone(), principal: "eve".to_owned(), ..Default::default() };
        assert_eq!(fields(admin.update(moved, &["principal"]).await), ["update_mask.paths[0]"], "always");
        let later = proto::Token { id: token.id, expire_time: at(365 * DAY + Duration::from_secs(1)), ..Default::default() };
        assert_eq!(fields(admin.update(later, &["expire_time"]).await), ["token.expire_time"], "after one year at the latest");
    }
    assert_eq!(fields(admin.create(of("alice", 366)).await), ["ttl"]);
    assert_eq!(fields(admin.create(of("alice", 0)).await), ["never"]);
    admin.create(of("alice", 1)).await.expect("a new one can always be made");
}

async fn row_08_a_fault_appears_so_many_days_before_a_token_ends(world: World) {
    let world = alert(world, &[]).await;
    wish(&world, proto::Notices { raise_faults: true, days_before: vec![10], ..Default::default() }).await;
    let admin = world.admin().await;
    let token = ending(&admin, &world, "nightly import", 11 * DAY).await;
    assert!(faults(&admin).await.is_empty());
    world.advance(DAY);
    let [fault]: [proto::Fault; 1] =
        eventually("a fault", async || Some(faults(&admin).await).filter(|faults| !faults.is_empty())).await.try_into().expect("one");
    assert_eq!((fault.token_id, fault.days_before, fault.expire_time), (token.id.clone(), 10, token.expire_time));
    let mut command: Command = keyward();
    command.args(["faults", "--address", &format!("http://{}", world.server().address())]).env("KEYWARD_TOKEN", world.root_token());
    let shown = tokio::task::spawn_blocking(move || command.output()).await.expect("ran").expect("ran").stdout;
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("nightly import") && shown.contains(&fault.id), "{shown}");
    admin.update(proto::Token { expire_time: at(41 * DAY), etag: String::new(), ..token }, &["expire_time"]).await.expect("prolonged");
    assert!(faults(&admin).await.is_empty(), "it clears by itself");
}

async fn row_09_addresses_separated_by_semicolons_get_a_mail_before_a_token_ends(world: World) {
    let Some((mailbox, settings)) = mailbox() else { return };
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let world = alert(world, &settings).await;
    let root = world.root().await;
    let wishes = |emails: &str| proto::Workspace {
        id: "default".to_owned(),
        notices: Some(proto::Notices { emails: emails.to_owned(), days_before: vec![10], ..Default::default() }),
        ..Default::default()
    };
    let refused = root.update_workspace(wishes("ops@example.test; nobody"), &["notices"]).await;
    assert!(refused.as_ref().is_err_and(|status| status.message().contains("nobody")), "the bad address is named: {refused:?}");
    assert_eq!(fields(refused), ["workspace.notices.emails"]);
    let kept = root.update_workspace(wishes(" ops@example.test;oncall@example.test ; "), &["notices"]).await.expect("changed");
    assert_eq!(kept.notices.expect("there").emails, "ops@example.test; oncall@example.test");
    let token = ending(&root, &world, "nightly import", 11 * DAY).await;
    world.advance(DAY);
    let mails = mailbox.wait_for(2, Duration::from_secs(20)).await;
    assert_eq!(mails.iter().flat_map(|mail| &mail.to).collect::<BTreeSet<_>>().len(), 2);
    for mail in &mails {
        let (text, html) = (mail.text.as_deref().expect("text"), mail.html.as_deref().expect("HTML"));
        for part in [text, html] {
            assert!(part.contains("nightly import") && part.contains(&token.hint) && part.contains("2027-01-26"), "{part}");
        }
        assert!(mail.subject.contains("nightly import") && mail.subject.contains("10 days"), "{}", mail.subject);
    }
}

async fn row_10_a_token_belongs_to_one_product_and_may_end_at_a_date_and_time(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let end = at(30 * DAY + Duration::from_secs(5_025));
    let request =
        |product: &str, lifetime| proto::CreateTokenRequest { audiences: vec![product.to_owned()], lifetime, ..new_token(product, &[]) };
    let dated = admin.create(request("agent-builder", end.map(Lifetime::ExpireTime))).await.expect("created");
    world.relax().await;
    let endless = admin.create(request("analytics", Some(Lifetime::Never(true)))).await.expect("created");
    let ask = async |token: &str, product: &str| {
        let message = proto::ValidateTokenRequest { token: token.to_owned(), audience: product.to_owned(), ..Default::default() };
        validator.ask(message).await.expect("an answer").verdict()
    };
    assert_eq!(ask(&dated.secret, "agent-builder").await, Verdict::Valid);
    assert_eq!(ask(&dated.secret, "analytics").await, Verdict::WrongAudience);
    assert_eq!(ask(&endless.secret, "analytics").await, Verdict::Valid);
    assert_eq!(ask(&endless.secret, "agent-builder").await, Verdict::WrongAudience);
    let of = proto::ListTokensRequest { audience: "analytics".to_owned(), ..Default::default() };
    let of = admin.list(of).await.expect("a list").tokens;
    assert_eq!(of.iter().map(|token| (token.display_name.as_str(), token.expire_time)).collect::<Vec<_>>(), [("analytics", None)]);
    assert_eq!(dated.token.expect("a token").expire_time, end, "to the second");
    world.advance(30 * DAY + Duration::from_secs(5_024));
    assert_eq!(ask(&dated.secret, "agent-builder").await, Verdict::Valid);
    world.advance(Duration::from_secs(1));
    assert_eq!(ask(&dated.secret, "agent-builder").await, Verdict::Expired);
    assert_eq!(ask(&endless.secret, "analytics").await, Verdict::Valid);
}

async fn row_11_a_token_is_shown_with_name_prefix_dates_usage_and_status(world: World) {
    world.add_workspace("prod", "prod").await;
    let admin = world.actor_in("prod", "admin", &["keyward:admin"]).await;
    let gateway = world.actor_in("prod", "gateway", &["keyward:validate"]).await;
    world.advance(DAY);
    let request = proto::CreateTokenRequest { lifetime: Some(Lifetime::Never(true)), ..new_token("Order sync", &[]) };
    let created = admin.create(request).await.expect("created");
    let id = created.token.expect("a token").id;
    let shown = admin.get(&id).await.expect("found");
    assert_eq!((shown.display_name.as_str(), shown.hint.as_str(), shown.hint.len()), ("Order sync", &created.secret[..8], 8));
    assert!(shown.hint.starts_with("prod_"), "{}", shown.hint);
    assert_eq!((shown.create_time, shown.expire_time, shown.state()), (at(DAY), None, TokenState::Active));
    assert_eq!((shown.use_count, shown.last_used_time), (0, None));
    world.advance(Duration::from_secs(9));
    for _ in 0..7 {
        assert_eq!(gateway.use_token(&created.secret).await, Verdict::Valid);
    }
    assert_eq!(gateway.verdict(&created.secret).await, Verdict::Valid, "a look is no use");
    let wrong =
        proto::ValidateTokenRequest { token: created.secret.clone(), required_scopes: vec!["a:b".to_owned()], ..Default::default() };
    assert_eq!(gateway.ask(wrong).await.expect("an answer").verdict(), Verdict::InsufficientScope, "nor is a refusal");
    let used =
        eventually("the uses are counted", async || Some(admin.get(&id).await.expect("found")).filter(|token| token.use_count >= 7)).await;
    assert_eq!((used.use_count, used.last_used_time), (7, at(DAY + Duration::from_secs(9))));
    let listed = list(&admin).await.into_iter().find(|token| token.id == id).expect("listed");
    assert_eq!((listed.use_count, listed.hint), (7, shown.hint));
}

async fn row_12_the_prefix_can_be_copied_and_a_token_regenerated_switched_and_revoked(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let (token, first) = admin.issue("t", &["a:b"]).await;
    assert_eq!(token.hint, first[..8]);
    let done = admin.regenerate(&token.id, 0).await.expect("done");
    let (renewed, second) = (done.token.expect("a token"), done.secret);
    assert_ne!(first, second);
    assert_eq!(validator.verdicts(&[&first, &second]).await, [Verdict::Unknown, Verdict::Valid], "the previous one is invalid");
    assert_eq!((renewed.id.as_str(), renewed.hint.as_str()), (token.id.as_str(), &second[..8]));
    assert_eq!((&renewed.scopes, renewed.expire_time, &renewed.display_name), (&token.scopes, token.expire_time, &token.display_name));
    assert_eq!(admin.deactivate(&token.id).await.expect("done").state(), TokenState::Inactive);
    assert_eq!(validator.verdict(&second).await, Verdict::Inactive);
    assert_eq!(admin.activate(&token.id).await.expect("done").state(), TokenState::Active);
    assert_eq!(validator.verdicts(&[&first, &second]).await, [Verdict::Unknown, Verdict::Valid], "the previous one stays so");
    assert_eq!(admin.revoke(&token.id).await.expect("done").state(), TokenState::Revoked);
    assert_eq!(validator.verdict(&second).await, Verdict::Revoked);
    for attempt in [
        admin.activate(&token.id).await.map(drop),
        admin.deactivate(&token.id).await.map(drop),
        admin.regenerate(&token.id, 0).await.map(drop),
    ] {
        assert_eq!(refusal(attempt), Code::FailedPrecondition, "for good");
    }
    assert_eq!(admin.get(&token.id).await.expect("it stays listed").state(), TokenState::Revoked);
}

async fn row_13_a_token_is_active_inactive_expired_or_revoked(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let day = |name: &str| proto::CreateTokenRequest { lifetime: Some(Lifetime::Ttl(wire_days(1))), ..new_token(name, &[]) };
    let mut made = Vec::new();
    for name in ["active", "inactive", "revoked"] {
        for request in [new_token(name, &[]), day(&format!("{name} for a day"))] {
            let created = admin.create(request).await.expect("created");
            made.push((created.token.expect("a token").id, created.secret));
        }
    }
    for (id, _) in &made[2..4] {
        admin.deactivate(id).await.expect("done");
    }
    for (id, _) in &made[4..] {
        admin.revoke(id).await.expect("done");
    }
    let states = async || {
        let mut states = Vec::new();
        for (id, _) in &made {
            states.push(admin.get(id).await.expect("found").state());
        }
        states
    };
    let secrets: Vec<&str> = made.iter().map(|(_, secret)| secret.as_str()).collect();
    let [active, inactive, expired, revoked] = [TokenState::Active, TokenState::Inactive, TokenState::Expired, TokenState::Revoked];
    assert_eq!(states().await, [active, active, inactive, inactive, revoked, revoked]);
    let verdicts = [Verdict::Valid, Verdict::Valid, Verdict::Inactive, Verdict::Inactive, Verdict::Revoked, Verdict::Revoked];
    assert_eq!(validator.verdicts(&secrets).await, verdicts);
    // Past its date, by itself.
    world.advance(DAY);
    assert_eq!(states().await, [active, expired, inactive, expired, revoked, revoked]);
    let verdicts = [Verdict::Valid, Verdict::Expired, Verdict::Inactive, Verdict::Expired, Verdict::Revoked, Verdict::Revoked];
    assert_eq!(validator.verdicts(&secrets).await, verdicts);
    for (state, count) in [(active, 3), (inactive, 1), (expired, 2), (revoked, 2)] {
        let asked = proto::ListTokensRequest { states: vec![state.into()], created_by: "admin".to_owned(), ..Default::default() };
        let listed = admin.list(asked).await.expect("a list").tokens;
        assert!(listed.iter().all(|token| token.state() == state));
        assert_eq!(listed.len(), if state == active { 1 } else { count }, "{state:?}");
    }
}

/// The table of resources in `deploy/workspaces/agent-platform.toml`: method, path, scope.
const TABLE: [(&str, &str, &str); 25] = [
    ("GET", "/api/agent-base", "agents:list"),
    ("POST", "/api/agent-base/7/install", "agents:install"),
    ("PATCH", "/api/agent-base/7", "agents:update"),
    ("DELETE", "/api/agent-base/7", "agents:delete"),
    ("GET", "/api/agent-base/7/executions", "executions:list"),
    ("POST", "/api/webhooks/7/send", "webhooks:send"),
    ("GET", "/api/integrations", "integrations:list"),
    ("POST", "/api/integrations", "integrations:create"),
    ("PATCH", "/api/integrations/7", "integrations:update"),
    ("DELETE", "/api/integrations/7", "integrations:delete"),
    ("GET", "/api/knowledge-base", "knowledge-base:list"),
    ("POST", "/api/knowledge-base/search", "knowledge-base:search"),
    ("GET", "/api/triggers", "triggers:list"),
    ("POST", "/api/triggers/7/execute", "triggers:execute"),
    ("GET", "/api/triggers/7", "triggers:details"),
    ("POST", "/api/assistant-chat", "assistant-chat:chat"),
    ("GET", "/api/assistant-chat/7/history", "assistant-chat:history"),
    ("PUT", "/api/storage/a.txt", "storage:upload"),
    ("PUT", "/api/storage/a/b/c.txt", "storage:upload"),
    ("GET", "/api/storage/a.txt", "storage:download"),
    ("GET", "/api/storage/a/b/c.txt", "storage:download"),
    ("DELETE", "/api/storage/a/b", "storage:delete"),
    ("GET", "/api/storage", "storage:list"),
    ("HEAD", "/api/storage/a.txt", "storage:download"),
    ("GET", "/api/agent-base?page=2&path=/api/storage", "agents:list"),
];

/// What leads nowhere, or is read in more than one way.
const NOWHERE: [(&str, &str); 16] = [
    ("GET", "/"),
    ("GET", "/api"),
    ("GET", "/api/agent-base/"),
    ("GET", "/api//agent-base"),
    ("GET", "/api/agent-base/../storage"),
    ("GET", "/api/agent-base/./7"),
    ("GET", "/api/agent-base/%2e%2e/storage"),
    ("GET", "/api/agent-base%2f7/executions"),
    ("GET", "/api/storage/a%5cb"),
    ("GET", "/api/storage/a;b"),
    ("GET", "/api/storage/a%25b"),
    ("GET", "/API/agent-base"),
    ("POST", "/api/agent-base"),
    ("get", "/api/agent-base"),
    ("GET", "/api/agent-base/7"),
    ("GET", "api/agent-base"),
];

async fn row_14_a_token_reaches_what_its_scopes_name_in_the_table_of_resources(world: World) {
    world.add_workspace("agents", "agt").await;
    let admin = world.actor_in("agents", "admin", &["keyward:admin"]).await;
    let gateway = world.actor_in("agents", "gateway", &["keyward:validate"]).await;
    let imported = |file: &str| {
        let mut command: Command = keyward();
        command.args(["workspace", "import", "agents", file]).env("KEYWARD_ADDRESS", world.server().address().to_string());
        let output = command.env("KEYWARD_TOKEN", admin.token.as_deref().expect("a token")).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    imported(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/workspaces/agent-platform.toml"));
    let resources = admin.workspace("").await.expect("its own").resources;
    let names: Vec<_> = resources.iter().map(|resource| resource.resource.as_str()).collect();
    assert_eq!(names, ["agents", "executions", "webhooks", "integrations", "knowledge-base", "triggers", "assistant-chat", "storage"]);
    let ask = async |token: &str, method: &str, path: &str| {
        let (http_method, path) = (method.to_owned(), path.to_owned());
        gateway
            .ask(proto::ValidateTokenRequest { token: token.to_owned(), http_method, path, ..Default::default() })
            .await
            .expect("an answer")
    };
    let (_, everything) = admin.issue("everything", &["*"]).await;
    let (_, nothing) = admin.issue("nothing", &[]).await;
    let (_, named) = admin.issue("named", &["agents:list", "storage:*"]).await;
    for (method, path, scope) in TABLE {
        let answer = ask(&everything, method, path).await;
        assert_eq!((answer.verdict(), answer.derived_scope.as_str()), (Verdict::Valid, scope), "{method} {path}");
        let answer = ask(&nothing, method, path).await;
        assert_eq!(
            (answer.verdict(), answer.missing_scopes.as_slice()),
            (Verdict::InsufficientScope, &[scope.to_owned()][..]),
            "{method} {path}"
        );
        let reached = scope == "agents:list" || scope.starts_with("storage:");
        assert_eq!(ask(&named, method, path).await.valid, reached, "{method} {path}");
        let (_, exact) = admin.issue(scope, &[scope]).await;
        assert!(ask(&exact, method, path).await.valid, "{method} {path} with {scope} alone");
    }
    for (method, path) in NOWHERE {
        let answer = ask(&everything, method, path).await;
        assert_eq!((answer.verdict(), answer.derived_scope.as_str()), (Verdict::InsufficientScope, ""), "{method} {path}");
    }
    // A changed table counts at once, for tokens that exist.
    let moved = proto::Resource { endpoint: "/api/v2/agent-base".to_owned(), ..resources[0].clone() };
    admin.update_workspace(proto::Workspace { resources: vec![moved], ..Default::default() }, &["resources"]).await.expect("changed");
    assert_eq!(ask(&named, "GET", "/api/v2/agent-base").await.verdict(), Verdict::Valid);
    assert_eq!(ask(&named, "GET", "/api/agent-base").await.verdict(), Verdict::InsufficientScope);
    // One half alone asks for nothing that can be answered.
    let half = proto::ValidateTokenRequest { token: named.clone(), path: "/api/v2/agent-base".to_owned(), ..Default::default() };
    assert_eq!(refusal(gateway.ask(half).await), Code::InvalidArgument);
}

async fn row_15_each_application_has_a_token_that_is_tracked_and_revoked_alone(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut applications = Vec::new();
    for name in ["CRM", "ERP", "Shop"] {
        applications.push(admin.issue(name, &["agents:list"]).await);
    }
    for (index, (_, secret)) in applications.iter().enumerate() {
        for _ in 0..=index {
            let message = proto::ValidateTokenRequest { token: secret.clone(), client_ip: format!("10.0.0.{index}"), ..Default::default() };
            assert_eq!(validator.ask(message).await.expect("an answer").verdict(), Verdict::Valid);
        }
    }
    for (index, (token, _)) in applications.iter().enumerate() {
        let tracked = eventually("the uses are counted", async || {
            Some(admin.get(&token.id).await.expect("found")).filter(|token| token.use_count > index as i64)
        })
        .await;
        assert_eq!((tracked.use_count, tracked.last_used_ip), (index as i64 + 1, format!("10.0.0.{index}")));
    }
    world.advance(Duration::from_secs(1));
    admin.revoke(&applications[1].0.id).await.expect("done");
    let secrets: Vec<&str> = applications.iter().map(|(_, secret)| secret.as_str()).collect();
    assert_eq!(validator.verdicts(&secrets).await, [Verdict::Valid, Verdict::Revoked, Verdict::Valid]);
    for (token, _) in &applications {
        let asked = proto::ListAuditEventsRequest { token_id: token.id.clone(), ..Default::default() };
        let methods: Vec<_> = admin.events(asked).await.expect("events").into_iter().map(|event| event.method).collect();
        let wanted: &[&str] = if token.id == applications[1].0.id { &["RevokeToken", "CreateToken"] } else { &["CreateToken"] };
        assert_eq!(methods, wanted, "each has a history of its own");
    }
}

async fn row_16_an_administrator_sees_every_token_with_masked_value_user_dates_and_status(world: World) {
    let (admin, validator) = (world.admin().await, world.validator().await);
    let mut secrets = Vec::new();
    for user in ["alice", "bob"] {
        let member = world.member(user).await;
        let made = member
            .create_own(proto::CreateMyTokenRequest { display_name: format!("{user}'s"), ..Default::default() })
            .await
            .expect("created");
        secrets.push((made.token.expect("a token").id, made.secret));
    }
    world.advance(DAY);
    assert_eq!(validator.use_token(&secrets[0].1).await, Verdict::Valid);
    admin.revoke(&secrets[1].0).await.expect("done");
    let used = eventually("the use is counted", async || {
        let listed = list(&admin).await;
        listed.iter().any(|token| token.id == secrets[0].0 && token.use_count == 1).then_some(listed)
    })
    .await;
    let names: BTreeSet<_> = used.iter().map(|token| token.display_name.as_str()).collect();
    let everybody =
        ["Root token of the first start", "alice's", "bob's", "token of admin", "token of alice", "token of bob", "token of gateway"];
    assert_eq!(names.into_iter().collect::<Vec<_>>(), everybody, "every token");
    for ((id, secret), (user, last_used, state)) in
        secrets.iter().zip([("alice", at(DAY), TokenState::Active), ("bob", None, TokenState::Revoked)])
    {
        let token = used.iter().find(|token| token.id == *id).expect("listed");
        assert_eq!((token.principal.as_str(), token.hint.as_str()), (user, &secret[..8]), "the value is masked");
        assert_eq!((token.create_time, token.last_used_time), (at(Duration::ZERO), last_used));
        assert_eq!((token.expire_time, token.state()), (at(90 * DAY), state));
        assert!(!format!("{token:?}").contains(&secret[8..]));
    }
    assert_eq!(refusal(world.member("alice").await.list(proto::ListTokensRequest::default()).await), Code::PermissionDenied);
}

async fn row_17_a_user_creates_a_token_by_name_and_a_date_later_than_today(world: World) {
    let (alice, bob) = (world.member("alice").await, world.member("bob").await);
    let day = |day: &str| proto::CreateMyTokenRequest {
        display_name: "Notebook".to_owned(),
        lifetime: Some(Mine::ExpireDate(day.to_owned())),
        ..Default::default()
    };
    for bad in ["2027-01-15", "2026-12-31", "15.02.2027", "2027-02-30"] {
        assert_eq!(fields(alice.create_own(day(bad)).await), ["expire_date"], "{bad}");
    }
    let own = async |actor: &Actor| actor.list_own(proto::ListMyTokensRequest::default()).await.expect("a list");
    assert_eq!(own(&alice).await.len(), 1, "nothing came of it");
    let made = alice.create_own(day("2027-01-16")).await.expect("tomorrow").token.expect("a token");
    assert_eq!((made.principal.as_str(), made.created_by.as_str(), made.kind()), ("alice", "alice", TokenKind::Permanent));
    assert_eq!(made.expire_time, at(Duration::from_hours(16)));
    let mine = own(&alice).await;
    assert_eq!(mine.iter().filter(|token| token.display_name == "Notebook").count(), 1);
    assert!(mine.iter().all(|token| token.principal == "alice"));
    assert!(own(&bob).await.iter().all(|token| token.principal == "bob"), "a list of one's own");
    assert_eq!(
        refusal(alice.create_own(proto::CreateMyTokenRequest { scopes: vec!["keyward:admin".to_owned()], ..day("2027-02-01") }).await),
        Code::PermissionDenied
    );
}

async fn row_18_the_full_value_comes_once_and_the_token_is_listed_as_active(world: World) {
    let (alice, validator) = (world.member("alice").await, world.validator().await);
    let request = proto::CreateMyTokenRequest {
        display_name: "Notebook".to_owned(),
        lifetime: Some(Mine::ExpireDate("2027-03-01".to_owned())),
        request_id: "form-1".to_owned(),
        ..Default::default()
    };
    let made = alice.create_own(request.clone()).await.expect("created");
    assert_eq!(validator.verdict(&made.secret).await, Verdict::Valid, "the whole value");
    let own = async || alice.list_own(proto::ListMyTokensRequest::default()).await.expect("a list");
    let listed: Vec<_> = own().await.into_iter().filter(|token| token.display_name == "Notebook").collect();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].state(), listed[0].expire_time), (TokenState::Active, Some("2027-03-01T00:00:00Z".parse().expect("an instant"))));
    assert!(!format!("{:?}", own().await).contains(&made.secret[8..]));
    // A form that is sent twice makes one token.
    assert_eq!(alice.create_own(request.clone()).await.expect("the same answer").secret, made.secret);
    assert_eq!(own().await.len(), 2);
    world.advance(Duration::from_mins(10));
    let other = alice.create_own(request).await.expect("another one");
    assert_ne!(other.secret, made.secret, "the first is not shown again");
}
