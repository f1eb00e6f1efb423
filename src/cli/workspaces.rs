//! `keyward workspace …`: workspaces are made, shown, changed, suspended and deleted.

use std::{fs::File, io::Read as _};

use clap::{Arg, ArgGroup, ArgMatches, Command};
use prost_types::FieldMask;
use tonic::transport::Channel;

use super::{
    arguments::{command, option, switch, text},
    connection::{self, ANSWER_BYTES_MAX, Connection, token_is_on_stdin},
    failure::{Exit, Failure},
    paging, policy,
    session::Session,
    sheet::{self, Sheet},
    tokens::reason,
    wishes,
};
use crate::proto::{
    CreateWorkspaceRequest, DeleteWorkspaceRequest, GetWorkspaceRequest, ListWorkspacesRequest, ListWorkspacesResponse,
    ResumeWorkspaceRequest, SuspendWorkspaceRequest, UpdateWorkspaceRequest, Workspace, workspace_service_client::WorkspaceServiceClient,
};

/// A file that says more than a request can hold.
const FILE_BYTES_MAX: u64 = 1 << 20;

pub(super) fn workspace_command() -> Command {
    Command::new("workspace")
        .about("Manages workspaces: their policies, their notices, their routes, their end")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([create_command(), list_command(), get_command(), update_command(), suspend_command(), resume_command()])
        .subcommands([delete_command(), export_command(), import_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn create_command() -> Command {
    let examples = "  keyward workspace create acme --name \"Acme Inc.\" --prefix acme\n  \
                    keyward workspace create acme --name \"Acme Inc.\" --prefix acme --default-ttl 30d --max-tokens-per-principal 20\n  \
                    keyward workspace create acme --name \"Acme Inc.\" --prefix acme --raise-faults true --notice-emails ops@example.org";
    command("create", "Makes a workspace; needs keyward:root", examples)
        .arg(id().required(true))
        .arg(name().required(true))
        .arg(prefix().required(true))
        .args(policy::args())
        .args(wishes::args())
}

fn list_command() -> Command {
    command("list", "Lists the workspaces that you may see", "  keyward workspace list --all").args(paging::args())
}

fn get_command() -> Command {
    command("get", "Shows a workspace: its policy, its notices and its routes", "  keyward workspace get acme").arg(id_or_own())
}

fn update_command() -> Command {
    let examples = "  keyward workspace update acme --name \"Acme Inc.\" --max-temporary-ttl 8h\n  \
                    keyward workspace update --allow-never true\n  \
                    keyward workspace update --webhook-url https://hooks.example.org/keyward --notice-events revoked,leaked";
    let changes: Vec<Arg> = [name(), prefix()].into_iter().chain(policy::args()).chain(wishes::args()).collect();
    let names: Vec<_> = changes.iter().map(|arg| arg.get_id().clone()).collect();
    command("update", "Changes settings of a workspace; what you do not name stays as it is. For routes see import", examples)
        .arg(id_or_own())
        .args(changes)
        .arg(etag())
        .group(ArgGroup::new("changes").args(names).required(true).multiple(true))
}

fn suspend_command() -> Command {
    let examples = "  keyward workspace suspend acme --reason \"has not paid\"";
    command("suspend", "Refuses every token of a workspace until it is resumed", examples).args([id().required(true), reason(), etag()])
}

fn resume_command() -> Command {
    command("resume", "Ends a suspension", "  keyward workspace resume acme").args([id().required(true), etag()])
}

fn delete_command() -> Command {
    let examples = "  keyward workspace delete acme --reason \"has left\"";
    command("delete", "Deletes a workspace with its principals and tokens; it cannot be undone", examples).args([
        id().required(true),
        reason(),
        etag(),
    ])
}

fn export_command() -> Command {
    let examples = "  keyward workspace export acme > acme.toml";
    command(
        "export",
        "Prints the name, the policy, the notices and the routes of a workspace as a TOML file, which import takes back",
        examples,
    )
    .arg(id_or_own())
}

fn import_command() -> Command {
    let examples = "  keyward workspace import acme acme.toml\n  \
                    keyward workspace export acme | keyward workspace import staging -\n  \
                    keyward workspace import --create --prefix acme acme acme.toml";
    command("import", "Loads a TOML file with the name, the policy, the notices and the routes of a workspace, or some of these", examples)
        .allow_missing_positional(true)
        .arg(id_or_own())
        .arg(Arg::new("file").value_name("FILE").required(true).help("The file; - reads it from standard input"))
        .arg(switch("create", "Make the workspace").requires("id").requires("prefix").conflicts_with("etag"))
        .arg(prefix().requires("create"))
        .arg(etag())
}

fn id() -> Arg {
    Arg::new("id").value_name("ID").help("Which workspace")
}

fn id_or_own() -> Arg {
    id().help("Which workspace [default: yours]")
}

fn name() -> Arg {
    option("name", "TEXT", "What people recognise it by")
}

fn prefix() -> Arg {
    option("prefix", "TEXT", "What its tokens begin with: 2 to 12 of a-z 0-9, beginning with a letter; no other workspace has or had it")
}

fn etag() -> Arg {
    option("etag", "ETAG", "Only if this still is the workspace's etag: nobody else has changed it since you looked")
}

async fn workspaces(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, WorkspaceServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = WorkspaceServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    Ok((connection, client))
}

/// What the flags say a workspace shall be.
fn workspace(args: &ArgMatches) -> Result<Workspace, Failure> {
    Ok(Workspace {
        id: text(args, "id"),
        display_name: text(args, "name"),
        prefix: text(args, "prefix"),
        policy: Some(policy::policy(args)?),
        notices: wishes::notices(args),
        ..Workspace::default()
    })
}

pub(super) async fn create(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    make(args, workspace(args)?, session).await
}

async fn make(args: &ArgMatches, workspace: Workspace, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let message = CreateWorkspaceRequest { workspace: Some(workspace.clone()) };
    let answer = client.create_workspace(connection.request(message)).await?;
    let exit = session.answer(&answer.into_inner())?;
    wishes::hint(session, &workspace);
    Ok(exit)
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, client) = workspaces(args, session).await?;
    let (workspaces, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let mut client: WorkspaceServiceClient<Channel> = client.clone();
        let page = client.list_workspaces(connection.request(ListWorkspacesRequest { page_size, page_token })).await?.into_inner();
        Ok((page.workspaces, page.next_page_token))
    })
    .await?;
    paging::remark(session, "workspaces", &workspaces, &next_page_token);
    session.answer(&ListWorkspacesResponse { workspaces, next_page_token })
}

pub(super) async fn get(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let answer = client.get_workspace(connection.request(GetWorkspaceRequest { id: text(args, "id") })).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn update(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let workspace = Workspace { etag: text(args, "etag"), ..workspace(args)? };
    change(args, workspace, paths(args), session).await
}

/// The fields that were named.
fn paths(args: &ArgMatches) -> Vec<String> {
    let named = [("display_name", "name"), ("prefix", "prefix")].into_iter().filter(|(_, flag)| args.contains_id(flag));
    named.map(|(path, _)| path.to_owned()).chain(policy::paths(args)).chain(wishes::paths(args)).collect()
}

async fn change(args: &ArgMatches, workspace: Workspace, paths: Vec<String>, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let message = UpdateWorkspaceRequest { workspace: Some(workspace.clone()), update_mask: Some(FieldMask { paths }) };
    let answer = client.update_workspace(connection.request(message)).await?;
    let exit = session.answer(&answer.into_inner())?;
    wishes::hint(session, &workspace);
    Ok(exit)
}

pub(super) async fn suspend(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let message = SuspendWorkspaceRequest { id: text(args, "id"), reason: text(args, "reason"), etag: text(args, "etag") };
    let answer = client.suspend_workspace(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn resume(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let message = ResumeWorkspaceRequest { id: text(args, "id"), etag: text(args, "etag") };
    let answer = client.resume_workspace(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn delete(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let message = DeleteWorkspaceRequest { id: text(args, "id"), reason: text(args, "reason"), etag: text(args, "etag") };
    let answer = client.delete_workspace(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

/// Whatever `--output` says, it is the file.
pub(super) async fn export(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = workspaces(args, session).await?;
    let answer = client.get_workspace(connection.request(GetWorkspaceRequest { id: text(args, "id") })).await?;
    session.write(&sheet::write(&answer.into_inner().workspace.unwrap_or_default()))?;
    Ok(Exit::Good)
}

pub(super) async fn import(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (name, text) = file(args, session)?;
    let Sheet { workspace, paths } = sheet::read(&name, &text)?;
    let workspace =
        Workspace { id: self::text(args, "id"), prefix: self::text(args, "prefix"), etag: self::text(args, "etag"), ..workspace };
    if !args.get_flag("create") {
        return change(args, workspace, paths, session).await;
    }
    if workspace.display_name.is_empty() {
        return Err(Failure::usage(format!("{name} lacks display_name, which a new workspace needs: add display_name = \"…\" at its top")));
    }
    make(args, workspace, session).await
}

/// The file, and how to speak of it.
fn file(args: &ArgMatches, session: &mut Session<'_>) -> Result<(String, String), Failure> {
    let name = text(args, "file");
    let bytes = if name == "-" { stdin(args, session)? } else { limited(&name, &mut open(&name)?)? };
    let name = if name == "-" { "standard input".to_owned() } else { name };
    match String::from_utf8(bytes) {
        Ok(text) => Ok((name, text)),
        Err(_) => Err(Failure::usage(format!("{name} is no text"))),
    }
}

fn stdin(args: &ArgMatches, session: &mut Session<'_>) -> Result<Vec<u8>, Failure> {
    if token_is_on_stdin(args, session) {
        return Err(Failure::usage("standard input can hold your token or the file: give your token with KEYWARD_TOKEN_FILE"));
    }
    limited("standard input", &mut session.input)
}

fn open(name: &str) -> Result<File, Failure> {
    File::open(name).map_err(|error| Failure::usage(format!("{name} cannot be read: {error}")))
}

fn limited(name: &str, source: &mut dyn std::io::Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    match source.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes) {
        Ok(read) if read as u64 <= FILE_BYTES_MAX => Ok(bytes),
        Ok(_) => Err(Failure::usage(format!("{name} is longer than 1 MiB"))),
        Err(error) => Err(Failure::usage(format!("{name} cannot be read: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        let mut matches = workspace_command().no_binary_name(true).try_get_matches_from(arguments)?;
        Ok(matches.remove_subcommand().expect("a subcommand").1)
    }

    #[test]
    fn only_what_is_given_changes() {
        for (arguments, expected) in [
            (&["update", "acme", "--name", "Acme"][..], &["display_name"][..]),
            (&["update", "--prefix", "acm", "--allow-never", "false"], &["prefix", "policy.allow_never"]),
            (&["update", "--default-ttl", "90d", "--etag", "e"], &["policy.default_ttl"]),
            (&["update", "--webhook-url", "", "--allow-never", "true"], &["policy.allow_never", "notices.webhook_url"]),
        ] {
            assert_eq!(paths(&parse(arguments).expect("well formed")), expected, "{arguments:?}");
        }
    }

    #[test]
    fn what_is_missing_is_a_mistake() {
        for arguments in [
            &["create", "acme"][..],
            &["create", "--name", "Acme", "--prefix", "acm"],
            &["update", "acme"],
            &["update", "acme", "--etag", "e"],
            &["suspend"],
            &["delete"],
            &["import"],
            &["import", "acme", "f.toml", "--create"],
            &["import", "f.toml", "--create", "--prefix", "acm"],
            &["import", "acme", "f.toml", "--prefix", "acm"],
            &["import", "acme", "f.toml", "--create", "--prefix", "acm", "--etag", "e"],
        ] {
            assert_eq!(parse(arguments).expect_err("a mistake").exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn a_file_may_be_named_alone() {
        let named = |arguments: &[&str]| parse(arguments).map(|args| (text(&args, "id"), text(&args, "file"))).expect("well formed");
        assert_eq!(named(&["import", "f.toml"]), (String::new(), "f.toml".to_owned()));
        assert_eq!(named(&["import", "acme", "-"]), ("acme".to_owned(), "-".to_owned()));
    }

    #[test]
    fn files_have_an_end() {
        let long = vec![b'#'; 1 + (1 << 20)];
        assert!(limited("long.toml", &mut long.as_slice()).is_err());
        assert_eq!(limited("whole.toml", &mut &long[1..]).expect("short enough").len(), 1 << 20);
    }
}
