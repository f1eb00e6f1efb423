//! Who may what: every method of the compiled descriptors, called by every role, in its own workspace and in another one.
//!
//! The table is complete by construction: a method that is added to the proto is called here without anybody's doing.

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use keyward::{
    api::gate::METHODS,
    caller::Access,
    proto::{self, envoy::CheckResponse},
};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, MessageDescriptor, ReflectMessage as _, Value, prost::Message as _};
use tonic::{
    Code, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};
use tonic_types::StatusExt as _;

use crate::{
    gateways, outlets,
    world::{Actor, World, eventually},
};

crate::on_both_databases!(every_method_is_closed_to_those_it_is_not_for, strangers_learn_nothing_from_their_arguments);

/// Passes bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

async fn call(actor: &Actor, path: &str, message: Bytes) -> Result<Bytes, Status> {
    let mut grpc = tonic::client::Grpc::new(actor.channel.clone());
    grpc.ready().await.expect("connected");
    if path.ends_with("/WatchInvalidations") {
        // It goes on: its first message is the answer.
        let mut stream = grpc.server_streaming(actor.request(message), path.parse().expect("a path"), Raw).await?.into_inner();
        return stream.message().await.map(|first| first.expect("a message"));
    }
    grpc.unary(actor.request(message), path.parse().expect("a path"), Raw).await.map(tonic::Response::into_inner)
}

/// Every method that our proto files declare: its path and its request.
fn declared() -> Vec<(String, MessageDescriptor)> {
    let pool = DescriptorPool::decode(proto::DESCRIPTORS).expect("our own descriptors");
    let methods = pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
    methods.map(|method| (format!("/{}/{}", method.parent_service().full_name(), method.name()), method.input())).collect()
}

#[test]
fn every_method_is_in_the_table() {
    let declared: BTreeSet<String> = declared().into_iter().map(|(path, _)| path).collect();
    let listed: BTreeSet<String> =
        METHODS.iter().filter(|method| !method.path.starts_with("/grpc.")).map(|method| method.path.to_owned()).collect();
    assert_eq!(declared, listed);
}

#[test]
fn every_element_has_a_comment() {
    let set = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).expect("our own descriptors");
    for file in set.file.iter().filter(|file| file.package() == "keyward.v1") {
        let commented: BTreeSet<&[i32]> = file
            .source_code_info
            .iter()
            .flat_map(|info| &info.location)
            .filter(|location| !location.leading_comments().trim().is_empty())
            .map(|location| location.path.as_slice())
            .collect();
        let mut paths: Vec<(Vec<i32>, String)> = Vec::new();
        for (index, message) in (0..).zip(&file.message_type) {
            paths.push((vec![4, index], message.name().to_owned()));
            paths.extend(
                (0..).zip(&message.field).map(|(field, named)| (vec![4, index, 2, field], format!("{}.{}", message.name(), named.name()))),
            );
        }
        for (index, service) in (0..).zip(&file.service) {
            paths.push((vec![6, index], service.name().to_owned()));
            paths.extend((0..).zip(&service.method).map(|(method, named)| (vec![6, index, 2, method], named.name().to_owned())));
        }
        for (index, list) in (0..).zip(&file.enum_type) {
            paths.push((vec![5, index], list.name().to_owned()));
            paths.extend((0..).zip(&list.value).map(|(value, named)| (vec![5, index, 2, value], named.name().to_owned())));
        }
        for (path, name) in paths {
            assert!(commented.contains(path.as_slice()), "{name} in {} has no comment", file.name());
        }
    }
}

/// A server that is gone.
const REPLICA: &str = "gone";

/// A fault and a notice of one workspace. They stay what they are, whatever is done with them: the fault is acknowledged once, and the receiver of the notice may
/// not be called.
#[derive(Clone, Default)]
struct Told {
    fault: String,
    notice: String,
}

impl Told {
    async fn new(world: &World, workspace: &str) -> Self {
        let root = world.root().await;
        let wishes = proto::Notices { raise_faults: true, ..outlets::calls_to("https://127.0.0.1:1/") };
        outlets::wish(&root, workspace, wishes).await;
        let token = outlets::create(&root, workspace, "near its end", 5).await.token.expect("a token");
        let notices = outlets::tried(&root, workspace, 1).await;
        let message = proto::ListFaultsRequest { workspace: workspace.to_owned(), token_id: token.id, ..Default::default() };
        let fault = eventually("a fault is raised", async || {
            outlets::client(&root).list_faults(root.request(message.clone())).await.expect("a page").into_inner().faults.pop()
        });
        Self { fault: fault.await.id, notice: notices[0].id.clone() }
    }
}

/// What a call is about: a token, its secret, its principal and its workspace, and what was told there.
struct Subject {
    told: Told,
    number: u32,
    id: String,
    secret: String,
    principal: String,
    workspace: String,
}

impl Subject {
    /// A token of its own for each call, since some calls end it.
    async fn new(world: &World, workspace: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let principal = format!("subject{number}");
        let request = proto::CreateTokenRequest {
            workspace: workspace.to_owned(),
            principal: principal.clone(),
            ..crate::world::new_token("subject", &[])
        };
        let created = world.root().await.create(request).await.expect("created");
        let id = created.token.expect("a token").id;
        Self { told: Told::default(), number, id, secret: created.secret, principal, workspace: workspace.to_owned() }
    }

    /// In a workspace of its own if the call may end that.
    async fn of_call(world: &World, path: &str, workspace: &str, told: &Told) -> Self {
        let mut subject = Self { told: told.clone(), ..Self::new(world, workspace).await };
        if path.contains("WorkspaceService") && workspace != "default" {
            subject.workspace = format!("w{}", subject.number);
            world.add_workspace(&subject.workspace, &subject.workspace).await;
        }
        subject
    }

    /// A good request of this type about this token.
    fn request(&self, descriptor: MessageDescriptor) -> Bytes {
        if descriptor.full_name() == "envoy.service.auth.v3.CheckRequest" {
            return gateways::check_request(&[("authorization", &format!("Bearer {}", self.secret))], &[("required_scopes", "")])
                .encode_to_vec()
                .into();
        }
        Bytes::from(self.message(descriptor).encode_to_vec())
    }

    fn message(&self, descriptor: MessageDescriptor) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            if let Some(value) = self.value(descriptor.name(), &field) {
                message.set_field(&field, value);
            }
        }
        message
    }

    fn value(&self, message: &str, field: &FieldDescriptor) -> Option<Value> {
        let text = |text: &str| Some(Value::String(text.to_owned()));
        let is_new = message == "CreateWorkspaceRequest";
        match field.name() {
            "id" if message.contains("Workspace") => text(&self.workspace),
            "id" if message.contains("Principal") => text(&self.principal),
            "id" if message.contains("Replica") => text(REPLICA),
            "id" if message.contains("Fault") => text(&self.told.fault),
            "id" if message.contains("Notice") => text(&self.told.notice),
            "id" => text(&self.id),
            "workspace" if is_new => {
                let mut workspace = self.message(proto_message("keyward.v1.Workspace"));
                workspace.set_field_by_name("id", Value::String(format!("new{}", self.number)));
                workspace.set_field_by_name("prefix", Value::String(format!("n{}", self.number)));
                Some(Value::Message(workspace))
            }
            "workspace" | "principal" | "token" if field.kind().as_message().is_some() => {
                Some(Value::Message(self.message(field.kind().as_message().expect("a message").clone())))
            }
            "workspace" => text(&self.workspace),
            "principal" => text(&self.principal),
            "display_name" => text("a name"),
            "reason" => text("a reason"),
            "session_id" if message == "EndSessionRequest" => text("a session"),
            "token" => text(&self.secret),
            "update_mask" => Some(Value::Message(mask())),
            "requests" => Some(Value::List(vec![Value::Message(self.message(proto_message("keyward.v1.ValidateTokenRequest")))])),
            _ => None,
        }
    }
}

fn proto_message(name: &str) -> MessageDescriptor {
    DescriptorPool::decode(proto::DESCRIPTORS).expect("our own descriptors").get_message_by_name(name).expect(name)
}

fn mask() -> DynamicMessage {
    let mut mask = DynamicMessage::new(proto_message("google.protobuf.FieldMask"));
    mask.set_field_by_name("paths", Value::List(vec![Value::String("display_name".to_owned())]));
    mask
}

/// The roles: a name, and the scopes of its token; none: no token, or a bad one.
const ROLES: [(&str, Option<&[&str]>); 9] = [
    ("stranger", None),
    ("forger", None),
    ("bearer", Some(&["agents:list", "*"])),
    ("member", Some(&["keyward:self"])),
    ("validator", Some(&["keyward:validate"])),
    ("validator of all", Some(&["keyward:validate-any"])),
    ("administrator", Some(&["keyward:admin"])),
    ("everything but root", Some(&["keyward:admin", "keyward:self", "keyward:validate", "keyward:validate-any", "*"])),
    ("root", Some(&["keyward:root"])),
];

fn opens(scopes: &[&str], access: Access) -> bool {
    let holds = |right: &str| scopes.contains(&"keyward:root") || scopes.contains(&"keyward:admin") || scopes.contains(&right);
    match access {
        Access::Public | Access::Known => true,
        Access::Own => holds("keyward:self"),
        Access::Admin => holds("keyward:admin"),
        Access::Root => scopes.contains(&"keyward:root"),
        Access::Validate => holds("keyward:validate") || holds("keyward:validate-any"),
    }
}

async fn role(world: &World, name: &str, scopes: Option<&[&str]>) -> Actor {
    match scopes {
        Some(scopes) => world.actor("caller", scopes).await,
        None if name == "stranger" => world.stranger().await,
        // Well formed, but made with another keyring.
        None => world.bearer("kw_AJZzEYqjUBsyrYcJGwcYAZEcR5Ql1G0000000000000000").await,
    }
}

async fn every_method_is_closed_to_those_it_is_not_for(mut world: World) {
    world.settings.insert("notices_interval", "1s".to_owned());
    // All roles are the same principal.
    world.limits.test_notices_max = NonZeroU32::new(100).expect("a number");
    world.restart().await;
    world.relax().await;
    world.add_workspace("other", "ot").await;
    let replica = "INSERT INTO replica (incarnation, address, version, lease_ms, acked_seq, renewal, evicted)";
    world.db_execute(&format!("{replica} VALUES ('{REPLICA}', '', '', 1000, 0, 0, TRUE)")).await;
    let told = [Told::new(&world, "default").await, Told::new(&world, "other").await];
    println!("{:<58} {:<20} {:<18} {:<18}", "method", "role", "own workspace", "other workspace");
    for (path, input) in declared() {
        let access = METHODS.iter().find(|method| method.path == path).expect("in the table").access;
        if access == Access::Public {
            // Reports of leaked tokens have tests of their own.
            assert_eq!(path, "/keyward.v1.SelfService/ReportLeakedTokens");
            continue;
        }
        for (name, scopes) in ROLES {
            let mut cells = Vec::new();
            for (workspace, told) in ["default", "other"].into_iter().zip(&told) {
                let subject = Subject::of_call(&world, &path, workspace, told).await;
                let actor = role(&world, name, scopes).await;
                let before = world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await;
                let outcome = call(&actor, &path, subject.request(input.clone())).await;
                let expected = expected(&path, access, scopes, workspace);
                let code = outcome.as_ref().err().map_or(Code::Ok, Status::code);
                assert_eq!(code, expected, "{path} by {name} in {workspace}: {outcome:?}");
                if let Err(status) = &outcome {
                    assert_eq!(status.get_details_error_info().expect("ErrorInfo").domain, "keyward");
                    let after = world.db_number("SELECT COUNT(*) FROM audit_event WHERE code = 'OK'").await;
                    assert_eq!(before, after, "a refused call has no effect");
                }
                if let Ok(answer) = &outcome {
                    check_verdicts(&path, answer, scopes.expect("known"), workspace);
                }
                cells.push(format!("{code:?}"));
            }
            println!("{path:<58} {name:<20} {:<18} {:<18}", cells[0], cells[1]);
        }
    }
}

fn expected(path: &str, access: Access, scopes: Option<&[&str]>, workspace: &str) -> Code {
    let Some(scopes) = scopes else { return Code::Unauthenticated };
    let is_root = scopes.contains(&"keyward:root");
    let method = path.rsplit('/').next().unwrap_or_default();
    // Methods about the caller and the data plane name no workspace (the latter answers with a verdict), and a list of workspaces has none.
    let about_a_workspace = !path.contains("ValidationService")
        && !path.contains("Authorization")
        && !matches!(method, "ListWorkspaces" | "CreateWorkspace")
        && (!path.contains("SelfService") || method == "EndSession");
    if !opens(scopes, access) {
        Code::PermissionDenied
    } else if about_a_workspace && workspace != "default" && !is_root {
        Code::NotFound
    } else if method == "EndSession" && !opens(scopes, Access::Own) {
        Code::PermissionDenied
    } else if matches!(method, "SuspendWorkspace" | "DeleteWorkspace") && workspace == "default" {
        Code::FailedPrecondition
    } else {
        Code::Ok
    }
}

/// A validator that may not see a workspace learns nothing of its tokens.
fn check_verdicts(path: &str, answer: &Bytes, scopes: &[&str], workspace: &str) {
    let verdict = match path.rsplit('/').next() {
        Some("ValidateToken") => proto::ValidateTokenResponse::decode(answer.clone()).expect("an answer").verdict(),
        Some("StreamValidateTokens") => {
            let response = proto::StreamValidateTokensResponse::decode(answer.clone()).expect("a result");
            let Some(proto::stream_validate_tokens_response::Result::Answer(answer)) = response.result else { panic!("{response:?}") };
            answer.verdict()
        }
        Some("BatchValidateTokens") => proto::BatchValidateTokensResponse::decode(answer.clone()).expect("answers").responses[0].verdict(),
        Some("Check") if gateways::http_status(&CheckResponse::decode(answer.clone()).expect("an answer")) == 200 => proto::Verdict::Valid,
        Some("Check") => proto::Verdict::Unknown,
        _ => return,
    };
    let sees = workspace == "default" || scopes.contains(&"keyward:root") || scopes.contains(&"keyward:validate-any");
    assert_eq!(verdict, if sees { proto::Verdict::Valid } else { proto::Verdict::Unknown }, "{path} {scopes:?} {workspace}");
}

/// A request that does not even parse gets a stranger the same answer as a good one.
async fn strangers_learn_nothing_from_their_arguments(world: World) {
    let subject = Subject::new(&world, "default").await;
    let stranger = world.stranger().await;
    for (path, input) in declared().into_iter().filter(|(path, _)| !path.ends_with("/ReportLeakedTokens")) {
        let garbage = Bytes::from_static(b"\xff\xff\xff");
        let mut answers = Vec::new();
        for message in [subject.request(input), Bytes::new(), garbage, Bytes::from(vec![0; 2 << 20])] {
            let status = call(&stranger, &path, message).await.expect_err("a stranger");
            answers.push((status.code(), status.message().to_owned()));
        }
        answers.dedup();
        assert_eq!(answers.len(), 1, "{path}: {answers:?}");
        assert_eq!(answers[0].0, Code::Unauthenticated);
    }
    let root = world.root().await;
    let status = call(&root, "/keyward.v1.TokenService/GetToken", Bytes::from_static(b"\xff\xff\xff")).await.expect_err("garbage");
    assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "MALFORMED_MESSAGE");
    assert!(proto_message("keyward.v1.Token").fields().len() > 20, "the descriptors are ours: {:?}", mask().descriptor());
}
