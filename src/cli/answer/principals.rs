//! How principals look.

use super::{Answer, Propagation, instant, minutes, shows};
use crate::{
    cli::table::{Column, Details, table},
    proto::{
        GetPrincipalResponse, ListPrincipalsResponse, Principal, PrincipalKind, ResumePrincipalResponse, Role, SuspendPrincipalResponse,
        UpsertPrincipalResponse,
    },
};

shows! {
    principal by details:
    GetPrincipalResponse;
    UpsertPrincipalResponse, propagation;
    SuspendPrincipalResponse, propagation;
    ResumePrincipalResponse, propagation;
}

impl Answer for ListPrincipalsResponse {
    const NAME: &'static str = "ListPrincipalsResponse";

    fn text(&self) -> String {
        if self.principals.is_empty() {
            return String::new();
        }
        let rows: Vec<Vec<String>> = self.principals.iter().map(row).collect();
        table(&COLUMNS, &rows)
    }
}

const COLUMNS: [Column; 8] = [
    Column { title: "ID", width_max: 32, right: false },
    Column { title: "NAME", width_max: 32, right: false },
    Column { title: "EMAIL", width_max: 32, right: false },
    Column { title: "KIND", width_max: 7, right: false },
    Column { title: "ROLE", width_max: 7, right: false },
    Column { title: "CREATED", width_max: 17, right: false },
    Column { title: "CHANGED", width_max: 17, right: false },
    Column { title: "STATUS", width_max: 9, right: false },
];

fn row(principal: &Principal) -> Vec<String> {
    vec![
        principal.id.clone(),
        principal.display_name.clone(),
        principal.email.clone(),
        kind(principal.kind()).to_owned(),
        role(principal.role()).to_owned(),
        minutes(principal.create_time.as_ref()),
        minutes(principal.update_time.as_ref()),
        status(principal).to_owned(),
    ]
}

fn details(principal: &Principal) -> String {
    let mut details = Details::default();
    details.add("id", &principal.id).add_if("name", &principal.display_name).add_if("email", &principal.email);
    details.add("kind", kind(principal.kind())).add("role", role(principal.role())).add("status", status(principal));
    details.add("workspace", &principal.workspace);
    details.add("created", instant(principal.create_time.as_ref())).add("changed", instant(principal.update_time.as_ref()));
    details.add("etag", &principal.etag).text()
}

fn kind(kind: PrincipalKind) -> &'static str {
    match kind {
        PrincipalKind::Unspecified => "unknown",
        PrincipalKind::User => "user",
        PrincipalKind::Service => "service",
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Unspecified => "unknown",
        Role::Member => "member",
        Role::Admin => "admin",
    }
}

fn status(principal: &Principal) -> &'static str {
    if principal.suspended { "Suspended" } else { "Active" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_principal_is_shown_on_a_line_and_in_detail() {
        let ann = Principal {
            workspace: "default".to_owned(),
            id: "ann".to_owned(),
            kind: PrincipalKind::User.into(),
            display_name: "Ann \u{202e}".to_owned(),
            role: Role::Admin.into(),
            suspended: true,
            etag: "e1".to_owned(),
            ..Principal::default()
        };
        let list = ListPrincipalsResponse { principals: vec![ann.clone()], next_page_token: String::new() }.text();
        let values: Vec<&str> = list.lines().nth(1).expect("a row").split_whitespace().collect();
        assert_eq!(values, ["ann", "Ann", "\\u{202e}", "user", "admin", "Never", "Never", "Suspended"]);
        let text = GetPrincipalResponse { principal: Some(ann) }.text();
        let expected = "id:        ann\nname:      Ann \\u{202e}\nkind:      user\nrole:      admin\nstatus:    Suspended\n\
                        workspace: default\ncreated:   Never\nchanged:   Never\netag:      e1\n";
        assert_eq!(text, expected);
        assert_eq!(ListPrincipalsResponse::default().text(), "");
    }
}
