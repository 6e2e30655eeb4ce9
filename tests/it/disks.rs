//! Disks that fail an embedded issuer: it signs with what it has, says what is wrong, and makes up for it once the disk is well.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use durward::{
    identity::{KeyType, TrustDomain},
    issuer::embedded::{EmbeddedCa, EmbeddedSettings, IssuerSettings},
};

use crate::support::make_library;

/// When the first authority is made, and when the next is due.
const START: Duration = Duration::from_secs(1_767_225_600);
const DUE: Duration = Duration::from_secs(1_767_225_600 + 13 * 3600);

fn at(time: Duration) -> SystemTime {
    SystemTime::UNIX_EPOCH + time
}

fn opened(data: &Path) -> EmbeddedCa {
    let settings = EmbeddedSettings {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        data_dir: data.to_owned(),
        svid_key_type: KeyType::EcP256,
        issuer: IssuerSettings::default(),
    };
    EmbeddedCa::open(settings, at(START)).unwrap()
}

/// A rotation fails with these words and changes nothing; after `mend` it is made up for.
fn fails_until(ca: &EmbeddedCa, data: &Path, words: &str, mend: impl FnOnce()) {
    let state = || fs::read(data.join("issuer.json")).unwrap();
    let (before, bundle) = (state(), ca.bundle());
    for _ in 0..2 {
        let error = ca.rotate(at(DUE)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(state(), before);
        assert_eq!(ca.bundle(), bundle);
    }
    mend();
    assert!(ca.rotate(at(DUE)).unwrap().bundle_changed, "made up for");
    assert_ne!(state(), before);
    assert_eq!(ca.bundle().x509_authorities.len(), 2);
}

#[test]
fn no_inode_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "nr_inodes=16,mode=0700", "none"]).arg(&data);
    if !mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let ca = opened(&data);
    let fillers: Vec<_> = (0..32)
        .map(|n| data.join(format!("filler{n}")))
        .take_while(|path| fs::write(path, "").is_ok())
        .collect();
    fails_until(&ca, &data, "no space left on device", || {
        fillers.iter().for_each(|path| fs::remove_file(path).unwrap());
    });
    drop(ca);
    assert!(Command::new("umount").arg("-l").arg(&data).status().unwrap().success());
}

/// What stands in front of the C library's: EIO while a file of this name is there.
const BROKEN: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
int fsync(int fd) {
    const char *broken = getenv("DURWARD_TEST_BROKEN");
    if (broken && access(broken, F_OK) == 0) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"#;

#[test]
fn what_is_written_does_not_reach_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (source, library) = (dir.path().join("broken.c"), dir.path().join("broken.so"));
    fs::write(&source, BROKEN).unwrap();
    make_library(&library, &source);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["disks::child_on_a_broken_disk", "--exact", "--nocapture"])
        .env("LD_PRELOAD", &library)
        .env("DURWARD_TEST_BROKEN", dir.path().join("broken"))
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success() && shown.contains("the child got there"), "{shown}");
}

/// A limit on the size of files is a full disk to the agent: it says so, and no signal ends it.
#[test]
fn a_file_that_may_grow_no_more_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    crate::support::write_config(dir.path(), "");
    let run = "ulimit -f 0; exec \"$@\"";
    let mut agent = Command::new("sh");
    agent.args(["-c", run, "sh", env!("CARGO_BIN_EXE_durward"), "run", "--config"]);
    let ended = agent.arg(dir.path().join("agent.conf")).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("file too large"), "{said}");
}

#[test]
fn child_on_a_broken_disk() {
    let Some(broken) = std::env::var_os("DURWARD_TEST_BROKEN") else { return };
    let broken = Path::new(&broken);
    let data = broken.with_file_name("data");
    let ca = opened(&data);
    fs::write(broken, "").unwrap();
    fails_until(&ca, &data, "input/output error", || fs::remove_file(broken).unwrap());
    println!("the child got there");
}
