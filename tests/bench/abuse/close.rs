//! Connect and close, as fast as it goes: what costs the kernel memory and its one queue, and what is left to others of that
//! by a loop that does nothing but accept and close.

use std::{path::Path, time::Duration};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept, bind, listen, socket};
use std::os::fd::AsRawFd as _;

use super::{
    part::{Part, Role, Tally},
    raw::{Connecting, connected},
};

/// How long `connect()` may wait.
const PATIENCE: Duration = Duration::from_secs(2);
/// As the agent's.
const BACKLOG: i32 = 4096;
/// Connections between two looks at the clock and the socket's file.
const RUN: usize = 64;

/// Connects and closes.
pub(crate) fn connect_and_close(part: &Part, tally: &mut Tally) {
    let how = match part.role {
        Role::ConnectAndCloseAtOnce => Connecting::AtOnce,
        _ => Connecting::Waits,
    };
    while part.goes_on() {
        for _ in 0..RUN {
            match connected(&part.socket, how, PATIENCE) {
                Ok(stream) => {
                    drop(stream);
                    tally.closed += 1;
                }
                Err(_) => tally.silent += 1,
            }
        }
    }
}

/// The floor.
pub(crate) fn accept_and_close(path: &Path) {
    let listener =
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("a path")).expect("bound");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(path, mode).expect("open to all");
    listen(&listener, Backlog::new(BACKLOG).expect("a number")).expect("listening");
    loop {
        if let Ok(accepted) = accept(listener.as_raw_fd()) {
            _ = nix::unistd::close(accepted);
        }
    }
}
