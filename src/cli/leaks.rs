//! `keyward report-leaked`: whoever holds a token may kill it, without a token of their own.
//!
//! Invariant: no text that is reported is echoed, whatever goes wrong (test `what_is_reported_is_not_echoed`).

use std::io::{BufRead as _, Read as _};

use clap::{Arg, ArgAction, ArgMatches, Command};
use tonic::Status;

use super::{
    arguments::{command, texts},
    connection::{self, Connection},
    failure::{Exit, Failure},
    session::Session,
};
use crate::{
    proto::{ReportLeakedTokensRequest, ReportLeakedTokensResponse, self_service_client::SelfServiceClient},
    token::Secret,
};

/// What one call takes.
const TOKENS_MAX: usize = 100;
const TOKEN_CHARS_MAX: usize = 256;
/// More than what anybody finds at once.
const INPUT_BYTES_MAX: u64 = 16 << 20;

pub(super) fn report_command() -> Command {
    let examples = "  keyward report-leaked < found.txt\n  git log -p | grep -oE 'prod_[0-9A-Za-z]{43,}' | keyward report-leaked -";
    command("report-leaked", "Revokes tokens that were found where they should not be; needs no token of your own", examples)
        .after_help(format!("The answer is the same whatever the texts are: what is no token is passed over.\n\nExamples:\n{examples}"))
        .arg(
            Arg::new("found")
                .value_name("TOKEN")
                .action(ArgAction::Append)
                .num_args(0..)
                .help("What was found; - or nothing reads it from standard input, one token a line, which other users cannot see"),
        )
        .args(connection::open_args())
}

pub(super) async fn report(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let found = found(args, session)?;
    let connection = Connection::open_bare(args, session).await?;
    let client = SelfServiceClient::new(connection.channel());
    send(&found, async |tokens| {
        client.clone().report_leaked_tokens(connection.request(ReportLeakedTokensRequest { tokens })).await.map(|_| ())
    })
    .await?;
    session.answer(&ReportLeakedTokensResponse {})
}

/// Reports as many at once as a call takes.
async fn send(found: &[Secret], call: impl AsyncFn(Vec<String>) -> Result<(), Status>) -> Result<(), Failure> {
    for part in found.chunks(TOKENS_MAX) {
        let tokens = part.iter().map(|token| token.reveal().to_owned()).collect();
        call(tokens).await.map_err(|status| Failure::from(status).hint_if_unanswered(again))?;
    }
    Ok(())
}

fn again() -> String {
    "some may be reported and others not: run the command again, it does no harm to report a token twice".to_owned()
}

/// What was found: the arguments, and the lines of standard input if it was named or nothing was.
fn found(args: &ArgMatches, session: &mut Session<'_>) -> Result<Vec<Secret>, Failure> {
    let given = texts(args, "found");
    let mut found: Vec<String> = given.iter().filter(|text| *text != "-").cloned().collect();
    if found.len() < given.len() || given.is_empty() {
        found.append(&mut lines(session)?);
    }
    let found = found.into_iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    let (short, long): (Vec<_>, Vec<_>) = found.partition(|text| text.chars().count() <= TOKEN_CHARS_MAX);
    if !long.is_empty() {
        session.note(&format!("{} of the texts are longer than any token and were left out.", long.len()));
    }
    if short.is_empty() {
        Err(Failure::usage("there is nothing to report: give tokens, one a line"))
    } else {
        Ok(short.into_iter().map(Secret::from).collect())
    }
}

fn lines(session: &mut Session<'_>) -> Result<Vec<String>, Failure> {
    if session.interactive {
        session.note("Paste the tokens, one a line, and press Ctrl-D:");
    }
    let mut lines = Vec::new();
    let mut input = (&mut *session.input).take(INPUT_BYTES_MAX);
    // A line that is no text is no token either; the text of an error is dropped, since it may show a token.
    for line in (&mut input).split(b'\n') {
        let line = line.map_err(|_| Failure::usage("standard input cannot be read"))?;
        lines.push(String::from_utf8_lossy(&line).into_owned());
    }
    if input.limit() == 0 { Err(Failure::usage("standard input is longer than 16 MiB: report it in parts")) } else { Ok(lines) }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap};

    use super::*;
    use crate::cli::session::Format;

    /// What was found and what was said about it.
    fn read(arguments: &[&str], mut input: &[u8]) -> (Result<Vec<String>, Failure>, String) {
        let args = report_command().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut session = Session {
            env: BTreeMap::new(),
            now: jiff::Timestamp::UNIX_EPOCH,
            format: Format::Table,
            input: &mut input,
            interactive: false,
            out: &mut out,
            err: &mut err,
        };
        let found = found(&args, &mut session).map(|found| found.iter().map(|token| token.reveal().to_owned()).collect());
        assert!(out.is_empty());
        (found, String::from_utf8(err).expect("text"))
    }

    fn texts_of(arguments: &[&str], input: &[u8]) -> Vec<String> {
        read(arguments, input).0.expect("something")
    }

    #[test]
    fn tokens_come_from_arguments_and_lines() {
        assert_eq!(texts_of(&["a", "b"], b"c"), ["a", "b"]);
        assert_eq!(texts_of(&[], b"a\r\n\n  b \nc"), ["a", "b", "c"]);
        assert_eq!(texts_of(&["a", "-"], b"b\n"), ["a", "b"]);
        assert_eq!(texts_of(&[], b"\xff\na\n").len(), 2);
        for input in [&b""[..], b" \n\n"] {
            assert_eq!(read(&["-"], input).0.expect_err("nothing").exit(), Exit::Usage);
        }
    }

    #[test]
    fn what_is_reported_is_not_echoed() {
        let long = format!("canary{}", "x".repeat(TOKEN_CHARS_MAX));
        let (found, said) = read(&[], format!("{long}\nshort\n").as_bytes());
        assert_eq!(found.expect("one"), ["short"]);
        assert!(said.starts_with("1 of the texts") && !said.contains("canary"), "{said}");
        let (nothing, said) = read(&[&long], b"");
        assert!(!format!("{nothing:?}{said}").contains("canary"));
        let found = [Secret::from("canary".to_owned())];
        let failure = reported(&found, 1).0.expect_err("it fails");
        assert!(format!("{failure:?}").contains("twice") && !format!("{failure:?}").contains("canary"), "{failure:?}");
    }

    /// Reports with a server that fails at one call; says how many tokens each call had.
    fn reported(found: &[Secret], fails_at: usize) -> (Result<(), Failure>, Vec<usize>) {
        let calls = RefCell::new(Vec::new());
        let call = async |tokens: Vec<String>| {
            calls.borrow_mut().push(tokens.len());
            if calls.borrow().len() == fails_at { Err(Status::resource_exhausted("too many")) } else { Ok(()) }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let done = runtime.block_on(send(found, call));
        (done, calls.into_inner())
    }

    #[test]
    fn many_are_sent_in_several_calls() {
        let found: Vec<Secret> = (0..230).map(|number| Secret::from(number.to_string())).collect();
        let (done, calls) = reported(&found, 0);
        assert!(done.is_ok());
        assert_eq!(calls, [100, 100, 30]);
        let (done, calls) = reported(&found, 2);
        assert_eq!((done.expect_err("the second fails").exit(), calls), (Exit::Unreachable, vec![100, 100]));
    }
}
