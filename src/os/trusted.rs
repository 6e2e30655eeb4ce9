//! Paths that nobody but root and the agent's own user can turn aside.
//!
//! Whoever may write to a directory decides what its names mean. So a path is walked by hand from `/`, by descriptors:
//! every directory on the way, those that symbolic links lead through included, must belong to root or to the agent's user,
//! and nobody else may write to it. What is handed out is what was looked at: a descriptor, and never a path again.
//!
//! Where others may write but not take away (a sticky directory, as `/tmp`), what is made use of in it must itself belong
//! to root or to the agent's user, links too. The same is asked in the top directory of a read-only mount, whose write bits
//! do not matter: a ConfigMap's has mode 0777. Below it they do, since everything may be read-only for this process alone
//! (`ProtectSystem=strict`). An ordinary user's private group (its number is the user's: Debian and Fedora make one for each
//! user, who then has umask 002) may write to what the user owns, unless an ACL is there: with a POSIX ACL the bits of the
//! group are its mask, the most that anybody is given by it. No file of the kernel's own file systems is believed. A
//! FUSE file system says of itself what it likes: its mounter must be root or the agent's user. Who owns `/` could put
//! anything in any place, this program too, and is as root: in a user namespace root may have another number, and is then
//! not told apart from the users who have none there.
//!
//! Absent on purpose: `openat2(2)`, which would not say who owns what on the way.

mod ahead;
mod error;
mod here;
mod rule;

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open, openat, readlinkat, renameat},
    sys::{
        stat::Mode,
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
    unistd::{UnlinkatFlags, unlinkat},
};

pub use self::{
    error::PathError,
    here::{ClosedDir, is_read_only},
    rule::Trust,
};
use self::{
    error::{MOST_LINKS, cannot_open, nothing},
    here::{Here, Named, closed_dir, put_first},
};
use super::mount;

/// How often a directory is made that is gone again before it can be opened.
const MOST_MADE: u32 = 1000;

/// The mode of directories that are made above the one that was asked for.
const ABOVE: u32 = 0o755;

/// A directory that was walked to. Nobody else can put another in its place.
#[derive(Debug)]
pub struct TrustedDir {
    trust: Trust,
    here: Here,
}

/// Where a path leads, as far as it exists.
#[derive(Debug)]
pub struct Route {
    /// Without symbolic links; what is missing is as it was asked for.
    pub path: PathBuf,
    /// Directories through which others cannot pass, its end included, from the last file system that was mounted on the
    /// way on: what is mounted may be reached another way.
    pub closed: Vec<ClosedDir>,
}

/// The directory that `path` is in: that of a bare name is the working directory.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Whether an ACL may give more users access to what stands at `path` than its mode says. Unknown counts as one.
pub fn may_have_acl(path: &Path) -> bool {
    let opened = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    opened.map_or(true, |file| mount::has_acl(&file.into()))
}

/// What is done about a directory that is missing.
#[derive(Clone, Copy)]
enum Missing {
    Refuse,
    /// Made, the last one with this mode.
    Make(u32),
    /// The way ends there.
    Stop,
}

/// The end of a way. A directory that holds the end was checked: others may put things in it where it is `shared`.
enum End {
    Directory(Here),
    Other {
        here: Here,
        shared: bool,
        name: OsString,
        found: Named,
    },
    /// A link of the kernel's to a descriptor of a process.
    Descriptor {
        here: Here,
        name: OsString,
    },
    /// Nothing is there under the first of these names.
    Nothing {
        here: Here,
        shared: bool,
        names: PathBuf,
    },
}

impl Trust {
    /// Opens a directory.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn directory(self, path: &Path) -> Result<TrustedDir, PathError> {
        self.entered(path, Missing::Refuse)?.checked()
    }

    /// Opens a directory, which is made with this mode when it is missing, and those above it with 0755, whatever the
    /// umask.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn make_directory(self, path: &Path, mode: u32) -> Result<TrustedDir, PathError> {
        self.entered(path, Missing::Make(mode))?.checked()
    }

    /// [`Trust::directory`], but nothing is checked of the directory itself: the caller has a stricter rule.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn directory_unchecked(self, path: &Path) -> Result<TrustedDir, PathError> {
        self.entered(path, Missing::Refuse)
    }

    /// [`Trust::make_directory`], but nothing is checked of the directory itself: the caller has a stricter rule.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn make_directory_unchecked(self, path: &Path, mode: u32) -> Result<TrustedDir, PathError> {
        self.entered(path, Missing::Make(mode))
    }

    /// Opens a regular file to read it. It too must belong to root or the agent's user, and nobody else may write to it.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn open(self, path: &Path) -> Result<File, PathError> {
        self.open_end(self.walk(path, Missing::Refuse)?)
    }

    /// Opens a file for appending, and makes it with this mode, less the umask, when it is missing. It may be a device, or
    /// a pipe, which is opened for reading too, so that it need not have a reader yet: opening never waits.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn append(self, path: &Path, mode: u32) -> Result<File, PathError> {
        let create = OFlag::O_NOFOLLOW | OFlag::O_CREAT;
        let (here, shared, name, how) = match self.walk(path, Missing::Stop)? {
            End::Directory(here) => return Err(PathError::Kind { path: here.path, want: "file" }),
            End::Other { here, shared, name, .. } => (here, shared, name, create),
            End::Descriptor { here, name } => (here, false, name, OFlag::empty()),
            End::Nothing { here, shared, names } if names.file_name() == Some(names.as_os_str()) => {
                (here, shared, names.into_os_string(), create)
            }
            End::Nothing { here, names, .. } => return Err(nothing(here.path.join(names))),
        };
        let path = here.path.join(&name);
        let opened = here.open(&name, OFlag::O_WRONLY | OFlag::O_APPEND | how, mode);
        let is_pipe = match &opened {
            Ok(file) => file.metadata().is_ok_and(|meta| meta.file_type().is_fifo()),
            Err(cause) => cause.raw_os_error() == Some(libc::ENXIO),
        };
        let opened =
            if is_pipe { here.open(&name, OFlag::O_RDWR | (how - OFlag::O_CREAT), mode) } else { opened };
        let file = opened.map_err(|cause| cannot_open(&path, cause))?;
        let meta = file.metadata().map_err(|cause| cannot_open(&path, cause))?;
        // With a second name it may be a file that is of importance elsewhere.
        if shared && (!meta.is_file() || meta.nlink() != 1 || !self.owns(meta.uid(), here.root)) {
            return Err(self.untrusted_file(path, &file, &meta));
        }
        // Whoever writes may wait.
        fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND)).map_err(|errno| cannot_open(&path, errno.into()))?;
        Ok(file)
    }

    /// Where `path` leads, which need not exist. What is at its end is not checked.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn route(self, path: &Path) -> Result<Route, PathError> {
        let (here, names) = match self.walk(path, Missing::Stop)? {
            End::Directory(here) => (here, PathBuf::new()),
            End::Other { here, name, .. } | End::Descriptor { here, name } => (here, name.into()),
            End::Nothing { here, names, .. } => (here, names),
        };
        let mut closed = here.closed;
        closed.extend(closed_dir(&here.path, &here.dir, &here.meta));
        // Nothing joined would be a slash.
        let path = here.path.join(names).components().collect();
        Ok(Route { path, closed })
    }

    fn entered(self, path: &Path, missing: Missing) -> Result<TrustedDir, PathError> {
        match self.walk(path, missing)? {
            End::Directory(here) => Ok(TrustedDir { trust: self, here }),
            End::Other { here, name, .. } | End::Descriptor { here, name } => {
                Err(PathError::Kind { path: here.path.join(name), want: "directory" })
            }
            End::Nothing { here, names, .. } => Err(nothing(here.path.join(names))),
        }
    }

    fn open_end(self, end: End) -> Result<File, PathError> {
        let (here, name, found, how) = match end {
            End::Directory(here) => return Err(PathError::Kind { path: here.path, want: "regular file" }),
            End::Nothing { here, names, .. } => return Err(nothing(here.path.join(names))),
            End::Other { here, name, found, .. } => (here, name, found, OFlag::O_NOFOLLOW),
            End::Descriptor { here, name } => {
                let found = self.look(&here, &name, OFlag::empty())?;
                (here, name, found, OFlag::empty())
            }
        };
        let path = here.path.join(&name);
        // A pipe, say, is not opened at all.
        self.check_file(&path, &found.file, &found.meta, here.root)?;
        let open = || {
            let file = here.open(&name, OFlag::O_RDONLY | how, 0)?;
            let meta = file.metadata()?;
            Ok((file, meta))
        };
        let (file, meta) = open().map_err(|cause| cannot_open(&path, cause))?;
        self.check_file(&path, &file, &meta, here.root)?;
        Ok(file)
    }

    fn walk(self, path: &Path, missing: Missing) -> Result<End, PathError> {
        let mut absolute = std::path::absolute(path).map_err(|cause| cannot_open(path, cause))?;
        if path.as_os_str().as_bytes().ends_with(b"/.") {
            absolute.push("");
        }
        self.walk_from(Here::root()?, &absolute, missing)
    }

    /// Every directory is checked before a name in it is looked up; the last one is not.
    fn walk_from(self, mut here: Here, path: &Path, missing: Missing) -> Result<End, PathError> {
        let mut left = Vec::new();
        put_first(&mut left, path);
        let (mut links, mut made) = (0, 0);
        while let Some(name) = left.pop() {
            let shared = self.check_directory(&here)?;
            if name == "." {
                continue;
            }
            if name == ".." {
                here = here.above()?;
                continue;
            }
            let found = match (self.look(&here, &name, OFlag::O_NOFOLLOW), missing) {
                (Err(error), Missing::Make(mode)) if error.is_missing() && made < MOST_MADE => {
                    let is_last = left.iter().all(|name| name == ".");
                    here.make(&name, if is_last { mode } else { ABOVE })?;
                    made += 1;
                    left.push(name);
                    continue;
                }
                (Err(error), Missing::Stop) if error.is_missing() => match to_be_made(name, &mut left) {
                    Some(names) => return Ok(End::Nothing { here, shared, names }),
                    None => continue,
                },
                (found, _) => found?,
            };
            if found.meta.is_dir() {
                here = here.below(&name, found);
            } else if found.meta.is_symlink() {
                links += 1;
                if links > MOST_LINKS {
                    return Err(PathError::TooManyLinks { path: path.to_owned() });
                }
                let Some(text) = self.link(&here, shared, &name, &found)? else {
                    return if left.is_empty() {
                        Ok(End::Descriptor { here, name })
                    } else {
                        Err(PathError::ProcLink { path: here.path.join(name) })
                    };
                };
                if text.is_absolute() {
                    here = Here::root()?;
                }
                put_first(&mut left, &text);
            } else if left.is_empty() {
                return Ok(End::Other { here, shared, name, found });
            } else {
                return Err(PathError::Kind { path: here.path.join(name), want: "directory" });
            }
        }
        Ok(End::Directory(here))
    }

    /// What stands under this name, and that it is not on the file system of somebody who is not trusted.
    fn look(self, here: &Here, name: &OsStr, follow: OFlag) -> Result<Named, PathError> {
        let at = || here.path.join(name);
        let path = OFlag::O_PATH | OFlag::O_CLOEXEC | follow;
        // As a directory first: only that mounts what is mounted on demand.
        let fd = match openat(&here.dir, name, path | OFlag::O_DIRECTORY, Mode::empty()) {
            Err(Errno::ENOTDIR | Errno::ELOOP) => openat(&here.dir, name, path, Mode::empty()),
            opened => opened,
        };
        let file = File::from(fd.map_err(|errno| cannot_open(&at(), errno.into()))?);
        let mount = mount::id(&file).map_err(|cause| cannot_open(&at(), cause))?;
        if let Some(id) = mount.filter(|_| mount != here.mount) {
            match mount::fuse_mounter(id).map_err(|cause| cannot_open(&at(), cause))? {
                Some(mounter) if !self.owns(mounter, here.root) => {
                    return Err(PathError::Mounted { path: at(), mounter });
                }
                Some(_) | None => {}
            }
        }
        let meta = file.metadata().map_err(|cause| cannot_open(&at(), cause))?;
        Ok(Named { file, meta, mount })
    }

    /// Where a link leads; `None` for one that leads elsewhere than it says.
    fn link(
        self,
        here: &Here,
        shared: bool,
        name: &OsStr,
        found: &Named,
    ) -> Result<Option<PathBuf>, PathError> {
        let at = here.path.join(name);
        self.check_link(here, shared, at.clone(), &found.file, &found.meta)?;
        let read = || -> Result<_, Errno> {
            Ok((readlinkat(&found.file, "")?, fstatfs(&here.dir)?.filesystem_type() == PROC_SUPER_MAGIC))
        };
        let (text, in_proc) = read().map_err(|errno| cannot_open(&at, errno.into()))?;
        // /proc/self says 4711, and /proc/mounts says self/mounts; those of descriptors say /tmp/x, or pipe:[5].
        let honest = !text.as_bytes().contains(&b':') && !text.as_bytes().starts_with(b"/");
        Ok((honest || !in_proc).then(|| text.into()))
    }
}

/// What is missing of a way: `name`, and what is left behind it. What is made of it are directories, so one that the way
/// leaves again (`..`) leads back to where it is missing: `None` when that is so of all, and the way goes on from there.
fn to_be_made(name: OsString, left: &mut Vec<OsString>) -> Option<PathBuf> {
    let mut names = vec![name];
    while let Some(name) = left.pop() {
        if name == ".." {
            while names.pop().is_some_and(|name| name == ".") {}
            if names.is_empty() {
                return None;
            }
        } else {
            names.push(name);
        }
    }
    Some(names.iter().collect())
}

impl TrustedDir {
    fn checked(self) -> Result<Self, PathError> {
        self.trust.check_end(&self.here)?;
        Ok(self)
    }

    /// Refuses a directory in which others may put things, sticky or not.
    ///
    /// # Errors
    /// [`PathError::Untrusted`].
    pub fn for_us_alone(self) -> Result<Self, PathError> {
        if self.trust.check_end(&self.here)? {
            return Err(self.trust.refused(&self.here));
        }
        Ok(self)
    }

    /// What it is.
    pub fn metadata(&self) -> &Metadata {
        &self.here.meta
    }

    /// Opens a regular file to read it, as [`Trust::open`] does. It may be a symbolic link.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn open(&self, name: &OsStr) -> Result<File, PathError> {
        self.trust.open_end(self.trust.walk_from(self.here.again()?, Path::new(name), Missing::Refuse)?)
    }

    /// Opens what stands under this name, which is no link, with these flags; with `O_CREAT` it is made with this mode,
    /// less the umask. Does not wait.
    ///
    /// # Errors
    /// What `openat(2)` says.
    pub fn open_as(&self, name: &OsStr, flags: OFlag, mode: u32) -> io::Result<File> {
        self.here.open(name, flags | OFlag::O_NOFOLLOW, mode)
    }

    /// What stands under this name: a link is a link.
    ///
    /// # Errors
    /// What `openat(2)` says.
    pub fn look_at(&self, name: &OsStr) -> io::Result<Metadata> {
        self.here.open(name, OFlag::O_PATH | OFlag::O_NOFOLLOW, 0)?.metadata()
    }

    /// Gives what stands under this name this mode, and says what it is then. A link is not followed.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_mode(&self, name: &OsStr, mode: u32) -> io::Result<Metadata> {
        self.here.set_mode(name, mode)
    }

    /// Removes a file, a link or a socket.
    ///
    /// # Errors
    /// What `unlinkat(2)` says.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.here.dir, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Puts one file in the place of another.
    ///
    /// # Errors
    /// What `renameat(2)` says.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(renameat(&self.here.dir, from, &self.here.dir, to)?)
    }

    /// Waits until its names are on the disk.
    ///
    /// # Errors
    /// What `fsync(2)` says.
    pub fn sync(&self) -> io::Result<()> {
        self.here.open(OsStr::new("."), OFlag::O_DIRECTORY, 0)?.sync_all()
    }

    /// The names in it, in no order.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> io::Result<impl Iterator<Item = io::Result<OsString>> + use<>> {
        let dir = Dir::from_fd(self.here.open(OsStr::new("."), OFlag::O_DIRECTORY, 0)?.into())?;
        Ok(dir.into_iter().map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, chown, symlink},
    };

    use nix::unistd::geteuid;
    use proptest::prelude::*;

    use super::*;

    const OTHER: u32 = 65_534;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// `d/f` in a directory of ours, and what `change` makes of it.
    fn tree(change: impl FnOnce(&Path)) -> tempfile::TempDir {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("d")).unwrap();
        fs::write(base.path().join("d/f"), "").unwrap();
        chmod(&base.path().join("d"), 0o755);
        chmod(&base.path().join("d/f"), 0o644);
        change(base.path());
        base
    }

    fn said<T>(base: &Path, got: Result<T, PathError>) -> String {
        got.map_or_else(
            |error| error.to_string().replace(base.to_str().unwrap(), "BASE"),
            |_| "trusted".to_owned(),
        )
    }

    #[test]
    fn who_can_turn_a_path_aside_is_refused_by_name() {
        type Change = fn(&Path);
        let cases: [(&str, Change, &str, &str); 22] = [
            ("plain", |_| {}, "d/f", "trusted"),
            ("a file named as a directory", |_| {}, "d/f/.", "BASE/d/f is not a directory"),
            (
                "a link that names a file as a directory",
                |at| symlink("f/", at.join("d/l")).unwrap(),
                "d/l",
                "BASE/d/f is not a directory",
            ),
            ("closed to others", |at| chmod(&at.join("d"), 0o700), "d/f", "trusted"),
            ("for its group to read", |at| chmod(&at.join("d"), 0o750), "d/f", "trusted"),
            (
                "everybody's",
                |at| chmod(&at.join("d"), 0o777),
                "d/f",
                "BASE/d belongs to user OURS and has mode 0777: ",
            ),
            (
                "its group's",
                |at| chmod(&at.join("d"), 0o775),
                "d/f",
                "BASE/d belongs to user OURS and has mode 0775: ",
            ),
            ("the remedy", |at| chmod(&at.join("d"), 0o772), "d/f", "(chmod go-w BASE/d, or choose"),
            ("above", |at| chmod(at, 0o777), "d/f", "BASE belongs to user OURS and has mode 0777: "),
            ("sticky", |at| chmod(&at.join("d"), 0o1777), "d/f", "trusted"),
            (
                "a file of everybody's",
                |at| chmod(&at.join("d/f"), 0o646),
                "d/f",
                "BASE/d/f belongs to user OURS and has",
            ),
            ("a file of its group's", |at| chmod(&at.join("d/f"), 0o664), "d/f", "has mode 0664: "),
            ("a link", |at| symlink("d/f", at.join("l")).unwrap(), "l", "trusted"),
            ("a link to a directory", |at| symlink(at.join("d"), at.join("l")).unwrap(), "l/f", "trusted"),
            (
                "a link out of everybody's",
                |at| {
                    fs::create_dir(at.join("w")).unwrap();
                    chmod(&at.join("w"), 0o777);
                    symlink("../d/f", at.join("w/l")).unwrap();
                },
                "w/l",
                "BASE/w belongs to user OURS and has mode 0777: ",
            ),
            (
                "a link through everybody's",
                |at| {
                    fs::create_dir(at.join("w")).unwrap();
                    chmod(&at.join("w"), 0o777);
                    symlink("w/../d/f", at.join("l")).unwrap();
                },
                "l",
                "BASE/w belongs to user OURS and has mode 0777: ",
            ),
            (
                "a circle",
                |at| symlink("l", at.join("l")).unwrap(),
                "l/f",
                "BASE/l/f leads through more than 40 symbolic",
            ),
            ("a file as a directory", |_| {}, "d/f/x", "BASE/d/f is not a directory"),
            ("a directory as a file", |_| {}, "d", "BASE/d is not a regular file"),
            ("nothing", |_| {}, "d/none", "cannot open BASE/d/none: no such file or directory"),
            (
                "no link out of /proc",
                |at| symlink("/proc/self/cwd/x", at.join("l")).unwrap(),
                "l",
                "/proc/PID/cwd is a link",
            ),
            (
                "a pipe, which is not waited for",
                |at| nix::unistd::mkfifo(&at.join("d/p"), Mode::S_IRUSR).unwrap(),
                "d/p",
                "BASE/d/p is not a regular file",
            ),
        ];
        for (case, change, path, want) in cases {
            let base = tree(change);
            let got = said(base.path(), Trust::own().open(&base.path().join(path)));
            let want =
                want.replace("OURS", &geteuid().to_string()).replace("PID", &std::process::id().to_string());
            assert!(got.contains(&want), "{case}: {got}");
        }
    }

    #[test]
    fn what_belongs_to_others_is_refused() {
        if !geteuid().is_root() {
            // Nothing can be given to anybody then.
            return;
        }
        type Change = fn(&Path);
        let cases: [(&str, Change, &str, &str); 5] = [
            (
                "a directory",
                |at| chown(at.join("d"), Some(OTHER), None).unwrap(),
                "d/f",
                "BASE/d belongs to user 65534",
            ),
            (
                "a file",
                |at| chown(at.join("d/f"), Some(OTHER), None).unwrap(),
                "d/f",
                "(chown 0 BASE/d/f, or choose",
            ),
            (
                "both",
                |at| {
                    chown(at.join("d"), Some(OTHER), None).unwrap();
                    chmod(&at.join("d"), 0o777);
                },
                "d/f",
                "it must belong to root, and nobody else may write to it (copy what is meant",
            ),
            (
                "a link of theirs, where only root could have put it",
                |at| {
                    symlink("d/f", at.join("l")).unwrap();
                    std::os::unix::fs::lchown(at.join("l"), Some(OTHER), None).unwrap();
                },
                "l",
                "trusted",
            ),
            (
                "a link of theirs in a sticky directory",
                |at| {
                    chmod(&at.join("d"), 0o1777);
                    symlink("f", at.join("d/l")).unwrap();
                    std::os::unix::fs::lchown(at.join("d/l"), Some(OTHER), None).unwrap();
                },
                "d/l",
                "BASE/d/l belongs to user 65534",
            ),
        ];
        for (case, change, path, want) in cases {
            let base = tree(change);
            let got = said(base.path(), Trust::own().open(&base.path().join(path)));
            assert!(got.contains(want), "{case}: {got}");
        }
        // What root owns, and what its own user does, an agent of theirs believes.
        let base = tree(|at| chown(at.join("d/f"), Some(OTHER), None).unwrap());
        chmod(base.path(), 0o755);
        assert_eq!(said(base.path(), Trust::of(OTHER).open(&base.path().join("d/f"))), "trusted");
        assert_ne!(said(base.path(), Trust::of(OTHER + 1).open(&base.path().join("d/f"))), "trusted");
    }

    #[test]
    fn directories_are_made_as_asked() {
        let base = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(base.path().join(name)).unwrap().mode() & 0o7777;
        let made = Trust::own().make_directory(&base.path().join("a/b/c"), 0o700).unwrap();
        assert_eq!((mode("a"), mode("a/b"), mode("a/b/c")), (0o755, 0o755, 0o700));
        assert_eq!(made.metadata().mode() & 0o7777, 0o700);
        drop(Trust::own().make_directory(&base.path().join("a/b"), 0o700).unwrap());
        assert_eq!(mode("a/b"), 0o755, "what is there stays as it is");

        chmod(&base.path().join("a"), 0o777);
        let refused = said(base.path(), Trust::own().make_directory(&base.path().join("a/n/m"), 0o755));
        assert!(refused.starts_with("BASE/a belongs to user"), "{refused}");
        assert!(!base.path().join("a/n").exists());
        chmod(&base.path().join("a"), 0o1777);
        let shared = Trust::own().make_directory(&base.path().join("a"), 0o755).unwrap();
        assert!(said(base.path(), shared.for_us_alone()).contains("chmod go-w BASE/a"));
    }

    #[test]
    fn a_log_goes_where_nobody_can_send_it_elsewhere() {
        type Change = fn(&Path);
        let cases: [(&str, Change, &str, bool); 9] = [
            ("a new file", |_| {}, "d/log", true),
            ("a name that only a directory can have", |_| {}, "d/log/", false),
            ("a file named as a directory", |_| {}, "d/f/.", false),
            ("everybody's directory", |at| chmod(&at.join("d"), 0o777), "d/log", false),
            ("a link of ours", |at| symlink("f", at.join("d/log")).unwrap(), "d/log", true),
            (
                "a second name in a sticky directory",
                |at| {
                    chmod(&at.join("d"), 0o1777);
                    fs::hard_link(at.join("d/f"), at.join("d/log")).unwrap();
                },
                "d/log",
                false,
            ),
            ("a sticky directory", |at| chmod(&at.join("d"), 0o1777), "d/log", true),
            (
                "a pipe that nobody reads",
                |at| nix::unistd::mkfifo(&at.join("d/log"), Mode::S_IRWXU).unwrap(),
                "d/log",
                true,
            ),
            ("no directory", |_| {}, "none/log", false),
        ];
        for (case, change, path, well) in cases {
            let base = tree(change);
            let got = Trust::own().to_append().append(&base.path().join(path), 0o640);
            assert_eq!(got.is_ok(), well, "{case}: {got:?}");
        }
        for device in ["/dev/null", "/dev/stderr"] {
            Trust::own().to_append().append(Path::new(device), 0o640).unwrap();
        }
        if geteuid().is_root() {
            // As /var/log is, with some distributions.
            let group: [(&str, Change, bool); 2] = [
                ("its group may write", |_| {}, true),
                ("and has put a link there", |at| symlink("f", at.join("d/log")).unwrap(), false),
            ];
            for (case, change, well) in group {
                let base = tree(change);
                chmod(&base.path().join("d"), 0o775);
                let got = Trust::own().to_append().append(&base.path().join("d/log"), 0o640);
                assert_eq!(got.is_ok(), well, "{case}: {got:?}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

        /// Whatever the modes and links: what is opened is what the path leads to, and nobody else could have put it there.
        #[test]
        fn a_trusted_path_is_the_path(
            modes in proptest::array::uniform3(prop::sample::select(vec![0o755, 0o700, 0o711, 0o1777, 0o777, 0o775, 0o757])),
            links in prop::collection::vec((0..3_usize, prop::sample::select(vec![
                "a", "f", "f/", "f/.", "b/.", "..", "../a", "a/b", "/BASE/a/f", "/BASE/a/b/c", "l0", "l1", "l2/f", "none", "../../a/f", "/proc/self/cwd",
            ])), 0..4),
            path in prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "f", "l0", "l1", "l2", "l3", "..", "."]), 1..6),
        ) {
            let base = tempfile::tempdir().unwrap();
            let base = base.path().canonicalize().unwrap();
            let dirs = ["a", "a/b", "a/b/c"].map(|name| base.join(name));
            for dir in &dirs {
                fs::create_dir(dir).unwrap();
                fs::write(dir.join("f"), "").unwrap();
                chmod(&dir.join("f"), 0o644);
            }
            for (nth, (dir, to)) in links.iter().enumerate() {
                let to = to.replace("/BASE", base.to_str().unwrap());
                symlink(to, dirs[*dir].join(format!("l{nth}"))).unwrap();
            }
            for (dir, mode) in dirs.iter().zip(modes) {
                chmod(dir, mode);
            }
            let path = base.join(path.iter().collect::<PathBuf>());
            let (got, real) = (Trust::own().open(&path), path.canonicalize());
            let safe = |mode: u32| mode & 0o022 == 0 || mode & 0o1000 != 0;
            if let Ok(file) = &got {
                let real = real.as_ref().unwrap();
                let (ours, theirs) = (file.metadata().unwrap(), fs::metadata(real).unwrap());
                prop_assert_eq!((ours.dev(), ours.ino()), (theirs.dev(), theirs.ino()));
                for dir in real.ancestors().skip(1) {
                    prop_assert!(safe(fs::metadata(dir).unwrap().mode()), "{}", dir.display());
                }
            } else if let Ok(real) = &real && real.starts_with(&base) && real.is_file() {
                prop_assert!(!modes.into_iter().all(safe) || links.iter().any(|(_, to)| to.starts_with("/proc")), "{got:?}");
            }
            for dir in &dirs {
                chmod(dir, 0o755);
            }
        }
    }
}
