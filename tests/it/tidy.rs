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

fn rust(dir: &str) -> Vec<(String, String)> {
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
fn generated(name: &str) -> bool {
    name.starts_with("src/api/proto")
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
