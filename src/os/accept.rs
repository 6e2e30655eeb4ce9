//! A listening socket whose connections are taken one by one without the runtime hearing of them: most
//! connections of a flood are closed at once, and to register each with epoll and to take it out again would
//! be most of what that costs.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _},
        unix::net::{UnixListener, UnixStream},
    },
};

use nix::{
    errno::Errno,
    sys::socket::{SockFlag, accept4},
};

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

/// The socket, registered with the runtime once.
#[derive(Debug)]
pub struct Acceptor(AsyncFd<UnixListener>);

impl Acceptor {
    /// Must be called within a runtime.
    ///
    /// # Errors
    /// The socket cannot be registered.
    #[expect(unsafe_code, reason = "tokio asks for a promise that the descriptor stays open")]
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        // SAFETY: the registration owns the listener, so that its descriptor is open, and the same, for as
        // long as the registration lives; nobody else is given it, and a `UnixListener` never changes its
        // number.
        let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits until somebody may wait to be accepted. May be dropped while it waits.
    ///
    /// # Errors
    /// The runtime has gone.
    pub async fn ready(&self) -> io::Result<Waiting<'_>> {
        Ok(Waiting(self.0.readable().await?))
    }

    /// The socket, of which the runtime hears no more.
    pub fn into_inner(self) -> UnixListener {
        self.0.into_inner()
    }
}

/// Those who wait, until nobody does any more: a connection each, which blocks, or why there is none.
#[derive(Debug)]
pub struct Waiting<'a>(AsyncFdReadyGuard<'a, UnixListener>);

impl Iterator for Waiting<'_> {
    type Item = io::Result<UnixStream>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.try_io(|listener| accept(listener.get_ref())).ok()
    }
}

/// Accepts one, whose name the kernel is not asked for: callers have none.
#[expect(unsafe_code, reason = "nix gives what it accepted as a number")]
fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: the kernel has just made the descriptor, for nobody but this call.
            Ok(accepted) => return Ok(unsafe { UnixStream::from_raw_fd(accepted) }),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
