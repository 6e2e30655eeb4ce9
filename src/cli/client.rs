//! The Workload API as a workload calls it: over a Unix socket, with the security header, a time limit and a bound
//! on what is read.
//!
//! The other end is spire-agent or Durward, and is trusted with identities but not with our memory: a message over
//! [`MAX_MESSAGE`] is refused. The connection is made before gRPC begins, so that a socket that is missing, closed or
//! forbidden is told apart and named. Errors read as grpc-go prints them, which people grep for; what to do about
//! one is said apart ([`CallError::advice`]).

use std::{
    io,
    pin::{Pin, pin},
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use super::{
    socket::{AgentAddress, AgentSocket},
    terminal::{Terminal, clean},
    text::{GoDuration, code_name},
};
use crate::{
    api::proto::workload::{self as pb, spiffe_workload_api_client::SpiffeWorkloadApiClient},
    peer::socket::MAX_PATH_LEN,
};

/// The largest message that is read: thousands of identities with their keys.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Time limit of a call unless the command line says otherwise (spire-agent: `commandTimeout`).
pub(super) const DEFAULT_TIMEOUT: &str = "5s";

/// `--timeout`, of every command that waits for one answer.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct TimeoutArgs {
    /// How long to wait, such as 5s, 1m30s or 500ms; 0 waits for ever
    #[arg(long, value_name = "DURATION", default_value = DEFAULT_TIMEOUT)]
    timeout: GoDuration,
}

impl TimeoutArgs {
    /// `None` waits for ever.
    pub(super) fn limit(self) -> Option<Duration> {
        Some(self.timeout.0).filter(|limit| !limit.is_zero())
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody answers at the socket.
    #[error(
        "rpc error: code = Unavailable desc = no agent answers at {}: {}",
        socket.at, said(cause)
    )]
    Connect { socket: AgentSocket, cause: io::Error },
    /// The agent answered with an error, or stopped in the middle of one.
    #[error("rpc error: code = {} desc = {}", code_name(status.code()), clean(status.message()))]
    Status { socket: AgentSocket, status: Box<Status> },
}

impl CallError {
    pub(super) fn code(&self) -> Code {
        match self {
            Self::Connect { .. } => Code::Unavailable,
            Self::Status { status, .. } => status.code(),
        }
    }

    /// When the agent says to come back, if it does.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Connect { .. } => None,
            Self::Status { status, .. } => retry_delay(status),
        }
    }

    /// What a person can do about it, if that is known.
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Connect { socket, cause } => Some(connect_advice(socket, cause)),
            Self::Status { socket, status } => status_advice(socket, status),
        }
    }
}

/// The system's sentence without its number.
fn said(err: &io::Error) -> String {
    let text = err.to_string();
    match text.split_once(" (os error") {
        Some((sentence, _)) => sentence.to_lowercase(),
        None => text,
    }
}

fn connect_advice(socket: &AgentSocket, cause: &io::Error) -> String {
    let chosen = format!("The path is {}.", socket.chosen);
    let also = match cause.kind() {
        io::ErrorKind::NotFound if socket.chosen.is_admin() => {
            "Is the agent running, with this admin_socket_path?"
        }
        io::ErrorKind::PermissionDenied if socket.chosen.is_admin() => {
            "The admin socket answers the agent's own user and root alone: try it with sudo."
        }
        io::ErrorKind::NotFound => "Is the agent running, with this socket_path?",
        io::ErrorKind::ConnectionRefused => "The agent that made this socket is gone: start it again.",
        io::ErrorKind::PermissionDenied => {
            "This user may not open it: look at the modes of the socket and of the directories above it."
        }
        io::ErrorKind::InvalidInput => {
            return format!("{chosen} The path of a socket holds at most {MAX_PATH_LEN} bytes.");
        }
        _ if socket.chosen.is_admin() => {
            "An agent that closes the connection answers its own user and root alone."
        }
        _ => "Is it the socket of an agent?",
    };
    format!("{chosen} {also}")
}

fn status_advice(socket: &AgentSocket, status: &Status) -> Option<String> {
    let at = &socket.at;
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled if socket.chosen.is_admin() => Some(format!(
            "{at} closed the connection: the admin socket answers the agent's own user and root alone."
        )),
        Code::PermissionDenied => Some(format!(
            "No registration entry matches this process (user ID {}, group ID {}). An entry is needed whose \
             selectors all fit, for example \"unix:uid:{}\".",
            nix::unistd::geteuid(),
            nix::unistd::getegid(),
            nix::unistd::geteuid(),
        )),
        Code::ResourceExhausted => Some(match retry_delay(status) {
            Some(delay) => format!("This caller is over its limit: try again in {}.", GoDuration(delay)),
            None => "This caller is over its limit: try again later.".to_owned(),
        }),
        Code::DeadlineExceeded => {
            Some(format!("The agent at {at} gave no answer in time; --timeout waits longer."))
        }
        Code::Unavailable => Some(match retry_delay(status) {
            Some(delay) => format!("The agent asks to try again in {}.", GoDuration(delay)),
            None => format!("The agent at {at} cannot answer now: look at its log, or try again."),
        }),
        Code::Unimplemented => {
            Some(format!("Whatever listens at {at} does not serve this call: is it the agent?"))
        }
        _ => None,
    }
}

/// What the agent says about when to come back (`google.rpc.RetryInfo`).
fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay.filter(|delay| !delay.is_zero())
}

/// How often a call is made again that the agent refused for a while.
const MOST_RETRIES: u32 = 20;

/// A connection to an agent.
#[derive(Debug)]
pub(super) struct Client {
    api: SpiffeWorkloadApiClient<Channel>,
    socket: AgentSocket,
    /// Of each call; `None` waits for ever.
    limit: Option<Duration>,
}

/// Connects to `socket`.
///
/// # Errors
/// [`CallError::Connect`] when nobody answers there.
pub(super) async fn connect(socket: &AgentSocket) -> Result<Channel, CallError> {
    let failed = |cause| CallError::Connect { socket: socket.clone(), cause };
    let stream = reach(socket).await.map_err(failed)?;
    let mut stream = Some(TokioIo::new(stream));
    // The one connection that was made; when it breaks the call fails, and the caller decides.
    let connector = tower::service_fn(move |_: http::Uri| {
        std::future::ready(stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|err| failed(io::Error::other(err)))
}

/// How often a place in a full queue is tried for, and the pause between: two seconds.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// A connection to an agent, of whichever kind.
pub(super) trait Bytes: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Bytes for T {}

/// A connection. While the queue of those that wait to be accepted is full, as in a flood, the kernel refuses the next.
pub(super) async fn reach(socket: &AgentSocket) -> io::Result<Pin<Box<dyn Bytes>>> {
    let path = match &socket.at {
        AgentAddress::Unix(path) => path,
        AgentAddress::Tcp(address) => return Ok(Box::pin(TcpStream::connect(address).await?)),
    };
    for _ in 1..TRIES {
        match UnixStream::connect(path).await {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(PAUSE).await,
            reached => return Ok(Box::pin(reached?)),
        }
    }
    Ok(Box::pin(UnixStream::connect(path).await?))
}

impl Client {
    /// Connects to `socket`.
    ///
    /// # Errors
    /// [`CallError::Connect`] when nobody answers there.
    pub(super) async fn connect(socket: &AgentSocket, limit: Option<Duration>) -> Result<Self, CallError> {
        let channel = connect(socket).await?;
        let api = SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        Ok(Self { api, socket: socket.clone(), limit })
    }

    /// The identities of this process, as they are now.
    pub(super) async fn fetch_x509_svid(
        &self,
        terminal: &mut Terminal,
    ) -> Result<pb::X509svidResponse, CallError> {
        self.answer(terminal, async |mut api| {
            first(api.fetch_x509svid(self.request(pb::X509svidRequest {})).await?.into_inner()).await
        })
        .await
    }

    /// The identities of this process, now and after every change.
    pub(super) async fn watch_x509_svid(&self) -> Result<Streaming<pb::X509svidResponse>, CallError> {
        let request = self.request(pb::X509svidRequest {});
        self.api
            .clone()
            .fetch_x509svid(request)
            .await
            .map(tonic::Response::into_inner)
            .map_err(|s| self.failed(s))
    }

    /// A token for `audience` for each identity of this process, or for `spiffe_id` alone when it is not empty.
    pub(super) async fn fetch_jwt_svid(
        &self,
        terminal: &mut Terminal,
        audience: &[String],
        spiffe_id: &str,
    ) -> Result<pb::JwtsvidResponse, CallError> {
        let message = pb::JwtsvidRequest { audience: audience.to_vec(), spiffe_id: spiffe_id.to_owned() };
        self.answer(terminal, async |mut api| {
            Ok(api.fetch_jwtsvid(self.request(message.clone())).await?.into_inner())
        })
        .await
    }

    /// The keys with which tokens are verified.
    pub(super) async fn fetch_jwt_bundles(
        &self,
        terminal: &mut Terminal,
    ) -> Result<pb::JwtBundlesResponse, CallError> {
        self.answer(terminal, async |mut api| {
            first(api.fetch_jwt_bundles(self.request(pb::JwtBundlesRequest {})).await?.into_inner()).await
        })
        .await
    }

    /// Has the agent verify a token.
    pub(super) async fn validate_jwt_svid(
        &self,
        terminal: &mut Terminal,
        audience: &str,
        svid: &str,
    ) -> Result<pb::ValidateJwtsvidResponse, CallError> {
        let message = pb::ValidateJwtsvidRequest { audience: audience.to_owned(), svid: svid.to_owned() };
        self.answer(terminal, async |mut api| {
            Ok(api.validate_jwtsvid(self.request(message.clone())).await?.into_inner())
        })
        .await
    }

    /// Marks an error as one of this connection.
    pub(super) fn failed(&self, status: Status) -> CallError {
        CallError::Status { socket: self.socket.clone(), status: Box::new(status) }
    }

    /// Without this header the agent answers nothing (SPIFFE Workload API standard, section 4.1): it proves that no
    /// program was tricked into the call.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
        if let Some(limit) = self.limit {
            request.set_timeout(limit);
        }
        request
    }

    /// Calls, and calls again when an agent that refuses has said to: on a connection of its own, as it may have been the
    /// connection that was refused. Each call has the time limit; the pauses do too, all together.
    async fn answer<T>(
        &self,
        terminal: &mut Terminal,
        call: impl AsyncFn(SpiffeWorkloadApiClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, CallError> {
        let mut api = self.api.clone();
        let mut left = self.limit.unwrap_or(Duration::MAX);
        for _ in 0..MOST_RETRIES {
            let status = match patiently(terminal, &self.socket, self.limit, call(api)).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            let Some(pause) = retry_delay(&status).filter(|pause| *pause <= left) else {
                return Err(self.failed(status));
            };
            left = left.saturating_sub(pause);
            terminal.note(format_args!("{}; trying again in {}", clean(status.message()), GoDuration(pause)));
            tokio::time::sleep(pause).await;
            api = Self::connect(&self.socket, self.limit).await?.api;
        }
        patiently(terminal, &self.socket, self.limit, call(api)).await.map_err(|status| self.failed(status))
    }
}

/// Waits for `call` for at most `limit`, and says that it waits when that takes a second or more.
pub(super) async fn patiently<T>(
    terminal: &mut Terminal,
    socket: &AgentSocket,
    limit: Option<Duration>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let what = format!("the agent at {}", socket.at);
    let started = tokio::time::Instant::now();
    let deadline = limit.and_then(|limit| started.checked_add(limit));
    let mut second = tokio::time::interval_at(started + Duration::from_secs(1), Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut call = pin!(call);
    let result = loop {
        tokio::select! {
            biased;
            result = &mut call => break result,
            // Before the end: who waited in vain was told so, however late this task runs.
            _ = second.tick() => terminal.waiting(&what, started.elapsed(), limit),
            () = until(deadline) => break Err(Status::deadline_exceeded("context deadline exceeded")),
        }
    };
    terminal.wipe();
    // The limit is sent along: when tonic or the agent sees it first, the answer is the same.
    match result {
        Err(status)
            if status.code() == Code::Cancelled
                && deadline.is_some_and(|at| at <= tokio::time::Instant::now()) =>
        {
            Err(Status::deadline_exceeded("context deadline exceeded"))
        }
        other => other,
    }
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn first<T>(mut stream: Streaming<T>) -> Result<T, Status> {
    // grpc-go says EOF for a stream that ends without a message.
    stream.message().await?.ok_or_else(|| Status::unavailable("the agent ended the stream without an answer"))
}

/// Seconds since the epoch, for a certificate check.
pub(super) fn since_epoch(now: SystemTime) -> Duration {
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
