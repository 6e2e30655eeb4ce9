//! The file that a process executes, as the kernel tells it by `/proc/PID/exe`.

use std::{ffi::OsString, fs::File};

use nix::{
    fcntl::{AtFlags, readlinkat},
    sys::stat::{FileStat, fstat, fstatat},
};

use super::UnixError;
use crate::attest::{attestors::Evidence, error::ProcReadError, process::ProcDir};

/// Its name in `/proc/PID`. A kernel thread has none, and only root and the user's own processes may look.
pub(super) const NAME: &str = "exe";

/// Names a file's content: another content has another stamp, as far as its file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of the file that `stat` describes.
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::try_from(self.size).unwrap_or(0)
    }

    /// When its content, name or owner last changed, in seconds since 1970. Unlike the time of modification, no
    /// user can set it.
    pub(super) fn changed(&self) -> i64 {
        self.changed.0
    }
}

/// What a process executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Executable {
    pub(super) stamp: Stamp,
    /// Its path as the process sees it.
    pub(super) path: OsString,
}

impl Executable {
    pub(super) fn of(dir: &ProcDir) -> Result<Self, ProcReadError> {
        let stamp = stamp(dir)?;
        let path = readlinkat(&dir.fd, NAME).map_err(|errno| dir.unreadable(NAME, errno))?;
        Ok(Self { stamp, path })
    }
}

impl Evidence for Executable {
    fn holds(&self, dir: &ProcDir) -> Result<bool, ProcReadError> {
        Ok(*self == Self::of(dir)?)
    }
}

/// Which content the process executes.
pub(super) fn stamp(dir: &ProcDir) -> Result<Stamp, ProcReadError> {
    let stat = fstatat(&dir.fd, NAME, AtFlags::empty()).map_err(|errno| dir.unreadable(NAME, errno))?;
    Ok(Stamp::of(&stat))
}

/// The executable, open for reading, which must still be the one with this stamp.
pub(super) fn open(dir: &ProcDir, expected: &Stamp) -> Result<File, UnixError> {
    let file = dir.file(NAME)?;
    let opened = fstat(&file).map_err(|errno| dir.unreadable(NAME, errno))?;
    if Stamp::of(&opened) != *expected {
        return Err(UnixError::Changed { path: dir.path_of(NAME) });
    }
    Ok(file)
}
