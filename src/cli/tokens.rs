//! `keyward token …`: tokens are created, shown, switched off and on, renewed and ended.

use clap::{Arg, ArgMatches, Command};
use tonic::transport::Channel;

use super::{
    arguments::{command, list, metadata, option, pairs, switch, text, texts, workspace},
    connection::{self, Connection},
    expiry::{self, Expiry},
    failure::{Exit, Failure},
    listing::{kind, list_command},
    own,
    session::Session,
    update::update_command,
};
use crate::{
    ambient,
    proto::{
        ActivateTokenRequest, CreateTokenRequest, DeactivateTokenRequest, DeleteTokenRequest, GetTokenRequest, RegenerateSelfRequest,
        RegenerateTokenRequest, RevokePrincipalTokensRequest, RevokeSelfRequest, RevokeTokenRequest, TokenKind,
        create_token_request::Lifetime, self_service_client::SelfServiceClient, token_service_client::TokenServiceClient,
    },
};

pub(super) const EXPIRES_HELP: &str = "When it ends: a span (12h, 7d, 30d, 90d, 1y), a date (2027-04-11: as that day begins in UTC, \
                                       which must be later than today), an instant (2027-04-11T10:00Z) or never";
pub(super) const ETAG_HELP: &str = "Only if this still is the token's etag: nobody else has changed it since you looked";

pub(super) fn token_command() -> Command {
    Command::new("token")
        .about("Manages tokens: create, list, change, renew and end them")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([create_command(), list_command(), get_command(), update_command(), activate_command(), deactivate_command()])
        .subcommands([regenerate_command(), revoke_command(), delete_command(), revoke_principal_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn create_command() -> Command {
    let examples = "  TOKEN=$(keyward token create --name ci --scope orders:read --expires 90d)\n  \
                    keyward token create --name gateway --principal gw --scope keyward:validate --expires never\n  \
                    keyward token create --self --temporary --scope orders:read --expires 1h";
    command("create", "Creates a token and shows it, this once", examples)
        .after_help(format!(
            "The token itself goes alone to standard output, and what describes it to standard error, so that a script can take it with \
             $(…).\nWith --output json both are in one object on standard output.\n\nExamples:\n{examples}"
        ))
        .arg(option("name", "TEXT", "What people recognise it by").required_unless_present("self"))
        .arg(
            switch("self", "For yourself: needs keyward:self, where tokens of others need keyward:admin")
                .conflicts_with_all(["workspace", "principal"]),
        )
        .arg(option("workspace", "ID", "The workspace that it belongs to [default: yours]"))
        .arg(option("principal", "ID", "Whom it stands for [default: you]"))
        .arg(
            option("kind", "KIND", "How long it is meant to live; temporary: for a login session [default: permanent]")
                .value_parser(["permanent", "temporary"]),
        )
        .arg(switch("temporary", "As --kind temporary").conflicts_with("kind"))
        .arg(list(
            "scope",
            "SCOPE",
            "What it may do, such as orders:read, orders:* or keyward:validate; repeat it for more [default: nothing]",
        ))
        .arg(list("audience", "PRODUCT", "A product that it is for; repeat it for more [default: any]"))
        .arg(list("cidr", "RANGE", "Addresses that it may be used from, such as 10.0.0.0/8; repeat it for more [default: any]"))
        .arg(metadata("Free text for your own use; repeat it for more"))
        .arg(option("session-id", "ID", "The login session of a temporary token"))
        .arg(expires(format!("{EXPIRES_HELP} [default: as the workspace's policy says: 90d, a temporary one 24h, unless changed]")))
        .arg(request_id())
}

fn get_command() -> Command {
    command("get", "Shows one token: its settings, its state, its use", "  keyward token get tok_0123456789abcdefghijkl").arg(id())
}

fn activate_command() -> Command {
    command("activate", "Switches an inactive token on", "  keyward token activate tok_0123456789abcdefghijkl").args([id(), etag()])
}

fn deactivate_command() -> Command {
    command("deactivate", "Switches a token off until it is activated", "  keyward token deactivate tok_0123456789abcdefghijkl")
        .args([id(), etag()])
}

fn regenerate_command() -> Command {
    let examples = "  TOKEN=$(keyward token regenerate tok_0123456789abcdefghijkl --grace 1h)\n  \
                    keyward token regenerate --self --grace 10m > token.txt";
    command("regenerate", "Gives a token a new secret and shows it, this once; id, settings and expiry stay", examples)
        .after_help(format!(
            "The new token goes alone to standard output, and what describes it to standard error.\nWithout --grace the old one is dead at \
             once; with --self an answer that gets lost then takes your access with it.\n\nExamples:\n{examples}"
        ))
        .args([id_or_self(), own(), etag().conflicts_with("self"), request_id()])
        .arg(
            option("grace", "SPAN", "How long the old secret stays good beside the new one: at most 7d [default: not at all]")
                .value_parser(expiry::span),
        )
}

fn revoke_command() -> Command {
    let examples = "  keyward token revoke tok_0123456789abcdefghijkl --reason leaked\n  keyward token revoke --self";
    command("revoke", "Ends a token for good; it stays listed as revoked", examples).args([
        id_or_self(),
        own(),
        etag().conflicts_with("self"),
        reason(),
    ])
}

fn delete_command() -> Command {
    command("delete", "Ends a token and takes it out of every list", "  keyward token delete tok_0123456789abcdefghijkl")
        .args([id(), etag()])
}

fn revoke_principal_command() -> Command {
    command("revoke-principal", "Revokes every token of a principal", "  keyward token revoke-principal ann --reason \"has left\"")
        .arg(Arg::new("principal").value_name("PRINCIPAL").required(true).help("Whose tokens"))
        .arg(workspace())
        .arg(reason())
}

pub(super) fn id() -> Arg {
    Arg::new("id").value_name("ID").required(true).help("Which token: tok_…")
}

fn id_or_self() -> Arg {
    id().required(false).required_unless_present("self").conflicts_with("self").help("Which token: tok_…, or --self")
}

fn own() -> Arg {
    switch("self", "The token that you present")
}

pub(super) fn etag() -> Arg {
    option("etag", "ETAG", ETAG_HELP)
}

pub(super) fn expires(help: String) -> Arg {
    option("expires", "WHEN", "").help(help).value_parser(|text: &str| text.parse::<Expiry>())
}

pub(super) fn reason() -> Arg {
    option("reason", "TEXT", "Why, for those who look at it later")
}

fn request_id() -> Arg {
    option("request-id", "ID", "The same command with the same id gets the same token again for 10 minutes [default: random]")
}

/// The id that was given, or a random one: with it, an answer that got lost can be asked for again.
pub(super) fn new_request_id(args: &ArgMatches) -> Result<String, Failure> {
    match text(args, "request-id") {
        given if !given.is_empty() => Ok(given),
        _ => Ok(format!("{:032x}", u128::from_ne_bytes(ambient::random()?))),
    }
}

pub(super) fn ask_again(request_id: &str) -> String {
    format!("it may have happened all the same: the same command with --request-id {request_id} gets its answer for 10 minutes")
}

async fn tokens(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, TokenServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = TokenServiceClient::new(connection.channel());
    Ok((connection, client))
}

pub(super) async fn self_service(
    args: &ArgMatches,
    session: &mut Session<'_>,
) -> Result<(Connection, SelfServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = SelfServiceClient::new(connection.channel());
    Ok((connection, client))
}

pub(super) async fn create(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    if args.get_flag("self") {
        return own::create(args, session).await;
    }
    let message = CreateTokenRequest {
        workspace: text(args, "workspace"),
        display_name: text(args, "name"),
        principal: text(args, "principal"),
        kind: if is_temporary(args) { TokenKind::Temporary.into() } else { kind(args) },
        scopes: texts(args, "scope"),
        audiences: texts(args, "audience"),
        allowed_cidrs: texts(args, "cidr"),
        metadata: pairs(args),
        session_id: text(args, "session-id"),
        lifetime: lifetime(args, session)?,
        request_id: new_request_id(args)?,
    };
    let request_id = message.request_id.clone();
    let (connection, mut client) = tokens(args, session).await?;
    let answer = client.create_token(connection.request(message)).await;
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(|| ask_again(&request_id)))?;
    session.answer(&answer.into_inner())
}

/// Whether the new token shall be a temporary one.
pub(super) fn is_temporary(args: &ArgMatches) -> bool {
    args.get_flag("temporary") || kind(args) == i32::from(TokenKind::Temporary)
}

/// A span is sent as it is: the same command sends the same request then, as `--request-id` needs it.
pub(super) fn lifetime(args: &ArgMatches, session: &Session<'_>) -> Result<Option<Lifetime>, Failure> {
    let Some(expiry) = args.get_one::<Expiry>("expires") else { return Ok(None) };
    let end = end(*expiry, session)?;
    Ok(match expiry {
        Expiry::Never => Some(Lifetime::Never(true)),
        Expiry::In(span) => Some(Lifetime::Ttl(expiry::span_to_wire(*span)?)),
        Expiry::Day(day) => Some(Lifetime::ExpireDate(day.to_string())),
        Expiry::At(_) => end.map(Lifetime::ExpireTime),
    })
}

pub(super) fn end(expiry: Expiry, session: &Session<'_>) -> Result<Option<prost_types::Timestamp>, Failure> {
    let end = expiry.end(session.now).map_err(|rule| Failure::usage(format!("--expires: {rule}")))?;
    Ok(end.map(expiry::to_wire))
}

pub(super) async fn get(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = tokens(args, session).await?;
    let answer = client.get_token(connection.request(GetTokenRequest { id: text(args, "id") })).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn activate(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = tokens(args, session).await?;
    let message = ActivateTokenRequest { id: text(args, "id"), etag: text(args, "etag") };
    let answer = client.activate_token(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn deactivate(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = tokens(args, session).await?;
    let message = DeactivateTokenRequest { id: text(args, "id"), etag: text(args, "etag") };
    let answer = client.deactivate_token(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn regenerate(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    if args.get_flag("self") {
        return regenerate_self(args, session).await;
    }
    let request_id = new_request_id(args)?;
    let message =
        RegenerateTokenRequest { id: text(args, "id"), grace: grace(args)?, etag: text(args, "etag"), request_id: request_id.clone() };
    let (connection, mut client) = tokens(args, session).await?;
    let answer = client.regenerate_token(connection.request(message)).await;
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(|| ask_again(&request_id)))?;
    session.answer(&answer.into_inner())
}

async fn regenerate_self(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let request_id = new_request_id(args)?;
    let message = RegenerateSelfRequest { grace: grace(args)?, request_id: request_id.clone() };
    // Only a token that is still good can ask again.
    let hint = match message.grace {
        Some(_) => ask_again(&request_id),
        None => "it may have happened all the same, and then the token that you presented is dead: --grace avoids that".to_owned(),
    };
    let (connection, mut client) = self_service(args, session).await?;
    let answer = client.regenerate_self(connection.request(message)).await;
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(|| hint))?.into_inner();
    session.answer(&answer)
}

fn grace(args: &ArgMatches) -> Result<Option<prost_types::Duration>, Failure> {
    args.get_one("grace").copied().map(expiry::span_to_wire).transpose()
}

pub(super) async fn revoke(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let reason = text(args, "reason");
    if args.get_flag("self") {
        let (connection, mut client) = self_service(args, session).await?;
        let answer = client.revoke_self(connection.request(RevokeSelfRequest { reason })).await?;
        return session.answer(&answer.into_inner());
    }
    let (connection, mut client) = tokens(args, session).await?;
    let message = RevokeTokenRequest { id: text(args, "id"), reason, etag: text(args, "etag") };
    let answer = client.revoke_token(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn delete(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = tokens(args, session).await?;
    let message = DeleteTokenRequest { id: text(args, "id"), etag: text(args, "etag") };
    let answer = client.delete_token(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn revoke_principal(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = tokens(args, session).await?;
    let message = RevokePrincipalTokensRequest {
        workspace: text(args, "workspace"),
        principal: text(args, "principal"),
        reason: text(args, "reason"),
    };
    let answer = client.revoke_principal_tokens(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        let mut matches = token_command().no_binary_name(true).try_get_matches_from(arguments)?;
        Ok(matches.remove_subcommand().expect("a subcommand").1)
    }

    #[test]
    fn a_token_is_named_or_is_ones_own() {
        assert!(parse(&["revoke", "tok_1"]).is_ok() && parse(&["revoke", "--self"]).is_ok());
        for arguments in
            [&["revoke"][..], &["revoke", "tok_1", "--self"], &["revoke", "--self", "--etag", "x"], &["regenerate"], &["create"]]
        {
            assert!(parse(arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn request_ids_are_random_unless_given() {
        let args = parse(&["create", "--name", "ci"]).expect("well formed");
        let (one, other) = (new_request_id(&args).expect("an id"), new_request_id(&args).expect("an id"));
        assert!(one != other && one.len() == 32, "{one} {other}");
        let args = parse(&["create", "--name", "ci", "--request-id", "mine"]).expect("well formed");
        assert_eq!(new_request_id(&args).expect("an id"), "mine");
    }

    #[test]
    fn the_connection_may_be_named_before_or_behind() {
        for arguments in [["--address", "h:1", "get", "tok_1"], ["get", "tok_1", "--address", "h:1"]] {
            assert_eq!(text(&parse(&arguments).expect("well formed"), "address"), "h:1");
        }
    }

    #[test]
    fn lists_take_commas_and_repetition() {
        let args = parse(&["create", "--name", "ci", "--scope", "a:b,c:d", "--scope", "e:f", "--metadata", "k=v,w"]).expect("well formed");
        assert_eq!(texts(&args, "scope"), ["a:b", "c:d", "e:f"]);
        assert_eq!(pairs(&args).get("k").map(String::as_str), Some("v,w"));
    }
}
