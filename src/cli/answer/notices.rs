//! How faults and notices look, and what a workspace wants to be told.

use super::{Answer, Propagation, instant, minutes};
use crate::{
    cli::{
        table::{Column, Details, table},
        wishes,
    },
    proto::{
        AcknowledgeFaultResponse, Fault, ListFaultsResponse, ListNoticesResponse, Notice, NoticeChannel, NoticeEvent, NoticeState, Notices,
        RetryNoticeResponse, RotateWebhookSecretResponse, SendTestNoticeResponse,
    },
};

impl Answer for ListFaultsResponse {
    const NAME: &'static str = "ListFaultsResponse";

    fn text(&self) -> String {
        fault_rows(&self.faults)
    }
}

impl Answer for AcknowledgeFaultResponse {
    const NAME: &'static str = "AcknowledgeFaultResponse";

    fn text(&self) -> String {
        fault_rows(&self.fault)
    }

    fn propagation(&self) -> Option<&Propagation> {
        self.propagation.as_ref()
    }
}

impl Answer for ListNoticesResponse {
    const NAME: &'static str = "ListNoticesResponse";

    fn text(&self) -> String {
        notice_rows(&self.notices)
    }
}

impl Answer for RetryNoticeResponse {
    const NAME: &'static str = "RetryNoticeResponse";

    fn text(&self) -> String {
        notice_rows(&self.notice)
    }

    fn propagation(&self) -> Option<&Propagation> {
        self.propagation.as_ref()
    }
}

impl Answer for SendTestNoticeResponse {
    const NAME: &'static str = "SendTestNoticeResponse";

    fn text(&self) -> String {
        let row = |it: &crate::proto::TestDelivery| {
            let delivered = if it.delivered { "yes" } else { "no" };
            vec![channel(it.channel()).to_owned(), it.recipient.clone(), delivered.to_owned(), it.error.clone()]
        };
        rows(&TEST_COLUMNS, self.deliveries.iter().map(row))
    }
}

impl Answer for RotateWebhookSecretResponse {
    const NAME: &'static str = "RotateWebhookSecretResponse";
    const SECRET_IS: &'static str = "This is the secret of the webhook itself";
    const SECRET_LOST: &'static str = "the webhook's secret could not be written and is lost: run `keyward notices rotate-secret` again";

    /// How its receiver checks a call.
    fn text(&self) -> String {
        let previous = match &self.previous_expire_time {
            Some(end) => format!("good until {}", instant(Some(end))),
            None => "there was none".to_owned(),
        };
        let mut details = Details::default();
        details.add("check with", "a library of Standard Webhooks: https://www.standardwebhooks.com");
        details.add("signed in", "the headers webhook-id, webhook-timestamp and webhook-signature");
        details.add("previous one", previous).text()
    }

    fn secret(&self) -> Option<&str> {
        Some(&self.webhook_secret)
    }

    fn propagation(&self) -> Option<&Propagation> {
        self.propagation.as_ref()
    }
}

const FAULT_COLUMNS: [Column; 9] = [
    Column { title: "NAME", width_max: 32, right: false },
    Column { title: "PREFIX", width_max: 8, right: false },
    Column { title: "PRINCIPAL", width_max: 24, right: false },
    Column { title: "WHAT", width_max: 26, right: false },
    Column { title: "STEP", width_max: 7, right: true },
    Column { title: "RAISED", width_max: 17, right: false },
    Column { title: "ACKNOWLEDGED BY", width_max: 24, right: false },
    Column { title: "TOKEN", width_max: 26, right: false },
    Column { title: "ID", width_max: 64, right: false },
];

const NOTICE_COLUMNS: [Column; 10] = [
    Column { title: "ID", width_max: 64, right: false },
    Column { title: "EVENT", width_max: 17, right: false },
    Column { title: "CHANNEL", width_max: 7, right: false },
    Column { title: "RECIPIENT", width_max: 32, right: false },
    Column { title: "TOKENS", width_max: 10, right: true },
    Column { title: "CREATED", width_max: 17, right: false },
    Column { title: "TRIES", width_max: 10, right: true },
    Column { title: "NEXT TRY", width_max: 17, right: false },
    Column { title: "STATUS", width_max: 8, right: false },
    Column { title: "LAST ERROR", width_max: 80, right: false },
];

const TEST_COLUMNS: [Column; 4] = [
    Column { title: "CHANNEL", width_max: 7, right: false },
    Column { title: "RECIPIENT", width_max: 254, right: false },
    Column { title: "DELIVERED", width_max: 9, right: false },
    Column { title: "ERROR", width_max: 512, right: false },
];

fn rows(columns: &[Column], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() { String::new() } else { table(columns, &rows) }
}

/// A line for each fault.
pub(in crate::cli) fn fault_rows<'a>(faults: impl IntoIterator<Item = &'a Fault>) -> String {
    rows(&FAULT_COLUMNS, faults.into_iter().map(fault_row))
}

fn fault_row(fault: &Fault) -> Vec<String> {
    let verb = if fault.days_before == 0 { "expired" } else { "ends" };
    vec![
        fault.display_name.clone(),
        fault.hint.clone(),
        fault.principal.clone(),
        format!("{verb} {}", minutes(fault.expire_time.as_ref())),
        wishes::day_text(fault.days_before),
        minutes(fault.raise_time.as_ref()),
        if fault.acknowledge_time.is_some() { fault.acknowledged_by.clone() } else { "nobody".to_owned() },
        fault.token_id.clone(),
        fault.id.clone(),
    ]
}

/// A line for each notice.
pub(in crate::cli) fn notice_rows<'a>(notices: impl IntoIterator<Item = &'a Notice>) -> String {
    rows(&NOTICE_COLUMNS, notices.into_iter().map(notice_row))
}

fn notice_row(notice: &Notice) -> Vec<String> {
    vec![
        notice.id.clone(),
        event(notice.event()).to_owned(),
        channel(notice.channel()).to_owned(),
        notice.recipient.clone(),
        notice.token_count.to_string(),
        minutes(notice.create_time.as_ref()),
        notice.attempt_count.to_string(),
        minutes(notice.next_attempt_time.as_ref()),
        state(notice.state()).to_owned(),
        notice.last_error.clone(),
    ]
}

/// As calls of the webhook name it.
fn event(event: NoticeEvent) -> &'static str {
    match event {
        NoticeEvent::Unspecified => "unknown",
        NoticeEvent::TokenExpiring => "token.expiring",
        NoticeEvent::TokenExpired => "token.expired",
        NoticeEvent::TokenCreated => "token.created",
        NoticeEvent::TokenRegenerated => "token.regenerated",
        NoticeEvent::TokenRevoked => "token.revoked",
        NoticeEvent::TokenLeaked => "token.leaked",
        NoticeEvent::Test => "test",
    }
}

fn channel(channel: NoticeChannel) -> &'static str {
    match channel {
        NoticeChannel::Unspecified => "unknown",
        NoticeChannel::Mail => "mail",
        NoticeChannel::Webhook => "webhook",
    }
}

fn state(state: NoticeState) -> &'static str {
    match state {
        NoticeState::Unspecified => "Unknown",
        NoticeState::Pending => "Pending",
        NoticeState::Dead => "Given up",
    }
}

/// The lines of a workspace's notices: one if nobody is told.
pub(super) fn add(details: &mut Details, notices: &Notices) {
    let Notices { days_before, raise_faults, emails, mail_owner, webhook_url, events, renew_url } = notices;
    if !raise_faults && emails.is_empty() && !mail_owner && webhook_url.is_empty() {
        details.add("notices", "nobody is told");
        return;
    }
    let ways =
        [(*raise_faults, "faults"), (!emails.is_empty(), "mail"), (*mail_owner, "mail to the owner"), (!webhook_url.is_empty(), "webhook")];
    let ways: Vec<&str> = ways.into_iter().filter(|(is_on, _)| *is_on).map(|(_, way)| way).collect();
    let days: Vec<String> = days_before.iter().map(|days| wishes::day_text(*days)).collect();
    let days = if days.is_empty() { "the default".to_owned() } else { days.join(", ") };
    details.add("notices", ways.join(", ")).add("days before the end", days);
    details.add_if("mail to", emails).add_if("webhook", webhook_url);
    let also: Vec<&str> = events.iter().map(|event| wishes::event_name(*event).unwrap_or("unknown")).collect();
    details.add_if("also told", &also.join(", ")).add_if("new tokens at", renew_url);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::answer::json, proto::TestDelivery};

    fn time(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    fn fault() -> Fault {
        Fault {
            id: "flt_1".to_owned(),
            token_id: "tok_1".to_owned(),
            display_name: "ci\u{1b}[31m".to_owned(),
            hint: "prod_abc".to_owned(),
            principal: "ann".to_owned(),
            days_before: 7,
            expire_time: Some(time(1_000_604_800)),
            raise_time: Some(time(1_000_000_000)),
            ..Fault::default()
        }
    }

    fn cells(text: &str) -> Vec<&str> {
        text.lines().nth(1).expect("a row").split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
    }

    #[test]
    fn a_fault_is_a_line() {
        let text = ListFaultsResponse { faults: vec![fault()], next_page_token: String::new() }.text();
        let expected = ["ci\\u{1b}[31m", "prod_abc", "ann", "ends 2001-09-16T01:46Z", "7", "2001-09-09T01:46Z", "nobody", "tok_1", "flt_1"];
        assert_eq!(cells(&text), expected);
        let past = Fault { days_before: 0, acknowledge_time: Some(time(1_000_700_000)), acknowledged_by: "bob".to_owned(), ..fault() };
        let text = AcknowledgeFaultResponse { fault: Some(past), propagation: None }.text();
        assert_eq!(cells(&text)[3..7], ["expired 2001-09-16T01:46Z", "expired", "2001-09-09T01:46Z", "bob"]);
        assert_eq!(ListFaultsResponse::default().text(), "");
    }

    #[test]
    fn a_notice_is_a_line() {
        let notice = Notice {
            id: "ntc_1".to_owned(),
            event: NoticeEvent::TokenExpiring.into(),
            channel: NoticeChannel::Mail.into(),
            recipient: "ann@example.org".to_owned(),
            token_count: 3,
            state: NoticeState::Dead.into(),
            create_time: Some(time(1_000_000_000)),
            attempt_count: 9,
            last_error: "550 no\u{7f}".to_owned(),
            ..Notice::default()
        };
        let text = RetryNoticeResponse { notice: Some(notice), propagation: None }.text();
        let expected =
            ["ntc_1", "token.expiring", "mail", "ann@example.org", "3", "2001-09-09T01:46Z", "9", "Never", "Given up", "550 no\\u{7f}"];
        assert_eq!(cells(&text), expected);
        assert_eq!(ListNoticesResponse::default().text(), "");
    }

    #[test]
    fn a_test_says_what_became_of_each() {
        let hook = TestDelivery {
            channel: NoticeChannel::Webhook.into(),
            recipient: "hooks.example.org".to_owned(),
            error: "503".to_owned(),
            ..TestDelivery::default()
        };
        let mail = TestDelivery {
            channel: NoticeChannel::Mail.into(),
            recipient: "ann@example.org".to_owned(),
            delivered: true,
            ..TestDelivery::default()
        };
        let text = SendTestNoticeResponse { deliveries: vec![mail, hook] }.text();
        let expected = "CHANNEL  RECIPIENT          DELIVERED  ERROR\nmail     ann@example.org    yes\n\
                        webhook  hooks.example.org  no         503\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn every_answer_of_notices_is_in_the_proto_files() {
        fn check<A: Answer + Default>() {
            json(&A::default()).unwrap_or_else(|failure| panic!("{}: {failure:?}", A::NAME));
        }
        check::<ListFaultsResponse>();
        check::<AcknowledgeFaultResponse>();
        check::<ListNoticesResponse>();
        check::<RetryNoticeResponse>();
        check::<SendTestNoticeResponse>();
        check::<RotateWebhookSecretResponse>();
    }

    fn shown(notices: &Notices) -> String {
        let mut details = Details::default();
        add(&mut details, notices);
        details.text()
    }

    #[test]
    fn notices_of_a_workspace_take_few_lines() {
        assert_eq!(shown(&Notices { days_before: vec![7], events: vec![6], ..Notices::default() }), "notices: nobody is told\n");
        let all = Notices {
            days_before: vec![30, 1, 0],
            raise_faults: true,
            emails: "ops@example.org; ann@example.org".to_owned(),
            mail_owner: true,
            webhook_url: "https://hooks.example.org".to_owned(),
            events: vec![6, 3],
            renew_url: "https://example.org/new".to_owned(),
        };
        let expected = "notices:             faults, mail, mail to the owner, webhook\ndays before the end: 30, 1, expired\n\
                        mail to:             ops@example.org; ann@example.org\nwebhook:             https://hooks.example.org\n\
                        also told:           leaked, created\nnew tokens at:       https://example.org/new\n";
        assert_eq!(shown(&all), expected);
        let bare = "notices:             faults\ndays before the end: the default\n";
        assert_eq!(shown(&Notices { raise_faults: true, ..Notices::default() }), bare);
    }
}
