//! The agent's own SVID: from the disk, by attestation, and renewed for ever.
//!
//! `course` says when a new one is had and what becomes of failures, `exchange` how. What is on the disk is replaced, and
//! never removed before the server has said twice, over a connection on which it was verified, that it does not know this
//! agent. While there is none, or it cannot be renewed, that is told and tried again; the process does not end for it.

mod course;
mod exchange;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{Notify, watch};

use super::{
    agent_keys::{AgentKeys, KEYS},
    attestation::{NodeAttestor, attestor},
    data::{AGENT_DATA, AgentData, AgentDataFile},
    dial::Dialer,
    error::{DataFault, Denial, ServerError},
    faults::ServerUse,
    files::{OnDamage, UNFINISHED},
    metrics::ServerMetrics,
    reading::SlowReads,
    settings::{KeyManagerSettings, RebootstrapMode, ServerSettings},
    tls::{KeyExchange, ServerTrust, TlsPlan, certified, id_of},
    upstream::Upstream,
};
use crate::{
    identity::{Bundle, SpiffeId, Tainted},
    issuer::files::{DirLock, FileDir},
    os::{clock::Clock, trusted::Trust},
};

/// The file in `data_dir` that one agent holds.
const LOCK: &str = "durward.lock";

/// Whether an agent has the directory, as far as the user of `trust` can tell.
pub fn is_in_use(path: &Path, trust: Trust) -> bool {
    FileDir::look_at(path, trust, UNFINISHED).is_ok_and(|dir| dir.is_some_and(|dir| dir.is_locked(LOCK)))
}

/// Whether what is on the disk is all that this node is known by: a join token was used up for it.
fn is_irreplaceable(settings: &ServerSettings) -> bool {
    let is_kept = matches!(settings.key_manager, KeyManagerSettings::Disk(_));
    is_kept && attestor(settings).name() == "join_token"
}

/// Whether a restart would leave this node without what the server knows it by, and without a way to attest anew.
pub fn forgets(settings: &ServerSettings) -> bool {
    settings.key_manager == KeyManagerSettings::Memory && attestor(settings).name() == "join_token"
}

/// What is said of that.
pub const FORGETS: &str = "the agent's key ends with the process, and a join token is good for one attestation: after a restart \
                           this node needs another token (KeyManager \"disk\" keeps the key)";

/// Whether trust could never be begun anew, in spite of what is asked for: this node cannot attest again.
pub fn is_bound(settings: &ServerSettings) -> bool {
    settings.join.rebootstrap_mode == RebootstrapMode::Auto && attestor(settings).name() == "join_token"
}

/// What is said of that.
pub const IS_BOUND: &str = "\"auto\" does nothing here: a join token is good for one attestation, and only a node that can attest again \
                            can begin anew";

/// Which roots count where the server is signed by others than those on the disk, and what an admin does about it.
fn kept_roots(settings: &ServerSettings) -> &'static str {
    let has_token = attestor(settings).name() == "join_token";
    match settings.join.rebootstrap_mode {
        _ if has_token => {
            "only the roots kept in data_dir count, and no trust_bundle setting while they are there: if the server began anew with \
             another CA, stop the agent, move agent-data.json away, and start it with the new trust bundle and a new join token"
        }
        RebootstrapMode::Never => {
            "only the roots kept in data_dir count, and no trust_bundle setting while they are there: if the server began anew with \
             another CA, set rebootstrap_mode = \"auto\" and restart the agent, with the new trust bundle"
        }
        RebootstrapMode::Auto | RebootstrapMode::Always => {
            "only the roots kept in data_dir count until rebootstrap_delay has passed; then the trust_bundle setting does"
        }
    }
}

/// An SVID is kept with which this node cannot attest again, where that is demanded.
fn check_reattestable(settings: &ServerSettings, kept: AgentData, now: SystemTime) -> Result<(), DataFault> {
    let svid = parsed(kept.svid, kept.reattestable);
    let is_bound = svid.is_some_and(|svid| !svid.reattestable && now < svid.not_after);
    if is_bound && settings.join.rebootstrap_mode == RebootstrapMode::Always {
        let path = settings.data_dir.join(AGENT_DATA);
        return Err(DataFault::NotReattestable { path });
    }
    Ok(())
}

/// Looks at what is on the disk as a start with these settings by the user of `trust` would, and changes nothing.
///
/// # Errors
/// Why it would end, and of which directory.
pub fn check_kept(settings: &ServerSettings, trust: Trust) -> Result<(), (PathBuf, DataFault)> {
    let look = |path: &Path, open: &dyn Fn(FileDir) -> Result<(), DataFault>| {
        let looked = match FileDir::look_at(path, trust, UNFINISHED) {
            Ok(dir) => dir.map_or(Ok(()), open),
            Err(fault) => Err(fault.into()),
        };
        match looked {
            Err(DataFault::Damaged { .. } | DataFault::NotReplaced { .. }) if !is_irreplaceable(settings) => {
                Ok(())
            }
            looked => looked.map_err(|fault| (path.to_owned(), fault)),
        }
    };
    let data = |dir: FileDir| {
        dir.could_lock(LOCK)?;
        dir.could_write(AGENT_DATA)?;
        let data = AgentDataFile::open(dir, &settings.trust_domain, OnDamage::Look)?;
        check_reattestable(settings, data.known(), Clock::SYSTEM.now())
    };
    let read_keys = |dir: FileDir| {
        dir.could_write(KEYS)?;
        AgentKeys::open(dir, OnDamage::Look).map(drop)
    };
    look(&settings.data_dir, &data)?;
    match &settings.key_manager {
        KeyManagerSettings::Memory => Ok(()),
        KeyManagerSettings::Disk(keys) => look(keys, &read_keys),
    }
}

/// The longest of one exchange with the server.
const LONGEST_CALL: Duration = Duration::from_secs(30);

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

/// Has the agent's own SVID, and renews it.
#[derive(Debug)]
pub struct OwnSvid {
    settings: ServerSettings,
    live: Mutex<LiveJoin>,
    clock: Clock,
    upstream: Arc<Upstream>,
    data: Arc<AgentDataFile>,
    keys: Arc<AgentKeys>,
    standing: watch::Sender<OwnStanding>,
    at_once: Notify,
    /// Other settings came.
    reconfigured: Notify,
    /// The server answers again.
    back: watch::Sender<()>,
    slow: SlowReads,
    /// The server has told what there is.
    heard: AtomicBool,
    /// `None` once `data_dir` is another agent's.
    lock: Mutex<Option<DirLock>>,
}

/// What may change of the settings while it runs.
#[derive(Clone, Debug)]
struct LiveJoin {
    attestor: Arc<dyn NodeAttestor>,
    availability_target: Option<Duration>,
}

impl From<&ServerSettings> for LiveJoin {
    fn from(settings: &ServerSettings) -> Self {
        Self { attestor: attestor(settings).into(), availability_target: settings.availability_target }
    }
}

impl OwnSvid {
    /// Opens `data_dir`, and takes the SVID that lies there if it can be used. Waits for the disk, and for nothing else.
    ///
    /// # Errors
    /// Another agent uses the directory, a file in it is damaged or open to others, or it is of another trust domain.
    pub fn open(
        settings: ServerSettings,
        clock: Clock,
        metrics: Arc<ServerMetrics>,
    ) -> Result<Arc<Self>, DataFault> {
        let dir = FileDir::open(&settings.data_dir, UNFINISHED)?;
        let lock = dir.lock(LOCK)?;
        let on_damage = if is_irreplaceable(&settings) { OnDamage::End } else { OnDamage::GoOn };
        let data = Arc::new(AgentDataFile::open(dir, &settings.trust_domain, on_damage)?);
        check_reattestable(&settings, data.known(), clock.now())?;
        let keys = Arc::new(match &settings.key_manager {
            KeyManagerSettings::Memory => AgentKeys::in_memory(),
            KeyManagerSettings::Disk(directory) => {
                AgentKeys::open(FileDir::open(directory, UNFINISHED)?, on_damage)?
            }
        });
        if forgets(&settings) {
            tracing::warn!("{FORGETS}");
        }
        if is_bound(&settings) {
            tracing::warn!("rebootstrap_mode {IS_BOUND}");
        }
        let own = Arc::new(Self::of(settings, clock, metrics, data, keys, Some(lock)));
        own.take_from_disk();
        Ok(own)
    }

    /// What another agent keeps in `data_dir`, as it is at this moment: it is shown to nobody yet, and nothing is ever written.
    /// `None` where nothing is there that this agent would use.
    ///
    /// # Errors
    /// As of [`OwnSvid::open`].
    pub(super) fn look_at(
        settings: ServerSettings,
        clock: Clock,
        metrics: Arc<ServerMetrics>,
    ) -> Result<Option<Arc<Self>>, DataFault> {
        let look = |path: &Path| FileDir::look_at(path, Trust::own(), UNFINISHED);
        let Some(dir) = look(&settings.data_dir)? else { return Ok(None) };
        let read = || -> Result<_, DataFault> {
            let data = AgentDataFile::open(dir, &settings.trust_domain, OnDamage::Look)?;
            let keys = match &settings.key_manager {
                KeyManagerSettings::Memory => AgentKeys::in_memory(),
                KeyManagerSettings::Disk(directory) => match look(directory)? {
                    Some(dir) => AgentKeys::open(dir, OnDamage::Look)?,
                    None => AgentKeys::in_memory(),
                },
            };
            Ok((Arc::new(data), Arc::new(keys)))
        };
        match read() {
            Err(DataFault::Damaged { .. } | DataFault::NotReplaced { .. })
                if !is_irreplaceable(&settings) =>
            {
                Ok(None)
            }
            read => {
                let (data, keys) = read?;
                Ok(Some(Arc::new(Self::of(settings, clock, metrics, data, keys, None))))
            }
        }
    }

    fn of(
        settings: ServerSettings,
        clock: Clock,
        metrics: Arc<ServerMetrics>,
        data: Arc<AgentDataFile>,
        keys: Arc<AgentKeys>,
        lock: Option<DirLock>,
    ) -> Self {
        let key_exchange =
            if settings.sync.require_pq_kem { KeyExchange::PostQuantum } else { KeyExchange::Any };
        let tls = TlsPlan { trust_domain: settings.trust_domain.clone(), key_exchange, clock };
        let roots = ServerTrust::Roots(data.known().bundle.into());
        let dialer = Dialer::new(&settings.join.address, settings.join.port);
        let upstream = Upstream::new(dialer, tls, roots, metrics, kept_roots(&settings));
        let waiting =
            OwnStanding::Waiting { why: "node attestation is under way".to_owned(), since: clock.now() };
        Self {
            live: Mutex::new(LiveJoin::from(&settings)),
            settings,
            clock,
            upstream,
            data,
            keys,
            standing: watch::Sender::new(waiting),
            at_once: Notify::new(),
            reconfigured: Notify::new(),
            back: watch::Sender::new(()),
            slow: SlowReads::default(),
            heard: AtomicBool::new(false),
            lock: Mutex::new(lock),
        }
    }

    /// Takes the settings that may change: another join token is tried at once where one is waited for.
    pub fn reconfigure(&self, settings: &ServerSettings) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = LiveJoin::from(settings);
        self.reconfigured.notify_one();
    }

    /// Leaves `data_dir` to the next agent. Waits for the disk.
    pub fn let_go(&self) {
        self.data.let_go();
        self.keys.let_go();
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn live(&self) -> LiveJoin {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The server answers again: an SVID that it was asked for in vain is asked for at once.
    pub(super) fn server_is_back(&self) {
        self.back.send_replace(());
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
    /// They cannot be written: they are in force until the agent ends, and written with what is written next.
    pub async fn learn(&self, bundle: &Bundle) -> Result<(), ServerError> {
        self.heard.store(true, Ordering::Relaxed);
        self.upstream.trust(bundle);
        let roots = bundle.x509_authorities.clone();
        self.insist(move |data| data.bundle = roots).await
    }

    /// Whether the server has told since the start what there is, so that somebody may be served.
    fn has_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// Who the agent is by the last SVID that it has or had, and when that ends.
    pub(super) fn last_known(&self) -> Option<(SpiffeId, SystemTime)> {
        let AgentData { svid, bundle, reattestable, .. } = self.data.known();
        let svid = parsed(svid, reattestable).filter(|_| !bundle.is_empty())?;
        Some((svid.id, svid.not_after))
    }

    /// The SVID that is known, while it is valid, its key is there, and so is what verifies it.
    fn current(&self) -> Option<AgentSvid> {
        let data = self.data.known();
        if data.bundle.is_empty() { None } else { self.usable(data) }
    }

    /// The SVID of a server that has not told yet what verifies it.
    fn unproven(&self) -> Option<AgentSvid> {
        let data = self.data.known();
        if data.bundle.is_empty() { self.usable(data) } else { None }
    }

    fn usable(&self, data: AgentData) -> Option<AgentSvid> {
        let svid = self.read(data.svid, data.reattestable)?;
        self.keys.of(svid.chain.first()?)?;
        Some(svid)
    }

    fn read(&self, chain: Vec<Vec<u8>>, reattestable: bool) -> Option<AgentSvid> {
        parsed(chain, reattestable).filter(|svid| self.lasts(svid))
    }

    /// Whether there is time left to begin with it.
    fn lasts(&self, svid: &AgentSvid) -> bool {
        self.clock.now() + LEAST_LEFT < svid.not_after
    }

    fn take_from_disk(&self) {
        let data = self.data.known();
        if data.svid.is_empty() {
            return;
        }
        match self.current() {
            None if self.unproven().is_some() => {}
            None => {
                let reason = match parsed(data.svid, data.reattestable) {
                    None => "it names no agent",
                    Some(svid) if !self.lasts(&svid) => "it has expired",
                    Some(_) => "its key is missing",
                };
                tracing::warn!(
                    file = %self.data.path().display(),
                    reason,
                    "the agent's SVID on the disk is of no use: this node attests again"
                );
            }
            Some(svid) => self.show(&svid),
        }
    }

    /// Shows the SVID that is kept, without a word. Returns whether there is one that can be shown.
    pub(super) fn shows_what_is_kept(&self) -> bool {
        self.current().is_some_and(|svid| self.presents(&svid))
    }

    fn presents(&self, svid: &AgentSvid) -> bool {
        let key = svid.chain.first().and_then(|leaf| self.keys.of(leaf));
        let identity = key.and_then(|key| certified(&svid.chain, &key));
        identity.map(|identity| self.upstream.show(identity)).is_some()
    }

    fn show(&self, svid: &AgentSvid) {
        if !self.presents(svid) {
            return;
        }
        let AgentSvid { id, not_after, reattestable, .. } = svid.clone();
        let is_said = matches!(&*self.standing.borrow(), OwnStanding::Serving { id: of, not_after: until, .. }
            if (of, until) == (&id, &not_after));
        if !is_said {
            tracing::info!(spiffe_id = %id, reattestable, "the agent has its SVID");
        }
        self.upstream.faults().works(ServerUse::OwnSvid);
        self.standing.send_replace(OwnStanding::Serving { id, not_after, reattestable, trouble: None });
    }

    /// Changes what is kept, or nothing of it.
    async fn keep(&self, change: impl FnOnce(&mut AgentData) + Send + 'static) -> Result<(), ServerError> {
        let data = Arc::clone(&self.data);
        on_disk(move || data.change(change)).await
    }

    /// Changes what is known of what is kept, written or not.
    async fn insist(&self, change: impl FnOnce(&mut AgentData) + Send + 'static) -> Result<(), ServerError> {
        let data = Arc::clone(&self.data);
        on_disk(move || data.insist(change)).await
    }
}

fn parsed(chain: Vec<Vec<u8>>, reattestable: bool) -> Option<AgentSvid> {
    let leaf = chain.first()?;
    let id = id_of(leaf)?;
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let at = |seconds: i64| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
    };
    let not_before = at(parsed.validity().not_before.timestamp());
    let not_after = at(parsed.validity().not_after.timestamp());
    Some(AgentSvid { id, chain, not_before, not_after, reattestable })
}

async fn on_disk(work: impl FnOnce() -> Result<(), DataFault> + Send + 'static) -> Result<(), ServerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|fault| ServerError::Disk(Arc::new(fault))),
        Err(_panicked) => Err(key_fault("writing failed".to_owned())),
    }
}

/// Something is wrong with the agent's key.
fn key_fault(fault: String) -> ServerError {
    ServerError::Evidence { attestor: "the agent's key", fault }
}
