//! Whether the agent could serve, as it finds out by itself.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    time::{Instant, timeout},
};

use crate::{
    issuer::{Issuer, SvidKind},
    os::clock::sleep_to_beat,
    telemetry::{
        chain,
        health::{HealthState, Probe, Pulse},
        registry::Label as _,
    },
};

/// How often the agent asks itself whether it could serve.
const PROBE: Duration = Duration::from_secs(5);
/// The same while it waits for its server: callers are served as soon as that has answered.
const PROBE_OF_WAITING: Duration = Duration::from_millis(250);

/// For how long a server may keep the agent waiting after its start before that is said.
const WAITS_QUIETLY: Duration = Duration::from_secs(5);

/// How often the threads that serve callers are asked for a sign of life.
const BEAT: Duration = Duration::from_secs(1);
/// How long they may take for it. A node that is short of processors for so long is no better off with this agent.
const BEAT_WITHIN: Duration = Duration::from_secs(10);

/// Asks every few seconds whether the issuer could sign SVIDs of each kind. One that waits for its server is on its way: a
/// restart would not bring the server back, nor make room on a full disk.
pub(super) async fn probe(health: Arc<HealthState>, issuer: Arc<dyn Issuer>) {
    let waits = issuer.server().is_some();
    let mut failing_since = None;
    let mut is_said = false;
    loop {
        match SvidKind::VALUES.iter().try_for_each(|kind| issuer.can_sign(*kind)) {
            _ if health.get() == Probe::Draining => return,
            Ok(()) => {
                (failing_since, is_said) = (None, false);
                health.set(Probe::Healthy);
            }
            Err(error) => {
                let since = *failing_since.get_or_insert_with(Instant::now);
                if !is_said && (!waits || since.elapsed() >= WAITS_QUIETLY) {
                    is_said = true;
                    if waits {
                        tracing::warn!(error = chain(&error), "nobody is served yet");
                    } else {
                        tracing::error!(error = chain(&error), "the agent cannot sign");
                    }
                }
                health.set(match issuer.rotation_fault() {
                    _ if waits => Probe::Starting,
                    Some(_) => Probe::Expired,
                    None => Probe::Unavailable,
                });
            }
        }
        sleep_to_beat(if failing_since.is_some() && waits { PROBE_OF_WAITING } else { PROBE }).await;
    }
}

/// Asks the runtime that serves callers for a sign of life, for ever, from another one: when every thread of it is
/// blocked, it can say nothing itself.
pub(super) async fn feel_pulse(health: Arc<HealthState>, serving: Handle) {
    loop {
        let mut beat = serving.spawn(async {});
        sleep_to_beat(BEAT).await;
        // Who waits for it is woken once more.
        if !beat.is_finished() && timeout(BEAT_WITHIN, &mut beat).await.is_err() {
            health.felt(Pulse::Missed);
            tracing::error!(
                seconds = BEAT_WITHIN.as_secs(),
                "nobody is served: every thread that serves callers is blocked"
            );
            // However it ends, there is a thread that did it.
            drop(beat.await);
            health.felt(Pulse::Beats);
            tracing::warn!("callers are served again");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// A runtime whose only thread is blocked, seen from another one.
    #[test]
    fn blocked_threads_are_seen_and_so_is_their_return() {
        let serving =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let control =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let health = Arc::<HealthState>::default();
        health.set(Probe::Healthy);
        let gate = Arc::new(Barrier::new(2));
        let held = Arc::clone(&gate);
        let (blocks, blocked) = std::sync::mpsc::channel();
        drop(serving.spawn(async move {
            blocks.send(()).unwrap();
            held.wait();
        }));
        blocked.recv().unwrap();
        control.block_on(async {
            let feeling = tokio::spawn(feel_pulse(Arc::clone(&health), serving.handle().clone()));
            while health.live() {
                tokio::time::sleep(BEAT).await;
            }
            assert!(!health.ready());
            gate.wait();
            while !health.live() {
                tokio::time::sleep(BEAT).await;
            }
            assert!(health.ready());
            feeling.abort();
        });
    }
}
