//! HTTP/2 frames by hand, and one gRPC call on a blocking socket: what hostile callers send, and the cheapest client
//! there is. Nothing here is checked, so that anything can be sent.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const FETCH_JWT: &str = "/SpiffeWorkloadAPI/FetchJWTSVID";

/// Types and flags of frames (RFC 9113, section 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).expect("a short payload").to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// SETTINGS with one value.
pub(crate) fn settings(id: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

/// A header as a literal that nobody has to remember (RFC 7541, section 6.2.2).
pub(crate) fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&integer(text.len())[..], text.as_bytes()].concat();
    [&[0][..], &text(name), &text(value)].concat()
}

/// The length of a string, not Huffman-coded: an integer with a prefix of seven bits (RFC 7541, section 5.1).
fn integer(number: usize) -> Vec<u8> {
    let byte = |number: usize| u8::try_from(number).expect("below 256");
    if number < 127 {
        return vec![byte(number)];
    }
    let (mut bytes, mut rest) = (vec![127], number - 127);
    while rest > 127 {
        bytes.push(byte(128 | (rest & 127)));
        rest >>= 7;
    }
    bytes.push(byte(rest));
    bytes
}

/// The header block of a call.
pub(crate) fn block(path: &str) -> Vec<u8> {
    [block_without_header(path), literal("workload.spiffe.io", "true")].concat()
}

/// The same without the header that every call of a workload must have.
pub(crate) fn block_without_header(path: &str) -> Vec<u8> {
    [
        literal(":method", "POST"),
        literal(":scheme", "http"),
        literal(":path", path),
        literal(":authority", "localhost"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat()
}

/// A gRPC message: not compressed, its length, its bytes.
pub(crate) fn message(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a short message").to_be_bytes();
    [&[0][..], &length, bytes].concat()
}

/// A `JWTSVIDRequest` with one audience.
pub(crate) fn jwt_request(audience: &str) -> Vec<u8> {
    let length = u8::try_from(audience.len()).expect("a short audience");
    message(&[&[0x0a, length][..], audience.as_bytes()].concat())
}

/// A whole call on `stream`.
pub(crate) fn call_frames(stream: u32, path: &str, body: &[u8]) -> Vec<u8> {
    [frame(HEADERS, END_HEADERS, stream, &block(path)), frame(DATA, END_STREAM, stream, body)].concat()
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Called {
    /// With a message.
    Answered,
    /// With a status and no message, or a reset stream.
    Refused,
    /// The connection was closed before that.
    Closed,
    /// No answer in the time that was given, or no connection.
    Silent,
}

/// One call on a connection of its own.
pub(crate) fn call(socket: &Path, path: &str, body: &[u8], patience: Duration) -> Called {
    let Ok(mut stream) = UnixStream::connect(socket) else { return Called::Silent };
    let begun = [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), call_frames(1, path, body)].concat();
    stream.set_read_timeout(Some(patience)).expect("a timeout");
    stream.set_write_timeout(Some(patience)).expect("a timeout");
    if stream.write_all(&begun).is_err() {
        return Called::Closed;
    }
    answer(&mut stream)
}

/// Reads to the end of the answer on stream 1.
pub(crate) fn answer(stream: &mut UnixStream) -> Called {
    answer_on(1, stream)
}

/// Reads to the end of the answer on the HTTP/2 stream of this number, and over all that comes on others.
pub(crate) fn answer_on(number: u32, stream: &mut UnixStream) -> Called {
    let mut got = Vec::new();
    let mut buffer = [0; 8192];
    let mut answered = false;
    loop {
        while let Some((head, rest)) = got.split_first_chunk::<9>() {
            let [a, b, c, kind, flags, stream @ ..] = *head;
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("64 bits");
            if rest.len() < length {
                break;
            }
            if u32::from_be_bytes(stream) == number {
                answered |= kind == DATA && length > 5;
                if kind == RST_STREAM || (flags & END_STREAM != 0 && matches!(kind, HEADERS | DATA)) {
                    return if answered { Called::Answered } else { Called::Refused };
                }
            }
            got.drain(..9 + length);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Called::Closed,
            Ok(more) => got.extend_from_slice(&buffer[..more]),
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                return Called::Silent;
            }
            Err(_) => return Called::Closed,
        }
    }
}
