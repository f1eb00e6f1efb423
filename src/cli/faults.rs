//! `keyward faults …`: tokens that are near their end, or past it, and who takes care of them.

use clap::{ArgMatches, Command};
use tonic::transport::Channel;

use super::{
    answer::fault_rows,
    arguments::{command, option, switch, text, workspace},
    connection,
    failure::{Exit, Failure},
    notices::notices,
    paging,
    session::Session,
    several,
};
use crate::proto::{
    AcknowledgeFaultRequest, AcknowledgeFaultResponse, ListFaultsRequest, ListFaultsResponse, notice_service_client::NoticeServiceClient,
};

const ABOUT: &str = "Shows tokens that are near their end, or past it";
const EXAMPLES: &str = "  keyward faults --unacknowledged\n  keyward faults list --principal ann --all --output json";

/// Alone it lists.
pub(super) fn faults_command() -> Command {
    let examples = format!("{EXAMPLES}\n  keyward faults acknowledge flt_0123456789abcdefghijkl");
    filtered(command("faults", ABOUT, &examples))
        .subcommands([list_command(), acknowledge_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn list_command() -> Command {
    filtered(command("list", "Lists faults, the latest first; faults alone does the same", EXAMPLES))
}

fn filtered(command: Command) -> Command {
    command
        .arg(workspace())
        .arg(option("principal", "ID", "Of this principal's tokens"))
        .arg(option("token-id", "ID", "Of this token"))
        .arg(switch("unacknowledged", "Only those that nobody has acknowledged"))
        .args(paging::args())
}

fn acknowledge_command() -> Command {
    let examples = "  keyward faults acknowledge flt_0123456789abcdefghijkl flt_abcdefghijkl0123456789";
    command("acknowledge", "Notes that you take care of faults; a nearer step of the same token is a fault of its own", examples)
        .arg(several::ids("Which faults"))
}

fn request(args: &ArgMatches) -> ListFaultsRequest {
    ListFaultsRequest {
        workspace: text(args, "workspace"),
        principal: text(args, "principal"),
        token_id: text(args, "token-id"),
        unacknowledged_only: args.get_flag("unacknowledged"),
        page_size: 0,
        page_token: String::new(),
    }
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request = request(args);
    let (connection, client) = notices(args, session).await?;
    let (faults, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListFaultsRequest { page_size, page_token, ..request.clone() };
        let mut client: NoticeServiceClient<Channel> = client.clone();
        let page = client.list_faults(connection.request(message)).await?.into_inner();
        Ok((page.faults, page.next_page_token))
    })
    .await?;
    paging::remark(session, "faults", &faults, &next_page_token);
    session.answer(&ListFaultsResponse { faults, next_page_token })
}

pub(super) async fn acknowledge(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, client) = notices(args, session).await?;
    let call = async |id| {
        let mut client: NoticeServiceClient<Channel> = client.clone();
        client.acknowledge_fault(connection.request(AcknowledgeFaultRequest { id })).await.map(tonic::Response::into_inner)
    };
    several::each(args, session, call, |done: &[AcknowledgeFaultResponse]| fault_rows(done.iter().filter_map(|it| it.fault.as_ref()))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(arguments: &[&str]) -> ListFaultsRequest {
        let matches = faults_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
        request(matches.subcommand().map_or(&matches, |(_, args)| args))
    }

    #[test]
    fn faults_alone_lists() {
        let filters = ["--workspace", "acme", "--principal", "ann", "--token-id", "tok_1", "--unacknowledged"];
        let alone = asked(&filters);
        assert_eq!(alone, asked(&[&["list"][..], &filters].concat()));
        assert!(alone.unacknowledged_only && alone.workspace == "acme" && alone.principal == "ann" && alone.token_id == "tok_1");
        assert_eq!(asked(&[]), ListFaultsRequest::default());
    }

    #[test]
    fn faults_are_named() {
        for arguments in [&["acknowledge"][..], &["acknowledge", "--all"], &["flt_1"], &["list", "flt_1"], &["--all", "--limit", "3"]] {
            let wrong = faults_command().no_binary_name(true).try_get_matches_from(arguments);
            assert_eq!(wrong.expect_err("a mistake").exit_code(), 2, "{arguments:?}");
        }
    }
}
