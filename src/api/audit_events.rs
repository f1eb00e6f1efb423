//! `AuditService`: what was done, as messages.

use prost_types::{ListValue, Struct, Value as WireValue, value::Kind};
use serde_json::{Map, Value};
use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    audit::{AuditRecord, AuditRequest},
    error::Violations,
    proto::{self, audit_service_server::AuditService},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl AuditService for Api {
    async fn list_audit_events(&self, request: Request<proto::ListAuditEventsRequest>) -> Answer<proto::ListAuditEventsResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let mut violations = Violations::default();
        let asked = AuditRequest {
            start_time: convert::optional_time("start_time", message.start_time.as_ref(), &mut violations),
            end_time: convert::optional_time("end_time", message.end_time.as_ref(), &mut violations),
            workspace: message.workspace,
            token_id: message.token_id,
            principal: message.principal,
            actor: message.actor,
            methods: message.methods,
            page_size: message.page_size,
            page_token: message.page_token,
            violations: Violations::default(),
        };
        let (events, next) = self.audit.list(&caller, AuditRequest { violations, ..asked }).await?;
        Ok(Response::new(proto::ListAuditEventsResponse {
            events: events.into_iter().map(shown).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }
}

fn shown(event: AuditRecord) -> proto::AuditEvent {
    proto::AuditEvent {
        id: event.id,
        workspace: event.workspace,
        event_time: convert::timestamp(event.event_time),
        method: event.method,
        code: event.code,
        actor_workspace: event.actor_workspace,
        actor_principal: event.actor_principal,
        actor_token_id: event.actor_token_id,
        actor_address: event.actor_address,
        token_id: event.token_id,
        principal: event.principal,
        reason: event.reason,
        before: event.before.map(wire_struct),
        after: event.after.map(wire_struct),
    }
}

fn wire_struct(settings: Map<String, Value>) -> Struct {
    Struct { fields: settings.into_iter().map(|(name, value)| (name, wire_value(value))).collect() }
}

fn wire_value(value: Value) -> WireValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(truth) => Kind::BoolValue(truth),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => Kind::ListValue(ListValue { values: values.into_iter().map(wire_value).collect() }),
        Value::Object(fields) => Kind::StructValue(wire_struct(fields)),
    };
    WireValue { kind: Some(kind) }
}
