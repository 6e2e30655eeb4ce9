//! Who is at the other end of a connection, and whether they still are.
//!
//! Trusted: `SO_PEERCRED` and `SO_PEERPIDFD`, the kernel's record of who called `connect()`. Not trusted: the PID
//! by itself (it is reused), and that whoever writes to the socket is who connected (a child inherits it): hence
//! [`Peer::is_alive`] before every answer, and [`writer`](super::writer) at every byte. A [`Peer`] is made once, at
//! accept, with its caller key, and lives as long as its connection; there is no map of peers anywhere. A kernel whose
//! pidfds say whose a process is (6.13) is asked for nothing else; before that the owner of `/proc/PID` says it, which is
//! always the effective one, and before `SO_PEERPIDFD` (6.5) the start time in `/proc/PID/stat` stands in for it.
//!
//! # Decisions
//! A peer of another PID namespace (PID 0) is a [`Peer`] and not an error: spire-agent closes such a connection
//! without a word, and the admin learns nothing; here the API can answer with what to do.
//!
//! A process is who it was while its *effective* user and group are those of `connect()`: they are what the kernel
//! recorded then, what selectors are made of, and what it may do by. Its real and saved IDs are no sign: a daemon that
//! keeps a way back to root, and a program that is setuid, have others all along. One that switches its effective IDs
//! to and fro gets nothing while they are others', and is told to connect again.

use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
    unistd::{Gid, Pid, Uid},
};
use procfs::{ProcError, process::Process as ProcProcess};
use tokio::time::Instant;

use crate::{
    limits::{
        caller::{Caller, CallerKey, NthCall},
        holding::Holding,
    },
    os::{
        peer_groups::{ConnectedGroups, connected_groups},
        pidfd::{Owner, Pidfd},
    },
    peer::{
        given::GivenLately,
        pins::{AskedLater, EndedConnections},
        pod::PodPlace,
        slot::PeerSlot,
    },
};

/// What the kernel recorded when the peer called `connect()` (`SO_PEERCRED`), as seen from the agent's namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Its process; 0 when that process is in a PID namespace that the agent cannot see into.
    pub pid: Pid,
    /// Its effective user.
    pub uid: Uid,
    /// Its effective group.
    pub gid: Gid,
}

/// The process at the other end of a connection, with its caller key. Made once, at accept.
#[derive(Debug)]
pub struct Peer {
    credentials: Credentials,
    caller: CallerKey,
    place: Option<PodPlace>,
    process: Process,
    owner_from: OwnerFrom,
    /// It was seen as another user or group than it connected as.
    changed: AtomicBool,
    /// Its connection is to end.
    sent_away: AtomicBool,
    /// What its connection holds, once it was let in.
    holding: OnceLock<Arc<Holding>>,
    slot: PeerSlot,
    given: GivenLately,
    /// The supplementary groups that it connected with.
    groups: Option<ConnectedGroups>,
    since: Instant,
    /// A call of it was answered with what it is to blame for.
    in_vain: AtomicBool,
}

/// Where it is asked whose a process is now, if the kernel gave its pidfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnerFrom {
    /// The pidfd, or what stands in for it where that cannot say.
    Pidfd,
    /// `/proc/PID`, on any kernel.
    Proc,
}

/// How the agent holds on to the process.
#[derive(Debug)]
pub enum Process {
    /// The kernel gave the pidfd of whoever connected (Linux 6.5): it cannot be another's.
    PeerPidfd(Pidfd),
    /// Older kernels: the process that had the PID at accept, and when that one started. A PID that was reused
    /// between `connect()` and accept by a process of the same user cannot be noticed.
    OpenedPidfd {
        /// Opened by PID, at accept.
        pidfd: Pidfd,
        /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
        start_time: u64,
    },
    /// In a PID namespace that the agent cannot see into: nothing can be found out about it.
    OutOfNamespace,
}

/// Why a connection has no [`Peer`]: it is closed and counted.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The socket does not say who is there.
    #[error("cannot read {option} of an accepted connection")]
    Unreadable {
        /// What was asked for.
        option: &'static str,
        source: Errno,
    },
    /// The process ended before it was accepted.
    #[error("process {pid} ended before its connection was accepted")]
    Gone { pid: Pid },
    /// No pidfd: without descriptors left, or Linux before 5.3.
    #[error("cannot open a pidfd of process {pid}")]
    Pidfd { pid: Pid, source: Errno },
    /// Fallback for older kernels: `/proc/PID/stat` does not tell the start time.
    #[error("cannot read the start time of process {pid}")]
    StartTime {
        pid: Pid,
        /// What /proc answered.
        source: ProcError,
    },
}

impl CredentialsError {
    /// Whether the agent, or the node, has no descriptors left: accepting more is no use for a while.
    pub fn out_of_descriptors(&self) -> bool {
        match self {
            Self::Unreadable { source, .. } | Self::Pidfd { source, .. } => {
                matches!(source, Errno::EMFILE | Errno::ENFILE)
            }
            Self::Gone { .. } => false,
            Self::StartTime { source: ProcError::Io(source, _), .. } => {
                matches!(source.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE))
            }
            Self::StartTime { .. } => false,
        }
    }
}

/// Why nothing may be answered to a peer any more.
#[derive(Debug, thiserror::Error)]
pub enum PeerGone {
    /// It ended; somebody else holds its socket.
    #[error("the process that opened the connection has exited")]
    Exited,
    /// It changed its user or group after it connected.
    #[error("the process that opened the connection changed its user or group (it connected as {uid}:{gid})")]
    CredentialsChanged {
        /// Its effective UID at `connect()`.
        uid: Uid,
        /// Its effective GID at `connect()`.
        gid: Gid,
    },
    /// Fallback for older kernels: another process has its PID.
    #[error("PID {pid} belongs to another process now")]
    Replaced { pid: Pid },
    /// It cannot be seen at all.
    #[error(
        "the caller is in another PID namespace, so the agent cannot see its process: run the agent in the host's \
         PID namespace (in Kubernetes: hostPID: true), or in the caller's"
    )]
    OutOfNamespace,
    /// The kernel did not say: taken for gone.
    #[error("cannot tell whether the process that opened the connection lives")]
    Unknown { source: io::Error },
}

/// Finds out whom a connection is charged to. Asked exactly once per connection, at accept.
pub trait KeyResolver: Send + Sync {
    /// The key where the credentials alone decide it. A connection that is refused then costs no pidfd.
    fn key_of_user(&self, credentials: &Credentials) -> Option<CallerKey>;

    /// Where they do not, the pod: it is the key, and the OS UID where there is none. Must answer fast: it runs in the accept loop.
    /// What was read under /proc counts only if the process lives afterwards, which who asks finds out.
    ///
    /// # Errors
    /// [`PlaceUnread`]: every doubt.
    fn place_of_process(&self, credentials: &Credentials) -> Result<Option<PodPlace>, PlaceUnread>;
}

/// Nothing can be read of a process: most likely it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceUnread;

/// Charges the user: what holds where there is no Kubernetes. Opens nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsUid;

impl KeyResolver for OsUid {
    fn key_of_user(&self, credentials: &Credentials) -> Option<CallerKey> {
        Some(CallerKey::Uid(credentials.uid.as_raw()))
    }

    fn place_of_process(&self, _credentials: &Credentials) -> Result<Option<PodPlace>, PlaceUnread> {
        Ok(None)
    }
}

/// Who stands at the door: what the gate decides with. Becomes a [`Peer`] once let in.
///
/// Where the user alone says whom to charge, the kernel has not been asked for a pidfd yet: it is most of
/// what a refused connection would cost.
#[derive(Debug)]
pub struct Arrival {
    credentials: Credentials,
    caller: CallerKey,
    place: Option<PodPlace>,
    /// `None` until it is let in, where the key did not need it.
    process: Option<Process>,
    asked: AskedAfter,
}

/// Whether a process was asked after to find out whom to charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AskedAfter {
    /// There was no need.
    Needless,
    /// It might not be.
    MightNot,
    /// What was read is its own if it lives.
    Read,
}

impl Arrival {
    /// Asks the kernel who is at the other end of `stream`, and `keys` whom to charge for it.
    ///
    /// # Errors
    /// [`CredentialsError`] when it does not say, or when the key is the process's and it has ended: the
    /// connection must be closed.
    pub fn at(stream: &impl AsFd, keys: &dyn KeyResolver) -> Result<Self, CredentialsError> {
        Self::asking(stream, keys, |_user| true)
    }

    /// The same, where the process is not asked after unless it `may_be`: of whom that is not so, the user is charged.
    ///
    /// # Errors
    /// As [`Self::at`].
    pub(super) fn asking(
        stream: &impl AsFd,
        keys: &dyn KeyResolver,
        may_be: impl FnOnce(CallerKey) -> bool,
    ) -> Result<Self, CredentialsError> {
        let credentials = Credentials::of(stream)?;
        let user = CallerKey::Uid(credentials.uid.as_raw());
        let of_user = |caller, asked| Self { credentials, caller, place: None, process: None, asked };
        if let Some(caller) = keys.key_of_user(&credentials) {
            return Ok(of_user(caller, AskedAfter::Needless));
        }
        if !may_be(user) {
            return Ok(of_user(user, AskedAfter::MightNot));
        }
        // The kernel makes no name of one that is refused: its pidfd says later whether what is read now is its own.
        let mut process = None;
        let mut read = Err(PlaceUnread);
        if peer_pidfd_is_of_the_peer() {
            read = keys.place_of_process(&credentials);
        }
        if read.is_err() {
            let held = process.insert(Process::of(stream, &credentials)?);
            read = keys.place_of_process(&credentials);
            // Whose it was cannot be found out any more, and nothing may be answered to it. Charged to its user
            // it would let a pod spend what the user of that number on the node has.
            if held.has_exited() {
                return Err(CredentialsError::Gone { pid: credentials.pid });
            }
        }
        let place = read.unwrap_or_default();
        let caller = place.map_or(user, |place| CallerKey::Pod(place.pod));
        Ok(Self { credentials, caller, place, process, asked: AskedAfter::Read })
    }

    /// Whether something was read of the process, of which the kernel made [names](crate::limits::names), before it was let in.
    pub fn is_shown(&self) -> bool {
        self.asked == AskedAfter::Read
    }

    /// Whether whom to charge is not known, as its process might not be asked after: it can only be refused.
    pub(super) fn is_unknown(&self) -> bool {
        self.asked == AskedAfter::MightNot
    }

    /// Whom the connection is charged to.
    pub fn caller(&self) -> CallerKey {
        self.caller
    }

    /// What the kernel recorded when it connected.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Whether it holds on to the process already: a descriptor.
    pub(super) fn holds_process(&self) -> bool {
        self.process.is_some()
    }

    /// Holds on to the process now, and not only when it is let in: where [`peer_pidfd_is_of_the_peer`] is not so.
    ///
    /// # Errors
    /// [`CredentialsError`] when there is nothing to hold on to.
    pub(super) fn hold(&mut self, stream: &impl AsFd) -> Result<(), CredentialsError> {
        if self.process.is_none() {
            self.process = Some(Process::of(stream, &self.credentials)?);
        }
        Ok(())
    }

    /// Holds on to it no longer, where the kernel can be asked for the same process again: whoever waits takes one descriptor and
    /// not two. What was read of the process stays true, as it lived when that had been read.
    pub(super) fn let_go(&mut self) {
        if peer_pidfd_is_of_the_peer() {
            self.process = None;
        }
    }

    /// Holds on to the process: the connection was let in.
    ///
    /// # Errors
    /// [`CredentialsError`] when there is nothing to hold on to: the connection must be closed.
    pub fn let_in(self, stream: &impl AsFd) -> Result<Peer, CredentialsError> {
        let Self { credentials, caller, place, process, asked } = self;
        let process = match process {
            Some(process) => process,
            None => Process::of(stream, &credentials)?,
        };
        if asked == AskedAfter::Read && process.has_exited() {
            return Err(CredentialsError::Gone { pid: credentials.pid });
        }
        Ok(Peer { place, groups: connected_groups(stream), ..Peer::new(credentials, caller, process) })
    }

    /// The same, and where there is nothing to hold on to, without: for a gate that [goes by the
    /// user](super::AcceptGate::goes_by_user).
    pub(super) fn let_in_by_user(self, stream: &impl AsFd) -> Peer {
        let Self { credentials, caller, place, process, .. } = self;
        let process =
            process.or_else(|| Process::of(stream, &credentials).ok()).unwrap_or(Process::OutOfNamespace);
        Peer { place, groups: connected_groups(stream), ..Peer::new(credentials, caller, process) }
    }
}

impl Peer {
    fn new(credentials: Credentials, caller: CallerKey, process: Process) -> Self {
        Self {
            credentials,
            caller,
            place: None,
            process,
            owner_from: OwnerFrom::Pidfd,
            changed: AtomicBool::new(false),
            sent_away: AtomicBool::new(false),
            holding: OnceLock::new(),
            slot: PeerSlot::default(),
            given: GivenLately::default(),
            groups: None,
            since: Instant::now(),
            in_vain: AtomicBool::new(false),
        }
    }

    /// Asks the kernel who is at the other end of `stream`, without asking a gate.
    ///
    /// # Errors
    /// [`CredentialsError`] when it does not say: the connection must be closed.
    pub fn from_stream(stream: &impl AsFd, keys: &dyn KeyResolver) -> Result<Self, CredentialsError> {
        Arrival::at(stream, keys)?.let_in(stream)
    }

    /// [`Self::from_stream`] as it is on kernels without `SO_PEERPIDFD`, on any kernel: for tests of that path.
    ///
    /// # Errors
    /// As [`Self::from_stream`].
    pub fn from_stream_by_pid(stream: &impl AsFd, keys: &dyn KeyResolver) -> Result<Self, CredentialsError> {
        let mut arrival = Arrival::at(stream, keys)?;
        if arrival.credentials.pid.as_raw() != 0 {
            arrival.process = Some(Process::by_pid(arrival.credentials.pid)?);
        }
        arrival.let_in(stream)
    }

    /// [`Self::from_stream`] as it is on kernels whose pidfds do not say whose a process is, on any kernel: for tests
    /// of that path.
    ///
    /// # Errors
    /// As [`Self::from_stream`].
    pub fn from_stream_by_proc(stream: &impl AsFd, keys: &dyn KeyResolver) -> Result<Self, CredentialsError> {
        let peer = Self::from_stream(stream, keys)?;
        Ok(Self { owner_from: OwnerFrom::Proc, ..peer })
    }

    /// A peer with this user and group that the agent cannot see: what a caller of another PID namespace is.
    /// For tests.
    pub fn out_of_namespace(uid: Uid, gid: Gid) -> Self {
        let credentials = Credentials { pid: Pid::from_raw(0), uid, gid };
        let caller = CallerKey::Uid(uid.as_raw());
        Self::new(credentials, caller, Process::OutOfNamespace)
    }

    /// Its PID when it connected; 0 when it is in another PID namespace. Worth something only while
    /// [`Self::is_alive`].
    pub fn pid(&self) -> Pid {
        self.credentials.pid
    }

    /// Its effective user when it connected.
    pub fn uid(&self) -> Uid {
        self.credentials.uid
    }

    /// Its effective group when it connected.
    pub fn gid(&self) -> Gid {
        self.credentials.gid
    }

    /// Whom its calls are charged to.
    pub fn caller(&self) -> CallerKey {
        self.caller
    }

    /// The pod that it was in when it connected, and the container: no process leaves these by itself. `None` outside of
    /// pods, and where they are not looked for.
    pub fn place(&self) -> Option<PodPlace> {
        self.place
    }

    /// The supplementary groups that it had when it connected, where the kernel says. It may have changed them since.
    pub fn connected_with_groups(&self) -> Option<&ConnectedGroups> {
        self.groups.as_ref()
    }

    /// When it was let in.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// A call of it fails by its own doing: the answer is no work to conserve, whatever its code.
    pub fn asked_in_vain(&self) {
        self.in_vain.store(true, Relaxed);
    }

    /// Whether one did, since this was last asked.
    pub fn has_asked_in_vain(&self) -> bool {
        self.in_vain.load(Relaxed) && self.in_vain.swap(false, Relaxed)
    }

    /// How the agent holds on to it.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where the attestor keeps what it found out the last time.
    pub(crate) fn slot(&self) -> &PeerSlot {
        &self.slot
    }

    /// Whether something of which this is a fingerprint is given on this connection for the first time, as far as is
    /// remembered. Remembers it.
    pub(crate) fn is_first_given(&self, fingerprint: u64) -> bool {
        self.given.is_first(fingerprint)
    }

    /// Whether the process that connected still runs, as the same user and group. To be asked once per call, after
    /// everything that was read about the process: if it still lives then, all that was read was its own. A zombie
    /// is not alive. Takes about a microsecond, and some more before Linux 6.13.
    ///
    /// # Errors
    /// [`PeerGone`]: the call must get nothing.
    pub fn is_alive(&self) -> Result<(), PeerGone> {
        let Credentials { pid, uid, gid } = self.credentials;
        let owner = match &self.process {
            Process::OutOfNamespace => return Err(PeerGone::OutOfNamespace),
            Process::PeerPidfd(pidfd) => {
                runs(pidfd)?;
                let told = match self.owner_from {
                    OwnerFrom::Pidfd => pidfd.owner(),
                    OwnerFrom::Proc => Ok(None),
                };
                match told {
                    Ok(Some(owner)) => owner,
                    Ok(None) => {
                        self.is_read();
                        owner_by_proc(pid, pidfd)?
                    }
                    Err(Errno::ESRCH) => return Err(PeerGone::Exited),
                    Err(errno) => return Err(PeerGone::Unknown { source: errno.into() }),
                }
            }
            Process::OpenedPidfd { pidfd, start_time } => {
                self.is_read();
                let now = start_time_of(pid);
                let owner = owner_by_proc(pid, pidfd)?;
                match now {
                    Ok(now) if now != *start_time => return Err(PeerGone::Replaced { pid }),
                    Ok(_) => owner,
                    Err(err) => return Err(PeerGone::Unknown { source: io::Error::other(err) }),
                }
            }
        };
        if owner == (Owner { uid, gid }) {
            return Ok(());
        }
        self.changed.store(true, Relaxed);
        Err(PeerGone::CredentialsChanged { uid, gid })
    }

    /// Whether [`Self::is_alive`] has ever found it to be another user or group: its connection has to end then, since
    /// nothing is answered on it but that.
    pub(super) fn has_changed(&self) -> bool {
        self.changed.load(Relaxed)
    }

    /// What its connection holds, which is said there. The first word counts.
    pub(super) fn holds(&self, holding: &Arc<Holding>) {
        let _first = self.holding.set(Arc::clone(holding)).is_ok();
    }

    /// What its connection holds, once that is known.
    pub fn holding(&self) -> Option<&Arc<Holding>> {
        self.holding.get()
    }

    /// Something of its process is read in `/proc`, of which the kernel makes [names](crate::limits::names).
    pub(crate) fn is_read(&self) {
        if let Some(holding) = self.holding() {
            holding.reads_process(self.pid().as_raw());
        }
    }

    /// Its connection is to end. The streams that rest on it have to be woken for it.
    pub(super) fn send_away(&self) {
        self.sent_away.store(true, Relaxed);
    }

    /// Whether its connection is to end: a stream on it ends then, and the peer opens it again on another. The answer
    /// to a stream is polled when this changes.
    pub fn is_sent_away(&self) -> bool {
        self.sent_away.load(Relaxed)
    }

    /// How to find out, once its connection has ended, whether somebody holds what the kernel made of the process for it.
    pub(super) fn asked_later(&self, ended: &Arc<EndedConnections>) -> Option<AskedLater> {
        let Process::PeerPidfd(pidfd) = &self.process else { return None };
        let (ended, pidfd) = (Arc::clone(ended), pidfd.descriptor());
        Some(AskedLater { ended, pidfd, pid: self.pid(), caller: self.caller })
    }

    /// Waits until the process has ended; for ever when the agent cannot see it. Watching costs an epoll
    /// registration, made at the first call: a connection that is used once never pays for it.
    pub async fn exited(&self) {
        let pidfd = match &self.process {
            Process::PeerPidfd(pidfd) | Process::OpenedPidfd { pidfd, .. } => pidfd,
            Process::OutOfNamespace => return std::future::pending().await,
        };
        pidfd.exited().await;
    }
}

impl Caller for Peer {
    fn caller_key(&self) -> CallerKey {
        self.caller
    }

    fn is_above_share(&self) -> bool {
        self.holding.get().is_some_and(|holding| holding.is_above_share())
    }

    fn begins_call(&self) -> NthCall {
        self.holding.get().map_or(NthCall::Further, |holding| holding.begins_call())
    }
}

impl Credentials {
    fn of(stream: &impl AsFd) -> Result<Self, CredentialsError> {
        let creds = getsockopt(stream, sockopt::PeerCredentials)
            .map_err(|source| CredentialsError::Unreadable { option: "SO_PEERCRED", source })?;
        Ok(Self {
            pid: Pid::from_raw(creds.pid()),
            uid: Uid::from_raw(creds.uid()),
            gid: Gid::from_raw(creds.gid()),
        })
    }
}

impl Process {
    /// The process at the other end of `stream`.
    fn of(stream: &impl AsFd, credentials: &Credentials) -> Result<Self, CredentialsError> {
        let pid = credentials.pid;
        if pid.as_raw() == 0 {
            return Ok(Self::OutOfNamespace);
        }
        match getsockopt(stream, sockopt::PeerPidfd) {
            Ok(fd) => Ok(Self::PeerPidfd(Pidfd::new(fd))),
            Err(Errno::ENOPROTOOPT) => Self::by_pid(pid),
            // Before 6.16 the kernel makes no pidfd for a process that was reaped.
            Err(Errno::EINVAL | Errno::ESRCH) => Err(CredentialsError::Gone { pid }),
            Err(source) => Err(CredentialsError::Unreadable { option: "SO_PEERPIDFD", source }),
        }
    }

    /// The process that has this PID now.
    fn by_pid(pid: Pid) -> Result<Self, CredentialsError> {
        let pidfd = match Pidfd::open(pid) {
            Ok(pidfd) => pidfd,
            Err(Errno::ESRCH) => return Err(CredentialsError::Gone { pid }),
            Err(source) => return Err(CredentialsError::Pidfd { pid, source }),
        };
        let start_time = start_time_of(pid);
        if pidfd.has_exited() {
            return Err(CredentialsError::Gone { pid });
        }
        match start_time {
            Ok(start_time) => Ok(Self::OpenedPidfd { pidfd, start_time }),
            Err(source) => Err(CredentialsError::StartTime { pid, source }),
        }
    }

    /// Whether it has ended, as a zombie too. `true` when it cannot be seen.
    pub fn has_exited(&self) -> bool {
        match self {
            Self::PeerPidfd(pidfd) | Self::OpenedPidfd { pidfd, .. } => pidfd.has_exited(),
            Self::OutOfNamespace => true,
        }
    }
}

/// Whether the kernel gives the pidfd of who connected, however late it is asked (Linux 6.5). Elsewhere it is that of whoever
/// has the number by then.
pub(super) fn peer_pidfd_is_of_the_peer() -> bool {
    static IS: LazyLock<bool> = LazyLock::new(|| {
        let asked = UnixStream::pair().map(|(one, _other)| getsockopt(&one, sockopt::PeerPidfd).map(drop));
        matches!(asked, Ok(Ok(())))
    });
    *IS
}

fn runs(pidfd: &Pidfd) -> Result<(), PeerGone> {
    match pidfd.poll_exited() {
        Ok(false) => Ok(()),
        Ok(true) => Err(PeerGone::Exited),
        Err(errno) => Err(PeerGone::Unknown { source: errno.into() }),
    }
}

/// Whose the process of `pidfd` is, which has the number `pid` while it lives.
fn owner_by_proc(pid: Pid, pidfd: &Pidfd) -> Result<Owner, PeerGone> {
    let dir = fs::metadata(format!("/proc/{pid}"));
    // AskedAfter last: it lives now, so what was read before was read of it.
    runs(pidfd)?;
    let dir = dir.map_err(|source| PeerGone::Unknown { source })?;
    Ok(Owner { uid: Uid::from_raw(dir.uid()), gid: Gid::from_raw(dir.gid()) })
}

fn start_time_of(pid: Pid) -> Result<u64, ProcError> {
    Ok(ProcProcess::new(pid.as_raw())?.stat()?.starttime)
}
