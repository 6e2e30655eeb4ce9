//! What could be made at a path, told without making it.

use std::path::Path;

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    sys::statvfs::fstatvfs,
    unistd::{AccessFlags, faccessat, geteuid},
};

use super::{
    End, Missing, Trust,
    error::{PathError, cannot_open, nothing},
    here::{Here, is_read_only},
    rule::is_of_the_kernel,
};

/// To put a name into a directory: write to it, and pass.
const PUT: u32 = 0o3;
const WRITE: u32 = 0o2;

impl Trust {
    /// Whether a directory is at `path` that the user may put files into, or could be made there with those above it.
    ///
    /// # Errors
    /// [`PathError`], as making it would say.
    pub fn could_make_in(self, path: &Path) -> Result<(), PathError> {
        match self.walk(path, Missing::Stop)? {
            End::Directory(here) | End::Nothing { here, .. } => self.could_put(&here),
            End::Other { here, name, .. } | End::Descriptor { here, name } => {
                Err(PathError::Kind { path: here.path.join(name), want: "directory" })
            }
        }
    }

    /// Whether the file system that a directory at `path` is on, or would be made on, has no room at all for a file of the user's.
    pub fn is_full_at(self, path: &Path) -> bool {
        let Ok(End::Directory(here) | End::Nothing { here, .. }) = self.walk(path, Missing::Stop) else {
            return false;
        };
        let Ok(found) = fstatvfs(&here.dir) else { return false };
        // Some of it is kept for root. Where no total is told, no rest is.
        let (blocks, files) = match self.user() {
            0 => (found.blocks_free(), found.files_free()),
            _ => (found.blocks_available(), found.files_available()),
        };
        found.blocks() > 0 && blocks == 0 || found.files() > 0 && files == 0
    }

    /// Whether [`Trust::append`] would open the file, or could make it.
    ///
    /// # Errors
    /// [`PathError`], as it would say.
    pub fn could_append(self, path: &Path) -> Result<(), PathError> {
        match self.walk(path, Missing::Stop)? {
            End::Directory(here) => Err(PathError::Kind { path: here.path, want: "file" }),
            End::Nothing { here, names, .. } if names.file_name() == Some(names.as_os_str()) => {
                self.could_put(&here)
            }
            End::Nothing { here, names, .. } => Err(nothing(here.path.join(names))),
            End::Descriptor { .. } => Ok(()),
            End::Other { here, name, found, .. } => {
                let path = here.path.join(&name);
                if found.meta.is_file() && is_read_only(&found.file) {
                    return Err(cannot_open(&path, Errno::EROFS.into()));
                }
                self.check_access(WRITE, &path, &found.file, &found.meta)?;
                self.kernel_lets(&path, AccessFlags::W_OK)
            }
        }
    }

    fn could_put(self, here: &Here) -> Result<(), PathError> {
        let refused = |errno: Errno| cannot_open(&here.path, errno.into());
        if is_read_only(&here.dir) {
            return Err(refused(Errno::EROFS));
        }
        if is_of_the_kernel(&here.dir).map_err(refused)? {
            return Err(refused(Errno::EPERM));
        }
        self.check_access(PUT, &here.path, &here.dir, &here.meta)?;
        self.kernel_lets(&here.path, AccessFlags::W_OK | AccessFlags::X_OK)
    }

    /// Asked where this process is of the user: it says nothing about another.
    fn kernel_lets(self, path: &Path, access: AccessFlags) -> Result<(), PathError> {
        if self.user() != geteuid().as_raw() {
            return Ok(());
        }
        faccessat(AT_FDCWD, path, access, AtFlags::AT_EACCESS)
            .map_err(|errno| cannot_open(path, errno.into()))
    }
}
