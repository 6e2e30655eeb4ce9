//! The data directory: who may see it, one agent at a time, and writes that are all or nothing.
//!
//! It holds keys, so nothing in it is believed until its owner and mode were seen, and those of every directory above it: a
//! file that others could have written is refused, not mended, since its keys may be known. A write goes to a new file, which
//! takes the place of the old one only when every byte is on the disk: whenever the agent is killed, one whole state is
//! there.

use std::{
    ffi::OsStr,
    fs::{File, Metadata, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, unistd::geteuid};
use zeroize::Zeroizing;

use super::IssuerError;
use crate::os::trusted::{PathError, Trust, TrustedDir, is_read_only};

const STATE: &str = "issuer.json";
const NEW_STATE: &str = "issuer.json.new";
const LOCK: &str = "issuer.lock";

/// More than the largest state: twice 64 records, each with a chain of certificates.
const MAX_STATE_LEN: u64 = 16 * 1024 * 1024;

/// The data directory, locked until it is let go of.
pub(super) struct DataDir {
    path: PathBuf,
    dir: TrustedDir,
    /// Holds the lock; the kernel releases it when the process ends, however it ends. `None` once it is let go of.
    lock: Option<File>,
}

impl DataDir {
    /// Opens the directory, which is made when missing, and locks it. Removes what a killed agent left half
    /// written.
    pub(super) fn open(dir: &Path) -> Result<Self, IssuerError> {
        // Those above it may hold more than keys: the socket, for one, which everybody must reach.
        let path = dir;
        let dir = Trust::own().make_directory_unchecked(path, 0o700).map_err(refused(path))?;
        check_directory(path, &dir, geteuid().as_raw())?;

        let lock_path = path.join(LOCK);
        let lock = dir
            .open_as(OsStr::new(LOCK), OFlag::O_WRONLY | OFlag::O_CREAT, 0o600)
            .map_err(|cause| IssuerError::Write { path: lock_path.clone(), cause })?;
        match crate::os::lock::take(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(IssuerError::Locked { path: lock_path }),
            Err(TryLockError::Error(cause)) => return Err(IssuerError::Write { path: lock_path, cause }),
        }
        let opened = Self { path: path.to_owned(), dir, lock: Some(lock) };
        opened.remove_unfinished()?;
        Ok(opened)
    }

    /// The state file.
    pub(super) fn state_path(&self) -> PathBuf {
        state_in(&self.path)
    }

    /// Reads the state. `None` when there is none yet.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, IssuerError> {
        read_state(&self.dir, &self.state_path(), geteuid().as_raw())
    }

    /// Writes nothing from now on, and gives the lock to whoever comes next.
    pub(super) fn let_go(&mut self) {
        self.lock = None;
    }

    /// Writes the state. On any error, and when the directory is another agent's by now, the state of before is in its place.
    pub(super) fn write(&self, text: &[u8]) -> Result<(), IssuerError> {
        if self.lock.is_none() {
            return Err(IssuerError::Locked { path: self.path.join(LOCK) });
        }
        self.remove_unfinished()?;
        let (new, state) = (OsStr::new(NEW_STATE), OsStr::new(STATE));
        let written = self.write_new(text).and_then(|()| {
            let failed = |cause| IssuerError::Write { path: self.state_path(), cause };
            self.dir.rename(new, state).map_err(failed)
        });
        if written.is_err() {
            // The first error is the one to tell; the file is also removed before the next try.
            drop(self.dir.remove(new));
            return written;
        }
        // Until the directory is on the disk, a power cut may bring the old state back, whose bundle would lack
        // what the new one signs with.
        self.dir.sync().map_err(|cause| IssuerError::Write { path: self.path.clone(), cause })
    }

    fn write_new(&self, text: &[u8]) -> Result<(), IssuerError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        self.dir
            .open_as(OsStr::new(NEW_STATE), flags, 0o600)
            .and_then(|mut file| {
                file.write_all(text)?;
                file.sync_all()
            })
            .map_err(|cause| IssuerError::Write { path: self.path.join(NEW_STATE), cause })
    }

    fn remove_unfinished(&self) -> Result<(), IssuerError> {
        match self.dir.remove(OsStr::new(NEW_STATE)) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                Err(IssuerError::Write { path: self.path.join(NEW_STATE), cause: err })
            }
            _ => Ok(()),
        }
    }
}

/// Where the state is in a data directory.
pub(super) fn state_in(data_dir: &Path) -> PathBuf {
    data_dir.join(STATE)
}

/// Reads the state of an agent of the user of `trust`, which may be running. `None` when there is none.
pub(super) fn look_at_state(
    data_dir: &Path,
    trust: Trust,
) -> Result<Option<Zeroizing<Vec<u8>>>, IssuerError> {
    let dir = match trust.directory_unchecked(data_dir) {
        Ok(dir) => dir,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(refused(data_dir)(error)),
    };
    read_state(&dir, &state_in(data_dir), trust.user())
}

fn read_state(dir: &TrustedDir, path: &Path, ours: u32) -> Result<Option<Zeroizing<Vec<u8>>>, IssuerError> {
    let failed = |cause| IssuerError::Read { path: path.to_owned(), cause };
    let file = match dir.open_as(OsStr::new(STATE), OFlag::O_RDONLY, 0) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(failed(cause)),
    };
    check_owner(path, &file.metadata().map_err(failed)?, ours)?;
    read_secret(path, file, MAX_STATE_LEN).map(Some)
}

/// Looks at a data directory as an agent of user `ours` would. One that is missing is well: it is made.
///
/// # Errors
/// Its owner or mode, or those of a directory above it, are not what they must be; or it is none.
pub fn check_data_dir(path: &Path, ours: u32) -> Result<(), IssuerError> {
    match Trust::of(ours).directory_unchecked(path) {
        Ok(dir) => check_directory(path, &dir, ours),
        Err(error) if error.is_missing() => Ok(()),
        Err(error) => Err(refused(path)(error)),
    }
}

fn check_directory(path: &Path, dir: &TrustedDir, ours: u32) -> Result<(), IssuerError> {
    // Others may look at the names in it (kubelet and systemd make such directories), but not put files there.
    check_owner(path, dir.metadata(), ours)?;
    check_mode(path, dir.metadata(), 0o022, 0o700)
}

/// Opens a file of the admin's to read it, where nobody else could have put another.
pub(super) fn open_to_read(path: &Path, trust: Trust) -> Result<File, IssuerError> {
    trust.open(path).map_err(refused(path))
}

fn refused(path: &Path) -> impl FnOnce(PathError) -> IssuerError {
    |error| match error {
        PathError::Open { cause, .. } => IssuerError::Read { path: path.to_owned(), cause },
        PathError::Make { path, cause } => IssuerError::Write { path, cause },
        PathError::Kind { path, want } => IssuerError::FileType { path, want },
        error => IssuerError::Path(error),
    }
}

/// Looks at the file of a CA's key as an agent of user `trust` would.
///
/// # Errors
/// It cannot be opened, or others could read it or have put it there.
pub fn check_ca_key(path: &Path, trust: Trust) -> Result<(), IssuerError> {
    let file = trust.open(path).map_err(refused(path))?;
    check_supplied(path, &file, trust)
}

/// Reads a secret that an admin supplies, and that nobody but the agent's user and root reads.
pub(super) fn read_supplied_secret(
    path: &Path,
    trust: Trust,
    most: u64,
) -> Result<Zeroizing<Vec<u8>>, IssuerError> {
    let file = open_to_read(path, trust)?;
    check_supplied(path, &file, trust)?;
    read_file(path, file, most)
}

fn check_supplied(path: &Path, file: &File, trust: Trust) -> Result<(), IssuerError> {
    let meta = file.metadata().map_err(|cause| IssuerError::Read { path: path.to_owned(), cause })?;
    if trust.alone_reads(file, &meta) {
        return Ok(());
    }
    let remedy = if is_read_only(file) {
        "set defaultMode: 0400 for the volume, or 0440 with fsGroup".to_owned()
    } else {
        trust.closing(file, &meta, path)
    };
    Err(IssuerError::OpenSecret { path: path.to_owned(), found: meta.mode() & 0o7777, remedy })
}

/// Reads a file that nobody but its owner may read. It is looked at by its descriptor, so what was checked is what
/// is read.
pub(super) fn read_secret(path: &Path, file: File, most: u64) -> Result<Zeroizing<Vec<u8>>, IssuerError> {
    let failed = |cause| IssuerError::Read { path: path.to_owned(), cause };
    let found = file.metadata().map_err(failed)?;
    if found.is_file() {
        check_mode(path, &found, 0o077, 0o600)?;
    }
    read_file(path, file, most)
}

/// Reads a regular file of at most `most` bytes.
pub(super) fn read_file(path: &Path, file: File, most: u64) -> Result<Zeroizing<Vec<u8>>, IssuerError> {
    let failed = |cause| IssuerError::Read { path: path.to_owned(), cause };
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(IssuerError::FileType { path: path.to_owned(), want: "regular file" });
    }
    let too_large = |found| IssuerError::TooLarge { path: path.to_owned(), found, most };
    let len = usize::try_from(found.len()).map_err(|_unsaid| too_large(found.len()))?;
    if found.len() > most {
        return Err(too_large(found.len()));
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(len + 1));
    file.take(found.len()).read_to_end(&mut text).map_err(failed)?;
    Ok(text)
}

fn check_owner(path: &Path, found: &Metadata, ours: u32) -> Result<(), IssuerError> {
    if found.uid() == ours {
        return Ok(());
    }
    Err(IssuerError::Owner { path: path.to_owned(), found: found.uid(), ours })
}

fn check_mode(path: &Path, found: &Metadata, forbidden: u32, want: u32) -> Result<(), IssuerError> {
    let mode = found.mode() & 0o7777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(IssuerError::Mode { path: path.to_owned(), found: mode, want })
}
