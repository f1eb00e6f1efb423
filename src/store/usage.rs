//! Writing use counts, many in a statement.

use std::net::IpAddr;

use sea_orm::{
    ActiveValue::Set,
    EntityTrait as _,
    sea_query::{Expr, OnConflict},
};

use super::{Store, entity::usage};
use crate::{ambient::Time, error::Result, token::TokenId};

/// Tokens whose uses are written at once: below the databases' limits on parameters.
const ROWS_MAX: usize = 5_000;

/// Uses of one token that the store does not know of yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UseDelta {
    /// The token.
    pub token_id: TokenId,
    /// How many.
    pub count: i64,
    /// The last one.
    pub last_time: Time,
    /// Where it came from, if that was said.
    pub last_ip: Option<IpAddr>,
}

impl Store {
    /// How many rows [`Store::add_uses`] takes at once.
    #[must_use]
    pub fn uses_max(&self) -> usize {
        ROWS_MAX
    }

    /// Adds uses: all of them or none. If the database's answer is lost, nobody knows which.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn add_uses(&self, deltas: &[UseDelta]) -> Result<()> {
        let insert = usage::Entity::insert_many(deltas.iter().map(row)).on_conflict(addition());
        self.writing("uses", async { insert.exec_without_returning(&self.writer).await.map(drop) }).await
    }
}

fn row(delta: &UseDelta) -> usage::ActiveModel {
    usage::ActiveModel {
        token_id: Set(delta.token_id.to_string()),
        use_count: Set(delta.count),
        last_used_time: Set(delta.last_time.micros()),
        last_used_ip: Set(delta.last_ip.map(|ip| ip.to_string()).unwrap_or_default()),
    }
}

fn addition() -> OnConflict {
    let newer = |column: &str| {
        let case =
            format!("CASE WHEN excluded.last_used_time >= token_usage.last_used_time THEN excluded.{column} ELSE token_usage.{column} END");
        Expr::cust(case)
    };
    OnConflict::column(usage::Column::TokenId)
        .value(usage::Column::UseCount, Expr::cust("token_usage.use_count + excluded.use_count"))
        .value(usage::Column::LastUsedTime, newer("last_used_time"))
        .value(usage::Column::LastUsedIp, newer("last_used_ip"))
        .to_owned()
}
