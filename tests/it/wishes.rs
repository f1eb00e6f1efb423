//! What a workspace wants to be told, as it is set: what is wrong is named, with its field and what to do.

use keyward::proto::{self, NoticeEvent};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    outlets::mail_through,
    world::{Actor, World},
};

crate::on_both_databases!(wishes_are_set_by_the_field, wrong_wishes_are_named, without_a_mail_server_nobody_gets_mail);

const USUAL: [i32; 5] = [30, 14, 7, 1, 0];

async fn update(actor: &Actor, notices: proto::Notices, paths: &[&str]) -> Result<proto::Workspace, Status> {
    let workspace = proto::Workspace { id: "default".to_owned(), notices: Some(notices), ..Default::default() };
    actor.update_workspace(workspace, paths).await
}

/// The fields that are wrong, and what is said of each.
fn violations(status: &Status) -> Vec<(String, String)> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_details_bad_request().expect("BadRequest");
    details.field_violations.into_iter().map(|violation| (violation.field, violation.description)).collect()
}

/// A server that can send mails, though it sends none here.
async fn with_mail(world: &mut World) -> Actor {
    mail_through(world, "smtp://127.0.0.1:1?tls=off".to_owned());
    world.restart().await;
    world.admin().await
}

async fn wishes_are_set_by_the_field(mut world: World) {
    let admin = with_mail(&mut world).await;
    let emails = |text: &str| proto::Notices { emails: text.to_owned(), ..Default::default() };
    // Blanks and a semicolon at the end do no harm; who is named twice is told once.
    let first = update(&admin, emails(" ada@example.com ;;  bob@example.com;ADA@example.com ; "), &["notices.emails"]).await.expect("set");
    let notices = first.notices.clone().expect("notices");
    assert_eq!(notices.emails, "ada@example.com; bob@example.com");
    assert_eq!((notices.days_before.as_slice(), notices.raise_faults, notices.mail_owner), (&USUAL[..], false, false));
    // The same once more changes nothing, whichever way it is written.
    let audits = world.db_number("SELECT COUNT(*) FROM audit_event").await;
    for text in ["ada@example.com; bob@example.com", "ada@example.com;bob@example.com;"] {
        let again = update(&admin, emails(text), &["notices.emails"]).await.expect("set");
        assert_eq!((&again.etag, &again), (&first.etag, &first));
    }
    // Several fields, and only these.
    let wanted = proto::Notices {
        days_before: vec![0, 7, 90, 7],
        raise_faults: true,
        mail_owner: true,
        webhook_url: " https://hooks.example.com/keyward?a=b ".to_owned(),
        events: vec![NoticeEvent::TokenLeaked.into(), NoticeEvent::TokenCreated.into(), NoticeEvent::TokenLeaked.into()],
        renew_url: "https://example.com/tokens".to_owned(),
        ..Default::default()
    };
    let paths = ["notices.days_before", "notices.raise_faults", "notices.webhook_url", "notices.events", "notices.renew_url"];
    let second = update(&admin, wanted.clone(), &paths).await.expect("set");
    assert_ne!(second.etag, first.etag);
    let set = second.notices.clone().expect("notices");
    let expected = proto::Notices {
        days_before: vec![90, 7, 0],
        webhook_url: "https://hooks.example.com/keyward?a=b".to_owned(),
        events: vec![NoticeEvent::TokenLeaked.into(), NoticeEvent::TokenCreated.into()],
        emails: notices.emails.clone(),
        mail_owner: false,
        ..wanted.clone()
    };
    assert_eq!(set, expected);
    let again = update(&admin, set.clone(), &["notices"]).await.expect("set");
    assert_eq!(again, second, "what was shown sets what is there");
    // The whole: what is not said is as usual.
    let third = update(&admin, proto::Notices { raise_faults: true, ..Default::default() }, &["notices"]).await.expect("set");
    let usual = proto::Notices { days_before: USUAL.to_vec(), raise_faults: true, ..Default::default() };
    assert_eq!(third.notices, Some(usual));
    let none = update(&admin, proto::Notices::default(), &["notices.raise_faults"]).await.expect("set").notices.expect("notices");
    assert!(!none.raise_faults);
    // Other fields of the workspace leave them alone.
    update(&admin, set.clone(), &["notices"]).await.expect("set");
    let renamed = update(&admin, proto::Notices::default(), &["display_name"]).await;
    assert!(renamed.is_err() || renamed.is_ok_and(|renamed| renamed.notices == Some(set)));
    let audits = world.db_number("SELECT COUNT(*) FROM audit_event").await - audits;
    assert!((4..=5).contains(&audits), "each change once, and nothing else: {audits}");
}

async fn wrong_wishes_are_named(mut world: World) {
    let admin = with_mail(&mut world).await;
    let usual = proto::Notices::default;
    let cases = [
        ("days_before[1]", proto::Notices { days_before: vec![7, -1], ..usual() }, "must be 0 to 3650 days"),
        ("days_before[0]", proto::Notices { days_before: vec![3_651], ..usual() }, "must be 0 to 3650 days"),
        ("days_before", proto::Notices { days_before: (0..21).collect(), ..usual() }, "at most 20 entries; it has 21"),
        ("emails", proto::Notices { emails: "ada@example.com; bob".to_owned(), ..usual() }, "`bob` is not a mail address, such as"),
        ("emails", proto::Notices { emails: "a@example.com, b@example.com".to_owned(), ..usual() }, "separate addresses with semicolons"),
        ("emails", proto::Notices { emails: "a@example.com;".repeat(21), ..usual() }, "at most 20 addresses; it has 21"),
        ("webhook_url", proto::Notices { webhook_url: "http://10.0.0.1/".to_owned(), ..usual() }, "webhook_allowed_cidrs"),
        ("webhook_url", proto::Notices { webhook_url: "ftp://example.com".to_owned(), ..usual() }, "must begin with https://"),
        ("webhook_url", proto::Notices { webhook_url: "hooks.example.com".to_owned(), ..usual() }, "must be a URL such as"),
        ("webhook_url", proto::Notices { webhook_url: "https://u:p@example.com/".to_owned(), ..usual() }, "user name or a password"),
        ("webhook_url", proto::Notices { webhook_url: "https://example.com/#x".to_owned(), ..usual() }, "leave out #"),
        ("webhook_url", proto::Notices { webhook_url: format!("https://example.com/{}", "x".repeat(512)), ..usual() }, "at most 512"),
        ("renew_url", proto::Notices { renew_url: "http://example.com/".to_owned(), ..usual() }, "must begin with https://"),
        ("renew_url", proto::Notices { renew_url: "javascript:alert(1)".to_owned(), ..usual() }, "https://"),
        (
            "events[1]",
            proto::Notices { events: vec![NoticeEvent::TokenLeaked.into(), NoticeEvent::TokenExpired.into()], ..usual() },
            "must be",
        ),
        ("events[0]", proto::Notices { events: vec![NoticeEvent::Test.into()], ..usual() }, "NOTICE_EVENT_TOKEN_CREATED"),
        ("events[0]", proto::Notices { events: vec![0], ..usual() }, "NOTICE_EVENT_TOKEN_LEAKED"),
        ("events[0]", proto::Notices { events: vec![77], ..usual() }, "NOTICE_EVENT_TOKEN_LEAKED"),
    ];
    for (field, notices, says) in cases {
        let name = format!("notices.{}", field.split('[').next().expect("a name"));
        for path in ["notices", &name] {
            let status = update(&admin, notices.clone(), &[path]).await.expect_err(field);
            let found = violations(&status);
            assert_eq!(found.len(), 1, "{path}: {found:?}");
            assert_eq!(found[0].0, format!("workspace.notices.{field}"), "{found:?}");
            assert!(found[0].1.contains(says), "{found:?}");
        }
        // A workspace that is made is looked at in the same way.
        let workspace = proto::Workspace { id: "new".to_owned(), prefix: "new".to_owned(), notices: Some(notices), ..Default::default() };
        let root = world.root().await;
        let message = proto::CreateWorkspaceRequest { workspace: Some(proto::Workspace { display_name: "new".to_owned(), ..workspace }) };
        let status = root.workspaces().create_workspace(root.request(message)).await.expect_err(field);
        assert_eq!(violations(&status)[0].0, format!("workspace.notices.{field}"));
    }
    // Everything that is wrong is said at once.
    let wrong = proto::Notices {
        days_before: vec![-1],
        emails: "x; y".to_owned(),
        webhook_url: "x".to_owned(),
        events: vec![1],
        renew_url: "x".to_owned(),
        ..usual()
    };
    let status = update(&admin, wrong, &["notices", "notices.color"]).await.expect_err("all of it");
    let mut fields: Vec<String> = violations(&status).into_iter().map(|(field, _)| field).collect();
    fields.sort();
    fields.dedup();
    let named = ["days_before[0]", "emails", "events[0]", "renew_url", "webhook_url"].map(|field| format!("workspace.notices.{field}"));
    assert_eq!(fields, [&["update_mask.paths[1]".to_owned()][..], &named].concat());
    for path in ["notices.", "notices.color", "notices.emails.0", "notice", "workspace.notices"] {
        let found = violations(&update(&admin, usual(), &[path]).await.expect_err(path));
        assert_eq!(found[0].0, "update_mask.paths[0]");
        assert!(found[0].1.contains("notices.<field>"), "{found:?}");
    }
    let root = world.root().await;
    let message = proto::GetWorkspaceRequest { id: "default".to_owned() };
    let workspace = root.workspaces().get_workspace(root.request(message)).await.expect("there").into_inner().workspace.expect("one");
    assert_eq!(workspace.notices.expect("notices"), proto::Notices { days_before: USUAL.to_vec(), ..usual() });
}

async fn without_a_mail_server_nobody_gets_mail(mut world: World) {
    let admin = world.admin().await;
    let mail = proto::Notices { emails: "ada@example.com".to_owned(), mail_owner: true, ..Default::default() };
    let found = violations(&update(&admin, mail.clone(), &["notices"]).await.expect_err("no mail"));
    let mut fields: Vec<&str> = found.iter().map(|(field, _)| field.as_str()).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["workspace.notices.emails", "workspace.notices.mail_owner"]);
    assert!(found.iter().all(|(_, says)| says.contains("smtp_url and smtp_from")), "{found:?}");
    // None can be said on any server; and what was set while there was one can be left, changed beside, and taken away.
    update(&admin, proto::Notices { emails: " ; ".to_owned(), ..Default::default() }, &["notices"]).await.expect("nobody");
    let admin = with_mail(&mut world).await;
    update(&admin, mail.clone(), &["notices"]).await.expect("set");
    world.settings.remove("smtp_url");
    world.settings.remove("smtp_from");
    world.restart().await;
    let admin = world.actor("chief", &["keyward:admin"]).await;
    let changed =
        update(&admin, proto::Notices { raise_faults: true, ..Default::default() }, &["notices.raise_faults"]).await.expect("set");
    let notices = changed.notices.expect("notices");
    assert_eq!((notices.raise_faults, notices.emails.as_str(), notices.mail_owner), (true, "ada@example.com", true));
    let cleared = update(&admin, proto::Notices::default(), &["notices.emails", "notices.mail_owner"]).await.expect("set");
    let notices = cleared.notices.expect("notices");
    assert_eq!((notices.emails.as_str(), notices.mail_owner), ("", false));
}
