//! What callers write on a connection: calls as they should be and not, and what is no call.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use nix::sys::socket::{MsgFlags, Shutdown, shutdown};

use super::{
    action::Noise,
    connection::Connection,
    frames::{
        DATA, END_HEADERS, END_STREAM, FETCH_JWT, HEADERS, PING, RST_STREAM, SETTINGS, block_without_header,
        call_frames, frame, jwt_request, message,
    },
    now,
    wire::jwt_request_of,
};

/// What a long answer is asked for with, in bytes.
const LONG_AUDIENCE: usize = 12_000;

/// Of the methods of [`call`], ValidateJWTSVID.
pub(crate) const VALIDATE: usize = 10;

/// Calls one of all methods, as it should be or not, or the start of it.
pub(crate) fn call(connection: &mut Connection, method: usize, cut: Option<usize>) {
    let Some(stream) = connection.new_stream() else { return };
    let name = |method: &str| format!("/SpiffeWorkloadAPI/{method}");
    let token = message(b"\x0a\x01a\x12\x03x.y");
    let (path, body) = match method {
        0..4 => (FETCH_JWT.to_owned(), jwt_request(["a", "b", "c", "d"][method])),
        4..8 => (name("FetchX509SVID"), message(&[])),
        8 => (name("FetchX509Bundles"), message(&[])),
        9 => (name("FetchJWTBundles"), message(&[])),
        VALIDATE => (name("ValidateJWTSVID"), token),
        11 => ("/grpc.health.v1.Health/Check".to_owned(), message(&[])),
        12 | 13 => (FETCH_JWT.to_owned(), jwt_request_of(&"a".repeat(LONG_AUDIENCE))),
        // No message, no such method, no header.
        14 => (name("FetchX509Bundles"), message(&[0xff])),
        15 => (name("X"), message(&[])),
        _ => (name("FetchX509SVID"), message(&[])),
    };
    let mut bytes = if method > 15 {
        let head = frame(HEADERS, END_HEADERS, stream, &block_without_header(&path));
        [head, frame(DATA, END_STREAM, stream, &body)].concat()
    } else {
        call_frames(stream, &path, &body)
    };
    match cut.filter(|at| *at < bytes.len()) {
        Some(at) => {
            connection.rest = Some((bytes.split_off(at), stream));
            connection.write(bytes, None);
        }
        None => connection.write(bytes, Some(stream)),
    }
}

pub(crate) fn make_noise(connection: &mut Connection, noise: Noise) {
    let last = connection.next.saturating_sub(2);
    let bytes = match noise {
        Noise::Ping => frame(PING, 0, 0, &[7; 8]),
        Noise::Settings => frame(SETTINGS, 0, 0, &[]),
        Noise::Reset => frame(RST_STREAM, 0, last, &8_u32.to_be_bytes()),
        Noise::HalfFrame => frame(PING, 0, 0, &[7; 8])[..5].to_vec(),
        Noise::Rubbish(bytes) => bytes.to_be_bytes().to_vec(),
    };
    connection.write(bytes, None);
}

/// Calls from many threads at once.
pub(crate) fn threads(connection: &mut Connection) {
    let (fd, next) = (connection.fd, AtomicU32::new(connection.next));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    let bytes = call_frames(next.fetch_add(2, Relaxed), FETCH_JWT, &jwt_request("a"));
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    if nix::sys::socket::send(fd, &bytes, flags).is_ok_and(|written| written < bytes.len()) {
                        _ = shutdown(fd, Shutdown::Write);
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
    });
    let first = std::mem::replace(&mut connection.next, next.into_inner());
    (first..connection.next).step_by(2).for_each(|stream| connection.called(stream));
    connection.first_wrote.get_or_insert_with(now);
}
