//! `keyward notices …`: mails and webhook calls that are not delivered, a test of the settings, and the secret of the webhook.

use clap::{ArgMatches, Command};
use tonic::transport::Channel;

use super::{
    answer::notice_rows,
    arguments::{command, switch, text, workspace},
    connection::{self, ANSWER_BYTES_MAX, Connection},
    failure::{Exit, Failure},
    paging,
    session::Session,
    several,
};
use crate::proto::{
    ListNoticesRequest, ListNoticesResponse, NoticeState, RetryNoticeRequest, RetryNoticeResponse, RotateWebhookSecretRequest,
    SendTestNoticeRequest, notice_service_client::NoticeServiceClient,
};

pub(super) fn notices_command() -> Command {
    Command::new("notices")
        .about("Manages notices: what is not delivered, a test of the settings, the secret of the webhook")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([list_command(), retry_command(), test_command(), rotate_secret_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn list_command() -> Command {
    let examples = "  keyward notices list --dead\n  keyward notices list --workspace acme --all --output json";
    command("list", "Lists mails and webhook calls that are not delivered yet, or were given up, the latest first", examples)
        .arg(workspace())
        .arg(switch("pending", "Only those that wait for an attempt").conflicts_with("dead"))
        .arg(switch("dead", "Only those that were given up"))
        .args(paging::args())
}

fn retry_command() -> Command {
    let examples = "  keyward notices retry ntc_0123456789abcdefghijkl";
    command("retry", "Sends notices again, at once, for three more days if need be", examples).arg(several::ids("Which notices"))
}

fn test_command() -> Command {
    let examples = "  keyward notices test\n  keyward notices test --workspace acme --timeout 1m";
    command("test", "Sends a test to every mail address and to the webhook of a workspace, and says what became of each", examples)
        .after_help(format!(
            "The exit code is 0 if everything was delivered, and 1 if something was not.\nWhere it goes is set with `keyward workspace \
             update --notice-emails … --webhook-url …`.\n\nExamples:\n{examples}"
        ))
        .arg(workspace())
}

fn rotate_secret_command() -> Command {
    let examples = "  keyward notices rotate-secret > webhook-secret.txt\n  keyward notices rotate-secret --workspace acme --output json";
    command("rotate-secret", "Makes a new secret that calls of the webhook are signed with, and shows it, this once", examples)
        .after_help(format!(
            "The secret goes alone to standard output, and how to check signatures with it to standard error.\nThe one before signs as \
             well for another 24 hours.\n\nExamples:\n{examples}"
        ))
        .arg(workspace())
}

/// The service behind faults and notices.
pub(super) async fn notices(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, NoticeServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = NoticeServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    Ok((connection, client))
}

fn state(args: &ArgMatches) -> NoticeState {
    match (args.get_flag("pending"), args.get_flag("dead")) {
        (true, _) => NoticeState::Pending,
        (false, true) => NoticeState::Dead,
        (false, false) => NoticeState::Unspecified,
    }
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, client) = notices(args, session).await?;
    let (notices, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListNoticesRequest { workspace: text(args, "workspace"), state: state(args).into(), page_size, page_token };
        let mut client: NoticeServiceClient<Channel> = client.clone();
        let page = client.list_notices(connection.request(message)).await?.into_inner();
        Ok((page.notices, page.next_page_token))
    })
    .await?;
    paging::remark(session, "notices", &notices, &next_page_token);
    session.answer(&ListNoticesResponse { notices, next_page_token })
}

pub(super) async fn retry(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, client) = notices(args, session).await?;
    let call = async |id| {
        let mut client: NoticeServiceClient<Channel> = client.clone();
        client.retry_notice(connection.request(RetryNoticeRequest { id })).await.map(tonic::Response::into_inner)
    };
    several::each(args, session, call, |done: &[RetryNoticeResponse]| notice_rows(done.iter().filter_map(|it| it.notice.as_ref()))).await
}

pub(super) async fn test(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = notices(args, session).await?;
    let message = SendTestNoticeRequest { workspace: text(args, "workspace") };
    let answer = client.send_test_notice(connection.request(message)).await?.into_inner();
    session.answer(&answer)?;
    Ok(if answer.deliveries.iter().all(|delivery| delivery.delivered) { Exit::Good } else { Exit::Refused })
}

pub(super) async fn rotate_secret(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = notices(args, session).await?;
    let message = RotateWebhookSecretRequest { workspace: text(args, "workspace") };
    let answer = client.rotate_webhook_secret(connection.request(message)).await;
    let again = || "it may have happened all the same: run the command again for a secret that you get to see".to_owned();
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(again))?;
    session.answer(&answer.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        let mut matches = notices_command().no_binary_name(true).try_get_matches_from(arguments)?;
        Ok(matches.remove_subcommand().expect("a subcommand").1)
    }

    #[test]
    fn states_of_notices_are_those_of_the_wire() {
        for (arguments, expected) in [
            (&["list"][..], NoticeState::Unspecified),
            (&["list", "--pending"], NoticeState::Pending),
            (&["list", "--dead", "--workspace", "acme"], NoticeState::Dead),
        ] {
            assert_eq!(state(&parse(arguments).expect("well formed")), expected, "{arguments:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_of_notices_is_a_mistake() {
        for arguments in
            [&[][..], &["list", "--pending", "--dead"], &["retry"], &["test", "acme"], &["rotate-secret", "acme"], &["list", "ntc_1"]]
        {
            assert_eq!(parse(arguments).expect_err("a mistake").exit_code(), 2, "{arguments:?}");
        }
    }
}
