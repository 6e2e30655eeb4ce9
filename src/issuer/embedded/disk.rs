//! The data directory, locked by one agent, and the state in it.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::{
    issuer::files::{DirLock, FileDir, FileFault},
    os::trusted::Trust,
};

/// The name of the state file.
pub const STATE: &str = "issuer.json";
const LOCK: &str = "issuer.lock";
/// What the name of a state ends in that is not written to its end yet.
const UNFINISHED: &str = ".new";

/// Whether an agent has the directory, as far as the user of `trust` can tell.
pub fn is_in_use(path: &Path, trust: Trust) -> bool {
    FileDir::look_at(path, trust, UNFINISHED).is_ok_and(|dir| dir.is_some_and(|dir| dir.is_locked(LOCK)))
}

/// The data directory, locked until it is let go of.
pub(super) struct DataDir {
    dir: FileDir,
    /// `None` once it is let go of.
    lock: Option<DirLock>,
}

impl DataDir {
    /// Opens the directory, which is made when missing, and locks it. Removes what a killed agent left half
    /// written.
    pub(super) fn open(path: &Path) -> Result<Self, FileFault> {
        let dir = FileDir::open(path, UNFINISHED)?;
        let lock = dir.lock(LOCK)?;
        dir.remove_unfinished(STATE)?;
        Ok(Self { dir, lock: Some(lock) })
    }

    /// The state file.
    pub(super) fn state_path(&self) -> PathBuf {
        self.dir.path_of(STATE)
    }

    /// Reads the state. `None` when there is none yet.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, FileFault> {
        self.dir.read(STATE)
    }

    /// Writes nothing from now on, and gives the lock to whoever comes next.
    pub(super) fn let_go(&mut self) {
        self.dir.let_go();
        self.lock = None;
    }

    /// Writes the state. On any error, and when the directory is another agent's by now, the state of before is in its place.
    pub(super) fn write(&self, text: &[u8]) -> Result<(), FileFault> {
        self.dir.write(STATE, text)
    }
}

/// Where the state is in a data directory.
pub(super) fn state_in(data_dir: &Path) -> PathBuf {
    data_dir.join(STATE)
}

/// Reads the state of an agent of the user of `trust`, which may be running, and looks at what would be in the way of its
/// files. `None` when there is none.
pub(super) fn look_at_state(data_dir: &Path, trust: Trust) -> Result<Option<Zeroizing<Vec<u8>>>, FileFault> {
    let Some(dir) = FileDir::look_at(data_dir, trust, UNFINISHED)? else { return Ok(None) };
    dir.could_lock(LOCK)?;
    dir.could_write(STATE)?;
    dir.read(STATE)
}

/// Whether an agent of the user of `trust` would find no state, and write one.
pub fn is_new(data_dir: &Path, trust: Trust) -> bool {
    matches!(look_at_state(data_dir, trust), Ok(None))
}
