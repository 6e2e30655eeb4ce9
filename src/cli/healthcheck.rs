//! `healthcheck`: whether the agent serves, by grpc.health.v1 over its socket.
//!
//! Texts and exit codes are spire-agent's: 0 and `Agent is healthy.`, or 1 and the reason on stderr. What exactly
//! went wrong is said with `--verbose`.
//!
//! An agent that takes no connection of this user, or no call, is one that holds its limits: it is up, and whoever
//! restarts it for that takes identity away from the whole node. So that is 0 too, and said.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Request;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Failure,
    client::{CallError, TimeoutArgs, connect, patiently, reach},
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
    #[error("Agent is unhealthy: agent returned status \"{0}\"")]
    Status(&'static str),
}

/// Runs `healthcheck`.
pub(super) async fn check(args: &HealthArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    if args.verbose {
        terminal.print("Checking agent health...\n")?;
    }
    let socket = args.socket.resolve(super::environment)?;
    let mut asked = ask(&socket, args, terminal).await;
    let mut refused = is_refused(&socket, &asked).await;
    for _ in 1..ATTEMPTS {
        if !refused {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        asked = ask(&socket, args, terminal).await;
        refused = is_refused(&socket, &asked).await;
    }
    if refused {
        return Ok(terminal.print(REFUSED)?);
    }
    match asked {
        Ok(ServingStatus::Serving) => Ok(terminal.print("Agent is healthy.\n")?),
        Ok(other) => Err(Unhealthy::Status(other.as_str_name()).into()),
        Err(err) => {
            if args.verbose {
                terminal.note(format_args!("Failed to check health: {err}"));
                if let Some(advice) = err.advice() {
                    terminal.note(advice);
                }
            }
            Err(Unhealthy::Unknown.into())
        }
    }
}

/// From here the two look the same.
const REFUSED: &str = "Agent is up, and refuses this user for now: see its limits, and in its log whether this node lets it tell callers apart.\n";

/// How often an agent that refuses is asked before that is believed.
const ATTEMPTS: u32 = 4;
/// The pause between.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest that a gate takes to close what it refuses.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Whether the agent is there and holds its limits: it refused the call and said when to come back, or it takes
/// connections and closes them at once, before it has said a word, or sets nothing in its SETTINGS, as for one that it is
/// about to refuse. One that is gone refuses to be connected to, and
/// one that hangs closes nothing.
async fn is_refused(socket: &AgentSocket, asked: &Result<ServingStatus, CallError>) -> bool {
    match asked {
        Ok(_) => false,
        Err(CallError::Status { status, .. }) if status.metadata().contains_key("grpc-retry-pushback-ms") => {
            true
        }
        Err(_) => is_turned_away(socket).await,
    }
}

async fn is_turned_away(socket: &AgentSocket) -> bool {
    /// What every HTTP/2 client begins with (RFC 9113, section 3.4), and empty SETTINGS.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let Ok(mut stream) = reach(socket).await else { return false };
    let closed = async {
        // Closed already, perhaps: then there is nothing to read either.
        let _said = stream.write_all(HELLO).await.is_ok();
        // The length of the first frame, which is SETTINGS.
        let mut length = [0; 3];
        stream.read_exact(&mut length).await.is_err() || length == [0; 3]
    };
    tokio::time::timeout(AT_ONCE, closed).await.unwrap_or(false)
}

async fn ask(
    socket: &AgentSocket,
    args: &HealthArgs,
    terminal: &mut Terminal,
) -> Result<ServingStatus, CallError> {
    let mut health = HealthClient::new(connect(socket).await?);
    let mut request = Request::new(HealthCheckRequest::default());
    if let Some(limit) = args.timeout.limit() {
        request.set_timeout(limit);
    }
    patiently(terminal, socket, args.timeout.limit(), async { health.check(request).await })
        .await
        .map(|response| response.into_inner().status())
        .map_err(|status| CallError::Status { socket: socket.clone(), status: Box::new(status) })
}
