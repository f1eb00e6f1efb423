//! How workspaces look: their settings, their policy, their notices and their routes.

use super::{Answer, Propagation, instant, minutes, notices, shows};
use crate::{
    cli::{
        expiry,
        table::{Column, Details, table},
    },
    proto::{
        CreateWorkspaceResponse, GetWorkspaceResponse, ListWorkspacesResponse, Policy, ResumeWorkspaceResponse, SuspendWorkspaceResponse,
        UpdateWorkspaceResponse, Workspace,
    },
};

shows! {
    workspace by details:
    GetWorkspaceResponse;
    CreateWorkspaceResponse, propagation;
    UpdateWorkspaceResponse, propagation;
    SuspendWorkspaceResponse, propagation;
    ResumeWorkspaceResponse, propagation;
}

impl Answer for ListWorkspacesResponse {
    const NAME: &'static str = "ListWorkspacesResponse";

    fn text(&self) -> String {
        if self.workspaces.is_empty() {
            return String::new();
        }
        let rows: Vec<Vec<String>> = self.workspaces.iter().map(row).collect();
        table(&COLUMNS, &rows)
    }
}

const COLUMNS: [Column; 6] = [
    Column { title: "ID", width_max: 63, right: false },
    Column { title: "NAME", width_max: 32, right: false },
    Column { title: "PREFIX", width_max: 12, right: false },
    Column { title: "CREATED", width_max: 17, right: false },
    Column { title: "CHANGED", width_max: 17, right: false },
    Column { title: "STATUS", width_max: 9, right: false },
];

const ROUTE_COLUMNS: [Column; 3] = [
    Column { title: "SCOPE", width_max: 127, right: false },
    Column { title: "METHOD", width_max: 32, right: false },
    Column { title: "PATH", width_max: 1_024, right: false },
];

fn row(workspace: &Workspace) -> Vec<String> {
    vec![
        workspace.id.clone(),
        workspace.display_name.clone(),
        workspace.prefix.clone(),
        minutes(workspace.create_time.as_ref()),
        minutes(workspace.update_time.as_ref()),
        status(workspace).to_owned(),
    ]
}

fn status(workspace: &Workspace) -> &'static str {
    if workspace.suspended { "Suspended" } else { "Active" }
}

fn details(workspace: &Workspace) -> String {
    let mut details = Details::default();
    details.add("id", &workspace.id).add("name", &workspace.display_name).add("prefix", &workspace.prefix);
    details.add("status", status(workspace));
    if let Some(policy) = &workspace.policy {
        add_policy(&mut details, policy);
    }
    if let Some(wishes) = &workspace.notices {
        notices::add(&mut details, wishes);
    }
    details.add("created", instant(workspace.create_time.as_ref())).add("changed", instant(workspace.update_time.as_ref()));
    details.add("etag", &workspace.etag).text() + &routes(workspace)
}

fn add_policy(details: &mut Details, policy: &Policy) {
    details.add("usual life", span(policy.default_ttl.as_ref())).add("longest life", span(policy.max_permanent_ttl.as_ref()));
    details.add("temporary life", span(policy.max_temporary_ttl.as_ref()));
    details.add("may never end", truth(policy.allow_never));
    details.add("permanent ones by", if policy.permanent_requires_admin { "administrators" } else { "anybody" });
    details.add("principals on first use", truth(policy.principals_on_first_use.unwrap_or(true)));
    details.add("tokens per principal", policy.max_tokens_per_principal.to_string());
}

fn span(span: Option<&prost_types::Duration>) -> String {
    match span {
        Some(span) => expiry::span_text(span).unwrap_or_else(|| format!("{span}")),
        None => "the default".to_owned(),
    }
}

fn truth(truth: bool) -> &'static str {
    if truth { "yes" } else { "no" }
}

/// Every route of the table of resources, below an empty line.
fn routes(workspace: &Workspace) -> String {
    let route = |resource: &str, endpoint: &str, operation: &crate::proto::Operation| {
        vec![format!("{resource}:{}", operation.operation), operation.method.clone(), format!("{endpoint}{}", operation.path)]
    };
    let of = &workspace.resources;
    let rows: Vec<Vec<String>> =
        of.iter().flat_map(|it| it.operations.iter().map(|operation| route(&it.resource, &it.endpoint, operation))).collect();
    if rows.is_empty() { String::new() } else { format!("\n{}", table(&ROUTE_COLUMNS, &rows)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Notices, Operation, Resource};

    fn workspace() -> Workspace {
        let list = Operation { operation: "list".to_owned(), method: "GET".to_owned(), path: String::new() };
        let install = Operation { operation: "install".to_owned(), method: "POST".to_owned(), path: "/{id}/install".to_owned() };
        let resource = Resource { resource: "agents".to_owned(), endpoint: "/api/agent-base".to_owned(), operations: vec![list, install] };
        Workspace {
            id: "agents".to_owned(),
            display_name: "Agent \u{1b}[31m".to_owned(),
            prefix: "agt".to_owned(),
            policy: Some(Policy {
                default_ttl: Some(prost_types::Duration { seconds: 7_776_000, nanos: 0 }),
                max_tokens_per_principal: 100,
                ..Policy::default()
            }),
            resources: vec![resource],
            notices: Some(Notices { raise_faults: true, ..Notices::default() }),
            create_time: Some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 0 }),
            ..Workspace::default()
        }
    }

    #[test]
    fn details_show_policy_and_routes() {
        let text = GetWorkspaceResponse { workspace: Some(workspace()) }.text();
        let (details, routes) = text.split_once("\n\n").expect("two parts");
        for line in [
            "name: Agent \\u{1b}[31m",
            "status: Active",
            "usual life: 90d",
            "longest life: the default",
            "may never end: no",
            "notices: faults",
        ] {
            let (key, value) = line.split_once(": ").expect("a line");
            let found = details.lines().any(|line| line.split_once(':').is_some_and(|(k, v)| (k, v.trim()) == (key, value)));
            assert!(found, "{line} is not in\n{details}");
        }
        let expected = "SCOPE           METHOD  PATH\nagents:list     GET     /api/agent-base\n\
                        agents:install  POST    /api/agent-base/{id}/install\n";
        assert_eq!(routes, expected);
    }

    #[test]
    fn a_list_shows_a_workspace_on_a_line() {
        let suspended = Workspace { suspended: true, ..workspace() };
        let text = ListWorkspacesResponse { workspaces: vec![suspended], next_page_token: String::new() }.text();
        let row = text.lines().nth(1).expect("a row");
        let values: Vec<&str> = row.split("  ").map(str::trim).filter(|value| !value.is_empty()).collect();
        assert_eq!(values, ["agents", "Agent \\u{1b}[31m", "agt", "2001-09-09T01:46Z", "Never", "Suspended"]);
        assert_eq!(ListWorkspacesResponse::default().text(), "");
    }
}
