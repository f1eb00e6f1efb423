//! `SelfService`: what the bearer of a token asks and does about themselves.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert, tokens};
use crate::{
    error::Violations,
    issuer::{ListRequest, NewToken, RequestId},
    proto::{self, create_my_token_request as create, self_service_server::SelfService},
    rules::Lifetime,
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl SelfService for Api {
    async fn who_am_i(&self, request: Request<proto::WhoAmIRequest>) -> Answer<proto::WhoAmIResponse> {
        let (Call { caller, now, .. }, _) = call(request)?;
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
        let (Call { caller, now, .. }, message) = call(request)?;
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
        let (Call { caller, now, deadline }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let grace = convert::grace(message.grace.as_ref());
        let (done, propagation) = self.in_force(self.issuer.regenerate_self(caller, grace, request, now).await?, deadline).await;
        Ok(Response::new(proto::RegenerateSelfResponse {
            token: Some(convert::token(done.token, now)),
            secret: done.secret.reveal().to_owned(),
            propagation,
            grace_time: done.grace_time.and_then(convert::timestamp),
        }))
    }

    async fn revoke_self(&self, request: Request<proto::RevokeSelfRequest>) -> Answer<proto::RevokeSelfResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let (token, propagation) = self.in_force(self.issuer.revoke_self(caller, &message.reason, now).await?, deadline).await;
        Ok(Response::new(proto::RevokeSelfResponse { token: Some(convert::token(token, now)), propagation }))
    }

    async fn create_my_token(&self, request: Request<proto::CreateMyTokenRequest>) -> Answer<proto::CreateMyTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let ((token, secret), propagation) =
            self.in_force(self.issuer.create_own(caller, my_token(message), request, now).await?, deadline).await;
        Ok(Response::new(proto::CreateMyTokenResponse {
            token: Some(convert::token(token, now)),
            secret: secret.reveal().to_owned(),
            propagation,
        }))
    }

    async fn issue_temporary_token(
        &self,
        request: Request<proto::IssueTemporaryTokenRequest>,
    ) -> Answer<proto::IssueTemporaryTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let mut violations = Violations::default();
        let new = NewToken {
            lifetime: message.ttl.map_or(Lifetime::Usual, |ttl| tokens::lifetime_for(&ttl, &mut violations)),
            display_name: message.display_name,
            scopes: message.scopes,
            audiences: message.audiences,
            session_id: message.session_id,
            ..NewToken::default()
        };
        let ((token, secret), propagation) =
            self.in_force(self.issuer.issue_temporary(caller, NewToken { violations, ..new }, request, now).await?, deadline).await;
        Ok(Response::new(proto::IssueTemporaryTokenResponse {
            token: Some(convert::token(token, now)),
            secret: secret.reveal().to_owned(),
            propagation,
        }))
    }

    async fn end_session(&self, request: Request<proto::EndSessionRequest>) -> Answer<proto::EndSessionResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let (revoked, propagation) =
            self.in_force(self.issuer.end_session(caller, &message.workspace, &message.session_id, now).await?, deadline).await;
        Ok(Response::new(proto::EndSessionResponse { revoked_count: i32::try_from(revoked).unwrap_or(i32::MAX), propagation }))
    }

    async fn report_leaked_tokens(&self, request: Request<proto::ReportLeakedTokensRequest>) -> Answer<proto::ReportLeakedTokensResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        self.issuer.report_leaked(&message.tokens, caller.address, now).await?;
        Ok(Response::new(proto::ReportLeakedTokensResponse {}))
    }
}

fn my_token(message: proto::CreateMyTokenRequest) -> NewToken {
    let mut violations = Violations::default();
    let lifetime = match message.lifetime {
        None => Lifetime::Usual,
        Some(create::Lifetime::Ttl(ttl)) => tokens::lifetime_for(&ttl, &mut violations),
        Some(create::Lifetime::ExpireTime(end)) => tokens::lifetime_until(&end, &mut violations),
        Some(create::Lifetime::ExpireDate(day)) => tokens::lifetime_until_day(&day, &mut violations),
        Some(create::Lifetime::Never(is_set)) => tokens::lifetime_never(is_set, &mut violations),
    };
    NewToken {
        display_name: message.display_name,
        scopes: message.scopes,
        audiences: message.audiences,
        allowed_cidrs: message.allowed_cidrs,
        metadata: message.metadata,
        lifetime,
        violations,
        ..NewToken::default()
    }
}
