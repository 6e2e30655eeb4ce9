//! Hostile callers against the whole agent, a process of its own. Each is bounded in count and time, and for each the
//! agent stays within its memory, and a neighbour is served meanwhile.
//!
//! The neighbour is the command, run as another user where the tests run as root. Where they do not, it is the same caller
//! as the hostile one, and asks once that one is done. What a single connection may do is held in `listener`.

#![expect(clippy::disallowed_methods, reason = "its hostile clients are threads, which may sleep")]

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use durward::{
    api::proto::workload as pb,
    limits::budget::{
        HTTP2, PARKED, PROCESS, STREAM, UNFINISHED, UPLOAD, UPLOADS, connection_at_most, spare,
    },
};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::geteuid,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    frames::{
        CONTINUATION, Called, DATA, END_HEADERS, END_STREAM, FETCH_JWT, HEADERS, PING, PREFACE, RST_STREAM,
        SETTINGS, answer, block, call, call_frames, frame, jwt_request, literal, message, settings,
    },
    support::{Process, TRUST_DOMAIN, TestAgent, client, request, write_config},
};

pub(crate) const NEIGHBOUR: u32 = 65_534;
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the hostile callers of one test may add to the agent's memory, in KiB. The caller's 64 connections at 40 KiB, what
/// passes through, and twice that for what the allocator keeps.
const BUDGET: u64 = 6 * 1024;

pub(crate) struct Agent {
    process: Process,
    dir: tempfile::TempDir,
    before: u64,
    /// What the neighbour's call ends with.
    expected: &'static str,
}

impl Agent {
    /// Starts an agent with an entry for this user and for the neighbour, and one call behind it.
    pub(crate) fn start(connection: &str) -> Self {
        Self::with(connection, &Self::entries())
    }

    /// An entry for this user, and one for the neighbour.
    fn entries() -> String {
        let mut text = String::new();
        for uid in [geteuid().as_raw(), NEIGHBOUR] {
            text.push_str(&format!(
                "entry \"spiffe://{TRUST_DOMAIN}/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n"
            ));
        }
        text
    }

    /// Starts an agent with these settings of a connection, and these blocks.
    pub(crate) fn with(connection: &str, blocks: &str) -> Self {
        Self::limited(&format!("gate {{ connection {{ {connection} }} }}"), blocks)
    }

    /// An agent with these limits, which refuse at once for being set, and these blocks.
    fn limited(limits: &str, blocks: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let limits = format!("ratelimit {{ {limits} }}\n");
        write_config(dir.path(), &[&limits, blocks].concat());
        let mut process = Process::spawn(dir.path());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            process.serving(dir.path()).await;
        });
        let mut agent = Self {
            process,
            dir,
            before: 0,
            expected: if blocks.contains("entry ") { "" } else { "no identity issued" },
        };
        agent.served();
        agent.before = agent.process.memory("VmRSS");
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// The neighbour gets a token, where it has an entry.
    fn served(&self) {
        let mut command = self.command();
        if geteuid().is_root() {
            command.uid(NEIGHBOUR).gid(NEIGHBOUR);
        }
        let out = command.output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.success(), self.expected.is_empty(), "the neighbour: {text}");
        assert!(text.contains(self.expected), "the neighbour: {text}");
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
        command
            .args(["api", "fetch", "jwt", "--audience", "neighbour", "--timeout", "60s"])
            .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", self.socket().display()))
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Runs `hostile`, while the neighbour is served if it is somebody else.
    pub(crate) fn bear<R: Send>(&self, hostile: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            let hostile = scope.spawn(hostile);
            if geteuid().is_root() {
                self.served();
                self.served();
            }
            hostile.join().unwrap()
        })
    }

    /// Holds that memory stayed within the budget, and that this caller too is served again.
    pub(crate) fn well(&self, case: &str) {
        let most = self.process.memory("VmHWM");
        println!("{case}: {} KiB before, {most} KiB at most", self.before);
        assert!(most <= self.before + BUDGET, "{case}: {most} KiB, {} KiB before", self.before);
        self.serves_again(case);
    }

    /// Holds that this caller is served again.
    fn serves_again(&self, case: &str) {
        let began = Instant::now();
        while call(&self.socket(), FETCH_JWT, &jwt_request("again"), PATIENCE) != Called::Answered {
            assert!(began.elapsed() < PATIENCE, "{case}: its own calls are answered again");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The most memory that it had, in KiB.
    pub(crate) fn most_memory(&self) -> u64 {
        self.process.memory("VmHWM")
    }

    /// Sends the agent a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Adds these blocks to the entries, and waits until they count for this user.
    pub(crate) fn reload(&self, blocks: &str) {
        write_config(self.dir.path(), &[&Self::entries(), blocks].concat());
        self.process.signal(Signal::SIGHUP);
        let began = Instant::now();
        while call(&self.socket(), FETCH_JWT, &jwt_request("reload"), PATIENCE) == Called::Answered {
            assert!(began.elapsed() < PATIENCE, "the reload counts");
        }
    }

    /// The neighbour is served, where it is another user.
    pub(crate) fn neighbour_is_served(&self) {
        if geteuid().is_root() {
            self.served();
        }
    }

    /// Tells the agent to end, and holds that it does.
    pub(crate) fn ends(mut self) {
        self.process.signal(Signal::SIGTERM);
        let began = Instant::now();
        while !self.process.has_ended() {
            assert!(began.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
        assert!(self.process.wait().success());
    }

    /// Open descriptors of the agent.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.pid())).unwrap().count()
    }
}

/// Lets one process hold as many connections as a test opens.
fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// How the agent must end a connection that does this.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// It closes it.
    Cut,
    /// It may keep it: nothing grows.
    Any,
}

/// What is sent on one connection: `first`, and then `again` so many times with a pause in between.
struct Hostile {
    case: &'static str,
    first: Vec<u8>,
    again: Box<dyn Fn(u32) -> Vec<u8> + Sync>,
    times: u32,
    pause: Duration,
    end: End,
}

impl Hostile {
    fn new(
        case: &'static str,
        first: &[&[u8]],
        times: u32,
        again: impl Fn(u32) -> Vec<u8> + Sync + 'static,
    ) -> Self {
        let again = Box::new(again);
        Self { case, first: first.concat(), again, times, pause: Duration::ZERO, end: End::Cut }
    }

    /// Whether the agent ended it, within a minute.
    fn run(&self, socket: &Path) -> bool {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sent = stream.write_all(&self.first).is_ok();
        for nth in 0..self.times {
            if !sent {
                break;
            }
            thread::sleep(self.pause);
            sent = stream.write_all(&(self.again)(nth)).is_ok();
        }
        if self.end == End::Any {
            return true;
        }
        // What it answered is of no interest; the end of it is.
        let mut buffer = [0; 65_536];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
            }
        }
    }
}

#[test]
fn hostile_connections_end_within_budget() {
    let hello = frame(SETTINGS, 0, 0, &[]);
    let deaf = settings(4, 0);
    let long = literal("x-long", &"a".repeat(900));
    let headers = block(FETCH_JWT);
    let body = jwt_request("flood");
    let odd = |nth: u32| 1 + 2 * nth;
    let slow_preface = Hostile {
        pause: Duration::from_millis(200),
        ..Hostile::new("slow preface", &[], 24, |nth| vec![PREFACE[usize::try_from(nth).unwrap()]])
    };
    let slow_reader = {
        let (headers, body) = (headers.clone(), body.clone());
        let calls = move |nth| {
            [frame(HEADERS, END_HEADERS, odd(nth), &headers), frame(DATA, END_STREAM, odd(nth), &body)]
                .concat()
        };
        // They hold what they were given for as long as the neighbour asks; `listener` holds that they end.
        Hostile { end: End::Any, ..Hostile::new("slow reader", &[PREFACE, &deaf], 16, calls) }
    };
    let cases = [
        Hostile::new("silent", &[], 0, |_| Vec::new()),
        slow_preface,
        Hostile::new("preface alone", &[PREFACE], 0, |_| Vec::new()),
        Hostile::new("half a frame", &[PREFACE, &hello[..5]], 0, |_| Vec::new()),
        Hostile::new("header flood", &[PREFACE, &hello], 500, {
            let payload = [headers.clone(), long.repeat(15)].concat();
            move |nth| frame(HEADERS, END_HEADERS | END_STREAM, odd(nth), &payload)
        }),
        Hostile::new("continuations", &[PREFACE, &hello, &frame(HEADERS, 0, 1, &headers)], 2_000, {
            move |_| frame(CONTINUATION, 0, 1, &long)
        }),
        Hostile::new("resets", &[PREFACE, &hello], 5_000, {
            let headers = headers.clone();
            move |nth| {
                let reset = frame(RST_STREAM, 0, odd(nth), &8_u32.to_be_bytes());
                [frame(HEADERS, END_HEADERS, odd(nth), &headers), reset].concat()
            }
        }),
        Hostile::new("pings", &[PREFACE, &hello], 20_000, |_| frame(PING, 0, 0, &[0; 8])),
        Hostile::new("settings", &[PREFACE, &hello], 20_000, |_| settings(4, 1 << 16)),
        Hostile::new(
            "empty data",
            &[PREFACE, &hello, &frame(HEADERS, END_HEADERS, 1, &headers)],
            20_000,
            |_| frame(DATA, 0, 1, &[]),
        ),
        Hostile::new("thousands of streams", &[PREFACE, &deaf], 5_000, {
            let (headers, body) = (headers.clone(), body);
            move |nth| {
                let data = frame(DATA, END_STREAM, odd(nth), &body);
                [frame(HEADERS, END_HEADERS, odd(nth), &headers), data].concat()
            }
        }),
        slow_reader,
    ];
    let agent = Agent::start("handshake_timeout = \"2s\"");
    for hostile in &cases {
        let socket = agent.socket();
        let cut = agent.bear(|| {
            thread::scope(|scope| {
                let all: Vec<_> = (0..8).map(|_| scope.spawn(|| hostile.run(&socket))).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
            })
        });
        assert!(cut.iter().all(|cut| *cut), "{}: {cut:?}", hostile.case);
        agent.well(hostile.case);
    }
}

/// Requests that announce the most there may be, send all of it but a byte, and never end: on every stream of as many
/// connections. What each takes is what is reckoned for its streams, and for what is half-read on all of them together; and all
/// that is within the budget.
#[test]
fn unfinished_requests_take_little() {
    const CONNECTIONS: u32 = 64;
    const STREAMS: u32 = 16;
    const LIMIT: u64 = 64 << 20;
    let all = |unfinished: u64| {
        let each = PARKED + HTTP2 + u64::from(STREAMS - 1) * STREAM + unfinished * UPLOAD + UNFINISHED;
        u64::from(CONNECTIONS) * each
    };
    raise_descriptors();
    let memory = format!("ratelimit {{ memory {{ limit = \"{LIMIT}\" }} }}\n");
    let more = literal("x-more", &"a".repeat(120)).repeat(45);
    let (few, within) = (all(UPLOADS), LIMIT - spare(LIMIT) - PROCESS);
    for (case, path, size, more, reckoned) in [
        ("few bytes of each", FETCH_JWT, 200, &[][..], few),
        ("what a connection has in any case", FETCH_JWT, 1200, &[], few),
        ("all of it but a byte", FETCH_JWT, 64 * 1024, &[], within),
        ("announced and not sent", FETCH_JWT, 0, &[], few),
        ("headers of kilobytes", FETCH_JWT, 1200, &more, few),
        ("reflection", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 4 << 20, &[], few),
        ("health", "/grpc.health.v1.Health/Check", 1024, &[], few),
    ] {
        let agent = Agent::with("", &[memory.clone(), Agent::entries()].concat());
        let socket = agent.socket();
        agent.bear(|| {
            let mut open = Vec::new();
            for _ in 0..CONNECTIONS {
                let mut stream = UnixStream::connect(&socket).unwrap();
                stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
                let mut sent = stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).is_ok();
                // The length alone of the largest there are.
                let announced = [0, 0, 1, 0, 0, 7, 7, 7, 7, 7, 7];
                let body = if size == 0 { announced.to_vec() } else { message(&vec![7; size]) };
                let body = &body[..body.len().min(68 * 1024) - 6];
                for nth in 0..STREAMS {
                    let head = frame(HEADERS, END_HEADERS, 1 + 2 * nth, &[&block(path), more].concat());
                    sent = sent && stream.write_all(&head).is_ok();
                    for part in body.chunks(16 * 1024) {
                        sent = sent && stream.write_all(&frame(DATA, 0, 1 + 2 * nth, part)).is_ok();
                    }
                }
                open.push(stream);
            }
            // As long as they are there.
            thread::sleep(Duration::from_millis(300));
        });
        let took = (agent.most_memory() - agent.before) * 1024;
        println!("{case}: {took} bytes, at most {reckoned} reckoned");
        assert!(took <= reckoned, "{case}: {took} bytes, {reckoned} reckoned");
        agent.serves_again(case);
    }
}

/// A caller asks for the largest tokens there are on each stream of several connections, reads none of them, and has the
/// others wait with heads of kilobytes. What each connection takes is what is reckoned for it at most.
#[test]
fn answers_that_nobody_reads_take_little() {
    const CONNECTIONS: u32 = 5;
    let largest = {
        let text = [0x0a, 0x80, 0x7d].into_iter().chain([b'a'; 16_000]).collect::<Vec<u8>>();
        message(&text)
    };
    let more = literal("x-more", &"a".repeat(120)).repeat(45);
    for (case, streams) in [("some streams", 16), ("many streams", 100)] {
        let agent = Agent::start(&format!("streams = {streams}"));
        let socket = agent.socket();
        agent.bear(|| {
            let open: Vec<UnixStream> = (0..CONNECTIONS)
                .map(|_| {
                    let mut stream = UnixStream::connect(&socket).unwrap();
                    stream.write_all(&[PREFACE, &settings(4, 0)].concat()).unwrap();
                    for nth in 0..streams {
                        // What may come before anything is read, of bodies.
                        let (more, body) =
                            if nth < 3 { (&[][..], &largest) } else { (&more[..], &jwt_request("a")) };
                        let head = [&block(FETCH_JWT), more].concat();
                        let head = frame(HEADERS, END_HEADERS, 1 + 2 * nth, &head);
                        stream
                            .write_all(&[head, frame(DATA, END_STREAM, 1 + 2 * nth, body)].concat())
                            .unwrap();
                    }
                    stream
                })
                .collect();
            // As long as they are there.
            thread::sleep(Duration::from_millis(500));
            drop(open);
        });
        let took = agent.most_memory().saturating_sub(agent.before) * 1024;
        let reckoned = u64::from(CONNECTIONS) * connection_at_most(streams);
        println!("{case}: {took} bytes, at most {reckoned} reckoned");
        assert!(took <= reckoned, "{case}: {took} bytes, {reckoned} reckoned");
        agent.serves_again(case);
    }
}

#[test]
fn a_body_that_is_no_message_is_refused_and_the_connection_serves_on() {
    let agent = Agent::start("");
    for (case, body) in [
        ("no frame", vec![]),
        ("half a frame", vec![0, 0, 0]),
        ("4 GiB are announced", [&[0, 255, 255, 255, 255][..], b"few"].concat()),
        ("more than may be", message(&vec![7; 80 * 1024])[..40 * 1024].to_vec()),
        ("compressed", [&[1, 0, 0, 0, 1][..], b"x"].concat()),
        ("no protobuf", message(&[0xff; 64])),
        ("a field without an end", message(&[0x0a, 0x7f, b'a'])),
        ("audiences without end", message(&[0x0a, 0x00].repeat(4_000))),
    ] {
        let mut stream = UnixStream::connect(agent.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut begun =
            [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS, 1, &block(FETCH_JWT))]
                .concat();
        let mut parts = body.chunks(16 * 1024).peekable();
        if parts.peek().is_none() {
            begun.extend(frame(DATA, END_STREAM, 1, &[]));
        }
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { END_STREAM } else { 0 };
            begun.extend(frame(DATA, flags, 1, part));
        }
        stream.write_all(&begun).unwrap();
        let called = answer(&mut stream);
        assert_ne!(called, Called::Silent, "{case}");
        assert_ne!(called, Called::Closed, "{case}");
        agent.well(case);
    }
}

/// One caller opens thousands and leaves them, or leaves at once; nothing stays behind.
#[test]
fn thousands_of_connections_of_one_caller_are_closed() {
    const MOST: usize = 64;
    /// Refused, and told why within two seconds.
    const TOLD: usize = 2;
    raise_descriptors();
    let most = "ratelimit { gate { caller { connections = 64 rate = 100 burst = 200 } } }\n";
    let agent = Agent::with("", &[most, &Agent::entries()].concat());
    let socket = agent.socket();
    let before = agent.descriptors();
    agent.bear(|| {
        let mut open = Vec::new();
        let mut most = 0;
        for nth in 0..3_000 {
            open.extend(UnixStream::connect(&socket));
            if nth % 500 == 0 {
                most = most.max(agent.descriptors());
            }
        }
        let closed = |stream: &mut UnixStream| {
            stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
            matches!(stream.read(&mut [0]), Ok(0)) || stream.peer_addr().is_err()
        };
        let left = open.iter_mut().filter_map(|stream| (!closed(stream)).then_some(())).count();
        assert!(left <= MOST + TOLD, "{left} are open");
        // Two descriptors each, those of the neighbour, and of those that are refused and not closed yet one each.
        assert!(most <= before + 2 * MOST + 16 + 2048, "{most} descriptors, {before} before");
    });
    agent.well("left open");

    agent.bear(|| {
        for nth in 0..3_000 {
            let mut stream = UnixStream::connect(&socket).unwrap();
            // Some say something first; it may be closed already.
            let _said = match nth % 3 {
                0 => Ok(()),
                1 => stream.write_all(PREFACE),
                _ => {
                    stream.write_all(&[PREFACE, &call_frames(1, FETCH_JWT, &jwt_request("leaves"))].concat())
                }
            };
            let _half = if nth % 2 == 0 { stream.shutdown(Shutdown::Write) } else { Ok(()) };
        }
    });
    agent.well("left at once");
    let began = Instant::now();
    while agent.descriptors() > before + 4 {
        assert!(began.elapsed() < PATIENCE, "{} descriptors, {before} before", agent.descriptors());
        thread::sleep(Duration::from_millis(50));
    }
}

/// A crowd that always stands at the socket, refused each time, keeps the agent neither from what it has to do meanwhile
/// (connections that ended are forgotten, a reload counts) nor from ending when it is told to.
#[test]
fn a_flood_at_the_socket_keeps_the_agent_from_nothing() {
    raise_descriptors();
    let mut agent = Agent::start("");
    let socket = agent.socket();
    // However this test ends, they do.
    let until = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| while Instant::now() < until && UnixStream::connect(&socket).is_ok() {});
        }
        thread::sleep(Duration::from_secs(3));
        let most = agent.process.memory("VmHWM");
        assert!(most <= agent.before + BUDGET, "{most} KiB, {} before", agent.before);
        if geteuid().is_root() {
            agent.served();
        }
        agent.process.signal(Signal::SIGTERM);
        let began = Instant::now();
        while !agent.process.has_ended() {
            assert!(began.elapsed() < PATIENCE / 4, "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
    });
    assert!(agent.process.wait().success());
}

#[test]
fn a_process_per_call_leaves_nothing() {
    let agent = Agent::start("");
    let before = agent.descriptors();
    agent.bear(|| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..15 {
                        assert!(agent.command().output().unwrap().status.success());
                    }
                });
            }
        });
    });
    agent.well("a process per call");
    let began = Instant::now();
    while agent.descriptors() > before + 4 {
        assert!(began.elapsed() < PATIENCE, "{} descriptors, {before} before", agent.descriptors());
        thread::sleep(Duration::from_millis(50));
    }
}

/// What a refusal says about when to come back.
pub(crate) fn wait_of(status: &Status) -> Duration {
    let told = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap();
    let rounded = told.as_nanos().div_ceil(1_000_000).to_string();
    assert_eq!(pushback, rounded, "both say the same");
    told
}

fn jwt() -> tonic::Request<pb::JwtsvidRequest> {
    request(pb::JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() })
}

/// What callers have by default, set.
const CALLER: &str = "caller { rate = 100 burst = 200 }";

/// What is refused tells the wait that is true: who waits that long passes. A stream that is open stays, and gets its update;
/// the neighbour sees none of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_tells_when_to_come_back() {
    let agent = tokio::task::spawn_blocking(|| Agent::limited(CALLER, &Agent::entries())).await.unwrap();
    let mut client = client(&agent.socket()).await;
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let mut stream = stream.into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);

    // 200 at once and 100 a second. Two calls, since a token was signed for the first.
    let began = Instant::now();
    let (mut passed, mut refused) = (0_u32, None);
    while refused.is_none() {
        assert!(began.elapsed() < PATIENCE, "{passed} calls, none refused");
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let mut client = client.clone();
            calls.spawn(async move { client.fetch_jwtsvid(jwt()).await });
        }
        while let Some(done) = calls.join_next().await {
            match done.unwrap() {
                Ok(_) => passed += 1,
                Err(status) => refused = Some(status),
            }
        }
    }
    let most = 200.0 + 100.0 * began.elapsed().as_secs_f64() + 1.0;
    assert!(passed >= 190 && f64::from(passed) <= most, "{passed} passed, at most {most}");
    let status = refused.unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    // Others of the same moment may have had its tokens: one that is alone.
    let status = loop {
        if let Err(status) = client.fetch_jwtsvid(jwt()).await {
            break status;
        }
        assert!(began.elapsed() < PATIENCE, "it is refused no more");
    };
    let wait = wait_of(&status);
    assert!(wait > Duration::ZERO && wait <= Duration::from_millis(20), "{wait:?}");
    tokio::time::sleep(wait).await;
    client.fetch_jwtsvid(jwt()).await.unwrap();

    // Other methods have buckets of their own, and ValidateJWTSVID has one.
    client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let mut codes = Vec::new();
    let began = Instant::now();
    while codes.last() != Some(&Code::ResourceExhausted) {
        assert!(began.elapsed() < PATIENCE, "ValidateJWTSVID is limited");
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let mut client = client.clone();
            let message = pb::ValidateJwtsvidRequest { audience: "a".to_owned(), svid: "none".to_owned() };
            calls.spawn(async move { client.validate_jwtsvid(request(message)).await.unwrap_err().code() });
        }
        codes.extend(calls.join_all().await);
        codes.sort_by_key(|code| *code == Code::ResourceExhausted);
    }
    assert!(codes.iter().all(|code| matches!(code, Code::InvalidArgument | Code::ResourceExhausted)));

    if geteuid().is_root() {
        agent.served();
    }
    write_config(
        agent.dir.path(),
        &format!(
            "entry \"spiffe://{TRUST_DOMAIN}/new\" {{\n  selectors = [\"unix:uid:{}\"]\n}}\n",
            geteuid()
        ),
    );
    agent.process.signal(Signal::SIGHUP);
    let update = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
    assert!(update.svids[0].spiffe_id.ends_with("/new"), "the stream stays, and gets its update");
    agent.well("over the limit");
}

/// What bounds a connection is read again: it counts for the next one, and those that are open stay as they are.
#[tokio::test]
async fn a_reload_changes_what_the_next_connection_may_hold() {
    let mut agent = TestAgent::start("");
    let streams = async |agent: &TestAgent| {
        let stream = tokio::net::UnixStream::connect(agent.socket()).await.unwrap();
        let (mut send, mut connection) = h2::client::handshake(stream).await.unwrap();
        let mut ping = connection.ping_pong().unwrap();
        let kept = tokio::spawn(connection);
        // The answer to a ping comes after the settings.
        ping.ping(h2::Ping::opaque()).await.unwrap();
        send = send.ready().await.unwrap();
        let most = send.current_max_send_streams();
        kept.abort();
        most
    };
    assert_eq!(streams(&agent).await, 100);
    agent.reload("ratelimit { gate { connection { streams = 3 } } }").unwrap();
    assert_eq!(streams(&agent).await, 3);
    agent.reload("ratelimit { gate { connection { streams = 0 } } }").unwrap_err();
    assert_eq!(streams(&agent).await, 3, "a mistake changes nothing");
}

/// A health check of a user whose connections the gate refuses finds an agent that is up: whoever restarts it for that takes
/// identity away from all others.
#[test]
fn a_refused_health_check_is_no_dead_agent() {
    let check = |agent: &Agent| {
        let out = Command::new(env!("CARGO_BIN_EXE_durward"))
            .arg("healthcheck")
            .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", agent.socket().display()))
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let mut agent = Agent::start("");
    assert_eq!(check(&agent), (Some(0), "Agent is healthy.\n".to_owned()));
    let uid = geteuid();
    let blocked = "Agent is up, and its configuration blocks this user. Root sees which limit it is\n\
                   with `durward explain --pid PID`, of any process of this user.\n";
    let for_now = "Agent is up, and refuses this user for now: `durward limits` shows why.\n";
    for (refusal, said) in [
        ("gate { override \"uid:UID\" { block = true } }", blocked),
        ("caller { override \"uid:UID\" { block = true } }", blocked),
        ("gate { caller { rate = 1 per = \"day\" burst = 1 } }", for_now),
    ] {
        write_config(
            agent.dir.path(),
            &format!("ratelimit {{ {} }}", refusal.replace("UID", &uid.to_string())),
        );
        agent.process.signal(Signal::SIGHUP);
        let began = Instant::now();
        let refused = (Some(0), said.to_owned());
        while check(&agent) != refused {
            assert!(began.elapsed() < PATIENCE, "{refusal}: {:?}", check(&agent));
        }
        // It is in force: each time from now on. Of connections, not each one is told why.
        for _ in 0..10 {
            let (code, said) = check(&agent);
            let closed = refusal.starts_with("gate") && said == for_now;
            assert!(code == Some(0) && (said == refused.1 || closed), "{refusal}: {said}");
        }
        write_config(agent.dir.path(), "");
        agent.process.signal(Signal::SIGHUP);
        while check(&agent).1 != "Agent is healthy.\n" {
            assert!(began.elapsed() < PATIENCE, "{refusal}");
        }
    }
    agent.process.signal(Signal::SIGKILL);
    agent.process.wait();
    assert_eq!(check(&agent).0, Some(4), "one that is gone is not well");
    // Nor is one that hangs: it takes connections and says nothing.
    std::fs::remove_file(agent.socket()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(agent.socket()).unwrap();
    let hangs = Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["healthcheck", "--timeout", "300ms"])
        .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", agent.socket().display()))
        .status()
        .unwrap();
    assert_eq!(hangs.code(), Some(1));
    drop(listener);
}

/// Who has no identity pays five times for asking: 40 at once and 20 a second in place of 200 and 100.
#[tokio::test(flavor = "multi_thread")]
async fn asking_without_an_identity_costs_more() {
    let agent = tokio::task::spawn_blocking(|| Agent::limited(CALLER, "")).await.unwrap();
    let mut client = client(&agent.socket()).await;
    for method in ["FetchJWTSVID", "FetchX509SVID", "FetchX509Bundles"] {
        let began = Instant::now();
        let mut denied = 0_u32;
        loop {
            assert!(began.elapsed() < PATIENCE, "{method}: {denied} denied, none refused");
            let status = match method {
                "FetchJWTSVID" => client.fetch_jwtsvid(jwt()).await.unwrap_err(),
                "FetchX509SVID" => client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap_err(),
                _ => client.fetch_x509_bundles(request(pb::X509BundlesRequest {})).await.unwrap_err(),
            };
            if status.code() == Code::ResourceExhausted {
                break;
            }
            assert_eq!(status.code(), Code::PermissionDenied, "{method}: {status:?}");
            denied += 1;
        }
        let most = 40.0 + 20.0 * began.elapsed().as_secs_f64() + 1.0;
        assert!(denied >= 35 && f64::from(denied) <= most, "{method}: {denied} denied, at most {most}");
    }
}
