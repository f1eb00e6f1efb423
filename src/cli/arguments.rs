//! Shorthand for declaring options and for reading what was given.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Command};

/// A command with its purpose and examples; every command has some.
pub(super) fn command(name: &'static str, about: &'static str, examples: &str) -> Command {
    Command::new(name).about(about).after_help(format!("Examples:\n{examples}"))
}

/// `--name VALUE`
pub(super) fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

/// `--name VALUE`, as often as wanted, or several values with commas between them.
pub(super) fn list(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    option(name, value, help).action(ArgAction::Append).value_delimiter(',')
}

/// `--name`
pub(super) fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// `--metadata KEY=VALUE`, as often as wanted.
pub(super) fn metadata(help: &'static str) -> Arg {
    option("metadata", "KEY=VALUE", help).action(ArgAction::Append).value_parser(pair)
}

fn pair(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, such as team=payments"),
    }
}

/// `--workspace ID`
pub(super) fn workspace() -> Arg {
    option("workspace", "ID", "In this workspace [default: yours]")
}

/// The text that was given; empty, which on the wire means "not said", if none was.
pub(super) fn text(args: &ArgMatches, name: &str) -> String {
    args.get_one::<String>(name).cloned().unwrap_or_default()
}

/// The texts that were given.
pub(super) fn texts(args: &ArgMatches, name: &str) -> Vec<String> {
    args.get_many::<String>(name).into_iter().flatten().cloned().collect()
}

/// The metadata that were given.
pub(super) fn pairs(args: &ArgMatches) -> BTreeMap<String, String> {
    args.get_many::<(String, String)>("metadata").into_iter().flatten().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_are_split_at_the_first_equals_sign() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(pair("a="), Ok(("a".to_owned(), String::new())));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
