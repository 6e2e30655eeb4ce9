//! What a node must give an agent so that it can tell callers apart, looked at when it starts: each caller would find it out
//! anew, and nobody would say what to do about it. What may be short only for a while is looked at again.

use std::{fs, io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
    unistd::Pid,
};

use crate::{
    os::{namespace, pidfd::Pidfd},
    peer::cgroup::PodOrUid,
    telemetry::health::HealthState,
};

/// What is missing.
#[derive(Debug, thiserror::Error)]
enum Obstacle {
    /// No caller can be told from the next one that has its PID.
    #[error(
        "the kernel gives no pidfd, so no caller is served: Linux must be 5.3 or newer, a seccomp filter must allow pidfd_open, \
         and the node must have descriptors left ({0})"
    )]
    Pidfd(Errno),
    /// Callers of other users cannot be attested.
    #[error(
        "processes of other users are hidden (/proc is mounted with hidepid), so no other user is served: mount it with gid=, a \
         group of the agent's user, or without hidepid for this agent ({0})"
    )]
    HiddenProcesses(io::Error),
    /// Some users cannot be told apart.
    #[error(
        "the agent runs in a user namespace that does not map all users: the others are not served; run the agent outside \
         of it, or map them"
    )]
    UserNamespace,
}

impl Obstacle {
    /// Whether nobody, or nobody else than the agent's own user, is served.
    fn is_for_all(&self) -> bool {
        match self {
            Self::Pidfd(_) | Self::HiddenProcesses(_) => true,
            Self::UserNamespace => false,
        }
    }
}

/// Says once where the agent finds itself: whether callers are told by their pods, and how much memory it may use.
pub(super) fn say_where(keys: &PodOrUid, in_pod: bool, budget: Option<u64>, cgroup: Option<u64>) {
    let kubernetes = match (keys.looks_for_pods(), in_pod) {
        (true, true) => "found: the agent runs in a pod, and callers are told by their pods",
        (true, false) => "callers are told by their pods, as the configuration says",
        (false, true) => "found, and not looked at, as the configuration says",
        (false, false) => "not found: callers are told by their users",
    };
    let from = match budget {
        None => "nothing: neither the cgroup nor ratelimit.memory sets a limit",
        Some(_) if budget == cgroup => "the limit of the cgroup",
        Some(_) => "ratelimit.memory",
    };
    tracing::info!(kubernetes, budget, budget_from = from, "where the agent runs");
}

/// Says once what is missing, and keeps an agent that nobody could be served by from being ready. What it serves in spite of.
pub(super) fn look_around(health: &HealthState) -> Vec<String> {
    let mut served_in_spite_of = Vec::new();
    for lack in shortcomings() {
        if lack.is_for_all() {
            tracing::error!("{lack}");
            match lack {
                Obstacle::Pidfd(_) => health.identifies(false),
                _ => health.cannot_attest(),
            }
        } else {
            tracing::warn!("{lack}");
            served_in_spite_of.push(lack.to_string());
        }
    }
    served_in_spite_of
}

/// How often is looked whether there is a pidfd to be had, and after how many looks in vain nobody is served: callers may have
/// taken all descriptors for a moment.
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 5;

/// Looks for ever whether callers can be identified.
pub(super) async fn keep_looking(health: Arc<HealthState>) {
    // Made once: where descriptors are short it could not be made.
    let Ok((end, _other)) = UnixStream::pair() else { return };
    let mut every = tokio::time::interval(LOOK);
    let mut in_vain = if health.identifies_nobody() { LOOKS } else { 0 };
    loop {
        every.tick().await;
        match (pidfd_of_peer(&end), in_vain) {
            (Ok(()), 0) => {}
            (Ok(()), _) => {
                if in_vain >= LOOKS {
                    tracing::warn!("callers can be identified again");
                }
                in_vain = 0;
                health.identifies(true);
            }
            (Err(errno), _) => {
                in_vain = in_vain.saturating_add(1);
                if in_vain == LOOKS {
                    tracing::error!("{}", Obstacle::Pidfd(errno));
                    health.identifies(false);
                }
            }
        }
    }
}

/// Asks for a pidfd as it is done for callers: by the socket, on older kernels by the number.
fn pidfd_of_peer(end: &UnixStream) -> Result<(), Errno> {
    match getsockopt(end, sockopt::PeerPidfd).map(drop) {
        Err(Errno::ENOPROTOOPT) => Pidfd::open(Pid::this()).map(drop),
        asked => asked,
    }
}

/// All that is missing here.
fn shortcomings() -> Vec<Obstacle> {
    let pidfd = UnixStream::pair().ok().and_then(|(end, _other)| pidfd_of_peer(&end).err());
    let pidfd = pidfd.filter(|errno| !is_shortage(*errno)).map(Obstacle::Pidfd);
    // The first process is root's, or whose container it is.
    let hidden = fs::read("/proc/1/status")
        .err()
        .filter(|error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied));
    let partial = namespace::unmapped().map(|_| Obstacle::UserNamespace);
    pidfd.into_iter().chain(hidden.map(Obstacle::HiddenProcesses)).chain(partial).collect()
}

/// Descriptors or memory that are short pass.
fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}
