//! What HTTP/2 writes, on its way to the kernel.
//!
//! HTTP/2 hands over the head, the body and the end of each answer one by one, and each would be a system call that wakes
//! the client. They are kept until the task of the connection has done what there is to do, and go together.

use std::{
    cell::Cell,
    hint::black_box,
    io::{self, IoSlice},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use nix::sys::uio::writev;
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::accepted::Accepted;
use crate::limits::budget::OUTBOX;

thread_local! {
    /// What the outboxes of this thread keep their bytes in, one after the other; all zero between. So many bytes, asked for and given
    /// back with every answer, have the threads wait for each other at the allocator's lock.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Keeps what is not written yet, in no more memory than it takes. Where it was, the next outbox keeps its bytes; these may have been
/// a key.
fn keep_rest(kept: &mut Vec<u8>, written: usize) {
    let rest = kept.get(written..).unwrap_or_default().to_vec();
    let mut room = std::mem::replace(kept, rest);
    room.fill(0);
    black_box(&room);
    room.clear();
    SPARE.set(room);
}

/// A connected socket, and what is to be written on it. Shared by HTTP/2 and the task that serves it.
#[derive(Debug)]
pub(super) struct Outbox<P: Send + 'static> {
    stream: Accepted<UnixStream, P>,
    /// At most [`OUTBOX`] bytes. While there are none it takes no memory.
    kept: Mutex<Zeroizing<Vec<u8>>>,
    /// The kernel took some since that was asked.
    wrote: AtomicBool,
    /// The kernel had no room once. Until then it is not waited for what the runtime has heard: of a new socket nothing, before
    /// it asks the kernel again.
    was_full: AtomicBool,
}

impl<P: Send + 'static> Outbox<P> {
    pub(super) fn new(stream: Accepted<UnixStream, P>) -> Self {
        Self {
            stream,
            kept: Mutex::default(),
            wrote: AtomicBool::new(false),
            was_full: AtomicBool::new(false),
        }
    }

    /// The socket, to read from.
    pub(super) fn stream(&self) -> &Accepted<UnixStream, P> {
        &self.stream
    }

    fn kept(&self) -> MutexGuard<'_, Zeroizing<Vec<u8>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel took something since this was asked last.
    pub(super) fn take_wrote(&self) -> bool {
        self.wrote.swap(false, Relaxed)
    }

    /// Takes bytes that are to be written behind those that are kept: all, or as many as the socket takes at once when they
    /// are too many to be kept. Returns how many.
    pub(super) fn poll_take(&self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        let mut kept = self.kept();
        if kept.len() + bytes <= OUTBOX {
            if kept.capacity() - kept.len() < bytes {
                let mut room = SPARE.take();
                room.reserve_exact(OUTBOX);
                room.extend_from_slice(&kept);
                *kept = Zeroizing::new(room);
            }
            bufs.iter().for_each(|buf| kept.extend_from_slice(buf));
            return Poll::Ready(Ok(bytes));
        }
        ready!(self.poll_send(cx, &mut kept))?;
        self.poll_write(cx, bufs)
    }

    /// Writes all that is kept.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx, &mut self.kept())
    }

    fn poll_send(&self, cx: &mut Context<'_>, kept: &mut Vec<u8>) -> Poll<io::Result<()>> {
        while !kept.is_empty() {
            let Poll::Ready(written) = self.poll_write(cx, &[IoSlice::new(kept)]) else {
                if kept.capacity() > kept.len() {
                    keep_rest(kept, 0);
                }
                return Poll::Pending;
            };
            match written? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => keep_rest(kept, written),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            let written = if self.was_full.load(Relaxed) {
                ready!(self.stream.socket().poll_write_ready(cx))?;
                self.stream.socket().try_write_vectored(bufs)
            } else {
                writev(&self.stream, bufs).map_err(io::Error::from)
            };
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.was_full.store(true, Relaxed),
                written => {
                    self.wrote.fetch_or(written.is_ok(), Relaxed);
                    return Poll::Ready(written);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::FutureExt as _;
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::peer::accepted::Closing;

    fn outbox() -> (Outbox<()>, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let ours = Accepted::new(ours, &Closing::Plain).unwrap().admit(()).unwrap();
        (Outbox::new(ours), UnixStream::from_std(theirs).unwrap())
    }

    async fn take(outbox: &Outbox<()>, bytes: &[u8]) -> usize {
        poll_fn(|cx| outbox.poll_take(cx, &[IoSlice::new(bytes)])).await.unwrap()
    }

    #[tokio::test]
    async fn small_pieces_leave_together() {
        let (outbox, mut peer) = outbox();
        for piece in ["head ", "body ", "end"] {
            assert_eq!(take(&outbox, piece.as_bytes()).await, piece.len());
        }
        let mut there = [0; 64];
        assert_eq!(peer.try_read(&mut there).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        poll_fn(|cx| outbox.poll_empty(cx)).await.unwrap();
        assert_eq!(peer.read(&mut there).await.unwrap(), "head body end".len());
        assert_eq!(outbox.kept().capacity(), 0, "no memory for a connection at rest");
    }

    #[tokio::test]
    async fn the_first_words_on_a_new_connection_wait_for_no_look_of_the_runtime() {
        let (outbox, peer) = outbox();
        take(&outbox, b"answer").await;
        assert!(poll_fn(|cx| outbox.poll_empty(cx)).now_or_never().is_some_and(|sent| sent.is_ok()));
        let mut there = [0; 64];
        let read = io::Read::read(&mut peer.into_std().unwrap(), &mut there).unwrap();
        assert_eq!(&there[..read], b"answer");
    }

    #[tokio::test]
    async fn all_arrives_in_order_whatever_the_pieces_and_however_slow_the_reader() {
        let (outbox, mut peer) = outbox();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let expected = sent.clone();
        let writes = tokio::spawn(async move {
            let (mut at, mut piece) = (0, 1);
            while at < sent.len() {
                piece = piece * 7 % 20_011 + 1;
                at += take(&outbox, &sent[at..sent.len().min(at + piece)]).await;
                assert!(outbox.kept().len() <= OUTBOX);
                if piece % 3 == 0 {
                    poll_fn(|cx| outbox.poll_empty(cx)).await.unwrap();
                }
            }
            poll_fn(|cx| outbox.poll_empty(cx)).await.unwrap();
        });
        let mut got = Vec::new();
        peer.read_to_end(&mut got).await.unwrap();
        writes.await.unwrap();
        assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
    }

    #[tokio::test]
    async fn a_peer_that_never_reads_pins_no_more_than_is_kept() {
        let (outbox, _peer) = outbox();
        let mut taken = 0;
        outbox.stream().socket().writable().await.unwrap();
        poll_fn(|cx| {
            while let Poll::Ready(more) = outbox.poll_take(cx, &[IoSlice::new(&[1; 1000])]) {
                taken += more.unwrap();
            }
            Poll::Ready(())
        })
        .await;
        assert!(taken > OUTBOX && outbox.kept().len() <= OUTBOX);
    }

    #[tokio::test]
    async fn a_peer_that_has_gone_is_an_error() {
        let (outbox, peer) = outbox();
        drop(peer);
        take(&outbox, b"for nobody").await;
        let sent = poll_fn(|cx| outbox.poll_empty(cx)).await;
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
