//! `TokenService`: messages in, one domain method, messages out.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    ambient::Time,
    error::Violations,
    issuer::{ListRequest, NewToken, RequestId, Target, TokenPatch},
    proto::{self, create_token_request as create, token_service_server::TokenService},
    rules::Lifetime,
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl TokenService for Api {
    async fn create_token(&self, request: Request<proto::CreateTokenRequest>) -> Answer<proto::CreateTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let ((token, secret), propagation) =
            self.in_force(self.issuer.create(caller, new_token(message), request, now).await?, deadline).await;
        Ok(Response::new(proto::CreateTokenResponse {
            token: Some(convert::token(token, now)),
            secret: secret.reveal().to_owned(),
            propagation,
        }))
    }

    async fn get_token(&self, request: Request<proto::GetTokenRequest>) -> Answer<proto::GetTokenResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let token = self.issuer.get(&caller, &message.id).await?;
        Ok(Response::new(proto::GetTokenResponse { token: Some(convert::token(token, now)) }))
    }

    async fn list_tokens(&self, request: Request<proto::ListTokensRequest>) -> Answer<proto::ListTokensResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let (tokens, next) = self.issuer.list(&caller, list_request(message), now).await?;
        Ok(Response::new(proto::ListTokensResponse {
            tokens: tokens.into_iter().map(|token| convert::token(token, now)).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn update_token(&self, request: Request<proto::UpdateTokenRequest>) -> Answer<proto::UpdateTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let (target, patch) = patch(message);
        let (token, propagation) = self.in_force(self.issuer.update(caller, target, patch, now).await?, deadline).await;
        Ok(Response::new(proto::UpdateTokenResponse { token: Some(convert::token(token, now)), propagation }))
    }

    async fn activate_token(&self, request: Request<proto::ActivateTokenRequest>) -> Answer<proto::ActivateTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = Target { id: message.id, etag: message.etag };
        let (token, propagation) = self.in_force(self.issuer.activate(caller, target, now).await?, deadline).await;
        Ok(Response::new(proto::ActivateTokenResponse { token: Some(convert::token(token, now)), propagation }))
    }

    async fn deactivate_token(&self, request: Request<proto::DeactivateTokenRequest>) -> Answer<proto::DeactivateTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = Target { id: message.id, etag: message.etag };
        let (token, propagation) = self.in_force(self.issuer.deactivate(caller, target, now).await?, deadline).await;
        Ok(Response::new(proto::DeactivateTokenResponse { token: Some(convert::token(token, now)), propagation }))
    }

    async fn revoke_token(&self, request: Request<proto::RevokeTokenRequest>) -> Answer<proto::RevokeTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = Target { id: message.id, etag: message.etag };
        let (token, propagation) = self.in_force(self.issuer.revoke(caller, target, &message.reason, now).await?, deadline).await;
        Ok(Response::new(proto::RevokeTokenResponse { token: Some(convert::token(token, now)), propagation }))
    }

    async fn regenerate_token(&self, request: Request<proto::RegenerateTokenRequest>) -> Answer<proto::RegenerateTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let request = RequestId { id: message.request_id.clone(), request: prost::Message::encode_to_vec(&message) };
        let grace = convert::grace(message.grace.as_ref());
        let target = Target { id: message.id, etag: message.etag };
        let (done, propagation) = self.in_force(self.issuer.regenerate(caller, target, grace, request, now).await?, deadline).await;
        Ok(Response::new(proto::RegenerateTokenResponse {
            token: Some(convert::token(done.token, now)),
            secret: done.secret.reveal().to_owned(),
            propagation,
            grace_time: done.grace_time.and_then(convert::timestamp),
        }))
    }

    async fn delete_token(&self, request: Request<proto::DeleteTokenRequest>) -> Answer<proto::DeleteTokenResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let deleted = self.issuer.delete(caller, Target { id: message.id, etag: message.etag }, now).await?;
        let ((), propagation) = self.in_force(deleted, deadline).await;
        Ok(Response::new(proto::DeleteTokenResponse { propagation }))
    }

    async fn revoke_principal_tokens(
        &self,
        request: Request<proto::RevokePrincipalTokensRequest>,
    ) -> Answer<proto::RevokePrincipalTokensResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let (revoked, propagation) = self
            .in_force(self.issuer.revoke_principal(caller, &message.workspace, &message.principal, &message.reason, now).await?, deadline)
            .await;
        Ok(Response::new(proto::RevokePrincipalTokensResponse { revoked_count: i32::try_from(revoked).unwrap_or(i32::MAX), propagation }))
    }
}

fn new_token(message: proto::CreateTokenRequest) -> NewToken {
    let mut violations = Violations::default();
    let temporary = convert::is_temporary("kind", message.kind, &mut violations);
    let lifetime = match message.lifetime {
        None => Lifetime::Usual,
        Some(create::Lifetime::Ttl(ttl)) => lifetime_for(&ttl, &mut violations),
        Some(create::Lifetime::ExpireTime(end)) => lifetime_until(&end, &mut violations),
        Some(create::Lifetime::ExpireDate(day)) => lifetime_until_day(&day, &mut violations),
        Some(create::Lifetime::Never(is_set)) => lifetime_never(is_set, &mut violations),
    };
    NewToken {
        workspace: message.workspace,
        display_name: message.display_name,
        principal: message.principal,
        temporary,
        scopes: message.scopes,
        audiences: message.audiences,
        allowed_cidrs: message.allowed_cidrs,
        metadata: message.metadata,
        session_id: message.session_id,
        end_max: None,
        lifetime,
        violations,
    }
}

pub(super) fn lifetime_for(ttl: &prost_types::Duration, violations: &mut Violations) -> Lifetime {
    violations.take("ttl", convert::span(ttl)).map_or(Lifetime::Usual, Lifetime::For)
}

pub(super) fn lifetime_until(end: &prost_types::Timestamp, violations: &mut Violations) -> Lifetime {
    violations.take("expire_time", convert::time(end)).map_or(Lifetime::Usual, Lifetime::Until)
}

pub(super) fn lifetime_until_day(day: &str, violations: &mut Violations) -> Lifetime {
    violations.take("expire_date", convert::day(day)).map_or(Lifetime::Usual, Lifetime::UntilDay)
}

pub(super) fn lifetime_never(is_set: bool, violations: &mut Violations) -> Lifetime {
    if is_set {
        return Lifetime::Never;
    }
    violations.add("never", "must be true, or left out");
    Lifetime::Usual
}

fn list_request(message: proto::ListTokensRequest) -> ListRequest {
    let mut violations = Violations::default();
    let request = ListRequest {
        temporary: convert::is_temporary("kind", message.kind, &mut violations),
        states: convert::states("states", &message.states, &mut violations),
        expires_before: convert::optional_time("expires_before", message.expires_before.as_ref(), &mut violations),
        last_used_before: convert::optional_time("last_used_before", message.last_used_before.as_ref(), &mut violations),
        workspace: message.workspace,
        principal: message.principal,
        audience: message.audience,
        created_by: message.created_by,
        query: message.query,
        order_by: message.order_by,
        page_size: message.page_size,
        page_token: message.page_token,
        violations: Violations::default(),
    };
    ListRequest { violations, ..request }
}

/// The fields that the mask names. What is named and not set is cleared.
fn patch(message: proto::UpdateTokenRequest) -> (Target, TokenPatch) {
    const PATHS: &str = "display_name, scopes, audiences, allowed_cidrs, metadata, expire_time";
    let token = message.token.unwrap_or_default();
    let mut patch = TokenPatch::default();
    let mut violations = Violations::default();
    let paths = message.update_mask.unwrap_or_default().paths;
    if paths.is_empty() {
        violations.add("update_mask", format!("must name what to change: some of {PATHS}"));
    }
    for (index, path) in paths.iter().enumerate() {
        match path.as_str() {
            "display_name" => patch.display_name = Some(token.display_name.clone()),
            "scopes" => patch.scopes = Some(token.scopes.clone()),
            "audiences" => patch.audiences = Some(token.audiences.clone()),
            "allowed_cidrs" => patch.allowed_cidrs = Some(token.allowed_cidrs.clone()),
            "metadata" => patch.metadata = Some(token.metadata.clone()),
            "expire_time" => {
                let end = token.expire_time.as_ref().map_or(Ok(Time::NEVER), convert::time);
                patch.expire_time = violations.take("token.expire_time", end);
            }
            // Not quoted: it is the caller's text, and may be anything.
            _ => violations.add(format!("update_mask.paths[{index}]"), format!("cannot be changed; the mask may name {PATHS}")),
        }
    }
    patch.violations = violations;
    (Target { id: token.id, etag: token.etag }, patch)
}
