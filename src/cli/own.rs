//! `keyward token create --self`: tokens of one's own, for which nobody needs to be an administrator.

use clap::ArgMatches;

use super::{
    arguments::{pairs, text, texts},
    failure::{Exit, Failure},
    session::Session,
    tokens::{ask_again, is_temporary, lifetime, new_request_id, self_service},
};
use crate::proto::{
    CreateMyTokenRequest, IssueTemporaryTokenRequest, create_my_token_request::Lifetime as MyLifetime, create_token_request::Lifetime,
};

pub(super) async fn create(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    if is_temporary(args) { create_temporary(args, session).await } else { create_permanent(args, session).await }
}

async fn create_permanent(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let message = permanent(args, session)?;
    let request_id = message.request_id.clone();
    let (connection, mut client) = self_service(args, session).await?;
    let answer = client.create_my_token(connection.request(message)).await;
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(|| ask_again(&request_id)))?;
    session.answer(&answer.into_inner())
}

async fn create_temporary(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let message = temporary(args, session)?;
    let request_id = message.request_id.clone();
    let (connection, mut client) = self_service(args, session).await?;
    let answer = client.issue_temporary_token(connection.request(message)).await;
    let answer = answer.map_err(|status| Failure::from(status).hint_if_unanswered(|| ask_again(&request_id)))?;
    session.answer(&answer.into_inner())
}

fn permanent(args: &ArgMatches, session: &Session<'_>) -> Result<CreateMyTokenRequest, Failure> {
    if !args.contains_id("name") {
        return Err(Failure::usage("--name is missing: only a temporary token can do without"));
    }
    if args.contains_id("session-id") {
        return Err(Failure::usage("--session-id is for a temporary token: add --temporary"));
    }
    Ok(CreateMyTokenRequest {
        display_name: text(args, "name"),
        scopes: texts(args, "scope"),
        audiences: texts(args, "audience"),
        allowed_cidrs: texts(args, "cidr"),
        metadata: pairs(args),
        lifetime: lifetime(args, session)?.map(mine),
        request_id: new_request_id(args)?,
    })
}

fn mine(lifetime: Lifetime) -> MyLifetime {
    match lifetime {
        Lifetime::Ttl(ttl) => MyLifetime::Ttl(ttl),
        Lifetime::ExpireTime(end) => MyLifetime::ExpireTime(end),
        Lifetime::Never(never) => MyLifetime::Never(never),
        Lifetime::ExpireDate(day) => MyLifetime::ExpireDate(day),
    }
}

fn temporary(args: &ArgMatches, session: &Session<'_>) -> Result<IssueTemporaryTokenRequest, Failure> {
    for name in ["cidr", "metadata"] {
        if args.contains_id(name) {
            return Err(Failure::usage(format!("--{name} is not for a temporary token of your own")));
        }
    }
    let ttl = match lifetime(args, session)? {
        None => None,
        Some(Lifetime::Ttl(ttl)) => Some(ttl),
        Some(_) => return Err(Failure::usage("--expires: a temporary token of your own lives for a span, such as 12h")),
    };
    Ok(IssueTemporaryTokenRequest {
        display_name: text(args, "name"),
        scopes: texts(args, "scope"),
        audiences: texts(args, "audience"),
        session_id: text(args, "session-id"),
        ttl,
        request_id: new_request_id(args)?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::{session::Format, tokens::token_command};

    fn with_args<T>(arguments: &[&str], act: impl FnOnce(&ArgMatches, &Session<'_>) -> Result<T, Failure>) -> Result<T, Failure> {
        let arguments = [&["create", "--self"], arguments].concat();
        let matches = token_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
        let (mut input, mut out, mut err) = (&b""[..], Vec::new(), Vec::new());
        let session = Session {
            env: BTreeMap::new(),
            now: "2027-04-11T09:30:00Z".parse().expect("an instant"),
            format: Format::Table,
            input: &mut input,
            interactive: false,
            out: &mut out,
            err: &mut err,
        };
        act(matches.subcommand().expect("a subcommand").1, &session)
    }

    #[test]
    fn a_token_of_ones_own_is_permanent_unless_said() {
        for (arguments, expected) in
            [(&["--name", "a"][..], false), (&["--temporary"], true), (&["--kind", "temporary"], true), (&["--kind", "permanent"], false)]
        {
            assert!(with_args(arguments, |args, _| Ok(is_temporary(args) == expected)).is_ok_and(|same| same), "{arguments:?}");
        }
        for arguments in [["--self", "--principal", "ann"], ["--self", "--workspace", "acme"], ["--temporary", "--kind", "temporary"]] {
            let arguments = [&["create", "--name", "a"][..], &arguments].concat();
            assert!(token_command().no_binary_name(true).try_get_matches_from(&arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn a_permanent_one_is_as_any_other() {
        let arguments = ["--name", "ci", "--scope", "a:b", "--cidr", "10.0.0.0/8", "--metadata", "k=v", "--expires", "2027-04-12"];
        let message = with_args(&arguments, permanent).expect("well formed");
        assert_eq!((message.display_name.as_str(), message.request_id.len()), ("ci", 32));
        assert_eq!(message.lifetime, Some(MyLifetime::ExpireDate("2027-04-12".to_owned())));
        assert_eq!((message.scopes, message.allowed_cidrs), (vec!["a:b".to_owned()], vec!["10.0.0.0/8".to_owned()]));
        assert_eq!(message.metadata.get("k").map(String::as_str), Some("v"));
        assert!(with_args(&["--name", "ci", "--expires", "2027-04-11"], permanent).is_err());
    }

    #[test]
    fn a_temporary_one_may_have_no_name() {
        let message = with_args(&["--temporary", "--session-id", "s1", "--expires", "1h"], temporary).expect("well formed");
        assert_eq!((message.display_name.as_str(), message.session_id.as_str()), ("", "s1"));
        assert_eq!(message.ttl.map(|ttl| ttl.seconds), Some(3_600));
        assert_eq!(with_args(&["--temporary"], temporary).expect("well formed").ttl, None);
    }
}
