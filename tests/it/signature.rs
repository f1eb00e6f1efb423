//! Signatures of webhook calls, checked by the Standard Webhooks libraries of Python and Node.js, as a receiver would.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::json;

use crate::{
    receiver::Call,
    world::{skip, tools},
};

/// Whether a library is installed to check with. Says so if not.
pub fn can_verify_webhooks() -> bool {
    let found = libraries().len();
    if found < 2 {
        skip("a Standard Webhooks library is missing (tests/run installs them)");
    }
    found > 0
}

/// Whether a call is signed with this secret, at this hour: the libraries allow five minutes either way by the real clock. All that are installed agree on it.
pub fn verify_webhook(secret: &str, call: &Call) -> bool {
    verify_webhooks(&[(secret, call)])[0]
}

/// As [`verify_webhook`], of many at the price of one.
pub fn verify_webhooks(calls: &[(&str, &Call)]) -> Vec<bool> {
    let mut lines = String::new();
    for (secret, call) in calls {
        let headers: serde_json::Map<_, _> = call.headers.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
        let body = str::from_utf8(&call.body).expect("UTF-8");
        lines += &json!({ "secret": secret, "headers": headers, "body": body }).to_string();
        lines.push('\n');
    }
    let libraries = libraries();
    assert!(!libraries.is_empty(), "no library to check with: ask can_verify_webhooks");
    let mut verdicts = libraries.into_iter().map(|library| ask(library, &lines, calls.len()));
    let first = verdicts.next().expect("at least one");
    for other in verdicts {
        assert_eq!(other, first, "the libraries do not agree");
    }
    first
}

/// The programs that check, as far as they are installed.
fn libraries() -> Vec<Command> {
    let script = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(path);
    let mut found = Vec::new();
    if let Some(python) = tools().map(|tools| tools.join("venv/bin/python")).filter(|python| python.exists()) {
        let mut command = Command::new(python);
        command.arg("-B").arg(script("python/verify_webhook.py"));
        found.push(command);
    }
    if script("node/node_modules/standardwebhooks").exists() {
        let mut command = Command::new("node");
        command.arg(script("node/verify_webhook.js"));
        found.push(command);
    }
    found
}

/// A library's verdict on each line.
fn ask(mut library: Command, lines: &str, count: usize) -> Vec<bool> {
    let mut child = library.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    let (mut stdin, lines) = (child.stdin.take().expect("piped"), lines.to_owned());
    // Beside the reading, so that neither waits for the other.
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic").expect("it reads");
    assert!(output.status.success(), "{library:?}");
    let said = String::from_utf8(output.stdout).expect("UTF-8");
    let verdicts: Vec<bool> = said.lines().map(|line| line == "ok").collect();
    assert_eq!(verdicts.len(), count, "{said}");
    verdicts
}
