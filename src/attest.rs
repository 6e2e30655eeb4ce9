//! From an admitted peer to its selectors.
//!
//! [`Attestor::attest`] takes nothing but an [`Admitted`] peer, so that no call reads `/proc` before its caller was
//! charged. Everything is read as [`unix`] says, and the pidfd is asked last: only then is what was read believed.
//!
//! A connection that calls often does not pay for all of it each time: its last result is kept with the peer and
//! used for one second, and only if the process lives, is of the same user and group, and executes the same file
//! (asked anew for every call). What could change unseen within that second is the list of supplementary groups: a
//! process needs `CAP_SETGID` to change it, and one second is what a stream that was just opened has anyway. Where
//! the kernel does not say whose a process is (before Linux 6.13), nothing is kept.
//!
//! # Decisions
//! SPIRE drops the selectors of an attestor that fails and goes on with the rest, so that a passing trouble ends as
//! `PermissionDenied` or as a wrong identity. Here any failure is an [`AttestError`], and the call `Unavailable`.

mod digest;
pub mod inspect;
mod names;
pub mod status;
pub mod unix;

use std::{
    fs::File,
    io,
    ops::Deref,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use nix::unistd::{Gid, Pid, Uid};
use tokio::time::Instant;

use self::{
    digest::{DigestError, Digests},
    names::Names,
    unix::{Limit, ProcDir, Settings},
};
use crate::{
    identity::selector::Selectors,
    limits::{Admitted, CallerKey},
    os::pidfd::{Owner, Pidfd},
    peer::{
        Peer, PeerGone,
        attested::{Executable, LastAttested, LastResult, Stamp},
    },
    telemetry::metrics::{AttestFault, AttestorName, Metrics},
};

/// How long a connection's last result may be used.
const REUSE: Duration = Duration::from_secs(1);
/// A result with more selectors is not kept: what stays with an open connection must be small.
const KEPT_SELECTORS: usize = 64;

/// Why a peer could not be attested. None of these means that it has no identity.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The process has ended: whoever holds its socket now is another.
    #[error("the process that opened the connection has exited")]
    Gone,
    /// The process is another user's or group's than it was when it connected.
    #[error(
        "process {pid} changed its user or group after it connected as {uid}:{gid}: it must connect again"
    )]
    IdentityChanged {
        /// Its PID.
        pid: Pid,
        /// Its effective user when it connected.
        uid: Uid,
        /// Its effective group then.
        gid: Gid,
    },
    /// The kernel does not say whether the process lives.
    #[error("cannot tell whether the process that opened the connection lives")]
    Unknown {
        /// Why.
        source: io::Error,
    },
    /// The process cannot be seen.
    #[error(
        "the caller is in another PID namespace, so the agent cannot see its process: run the agent in the host's \
         PID namespace (in Kubernetes: hostPID: true), or in the caller's"
    )]
    OtherPidNamespace,
    /// The executable is larger than `workload_size_limit`. The text is SPIRE's.
    #[error("SHA256 digest: workload {} exceeds size limit ({size} > {limit})", path.display())]
    TooLarge {
        /// Where the agent sees it.
        path: PathBuf,
        /// Its size in bytes, or how many were read of one that grew.
        size: u64,
        /// `workload_size_limit`.
        limit: u64,
    },
    /// The process has more supplementary groups than are attested.
    #[error("the caller has more than {limit} supplementary groups")]
    TooManyGroups {
        /// As many may be.
        limit: usize,
    },
    /// The executable was replaced or written while it was attested.
    #[error("{} changed while it was attested", path.display())]
    Changed {
        /// Where the agent sees it.
        path: PathBuf,
    },
    /// Too many executables wait to be hashed, of this user or of all.
    #[error("too many executables wait to be hashed")]
    Busy,
    /// Hashing the executable took too long.
    #[error("hashing {} took too long", path.display())]
    Late {
        /// Where the agent sees it.
        path: PathBuf,
    },
    /// The user database does not answer, and there are entries that ask for names.
    #[error("the user database does not say what the caller's user or one of its groups is called")]
    NoNames,
    /// Something under `/proc` could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something under `/proc` is not as the kernel writes it.
    #[error("cannot understand {}: {why}", path.display())]
    Malformed {
        /// What.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The caller's: counted, and logged at `debug`.
    Refusal,
    /// Ours or the node's: an admin should know.
    Fault,
}

impl AttestError {
    /// Whose doing it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Gone
            | Self::IdentityChanged { .. }
            | Self::TooLarge { .. }
            | Self::TooManyGroups { .. }
            | Self::Changed { .. }
            | Self::Busy
            | Self::Late { .. } => Blame::Refusal,
            Self::OtherPidNamespace
            | Self::Unknown { .. }
            | Self::NoNames
            | Self::Read { .. }
            | Self::Malformed { .. } => Blame::Fault,
        }
    }

    /// Whether others are in the way, or the file is only large: no more of the caller's doing than that it asked, and no reason
    /// to charge it more.
    pub fn is_crowded(&self) -> bool {
        matches!(self, Self::Busy | Self::Late { .. })
    }

    /// Its metric label.
    fn reason(&self) -> AttestFault {
        match self {
            Self::Gone | Self::IdentityChanged { .. } | Self::Unknown { .. } => AttestFault::Gone,
            Self::OtherPidNamespace => AttestFault::Namespace,
            Self::Busy | Self::Late { .. } | Self::NoNames => AttestFault::Busy,
            Self::TooLarge { .. }
            | Self::TooManyGroups { .. }
            | Self::Changed { .. }
            | Self::Read { .. }
            | Self::Malformed { .. } => AttestFault::Unreadable,
        }
    }

    fn no_digest(err: DigestError, path: PathBuf, limit: Limit) -> Self {
        match err {
            DigestError::Busy => Self::Busy,
            DigestError::TooLarge { size } => {
                Self::TooLarge { path, size, limit: limit.0.unwrap_or(u64::MAX) }
            }
            DigestError::Changed => Self::Changed { path },
            DigestError::Late => Self::Late { path },
            DigestError::Read(source) => Self::Read { path, source: io::Error::new(source.kind(), source) },
        }
    }
}

/// What was attested of a process: whose identities are asked for. Only the attestor makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject(Arc<Selectors>);

impl Deref for Subject {
    type Target = Selectors;

    fn deref(&self) -> &Selectors {
        &self.0
    }
}

/// A call whose caller was admitted and attested.
#[derive(Debug)]
pub struct Attested {
    admitted: Admitted<Arc<Peer>>,
    subject: Subject,
}

impl Attested {
    /// The caller.
    pub fn peer(&self) -> &Arc<Peer> {
        self.admitted.peer()
    }

    /// What was attested of it.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The admission, and what was attested.
    pub fn into_parts(self) -> (Admitted<Arc<Peer>>, Subject) {
        (self.admitted, self.subject)
    }
}

/// Finds out who peers are.
pub struct Attestor {
    proc_root: PathBuf,
    /// Only [`Attestor::reload`] writes.
    configured: ArcSwap<Configured>,
    names: Names,
    /// Whether an attestation without a name that there may be is a failed one.
    names_count: AtomicBool,
    digests: Digests,
    /// Whether [`Process::is_alive`] sees a change of user or group.
    kernel_tells_owner: bool,
    metrics: Option<Arc<Metrics>>,
}

struct Configured {
    /// Counts reloads: a result kept with a peer is of one generation.
    generation: u64,
    settings: Settings,
}

/// What attestation needs of a peer.
trait Process: Sync {
    fn pid(&self) -> Pid;
    /// Its owner when it connected.
    fn owner(&self) -> Owner;
    /// Whose share of the hashing it takes.
    fn caller(&self) -> CallerKey;
    /// That it still lives, and is of the same owner where the kernel tells.
    fn is_alive(&self) -> Result<(), AttestError>;
    fn last_attested(&self) -> &LastAttested;
}

impl Attestor {
    /// An attestor that reads `/proc`.
    pub fn new(settings: Settings) -> Self {
        Self::reading("/proc", settings)
    }

    /// An attestor that reads another proc file system than `/proc`: the host's, mounted elsewhere.
    pub fn reading(proc_root: impl Into<PathBuf>, settings: Settings) -> Self {
        Self {
            proc_root: proc_root.into(),
            configured: ArcSwap::from_pointee(Configured { generation: 0, settings }),
            names: Names::of_system(),
            names_count: AtomicBool::new(true),
            digests: Digests::default(),
            kernel_tells_owner: kernel_tells_owner(),
            metrics: None,
        }
    }

    /// Counts attestations and their failures there.
    #[must_use]
    pub fn counted_by(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// Attests with other settings from the next call on; nothing that was found out with the old ones is used.
    pub fn reload(&self, settings: Settings) {
        self.configured.rcu(|old| Configured { generation: old.generation + 1, settings });
    }

    /// Says whether any entry asks for the name of a user or group ([`unix::needs_name`]). If so (as at the start), an
    /// attestation for which the user database does not answer fails: a selector that is missing would be a smaller
    /// identity. If not, nobody is to wait for a directory server that is away.
    pub fn names_count(&self, count: bool) {
        self.names_count.store(count, Ordering::Relaxed);
    }

    /// Attests an admitted peer. Reads of `/proc` are made on this thread, as they take microseconds; what may take
    /// longer (an executable's content, names from a directory server) is not. A failure that is the peer's own doing
    /// costs it more.
    ///
    /// # Errors
    /// [`AttestError`]: the peer is gone, or what it is cannot be told. Never a sign that it has no identity.
    pub async fn attest(&self, mut admitted: Admitted<Arc<Peer>>) -> Result<Attested, AttestError> {
        match self.subject(admitted.peer().as_ref()).await {
            Ok(subject) => Ok(Attested { admitted, subject }),
            Err(error) => {
                if error.blame() == Blame::Refusal && !error.is_crowded() {
                    admitted.attestation_failed();
                }
                Err(error)
            }
        }
    }

    async fn subject<P: Process>(&self, process: &P) -> Result<Subject, AttestError> {
        if process.pid().as_raw() == 0 {
            let err = AttestError::OtherPidNamespace;
            self.count(Instant::now(), Some(&err));
            return Err(err);
        }
        let configured = self.configured.load_full();
        if let Some(kept) = self.kept(&configured, process)? {
            return Ok(kept);
        }
        let at = Instant::now();
        let attested = self.attest_anew(at, &configured, process).await;
        self.count(at, attested.as_ref().err());
        attested
    }

    async fn attest_anew<P: Process>(
        &self,
        at: Instant,
        configured: &Configured,
        process: &P,
    ) -> Result<Subject, AttestError> {
        let seen = match self.look(configured.settings, process) {
            Ok(seen) => seen,
            Err(err) => {
                // Of a process that is gone anything may be unreadable, or be another's.
                process.is_alive()?;
                return Err(err);
            }
        };

        let sha256 = match seen.content {
            Content::NotAsked => None,
            Content::Known(sha256) => Some(sha256),
            Content::Open { file, stamp, limit, path } => {
                // A process that is gone already shall not take a place among those that wait.
                process.is_alive()?;
                let made = self.digests.make(stamp, file, limit.0, process.caller()).await;
                Some(made.map_err(|err| AttestError::no_digest(err, path, limit))?)
            }
        };
        let names = self.names.find(&unix::ids(&seen.status)).await;
        if names.iter().any(Result::is_err) && self.names_count.load(Ordering::Relaxed) {
            process.is_alive()?;
            return Err(AttestError::NoNames);
        }
        let names = names.into_iter().map(Result::unwrap_or_default).collect();
        let selectors = unix::selectors(&seen.status, names, seen.executable.as_ref(), sha256.as_deref());

        // Last of all: it lives now, so everything above was read of it.
        process.is_alive()?;
        let subject = Subject(Arc::new(selectors));
        if self.kernel_tells_owner {
            let keep = subject.len() <= KEPT_SELECTORS;
            process.last_attested().store(keep.then(|| LastResult {
                at,
                generation: configured.generation,
                executable: seen.executable,
                selectors: Arc::clone(&subject.0),
            }));
        }
        Ok(subject)
    }

    /// The connection's last result, if it may be used once more.
    fn kept<P: Process>(&self, configured: &Configured, process: &P) -> Result<Option<Subject>, AttestError> {
        let Some(last) = process.last_attested().load() else { return Ok(None) };
        if last.generation != configured.generation || last.at.elapsed() >= REUSE {
            return Ok(None);
        }
        if let Some(then) = last.executable
            && then != ProcDir::open(&self.proc_root, process.pid())?.executable()?
        {
            return Ok(None);
        }
        process.is_alive()?;
        Ok(Some(Subject(last.selectors)))
    }

    /// The one place where attestation meets metrics. A kept result is no attestation.
    fn count(&self, since: Instant, failed: Option<&AttestError>) {
        let Some(metrics) = &self.metrics else { return };
        match failed {
            None => metrics.attested(AttestorName::Unix, since.elapsed()),
            Some(err) => metrics.attestation_failed(AttestorName::Unix, err.reason()),
        }
    }

    /// All reads but those of the executable's content: small, of /proc, and done on this thread.
    fn look<P: Process>(&self, settings: Settings, process: &P) -> Result<Seen, AttestError> {
        let dir = ProcDir::open(&self.proc_root, process.pid())?;
        let status = dir.status()?;
        let now = Owner { uid: Uid::from_raw(status.uid), gid: Gid::from_raw(status.gid) };
        if now != process.owner() {
            let Owner { uid, gid } = process.owner();
            return Err(AttestError::IdentityChanged { pid: process.pid(), uid, gid });
        }
        if !settings.discover_workload_path {
            return Ok(Seen { status, executable: None, content: Content::NotAsked });
        }
        let executable = dir.executable()?;
        let content = match settings.hashing() {
            None => Content::NotAsked,
            Some(limit) => self.content(&dir, &executable, limit)?,
        };
        // Between two looks at the same file lie its path and its content, so they are of one program even if the
        // process executes another meanwhile.
        if dir.executable_stamp()? != executable.stamp {
            return Err(AttestError::Changed { path: dir.executable_path() });
        }
        Ok(Seen { status, executable: Some(executable), content })
    }

    fn content(&self, dir: &ProcDir, executable: &Executable, limit: Limit) -> Result<Content, AttestError> {
        let stamp = executable.stamp;
        if let Some(bytes) = limit.0
            && stamp.size() > bytes
        {
            return Err(AttestError::TooLarge {
                path: dir.executable_path(),
                size: stamp.size(),
                limit: bytes,
            });
        }
        match self.digests.known(&stamp) {
            Some(sha256) => Ok(Content::Known(sha256)),
            None => {
                let file = dir.open_executable(&stamp)?;
                Ok(Content::Open { file, stamp, limit, path: dir.executable_path() })
            }
        }
    }
}

impl Process for Peer {
    fn pid(&self) -> Pid {
        self.pid()
    }

    fn owner(&self) -> Owner {
        Owner { uid: self.uid(), gid: self.gid() }
    }

    fn caller(&self) -> CallerKey {
        self.caller()
    }

    fn is_alive(&self) -> Result<(), AttestError> {
        self.is_alive().map_err(|gone| match gone {
            PeerGone::Exited | PeerGone::Replaced { .. } => AttestError::Gone,
            PeerGone::CredentialsChanged { uid, gid } => {
                AttestError::IdentityChanged { pid: self.pid(), uid, gid }
            }
            PeerGone::OutOfNamespace => AttestError::OtherPidNamespace,
            PeerGone::Unknown { source } => AttestError::Unknown { source },
        })
    }

    fn last_attested(&self) -> &LastAttested {
        self.last_attested()
    }
}

/// Whether this kernel says by a pidfd whose a process is.
fn kernel_tells_owner() -> bool {
    Pidfd::open(Pid::this()).is_ok_and(|this| matches!(this.owner(), Ok(Some(_))))
}

/// What one look at `/proc/PID` found.
struct Seen {
    status: status::Status,
    executable: Option<Executable>,
    content: Content,
}

/// What is known of an executable's content.
enum Content {
    /// It is not to be hashed.
    NotAsked,
    /// Its digest.
    Known(digest::Hex),
    /// It must be hashed.
    Open { file: File, stamp: Stamp, limit: Limit, path: PathBuf },
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Mutex};

    use super::*;

    /// A process of the fixtures: alive until the test says otherwise.
    struct Fixture {
        pid: i32,
        owner: (u32, u32),
        /// What `is_alive` answers, one after the other; at the end, alive.
        fates: Mutex<Vec<AttestError>>,
        last: LastAttested,
    }

    impl Process for Fixture {
        fn pid(&self) -> Pid {
            Pid::from_raw(self.pid)
        }

        fn owner(&self) -> Owner {
            Owner { uid: Uid::from_raw(self.owner.0), gid: Gid::from_raw(self.owner.1) }
        }

        fn caller(&self) -> CallerKey {
            CallerKey::Uid(self.owner.0)
        }

        fn is_alive(&self) -> Result<(), AttestError> {
            self.fates.lock().unwrap().pop().map_or(Ok(()), Err)
        }

        fn last_attested(&self) -> &LastAttested {
            &self.last
        }
    }

    fn fixture(pid: i32, owner: (u32, u32)) -> Fixture {
        Fixture { pid, owner, fates: Mutex::default(), last: LastAttested::default() }
    }

    fn attestor(case: &str) -> Attestor {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/proc").join(case);
        Attestor { kernel_tells_owner: true, ..Attestor::reading(root, Settings::default()) }
    }

    /// Whether the second is the first once more.
    fn same(first: &Subject, second: &Subject) -> bool {
        Arc::ptr_eq(&first.0, &second.0)
    }

    /// Numeric selectors alone: the fixtures' names are whatever this machine calls them.
    fn numbers(selectors: &Selectors) -> BTreeSet<&str> {
        let numeric = ["uid:", "gid:", "supplementary_gid:"];
        selectors.iter().map(|s| s.value()).filter(|v| numeric.iter().any(|n| v.starts_with(n))).collect()
    }

    #[tokio::test]
    async fn status_becomes_selectors() {
        for (case, pid, owner, want) in [
            (
                "user-with-groups",
                4100,
                (1000, 1001),
                "gid:1001 supplementary_gid:1001 supplementary_gid:24 supplementary_gid:4 uid:1000",
            ),
            ("root-without-groups", 4101, (0, 0), "gid:0 uid:0"),
            ("hostile-name", 4102, (1000, 1000), "gid:1000 supplementary_gid:1000 uid:1000"),
            ("effective-differs", 4103, (21, 11), "gid:11 supplementary_gid:7 uid:21"),
        ] {
            let selectors = attestor(case).subject(&fixture(pid, owner)).await.unwrap();
            assert_eq!(numbers(&selectors), want.split(' ').collect(), "{case}");
            assert!(selectors.iter().all(|s| s.kind() == "unix"), "{case}");
        }
    }

    #[tokio::test]
    async fn a_user_database_that_does_not_answer_makes_no_smaller_identity() {
        for (case, count, want) in
            [("entries ask for names", true, None), ("nobody asks for names", false, Some("uid:1000"))]
        {
            let names = Names::new(Arc::new(|_| Err(nix::errno::Errno::EIO)), Duration::from_secs(2));
            let attestor = Attestor { names, ..attestor("user-with-groups") };
            attestor.names_count(count);
            match (attestor.subject(&fixture(4100, (1000, 1001))).await, want) {
                (Ok(selectors), Some(want)) => assert!(numbers(&selectors).contains(want), "{case}"),
                (Err(AttestError::NoNames), None) => {}
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }
        for (selector, needs) in [
            ("unix:user:web", true),
            ("unix:group:www", true),
            ("unix:supplementary_group:adm", true),
            ("unix:uid:1000", false),
            ("unix:path:/user:x", false),
        ] {
            let selector = crate::identity::Selector::parse(selector).unwrap();
            assert_eq!(unix::needs_name(&selector), needs, "{selector}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_told_is_an_error_and_never_fewer_selectors() {
        for (case, pid, owner, want, blame) in [
            (
                "user-with-groups",
                4100,
                (0, 1001),
                "process 4100 changed its user or group after it connected as 0:1001: it must connect again",
                Blame::Refusal,
            ),
            (
                "user-with-groups",
                4100,
                (1000, 1000),
                "process 4100 changed its user or group after it connected as 1000:1000: it must connect again",
                Blame::Refusal,
            ),
            (
                "user-with-groups",
                4099,
                (1000, 1001),
                "the process that opened the connection has exited",
                Blame::Refusal,
            ),
            (
                "many-groups",
                4104,
                (1000, 1000),
                "the caller has more than 1024 supplementary groups",
                Blame::Refusal,
            ),
            (
                "cut",
                4105,
                (1000, 1001),
                "cannot understand {root}/cut/4105/status: it ends before its Uid line",
                Blame::Fault,
            ),
            (
                "two-uids",
                4105,
                (1000, 1001),
                "cannot understand {root}/two-uids/4105/status: it has two Uid lines",
                Blame::Fault,
            ),
            (
                "user-with-groups",
                0,
                (65534, 65534),
                "the caller is in another PID namespace, so the agent cannot see its process: run the agent in the \
                 host's PID namespace (in Kubernetes: hostPID: true), or in the caller's",
                Blame::Fault,
            ),
        ] {
            let err = attestor(case).subject(&fixture(pid, owner)).await.unwrap_err();
            let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/proc");
            assert_eq!(err.to_string(), want.replace("{root}", root), "{case}");
            assert_eq!(err.blame(), blame, "{case}");
        }
    }

    #[tokio::test]
    async fn a_process_that_is_gone_at_the_end_gets_nothing() {
        let attestor = attestor("user-with-groups");
        let gone = fixture(4100, (1000, 1001));
        gone.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&gone).await, Err(AttestError::Gone)));
        assert!(gone.last.load().is_none(), "and nothing is kept");

        // What is read in place of a process that is gone may be anything; the reason is that it is gone.
        let replaced = fixture(4100, (0, 0));
        replaced.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&replaced).await, Err(AttestError::Gone)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_is_kept_for_a_second() {
        let attestor = attestor("user-with-groups");
        let process = fixture(4100, (1000, 1001));
        let first = attestor.subject(&process).await.unwrap();
        tokio::time::advance(REUSE - Duration::from_millis(2)).await;
        assert!(same(&first, &attestor.subject(&process).await.unwrap()), "within the second");
        tokio::time::advance(Duration::from_millis(4)).await;
        let second = attestor.subject(&process).await.unwrap();
        assert!(!same(&first, &second), "after it: use does not prolong it");
        assert_eq!(first, second);

        attestor.reload(Settings::default());
        let third = attestor.subject(&process).await.unwrap();
        assert!(!same(&second, &third), "nothing of the old settings is used");

        process.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&process).await, Err(AttestError::Gone)), "alive for every use");
    }

    #[tokio::test]
    async fn nothing_is_kept_where_the_kernel_does_not_tell_owners() {
        let attestor = Attestor { kernel_tells_owner: false, ..attestor("user-with-groups") };
        let process = fixture(4100, (1000, 1001));
        let first = attestor.subject(&process).await.unwrap();
        assert!(!same(&first, &attestor.subject(&process).await.unwrap()));
    }

    #[test]
    fn settings_say_what_is_hashed() {
        for (discover, limit, want) in [
            (false, 0, None),
            (false, 10, None),
            (true, 0, Some(Limit(None))),
            (true, 1, Some(Limit(Some(1)))),
            (true, i64::MAX, Some(Limit(Some(i64::MAX.unsigned_abs())))),
            (true, -1, None),
            (true, i64::MIN, None),
        ] {
            let settings = Settings { discover_workload_path: discover, workload_size_limit: limit };
            assert_eq!(settings.hashing(), want, "{settings:?}");
        }
    }
}
