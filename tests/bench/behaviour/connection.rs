//! A connection of a caller, by its number: it goes from process to process, over `exec` and over sockets.

use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::{AsRawFd as _, IntoRawFd as _, RawFd},
    path::Path,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use durward::api::proto::workload::X509svidResponse;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
            sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{
    frames::{DATA, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, frame, settings},
    now,
    wire::status,
};

const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
/// SETTINGS_INITIAL_WINDOW_SIZE.
const INITIAL_WINDOW: u16 = 4;
const ROOM: u32 = 1 << 20;
/// What it keeps until there is room for it.
const UNSENT: usize = 64;
/// How long a caller tries to write.
const WRITING: Duration = Duration::from_millis(100);
/// By how much the embedded issuer dates certificates back, in seconds.
const BACKDATE: i64 = 10;

#[derive(Default, Serialize, Deserialize)]
struct Stream {
    got: Vec<u8>,
    /// When this process had written the whole call.
    called: Option<u64>,
}

/// An SVID as it arrived.
pub(crate) struct Arrived {
    pub(crate) name: String,
    pub(crate) made: u64,
    pub(crate) called: Option<u64>,
}

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) fd: RawFd,
    /// The number of its next stream.
    pub(crate) next: u32,
    /// Not while another process was given it: each byte reaches one of them.
    pub(crate) reads: bool,
    /// When this process first wrote on it.
    pub(crate) first_wrote: Option<u64>,
    got: Vec<u8>,
    streams: BTreeMap<u32, Stream>,
    /// What could not be written yet, with the call that it ends.
    unsent: VecDeque<(Vec<u8>, Option<u32>)>,
    /// What is left of a call that was cut.
    pub(crate) rest: Option<(Vec<u8>, u32)>,
    /// The last frames that came, and what they said.
    pub(crate) last: VecDeque<String>,
    /// A GOAWAY came.
    pub(crate) told_to_go: bool,
}

/// Streams of one connection: more than the agent lets one have.
const MOST_STREAMS: usize = 120;
/// Frames that are remembered of each connection.
const FRAMES: usize = 8;

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection {{ fd: {}, next: {} }}", self.fd, self.next)
    }
}

impl Connection {
    /// `None` where the agent takes no more. Children inherit it.
    pub(crate) fn open(path: &Path, deaf: bool) -> Option<Self> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).ok()?;
        // As long as the backlog may be full, or an answer may be away.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(2)).ok()?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).ok()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
        let fd = fd.into_raw_fd();
        let mut opened = Self { fd, next: first_stream(), reads: true, ..Self::default() };
        let hello = [PREFACE, &settings(INITIAL_WINDOW, if deaf { 0 } else { ROOM }), &more_room()].concat();
        opened.write(hello, None);
        Some(opened)
    }

    pub(crate) fn close(self) {
        _ = nix::unistd::close(self.fd);
    }

    /// As another process has it that is given this one: of what was written, nothing is its own.
    pub(crate) fn handed_over(&mut self) -> Self {
        self.reads = false;
        let streams = std::mem::take(&mut self.streams);
        Self {
            fd: self.fd,
            next: self.next,
            reads: true,
            first_wrote: None,
            got: std::mem::take(&mut self.got),
            streams: streams.into_iter().map(|(at, it)| (at, Stream { called: None, ..it })).collect(),
            unsent: VecDeque::new(),
            rest: self.rest.clone(),
            last: VecDeque::new(),
            told_to_go: self.told_to_go,
        }
    }

    /// Forgets what was half read and half written where it is longer than `most`, as JSON.
    pub(crate) fn shortened_if(&mut self, most: usize) {
        if serde_json::to_string(self).is_ok_and(|text| text.len() > most) {
            *self = Self {
                fd: self.fd,
                next: self.next,
                reads: self.reads,
                first_wrote: self.first_wrote,
                ..Self::default()
            };
        }
    }

    /// The number of a new stream, unless it has many.
    pub(crate) fn new_stream(&mut self) -> Option<u32> {
        let number = self.next;
        if self.streams.len() >= MOST_STREAMS {
            return None;
        }
        self.next += 2;
        self.streams.insert(number, Stream::default());
        Some(number)
    }

    /// Whether a call has not ended.
    pub(crate) fn waits(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Notes that all of the call on `stream` is written.
    pub(crate) fn called(&mut self, stream: u32) {
        self.streams.entry(stream).or_default().called = Some(now());
    }

    /// Writes `bytes`, the last ones of the call `ends`, if there is room for them.
    pub(crate) fn write(&mut self, bytes: Vec<u8>, ends: Option<u32>) {
        // Bounded: who does not read gets no more either.
        if self.unsent.len() < UNSENT {
            self.unsent.push_back((bytes, ends));
        }
        let began = Instant::now();
        while let Some((bytes, ends)) = self.unsent.front_mut() {
            match send(self.fd, bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(written) => {
                    bytes.drain(..written);
                    self.first_wrote.get_or_insert_with(now);
                    if bytes.is_empty() {
                        let ends = *ends;
                        self.unsent.pop_front();
                        ends.into_iter().for_each(|stream| self.called(stream));
                    }
                }
                Err(Errno::EAGAIN) if began.elapsed() < WRITING => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Lets streams that were opened without room be answered.
    pub(crate) fn listen(&mut self) {
        self.write([settings(INITIAL_WINDOW, ROOM), more_room()].concat(), None);
    }

    /// What has arrived, and whether that is the end.
    pub(crate) fn read(&mut self, flags: MsgFlags) -> (Vec<Arrived>, bool) {
        let mut arrived = Vec::new();
        let mut buffer = [0; 16 * 1024];
        for _ in 0..64 {
            match recv(self.fd, &mut buffer, flags) {
                Ok(0) => return (arrived, true),
                Ok(more) => self.got.extend_from_slice(&buffer[..more]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => return (arrived, true),
            }
            self.take_frames(&mut arrived);
            if flags.is_empty() {
                break;
            }
        }
        (arrived, false)
    }

    fn take_frames(&mut self, arrived: &mut Vec<Arrived>) {
        while let Some((head, rest)) = self.got.split_first_chunk::<9>() {
            let [a, b, c, kind, flags, number @ ..] = *head;
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("64 bits");
            let Some(payload) = rest.get(..length).map(<[u8]>::to_vec) else { return };
            self.got.drain(..9 + length);
            let number = u32::from_be_bytes(number);
            self.told_to_go |= kind == GOAWAY;
            if self.last.len() == FRAMES {
                self.last.pop_front();
            }
            self.last.push_back(told(kind, flags, &payload));
            match kind {
                DATA => {
                    let stream = self.streams.entry(number).or_default();
                    stream.got.extend_from_slice(&payload);
                    while let Some(message) = take_message(&mut stream.got) {
                        let called = stream.called;
                        let svids = svids(&message).into_iter();
                        arrived.extend(svids.map(|(name, made)| Arrived { name, made, called }));
                    }
                }
                // Who was only handed it says nothing on it by itself.
                PING | SETTINGS if flags & ACK == 0 && self.first_wrote.is_some() => {
                    let echo = if kind == PING { &payload[..] } else { &[] };
                    self.write(frame(kind, ACK, 0, echo), None);
                }
                _ => {}
            }
            if kind == RST_STREAM || (flags & END_STREAM != 0 && matches!(kind, HEADERS | DATA)) {
                self.streams.remove(&number);
            }
        }
    }
}

/// A frame, for a finding.
fn told(kind: u8, flags: u8, payload: &[u8]) -> String {
    match kind {
        HEADERS => {
            status(payload).map_or_else(|| "HEADERS".to_owned(), |status| format!("gRPC status {status}"))
        }
        RST_STREAM => format!("RST_STREAM {payload:?}"),
        _ => format!("frame of type {kind}, flags {flags}, {} bytes", payload.len()),
    }
}

/// Processes that write on one connection number their streams apart, so that no answer is taken for another's.
pub(crate) fn first_stream() -> u32 {
    (std::process::id() << 7) | 1
}

fn more_room() -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, 0, &(ROOM << 8).to_be_bytes())
}

/// A gRPC message, once all of it is there.
fn take_message(got: &mut Vec<u8>) -> Option<Vec<u8>> {
    let ([_, length @ ..], body) = got.split_first_chunk::<5>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).expect("64 bits");
    let message = body.get(..length)?.to_vec();
    got.drain(..5 + length);
    Some(message)
}

/// The SVIDs of an answer, X.509 or JWT, whose fields have the same numbers: the paths of their IDs, and when each was made.
/// Bundles have trust domains in that place.
fn svids(message: &[u8]) -> Vec<(String, u64)> {
    let Ok(answer) = X509svidResponse::decode(message) else { return Vec::new() };
    let svids = answer.svids.into_iter().filter_map(|svid| {
        let name = svid.spiffe_id.strip_prefix("spiffe://example.org/")?.to_owned();
        let made = made(&svid.x509_svid).unwrap_or_else(now);
        Some((name, made))
    });
    svids.collect()
}

fn made(svid: &[u8]) -> Option<u64> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    if let Ok((_, leaf)) = X509Certificate::from_der(svid) {
        return u64::try_from((leaf.validity().not_before.timestamp() + BACKDATE) * 1000).ok();
    }
    let claims = std::str::from_utf8(svid).ok()?.split('.').nth(1)?;
    let claims: serde_json::Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    Some(claims.get("iat")?.as_u64()? * 1000)
}
