//! The end of a listener's connections.

use std::time::Duration;

use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};

/// How long the end of those that are cut is waited for. On a node that has no processor time left, to take hundreds of them
/// apart takes long, and the process ends without it.
const CUT_WITHIN: Duration = Duration::from_millis(100);

/// How a drain went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Connections that ended by themselves once told.
    pub ended: usize,
    /// Connections that had to be cut when the drain's time was over.
    pub cut: usize,
}

/// Waits for connections that were told to end, and cuts what is left of them when the time is `over`.
pub(super) async fn drain(mut connections: JoinSet<()>, over: Instant) -> Drained {
    let open = connections.len();
    let mut ended = 0;
    while !connections.is_empty() {
        tokio::select! {
            Some(one) = connections.join_next() => {
                note_panic(one);
                ended += 1;
            }
            () = sleep_until(over) => break,
        }
    }
    let cut = connections.len();
    let _all_ended = timeout(CUT_WITHIN, connections.shutdown()).await;
    tracing::debug!(open, ended, cut, "drained");
    Drained { ended, cut }
}

/// A panic of a connection's own task; it is counted where the task unwinds.
pub(super) fn note_panic(ended: Result<(), JoinError>) {
    if let Err(err) = ended
        && err.is_panic()
    {
        tracing::error!(error = %err, "a connection's task panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes as long to end as the test likes.
    struct Slow(mpsc::Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _let_go = self.0.recv();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_waits_for_what_is_slow_to_cut() {
        let mut connections = JoinSet::new();
        let (let_go, wait) = mpsc::channel();
        let slow = Slow(wait);
        connections.spawn(async move {
            let _slow = slow;
            std::future::pending().await
        });
        assert_eq!(drain(connections, Instant::now()).await, Drained { ended: 0, cut: 1 });
        drop(let_go);
    }
}
