//! The way to the socket: who gets in past what on it does not let everybody through. A directory above the socket that only its
//! owner can enter may be meant, where root and that owner are all the callers; only the agent can know whom entries ask for, and
//! who is kept out never connects.
//!
//! Nobody is said to be kept out who may get in. Who comes although the modes and the user database would keep it out is
//! believed, while its connection is open and an hour longer; the connection says in which groups it is. If one of these lets it
//! through (a unit's `SupplementaryGroups=`, a membership that was taken away since), that is so of its user alone. If none does,
//! there is another way, as into a container into which the socket's directory is mounted, and who else may come by it nobody
//! knows. That is so whatever the modes become; but it counts only if they were the same at the looks before and after, so that
//! nothing was open in between, as far as [`Mark`] shows.
//!
//! What is not seen: who has waited for longer than a second in the queue of the kernel, as behind an agent that starts, may have
//! connected before a directory was closed; it counts for an hour too long. A process with `CAP_DAC_OVERRIDE` comes past any mode,
//! and one that had opened the socket before (`O_PATH`) past those of the directories: both are taken for another way. Connections
//! from before a directory was closed show none, so where all come another way the agent is not ready until the next one comes.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use crate::{
    os::accounts::{self, FilesStamp},
    peer::{
        socket::Presence,
        way::{Mark, Shut},
    },
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

/// For how long it counts that somebody came in spite of what is shut, once the connection is closed.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// How long one has waited at most until it is let in, since it connected: in the queue of the kernel and for room.
const ON_THE_WAY: Duration = Duration::from_secs(1);
/// Users at most of whom it is remembered by which groups they came.
const MOST_BY_GROUP: usize = 1024;

/// The way to the socket, as it was at the last look, and who came in spite of it.
#[derive(Debug, Default)]
pub(super) struct WayIn {
    /// Changed only while `past` is locked.
    way: ArcSwap<SocketWay>,
    past: Mutex<Past>,
}

/// Those whom the way would keep out, and who came.
#[derive(Debug, Default)]
struct Past {
    /// Of what is shut, at the last look.
    marks: Vec<Option<Mark>>,
    /// Who is let in from then on has connected past what is shut now. `None` before the first look.
    counts_from: Option<Instant>,
    /// Somebody came another way since the last look, if nothing was open meanwhile.
    since_look: Option<Arc<()>>,
    /// Somebody did, of each look.
    another_way: Vec<Sign>,
    /// By user: the groups that let it through.
    by_group: HashMap<u32, (Vec<u32>, Sign)>,
}

/// Kept by a connection of somebody who came in spite of what is shut: for as long as it lives, that counts.
#[derive(Debug)]
pub(super) struct Came {
    _sign: Arc<()>,
}

/// That somebody came.
#[derive(Debug)]
struct Sign {
    /// Kept by these connections too.
    came: Arc<()>,
    last: Instant,
}

impl Sign {
    fn counts(&mut self, now: Instant) -> bool {
        if Arc::strong_count(&self.came) > 1 {
            self.last = now;
        }
        now.saturating_duration_since(self.last) < REMEMBERED
    }
}

impl WayIn {
    /// A process of this user is let in, which has these groups, as far as anybody says.
    pub(super) fn came(
        &self,
        uid: u32,
        groups: impl FnOnce() -> Option<Vec<u32>>,
        now: Instant,
    ) -> Option<Came> {
        self.way.load().keeps_out(uid, |_| false)?;
        let groups = groups();
        let has = |gid| groups.as_ref().is_some_and(|groups| groups.contains(&gid));
        let mut past = self.past();
        let way = self.way.load();
        way.keeps_out(uid, |_| false)?;
        let sign = if way.keeps_out(uid, has).is_some() {
            let counts = past.counts_from.is_some_and(|from| from <= now);
            counts.then(|| Arc::clone(past.since_look.get_or_insert_default()))
        } else {
            past.came_by_group(
                uid,
                way.shut.iter().filter_map(|shut| shut.group).filter(|gid| has(*gid)),
                now,
            )
        };
        sign.map(|sign| Came { _sign: sign })
    }

    /// Takes note of the way as it is now, and of when what is shut on it changed. Returns what of it keeps out whoever is not
    /// in its groups.
    pub(super) fn look(&self, now: SocketWay, marks: Vec<Option<Mark>>, at: Instant) -> SocketWay {
        let mut past = self.past();
        let before = self.way.swap(now.clone().into());
        let stood = before.shut == now.shut && past.stood_until(&marks);
        past.marks = marks;
        past.counts_from = match past.counts_from {
            None => Some(at),
            Some(from) if stood => Some(from),
            Some(_) => Some(at + ON_THE_WAY),
        };
        let came = past.since_look.take().filter(|_| stood);
        past.another_way.extend(came.map(|came| Sign { came, last: at }));
        past.another_way.retain_mut(|sign| sign.counts(at));
        past.by_group.retain(|_, (_, sign)| sign.counts(at));
        if !past.another_way.is_empty() {
            return SocketWay::default();
        }
        let mut left = now;
        for (uid, (groups, _)) in &past.by_group {
            left.memberships.add(*uid, groups);
        }
        left
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    fn stood_until(&self, later: &[Option<Mark>]) -> bool {
        let stood = |(before, later): (&Option<Mark>, &Option<Mark>)| {
            before.zip(*later).is_some_and(|(before, later)| before.stood_until(later))
        };
        self.marks.len() == later.len() && self.marks.iter().zip(later).all(stood)
    }

    fn came_by_group(
        &mut self,
        uid: u32,
        groups: impl Iterator<Item = u32>,
        now: Instant,
    ) -> Option<Arc<()>> {
        if self.by_group.len() >= MOST_BY_GROUP && !self.by_group.contains_key(&uid) {
            return None;
        }
        let new = || (Vec::new(), Sign { came: Arc::default(), last: now });
        let (known, sign) = self.by_group.entry(uid).or_insert_with(new);
        known.extend(groups);
        known.sort_unstable();
        known.dedup();
        sign.last = now;
        Some(Arc::clone(&sign.came))
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

    /// It is in these too.
    fn add(&mut self, uid: u32, groups: &[u32]) {
        if let Some(Some(known)) = self.0.get_mut(&uid) {
            known.extend(groups);
        }
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
        SocketWay {
            shut: shut.to_vec(),
            memberships: Memberships::of(&[(8, Some(&[8])), (9, Some(&[3])), (10, Some(&[]))]),
        }
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
            ("of whom nobody says", &of_group, 11, &[], false),
            ("past two", &way(&[shut("/a", Some(3)), shut("/b", None)]), 9, &[], true),
        ] {
            assert_eq!(way.keeps_out(uid, |gid| groups.contains(&gid)).is_some(), kept_out, "{case}");
        }
    }

    /// What happens to a node.
    #[derive(Clone, Copy)]
    enum Step {
        /// It is looked at: what is shut, by path and the group that is let through.
        Look(&'static [(&'static str, Option<u32>)]),
        /// A mode is changed, perhaps back to what it was.
        Chmod,
        /// Somebody comes, in these groups, and stays.
        Come(u32, Option<&'static [u32]>),
        /// All who came leave.
        Leave,
        /// So many seconds pass.
        Pass(u64),
    }

    #[test]
    fn who_comes_in_spite_of_it_shows_a_way() {
        use Step::{Chmod, Come, Leave, Look, Pass};

        let (open, of_owner, of_group) = (Look(&[]), Look(&[("/a", None)]), Look(&[("/g", Some(3))]));
        let of_both = Look(&[("/g", Some(3)), ("/a", None)]);
        let (alone, member, unknown) = (Some(&[][..]), Some(&[5, 3][..]), None);
        let hour = 3600;
        for (case, steps, want) in [
            ("nobody", &[of_owner, of_owner][..], [true, true]),
            ("while nothing was shut", &[open, Pass(5), Come(8, alone), of_owner, of_owner], [true, true]),
            ("root", &[of_owner, Come(0, alone), of_owner], [true, true]),
            ("the owner", &[of_owner, Come(7, alone), of_owner], [true, true]),
            ("past it", &[of_owner, Come(8, alone), of_owner], [false, false]),
            ("in whatever groups", &[of_owner, Come(8, unknown), of_owner], [false, false]),
            ("before it was open", &[of_owner, Come(8, alone), Chmod, of_owner, of_owner], [true, true]),
            ("while it was open", &[of_owner, Chmod, Come(8, alone), of_owner, of_owner], [true, true]),
            (
                "and once more",
                &[of_owner, Chmod, of_owner, Pass(5), Come(8, alone), of_owner],
                [false, false],
            ),
            ("was on the way", &[open, Chmod, of_owner, Come(8, alone), of_owner, of_owner], [true, true]),
            ("was not", &[open, Chmod, of_owner, Pass(1), Come(8, alone), of_owner], [false, false]),
            ("another was open", &[open, Pass(5), Come(8, alone), of_group, of_owner], [true, true]),
            ("left", &[of_owner, Come(8, alone), of_owner, Leave, Pass(hour - 1), of_owner], [false, false]),
            ("long ago", &[of_owner, Come(8, alone), of_owner, Leave, Pass(hour), of_owner], [true, true]),
            ("is here", &[of_owner, Come(8, alone), of_owner, Pass(9 * hour), of_owner], [false, false]),
            (
                "was open since",
                &[of_owner, Come(8, alone), of_owner, Chmod, open, Chmod, of_owner],
                [false, false],
            ),
            ("by its group", &[of_group, Come(8, member), of_group], [false, true]),
            ("by it, at once", &[of_group, Chmod, Come(8, member), of_group], [false, true]),
            ("not by it", &[of_group, Come(8, alone), of_group], [false, false]),
            (
                "left, in its group",
                &[of_group, Come(8, member), Leave, Pass(hour - 1), of_group],
                [false, true],
            ),
            (
                "long ago, in it",
                &[of_group, Come(8, member), of_group, Leave, Pass(hour), of_group],
                [true, true],
            ),
            ("is here, in it", &[of_group, Come(8, member), Pass(9 * hour), of_group], [false, true]),
            ("past more than it", &[of_both, Come(8, member), of_both], [false, false]),
            ("a member by the database", &[of_group, Come(9, member), of_group], [true, true]),
        ] {
            let (way_in, mut now, mut changed, mut here) = (WayIn::default(), Instant::now(), 1, Vec::new());
            let mut left = SocketWay::default();
            for step in steps {
                match *step {
                    Look(dirs) => {
                        let dirs: Vec<_> = dirs.iter().map(|(path, group)| shut(path, *group)).collect();
                        let marks = dirs.iter().map(|_| Some(Mark::changed_at(changed))).collect();
                        left = way_in.look(way(&dirs), marks, now);
                    }
                    Chmod => changed += 1,
                    Come(uid, groups) => here.extend(way_in.came(uid, || groups.map(<[u32]>::to_vec), now)),
                    Leave => here.clear(),
                    Pass(seconds) => now += Duration::from_secs(seconds),
                }
            }
            assert_eq!([8, 10].map(|uid| left.keeps_out(uid, |_| false).is_some()), want, "{case}");
        }
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
