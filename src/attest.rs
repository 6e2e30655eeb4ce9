//! From an admitted peer to its selectors.
//!
//! [`Attestor::attest`] takes nothing but an [`Admitted`] peer, so that no call reads `/proc` before its caller was
//! charged. Everything is read as [`process`] says, and the pidfd is asked last: only then is what was read believed.
//! What is read, and what it means, is the attestors' own: each is a file or folder here and a line in the list below.
//!
//! A connection that calls often does not pay for all of it each time: its last result is kept with the peer and
//! used for one second, and only if the process lives, is of the same user and group, and executes the same file
//! (asked anew for every call). What could change unseen within that second is the list of supplementary groups: a
//! process needs `CAP_SETGID` to change it, and one second is what a stream that was just opened has anyway. Where
//! the kernel does not say whose a process is (before Linux 6.13), nothing is kept.
//!
//! Attestors find out what the entries of a [`Questions`] ask for. These stand in the snapshot that a call is answered
//! from, so that no call meets an entry whose selectors nobody looked for.
//!
//! # Decisions
//! SPIRE drops the selectors of an attestor that fails and goes on with the rest, so that a passing trouble ends as
//! `PermissionDenied` or as a wrong identity. Here a call is `Unavailable` when an entry may be its caller's by what
//! could not be told ([`doubt`]), and no other call suffers.

mod attestors;
mod doubt;
mod error;
pub mod inspect;
mod kept;
mod process;
mod settings;
pub mod status;
pub mod unix;

use std::{
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use metrics::{Counter, Histogram};
use nix::unistd::Pid;
use tokio::time::Instant;

pub use self::error::{AttestError, AttestFault, Blame, ProcReadError};
pub(crate) use self::settings::is_enabled;
use self::{
    attestors::{Attestation, Evidence, Findings, Untold, WorkloadAttestor, attestors},
    doubt::{Doubts, SelectorKind},
    kept::Kept,
    process::{Attestable, ProcDir, Seen},
    unix::{UnixAttestor, UnixError, UnixSettings},
};
use crate::{
    hcl::section::Section,
    identity::{
        Entry, EntryIndex,
        selector::{Selector, Selectors},
    },
    limits::{Admitted, Families},
    os::pidfd::Pidfd,
    peer::Peer,
    telemetry::registry::{By, Label as _, Registry},
};

// Every attestor: how it is called in metrics, then its field, its type, and its settings and errors.
attestors! {
    /// Users, groups and executables.
    Unix, unix: UnixAttestor, UnixSettings, UnixError;
}

/// How long a connection's last result may be used.
const REUSE: Duration = Duration::from_secs(1);
/// A result with more selectors is not kept: what stays with an open connection must be small.
const KEPT_SELECTORS: usize = 64;

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
    settings: ArcSwap<AttestSettings>,
    /// Only [`Attestor::share_by`] writes.
    families: ArcSwap<Families>,
    attestors: Attestors,
    /// What was prepared last, and for which entries.
    prepared: Mutex<(Arc<EntryIndex>, Arc<Questions>)>,
    /// Whether [`Attestable::is_alive`] sees a change of user or group.
    kernel_tells_owner: bool,
    metrics: AttestMetrics,
}

/// A connection's last result, as its peer keeps it.
struct LastResult {
    /// It was made with these settings, and is of no use with others.
    settings: Arc<AttestSettings>,
    /// It was made for these questions, and is of no use for others.
    questions: u64,
    evidence: Vec<Box<dyn Evidence>>,
    subject: Subject,
}

impl Attestor {
    /// An attestor of the processes in `/proc`. Its attestations are not counted.
    pub fn new(settings: AttestSettings) -> Self {
        let attestors = Attestors::default();
        attestors.begin(&settings);
        Self {
            proc_root: PathBuf::from("/proc"),
            settings: ArcSwap::from_pointee(settings),
            families: ArcSwap::default(),
            attestors,
            prepared: Mutex::default(),
            kernel_tells_owner: kernel_tells_owner(),
            metrics: AttestMetrics::new(Registry::new(&metrics::NoopRecorder)),
        }
    }

    /// Registers its series with `registry` and counts attestations and their failures.
    #[must_use]
    pub fn counted_by(self, registry: Registry<'_>) -> Self {
        Self { metrics: AttestMetrics::new(registry), ..self }
    }

    /// Attests with other settings from the next call on; nothing that was found out with the old ones is used.
    pub fn reload(&self, settings: AttestSettings) {
        self.attestors.begin(&settings);
        self.settings.store(Arc::new(settings));
    }

    /// Shares what callers wait for by these families from the next call on.
    pub fn share_by(&self, families: Families) {
        self.families.store(Arc::new(families));
    }

    /// Looks what the entries ask for. Does not wait: what is not known yet stays untold. For the same entries it costs
    /// nothing until something else is known.
    pub fn prepare_for(&self, index: &Arc<EntryIndex>) -> Arc<Questions> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, questions) = &*prepared;
        if questions.number == 0 || !Arc::ptr_eq(last, index) {
            let next = self.attestors.prepare_for(index.entries(), questions.number + 1);
            *prepared = (Arc::clone(index), Arc::new(next));
        }
        Arc::clone(&prepared.1)
    }

    /// Attests an admitted peer, as far as `questions` go: those of the snapshot that the call is answered from. Reads of `/proc` are made on this thread, as they take microseconds; what may take
    /// longer (an executable's content, names from a directory server) is not. A failure that is the peer's own doing
    /// costs it more.
    ///
    /// # Errors
    /// [`AttestError`]: the peer is gone, or what it is cannot be told. Never a sign that it has no identity.
    pub async fn attest(
        &self,
        mut admitted: Admitted<Arc<Peer>>,
        questions: &Questions,
    ) -> Result<Attested, AttestError> {
        match self.subject(admitted.peer().as_ref(), questions).await {
            Ok(subject) => Ok(Attested { admitted, subject }),
            Err(error) => {
                if error.blame() == Blame::Refusal {
                    admitted.attestation_failed();
                }
                Err(error)
            }
        }
    }

    async fn subject(&self, process: &dyn Attestable, questions: &Questions) -> Result<Subject, AttestError> {
        let settings = self.settings.load_full();
        if let Some(kept) = self.kept(&settings, questions, process).await? {
            return Ok(kept);
        }
        let at = Instant::now();
        let attested = self.attest_anew(&settings, questions, process, at).await;
        let attested = attested.and_then(|attestation| without_doubt(attestation, questions));
        self.metrics.count(&attested);
        let Attestation { selectors, evidence, untold, took: _ } = attested?;
        let subject = Subject(Arc::new(selectors));
        if let Some(slot) = process.slot().filter(|_| self.kernel_tells_owner) {
            let questions = questions.number;
            let last = LastResult { settings, questions, evidence, subject: subject.clone() };
            // What could not be told may be told by the next call.
            let keep = subject.len() <= KEPT_SELECTORS && untold.is_empty();
            slot.store(keep.then(|| Kept::until(at + REUSE, last)));
        }
        Ok(subject)
    }

    async fn attest_anew(
        &self,
        settings: &AttestSettings,
        questions: &Questions,
        process: &dyn Attestable,
        at: Instant,
    ) -> Result<Attestation, AttestError> {
        let seen = Seen::open(&self.proc_root, &self.families.load(), process);
        let found = match seen {
            Ok(seen) => {
                self.attestors.attest(settings, questions, &seen, at).await.map_err(AttestError::from)
            }
            Err(error) => Err(error),
        };
        // Last of all: it lives now, so everything above was read of it. Of a process that is gone anything may be
        // unreadable, or be another's.
        process.is_alive()?;
        found
    }

    /// The connection's last result, if it may be used once more.
    async fn kept(
        &self,
        settings: &Arc<AttestSettings>,
        questions: &Questions,
        process: &dyn Attestable,
    ) -> Result<Option<Subject>, AttestError> {
        let Some(kept) = process.slot().and_then(|slot| slot.load::<Kept<LastResult>>()) else {
            return Ok(None);
        };
        let fits =
            |last: &&LastResult| Arc::ptr_eq(&last.settings, settings) && last.questions == questions.number;
        let last = kept.believed(Instant::now()).filter(fits);
        let Some(last) = last else { return Ok(None) };
        if !last.evidence.is_empty() {
            let dir = ProcDir::open(&self.proc_root, process.pid())?;
            for evidence in &last.evidence {
                if !evidence.holds(&dir).await {
                    return Ok(None);
                }
            }
        }
        process.is_alive()?;
        Ok(Some(last.subject.clone()))
    }
}

impl Questions {
    /// Whether an entry may be a process's that asks for nothing but what was `found` and selectors of these kinds.
    fn may_ask(&self, attestor: &'static str, found: &Selectors, words: &[&'static str]) -> bool {
        let kinds: Vec<SelectorKind> = words.iter().map(|word| SelectorKind { attestor, word }).collect();
        self.doubts.first(found, &kinds, |selector| self.untellable(selector)).is_some()
    }
}

/// The attestation, unless an entry may be the process's by what could not be told.
fn without_doubt(mut attestation: Attestation, questions: &Questions) -> Result<Attestation, AttestError> {
    if attestation.untold.is_empty() {
        return Ok(attestation);
    }
    let untold: Vec<SelectorKind> = attestation.untold.iter().map(|(kind, _)| *kind).collect();
    let kind_of = |selector: &Selector| questions.untellable(selector);
    let Some(kind) = questions.doubts.first(&attestation.selectors, &untold, kind_of) else {
        return Ok(attestation);
    };
    let at = untold.iter().position(|it| *it == kind).unwrap_or_default();
    Err(attestation.untold.swap_remove(at).1.into())
}

/// The series of attestation.
struct AttestMetrics {
    seconds: By<AttestorName, Histogram>,
    failures: By<AttestorName, By<AttestFault, Counter>>,
}

impl AttestMetrics {
    fn new(make: Registry<'_>) -> Self {
        Self {
            seconds: make
                .histograms("durward_attestation_duration_seconds", "Time to learn a peer's selectors."),
            failures: By::new(|attestor: AttestorName| {
                By::new(|reason: AttestFault| {
                    make.counter(
                        "durward_attestation_failures_total",
                        "Peers that could not be attested.",
                        &[(AttestorName::KEY, attestor.text()), (AttestFault::KEY, reason.text())],
                    )
                })
            }),
        }
    }

    /// Counts an attestation that ended. A kept result that is used once more is none.
    fn count(&self, attested: &Result<Attestation, AttestError>) {
        match attested {
            Ok(attestation) => {
                for (attestor, took) in &attestation.took {
                    self.seconds.with(*attestor, |seconds| seconds.record(*took));
                }
            }
            Err(error) => {
                for attestor in AttestorName::VALUES.iter().filter(|attestor| error.concerns(**attestor)) {
                    self.failures.with(*attestor, |by| by.with(error.fault(), |n| n.increment(1)));
                }
            }
        }
    }
}

/// Whether this kernel says by a pidfd whose a process is.
fn kernel_tells_owner() -> bool {
    Pidfd::open(Pid::this()).is_ok_and(|this| matches!(this.owner(), Ok(Some(_))))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Mutex};

    use nix::unistd::{Gid, Uid};

    use super::*;
    use crate::{
        identity::{EntryId, Selector, SpiffeId},
        limits::CallerKey,
        os::pidfd::Owner,
        peer::slot::PeerSlot,
        telemetry::metrics::Metrics,
    };

    /// A process of the fixtures: alive until the test says otherwise.
    struct Fixture {
        pid: i32,
        owner: (u32, u32),
        /// What `is_alive` answers, one after the other; at the end, alive.
        fates: Mutex<Vec<AttestError>>,
        slot: PeerSlot,
    }

    impl Attestable for Fixture {
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

        fn slot(&self) -> Option<&PeerSlot> {
            Some(&self.slot)
        }
    }

    fn fixture(pid: i32, owner: (u32, u32)) -> Fixture {
        Fixture { pid, owner, fates: Mutex::default(), slot: PeerSlot::default() }
    }

    fn attestor(case: &str) -> Attestor {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/proc").join(case);
        Attestor { proc_root: root, kernel_tells_owner: true, ..Attestor::new(AttestSettings::default()) }
    }

    /// An entry that asks for one selector.
    fn entry(selector: &str) -> Arc<Entry> {
        Arc::new(Entry {
            id: EntryId::new("e"),
            spiffe_id: SpiffeId::parse("spiffe://example.org/e").unwrap(),
            selectors: Selectors::from([Selector::parse(selector).unwrap()]),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            hint: Box::default(),
            dns_names: Vec::new(),
            federates_with: BTreeSet::new(),
            created_at: 0,
            revision: 0,
        })
    }

    /// What no entries ask for.
    fn nothing() -> Questions {
        Questions::default()
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
            let selectors =
                attestor(case).subject(&fixture(pid, owner), &Questions::default()).await.unwrap();
            assert_eq!(numbers(&selectors), want.split(' ').collect(), "{case}");
            assert!(selectors.iter().all(|s| s.kind() == "unix"), "{case}");
        }
    }

    #[tokio::test]
    async fn a_user_database_that_does_not_answer_makes_no_smaller_identity() {
        for (case, selector, want) in [
            ("entries ask for names", "unix:user:web", None),
            ("nobody asks for names", "unix:uid:1000", Some("uid:1000")),
        ] {
            let attestors = Attestors { unix: UnixAttestor::nameless() };
            let attestor = Attestor { attestors, ..attestor("user-with-groups") };
            let questions = attestor.prepare_for(&Arc::new(EntryIndex::new([entry(selector)])));
            match (attestor.subject(&fixture(4100, (1000, 1001)), &questions).await, want) {
                (Ok(selectors), Some(want)) => assert!(numbers(&selectors).contains(want), "{case}"),
                (Err(AttestError::Attestor(AttestorError::Unix(UnixError::NoNames))), None) => {}
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
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
            let err = attestor(case).subject(&fixture(pid, owner), &nothing()).await.unwrap_err();
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
        assert!(matches!(attestor.subject(&gone, &nothing()).await, Err(AttestError::Gone)));
        assert!(gone.slot.load::<Kept<LastResult>>().is_none(), "and nothing is kept");

        // What is read in place of a process that is gone may be anything; the reason is that it is gone.
        let replaced = fixture(4100, (0, 0));
        replaced.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&replaced, &nothing()).await, Err(AttestError::Gone)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_is_kept_for_a_second() {
        let attestor = attestor("user-with-groups");
        let process = fixture(4100, (1000, 1001));
        let first = attestor.subject(&process, &nothing()).await.unwrap();
        tokio::time::advance(REUSE - Duration::from_millis(2)).await;
        assert!(same(&first, &attestor.subject(&process, &nothing()).await.unwrap()), "within the second");
        tokio::time::advance(Duration::from_millis(4)).await;
        let second = attestor.subject(&process, &nothing()).await.unwrap();
        assert!(!same(&first, &second), "after it: use does not prolong it");
        assert_eq!(first, second);

        attestor.reload(AttestSettings::default());
        let third = attestor.subject(&process, &nothing()).await.unwrap();
        assert!(!same(&second, &third), "nothing of the old settings is used");

        process.fates.lock().unwrap().push(AttestError::Gone);
        assert!(
            matches!(attestor.subject(&process, &nothing()).await, Err(AttestError::Gone)),
            "alive for every use"
        );
    }

    #[tokio::test]
    async fn nothing_is_kept_where_the_kernel_does_not_tell_owners() {
        let attestor = Attestor { kernel_tells_owner: false, ..attestor("user-with-groups") };
        let process = fixture(4100, (1000, 1001));
        let first = attestor.subject(&process, &nothing()).await.unwrap();
        assert!(!same(&first, &attestor.subject(&process, &nothing()).await.unwrap()));
    }

    #[tokio::test]
    async fn attestations_are_counted_and_kept_results_are_not() {
        let metrics = Metrics::default();
        let attestor = attestor("user-with-groups").counted_by(metrics.registry());
        let process = fixture(4100, (1000, 1001));
        for _ in 0..2 {
            attestor.subject(&process, &nothing()).await.unwrap();
        }
        attestor.subject(&fixture(4099, (1000, 1001)), &nothing()).await.unwrap_err();
        let text = metrics.render();
        for line in [
            r#"durward_attestation_duration_seconds_count{attestor="unix"} 1"#,
            r#"durward_attestation_failures_total{attestor="unix",reason="gone"} 1"#,
            r#"durward_attestation_failures_total{attestor="unix",reason="busy"} 0"#,
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in:\n{text}");
        }
    }
}
