//! Calls of webhooks are signed as the libraries of their receivers expect, and tests of notices say what became of them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keyward::{
    ambient::{Clock, Time},
    proto::{self, NoticeChannel},
};
use tonic::Code;

use crate::{
    mailbox::{Mailbox, MailboxOptions, Mode},
    outlets::{
        DAY, HOUR, SOON, calls_to, client, create, mail_through, mails_to, plain_url, prepare, rotate, test, trust, unstarted, wish,
    },
    receiver::{Behaviour, Receiver},
    signature::{can_verify_webhooks, verify_webhook, verify_webhooks},
    tls::{Authority, Credential},
    world::{Backend, World, runtime},
};

crate::on_both_databases!(a_test_says_what_became_of_each, tests_have_their_rules);

#[test]
fn calls_are_signed_as_the_libraries_expect() {
    if !can_verify_webhooks() {
        return;
    }
    runtime().block_on(async {
        let authority = Authority::new();
        let receiver = Receiver::start_tls(&authority, Credential::Good).await;
        let mut world = unstarted(Backend::Sqlite).await;
        trust(&mut world, &authority.pem());
        world.clock = Clock::system();
        world.start_server().await;
        let root = world.root().await;
        wish(&root, "default", calls_to(&receiver.url("/hook?a=b"))).await;
        let rotated = rotate(&root, "").await;
        assert!(
            rotated.webhook_secret.starts_with("whsec_") && rotated.previous_expire_time.is_none(),
            "{:?}",
            rotated.previous_expire_time
        );
        create(&root, "", "Grüße, \"déploy\" <b>", 90).await;
        let call = receiver.wait_for(1, SOON).await.remove(0);
        let (mut tampered, mut other_id, mut unsigned) = (call.clone(), call.clone(), call.clone());
        tampered.body = String::from_utf8(tampered.body).expect("UTF-8").replace("token.created", "token.revoked").into_bytes();
        other_id.headers.iter_mut().find(|(name, _)| name == "webhook-id").expect("an id").1.push('x');
        unsigned.headers.retain(|(name, _)| name != "webhook-signature");
        let secret = rotated.webhook_secret.as_str();
        let stranger = rotate(&root, "").await.webhook_secret;
        let asked = [(secret, &call), (secret, &tampered), (secret, &other_id), (secret, &unsigned), (stranger.as_str(), &call)];
        assert_eq!(verify_webhooks(&asked), [true, false, false, false, false]);
        assert_eq!((call.method.as_str(), call.path.as_str()), ("POST", "/hook?a=b"));
    });
}

/// A clock that is turned by hand and stands near the real one when it counts: the libraries allow five minutes.
#[test]
fn the_secret_before_signs_for_a_day() {
    if !can_verify_webhooks() {
        return;
    }
    runtime().block_on(async {
        let real = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let mut world = unstarted(Backend::Sqlite).await;
        world.clock = Clock::by_hand(Time::from_micros(i64::try_from((real - DAY).as_micros()).expect("this age")));
        world.start_server().await;
        let (root, receiver) = (world.root().await, Receiver::start().await);
        wish(&root, "default", calls_to(&receiver.url("/"))).await;
        let first = rotate(&root, "").await;
        let second = rotate(&root, "").await;
        assert_ne!(first.webhook_secret, second.webhook_secret);
        let end = second.previous_expire_time.expect("there was one");
        assert_eq!(end.seconds, (world.clock.now() + DAY).seconds());

        world.advance(DAY - Duration::from_secs(1));
        create(&root, "", "the last second", 90).await;
        let calls = receiver.wait_for(1, SOON).await;
        assert!(verify_webhook(&first.webhook_secret, &calls[0]) && verify_webhook(&second.webhook_secret, &calls[0]));
        world.advance(Duration::from_secs(1));
        create(&root, "", "a day", 90).await;
        let calls = receiver.wait_for(2, SOON).await;
        assert!(!verify_webhook(&first.webhook_secret, &calls[1]) && verify_webhook(&second.webhook_secret, &calls[1]));

        // What ended does not come back with further rotations.
        let third = rotate(&root, "").await;
        let fourth = rotate(&root, "").await;
        create(&root, "", "two rotations", 90).await;
        let call = receiver.wait_for(3, SOON).await.remove(2);
        let secrets = [&first, &third, &fourth].map(|rotated| (rotated.webhook_secret.as_str(), &call));
        assert_eq!(verify_webhooks(&secrets), [false, true, true]);

        // They outlive the server.
        world.restart().await;
        create(&world.root().await, "", "restarted", 90).await;
        let call = receiver.wait_for(4, SOON).await.remove(3);
        let secrets = [&first, &third, &fourth].map(|rotated| (rotated.webhook_secret.as_str(), &call));
        assert_eq!(verify_webhooks(&secrets), [false, true, true]);
    });
}

async fn a_test_says_what_became_of_each(mut world: World) {
    prepare(&mut world);
    let mailbox = Mailbox::start(MailboxOptions { reject: vec!["gone@example.test".to_owned()], ..MailboxOptions::default() });
    if let Some(mailbox) = &mailbox {
        mail_through(&mut world, plain_url(mailbox));
    }
    world.restart().await;
    let (admin, receiver) = (world.admin().await, Receiver::start().await);
    wish(&admin, "default", calls_to(&receiver.url("/a-secret-path"))).await;
    let deliveries = test(&admin, "").await.expect("sent");
    let [delivery] = deliveries.as_slice() else { panic!("{deliveries:?}") };
    assert_eq!((delivery.channel(), delivery.recipient.as_str(), delivery.delivered), (NoticeChannel::Webhook, "127.0.0.1", true));
    assert_eq!(delivery.error, "");
    let call = receiver.wait_for(1, SOON).await.remove(0);
    let json = call.json.expect("JSON");
    assert_eq!((json["type"].as_str(), json["data"]["workspace"].as_str()), (Some("test"), Some("default")));
    assert_eq!(json["id"].as_str(), call.headers.iter().find(|(name, _)| name == "webhook-id").map(|(_, value)| value.as_str()));

    if let Some(mailbox) = &mailbox {
        let wishes = proto::Notices { webhook_url: receiver.url("/"), ..mails_to("ada@example.test; gone@example.test; bob@example.test") };
        wish(&admin, "default", wishes).await;
        receiver.set(Behaviour::Status(500));
        let deliveries = test(&admin, "").await.expect("sent");
        let told: Vec<_> = deliveries.iter().map(|each| (each.channel(), each.recipient.as_str(), each.delivered)).collect();
        let mail = NoticeChannel::Mail;
        assert_eq!(
            told,
            [
                (mail, "ada@example.test", true),
                (mail, "gone@example.test", false),
                (mail, "bob@example.test", true),
                (NoticeChannel::Webhook, "127.0.0.1", false)
            ]
        );
        assert!(deliveries[1].error.contains("550"), "{deliveries:?}");
        assert_eq!(deliveries[3].error, "the webhook answered with status 500");
        assert_eq!(mailbox.wait_for(2, SOON).await.len(), 2);
        // Nothing answers: it is said before the caller gives up.
        mailbox.mode(Mode::Hang);
        mailbox.change_login("", "");
    }
    receiver.set(Behaviour::Hang);
    let deliveries = test(&admin, "").await.expect("said");
    let last = deliveries.last().expect("the webhook");
    assert!(!last.delivered && (last.error.contains("no answer")), "{last:?}");
    assert!(world.db_number("SELECT COUNT(*) FROM notice").await == 0, "tests are not kept");
}

async fn tests_have_their_rules(mut world: World) {
    world.settings.insert("notices_interval", "1s".to_owned());
    world.restart().await;
    let admin = world.admin().await;
    let status = test(&admin, "").await.expect_err("nothing is set");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("neither emails nor a webhook_url"), "{status:?}");
    // Nothing is called within the network that the operator did not name: neither by address nor by name.
    let urls = ["https://127.0.0.1:1/", "https://10.0.0.1/", "https://[::1]/", "https://localhost:1/", "https://[::ffff:127.0.0.1]/x"];
    for (number, url) in urls.into_iter().enumerate() {
        // Tests are counted by workspace.
        let id = format!("net-{number}");
        world.add_workspace(&id, &format!("net{number}")).await;
        let tester = world.actor_in(&id, "tester", &["keyward:admin"]).await;
        wish(&tester, &id, calls_to(url)).await;
        let deliveries = test(&tester, "").await.expect("tried");
        assert!(!deliveries[0].delivered && deliveries[0].error.contains("webhook_allowed_cidrs"), "{url}: {deliveries:?}");
    }
    world.add_workspace("other", "ot").await;
    let foreign = test(&admin, "other").await.expect_err("not theirs");
    assert_eq!(foreign.code(), Code::NotFound);
    for actor in [world.member("ada").await, world.validator().await] {
        assert_eq!(test(&actor, "").await.expect_err("no administrator").code(), Code::PermissionDenied);
        let message = proto::RotateWebhookSecretRequest::default();
        let status = client(&actor).rotate_webhook_secret(actor.request(message)).await.expect_err("no administrator");
        assert_eq!(status.code(), Code::PermissionDenied);
    }
    let busy = world.actor_in("other", "busy", &["keyward:admin"]).await;
    wish(&busy, "other", calls_to("https://10.0.0.1/")).await;
    for _ in 0..6 {
        test(&busy, "").await.expect("6 a minute");
    }
    // More principals of a workspace are no way around it.
    for principal in ["busy", "fresh"] {
        let actor = world.actor_in("other", principal, &["keyward:admin"]).await;
        let status = test(&actor, "").await.expect_err("one too many");
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("too many tests"), "{status:?}");
    }
    wish(&admin, "default", calls_to("https://10.0.0.1/")).await;
    test(&admin, "").await.expect("another's tests");
    assert!(world.clock.now() < crate::world::BEGINNING + HOUR);
}
