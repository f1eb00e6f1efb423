//! What is told of tokens, and when: steps, faults, mails, calls of webhooks, events.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use keyward::{
    ambient::Time,
    notices::{Notices, Settings},
    proto::{self, NoticeEvent},
    store::{FaultFilter, Store},
    token::Keyring,
};
use prost_types::Timestamp;
use serde_json::Value;
use tonic::Code;

use crate::{
    mailbox::{MailTls, Mailbox, MailboxOptions, Mode},
    receiver::{Behaviour, Call, Receiver},
    world::{Actor, BEGINNING, World, eventually, lax_policy, new_token},
};

crate::on_both_databases!(
    a_step_raises_a_fault_that_clears_by_itself,
    four_hundred_days_of_steps_are_told_at_their_instants,
    what_was_overtaken_is_not_sent,
    events_are_told_where_the_workspace_wants_them,
    a_server_that_was_down_tells_later,
    wishes_that_come_later_are_told_what_is_near,
    temporary_tokens_cause_no_notices_but_of_leaks,
    a_suspended_workspace_tells_nothing,
    a_bulk_revocation_tells_in_bounded_mails,
);

const DAY: Duration = Duration::from_hours(24);
const SOON: Duration = Duration::from_secs(20);

/// A world whose server looks for steps every second.
pub async fn alert(mut world: World, settings: &[(&'static str, &str)]) -> World {
    world.settings.insert("notices_interval", "1s".to_owned());
    world.settings.insert("webhook_allowed_cidrs", "127.0.0.0/8".to_owned());
    world.settings.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
    world.restart().await;
    world
}

/// Sets what workspace `default` is told.
pub async fn wish(world: &World, notices: proto::Notices) -> proto::Workspace {
    let root = world.root().await;
    let workspace = proto::Workspace { id: "default".to_owned(), notices: Some(notices), policy: Some(lax_policy()), ..Default::default() };
    root.update_workspace(workspace, &["notices", "policy"]).await.expect("changed")
}

pub async fn faults(actor: &Actor) -> Vec<proto::Fault> {
    let message = proto::ListFaultsRequest { page_size: 1_000, ..Default::default() };
    actor.notices().list_faults(actor.request(message)).await.expect("a list").into_inner().faults
}

pub async fn pending(actor: &Actor) -> Vec<proto::Notice> {
    let message = proto::ListNoticesRequest { page_size: 1_000, ..Default::default() };
    actor.notices().list_notices(actor.request(message)).await.expect("a list").into_inner().notices
}

/// A token that ends so long from now.
pub async fn ending(actor: &Actor, world: &World, name: &str, span: Duration) -> proto::Token {
    let end = world.clock.now() + span;
    let lifetime = Some(proto::create_token_request::Lifetime::ExpireTime(timestamp(end)));
    let created = actor.create(proto::CreateTokenRequest { lifetime, ..new_token(name, &["agents:list"]) }).await.expect("created");
    created.token.expect("a token")
}

fn timestamp(time: Time) -> Timestamp {
    Timestamp {
        seconds: time.micros().div_euclid(1_000_000),
        nanos: i32::try_from(time.micros().rem_euclid(1_000_000) * 1_000).expect("small"),
    }
}

/// Waits until the server has looked for steps at the present instant. A look asks the store twice; one may have been under way.
async fn scanned(world: &World) {
    let before = world.queries("notices_scan").await;
    eventually("a look", async || (world.queries("notices_scan").await >= before + 6.0).then_some(())).await;
}

async fn a_step_raises_a_fault_that_clears_by_itself(world: World) {
    let world = alert(world, &[]).await;
    wish(&world, proto::Notices { raise_faults: true, days_before: vec![0, 7, 30, 7], ..Default::default() }).await;
    let admin = world.admin().await;
    let tokens = [
        ending(&admin, &world, "prolonged", 40 * DAY).await,
        ending(&admin, &world, "revoked", 40 * DAY).await,
        ending(&admin, &world, "deleted", 40 * DAY).await,
        ending(&admin, &world, "left alone", 40 * DAY).await,
    ];
    scanned(&world).await;
    assert!(faults(&admin).await.is_empty(), "nothing is near its end");
    // To the instant: a microsecond before is too early.
    world.advance(10 * DAY - Duration::from_micros(1));
    scanned(&world).await;
    assert!(faults(&admin).await.is_empty(), "the step is not reached");
    world.advance(Duration::from_micros(1));
    let raised = eventually("four faults", async || Some(faults(&admin).await).filter(|faults| faults.len() == 4)).await;
    for fault in &raised {
        let token = tokens.iter().find(|token| token.id == fault.token_id).expect("one of ours");
        assert_eq!((&fault.display_name, &fault.hint, &fault.principal), (&token.display_name, &token.hint, &token.principal));
        assert_eq!((fault.days_before, fault.expire_time, fault.raise_time), (30, token.expire_time, Some(timestamp(world.clock.now()))));
        assert!(fault.id.starts_with("flt_") && fault.acknowledge_time.is_none(), "{fault:?}");
    }
    let gauge = async |labels: &str| {
        let page = world.metrics().await;
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("keyward_faults{{{labels}}} "))?.parse::<i64>().ok());
        line.unwrap_or(-1)
    };
    eventually("the gauge", async || (gauge("state=\"expiring\",acknowledged=\"false\"").await == 4).then_some(())).await;

    // Acknowledged: by the first who does.
    let id = &raised.iter().find(|fault| fault.display_name == "left alone").expect("there").id;
    let other = world.actor("bob", &["keyward:admin"]).await;
    for actor in [&other, &admin] {
        let message = proto::AcknowledgeFaultRequest { id: id.clone() };
        let fault = actor.notices().acknowledge_fault(actor.request(message)).await.expect("there").into_inner().fault.expect("a fault");
        assert_eq!((fault.acknowledged_by.as_str(), fault.acknowledge_time), ("bob", Some(timestamp(world.clock.now()))));
    }
    let message = proto::ListFaultsRequest { unacknowledged_only: true, ..Default::default() };
    assert_eq!(admin.notices().list_faults(admin.request(message)).await.expect("a list").into_inner().faults.len(), 3);
    eventually("the gauge", async || (gauge("state=\"expiring\",acknowledged=\"true\"").await == 1).then_some(())).await;

    // Gone at once, whatever made it untrue.
    let [prolonged, revoked, deleted, left] = &tokens;
    let later = proto::Token { expire_time: Some(timestamp(world.clock.now() + 90 * DAY)), ..prolonged.clone() };
    admin.update(proto::Token { etag: String::new(), ..later }, &["expire_time"]).await.expect("prolonged");
    admin.revoke(&revoked.id).await.expect("revoked");
    admin.delete(&deleted.id).await.expect("deleted");
    let names: Vec<String> = faults(&admin).await.into_iter().map(|fault| fault.display_name).collect();
    assert_eq!(names, ["left alone"]);
    let gone = proto::AcknowledgeFaultRequest { id: raised.iter().find(|fault| fault.token_id == revoked.id).expect("there").id.clone() };
    assert_eq!(admin.notices().acknowledge_fault(admin.request(gone)).await.expect_err("cleared").code(), Code::NotFound);

    // A new secret alone changes nothing: the end is the same.
    admin.regenerate(&left.id, 0).await.expect("regenerated");
    assert_eq!(faults(&admin).await.len(), 1);
    // Each step has a fault of its own; the prolonged token has its steps anew.
    world.advance(30 * DAY);
    let raised = eventually("the end", async || Some(faults(&admin).await).filter(|faults| faults.len() == 2)).await;
    assert_eq!(raised.iter().map(|fault| fault.days_before).collect::<Vec<_>>(), [0, 30], "the step of 7 days was overtaken");
    world.advance(30 * DAY);
    let raised = eventually("steps anew", async || {
        Some(faults(&admin).await).filter(|faults| faults.iter().any(|fault| fault.token_id == prolonged.id))
    })
    .await;
    assert!(raised.iter().filter(|fault| fault.token_id == prolonged.id).all(|fault| fault.days_before == 30), "{raised:?}");
    eventually("rows of cleared faults go", async || (world.db_number("SELECT COUNT(*) FROM fault").await == 3).then_some(())).await;
}

/// Runs a mail server without TLS, and the settings that lead to it; nothing if it is not installed here.
pub fn mailbox() -> Option<(Mailbox, Vec<(&'static str, String)>)> {
    let mailbox = Mailbox::start(MailboxOptions { tls: MailTls::None, ..MailboxOptions::default() })?;
    let url = format!("smtp://127.0.0.1:{}?tls=off", mailbox.port());
    Some((mailbox, vec![("smtp_url", url), ("smtp_from", "tokens@keyward.test".to_owned())]))
}

/// The events of calls, with the names of their tokens and their steps.
fn told(calls: &[Call]) -> Vec<(String, String, Option<i64>)> {
    let mut told: Vec<_> = calls
        .iter()
        .map(|call| {
            let json = call.json.as_ref().expect("JSON");
            let text = |value: &Value| value.as_str().expect("text").to_owned();
            (text(&json["type"]), text(&json["data"]["token"]["display_name"]), json["data"]["days_before"].as_i64())
        })
        .collect();
    told.sort();
    told
}

fn entry(event: &str, name: &str, days_before: Option<i64>) -> (String, String, Option<i64>) {
    (event.to_owned(), name.to_owned(), days_before)
}

async fn four_hundred_days_of_steps_are_told_at_their_instants(world: World) {
    const TICK: Duration = Duration::from_hours(6);
    let receiver = Receiver::start().await;
    let mut world = alert(world, &[]).await;
    let wishes = proto::Notices { raise_faults: true, webhook_url: receiver.url("/hook"), ..Default::default() };
    wish(&world, wishes).await;
    // The leap day of 2028 and the days around it, the hours that clocks in New York and Berlin skip or repeat, the turn of a year on both sides of the date line.
    let ends = [
        "2028-02-28T12:00:00Z",
        "2028-02-29T00:00:00Z",
        "2028-02-29T23:59:59Z",
        "2028-02-29T23:30:00-05:00",
        "2028-03-01T00:00:00Z",
        "2027-03-14T02:30:00-05:00",
        "2027-03-28T02:30:00+01:00",
        "2027-10-31T02:30:00+02:00",
        "2027-11-07T01:30:00-04:00",
        "2027-12-31T23:59:59+14:00",
        "2027-12-31T23:59:59-12:00",
        "2027-02-15T08:00:00Z",
        "2027-06-30T23:59:60Z",
    ];
    let admin = world.admin().await;
    let mut tokens = BTreeMap::new();
    for end in ends {
        let end: Timestamp = end.replace(":60Z", ":59Z").parse().expect("an instant");
        let lifetime = Some(proto::create_token_request::Lifetime::ExpireTime(end));
        let token = admin
            .create(proto::CreateTokenRequest { lifetime, ..new_token("of the year", &["agents:list"]) })
            .await
            .expect("created")
            .token;
        tokens.insert(token.expect("a token").id, Time::from_micros(end.seconds * 1_000_000));
    }
    // The administrator's own token has steps as well.
    let own = admin.list(proto::ListTokensRequest::default()).await.expect("a list").tokens;
    for token in own {
        let micros = token.expire_time.map(|end| end.seconds * 1_000_000 + i64::from(end.nanos) / 1_000);
        tokens.extend(micros.map(|micros| (token.id, Time::from_micros(micros))));
    }
    world.stop_server().await;

    let config = world.config();
    let store = Arc::new(Store::open(&config.database_url, true, Box::new(|_, _, _| ())).await.expect("a store"));
    let keyring = Arc::new(Keyring::load(&config.keyring_file).expect("readable").expect("there"));
    let settings = Settings { mail: None, webhook_allowed_cidrs: config.webhook_allowed_cidrs.clone(), ca: None };
    let rooms = Notices::new(keyring, Arc::clone(&store), world.clock.clone(), settings).expect("good settings");
    // What is expected comes from the definition of a step, and knows nothing of the calendar.
    let mut expected = BTreeMap::new();
    for tick in 0..1_640 {
        let now = BEGINNING + TICK * tick;
        for (id, end) in &tokens {
            let due = [30_u32, 14, 7, 1, 0].into_iter().filter(|days| now >= *end - DAY * *days).min();
            if let Some(days) = due {
                expected.entry((id.clone(), days)).or_insert(now);
            }
        }
        rooms.scan(now).await.expect("a scan");
        if tick % 40 == 0 {
            rooms.deliver(world.clock.now()).await.expect("a look into the outbox");
            rooms.rest().await;
        }
        world.clock.advance(TICK);
    }
    rooms.deliver(world.clock.now()).await.expect("a look into the outbox");
    rooms.rest().await;
    let calls = receiver.wait_for(1, SOON).await;
    let mut seen = BTreeMap::new();
    for call in &calls {
        let json = call.json.as_ref().expect("JSON");
        let token = json["data"]["token"]["id"].as_str().expect("an id").to_owned();
        let days = u32::try_from(json["data"]["days_before"].as_u64().expect("a step")).expect("small");
        let at: Timestamp = json["timestamp"].as_str().expect("an instant").parse().expect("RFC 3339");
        let before = seen.insert((token, days), Time::from_micros(at.seconds * 1_000_000));
        assert_eq!(before, None, "told twice: {json}");
    }
    // Steps that were overtaken before anything was delivered are not sent; here deliveries come every ten days.
    assert!(seen.iter().all(|(step, at)| expected.get(step) == Some(at)), "{seen:?}\n{expected:?}");
    let last = |days| expected.keys().filter(|(_, of)| *of == days).count();
    assert_eq!(seen.keys().filter(|(_, days)| *days == 0).count(), last(0));
    let raised = faults_of(&store, &tokens).await;
    assert_eq!(raised, expected, "each step has its fault, from the instant at which it was seen");
    store.close().await.expect("closed");
}

async fn faults_of(store: &Store, tokens: &BTreeMap<String, Time>) -> BTreeMap<(String, u32), Time> {
    let filter = FaultFilter { workspace: "default".to_owned(), principal: None, token_id: None, unacknowledged_only: false };
    let faults = store.faults(&filter, None, 10_000).await.expect("a list");
    assert!(faults.iter().all(|fault| tokens[&fault.token_id.to_string()] == fault.expire_time));
    faults.into_iter().map(|fault| ((fault.token_id.to_string(), u32::from(fault.days_before)), fault.raise_time)).collect()
}

async fn what_was_overtaken_is_not_sent(world: World) {
    let Some((mailbox, settings)) = mailbox() else { return };
    let mut receiver = Receiver::start().await;
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let world = alert(world, &settings).await;
    let wishes = proto::Notices {
        emails: "ops@example.test; ".to_owned(),
        webhook_url: receiver.url("/hook"),
        days_before: vec![30, 7],
        ..Default::default()
    };
    wish(&world, wishes).await;
    let admin = world.admin().await;
    let mut tokens = Vec::new();
    for name in ["stays", "prolonged", "revoked", "deleted"] {
        tokens.push(ending(&admin, &world, name, 31 * DAY).await);
    }
    mailbox.mode(Mode::Down);
    receiver.close().await;
    world.advance(DAY);
    eventually("five notices", async || (pending(&admin).await.len() == 5).then_some(())).await;
    eventually("attempts", async || pending(&admin).await.iter().all(|notice| !notice.last_error.is_empty()).then_some(())).await;
    world.advance(2 * DAY);
    let later = proto::Token { expire_time: Some(timestamp(world.clock.now() + 90 * DAY)), etag: String::new(), ..tokens[1].clone() };
    admin.update(later, &["expire_time"]).await.expect("prolonged");
    admin.revoke(&tokens[2].id).await.expect("revoked");
    admin.delete(&tokens[3].id).await.expect("deleted");
    // The nearer step comes while the farther one still waits.
    world.db_execute("UPDATE notice SET give_up_time = 9000000000000000000").await;
    world.advance(21 * DAY);
    let told_of_step = async || world.db_number("SELECT COUNT(*) FROM notice_mark WHERE days_before = 7").await;
    eventually("the nearer step", async || (told_of_step().await == 1).then_some(())).await;
    mailbox.mode(Mode::Ok);
    receiver.open().await;
    world.advance(Duration::from_hours(2));
    eventually("an empty outbox", async || {
        world.advance(Duration::from_mins(10));
        pending(&admin).await.is_empty().then_some(())
    })
    .await;
    assert_eq!(told(&receiver.calls()), [entry("token.expiring", "stays", Some(7))]);
    let mails = mailbox.mails();
    assert_eq!(mails.len(), 1, "{mails:?}");
    assert!(mails[0].subject.contains("stays"), "{}", mails[0].subject);
}

async fn events_are_told_where_the_workspace_wants_them(world: World) {
    let Some((mailbox, settings)) = mailbox() else { return };
    let receiver = Receiver::start().await;
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let world = alert(world, &settings).await;
    let admin = world.admin().await;
    let root = world.root().await;
    let ada = proto::Principal {
        id: "ada".to_owned(),
        display_name: "Ada".to_owned(),
        email: "ada@example.test".to_owned(),
        ..Default::default()
    };
    let message = proto::UpsertPrincipalRequest { principal: Some(ada) };
    root.principals().upsert_principal(root.request(message)).await.expect("made");
    let for_ada = async |name: &str| {
        let created = admin.create(proto::CreateTokenRequest { principal: "ada".to_owned(), ..new_token(name, &["keyward:self"]) }).await;
        created.map(|created| (created.token.expect("a token"), created.secret)).expect("created")
    };
    for_ada("before anybody was told").await;
    let wishes = proto::Notices {
        emails: "ops@example.test".to_owned(),
        mail_owner: true,
        webhook_url: receiver.url("/hook"),
        events: [
            NoticeEvent::TokenCreated,
            NoticeEvent::TokenRegenerated,
            NoticeEvent::TokenRevoked,
            NoticeEvent::TokenLeaked,
            NoticeEvent::TokenLeaked,
        ]
        .map(i32::from)
        .to_vec(),
        ..Default::default()
    };
    let workspace = wish(&world, wishes).await;
    assert_eq!(workspace.notices.expect("there").events.len(), 4, "each once");
    let (regenerated, _) = for_ada("regenerated").await;
    let (revoked, _) = for_ada("revoked").await;
    let (deleted, _) = for_ada("deleted").await;
    let (_, own) = for_ada("ended by its owner").await;
    let (_, leaked) = for_ada("leaked").await;
    admin.regenerate(&regenerated.id, 0).await.expect("regenerated");
    admin.revoke(&revoked.id).await.expect("revoked");
    admin.revoke(&revoked.id).await.expect("once more");
    admin.delete(&revoked.id).await.expect("deleted");
    admin.delete(&deleted.id).await.expect("deleted");
    let own = world.bearer(&own).await;
    own.own().revoke_self(own.request(proto::RevokeSelfRequest::default())).await.expect("revoked");
    let stranger = world.stranger().await;
    let report = proto::ReportLeakedTokensRequest { tokens: vec![leaked.clone()] };
    stranger.own().report_leaked_tokens(stranger.request(report)).await.expect("reported");

    let expected = {
        let mut expected: Vec<_> =
            ["regenerated", "revoked", "deleted", "ended by its owner", "leaked"].map(|name| entry("token.created", name, None)).to_vec();
        expected.extend([
            entry("token.regenerated", "regenerated", None),
            entry("token.revoked", "revoked", None),
            entry("token.revoked", "deleted", None),
            entry("token.leaked", "leaked", None),
        ]);
        expected.sort();
        expected
    };
    let calls = receiver.wait_for(expected.len(), SOON).await;
    assert_eq!(told(&calls), expected);
    let of = |kind: &str, name: &str| {
        let is_it = |json: &Value| json["type"] == kind && json["data"]["token"]["display_name"] == name;
        calls.iter().filter_map(|call| call.json.clone()).find(is_it).expect("told")
    };
    let revoked_call = of("token.revoked", "revoked");
    assert_eq!((&revoked_call["data"]["actor"], &revoked_call["data"]["reason"]), (&"admin".into(), &"test".into()));
    assert_eq!(of("token.leaked", "leaked")["data"]["actor"], "", "nobody said who they are");
    // To the list and to the owner: each of the nine.
    let mails = mailbox.wait_for(18, SOON).await;
    for to in ["ops@example.test", "ada@example.test"] {
        assert_eq!(mails.iter().filter(|mail| mail.to == [to]).count(), 9);
    }
    let texts: String = mails
        .iter()
        .map(|mail| mail.raw.clone())
        .chain(calls.iter().map(|call| String::from_utf8_lossy(&call.body).into_owned()))
        .collect();
    assert!(!texts.contains(&leaked) && texts.contains(&leaked[..8]), "the hint, and no more");
    eventually("an empty outbox", async || pending(&admin).await.is_empty().then_some(())).await;
    assert_eq!(receiver.calls().len(), expected.len());
}

async fn a_server_that_was_down_tells_later(world: World) {
    let receiver = Receiver::start().await;
    let mut world = alert(world, &[]).await;
    wish(&world, proto::Notices { webhook_url: receiver.url("/hook"), ..Default::default() }).await;
    let admin = world.admin().await;
    ending(&admin, &world, "near", 40 * DAY).await;
    ending(&admin, &world, "ends meanwhile", 20 * DAY).await;
    receiver.wait_for(1, SOON).await;
    world.stop_server().await;
    world.advance(35 * DAY);
    world.start_server().await;
    receiver.wait_for(3, SOON).await;
    let expected = [
        entry("token.expired", "ends meanwhile", Some(0)),
        entry("token.expiring", "ends meanwhile", Some(30)),
        entry("token.expiring", "near", Some(7)),
    ];
    assert_eq!(told(&receiver.calls()), expected, "the nearest step of each, and none that was overtaken");
    world.restart().await;
    scanned(&world).await;
    assert_eq!(receiver.calls().len(), 3, "a start tells nothing twice");
}

async fn wishes_that_come_later_are_told_what_is_near(world: World) {
    let receiver = Receiver::start().await;
    let world = alert(world, &[]).await;
    wish(&world, proto::Notices::default()).await;
    let admin = world.admin().await;
    ending(&admin, &world, "ended before", DAY).await;
    ending(&admin, &world, "near", 12 * DAY).await;
    ending(&admin, &world, "far", 100 * DAY).await;
    world.advance(2 * DAY);
    wish(&world, proto::Notices { webhook_url: receiver.url("/hook"), ..Default::default() }).await;
    receiver.wait_for(1, SOON).await;
    scanned(&world).await;
    assert_eq!(told(&receiver.calls()), [entry("token.expiring", "near", Some(14))]);
    // A nearer step that is wished for later is told; one that is farther away than what was told is not.
    wish(&world, proto::Notices { webhook_url: receiver.url("/hook"), days_before: vec![20, 10], ..Default::default() }).await;
    receiver.wait_for(2, SOON).await;
    scanned(&world).await;
    assert_eq!(told(&receiver.calls()), [entry("token.expiring", "near", Some(10)), entry("token.expiring", "near", Some(14))]);
    // A way that is added later tells the step that the others told before, and only that way; faults are there as soon as they are wanted, and no longer.
    let root = world.root().await;
    assert!(faults(&root).await.is_empty());
    let all = proto::Notices { webhook_url: receiver.url("/other"), raise_faults: true, days_before: vec![20, 10], ..Default::default() };
    wish(&world, all.clone()).await;
    assert_eq!(faults(&root).await.iter().map(|fault| fault.days_before).collect::<BTreeSet<_>>(), BTreeSet::from([10, 14]));
    wish(&world, proto::Notices { webhook_url: String::new(), ..all.clone() }).await;
    ending(&root, &world, "nearer", 5 * DAY).await;
    eventually("a fault", async || (faults(&root).await.len() == 3).then_some(())).await;
    assert_eq!(receiver.calls().len(), 2);
    wish(&world, all.clone()).await;
    receiver.wait_for(3, SOON).await;
    scanned(&world).await;
    assert_eq!(told(&receiver.calls())[2], entry("token.expiring", "nearer", Some(10)));
    assert_eq!(receiver.calls().len(), 3);
    wish(&world, proto::Notices { raise_faults: false, ..all }).await;
    assert!(faults(&root).await.is_empty(), "nobody wants them");
}

async fn a_suspended_workspace_tells_nothing(world: World) {
    let receiver = Receiver::start().await;
    let world = alert(world, &[]).await;
    world.add_workspace("shop", "shop").await;
    let shop = world.actor_in("shop", "ann", &["keyward:admin"]).await;
    let notices = Some(proto::Notices { webhook_url: receiver.url("/hook"), days_before: vec![7], ..Default::default() });
    let workspace = proto::Workspace { id: "shop".to_owned(), notices, ..Default::default() };
    shop.update_workspace(workspace, &["notices"]).await.expect("changed");
    let root = world.root().await;
    receiver.set(Behaviour::Status(500));
    ending(&shop, &world, "waits", 5 * DAY).await;
    receiver.wait_for(1, SOON).await;
    let suspend = proto::SuspendWorkspaceRequest { id: "shop".to_owned(), ..Default::default() };
    root.workspaces().suspend_workspace(root.request(suspend)).await.expect("suspended");
    receiver.set(Behaviour::Ok);
    let before = receiver.calls().len();
    world.advance(Duration::from_hours(5));
    eventually("word of the suspension", async || {
        let message = proto::ListNoticesRequest { workspace: "shop".to_owned(), ..Default::default() };
        let found = root.notices().list_notices(root.request(message)).await.expect("a list").into_inner().notices;
        world.advance(Duration::from_mins(5));
        found.iter().any(|notice| notice.last_error.contains("suspended")).then_some(())
    })
    .await;
    assert_eq!(receiver.calls().len(), before, "nothing goes out");
    let resume = proto::ResumeWorkspaceRequest { id: "shop".to_owned(), ..Default::default() };
    root.workspaces().resume_workspace(root.request(resume)).await.expect("resumed");
    eventually("what waited", async || {
        world.advance(Duration::from_mins(10));
        (receiver.calls().len() > before).then_some(())
    })
    .await;
}

async fn a_bulk_revocation_tells_in_bounded_mails(world: World) {
    const TOKENS: usize = 250;
    let Some((mailbox, settings)) = mailbox() else { return };
    let receiver = Receiver::start().await;
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let world = alert(world, &settings).await;
    let root = world.root().await;
    wish(&world, proto::Notices::default()).await;
    for number in 0..TOKENS {
        let message =
            proto::CreateTokenRequest { principal: "crowd".to_owned(), ..new_token(&format!("token {number:03}"), &["agents:list"]) };
        root.create(message).await.expect("created");
    }
    let emails = "a@example.test; b@example.test".to_owned();
    let events = vec![NoticeEvent::TokenRevoked.into()];
    wish(&world, proto::Notices { emails, webhook_url: receiver.url("/hook"), events, ..Default::default() }).await;
    assert_eq!(root.revoke_principal("crowd").await.expect("revoked"), TOKENS as i32);
    let mails = mailbox.wait_for(2, SOON).await;
    for mail in &mails {
        let text = mail.text.as_deref().expect("text");
        assert!(mail.subject.contains("250 tokens were revoked"), "{}", mail.subject);
        assert!(text.contains("- and 150 more") && text.matches("- token ").count() == 100, "{text}");
    }
    assert_eq!(receiver.wait_for(TOKENS, SOON).await.len(), TOKENS, "each has its call");
    eventually("an empty outbox", async || pending(&root).await.is_empty().then_some(())).await;
    assert_eq!(mailbox.mails().len(), 2, "one for each address");
}

async fn temporary_tokens_cause_no_notices_but_of_leaks(world: World) {
    let receiver = Receiver::start().await;
    let world = alert(world, &[]).await;
    let events = [NoticeEvent::TokenCreated, NoticeEvent::TokenRevoked, NoticeEvent::TokenLeaked].map(i32::from).to_vec();
    wish(&world, proto::Notices { webhook_url: receiver.url("/hook"), raise_faults: true, events, ..Default::default() }).await;
    let root = world.root().await;
    let temporary =
        |name: &str| proto::CreateTokenRequest { kind: proto::TokenKind::Temporary.into(), ..new_token(name, &["agents:list"]) };
    let revoked = root.create(temporary("revoked")).await.expect("created").token.expect("a token");
    let leaked = root.create(temporary("leaked")).await.expect("created").secret;
    root.create(temporary("ends")).await.expect("created");
    root.revoke(&revoked.id).await.expect("revoked");
    world.advance(2 * DAY);
    scanned(&world).await;
    let root = world.root().await;
    assert!(receiver.calls().is_empty() && faults(&root).await.is_empty());
    let fresh = root.create(temporary("leaked")).await.expect("created").secret;
    let report = proto::ReportLeakedTokensRequest { tokens: vec![fresh, leaked] };
    root.own().report_leaked_tokens(root.request(report)).await.expect("reported");
    receiver.wait_for(1, SOON).await;
    assert!(told(&receiver.calls()).iter().all(|entry| entry.0 == "token.leaked"));
}
