//! Which tokens have reached a step that was not told.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{GIVE_UP, Notices, Standing, tell};
use crate::{
    ambient::Time,
    error::Result,
    notice::{Event, Wishes},
    store::{Followed, Step},
    token::{self, TokenId},
};

/// Tokens that one transaction tells of.
const TOLD_MAX: usize = 500;
/// Workspaces in a row that fail before the rest waits for the next scan.
const FAILURES_MAX: usize = 3;
/// What expired earlier is not told any more.
const LATE_MAX: Duration = Duration::from_hours(30 * 24);
/// Faults of one look for those that are not true any more.
const SWEPT_MAX: u64 = 1_000;
/// How long what was given up is kept.
const DEAD_LIFETIME: Duration = Duration::from_hours(30 * 24);

impl Notices {
    /// Tells every step that was reached and not told; says how many that were. A workspace where that fails does not keep the others waiting.
    ///
    /// # Errors
    /// The last failure, when all others are done, or when several in a row have failed. What was not told is told by the next scan.
    pub async fn scan(self: &Arc<Self>, now: Time) -> Result<usize> {
        let (mut told, mut failures, mut failure) = (0, 0, None);
        for (workspace, wishes) in self.store.wishes().await? {
            match self.scan_workspace(&workspace, &wishes, now).await {
                Ok(count) => {
                    told += count;
                    failures = 0;
                }
                Err(error) => {
                    failures += 1;
                    failure = Some(error);
                }
            }
            if failures == FAILURES_MAX {
                break;
            }
        }
        self.tidy(now).await?;
        failure.map_or(Ok(told), Err)
    }

    async fn scan_workspace(&self, workspace: &str, wishes: &Wishes, now: Time) -> Result<usize> {
        let mut told = 0;
        let mut after = (wishes.since.max(now - LATE_MAX), String::new());
        loop {
            let (ids, rest) = self.store.near_end(workspace, wishes, (after.0, &after.1), now).await?;
            for chunk in ids.chunks(TOLD_MAX) {
                told += self.tell_steps(workspace, wishes, chunk, now).await?;
            }
            match rest {
                Some(rest) => after = rest,
                None => return Ok(told),
            }
        }
    }

    /// The step is noted as told, its fault raised and the outbox filled in one transaction: all of it, or nothing. Faults are raised in any case, so that they are there when a
    /// workspace wants to see them.
    async fn tell_steps(&self, workspace: &str, wishes: &Wishes, ids: &[TokenId], now: Time) -> Result<usize> {
        let tx = self.store.begin_unnumbered().await?;
        let mut followed = tx.followed(ids).await?;
        for Followed { item, .. } in &mut followed {
            item.days_before = wishes.step(item.expire_time, now);
        }
        let step = |Followed { item, .. }: &Followed| {
            Some(Step { token_id: item.token_id, expire_time: item.expire_time, days_before: item.days_before? })
        };
        let steps: Vec<Step> = followed.iter().filter_map(step).collect();
        let marked: HashMap<TokenId, i32> = tx.mark_steps(&steps, wishes.ways()).await?.into_iter().collect();
        if marked.is_empty() {
            return Ok(0);
        }
        let fault = |step: &Step| Ok((token::fault_id(now)?, *step));
        let raised = steps.iter().filter(|step| marked.contains_key(&step.token_id)).map(fault).collect::<Result<Vec<_>>>()?;
        tx.raise_faults(workspace, &raised, now).await?;
        for (event, ways, followed) in alike(followed, &marked, now) {
            let (wishes, news) = (wishes.on(ways), tell::News { event, actor: None, reason: "" });
            let mut notices = tell::calls(workspace, &wishes, news, &followed, now)?;
            notices.extend(tell::mails(workspace, &wishes, news, followed.into_iter(), TOLD_MAX, now)?);
            tx.add_notices(&notices, now + GIVE_UP).await?;
        }
        tx.commit(now).await?;
        Ok(marked.len())
    }

    /// Removes what nobody needs any more, and counts what is left.
    async fn tidy(&self, now: Time) -> Result<()> {
        let after = self.swept.lock().clone();
        *self.swept.lock() = self.store.sweep_faults(&after, SWEPT_MAX, now).await?.unwrap_or_default();
        self.store.purge_notices(now - DEAD_LIFETIME, SWEPT_MAX).await?;
        let standing = Standing { faults: self.store.fault_counts(now).await?, outbox: self.store.notice_counts().await? };
        *self.standing.lock() = standing;
        Ok(())
    }
}

/// What is told alike: of tokens that have expired or not, on the same ways.
fn alike(followed: Vec<Followed>, marked: &HashMap<TokenId, i32>, now: Time) -> Vec<(Event, i32, Vec<Followed>)> {
    let mut groups: Vec<(Event, i32, Vec<Followed>)> = Vec::new();
    for followed in followed {
        let Some(ways) = marked.get(&followed.item.token_id).copied() else { continue };
        let event = if followed.item.expire_time <= now { Event::Expired } else { Event::Expiring };
        match groups.iter_mut().find(|group| (group.0, group.1) == (event, ways)) {
            Some((.., group)) => group.push(followed),
            None => groups.push((event, ways, vec![followed])),
        }
    }
    groups
}
