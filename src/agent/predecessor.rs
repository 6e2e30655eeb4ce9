//! The handover as the next agent sees it: it asks the one that runs for its place.
//!
//! Who listens at the socket is believed if it is this process's user or root. What it passes is believed to be what stands
//! at the path only after a look ([`Socket::move_into`](crate::peer::Socket::move_into)).

use std::{
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    sys::socket::{getsockopt, sockopt},
    unistd::geteuid,
};

use super::handover::{
    HandoverAnswer, HandoverRequest, LeftSockets, MOST_LINE, SERVING, STANDS_BY, VERSION, socket_in,
};
use crate::{
    config::{AdminSocket, Config},
    os::descriptors,
    peer::socket::VacantSocket,
};

/// How long the other agent may take until it has left its place: longer than it waits for its own disk.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How often an agent is asked again that ended while it was asked, and the pause before.
const ASKED_AGAIN: u32 = 20;
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// How often the files are tried for that another agent has: some two seconds, with the time that each try waits.
const OPENED_AGAIN: u32 = 4;

/// What to do where an agent cannot be taken over.
const END_IT_FIRST: &str = "end it before this one starts (in Kubernetes: maxSurge: 0 and maxUnavailable: 1)";

/// Why the place of the agent that runs is not to be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandoverError {
    /// It said so.
    #[error("the agent that runs (PID {pid}) does not hand over: {why}; {END_IT_FIRST}")]
    Refused { pid: i32, why: String },
    /// Somebody else listens there.
    #[error("{} belongs to user {found}, and the agent runs as user {ours}", path.display())]
    Owner { path: PathBuf, found: u32, ours: u32 },
    /// It did not answer, or not in words that are known.
    #[error("the agent that runs does not answer at {}; {END_IT_FIRST}", path.display())]
    Silent { path: PathBuf, source: io::Error },
}

/// The agent that has left its place. It is told when this one serves, and comes back when this one ends.
#[derive(Debug)]
pub(super) struct Predecessor {
    stream: UnixStream,
    pid: i32,
    /// The admin socket that it has left.
    admin: Option<PathBuf>,
}

impl Predecessor {
    /// Its process; 0 where this one cannot see it.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it lives, and waits to take its place back.
    pub(super) fn stands_by(&self) -> bool {
        let mut said = [0; 64];
        let mut heard = 0;
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        loop {
            match (&self.stream).read(said.get_mut(heard..).unwrap_or_default()) {
                Ok(0) => return false,
                Ok(len) => heard += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return said.starts_with(STANDS_BY);
                }
                Err(_) => return false,
            }
        }
    }

    /// Whether it has the admin socket at this path, too.
    pub(super) fn keeps_admin_at(&self, path: &Path) -> bool {
        self.admin.as_deref() == Some(path)
    }

    /// Tells it that the place is free: it comes back.
    pub(super) fn give_back(&self) {
        if let Err(error) = self.stream.shutdown(Shutdown::Both) {
            tracing::debug!(pid = self.pid, %error, "the agent that stood by is gone");
        }
    }

    /// Tells it that this agent serves. It may have ended: that changes nothing.
    pub(super) fn told_that_this_serves(&self) {
        if let Err(error) = (&self.stream).write_all(SERVING) {
            tracing::debug!(pid = self.pid, %error, "the agent that has handed over is gone");
        }
    }
}

/// An agent that has left its place, and the sockets that it left.
pub(super) type LeftPlace = (Predecessor, LeftSockets);

/// Asks the agent that runs for its place. `None` where nobody listens. Waits for it. One that ends while it is asked is
/// asked again: another may have come, or nobody is left.
///
/// # Errors
/// [`HandoverError`]; the other agent serves on then, or takes up service again when this process has ended.
pub(super) fn ask(config: &Config) -> Result<Option<LeftPlace>, HandoverError> {
    for _ in 0..ASKED_AGAIN {
        match ask_once(config) {
            Err(HandoverError::Silent { source, .. }) if has_ended(&source) => {
                tracing::info!(error = %source, "the agent that runs has ended while it was asked");
                pause();
            }
            asked => return asked,
        }
    }
    ask_once(config)
}

/// Tries `open`, which fails where another agent has the files, and asks an agent that listens meanwhile for its place:
/// of several that start at once, one has taken the place before and cannot be asked yet.
///
/// # Errors
/// Of `open`, and [`HandoverError`].
pub(super) fn open_or_ask<T, E>(
    config: &Config,
    is_locked: impl Fn(&E) -> bool,
    open: impl Fn() -> Result<T, E>,
) -> Result<(Result<T, E>, Option<LeftPlace>), HandoverError> {
    let mut asked = None;
    let mut opened = open();
    for _ in 0..OPENED_AGAIN {
        if !opened.as_ref().is_err_and(&is_locked) || asked.is_some() {
            break;
        }
        pause();
        asked = ask(config)?;
        opened = open();
    }
    Ok((opened, asked))
}

#[expect(clippy::disallowed_methods, reason = "it is an errand: nobody else waits for it")]
fn pause() {
    thread::sleep(ASK_PAUSE);
}

/// Whether the other side is gone, as far as this error tells.
fn has_ended(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    [BrokenPipe, ConnectionReset, UnexpectedEof].contains(&error.kind())
}

fn ask_once(config: &Config) -> Result<Option<LeftPlace>, HandoverError> {
    let path = socket_in(&config.agent.data_dir);
    let silent = |source| HandoverError::Silent { path: path.clone(), source };
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(silent(error)),
    };
    let there = getsockopt(&stream, sockopt::PeerCredentials).map_err(|errno| silent(errno.into()))?;
    let (found, ours, pid) = (there.uid(), geteuid().as_raw(), there.pid());
    if found != 0 && found != ours {
        return Err(HandoverError::Owner { path, found, ours });
    }
    tracing::info!(pid, "asking the agent that runs to hand over");
    let talk = || {
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        let mut request = serde_json::to_vec(&request(config))?;
        request.push(b'\n');
        (&stream).write_all(&request)?;
        answer(&stream)
    };
    let (answer, descriptors) = talk().map_err(silent)?;
    let passed = match answer {
        HandoverAnswer::Refused(why) => return Err(HandoverError::Refused { pid, why }),
        HandoverAnswer::Passed(passed) => passed,
    };
    let mut left = LeftSockets::default();
    for (socket, descriptor) in passed.into_iter().zip(descriptors) {
        let made = (socket.device, socket.inode);
        let of_public = socket.path == config.agent.socket_path;
        let vacant = Some(VacantSocket::new(UnixListener::from(descriptor), socket.path, made));
        if of_public {
            left.public = vacant;
        } else {
            left.admin = vacant;
        }
    }
    let admin = left.admin.as_ref().map(|admin| admin.path().to_owned());
    Ok(Some((Predecessor { stream, pid, admin }, left)))
}

fn request(config: &Config) -> HandoverRequest {
    let admin = config.agent.admin_socket();
    HandoverRequest {
        version: VERSION,
        trust_domain: config.trust_domain.name().to_owned(),
        socket_path: config.agent.socket_path.clone(),
        admin_socket_path: admin.map(|(AdminSocket::Configured(path) | AdminSocket::ByDefault(path))| path),
    }
}

/// Its answer, and what comes with it.
fn answer(stream: &UnixStream) -> io::Result<(HandoverAnswer, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    let mut buffer = [0; MOST_LINE];
    while line.last() != Some(&b'\n') {
        let (len, more) = descriptors::receive(stream, &mut buffer)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend(buffer.iter().take(len));
        descriptors.extend(more);
        if line.len() > MOST_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok((serde_json::from_slice(&line)?, descriptors))
}
