//! `healthcheck`: whether the agent serves, by grpc.health.v1 over its socket.
//!
//! Texts and exit codes are spire-agent's: 0 and `Agent is healthy.`, or 1 and the reason on stderr. What exactly
//! went wrong is said with `--verbose`.
//!
//! An agent that takes no connection of this user, or no call, is one that holds its limits: it is up, and whoever restarts it
//! for that takes identity away from the whole node. So that is 0 too, and said.

use std::time::Duration;

use tonic::{Code, Request};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Failure,
    client::{CallError, TimeoutArgs, connect, patiently},
    socket::{Socket, SocketArgs},
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
    #[error("unable to determine health")]
    Unknown,
    #[error("agent returned status \"{0}\"")]
    Status(&'static str),
}

/// Runs `healthcheck`.
pub(super) async fn check(args: &HealthArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    if args.verbose {
        terminal.print("Checking agent health...\n")?;
    }
    let socket = args.socket.resolve(super::environment)?;
    let mut asked = ask(&socket, args, terminal).await;
    for _ in 1..ATTEMPTS {
        if !asked.as_ref().is_err_and(is_refusal) {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        asked = ask(&socket, args, terminal).await;
    }
    match asked {
        Err(err) if is_refusal(&err) => {
            Ok(terminal.print("Agent is up, and refuses this user for now: see its limits.\n")?)
        }
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

/// How often an agent that refuses is asked before that is believed.
const ATTEMPTS: u32 = 4;
/// The pause between.
const PAUSE: Duration = Duration::from_millis(50);

/// Whether there is an agent that takes connections, and closes this one before a word was said, or refuses the call. One that is
/// gone refuses to be connected to, and one that hangs says nothing at all.
fn is_refusal(err: &CallError) -> bool {
    match err {
        CallError::Connect { .. } => false,
        CallError::Status { status, .. } => {
            let closed = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
                && std::error::Error::source(&**status).is_some();
            closed || status.code() == Code::ResourceExhausted
        }
    }
}

async fn ask(
    socket: &Socket,
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
