//! Whether the agent could serve, as it finds out by itself.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, timeout},
};

use super::way_in::{self, WayIn};
use crate::{
    issuer::{Issuer, SvidKind},
    os::clock::sleep_to_beat,
    peer::socket::{Presence, Sight},
    store::Store,
    telemetry::{
        chain,
        health::{HealthState, Lost, Probe, Pulse},
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
/// restart would not bring the server back.
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
                health.set(if waits { Probe::Starting } else { Probe::Unavailable });
            }
        }
        sleep_to_beat(if failing_since.is_some() && waits { PROBE_OF_WAITING } else { PROBE }).await;
    }
}

/// Looks every few seconds whether clients still reach the socket. Somebody may have removed it, mounted something over it, or
/// changed a mode: an agent that nobody reaches does not notice anything else. One that it bound itself is bound anew by a
/// restart. And whether those get there whom entries ask for.
pub(super) async fn keep_in_sight(
    health: Arc<HealthState>,
    presence: Presence,
    way_in: Arc<WayIn>,
    store: Arc<Store>,
    shut: watch::Sender<Vec<String>>,
) {
    let mut known = Sight::There;
    loop {
        sleep_to_beat(PROBE).await;
        let (at, looks, store) = (presence.clone(), Arc::clone(&way_in), Arc::clone(&store));
        let look = move || {
            let now = at.shut_now();
            looks.look(&now);
            (at.look(&now), looks.kept_out(&now, &at, &store.snapshot()), way_in::found(&now, &at))
        };
        // No thread, no answer: that is for the next look.
        let Ok((sight, kept_out, mut found)) = tokio::task::spawn_blocking(look).await else { continue };
        if health.get() == Probe::Draining {
            return;
        }
        found.extend(way_in.tell(&health, kept_out));
        shut.send_if_modified(|known| {
            let is_news = *known != found;
            *known = found;
            is_news
        });
        let path = presence.path().display();
        let lost = match (&sight, presence.handed_over) {
            (Sight::There, _) => Lost::No,
            // Somebody has come another way since, as through a mount.
            (Sight::Shut(_), _) if way_in.has_another() => Lost::No,
            (Sight::Gone, false) => Lost::UntilRestart,
            (Sight::Gone, true) => Lost::UntilMade,
            (Sight::Shut(_), _) => Lost::Shut,
        };
        if sight != known {
            match (&sight, lost, &known) {
                (Sight::Shut(shut), ..) => tracing::error!(
                    %path,
                    "other users cannot reach the socket of the workload api any more: {shut}"
                ),
                (_, Lost::UntilRestart, _) => tracing::error!(
                    %path,
                    "the socket of the workload api is gone from its path, and nobody can connect: restart the agent"
                ),
                (_, Lost::UntilMade, _) => tracing::error!(
                    %path,
                    "the socket of the workload api is gone from its path, and nobody can connect: restart its socket unit"
                ),
                (Sight::There, _, Sight::Shut(_)) => {
                    tracing::warn!(%path, "other users can reach the socket of the workload api again");
                }
                _ => tracing::warn!(%path, "the socket of the workload api is at its path again"),
            }
        }
        known = sight;
        health.found(lost);
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
