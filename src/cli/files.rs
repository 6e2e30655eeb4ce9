//! Files of `--write`: SVIDs and keys, put in place whole or not at all.
//!
//! The directory is opened once and everything happens below that descriptor. Each file is written under another
//! name, created by us alone (`O_EXCL`) and readable by its owner alone, brought to disk, and renamed over the old
//! one when all of them are written: a reader never sees half a file, a key is at no moment readable by others, and
//! a symbolic link at the place is replaced, never followed. What fails in between is removed again.
//! `tempfile` is not used: it works by path, and a path can be turned aside between two files.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open, openat, renameat},
    sys::stat::{Mode, fchmod},
    unistd::{UnlinkatFlags, fsync, unlinkat},
};

use super::text::shell_word;
use crate::os::sentence::said;

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readers {
    /// Mode 0644.
    Everybody,
    /// Mode 0600.
    Owner,
}

impl Readers {
    fn mode(self) -> Mode {
        match self {
            Self::Everybody => Mode::from_bits_truncate(0o644),
            Self::Owner => Mode::from_bits_truncate(0o600),
        }
    }
}

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum BatchError {
    #[error("{}", no_directory(path, cause))]
    Directory { path: PathBuf, cause: io::Error },
    #[error("cannot write {}: {}", path.display(), said(cause))]
    Write { path: PathBuf, cause: io::Error },
}

fn no_directory(path: &Path, cause: &io::Error) -> String {
    let shown = path.display();
    match cause.kind() {
        io::ErrorKind::NotFound => {
            format!("there is no directory {shown}: mkdir -p {}", shell_word(&path.to_string_lossy()))
        }
        io::ErrorKind::NotADirectory => format!("{shown} is not a directory"),
        _ => format!("cannot open directory {shown}: {}", said(cause)),
    }
}

/// A directory and the files that are to appear in it.
#[derive(Debug)]
pub(super) struct Batch {
    path: PathBuf,
    dir: OwnedFd,
    /// Written and not in place yet: (name for now, name in the end).
    staged: Vec<(String, String)>,
}

impl Batch {
    /// Opens `dir`.
    ///
    /// # Errors
    /// When it does not exist, is no directory, or may not be opened.
    pub(super) fn open(path: &Path) -> Result<Self, BatchError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let dir = open(path, flags, Mode::empty())
            .map_err(|errno| BatchError::Directory { path: path.to_owned(), cause: errno.into() })?;
        Ok(Self { path: path.to_owned(), dir, staged: Vec::new() })
    }

    /// Writes a file that [`Batch::commit`] will call `name`.
    ///
    /// # Errors
    /// When it cannot be written in full.
    pub(super) fn stage(&mut self, name: &str, contents: &[u8], readers: Readers) -> Result<(), BatchError> {
        let failed = |cause| BatchError::Write { path: self.path.join(name), cause };
        let temporary = format!(".{name}.{}.new", std::process::id());
        let fd = self.create(&temporary).map_err(failed)?;
        self.staged.push((temporary, name.to_owned()));
        let failed = |cause| BatchError::Write { path: self.path.join(name), cause };
        let mut file = File::from(fd);
        file.write_all(contents).map_err(failed)?;
        // After the write: until then it is the owner's alone. Not subject to the umask.
        fchmod(&file, readers.mode()).map_err(|errno| failed(errno.into()))?;
        file.sync_all().map_err(failed)
    }

    /// Puts all files in place, in the order in which they were staged.
    ///
    /// # Errors
    /// When one cannot be put in place (a directory of that name, say): those before it are, the rest is removed.
    pub(super) fn commit(mut self) -> Result<(), BatchError> {
        let mut staged = std::mem::take(&mut self.staged).into_iter();
        while let Some((temporary, name)) = staged.next() {
            if let Err(errno) =
                renameat(self.dir.as_fd(), temporary.as_str(), self.dir.as_fd(), name.as_str())
            {
                self.staged = std::iter::once((temporary, name.clone())).chain(staged).collect();
                return Err(BatchError::Write { path: self.path.join(name), cause: errno.into() });
            }
        }
        fsync(self.dir.as_fd())
            .map_err(|errno| BatchError::Write { path: self.path.clone(), cause: errno.into() })
    }

    fn create(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let create = || openat(self.dir.as_fd(), name, flags, Readers::Owner.mode());
        match create() {
            // Left by a run of this process ID that was killed. Removed, not reused: who made it may hold it open.
            Err(nix::Error::EEXIST) => {
                unlinkat(self.dir.as_fd(), name, UnlinkatFlags::NoRemoveDir)?;
                Ok(create()?)
            }
            other => Ok(other?),
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for (temporary, _) in &self.staged {
            // Best effort: the error that brought us here is the one to report.
            let _ = unlinkat(self.dir.as_fd(), temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn files_appear_whole_with_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        let mut batch = Batch::open(dir.path()).unwrap();
        batch.stage("a.pem", b"a", Readers::Everybody).unwrap();
        batch.stage("a.key", b"k", Readers::Owner).unwrap();
        assert!(!names(dir.path()).iter().any(|name| name.starts_with('a')), "not before the commit");
        batch.commit().unwrap();
        assert_eq!(names(dir.path()), ["a.key", "a.pem"]);
        for (name, mode) in [("a.key", 0o600), ("a.pem", 0o644)] {
            assert_eq!(
                fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o7777,
                mode,
                "{name}"
            );
        }
    }

    #[test]
    fn a_link_is_replaced_and_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("svid.0.key")).unwrap();
        let left = format!(".svid.0.key.{}.new", std::process::id());
        std::os::unix::fs::symlink(&target, dir.path().join(left)).unwrap();
        let mut batch = Batch::open(dir.path()).unwrap();
        batch.stage("svid.0.key", b"new", Readers::Owner).unwrap();
        batch.commit().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "old");
        assert!(fs::symlink_metadata(dir.path().join("svid.0.key")).unwrap().is_file());
        assert_eq!(names(dir.path()), ["svid.0.key", "target"]);
    }

    #[test]
    fn a_failure_leaves_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        let mut batch = Batch::open(dir.path()).unwrap();
        for name in ["a", "b", "c"] {
            batch.stage(name, b"x", Readers::Owner).unwrap();
        }
        let said = batch.commit().unwrap_err().to_string();
        assert!(said.contains("/b: "), "{said}");
        assert_eq!(names(dir.path()), ["a", "b"]);
        drop(Batch::open(&dir.path().join("a")).unwrap_err());
        drop(Batch::open(&dir.path().join("missing")).unwrap_err());
    }
}
