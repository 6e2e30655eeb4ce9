//! An agent in a pod that has left its place to another one: it lives, and is not ready, until it is told to end.
//!
//! A container that ends is started again by its kubelet, and would take the place back from the agent that has come for
//! it. So this process stays, answers the probes of its pod, and comes back when the other one ends. Where it shares the
//! network with the other agent, that one has the ports, and there is nobody to probe this one.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    endpoints,
    gate::{Means, http_listeners},
    place::PlaceTaken,
    predecessor::serves_instead,
    start::in_pod,
};
use crate::{
    config::Config,
    telemetry::{chain, health::HealthState},
};

/// The pause between attempts to come back, and between looks at the agent that serves instead.
const RETURN_PAUSE: Duration = Duration::from_secs(1);
/// How often one that cannot come back yet says so.
const SAID_EVERY: Duration = Duration::from_secs(60);
/// How often it tries where the place is free.
const RETURNS: u32 = 10;

/// Whether an agent that could not come back tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TriesAgain {
    Yes,
    /// Another agent serves, and this one need not stay.
    No,
}

/// What an agent that comes back has met so far.
#[derive(Debug, Default)]
pub(super) struct Returning {
    failed: u32,
    said: Option<Instant>,
}

impl Returning {
    /// Waits before the next attempt. As long as another agent has the place there is one, however long that lasts: who
    /// would end would leave nobody to serve. For one that serves this one stands by in a pod, and ends elsewhere.
    ///
    /// # Errors
    /// `error`, when it has come often and has nothing to do with another agent.
    pub(super) async fn after(
        &mut self,
        error: anyhow::Error,
        config: &Config,
    ) -> anyhow::Result<TriesAgain> {
        let taken = error.downcast_ref::<PlaceTaken>().is_some();
        if !taken {
            self.failed += 1;
            if self.failed >= RETURNS {
                return Err(error);
            }
        }
        if self.said.is_none_or(|said| said.elapsed() >= SAID_EVERY) || !taken {
            self.said = Some(Instant::now());
            tracing::warn!(error = chain(error.as_ref()), "cannot take up service again yet");
        }
        sleep(RETURN_PAUSE).await;
        let mut beside = None;
        while taken && let Some(other) = serves_instead(config).await {
            let pid = other.pid();
            if !in_pod() {
                tracing::info!(pid, "yet another agent serves: ending");
                return Ok(TriesAgain::No);
            }
            let _answering = beside.get_or_insert_with(|| {
                tracing::info!(pid, "yet another agent serves: standing by");
                answer_probes(config, pid)
            });
            let began = Instant::now();
            other.stand_by(config).await;
            // One that does not want to know of this one is asked again now and then.
            sleep(RETURN_PAUSE.saturating_sub(began.elapsed())).await;
        }
        Ok(TriesAgain::Yes)
    }
}

/// Answers the health checks of this configuration, where their places are free: process `pid` serves. Ends when it is
/// dropped. Must be called within a runtime.
pub(super) fn answer_probes(config: &Config, pid: i32) -> JoinSet<()> {
    let state = Arc::<HealthState>::default();
    state.handed_over_to(pid);
    let places = Means::of_this_process(http_listeners(config)).http_places;
    let mut answering = JoinSet::new();
    for endpoint in endpoints::of_health(config, &state) {
        match endpoint.bind(places) {
            Ok(listener) => {
                answering.spawn(async move {
                    let Err(error) = listener.serve().await;
                    tracing::warn!(%error, "probes of an agent that has handed over are not answered");
                });
            }
            // The other agent has it.
            Err(error) => tracing::debug!(error = chain(&error), "the other agent answers probes"),
        }
    }
    answering
}
