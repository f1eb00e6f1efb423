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

/// Tokens of one mail; more go into further ones.
const DIGEST_MAX: usize = 500;

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
    let followed: Vec<Followed> = tokens.iter().map(follow).collect();
    let notices = compose(workspace, wishes, news, followed, now)?;
    tx.add_notices(&notices, now + GIVE_UP).await
}

fn is_news(token: &Token, news: News<'_>, workspace: &str) -> bool {
    let is_own = news.actor.is_some_and(|actor| *actor.principal == *token.principal && *actor.workspace == *workspace);
    match news.event {
        Event::Leaked => true,
        Event::Revoked => token.kind == Kind::Permanent && !is_own,
        _ => token.kind == Kind::Permanent,
    }
}

/// One call of the webhook for each token; one mail for each recipient, to owners about their tokens alone.
pub(super) fn compose(workspace: &str, wishes: &Wishes, news: News<'_>, followed: Vec<Followed>, now: Time) -> Result<Vec<Notice>> {
    let notice = |channel, recipient: &str, items: Vec<Item>| {
        Ok(Notice {
            id: token::notice_id(now)?,
            workspace: workspace.to_owned(),
            event: news.event,
            channel,
            recipient: recipient.to_owned(),
            items,
            actor: news.actor.map(|actor| actor.principal.to_string()).unwrap_or_default(),
            reason: news.reason.to_owned(),
            create_time: now,
        })
    };
    let mut notices = Vec::new();
    if !wishes.webhook_url.is_empty() {
        for Followed { item, .. } in &followed {
            notices.push(notice(Channel::Webhook, "", vec![item.clone()])?);
        }
    }
    for chunk in followed.chunks(DIGEST_MAX) {
        let items: Vec<Item> = chunk.iter().map(|followed| followed.item.clone()).collect();
        for address in &wishes.emails {
            notices.push(notice(Channel::Mail, address, items.clone())?);
        }
    }
    if wishes.mail_owner {
        for (address, items) in by_owner(followed, &wishes.emails) {
            for chunk in items.chunks(DIGEST_MAX) {
                notices.push(notice(Channel::Mail, &address, chunk.to_vec())?);
            }
        }
    }
    Ok(notices)
}

/// The tokens of each owner who has an address and is not told anyway.
fn by_owner(followed: Vec<Followed>, told: &[String]) -> BTreeMap<String, Vec<Item>> {
    let mut owners: BTreeMap<String, Vec<Item>> = BTreeMap::new();
    for Followed { item, email } in followed {
        if !email.is_empty() && !told.iter().any(|address| address.eq_ignore_ascii_case(&email)) {
            owners.entry(email).or_default().push(item);
        }
    }
    owners
}
