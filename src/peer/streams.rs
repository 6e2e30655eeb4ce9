//! Where the requests of a connection are answered: on the task of the connection.
//!
//! A task of their own would cost more than most answers, and wake another thread. What takes long in earnest (keys, digests,
//! files) is done by other threads anyway.

use std::{
    fmt,
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, Stream as _, stream::FuturesUnordered};
use hyper::rt::Executor;
use tokio::task::coop::poll_proceed;

use super::stats::{ConnectionStats, OpenStream};

/// What a stream that goes on takes of the budget of its connection's task, of 128 (tokio's `coop`), so that no more than sixteen
/// do before others run.
const COST: u8 = 8;

type Running = FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>>;

/// The streams of one connection, and the executor that HTTP/2 gives them to. They end with it.
#[derive(Clone)]
pub(super) struct Streams {
    stats: Arc<ConnectionStats>,
    running: Arc<Mutex<Running>>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").finish_non_exhaustive()
    }
}

impl Streams {
    /// None. They are counted in `stats`.
    pub(super) fn new(stats: &Arc<ConnectionStats>) -> Self {
        Self { stats: Arc::clone(stats), running: Arc::default() }
    }

    /// Runs those that can go on, and has `cx` woken when others can. Not to be called by one of them.
    pub(super) fn run(&self, cx: &mut Context<'_>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        while let Poll::Ready(Some(())) = Pin::new(&mut *running).poll_next(cx) {}
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let counted = OpenStream::count(&self.stats);
        let stream = async move {
            let mut stream = pin!(stream);
            poll_fn(|cx| {
                for _ in 0..COST {
                    match poll_proceed(cx) {
                        Poll::Ready(spent) => spent.made_progress(),
                        Poll::Pending => return Poll::Pending,
                    }
                }
                stream.as_mut().poll(cx)
            })
            .await;
            drop(counted);
        };
        // A panic ends this request, not the others of its connection.
        let stream = AssertUnwindSafe(stream).catch_unwind().map(drop);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(stream));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    fn streams() -> (Streams, Arc<ConnectionStats>) {
        let stats = Arc::default();
        (Streams::new(&stats), stats)
    }

    async fn run_once(streams: Streams) {
        poll_fn(|cx| {
            streams.run(cx);
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn few_go_on_before_others_run() {
        for (requests, at_once) in [(1, 1), (16, 16), (1000, 16)] {
            let (streams, stats) = streams();
            let answered = Arc::new(AtomicU32::new(0));
            for _ in 0..requests {
                let answered = Arc::clone(&answered);
                streams.execute(async move {
                    answered.fetch_add(1, Relaxed);
                });
            }
            assert_eq!(stats.streams(), requests);
            tokio::spawn(run_once(streams.clone())).await.unwrap();
            assert_eq!(answered.load(Relaxed), at_once, "of {requests}");
            let rest = tokio::spawn(poll_fn(move |cx| {
                streams.run(cx);
                if answered.load(Relaxed) == u32::try_from(requests).unwrap() {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            }));
            rest.await.unwrap();
            assert_eq!(stats.streams(), 0);
        }
    }

    #[tokio::test]
    async fn what_waits_goes_on_when_it_can_and_ends_with_the_connection() {
        let (streams, stats) = streams();
        let notify = Arc::new(tokio::sync::Notify::new());
        for _ in 0..2 {
            let waits = Arc::clone(&notify);
            streams.execute(async move { waits.notified().await });
        }
        run_once(streams.clone()).await;
        assert_eq!(stats.streams(), 2);
        let (theirs, ended) = (streams.clone(), Arc::clone(&stats));
        let connection = tokio::spawn(poll_fn(move |cx| {
            theirs.run(cx);
            if ended.streams() == 1 { Poll::Ready(()) } else { Poll::Pending }
        }));
        tokio::task::yield_now().await;
        notify.notify_one();
        connection.await.unwrap();
        drop(streams);
        assert_eq!(stats.streams(), 0);
    }

    #[tokio::test]
    async fn a_panic_is_the_requests_own() {
        let (streams, stats) = streams();
        streams.execute(async { std::panic::panic_any("of one request") });
        streams.execute(async {});
        run_once(streams).await;
        assert_eq!((stats.streams(), stats.request_panics()), (0, 1));
    }
}
