//! How the agent is, as its own probe found it.

use tokio::sync::watch;

/// How the agent is, as its own probe found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probe {
    /// Not everything is bound yet; nothing was probed.
    #[default]
    Starting,
    /// Everything is served.
    Healthy,
    /// The Workload API cannot be served.
    Unavailable,
    /// Everything is served to the end, but nothing new: the agent is about to stop.
    Draining,
}

/// What the health endpoints and the watchdog look at; the agent's probe writes it.
#[derive(Debug, Default)]
pub struct HealthState {
    probe: watch::Sender<Probe>,
}

impl HealthState {
    /// Tells how the agent is now. One that drains stays so: a probe that was under way says nothing any more.
    pub fn set(&self, probe: Probe) {
        self.probe.send_if_modified(|now| {
            let changes = *now != Probe::Draining && *now != probe;
            if changes {
                *now = probe;
            }
            changes
        });
    }

    /// How the agent is.
    #[must_use]
    pub fn get(&self) -> Probe {
        *self.probe.borrow()
    }

    /// Wakes at each change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Probe> {
        self.probe.subscribe()
    }

    /// A restart would not help: false only when the agent was up and cannot serve.
    #[must_use]
    pub fn live(&self) -> bool {
        self.get() != Probe::Unavailable
    }

    /// Workloads may be sent here.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.get() == Probe::Healthy
    }

    /// spire-agent's bodies, so that whoever parses them need not change (`pkg/common/health`).
    pub(super) fn body(&self) -> &'static str {
        match self.get() {
            Probe::Starting => "{\"agent\":null}\n",
            Probe::Healthy => "{\"agent\":{}}\n",
            Probe::Unavailable | Probe::Draining => {
                "{\"agent\":{\"make_new_x509_err\":\"workload api is unavailable\"}}\n"
            }
        }
    }
}
