//! The SPIRE Server as the issuer: it decides who this node is and whom it serves, and signs; nothing of the trust
//! domain's keys is here.
//!
//! | file | what |
//! |---|---|
//! | `calls` | what the server is asked with the agent's SVID, and how that fails |
//! | `entries`, `bundles` | what it says of whom this node serves, and what verifies them |
//! | `look` | what it has, before this agent has a place |
//! | `sync`, `cycle`, `backoff` | that it is asked for that, and when |
//! | `faults` | what of that fails, for people |
//! | `own_svid`, `attestation`, `bootstrap` | the agent's own SVID, how this node is known at first, and how the server is |
//! | `upstream`, `dial`, `tls`, `first_frame` | the connection that every call shares |
//! | `request`, `signing`, `intermediates` | X.509-SVIDs: a key and a request, what comes back, and many of them at once |
//! | `tokens` | JWT-SVIDs, and each caller's share of the calls for them |
//!
//! What is known stays known while the server is away or says what makes no sense: a sync that fails changes nothing, and is
//! tried again ever less often.

mod agent_keys;
mod attestation;
mod backoff;
mod bootstrap;
mod bundles;
mod calls;
mod cycle;
mod data;
mod dial;
mod entries;
mod error;
mod faults;
mod files;
mod first_frame;
mod intermediates;
mod look;
mod metrics;
mod other_agent;
pub mod own_svid;
pub mod proto;
mod reading;
mod remote;
mod request;
pub mod settings;
mod signing;
mod sync;
mod tls;
mod tokens;
mod upstream;

use std::{
    collections::BTreeMap,
    fmt,
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

pub use self::{
    attestation::{PopFault, check_pop, check_psat},
    data::AGENT_DATA,
    error::{DataFault, Denial, ServerError},
    look::{LookFault, look_without_place},
    metrics::{ServerCall, ServerMetrics, SyncResult},
    own_svid::{OwnStanding, OwnSvid},
    settings::ServerSettings,
    upstream::LineStanding,
};
use self::{
    calls::{AskFor, CallFault, Calls},
    faults::ServerFaults,
    remote::RemoteServer,
    signing::{Urgency, X509Signing},
    tokens::JwtSigning,
};
use super::{
    Expelled, Issuer, IssuerChoice, IssuerInput, Lookout, Lookouts, MintError, ServerStatus, SvidKind, World,
    by, metrics::IssuerMetrics,
};
use crate::{
    identity::{Bundle, Bundles, Entry, JwtSvid, KeyType, TrustDomain, X509Svid},
    os::clock::Clock,
    telemetry::registry::Registry,
};

/// How long an SVID is waited for while the last sync has failed: nobody waits for a server that is away.
const AWAY_WAIT: Duration = Duration::from_secs(3);

/// The same while the agent's own SVID has ended, so that it may not ask for any.
const WAIT_WITHOUT_SVID: Duration = Duration::from_millis(500);

/// What may change of it while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LiveSettings {
    /// The time between two syncs.
    interval: Duration,
    /// Of the keys of workloads.
    key_type: KeyType,
    /// How long a caller that no entry fits waits for one.
    entry_wait: Duration,
}

impl From<&ServerSettings> for LiveSettings {
    fn from(settings: &ServerSettings) -> Self {
        Self {
            interval: settings.sync.sync_interval,
            key_type: settings.svid_key_type,
            entry_wait: settings.join.entry_wait,
        }
    }
}

fn asked_for(settings: &ServerSettings) -> AskFor {
    if settings.sync.use_sync_authorized_entries { AskFor::Revisions } else { AskFor::All }
}

/// How it stands with the server.
#[derive(Clone, Copy, Debug)]
struct SyncStanding {
    /// When the server is asked again, where it failed.
    again_at: Option<Instant>,
    /// When a sync last passed.
    synced: Option<SystemTime>,
}

/// A SPIRE Server as an [`Issuer`].
pub struct ServerIssuer {
    trust_domain: TrustDomain,
    /// `None` where calls need none.
    own: Option<Arc<OwnSvid>>,
    /// The same.
    server_metrics: Option<Arc<ServerMetrics>>,
    calls: Arc<dyn Calls>,
    clock: Clock,
    metrics: Arc<IssuerMetrics>,
    world: watch::Sender<Arc<World>>,
    lookouts: Arc<Lookouts>,
    x509: Arc<X509Signing>,
    jwt: JwtSigning,
    faults: Arc<ServerFaults>,
    settings: Mutex<LiveSettings>,
    /// Another time between two syncs is in force.
    paced_anew: Notify,
    standing: Mutex<SyncStanding>,
}

impl fmt::Debug for ServerIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerIssuer").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl ServerIssuer {
    /// Joins the server of these settings, with what is on the disk of it; nothing is asked of it before
    /// [`Issuer::run`].
    ///
    /// # Errors
    /// [`DataFault`] of what is on the disk.
    pub fn open(
        settings: ServerSettings,
        clock: Clock,
        metrics: Arc<IssuerMetrics>,
        registry: Registry<'_>,
    ) -> Result<Self, DataFault> {
        let (trust_domain, live) = (settings.trust_domain.clone(), LiveSettings::from(&settings));
        let asked_for = asked_for(&settings);
        let counted = Arc::new(ServerMetrics::new(registry));
        let own = OwnSvid::open(settings, clock, Arc::clone(&counted))?;
        let remote = RemoteServer::new(Arc::clone(&own), trust_domain.clone());
        remote.ask_for(asked_for);
        let faults = Arc::clone(own.upstream().faults());
        let issuer = Self::new(trust_domain, Arc::new(remote), live, clock, metrics, faults);
        Ok(Self { own: Some(own), server_metrics: Some(counted), ..issuer })
    }

    /// An issuer that knows nothing yet.
    fn new(
        trust_domain: TrustDomain,
        calls: Arc<dyn Calls>,
        settings: LiveSettings,
        clock: Clock,
        metrics: Arc<IssuerMetrics>,
        faults: Arc<ServerFaults>,
    ) -> Self {
        let own = Bundle {
            trust_domain: trust_domain.clone(),
            x509_authorities: Vec::new(),
            jwt_authorities: Vec::new(),
        };
        let bundles = Bundles { own: Arc::new(own), federated: BTreeMap::new() };
        let world =
            watch::Sender::new(Arc::new(World { index: Arc::default(), bundles, tainted: Arc::default() }));
        let lookouts = Arc::new(Lookouts::new(settings.entry_wait));
        let x509 = Arc::new(X509Signing::new(
            Arc::clone(&calls),
            clock,
            Arc::clone(&metrics),
            world.subscribe(),
            Arc::clone(&lookouts),
            settings.key_type,
            Arc::clone(&faults),
        ));
        let jwt = JwtSigning::new(Arc::clone(&calls), clock, Arc::clone(&faults));
        Self {
            trust_domain,
            own: None,
            server_metrics: None,
            calls,
            clock,
            metrics,
            world,
            lookouts,
            x509,
            jwt,
            faults,
            settings: Mutex::new(settings),
            paced_anew: Notify::new(),
            standing: Mutex::new(SyncStanding { again_at: None, synced: None }),
        }
    }

    /// Takes new settings, for what is done from then on.
    fn reconfigure(&self, settings: LiveSettings) {
        self.x509.set_key_type(settings.key_type);
        self.lookouts.set_patience(settings.entry_wait);
        let before =
            std::mem::replace(&mut *self.settings.lock().unwrap_or_else(PoisonError::into_inner), settings);
        if before.interval != settings.interval {
            self.paced_anew.notify_one();
        }
    }

    fn settings(&self) -> LiveSettings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self) -> SyncStanding {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stands(&self, done: &Result<(), CallFault>, again_at: Instant) {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        match done {
            Ok(()) => *standing = SyncStanding { again_at: None, synced: Some(self.clock.now()) },
            Err(_) => standing.again_at = Some(again_at),
        }
    }

    /// Whether the server has ever told what there is.
    fn is_known(&self) -> bool {
        !self.world.borrow().bundles.own.x509_authorities.is_empty()
    }

    /// Until when an SVID is waited for.
    fn until(&self, deadline: Instant) -> Instant {
        let has_ended = self.is_known() && self.own_trouble().is_some();
        match self.standing().again_at {
            _ if has_ended => deadline.min(Instant::now() + WAIT_WITHOUT_SVID),
            Some(_) => deadline.min(Instant::now() + AWAY_WAIT),
            None => deadline,
        }
    }

    /// Why the agent has no SVID of its own, while it has none.
    fn own_trouble(&self) -> Option<String> {
        let own = self.own.as_ref()?.standing();
        match &*own.borrow() {
            OwnStanding::Waiting { why, .. } => Some(why.clone()),
            OwnStanding::Serving { .. } | OwnStanding::Lost(_) => None,
        }
    }

    /// Says when to come again, where the server is away.
    fn with_wait(&self, error: MintError) -> MintError {
        let left = self.standing().again_at.map(|at| at.saturating_duration_since(Instant::now()));
        match (error, left) {
            (MintError::Late, left) if self.own_trouble().is_some() => {
                MintError::Issuer { retry_after: left, source: Box::new(ServerError::NoSvid) }
            }
            (MintError::Issuer { retry_after: None, source }, left) => {
                MintError::Issuer { retry_after: left, source }
            }
            (MintError::Late, Some(left)) => {
                MintError::Issuer { retry_after: Some(left), source: Box::new(ServerError::Late) }
            }
            (error, _) => error,
        }
    }
}

impl Issuer for ServerIssuer {
    fn world(&self) -> watch::Receiver<Arc<World>> {
        self.world.subscribe()
    }

    fn mint_x509<'a>(
        &'a self,
        entries: &'a [Arc<Entry>],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<X509Svid, MintError>>> {
        let urgency = if entries.len() == 1 { Urgency::Awaited } else { Urgency::Ahead };
        let deadline = if urgency == Urgency::Awaited { self.until(deadline) } else { deadline };
        let ordered = self.x509.order(entries, urgency);
        Box::pin(async move {
            let mut made = Vec::with_capacity(ordered.len());
            for ordered in ordered {
                // An order that is dropped was late.
                let svid = timeout_at(deadline, ordered).await;
                let svid = svid.ok().and_then(Result::ok).unwrap_or(Err(MintError::Late));
                made.push(svid.map_err(|error| self.with_wait(error)));
            }
            made
        })
    }

    fn mint_jwt<'a>(
        &'a self,
        entry: &'a Arc<Entry>,
        audience: &'a [String],
        family: u64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<JwtSvid, MintError>> {
        Box::pin(async move {
            let began = Instant::now();
            let deadline = self.until(deadline);
            let signed = by(deadline, self.jwt.sign(entry, audience, family, deadline)).await;
            match &signed {
                Ok(_) => self.metrics.signed(SvidKind::Jwt, began.elapsed()),
                Err(_) => self.metrics.signing_failed(SvidKind::Jwt),
            }
            signed.map_err(|error| self.with_wait(error))
        })
    }

    fn can_sign(&self, _kind: SvidKind) -> Result<(), MintError> {
        if self.is_known() {
            return Ok(());
        }
        let unknown = Box::new(NotHeardOf { own: self.own_trouble() });
        Err(self.with_wait(MintError::Issuer { retry_after: None, source: unknown }))
    }

    fn look_out(&self) -> Option<Lookout> {
        Some(self.lookouts.wait())
    }

    fn makes_ahead(&self) -> bool {
        true
    }

    fn server(&self) -> Option<ServerStatus> {
        let own = self.own.as_ref()?;
        let mut status = ServerStatus {
            address: own.upstream().standing().server,
            agent: own.last_known(),
            last_sync: self.standing().synced,
            waits_for: None,
            last_error: self.faults.first(),
        };
        match own.standing().borrow().clone() {
            OwnStanding::Waiting { why, since } => status.waits_for = Some((why, since)),
            OwnStanding::Serving { id, not_after, .. } => status.agent = Some((id, not_after)),
            OwnStanding::Lost(_) => {}
        }
        Some(status)
    }

    fn before_scrape(&self) {
        let (Some(metrics), Some(own)) = (&self.server_metrics, &self.own) else { return };
        let ends = match &*own.standing().borrow() {
            OwnStanding::Serving { not_after, .. } => Some(*not_after),
            OwnStanding::Waiting { .. } | OwnStanding::Lost(_) => None,
        };
        metrics.refresh(self.clock.now(), self.standing().synced, ends);
    }

    fn reload(&self, told: IssuerInput) {
        if let IssuerChoice::Server(settings) = told.choice {
            self.reconfigure(LiveSettings::from(&*settings));
            if let Some(own) = &self.own {
                own.reconfigure(&settings);
            }
            self.calls.ask_for(asked_for(&settings));
        }
    }

    fn let_go(&self) {
        if let Some(own) = &self.own {
            own.let_go();
        }
    }

    fn run(self: Arc<Self>) -> BoxFuture<'static, Expelled> {
        Box::pin(async move {
            let signing = Arc::clone(&self.x509);
            let own = async {
                match &self.own {
                    Some(own) => Arc::clone(own).run().await,
                    None => pending().await,
                }
            };
            let goes_on = async {
                tokio::join!(self.follow(), signing.run());
                pending().await
            };
            tokio::select! {
                expelled = own => expelled,
                expelled = goes_on => expelled,
            }
        })
    }
}

/// The server has not told yet what there is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NotHeardOf {
    /// Why the agent has no SVID of its own, where it has none.
    own: Option<String>,
}

impl std::error::Error for NotHeardOf {}

impl fmt::Display for NotHeardOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.own {
            Some(why) => write!(f, "the agent has no valid SVID of its own: {why}"),
            None => f.write_str("the server has not yet said which entries this node has"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa};
    use tonic::Code;

    use super::{
        bundles::ToldBundle,
        entries::{EntrySync, KnownEntries, SyncedEntries},
        proto::{
            svid::{NewX509svidParams, batch_new_x509svid_response::Result as Answer},
            types::{self as pb, Jwtsvid},
        },
        *,
    };
    use crate::{
        identity::{EntryId, Tainted},
        issuer::deadline,
        telemetry::metrics::Metrics,
    };

    type Signer = rcgen::Issuer<'static, rcgen::KeyPair>;

    /// A server in memory.
    struct FakeServer {
        ca: Mutex<(Vec<u8>, Signer)>,
        entries: Mutex<Vec<pb::Entry>>,
        /// What further calls are answered with; an error each.
        fails: Mutex<VecDeque<Code>>,
        is_away: Mutex<bool>,
        /// The IDs of entries that it does not sign for.
        refuses: Mutex<Vec<&'static str>>,
        /// How many were in each batch.
        batches: Mutex<Vec<usize>>,
        syncs: AtomicUsize,
        tokens: AtomicUsize,
        takes: Mutex<Duration>,
        /// Authorities that it uses before it tells of them.
        tells: Mutex<Option<Vec<u8>>>,
    }

    impl fmt::Debug for FakeServer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("FakeServer")
        }
    }

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn ca() -> (Vec<u8>, Signer) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        (der, Signer::new(params, key))
    }

    fn entry(id: &str, revision: i64) -> pb::Entry {
        pb::Entry {
            id: id.to_owned(),
            spiffe_id: Some(pb::Spiffeid { trust_domain: "td".to_owned(), path: format!("/{id}") }),
            selectors: vec![pb::Selector { r#type: "unix".to_owned(), value: format!("uid:{id}") }],
            revision_number: revision,
            created_at: 1,
            ..pb::Entry::default()
        }
    }

    impl FakeServer {
        fn new(ids: &[&str]) -> Arc<Self> {
            Arc::new(Self {
                ca: Mutex::new(ca()),
                entries: Mutex::new(ids.iter().map(|id| entry(id, 1)).collect()),
                fails: Mutex::default(),
                is_away: Mutex::new(false),
                refuses: Mutex::default(),
                batches: Mutex::default(),
                syncs: AtomicUsize::new(0),
                tokens: AtomicUsize::new(0),
                takes: Mutex::default(),
                tells: Mutex::default(),
            })
        }

        async fn reached(&self) -> Result<(), CallFault> {
            let takes = *self.takes.lock().unwrap();
            tokio::time::sleep(takes).await;
            if *self.is_away.lock().unwrap() {
                return Err(ServerError::Late.into());
            }
            match self.fails.lock().unwrap().pop_front() {
                Some(code) => {
                    Err(ServerError::of("a call", &tonic::Status::new(code, "as the test says")).into())
                }
                None => Ok(()),
            }
        }

        fn sign(&self, request: &NewX509svidParams) -> Answer {
            if self.refuses.lock().unwrap().iter().any(|id| *id == request.entry_id) {
                let status = pb::Status { code: 13, message: "failed to sign X509-SVID".to_owned() };
                return Answer { status: Some(status), svid: None };
            }
            let asked = CertificateSigningRequestParams::from_der(&request.csr.as_slice().into()).unwrap();
            let signed = asked.signed_by(&self.ca.lock().unwrap().1).unwrap();
            let svid = pb::X509svid { cert_chain: vec![signed.der().to_vec()], ..Default::default() };
            Answer { status: Some(pb::Status::default()), svid: Some(svid) }
        }

        fn issuer(self: &Arc<Self>) -> Arc<ServerIssuer> {
            let settings = LiveSettings {
                interval: Duration::from_secs(5),
                key_type: KeyType::EcP256,
                entry_wait: Duration::from_secs(5),
            };
            let calls: Arc<dyn Calls> = Arc::<Self>::clone(self);
            let counted = Arc::new(IssuerMetrics::new(Metrics::default().registry()));
            let clock = Clock::SYSTEM;
            let faults = Arc::new(ServerFaults::new(clock));
            let issuer = Arc::new(ServerIssuer::new(td(), calls, settings, clock, counted, faults));
            drop(tokio::spawn(Arc::<ServerIssuer>::clone(&issuer).run()));
            issuer
        }
    }

    impl Calls for FakeServer {
        fn entries(
            &self,
            known: KnownEntries,
            _deadline: Instant,
        ) -> BoxFuture<'_, Result<SyncedEntries, CallFault>> {
            Box::pin(async move {
                self.syncs.fetch_add(1, Relaxed);
                self.reached().await?;
                let td = td();
                let mut sync = EntrySync::new(td, known);
                sync.whole(self.entries.lock().unwrap().clone())?;
                Ok(sync.finish()?)
            })
        }

        fn bundle(&self, _deadline: Instant) -> BoxFuture<'_, Result<ToldBundle, CallFault>> {
            Box::pin(async move {
                self.reached().await?;
                let told = self.tells.lock().unwrap().clone();
                let asn1 = told.unwrap_or_else(|| self.ca.lock().unwrap().0.clone());
                let authority = pb::X509Certificate { asn1, tainted: false };
                let told = pb::Bundle {
                    trust_domain: "td".to_owned(),
                    x509_authorities: vec![authority],
                    ..Default::default()
                };
                Ok(bundles::read(told, &td())?)
            })
        }

        fn federated_bundle<'a>(
            &'a self,
            trust_domain: &'a TrustDomain,
            _deadline: Instant,
        ) -> BoxFuture<'a, Result<Option<ToldBundle>, CallFault>> {
            Box::pin(async move {
                let asn1 = match trust_domain.name() {
                    "good.org" => self.ca.lock().unwrap().0.clone(),
                    "bad.org" => b"none".to_vec(),
                    _ => return Ok(None),
                };
                let told = pb::Bundle {
                    trust_domain: trust_domain.name().to_owned(),
                    x509_authorities: vec![pb::X509Certificate { asn1, tainted: false }],
                    ..Default::default()
                };
                Ok(Some(bundles::read(told, trust_domain)?))
            })
        }

        fn sign_x509(
            &self,
            requests: Vec<NewX509svidParams>,
            _deadline: Instant,
        ) -> BoxFuture<'_, Result<Vec<Answer>, CallFault>> {
            Box::pin(async move {
                self.batches.lock().unwrap().push(requests.len());
                self.reached().await?;
                Ok(requests.iter().map(|request| self.sign(request)).collect())
            })
        }

        fn sign_jwt<'a>(
            &'a self,
            entry: &'a EntryId,
            audience: &'a [String],
            _deadline: Instant,
        ) -> BoxFuture<'a, Result<Jwtsvid, CallFault>> {
            Box::pin(async move {
                self.tokens.fetch_add(1, Relaxed);
                self.reached().await?;
                let since_1970 = Clock::SYSTEM.now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
                let now = i64::try_from(since_1970.as_secs()).unwrap();
                let claims =
                    format!(r#"{{"sub":"spiffe://td/{entry}","aud":{audience:?},"exp":{}}}"#, now + 300);
                let claims = URL_SAFE_NO_PAD.encode(claims);
                Ok(Jwtsvid {
                    token: format!("e30.{claims}.c2ln"),
                    id: Some(pb::Spiffeid { trust_domain: "td".to_owned(), path: format!("/{entry}") }),
                    issued_at: now,
                    expires_at: now + 300,
                    hint: String::new(),
                })
            })
        }

        fn ask_for(&self, _entries: AskFor) {}

        fn trust<'a>(
            &'a self,
            _bundle: &'a Bundle,
            _tainted: &'a Tainted,
        ) -> BoxFuture<'a, Result<(), CallFault>> {
            Box::pin(async { Ok(()) })
        }
    }

    async fn known(issuer: &ServerIssuer, ids: &[&str]) -> Vec<Arc<Entry>> {
        let mut world = issuer.world();
        let is_so = |world: &Arc<World>| {
            world.index.entries().iter().map(|it| it.id.as_str()).eq(ids.iter().copied())
        };
        let world = world.wait_for(is_so).await.unwrap();
        world.index.entries().to_vec()
    }

    #[tokio::test(start_paused = true)]
    async fn it_follows_the_server_and_keeps_what_it_knows_while_that_is_away() {
        let server = FakeServer::new(&["a", "b"]);
        let issuer = server.issuer();
        assert!(issuer.can_sign(SvidKind::X509).is_err(), "nothing is known yet");
        known(&issuer, &["a", "b"]).await;
        issuer.can_sign(SvidKind::X509).unwrap();
        *server.entries.lock().unwrap() = vec![entry("b", 2), entry("c", 1)];
        let entries = known(&issuer, &["b", "c"]).await;
        assert_eq!(entries[0].revision, 2);
        *server.is_away.lock().unwrap() = true;
        let before = server.syncs.load(Relaxed);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let tries = server.syncs.load(Relaxed) - before;
        assert!((12..=30).contains(&tries), "{tries} tries in an hour");
        known(&issuer, &["b", "c"]).await;
        issuer.can_sign(SvidKind::X509).unwrap();
        let began = Instant::now();
        let made = issuer.mint_x509(&entries[..1], deadline()).await.pop().unwrap();
        assert!(made.unwrap_err().retry_after().is_some());
        assert!(began.elapsed() <= AWAY_WAIT, "nobody waits for a server that is away");
        *server.is_away.lock().unwrap() = false;
        *server.entries.lock().unwrap() = Vec::new();
        known(&issuer, &[]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn another_interval_is_in_force_at_once() {
        let server = FakeServer::new(&["a"]);
        let issuer = server.issuer();
        known(&issuer, &["a"]).await;
        let (now, hour) = (issuer.settings(), Duration::from_secs(3600));
        issuer.reconfigure(LiveSettings { interval: 24 * hour, ..now });
        tokio::time::sleep(hour).await;
        let before = server.syncs.load(Relaxed);
        tokio::time::sleep(hour).await;
        assert_eq!(server.syncs.load(Relaxed), before);
        issuer.reconfigure(now);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(server.syncs.load(Relaxed), before + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_has_it_looked_for_within_a_second_and_only_for_a_while() {
        let server = FakeServer::new(&["a"]);
        let issuer = server.issuer();
        known(&issuer, &["a"]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (began, before) = (Instant::now(), server.syncs.load(Relaxed));
        server.entries.lock().unwrap().push(entry("b", 1));
        let waiting: Vec<_> = (0..100).map(|_| issuer.look_out().unwrap()).collect();
        known(&issuer, &["a", "b"]).await;
        assert!(began.elapsed() <= Duration::from_secs(1));
        assert_eq!(server.syncs.load(Relaxed) - before, 1, "one for all who wait");
        for lookout in &waiting {
            lookout.looked().await;
        }
        tokio::time::sleep(Duration::from_secs(100)).await;
        let syncs = server.syncs.load(Relaxed) - before;
        assert!((20..=50).contains(&syncs), "{syncs} in 100 seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_cannot_be_signed_for_holds_up_no_other() {
        let ids: Vec<String> = (0..700).map(|n| format!("e{n:03}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let server = FakeServer::new(&ids);
        server.refuses.lock().unwrap().push("e005");
        let issuer = server.issuer();
        let entries = known(&issuer, &ids).await;
        let made = issuer.mint_x509(&entries, deadline()).await;
        for (entry, made) in entries.iter().zip(&made) {
            let refused = matches!(made, Err(MintError::Entry { .. }));
            assert_eq!(refused, entry.id.as_str() == "e005", "{}: {made:?}", entry.id);
        }
        let batches = server.batches.lock().unwrap().clone();
        assert!(batches.len() >= 4 && batches.iter().all(|batch| *batch <= 500), "{batches:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_fails_is_followed_by_a_smaller_one() {
        let ids: Vec<String> = (0..100).map(|n| format!("e{n:03}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let server = FakeServer::new(&ids);
        let issuer = server.issuer();
        let entries = known(&issuer, &ids).await;
        *server.fails.lock().unwrap() = [Code::ResourceExhausted, Code::Internal].into();
        for (fails, of) in [(100, "100"), (50, "50"), (0, "25 and more")] {
            let made = issuer.mint_x509(&entries, deadline()).await;
            let failed = made.iter().filter(|made| made.is_err()).count();
            assert!(failed <= fails, "{failed} of a batch of {of}");
        }
        let batches = server.batches.lock().unwrap().clone();
        assert_eq!(batches[..2], [100, 50], "{batches:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_authority_that_is_newer_than_the_bundle_is_looked_for() {
        let server = FakeServer::new(&["a"]);
        let issuer = server.issuer();
        let entries = known(&issuer, &["a"]).await;
        *server.ca.lock().unwrap() = ca();
        let made = issuer.mint_x509(&entries, deadline()).await.pop().unwrap();
        made.unwrap();
        // One that the server never tells of is nobody's.
        *server.tells.lock().unwrap() = Some(server.ca.lock().unwrap().0.clone());
        *server.ca.lock().unwrap() = ca();
        let made = issuer.mint_x509(&entries, deadline()).await.pop().unwrap();
        assert!(matches!(made, Err(MintError::Entry { .. })), "{made:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_bundle_of_others_that_is_of_no_use_holds_up_nothing() {
        let server = FakeServer::new(&["a"]);
        server.entries.lock().unwrap()[0].federates_with =
            ["bad.org", "good.org", "none.org"].map(str::to_owned).to_vec();
        let issuer = server.issuer();
        known(&issuer, &["a"]).await;
        let federated: Vec<String> =
            issuer.world().borrow().bundles.federated.keys().map(ToString::to_string).collect();
        assert_eq!(federated, ["good.org"]);
        let before = server.syncs.load(Relaxed);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(server.syncs.load(Relaxed) - before >= 10, "it is asked as often as ever");
        assert_eq!(issuer.standing().again_at, None);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_tried_again_and_shared_out() {
        let server = FakeServer::new(&["a"]);
        let issuer = server.issuer();
        let entries = known(&issuer, &["a"]).await;
        let audience = ["x".to_owned()];
        *server.fails.lock().unwrap() = [Code::Unavailable, Code::ResourceExhausted].into();
        issuer.mint_jwt(&entries[0], &audience, 1, deadline()).await.unwrap();
        assert_eq!(server.tokens.load(Relaxed), 3);
        *server.fails.lock().unwrap() = [Code::NotFound].into();
        let began = Instant::now();
        issuer.mint_jwt(&entries[0], &audience, 1, deadline()).await.unwrap_err();
        assert_eq!(began.elapsed(), Duration::ZERO, "not found is not tried again for half a minute");

        // One caller that asks without end, and one that asks once.
        *server.takes.lock().unwrap() = Duration::from_secs(2);
        let greedy = (0..2000).map(|_| issuer.mint_jwt(&entries[0], &audience, 1, deadline()));
        let greedy = futures_util::future::join_all(greedy);
        let polite = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            issuer.mint_jwt(&entries[0], &audience, 2, deadline()).await
        };
        let (greedy, polite) = tokio::join!(greedy, polite);
        polite.unwrap();
        let served = greedy.iter().filter(|made| made.is_ok()).count();
        assert!((32..200).contains(&served), "{served}");
        assert!(
            greedy.iter().all(|made| made.as_ref().err().is_none_or(|error| error.retry_after().is_some()))
        );
    }
}
