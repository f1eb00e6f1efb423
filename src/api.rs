//! The wire: gRPC services that translate, and the gate that every call passes first.
//!
//! Invariant: this room names neither `store` nor `cache` (test `rooms_import_upwards_only`); it holds no rule of the domain.
//! Invariant: a handler runs only for a caller whom the [`gate`] has found good for this very call
//! (test `every_method_is_closed_to_those_it_is_not_for`).

mod audit_events;
mod convert;
mod envoy;
pub mod gate;
mod gateway;
pub mod hot;
pub mod http;
mod invalidations;
mod notices;
mod principals;
mod rates;
mod replicas;
mod self_service;
mod status;
mod stream;
mod tokens;
mod validation;
mod workspaces;

use std::{sync::Arc, time::Duration};

use tokio::sync::OwnedSemaphorePermit;
use tonic::{Request, Status, service::Routes};
use tonic_health::{pb::health_server::HealthServer, server::HealthService};

use crate::{
    ambient::{Stopwatch, Time},
    audit::Audit,
    caller::Caller,
    directory::Directory,
    error::Error,
    fence::{Changed, Fence, Propagation},
    issuer::Issuer,
    notices::Notices,
    proto::{
        self, DESCRIPTORS, audit_service_server::AuditServiceServer, envoy::authorization_server::AuthorizationServer,
        notice_service_server::NoticeServiceServer, principal_service_server::PrincipalServiceServer,
        replica_service_server::ReplicaServiceServer, self_service_server::SelfServiceServer, token_service_server::TokenServiceServer,
        validation_service_server::ValidationServiceServer, workspace_service_server::WorkspaceServiceServer,
    },
    telemetry::Metrics,
    validator::Validator,
};

/// The services whose health is told one by one.
pub const SERVICES: [&str; 9] = [
    "envoy.service.auth.v3.Authorization",
    "keyward.v1.AuditService",
    "keyward.v1.NoticeService",
    "keyward.v1.PrincipalService",
    "keyward.v1.ReplicaService",
    "keyward.v1.SelfService",
    "keyward.v1.TokenService",
    "keyward.v1.ValidationService",
    "keyward.v1.WorkspaceService",
];

/// What the handlers ask.
#[derive(Clone)]
pub struct Api {
    /// The data plane.
    pub validator: Arc<Validator>,
    /// Tokens.
    pub issuer: Arc<Issuer>,
    /// Workspaces and principals.
    pub directory: Arc<Directory>,
    /// Who did what.
    pub audit: Arc<Audit>,
    /// What is told of tokens.
    pub notices: Arc<Notices>,
    /// Where changes take effect.
    pub fence: Arc<Fence>,
    /// Where verdicts are counted.
    pub metrics: Arc<Metrics>,
}

/// What the gate found out about a call: who, and when.
#[derive(Clone, Debug)]
struct Call {
    caller: Caller,
    now: Time,
    deadline: Deadline,
}

/// When a call began, how long its caller waits from then on, and its place among those that work.
#[derive(Clone, Debug)]
struct Deadline {
    begun: Stopwatch,
    longest: Duration,
    place: Arc<parking_lot::Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Deadline {
    fn new(begun: Stopwatch, longest: Duration) -> Self {
        Self { begun, longest, place: Arc::default() }
    }
}

/// Takes a call apart.
fn call<T>(mut request: Request<T>) -> Result<(Call, T), Status> {
    let call = request.extensions_mut().remove::<Call>();
    let call = call.ok_or_else(|| Error::Internal("a call came past the gate".into()))?;
    Ok((call, request.into_inner()))
}

/// What is left of a deadline for the answer itself.
const ANSWER_TIME: Duration = Duration::from_millis(500);

impl Api {
    /// Waits until a change is in force everywhere, as long as its caller waits, and answers how far it has got. Who waits for other servers keeps nobody out of this one.
    async fn in_force<T>(&self, changed: Changed<T>, deadline: Deadline) -> (T, Option<proto::Propagation>) {
        drop(deadline.place.lock().take());
        let left = deadline.longest.saturating_sub(deadline.begun.elapsed());
        let patience = left.saturating_sub(ANSWER_TIME.min(left / 4));
        let watch = Stopwatch::start();
        let is_waited_for = changed.change.is_some();
        let propagation = self.fence.propagate(changed.change, patience).await;
        if is_waited_for {
            self.metrics.barrier(watch.elapsed(), propagation == Propagation::Complete);
        }
        (changed.value, Some(convert::propagation(propagation)))
    }

    /// All services: ours, health, and reflection for new and old clients.
    ///
    /// # Errors
    /// If the compiled descriptors do not read.
    pub fn routes(self, health: HealthService) -> Result<Routes, tonic_reflection::server::Error> {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // With these, grpcurl shows the details of errors.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let mut routes = Routes::builder();
        routes
            .add_service(ValidationServiceServer::new(self.clone()))
            .add_service(TokenServiceServer::new(self.clone()))
            .add_service(WorkspaceServiceServer::new(self.clone()))
            .add_service(PrincipalServiceServer::new(self.clone()))
            .add_service(AuditServiceServer::new(self.clone()))
            .add_service(NoticeServiceServer::new(self.clone()))
            .add_service(ReplicaServiceServer::new(self.clone()))
            .add_service(AuthorizationServer::new(self.clone()))
            .add_service(SelfServiceServer::new(self))
            .add_service(HealthServer::new(health).max_decoding_message_size(gate::PUBLIC_BYTES_MAX))
            .add_service(reflection().build_v1()?.max_decoding_message_size(gate::PUBLIC_BYTES_MAX))
            .add_service(reflection().build_v1alpha()?.max_decoding_message_size(gate::PUBLIC_BYTES_MAX));
        Ok(routes.routes().prepare())
    }
}
