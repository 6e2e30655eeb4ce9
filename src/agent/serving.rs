//! A socket that is served in a task of its own.

use std::{future::Future, io, time::Duration};

use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::peer::{Drained, Leave, socket::VacantSocket};

/// How long the end of accepting is waited for, at most: no thread may be there to do it.
const LEAVES_WITHIN: Duration = Duration::from_secs(5);

/// A socket that is being served.
pub(super) struct Serving {
    what: &'static str,
    /// Gone once it was told to end.
    stop: Option<oneshot::Sender<Leave>>,
    task: JoinHandle<io::Result<Drained>>,
}

impl Serving {
    /// Serves `what` by `serve`, which ends when it is told to, or when nobody could tell it any more.
    pub(super) fn begin<F>(what: &'static str, serve: impl FnOnce(oneshot::Receiver<Leave>) -> F) -> Self
    where
        F: Future<Output = io::Result<Drained>> + Send + 'static,
    {
        let (stop, stopping) = oneshot::channel();
        Self { what, stop: Some(stop), task: tokio::spawn(serve(stopping)) }
    }

    /// Begins the drain, and removes the socket.
    pub(super) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            drop(stop.send(Leave::Remove));
        }
    }

    /// Begins the drain, and has the socket for the next agent; `None` where there is none to be had.
    pub(super) async fn hand_on(&mut self) -> Option<VacantSocket> {
        let (vacate, vacant) = oneshot::channel();
        drop(self.stop.take()?.send(Leave::HandOn(vacate)));
        timeout(LEAVES_WITHIN, vacant).await.ok()?.ok()
    }

    /// Waits until serving has ended by itself, which is a fault.
    pub(super) async fn failed(&mut self) -> anyhow::Error {
        let what = self.what;
        match (&mut self.task).await {
            Ok(Ok(_drained)) => anyhow::anyhow!("serving {what} ended without having been told to"),
            Ok(Err(error)) => anyhow::Error::new(error).context(format!("cannot serve {what}")),
            Err(panic) => anyhow::Error::new(panic).context(format!("serving {what} ended early")),
        }
    }

    /// Waits for the end of the drain; `None` when it was cut short, which the log then tells of.
    pub(super) async fn drained(self) -> Option<Drained> {
        let error = match self.task.await {
            Ok(Ok(drained)) => return Some(drained),
            Ok(Err(error)) => anyhow::Error::new(error),
            Err(panic) => anyhow::Error::new(panic),
        };
        tracing::warn!(%error, what = self.what, "the drain ended early");
        None
    }
}
