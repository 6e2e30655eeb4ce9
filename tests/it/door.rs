//! Who is refused at the gate: those for whom there is no room wait a moment, the first few are told why, and all are counted
//! once.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream as StdStream,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use durward::{
    api::proto::workload as pb,
    limits::{
        CallerKey, ConnectionRefusal,
        attempt::Attempt,
        room::{Room, Short},
    },
    peer::{
        AcceptGate, Arrival, ConnectionBounds, ConnectionEnd, ConnectionStats, Drained, KeyResolver, Peer,
        PlaceUnread, Socket,
        credentials::{Credentials, OsUid},
        pod::PodPlace,
    },
};
use http::HeaderMap;
use nix::sys::socket::{getsockopt, sockopt};
use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    frames::{FETCH_JWT, HEADERS, PREFACE, SETTINGS, call_frames, frame, jwt_request},
    listener::{Toy, client, get, guarded, guarded_by_keys, until},
    support::{TestAgent, entry, request},
};

const GOAWAY: u8 = 7;
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets in while there is room; without, or by a number, it refuses.
#[derive(Debug)]
struct Narrow {
    room: Arc<Room>,
    /// So many at once.
    places: usize,
    refuses: ConnectionRefusal,
    tells: bool,
    open: Arc<AtomicUsize>,
    asked: AtomicUsize,
}

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Narrow {
    fn by(refuses: ConnectionRefusal) -> Self {
        let room = Arc::new(Room::default());
        room.set(Short::Memory, true);
        let (open, asked) = (Arc::default(), AtomicUsize::new(0));
        Self { room, places: usize::MAX, refuses, tells: false, open, asked }
    }
}

impl AcceptGate for Narrow {
    type Permit = Place;

    fn admit_connection(&self, _arrival: &Arrival, _attempt: Attempt) -> Result<Place, ConnectionRefusal> {
        self.asked.fetch_add(1, SeqCst);
        if !self.room.is_there() || self.open.load(SeqCst) >= self.places {
            return Err(self.refuses);
        }
        self.open.fetch_add(1, SeqCst);
        Ok(Place(Arc::clone(&self.open)))
    }

    fn room(&self) -> Option<Arc<Room>> {
        Some(Arc::clone(&self.room))
    }

    fn answer(&self, _caller: CallerKey, _why: ConnectionRefusal) -> Option<HeaderMap> {
        let told = [("content-type", "application/grpc"), ("grpc-status", "14"), ("grpc-message", "no room")];
        let told = told.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        self.tells.then(|| told.into_iter().collect())
    }
}

struct Door {
    _dir: tempfile::TempDir,
    path: PathBuf,
    stats: Arc<ConnectionStats>,
    gate: Arc<Narrow>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<Drained>>,
}

impl Door {
    fn open(gate: Narrow, bounds: ConnectionBounds) -> Self {
        Self::with(gate, bounds, OsUid)
    }

    fn with(gate: Narrow, bounds: ConnectionBounds, keys: impl KeyResolver + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let gate = Arc::new(gate);
        let listener = guarded_by_keys(Socket::bind(&path, 0o777).unwrap(), Arc::clone(&gate), bounds, keys);
        let stats = Arc::clone(&listener.stats);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(listener.serve(Toy::of, async { drop(stopped.await) }));
        Self { _dir: dir, path, stats, gate, stop, task }
    }

    /// So many connections, all accepted. The clock, where it stands, stands still.
    async fn connect(&self, number: usize) -> Vec<StdStream> {
        let all = self.stats.accepted() + u64::try_from(number).unwrap();
        let streams = (0..number).map(|_| StdStream::connect(&self.path).unwrap()).collect();
        until("all are accepted", || self.stats.accepted() == all).await;
        streams
    }

    async fn close(self) {
        drop(self.stop);
        self.task.await.unwrap().unwrap();
    }
}

/// How many the other side has not closed.
fn open(streams: &[StdStream]) -> usize {
    let is_open = |mut stream: &StdStream| {
        stream.set_nonblocking(true).unwrap();
        stream.read(&mut [0]).is_err()
    };
    streams.iter().filter(|stream| is_open(stream)).count()
}

fn waiting(most: u32) -> ConnectionBounds {
    ConnectionBounds { max_lingering: most, ..ConnectionBounds::default() }
}

/// Those who come first are one caller, and whoever comes behind them another.
struct CrowdFirst {
    crowd: usize,
    came: AtomicUsize,
}

impl KeyResolver for CrowdFirst {
    fn key_of_user(&self, _credentials: &Credentials) -> Option<CallerKey> {
        let is_of_crowd = self.came.fetch_add(1, SeqCst) < self.crowd;
        Some(CallerKey::Uid(if is_of_crowd { 7 } else { 8 }))
    }

    fn place_of_process(&self, _credentials: &Credentials) -> Result<Option<PodPlace>, PlaceUnread> {
        Ok(None)
    }
}

/// All are in one pod, as far as their processes tell.
struct InPod;

impl KeyResolver for InPod {
    fn key_of_user(&self, _credentials: &Credentials) -> Option<CallerKey> {
        None
    }

    fn place_of_process(&self, _credentials: &Credentials) -> Result<Option<PodPlace>, PlaceUnread> {
        Ok(Some(PodPlace { pod: [7; 16], container: None }))
    }
}

/// Lets everybody in; each caller is a family.
struct Wide;

impl AcceptGate for Wide {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival, _attempt: Attempt) -> Result<(), ConnectionRefusal> {
        Ok(())
    }

    fn family(&self, arrival: &Arrival) -> u64 {
        let CallerKey::Uid(uid) = arrival.caller() else { return 0 };
        uid.into()
    }
}

/// With room everybody is served; but not everybody waits for all that came first.
#[tokio::test]
async fn who_comes_alone_does_not_stand_behind_a_whole_crowd() {
    const CROWD: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let keys = CrowdFirst { crowd: CROWD, came: AtomicUsize::new(0) };
    let socket = Socket::bind(&path, 0o777).unwrap();
    let listener = guarded_by_keys(socket, Arc::new(Wide), ConnectionBounds::default(), keys);
    let stats = Arc::clone(&listener.stats);
    let begun = Arc::<Mutex<Vec<CallerKey>>>::default();
    let (stop, stopped) = oneshot::channel::<()>();
    let began = Arc::clone(&begun);
    let services = move |peer: Arc<Peer>| {
        began.lock().unwrap().push(peer.caller());
        Toy::of(peer)
    };
    let asked = [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), call_frames(1, FETCH_JWT, &[])].concat();
    let mut streams: Vec<StdStream> = (0..=CROWD)
        .map(|_| {
            let mut stream = StdStream::connect(&path).unwrap();
            stream.write_all(&asked).unwrap();
            stream
        })
        .collect();
    let serving = tokio::spawn(listener.serve(services, async { drop(stopped.await) }));
    until("all are begun", || begun.lock().unwrap().len() > CROWD).await;
    let ahead = begun.lock().unwrap().iter().take_while(|caller| **caller == CallerKey::Uid(7)).count();
    assert!(ahead < CROWD / 3, "{ahead} went in first");
    until("all were asked", || stats.streams() == 0 && stats.parked() == 0).await;
    for stream in &mut streams {
        stream.set_nonblocking(true).unwrap();
        until("it was answered", || stream.read(&mut [0; 64]).is_ok_and(|read| read > 0)).await;
    }
    drop(streams);
    drop(stop);
    serving.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn whoever_finds_no_room_waits_for_it_and_is_served() {
    let door = Door::open(Narrow::by(ConnectionRefusal::Memory), waiting(1024));
    let streams = door.connect(300).await;
    assert_eq!((open(&streams), door.stats.open()), (300, 0), "all wait");
    door.gate.room.set(Short::Memory, false);
    until("all are let in", || door.stats.open() == 300).await;
    assert_eq!((door.stats.refused(ConnectionRefusal::Memory), door.gate.asked.load(SeqCst)), (0, 600));
    for stream in streams {
        stream.set_nonblocking(true).unwrap();
        let (mut send, _connection) = client(UnixStream::from_std(stream).unwrap()).await;
        get(&mut send, "/a").await.unwrap();
    }
    door.close().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_finds_no_room_for_a_quarter_of_a_second_is_refused_once() {
    let door = Door::open(Narrow::by(ConnectionRefusal::Memory), waiting(1024));
    let streams = door.connect(300).await;
    tokio::time::sleep(Duration::from_millis(251)).await;
    until("all are closed", || open(&streams) == 0).await;
    assert_eq!(door.stats.refused(ConnectionRefusal::Memory), 300);
    door.close().await;
}

/// Where others have all places, one is waited for as long as it is lent; who leaves it leaves it to who waits, at once.
#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_place_has_it_when_somebody_leaves() {
    let gate = Narrow { places: 2, ..Narrow::by(ConnectionRefusal::NodeConnections) };
    gate.room.set(Short::Memory, false);
    let bounds = ConnectionBounds { linger: Duration::from_secs(1), ..waiting(64) };
    let door = Door::open(gate, bounds);
    let mut streams = door.connect(4).await;
    tokio::time::sleep(Duration::from_millis(1_600)).await;
    assert_eq!((open(&streams), door.stats.open()), (4, 2), "two wait");
    drop(streams.remove(0));
    // The clock stands still: nobody is due.
    until("one of them is let in", || {
        door.stats.accepted() == 4
            && door.gate.open.load(SeqCst) == 2
            && door.stats.closed(ConnectionEnd::ByPeer) == 1
    })
    .await;
    until("it is served", || door.stats.open() == 2).await;
    assert_eq!(door.stats.refused(ConnectionRefusal::NodeConnections), 0);
    tokio::time::sleep(Duration::from_millis(401)).await;
    until("the other is refused", || door.stats.refused(ConnectionRefusal::NodeConnections) == 1).await;
    until("it is closed", || open(&streams) == 2).await;
    door.close().await;
}

/// Those who wait are decided about a moment after the agent was told to end, and the time of the drain goes on meanwhile.
#[tokio::test(start_paused = true)]
async fn the_end_is_not_put_off_by_those_who_wait() {
    let gate = Narrow { places: 1, ..Narrow::by(ConnectionRefusal::NodeConnections) };
    gate.room.set(Short::Memory, false);
    let drain_timeout = Duration::from_secs(1);
    let bounds = ConnectionBounds { linger: Duration::from_secs(1), drain_timeout, ..waiting(64) };
    let door = Door::open(gate, bounds);
    let stream = UnixStream::connect(&door.path).await.unwrap();
    let (mut send, _connection) = client(stream).await;
    let hangs = tokio::spawn(async move { get(&mut send, "/hang").await });
    until("it asks", || door.stats.streams() == 1).await;
    let streams = door.connect(30).await;
    let told = tokio::time::Instant::now();
    drop(door.stop);
    tokio::time::sleep(Duration::from_millis(251)).await;
    until("all that wait are refused", || door.stats.refused(ConnectionRefusal::NodeConnections) == 30).await;
    until("they are closed", || open(&streams) == 0).await;
    assert_eq!(door.task.await.unwrap().unwrap(), Drained { ended: 0, cut: 1 });
    assert!(told.elapsed() <= drain_timeout + Duration::from_millis(2), "{:?}", told.elapsed());
    assert!(hangs.await.unwrap().is_err());
}

/// A crowd is let in as far as it may be and not further, and no more of it is kept than may be.
#[tokio::test(start_paused = true)]
async fn a_crowd_that_waits_is_let_in_as_far_as_its_share_goes() {
    let gate = Narrow { places: 10, ..Narrow::by(ConnectionRefusal::Memory) };
    let door = Door::open(gate, waiting(64));
    let streams = door.connect(300).await;
    until("no more than may be are kept", || open(&streams) == 64).await;
    assert_eq!(door.stats.refused(ConnectionRefusal::Memory), 300 - 64, "the others are refused");
    door.gate.room.set(Short::Memory, false);
    until("its share is let in", || door.stats.open() == 10).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    until("the others are refused", || door.stats.refused(ConnectionRefusal::Memory) == 290).await;
    until("they are closed", || open(&streams) == 10).await;
    assert_eq!(door.stats.open(), 10);
    door.close().await;
}

/// Who waits in a pod takes one descriptor, as anybody else does, where the kernel says later who it was.
#[tokio::test(start_paused = true)]
async fn who_is_known_by_its_process_takes_no_more_while_it_waits() {
    let (one, _other) = StdStream::pair().unwrap();
    let says_later = getsockopt(&one, sockopt::PeerPidfd).is_ok();
    let door = Door::with(Narrow::by(ConnectionRefusal::Memory), waiting(64), InPod);
    let streams = door.connect(100).await;
    let kept = if says_later { 64 } else { 32 };
    until("no more than may be are kept", || open(&streams) == kept).await;
    door.gate.room.set(Short::Memory, false);
    until("they are let in", || door.stats.open() == u64::try_from(kept).unwrap()).await;
    for stream in streams {
        stream.set_nonblocking(true).unwrap();
        if let Ok(0) = (&stream).read(&mut [0]) {
            continue;
        }
        let (mut send, _connection) = client(UnixStream::from_std(stream).unwrap()).await;
        get(&mut send, "/a").await.unwrap();
    }
    door.close().await;
}

/// What an admin wrote binds at once, whether there is room or not.
#[tokio::test(start_paused = true)]
async fn whom_a_limit_refuses_does_not_wait_for_room() {
    let door = Door::open(Narrow::by(ConnectionRefusal::CallerConnections), waiting(1024));
    let streams = door.connect(10).await;
    assert_eq!(door.stats.refused(ConnectionRefusal::CallerConnections), 10);
    door.gate.room.set(Short::Memory, false);
    tokio::time::sleep(Duration::from_secs(1)).await;
    until("all are closed", || open(&streams) == 0).await;
    assert_eq!((door.stats.open(), door.gate.asked.load(SeqCst)), (0, 10));
    door.close().await;
}

/// Who connects and closes at once costs no task, and keeps nobody's place, whether there is room or not.
#[tokio::test(start_paused = true)]
async fn whoever_has_left_already_is_not_waited_for() {
    for there in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let gate = Arc::new(Narrow::by(ConnectionRefusal::Memory));
        gate.room.set(Short::Memory, !there);
        let listener = guarded(Socket::bind(&path, 0o777).unwrap(), Arc::clone(&gate), waiting(64));
        let stats = Arc::clone(&listener.stats);
        let (stop, stopped) = oneshot::channel::<()>();
        let served = Arc::new(AtomicUsize::new(0));
        let serve = {
            let served = Arc::clone(&served);
            move |peer| {
                served.fetch_add(1, SeqCst);
                Toy::of(peer)
            }
        };
        // They wait before anybody is accepted. Some have asked for something.
        let begun = [PREFACE.to_vec(), call_frames(1, FETCH_JWT, &jwt_request("a"))].concat();
        for nth in 0..100 {
            StdStream::connect(&path).unwrap().write_all(&begun[..begun.len() * (nth % 2)]).unwrap();
        }
        let task = tokio::spawn(listener.serve(serve, async { drop(stopped.await) }));
        until("all have ended", || stats.closed(ConnectionEnd::ByPeer) == 100).await;
        let counted = (stats.open(), stats.refused(ConnectionRefusal::Memory), gate.asked.load(SeqCst));
        assert_eq!((counted, served.load(SeqCst)), ((0, 0, 0), 0), "{there}: nothing is asked about it");
        drop(stop);
        task.await.unwrap().unwrap();
    }
}

/// The frames that come until the end: kind, stream and payload.
fn frames_of(stream: &mut StdStream) -> Vec<(u8, u32, Vec<u8>)> {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    let (mut frames, mut rest) = (Vec::new(), &got[..]);
    while let Some((head, more)) = rest.split_first_chunk::<9>() {
        let [a, b, c, kind, _flags, stream @ ..] = *head;
        let (payload, next) = more.split_at(usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap());
        frames.push((kind, u32::from_be_bytes(stream), payload.to_vec()));
        rest = next;
    }
    assert!(rest.is_empty());
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_few_are_told_and_the_crowd_is_closed() {
    let gate = Narrow { tells: true, ..Narrow::by(ConnectionRefusal::Blocked) };
    let door = Door::open(gate, waiting(64));
    let mut streams = door.connect(20).await;
    until("the others are closed", || open(&streams[2..]) == 0).await;
    let told = tokio::task::spawn_blocking(move || {
        let mut told = Vec::new();
        for (stream, number) in streams.iter_mut().take(2).zip([1, 7]) {
            // In pieces, with what a client may send before it asks.
            stream.set_nonblocking(false).unwrap();
            let begun =
                [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), frame(8, 0, 0, &[0, 1, 0, 0])].concat();
            for piece in [&begun[..10], &begun[10..], &call_frames(number, FETCH_JWT, &jwt_request("a"))] {
                stream.write_all(piece).unwrap();
            }
            // Once it is done, so that the server may be.
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            told.push((number, frames_of(stream)));
        }
        told
    });
    for (number, frames) in told.await.unwrap() {
        let kinds: Vec<(u8, u32)> = frames.iter().map(|(kind, stream, _)| (*kind, *stream)).collect();
        assert_eq!(kinds, [(SETTINGS, 0), (SETTINGS, 0), (HEADERS, number), (GOAWAY, 0)]);
        assert!(frames[2].2.windows(7).any(|text| text == b"no room"), "{:?}", frames[2]);
        assert_eq!(
            frames[3].2,
            [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            "none is to be sent again unseen, and no error"
        );
    }
    assert_eq!(door.stats.refused(ConnectionRefusal::Blocked), 20);
    door.close().await;
}

/// Who is told and does not ask, asks for what is no HTTP/2, or never leaves, is closed.
#[tokio::test(start_paused = true)]
async fn no_reply_takes_longer_than_two_seconds() {
    for (case, sent) in [
        ("silent", vec![]),
        ("no HTTP/2", b"GET / HTTP/1.1\r\n\r\n and some more".to_vec()),
        ("no request", [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[])].concat()),
        ("stays", [PREFACE.to_vec(), call_frames(1, FETCH_JWT, &jwt_request("a"))].concat()),
        ("sends on", [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[0; 60]).repeat(1000)].concat()),
    ] {
        let gate = Narrow { tells: true, ..Narrow::by(ConnectionRefusal::Blocked) };
        let door = Door::open(gate, waiting(64));
        let mut streams = door.connect(1).await;
        streams[0].set_nonblocking(true).unwrap();
        let _as_far_as_it_goes = streams[0].write(&sent);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut got = Vec::new();
        until(case, || !matches!(streams[0].read_to_end(&mut got), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock))
            .await;
        door.close().await;
    }
}

/// A client that was not written here has the reason, and when to come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_a_limit_refuses_at_the_gate_has_the_reason() {
    let limits = "ratelimit {\n  gate {\n    caller { connections = 1 }\n  }\n}\n";
    let agent = TestAgent::start(&[&entry("/web", ""), limits].concat());
    let mut first = agent.client().await;
    let jwt = || request(pb::JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() });
    first.fetch_jwtsvid(jwt()).await.unwrap();
    let mut second = agent.client().await;
    let status = second.fetch_jwtsvid(jwt()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("as many connections as ratelimit.gate allows"), "{status:?}");
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some(), "{status:?}");
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
    // And once there is a place, it is served on another connection by itself.
    drop(first);
    let began = std::time::Instant::now();
    while let Err(status) = second.fetch_jwtsvid(jwt()).await {
        assert!(began.elapsed() < PATIENCE, "{status:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.running.shutdown().await;
}
