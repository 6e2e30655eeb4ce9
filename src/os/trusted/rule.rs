//! Who may own what is on the way of a path, and who may write to it.

use std::{
    fs::{File, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::statfs::{
        CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType, PROC_SUPER_MAGIC, SECURITYFS_MAGIC,
        SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
    },
    unistd::{Gid, Uid, User, getegid, geteuid, getgroups},
};

use super::{
    super::{accounts, mount},
    error::{PathError, cannot_open},
    here::{Here, is_read_only},
};

/// How long the node's user database may take to say which group a user is in.
const GROUP_WITHIN: Duration = Duration::from_secs(5);

const GROUP_WRITES: u32 = 0o020;
const ALL_WRITE: u32 = 0o002;

const STICKY: u32 = 0o1000;

/// The kernel's own file systems, whose files belong to root and say what others want: `/proc/PID/cmdline` does.
const NO_FILES: [FsType; 7] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
    DEBUGFS_MAGIC,
    TRACEFS_MAGIC,
    SECURITYFS_MAGIC,
];

/// Whether it is on one of the kernel's own file systems.
pub(super) fn is_of_the_kernel(file: &File) -> Result<bool, Errno> {
    let found = fstatfs(file)?.filesystem_type();
    Ok(NO_FILES.contains(&found))
}

/// Whom paths may belong to: root, and one user.
#[derive(Clone, Copy, Debug)]
pub struct Trust {
    ours: u32,
    /// Whether the user's own group is the private one that useradd(8) makes: nobody else is in it.
    private_group: bool,
    /// Whether directories of root's that their group may write to count as sticky ones.
    groups: Groups,
    owners: Owners,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Groups {
    Refused,
    Sticky,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owners {
    Known,
    Anybody,
}

/// What of a path it is that will not do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WayPart {
    /// A directory on the way, which may be there for others.
    Above,
    /// A directory that was asked for by its name.
    Directory,
    File,
}

impl Trust {
    /// Root, and the user that this process runs as.
    pub fn own() -> Self {
        Self::of(geteuid().as_raw())
    }

    /// Root, and the user `ours`. Of another user than this process's the user database is asked, which may take
    /// seconds.
    pub fn of(ours: u32) -> Self {
        let private_group = ours != 0 && primary_group(ours) == Some(ours);
        Self { ours, private_group, groups: Groups::Refused, owners: Owners::Known }
    }

    /// Whoever owns it and may write to it: to find out for whom it is, and for nothing that is acted on.
    pub fn anybody() -> Self {
        Self { owners: Owners::Anybody, ..Self::own() }
    }

    /// The user who is trusted beside root.
    pub fn user(self) -> u32 {
        self.ours
    }

    /// For what is only written to: a directory of root's may be writable for its group too (`/var/log` is, with some
    /// distributions), and then counts as sticky, and no link in it is followed.
    #[must_use]
    pub fn to_append(self) -> Self {
        Self { groups: Groups::Sticky, ..self }
    }

    /// Whether nobody but the user and root reads what has this owner, group and mode: its group may only where it is
    /// the user's own, or one that the user was put in, as `fsGroup` does.
    pub fn alone_reads(self, file: &File, meta: &Metadata) -> bool {
        let mode = meta.mode() & 0o077;
        let owned = meta.uid() == 0 || meta.uid() == self.ours;
        mode == 0 || mode == 0o040 && owned && self.is_in_group(meta.gid()) && !mount::has_acl(file)
    }

    /// The command by which a file of this owner and group comes to be read by nobody but the user and root, and by the user
    /// still.
    pub fn closing(self, file: &File, meta: &Metadata, path: &Path) -> String {
        let path = path.display();
        if meta.uid() == self.ours {
            format!("chmod 600 {path}")
        } else if meta.uid() == 0 && self.is_in_group(meta.gid()) && !mount::has_acl(file) {
            format!("chmod 440 {path}")
        } else {
            format!("chown {} {path} && chmod 600 {path}", self.ours)
        }
    }

    fn is_in_group(self, gid: u32) -> bool {
        if self.ours != geteuid().as_raw() {
            return groups_of(self.ours).contains(&gid);
        }
        getegid().as_raw() == gid || getgroups().is_ok_and(|all| all.contains(&Gid::from_raw(gid)))
    }

    /// That the user may do all of this (4: read, 2: write, 1: pass), as far as modes say: what the kernel lets this process do says
    /// nothing about another user.
    pub(super) fn check_access(
        self,
        bits: u32,
        path: &Path,
        file: &File,
        meta: &Metadata,
    ) -> Result<(), PathError> {
        let mode = meta.mode();
        let [owner, group, other] = [6, 3, 0].map(|of| mode >> of & bits == bits);
        let nothing_to_say = self.ours == 0
            || self.ours == geteuid().as_raw()
            || self.owners == Owners::Anybody
            || (owner && group && other);
        let may = || {
            if meta.uid() == self.ours {
                owner
            } else if group == other || !self.is_in_group(meta.gid()) {
                other
            } else {
                group
            }
        };
        if nothing_to_say || may() || mount::has_acl(file) {
            return Ok(());
        }
        Err(cannot_open(path, Errno::EACCES.into()))
    }

    /// Whether others may put things in it.
    pub(super) fn check_directory(self, here: &Here) -> Result<bool, PathError> {
        let shared = self.shared(here).ok_or_else(|| self.refused_directory(here, WayPart::Above))?;
        self.check_access(1, &here.path, &here.dir, &here.meta)?;
        Ok(shared)
    }

    /// The same, of the directory that was asked for.
    pub(super) fn check_end(self, here: &Here) -> Result<bool, PathError> {
        self.shared(here).ok_or_else(|| self.refused(here))
    }

    /// Why the directory that was asked for will not do.
    pub(super) fn refused(self, here: &Here) -> PathError {
        self.refused_directory(here, WayPart::Directory)
    }

    fn refused_directory(self, here: &Here, part: WayPart) -> PathError {
        self.untrusted(part, here.path.clone(), &here.dir, &here.meta)
    }

    /// `None` where it cannot be trusted.
    fn shared(self, here: &Here) -> Option<bool> {
        let (uid, mode) = (here.meta.uid(), here.meta.mode());
        if self.owners == Owners::Anybody {
            return Some(false);
        }
        if !self.owns(uid, here.root) {
            return None;
        }
        if !self.others_write(&here.dir, &here.meta) || here.is_volume() {
            return Some(false);
        }
        let by_group = self.groups == Groups::Sticky && uid == 0 && mode & ALL_WRITE == 0;
        (mode & STICKY != 0 || by_group).then_some(true)
    }

    /// Where its bits let others write, as in `/tmp` or in a volume, a link must be one of ours; and none is followed that
    /// a group could have put there.
    pub(super) fn check_link(
        self,
        here: &Here,
        shared: bool,
        path: PathBuf,
        link: &File,
        meta: &Metadata,
    ) -> Result<(), PathError> {
        if self.owners == Owners::Anybody || !self.others_write(&here.dir, &here.meta) {
            return Ok(());
        }
        let sticky = here.meta.mode() & STICKY != 0;
        if (sticky || !shared) && self.owns(meta.uid(), here.root) {
            return Ok(());
        }
        Err(self.untrusted(WayPart::File, path, link, meta))
    }

    pub(super) fn check_file(
        self,
        path: &Path,
        file: &File,
        meta: &Metadata,
        root: u32,
    ) -> Result<(), PathError> {
        if !meta.is_file() || is_of_the_kernel(file).map_err(|errno| cannot_open(path, errno.into()))? {
            return Err(PathError::Kind { path: path.to_owned(), want: "regular file" });
        }
        let ours = self.owns(meta.uid(), root) && !self.others_write(file, meta);
        if ours || self.owners == Owners::Anybody {
            return self.check_access(4, path, file, meta);
        }
        Err(self.untrusted_file(path.to_owned(), file, meta))
    }

    /// `root` is who owns `/`.
    pub(super) fn owns(self, uid: u32, root: u32) -> bool {
        uid == 0 || uid == self.ours || uid == root
    }

    /// Whether its bits let others write to it. The private group of the user is the user, but for an ACL, of which
    /// the bits of the group are the mask.
    fn others_write(self, file: &File, meta: &Metadata) -> bool {
        let (mode, ours) = (meta.mode(), self.ours);
        if mode & ALL_WRITE != 0 {
            return true;
        }
        let private = self.private_group && meta.uid() == ours && meta.gid() == ours;
        mode & GROUP_WRITES != 0 && (!private || mount::has_acl(file))
    }

    pub(super) fn untrusted_file(self, path: PathBuf, file: &File, meta: &Metadata) -> PathError {
        self.untrusted(WayPart::File, path, file, meta)
    }

    fn untrusted(self, part: WayPart, path: PathBuf, file: &File, meta: &Metadata) -> PathError {
        let (uid, mode, ours) = (meta.uid(), meta.mode() & 0o7777, self.ours);
        let (owned, open) = (self.owns(uid, 0), !meta.is_symlink() && mode & (GROUP_WRITES | ALL_WRITE) != 0);
        let owner = if ours == 0 { "root".to_owned() } else { format!("user {ours} or to root") };
        let demand = match (owned, open) {
            (true, _) => "nobody else may write to it".to_owned(),
            (false, true) => format!("it must belong to {owner}, and nobody else may write to it"),
            (false, false) => format!("it must belong to {owner}"),
        };
        let at = path.display();
        let command = match (owned, open) {
            (true, _) if mode & ALL_WRITE != 0 && is_for_all(&path) => format!("chmod 1777 {at}"),
            (true, _) => format!("chmod go-w {at}"),
            (false, _) if meta.is_symlink() => format!("chown -h {ours} {at}"),
            (false, true) => format!("chown {ours} {at} and chmod go-w {at}"),
            (false, false) => format!("chown {ours} {at}"),
        };
        let remedy = if is_read_only(file) {
            "it is mounted read-only: put it right where it comes from".to_owned()
        } else if !owned && !has_number(uid) {
            "its owner has no number in this user namespace, so that chown cannot change it here".to_owned()
        } else {
            match part {
                // It may be somebody's home.
                WayPart::Above if !owned => {
                    "copy what is meant to a directory of root's, such as /etc/durward".to_owned()
                }
                WayPart::Directory if !owned => format!("if nothing else is kept there, {command}"),
                WayPart::Above | WayPart::Directory | WayPart::File => command,
            }
        };
        PathError::Untrusted { path, uid, mode, demand, remedy }
    }
}

/// Directories in which everybody is to put things.
fn is_for_all(path: &Path) -> bool {
    ["/tmp", "/var/tmp", "/dev/shm"].into_iter().any(|all| path == Path::new(all))
}

/// Whether this user exists in the user namespace of this process (user_namespaces(7)). Unknown counts as yes.
fn has_number(uid: u32) -> bool {
    let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else { return true };
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().filter_map(|number| number.parse::<u64>().ok());
        let (first, count) = (numbers.next(), numbers.nth(1));
        first
            .zip(count)
            .is_some_and(|(first, count)| (first..first.saturating_add(count)).contains(&uid.into()))
    })
}

/// The group that the user is in first; `None` if nobody can say.
fn primary_group(uid: u32) -> Option<u32> {
    if uid == geteuid().as_raw() {
        return Some(getegid().as_raw());
    }
    let found = accounts::by(Instant::now() + GROUP_WITHIN, move || User::from_uid(Uid::from_raw(uid)));
    found?.ok()?.map(|user| user.gid.as_raw())
}

/// The groups of another user; none if nobody can say.
fn groups_of(uid: u32) -> Vec<u32> {
    let said = accounts::by(Instant::now() + GROUP_WITHIN, move || accounts::groups_of(uid));
    said.and_then(Result::ok).flatten().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    /// Whoever follows the advice has a file that is accepted, and that the user can read.
    #[test]
    fn a_secret_that_others_read_is_closed_by_the_command_that_is_given() {
        const NOBODY: u32 = 65_534;
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (ours, owner, group, mode) in [
            (0, 0, 0, 0o644),
            (0, 0, NOBODY, 0o440),
            (NOBODY, 0, NOBODY, 0o444),
            (NOBODY, 0, NOBODY, 0o660),
            (NOBODY, 0, 0, 0o444),
            (NOBODY, 0, 0, 0o440),
            (NOBODY, NOBODY, NOBODY, 0o644),
            (NOBODY, NOBODY, 0, 0o404),
        ] {
            let case = format!("user {ours}, file of {owner}:{group} with {mode:o}");
            std::fs::write(&path, "").unwrap();
            std::os::unix::fs::chown(&path, Some(owner), Some(group)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let trust = Trust::of(ours);
            let look = || {
                let file = File::open(&path).unwrap();
                let meta = file.metadata().unwrap();
                (file, meta)
            };
            let (file, meta) = look();
            assert!(!trust.alone_reads(&file, &meta), "{case}");
            let command = trust.closing(&file, &meta, &path);
            assert!(
                Command::new("sh").args(["-c", &command]).status().unwrap().success(),
                "{case}: {command}"
            );
            let (file, meta) = look();
            assert!(trust.alone_reads(&file, &meta), "{case}: {command}");
            let by_group = meta.mode() & 0o040 != 0 && meta.gid() == NOBODY;
            assert!(ours == 0 || meta.uid() == ours || by_group, "{case}: {command}: it can be read");
        }
    }
}
