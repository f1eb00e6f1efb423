//! The equipment of the tests of notices works: the mail server, the receiver of calls, and the libraries that check signatures.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use lettre::{
    AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor,
    message::MultiPart,
    transport::smtp::client::{Certificate, CertificateStore, Tls, TlsParameters},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::json;

use crate::{
    mailbox::{MailTls, Mailbox, MailboxOptions, Mode},
    receiver::{Behaviour, Call, Receiver},
    signature::{can_verify_webhooks, verify_webhook, verify_webhooks},
    tls::{Authority, Credential},
    world::{eventually, runtime},
};

const SOON: Duration = Duration::from_secs(20);

/// Sends one mail to these, as the url says, trusting this authority.
async fn send(mailbox: &Mailbox, url: &str, trusted: &str, to: &[&str]) -> Result<(), lettre::transport::smtp::Error> {
    let mut message = Message::builder().from("Keyward <keyward@example.test>".parse().expect("an address")).subject("Grüße: 30 Tage");
    for each in to {
        message = message.to(each.parse().expect("an address"));
    }
    let parts = MultiPart::alternative_plain_html("Läuft ab.\r\n.\r\nEnde".to_owned(), "<p>Läuft ab.</p>".to_owned());
    let message = message.multipart(parts).expect("a mail");
    let store = Certificate::from_pem(trusted.as_bytes()).expect("a certificate");
    let parameters =
        TlsParameters::builder("127.0.0.1".to_owned()).certificate_store(CertificateStore::None).add_root_certificate(store).build();
    let parameters = parameters.expect("good parameters");
    let tls = match url {
        url if url.starts_with("smtps:") => Tls::Wrapper(parameters),
        url if url.ends_with("tls=required") => Tls::Required(parameters),
        _ => Tls::None,
    };
    let builder = AsyncSmtpTransport::<Tokio1Executor>::from_url(url).expect("a URL").port(mailbox.port()).tls(tls);
    builder.timeout(Some(SOON)).build().send(message).await.map(drop)
}

#[test]
fn the_mailbox_takes_mail_with_and_without_tls() {
    for tls in [MailTls::None, MailTls::StartTls, MailTls::Implicit] {
        let login = Some(("mail user".to_owned(), "p@ss:wörd/".to_owned()));
        let Some(mailbox) = Mailbox::start(MailboxOptions { tls, login, ..MailboxOptions::default() }) else { return };
        runtime().block_on(async {
            let (good, ca) = (mailbox.url("mail user", "p@ss:wörd/"), mailbox.ca_pem());
            send(&mailbox, &good, &ca, &["a@example.test", "b@example.test"]).await.expect("taken");
            let mails = mailbox.wait_for(1, SOON).await;
            let mail = &mails[0];
            assert_eq!((mail.from.as_str(), mail.to.join(" ")), ("keyward@example.test", "a@example.test b@example.test".to_owned()));
            assert_eq!((mail.subject.as_str(), mail.header("SUBJECT")), ("Grüße: 30 Tage", Some("Grüße: 30 Tage")));
            let text = mail.text.as_deref().expect("a text").replace("\r\n", "\n");
            assert_eq!((text.trim_end(), mail.html.as_deref().map(str::trim_end)), ("Läuft ab.\n.\nEnde", Some("<p>Läuft ab.</p>")));
            assert_eq!((mail.tls, mail.user.as_deref()), (tls != MailTls::None, Some("mail user")));
            assert!(!mail.greeting.is_empty() && mail.raw.contains("multipart/alternative"), "{mail:?}");
            assert_eq!(mail.header("message-id").unwrap_or_default(), mail.message_id);

            for url in [mailbox.url("mail user", "wrong"), mailbox.url("", "")] {
                let error = send(&mailbox, &url, &ca, &["a@example.test"]).await.expect_err("no login");
                assert!(error.is_permanent(), "{url}: {error}");
            }
            if tls == MailTls::StartTls {
                let plain = good.replace("?tls=required", "");
                send(&mailbox, &plain, &ca, &["a@example.test"]).await.expect_err("it wants TLS");
            }
            if tls != MailTls::None {
                send(&mailbox, &good, &Authority::new().pem(), &["a@example.test"]).await.expect_err("not trusted");
            }
            mailbox.change_login("mail user", "new");
            send(&mailbox, &mailbox.url("mail user", "new"), &ca, &["c@example.test"]).await.expect("taken");
            assert_eq!(mailbox.mails().len(), 2);
        });
    }
}

#[test]
fn the_mailbox_fails_as_it_is_told() {
    let options = MailboxOptions { reject: vec!["gone@example.test".to_owned()], ..MailboxOptions::default() };
    let Some(mailbox) = Mailbox::start(options) else { return };
    runtime().block_on(async {
        let ca = mailbox.ca_pem();
        let mail = async |to: &str| send(&mailbox, &mailbox.url("", ""), &ca, &[to]).await;
        let a = "a@example.test";
        let error = mail("gone@example.test").await.expect_err("550");
        assert!(error.is_permanent(), "{error}");
        mailbox.refuse(&[], &["full@example.test"]);
        mail("gone@example.test").await.expect("taken");
        assert!(mail("full@example.test").await.expect_err("451").is_transient());

        mailbox.mode(Mode::Hang);
        // lettre's own timeout covers only the connect: what hangs is given up from outside.
        tokio::select! {
            outcome = mail(a) => panic!("no greeting was awaited: {outcome:?}"),
            () = mailbox.wait_until_hanging(1, SOON) => {}
        }
        mailbox.mode(Mode::HangAfterData);
        tokio::select! {
            outcome = mail(a) => panic!("no answer was awaited: {outcome:?}"),
            () = mailbox.wait_until_hanging(2, SOON) => {}
        }
        mailbox.mode(Mode::CloseInData);
        let error = mail(a).await.expect_err("closed");
        assert!(!error.is_timeout() && !error.is_permanent(), "{error:?}");
        mailbox.mode(Mode::Busy);
        assert!(mail(a).await.expect_err("451").is_transient());
        mailbox.mode(Mode::Full);
        assert!(mail(a).await.expect_err("552").is_permanent());
        assert_eq!(mailbox.mails().len(), 1, "none of those was taken");
        mailbox.mode(Mode::CloseAfterData);
        let error = mail(a).await.expect_err("closed");
        assert!(!error.is_timeout() && !error.is_permanent(), "{error:?}");
        assert_eq!(mailbox.mails().len(), 2, "it was taken");
        let before = mailbox.connections();
        mailbox.mode(Mode::Down);
        mail(a).await.expect_err("refused");
        assert_eq!((mailbox.connections(), mailbox.open_connections()), (before, 0));
        mailbox.mode(Mode::Ok);
        mail(a).await.expect("taken");
        assert_eq!((mailbox.mails().len(), mailbox.connections()), (3, before + 1));
    });
}

/// Trusts this authority alone.
fn client(authority: &Authority) -> reqwest::Client {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("a certificate")).expect("added");
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider knows them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = reqwest::Client::builder().tls_backend_preconfigured(config).redirect(reqwest::redirect::Policy::none()).no_proxy();
    client.timeout(SOON).build().expect("a client")
}

#[test]
fn the_receiver_notes_calls_and_behaves_as_it_is_told() {
    runtime().block_on(async {
        let authority = Authority::new();
        let client = client(&authority);
        let mut receiver = Receiver::start().await;
        assert_eq!(receiver.url("/a"), format!("http://127.0.0.1:{}/a", receiver.port()));
        let status = async |path: &str| client.get(receiver.url(path)).send().await.expect("an answer").status().as_u16();
        let answer = client.post(receiver.url("/a?b=c")).header("Webhook-Id", "n1").body("{\"type\":\"test\"}").send().await;
        assert_eq!(answer.expect("an answer").status(), 200);
        let calls = receiver.wait_for(1, SOON).await;
        assert_eq!((calls[0].method.as_str(), calls[0].path.as_str(), calls[0].header("webhook-id")), ("POST", "/a?b=c", Some("n1")));
        assert_eq!((calls[0].json.clone(), calls[0].body.len()), (Some(json!({ "type": "test" })), 15));

        receiver.set(Behaviour::Status(410));
        receiver.set_path("/found", Behaviour::Redirect(302, "http://127.0.0.1:1/".to_owned()));
        receiver.set_path("/later", Behaviour::Header(429, "retry-after", "7".to_owned()));
        assert_eq!((status("/x").await, status("/found?q").await, status("/later").await), (410, 302, 429));
        receiver.set(Behaviour::CloseAtOnce);
        client.get(receiver.url("/")).send().await.expect_err("closed");
        receiver.set(Behaviour::CloseMiddle);
        let mut half = client.get(receiver.url("/")).send().await.expect("the head");
        assert_eq!(half.chunk().await.expect("the first half").as_deref(), Some(&b"half"[..]));
        half.chunk().await.expect_err("closed");
        receiver.set(Behaviour::Endless);
        let mut endless = client.get(receiver.url("/")).send().await.expect("the head");
        let mut read = 0;
        while read < 1_000_000 {
            read += endless.chunk().await.expect("more").expect("no end").len();
        }
        drop(endless);
        receiver.wait_under_way(0, SOON).await;
        assert!(receiver.body_bytes_sent() >= read);
        receiver.set(Behaviour::Slow(Duration::from_millis(50)));
        let begin = Instant::now();
        assert_eq!(status("/").await, 200);
        assert!(begin.elapsed() >= Duration::from_millis(50));
        // The caller has its answer a moment before the receiver has ended with it.
        receiver.wait_under_way(0, SOON).await;

        receiver.set(Behaviour::Hang);
        let waiting: Vec<_> = (0..3).map(|_| tokio::spawn(client.get(receiver.url("/")).send())).collect();
        receiver.wait_under_way(3, SOON).await;
        // The most that were under way at once is noted a moment after the call itself.
        eventually("three at once", async || (receiver.under_way_max() == 3).then_some(())).await;
        assert_eq!(receiver.under_way(), 3);
        eventually("three connections", async || (receiver.open_connections() >= 3).then_some(())).await;
        assert!(receiver.connections() >= 3);
        for each in waiting {
            each.abort();
        }
        receiver.wait_under_way(0, SOON).await;

        receiver.close().await;
        // One that has no connection left over: what was open a moment ago fails in another way.
        let refused = self::client(&authority).get(receiver.url("/")).send().await.expect_err("refused");
        assert!(refused.is_connect(), "{refused:?}");
        receiver.open().await;
        receiver.set(Behaviour::Ok);
        assert_eq!(client.get(receiver.url("/")).send().await.expect("an answer").status(), 200);
    });
}

#[test]
fn the_receiver_shows_good_and_bad_certificates() {
    runtime().block_on(async {
        let authority = Authority::new();
        let client = client(&authority);
        let good = Receiver::start_tls(&authority, Credential::Good).await;
        for url in [good.url("/"), good.url_at("localhost", "/")] {
            assert_eq!(client.get(url).send().await.expect("an answer").status(), 200);
        }
        for bad in [Credential::WrongName, Credential::SelfSigned, Credential::Foreign, Credential::Expired] {
            let receiver = Receiver::start_tls(&authority, bad).await;
            let Err(error) = client.get(receiver.url("/")).send().await else { panic!("{bad:?} is believed") };
            assert!(error.is_connect(), "{error:?}");
            receiver.wait_refused_handshakes(1, SOON).await;
            assert_eq!((receiver.calls().len(), receiver.refused_handshakes()), (0, 1));
        }
    });
}

/// A call that is signed with this secret, so many seconds from now.
fn signed(secret: &[u8], offset: i64) -> Call {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs().cast_signed();
    let (timestamp, body) = (now + offset, "{\"type\":\"token.expiring\",\"name\":\"Grüße\"}");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
    let signature = BASE64_STANDARD.encode(ring::hmac::sign(&key, format!("msg_1.{timestamp}.{body}").as_bytes()));
    let header = |name: &str, value: String| (name.to_owned(), value);
    Call {
        method: "POST".to_owned(),
        path: "/".to_owned(),
        headers: vec![
            header("webhook-id", "msg_1".to_owned()),
            header("webhook-timestamp", timestamp.to_string()),
            header("webhook-signature", format!("v1,{signature}")),
        ],
        json: serde_json::from_str(body).ok(),
        body: body.as_bytes().to_vec(),
    }
}

#[test]
fn the_libraries_check_signatures() {
    if !can_verify_webhooks() {
        return;
    }
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let key = BASE64_STANDARD.decode(&secret["whsec_".len()..]).expect("base64");
    let (good, old, early, foreign) = (signed(&key, 0), signed(&key, -400), signed(&key, 400), signed(b"another", 0));
    let (mut forged, mut both, mut bare) = (good.clone(), good.clone(), good.clone());
    forged.body.pop();
    both.headers[2].1 =
        format!("{} {}", foreign.header("webhook-signature").expect("signed"), good.header("webhook-signature").expect("signed"));
    bare.headers.pop();
    let calls = [&good, &both, &old, &early, &foreign, &forged, &bare].map(|call| (secret, call));
    assert!(verify_webhook(secret, &good));
    assert_eq!(verify_webhooks(&calls), [true, true, false, false, false, false, false]);
}
