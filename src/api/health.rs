//! `grpc.health.v1.Health`, as spire-agent answers it (`pkg/agent/api/health/v1/service.go`): Check for the whole agent
//! only, no Watch. The state is the agent's own; no call is made to find it out.

use std::sync::Arc;

use tokio_stream::Empty;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health,
};

use super::status::RequestError;
use crate::{peer::Peer, telemetry::health::HealthState};

/// Answers health checks.
#[derive(Debug, Clone)]
pub struct HealthService {
    state: Arc<HealthState>,
}

impl HealthService {
    /// Answers with `state`.
    pub fn new(state: Arc<HealthState>) -> Self {
        Self { state }
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Empty<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        // Whom nothing but this is answered is not told that all is well.
        if request.extensions().get::<Arc<Peer>>().is_some_and(|peer| peer.pid().as_raw() == 0) {
            return Err(RequestError::OtherPidNamespace.into());
        }
        if !request.into_inner().service.is_empty() {
            return Err(Status::invalid_argument("per-service health is not supported"));
        }
        let status = if self.state.ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    async fn watch(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("watching health is not implemented"))
    }
}
