//! One run of a client command: where its input comes from and where its output goes.
//!
//! Answers go to standard output, everything that is said about them to standard error, so that `TOKEN=$(keyward token create …)` works.

use std::{
    collections::BTreeMap,
    io::{BufRead, Read as _, Write},
};

use clap::{Arg, ArgMatches};
use jiff::Timestamp;

use super::{
    answer::{self, Answer},
    arguments::option,
    expiry,
    failure::{Exit, Failure},
    table::escape,
};
use crate::{proto::PropagationState, token::Secret};

/// Longer lines hold no token.
const LINE_BYTES_MAX: u64 = 16 * 1024;

/// Whom the output is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    /// People: aligned text.
    Table,
    /// Programs: proto3 JSON.
    Json,
}

impl Format {
    pub(super) fn arg() -> Arg {
        option("output", "FORMAT", "table for people, json for programs [default: table] [env: KEYWARD_OUTPUT]")
            .value_parser(["table", "json"])
            .help_heading("Output")
    }

    /// # Errors
    /// A usage failure if the environment names something else.
    pub(super) fn read(args: &ArgMatches, env: &BTreeMap<String, String>) -> Result<Self, Failure> {
        match given(args, "output", env, "KEYWARD_OUTPUT").as_deref() {
            None | Some("table") => Ok(Self::Table),
            Some("json") => Ok(Self::Json),
            Some(other) => Err(Failure::usage(format!("KEYWARD_OUTPUT is {other}; it must be table or json"))),
        }
    }
}

/// What was said with a flag, else with a variable. An empty variable says nothing.
pub(super) fn given(args: &ArgMatches, name: &str, env: &BTreeMap<String, String>, variable: &str) -> Option<String> {
    // Not every command has every option of the connection.
    let flag = args.try_get_one::<String>(name).ok().flatten();
    flag.or_else(|| env.get(variable).filter(|value| !value.is_empty())).cloned()
}

/// The streams and facts that a command works with.
pub(super) struct Session<'a> {
    pub env: BTreeMap<String, String>,
    pub now: Timestamp,
    pub format: Format,
    pub input: &'a mut dyn BufRead,
    /// Whether somebody is typing.
    pub interactive: bool,
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
}

impl Session<'_> {
    /// Reads a token from standard input: its first line.
    ///
    /// # Errors
    /// A usage failure if there is none.
    pub(super) fn read_token(&mut self) -> Result<Secret, Failure> {
        if self.interactive {
            self.note("Paste the token and press Enter:");
        }
        let mut line = String::new();
        let read = (&mut *self.input).take(LINE_BYTES_MAX).read_line(&mut line);
        // A token that cannot be read must not be shown either, so the text of the error is dropped.
        match (read, line.trim()) {
            (Err(_), _) => Err(Failure::usage("standard input cannot be read as text")),
            (Ok(_), "") => Err(Failure::usage("standard input holds no token")),
            (Ok(_), token) => Ok(Secret::from(token.to_owned())),
        }
    }

    /// Says something to people. A terminal that is gone cannot be told.
    pub(super) fn note(&mut self, text: &str) {
        let _ = writeln!(self.err, "{text}");
    }

    /// Says something to people only: programs read it from the answer.
    pub(super) fn remark(&mut self, text: &str) {
        if self.format == Format::Table {
            self.note(text);
        }
    }

    /// Shows an answer. Its secret, if it has one, goes alone to standard output, and what describes it to standard error.
    ///
    /// # Errors
    /// `output` if it cannot be written.
    pub(super) fn answer<A: Answer>(&mut self, answer: &A) -> Result<Exit, Failure> {
        match (self.format, answer.secret()) {
            (Format::Json, _) => {
                let json = answer::json(answer)?;
                self.write(&json)?;
            }
            (Format::Table, None) => self.write(&answer.text())?,
            (Format::Table, Some(secret)) => self.reveal::<A>(&answer.text(), secret)?,
        }
        self.warn_if_pending(answer);
        Ok(Exit::Good)
    }

    fn reveal<A: Answer>(&mut self, text: &str, secret: &str) -> Result<(), Failure> {
        let shown = write!(self.err, "{text}").and_then(|()| self.err.flush());
        self.note(&format!("{}. It is shown this once and cannot be had again:", A::SECRET_IS));
        // Without the description the secret is still worth having; without the secret nothing is.
        let _ = shown;
        self.write(&format!("{}\n", escape(secret))).map_err(|_| Failure::output(A::SECRET_LOST))
    }

    /// Writes to standard output.
    ///
    /// # Errors
    /// `output` if it cannot be written.
    pub(super) fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(Failure::from)
    }

    fn warn_if_pending(&mut self, answer: &impl Answer) {
        let Some(propagation) = answer.propagation().filter(|it| it.state() == PropagationState::Pending) else { return };
        let until = propagation.complete_by.as_ref().and_then(expiry::from_wire).map(|end| format!(" until {}", expiry::seconds(end)));
        let servers = if propagation.replicas.is_empty() { "some servers".to_owned() } else { propagation.replicas.join(", ") };
        self.remark(&format!(
            "The change is made and will not be lost, but {servers} may not know of it{}. Repeat the command to wait for it; `keyward replica list` shows the servers.",
            until.unwrap_or_default()
        ));
    }
}
