//! What the tests of notices have in common: wishes of a workspace, what is on its list, and what went out.

use std::time::Duration;

use keyward::proto::{self, NoticeEvent, NoticeState, create_token_request::Lifetime, notice_service_client::NoticeServiceClient};
use tonic::{Status, transport::Channel};

use crate::{
    mailbox::Mailbox,
    world::{Actor, Backend, World, eventually, new_token},
};

/// Longer than anything takes that goes well.
pub const SOON: Duration = Duration::from_secs(20);
pub const HOUR: Duration = Duration::from_hours(1);
pub const DAY: Duration = Duration::from_hours(24);

/// The settings of a server that looks every second, and may call receivers on this machine.
pub async fn unstarted(backend: Backend) -> World {
    let mut world = World::unstarted(backend).await;
    prepare(&mut world);
    world
}

/// As [`unstarted`], of a world that is there.
pub fn prepare(world: &mut World) {
    world.settings.insert("notices_interval", "1s".to_owned());
    world.settings.insert("webhook_allowed_cidrs", "127.0.0.1/32".to_owned());
}

/// Mails go to this server, as the setting `smtp_url` says.
pub fn mail_through(world: &mut World, url: String) {
    world.settings.insert("smtp_url", url);
    world.settings.insert("smtp_from", "Keyward <keyward@example.test>".to_owned());
}

/// The mail server in plain text.
pub fn plain_url(mailbox: &Mailbox) -> String {
    format!("{}?tls=off", mailbox.url("", ""))
}

/// Certificates of this authority are trusted.
pub fn trust(world: &mut World, ca_pem: &str) {
    let path = world.folder.path().join("notices-ca.pem");
    std::fs::write(&path, ca_pem).expect("writable");
    world.settings.insert("notices_ca_file", path.display().to_string());
}

/// Calls of a webhook, when tokens are created and a week before their end.
pub fn calls_to(url: &str) -> proto::Notices {
    proto::Notices {
        webhook_url: url.to_owned(),
        events: vec![NoticeEvent::TokenCreated.into()],
        days_before: vec![7],
        ..Default::default()
    }
}

/// Mails to these, when tokens are created and a week before their end.
pub fn mails_to(emails: &str) -> proto::Notices {
    proto::Notices { emails: emails.to_owned(), ..calls_to("") }
}

/// Says what a workspace wants.
pub async fn wish(actor: &Actor, workspace: &str, notices: proto::Notices) -> proto::Workspace {
    let workspace = proto::Workspace { id: workspace.to_owned(), notices: Some(notices), ..Default::default() };
    actor.update_workspace(workspace, &["notices"]).await.expect("changed")
}

/// Makes a token in a workspace, which lives for some days.
pub async fn create(actor: &Actor, workspace: &str, name: &str, days: i64) -> proto::CreateTokenResponse {
    let request = proto::CreateTokenRequest {
        workspace: workspace.to_owned(),
        principal: "owner".to_owned(),
        lifetime: Some(Lifetime::Ttl(prost_types::Duration { seconds: days * 86_400, nanos: 0 })),
        ..new_token(name, &[])
    };
    actor.create(request).await.expect("created")
}

pub fn client(actor: &Actor) -> NoticeServiceClient<Channel> {
    NoticeServiceClient::new(actor.channel.clone())
}

/// What is not delivered of a workspace, the latest first.
pub async fn list(actor: &Actor, workspace: &str, state: NoticeState) -> Vec<proto::Notice> {
    let message =
        proto::ListNoticesRequest { workspace: workspace.to_owned(), state: state.into(), page_size: 1_000, ..Default::default() };
    client(actor).list_notices(actor.request(message)).await.expect("a page").into_inner().notices
}

/// Waits until so many notices of a workspace were given up, and nothing else is left.
pub async fn all_dead(actor: &Actor, workspace: &str, count: usize) -> Vec<proto::Notice> {
    eventually(&format!("{count} notices of {workspace} are given up"), async || {
        let notices = list(actor, workspace, NoticeState::Unspecified).await;
        (notices.len() == count && notices.iter().all(|notice| notice.state() == NoticeState::Dead)).then_some(notices)
    })
    .await
}

/// Waits until each notice of a workspace was tried so often, and failed.
pub async fn tried(actor: &Actor, workspace: &str, times: i32) -> Vec<proto::Notice> {
    eventually(&format!("notices of {workspace} were tried {times} times"), async || {
        let notices = list(actor, workspace, NoticeState::Unspecified).await;
        let is_tried = |notice: &proto::Notice| notice.attempt_count >= times && !notice.last_error.is_empty();
        (!notices.is_empty() && notices.iter().all(is_tried)).then_some(notices)
    })
    .await
}

/// Waits until everything of a workspace was delivered.
pub async fn all_delivered(actor: &Actor, workspace: &str) {
    eventually(&format!("nothing of {workspace} waits"), async || {
        list(actor, workspace, NoticeState::Unspecified).await.is_empty().then_some(())
    })
    .await;
}

pub async fn retry(actor: &Actor, id: &str) -> proto::Notice {
    let message = proto::RetryNoticeRequest { id: id.to_owned() };
    client(actor).retry_notice(actor.request(message)).await.expect("retried").into_inner().notice.expect("a notice")
}

pub async fn rotate(actor: &Actor, workspace: &str) -> proto::RotateWebhookSecretResponse {
    let message = proto::RotateWebhookSecretRequest { workspace: workspace.to_owned() };
    client(actor).rotate_webhook_secret(actor.request(message)).await.expect("rotated").into_inner()
}

pub async fn test(actor: &Actor, workspace: &str) -> Result<Vec<proto::TestDelivery>, Status> {
    let message = proto::SendTestNoticeRequest { workspace: workspace.to_owned() };
    client(actor).send_test_notice(actor.request(message)).await.map(|answer| answer.into_inner().deliveries)
}

/// Waits until the outbox was looked into from now on, as many times; a look looks at both channels.
pub async fn looks(world: &World, count: u32) {
    let before = world.queries("notices_due").await;
    eventually("the outbox is looked into", async || {
        (world.queries("notices_due").await >= before + 2.0 * f64::from(count) + 1.0).then_some(())
    })
    .await;
}

/// One number of the page that Prometheus reads, by its name and labels.
pub async fn metric(world: &World, name: &str) -> f64 {
    let page = world.metrics().await;
    let number = page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    number.unwrap_or_else(|| panic!("{name} is not in {page}"))
}
