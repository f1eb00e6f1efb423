//! `keyward principal …`: the people and service accounts that tokens stand for.

use clap::{Arg, ArgMatches, Command};
use tonic::{Code, transport::Channel};

use super::{
    arguments::{command, option, text, workspace},
    connection::{self, ANSWER_BYTES_MAX, Connection},
    failure::{Exit, Failure},
    paging,
    session::Session,
    tokens::reason,
};
use crate::proto::{
    DeletePrincipalRequest, GetPrincipalRequest, ListPrincipalsRequest, ListPrincipalsResponse, Principal, PrincipalKind,
    ResumePrincipalRequest, Role, SuspendPrincipalRequest, UpsertPrincipalRequest, principal_service_client::PrincipalServiceClient,
};

pub(super) fn principal_command() -> Command {
    Command::new("principal")
        .about("Manages principals: the people and service accounts that tokens stand for")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([upsert_command(), list_command(), get_command(), suspend_command(), resume_command(), delete_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn upsert_command() -> Command {
    let examples = "  keyward principal upsert ann --name \"Ann Lee\" --email ann@example.org --role admin\n  \
                    keyward principal upsert import-job --kind service";
    command("upsert", "Makes a principal, or changes it if it is there; what you do not name stays as it is", examples)
        .args([id(), workspace()])
        .arg(option("kind", "KIND", "A person or a program [default: user]").value_parser(["user", "service"]))
        .arg(option("name", "TEXT", "A name for people [default: the id]"))
        .arg(option("email", "ADDRESS", "A mail address"))
        .arg(
            option("role", "ROLE", "admin: may create permanent tokens where the policy leaves that to administrators [default: member]")
                .value_parser(["member", "admin"]),
        )
        .arg(etag())
}

fn list_command() -> Command {
    let examples = "  keyward principal list --query @example.org\n  keyward principal list --workspace acme --all --output json";
    command("list", "Lists principals by id", examples)
        .arg(workspace())
        .arg(option("query", "TEXT", "With this text in their id, name or mail address"))
        .args(paging::args())
}

fn get_command() -> Command {
    command("get", "Shows a principal", "  keyward principal get ann").args([id(), workspace()])
}

fn suspend_command() -> Command {
    let examples = "  keyward principal suspend ann --reason \"on leave\"";
    command("suspend", "Refuses every token of a principal until it is resumed", examples).args([id(), workspace(), reason(), etag()])
}

fn resume_command() -> Command {
    command("resume", "Ends a suspension", "  keyward principal resume ann").args([id(), workspace(), etag()])
}

fn delete_command() -> Command {
    let examples = "  keyward principal delete ann --reason \"has left\"";
    command("delete", "Revokes every token of a principal and forgets the principal", examples).args([id(), workspace(), reason(), etag()])
}

fn id() -> Arg {
    Arg::new("id").value_name("ID").required(true).help("Which principal")
}

fn etag() -> Arg {
    option("etag", "ETAG", "Only if this still is the principal's etag: nobody else has changed it since you looked")
}

async fn principals(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, PrincipalServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = PrincipalServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    Ok((connection, client))
}

/// Reads the principal first, and sends its etag with the change: what somebody else changes between is not lost.
pub(super) async fn upsert(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = principals(args, session).await?;
    let message = GetPrincipalRequest { workspace: text(args, "workspace"), id: text(args, "id") };
    let known = match client.get_principal(connection.request(message)).await {
        Ok(answer) => answer.into_inner().principal.unwrap_or_default(),
        Err(status) if status.code() == Code::NotFound => Principal::default(),
        Err(status) => return Err(status.into()),
    };
    let message = UpsertPrincipalRequest { principal: Some(changed(args, known)) };
    let answer = client.upsert_principal(connection.request(message)).await?.into_inner();
    session.remark(if answer.created { "The principal is new." } else { "The principal was there." });
    session.answer(&answer)
}

/// The principal that is known, with what was given.
fn changed(args: &ArgMatches, known: Principal) -> Principal {
    let given = |name: &str, known: String| args.get_one::<String>(name).cloned().unwrap_or(known);
    Principal {
        workspace: text(args, "workspace"),
        id: text(args, "id"),
        kind: kind(args).map_or(known.kind, i32::from),
        display_name: given("name", known.display_name),
        email: given("email", known.email),
        role: role(args).map_or(known.role, i32::from),
        etag: given("etag", known.etag),
        ..Principal::default()
    }
}

fn kind(args: &ArgMatches) -> Option<PrincipalKind> {
    PrincipalKind::from_str_name(&format!("PRINCIPAL_KIND_{}", text(args, "kind").to_uppercase()))
}

fn role(args: &ArgMatches) -> Option<Role> {
    Role::from_str_name(&format!("ROLE_{}", text(args, "role").to_uppercase()))
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, client) = principals(args, session).await?;
    let (principals, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListPrincipalsRequest { workspace: text(args, "workspace"), query: text(args, "query"), page_size, page_token };
        let mut client: PrincipalServiceClient<Channel> = client.clone();
        let page = client.list_principals(connection.request(message)).await?.into_inner();
        Ok((page.principals, page.next_page_token))
    })
    .await?;
    paging::remark(session, "principals", &principals, &next_page_token);
    session.answer(&ListPrincipalsResponse { principals, next_page_token })
}

pub(super) async fn get(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = principals(args, session).await?;
    let message = GetPrincipalRequest { workspace: text(args, "workspace"), id: text(args, "id") };
    let answer = client.get_principal(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn suspend(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = principals(args, session).await?;
    let message = SuspendPrincipalRequest {
        workspace: text(args, "workspace"),
        id: text(args, "id"),
        reason: text(args, "reason"),
        etag: text(args, "etag"),
    };
    let answer = client.suspend_principal(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn resume(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = principals(args, session).await?;
    let message = ResumePrincipalRequest { workspace: text(args, "workspace"), id: text(args, "id"), etag: text(args, "etag") };
    let answer = client.resume_principal(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn delete(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = principals(args, session).await?;
    let message = DeletePrincipalRequest {
        workspace: text(args, "workspace"),
        id: text(args, "id"),
        reason: text(args, "reason"),
        etag: text(args, "etag"),
    };
    let answer = client.delete_principal(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        let mut matches = principal_command().no_binary_name(true).try_get_matches_from(arguments)?;
        Ok(matches.remove_subcommand().expect("a subcommand").1)
    }

    fn ann() -> Principal {
        Principal {
            workspace: "default".to_owned(),
            id: "ann".to_owned(),
            kind: PrincipalKind::Service.into(),
            display_name: "Ann".to_owned(),
            email: "ann@example.org".to_owned(),
            role: Role::Admin.into(),
            suspended: true,
            etag: "e1".to_owned(),
            ..Principal::default()
        }
    }

    #[test]
    fn what_is_not_named_stays_as_it_is() {
        let after = |arguments: &[&str], known| changed(&parse(&[&["upsert", "ann"], arguments].concat()).expect("well formed"), known);
        let same = after(&[], ann());
        assert_eq!(same, Principal { workspace: String::new(), suspended: false, ..ann() });
        assert_eq!(after(&["--role", "member", "--email", ""], ann()), Principal { role: 1, email: String::new(), ..same.clone() });
        assert_eq!(after(&["--kind", "user", "--name", "A", "--etag", "e2"], ann()).etag, "e2");
        let new = Principal { id: "ann".to_owned(), ..Principal::default() };
        assert_eq!(after(&[], Principal::default()), new);
    }

    #[test]
    fn a_principal_is_named() {
        for arguments in [&["upsert"][..], &["get"], &["delete"], &["upsert", "ann", "--role", "root"], &["list", "ann"]] {
            assert_eq!(parse(arguments).expect_err("a mistake").exit_code(), 2, "{arguments:?}");
        }
    }
}
