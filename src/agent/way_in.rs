//! Whether those get to the socket whom entries ask for. A directory above it that only its owner can enter may be meant, where
//! root and that owner are all the callers; where an entry asks for somebody else, nobody with that identity is ever served,
//! and only the agent can know it: who is kept out never connects.
//!
//! What an agent cannot see is another way in: a container into which the socket's directory is mounted passes by all that is
//! above. So who comes in spite of it is believed, and of an entry that asks for a pod nothing is said.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use nix::unistd::{getegid, getgroups};

use crate::{
    attest::{Questions, unix::Account},
    identity::{Entry, Selector},
    peer::socket::{Presence, Shut},
    store::Snapshot,
};

/// What lets nobody in but a few, each in a sentence with what to do if others should get in too.
pub(super) fn found(presence: &Presence) -> impl Iterator<Item = String> {
    presence.shut().iter().map(|shut| {
        let group = if shut.mode & 0o030 == 0 { "" } else { " and root's group" };
        let opens = opens(shut, presence);
        format!(
            "{shut}, so no user but its owner{group} reaches the socket, and root: {opens} if others should"
        )
    })
}

/// What lets others in.
fn opens(shut: &Shut, presence: &Presence) -> String {
    if shut.path == presence.path() {
        "SocketMode=0666 in the socket unit".to_owned()
    } else {
        format!("chmod o+x {}", shut.path.display())
    }
}

/// The way to the socket, as it was when the agent began to serve.
#[derive(Debug, Default)]
pub(super) struct WayIn {
    shut: Vec<Shut>,
    /// The groups that root's or the agent's own processes are of.
    groups: Vec<u32>,
    /// Somebody has connected whom that would have kept out: there is another way.
    others_came: AtomicBool,
}

impl WayIn {
    pub(super) fn of(presence: Option<&Presence>) -> Self {
        let shut = presence.map(|presence| presence.shut().to_vec()).unwrap_or_default();
        let mut groups = vec![0, getegid().as_raw()];
        groups.extend(getgroups().unwrap_or_default().iter().map(|gid| gid.as_raw()));
        Self { shut, groups, others_came: AtomicBool::new(false) }
    }

    /// A process of this user has connected.
    pub(super) fn came(&self, uid: u32) {
        if self.shut.iter().any(|shut| !shut.lets_through(uid)) {
            self.others_came.store(true, Relaxed);
        }
    }

    /// What of `shut` keeps those out whom an entry asks for, and what to do.
    pub(super) fn kept_out(&self, shut: &[Shut], presence: &Presence, snapshot: &Snapshot) -> Option<String> {
        if shut.is_empty() || self.others_came.load(Relaxed) {
            return None;
        }
        let entries = snapshot.index.entries();
        let mut kept_out = entries.iter().filter_map(|entry| {
            let (by, selector) = self.keeps_out(shut, entry, &snapshot.questions)?;
            Some((entry, by, selector))
        });
        let (entry, by, selector) = kept_out.next()?;
        let more = kept_out.count();
        let mut said = format!(
            "entry \"{}\" asks for {selector}, but no such process can reach the socket {}: {by}",
            entry.spiffe_id,
            presence.path().display()
        );
        let _infallible = match more {
            0 => Ok(()),
            1 => said.write_str(" (and 1 more entry)"),
            more => write!(said, " (and {more} more entries)"),
        };
        let _infallible = write!(said, "; {}, or choose another socket_path", opens(by, presence));
        Some(said)
    }

    /// What keeps the processes of this entry out, and the selector by which that shows.
    fn keeps_out<'a>(
        &self,
        shut: &'a [Shut],
        entry: &'a Entry,
        questions: &Questions,
    ) -> Option<(&'a Shut, &'a Selector)> {
        // The socket's directory is mounted into pods.
        if entry.selectors.iter().any(|selector| selector.kind() == "k8s") {
            return None;
        }
        let asked = || entry.selectors.iter().filter_map(|it| Some((it, questions.account(it)?)));
        let is_user = |account: &Account| matches!(account, Account::User(_));
        // Where a user is asked for, its groups say nothing more.
        let names_user = asked().any(|(_, account)| is_user(&account));
        asked().filter(|(_, account)| is_user(account) == names_user).find_map(|(selector, account)| {
            let out = |shut: &&Shut| match account {
                Account::User(uid) => !shut.lets_through(uid),
                Account::Group(gid) => !self.groups.contains(&gid),
            };
            Some((shut.iter().find(out)?, selector))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_kept_out_shows_in_what_an_entry_asks_for() {
        let shut = |uid| Shut { path: "/a".into(), uid, mode: 0o700 };
        let reach = WayIn { groups: vec![0, 7], ..WayIn::default() };
        let (of_root, of_user) = ([shut(0)], [shut(1000)]);
        for (case, shut, selectors, want) in [
            ("nothing is shut", &[][..], "unix:uid:5", None),
            ("root's", &of_root, "unix:uid:0", None),
            ("another's", &of_root, "unix:uid:5", Some("unix:uid:5")),
            ("its owner's", &of_user, "unix:uid:1000", None),
            ("root's, past another's directory", &of_user, "unix:uid:0", None),
            ("another's than the owner's", &of_user, "unix:uid:5", Some("unix:uid:5")),
            ("a group of the agent's", &of_root, "unix:gid:7", None),
            ("another group", &of_root, "unix:gid:5", Some("unix:gid:5")),
            ("another group too", &of_root, "unix:supplementary_gid:5", Some("unix:supplementary_gid:5")),
            ("root in another group", &of_root, "unix:gid:5 unix:uid:0", None),
            ("no account", &of_root, "unix:path:/bin/web", None),
            ("an account that is not known", &of_root, "unix:user:nosuchuser", None),
            ("a pod", &of_root, "k8s:ns:shop unix:uid:5", None),
        ] {
            let entry = Entry::asking(selectors);
            let kept_out = reach.keeps_out(shut, &entry, &Questions::default());
            assert_eq!(kept_out.map(|(_, selector)| selector.to_string()).as_deref(), want, "{case}");
        }
    }

    #[test]
    fn who_comes_in_spite_of_it_knows_another_way() {
        let reach = WayIn { shut: vec![Shut { path: "/a".into(), uid: 7, mode: 0o700 }], ..WayIn::default() };
        for (uid, believed) in [(0, false), (7, false), (8, true), (7, true)] {
            reach.came(uid);
            assert_eq!(reach.others_came.load(Relaxed), believed, "{uid}");
        }
        let open = WayIn::default();
        open.came(8);
        assert!(!open.others_came.load(Relaxed), "no way was shut");
    }
}
