//! Removing tokens that ended long ago, a few at a time.

use sea_orm::{ConnectionTrait as _, Statement, Value};

use super::{Store, Tx, damaged, translate};
use crate::{
    ambient::Time,
    error::Result,
    token::{Digest, TokenId},
};

/// A token that nobody needs any more, with its digests.
#[derive(Debug)]
pub struct Expendable {
    /// Its id.
    pub id: TokenId,
    /// Its workspace.
    pub workspace: String,
    /// What it may still be known by.
    pub digests: Vec<Digest>,
}

impl Store {
    /// Tokens that expired, were revoked or were deleted, whatever of it came last, before an instant; at most `limit`.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn ended_tokens(&self, before: Time, limit: u64) -> Result<Vec<Expendable>> {
        for condition in [
            "expire_time + 0 <= $1 AND expire_time < 9223372036854775807 AND COALESCE(revoke_time, 0) <= $1 \
             AND COALESCE(delete_time, 0) <= $1 ORDER BY expire_time + 0",
            "revoke_time <= $1 AND revoke_time IS NOT NULL AND COALESCE(delete_time, 0) <= $1 ORDER BY revoke_time",
            "delete_time <= $1 AND delete_time IS NOT NULL ORDER BY delete_time",
        ] {
            let found = self.expendable(condition, before.micros().into(), limit).await?;
            if !found.is_empty() {
                return Ok(found);
            }
        }
        Ok(Vec::new())
    }

    /// Tokens of a workspace; at most `limit`.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn tokens_of_workspace(&self, workspace: &str, limit: u64) -> Result<Vec<Expendable>> {
        self.expendable("workspace = $1 AND delete_time IS NULL", workspace.into(), limit).await
    }

    async fn expendable(&self, condition: &str, value: Value, limit: u64) -> Result<Vec<Expendable>> {
        let sql = format!("SELECT id, digest, previous_digest, workspace FROM token WHERE {condition} LIMIT {limit}");
        let rows = self.reading("ended", self.reader.query_all_raw(Statement::from_sql_and_values(self.backend(), sql, [value]))).await?;
        rows.iter()
            .map(|row| {
                let id: String = row.try_get_by_index(0).map_err(translate)?;
                let digest: Vec<u8> = row.try_get_by_index(1).map_err(translate)?;
                let previous: Option<Vec<u8>> = row.try_get_by_index(2).map_err(translate)?;
                let digests = std::iter::once(digest).chain(previous);
                let digests = digests.map(|bytes| Digest::from_slice(&bytes).ok_or_else(|| damaged("token.digest")));
                Ok(Expendable {
                    id: TokenId::parse(&id).ok_or_else(|| damaged("token.id"))?,
                    workspace: row.try_get_by_index(3).map_err(translate)?,
                    digests: digests.collect::<Result<_>>()?,
                })
            })
            .collect()
    }
}

impl Tx<'_> {
    /// Removes tokens, with their audiences, their use counts and their faults. Their audit stays.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn purge_tokens(&mut self, tokens: &[Expendable]) -> Result<()> {
        for token in tokens {
            self.touch_token(token.id, &token.workspace, &token.digests);
        }
        // The tokens first, as everybody does who holds them and notes something of them.
        let places = (1..=tokens.len()).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
        for (table, column) in [
            ("token", "id"),
            ("token_audience", "token_id"),
            ("token_usage", "token_id"),
            ("notice_mark", "token_id"),
            ("fault", "token_id"),
        ] {
            let values = tokens.iter().map(|token| Value::from(token.id.to_string())).collect();
            self.execute(&format!("DELETE FROM {table} WHERE {column} IN ({places})"), values).await?;
        }
        Ok(())
    }
}
