//! What a node must give an agent so that it can tell callers apart, looked at when it starts and every few seconds: each caller
//! would find it out anew, and nobody would say what to do about it.

use std::{fs, io, mem::Discriminant, os::unix::net::UnixStream, sync::Arc, time::Duration};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
    unistd::Pid,
};

use tokio::sync::watch;

use crate::{
    attest::Attestor,
    limits::budget::MemoryBudget,
    os::{
        clock::sleep_to_beat,
        namespace::{self, ProcFault},
        own_connection::{self, RefusedCall},
        pidfd::Pidfd,
    },
    peer::cgroup::PodOrUid,
    telemetry::health::{HealthState, Probe},
};

/// How often it is looked again: `/proc` may be mounted anew, or in another way, while the agent runs.
const LOOK: Duration = Duration::from_secs(5);
/// The same for a pidfd, and after how many looks in vain nobody is served: callers may have taken all descriptors for a moment.
const LOOK_FOR_PIDFD: Duration = Duration::from_secs(1);
const LOOKS: u32 = 5;

/// What is missing.
#[derive(Debug, thiserror::Error)]
enum Obstacle {
    /// No caller can be told from the next one that has its PID.
    #[error(
        "the kernel gives no pidfd, so no caller is served: Linux must be 5.3 or newer, a seccomp filter must allow pidfd_open, \
         and the node must have descriptors left ({0})"
    )]
    Pidfd(Errno),
    /// Nobody is accepted, heard or answered.
    #[error(
        "{0}, so no caller is served: a seccomp filter, AppArmor or SELinux keeps this process from it, and must allow it"
    )]
    Refused(RefusedCall),
    /// What is read of a caller is not its own.
    #[error(transparent)]
    Proc(ProcFault),
    /// Callers of other users cannot be attested.
    #[error(
        "processes of other users are hidden (/proc is mounted with hidepid), so no other user is served: mount it with gid=, a \
         group of the agent's user, or without hidepid for this agent ({0})"
    )]
    HiddenProcesses(io::Error),
    /// The same, where it is known all the same whose a process is: callers of other users are attested without what is in `/proc`.
    #[error(
        "processes of other users are hidden (/proc is mounted with hidepid), so what pods they are in is not known, and their \
         supplementary groups only in the first second of a connection: mount it with gid=, a group of the agent's user, or \
         without hidepid for this agent, if an entry asks for these ({0})"
    )]
    HiddenGroups(io::Error),
    /// Some users cannot be told apart.
    #[error(
        "the agent runs in a user namespace that does not map all users: the others are not served; run the agent outside \
         of it, or map them"
    )]
    UserNamespace,
    /// Who is outside has no PID here.
    #[error(
        "the agent runs in a PID namespace of its own: callers outside of it cannot be identified, and are refused; run the \
         agent in the host's (hostPID: true in its pod, --pid=host in its container), unless all its callers are in its own"
    )]
    PidNamespace,
    /// Callers in other pods have no PID here.
    #[error(
        "the agent runs in the PID namespace of its own container, so callers in other pods cannot be identified, and are \
         refused: its pod needs hostPID: true"
    )]
    PidNamespaceOfPod,
}

impl Obstacle {
    /// Whether nobody is served, whoever it is.
    fn is_for_all(&self) -> bool {
        match self {
            Self::Pidfd(_) | Self::Refused(_) | Self::Proc(_) => true,
            Self::HiddenProcesses(_)
            | Self::HiddenGroups(_)
            | Self::UserNamespace
            | Self::PidNamespace
            | Self::PidNamespaceOfPod => false,
        }
    }
}

/// Says once where the agent finds itself: whether callers are told by their pods, and how much memory it may use.
pub(super) fn say_where(keys: &PodOrUid, in_pod: bool, budget: MemoryBudget) {
    let kubernetes = match (keys.looks_for_pods(), in_pod) {
        (true, true) => "found: the agent runs in a pod, and a caller in a pod is its pod",
        (true, false) => "switched on by the configuration: a caller in a pod is its pod",
        (false, true) => "found, and switched off by the configuration: a caller is its user",
        (false, false) => "not found: a caller is its user",
    };
    let MemoryBudget { bytes, from } = budget;
    tracing::info!(kubernetes, budget = bytes, budget_from = from.text(), "where the agent runs");
}

/// Says once what is missing, and keeps an agent that nobody could be served by from being ready.
pub(super) fn look_around(health: &HealthState, attestor: &Attestor, for_pods: bool) -> Surroundings {
    let pidfd = UnixStream::pair().ok().and_then(|(end, _other)| pidfd_of_peer(&end).err());
    if let Some(errno) = pidfd.filter(|errno| !is_shortage(*errno)) {
        tracing::error!("{}", Obstacle::Pidfd(errno));
        health.identifies(false);
    }
    let (around, known) = (watch::Sender::default(), Vec::new());
    let mut surroundings = Surroundings { for_pods, known, around };
    surroundings.look(health, attestor);
    surroundings
}

/// What was found, and is said already.
pub(super) struct Surroundings {
    /// The agent is in a pod, and callers are in others.
    for_pods: bool,
    known: Vec<Discriminant<Obstacle>>,
    around: watch::Sender<Around>,
}

/// What keeps some callers from being served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    /// The processes of other users are hidden, so that these are not attested.
    pub(super) hides_others: bool,
    /// They are hidden, and attested as far as that goes without what is in `/proc`.
    pub(super) hides_groups: bool,
    /// Processes outside of the agent's PID namespace have no PID here.
    pub(super) has_strangers: bool,
    /// The PID namespace is that of the agent's own container, in a pod.
    pub(super) of_own_container: bool,
    /// All of it in words.
    pub(super) in_spite_of: Vec<String>,
}

impl Around {
    fn hides_any(&self) -> bool {
        self.hides_others || self.hides_groups
    }
}

impl Surroundings {
    /// Tells what is found from now on, and what was.
    pub(super) fn told(&self) -> watch::Receiver<Around> {
        self.around.subscribe()
    }

    /// Looks again, says what is missing that was not before, and tells `health`.
    pub(super) fn look(&mut self, health: &HealthState, attestor: &Attestor) {
        self.found(shortcomings(attestor, self.for_pods), health);
    }

    /// Says what is missing that was not before, and tells `health`.
    fn found(&mut self, lacks: Vec<Obstacle>, health: &HealthState) {
        let blind = lacks.iter().any(Obstacle::is_for_all);
        if !blind && health.tells_callers(true) {
            tracing::warn!("callers can be told apart again");
        }
        let before = std::mem::take(&mut self.known);
        let mut around = Around::default();
        for lack in lacks {
            let kind = std::mem::discriminant(&lack);
            self.known.push(kind);
            let is_for_all = lack.is_for_all();
            match (before.contains(&kind), is_for_all) {
                (false, true) => tracing::error!("{lack}"),
                (false, false) => tracing::warn!("{lack}"),
                (true, _) => {}
            }
            around.hides_others |= matches!(lack, Obstacle::HiddenProcesses(_));
            around.hides_groups |= matches!(lack, Obstacle::HiddenGroups(_));
            around.has_strangers |= matches!(lack, Obstacle::PidNamespace | Obstacle::PidNamespaceOfPod);
            around.of_own_container |= matches!(lack, Obstacle::PidNamespaceOfPod);
            around.in_spite_of.extend((!is_for_all).then(|| lack.to_string()));
        }
        if self.around.borrow().hides_any() && !around.hides_any() {
            tracing::warn!("the processes of other users are not hidden any more");
        }
        self.around.send_if_modified(|known| {
            let is_news = *known != around;
            *known = around;
            is_news
        });
        if blind {
            health.tells_callers(false);
        }
    }

    /// Looks again every few seconds, until the agent drains.
    pub(super) async fn keep_looking(mut self, health: Arc<HealthState>, attestor: Arc<Attestor>) {
        while health.get() != Probe::Draining {
            let attestor = Arc::clone(&attestor);
            // No thread, no answer: that is for the next look.
            let for_pods = self.for_pods;
            if let Ok(lacks) = tokio::task::spawn_blocking(move || shortcomings(&attestor, for_pods)).await {
                self.found(lacks, &health);
            }
            sleep_to_beat(LOOK).await;
        }
    }
}

/// Looks for ever whether callers can be identified.
pub(super) async fn keep_identifying(health: Arc<HealthState>) {
    // Made once: where descriptors are short it could not be made.
    let Ok((end, _other)) = UnixStream::pair() else { return };
    let mut in_vain = if health.identifies_nobody() { LOOKS } else { 0 };
    loop {
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
        sleep_to_beat(LOOK_FOR_PIDFD).await;
    }
}

/// Asks for a pidfd as it is done for callers: by the socket, on older kernels by the number.
fn pidfd_of_peer(end: &UnixStream) -> Result<(), Errno> {
    match getsockopt(end, sockopt::PeerPidfd).map(drop) {
        Err(Errno::ENOPROTOOPT) => Pidfd::open(Pid::this()).map(drop),
        asked => asked,
    }
}

/// Whether it is known whose processes call, though nothing in them can be read: a pidfd says it, or the directory in `/proc`, which
/// hidepid=1 shows. What could not be asked is no reason to say otherwise.
fn owners_are_known() -> bool {
    let Ok((end, _other)) = UnixStream::pair() else { return true };
    match getsockopt(&end, sockopt::PeerPidfd) {
        Ok(pidfd) => Pidfd::new(pidfd).owner() != Ok(None) || fs::metadata("/proc/1").is_ok(),
        // It is asked when a process started, which is in there.
        Err(errno) => errno != Errno::ENOPROTOOPT,
    }
}

/// What is missing here beside a pidfd.
fn shortcomings(attestor: &Attestor, for_pods: bool) -> Vec<Obstacle> {
    let proc = match attestor.look_at_proc() {
        Err(fault) => Some(Obstacle::Proc(fault)),
        // The first process is root's, or whose container it is.
        Ok(()) => fs::read("/proc/1/status")
            .err()
            .filter(|error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied))
            .map(if owners_are_known() { Obstacle::HiddenGroups } else { Obstacle::HiddenProcesses }),
    };
    let users = namespace::unmapped().map(|_| Obstacle::UserNamespace);
    // A node may be a container itself, as in kind: then its first process is no neighbour of the agent's.
    let processes = namespace::pid_namespace_is_inner().then(|| {
        if for_pods && namespace::first_process_is_in_own_cgroup() {
            Obstacle::PidNamespaceOfPod
        } else {
            Obstacle::PidNamespace
        }
    });
    let refused = own_connection::try_out().err().map(Obstacle::Refused);
    refused.into_iter().chain(proc).chain(users).chain(processes).collect()
}

/// Descriptors or memory that are short pass.
fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}
