//! The calls to a SPIRE Server over the connection that shows the agent's SVID.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures_util::{FutureExt as _, future::BoxFuture, stream};
use prost::Message as _;
use tokio::time::Instant;
use tonic::Code;

use super::{
    bundles::{self, BUNDLE_MASK, ToldBundle},
    calls::{AskFor, CallFault, Calls},
    entries::{ENTRY_MASK, EntryFault, EntrySync, KnownEntries, NextStep, SyncedEntries},
    error::ServerError,
    metrics::ServerCall,
    own_svid::OwnSvid,
    proto::{
        bundle::{GetBundleRequest, GetFederatedBundleRequest, bundle_client::BundleClient},
        entry::{GetAuthorizedEntriesRequest, SyncAuthorizedEntriesRequest, entry_client::EntryClient},
        svid::{
            BatchNewX509svidRequest, NewJwtsvidRequest, NewX509svidParams, batch_new_x509svid_response,
            svid_client::SvidClient,
        },
        types::{self, Jwtsvid},
    },
    upstream::ServerConnection,
};
use crate::{
    identity::{Bundle, EntryId, Tainted, TrustDomain},
    telemetry::registry::Label as _,
};

/// The longest answer, in bytes: 500 entries or SVIDs, of 8 KiB each.
const LONGEST_ANSWER: usize = 4 << 20;
/// The same, where all entries come in one.
const LONGEST_LIST: usize = 256 << 20;

/// A bundle of at most so many bytes is read at once.
const SMALL_BUNDLE: usize = 32 << 10;

/// The server that knows this agent by its own SVID.
#[derive(Debug)]
pub(super) struct RemoteServer {
    own: Arc<OwnSvid>,
    trust_domain: TrustDomain,
    /// Whether entries are asked for by their revisions.
    by_revision: AtomicBool,
}

impl RemoteServer {
    pub(super) fn new(own: Arc<OwnSvid>, trust_domain: TrustDomain) -> Self {
        Self { own, trust_domain, by_revision: AtomicBool::new(true) }
    }

    async fn by_revision(
        &self,
        known: &KnownEntries,
        connection: ServerConnection,
    ) -> Result<SyncedEntries, CallFault> {
        const CALL: ServerCall = ServerCall::SyncAuthorizedEntries;
        let sync = async {
            let mut client = EntryClient::new(connection.clone()).max_decoding_message_size(LONGEST_ANSWER);
            // There is one request under way at most.
            let (requests, asked) = tokio::sync::mpsc::channel::<SyncAuthorizedEntriesRequest>(1);
            let asked = stream::unfold(asked, |mut asked| async {
                let request = asked.recv().await?;
                Some((request, asked))
            });
            // It cannot be full, and is only closed when the connection is.
            drop(requests.try_send(EntrySync::first()));
            let answers = client.sync_authorized_entries(asked).await;
            let mut answers = answers.map_err(|status| ServerError::of(CALL.text(), &status))?.into_inner();
            let mut sync = EntrySync::new(self.trust_domain.clone(), known.clone());
            loop {
                let answer =
                    answers.message().await.map_err(|status| ServerError::of(CALL.text(), &status))?;
                let answer = answer.ok_or(EntryFault::EndedEarly)?;
                match sync.answer(answer)? {
                    NextStep::Read => {}
                    NextStep::Ask(request) => drop(requests.send(request).await),
                    NextStep::Done => break,
                }
            }
            apart(move || sync.finish()).await
        };
        connection.result(CALL, sync).await
    }

    async fn all_at_once(
        &self,
        known: &KnownEntries,
        connection: ServerConnection,
    ) -> Result<SyncedEntries, CallFault> {
        let mut client = EntryClient::new(connection.clone()).max_decoding_message_size(LONGEST_LIST);
        let request = GetAuthorizedEntriesRequest { output_mask: Some(ENTRY_MASK) };
        let answer = connection
            .answer(ServerCall::GetAuthorizedEntries, client.get_authorized_entries(request))
            .await?;
        let mut sync = EntrySync::new(self.trust_domain.clone(), known.clone());
        apart(move || {
            sync.whole(answer.into_inner().entries)?;
            sync.finish()
        })
        .await
    }
}

/// What takes a while, where there are many entries or authorities, in a thread that serves nobody meanwhile.
async fn apart<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, CallFault>
where
    T: Send + 'static,
    E: Send + 'static,
    CallFault: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(_panicked) => Err(EntryFault::EndedEarly.into()),
    }
}

/// Reads a bundle, of which others than the server may have said how large it is.
async fn read_bundle(told: types::Bundle, trust_domain: &TrustDomain) -> Result<ToldBundle, CallFault> {
    if told.encoded_len() <= SMALL_BUNDLE {
        return Ok(bundles::read(told, trust_domain)?);
    }
    let trust_domain = trust_domain.clone();
    apart(move || bundles::read(told, &trust_domain)).await
}

/// Makes a call, and once more over the next connection where the one that it went over ended under it: a server that says
/// goodbye has not looked at what came last. Each of these may be made twice.
async fn once_more<T, F>(call: impl Fn() -> F + Send) -> Result<T, CallFault>
where
    F: Future<Output = Result<T, CallFault>> + Send,
{
    match call().await {
        Err(CallFault::Server(ServerError::Lost(_))) => call().await,
        done => done,
    }
}

impl Calls for RemoteServer {
    fn entries(
        &self,
        known: KnownEntries,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<SyncedEntries, CallFault>> {
        once_more(move || {
            let known = known.clone();
            async move {
                let connection = self.own.upstream().agent(deadline).await?;
                if self.by_revision.load(Ordering::Relaxed) {
                    self.by_revision(&known, connection).await
                } else {
                    self.all_at_once(&known, connection).await
                }
            }
        })
        .boxed()
    }

    fn bundle(&self, deadline: Instant) -> BoxFuture<'_, Result<ToldBundle, CallFault>> {
        once_more(move || async move {
            let connection = self.own.upstream().agent(deadline).await?;
            let mut client = BundleClient::new(connection.clone()).max_decoding_message_size(LONGEST_ANSWER);
            let request = GetBundleRequest { output_mask: Some(BUNDLE_MASK) };
            let told = connection.answer(ServerCall::GetBundle, client.get_bundle(request)).await?;
            read_bundle(told.into_inner(), &self.trust_domain).await
        })
        .boxed()
    }

    fn federated_bundle<'a>(
        &'a self,
        trust_domain: &'a TrustDomain,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Option<ToldBundle>, CallFault>> {
        once_more(move || async move {
            let connection = self.own.upstream().agent(deadline).await?;
            let mut client = BundleClient::new(connection.clone()).max_decoding_message_size(LONGEST_ANSWER);
            let request = GetFederatedBundleRequest {
                trust_domain: trust_domain.name().to_owned(),
                output_mask: Some(BUNDLE_MASK),
            };
            match connection
                .answer(ServerCall::GetFederatedBundle, client.get_federated_bundle(request))
                .await
            {
                Ok(told) => Ok(Some(read_bundle(told.into_inner(), trust_domain).await?)),
                Err(ServerError::Answered { code: Code::NotFound, .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .boxed()
    }

    fn sign_x509(
        &self,
        params: Vec<NewX509svidParams>,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Vec<batch_new_x509svid_response::Result>, CallFault>> {
        once_more(move || {
            let params = params.clone();
            async move {
                let connection = self.own.upstream().agent(deadline).await?;
                let mut client =
                    SvidClient::new(connection.clone()).max_decoding_message_size(LONGEST_ANSWER);
                let request = BatchNewX509svidRequest { params };
                let signed = connection
                    .answer(ServerCall::BatchNewX509Svid, client.batch_new_x509svid(request))
                    .await?;
                Ok(signed.into_inner().results)
            }
        })
        .boxed()
    }

    fn sign_jwt<'a>(
        &'a self,
        entry: &'a EntryId,
        audience: &'a [String],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Jwtsvid, CallFault>> {
        once_more(move || async move {
            let connection = self.own.upstream().agent(deadline).await?;
            let mut client = SvidClient::new(connection.clone()).max_decoding_message_size(LONGEST_ANSWER);
            // A server refuses an empty one.
            let audience = audience.iter().filter(|text| !text.is_empty()).cloned().collect();
            let request = NewJwtsvidRequest { entry_id: entry.to_string(), audience };
            let signed = connection.answer(ServerCall::NewJwtSvid, client.new_jwtsvid(request)).await?;
            signed.into_inner().svid.ok_or(CallFault::Svid("there is no jwt-svid in it"))
        })
        .boxed()
    }

    fn ask_for(&self, entries: AskFor) {
        self.by_revision.store(entries == AskFor::Revisions, Ordering::Relaxed);
    }

    fn trust<'a>(&'a self, bundle: &'a Bundle, tainted: &'a Tainted) -> BoxFuture<'a, Result<(), CallFault>> {
        async move {
            self.own.distrust(tainted);
            Ok(self.own.learn(bundle).await?)
        }
        .boxed()
    }
}
