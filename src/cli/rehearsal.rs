//! Commands of several calls against a server that only writes down what it is asked.

mod notices;

use std::sync::{Arc, Mutex};

use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{failure::Exit, tests::run_client};
use crate::proto::{
    self, Policy, Principal, PrincipalKind, Resource, Role, Workspace,
    notice_service_server::NoticeServiceServer,
    principal_service_server::{PrincipalService, PrincipalServiceServer},
    self_service_server::{SelfService, SelfServiceServer},
    workspace_service_server::{WorkspaceService, WorkspaceServiceServer},
};

type Answer<T> = Result<Response<T>, Status>;

/// What was asked, and what there is.
#[derive(Clone, Default)]
struct Stage(Arc<Mutex<Notes>>);

#[derive(Default)]
struct Notes {
    principal: Option<Principal>,
    workspace: Workspace,
    upserts: Vec<Principal>,
    updates: Vec<proto::UpdateWorkspaceRequest>,
    creations: Vec<Workspace>,
    reports: Vec<(bool, usize)>,
    own: Vec<&'static str>,
    fault_lists: Vec<proto::ListFaultsRequest>,
    notice_lists: Vec<proto::ListNoticesRequest>,
}

impl Stage {
    fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        self.0.lock().expect("nobody panicked")
    }
}

fn is_known(metadata: &MetadataMap) -> bool {
    metadata.contains_key("authorization")
}

fn never<T>() -> Answer<T> {
    Err(Status::internal("nobody asks this"))
}

#[tonic::async_trait]
impl PrincipalService for Stage {
    async fn upsert_principal(&self, request: Request<proto::UpsertPrincipalRequest>) -> Answer<proto::UpsertPrincipalResponse> {
        let principal = request.into_inner().principal.unwrap_or_default();
        self.notes().upserts.push(principal.clone());
        let created = self.notes().principal.is_none();
        Ok(Response::new(proto::UpsertPrincipalResponse { principal: Some(principal), created, propagation: None }))
    }

    async fn get_principal(&self, _: Request<proto::GetPrincipalRequest>) -> Answer<proto::GetPrincipalResponse> {
        match self.notes().principal.clone() {
            None => Err(Status::not_found("there is no such principal")),
            found => Ok(Response::new(proto::GetPrincipalResponse { principal: found })),
        }
    }

    async fn list_principals(&self, _: Request<proto::ListPrincipalsRequest>) -> Answer<proto::ListPrincipalsResponse> {
        never()
    }

    async fn suspend_principal(&self, _: Request<proto::SuspendPrincipalRequest>) -> Answer<proto::SuspendPrincipalResponse> {
        never()
    }

    async fn resume_principal(&self, _: Request<proto::ResumePrincipalRequest>) -> Answer<proto::ResumePrincipalResponse> {
        never()
    }

    async fn delete_principal(&self, _: Request<proto::DeletePrincipalRequest>) -> Answer<proto::DeletePrincipalResponse> {
        never()
    }
}

#[tonic::async_trait]
impl WorkspaceService for Stage {
    async fn create_workspace(&self, request: Request<proto::CreateWorkspaceRequest>) -> Answer<proto::CreateWorkspaceResponse> {
        let workspace = request.into_inner().workspace;
        self.notes().creations.extend(workspace.clone());
        Ok(Response::new(proto::CreateWorkspaceResponse { workspace, propagation: None }))
    }

    async fn get_workspace(&self, _: Request<proto::GetWorkspaceRequest>) -> Answer<proto::GetWorkspaceResponse> {
        Ok(Response::new(proto::GetWorkspaceResponse { workspace: Some(self.notes().workspace.clone()) }))
    }

    async fn list_workspaces(&self, _: Request<proto::ListWorkspacesRequest>) -> Answer<proto::ListWorkspacesResponse> {
        never()
    }

    async fn update_workspace(&self, request: Request<proto::UpdateWorkspaceRequest>) -> Answer<proto::UpdateWorkspaceResponse> {
        let request = request.into_inner();
        self.notes().updates.push(request.clone());
        Ok(Response::new(proto::UpdateWorkspaceResponse { workspace: request.workspace, propagation: None }))
    }

    async fn suspend_workspace(&self, _: Request<proto::SuspendWorkspaceRequest>) -> Answer<proto::SuspendWorkspaceResponse> {
        never()
    }

    async fn resume_workspace(&self, _: Request<proto::ResumeWorkspaceRequest>) -> Answer<proto::ResumeWorkspaceResponse> {
        never()
    }

    async fn delete_workspace(&self, _: Request<proto::DeleteWorkspaceRequest>) -> Answer<proto::DeleteWorkspaceResponse> {
        never()
    }
}

#[tonic::async_trait]
impl SelfService for Stage {
    async fn who_am_i(&self, _: Request<proto::WhoAmIRequest>) -> Answer<proto::WhoAmIResponse> {
        never()
    }

    async fn list_my_tokens(&self, _: Request<proto::ListMyTokensRequest>) -> Answer<proto::ListMyTokensResponse> {
        never()
    }

    async fn regenerate_self(&self, _: Request<proto::RegenerateSelfRequest>) -> Answer<proto::RegenerateSelfResponse> {
        never()
    }

    async fn revoke_self(&self, _: Request<proto::RevokeSelfRequest>) -> Answer<proto::RevokeSelfResponse> {
        never()
    }

    async fn create_my_token(&self, _: Request<proto::CreateMyTokenRequest>) -> Answer<proto::CreateMyTokenResponse> {
        self.notes().own.push("permanent");
        Ok(Response::new(proto::CreateMyTokenResponse { secret: "kw_one".to_owned(), ..Default::default() }))
    }

    async fn issue_temporary_token(&self, _: Request<proto::IssueTemporaryTokenRequest>) -> Answer<proto::IssueTemporaryTokenResponse> {
        self.notes().own.push("temporary");
        Ok(Response::new(proto::IssueTemporaryTokenResponse { secret: "kw_two".to_owned(), ..Default::default() }))
    }

    async fn end_session(&self, _: Request<proto::EndSessionRequest>) -> Answer<proto::EndSessionResponse> {
        Ok(Response::new(proto::EndSessionResponse { revoked_count: 3, propagation: None }))
    }

    async fn report_leaked_tokens(&self, request: Request<proto::ReportLeakedTokensRequest>) -> Answer<proto::ReportLeakedTokensResponse> {
        let is_known = is_known(request.metadata());
        self.notes().reports.push((is_known, request.into_inner().tokens.len()));
        Ok(Response::new(proto::ReportLeakedTokensResponse {}))
    }
}

/// A server on a thread of its own, until the test ends.
fn open(stage: &Stage) -> String {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let stage = stage.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let incoming = tonic::transport::server::TcpIncoming::bind(([127, 0, 0, 1], 0).into()).expect("a port");
            sender.send(incoming.local_addr().expect("an address").to_string()).expect("somebody waits");
            tonic::transport::Server::builder()
                .add_service(PrincipalServiceServer::new(stage.clone()))
                .add_service(WorkspaceServiceServer::new(stage.clone()))
                .add_service(NoticeServiceServer::new(stage.clone()))
                .add_service(SelfServiceServer::new(stage))
                .serve_with_incoming(incoming)
                .await
        })
    });
    receiver.recv().expect("an address")
}

/// Runs a command of which nothing is refused; answers its standard output.
fn play(address: &str, arguments: &[&str], input: &str) -> String {
    let (exit, out, err) = run_client(arguments, &[("KEYWARD_TOKEN", "kw_own"), ("KEYWARD_ADDRESS", address)], input);
    assert_eq!(exit, Exit::Good, "{arguments:?}: {err}");
    out
}

#[test]
fn an_upsert_keeps_what_it_does_not_name() {
    let stage = Stage::default();
    let address = open(&stage);
    play(&address, &["principal", "upsert", "ann", "--name", "Ann"], "");
    stage.notes().principal = Some(Principal {
        id: "ann".to_owned(),
        kind: PrincipalKind::Service.into(),
        role: Role::Admin.into(),
        email: "ann@example.org".to_owned(),
        etag: "e1".to_owned(),
        ..Principal::default()
    });
    play(&address, &["principal", "upsert", "ann", "--name", "Ann", "--role", "member"], "");
    let notes = stage.notes();
    let new = Principal { id: "ann".to_owned(), display_name: "Ann".to_owned(), ..Principal::default() };
    let changed = Principal {
        kind: PrincipalKind::Service.into(),
        role: Role::Member.into(),
        email: "ann@example.org".to_owned(),
        etag: "e1".to_owned(),
        ..new.clone()
    };
    assert_eq!(notes.upserts, [new, changed]);
}

#[test]
fn what_was_exported_is_imported() {
    let stage = Stage::default();
    let operation = proto::Operation { operation: "list".to_owned(), method: "GET".to_owned(), path: "/{path...}".to_owned() };
    let there = Workspace {
        id: "acme".to_owned(),
        display_name: "Acme \"Inc.\" \\ 日本".to_owned(),
        policy: Some(Policy { max_tokens_per_principal: 7, principals_on_first_use: Some(false), ..Policy::default() }),
        resources: vec![Resource { resource: "files".to_owned(), endpoint: "/api/files".to_owned(), operations: vec![operation] }],
        ..Workspace::default()
    };
    stage.notes().workspace = there.clone();
    let address = open(&stage);
    let file = play(&address, &["workspace", "export", "acme", "--output", "json"], "");
    play(&address, &["workspace", "import", "acme", "-", "--etag", "e1"], &file);
    play(&address, &["workspace", "import", "--create", "--prefix", "acm", "acme", "-"], &file);
    play(&address, &["workspace", "update", "acme", "--default-ttl", "1d"], "");
    let notes = stage.notes();
    assert_eq!(notes.updates[0].workspace, Some(Workspace { etag: "e1".to_owned(), ..there.clone() }));
    let paths: Vec<_> = notes.updates.iter().map(|update| update.update_mask.clone().unwrap_or_default().paths.join(" ")).collect();
    let whole = "display_name policy.allow_never policy.permanent_requires_admin policy.principals_on_first_use \
                 policy.max_tokens_per_principal resources";
    assert_eq!(paths, [whole, "policy.default_ttl"]);
    assert_eq!(notes.creations, [Workspace { prefix: "acm".to_owned(), ..there }]);
}

#[test]
fn a_file_with_a_mistake_asks_nobody() {
    let stage = Stage::default();
    let address = open(&stage);
    let env = [("KEYWARD_TOKEN", "kw_own"), ("KEYWARD_ADDRESS", address.as_str())];
    let file = "display_name = \"Acme\"\n[policy]\ndefault_ttl = 90";
    let (exit, out, err) = run_client(&["workspace", "import", "acme", "-"], &env, file);
    assert!(exit == Exit::Usage && out.is_empty() && err.contains("policy.default_ttl: must be a span"), "{err}");
    assert!(stage.notes().updates.is_empty());
}

#[test]
fn a_report_names_nobody_and_says_nothing() {
    let stage = Stage::default();
    let address = open(&stage);
    let found = "kw_canary\n".repeat(101);
    for arguments in [&["report-leaked"][..], &["report-leaked", "-", "--output", "json"], &["report-leaked", "kw_canary"]] {
        let out = play(&address, arguments, &found);
        assert!(out == "reported\n" || out == "{}\n", "{out}");
    }
    assert_eq!(stage.notes().reports, [(false, 100), (false, 1), (false, 100), (false, 1), (false, 1)]);
}

#[test]
fn ones_own_tokens_and_sessions() {
    let stage = Stage::default();
    let address = open(&stage);
    assert_eq!(play(&address, &["token", "create", "--self", "--name", "ci"], ""), "kw_one\n");
    assert_eq!(play(&address, &["token", "create", "--self", "--temporary"], ""), "kw_two\n");
    assert_eq!(stage.notes().own, ["permanent", "temporary"]);
    assert_eq!(play(&address, &["session", "end", "s1"], ""), "revoked: 3\n");
}
