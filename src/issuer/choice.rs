//! The one place that knows every issuer.

use std::sync::Arc;

use super::{
    Issuer, IssuerChoice, IssuerInput,
    embedded::{EmbeddedIssuer, IssuerError},
    metrics::IssuerMetrics,
};
use crate::os::clock::Clock;

/// Opens the issuer that the configuration chose.
///
/// # Errors
/// Why it could not sign.
pub fn open(
    told: IssuerInput,
    clock: Clock,
    metrics: Arc<IssuerMetrics>,
) -> Result<Arc<dyn Issuer>, IssuerError> {
    let IssuerInput { choice, index, federated } = told;
    match choice {
        IssuerChoice::Embedded(settings) => {
            let issuer = EmbeddedIssuer::open(settings, clock, metrics)?;
            issuer.declare(index, federated);
            Ok(Arc::new(issuer))
        }
    }
}
