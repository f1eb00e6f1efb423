//! What a call of a webhook says, in JSON.

use serde_json::{Map, Value, json};

use crate::{
    ambient::Time,
    notice::{Brand, Item, Notice},
};

/// The JSON text of a webhook call. It says nothing of the attempt, so that it is the same at each.
#[must_use]
pub fn payload(notice: &Notice, brand: &Brand) -> String {
    let mut data = Map::new();
    let mut put = |name: &str, value: Value| data.insert(name.to_owned(), value);
    put("workspace", notice.workspace.as_str().into());
    put("workspace_display_name", brand.display_name.as_str().into());
    put("renew_url", brand.renew_url.as_str().into());
    if let Some(item) = notice.items.first() {
        put("token", token(item));
        put("actor", notice.actor.as_str().into());
        put("reason", notice.reason.as_str().into());
        if let Some(days) = item.days_before {
            put("days_before", days.into());
        }
    }
    json!({ "id": notice.id, "type": notice.event.name(), "timestamp": notice.create_time.to_string(), "data": data }).to_string()
}

fn token(item: &Item) -> Value {
    json!({
        "id": item.token_id.to_string(),
        "display_name": item.display_name,
        "hint": item.hint,
        "principal": item.principal,
        "principal_display_name": item.principal_name,
        "audiences": item.audiences,
        "create_time": item.create_time.to_string(),
        "expire_time": (item.expire_time != Time::NEVER).then(|| item.expire_time.to_string()),
        "last_used_time": item.last_used_time.map(|time| time.to_string()),
    })
}
