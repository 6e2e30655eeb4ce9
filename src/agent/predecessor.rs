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
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::{
    candidate::Candidate,
    handover::{
        HandoverAnswer, HandoverRequest, LeftSockets, MOST_LINE, SERVING, STANDS_BY, line, socket_in,
    },
};
use crate::{
    config::Config,
    os::descriptors,
    peer::socket::{VacantSocket, is_listened_at},
};

/// How long the other agent may take until it has left its place: longer than it waits for its own disk.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How long it may take to say that it stands by. It says so, or closes the connection, as soon as it hears that this one serves.
const SAYS_WITHIN: Duration = Duration::from_secs(2);

/// How many that stand by are kept in mind: of one the others hear, when it has the place.
const MOST_PREDECESSORS: usize = 4;

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
    /// It said that it keeps the place from one that could serve nobody.
    #[error("the agent that runs (PID {pid}) does not hand over to one that could serve nobody: {why}")]
    Kept { pid: i32, why: String },
    /// Somebody else listens there.
    #[error("{} belongs to user {found}, and the agent runs as user {ours}", path.display())]
    Owner { path: PathBuf, found: u32, ours: u32 },
    /// It did not answer, or not in words that are known.
    #[error("the agent that runs does not answer at {}; {END_IT_FIRST}", path.display())]
    Silent { path: PathBuf, source: io::Error },
}

/// An agent that had this place before, and may be there to take it back. It holds the socket, with who waits at it.
#[derive(Debug)]
pub(super) struct Predecessor {
    stream: UnixStream,
    pid: i32,
    /// The admin socket that it has left.
    admin: Option<PathBuf>,
    stance: Stance,
}

/// What becomes of a predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stance {
    /// It comes back when this agent ends.
    StandsBy,
    /// It was told that this one serves, and is about to end, or to say that it stands by.
    Told,
}

impl Predecessor {
    /// One that has said so itself.
    pub(super) fn that_stands_by(stream: UnixStream, pid: i32, admin: Option<PathBuf>) -> Self {
        Self { stream, pid, admin, stance: Stance::StandsBy }
    }

    /// Its process; 0 where this one cannot see it.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it lives, and takes its place back when this agent leaves it. Waits for its word, if that is on its way.
    pub(super) async fn comes_back(&mut self) -> bool {
        let said = match self.stance {
            Stance::Told => timeout(SAYS_WITHIN, self.says()).await,
            Stance::StandsBy => Ok(Ok(STANDS_BY.to_vec())),
        };
        if !matches!(said, Ok(Ok(said)) if said == STANDS_BY) {
            return false;
        }
        self.stance = Stance::StandsBy;
        let lives = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.stream.set_nonblocking(true).is_ok() && (&self.stream).read(&mut [0]).is_err_and(lives)
    }

    async fn says(&self) -> io::Result<Vec<u8>> {
        let stream = self.stream.try_clone()?;
        stream.set_nonblocking(true)?;
        line(&mut tokio::net::UnixStream::from_std(stream)?).await
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
    pub(super) fn told_that_this_serves(&mut self) {
        self.stance = Stance::Told;
        if let Err(error) = (&self.stream).write_all(SERVING) {
            tracing::debug!(pid = self.pid, %error, "the agent that has handed over is gone");
        }
    }
}

/// Those that had this place before, the last one last.
#[derive(Debug, Default)]
pub(super) struct Predecessors(Vec<Predecessor>);

impl From<Option<Predecessor>> for Predecessors {
    fn from(one: Option<Predecessor>) -> Self {
        Self(one.into_iter().collect())
    }
}

impl Predecessors {
    /// Takes note of one more. Of too many the first is let go of, and comes again.
    pub(super) fn add(&mut self, one: Predecessor) {
        if self.0.len() >= MOST_PREDECESSORS {
            self.0.remove(0);
        }
        self.0.push(one);
    }

    /// Those that come back when this agent leaves the place.
    pub(super) async fn that_come_back(&mut self) -> Vec<Predecessor> {
        let mut back = Vec::new();
        for mut one in std::mem::take(&mut self.0) {
            if one.comes_back().await {
                back.push(one);
            }
        }
        back
    }
}

/// An agent that has left its place, and the sockets that it left.
pub(super) type LeftPlace = (Predecessor, LeftSockets);

/// Asks the agent that runs for its place. `None` where nobody listens. Waits for it. One that ends while it is asked is
/// asked again: another may have come, or nobody is left. So is one that keeps its place, as long as the candidate waits.
///
/// # Errors
/// [`HandoverError`]; the other agent serves on then, or takes up service again when this process has ended.
pub(super) fn ask(candidate: &mut Candidate<'_>) -> Result<Option<LeftPlace>, HandoverError> {
    let mut ended = 0;
    loop {
        match ask_once(candidate) {
            Err(HandoverError::Kept { pid, .. }) if candidate.waits(pid) => {}
            Err(HandoverError::Silent { source, .. }) if has_ended(&source) && ended < ASKED_AGAIN => {
                ended += 1;
                tracing::info!(error = %source, "the agent that runs has ended while it was asked");
                pause();
            }
            asked => return asked,
        }
    }
}

/// Tries `open`, which fails where another agent has the files, and asks an agent that listens meanwhile for its place: of
/// several that start at once, one has taken the place before and cannot be asked yet.
///
/// # Errors
/// Of `open`, and [`HandoverError`].
pub(super) fn open_or_ask<T, E>(
    candidate: &mut Candidate<'_>,
    is_locked: impl Fn(&E) -> bool,
    open: impl Fn() -> Result<T, E>,
) -> Result<(Result<T, E>, Option<LeftPlace>), HandoverError> {
    let mut opened = open();
    for _ in 0..OPENED_AGAIN {
        let is_taken = match &opened {
            // The files are free for the moment between one agent and the next, the socket is not.
            Ok(_) => is_listened_at(&candidate.config.agent.socket_path),
            Err(error) => is_locked(error),
        };
        if !is_taken {
            break;
        }
        drop(opened);
        pause();
        let asked = ask(candidate)?;
        opened = open();
        if asked.is_some() {
            return Ok((opened, asked));
        }
    }
    Ok((opened, None))
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

/// Somebody who listens at the handover socket of this configuration, and is this process's user or root.
fn connect(config: &Config) -> Result<Option<(UnixStream, i32)>, HandoverError> {
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
    let (found, ours) = (there.uid(), geteuid().as_raw());
    if found != 0 && found != ours {
        return Err(HandoverError::Owner { path, found, ours });
    }
    Ok(Some((stream, there.pid())))
}

/// The agent that serves in the place of one of this configuration. `None` where there is none.
pub(super) async fn serves_instead(config: &Config) -> Option<ServesInstead> {
    let stream = tokio::net::UnixStream::connect(socket_in(&config.agent.data_dir)).await.ok()?;
    let there = stream.peer_cred().ok()?;
    let known = [0, geteuid().as_raw()].contains(&there.uid());
    known.then(|| ServesInstead { stream, pid: there.pid().unwrap_or_default() })
}

/// The agent that serves in the place of this one.
#[derive(Debug)]
pub(super) struct ServesInstead {
    stream: tokio::net::UnixStream,
    pid: i32,
}

impl ServesInstead {
    /// Its process; 0 where this one cannot see it.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Stands by until it has ended or has left the place, or does not want to know of this one.
    pub(super) async fn stand_by(mut self, config: &Config) {
        let request = HandoverRequest { stands_by: true, ..HandoverRequest::for_place(config) };
        // One that does not take it is told by the end of the connection.
        if let Ok(line) = request.line() {
            drop(self.stream.write_all(&line).await);
        }
        // Whatever it says is nothing that is known here.
        while self.stream.read(&mut [0; 64]).await.is_ok_and(|len| len > 0) {}
    }
}

fn ask_once(candidate: &mut Candidate<'_>) -> Result<Option<LeftPlace>, HandoverError> {
    let config = candidate.config;
    // To judge takes longer than the other one waits for a request.
    if connect(config)?.is_none() {
        return Ok(None);
    }
    let lacks: Vec<String> = candidate.lacks().into_iter().map(str::to_owned).collect();
    let Some((stream, pid)) = connect(config)? else { return Ok(None) };
    let path = socket_in(&config.agent.data_dir);
    let silent = |source| HandoverError::Silent { path, source };
    if lacks.is_empty() {
        tracing::info!(pid, "asking the agent that runs to hand over");
    }
    let request = HandoverRequest { lacks, ..HandoverRequest::for_place(config) };
    let talk = || {
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        (&stream).write_all(&request.line()?)?;
        answer(&stream)
    };
    let (answer, descriptors) = talk().map_err(silent)?;
    let passed = match answer {
        HandoverAnswer::Refused(why) => return Err(HandoverError::Refused { pid, why }),
        HandoverAnswer::Kept(why) => return Err(HandoverError::Kept { pid, why }),
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
    // Until it hears that this one serves, it comes back when this one ends.
    Ok(Some((Predecessor::that_stands_by(stream, pid, admin), left)))
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
