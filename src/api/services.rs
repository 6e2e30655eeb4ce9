//! From an HTTP/2 request to the service it is for.
//!
//! Three services, told apart by the first part of the path. This is all the routing there is: no middleware stands
//! in the way of a call.

use std::{convert::Infallible, future::Future, pin::Pin, sync::Arc};

use http::{Request, Response};
use hyper::body::Incoming;
use tonic::{Status, body::Body};
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service as _;

use super::{
    health::HealthService,
    proto::{WORKLOAD_FDS, workload_server::spiffe_workload_api_server::SpiffeWorkloadApiServer},
    workload::WorkloadApi,
};
use crate::os::http::HealthState;

/// The largest request message, in bytes. The largest thing a request carries is a token to validate, and a token
/// that fits no HTTP header is of no use to anybody.
pub const MAX_REQUEST: usize = 16 * 1024;

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;
type Reflection = Arc<dyn Fn(Request<Incoming>) -> Answer + Send + Sync>;

/// The services of the public socket. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    workload: SpiffeWorkloadApiServer<WorkloadApi>,
    health: HealthServer<HealthService>,
    reflection_v1: Reflection,
    reflection_v1alpha: Reflection,
}

impl Services {
    /// Serves `workload`, health from `health`, and reflection (v1 and v1alpha) of both.
    ///
    /// # Errors
    /// The descriptors that are built in do not decode, which a test rules out.
    pub fn new(
        workload: WorkloadApi,
        health: Arc<HealthState>,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(WORKLOAD_FDS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // The types of the two servers cannot be named, hence the closures.
        let v1 = builder().build_v1()?;
        let v1alpha = builder().build_v1alpha()?;
        Ok(Self {
            workload: SpiffeWorkloadApiServer::new(workload)
                .max_decoding_message_size(MAX_REQUEST)
                .max_encoding_message_size(usize::MAX),
            health: HealthServer::new(HealthService::new(health)).max_decoding_message_size(MAX_REQUEST),
            reflection_v1: Arc::new(move |request| v1.clone().call(request)),
            reflection_v1alpha: Arc::new(move |request| v1alpha.clone().call(request)),
        })
    }

    /// Answers one request.
    pub fn answer(&self, request: Request<Incoming>) -> Answer {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        match service {
            "SpiffeWorkloadAPI" => self.workload.clone().call(request),
            "grpc.health.v1.Health" => self.health.clone().call(request),
            "grpc.reflection.v1.ServerReflection" => (self.reflection_v1)(request),
            "grpc.reflection.v1alpha.ServerReflection" => (self.reflection_v1alpha)(request),
            _ => {
                // grpc-go's text for the same.
                let status = Status::unimplemented(format!("unknown service {}", printable(service)));
                Box::pin(std::future::ready(Ok(status.into_http())))
            }
        }
    }
}

/// What a stranger sent, made fit to be repeated: at most 64 characters, none of them a control.
fn printable(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '?' } else { c }).collect()
}
