//! The settings of the server as flags, made from `config`'s own list.
//!
//! Invariant: every setting is a flag (test `every_setting_is_a_flag`).

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, value_parser};

use crate::config::{self, Config, SETTINGS, Setting, Sources};

/// A flag for every setting, and `--config`.
pub(super) fn args() -> Vec<Arg> {
    let file = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("The settings file (TOML) [default: keyward.toml, if it is there] [env: KEYWARD_CONFIG]");
    std::iter::once(file).chain(SETTINGS.iter().map(flag)).collect()
}

fn flag(setting: &'static Setting) -> Arg {
    let arg = Arg::new(setting.name).long(setting.name.replace('_', "-")).help(help(setting));
    if setting.value.is_empty() { arg.action(ArgAction::SetTrue) } else { arg.value_name(setting.value) }
}

fn help(setting: &Setting) -> String {
    let default = if setting.default.is_empty() { String::new() } else { format!(" [default: {}]", setting.default) };
    let file = if setting.secret { format!(" or {setting}_FILE") } else { String::new() };
    format!("{}{default} [env: {setting}{file}]", setting.help)
}

/// Reads and checks the settings from flags, environment and file.
///
/// # Errors
/// A sentence for every mistake.
pub(super) fn load(args: &ArgMatches) -> Result<Config, Vec<String>> {
    Config::load(&Sources { flags: flags(args), env: config::environment(), file: args.get_one::<PathBuf>("config").cloned() })
}

fn flags(args: &ArgMatches) -> BTreeMap<&'static str, String> {
    SETTINGS.iter().filter_map(|setting| Some((setting.name, given(args, setting)?))).collect()
}

fn given(args: &ArgMatches, setting: &Setting) -> Option<String> {
    if setting.value.is_empty() {
        args.get_flag(setting.name).then(|| true.to_string())
    } else {
        args.get_one::<String>(setting.name).cloned()
    }
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn parse(arguments: &[&str]) -> ArgMatches {
        Command::new("serve").no_binary_name(true).args(args()).try_get_matches_from(arguments).expect("well formed")
    }

    #[test]
    fn every_setting_is_a_flag() {
        for setting in &SETTINGS {
            let flag = format!("--{}", setting.name.replace('_', "-"));
            let given = if setting.value.is_empty() { flags(&parse(&[&flag])) } else { flags(&parse(&[&flag, "x"])) };
            let expected = if setting.value.is_empty() { "true" } else { "x" };
            assert_eq!(given, BTreeMap::from([(setting.name, expected.to_owned())]));
        }
        assert!(flags(&parse(&[])).is_empty());
    }

    #[test]
    fn the_help_names_default_and_variable() {
        let listen = SETTINGS.iter().find(|setting| setting.name == "listen").expect("a setting");
        assert!(help(listen).ends_with(" [default: 127.0.0.1:50051] [env: KEYWARD_LISTEN]"), "{}", help(listen));
    }
}
