//! Where the requests of a connection are answered: on the task of the connection, if that takes no waiting.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use hyper::rt::Executor;
use tokio::task::coop::poll_proceed;

use super::stats::{ConnectionStats, OpenStream};

/// What a request that is answered on the task of its connection takes of that task's budget, of 128 (tokio's `coop`), so
/// that it answers no more than sixteen before it lets others run.
const COST: u8 = 8;

/// Runs the streams of all connections, and counts them. Most requests can be answered as they come: a task of their own
/// would cost more than that. The others get one, and end when their connection does: h2 then tells each that it was reset.
#[derive(Clone, Debug)]
pub(super) struct Spawner(Arc<ConnectionStats>);

impl Spawner {
    pub(super) fn new(stats: &Arc<ConnectionStats>) -> Self {
        Self(Arc::clone(stats))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Spawner {
    fn execute(&self, stream: F) {
        let counted = OpenStream::count(&self.0);
        let mut stream = Box::pin(async move {
            stream.await;
            drop(counted);
        });
        if !is_answered(stream.as_mut()) {
            tokio::spawn(stream);
        }
    }
}

/// Whether it ends without waiting; a task that it is given to afterwards asks again.
fn is_answered(stream: Pin<&mut impl Future<Output = ()>>) -> bool {
    let mut nobody = Context::from_waker(Waker::noop());
    for _ in 0..COST {
        match poll_proceed(&mut nobody) {
            Poll::Ready(spent) => spent.made_progress(),
            Poll::Pending => return false,
        }
    }
    // A panic ends this request, not the others of its connection.
    !catch_unwind(AssertUnwindSafe(|| stream.poll(&mut nobody))).is_ok_and(|poll| poll.is_pending())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    async fn answered_on_this_task(requests: u32) -> u32 {
        let (spawner, answered) = (Spawner::new(&Arc::default()), Arc::new(AtomicU32::new(0)));
        for _ in 0..requests {
            let answered = Arc::clone(&answered);
            spawner.execute(async move {
                answered.fetch_add(1, Relaxed);
            });
        }
        answered.load(Relaxed)
    }

    #[tokio::test]
    async fn few_are_answered_before_others_run() {
        for (requests, here) in [(1, 1), (15, 15), (1000, 16)] {
            let at_once = tokio::spawn(answered_on_this_task(requests)).await.unwrap();
            assert_eq!(at_once, here, "of {requests}");
        }
    }

    #[tokio::test]
    async fn what_waits_goes_on_by_itself() {
        let (stats, notify) = (Arc::<ConnectionStats>::default(), Arc::new(tokio::sync::Notify::new()));
        let (told, hears) = tokio::sync::oneshot::channel();
        let waits = Arc::clone(&notify);
        Spawner::new(&stats).execute(async move {
            waits.notified().await;
            told.send(()).unwrap();
        });
        assert_eq!(stats.streams(), 1);
        notify.notify_one();
        hears.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_the_requests_own() {
        let stats = Arc::<ConnectionStats>::default();
        Spawner::new(&stats).execute(async { std::panic::panic_any("of one request") });
        assert_eq!((stats.streams(), stats.request_panics()), (0, 1));
    }
}
