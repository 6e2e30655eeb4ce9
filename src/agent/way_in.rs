//! Whether those get to the socket whom entries ask for. A directory above it that only its owner can enter may be meant, where
//! root and that owner are all the callers; where an entry asks for somebody else, nobody with that identity is ever served,
//! and only the agent can know it: who is kept out never connects. While that is so of some entries it is told, and while it is
//! so of all of them the agent is not ready.
//!
//! Nobody is said to be kept out who may get in: by a group, as far as a directory lets any group through, or by another way,
//! as into a container into which the socket's directory is mounted. So who comes in spite of it is believed, and of an entry
//! that asks for a pod nothing is said.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use arc_swap::ArcSwap;

use crate::{
    attest::{Questions, unix::Account},
    identity::{Entry, Selector},
    os::namespace::MappedUsers,
    peer::socket::{Presence, Shut},
    store::Snapshot,
    telemetry::health::HealthState,
};

/// What of `shut` let nobody in but a few from the start, each in a sentence with what to do if others should get in too.
pub(super) fn found(shut: &[Shut], presence: &Presence) -> Vec<String> {
    let from_the_start = shut.iter().filter(|shut| presence.shut().contains(shut));
    let said = from_the_start.map(|shut| {
        let opens = opens(shut, presence);
        format!("{shut}, so no user but its owner reaches the socket, and root: {opens} if others should")
    });
    said.collect()
}

/// What lets others in.
fn opens(shut: &Shut, presence: &Presence) -> String {
    if shut.path == presence.path() {
        "SocketMode=0666 in the socket unit".to_owned()
    } else {
        format!("chmod o+x {}", shut.path.display())
    }
}

/// The way to the socket, as it was at the last look.
#[derive(Debug, Default)]
pub(super) struct WayIn {
    shut: ArcSwap<Vec<Shut>>,
    /// Somebody has connected whom that would have kept out: there is another way.
    others_came: AtomicBool,
    /// What the log was told last of entries that are not all of them.
    said: Mutex<Option<String>>,
}

/// The entries whose processes do not get to the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptOut {
    /// In words, with what to do.
    said: String,
    /// There is no other entry.
    all: bool,
}

impl WayIn {
    /// A process of this user has connected.
    pub(super) fn came(&self, uid: u32) {
        if self.shut.load().iter().any(|shut| !shut.lets_through(uid)) {
            self.others_came.store(true, Relaxed);
        }
    }

    /// Whether there is another way than past what is shut.
    pub(super) fn has_another(&self) -> bool {
        self.others_came.load(Relaxed)
    }

    /// Takes note of what is shut now.
    pub(super) fn look(&self, shut: &[Shut]) {
        let before = self.shut.load();
        if before.as_slice() != shut {
            // Who came past less says nothing of more.
            let is_more = shut.iter().any(|shut| !before.contains(shut));
            self.shut.store(shut.to_vec().into());
            if is_more {
                self.others_came.store(false, Relaxed);
            }
        }
    }

    /// What of `shut` keeps those out whom entries ask for, and what to do.
    pub(super) fn kept_out(
        &self,
        shut: &[Shut],
        presence: &Presence,
        snapshot: &Snapshot,
    ) -> Option<KeptOut> {
        let shut = if self.has_another() { &[] } else { shut };
        let users = MappedUsers::own();
        if shut.is_empty() && users.is_none() {
            return None;
        }
        let has_user = |uid| users.as_ref().is_none_or(|users| users.has(uid));
        let entries = snapshot.index.entries();
        let mut kept_out = entries.iter().filter_map(|entry| {
            let (by, selector) = keeps_out(shut, has_user, entry, &snapshot.questions)?;
            Some((entry, by, selector))
        });
        let (entry, by, selector) = kept_out.next()?;
        let more = kept_out.count();
        let of_more = match more {
            0 => String::new(),
            1 => " (and 1 more entry)".to_owned(),
            more => format!(" (and {more} more entries)"),
        };
        let id = &entry.spiffe_id;
        let said = match by {
            KeptOutBy::Shut(by) => format!(
                "entry \"{id}\" asks for {selector}, but no such process can reach the socket {}: {by}{of_more}; {}, or choose \
                 another socket_path",
                presence.path().display(),
                opens(by, presence)
            ),
            KeptOutBy::Namespace => format!(
                "entry \"{id}\" asks for {selector}, a user who has no number in the user namespace of the agent{of_more}; run the \
                 agent outside of it, or map that user"
            ),
        };
        Some(KeptOut { said, all: more + 1 == entries.len() })
    }

    /// Tells, and says when that begins or ends, that nobody can be served. Returns what is to be told where some are.
    pub(super) fn tell(&self, health: &HealthState, kept_out: Option<KeptOut>) -> Option<String> {
        let (all, some) = match kept_out {
            Some(KeptOut { said, all: true }) => (Some(said), None),
            Some(KeptOut { said, all: false }) => (None, Some(said)),
            None => (None, None),
        };
        let news = all.clone();
        match (health.keeps_out(all), news) {
            (true, Some(why)) => tracing::error!("nobody can be served: {why}"),
            (true, None) => tracing::info!(
                "processes that entries ask for can reach the socket of the workload api again"
            ),
            (false, _) => {}
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if *said != some {
            if let Some(why) = &some {
                tracing::warn!("{why}");
            }
            said.clone_from(&some);
        }
        some
    }
}

/// What keeps somebody out.
#[derive(Debug)]
enum KeptOutBy<'a> {
    Shut(&'a Shut),
    /// It has no number here: nobody can tell who that is.
    Namespace,
}

/// What keeps the processes of this entry out, and the selector by which that shows.
fn keeps_out<'a>(
    shut: &'a [Shut],
    has_user: impl Fn(u32) -> bool,
    entry: &'a Entry,
    questions: &Questions,
) -> Option<(KeptOutBy<'a>, &'a Selector)> {
    // The socket's directory is mounted into pods.
    if entry.selectors.iter().any(|selector| selector.kind() == "k8s") {
        return None;
    }
    entry.selectors.iter().find_map(|selector| {
        // A group may be root's, or the owner's, who get in.
        let Account::User(uid) = questions.account(selector)? else { return None };
        if !has_user(uid) {
            return Some((KeptOutBy::Namespace, selector));
        }
        Some((KeptOutBy::Shut(shut.iter().find(|shut| !shut.lets_through(uid))?), selector))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_kept_out_shows_in_what_an_entry_asks_for() {
        let shut = |uid| Shut { path: "/a".into(), uid, mode: 0o700 };
        let (of_root, of_user) = ([shut(0)], [shut(1000)]);
        for (case, shut, selectors, want) in [
            ("nothing is shut", &[][..], "unix:uid:5", None),
            ("root's", &of_root, "unix:uid:0", None),
            ("another's", &of_root, "unix:uid:5", Some("unix:uid:5")),
            ("its owner's", &of_user, "unix:uid:1000", None),
            ("root's, past another's directory", &of_user, "unix:uid:0", None),
            ("another's than the owner's", &of_user, "unix:uid:5", Some("unix:uid:5")),
            ("a group, which may be root's", &of_root, "unix:gid:5", None),
            ("a further group", &of_root, "unix:supplementary_gid:5", None),
            ("another's in a group", &of_root, "unix:gid:5 unix:uid:5", Some("unix:uid:5")),
            ("root in another group", &of_root, "unix:gid:5 unix:uid:0", None),
            ("no account", &of_root, "unix:path:/bin/web", None),
            ("an account that is not known", &of_root, "unix:user:nosuchuser", None),
            ("a pod", &of_root, "k8s:ns:shop unix:uid:5", None),
        ] {
            let entry = Entry::asking(selectors);
            let kept_out = keeps_out(shut, |_| true, &entry, &Questions::default());
            assert_eq!(kept_out.map(|(_, selector)| selector.to_string()).as_deref(), want, "{case}");
        }
        for (selectors, want) in
            [("unix:uid:5", true), ("unix:uid:0", false), ("k8s:ns:shop unix:uid:5", false)]
        {
            let entry = Entry::asking(selectors);
            let kept_out = keeps_out(&[], |uid| uid == 0, &entry, &Questions::default());
            assert_eq!(kept_out.is_some(), want, "{selectors}, where root alone has a number");
        }
    }

    #[test]
    fn who_comes_in_spite_of_it_knows_another_way() {
        let shut = |path: &str| Shut { path: path.into(), uid: 7, mode: 0o700 };
        let way = WayIn::default();
        way.came(8);
        assert!(!way.has_another(), "no way was shut");
        way.look(&[shut("/a")]);
        for (uid, believed) in [(0, false), (7, false), (8, true), (7, true)] {
            way.came(uid);
            assert_eq!(way.has_another(), believed, "{uid}");
        }
        way.look(&[]);
        way.look(&[shut("/a"), shut("/b")]);
        assert!(!way.has_another(), "that was past less");
        way.came(8);
        way.look(&[shut("/b")]);
        assert!(way.has_another(), "less is shut");
    }
}
