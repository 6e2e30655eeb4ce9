//! Files that hold an issuer's keys and state: owner-only, one agent at a time, written all or nothing.
//!
//! Nothing in them is believed until their owner and mode were seen, and those of every directory above: a file that others
//! could have written is refused, not mended, since its keys may be known. A write goes to a new file, which takes the place of
//! the old one only when every byte is on the disk: whenever the agent is killed, one whole state is there.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::{errno::Errno, fcntl::OFlag, unistd::geteuid};
use zeroize::Zeroizing;

use crate::os::{
    lock,
    sentence::said,
    trusted::{PathError, Trust, TrustedDir, is_read_only},
};

/// More than the largest of these files: a state with its chains, or a bundle of a thousand authorities.
const MAX_LEN: u64 = 16 * 1024 * 1024;

/// How many damaged files of a name are kept.
const MOST_DAMAGED: u32 = 9;

/// Why a file or directory of an issuer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    /// Reading failed.
    #[error("cannot read {}: {}", path.display(), said(cause))]
    Read { path: PathBuf, cause: io::Error },
    /// Writing failed (no space, a read-only file system, no permission): what was there before is still there and in
    /// force.
    #[error("cannot write {}: {}", path.display(), said(cause))]
    Write { path: PathBuf, cause: io::Error },
    /// A file or directory belongs to another user than `ours`, which is the agent's effective uid.
    #[error("{} belongs to uid {found}, but the agent runs as uid {ours} (chown {ours} {})", path.display(), path.display())]
    Owner { path: PathBuf, found: u32, ours: u32 },
    /// Others than the owner may read or write a file, or write to a directory.
    #[error("{} has mode {found:04o}, which is open to others; it must be {want:04o} (chmod {want:o} {})", path.display(), path.display())]
    Mode { path: PathBuf, found: u32, want: u32 },
    /// Others than root and the agent's user may read a secret that was supplied.
    #[error(
        "{} has mode {found:04o}, and others can read it: nobody but the agent's user, a group of his own and root may \
         ({remedy})",
        path.display()
    )]
    OpenSecret {
        path: PathBuf,
        found: u32,
        /// What makes it right.
        remedy: String,
    },
    /// Something else stands where a file or directory should be.
    #[error("{} is not a {want}", path.display())]
    FileType {
        path: PathBuf,
        /// `directory` or `regular file`.
        want: &'static str,
    },
    /// A link stands where a file should be: it is not followed.
    #[error("{} is a symbolic link, which is not followed: put the file itself in its place", path.display())]
    Link { path: PathBuf },
    /// Others could put something else in the place of a file or directory.
    #[error(transparent)]
    Path(PathError),
    /// Another agent uses the directory.
    #[error("{} is locked: another agent uses this data_dir", path.display())]
    Locked { path: PathBuf },
    /// The file is larger than any such file is.
    #[error("{} has {found} bytes, more than the {most} that it can have", path.display())]
    TooLarge { path: PathBuf, found: u64, most: u64 },
}

/// A directory that nobody else may write to.
#[derive(Debug)]
pub struct FileDir {
    path: PathBuf,
    dir: TrustedDir,
    ours: u32,
    /// What the name of a file ends in that is not written to its end yet.
    unfinished: &'static str,
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
    /// Opens the directory, which is made for its owner alone when missing. Until it is written to its end, a file's name ends
    /// in `unfinished`.
    ///
    /// # Errors
    /// [`FileFault`]: it or a directory above it is not the agent's alone, or cannot be made.
    pub fn open(path: &Path, unfinished: &'static str) -> Result<Self, FileFault> {
        let ours = geteuid().as_raw();
        // Those above it may hold more than keys: the socket, for one, which everybody must reach.
        let dir = Trust::own().make_directory_unchecked(path, 0o700).map_err(refused(path))?;
        check_directory(path, &dir, ours)?;
        Ok(Self { path: path.to_owned(), dir, ours, unfinished, writer: Mutex::new(Writes::ThisAgent) })
    }

    /// Opens the directory of an agent of the user of `trust`, to look at what is in it. `None` when there is none.
    pub(super) fn look_at(
        path: &Path,
        trust: Trust,
        unfinished: &'static str,
    ) -> Result<Option<Self>, FileFault> {
        match trust.directory_unchecked(path) {
            Ok(dir) => {
                let (ours, writer) = (trust.user(), Mutex::new(Writes::TheNext));
                Ok(Some(Self { path: path.to_owned(), dir, ours, unfinished, writer }))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(refused(path)(error)),
        }
    }

    /// Locks the directory for this agent.
    pub(super) fn lock(&self, name: &str) -> Result<DirLock, FileFault> {
        let path = self.path_of(name);
        let failed = |cause| FileFault::Write { path: path.clone(), cause };
        let file =
            self.dir.open_as(OsStr::new(name), OFlag::O_WRONLY | OFlag::O_CREAT, 0o600).map_err(failed)?;
        match lock::take(&file) {
            Ok(()) => Ok(DirLock { _lock: file }),
            Err(TryLockError::WouldBlock) => Err(FileFault::Locked { path }),
            Err(TryLockError::Error(cause)) => Err(failed(cause)),
        }
    }

    /// Whether somebody has locked it by this name. Makes nothing, and holds nothing for longer than a start tries.
    pub(super) fn is_locked(&self, name: &str) -> bool {
        let file = self.dir.open_as(OsStr::new(name), OFlag::O_RDONLY | OFlag::O_NOFOLLOW, 0);
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Whether [`FileDir::lock`] could have a file of this name. Makes nothing.
    pub(super) fn could_lock(&self, name: &str) -> Result<(), FileFault> {
        match self.dir.look_at(OsStr::new(name)) {
            Ok(found) if found.is_symlink() => Err(FileFault::Link { path: self.path_of(name) }),
            Ok(found) if !found.is_file() => Err(self.no_file(name)),
            _ => Ok(()),
        }
    }

    /// Whether [`FileDir::write`] would find nothing in its way that it cannot remove. Makes nothing.
    pub(super) fn could_write(&self, name: &str) -> Result<(), FileFault> {
        let new_name = self.unfinished_of(name);
        let found = self.dir.look_at(OsStr::new(&new_name));
        if found.is_ok_and(|found| found.is_dir()) { Err(self.no_file(&new_name)) } else { Ok(()) }
    }

    fn no_file(&self, name: &str) -> FileFault {
        FileFault::FileType { path: self.path_of(name), want: "regular file" }
    }

    /// Where a file of this name is.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a file. `None` when there is none.
    ///
    /// # Errors
    /// [`FileFault`]: it is not the agent's alone, or cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, FileFault> {
        let path = self.path_of(name);
        let failed = |cause| FileFault::Read { path: path.clone(), cause };
        let file = match self.dir.open_as(OsStr::new(name), OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) if cause.raw_os_error().map(Errno::from_raw) == Some(Errno::ELOOP) => {
                return Err(FileFault::Link { path });
            }
            Err(cause) => return Err(failed(cause)),
        };
        // It is looked at by its descriptor, so what was checked is what is read.
        let found = file.metadata().map_err(failed)?;
        check_owner(&path, &found, self.ours)?;
        if found.is_file() {
            check_mode(&path, &found, 0o077, 0o600)?;
        }
        read_file(&path, file, MAX_LEN).map(Some)
    }

    /// Leaves the files to the next agent. Waits for a write that is under way.
    pub(super) fn let_go(&self) {
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Writes::TheNext;
    }

    /// Writes a file. On any error, and when it is another agent's by now, what was there before is there still.
    ///
    /// # Errors
    /// [`FileFault`].
    pub fn write(&self, name: &str, text: &[u8]) -> Result<(), FileFault> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if *writer == Writes::TheNext {
            return Err(FileFault::Locked { path: self.path_of(name) });
        }
        self.remove_unfinished(name)?;
        let new_name = self.unfinished_of(name);
        let (new, place) = (OsStr::new(&new_name), OsStr::new(name));
        let failed = |name: &str, cause| FileFault::Write { path: self.path_of(name), cause };
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let written = self
            .dir
            .open_as(new, flags, 0o600)
            .and_then(|mut file| {
                file.write_all(text)?;
                file.sync_all()
            })
            .map_err(|cause| failed(&new_name, cause))
            .and_then(|()| self.dir.rename(new, place).map_err(|cause| failed(name, cause)));
        if written.is_err() {
            // The first error is the one to tell; the file is also removed before the next try.
            drop(self.dir.remove(new));
            return written;
        }
        // Until the directory is on the disk, a power cut may bring the old file back, which would lack what the new one has.
        self.dir.sync().map_err(|cause| FileFault::Write { path: self.path.clone(), cause })
    }

    /// Removes what an agent that was killed left half written of a file.
    pub(super) fn remove_unfinished(&self, name: &str) -> Result<(), FileFault> {
        let new_name = self.unfinished_of(name);
        match self.dir.remove(OsStr::new(&new_name)) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(FileFault::Write { path: self.path_of(&new_name), cause })
            }
            _ => Ok(()),
        }
    }

    fn unfinished_of(&self, name: &str) -> String {
        format!("{name}{}", self.unfinished)
    }

    /// Keeps a damaged file under another name, which is given back. `None` where it is still in its place: all names are
    /// taken, or it cannot be moved.
    pub(super) fn put_aside(&self, name: &str) -> Option<PathBuf> {
        damaged_names(name).find_map(|kept| {
            let looked = self.dir.look_at(OsStr::new(&kept));
            let is_free = looked.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            let is_moved = is_free && self.dir.rename(OsStr::new(name), &OsString::from(&kept)).is_ok();
            is_moved.then(|| self.path_of(&kept))
        })
    }

    /// Where a damaged file of this name is kept: the last one that was put aside.
    pub(super) fn kept_aside(&self, name: &str) -> Option<PathBuf> {
        let kept = damaged_names(name).filter(|kept| self.dir.look_at(OsStr::new(kept)).is_ok());
        kept.last().map(|kept| self.path_of(&kept))
    }
}

/// What a damaged file of this name may be called, in their order.
fn damaged_names(name: &str) -> impl Iterator<Item = String> + '_ {
    (1..=MOST_DAMAGED).map(move |number| {
        if number == 1 { format!("{name}.damaged") } else { format!("{name}.damaged.{number}") }
    })
}

/// Looks at a data directory as an agent of user `ours` would. One that is missing is well: it is made.
///
/// # Errors
/// Its owner or mode, or those of a directory above it, are not what they must be; or it is none.
pub fn check_data_dir(path: &Path, ours: u32) -> Result<(), FileFault> {
    match Trust::of(ours).directory_unchecked(path) {
        Ok(dir) => check_directory(path, &dir, ours),
        Err(error) if error.is_missing() => Ok(()),
        Err(error) => Err(refused(path)(error)),
    }
}

fn check_directory(path: &Path, dir: &TrustedDir, ours: u32) -> Result<(), FileFault> {
    // Others may look at the names in it (kubelet and systemd make such directories), but not put files there.
    check_owner(path, dir.metadata(), ours)?;
    check_mode(path, dir.metadata(), 0o022, 0o700)
}

/// Opens a file of the admin's to read it, where nobody else could have put another.
pub(super) fn open_to_read(path: &Path, trust: Trust) -> Result<File, FileFault> {
    trust.open(path).map_err(refused(path))
}

fn refused(path: &Path) -> impl FnOnce(PathError) -> FileFault {
    |error| match error {
        PathError::Open { cause, .. } => FileFault::Read { path: path.to_owned(), cause },
        PathError::Make { path, cause } => FileFault::Write { path, cause },
        PathError::Kind { path, want } => FileFault::FileType { path, want },
        error => FileFault::Path(error),
    }
}

/// Looks at a file with a secret that an admin supplies, as an agent of user `trust` would.
///
/// # Errors
/// It cannot be opened, or others could read it or have put it there.
pub fn check_supplied_secret(path: &Path, trust: Trust) -> Result<(), FileFault> {
    let file = open_to_read(path, trust)?;
    check_supplied(path, &file, trust)
}

/// Reads a secret that an admin supplies, and that nobody but the agent's user and root reads.
pub(super) fn read_supplied_secret(
    path: &Path,
    trust: Trust,
    most: u64,
) -> Result<Zeroizing<Vec<u8>>, FileFault> {
    let file = open_to_read(path, trust)?;
    check_supplied(path, &file, trust)?;
    read_file(path, file, most)
}

fn check_supplied(path: &Path, file: &File, trust: Trust) -> Result<(), FileFault> {
    let meta = file.metadata().map_err(|cause| FileFault::Read { path: path.to_owned(), cause })?;
    if trust.alone_reads(file, &meta) {
        return Ok(());
    }
    let remedy = if is_read_only(file) {
        "set defaultMode: 0400 for the volume, or 0440 with fsGroup".to_owned()
    } else {
        trust.closing(file, &meta, path)
    };
    Err(FileFault::OpenSecret { path: path.to_owned(), found: meta.mode() & 0o7777, remedy })
}

/// Reads a regular file of at most `most` bytes.
pub(super) fn read_file(path: &Path, file: File, most: u64) -> Result<Zeroizing<Vec<u8>>, FileFault> {
    let failed = |cause| FileFault::Read { path: path.to_owned(), cause };
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(FileFault::FileType { path: path.to_owned(), want: "regular file" });
    }
    let too_large = |found| FileFault::TooLarge { path: path.to_owned(), found, most };
    let len = usize::try_from(found.len()).map_err(|_unsaid| too_large(found.len()))?;
    if found.len() > most {
        return Err(too_large(found.len()));
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(len + 1));
    file.take(found.len()).read_to_end(&mut text).map_err(failed)?;
    Ok(text)
}

fn check_owner(path: &Path, found: &Metadata, ours: u32) -> Result<(), FileFault> {
    if found.uid() == ours {
        return Ok(());
    }
    Err(FileFault::Owner { path: path.to_owned(), found: found.uid(), ours })
}

fn check_mode(path: &Path, found: &Metadata, forbidden: u32, want: u32) -> Result<(), FileFault> {
    let mode = found.mode() & 0o7777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(FileFault::Mode { path: path.to_owned(), found: mode, want })
}
