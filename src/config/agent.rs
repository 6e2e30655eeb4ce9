//! The block `agent`.

use std::path::{Path, PathBuf};

use super::{absent, ratelimit, server::ServerBlock, trust_domain};
use crate::{
    hcl::{
        RestartOnly,
        section::{At, Section},
        settings::{Shown as _, settings},
        tree::quoted,
    },
    identity::{KeyType, TrustDomain},
    peer::{KubernetesSettings, ListenerSettings, socket::MAX_PATH_LEN},
    store::{CacheSettings, Policy},
    telemetry::LogSettings,
};

/// Where the Workload API is served when `socket_path` is not set (spire-agent: `/tmp/spire-agent/public/api.sock`).
pub const DEFAULT_SOCKET_PATH: &str = "/run/durward/public/api.sock";

/// Where keys and state lie when `data_dir` is not set (spire-agent: the working directory).
pub const DEFAULT_DATA_DIR: &str = "/var/lib/durward";

/// Directories that many share: nothing of an agent's own is made directly in one.
const SHARED: [&str; 9] =
    ["/", "/run", "/var", "/var/run", "/var/lib", "/tmp", "/var/tmp", "/dev/shm", "/run/lock"];

/// The admin socket of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminSocket {
    /// The configuration says where. The agent does not start without it.
    Configured(PathBuf),
    /// Where it is when nothing is said. Without it the agent serves all the same, and warns.
    ByDefault(PathBuf),
}

/// `private/admin.sock` beside the directory of the public socket: where the admin socket is by default. `None` where many
/// share what is beside it (`/run`, `/tmp`).
pub fn admin_socket_for(socket_path: &Path) -> Option<PathBuf> {
    let above = socket_path.parent()?.parent()?;
    let shared = SHARED.iter().any(|shared| above == Path::new(shared));
    (!shared).then(|| above.join("private/admin.sock"))
}

settings! {
    /// Where the agent is found, and what it makes.
    pub struct AgentSettings in "agent" {
        /// Where the CA's keys and certificates lie; absolute.
        "data_dir" data_dir: PathBuf = DEFAULT_DATA_DIR.into(), absolute(), needs_restart;
        /// The socket of the Workload API; absolute, at most [`MAX_PATH_LEN`] bytes.
        "socket_path" socket_path: PathBuf = DEFAULT_SOCKET_PATH.into(), absolute_that(fits_a_socket), needs_restart;
        /// The socket for the agent's user and root alone, where it is said; not in or below the directory of `socket_path`.
        /// See [`AgentSettings::admin_socket`].
        "admin_socket_path" admin_socket_path: Option<PathBuf> = None, absolute_that(fits_a_socket), needs_restart;
        /// Whether there is an admin socket.
        "admin_socket_enabled" admin_socket_enabled: bool = true, boolean(), needs_restart;
        /// Whether an agent that finds another one running takes its place, when that hands over.
        "take_over" take_over: bool = false, boolean(), needs_restart;
        /// Whether the agent reloads by itself when the files of its configuration change.
        "watch_config" watch_config: bool = false, boolean(), needs_restart;
        /// The type of the keys in X.509-SVIDs.
        "workload_x509_svid_key_type" svid_key_type: KeyType = KeyType::EcP256,
            parsed(KeyType::parse, KeyType::NAMES), needs_restart;
    }
}

impl AgentSettings {
    /// The admin socket, unless it is switched off: as configured, or [`admin_socket_for`] the public one, or in `data_dir`.
    pub fn admin_socket(&self) -> Option<AdminSocket> {
        if !self.admin_socket_enabled {
            return None;
        }
        Some(match &self.admin_socket_path {
            Some(path) => AdminSocket::Configured(path.clone()),
            None => AdminSocket::ByDefault(
                admin_socket_for(&self.socket_path).unwrap_or_else(|| self.data_dir.join("admin.sock")),
            ),
        })
    }

    /// The admin socket, if it is in or below the directory of the other one: whoever may open that one may look for
    /// others beside it.
    pub(crate) fn admin_socket_beside(&self) -> Option<&Path> {
        let dir = self.socket_path.parent()?;
        self.admin_socket_path.as_deref().filter(|admin| admin.starts_with(dir))
    }
}

/// What the block says.
#[derive(Debug, Default)]
pub(super) struct AgentBlock {
    /// `None` when it is missing or wrong, which was reported.
    pub(super) trust_domain: Option<TrustDomain>,
    pub(super) entries_dir: Option<At<PathBuf>>,
    pub(super) settings: AgentSettings,
    pub(super) log: LogSettings,
    pub(super) policy: Policy,
    pub(super) caches: CacheSettings,
    pub(super) listener: ListenerSettings,
    pub(super) kubernetes: KubernetesSettings,
    pub(super) spire_limits: Vec<ratelimit::SpireKey>,
    pub(super) server: ServerBlock,
}

impl AgentBlock {
    pub(super) fn read(root: &mut Section<'_>, kept: Option<&TrustDomain>) -> Self {
        let Some(mut agent) = root.block("agent") else {
            root.missing("agent", "section must be configured: agent { trust_domain = \"example.org\" }");
            return Self::default();
        };
        let s = &mut agent;
        let mut read = Self {
            trust_domain: own_name(s, kept),
            entries_dir: s.absolute("entries_dir").inspect(|at| {
                s.problems().note_key("agent.entries_dir", Some(at.place));
            }),
            settings: AgentSettings::read(s),
            log: LogSettings::read(s),
            policy: Policy::read(s),
            caches: CacheSettings::read(s),
            listener: within(s, "listener", ListenerSettings::read).unwrap_or_default(),
            kubernetes: within(s, "kubernetes", KubernetesSettings::read).unwrap_or_default(),
            server: ServerBlock::read_agent(s),
            spire_limits: Vec::new(),
        };
        within(s, "experimental", |s| {
            absent::experimental(s);
            read.server.read_experimental(s);
            read.spire_limits = within(s, "ratelimit", ratelimit::spire_keys).unwrap_or_default();
        });
        sockets_apart(s, &read.settings);
        absent::agent(s);
        agent.finish();
        read
    }
}

/// Reads the whole of a block, if it is there.
fn within<T>(s: &mut Section<'_>, key: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> Option<T> {
    let mut block = s.block(key)?;
    let read = read(&mut block);
    block.finish();
    Some(read)
}

/// The trust domain, which is not another than the one that is `kept`, if one is.
fn own_name(s: &mut Section<'_>, kept: Option<&TrustDomain>) -> Option<TrustDomain> {
    let parse =
        |text: &str| trust_domain::parse(text).map_err(|err| format!("{err}; for example: example.org"));
    const KEY: &str = "trust_domain";
    s.problems().note_key("agent.trust_domain", s.set_at(KEY));
    s.missing(KEY, "must be configured: trust_domain = \"example.org\"");
    let At { value: text, place } = s.quoted_string(KEY)?;
    let parsed = parse(text).and_then(|name| match kept {
        Some(kept) if *kept != name => {
            let changed = RestartOnly { key: "agent.trust_domain", old: kept.shown(), new: name.shown() };
            Err(changed.what())
        }
        _ => Ok(name),
    });
    parsed.map_err(|wrong| s.wrong(place, KEY, Some(quoted(text)), wrong)).ok()
}

/// Whether a socket can be there: its address has room for `path`, which is no URL.
pub(super) fn fits_a_socket(path: &Path) -> Result<(), String> {
    let mut names = path.iter();
    if names.any(|name| name == "unix:") {
        let right = Path::new("/").join(names.as_path());
        return Err(format!(
            "must be a path, {}; unix:// is for SPIFFE_ENDPOINT_SOCKET",
            quoted(&right.to_string_lossy())
        ));
    }
    let is_abstract = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"));
    if is_abstract || path.iter().any(|name| name == "tcp:") {
        return Err("must be a path: neither an address of TCP nor an abstract socket is served".to_owned());
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.file_name().is_none() {
        return Err("must end in the name of the socket".to_owned());
    }
    match path.as_os_str().len() {
        ..=MAX_PATH_LEN => Ok(()),
        length => {
            Err(format!("a socket's path can have at most {MAX_PATH_LEN} bytes, and this has {length}"))
        }
    }
}

fn sockets_apart(s: &Section<'_>, settings: &AgentSettings) {
    const KEY: &str = "admin_socket_path";
    if let (Some(admin), Some(place)) = (settings.admin_socket_beside(), s.set_at(KEY)) {
        let message = format!(
            "cannot be in the same directory or a subdirectory as that containing the Workload API socket {} ({})",
            quoted(&settings.socket_path.to_string_lossy()),
            s.whence("socket_path"),
        );
        s.wrong(place, KEY, Some(quoted(&admin.to_string_lossy())), message);
    }
}
