//! What a connection holds and is told: a gate that keeps what each of them says it holds, and toys that answer.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use durward::{
    limits::{
        ConnectionRefusal,
        budget::{HTTP2, STREAM},
        holding::{Holding, Notice},
    },
    peer::{
        AcceptGate, Arrival, ConnectionBounds, ConnectionEnd, ConnectionStats, Drained, Listener, OsUid,
        Peer, RequestBody, Socket,
    },
};
use futures_util::{StreamExt as _, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper::service::Service;
use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    sync::{Semaphore, oneshot},
    task::JoinHandle,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps what the connections that it let in hold.
#[derive(Debug, Default)]
struct Keeper(Mutex<Vec<Arc<Holding>>>);

impl AcceptGate for Keeper {
    type Permit = Arc<Holding>;

    fn admit_connection(&self, _arrival: &Arrival) -> Result<Arc<Holding>, ConnectionRefusal> {
        let holding = Arc::<Holding>::default();
        self.0.lock().unwrap().push(Arc::clone(&holding));
        Ok(holding)
    }

    fn holding(permit: &Arc<Holding>) -> Arc<Holding> {
        Arc::clone(permit)
    }
}

/// Answers by path: `/wait` when the test lets it, `/open` with one message and trailers once its connection has to
/// end, `/never` with one message and no end, `/bytes/N` with so many bytes and trailers.
#[derive(Clone)]
struct Toy {
    peer: Arc<Peer>,
    go: Arc<Semaphore>,
}

type Answer = http::Response<tonic::body::Body>;

impl Service<http::Request<RequestBody>> for Toy {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn call(&self, request: http::Request<RequestBody>) -> Self::Future {
        let Self { peer, go } = self.clone();
        Box::pin(async move {
            let path = request.uri().path();
            let bytes = path.strip_prefix("/bytes/").map_or(5, |bytes| bytes.parse().unwrap());
            if path == "/wait" {
                go.acquire().await.unwrap().forget();
            }
            let first = stream::iter([Frame::data(Bytes::from(vec![7; bytes]))]);
            let trailers = |text: &'static str| {
                Frame::trailers(
                    [("grpc-status", text)]
                        .iter()
                        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                        .collect(),
                )
            };
            let (opens, never) = (path == "/open", path == "/never");
            let last = stream::once(async move {
                if never {
                    std::future::pending::<()>().await;
                }
                if opens {
                    poll_fn(|_| if peer.is_sent_away() { Poll::Ready(()) } else { Poll::Pending }).await;
                }
                trailers(if opens { "14" } else { "0" })
            });
            let body = StreamBody::new(first.chain(last).map(Ok::<_, Infallible>).boxed());
            Ok(http::Response::new(tonic::body::Body::new(body)))
        })
    }
}

struct Server {
    _dir: tempfile::TempDir,
    path: PathBuf,
    keeper: Arc<Keeper>,
    go: Arc<Semaphore>,
    stats: Arc<ConnectionStats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<Drained>>,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let keeper = Arc::<Keeper>::default();
        let listener = Listener {
            socket: Socket::bind(&path, 0o777).unwrap(),
            bounds: tokio::sync::watch::channel(ConnectionBounds::default()).1,
            gate: Arc::clone(&keeper),
            keys: Arc::new(OsUid),
            stats: Arc::default(),
            evicted: tokio::sync::watch::channel(None).1,
        };
        let stats = Arc::clone(&listener.stats);
        let go = Arc::new(Semaphore::new(0));
        let (stop, stopped) = oneshot::channel::<()>();
        let toys = Arc::clone(&go);
        let services = move |peer| Toy { peer, go: Arc::clone(&toys) };
        let task = tokio::spawn(listener.serve(services, async move { drop(stopped.await) }));
        Self { _dir: dir, path, keeper, go, stats, stop, task }
    }

    /// A client that was not written here, and what its connection holds.
    async fn client(&self) -> (h2::client::SendRequest<Bytes>, Arc<Holding>) {
        let stream = UnixStream::connect(&self.path).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let send = send.ready().await.unwrap();
        until("let in", || !self.keeper.0.lock().unwrap().is_empty()).await;
        (send, self.keeper.0.lock().unwrap().pop().unwrap())
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
    until("that stream alone", || holding.bytes() == HTTP2).await;
    // Never read: what is beyond its window stays here.
    let unread = Open::begin(&mut send, "/bytes/100000").await.unwrap();
    until("an unread answer", || holding.bytes() >= HTTP2 + STREAM + 100_000).await;
    drop(unread);
    until("reset", || holding.bytes() == HTTP2).await;
    drop((open, send));
    until("nothing", || holding.bytes() == 0).await;
    server.drain().await;
}

/// What is being answered is, streams are told to come back, what has no end is cut; who is silent is closed.
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

    holding.tell(Notice::ComeBack);
    assert_eq!(open.end().await.unwrap(), (0, "14".to_owned()));
    server.go.add_permits(1);
    assert_eq!(waiting.await.unwrap().unwrap(), (5, "0".to_owned()));
    let refused = poll_fn(|cx| send.poll_ready(cx)).await.err();
    assert!(refused.is_none_or(|error| error.is_go_away()), "no new call");
    assert!(never.part().await.is_err(), "cut");
    server.ended(ConnectionEnd::SentAway, 1).await;

    let mut silent = UnixStream::connect(&server.path).await.unwrap();
    until("parked", || server.stats.parked() == 1).await;
    let parked = server.keeper.0.lock().unwrap().pop().unwrap();
    parked.tell(Notice::ComeBack);
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
    holding.tell(Notice::ComeBack);
    holding.tell(Notice::Close);
    server.ended(ConnectionEnd::Evicted, 1).await;
    assert!(open.end().await.is_err());
    assert_eq!(Open::begin(&mut neighbour, "/bytes/1").await.unwrap().end().await.unwrap().0, 1);
    server.drain().await;
}
