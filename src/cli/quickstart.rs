//! `quickstart`: from nothing to an identity, for a person who sees Durward for the first time.
//!
//! Writes a configuration and an entry for the current user into a directory, starts the agent in this process, and
//! then does what a workload does: calls the socket, verifies what comes back, and shows it. What is there already is
//! kept as it is, whoever edited it. The directory, and the one of the socket when the path would be too long, are
//! the user's alone: a directory of somebody else's, or one that others may write to, is refused, since who writes
//! there decides who is who. Absent on purpose: anything that needs root, systemd or a network.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use nix::unistd::geteuid;
use time::OffsetDateTime;
use tokio::{
    net::UnixStream,
    signal::unix::{Signal, SignalKind, signal},
};

use super::{
    Failure,
    client::Client,
    files::{Batch, Readers},
    jwt::from_struct,
    run::trust_domain,
    socket::{Chosen, Socket},
    svid::X509Answer,
    terminal::{Terminal, clean},
    text::{GoDuration, go_time},
};
use crate::{
    agent::{self, Running},
    api::proto::workload as pb,
    config::{Config, ExpandEnv},
    identity::TrustDomain,
    os::clock::Clock,
    peer::socket::MAX_PATH_LEN,
};

const CONFIG: &str = "agent.conf";
const ENTRIES: &str = "entries.d";
const ENTRY: &str = "me.conf";
const LOG: &str = "agent.log";
/// Apart from each other: whoever is given the directory of the one is not given the other.
const SOCKET: &str = "public/api.sock";
const ADMIN_SOCKET: &str = "private/admin.sock";
const NAME: &str = "durward-quickstart";
const DEFAULT_TRUST_DOMAIN: &str = "example.org";

/// How long the agent, which is this process, may take to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// `quickstart`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct QuickstartArgs {
    /// Where configuration, keys and socket go
    ///
    /// Made when missing; what is there is kept. Without it: /var/lib/durward-quickstart for root,
    /// else $XDG_STATE_HOME/durward-quickstart or ~/.local/state/durward-quickstart.
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    dir: Option<PathBuf>,

    /// The trust domain of a new configuration [default: example.org]
    #[arg(long, value_name = "NAME", value_parser = trust_domain)]
    trust_domain: Option<TrustDomain>,

    /// End once the identities are shown, instead of serving until Ctrl-C
    #[arg(long)]
    exit_after_fetch: bool,
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
pub(super) enum QuickstartError {
    #[error("neither XDG_STATE_HOME nor HOME is an absolute path: say where to write with --dir")]
    NoHome,
    #[error("{}: {source}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("{} must be a directory, not a file or a link", .0.display())]
    NoDirectory(PathBuf),
    #[error("{} belongs to user ID {owner}, this is user ID {}: choose another with --dir", path.display(), geteuid())]
    Owner { path: PathBuf, owner: u32 },
    #[error("{} may be written to by other users (mode {mode:04o}): chmod go-w it, or choose another with --dir", path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("{} must be text without control characters", .0.display())]
    Name(PathBuf),
    #[error("--trust-domain {asked} contradicts {}, where it is {configured}: change it there, or choose another --dir", path.display())]
    TrustDomain { asked: TrustDomain, configured: TrustDomain, path: PathBuf },
    #[error("an agent serves at {} already: end it, or choose another directory with --dir", .0.display())]
    Running(PathBuf),
    #[error("waiting for signals: {0}")]
    Signals(#[source] io::Error),
    #[error("the agent issued no JWT-SVID")]
    NoToken,
}

/// Runs `quickstart`.
pub(super) fn run(args: &QuickstartArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let dir = match &args.dir {
        Some(dir) => absolute(dir)?,
        None => default_dir(geteuid().is_root(), super::environment).ok_or(QuickstartError::NoHome)?,
    };
    terminal.print(&format!("Setting up in {}\n", dir.display()))?;
    let layout = Layout::prepare(dir, args.trust_domain.as_ref())?;
    for (path, fresh, what) in &layout.files {
        let done = if *fresh { "wrote" } else { "kept " };
        terminal.print(&format!("  {done} {path:<20} {what}\n"))?;
    }
    let config = Config::load(&layout.config, ExpandEnv::No)?;
    if let Some(asked) = args.trust_domain.clone().filter(|asked| *asked != config.trust_domain) {
        let (configured, path) = (config.trust_domain, layout.config);
        return Err(QuickstartError::TrustDomain { asked, configured, path }.into());
    }
    let runtime = agent::runtime().map_err(Failure::Agent)?;
    let log = agent::start_log(&config).map_err(Failure::Agent)?;
    let result = runtime.block_on(serve(args, config, terminal));
    runtime.shutdown_timeout(Duration::from_millis(100));
    // What is not written by then is not worth waiting for.
    let _all_written = log.flush(Duration::from_secs(1));
    result
}

async fn serve(args: &QuickstartArgs, config: Config, terminal: &mut Terminal) -> Result<(), Failure> {
    let mut ends = Ends::new().map_err(QuickstartError::Signals)?;
    if UnixStream::connect(&config.agent.socket_path).await.is_ok() {
        return Err(QuickstartError::Running(config.agent.socket_path).into());
    }
    let mut agent = Running::start(config, None, Clock::SYSTEM).map_err(Failure::Agent)?;
    let shown = tokio::select! {
        shown = show(agent.config(), terminal) => shown.map(|()| !args.exit_after_fetch),
        () = ends.next() => Ok(false),
    };
    let result = match shown {
        Ok(true) => {
            let said =
                terminal.print("\nServing. Ctrl-C ends it; run again, and all of it is still there.\n");
            match said {
                Ok(()) => tokio::select! {
                    () = ends.next() => {
                        terminal.note("\nEnding.");
                        Ok(())
                    }
                    // What is left of it ends with this process.
                    fault = agent.failed() => return Err(Failure::Agent(fault)),
                },
                Err(error) => Err(error.into()),
            }
        }
        Ok(false) => Ok(()),
        Err(failure) => Err(failure),
    };
    agent.shutdown().await;
    result
}

/// Fetches, checks and shows what a workload of this user gets.
async fn show(config: &Config, terminal: &mut Terminal) -> Result<(), Failure> {
    let path = &config.agent.socket_path;
    terminal.print(&format!("  serve {SOCKET:<20} {}\n", path.display()))?;
    let socket = Socket { path: path.to_owned(), chosen: Chosen::Own };
    let client = Client::connect(&socket, Some(LIMIT)).await?;
    let now = Clock::SYSTEM.now();
    let answer = X509Answer::verify(client.fetch_x509_svid(terminal).await?, now)?;
    terminal.print(&x509_text(&answer, now))?;

    let audience = NAME.to_owned();
    let tokens = client.fetch_jwt_svid(terminal, std::slice::from_ref(&audience), "").await?;
    let token = tokens.svids.first().ok_or(QuickstartError::NoToken)?;
    let valid =
        client.validate_jwt_svid(terminal, &audience, &token.svid).await.map_err(Failure::Validate)?;
    terminal.print(&jwt_text(&token.svid, valid, now))?;
    Ok(terminal.print(&next_steps(path, config.agent.admin_socket_path.as_deref()))?)
}

fn x509_text(answer: &X509Answer, now: SystemTime) -> String {
    let mut out = String::new();
    for svid in &answer.svids {
        out.push_str("\nX.509-SVID, verified with the trust bundle that came with it\n");
        row(&mut out, "SPIFFE ID", svid.spiffe_id.as_str());
        row(&mut out, "Key type", &svid.leaf.key_type);
        row(&mut out, "Valid until", &until(svid.leaf.not_after, now));
        let chain = std::iter::once((&svid.leaf, "leaf"))
            .chain(svid.intermediates.iter().map(|cert| (cert, "intermediate")))
            .chain(svid.bundle.iter().map(|cert| (cert, "CA, in the bundle")));
        for (at, (cert, what)) in chain.enumerate() {
            let name = if at == 0 { "Chain" } else { "" };
            row(
                &mut out,
                name,
                &format!("{} ({what}, until {})", clean(&cert.subject), go_time(cert.not_after)),
            );
        }
    }
    out
}

fn jwt_text(token: &str, valid: pb::ValidateJwtsvidResponse, now: SystemTime) -> String {
    let mut out = format!("\nJWT-SVID for \"{NAME}\", validated by the agent (ValidateJWTSVID)\n");
    row(&mut out, "SPIFFE ID", &clean(&valid.spiffe_id));
    row(&mut out, "Key type", &token_key_type(token));
    let claims = valid.claims.map(from_struct).unwrap_or_default();
    let expiry = claims
        .get("exp")
        .and_then(serde_json::Value::as_i64)
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    if let Some(expiry) = expiry {
        row(&mut out, "Valid until", &until(expiry, now));
    }
    out
}

/// From the `alg` of the token's header (RFC 7515, section 4.1.1).
fn token_key_type(token: &str) -> String {
    let alg = token
        .split('.')
        .next()
        .and_then(|header| URL_SAFE_NO_PAD.decode(header).ok())
        .and_then(|header| serde_json::from_slice::<serde_json::Value>(&header).ok())
        .and_then(|header| header.get("alg")?.as_str().map(clean))
        .unwrap_or_default();
    let key = match alg.as_str() {
        "ES256" => "ec-p256",
        "ES384" => "ec-p384",
        "RS256" => "rsa",
        _ => return alg,
    };
    format!("{key} ({alg})")
}

fn row(out: &mut String, name: &str, value: &str) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "  {name:<12} {value}");
}

fn until(at: OffsetDateTime, now: SystemTime) -> String {
    let left = Duration::try_from(at - OffsetDateTime::from(now)).unwrap_or_default();
    format!("{} (in {})", go_time(at), GoDuration(Duration::from_secs(left.as_secs())))
}

/// Commands to paste into another terminal.
fn next_steps(socket: &Path, admin: Option<&Path>) -> String {
    let durward = shell_word(&program());
    let path = shell_word(&socket.to_string_lossy());
    let uri = shell_word(&format!("unix://{}", socket.display()));
    let admin = admin.map(|path| {
        let path = shell_word(&path.to_string_lossy());
        format!("{durward} limits --watch --socket-path {path}\n  {durward} explain --socket-path {path} --pid $$\n  ")
    });
    let admin = admin.unwrap_or_default();
    format!(
        "\nIn another terminal, as this user:\n  \
         {durward} api fetch x509 --socket-path {path}\n  \
         {durward} api fetch jwt --audience my-service --socket-path {path}\n  \
         {durward} api watch --socket-path {path}\n  \
         {admin}{durward} healthcheck --socket-path {path}\n\
         Any SPIFFE client finds the agent by\n  \
         export SPIFFE_ENDPOINT_SOCKET={uri}\n"
    )
}

/// What to type to run this program again: its name when the shell finds it, else where it lies.
fn program() -> String {
    let typed = std::env::args_os().next().unwrap_or_else(|| OsString::from("durward"));
    let path = if Path::new(&typed).components().count() > 1 {
        std::env::current_exe().map_or(typed, PathBuf::into_os_string)
    } else {
        typed
    };
    path.to_string_lossy().into_owned()
}

/// `text` as one word of a POSIX shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// What lies where.
struct Layout {
    config: PathBuf,
    /// Name below the directory, whether it was written just now, and what it is.
    files: [(String, bool, String); 2],
}

impl Layout {
    /// Makes the directory and what is missing in it.
    fn prepare(dir: PathBuf, trust_domain: Option<&TrustDomain>) -> Result<Self, Failure> {
        private_dir(&dir)?;
        let entries = dir.join(ENTRIES);
        private_dir(&entries)?;
        let trust_domain = trust_domain.map_or(DEFAULT_TRUST_DOMAIN, TrustDomain::name);
        let uid = geteuid();

        let config = dir.join(CONFIG);
        let config_is_new = missing(&config)?;
        if config_is_new {
            let sockets = socket_dir(&dir, uid.as_raw(), super::environment)?;
            put(&dir, CONFIG, &config_text(&dir, &sockets, trust_domain)?)?;
        }
        let entry_is_new = missing(&entries.join(ENTRY))?;
        if entry_is_new {
            // The trust domain of the configuration that is there, which need not be a new one's.
            let trust_domain = match Config::load(&config, ExpandEnv::No) {
                Ok(config) => config.trust_domain.name().to_owned(),
                Err(errors) => return Err(errors.into()),
            };
            put(&entries, ENTRY, &entry_text(&trust_domain, uid.as_raw()))?;
        }
        Ok(Self {
            config,
            files: [
                (CONFIG.to_owned(), config_is_new, "the agent's configuration".to_owned()),
                (format!("{ENTRIES}/{ENTRY}"), entry_is_new, format!("who user ID {uid} is")),
            ],
        })
    }
}

fn put(dir: &Path, name: &str, text: &str) -> Result<(), Failure> {
    let mut batch = Batch::open(dir)?;
    batch.stage(name, text.as_bytes(), Readers::Owner)?;
    Ok(batch.commit()?)
}

fn missing(path: &Path) -> Result<bool, QuickstartError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(false),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(QuickstartError::Directory { path: path.to_owned(), source }),
    }
}

fn absolute(dir: &Path) -> Result<PathBuf, QuickstartError> {
    std::path::absolute(dir).map_err(|source| QuickstartError::Directory { path: dir.to_owned(), source })
}

/// XDG Base Directory Specification: a relative path there is to be ignored.
fn default_dir(root: bool, environment: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let dir = |name: &str| environment(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = if root {
        PathBuf::from("/var/lib")
    } else {
        dir("XDG_STATE_HOME").or_else(|| dir("HOME").map(|home| home.join(".local/state")))?
    };
    Some(state.join(NAME))
}

/// Makes `path` with mode 0700 if it is missing, and its parents as the umask has them. What is there must be this
/// user's, and nobody else may write to it.
fn private_dir(path: &Path) -> Result<(), QuickstartError> {
    let failed = |source| QuickstartError::Directory { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(failed(err)),
        Ok(()) | Err(_) => {}
    }
    // Not through a link: in /tmp that could be anybody's.
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.is_dir() {
        return Err(QuickstartError::NoDirectory(path.to_owned()));
    }
    if found.uid() != geteuid().as_raw() {
        return Err(QuickstartError::Owner { path: path.to_owned(), owner: found.uid() });
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(QuickstartError::Mode { path: path.to_owned(), mode });
    }
    Ok(())
}

/// The directory below which the sockets are: this one; when its path is too long for them, a short one of this user's alone.
fn socket_dir(
    dir: &Path,
    uid: u32,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf, QuickstartError> {
    let fits = |dir: &Path| {
        [SOCKET, ADMIN_SOCKET].iter().all(|name| dir.join(name).as_os_str().len() <= MAX_PATH_LEN)
    };
    if fits(dir) {
        return Ok(dir.to_owned());
    }
    // The same directory always has the same socket.
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, dir.as_os_str().as_encoded_bytes());
    let hash: String = digest.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let short = environment("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|runtime| runtime.is_absolute() && private_dir(runtime).is_ok())
        .map(|runtime| runtime.join(format!("durward-{hash}")))
        .filter(|short| fits(short))
        .unwrap_or_else(|| PathBuf::from(format!("/tmp/durward-{uid}-{hash}")));
    private_dir(&short)?;
    Ok(short)
}

fn config_text(dir: &Path, sockets: &Path, trust_domain: &str) -> Result<String, QuickstartError> {
    let (data, log) = (quoted(&dir.join("data"))?, quoted(&dir.join(LOG))?);
    let (socket, admin_socket) = (quoted(&sockets.join(SOCKET))?, quoted(&sockets.join(ADMIN_SOCKET))?);
    Ok(format!(
        r#"# Durward's configuration, written by "durward quickstart" and yours from now on: it is never overwritten.
# "durward validate --config THIS_FILE" checks it. An agent that runs reads it again on SIGHUP.

agent {{
    # The name under which identities are issued: spiffe://{trust_domain}/...
    trust_domain = "{trust_domain}"

    # Where workloads ask for their identity. SPIFFE clients find it by SPIFFE_ENDPOINT_SOCKET=unix://PATH.
    socket_path = {socket}

    # Where you ask who calls how often (durward limits), and who a process is taken for (durward explain).
    admin_socket_path = {admin_socket}

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

# Who gets which identity is said in {ENTRIES}/*.conf beside this file, or here in the same form.
"#
    ))
}

fn entry_text(trust_domain: &str, uid: u32) -> String {
    format!(
        r#"# A registration entry: a process that has all of these selectors is this workload.
# SIGHUP makes a running agent read it again; open streams learn of a change at once.

entry "spiffe://{trust_domain}/me" {{
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
fn quoted(path: &Path) -> Result<String, QuickstartError> {
    let text = path
        .to_str()
        .filter(|text| !text.chars().any(char::is_control))
        .ok_or_else(|| QuickstartError::Name(path.to_owned()))?;
    let text = text.replace('\\', r"\\").replace('"', "\\\"");
    Ok(format!("\"{text}\""))
}

/// Ctrl-C and SIGTERM.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Ends {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
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
            let got = default_dir(root, |name| {
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
        private_dir(&base.path().join("new/below")).unwrap();
        assert_eq!(fs::metadata(base.path().join("new/below")).unwrap().mode() & 0o777, 0o700);
        private_dir(&set("readable", 0o755)).unwrap();
        let writable = set("writable", 0o777);
        assert!(matches!(private_dir(&writable), Err(QuickstartError::Mode { mode: 0o777, .. })));
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        assert!(matches!(private_dir(&link), Err(QuickstartError::NoDirectory(_))));
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(private_dir(&file), Err(QuickstartError::NoDirectory(_))));
    }

    #[test]
    fn a_long_path_gets_a_short_socket() {
        let base = tempfile::tempdir().unwrap();
        let runtime = base.path().join("run");
        fs::DirBuilder::new().mode(0o700).create(&runtime).unwrap();
        let long = base.path().join("x".repeat(100));
        let none = |_: &str| None;
        assert_eq!(socket_dir(base.path(), 1, none).unwrap(), base.path());

        let some = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| runtime.clone().into_os_string());
        let got = socket_dir(&long, 1, some).unwrap();
        let longest = got.join(ADMIN_SOCKET);
        assert!(got.starts_with(&runtime) && longest.as_os_str().len() <= MAX_PATH_LEN, "{}", got.display());
        assert_eq!(got, socket_dir(&long, 1, some).unwrap(), "the same again");
        let other = socket_dir(&base.path().join("y".repeat(100)), 1, some).unwrap();
        assert_ne!(got, other, "another directory has another socket");
        assert_eq!(fs::metadata(&got).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn words_survive_the_shell() {
        for (text, want) in [
            ("/run/durward/api.sock", "/run/durward/api.sock"),
            ("/a b", "'/a b'"),
            ("/it's", r"'/it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(text), want);
        }
    }

    /// What is written is read, whatever the directory is called.
    #[test]
    fn the_configuration_that_is_written_is_valid() {
        for name in ["plain", "with space", "quote\"d", "back\\slash", "do${ll}ar", "per%{ce}nt", "héllo"] {
            let base = tempfile::tempdir().unwrap();
            let dir = base.path().join(name);
            let domain = TrustDomain::parse("td.test").unwrap();
            let layout = Layout::prepare(dir.clone(), Some(&domain)).unwrap();
            assert!(layout.files.iter().all(|(_, fresh, _)| *fresh), "{name}");
            let config = Config::load(&layout.config, ExpandEnv::No).unwrap();
            assert_eq!(config.trust_domain, domain, "{name}");
            assert_eq!(config.agent.data_dir, dir.join("data"), "{name}");
            assert_eq!(config.agent.socket_path, dir.join("public/api.sock"), "{name}");
            assert_eq!(config.agent.admin_socket_path, Some(dir.join("private/admin.sock")), "{name}");
            let ids: Vec<_> = config.entries.iter().map(|entry| entry.spiffe_id.to_string()).collect();
            assert_eq!(ids, ["spiffe://td.test/me"], "{name}");

            fs::write(dir.join(ENTRIES).join(ENTRY), "# edited\n").unwrap();
            let again = Layout::prepare(dir.clone(), None).unwrap();
            assert!(again.files.iter().all(|(_, fresh, _)| !*fresh), "{name}");
            assert_eq!(fs::read_to_string(dir.join(ENTRIES).join(ENTRY)).unwrap(), "# edited\n", "{name}");
        }
        let odd = QuickstartError::Name(PathBuf::from("/a\nb"));
        assert_eq!(quoted(Path::new("/a\nb")).unwrap_err().to_string(), odd.to_string());
    }
}
