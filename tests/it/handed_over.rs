//! What callers pass in: descriptors whose close takes as long as they like. The kernel closes those that nobody takes in
//! the thread that is at the socket just then. A neighbour is served, and the agent ends when it is told to.

#![expect(clippy::disallowed_methods, reason = "its hostile clients are threads, which may sleep")]

use std::{
    io::{IoSlice, Write as _},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use durward::{
    limits::{ConnectionRefusal, attempt::Attempt},
    peer::{AcceptGate, Arrival, ConnectionBounds, ConnectionEnd, ConnectionStats, Listener, OsUid, Socket},
};
use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt},
    },
};
use tokio::sync::oneshot;

use crate::{
    frames::{Called, FETCH_JWT, PREFACE, SETTINGS, call, call_frames, frame, jwt_request},
    hostile::{Agent, PATIENCE},
    listener::Toy,
    support::{entry, write_config},
    systemd::Service,
};

/// A socket whose close takes an hour, if it is the last of it, and the other end.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while (&socket).write(&[0; 65_536]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    let linger = libc::linger { l_onoff: 1, l_linger: 3600 };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    (socket.into(), other)
}

/// Sends these bytes and passes the descriptor, which is closed here: the one on its way is the last of it.
fn pass(stream: &impl AsFd, bytes: &[u8], descriptor: OwnedFd, flags: MsgFlags) -> Result<(), Errno> {
    let fds = [descriptor.as_raw_fd()];
    let sent = sendmsg::<()>(
        stream.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::ScmRights(&fds)],
        flags,
        None,
    );
    // It lingers here if it is the last of it, for want of another or because that one is closed already.
    thread::spawn(move || drop(descriptor));
    sent.map(drop)
}

/// A caller that passes something in, and what keeps it there.
type Held = (UnixStream, Vec<TcpStream>);
/// Connects and passes. `Err`: the kernel bars it.
type Hostile = fn(&Path) -> Result<Held, Errno>;

fn hello() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

fn with_bytes(socket: &Path, bytes: &[u8], flags: MsgFlags) -> Result<Held, Errno> {
    let stream = UnixStream::connect(socket).unwrap();
    let (descriptor, other) = lingering();
    pass(&stream, bytes, descriptor, flags)?;
    Ok((stream, vec![other]))
}

const HOSTILE: [(&str, Hostile); 6] = [
    ("with the first bytes", |socket| with_bytes(socket, &hello(), MsgFlags::empty())),
    ("with what is not HTTP/2", |socket| with_bytes(socket, b"x", MsgFlags::empty())),
    ("out of band", |socket| {
        let held = with_bytes(socket, b"x", MsgFlags::MSG_OOB)?;
        // A read that comes past it throws it away.
        // It may have been ended already.
        let _sent_or_not = (&held.0).write_all(&hello());
        Ok(held)
    }),
    ("behind a call", |socket| {
        let stream = UnixStream::connect(socket).unwrap();
        let (descriptor, other) = lingering();
        (&stream).write_all(&[hello(), call_frames(1, "/a", &[])].concat()).map_err(|_ended| Errno::EPIPE)?;
        pass(&stream, &frame(SETTINGS, 0, 0, &[]), descriptor, MsgFlags::empty())?;
        Ok((stream, vec![other]))
    }),
    ("in many messages", |socket| {
        let stream = UnixStream::connect(socket).unwrap();
        let mut others = Vec::new();
        for _ in 0..10 {
            let (descriptor, other) = lingering();
            match pass(&stream, b"x", descriptor, MsgFlags::empty()) {
                // It was ended meanwhile.
                Err(Errno::EPIPE) => break,
                passed => passed?,
            }
            others.push(other);
        }
        Ok((stream, others))
    }),
    ("within a socket", |socket| {
        let stream = UnixStream::connect(socket).unwrap();
        let (inner, inner_other) = UnixStream::pair().unwrap();
        let (descriptor, other) = lingering();
        pass(&inner_other, b"x", descriptor, MsgFlags::empty())?;
        pass(&stream, &hello(), inner.into(), MsgFlags::empty())?;
        Ok((stream, vec![other]))
    }),
];

/// Refuses for this reason while it is told to.
#[derive(Debug)]
struct Refusing {
    reason: ConnectionRefusal,
    now: AtomicBool,
}

impl AcceptGate for Refusing {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival, _attempt: Attempt) -> Result<(), ConnectionRefusal> {
        if self.now.load(SeqCst) { Err(self.reason) } else { Ok(()) }
    }
}

/// A server to which descriptors can be passed, as on kernels before Linux 6.16.
struct Older {
    dir: tempfile::TempDir,
    gate: Arc<Refusing>,
    stats: Arc<ConnectionStats>,
    listener: Option<Listener<Refusing>>,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<mpsc::Receiver<()>>,
}

impl Older {
    /// Bound, and not serving yet.
    fn new(refusal: Option<ConnectionRefusal>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = Socket::bind(&dir.path().join("api.sock"), 0o777).unwrap();
        let gate = Arc::new(Refusing {
            reason: refusal.unwrap_or(ConnectionRefusal::Blocked),
            now: AtomicBool::new(refusal.is_some()),
        });
        let bounds = ConnectionBounds { linger: Duration::from_millis(20), ..ConnectionBounds::default() };
        let listener = Listener {
            socket: socket.before_linux_6_16().unwrap(),
            bounds: tokio::sync::watch::channel(bounds).1,
            gate: Arc::clone(&gate),
            keys: Arc::new(OsUid),
            stats: Arc::default(),
        };
        let stats = Arc::clone(&listener.stats);
        Self { dir, gate, stats, listener: Some(listener), stop: None, ended: None }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Serves, on threads of its own: were they held up, this test would not be.
    fn serve(&mut self) {
        let listener = self.listener.take().unwrap();
        let (stop, stopped) = oneshot::channel();
        let (tell, ended) = mpsc::channel();
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let drained = runtime
                .block_on(listener.serve(Toy::of, async move { drop::<Result<(), _>>(stopped.await) }));
            drained.unwrap();
            runtime.shutdown_background();
            tell.send(()).unwrap();
        });
        (self.stop, self.ended) = (Some(stop), Some(ended));
    }

    /// Somebody else is answered.
    fn serves(&self, case: &str) {
        self.gate.now.store(false, SeqCst);
        for _ in 0..3 {
            assert_eq!(call(&self.socket(), "/a", &[], PATIENCE), Called::Answered, "{case}: a neighbour");
        }
    }

    /// It drains in time.
    fn ends(mut self, case: &str) {
        self.stop.take().unwrap().send(()).unwrap();
        self.ended
            .take()
            .unwrap()
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("{case}: it does not end"));
    }
}

fn wait_until(case: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{case}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What is to become of the hostile connections.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Stay,
    LeaveAtOnce,
}

#[test]
fn what_is_passed_in_holds_nobody_up_on_older_kernels() {
    for (case, hostile) in HOSTILE {
        for refusal in [None, Some(ConnectionRefusal::Blocked), Some(ConnectionRefusal::Memory)] {
            for then in [Then::Stay, Then::LeaveAtOnce] {
                for queued in [false, true] {
                    let case = format!("{case}, refused: {refusal:?}, {then:?}, before accept: {queued}");
                    let mut server = Older::new(refusal);
                    if !queued {
                        server.serve();
                    }
                    let held: Vec<Held> = (0..3).filter_map(|_| hostile(&server.socket()).ok()).collect();
                    // Who is refused at once may find it closed.
                    assert!(!queued || held.len() == 3, "{case}: they were passed");
                    let (streams, others): (Vec<_>, Vec<_>) = held.into_iter().unzip();
                    let streams = if then == Then::Stay { streams } else { Vec::new() };
                    if queued {
                        server.serve();
                    }
                    if let (true, Some(refusal)) = (queued, refusal) {
                        wait_until(&case, || server.stats.refused(refusal) >= 3);
                    }
                    server.serves(&case);
                    if refusal.is_none() {
                        wait_until(&case, || server.stats.closed(ConnectionEnd::Descriptors) == 3);
                    }
                    server.ends(&case);
                    drop((streams, others));
                }
            }
        }
    }
}

/// Those that were never accepted hold nobody up either.
#[test]
fn what_waits_at_the_socket_is_left_without_waiting_for_it() {
    for (case, hostile) in HOSTILE {
        let mut server = Older::new(None);
        let held: Vec<_> = (0..20).map(|_| hostile(&server.socket()).unwrap()).collect();
        server.serve();
        server.ends(case);
        drop(held);
    }
}

/// The same against the whole agent, as this kernel can.
#[test]
fn what_is_passed_in_holds_no_agent_up() {
    for (case, blocks) in
        [("admitted", ""), ("blocked", "ratelimit { gate { override \"uid:UID\" { block = true } } }\n")]
    {
        let uid = nix::unistd::geteuid();
        let agent = Agent::start("");
        if !blocks.is_empty() {
            agent.reload(&blocks.replace("UID", &uid.to_string()));
        }
        let held: Vec<Held> = HOSTILE
            .iter()
            .flat_map(|(_, hostile)| (0..2).filter_map(|_| hostile(&agent.socket()).ok()).collect::<Vec<_>>())
            .collect();
        println!("{case}: {} were passed", held.len());
        agent.neighbour_is_served();
        agent.ends();
    }
}

/// A socket that systemd holds may have been connected to before the agent came, and descriptors passed.
#[test]
fn what_was_passed_before_the_start_holds_no_agent_up() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let path = dir.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut held = Vec::new();
    for (_, hostile) in HOSTILE {
        held.extend((0..4).map(|_| hostile(&path).unwrap()));
    }
    // Some of them are gone when they are accepted.
    for (stream, others) in held.drain(..12).collect::<Vec<_>>() {
        drop(stream);
        held.push((UnixStream::pair().unwrap().0, others));
    }
    let mut service = Service::start(dir.path(), vec![listener.into()], &[]);
    assert_eq!(call(&path, FETCH_JWT, &jwt_request("a"), PATIENCE), Called::Answered);
    service.signal(Signal::SIGTERM);
    let began = Instant::now();
    while service.0.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(20));
    }
    drop(held);
}
