//! No secret is anywhere but with its holder.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::{Child, Command},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use keyward::proto::{self, Verdict};

use crate::{
    gateways,
    mailbox::{Mailbox, MailboxOptions},
    outlets::{self, SOON},
    receiver::{Behaviour, Receiver},
    world::{self, Actor, Backend, eventually, free_port, keyward, new_token, runtime},
};

/// A server as a process of its own, ended with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle.as_bytes())
}

#[test]
fn no_secret_is_anywhere() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        if backend == Backend::Postgres && world::postgres().is_none() {
            world::skip("no PostgreSQL on this machine (initdb and postgres; Debian: apt-get install postgresql)");
            continue;
        }
        runtime().block_on(search(backend));
    }
}

/// Every secret at every place where a gateway may put one, also at the wrong one.
async fn ask_as_gateways(admin: &Actor, port: u16, secrets: &[String], answers: &mut String) {
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let (base, own) = (format!("http://127.0.0.1:{port}"), &secrets[0]);
    for secret in secrets {
        let bearer = format!("Bearer {secret}");
        let authorize = |query: &str| client.get(format!("{base}/v1/authorize?{query}")).header("authorization", &bearer);
        let introspect = || client.post(format!("{base}/oauth2/introspect")).header("content-type", "application/x-www-form-urlencoded");
        let requests = [
            authorize("required_scopes=").header("x-keyward-authorization", format!("Bearer {own}")),
            authorize("required_scopes=").header("x-keyward-authorization", &bearer),
            authorize("required_scopes=").header("x-keyward-authorization", secret),
            authorize(&format!("{secret}=1")).header("x-keyward-authorization", format!("Bearer {own}")),
            authorize(&format!("token_header={secret}")).header("x-keyward-authorization", format!("Bearer {own}")),
            introspect().basic_auth("gateway", Some(own)).body(format!("token={secret}")),
            introspect().basic_auth("gateway", Some(secret)).body(format!("token={secret}")),
            introspect().bearer_auth(own).body(format!("{secret}=token&token={secret}")),
            introspect().bearer_auth(own).body(secret.clone()),
        ];
        for request in requests {
            let answer = request.send().await.expect("an answer");
            write!(answers, "{:?}{:?}", answer.status(), answer.headers()).expect("room");
            answers.push_str(&answer.text().await.expect("a body"));
        }
        for (name, value) in [("authorization", bearer.as_str()), ("x-api-key", secret)] {
            for settings in [("required_scopes", ""), ("token_header", "x-api-key"), (secret.as_str(), "1"), ("audience", secret)] {
                write!(answers, "{:?}", gateways::check(admin, &[(name, value)], &[settings]).await).expect("room");
            }
        }
    }
}

/// Everything that the interface offers, at the most talkative level, and then a search for each secret that ever was.
async fn search(backend: Backend) {
    let folder = tempfile::tempdir().expect("a folder");
    let (port, metrics, http) = (free_port(), free_port(), free_port());
    let database = match backend {
        Backend::Postgres => Some(world::new_postgres_database().await),
        Backend::Sqlite => None,
    };
    let password = "Zq8canary-of-the-mail-server7Xw";
    let login = Some(("mailer".to_owned(), password.to_owned()));
    let mailbox = Mailbox::start(MailboxOptions { login, reject: vec!["gone@example.test".to_owned()], ..MailboxOptions::default() });
    let receiver = Receiver::start().await;
    let start = |format: &str| {
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.path().join("log")).expect("writable");
        let mut command = keyward();
        command.args(["serve", "--log", "trace", "--log-format", format, "--listen", &format!("127.0.0.1:{port}")]);
        command
            .args(["--http-listen", &format!("127.0.0.1:{http}"), "--metrics-listen", &format!("127.0.0.1:{metrics}"), "--data-dir"])
            .arg(folder.path().join("data"));
        command.arg("--root-token-file").arg(folder.path().join("root"));
        command.args(["--notices-interval", "1s", "--webhook-allowed-cidrs", "127.0.0.1/32"]);
        if let Some(mailbox) = &mailbox {
            command.env("KEYWARD_SMTP_URL", format!("{}?tls=off", mailbox.url("mailer", password)));
            command.env("KEYWARD_SMTP_FROM", "keyward@example.test");
        }
        if let Some(url) = &database {
            command.env("KEYWARD_DATABASE_URL", url);
        }
        Process(command.stdout(log.try_clone().expect("a file")).stderr(log).spawn().expect("it runs"))
    };
    let mut server = start("text");
    let address = format!("http://127.0.0.1:{port}");
    let channel = eventually("the server answers", async || {
        tonic::transport::Channel::from_shared(address.clone()).expect("an address").connect().await.ok()
    })
    .await;
    let root = eventually("the root token is written", async || {
        fs::read_to_string(folder.path().join("root")).ok().filter(|text| text.ends_with('\n'))
    })
    .await;
    let root = root.trim().to_owned();
    let admin = Actor { channel, token: Some(root.clone()) };
    let mut secrets = vec![root];
    let mut answers = String::new();
    exercise(&admin, &mut secrets, &mut answers).await;
    let mut keys = Vec::new();
    be_told(&admin, mailbox.as_ref(), &receiver, (&mut secrets, &mut keys), &mut answers).await;
    // Also what the command line is given and says.
    let pasted = secrets[2].clone();
    for arguments in [&["validate", &pasted][..], &["token", "list", &pasted], &["token", "get", &pasted], &["whoami", "--output", &pasted]]
    {
        let output =
            keyward().args(arguments).env("KEYWARD_ADDRESS", &address).env("KEYWARD_TOKEN", &secrets[0]).output().expect("it runs");
        answers.push_str(&String::from_utf8_lossy(&output.stdout));
        answers.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    ask_as_gateways(&admin, http, &secrets, &mut answers).await;
    answers.push_str(&metrics_page(metrics).await);
    stop(&mut server);
    let mut server = start("json");
    eventually("the server answers", async || {
        admin.get("tok_0000000000000000000000").await.err().filter(|status| status.code() == tonic::Code::NotFound)
    })
    .await;
    exercise(&admin, &mut secrets, &mut answers).await;
    be_told(&admin, mailbox.as_ref(), &receiver, (&mut secrets, &mut keys), &mut answers).await;
    ask_as_gateways(&admin, http, &secrets, &mut answers).await;
    answers.push_str(&metrics_page(metrics).await);
    stop(&mut server);

    let log = fs::read(folder.path().join("log")).expect("readable");
    assert!(contains(&log, "ValidateToken") && log.len() > 10_000, "the log is talkative: {} bytes", log.len());
    let mut places = vec![("the log".to_owned(), log), ("the answers".to_owned(), answers.into_bytes())];
    let files = files(&folder.path().join("data"));
    if let Some(url) = &database {
        let dump = Command::new("pg_dump").args(["--inserts", url]).output().expect("pg_dump");
        assert!(dump.status.success() && dump.stdout.len() > 10_000, "{}", String::from_utf8_lossy(&dump.stderr));
        places.push(("the dump".to_owned(), dump.stdout));
    }
    let calls = receiver.calls();
    assert!(calls.iter().any(|call| contains(&call.body, &secrets[0][..3])), "hints are told");
    places.extend(
        calls.iter().map(|call| ("a call".to_owned(), format!("{:?} {}", call.headers, String::from_utf8_lossy(&call.body)).into())),
    );
    if let Some(mailbox) = &mailbox {
        let mails = mailbox.mails();
        assert!(mails.len() > 4, "{mails:?}");
        places.extend(mails.iter().map(|mail| ("a mail".to_owned(), format!("{}{:?}{:?}", mail.raw, mail.text, mail.html).into())));
    }
    assert!(keys.len() == 4);
    for (place, contents) in places.iter().chain(&files) {
        for key in &keys {
            let body = key.strip_prefix("whsec_").expect("a webhook's secret");
            assert!(!contains(contents, body) && !contains(contents, &body[8..28]), "{place} holds the secret of a webhook ({backend:?})");
        }
        assert!(
            !contains(contents, password) && !contains(contents, "canary-of-the-mail"),
            "{place} holds the password of the mail server"
        );
        // What a sign-in sends: it is in no log either.
        let plain = BASE64_STANDARD.encode(format!("\0mailer\0{password}"));
        assert!(!contains(contents, &plain), "{place} holds the password of the mail server as it is sent");
    }
    assert!(secrets.len() > 16);
    // Nothing beyond the first 8 characters. In a file of SQLite they stand right before the token's scopes, the first letters of which may be the next of the secret by chance.
    let shown = places.iter().map(|place| (place, 8)).chain(files.iter().map(|place| (place, 8 + 2)));
    for ((place, contents), shown) in shown {
        for secret in &secrets {
            // Not the whole, not the secret part, not the proof.
            let body = &secret[secret.len() - 45..];
            for part in [secret.as_str(), &body[1..28], &body[6..20], &body[28..39], &secret[..=shown]] {
                assert!(!contains(contents, part), "{place} holds {part} of a token ({backend:?})");
            }
        }
    }
}

fn stop(server: &mut Process) {
    world::run_as_root(&["kill", "-TERM", &server.0.id().to_string()]);
    assert!(server.0.wait().expect("an end").success());
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    entries.map(|entry| (entry.path().display().to_string(), fs::read(entry.path()).expect("readable"))).collect()
}

async fn metrics_page(port: u16) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: keyward\r\n\r\n").await.expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).await.expect("a page");
    assert!(page.contains("keyward_requests_total"));
    page
}

/// Calls every method, well and badly, with secrets wherever somebody might paste one.
async fn exercise(admin: &Actor, secrets: &mut Vec<String>, answers: &mut String) {
    let mut note = |what: String| answers.push_str(&what);
    let request = proto::CreateTokenRequest { request_id: format!("r{}", secrets.len()), ..new_token("canary", &["keyward:self", "a:b"]) };
    let created = admin.create(request.clone()).await.expect("created");
    admin.create(request).await.expect("answered again");
    let token = created.token.expect("a token");
    secrets.push(created.secret.clone());
    let regenerate = proto::RegenerateTokenRequest {
        id: token.id.clone(),
        grace: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        request_id: format!("g{}", secrets.len()),
        ..Default::default()
    };
    secrets.push(admin.tokens().regenerate_token(admin.request(regenerate)).await.expect("done").into_inner().secret);
    let secret = secrets.last().expect("one").clone();
    let holder = Actor { channel: admin.channel.clone(), token: Some(secret.clone()) };
    for text in [&secret, &created.secret, &format!("{secret}x"), &secret[1..].to_owned()] {
        let question = proto::ValidateTokenRequest { token: text.clone(), required_scopes: vec!["c:d".to_owned()], ..Default::default() };
        note(format!("{:?}", admin.ask(question.clone()).await.expect("an answer")));
        let batch = proto::BatchValidateTokensRequest { requests: vec![question; 2] };
        note(format!("{:?}", admin.validation().batch_validate_tokens(admin.request(batch)).await.expect("answers")));
    }
    assert_eq!(admin.use_token(&secret).await, Verdict::Valid);
    note(format!("{:?}", holder.own().who_am_i(holder.request(proto::WhoAmIRequest {})).await.expect("known")));
    note(format!("{:?}", holder.own().list_my_tokens(holder.request(proto::ListMyTokensRequest::default())).await.expect("a page")));
    // Secrets in the wrong place: errors quote rules, not what was sent.
    for status in [
        admin.get(&secret).await.map(drop),
        admin.revoke(&secret).await.map(drop),
        admin.list(proto::ListTokensRequest { page_token: secret.clone(), order_by: secret.clone(), ..Default::default() }).await.map(drop),
        admin.update(token.clone(), &[&secret]).await.map(drop),
        admin
            .create(proto::CreateTokenRequest { scopes: vec![secret.clone()], audiences: vec![secret.clone()], ..new_token("t", &[]) })
            .await
            .map(drop),
        admin.ask(proto::ValidateTokenRequest { token: "x".to_owned(), client_ip: secret.clone(), ..Default::default() }).await.map(drop),
        Actor { channel: admin.channel.clone(), token: Some(format!("{secret} {secret}")) }.get("tok").await.map(drop),
    ] {
        note(format!("{:?}", status.expect_err("wrong")));
    }
    let mine =
        proto::CreateMyTokenRequest { display_name: "mine".to_owned(), request_id: format!("m{}", secrets.len()), ..Default::default() };
    let mine = holder.own().create_my_token(holder.request(mine)).await.expect("created").into_inner().secret;
    let passing = proto::IssueTemporaryTokenRequest { session_id: "s".to_owned(), ..Default::default() };
    let passing = holder.own().issue_temporary_token(holder.request(passing)).await.expect("created").into_inner().secret;
    let asked = proto::ValidateTokenRequest {
        token: mine.clone(),
        http_method: secret.clone(),
        path: format!("/{secret}?token={secret}"),
        ..Default::default()
    };
    note(format!("{:?}", admin.ask(asked).await.expect("an answer")));
    for tokens in [vec![mine.clone(), format!("{mine}x"), secret[1..].to_owned()], vec![mine.repeat(9)], Vec::new()] {
        let stranger = Actor { channel: admin.channel.clone(), token: None };
        note(format!("{:?}", stranger.own().report_leaked_tokens(stranger.request(proto::ReportLeakedTokensRequest { tokens })).await));
    }
    let sheet = proto::Workspace { id: secret.clone(), prefix: secret.clone(), etag: secret.clone(), ..Default::default() };
    note(format!("{:?}", admin.update_workspace(sheet, &["prefix", &secret]).await.expect_err("wrong")));
    let person = proto::Principal { id: "p".to_owned(), email: secret.clone(), workspace: secret.clone(), ..Default::default() };
    let person = proto::UpsertPrincipalRequest { principal: Some(person) };
    note(format!("{:?}", admin.principals().upsert_principal(admin.request(person)).await.expect_err("wrong")));
    let filter = proto::ListAuditEventsRequest { methods: vec![secret.clone()], token_id: secret.clone(), ..Default::default() };
    note(format!("{:?}", admin.audit().list_audit_events(admin.request(filter)).await.expect_err("wrong")));
    note(format!("{:?}", admin.audit().list_audit_events(admin.request(proto::ListAuditEventsRequest::default())).await.expect("a page")));
    secrets.extend([mine, passing]);
    let request = proto::RegenerateSelfRequest::default();
    secrets.push(holder.own().regenerate_self(holder.request(request)).await.expect("done").into_inner().secret);
    let holder = Actor { channel: admin.channel.clone(), token: secrets.last().cloned() };
    note(format!("{:?}", holder.own().revoke_self(holder.request(proto::RevokeSelfRequest::default())).await.expect("done")));
    for name in ["a", "b", "c"] {
        let created = admin.create(proto::CreateTokenRequest { principal: "p".to_owned(), ..new_token(name, &[]) }).await.expect("created");
        secrets.push(created.secret);
        admin.deactivate(&created.token.expect("a token").id).await.expect("done");
    }
    admin.revoke_principal("p").await.expect("done");
    note(format!("{:?}", admin.list(proto::ListTokensRequest::default()).await.expect("a page")));
    admin.delete(&token.id).await.expect("done");
}

/// Has notices sent of every kind that a change causes, delivered and not, with tokens and secrets that must not be in them.
async fn be_told(
    admin: &Actor,
    mailbox: Option<&Mailbox>,
    receiver: &Receiver,
    (secrets, keys): (&mut Vec<String>, &mut Vec<String>),
    answers: &mut String,
) {
    use keyward::proto::NoticeEvent::{TokenCreated, TokenLeaked, TokenRegenerated, TokenRevoked};
    let emails = if mailbox.is_some() { "ada@example.test; gone@example.test" } else { "" };
    let wishes = proto::Notices {
        emails: emails.to_owned(),
        raise_faults: true,
        days_before: Vec::new(),
        events: [TokenCreated, TokenRegenerated, TokenRevoked, TokenLeaked].map(Into::into).to_vec(),
        ..outlets::calls_to(&receiver.url("/hook"))
    };
    let mut note = |what: String| answers.push_str(&what);
    note(format!("{:?}", outlets::wish(admin, "default", wishes).await));
    keys.push(outlets::rotate(admin, "").await.webhook_secret);
    keys.push(outlets::rotate(admin, "").await.webhook_secret);
    receiver.set(Behaviour::Ok);
    let (calls, mails) = (receiver.calls().len(), mailbox.map_or(0, |mailbox| mailbox.mails().len()));
    // Near its end: a step, a fault, and each event.
    let created = outlets::create(admin, "", "told", 3).await;
    let regenerated = admin.regenerate(&created.token.expect("a token").id, 60).await.expect("done").secret;
    let revoked = outlets::create(admin, "", "told", 90).await;
    admin.revoke(&revoked.token.expect("a token").id).await.expect("done");
    receiver.wait_for(calls + 5, SOON).await;
    if let Some(mailbox) = mailbox {
        mailbox.wait_for(mails + 5, SOON).await;
    }
    let reported = proto::ReportLeakedTokensRequest { tokens: vec![regenerated.clone()] };
    admin.own().report_leaked_tokens(admin.request(reported)).await.expect("noted");
    receiver.wait_for(calls + 6, SOON).await;
    if let Some(mailbox) = mailbox {
        mailbox.wait_for(mails + 6, SOON).await;
    }
    note(format!("{:?}", outlets::test(admin, "").await.expect("sent")));
    // What is in the wrong place is not repeated; what fails is kept.
    receiver.set(Behaviour::Status(500));
    secrets.extend([created.secret, regenerated, revoked.secret]);
    let key = keys.last().expect("one").clone();
    for text in [&key, secrets.last().expect("one")] {
        let wrong = proto::Notices { webhook_url: text.clone(), renew_url: text.clone(), ..Default::default() };
        let workspace = proto::Workspace { id: "default".to_owned(), notices: Some(wrong), ..Default::default() };
        note(format!("{:?}", admin.update_workspace(workspace, &["notices.webhook_url", "notices.renew_url"]).await.expect_err("wrong")));
        let message = proto::RetryNoticeRequest { id: text.clone() };
        note(format!("{:?}", outlets::client(admin).retry_notice(admin.request(message)).await.expect_err("wrong")));
        let message = proto::AcknowledgeFaultRequest { id: text.clone() };
        note(format!("{:?}", outlets::client(admin).acknowledge_fault(admin.request(message)).await.expect_err("wrong")));
        let message = proto::ListFaultsRequest { token_id: text.clone(), page_token: text.clone(), ..Default::default() };
        note(format!("{:?}", outlets::client(admin).list_faults(admin.request(message)).await.expect_err("wrong")));
    }
    secrets.push(outlets::create(admin, "", "not told", 90).await.secret);
    note(format!("{:?}", outlets::tried(admin, "", 1).await));
    let faults = outlets::client(admin).list_faults(admin.request(proto::ListFaultsRequest::default())).await.expect("a page");
    note(format!("{:?}", faults.into_inner()));
    // What exercises the rest is not told.
    outlets::wish(admin, "default", proto::Notices::default()).await;
}
