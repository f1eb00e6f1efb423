//! `SelfService`: what the bearer of a token asks and does about themselves.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    error::Violations,
    issuer::{ListRequest, RequestId},
    proto::{self, self_service_server::SelfService},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl SelfService for Api {
    async fn who_am_i(&self, request: Request<proto::WhoAmIRequest>) -> Answer<proto::WhoAmIResponse> {
        let (Call { caller, now }, _) = call(request)?;
        let token = match caller.token_id {
            Some(_) => Some(convert::token(self.issuer.presented(&caller).await?, now)),
            None => None,
        };
        Ok(Response::new(proto::WhoAmIResponse {
            token,
            workspace: caller.workspace.to_string(),
            principal: caller.principal.to_string(),
            scopes: convert::scope_texts(caller.scopes.iter()),
        }))
    }

    async fn list_my_tokens(&self, request: Request<proto::ListMyTokensRequest>) -> Answer<proto::ListMyTokensResponse> {
        let (Call { caller, now }, message) = call(request)?;
        let mut violations = Violations::default();
        let mine = ListRequest {
            workspace: caller.workspace.to_string(),
            principal: caller.principal.to_string(),
            temporary: convert::is_temporary("kind", message.kind, &mut violations),
            states: convert::states("states", &message.states, &mut violations),
            query: message.query,
            order_by: message.order_by,
            page_size: message.page_size,
            page_token: message.page_token,
            ..ListRequest::default()
        };
        let (tokens, next) = self.issuer.list(&caller, ListRequest { violations, ..mine }, now).await?;
        Ok(Response::new(proto::ListMyTokensResponse {
            tokens: tokens.into_iter().map(|token| convert::token(token, now)).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn regenerate_self(&self, request: Request<proto::RegenerateSelfRequest>) -> Answer<proto::RegenerateSelfResponse> {
        let (Call { caller, now }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let grace = convert::grace(message.grace.as_ref());
        let done = self.issuer.regenerate_self(caller, grace, request, now).await?;
        Ok(Response::new(proto::RegenerateSelfResponse {
            token: Some(convert::token(done.token, now)),
            secret: done.secret.reveal().to_owned(),
            propagation: Some(convert::complete()),
            grace_time: done.grace_time.and_then(convert::timestamp),
        }))
    }

    async fn revoke_self(&self, request: Request<proto::RevokeSelfRequest>) -> Answer<proto::RevokeSelfResponse> {
        let (Call { caller, now }, message) = call(request)?;
        let token = self.issuer.revoke_self(caller, &message.reason, now).await?;
        Ok(Response::new(proto::RevokeSelfResponse { token: Some(convert::token(token, now)), propagation: Some(convert::complete()) }))
    }
}
