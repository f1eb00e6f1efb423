//! What a notice is: what a workspace wants to be told, which step a token has reached, and what is told of it. Pure.
//!
//! Invariant: of several steps that a token has reached, the nearest to its end is told, and none that was told before or is farther away (test
//! `the_nearest_step_counts`).

use std::time::Duration;

use serde_json::{Value, json};

use crate::{ambient::Time, grant::Token, token::TokenId};

const DAY: Duration = Duration::from_hours(24);

/// What is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Event {
    /// A token reached a step before its end.
    Expiring,
    /// A token has expired.
    Expired,
    /// A token was created.
    Created,
    /// A token was given a new secret.
    Regenerated,
    /// A token was revoked or deleted by somebody else than its own principal.
    Revoked,
    /// A token was reported as leaked, which ended it.
    Leaked,
    /// Nothing happened: it is a test.
    Test,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Expiring, Self::Expired, Self::Created, Self::Regenerated, Self::Revoked, Self::Leaked, Self::Test];

    /// Its name, in webhook calls and in the store.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Expiring => "token.expiring",
            Self::Expired => "token.expired",
            Self::Created => "token.created",
            Self::Regenerated => "token.regenerated",
            Self::Revoked => "token.revoked",
            Self::Leaked => "token.leaked",
            Self::Test => "test",
        }
    }

    /// The one with that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.name() == name)
    }

    /// Whether a workspace may choose not to be told.
    #[must_use]
    pub fn is_optional(self) -> bool {
        matches!(self, Self::Created | Self::Regenerated | Self::Revoked | Self::Leaked)
    }
}

/// How it is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Channel {
    /// By mail.
    Mail,
    /// By a call of the workspace's webhook.
    Webhook,
}

impl Channel {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Mail, Self::Webhook];

    /// Its name, in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mail => "mail",
            Self::Webhook => "webhook",
        }
    }
}

/// What a workspace wants to be told, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wishes {
    /// Steps, in days before the end, from the farthest to the nearest; 0 is the end itself.
    pub days_before: Vec<u16>,
    /// Whether steps raise faults.
    pub raise_faults: bool,
    /// Who gets mails.
    pub emails: Vec<String>,
    /// Whether owners get mails about their tokens.
    pub mail_owner: bool,
    /// Where calls go; empty: nowhere.
    pub webhook_url: String,
    /// What else is told.
    pub events: Vec<Event>,
    /// Where people get a new token; may be empty.
    pub renew_url: String,
    /// Since when anything is told: what expired before is left alone.
    pub since: Time,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            days_before: vec![30, 14, 7, 1, 0],
            raise_faults: false,
            emails: Vec::new(),
            mail_owner: false,
            webhook_url: String::new(),
            events: Vec::new(),
            renew_url: String::new(),
            since: Time::from_micros(0),
        }
    }
}

impl Wishes {
    /// Whether anybody is told anything.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.raise_faults || self.mail_owner || !self.emails.is_empty() || !self.webhook_url.is_empty()
    }

    /// The ways on which steps are told, as the store knows them: 1 to the addresses, 2 to the owner, 4 to the webhook.
    #[must_use]
    pub fn ways(&self) -> i32 {
        i32::from(!self.emails.is_empty()) | i32::from(self.mail_owner) << 1 | i32::from(!self.webhook_url.is_empty()) << 2
    }

    /// These wishes on some of the ways only.
    #[must_use]
    pub fn on(&self, ways: i32) -> Self {
        let mut wishes = self.clone();
        if ways & 1 == 0 {
            wishes.emails.clear();
        }
        wishes.mail_owner &= ways & 2 != 0;
        if ways & 4 == 0 {
            wishes.webhook_url.clear();
        }
        wishes
    }

    /// The step that a token with this end has reached: the nearest of those that it has.
    #[must_use]
    pub fn step(&self, expire_time: Time, now: Time) -> Option<u16> {
        self.days_before.iter().copied().filter(|days| now >= step_time(expire_time, *days)).min()
    }

    /// Ends that lie before this instant have reached a step, or will not have for this call.
    #[must_use]
    pub fn horizon(&self, now: Time) -> Time {
        now + DAY * u32::from(self.days_before.iter().copied().max().unwrap_or(0))
    }

    /// What the audit keeps of them, and what tells whether a change changes anything.
    #[must_use]
    pub fn settings(&self) -> Value {
        json!({
            "days_before": self.days_before,
            "raise_faults": self.raise_faults,
            "emails": self.emails.join("; "),
            "mail_owner": self.mail_owner,
            "webhook_url": self.webhook_url,
            "events": self.events.iter().map(|event| event.name()).collect::<Vec<_>>(),
            "renew_url": self.renew_url,
        })
    }
}

/// When a token with this end reaches a step: days are of 24 hours, whatever the calendar says.
#[must_use]
pub fn step_time(expire_time: Time, days_before: u16) -> Time {
    expire_time - DAY * u32::from(days_before)
}

/// A token as notices show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// The token.
    pub token_id: TokenId,
    /// Its name.
    pub display_name: String,
    /// The first characters of its text.
    pub hint: String,
    /// Whose it is.
    pub principal: String,
    /// Their name.
    pub principal_name: String,
    /// The products that it is for.
    pub audiences: Vec<String>,
    /// When it was made.
    pub create_time: Time,
    /// When it ends; may be never.
    pub expire_time: Time,
    /// When it was last used.
    pub last_used_time: Option<Time>,
    /// The step that it has reached, if the notice is about one.
    pub days_before: Option<u16>,
}

impl Item {
    /// What is told of this token.
    #[must_use]
    pub fn of(token: &Token, principal_name: &str) -> Self {
        Self {
            token_id: token.id,
            display_name: token.display_name.clone(),
            hint: token.hint.clone(),
            principal: token.principal.clone(),
            principal_name: principal_name.to_owned(),
            audiences: token.audiences.clone(),
            create_time: token.create_time,
            expire_time: token.expire_time,
            last_used_time: token.last_used_time,
            days_before: None,
        }
    }
}

/// One mail, or one call of a webhook.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// The same at every attempt.
    pub id: String,
    /// The workspace.
    pub workspace: String,
    /// What it is about.
    pub event: Event,
    /// How it goes out.
    pub channel: Channel,
    /// The mail address; empty: the workspace's webhook.
    pub recipient: String,
    /// Whether it goes to the owner of the tokens.
    pub to_owner: bool,
    /// The tokens that it is about: one in a call, one or more in a mail, none in a test.
    pub items: Vec<Item>,
    /// How many more there are.
    pub unnamed: usize,
    /// Who did it, if somebody did: a principal; empty: nobody said who they are.
    pub actor: String,
    /// The reason that they gave; may be empty.
    pub reason: String,
    /// When it was made.
    pub create_time: Time,
}

/// What a notice needs to know of its workspace when it goes out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Brand {
    /// The workspace's name for people.
    pub display_name: String,
    /// Where people get a new token; may be empty.
    pub renew_url: String,
}

/// What became of an attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The receiver has it.
    Delivered,
    /// The receiver answered, and does not take this one.
    Refused {
        /// Why, in words that the administrator of the workspace may read.
        error: String,
        /// Whether there is no use in trying again.
        is_final: bool,
    },
    /// The receiver does not answer as it should: others will fare no better at present.
    Unreachable {
        /// Why.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time::from_micros(1_800_000_000_000_000);

    #[test]
    fn the_nearest_step_counts() {
        let wishes = Wishes::default();
        assert_eq!(wishes.step(NOW + 31 * DAY, NOW), None);
        assert_eq!(wishes.step(NOW + 30 * DAY, NOW), Some(30));
        assert_eq!(wishes.step(NOW + 30 * DAY + Duration::from_micros(1), NOW), None);
        assert_eq!(wishes.step(NOW + 10 * DAY, NOW), Some(14));
        assert_eq!(wishes.step(NOW + Duration::from_micros(1), NOW), Some(1));
        assert_eq!(wishes.step(NOW, NOW), Some(0));
        assert_eq!(Wishes { days_before: vec![7], ..wishes }.step(NOW - DAY, NOW), Some(7));
        assert_eq!(Wishes::default().step(Time::NEVER, NOW), None);
    }

    #[test]
    fn names_lead_back_to_their_events() {
        for event in Event::ALL {
            assert_eq!(Event::of(event.name()), Some(event));
        }
        assert_eq!(Event::of("token.stolen"), None);
    }
}
