//! The data directory, locked by one agent, and the state in it.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::{
    issuer::files::{DirLock, FileDir, FileFault},
    os::trusted::Trust,
};

const STATE: &str = "issuer.json";
const LOCK: &str = "issuer.lock";
/// What the name of a state ends in that is not written to its end yet.
const UNFINISHED: &str = ".new";

/// The data directory, locked for as long as this lives.
pub(super) struct DataDir {
    dir: FileDir,
    _lock: DirLock,
}

impl DataDir {
    /// Opens the directory, which is made when missing, and locks it. Removes what a killed agent left half
    /// written.
    pub(super) fn open(path: &Path) -> Result<Self, FileFault> {
        let dir = FileDir::open(path, 0o700, UNFINISHED)?;
        let lock = dir.lock(LOCK)?;
        dir.remove_unfinished(STATE)?;
        Ok(Self { dir, _lock: lock })
    }

    /// The state file.
    pub(super) fn state_path(&self) -> PathBuf {
        self.dir.path_of(STATE)
    }

    /// Reads the state. `None` when there is none yet.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, FileFault> {
        self.dir.read(STATE)
    }

    /// Writes the state. On any error the state of before is in its place.
    pub(super) fn write(&self, text: &[u8]) -> Result<(), FileFault> {
        self.dir.write(STATE, text)
    }
}

/// Where the state is in a data directory.
pub(super) fn state_in(data_dir: &Path) -> PathBuf {
    data_dir.join(STATE)
}

/// Reads the state of an agent of the user of `trust`, which may be running. `None` when there is none.
pub(super) fn look_at_state(data_dir: &Path, trust: Trust) -> Result<Option<Zeroizing<Vec<u8>>>, FileFault> {
    FileDir::look_at(data_dir, trust)?.map_or(Ok(None), |dir| dir.read(STATE))
}
