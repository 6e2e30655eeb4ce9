//! Where the requests of a connection are answered: on the task of the connection.
//!
//! A task of their own would cost more than most answers, and wake another thread. What takes long in earnest (keys, digests,
//! files) is done by other threads anyway.

use std::{
    fmt,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, ready},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hyper::rt::Executor;
use tokio::task::coop::poll_proceed;

use super::stats::{ConnectionStats, OpenStream};

/// What a stream that goes on takes of the budget of its connection's task, of 128 (tokio's `coop`), so that no more than sixteen
/// do before others run.
const COST: u8 = 8;

/// The streams of one connection. They end with it.
#[derive(Default)]
pub(super) struct ConnectionStreams {
    running: FuturesUnordered<RunningStream>,
    begun: Arc<Mutex<Vec<RunningStream>>>,
}

/// Where HTTP/2 gives them to be run. Each stream has one of these, so they keep no stream.
#[derive(Clone)]
pub(super) struct StreamExecutor {
    stats: Arc<ConnectionStats>,
    begun: Weak<Mutex<Vec<RunningStream>>>,
}

impl fmt::Debug for StreamExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamExecutor").finish_non_exhaustive()
    }
}

impl ConnectionStreams {
    /// Counts in `stats` what it is given.
    pub(super) fn executor(&self, stats: &Arc<ConnectionStats>) -> StreamExecutor {
        StreamExecutor { stats: Arc::clone(stats), begun: Arc::downgrade(&self.begun) }
    }

    /// Runs those that can go on, and has `cx` woken when others can.
    pub(super) fn run(&mut self, cx: &mut Context<'_>) {
        loop {
            let begun = || self.begun.lock().unwrap_or_else(PoisonError::into_inner);
            self.running.extend(begun().drain(..));
            while let Poll::Ready(Some(())) = self.running.poll_next_unpin(cx) {}
            // One that ran may have begun another (CONNECT).
            if begun().is_empty() {
                return;
            }
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for StreamExecutor {
    fn execute(&self, stream: F) {
        let Some(begun) = self.begun.upgrade() else { return };
        let stream = RunningStream { stream: Box::pin(stream), counted: OpenStream::count(&self.stats) };
        begun.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
    }
}

struct RunningStream {
    stream: Pin<Box<dyn Future<Output = ()> + Send>>,
    counted: OpenStream,
}

impl Future for RunningStream {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { stream, counted } = self.get_mut();
        for _ in 0..COST {
            ready!(poll_proceed(cx)).made_progress();
        }
        // A panic ends this request, not the others of its connection.
        catch_unwind(AssertUnwindSafe(|| stream.as_mut().poll(cx))).unwrap_or_else(|_| {
            counted.has_panicked();
            Poll::Ready(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::atomic::{AtomicU32, Ordering::Relaxed},
    };

    use super::*;

    fn streams() -> (ConnectionStreams, StreamExecutor, Arc<ConnectionStats>) {
        let (streams, stats) = (ConnectionStreams::default(), Arc::default());
        let executor = streams.executor(&stats);
        (streams, executor, stats)
    }

    async fn run_once(streams: &mut ConnectionStreams) {
        poll_fn(|cx| {
            streams.run(cx);
            Poll::Ready(())
        })
        .await;
    }

    /// On a task, until so many are there.
    async fn run_until(
        mut streams: ConnectionStreams,
        stats: Arc<ConnectionStats>,
        left: u64,
    ) -> ConnectionStreams {
        let run = async move {
            poll_fn(|cx| {
                streams.run(cx);
                if stats.streams() == left { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            streams
        };
        tokio::spawn(run).await.unwrap()
    }

    #[tokio::test]
    async fn few_go_on_before_others_run() {
        for (requests, at_once) in [(1, 1), (16, 16), (1000, 16)] {
            let (mut streams, executor, stats) = streams();
            let answered = Arc::new(AtomicU32::new(0));
            for _ in 0..requests {
                let answered = Arc::clone(&answered);
                executor.execute(async move {
                    answered.fetch_add(1, Relaxed);
                });
            }
            assert_eq!(stats.streams(), requests);
            let once = async move {
                run_once(&mut streams).await;
                streams
            };
            let streams = tokio::spawn(once).await.unwrap();
            assert_eq!(answered.load(Relaxed), at_once, "of {requests}");
            run_until(streams, stats, 0).await;
            assert_eq!(u64::from(answered.load(Relaxed)), requests);
        }
    }

    #[tokio::test]
    async fn what_waits_goes_on_when_it_can_and_ends_with_the_connection() {
        let (mut streams, executor, stats) = streams();
        let notify = Arc::new(tokio::sync::Notify::new());
        for _ in 0..2 {
            // As HTTP/2 does: each has what it could have others run by.
            let (waits, executor_too) = (Arc::clone(&notify), executor.clone());
            executor.execute(async move {
                waits.notified().await;
                drop(executor_too);
            });
        }
        run_once(&mut streams).await;
        assert_eq!(stats.streams(), 2);
        let connection = tokio::spawn(run_until(streams, Arc::clone(&stats), 1));
        tokio::task::yield_now().await;
        notify.notify_one();
        drop(connection.await.unwrap());
        assert_eq!(stats.streams(), 0);
        executor.execute(async {});
        assert_eq!(stats.streams(), 0, "nobody runs it");
    }

    #[tokio::test]
    async fn one_that_runs_begins_another() {
        let (mut streams, executor, stats) = streams();
        let theirs = executor.clone();
        executor.execute(async move { theirs.execute(async {}) });
        run_once(&mut streams).await;
        assert_eq!(stats.streams(), 0);
    }

    #[tokio::test]
    async fn a_panic_is_the_requests_own() {
        let (mut streams, executor, stats) = streams();
        executor.execute(async { std::panic::panic_any("of one request") });
        executor.execute(async {});
        run_once(&mut streams).await;
        assert_eq!((stats.streams(), stats.request_panics()), (0, 1));
    }
}
