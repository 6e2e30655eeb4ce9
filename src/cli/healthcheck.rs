//! `healthcheck`: whether the agent serves, by grpc.health.v1 over its socket.
//!
//! Texts are spire-agent's, and so is that 0 goes with `Agent is healthy.` alone. It is 1 otherwise, and 4 where nobody answers
//! at the socket, as with all commands. What exactly went wrong is said with `--verbose`.
//!
//! An agent that takes no connection of this user, or no call, is one that holds its limits: it is up, and whoever
//! restarts it for that takes identity away from the whole node. So that is 0 too, and said.

use std::{error::Error as _, io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::Instant,
};
use tonic::{Code, Request};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Failure,
    call_error::{CallError, unreached},
    client::{TimeoutArgs, connect, patiently, reach},
    socket::{AgentSocket, SocketArgs},
    terminal::Terminal,
};

/// `healthcheck`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct HealthArgs {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    timeout: TimeoutArgs,

    /// Say what is being done, and what went wrong
    #[arg(long)]
    verbose: bool,

    /// Accepted for spire-agent's sake; changes nothing
    #[arg(long, hide = true)]
    shallow: bool,
}

/// Why the agent is not healthy.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unhealthy {
    #[error("Agent is unhealthy: unable to determine health")]
    Unknown,
    /// There is none at the socket.
    #[error("Agent is unhealthy: unable to determine health")]
    Absent,
    #[error("Agent is unhealthy: agent returned status \"{0}\"")]
    Status(&'static str),
}

/// Runs `healthcheck`.
pub(super) async fn check(args: &HealthArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    if args.verbose {
        terminal.print("Checking agent health...\n")?;
    }
    let socket = args.socket.resolve(super::environment)?;
    match observe(&socket, args.timeout.limit(), terminal).await {
        AgentHealth::Serving => Ok(terminal.print("Agent is healthy.\n")?),
        AgentHealth::Refusing => Ok(terminal.print(REFUSED)?),
        AgentHealth::Blocking => Ok(terminal.print(BLOCKED)?),
        AgentHealth::Other(status) => Err(Unhealthy::Status(status.as_str_name()).into()),
        AgentHealth::Unknown(error) => {
            if args.verbose {
                terminal.note(format_args!("Failed to check health: {error}"));
            } else if let CallError::Connect { socket, cause } = &error {
                terminal.note(unreached(socket, cause));
            }
            if let Some(advice) = error.advice().filter(|_| args.verbose || error.is_unreached()) {
                terminal.advise(&advice);
            }
            Err(if error.is_absent() { Unhealthy::Absent } else { Unhealthy::Unknown }.into())
        }
    }
}

/// What came of the check.
enum AgentHealth {
    Serving,
    /// It holds its limits.
    Refusing,
    /// It lets this user in never.
    Blocking,
    Other(ServingStatus),
    Unknown(CallError),
}

const REFUSED: &str = "Agent is up, and refuses this user for now: `durward limits` shows why.\n";
const BLOCKED: &str = "Agent is up, and its configuration blocks this user. Root sees which limit it is\n\
with `durward explain --pid PID`, of any process of this user.\n";

/// How often an agent that refuses is asked before that is believed.
const ATTEMPTS: u32 = 4;
/// The pause between; from then on twice as long each time, up to the longest.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// The longest that a gate takes to close what it refuses.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long the second frame may come behind the first that was sent with it.
const BEHIND: Duration = Duration::from_millis(100);

/// Asks until there is an answer. An agent that refuses is asked again, as its limits may let this user in a moment later; so is
/// one whose connections end otherwise, until the time is over: it may have let the user in when it was looked at, and not when
/// it was asked.
async fn observe(socket: &AgentSocket, limit: Option<Duration>, terminal: &mut Terminal) -> AgentHealth {
    // Whoever waits for ever means an answer, not a door that stays shut.
    let until = Instant::now() + limit.unwrap_or(WITHOUT_LIMIT);
    let (mut refusals, mut pause) = (0, PAUSE);
    loop {
        let left = limit.map(|_| until.saturating_duration_since(Instant::now()));
        let error = match ask(socket, left, terminal).await {
            Ok(ServingStatus::Serving) => return AgentHealth::Serving,
            Ok(other) => return AgentHealth::Other(other),
            Err(error) if error.is_blocked() => return AgentHealth::Blocking,
            Err(error) => error,
        };
        match seen(socket, &error).await {
            AgentDoor::Refuses => refusals += 1,
            AgentDoor::Open => {}
            // The time is over, in the middle of an attempt.
            AgentDoor::Shut if refusals > 0 && error.code() == Code::DeadlineExceeded => {
                return AgentHealth::Refusing;
            }
            AgentDoor::Shut => return AgentHealth::Unknown(error),
        }
        let is_late = Instant::now() + pause >= until;
        if refusals >= ATTEMPTS || (is_late && refusals > 0) {
            return AgentHealth::Refusing;
        }
        if is_late {
            return AgentHealth::Unknown(error);
        }
        tokio::time::sleep(pause).await;
        if refusals == 0 {
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// How long an agent is asked again that gives no answer, where no time limit is set.
const WITHOUT_LIMIT: Duration = Duration::from_secs(5);

/// What a call that failed says of the agent.
enum AgentDoor {
    /// It is there and holds its limits: it refused the call and said when to come back, or it takes connections and closes them
    /// at once, before it has said a word, or sets nothing in its SETTINGS, as for one that it is about to refuse.
    Refuses,
    /// It takes connections, and ended the one of the call.
    Open,
    /// It is gone, hangs, answers something else, or lets nobody in because it can identify nobody.
    Shut,
}

async fn seen(socket: &AgentSocket, error: &CallError) -> AgentDoor {
    if error.retry_after().is_some() {
        return AgentDoor::Refuses;
    }
    match error {
        CallError::Status { status, .. } if status.metadata().contains_key("grpc-retry-pushback-ms") => {
            AgentDoor::Refuses
        }
        // The queue of those who connect is full.
        CallError::Connect { cause, .. } if cause.kind() == io::ErrorKind::WouldBlock => AgentDoor::Open,
        CallError::Connect { .. } => AgentDoor::Shut,
        // It serves nobody who runs where this command does.
        CallError::Status { status, .. } if status.code() == Code::FailedPrecondition => AgentDoor::Shut,
        CallError::Status { status, .. } if status.code() == Code::DeadlineExceeded => AgentDoor::Shut,
        // The agent's own words, and none of when to come back.
        CallError::Status { status, .. } if status.source().is_none() => AgentDoor::Shut,
        CallError::Closed { .. } | CallError::Status { .. } => match knock(socket).await {
            Some(AgentDoor::Open) if matches!(error, CallError::Status { .. }) => AgentDoor::Shut,
            door => door.unwrap_or(AgentDoor::Shut),
        },
    }
}

/// How a connection fares on which nothing is asked; nothing where none can be made, or nothing happens to it.
async fn knock(socket: &AgentSocket) -> Option<AgentDoor> {
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    /// What every HTTP/2 client begins with (RFC 9113, section 3.4), and empty SETTINGS.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut stream = reach(socket).await.ok()?;
    let fares = async {
        // Closed already, perhaps: there may be something to read all the same.
        let _said = stream.write_all(HELLO).await.is_ok();
        let mut head = [0; 9];
        match stream.read_exact(&mut head).await {
            Ok(_) if head[..4] != [0, 0, 0, SETTINGS] => return AgentDoor::Open,
            Ok(_) => {}
            Err(_closed) => return AgentDoor::Refuses,
        }
        // What is said unasked comes with it.
        match tokio::time::timeout(BEHIND, stream.read_exact(&mut head)).await {
            Ok(Ok(_)) if head[3] == GOAWAY => AgentDoor::Shut,
            _ => AgentDoor::Refuses,
        }
    };
    tokio::time::timeout(AT_ONCE, fares).await.ok()
}

async fn ask(
    socket: &AgentSocket,
    limit: Option<Duration>,
    terminal: &mut Terminal,
) -> Result<ServingStatus, CallError> {
    patiently(terminal, socket, limit, async {
        let mut health = HealthClient::new(connect(socket).await?);
        let mut request = Request::new(HealthCheckRequest::default());
        if let Some(limit) = limit {
            request.set_timeout(limit);
        }
        match health.check(request).await {
            Ok(answer) => Ok(answer.into_inner().status()),
            Err(status) => Err(CallError::of(socket, status)),
        }
    })
    .await
}
