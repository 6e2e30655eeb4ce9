//! Executables that lie about their path or their content, or make whoever looks at them wait; and beside each one that
//! does not.

use std::{
    fs::{self, File},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use durward::{
    attest::{AttestSettings, Attestor, Blame},
    identity::EntryIndex,
    limits::{Limits, Method, Patience},
};
use futures_util::future::join_all;
use nix::unistd::geteuid;
use tempfile::TempDir;
use tokio::time::timeout;

use crate::{
    attest::{Process, attest, discovering, entry_for, everything, may_be_others, sha256, sleeper, texts},
    fuse::Fuse,
    support::{self, TRUST_DOMAIN, write_config},
};

/// So long nothing here takes that is not held up by somebody else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Words that start a command in a user and a mount namespace of its own, or none where the node forbids it.
fn own_namespace() -> Option<Vec<&'static str>> {
    let start = vec!["unshare", "--user", "--map-root-user", "--mount"];
    let may = Command::new(start[0]).args(&start[1..]).arg("true").output().unwrap();
    if !may.status.success() {
        println!("left out: {}", String::from_utf8_lossy(&may.stderr));
        return None;
    }
    Some(start)
}

/// A program, and a file that becomes it where it is bound over it.
fn program_and_name(dir: &TempDir) -> (PathBuf, PathBuf, String) {
    let (program, name) = (sleeper(dir, "program"), dir.path().join("name"));
    File::create(&name).unwrap();
    let bind = format!("mount --bind {} {} && exec \"$@\"", program.display(), name.display());
    (program, name, bind)
}

fn path_of(name: &Path) -> String {
    format!("unix:path:{}", name.display())
}

#[tokio::test]
async fn a_path_is_not_believed_where_its_user_mounts() {
    let Some(start) = own_namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (_, name, bind) = program_and_name(&dir);
    let attestor = Attestor::new(discovering(0));
    let mut liar = Process::start_by(&dir, &start, &bind);
    liar.execute(&name);
    let refused = attest(&attestor, &liar.peer).await.unwrap_err();
    assert_eq!(refused.to_string(), "the executable is in a mount namespace that the caller made");
    assert_eq!(refused.blame(), Blame::Refusal);

    let questions = attestor.prepare_for(&Arc::default());
    let told = attestor.describe(&attestor.inspect(liar.pid()).await.unwrap(), &questions).await.unwrap();
    let told: Vec<_> = told.untold.iter().map(|it| (it.kind.as_str(), it.why.to_string())).collect();
    assert_eq!(
        told,
        ["unix:path", "unix:sha256"].map(|kind| (kind, refused.to_string())),
        "and people are told"
    );

    // From outside of the namespace, the same file has the same path.
    let through = format!("/proc/{}/root{}", liar.child.id(), name.display());
    let mut outside = Process::start(&dir);
    outside.execute_as(Path::new(&through), &name);
    let refused = attest(&attestor, &outside.peer).await.unwrap_err();
    let want = "the executable is on no file system that is mounted where the caller is";
    assert_eq!(refused.to_string(), want);
    assert_eq!(refused.blame(), Blame::Refusal);

    // Who has no entry that asks for a path is none the worse for it.
    let uid = geteuid();
    for (case, selectors, served) in [
        ("its own entry asks for none", format!("unix:uid:{uid}"), true),
        ("another user's does", format!("unix:uid:3912009 {}", path_of(&name)), true),
        ("its own does", format!("unix:uid:{uid} {}", path_of(&name)), false),
        ("its own asks for a digest", format!("unix:uid:{uid} {}", sha256(Path::new("/bin/sh"))), false),
    ] {
        let questions = attestor.prepare_for(&Arc::new(EntryIndex::new([entry_for(&selectors)])));
        let admitted = Limits::default().admit_caller(Arc::clone(&liar.peer), Method::FetchX509Svid).unwrap();
        let attested = attestor.attest(admitted, &questions).await;
        assert_eq!(attested.is_ok(), served, "{case}: {attested:?}");
    }
}

#[tokio::test]
async fn what_root_mounts_is_believed() {
    if !may_be_others("what_root_mounts_is_believed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (program, name, bind) = program_and_name(&dir);
    let attestor = Attestor::new(discovering(0));
    let mut contained = Process::start_by(&dir, &["unshare", "--mount"], &bind);
    contained.execute(&name);
    let got = texts(&attest(&attestor, &contained.peer).await.unwrap());
    assert!(got.contains(&path_of(&name)) && got.contains(&sha256(&program)), "{got:?}");

    // A service that changes its root no longer sees the mount that its executable is on.
    let own = std::env::current_exe().unwrap();
    let mut chrooted = Process::start(&dir);
    chrooted.order(&format!("chroot {}", dir.path().display()));
    let got = texts(&attest(&Attestor::new(discovering(-1)), &chrooted.peer).await.unwrap());
    assert!(got.contains(&path_of(&own)), "{got:?}");
}

#[tokio::test]
async fn nothing_of_fuse_is_believed_or_asked() {
    if !may_be_others("nothing_of_fuse_is_believed_or_asked") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mounted = dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let Some(fuse) = Fuse::mount(&mounted, Path::new("/bin/sleep")) else { return };
    let mut liar = Process::start(&dir);
    liar.execute(&fuse.program());
    let mut honest = Process::start_as_user(&dir);
    let local = sleeper(&dir, "local");
    honest.execute(&local);
    let attestor = Attestor::new(discovering(0));
    for case in ["it answers", "it does not"] {
        let refused = timeout(PATIENCE, attest(&attestor, &liar.peer)).await.expect(case).unwrap_err();
        assert_eq!(refused.to_string(), "the executable is on a FUSE file system", "{case}");
        assert_eq!(refused.blame(), Blame::Refusal, "{case}");
        let got = timeout(PATIENCE, attest(&attestor, &honest.peer)).await.expect(case).unwrap();
        assert!(texts(&got).contains(&path_of(&local)), "{case}: {got:?}");
        fuse.fall_silent();
    }
}

#[tokio::test]
async fn services_that_start_together_are_all_served() {
    let dir = tempfile::tempdir().unwrap();
    let services: Vec<_> = (0..12)
        .map(|n| {
            let (mut service, program) = (Process::start(&dir), sleeper(&dir, &n.to_string()));
            service.execute(&program);
            (service, program)
        })
        .collect();
    let attestor = Attestor::new(discovering(0));
    let served = join_all(services.iter().map(|(service, _)| attest(&attestor, &service.peer))).await;
    for ((_, program), attested) in services.iter().zip(served) {
        let got = texts(&attested.unwrap());
        assert!(got.contains(&path_of(program)) && got.contains(&sha256(program)), "{got:?}");
    }
}

/// Fifty programs of one user, each to be read, where sixteen of one caller may be attested at once: the others wait.
#[tokio::test]
async fn a_user_whose_services_start_together_waits_and_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let services: Vec<_> = (0..50)
        .map(|n| {
            let (mut service, program) = (Process::start(&dir), sleeper(&dir, &n.to_string()));
            service.execute(&program);
            (service, program)
        })
        .collect();
    let (attestor, limits) = (Attestor::new(discovering(0)), Limits::default());
    let questions = everything(&attestor);
    let served = join_all(services.iter().map(async |(service, _)| {
        let admitted = limits.admit(Arc::clone(&service.peer), Method::FetchX509Svid, Patience::USUAL);
        let attested = attestor.attest(admitted.await.unwrap(), &questions).await.unwrap();
        attested.into_parts().1
    }));
    for ((_, program), attested) in services.iter().zip(served.await) {
        assert!(texts(&attested).contains(&sha256(program)), "{attested:?}");
    }
    assert_eq!((limits.waiting(), limits.attestations()), (0, 0));
}

#[tokio::test]
async fn a_file_without_end_stops_nobody() {
    let dir = tempfile::tempdir().unwrap();
    // As large as the file system allows, and nothing of it on the disk.
    let huge: Vec<PathBuf> = ["huge", "vast"].map(|name| sleeper(&dir, name)).to_vec();
    for path in &huge {
        let file = File::options().write(true).open(path).unwrap();
        let sizes = [43u32, 42, 40, 36].map(|bits| 1u64 << bits);
        assert!(sizes.into_iter().any(|size| file.set_len(size).is_ok()), "a sparse file");
    }
    let mut hostile = [Process::start(&dir), Process::start(&dir)];
    for (process, program) in hostile.iter_mut().zip(&huge) {
        process.execute(program);
    }
    let mut polite = vec![Process::start(&dir)];
    if may_be_others("a_file_without_end_stops_nobody") {
        polite.push(Process::start_as_user(&dir));
    }

    // By default such a file is not read at all.
    let mut standing = AttestSettings::default();
    standing.unix.settings.discover_workload_path = true;
    let refused = attest(&Attestor::new(standing), &hostile[0].peer).await.unwrap_err();
    assert!(refused.to_string().contains("exceeds size limit"), "{refused}");

    let attestor = Attestor::new(discovering(0));
    let endless = join_all(hostile.iter().map(|process| attest(&attestor, &process.peer)));
    let others = async {
        for (n, process) in polite.iter_mut().enumerate() {
            let program = sleeper(&dir, &format!("polite {n}"));
            process.execute(&program);
            let got = attest(&attestor, &process.peer).await.unwrap();
            assert!(texts(&got).contains(&sha256(&program)), "{got:?}");
        }
    };
    tokio::select! {
        biased;
        ended = endless => panic!("{ended:?}"),
        () = others => {}
    }
}

const OWN: &str = env!("CARGO_BIN_EXE_durward");
const AGENT: u32 = 65_534;
const UNREADABLE: u32 = 65_533;
const OTHER: u32 = 65_532;

/// An agent that looks at executables, and its directory. It is started by these words, with an entry for each of these
/// users, which may ask for something more.
async fn agent(dir: TempDir, words: &[&str], entries: &[(u32, String)]) -> (support::Process, TempDir) {
    let entry = |(uid, more): &(u32, String)| {
        format!("entry \"spiffe://{TRUST_DOMAIN}/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"{more}]\n}}\n")
    };
    write_config(dir.path(), &entries.iter().map(entry).collect::<String>());
    let at = dir.path().join("agent.conf");
    let discovering = "plugin_data { discover_workload_path = true }";
    let text = fs::read_to_string(&at).unwrap().replace("plugin_data { }", discovering);
    fs::write(&at, text).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut agent = support::Process::spawn_by(words, dir.path());
    drop(agent.serving(dir.path()).await);
    (agent, dir)
}

/// A call of a user, by a command that ends in this program; how it ends.
fn call(command: &[&str], uid: u32, dir: &TempDir) -> (bool, String) {
    let mut call = Command::new(command[0]);
    call.args(&command[1..])
        .args(["api", "fetch", "jwt", "--audience", "here", "--timeout", "60s"])
        .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}/api.sock", dir.path().display()))
        .current_dir("/")
        .uid(uid)
        .gid(uid);
    let out = loop {
        match call.output() {
            // A process that another test is just starting has what was written here still open.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            out => break out.unwrap(),
        }
    };
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[tokio::test]
async fn an_unreadable_executable_is_no_line_for_each_call() {
    if !may_be_others("an_unreadable_executable_is_no_line_for_each_call") {
        return;
    }
    let entries = [(UNREADABLE, format!(", \"unix:sha256:{}\"", "0".repeat(64))), (OTHER, String::new())];
    // At the start, of the setting and of the entry.
    for (case, capabilities, lines) in [("it may trace", "-all,+sys_ptrace", 0), ("it may not", "-all", 2)] {
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(AGENT), Some(AGENT)).unwrap();
        let uid = AGENT.to_string();
        let words = ["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups"];
        let words = [&words[..], &["--inh-caps", capabilities, "--ambient-caps", capabilities]].concat();
        let (_agent, dir) = agent(dir, &words, &entries).await;
        let unreadable = dir.path().join("unreadable");
        fs::copy(OWN, &unreadable).unwrap();
        fs::set_permissions(&unreadable, fs::Permissions::from_mode(0o711)).unwrap();
        for _ in 0..5 {
            let (served, text) = call(&[unreadable.to_str().unwrap()], UNREADABLE, &dir);
            assert!(!served && text.contains("attestation failed"), "{case}: {text}");
        }
        let (served, text) = call(&[OWN], OTHER, &dir);
        assert!(served, "{case}: {text}");
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log.matches("CAP_SYS_PTRACE").count(), lines, "{case}: {log}");
        assert!(!log.contains("attestation failed"), "{case}: {log}");
        let mut check = Command::new(words[0]);
        check.args(&words[1..]).args([OWN, "validate", "--config"]).arg(dir.path().join("agent.conf"));
        let checked = check.output().unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        let is_warned = said.contains("discover_workload_path: the agent has no CAP_SYS_PTRACE");
        assert!(checked.status.success() && is_warned == (lines > 0), "{case}: {said}");
    }
}

#[tokio::test]
async fn a_path_is_no_identity_for_who_mounts_over_it() {
    let (Some(start), true) =
        (own_namespace(), may_be_others("a_path_is_no_identity_for_who_mounts_over_it"))
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("name");
    File::create(&name).unwrap();
    let asks = format!(", \"{}\"", path_of(&name));
    let (_agent, dir) = agent(dir, &[], &[(UNREADABLE, asks), (OTHER, String::new())]).await;
    let bind = format!("mount --bind {OWN} {0} && exec {0} \"$@\"", name.display());
    let liar = [&start[..], &["sh", "-c", &bind, "sh"]].concat();
    let (served, text) = call(&liar, UNREADABLE, &dir);
    assert!(!served && text.contains("attestation failed"), "{text}");
    let (served, text) = call(&liar, OTHER, &dir);
    assert!(served, "who has an entry without a path: {text}");
    // Root's doing is believed.
    let uid = UNREADABLE.to_string();
    let change = format!("exec setpriv --reuid {uid} --regid {uid} --clear-groups {} \"$@\"", name.display());
    let bind = format!("mount --bind {OWN} {} && {change}", name.display());
    let (served, text) = call(&["unshare", "--mount", "sh", "-c", &bind, "sh"], 0, &dir);
    assert!(served, "{text}");
}
