//! An answer in the making comes to an end that a gRPC client knows, whatever becomes of it.
//!
//! A panic in a call is a defect of the agent's, and ends that call alone: it is `Internal`. Left to HTTP/2 it would be a reset
//! with CANCEL, which clients take for their own doing, and final. A call whose time (`grpc-timeout`) is over is
//! `DeadlineExceeded`; nothing goes on for a client that has given up.

use std::{
    convert::Infallible,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Status, body::Body};

/// The answer of a service, in the making.
pub type GrpcAnswer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// How long a call may take. Costs nothing before it has to wait.
#[derive(Debug, Default)]
pub(super) struct TimeLeft {
    ends: Option<Instant>,
    over: Option<Pin<Box<Sleep>>>,
}

impl TimeLeft {
    /// Until then, or for ever.
    pub(super) fn until(ends: Option<Instant>) -> Self {
        Self { ends, over: None }
    }

    /// Whether it is over; else the task is woken when it is.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(ends) = self.ends else { return false };
        let over = self.over.get_or_insert_with(|| Box::pin(sleep_until(ends)));
        over.as_mut().poll(cx).is_ready()
    }
}

/// Polls; the status of a call that ends otherwise than its service meant it to.
fn poll_within<T>(
    poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    left: &mut TimeLeft,
    cx: &mut Context<'_>,
) -> Poll<Result<T, Status>> {
    match catch_unwind(AssertUnwindSafe(|| poll(cx))) {
        Ok(Poll::Ready(done)) => Poll::Ready(Ok(done)),
        Ok(Poll::Pending) if left.is_over(cx) => {
            Poll::Ready(Err(Status::deadline_exceeded("the call took longer than its grpc-timeout")))
        }
        Ok(Poll::Pending) => Poll::Pending,
        Err(_) => Poll::Ready(Err(Status::internal("internal error of the agent: see its log"))),
    }
}

/// The answer of a service, with an end.
pub struct GuardedAnswer {
    /// Not polled again after its end.
    answer: Option<GrpcAnswer>,
    left: TimeLeft,
    /// Whether the answer may take longer than to be begun.
    streams: bool,
}

impl GuardedAnswer {
    pub(super) fn new(answer: GrpcAnswer, streams: bool, left: TimeLeft) -> Self {
        Self { answer: Some(answer), left, streams }
    }
}

impl Future for GuardedAnswer {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { answer, left, streams } = self.get_mut();
        let Some(making) = answer else { return Poll::Pending };
        let ended = match poll_within(|cx| making.as_mut().poll(cx), left, cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(ended) => ended,
        };
        *answer = None;
        Poll::Ready(Ok(match ended {
            Ok(Ok(response)) if *streams => {
                let left = std::mem::take(left);
                response.map(|body| Body::new(GuardedBody { body: Some(body), left }))
            }
            Ok(Ok(response)) => response,
            Err(status) => status.into_http(),
        }))
    }
}

/// The body of an answer, with an end.
struct GuardedBody {
    /// Not polled again after its end.
    body: Option<Body>,
    left: TimeLeft,
}

impl http_body::Body for GuardedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { body, left } = self.get_mut();
        let Some(making) = body else { return Poll::Ready(None) };
        let status = match poll_within(|cx| Pin::new(making).poll_frame(cx), left, cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(frame)) => return Poll::Ready(frame),
            Poll::Ready(Err(status)) => status,
        };
        *body = None;
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt as _;
    use tonic::Code;

    use super::*;

    /// A body that sends a byte, and then does this.
    struct Then(bool, fn() -> Poll<()>);

    impl http_body::Body for Then {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            let this = self.get_mut();
            if std::mem::replace(&mut this.0, true) {
                return (this.1)().map(|()| None);
            }
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
        }
    }

    fn guarded(answer: GrpcAnswer) -> GuardedAnswer {
        let ends = Instant::now() + Duration::from_secs(5);
        GuardedAnswer::new(answer, true, TimeLeft::until(Some(ends)))
    }

    fn code(headers: &HeaderMap) -> Option<Code> {
        headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_never_comes_to_an_end_has_one() {
        let panics: GrpcAnswer = Box::pin(async { std::panic::panic_any("a defect") });
        let waits: GrpcAnswer = Box::pin(std::future::pending());
        for (case, answer, want) in
            [("panics", panics, Code::Internal), ("waits", waits, Code::DeadlineExceeded)]
        {
            let Ok(response) = guarded(answer).await;
            assert_eq!(code(response.headers()), Some(want), "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn so_has_a_stream() {
        let panics = || std::panic::panic_any("a defect");
        type Case = (&'static str, fn() -> Poll<()>, Option<Code>);
        let cases: [Case; 3] = [
            ("ends", || Poll::Ready(()), None),
            ("panics", panics, Some(Code::Internal)),
            ("waits", || Poll::Pending, Some(Code::DeadlineExceeded)),
        ];
        for (case, then, want) in cases {
            let answer = async move { Ok(Response::new(Body::new(Then(false, then)))) };
            let Ok(response) = guarded(Box::pin(answer)).await;
            let mut body = response.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "x", "{case}");
            let trailers = body.frame().await.map(|frame| frame.unwrap().into_trailers().unwrap());
            assert_eq!(trailers.as_ref().and_then(code), want, "{case}");
            if want.is_some() {
                assert!(body.frame().await.is_none(), "{case}: nothing comes after it");
            }
        }
    }
}
