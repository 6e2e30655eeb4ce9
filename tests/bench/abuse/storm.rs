//! Crowds: connections and processes without end, silent ones, slow readers, and users that nobody has seen before.

use std::{
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Uid, seteuid},
};

use super::{
    frames::{Called, FETCH_JWT, PREFACE, call, call_frames, jwt_request, settings},
    part::{PATIENCE, Part, Role, Tally},
};

/// The first of the distinct callers.
const STRANGERS: u32 = 100_000_000;

/// One FetchJWTSVID.
pub(crate) fn once(part: &Part) -> Called {
    call(&part.socket, FETCH_JWT, &jwt_request("abuse"), PATIENCE)
}

/// FetchJWTSVID, a new connection for each, no pause.
pub(crate) fn storm(part: &Part, tally: &mut Tally) {
    while part.goes_on() {
        tally.count(once(part));
    }
}

/// The same with a new process for each.
pub(crate) fn fork(part: &Part, tally: &mut Tally) {
    let me = std::env::current_exe().expect("this program");
    let child = Part { role: Role::Once, ..part.clone() };
    while part.goes_on() {
        let ended = child.command(&me).status().expect("a process");
        tally.count(match ended.code() {
            Some(0) => Called::Answered,
            Some(1) => Called::Refused,
            Some(2) => Called::Closed,
            _ => Called::Silent,
        });
    }
}

/// `number` connections, or as many as there are descriptors, left alone.
pub(crate) fn idle(part: &Part, tally: &mut Tally) {
    let mut open = Vec::new();
    while open.len() < part.number as usize {
        let Ok(stream) = UnixStream::connect(&part.socket) else { break };
        open.push(stream);
    }
    while part.goes_on() {
        std::thread::sleep(Duration::from_millis(20));
    }
    for mut stream in open {
        stream.set_nonblocking(true).expect("a flag");
        match stream.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tally.silent += 1,
            Ok(_) | Err(_) => tally.closed += 1,
        }
    }
}

/// Calls on each stream that a connection may have, without a window for any answer, and nothing is ever read.
pub(crate) fn slow_read(part: &Part, tally: &mut Tally) {
    let request = jwt_request("abuse");
    let mut begun = [PREFACE.to_vec(), settings(4, 0)].concat();
    for nth in 0..16 {
        begun.extend(call_frames(1 + 2 * nth, FETCH_JWT, &request));
    }
    while part.goes_on() {
        let Ok(mut stream) = UnixStream::connect(&part.socket) else { break };
        let sent = stream.write_all(&begun).is_ok();
        while sent && part.goes_on() && still_open(&stream) {
            std::thread::sleep(Duration::from_millis(50));
        }
        if sent && still_open(&stream) { tally.silent += 1 } else { tally.closed += 1 }
    }
}

/// `number` users, each with one call.
pub(crate) fn strangers(part: &Part, tally: &mut Tally) {
    let first = STRANGERS + (part.number * part.nth) as u32;
    for nth in 0..part.number as u32 {
        seteuid(Uid::from_raw(first + nth)).expect("another user");
        tally.count(once(part));
        seteuid(Uid::from_raw(0)).expect("root again");
        if !part.goes_on() {
            break;
        }
    }
}

/// 50 calls a second, one connection after the other, so that the gate has no part in it.
pub(crate) fn limited(part: &Part, tally: &mut Tally) {
    let mut due = Instant::now();
    while part.goes_on() {
        tally.count(once(part));
        due += Duration::from_millis(20);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

pub(crate) fn still_open(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 0)
}
