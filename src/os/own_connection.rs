//! A connection of this process to itself, which is made, read and answered by the calls that serve a caller: a seccomp filter or
//! a security module may refuse any of them, and whose call is refused is told nothing.
//!
//! What is absent: what such a module lets others do, and what is short for a moment.

use std::{
    io::{self, IoSlice, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, getsockopt, listen,
        socket, sockopt,
    },
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

/// Connects, and serves itself, without waiting.
///
/// # Errors
/// [`RefusedCall`]; the first of them.
pub fn try_out() -> Result<(), RefusedCall> {
    let Some((mut caller, mut served)) = accepted()?.or_else(pair) else { return Ok(()) };
    refused("setsockopt", passing::prepare(&served).map(drop))?;
    refused("getsockopt", getsockopt(&served, sockopt::PeerCredentials).map(drop))?;
    refused("write", caller.write(b"?").map(drop).map_err(number))?;
    let mut byte = [0];
    let heard = receive(served.as_fd(), &mut ReadBuf::new(&mut byte), 1, Care::TakeAtOnce);
    refused("recvmsg", heard.map(drop).map_err(number))?;
    let answer = [IoSlice::new(b"!"), IoSlice::new(b"!")];
    refused("writev", served.write_vectored(&answer).map(drop).map_err(number))
}

/// A connection that was accepted. The socket has a name that the kernel makes up and nobody knows; `None` where this process may
/// not have such a one.
fn accepted() -> Result<Option<(UnixStream, UnixStream)>, RefusedCall> {
    let made = || -> Result<_, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let unbound = || socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let (listening, caller) = (unbound()?, unbound()?);
        bind(listening.as_raw_fd(), &UnixAddr::new_unnamed())?;
        listen(&listening, Backlog::new(1)?)?;
        connect(caller.as_raw_fd(), &getsockname::<UnixAddr>(listening.as_raw_fd())?)?;
        Ok((UnixListener::from(listening), caller))
    };
    let Ok((listener, caller)): Result<(UnixListener, OwnedFd), Errno> = made() else { return Ok(None) };
    match listener.accept() {
        Ok((served, _)) if served.set_nonblocking(true).is_ok() => Ok(Some((caller.into(), served))),
        Ok(_) => Ok(None),
        Err(error) => refused("accept4", Err(number(error))).map(|()| None),
    }
}

fn pair() -> Option<(UnixStream, UnixStream)> {
    let (caller, served) = UnixStream::pair().ok()?;
    (caller.set_nonblocking(true).is_ok() && served.set_nonblocking(true).is_ok()).then_some((caller, served))
}

fn number(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// What is short may be there in a moment, and a stranger may have come first.
fn refused(call: &'static str, made: Result<(), Errno>) -> Result<(), RefusedCall> {
    match made {
        Err(
            Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOMEM
            | Errno::ENOBUFS
            | Errno::EAGAIN
            | Errno::EINTR
            | Errno::ECONNABORTED,
        )
        | Ok(()) => Ok(()),
        Err(errno) => Err(RefusedCall { call, errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_refused_here() {
        assert_eq!(try_out(), Ok(()));
        assert!(
            accepted()
                .unwrap()
                .is_some_and(|(caller, served)| caller.peer_addr().is_ok() && served.peer_addr().is_ok())
        );
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
