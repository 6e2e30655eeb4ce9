//! The one place that knows every issuer.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    FileFault, Issuer, IssuerChoice, IssuerInput,
    embedded::{EmbeddedIssuer, IssuerError},
    metrics::IssuerMetrics,
    server::{DataFault, LookFault, ServerIssuer, look_without_place},
};
use crate::{identity::EntryIndex, os::clock::Clock, telemetry::registry::Registry};

/// Why there is no issuer.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The embedded one could not sign.
    #[error(transparent)]
    Embedded(#[from] IssuerError),
    /// What is kept of a SPIRE Server cannot be used.
    #[error(transparent)]
    Server(#[from] DataFault),
}

impl OpenError {
    /// Whether another agent has `data_dir`.
    pub fn is_locked(&self) -> bool {
        matches!(
            self,
            Self::Embedded(IssuerError::File(FileFault::Locked { .. }))
                | Self::Server(DataFault::File(FileFault::Locked { .. }))
        )
    }
}

/// Opens the issuer that the configuration chose.
///
/// # Errors
/// Why it could not sign.
pub fn open(
    told: IssuerInput,
    clock: Clock,
    metrics: Arc<IssuerMetrics>,
    registry: Registry<'_>,
) -> Result<Arc<dyn Issuer>, OpenError> {
    let IssuerInput { choice, index, federated } = told;
    match choice {
        IssuerChoice::Embedded(settings) => {
            let issuer = EmbeddedIssuer::open(settings, clock, metrics)?;
            issuer.declare(index, federated);
            Ok(Arc::new(issuer))
        }
        IssuerChoice::Server(settings) => {
            Ok(Arc::new(ServerIssuer::open(*settings, clock, metrics, registry)?))
        }
    }
}

/// The entries that the issuer of the configuration would publish, while another agent has its files: nothing is changed, and
/// nobody is asked for an SVID. What a server tells to an SVID alone is not known without one: then there are none.
///
/// # Errors
/// Why it is not known by `deadline`.
pub async fn look(told: IssuerInput, clock: Clock, deadline: Instant) -> Result<Arc<EntryIndex>, LookFault> {
    match told.choice {
        IssuerChoice::Embedded(_) => Ok(told.index),
        IssuerChoice::Server(settings) => look_without_place(*settings, clock, deadline).await,
    }
}
