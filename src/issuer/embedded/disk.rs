//! The data directory: who may see it, one agent at a time, and writes that are all or nothing.
//!
//! It holds keys, so nothing in it is believed until its owner and mode were seen: a file that others could have
//! written is refused, not mended, since its keys may be known. A write goes to a new file, which takes the place of
//! the old one only when every byte is on the disk: whenever the agent is killed, one whole state is there.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, unistd::geteuid};
use zeroize::Zeroizing;

use super::IssuerError;

const STATE: &str = "issuer.json";
const NEW_STATE: &str = "issuer.json.new";
const LOCK: &str = "issuer.lock";

/// More than the largest state: twice 64 records, each with a chain of certificates.
const MAX_STATE_LEN: u64 = 16 * 1024 * 1024;

/// The data directory, locked for as long as this lives.
pub(super) struct DataDir {
    dir: PathBuf,
    /// Holds the lock; the kernel releases it when the process ends, however it ends.
    _lock: File,
}

impl DataDir {
    /// Opens the directory, which is made when missing, and locks it. Removes what a killed agent left half
    /// written.
    pub(super) fn open(dir: &Path) -> Result<Self, IssuerError> {
        let unreadable = |cause| IssuerError::Read { path: dir.to_owned(), cause };
        let found = match fs::metadata(dir) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                // Those above it may hold more than keys: the socket, for one, which everybody must reach.
                let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
                let made = above
                    .map_or(Ok(()), |above| DirBuilder::new().recursive(true).mode(0o755).create(above))
                    .and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(dir));
                made.map_err(|cause| IssuerError::Write { path: dir.to_owned(), cause })?;
                fs::metadata(dir).map_err(unreadable)?
            }
            found => found.map_err(unreadable)?,
        };
        if !found.is_dir() {
            return Err(IssuerError::FileType { path: dir.to_owned(), want: "directory" });
        }
        // Others may look at the names in it (kubelet and systemd make such directories), but not put files there.
        check_owner(dir, &found)?;
        check_mode(dir, &found, 0o022, 0o700)?;

        let lock_path = dir.join(LOCK);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&lock_path)
            .map_err(|cause| IssuerError::Write { path: lock_path.clone(), cause })?;
        match crate::os::lock::take(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(IssuerError::Locked { path: lock_path }),
            Err(TryLockError::Error(cause)) => return Err(IssuerError::Write { path: lock_path, cause }),
        }
        let opened = Self { dir: dir.to_owned(), _lock: lock };
        opened.remove_unfinished()?;
        Ok(opened)
    }

    /// The state file.
    pub(super) fn state_path(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// Reads the state. `None` when there is none yet.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, IssuerError> {
        let path = self.state_path();
        let failed = |cause| IssuerError::Read { path: path.clone(), cause };
        let file = match open_to_read(&path, OFlag::O_NOFOLLOW) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(failed(cause)),
        };
        check_owner(&path, &file.metadata().map_err(failed)?)?;
        read_secret(&path, file, MAX_STATE_LEN).map(Some)
    }

    /// Writes the state. On any error the state of before is in its place.
    pub(super) fn write(&self, text: &[u8]) -> Result<(), IssuerError> {
        self.remove_unfinished()?;
        let new = self.dir.join(NEW_STATE);
        let written = write_new(&new, text).and_then(|()| {
            let state = self.state_path();
            fs::rename(&new, &state).map_err(|cause| IssuerError::Write { path: state, cause })
        });
        if written.is_err() {
            // The first error is the one to tell; the file is also removed before the next try.
            drop(fs::remove_file(&new));
            return written;
        }
        // Until the directory is on the disk, a power cut may bring the old state back, whose bundle would lack
        // what the new one signs with.
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|cause| IssuerError::Write { path: self.dir.clone(), cause })
    }

    fn remove_unfinished(&self) -> Result<(), IssuerError> {
        let path = self.dir.join(NEW_STATE);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(IssuerError::Write { path, cause: err }),
            _ => Ok(()),
        }
    }
}

fn write_new(path: &Path, text: &[u8]) -> Result<(), IssuerError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| {
            file.write_all(text)?;
            file.sync_all()
        })
        .map_err(|cause| IssuerError::Write { path: path.to_owned(), cause })
}

/// Opens without waiting: a FIFO in place of the file must not hold the agent up.
pub(super) fn open_to_read(path: &Path, more: OFlag) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags((OFlag::O_NONBLOCK | more).bits()).open(path)
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

fn check_owner(path: &Path, found: &fs::Metadata) -> Result<(), IssuerError> {
    let ours = geteuid().as_raw();
    if found.uid() == ours {
        return Ok(());
    }
    Err(IssuerError::Owner { path: path.to_owned(), found: found.uid(), ours })
}

fn check_mode(path: &Path, found: &fs::Metadata, forbidden: u32, want: u32) -> Result<(), IssuerError> {
    let mode = found.mode() & 0o7777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(IssuerError::Mode { path: path.to_owned(), found: mode, want })
}
