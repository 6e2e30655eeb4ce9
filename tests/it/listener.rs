//! The socket side with real sockets and processes: honest clients are served, hostile ones end.

use std::{
    convert::Infallible,
    future::Future,
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
            net::{UnixDatagram, UnixListener as StdListener, UnixStream as StdStream},
        },
    },
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use durward::{
    limits::{CallerKey, ConnectionRefusal, ConnectionSettings, attempt::Attempt},
    os::headroom::Headroom,
    peer::{
        AcceptGate, Arrival, BindError, ConnectionBounds, ConnectionEnd, ConnectionService, ConnectionStats,
        Drained, Http2Error, KeyResolver, Listener, ListenerSettings, OsUid, Peer, PeerGone, RequestBody,
        Socket,
    },
};
use http_body_util::{BodyExt as _, Full};
use hyper::service::Service;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};

use crate::frames::{self, Called};

/// Answers by path: `/hang` never, `/stream` with one message and then nothing, `/big` with 64 KiB, all others with
/// the path and the caller.
#[derive(Clone)]
pub(crate) struct Toy(Arc<Peer>);

impl Toy {
    pub(crate) fn of(peer: Arc<Peer>) -> Self {
        Self(peer)
    }
}

type Answer = http::Response<tonic::body::Body>;

impl ConnectionService for Toy {
    type Body = tonic::body::Body;
}

impl Service<http::Request<RequestBody>> for Toy {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn call(&self, request: http::Request<RequestBody>) -> Self::Future {
        let peer = Arc::clone(&self.0);
        Box::pin(async move {
            assert!(Arc::ptr_eq(request.extensions().get::<Arc<Peer>>().unwrap(), &peer));
            let path = request.uri().path().to_owned();
            let authority = request.uri().authority().map(|a| a.to_string()).unwrap_or_default();
            let body = match path.as_str() {
                "/hang" => std::future::pending().await,
                "/panic" => panic!("a bug of the test's"),
                "/big" => tonic::body::Body::new(full(vec![7; 64 * 1024])),
                "/stream" => tonic::body::Body::new(Endless(Some(Bytes::from_static(b"first")))),
                "/alive" => tonic::body::Body::new(full(format!("{:?}", peer.is_alive()))),
                _ => {
                    let read = request.into_body().collect().await.map_or(0, |b| b.to_bytes().len());
                    tonic::body::Body::new(full(format!("{path} {authority} {} {read}", peer.caller())))
                }
            };
            Ok(http::Response::new(body))
        })
    }
}

fn full(text: impl Into<Bytes>) -> impl http_body::Body<Data = Bytes, Error = tonic::Status> + Send {
    Full::new(text.into()).map_err(|never| match never {})
}

/// One message, and then a stream that waits for news for ever.
struct Endless(Option<Bytes>);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, tonic::Status>>> {
        match self.0.take() {
            Some(first) => std::task::Poll::Ready(Some(Ok(http_body::Frame::data(first)))),
            None => std::task::Poll::Pending,
        }
    }
}

struct Server {
    _dir: tempfile::TempDir,
    path: PathBuf,
    stats: Arc<ConnectionStats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<Drained>>,
}

impl Server {
    fn start(bounds: ConnectionBounds) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = Listener::new(Socket::bind(&path, 0o777).unwrap(), bounds);
        let stats = Arc::clone(&listener.stats);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(listener.serve(Toy, async move { drop(stopped.await) }));
        Self { _dir: dir, path, stats, stop, task }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).await.unwrap()
    }

    async fn drain(self) -> Drained {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap()
    }
}

/// A client that was not written here, and its connection's task.
pub(crate) async fn client(
    stream: UnixStream,
) -> (h2::client::SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    (send, tokio::spawn(connection))
}

pub(crate) async fn get(send: &mut h2::client::SendRequest<Bytes>, path: &str) -> Result<String, h2::Error> {
    let request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
    let (answer, _) = send.send_request(request, true)?;
    let mut body = answer.await?.into_body();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        text.extend_from_slice(&data);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test]
async fn serves_a_request() {
    let server = Server::start(ConnectionBounds::default());
    let (mut send, connection) = client(server.connect().await).await;
    let uid = nix::unistd::geteuid();
    assert_eq!(get(&mut send, "/a").await.unwrap(), format!("/a 000000000 uid:{uid} 0"));
    assert_eq!(get(&mut send, "/big").await.unwrap().len(), 64 * 1024);
    assert_eq!(get(&mut send, "/alive").await.unwrap(), "Ok(())");
    drop(send);
    connection.await.unwrap().unwrap();
    until("the connection has ended", || server.stats.closed(ConnectionEnd::ByPeer) == 1).await;
    assert_eq!(server.drain().await, Drained { ended: 0, cut: 0 });
}

/// Looks again until it is so; a minute of real time is long enough for anything.
pub(crate) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if so() {
            return;
        }
        // A real pause, during which tokio's clock, where it is paused, does not leap.
        tokio::task::spawn_blocking(|| nix::poll::poll(&mut [], 10u16).unwrap()).await.unwrap();
    }
    panic!("not within a minute: {what}");
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// `:authority`, Huffman-coded (RFC 7541, appendix B).
const CODED_AUTHORITY: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// HEADERS of a request as gRPC C-core sends it: literals with the socket's path for an authority.
fn c_core_headers(path: &str, authority: &str) -> Vec<u8> {
    let fields: Vec<u8> = [
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    .iter()
    .flat_map(|(name, value)| literal(0x40, name, value))
    .collect();
    headers(&[&[0x83, 0x86], &fields[..]].concat())
}

/// A literal of this kind (RFC 7541, section 6.2).
fn literal(kind: u8, name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [&[kind], &text(name)[..], &text(value)].concat()
}

/// HEADERS with END_STREAM and END_HEADERS, on stream 1.
fn headers(block: &[u8]) -> Vec<u8> {
    [&[0, 0, u8::try_from(block.len()).unwrap(), 1, 0x05, 0, 0, 0, 1], block].concat()
}

/// Reads until the server closes; what it sent.
async fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Reset or end: both are the server's closing.
    drop(stream.read_to_end(&mut bytes).await);
    bytes
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn every_authority_is_served() {
    for table in [0, 4096] {
        let server =
            Server::start(ConnectionBounds { header_table_size: table, ..ConnectionBounds::default() });
        for (case, authority) in [
            ("percent-encoded path", "tmp%2Fx.sock"),
            ("bare path", "/run/durward/agent.sock"),
            ("abstract", "%00name"),
            ("a name", "localhost"),
            ("a cluster", "outbound|8080||x"),
            ("an open bracket", "[::1"),
            ("not ASCII", "b\u{fc}cher example"),
        ] {
            let seen = "0".repeat(authority.len());
            let mut stream = server.connect().await;
            let request = [PREFACE, SETTINGS, &c_core_headers("/x", authority)].concat();
            // In two parts, cut within the authority.
            let cut = request.len() - 55;
            stream.write_all(&request[..cut]).await.unwrap();
            tokio::task::yield_now().await;
            stream.write_all(&request[cut..]).await.unwrap();
            let mut got = Vec::new();
            while !contains(&got, &format!("/x {seen} uid:")) {
                assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0, "{case}: {got:?}");
            }
        }
        server.drain().await;
    }
}

/// However it is coded and wherever it stands, and in whatever pieces it comes.
#[tokio::test]
async fn an_empty_authority_is_served() {
    let server = Server::start(ConnectionBounds::default());
    let coded_name = [&[0x00, 0x88], CODED_AUTHORITY].concat();
    for (case, authority) in [
        ("the static table's", vec![0x81]),
        ("its name from there", vec![0x01, 0x00]),
        ("never indexed", vec![0x11, 0x00]),
        ("indexed", vec![0x41, 0x00]),
        ("coded", vec![0x01, 0x80]),
        ("a literal name", literal(0x00, ":authority", "")),
        ("a coded name", [&coded_name[..], &[0x00]].concat()),
        ("both coded", [&coded_name[..], &[0x80]].concat()),
    ] {
        let path = literal(0x00, ":path", "/x");
        let others =
            [literal(0x00, "te", "trailers"), literal(0x00, "content-type", "application/grpc")].concat();
        for (place, block) in [
            ("before the path", [&[0x83, 0x86], &authority[..], &path, &others].concat()),
            ("behind it", [&[0x83, 0x86], &path[..], &authority, &others].concat()),
        ] {
            let whole = headers(&block);
            // In two frames, cut behind the first byte of the authority.
            let at = block.windows(authority.len()).position(|it| it == authority).unwrap() + 1;
            let (first, second) = block.split_at(at);
            let mut two = headers(first);
            two[4] = 0x01;
            two.extend([0, 0, u8::try_from(second.len()).unwrap(), 9, 0x04, 0, 0, 0, 1]);
            two.extend_from_slice(second);
            for (frames, request) in [("one frame", whole), ("two frames", two)] {
                for piece in [request.len(), 10, 1] {
                    let case = format!("{case}, {place}, {frames}, {piece} bytes at a time");
                    let mut stream = server.connect().await;
                    stream.write_all(&[PREFACE, SETTINGS].concat()).await.unwrap();
                    for piece in request.chunks(piece) {
                        stream.write_all(piece).await.unwrap();
                        tokio::task::yield_now().await;
                    }
                    let mut got = Vec::new();
                    while !contains(&got, "/x 0 uid:") {
                        assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0, "{case}: {got:x?}");
                    }
                }
            }
        }
    }
    server.drain().await;
}

/// h2 refuses by itself, and tells nobody but the client.
#[tokio::test]
async fn what_http2_refuses_is_counted() {
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let request = |stream: u8, path: &str| {
        let mut headers = c_core_headers(path, "localhost");
        headers[8] = stream;
        headers
    };
    let twice = [&[0x83, 0x86, 0x81, 0x81], &literal(0x00, ":path", "/x")[..]].concat();
    let resets: Vec<u8> = (1..100)
        .step_by(2)
        .flat_map(|n| [request(n, "/hang"), frame(3, 0, n, &[0, 0, 0, 8])].concat())
        .collect();
    for (case, error, sent) in [
        ("a pseudo-header twice", Http2Error::Protocol, headers(&twice)),
        (
            "a request too many",
            Http2Error::Refused,
            [request(1, "/hang"), request(3, "/hang"), request(5, "/hang")].concat(),
        ),
        ("a header that stands nowhere", Http2Error::Protocol, headers(&[0xff, 0x7f])),
        ("a PING of seven bytes", Http2Error::Protocol, frame(6, 0, 0, &[0; 7])),
        ("resets", Http2Error::Calm, resets),
        (
            "DATA on a stream that has ended",
            Http2Error::Protocol,
            [request(1, "/x"), frame(0, 0, 1, b"x")].concat(),
        ),
    ] {
        let server = Server::start(ConnectionBounds {
            max_concurrent_streams: 2,
            max_pending_resets: 4,
            ..ConnectionBounds::default()
        });
        let mut stream = server.connect().await;
        stream.write_all(&[PREFACE, SETTINGS, &sent].concat()).await.unwrap();
        until(case, || server.stats.errors(error) == 1).await;
        drop(stream);
        server.drain().await;
    }
}

/// gRPC's clients open up to 100 calls before they have heard how many they may, and make those again that are refused.
#[tokio::test]
async fn a_client_that_has_not_heard_how_many_may_be_open_keeps_its_connection() {
    let few = ConnectionSettings { streams: 4, ..ConnectionSettings::default() };
    let server = Server::start(ConnectionBounds::new(&few, &ListenerSettings::default()));
    let stream = |nth: u32| 1 + 2 * nth;
    let calls = |path: &str, of: std::ops::Range<u32>| -> Vec<u8> {
        let flags = frames::END_HEADERS | frames::END_STREAM;
        of.flat_map(|nth| frames::frame(frames::HEADERS, flags, stream(nth), &frames::block(path))).collect()
    };
    let mut stream_of = StdStream::connect(&server.path).unwrap();
    stream_of.write_all(&[PREFACE, SETTINGS, &calls("/hang", 0..100)].concat()).unwrap();
    until("those above are refused", || server.stats.errors(Http2Error::Refused) == 96).await;
    let end = |nth| frames::frame(frames::RST_STREAM, 0, stream(nth), &8_u32.to_be_bytes());
    stream_of.write_all(&[end(0), calls("/x", 100..101)].concat()).unwrap();
    let answered = move || frames::answer_on(stream(100), &mut stream_of);
    assert_eq!(tokio::task::spawn_blocking(answered).await.unwrap(), Called::Answered);

    let mut hostile = StdStream::connect(&server.path).unwrap();
    let sent = hostile.write_all(&[PREFACE, SETTINGS, &calls("/hang", 0..400)].concat());
    until("who goes on is sent away", || server.stats.errors(Http2Error::Calm) == 1).await;
    drop((sent, hostile));
    server.drain().await;
}

#[tokio::test(start_paused = true)]
async fn every_silence_ends() {
    let half = PREFACE.split_at(10).0;
    let unfinished = {
        // HEADERS without END_HEADERS.
        let mut headers = c_core_headers("/x", "localhost");
        headers[4] = 0x01;
        [PREFACE, SETTINGS, &headers].concat()
    };
    for (case, sent, parked) in [
        ("nothing sent", b"".as_slice(), 1),
        ("half a preface", half, 0),
        ("preface only", PREFACE, 0),
        ("settings only", &[PREFACE, SETTINGS].concat(), 0),
        ("headers without an end", &unfinished, 0),
    ] {
        let server = Server::start(ConnectionBounds::default());
        let mut stream = server.connect().await;
        stream.write_all(sent).await.unwrap();
        until(case, || server.stats.open() == 1 && server.stats.parked() == parked).await;
        read_to_end(&mut stream).await;
        until(case, || server.stats.open() == 0).await;
        assert_eq!(server.stats.closed(ConnectionEnd::HandshakeTimeout), 1, "{case}: {:?}", server.stats);
        assert_eq!(server.stats.parked(), 0, "{case}");
        server.drain().await;
    }
}

#[tokio::test]
async fn what_is_not_http2_is_closed_at_once() {
    let server = Server::start(ConnectionBounds::default());
    for (n, garbage) in
        [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0x16, 3, 1, 0, 100], &[0; 100]].iter().enumerate()
    {
        let mut stream = server.connect().await;
        stream.write_all(garbage).await.unwrap();
        read_to_end(&mut stream).await;
        let closed = u64::try_from(n).unwrap() + 1;
        until("closed", || server.stats.closed(ConnectionEnd::Protocol) == closed).await;
    }
    server.drain().await;
}

#[tokio::test]
async fn floods_are_cut_and_a_neighbour_is_served() {
    let ping: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let window: &[u8] = &[0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let server = Server::start(ConnectionBounds::default());
    let (mut neighbour, _connection) = client(server.connect().await).await;
    let floods: [(&str, &[u8]); 4] = [
        ("PING", ping),
        ("SETTINGS", SETTINGS),
        ("WINDOW_UPDATE", window),
        ("unknown", &[0, 0, 0, 77, 0, 0, 0, 0, 0]),
    ];
    for (cut, (case, flood)) in (1..).zip(floods) {
        let (mut reader, mut writer) = server.connect().await.into_split();
        let drained = tokio::spawn(async move {
            let mut sink = Vec::new();
            drop(reader.read_to_end(&mut sink).await);
        });
        let start = [PREFACE, SETTINGS, &c_core_headers("/stream", "localhost")].concat();
        writer.write_all(&start).await.unwrap();
        // 100 times the budget: the server must be gone long before.
        let mut sent = 0;
        while sent < 3_200_000 && writer.write_all(flood).await.is_ok() {
            sent += flood.len();
        }
        assert!(sent < 3_200_000, "{case}");
        drained.await.unwrap();
        until(case, || server.stats.closed(ConnectionEnd::Flood) == cut).await;
        assert!(get(&mut neighbour, "/a").await.is_ok(), "{case}");
    }
    server.drain().await;
}

#[tokio::test(start_paused = true)]
async fn what_makes_no_progress_is_closed() {
    for (case, path, window) in [
        ("an answer that is not read", "/big", 0),
        ("a part of it read", "/big", 100),
        ("no answer", "/hang", 65_535),
    ] {
        let server = Server::start(ConnectionBounds::default());
        let (mut send, connection) = h2::client::Builder::new()
            .initial_window_size(window)
            .handshake::<_, Bytes>(server.connect().await)
            .await
            .unwrap();
        // The client goes on answering pings.
        let connection = tokio::spawn(connection);
        let request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
        let (answer, _) = send.send_request(request, true).unwrap();
        let kept = tokio::spawn(async move {
            let body = answer.await.map(http::Response::into_body);
            std::future::pending::<()>().await;
            drop(body);
        });
        drop(connection.await.unwrap());
        until(case, || server.stats.open() == 0 && server.stats.streams() == 0).await;
        assert_eq!(server.stats.closed(ConnectionEnd::Stalled), 1, "{case}: {:?}", server.stats);
        kept.abort();
        server.drain().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_waits_for_news_stays() {
    let server = Server::start(ConnectionBounds {
        idle_timeout: Some(Duration::from_secs(60)),
        ..ConnectionBounds::default()
    });
    let (mut send, connection) = client(server.connect().await).await;
    let request = http::Request::post("http://localhost/stream").body(()).unwrap();
    let (answer, _) = send.send_request(request, true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "first");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!((server.stats.open(), server.stats.streams()), (1, 1), "{:?}", server.stats);

    // And once it is gone, the connection is idle.
    drop((body, send));
    let (mut idle, idle_connection) = client(server.connect().await).await;
    get(&mut idle, "/a").await.unwrap();
    idle_connection.await.unwrap().unwrap();
    drop(connection.await.unwrap());
    until("closed", || server.stats.open() == 0).await;
    assert_eq!(server.stats.closed(ConnectionEnd::Idle), 1, "{:?}", server.stats);
    drop(idle);
    server.drain().await;
}

/// What the agent has to do is waited for as long as it may take, and a peer a second.
#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_what_is_to_be_done() {
    let bounds = ConnectionBounds::default();
    for (case, path, window, ends, waits) in [
        ("an answer that is not read", "/big", 0, true, false),
        ("a request without its end", "/a", 65_535, false, false),
        ("no answer yet", "/hang", 65_535, true, true),
    ] {
        let server = Server::start(bounds.clone());
        let (mut send, connection) = h2::client::Builder::new()
            .initial_window_size(window)
            .handshake::<_, Bytes>(server.connect().await)
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let request = http::Request::post(format!("http://localhost{path}")).body(()).unwrap();
        let call = send.send_request(request, ends).unwrap();
        until(case, || server.stats.streams() == 1).await;
        let began = tokio::time::Instant::now();
        let drained = server.drain().await;
        let (took, want) = (began.elapsed(), Drained { ended: usize::from(!waits), cut: usize::from(waits) });
        assert_eq!((drained, took >= bounds.drain_timeout), (want, waits), "{case}: {took:?}");
        drop((call, send));
        drop(connection.await.unwrap());
    }
}

/// Who has not heard of it, and goes on calling, holds up nobody: what began before is done, and nothing else.
#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_no_call_that_begins_later() {
    const GAP: Duration = Duration::from_millis(300);
    let (bounds, begins) = (ConnectionBounds::default(), frames::END_HEADERS);
    let ends = begins | frames::END_STREAM;
    for (case, before, (later, flags), waits) in [
        ("calls that are answered", "/a", ("/a", ends), false),
        ("requests without their end", "/a", ("/a", begins), false),
        ("calls that are never answered", "/a", ("/hang", ends), false),
        ("one from before is being answered", "/hang", ("/a", ends), true),
    ] {
        let server = Server::start(bounds.clone());
        let mut stream = server.connect().await;
        let head = |nth: u32, flags: u8, path: &str| {
            frames::frame(frames::HEADERS, flags, 1 + 2 * nth, &frames::block(path))
        };
        stream.write_all(&[PREFACE, SETTINGS, &head(0, ends, before)].concat()).await.unwrap();
        until(case, || server.stats.streams() == u64::from(before == "/hang")).await;
        tokio::time::sleep(GAP).await;
        let calls = tokio::spawn(async move {
            let mut calls = 0;
            loop {
                tokio::time::sleep(GAP).await;
                if stream.write_all(&head(calls + 1, flags, later)).await.is_err() {
                    return calls;
                }
                calls += 1;
            }
        });
        let began = tokio::time::Instant::now();
        let drained = server.drain().await;
        let (took, want) = (began.elapsed(), Drained { ended: usize::from(!waits), cut: usize::from(waits) });
        let in_time = if waits { took >= bounds.drain_timeout } else { took < Duration::from_millis(1_400) };
        assert_eq!((drained, in_time), (want, true), "{case}: {took:?}");
        assert!(calls.await.unwrap() >= 3, "{case}: it went on calling");
    }
}

/// Whoever does what is left of its requests one after the other has a second for all of it. Who reads meanwhile is answered.
#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_no_chain_of_steps() {
    const GAP: Duration = Duration::from_millis(300);
    const CALLS: u32 = 10;
    let server = Server::start(ConnectionBounds::default());
    let mut stream = server.connect().await;
    let no_window = frames::settings(4, 0);
    let heads = (0..CALLS).flat_map(|nth| {
        frames::frame(frames::HEADERS, frames::END_HEADERS, 1 + 2 * nth, &frames::block("/a"))
    });
    stream.write_all(&[PREFACE.to_vec(), no_window, heads.collect()].concat()).await.unwrap();
    // Another has an answer of 64 KiB to read, 16 KiB at a time.
    let (mut send, connection) = h2::client::Builder::new()
        .initial_window_size(16 * 1024)
        .handshake::<_, Bytes>(server.connect().await)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::post("http://localhost/big").body(()).unwrap();
    let (answer, _) = send.send_request(request, true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    until("all have begun", || server.stats.streams() == u64::from(CALLS)).await;

    let reads = tokio::spawn(async move {
        let mut read = 0;
        while let Some(data) = body.data().await {
            let more = data.unwrap().len();
            tokio::time::sleep(GAP / 2).await;
            body.flow_control().release_capacity(more).unwrap();
            read += more;
        }
        read
    });
    let completes = tokio::spawn(async move {
        for nth in 0..CALLS {
            tokio::time::sleep(GAP).await;
            let rest = frames::frame(frames::DATA, frames::END_STREAM, 1 + 2 * nth, b"rest");
            if stream.write_all(&rest).await.is_err() {
                return nth;
            }
        }
        CALLS
    });
    let began = tokio::time::Instant::now();
    assert_eq!(server.drain().await, Drained { ended: 2, cut: 0 });
    assert!(began.elapsed() < Duration::from_millis(1_400), "{:?}", began.elapsed());
    assert_eq!(completes.await.unwrap(), 3, "it was cut between the third and the next");
    assert_eq!(reads.await.unwrap(), 64 * 1024, "who reads is answered");
    drop(send);
    drop(connection.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends() {
    let server = Server::start(ConnectionBounds::default());
    let mut silent = server.connect().await;
    let mut preface_only = server.connect().await;
    preface_only.write_all(PREFACE).await.unwrap();
    let (mut idle, idle_connection) = client(server.connect().await).await;
    get(&mut idle, "/a").await.unwrap();
    let (mut open, open_connection) = client(server.connect().await).await;
    let request = http::Request::post("http://localhost/stream").body(()).unwrap();
    let (answer, _) = open.send_request(request, true).unwrap();
    let body = answer.await.unwrap().into_body();
    until("all are open", || server.stats.open() == 4 && server.stats.parked() == 1).await;

    let (path, stats) = (server.path.clone(), Arc::clone(&server.stats));
    let drained = server.drain().await;
    // The stream never ends by itself, and nothing is to be done for it.
    assert_eq!(drained, Drained { ended: 4, cut: 0 });
    assert_eq!(stats.open(), 0);
    assert_eq!(stats.closed(ConnectionEnd::Drained), 4);
    assert!(!path.exists());
    read_to_end(&mut silent).await;
    read_to_end(&mut preface_only).await;
    idle_connection.await.unwrap().unwrap();
    drop(open_connection.await.unwrap());
    drop((idle, open, body));
}

#[tokio::test]
async fn a_panic_ends_only_its_request() {
    let server = Server::start(ConnectionBounds::default());
    let (mut send, _connection) = client(server.connect().await).await;
    assert!(get(&mut send, "/panic").await.is_err());
    assert!(get(&mut send, "/a").await.is_ok());
    until("counted", || server.stats.request_panics() == 1).await;
    drop(send);
    server.drain().await;
}

/// Admits one connection of each caller.
#[derive(Debug, Default)]
struct One(Arc<AtomicUsize>);

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl AcceptGate for One {
    type Permit = Place;

    fn admit_connection(&self, arrival: &Arrival, _attempt: Attempt) -> Result<Place, ConnectionRefusal> {
        assert_eq!(arrival.caller(), CallerKey::Uid(nix::unistd::geteuid().as_raw()));
        if self.0.fetch_add(1, SeqCst) == 0 {
            Ok(Place(Arc::clone(&self.0)))
        } else {
            self.0.fetch_sub(1, SeqCst);
            Err(ConnectionRefusal::CallerConnections)
        }
    }
}

/// Who is refused by its own limits is kept waiting, but no more than so many, and not longer than the agent is there.
#[tokio::test]
async fn whom_its_own_limits_refuse_lingers() {
    for (case, linger, most, open_of_three) in [
        ("at once", Duration::ZERO, 2, 0),
        ("none may", Duration::from_secs(3600), 0, 0),
        ("two may", Duration::from_secs(3600), 2, 2),
        ("a moment", Duration::from_millis(20), 2, 0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let bounds = ConnectionBounds { linger, max_lingering: most, ..ConnectionBounds::default() };
        let listener = Listener {
            socket: Socket::bind(&path, 0o777).unwrap(),
            bounds: tokio::sync::watch::channel(bounds).1,
            gate: Arc::new(One::default()),
            keys: Arc::new(OsUid),
            stats: Arc::default(),
        };
        let stats = Arc::clone(&listener.stats);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(listener.serve(Toy, async {
            drop(stopped.await);
        }));
        let first = UnixStream::connect(&path).await.unwrap();
        until(case, || stats.open() == 1).await;
        let mut refused = Vec::new();
        for nth in 1..4 {
            refused.push(UnixStream::connect(&path).await.unwrap());
            until(case, || stats.refused(ConnectionRefusal::CallerConnections) == nth).await;
        }
        let open = |refused: &[UnixStream]| {
            refused.iter().filter(|stream| stream.try_read(&mut [0]).is_err()).count()
        };
        // A stream that nothing is heard of yet counts as open: wait until it is known.
        until(case, || open(&refused) == open_of_three).await;
        drop(stop);
        until(case, || open(&refused) == 0).await;
        drop(first);
        serving.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn the_gate_stands_before_http2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let gate = Arc::new(One::default());
    let listener = Listener {
        socket: Socket::bind(&path, 0o777).unwrap(),
        bounds: tokio::sync::watch::channel(ConnectionBounds::default()).1,
        gate: Arc::clone(&gate),
        keys: Arc::new(OsUid),
        stats: Arc::default(),
    };
    let stats = Arc::clone(&listener.stats);
    let task = tokio::spawn(listener.serve(Toy, std::future::pending::<()>()));
    let (mut first, connection) = client(UnixStream::connect(&path).await.unwrap()).await;
    assert!(get(&mut first, "/a").await.is_ok());
    let mut second = UnixStream::connect(&path).await.unwrap();
    assert_eq!(read_to_end(&mut second).await, b"", "closed without a byte of HTTP/2");
    assert_eq!(
        (stats.refused(ConnectionRefusal::CallerConnections), stats.accepted(), stats.open()),
        (1, 2, 1)
    );
    drop(first);
    drop(connection.await.unwrap());
    until("the place is given back", || gate.0.load(SeqCst) == 0).await;
    let (mut third, _connection) = client(UnixStream::connect(&path).await.unwrap()).await;
    assert!(get(&mut third, "/a").await.is_ok());
    task.abort();
}

/// Refuses everybody, and has what the kernel keeps of them bounded, perhaps.
#[derive(Debug)]
struct Shut(Mutex<Option<Headroom>>);

impl AcceptGate for Shut {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival, _attempt: Attempt) -> Result<(), ConnectionRefusal> {
        Err(ConnectionRefusal::Blocked)
    }

    fn headroom(&self) -> Option<Headroom> {
        self.0.lock().unwrap().take()
    }
}

/// A listener with this gate.
pub(crate) fn guarded<G: AcceptGate>(
    socket: Socket,
    gate: Arc<G>,
    bounds: ConnectionBounds,
) -> Listener<G, OsUid> {
    guarded_by_keys(socket, gate, bounds, OsUid)
}

/// The same, which charges whom these keys say.
pub(crate) fn guarded_by_keys<G: AcceptGate, K: KeyResolver>(
    socket: Socket,
    gate: Arc<G>,
    bounds: ConnectionBounds,
    keys: K,
) -> Listener<G, K> {
    let (bounds, keys) = (tokio::sync::watch::channel(bounds).1, Arc::new(keys));
    Listener { socket, bounds, gate, keys, stats: Arc::default() }
}

/// However little a cgroup has left, the door does not shut: everybody is accepted, some at a time.
#[tokio::test]
async fn without_memory_for_what_the_kernel_keeps_all_are_accepted_by_and_by() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in
        [("self", "0::/\n"), ("memory.max", "25165824"), ("memory.current", "25165824"), ("memory.stat", "")]
    {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let path = dir.path().join("api.sock");
    let gate = Shut(Mutex::new(Headroom::of(&dir.path().join("self"), dir.path())));
    let listener = guarded(Socket::bind(&path, 0o777).unwrap(), Arc::new(gate), ConnectionBounds::default());
    let stats = Arc::clone(&listener.stats);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(listener.serve(Toy, async { drop(stopped.await) }));
    for _ in 0..300 {
        drop(UnixStream::connect(&path).await.unwrap());
    }
    until("all are accepted", || stats.accepted() == 300).await;
    drop(stop);
    serving.await.unwrap().unwrap();
}

// ---- processes ----------------------------------------------------------------------------------

/// This test binary again, as another process that plays a part.
fn play(part: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "listener::part", "--nocapture", "--quiet"])
        .env("DURWARD_TEST_PART", part)
        .env("DURWARD_TEST_SOCKET", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The other side of [`play`]; nothing when the tests run.
#[test]
fn part() {
    let (Some(part), Some(path)) =
        (std::env::var_os("DURWARD_TEST_PART"), std::env::var_os("DURWARD_TEST_SOCKET"))
    else {
        return;
    };
    let path = PathBuf::from(path);
    let wait = || {
        let mut line = [0];
        std::io::stdin().read_exact(&mut line).unwrap();
    };
    match part.to_str().unwrap() {
        // Connects, leaves its socket to a child, and exits when told.
        "parent" => {
            let stream = StdStream::connect(path).unwrap();
            (&stream)
                .write_all(&[PREFACE, SETTINGS, &c_core_headers("/stream", "localhost")].concat())
                .unwrap();
            wait();
            let child =
                Command::new("cat").stdin(OwnedFd::from(stream)).stdout(Stdio::null()).spawn().unwrap();
            drop(child);
        }
        // Connects as root, becomes somebody else when told, and stays.
        "turncoat" => {
            let _stream = StdStream::connect(path).unwrap();
            wait();
            nix::unistd::setresuid(65534.into(), 65534.into(), 65534.into()).unwrap();
            println!("done");
            wait();
        }
        // Becomes somebody else before it connects, and may not be dumped from then on.
        "settled" => {
            nix::unistd::setresgid(65534.into(), 65534.into(), 65534.into()).unwrap();
            nix::unistd::setresuid(65534.into(), 65534.into(), 65534.into()).unwrap();
            let _stream = StdStream::connect(path).unwrap();
            wait();
        }
        // Refuses everybody, in a cgroup that is named beside the socket.
        "confined" => {
            let cgroup = std::fs::read_to_string(path.with_extension("cgroup")).unwrap();
            std::fs::write(Path::new(&cgroup).join("cgroup.procs"), "0").unwrap();
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.unwrap().block_on(async {
                let socket = Socket::bind(&path, 0o777).unwrap();
                let headroom = Headroom::of(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
                let gate = Shut(Mutex::new(headroom));
                let ended = tokio::task::spawn_blocking(wait);
                let serving =
                    guarded(socket, Arc::new(gate), ConnectionBounds::default()).serve(Toy, async {
                        ended.await.unwrap();
                    });
                serving.await.unwrap();
            });
        }
        "few descriptors" => {
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 40, 40).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(few_descriptors());
        }
        other => panic!("no such part: {other}"),
    }
}

type Made = fn(&StdStream) -> Peer;

/// How a peer is made, on any kernel.
const WAYS: [(&str, Made); 3] = [
    ("as this kernel can", |stream| Peer::from_stream(stream, &OsUid).unwrap()),
    ("as before Linux 6.13", |stream| Peer::from_stream_by_proc(stream, &OsUid).unwrap()),
    ("as before Linux 6.5", |stream| Peer::from_stream_by_pid(stream, &OsUid).unwrap()),
];

#[tokio::test]
async fn a_child_that_inherits_the_socket_is_not_its_parent() {
    for (case, made) in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = StdListener::bind(&path).unwrap();
        let mut parent = play("parent", &path);
        let (stream, _) = listener.accept().unwrap();
        let peer = made(&stream);
        assert_eq!(u32::try_from(peer.pid().as_raw()).unwrap(), parent.id(), "{case}");
        assert_eq!((peer.uid(), peer.gid()), (nix::unistd::geteuid(), nix::unistd::getegid()), "{case}");
        peer.is_alive().unwrap();
        parent.stdin.take().unwrap().write_all(b"x").unwrap();
        peer.exited().await;
        assert!(matches!(peer.is_alive(), Err(PeerGone::Exited)), "{case}: a zombie is not alive");
        parent.wait().unwrap();
        assert!(matches!(peer.is_alive(), Err(PeerGone::Exited)), "{case}: nor is one that was reaped");
        assert!(peer.process().has_exited(), "{case}");
        // Somebody still holds the other end: no end of file, and what the parent sent is all there is.
        stream.set_nonblocking(true).unwrap();
        let mut sent = Vec::new();
        let end = (&stream).read_to_end(&mut sent).unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock, "{case}");
    }
}

#[tokio::test]
async fn a_connection_ends_with_its_process() {
    let server = Server::start(ConnectionBounds::default());
    let mut parent = play("parent", &server.path);
    until("its stream is open", || server.stats.streams() == 1).await;
    parent.stdin.take().unwrap().write_all(b"x").unwrap();
    parent.wait().unwrap();
    until("closed", || server.stats.open() == 0 && server.stats.streams() == 0).await;
    assert_eq!(server.stats.closed(ConnectionEnd::PeerExited), 1, "{:?}", server.stats);
    server.drain().await;
}

#[test]
fn a_process_that_changes_its_user_is_not_alive() {
    if !nix::unistd::geteuid().is_root() {
        // Only root can become somebody else.
        return;
    }
    for (case, made) in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = StdListener::bind(&path).unwrap();
        let mut turncoat = play("turncoat", &path);
        let (stream, _) = listener.accept().unwrap();
        let peer = made(&stream);
        peer.is_alive().unwrap();
        let mut tell = turncoat.stdin.take().unwrap();
        tell.write_all(b"x").unwrap();
        let mut changed = false;
        while !changed {
            changed = matches!(peer.is_alive(), Err(PeerGone::CredentialsChanged { .. }));
            assert_eq!(turncoat.try_wait().unwrap(), None, "{case}");
        }
        tell.write_all(b"x").unwrap();
        turncoat.wait().unwrap();
    }
}

/// A daemon that started as root: much of what /proc has of it is root's.
#[test]
fn a_process_that_became_somebody_else_before_it_connected_is_alive() {
    if !nix::unistd::geteuid().is_root() {
        // Only root can become somebody else.
        return;
    }
    for (case, made) in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = StdListener::bind(&path).unwrap();
        for (of, mode) in [(dir.path(), 0o755), (path.as_path(), 0o777)] {
            std::fs::set_permissions(of, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut settled = play("settled", &path);
        let (stream, _) = listener.accept().unwrap();
        let peer = made(&stream);
        assert_eq!((peer.uid(), peer.gid()), (65534.into(), 65534.into()), "{case}");
        peer.is_alive().unwrap_or_else(|gone| panic!("{case}: {gone}"));
        settled.stdin.take().unwrap().write_all(b"x").unwrap();
        settled.wait().unwrap();
    }
}

#[test]
fn a_caller_of_another_pid_namespace_is_told_what_to_do() {
    let peer = Peer::out_of_namespace(1000.into(), 1000.into());
    let answer = peer.is_alive().unwrap_err().to_string();
    assert!(answer.contains("hostPID: true"), "{answer}");
    assert_eq!(peer.caller(), CallerKey::Uid(1000));
}

#[test]
fn without_descriptors_the_accept_loop_rests() {
    let dir = tempfile::tempdir().unwrap();
    let mut few = play("few descriptors", dir.path());
    assert!(few.wait().unwrap().success());
}

/// In a process of its own with 40 descriptors, on tokio's paused clock.
async fn few_descriptors() {
    let server = Server::start(ConnectionBounds {
        handshake_timeout: Duration::from_secs(3600),
        ..ConnectionBounds::default()
    });
    let mut clients = Vec::new();
    while let Ok(stream) = UnixStream::connect(&server.path).await {
        clients.push(stream);
        tokio::task::yield_now().await;
    }
    assert!(clients.len() > 5);
    let before = server.stats.accept_errors();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let errors = server.stats.accept_errors() - before;
    assert!((10..=60).contains(&errors), "{errors} attempts in a second, 50 expected");
    clients.clear();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (mut send, _connection) = client(server.connect().await).await;
    assert!(get(&mut send, "/a").await.is_ok(), "served again");
}

/// A memory cgroup, removed when dropped.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    /// `None` where none can be made: only root can.
    fn with(limit: u64) -> Option<Self> {
        let name = format!("durward-test-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            std::fs::create_dir(&at).ok()?;
            let made = Self(at);
            std::fs::write(made.0.join(file), limit.to_string()).is_ok().then_some(made)
        })
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Its process may still be on its way out.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            nix::poll::poll(&mut [], 20u16).unwrap();
        }
    }
}

/// Who connects and leaves as fast as it goes does not fill the cgroup with what the kernel keeps of that.
#[test]
fn a_storm_of_connections_does_not_have_the_process_killed() {
    /// Over what the process itself needs, there is room for what is left of some thousand connections.
    const LIMIT: u64 = 4 << 20;
    let Some(cgroup) = MemoryCgroup::with(LIMIT) else {
        println!("no memory cgroup can be made here");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    std::fs::write(path.with_extension("cgroup"), cgroup.0.to_str().unwrap()).unwrap();
    let mut confined = play("confined", &path);
    while StdStream::connect(&path).is_err() {
        assert_eq!(confined.try_wait().unwrap(), None, "it serves");
        nix::poll::poll(&mut [], 10u16).unwrap();
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..30_000).take_while(|_| StdStream::connect(&path).is_ok()).count());
        }
    });
    assert_eq!(confined.try_wait().unwrap(), None, "it lives");
    confined.stdin.take().unwrap().write_all(b"x").unwrap();
    assert!(confined.wait().unwrap().success());
}

// ---- the socket's path --------------------------------------------------------------------------

#[test]
fn what_may_stand_at_the_path() {
    type Prepare = fn(&Path) -> Option<OwnedFd>;
    let cases: [(&str, Prepare, Option<&str>); 8] = [
        ("nothing", |_| None, None),
        (
            "a dead socket",
            |path| {
                drop(StdListener::bind(path).unwrap());
                None
            },
            None,
        ),
        (
            "a living socket",
            |path| Some(StdListener::bind(path).unwrap().into()),
            Some("another agent is listening at"),
        ),
        (
            "a file",
            |path| {
                std::fs::write(path, "x").unwrap();
                None
            },
            Some("is a regular file"),
        ),
        (
            "a directory",
            |path| {
                std::fs::create_dir(path).unwrap();
                None
            },
            Some("is a directory"),
        ),
        (
            "a symbolic link",
            |path| {
                symlink("/nowhere", path).unwrap();
                None
            },
            Some("is a symbolic link"),
        ),
        (
            "a datagram socket",
            |path| Some(UnixDatagram::bind(path).unwrap().into()),
            Some("is a datagram socket"),
        ),
        (
            "a pipe",
            |path| {
                nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
                None
            },
            Some("is a named pipe"),
        ),
    ];
    for (case, prepare, expect) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let living = prepare(&path);
        let before = std::fs::symlink_metadata(&path).map(|m| m.ino()).ok();
        match (Socket::bind(&path, 0o777), expect) {
            (Ok(socket), None) => {
                let there = std::fs::symlink_metadata(&path).unwrap();
                assert!(there.file_type().is_socket(), "{case}");
                assert_eq!(there.permissions().mode() & 0o7777, 0o777, "{case}");
                drop(StdStream::connect(&path).unwrap());
                drop(socket);
            }
            (Err(err), Some(text)) => {
                assert!(err.to_string().contains(text), "{case}: {err}");
                assert_eq!(
                    std::fs::symlink_metadata(&path).map(|m| m.ino()).ok(),
                    before,
                    "{case}: left alone"
                );
                drop(living);
                std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path)).unwrap();
            }
            (got, _) => panic!("{case}: {got:?}"),
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, Vec::<std::ffi::OsString>::new(), "{case}: nothing is left");
    }
}

#[test]
fn paths_up_to_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let room = 107 - dir.path().as_os_str().len() - 1;
    for (case, name, fits) in [
        ("the longest", "s".repeat(room), true),
        ("no room for the other name", "s".repeat(room - 2), true),
        ("one too long", "s".repeat(room + 1), false),
    ] {
        let path = dir.path().join(name);
        match Socket::bind(&path, 0o700) {
            Ok(_socket) => {
                assert!(fits, "{case}");
                drop(StdStream::connect(&path).unwrap());
            }
            Err(err) => {
                assert!(!fits && matches!(err, BindError::TooLong { .. }), "{case}: {err}");
                assert!(
                    err.to_string().contains("has 108 bytes") && err.to_string().contains("107"),
                    "{err}"
                );
            }
        }
    }
    assert!(matches!(Socket::bind(Path::new("/"), 0o700), Err(BindError::NoName { .. })));
}

#[test]
fn two_agents_are_never_at_one_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/api.sock");
    let first = Socket::bind(&path, 0o777).unwrap();
    assert_eq!(first.path().as_deref(), Some(path.as_path()));
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&dir.path().join("a")), mode(&dir.path().join("a/b"))), (0o755, 0o755));
    assert!(matches!(Socket::bind(&path, 0o777), Err(BindError::AnotherAgent { .. })));

    // Even when somebody took the socket away: the lock says that it runs.
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(Socket::bind(&path, 0o777), Err(BindError::AnotherAgent { .. })));

    // What stands there now is not ours, and stays.
    let foreign = StdListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    assert!(matches!(Socket::bind(&path, 0o777), Err(BindError::AnotherAgent { .. })));
    drop(foreign);
    let second = Socket::bind(&path, 0o770).unwrap();
    assert_eq!(mode(&path), 0o770);
    drop(second);
    assert!(!path.exists());
}

#[test]
fn a_socket_that_was_handed_over_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let socket = Socket::adopt(StdListener::bind(&path).unwrap()).unwrap();
    assert_eq!(socket.path().as_deref(), Some(path.as_path()));
    drop(socket);
    assert!(path.exists());

    let (connected, _other) = StdStream::pair().unwrap();
    let not_listening = StdListener::from(OwnedFd::from(connected));
    assert!(matches!(Socket::adopt(not_listening), Err(BindError::NotListening)));
}
