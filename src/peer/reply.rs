//! The reply to a connection that is refused: a gRPC status for its first request, and a GOAWAY.
//!
//! A close alone says nothing of why, nor when to come back. But an answer costs more than a close, and has to wait
//! for a request that may never come: so only the first few of a family are answered, a bounded number at a time,
//! each within two seconds, and whoever comes one after the other; the crowd behind them is closed. One that was let
//! in, and found no memory for its first byte, is answered in the same way. There is no HTTP/2 state: SETTINGS first,
//! or some clients wait for them until their deadline, and empty ones, which the agent sends to nobody that it
//! serves; then everything is skipped up to the first HEADERS, which need not be understood. Not trusted: anything
//! that is sent.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::net::UnixStream as StdStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::HeaderMap;
use nix::sys::socket::{MsgFlags, send};
use tokio::{
    io::{AsyncWriteExt as _, Interest, ReadBuf},
    net::UnixStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{accepted::Accepted, frames::PREFACE};
use crate::{
    limits::budget::REPLIES,
    os::receive::{Received, receive},
};

/// How many of a family are answered in [`WITHIN`], and so at a time; one after the other it may be more.
const OF_FAMILY: usize = 2;
/// How many of all are, in that time. Half of them are for those first few of a family alone.
const RECENT: usize = 64;
/// How long an answer may take, from accept to the client's end.
const WITHIN: Duration = Duration::from_secs(2);
/// How much a client may send, in bytes: its first request, and what comes before it.
const MOST: usize = 16 * 1024;
/// How much of it is read at once.
const CHUNK: usize = 1024;

/// The highest number that a stream can have.
const EVERY_STREAM: u32 = u32::MAX >> 1;
/// Length of a frame's head.
const HEAD: usize = 9;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
/// The code of a GOAWAY that gRPC clients report as `UNAVAILABLE`.
const REFUSED_STREAM: u32 = 7;
/// END_STREAM and END_HEADERS.
const WHOLE: u8 = 0x5;
const ACK: u8 = 0x1;

/// The replies of the accept loop that are on their way. Dropped, they end.
#[derive(Debug, Default)]
pub(super) struct Replies {
    going: JoinSet<()>,
    pub(super) places: Arc<ReplyPlaces>,
}

impl Replies {
    /// Answers with these headers, and closes.
    pub(super) fn begin(&mut self, stream: Accepted<StdStream>, headers: &HeaderMap, place: ReplyPlace) {
        while self.going.try_join_next().is_some() {}
        // What cannot be registered is closed.
        let Ok(stream) = stream.admit(()) else { return };
        self.going.spawn(answer(stream, block(headers), place));
    }
}

/// How many are answered now, and who was of late: at the gate, and where one that was let in is refused after all.
#[derive(Debug, Default)]
pub(super) struct ReplyPlaces(Mutex<ReplyCounts>);

#[derive(Debug, Default)]
struct ReplyCounts {
    /// Families of those that are answered.
    going: Vec<u64>,
    /// When, and to whom, the last ones began.
    recent: VecDeque<(Instant, u64)>,
}

/// One that may be answered. There is a place for another when this is dropped.
#[derive(Debug)]
pub(super) struct ReplyPlace {
    places: Arc<ReplyPlaces>,
    family: u64,
}

impl ReplyPlaces {
    fn lock(&self) -> MutexGuard<'_, ReplyCounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one of this family, if it may be answered.
    pub(super) fn take(self: &Arc<Self>, family: u64, now: Instant) -> Option<ReplyPlace> {
        let mut counts = self.lock();
        let ReplyCounts { going, recent } = &mut *counts;
        while recent.front().is_some_and(|(began, _)| now.saturating_duration_since(*began) >= WITHIN) {
            recent.pop_front();
        }
        let has_had = recent.iter().filter(|(_, of)| *of == family).count();
        // Whoever comes one after the other, and waits for its answer, hears it each time.
        let alone = !going.contains(&family) && recent.len() < RECENT / 2;
        let may = going.len() < REPLIES && recent.len() < RECENT && (has_had < OF_FAMILY || alone);
        may.then(|| {
            recent.push_back((now, family));
            going.push(family);
            ReplyPlace { places: Arc::clone(self), family }
        })
    }
}

impl Drop for ReplyPlace {
    fn drop(&mut self) {
        let mut counts = self.places.lock();
        if let Some(at) = counts.going.iter().position(|family| *family == self.family) {
            counts.going.swap_remove(at);
        }
    }
}

/// Answers one that was let in, and is refused after all, with these headers, and closes it.
pub(super) async fn answer_begun(stream: Accepted<UnixStream>, headers: &HeaderMap, place: ReplyPlace) {
    answer(stream, block(headers), place).await;
}

async fn answer(stream: Accepted<UnixStream>, block: Vec<u8>, _place: ReplyPlace) {
    let _answered_or_gone = timeout(WITHIN, reply(stream, block)).await;
}

/// Tells one that none of its calls is heard, without waiting for any, before it is closed.
pub(super) fn dismiss(stream: &Accepted<StdStream>) {
    let word = [&EVERY_STREAM.to_be_bytes()[..], &REFUSED_STREAM.to_be_bytes()].concat();
    let word = [frame(SETTINGS, 0, 0, &[]), frame(GOAWAY, 0, 0, &word)].concat();
    // It has just come, and has room for that.
    let _told = send(stream.as_fd().as_raw_fd(), &word, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

async fn reply(mut stream: Accepted<UnixStream>, block: Vec<u8>) -> io::Result<()> {
    let (mut request, mut settings) = (FirstRequest::default(), frame(SETTINGS, 0, 0, &[]));
    // What is there already is answered by one write: the kernel keeps less of one.
    while request.stream.is_none() && read_at_once(&stream, &mut request)? {}
    if request.stream.is_none() {
        stream.socket_mut().write_all(&std::mem::take(&mut settings)).await?;
    }
    while request.stream.is_none() {
        read(&stream, &mut request).await?;
    }
    let asked = request.stream.unwrap_or(0);
    // Not the one that was answered: a client sends those above it again at once, and says nothing to whoever waits for them.
    // So the others of this connection end with it.
    let goaway = [&EVERY_STREAM.to_be_bytes()[..], &[0; 4]].concat();
    let answer = [
        settings,
        frame(SETTINGS, ACK, 0, &[]),
        frame(HEADERS, WHOLE, asked, &block),
        frame(GOAWAY, 0, 0, &goaway),
    ];
    stream.socket_mut().write_all(&answer.concat()).await?;
    stream.socket_mut().shutdown().await?;
    // Closed at once, what the client is still sending would fail before it has read this.
    loop {
        read(&stream, &mut request).await?;
    }
}

/// Reads once.
async fn read(stream: &Accepted<UnixStream>, request: &mut FirstRequest) -> io::Result<()> {
    while !read_at_once(stream, request)? {
        stream.socket().readable().await?;
    }
    Ok(())
}

/// Reads once what is there. Returns whether something was.
fn read_at_once(stream: &Accepted<UnixStream>, request: &mut FirstRequest) -> io::Result<bool> {
    let tried = stream.socket().try_io(Interest::READABLE, || {
        let mut bytes = [MaybeUninit::uninit(); CHUNK];
        let mut bytes = ReadBuf::uninit(&mut bytes);
        let most = bytes.remaining();
        match receive(stream.as_fd(), &mut bytes, most, stream.care())? {
            Received::Bytes { len: 0, .. } => Err(io::ErrorKind::UnexpectedEof.into()),
            Received::Bytes { len, .. } => {
                bytes.advance(len);
                request.read(bytes.filled())
            }
            Received::Descriptors => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    });
    match tried {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        read => read.map(|()| true),
    }
}

/// Looks for the first HEADERS of a client.
#[derive(Debug, Default)]
struct FirstRequest {
    /// Its stream, once it has come.
    stream: Option<u32>,
    read: usize,
    /// So much of the preface has come.
    preface: usize,
    head: [u8; HEAD],
    /// So much of a frame's head has come.
    head_len: usize,
    /// So much of its payload is still to come.
    left: usize,
}

impl FirstRequest {
    /// # Errors
    /// It is no HTTP/2, or too much.
    fn read(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.read += bytes.len();
        if self.read > MOST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        while let (None, Some((byte, rest))) = (self.stream, bytes.split_first()) {
            if let Some(expected) = PREFACE.get(self.preface) {
                if byte != expected {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                self.preface += 1;
                bytes = rest;
            } else if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
            } else {
                if let Some(at) = self.head.get_mut(self.head_len) {
                    *at = *byte;
                }
                self.head_len += 1;
                bytes = rest;
                if self.head_len == HEAD {
                    self.begin();
                }
            }
        }
        Ok(())
    }

    /// A frame's head is there.
    fn begin(&mut self) {
        let [high, middle, low, kind, _flags, stream @ ..] = self.head;
        self.head_len = 0;
        self.left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if kind == HEADERS {
            // The first bit means nothing (RFC 9113, section 4.1).
            self.stream = Some(u32::from_be_bytes(stream) & (u32::MAX >> 1));
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block: `:status: 200`, and these, each as a literal that no table remembers (RFC 7541, sections 6.1 and 6.2.2).
fn block(headers: &HeaderMap) -> Vec<u8> {
    let mut block = vec![0x88];
    for (name, value) in headers {
        block.push(0);
        for text in [name.as_str().as_bytes(), value.as_bytes()] {
            length(text.len(), &mut block);
            block.extend_from_slice(text);
        }
    }
    block
}

/// A length in seven bits and as many bytes more as it takes (RFC 7541, section 5.1).
fn length(len: usize, block: &mut Vec<u8>) {
    const PREFIX: usize = 0x7f;
    let byte = |value: usize| u8::try_from(value & 0xff).unwrap_or(0);
    if len < PREFIX {
        block.push(byte(len));
        return;
    }
    block.push(byte(PREFIX));
    let mut left = len - PREFIX;
    while left > PREFIX {
        block.push(byte(left & PREFIX | 0x80));
        left >>= 7;
    }
    block.push(byte(left));
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// Whatever comes before it and however it is cut, the first request is found; whatever comes, nothing panics.
        #[test]
        fn the_first_request_is_found(
            before in vec((any::<u8>().prop_filter("no HEADERS", |kind| *kind != HEADERS), vec(any::<u8>(), 0..300)), 0..5),
            stream in 1u32..1 << 31,
            pieces in vec(1usize..50, 1..20),
        ) {
            let mut sent = PREFACE.to_vec();
            for (kind, payload) in &before {
                sent.extend(frame(*kind, 0, 0, payload));
            }
            sent.extend(frame(HEADERS, WHOLE, stream, b"anything"));
            let mut request = FirstRequest::default();
            let (mut rest, mut pieces) = (&sent[..], pieces.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*pieces.next().unwrap()));
                request.read(piece).unwrap();
                rest = more;
            }
            prop_assert_eq!(request.stream, Some(stream));
        }

        #[test]
        fn what_is_no_http2_is_an_error(bytes in vec(any::<u8>(), 24..100)) {
            prop_assume!(!bytes.starts_with(PREFACE));
            let mut request = FirstRequest::default();
            prop_assert!(request.read(&bytes).is_err());
        }
    }

    #[test]
    fn lengths_are_as_hpack_has_them() {
        for (len, want) in [
            (0, &[0][..]),
            (126, &[126]),
            (127, &[127, 0]),
            (254, &[127, 127]),
            (255, &[127, 128, 1]),
            (1337, &[127, 186, 9]),
        ] {
            let mut block = Vec::new();
            length(len, &mut block);
            assert_eq!(block, want, "{len}");
        }
    }

    #[test]
    fn too_much_is_an_error() {
        let mut request = FirstRequest::default();
        request.read(PREFACE).unwrap();
        assert!((0..1000).any(|_| request.read(&frame(SETTINGS, 0, 0, &[0; 60])).is_err()));
    }

    #[tokio::test]
    async fn a_family_and_all_together_have_a_few_replies() {
        let replies = Arc::<ReplyPlaces>::default();
        let now = Instant::now();
        let begin = |family: u64, now: Instant| replies.take(family, now).is_some();
        let at_once = [1, 1, 1, 2].map(|family| replies.take(family, now));
        assert_eq!(at_once.each_ref().map(Option::is_some), [true, true, false, true]);
        drop(at_once);
        let one_after_the_other = (0..RECENT).filter(|_| begin(1, now)).count();
        assert_eq!(one_after_the_other, RECENT / 2 - 3, "the rest is for others");
        assert_eq!((10..200).filter(|family| begin(*family, now)).count(), RECENT / 2);
        assert!(!begin(1, now + WITHIN / 2) && begin(1, now + WITHIN), "later there are more");
        let later = now + 3 * WITHIN;
        let mut going: Vec<ReplyPlace> = (10..200).map_while(|family| replies.take(family, later)).collect();
        assert_eq!(going.len(), REPLIES, "so many at a time");
        going.pop();
        assert!(begin(300, later));
    }
}
