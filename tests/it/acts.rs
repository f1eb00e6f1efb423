//! What actors do with workspaces, principals, sessions, reports and the audit.

use keyward::proto::{self, Verdict};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::world::Actor;

/// The code of a call that must fail.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("must be refused").code()
}

/// The fields that a refused call names.
pub fn fields<T: std::fmt::Debug>(answer: Result<T, Status>) -> Vec<String> {
    let status = answer.expect_err("must be refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let violations = status.get_details_bad_request().expect("BadRequest").field_violations;
    assert!(violations.iter().all(|violation| !violation.description.is_empty()));
    violations.into_iter().map(|violation| violation.field).collect()
}

pub fn wire_days(days: i64) -> prost_types::Duration {
    prost_types::Duration { seconds: days * 86_400, nanos: 0 }
}

/// One field of the settings that an event keeps, as JSON has it.
pub fn setting(settings: Option<&prost_types::Struct>, name: &str) -> String {
    use prost_types::value::Kind;
    match settings.and_then(|settings| settings.fields.get(name)?.kind.clone()) {
        None => String::new(),
        Some(Kind::StringValue(text)) => text,
        Some(Kind::BoolValue(truth)) => truth.to_string(),
        Some(Kind::NumberValue(number)) => number.to_string(),
        Some(other) => format!("{other:?}"),
    }
}

impl Actor {
    pub async fn who(&self) -> Result<proto::WhoAmIResponse, Status> {
        self.own().who_am_i(self.request(proto::WhoAmIRequest {})).await.map(tonic::Response::into_inner)
    }

    /// The id of the token that this actor presents.
    pub async fn own_id(&self) -> String {
        self.who().await.expect("known").token.expect("a token").id
    }

    pub async fn workspace(&self, id: &str) -> Result<proto::Workspace, Status> {
        let message = proto::GetWorkspaceRequest { id: id.to_owned() };
        let response = self.workspaces().get_workspace(self.request(message)).await?;
        Ok(response.into_inner().workspace.expect("a workspace"))
    }

    pub async fn create_workspace(&self, workspace: proto::Workspace) -> Result<proto::Workspace, Status> {
        let message = proto::CreateWorkspaceRequest { workspace: Some(workspace) };
        let response = self.workspaces().create_workspace(self.request(message)).await?;
        Ok(response.into_inner().workspace.expect("a workspace"))
    }

    pub async fn list_workspaces(&self, page_size: i32, page_token: &str) -> Result<proto::ListWorkspacesResponse, Status> {
        let message = proto::ListWorkspacesRequest { page_size, page_token: page_token.to_owned() };
        self.workspaces().list_workspaces(self.request(message)).await.map(tonic::Response::into_inner)
    }

    pub async fn set_policy(&self, workspace: &str, policy: proto::Policy, paths: &[&str]) -> Result<proto::Workspace, Status> {
        self.update_workspace(proto::Workspace { id: workspace.to_owned(), policy: Some(policy), ..Default::default() }, paths).await
    }

    pub async fn suspend_workspace(&self, id: &str) -> Result<proto::Workspace, Status> {
        let message = proto::SuspendWorkspaceRequest { id: id.to_owned(), reason: "test".to_owned(), etag: String::new() };
        let response = self.workspaces().suspend_workspace(self.request(message)).await?;
        Ok(response.into_inner().workspace.expect("a workspace"))
    }

    pub async fn resume_workspace(&self, id: &str) -> Result<proto::Workspace, Status> {
        let message = proto::ResumeWorkspaceRequest { id: id.to_owned(), etag: String::new() };
        let response = self.workspaces().resume_workspace(self.request(message)).await?;
        Ok(response.into_inner().workspace.expect("a workspace"))
    }

    pub async fn delete_workspace(&self, id: &str) -> Result<(), Status> {
        let message = proto::DeleteWorkspaceRequest { id: id.to_owned(), reason: "test".to_owned(), etag: String::new() };
        self.workspaces().delete_workspace(self.request(message)).await.map(drop)
    }

    pub async fn upsert(&self, principal: proto::Principal) -> Result<proto::UpsertPrincipalResponse, Status> {
        let message = proto::UpsertPrincipalRequest { principal: Some(principal) };
        self.principals().upsert_principal(self.request(message)).await.map(tonic::Response::into_inner)
    }

    /// Gives a principal a role.
    pub async fn set_role(&self, id: &str, role: proto::Role) -> Result<proto::Principal, Status> {
        let principal = proto::Principal { id: id.to_owned(), role: role.into(), ..Default::default() };
        Ok(self.upsert(principal).await?.principal.expect("a principal"))
    }

    pub async fn principal(&self, workspace: &str, id: &str) -> Result<proto::Principal, Status> {
        let message = proto::GetPrincipalRequest { workspace: workspace.to_owned(), id: id.to_owned() };
        let response = self.principals().get_principal(self.request(message)).await?;
        Ok(response.into_inner().principal.expect("a principal"))
    }

    pub async fn list_principals(&self, message: proto::ListPrincipalsRequest) -> Result<proto::ListPrincipalsResponse, Status> {
        self.principals().list_principals(self.request(message)).await.map(tonic::Response::into_inner)
    }

    pub async fn suspend_principal(&self, workspace: &str, id: &str) -> Result<proto::Principal, Status> {
        let (workspace, id) = (workspace.to_owned(), id.to_owned());
        let message = proto::SuspendPrincipalRequest { workspace, id, reason: "test".to_owned(), etag: String::new() };
        let response = self.principals().suspend_principal(self.request(message)).await?;
        Ok(response.into_inner().principal.expect("a principal"))
    }

    pub async fn resume_principal(&self, workspace: &str, id: &str) -> Result<proto::Principal, Status> {
        let message = proto::ResumePrincipalRequest { workspace: workspace.to_owned(), id: id.to_owned(), etag: String::new() };
        let response = self.principals().resume_principal(self.request(message)).await?;
        Ok(response.into_inner().principal.expect("a principal"))
    }

    pub async fn delete_principal(&self, workspace: &str, id: &str) -> Result<i32, Status> {
        let (workspace, id) = (workspace.to_owned(), id.to_owned());
        let message = proto::DeletePrincipalRequest { workspace, id, reason: "left".to_owned(), etag: String::new() };
        let response = self.principals().delete_principal(self.request(message)).await?;
        Ok(response.into_inner().revoked_count)
    }

    pub async fn create_own(&self, message: proto::CreateMyTokenRequest) -> Result<proto::CreateMyTokenResponse, Status> {
        self.own().create_my_token(self.request(message)).await.map(tonic::Response::into_inner)
    }

    /// A temporary token of one's own, and its secret.
    pub async fn temporary(&self, session: &str, scopes: &[&str]) -> Result<(proto::Token, String), Status> {
        let scopes = scopes.iter().map(|scope| (*scope).to_owned()).collect();
        let message = proto::IssueTemporaryTokenRequest { session_id: session.to_owned(), scopes, ..Default::default() };
        let response = self.own().issue_temporary_token(self.request(message)).await?.into_inner();
        Ok((response.token.expect("a token"), response.secret))
    }

    pub async fn list_own(&self, message: proto::ListMyTokensRequest) -> Result<Vec<proto::Token>, Status> {
        Ok(self.own().list_my_tokens(self.request(message)).await?.into_inner().tokens)
    }

    pub async fn regenerate_own(&self) -> Result<proto::RegenerateSelfResponse, Status> {
        self.own().regenerate_self(self.request(proto::RegenerateSelfRequest::default())).await.map(tonic::Response::into_inner)
    }

    pub async fn revoke_own(&self) -> Result<proto::Token, Status> {
        let response = self.own().revoke_self(self.request(proto::RevokeSelfRequest::default())).await?;
        Ok(response.into_inner().token.expect("a token"))
    }

    pub async fn end_session(&self, session: &str) -> Result<i32, Status> {
        let message = proto::EndSessionRequest { session_id: session.to_owned(), ..Default::default() };
        Ok(self.own().end_session(self.request(message)).await?.into_inner().revoked_count)
    }

    pub async fn report(&self, texts: &[&str]) -> Result<proto::ReportLeakedTokensResponse, Status> {
        let message = proto::ReportLeakedTokensRequest { tokens: texts.iter().map(|text| (*text).to_owned()).collect() };
        self.own().report_leaked_tokens(self.request(message)).await.map(tonic::Response::into_inner)
    }

    pub async fn events(&self, message: proto::ListAuditEventsRequest) -> Result<Vec<proto::AuditEvent>, Status> {
        Ok(self.audit().list_audit_events(self.request(message)).await?.into_inner().events)
    }

    /// The verdicts on tokens that are asked about together, without counting a use.
    pub async fn verdicts(&self, tokens: &[&str]) -> Vec<Verdict> {
        let ask = |token: &&str| proto::ValidateTokenRequest { token: (*token).to_owned(), peek: true, ..Default::default() };
        let message = proto::BatchValidateTokensRequest { requests: tokens.iter().map(ask).collect() };
        let response = self.validation().batch_validate_tokens(self.request(message)).await.expect("answers").into_inner();
        response.responses.iter().map(proto::ValidateTokenResponse::verdict).collect()
    }
}
