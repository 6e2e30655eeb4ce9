//! Rules about the source that no lint knows, as tests over the files of the repository.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `dir`, without what the compiler makes.
fn files(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![root().join(dir)];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display())) {
            let path = entry.expect("a directory entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if ["target", ".git", "corpus", "artifacts"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                left.push(path);
            } else {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "{dir} holds files");
    found.sort();
    found
}

pub(crate) fn rust(dir: &str) -> Vec<(String, String)> {
    files(dir)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .map(|path| {
            let name = path.strip_prefix(root()).expect("below the root").display().to_string();
            (name, fs::read_to_string(&path).expect("text"))
        })
        .collect()
}

/// Generated from `proto/`; another test compares them.
pub(crate) fn generated(name: &str) -> bool {
    ["src/api/proto", "src/issuer/server/proto/", "tests/it/spire_api/"]
        .iter()
        .any(|place| name.starts_with(place))
}

#[test]
fn every_module_opens_with_what_it_is_for() {
    for (name, text) in rust("src") {
        if generated(&name) || name == "src/main.rs" {
            continue;
        }
        let head = text.lines().take_while(|l| l.starts_with("//!")).count();
        assert!(head > 0, "{name} begins with a //! comment");
        assert!(!text.contains("//! (being built)"), "{name} says what it is for");
    }
}

#[test]
fn unsafe_stands_at_the_edge_only_and_says_why() {
    for (name, text) in rust("src") {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !(code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")) {
                continue;
            }
            assert!(name.starts_with("src/os/"), "{name}:{}: unsafe belongs to src/os/", at + 1);
            let above = lines.iter().take(at).rev().take(6).any(|l| l.contains("// SAFETY:"));
            assert!(above, "{name}:{}: unsafe needs a // SAFETY: comment", at + 1);
        }
    }
}

#[test]
fn no_loose_ends() {
    // Put together here, or this file would find itself.
    let words = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["HA", "CK"]].map(|w| w.concat());
    for dir in ["src", "tests", "proto", "systemd", "packaging", "conf", ".ci"] {
        if !root().join(dir).is_dir() {
            continue;
        }
        for path in files(dir) {
            // What is not text is a fixture.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            for (at, line) in text.lines().enumerate() {
                for word in &words {
                    assert!(!line.contains(word.as_str()), "{}:{}: {word}", path.display(), at + 1);
                }
            }
        }
    }
}

#[test]
fn nothing_depends_on_where_it_was_written() {
    let places = [["/wo", "rk/"], ["/ro", "ot/"], ["/home/", "user/"]].map(|p| p.concat());
    for path in files(".") {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (at, line) in text.lines().enumerate() {
            for place in &places {
                assert!(!line.contains(place.as_str()), "{}:{}: {place}", path.display(), at + 1);
            }
        }
    }
}

#[test]
fn the_top_level_is_what_it_is_meant_to_be() {
    let expected = [
        "CHANGELOG.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "conf",
        "packaging",
        "proto",
        "src",
        "systemd",
        "target",
        "tests",
    ];
    for entry in fs::read_dir(root()).expect("the root") {
        let name = entry.expect("a directory entry").file_name().to_string_lossy().into_owned();
        assert!(name.starts_with('.') || expected.contains(&name.as_str()), "{name} at the top level");
    }
}

#[test]
fn the_units_agree_with_the_defaults() {
    let read = |name: &str| fs::read_to_string(root().join("systemd").join(name)).expect(name);
    let (service, socket) = (read("durward.service"), read("durward.socket"));
    let default = durward::config::DEFAULT_SOCKET_PATH;
    assert!(socket.lines().any(|l| l == format!("ListenStream={default}")), "the socket is at {default}");
    let directory = default.strip_prefix("/run/").and_then(|p| p.rsplit_once('/')).expect("below /run").0;
    let runtime =
        service.lines().find_map(|l| l.strip_prefix("RuntimeDirectory=")).expect("RuntimeDirectory=");
    assert!(runtime.split(' ').any(|d| d == directory), "{runtime} holds {directory}");
    let state = durward::config::DEFAULT_DATA_DIR.strip_prefix("/var/lib/").expect("below /var/lib");
    assert!(service.lines().any(|l| l == format!("StateDirectory={state}")), "state is in {state}");
    assert!(service.lines().any(|l| l == "User=durward"), "it does not run as root");
}

/// The commands that a person is told to type, of the shell blocks of a page.
fn told(page: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(page)).expect(page);
    let mut inside = false;
    let mut commands = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            commands.push(line.split('#').next().unwrap_or_default().trim().to_owned());
        }
    }
    commands
}

#[test]
fn the_pages_tell_of_flags_that_exist() {
    let mut seen = 0;
    for page in ["README.md", "packaging/README.md"] {
        for command in told(page) {
            let Some(rest) = command.strip_prefix("durward ") else { continue };
            let words = rest.split(' ').take_while(|word| !word.starts_with(['-', '>', '|']));
            let help = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
                .args(words)
                .arg("--help")
                .output()
                .expect("durward");
            let help = String::from_utf8_lossy(&help.stdout).into_owned();
            assert!(help.contains("Usage: durward "), "{page}: {command}: {help}");
            for flag in rest.split(' ').filter(|word| word.starts_with("--")) {
                assert!(help.contains(flag), "{page}: {command} has no {flag}");
                seen += 1;
            }
        }
    }
    assert!(seen > 3, "{seen} flags were found");
}

#[test]
fn what_is_installed_exists() {
    let mut seen = 0;
    for command in told("packaging/README.md") {
        for word in command.split(' ').filter(|w| w.starts_with("systemd/") || w.starts_with("conf/")) {
            assert!(root().join(word).is_file(), "{word} of: {command}");
            seen += 1;
        }
    }
    assert!(seen > 3, "{seen} files were found");
}

#[test]
fn the_daemon_sets_configuration_is_valid() {
    let manifest =
        fs::read_to_string(root().join("packaging/kubernetes/daemonset.yaml")).expect("the manifest");
    let (_, rest) = manifest.split_once("  agent.conf: |\n").expect("the configuration");
    let config: Vec<&str> = rest.lines().map_while(|line| line.strip_prefix("    ")).collect();
    assert!(config.len() > 10, "{config:?}");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("agent.conf");
    fs::write(&path, config.join("\n")).expect("written");
    let config = durward::config::Config::load(&path, durward::config::ExpandEnv::No).expect("valid");
    assert_eq!(config.agent.socket_path, Path::new(durward::config::DEFAULT_SOCKET_PATH));
    assert!(config.health.enabled);
    for port in [config.prometheus.expect("metrics").port, config.health.port] {
        assert!(manifest.contains(&format!("containerPort: {port}}}")), "port {port} is the container's");
    }
}
