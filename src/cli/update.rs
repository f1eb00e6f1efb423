//! `keyward token update`: only what is given changes.

use clap::{Arg, ArgGroup, ArgMatches, Command};
use prost_types::FieldMask;

use super::{
    arguments::{command, list, metadata, option, pairs, switch, text, texts},
    connection::Connection,
    expiry::Expiry,
    failure::{Exit, Failure},
    session::Session,
    tokens::{EXPIRES_HELP, end, etag, expires, id},
};
use crate::proto::{Token, UpdateTokenRequest, token_service_client::TokenServiceClient};

pub(super) fn update_command() -> Command {
    let examples = "  keyward token update tok_0123456789abcdefghijkl --name deploy --expires 2027-04-11\n  \
                    keyward token update tok_0123456789abcdefghijkl --scope orders:read,orders:write --clear-cidrs";
    let changes = changes();
    let names: Vec<_> = changes.iter().map(|arg| arg.get_id().clone()).collect();
    command("update", "Changes settings of a token; what you do not name stays as it is", examples)
        .arg(id())
        .args(changes)
        .arg(etag())
        .group(ArgGroup::new("changes").args(names).required(true).multiple(true))
}

fn changes() -> [Arg; 10] {
    [
        option("name", "TEXT", "What people recognise it by"),
        list("scope", "SCOPE", "What it may do; replaces all its scopes; repeat it for more"),
        clear("clear-scopes", "scope", "Take all scopes away"),
        list("audience", "PRODUCT", "A product that it is for; replaces all; repeat it for more"),
        clear("clear-audiences", "audience", "Let it be used at any product"),
        list("cidr", "RANGE", "Addresses that it may be used from; replaces all; repeat it for more"),
        clear("clear-cidrs", "cidr", "Let it be used from anywhere"),
        metadata("Free text for your own use; replaces all; repeat it for more"),
        clear("clear-metadata", "metadata", "Take all metadata away"),
        expires(EXPIRES_HELP.to_owned()),
    ]
}

fn clear(name: &'static str, other: &'static str, help: &'static str) -> Arg {
    switch(name, help).conflicts_with(other)
}

pub(super) async fn update(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let message = request(args, session)?;
    let connection = Connection::open(args, session).await?;
    let answer = TokenServiceClient::new(connection.channel()).update_token(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

fn request(args: &ArgMatches, session: &Session<'_>) -> Result<UpdateTokenRequest, Failure> {
    let token = Token {
        id: text(args, "id"),
        etag: text(args, "etag"),
        display_name: text(args, "name"),
        scopes: texts(args, "scope"),
        audiences: texts(args, "audience"),
        allowed_cidrs: texts(args, "cidr"),
        metadata: pairs(args),
        expire_time: args.get_one::<Expiry>("expires").map(|expiry| end(*expiry, session)).transpose()?.flatten(),
        ..Token::default()
    };
    Ok(UpdateTokenRequest { token: Some(token), update_mask: Some(FieldMask { paths: paths(args) }) })
}

/// The fields that were named. A field that is in the mask and empty in the token is cleared.
fn paths(args: &ArgMatches) -> Vec<String> {
    let cleared = |flag| args.get_flag(flag);
    let named = [
        ("display_name", args.contains_id("name")),
        ("scopes", args.contains_id("scope") || cleared("clear-scopes")),
        ("audiences", args.contains_id("audience") || cleared("clear-audiences")),
        ("allowed_cidrs", args.contains_id("cidr") || cleared("clear-cidrs")),
        ("metadata", args.contains_id("metadata") || cleared("clear-metadata")),
        ("expire_time", args.contains_id("expires")),
    ];
    named.into_iter().filter(|(_, named)| *named).map(|(path, _)| path.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        update_command().no_binary_name(true).try_get_matches_from(arguments)
    }

    #[test]
    fn only_what_is_given_changes() {
        for (arguments, expected) in [
            (&["tok_1", "--name", "ci"][..], &["display_name"][..]),
            (&["tok_1", "--scope", "a:b", "--clear-cidrs"], &["scopes", "allowed_cidrs"]),
            (&["tok_1", "--expires", "never", "--clear-metadata"], &["metadata", "expire_time"]),
            (&["tok_1", "--audience", "a", "--cidr", "10.0.0.0/8", "--metadata", "a=b"], &["audiences", "allowed_cidrs", "metadata"]),
        ] {
            assert_eq!(paths(&parse(arguments).expect("well formed")), expected, "{arguments:?}");
        }
    }

    #[test]
    fn nothing_to_change_is_a_mistake() {
        for arguments in [&["tok_1"][..], &["tok_1", "--etag", "x"], &["--name", "ci"], &["tok_1", "--scope", "a:b", "--clear-scopes"]] {
            assert_eq!(parse(arguments).expect_err("nothing").exit_code(), 2, "{arguments:?}");
        }
    }
}
