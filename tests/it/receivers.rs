//! Receivers of webhook calls that fail, each in its own way: they hold up nobody, and get in the end what they missed.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use keyward::proto::{NoticeChannel, NoticeState, Verdict};

use crate::{
    mailbox::{Mailbox, MailboxOptions},
    outlets::{
        DAY, HOUR, SOON, all_dead, all_delivered, calls_to, create, list, looks, mail_through, mails_to, metric, plain_url, prepare, retry,
        tried, trust, wish,
    },
    receiver::{Behaviour, Call, Receiver},
    tls::{Authority, Credential},
    world::World,
};

crate::on_both_databases!(
    a_receiver_that_hangs_holds_up_nobody_else,
    a_receiver_that_is_gone_is_not_asked_again,
    a_receiver_that_fails_is_asked_less_and_less,
);

/// Tokens of each workspace.
const TOKENS: usize = 3;

/// The ids of the notices that came in these calls.
fn ids(calls: &[Call]) -> BTreeSet<String> {
    calls.iter().map(|call| call.header("webhook-id").expect("an id").to_owned()).collect()
}

async fn a_receiver_that_hangs_holds_up_nobody_else(mut world: World) {
    let authority = Authority::new();
    let mailbox = Mailbox::start(MailboxOptions::default());
    prepare(&mut world);
    trust(&mut world, &authority.pem());
    if let Some(mailbox) = &mailbox {
        mail_through(&mut world, plain_url(mailbox));
    }
    world.restart().await;
    let root = world.root().await;

    let good = Receiver::start_tls(&authority, Credential::Good).await;
    let (failing, elsewhere) = (Receiver::start().await, Receiver::start().await);
    let mut refusing = Receiver::start().await;
    let forged = Receiver::start_tls(&authority, Credential::Foreign).await;
    refusing.close().await;
    failing.set_path("/hang", Behaviour::Hang);
    failing.set_path("/error", Behaviour::Status(500));
    failing.set_path("/close", Behaviour::CloseAtOnce);
    failing.set_path("/redirect", Behaviour::Redirect(307, elsewhere.url("/private")));
    // A workspace, where it is called, and what its administrator reads of it.
    let bad = [
        ("hanging", failing.url("/hang"), "no answer of the webhook in time"),
        ("refusing", refusing.url("/"), "refused"),
        ("broken", failing.url("/error"), "status 500"),
        ("closing", failing.url("/close"), "broke off the connection"),
        ("forged", forged.url("/"), "certificate"),
        ("redirecting", failing.url("/redirect"), "status 307: redirects are not followed"),
        ("private", "https://10.0.0.1/".to_owned(), "webhook_allowed_cidrs"),
    ];
    let fine = good.url("/hook");
    let urls = bad.iter().map(|(name, url, _)| (*name, url.as_str())).chain([("good", fine.as_str())]);
    for (number, (name, url)) in urls.enumerate() {
        world.add_workspace(name, &format!("w{number}")).await;
        wish(&root, name, calls_to(url)).await;
    }
    if mailbox.is_some() {
        world.add_workspace("mailing", "ml").await;
        wish(&root, "mailing", mails_to("ada@example.test; bob@example.test")).await;
    }
    // One receiver hangs already when all the others have something to get.
    for number in 0..TOKENS {
        create(&root, "hanging", &format!("token {number}"), 100).await;
    }
    failing.wait_under_way(TOKENS, SOON).await;
    let begin = Instant::now();
    let mut secret = String::new();
    let mailing = mailbox.as_ref().map(|_| "mailing");
    for name in bad.iter().skip(1).map(|(name, ..)| *name).chain(["good"]).chain(mailing) {
        for number in 0..TOKENS {
            secret = create(&root, name, &format!("token {number}"), 100).await.secret;
        }
    }
    let calls = good.wait_for(TOKENS, SOON).await;
    if let Some(mailbox) = &mailbox {
        mailbox.wait_for(2 * TOKENS, SOON).await;
    }
    let asked = Instant::now();
    assert_eq!(root.use_token(&secret).await, Verdict::Valid);
    assert!(asked.elapsed() < Duration::from_secs(2), "validation goes on");
    assert!(failing.calls().iter().filter(|call| call.path == "/hang").count() == TOKENS, "the hanging one is tried once");
    println!("delivered after {:?}, {} calls still hang", begin.elapsed(), failing.under_way());
    assert!(begin.elapsed() < Duration::from_secs(9), "it was not waited for the end of what hangs: {:?}", begin.elapsed());

    // By a clock that stands still each was tried once, however often the server looks.
    for (name, _, error) in &bad {
        for notice in tried(&root, name, 1).await {
            assert!(notice.last_error.contains(error), "{name}: {}", notice.last_error);
            assert_eq!((notice.state(), notice.channel(), notice.attempt_count), (NoticeState::Pending, NoticeChannel::Webhook, 1));
            assert!(notice.next_attempt_time.is_some() && notice.token_ids.len() == 1 && notice.recipient.is_empty(), "{notice:?}");
            let quotes = notice.last_error.contains("127.0.0.1") || notice.last_error.contains("/hook");
            assert!(!quotes, "{name}: {}", notice.last_error);
        }
    }
    looks(&world, 2).await;
    for (name, ..) in &bad {
        assert!(list(&root, name, NoticeState::Pending).await.iter().all(|notice| notice.attempt_count == 1), "{name}");
    }
    assert_eq!(ids(&calls).len(), TOKENS);
    assert_eq!(good.calls().len(), TOKENS, "each once");
    let before = ids(&failing.calls());

    // After three days they are given up.
    world.advance(HOUR);
    for (name, ..) in &bad {
        let again = async || list(&root, name, NoticeState::Pending).await.iter().any(|notice| notice.attempt_count > 1).then_some(());
        crate::world::eventually(&format!("{name} is tried again"), again).await;
    }
    world.advance(3 * DAY);
    let mut dead = Vec::new();
    for (name, _, error) in &bad {
        let notices = all_dead(&root, name, TOKENS).await;
        for notice in &notices {
            assert!(notice.last_error.contains(error), "{name}: {}", notice.last_error);
            assert!(notice.next_attempt_time.is_none() && notice.attempt_count <= 4, "{notice:?}");
        }
        assert!(list(&root, name, NoticeState::Pending).await.is_empty());
        dead.push(notices);
    }
    assert_eq!(list(&root, "good", NoticeState::Unspecified).await, []);
    assert_eq!(good.calls().len(), TOKENS, "what was delivered is not called again");
    assert!(elsewhere.calls().is_empty(), "a redirect leads nowhere");
    assert!(forged.calls().is_empty() && forged.refused_handshakes() > 0);
    let count = (bad.len() * TOKENS) as f64;
    crate::world::eventually("the gauge counts them", async || {
        (metric(&world, "keyward_notices{channel=\"webhook\",state=\"dead\"}").await == count).then_some(())
    })
    .await;
    assert_eq!(metric(&world, "keyward_notices{channel=\"webhook\",state=\"pending\"}").await, 0.0);
    let failures = metric(&world, "keyward_notice_failures_total{channel=\"webhook\"}").await;
    assert!((2.0 * count..=4.0 * count).contains(&failures), "{failures}");
    assert_eq!(metric(&world, "keyward_notices_delivered_total{channel=\"webhook\"}").await, TOKENS as f64);

    // When the receivers work again, they get what they missed.
    for path in ["/hang", "/error", "/close", "/redirect"] {
        failing.set_path(path, Behaviour::Ok);
    }
    refusing.open().await;
    for name in ["forged", "private"] {
        wish(&root, name, calls_to(&good.url("/later"))).await;
    }
    for notice in dead.iter().flatten() {
        let retried = retry(&root, &notice.id).await;
        assert_eq!((retried.id.as_str(), retried.state()), (notice.id.as_str(), NoticeState::Pending));
    }
    for (name, ..) in &bad {
        all_delivered(&root, name).await;
    }
    let wanted =
        |places: &[usize]| -> BTreeSet<String> { places.iter().flat_map(|place| &dead[*place]).map(|notice| notice.id.clone()).collect() };
    assert_eq!(before, wanted(&[0, 2, 3, 5]), "the ids of the first attempts");
    assert_eq!(ids(&failing.calls()), before, "and of the last");
    assert_eq!(ids(&refusing.calls()), wanted(&[1]));
    let later: Vec<Call> = good.calls().into_iter().filter(|call| call.path == "/later").collect();
    assert_eq!((ids(&later), later.len()), (wanted(&[4, 6]), 2 * TOKENS));
    crate::world::eventually("the gauge counts none", async || {
        (metric(&world, "keyward_notices{channel=\"webhook\",state=\"dead\"}").await == 0.0).then_some(())
    })
    .await;
}

/// 410 says that there is no use in trying again; nor is there if the workspace wants no calls any more.
async fn a_receiver_that_is_gone_is_not_asked_again(mut world: World) {
    prepare(&mut world);
    world.restart().await;
    let root = world.root().await;
    let receiver = Receiver::start().await;
    wish(&root, "default", calls_to(&receiver.url("/"))).await;
    receiver.set(Behaviour::Status(410));
    create(&root, "", "gone", 90).await;
    let dead = all_dead(&root, "", 1).await;
    assert!(dead[0].last_error.contains("410") && dead[0].attempt_count == 1, "{dead:?}");
    receiver.set(Behaviour::CloseMiddle);
    create(&root, "", "half an answer", 90).await;
    receiver.wait_for(2, SOON).await;
    crate::world::eventually("the status is the answer", async || (list(&root, "", NoticeState::Pending).await.is_empty()).then_some(()))
        .await;
    receiver.set(Behaviour::Status(503));
    create(&root, "", "not wanted", 90).await;
    tried(&root, "", 1).await;
    wish(&root, "default", calls_to("")).await;
    world.advance(HOUR);
    crate::world::eventually("what is not wanted is dropped", async || {
        (list(&root, "", NoticeState::Pending).await.is_empty()).then_some(())
    })
    .await;
    assert_eq!(receiver.calls().len(), 3);
}

async fn a_receiver_that_fails_is_asked_less_and_less(mut world: World) {
    prepare(&mut world);
    world.restart().await;
    let root = world.root().await;
    let receiver = Receiver::start().await;
    receiver.set(Behaviour::Status(503));
    wish(&root, "default", calls_to(&receiver.url("/"))).await;
    create(&root, "", "token", 90).await;
    receiver.wait_for(1, SOON).await;
    // Pauses are 10 s at first and doubled each time, half as much less or more.
    for _ in 0..10 {
        world.advance(Duration::from_mins(1));
        looks(&world, 2).await;
    }
    let count = receiver.calls().len();
    assert!((3..=8).contains(&count), "{count} attempts in 10 minutes");
    assert_eq!(ids(&receiver.calls()).len(), 1, "each with the same id");
    let bodies: BTreeSet<Vec<u8>> = receiver.calls().into_iter().map(|call| call.body).collect();
    assert_eq!(bodies.len(), 1, "and with the same body");
    receiver.set(Behaviour::Ok);
    world.advance(2 * HOUR);
    all_delivered(&root, "").await;
    assert_eq!(receiver.calls().len(), count + 1);
}
