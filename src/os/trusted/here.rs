//! A directory on the way of a path, by its descriptor.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, open, openat},
    sys::{
        stat::{FchmodatFlags, Mode, fchmodat, mkdirat},
        statvfs::{FsFlags, fstatvfs},
    },
};

use super::{
    super::mount,
    error::{PathError, cannot_open},
};

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// A directory through which others than its owner and group cannot pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedDir {
    /// Without symbolic links.
    pub path: PathBuf,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// Whether an ACL may let others through all the same.
    pub has_acl: bool,
}

/// A directory on the way, open for nothing but the names in it.
#[derive(Debug)]
pub(super) struct Here {
    pub(super) path: PathBuf,
    pub(super) dir: File,
    pub(super) meta: Metadata,
    pub(super) mount: Option<u64>,
    pub(super) closed: Vec<ClosedDir>,
    /// Who owns `/`.
    pub(super) root: u32,
    /// Whether it is the top of what is mounted there.
    top: bool,
}

/// What stands under a name: open for nothing, so that a pipe does not wait and a device does nothing.
pub(super) struct Named {
    pub(super) file: File,
    pub(super) meta: Metadata,
    pub(super) mount: Option<u64>,
}

impl Here {
    pub(super) fn root() -> Result<Self, PathError> {
        let path = PathBuf::from("/");
        let (dir, meta, mount) =
            looked_at(open(&path, DIRECTORY, Mode::empty())).map_err(|cause| cannot_open(&path, cause))?;
        let root = meta.uid();
        Ok(Self { path, dir, meta, mount, closed: Vec::new(), root, top: false })
    }

    /// The directory that was found in it under this name.
    pub(super) fn below(mut self, name: &OsStr, found: Named) -> Self {
        let Named { file: dir, meta, mount } = found;
        let same_mount = if mount.is_some() { mount == self.mount } else { meta.dev() == self.meta.dev() };
        if same_mount {
            self.closed.extend(closed_dir(&self.path, &self.dir, &self.meta));
        } else {
            self.closed.clear();
        }
        self.path.push(name);
        Self { dir, meta, mount, top: !same_mount, ..self }
    }

    pub(super) fn above(mut self) -> Result<Self, PathError> {
        self.path.pop();
        let (dir, meta, mount) = looked_at(openat(&self.dir, "..", DIRECTORY, Mode::empty()))
            .map_err(|cause| cannot_open(&self.path, cause))?;
        // It is looked at again on the way down.
        self.closed.retain(|closed| closed.path != self.path);
        Ok(Self { dir, meta, mount, top: false, ..self })
    }

    pub(super) fn again(&self) -> Result<Self, PathError> {
        let dir = self.dir.try_clone().map_err(|cause| cannot_open(&self.path, cause))?;
        let (path, meta, closed) = (self.path.clone(), self.meta.clone(), Vec::new());
        Ok(Self { path, dir, meta, mount: self.mount, closed, root: self.root, top: self.top })
    }

    /// Whether it is a volume that was mounted here to be read: nobody writes to it by this name. A directory below the
    /// top is none, since a whole file system may be read-only for this process alone (`ProtectSystem=strict`).
    pub(super) fn is_volume(&self) -> bool {
        self.top && is_read_only(&self.dir)
    }

    /// Never waits for what is opened, and no terminal becomes ours.
    pub(super) fn open(&self, name: &OsStr, flags: OFlag, mode: u32) -> io::Result<File> {
        let always = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        Ok(openat(&self.dir, name, flags | always, Mode::from_bits_truncate(mode))?.into())
    }

    /// Makes a directory, unless somebody else just has.
    pub(super) fn make(&self, name: &OsStr, mode: u32) -> Result<(), PathError> {
        let made = match mkdirat(&self.dir, name, Mode::from_bits_truncate(mode)) {
            Err(Errno::EEXIST) => return Ok(()),
            Err(errno) => Err(errno.into()),
            // Never wider than it will be, not even for a moment.
            Ok(()) => self.set_mode(name, mode).map(drop),
        };
        made.map_err(|cause| PathError::Make { path: self.path.join(name), cause })
    }

    pub(super) fn set_mode(&self, name: &OsStr, mode: u32) -> io::Result<Metadata> {
        let file = self.open(name, OFlag::O_PATH | OFlag::O_NOFOLLOW, 0)?;
        let found = file.metadata()?;
        if found.mode() & 0o777 == mode {
            return Ok(found);
        }
        if found.is_symlink() {
            return Err(Errno::ELOOP.into());
        }
        // What was opened like this cannot be changed by its descriptor, but by the kernel's link to it.
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        fchmodat(AT_FDCWD, link.as_str(), Mode::from_bits_truncate(mode), FchmodatFlags::FollowSymlink)?;
        file.metadata()
    }
}

fn looked_at(opened: nix::Result<OwnedFd>) -> io::Result<(File, Metadata, Option<u64>)> {
    let dir = File::from(opened?);
    let (meta, mount) = (dir.metadata()?, mount::id(&dir)?);
    Ok((dir, meta, mount))
}

pub(super) fn closed_dir(path: &Path, dir: &File, meta: &Metadata) -> Option<ClosedDir> {
    let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
    let closed = || ClosedDir { path: path.to_owned(), uid, gid, mode, has_acl: mount::has_acl(dir) };
    (mode & 0o001 == 0).then(closed)
}

/// Whether the mount that it is on is read-only. Unknown counts as writable.
pub fn is_read_only(file: &File) -> bool {
    fstatvfs(file).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY))
}

/// The path's names, the first of them last. A `.` at its end stands for the slash there, behind which only a directory can
/// be (path_resolution(7)).
pub(super) fn put_first(left: &mut Vec<OsString>, path: &Path) {
    let text = path.as_os_str().as_bytes();
    if text.ends_with(b"/") || text.ends_with(b"/.") {
        left.push(".".into());
    }
    left.extend(path.components().rev().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    }));
}
