//! Writing use counts, many in a statement.

use std::net::IpAddr;

use sea_orm::{ConnectionTrait as _, DbBackend, Statement, Value};

use super::Store;
use crate::{ambient::Time, error::Result, token::TokenId};

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

impl UseDelta {
    fn ip(&self) -> String {
        self.last_ip.map(|ip| ip.to_string()).unwrap_or_default()
    }
}

impl Store {
    /// How many rows [`Store::add_uses`] takes at once. SQLite has a limit on parameters, and each row is four of them.
    #[must_use]
    pub fn uses_max(&self) -> usize {
        if self.backend() == DbBackend::Postgres { 10_000 } else { 5_000 }
    }

    /// Adds uses: all of them or none. If the database's answer is lost, nobody knows which.
    ///
    /// # Errors
    /// `Unavailable`, `Overloaded`.
    pub async fn add_uses(&self, deltas: &[UseDelta]) -> Result<()> {
        let (rows, values) = if self.backend() == DbBackend::Postgres { columns(deltas) } else { rows(deltas) };
        let newer = "excluded.last_used_time >= token_usage.last_used_time";
        let sql = format!(
            "INSERT INTO token_usage (token_id, use_count, last_used_time, last_used_ip) {rows} ON CONFLICT (token_id) DO UPDATE SET \
             use_count = token_usage.use_count + excluded.use_count, \
             last_used_time = CASE WHEN {newer} THEN excluded.last_used_time ELSE token_usage.last_used_time END, \
             last_used_ip = CASE WHEN {newer} THEN excluded.last_used_ip ELSE token_usage.last_used_ip END"
        );
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        self.writing("uses", async { self.writer.execute_raw(statement).await.map(drop) }).await
    }
}

/// A parameter for each column: PostgreSQL reads one short statement, however many rows there are.
fn columns(deltas: &[UseDelta]) -> (String, Vec<Value>) {
    let ids: Vec<String> = deltas.iter().map(|delta| delta.token_id.to_string()).collect();
    let counts: Vec<i64> = deltas.iter().map(|delta| delta.count).collect();
    let times: Vec<i64> = deltas.iter().map(|delta| delta.last_time.micros()).collect();
    let ips: Vec<String> = deltas.iter().map(UseDelta::ip).collect();
    let rows = "SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::text[])".to_owned();
    (rows, vec![ids.into(), counts.into(), times.into(), ips.into()])
}

/// A parameter for each column of each row.
fn rows(deltas: &[UseDelta]) -> (String, Vec<Value>) {
    let row = |delta: &UseDelta| -> [Value; 4] {
        [delta.token_id.to_string().into(), delta.count.into(), delta.last_time.micros().into(), delta.ip().into()]
    };
    let rows = format!("VALUES {}", vec!["(?, ?, ?, ?)"; deltas.len()].join(", "));
    (rows, deltas.iter().flat_map(row).collect())
}
