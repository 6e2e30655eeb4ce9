//! What `quickstart` writes, and where: a configuration, an entry for the current user, and the directories of both.
//!
//! What is there already is kept as it is, whoever edited it. Only this user may write to the directory, and to the one of the
//! sockets where that is another: a directory of somebody else's, or one that others may write to, is refused, since who writes
//! there decides who is who. Others may pass both, to reach the socket: what they must not read has modes of its own.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::{Uid, geteuid};

use crate::{
    cli::{
        environment,
        files::{Batch, BatchError, Readers},
        text::shell_word,
    },
    config::{Config, ExpandEnv},
    hcl::ConfigErrors,
    identity::TrustDomain,
    os::{
        sentence::said,
        trusted::{PathError, Trust},
    },
    peer::socket::MAX_PATH_LEN,
};

const CONFIG: &str = "agent.conf";
const ENTRIES: &str = "entries.d";
const ENTRY: &str = "me.conf";
/// The entry of another account, to show that each gets an identity of its own.
const OTHER: &str = "nobody.conf";
/// That account.
pub(super) const NOBODY: u32 = 65_534;
const LOG: &str = "agent.log";
/// What another terminal reads to find the agent.
pub(super) const ENV: &str = "env";
/// Apart from each other: whoever is given the directory of the one is not given the other.
pub(super) const SOCKET: &str = "public/api.sock";
const ADMIN_SOCKET: &str = "private/admin.sock";
/// Of the directory, and the audience of the token that is shown.
pub(super) const NAME: &str = "durward-quickstart";
const DEFAULT_TRUST_DOMAIN: &str = "example.org";

/// Why the directories and files are not as they must be.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum LayoutError {
    #[error("neither XDG_STATE_HOME nor HOME is an absolute path: choose a directory with --dir")]
    NoHome,
    #[error("{}: {}", path.display(), said(cause))]
    Directory { path: PathBuf, cause: io::Error },
    #[error("{} must be a directory, not a file or a link", .0.display())]
    NoDirectory(PathBuf),
    #[error("{} must be a file, not a directory", .0.display())]
    NoFile(PathBuf),
    #[error("{} belongs to user ID {owner}, this is user ID {}: choose another with --dir", path.display(), geteuid())]
    Owner { path: PathBuf, owner: u32 },
    #[error("{} is writable by other users (mode {mode:04o}): chmod go-w it, or choose another with --dir", path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("{} must be text without control characters", .0.display())]
    Name(PathBuf),
    #[error("{0}; choose another directory with --dir")]
    Make(PathError),
    #[error(transparent)]
    Path(PathError),
    #[error(transparent)]
    File(#[from] BatchError),
    #[error(transparent)]
    Config(#[from] ConfigErrors),
}

impl From<PathError> for LayoutError {
    fn from(error: PathError) -> Self {
        match error {
            error @ PathError::Make { .. } => Self::Make(error),
            error => Self::Path(error),
        }
    }
}

/// What lies where.
pub(super) struct Layout {
    pub(super) config: PathBuf,
    /// Name below the directory, whether it was written just now, and what it is.
    pub(super) files: Vec<(String, bool, String)>,
    /// The directory of all of it.
    pub(super) dir: PathBuf,
    /// The directory of the entries.
    pub(super) entries: PathBuf,
}

impl Layout {
    /// Makes `dir` and what is missing in it.
    ///
    /// # Errors
    /// [`LayoutError`]; what was made before stays.
    pub(super) fn prepare(dir: &Path, trust_domain: Option<&TrustDomain>) -> Result<Self, LayoutError> {
        own_dir(dir, 0o755)?;
        let entries = dir.join(ENTRIES);
        own_dir(&entries, 0o700)?;
        let trust_domain = trust_domain.map_or(DEFAULT_TRUST_DOMAIN, TrustDomain::name);
        let uid = geteuid().as_raw();

        let config = dir.join(CONFIG);
        let config_is_new = write_if_missing(dir, CONFIG, || {
            let sockets = socket_dir(dir, uid)?;
            config_text(dir, &sockets, trust_domain)
        })?;
        let mut files = vec![(CONFIG.to_owned(), config_is_new, "the agent's configuration".to_owned())];
        let both = [(ENTRY, uid, "me", "this user"), (OTHER, NOBODY, "nobody", "the account nobody")];
        for (file, user, name, who) in both.into_iter().take(if uid == NOBODY { 1 } else { 2 }) {
            // Once they were there it is the user who says which there are.
            if !config_is_new && file == OTHER && !entries.join(OTHER).exists() {
                continue;
            }
            let fresh = write_if_missing(&entries, file, || {
                // The trust domain of the configuration that is there, which need not be a new one's.
                let config = Config::load(&config, ExpandEnv::No)?;
                Ok(entry_text(config.trust_domain.name(), user, name))
            })?;
            files.push((format!("{ENTRIES}/{file}"), fresh, format!("{who} (user ID {user}) is /{name}")));
        }
        files.extend(others_own(&entries).into_iter().map(|file| (file, false, String::new())));
        Ok(Self { config, dir: dir.to_owned(), entries, files })
    }

    /// Writes what a shell reads to find the agent's socket, and the program where it has to be told that too. Whether it did
    /// not say so already.
    pub(super) fn write_env(&self, program: &Path, socket: &Path) -> Result<bool, LayoutError> {
        let text = env_text(program.parent().filter(|dir| !dir.as_os_str().is_empty()), socket);
        let path = self.dir.join(ENV);
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(false);
        }
        if fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
            return Err(LayoutError::NoFile(path));
        }
        let mut batch = Batch::open(&self.dir)?;
        batch.stage(ENV, text.as_bytes(), Readers::Owner)?;
        batch.commit()?;
        Ok(true)
    }

    /// Takes the directories in `/tmp` away again, where nothing is in them: the next start makes them anew.
    pub(super) fn leave(&self) {
        let dir = short_dir(&self.dir, geteuid().as_raw());
        // Nobody else can put another in its place while it is this user's.
        if !fs::symlink_metadata(&dir).is_ok_and(|found| found.is_dir() && ours(&dir, &found).is_ok()) {
            return;
        }
        let sockets = [SOCKET, ADMIN_SOCKET].map(|name| dir.join(name));
        for dir in sockets.iter().filter_map(|socket| socket.parent()).chain([&*dir]) {
            // What somebody else uses stays.
            let _is_gone = fs::remove_dir(dir);
        }
    }
}

/// How many files of the user's own are listed.
const MOST_FILES: usize = 8;

/// The files of entries that are the user's own, by their names below the directory.
fn others_own(entries: &Path) -> Vec<String> {
    let listed = fs::read_dir(entries).into_iter().flatten().flatten();
    let mut names: Vec<String> = listed
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".conf") && !name.starts_with('.') && name != ENTRY && name != OTHER)
        .filter(|name| !name.chars().any(char::is_control))
        .collect();
    names.sort();
    names.truncate(MOST_FILES);
    names.into_iter().map(|name| format!("{ENTRIES}/{name}")).collect()
}

/// Whether it was missing.
fn write_if_missing(
    dir: &Path,
    name: &str,
    text: impl FnOnce() -> Result<String, LayoutError>,
) -> Result<bool, LayoutError> {
    let path = dir.join(name);
    match fs::symlink_metadata(&path) {
        Ok(_) => Ok(false),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let mut batch = Batch::open(dir)?;
            batch.stage(name, text()?.as_bytes(), Readers::Owner)?;
            batch.commit()?;
            Ok(true)
        }
        Err(cause) => Err(LayoutError::Directory { path, cause }),
    }
}

/// Where everything goes: `asked`, or this user's own directory for state.
///
/// # Errors
/// [`LayoutError::NoHome`] when nothing says where that is.
pub(super) fn dir(asked: Option<&Path>) -> Result<PathBuf, LayoutError> {
    match asked {
        Some(dir) => {
            std::path::absolute(dir).map_err(|cause| LayoutError::Directory { path: dir.to_owned(), cause })
        }
        None => default_dir(geteuid(), environment).ok_or(LayoutError::NoHome),
    }
}

/// XDG Base Directory Specification: a relative path there is to be ignored.
fn default_dir(user: Uid, environment: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let dir = |name: &str| environment(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = if user.is_root() {
        PathBuf::from("/var/lib")
    } else {
        dir("XDG_STATE_HOME").or_else(|| dir("HOME").map(|home| home.join(".local/state")))?
    };
    Some(state.join(NAME))
}

/// Makes `path` with this mode if it is missing, and its parents with 0755. What is there must be this user's, and
/// nobody else may write to it, or to what is above it.
fn own_dir(path: &Path, mode: u32) -> Result<(), LayoutError> {
    match fs::symlink_metadata(path) {
        // Not through a link: in /tmp that could be anybody's.
        Ok(found) if !found.is_dir() => return Err(LayoutError::NoDirectory(path.to_owned())),
        Ok(found) => ours(path, &found)?,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => return Err(LayoutError::Directory { path: path.to_owned(), cause }),
    }
    let made = Trust::own().make_directory_unchecked(path, mode)?;
    ours(path, made.metadata())?;
    let mode = made.metadata().mode() & 0o7777;
    made.for_us_alone().map(drop).map_err(|_untrusted| LayoutError::Mode { path: path.to_owned(), mode })
}

fn ours(path: &Path, found: &fs::Metadata) -> Result<(), LayoutError> {
    if found.uid() == geteuid().as_raw() {
        return Ok(());
    }
    Err(LayoutError::Owner { path: path.to_owned(), owner: found.uid() })
}

/// The directory below which the sockets are: `dir`, or one in `/tmp` when the path of `dir` is too long for them, or others
/// cannot pass it.
fn socket_dir(dir: &Path, uid: u32) -> Result<PathBuf, LayoutError> {
    let fits = [SOCKET, ADMIN_SOCKET].iter().all(|name| dir.join(name).as_os_str().len() <= MAX_PATH_LEN);
    let passes = |dir: &Path| fs::metadata(dir).is_ok_and(|found| found.mode() & 0o001 != 0);
    let open = passes(dir) && Trust::own().route(dir).is_ok_and(|way| way.closed.is_empty());
    if fits && open {
        return Ok(dir.to_owned());
    }
    let short = short_dir(dir, uid);
    own_dir(&short, 0o755)?;
    Ok(short)
}

/// The one in `/tmp`: the same for the same `dir`, always.
fn short_dir(dir: &Path, uid: u32) -> PathBuf {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, dir.as_os_str().as_encoded_bytes());
    let hash: String = digest.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    PathBuf::from(format!("/tmp/durward-{uid}-{hash}"))
}

fn env_text(program_dir: Option<&Path>, socket: &Path) -> String {
    let mut out = "# How a shell finds the agent that \"durward quickstart\" starts, which writes this file: . THIS_FILE\n".to_owned();
    if let Some(dir) = program_dir {
        out.push_str(&format!("export PATH={}:$PATH\n", shell_word(&dir.to_string_lossy())));
    }
    out + &format!("export SPIFFE_ENDPOINT_SOCKET={}\n", shell_word(&format!("unix://{}", socket.display())))
}

fn config_text(dir: &Path, sockets: &Path, trust_domain: &str) -> Result<String, LayoutError> {
    let (data, log) = (quoted(&dir.join("data"))?, quoted(&dir.join(LOG))?);
    let (socket, admin_socket) = (quoted(&sockets.join(SOCKET))?, quoted(&sockets.join(ADMIN_SOCKET))?);
    Ok(format!(
        r#"# Durward's configuration, written by "durward quickstart" and yours from now on: it is never overwritten.
# "durward validate --config THIS_FILE" checks it. A running agent reads it again when it changes.

agent {{
    # The name under which identities are issued: spiffe://{trust_domain}/...
    trust_domain = "{trust_domain}"

    # Where workloads ask for their identity. SPIFFE clients find it by SPIFFE_ENDPOINT_SOCKET=unix://PATH.
    socket_path = {socket}

    # Where you ask how the agent is (durward status), and who a process is taken for (durward explain).
    admin_socket_path = {admin_socket}

    # Changes of this file and of the entries take effect within seconds.
    watch_config = true

    # Keys and state. Whoever can read this can issue identities: its mode is 0700.
    data_dir = {data}

    # error, warn, info, debug or trace.
    log_level = "info"
    log_file = {log}
}}

# Who signs: the agent's own CA, made on first start and rotated by itself.
issuer "embedded" {{
    # How long a CA certificate is valid.
    # ca_ttl = "24h"
}}

plugins {{
    # Tells workloads apart by user, group and, if asked to, executable.
    WorkloadAttestor "unix" {{
        plugin_data {{
            # Also find out unix:path and unix:sha256.
            # discover_workload_path = true
        }}
    }}
}}

# The entries, which say who gets which identity, are in {ENTRIES}/*.conf beside this file. They may stand here too.
"#
    ))
}

fn entry_text(trust_domain: &str, uid: u32, name: &str) -> String {
    format!(
        r#"# A registration entry: a process that has all of these selectors is this workload.
# A running agent reads this file again when it changes, and tells the programs that are connected.

entry "spiffe://{trust_domain}/{name}" {{
    # Processes of user ID {uid}.
    selectors = ["unix:uid:{uid}"]

    # How long certificates and tokens are valid.
    # x509_svid_ttl = "1h"
    # jwt_svid_ttl = "5m"
}}
"#
    )
}

/// A path as an HCL string.
fn quoted(path: &Path) -> Result<String, LayoutError> {
    let text = path
        .to_str()
        .filter(|text| !text.chars().any(char::is_control))
        .ok_or_else(|| LayoutError::Name(path.to_owned()))?;
    let text = text.replace('\\', r"\\").replace('"', "\\\"");
    Ok(format!("\"{text}\""))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_default_directory_is_the_users() {
        let both = [("XDG_STATE_HOME", "/state"), ("HOME", "/home/a")];
        type Case<'a> = (&'a str, bool, &'a [(&'a str, &'a str)], Option<&'a str>);
        let cases: [Case<'_>; 5] = [
            ("root", true, &both, Some("/var/lib/durward-quickstart")),
            ("xdg", false, &both, Some("/state/durward-quickstart")),
            ("home", false, &[("HOME", "/home/a")], Some("/home/a/.local/state/durward-quickstart")),
            (
                "relative xdg",
                false,
                &[("XDG_STATE_HOME", "x"), ("HOME", "/h")],
                Some("/h/.local/state/durward-quickstart"),
            ),
            ("nothing", false, &[], None),
        ];
        for (case, root, environment, want) in cases {
            let user = Uid::from_raw(if root { 0 } else { 1000 });
            let got = default_dir(user, |name| {
                environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
            });
            assert_eq!(got, want.map(PathBuf::from), "{case}");
        }
    }

    #[test]
    fn directories_of_others_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let set = |name: &str, mode| {
            let path = base.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        own_dir(&base.path().join("new/below"), 0o700).unwrap();
        assert_eq!(fs::metadata(base.path().join("new/below")).unwrap().mode() & 0o777, 0o700);
        own_dir(&set("readable", 0o755), 0o700).unwrap();
        let writable = set("writable", 0o777);
        assert!(matches!(own_dir(&writable, 0o700), Err(LayoutError::Mode { mode: 0o777, .. })));
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        assert!(matches!(own_dir(&link, 0o700), Err(LayoutError::NoDirectory(_))));
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(own_dir(&file, 0o700), Err(LayoutError::NoDirectory(_))));
    }

    #[test]
    fn a_long_path_gets_a_short_socket() {
        let base = tempfile::tempdir().unwrap();
        let long = base.path().join("x".repeat(100));
        let set = |mode| fs::set_permissions(base.path(), fs::Permissions::from_mode(mode)).unwrap();
        set(0o755);
        assert_eq!(socket_dir(base.path(), 1).unwrap(), base.path());
        let mut made = Vec::new();
        let short = |dir: &Path| {
            let got = socket_dir(dir, 1).unwrap();
            let longest = got.join(ADMIN_SOCKET);
            assert!(
                got.starts_with("/tmp") && longest.as_os_str().len() <= MAX_PATH_LEN,
                "{}",
                got.display()
            );
            assert_eq!(fs::metadata(&got).unwrap().mode() & 0o777, 0o755);
            got
        };
        made.push(short(&long));
        assert_eq!(made, [short(&long)], "the same again");
        made.push(short(&base.path().join("y".repeat(100))));
        assert_ne!(made[0], made[1], "another directory has another socket");
        // Where others do not pass, they would not reach the socket.
        set(0o700);
        made.push(short(base.path()));
        for dir in made {
            fs::remove_dir(dir).unwrap();
        }
    }

    /// What is written is read, whatever the directory is called.
    #[test]
    fn the_configuration_that_is_written_is_valid() {
        for name in ["plain", "with space", "quote\"d", "back\\slash", "do${ll}ar", "per%{ce}nt", "héllo"] {
            let base = tempfile::tempdir().unwrap();
            fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let dir = base.path().join(name);
            let domain = TrustDomain::parse("td.test").unwrap();
            let layout = Layout::prepare(&dir, Some(&domain)).unwrap();
            assert!(layout.files.iter().all(|(_, fresh, _)| *fresh), "{name}");
            let config = Config::load(&layout.config, ExpandEnv::No).unwrap();
            assert_eq!(config.trust_domain, domain, "{name}");
            assert_eq!(config.agent.data_dir, dir.join("data"), "{name}");
            assert_eq!(config.agent.socket_path, dir.join("public/api.sock"), "{name}");
            assert_eq!(config.agent.admin_socket_path, Some(dir.join("private/admin.sock")), "{name}");
            let ids: Vec<_> = config.entries.iter().map(|entry| entry.spiffe_id.to_string()).collect();
            assert_eq!(ids, ["spiffe://td.test/me", "spiffe://td.test/nobody"], "{name}");

            fs::write(dir.join(ENTRIES).join(ENTRY), "# edited\n").unwrap();
            let again = Layout::prepare(&dir, None).unwrap();
            assert!(again.files.iter().all(|(_, fresh, _)| !*fresh), "{name}");
            assert_eq!(fs::read_to_string(dir.join(ENTRIES).join(ENTRY)).unwrap(), "# edited\n", "{name}");
        }
        let odd = LayoutError::Name(PathBuf::from("/a\nb"));
        assert_eq!(quoted(Path::new("/a\nb")).unwrap_err().to_string(), odd.to_string());
    }
}
