//! Which tokens have reached a step that was not told.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{GIVE_UP, Notices, Standing, tell};
use crate::{
    ambient::Time,
    error::{Error, Result},
    notice::{Event, Wishes},
    store::Followed,
    token::{self, TokenId},
};

/// Tokens that one transaction tells of.
const TOLD_MAX: usize = 500;
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
    /// The first failure, when all others are done; `Unavailable` and `Overloaded` at once. What was not told is told by the next scan.
    pub async fn scan(self: &Arc<Self>, now: Time) -> Result<usize> {
        let (mut told, mut failure) = (0, None);
        for (workspace, wishes) in self.store.wishes().await? {
            match self.scan_workspace(&workspace, &wishes, now).await {
                Ok(count) => told += count,
                Err(error @ (Error::Unavailable(_) | Error::Overloaded(_))) => return Err(error),
                Err(error) => failure = failure.or(Some(error)),
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

    /// The step is noted as told, its fault raised and the outbox filled in one transaction: all of it, or nothing.
    async fn tell_steps(&self, workspace: &str, wishes: &Wishes, ids: &[TokenId], now: Time) -> Result<usize> {
        let tx = self.store.begin_unnumbered().await?;
        let mut followed = tx.followed(ids).await?;
        for Followed { item, .. } in &mut followed {
            item.days_before = wishes.step(item.expire_time, now);
        }
        let marks: Vec<(TokenId, Time, u16)> =
            followed.iter().filter_map(|Followed { item, .. }| Some((item.token_id, item.expire_time, item.days_before?))).collect();
        let marked = tx.mark_steps(&marks).await?;
        let marks: HashMap<TokenId, (Time, u16)> =
            marks.into_iter().filter(|(id, ..)| marked.contains(id)).map(|(id, end, days)| (id, (end, days))).collect();
        followed.retain(|followed| marks.contains_key(&followed.item.token_id));
        if followed.is_empty() {
            return Ok(0);
        }
        if wishes.raise_faults {
            let fault = |(id, (end, days)): (&TokenId, &(Time, u16))| Ok((token::fault_id(now)?, *id, *end, *days));
            tx.raise_faults(workspace, &marks.iter().map(fault).collect::<Result<Vec<_>>>()?, now).await?;
        }
        let (expired, expiring): (Vec<Followed>, Vec<Followed>) =
            followed.into_iter().partition(|followed| followed.item.expire_time <= now);
        for (event, followed) in [(Event::Expired, expired), (Event::Expiring, expiring)] {
            if !followed.is_empty() {
                let news = tell::News { event, actor: None, reason: "" };
                tx.add_notices(&tell::compose(workspace, wishes, news, followed, now)?, now + GIVE_UP).await?;
            }
        }
        tx.commit(now).await?;
        Ok(marks.len())
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
