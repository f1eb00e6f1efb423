//! The command line against a running server: what people read, what scripts get, and exit codes.

use std::{
    io::Write as _,
    process::{Output, Stdio},
};

use crate::world::{Backend, World, keyward, runtime};

/// Runs the program as a user of this world.
struct Shell {
    address: String,
    token: String,
}

impl Shell {
    fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = keyward();
        command.args(arguments).env("KEYWARD_ADDRESS", &self.address).env("KEYWARD_TOKEN", &self.token);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
        // A program that does not read its input has closed it.
        let _closed = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("an end")
    }

    /// Its exit code and what it wrote for programs.
    fn get(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.run(arguments, "");
        (output.status.code().expect("an exit code"), String::from_utf8(output.stdout).expect("text"))
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let (code, text) = self.get(&[arguments, &["--output", "json"]].concat());
        assert_eq!(code, 0, "{arguments:?}");
        serde_json::from_str(&text).expect("JSON")
    }
}

fn in_a_shell(test: impl FnOnce(&World, &Shell) + Send + 'static) {
    runtime().block_on(async {
        let world = World::start_by_the_real_clock(Backend::Sqlite).await;
        let shell = Shell { address: world.server().address().to_string(), token: world.root_token().to_owned() };
        tokio::task::spawn_blocking(move || test(&world, &shell)).await.expect("the test");
    });
}

#[test]
fn a_token_goes_through_its_life_in_a_shell() {
    in_a_shell(|_, shell| {
        let output =
            shell.run(&["token", "create", "--name", "ci", "--scope", "agents:list", "--audience", "billing", "--expires", "30d"], "");
        assert!(output.status.success());
        let secret = String::from_utf8(output.stdout).expect("text");
        assert!(secret.starts_with("kw_") && secret.len() == 49 && secret.ends_with('\n'), "the secret alone: {secret:?}");
        let secret = secret.trim();
        assert!(!String::from_utf8_lossy(&output.stderr).contains(secret));
        let (code, text) = shell.get(&["validate", secret, "--audience", "billing", "--scope", "agents:list"]);
        assert_eq!(code, 0);
        assert!(text.contains("VALID") && text.contains("ci"), "{text}");
        let piped = shell.run(&["validate", "-"], &format!("{secret}\n"));
        assert_eq!(piped.status.code(), Some(0));
        let (code, text) = shell.get(&["validate", secret, "--scope", "agents:delete"]);
        assert!(code == 1 && text.contains("INSUFFICIENT_SCOPE") && text.contains("agents:delete"), "{code} {text}");
        let listed = shell.json(&["token", "list"]);
        let token = listed["tokens"].as_array().expect("a list").iter().find(|token| token["displayName"] == "ci").expect("listed").clone();
        let id = token["id"].as_str().expect("an id");
        assert_eq!(token["state"], "TOKEN_STATE_ACTIVE");
        let (_, table) = shell.get(&["token", "list"]);
        for part in ["ci", id, &secret[..8], "Active", "root"] {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        assert!(!table.contains(&secret[..9]), "{table}");
        for (command, state) in [("deactivate", "TOKEN_STATE_INACTIVE"), ("activate", "TOKEN_STATE_ACTIVE")] {
            assert_eq!(shell.json(&["token", command, id])["token"]["state"], state);
        }
        let renamed = shell.json(&["token", "update", id, "--name", "nightly", "--expires", "180d"]);
        assert_eq!(renamed["token"]["displayName"], "nightly");
        assert!(renamed["token"]["expireTime"].as_str().is_some_and(|end| end.contains('T')), "{renamed}");
        let (_, renewed) = shell.get(&["token", "regenerate", id]);
        assert_eq!(shell.get(&["validate", secret]).0, 1, "the old secret is dead");
        assert_eq!(shell.get(&["validate", renewed.trim()]).0, 0);
        assert_eq!(shell.json(&["token", "revoke", id, "--reason", "done"])["token"]["revokeReason"], "done");
        let (code, text) = shell.get(&["validate", renewed.trim()]);
        assert!(code == 1 && text.contains("REVOKED"), "{text}");
        assert_eq!(shell.get(&["token", "delete", id]).0, 0);
        assert_eq!(shell.get(&["token", "get", id]).0, 1, "gone");
    });
}

#[test]
fn exit_codes_tell_refused_from_unreachable() {
    in_a_shell(|_, shell| {
        assert_eq!(shell.get(&["health"]).0, 0);
        assert_eq!(shell.get(&["whoami"]).0, 0);
        assert_eq!(shell.get(&["validate", "nonsense"]).0, 1);
        assert_eq!(shell.get(&["token", "get", "tok_0000000000000000000000"]).0, 1);
        assert_eq!(shell.get(&["token", "create"]).0, 2, "a name is required");
        assert_eq!(shell.get(&["token", "create", "--name", "t", "--expires", "2020-01-01"]).0, 2, "must be later than today");
        assert_eq!(shell.get(&["tokens"]).0, 2);
        let nowhere = Shell { address: format!("127.0.0.1:{}", crate::world::free_port()), token: shell.token.clone() };
        assert_eq!(nowhere.get(&["validate", "nonsense"]).0, 3);
        assert_eq!(nowhere.get(&["health"]).0, 3);
        let stranger = Shell { address: shell.address.clone(), token: "kw_wrong".to_owned() };
        let output = stranger.run(&["token", "list"], "");
        assert_eq!(output.status.code(), Some(1));
        assert!(!String::from_utf8_lossy(&output.stderr).contains("kw_wrong"), "a token is never echoed");
        let output = shell.run(&["token", "create", "--name", "", "--scope", "X", "--output", "json"], "");
        let error: serde_json::Value = serde_json::from_slice(&output.stderr).expect("errors are JSON, too");
        assert_eq!((error["code"].as_str(), error["reason"].as_str()), (Some("INVALID_ARGUMENT"), Some("INVALID_FIELD")));
        assert_eq!(error["violations"].as_array().map(Vec::len), Some(2), "{error}");
    });
}

#[test]
fn names_cannot_write_to_the_terminal() {
    in_a_shell(|_, shell| {
        let output = shell.run(&["token", "create", "--name", "plain", "--metadata", "note=\u{1b}[31mred"], "");
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.code() == Some(1) && !said.contains(&0x1b), "{}", String::from_utf8_lossy(&said));
        shell.json(&["token", "create", "--name", "plain", "--metadata", "note=fine\nstatus:     Revoked"]);
        let listed = shell.json(&["token", "list"]);
        let id = listed["tokens"][0]["id"].as_str().expect("an id");
        let (code, text) = shell.get(&["token", "get", id]);
        assert!(
            code == 0 && text.contains("fine") && !text.lines().any(|line| line.starts_with("status") && line.contains("Revoked")),
            "{text}"
        );
    });
}

#[test]
fn every_shell_gets_its_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = keyward().args(["completions", shell]).output().expect("it runs");
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("regenerate"), "{shell}");
    }
}
