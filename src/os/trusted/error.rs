//! Why a path is not to be trusted, or leads nowhere.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use crate::os::sentence::said;

/// The most symbolic links on the way, as the kernel has it (path_resolution(7)).
pub(super) const MOST_LINKS: u32 = 40;

/// Why a path is not to be trusted, or leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Somebody else could change it, or what is in it.
    #[error(
        "{} belongs to user {uid} and has mode {mode:04o}: {demand} ({remedy}, or choose another place)",
        path.display()
    )]
    Untrusted {
        /// What of the path it is.
        path: PathBuf,
        uid: u32,
        mode: u32,
        /// What it must be.
        demand: String,
        /// What makes it right: a command, where one would do no harm.
        remedy: String,
    },
    /// It is what an ordinary user's program says it is.
    #[error("{} is on a FUSE file system of user {mounter}, who can show anything there: choose another place", path.display())]
    Mounted {
        path: PathBuf,
        /// Who answers for it.
        mounter: u32,
    },
    /// Something else stands there.
    #[error("{} is not a {want}", path.display())]
    Kind {
        path: PathBuf,
        /// `directory` or `regular file`.
        want: &'static str,
    },
    /// They may lead in a circle.
    #[error("{} leads through more than {MOST_LINKS} symbolic links", path.display())]
    TooManyLinks { path: PathBuf },
    /// Such as `/proc/1/root`, which leads elsewhere than it says.
    #[error("{} is a link of the kernel's own: name the target instead", path.display())]
    ProcLink { path: PathBuf },
    /// The system does not let us, or there is nothing.
    #[error("cannot open {}: {}", path.display(), said(cause))]
    Open { path: PathBuf, cause: io::Error },
    /// A directory cannot be made.
    #[error("cannot make directory {}: {}", path.display(), said(cause))]
    Make { path: PathBuf, cause: io::Error },
}

impl PathError {
    /// Whether there is nothing at the path.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Open { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
    }
}

pub(super) fn cannot_open(path: &Path, cause: io::Error) -> PathError {
    PathError::Open { path: path.to_owned(), cause }
}

pub(super) fn nothing(path: PathBuf) -> PathError {
    PathError::Open { path, cause: Errno::ENOENT.into() }
}
