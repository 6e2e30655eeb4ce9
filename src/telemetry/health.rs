//! How the agent is, as its own probe found it.

use std::sync::{Mutex, MutexGuard, PoisonError};

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
pub struct HealthState(Mutex<Probe>);

impl HealthState {
    /// Tells how the agent is now. One that drains stays so: a probe that was under way says nothing any more.
    pub fn set(&self, probe: Probe) {
        let mut now = self.lock();
        if *now != Probe::Draining {
            *now = probe;
        }
    }

    /// How the agent is.
    #[must_use]
    pub fn get(&self) -> Probe {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Probe> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is well, or on its way: `false` only when it was up and cannot serve, as a restart may help then.
    #[must_use]
    pub fn live(&self) -> bool {
        self.get() != Probe::Unavailable
    }

    /// Whether workloads may be sent here.
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
