//! What a connection holds and is told: a gate that keeps what each of them says it holds, and toys that answer.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use durward::{
    api::status::refused_connection,
    limits::{
        CallerKey, ConnectionPermit, ConnectionRefusal, Gate, GatePlan, LimitSettings, Limits,
        RejectionStatus,
        attempt::Attempt,
        budget::{HEAD, HTTP2, PARKED, STREAM, UNSENT, WAITING, kept, unsent},
        holding::{Holding, Notice},
    },
    os::clock::Clock,
    peer::{
        AcceptGate, Arrival, ConnectionBounds, ConnectionEnd, ConnectionService, ConnectionStats, Drained,
        Peer, RequestBody, Socket, Unheard,
    },
    telemetry::registry::{Label as _, Registry},
};
use futures_util::{StreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::service::Service;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{Semaphore, oneshot, watch},
    task::{JoinHandle, JoinSet},
};
use tonic_types::StatusExt as _;

use crate::{
    frames::{
        DATA, END_HEADERS, END_STREAM, FETCH_JWT, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, block,
        call_frames, frame, jwt_request, literal, settings,
    },
    listener::guarded,
    support::TestAgent,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// What the log says.
#[derive(Clone, Debug, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps what the connections that it let in hold, each for the caller that the test names.
#[derive(Debug)]
struct Keeper {
    gate: Gate,
    caller: AtomicU32,
    holdings: Mutex<Vec<Arc<Holding>>>,
}

impl Keeper {
    fn new(budget: u64) -> Self {
        let settings = LimitSettings::default();
        let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder));
        let gate = Gate::new(GatePlan::new(&settings, 20_000, budget).unwrap(), &limits);
        Self { gate, caller: AtomicU32::new(1), holdings: Mutex::default() }
    }

    /// What the connection that was let in last holds, beside what it takes without HTTP/2.
    async fn last(&self) -> Held {
        until("let in", || !self.holdings.lock().unwrap().is_empty()).await;
        Held { holding: self.holdings.lock().unwrap().pop().unwrap() }
    }
}

impl AcceptGate for Keeper {
    type Permit = ConnectionPermit;

    fn admit_connection(
        &self,
        _arrival: &Arrival,
        _attempt: Attempt,
    ) -> Result<ConnectionPermit, ConnectionRefusal> {
        let permit = self.gate.open(CallerKey::Uid(self.caller.load(SeqCst)))?;
        self.holdings.lock().unwrap().push(Arc::clone(permit.holding()));
        Ok(permit)
    }

    fn holding(permit: &ConnectionPermit) -> Arc<Holding> {
        Arc::clone(permit.holding())
    }

    fn refuse_begun(&self, permit: &ConnectionPermit, _peer: &Peer) -> ConnectionRefusal {
        self.gate.refuse_begun(permit)
    }

    fn answer(&self, _caller: CallerKey, why: ConnectionRefusal) -> Option<http::HeaderMap> {
        refused_connection(why, None, RejectionStatus::ResourceExhausted, "descriptors")
    }
}

struct Held {
    holding: Arc<Holding>,
}

impl Held {
    /// What it holds beside what it does without HTTP/2.
    fn bytes(&self) -> u64 {
        self.holding.bytes() - PARKED
    }
}

/// Answers by path, once it has read the request: `/wait` when the test lets it, `/open` with one message and trailers
/// once its connection has to end, `/never` with one message and no end, `/bytes/N` with so many bytes and trailers,
/// `/refused` with a status that its caller is to blame for, `/unattested` with one that says so of no code, `/news/N` with one message and then so many bytes each time there is news.
#[derive(Clone)]
struct Toy {
    peer: Arc<Peer>,
    ways: Arc<Ways>,
}

/// What a test has in its hand, and sees.
struct Ways {
    go: Semaphore,
    news: watch::Sender<u32>,
    /// Parts of answers that were made.
    made: AtomicUsize,
    refused: AtomicUsize,
}

impl Ways {
    fn part(&self, bytes: usize) -> Frame<Bytes> {
        self.made.fetch_add(1, SeqCst);
        Frame::data(Bytes::from(vec![7; bytes]))
    }
}

type Answer = http::Response<tonic::body::Body>;
type Frames = stream::BoxStream<'static, Frame<Bytes>>;

impl ConnectionService for Toy {
    type Body = tonic::body::Body;

    fn unheard(&self, _peer: &Peer, _why: Unheard) {
        self.ways.refused.fetch_add(1, SeqCst);
    }
}

impl Service<http::Request<RequestBody>> for Toy {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn call(&self, request: http::Request<RequestBody>) -> Self::Future {
        let Self { peer, ways } = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            if let Err(error) = body.collect().await {
                return Ok(tonic::Status::from(error).into_http());
            }
            let path = head.uri.path().to_owned();
            let mut parts = path.split('/').skip(1);
            let (what, bytes) = (parts.next().unwrap(), parts.next().map_or(5, |it| it.parse().unwrap()));
            if what == "wait" {
                ways.go.acquire().await.unwrap().forget();
            }
            if what == "refused" || what == "unattested" {
                ways.refused.fetch_add(1, SeqCst);
                if what == "unattested" {
                    peer.asked_in_vain();
                }
                let mut answer = http::Response::new(tonic::body::Body::empty());
                *answer.headers_mut() = code(if what == "refused" { "8" } else { "14" });
                return Ok(answer);
            }
            let first = Arc::clone(&ways);
            let first_bytes = if what == "news" { 5 } else { bytes };
            let first: Frames = stream::once(async move { first.part(first_bytes) }).boxed();
            let frames: Frames = match what {
                "never" => first.chain(stream::pending()).boxed(),
                "open" => first.chain(stream::once(sent_away(peer))).boxed(),
                "news" => {
                    let news = ways.news.subscribe();
                    let more = stream::unfold((news, ways), move |(mut news, ways)| async move {
                        news.changed().await.ok()?;
                        Some((ways.part(bytes), (news, ways)))
                    });
                    first.chain(more).boxed()
                }
                _ => first.chain(stream::once(async { status("0") })).boxed(),
            };
            let body = StreamBody::new(frames.map(Ok::<_, Infallible>));
            Ok(http::Response::new(tonic::body::Body::new(body)))
        })
    }
}

async fn sent_away(peer: Arc<Peer>) -> Frame<Bytes> {
    poll_fn(|_| if peer.is_sent_away() { Poll::Ready(()) } else { Poll::Pending }).await;
    status("14")
}

fn status(text: &'static str) -> Frame<Bytes> {
    Frame::trailers(code(text))
}

fn code(text: &'static str) -> http::HeaderMap {
    [(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static(text))]
        .into_iter()
        .collect()
}

struct Server {
    _dir: tempfile::TempDir,
    path: PathBuf,
    keeper: Arc<Keeper>,
    ways: Arc<Ways>,
    stats: Arc<ConnectionStats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<Drained>>,
}

impl Server {
    /// With room for 100 streams on each connection.
    fn start() -> Self {
        Self::within(1 << 30)
    }

    /// The same, with so much memory.
    fn within(budget: u64) -> Self {
        let bounds = ConnectionBounds { max_concurrent_streams: 100, ..ConnectionBounds::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let keeper = Arc::new(Keeper::new(budget));
        let listener = guarded(Socket::bind(&path, 0o777).unwrap(), Arc::clone(&keeper), bounds);
        let stats = Arc::clone(&listener.stats);
        let ways = Arc::new(Ways {
            go: Semaphore::new(0),
            news: watch::Sender::new(0),
            made: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let toys = Arc::clone(&ways);
        let services = move |peer| Toy { peer, ways: Arc::clone(&toys) };
        let task = tokio::spawn(listener.serve(services, async move { drop(stopped.await) }));
        Self { _dir: dir, path, keeper, ways, stats, stop, task }
    }

    /// A client that was not written here, and what its connection holds. As those of gRPC it begins no more than 100 calls
    /// before it has heard how many it may.
    async fn client(&self) -> (h2::client::SendRequest<Bytes>, Held) {
        let stream = UnixStream::connect(&self.path).await.unwrap();
        let (send, connection) =
            h2::client::Builder::new().initial_max_send_streams(100).handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let send = send.ready().await.unwrap();
        (send, self.keeper.last().await)
    }

    async fn ended(&self, why: ConnectionEnd, times: u64) {
        until(&format!("{why:?}"), || self.stats.closed(why) == times).await;
    }

    async fn drain(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An open answer.
struct Open(h2::RecvStream);

impl Open {
    async fn begin(send: &mut h2::client::SendRequest<Bytes>, path: &str) -> Result<Self, h2::Error> {
        let request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
        let (answer, _) = send.send_request(request, true)?;
        Ok(Self(answer.await?.into_body()))
    }

    /// Bytes of its next part.
    async fn part(&mut self) -> Result<usize, h2::Error> {
        let part = self.0.data().await.unwrap()?;
        self.0.flow_control().release_capacity(part.len())?;
        Ok(part.len())
    }

    /// Reads to its end: how many bytes came, and its status.
    async fn end(mut self) -> Result<(usize, String), h2::Error> {
        let mut bytes = 0;
        while let Some(part) = self.0.data().await {
            let part = part?;
            self.0.flow_control().release_capacity(part.len())?;
            bytes += part.len();
        }
        let trailers = self.0.trailers().await?.unwrap();
        Ok((bytes, trailers["grpc-status"].to_str().unwrap().to_owned()))
    }
}

#[tokio::test]
async fn what_a_connection_holds_is_told_and_given_back() {
    let server = Server::start();
    let (mut send, holding) = server.client().await;
    until("HTTP/2", || holding.bytes() == HTTP2).await;
    let mut open = Open::begin(&mut send, "/open").await.unwrap();
    assert_eq!(open.part().await.unwrap(), 5);
    until("its first stream", || holding.bytes() == HTTP2).await;
    let other = Open::begin(&mut send, "/bytes/30000").await.unwrap();
    assert_eq!(other.end().await.unwrap(), (30_000, "0".to_owned()));
    until("room for both", || holding.bytes() == HTTP2 + STREAM).await;
    // Never read: what is beyond its window stays here.
    let unread = Open::begin(&mut send, "/bytes/100000").await.unwrap();
    until("an unread answer", || holding.bytes() >= HTTP2 + STREAM + 100_000).await;
    drop(unread);
    until("reset", || holding.bytes() == HTTP2 + STREAM).await;
    drop((open, send));
    until("nothing", || holding.bytes() == 0).await;
    server.drain().await;
}

/// What is being answered is, streams are told to come back, what has no end is cut; who is silent is closed.
/// Of those who were let in and find no memory when they begin to speak the first few hear why, and the crowd is closed; all are
/// refused connections of theirs. Who finds some within a quarter of a second is served, and so is a neighbour.
#[tokio::test]
async fn who_finds_no_memory_for_its_first_byte_hears_why() {
    const CROWD: u32 = 12;
    let server = Server::within(64 << 20);
    let gate = &server.keeper.gate;
    let mut crowd = Vec::new();
    for nth in 0..CROWD {
        server.keeper.caller.store(100 + nth, SeqCst);
        crowd.push(UnixStream::connect(&server.path).await.unwrap());
        server.keeper.last().await;
    }
    server.keeper.caller.store(200, SeqCst);
    let mut late = UnixStream::connect(&server.path).await.unwrap();
    server.keeper.last().await;
    let asked =
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &call_frames(1, FETCH_JWT, &jwt_request("a"))].concat();
    let hog = gate.open(CallerKey::Uid(1)).unwrap();
    hog.holding().hold(61 << 20);
    for stream in &mut crowd {
        stream.write_all(&asked).await.unwrap();
    }
    let refused = || server.stats.refused(ConnectionRefusal::MemoryTaken);
    until("all are refused", || refused() == u64::from(CROWD)).await;
    assert_eq!(server.stats.open(), 1, "the one that is still silent");
    // A neighbour that comes now has what is set aside for it.
    server.keeper.caller.store(300, SeqCst);
    let (mut send, _held) = server.client().await;
    let answer = Open::begin(&mut send, "/bytes/9").await.unwrap();
    assert_eq!(answer.end().await.unwrap(), (9, "0".to_owned()));
    let mut told = 0;
    for stream in &mut crowd {
        let mut got = Vec::new();
        // What a closed one had sent nobody read.
        drop(tokio::time::timeout(PATIENCE, stream.read_to_end(&mut got)).await.unwrap());
        let says = |text: &[u8]| got.windows(text.len()).any(|it| it == text);
        if !got.is_empty() {
            assert!(says(b"grpc-status") && says(b"grpc-retry-pushback-ms") && says(b"memory"), "{got:?}");
            told += 1;
        }
    }
    assert_eq!(told, 2);
    let rows = gate.report(100);
    for nth in 0..CROWD {
        let caller = CallerKey::Uid(100 + nth);
        let row = rows.iter().find(|row| row.name.to_string() == caller.to_string()).unwrap();
        assert_eq!((row.used, row.refused), (0, 1), "{row:?}");
    }
    let closed = ConnectionEnd::VALUES.iter().map(|why| server.stats.closed(*why)).sum::<u64>();
    assert_eq!(closed, 0, "a refused one is no served one that ended");

    late.write_all(&asked).await.unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    hog.holding().release(61 << 20);
    let mut byte = [0];
    assert_eq!(
        tokio::time::timeout(PATIENCE, late.read(&mut byte)).await.unwrap().unwrap(),
        1,
        "it is served"
    );
    assert_eq!(refused(), u64::from(CROWD));
    drop((crowd, late, send, hog));
    server.drain().await;
}

/// Where the node has no memory a small request is served whose body comes behind its head; and where there is none for what
/// has come of one, its caller hears that, and when to come back.
#[tokio::test]
async fn a_request_for_which_there_is_no_memory_is_refused_as_that() {
    let server = Server::within(64 << 20);
    let stream = UnixStream::connect(&server.path).await.unwrap();
    let (mut http2, mut connection) = h2::client::handshake(stream).await.unwrap();
    let mut ping = connection.ping_pong().unwrap();
    let connection = tokio::spawn(connection);
    // It has begun when memory runs out.
    ping.ping(h2::Ping::opaque()).await.unwrap();
    let hog = server.keeper.gate.open(CallerKey::Uid(2)).unwrap();
    hog.holding().hold(64 << 20);
    for (case, sent, ends, code) in [
        ("its body comes late", &b"whole"[..], true, None),
        ("a part of its body comes", b"part", false, Some(tonic::Code::Unavailable)),
    ] {
        http2 = http2.ready().await.unwrap();
        let head = http::Request::post("http://localhost/bytes/5").body(()).unwrap();
        let (answer, mut body) = http2.send_request(head, false).unwrap();
        // The head was read, and its body asked for, before that is sent.
        for _ in 0..2 {
            ping.ping(h2::Ping::opaque()).await.unwrap();
        }
        body.send_data(Bytes::from_static(sent), ends).unwrap();
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        let status = tonic::Status::from_header_map(answer.headers());
        assert_eq!(status.as_ref().map(tonic::Status::code), code, "{case}: {status:?}");
        if let Some(status) = status {
            assert!(status.message().contains("memory, and has none for the rest of this"), "{status:?}");
            assert!(status.get_details_retry_info().is_some(), "{status:?}");
        }
    }
    drop((http2, hog));
    connection.abort();
    server.drain().await;
}

/// Answers every PING for so long, and reads on. How many they were.
async fn answers_pings(stream: &mut UnixStream, time: Duration) -> usize {
    const HEAD: [u8; 9] = [0, 0, 8, PING, 0, 0, 0, 0, 0];
    let (mut got, mut pings) = (Vec::new(), 0);
    let until = tokio::time::Instant::now() + time;
    while let Ok(read) = tokio::time::timeout_at(until, stream.read_buf(&mut got)).await {
        assert!(read.unwrap() > 0, "it was closed after {pings}");
        while let Some(at) = got.windows(17).position(|frame| frame.starts_with(&HEAD)) {
            let payload: Vec<u8> = got.drain(..at + 17).skip(at + 9).collect();
            stream.write_all(&frame(PING, 1, 0, &payload)).await.unwrap();
            pings += 1;
        }
    }
    pings
}

/// While there is no memory nothing further is heard of who holds its share, but that it is there: so it stays, and is heard as soon
/// as there is some. Who does not answer goes.
#[tokio::test(start_paused = true)]
async fn who_answers_pings_stays_where_nothing_further_is_read() {
    // With so many it holds more than one that begins.
    const STREAMS: usize = 12;
    let server = Server::within(64 << 20);
    let never = |count| std::iter::repeat_n("/never".to_owned(), count);
    let (mut here, _) = raw(&server, 1 << 16, never(STREAMS)).await;
    let (_silent, _) = raw(&server, 1 << 16, never(1)).await;
    let made = || server.ways.made.load(SeqCst);
    until("all are answered", || made() == STREAMS + 1).await;
    let hog = server.keeper.gate.open(CallerKey::Uid(1)).unwrap();
    hog.holding().hold(60 << 20);
    server.keeper.gate.look(None, 0);
    let pings = answers_pings(&mut here, Duration::from_secs(100)).await;
    assert!(pings >= 2, "{pings}");
    server.ended(ConnectionEnd::KeepAlive, 1).await;
    assert_eq!(server.stats.open(), 1);

    let stream = u32::try_from(1 + 2 * STREAMS).unwrap();
    let call = frame(HEADERS, END_HEADERS | END_STREAM, stream, &block("/bytes/9"));
    here.write_all(&call).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(made(), STREAMS + 1, "it waits where it is");
    hog.holding().release(60 << 20);
    until("it is answered", || made() == STREAMS + 2).await;
    drop((here, hog));
    server.drain().await;
}

/// Reads until the head of the answer of this stream has come.
async fn answer_begins(stream: &mut UnixStream, nth: u32) {
    let (mut got, id) = (Vec::new(), nth.to_be_bytes());
    let is_head = |frame: &[u8]| frame[3] == HEADERS && frame[5..] == id;
    while !got.windows(9).any(is_head) {
        assert!(stream.read_buf(&mut got).await.unwrap() > 0, "it was closed: {got:?}");
    }
}

/// Whoever holds next to nothing is heard all the same, if not at once: it asks for what is its own, or hears why it has to wait.
#[tokio::test(start_paused = true)]
async fn who_holds_next_to_nothing_is_read_without_memory() {
    let server = Server::within(64 << 20);
    let (mut one, _) = raw(&server, 1 << 16, ["/bytes/9".to_owned()]).await;
    answer_begins(&mut one, 1).await;
    let hog = server.keeper.gate.open(CallerKey::Uid(2)).unwrap();
    hog.holding().hold(64 << 20);
    server.keeper.gate.look(Some(64 << 20), 0);
    for stream in [3, 5] {
        let call = frame(HEADERS, END_HEADERS | END_STREAM, stream, &block("/bytes/9"));
        one.write_all(&call).await.unwrap();
        answer_begins(&mut one, stream).await;
    }
    drop((one, hog));
    server.drain().await;
}

#[tokio::test]
async fn who_is_told_to_come_back_may_finish() {
    let server = Server::start();
    let (mut send, holding) = server.client().await;
    let mut open = Open::begin(&mut send, "/open").await.unwrap();
    open.part().await.unwrap();
    let mut never = Open::begin(&mut send, "/never").await.unwrap();
    never.part().await.unwrap();
    let mut waits = send.clone();
    let waiting = tokio::spawn(async move { Open::begin(&mut waits, "/wait").await?.end().await });
    until("asked", || server.stats.streams() == 3).await;

    holding.holding.tell(Notice::ComeBack);
    assert_eq!(open.end().await.unwrap(), (0, "14".to_owned()));
    server.ways.go.add_permits(1);
    assert_eq!(waiting.await.unwrap().unwrap(), (5, "0".to_owned()));
    let refused = poll_fn(|cx| send.poll_ready(cx)).await.err();
    assert!(refused.is_none_or(|error| error.is_go_away()), "no new call");
    assert!(never.part().await.is_err(), "cut");
    server.ended(ConnectionEnd::SentAway, 1).await;

    let mut silent = UnixStream::connect(&server.path).await.unwrap();
    until("parked", || server.stats.parked() == 1).await;
    server.keeper.last().await.holding.tell(Notice::ComeBack);
    assert_eq!(silent.read(&mut [0; 9]).await.unwrap(), 0);
    server.ended(ConnectionEnd::SentAway, 2).await;
    server.drain().await;
}

#[tokio::test]
async fn who_is_told_so_is_closed_at_once() {
    let server = Server::start();
    let (mut send, holding) = server.client().await;
    let mut open = Open::begin(&mut send, "/open").await.unwrap();
    open.part().await.unwrap();
    let (mut neighbour, _) = server.client().await;
    holding.holding.tell(Notice::ComeBack);
    holding.holding.tell(Notice::Close);
    server.ended(ConnectionEnd::Evicted, 1).await;
    assert!(open.end().await.is_err());
    assert_eq!(Open::begin(&mut neighbour, "/bytes/1").await.unwrap().end().await.unwrap().0, 1);
    server.drain().await;
}

/// So many answers at once, over one connection with HTTP/2's own windows: each is read to its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_gets_every_answer_whatever_they_take_together() {
    let server = Server::start();
    for (case, calls, bytes, sent) in [
        ("many", 100, 20_000, 0),
        ("with requests that fill the window", 100, 2_000, 3_000),
        ("larger than all that may be unsent", 20, 150_000, 16_000),
        ("small", 1_000, 300, 10),
    ] {
        let (send, holding) = server.client().await;
        let mut all = JoinSet::new();
        for _ in 0..calls {
            let mut send = send.clone();
            all.spawn(async move {
                poll_fn(|cx| send.poll_ready(cx)).await?;
                let uri = format!("http://localhost/bytes/{bytes}");
                let (answer, mut body) =
                    send.send_request(http::Request::post(uri).body(()).unwrap(), sent == 0)?;
                if sent > 0 {
                    body.send_data(vec![1; sent].into(), true)?;
                }
                Open(answer.await?.into_body()).end().await
            });
        }
        while let Some(answered) = all.join_next().await {
            assert_eq!(answered.unwrap().unwrap(), (bytes, "0".to_owned()), "{case}");
        }
        until(case, || {
            // Those that were served at once, and those whose heads came in one read with others.
            let further = holding.bytes() - HTTP2;
            (0..=99).any(|streams: u64| {
                let heads = further.checked_sub(streams * STREAM);
                heads.is_some_and(|heads| heads.is_multiple_of(HEAD) && streams + heads / HEAD < 200)
            })
        })
        .await;
    }
    server.drain().await;
}

/// HTTP/2 by hand, on streams whose windows have so many bytes.
async fn raw(server: &Server, window: u32, paths: impl IntoIterator<Item = String>) -> (UnixStream, Held) {
    let mut stream = UnixStream::connect(&server.path).await.unwrap();
    let mut bytes = [PREFACE, &settings(4, window)].concat();
    for (nth, path) in (0..).zip(paths) {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * nth, &block(&path)));
    }
    stream.write_all(&bytes).await.unwrap();
    (stream, server.keeper.last().await)
}

/// Waits until nothing is made any more.
async fn settled(server: &Server) -> usize {
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let made = server.ways.made.load(SeqCst);
        if made == std::mem::replace(&mut before, made) {
            return made;
        }
    }
}

/// Whoever asks and never reads has a few answers made, and no more; when it reads it gets all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_pins_a_bounded_number_of_answers() {
    let server = Server::start();
    for (case, bytes, most) in [("large", 100_000, 4), ("usual", 20_000, 4), ("small", 500, 60)] {
        let before = server.ways.made.load(SeqCst);
        let paths = std::iter::repeat_n(format!("/bytes/{bytes}"), 100);
        let (mut stream, holding) = raw(&server, 0, paths).await;
        until(case, || server.stats.streams() >= 90).await;
        let made = settled(&server).await - before;
        assert!((1..=most).contains(&made), "{case}: {made} answers for who reads none");
        let held = holding.bytes();
        let each = STREAM + WAITING;
        assert!(held <= HTTP2 + 100 * each + UNSENT + 4 * unsent(bytes), "{case}: {held} bytes");

        // The windows open, of the connection and of each stream.
        let mut rest = frame(8, 0, 0, &0x3fff_0000_u32.to_be_bytes());
        rest.extend(settings(4, 1 << 20));
        stream.write_all(&rest).await.unwrap();
        let mut buffer = vec![0; 1 << 16];
        until(case, || {
            while stream.try_read(&mut buffer).is_ok_and(|read| read > 0) {}
            holding.bytes() == HTTP2 + 99 * STREAM
        })
        .await;
        assert_eq!(server.ways.made.load(SeqCst) - before, 100, "{case}");
        drop(stream);
        until(case, || server.stats.open() == 0).await;
    }
    server.drain().await;
}

/// A part of a body that waits is kept with the buffer that it came in, and whatever else was in that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_part_of_a_body_pins_is_held_while_it_waits() {
    const LONG: usize = 5_000;
    let server = Server::start();
    let (mut stream, holding) = raw(&server, 0, std::iter::repeat_n("/bytes/20000".to_owned(), 20)).await;
    settled(&server).await;
    let before = holding.bytes();
    let head = [block("/bytes/20000"), literal("long", &"x".repeat(LONG))].concat();
    for stream_id in (0..10).map(|nth| 41 + 2 * nth) {
        let part = [frame(HEADERS, END_HEADERS, stream_id, &head), frame(DATA, 0, stream_id, &[0; 257])];
        stream.write_all(&part.concat()).await.unwrap();
    }
    let each = STREAM + WAITING + u64::try_from(LONG).unwrap();
    until("they wait", || holding.bytes() >= before + 10 * each).await;
    settled(&server).await;
    let held = holding.bytes();
    // The part of the one before is in the same buffer.
    assert!(held <= before + 10 * (each + 512 + 257), "{held} bytes, {before} before");

    let ends: Vec<u8> = (0..10).flat_map(|nth| frame(DATA, END_STREAM, 41 + 2 * nth, &[])).collect();
    let window = frame(8, 0, 0, &0x3fff_0000_u32.to_be_bytes());
    stream.write_all(&[ends, window, settings(4, 1 << 20)].concat()).await.unwrap();
    let mut buffer = vec![0; 1 << 16];
    until("answered", || {
        while stream.try_read(&mut buffer).is_ok_and(|read| read > 0) {}
        holding.bytes() == HTTP2 + 29 * STREAM
    })
    .await;
    drop(stream);
    server.drain().await;
}

/// Calls with bodies of so many bytes, a few at once, until the caller has to wait for what came to nothing of them. Returns how
/// many there were, `most` at most.
async fn calls_at_length(server: &Server, uid: u32, path: &str, bytes: usize, most: u32) -> u32 {
    server.keeper.caller.store(uid, SeqCst);
    let (send, holding) = server.client().await;
    let mut calls = 0;
    while calls < most && holding.holding.waits().is_none() {
        let mut at_once = JoinSet::new();
        for _ in 0..4 {
            let mut send = send.clone();
            let request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
            at_once.spawn(async move {
                poll_fn(|cx| send.poll_ready(cx)).await.unwrap();
                let (answer, mut body) = send.send_request(request, false).unwrap();
                body.send_data(vec![0; bytes].into(), true).unwrap();
                let mut answer = answer.await.unwrap().into_body();
                while answer.data().await.is_some_and(|part| part.is_ok()) {}
            });
        }
        calls += 4;
        at_once.join_all().await;
    }
    calls
}

/// A gateway validates tokens of kilobytes, as many as it likes: what was read to its end and answered is none of what comes to
/// nothing. What was refused is, and what was reset.
#[tokio::test(start_paused = true)]
async fn long_requests_are_waste_where_they_come_to_nothing() {
    const LONG: usize = 11_000;
    let server = Server::start();
    assert_eq!(calls_at_length(&server, 1, "/bytes/1", LONG, 2_000).await, 2_000, "answered");
    let short = calls_at_length(&server, 2, "/refused", 100, 2_000).await;
    let long = calls_at_length(&server, 3, "/refused", LONG, 2_000).await;
    assert!(
        (500..2_000).contains(&short) && long < short / 4,
        "refused: {long} long ones, {short} short ones"
    );

    for (uid, bytes, most) in [(4, LONG, 200), (5, 2_000, 450)] {
        server.keeper.caller.store(uid, SeqCst);
        let (stream, holding) = raw(&server, 1 << 16, []).await;
        let (mut reader, mut writer) = stream.into_split();
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 14];
            while reader.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        });
        let mut calls = 0;
        while holding.holding.waits().is_none() {
            let number = 1 + 2 * calls;
            let reset = frame(RST_STREAM, 0, number, &8_u32.to_be_bytes());
            let head = frame(HEADERS, END_HEADERS, number, &block("/bytes/1"));
            let call = [head, frame(DATA, 0, number, &vec![0; bytes]), reset].concat();
            writer.write_all(&call).await.unwrap();
            calls += 1;
        }
        assert!(calls <= most, "{calls} that were reset, of {bytes} bytes");
        drop(writer);
        reading.await.unwrap();
    }
    server.drain().await;
}

/// Frames that ask for nothing come with every request; who sends many of them is read no more for a while, whatever it asks
/// for beside them, and has to go in the end, which the log says. Others notice nothing.
#[tokio::test(start_paused = true)]
async fn who_sends_frames_that_ask_for_nothing_has_to_go() {
    let said = Said::default();
    let lines = said.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || lines.clone()).finish();
    let _said = tracing::subscriber::set_default(subscriber);
    let server = Server::start();
    let call = |nth: u32| frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * nth, &block("/bytes/1"));
    let (stream, _) = raw(&server, 1 << 16, []).await;
    let (mut reader, mut writer) = stream.into_split();
    let reading = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 14];
        while reader.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    });
    let hostile = tokio::spawn(async move {
        let beside = frame(29, 0, 0, &[0; 7_600]).repeat(4);
        for nth in 0..1_500 {
            if writer.write_all(&[call(nth), beside.clone()].concat()).await.is_err() {
                break;
            }
        }
    });

    server.keeper.caller.store(2, SeqCst);
    let (mut neighbour, holding) = raw(&server, 1 << 16, []).await;
    let beside =
        [frame(PING, 0, 0, &[0; 8]).repeat(2), frame(8, 0, 0, &1_u32.to_be_bytes()).repeat(2)].concat();
    let mut buffer = vec![0; 1 << 14];
    for nth in 0..2_000 {
        neighbour.write_all(&[call(nth), beside.clone()].concat()).await.unwrap();
        assert!(neighbour.read(&mut buffer).await.unwrap() > 0);
        assert_eq!(holding.holding.waits(), None, "after {nth} calls");
    }
    hostile.await.unwrap();
    server.ended(ConnectionEnd::Wasteful, 1).await;
    let lines = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
    assert!(lines.matches("WARN").count() == 1 && lines.contains("caller=uid:"), "{lines}");
    assert!(lines.contains("reason=\"wasteful\""), "{lines}");
    reading.await.unwrap();
    drop(neighbour);
    server.drain().await;
}

/// Of a connection that is over, what its peer was sent and has not read stays the kernel's, and is held until it is read, or
/// can be read no more. Who reads is rid of it at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_unread_is_held_to_its_end() {
    let server = Server::start();
    for (nth, then) in (1..).zip(["read", "closed", "told"]) {
        let paths = std::iter::repeat_n("/bytes/500".to_owned(), 20);
        let (mut stream, holding) = raw(&server, 1 << 16, paths).await;
        let answered = || server.ways.made.load(SeqCst) >= 20 && server.stats.streams() == 0;
        until("answers", || answered() && holding.bytes() > HTTP2).await;
        settled(&server).await;
        // DATA of no stream: HTTP/2 ends.
        stream.write_all(&frame(0, 0, 0, b"none")).await.unwrap();
        until("over", || server.stats.closed(ConnectionEnd::Protocol) == nth).await;
        settled(&server).await;
        assert!((4 * 1024..HTTP2).contains(&holding.bytes()), "{} bytes", holding.bytes());
        assert_eq!((server.stats.open(), server.stats.closed(ConnectionEnd::Protocol)), (0, nth));
        assert!(stream.write_all(b"anything").await.is_err(), "it is closed for its peer");
        let mut all = Vec::new();
        match then {
            "read" => {
                stream.read_to_end(&mut all).await.unwrap();
                assert!(all.len() > 20 * 500, "{} bytes", all.len());
            }
            "closed" => drop(stream),
            // Memory is not short: it is its descriptor that others are in want of.
            _ => holding.holding.tell(Notice::Close),
        }
        until(then, || holding.bytes() == 0).await;
    }
    // A drain waits for nobody who does not read.
    let (mut stream, holding) = raw(&server, 1 << 16, ["/bytes/500".to_owned()]).await;
    until("its HTTP/2", || holding.bytes() == HTTP2 && server.stats.streams() == 0).await;
    settled(&server).await;
    stream.write_all(&frame(0, 0, 0, b"none")).await.unwrap();
    until("over", || holding.bytes() < HTTP2).await;
    server.drain().await;
    drop(stream);
}

/// News for streams that are not read: each peer has some of it made, and is sent all of it when it reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_its_streams_pins_a_bounded_number_of_updates() {
    let server = Server::start();
    let (mut stream, holding) = raw(&server, 100, std::iter::repeat_n("/news/20000".to_owned(), 50)).await;
    until("opened", || server.ways.made.load(SeqCst) == 50).await;
    // Beside what the kernel keeps of what is not read.
    let holds = |bytes: u64| (bytes..bytes + 24 * 1024).contains(&holding.bytes());
    until("read", || holds(HTTP2 + 49 * STREAM)).await;
    server.ways.news.send_modify(|news| *news += 1);
    let made = settled(&server).await - 50;
    assert!((1..=4).contains(&made), "{made} updates for who reads none");
    let mut rest = frame(8, 0, 0, &0x3fff_0000_u32.to_be_bytes());
    rest.extend(settings(4, 1 << 20));
    stream.write_all(&rest).await.unwrap();
    let mut buffer = vec![0; 1 << 16];
    until("all", || {
        while stream.try_read(&mut buffer).is_ok_and(|read| read > 0) {}
        server.ways.made.load(SeqCst) == 100 && holds(HTTP2 + 49 * STREAM + 50 * kept(20_000))
    })
    .await;
    drop(stream);
    server.drain().await;
}

/// Asks for nothing but refusals, as fast as it is answered and with many at once, until `over`, or until it has had more
/// than there may be by then.
async fn errs(
    send: h2::client::SendRequest<Bytes>,
    ways: Arc<Ways>,
    path: &'static str,
    over: tokio::time::Instant,
) {
    let mut all = JoinSet::new();
    for _ in 0..32 {
        let (mut send, ways) = (send.clone(), Arc::clone(&ways));
        let goes_on = move || tokio::time::Instant::now() < over && ways.refused.load(SeqCst) < 50_000;
        all.spawn(async move {
            while goes_on() && poll_fn(|cx| send.poll_ready(cx)).await.is_ok() {
                let request = http::Request::post(format!("http://localhost/{path}")).body(()).unwrap();
                let Ok((answer, _)) = send.send_request(request, true) else { break };
                if tokio::time::timeout_at(over, answer).await.is_err() {
                    break;
                }
            }
        });
    }
    while all.join_next().await.is_some() {}
}

/// However many connections it has: so many a second, and then nothing is read. The time is moved, and only when nobody
/// has anything to do.
#[tokio::test(start_paused = true)]
async fn refusals_are_no_work_to_conserve() {
    let server = Server::start();
    let start = tokio::time::Instant::now();
    let over = start + Duration::from_millis(2_500);
    let mut hostile = JoinSet::new();
    for path in ["refused", "refused", "unattested"] {
        hostile.spawn(errs(server.client().await.0, Arc::clone(&server.ways), path, over));
    }
    let (mut erring, _) = server.client().await;
    server.keeper.caller.store(2, SeqCst);
    let (mut neighbour, _) = server.client().await;
    for nth in 0..20 {
        // One of the same user that errs now and then, and one of another.
        let (send, path) =
            if nth % 2 == 0 { (&mut erring, "/refused") } else { (&mut neighbour, "/bytes/1") };
        let asked = tokio::time::Instant::now();
        Open::begin(send, path).await.unwrap();
        assert!(asked.elapsed() < Duration::from_millis(50), "{nth}: {:?}", asked.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    while hostile.join_next().await.is_some() {}
    let refused = server.ways.refused.load(SeqCst);
    assert!((5_000..=2 * 5_000 + 2_500 + 200).contains(&refused), "{refused} in two seconds and a half");
    server.stop.send(()).unwrap();
}

/// The same of request heads that HTTP/2 refuses by itself, with 431.
#[tokio::test(start_paused = true)]
async fn heads_that_are_refused_unheard_are_no_work_to_conserve() {
    // Each byte behind the block is `accept-encoding: gzip, deflate`, of 60 bytes.
    let list = [block("/x"), vec![0x90; 300]].concat();
    let server = Server::start();
    let over = tokio::time::Instant::now() + Duration::from_millis(2_500);
    let (mut read, mut write) = UnixStream::connect(&server.path).await.unwrap().into_split();
    let reads = tokio::spawn(async move {
        let mut bytes = [0; 8192];
        while read.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    });
    let writes = async {
        write.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
        for number in (1..).step_by(2) {
            let head = frame(HEADERS, END_HEADERS | END_STREAM, number, &list);
            write.write_all(&head).await.unwrap();
        }
    };
    tokio::time::timeout_at(over, writes).await.unwrap_err();
    let refused = server.ways.refused.load(SeqCst);
    assert!((5_000..=2 * 5_000 + 2_500 + 200).contains(&refused), "{refused} in two seconds and a half");
    drop(write);
    reads.await.unwrap();
    server.drain().await;
}

/// What a caller gets for each mistake is a status and nothing else, by which it is known for no work to conserve.
#[tokio::test]
async fn mistakes_are_answered_with_a_status_alone() {
    let agent = TestAgent::start(
        "ratelimit { caller { method \"FetchX509Bundles\" { rate = 1 per = \"day\" burst = 5 } } }\n",
    );
    let stream = UnixStream::connect(agent.socket()).await.unwrap();
    let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let no_header = http::HeaderMap::new();
    let header: http::HeaderMap =
        [("workload.spiffe.io".parse().unwrap(), "true".parse().unwrap())].into_iter().collect();
    let jwt = jwt_request("a");
    for (case, path, headers, body, status) in [
        ("no security header", FETCH_JWT, &no_header, &jwt[..], "3"),
        ("no such method", "/SpiffeWorkloadAPI/X", &header, &jwt, "12"),
        ("no such service", "/x/y", &header, &jwt, "12"),
        ("no message", FETCH_JWT, &header, &[0, 0, 0, 0, 1, 0xff], "13"),
        ("refused", "/SpiffeWorkloadAPI/FetchX509Bundles", &header, &[0, 0, 0, 0, 0], "8"),
    ] {
        let mut answered = None;
        // The bucket has five tokens: a call of one without an identity takes all.
        for _ in 0..3 {
            let mut request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
            *request.headers_mut() = headers.clone();
            request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            let (answer, mut sending) = send.send_request(request, false).unwrap();
            sending.send_data(Bytes::copy_from_slice(body), true).unwrap();
            answered = answer.await.unwrap().headers().get("grpc-status").cloned();
        }
        println!("{case}: {answered:?}");
        assert_eq!(answered.unwrap(), status, "{case}");
    }
}
