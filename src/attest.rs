//! From an admitted peer to its selectors.
//!
//! [`Attestor::attest`] takes nothing but an [`Admitted`] peer, so that no call reads `/proc` before its caller was
//! charged. Everything is read as [`process`] says, and the pidfd is asked last: only then is what was read believed.
//! What is read, and what it means, is the attestors' own: each is a file or folder here and a line in the list below.
//!
//! A connection that calls often does not pay for all of it each time: its last result is kept with the peer and
//! used for one second, and only if the process lives, is of the same user and group, and, where an entry asks what it
//! executes, executes the same file (asked anew for every call). What could change unseen within that second is the list
//! of supplementary groups, for which a process needs `CAP_SETGID`.
//!
//! These groups are the one thing that the kernel may take long to tell: see [`long_reads`]. So they are read only where an entry
//! asks for one, and the call of a process that connected less than that second ago in a few is answered for those, which the
//! socket tells in a microsecond.
//!
//! The process of an open stream is attested again before it is sent anything more ([`Attestor::attest_again`]): a
//! program that is executed, and groups that are changed, are other selectors of the same process. It is paid for by
//! nobody, and so has places of its own, as many as calls have: neither takes the other's.
//!
//! Attestors find out what the entries of a [`Questions`] ask for, by the settings that stand there too. These stand in the
//! snapshot that a call is answered from, so that no call meets an entry whose selectors nobody looked for.
//!
//! # Decisions
//! SPIRE drops the selectors of an attestor that fails and goes on with the rest, so that a passing trouble ends as
//! `PermissionDenied` or as a wrong identity. Here a call is `Unavailable` when an entry may be its caller's by what
//! could not be told ([`doubt`]), and no other call suffers.

mod attestors;
mod doubt;
mod error;
pub mod inspect;
pub mod k8s;
mod long_reads;
mod process;
mod settings;
pub mod status;
pub mod unix;

use std::{
    io,
    ops::Deref,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use metrics::{Counter, Histogram};
use tokio::{sync::watch, time::Instant};

pub use self::attestors::{AttestorBlock, AttestorSaid, Outage};
pub use self::error::{AttestError, AttestFault, Blame, ProcReadError};
pub(crate) use self::settings::is_enabled;
use self::{
    attestors::{
        Attestation, EnabledAttestors, Evidence, Findings, News, Untold, WorkloadAttestor, attestors,
        not_in_use,
    },
    doubt::{Doubts, SelectorKind},
    k8s::{K8sAttestor, K8sError, K8sSettings},
    long_reads::LongReads,
    process::{Attestable, Extent, PlacedPeer, ProcDir, Seen, dir_of},
    unix::{Account, UnixAttestor, UnixError, UnixSettings},
};
use crate::{
    hcl::section::Section,
    identity::{
        Entry, EntryIndex,
        selector::{Selector, Selectors},
    },
    limits::{Admitted, Families, Limits, processor::ProcessorShare},
    os::{
        namespace::{ProcFault, proc_is_ours, unmapped},
        peer_groups::ConnectedGroups,
        pidfd::Owner,
    },
    peer::{Peer, slot::PeerSlot},
    telemetry::registry::{By, Label as _, Registry},
};

// Every attestor: how it is called in metrics, then its field, its type, and its settings and errors.
attestors! {
    /// Users, groups and executables.
    Unix, unix: UnixAttestor, UnixSettings, UnixError;
    /// Pods and their containers.
    K8s, k8s: K8sAttestor, K8sSettings, K8sError;
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

    /// Who may be attested again for as long as its stream is open.
    pub fn peer(&self) -> AttestedPeer {
        AttestedPeer(Arc::clone(self.admitted.peer()))
    }
}

/// A peer that was admitted and attested, for an open stream. Only the attestor makes one.
#[derive(Debug)]
pub struct AttestedPeer(Arc<Peer>);

impl AttestedPeer {
    /// Whether its process still lives, and is of the user and group that connected. To be asked right before it is
    /// sent something.
    ///
    /// # Errors
    /// [`AttestError`]: nothing may be sent to it.
    pub fn is_alive(&self) -> Result<(), AttestError> {
        Attestable::is_alive(&*self.0)
    }

    /// Who connected, for the log.
    pub fn connected(&self) -> &Peer {
        &self.0
    }
}

/// Finds out who peers are.
pub struct Attestor {
    proc_root: PathBuf,
    /// As whom those appear who have no number here.
    unmapped: Option<Owner>,
    /// A caller was in another PID namespace.
    met_strangers: AtomicBool,
    /// One was not.
    met_neighbours: AtomicBool,
    /// What `/proc` says is of the processes that connect. Only [`Attestor::look_at_proc`] writes.
    proc_is_ours: AtomicBool,
    /// Only [`Attestor::share_by`] writes.
    families: ArcSwap<Families>,
    long_reads: Arc<LongReads>,
    attestors: Attestors,
    news: News,
    /// What came of asking ahead of any call.
    tries: News,
    prepared: Mutex<Prepared>,
    metrics: AttestMetrics,
}

/// What was prepared last, for which entries, and after how many news.
#[derive(Default)]
struct Prepared {
    /// Of what is prepared next. Only [`Attestor::reload`] writes.
    settings: Arc<AttestSettings>,
    index: Arc<EntryIndex>,
    news: u64,
    questions: Arc<Questions>,
}

/// A connection's last result where its process has more groups than are attested.
struct TooManyGroups;

/// A connection's last result, as its peer keeps it.
struct LastResult {
    /// It was made for these questions, and is of no use for others.
    questions: u64,
    /// Theirs.
    settings: Arc<AttestSettings>,
    evidence: Vec<Box<dyn Evidence>>,
    subject: Subject,
}

impl Attestor {
    /// An attestor of the processes in `/proc`. Its attestations are not counted.
    pub fn new(settings: AttestSettings) -> Self {
        let news = News::default();
        let attestors = Attestors::new(&news);
        attestors.begin(&settings);
        Self {
            proc_root: PathBuf::from("/proc"),
            unmapped: unmapped(),
            met_strangers: AtomicBool::new(false),
            met_neighbours: AtomicBool::new(false),
            proc_is_ours: AtomicBool::new(proc_is_ours().is_ok()),
            families: ArcSwap::default(),
            long_reads: Arc::default(),
            attestors,
            news,
            tries: News::default(),
            metrics: AttestMetrics::new(Registry::new(&metrics::NoopRecorder), &settings),
            prepared: Mutex::new(Prepared { settings: Arc::new(settings), ..Prepared::default() }),
        }
    }

    /// Registers its series with `registry` and counts attestations and their failures.
    #[must_use]
    pub fn counted_by(self, registry: Registry<'_>) -> Self {
        self.attestors.counted_by(registry);
        let settings = Arc::clone(&self.prepared().settings);
        Self { metrics: AttestMetrics::new(registry, &settings), ..self }
    }

    /// Looks whether `/proc` shows the processes that connect, and attests nobody from now on where it does not. To be called
    /// every now and then: another one may be mounted.
    ///
    /// # Errors
    /// [`ProcFault`]: it does not.
    pub fn look_at_proc(&self) -> Result<(), ProcFault> {
        let looked = proc_is_ours();
        self.proc_is_ours.store(looked.is_ok(), Ordering::Relaxed);
        looked
    }

    /// What attestors keep between attestations, in bytes, as far as it can be much.
    pub fn kept_bytes(&self) -> usize {
        self.attestors.kept()
    }

    /// What keeps attestors from telling who callers are, as far as it is known at this moment, each in one line.
    pub fn troubles(&self) -> Vec<String> {
        self.attestors.troubles()
    }

    /// Has attestors find out whether they can tell anything, ahead of any call, as far as `questions` ask for it. Does not wait;
    /// to be called for each snapshot.
    pub fn ask_ahead(&self, questions: &Questions) {
        self.attestors.ask_ahead(questions, &self.tries);
    }

    /// Tells when [`Attestor::outages`] may be otherwise.
    pub fn tries(&self) -> watch::Receiver<u64> {
        self.tries.subscribe()
    }

    /// Which attestors can tell nothing of anybody, and why. Not those that are optional.
    pub fn outages(&self, questions: &Questions) -> Vec<(&'static str, Outage)> {
        self.attestors.outages(&questions.settings)
    }

    /// Whether a caller was refused since it is in another PID namespace.
    pub fn has_met_strangers(&self) -> bool {
        self.met_strangers.load(Ordering::Relaxed)
    }

    /// Whether anybody was attested, whoever it was.
    pub fn has_met_neighbours(&self) -> bool {
        self.met_neighbours.load(Ordering::Relaxed)
    }

    /// Takes other settings for what is prepared from now on. A call is attested by those of its snapshot: entries that
    /// a reload takes away are still found by what it finds out no more.
    pub fn reload(&self, settings: AttestSettings) {
        self.attestors.begin(&settings);
        self.prepared().settings = Arc::new(settings);
    }

    /// Shares what callers wait for by these families from the next call on, and what the agent may use of the processor.
    pub fn share_by(&self, families: Families, processor: ProcessorShare) {
        self.families.store(Arc::new(families));
        self.attestors.unix.share_is(processor);
    }

    /// Looks what the entries ask for. Does not wait: what is not known yet stays untold. For the same entries and
    /// settings it costs nothing until something else is known.
    pub fn prepare_for(&self, index: &Arc<EntryIndex>) -> Arc<Questions> {
        let mut prepared = self.prepared();
        // Read first: what comes to be known from here on is either in it, or makes it be prepared again.
        let news = *self.news.borrow();
        let Prepared { settings, questions, .. } = &*prepared;
        let number = questions.number;
        let same =
            number > 0 && Arc::ptr_eq(&questions.settings, settings) && Arc::ptr_eq(&prepared.index, index);
        if !same || news != prepared.news {
            let questions = self.attestors.prepare_for(index.entries(), Arc::clone(settings), number + 1);
            prepared.questions = Arc::new(questions);
            (prepared.index, prepared.news) = (Arc::clone(index), news);
        }
        Arc::clone(&prepared.questions)
    }

    fn prepared(&self) -> MutexGuard<'_, Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all that was asked for with [`Attestor::prepare_for`] was looked for once; so long at most. Blocks
    /// this thread.
    pub fn wait(&self, patience: Duration) {
        self.attestors.wait(std::time::Instant::now() + patience);
    }

    /// Tells when [`Attestor::prepare_for`] may give something else for the same entries.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Attests an admitted peer, as far as `questions` go: those of the snapshot that the call is answered from. What
    /// the kernel says of a process in microseconds is read on this thread; what its user may make longer, or hang
    /// (all that is about its executable), is not. A failure that is the peer's own doing costs it more.
    ///
    /// # Errors
    /// [`AttestError`]: the peer is gone, or what it is cannot be told. Never a sign that it has no identity.
    pub async fn attest(
        &self,
        mut admitted: Admitted<Arc<Peer>>,
        questions: &Questions,
    ) -> Result<Attested, AttestError> {
        let (held, patience) = (Mutex::new(admitted.take_place()), admitted.patience_left());
        let placed =
            PlacedPeer { peer: admitted.peer(), held, patience, new_since: Some(admitted.peer().since()) };
        let subject = self.subject(&placed, questions).await;
        drop(placed);
        match subject {
            Ok(subject) => Ok(Attested { admitted, subject }),
            Err(error) => {
                if error.is_paid_for() {
                    admitted.peer().asked_in_vain();
                    admitted.attestation_failed();
                }
                Err(error)
            }
        }
    }

    /// Attests the process of an open stream anew, as far as `questions` go: those of the snapshot that the update is
    /// made of. It costs its caller nothing.
    ///
    /// # Errors
    /// [`AttestError`]: nothing may be sent to it now. Whose doing that is says whether it may be later.
    pub async fn attest_again(
        &self,
        peer: &AttestedPeer,
        questions: &Questions,
        limits: &Limits,
    ) -> Result<Subject, AttestError> {
        let AttestedPeer(peer) = peer;
        let Some(place) = limits.place_for_update(peer.caller()) else {
            self.metrics.failed(&AttestError::Crowded);
            return Err(AttestError::Crowded);
        };
        let held = Mutex::new(Some(place.into_slot()));
        self.subject(&PlacedPeer { peer, held, patience: Duration::MAX, new_since: None }, questions).await
    }

    async fn subject(&self, process: &dyn Attestable, questions: &Questions) -> Result<Subject, AttestError> {
        if let Some(kept) = self.kept(questions, process).await? {
            return Ok(kept);
        }
        let at = Instant::now();
        // Boxed, as few calls need the room for it.
        let attested = Box::pin(self.attest_anew(questions, process, at)).await;
        let attested = attested.and_then(|attestation| without_doubt(attestation, questions));
        self.metrics.count(&attested);
        if let (Err(AttestError::Status(ProcReadError::TooManyGroups)), Some(slot)) =
            (&attested, process.slot())
        {
            slot.store(at + REUSE, TooManyGroups);
        }
        let Attestation { selectors, evidence, untold, said: _ } = attested?;
        let subject = Subject(Arc::new(selectors));
        if let Some(slot) = process.slot() {
            // What could not be told may be told by the next call.
            if subject.len() <= KEPT_SELECTORS && untold.is_empty() {
                // Groups that are believed to be those of the beginning are believed no longer.
                let until = groups_at_first(process, at).map_or(at + REUSE, |(_, until)| until);
                let (settings, questions) = (Arc::clone(&questions.settings), questions.number);
                slot.store(until, LastResult { questions, settings, evidence, subject: subject.clone() });
            } else {
                slot.clear();
            }
        }
        Ok(subject)
    }

    async fn attest_anew(
        &self,
        questions: &Questions,
        process: &dyn Attestable,
        at: Instant,
    ) -> Result<Attestation, AttestError> {
        let seen = match self.proc_is_ours.load(Ordering::Relaxed) {
            true => self.see(process, questions, at).await,
            false => Err(AttestError::ProcOfOthers),
        };
        if matches!(seen, Err(AttestError::OtherPidNamespace)) {
            self.met_strangers.store(true, Ordering::Relaxed);
        }
        let seen = seen.and_then(|seen| seen.without(self.unmapped));
        let found = match seen {
            Ok(seen) => self.attestors.attest(questions, &seen, at).await.map_err(AttestError::from),
            Err(error) => Err(error),
        };
        // Last of all: it lives now, so everything above was read of it. Of a process that is gone anything may be
        // unreadable, or be another's.
        process.is_alive()?;
        // Written once: a write with each call would take the line of memory from the other threads each time.
        if found.is_ok() && !self.has_met_neighbours() {
            self.met_neighbours.store(true, Ordering::Relaxed);
        }
        found
    }

    /// Finds out who a process is. Its user and its group are those that connected, which is asked last of all; its
    /// supplementary groups are read where an entry asks for some or people do, and of few it is believed for a moment that they
    /// are those that it connected with. For nothing else anything is opened: what the kernel makes for that is charged to the agent,
    /// and stays as long as anybody has the same opened.
    async fn see<'a>(
        &self,
        process: &'a dyn Attestable,
        questions: &Questions,
        now: Instant,
    ) -> Result<Seen<'a>, AttestError> {
        let pid = process.pid();
        if pid.as_raw() == 0 {
            return Err(AttestError::OtherPidNamespace);
        }
        let family = self.families.load().group(process.caller());
        let dir = dir_of(&self.proc_root, pid);
        let groups = match process.extent() {
            Extent::Asked if !questions.unix.ask_for_groups() => Some(Vec::new()),
            Extent::Asked => groups_at_first(process, now).map(|(groups, _)| groups.to_vec()),
            Extent::All => process.groups_read().map(<[u32]>::to_vec),
        };
        if let Some(groups) = groups {
            return Ok(Seen::as_connected(process, family, dir, groups));
        }
        // To read it costs as much as thousands of calls.
        let connected = process.connected_with_groups();
        if connected.is_some_and(|groups| groups.number() > status::MAX_GROUPS) {
            return Err(ProcReadError::TooManyGroups.into());
        }
        process.is_read();
        let process_dir = dir.clone();
        let read = move || ProcDir::open(process_dir)?.status();
        match self.long_reads.read(family, process.patience(), || process.stand_aside(), read).await {
            Ok(status) => Seen::of(process, family, dir, status),
            Err(error) if may_be_hidden(&error) => {
                // One that has ended is not there either; on kernels that say nothing else of it, none is known to live.
                process.is_alive()?;
                Ok(Seen::with_hidden_groups(process, family, dir))
            }
            Err(error) => Err(error),
        }
    }

    /// The connection's last result, if it may be used once more.
    async fn kept(
        &self,
        questions: &Questions,
        process: &dyn Attestable,
    ) -> Result<Option<Subject>, AttestError> {
        if !self.proc_is_ours.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let now = Instant::now();
        let had_too_many = |slot: &PeerSlot| slot.load::<TooManyGroups>(now).is_some();
        if questions.unix.ask_for_groups() && process.slot().is_some_and(had_too_many) {
            process.is_alive()?;
            let error = ProcReadError::TooManyGroups.into();
            self.metrics.failed(&error);
            return Err(error);
        }
        let last = process.slot().and_then(|slot| slot.load::<LastResult>(now));
        let fits = |last: &Arc<LastResult>| {
            last.questions == questions.number && Arc::ptr_eq(&last.settings, &questions.settings)
        };
        let Some(last) = last.filter(fits) else { return Ok(None) };
        for evidence in &last.evidence {
            if !evidence.holds(&dir_of(&self.proc_root, process.pid())).await {
                return Ok(None);
            }
        }
        process.is_alive()?;
        Ok(Some(last.subject.clone()))
    }
}

impl Questions {
    /// The user or group that this selector asks for, as far as it is known.
    pub fn account(&self, selector: &Selector) -> Option<Account> {
        (selector.kind() == UnixAttestor::NAME).then(|| self.unix.account(selector.value()))?
    }

    /// Why nobody has this selector, where that is certain: the user database may yet answer.
    pub fn nobodys(&self, selector: &Selector) -> Option<String> {
        let is_unanswered =
            || selector.kind() == UnixAttestor::NAME && self.unix.is_unanswered(selector.value());
        self.absent(selector).filter(|_| !is_unanswered())
    }

    /// Whether an entry may be a process's that asks for selectors of these kinds, and of this attestor's for nothing else but
    /// what was `found`.
    fn may_ask(&self, attestor: &'static str, found: &Selectors, words: &[&'static str]) -> bool {
        let kinds: Vec<SelectorKind> = words.iter().map(|word| SelectorKind { attestor, word }).collect();
        self.doubts.asks_of(found, &kinds, |selector| self.untellable(selector))
    }
}

/// The supplementary groups that a process connected with, where these are few and that is no longer ago than a result may be
/// used, and until when it is not.
fn groups_at_first(process: &dyn Attestable, now: Instant) -> Option<(&[u32], Instant)> {
    let until = process.new_since().map(|since| since + REUSE).filter(|until| now < *until)?;
    match process.connected_with_groups()? {
        ConnectedGroups::Few(groups) => Some((groups, until)),
        ConnectedGroups::Many(_) => None,
    }
}

/// Whether this is what an agent reads that is not root's of another user's process, where `/proc` is mounted with hidepid (2, 1).
fn may_be_hidden(error: &AttestError) -> bool {
    match error {
        AttestError::Gone => true,
        AttestError::Status(ProcReadError::Read { source, .. }) => {
            source.kind() == io::ErrorKind::PermissionDenied
        }
        _ => false,
    }
}

/// The attestation, unless an entry may be the process's by what could not be told.
fn without_doubt(mut attestation: Attestation, questions: &Questions) -> Result<Attestation, AttestError> {
    match doubted(&attestation, questions) {
        Some(at) => Err(attestation.untold.swap_remove(at).1.into()),
        None => Ok(attestation),
    }
}

/// The place in `untold` of what keeps an entry from being the process's, or from not being it.
fn doubted(attestation: &Attestation, questions: &Questions) -> Option<usize> {
    if attestation.untold.is_empty() {
        return None;
    }
    let untold = attestation.untold.iter().map(|(kind, _)| *kind);
    let untold: Vec<SelectorKind> =
        untold.filter(|kind| !questions.settings.is_optional(kind.attestor)).collect();
    let kind_of = |selector: &Selector| questions.untellable(selector);
    let kind = questions.doubts.first(&attestation.selectors, &untold, kind_of)?;
    attestation.untold.iter().position(|(it, _)| *it == kind)
}

/// The series of attestation.
struct AttestMetrics {
    seconds: By<AttestorName, Histogram>,
    /// Of those that are in use.
    failures: By<AttestorName, Option<By<AttestFault, Counter>>>,
}

impl AttestMetrics {
    fn new(make: Registry<'_>, settings: &AttestSettings) -> Self {
        Self {
            seconds: make
                .histograms("durward_attestation_duration_seconds", "Time to learn a peer's selectors."),
            failures: By::new(|attestor: AttestorName| {
                let counters = || {
                    By::new(|reason: AttestFault| {
                        let name = "durward_attestation_failures_total";
                        let help = "Peers that could not be attested.";
                        let labels =
                            [(AttestorName::KEY, attestor.text()), (AttestFault::KEY, reason.text())];
                        // Only the kubelet lists anybody.
                        match (attestor, reason) {
                            (AttestorName::Unix, AttestFault::Unlisted) => {
                                make.counter_once_used(name, help, &labels)
                            }
                            _ => make.counter(name, help, &labels),
                        }
                    })
                };
                settings.uses(attestor).then(counters)
            }),
        }
    }

    /// Counts an attestation that ended. A kept result that is used once more is none.
    fn count(&self, attested: &Result<Attestation, AttestError>) {
        match attested {
            Ok(attestation) => {
                for AttestorSaid { attestor, took, .. } in &attestation.said {
                    self.seconds.with(*attestor, |seconds| seconds.record(*took));
                }
            }
            Err(error) => self.failed(error),
        }
    }

    fn failed(&self, error: &AttestError) {
        for attestor in AttestorName::VALUES.iter().filter(|attestor| error.concerns(**attestor)) {
            self.failures.with(*attestor, |by| {
                if let Some(by) = by {
                    by.with(error.fault(), |n| n.increment(1));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Mutex};

    use nix::unistd::{Gid, Pid, Uid};

    use super::*;
    use crate::{
        limits::CallerKey,
        os::pidfd::Owner,
        peer::{pod::PodPlace, slot::PeerSlot},
        telemetry::metrics::Metrics,
    };

    /// A process of the fixtures: alive until the test says otherwise.
    struct Fixture {
        pid: i32,
        owner: (u32, u32),
        /// What `is_alive` answers, one after the other; at the end, alive.
        fates: Mutex<Vec<AttestError>>,
        slot: PeerSlot,
        place: Option<PodPlace>,
        connected_with: ConnectedGroups,
        new_since: Option<Instant>,
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

        fn place(&self) -> Option<PodPlace> {
            self.place
        }

        fn connected_with_groups(&self) -> Option<&ConnectedGroups> {
            Some(&self.connected_with)
        }

        fn new_since(&self) -> Option<Instant> {
            self.new_since
        }
    }

    fn fixture(pid: i32, owner: (u32, u32)) -> Fixture {
        let slot = PeerSlot::default();
        let connected_with = ConnectedGroups::Few(Box::default());
        Fixture { pid, owner, fates: Mutex::default(), slot, place: None, connected_with, new_since: None }
    }

    fn attestor(case: &str) -> Attestor {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/proc").join(case);
        Attestor { proc_root: root, ..Attestor::new(AttestSettings::default()) }
    }

    /// What no entries ask for.
    fn nothing() -> Questions {
        Questions::default()
    }

    /// What entries ask for that ask for a group which nobody is in.
    fn a_group(attestor: &Attestor) -> Arc<Questions> {
        attestor.prepare_for(&Arc::new(EntryIndex::new([Entry::asking("unix:supplementary_gid:9")])))
    }

    /// Whether the second is the first once more.
    fn same(first: &Subject, second: &Subject) -> bool {
        Arc::ptr_eq(&first.0, &second.0)
    }

    #[tokio::test]
    async fn status_becomes_selectors() {
        for (case, pid, owner, want) in [
            ("user-with-groups", 4100, (1000, 1001), "gid:1001 supplementary_gid:24 uid:1000"),
            ("root-without-groups", 4101, (0, 0), "gid:0 uid:0"),
            ("hostile-name", 4102, (1000, 1000), "gid:1000 uid:1000"),
            ("effective-differs", 4103, (21, 11), "gid:11 supplementary_gid:7 uid:21"),
        ] {
            let attestor = attestor(case);
            // It is in groups that nobody asks for, and an entry asks for one that it is not in.
            let entries = ["unix:supplementary_gid:24 unix:supplementary_gid:7", "unix:supplementary_gid:9"];
            let questions = attestor.prepare_for(&Arc::new(EntryIndex::new(entries.map(Entry::asking))));
            let selectors = attestor.subject(&fixture(pid, owner), &questions).await.unwrap();
            let values: BTreeSet<&str> = selectors.iter().map(|s| s.value()).collect();
            assert_eq!(values, want.split(' ').collect(), "{case}");
            assert!(selectors.iter().all(|s| s.kind() == "unix"), "{case}");
        }
    }

    /// An attestor with a user database that knows the user `web` as 1000, nobody called `gone`, and nothing of others.
    fn with_names(case: &str) -> Attestor {
        let mut attestor = attestor(case);
        attestor.attestors.unix = UnixAttestor::knowing(&attestor.news, |name| match name.text() {
            "web" => Ok(Some(1000)),
            "gone" => Ok(None),
            _ => Err(nix::errno::Errno::EIO),
        });
        attestor
    }

    #[tokio::test]
    async fn names_are_those_that_entries_ask_for() {
        const NO_NAMES: &str = "the user database does not answer for a name that an entry asks for";
        for (case, entries, want) in [
            ("nobody asks for a name", "unix:uid:1000", Ok("")),
            ("its own", "unix:user:web", Ok("user:web")),
            ("its own, beside another's", "unix:user:web / unix:user:gone", Ok("user:web")),
            ("nobody's", "unix:user:gone", Ok("")),
            ("a user's and not a group's", "unix:group:web", Ok("")),
            ("its group's and not its user's", "unix:supplementary_group:web", Ok("")),
            ("not answered, and all of an entry", "unix:user:x", Err(NO_NAMES)),
            ("not answered, and the rest fits", "unix:user:x unix:uid:1000", Err(NO_NAMES)),
            ("not answered, and the rest is another's", "unix:user:x unix:uid:7", Ok("")),
            ("not answered, and the rest is nobody's", "unix:user:x unix:group:gone", Ok("")),
            ("not answered, beside its own", "unix:user:web / unix:group:x unix:uid:7", Ok("user:web")),
            ("a group that is not answered", "unix:group:x unix:gid:1001", Err(NO_NAMES)),
            ("one of its groups that is not answered", "unix:supplementary_group:x", Err(NO_NAMES)),
        ] {
            let attestor = with_names("user-with-groups");
            let entries: Vec<_> = entries.split('/').map(Entry::asking).collect();
            let index = Arc::new(EntryIndex::new(entries));
            attestor.prepare_for(&index);
            attestor.wait(Duration::from_secs(60));
            let questions = attestor.prepare_for(&index);
            let got = attestor.subject(&fixture(4100, (1000, 1001)), &questions).await;
            let named = |subject: Subject| {
                let named = subject.iter().map(|it| it.value()).filter(|value| !value.contains("id:"));
                named.collect::<Vec<_>>().join(" ")
            };
            let want = want.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(got.map(named).map_err(|error| error.to_string()), want, "{case}");
        }
    }

    /// It lives, and is not found in `/proc`.
    #[tokio::test]
    async fn a_process_that_is_hidden_has_what_depends_on_no_supplementary_group() {
        for (case, entries, is_told) in [
            ("its user", "unix:uid:1000 / unix:uid:7 unix:supplementary_gid:9", true),
            ("its user, and a group", "unix:uid:1000 / unix:uid:1000 unix:supplementary_gid:9", false),
            ("its user, and a group by name", "unix:uid:1000 unix:supplementary_group:web", false),
            ("another's, and a group by name", "unix:uid:7 unix:supplementary_group:web", true),
            (
                "its user, and one that is not answered",
                "unix:uid:1000 unix:supplementary_group:x / unix:uid:7 unix:supplementary_gid:9",
                false,
            ),
            ("a group, whoever it is", "unix:uid:1000 / unix:supplementary_gid:9", false),
            (
                "a group, and one that nobody is in",
                "unix:supplementary_gid:9 unix:supplementary_group:gone",
                true,
            ),
        ] {
            let attestor = with_names("user-with-groups");
            let index = Arc::new(EntryIndex::new(entries.split('/').map(Entry::asking)));
            attestor.prepare_for(&index);
            attestor.wait(Duration::from_secs(60));
            let questions = attestor.prepare_for(&index);
            let got = attestor.subject(&fixture(4099, (1000, 1001)), &questions).await;
            let values = |subject: Subject| {
                subject.iter().map(|it| it.value().to_owned()).collect::<Vec<_>>().join(" ")
            };
            match (got.map(values), is_told) {
                (Ok(values), true) => assert_eq!(values, "gid:1001 uid:1000", "{case}"),
                (Err(error), false) => {
                    assert!(
                        matches!(error, AttestError::Attestor(AttestorError::Unix(UnixError::HiddenGroups))),
                        "{case}: {error}"
                    );
                }
                (got, _) => panic!("{case}: {got:?}"),
            }
        }
    }

    #[tokio::test]
    async fn what_comes_to_be_known_is_asked_from_the_next_snapshot_on() {
        let attestor = with_names("user-with-groups");
        let index = Arc::new(EntryIndex::new([Entry::asking("unix:user:web")]));
        let mut news = attestor.news();
        news.mark_unchanged();
        let first = attestor.prepare_for(&index);
        attestor.wait(Duration::from_secs(60));
        assert!(news.has_changed().unwrap());
        let second = attestor.prepare_for(&index);
        assert!(!Arc::ptr_eq(&first, &second));
        assert!(Arc::ptr_eq(&second, &attestor.prepare_for(&index)), "and stays until there is more");

        // A kept result is of use for the questions that it was found for.
        let process = fixture(4100, (1000, 1001));
        let of_second = attestor.subject(&process, &second).await.unwrap();
        assert!(same(&of_second, &attestor.subject(&process, &second).await.unwrap()));
        let other = attestor.prepare_for(&Arc::new(EntryIndex::new([Entry::asking("unix:uid:1")])));
        assert!(!same(&of_second, &attestor.subject(&process, &other).await.unwrap()));
        let of_second = attestor.subject(&process, &second).await.unwrap();
        assert!(of_second.iter().any(|it| it.value() == "user:web"), "those of an older snapshot hold on");
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
                "/proc hides the supplementary groups of the caller's processes from the agent (hidepid)",
                Blame::Crowd,
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
            let attestor = attestor(case);
            let questions = a_group(&attestor);
            let err = attestor.subject(&fixture(pid, owner), &questions).await.unwrap_err();
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
        assert!(gone.slot.load::<LastResult>(Instant::now()).is_none(), "and nothing is kept");

        // It is not found any more, which a hidden one is not either.
        let not_there = fixture(4099, (1000, 1001));
        not_there.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&not_there, &a_group(&attestor)).await, Err(AttestError::Gone)));

        // What is read in place of a process that is gone may be anything; the reason is that it is gone.
        let replaced = fixture(4100, (0, 0));
        replaced.fates.lock().unwrap().push(AttestError::Gone);
        assert!(matches!(attestor.subject(&replaced, &a_group(&attestor)).await, Err(AttestError::Gone)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_is_kept_for_a_second() {
        let attestor = attestor("user-with-groups");
        let (process, nothing) = (fixture(4100, (1000, 1001)), nothing());
        let first = attestor.subject(&process, &nothing).await.unwrap();
        tokio::time::advance(REUSE - Duration::from_millis(2)).await;
        assert!(same(&first, &attestor.subject(&process, &nothing).await.unwrap()), "within the second");
        tokio::time::advance(Duration::from_millis(4)).await;
        let second = attestor.subject(&process, &nothing).await.unwrap();
        assert!(!same(&first, &second), "after it: use does not prolong it");
        assert_eq!(first, second);

        process.fates.lock().unwrap().push(AttestError::Gone);
        assert!(
            matches!(attestor.subject(&process, &nothing).await, Err(AttestError::Gone)),
            "alive for every use"
        );
    }

    /// Reading it is what costs.
    #[tokio::test(start_paused = true)]
    async fn a_process_of_too_many_groups_is_not_read_again_and_again() {
        let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/proc");
        let dir = tempfile::tempdir().unwrap();
        let (of_many, of_one) = (dir.path().join("4104"), dir.path().join("4105"));
        let becomes = |process: &std::path::Path, case: &str| {
            let text = std::fs::read(fixtures.join(case).join("status")).unwrap();
            std::fs::create_dir_all(process).unwrap();
            std::fs::write(process.join("status"), text).unwrap();
        };
        let attestor = Attestor { proc_root: dir.path().into(), ..attestor("many-groups") };
        let asked = a_group(&attestor);
        let too_many = |error: Result<Subject, AttestError>| {
            matches!(error.unwrap_err(), AttestError::Status(ProcReadError::TooManyGroups))
        };

        let process = fixture(4104, (1000, 1000));
        becomes(&of_many, "many-groups/4104");
        assert!(too_many(attestor.subject(&process, &asked).await), "read");
        becomes(&of_many, "hostile-name/4102");
        assert!(too_many(attestor.subject(&process, &asked).await), "remembered");
        process.fates.lock().unwrap().push(AttestError::Gone);
        assert!(
            matches!(attestor.subject(&process, &asked).await, Err(AttestError::Gone)),
            "alive each time"
        );
        tokio::time::advance(REUSE).await;
        attestor.subject(&process, &asked).await.unwrap();

        becomes(&of_one, "hostile-name/4102");
        let connected_with = |number| Fixture {
            connected_with: ConnectedGroups::Many(number),
            new_since: Some(Instant::now()),
            ..fixture(4105, (1000, 1000))
        };
        let refused = attestor.subject(&connected_with(status::MAX_GROUPS + 1), &asked).await;
        assert!(too_many(refused), "known by its socket, and not read");
        attestor.subject(&connected_with(status::MAX_GROUPS), &asked).await.unwrap();

        // Whom no entry asks for its groups is not read, whatever they are.
        std::fs::remove_file(of_one.join("status")).unwrap();
        attestor.subject(&connected_with(status::MAX_GROUPS + 1), &nothing()).await.unwrap();
    }

    /// What the kernel makes for an open `/proc/PID` is charged to the agent, and whoever opens the same keeps it.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_opened_of_a_process_of_which_nothing_is_to_be_read() {
        // Nothing can be opened here.
        let none = tempfile::tempdir().unwrap();
        let attestor = Attestor { proc_root: none.path().into(), ..attestor("user-with-groups") };
        let discovers = UnixSettings { discover_workload_path: true, ..UnixSettings::default() };
        attestor.reload(AttestSettings {
            unix: AttestorBlock { enabled: true, optional: false, settings: discovers },
            ..AttestSettings::default()
        });
        for (case, asked, after, opens) in [
            ("no entry", "", 0, false),
            ("its user", "unix:uid:1000", 5000, false),
            ("its user and group", "unix:uid:1000 unix:gid:1001", 5000, false),
            ("another user's executable", "unix:uid:7 unix:path:/bin/web", 5000, false),
            ("its own executable", "unix:uid:1000 unix:path:/bin/web", 5000, true),
            ("a group, as it connects", "unix:supplementary_gid:9", 999, false),
            ("a group, later", "unix:supplementary_gid:9", 1000, true),
        ] {
            let entries = (!asked.is_empty()).then(|| Entry::asking(asked));
            let questions = attestor.prepare_for(&Arc::new(EntryIndex::new(entries)));
            for pid in 1..=50 {
                let process = Fixture { new_since: Some(Instant::now()), ..fixture(pid, (1000, 1001)) };
                tokio::time::advance(Duration::from_millis(after)).await;
                let attested = attestor.subject(&process, &questions).await;
                assert_eq!(attested.is_err(), opens, "{case}: {attested:?}");
            }
        }
    }

    /// Who connected a moment ago in few groups is not read: it is in those.
    #[tokio::test(start_paused = true)]
    async fn for_a_second_a_process_is_in_the_groups_that_it_connected_with() {
        let attestor = attestor("user-with-groups");
        let index =
            EntryIndex::new(["unix:supplementary_gid:24 unix:supplementary_gid:7"].map(Entry::asking));
        let questions = attestor.prepare_for(&Arc::new(index));
        let group = |subject: Subject| {
            let mut of = subject.iter().filter_map(|it| it.value().strip_prefix("supplementary_gid:"));
            of.next().map(|gid| gid.parse::<u32>().unwrap())
        };
        let connected_with = ConnectedGroups::Few([7].into());
        let process =
            Fixture { connected_with, new_since: Some(Instant::now()), ..fixture(4100, (1000, 1001)) };
        for (case, millis, want) in
            [("at first", 0, 7), ("still", 990, 7), ("by now it is in another", 20, 24), ("still", 500, 24)]
        {
            tokio::time::advance(Duration::from_millis(millis)).await;
            let found = attestor.subject(&process, &questions).await.unwrap();
            assert_eq!(group(found), Some(want), "{case}");
        }
        let updated = Fixture { new_since: None, ..process };
        updated.slot.clear();
        assert_eq!(
            group(attestor.subject(&updated, &questions).await.unwrap()),
            Some(24),
            "what a stream is sent"
        );
    }

    #[tokio::test]
    async fn attestations_are_counted_and_kept_results_are_not() {
        let metrics = Metrics::default();
        let attestor = attestor("user-with-groups").counted_by(metrics.registry());
        let (process, nothing) = (fixture(4100, (1000, 1001)), nothing());
        for _ in 0..2 {
            attestor.subject(&process, &nothing).await.unwrap();
        }
        let (hidden, gone) = (fixture(4099, (1000, 1001)), fixture(4099, (1000, 1001)));
        gone.fates.lock().unwrap().push(AttestError::Gone);
        for process in [hidden, gone] {
            attestor.subject(&process, &a_group(&attestor)).await.unwrap_err();
        }
        let text = metrics.render();
        for line in [
            r#"durward_attestation_duration_seconds_count{attestor="unix"} 1"#,
            r#"durward_attestation_failures_total{attestor="unix",reason="gone"} 1"#,
            r#"durward_attestation_failures_total{attestor="unix",reason="unreadable"} 1"#,
            r#"durward_attestation_failures_total{attestor="unix",reason="busy"} 0"#,
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in:\n{text}");
        }
    }
}
