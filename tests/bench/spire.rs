//! The real SPIRE Server, for the benches that need one: 1.15.3, which `tests/interop/spire.sh` leaves in the user's cache
//! (`DURWARD_UPSTREAM_SPIRE` names another directory). Needs python3.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How long it is waited for.
const PATIENCE: Duration = Duration::from_secs(180);

/// An agent at it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    Spire,
    Durward,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Spire => "spire-agent",
            Self::Durward => "durward",
        }
    }

    /// Its program: `DURWARD_BIN`, or this one's, and spire-agent beside the server's.
    pub(crate) fn binary(self, server: &SpireServer) -> PathBuf {
        match self {
            Self::Spire => server.bin.join("spire-agent"),
            Self::Durward => std::env::var_os("DURWARD_BIN")
                .map_or_else(|| env!("CARGO_BIN_EXE_durward").into(), PathBuf::from),
        }
    }
}

/// The SPIRE Server, ended with the bench.
pub(crate) struct SpireServer {
    pub(crate) bin: PathBuf,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
    child: Option<std::process::Child>,
}

impl Drop for SpireServer {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address").port()
}

/// The plugin for a CA above the server's, where `DURWARD_UPSTREAM_AUTHORITY` asks for one: each SVID has an intermediate then.
fn authority_above(dir: &Path) -> String {
    if std::env::var_os("DURWARD_UPSTREAM_AUTHORITY").is_none() {
        return String::new();
    }
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key).expect("a certificate");
    let (certificate, of_key) = (dir.join("above.pem"), dir.join("above.key"));
    std::fs::write(&certificate, root.pem()).expect("written");
    std::fs::write(&of_key, key.serialize_pem()).expect("written");
    format!(
        "UpstreamAuthority \"disk\" {{ plugin_data {{ cert_file_path = {certificate:?} key_file_path = {of_key:?} }} }}"
    )
}

impl SpireServer {
    /// Starts one with nothing in it.
    pub(crate) fn start() -> Self {
        let bin = std::env::var_os("DURWARD_UPSTREAM_SPIRE").map_or_else(
            || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/durward/spire-1.15.3"),
            PathBuf::from,
        );
        let mut server =
            Self { bin, dir: tempfile::tempdir().expect("a directory"), port: free_port(), child: None };
        let at = server.dir.path().display();
        let above = authority_above(server.dir.path());
        let text = format!(
            r#"server {{
  bind_address = "127.0.0.1" bind_port = "{}" socket_path = "{at}/server.sock" trust_domain = "example.org"
  data_dir = "{at}" log_level = "WARN" ca_ttl = "24h" default_x509_svid_ttl = "1h"
  experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{at}/datastore.sqlite3" }} }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{at}/keys.json" }} }}
  NodeAttestor "join_token" {{ plugin_data {{ }} }}
  {above}
}}
"#,
            server.port
        );
        std::fs::write(server.dir.path().join("server.conf"), text).expect("written");
        server.up();
        let roots = server.says(&["bundle", "show"]);
        std::fs::write(server.dir.path().join("roots.pem"), roots).expect("written");
        server
    }

    fn up(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("server.log"));
        let child = Command::new(self.bin.join("spire-server"))
            .args(["run", "-config"])
            .arg(self.dir.path().join("server.conf"))
            .stdin(Stdio::null())
            .stdout(log.expect("a log"))
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.expect("spire-server: run tests/interop/spire.sh first"));
        let began = Instant::now();
        while !self.command(&["healthcheck"]).status().is_ok_and(|status| status.success()) {
            assert!(began.elapsed() < PATIENCE, "the server does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.kill());
        drop(child.wait());
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("spire-server"));
        command.args(words).arg("-socketPath").arg(self.dir.path().join("server.sock"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn says(&self, words: &[&str]) -> String {
        let said = self.command(words).stdout(Stdio::piped()).stderr(Stdio::inherit()).output();
        let said = said.expect("spire-server");
        assert!(said.status.success(), "spire-server {}", words.join(" "));
        String::from_utf8(said.stdout).expect("text")
    }

    pub(crate) fn token(&self) -> String {
        let said = self.says(&["token", "generate", "-spiffeID", "spiffe://example.org/node"]);
        said.lines().find_map(|line| line.strip_prefix("Token: ")).expect("a token").trim().to_owned()
    }

    /// An entry for the user that runs the bench. Its ID.
    pub(crate) fn entry(&self, name: &str) -> String {
        self.entry_of(name, nix::unistd::geteuid().as_raw())
    }

    /// An entry for this user. Its ID.
    pub(crate) fn entry_of(&self, name: &str, uid: u32) -> String {
        self.entry_by(name, &[&format!("unix:uid:{uid}")])
    }

    /// An entry for whoever has these selectors. Its ID.
    pub(crate) fn entry_by(&self, name: &str, selectors: &[&str]) -> String {
        let id = format!("spiffe://example.org/{name}");
        let node = ["-parentID", "spiffe://example.org/node"];
        let selectors = selectors.iter().flat_map(|it| ["-selector", it]).collect::<Vec<_>>();
        let words = [&["entry", "create"], &node[..], &["-spiffeID", &id], &selectors].concat();
        let said = self.says(&words);
        let id = said.lines().find_map(|line| line.strip_prefix("Entry ID"));
        id.and_then(|rest| rest.split(':').nth(1)).expect("an entry").trim().to_owned()
    }

    pub(crate) fn delete(&self, id: &str) {
        self.says(&["entry", "delete", "-entryID", id]);
    }

    /// Has so many entries that are nobody's. They are written into its datastore, since a call for each takes minutes.
    pub(crate) fn has(&mut self, count: u64) {
        const SCRIPT: &str = r#"
import sqlite3, sys
d = sqlite3.connect(sys.argv[1])
numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)" % int(sys.argv[2])
d.execute(numbers + """ INSERT OR IGNORE INTO registered_entries
  (id, created_at, updated_at, entry_id, spiffe_id, parent_id, ttl, admin, downstream, expiry, revision_number, store_svid, hint, jwt_svid_ttl)
  SELECT 1000000 + i, datetime(), datetime(), printf('%08x-0000-4000-8000-%012x', i, i), printf('spiffe://example.org/ns/%d/sa/%d', i % 500, i),
  'spiffe://example.org/node', 0, 0, 0, 0, 0, 0, '', 0 FROM n""")
d.execute(numbers + """ INSERT OR IGNORE INTO selectors (id, created_at, updated_at, registered_entry_id, type, value)
  SELECT 1000000 + i, datetime(), datetime(), 1000000 + i, 'unix', printf('uid:%d', 100000 + i) FROM n""")
d.commit()
"#;
        self.stop();
        let done = Command::new("python3")
            .args(["-c", SCRIPT])
            .arg(self.dir.path().join("datastore.sqlite3"))
            .arg(count.to_string())
            .status();
        assert!(done.expect("python3").success(), "the entries are written");
        self.up();
    }
}
