//! `keyward token list`: which tokens.

use clap::{ArgAction, ArgMatches, Command};
use tonic::transport::Channel;

use super::{
    arguments::{command, option, switch, text, workspace},
    connection::{ANSWER_BYTES_MAX, Connection},
    expiry::{self, Expiry},
    failure::{Exit, Failure},
    paging,
    session::Session,
};
use crate::proto::{
    ListMyTokensRequest, ListMyTokensResponse, ListTokensRequest, ListTokensResponse, TokenKind, TokenState,
    self_service_client::SelfServiceClient, token_service_client::TokenServiceClient,
};

/// Filters that `ListMyTokens` does not know: it is about one principal.
const FILTERS_OF_ALL: [&str; 6] = ["workspace", "principal", "audience", "created-by", "expires-before", "last-used-before"];

pub(super) fn list_command() -> Command {
    let examples = "  keyward token list --state active --expires-before 7d\n  \
                    keyward token list --principal ann --all --output json\n  \
                    keyward token list --mine";
    command("list", "Lists tokens, newest first; temporary ones only if asked for", examples)
        .arg(
            switch("mine", "Only your own: needs keyward:self, where the whole list needs keyward:admin")
                .conflicts_with_all(FILTERS_OF_ALL),
        )
        .arg(workspace())
        .arg(option("principal", "ID", "That stand for this principal"))
        .arg(option("audience", "PRODUCT", "That name this product"))
        .arg(
            option("state", "STATE", "In this state; repeat it for more")
                .action(ArgAction::Append)
                .value_delimiter(',')
                .value_parser(["active", "inactive", "expired", "revoked"]),
        )
        .arg(option("kind", "KIND", "Of this kind [default: permanent]").value_parser(["permanent", "temporary"]))
        .arg(option("created-by", "ID", "That this principal created"))
        .arg(option("expires-before", "WHEN", "That end before then: 7d (from now), 2027-04-11 or 2027-04-11T10:00Z").value_parser(when))
        .arg(
            option("last-used-before", "WHEN", "Last used before then, or never: 30d (ago), 2027-04-11 or 2027-04-11T10:00Z")
                .value_parser(when),
        )
        .arg(option("query", "TEXT", "With this text in their name"))
        .arg(option("order-by", "FIELD", "create_time, display_name or expire_time, each also with ` desc` [default: create_time desc]"))
        .args(paging::args())
}

pub(super) fn when(text: &str) -> Result<Expiry, String> {
    text.parse()
}

/// The kind that was asked for; 0, which on the wire means "not said", if none was.
pub(super) fn kind(args: &ArgMatches) -> i32 {
    match text(args, "kind").as_str() {
        "permanent" => TokenKind::Permanent.into(),
        "temporary" => TokenKind::Temporary.into(),
        _ => TokenKind::Unspecified.into(),
    }
}

fn states(args: &ArgMatches) -> Vec<i32> {
    let given = args.get_many::<String>("state").into_iter().flatten();
    given.filter_map(|state| TokenState::from_str_name(&format!("TOKEN_STATE_{}", state.to_uppercase()))).map(i32::from).collect()
}

/// The instant that a filter names, if it was given.
pub(super) fn instant(args: &ArgMatches, name: &str, session: &Session<'_>, back: bool) -> Result<Option<prost_types::Timestamp>, Failure> {
    let given = args.get_one::<Expiry>(name).map(|when| when.instant(session.now, back)).transpose();
    given.map(|instant| instant.map(expiry::to_wire)).map_err(|rule| Failure::usage(format!("--{name}: {rule}")))
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    if args.get_flag("mine") { list_mine(args, session).await } else { list_all(args, session).await }
}

async fn list_all(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request = ListTokensRequest {
        workspace: text(args, "workspace"),
        principal: text(args, "principal"),
        audience: text(args, "audience"),
        states: states(args),
        created_by: text(args, "created-by"),
        expires_before: instant(args, "expires-before", session, false)?,
        last_used_before: instant(args, "last-used-before", session, true)?,
        query: text(args, "query"),
        order_by: text(args, "order-by"),
        page_size: 0,
        page_token: String::new(),
        kind: kind(args),
    };
    let connection = Connection::open(args, session).await?;
    let client = TokenServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    let (tokens, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListTokensRequest { page_size, page_token, ..request.clone() };
        let mut client: TokenServiceClient<Channel> = client.clone();
        let page = client.list_tokens(connection.request(message)).await?.into_inner();
        Ok((page.tokens, page.next_page_token))
    })
    .await?;
    paging::remark(session, "tokens", &tokens, &next_page_token);
    session.answer(&ListTokensResponse { tokens, next_page_token })
}

async fn list_mine(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request = ListMyTokensRequest {
        states: states(args),
        query: text(args, "query"),
        order_by: text(args, "order-by"),
        kind: kind(args),
        page_size: 0,
        page_token: String::new(),
    };
    let connection = Connection::open(args, session).await?;
    let client = SelfServiceClient::new(connection.channel()).max_decoding_message_size(ANSWER_BYTES_MAX);
    let (tokens, next_page_token) = paging::pages(args, async |page_size, page_token| {
        let message = ListMyTokensRequest { page_size, page_token, ..request.clone() };
        let mut client: SelfServiceClient<Channel> = client.clone();
        let page = client.list_my_tokens(connection.request(message)).await?.into_inner();
        Ok((page.tokens, page.next_page_token))
    })
    .await?;
    paging::remark(session, "tokens", &tokens, &next_page_token);
    session.answer(&ListMyTokensResponse { tokens, next_page_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> ArgMatches {
        list_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed")
    }

    #[test]
    fn states_and_kinds_are_those_of_the_wire() {
        let args = parse(&["--state", "active,revoked", "--state", "expired", "--kind", "temporary"]);
        assert_eq!(states(&args), [TokenState::Active, TokenState::Revoked, TokenState::Expired].map(i32::from));
        assert_eq!((kind(&args), kind(&parse(&[]))), (2, 0));
    }

    #[test]
    fn mine_excludes_filters_of_the_whole_list() {
        for arguments in [["--mine", "--principal", "ann"], ["--mine", "--expires-before", "7d"], ["--all", "--limit", "3"]] {
            assert!(list_command().no_binary_name(true).try_get_matches_from(arguments).is_err(), "{arguments:?}");
        }
    }
}
