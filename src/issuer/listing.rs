//! Lists of tokens, page by page.
//!
//! Invariant: a page token gets the next page of the list that it came from, and of no other (test
//! `page_tokens_are_bound_to_their_arguments`).

use super::{Issuer, settings};
use crate::{
    ambient::Time,
    caller::Caller,
    error::{Error, Result, Violations},
    grant::{Kind, ShownState, Token},
    rules,
    store::{Cursor, Filter, Order, OrderKey},
    token::{self, TokenId},
};

/// Tokens that are read at once: one may hold 60 KiB of settings.
const CHUNK: usize = 200;
/// A page stays below what clients take by default, 4 MiB.
const PAGE_BYTES_MAX: usize = 3 * 1024 * 1024;
/// What a token takes on a page beside its settings, at most.
const PAGE_TOKEN_BYTES: usize = 1_024;

/// Which tokens, how many, from where on, as it was asked for.
#[derive(Clone, Debug, Default)]
pub struct ListRequest {
    /// Empty: the caller's.
    pub workspace: String,
    /// Temporary rather than permanent ones.
    pub temporary: bool,
    /// Empty: any.
    pub principal: String,
    /// Empty: any.
    pub audience: String,
    /// None: any.
    pub states: Vec<ShownState>,
    /// Empty: any.
    pub created_by: String,
    /// Only those that end before this instant.
    pub expires_before: Option<Time>,
    /// Only those that were last used before this instant, or never.
    pub last_used_before: Option<Time>,
    /// Empty: any.
    pub query: String,
    /// Empty: newest first.
    pub order_by: String,
    /// 0: as usual.
    pub page_size: i32,
    /// Empty: the first page.
    pub page_token: String,
    /// As in [`NewToken`].
    pub violations: Violations,
}

impl Issuer {
    /// A page of tokens, and what gets the next one.
    ///
    /// # Errors
    /// `Invalid`, `NotFound` (the workspace), `Unavailable`, `Overloaded`.
    pub async fn list(&self, caller: &Caller, request: ListRequest, now: Time) -> Result<(Vec<Token>, Option<String>)> {
        let workspace = caller.workspace(&request.workspace)?.to_owned();
        let mut violations = request.violations;
        let order = violations.take("order_by", order(&request.order_by));
        let limit = violations.take("page_size", rules::page_size(request.page_size));
        let query = some(request.query).and_then(|query| violations.take("query", rules::query(&query)));
        let principal = some(request.principal).and_then(|id| violations.take("principal", rules::principal(&id)));
        let created_by = some(request.created_by).and_then(|id| violations.take("created_by", rules::principal(&id)));
        let audience = some(request.audience).and_then(|name| violations.take("audience", rules::audience(&name)));
        let filter = Filter {
            workspace,
            kind: if request.temporary { Kind::Temporary } else { Kind::Permanent },
            principal,
            audience,
            states: request.states,
            created_by,
            expires_before: request.expires_before,
            last_used_before: request.last_used_before,
            query,
        };
        let purpose = token::fingerprint(&[b"page", format!("{filter:?} {order:?}").as_bytes()]);
        let after = some(request.page_token).and_then(|text| violations.take("page_token", self.open_page(&purpose, &text)));
        violations.finish()?;
        let (Some(order), Some(limit)) = (order, limit) else {
            return Err(Error::Internal("a violation was lost".into()));
        };
        if *filter.workspace != *caller.workspace && self.store.brief(&filter.workspace).await?.is_none() {
            return Err(Error::NotFound("workspace"));
        }
        let (tokens, more) = self.read(&filter, order, after, limit, now).await?;
        let next = tokens.last().filter(|_| more).map(|last| self.seal_page(&purpose, &Cursor::after(last, order))).transpose()?;
        Ok((tokens, next))
    }

    /// Reads at most `limit` tokens, and no more than fit on a page; says whether there are more.
    async fn read(&self, filter: &Filter, order: Order, mut after: Option<Cursor>, limit: u64, now: Time) -> Result<(Vec<Token>, bool)> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut tokens, mut bytes) = (Vec::new(), 0);
        loop {
            let wanted = CHUNK.min(limit - tokens.len() + 1);
            let chunk = self.store.tokens(filter, order, after.as_ref(), u64::try_from(wanted).unwrap_or(u64::MAX), now).await?;
            let is_last = chunk.len() < wanted;
            for token in chunk {
                bytes += PAGE_TOKEN_BYTES + settings(&token).to_string().len();
                if tokens.len() == limit || (bytes > PAGE_BYTES_MAX && !tokens.is_empty()) {
                    return Ok((tokens, true));
                }
                after = Some(Cursor::after(&token, order));
                tokens.push(token);
            }
            if is_last {
                return Ok((tokens, false));
            }
        }
    }

    fn seal_page(&self, purpose: &[u8], cursor: &Cursor) -> Result<String> {
        self.keyring.seal_text(purpose, &format!("{} {}", cursor.id, cursor.key))
    }

    fn open_page(&self, purpose: &[u8], text: &str) -> std::result::Result<Cursor, &'static str> {
        let plain = self.keyring.open_text(purpose, text).ok_or(rules::PAGE_TOKEN)?;
        let (id, key) = plain.split_once(' ').ok_or(rules::PAGE_TOKEN)?;
        Ok(Cursor { id: TokenId::parse(id).ok_or(rules::PAGE_TOKEN)?, key: key.to_owned() })
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn order(text: &str) -> std::result::Result<Order, &'static str> {
    let (key, descending) = match text.strip_suffix(" desc") {
        Some(key) => (key, true),
        None => (text, text.is_empty()),
    };
    let key = match key {
        "" if text.is_empty() => OrderKey::CreateTime,
        "create_time" => OrderKey::CreateTime,
        "display_name" => OrderKey::DisplayName,
        "expire_time" => OrderKey::ExpireTime,
        _ => return Err("must be create_time, display_name or expire_time, each also with ` desc`"),
    };
    Ok(Order { key, descending })
}
