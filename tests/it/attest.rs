//! The unix attestor and real processes at the other end of real sockets.
//!
//! The processes are this test binary, started again as [`as_peer`]: it becomes the user it is told to be, connects,
//! and then does what it reads from the socket.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock},
    time::Duration,
};

use aws_lc_rs::digest::{SHA256, digest};
use durward::{
    attest::{AttestError, AttestSettings, Attestor, Blame, Questions, Subject, unix::UnixSettings},
    identity::{Entry, EntryAttributes, EntryId, EntryIndex, Selector, Selectors, SpiffeId},
    limits::{CallerKey, Limits, Method, report::Standing},
    peer::{KeyResolver, OsUid, Peer},
    telemetry::metrics::Metrics,
};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    unistd::{Gid, Group, Uid, User, chroot, getegid, geteuid, getgroups, setgroups, setresgid, setresuid},
};
use tempfile::TempDir;

const SOCKET: &str = "DURWARD_TEST_PEER";
const OWNER: &str = "DURWARD_TEST_PEER_OWNER";

/// Numbers of users and groups that nobody has.
const USER: u32 = 3_912_001;
const GROUP: u32 = 3_912_002;
const GROUPS: [u32; 2] = [3_912_003, 3_912_004];
const TOO_MANY: &str = "the caller has more than 1024 supplementary groups";

/// Not a test, but the process at the other end when [`Process`] started it.
#[test]
#[expect(clippy::disallowed_methods, reason = "how a test process is told that it is one")]
#[expect(clippy::exit, reason = "it is a process of its own")]
fn as_peer() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    if let Ok(groups) = std::env::var(OWNER) {
        match groups.parse::<u32>() {
            Ok(many) => {
                setgroups(&(0..many).map(|n| Gid::from_raw(3_914_000 + n)).collect::<Vec<_>>()).unwrap()
            }
            Err(_) => setgroups(&GROUPS.map(Gid::from_raw)).unwrap(),
        }
        let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(GROUP));
        setresgid(gid, gid, gid).unwrap();
        setresuid(uid, uid, Uid::from_raw(0)).unwrap(); // the saved one, to change again when told
    }
    let mut stream = UnixStream::connect(socket).unwrap();
    let orders = BufReader::new(stream.try_clone().unwrap());
    for order in orders.lines() {
        match order.unwrap().split_once(' ').unwrap() {
            ("become", uid) => {
                setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
                let uid = Uid::from_raw(uid.parse().unwrap());
                setresuid(uid, uid, uid).unwrap();
            }
            ("chroot", dir) => chroot(dir).unwrap(),
            ("groups", many) => {
                setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
                let many = many.parse().unwrap_or(0);
                setgroups(&(0..many).map(|n| Gid::from_raw(3_914_000 + n)).collect::<Vec<_>>()).unwrap();
                let uid = Uid::from_raw(USER);
                setresuid(uid, uid, Uid::from_raw(0)).unwrap();
            }
            ("execute", path) => {
                fcntl(&stream, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
                stream.write_all(b".").unwrap();
                loop {
                    let err = Command::new(path).arg("600").exec();
                    // A process that another test starts just now may hold the copy open for a moment.
                    assert_eq!(err.kind(), ErrorKind::ExecutableFileBusy, "{err}");
                }
            }
            ("bequeath", _to_a_child) => {
                let socket = Stdio::from(OwnedFd::from(stream.try_clone().unwrap()));
                // Ends when the test closes its end.
                drop(Command::new("cat").stdin(socket).stdout(Stdio::null()).spawn().unwrap());
                stream.write_all(b".").unwrap();
                std::process::exit(0);
            }
            (other, _) => panic!("no such order: {other}"),
        }
        stream.write_all(b".").unwrap();
    }
}

/// A process that connected, as the agent sees it.
pub(crate) struct Process {
    pub(crate) child: Child,
    stream: UnixStream,
    pub(crate) peer: Arc<Peer>,
}

impl Process {
    /// As the user who runs the test.
    pub(crate) fn start(dir: &TempDir) -> Self {
        Self::with(dir, |_| {})
    }

    /// As [`USER`].
    pub(crate) fn start_as_user(dir: &TempDir) -> Self {
        Self::with(dir, |command| {
            command.env(OWNER, "");
        })
    }

    /// As [`USER`], in so many other groups.
    fn start_in_groups(dir: &TempDir, groups: usize) -> Self {
        Self::with(dir, |command| {
            command.env(OWNER, groups.to_string());
        })
    }

    /// As the user who runs the test, started by these words of a shell's, which end with `exec "$@"`.
    pub(crate) fn start_by(dir: &TempDir, start: &[&str], script: &str) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut command = Command::new(start[0]);
        command.args(&start[1..]).args(["sh", "-c", script, "sh"]).arg(own);
        Self::begin(dir, command)
    }

    fn with(dir: &TempDir, set: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new("/proc/self/exe");
        set(&mut command);
        Self::begin(dir, command)
    }

    fn begin(dir: &TempDir, mut command: Command) -> Self {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = dir.path().join("peer.sock");
        drop(fs::remove_file(&socket));
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        command.args(["--exact", "attest::as_peer"]).env(SOCKET, &socket).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        let peer = Arc::new(Peer::from_stream(&stream, &OsUid).unwrap());
        Self { child, stream, peer }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The same process, charged to whom these keys say.
    pub(crate) fn peer_by(&self, keys: &impl KeyResolver) -> Arc<Peer> {
        Arc::new(Peer::from_stream(&self.stream, keys).unwrap())
    }

    /// Has it do something, and waits until it is done.
    pub(crate) fn order(&mut self, order: &str) {
        writeln!(self.stream, "{order}").unwrap();
        self.stream.read_exact(&mut [0]).unwrap();
    }

    /// Has it execute another program, and waits until it does.
    pub(crate) fn execute(&mut self, program: &Path) {
        self.execute_as(program, program);
    }

    /// The same, with a program whose path is another than the one it is reached by.
    pub(crate) fn execute_as(&mut self, reached_by: &Path, program: &Path) {
        self.order(&format!("execute {}", reached_by.display()));
        // For a moment there is none, as a thread other than the first executes.
        while fs::read_link(format!("/proc/{}/exe", self.child.id())).ok().as_deref() != Some(program) {
            assert!(self.child.try_wait().unwrap().is_none(), "{} was not executed", program.display());
            std::thread::yield_now();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) async fn attest(attestor: &Attestor, peer: &Arc<Peer>) -> Result<Subject, AttestError> {
    attest_for(attestor, peer, &everything(attestor)).await
}

async fn attest_for(
    attestor: &Attestor,
    peer: &Arc<Peer>,
    questions: &Questions,
) -> Result<Subject, AttestError> {
    let admitted = Limits::default().admit_caller(Arc::clone(peer), Method::FetchX509Svid).unwrap();
    Ok(attestor.attest(admitted, questions).await?.into_parts().1)
}

/// What entries ask for that ask for one of these each, once all of it was looked for.
fn asking(attestor: &Attestor, selectors: impl IntoIterator<Item = String>) -> Arc<Questions> {
    let index = Arc::new(EntryIndex::new(selectors.into_iter().map(|it| entry_for(&it))));
    let _asked_until_then = attestor.prepare_for(&index);
    attestor.wait(Duration::from_secs(60));
    attestor.prepare_for(&index)
}

/// The questions of entries that may be anybody's by its executable.
pub(crate) fn everything(attestor: &Attestor) -> Arc<Questions> {
    static ENTRIES: LazyLock<Arc<EntryIndex>> = LazyLock::new(|| {
        let digest = format!("unix:sha256:{}", "0".repeat(64));
        Arc::new(EntryIndex::new([entry_for("unix:path:/nobody"), entry_for(&digest)]))
    });
    attestor.prepare_for(&ENTRIES)
}

/// An entry for who has these selectors.
pub(crate) fn entry_for(selectors: &str) -> Arc<Entry> {
    Arc::new(Entry {
        id: EntryId::new(selectors),
        spiffe_id: SpiffeId::parse("spiffe://example.org/e").unwrap(),
        selectors: selectors.split(' ').map(|selector| Selector::parse(selector).unwrap()).collect(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        hint: Box::default(),
        dns_names: Vec::new(),
        federates_with: BTreeSet::new(),
        created_at: 0,
        revision: 0,
        attributes: EntryAttributes::default(),
    })
}

pub(crate) fn texts(selectors: &Selectors) -> BTreeSet<String> {
    selectors.iter().map(ToString::to_string).collect()
}

pub(crate) fn sha256(path: &Path) -> String {
    let hash = digest(&SHA256, &fs::read(path).unwrap());
    let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("unix:sha256:{hex}")
}

/// Whether a test may make processes of other users; says so if not.
pub(crate) fn may_be_others(test: &str) -> bool {
    let root = geteuid().is_root();
    if !root {
        println!("{test}: the part with another user's process was left out, as it needs root");
    }
    root
}

pub(crate) fn discovering(workload_size_limit: i64) -> AttestSettings {
    let mut settings = AttestSettings::default();
    settings.unix.settings = UnixSettings { discover_workload_path: true, workload_size_limit };
    settings
}

/// A program of our own that does nothing for a long time.
pub(crate) fn sleeper(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    fs::copy("/bin/sleep", &path).unwrap();
    path
}

#[tokio::test]
async fn a_process_is_its_user_and_its_groups() {
    let dir = tempfile::tempdir().unwrap();
    let attestor = Attestor::new(AttestSettings::default());

    let ours = Process::start(&dir);
    let (uid, gid) = (geteuid(), getegid());
    let mut want = BTreeSet::from([format!("unix:uid:{uid}"), format!("unix:gid:{gid}")]);
    want.extend(User::from_uid(uid).unwrap().map(|user| format!("unix:user:{}", user.name)));
    want.extend(Group::from_gid(gid).unwrap().map(|group| format!("unix:group:{}", group.name)));
    for gid in getgroups().unwrap() {
        want.insert(format!("unix:supplementary_gid:{gid}"));
        let named = Group::from_gid(gid).unwrap();
        want.extend(named.map(|group| format!("unix:supplementary_group:{}", group.name)));
    }
    // Entries ask for more than it is.
    let others = ["user:no-such-user", "supplementary_group:no-such-group", "supplementary_gid:3912005"];
    let asked = want.iter().cloned().chain(others.map(|it| format!("unix:{it}")));
    let asked = asking(&attestor, asked);
    assert_eq!(texts(&attest_for(&attestor, &ours.peer, &asked).await.unwrap()), want, "our own user");
    let numbers = BTreeSet::from([format!("unix:uid:{uid}"), format!("unix:gid:{gid}")]);
    assert_eq!(texts(&attest(&attestor, &ours.peer).await.unwrap()), numbers, "nobody asks for more");

    if may_be_others("a_process_is_its_user_and_its_groups") {
        let other = Process::start_as_user(&dir);
        let want = [
            format!("unix:uid:{USER}"),
            format!("unix:gid:{GROUP}"),
            format!("unix:supplementary_gid:{}", GROUPS[0]),
            format!("unix:supplementary_gid:{}", GROUPS[1]),
        ];
        let asked = asking(&attestor, want.clone());
        let got = texts(&attest_for(&attestor, &other.peer, &asked).await.unwrap());
        assert_eq!(got, want.into_iter().collect(), "a user without a name has numbers");
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_changes_its_user_gets_nothing_more() {
    if !may_be_others("a_process_that_changes_its_user_gets_nothing_more") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let attestor = Attestor::new(AttestSettings::default());
    for (case, attested_before, tells) in [
        ("its first call", false, true),
        ("a result is kept", true, true),
        ("before Linux 6.13", false, false),
        ("before Linux 6.13, a result is kept", true, false),
    ] {
        let mut process = Process::start_as_user(&dir);
        if !tells {
            process.peer = Arc::new(Peer::from_stream_by_proc(&process.stream, &OsUid).unwrap());
        }
        if attested_before {
            attest(&attestor, &process.peer).await.unwrap();
        }
        process.order("become 0");
        let err = attest(&attestor, &process.peer).await.unwrap_err();
        assert!(matches!(err, AttestError::IdentityChanged { .. }), "{case}: {err}");
        assert_eq!(err.blame(), Blame::Refusal, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn supplementary_groups_are_those_of_the_last_second() {
    if !may_be_others("supplementary_groups_are_those_of_the_last_second") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let attestor = Attestor::new(AttestSettings::default());
    let mut process = Process::start_as_user(&dir);
    let asked = asking(&attestor, GROUPS.map(|gid| format!("unix:supplementary_gid:{gid}")));
    assert_eq!(attest_for(&attestor, &process.peer, &asked).await.unwrap().len(), 4);
    process.order("groups none");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(attest_for(&attestor, &process.peer, &asked).await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_process_of_too_many_groups_is_not_looked_at() {
    if !may_be_others("a_process_of_too_many_groups_is_not_looked_at") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let attestor = Attestor::new(AttestSettings::default());
    let refused = |process: &Process, outcome: Result<Subject, AttestError>| {
        let err = outcome.unwrap_err();
        assert_eq!((err.to_string().as_str(), err.blame()), (TOO_MANY, Blame::Refusal));
        assert!(process.peer.has_asked_in_vain() && !process.peer.has_asked_in_vain());
    };
    let asked = asking(&attestor, [format!("unix:supplementary_gid:{}", GROUPS[0])]);
    for groups in [1025, 65_536] {
        let mut process = Process::start_in_groups(&dir, groups);
        assert_eq!(process.peer.connected_with_groups().map(|groups| groups.number()), Some(groups));
        refused(&process, attest_for(&attestor, &process.peer, &asked).await);
        // Who cannot be told from one that has them still, without looking, has to connect again.
        process.order("groups none");
        tokio::time::advance(Duration::from_secs(1)).await;
        refused(&process, attest_for(&attestor, &process.peer, &asked).await);
        assert_eq!(
            attest(&attestor, &process.peer).await.unwrap().len(),
            2,
            "where no entry asks for a group"
        );
    }

    let mut grows = Process::start_in_groups(&dir, 1024);
    assert_eq!(attest_for(&attestor, &grows.peer, &asked).await.unwrap().len(), 2, "as many as may be");
    grows.order("groups 65536");
    tokio::time::advance(Duration::from_secs(1)).await;
    refused(&grows, attest_for(&attestor, &grows.peer, &asked).await);
    refused(&grows, attest_for(&attestor, &grows.peer, &asked).await);
    // Its neighbour of the same user is read in its turn, and another user's at once.
    let (neighbour, other) = (Process::start_as_user(&dir), Process::start(&dir));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(attest_for(&attestor, &neighbour.peer, &asked).await.unwrap().len(), 3);
    attest_for(&attestor, &other.peer, &asked).await.unwrap();
    grows.order("groups none");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(attest_for(&attestor, &grows.peer, &asked).await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_streams_wait_for_keeps_nobody_from_calling() {
    let metrics = Metrics::default();
    let attestor = Attestor::new(AttestSettings::default()).counted_by(metrics.registry());
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&dir);
    let limits = Limits::default();
    let call = || limits.admit_caller(Arc::clone(&process.peer), Method::FetchX509Svid);
    let nothing = Questions::default();
    let attested = attestor.attest(call().unwrap(), &nothing).await.unwrap();
    let stream = attested.peer();
    let again = attestor.attest_again(&stream, &nothing, &limits).await.unwrap();
    assert_eq!(texts(&again), texts(attested.subject()));

    let caller = process.peer.caller();
    let places: Vec<_> = std::iter::from_fn(|| limits.place_for_update(caller)).take(100).collect();
    assert_eq!(places.len(), 16, "so many of one caller");
    assert!(limits.place_for_update(CallerKey::Uid(USER)).is_some(), "another has its own");
    let err = attestor.attest_again(&stream, &nothing, &limits).await.unwrap_err();
    assert!(matches!(err, AttestError::Crowded), "{err}");
    assert_eq!(err.blame(), Blame::Crowd);
    attestor.attest(call().unwrap(), &nothing).await.unwrap();
    drop(places);
    attestor.attest_again(&stream, &nothing, &limits).await.unwrap();
    let busy = r#"durward_attestation_failures_total{attestor="unix",reason="busy"} 1"#;
    assert!(metrics.render().lines().any(|line| line == busy), "{}", metrics.render());
}

#[tokio::test(start_paused = true)]
async fn an_heir_of_the_socket_is_not_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let attestor = Attestor::new(AttestSettings::default());
    for (case, attested_before) in [("its first call", false), ("a result is kept", true)] {
        let mut process = Process::start(&dir);
        if attested_before {
            attest(&attestor, &process.peer).await.unwrap();
        }
        process.order("bequeath socket");
        process.peer.exited().await;
        let zombie = attest(&attestor, &process.peer).await.unwrap_err();
        assert!(matches!(zombie, AttestError::Gone), "{case}, not waited for: {zombie}");
        process.child.wait().unwrap();
        let reaped = attest(&attestor, &process.peer).await.unwrap_err();
        assert!(matches!(reaped, AttestError::Gone), "{case}, waited for: {reaped}");
    }
}

#[tokio::test]
async fn a_process_in_another_pid_namespace_is_told_what_to_do() {
    let attestor = Attestor::new(AttestSettings::default());
    let peer = Arc::new(Peer::out_of_namespace(Uid::from_raw(USER), Gid::from_raw(GROUP)));
    let err = attest(&attestor, &peer).await.unwrap_err();
    assert!(matches!(err, AttestError::OtherPidNamespace), "{err}");
    assert!(err.to_string().contains("hostPID: true"), "{err}");
}

#[tokio::test]
async fn an_executable_has_a_path_and_a_digest() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(&dir);
    let program = sleeper(&dir, "program");
    process.execute(&program);
    let size = fs::metadata(&program).unwrap().len();
    let limit = i64::try_from(size).unwrap();
    let (path, hash) = (format!("unix:path:{}", program.display()), sha256(&program));

    for (case, settings, want) in [
        ("not asked", AttestSettings::default(), vec![]),
        ("both", discovering(0), vec![&path, &hash]),
        ("never hashed", discovering(-1), vec![&path]),
        ("as large as allowed", discovering(limit), vec![&path, &hash]),
    ] {
        let attestor = Attestor::new(settings.clone());
        for call in ["the first", "the second", "after a reload"] {
            let got = texts(&attest(&attestor, &process.peer).await.unwrap());
            let of_file = |text: &&String| text.starts_with("unix:path:") || text.starts_with("unix:sha256:");
            assert_eq!(got.iter().filter(of_file).collect::<Vec<_>>(), want, "{case}, {call}");
            if call == "the second" {
                attestor.reload(settings.clone());
            }
        }
    }

    let err = attest(&Attestor::new(discovering(limit - 1)), &process.peer).await.unwrap_err();
    let pid = process.child.id();
    let want = format!("SHA256 digest: workload /proc/{pid}/exe exceeds size limit ({size} > {})", limit - 1);
    assert_eq!(err.to_string(), want);
    assert_eq!(err.blame(), Blame::Refusal);

    // A file that is gone is still what the process executes, and what is hashed.
    fs::remove_file(&program).unwrap();
    let got = texts(&attest(&Attestor::new(discovering(0)), &process.peer).await.unwrap());
    assert!(got.contains(&format!("{path} (deleted)")), "{got:?}");
    assert!(got.contains(&hash), "{got:?}");
}

/// A reload changes settings and entries. Between the two, and for as long as a call takes that has begun before, there is
/// no caller for whom entries of the one are looked for by what the other says.
#[tokio::test]
async fn a_call_is_attested_by_the_settings_of_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let program = sleeper(&dir, "program");
    let mut process = Process::start(&dir);
    process.execute(&program);
    let (path, digest) = (format!("unix:path:{}", program.display()), sha256(&program));
    for (case, old, new, asked) in [
        ("paths are found out no more", discovering(-1), AttestSettings::default(), path),
        ("digests are found out no more", discovering(0), discovering(-1), digest),
    ] {
        let attestor = Attestor::new(old);
        let has = async |questions: &Questions| {
            texts(&attest_for(&attestor, &process.peer, questions).await.unwrap()).contains(&asked)
        };
        let before = asking(&attestor, [asked.clone()]);
        attestor.reload(new);
        assert!(has(&before).await, "{case}");
        let after = asking(&attestor, [asked.clone()]);
        assert!(!has(&after).await, "{case}: nothing of before is used");
        assert!(has(&before).await, "{case}: a call that takes long");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_the_callers_own_doing_costs_it_more() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&dir);
    let unseen = Arc::new(Peer::out_of_namespace(Uid::from_raw(USER), Gid::from_raw(GROUP)));
    for (case, settings, peer, succeeds, cost) in [
        ("attested", AttestSettings::default(), &process.peer, true, 1),
        ("its executable is too large", discovering(1), &process.peer, false, 5),
        ("the agent cannot see it", AttestSettings::default(), &unseen, false, 1),
    ] {
        let limits = Limits::default();
        let left = || match limits.caller_standing(peer.caller(), Method::FetchX509Svid).1 {
            Standing::Tokens { left, .. } => left,
            other => panic!("{other:?}"),
        };
        let before = left();
        let admitted = limits.admit_caller(Arc::clone(peer), Method::FetchX509Svid).unwrap();
        let attestor = Attestor::new(settings);
        let attested = attestor.attest(admitted, &everything(&attestor)).await;
        assert_eq!(attested.is_ok(), succeeds, "{case}: {attested:?}");
        drop(attested);
        assert_eq!(before - left(), cost, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn another_executable_is_seen_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (sleeper(&dir, "one"), dir.path().join("two"));
    fs::hard_link(&one, &two).unwrap();
    let attestor = Attestor::new(discovering(0));
    let mut process = Process::start(&dir);
    let ours = attest(&attestor, &process.peer).await.unwrap();
    let again = attest(&attestor, &process.peer).await.unwrap();
    assert_eq!(ours, again);

    process.execute(&one);
    let got = texts(&attest(&attestor, &process.peer).await.unwrap());
    assert!(got.contains(&format!("unix:path:{}", one.display())), "{got:?}");
    assert!(got.contains(&sha256(&one)), "{got:?}");

    // The same file under another name: nothing but the path tells.
    let mut process = Process::start(&dir);
    process.execute(&two);
    let got = texts(&attest(&attestor, &process.peer).await.unwrap());
    assert!(got.contains(&format!("unix:path:{}", two.display())), "{got:?}");
}
