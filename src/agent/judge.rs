//! Gathers what is known of the node, judges by it whether anybody can be served whom entries ask for, and tells it: probes where
//! nobody can, the log and the status also where some cannot.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::unistd::geteuid;
use tokio::sync::watch;

use super::{
    ANSWERS_WITHIN,
    surroundings::Around,
    verdict::{Apart, EntriesVerdict, Facts},
    way_in::{GroupBook, SocketWay, WayIn},
};
use crate::{
    attest::{
        Attestor, Questions,
        unix::{Account, may_look_at_executables},
    },
    os::{
        accounts::FilesStamp,
        clock::sleep_to_beat,
        namespace::{MappedAccounts, owns_its_mounts},
    },
    peer::{
        socket::Presence,
        way::{self, Mark},
    },
    store::{Store, audit::AuditTrail},
    telemetry::health::{HealthState, Lost, Probe, Ungiven},
};

/// How often it is looked what stands on the way to the socket.
const LOOK: Duration = Duration::from_secs(5);

/// Whom it asks.
pub(super) struct Witnesses {
    pub(super) attestor: Arc<Attestor>,
    pub(super) store: Arc<Store>,
    pub(super) audit: Arc<AuditTrail>,
    pub(super) way_in: Arc<WayIn>,
    /// Of the socket of the Workload API, where it has a path.
    pub(super) presence: Option<Presence>,
    pub(super) has_server: bool,
}

/// Judges, again and again.
pub(super) struct Judge {
    witnesses: Arc<Witnesses>,
    groups: Arc<Mutex<GroupBook>>,
    health: Arc<HealthState>,
    around: watch::Receiver<Around>,
    found: watch::Sender<Vec<String>>,
    seen: Sighting,
    said: Said,
}

/// What was seen of the socket at the last look.
#[derive(Clone, Debug)]
struct Sighting {
    is_there: bool,
    is_hidden: bool,
    /// All that is shut.
    way: SocketWay,
    /// What of that keeps out those whom nobody has seen come in spite of it.
    left: SocketWay,
}

/// What the log was told last.
#[derive(Debug, Default)]
struct Said {
    /// Why nobody can be served.
    causes: Option<Vec<&'static str>>,
    /// Why some cannot.
    some: Vec<String>,
}

impl Judge {
    /// Looks and judges for the first time. With it comes what is found, in words. Blocks this thread for a moment.
    pub(super) fn begin(
        witnesses: Witnesses,
        health: Arc<HealthState>,
        around: watch::Receiver<Around>,
    ) -> (Self, watch::Receiver<Vec<String>>) {
        let (witnesses, groups) = (Arc::new(witnesses), Arc::<Mutex<GroupBook>>::default());
        // It was bound a moment ago.
        let seen = Sighting { is_there: true, ..witnesses.look(&groups) };
        let (found, found_told) = watch::channel(Vec::new());
        let mut judge = Self { witnesses, groups, health, around, found, seen, said: Said::default() };
        judge.witnesses.ask_ahead();
        let judged = judge.witnesses.judge(&judge.seen, judge.around.borrow().clone());
        judge.tell(judged);
        judge.tell_of_hiding(false);
        (judge, found_told)
    }

    /// Looks again every few seconds, and judges anew whenever something is known that was not, until the agent drains.
    pub(super) async fn run(mut self) {
        let Witnesses { store, attestor, .. } = &*self.witnesses;
        let (mut snapshots, mut tries) = (store.subscribe(), attestor.tries());
        let mut due = Box::pin(sleep_to_beat(LOOK));
        loop {
            let (goes_on, looks) = tokio::select! {
                changed = snapshots.changed() => (changed.is_ok(), false),
                changed = tries.changed() => (changed.is_ok(), false),
                changed = self.around.changed() => (changed.is_ok(), false),
                () = &mut due => (true, true),
            };
            if !goes_on || self.health.get() == Probe::Draining {
                return;
            }
            if looks {
                due = Box::pin(sleep_to_beat(LOOK));
                let (witnesses, groups) = (Arc::clone(&self.witnesses), Arc::clone(&self.groups));
                // No thread, no answer: that is for the next look.
                let looked = tokio::task::spawn_blocking(move || witnesses.look(&groups)).await;
                if let Ok(seen) = looked {
                    let before = std::mem::replace(&mut self.seen, seen);
                    self.tell_of_way(&before);
                    self.tell_of_hiding(before.is_hidden);
                }
            }
            self.witnesses.ask_ahead();
            let (witnesses, seen) = (Arc::clone(&self.witnesses), self.seen.clone());
            let around = self.around.borrow().clone();
            let judged = tokio::task::spawn_blocking(move || witnesses.judge(&seen, around)).await;
            if self.health.get() == Probe::Draining {
                return;
            }
            if let Ok(judged) = judged {
                self.tell(judged);
            }
        }
    }

    /// Tells probes and the log.
    fn tell(&mut self, judged: Judged) {
        let Judged { ungiven, is_tried, some, found } = judged;
        let causes = ungiven.as_ref().filter(|_| is_tried).map(|ungiven| ungiven.causes.clone());
        if causes != self.said.causes && (is_tried || ungiven.is_none()) {
            match &ungiven {
                Some(ungiven) => tracing::error!("nobody can be served: {}", ungiven.said),
                None => tracing::warn!("those whom entries ask for can be served again"),
            }
            self.said.causes = causes;
        }
        self.health.gives_nothing(ungiven);
        for why in some.iter().filter(|why| !self.said.some.contains(why)) {
            tracing::warn!("{why}");
        }
        let mut all = self.around.borrow().in_spite_of.clone();
        all.extend(found.into_iter().chain(some.iter().cloned()));
        self.said.some = some;
        self.found.send_if_modified(|known| {
            let is_news = *known != all;
            *known = all;
            is_news
        });
    }

    /// Tells the log what became of the way to the socket, and probes whether it is there.
    fn tell_of_way(&self, before: &Sighting) {
        let Some(presence) = &self.witnesses.presence else { return };
        let (seen, path) = (&self.seen, presence.path().display());
        for shut in seen.way.shut.iter().filter(|shut| !before.way.shut.contains(shut)) {
            tracing::warn!(%path, "other users cannot reach the socket of the workload api any more: {shut}");
        }
        if seen.way.shut.is_empty() && !before.way.shut.is_empty() {
            tracing::warn!(%path, "other users can reach the socket of the workload api again");
        }
        let lost = match (seen.is_there, presence.handed_over) {
            (true, _) => Lost::No,
            (false, false) => Lost::UntilRestart,
            (false, true) => Lost::UntilMade,
        };
        match (before.is_there, lost) {
            (true, Lost::UntilRestart) => tracing::error!(
                %path,
                "the socket of the workload api is gone from its path, and nobody can connect: restart the agent"
            ),
            (true, Lost::UntilMade) => tracing::error!(
                %path,
                "the socket of the workload api is gone from its path, and nobody can connect: restart its socket unit"
            ),
            (false, Lost::No) => {
                tracing::warn!(%path, "the socket of the workload api is at its path again");
            }
            _ => {}
        }
        self.health.found(lost);
    }

    fn tell_of_hiding(&self, was_hidden: bool) {
        if let Some(why) = self.seen.hiding(&self.witnesses).filter(|_| !was_hidden) {
            tracing::warn!("{why}");
        }
    }
}

/// What came of it.
struct Judged {
    ungiven: Option<Ungiven>,
    /// Attestors have tried whether they can tell what entries ask for.
    is_tried: bool,
    /// What keeps everybody from some entries.
    some: Vec<String>,
    /// What else is to be told of the way.
    found: Vec<String>,
}

impl Witnesses {
    fn ask_ahead(&self) {
        self.attestor.ask_ahead(&self.store.snapshot().questions);
    }

    /// Looks at the way to the socket. May wait.
    fn look(&self, groups: &Mutex<GroupBook>) -> Sighting {
        self.audit.note_again();
        let Some(presence) = &self.presence else {
            let (way, left) = (SocketWay::default(), SocketWay::default());
            return Sighting { is_there: true, is_hidden: false, way, left };
        };
        let (is_there, is_hidden) = (presence.is_there(), presence.is_hidden_from_the_node());
        let shut = way::shut_on_the_way(presence.path());
        let users = self.users_before(&shut);
        let mut book = groups.lock().unwrap_or_else(PoisonError::into_inner);
        let memberships = book.look_up(&users, FilesStamp::now(), Instant::now() + ANSWERS_WITHIN);
        drop(book);
        // Last, so that what is opened and shut again while it is looked at shows at the next look.
        let marks = shut.iter().map(|shut| Mark::of(&shut.path)).collect();
        let way = SocketWay { shut, memberships };
        let left = self.way_in.look(way.clone(), marks, Instant::now());
        Sighting { is_there, is_hidden, way, left }
    }

    /// The users whom entries ask for, where a group is let through which they may be in.
    fn users_before(&self, shut: &[way::Shut]) -> BTreeSet<u32> {
        if shut.iter().all(|shut| shut.group.is_none()) {
            return BTreeSet::new();
        }
        let snapshot = self.store.snapshot();
        let selectors = snapshot.index.entries().iter().flat_map(|entry| &entry.selectors);
        let accounts = selectors.filter_map(|selector| snapshot.questions.account(selector));
        let users = accounts.filter_map(|account| match account {
            Account::User(uid) => (uid != 0).then_some(uid),
            Account::Group(_) => None,
        });
        users.collect()
    }

    /// Judges by what was seen.
    fn judge(&self, seen: &Sighting, around: Around) -> Judged {
        let snapshot = self.store.snapshot();
        let (entries, questions) = (snapshot.index.entries(), &*snapshot.questions);
        let of_node = node_facts(&self.attestor, questions, &around);
        // In the container of a pod whoever else is in it, a probe or an admin's shell, is not whom it is there for.
        let met_others =
            self.audit.has_given() || !around.of_own_container && self.attestor.has_met_neighbours();
        let all_are_strangers = around.has_strangers && self.attestor.has_met_strangers() && !met_others;
        let apart = if all_are_strangers { Apart::Everybody } else { of_node.apart };
        let facts = Facts { way: seen.left.clone(), apart, has_server: self.has_server, ..of_node };
        let at = self.presence.as_ref();
        let verdict = EntriesVerdict::of(entries, questions, &facts);
        let ungiven = verdict.ungiven(&facts, questions, at);
        let some = verdict.of_some(&facts, questions, at);
        let found = at.map(|at| seen.way.found(at)).unwrap_or_default();
        let found = found.into_iter().chain(seen.hiding(self)).collect();
        Judged { is_tried: verdict.is_tried(&facts), ungiven, some, found }
    }
}

/// What is known of the node, but for the way to the socket.
pub(super) fn node_facts(attestor: &Attestor, questions: &Questions, around: &Around) -> Facts {
    let own_user = geteuid().as_raw();
    // Each time: a namespace may be given its map after it was made, which is once.
    let mapped = MappedAccounts::own();
    Facts {
        way: SocketWay::default(),
        executables_unbelieved: mapped.is_some() && !owns_its_mounts(),
        mapped,
        traces_only: (!may_look_at_executables()).then_some(own_user),
        sees_only: around.hides_others.then_some(own_user),
        knows_groups_only: around.hides_groups.then_some(own_user),
        apart: if around.of_own_container { Apart::OtherPods } else { Apart::Nobody },
        outages: attestor.outages(questions),
        has_server: false,
    }
}

impl Sighting {
    /// That others do not find the socket, in a sentence.
    fn hiding(&self, witnesses: &Witnesses) -> Option<String> {
        let presence = witnesses.presence.as_ref().filter(|_| self.is_hidden)?;
        Some(format!(
            "the node's first process does not find the socket at {}: it is on what is mounted for the agent alone (systemd: \
             PrivateTmp, TemporaryFileSystem); choose another socket_path, unless its clients are in there too",
            presence.path().display()
        ))
    }
}
