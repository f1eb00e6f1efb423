//! `ReplicaService`: the servers of a database.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    fence::Member,
    proto::{self, replica_service_server::ReplicaService},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ReplicaService for Api {
    async fn list_replicas(&self, request: Request<proto::ListReplicasRequest>) -> Answer<proto::ListReplicasResponse> {
        let _caller = call(request)?;
        let (replicas, head_number) = self.fence.replicas().await?;
        let me = self.fence.id();
        let replicas = replicas.into_iter().map(|replica| shown(replica, &me)).collect();
        Ok(Response::new(proto::ListReplicasResponse { replicas, head_number }))
    }

    async fn release_replica(&self, request: Request<proto::ReleaseReplicaRequest>) -> Answer<proto::ReleaseReplicaResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let released = self.fence.release(caller, &message.id, now).await?;
        let replica = Some(shown(released, &self.fence.id()));
        Ok(Response::new(proto::ReleaseReplicaResponse { replica, propagation: Some(convert::complete()) }))
    }
}

fn shown(replica: Member, me: &str) -> proto::Replica {
    proto::Replica {
        self_: replica.id == me,
        id: replica.id,
        display_name: replica.name,
        version: replica.version,
        start_time: convert::timestamp(replica.start_time),
        lease: Some(convert::wire_span(replica.lease)),
        acked_only: replica.is_acked_only,
        acknowledged_number: replica.acked,
        evicted: replica.is_evicted,
    }
}
