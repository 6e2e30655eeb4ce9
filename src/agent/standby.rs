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
    gate::{Means, http_listeners},
    handover::who_runs,
    start::{PlaceTaken, at_socket},
};
use crate::{
    config::Config,
    telemetry::{
        HealthSettings,
        health::HealthState,
        http::{HttpListener, Routes},
    },
};

/// The pause between attempts to come back, and between looks at the agent that serves instead.
const RETURN_PAUSE: Duration = Duration::from_secs(1);
/// How often one that cannot come back yet says so.
const SAID_EVERY: Duration = Duration::from_secs(60);
/// How often it tries where the place is free.
const RETURNS: u32 = 10;

/// What an agent that comes back has met so far.
#[derive(Debug, Default)]
pub(super) struct Returning {
    failed: u32,
    said: Option<Instant>,
}

impl Returning {
    /// Waits before the next attempt. As long as another agent has the place there is one, however long that lasts: who
    /// would end would leave nobody to serve. Beside one that can be asked this one stands by.
    ///
    /// # Errors
    /// `error`, when it has come often and has nothing to do with another agent.
    pub(super) async fn after(&mut self, error: anyhow::Error, config: &Config) -> anyhow::Result<()> {
        let taken = error.downcast_ref::<PlaceTaken>().is_some();
        if !taken {
            self.failed += 1;
            if self.failed >= RETURNS {
                return Err(error);
            }
        }
        if self.said.is_none_or(|said| said.elapsed() >= SAID_EVERY) || !taken {
            self.said = Some(Instant::now());
            tracing::warn!(error = format!("{error:#}"), "cannot take up service again yet");
        }
        sleep(RETURN_PAUSE).await;
        let mut beside = None;
        while taken && let Some(pid) = who_runs(&config.agent.data_dir).await {
            let _answering = beside.get_or_insert_with(|| {
                tracing::info!(pid, "yet another agent serves: standing by");
                answer_probes(config, pid)
            });
            sleep(RETURN_PAUSE).await;
        }
        Ok(())
    }
}

/// Answers the health checks of this configuration, where their places are free: process `pid` serves. Ends when it is
/// dropped. Must be called within a runtime.
pub(super) fn answer_probes(config: &Config, pid: i32) -> JoinSet<()> {
    let state = Arc::<HealthState>::default();
    state.handed_over_to(pid);
    let places = Means::of_this_process(http_listeners(config)).http_places;
    let HealthSettings { enabled, host, port, live_path, ready_path, socket_path } = &config.health;
    let health = || Routes::Health {
        state: Arc::clone(&state),
        live_path: live_path.clone(),
        ready_path: ready_path.clone(),
    };
    let tcp = enabled.then(|| HttpListener::bind(host, *port, health(), places).map_err(anyhow::Error::from));
    let unix = socket_path.as_ref().map(|path| at_socket(path, health(), places));
    let mut answering = JoinSet::new();
    for bound in [tcp, unix].into_iter().flatten() {
        match bound {
            Ok(listener) => {
                answering.spawn(async move {
                    let Err(error) = listener.serve().await;
                    tracing::warn!(%error, "probes of an agent that has handed over are not answered");
                });
            }
            // The other agent has it.
            Err(error) => tracing::debug!(error = format!("{error:#}"), "the other agent answers probes"),
        }
    }
    answering
}
