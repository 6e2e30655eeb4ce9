//! The socket of a connection, from accept to close: what a caller has passed in and nobody took is never closed by the
//! thread that happens to be done with the connection.
//!
//! There is no other way to hold an accepted socket, and none to close it but to drop this. Where descriptors can have
//! come in, the drop first shuts it for reading, so that nothing more can come, and looks through what is in its queue:
//! without a descriptor in it, it is closed, else [`Closers`] do that. A drop never blocks.

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    sync::Arc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Shutdown, setsockopt, shutdown, sockopt},
};
use tokio::{io::ReadBuf, net::UnixStream};

use super::{
    closing::{Closers, HeldPlace},
    pins::AskedLater,
};
use crate::os::{
    passing::{Passing, prepare},
    receive::{Care, Received, receive},
};

/// The family of whom nobody could tell who it is.
const UNKNOWN: u64 = u64::MAX;
/// How often a queue is looked at, 4 KiB at a time, before it is left to the threads. An ordinary one is empty, or
/// through with the first look.
const LOOKS: u32 = 64;

/// How the connections of a listener are closed.
#[derive(Clone, Debug)]
pub(super) enum Closing {
    /// By whoever is done with them: nothing can be passed in, from the first of them on.
    Plain,
    /// With care. Descriptors are barred from accept on, if the kernel can.
    Careful(Arc<Closers>, Passing),
}

impl Closing {
    /// Whether so much waits to be closed that nobody may be accepted: then the family that most of it is of, or
    /// [`UNKNOWN`].
    pub(super) fn full_by(&self) -> Option<u64> {
        match self {
            Self::Plain => None,
            Self::Careful(closers, _) => closers.are_full().then(|| closers.longest().unwrap_or(UNKNOWN)),
        }
    }
}

/// An accepted socket, and its place at the gate, once it has one.
#[derive(Debug)]
pub(super) struct Accepted<S: AcceptedSocket, P: Send + 'static = ()> {
    /// Taken only by the drop, and by what makes another of this.
    socket: Option<S>,
    closers: Option<Arc<Closers>>,
    family: u64,
    place: Option<P>,
    asked_later: Option<AskedLater>,
}

/// A connected Unix socket.
pub(super) trait AcceptedSocket: AsFd {
    /// `None` when it is closed already.
    fn into_fd(self) -> Option<OwnedFd>;
}

impl AcceptedSocket for StdStream {
    fn into_fd(self) -> Option<OwnedFd> {
        Some(self.into())
    }
}

impl AcceptedSocket for UnixStream {
    fn into_fd(self) -> Option<OwnedFd> {
        self.into_std().ok().map(OwnedFd::from)
    }
}

impl Accepted<StdStream> {
    /// Takes what `accept` gave.
    ///
    /// # Errors
    /// The socket does not do what it is told: it is closed.
    pub(super) fn new(socket: StdStream, closing: &Closing) -> io::Result<Self> {
        let Closing::Careful(closers, passing) = closing else {
            return Ok(Self::of(socket, None));
        };
        let this = Self::of(socket, Some(Arc::clone(closers)));
        // What is sent out of band would be thrown away by a read that comes past it, with its descriptors.
        setsockopt(this.socket(), sockopt::OobInline, &true)?;
        if *passing != Passing::Always {
            prepare(this.socket())?;
        }
        Ok(this)
    }

    fn of(socket: StdStream, closers: Option<Arc<Closers>>) -> Self {
        Self { socket: Some(socket), closers, family: UNKNOWN, place: None, asked_later: None }
    }

    /// When it has ended, it is asked after.
    pub(super) fn ask_later(&mut self, after: AskedLater) {
        self.asked_later = Some(after);
    }

    /// Says whose it is. Families share the threads that close.
    pub(super) fn belongs_to(&mut self, family: impl FnOnce() -> u64) {
        if self.closers.is_some() {
            self.family = family();
        }
    }

    /// Registers it with the runtime; it has a place at the gate.
    ///
    /// # Errors
    /// It cannot be registered.
    pub(super) fn admit<P: Send + 'static>(mut self, place: P) -> io::Result<Accepted<UnixStream, P>> {
        self.socket().set_nonblocking(true)?;
        if self.closers.is_some() {
            // A failure below would close it here.
            let second = self.socket().try_clone()?;
            let first = self.socket.replace(second);
            let registered = first.map(UnixStream::from_std).transpose()?;
            // Not the last of it.
            drop(self.socket.take());
            return Ok(self.with(registered, place));
        }
        let registered = self.socket.take().map(UnixStream::from_std).transpose()?;
        Ok(self.with(registered, place))
    }

    fn with<P: Send + 'static>(mut self, socket: Option<UnixStream>, place: P) -> Accepted<UnixStream, P> {
        let (closers, asked_later) = (self.closers.take(), self.asked_later.take());
        Accepted { socket, closers, family: self.family, place: Some(place), asked_later }
    }
}

impl<P: Send + 'static> Accepted<UnixStream, P> {
    /// Its place at the gate is free from now on.
    pub(super) fn give_up_place(mut self) -> Accepted<UnixStream> {
        let (socket, closers) = (self.socket.take(), self.closers.take());
        Accepted { socket, closers, family: self.family, place: None, asked_later: self.asked_later.take() }
    }
}

impl<S: AcceptedSocket, P: Send + 'static> Accepted<S, P> {
    /// Its place at the gate.
    pub(super) fn place(&self) -> Option<&P> {
        self.place.as_ref()
    }

    pub(super) fn socket(&self) -> &S {
        self.socket.as_ref().expect("only a drop takes it")
    }

    pub(super) fn socket_mut(&mut self) -> &mut S {
        self.socket.as_mut().expect("only a drop takes it")
    }

    /// Whether its peer has closed it: whatever it asked for, nobody can read the answer.
    pub(super) fn is_deserted(&self) -> bool {
        Self::deserted(std::slice::from_ref(self)).contains(&true)
    }

    /// The same of each of these, by one system call.
    pub(super) fn deserted(these: &[Self]) -> Vec<bool> {
        let mut asked: Vec<PollFd<'_>> =
            these.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::empty())).collect();
        let told = poll(&mut asked, PollTimeout::ZERO).is_ok();
        let is_left =
            |it: &PollFd<'_>| told && it.revents().is_some_and(|is| is.contains(PollFlags::POLLHUP));
        asked.iter().map(is_left).collect()
    }

    /// Tells the peer that nothing more comes.
    pub(super) fn shut_for_writing(&self) -> io::Result<()> {
        Ok(shutdown(self.as_fd().as_raw_fd(), Shutdown::Write)?)
    }

    /// Tells the peer that nothing more comes, and that nothing is read any more. Once more is nothing.
    pub(super) fn shut(&self) -> io::Result<()> {
        Ok(shutdown(self.as_fd().as_raw_fd(), Shutdown::Both)?)
    }

    /// How to receive from it.
    pub(super) fn care(&self) -> Care {
        if self.closers.is_some() { Care::LookFirst } else { Care::TakeAtOnce }
    }
}

impl<S: AcceptedSocket, P: Send + 'static> AsFd for Accepted<S, P> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl<S: AcceptedSocket, P: Send + 'static> Drop for Accepted<S, P> {
    fn drop(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        let asked_later = self.asked_later.take().filter(AskedLater::is_wanted);
        if let Some(closers) = self.closers.take()
            // Who sends from now on gets EPIPE.
            && !(shutdown(socket.as_fd().as_raw_fd(), Shutdown::Read).is_ok() && is_drained(socket.as_fd()))
        {
            let place = self.place.take().map(|place| -> HeldPlace { Box::new(place) });
            if let Some(socket) = socket.into_fd() {
                closers.close(socket, self.family, place);
            }
            return;
        }
        if let Some(after) = asked_later
            && shutdown(socket.as_fd().as_raw_fd(), Shutdown::Both).is_ok()
            && let Some(socket) = socket.into_fd()
        {
            after.leave(socket);
        }
    }
}

/// Takes what is left in a socket that is shut for reading, up to the first descriptor. Returns whether that was all.
fn is_drained(socket: BorrowedFd<'_>) -> bool {
    let mut bytes = [MaybeUninit::uninit(); 4096];
    for _ in 0..LOOKS {
        let mut into = ReadBuf::uninit(&mut bytes);
        let most = into.capacity();
        match receive(socket, &mut into, most, Care::LookFirst) {
            Ok(Received::Bytes { len: 0, .. }) => return true,
            Ok(Received::Bytes { .. }) => {}
            Ok(Received::Descriptors) => return false,
            // Told only where nothing is left in the queue.
            Err(error) => {
                return matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::WouldBlock);
            }
        }
    }
    false
}
