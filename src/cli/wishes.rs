//! What is told about the tokens of a workspace, and where, as flags.
//!
//! Invariant: what `keyward workspace get` and a settings file say of days and events is what the flags take (test
//! `days_and_events_have_one_spelling`).

use clap::{Arg, ArgMatches};

use super::{
    arguments::{option, text},
    mask,
    policy::truth,
    session::Session,
    table::escape,
};
use crate::proto::{NoticeEvent, Notices, Workspace};

/// The settings of notices by their names in the proto files, and the flag of each.
pub(super) const KEYS: [(&str, &str); 7] = [
    ("days_before", "notice-days"),
    ("raise_faults", "raise-faults"),
    ("emails", "notice-emails"),
    ("mail_owner", "mail-owner"),
    ("webhook_url", "webhook-url"),
    ("events", "notice-events"),
    ("renew_url", "renew-url"),
];

/// What is told besides a token's end, as people write it.
pub(super) const EVENTS: [(&str, NoticeEvent); 4] = [
    ("created", NoticeEvent::TokenCreated),
    ("regenerated", NoticeEvent::TokenRegenerated),
    ("revoked", NoticeEvent::TokenRevoked),
    ("leaked", NoticeEvent::TokenLeaked),
];

/// The last step, which on the wire is 0 days.
pub(super) const EXPIRED: &str = "expired";

pub(super) const DAYS_MAX: i32 = 3_650;

pub(super) fn args() -> [Arg; 7] {
    [
        option("notice-days", "DAYS", "How many days before its end a token is told of, such as 30,14,7,1,expired; default: those")
            .value_parser(days),
        truth("raise-faults", "Whether that shows in `keyward faults`"),
        option("notice-emails", "TEXT", "Mail addresses that are told, such as 'ops@example.org; ann@example.org'; '' clears them"),
        truth("mail-owner", "Whether the owner of a token is told by mail as well"),
        option("webhook-url", "URL", "Where notices are posted as JSON, such as https://hooks.example.org/keyward; '' clears it"),
        option("notice-events", "EVENTS", "What else is told: some of created,regenerated,revoked,leaked; none clears them")
            .value_parser(events),
        option("renew-url", "URL", "Where people get a new token, which notices point to; '' clears it"),
    ]
    .map(|arg| arg.help_heading("Notices"))
}

/// Steps before the end, with commas between them. None, which on the wire means the default, for `default`.
fn days(text: &str) -> Result<Vec<i32>, String> {
    let rule = |part: &str| {
        let part = mask(part);
        format!("'{part}' is no number of days from 0 to {DAYS_MAX}: write some with commas between them, such as 30,14,7,1,expired")
    };
    if text.trim() == "default" {
        return Ok(Vec::new());
    }
    text.split(',').map(|part| day(part.trim()).ok_or_else(|| rule(part))).collect()
}

fn day(text: &str) -> Option<i32> {
    if text == EXPIRED {
        return Some(0);
    }
    text.parse().ok().filter(|days| (0..=DAYS_MAX).contains(days))
}

/// Events, with commas between them, or `none`.
fn events(text: &str) -> Result<Vec<i32>, String> {
    let rule = |part: &str| format!("'{}' is no event: write some of {} with commas between them, or none", mask(part), event_names());
    if text.trim() == "none" {
        return Ok(Vec::new());
    }
    text.split(',').map(|part| event(part.trim()).map(i32::from).ok_or_else(|| rule(part))).collect()
}

/// The event of that name.
pub(super) fn event(text: &str) -> Option<NoticeEvent> {
    EVENTS.iter().find(|(name, _)| *name == text).map(|(_, event)| *event)
}

/// The name of an event; none if it is not one that can be asked for.
pub(super) fn event_name(event: i32) -> Option<&'static str> {
    EVENTS.iter().find(|(_, known)| i32::from(*known) == event).map(|(name, _)| *name)
}

/// `created, regenerated, …`
pub(super) fn event_names() -> String {
    EVENTS.map(|(name, _)| name).join(", ")
}

/// A step as the flag and the file have it.
pub(super) fn day_text(days: i32) -> String {
    if days == 0 { EXPIRED.to_owned() } else { days.to_string() }
}

/// What was given; nothing if no flag was.
pub(super) fn notices(args: &ArgMatches) -> Option<Notices> {
    let truth = |name| args.get_one::<bool>(name).copied().unwrap_or_default();
    let numbers = |name| args.get_one::<Vec<i32>>(name).cloned().unwrap_or_default();
    (!paths(args).is_empty()).then(|| Notices {
        days_before: numbers("notice-days"),
        raise_faults: truth("raise-faults"),
        emails: text(args, "notice-emails"),
        mail_owner: truth("mail-owner"),
        webhook_url: text(args, "webhook-url"),
        events: numbers("notice-events"),
        renew_url: text(args, "renew-url"),
    })
}

/// The fields of the update mask for what was given.
pub(super) fn paths(args: &ArgMatches) -> Vec<String> {
    KEYS.iter().filter(|(_, flag)| args.contains_id(flag)).map(|(key, _)| format!("notices.{key}")).collect()
}

/// What has to be done next if a webhook was set: whoever receives its calls needs the secret that they are signed with.
pub(super) fn hint(session: &mut Session<'_>, set: &Workspace) {
    if set.notices.as_ref().is_none_or(|notices| notices.webhook_url.is_empty()) {
        return;
    }
    let named = if set.id.is_empty() { String::new() } else { format!(" --workspace {}", escape(&mask(&set.id))) };
    session.remark(&format!(
        "Calls of the webhook are signed. `keyward notices rotate-secret{named}` shows the secret that its receiver needs, \
         `keyward notices test{named}` tries it."
    ));
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<ArgMatches, clap::Error> {
        Command::new("test").no_binary_name(true).args(args()).try_get_matches_from(arguments)
    }

    fn given(arguments: &[&str]) -> Notices {
        notices(&parse(arguments).expect("well formed")).expect("something")
    }

    #[test]
    fn every_wish_is_a_flag_and_a_path() {
        for (key, flag) in KEYS {
            let value = match key {
                "days_before" => "7,expired",
                "raise_faults" | "mail_owner" => "true",
                "events" => "leaked",
                _ => "https://example.org",
            };
            let args = parse(&[&format!("--{flag}"), value]).expect("well formed");
            assert_eq!(paths(&args), [format!("notices.{key}")]);
            assert_ne!(notices(&args), Some(Notices::default()), "{key}");
        }
        let none = parse(&[]).expect("well formed");
        assert_eq!((paths(&none), notices(&none)), (Vec::new(), None));
    }

    #[test]
    fn what_clears_a_wish_names_it_all_the_same() {
        for (flag, value) in [
            ("--webhook-url", ""),
            ("--notice-emails", ""),
            ("--renew-url", ""),
            ("--notice-events", "none"),
            ("--notice-days", "default"),
            ("--raise-faults", "false"),
        ] {
            assert_eq!(given(&[flag, value]), Notices::default(), "{flag}");
        }
    }

    #[test]
    fn days_and_events_have_one_spelling() {
        assert_eq!(given(&["--notice-days", "30, 14,7,1,expired"]).days_before, [30, 14, 7, 1, 0]);
        assert_eq!(
            given(&["--notice-days", "0,3650"]).days_before.iter().map(|days| day_text(*days)).collect::<Vec<_>>(),
            ["expired", "3650"]
        );
        let all = given(&["--notice-events", "created,regenerated, revoked,leaked"]).events;
        assert_eq!(all, [3, 4, 5, 6]);
        assert_eq!(all.iter().filter_map(|event| event_name(*event)).collect::<Vec<_>>().join(", "), event_names());
        assert!(event_name(i32::from(NoticeEvent::Test)).is_none() && event("test").is_none());
    }

    #[test]
    fn wishes_that_make_no_sense_are_mistakes() {
        for (flag, value, expected) in [
            ("--notice-days", "soon", "'soon' is no number of days from 0 to 3650"),
            ("--notice-days", "7,,1", "'' is no number of days"),
            ("--notice-days", "", "'' is no number of days"),
            ("--notice-days", "3651", "such as 30,14,7,1,expired"),
            ("--notice-events", "created,expired", "'expired' is no event: write some of created, regenerated, revoked, leaked"),
            ("--notice-events", "", "or none"),
            ("--raise-faults", "yes", "true, false"),
        ] {
            let error = parse(&[flag, value]).expect_err("wrong");
            let shown = error.to_string();
            assert!(error.exit_code() == 2 && shown.contains(flag) && shown.contains(expected), "{shown}");
        }
    }
}
