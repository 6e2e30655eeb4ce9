//! What the configuration says of a SPIRE Server: where it is, how it is known at first, and how this node is known to it.
//!
//! What is here was checked one key at a time; what several keys say together, where the blocks are read. Nothing here
//! reads a file: paths are absolute, and are read by whoever needs what is in them.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use zeroize::Zeroizing;

use crate::{
    hcl::settings::{KeyChanges, Shown, settings},
    identity::{KeyType, TrustDomain},
};

/// Between two synchronisations, at least: more often would be a load on the server for no use.
const MIN_SYNC_INTERVAL: Duration = Duration::from_millis(500);

/// Between two synchronisations, at most: beyond it lies a mistake.
const MAX_SYNC_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The longest that a caller may be kept waiting for an entry.
const MAX_ENTRY_WAIT: Duration = Duration::from_secs(60);

/// As in spire-agent.
const MIN_CACHE_HIT_TIMEOUT: Duration = Duration::from_secs(5);
/// The default of spire-agent, and more than it takes.
const MAX_CACHE_HIT_TIMEOUT: Duration = Duration::from_secs(30);

settings! {
    /// `agent`, where a SPIRE Server is joined: where it is, and what is known of each other at first.
    pub struct JoinSettings in "agent" {
        /// A host name or an IP address, without a port; empty where no server is joined.
        "server_address" address: String = String::new(), checked(host), needs_restart;
        /// 1 to 65535; 0 where no server is joined.
        "server_port" port: u16 = 0, integer(1..=u16::MAX), needs_restart;
        /// A token that the server gave for one attestation of this node. Comes before any other attestor.
        "join_token" join_token: JoinToken = JoinToken::default(), text(), reloads;
        /// The file that holds one, with white space around it or without; absolute.
        "join_token_file" join_token_file: Option<PathBuf> = None, file(), reloads;
        /// The file of the trust domain's roots by which the server is known at first; absolute.
        "trust_bundle_path" trust_bundle_path: Option<PathBuf> = None, file(), needs_restart;
        /// Where they are fetched from instead: `https://`, or `http://` with `trust_bundle_unix_socket`.
        "trust_bundle_url" trust_bundle_url: Option<String> = None, text(), needs_restart;
        /// The Unix socket over which `trust_bundle_url` is asked; absolute.
        "trust_bundle_unix_socket" trust_bundle_unix_socket: Option<PathBuf> = None, file(), needs_restart;
        /// The socket of another Workload API, absolute, whose bundle holds them.
        "trust_bundle_spiffe_workload_api" trust_bundle_workload_api: Option<PathBuf> = None,
            endpoint(), needs_restart;
        /// The form of what `trust_bundle_path` and `trust_bundle_url` give.
        "trust_bundle_format" trust_bundle_format: TrustBundleFormat = TrustBundleFormat::Pem,
            parsed(TrustBundleFormat::parse, TrustBundleFormat::RIGHT), needs_restart;
        /// Whether the first server that answers is believed.
        "insecure_bootstrap" insecure_bootstrap: bool = false, boolean(), needs_restart;
        /// Whether the agent may begin anew from its source of trust when the server's roots are not known any more.
        "rebootstrap_mode" rebootstrap_mode: RebootstrapMode = RebootstrapMode::Never,
            parsed(RebootstrapMode::parse, RebootstrapMode::RIGHT), needs_restart;
        /// For how long a server with unknown roots is put up with before that.
        "rebootstrap_delay" rebootstrap_delay: Duration = Duration::from_secs(600),
            duration(Duration::ZERO..=Duration::MAX), needs_restart;
        /// How long a caller that no entry fits waits for the server to tell of one, before it is refused.
        "entry_wait" entry_wait: Duration = Duration::from_secs(10),
            duration(Duration::ZERO..=MAX_ENTRY_WAIT), reloads;
    }
}

settings! {
    /// `agent.experimental`, where a SPIRE Server is joined: how the two keep up with each other.
    pub struct SyncSettings in "agent.experimental" {
        /// Between two synchronisations, while nobody waits for one.
        "sync_interval" sync_interval: Duration = Duration::from_secs(5),
            duration(MIN_SYNC_INTERVAL..=MAX_SYNC_INTERVAL), reloads;
        /// Whether entries are asked for by their revisions; else all of them each time.
        "use_sync_authorized_entries" use_sync_authorized_entries: bool = true, boolean(), reloads;
        /// Whether only post-quantum key exchange is used with the server.
        "require_pq_kem" require_pq_kem: bool = false, boolean(), needs_restart;
        /// The longest that a call waits for a new JWT-SVID while the one that is kept is valid.
        "jwt_svid_cache_hit_timeout" jwt_svid_cache_hit_timeout: Duration = MAX_CACHE_HIT_TIMEOUT,
            duration(MIN_CACHE_HIT_TIMEOUT..=MAX_CACHE_HIT_TIMEOUT), reloads;
    }
}

settings! {
    /// `NodeAttestor "x509pop"`: this node is known by a certificate. Without `spiffe_endpoint_socket`, certificate and key
    /// are there.
    pub struct X509PopSettings in "plugins.NodeAttestor \"x509pop\".plugin_data" {
        /// The file of its key, PEM; absolute.
        "private_key_path" private_key: Option<PathBuf> = None, file(), needs_restart;
        /// The file of the certificate, PEM, intermediates behind it; absolute.
        "certificate_path" certificate: Option<PathBuf> = None, file(), needs_restart;
        /// A file of further intermediates, PEM; absolute.
        "intermediates_path" intermediates: Option<PathBuf> = None, file(), needs_restart;
        /// The socket of another Workload API, absolute, whose SVID is taken instead of files.
        "spiffe_endpoint_socket" workload_api: Option<PathBuf> = None, endpoint(), needs_restart;
    }
}

settings! {
    /// `NodeAttestor "k8s_psat"`: this node is known by a token that Kubernetes gave its pod.
    pub struct K8sPsatSettings in "plugins.NodeAttestor \"k8s_psat\".plugin_data" {
        /// The cluster's name in the server's configuration. Never empty once it was checked.
        "cluster" cluster: String = String::new(), string(), needs_restart;
        /// The file of the token; absolute. Read at each attestation.
        "token_path" token: PathBuf = "/var/run/secrets/tokens/spire-agent".into(), absolute(), needs_restart;
    }
}

settings! {
    /// `KeyManager "disk"`: the agent's own key outlives it.
    pub struct DiskKeySettings in "plugins.KeyManager \"disk\".plugin_data" {
        /// The directory of `keys.json`; absolute. Never `None` once it was checked.
        "directory" directory: Option<PathBuf> = None, file(), needs_restart;
    }
}

/// Everything that is said of a server, and what its issuer needs of other settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// The trust domain of the server and of this agent.
    pub trust_domain: TrustDomain,
    /// Where `agent-data.json` lies; absolute.
    pub data_dir: PathBuf,
    /// Key type of the X.509-SVIDs.
    pub svid_key_type: KeyType,
    /// For how long X.509-SVIDs should stay valid should the server fail. Reloads.
    pub availability_target: Option<Duration>,
    /// How many X.509-SVIDs are made ahead at most. Reloads.
    pub prefetch: usize,
    pub join: JoinSettings,
    pub sync: SyncSettings,
    pub node_attestor: NodeAttestorSettings,
    pub key_manager: KeyManagerSettings,
}

/// How this node proves to the server which one it is, unless a join token does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeAttestorSettings {
    /// With the token of [`JoinSettings`] alone.
    JoinToken,
    X509Pop(X509PopSettings),
    K8sPsat(K8sPsatSettings),
}

/// Where the agent's own key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyManagerSettings {
    /// Nowhere: it ends with the process.
    Memory,
    /// In `keys.json` of a directory, which is absolute.
    Disk(PathBuf),
}

/// What the server is known by at first: while nothing is known of it from before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustSource<'a> {
    /// The bundle that another Workload API gives at this socket.
    WorkloadApi(&'a Path),
    /// A bundle from a URL: of the web, or of who listens at the Unix socket.
    Url { url: &'a str, socket: Option<&'a Path>, format: TrustBundleFormat },
    /// A bundle in a file.
    File { path: &'a Path, format: TrustBundleFormat },
    /// Nothing: whoever answers is believed.
    Insecure,
}

impl fmt::Display for TrustSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WorkloadApi(socket) => write!(f, "the Workload API at {}", socket.display()),
            Self::Url { url, .. } => f.write_str(url),
            Self::File { path, .. } => write!(f, "{}", path.display()),
            Self::Insecure => f.write_str("whoever answers"),
        }
    }
}

/// Which of several tokens is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSource<'a> {
    /// As it was written into the configuration.
    Given(&'a JoinToken),
    /// What this file holds at the time.
    File(&'a Path),
}

impl JoinSettings {
    /// Where trust comes from at first. Of several, which the configuration refuses, the first by spire-agent's order.
    pub fn trust_source(&self) -> TrustSource<'_> {
        let format = self.trust_bundle_format;
        if let Some(socket) = &self.trust_bundle_workload_api {
            TrustSource::WorkloadApi(socket)
        } else if let Some(url) = &self.trust_bundle_url {
            TrustSource::Url { url, socket: self.trust_bundle_unix_socket.as_deref(), format }
        } else if let Some(path) = &self.trust_bundle_path {
            TrustSource::File { path, format }
        } else {
            TrustSource::Insecure
        }
    }

    /// The join token, where there is one: it comes before whichever attestor is listed.
    pub fn token(&self) -> Option<TokenSource<'_>> {
        let given = Some(&self.join_token).filter(|token| !token.secret().is_empty());
        given.map(TokenSource::Given).or_else(|| self.join_token_file.as_deref().map(TokenSource::File))
    }
}

impl NodeAttestorSettings {
    /// As the server calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::JoinToken => "join_token",
            Self::X509Pop(_) => "x509pop",
            Self::K8sPsat(_) => "k8s_psat",
        }
    }

    /// Adds what is another in `next`.
    pub(crate) fn compare(&self, next: &Self, changes: &mut KeyChanges) {
        match (self, next) {
            (Self::X509Pop(old), Self::X509Pop(new)) => old.compare(new, changes),
            (Self::K8sPsat(old), Self::K8sPsat(new)) => old.compare(new, changes),
            _ => changes.needs_restart("plugins.NodeAttestor", self, next),
        }
    }
}

impl KeyManagerSettings {
    /// Adds what is another in `next`.
    pub(crate) fn compare(&self, next: &Self, changes: &mut KeyChanges) {
        let disk = |directory: &PathBuf| DiskKeySettings { directory: Some(directory.clone()) };
        match (self, next) {
            (Self::Disk(old), Self::Disk(new)) => disk(old).compare(&disk(new), changes),
            _ => changes.needs_restart("plugins.KeyManager", self, next),
        }
    }
}

impl Shown for NodeAttestorSettings {
    fn shown(&self) -> String {
        self.name().to_owned()
    }
}

impl Shown for KeyManagerSettings {
    fn shown(&self) -> String {
        match self {
            Self::Memory => "memory".to_owned(),
            Self::Disk(directory) => format!("disk in {}", directory.display()),
        }
    }
}

/// A token of the server's for one attestation, or nothing: a secret. Only [`JoinToken::secret`] shows it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct JoinToken(Zeroizing<String>);

impl JoinToken {
    /// The text itself; empty where there is none.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl From<String> for JoinToken {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(..)")
    }
}

/// The form of a bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrustBundleFormat {
    /// Certificates in PEM.
    #[default]
    Pem,
    /// A SPIFFE bundle in JSON, of which the X.509 authorities count.
    Spiffe,
}

impl TrustBundleFormat {
    const RIGHT: &str = "invalid value for trust_bundle_format, expected \"pem\" or \"spiffe\"";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "pem" => Some(Self::Pem),
            "spiffe" => Some(Self::Spiffe),
            _ => None,
        }
    }
}

impl Shown for TrustBundleFormat {
    fn shown(&self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

/// What becomes of an agent whose server has roots that it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebootstrapMode {
    /// It goes on asking.
    #[default]
    Never,
    /// It begins anew from its source of trust, if it can attest again.
    Auto,
    /// It does, and does not start if it could not attest again.
    Always,
}

impl RebootstrapMode {
    const RIGHT: &str = "unknown rebootstrap mode specified: must be never, auto or always";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "never" => Some(Self::Never),
            "auto" => Some(Self::Auto),
            "always" => Some(Self::Always),
            _ => None,
        }
    }
}

impl Shown for RebootstrapMode {
    fn shown(&self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

/// A host without a port, as a resolver takes it.
fn host(text: &str) -> Result<String, &'static str> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let is_ip = bare.parse::<std::net::IpAddr>().is_ok();
    let is_name = |text: &str| {
        text.len() <= 253
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    };
    if is_ip || is_name(bare) {
        Ok(bare.to_owned())
    } else if text.contains("://") {
        Err("must be a host name or an IP address, without a scheme")
    } else if text.contains(':') {
        Err("must be a host name or an IP address; its port is server_port")
    } else {
        Err("must be a host name or an IP address")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses_without_ports() {
        for (text, right) in [
            ("", Some("")),
            ("spire-server", Some("spire-server")),
            ("spire.example.org", Some("spire.example.org")),
            ("127.0.0.1", Some("127.0.0.1")),
            ("::1", Some("::1")),
            ("[::1]", Some("::1")),
            ("host_with_underscores", Some("host_with_underscores")),
            ("spire:8081", None),
            ("https://spire", None),
            ("dns:///spire", None),
            ("a b", None),
        ] {
            assert_eq!(host(text).ok().as_deref(), right, "{text}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        let settings = JoinSettings { join_token: "geheim".to_owned().into(), ..JoinSettings::default() };
        assert!(!format!("{settings:?}").contains("geheim"));
        assert!(matches!(settings.token(), Some(TokenSource::Given(token)) if token.secret() == "geheim"));
    }
}
