//! The service of a connection, watched: each request gets its peer, and its answer a [`Turn`].

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, service::Service};

use super::{
    credentials::Peer,
    head_count::{HeadCount, Unheard},
    request::RequestBody,
    stream_places::{StreamPlace, StreamPlaces},
    turns::{Part, Turn, Turns},
};

/// By this header a refusal by the limits says when to come back (gRFC A6), whatever its status.
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What answers the requests of one connection.
pub trait ConnectionService:
    Service<
        Request<RequestBody>,
        Response = Response<Self::Body>,
        Error = Infallible,
        Future: Unpin + Send + 'static,
    > + Send
    + Sync
    + 'static
{
    /// The body of an answer.
    type Body: Body<Data = Bytes, Error: Into<BoxError>> + Unpin + Send + 'static;

    /// A request head of the peer's came, and begins no call. By default nobody counts it.
    fn unheard(&self, _peer: &Peer, _why: Unheard) {}

    /// So many streams are open on a connection of the peer's, which are as many as may be, and all wait for news. By default
    /// nobody says so.
    fn full(&self, _peer: &Peer, _streams: u32) {}
}

/// Stands in the extensions of a request that is to be refused at once: the node is out of memory, and it would have to
/// wait in it behind others of its connection.
#[derive(Clone, Copy, Debug)]
pub struct Crowded;

/// Gives each request its peer, and keeps its [`Turn`]. A request is handed on at once, so that of its head nothing is
/// kept that nobody needs; what answers it is polled when its turn has come.
pub(super) struct WatchedService<S> {
    pub(super) service: Arc<S>,
    pub(super) peer: Arc<Peer>,
    pub(super) turns: Arc<Turns>,
    pub(super) heads: Arc<HeadCount>,
    pub(super) places: Arc<StreamPlaces>,
}

impl<S: ConnectionService> Service<Request<Incoming>> for WatchedService<S> {
    type Response = Response<WatchedBody<S::Body>>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.heads.begins();
        let (turn, place) = (Turn::begin(&self.turns), self.places.take());
        let mut request = request.map(|body| RequestBody::new(body, turn.upload()));
        request.extensions_mut().insert(Arc::clone(&self.peer));
        if turn.is_crowded() {
            request.extensions_mut().insert(Crowded);
        }
        let peer = Arc::clone(&self.peer);
        Answering { answer: self.service.call(request), turn: Some((turn, place)), peer }
    }
}

pub(super) struct Answering<F> {
    answer: F,
    turn: Option<(Turn, StreamPlace)>,
    peer: Arc<Peer>,
}

impl<F, B> Future for Answering<F>
where
    F: Future<Output = Result<Response<B>, Infallible>> + Unpin,
{
    type Output = Result<Response<WatchedBody<B>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        // Nothing more comes after the answer.
        let Some((turn, _)) = &mut this.turn else { return Poll::Pending };
        ready!(turn.poll_begin(cx));
        let Ok(response) = ready!(Pin::new(&mut this.answer).poll(cx));
        let Some((turn, place)) = this.turn.take() else { return Poll::Pending };
        if is_wasted(response.headers()) || this.peer.has_asked_in_vain() {
            turn.wasted();
        }
        Poll::Ready(Ok(response.map(|body| WatchedBody { body, turn, _place: place })))
    }
}

impl<F> Drop for Answering<F> {
    fn drop(&mut self) {
        // Reset before it was answered: what was done for it was done for nothing.
        if let Some((turn, _)) = &self.turn {
            turn.wasted();
        }
    }
}

/// Whether an answer is nothing but a status that its caller is to blame for, or a refusal by the limits.
fn is_wasted(headers: &HeaderMap) -> bool {
    /// gRPC's codes of success, and of what the agent is to blame for: UNKNOWN and UNAVAILABLE. INTERNAL is a body that is
    /// no message.
    const NOT_THE_CALLERS: [&str; 3] = ["0", "2", "14"];
    headers.get("grpc-status").is_some_and(|status| {
        !NOT_THE_CALLERS.iter().any(|code| status == code) || headers.contains_key(PUSHBACK)
    })
}

/// The body of an answer: it is the peer's turn while a part of it is on its way, and nobody's when it has none yet.
pub(super) struct WatchedBody<B> {
    body: B,
    turn: Turn,
    _place: StreamPlace,
}

impl<B: Body<Data = Bytes> + Unpin> Body for WatchedBody<B> {
    type Data = Part;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Part>, B::Error>>> {
        let this = self.get_mut();
        ready!(this.turn.poll_begin(cx));
        let next = Pin::new(&mut this.body).poll_frame(cx);
        if next.is_pending() {
            this.turn.rests(cx);
        }
        next.map_ok(|frame| frame.map_data(|bytes| this.turn.part(bytes)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
