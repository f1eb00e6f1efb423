//! Many tokens ended at once: those of a principal, of a session, and those that leaked.
//!
//! Invariant: a report of leaked tokens is answered alike, and after the same time, whatever the texts are (test
//! `a_report_does_not_tell_a_live_token_from_any_other_text`).

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::OwnedSemaphorePermit;

use super::{Issuer, end, end_watch, event, tell_of, watch_root};
use crate::{
    ambient::{self, Time},
    caller::{Access, Caller},
    error::{Error, Result, Violations},
    fence::Changed,
    grant::{State, Token},
    notice::Event,
    notices::News,
    rules,
    store::Tx,
    token::Digest,
};

/// The method by which anybody ends tokens that they hold.
const REPORT: &str = "ReportLeakedTokens";
const REPORTED_MAX: usize = 100;
const REPORTED_CHARS_MAX: usize = 256;
/// A report is answered after this time: longer than a change takes, so that nobody sees whether there was one.
const REPORT_TIME: Duration = Duration::from_millis(500);
/// How long it is waited at most before a report is tried again.
const REPORT_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Reports that are not done yet, whatever is in them.
pub(super) const REPORTS_MAX: usize = 256;

/// Who ends tokens, by which method, and why.
#[derive(Clone, Copy)]
pub(crate) struct Ending<'a> {
    pub(crate) method: &'static str,
    pub(crate) actor: Option<&'a Caller>,
    pub(crate) reason: &'a str,
}

/// Ends tokens that were read as live, with an audit row for each.
pub(crate) async fn end_all(tx: &mut Tx<'_>, live: &[(Token, Vec<Digest>)], ending: Ending<'_>, now: Time) -> Result<()> {
    let Ending { method, actor, reason } = ending;
    tx.revoke_tokens(live, reason, now).await?;
    let told = if method == REPORT { Event::Leaked } else { Event::Revoked };
    let tokens: Vec<&Token> = live.iter().map(|(token, _)| token).collect();
    tell_of(tx, News { event: told, actor, reason }, &tokens, now).await?;
    tx.audit(live.iter().map(|(token, _)| {
        let mut ended = token.clone();
        end(&mut ended, reason, now);
        ended.version += 1;
        event(method, actor, token, reason, Some(token), Some(&ended), now)
    }))
    .await
}

impl Issuer {
    /// Ends every live token of a principal, and says how many.
    ///
    /// # Errors
    /// `Invalid`, `Denied` (one of them holds more than the caller), `NotFound` (the workspace), `Precondition` (the last root token), `Unavailable`,
    /// `Overloaded`: then none is ended.
    pub async fn revoke_principal(
        self: &Arc<Self>,
        caller: Caller,
        workspace: &str,
        principal: &str,
        reason: &str,
        now: Time,
    ) -> Result<Changed<usize>> {
        let workspace = caller.workspace(workspace)?.to_owned();
        let mut violations = Violations::default();
        violations.take("principal", rules::principal(principal));
        let reason = violations.take("reason", rules::reason(reason)).unwrap_or_default();
        violations.finish()?;
        let (issuer, principal) = (Arc::clone(self), principal.to_owned());
        self.fence
            .run(async move {
                let mut tx = issuer.store.begin_change_by(&caller, now).await?;
                tx.brief(&workspace).await?.ok_or(Error::NotFound("workspace"))?;
                // Whoever creates a token of this principal has its lock: they are through, or come after this.
                tx.principal(&workspace, &principal).await?;
                let live = tx.live_tokens(&workspace, &principal, now).await?;
                for (token, _) in &live {
                    caller.outranks(&token.scopes)?;
                }
                let watch = watch_root(&tx, &caller, live.iter().map(|(token, _)| token), now).await?;
                let ending = Ending { method: "RevokePrincipalTokens", actor: Some(&caller), reason: &reason };
                end_all(&mut tx, &live, ending, now).await?;
                end_watch(watch, &tx).await?;
                Ok(issuer.fence.conclude(tx, now).await?.of(live.len()))
            })
            .await
    }

    /// Ends every live token of a login session, and says how many: an administrator those of everybody, anybody else those of their own principal.
    ///
    /// # Errors
    /// `Invalid`, `Denied`, `NotFound` (the workspace), `Precondition` (no session is named, and the caller is bound to none), `Unavailable`, `Overloaded`.
    pub async fn end_session(self: &Arc<Self>, caller: Caller, workspace: &str, session_id: &str, now: Time) -> Result<Changed<usize>> {
        let workspace = caller.workspace(workspace)?.to_owned();
        rules::session(session_id).map_err(|rule| Error::invalid("session_id", rule))?;
        let own = if caller.token_id.is_some() { self.presented(&caller).await?.session_id } else { String::new() };
        let session_id = if session_id.is_empty() { own.clone() } else { session_id.to_owned() };
        if session_id.is_empty() {
            return Err(Error::precondition("the caller is not bound to a session: name one in session_id"));
        }
        let is_own = session_id == own && *workspace == *caller.workspace;
        if !is_own && caller.authorize(Access::Own).is_err() {
            let rule = "another session than that of the presented token needs keyward:self, keyward:admin or keyward:root";
            return Err(Error::Denied(rule.to_owned()));
        }
        let issuer = Arc::clone(self);
        self.fence
            .run(async move {
                let mut tx = issuer.store.begin_change_by(&caller, now).await?;
                tx.brief(&workspace).await?.ok_or(Error::NotFound("workspace"))?;
                let principal = Some(&*caller.principal).filter(|_| !caller.is_admin());
                let ending = Ending { method: "EndSession", actor: Some(&caller), reason: "SESSION_ENDED" };
                let mut ended = 0;
                // Ending a token waits for those that it is just creating: after that they are there to be seen.
                loop {
                    let live = tx.live_session(&workspace, &session_id, principal, now).await?;
                    if live.is_empty() {
                        break;
                    }
                    for (token, _) in live.iter().filter(|(token, _)| !is_own || *token.principal != *caller.principal) {
                        caller.outranks(&token.scopes)?;
                    }
                    let watch = watch_root(&tx, &caller, live.iter().map(|(token, _)| token), now).await?;
                    end_all(&mut tx, &live, ending, now).await?;
                    end_watch(watch, &tx).await?;
                    ended += live.len();
                }
                Ok(issuer.fence.conclude(tx, now).await?.of(ended))
            })
            .await
    }

    /// Ends the tokens that are among these texts. The answer comes after the same time, and does not say whether there were any, nor whether they are ended
    /// already: if the store is away or busy, that is tried again until it is done.
    ///
    /// # Errors
    /// `Invalid`; `Overloaded`, if too many reports are not done yet.
    pub async fn report_leaked(self: &Arc<Self>, texts: &[String], address: Option<IpAddr>, now: Time) -> Result<()> {
        check_report(texts)?;
        let permit = Arc::clone(&self.reports).try_acquire_owned();
        let permit = permit.map_err(|_| Error::Overloaded("too many reports are under way; try again"))?;
        let mut digests: Vec<Digest> = texts.iter().filter_map(|text| self.keyring.prove(text.trim().as_bytes())).collect();
        digests.sort_unstable_by_key(|digest| *digest.as_bytes());
        digests.dedup();
        tokio::spawn(end_in_the_end(Arc::downgrade(self), digests, address, now, permit));
        tokio::time::sleep(REPORT_TIME).await;
        Ok(())
    }

    /// Waits for the reports that are not done yet.
    pub async fn finish_reports(&self) {
        let all = u32::try_from(REPORTS_MAX).unwrap_or(u32::MAX);
        // It is never closed.
        let _all = self.reports.acquire_many(all).await;
    }

    async fn end_leaked(self: &Arc<Self>, mut digests: Vec<Digest>, address: Option<IpAddr>, now: Time) -> Result<()> {
        if digests.is_empty() {
            // The store is asked in any case, so that an outage looks the same whatever was reported.
            digests.extend(Digest::from_slice(&ambient::random::<24>()?));
        }
        if self.store.facts(&digests).await?.iter().all(|(_, grant)| grant.state() == State::Revoked) {
            return Ok(());
        }
        let reporter = Caller::nobody(address);
        let ending = Ending { method: REPORT, actor: Some(&reporter), reason: "LEAKED" };
        let mut tx = self.store.begin_change().await?;
        let mut live: BTreeMap<String, Vec<(Token, Vec<Digest>)>> = BTreeMap::new();
        for digest in &digests {
            let Some((token, known, is_present)) = tx.token_of_digest(digest).await? else { continue };
            if !is_present {
                // Whoever regenerated the token may have done so because of the leak: the new secret stays.
                tx.end_grace(&token, &known).await?;
                tx.audit([event(ending.method, ending.actor, &token, ending.reason, Some(&token), Some(&token), now)]).await?;
            } else if token.state != State::Revoked {
                live.entry(token.workspace.clone()).or_default().push((token, known));
            }
        }
        for live in live.values() {
            end_all(&mut tx, live, ending, now).await?;
        }
        self.fence.conclude(tx, now).await.map(drop)
    }
}

/// Ends reported tokens, however long the store is away.
async fn end_in_the_end(issuer: Weak<Issuer>, digests: Vec<Digest>, address: Option<IpAddr>, now: Time, permit: OwnedSemaphorePermit) {
    let mut pause = REPORT_TIME;
    while let Some(issuer) = issuer.upgrade() {
        let ended = issuer.end_leaked(digests.clone(), address, now).await;
        drop(issuer);
        match ended {
            Ok(()) => break,
            Err(error @ (Error::Unavailable(_) | Error::Overloaded(_))) => {
                if pause == REPORT_TIME {
                    tracing::warn!(%error, "reported tokens could not be ended; it is tried until it is done");
                }
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(REPORT_PAUSE_MAX);
            }
            Err(error) => {
                let below = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::error!(%error, below, "reported tokens were not ended");
                break;
            }
        }
    }
    drop(permit);
}

fn check_report(texts: &[String]) -> Result<()> {
    let mut violations = Violations::default();
    if !(1..=REPORTED_MAX).contains(&texts.len()) {
        violations.add("tokens", format!("must hold 1 to {REPORTED_MAX} entries; it has {}", texts.len()));
    }
    for (index, _) in texts.iter().enumerate().filter(|(_, text)| text.chars().count() > REPORTED_CHARS_MAX).take(REPORTED_MAX) {
        violations.add(format!("tokens[{index}]"), format!("must be at most {REPORTED_CHARS_MAX} characters"));
    }
    violations.finish()
}
