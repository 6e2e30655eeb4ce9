//! The SPIFFE Workload API. Each function is the way of one call.
//!
//! The order is fixed by types: attestation takes an [`Admitted`] peer, and SVIDs are made for an
//! [`AuthorizedEntry`]. An answer is whole or it is an error: never a part of the caller's identities, since leaving
//! out the first would make another one its default.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::time::Instant;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use super::{
    claims::claims_to_struct,
    encoded::Encoded,
    metrics::ApiMetrics,
    proto::{workload as pb, workload_server::spiffe_workload_api_server::SpiffeWorkloadApi},
    status::RequestError,
    updates::{State, Updates, updates},
};
use crate::{
    attest::{Attestor, Blame},
    identity::{
        AuthorizedEntry, Bundle, NoIdentity, Selector, Selectors, SpiffeId, TrustDomain, authorize, jwt,
    },
    limits::{Admitted, Limits, Method},
    os::clock::Clock,
    peer::Peer,
    store::{
        JwtCache, Snapshot, Store, X509Cache,
        jwt_cache::Fetched,
        snapshot::AnswerKey,
        x509_cache::{Hold, Served},
    },
    telemetry::chain,
    telemetry::registry::Open,
};

/// The Workload API. Cheap to clone.
#[derive(Clone)]
pub struct WorkloadApi {
    parts: Arc<Parts>,
}

/// What a call passes on its way.
pub struct Parts {
    /// Stages 2 and 6.
    pub limits: Limits,
    /// Stage 4.
    pub attestor: Arc<Attestor>,
    /// Stage 5.
    pub store: Arc<Store>,
    /// Stage 7 of FetchX509SVID.
    pub x509: Arc<X509Cache>,
    /// Stage 7 of FetchJWTSVID.
    pub jwt: Arc<JwtCache>,
    /// Counts calls.
    pub metrics: Arc<ApiMetrics>,
    /// Against which tokens are validated.
    pub clock: Clock,
}

impl WorkloadApi {
    /// Answers with these parts.
    pub fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    async fn jwt_svids(
        &self,
        request: Request<pb::JwtsvidRequest>,
    ) -> Result<pb::JwtsvidResponse, RequestError> {
        let Parts { limits, attestor, store, jwt, .. } = &*self.parts;
        let peer = caller(&request)?;
        let mut admitted = limits.admit_caller(peer, Method::FetchJwtSvid)?;
        let query = JwtQuery::try_from(request.into_inner())?;
        let selectors = attested(attestor, &mut admitted).await?;
        let snapshot = store.snapshot();
        let entries = identities(&snapshot, &selectors, query.spiffe_id.as_ref())
            .inspect_err(|NoIdentity| admitted.attestation_failed())?;
        limits.admit_identities(&mut admitted, &entries)?;

        let mut svids = Vec::with_capacity(entries.len());
        for entry in &entries {
            let Fetched { svid, signed } =
                jwt.fetch(entry, &query.audience).await.map_err(RequestError::JwtSvid)?;
            if signed {
                admitted.signed(entry.spiffe_id());
            }
            svids.push(pb::Jwtsvid {
                spiffe_id: svid.spiffe_id.as_str().to_owned(),
                svid: svid.token.as_str().to_owned(),
                hint: entry.entry().hint.to_string(),
            });
        }
        Ok(pb::JwtsvidResponse { svids })
    }

    async fn validate(
        &self,
        request: Request<pb::ValidateJwtsvidRequest>,
    ) -> Result<pb::ValidateJwtsvidResponse, RequestError> {
        let Parts { limits, attestor, store, clock, .. } = &*self.parts;
        let peer = caller(&request)?;
        let mut admitted = limits.admit_caller(peer, Method::ValidateJwtSvid)?;
        let pb::ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        if audience.is_empty() {
            return Err(RequestError::NoAudience);
        }
        if svid.is_empty() {
            return Err(RequestError::NoSvid);
        }
        let selectors = attested(attestor, &mut admitted).await?;

        // The own bundle for everybody; foreign ones for whom they are federated with, from the entries that match
        // (spire-agent takes those whose SVID happens to be cached).
        let snapshot = store.snapshot();
        let entries = authorize(&snapshot.index, &selectors, None).unwrap_or_default();
        let federated = federated(&entries);
        let bundle_of = |td: &TrustDomain| -> Option<&Bundle> {
            let known = *td == snapshot.bundles.own.trust_domain || federated.contains(td);
            if known { snapshot.bundles.of(td).map(Arc::as_ref) } else { None }
        };
        let mut valid = jwt::validate(&svid, &audience, bundle_of, clock.now())?;
        if !valid.spiffe_id.is_member_of(&snapshot.bundles.own.trust_domain) {
            jwt::restrict_foreign(&mut valid.claims, &snapshot.policy.allowed_foreign_jwt_claims);
        }
        Ok(pb::ValidateJwtsvidResponse {
            spiffe_id: valid.spiffe_id.as_str().to_owned(),
            claims: Some(claims_to_struct(valid.claims)),
        })
    }

    async fn x509_svids(&self, request: &Request<pb::X509svidRequest>) -> Result<Updates, RequestError> {
        let Parts { limits, attestor, store, x509, metrics, .. } = &*self.parts;
        let peer = caller(request)?;
        let mut admitted = limits.admit_caller(peer, Method::FetchX509Svid)?;
        let selectors = attested(attestor, &mut admitted).await?;
        let changes = store.subscribe();
        let entries = identities(&store.snapshot(), &selectors, None)
            .inspect_err(|NoIdentity| admitted.attestation_failed())?;
        limits.admit_identities(&mut admitted, &entries)?;

        let mut state = X509Svids {
            parts: Arc::clone(&self.parts),
            peer: Arc::clone(admitted.peer()),
            selectors,
            hold: x509.hold(&entries),
            signed: Vec::new(),
            open: Ended::new(metrics, Method::FetchX509Svid),
        };
        let first = state.now().await?;
        for id in state.signed.drain(..) {
            admitted.signed(&id);
        }
        Ok(updates(state, changes, first))
    }

    async fn bundles(&self, request: BundleRequest<'_>) -> Result<Updates, RequestError> {
        let Parts { limits, attestor, store, metrics, .. } = &*self.parts;
        let method = request.method;
        let peer = caller_of(request.metadata, request.extensions)?;
        let mut admitted = limits.admit_caller(peer, method)?;
        let selectors = attested(attestor, &mut admitted).await?;
        let changes = store.subscribe();
        let snapshot = store.snapshot();
        match authorize(&snapshot.index, &selectors, None) {
            Ok(entries) => limits.admit_identities(&mut admitted, &entries)?,
            Err(NoIdentity) if snapshot.policy.allow_unauthenticated_verifiers => {
                limits.admit_identities(&mut admitted, &[])?;
            }
            Err(NoIdentity) => admitted.attestation_failed(),
        }

        let parts = Arc::clone(&self.parts);
        let peer = Arc::clone(admitted.peer());
        let mut state = BundlesOf { parts, peer, selectors, method, open: Ended::new(metrics, method) };
        let first = state.now().await?;
        Ok(updates(state, changes, first))
    }

    /// Counts a call that is answered as a whole.
    fn unary<T>(
        &self,
        method: Method,
        started: Instant,
        done: Result<T, RequestError>,
    ) -> Result<Response<T>, Status> {
        let metrics = &self.parts.metrics;
        metrics.call_answered(method, started.elapsed());
        metrics.call_ended(method, done.as_ref().err().map_or(Code::Ok, RequestError::code));
        done.map(Response::new).map_err(|error| self.refused(method, error))
    }

    /// Counts the opening of a stream; its end is counted by [`Ended`].
    fn stream(
        &self,
        method: Method,
        started: Instant,
        done: Result<Updates, RequestError>,
    ) -> Result<Response<Updates>, Status> {
        let metrics = &self.parts.metrics;
        metrics.call_answered(method, started.elapsed());
        if let Err(error) = &done {
            metrics.call_ended(method, error.code());
        }
        done.map(Response::new).map_err(|error| self.refused(method, error))
    }

    /// Our faults are logged with their cause. What the caller did wrong is counted, and seen at debug only.
    #[expect(clippy::unused_self, reason = "reads as a step of the call")]
    fn refused(&self, method: Method, error: RequestError) -> Status {
        match &error {
            RequestError::Attestation(cause) if cause.blame() == Blame::Fault => {
                tracing::warn!(method = method.rpc(), error = chain(cause), "workload attestation failed");
            }
            RequestError::JwtSvid(cause) | RequestError::X509Svid(cause) => {
                tracing::warn!(method = method.rpc(), error = chain(cause), "could not make an SVID");
            }
            RequestError::NoPeer => tracing::error!(method = method.rpc(), "a call came without its peer"),
            other => tracing::debug!(method = method.rpc(), reason = %other, "refused"),
        }
        error.into()
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Updates;
    type FetchX509BundlesStream = Updates;
    type FetchJWTBundlesStream = Updates;
    type FetchWITSVIDStream = tokio_stream::Empty<Result<pb::WitsvidResponse, Status>>;
    type FetchWITBundlesStream = tokio_stream::Empty<Result<pb::WitBundlesResponse, Status>>;

    async fn fetch_x509svid(
        &self,
        request: Request<pb::X509svidRequest>,
    ) -> Result<Response<Updates>, Status> {
        let started = Instant::now();
        let done = self.x509_svids(&request).await;
        self.stream(Method::FetchX509Svid, started, done)
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<pb::X509BundlesRequest>,
    ) -> Result<Response<Updates>, Status> {
        let started = Instant::now();
        let done = self.bundles(BundleRequest::new(&request, Method::FetchX509Bundles)).await;
        self.stream(Method::FetchX509Bundles, started, done)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<pb::JwtsvidRequest>,
    ) -> Result<Response<pb::JwtsvidResponse>, Status> {
        let started = Instant::now();
        let done = self.jwt_svids(request).await;
        self.unary(Method::FetchJwtSvid, started, done)
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<pb::JwtBundlesRequest>,
    ) -> Result<Response<Updates>, Status> {
        let started = Instant::now();
        let done = self.bundles(BundleRequest::new(&request, Method::FetchJwtBundles)).await;
        self.stream(Method::FetchJwtBundles, started, done)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<pb::ValidateJwtsvidRequest>,
    ) -> Result<Response<pb::ValidateJwtsvidResponse>, Status> {
        let started = Instant::now();
        let done = self.validate(request).await;
        self.unary(Method::ValidateJwtSvid, started, done)
    }

    async fn fetch_witsvid(
        &self,
        request: Request<pb::WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        let done = caller(&request)
            .and_then(|peer| Ok(self.parts.limits.admit_caller(peer, Method::FetchWitSvid)?))
            .and(Err(RequestError::NoWitSvids));
        self.unary(Method::FetchWitSvid, Instant::now(), done)
    }

    async fn fetch_wit_bundles(
        &self,
        request: Request<pb::WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        let done = caller(&request)
            .and_then(|peer| Ok(self.parts.limits.admit_caller(peer, Method::FetchWitBundles)?))
            .and(Err(RequestError::NoWitBundles));
        self.unary(Method::FetchWitBundles, Instant::now(), done)
    }
}

/// Who calls, once the request has shown that it means to: the header keeps a browser or a proxy that was tricked
/// into calling from being answered (SPIFFE Workload Endpoint, section 6).
fn caller<T>(request: &Request<T>) -> Result<Arc<Peer>, RequestError> {
    caller_of(request.metadata(), request.extensions())
}

fn caller_of(metadata: &MetadataMap, extensions: &tonic::Extensions) -> Result<Arc<Peer>, RequestError> {
    let mut values = metadata.get_all("workload.spiffe.io").iter();
    match (values.next(), values.next()) {
        (Some(value), None) if value == "true" => {}
        _ => return Err(RequestError::NoSecurityHeader),
    }
    extensions.get::<Arc<Peer>>().map(Arc::clone).ok_or(RequestError::NoPeer)
}

/// Attests an admitted peer; a failure that is the peer's own doing costs it more.
async fn attested(
    attestor: &Attestor,
    admitted: &mut Admitted<Arc<Peer>>,
) -> Result<Arc<Selectors>, RequestError> {
    attestor.attest(admitted).await.map_err(|error| {
        if error.blame() == Blame::Refusal && !error.is_crowded() {
            admitted.attestation_failed();
        }
        error.into()
    })
}

fn identities(
    snapshot: &Snapshot,
    selectors: &Selectors,
    wanted: Option<&SpiffeId>,
) -> Result<Vec<AuthorizedEntry>, NoIdentity> {
    authorize(&snapshot.index, selectors, wanted).inspect_err(|NoIdentity| {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        // Selectors tell much about a workload: those only that the admin chose, and at debug only.
        let may_be_shown = |selector: &&Selector| {
            snapshot.policy.log_selectors.iter().any(|prefix| selector.to_string().starts_with(prefix))
        };
        let shown: Vec<&Selector> = selectors.iter().filter(may_be_shown).collect();
        tracing::debug!(selectors = ?shown, "no identity issued");
    })
}

/// The foreign trust domains whose bundles callers of these entries receive.
fn federated(entries: &[AuthorizedEntry]) -> BTreeSet<&TrustDomain> {
    entries.iter().flat_map(|entry| &entry.entry().federates_with).collect()
}

/// What FetchJWTSVID asks.
struct JwtQuery {
    audience: Vec<String>,
    spiffe_id: Option<SpiffeId>,
}

impl TryFrom<pb::JwtsvidRequest> for JwtQuery {
    type Error = RequestError;

    fn try_from(request: pb::JwtsvidRequest) -> Result<Self, RequestError> {
        let pb::JwtsvidRequest { audience, spiffe_id } = request;
        // spire-agent lets `[""]` pass, and its server refuses it after 30 seconds of trying.
        if audience.iter().all(String::is_empty) {
            return Err(RequestError::NoAudience);
        }
        let spiffe_id = match spiffe_id.as_str() {
            "" => None,
            text => Some(SpiffeId::parse(text).map_err(RequestError::BadSpiffeId)?),
        };
        Ok(Self { audience, spiffe_id })
    }
}

/// What the two bundle calls have in common.
struct BundleRequest<'a> {
    metadata: &'a MetadataMap,
    extensions: &'a tonic::Extensions,
    method: Method,
}

impl<'a> BundleRequest<'a> {
    fn new<T>(request: &'a Request<T>, method: Method) -> Self {
        Self { metadata: request.metadata(), extensions: request.extensions(), method }
    }
}

/// Counts an open stream, and how it ended.
struct Ended {
    metrics: Arc<ApiMetrics>,
    method: Method,
    _open: Open,
}

impl Ended {
    fn new(metrics: &Arc<ApiMetrics>, method: Method) -> Self {
        Self { metrics: Arc::clone(metrics), method, _open: metrics.stream_opened(method) }
    }

    fn with(&self, code: Code) {
        self.metrics.call_ended(self.method, code);
    }
}

/// An open FetchX509SVID.
struct X509Svids {
    parts: Arc<Parts>,
    peer: Arc<Peer>,
    selectors: Arc<Selectors>,
    /// Keeps the SVIDs it sent renewed.
    hold: Hold,
    /// For whom the last message took a new SVID.
    signed: Vec<SpiffeId>,
    open: Ended,
}

impl State for X509Svids {
    fn is_orphaned(&self) -> bool {
        self.peer.process().has_exited()
    }

    async fn now(&mut self) -> Result<Encoded, RequestError> {
        let snapshot = self.parts.store.snapshot();
        let entries = identities(&snapshot, &self.selectors, None)?;
        if !self.hold.is_of(&entries) {
            self.hold = self.parts.x509.hold(&entries);
        }
        let key = AnswerKey::X509Svids(entries.iter().map(|entry| entry.entry().id.clone()).collect());
        let now = self.parts.clock.now();
        if let Some(answer) = snapshot.answers.find(&key, now) {
            return Ok(answer.into());
        }
        self.signed.clear();
        let mut svids = Vec::with_capacity(entries.len());
        for entry in &entries {
            let served = self.parts.x509.fetch(entry).await.map_err(RequestError::X509Svid)?;
            if served.signed {
                self.signed.push(entry.spiffe_id().clone());
            }
            svids.push(served);
        }
        let fresh = svids.iter().map(Served::fresh).reduce(|a, b| a.start.max(b.start)..a.end.min(b.end));
        let answer = x509_answer(&snapshot, &entries, &svids).into_bytes();
        Ok(snapshot.answers.keep(key, answer, fresh, now).into())
    }

    fn ended(&mut self, code: Code) {
        self.open.with(code);
    }
}

fn x509_answer(snapshot: &Snapshot, entries: &[AuthorizedEntry], svids: &[Served]) -> Encoded {
    let own = snapshot.bundles.own.x509_der();
    let mut message = pb::X509svidResponse {
        svids: entries
            .iter()
            .zip(svids)
            .map(|(entry, Served { svid, .. })| pb::X509svid {
                spiffe_id: svid.spiffe_id.as_str().to_owned(),
                x509_svid: svid.chain.concat(),
                x509_svid_key: svid.key.to_vec(),
                bundle: own.clone(),
                hint: entry.entry().hint.to_string(),
            })
            .collect(),
        crl: Vec::new(),
        federated_bundles: federated(entries)
            .into_iter()
            .filter_map(|td| Some((td.id_string(), snapshot.bundles.federated.get(td)?.x509_der())))
            .collect(),
    };
    let answer = Encoded::new(&message);
    for svid in &mut message.svids {
        zeroize::Zeroize::zeroize(&mut svid.x509_svid_key);
    }
    answer
}

/// An open FetchX509Bundles or FetchJWTBundles.
struct BundlesOf {
    parts: Arc<Parts>,
    peer: Arc<Peer>,
    selectors: Arc<Selectors>,
    method: Method,
    open: Ended,
}

impl State for BundlesOf {
    fn is_orphaned(&self) -> bool {
        self.peer.process().has_exited()
    }

    async fn now(&mut self) -> Result<Encoded, RequestError> {
        let snapshot = self.parts.store.snapshot();
        let entries = match identities(&snapshot, &self.selectors, None) {
            Err(NoIdentity) if snapshot.policy.allow_unauthenticated_verifiers => Vec::new(),
            entries => entries?,
        };
        let federated: Vec<TrustDomain> = federated(&entries).into_iter().cloned().collect();
        let key = match self.method {
            Method::FetchJwtBundles => AnswerKey::JwtBundles(federated),
            _ => AnswerKey::X509Bundles(federated),
        };
        let now = self.parts.clock.now();
        if let Some(answer) = snapshot.answers.find(&key, now) {
            return Ok(answer.into());
        }
        let answer = bundle_answer(&snapshot, &key).into_bytes();
        Ok(snapshot.answers.keep(key, answer, None, now).into())
    }

    fn ended(&mut self, code: Code) {
        self.open.with(code);
    }
}

fn bundle_answer(snapshot: &Snapshot, key: &AnswerKey) -> Encoded {
    let (AnswerKey::X509Bundles(federated) | AnswerKey::JwtBundles(federated)) = key else {
        return Encoded::default();
    };
    let known = federated.iter().filter_map(|td| snapshot.bundles.federated.get(td));
    let bundles = std::iter::once(&snapshot.bundles.own).chain(known);
    let by_id = |content: fn(&Bundle) -> Vec<u8>| -> BTreeMap<String, Vec<u8>> {
        bundles.map(|bundle| (bundle.trust_domain.id_string(), content(bundle))).collect()
    };
    if matches!(key, AnswerKey::JwtBundles(_)) {
        Encoded::new(&pb::JwtBundlesResponse { bundles: by_id(|bundle| bundle.jwks().into_bytes()) })
    } else {
        Encoded::new(&pb::X509BundlesResponse { crl: Vec::new(), bundles: by_id(Bundle::x509_der) })
    }
}
