//! The stream of a connection as HTTP/2 reads it: what arrives passes a [`Filter`] first.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::frames::{Filter, FrameBudget};

/// How a connection ended, as far as its bytes tell. Shared with the task that serves it.
#[derive(Debug, Default)]
pub(super) struct Ending {
    flooded: AtomicBool,
    by_peer: AtomicBool,
}

impl Ending {
    /// The budget was spent.
    pub(super) fn flooded(&self) -> bool {
        self.flooded.load(Relaxed)
    }

    /// The peer closed its side, or the socket failed.
    pub(super) fn by_peer(&self) -> bool {
        self.by_peer.load(Relaxed)
    }
}

/// A stream whose incoming bytes pass a [`Filter`].
#[derive(Debug)]
pub(super) struct Wire<T> {
    stream: T,
    filter: Filter,
    ending: Arc<Ending>,
}

impl<T> Wire<T> {
    /// From the first byte of `stream` on.
    pub(super) fn new(stream: T, budget: FrameBudget, ending: Arc<Ending>) -> Self {
        Self { stream, filter: Filter::new(budget, Instant::now()), ending }
    }

    fn noted<R>(&self, result: io::Result<R>) -> io::Result<R> {
        if result.is_err() {
            self.ending.by_peer.store(true, Relaxed);
        }
        result
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        this.noted(result)?;
        let new = buf.filled_mut().get_mut(before..).unwrap_or_default();
        if new.is_empty() {
            this.ending.by_peer.store(true, Relaxed);
        }
        Poll::Ready(this.filter.pass(new, Instant::now).map_err(|flood| {
            this.ending.flooded.store(true, Relaxed);
            io::Error::new(io::ErrorKind::ConnectionAborted, flood)
        }))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write(cx, buf));
        Poll::Ready(this.noted(result))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(this.noted(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
