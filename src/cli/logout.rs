//! `keyward session end`: a login session ends, and its temporary tokens with it.

use clap::{Arg, ArgMatches, Command};

use super::{
    arguments::{command, text, workspace},
    connection,
    failure::{Exit, Failure},
    session::Session,
    tokens::self_service,
};
use crate::proto::EndSessionRequest;

pub(super) fn session_command() -> Command {
    Command::new("session")
        .about("Ends login sessions")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(end_command())
        .args(connection::args().map(|arg| arg.global(true)))
}

fn end_command() -> Command {
    let examples = "  keyward session end\n  keyward session end 2f9c1e --workspace acme";
    command("end", "Revokes every temporary token of a login session", examples)
        .arg(Arg::new("session-id").value_name("SESSION_ID").help("Which session [default: that of the token that you present]"))
        .arg(workspace())
}

pub(super) async fn end(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = self_service(args, session).await?;
    let message = EndSessionRequest { session_id: text(args, "session-id"), workspace: text(args, "workspace") };
    let answer = client.end_session(connection.request(message)).await?;
    session.answer(&answer.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_or_is_ones_own() {
        let named = |arguments: &[&str]| {
            let matches = session_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
            let (_, args) = matches.subcommand().expect("a subcommand");
            (text(args, "session-id"), text(args, "workspace"))
        };
        assert_eq!(named(&["end"]), (String::new(), String::new()));
        assert_eq!(named(&["end", "s1", "--workspace", "acme"]), ("s1".to_owned(), "acme".to_owned()));
        assert!(session_command().no_binary_name(true).try_get_matches_from(["end", "s1", "s2"]).is_err());
    }
}
