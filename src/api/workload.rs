//! The SPIFFE Workload API. Each function is the way of one call.
//!
//! The order is fixed by types ([`call`](super::call)). An answer is whole or it is an error: never a part of the
//! caller's identities, since leaving out the first would make another one its default.

use std::{sync::Arc, time::SystemTime};

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{
    answers::{bundles, federated, x509_svids},
    call::{Call, Opening},
    claims::claims_to_struct,
    encoded::Encoded,
    journal::{Begun, Journal},
    making::{SMALL, bundles_len, jwt_svids_len, room_for, x509_svids_len},
    proto::{workload as pb, workload_server::spiffe_workload_api_server::SpiffeWorkloadApi},
    status::RequestError,
    updates::{Update, UpdateQueue, Updates, updates},
};
use crate::{
    attest::Attestor,
    identity::{
        Bundle, SpiffeId, TrustDomain,
        audience::{self, AudienceError},
        jwt,
    },
    issuer::Issuer,
    limits::{Limits, Method},
    os::clock::Clock,
    store::{
        Change, Charged, Entitled, JwtCache, Purpose, Snapshot, Store, Unentitled, X509Cache,
        audited::AuditedProcess,
        authorize,
        snapshot::{AnswerKey, BundleForm},
        x509_cache::{Hold, Served},
    },
};

/// The Workload API. Cheap to clone.
#[derive(Clone)]
pub struct WorkloadApi {
    parts: Arc<Parts>,
    queue: Arc<UpdateQueue>,
}

/// What a call passes on its way.
pub struct Parts {
    /// Stages 2 and 6.
    pub limits: Limits,
    /// Stage 4.
    pub attestor: Arc<Attestor>,
    /// Stage 5.
    pub store: Arc<Store>,
    /// Stage 5, for whom no entry matches: there may be one by now.
    pub issuer: Arc<dyn Issuer>,
    /// Stage 7 of FetchX509SVID.
    pub x509: Arc<X509Cache>,
    /// Stage 7 of FetchJWTSVID.
    pub jwt: Arc<JwtCache>,
    /// Counts calls, and logs what fails.
    pub journal: Arc<Journal>,
    /// Against which tokens are validated.
    pub clock: Clock,
}

impl WorkloadApi {
    /// Answers with these parts.
    pub fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts), queue: Arc::default() }
    }

    async fn jwt_svids(
        &self,
        call: Result<Call, RequestError>,
        request: pb::JwtsvidRequest,
    ) -> Result<pb::JwtsvidResponse, RequestError> {
        let Parts { limits, attestor, store, jwt, .. } = &*self.parts;
        let call = call?;
        let _kept = call.keep(&request);
        let admitted = call.admit(limits).await?;
        let query = JwtQuery::try_from(request)?;
        let snapshot = store.snapshot();
        let attested = attestor.attest(admitted, &snapshot.questions).await?;
        let entitled = authorize(&snapshot, attested, Purpose::Svids, query.spiffe_id.as_ref());
        let entitled = self.or_wait(entitled).await?;
        let mut charged = entitled.charge(limits).await?;

        let answer = jwt_svids_len(charged.entries(), &query.audience);
        let _room = room_for(answer, charged.peer().connected()).await?;
        let svids = jwt.fetch(&mut charged, &query.audience).await.map_err(RequestError::JwtSvid)?;
        let svids = charged.entries().iter().zip(svids).map(|(entry, svid)| pb::Jwtsvid {
            spiffe_id: svid.spiffe_id.as_str().to_owned(),
            svid: svid.token.as_str().to_owned(),
            hint: entry.hint.to_string(),
        });
        Ok(pb::JwtsvidResponse { svids: svids.collect() })
    }

    async fn validate(
        &self,
        call: Result<Call, RequestError>,
        request: pb::ValidateJwtsvidRequest,
    ) -> Result<pb::ValidateJwtsvidResponse, RequestError> {
        let Parts { limits, attestor, store, clock, .. } = &*self.parts;
        let call = call?;
        let _kept = call.keep(&request);
        let admitted = call.admit(limits).await?;
        let pb::ValidateJwtsvidRequest { audience, svid } = request;
        if audience.is_empty() {
            return Err(AudienceError::Missing.into());
        }
        if svid.is_empty() {
            return Err(RequestError::NoSvid);
        }
        let snapshot = store.snapshot();
        let attested = attestor.attest(admitted, &snapshot.questions).await?;

        if !snapshot.is_known() {
            return Err(RequestError::NotKnown);
        }
        // The own bundle for everybody; foreign ones for whom they are federated with, from the entries that match
        // (spire-agent takes those whose SVID happens to be cached).
        let entries = snapshot.index.matching(attested.subject(), None);
        let federated = federated(entries);
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

    /// The entries of a call, or those that it waits for. Boxed, as few calls need the room for it.
    async fn or_wait(&self, found: Result<Entitled, Box<Unentitled>>) -> Result<Entitled, RequestError> {
        let Parts { limits, attestor, store, issuer, .. } = &*self.parts;
        match found {
            Ok(entitled) => Ok(entitled),
            Err(unentitled) => Ok(Box::pin(unentitled.wait(issuer.as_ref(), attestor, limits, store)).await?),
        }
    }

    /// The way of a stream: subscribed before the snapshot is taken, so that no change after it is missed.
    async fn charged(
        &self,
        call: Call,
        purpose: Purpose,
    ) -> Result<(Charged, watch::Receiver<Change>), RequestError> {
        let Parts { limits, attestor, store, .. } = &*self.parts;
        let admitted = call.admit(limits).await?;
        let changes = store.subscribe();
        let snapshot = store.snapshot();
        let attested = attestor.attest(admitted, &snapshot.questions).await?;
        let entitled = self.or_wait(authorize(&snapshot, attested, purpose, None)).await?;
        Ok((entitled.charge(limits).await?, changes))
    }

    async fn x509_svids(&self, call: Result<Call, RequestError>) -> Result<Updates, RequestError> {
        let call = call?;
        let opening = call.opening();
        let (charged, changes) = self.charged(call, Purpose::Svids).await?;
        let hold = self.parts.x509.hold(&charged);
        self.opened(opening, charged, hold, changes).await
    }

    async fn bundles(
        &self,
        call: Result<Call, RequestError>,
        form: BundleForm,
    ) -> Result<Updates, RequestError> {
        let call = call?;
        let opening = call.opening();
        let (charged, changes) = self.charged(call, Purpose::Bundles).await?;
        self.opened(opening, charged, form, changes).await
    }

    /// Where its calls are counted.
    pub(super) fn journal(&self) -> &Arc<Journal> {
        &self.parts.journal
    }

    /// A method that is charged and has no answer.
    async fn not_there<T>(
        &self,
        call: Result<Call, RequestError>,
        answer: RequestError,
    ) -> Result<T, RequestError> {
        call?.admit(&self.parts.limits).await?;
        Err(answer)
    }

    /// A stream that begins with what there is now, and has paid for it.
    async fn opened<C: Content>(
        &self,
        opening: Opening,
        charged: Charged,
        content: C,
        changes: watch::Receiver<Change>,
    ) -> Result<Updates, RequestError> {
        let open = self.parts.journal.opened(opening);
        let mut state = Subscription { parts: Arc::clone(&self.parts), charged, content };
        let Subscription { parts, charged, content } = &mut state;
        let snapshot = parts.store.snapshot();
        let first = if charged.is_of(&snapshot) {
            made(content, parts, charged, &snapshot).await?
        } else {
            // Published since it was attested. Boxed, as few calls need the room for it.
            Box::pin(state.now()).await?
        };
        state.charged.pay();
        Ok(updates(state, open, changes, first, Arc::clone(&self.queue)))
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
        let method = Method::FetchX509Svid;
        let begun = Begun::by(&request, method);
        let done = self.x509_svids(Call::of(&request, method)).await;
        self.parts.journal.first(begun, done)
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<pb::X509BundlesRequest>,
    ) -> Result<Response<Updates>, Status> {
        let method = Method::FetchX509Bundles;
        let begun = Begun::by(&request, method);
        let done = self.bundles(Call::of(&request, method), BundleForm::X509).await;
        self.parts.journal.first(begun, done)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<pb::JwtsvidRequest>,
    ) -> Result<Response<pb::JwtsvidResponse>, Status> {
        let method = Method::FetchJwtSvid;
        let begun = Begun::by(&request, method);
        let done = self.jwt_svids(Call::of(&request, method), request.into_inner()).await;
        self.parts.journal.whole(begun, done)
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<pb::JwtBundlesRequest>,
    ) -> Result<Response<Updates>, Status> {
        let method = Method::FetchJwtBundles;
        let begun = Begun::by(&request, method);
        let done = self.bundles(Call::of(&request, method), BundleForm::Jwt).await;
        self.parts.journal.first(begun, done)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<pb::ValidateJwtsvidRequest>,
    ) -> Result<Response<pb::ValidateJwtsvidResponse>, Status> {
        let method = Method::ValidateJwtSvid;
        let begun = Begun::by(&request, method);
        let done = self.validate(Call::of(&request, method), request.into_inner()).await;
        self.parts.journal.whole(begun, done)
    }

    async fn fetch_witsvid(
        &self,
        request: Request<pb::WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        let method = Method::FetchWitSvid;
        let begun = Begun::by(&request, method);
        let done = self.not_there(Call::of(&request, method), RequestError::NoWitSvids).await;
        self.parts.journal.whole(begun, done)
    }

    async fn fetch_wit_bundles(
        &self,
        request: Request<pb::WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        let method = Method::FetchWitBundles;
        let begun = Begun::by(&request, method);
        let done = self.not_there(Call::of(&request, method), RequestError::NoWitBundles).await;
        self.parts.journal.whole(begun, done)
    }
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
        audience::check(&audience)?;
        let spiffe_id = match spiffe_id.as_str() {
            "" => None,
            text => Some(SpiffeId::parse(text).map_err(RequestError::BadSpiffeId)?),
        };
        Ok(Self { audience, spiffe_id })
    }
}

/// An open stream.
struct Subscription<C> {
    parts: Arc<Parts>,
    charged: Charged,
    content: C,
}

impl<C: Content> Update for Subscription<C> {
    fn connected(&self) -> AuditedProcess {
        AuditedProcess::from(self.charged.peer().connected())
    }

    fn expected(&self) -> Option<Encoded> {
        let Self { parts, charged, content } = self;
        let snapshot = parts.store.snapshot();
        if charged.is_of(&snapshot) { content.at_hand(parts, charged, &snapshot) } else { None }
    }

    async fn now(&mut self) -> Result<Encoded, RequestError> {
        let Self { parts, charged, content } = self;
        let snapshot = charged.follow(&parts.attestor, &parts.limits, &parts.store).await?;
        made(content, parts, charged, &snapshot).await
    }

    fn is_sent(&self, message: &Encoded) {
        self.content.is_sent(&self.parts, &self.charged, message);
    }

    fn is_alive(&self) -> Result<(), RequestError> {
        Ok(self.charged.peer().is_alive()?)
    }

    fn is_sent_away(&self) -> bool {
        self.charged.peer().connected().is_sent_away()
    }
}

/// The message, where there is room for it while it is made.
async fn made<C: Content>(
    content: &mut C,
    parts: &Parts,
    charged: &mut Charged,
    snapshot: &Snapshot,
) -> Result<Encoded, RequestError> {
    let answer = content.reckoned(charged, snapshot);
    let needs_room =
        answer > SMALL && snapshot.answers.find(&content.key(charged), parts.clock.now()).is_none();
    let _room = if needs_room { room_for(answer, charged.peer().connected()).await? } else { None };
    content.message(parts, charged, snapshot).await
}

/// What a stream is sent.
trait Content: Send + 'static {
    /// About how long the message will be, in bytes.
    fn reckoned(&self, charged: &Charged, snapshot: &Snapshot) -> usize;

    /// By which the message is kept for all who are sent the same.
    fn key(&self, charged: &Charged) -> AnswerKey;

    /// The message for the entries of the call, if all that it takes is there.
    fn at_hand(&self, parts: &Parts, charged: &Charged, snapshot: &Snapshot) -> Option<Encoded>;

    /// The message for the entries of the call.
    fn message(
        &mut self,
        parts: &Parts,
        charged: &mut Charged,
        snapshot: &Snapshot,
    ) -> impl Future<Output = Result<Encoded, RequestError>> + Send;

    /// The message is about to be sent.
    fn is_sent(&self, _parts: &Parts, _charged: &Charged, _message: &Encoded) {}
}

/// FetchX509SVID sends SVIDs, which are renewed while they are held.
impl Content for Hold {
    fn reckoned(&self, charged: &Charged, snapshot: &Snapshot) -> usize {
        x509_svids_len(snapshot, charged.entries())
    }

    fn key(&self, charged: &Charged) -> AnswerKey {
        AnswerKey::x509_svids(charged.entries())
    }

    fn at_hand(&self, parts: &Parts, charged: &Charged, snapshot: &Snapshot) -> Option<Encoded> {
        let now = parts.clock.now();
        let key = self.key(charged);
        if let Some(answer) = snapshot.answers.find(&key, now) {
            return Some(answer.into());
        }
        let svids = parts.x509.at_hand(charged)?;
        Some(answer_of(snapshot, key, charged, &svids, now))
    }

    async fn message(
        &mut self,
        parts: &Parts,
        charged: &mut Charged,
        snapshot: &Snapshot,
    ) -> Result<Encoded, RequestError> {
        if !self.is_of(charged) {
            *self = parts.x509.hold(charged);
        }
        let now = parts.clock.now();
        let key = self.key(charged);
        if let Some(answer) = snapshot.answers.find(&key, now) {
            return Ok(answer.into());
        }
        let svids = parts.x509.fetch(charged).await.map_err(RequestError::X509Svid)?;
        Ok(answer_of(snapshot, key, charged, &svids, now))
    }

    fn is_sent(&self, parts: &Parts, charged: &Charged, message: &Encoded) {
        parts.x509.are_given(charged, message.bytes());
    }
}

/// The answer with these SVIDs, kept for all whose entries are the same.
fn answer_of(
    snapshot: &Snapshot,
    key: AnswerKey,
    charged: &Charged,
    svids: &[Served],
    now: SystemTime,
) -> Encoded {
    let fresh = svids.iter().map(Served::fresh).reduce(|a, b| a.start.max(b.start)..a.end.min(b.end));
    let answer = x509_svids(snapshot, charged.entries(), svids).into_bytes();
    snapshot.answers.keep(key, answer, fresh, now).into()
}

/// FetchX509Bundles and FetchJWTBundles send bundles.
impl Content for BundleForm {
    fn reckoned(&self, charged: &Charged, snapshot: &Snapshot) -> usize {
        bundles_len(snapshot, charged.entries())
    }

    fn key(&self, charged: &Charged) -> AnswerKey {
        AnswerKey::Bundles(*self, federated(charged.entries()).into_iter().cloned().collect())
    }

    fn at_hand(&self, parts: &Parts, charged: &Charged, snapshot: &Snapshot) -> Option<Encoded> {
        Some(bundles_of(*self, parts, charged, snapshot))
    }

    async fn message(
        &mut self,
        parts: &Parts,
        charged: &mut Charged,
        snapshot: &Snapshot,
    ) -> Result<Encoded, RequestError> {
        Ok(bundles_of(*self, parts, charged, snapshot))
    }
}

/// The answer with the bundles that callers of these entries receive, kept for all who receive the same.
fn bundles_of(form: BundleForm, parts: &Parts, charged: &Charged, snapshot: &Snapshot) -> Encoded {
    let key = form.key(charged);
    let now = parts.clock.now();
    if let Some(answer) = snapshot.answers.find(&key, now) {
        return answer.into();
    }
    let federated: Vec<TrustDomain> = federated(charged.entries()).into_iter().cloned().collect();
    let answer = bundles(snapshot, form, &federated).into_bytes();
    snapshot.answers.keep(key, answer, None, now).into()
}
