//! What a SPIRE Server is asked with the agent's own SVID, and how that fails.

use std::{error::Error, fmt, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{
    bundles::{BundleFault, ToldBundle},
    entries::{EntryFault, KnownEntries, SyncedEntries},
    proto::{
        svid::{NewX509svidParams, batch_new_x509svid_response},
        types::Jwtsvid,
    },
};
use crate::identity::{Bundle, EntryId, TrustDomain};

/// The most that is kept of what a server says of an error, in letters.
const LONGEST_MESSAGE: usize = 256;

/// The calls. Each ends at its deadline.
pub(super) trait Calls: fmt::Debug + Send + Sync + 'static {
    /// The entries that this node is authorized for, of which these are known.
    fn entries(
        &self,
        known: KnownEntries,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<SyncedEntries, CallError>>;

    /// The bundle of the own trust domain.
    fn bundle(&self, deadline: Instant) -> BoxFuture<'_, Result<ToldBundle, CallError>>;

    /// The bundle of another one that it is federated with; `None` where the server has none.
    fn federated_bundle<'a>(
        &'a self,
        trust_domain: &'a TrustDomain,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Option<ToldBundle>, CallError>>;

    /// Signs X.509-SVIDs: one result for each, in their order.
    fn sign_x509(
        &self,
        requests: Vec<NewX509svidParams>,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Vec<batch_new_x509svid_response::Result>, CallError>>;

    /// Signs a JWT-SVID.
    fn sign_jwt<'a>(
        &'a self,
        entry: &'a EntryId,
        audience: &'a [String],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Jwtsvid, CallError>>;

    /// Tells the connection what verifies the server from now on.
    fn trust(&self, bundle: &Arc<Bundle>);
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// There is no connection to the server, or this agent has no SVID to show it.
    #[error("the server is not reached")]
    NotReached(#[source] Box<dyn Error + Send + Sync>),
    /// The server answered with an error.
    #[error("the server answers {}: {message}", code_name(*.code))]
    Answered { code: Code, message: String },
    /// There was no answer in time.
    #[error("the server did not answer in time")]
    Late,
    /// The answer makes no sense: nothing of it is used.
    #[error("the server's answer makes no sense")]
    Entries(#[from] EntryFault),
    /// The same, of a bundle.
    #[error("the server's answer makes no sense")]
    Bundle(#[from] BundleFault),
    /// The same, of SVIDs.
    #[error("the server's answer makes no sense: {0}")]
    Svid(&'static str),
}

impl CallError {
    /// What a call was answered with.
    pub(super) fn of(status: &Status) -> Self {
        let printable = status.message().chars().filter(|letter| !letter.is_control());
        let message = printable.take(LONGEST_MESSAGE).collect();
        Self::Answered { code: status.code(), message }
    }

    /// Whether the same call may pass a moment later. spire-agent tries again whatever the server says, for 30 seconds.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Answered { code, .. } => {
                matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted)
            }
            Self::NotReached(_) | Self::Late | Self::Entries(_) | Self::Bundle(_) | Self::Svid(_) => false,
        }
    }

    /// Whether the server has no such entry (any more).
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Answered { code: Code::NotFound | Code::PermissionDenied, .. })
    }
}

fn code_name(code: Code) -> String {
    format!("{code:?}")
}
