//! The end of a listener's connections.

use std::time::Duration;

use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};

/// How a drain went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Connections that ended by themselves once told.
    pub ended: usize,
    /// Connections that had to be cut when the drain's time was over.
    pub cut: usize,
}

/// Waits for connections that were told to end, and cuts what is left of them when the time is over.
pub(super) async fn drain(mut connections: JoinSet<()>, timeout: Duration) -> Drained {
    let open = connections.len();
    let over = Instant::now() + timeout;
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
    connections.shutdown().await;
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
