//! The signals that a running agent takes.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal tells.
pub(super) enum Signalled {
    Stop(&'static str),
    Reload,
    ReopenLog,
    Nothing,
}

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("cannot take signals");
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
            user1: on(SignalKind::user_defined1())?,
            user2: on(SignalKind::user_defined2())?,
        })
    }

    pub(super) async fn next(&mut self) -> Signalled {
        tokio::select! {
            _ = self.terminate.recv() => Signalled::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Signalled::Stop("SIGINT"),
            _ = self.hangup.recv() => Signalled::Reload,
            _ = self.user1.recv() => Signalled::Nothing,
            _ = self.user2.recv() => Signalled::ReopenLog,
        }
    }

    pub(super) async fn stop_again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
