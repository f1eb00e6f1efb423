//! The table `[notices]` in a settings file: what is told about tokens, and where.
//!
//! Invariant: notices that were written say the same when they are read (test `notices_that_were_written_are_read`).

use std::fmt::Write as _;

use toml::{Table, Value};

use super::{Reader, quoted};
use crate::{
    cli::wishes::{self, DAYS_MAX, EXPIRED},
    proto::Notices,
};

impl Reader {
    pub(super) fn notices(&mut self, table: &Table) {
        self.known("notices.", table, &wishes::KEYS.map(|(key, _)| key));
        let mut notices = Notices::default();
        for (key, _) in wishes::KEYS {
            let Some(value) = table.get(key) else { continue };
            let field = format!("notices.{key}");
            match key {
                "days_before" => notices.days_before = self.days(&field, value),
                "raise_faults" => notices.raise_faults = self.truth(&field, value).unwrap_or_default(),
                "emails" => notices.emails = self.emails(&field, value).unwrap_or_default(),
                "mail_owner" => notices.mail_owner = self.truth(&field, value).unwrap_or_default(),
                "webhook_url" => notices.webhook_url = self.text(&field, value).unwrap_or_default(),
                "events" => notices.events = self.events(&field, value),
                _ => notices.renew_url = self.text(&field, value).unwrap_or_default(),
            }
            self.sheet.paths.push(field);
        }
        self.sheet.workspace.notices = Some(notices);
    }

    fn days(&mut self, field: &str, value: &Value) -> Vec<i32> {
        let rule = format!("must be a number from 0 to {DAYS_MAX}, without quotes, or \"{EXPIRED}\"");
        let day = |value: &Value| match value.as_str() {
            Some(text) => (text == EXPIRED).then_some(0),
            None => value.as_integer().and_then(|days| i32::try_from(days).ok()).filter(|days| (0..=DAYS_MAX).contains(days)),
        };
        self.each(field, value, "such as [30, 14, 7, 1, \"expired\"]", |value| day(value).ok_or_else(|| rule.clone()))
    }

    fn events(&mut self, field: &str, value: &Value) -> Vec<i32> {
        let rule = || format!("must be one of {}, in quotes", wishes::event_names());
        let event = |value: &Value| value.as_str().and_then(wishes::event).map(i32::from).ok_or_else(rule);
        self.each(field, value, "such as [\"created\", \"leaked\"]", event)
    }

    /// The numbers that the values of a list stand for.
    fn each(&mut self, field: &str, value: &Value, example: &str, number: impl Fn(&Value) -> Result<i32, String>) -> Vec<i32> {
        let Some(values) = value.as_array() else {
            self.mistakes.add(field, format!("must be a list, {example}"));
            return Vec::new();
        };
        let values = values.iter().enumerate();
        values.filter_map(|(index, value)| self.mistakes.take(&format!("{field}[{index}]"), number(value))).collect()
    }

    fn emails(&mut self, field: &str, value: &Value) -> Option<String> {
        let rule = "must be one text in quotes, with semicolons between the addresses, such as \"ops@example.org; ann@example.org\"";
        self.mistakes.take(field, value.as_str().map(str::to_owned).ok_or(rule))
    }
}

/// Writes every key, so that a workspace that takes the file over ends with the same notices. Writing to a String cannot fail.
pub(super) fn write(notices: &Notices, text: &mut String) {
    let Notices { days_before, raise_faults, emails, mail_owner, webhook_url, events, renew_url } = notices;
    let days = days_before.iter().map(|days| if *days == 0 { quoted(EXPIRED) } else { days.to_string() });
    let names = events.iter().filter_map(|event| wishes::event_name(*event)).map(quoted);
    let (days, names) = (days.collect::<Vec<_>>().join(", "), names.collect::<Vec<_>>().join(", "));
    let _ = writeln!(text, "\n[notices]\ndays_before = [{days}]\nraise_faults = {raise_faults}\nemails = {}", quoted(emails));
    let _ = writeln!(text, "mail_owner = {mail_owner}\nwebhook_url = {}", quoted(webhook_url));
    for event in events.iter().filter(|event| wishes::event_name(**event).is_none()) {
        let _ = writeln!(text, "# the event {event} is left out: this version does not know it");
    }
    let _ = writeln!(text, "events = [{names}]\nrenew_url = {}", quoted(renew_url));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{
            session::Format,
            sheet::{read, write},
        },
        proto::Workspace,
    };

    fn workspace(notices: Notices) -> Workspace {
        Workspace { display_name: "Acme".to_owned(), notices: Some(notices), ..Workspace::default() }
    }

    #[test]
    fn notices_that_were_written_are_read() {
        let all = Notices {
            days_before: vec![30, 1, 0],
            raise_faults: true,
            emails: "ops@example.org; \"Ann\" <ann@example.org>;".to_owned(),
            mail_owner: true,
            webhook_url: "https://hooks.example.org/keyward?to=ops".to_owned(),
            events: vec![3, 4, 5, 6],
            renew_url: "https://example.org/\u{202e}new".to_owned(),
        };
        for notices in [all, Notices::default()] {
            let before = workspace(notices);
            let sheet = read("acme.toml", &write(&before)).expect("well formed");
            assert_eq!(sheet.workspace, before);
            let expected = wishes::KEYS.map(|(key, _)| format!("notices.{key}"));
            assert!(sheet.paths[1..].starts_with(&expected), "{:?}", sheet.paths);
        }
        let odd = write(&workspace(Notices { events: vec![6, 99], ..Notices::default() }));
        assert!(odd.contains("\n# the event 99 is left out") && odd.contains("\nevents = [\"leaked\"]\n"), "{odd}");
        let partly = read("acme.toml", "[notices]\ndays_before = [7, \"expired\"]").expect("well formed");
        assert_eq!(partly.paths, ["notices.days_before"]);
        assert_eq!(partly.workspace.notices, Some(Notices { days_before: vec![7, 0], ..Notices::default() }));
    }

    #[test]
    fn mistakes_in_notices_name_the_key_and_the_fix() {
        for (text, expected) in [
            ("notices = true", "notices: must be a table: [notices], and its settings in the lines below"),
            ("[notices]\nwebhook = \"\"", "notices.webhook: is not known here: take it out, or name one of days_before, raise_faults,"),
            ("[notices]\ndays_before = 7", "notices.days_before: must be a list, such as [30, 14, 7, 1, \"expired\"]"),
            (
                "[notices]\ndays_before = [7, \"1\"]",
                "notices.days_before[1]: must be a number from 0 to 3650, without quotes, or \"expired\"",
            ),
            ("[notices]\ndays_before = [-1]", "notices.days_before[0]: must be a number"),
            ("[notices]\nraise_faults = 1", "notices.raise_faults: must be true or false, without quotes"),
            ("[notices]\nemails = [\"a@x\"]", "notices.emails: must be one text in quotes, with semicolons between the addresses"),
            ("[notices]\nmail_owner = \"no\"", "notices.mail_owner: must be true or false"),
            ("[notices]\nwebhook_url = false", "notices.webhook_url: must be a text in quotes"),
            ("[notices]\nevents = \"leaked\"", "notices.events: must be a list, such as [\"created\", \"leaked\"]"),
            ("[notices]\nevents = [\"test\"]", "notices.events[0]: must be one of created, regenerated, revoked, leaked, in quotes"),
            ("[notices]\nrenew_url = 1", "notices.renew_url: must be a text in quotes"),
        ] {
            let mut err = Vec::new();
            read("bad.toml", text).expect_err(text).print(Format::Table, &mut err);
            let shown = String::from_utf8(err).expect("text");
            assert!(shown.contains(&format!("\n  {expected}")), "{expected} is not in\n{shown}");
        }
    }
}
