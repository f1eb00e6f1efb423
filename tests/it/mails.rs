//! Mail servers that fail, each in its own way: they hold up nothing else, and take in the end what they missed.

use std::time::{Duration, Instant};

use keyward::proto::{self, NoticeChannel, NoticeEvent, NoticeState, Verdict};

use crate::{
    mailbox::{MailTls, Mailbox, MailboxOptions, Mode},
    outlets::{
        DAY, HOUR, SOON, all_dead, all_delivered, calls_to, create, list, looks, mail_through, mails_to, metric, plain_url, prepare, retry,
        test, tried, trust, unstarted, wish,
    },
    receiver::Receiver,
    tls::Credential,
    world::{Backend, World, eventually, runtime},
};

crate::on_both_databases!(
    a_mail_server_that_hangs_holds_up_nothing_else,
    what_a_mail_server_says_of_one_address_is_about_that_one,
    mails_arrive_when_the_server_works_again,
    mails_that_are_given_up_can_be_sent_again,
);

const ADA: &str = "ada@example.test";
const BOB: &str = "bob@example.test";

async fn mailing(world: &mut World, options: MailboxOptions) -> Option<Mailbox> {
    let mailbox = Mailbox::start(options)?;
    prepare(world);
    mail_through(world, plain_url(&mailbox));
    world.restart().await;
    Some(mailbox)
}

async fn a_mail_server_that_hangs_holds_up_nothing_else(mut world: World) {
    let options = MailboxOptions { mode: Mode::Hang, ..MailboxOptions::default() };
    let Some(mailbox) = mailing(&mut world, options).await else { return };
    let root = world.root().await;
    let receiver = Receiver::start().await;
    world.add_workspace("calling", "cl").await;
    wish(&root, "calling", calls_to(&receiver.url("/"))).await;
    // Even in a workspace whose mails hang.
    wish(&root, "default", proto::Notices { webhook_url: receiver.url("/"), ..mails_to(&format!("{ADA}; {BOB}")) }).await;
    create(&root, "", "first", 90).await;
    mailbox.wait_until_hanging(2, SOON).await;
    let begin = Instant::now();
    let secret = create(&root, "calling", "second", 90).await.secret;
    receiver.wait_for(2, SOON).await;
    assert_eq!(root.use_token(&secret).await, Verdict::Valid);
    assert!(begin.elapsed() < Duration::from_secs(8), "nothing waits for the mail server: {:?}", begin.elapsed());
    assert!(mailbox.mails().is_empty());
    let notices = tried(&root, "", 1).await;
    assert_eq!(notices.len(), 2);
    for notice in &notices {
        assert_eq!(
            (notice.channel(), notice.state(), notice.event()),
            (NoticeChannel::Mail, NoticeState::Pending, NoticeEvent::TokenCreated)
        );
        assert_eq!(notice.last_error, "the mail server cannot be used: no connection in time");
    }
    mailbox.mode(Mode::Ok);
    world.advance(HOUR);
    all_delivered(&root, "").await;
    let mails = mailbox.mails();
    for to in [ADA, BOB] {
        let notice = notices.iter().find(|notice| notice.recipient == to).expect("one for each");
        let mail = mails.iter().find(|mail| mail.to == [to]).expect("a mail");
        assert_eq!(mail.message_id, format!("<{}@example.test>", notice.id), "the same at every attempt");
    }
    assert_eq!((mails.len(), receiver.calls().len()), (2, 2));
}

async fn what_a_mail_server_says_of_one_address_is_about_that_one(mut world: World) {
    const CAROL: &str = "carol@example.test";
    let options = MailboxOptions { reject: vec![ADA.to_owned()], temporary: vec![BOB.to_owned()], ..MailboxOptions::default() };
    let Some(mailbox) = mailing(&mut world, options).await else { return };
    let root = world.root().await;
    wish(&root, "default", mails_to(&format!("{ADA}; {BOB}; {CAROL}"))).await;
    create(&root, "", "token", 90).await;
    let mails = mailbox.wait_for(1, SOON).await;
    assert_eq!(mails[0].to, [CAROL]);
    let left = eventually("two are left", async || {
        let left = tried(&root, "", 1).await;
        (left.len() == 2).then_some(left)
    })
    .await;
    for notice in left {
        let (state, number) = if notice.recipient == ADA { (NoticeState::Dead, "550") } else { (NoticeState::Pending, "451") };
        assert_eq!((notice.state(), notice.attempt_count), (state, 1), "{notice:?}");
        assert!(notice.last_error.starts_with(&format!("the mail server answered {number}")), "{notice:?}");
    }
    assert_eq!(metric(&world, "keyward_notice_failures_total{channel=\"mail\"}").await, 2.0);
    assert_eq!(metric(&world, "keyward_notices_delivered_total{channel=\"mail\"}").await, 1.0);
    mailbox.refuse(&[ADA], &[]);
    world.advance(HOUR);
    let mails = mailbox.wait_for(2, SOON).await;
    assert_eq!(mails[1].to, [BOB]);
    let left = all_dead(&root, "", 1).await;
    assert_eq!((left[0].recipient.as_str(), left[0].attempt_count), (ADA, 1), "{left:?}");
}

async fn mails_arrive_when_the_server_works_again(mut world: World) {
    let Some(mailbox) = mailing(&mut world, MailboxOptions::default()).await else { return };
    let root = world.root().await;
    wish(&root, "default", mails_to(ADA)).await;
    for (number, (mode, error)) in [
        (Mode::Down, "refused"),
        (Mode::CloseInData, "the mail server cannot be used: "),
        (Mode::Busy, "the mail server answered 451"),
        (Mode::Full, "the mail server answered 552"),
    ]
    .into_iter()
    .enumerate()
    {
        mailbox.mode(mode);
        create(&root, "", &format!("{mode:?}"), 90).await;
        let failed = tried(&root, "", 1).await;
        looks(&world, 2).await;
        let left = list(&root, "", NoticeState::Pending).await;
        assert_eq!((left.len(), left[0].attempt_count), (1, 1), "{mode:?}: once while the clock stands still");
        assert!(failed[0].last_error.contains(error), "{mode:?}: {}", failed[0].last_error);
        mailbox.mode(Mode::Ok);
        world.advance(HOUR);
        let mails = mailbox.wait_for(number + 1, SOON).await;
        assert_eq!(mails[number].message_id, format!("<{}@example.test>", failed[0].id));
        assert!(mails[number].raw.contains(&format!("{mode:?}")), "it is about this one");
        all_delivered(&root, "").await;
    }
    // It takes the mail and says nothing: the mail comes once more, as the same.
    mailbox.mode(Mode::CloseAfterData);
    create(&root, "", "twice", 90).await;
    let failed = tried(&root, "", 1).await;
    mailbox.mode(Mode::Ok);
    world.advance(HOUR);
    let mails = mailbox.wait_for(6, SOON).await;
    all_delivered(&root, "").await;
    assert_eq!([&mails[4], &mails[5]].map(|mail| mail.message_id.clone()), [(); 2].map(|()| format!("<{}@example.test>", failed[0].id)));
}

async fn mails_that_are_given_up_can_be_sent_again(mut world: World) {
    let Some(mailbox) = mailing(&mut world, MailboxOptions::default()).await else { return };
    mailbox.mode(Mode::Down);
    let root = world.root().await;
    wish(&root, "default", mails_to(&format!("{ADA}; {BOB}"))).await;
    create(&root, "", "token", 90).await;
    tried(&root, "", 1).await;
    world.advance(3 * DAY);
    let dead = all_dead(&root, "", 2).await;
    assert!(dead.iter().all(|notice| notice.last_error.contains("refused") && notice.attempt_count <= 3), "{dead:?}");
    eventually("the gauge counts them", async || {
        (metric(&world, "keyward_notices{channel=\"mail\",state=\"dead\"}").await == 2.0).then_some(())
    })
    .await;
    mailbox.mode(Mode::Ok);
    let again = retry(&root, &dead[0].id).await;
    assert_eq!((again.state(), again.attempt_count), (NoticeState::Pending, dead[0].attempt_count));
    let mails = mailbox.wait_for(1, SOON).await;
    assert_eq!(mails[0].message_id, format!("<{}@example.test>", dead[0].id));
    assert_eq!(mails[0].to, [dead[0].recipient.clone()]);
    let left = all_dead(&root, "", 1).await;
    assert_eq!(left[0].id, dead[1].id, "the other one stays as it is");
}

/// A world whose mails go to a server like this, by this URL.
async fn sending(options: MailboxOptions, url: impl FnOnce(&Mailbox) -> String) -> Option<(World, Mailbox)> {
    let mailbox = Mailbox::start(options)?;
    let mut world = unstarted(Backend::Sqlite).await;
    mail_through(&mut world, url(&mailbox));
    world.start_server().await;
    wish(&world.root().await, "default", mails_to(ADA)).await;
    Some((world, mailbox))
}

/// What a test says, and that it did not arrive.
async fn refused(world: &World, mailbox: &Mailbox) -> String {
    let deliveries = test(&world.root().await, "").await.expect("tried");
    assert_eq!((deliveries.len(), deliveries[0].delivered), (1, false), "{deliveries:?}");
    assert!(mailbox.mails().is_empty());
    deliveries[0].error.clone()
}

/// As the setting takes it: STARTTLS unless it says otherwise.
fn secure_url(mailbox: &Mailbox, user: &str, password: &str) -> String {
    mailbox.url(user, password).replace("?tls=required", "")
}

#[test]
fn a_wrong_password_is_told_and_not_shown() {
    let password = "geheim-p@ss:wörd";
    let options = || MailboxOptions { login: Some(("mailer".to_owned(), password.to_owned())), ..MailboxOptions::default() };
    runtime().block_on(async {
        let url = |mailbox: &Mailbox| format!("{}?tls=off", mailbox.url("mailer", "falsch-p@ss"));
        let Some((mut world, mailbox)) = sending(options(), url).await else { return };
        let root = world.root().await;
        let error = refused(&world, &mailbox).await;
        assert!(error.contains("does not take the user and the password (535)") && !error.contains("falsch"), "{error}");
        create(&root, "", "token", 90).await;
        let waiting = tried(&root, "", 1).await;
        assert_eq!(waiting[0].last_error, error);
        mail_through(&mut world, format!("{}?tls=off", mailbox.url("mailer", password)));
        world.restart().await;
        world.advance(HOUR);
        let mails = mailbox.wait_for(1, SOON).await;
        assert_eq!(mails[0].user.as_deref(), Some("mailer"));
    });
}

#[test]
fn mails_do_not_go_without_tls_unless_that_is_said() {
    runtime().block_on(async {
        let url = |mailbox: &Mailbox| mailbox.url("", "");
        let Some((world, mailbox)) = sending(MailboxOptions::default(), url).await else { return };
        let error = refused(&world, &mailbox).await;
        assert!(error.contains("does not offer STARTTLS") && error.contains("tls=off"), "{error}");
    });
}

#[test]
fn certificates_of_mail_servers_must_be_trusted() {
    for tls in [MailTls::StartTls, MailTls::Implicit] {
        runtime().block_on(async {
            let login = Some(("mailer".to_owned(), "secret".to_owned()));
            let options = MailboxOptions { tls, login, ..MailboxOptions::default() };
            let url = |mailbox: &Mailbox| secure_url(mailbox, "mailer", "secret");
            let Some((mut world, mailbox)) = sending(options, url).await else { return };
            let error = refused(&world, &mailbox).await;
            assert!(error.contains("certificate"), "{error}");
            trust(&mut world, &mailbox.ca_pem());
            world.restart().await;
            let deliveries = test(&world.root().await, "").await.expect("tried");
            assert!(deliveries[0].delivered, "{deliveries:?}");
            let mails = mailbox.wait_for(1, SOON).await;
            assert!(mails[0].tls && mails[0].user.as_deref() == Some("mailer"));
        });
    }
    for credential in [Credential::SelfSigned, Credential::Expired, Credential::WrongName] {
        runtime().block_on(async {
            let options = MailboxOptions { tls: MailTls::Implicit, credential, ..MailboxOptions::default() };
            let url = |mailbox: &Mailbox| secure_url(mailbox, "", "");
            let Some((mut world, mailbox)) = sending(options, url).await else { return };
            trust(&mut world, &mailbox.ca_pem());
            world.restart().await;
            let error = refused(&world, &mailbox).await;
            assert!(error.contains("certificate"), "{credential:?}: {error}");
        });
    }
}
