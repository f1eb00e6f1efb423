//! `PrincipalService`: messages in, one domain method, messages out.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    directory::{self, PageRequest, PrincipalInput, PrincipalTarget},
    error::Violations,
    proto::{self, principal_service_server::PrincipalService},
    workspace::{Principal, PrincipalKind, Role},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl PrincipalService for Api {
    async fn upsert_principal(&self, request: Request<proto::UpsertPrincipalRequest>) -> Answer<proto::UpsertPrincipalResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let ((principal, created), propagation) = self
            .in_force(self.directory.upsert_principal(caller, input(message.principal.unwrap_or_default()), now).await?, deadline)
            .await;
        Ok(Response::new(proto::UpsertPrincipalResponse { principal: Some(shown(principal)), created, propagation }))
    }

    async fn get_principal(&self, request: Request<proto::GetPrincipalRequest>) -> Answer<proto::GetPrincipalResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let target = PrincipalTarget { workspace: message.workspace, id: message.id, etag: String::new() };
        let principal = self.directory.principal(&caller, &target).await?;
        Ok(Response::new(proto::GetPrincipalResponse { principal: Some(shown(principal)) }))
    }

    async fn list_principals(&self, request: Request<proto::ListPrincipalsRequest>) -> Answer<proto::ListPrincipalsResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let page = PageRequest { size: message.page_size, token: message.page_token };
        let (principals, next) = self.directory.principals(&caller, &message.workspace, &message.query, page).await?;
        Ok(Response::new(proto::ListPrincipalsResponse {
            principals: principals.into_iter().map(shown).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn suspend_principal(&self, request: Request<proto::SuspendPrincipalRequest>) -> Answer<proto::SuspendPrincipalResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = PrincipalTarget { workspace: message.workspace, id: message.id, etag: message.etag };
        let (principal, propagation) =
            self.in_force(self.directory.suspend_principal(caller, target, &message.reason, now).await?, deadline).await;
        Ok(Response::new(proto::SuspendPrincipalResponse { principal: Some(shown(principal)), propagation }))
    }

    async fn resume_principal(&self, request: Request<proto::ResumePrincipalRequest>) -> Answer<proto::ResumePrincipalResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = PrincipalTarget { workspace: message.workspace, id: message.id, etag: message.etag };
        let (principal, propagation) = self.in_force(self.directory.resume_principal(caller, target, now).await?, deadline).await;
        Ok(Response::new(proto::ResumePrincipalResponse { principal: Some(shown(principal)), propagation }))
    }

    async fn delete_principal(&self, request: Request<proto::DeletePrincipalRequest>) -> Answer<proto::DeletePrincipalResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = PrincipalTarget { workspace: message.workspace, id: message.id, etag: message.etag };
        let (revoked, propagation) =
            self.in_force(self.directory.delete_principal(caller, target, &message.reason, now).await?, deadline).await;
        Ok(Response::new(proto::DeletePrincipalResponse { revoked_count: i32::try_from(revoked).unwrap_or(i32::MAX), propagation }))
    }
}

fn input(message: proto::Principal) -> PrincipalInput {
    let mut violations = Violations::default();
    let kind = match proto::PrincipalKind::try_from(message.kind) {
        Ok(proto::PrincipalKind::Unspecified | proto::PrincipalKind::User) => PrincipalKind::User,
        Ok(proto::PrincipalKind::Service) => PrincipalKind::Service,
        Err(_) => {
            violations.add("principal.kind", "must be PRINCIPAL_KIND_USER or PRINCIPAL_KIND_SERVICE");
            PrincipalKind::User
        }
    };
    let role = match proto::Role::try_from(message.role) {
        Ok(proto::Role::Unspecified | proto::Role::Member) => Role::Member,
        Ok(proto::Role::Admin) => Role::Admin,
        Err(_) => {
            violations.add("principal.role", "must be ROLE_MEMBER or ROLE_ADMIN");
            Role::Member
        }
    };
    PrincipalInput {
        target: PrincipalTarget { workspace: message.workspace, id: message.id, etag: message.etag },
        kind,
        display_name: message.display_name,
        email: message.email,
        role,
        violations,
    }
}

fn shown(principal: Principal) -> proto::Principal {
    let kind = match principal.kind {
        PrincipalKind::User => proto::PrincipalKind::User,
        PrincipalKind::Service => proto::PrincipalKind::Service,
    };
    let role = match principal.role {
        Role::Member => proto::Role::Member,
        Role::Admin => proto::Role::Admin,
    };
    proto::Principal {
        etag: directory::etag(principal.version),
        kind: kind.into(),
        role: role.into(),
        workspace: principal.workspace,
        id: principal.id,
        display_name: principal.display_name,
        email: principal.email,
        suspended: principal.suspended,
        create_time: convert::timestamp(principal.create_time),
        update_time: convert::timestamp(principal.update_time),
    }
}
