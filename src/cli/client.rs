//! The Workload API as a workload calls it: over a Unix socket, with the security header, a time limit and a bound
//! on what is read.
//!
//! The other end is spire-agent or Durward, and is trusted with identities but not with our memory: a message over
//! [`MAX_MESSAGE`] is refused. The connection is made before gRPC begins, so that a socket that is missing, closed or
//! forbidden is told apart and named.

use std::{
    cell::RefCell,
    io,
    pin::{Pin, pin},
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::Instant,
};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use super::{
    call_error::{CallError, in_tenths},
    socket::{AgentAddress, AgentSocket},
    terminal::{Terminal, clean},
    text::GoDuration,
};
use crate::api::proto::workload::{self as pb, spiffe_workload_api_client::SpiffeWorkloadApiClient};

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

/// The pause before a call is made again whose connection was closed: twice as long each time, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The time that a command has for one answer, and how often it may be asked for.
#[derive(Debug)]
pub(super) struct Attempts {
    /// `None` waits for ever.
    until: Option<Instant>,
    left: u32,
    pause: Duration,
}

impl Attempts {
    /// How often a call is made again.
    const MOST: u32 = 20;

    /// All of them within `limit`; `None` waits for ever.
    pub(super) fn within(limit: Option<Duration>) -> Self {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { until, left: Self::MOST, pause: FIRST_PAUSE }
    }

    /// How long the next one may take.
    pub(super) fn limit(&self) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// How long to wait before the call is made again that ended with `error`: as the agent says, or, where it closed the
    /// connection without a word, a moment. `None` where that makes no sense, or there is no time for it.
    pub(super) fn pause_after(&mut self, error: &CallError) -> Option<Duration> {
        let pause = match (error.retry_after(), error) {
            (Some(told), _) => told,
            (None, CallError::Closed { socket, .. }) if !socket.is_not_ours() => self.pause,
            _ => return None,
        };
        self.left = self.left.checked_sub(1)?;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Some(pause).filter(|pause| self.limit().is_none_or(|left| *pause < left))
    }

    /// Makes a call until it is answered, or refused for good: on the connection that is `open`, if one is, then each time on
    /// one of its own, as it may have been the connection that was refused. The answer, and the connection it came by.
    pub(super) async fn answer<T>(
        mut self,
        terminal: &mut Terminal,
        socket: &AgentSocket,
        mut open: Option<Channel>,
        call: impl AsyncFn(Channel, Option<Duration>) -> Result<T, Status>,
    ) -> Result<(T, Channel), CallError> {
        let (mut said, mut refused) = (String::new(), None);
        loop {
            let limit = self.limit();
            let open = open.take();
            let attempt = async {
                let channel = match open {
                    Some(channel) => channel,
                    None => connect(socket).await?,
                };
                let answer = call(channel.clone(), limit).await;
                answer.map(|answer| (answer, channel)).map_err(|status| CallError::of(socket, status))
            };
            let error = match patiently(terminal, socket, limit, attempt).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // When the time is over in the middle of an attempt, what it was refused for is what there is to say.
            let is_late = error.code() == Code::DeadlineExceeded;
            let error = if is_late { refused.take().unwrap_or(error) } else { error };
            let pause = if is_late { None } else { self.pause_after(&error) };
            let Some(pause) = pause else { return Err(error) };
            let why = match &error {
                CallError::Status { status, .. } => {
                    format!("{}; trying again in {}", clean(status.message()), in_tenths(pause))
                }
                // It may be so many times.
                _ => "the agent closed the connection; trying again".to_owned(),
            };
            if why != said {
                terminal.note(&why);
                said = why;
            }
            refused = Some(error);
            tokio::time::sleep(pause).await;
        }
    }
}

/// A client of the agent at one socket.
#[derive(Debug)]
pub(super) struct Client {
    socket: AgentSocket,
    /// The connection by which the last answer came.
    open: RefCell<Option<Channel>>,
    /// Of each answer; `None` waits for ever.
    limit: Option<Duration>,
}

/// Connects to `socket`.
///
/// # Errors
/// [`CallError::Connect`] when nobody answers there, [`CallError::Closed`] when that ends at once.
pub(super) async fn connect(socket: &AgentSocket) -> Result<Channel, CallError> {
    let failed = |cause| CallError::Connect { socket: socket.clone(), cause };
    let stream = reach(socket).await.map_err(failed)?;
    let mut stream = Some(TokioIo::new(stream));
    // The one connection that was made; when it breaks the call fails, and the caller decides.
    let connector = tower::service_fn(move |_: http::Uri| {
        std::future::ready(stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
    channel.map_err(|cause| CallError::Closed { socket: socket.clone(), cause: Box::new(cause) })
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
    pub(super) fn new(socket: &AgentSocket, limit: Option<Duration>) -> Self {
        Self { socket: socket.clone(), open: RefCell::default(), limit }
    }

    /// The identities of this process, as they are now.
    pub(super) async fn fetch_x509_svid(
        &self,
        terminal: &mut Terminal,
    ) -> Result<pb::X509svidResponse, CallError> {
        self.answer(terminal, async |mut api, limit| {
            first(api.fetch_x509svid(request(pb::X509svidRequest {}, limit)).await?.into_inner()).await
        })
        .await
    }

    /// The identities of this process, now and after every change.
    pub(super) async fn watch_x509_svid(&self) -> Result<Streaming<pb::X509svidResponse>, CallError> {
        let request = request(pb::X509svidRequest {}, self.limit);
        let answer = api(connect(&self.socket).await?).fetch_x509svid(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failed(status))
    }

    /// A token for `audience` for each identity of this process, or for `spiffe_id` alone when it is not empty.
    pub(super) async fn fetch_jwt_svid(
        &self,
        terminal: &mut Terminal,
        audience: &[String],
        spiffe_id: &str,
    ) -> Result<pb::JwtsvidResponse, CallError> {
        let message = pb::JwtsvidRequest { audience: audience.to_vec(), spiffe_id: spiffe_id.to_owned() };
        self.answer(terminal, async |mut api, limit| {
            Ok(api.fetch_jwtsvid(request(message.clone(), limit)).await?.into_inner())
        })
        .await
    }

    /// The keys with which tokens are verified.
    pub(super) async fn fetch_jwt_bundles(
        &self,
        terminal: &mut Terminal,
    ) -> Result<pb::JwtBundlesResponse, CallError> {
        self.answer(terminal, async |mut api, limit| {
            first(api.fetch_jwt_bundles(request(pb::JwtBundlesRequest {}, limit)).await?.into_inner()).await
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
        self.answer(terminal, async |mut api, limit| {
            Ok(api.validate_jwtsvid(request(message.clone(), limit)).await?.into_inner())
        })
        .await
    }

    /// Marks an error as one of this agent.
    pub(super) fn failed(&self, status: Status) -> CallError {
        CallError::of(&self.socket, status)
    }

    async fn answer<T>(
        &self,
        terminal: &mut Terminal,
        call: impl AsyncFn(SpiffeWorkloadApiClient<Channel>, Option<Duration>) -> Result<T, Status>,
    ) -> Result<T, CallError> {
        let (attempts, open) = (Attempts::within(self.limit), self.open.take());
        let call = async |channel, limit| call(api(channel), limit).await;
        let (answer, channel) = attempts.answer(terminal, &self.socket, open, call).await?;
        self.open.replace(Some(channel));
        Ok(answer)
    }
}

fn api(channel: Channel) -> SpiffeWorkloadApiClient<Channel> {
    SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

/// Without this header the agent answers nothing (SPIFFE Workload API standard, section 4.1): it proves that no
/// program was tricked into the call.
fn request<T>(message: T, limit: Option<Duration>) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    if let Some(limit) = limit {
        request.set_timeout(limit);
    }
    request
}

/// Waits for `call` for at most `limit`, and says that it waits when that takes a second or more.
pub(super) async fn patiently<T>(
    terminal: &mut Terminal,
    socket: &AgentSocket,
    limit: Option<Duration>,
    call: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    let what = format!("the agent at {}", socket.at);
    let started = Instant::now();
    let deadline = limit.and_then(|limit| started.checked_add(limit));
    let mut second = tokio::time::interval_at(started + Duration::from_secs(1), Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let late = || CallError::of(socket, Status::deadline_exceeded("context deadline exceeded"));
    let mut call = pin!(call);
    let result = loop {
        tokio::select! {
            biased;
            result = &mut call => break result,
            // Before the end: who waited in vain was told so, however late this task runs.
            _ = second.tick() => terminal.waiting(&what, started.elapsed(), limit),
            () = until(deadline) => break Err(late()),
        }
    };
    terminal.wipe();
    // The limit is sent along: when tonic or the agent sees it first, the answer is the same.
    match result {
        Err(error) if error.is_cancelled() && deadline.is_some_and(|at| at <= Instant::now()) => Err(late()),
        other => other,
    }
}

async fn until(deadline: Option<Instant>) {
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
