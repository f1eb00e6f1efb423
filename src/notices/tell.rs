//! From an event to what goes out: who is told of which tokens.

use std::collections::{BTreeMap, HashMap};

use super::GIVE_UP;
use crate::{
    ambient::Time,
    caller::Caller,
    error::Result,
    grant::{Kind, Token},
    notice::{Channel, Event, Item, Notice, Wishes},
    store::{Followed, Tx},
    token,
};

/// Calls that are made at once.
const CALLS_MAX: usize = 500;
/// Tokens that a mail about many names; of the others it says how many they are.
const NAMED_MAX: usize = 100;

/// Something that was done to tokens of one workspace.
#[derive(Clone, Copy)]
pub(crate) struct News<'a> {
    pub(crate) event: Event,
    /// Who did it; nobody: nobody said who they are.
    pub(crate) actor: Option<&'a Caller>,
    pub(crate) reason: &'a str,
}

/// Puts news into the outbox, within the transaction that they are about, if the workspace wants to hear of them. Of temporary tokens only a leak is news.
pub(crate) async fn tell(tx: &Tx<'_>, workspace: &str, wishes: &Wishes, news: News<'_>, tokens: &[&Token], now: Time) -> Result<()> {
    if !wishes.is_on() || !wishes.events.contains(&news.event) {
        return Ok(());
    }
    let tokens: Vec<&Token> = tokens.iter().copied().filter(|token| is_news(token, news, workspace)).collect();
    if tokens.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<&str> = tokens.iter().map(|token| token.principal.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    let contacts = tx.contacts(workspace, &ids).await?;
    let contacts: HashMap<&str, (&str, &str)> =
        contacts.iter().map(|(id, name, email)| (id.as_str(), (name.as_str(), email.as_str()))).collect();
    let follow = |token: &&Token| {
        let (name, email) = contacts.get(token.principal.as_str()).copied().unwrap_or((&token.principal, ""));
        Followed { item: Item::of(token, name), email: email.to_owned() }
    };
    // There may be very many: calls are written as they are made, and mails name only some.
    for chunk in tokens.chunks(CALLS_MAX) {
        let calls = calls(workspace, wishes, news, &chunk.iter().map(follow).collect::<Vec<_>>(), now)?;
        tx.add_notices(&calls, now + GIVE_UP).await?;
    }
    let mails = mails(workspace, wishes, news, tokens.iter().map(follow), NAMED_MAX, now)?;
    tx.add_notices(&mails, now + GIVE_UP).await
}

fn is_news(token: &Token, news: News<'_>, workspace: &str) -> bool {
    let is_own = news.actor.is_some_and(|actor| *actor.principal == *token.principal && *actor.workspace == *workspace);
    match news.event {
        Event::Leaked => true,
        Event::Revoked => token.kind == Kind::Permanent && !is_own,
        _ => token.kind == Kind::Permanent,
    }
}

/// A call of the webhook for each token.
pub(super) fn calls(workspace: &str, wishes: &Wishes, news: News<'_>, followed: &[Followed], now: Time) -> Result<Vec<Notice>> {
    let followed = if wishes.webhook_url.is_empty() { &[] } else { followed };
    let call = |Followed { item, .. }: &Followed| {
        let told = Told { items: vec![item.clone()], unnamed: 0 };
        notice(workspace, news, Channel::Webhook, "", told, now)
    };
    followed.iter().map(call).collect()
}

/// A mail for each recipient, to owners about their tokens alone. It names at most so many of them.
pub(super) fn mails(
    workspace: &str,
    wishes: &Wishes,
    news: News<'_>,
    followed: impl Iterator<Item = Followed>,
    named_max: usize,
    now: Time,
) -> Result<Vec<Notice>> {
    let mut all = Told::default();
    let mut owners: BTreeMap<String, Told> = BTreeMap::new();
    for Followed { item, email } in followed {
        // Mails do not show what tokens are for.
        let item = Item { audiences: Vec::new(), ..item };
        if wishes.mail_owner && !email.is_empty() && !wishes.emails.iter().any(|address| address.eq_ignore_ascii_case(&email)) {
            owners.entry(email).or_default().add(item.clone(), named_max);
        }
        all.add(item, named_max);
    }
    let mut mails = Vec::new();
    for address in &wishes.emails {
        mails.push(notice(workspace, news, Channel::Mail, address, all.clone(), now)?);
    }
    for (address, told) in owners {
        mails.push(Notice { to_owner: true, ..notice(workspace, news, Channel::Mail, &address, told, now)? });
    }
    Ok(mails)
}

/// The tokens of a notice, and how many more there are.
#[derive(Clone, Default)]
struct Told {
    items: Vec<Item>,
    unnamed: usize,
}

impl Told {
    fn add(&mut self, item: Item, named_max: usize) {
        if self.items.len() < named_max {
            self.items.push(item);
        } else {
            self.unnamed += 1;
        }
    }
}

fn notice(workspace: &str, news: News<'_>, channel: Channel, recipient: &str, told: Told, now: Time) -> Result<Notice> {
    Ok(Notice {
        id: token::notice_id(now)?,
        workspace: workspace.to_owned(),
        event: news.event,
        channel,
        recipient: recipient.to_owned(),
        to_owner: false,
        items: told.items,
        unnamed: told.unnamed,
        actor: news.actor.map(|actor| actor.principal.to_string()).unwrap_or_default(),
        reason: news.reason.to_owned(),
        create_time: now,
    })
}
