//! What the other end says first, looked at before HTTP/2 makes of it what it does not understand.
//!
//! Whoever agrees on `h2` in the handshake must begin with a frame of settings. hyper says of what does not that an operation was
//! canceled, or another thing each time: nobody finds a wrong port by that.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

/// The length of the head of a frame.
const HEAD: usize = 9;

/// The type of a frame of settings.
const SETTINGS: u8 = 4;

/// The longest frame before the two ends have agreed on longer ones.
const LONGEST: u32 = 1 << 14;

/// What is no HTTP/2.
#[derive(Debug)]
pub(super) enum FirstFrameFault {
    /// Something else.
    Foreign,
    /// Nothing: the connection has ended so.
    Ended(io::Error),
}

/// A stream of which the first frame is looked at.
#[derive(Debug)]
pub(super) struct FirstFrame<S> {
    stream: S,
    head: Vec<u8>,
    found: Option<oneshot::Sender<Result<(), FirstFrameFault>>>,
}

impl<S> FirstFrame<S> {
    /// The stream, and what is found once enough has come.
    pub(super) fn of(stream: S) -> (Self, oneshot::Receiver<Result<(), FirstFrameFault>>) {
        let (found, finding) = oneshot::channel();
        (Self { stream, head: Vec::with_capacity(HEAD), found: Some(found) }, finding)
    }

    /// Looks at what came; nothing came where the stream has ended.
    fn look(&mut self, came: &[u8]) -> io::Result<()> {
        if came.is_empty() {
            self.tell(Err(FirstFrameFault::Ended(io::ErrorKind::UnexpectedEof.into())));
            return Ok(());
        }
        self.head.extend(came.iter().take(HEAD.saturating_sub(self.head.len())));
        match self.head.as_slice().try_into() {
            Ok(head) if is_settings(head) => self.tell(Ok(())),
            Ok(_) => {
                self.tell(Err(FirstFrameFault::Foreign));
                return Err(io::ErrorKind::InvalidData.into());
            }
            Err(_too_short) => {}
        }
        Ok(())
    }

    fn tell(&mut self, found: Result<(), FirstFrameFault>) {
        if let Some(finder) = self.found.take() {
            // Who gave up need not know.
            drop(finder.send(found));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FirstFrame<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.found.is_none() || into.remaining() == 0 {
            return Pin::new(&mut this.stream).poll_read(cx, into);
        }
        let before = into.filled().len();
        Poll::Ready(match ready!(Pin::new(&mut this.stream).poll_read(cx, into)) {
            Ok(()) => this.look(into.filled().get(before..).unwrap_or_default()),
            Err(error) => {
                let kind = error.kind();
                this.tell(Err(FirstFrameFault::Ended(error)));
                Err(kind.into())
            }
        })
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FirstFrame<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, from)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

fn is_settings(head: [u8; HEAD]) -> bool {
    let [a, b, c, kind, flags, s, t, u, v] = head;
    let len = u32::from_be_bytes([0, a, b, c]);
    kind == SETTINGS
        && flags & 1 == 0
        && [s & 0x7f, t, u, v] == [0; 4]
        && len <= LONGEST
        && len.is_multiple_of(6)
}
