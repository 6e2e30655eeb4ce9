//! From an HTTP/2 request to the service it is for.
//!
//! Three services, told apart by the first part of the path. This is all the routing there is: no middleware
//! stands in the way of a call. The Workload API asks the limits itself; what else is asked here (health,
//! reflection, services that there are not) is charged to the caller as [`Method::Other`] before anything is
//! done for it. What never comes so far is charged and counted all the same ([`heads`](super::heads)).

use std::{convert::Infallible, sync::Arc};

use http::{Method as Verb, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tonic::{Status, body::Body};
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service as _;

use super::{
    call::Call,
    guard::TimeLeft,
    heads::{CountedBody, CountedHead},
    health::HealthService,
    journal::Journal,
    messages::WholeMessages,
    proto::{WORKLOAD_FDS, workload_server::spiffe_workload_api_server::SpiffeWorkloadApiServer},
    reached::Reached,
    status::RequestError,
    workload::WorkloadApi,
};
pub use super::{
    guard::{GrpcAnswer, GuardedAnswer},
    heads::HeadAnswer,
};
use crate::{
    limits::{Limits, Method, patience},
    peer::{ConnectionService, Crowded, Peer, RequestBody, Unheard},
    telemetry::health::HealthState,
};

/// The largest request message, in bytes: a token to validate, as the agent itself makes them for the longest audiences.
pub const MAX_REQUEST: usize = 64 * 1024;

/// The body of a request, with its errors as gRPC has them.
type GrpcBody = WholeMessages<CountedBody>;

type Reflection = Arc<dyn Fn(Request<GrpcBody>) -> GrpcAnswer + Send + Sync>;

/// The services of the public socket. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    workload: SpiffeWorkloadApiServer<WorkloadApi>,
    health: HealthServer<HealthService>,
    reflection_v1: Reflection,
    reflection_v1alpha: Reflection,
    limits: Limits,
    journal: Arc<Journal>,
}

/// The largest request to the other services: a name.
const MAX_NAME: usize = 1024;

/// What a stream of reflection takes, in bytes: it is answered in a task of its own, two answers ahead of who reads.
const REFLECTION: u64 = 128 * 1024;

/// All requests of one reflection stream, in bytes: dozens of questions, as each is answered with kilobytes
/// and the stream was charged once.
const MAX_QUESTIONS: u64 = 2 * 1024;

/// The paths that are answered. A request's own path is a part of the buffer it came in.
const PATHS: [&str; 11] = [
    "/SpiffeWorkloadAPI/FetchX509SVID",
    "/SpiffeWorkloadAPI/FetchX509Bundles",
    "/SpiffeWorkloadAPI/FetchJWTSVID",
    "/SpiffeWorkloadAPI/FetchJWTBundles",
    "/SpiffeWorkloadAPI/ValidateJWTSVID",
    "/SpiffeWorkloadAPI/FetchWITSVID",
    "/SpiffeWorkloadAPI/FetchWITBundles",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The headers that anybody here reads.
const HEADERS: [&str; 4] = ["workload.spiffe.io", "grpc-encoding", "grpc-accept-encoding", "grpc-timeout"];

/// A longer value than any that means something here, in bytes; of what is longer so much is kept.
const MAX_HEADER: usize = 256;

/// The request with a head of what is needed, copied: what else was sent, kilobytes perhaps, is not kept as
/// long as the request takes.
fn slim<B>(request: Request<B>) -> Request<B> {
    let (mut head, body) = request.into_parts();
    if let Some(path) = PATHS.into_iter().find(|path| *path == head.uri.path()) {
        head.uri = http::Uri::from_static(path);
    }
    let mut headers = http::HeaderMap::with_capacity(HEADERS.len());
    for name in HEADERS {
        // Whether there are more than one counts, but not how many.
        for value in head.headers.get_all(name).iter().take(2) {
            let value = value.as_bytes();
            if let Ok(value) = http::HeaderValue::from_bytes(value.get(..MAX_HEADER).unwrap_or(value)) {
                headers.append(name, value);
            }
        }
    }
    head.headers = headers;
    Request::from_parts(head, body)
}

impl Services {
    /// Serves `workload`, health from `health`, and reflection (v1 and v1alpha) of both.
    ///
    /// # Errors
    /// The descriptors that are built in do not decode, which a test rules out.
    pub fn new(
        workload: WorkloadApi,
        health: Arc<HealthState>,
        limits: Limits,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(WORKLOAD_FDS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // The types of the two servers cannot be named, hence the closures.
        let v1 = builder().build_v1()?.max_decoding_message_size(MAX_NAME);
        let v1alpha = builder().build_v1alpha()?.max_decoding_message_size(MAX_NAME);
        Ok(Self {
            journal: Arc::clone(workload.journal()),
            workload: SpiffeWorkloadApiServer::new(workload)
                .max_decoding_message_size(MAX_REQUEST)
                .max_encoding_message_size(usize::MAX),
            health: HealthServer::new(HealthService::new(health)).max_decoding_message_size(MAX_NAME),
            reflection_v1: Arc::new(move |request| v1.clone().call(request)),
            reflection_v1alpha: Arc::new(move |request| v1alpha.clone().call(request)),
            limits,
        })
    }
}

impl hyper::service::Service<Request<RequestBody>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = HeadAnswer;

    fn call(&self, request: Request<RequestBody>) -> HeadAnswer {
        let no_grpc = no_grpc(&request);
        let mut request = slim(request);
        let reached = Reached::default();
        let method = method_of(request.uri().path());
        let head = CountedHead {
            journal: Arc::clone(&self.journal),
            limits: self.limits.clone(),
            caller: request.extensions().get().cloned(),
            method,
            reached: reached.clone(),
            code: None,
        };
        request.extensions_mut().insert(reached.clone());
        let left = TimeLeft::until(ends(&request));
        let answer = if let Some((code, status)) = no_grpc {
            answered_with(code, status)
        } else if request.extensions().get::<Crowded>().is_some() {
            head.refuse_for_memory(&RequestError::Crowded);
            answered(RequestError::Crowded.into())
        } else if service_of(request.uri().path()) == WORKLOAD {
            self.workload.clone().call(request.map(|body| grpc_body(body, MAX_REQUEST, reached)))
        } else {
            self.other(request, reached)
        };
        HeadAnswer::new(GuardedAnswer::new(answer, is_streamed(method), left), head)
    }
}

impl ConnectionService for Services {
    type Body = Body;

    fn unheard(&self, peer: &Peer, why: Unheard) {
        self.journal.ended(Method::Other, why.into());
        self.limits.charge_late(peer.caller());
    }

    fn full(&self, peer: &Peer, streams: u32) {
        self.journal.full(peer, streams);
    }
}

impl Services {
    /// What is no Workload API. It is admitted at once or not at all: its body was not read yet, and may pin what it came
    /// in.
    fn other(&self, request: Request<RequestBody>, reached: Reached) -> GrpcAnswer {
        let call = Call::without_header(request.extensions(), Method::Other);
        if let Err(error) = call.and_then(|call| Ok(call.admit_at_once(&self.limits)?)) {
            return answered(Status::from(error));
        }
        let named = |body| grpc_body(body, MAX_NAME, reached.clone());
        let asked = |body: RequestBody| named(body.at_most(MAX_QUESTIONS));
        match service_of(request.uri().path()) {
            "grpc.health.v1.Health" => self.health.clone().call(request.map(named)),
            "grpc.reflection.v1.ServerReflection" => reflected(&self.reflection_v1, request.map(asked)),
            "grpc.reflection.v1alpha.ServerReflection" => {
                reflected(&self.reflection_v1alpha, request.map(asked))
            }
            // grpc-go's text for the same.
            service => answered(Status::unimplemented(format!("unknown service {}", printable(service)))),
        }
    }
}

/// Reflection, where there is room for what it takes; that is held until the answer has ended.
fn reflected(reflection: &Reflection, request: Request<GrpcBody>) -> GrpcAnswer {
    let peer = request.extensions().get::<Arc<Peer>>();
    let room = match peer.and_then(|peer| peer.holding()).map(|holding| holding.try_keep(REFLECTION)) {
        Some(None) => return answered(RequestError::NoMemory.into()),
        Some(room) => room,
        None => None,
    };
    let answer = reflection(request);
    Box::pin(async move {
        let Ok(response) = answer.await;
        // The body has the room, and gives it back when it goes.
        Ok(response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _room = &room;
                frame
            }))
        }))
    })
}

const WORKLOAD: &str = "SpiffeWorkloadAPI";

fn service_of(path: &str) -> &str {
    path.split('/').nth(1).unwrap_or_default()
}

/// The method that a path names, if it is one of the Workload API.
fn method_of(path: &str) -> Method {
    let named = |method: &Method| {
        let rpc =
            path.strip_prefix('/').and_then(|path| path.strip_prefix(method.service())?.strip_prefix('/'));
        method.service() == WORKLOAD && rpc == Some(method.rpc())
    };
    Method::ALL.into_iter().find(named).unwrap_or(Method::Other)
}

/// Whether the answer may be more than one message, or late: what is no method of the Workload API may be anything.
fn is_streamed(method: Method) -> bool {
    !matches!(method, Method::FetchJwtSvid | Method::ValidateJwtSvid)
}

/// When the call is to end, as its client says.
pub(super) fn ends<B>(request: &Request<B>) -> Option<Instant> {
    let timeout = patience::timeout(request.headers().get("grpc-timeout")?.as_bytes())?;
    Instant::now().checked_add(timeout)
}

/// What a request is told that is none of gRPC's, in the codes and texts of grpc-go.
fn no_grpc<B>(request: &Request<B>) -> Option<(StatusCode, Status)> {
    let content_type = request.headers().get(CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    // `application/grpc`, `application/grpc+proto`, `application/grpc;charset=utf-8`.
    let rest = content_type.strip_prefix(b"application/grpc");
    if !rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';'))) {
        let shown = printable(&String::from_utf8_lossy(content_type));
        let text = format!("invalid gRPC request content-type {shown:?}");
        return Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, Status::invalid_argument(text)));
    }
    (request.method() != Verb::POST).then(|| {
        let method = printable(request.method().as_str());
        let text = format!("Received a HEADERS frame with :method {method:?} which should be POST");
        (StatusCode::METHOD_NOT_ALLOWED, Status::internal(text))
    })
}

/// The body by whole messages of at most so many bytes, with its errors as gRPC has them.
pub(super) fn grpc_body(body: RequestBody, most: usize, reached: Reached) -> GrpcBody {
    WholeMessages::new(CountedBody::new(body, reached), most)
}

/// An answer that is known at once.
pub(super) fn answered(status: Status) -> GrpcAnswer {
    answered_with(StatusCode::OK, status)
}

/// The same, with what HTTP knows it as.
fn answered_with(code: StatusCode, status: Status) -> GrpcAnswer {
    let mut response = status.into_http();
    *response.status_mut() = code;
    Box::pin(std::future::ready(Ok(response)))
}

/// What a stranger sent, made fit to be repeated: at most 64 characters, none of them a control.
fn printable(text: &str) -> String {
    text.chars().take(64).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_of_a_head_is_kept() {
        let long = "x".repeat(MAX_HEADER + 1);
        let mut request = Request::post("/SpiffeWorkloadAPI/FetchJWTSVID");
        let sent = [
            ("workload.spiffe.io", "true"),
            ("workload.spiffe.io", "twice"),
            ("workload.spiffe.io", "thrice"),
            ("grpc-timeout", "250m"),
            ("grpc-encoding", &long),
            ("user-agent", "kilobytes perhaps"),
        ];
        for (name, value) in sent {
            request = request.header(name, value);
        }
        let slim = slim(request.body(()).unwrap());
        let kept: Vec<_> =
            slim.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        let want = [
            ("workload.spiffe.io", "true"),
            ("workload.spiffe.io", "twice"),
            ("grpc-encoding", &"x".repeat(MAX_HEADER)),
            ("grpc-timeout", "250m"),
        ];
        assert_eq!(kept, want);
    }

    #[test]
    fn a_path_names_a_method_or_none() {
        for (path, want) in [
            ("/SpiffeWorkloadAPI/FetchJWTSVID", Method::FetchJwtSvid),
            ("/SpiffeWorkloadAPI/FetchWITBundles", Method::FetchWitBundles),
            ("/SpiffeWorkloadAPI/fetchjwtsvid", Method::Other),
            ("/SpiffeWorkloadAPI/FetchJWTSVID/", Method::Other),
            ("//SpiffeWorkloadAPI/FetchJWTSVID", Method::Other),
            ("/SpiffeWorkloadAPI/Other", Method::Other),
            ("/SpiffeWorkloadAPI/StreamSecrets", Method::Other),
            ("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", Method::Other),
            ("/grpc/Other", Method::Other),
            ("*", Method::Other),
            ("", Method::Other),
        ] {
            assert_eq!(method_of(path), want, "{path}");
        }
    }
}
