//! A directory of the agent's own files: owner-only, written all or nothing, and what is damaged kept aside.
//!
//! Nothing in it is believed until its owner and mode were seen. A write goes to a new file (`<name>.tmp`, as spire-agent
//! has it), which takes the place of the old one only when every byte is on the disk.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::{fcntl::OFlag, unistd::geteuid};
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::error::DataFault;
use crate::os::{
    lock,
    trusted::{PathError, Trust, TrustedDir},
};

/// More than the largest of these files: a bundle of a thousand authorities.
const MAX_LEN: u64 = 16 * 1024 * 1024;

/// How many damaged files of a name are kept.
const MOST_DAMAGED: u32 = 9;

/// A directory that nobody else may write to.
#[derive(Debug)]
pub(super) struct FileDir {
    path: PathBuf,
    dir: TrustedDir,
    /// Held while something is written.
    writer: Mutex<Writes>,
}

/// Whose files they are to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writes {
    ThisAgent,
    TheNext,
}

/// Held while an agent uses a directory; the kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct DirLock {
    _lock: File,
}

impl FileDir {
    /// Opens the directory, which is made with `mode` when missing.
    pub(super) fn open(path: &Path, mode: u32) -> Result<Self, DataFault> {
        let dir = Trust::own().make_directory_unchecked(path, mode).map_err(refused(path))?;
        check_owner(path, dir.metadata())?;
        check_mode(path, dir.metadata(), 0o022, 0o700)?;
        Ok(Self { path: path.to_owned(), dir, writer: Mutex::new(Writes::ThisAgent) })
    }

    /// Locks the directory for this agent.
    pub(super) fn lock(&self, name: &str) -> Result<DirLock, DataFault> {
        let path = self.path.join(name);
        let failed = |cause| DataFault::Write { path: path.clone(), cause };
        let file =
            self.dir.open_as(OsStr::new(name), OFlag::O_WRONLY | OFlag::O_CREAT, 0o600).map_err(failed)?;
        match lock::take(&file) {
            Ok(()) => Ok(DirLock { _lock: file }),
            Err(TryLockError::WouldBlock) => Err(DataFault::Locked { path }),
            Err(TryLockError::Error(cause)) => Err(failed(cause)),
        }
    }

    /// Where a file of this name is.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a file. `None` when there is none.
    pub(super) fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, DataFault> {
        let path = self.path_of(name);
        let failed = |cause| DataFault::Read { path: path.clone(), cause };
        let file = match self.dir.open_as(OsStr::new(name), OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(failed(cause)),
        };
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(DataFault::FileType { path, want: "regular file" });
        }
        check_owner(&path, &found)?;
        check_mode(&path, &found, 0o077, 0o600)?;
        if found.len() > MAX_LEN {
            return Err(DataFault::TooLarge { path, found: found.len(), most: MAX_LEN });
        }
        // Room for all of it at once: a buffer that grows leaves copies behind.
        let len = usize::try_from(found.len()).unwrap_or(0);
        let mut text = Zeroizing::new(Vec::with_capacity(len + 1));
        file.take(found.len()).read_to_end(&mut text).map_err(failed)?;
        Ok(Some(text))
    }

    /// Leaves the files to the next agent. Waits for a write that is under way.
    pub(super) fn let_go(&self) {
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Writes::TheNext;
    }

    /// Writes a file. On any error, and when it is another agent's by now, what was there before is there still.
    pub(super) fn write(&self, name: &str, text: &[u8]) -> Result<(), DataFault> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if *writer == Writes::TheNext {
            return Err(DataFault::Locked { path: self.path_of(name) });
        }
        let new_name = format!("{name}.tmp");
        let new = OsStr::new(&new_name);
        let failed = |name: &str, cause| DataFault::Write { path: self.path_of(name), cause };
        match self.dir.remove(new) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(failed(&new_name, cause)),
            _ => {}
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let written = self
            .dir
            .open_as(new, flags, 0o600)
            .and_then(|mut file| {
                file.write_all(text)?;
                file.sync_all()
            })
            .map_err(|cause| failed(&new_name, cause))
            .and_then(|()| self.dir.rename(new, OsStr::new(name)).map_err(|cause| failed(name, cause)));
        if written.is_err() {
            // The first error is the one to tell; the file is also removed before the next try.
            drop(self.dir.remove(new));
            return written;
        }
        self.dir.sync().map_err(|cause| DataFault::Write { path: self.path.clone(), cause })
    }

    /// Keeps a damaged file under another name, and says so.
    pub(super) fn put_aside(&self, name: &str, damage: &'static str) -> DataFault {
        let path = self.path_of(name);
        for number in 1..=MOST_DAMAGED {
            let kept =
                if number == 1 { format!("{name}.damaged") } else { format!("{name}.damaged.{number}") };
            let is_free = self
                .dir
                .look_at(OsStr::new(&kept))
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            if is_free && self.dir.rename(OsStr::new(name), &OsString::from(&kept)).is_ok() {
                return DataFault::Damaged { path, damage, kept: self.path_of(&kept) };
            }
        }
        DataFault::DamagedOften { path, damage }
    }
}

fn refused(path: &Path) -> impl FnOnce(PathError) -> DataFault {
    |error| match error {
        PathError::Open { cause, .. } => DataFault::Read { path: path.to_owned(), cause },
        PathError::Make { path, cause } => DataFault::Write { path, cause },
        PathError::Kind { path, want } => DataFault::FileType { path, want },
        error => DataFault::Path(error),
    }
}

fn check_owner(path: &Path, found: &Metadata) -> Result<(), DataFault> {
    let ours = geteuid().as_raw();
    if found.uid() == ours {
        return Ok(());
    }
    Err(DataFault::Owner { path: path.to_owned(), found: found.uid(), ours })
}

fn check_mode(path: &Path, found: &Metadata, forbidden: u32, want: u32) -> Result<(), DataFault> {
    let mode = found.mode() & 0o7777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(DataFault::Mode { path: path.to_owned(), found: mode, want })
}
/// Reads the JSON object that a file is. serde takes a list for one too, in the order of its fields: that is damage.
pub(super) fn object<T: DeserializeOwned>(json: &[u8]) -> Result<T, &'static str> {
    let is_object = json.trim_ascii_start().starts_with(b"{");
    is_object
        .then(|| serde_json::from_slice(json).ok())
        .flatten()
        .ok_or("it is not the JSON that is expected")
}
