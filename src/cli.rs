//! The command line: what people and scripts type, and what they get to see.
//!
//! `serve`, `migrate`, `recover` and `keyring` work on the server's own data; every other command is a client of the gRPC interface.
//!
//! Invariant: a token that was typed in the wrong place is not echoed (test `a_misplaced_token_is_not_echoed`).

mod answer;
mod arguments;
mod audit;
mod connection;
mod expiry;
mod failure;
mod faults;
mod leaks;
mod listing;
mod logout;
mod notices;
mod own;
mod paging;
mod policy;
mod principals;
mod questions;
mod replicas;
mod serve;
mod session;
mod settings;
mod several;
mod sheet;
mod table;
mod tokens;
mod update;
mod wishes;
mod workspaces;

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write},
    process::ExitCode,
};

use clap::{Arg, ArgMatches, Command, parser::ValueSource, value_parser};
use clap_complete::Shell;

use self::{
    arguments::{command, switch},
    failure::{Exit, Failure},
    session::{Format, Session},
};
use crate::{
    ambient::Clock,
    config::{self, Config},
};

const ABOUT: &str = "Keyward issues API tokens, answers over gRPC whether a token is good, and ends them at once when told so.";

const AFTER: &str = "\
Start here:
  keyward serve --root-token-file root.txt      start a server; its first start makes the root token
  export KEYWARD_TOKEN_FILE=root.txt            say who you are
  keyward token create --name ci --expires 90d > ci.txt
  keyward validate - < ci.txt                   ask whether a token is good
  keyward report-leaked - < found.txt           end tokens that got into the open

Exit codes:
  0  done; the token is good; the service is ready
  1  refused: the token is not good, or the request is wrong or not allowed
  2  the command line or a setting is wrong
  3  no answer: the server cannot be reached, is overloaded or failed";

/// Everything that can be typed.
fn root() -> Command {
    Command::new("keyward")
        .about(ABOUT)
        .version(crate::telemetry::VERSION)
        .after_help(AFTER)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([serve_command(), migrate_command(), recover_command(), keyring_command()])
        .subcommands([questions::health_command(), questions::whoami_command(), questions::validate_command()])
        .subcommands([tokens::token_command(), workspaces::workspace_command(), principals::principal_command()])
        .subcommands([faults::faults_command(), notices::notices_command(), replicas::replica_command()])
        .subcommands([audit::audit_command(), logout::session_command(), leaks::report_command(), completions_command()])
}

fn serve_command() -> Command {
    let examples = "  keyward serve\n  keyward serve --data-dir /var/lib/keyward --root-token-file /run/keyward/root-token\n  \
                    keyward serve --listen 0.0.0.0:50051 --tls-cert cert.pem --tls-key key.pem";
    command("serve", "Starts a server", examples).args(settings::args())
}

fn migrate_command() -> Command {
    let examples = "  keyward migrate --database-url postgres://keyward@db/keyward\n  keyward migrate --restored";
    command("migrate", "Brings the database's schema up to date, for servers that run with --migrate-on-start false", examples)
        .arg(switch("restored", "The database was put back from a backup: every server forgets what it knows"))
        .args(settings::args())
}

fn recover_command() -> Command {
    let examples = "  keyward recover --data-dir keyward-data > root.txt";
    command("recover", "Makes a new root token, for when the last one is lost; with the embedded database, stop the server first", examples)
        .args(settings::args())
}

fn keyring_command() -> Command {
    let examples = |name: &str| format!("  keyward keyring {name} --data-dir keyward-data");
    let add = "Adds a key that servers know and that makes no tokens yet: the first of two steps where there are several servers";
    let promote = "Has new tokens made with the key that was added: the second step, when every server knows it";
    let rotate = "Adds a key and has new tokens made with it: both steps at once, for one server; older tokens stay good";
    Command::new("keyring")
        .about("Manages the keys that tokens are made with")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(
            [("add", add), ("promote", promote), ("rotate", rotate)]
                .map(|(name, about)| command(name, about, &examples(name)).args(settings::args())),
        )
}

fn completions_command() -> Command {
    let examples =
        "  keyward completions bash > /etc/bash_completion.d/keyward\n  keyward completions fish > ~/.config/fish/completions/keyward.fish";
    command("completions", "Prints the completions of a shell", examples)
        .arg(Arg::new("shell").value_name("SHELL").required(true).value_parser(value_parser!(Shell)).help("The shell"))
        .arg_required_else_help(true)
}

/// Runs the command that the arguments name; the first is the program's own name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match root().try_get_matches_from(arguments) {
        Ok(matches) => dispatch(&matches),
        Err(error) => explain(&error),
    }
}

fn dispatch(matches: &ArgMatches) -> ExitCode {
    let (path, args) = leaf(matches);
    if let Some(name) = given_in_vain(matches) {
        let failure = Failure::usage(format!("--{name} stands before a command that it would not reach: give it behind `keyward {path}`"));
        return report(&failure, Format::Table);
    }
    match path.as_str() {
        "serve" => with_config(args, serve::serve),
        "migrate" if args.get_flag("restored") => with_config(args, serve::restore),
        "migrate" => with_config(args, serve::migrate),
        "recover" => with_config(args, serve::recover),
        "keyring add" => with_config(args, serve::add_key),
        "keyring promote" => with_config(args, serve::promote_key),
        "keyring rotate" => with_config(args, serve::rotate_keyring),
        "completions" => completions(args),
        _ => client(&path, args),
    }
}

/// The command that was named, such as `token create`, and its arguments.
fn leaf(matches: &ArgMatches) -> (String, &ArgMatches) {
    let (mut path, mut args) = (Vec::new(), matches);
    while let Some((name, inner)) = args.subcommand() {
        path.push(name);
        args = inner;
    }
    (path.join(" "), args)
}

/// An option of `keyward faults` alone that was given before one of its commands, which would not see it.
fn given_in_vain(matches: &ArgMatches) -> Option<String> {
    let typed = |args: &ArgMatches, name: &str| {
        matches!(args.try_contains_id(name), Ok(true)) && args.value_source(name) == Some(ValueSource::CommandLine)
    };
    let (_, inner) = matches.subcommand()?;
    let lost = matches.ids().map(clap::Id::as_str).find(|name| typed(matches, name) && !typed(inner, name));
    lost.map(str::to_owned).or_else(|| given_in_vain(inner))
}

fn with_config(args: &ArgMatches, act: fn(&Config) -> ExitCode) -> ExitCode {
    match settings::load(args) {
        Ok(config) => act(&config),
        Err(mistakes) => {
            for mistake in mistakes {
                let _ = writeln!(io::stderr(), "keyward: {mistake}");
            }
            Exit::Usage.into()
        }
    }
}

fn completions(args: &ArgMatches) -> ExitCode {
    let mut script = Vec::new();
    if let Some(shell) = args.get_one::<Shell>("shell") {
        clap_complete::generate(*shell, &mut root(), "keyward", &mut script);
    }
    match io::stdout().write_all(&script) {
        Ok(()) => Exit::Good.into(),
        Err(_) => Exit::Refused.into(),
    }
}

/// Help and version, or what is wrong with the arguments.
fn explain(error: &clap::Error) -> ExitCode {
    let text = mask(&error.to_string());
    let shown = if error.use_stderr() { io::stderr().write_all(text.as_bytes()) } else { io::stdout().write_all(text.as_bytes()) };
    match (error.use_stderr(), shown) {
        (false, Ok(())) => Exit::Good.into(),
        (false, Err(_)) => Exit::Refused.into(),
        (true, _) => Exit::Usage.into(),
    }
}

/// Words as long as a token are cut to the 8 characters by which people recognise one.
fn mask(text: &str) -> String {
    const TOKEN_CHARS_MIN: usize = 45;
    let is_part = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let mut masked = String::with_capacity(text.len());
    for piece in text.split_inclusive(|character| !is_part(character)) {
        let word = piece.trim_end_matches(|character| !is_part(character));
        if word.len() >= TOKEN_CHARS_MIN {
            masked.extend(word.chars().take(8));
            masked.push('…');
            masked.extend(piece.chars().skip(word.len()));
        } else {
            masked.push_str(piece);
        }
    }
    masked
}

fn client(path: &str, args: &ArgMatches) -> ExitCode {
    let (mut input, mut out, mut err) = (io::stdin().lock(), io::stdout(), io::stderr());
    let interactive = io::stdin().is_terminal();
    let env = config::environment();
    let format = match Format::read(args, &env) {
        Ok(format) => format,
        Err(failure) => return report(&failure, Format::Table),
    };
    let now = expiry::timestamp(Clock::system().now());
    let mut session = Session { env, now, format, input: &mut input, interactive, out: &mut out, err: &mut err };
    match block_on(path, args, &mut session) {
        Ok(exit) => exit.into(),
        Err(failure) => report(&failure, format),
    }
}

fn report(failure: &Failure, format: Format) -> ExitCode {
    failure.print(format, &mut io::stderr());
    failure.exit().into()
}

fn block_on(path: &str, args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match path {
            "health" => questions::health(args, session).await,
            "whoami" => questions::whoami(args, session).await,
            "validate" => questions::validate(args, session).await,
            "report-leaked" => leaks::report(args, session).await,
            "session end" => logout::end(args, session).await,
            "token create" => tokens::create(args, session).await,
            "token list" => listing::list(args, session).await,
            "token get" => tokens::get(args, session).await,
            "token update" => update::update(args, session).await,
            "token activate" => tokens::activate(args, session).await,
            "token deactivate" => tokens::deactivate(args, session).await,
            "token regenerate" => tokens::regenerate(args, session).await,
            "token revoke" => tokens::revoke(args, session).await,
            "token delete" => tokens::delete(args, session).await,
            "token revoke-principal" => tokens::revoke_principal(args, session).await,
            "workspace create" => workspaces::create(args, session).await,
            "workspace list" => workspaces::list(args, session).await,
            "workspace get" => workspaces::get(args, session).await,
            "workspace update" => workspaces::update(args, session).await,
            "workspace suspend" => workspaces::suspend(args, session).await,
            "workspace resume" => workspaces::resume(args, session).await,
            "workspace delete" => workspaces::delete(args, session).await,
            "workspace export" => workspaces::export(args, session).await,
            "workspace import" => workspaces::import(args, session).await,
            "principal upsert" => principals::upsert(args, session).await,
            "principal list" => principals::list(args, session).await,
            "principal get" => principals::get(args, session).await,
            "principal suspend" => principals::suspend(args, session).await,
            "principal resume" => principals::resume(args, session).await,
            "principal delete" => principals::delete(args, session).await,
            "faults" | "faults list" => faults::list(args, session).await,
            "faults acknowledge" => faults::acknowledge(args, session).await,
            "notices list" => notices::list(args, session).await,
            "notices retry" => notices::retry(args, session).await,
            "notices test" => notices::test(args, session).await,
            "notices rotate-secret" => notices::rotate_secret(args, session).await,
            "replica list" => replicas::list(args, session).await,
            "replica release" => replicas::release(args, session).await,
            "audit list" => audit::list_events(args, session).await,
            "audit export" => audit::export(args, session).await,
            _ => Err(Failure::usage(format!("there is no command {path}"))),
        }
    })
}

#[cfg(test)]
mod rehearsal;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const TOKEN: &str = "prod_0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQR";

    /// Runs a client command; answers its exit code, standard output and standard error.
    pub(super) fn run_client(arguments: &[&str], env: &[(&str, &str)], input: &str) -> (Exit, String, String) {
        let matches = root().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
        let (path, args) = leaf(&matches);
        let env: BTreeMap<_, _> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (mut input, mut out, mut err) = (input.as_bytes(), Vec::new(), Vec::new());
        let format = Format::read(args, &env).expect("a format");
        let now = "2027-04-11T09:30:00Z".parse().expect("an instant");
        let mut session = Session { env, now, format, input: &mut input, interactive: false, out: &mut out, err: &mut err };
        let exit = block_on(&path, args, &mut session).unwrap_or_else(|failure| {
            failure.print(format, session.err);
            failure.exit()
        });
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (exit, text(out), text(err))
    }

    #[test]
    fn the_commands_are_well_formed() {
        root().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &mut Command) {
            let help = [command.render_help().to_string(), command.render_long_help().to_string()];
            let is_leaf = command.get_subcommands().next().is_none();
            assert!(!is_leaf || help.iter().all(|help| help.contains("Examples:\n  ")), "{help:?}");
            command.get_subcommands_mut().for_each(check);
        }
        check(&mut root().disable_help_subcommand(true));
    }

    #[test]
    fn a_misplaced_token_is_not_echoed() {
        for arguments in
            [&["whoami", TOKEN][..], &["validate", "-", TOKEN], &["token", "list", "--limit", TOKEN], &["faults", TOKEN], &[TOKEN]]
        {
            let error = root().no_binary_name(true).try_get_matches_from(arguments).expect_err("wrong");
            let shown = mask(&error.to_string());
            assert!(error.to_string().contains(TOKEN) && !shown.contains(TOKEN), "{shown}");
            assert!(shown.contains("prod_0ab…"), "{shown}");
        }
        assert_eq!(mask("short_words stay, ünïcode too\n"), "short_words stay, ünïcode too\n");
    }

    #[test]
    fn an_option_that_would_not_be_seen_is_a_mistake() {
        for (arguments, expected) in [
            (&["faults", "--workspace", "acme", "list"][..], Some("workspace")),
            (&["faults", "--all", "acknowledge", "flt_1"], Some("all")),
            (&["faults", "--address", "h:1", "list", "--workspace", "acme"], None),
            (&["faults", "--workspace", "acme", "--all"], None),
            (&["token", "--output", "json", "get", "tok_1"], None),
            (&["workspace", "update", "--allow-never", "true"], None),
        ] {
            let matches = root().no_binary_name(true).try_get_matches_from(arguments).expect("well formed");
            assert_eq!(given_in_vain(&matches).as_deref(), expected, "{arguments:?}");
        }
    }

    #[test]
    fn a_server_that_is_not_there_cannot_be_reached() {
        // Port 1 of this machine: nobody listens there.
        let (exit, out, err) = run_client(&["whoami", "--address", "127.0.0.1:1"], &[("KEYWARD_TOKEN", TOKEN)], "");
        assert_eq!((exit, out.as_str()), (Exit::Unreachable, ""));
        assert!(err.starts_with("keyward: http://127.0.0.1:1 cannot be reached: "), "{err}");
        let env = [("KEYWARD_ADDRESS", "127.0.0.1:1"), ("KEYWARD_OUTPUT", "json")];
        let (exit, _, err) = run_client(&["health"], &env, "");
        let object: serde_json::Value = serde_json::from_str(&err).expect("JSON");
        assert_eq!((exit, object["code"].as_str()), (Exit::Unreachable, Some("UNAVAILABLE")));
    }

    #[test]
    fn mistakes_are_found_before_anybody_is_asked() {
        let token = [("KEYWARD_TOKEN", TOKEN)];
        for (arguments, env, input, expected) in [
            (&["whoami"][..], &[][..], "", "this needs your own token"),
            (&["whoami", "--token", "-"], &[], "", "standard input holds no token"),
            (&["validate", "--token", "-"], &[], TOKEN, "standard input can hold one token only"),
            (&["validate", "-"], &[("KEYWARD_TOKEN", "-")], TOKEN, "standard input can hold one token only"),
            (&["validate"], &token, "\n", "standard input holds no token"),
            (&["whoami", "--address", "https://a/b"], &token, "", "the address must be"),
            (&["whoami", "--ca-file", "/nowhere"], &token, "", "cannot be read"),
            (&["token", "create", "--name", "ci", "--expires", "2027-04-11"], &token, "", "2027-04-11 is not later than today"),
            (&["token", "update", "tok_1", "--expires", "0d"], &token, "", "a token must live for some time"),
            (&["token", "list", "--expires-before", "never"], &token, "", "never is not an instant"),
            (&["token", "create", "--self"], &token, "", "--name is missing"),
            (&["token", "create", "--self", "--name", "a", "--session-id", "s"], &token, "", "--session-id is for a temporary token"),
            (&["token", "create", "--self", "--temporary", "--cidr", "10.0.0.1"], &token, "", "--cidr is not for"),
            (&["token", "create", "--self", "--temporary", "--expires", "never"], &token, "", "lives for a span"),
            (&["token", "create", "--self", "--kind", "temporary", "--expires", "2027-04-12"], &token, "", "lives for a span"),
            (&["workspace", "import", "acme", "/nowhere.toml"], &token, "", "/nowhere.toml cannot be read"),
            (&["workspace", "import", "-"], &token, "policy = 1", "policy: must be a table"),
            (&["workspace", "import", "-"], &token, TOKEN, "standard input is not TOML: line 1"),
            (&["workspace", "import", "-"], &[("KEYWARD_TOKEN", "-")], TOKEN, "standard input can hold your token or the file"),
            (&["workspace", "import", "--create", "--prefix", "acm", "acme", "-"], &token, "resources = []", "lacks display_name"),
            (&["workspace", "update", "--default-ttl", "1d"], &[], "", "this needs your own token"),
            (&["audit", "export", "--since", "never"], &token, "", "--since: never is not an instant"),
            (&["report-leaked"], &token, "\n", "there is nothing to report"),
            (&["faults"], &[], "", "this needs your own token"),
            (&["notices", "rotate-secret"], &[], "", "this needs your own token"),
            (&["workspace", "import", "-"], &token, "[notices]\nevents = [\"x\"]", "notices.events[0]: must be one of created"),
        ] {
            let (exit, out, err) = run_client(arguments, env, input);
            assert!(exit == Exit::Usage && out.is_empty() && err.contains(expected), "{arguments:?}: {exit:?} {err}");
            assert!(!err.contains(TOKEN));
        }
    }

    #[test]
    fn an_environment_that_makes_no_sense_is_a_mistake() {
        let matches = root().no_binary_name(true).try_get_matches_from(["whoami"]).expect("well formed");
        let env = BTreeMap::from([("KEYWARD_OUTPUT".to_owned(), "yaml".to_owned())]);
        assert_eq!(Format::read(leaf(&matches).1, &env).expect_err("no such format").exit(), Exit::Usage);
    }
}
