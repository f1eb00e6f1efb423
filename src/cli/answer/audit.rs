//! How the audit looks: a line for each event.

use super::{Answer, instant};
use crate::{
    cli::table::{Column, table},
    proto::{AuditEvent, ListAuditEventsResponse},
};

impl Answer for ListAuditEventsResponse {
    const NAME: &'static str = "ListAuditEventsResponse";

    fn text(&self) -> String {
        if self.events.is_empty() {
            return String::new();
        }
        let rows: Vec<Vec<String>> = self.events.iter().map(row).collect();
        table(&COLUMNS, &rows)
    }
}

const COLUMNS: [Column; 7] = [
    Column { title: "TIME", width_max: 20, right: false },
    Column { title: "METHOD", width_max: 24, right: false },
    Column { title: "CODE", width_max: 19, right: false },
    Column { title: "ACTOR", width_max: 24, right: false },
    Column { title: "TOKEN/PRINCIPAL", width_max: 26, right: false },
    Column { title: "REASON", width_max: 32, right: false },
    Column { title: "ADDRESS", width_max: 39, right: false },
];

fn row(event: &AuditEvent) -> Vec<String> {
    vec![
        instant(event.event_time.as_ref()),
        event.method.clone(),
        event.code.clone(),
        actor(event),
        subject(event).to_owned(),
        event.reason.clone(),
        event.actor_address.clone(),
    ]
}

/// The principal, with its workspace if that is another one than the event's.
fn actor(event: &AuditEvent) -> String {
    if event.actor_workspace.is_empty() || event.actor_workspace == event.workspace {
        event.actor_principal.clone()
    } else {
        format!("{}/{}", event.actor_workspace, event.actor_principal)
    }
}

/// The token that was changed, else the principal; of a workspace that was changed, nothing.
fn subject(event: &AuditEvent) -> &str {
    if event.token_id.is_empty() { &event.principal } else { &event.token_id }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> AuditEvent {
        AuditEvent {
            workspace: "acme".to_owned(),
            event_time: Some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 5 }),
            method: "RevokeToken".to_owned(),
            code: "OK".to_owned(),
            actor_workspace: "default".to_owned(),
            actor_principal: "root".to_owned(),
            actor_address: "10.0.0.7".to_owned(),
            token_id: "tok_1".to_owned(),
            principal: "ann".to_owned(),
            reason: "leaked\u{7f}".to_owned(),
            ..AuditEvent::default()
        }
    }

    fn cells(event: AuditEvent) -> Vec<String> {
        let text = ListAuditEventsResponse { events: vec![event], next_page_token: String::new() }.text();
        text.lines().nth(1).expect("a row").split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn an_event_is_a_line() {
        let expected = ["2001-09-09T01:46:40Z", "RevokeToken", "OK", "default/root", "tok_1", "leaked\\u{7f}", "10.0.0.7"];
        assert_eq!(cells(event()), expected);
        let by_own = AuditEvent { actor_workspace: "acme".to_owned(), token_id: String::new(), ..event() };
        assert_eq!(cells(by_own)[3..5], ["root", "ann"]);
        assert_eq!(ListAuditEventsResponse::default().text(), "");
    }
}
