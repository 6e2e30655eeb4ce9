//! Whether the agent could serve, as it finds out by itself.

use std::{sync::Arc, time::Duration};

use crate::{
    issuer::{Issuer, SvidKind},
    telemetry::{
        chain,
        health::{HealthState, Probe},
        registry::Label as _,
    },
};

/// How often the agent asks itself whether it could serve.
const PROBE: Duration = Duration::from_secs(5);

/// Asks every few seconds whether the issuer could sign SVIDs of each kind.
pub(super) async fn probe(health: Arc<HealthState>, issuer: Arc<dyn Issuer>) {
    let mut every = tokio::time::interval(PROBE);
    loop {
        every.tick().await;
        match SvidKind::VALUES.iter().try_for_each(|kind| issuer.can_sign(*kind)) {
            _ if health.get() == Probe::Draining => return,
            Ok(()) => health.set(Probe::Healthy),
            Err(error) => {
                if health.get() != Probe::Unavailable {
                    tracing::error!(error = chain(&error), "the agent cannot sign");
                }
                health.set(Probe::Unavailable);
            }
        }
    }
}
