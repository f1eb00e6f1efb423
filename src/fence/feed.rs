//! What has changed, for callers who keep answers of their own.
//!
//! A change is told once it is in force on every server: whichever is asked after that, answers with it. Each reader stands at a number of its own. What came last is kept in
//! memory once for all of them, and nothing is kept for any one: who falls behind that reads the log, and who falls behind the log begins anew.
//!
//! Invariant: what was told is in force on every server (test `a_watcher_hears_of_a_change_when_every_server_knows_it`).

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout};

use super::Fence;
use crate::{
    ambient::Time,
    error::{Error, Result},
    grant::Subject,
    store::{Change, Log},
};

/// What is kept in memory.
const RECENT_MAX: usize = 10_000;
/// What one message tells at most.
const NEWS_MAX: usize = 500;
/// What is read of the log at once; and if that is not one number whole.
const PAGE_MAX: u32 = 2_000;
const LOG_MAX: u32 = 50_000;
/// Up to where a reader knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Position {
    /// The epoch of the database.
    pub epoch: i64,
    /// The number of the last change that is known.
    pub number: i64,
}

/// Answers that are out of date.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// Those about one token.
    Token {
        /// Its workspace.
        workspace: String,
        /// Its id.
        id: String,
    },
    /// Those about all tokens of a principal.
    Principal {
        /// Its workspace.
        workspace: String,
        /// Its id.
        id: String,
    },
    /// Those about all tokens of a workspace.
    Workspace(String),
}

impl Invalidation {
    /// The workspace of what is out of date.
    #[must_use]
    pub fn workspace(&self) -> &str {
        match self {
            Self::Token { workspace, .. } | Self::Principal { workspace, .. } | Self::Workspace(workspace) => workspace,
        }
    }
}

/// What a reader did not know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct News {
    /// Up to where it knows now.
    pub position: Position,
    /// What is out of date.
    pub invalidations: Vec<Invalidation>,
    /// All that was made before this instant is told; nothing if there is more to come.
    pub as_of: Option<Time>,
}

/// What came last.
#[derive(Default)]
pub(super) struct Recent {
    changes: Mutex<VecDeque<Change>>,
    /// Up to where it goes, from after which number it is whole, and when that was asked.
    reach: watch::Sender<Option<Reach>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Reach {
    position: Position,
    from: i64,
    as_of: Time,
}

impl Recent {
    pub(super) fn add(&self, log: Log, as_of: Time) {
        let mut changes = self.changes.lock();
        let before = self.reach.borrow().filter(|reach| reach.position.epoch == log.epoch && !log.is_cut && !log.is_foreign);
        let mut from = before.map_or(log.head, |reach| reach.from);
        if before.is_some() {
            changes.extend(log.changes);
        } else {
            changes.clear();
        }
        while changes.len() > RECENT_MAX {
            // A number is forgotten whole.
            from = changes.front().map_or(from, |oldest| oldest.seq);
            while changes.front().is_some_and(|change| change.seq <= from) {
                changes.pop_front();
            }
        }
        let position = Position { epoch: log.epoch, number: log.head };
        self.reach.send_replace(Some(Reach { position, from, as_of }));
    }

    pub(super) fn clear(&self) {
        let mut changes = self.changes.lock();
        changes.clear();
        self.reach.send_replace(None);
    }
}

/// A reader of what has changed.
pub struct Feed {
    fence: Arc<Fence>,
    reach: watch::Receiver<Option<Reach>>,
    position: Option<Position>,
    /// The only workspace that is told of; nothing: all.
    workspace: Option<String>,
}

impl Fence {
    /// A reader of what has changed after a position, or from now on.
    #[must_use]
    pub fn feed(self: &Arc<Self>, position: Option<Position>, workspace: Option<String>) -> Feed {
        Feed { fence: Arc::clone(self), reach: self.recent.reach.subscribe(), position, workspace }
    }
}

impl Feed {
    /// Waits for something that the reader does not know, but not for longer than this: then it hears how fresh that is. It is told again until [`Feed::take`].
    ///
    /// # Errors
    /// `Precondition`: what has changed since the reader's position is not known any more. `Unavailable`, `Overloaded`.
    pub async fn next(&mut self, patience: Duration) -> Result<News> {
        let known = self.position;
        // In time or not: it is looked at either way.
        let _in_time = timeout(patience, self.something_new(known)).await.is_ok();
        // Nothing is known of the log at present: the reader knows what it knew.
        let Some((end, as_of)) = self.settled() else {
            let position = known.ok_or_else(|| Error::Unavailable("the log was not heard of yet".into()))?;
            return Ok(News { position, invalidations: Vec::new(), as_of: None });
        };
        let position = known.unwrap_or(end);
        if position.epoch != end.epoch {
            return Err(put_back(end.epoch));
        }
        let (number, invalidations) = match self.recent(position, end.number) {
            Some(page) => page,
            None => self.logged(position, end.number).await?,
        };
        // This server may be behind the one that told the position.
        let number = number.unwrap_or(end.number).max(position.number);
        let is_all = number == end.number;
        Ok(News { position: Position { number, ..position }, invalidations, as_of: as_of.filter(|_| is_all) })
    }

    /// The reader has heard this.
    pub fn take(&mut self, news: &News) {
        self.position = Some(news.position);
    }

    /// Returns when there is something after this position that is in force on every server.
    async fn something_new(&mut self, known: Option<Position>) {
        loop {
            let is_ahead = |reach: &Position| known.is_none_or(|known| known.epoch != reach.epoch || reach.number > known.number);
            // Nobody closes it as long as the fence is there.
            let _heard = self.reach.wait_for(|reach| reach.is_some_and(|reach| is_ahead(&reach.position))).await.is_ok();
            if self.settled().is_some_and(|(end, _)| is_ahead(&end)) {
                return;
            }
            self.fence.watch.looked().await;
        }
    }

    /// Up to where changes are in force on every server, as far as this one has heard; and as of when, if that is all.
    fn settled(&self) -> Option<(Position, Option<Time>)> {
        let reach = (*self.reach.borrow())?;
        let heard = reach.position;
        let settled = if self.fence.store.is_alone() { heard.number } else { self.fence.watch.settled()?.min(heard.number) };
        Some((Position { number: settled, ..heard }, Some(reach.as_of).filter(|_| settled == heard.number)))
    }

    /// What came after a position, up to a number; and up to which number that goes, if there is more. Nothing if memory does not reach back so far.
    fn recent(&self, position: Position, end: i64) -> Option<(Option<i64>, Vec<Invalidation>)> {
        let changes = self.fence.recent.changes.lock();
        // Under the lock, so that it says what is there.
        let reach = (*self.fence.recent.reach.borrow())?;
        if reach.position.epoch != position.epoch || !(reach.from..=reach.position.number).contains(&position.number) {
            return None;
        }
        let begin = changes.partition_point(|change| change.seq <= position.number);
        let end = changes.partition_point(|change| change.seq <= end).max(begin);
        Some(self.page(changes.range(begin..end).cloned()))
    }

    async fn logged(&self, position: Position, end: i64) -> Result<(Option<i64>, Vec<Invalidation>)> {
        let mut log = self.fence.store.log_after(position.number, PAGE_MAX).await?;
        let last = |log: &Log| log.changes.last().map(|change| change.seq).filter(|_| log.is_cut);
        if last(&log).is_some_and(|last| log.changes.iter().all(|change| change.seq == last)) {
            log = self.fence.store.log_after(position.number, LOG_MAX).await?;
        }
        if log.epoch != position.epoch || log.head < position.number {
            return Err(put_back(log.epoch));
        }
        // The last number may not be there whole.
        let cut = last(&log);
        log.changes.retain(|change| change.seq <= end && cut.is_none_or(|cut| change.seq < cut));
        if position.number < log.pruned || log.is_foreign || (cut.is_some_and(|cut| cut <= end) && log.changes.is_empty()) {
            return Err(Error::precondition(
                "what has changed since this number is not known any more: forget every answer that you keep, and begin without a position",
            ));
        }
        let (number, invalidations) = self.page(log.changes.into_iter());
        Ok((number.or(cut.map(|cut| end.min(cut - 1))), invalidations))
    }

    /// As many numbers as fit into a message, each of them whole. One that is too large by itself is told by its workspaces.
    fn page(&self, changes: impl Iterator<Item = Change>) -> (Option<i64>, Vec<Invalidation>) {
        let mut page = Vec::new();
        let mut end = None;
        let mut changes = changes.peekable();
        while let Some(seq) = changes.peek().map(|change| change.seq) {
            let mut group: Vec<Invalidation> = Vec::new();
            while let Some(change) = changes.next_if(|change| change.seq == seq) {
                group.extend(self.told(change));
            }
            if group.len() > NEWS_MAX {
                group = workspaces(&group);
            }
            if !page.is_empty() && page.len() + group.len() > NEWS_MAX {
                return (end, page);
            }
            page.append(&mut group);
            end = Some(seq);
        }
        (None, page)
    }

    fn told(&self, change: Change) -> Option<Invalidation> {
        let told = match (change.subject, change.token_id) {
            (Subject::Token(_), Some(id)) => Invalidation::Token { workspace: change.workspace, id },
            (Subject::Token(_), None) => Invalidation::Workspace(change.workspace),
            (Subject::Principal { workspace, id }, _) => Invalidation::Principal { workspace, id },
            (Subject::Workspace(id), _) => Invalidation::Workspace(id),
        };
        let is_told = self.workspace.as_deref().is_none_or(|only| only == told.workspace());
        is_told.then_some(told)
    }
}

fn put_back(epoch: i64) -> Error {
    Error::precondition(format!(
        "the database was put back to an earlier state, or another one has taken over (epoch {epoch}): forget every answer that you keep, and begin without a position"
    ))
}

fn workspaces(group: &[Invalidation]) -> Vec<Invalidation> {
    let of: BTreeSet<&str> = group.iter().map(Invalidation::workspace).collect();
    of.into_iter().map(|workspace| Invalidation::Workspace(workspace.to_owned())).collect()
}
