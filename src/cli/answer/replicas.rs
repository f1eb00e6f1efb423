//! How servers look.

use super::{Answer, Propagation, instant, minutes, shows};
use crate::{
    cli::table::{Column, Details, table},
    proto::{ListReplicasResponse, ReleaseReplicaResponse, Replica},
};

shows! {
    replica by details:
    ReleaseReplicaResponse, propagation;
}

impl Answer for ListReplicasResponse {
    const NAME: &'static str = "ListReplicasResponse";

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self.replicas.iter().map(|replica| row(replica, self.head_number)).collect();
        table(&COLUMNS, &rows)
    }
}

const COLUMNS: [Column; 7] = [
    Column { title: "ID", width_max: 32, right: false },
    Column { title: "NAME", width_max: 32, right: false },
    Column { title: "VERSION", width_max: 12, right: false },
    Column { title: "STARTED", width_max: 17, right: false },
    Column { title: "LEASE", width_max: 16, right: false },
    Column { title: "BEHIND", width_max: 20, right: true },
    Column { title: "STATUS", width_max: 24, right: false },
];

fn row(replica: &Replica, head: i64) -> Vec<String> {
    vec![
        replica.id.clone(),
        replica.display_name.clone(),
        replica.version.clone(),
        minutes(replica.start_time.as_ref()),
        lease(replica),
        (head - replica.acknowledged_number).max(0).to_string(),
        status(replica).to_owned(),
    ]
}

fn details(replica: &Replica) -> String {
    let mut details = Details::default();
    details.add("id", &replica.id).add("name", &replica.display_name).add("version", &replica.version);
    details.add("started", instant(replica.start_time.as_ref())).add("lease", lease(replica)).add("status", status(replica));
    details.text()
}

fn lease(replica: &Replica) -> String {
    let seconds = replica.lease.as_ref().map_or(0, |lease| lease.seconds);
    if replica.acked_only { format!("{seconds}s, acked only") } else { format!("{seconds}s") }
}

fn status(replica: &Replica) -> &'static str {
    match (replica.evicted, replica.self_) {
        (true, _) => "Evicted",
        (false, true) => "Active, answers this",
        (false, false) => "Active",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_shown_on_a_line_and_in_detail() {
        let one = Replica {
            id: "evt_1".to_owned(),
            display_name: "kw-0".to_owned(),
            version: "0.1.0".to_owned(),
            lease: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
            acknowledged_number: 5,
            self_: true,
            ..Replica::default()
        };
        let other = Replica { acked_only: true, evicted: true, self_: false, acknowledged_number: 7, ..one.clone() };
        let text = ListReplicasResponse { replicas: vec![one.clone(), other], head_number: 7 }.text();
        let lines: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["evt_1", "kw-0", "0.1.0", "Never", "10s", "2", "Active,", "answers", "this"]);
        assert_eq!(lines[1], ["evt_1", "kw-0", "0.1.0", "Never", "10s,", "acked", "only", "0", "Evicted"]);
        let text = ReleaseReplicaResponse { replica: Some(one), propagation: None }.text();
        assert!(text.starts_with("id:      evt_1\nname:    kw-0\n") && text.contains("lease:   10s\n"), "{text}");
    }
}
