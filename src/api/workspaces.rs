//! `WorkspaceService`: messages in, one domain method, messages out.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    directory::{self, PageRequest, PolicyPatch, WishesPatch, WorkspacePatch, WorkspaceTarget},
    error::Violations,
    notice::Wishes,
    proto::{self, workspace_service_server::WorkspaceService},
    scope::{Operation, Resource},
    workspace::{Policy, Workspace},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl WorkspaceService for Api {
    async fn create_workspace(&self, request: Request<proto::CreateWorkspaceRequest>) -> Answer<proto::CreateWorkspaceResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let message = message.workspace.unwrap_or_default();
        let mut violations = Violations::default();
        let patch = WorkspacePatch {
            policy: message.policy.map(|policy| whole_policy(&policy, &mut violations)).unwrap_or_default(),
            display_name: Some(message.display_name),
            prefix: Some(message.prefix),
            resources: Some(message.resources.into_iter().map(resource).collect()),
            notices: message.notices.map(|notices| whole_notices(&notices, &mut violations)).unwrap_or_default(),
            violations: Violations::default(),
        };
        let (workspace, propagation) = self
            .in_force(self.directory.create_workspace(caller, &message.id, WorkspacePatch { violations, ..patch }, now).await?, deadline)
            .await;
        Ok(Response::new(proto::CreateWorkspaceResponse { workspace: Some(shown(workspace)), propagation }))
    }

    async fn get_workspace(&self, request: Request<proto::GetWorkspaceRequest>) -> Answer<proto::GetWorkspaceResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let workspace = self.directory.workspace(&caller, &message.id).await?;
        Ok(Response::new(proto::GetWorkspaceResponse { workspace: Some(shown(workspace)) }))
    }

    async fn list_workspaces(&self, request: Request<proto::ListWorkspacesRequest>) -> Answer<proto::ListWorkspacesResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let page = PageRequest { size: message.page_size, token: message.page_token };
        let (workspaces, next) = self.directory.workspaces(&caller, page).await?;
        let brief = |workspace| proto::Workspace { resources: Vec::new(), ..shown(workspace) };
        Ok(Response::new(proto::ListWorkspacesResponse {
            workspaces: workspaces.into_iter().map(brief).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn update_workspace(&self, request: Request<proto::UpdateWorkspaceRequest>) -> Answer<proto::UpdateWorkspaceResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let (target, patch) = patch(message);
        let (workspace, propagation) = self.in_force(self.directory.update_workspace(caller, target, patch, now).await?, deadline).await;
        Ok(Response::new(proto::UpdateWorkspaceResponse { workspace: Some(shown(workspace)), propagation }))
    }

    async fn suspend_workspace(&self, request: Request<proto::SuspendWorkspaceRequest>) -> Answer<proto::SuspendWorkspaceResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = WorkspaceTarget { id: message.id, etag: message.etag };
        let (workspace, propagation) =
            self.in_force(self.directory.suspend_workspace(caller, target, &message.reason, now).await?, deadline).await;
        Ok(Response::new(proto::SuspendWorkspaceResponse { workspace: Some(shown(workspace)), propagation }))
    }

    async fn resume_workspace(&self, request: Request<proto::ResumeWorkspaceRequest>) -> Answer<proto::ResumeWorkspaceResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = WorkspaceTarget { id: message.id, etag: message.etag };
        let (workspace, propagation) = self.in_force(self.directory.resume_workspace(caller, target, now).await?, deadline).await;
        Ok(Response::new(proto::ResumeWorkspaceResponse { workspace: Some(shown(workspace)), propagation }))
    }

    async fn delete_workspace(&self, request: Request<proto::DeleteWorkspaceRequest>) -> Answer<proto::DeleteWorkspaceResponse> {
        let (Call { caller, now, deadline }, message) = call(request)?;
        let target = WorkspaceTarget { id: message.id, etag: message.etag };
        let deleted = self.directory.delete_workspace(caller, target, &message.reason, now).await?;
        let ((), propagation) = self.in_force(deleted, deadline).await;
        Ok(Response::new(proto::DeleteWorkspaceResponse { propagation }))
    }
}

fn shown(workspace: Workspace) -> proto::Workspace {
    proto::Workspace {
        etag: directory::etag(workspace.version),
        id: workspace.id,
        display_name: workspace.display_name,
        prefix: workspace.prefix.as_str().to_owned(),
        policy: Some(shown_policy(&workspace.policy)),
        resources: workspace.resources.into_iter().map(shown_resource).collect(),
        suspended: workspace.suspended,
        create_time: convert::timestamp(workspace.create_time),
        update_time: convert::timestamp(workspace.update_time),
        notices: Some(shown_notices(workspace.notices)),
    }
}

fn shown_policy(policy: &Policy) -> proto::Policy {
    proto::Policy {
        default_ttl: Some(convert::wire_span(policy.default_ttl)),
        max_permanent_ttl: Some(convert::wire_span(policy.max_permanent_ttl)),
        max_temporary_ttl: Some(convert::wire_span(policy.max_temporary_ttl)),
        allow_never: policy.allow_never,
        permanent_requires_admin: policy.permanent_requires_admin,
        principals_on_first_use: Some(policy.principals_on_first_use),
        max_tokens_per_principal: i32::try_from(policy.max_tokens_per_principal).unwrap_or(i32::MAX),
    }
}

fn shown_notices(wishes: Wishes) -> proto::Notices {
    proto::Notices {
        days_before: wishes.days_before.into_iter().map(i32::from).collect(),
        raise_faults: wishes.raise_faults,
        emails: wishes.emails.join("; "),
        mail_owner: wishes.mail_owner,
        webhook_url: wishes.webhook_url,
        events: wishes.events.into_iter().map(|event| convert::notice_event(event).into()).collect(),
        renew_url: wishes.renew_url,
    }
}

fn shown_resource(resource: Resource) -> proto::Resource {
    let operation =
        |operation: Operation| proto::Operation { operation: operation.operation, method: operation.method, path: operation.path };
    proto::Resource {
        resource: resource.resource,
        endpoint: resource.endpoint,
        operations: resource.operations.into_iter().map(operation).collect(),
    }
}

fn resource(resource: proto::Resource) -> Resource {
    let operation =
        |operation: proto::Operation| Operation { operation: operation.operation, method: operation.method, path: operation.path };
    Resource {
        resource: resource.resource,
        endpoint: resource.endpoint,
        operations: resource.operations.into_iter().map(operation).collect(),
    }
}

const POLICY_FIELDS: [&str; 7] = [
    "default_ttl",
    "max_permanent_ttl",
    "max_temporary_ttl",
    "allow_never",
    "permanent_requires_admin",
    "principals_on_first_use",
    "max_tokens_per_principal",
];

fn whole_policy(message: &proto::Policy, violations: &mut Violations) -> PolicyPatch {
    POLICY_FIELDS.iter().fold(PolicyPatch::default(), |patch, field| take_policy(patch, field, message, violations).unwrap_or(patch))
}

/// Takes one field over; what is not set gets its default. Nothing: there is no such field.
fn take_policy(mut patch: PolicyPatch, field: &str, message: &proto::Policy, violations: &mut Violations) -> Option<PolicyPatch> {
    let usual = Policy::default();
    let mut span = |sent: &Option<prost_types::Duration>, default| match sent {
        None => Some(default),
        Some(sent) => violations.take(&format!("workspace.policy.{field}"), convert::span(sent)),
    };
    match field {
        "default_ttl" => patch.default_ttl = span(&message.default_ttl, usual.default_ttl),
        "max_permanent_ttl" => patch.max_permanent_ttl = span(&message.max_permanent_ttl, usual.max_permanent_ttl),
        "max_temporary_ttl" => patch.max_temporary_ttl = span(&message.max_temporary_ttl, usual.max_temporary_ttl),
        "allow_never" => patch.allow_never = Some(message.allow_never),
        "permanent_requires_admin" => patch.permanent_requires_admin = Some(message.permanent_requires_admin),
        "principals_on_first_use" => {
            patch.principals_on_first_use = Some(message.principals_on_first_use.unwrap_or(usual.principals_on_first_use));
        }
        "max_tokens_per_principal" => {
            patch.max_tokens_per_principal = match message.max_tokens_per_principal {
                0 => Some(usual.max_tokens_per_principal),
                // Not a number that the rules take either.
                sent => Some(u32::try_from(sent).unwrap_or(0)),
            };
        }
        _ => return None,
    }
    Some(patch)
}

const NOTICES_FIELDS: [&str; 7] = ["days_before", "raise_faults", "emails", "mail_owner", "webhook_url", "events", "renew_url"];

fn whole_notices(message: &proto::Notices, violations: &mut Violations) -> WishesPatch {
    NOTICES_FIELDS
        .iter()
        .fold(WishesPatch::default(), |patch, field| take_notices(patch.clone(), field, message, violations).unwrap_or(patch))
}

/// Takes one field over; what is not set gets its default. Nothing: there is no such field.
fn take_notices(mut patch: WishesPatch, field: &str, message: &proto::Notices, violations: &mut Violations) -> Option<WishesPatch> {
    match field {
        "days_before" => patch.days_before = Some(message.days_before.clone()),
        "raise_faults" => patch.raise_faults = Some(message.raise_faults),
        "emails" => patch.emails = Some(message.emails.clone()),
        "mail_owner" => patch.mail_owner = Some(message.mail_owner),
        "webhook_url" => patch.webhook_url = Some(message.webhook_url.clone()),
        "events" => patch.events = Some(convert::notice_events("workspace.notices.events", &message.events, violations)),
        "renew_url" => patch.renew_url = Some(message.renew_url.clone()),
        _ => return None,
    }
    Some(patch)
}

/// The fields that the mask names.
fn patch(message: proto::UpdateWorkspaceRequest) -> (WorkspaceTarget, WorkspacePatch) {
    const PATHS: &str = "display_name, prefix, policy, policy.<field>, resources, notices, notices.<field>";
    let workspace = message.workspace.unwrap_or_default();
    let policy = workspace.policy.unwrap_or_default();
    let notices = workspace.notices.unwrap_or_default();
    let mut patch = WorkspacePatch::default();
    let mut violations = Violations::default();
    let paths = message.update_mask.unwrap_or_default().paths;
    if paths.is_empty() {
        violations.add("update_mask", format!("must name what to change: some of {PATHS}"));
    }
    let resources: Vec<Resource> = workspace.resources.into_iter().map(resource).collect();
    for (index, path) in paths.iter().enumerate() {
        match path.as_str() {
            "display_name" => patch.display_name = Some(workspace.display_name.clone()),
            "prefix" => patch.prefix = Some(workspace.prefix.clone()),
            "policy" => patch.policy = whole_policy(&policy, &mut violations),
            "resources" => patch.resources = Some(resources.clone()),
            "notices" => patch.notices = whole_notices(&notices, &mut violations),
            path => {
                let policy = path.strip_prefix("policy.").and_then(|field| take_policy(patch.policy, field, &policy, &mut violations));
                let field = path.strip_prefix("notices.");
                let wishes = field.and_then(|field| take_notices(patch.notices.clone(), field, &notices, &mut violations));
                match (policy, wishes) {
                    (Some(policy), _) => patch.policy = policy,
                    (_, Some(wishes)) => patch.notices = wishes,
                    // Not quoted: it is the caller's text, and may be anything.
                    _ => violations.add(format!("update_mask.paths[{index}]"), format!("cannot be changed; the mask may name {PATHS}")),
                }
            }
        }
    }
    patch.violations = violations;
    (WorkspaceTarget { id: workspace.id, etag: workspace.etag }, patch)
}
