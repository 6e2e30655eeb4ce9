//! A socket that is served in a task of its own.

use std::{future::Future, io};

use tokio::task::JoinHandle;

use crate::peer::Drained;

/// A socket that is being served.
pub(super) struct Serving {
    what: &'static str,
    task: JoinHandle<io::Result<Drained>>,
}

impl Serving {
    /// Serves `what`.
    pub(super) fn begin(
        what: &'static str,
        serving: impl Future<Output = io::Result<Drained>> + Send + 'static,
    ) -> Self {
        Self { what, task: tokio::spawn(serving) }
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
