//! What on the way to a socket does not let everybody through: directories above it, and the socket itself.

use std::{
    fmt,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::os::trusted::{ClosedDir, Trust, may_have_acl, parent};

/// What lets its owner through, and root, and perhaps a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shut {
    pub path: PathBuf,
    /// Its owner.
    pub uid: u32,
    pub mode: u32,
    /// The group that is let through too.
    pub group: Option<u32>,
}

impl Shut {
    /// Of what has this owner, group and mode, where `passes` is the bit by which others get through.
    fn of(path: PathBuf, (uid, gid): (u32, u32), mode: u32, passes: u32) -> Option<Self> {
        let group = (mode & (passes << 3) != 0).then_some(gid);
        (mode & passes == 0).then_some(Self { path, uid, mode: mode & 0o7777, group })
    }
}

impl fmt::Display for Shut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has mode {:04o}", self.path.display(), self.mode)
    }
}

/// What stands at a path, and when that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Device and inode.
    inode: (u64, u64),
    /// Its times of change (seconds and nanoseconds), of anything and of what is in it.
    changed: [(i64, i64); 2],
}

impl Mark {
    /// Of what stands there now. Asks the file system, which may wait.
    pub fn of(path: &Path) -> Option<Self> {
        let meta = path.metadata().ok()?;
        let changed = [(meta.ctime(), meta.ctime_nsec()), (meta.mtime(), meta.mtime_nsec())];
        Some(Self { inode: (meta.dev(), meta.ino()), changed })
    }

    #[cfg(test)]
    pub fn changed_at(seconds: i64) -> Self {
        Self { inode: (1, 1), changed: [(seconds, 0), (0, 0)] }
    }

    /// Whether it stood there until `later` was taken with the one mode that it had at both times. What is made or removed in
    /// a directory changes both its times, a mode the first alone: one that was changed and back before that does not show.
    pub fn stood_until(self, later: Self) -> bool {
        let [at_all, within] = later.changed;
        self.inode == later.inode && (self.changed[0] == at_all || at_all == within)
    }
}

/// Who may search a directory gets through it, and who may write to a socket may connect (unix(7)).
const SEARCH: u32 = 0o001;
const WRITE: u32 = 0o002;

/// What on the way to the socket at `path` does not let everybody through, from the last file system that was mounted on the
/// way on. What has an ACL may, and is none of these; nor is what keeps out one group alone (0705), as whoever is in it by the user
/// database may run without it. Asks the file system, which may wait.
pub fn shut_on_the_way(path: &Path) -> Vec<Shut> {
    let closed = Trust::anybody().route(parent(path)).map(|way| way.closed).unwrap_or_default();
    let closed = closed.into_iter().filter(|dir| !dir.has_acl);
    let mut all: Vec<Shut> = closed
        .filter_map(|ClosedDir { path, uid, gid, mode, .. }| Shut::of(path, (uid, gid), mode, SEARCH))
        .collect();
    let meta = path.metadata().ok();
    let socket =
        meta.and_then(|meta| Shut::of(path.to_owned(), (meta.uid(), meta.gid()), meta.mode(), WRITE));
    all.extend(socket.filter(|_| !may_have_acl(path)));
    all
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_mode_that_is_changed_shows_and_what_comes_into_a_directory_does_not() {
        let mark = |inode, at_all, within| Mark { inode: (1, inode), changed: [(at_all, 0), (within, 0)] };
        for (case, before, after, want) in [
            ("nothing happened", mark(1, 5, 3), mark(1, 5, 3), true),
            ("its mode", mark(1, 5, 3), mark(1, 9, 3), false),
            ("what is in it", mark(1, 5, 3), mark(1, 9, 9), true),
            ("that, and then its mode", mark(1, 5, 3), mark(1, 9, 8), false),
            ("another", mark(1, 5, 3), mark(2, 5, 3), false),
        ] {
            assert_eq!(before.stood_until(after), want, "{case}");
        }
        let dir = tempfile::tempdir().unwrap();
        let mark = || Mark::of(dir.path()).unwrap();
        let first = mark();
        std::fs::write(dir.path().join("a"), "").unwrap();
        assert!(first.stood_until(mark()));
        // The file system's clock may stand still for a moment.
        loop {
            for mode in [0o755, 0o700] {
                std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            }
            if !first.stood_until(mark()) {
                break;
            }
        }
        assert_eq!(Mark::of(&dir.path().join("none")), None);
    }

    #[test]
    fn the_bits_of_a_mode_say_who_gets_through() {
        for (mode, passes, want) in [
            (0o755, SEARCH, None),
            (0o701, SEARCH, None),
            (0o700, SEARCH, Some(None)),
            (0o744, SEARCH, Some(None)),
            (0o750, SEARCH, Some(Some(7))),
            (0o2710, SEARCH, Some(Some(7))),
            (0o777, WRITE, None),
            (0o666, WRITE, None),
            (0o755, WRITE, Some(None)),
            (0o600, WRITE, Some(None)),
            (0o660, WRITE, Some(Some(7))),
        ] {
            let shut = Shut::of("/a".into(), (5, 7), mode, passes);
            assert_eq!(shut.map(|shut| shut.group), want, "{mode:o}, {passes}");
        }
    }
}
