//! The README is run as it stands: each block of shell commands, and each block of configuration.
//!
//! What cannot run here is in [`ELSEWHERE`], with where it does run.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use durward::config::{Config, ExpandEnv};

use crate::support::{Process, entry, write_config};

/// Blocks that do not run here, by what is in them, and why; each runs where the reason says.
const ELSEWHERE: [(&str, &str); 5] = [
    ("target/release/durward quickstart", "it builds this program: tests/it/cli.rs and screens.rs start it"),
    ("pip install", "it needs PyPI: tests/interop/readme.sh"),
    ("python server.py", "it needs what the block before installs: tests/interop/readme.sh"),
    ("spire-server token generate", "it needs a SPIRE Server: tests/interop/spire.sh"),
    ("kubectl apply -f packaging", "it needs a cluster: tests/interop/kubernetes-cluster.sh"),
];

/// Commands that go on until somebody ends them: they get SIGINT after some seconds.
const ENDLESS: [&str; 3] = ["durward api watch", "durward limits --watch", "durward run"];

/// What this machine need not have, and what stands for it: what is behind it is run.
const STAND_INS: [(&str, &str); 4] = [
    // A process that there is.
    ("--pid 4242", "--pid $$"),
    ("/etc/durward/agent.conf", "other/agent.conf"),
    ("/var/log/durward/audit.jsonl", "audit.jsonl"),
    ("journalctl -u durward -o cat --since 2026-11-23 --until 2026-11-26 |", "cat audit.jsonl |"),
];

/// The blocks of the README in this language.
fn blocks(language: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut blocks: Vec<String> = Vec::new();
    let mut inside = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(_), Some(_)) => inside = None,
            (Some(found), None) => {
                inside = Some(found == language);
                if found == language {
                    blocks.push(String::new());
                }
            }
            (None, Some(true)) => {
                let block = blocks.last_mut().unwrap();
                block.push_str(line);
                block.push('\n');
            }
            (None, _) => {}
        }
    }
    blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_readme_runs() {
    let dir = tempfile::tempdir().unwrap();
    let audit = format!("audit {{ file = \"{}/audit.jsonl\" }}\n", dir.path().display());
    write_config(dir.path(), &[entry("/web", ""), audit].concat());
    let mut agent = Process::spawn(dir.path());
    agent.serving(dir.path()).await;
    for new in ["DIR", "other"] {
        fs::create_dir(dir.path().join(new)).unwrap();
    }
    write_config(&dir.path().join("other"), &entry("/web", ""));
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_durward"), bin.join("durward")).unwrap();
    let path = format!("{}:{}", bin.display(), "/usr/local/bin:/usr/bin:/bin");

    let (mut elsewhere, mut ran) = (Vec::new(), 0);
    for block in blocks("sh") {
        if let Some((what, _)) = ELSEWHERE.iter().find(|(what, _)| block.contains(what)) {
            elsewhere.push(*what);
            continue;
        }
        let block = STAND_INS.iter().fold(block, |block, (theirs, here)| block.replace(theirs, here));
        let lines =
            block.lines().map(|line| match ENDLESS.iter().find(|endless| line.starts_with(**endless)) {
                Some(_) => format!("timeout --signal=INT 3 {line}\n[ $? = 124 ] || [ $? = 0 ] || exit 1"),
                None if line.ends_with('|') => line.to_owned(),
                None => format!("{} || exit 1", line.split('#').next().unwrap()),
            });
        let script = lines.collect::<Vec<_>>().join("\n");
        let out = Command::new("bash")
            .args(["-c", &script])
            .env_clear()
            .env("PATH", &path)
            .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}/api.sock", dir.path().display()))
            .env("DURWARD_ADMIN_SOCKET", dir.path().join("data/admin.sock"))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{script}\n{said}");
        ran += 1;
    }
    assert!(ran >= 5, "{ran} blocks");
    assert_eq!(elsewhere.len(), ELSEWHERE.len(), "what does not run here is there: {elsewhere:?}");
    let written = fs::metadata(dir.path().join("DIR/svid.0.key")).unwrap();
    assert_eq!(written.permissions().mode() & 0o777, 0o600);
}

#[test]
fn every_configuration_of_the_readme_is_valid() {
    let mut seen = 0;
    for block in blocks("hcl") {
        let dir = tempfile::tempdir().unwrap();
        let mut text = block.clone();
        if !text.contains("agent {") {
            text.push_str("agent { trust_domain = \"example.org\" }\n");
        }
        if !text.contains("issuer ") && !text.contains("server_address") {
            text.push_str("issuer \"embedded\" { }\n");
        }
        let path = dir.path().join("agent.conf");
        fs::write(&path, &text).unwrap();
        Config::load(&path, ExpandEnv::No).unwrap_or_else(|error| panic!("{error}\n{text}"));
        seen += 1;
    }
    assert!(seen >= 5, "{seen}");
}
