//! Answers that are kept for a while, so that a call whose answer was lost can be repeated safely.
//!
//! Invariant: a kept answer opens for the same caller, method and `request_id` only, and for the same request (test
//! `a_repeated_request_id_gets_the_first_answer`).

use std::time::Duration;

use super::Issuer;
use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result},
    grant::Token,
    rules,
    store::{Claim, Tx},
    token::{self, Secret, TokenId},
};

/// How long the answer to a `request_id` is kept.
const REPLAY_LIFETIME: Duration = Duration::from_mins(10);

/// A caller's own name for a request, and what tells it from other requests.
#[derive(Clone, Debug)]
pub struct RequestId {
    /// The name; empty: the call is not to be repeated safely.
    pub id: String,
    /// The request's own bytes.
    pub request: Vec<u8>,
}

/// What is kept of the answer to a `request_id`.
pub(super) struct Kept {
    pub(super) id: TokenId,
    pub(super) secret: Secret,
    pub(super) grace_time: Option<Time>,
}

impl Kept {
    fn read(plain: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(plain).ok()?.split(' ');
        let id = TokenId::parse(words.next()?)?;
        let secret = Secret::from(words.next()?.to_owned());
        let grace: i64 = words.next()?.parse().ok()?;
        Some(Self { id, secret, grace_time: (grace > 0).then(|| Time::from_micros(grace)) })
    }
}

pub(super) enum Replay {
    /// The first call; with the key to keep its answer under, if it is to be kept.
    New(Option<[u8; 32]>),
    /// It was answered before.
    Answered(Kept),
}

impl RequestId {
    /// Whether there is a name that an answer can be kept under.
    pub(super) fn is_named(&self) -> bool {
        rules::request_id(&self.id).is_ok()
    }
}

impl Issuer {
    pub(super) async fn claim(&self, tx: &Tx<'_>, method: &str, caller: &Caller, request: &RequestId, now: Time) -> Result<Replay> {
        if request.id.is_empty() {
            return Ok(Replay::New(None));
        }
        let actor = caller.token_id.map(|id| id.to_string()).unwrap_or_default();
        let key = token::fingerprint(&[
            method.as_bytes(),
            caller.workspace.as_bytes(),
            caller.principal.as_bytes(),
            actor.as_bytes(),
            request.id.as_bytes(),
        ]);
        match tx.claim(&key, &token::fingerprint(&[&request.request]), now + REPLAY_LIFETIME, now).await? {
            Claim::Mine => Ok(Replay::New(Some(key))),
            Claim::Misused => Err(Error::invalid("request_id", "was used for another request within the last 10 minutes; take a new one")),
            Claim::Answered(sealed) => {
                let kept = self.keyring.open(&key, &sealed).and_then(|plain| Kept::read(&plain));
                kept.map(Replay::Answered).ok_or_else(|| Error::Internal("a kept answer does not open".into()))
            }
        }
    }

    pub(super) async fn keep(
        &self,
        tx: &Tx<'_>,
        replay: Option<[u8; 32]>,
        id: TokenId,
        secret: &Secret,
        grace_time: Option<Time>,
    ) -> Result<()> {
        match replay {
            None => Ok(()),
            Some(key) => {
                let plain = zeroize::Zeroizing::new(format!("{id} {} {}", secret.reveal(), grace_time.map_or(0, Time::micros)));
                tx.keep_answer(&key, self.keyring.seal(&key, plain.as_bytes())?).await
            }
        }
    }
}

/// The token of a kept answer, as it is now. Its secret is not for a caller who has been lowered below it since.
pub(super) async fn answer_again(kept: &Kept, caller: &Caller, own: bool, tx: &Tx<'_>) -> Result<Token> {
    let (token, _) = tx.token(kept.id, caller.management_reach()).await?.ok_or(Error::NotFound("token"))?;
    if !own {
        caller.outranks(&token.scopes)?;
    }
    Ok(token)
}
