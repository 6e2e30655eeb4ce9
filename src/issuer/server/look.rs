//! A look at the server for an agent that has no place yet: another one has `data_dir`, and renews the agent's SVID. That SVID
//! is shown here as it lies on the disk; nothing is written, attested or renewed.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    asked_for,
    calls::{CallFault, Calls as _},
    entries::KnownEntries,
    error::{DataFault, ServerError},
    metrics::ServerMetrics,
    own_svid::OwnSvid,
    remote::RemoteServer,
    settings::ServerSettings,
};
use crate::{identity::EntryIndex, os::clock::Clock, telemetry::metrics::Metrics};

/// Why it is not known what the server has for this node.
#[derive(Debug, thiserror::Error)]
pub enum LookFault {
    /// What is on the disk of it.
    #[error(transparent)]
    Data(#[from] DataFault),
    /// The server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Its answer.
    #[error("the server's answer is of no use: {0}")]
    Answer(String),
}

/// The entries that the server has for this node. Where the agent has no SVID on the disk, or another server is to be trusted at
/// first, there are none, and it is only looked whether the server is there.
///
/// # Errors
/// [`LookFault`].
pub async fn look_without_place(
    settings: ServerSettings,
    clock: Clock,
    deadline: Instant,
) -> Result<Arc<EntryIndex>, LookFault> {
    let (trust_domain, asked_for) = (settings.trust_domain.clone(), asked_for(&settings));
    // Nobody scrapes it.
    let metrics = Arc::new(ServerMetrics::new(Metrics::default().registry()));
    let looked = tokio::task::spawn_blocking(move || OwnSvid::look_at(settings, clock, metrics)).await;
    let Some(own) = looked.map_err(|_panicked| ServerError::Late)?? else { return Ok(Arc::default()) };
    if !own.shows_what_is_kept() {
        let trust = own.upstream().trusted();
        if own.last_known().is_some() {
            own.upstream().stranger(trust, own.upstream().counts(), deadline).await?;
        }
        return Ok(Arc::default());
    }
    let server = RemoteServer::new(own, trust_domain);
    server.ask_for(asked_for);
    let both = async {
        tokio::try_join!(server.entries(KnownEntries::default(), deadline), server.bundle(deadline))
    };
    match both.await {
        Ok((entries, _bundle)) => Ok(entries.known.index),
        Err(CallFault::Server(error)) => Err(error.into()),
        Err(fault) => Err(LookFault::Answer(crate::telemetry::chain(&fault))),
    }
}
