//! `keyward audit …`: who did what, to what, when, from where.

use clap::{ArgMatches, Command};
use tonic::{Status, transport::Channel};

use super::{
    answer,
    arguments::{command, list, option, text, texts, workspace},
    connection::{self, ANSWER_BYTES_MAX, Connection},
    failure::{Exit, Failure},
    listing::{instant, when},
    paging,
    session::Session,
};
use crate::proto::{AuditEvent, ListAuditEventsRequest, ListAuditEventsResponse, audit_service_client::AuditServiceClient};

const EXPORT_PAGE_SIZE: i32 = 1_000;

pub(super) fn audit_command() -> Command {
    Command::new("audit")
        .about("Reads the audit: who did what, to what, when, from where")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([list_command(), export_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn list_command() -> Command {
    let examples = "  keyward audit list --since 7d --method RevokeToken,DeleteToken\n  \
                    keyward audit list --token-id tok_0123456789abcdefghijkl --all\n  \
                    keyward audit list --actor ann --since 2027-04-01 --until 2027-04-11T10:00Z";
    filtered(command("list", "Lists events, the latest first", examples)).args(paging::args())
}

fn export_command() -> Command {
    let examples = "  keyward audit export --since 30d > audit.jsonl\n  \
                    keyward audit export --until 2027-04-11 --workspace acme | gzip > acme.jsonl.gz";
    filtered(command("export", "Prints every event, the latest first, each as a JSON object on a line of its own", examples))
        .arg(paging::page_token())
}

fn filtered(command: Command) -> Command {
    command
        .arg(workspace())
        .arg(option("token-id", "ID", "About this token"))
        .arg(option("principal", "ID", "About this principal or its tokens"))
        .arg(option("actor", "ID", "That this principal caused"))
        .arg(list("method", "METHOD", "Of this method, such as RevokeToken; repeat it for more"))
        .arg(option("since", "WHEN", "Then or later: 7d (ago), 2027-04-11 or 2027-04-11T10:00Z").value_parser(when))
        .arg(option("until", "WHEN", "Before then: 7d (ago), 2027-04-11 or 2027-04-11T10:00Z").value_parser(when))
}

fn request(args: &ArgMatches, session: &Session<'_>) -> Result<ListAuditEventsRequest, Failure> {
    Ok(ListAuditEventsRequest {
        workspace: text(args, "workspace"),
        token_id: text(args, "token-id"),
        principal: text(args, "principal"),
        actor: text(args, "actor"),
        methods: texts(args, "method"),
        start_time: instant(args, "since", session, true)?,
        end_time: instant(args, "until", session, true)?,
        page_size: 0,
        page_token: String::new(),
    })
}

async fn audit(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, AuditServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = AuditServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    Ok((connection, client))
}

pub(super) async fn list_events(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request = request(args, session)?;
    let (connection, client) = audit(args, session).await?;
    let (events, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListAuditEventsRequest { page_size, page_token, ..request.clone() };
        let mut client: AuditServiceClient<Channel> = client.clone();
        let page = client.list_audit_events(connection.request(message)).await?.into_inner();
        Ok((page.events, page.next_page_token))
    })
    .await?;
    paging::remark(session, "events", &events, &next_page_token);
    session.answer(&ListAuditEventsResponse { events, next_page_token })
}

pub(super) async fn export(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request = request(args, session)?;
    let (connection, client) = audit(args, session).await?;
    let page = async |page_token| {
        let message = ListAuditEventsRequest { page_size: EXPORT_PAGE_SIZE, page_token, ..request.clone() };
        let mut client: AuditServiceClient<Channel> = client.clone();
        let page = client.list_audit_events(connection.request(message)).await?.into_inner();
        Ok((page.events, page.next_page_token))
    };
    write_pages(text(args, "page-token"), page, session).await
}

/// Writes each page as it comes: an export can be longer than what fits into memory.
async fn write_pages(
    mut next: String,
    page: impl AsyncFn(String) -> Result<(Vec<AuditEvent>, String), Status>,
    session: &mut Session<'_>,
) -> Result<Exit, Failure> {
    loop {
        let (events, following) = page(next.clone()).await.map_err(|status| broken_off(status, &next))?;
        session.write(&answer::json_lines("AuditEvent", &events)?)?;
        if following.is_empty() {
            return Ok(Exit::Good);
        }
        next = following;
    }
}

fn broken_off(status: Status, next: &str) -> Failure {
    let failure = Failure::from(status);
    if next.is_empty() {
        return failure;
    }
    failure.hint_if_unanswered(|| format!("what came before is written; the same command with --page-token {next} goes on from there"))
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap};

    use super::*;
    use crate::{cli::session::Format, proto::ListAuditEventsRequest};

    fn with_session<T>(act: impl FnOnce(&mut Session<'_>) -> T) -> (T, String) {
        let (mut input, mut out, mut err) = (&b""[..], Vec::new(), Vec::new());
        let mut session = Session {
            env: BTreeMap::new(),
            now: "2027-04-11T09:30:00Z".parse().expect("an instant"),
            format: Format::Table,
            input: &mut input,
            interactive: false,
            out: &mut out,
            err: &mut err,
        };
        let done = act(&mut session);
        (done, String::from_utf8(out).expect("text"))
    }

    fn asked(arguments: &[&str]) -> Result<ListAuditEventsRequest, Failure> {
        let args = list_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
        with_session(|session| request(&args, session)).0
    }

    #[test]
    fn filters_are_those_of_the_wire() {
        let request = asked(&["--method", "RevokeToken,DeleteToken", "--method", "Purge", "--since", "1d", "--until", "2027-04-11"]);
        let request = request.expect("well formed");
        assert_eq!(request.methods, ["RevokeToken", "DeleteToken", "Purge"]);
        let (since, until) = (request.start_time.expect("given").seconds, request.end_time.expect("given").seconds);
        assert_eq!(until - since, 24 * 3_600 - 34_200);
        assert!(asked(&["--until", "never"]).is_err());
    }

    /// Exports pages of which the third fails, if it is asked for.
    fn exported(pages: usize) -> (Result<Exit, Failure>, String, Vec<String>) {
        let tokens = RefCell::new(Vec::new());
        let page = async |token: String| {
            tokens.borrow_mut().push(token.clone());
            let number = tokens.borrow().len();
            let event = |id: String| AuditEvent { id, reason: "\u{9b}two\nlines".to_owned(), ..AuditEvent::default() };
            match number {
                3 => Err(Status::unavailable("gone")),
                _ => Ok((
                    vec![event(format!("{number}a")), event(format!("{number}b"))],
                    if number == pages { String::new() } else { format!("p{number}") },
                )),
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let (done, out) = with_session(|session| runtime.block_on(write_pages("p0".to_owned(), page, session)));
        (done, out, tokens.into_inner())
    }

    #[test]
    fn an_export_is_an_object_on_each_line() {
        let (done, out, tokens) = exported(2);
        assert!(done.is_ok_and(|exit| exit == Exit::Good));
        assert_eq!(tokens, ["p0", "p1"]);
        let events: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let ids: Vec<&str> = events.iter().filter_map(|event| event["id"].as_str()).collect();
        assert_eq!(ids, ["1a", "1b", "2a", "2b"]);
        assert!(events[0]["reason"] == "\u{9b}two\nlines" && !out.contains('\u{9b}'), "{out}");
        assert!(events[0].get("tokenId").is_some() && events[0].get("before").is_none(), "{out}");
    }

    #[test]
    fn a_page_that_fails_ends_an_export() {
        let (done, out, _) = exported(9);
        let failure = done.expect_err("a failure");
        assert_eq!((failure.exit(), out.lines().count()), (Exit::Unreachable, 4));
        assert!(format!("{failure:?}").contains("--page-token p2"), "{failure:?}");
    }
}
