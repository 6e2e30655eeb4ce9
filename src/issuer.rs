//! Who signs, and where entries and bundles come from: an [`Issuer`], of which the embedded CA is one.
//!
//! It is told whom to sign for; that the caller may have the SVID was decided before, by
//! `store::authorize`. Nothing above this module sees a CA key, or an error of a certain issuer: what could not
//! be signed is a [`MintError`], which says whose fault it is.

pub mod choice;
pub mod embedded;
mod files;
mod keys;
pub mod lookout;
pub mod metrics;
pub(crate) mod renewal;
pub mod server;

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use self::{embedded::EmbeddedSettings, server::ServerSettings};
pub use self::{
    files::{FileDir, FileFault, check_data_dir, check_supplied_secret},
    keys::{KeyFault, seed},
    lookout::{Lookout, Lookouts},
    metrics::SvidKind,
};
use crate::identity::{
    Bundle, Bundles, Entry, EntryIndex, JwtSvid, SpiffeId, Tainted, TrustDomain, X509Svid, bundle::Edition,
};

/// The longest that a call waits for an SVID: as long as spire-agent waits for its server.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Whether an agent has left its state in this directory, of either issuer.
pub fn has_state(data_dir: &Path) -> bool {
    [embedded::STATE, server::AGENT_DATA].iter().any(|name| data_dir.join(name).exists())
}

/// Makes SVIDs, and publishes the entries and bundles that they are made of and verified with.
pub trait Issuer: fmt::Debug + Send + Sync + 'static {
    /// What this issuer publishes, and each change of it.
    fn world(&self) -> watch::Receiver<Arc<World>>;

    /// Makes an X.509-SVID with a new key for each of `entries`: one result each, in their order. An entry that cannot
    /// be signed for holds up no other. What is not made by `deadline` is [`MintError::Late`]. A single one is made before
    /// several, which are made ahead.
    fn mint_x509<'a>(
        &'a self,
        entries: &'a [Arc<Entry>],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<X509Svid, MintError>>>;

    /// Makes a JWT-SVID of the entry for `audience`, of which empty texts are left out. What is not made by
    /// `deadline` is [`MintError::Late`]. It takes of the share of `family`: see
    /// [`Limits::family_of`](crate::limits::Limits::family_of).
    fn mint_jwt<'a>(
        &'a self,
        entry: &'a Arc<Entry>,
        audience: &'a [String],
        family: u64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<JwtSvid, MintError>>;

    /// Whether it could sign SVIDs of this kind at present. Signs nothing and does not wait.
    ///
    /// # Errors
    /// Why it could not.
    fn can_sign(&self, kind: SvidKind) -> Result<(), MintError>;

    /// Says that somebody waits for an entry that may be there by now, for as long as what is returned lives: the issuer
    /// looks for it, and publishes what it finds. `None` where there is none that it does not know.
    fn look_out(&self) -> Option<Lookout>;

    /// Whether X.509-SVIDs are made before somebody asks for them, since that would take a while.
    fn makes_ahead(&self) -> bool;

    /// What is known of the server behind it, where there is one.
    fn server(&self) -> Option<ServerStatus> {
        None
    }

    /// What signs on this node; `None` where a server signs.
    fn ca(&self) -> Option<CaStanding> {
        None
    }

    /// Why what signs on this node cannot be replaced, and since when; `None` while it can, and where a server signs.
    fn rotation_fault(&self) -> Option<(String, SystemTime)> {
        None
    }

    /// Sets the gauges that change with time alone, before they are read.
    fn before_scrape(&self) {}

    /// Takes what a reload of the configuration tells it, for what is made from then on. Cannot fail: what only a
    /// restart can change is the same as before.
    fn reload(&self, told: IssuerInput);

    /// Lets go of what only one agent may have, for the next one: writes nothing from then on, and signs with what it has
    /// until it is dropped. [`Issuer::run`] must have ended. Waits for a write that is under way.
    fn let_go(&self);

    /// Does in the background what the issuer needs to go on signing. Ends only when it never will again.
    fn run(self: Arc<Self>) -> BoxFuture<'static, Expelled>;
}

/// A CA of this node, as of one moment.
#[derive(Clone, Debug)]
pub struct CaStanding {
    /// What verifies what it signs.
    pub bundle: Arc<Bundle>,
    /// Which of its bundles that is.
    pub edition: Edition,
    /// When the certificate was made that signs X.509-SVIDs, and until when it is valid.
    pub x509: (SystemTime, SystemTime),
    /// The same of the key that signs JWT-SVIDs.
    pub jwt: (SystemTime, SystemTime),
}

/// How it goes with the server behind an issuer, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStatus {
    /// Its host and port.
    pub address: String,
    /// Who the agent is to it by the last SVID that it has or had, and when that ends; `None` where it had none.
    pub agent: Option<(SpiffeId, SystemTime)>,
    /// When entries and bundles were last what the server says.
    pub last_sync: Option<SystemTime>,
    /// What is waited for, in words for an admin, and since when.
    pub waits_for: Option<(String, SystemTime)>,
    /// What of it fails, and since when; `None` when nothing does.
    pub last_error: Option<(String, SystemTime)>,
}

/// What the configuration tells an issuer.
#[derive(Clone, Debug)]
pub struct IssuerInput {
    /// Which issuer signs, and how.
    pub choice: IssuerChoice,
    /// The entries that the configuration declares.
    pub index: Arc<EntryIndex>,
    /// The bundles of other trust domains that it names.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
}

/// Which issuer signs, with its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IssuerChoice {
    /// A CA of this node.
    Embedded(EmbeddedSettings),
    /// A SPIRE Server.
    Server(Box<ServerSettings>),
}

/// The entries and bundles that an issuer publishes. Never edited: a change is another world.
#[derive(Debug)]
pub struct World {
    /// Which process is which workload.
    pub index: Arc<EntryIndex>,
    /// What verifies the SVIDs of this trust domain and of those it is federated with. While the own one has no X.509
    /// authority, it is not known yet what there is.
    pub bundles: Bundles,
    /// What signed SVIDs that are to be made anew.
    pub tainted: Arc<Tainted>,
}

/// Why no SVID was made. The text is short and holds nothing of the issuer's, so that it may be sent to callers; the
/// source is for the log.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The request's fault: it fails as often as it comes.
    #[error("{reason}")]
    Request {
        /// What is wrong with it.
        reason: &'static str,
        /// The issuer's own error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The issuer's fault: the same request may pass later.
    #[error("the issuer cannot sign")]
    Issuer {
        /// When to come again, if the issuer knows.
        retry_after: Option<Duration>,
        /// The issuer's own error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The issuer does not sign for this entry, as it is.
    #[error("the issuer cannot sign")]
    Entry {
        /// When to come again, if that is known.
        retry_after: Option<Duration>,
        /// The issuer's own error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The issuer's fault: there was no answer by the deadline. The same request may pass later.
    #[error("the issuer did not answer in time")]
    Late,
}

impl MintError {
    /// When to come again, if the issuer knows.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Issuer { retry_after, .. } | Self::Entry { retry_after, .. } => *retry_after,
            Self::Request { .. } | Self::Late => None,
        }
    }
}

/// The issuer's server does not take this agent any more: nothing is ever signed for it until an admin did something
/// about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server has expelled this agent: {reason}")]
pub struct Expelled {
    /// In words for an admin, and what to do about it.
    pub reason: String,
}

/// Until when a call that begins at this moment waits for an SVID.
pub fn deadline() -> Instant {
    Instant::now() + LONGEST_WAIT
}

/// What `work` gives by `deadline`. Free of a timer where `work` need not wait.
pub(crate) async fn by<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T, MintError>>,
) -> Result<T, MintError> {
    timeout_at(deadline, work).await.unwrap_or(Err(MintError::Late))
}
