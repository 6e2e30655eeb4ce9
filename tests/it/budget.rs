//! What is set and what there is of memory, of a real agent in a real cgroup; and what its owner is told of whom it refuses.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use durward::{
    api::proto::workload::JwtsvidRequest,
    limits::budget::UPLOADS,
    os::{cgroup, pidfd::Pidfd},
};
use nix::unistd::{Pid, geteuid};

use crate::{
    frames::{PREFACE, SETTINGS, call_frames, frame, message},
    hostile::{NEIGHBOUR, PATIENCE, wait_of},
    support::{Process, TRUST_DOMAIN, entry, refusable_client, request, write_config},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_durward");
const LIMIT: u64 = 24 << 20;

/// A memory cgroup with a limit, removed when dropped.
struct Confined(PathBuf);

impl Confined {
    /// `None` where none can be made: only root can.
    fn make(name: &str) -> Option<Self> {
        let name = format!("durward-{name}-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        let made = roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self(at);
            fs::write(made.0.join(file), LIMIT.to_string()).is_ok().then_some(made)
        });
        if made.is_none() {
            println!("{name}: no memory cgroup can be made here");
        }
        made
    }

    /// What starts a command in it.
    fn enter(&self) -> [&str; 4] {
        ["/bin/sh", "-c", "echo $$ > \"$0/cgroup.procs\"; exec \"$@\"", self.0.to_str().unwrap()]
    }

    /// What the kernel keeps for it, in bytes.
    fn kernel(&self) -> u64 {
        let parsed = |text: &str| text.trim().parse().unwrap();
        if let Ok(told) = fs::read_to_string(self.0.join("memory.kmem.usage_in_bytes")) {
            return parsed(&told);
        }
        let stat = fs::read_to_string(self.0.join("memory.stat")).unwrap();
        stat.lines().find_map(|line| line.strip_prefix("kernel ")).map_or(0, parsed)
    }

    fn durward(&self, words: &[&str], config: &Path) -> Output {
        let [program, rest @ ..] = self.enter();
        let mut command = Command::new(program);
        command.args(rest).arg(PROGRAM).args(words).arg("--config").arg(config.join("agent.conf"));
        command.env_remove("KUBERNETES_SERVICE_HOST").output().unwrap()
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // Its processes may still be on their way out.
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            nix::poll::poll(&mut [], 20u16).unwrap();
        }
    }
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// An agent's directory, and that of its admin socket.
struct Place(tempfile::TempDir, tempfile::TempDir);

impl Place {
    fn with(ratelimit: &str) -> Self {
        let place = Self(tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        place.set(ratelimit);
        place
    }

    fn set(&self, ratelimit: &str) {
        let admin = self.admin();
        let neighbour = format!(
            "entry \"spiffe://{TRUST_DOMAIN}/neighbour\" {{\n  selectors = [\"unix:uid:{NEIGHBOUR}\"]\n}}\n"
        );
        let blocks = format!(
            "agent {{ admin_socket_path = \"{}\" }}\nratelimit {{ {ratelimit} }}\n{}{neighbour}",
            admin.display(),
            entry("/web", "")
        );
        write_config(self.dir(), &blocks);
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn admin(&self) -> PathBuf {
        self.1.path().join("private/admin.sock")
    }

    fn ask(&self, words: &[&str]) -> String {
        text(&Command::new(PROGRAM).args(words).arg("--socket-path").arg(self.admin()).output().unwrap())
    }

    /// Connects and calls until the answer is this one.
    async fn hears(&self, want: &str) {
        let began = std::time::Instant::now();
        loop {
            let asked = JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() };
            let mut client = refusable_client(&self.dir().join("api.sock"));
            let heard = client.fetch_jwtsvid(request(asked)).await.map(drop);
            if heard.as_ref().is_err_and(|status| status.message() == want) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{want}: {heard:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What is said once it holds this.
    fn told(&self, words: &[&str], want: &str) -> String {
        let began = std::time::Instant::now();
        loop {
            let told = self.ask(words);
            if told.contains(want) {
                return told;
            }
            assert!(began.elapsed() < PATIENCE, "{want}: {told}\n{}", self.log());
            nix::poll::poll(&mut [], 50u16).unwrap();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap()
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir().join("api.sock")).unwrap()
    }
}

/// What the cgroup can never give is an error of whoever looks: the check, the start, and a reload, which changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_cgroup_cannot_give_is_an_error_with_its_place() {
    let Some(cgroup) = Confined::make("beyond") else { return };
    let place = Place::with("");
    let mut agent = Process::spawn_by(&cgroup.enter(), place.dir());
    let _client = agent.serving(place.dir()).await;
    for (case, ratelimit, want) in [
        ("keys", "keys = 16777216", "ratelimit.keys 16777216: take 11274289152 bytes"),
        ("a reserve", "gate { reserve = 1000 }", "ratelimit.gate.reserve 1000: is memory for"),
        ("connections", "gate { connections = 1000 }", "ratelimit.gate.connections 1000: holds"),
        ("admin connections", "gate { admin = 600 }", "ratelimit.gate.admin 600: take 24576000 bytes"),
        (
            "a step in what is nobody's",
            "memory { shrink_caches_at = 90 refuse_new_at = 95 close_heaviest_at = 99 }",
            "ratelimit.memory.shrink_caches_at 90: is 22649242 bytes",
        ),
        (
            "streams of connections",
            "gate { connections = 100 connection { streams = 100 } }",
            "ratelimit.gate.connections 100: holds 64204800 bytes",
        ),
        (
            "streams",
            "gate { connection { streams = 1024 } }",
            "ratelimit.gate.connection.streams 1024: makes",
        ),
        (
            "a limit above it",
            "keys = 1000000 memory { limit = \"1TiB\" }",
            "ratelimit.keys 1000000: take 672000000 bytes",
        ),
    ] {
        place.set(ratelimit);
        let place_of = format!("{}/agent.conf:", place.dir().display());
        for words in [["validate"], ["run"]] {
            let output = cgroup.durward(&words, place.dir());
            let said = text(&output);
            assert!(!output.status.success(), "{case}: {said}");
            let line = said.lines().find(|line| line.contains(want));
            assert!(line.is_some_and(|line| line.contains(&place_of)), "{case}, {words:?}: {said}");
            assert!(said.contains("the memory limit of the cgroup is 25165824"), "{case}, {words:?}: {said}");
        }
        let said = place.ask(&["reload"]);
        assert!(said.contains(want), "{case}: {said}");
        assert!(!agent.has_ended(), "{case}: {}", place.log());
    }
    place.set("keys = 18724");
    let said = place.ask(&["reload"]);
    assert!(!said.contains("ratelimit.keys 18724"), "as many as fit: {said}");
    assert!(cgroup.durward(&["validate"], place.dir()).status.success());
    // That gives way by itself, and is no error, as nobody set what it contradicts.
    place.set("} agent { x509_svid_cache_max_size = 10000000");
    let checked = cgroup.durward(&["validate"], place.dir());
    assert!(checked.status.success(), "{}", text(&checked));
    let said = place.ask(&["reload"]);
    let status =
        place.told(&["status"], "Wrong:        agent.x509_svid_cache_max_size 10000000: takes 40960000000");
    assert!(status.contains("the memory limit of the cgroup is 25165824"), "{said}: {status}");
    assert!(!agent.has_ended(), "{}", place.log());
}

/// Of two budgets the lower one counts, since the kernel ends who passes it; and the owner hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_above_the_cgroups_does_not_count() {
    let Some(cgroup) = Confined::make("above") else { return };
    let place = Place::with("memory { limit = \"64MiB\" }");
    let mut agent = Process::spawn_by(&cgroup.enter(), place.dir());
    let _client = agent.serving(place.dir()).await;
    let status = place.told(&["status"], "Wrong:        ratelimit.memory.limit 67108864: is above the");
    assert!(status.contains("used of 24.0 MiB (the memory limit of its cgroup)"), "{status}");
    assert!(place.log().contains("ratelimit.memory.limit 67108864: is above"), "{}", place.log());
    place.set("memory { limit = \"16MiB\" }");
    let _reloaded = place.ask(&["reload"]);
    let status = place.told(&["status"], "used of 16.0 MiB (ratelimit.memory.limit)");
    assert!(status.contains("Wrong:        nothing"), "{status}");
}

/// The log, the status and the check say it alike.
#[tokio::test(flavor = "multi_thread")]
async fn a_budget_for_fewer_than_64_callers_is_told() {
    const WANT: &str = "ratelimit.gate.reserve 64: the memory budget, 8388608 bytes";
    let place = Place::with("memory { limit = \"8MiB\" }");
    let mut agent = Process::spawn(place.dir());
    let _client = agent.serving(place.dir()).await;
    place.told(&["status"], WANT);
    let callers = format!("{WANT}, is small: when it runs short, only 25 callers that hold nothing are sure");
    assert!(place.log().contains(&callers), "{}", place.log());
    let check = |place: &Place| {
        let config = place.dir().join("agent.conf");
        text(&Command::new(PROGRAM).args(["validate", "--config"]).arg(config).output().unwrap())
    };
    let said = check(&place);
    assert!(said.contains(&callers), "{said}");
    place.set("memory { limit = \"24MiB\" }");
    let said = check(&place);
    assert!(!said.contains("gate.reserve"), "{said}");
}

/// What starts a command on a machine that says to have so much memory, as far as `/proc` tells; `None` where nobody may do that.
fn on_machine(mib: u64, at: &Path) -> Option<Vec<String>> {
    let meminfo = at.join(format!("meminfo.{mib}"));
    fs::write(&meminfo, format!("MemTotal:       {} kB\nMemFree:        1 kB\n", mib << 10)).unwrap();
    let mount = "mount --bind \"$0\" /proc/meminfo && exec \"$@\"";
    let words =
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, meminfo.to_str().unwrap()];
    let can = Command::new(words[0]).args(&words[1..]).arg("true").status();
    let can = can.is_ok_and(|status| status.success());
    if !can {
        println!("{mib} MiB: nothing can be mounted here");
    }
    can.then(|| words.map(str::to_owned).to_vec())
}

/// Whether a cgroup of this process has a limit: that is the budget then.
fn has_limit() -> bool {
    let found = cgroup::lowest_limit(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
    if let Some(bytes) = found {
        println!("the tests have a memory limit of their own here, {bytes} bytes");
    }
    found.is_some()
}

/// Where nobody set a budget, and no cgroup, it is a part of the machine's memory: who holds more than its share of that, where it
/// is short, gets no more, and a neighbour is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_nobody_set_is_a_part_of_the_machines_memory() {
    // Short from the start, and far from where anybody is told to go. The least share is 2 MiB.
    let place = Place::with(
        "gate { connection { handshake_timeout = \"5m\" } } node { cpu = 4096 } memory { shrink_caches_at = 3 }",
    );
    let Some(machine) = on_machine(512, place.dir()).filter(|_| !has_limit()) else { return };
    let words: Vec<&str> = machine.iter().map(String::as_str).collect();
    let mut agent = Process::spawn_by(&words, place.dir());
    drop(agent.serving(place.dir()).await);
    let _quiet = place.told(&["limits"], "Connections: 0 of at most");
    let _status = place.told(&["status"], "used of 128.0 MiB (a part of the machine's memory)");
    let _short = place.told(&["limits"], "of 128.0 MiB; pressure: shrink_caches");
    let mut streams: Vec<UnixStream> = (0..600).map(|_| place.connect()).collect();
    let began = std::time::Instant::now();
    // A share of 6 KiB each.
    while still_open(&mut streams) > 342 {
        assert!(began.elapsed() < PATIENCE, "{}: {}", streams.len(), place.ask(&["limits"]));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(streams.len() >= 330, "nobody loses its share: {}", streams.len());
    while !place.log().contains("memory limit: caller holds its share, and gets no further connection") {
        assert!(began.elapsed() < PATIENCE, "{}", place.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let output = fetch_as(&place, NEIGHBOUR);
    assert!(output.status.success(), "{}", text(&output));
    assert!(!agent.has_ended(), "{}", place.log());
}

/// What is set and does not fit a part of the machine that nobody chose is said, and is no error.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_a_part_of_the_machine_is_said() {
    let place = Place::with("");
    let beyond_part = "and the budget, a part of the machine's memory, is 268435456";
    for (case, mib, ratelimit, fits, want) in [
        ("the defaults", 64, "", true, None),
        ("all streams", 128, "gate { connection { streams = 1024 } }", true, None),
        ("keys that fit", 1024, "keys = 199728", true, None),
        ("keys", 1024, "keys = 1000000", true, Some(beyond_part)),
        ("a reserve", 1024, "gate { reserve = 10000 }", true, Some(beyond_part)),
        ("a step", 512, "memory { shrink_caches_at = 3 }", true, Some("memory would always be short")),
        ("keys that the machine cannot have", 1024, "keys = 16777216", true, Some(beyond_part)),
        ("a cache", 1024, "} agent { x509_svid_cache_max_size = 70000", true, Some(beyond_part)),
        (
            "a limit that is set",
            1024,
            "keys = 1000000 memory { limit = \"256MiB\" }",
            false,
            Some("memory.limit is 268435456"),
        ),
    ] {
        place.set(ratelimit);
        let Some(machine) = on_machine(mib, place.dir()).filter(|_| !has_limit()) else { return };
        let mut command = Command::new(&machine[0]);
        command.args(&machine[1..]).arg(PROGRAM).args(["validate", "--config"]);
        let output = command.arg(place.dir().join("agent.conf")).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.success(), fits, "{case}: {said}");
        match want {
            Some(want) => assert!(said.contains(want), "{case}: {said}"),
            None => assert!(!said.contains("machine"), "{case}: {said}"),
        }
    }
    place.set("keys = 1000000");
    let Some(machine) = on_machine(1024, place.dir()) else { return };
    let words: Vec<&str> = machine.iter().map(String::as_str).collect();
    let mut agent = Process::spawn_by(&words, place.dir());
    drop(agent.serving(place.dir()).await);
    let _wrong = place.told(&["status"], "Wrong:        ratelimit.keys 1000000: take 672000000 bytes");
    assert!(place.log().contains(beyond_part), "{}", place.log());
    place.set("keys = 16777216");
    let _reloaded = place.ask(&["reload"]);
    let _wrong = place.told(&["status"], "Wrong:        ratelimit.keys 16777216: take 11274289152 bytes");
    place.set("keys = 1000000 memory { limit = \"2GiB\" }");
    let _reloaded = place.ask(&["reload"]);
    let status = place.told(&["status"], "used of 2048.0 MiB (ratelimit.memory.limit)");
    assert!(status.contains("Wrong:        nothing"), "{status}");
}

/// A token, fetched as this user.
fn fetch_as(place: &Place, uid: u32) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(["api", "fetch", "jwt", "--audience", "a", "--socket-path"]);
    command.arg(place.dir().join("api.sock")).current_dir("/").uid(uid).gid(uid).output().unwrap()
}

/// A process of another user that has connected, until it is let go.
fn connects(place: &Place, uid: u32) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "budget::part_that_connects", "--nocapture"]).current_dir("/").uid(uid).gid(uid);
    command.env("DURWARD_TEST_CONNECTS", place.dir().join("api.sock"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// What [`connects`] runs; nothing when the tests run.
#[test]
fn part_that_connects() {
    let Some(socket) = std::env::var_os("DURWARD_TEST_CONNECTS") else { return };
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
    stream.read_exact(&mut [0; 9]).unwrap();
    println!("it is let in");
    drop(std::io::stdin().read(&mut [0]));
}

/// What the kernel keeps of a process for the agent is held by the family of whoever that is of, once somebody else has it open; and
/// by nobody whose processes come and go meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn names_that_somebody_has_open_are_held_by_those_whose_processes_they_are_of() {
    const HOLDER: u32 = 700_099;
    const AT_ONCE: usize = 25;
    if !geteuid().is_root() {
        println!("only root can be others");
        return;
    }
    let Some(cgroup) = Confined::make("names") else { return };
    let place = Place::with("");
    let mut agent = Process::spawn_by(&cgroup.enter(), place.dir());
    drop(agent.serving(place.dir()).await);
    let (mut pins, before) = (Vec::new(), cgroup.kernel());
    let is_held = |limits: &str| {
        limits.lines().any(|line| line.starts_with(&format!("uid:{HOLDER} ")) && line.contains("KiB"))
    };
    loop {
        let mut children: Vec<_> = (0..AT_ONCE).map(|_| connects(&place, HOLDER)).collect();
        for child in &mut children {
            let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
            assert!(said.any(|line| line.ends_with("it is let in")), "{}", place.log());
            pins.push(Pidfd::open(Pid::from_raw(child.id().try_into().unwrap())).unwrap());
        }
        for mut child in children {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        let output = fetch_as(&place, NEIGHBOUR);
        assert!(output.status.success(), "{}", text(&output));
        if pins.len() > 400 && cgroup.kernel() < before + (128 << 10) {
            println!("this kernel keeps nothing of a pidfd");
            return;
        }
        let limits = place.ask(&["limits"]);
        if is_held(&limits) {
            let of_neighbour = format!("uid:{NEIGHBOUR} ");
            assert!(
                !limits.lines().any(|line| line.starts_with(&of_neighbour) && line.contains("MiB")),
                "{limits}"
            );
            break;
        }
        assert!(pins.len() < 5000, "{limits}");
    }
    assert!(!agent.has_ended(), "{}", place.log());
}

/// Of a reserve that is larger than memory has room for less counts, and whoever looks hears how much.
#[tokio::test(flavor = "multi_thread")]
async fn how_much_of_a_reserve_counts_is_said() {
    let Some(cgroup) = Confined::make("reserve") else { return };
    let place = Place::with("gate { reserve = 500 }");
    let want = "ratelimit.gate.reserve 500: an eighth of the memory budget has room for 76, which count";
    let checked = cgroup.durward(&["validate"], place.dir());
    let said = text(&checked).split_whitespace().collect::<Vec<_>>().join(" ");
    let at = said.split(want).next().unwrap().rsplit("Warning: ").next().unwrap();
    let file = place.dir().join("agent.conf");
    assert!(checked.status.success() && said.contains(want), "{said}");
    assert!(at.starts_with(&format!("{}:", file.display())), "it has its place: {said}");
    let mut agent = Process::spawn_by(&cgroup.enter(), place.dir());
    let _client = agent.serving(place.dir()).await;
    assert!(place.log().contains(want), "{}", place.log());
    let status = place.told(&["status"], "Wrong:        ratelimit.gate.reserve 500:");
    assert!(!status.contains("Wrong:        nothing"), "{status}");
    place.set("gate { reserve = 76 }");
    let _reloaded = place.ask(&["reload"]);
    let _status = place.told(&["status"], "Wrong:        nothing");
}

/// As many admin connections as may be set are held beside a crowd, and whoever is polite is served.
#[tokio::test(flavor = "multi_thread")]
async fn admin_connections_fit_beside_a_crowd() {
    let Some(cgroup) = Confined::make("admins") else { return };
    let place = Place::with("gate { admin = 76 }");
    let mut agent = Process::spawn_by(&cgroup.enter(), place.dir());
    let _client = agent.serving(place.dir()).await;
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let asks = [&hello[..], &call_frames(1, "/SpiffeWorkloadAPI/FetchX509SVID", &message(&[]))].concat();
    let open = |at: &Path, sends: &[u8]| {
        let mut stream = UnixStream::connect(at).unwrap();
        // It may be refused by then.
        drop(stream.write_all(sends));
        stream
    };
    let crowd: Vec<UnixStream> = (0..300).map(|_| open(&place.dir().join("api.sock"), &asks)).collect();
    let admins: Vec<UnixStream> = (0..74).map(|_| open(&place.admin(), &hello)).collect();
    let status = place.told(&["status"], "Wrong:        nothing");
    assert!(!agent.has_ended(), "{status}\n{}", place.log());
    if geteuid().is_root() {
        let mut command = Command::new(PROGRAM);
        command.args(["api", "fetch", "jwt", "--audience", "a", "--socket-path"]);
        command.arg(place.dir().join("api.sock")).current_dir("/").uid(NEIGHBOUR).gid(NEIGHBOUR);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }
    assert!(!agent.has_ended(), "{}", place.log());
    drop((crowd, admins));
}

/// Reads what comes on those that are closed, and keeps the others.
fn still_open(streams: &mut Vec<UnixStream>) -> usize {
    streams.retain_mut(|stream| {
        stream.set_nonblocking(true).unwrap();
        let mut byte = [0];
        !matches!(stream.read(&mut byte), Ok(0))
    });
    streams.len()
}

/// Whoever is refused a connection, its owner can say for what, how much of it the caller has, and who has most; and a
/// neighbour is served.
#[tokio::test(flavor = "multi_thread")]
async fn for_each_refused_connection_there_is_an_answer() {
    let uid = geteuid();
    let pid = std::process::id().to_string();
    for (case, gate, let_in, short_of, holds) in [
        (
            "its own",
            "caller { connections = 2 }",
            2,
            "nothing is short",
            "2 connections, 12 KiB; it may have 2 connections",
        ),
        (
            "all",
            // Of the 20 that are not kept for callers without one, the last are for a neighbour's share.
            "connections = 40 reserve = 20",
            16,
            "short of connections",
            "all callers: 16 connections of at most 40",
        ),
        ("blocked", "caller { block = true }", 0, "nothing is short", "0 connections, 0 KiB"),
    ] {
        let place = Place::with(&format!(
            "gate {{ {gate} connection {{ handshake_timeout = \"5m\" }} }} node {{ cpu = 4096 }}"
        ));
        let mut agent = Process::spawn(place.dir());
        while UnixStream::connect(place.dir().join("api.sock")).is_err() {
            assert!(!agent.has_ended(), "{case}: {}", place.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Those that tried it have left.
        let _quiet = place.told(&["limits"], "Connections: 0 of at most");
        let mut streams: Vec<UnixStream> = (0..60).map(|_| place.connect()).collect();
        let began = std::time::Instant::now();
        while still_open(&mut streams) > let_in {
            assert!(began.elapsed() < PATIENCE, "{case}: {}", streams.len());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let told = place.told(&["explain", "--pid", &pid], &format!("uid:{uid}: {let_in} connection"));
        let held = told.split("\nHeld:\n").nth(1).unwrap_or_else(|| panic!("{case}: {told}"));
        for want in [short_of, holds] {
            assert!(held.contains(want), "{case}: {want}: {told}");
        }
        assert!(
            let_in == 0 || held.contains(&format!("uid:{uid} holds most: {let_in} connections")),
            "{case}: {told}"
        );
        let limits = place.ask(&["limits", "--output", "json"]);
        let limits: serde_json::Value = serde_json::from_str(&limits).unwrap();
        let row = limits["heaviest"].as_array().unwrap().iter().find(|it| it["stage"] == "gate");
        let refused = row.map(|row| row["refused"].as_u64().unwrap());
        // Some of those that were refused had left before they were looked at.
        assert!(refused.is_some_and(|refused| refused >= 20), "{case}: {limits}");
        if uid.is_root() && case != "blocked" {
            let output = fetch_as(&place, NEIGHBOUR);
            assert!(output.status.success(), "{case}: {}", text(&output));
        }
    }
}

/// The log of refused calls says which they were, and what for.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_which_calls_are_refused_and_why() {
    let place = Place::with("caller { rate = 1 per = \"hour\" burst = 5 }");
    let mut agent = Process::spawn(place.dir());
    let mut client = agent.serving(place.dir()).await;
    for audience in 0..9 {
        let asked = JwtsvidRequest { audience: vec![audience.to_string()], spiffe_id: String::new() };
        // Some are refused.
        drop(client.fetch_jwtsvid(request(asked)).await);
    }
    let began = std::time::Instant::now();
    let line = format!("stage=caller key=uid:{} method=FetchJWTSVID reason=rate", geteuid());
    while !place.log().contains(&line) {
        assert!(began.elapsed() < PATIENCE, "{line}: {}", place.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Begins calls of FetchJWTSVID on one connection, of each of which a part is sent: their answers, and what sends the rest.
async fn begins_calls(
    place: &Place,
    parts: impl IntoIterator<Item = Vec<u8>>,
) -> (Vec<h2::client::ResponseFuture>, Vec<h2::SendStream<bytes::Bytes>>) {
    let stream = tokio::net::UnixStream::connect(place.dir().join("api.sock")).await.unwrap();
    let (mut http2, connection) = h2::client::handshake(stream).await.unwrap();
    let _connection = tokio::spawn(connection);
    let (mut answers, mut bodies) = (Vec::new(), Vec::new());
    for part in parts {
        let head = http::Request::post("http://localhost/SpiffeWorkloadAPI/FetchJWTSVID")
            .header("content-type", "application/grpc")
            .header("workload.spiffe.io", "true")
            .body(())
            .unwrap();
        http2 = http2.ready().await.unwrap();
        let (answer, mut body) = http2.send_request(head, false).unwrap();
        body.send_data(part.into(), false).unwrap();
        answers.push(answer);
        bodies.push(body);
    }
    (answers, bodies)
}

/// With room as many large requests as a connection has streams may be on their way, and all are answered.
#[tokio::test(flavor = "multi_thread")]
async fn with_room_large_requests_come_together_on_one_connection() {
    let place = Place::with("node { cpu = 4096 }");
    let mut agent = Process::spawn(place.dir());
    drop(agent.serving(place.dir()).await);
    let asked = JwtsvidRequest { audience: vec!["a".repeat(11_000)], spiffe_id: String::new() };
    let whole = message(&prost::Message::encode_to_vec(&asked));
    let (first, rest) = whole.split_at(5_500);
    let (answers, bodies) = begins_calls(&place, vec![first.to_vec(); 100]).await;
    // They have come before the first of them goes on.
    let _told = place.told(&["limits"], "Connections: 1 of at most");
    for mut body in bodies {
        body.send_data(rest.to_vec().into(), true).unwrap();
    }
    let read = answers.into_iter().map(async |answer| {
        let answer = answer.await.unwrap();
        let refused = answer.headers().get("grpc-message").cloned();
        let mut body = answer.into_body();
        let mut came = 0;
        while let Some(part) = body.data().await {
            let part = part.unwrap();
            body.flow_control().release_capacity(part.len()).unwrap();
            came += part.len();
        }
        (came > 11_000, refused)
    });
    // Together: who reads one after the other has no window for the first of them, where it is not the first that comes.
    let read = tokio::time::timeout(PATIENCE, futures_util::future::join_all(read)).await.unwrap();
    assert_eq!(read, vec![(true, None); 100]);
}

/// Whoever begins so many large requests that memory is short for them is told how many bytes they are, of how many, and to come
/// back; the log, the audit and `limits` say who it is. The agent stays within its budget, and a neighbour is served.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_unfinished_requests_is_said() {
    let place = Place::with(&format!("memory {{ limit = \"{LIMIT}\" }}"));
    let mut agent = Process::spawn(place.dir());
    drop(agent.serving(place.dir()).await);
    let part = [&[0, 0, 0, 0xea, 0x60][..], &[0x0a; 59_000]].concat();
    let (answers, _bodies) = begins_calls(&place, vec![part; 100]).await;
    let first = tokio::time::timeout(PATIENCE, futures_util::future::select_all(answers)).await;
    let (answer, _, _others) = first.expect("one is refused");
    let status = tonic::Status::from_header_map(answer.unwrap().headers()).unwrap();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    assert!(wait_of(&status) > Duration::ZERO, "{status:?}");
    let told =
        status.message().strip_prefix("the agent is short of memory, and the caller holds its share of it: ");
    let told: Vec<&str> = told.unwrap_or_else(|| panic!("{status:?}")).split_whitespace().collect();
    let [
        bytes,
        "bytes",
        "of",
        "requests",
        "on",
        "this",
        "connection",
        "are",
        "not",
        "complete,",
        "and",
        most,
        ..,
    ] = told[..]
    else {
        panic!("{status:?}")
    };
    assert_eq!(most.parse(), Ok(UPLOADS), "{status:?}");
    assert!(bytes.parse::<u64>().unwrap() > UPLOADS, "{status:?}");
    if geteuid().is_root() {
        let output = fetch_as(&place, NEIGHBOUR);
        assert!(output.status.success(), "{}", text(&output));
    }
    let used = agent.memory("RssAnon") * 1024;
    assert!(used < LIMIT, "{used}");

    let uid = geteuid();
    let what = format!(
        "than may be then: make fewer large requests at once method=FetchJWTSVID caller=uid:{uid} pid={} bytes=",
        std::process::id()
    );
    for line in
        [what.clone(), format!("audit: call refused caller=uid:{uid}"), "reason=unfinished".to_owned()]
    {
        let began = std::time::Instant::now();
        while !place.log().contains(&line) {
            assert!(began.elapsed() < PATIENCE, "{line}: {}", place.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // Of the first that is refused, which need not be the first that is answered.
    let log = place.log();
    let said = log.split_once(&what).and_then(|(_, said)| said.split_once(" most=")).unwrap();
    let (bytes, rest) = (said.0.parse::<u64>().unwrap(), said.1.split_whitespace().next());
    assert!(bytes > UPLOADS && rest == Some(most), "{log}");
    let told = place.told(&["limits"], "FetchJWTSVID");
    let row = told.lines().find(|line| line.contains("FetchJWTSVID")).unwrap();
    let row: Vec<&str> = row.split_whitespace().collect();
    let at = row.iter().position(|word| *word == "FetchJWTSVID").unwrap();
    let [used, refused] = [1, 2].map(|further| row[at + further].parse::<u32>().unwrap());
    assert!(used == 0 && refused > 0, "{told}");
}

/// With few descriptors the start says for how many callers there are some, and no room is shown where none is left.
#[tokio::test(flavor = "multi_thread")]
async fn few_descriptors_are_said() {
    let place = Place::with("gate { connection { handshake_timeout = \"5m\" } } node { cpu = 4096 }");
    let few = ["/bin/sh", "-c", "ulimit -n 300; exec \"$0\" \"$@\""];
    let mut agent = Process::spawn_by(&few, place.dir());
    let client = agent.serving(place.dir()).await;
    drop(client);
    assert!(place.log().contains("there are few descriptors"), "{}", place.log());
    let streams: Vec<UnixStream> = (0..100).map(|_| place.connect()).collect();
    let _told = place.told(&["limits"], "Room:        short of descriptors");
    let told = place.told(&["explain", "--pid", &std::process::id().to_string()], "short of descriptors");
    assert!(told.contains(" holds most: "), "{told}");
    place.hears("the agent is short of descriptors, and this caller has its share of them").await;
    assert!(place.log().contains("short_of=descriptors"), "{}", place.log());
    drop(streams);
}
