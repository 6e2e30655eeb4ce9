//! The socket side with real sockets and processes: honest clients are served, hostile ones end.

use std::{
    convert::Infallible,
    future::Future,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use durward::peer::{
    Listener, Peer, Settings, Socket, Stats,
    listener::{Closed, Drained},
};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::Service};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};

/// Answers by path: `/hang` never, `/stream` with one message and then nothing, `/big` with 64 KiB, all others with
/// the path and the caller.
#[derive(Clone)]
struct Toy(Arc<Peer>);

type Answer = http::Response<tonic::body::Body>;

impl Service<http::Request<Incoming>> for Toy {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn call(&self, request: http::Request<Incoming>) -> Self::Future {
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
    stats: Arc<Stats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<Drained>>,
}

impl Server {
    fn start(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = Listener::new(Socket::bind(&path, 0o777).unwrap(), settings);
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
async fn client(stream: UnixStream) -> (h2::client::SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    (send, tokio::spawn(connection))
}

async fn get(send: &mut h2::client::SendRequest<Bytes>, path: &str) -> Result<String, h2::Error> {
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
    let server = Server::start(Settings::default());
    let (mut send, connection) = client(server.connect().await).await;
    let uid = nix::unistd::geteuid();
    assert_eq!(get(&mut send, "/a").await.unwrap(), format!("/a localhost uid:{uid} 0"));
    assert_eq!(get(&mut send, "/big").await.unwrap().len(), 64 * 1024);
    assert_eq!(get(&mut send, "/alive").await.unwrap(), "Ok(())");
    drop(send);
    connection.await.unwrap().unwrap();
    assert_eq!(server.drain().await.cut, 0);
}
