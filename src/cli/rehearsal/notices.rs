//! Commands about faults and notices against the server that only writes down what it is asked.

use tonic::{Request, Response, Status};

use super::{Answer, Stage, open, play};
use crate::{
    cli::{failure::Exit, tests::run_client},
    proto::{self, Fault, Notice, NoticeChannel, NoticeState, Notices, TestDelivery, Workspace, notice_service_server::NoticeService},
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn fault(id: &str) -> Fault {
    Fault { id: id.to_owned(), display_name: "ci".to_owned(), days_before: 7, ..Fault::default() }
}

#[tonic::async_trait]
impl NoticeService for Stage {
    async fn list_faults(&self, request: Request<proto::ListFaultsRequest>) -> Answer<proto::ListFaultsResponse> {
        let request = request.into_inner();
        let next_page_token = if request.page_token.is_empty() { "p1".to_owned() } else { String::new() };
        let faults = vec![fault(if request.page_token.is_empty() { "flt_2" } else { "flt_1" })];
        self.notes().fault_lists.push(request);
        Ok(Response::new(proto::ListFaultsResponse { faults, next_page_token }))
    }

    async fn acknowledge_fault(&self, request: Request<proto::AcknowledgeFaultRequest>) -> Answer<proto::AcknowledgeFaultResponse> {
        match request.into_inner().id.as_str() {
            "flt_9" => Err(Status::not_found("there is no such fault")),
            id => Ok(Response::new(proto::AcknowledgeFaultResponse { fault: Some(fault(id)), propagation: None })),
        }
    }

    async fn list_notices(&self, request: Request<proto::ListNoticesRequest>) -> Answer<proto::ListNoticesResponse> {
        self.notes().notice_lists.push(request.into_inner());
        Ok(Response::new(proto::ListNoticesResponse::default()))
    }

    async fn retry_notice(&self, request: Request<proto::RetryNoticeRequest>) -> Answer<proto::RetryNoticeResponse> {
        let notice = Notice { id: request.into_inner().id, state: NoticeState::Pending.into(), ..Notice::default() };
        Ok(Response::new(proto::RetryNoticeResponse { notice: Some(notice), propagation: None }))
    }

    async fn send_test_notice(&self, request: Request<proto::SendTestNoticeRequest>) -> Answer<proto::SendTestNoticeResponse> {
        let delivery = |channel: NoticeChannel, recipient: &str, error: &str| TestDelivery {
            channel: channel.into(),
            recipient: recipient.to_owned(),
            delivered: error.is_empty(),
            error: error.to_owned(),
        };
        let error = if request.into_inner().workspace == "broken" { "answered 503" } else { "" };
        let deliveries =
            vec![delivery(NoticeChannel::Mail, "ops@example.org", ""), delivery(NoticeChannel::Webhook, "hooks.example.org", error)];
        Ok(Response::new(proto::SendTestNoticeResponse { deliveries }))
    }

    async fn rotate_webhook_secret(
        &self,
        request: Request<proto::RotateWebhookSecretRequest>,
    ) -> Answer<proto::RotateWebhookSecretResponse> {
        let is_first = request.into_inner().workspace == "new";
        let previous_expire_time = (!is_first).then_some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 0 });
        let webhook_secret = SECRET.to_owned();
        Ok(Response::new(proto::RotateWebhookSecretResponse { webhook_secret, previous_expire_time, propagation: None }))
    }
}

/// Runs a command; answers its exit code, standard output and standard error.
fn run(address: &str, arguments: &[&str]) -> (Exit, String, String) {
    run_client(arguments, &[("KEYWARD_TOKEN", "kw_own"), ("KEYWARD_ADDRESS", address)], "")
}

#[test]
fn faults_are_listed_and_acknowledged() {
    let stage = Stage::default();
    let address = open(&stage);
    let alone = play(&address, &["faults", "--all", "--unacknowledged", "--workspace", "acme"], "");
    assert_eq!(alone, play(&address, &["faults", "list", "--all", "--unacknowledged", "--workspace", "acme"], ""));
    assert!(alone.lines().count() == 3 && alone.lines().all(|line| line.ends_with("ID") || line.contains("flt_")), "{alone}");
    let lists = &stage.notes().fault_lists;
    assert!(lists.len() == 4 && lists[..2] == lists[2..], "{lists:?}");
    assert!(lists[1].unacknowledged_only && lists[1].workspace == "acme" && lists[1].page_token == "p1", "{lists:?}");
    let (exit, out, err) = run(&address, &["faults", "acknowledge", "flt_1", "flt_9", "flt_2"]);
    assert_eq!((exit, out.lines().count(), err.as_str()), (Exit::Refused, 3, "keyward: flt_9: there is no such fault\n"));
    let one = play(&address, &["faults", "acknowledge", "flt_1", "--output", "json"], "");
    assert!(serde_json::from_str::<serde_json::Value>(&one).is_ok_and(|object| object["fault"]["daysBefore"] == 7), "{one}");
}

#[test]
fn notices_are_listed_and_sent_again() {
    let stage = Stage::default();
    let address = open(&stage);
    let (exit, out, err) = run(&address, &["notices", "list", "--dead", "--workspace", "acme"]);
    assert_eq!((exit, out.as_str(), err.as_str()), (Exit::Good, "", "There are no such notices.\n"));
    let asked = stage.notes().notice_lists[0].clone();
    assert_eq!((asked.state(), asked.workspace.as_str(), asked.page_size), (NoticeState::Dead, "acme", 50));
    let out = play(&address, &["notices", "retry", "ntc_1", "ntc_2"], "");
    assert!(out.lines().count() == 3 && out.contains("ntc_2") && out.contains("Pending"), "{out}");
}

#[test]
fn a_test_that_was_not_delivered_is_a_refusal() {
    let address = open(&Stage::default());
    let (exit, out, _) = run(&address, &["notices", "test"]);
    assert!(exit == Exit::Good && out.lines().count() == 3, "{out}");
    for format in ["table", "json"] {
        let (exit, out, err) = run(&address, &["notices", "test", "--workspace", "broken", "--output", format]);
        assert!(exit == Exit::Refused && out.contains("answered 503") && err.is_empty(), "{out}{err}");
    }
}

#[test]
fn the_secret_of_a_webhook_stands_alone() {
    let address = open(&Stage::default());
    let (exit, out, err) = run(&address, &["notices", "rotate-secret"]);
    assert_eq!((exit, out), (Exit::Good, format!("{SECRET}\n")));
    for part in
        ["Standard Webhooks", "webhook-id, webhook-timestamp and webhook-signature", "good until 2001-09-09T01:46:40Z", "the webhook"]
    {
        assert!(err.contains(part) && !err.contains(SECRET), "{part} is not in\n{err}");
    }
    let (_, _, err) = run(&address, &["notices", "rotate-secret", "--workspace", "new"]);
    assert!(err.contains("there was none"), "{err}");
    let (_, out, err) = run(&address, &["notices", "rotate-secret", "--output", "json"]);
    assert!(out.contains(SECRET) && err.is_empty(), "{err}");
}

#[test]
fn a_webhook_that_was_set_is_followed_by_a_hint() {
    let stage = Stage::default();
    let address = open(&stage);
    let (exit, _, err) =
        run(&address, &["workspace", "update", "acme", "--webhook-url", "https://h.example.org", "--notice-days", "7,expired"]);
    assert!(exit == Exit::Good && err.contains("`keyward notices rotate-secret --workspace acme`"), "{err}");
    let (_, _, own) = run(&address, &["workspace", "update", "--webhook-url", "https://h.example.org"]);
    assert!(own.contains("`keyward notices rotate-secret`"), "{own}");
    let (_, _, cleared) = run(&address, &["workspace", "update", "acme", "--webhook-url", "", "--notice-events", "none"]);
    assert_eq!(cleared, "");
    let create = ["workspace", "create", "acme", "--name", "Acme", "--prefix", "acm", "--raise-faults", "true"];
    play(&address, &create, "");
    play(&address, &create[..7], "");
    let notes = stage.notes();
    let paths: Vec<_> = notes.updates.iter().map(|update| update.update_mask.clone().unwrap_or_default().paths.join(" ")).collect();
    assert_eq!(paths, ["notices.days_before notices.webhook_url", "notices.webhook_url", "notices.webhook_url notices.events"]);
    let set = notes.updates[0].workspace.clone().and_then(|workspace| workspace.notices);
    let expected = Notices { days_before: vec![7, 0], webhook_url: "https://h.example.org".to_owned(), ..Notices::default() };
    assert_eq!(set, Some(expected));
    let made: Vec<_> = notes.creations.iter().map(|workspace| workspace.notices.clone()).collect();
    assert_eq!(made, [Some(Notices { raise_faults: true, ..Notices::default() }), None]);
}

#[test]
fn notices_that_were_exported_are_imported() {
    let stage = Stage::default();
    let notices = Notices { raise_faults: true, events: vec![6], emails: "ops@example.org".to_owned(), ..Notices::default() };
    stage.notes().workspace = Workspace { display_name: "Acme".to_owned(), notices: Some(notices.clone()), ..Workspace::default() };
    let address = open(&stage);
    let file = play(&address, &["workspace", "export", "acme"], "");
    play(&address, &["workspace", "import", "staging", "-"], &file);
    let update = stage.notes().updates[0].clone();
    assert_eq!(update.workspace.and_then(|workspace| workspace.notices), Some(notices));
    let paths = update.update_mask.unwrap_or_default().paths;
    assert_eq!(paths.iter().filter(|path| path.starts_with("notices.")).count(), 7, "{paths:?}");
}
