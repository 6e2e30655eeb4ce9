//! The body of a request, whose bytes are counted for its connection until it is complete.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::turns::{NoRoom, Upload};
use crate::limits::budget::UPLOADS;

/// The body of a request. As long as it is not complete, its bytes count as held by its connection, and while memory is short
/// against what that may send without ending a request ([`UPLOADS`]): what is half-read is kept by somebody, and has been charged
/// to nobody yet.
#[derive(Debug)]
pub struct RequestBody {
    body: Incoming,
    upload: Upload,
    /// Bytes that came.
    came: u64,
    /// Bytes that may come.
    most: u64,
}

/// Why the body of a request cannot be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// More came than one request may have.
    #[error("too many bytes for one request: make another call")]
    TooLong,
    /// Memory is short, its caller holds more than its share of it, and the connection has so many bytes of requests that are not
    /// complete. A client that waits until its other requests have ended finds room.
    #[error("{bytes} bytes of requests on this connection are not complete, and {UPLOADS} may be")]
    Unfinished { bytes: u64 },
    /// The node has no memory for what is not complete.
    #[error("the agent is short of memory, and has none for the rest of this request; try again")]
    NoMemory,
    /// The peer reset the request, or the connection ended.
    #[error("the body of a request ended early")]
    Broken,
}

impl From<NoRoom> for BodyError {
    fn from(lack: NoRoom) -> Self {
        match lack {
            NoRoom::OfConnection { bytes } => Self::Unfinished { bytes },
            NoRoom::OfNode => Self::NoMemory,
        }
    }
}

impl RequestBody {
    pub(super) fn new(body: Incoming, upload: Upload) -> Self {
        Self { body, upload, came: 0, most: u64::MAX }
    }

    /// The same, of which no more than so many bytes may come in all: for requests without an end, which are answered
    /// while they come.
    #[must_use]
    pub fn at_most(mut self, bytes: u64) -> Self {
        self.most = bytes;
        self.upload.beside_its_answer();
        self
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        ready!(this.upload.poll_goes_on(cx));
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            // What came so far waits for its rest.
            return match this.upload.waits(this.came) {
                Ok(()) => Poll::Pending,
                Err(lack) => Poll::Ready(Some(Err(lack.into()))),
            };
        };
        let ended = this.body.is_end_stream();
        let frame = match frame.transpose() {
            Ok(frame) if frame.is_some() || ended => frame,
            // hyper takes a reset for the end of a body where its peer cancels.
            _ => return Poll::Ready(Some(Err(BodyError::Broken))),
        };
        let more = frame.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len);
        this.came = this.came.saturating_add(u64::try_from(more).unwrap_or(u64::MAX));
        if this.came > this.most {
            return Poll::Ready(Some(Err(BodyError::TooLong)));
        }
        if ended {
            this.upload.is_read_whole(this.came);
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
