//! The signals that a running agent takes.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::os;

/// What a signal tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalled {
    /// SIGTERM or SIGINT, whose name this is.
    Stop(&'static str),
    /// SIGHUP.
    Reload,
    /// SIGUSR2.
    ReopenLog,
    /// SIGUSR1.
    Nothing,
}

/// Takes signals from the moment it is made. What was sent before and held back ([`os::signals`]) comes too; of
/// one kind that comes often, one at a time.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    /// Must be called on the main thread, within the runtime that waits for them.
    ///
    /// # Errors
    /// The runtime cannot take signals.
    pub fn new() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("cannot take signals");
        let signals = Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
            user1: on(SignalKind::user_defined1())?,
            user2: on(SignalKind::user_defined2())?,
        };
        os::signals::release();
        Ok(signals)
    }

    /// The next one.
    pub async fn next(&mut self) -> Signalled {
        let Self { terminate, interrupt, hangup, user1, user2 } = self;
        tokio::select! {
            biased;
            _ = terminate.recv() => Signalled::Stop("SIGTERM"),
            _ = interrupt.recv() => Signalled::Stop("SIGINT"),
            _ = hangup.recv() => Signalled::Reload,
            _ = user1.recv() => Signalled::Nothing,
            _ = user2.recv() => Signalled::ReopenLog,
        }
    }

    /// The next one that says to stop; the others wait for [`Signals::next`].
    pub async fn stop(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
