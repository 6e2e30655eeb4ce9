//! How the agent is, as its own probe found it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// How the agent is, as its own probe found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probe {
    /// Not everything is there yet: nothing was probed, or the issuer waits for its server.
    #[default]
    Starting,
    /// Everything is served.
    Healthy,
    /// The Workload API cannot be served.
    Unavailable,
    /// What signs has expired, and the issuer, which tries again and again, cannot replace it: nor could a restart.
    Expired,
    /// Everything is served to the end, but nothing new: the agent is about to stop.
    Draining,
}

/// Whether the threads that serve callers do so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pulse {
    /// They answer.
    #[default]
    Beats,
    /// None of them has answered for longer than anything takes that they do.
    Missed,
}

/// What the health endpoints and the watchdog look at; the agent's probe writes it.
#[derive(Debug, Default)]
pub struct HealthState(Mutex<Vitals>);

#[derive(Debug, Default)]
struct Vitals {
    probe: Probe,
    pulse: Pulse,
    /// No caller can be served or attested.
    blind: bool,
    /// No caller is let in: none can be told from the next one that has its PID.
    unidentified: bool,
    /// Nobody finds the socket.
    lost: Lost,
    /// Why no entry can be given to anybody.
    ungiven: Option<Ungiven>,
    /// The process that serves in the place of this one.
    successor: Option<i32>,
    /// The process that keeps the place which this one asked for, since it could serve nobody.
    keeper: Option<i32>,
}

/// Why no entry can be given to anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ungiven {
    /// In words, with what to do, for the agent's owner.
    pub said: String,
    /// What keeps callers from it, each in a few words of the agent's own, for whoever asks.
    pub causes: Vec<&'static str>,
}

/// Whether the socket of the Workload API stands at its path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lost {
    /// It does.
    #[default]
    No,
    /// It does not, and the next start of the agent makes it anew.
    UntilRestart,
    /// It does not, and whoever keeps it for the agent has to make it anew.
    UntilMade,
}

impl HealthState {
    /// Tells how the agent is now. One that drains stays so: a probe that was under way says nothing any more.
    pub fn set(&self, probe: Probe) {
        let mut now = self.lock();
        if now.probe != Probe::Draining {
            now.probe = probe;
        }
    }

    /// Tells whether the threads that serve callers answer. They are asked from outside: they could not say that
    /// they do not.
    pub fn felt(&self, pulse: Pulse) {
        self.lock().pulse = pulse;
    }

    /// Tells whether callers can be told apart. Returns whether that is news.
    pub fn tells_callers(&self, told_apart: bool) -> bool {
        std::mem::replace(&mut self.lock().blind, !told_apart) == told_apart
    }

    /// Tells whether callers can be identified: those who cannot are not let in.
    pub fn identifies(&self, identifies: bool) {
        self.lock().unidentified = !identifies;
    }

    /// Whether no caller can be identified.
    #[must_use]
    pub fn identifies_nobody(&self) -> bool {
        self.lock().unidentified
    }

    /// Tells that another agent, process `pid`, serves in the place of this one: it is well, and never ready again.
    pub fn handed_over_to(&self, pid: i32) {
        self.lock().successor = Some(pid);
    }

    /// Tells which process, if any, serves on since this one could serve nobody in its place: it is well, and not ready.
    pub fn kept_waiting_by(&self, pid: Option<i32>) {
        self.lock().keeper = pid;
    }

    /// What keeps the agent from serving, each in a few words that another agent has the same of; empty where nothing does.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        let now = self.lock();
        let issuer = match now.probe {
            Probe::Starting => Some("the server has not said yet whom this node serves"),
            Probe::Unavailable | Probe::Expired => Some("the workload api is unavailable"),
            Probe::Healthy | Probe::Draining => None,
        };
        let found = [
            (now.pulse == Pulse::Missed, "no thread serves callers"),
            (now.blind, "callers cannot be served, or cannot be told apart"),
            (now.unidentified, "callers cannot be identified"),
            (now.lost != Lost::No, "the socket of the workload api is gone"),
        ];
        let found = found.into_iter().filter_map(|(is_so, what)| is_so.then_some(what));
        let ungiven = now.ungiven.iter().flat_map(|ungiven| ungiven.causes.iter().copied());
        issuer.into_iter().chain(found).chain(ungiven).collect()
    }

    /// Tells whether clients find the socket.
    pub fn found(&self, lost: Lost) {
        self.lock().lost = lost;
    }

    /// Whether clients find the socket.
    #[must_use]
    pub fn lost(&self) -> Lost {
        self.lock().lost
    }

    /// Tells why no entry can be given to anybody, if that is so.
    pub fn gives_nothing(&self, why: Option<Ungiven>) {
        self.lock().ungiven = why;
    }

    /// Why no entry can be given to anybody, if that is so.
    #[must_use]
    pub fn ungiven(&self) -> Option<Ungiven> {
        self.lock().ungiven.clone()
    }

    /// How the agent is. Whether its threads answer does not show here.
    #[must_use]
    pub fn get(&self) -> Probe {
        self.lock().probe
    }

    fn lock(&self) -> MutexGuard<'_, Vitals> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is well, or on its way: `false` only when it was up and cannot serve, as a restart may help then.
    #[must_use]
    pub fn live(&self) -> bool {
        let Vitals { probe, pulse, lost, .. } = *self.lock();
        // One that ends leaves its socket.
        let lost = lost == Lost::UntilRestart && probe != Probe::Draining;
        probe != Probe::Unavailable && pulse == Pulse::Beats && !lost
    }

    /// Whether workloads may be sent here.
    #[must_use]
    pub fn ready(&self) -> bool {
        let Vitals { probe, pulse, blind, unidentified, lost, ungiven, successor, keeper } = &*self.lock();
        let has_place = successor.is_none() && keeper.is_none();
        let serves = *probe == Probe::Healthy && *pulse == Pulse::Beats && has_place;
        let tells_who = !blind && !unidentified;
        serves && tells_who && *lost == Lost::No && ungiven.is_none()
    }

    fn keeper(&self) -> Option<i32> {
        self.lock().keeper
    }

    /// spire-agent's bodies, so that whoever parses them need not change (`pkg/common/health`).
    pub(super) fn body(&self) -> String {
        if let Some(pid) = self.keeper() {
            let lacks = self.lacks().join(", ");
            return format!(
                "{{\"agent\":{{\"make_new_x509_err\":\"PID {pid} serves on, since this agent could serve nobody: {lacks}: see the log\"}}}}\n"
            );
        }
        let now = self.lock();
        let Vitals { probe, pulse, blind, unidentified, lost, successor, .. } = *now;
        let (blind, ungiven) = (blind || unidentified, now.ungiven.clone());
        drop(now);
        if let Some(pid) = successor {
            return format!("{{\"agent\":{{\"make_new_x509_err\":\"handed over to PID {pid}\"}}}}\n");
        }
        let serves = (probe, pulse, lost) == (Probe::Healthy, Pulse::Beats, Lost::No);
        if let Some(Ungiven { causes, .. }) = ungiven.filter(|_| serves && !blind) {
            return format!(
                "{{\"agent\":{{\"make_new_x509_err\":\"nobody whom entries ask for can be served: {}: see the log\"}}}}\n",
                causes.join(", ")
            );
        }
        let text = match (probe, pulse) {
            (Probe::Healthy, Pulse::Beats) if lost != Lost::No => {
                "{\"agent\":{\"make_new_x509_err\":\"the socket of the workload api is gone: see the log\"}}\n"
            }
            (Probe::Healthy, Pulse::Beats) if blind => {
                "{\"agent\":{\"make_new_x509_err\":\"callers cannot be served, or cannot be told apart, on this node: see the log\"}}\n"
            }
            (Probe::Starting, Pulse::Beats) => "{\"agent\":null}\n",
            (Probe::Healthy, Pulse::Beats) => "{\"agent\":{}}\n",
            (Probe::Unavailable | Probe::Expired | Probe::Draining, _) | (_, Pulse::Missed) => {
                "{\"agent\":{\"make_new_x509_err\":\"workload api is unavailable\"}}\n"
            }
        };
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_drains_stays_so() {
        let state = HealthState::default();
        for (probe, then) in [
            (Probe::Healthy, Probe::Healthy),
            (Probe::Unavailable, Probe::Unavailable),
            (Probe::Draining, Probe::Draining),
            (Probe::Healthy, Probe::Draining),
        ] {
            state.set(probe);
            assert_eq!(state.get(), then);
        }
    }

    #[test]
    fn one_whose_threads_do_not_answer_is_neither_live_nor_ready() {
        let state = HealthState::default();
        for (probe, live, ready) in [
            (Probe::Starting, true, false),
            (Probe::Healthy, true, true),
            (Probe::Unavailable, false, false),
            (Probe::Expired, true, false),
            (Probe::Draining, true, false),
        ] {
            state.set(probe);
            assert_eq!((state.live(), state.ready()), (live, ready), "{probe:?}");
            state.felt(Pulse::Missed);
            assert_eq!((state.live(), state.ready()), (false, false), "{probe:?}");
            state.felt(Pulse::Beats);
            assert_eq!((state.live(), state.ready()), (live, ready), "{probe:?}");
        }
    }
}
