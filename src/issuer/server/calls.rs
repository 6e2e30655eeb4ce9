//! What a SPIRE Server is asked with the agent's own SVID, and how that fails.

use std::fmt;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tonic::Code;

use super::{
    bundles::{BundleFault, ToldBundle},
    entries::{EntryFault, KnownEntries, SyncedEntries},
    error::ServerError,
    proto::{
        svid::{NewX509svidParams, batch_new_x509svid_response},
        types::Jwtsvid,
    },
    upstream::Faulty,
};
use crate::identity::{Bundle, EntryId, Tainted, TrustDomain};

/// The calls. Each ends at its deadline.
pub(super) trait Calls: fmt::Debug + Send + Sync + 'static {
    /// The entries that this node is authorized for, of which these are known.
    fn entries(
        &self,
        known: KnownEntries,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<SyncedEntries, CallFault>>;

    /// The bundle of the own trust domain.
    fn bundle(&self, deadline: Instant) -> BoxFuture<'_, Result<ToldBundle, CallFault>>;

    /// The bundle of another one that it is federated with; `None` where the server has none.
    fn federated_bundle<'a>(
        &'a self,
        trust_domain: &'a TrustDomain,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Option<ToldBundle>, CallFault>>;

    /// Signs X.509-SVIDs: one result for each, in their order.
    fn sign_x509(
        &self,
        requests: Vec<NewX509svidParams>,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Vec<batch_new_x509svid_response::Result>, CallFault>>;

    /// Signs a JWT-SVID.
    fn sign_jwt<'a>(
        &'a self,
        entry: &'a EntryId,
        audience: &'a [String],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Jwtsvid, CallFault>>;

    /// How entries are asked for from now on.
    fn ask_for(&self, entries: AskFor);

    /// Tells what the server is known by from now on, and what signed nothing that should still be used: the agent's own
    /// SVID is renewed if it did. What cannot be kept on the disk is an error.
    fn trust<'a>(&'a self, bundle: &'a Bundle, tainted: &'a Tainted) -> BoxFuture<'a, Result<(), CallFault>>;
}

/// How entries are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AskFor {
    /// Those of another revision than is known (`SyncAuthorizedEntries`).
    Revisions,
    /// All of them (`GetAuthorizedEntries`), of a server that does not know the other.
    All,
}

/// Why a call brought nothing. Apart from [`ServerError`], of which copies stand in what people are shown: what is wrong with
/// an answer is known to the part that reads it, and keeps its type so that it can be told from a lost connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallFault {
    /// The server was not reached, or answers with an error.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The answer makes no sense: nothing of it is used.
    #[error("the server's answer is invalid")]
    Entries(#[from] EntryFault),
    /// The same, of a bundle.
    #[error("the server's answer is invalid")]
    Bundle(#[from] BundleFault),
    /// The same, of SVIDs.
    #[error("the server's answer is invalid: {0}")]
    Svid(&'static str),
}

impl CallFault {
    /// Whether the server was reached, and what it said is of no use: others of its answers may be.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Self::Server(ServerError::Answered { .. } | ServerError::Senseless { .. }) => !self.is_passing(),
            Self::Server(_) => false,
            Self::Entries(_) | Self::Bundle(_) | Self::Svid(_) => true,
        }
    }

    /// Whether the same call may pass a moment later. spire-agent tries again whatever the server says, for 30 seconds.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Server(ServerError::Answered { code, .. }) => {
                matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted)
            }
            Self::Server(error) => {
                matches!(error, ServerError::Lost(_) | ServerError::NotGrpc { .. })
            }
            Self::Entries(_) | Self::Bundle(_) | Self::Svid(_) => false,
        }
    }
}

impl Faulty for CallFault {
    fn code(&self) -> Code {
        match self {
            Self::Server(error) => error.code(),
            // What makes no sense was answered.
            Self::Entries(_) | Self::Bundle(_) | Self::Svid(_) => Code::Internal,
        }
    }
}
