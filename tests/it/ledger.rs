//! What callers hold, and who gives way when it is too much: an agent as a process of its own, in a memory cgroup where one
//! can be made.

#![expect(clippy::disallowed_methods, reason = "its clients are threads and processes, which may sleep")]

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use durward::limits::budget::{HEAD, HTTP2, NEWCOMER, PARKED, SPARE, STREAM, WAITING};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::geteuid,
};

use crate::{
    frames::{
        Called, DATA, END_HEADERS, END_STREAM, FETCH_JWT, HEADERS, PREFACE, RST_STREAM, SETTINGS, block,
        call, call_frames, frame, jwt_request, literal, message, settings,
    },
    hostile::{NEIGHBOUR, PATIENCE},
    support::{Process, write_config},
};

const GOAWAY: u8 = 7;

/// What callers are limited by is bytes alone.
const BYTES_ALONE: &str =
    "caller { unlimited = true } identity { unlimited = true } node { unlimited = true cpu = 4096 }";
const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// A stream that stays open for further questions.
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
/// What one is reckoned at, in bytes.
const REFLECTED: u64 = 128 << 10;
/// A stream that waits for news.
const WATCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// A memory cgroup of a test's own, without a limit.
struct TestCgroup(PathBuf);

impl TestCgroup {
    /// `None` where none can be made: for an ordinary user, or where the kernel has them elsewhere.
    fn make(name: &str) -> Option<Self> {
        let name = format!("durward-{name}-{}", std::process::id());
        let roots =
            [("/sys/fs/cgroup/memory", "memory.usage_in_bytes"), ("/sys/fs/cgroup", "memory.current")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self(at);
            made.0.join(file).exists().then_some(made)
        })
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let began = Instant::now();
        while fs::remove_dir(&self.0).is_err() && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// An agent with its metrics at a socket.
struct Weighed {
    process: Process,
    dir: tempfile::TempDir,
    /// Gone after the process.
    cgroup: Option<TestCgroup>,
}

impl Weighed {
    fn start(name: &str, ratelimit: &str) -> Self {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        write_config(dir.path(), &blocks(dir.path(), ratelimit));
        let cgroup = TestCgroup::make(name);
        let mut process = match &cgroup {
            None => Process::spawn(dir.path()),
            // The shell enters the cgroup and becomes the agent.
            Some(TestCgroup(at)) => {
                let enter = "echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
                Process::spawn_by(&["/bin/sh", "-c", enter, at.to_str().unwrap()], dir.path())
            }
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            process.serving(dir.path()).await;
        });
        Self { process, dir, cgroup }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// What a scrape says of memory.
    fn memory(&self, of: &str) -> u64 {
        self.series(&format!("durward_memory_bytes{{kind=\"{of}\"}} "))
    }

    fn series(&self, series: &str) -> u64 {
        let mut stream = UnixStream::connect(self.dir.path().join("metrics.sock")).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        // Some are there from their first count on.
        answer.lines().find_map(|line| line.strip_prefix(series)).map_or(0, |value| value.parse().unwrap())
    }

    /// Waits until what it says of memory is so.
    fn wait_for(&self, of: &str, right: impl Fn(u64) -> bool) -> u64 {
        let began = Instant::now();
        loop {
            let bytes = self.memory(of);
            if right(bytes) {
                return bytes;
            }
            assert!(began.elapsed() < PATIENCE, "{of} is {bytes}\n{}", self.log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Gives it this budget beside its limits, and waits until it counts.
    fn reload(&self, ratelimit: &str, budget: u64) {
        let ratelimit = format!("{ratelimit} memory {{ limit = {budget} }}");
        write_config(self.dir.path(), &blocks(self.dir.path(), &ratelimit));
        self.process.signal(Signal::SIGHUP);
        self.wait_for("budget", |told| told == budget);
    }

    /// What it uses by now, in bytes: what is charged to its cgroup, or its resident set.
    fn measured(&self) -> u64 {
        // The last look of the agent's was before what is measured.
        thread::sleep(Duration::from_millis(600));
        match self.cgroup {
            Some(_) => self.memory("cgroup"),
            None => self.process.memory("VmRSS") << 10,
        }
    }

    /// Connections with HTTP/2 and no request yet.
    fn connections(&self, number: usize) -> Vec<UnixStream> {
        (0..number).map(|_| UnixStream::connect(self.socket()).unwrap()).collect()
    }
}

impl Drop for Weighed {
    fn drop(&mut self) {
        if !self.process.has_ended() {
            self.process.signal(Signal::SIGKILL);
        }
        self.process.wait();
    }
}

fn blocks(dir: &Path, ratelimit: &str) -> String {
    let own = geteuid();
    let metrics = dir.join("metrics.sock");
    let entry =
        |uid| format!("entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n");
    format!(
        "telemetry {{ Prometheus {{ socket_path = \"{}\" }} }}\nratelimit {{ {ratelimit} }}\n{}{}",
        metrics.display(),
        entry(own.as_raw()),
        entry(NEIGHBOUR)
    )
}

/// Opens so many further streams on a connection that has `open` of them, and reads what comes first.
fn watch(stream: &mut UnixStream, open: u32, more: u32) -> std::io::Result<()> {
    if open == 0 {
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat())?;
    }
    for nth in open..open + more {
        stream.write_all(&call_frames(1 + 2 * nth, WATCH, &message(&[])))?;
    }
    Ok(())
}

/// Reads what there is. Returns whether a GOAWAY was in it, or the end.
fn drain(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    let ended = stream.read_to_end(&mut all).is_ok();
    stream.set_nonblocking(false).unwrap();
    // A frame with error code 0, of eight bytes.
    ended || all.windows(9).any(|head| head == [0, 0, 8, 7, 0, 0, 0, 0, 0])
}

/// The arithmetic of the budget, held against what is measured: nothing takes more than it is reckoned at, nor less than
/// a third of it.
#[test]
fn what_connections_take_is_what_they_are_reckoned_at() {
    let agent = Weighed::start(
        "reckoned",
        &format!(
            "{BYTES_ALONE} memory {{ limit = \"1GiB\" }} gate {{ connection {{ handshake_timeout = \"5m\" }} }}"
        ),
    );
    // What comes with the first call ever is no connection's.
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let before = agent.measured();
    // Whatever waits to be read is held too, so everything is read meanwhile.
    let hold = |case: &str, streams: &mut [UnixStream], reckoned: u64| {
        let began = Instant::now();
        while agent.memory("held") != reckoned {
            assert!(began.elapsed() < PATIENCE, "{case}: {} held, {reckoned} reckoned", agent.memory("held"));
            for stream in &mut *streams {
                assert!(!drain(stream), "{case}\n{}", agent.log());
            }
        }
        let (took, of) = (agent.measured().saturating_sub(before), reckoned);
        println!("{case}: {} KiB measured, {} reckoned", took >> 10, of >> 10);
        // What threads and tables take once, whoever comes; and what is not optimized takes a little more.
        let most = if cfg!(debug_assertions) { of + of / 4 } else { of } + (1 << 20);
        assert!(took <= most && took >= of / 3, "{case}: {took} bytes measured, {of} reckoned");
    };
    let mut open = agent.connections(600);
    hold("parked", &mut open, 600 * PARKED);
    for stream in &mut open[..300] {
        watch(stream, 0, 1).unwrap();
    }
    hold("with a stream", &mut open, 600 * PARKED + 300 * HTTP2);
    for stream in &mut open[..50] {
        watch(stream, 1, 30).unwrap();
        let _gone = drain(stream);
    }
    hold("with many", &mut open, 600 * PARKED + 300 * HTTP2 + 50 * 30 * STREAM);
    for stream in &mut open[..50] {
        let resets: Vec<u8> =
            (0..31).flat_map(|nth| frame(RST_STREAM, 0, 1 + 2 * nth, &8_u32.to_be_bytes())).collect();
        stream.write_all(&resets).unwrap();
    }
    let began = Instant::now();
    while agent.series("durward_streams_open{method=\"FetchX509SVID\"} ") != 250 {
        assert!(began.elapsed() < PATIENCE, "streams that were reset stay open\n{}", agent.log());
    }
    hold("when they have ended", &mut open, 600 * PARKED + 300 * HTTP2 + 50 * 30 * STREAM);
    drop(open);
    agent.wait_for("held", |held| held == 0);
}

/// However many streams a connection has when its client ends, they end with it.
#[test]
fn streams_end_with_their_connection() {
    let agent = Weighed::start("ended", &format!("{BYTES_ALONE} gate {{ caller {{ unlimited = true }} }}"));
    for _ in 0..3 {
        let mut open = agent.connections(6);
        for stream in &mut open {
            watch(stream, 0, 40).unwrap();
        }
        let streams = || agent.series("durward_streams_open{method=\"FetchX509SVID\"} ");
        let began = Instant::now();
        while streams() != 240 {
            assert!(began.elapsed() < PATIENCE, "{} are open\n{}", streams(), agent.log());
            assert!(!open.iter_mut().any(drain), "{}", agent.log());
        }
        drop(open);
        agent.wait_for("held", |held| held == 0);
        assert_eq!(streams(), 0);
    }
}

/// Requests that come in one read leave room for as many behind, though each was answered before the next was looked at.
#[test]
fn what_a_burst_of_requests_leaves_behind_is_held() {
    const CONNECTIONS: u64 = 300;
    const REQUESTS: u32 = 16;
    let agent = Weighed::start("bursts", &format!("{BYTES_ALONE} memory {{ limit = \"1GiB\" }}"));
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let before = agent.measured();
    let mut burst = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    burst.extend((0..REQUESTS).flat_map(|nth| call_frames(1 + 2 * nth, HEALTH, &message(&[]))));
    let mut open = agent.connections(300);
    for stream in &mut open {
        stream.write_all(&burst).unwrap();
    }
    let answered = "durward_calls_total{method=\"Other\",code=\"OK\"} ";
    let began = Instant::now();
    while agent.series(answered) < CONNECTIONS * u64::from(REQUESTS) {
        assert!(began.elapsed() < PATIENCE, "{} answered\n{}", agent.series(answered), agent.log());
        for stream in &mut open {
            assert!(!drain(stream), "{}", agent.log());
        }
    }
    for stream in &mut open {
        assert!(!drain(stream), "{}", agent.log());
    }
    let each = PARKED + HTTP2 + u64::from(REQUESTS - 6) * HEAD;
    let held = agent.wait_for("held", |held| held >= CONNECTIONS * each);
    let took = agent.measured().saturating_sub(before);
    let most = if cfg!(debug_assertions) { held + held / 4 } else { held } + (1 << 20);
    assert!(took <= most, "{took} bytes measured, {held} held");
}

/// Behind answers that nobody reads requests wait, and what came for them is kept: the buffers in which parts of their bodies
/// came. Fields behind a body are not kept at all.
#[test]
fn what_requests_that_wait_keep_is_held() {
    const CONNECTIONS: u32 = 10;
    const LONG: usize = 7_600;
    let agent = Weighed::start("waiting", &format!("{BYTES_ALONE} memory {{ limit = \"1GiB\" }}"));
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    let head = |nth: u32| frame(HEADERS, END_HEADERS, 1 + 2 * nth, &block(FETCH_JWT));
    // An audience of 15,000 bytes.
    let large = message(&[&[0x0a, 0x98, 0x75][..], &[b'a'; 15_000]].concat());
    let answers: Vec<u8> = (0..4).flat_map(|nth| call_frames(1 + 2 * nth, FETCH_JWT, &large)).collect();
    // Each part of a body comes behind a head that HTTP/2 refuses alone, for a field that it does not have.
    let bad = [block(FETCH_JWT), literal("connection", &"x".repeat(LONG))].concat();
    let parts: Vec<u8> = (0..80)
        .flat_map(|nth| {
            let bad = frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * (24 + nth), &bad);
            [bad, frame(DATA, 0, 1 + 2 * (4 + nth % 20), &[0; 5])].concat()
        })
        .collect();
    let waiting: Vec<u8> = (4..24).flat_map(head).collect();
    let fields: Vec<u8> = (b'a'..=b'z')
        .flat_map(|first| (b'0'..=b'8').map(move |second| String::from_utf8(vec![first, second]).unwrap()))
        .flat_map(|name| literal(&name, ""))
        .collect();
    let trailers: Vec<u8> = (4..94)
        .flat_map(|nth| [head(nth), frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * nth, &fields)].concat())
        .collect();
    let (each, parts_each) = (PARKED + HTTP2, 20 * (STREAM + WAITING) + 80 * u64::try_from(LONG).unwrap());
    for (case, behind, errors, held) in [
        ("fields behind bodies", trailers, 90, each),
        ("parts of bodies", [waiting, parts].concat(), 80, each + parts_each),
    ] {
        agent.wait_for("held", |held| held == 0);
        let before = agent.measured();
        let protocol = || agent.series("durward_http2_errors_total{reason=\"protocol\"} ");
        let refused = protocol() + u64::from(CONNECTIONS * errors);
        let mut open = agent.connections(10);
        for stream in &mut open {
            stream.write_all(&[PREFACE, &settings(4, 0), &answers].concat()).unwrap();
        }
        // Four answers are under way, and nobody reads them.
        agent.wait_for("held", |held| held >= u64::from(CONNECTIONS) * (each + 60_000));
        for stream in &mut open {
            let sent = stream.write_all(&behind);
            assert!(sent.is_ok(), "{case}: {sent:?}\n{}", agent.log());
        }
        let began = Instant::now();
        while protocol() < refused {
            assert!(began.elapsed() < PATIENCE, "{case}: {} of {refused}\n{}", protocol(), agent.log());
            thread::sleep(Duration::from_millis(20));
        }
        let held = agent.wait_for("held", |all| all >= u64::from(CONNECTIONS) * held);
        let took = agent.measured().saturating_sub(before);
        println!("{case}: {} KiB measured, {} held", took >> 10, held >> 10);
        let most = if cfg!(debug_assertions) { held + held / 4 } else { held } + (1 << 20);
        assert!(took <= most && took >= held / 3, "{case}: {took} bytes measured, {held} held");
        drop(open);
    }
}

/// Who holds its share gets no more; when there is less of it the newest of whoever holds most are told to come back. A
/// caller below its share keeps its stream, and one that holds nothing is served.
#[test]
fn who_holds_most_gives_way_and_nobody_else() {
    let limits = &format!(
        "{BYTES_ALONE} gate {{ caller {{ unlimited = true }} connection {{ handshake_timeout = \"5m\" }} }}"
    );
    let agent = Weighed::start("heaviest", limits);
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let base = agent.measured().max(agent.memory("used"));
    // Connections may take eight MiB until it runs short.
    let budget = (base + (8 << 20)) * 100 / 70;
    agent.reload(limits, budget);

    // A neighbour with a stream, before anybody else.
    let watching = neighbour(&agent, &["watch"]).map(|mut command| Watching(command.spawn().unwrap()));
    // Each would hold some 600 KiB, together more than there is room for; one after the other, and read.
    let mut hog = agent.connections(20);
    for stream in &mut hog {
        for open in (0..100).step_by(20) {
            watch(stream, open, 20).unwrap();
            thread::sleep(Duration::from_millis(20));
            assert!(!drain(stream), "nobody is told to go\n{}", agent.log());
        }
    }
    let mut gone = vec![false; hog.len()];
    let used = agent.wait_for("used", |used| used >= budget * 65 / 100);
    let more = call(&agent.socket(), FETCH_JWT, &jwt_request("more"), PATIENCE);
    assert_ne!(more, Called::Answered, "it has its share");
    println!("{} KiB are used of {}", used >> 10, budget >> 10);
    assert!(used >= budget * 65 / 100 && used <= budget * 85 / 100, "{used} of {budget}\n{}", agent.log());

    let less = used * 100 / 88;
    agent.reload(limits, less);
    let began = Instant::now();
    while !gone[hog.len() - 1] {
        assert!(began.elapsed() < PATIENCE, "nobody was told\n{}", agent.log());
        for (nth, stream) in hog.iter_mut().enumerate() {
            gone[nth] |= drain(stream);
        }
    }
    agent.wait_for("used", |used| used <= less * 85 / 100);
    assert!(!drain(&mut hog[0]), "the oldest stay: {gone:?}\n{}", agent.log());
    let (told, log) = (format!("caller=uid:{}", geteuid()), agent.log());
    assert!(log.lines().any(|line| line.contains("memory limit: ") && line.contains(&told)), "{log}");
    if let (Some(mut command), Some(mut watching)) =
        (neighbour(&agent, &["fetch", "jwt", "--audience", "a"]), watching)
    {
        let out = command.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(watching.0.try_wait().unwrap(), None, "its stream is open");
        let told = format!("caller=uid:{NEIGHBOUR}");
        let log = agent.log();
        assert!(!log.lines().any(|line| line.contains(&told) && !line.contains(" audit: ")), "{log}");
    }
}

/// Two connections that are more than a share together, and less without one of them: that one goes as soon as a caller below
/// its share is refused for them, though nothing on it is read. The other stays.
#[test]
fn who_is_above_its_share_by_a_part_of_a_connection_gives_it_up_for_a_neighbour() {
    let limits = &format!(
        "{BYTES_ALONE} gate {{ caller {{ unlimited = true }} connection {{ handshake_timeout = \"5m\" }} }}"
    );
    let agent = Weighed::start("rests", limits);
    if neighbour(&agent, &["watch"]).is_none() {
        println!("nobody can be anybody else: left out");
        return;
    }
    let mut hog = agent.connections(2);
    for stream in &mut hog {
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
        for nth in 0..100 {
            stream.write_all(&frame(HEADERS, END_HEADERS, 1 + 2 * nth, &block(REFLECTION))).unwrap();
        }
    }
    agent.wait_for("held", |held| held > 200 * REFLECTED);
    // One that holds two finds no place among those that are set aside for who has none, or one.
    let mut watching: Vec<Watching> = Vec::new();
    for streams in 1..=2 {
        watching.push(Watching(neighbour(&agent, &["watch"]).unwrap().spawn().unwrap()));
        agent.wait_for("streams", |_| {
            agent.series("durward_streams_open{method=\"FetchX509SVID\"} ") == streams
        });
    }
    let used = agent.wait_for("used", |used| used > 200 * REFLECTED);
    // A part of what is set aside is taken, and not so much that anybody is closed for it.
    agent.reload(limits, used + (4 << 20));
    let began = Instant::now();
    while !serves(&agent) {
        assert!(began.elapsed() < PATIENCE, "{}", agent.log());
    }
    agent.wait_for("held", |held| held < 150 * REFLECTED);
    assert!(serves(&agent) && agent.memory("held") > 100 * REFLECTED, "the other stays\n{}", agent.log());
    for nth in &mut watching {
        assert_eq!(nth.0.try_wait().unwrap(), None, "its streams are open\n{}", agent.log());
    }
    let (told, log) = (format!("caller=uid:{}", geteuid()), agent.log());
    let mut lines = log.lines().filter(|line| line.contains("caller holds more than its share"));
    assert!(lines.clone().count() > 0 && lines.all(|line| line.contains(&told)), "{log}");
}

/// `durward api` of somebody else; `None` for whoever cannot be anybody else.
fn neighbour(agent: &Weighed, words: &[&str]) -> Option<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
    command
        .arg("api")
        .args(words)
        .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", agent.socket().display()))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .uid(NEIGHBOUR)
        .gid(NEIGHBOUR);
    geteuid().is_root().then_some(command)
}

/// Ended with the test.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// With room nobody is refused: as many connections of one user as come, each with a call.
#[test]
fn a_crowd_of_one_user_is_served_while_there_is_room() {
    let agent = Weighed::start("crowd", "node { cpu = 4096 }");
    let socket = agent.socket();
    let called: Vec<Called> = thread::scope(|scope| {
        let clients: Vec<_> = (0..300)
            .map(|nth| {
                let socket = &socket;
                scope.spawn(move || call(socket, FETCH_JWT, &jwt_request(&format!("a{nth}")), PATIENCE))
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let answered = called.iter().filter(|called| **called == Called::Answered).count();
    assert_eq!(answered, 300, "{called:?}");
}

/// A crowd of one user comes while there is room, and all of it asks once there is less: what each was let in for it gets.
#[test]
fn who_was_let_in_is_served_though_its_crowd_is_above_its_share() {
    const CROWD: u64 = 900;
    let limits = &format!(
        "{BYTES_ALONE} gate {{ caller {{ unlimited = true }} connection {{ handshake_timeout = \"5m\" }} }}"
    );
    let agent = Weighed::start("asks", limits);
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    // Short, and not so short that anybody is told to go.
    let budget = (agent.measured().max(agent.memory("used")) + CROWD * (PARKED + HTTP2)) * 100 / 76;
    agent.reload(limits, budget);
    let mut open = agent.connections(900);
    agent.wait_for("held", |held| held == CROWD * PARKED);
    for stream in &mut open {
        watch(stream, 0, 1).unwrap();
    }
    let began = Instant::now();
    let streams = || agent.series("durward_streams_open{method=\"FetchX509SVID\"} ");
    while streams() < CROWD {
        assert!(began.elapsed() < PATIENCE, "{} are open\n{}", streams(), agent.log());
        thread::sleep(Duration::from_millis(50));
    }
    agent.wait_for("used", |used| used > budget * 70 / 100);
    // One more on any of them is one too many.
    let more = call(&agent.socket(), FETCH_JWT, &jwt_request("more"), PATIENCE);
    assert_ne!(more, Called::Answered, "it has its share");
}

/// Of a crowd that was let in while there was room, and of which half finds no memory when all of it begins to speak, each that is
/// refused is counted for its caller and told of; the first few hear why themselves, and a neighbour is served.
#[test]
fn who_finds_no_memory_to_begin_is_refused_by_name() {
    const CROWD: u64 = 800;
    let limits = &format!("{BYTES_ALONE} gate {{ connection {{ handshake_timeout = \"5m\" }} }}");
    let agent = Weighed::start("begins", limits);
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let mut crowd = agent.connections(CROWD.try_into().unwrap());
    agent.wait_for("held", |held| held == CROWD * PARKED);
    // For half of them, beside what is set aside and what is nobody's; and nobody is told to go before that.
    let budget = agent.measured().max(agent.memory("used")) + CROWD / 2 * HTTP2 + 64 * NEWCOMER + SPARE;
    let late = (budget - SPARE) * 100 / budget;
    let memory = format!("memory {{ limit = {budget} refuse_new_at = {late} close_heaviest_at = 99 }}");
    write_config(agent.dir.path(), &blocks(agent.dir.path(), &format!("{limits} {memory}")));
    agent.process.signal(Signal::SIGHUP);
    agent.wait_for("budget", |told| told == budget);
    for stream in &mut crowd {
        watch(stream, 0, 1).unwrap();
    }
    let refused = || {
        ["memory", "memory_taken"]
            .map(|why| agent.series(&format!("durward_connections_refused_total{{reason=\"{why}\"}} ")))
            .iter()
            .sum::<u64>()
    };
    let began = Instant::now();
    let came = |stream: &mut UnixStream| {
        stream.set_nonblocking(true).unwrap();
        let mut all = Vec::new();
        (stream.read_to_end(&mut all).is_ok() || !all.is_empty()).then_some(all)
    };
    while agent.series("durward_connections_parked ") > 0 || refused() < 50 {
        assert!(began.elapsed() < PATIENCE, "{}\n{}", refused(), agent.log());
        thread::sleep(Duration::from_millis(50));
    }
    if let Some(mut command) = neighbour(&agent, &["fetch", "jwt", "--audience", "a"]) {
        assert!(command.output().unwrap().status.success(), "{}", agent.log());
    }
    let told = crowd.iter_mut().filter_map(came).filter(|got| {
        got.windows(11).any(|text| text == b"grpc-status") && got.windows(6).any(|text| text == b"memory")
    });
    assert!((1..=8).contains(&told.count()), "the first few");
    let admin = agent.dir.path().join("data/admin.sock");
    let ask = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
        let out = command.args(words).arg("--socket-path").arg(&admin).output().unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let told: serde_json::Value = serde_json::from_str(&ask(&["limits", "--output", "json"])).unwrap();
    let own = format!("uid:{}", geteuid());
    let row =
        told["heaviest"].as_array().unwrap().iter().find(|row| row["stage"] == "gate" && row["key"] == own);
    let of_caller = row.unwrap_or_else(|| panic!("{told}"))["refused"].as_u64().unwrap();
    assert!(of_caller >= 50 && of_caller <= refused(), "{told}");
    let explained = ask(&["explain", "--pid", &std::process::id().to_string()]);
    assert!(explained.contains(" of its connections were refused\n"), "{explained}");
    let log = || agent.log();
    let (refusal, audit) = (format!("caller={own} short_of=memory"), "audit: connection refused");
    while !log().contains(&refusal) || !log().contains(audit) {
        assert!(began.elapsed() < PATIENCE, "{}", log());
        thread::sleep(Duration::from_millis(50));
    }
}

/// How the crowd fared.
#[derive(Debug, Default)]
struct Fared {
    answered: usize,
    /// Of these, whose streams are open a second later.
    stay: usize,
    /// With a status, or to come back.
    told: usize,
    /// Without a word, as the crowd behind the first few is.
    closed: usize,
}

/// The kind of the first frame that is a part of the answer on the first stream, or all of it, or that says to come back.
fn first_word(mut got: &[u8]) -> Option<u8> {
    while let Some(([a, b, c, kind, flags, stream @ ..], rest)) = got.split_first_chunk::<9>() {
        let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap();
        let is_whole = *kind == HEADERS && flags & END_STREAM != 0;
        if *stream == [0, 0, 0, 1] && (*kind == DATA || is_whole) || *kind == GOAWAY {
            return Some(*kind);
        }
        got = rest.get(length..)?;
    }
    None
}

/// A crowd that comes and calls at once. Who is not served leaves.
fn crowd_comes(agent: &Weighed, crowd: usize) -> Fared {
    let mut open: Vec<(UnixStream, Vec<u8>)> = (0..crowd)
        .map(|_| {
            let mut stream = UnixStream::connect(agent.socket()).unwrap();
            // One that was closed meanwhile is seen below.
            let _sent = watch(&mut stream, 0, 1).is_ok();
            stream.set_nonblocking(true).unwrap();
            (stream, Vec::new())
        })
        .collect();
    let (began, mut fared) = (Instant::now(), Fared::default());
    let mut served = Vec::new();
    while !open.is_empty() {
        assert!(began.elapsed() < PATIENCE, "{} of {crowd} wait\n{}", open.len(), agent.log());
        thread::sleep(Duration::from_millis(5));
        open.retain_mut(|(stream, got)| {
            let ended = stream.read_to_end(got).is_ok();
            match first_word(got) {
                Some(DATA) => served.push(stream.try_clone().unwrap()),
                Some(_) => fared.told += 1,
                _ if ended => fared.closed += 1,
                _ => return true,
            }
            false
        });
    }
    fared.answered = served.len();
    // Nor is who was answered told to go for those who came too late.
    thread::sleep(Duration::from_secs(1));
    fared.stay = served.iter_mut().filter_map(|stream| (!drain(stream)).then_some(())).count();
    fared
}

/// However many processes of one user begin at once, as many are served as there is memory for. Tokens refuse none of them.
#[test]
fn of_a_larger_crowd_no_fewer_are_served() {
    const FIT: u64 = 300;
    let limits =
        "node { cpu = 4096 } gate { connection { handshake_timeout = \"5m\" stall_timeout = \"5m\" } }";
    let agent = Weighed::start("larger", limits);
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let base = agent.measured().max(agent.memory("used"));
    // Memory begins to be short behind so many.
    let budget = (base + FIT * (PARKED + HTTP2)) * 100 / 70;
    write_config(
        agent.dir.path(),
        &blocks(agent.dir.path(), &format!("{limits} memory {{ limit = {budget} }}")),
    );
    agent.process.signal(Signal::SIGHUP);
    agent.wait_for("budget", |told| told == budget);
    let [few, many] = [400, 1_200].map(|crowd| {
        let fared = crowd_comes(&agent, crowd);
        // They have closed, which is seen at once, however little memory there is.
        agent.wait_for("held", |held| held == 0);
        println!("of {crowd}: {fared:?}");
        assert_eq!(fared.answered + fared.told + fared.closed, crowd, "{fared:?}\n{}", agent.log());
        fared.stay
    });
    // What is not optimized takes more, and for that some are told to go again.
    assert!(few >= 270 && many >= few * 2 / 3, "{few} of 400, {many} of 1,200\n{}", agent.log());
    let log = agent.log();
    assert!(log.contains("memory limit: caller holds its share"), "{log}");
    assert!(!log.contains("reason=rate"), "{log}");
}

/// Who has all places and does not read that it is to go loses some, as soon as one who has few is refused for them.
#[test]
fn who_does_not_read_loses_its_places_to_a_neighbour() {
    let agent = Weighed::start(
        "unread",
        "node { cpu = 4096 } gate { connections = 24 reserve = 8 connection { handshake_timeout = \"5m\" } }",
    );
    let began = Instant::now();
    let mut open = agent.connections(16);
    for stream in &mut open {
        watch(stream, 0, 20).unwrap();
    }
    while agent.series("durward_connections_open ") < 14 {
        assert!(began.elapsed() < PATIENCE, "{}", agent.log());
    }
    if neighbour(&agent, &["watch"]).is_none() {
        println!("nobody can be anybody else: left out");
        return;
    }
    let mut watching: Vec<Watching> = Vec::new();
    for number in 1..=4 {
        watching.push(Watching(neighbour(&agent, &["watch"]).unwrap().spawn().unwrap()));
        while !serves(&agent) {
            assert!(began.elapsed() < 2 * PATIENCE, "{number}\n{}", agent.log());
        }
    }
    for nth in &mut watching {
        assert_eq!(nth.0.try_wait().unwrap(), None, "its streams are open\n{}", agent.log());
    }
    let log = agent.log();
    assert!(log.contains("connection limit: caller holds more than its share"), "{log}");
    drop(open);
}

/// Whether the neighbour's next call is answered.
fn serves(agent: &Weighed) -> bool {
    neighbour(agent, &["fetch", "jwt", "--audience", "a"])
        .is_some_and(|mut it| it.output().unwrap().status.success())
}

/// Without places a caller has its share of them, and others find theirs.
#[test]
fn a_caller_has_its_share_of_places_and_a_neighbour_finds_one() {
    let agent = Weighed::start(
        "places",
        "node { cpu = 4096 } gate { connections = 200 reserve = 20 connection { handshake_timeout = \"5m\" } }",
    );
    let mut open = agent.connections(400);
    // They are taken one after the other; who is not is closed.
    let began = Instant::now();
    let mut left = open.len();
    while left > 150 {
        assert!(began.elapsed() < PATIENCE, "{left} are open");
        thread::sleep(Duration::from_millis(100));
        open.retain_mut(|stream| !drain(stream));
        left = open.len();
    }
    assert!(left >= 130, "its share: {left}");
    while !agent.log().contains("short_of=connections") {
        assert!(began.elapsed() < PATIENCE, "{}", agent.log());
        thread::sleep(Duration::from_millis(100));
    }
    if let Some(mut command) = neighbour(&agent, &["fetch", "jwt", "--audience", "a"]) {
        let out = command.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    // Nobody keeps it from going on when there is room.
    drop(open);
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("again"), PATIENCE), Called::Answered);
}
