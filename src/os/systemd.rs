//! What the service manager is told (readiness, reload, stop, watchdog) and what it hands over (a socket).
//!
//! The environment is read once, before there is a second thread, and what was read is removed from it, so that no
//! child of the agent can speak in its name or take its socket. Without a service manager everything here does
//! nothing. A manager that does not read holds the agent up for [`SEND_TIMEOUT`] at most.
//!
//! # Decisions
//! Messages are those of sd_notify(3) with `MONOTONIC_USEC` beside `RELOADING=1`, as `Type=notify-reload` wants since
//! systemd 253; systemd 252 ignores the one it does not know. The unit says `Type=notify`, which both know.
//! sd-notify's own `notify` reads the environment at each call and knows no abstract sockets, so sending is here.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike as _, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use sd_notify::NotifyState;

/// How long one message may wait for the manager's queue.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// What systemd sets for a service; removed once read.
const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// What is wrong with what the service manager handed over.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// The environment can only be changed while there is one thread.
    #[error("the service manager's environment must be read before other threads start; there are {threads}")]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// LISTEN_FDS and the like do not hold what they should.
    #[error("cannot parse the sockets passed by the service manager")]
    Environment(#[source] io::Error),
    /// One socket is served.
    #[error("the service manager passed {} sockets ({}), but one Unix socket can be served: \
             set one ListenStream= in the socket unit", names.len(), names.join(", "))]
    TooMany {
        /// Their names (`FileDescriptorName=`, by default the name of the socket unit).
        names: Vec<String>,
    },
    /// It is not a Unix stream socket that listens.
    #[error(
        "{name} passed by the service manager is {found}, but must be a listening Unix stream socket: \
             set ListenStream= to an absolute path and Accept=no in the socket unit"
    )]
    WrongSocket {
        name: String,
        /// What it is instead.
        found: &'static str,
    },
    /// The socket cannot be used.
    #[error("cannot use {name} passed by the service manager")]
    Unusable {
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// NOTIFY_SOCKET does not lead anywhere.
    #[error("cannot connect to NOTIFY_SOCKET {path:?}")]
    Notify {
        path: OsString,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How often a message that signals interrupt is sent again.
const MOST_INTERRUPTS: u32 = 16;

/// The service manager, if there is one.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// The agent is killed when it is silent for so long.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Reads the environment and removes what was for this process only. Must be called before any thread is
    /// started. The listener, if one was passed, is non-blocking and closed on exec.
    ///
    /// # Errors
    /// See [`SystemdError`]: what was handed over and cannot be used is never ignored.
    pub fn from_environment() -> Result<(Self, Option<UnixListener>), SystemdError> {
        let sockets = sd_notify::listen_fds_with_names().map_err(SystemdError::Environment)?;
        let sockets: Vec<(RawFd, String)> = sockets.collect();
        let watchdog = sd_notify::watchdog_enabled().filter(|interval| !interval.is_zero());
        let notify = std::env::var_os("NOTIFY_SOCKET");
        if VARIABLES.iter().any(|name| std::env::var_os(name).is_some()) {
            forget()?;
        }
        // The descriptors are owned only now that nobody can find their numbers again.
        let listener = match sockets.as_slice() {
            [] => None,
            [(fd, name)] => {
                // SAFETY: the service manager opened this descriptor for this process (LISTEN_PID was compared), and
                // nothing else in it knows the number: the variables that tell it are gone.
                #[expect(unsafe_code, reason = "a descriptor that arrives as a number")]
                let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
                Some(listener(fd, name)?)
            }
            many => {
                return Err(SystemdError::TooMany { names: many.iter().map(|(_, n)| n.clone()).collect() });
            }
        };
        let socket = notify.filter(|path| !path.is_empty()).map(|path| connect(&path)).transpose()?;
        Ok((Self { socket, watchdog }, listener))
    }

    /// Everything is bound and answers. `status` is a word for `systemctl status`, never an identity or a secret: the
    /// journal keeps it.
    pub fn ready(&self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
    }

    /// A reload begins; [`ServiceManager::reloaded`] must follow, whether it succeeds or not.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            // Without the time, systemd 253 and newer would take it for a failure.
            Err(error) => tracing::warn!(%error, "cannot read the monotonic clock for the service manager"),
        }
    }

    /// The reload ended, and the agent serves as before or with the new configuration: `status` says which.
    pub fn reloaded(&self, status: &str) {
        self.ready(status);
    }

    /// The agent drains and stops.
    pub fn stopping(&self, status: &str) {
        self.send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
    }

    /// Tells the manager twice per interval that the agent lives, as long as it does: when the agent's own probe
    /// says that it cannot serve, nothing is sent, and the manager restarts it. Runs for ever.
    ///
    /// So `live` must say `false` when the runtime that serves hangs, if this runs on another one.
    pub async fn watch(&self, live: impl Fn() -> bool) {
        let Some(interval) = self.watchdog.filter(|_| self.socket.is_some()) else {
            return std::future::pending().await;
        };
        let mut every = tokio::time::interval(interval / 2);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            if live() {
                self.send(&[NotifyState::Watchdog]);
            }
        }
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else { return };
        let message: Vec<String> = states.iter().map(ToString::to_string).collect();
        // A full queue is waited for, and a signal ends the wait.
        let sent = (0..MOST_INTERRUPTS).find_map(|_| match socket.send(message.join("\n").as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            sent => Some(sent),
        });
        if let Err(error) = sent.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into())) {
            tracing::warn!(%error, message = message.join(" "), "cannot send a message to the service manager");
        }
    }
}

/// A line break would begin another variable.
fn one_line(status: &str) -> String {
    status.replace(['\n', '\r'], " ")
}

/// Removes what systemd set for this process from its environment.
fn forget() -> Result<(), SystemdError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(usize::MAX, Iterator::count);
    if threads != 1 {
        return Err(SystemdError::Threads { threads });
    }
    for name in VARIABLES {
        // SAFETY: there is no other thread, as was just counted, that could read or write the environment.
        #[expect(unsafe_code, reason = "the environment is one for all threads")]
        unsafe {
            std::env::remove_var(name);
        }
    }
    Ok(())
}

/// `@` first: an abstract address.
fn connect(path: &OsStr) -> Result<UnixDatagram, SystemdError> {
    let connected = || {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(socket)
    };
    connected().map_err(|source| SystemdError::Notify { path: path.to_owned(), source })
}

/// Checks what was passed: a regular file, or a socket per connection (`Accept=yes`), would be served wrongly.
fn listener(fd: OwnedFd, name: &str) -> Result<UnixListener, SystemdError> {
    let wrong = |found| SystemdError::WrongSocket { name: name.to_owned(), found };
    let unusable = |source| SystemdError::Unusable { name: name.to_owned(), source };
    let Ok(kind) = getsockopt(&fd, sockopt::SockType) else { return Err(wrong("not a socket")) };
    let address: SockaddrStorage = getsockname(fd.as_raw_fd()).map_err(|e| unusable(e.into()))?;
    if address.family() != Some(AddressFamily::Unix) {
        return Err(wrong("not a Unix socket"));
    }
    if kind != SockType::Stream {
        return Err(wrong("a Unix socket of another type"));
    }
    if !getsockopt(&fd, sockopt::AcceptConn).map_err(|e| unusable(e.into()))? {
        return Err(wrong("a Unix socket that does not listen"));
    }
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true).map_err(unusable)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 1024];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    /// A manager and the socket it listens at.
    fn manager(watchdog: Option<Duration>) -> (tempfile::TempDir, UnixDatagram, ServiceManager) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        (dir, socket, ServiceManager { socket: Some(connect(path.as_os_str()).unwrap()), watchdog })
    }

    #[test]
    fn says_what_sd_notify_says() {
        let (_dir, socket, manager) = manager(None);
        manager.ready("serving\nMAINPID=1");
        assert_eq!(received(&socket), "READY=1\nSTATUS=serving MAINPID=1");
        manager.reloading();
        let said = received(&socket);
        let time = said.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(time.parse::<u64>().unwrap() > 0, "{said}");
        manager.reloaded("reload refused: see the log");
        assert_eq!(received(&socket), "READY=1\nSTATUS=reload refused: see the log");
        manager.stopping("draining");
        assert_eq!(received(&socket), "STOPPING=1\nSTATUS=draining");
        ServiceManager::default().ready("nobody hears it");
    }

    #[test]
    fn an_abstract_socket_is_a_socket_too() {
        let name = format!("durward-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let connected = connect(OsStr::new(&format!("@{name}"))).unwrap();
        ServiceManager { socket: Some(connected), watchdog: None }.stopping("here");
        assert_eq!(received(&socket), "STOPPING=1\nSTATUS=here");
        let missing = connect(OsStr::new("/nowhere/notify")).unwrap_err();
        assert_eq!(missing.to_string(), r#"cannot connect to NOTIFY_SOCKET "/nowhere/notify""#);
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_the_agent_is_well() {
        let (_dir, socket, manager) = manager(Some(Duration::from_secs(10)));
        for (case, live, fed) in [("well", true, 4), ("not well", false, 0), ("well again", true, 4)] {
            // Beats at 0, 5, 10 and 15 seconds.
            drop(tokio::time::timeout(Duration::from_secs(19), manager.watch(|| live)).await);
            for _ in 0..fed {
                assert_eq!(received(&socket), "WATCHDOG=1", "{case}");
            }
            assert!(socket.recv(&mut [0; 1]).is_err(), "{case}: no more than {fed}");
        }
    }

    #[test]
    fn only_a_listening_unix_stream_socket_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (stream, _other) = UnixStream::pair().unwrap();
        for (case, fd, found) in [
            ("a file", OwnedFd::from(std::fs::File::open("/dev/null").unwrap()), "not a socket"),
            ("TCP", OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap()), "not a Unix socket"),
            ("datagrams", OwnedFd::from(UnixDatagram::unbound().unwrap()), "a Unix socket of another type"),
            ("a connection", OwnedFd::from(stream), "a Unix socket that does not listen"),
        ] {
            let error = listener(fd, "durward.socket").unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("durward.socket passed by the service manager is {found},")),
                "{case}: {error}"
            );
        }
        let taken = listener(OwnedFd::from(UnixListener::bind(&path).unwrap()), "durward.socket").unwrap();
        assert_eq!(taken.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it does not block");
        let names = ["a.socket", "b.socket"].map(str::to_owned).to_vec();
        let many = SystemdError::TooMany { names }.to_string();
        assert!(many.contains("2 sockets (a.socket, b.socket)"), "{many}");
    }
}
