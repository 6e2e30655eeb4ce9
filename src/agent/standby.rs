//! An agent in a pod that has left its place to another one: it lives, and is not ready, until it is told to end.
//!
//! A container that ends is started again by its kubelet, and would take the place back from the agent that has come for
//! it. So this process stays, answers the probes of its pod, and comes back when the other one ends. Where it shares the
//! network with the other agent, that one has the ports, and there is nobody to probe this one.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::{
    gate::{Means, http_listeners},
    start::at_socket,
};
use crate::{
    config::Config,
    telemetry::{
        HealthSettings,
        health::HealthState,
        http::{HttpListener, Routes},
    },
};

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
