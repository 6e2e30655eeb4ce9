//! The messages of a request, each whole and none too large.
//!
//! tonic makes room for a message as soon as its length is announced. So it is handed what is complete: an announced
//! length alone costs nothing, and one that is too large is refused before any of it is kept.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

/// What comes before each message: whether it is compressed, and its length in four bytes.
const HEAD: usize = 5;

/// A body that is handed on by whole messages, of `most` bytes each. What never becomes whole is handed on at its end.
#[derive(Debug)]
pub(super) struct WholeMessages<B> {
    body: B,
    most: usize,
    /// The beginning of a message. At most one message, and what came with its end.
    begun: BytesMut,
}

impl<B> WholeMessages<B> {
    pub(super) fn new(body: B, most: usize) -> Self {
        Self { body, most, begun: BytesMut::new() }
    }

    /// How many bytes the first message of `bytes` takes, its head included; `None` when that is not there yet.
    fn first(&self, bytes: &[u8]) -> Result<Option<usize>, Status> {
        let Some([_compressed, length @ ..]) = bytes.first_chunk::<HEAD>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > self.most {
            // The text and the code of grpc-go.
            let most = self.most;
            return Err(Status::resource_exhausted(format!(
                "grpc: received message larger than max ({length} vs. {most})"
            )));
        }
        Ok(Some(HEAD + length))
    }

    /// How many bytes of `bytes` are whole messages.
    fn whole(&self, bytes: &[u8]) -> Result<usize, Status> {
        let mut whole = 0;
        while let Some(rest) = bytes.get(whole..)
            && let Some(message) = self.first(rest)?
            && message <= rest.len()
        {
            whole += message;
        }
        Ok(whole)
    }

    /// What is whole with these bytes.
    fn take(&mut self, mut bytes: Bytes) -> Result<Bytes, Status> {
        if !self.begun.is_empty() {
            self.begun.extend_from_slice(&bytes);
            // One that is far from whole is not looked at for each of its parts.
            if self.first(&self.begun)?.is_none_or(|message| message > self.begun.len()) {
                return Ok(Bytes::new());
            }
            let whole = self.whole(&self.begun)?;
            return Ok(self.begun.split_to(whole).freeze());
        }
        let whole = self.whole(&bytes)?;
        let rest = bytes.split_off(whole);
        if rest.has_remaining() {
            self.begun.extend_from_slice(&rest);
        }
        Ok(bytes)
    }
}

impl<B> Body for WholeMessages<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Status>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            let frame = ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose().map_err(Into::into)?;
            let whole = match frame.map(Frame::into_data) {
                Some(Ok(bytes)) => this.take(bytes)?,
                // The end, with trailers or without: nobody reads those of a request.
                Some(Err(_)) | None if this.begun.is_empty() => return Poll::Ready(None),
                Some(Err(_)) | None => std::mem::take(&mut this.begun).freeze(),
            };
            if !whole.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(whole))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.begun.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, task::Waker};

    use proptest::{collection::vec, prelude::*};
    use tonic::Code;

    use super::*;

    /// Comes in these pieces.
    struct Pieces(VecDeque<Bytes>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.get_mut().0.pop_front().map(|bytes| Ok(Frame::data(bytes))))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }
    }

    /// What is handed on of `bytes`, cut at these places.
    fn handed_on(bytes: &[u8], cuts: &[usize], most: usize) -> Result<Vec<Bytes>, Status> {
        let (mut pieces, mut rest) = (VecDeque::new(), bytes);
        for cut in cuts {
            let (piece, more) = rest.split_at(rest.len().min(*cut));
            pieces.push_back(Bytes::copy_from_slice(piece));
            rest = more;
        }
        pieces.push_back(Bytes::copy_from_slice(rest));
        let mut body = WholeMessages::new(Pieces(pieces), most);
        let mut all = Vec::new();
        loop {
            match Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(frame)) => all.push(frame?.into_data().unwrap()),
                Poll::Ready(None) => {
                    assert!(body.is_end_stream());
                    return Ok(all);
                }
                Poll::Pending => unreachable!("nothing waits"),
            }
        }
    }

    fn message(length: usize) -> Vec<u8> {
        let announced = u32::try_from(length).unwrap().to_be_bytes();
        [&[0][..], &announced, &vec![7; length]].concat()
    }

    proptest! {
        /// However it is cut, all of it arrives, in parts that end where a message does, but for the last.
        #[test]
        fn messages_stay_whole(
            lengths in vec(0usize..300, 0..6),
            cuts in vec(0usize..200, 0..30),
            unfinished in 0usize..200,
        ) {
            let whole: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            let sent = [&whole[..], &message(400)[..unfinished]].concat();
            let parts = handed_on(&sent, &cuts, 1000).unwrap();
            prop_assert_eq!(parts.concat(), sent);
            let ends: Vec<usize> = lengths.iter().scan(0, |at, length| { *at += HEAD + length; Some(*at) }).collect();
            let mut at = 0;
            for part in &parts {
                prop_assert!(!part.is_empty());
                at += part.len();
                prop_assert!(ends.contains(&at) || at == whole.len() + unfinished, "{} of {:?}", at, ends);
            }
        }

        #[test]
        fn one_that_is_too_large_is_refused_by_its_length(
            before in vec(0usize..100, 0..4),
            more in 1usize..1000,
            cuts in vec(0usize..50, 0..20),
        ) {
            let head = [&before.iter().flat_map(|length| message(*length)).collect::<Vec<u8>>()[..], &message(100 + more)[..HEAD]].concat();
            let status = handed_on(&head, &cuts, 100).unwrap_err();
            prop_assert_eq!(status.code(), Code::ResourceExhausted);
        }
    }
}
