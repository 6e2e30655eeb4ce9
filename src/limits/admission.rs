//! The two admission points in the way of a call. Until limits are configured they admit all.

use std::time::Duration;

use super::caller::Caller;
use crate::identity::AuthorizedEntry;

/// A method that the limits tell apart. A closed set, since it labels metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// `/SpiffeWorkloadAPI/FetchX509SVID`
    FetchX509Svid,
    /// `/SpiffeWorkloadAPI/FetchX509Bundles`
    FetchX509Bundles,
    /// `/SpiffeWorkloadAPI/FetchJWTSVID`
    FetchJwtSvid,
    /// `/SpiffeWorkloadAPI/FetchJWTBundles`
    FetchJwtBundles,
    /// `/SpiffeWorkloadAPI/ValidateJWTSVID`
    ValidateJwtSvid,
    /// `/SpiffeWorkloadAPI/FetchWITSVID`
    FetchWitSvid,
    /// `/SpiffeWorkloadAPI/FetchWITBundles`
    FetchWitBundles,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 7] = [
        Self::FetchX509Svid,
        Self::FetchX509Bundles,
        Self::FetchJwtSvid,
        Self::FetchJwtBundles,
        Self::ValidateJwtSvid,
        Self::FetchWitSvid,
        Self::FetchWitBundles,
    ];

    /// The name of the RPC: `FetchX509SVID`. Also the metric label.
    pub fn rpc(self) -> &'static str {
        match self {
            Self::FetchX509Svid => "FetchX509SVID",
            Self::FetchX509Bundles => "FetchX509Bundles",
            Self::FetchJwtSvid => "FetchJWTSVID",
            Self::FetchJwtBundles => "FetchJWTBundles",
            Self::ValidateJwtSvid => "ValidateJWTSVID",
            Self::FetchWitSvid => "FetchWITSVID",
            Self::FetchWitBundles => "FetchWITBundles",
        }
    }
}

/// Proof that a peer's call passed the caller stage: attestation takes nothing else. Made only here.
#[derive(Debug)]
pub struct Admitted<P> {
    peer: P,
}

impl<P> Admitted<P> {
    /// The peer that was admitted.
    pub fn peer(&self) -> &P {
        &self.peer
    }
}

/// A call that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rate limit exceeded for /SpiffeWorkloadAPI/{}", method.rpc())]
pub struct Refusal {
    /// What was called.
    pub method: Method,
    /// When a call would pass.
    pub retry_after: Duration,
}

/// What the limits decide with.
#[derive(Debug, Default)]
pub struct Limits {}

impl Limits {
    /// Charges a call to its caller, before any attestation.
    ///
    /// # Errors
    /// [`Refusal`] when the caller has no tokens left.
    pub fn admit_caller<P: Caller>(&self, peer: P, _method: Method) -> Result<Admitted<P>, Refusal> {
        Ok(Admitted { peer })
    }

    /// Charges a call to the identities it is answered with: all of them, or none.
    ///
    /// # Errors
    /// [`Refusal`] when one of them has no tokens left.
    pub fn admit_identities(&self, _entries: &[AuthorizedEntry], _method: Method) -> Result<(), Refusal> {
        Ok(())
    }
}

impl Refusal {
    /// What the caller is told.
    pub fn code(&self) -> tonic::Code {
        tonic::Code::ResourceExhausted
    }
}
