//! `agent.conf`: from text to a [`Config`] that is checked in full.
//!
//! The form is spire-agent's (HCL, or the same as JSON), with Durward's own blocks beside it: `issuer`, `entry`,
//! `federation`. Whoever may write these files decides who is who on this node, so files that everybody may write are
//! refused. What is read here is text by an admin: it may be wrong in any way, never panics, and every mistake is
//! reported at once with its place. Nothing is left out silently: an unknown key, and a key of spire-agent that this
//! version does not act on, are errors. A field of [`Config`] is final: no default is left to be applied elsewhere.
//!
//! Absent on purpose: command line flags (`cli`), the environment (a function gives it), opening sockets.

mod check;
mod diff;
mod entries;
mod file;
mod ratelimit;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use diff::{Changes, EntryChanges, RestartOnly, diff};
pub use file::{DropIns, FileError};

use crate::{
    attest,
    hcl::{ConfigError, ConfigErrors, expand},
    identity::{Bundle, Entry, TrustDomain},
    issuer, limits,
    peer::cgroup::{KubeletRoot, KubernetesMode},
};

/// Where the Workload API is served when `socket_path` is not set (spire-agent: `/tmp/spire-agent/public/api.sock`).
pub const DEFAULT_SOCKET_PATH: &str = "/run/durward/public/api.sock";

/// Where keys and state lie when `data_dir` is not set (spire-agent: the working directory).
pub const DEFAULT_DATA_DIR: &str = "/var/lib/durward";

/// Everything the agent is told, checked. Each field is documented with its key in `conf/agent.conf`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `agent.trust_domain`. Required. Restart to change.
    pub trust_domain: TrustDomain,
    /// `agent.socket_path`, absolute, at most 107 bytes. Default [`DEFAULT_SOCKET_PATH`]. Restart to change.
    pub socket_path: PathBuf,
    /// `agent.admin_socket_path`, absolute, and not in or below the directory of `socket_path`. For the agent's user and root
    /// alone. Default: none. Restart to change.
    pub admin_socket_path: Option<PathBuf>,
    /// `agent.data_dir`, absolute. Default [`DEFAULT_DATA_DIR`]. Restart to change.
    pub data_dir: PathBuf,
    /// `agent.log_*`.
    pub log: Log,
    /// `issuer "embedded"`, with `agent.workload_x509_svid_key_type`.
    pub issuer: issuer::embedded::EmbeddedSettings,
    /// `entry`, of `agent.conf` first, then of the drop-in files in the order of their names. Unique by
    /// [`Entry::id`]. Reloads.
    pub entries: Vec<Arc<Entry>>,
    /// `federation`. Never holds the own trust domain. Reloads.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// `plugins.WorkloadAttestor.unix`. Reloads.
    pub unix: attest::unix::Settings,
    /// `agent.allow_unauthenticated_verifiers`: whether callers without an identity receive bundles. Default false.
    /// Reloads.
    pub allow_unauthenticated_verifiers: bool,
    /// `agent.allowed_foreign_jwt_claims`: claims of foreign JWT-SVIDs that ValidateJWTSVID passes on. Reloads.
    pub allowed_foreign_jwt_claims: BTreeSet<String>,
    /// `agent.availability_target`, at least 24 h. Default: none. Reloads.
    pub availability_target: Option<Duration>,
    /// `agent.x509_svid_cache_max_size`, in SVIDs, at least 1. Default 1000. Reloads.
    pub x509_svid_cache_max_size: usize,
    /// `agent.jwt_svid_cache_max_size`, in tokens, at least 1. Default 1000. Reloads.
    pub jwt_svid_cache_max_size: usize,
    /// `telemetry.Prometheus`. Default: none. Restart to change.
    pub prometheus: Option<HostPort>,
    /// `health_checks`, when `listener_enabled`. Default: none. Restart to change.
    pub health: Option<Health>,
    /// `agent.listener.drain_timeout`: how long calls in flight may go on after SIGTERM; at most 5 min.
    /// Default 5 s. Reloads.
    pub drain_timeout: Duration,
    /// `ratelimit`, and whose subordinate UIDs are whose. Reloads, and keeps what was spent.
    pub ratelimit: limits::Settings,
    /// `agent.kubernetes`. Restart to change.
    pub kubernetes: Kubernetes,
}

/// `agent.kubernetes`: how the pod of a caller is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// `mode`: `auto`, `on` or `off`. Default `auto`.
    pub mode: KubernetesMode,
    /// `kubelet_cgroup_root`. Default: where the kubelet puts pods by itself.
    pub kubelet_root: KubeletRoot,
}

/// `agent.log_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// `log_level`. `panic` and `fatal`, which spire-agent knows, are `error` here. Default `info`. Reloads.
    pub level: tracing::Level,
    /// `log_format`. Default `text`. Restart to change.
    pub format: LogFormat,
    /// `log_file`, absolute. Default: standard output. Restart to change.
    pub file: Option<PathBuf>,
    /// `log_source_location`: whether a line says where in the code it was written. Default false. Restart to change.
    pub source_location: bool,
    /// `log_selectors`: beginnings (`k8s:ns`) of selectors that may stand in the log line of a caller without an
    /// identity. Default: none. Reloads.
    pub selectors: Vec<String>,
}

/// `agent.log_format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A TCP address whose host may be a name: `localhost:9988`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an IP address without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

/// `health_checks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// `bind_address` and `bind_port`. Default `localhost:80`.
    pub bind: HostPort,
    /// `live_path`. Default `/live`.
    pub live_path: String,
    /// `ready_path`. Default `/ready`.
    pub ready_path: String,
}

/// Whether `$VAR` and `${VAR}` are replaced in the whole text before it is read (`-expandEnv`).
#[derive(Clone, Copy)]
pub enum ExpandEnv<'a> {
    /// The text is read as it is.
    No,
    /// The function gives a variable's value; `None` is replaced by nothing.
    With(&'a dyn Fn(&str) -> Option<String>),
}

impl ExpandEnv<'_> {
    fn apply(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::No => Cow::Borrowed(text),
            Self::With(value_of) => Cow::Owned(expand::expand(text, value_of)),
        }
    }
}

/// A configuration before it is read: the text, and how to reach the files that it names.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The path of `agent.conf`, for messages and for `entries.d` beside it.
    pub path: &'a Path,
    /// Its text: HCL, or JSON.
    pub text: &'a str,
    /// The working directory, where relative paths start.
    pub base: &'a Path,
    /// Whether variables are replaced, here and in the drop-in files.
    pub expand_env: ExpandEnv<'a>,
    /// Reads the drop-in files of a directory, in the order of their names; `None` when there is no such directory.
    pub drop_ins: &'a dyn Fn(&Path) -> Result<Option<DropIns>, FileError>,
    /// The UID of a user of this node.
    pub user_id: &'a dyn Fn(&str) -> Option<u32>,
    /// Reads a bundle file.
    pub read_bundle: &'a dyn Fn(&Path) -> Result<Vec<u8>, FileError>,
}

impl Config {
    /// Reads `path`, the drop-in files and the bundle files that it names, and checks all of it.
    ///
    /// Relative paths, here and in the file, start at the working directory, as in spire-agent.
    ///
    /// # Errors
    /// Every mistake that was found, in all files.
    pub fn load(path: &Path, expand_env: ExpandEnv<'_>) -> Result<Self, ConfigErrors> {
        let whole_file = |message: String| {
            let file = path.to_owned();
            let error = ConfigError { file, line: 0, column: 0, key: String::new(), value: None, message };
            ConfigErrors::new(vec![error], 0)
        };
        let text = file::read_config(path).map_err(|err| whole_file(err.to_string()))?;
        // No working directory (it was removed): only absolute paths are of use then.
        let base = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let mut config = Self::parse(&Input {
            path,
            text: &text,
            base: &base,
            expand_env,
            drop_ins: &file::read_drop_ins,
            user_id: &file::user_id,
            read_bundle: &file::read_bundle,
        })?;
        config.ratelimit.families = file::families(Path::new("/etc/subuid"));
        Ok(config)
    }

    /// Checks a configuration whose text is at hand. Touches nothing but what `input` reaches.
    ///
    /// # Errors
    /// Every mistake that was found, in all files.
    pub fn parse(input: &Input<'_>) -> Result<Self, ConfigErrors> {
        check::checked(input)
    }
}
