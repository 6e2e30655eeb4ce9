//! The place of an agent: the files of the issuer, and the sockets where callers come. It is free, or the service manager
//! keeps a part of it, or the agent that runs leaves it ([`handover`](super::handover)).

use std::{os::unix::net::UnixListener, path::Path};

use anyhow::Context as _;
use nix::unistd::geteuid;

use super::{
    candidate::Candidate,
    handover::LeftSockets,
    predecessor::{self, Predecessor},
    successor::Keeper,
};
use crate::{
    config::{AdminSocket, Config},
    issuer::choice::OpenError,
    os::trusted::ClosedDir,
    peer::{
        Socket,
        socket::{BindError, Reach, VacantSocket},
    },
    telemetry::chain,
};

/// What an agent is given to start with.
#[derive(Debug)]
pub(super) enum Inherited {
    /// Nothing: it makes what it needs, or asks the agent that runs.
    Nothing,
    /// The socket that the service manager keeps for it.
    ByManager(UnixListener),
    /// What another agent has left.
    Left(LeftSockets),
}

/// The place of an agent: what it was given, or what the one that runs leaves to the candidate when it is asked. And what `open` opens
/// there: the issuer.
pub(super) fn take<T>(
    candidate: &mut Candidate<'_>,
    inherited: Inherited,
    open: impl Fn() -> Result<T, OpenError>,
) -> anyhow::Result<(T, Inherited, Option<Predecessor>)> {
    let config = candidate.config;
    let asks = config.agent.take_over && matches!(inherited, Inherited::Nothing);
    let (opened, asked) = match asks.then(|| predecessor::ask(candidate)).transpose()?.flatten() {
        None if asks => predecessor::open_or_ask(candidate, OpenError::is_locked, open)?,
        asked => (open(), asked),
    };
    let opened = opened.map_err(|error| no_issuer(config, error))?;
    Ok(match asked {
        Some((predecessor, left)) => (opened, Inherited::Left(left), Some(predecessor)),
        None => (opened, inherited, None),
    })
}

/// Another agent has the files of the issuer.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the issuer: {why}; {advice}")]
pub(super) struct PlaceTaken {
    why: String,
    advice: &'static str,
}

/// Why there is no issuer, and what to do where another agent has its files.
fn no_issuer(config: &Config, error: OpenError) -> anyhow::Error {
    let advice = match (error.is_locked(), config.agent.take_over) {
        (false, _) => return anyhow::Error::new(error).context("cannot open the issuer"),
        (true, false) => "end it first, or have it hand over: agent { take_over = true }",
        (true, true) => {
            "it does not hand over (an older version?): end it first (in Kubernetes: maxSurge: 0 and maxUnavailable: 1)"
        }
    };
    PlaceTaken { why: chain(&error), advice }.into()
}

/// Where the socket of the Workload API came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PublicFrom {
    Here,
    ServiceManager,
    /// Clients wait at it, who would be refused by an issuer that knows nothing yet.
    AnotherAgent,
}

impl PublicFrom {
    /// Whether clients may wait there already.
    pub(super) fn waits(self) -> bool {
        self == Self::AnotherAgent
    }

    /// Who keeps it.
    pub(super) fn keeper(self) -> Keeper {
        match self {
            Self::ServiceManager => Keeper::ServiceManager,
            Self::Here | Self::AnotherAgent => Keeper::Agent,
        }
    }
}

/// The sockets where callers come. Nobody is answered yet.
pub(super) struct Sockets {
    pub(super) admin: Option<Socket>,
    pub(super) public: Socket,
    pub(super) came: PublicFrom,
}

impl Sockets {
    /// Those of this configuration: what was inherited, and the others bound.
    pub(super) fn of(config: &Config, inherited: Inherited) -> anyhow::Result<Self> {
        let (handed, left, came) = match inherited {
            Inherited::Nothing => (None, LeftSockets::default(), PublicFrom::Here),
            Inherited::ByManager(listener) => {
                (Some(listener), LeftSockets::default(), PublicFrom::ServiceManager)
            }
            Inherited::Left(left) => (None, left, PublicFrom::AnotherAgent),
        };
        let admin = admin_socket(config, left.admin).context("cannot serve the admin api")?;
        // Last, since clients come as soon as it is there.
        let public = public_socket(config, handed, left.public).context("cannot serve the workload api")?;
        for ClosedDir { path, uid, mode, .. } in config.places(geteuid().as_raw()).closed {
            tracing::warn!(
                directory = %path.display(),
                owner = uid,
                mode = format!("{mode:04o}"),
                "other users cannot enter this directory, so they cannot reach the workload api"
            );
        }
        Ok(Self { admin, public, came })
    }
}

/// The admin socket, where there is one. One that nobody asked for is done without, if it cannot be had.
fn admin_socket(config: &Config, left: Option<VacantSocket>) -> Result<Option<Socket>, BindError> {
    let had = |path: &Path| had_or_bound(left, path, Reach::OwnUser);
    match config.agent.admin_socket() {
        None => Ok(None),
        Some(AdminSocket::Configured(path)) => had(&path).map(Some),
        Some(AdminSocket::ByDefault(path)) => Ok(had(&path)
            .inspect_err(|error| {
                tracing::warn!(
                    socket = %path.display(),
                    error = chain(error),
                    "admin socket: the default one cannot be made, so that durward status, limits, explain and reload do not \
                     reach this agent; set admin_socket_path, or admin_socket_enabled = false"
                );
            })
            .ok()),
    }
}

/// The socket that another agent has left at `path`, or a new one.
fn had_or_bound(left: Option<VacantSocket>, path: &Path, reach: Reach) -> Result<Socket, BindError> {
    if let Some(left) = left.filter(|left| left.path() == path) {
        match Socket::move_into(left, reach) {
            Err(error @ BindError::NotThere { .. }) => {
                tracing::warn!(
                    error = chain(&error),
                    "binding the socket anew: clients that wait at the old one are lost"
                );
            }
            had => return had,
        }
    }
    match reach {
        Reach::Everybody => Socket::bind(path, 0o777),
        Reach::OwnUser => Socket::bind_private(path),
    }
}

fn public_socket(
    config: &Config,
    handed: Option<UnixListener>,
    left: Option<VacantSocket>,
) -> anyhow::Result<Socket> {
    let Some(listener) = handed else {
        return Ok(had_or_bound(left, &config.agent.socket_path, Reach::Everybody)?);
    };
    let socket = Socket::adopt(listener)?;
    // Else everybody who reads the configuration would look for it in the wrong place.
    let at = socket.path().unwrap_or_default();
    anyhow::ensure!(
        at == config.agent.socket_path,
        "the service manager passed a socket at {}, but socket_path is {}: \
         make ListenStream= in the socket unit the same",
        at.display(),
        config.agent.socket_path.display()
    );
    Ok(socket)
}
