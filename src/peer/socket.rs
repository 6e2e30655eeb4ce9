//! A bound Unix socket: in a directory where nobody else can put another, and never two agents at one.
//!
//! Trusted: a directory that [`Trust`] lets pass, by its descriptor. Not trusted: what stands at the path. A regular
//! file, a directory or a symbolic link is refused by name, and so is the socket of a living agent; a dead one's is
//! removed. The socket is bound under its own name, which is what `ss -xl` and the errors of clients show, and has its mode
//! from the first moment; nobody can connect before it listens. `PATH.lock`, held as long as the socket, keeps two
//! starting agents apart. A socket that systemd made is never removed, one that is not ours any more neither. One that the
//! next agent is to have goes on listening, and is at its place all the time, also if that one ends early. Absent: abstract sockets, which have no mode.
//!
//! # Decisions
//! A dead socket is removed before the new one is bound: there is a moment without. The other way, bound under another
//! name and renamed, shows that other name for ever, and needs room for it.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, FileType, TryLockError},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket,
            sockopt,
        },
        stat::{Mode, fchmod},
    },
};

use crate::os::{
    lock,
    passing::{self, Passing},
    trusted::{PathError, Trust, TrustedDir, parent},
    umask,
};

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

/// The path of a socket, which is removed with the lock if it is still ours: when this is dropped, if it was made here. One
/// that another agent has left is removed by [`BoundPath::remove`] alone: that agent may come back to it.
#[derive(Debug)]
pub(crate) struct BoundPath {
    path: PathBuf,
    name: OsString,
    dir: TrustedDir,
    /// Device and inode.
    made: (u64, u64),
    made_by: MadeBy,
    /// `None` once it is for somebody else to remove.
    lock: Option<Lock>,
}

/// Who has bound a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MadeBy {
    ThisAgent,
    AnotherAgent,
}

/// A socket at its path, at which nobody accepts: who connects waits for the next agent. Dropped, it is left where it is.
#[derive(Debug)]
pub struct VacantSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
}

impl VacantSocket {
    /// One that another agent says it has made: [`Socket::move_into`] believes no more than that it did.
    pub fn new(listener: UnixListener, path: PathBuf, made: (u64, u64)) -> Self {
        Self { listener, path, made }
    }

    /// What listens.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it was bound.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its device and inode.
    pub fn made(&self) -> (u64, u64) {
        self.made
    }

    /// The same socket once more.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { listener: self.listener.try_clone()?, path: self.path.clone(), made: self.made })
    }
}

/// Who is to reach a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Everybody on the node.
    Everybody,
    /// The agent's user.
    OwnUser,
}

/// What stands at the path of a socket that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    path: PathBuf,
    /// Device and inode; unknown of a socket that was handed over and whose path leads nowhere.
    made: Option<(u64, u64)>,
    /// Whether systemd bound it, and keeps it.
    pub handed_over: bool,
}

impl Presence {
    /// Where clients look for it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it stands at its path. Asks the file system, which may wait.
    pub fn is_there(&self) -> bool {
        self.made.is_some() && standing_at(&self.path) == self.made
    }

    /// Whether the first process of this PID namespace, which has the same `/`, finds something else at the path, or nothing: it
    /// stands on what is mounted for this process alone. `false` where that cannot be told. Asks the file system, which may wait.
    pub fn is_hidden_from_the_node(&self) -> bool {
        const ROOT: &str = "/proc/1/root";
        let has_own_root = standing_at(Path::new("/")) != standing_at(Path::new(ROOT));
        // A link there would lead on from the root of this process.
        let (Some(made), Ok(path), false) = (self.made, self.path.canonicalize(), has_own_root) else {
            return false;
        };
        let seen = Path::new(ROOT).join(path.strip_prefix("/").unwrap_or(&path)).metadata();
        match seen {
            Ok(meta) => (meta.dev(), meta.ino()) != made,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// Device and inode.
fn standing_at(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Held by the one agent that may be at a path.
#[derive(Debug)]
struct Lock {
    name: OsString,
    file: File,
}

/// The umask under which a socket is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Umask {
    /// None, in a thread of its own; where there can be no such thread, that of the process.
    Own,
    /// That of the process: the socket is bound with less than its mode, and given the rest before it listens.
    OfProcess,
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
    /// The directory is not to be trusted, or is missing and cannot be made.
    #[error("cannot use the directory of the socket {}", path.display())]
    Directory {
        /// The socket.
        path: PathBuf,
        source: PathError,
    },
    /// In a directory where everybody may put something, somebody has put the lock there, and holds it.
    #[error(
        "{} belongs to user {owner}, who holds it: remove it, or choose a directory that others cannot write to",
        path.display()
    )]
    LockOfAnother { path: PathBuf, owner: u32 },
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
    /// What another agent handed over is not what stands at the path.
    #[error("the socket that was handed over is not the one at {}", path.display())]
    NotThere { path: PathBuf },
    /// What systemd handed over does not accept connections.
    #[error("the socket that was handed over does not listen: use ListenStream= in the socket unit")]
    NotListening,
}

impl Socket {
    /// Binds `path` and listens, with these permissions (0o777: everybody on the node may connect), whatever the umask.
    ///
    /// Makes missing directories above it with mode 0755.
    ///
    /// # Errors
    /// [`BindError`]; what stood at the path still stands there then, unless it was a dead socket.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, BindError> {
        let name = fitting(path)?;
        let dir = Trust::own().make_directory(parent(path), 0o755).map_err(refused(path))?;
        Self::bind_in(dir, path, name, mode, Umask::Own)
    }

    /// The same, as where no thread can have a umask of its own: under Docker's seccomp filter, say.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_under_umask(path: &Path, mode: u32) -> Result<Self, BindError> {
        let name = fitting(path)?;
        let dir = Trust::own().make_directory(parent(path), 0o755).map_err(refused(path))?;
        Self::bind_in(dir, path, name, mode, Umask::OfProcess)
    }

    /// Binds `path` for this process's user alone: the socket has mode 0600, and its directory, when it is
    /// missing, is made with mode 0700 (those above it with 0755).
    ///
    /// # Errors
    /// [`BindError`]; [`BindError::Directory`] also for a directory in which others may put something, sticky or not.
    pub fn bind_private(path: &Path) -> Result<Self, BindError> {
        let name = fitting(path)?;
        let dir = Trust::own().make_directory(parent(path), 0o700).and_then(TrustedDir::for_us_alone);
        Self::bind_in(dir.map_err(refused(path))?, path, name, 0o600, Umask::Own)
    }

    fn bind_in(
        dir: TrustedDir,
        path: &Path,
        name: &OsStr,
        mode: u32,
        umask: Umask,
    ) -> Result<Self, BindError> {
        stands_dead(&dir, path, name)?;
        let lock = Lock::take(&dir, path, name)?;
        let failed = |source| BindError::Bind { path: path.to_owned(), source };
        let listening = || {
            // Again, now that no other agent can be on its way.
            if stands_dead(&dir, path, name)? {
                dir.remove(name).map_err(failed)?;
            }
            let socket = bound(path, mode, umask).map_err(|errno| failed(errno.into()))?;
            let listening = || -> io::Result<_> {
                let made = dir.set_mode(name, mode)?;
                // nix knows no more than the SOMAXCONN of the C library, which is 128 with musl.
                listen(&socket, Backlog::new(BACKLOG).unwrap_or(Backlog::MAXALLOWABLE))?;
                Ok((made.dev(), made.ino()))
            };
            let made = listening().map_err(|source| {
                let _removed_or_not: io::Result<()> = dir.remove(name);
                failed(source)
            })?;
            Ok((UnixListener::from(socket), made))
        };
        match listening() {
            Ok((listener, made)) => {
                let (path, name) = (path.to_owned(), name.to_owned());
                let place = BoundPath { path, name, dir, made, made_by: MadeBy::ThisAgent, lock: Some(lock) };
                Ok(Self { listener, place: Some(place) })
            }
            Err(error) => {
                lock.release(&dir);
                Err(error)
            }
        }
    }

    /// Takes a socket that another agent has left to this one, if it is the one that stands at its path.
    ///
    /// # Errors
    /// [`BindError`]; the socket is closed here then.
    pub fn move_into(vacant: VacantSocket, reach: Reach) -> Result<Self, BindError> {
        let VacantSocket { listener, path, made } = vacant;
        let name = fitting(&path)?.to_owned();
        let dir = Trust::own().directory(parent(&path)).and_then(|dir| match reach {
            Reach::Everybody => Ok(dir),
            Reach::OwnUser => dir.for_us_alone(),
        });
        let dir = dir.map_err(refused(&path))?;
        let is_ours = || {
            let bound = listener.local_addr().is_ok_and(|at| at.as_pathname() == Some(&path));
            let found = dir.look_at(&name).ok().filter(|found| found.file_type().is_socket());
            bound
                && getsockopt(&listener, sockopt::AcceptConn) == Ok(true)
                && found.is_some_and(|found| (found.dev(), found.ino()) == made)
        };
        if !is_ours() {
            return Err(BindError::NotThere { path });
        }
        let lock = Some(Lock::take(&dir, &path, &name)?);
        Ok(Self {
            listener,
            place: Some(BoundPath { path, name, dir, made, made_by: MadeBy::AnotherAgent, lock }),
        })
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

    /// What is to stand at its path, if it has one.
    pub fn presence(&self) -> Option<Presence> {
        let path = self.path()?;
        let made = self.place.as_ref().map(|place| place.made).or_else(|| standing_at(&path));
        Some(Presence { path, made, handed_over: self.place.is_none() })
    }

    /// The listener, and what removes its path.
    pub(crate) fn into_parts(self) -> (UnixListener, Option<BoundPath>) {
        (self.listener, self.place)
    }
}

impl BoundPath {
    /// Leaves the place, with what listens there, to the next agent.
    pub(crate) fn vacate(mut self, listener: UnixListener) -> VacantSocket {
        if let Some(lock) = self.lock.take() {
            lock.release(&self.dir);
        }
        VacantSocket { listener, path: self.path.clone(), made: self.made }
    }

    /// Removes the socket, whoever made it.
    pub(crate) fn remove(mut self) {
        self.made_by = MadeBy::ThisAgent;
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        if self.made_by == MadeBy::ThisAgent
            && self.dir.look_at(&self.name).is_ok_and(|now| (now.dev(), now.ino()) == self.made)
            && let Err(err) = self.dir.remove(&self.name)
        {
            tracing::warn!(path = %self.path.display(), error = %err, "cannot remove the socket");
        }
        lock.release(&self.dir);
    }
}

impl Lock {
    fn take(dir: &TrustedDir, socket: &Path, of: &OsStr) -> Result<Self, BindError> {
        let mut name = of.to_owned();
        name.push(".lock");
        let failed = |source| BindError::Lock { path: socket.with_file_name(&name), source };
        loop {
            let file = dir.open_as(&name, OFlag::O_WRONLY | OFlag::O_CREAT, 0o600).map_err(failed)?;
            match lock::take(&file) {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let path = socket.to_owned();
                    let owner = file.metadata().map_or(0, |meta| meta.uid());
                    return Err(if [0, nix::unistd::geteuid().as_raw()].contains(&owner) {
                        BindError::AnotherAgent { path }
                    } else {
                        BindError::LockOfAnother { path: socket.with_file_name(&name), owner }
                    });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            let lock = Self { name: name.clone(), file };
            // The one who held it before removes it before letting go: what we locked may have no name any more.
            if lock.has_its_name(dir) {
                return Ok(lock);
            }
        }
    }

    fn has_its_name(&self, dir: &TrustedDir) -> bool {
        self.file.metadata().is_ok_and(|ours| {
            dir.look_at(&self.name).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino()))
        })
    }

    /// Removes it while it is still held, see [`Lock::take`]. What cannot be removed is free all the same.
    fn release(&self, dir: &TrustedDir) {
        if self.has_its_name(dir)
            && let Err(err) = dir.remove(&self.name)
        {
            tracing::debug!(name = %self.name.display(), error = %err, "cannot remove the lock file");
        }
    }
}

/// The name at the end of a path that a socket can have.
fn fitting(path: &Path) -> Result<&OsStr, BindError> {
    if path.as_os_str().len() > MAX_PATH_LEN {
        return Err(BindError::TooLong { path: path.to_owned() });
    }
    path.file_name().ok_or_else(|| BindError::NoName { path: path.to_owned() })
}

fn refused(path: &Path) -> impl FnOnce(PathError) -> BindError {
    |source| BindError::Directory { path: path.to_owned(), source }
}

/// Whether a socket stands at `path` at which nobody listens. Anything else that stands there is an error.
fn stands_dead(dir: &TrustedDir, path: &Path, name: &OsStr) -> Result<bool, BindError> {
    let probe = |source| BindError::Probe { path: path.to_owned(), source };
    let there = match dir.look_at(name) {
        Ok(there) => there.file_type(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(probe(source)),
    };
    if !there.is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned(), kind: kind(there) });
    }
    match tried(path) {
        Ok(()) | Err(Errno::EAGAIN) => Err(BindError::AnotherAgent { path: path.to_owned() }),
        Err(Errno::ECONNREFUSED) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(Errno::EPROTOTYPE) => {
            Err(BindError::NotASocket { path: path.to_owned(), kind: "datagram socket" })
        }
        Err(errno) => Err(probe(errno.into())),
    }
}

/// Whether somebody listens at `path`, accepting or not.
pub fn is_listened_at(path: &Path) -> bool {
    matches!(tried(path), Ok(()) | Err(Errno::EAGAIN))
}

/// Whether somebody listens at `path`. Connects only to what the kernel does not list by a name from which it can be told: what
/// systemd holds is listed by one, and to connect would start its service.
pub fn is_taken(path: &Path) -> bool {
    is_listed_at(path) || is_listened_at(path)
}

/// Whether the kernel lists a socket that listens and was bound as `path`, or by another whole name of what stands there.
fn is_listed_at(path: &Path) -> bool {
    const LISTENS: &[u8] = b"00010000";
    let Ok(list) = std::fs::read("/proc/net/unix") else { return false };
    let here = standing_at(path);
    let is_another_name = |name: &Path| {
        name.is_absolute()
            && name.file_name() == path.file_name()
            && here.is_some()
            && standing_at(name) == here
    };
    list.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
        fields.nth(3) == Some(LISTENS)
            && (line.strip_suffix(path.as_os_str().as_bytes()).is_some_and(|before| before.ends_with(b" "))
                || fields.next_back().is_some_and(|name| is_another_name(Path::new(OsStr::from_bytes(name)))))
    })
}

/// Connects, and lets go at once. A living agent whose backlog is full must not make us wait.
fn tried(path: &Path) -> Result<(), Errno> {
    connect(unbound()?.as_raw_fd(), &UnixAddr::new(path)?)
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

/// A socket that does not wait.
fn unbound() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// A socket at `path` that does not listen. It has this mode, or, under the umask of the process, less.
fn bound(path: &Path, mode: u32, umask: Umask) -> Result<OwnedFd, Errno> {
    let address = UnixAddr::new(path)?;
    let socket = unbound()?;
    // What is bound gets the mode of the socket itself, less the umask.
    fchmod(&socket, Mode::from_bits_truncate(mode))?;
    let bind = || bind(socket.as_raw_fd(), &address);
    let unmasked = match umask {
        Umask::Own => umask::zero(&bind),
        Umask::OfProcess => None,
    };
    unmasked.unwrap_or_else(bind)?;
    // Before the first connection, which has what the listener has then.
    passing::prepare(&socket)?;
    Ok(socket)
}
