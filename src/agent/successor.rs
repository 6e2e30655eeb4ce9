//! The handover as the agent that leaves sees it: it listens for the next one, and passes on what that one is to have.
//!
//! Not trusted: what stands at the path (see [`Socket`]), and how long the other side takes. A few are listened to at a time,
//! and whoever has said nothing for longest gives way.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::unistd::geteuid;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};

use super::{
    handover::{
        HandoverAnswer, HandoverRequest, LeftSockets, PassedSocket, SERVING, STANDS_BY, VERSION, line,
        socket_in,
    },
    predecessor::Predecessor,
};
use crate::{
    config::Config,
    limits::pace::Pace,
    os::descriptors,
    peer::Socket,
    telemetry::{chain, trouble::Trouble},
};

/// How long the other side may take for its request.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// How many may take that long at a time.
const HEARD_AT_ONCE: usize = 16;
/// How long it may take to serve, once it has everything.
const SERVES_WITHIN: Duration = Duration::from_secs(15);
/// After how long one that has ended is known to have.
const ENDED_WITHIN: Duration = Duration::from_millis(100);
/// How long the pause is after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

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

/// Who has come to this agent's socket.
#[derive(Debug)]
pub(super) enum Arrived {
    /// The next agent, which is to have the place.
    Next(Successor),
    /// One that had the place before the agent from which this one has it, and takes it back when it is free.
    StandsBy(Predecessor),
}

/// Listens for the next agent, until it comes.
pub(super) struct Successors {
    /// Holds the task that listens.
    _listening: JoinSet<()>,
    came: mpsc::Receiver<Arrived>,
}

impl Successors {
    /// Listens at `socket`, for one that would serve what this configuration serves. Must be called within a runtime.
    pub(super) fn listen(
        socket: Option<Socket>,
        config: &Config,
        keeper: Keeper,
        lacks: impl Fn() -> Vec<&'static str> + Send + Sync + 'static,
    ) -> Self {
        let (tell, came) = mpsc::channel(1);
        let mut listening = JoinSet::new();
        if let Some(socket) = socket {
            let serves = Serves {
                trust_domain: config.trust_domain.name().to_owned(),
                socket_path: config.agent.socket_path.clone(),
                keeper,
                lacks: Box::new(lacks),
                refusals: Pace::default(),
                kept_from: Mutex::default(),
            };
            listening.spawn(async move {
                if let Err(error) = listen(socket, serves.into(), tell).await {
                    tracing::warn!(%error, "the agent cannot be asked to hand over");
                }
            });
        }
        Self { _listening: listening, came }
    }

    /// Who comes next. Nothing is lost when the wait is given up.
    pub(super) async fn next(&mut self) -> Arrived {
        match self.came.recv().await {
            Some(arrived) => arrived,
            None => std::future::pending().await,
        }
    }
}

async fn listen(socket: Socket, serves: Arc<Serves>, tell: mpsc::Sender<Arrived>) -> io::Result<()> {
    // The socket goes when somebody has come: the next agent has one of its own at that path.
    let (listener, _place) = socket.into_parts();
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let mut heard = JoinSet::new();
    let mut silent = VecDeque::<AbortHandle>::new();
    loop {
        tokio::select! {
            Some(arrived) = heard.join_next() => match arrived {
                Ok(Some(Arrived::Next(successor))) => {
                    drop(tell.send(Arrived::Next(successor)).await);
                    return Ok(());
                }
                Ok(Some(other)) => drop(tell.send(other).await),
                // Nobody to leave the place to, or one that gave way.
                Ok(None) | Err(_) => {}
            },
            accepted = listener.accept() => match accepted {
                Ok((stream, _nameless)) => {
                    silent.retain(|one| !one.is_finished());
                    if silent.len() >= HEARD_AT_ONCE {
                        silent.pop_front().into_iter().for_each(|oldest| oldest.abort());
                    }
                    let serves = Arc::clone(&serves);
                    silent.push_back(heard.spawn(async move { serves.heard(stream).await }));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the handover socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// What this agent serves, as far as the next one has to serve the same.
struct Serves {
    trust_domain: String,
    socket_path: PathBuf,
    keeper: Keeper,
    /// What keeps this agent from serving at that moment.
    lacks: Box<dyn Fn() -> Vec<&'static str> + Send + Sync>,
    refusals: Pace,
    /// What was said of those that could serve nobody.
    kept_from: Mutex<Trouble>,
}

impl Serves {
    /// Hears who has come. `None` when that is nobody to leave the place to, who was told so.
    async fn heard(&self, mut stream: UnixStream) -> Option<Arrived> {
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
            Ok(request) if request.stands_by => {
                let stream = stream.into_std().ok()?;
                Some(Arrived::StandsBy(Predecessor::that_stands_by(stream, pid, request.admin_socket_path)))
            }
            Ok(request) => {
                let Some(why) = self.keeps_from(&request, pid) else {
                    return Some(Arrived::Next(Successor { stream, pid, request }));
                };
                drop(answer(&stream, &HandoverAnswer::Kept(why), &[]));
                None
            }
            Err(why) => {
                self.refusals.say(|left_out| tracing::warn!(pid, left_out, why, "not handed over"));
                // It may have gone.
                drop(answer(&stream, &HandoverAnswer::Refused(why), &[]));
                None
            }
        }
    }

    /// Why the place is not left to an agent that serves nobody: this one does, or lacks less.
    fn keeps_from(&self, request: &HandoverRequest, pid: i32) -> Option<String> {
        let ours = (self.lacks)();
        if request.lacks.iter().all(|lack| ours.contains(&lack.as_str())) {
            return None;
        }
        let lacks = request.lacks.join(", ");
        if self.kept_from.lock().unwrap_or_else(PoisonError::into_inner).is_due(&lacks, Instant::now()) {
            tracing::warn!(
                pid,
                lacks,
                "another agent asks for the place, and could serve nobody: not handed over"
            );
        }
        Some(match ours.is_empty() {
            true => "it serves".to_owned(),
            false => format!("it lacks other things: {}", ours.join(", ")),
        })
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

    /// Whether it has ended before it said that it serves.
    pub(super) async fn has_ended(&mut self) -> bool {
        let said = timeout(ENDED_WITHIN, self.serves()).await;
        matches!(said, Ok(Err(SuccessorError::Ended | SuccessorError::Talk(_))))
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
