//! The way to the socket: who gets in past what on it does not let everybody through. A directory above the socket that only its
//! owner can enter may be meant, where root and that owner are all the callers; only the agent can know whom entries ask for, and
//! who is kept out never connects.
//!
//! Nobody is said to be kept out who may get in: by a group, as the user database has them, or by another way, as into a container
//! into which the socket's directory is mounted. So who comes in spite of it is believed, for as long as the agent runs.

use std::{
    collections::{BTreeSet, HashMap},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use crate::{
    os::accounts::{self, FilesStamp},
    peer::{socket::Presence, way::Shut},
};

/// What is shut on the way to the socket.
#[derive(Clone, Debug, Default)]
pub(super) struct SocketWay {
    pub(super) shut: Vec<Shut>,
    pub(super) memberships: Memberships,
}

impl SocketWay {
    /// What keeps processes of this user out, which may also be in groups for which `also` holds.
    pub(super) fn keeps_out(&self, uid: u32, also: impl Fn(u32) -> bool) -> Option<&Shut> {
        let by_group = |gid| also(gid) || self.memberships.has(uid, gid).unwrap_or(true);
        let passes = |shut: &Shut| uid == 0 || uid == shut.uid || shut.group.is_some_and(by_group);
        self.shut.iter().find(|shut| !passes(shut))
    }

    /// Each in a sentence, with what to do if others should get in too.
    pub(super) fn found(&self, presence: &Presence) -> Vec<String> {
        let said = self.shut.iter().map(|shut| {
            let opens = opens(shut, presence);
            match shut.group {
                None => format!(
                    "{shut}, so no user but its owner reaches the socket, and root: {opens} if others should"
                ),
                Some(gid) => format!(
                    "{shut}, so only its owner, group {gid} and root reach the socket: {opens} if others should"
                ),
            }
        });
        said.collect()
    }
}

/// What lets others in.
pub(super) fn opens(shut: &Shut, presence: &Presence) -> String {
    let path = shut.path.display();
    if shut.path != presence.path() {
        format!("chmod o+x {path}")
    } else if presence.handed_over {
        "SocketMode=0666 in the socket unit".to_owned()
    } else {
        format!("chmod o+w {path}")
    }
}

/// The way to the socket, as it was at the last look, and who came.
#[derive(Debug, Default)]
pub(super) struct WayIn {
    way: ArcSwap<SocketWay>,
    /// Somebody has connected since whom that would have kept out.
    came_past: AtomicBool,
    /// There is another way.
    has_another: AtomicBool,
}

impl WayIn {
    /// A process of this user has connected.
    pub(super) fn came(&self, uid: u32) {
        if self.way.load().keeps_out(uid, |_| false).is_some() {
            self.came_past.store(true, Relaxed);
        }
    }

    /// Takes note of the way as it is now. Returns what of it is left, where there is no other.
    pub(super) fn look(&self, now: SocketWay) -> SocketWay {
        let before = self.way.swap(now.clone().into());
        // It may have been opened for a moment, by which everybody came.
        if self.came_past.swap(false, Relaxed) && before.shut == now.shut {
            self.has_another.store(true, Relaxed);
        }
        if self.has_another.load(Relaxed) { SocketWay::default() } else { now }
    }
}

/// The groups of users, as far as the user database says.
#[derive(Clone, Debug, Default)]
pub(super) struct Memberships(HashMap<u32, Option<Vec<u32>>>);

impl Memberships {
    /// Whether the user is in the group; `None` where nobody says.
    fn has(&self, uid: u32, gid: u32) -> Option<bool> {
        self.0.get(&uid)?.as_ref().map(|groups| groups.contains(&gid))
    }

    #[cfg(test)]
    pub(super) fn of(all: &[(u32, Option<&[u32]>)]) -> Self {
        Self(all.iter().map(|(uid, groups)| (*uid, groups.map(<[u32]>::to_vec))).collect())
    }
}

/// Users whose groups are looked up; of more nothing is known.
const MOST_USERS: usize = 64;
/// How long an answer is believed, and how long none, while the databases' own files are as they were.
const BELIEVED: Duration = Duration::from_secs(60);

/// Looks up the groups of users, and keeps the answers for a while.
#[derive(Debug, Default)]
pub(super) struct GroupBook {
    files: Option<FilesStamp>,
    answers: HashMap<u32, (Instant, Option<Vec<u32>>)>,
}

impl GroupBook {
    /// The groups of these users, as far as the databases, whose own files look like this, say by `deadline`. Blocks this thread
    /// until then.
    pub(super) fn look_up(
        &mut self,
        users: &BTreeSet<u32>,
        files: FilesStamp,
        deadline: Instant,
    ) -> Memberships {
        let now = Instant::now();
        let asked: BTreeSet<u32> = users.iter().copied().take(MOST_USERS).collect();
        let before = self.files.replace(files);
        if before != self.files {
            self.answers.clear();
        }
        self.answers
            .retain(|uid, (at, _)| asked.contains(uid) && now.saturating_duration_since(*at) < BELIEVED);
        let mut answers = true;
        for uid in asked {
            self.answers.entry(uid).or_insert_with(|| {
                let said = accounts::by(deadline, move || accounts::groups_of(uid)).filter(|_| answers);
                answers = said.is_some();
                // Who does not exist is in no group.
                (now, said.and_then(Result::ok).map(Option::unwrap_or_default))
            });
        }
        Memberships(self.answers.iter().map(|(uid, (_, groups))| (*uid, groups.clone())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shut(path: &str, group: Option<u32>) -> Shut {
        Shut { path: path.into(), uid: 7, mode: 0o700, group }
    }

    fn way(shut: &[Shut]) -> SocketWay {
        SocketWay { shut: shut.to_vec(), memberships: Memberships::of(&[(8, Some(&[8])), (9, Some(&[3]))]) }
    }

    #[test]
    fn root_the_owner_and_a_group_get_in() {
        let (of_owner, of_group) = (way(&[shut("/a", None)]), way(&[shut("/a", Some(3))]));
        for (case, way, uid, groups, kept_out) in [
            ("nothing is shut", &way(&[]), 8, &[][..], false),
            ("root", &of_owner, 0, &[], false),
            ("its owner", &of_owner, 7, &[], false),
            ("another", &of_owner, 8, &[], true),
            ("another, in a group", &of_owner, 9, &[3], true),
            ("a member", &of_group, 9, &[], false),
            ("no member", &of_group, 8, &[], true),
            ("a process with that group", &of_group, 8, &[3], false),
            ("a process with another", &of_group, 8, &[4], true),
            ("of whom nobody says", &of_group, 10, &[], false),
            ("past two", &way(&[shut("/a", Some(3)), shut("/b", None)]), 9, &[], true),
        ] {
            assert_eq!(way.keeps_out(uid, |gid| groups.contains(&gid)).is_some(), kept_out, "{case}");
        }
    }

    #[test]
    fn who_comes_in_spite_of_it_knows_another_way() {
        let shut_dir = || way(&[shut("/a", None)]);
        let has_another = |way_in: &WayIn, now: SocketWay| way_in.look(now).shut.is_empty();
        let way_in = WayIn::default();
        way_in.came(8);
        assert!(!has_another(&way_in, shut_dir()), "no way was shut");
        for uid in [0, 7] {
            way_in.came(uid);
            assert!(!has_another(&way_in, shut_dir()), "{uid} gets in");
        }
        way_in.came(8);
        assert!(!has_another(&way_in, way(&[shut("/b", None)])), "it was opened meanwhile");
        way_in.came(8);
        assert!(has_another(&way_in, way(&[shut("/b", None)])));
        way_in.look(way(&[]));
        assert!(has_another(&way_in, shut_dir()), "it is there whatever mode is changed");
    }

    #[test]
    fn no_more_users_are_looked_up_than_a_few() {
        let users: BTreeSet<u32> = (0..1000).collect();
        let mut book = GroupBook::default();
        let files = || FilesStamp::of(&[]);
        let (late, soon) = (Instant::now() + Duration::from_secs(60), Instant::now());
        let memberships = book.look_up(&users, files(), late);
        assert_eq!((memberships.0.len(), memberships.has(0, 0)), (MOST_USERS, Some(true)));
        let none = book.look_up(&users, files(), soon);
        assert_eq!(none.has(0, 0), Some(true), "it is kept");
        assert_eq!(GroupBook::default().look_up(&users, files(), soon).has(0, 0), None, "it hangs");
    }

    #[test]
    fn groups_are_looked_up_again_when_the_files_change() {
        let (late, soon) = (Instant::now() + Duration::from_secs(60), Instant::now());
        let (root, mut book) = (BTreeSet::from([0]), GroupBook::default());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("group");
        for (case, text, deadline, want) in [
            ("no answer, and no file", None, soon, None),
            ("the same", None, late, None),
            ("there is one", Some("root:x:0:"), late, Some(true)),
            ("the same", None, soon, Some(true)),
            ("it is another", Some("root:x:0:bob"), soon, None),
        ] {
            if let Some(text) = text {
                std::fs::write(&path, text).unwrap();
            }
            assert_eq!(book.look_up(&root, FilesStamp::of(&[&path]), deadline).has(0, 0), want, "{case}");
        }
    }
}
