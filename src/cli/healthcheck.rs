//! `healthcheck`: whether the agent serves, by grpc.health.v1 over its socket.
//!
//! Texts and exit codes are spire-agent's: 0 and `Agent is healthy.`, or 1 and the reason on stderr. What exactly
//! went wrong is said with `--verbose`.

use tonic::Request;
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
    match ask(&socket, args, terminal).await {
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
