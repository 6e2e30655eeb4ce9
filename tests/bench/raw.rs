//! A gRPC client by hand on one Unix socket: what a polite caller and a hostile one share. It keeps to HTTP/2's windows where it
//! is told to, reads only when it is asked to, and tells a refusal from an answer.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll, ppoll},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt},
        time::{TimeSpec, TimeVal, TimeValLike as _},
    },
};

use super::{
    frames::{DATA, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, frame, settings},
    wire::status,
};

const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
/// SETTINGS_HEADER_TABLE_SIZE: without a table every status is written out.
const HEADER_TABLE: u16 = 1;
/// SETTINGS_INITIAL_WINDOW_SIZE.
const INITIAL_WINDOW: u16 = 4;
/// The window of one who reads.
pub(crate) const WIDE: u32 = 1 << 24;

/// What is kept of an answer, in bytes.
const LONGEST: usize = 64 * 1024;

/// How `connect()` is called where nobody accepts at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connecting {
    /// It waits, as long as calls do.
    Waits,
    /// EAGAIN.
    AtOnce,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// The first part of an answer.
    Began { stream: u32 },
    /// So many bytes of it.
    Data { stream: u32, bytes: usize, ended: bool },
    /// The end of an answer, with a gRPC status.
    Ended { stream: u32, status: u8 },
    /// RST_STREAM.
    Reset { stream: u32 },
    /// GOAWAY.
    ComeBack,
    /// The connection has ended.
    Closed,
    /// Nothing, for as long as was waited.
    Nothing,
}

/// How one call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With a message.
    Message,
    /// With this status and no message.
    Status(u8),
    /// Reset, or with its connection.
    Cut,
    /// Not at all, in the time that was given.
    Silent,
}

/// A connection.
pub(crate) struct Raw {
    stream: UnixStream,
    got: Vec<u8>,
    came: VecDeque<Came>,
    next: u32,
    /// What may still be sent of bodies.
    window: i64,
    /// What came of the last answer that was waited for.
    pub(crate) body: Vec<u8>,
    /// GOAWAY, or the end, was seen.
    pub(crate) over: bool,
}

/// Waits until a socket can be read or written, or has ended.
fn wait(stream: &UnixStream, flags: PollFlags, patience: Duration) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), flags)];
    let millis = u16::try_from(patience.as_millis().min(60_000)).expect("a minute at most");
    poll(&mut fds, PollTimeout::from(millis)).is_ok_and(|ready| ready > 0)
}

/// Waits until something comes on one of these, or so long.
pub(crate) fn wait_for_any<'a>(connections: impl Iterator<Item = &'a Raw>, patience: Duration) {
    let mut fds: Vec<PollFd<'_>> =
        connections.map(|raw| PollFd::new(raw.stream.as_fd(), PollFlags::POLLIN)).collect();
    let _woken = ppoll(&mut fds, Some(TimeSpec::from_duration(patience)), None).is_ok();
}

/// A connected socket.
pub(crate) fn connected(path: &Path, how: Connecting, patience: Duration) -> io::Result<UnixStream> {
    let flags = match how {
        Connecting::Waits => SockFlag::SOCK_CLOEXEC,
        Connecting::AtOnce => SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    };
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let millis = i64::try_from(patience.as_millis()).expect("a short time");
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::milliseconds(millis))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

impl Raw {
    /// A connection whose streams have a window of so many bytes.
    pub(crate) fn open(path: &Path, how: Connecting, window: u32, patience: Duration) -> io::Result<Self> {
        Self::begin(connected(path, how, patience)?, window, patience)
    }

    /// The same, of one that is connected.
    pub(crate) fn begin(stream: UnixStream, window: u32, patience: Duration) -> io::Result<Self> {
        let mut raw = Self {
            stream,
            got: Vec::new(),
            came: VecDeque::new(),
            next: 1,
            window: 65_535,
            body: Vec::new(),
            over: false,
        };
        let hello = [
            PREFACE,
            &settings(HEADER_TABLE, 0),
            &settings(INITIAL_WINDOW, window),
            &frame(WINDOW_UPDATE, 0, 0, &0x7f00_0000_u32.to_be_bytes()),
        ];
        raw.send(&hello.concat(), patience).then_some(raw).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// Whether all of it was written in time.
    pub(crate) fn send(&mut self, mut bytes: &[u8], patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() || !wait(&self.stream, PollFlags::POLLOUT, left) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// The number of the next stream.
    pub(crate) fn number(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Calls, as far as the window of the connection lets it. The number of its stream, once all of it is written.
    pub(crate) fn call(&mut self, block: &[u8], body: &[u8], patience: Duration) -> Option<u32> {
        let until = Instant::now() + patience;
        let length = i64::try_from(body.len()).expect("64 bits");
        while self.window < length {
            let left = until.saturating_duration_since(Instant::now());
            if self.over || left.is_zero() {
                return None;
            }
            let came = self.receive(left);
            self.came.extend(came);
        }
        self.window -= length;
        let stream = self.number();
        let mut bytes = frame(HEADERS, END_HEADERS, stream, block);
        let mut parts = body.chunks(16 * 1024).peekable();
        if parts.peek().is_none() {
            bytes.extend(frame(DATA, END_STREAM, stream, &[]));
        }
        while let Some(part) = parts.next() {
            let end = if parts.peek().is_none() { END_STREAM } else { 0 };
            bytes.extend(frame(DATA, end, stream, part));
        }
        self.send(&bytes, patience).then_some(stream)
    }

    /// The next that comes.
    pub(crate) fn next(&mut self, patience: Duration) -> Came {
        let until = Instant::now() + patience;
        loop {
            if let Some(came) = self.came.pop_front() {
                return came;
            }
            let left = until.saturating_duration_since(Instant::now());
            if let Some(came) = self.receive(left) {
                return came;
            }
            if left.is_zero() {
                return Came::Nothing;
            }
        }
    }

    /// One more frame, if it is one that a caller wants to know of.
    fn receive(&mut self, patience: Duration) -> Option<Came> {
        loop {
            if let Some((head, rest)) = self.got.split_first_chunk::<9>() {
                let [a, b, c, kind, flags, stream @ ..] = *head;
                let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("64 bits");
                if let Some(payload) = rest.get(..length) {
                    let payload = payload.to_vec();
                    self.got.drain(..9 + length);
                    match self.frame(kind, flags, u32::from_be_bytes(stream), &payload) {
                        None => continue,
                        came => return came,
                    }
                }
            }
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(more) => self.got.extend_from_slice(&buffer[..more]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if patience.is_zero() || !wait(&self.stream, PollFlags::POLLIN, patience) {
                        return None;
                    }
                }
                Err(_) => break,
            }
        }
        self.over = true;
        Some(Came::Closed)
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Option<Came> {
        let ended = flags & END_STREAM != 0;
        match kind {
            DATA => {
                if self.body.len() < LONGEST {
                    self.body.extend_from_slice(payload);
                }
                Some(Came::Data { stream, bytes: payload.len(), ended })
            }
            HEADERS => match status(payload).filter(|_| ended) {
                Some(status) => Some(Came::Ended { stream, status }),
                None => Some(Came::Began { stream }),
            },
            RST_STREAM => Some(Came::Reset { stream }),
            GOAWAY => {
                self.over = true;
                Some(Came::ComeBack)
            }
            WINDOW_UPDATE => {
                if let (0, Ok(more)) = (stream, <[u8; 4]>::try_from(payload)) {
                    self.window += i64::from(u32::from_be_bytes(more) & 0x7fff_ffff);
                }
                None
            }
            PING | SETTINGS if flags & ACK == 0 => {
                let echo = if kind == PING { payload } else { &[] };
                self.send(&frame(kind, ACK, 0, echo), Duration::ZERO);
                None
            }
            _ => None,
        }
    }

    /// One call to its end.
    pub(crate) fn ask(&mut self, block: &[u8], body: &[u8], patience: Duration) -> Answer {
        let until = Instant::now() + patience;
        self.body.clear();
        let Some(asked) = self.call(block, body, patience) else {
            return if self.over { Answer::Cut } else { Answer::Silent };
        };
        let mut has_message = false;
        loop {
            match self.next(until.saturating_duration_since(Instant::now())) {
                Came::Data { stream, bytes, .. } if stream == asked => has_message |= bytes > 5,
                Came::Ended { stream, status } if stream == asked => {
                    return if has_message && status == 0 { Answer::Message } else { Answer::Status(status) };
                }
                Came::Reset { stream } if stream == asked => return Answer::Cut,
                Came::Closed => return Answer::Cut,
                Came::Nothing => return Answer::Silent,
                // What it asked before is answered yet.
                Came::ComeBack
                | Came::Began { .. }
                | Came::Data { .. }
                | Came::Ended { .. }
                | Came::Reset { .. } => {}
            }
        }
    }
}
