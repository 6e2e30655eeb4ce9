//! A connection of this process with itself, which is read and answered by the calls that serve a caller: a seccomp filter or a
//! security module may refuse any of them, and whose call is refused is told nothing.
//!
//! What is absent: what such a module lets others do, and what is short for a moment.

use std::{
    io::{self, IoSlice, Write as _},
    os::{
        fd::AsFd as _,
        unix::net::{UnixListener, UnixStream},
    },
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt},
};
use tokio::io::ReadBuf;

use super::{
    passing,
    receive::{Care, receive},
};

/// A system call without which no caller is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system call {call} is refused ({errno})")]
pub struct RefusedCall {
    call: &'static str,
    errno: Errno,
}

/// Serves itself, without waiting.
///
/// # Errors
/// [`RefusedCall`]; the first of them.
pub fn try_out() -> Result<(), RefusedCall> {
    accept()?;
    let Ok((mut caller, mut served)) = UnixStream::pair() else { return Ok(()) };
    if caller.set_nonblocking(true).and_then(|()| served.set_nonblocking(true)).is_err() {
        return Ok(());
    }
    refused("setsockopt", passing::prepare(&served).map(drop))?;
    refused("getsockopt", getsockopt(&served, sockopt::PeerCredentials).map(drop))?;
    refused("write", caller.write(b"?").map(drop).map_err(number))?;
    let mut byte = [0];
    let heard = receive(served.as_fd(), &mut ReadBuf::new(&mut byte), 1, Care::TakeAtOnce);
    refused("recvmsg", heard.map(drop).map_err(number))?;
    let answer = [IoSlice::new(b"!"), IoSlice::new(b"!")];
    refused("writev", served.write_vectored(&answer).map(drop).map_err(number))
}

/// Accepts at a socket that does not listen, which is a mistake: whoever may not accept is told that first.
fn accept() -> Result<(), RefusedCall> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let Ok(idle) = socket(AddressFamily::Unix, SockType::Stream, flags, None) else { return Ok(()) };
    match UnixListener::from(idle).accept().map_err(number) {
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => refused("accept4", Err(errno)),
    }
}

fn number(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// What is short may be there in a moment.
fn refused(call: &'static str, made: Result<(), Errno>) -> Result<(), RefusedCall> {
    match made {
        Ok(())
        | Err(
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR,
        ) => Ok(()),
        Err(errno) => Err(RefusedCall { call, errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_refused_here() {
        assert_eq!(try_out(), Ok(()));
    }

    #[test]
    fn what_is_short_is_not_refused() {
        for (errno, is_refused) in [
            (Errno::EMFILE, false),
            (Errno::EAGAIN, false),
            (Errno::EPERM, true),
            (Errno::ENOSYS, true),
            (Errno::EACCES, true),
        ] {
            assert_eq!(refused("recvmsg", Err(errno)).is_err(), is_refused, "{errno}");
        }
    }
}
