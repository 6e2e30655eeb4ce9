//! Every request is charged and counted, once, whatever becomes of it.
//!
//! A request that reaches the limits is charged by them, and one that reaches the journal is counted there. What reaches
//! neither is charged and counted here when it ends: no security header, a method that there is not, a body that is no
//! message or never ends, a caller that goes away. It costs a token of [`Method::Other`], owed where there is none. What HTTP/2
//! refuses by itself never becomes a request: [`ConnectionService::unheard`](crate::peer::ConnectionService::unheard).

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Frame, SizeHint};
use tonic::{Code, Status, body::Body};

use super::{guard::GuardedAnswer, journal::Journal, reached::Reached, status::RequestError};
use crate::{
    limits::{CallerKey, Limits, Method},
    peer::{BodyError, Peer, RequestBody},
    store::audited::AuditedProcess,
};

/// A request from its head to its end.
pub(super) struct CountedHead {
    pub(super) journal: Arc<Journal>,
    pub(super) limits: Limits,
    pub(super) caller: Option<Arc<Peer>>,
    pub(super) method: Method,
    pub(super) reached: Reached,
    /// With which code it ends, where that is known by now.
    pub(super) code: Option<Code>,
}

impl CountedHead {
    /// Takes note of the code, if these are the trailers of an answer.
    fn read(&mut self, headers: &HeaderMap) -> bool {
        let Some(status) = headers.get("grpc-status") else { return false };
        self.code = Some(Code::from_bytes(status.as_bytes()));
        true
    }

    /// It is refused by this error, as the node is short of memory, whatever its caller has tokens for.
    pub(super) fn refuse_for_memory(&self, error: &RequestError) {
        self.refuse(error, Limits::note_out_of_memory);
    }

    fn refuse(&self, error: &RequestError, note: impl FnOnce(&Limits, CallerKey, Method)) {
        let Some(caller) = &self.caller else { return };
        self.reached.limits();
        note(&self.limits, caller.caller(), self.method);
        self.journal.refused(self.method, Some(AuditedProcess::from(&**caller)), error);
    }
}

impl Drop for CountedHead {
    fn drop(&mut self) {
        if self.reached.has_lacked_memory() {
            self.refuse_for_memory(&RequestError::NoMemoryToRead);
        }
        if let Some(bytes) = self.reached.was_unfinished() {
            self.refuse(&RequestError::Unfinished { bytes }, Limits::note_refused);
        }
        if !self.reached.has_count() {
            // tonic answers who has left as one that sent no message.
            let code = self.code.filter(|_| !self.reached.was_left());
            self.journal.ended(self.method, code.unwrap_or(Code::Cancelled));
        }
        if let Some(caller) = &self.caller
            && !self.reached.has_limits()
        {
            self.limits.charge_late(caller.caller());
        }
    }
}

/// The body of a request, which says where there is no room for it.
pub(super) struct CountedBody {
    body: RequestBody,
    reached: Reached,
}

impl CountedBody {
    pub(super) fn new(body: RequestBody, reached: Reached) -> Self {
        Self { body, reached }
    }
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Err(BodyError::NoMemory)) => this.reached.lacks_memory(),
            Some(Err(BodyError::Unfinished { bytes })) => this.reached.is_unfinished(*bytes),
            Some(Err(BodyError::Broken)) => this.reached.is_left(),
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The answer to a request, whose head it keeps.
pub struct HeadAnswer {
    answer: GuardedAnswer,
    head: Option<CountedHead>,
}

impl HeadAnswer {
    pub(super) fn new(answer: GuardedAnswer, head: CountedHead) -> Self {
        Self { answer, head: Some(head) }
    }
}

impl Future for HeadAnswer {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Ok(response) = ready!(Pin::new(&mut this.answer).poll(cx));
        let Some(mut head) = this.head.take() else { return Poll::Ready(Ok(response)) };
        if head.read(response.headers()) || head.reached.has_count() {
            return Poll::Ready(Ok(response));
        }
        // The answer begins: how it ends is in its trailers. Who leaves before has seen nothing wrong.
        head.code = Some(Code::Ok);
        Poll::Ready(Ok(response.map(|body| Body::new(HeadBody { body, head }))))
    }
}

/// The body of an answer, which tells how the request ends.
struct HeadBody {
    body: Body,
    head: CountedHead,
}

impl http_body::Body for HeadBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(trailers) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref()) {
            this.head.read(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
