//! Whether the agent could serve, as it finds out by itself.

use std::{sync::Arc, time::Duration};

use crate::{
    identity::{SpiffeId, TrustDomain},
    store::Signer,
    telemetry::{
        chain,
        health::{HealthState, Probe},
    },
};

/// How often the agent asks itself whether it could serve.
const PROBE: Duration = Duration::from_secs(5);

/// Asks every few seconds whether a token could be signed now.
pub(super) async fn probe(health: Arc<HealthState>, signer: Arc<Signer>, trust_domain: TrustDomain) {
    // The ID that SPIRE keeps for itself: nobody can ask for this token, and it is dropped at once.
    let Ok(own) = SpiffeId::parse(&format!("{}/spire/agent", trust_domain.id_string())) else { return };
    let audience = ["health".to_owned()];
    let mut every = tokio::time::interval(PROBE);
    loop {
        every.tick().await;
        if health.get() == Probe::Draining {
            return;
        }
        match signer.jwt(&own, None, &audience).await {
            // The drain may have begun meanwhile, and has the last word.
            _ if health.get() == Probe::Draining => return,
            Ok(_) => health.set(Probe::Healthy),
            Err(error) => {
                if health.get() != Probe::Unavailable {
                    tracing::error!(error = chain(&error), "the agent cannot sign");
                }
                health.set(Probe::Unavailable);
            }
        }
    }
}
