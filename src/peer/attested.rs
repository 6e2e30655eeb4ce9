//! What attestation found out about a peer the last time, kept with its connection and gone with it.
//!
//! There is no map of peers anywhere: a result lives in the one [`Peer`](super) it is about, so it can neither be
//! found for another process nor outgrow the open connections. Whether it may still be used is not decided here but
//! by the attestor, which alone writes it.

use std::{
    ffi::OsString,
    sync::{Arc, Mutex, PoisonError},
};

use nix::sys::stat::FileStat;
use tokio::time::Instant;

use crate::identity::selector::Selectors;

/// Names a file's content: another content has another stamp, as far as its file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of the file that `stat` describes.
    pub fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        u64::try_from(self.size).unwrap_or(0)
    }

    /// When its content, name or owner last changed, in seconds since 1970. Unlike the time of modification, no
    /// user can set it.
    pub fn changed(&self) -> i64 {
        self.changed.0
    }
}

/// What a process executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executable {
    /// The file.
    pub stamp: Stamp,
    /// Its path as the process sees it, from `/proc/PID/exe`.
    pub path: OsString,
}

/// One finished attestation.
#[derive(Clone, Debug)]
pub struct LastResult {
    /// When its reads began.
    pub at: Instant,
    /// Of the settings it was made with.
    pub generation: u64,
    /// What the process executed then; `None` when that was not asked.
    pub executable: Option<Executable>,
    /// The result.
    pub selectors: Arc<Selectors>,
}

/// The last attestation of one peer, or none yet.
#[derive(Debug, Default)]
pub struct LastAttested(Mutex<Option<LastResult>>);

impl LastAttested {
    /// The last one.
    pub fn load(&self) -> Option<LastResult> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces it; `None` forgets it.
    pub fn store(&self, next: Option<LastResult>) {
        let old = {
            let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *last, next)
        };
        drop(old); // outside the lock: it may free a thousand selectors
    }
}
