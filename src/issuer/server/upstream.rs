//! The connection to the server, which every call shares.
//!
//! There is one, made when a call needs it, with the SVID and the authorities of that moment. What a server does to it
//! (GOAWAY every three minutes, a restart) costs a call that was not yet sent nothing: it goes over the next
//! connection. Every call ends at its deadline. That the server does not take the agent for one of its own is
//! seen here, whatever the call.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, Uri, uri::PathAndQuery};
use hyper::body::Incoming;
use rustls::sign::CertifiedKey;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::{Code, Status, body::Body};
use tower_service::Service;

use super::{
    dial::{Dialed, Dialer},
    error::{Denial, ServerError},
    faults::{ServerFaults, ServerUse},
    metrics::{ServerCall, ServerMetrics},
    tls::{ServerTrust, TlsPlan},
};
use crate::{identity::Bundle, telemetry::registry::Label as _};

/// How often a call that was not sent is tried again over another connection.
const TRIES: u32 = 3;

/// For how long after a dial that failed calls are refused with its error.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest of one dial, whoever waits for it.
const LONGEST_DIAL: Duration = Duration::from_secs(15);

/// Calls as the agent, and what they need.
pub(super) struct Upstream {
    dialer: Dialer,
    tls: TlsPlan,
    /// What the agent shows; `None` until it has an SVID.
    identity: watch::Sender<Option<Arc<CertifiedKey>>>,
    line: Mutex<LineState>,
    denied: watch::Sender<Option<Denial>>,
    metrics: Arc<ServerMetrics>,
    faults: Arc<ServerFaults>,
    /// Which authorities count, in words.
    counts: &'static str,
}

/// What is known of the connection.
struct LineState {
    trust: ServerTrust,
    current: Option<Live>,
    dialing: Option<watch::Receiver<Option<Result<Live, ServerError>>>>,
    failed: Option<(Instant, ServerError)>,
    /// Since when the server is signed by an authority that is not known.
    foreign_since: Option<Instant>,
    /// Grows with each change of what handshakes are made of, and with each connection.
    number: u64,
    standing: LineStanding,
}

/// A connection with its number.
#[derive(Clone)]
struct Live {
    number: u64,
    dialed: Dialed,
}

/// How it stands with the connection, for people.
#[derive(Clone, Debug, Default)]
pub struct LineStanding {
    /// As configured: `host:port`.
    pub server: String,
    /// Where the connection of the moment leads, and since when.
    pub connected: Option<(SocketAddr, SystemTime)>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("dialer", &self.dialer).finish_non_exhaustive()
    }
}

impl Upstream {
    /// For the server of this name; nothing is dialed yet. `counts` is said of one with an authority that is not known.
    pub(super) fn new(
        dialer: Dialer,
        tls: TlsPlan,
        trust: ServerTrust,
        metrics: Arc<ServerMetrics>,
        counts: &'static str,
    ) -> Arc<Self> {
        let standing = LineStanding { server: dialer.server(), ..LineStanding::default() };
        let faults = Arc::new(ServerFaults::new(tls.clock));
        Arc::new(Self {
            dialer,
            tls,
            identity: watch::Sender::new(None),
            line: Mutex::new(LineState {
                trust,
                current: None,
                dialing: None,
                failed: None,
                foreign_since: None,
                number: 0,
                standing,
            }),
            denied: watch::Sender::new(None),
            metrics,
            faults,
            counts,
        })
    }

    /// A connection that shows the agent's SVID, for calls that end at `deadline`. Waits for an SVID until then.
    ///
    /// # Errors
    /// [`ServerError::NoSvid`]: there was none by then.
    pub(super) async fn agent(self: &Arc<Self>, deadline: Instant) -> Result<ServerConnection, ServerError> {
        let mut identity = self.identity.subscribe();
        match timeout_at(deadline, identity.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => Ok(ServerConnection { upstream: Arc::clone(self), own: None, deadline }),
            _ => Err(ServerError::NoSvid),
        }
    }

    /// A connection of its own that shows nothing, to a server that is believed by `trust`, of which `counts` tells.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn stranger(
        self: &Arc<Self>,
        trust: ServerTrust,
        counts: &'static str,
        deadline: Instant,
    ) -> Result<ServerConnection, ServerError> {
        let tls = self.tls.client(trust, None);
        let dialed = timeout_at(deadline, self.dialer.dial(&tls)).await;
        let dialed = match dialed {
            Ok(dialed) => dialed.map_err(|error| ServerError::dialed(self.dialer.server(), error, counts)),
            Err(_late) => Err(ServerError::Late),
        };
        self.note(dialed.as_ref().err());
        Ok(ServerConnection { upstream: Arc::clone(self), own: Some(dialed?), deadline })
    }

    /// What is said of a server with an authority that is not known.
    pub(super) fn counts(&self) -> &'static str {
        self.counts
    }

    /// What the agent shows from now on. Calls that were sent end as they began.
    pub(super) fn show(&self, identity: Arc<CertifiedKey>) {
        self.identity.send_replace(Some(identity));
        self.begin_anew(|_| ());
    }

    /// The agent has nothing to show any more.
    pub(super) fn show_nothing(&self) {
        self.identity.send_replace(None);
        self.begin_anew(|_| ());
    }

    /// The authorities by which the server is known from now on.
    pub(super) fn trust(&self, bundle: &Bundle) {
        self.believe(ServerTrust::Roots(bundle.x509_authorities.as_slice().into()));
    }

    /// [`Upstream::trust`], by whatever the server is known.
    pub(super) fn believe(&self, trust: ServerTrust) {
        if self.lock().trust != trust {
            self.begin_anew(|line| line.trust = trust);
        }
    }

    /// By what the server is known.
    pub(super) fn trusted(&self) -> ServerTrust {
        self.lock().trust.clone()
    }

    /// The last denial of a call that showed the agent's SVID, and each further one.
    pub(super) fn denials(&self) -> watch::Receiver<Option<Denial>> {
        self.denied.subscribe()
    }

    /// How it stands with the connection.
    pub(super) fn standing(&self) -> LineStanding {
        let line = self.lock();
        let mut standing = line.standing.clone();
        if line.current.as_ref().is_none_or(|live| live.dialed.sender.is_closed()) {
            standing.connected = None;
        }
        standing
    }

    /// What is wrong with the server.
    pub(super) fn faults(&self) -> &Arc<ServerFaults> {
        &self.faults
    }

    /// Drops the connection: the next call makes another.
    pub(super) fn hang_up(&self) {
        self.begin_anew(|_| ());
    }

    fn begin_anew(&self, change: impl FnOnce(&mut LineState)) {
        let mut line = self.lock();
        change(&mut line);
        line.number += 1;
        line.current = None;
        line.dialing = None;
        line.failed = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LineState> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long what answers as the server has been signed by an authority that is not known.
    pub(super) fn foreign_for(&self) -> Option<Duration> {
        self.lock().foreign_since.map(|since| since.elapsed())
    }

    fn note(&self, failed: Option<&ServerError>) {
        match failed {
            Some(error) => self.faults.failed(ServerUse::Connection, error.to_string()),
            None => self.faults.works(ServerUse::Connection),
        }
        let mut line = self.lock();
        match failed {
            Some(ServerError::UnknownAuthority { .. }) => {
                line.foreign_since.get_or_insert_with(Instant::now);
            }
            // A server that is away has not said who it is.
            Some(_) => {}
            None => line.foreign_since = None,
        }
    }

    /// The connection of the moment, or the next one.
    async fn live(self: &Arc<Self>) -> Result<Live, ServerError> {
        let mut dialing = {
            let mut line = self.lock();
            if let Some(live) = line.current.as_ref().filter(|live| !live.dialed.sender.is_closed()) {
                return Ok(live.clone());
            }
            line.current = None;
            match (&line.dialing, &line.failed) {
                (Some(dialing), _) => dialing.clone(),
                (None, Some((when, error))) if when.elapsed() < PAUSE => return Err(error.clone()),
                (None, _) => self.begin_dial(&mut line),
            }
        };
        let dialed = dialing.wait_for(Option::is_some).await;
        dialed.ok().and_then(|dialed| dialed.clone()).unwrap_or(Err(ServerError::Late))
    }

    /// One dial for all who wait: it goes on when they leave.
    fn begin_dial(
        self: &Arc<Self>,
        line: &mut LineState,
    ) -> watch::Receiver<Option<Result<Live, ServerError>>> {
        let (sender, receiver) = watch::channel(None);
        line.number += 1;
        line.dialing = Some(receiver.clone());
        let number = line.number;
        let tls = self.tls.client(line.trust.clone(), self.identity.borrow().as_ref());
        let upstream = Arc::clone(self);
        drop(tokio::spawn(async move {
            let dialed = match timeout_at(Instant::now() + LONGEST_DIAL, upstream.dialer.dial(&tls)).await {
                Ok(Ok(dialed)) => Ok(Live { number, dialed }),
                Ok(Err(error)) => Err(ServerError::dialed(upstream.dialer.server(), error, upstream.counts)),
                Err(_late) => Err(ServerError::Late),
            };
            upstream.dialed(number, &dialed);
            sender.send_replace(Some(dialed));
        }));
        receiver
    }

    fn dialed(&self, number: u64, dialed: &Result<Live, ServerError>) {
        self.note(dialed.as_ref().err());
        let now = self.tls.clock.now();
        let mut line = self.lock();
        // What it was made of has changed meanwhile: it is of use to those who waited for it, and to nobody else.
        if line.number != number {
            return;
        }
        line.dialing = None;
        match dialed {
            Ok(live) => {
                line.standing.connected = Some((live.dialed.address, now));
                line.failed = None;
                line.current = Some(live.clone());
            }
            Err(error) => line.failed = Some((Instant::now(), error.clone())),
        }
    }

    /// This connection is of no more use.
    fn leave(&self, number: u64) {
        let mut line = self.lock();
        if line.current.as_ref().is_some_and(|live| live.number == number) {
            line.current = None;
        }
    }

    async fn send(self: &Arc<Self>, mut request: Request<Body>) -> Result<Response<Incoming>, ServerError> {
        let mut tries = 0;
        loop {
            let mut live = self.live().await?;
            tries += 1;
            match live.dialed.sender.try_send_request(request).await {
                Ok(response) => {
                    self.look_at(&response, live.number);
                    return Ok(response);
                }
                Err(mut error) => {
                    self.leave(live.number);
                    match error.take_message() {
                        Some(unsent) if tries < TRIES => request = unsent,
                        _ => return Err(ServerError::lost(&error.into_error())),
                    }
                }
            }
        }
    }

    /// A server that does not know the agent says so in place of an answer. What it says of an SVID that the agent shows no more
    /// does not count.
    fn look_at(&self, response: &Response<Incoming>, number: u64) {
        let denial = Status::from_header_map(response.headers()).as_ref().and_then(Denial::of);
        let is_current = || self.lock().current.as_ref().is_some_and(|live| live.number == number);
        if let Some(denial) = denial.filter(|_| is_current()) {
            self.denied.send_replace(Some(denial));
        }
    }
}

/// What the generated clients call through, each call to end at one deadline.
#[derive(Clone)]
pub(super) struct ServerConnection {
    upstream: Arc<Upstream>,
    /// A stranger's.
    own: Option<Dialed>,
    deadline: Instant,
}

impl fmt::Debug for ServerConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConnection").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl ServerConnection {
    /// The answer to `call`, all of it, by the deadline.
    ///
    /// # Errors
    /// [`ServerError`] of the connection, of the server, or of the deadline.
    pub(super) async fn answer<T>(
        &self,
        call: ServerCall,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ServerError> {
        let answer = async { answer.await.map_err(|status| ServerError::of(call.text(), &status)) };
        self.result(call, answer).await
    }

    /// The result of `call`, which consists of several messages, by the deadline.
    ///
    /// # Errors
    /// As it says, or [`ServerError::Late`].
    pub(super) async fn result<T, E: From<ServerError> + Faulty>(
        &self,
        call: ServerCall,
        result: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let result = timeout_at(self.deadline, result).await;
        let result = result.unwrap_or_else(|_late| Err(ServerError::Late.into()));
        let code = result.as_ref().map_or_else(Faulty::code, |_| Code::Ok);
        self.upstream.metrics.called(call, code);
        result
    }
}

/// An error that a call ends with.
pub(super) trait Faulty {
    /// As which it counts.
    fn code(&self) -> Code;
}

impl Faulty for ServerError {
    fn code(&self) -> Code {
        match self {
            Self::Answered { code, .. } | Self::Refused { code, .. } => *code,
            Self::Denied(_) => Code::PermissionDenied,
            Self::Late => Code::DeadlineExceeded,
            Self::Senseless { .. } => Code::Internal,
            _ => Code::Unavailable,
        }
    }
}

impl Service<Request<Body>> for ServerConnection {
    type Response = Response<Incoming>;
    type Error = ServerError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Self { upstream, own, deadline } = self.clone();
        Box::pin(async move {
            dress(&mut request, &upstream.dialer.server(), deadline);
            let sent = async {
                match own {
                    Some(mut own) => {
                        let sent = own.sender.send_request(request).await;
                        sent.map_err(|error| ServerError::lost(&error))
                    }
                    None => upstream.send(request).await,
                }
            };
            let response = timeout_at(deadline, sent).await.unwrap_or(Err(ServerError::Late))?;
            if !is_grpc(&response) {
                return Err(ServerError::NotGrpc {
                    server: upstream.dialer.server(),
                    status: response.status().as_u16(),
                });
            }
            Ok(response)
        })
    }
}

/// Whether it is what a gRPC server answers, and not a web page.
fn is_grpc(response: &Response<Incoming>) -> bool {
    let content = response.headers().get(http::header::CONTENT_TYPE);
    content.is_some_and(|content| content.as_bytes().starts_with(b"application/grpc"))
}

/// Adds what HTTP/2 and gRPC ask for: whom the request is for, and until when its answer is of use.
fn dress(request: &mut Request<Body>, server: &str, deadline: Instant) {
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    if let Ok(uri) = Uri::builder().scheme("https").authority(server).path_and_query(path).build() {
        *request.uri_mut() = uri;
    }
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().clamp(1, 99_999_999);
    if let Ok(left) = HeaderValue::from_str(&format!("{left}m")) {
        request.headers_mut().insert("grpc-timeout", left);
    }
    let agent = HeaderValue::from_static(concat!("durward/", env!("CARGO_PKG_VERSION")));
    request.headers_mut().insert(http::header::USER_AGENT, agent);
}
