//! Commands that take several ids: one call for each, and what became of it.
//!
//! Invariant: an id that is refused keeps no other from its turn (test `what_is_refused_keeps_no_other_from_its_turn`).

use clap::{Arg, ArgAction, ArgMatches};
use tonic::Status;

use super::{
    answer::{self, Answer},
    arguments::texts,
    failure::{Exit, Failure},
    mask,
    session::{Format, Session},
};

/// `ID…`
pub(super) fn ids(help: &'static str) -> Arg {
    Arg::new("id").value_name("ID").required(true).action(ArgAction::Append).num_args(1..).help(help)
}

/// Calls for each id; says at once what was refused, and then shows what was done. Programs get an object on a line for each.
pub(super) async fn each<A: Answer>(
    args: &ArgMatches,
    session: &mut Session<'_>,
    call: impl AsyncFn(String) -> Result<A, Status>,
    text: impl Fn(&[A]) -> String,
) -> Result<Exit, Failure> {
    let (mut done, mut exit) = (Vec::new(), Exit::Good);
    for id in texts(args, "id") {
        match call(id.clone()).await {
            Ok(answer) => done.push(answer),
            Err(status) => {
                let failure = Failure::from(status).about(&mask(&id));
                failure.print(session.format, session.err);
                exit = failure.exit();
                // Who did not answer would not answer for the others either.
                if exit == Exit::Unreachable {
                    session.remark("It and those behind it may not be done: the same command does no harm.");
                    break;
                }
            }
        }
    }
    session.write(&if session.format == Format::Json { answer::json_lines(A::NAME, &done)? } else { text(&done) })?;
    Ok(exit)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap};

    use clap::Command;

    use super::*;
    use crate::proto::{AcknowledgeFaultResponse, Fault};

    const TOKEN: &str = "prod_0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQR";

    /// Acknowledges; an id that begins with `no` is refused, one with `away` not answered. Says what was shown, and what was asked.
    fn acknowledged(format: Format, ids: &[&str]) -> (Exit, String, String, Vec<String>) {
        let args = Command::new("test").no_binary_name(true).arg(self::ids("Which")).try_get_matches_from(ids).expect("well formed");
        let (mut input, mut out, mut err) = (&b""[..], Vec::new(), Vec::new());
        let mut session = Session {
            env: BTreeMap::new(),
            now: jiff::Timestamp::UNIX_EPOCH,
            format,
            input: &mut input,
            interactive: false,
            out: &mut out,
            err: &mut err,
        };
        let asked = RefCell::new(Vec::new());
        let call = async |id: String| {
            asked.borrow_mut().push(id.clone());
            match id.get(..2) {
                Some("no" | "pr") => Err(Status::not_found("there is no such fault")),
                Some("aw") => Err(Status::unavailable("gone")),
                _ => Ok(AcknowledgeFaultResponse { fault: Some(Fault { id, ..Fault::default() }), propagation: None }),
            }
        };
        let text = |done: &[AcknowledgeFaultResponse]| format!("{} done\n", done.len());
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let exit = runtime.block_on(each(&args, &mut session, call, text)).expect("it can be shown");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (exit, text(out), text(err), asked.into_inner())
    }

    #[test]
    fn what_is_refused_keeps_no_other_from_its_turn() {
        let (exit, out, err, asked) = acknowledged(Format::Table, &["f1", "no", TOKEN, "f2"]);
        assert_eq!((exit, out.as_str(), asked.len()), (Exit::Refused, "2 done\n", 4));
        assert_eq!(err, "keyward: no: there is no such fault\nkeyward: prod_0ab…: there is no such fault\n");
        let (exit, out, err, _) = acknowledged(Format::Table, &["f1", "f2"]);
        assert_eq!((exit, out.as_str(), err.as_str()), (Exit::Good, "2 done\n", ""));
    }

    #[test]
    fn who_does_not_answer_is_not_asked_again() {
        let (exit, out, err, asked) = acknowledged(Format::Table, &["f1", "away", "f2"]);
        assert_eq!((exit, out.as_str(), asked.len()), (Exit::Unreachable, "1 done\n", 2));
        assert!(err.starts_with("keyward: away: gone\nIt and those behind it may not be done"), "{err}");
    }

    #[test]
    fn programs_get_an_object_on_a_line_for_each() {
        let (exit, out, err, _) = acknowledged(Format::Json, &["f1", "no", "f2"]);
        let ids: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!((exit, ids.len(), ids[1]["fault"]["id"].as_str()), (Exit::Refused, 2, Some("f2")));
        let error: serde_json::Value = serde_json::from_str(&err).expect("JSON");
        assert_eq!((error["code"].as_str(), error["message"].as_str()), (Some("NOT_FOUND"), Some("no: there is no such fault")));
    }
}
