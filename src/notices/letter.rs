//! What a notice reads like: the subject and the two bodies of a mail, and the JSON of a webhook call. Pure.
//!
//! Invariant: a subject is one line of at most 120 characters (test `subjects_are_one_line_of_bounded_length`).

mod page;
mod payload;

use page::{Content, Row};
pub use payload::payload;

use super::words;
use crate::{
    ambient::Time,
    notice::{Brand, Event, Item, Notice},
};

const SUBJECT_CHARS_MAX: usize = 120;
const BRAND_CHARS_MAX: usize = 32;
const ACTOR_CHARS_MAX: usize = 24;
const NAME_CHARS_MIN: usize = 12;
const ITEMS_MAX: usize = 500;

/// A mail, ready to be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Letter {
    /// The id of its notice: the same at every attempt.
    pub id: String,
    /// The address that it goes to.
    pub to: String,
    /// The name before the sender's address: that of the workspace.
    pub sender_name: String,
    /// One line.
    pub subject: String,
    /// The body as plain text.
    pub text: String,
    /// The body as HTML, which refers to nothing outside.
    pub html: String,
    /// When it was written.
    pub time: Time,
}

/// Writes a mail. What was to be told before an end, and is told after it, is told as what it has become.
#[must_use]
pub fn letter(notice: &Notice, brand: &Brand, now: Time) -> Letter {
    let is_late = notice.event == Event::Expiring && notice.items.iter().all(|item| item.expire_time <= now);
    let notice = &Notice { event: if is_late { Event::Expired } else { notice.event }, ..notice.clone() };
    let content = content(notice, brand, now);
    let subject = subject(notice, brand, now);
    Letter {
        id: notice.id.clone(),
        to: notice.recipient.clone(),
        sender_name: words::line(&brand.display_name, SUBJECT_CHARS_MAX),
        text: content.text(),
        html: content.html(&subject),
        subject,
        time: now,
    }
}

fn content(notice: &Notice, brand: &Brand, now: Time) -> Content {
    let link = is_link(&brand.renew_url).then(|| brand.renew_url.clone()).filter(|_| notice.event != Event::Test);
    let (facts, rows) = match notice.items.as_slice() {
        [] => (vec![("Workspace", brand.display_name.clone())], Vec::new()),
        [item] => (facts(notice, item, brand, now), Vec::new()),
        items => (done_by(notice), rows(items, now)),
    };
    Content {
        headline: headline(notice, brand, now),
        facts,
        unlisted: notice.items.len().saturating_sub(ITEMS_MAX) + notice.unnamed,
        rows,
        advice: advice(notice, brand, link.is_some()),
        link,
        footer: footer(notice, brand),
    }
}

/// What a browser may be sent to.
fn is_link(url: &str) -> bool {
    url.starts_with("https://") && !url.chars().any(|letter| letter.is_whitespace() || letter.is_control())
}

/// When this token ends, after its name.
fn ending(item: &Item, now: Time) -> String {
    if item.expire_time == Time::NEVER {
        return "never ends".to_owned();
    }
    format!("ends {}, on {}", words::span(item.expire_time, now), words::date(item.expire_time))
}

/// What happened, after the name of one token.
fn happened(notice: &Notice, item: &Item, actor: &str, now: Time) -> String {
    let by = if actor.is_empty() { String::new() } else { format!(" by {actor}") };
    match notice.event {
        Event::Expiring => ending(item, now),
        Event::Expired => "has expired".to_owned(),
        Event::Created => format!("was created{by}"),
        Event::Regenerated => format!("was given a new secret{by}"),
        Event::Revoked => format!("was revoked{by}"),
        Event::Leaked => "was reported as leaked and is dead".to_owned(),
        Event::Test => "is only a test".to_owned(),
    }
}

/// What happened to several tokens, after their number.
fn happened_to_all(event: Event) -> &'static str {
    match event {
        Event::Expiring => "end soon",
        Event::Expired => "have expired",
        Event::Created => "were created",
        Event::Regenerated => "were given new secrets",
        Event::Revoked => "were revoked",
        Event::Leaked => "were reported as leaked and are dead",
        Event::Test => "are only a test",
    }
}

fn subject(notice: &Notice, brand: &Brand, now: Time) -> String {
    let brand = words::line(&brand.display_name, BRAND_CHARS_MAX);
    let subject = match notice.items.as_slice() {
        _ if notice.event == Event::Test => format!("{brand}: a test from Keyward"),
        [item] => {
            let actor = words::line(&notice.actor, ACTOR_CHARS_MAX);
            let rest = format!("({}…) {}", item.hint, happened(notice, item, &actor, now));
            let used = format!("{brand}: the token \"\" {rest}").chars().count();
            let room = SUBJECT_CHARS_MAX.saturating_sub(used).max(NAME_CHARS_MIN);
            format!("{brand}: the token \"{}\" {rest}", words::line(&item.display_name, room))
        }
        items => format!("{brand}: {} {}", count(items.len() + notice.unnamed), happened_to_all(notice.event)),
    };
    words::line(&subject, SUBJECT_CHARS_MAX)
}

fn count(tokens: usize) -> String {
    words::count(u64::try_from(tokens).unwrap_or(u64::MAX), "token")
}

fn headline(notice: &Notice, brand: &Brand, now: Time) -> String {
    let workspace = &brand.display_name;
    match notice.items.as_slice() {
        _ if notice.event == Event::Test => {
            format!("This is a test from Keyward: mails of the workspace {workspace} arrive. Nothing has happened to any token.")
        }
        [item] => format!(
            "The token \"{}\" ({}…) of the workspace {workspace} {}.",
            item.display_name,
            item.hint,
            happened(notice, item, &notice.actor, now)
        ),
        items => format!("{} of the workspace {workspace} {}.", count(items.len() + notice.unnamed), happened_to_all(notice.event)),
    }
}

/// `Bob (bob)`, or the id alone if that is the name.
fn owner(item: &Item) -> String {
    if item.principal_name.is_empty() || item.principal_name == item.principal {
        item.principal.clone()
    } else {
        format!("{} ({})", item.principal_name, item.principal)
    }
}

fn last_use(item: &Item, now: Time) -> String {
    item.last_used_time.map_or_else(|| "never".to_owned(), |time| words::instant(time, now))
}

fn facts(notice: &Notice, item: &Item, brand: &Brand, now: Time) -> Vec<(&'static str, String)> {
    let end = if item.expire_time <= now { "Expired" } else { "Ends" };
    let mut facts = vec![
        ("Token", format!("{} ({}…)", item.display_name, item.hint)),
        ("Owner", owner(item)),
        ("Workspace", brand.display_name.clone()),
        (end, words::instant(item.expire_time, now)),
        ("Last used", last_use(item, now)),
    ];
    if !item.audiences.is_empty() {
        facts.push(("For", item.audiences.join(", ")));
    }
    facts.extend(done_by(notice));
    facts
}

/// Who did it, and why.
fn done_by(notice: &Notice) -> Vec<(&'static str, String)> {
    let label = match notice.event {
        Event::Created => "Created by",
        Event::Regenerated => "Renewed by",
        Event::Revoked => "Revoked by",
        Event::Leaked => "Reported by",
        Event::Expiring | Event::Expired | Event::Test => return Vec::new(),
    };
    let actor = if notice.actor.is_empty() { "somebody who did not say who they are" } else { &notice.actor };
    let mut facts = vec![(label, actor.to_owned())];
    if !notice.reason.is_empty() {
        facts.push(("Reason", notice.reason.clone()));
    }
    facts
}

/// By end; those that end at the same time by name.
fn rows(items: &[Item], now: Time) -> Vec<Row> {
    let mut sorted: Vec<&Item> = items.iter().collect();
    sorted.sort_by(|a, b| (a.expire_time, &a.display_name, a.token_id).cmp(&(b.expire_time, &b.display_name, b.token_id)));
    let row = |item: &Item| Row {
        token: format!("{} ({}…)", item.display_name, item.hint),
        owner: owner(item),
        ends: if item.expire_time <= now { "expired" } else { "ends" },
        end: words::instant(item.expire_time, now),
        last_use: last_use(item, now),
    };
    sorted.into_iter().take(ITEMS_MAX).map(row).collect()
}

fn advice(notice: &Notice, brand: &Brand, has_link: bool) -> Vec<String> {
    let workspace = &brand.display_name;
    let (works, it) = if notice.items.len() > 1 { ("They work", "them") } else { ("It works", "it") };
    let ask = |what: &str| format!("Ask an administrator of {workspace} for {what}.");
    let renew = |what: &str| if has_link { "Get a new token here:".to_owned() } else { ask(what) };
    match notice.event {
        Event::Test => Vec::new(),
        Event::Expiring => vec![
            format!("{works} until then. Whatever still uses {it} must have a new token before."),
            renew("a new token, or for a later end"),
        ],
        Event::Expired => vec![format!("{works} no more, and whatever still uses {it} is refused."), renew("a new token")],
        Event::Revoked | Event::Leaked => vec![format!("{works} no more."), renew("a new token")],
        Event::Created | Event::Regenerated => {
            vec![format!("If you did not expect this, tell an administrator of {workspace}, who can revoke {it}.")]
        }
    }
}

fn footer(notice: &Notice, brand: &Brand) -> String {
    let workspace = &brand.display_name;
    match notice.event {
        Event::Test => format!("An administrator of {workspace} asked for this test."),
        _ => format!("You get this because {workspace} sends word of its tokens to this address, or to those whose tokens they are."),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::{notice::Channel, token::TokenId};

    const DAY: Duration = Duration::from_hours(24);
    /// 2027-01-15 08:00 UTC.
    const NOW: Time = Time::from_micros(1_800_000_000_000_000);

    fn item(name: &str, end: Time) -> Item {
        Item {
            token_id: TokenId::new(NOW).expect("randomness"),
            display_name: name.to_owned(),
            hint: "acme_ab1".to_owned(),
            principal: "bob".to_owned(),
            principal_name: "Bob".to_owned(),
            audiences: Vec::new(),
            create_time: NOW - 30 * DAY,
            expire_time: end,
            last_used_time: None,
            days_before: None,
        }
    }

    fn notice(event: Event, items: Vec<Item>) -> Notice {
        Notice {
            id: "msg_1".to_owned(),
            workspace: "acme".to_owned(),
            event,
            channel: Channel::Mail,
            recipient: "ada@example.com".to_owned(),
            to_owner: false,
            items,
            unnamed: 0,
            actor: String::new(),
            reason: String::new(),
            create_time: NOW,
        }
    }

    fn brand() -> Brand {
        Brand { display_name: "Acme".to_owned(), renew_url: String::new() }
    }

    fn subject_of(notice: &Notice) -> String {
        letter(notice, &brand(), NOW).subject
    }

    #[test]
    fn subjects_say_it_all() {
        let one = |event| Notice { actor: "alice".to_owned(), ..notice(event, vec![item("deploy", NOW + 7 * DAY)]) };
        let two = |event| notice(event, vec![item("deploy", NOW + 7 * DAY), item("ci", NOW + DAY)]);
        for (event, single, digest) in [
            (Event::Expiring, "the token \"deploy\" (acme_ab1…) ends in 7 days, on 2027-01-22", "2 tokens end soon"),
            (Event::Expired, "the token \"deploy\" (acme_ab1…) has expired", "2 tokens have expired"),
            (Event::Created, "the token \"deploy\" (acme_ab1…) was created by alice", "2 tokens were created"),
            (Event::Regenerated, "the token \"deploy\" (acme_ab1…) was given a new secret by alice", "2 tokens were given new secrets"),
            (Event::Revoked, "the token \"deploy\" (acme_ab1…) was revoked by alice", "2 tokens were revoked"),
            (
                Event::Leaked,
                "the token \"deploy\" (acme_ab1…) was reported as leaked and is dead",
                "2 tokens were reported as leaked and are dead",
            ),
            (Event::Test, "a test from Keyward", "a test from Keyward"),
        ] {
            assert_eq!(subject_of(&one(event)), format!("Acme: {single}"));
            assert_eq!(subject_of(&two(event)), format!("Acme: {digest}"));
        }
        assert_eq!(subject_of(&notice(Event::Test, Vec::new())), "Acme: a test from Keyward");
        let late = notice(Event::Expiring, vec![item("deploy", NOW - 2 * DAY)]);
        assert_eq!(subject_of(&late), "Acme: the token \"deploy\" (acme_ab1…) has expired");
        let nobody = notice(Event::Revoked, vec![item("deploy", Time::NEVER)]);
        assert_eq!(subject_of(&nobody), "Acme: the token \"deploy\" (acme_ab1…) was revoked");
    }

    #[test]
    fn subjects_are_one_line_of_bounded_length() {
        for name in ["x".repeat(100), "ä".repeat(100), "a\r\nBcc: eve@example.com".to_owned()] {
            for event in Event::ALL {
                let notice = Notice { actor: "y".repeat(128), ..notice(event, vec![item(&name, NOW + 7 * DAY)]) };
                let brand = Brand { display_name: "z\n".repeat(50), renew_url: String::new() };
                let letter = letter(&notice, &brand, NOW);
                assert!(letter.subject.chars().count() <= 120, "{}", letter.subject);
                assert!(!letter.subject.chars().chain(letter.sender_name.chars()).any(char::is_control), "{}", letter.subject);
            }
        }
        let cut = subject_of(&notice(Event::Expiring, vec![item(&"x".repeat(100), NOW + 7 * DAY)]));
        assert!(cut.contains("x…\" (acme_ab1…) ends in 7 days, on 2027-01-22"), "{cut}");
    }

    #[test]
    fn a_mail_says_which_token_whose_and_what_to_do() {
        let mut used = item("deploy", NOW + 7 * DAY);
        used.last_used_time = Some(NOW - 3 * DAY);
        used.audiences = vec!["billing".to_owned(), "crm".to_owned()];
        let letter = letter(&notice(Event::Expiring, vec![used]), &brand(), NOW);
        assert_eq!(letter.to, "ada@example.com");
        assert_eq!(letter.sender_name, "Acme");
        assert_eq!((letter.id.as_str(), letter.time), ("msg_1", NOW));
        let expected = "\
The token \"deploy\" (acme_ab1…) of the workspace Acme ends in 7 days, on
2027-01-22.

Token:      deploy (acme_ab1…)
Owner:      Bob (bob)
Workspace:  Acme
Ends:       2027-01-22 08:00 UTC (in 7 days)
Last used:  2027-01-12 08:00 UTC (3 days ago)
For:        billing, crm

It works until then. Whatever still uses it must have a new token before.
Ask an administrator of Acme for a new token, or for a later end.

-- 
You get this because Acme sends word of its tokens to this address, or to
those whose tokens they are.
";
        assert_eq!(letter.text, expected);
        for part in ["<bdi>deploy (acme_ab1…)</bdi>", "<bdi>Bob (bob)</bdi>", "in 7 days", "<p>Ask an administrator of Acme"] {
            assert!(letter.html.contains(part), "{part} is not in {}", letter.html);
        }
        for part in ["<script", "<style", "<img", "<link", "src=", "http", "Keyward"] {
            assert!(!letter.html.contains(part), "{part} is in {}", letter.html);
        }
    }

    #[test]
    fn people_are_led_to_where_tokens_are_renewed() {
        let lead = |url: &str| {
            let brand = Brand { renew_url: url.to_owned(), ..brand() };
            letter(&notice(Event::Expired, vec![item("deploy", NOW - DAY)]), &brand, NOW)
        };
        let led = lead("https://example.com/tokens?a=1&b=2");
        assert!(led.text.contains("Get a new token here:\nhttps://example.com/tokens?a=1&b=2\n"), "{}", led.text);
        assert!(led.html.contains("href=\"https://example.com/tokens?a=1&#38;b=2\""), "{}", led.html);
        let refused = lead("javascript:alert(1)");
        assert!(!refused.html.contains("href") && refused.text.contains("Ask an administrator of Acme for a new token."));
    }

    #[test]
    fn events_say_who_and_why() {
        let told = |actor: &str| {
            let told = Notice {
                actor: actor.to_owned(),
                reason: "laptop lost".to_owned(),
                ..notice(Event::Revoked, vec![item("ci", Time::NEVER)])
            };
            letter(&told, &brand(), NOW)
        };
        let text = told("alice").text;
        for part in ["Revoked by:  alice", "Reason:      laptop lost", "Ends:        never", "Last used:   never", "It works no more."] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(told("").text.contains("Revoked by:  somebody who did not say who they are"));
        let created = letter(&notice(Event::Created, vec![item("ci", Time::NEVER)]), &brand(), NOW).text;
        assert!(created.contains("who can revoke\nit."), "{created}");
    }

    #[test]
    fn a_digest_lists_all_by_their_end() {
        let items = vec![item("never", Time::NEVER), item("later", NOW + 7 * DAY), item("sooner", NOW + DAY), item("gone", NOW - DAY)];
        let letter = letter(&notice(Event::Expiring, items), &brand(), NOW);
        assert!(letter.text.starts_with("4 tokens of the workspace Acme end soon.\n"), "{}", letter.text);
        let at = |text: &str, name: &str| text.find(&format!("{name} (acme_ab1…)")).unwrap_or_else(|| panic!("{name} is not in {text}"));
        for text in [&letter.text, &letter.html] {
            assert!(
                at(text, "gone") < at(text, "sooner") && at(text, "sooner") < at(text, "later") && at(text, "later") < at(text, "never")
            );
        }
        assert!(letter.text.lines().all(|line| line.chars().count() <= page::WIDTH), "{}", letter.text);
        assert!(letter.text.contains("They work until then. Whatever still uses them"), "{}", letter.text);
        assert!(letter.text.contains("- gone (acme_ab1…), of Bob (bob): expired 2027-01-14 "), "{}", letter.text);
        let late = super::letter(&notice(Event::Expiring, vec![item("a", NOW - DAY), item("b", NOW)]), &brand(), NOW);
        assert!(late.subject == "Acme: 2 tokens have expired" && late.text.contains("They work no more"), "{}", late.text);
        let many = notice(Event::Expired, (0..501).map(|index| item(&format!("t{index}"), NOW - DAY)).collect());
        let letter = super::letter(&many, &brand(), NOW);
        assert_eq!(letter.html.matches("<bdi>t").count(), 500);
        assert!(letter.html.contains("and 1 more") && letter.text.contains("and 1 more"));
        assert!(letter.text.contains("whatever still uses them is refused"), "{}", letter.text);
    }

    #[test]
    fn texts_of_others_are_no_markup() {
        let bad = "\"><script>alert('1')</script>&<img src=x>\r\n`שלום";
        let mut evil = item(bad, NOW + DAY);
        evil.hint = "<b>".to_owned();
        evil.principal_name = bad.to_owned();
        evil.audiences = vec![bad.to_owned()];
        let brand = Brand { display_name: bad.to_owned(), renew_url: "https://x/\"><script>".to_owned() };
        for items in [vec![evil.clone()], vec![evil.clone(), evil.clone()], Vec::new()] {
            for event in Event::ALL {
                let told = Notice { actor: bad.to_owned(), reason: bad.to_owned(), ..notice(event, items.clone()) };
                let letter = letter(&told, &brand, NOW);
                for part in ["<script", "<img", "<b>", "\"><script", "'", "`"] {
                    assert!(!letter.html.contains(part), "{part} is in {}", letter.html);
                }
                assert!(letter.html.contains("שלום") && letter.text.contains("שלום"));
                assert!(!letter.text.contains('\r'));
            }
        }
    }

    #[test]
    fn a_test_says_that_it_is_one() {
        let letter = letter(&notice(Event::Test, Vec::new()), &brand(), NOW);
        assert!(letter.text.contains("This is a test from Keyward") && letter.text.contains("asked for this test"), "{}", letter.text);
        assert!(!letter.text.contains("Get a new token"));
    }

    #[test]
    fn a_call_carries_the_token_and_no_secret() {
        let mut told = Notice { actor: "alice".to_owned(), ..notice(Event::Expiring, vec![item("de\"ploy", NOW + 7 * DAY)]) };
        told.items[0].days_before = Some(7);
        let read = |told: &Notice| serde_json::from_str::<Value>(&payload(told, &brand())).expect("JSON");
        let expected = json!({
            "id": "msg_1",
            "type": "token.expiring",
            "timestamp": "2027-01-15T08:00:00Z",
            "data": {
                "workspace": "acme",
                "workspace_display_name": "Acme",
                "renew_url": "",
                "actor": "alice",
                "reason": "",
                "days_before": 7,
                "token": {
                    "id": told.items[0].token_id.to_string(),
                    "display_name": "de\"ploy",
                    "hint": "acme_ab1",
                    "principal": "bob",
                    "principal_display_name": "Bob",
                    "audiences": [],
                    "create_time": "2026-12-16T08:00:00Z",
                    "expire_time": "2027-01-22T08:00:00Z",
                    "last_used_time": null,
                },
            },
        });
        assert_eq!(read(&told), expected);
        assert_eq!(payload(&told, &brand()), payload(&told, &brand()));
        let never = read(&notice(Event::Created, vec![item("ci", Time::NEVER)]));
        assert!(never["data"]["token"]["expire_time"].is_null() && never["data"].get("days_before").is_none());
        let test = read(&notice(Event::Test, Vec::new()));
        assert_eq!(test["type"], "test");
        assert!(test["data"].get("token").is_none());
    }
}
