//! A bound Unix socket: there is never a moment without one, and never two agents at one.
//!
//! Trusted: the directory, which must be writable for the agent alone (or sticky). Not trusted: what stands at the
//! path. A regular file, a directory or a symbolic link is refused by name, and so is the socket of a living agent; a
//! dead one's is replaced. The new socket is bound under another name, gets its mode, listens, and only then is
//! renamed over the path: a client finds the old one or the new one, and no other mode is ever seen at the path.
//! `PATH.lock`, held as long as the socket, keeps two starting agents apart. A socket that systemd made is never
//! removed, one that is not ours any more neither. Absent: abstract sockets, which have no mode.
//!
//! # Decisions
//! The mode is set by `chmod` under the other name and not by the umask around `bind()`: the umask belongs to the
//! whole process, and other threads make files meanwhile. The price is cosmetic: `ss -xl` shows the name that was
//! bound, `PATH.new`.

use std::{
    fs::{self, DirBuilder, File, FileType, Metadata, OpenOptions, Permissions, TryLockError},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{
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
    unistd::geteuid,
};

use crate::os::passing::{self, Passing};

/// The longest path of a socket, in bytes: `sun_path` holds 108 with the ending zero (unix(7)).
pub const MAX_PATH_LEN: usize = 107;

/// Connections that wait to be accepted; the kernel lowers it to `net.core.somaxconn` (4096 since Linux 5.4).
const BACKLOG: i32 = 4096;

/// A socket that listens.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    place: Option<BoundPath>,
}

/// The path of a socket that we made. Its drop removes the socket, if it is still ours, and then the lock.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
    _lock: Lock,
}

/// Held by the one agent that may be at a path.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: File,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// `sun_path` is too small for it.
    #[error(
        "socket path {} has {} bytes, and a Unix socket's path can have {MAX_PATH_LEN} at most",
        path.display(), path.as_os_str().len()
    )]
    TooLong { path: PathBuf },
    /// Such as `/` or `/run/..`.
    #[error("socket path {} does not end in a file name", path.display())]
    NoName { path: PathBuf },
    /// Something else stands there; it is left alone.
    #[error("{} is a {kind}, not a stream socket: remove it or choose another socket path", path.display())]
    NotASocket { path: PathBuf, kind: &'static str },
    /// Somebody answers there, or is about to.
    #[error("another agent is listening at {}: stop it or choose another socket path", path.display())]
    AnotherAgent { path: PathBuf },
    /// It cannot be told whether an agent is listening there.
    #[error("cannot tell whether an agent is listening at {}", path.display())]
    Probe { path: PathBuf, source: io::Error },
    /// The directory is missing and cannot be made.
    #[error("cannot make the socket's directory {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    /// Others than the owner could put a socket of their own in the place of a private one.
    #[error(
        "the directory of the private socket {} must belong to user {euid} or to root and be writable for its owner \
         alone; it belongs to user {uid} and has mode {mode:04o}",
        path.display()
    )]
    NotPrivate {
        path: PathBuf,
        /// Whose the directory should be.
        euid: u32,
        uid: u32,
        mode: u32,
    },
    /// The lock file cannot be opened.
    #[error("cannot open the lock file {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    /// The kernel or the file system refused.
    #[error("cannot bind the socket {}", path.display())]
    Bind {
        /// The path that was bound.
        path: PathBuf,
        source: io::Error,
    },
    /// What systemd handed over does not accept connections.
    #[error("the socket that was handed over does not listen: use ListenStream= in the socket unit")]
    NotListening,
}

impl Socket {
    /// Binds `path` and listens, with these permissions (0o777: everybody on the node may connect).
    ///
    /// Makes missing directories above it with mode 0755, whatever the umask.
    ///
    /// # Errors
    /// [`BindError`]; whatever stood at the path still stands there then.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, BindError> {
        if path.as_os_str().len() > MAX_PATH_LEN {
            return Err(BindError::TooLong { path: path.to_owned() });
        }
        let Some(name) = path.file_name() else {
            return Err(BindError::NoName { path: path.to_owned() });
        };
        if let Some(parent) = path.parent() {
            make_directory(parent, 0o755)
                .map_err(|source| BindError::Directory { path: parent.to_owned(), source })?;
        }
        free_or_dead(path)?;
        let lock = Lock::take(path)?;
        // Again, now that no other agent can be on its way.
        free_or_dead(path)?;

        let mut longer = name.to_owned();
        longer.push(".new");
        let mut other = path.with_file_name(longer);
        if other.as_os_str().len() > MAX_PATH_LEN {
            other = path.with_file_name(if name == "~" { "^" } else { "~" });
        }
        // Left by an agent that died while it started.
        free_or_dead(&other)?;
        let failed = |source| BindError::Bind { path: other.clone(), source };
        match fs::remove_file(&other) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed(source)),
            Ok(()) | Err(_) => {}
        }
        let listener = listening(&other).map_err(|errno| failed(errno.into()))?;
        let made = (|| {
            fs::set_permissions(&other, Permissions::from_mode(mode))?;
            let made = fs::symlink_metadata(&other)?;
            fs::rename(&other, path)?;
            Ok((made.dev(), made.ino()))
        })()
        .map_err(|source| {
            let _unlinked_or_not: io::Result<()> = fs::remove_file(&other);
            failed(source)
        })?;
        Ok(Self { listener, place: Some(BoundPath { path: path.to_owned(), made, _lock: lock }) })
    }

    /// Binds `path` for this process's user alone: the socket has mode 0600, and its directory, when it is
    /// missing, is made with mode 0700 (those above it with 0755).
    ///
    /// # Errors
    /// [`BindError`]; [`BindError::NotPrivate`] for a directory that is there, and in which others could write.
    pub fn bind_private(path: &Path) -> Result<Self, BindError> {
        // A path without a directory above it is refused below, or is in the working directory.
        let parent =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        let failed = |source| BindError::Directory { path: parent.to_owned(), source };
        make_directory(parent, 0o700).map_err(failed)?;
        let directory = fs::metadata(parent).map_err(failed)?;
        let (euid, uid, mode) = (geteuid().as_raw(), directory.uid(), directory.mode() & 0o7777);
        if (uid != euid && uid != 0) || mode & 0o022 != 0 {
            return Err(BindError::NotPrivate { path: path.to_owned(), euid, uid, mode });
        }
        Self::bind(path, 0o600)
    }

    /// Takes a socket that systemd bound. It is never removed.
    ///
    /// # Errors
    /// [`BindError::NotListening`].
    pub fn adopt(listener: UnixListener) -> Result<Self, BindError> {
        match getsockopt(&listener, sockopt::AcceptConn) {
            Ok(true) => Ok(Self { listener, place: None }),
            Ok(false) | Err(_) => Err(BindError::NotListening),
        }
    }

    /// The same, to which descriptors can be passed, as on kernels before Linux 6.16: for tests of that path.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn before_linux_6_16(self) -> Result<Self, Errno> {
        Passing::allow(&self.listener)?;
        Ok(self)
    }

    /// Where clients find it; `None` for a socket that was handed over and has no path.
    pub fn path(&self) -> Option<PathBuf> {
        match &self.place {
            Some(place) => Some(place.path.clone()),
            None => self.listener.local_addr().ok()?.as_pathname().map(Path::to_owned),
        }
    }

    /// The listener, and what removes its path.
    pub(super) fn into_parts(self) -> (UnixListener, Option<BoundPath>) {
        (self.listener, self.place)
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.made)
            && let Err(err) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = %err, "cannot remove the socket");
        }
    }
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, BindError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |source| BindError::Lock { path: path.clone(), source };
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed)?;
            match crate::os::lock::take(&file) {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(BindError::AnotherAgent { path: socket.to_owned() });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            // The one who held it before removes it before letting go: what we locked may have no name any more.
            let ours = file.metadata().map_err(failed)?;
            if fs::symlink_metadata(&path).is_ok_and(|now| same_file(&now, &ours)) {
                return Ok(Self { path, file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still held, see `take`. What cannot be removed is free all the same.
        if let Ok(ours) = self.file.metadata()
            && fs::symlink_metadata(&self.path).is_ok_and(|now| same_file(&now, &ours))
            && let Err(err) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), error = %err, "cannot remove the lock file");
        }
    }
}

fn same_file(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Makes what is missing of a directory, it with this mode and those above it with 0755, whatever the umask.
fn make_directory(directory: &Path, mode: u32) -> io::Result<()> {
    let missing: Vec<&Path> =
        directory.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
    for dir in missing.into_iter().rev() {
        let mode = if dir == directory { mode } else { 0o755 };
        // Never wider than it will be, not even for a moment.
        match DirBuilder::new().mode(mode).create(dir) {
            Ok(()) => fs::set_permissions(dir, Permissions::from_mode(mode))?,
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// Checks that `path` is free, or a socket at which nobody listens.
fn free_or_dead(path: &Path) -> Result<(), BindError> {
    let probe = |source| BindError::Probe { path: path.to_owned(), source };
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there.file_type(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(probe(source)),
    };
    if !there.is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned(), kind: kind(there) });
    }
    let client = socket(
        AddressFamily::Unix,
        SockType::Stream,
        // A living agent whose backlog is full must not make us wait.
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .map_err(|errno| probe(errno.into()))?;
    let address = UnixAddr::new(path).map_err(|errno| probe(errno.into()))?;
    match connect(client.as_raw_fd(), &address) {
        Ok(()) | Err(Errno::EAGAIN) => Err(BindError::AnotherAgent { path: path.to_owned() }),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(()),
        Err(Errno::EPROTOTYPE) => {
            Err(BindError::NotASocket { path: path.to_owned(), kind: "datagram socket" })
        }
        Err(errno) => Err(probe(errno.into())),
    }
}

fn kind(file: FileType) -> &'static str {
    if file.is_file() {
        "regular file"
    } else if file.is_dir() {
        "directory"
    } else if file.is_symlink() {
        "symbolic link"
    } else if file.is_fifo() {
        "named pipe"
    } else {
        "device"
    }
}

fn listening(path: &Path) -> Result<UnixListener, Errno> {
    let made = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(made.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Before the first connection, which has what the listener has then.
    passing::prepare(&made)?;
    listen(&made, Backlog::new(BACKLOG)?)?;
    Ok(made.into())
}
