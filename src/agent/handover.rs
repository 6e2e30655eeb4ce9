//! How an agent leaves its place to the next one: what the two say to each other, and the side of the one that leaves.
//!
//! The running agent listens at `handover.sock` in `data_dir`, where only its user and root can connect; the kernel says
//! who did. The next one, prepared as far as it can be, sends one line of JSON with what it is going to serve. It is
//! answered with a line that says why not, or with the listening sockets (`SCM_RIGHTS`), once the issuer's files are free.
//! It says `serving` when it does, and keeps the connection open for as long as it lives: when that ends, the one that has
//! left can come back. No call is lost meanwhile: who connects waits in the queue of the socket, which never goes away.
//!
//! Not trusted: what stands at the path (see [`Socket`]), and how long the other side takes. One is listened to at a time.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};

use crate::{
    config::Config,
    limits::pace::Pace,
    os::descriptors,
    peer::{Socket, socket::VacantSocket},
    telemetry::chain,
};

/// The name of the socket in `data_dir`.
const NAME: &str = "handover.sock";
/// What these agents speak.
pub(super) const VERSION: u32 = 1;
/// The longest line of either side, in bytes.
pub(super) const MOST_LINE: usize = 4096;
/// How long the other side may take for its request.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take to serve, once it has everything.
const SERVES_WITHIN: Duration = Duration::from_secs(15);
/// How long the pause is after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// What the next agent says at last.
pub(super) const SERVING: &[u8] = b"serving\n";
/// What the one that has left says after that, if it stays to come back.
pub(super) const STANDS_BY: &[u8] = b"standing by\n";

/// Where an agent that keeps its state in `data_dir` is asked to hand over.
pub(super) fn socket_in(data_dir: &Path) -> PathBuf {
    data_dir.join(NAME)
}

/// The process of the agent that can be asked in this `data_dir`; `None` where nobody listens.
pub(super) async fn who_runs(data_dir: &Path) -> Option<i32> {
    let stream = UnixStream::connect(socket_in(data_dir)).await.ok()?;
    let there = stream.peer_cred().ok()?;
    let known = [0, geteuid().as_raw()].contains(&there.uid());
    known.then(|| there.pid().unwrap_or_default())
}

/// What the next agent is going to serve.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct HandoverRequest {
    pub(super) version: u32,
    pub(super) trust_domain: String,
    pub(super) socket_path: PathBuf,
    pub(super) admin_socket_path: Option<PathBuf>,
}

/// What it is told.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum HandoverAnswer {
    /// Nothing has changed. The text says why.
    Refused(String),
    /// These sockets come along, in this order, and the issuer's files are free.
    Passed(Vec<PassedSocket>),
}

/// A socket whose descriptor comes along.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct PassedSocket {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// The sockets that one agent leaves to another.
#[derive(Debug, Default)]
pub(super) struct LeftSockets {
    pub(super) public: Option<VacantSocket>,
    pub(super) admin: Option<VacantSocket>,
}

impl LeftSockets {
    /// The same sockets once more.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let again = |socket: &Option<VacantSocket>| socket.as_ref().map(VacantSocket::try_clone).transpose();
        Ok(Self { public: again(&self.public)?, admin: again(&self.admin)? })
    }

    fn all(&self) -> impl Iterator<Item = &VacantSocket> {
        [&self.public, &self.admin].into_iter().flatten()
    }
}

/// Binds the socket at which the agent of this configuration is asked. Without it the agent serves all the same, and warns.
pub(super) fn bind(config: &Config) -> Option<Socket> {
    let path = socket_in(&config.agent.data_dir);
    Socket::bind_private(&path)
        .inspect_err(|error| {
            tracing::warn!(
                socket = %path.display(),
                error = chain(error),
                "the agent cannot be asked to hand over: an update has to end it before the next one starts"
            );
        })
        .ok()
}

/// Whether the socket of the Workload API can be left to another agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeper {
    /// The agent bound it.
    Agent,
    /// The service manager holds it.
    ServiceManager,
}

/// Listens for the next agent, until it comes.
pub(super) struct Successors {
    /// Holds the task that listens.
    _listening: JoinSet<()>,
    came: mpsc::Receiver<Successor>,
}

impl Successors {
    /// Listens at `socket`, for one that would serve what this configuration serves. Must be called within a runtime.
    pub(super) fn listen(socket: Option<Socket>, config: &Config, keeper: Keeper) -> Self {
        let (tell, came) = mpsc::channel(1);
        let mut listening = JoinSet::new();
        if let Some(socket) = socket {
            let serves = Serves {
                trust_domain: config.trust_domain.name().to_owned(),
                socket_path: config.agent.socket_path.clone(),
                keeper,
                refusals: Pace::default(),
            };
            listening.spawn(async move {
                if let Err(error) = listen(socket, &serves, tell).await {
                    tracing::warn!(%error, "the agent cannot be asked to hand over");
                }
            });
        }
        Self { _listening: listening, came }
    }

    /// The next agent, when it has come. Nothing is lost when the wait is given up.
    pub(super) async fn next(&mut self) -> Successor {
        match self.came.recv().await {
            Some(successor) => successor,
            None => std::future::pending().await,
        }
    }
}

async fn listen(socket: Socket, serves: &Serves, tell: mpsc::Sender<Successor>) -> io::Result<()> {
    // The socket goes when somebody has come: the next agent has one of its own at that path.
    let (listener, _place) = socket.into_parts();
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _nameless)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection on the handover socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(successor) = serves.heard(stream).await {
            drop(tell.send(successor).await);
            return Ok(());
        }
    }
}

/// What this agent serves, as far as the next one has to serve the same.
struct Serves {
    trust_domain: String,
    socket_path: PathBuf,
    keeper: Keeper,
    refusals: Pace,
}

impl Serves {
    /// Hears who has come. `None` when that is nobody to leave the place to, who was told so.
    async fn heard(&self, mut stream: UnixStream) -> Option<Successor> {
        let credentials = stream.peer_cred().ok()?;
        let (uid, pid) = (credentials.uid(), credentials.pid().unwrap_or_default());
        if uid != 0 && uid != geteuid().as_raw() {
            self.refusals.say(|left_out| {
                tracing::warn!(uid, pid, left_out, "another user asks the agent to hand over: refused");
            });
            return None;
        }
        let request = match timeout(REQUEST_WITHIN, line(&mut stream)).await {
            Ok(Ok(request)) => request,
            Ok(Err(error)) => {
                tracing::debug!(pid, %error, "the agent that asked this one to hand over is gone");
                return None;
            }
            Err(_late) => {
                self.refusals.say(|left_out| {
                    tracing::warn!(
                        pid,
                        left_out,
                        "the agent that asked this one to hand over did not say what it wants"
                    );
                });
                return None;
            }
        };
        match self.fitting(&request) {
            Ok(request) => Some(Successor { stream, pid, request }),
            Err(why) => {
                self.refusals.say(|left_out| tracing::warn!(pid, left_out, why, "not handed over"));
                // It may have gone.
                drop(answer(&stream, &HandoverAnswer::Refused(why), &[]));
                None
            }
        }
    }

    fn fitting(&self, request: &[u8]) -> Result<HandoverRequest, String> {
        let request: HandoverRequest = serde_json::from_slice(request)
            .map_err(|error| format!("the request is not understood: {error}"))?;
        if request.version != VERSION {
            return Err(format!("it knows version {VERSION} of the handover, and not {}", request.version));
        }
        if request.trust_domain != self.trust_domain {
            return Err(format!(
                "it serves trust domain {}, and not {}",
                self.trust_domain, request.trust_domain
            ));
        }
        if request.socket_path != self.socket_path {
            let (ours, other) = (self.socket_path.display(), request.socket_path.display());
            return Err(format!("it serves at {ours}, and not at {other}"));
        }
        if self.keeper == Keeper::ServiceManager {
            return Err(
                "its socket is the service manager's, so that a restart of it loses no call".to_owned()
            );
        }
        Ok(request)
    }
}

/// The agent that is to come.
#[derive(Debug)]
pub(super) struct Successor {
    stream: UnixStream,
    pid: i32,
    request: HandoverRequest,
}

/// Why the next agent does not serve.
#[derive(Debug, thiserror::Error)]
pub(super) enum SuccessorError {
    /// Its connection ended.
    #[error("it has ended")]
    Ended,
    /// It took longer than it may.
    #[error("it did not serve within {SERVES_WITHIN:?}")]
    Late,
    /// What it said, or was to be sent.
    #[error("it cannot be spoken with")]
    Talk(#[source] io::Error),
    /// A write of the issuer's is under way that does not end.
    #[error("the issuer's files are in use: a write to them has not ended")]
    NotFree,
}

impl Successor {
    /// Its process; 0 where this one cannot see it.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it is to have the admin socket at this path.
    pub(super) fn serves_admin_at(&self, path: &Path) -> bool {
        self.request.admin_socket_path.as_deref() == Some(path)
    }

    /// Gives it the sockets.
    pub(super) fn pass(&self, left: &LeftSockets) -> Result<(), SuccessorError> {
        let passed = left.all().map(|socket| {
            let (device, inode) = socket.made();
            PassedSocket { path: socket.path().to_owned(), device, inode }
        });
        let descriptors: Vec<BorrowedFd<'_>> = left.all().map(|socket| socket.listener().as_fd()).collect();
        answer(&self.stream, &HandoverAnswer::Passed(passed.collect()), &descriptors)
            .map_err(SuccessorError::Talk)
    }

    /// Tells it that nothing has changed.
    pub(super) fn refuse(&self, why: &SuccessorError) {
        drop(answer(&self.stream, &HandoverAnswer::Refused(chain(why)), &[]));
    }

    /// Waits until it serves.
    pub(super) async fn serves(&mut self) -> Result<(), SuccessorError> {
        match timeout(SERVES_WITHIN, line(&mut self.stream)).await {
            Ok(Ok(said)) if said == SERVING => Ok(()),
            Ok(Ok(_)) => Err(SuccessorError::Talk(io::ErrorKind::InvalidData.into())),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Err(SuccessorError::Ended),
            Ok(Err(error)) => Err(SuccessorError::Talk(error)),
            Err(_late) => Err(SuccessorError::Late),
        }
    }

    /// Tells it that this agent takes the place back when the connection ends.
    pub(super) fn told_of_standing_by(&self) {
        if let Err(error) = self.stream.try_write(STANDS_BY) {
            tracing::debug!(pid = self.pid, %error, "cannot tell the next agent that this one stands by");
        }
    }

    /// Waits until its process has ended, or has left the place.
    pub(super) async fn ended(&mut self) {
        // Whatever it says now is nothing that is known here.
        while self.stream.read(&mut [0; 64]).await.is_ok_and(|len| len > 0) {}
    }

    /// Lets go of its connection.
    pub(super) async fn close(mut self) {
        drop(self.stream.shutdown().await);
    }
}

fn answer(stream: &UnixStream, answer: &HandoverAnswer, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    descriptors::send(stream, &line, descriptors)
}

/// A line, with its end.
async fn line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if line.len() >= MOST_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte).await?;
        line.extend(byte);
    }
    Ok(line)
}
