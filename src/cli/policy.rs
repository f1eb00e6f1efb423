//! What may be created in a workspace, as flags.
//!
//! A setting has one name everywhere: `default_ttl` in a message, a file and an update mask is `--default-ttl` here.

use std::time::Duration;

use clap::{Arg, ArgMatches, value_parser};

use super::{arguments::option, expiry, failure::Failure};
use crate::proto::Policy;

/// The settings of a policy, by their names in the proto files.
pub(super) const KEYS: [&str; 7] = [
    "default_ttl",
    "max_permanent_ttl",
    "max_temporary_ttl",
    "allow_never",
    "permanent_requires_admin",
    "principals_on_first_use",
    "max_tokens_per_principal",
];

pub(super) const TOKENS_MAX: i64 = 100_000;

pub(super) fn args() -> [Arg; 7] {
    [
        option("default-ttl", "SPAN", "The life of a permanent token whose creator names none, such as 90d").value_parser(ttl),
        option("max-permanent-ttl", "SPAN", "The longest life of a permanent token, such as 365d").value_parser(ttl),
        option("max-temporary-ttl", "SPAN", "The longest life of a temporary token, such as 24h").value_parser(ttl),
        truth("allow-never", "Whether a permanent token may never end"),
        truth("permanent-requires-admin", "Whether only administrators create permanent tokens"),
        truth("principals-on-first-use", "Whether a token for an unknown principal makes that principal"),
        option("max-tokens-per-principal", "COUNT", "How many live tokens of each kind a principal has at most, such as 100")
            .value_parser(value_parser!(i32).range(1..=TOKENS_MAX)),
    ]
    .map(|arg| arg.help_heading("Policy"))
}

pub(super) fn truth(name: &'static str, help: &'static str) -> Arg {
    option(name, "BOOL", help).value_parser(value_parser!(bool))
}

/// How long a token may live: some time.
///
/// # Errors
/// A sentence that shows how to write it.
pub(super) fn ttl(text: &str) -> Result<Duration, String> {
    match expiry::span(text)? {
        Duration::ZERO => Err("it must be at least 1s".to_owned()),
        span => Ok(span),
    }
}

/// The policy with what was given.
pub(super) fn policy(args: &ArgMatches) -> Result<Policy, Failure> {
    let span = |name| args.get_one::<Duration>(name).copied().map(expiry::span_to_wire).transpose();
    let truth = |name| args.get_one::<bool>(name).copied();
    Ok(Policy {
        default_ttl: span("default-ttl")?,
        max_permanent_ttl: span("max-permanent-ttl")?,
        max_temporary_ttl: span("max-temporary-ttl")?,
        allow_never: truth("allow-never").unwrap_or_default(),
        permanent_requires_admin: truth("permanent-requires-admin").unwrap_or_default(),
        principals_on_first_use: truth("principals-on-first-use"),
        max_tokens_per_principal: args.get_one("max-tokens-per-principal").copied().unwrap_or_default(),
    })
}

/// The fields of the update mask for what was given.
pub(super) fn paths(args: &ArgMatches) -> Vec<String> {
    let given = KEYS.iter().filter(|key| args.contains_id(&key.replace('_', "-")));
    given.map(|key| format!("policy.{key}")).collect()
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        Command::new("test").no_binary_name(true).args(args()).try_get_matches_from(arguments)
    }

    #[test]
    fn every_setting_is_a_flag_and_a_path() {
        for key in KEYS {
            let flag = format!("--{}", key.replace('_', "-"));
            let value = match key {
                key if key.ends_with("_ttl") => "90d",
                "max_tokens_per_principal" => "7",
                _ => "true",
            };
            let args = parse(&[&flag, value]).expect("well formed");
            assert_eq!(paths(&args), [format!("policy.{key}")]);
            assert_ne!(policy(&args).expect("a policy"), Policy::default(), "{key}");
        }
        let none = parse(&[]).expect("well formed");
        assert_eq!((paths(&none), policy(&none).expect("a policy")), (Vec::new(), Policy::default()));
    }

    #[test]
    fn values_that_make_no_sense_are_mistakes() {
        for arguments in [
            ["--default-ttl", "90"],
            ["--default-ttl", "0d"],
            ["--allow-never", "yes"],
            ["--max-tokens-per-principal", "0"],
            ["--max-tokens-per-principal", "1000001"],
        ] {
            assert_eq!(parse(&arguments).expect_err("wrong").exit_code(), 2, "{arguments:?}");
        }
    }
}
