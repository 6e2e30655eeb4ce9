//! The agent's own SVID: from the disk, by attestation, and renewed for ever.
//!
//! What is on the disk is replaced, and never removed before the server has said twice, over a connection on which it was
//! verified, that it does not know this agent. While there is none, or it cannot be renewed, that is told and tried
//! again; the process does not end for it.

mod pause;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use self::pause::Pause;
use super::{
    agent_keys::{AgentKeys, NewKeyError, csr},
    attestation::{AttestedAgent, NodeAttestor, attest, attestor},
    bootstrap::{self, Circumstances},
    bundles,
    data::{AgentData, AgentDataFile},
    dial::Dialer,
    error::{DataFault, Denial, ServerError},
    files::{DirLock, FileDir},
    proto::{
        agent::{AgentX509svidParams, PostStatusRequest, RenewAgentRequest, agent_client::AgentClient},
        bundle::{GetBundleRequest, bundle_client::BundleClient},
    },
    settings::{KeyManagerSettings, RebootstrapMode, ServerSettings, TrustSource},
    tls::{KeyExchange, ServerTrust, TlsPlan, certified, id_of, verify_chain},
    upstream::Upstream,
};
use crate::{
    identity::{Bundle, SpiffeId, Tainted},
    issuer::{keys::KeyPair, renewal},
    os::clock::{Clock, sleep_until},
};

/// The file in `data_dir` that one agent holds.
const LOCK: &str = "durward.lock";

/// The longest of one exchange with the server.
const LONGEST_CALL: Duration = Duration::from_secs(30);

/// The first pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(5);

/// The first pause while nothing is served for want of an SVID.
const FIRST_PAUSE_WITHOUT: Duration = Duration::from_secs(1);

/// What the server says of the agent is asked once more after this.
const CONFIRM: Duration = Duration::from_secs(5);

/// An SVID that ends sooner than this is not begun with.
const LEAST_LEFT: Duration = Duration::from_secs(1);

/// How it stands with the agent's own SVID.
#[derive(Clone, Debug)]
pub enum OwnStanding {
    /// There is none. `why` is for people.
    Waiting { why: String, since: SystemTime },
    /// It can be shown to the server. `trouble` is why it cannot be renewed, where that was tried.
    Serving { id: SpiffeId, not_after: SystemTime, reattestable: bool, trouble: Option<String> },
    /// The server does not take this agent any more, and it cannot attest again.
    Lost(Denial),
}

/// The agent's SVID of the moment.
#[derive(Clone, Debug)]
struct AgentSvid {
    id: SpiffeId,
    chain: Vec<Vec<u8>>,
    not_before: SystemTime,
    not_after: SystemTime,
    reattestable: bool,
}

/// Has the agent's own SVID, and renews it.
#[derive(Debug)]
pub struct OwnSvid {
    settings: ServerSettings,
    clock: Clock,
    upstream: Arc<Upstream>,
    data: Arc<AgentDataFile>,
    keys: Arc<AgentKeys>,
    attestor: Box<dyn NodeAttestor>,
    standing: watch::Sender<OwnStanding>,
    at_once: Notify,
    _lock: DirLock,
}

/// How a new SVID is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Node attestation, with a server that is known by what is on the disk.
    Attest,
    /// The same, with a server that is known by the source of trust alone.
    AttestAnew,
    /// `RenewAgent`.
    Renew,
}

impl OwnSvid {
    /// Opens `data_dir`, and takes the SVID that lies there if it can be used. Waits for the disk, and for nothing else.
    ///
    /// # Errors
    /// Another agent uses the directory, a file in it is damaged or open to others, or it is of another trust domain.
    pub fn open(settings: ServerSettings, clock: Clock) -> Result<Arc<Self>, DataFault> {
        let dir = FileDir::open(&settings.data_dir, 0o755)?;
        let lock = dir.lock(LOCK)?;
        let data = Arc::new(AgentDataFile::open(dir, &settings.trust_domain)?);
        let keys = Arc::new(match &settings.key_manager {
            KeyManagerSettings::Memory => AgentKeys::in_memory(),
            KeyManagerSettings::Disk(directory) => AgentKeys::open(FileDir::open(directory, 0o700)?)?,
        });
        let key_exchange =
            if settings.sync.require_pq_kem { KeyExchange::PostQuantum } else { KeyExchange::Any };
        let tls = TlsPlan { trust_domain: settings.trust_domain.clone(), key_exchange, clock };
        let roots = ServerTrust::Roots(data.known().bundle.into());
        let upstream = Upstream::new(Dialer::new(&settings.join.address, settings.join.port), tls, roots);
        let waiting = OwnStanding::Waiting { why: "node attestation".to_owned(), since: clock.now() };
        let own = Arc::new(Self {
            attestor: attestor(&settings),
            settings,
            clock,
            upstream,
            data,
            keys,
            standing: watch::Sender::new(waiting),
            at_once: Notify::new(),
            _lock: lock,
        });
        own.take_from_disk();
        Ok(own)
    }

    /// The connection to the server.
    pub(super) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// How it stands, and each change.
    pub fn standing(&self) -> watch::Receiver<OwnStanding> {
        self.standing.subscribe()
    }

    /// Has the SVID renewed if a tainted authority signed it.
    pub(super) fn distrust(&self, tainted: &Tainted) {
        if self.current().is_some_and(|svid| tainted.signed_x509(&svid.chain)) {
            self.renew_at_once();
        }
    }

    /// Renews the SVID as soon as possible: what signed it is tainted.
    pub fn renew_at_once(&self) {
        self.at_once.notify_one();
    }

    /// The trust domain's authorities, as the server tells them, from now on and after a restart.
    ///
    /// # Errors
    /// They cannot be written: they are in force until the agent ends.
    pub async fn learn(&self, bundle: &Bundle) -> Result<(), ServerError> {
        self.upstream.trust(bundle);
        let roots = bundle.x509_authorities.clone();
        self.keep(move |data| data.bundle = roots).await
    }

    /// Renews for ever. Ends when the server does not take this agent any more and it cannot attest again.
    pub async fn run(self: Arc<Self>) -> Denial {
        let mut denials = self.upstream.denials();
        let mut pause = Pause::new();
        let mut way = self.current().is_none().then_some(Way::Attest);
        if way.is_none() {
            self.post_status().await;
        }
        loop {
            let Some(next) = way.take() else {
                way = match self.wait(&mut denials).await {
                    Ok(way) => Some(way),
                    Err(denial) => return self.lost(denial).await,
                };
                continue;
            };
            match self.renew(next).await {
                Ok(()) => {
                    pause = Pause::new();
                    self.post_status().await;
                }
                Err(ServerError::Denied(Denial::MustReattest)) if next == Way::Renew => {
                    way = Some(Way::Attest)
                }
                Err(ServerError::Denied(denial)) if next == Way::Renew && !self.may_attest() => {
                    if self.is_certain(denial).await {
                        return self.lost(denial).await;
                    }
                    way = Some(Way::Renew);
                }
                Err(error) => {
                    self.tell(next, &error);
                    let held = self.current().is_some();
                    sleep(pause.next(if held { FIRST_PAUSE } else { FIRST_PAUSE_WITHOUT })).await;
                    way = Some(self.way(next));
                }
            }
        }
    }

    /// Until there is something to do about the SVID of the moment.
    async fn wait(&self, denials: &mut watch::Receiver<Option<Denial>>) -> Result<Way, Denial> {
        let Some(svid) = self.current() else { return Ok(Way::Attest) };
        let due = renewal::draw(svid.not_before, svid.not_after, self.settings.availability_target);
        loop {
            tokio::select! {
                () = sleep_until(self.clock, due) => return Ok(self.way(Way::Renew)),
                () = self.at_once.notified() => return Ok(self.way(Way::Renew)),
                () = self.foreign_for_long(), if svid.reattestable => return Ok(Way::AttestAnew),
                Ok(()) = denials.changed() => {
                    let denial = *denials.borrow_and_update();
                    if let Some(denial) = denial && self.is_certain(denial).await {
                        if denial == Denial::Banned || !svid.reattestable {
                            return Err(denial);
                        }
                        return Ok(Way::Attest);
                    }
                }
            }
        }
    }

    /// Ends when the server's authority has been unknown for as long as is put up with, where it may be begun anew.
    async fn foreign_for_long(&self) {
        if !self.may_begin_anew() {
            return std::future::pending().await;
        }
        while !self.is_foreign_for_long() {
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Whether trust in the server may be established anew.
    fn may_begin_anew(&self) -> bool {
        let join = &self.settings.join;
        join.rebootstrap_mode != RebootstrapMode::Never && join.trust_source() != TrustSource::Insecure
    }

    fn is_foreign_for_long(&self) -> bool {
        self.upstream.foreign_for().is_some_and(|long| long >= self.settings.join.rebootstrap_delay)
    }

    fn may_attest(&self) -> bool {
        self.current().is_none_or(|svid| svid.reattestable)
    }

    /// How the next SVID is had, when `wanted` was to be tried.
    fn way(&self, wanted: Way) -> Way {
        let foreign = self.may_begin_anew() && self.is_foreign_for_long();
        match (wanted, self.may_attest()) {
            (_, true) if foreign => Way::AttestAnew,
            (Way::AttestAnew, true) => Way::AttestAnew,
            (_, true) => Way::Attest,
            (_, false) => Way::Renew,
        }
    }

    /// The SVID of the disk, while it is valid and its key is there.
    fn current(&self) -> Option<AgentSvid> {
        let AgentData { svid: chain, reattestable, .. } = self.data.known();
        let svid = self.read(chain, reattestable)?;
        self.keys.of(svid.chain.first()?)?;
        Some(svid)
    }

    fn read(&self, chain: Vec<Vec<u8>>, reattestable: bool) -> Option<AgentSvid> {
        let leaf = chain.first()?;
        let id = id_of(leaf)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(leaf).ok()?;
        let at = |seconds: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
        };
        let not_before = at(parsed.validity().not_before.timestamp());
        let not_after = at(parsed.validity().not_after.timestamp());
        (self.clock.now() + LEAST_LEFT < not_after).then_some(AgentSvid {
            id,
            chain,
            not_before,
            not_after,
            reattestable,
        })
    }

    fn take_from_disk(&self) {
        let data = self.data.known();
        if data.svid.is_empty() {
            return;
        }
        match self.current() {
            None => tracing::warn!(
                file = %self.data.path().display(),
                "the agent's SVID on the disk has expired, or its key is missing: this node attests anew"
            ),
            Some(svid) => self.show(&svid),
        }
    }

    fn show(&self, svid: &AgentSvid) {
        let key = svid.chain.first().and_then(|leaf| self.keys.of(leaf));
        let Some(identity) = key.and_then(|key| certified(&svid.chain, &key)) else { return };
        self.upstream.show(identity);
        let AgentSvid { id, not_after, reattestable, .. } = svid.clone();
        tracing::info!(spiffe_id = %id, reattestable, "the agent has its SVID");
        self.standing.send_replace(OwnStanding::Serving { id, not_after, reattestable, trouble: None });
    }

    async fn renew(&self, way: Way) -> Result<(), ServerError> {
        let key = self.next_key().await?;
        let csr = csr(&key).map_err(|error| disk_of(error.to_string()))?;
        let deadline = Instant::now() + LONGEST_CALL;
        let (chain, reattestable, roots) = match way {
            Way::Renew => {
                let connection = self.upstream.agent(deadline).await?;
                let mut client = AgentClient::new(connection.clone());
                let request = RenewAgentRequest { params: Some(AgentX509svidParams { csr }) };
                let answer = connection.answer("RenewAgent", client.renew_agent(request)).await?.into_inner();
                let chain = answer.svid.map(|svid| svid.cert_chain).unwrap_or_default();
                let ServerTrust::Roots(roots) = self.upstream.trusted() else {
                    return Err(ServerError::NoSvid);
                };
                (chain, false, roots.to_vec())
            }
            Way::Attest | Way::AttestAnew => {
                let trust = self.trust_for(way).await?;
                let connection = self.upstream.stranger(trust.clone(), deadline).await?;
                let attested = attest(&connection, self.attestor.as_ref(), csr).await?;
                self.check("AttestAgent", &attested.chain, &key)?;
                self.keep_first(&attested, trust).await?;
                let mut client = BundleClient::new(connection.clone());
                let request = GetBundleRequest { output_mask: Some(bundles::BUNDLE_MASK) };
                let told = connection.answer("GetBundle", client.get_bundle(request)).await?.into_inner();
                let told = bundles::read(told, &self.settings.trust_domain).map_err(|fault| {
                    ServerError::Senseless { call: "GetBundle", fault: fault.to_string() }
                })?;
                (attested.chain, attested.reattestable, told.bundle.x509_authorities)
            }
        };
        let call = if way == Way::Renew { "RenewAgent" } else { "AttestAgent" };
        self.check(call, &chain, &key)?;
        self.verify(call, &chain, &roots)?;
        let (kept, bundle) = (chain.clone(), roots.clone());
        self.keep(move |data| {
            *data = AgentData { svid: kept, bundle, reattestable, ..AgentData::default() };
        })
        .await?;
        self.upstream.believe(ServerTrust::Roots(roots.into()));
        if let Some(svid) = self.read(chain, reattestable) {
            self.show(&svid);
        }
        Ok(())
    }

    /// A join token is used up by now: the SVID that it brought is kept, and shown, before anything else can fail. One
    /// that is not verified yet waits for the bundle.
    async fn keep_first(&self, attested: &AttestedAgent, trust: ServerTrust) -> Result<(), ServerError> {
        let ServerTrust::Roots(roots) = trust else { return Ok(()) };
        let AttestedAgent { chain, reattestable } = attested.clone();
        if !self.data.known().svid.is_empty() || self.verify("AttestAgent", &chain, &roots).is_err() {
            return Ok(());
        }
        let (svid, bundle) = (chain.clone(), roots.to_vec());
        self.keep(move |data| {
            *data = AgentData { svid, bundle, reattestable, ..AgentData::default() };
        })
        .await?;
        self.upstream.believe(ServerTrust::Roots(roots));
        if let Some(svid) = self.read(chain, reattestable) {
            self.show(&svid);
        }
        Ok(())
    }

    /// By what a server is known to which this node attests.
    async fn trust_for(&self, way: Way) -> Result<ServerTrust, ServerError> {
        let data = self.data.known();
        if way == Way::Attest && !data.bundle.is_empty() {
            return Ok(ServerTrust::Roots(data.bundle.into()));
        }
        let join = &self.settings.join;
        let told = Circumstances {
            mode: if way == Way::Attest { "bootstrap" } else { "rebootstrap" },
            attempts: data.connection_attempts,
            since: data.bootstrap_start_time,
            server_address: join.address.clone(),
            server_port: join.port,
        };
        bootstrap::trust(join.trust_source(), &self.settings.trust_domain, &told).await
    }

    /// What came is for the key that was asked for, of an agent of this trust domain, and valid.
    fn check(&self, call: &'static str, chain: &[Vec<u8>], key: &KeyPair) -> Result<(), ServerError> {
        let senseless = |fault: String| ServerError::Senseless { call, fault };
        let svid = self.read(chain.to_vec(), false);
        let svid =
            svid.ok_or_else(|| senseless("the SVID is none, names nobody, or has expired".to_owned()))?;
        let leaf = svid.chain.first().map(Vec::as_slice).unwrap_or_default();
        let of_key = x509_parser::parse_x509_certificate(leaf)
            .is_ok_and(|(_, leaf)| leaf.public_key().subject_public_key.data == key.public_key());
        if !of_key {
            return Err(senseless("the SVID is for another key".to_owned()));
        }
        if svid.id.trust_domain_name() != self.settings.trust_domain.name()
            || !svid.id.path().starts_with("/spire/agent/")
        {
            return Err(senseless(format!("{} is not the ID of an agent of this trust domain", svid.id)));
        }
        Ok(())
    }

    fn verify(&self, call: &'static str, chain: &[Vec<u8>], roots: &[Vec<u8>]) -> Result<(), ServerError> {
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let Some((leaf, rest)) = chain.split_first() else {
            return Err(ServerError::Senseless { call, fault: "there is no SVID".to_owned() });
        };
        // Its first seconds lie in the past, unless this node's clock is behind.
        let now = self.clock.now() + Duration::from_secs(10);
        verify_chain(leaf, rest, roots, now)
            .map_err(|fault| ServerError::Senseless { call, fault: format!("of the SVID, {fault}") })
    }

    async fn next_key(&self) -> Result<KeyPair, ServerError> {
        let keys = Arc::clone(&self.keys);
        let leaf = self.data.known().svid.into_iter().next();
        let made = tokio::task::spawn_blocking(move || keys.make_next(leaf.as_deref())).await;
        match made {
            Ok(Ok(key)) => Ok(key),
            Ok(Err(NewKeyError::Disk(fault))) => Err(ServerError::Disk(Arc::new(fault))),
            Ok(Err(error @ NewKeyError::Crypto(_))) => Err(disk_of(error.to_string())),
            Err(_panicked) => Err(disk_of("making a key failed".to_owned())),
        }
    }

    async fn keep(&self, change: impl FnOnce(&mut AgentData) + Send + 'static) -> Result<(), ServerError> {
        let data = Arc::clone(&self.data);
        match tokio::task::spawn_blocking(move || data.change(change)).await {
            Ok(kept) => kept.map_err(|fault| ServerError::Disk(Arc::new(fault))),
            Err(_panicked) => Err(disk_of("writing failed".to_owned())),
        }
    }

    /// Asks the server once more, over another connection: a denial that is taken back is none.
    async fn is_certain(&self, denial: Denial) -> bool {
        tracing::warn!(%denial, "the server denies this agent; it is asked once more");
        sleep(CONFIRM).await;
        self.upstream.hang_up();
        match self.ask_status().await {
            Err(ServerError::Denied(again)) => again == denial,
            // Expired SVIDs do not get through the handshake everywhere.
            _ => false,
        }
    }

    async fn lost(&self, denial: Denial) -> Denial {
        let removed = self.keep(|data| (data.svid, data.reattestable) = (Vec::new(), false)).await;
        if let Err(error) = removed {
            tracing::warn!(%error, "the agent's SVID cannot be removed");
        }
        self.upstream.show_nothing();
        self.standing.send_replace(OwnStanding::Lost(denial));
        denial
    }

    async fn ask_status(&self) -> Result<(), ServerError> {
        let connection = self.upstream.agent(Instant::now() + LONGEST_CALL).await?;
        let mut client = AgentClient::new(connection.clone());
        let request = PostStatusRequest {
            current_bundle_serial: 0,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        connection.answer("PostStatus", client.post_status(request)).await.map(drop)
    }

    /// Tells the server which agent this is. Of no consequence.
    async fn post_status(&self) {
        if let Ok(Err(error)) = timeout(Duration::from_secs(5), self.ask_status()).await {
            tracing::debug!(%error, "the server was not told of this agent's version");
        }
    }

    fn tell(&self, way: Way, error: &ServerError) {
        let why = error.to_string();
        tracing::warn!(error = why, ?way, "the agent's SVID cannot be had; it is tried again");
        let current = self.current();
        self.standing.send_modify(|standing| match (current, &mut *standing) {
            (Some(_), OwnStanding::Serving { trouble, .. }) => *trouble = Some(why),
            (None, OwnStanding::Waiting { why: told, .. }) => *told = why,
            (None, other) => *other = OwnStanding::Waiting { why, since: self.clock.now() },
            (Some(_), _) => {}
        });
        if self.current().is_none() {
            self.upstream.show_nothing();
        }
    }
}

fn disk_of(fault: String) -> ServerError {
    ServerError::Evidence { attestor: "the agent's key", fault }
}
