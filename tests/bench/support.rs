//! What the benches share: the agent as a process, a floor to compare it with, and a plain HTTP/2 client.
//!
//! The floor is a bare tonic server on a Unix socket that answers with the bytes the agent answered with, under the same
//! HTTP/2 settings: the least that any server on this stack can cost. It runs as a process of its own (this program again,
//! with [`FLOOR`] set), as the agent does.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use durward::api::{
    encoded::Encoded,
    proto::{
        workload as pb,
        workload_server::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
};
use h2::client::SendRequest;
use http::Request;
use prost::Message;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

/// Set for the floor's process: the directory with its socket and its answers.
pub(crate) const FLOOR: &str = "DURWARD_BENCH_FLOOR";

pub(crate) const JWT: &str = "/SpiffeWorkloadAPI/FetchJWTSVID";
pub(crate) const X509: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// Answers with what it was given.
#[derive(Clone)]
struct Floor {
    jwt: pb::JwtsvidResponse,
    x509: Bytes,
}

type Messages = ReceiverStream<Result<Encoded, Status>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Floor {
    type FetchX509SVIDStream = Messages;
    type FetchX509BundlesStream = Messages;
    type FetchJWTBundlesStream = Messages;
    type FetchWITSVIDStream = tokio_stream::Empty<Result<pb::WitsvidResponse, Status>>;
    type FetchWITBundlesStream = tokio_stream::Empty<Result<pb::WitBundlesResponse, Status>>;

    async fn fetch_jwtsvid(
        &self,
        _: tonic::Request<pb::JwtsvidRequest>,
    ) -> Result<Response<pb::JwtsvidResponse>, Status> {
        Ok(Response::new(self.jwt.clone()))
    }

    /// One message, and then silence, as with an SVID that is not renewed.
    async fn fetch_x509svid(
        &self,
        _: tonic::Request<pb::X509svidRequest>,
    ) -> Result<Response<Messages>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        sender.try_send(Ok(Encoded::from(self.x509.clone()))).expect("there is room for one");
        tokio::spawn(async move { sender.closed().await });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch_x509_bundles(
        &self,
        _: tonic::Request<pb::X509BundlesRequest>,
    ) -> Result<Response<Messages>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: tonic::Request<pb::JwtBundlesRequest>,
    ) -> Result<Response<Messages>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn validate_jwtsvid(
        &self,
        _: tonic::Request<pb::ValidateJwtsvidRequest>,
    ) -> Result<Response<pb::ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_witsvid(
        &self,
        _: tonic::Request<pb::WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_wit_bundles(
        &self,
        _: tonic::Request<pb::WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// The floor's process ends here; any other goes on.
pub(crate) fn floor_process() {
    let Some(dir) = std::env::var_os(FLOOR).map(PathBuf::from) else { return };
    let answer = |name: &str| std::fs::read(dir.join(name)).expect("the answer of the agent");
    let floor = Floor {
        jwt: pb::JwtsvidResponse::decode(answer("jwt").as_slice()).expect("an answer"),
        x509: answer("x509").into(),
    };
    durward::agent::runtime().expect("a runtime").block_on(async {
        let listener = tokio::net::UnixListener::bind(dir.join("api.sock")).expect("a socket");
        let bounds = durward::peer::ConnectionBounds::default();
        let incoming = Box::pin(futures_util::stream::unfold(listener, |listener| async {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        }));
        tonic::transport::Server::builder()
            .max_concurrent_streams(bounds.max_concurrent_streams)
            .initial_stream_window_size(bounds.initial_stream_window)
            .initial_connection_window_size(bounds.initial_connection_window)
            .max_frame_size(bounds.max_frame_size)
            .http2_max_header_list_size(bounds.max_header_list_size)
            .http2_keepalive_interval(Some(bounds.keep_alive_interval))
            .http2_keepalive_timeout(Some(bounds.keep_alive_timeout))
            .add_service(SpiffeWorkloadApiServer::new(floor))
            .serve_with_incoming(incoming)
            .await
            .expect("a server");
    });
    std::process::exit(0);
}

/// A process of the bench's own, ended with it.
pub(crate) struct Server {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) name: &'static str,
}

/// Killed when it is dropped.
pub(crate) struct Child(pub(crate) std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Server {
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Starts the agent, with `blocks` in its configuration beside what every agent needs, and no limits on this caller.
    pub(crate) async fn agent(blocks: &str) -> Self {
        Self::agent_with(blocks, NO_LIMITS).await
    }

    /// [`Self::agent`], with these limits.
    pub(crate) async fn agent_with(blocks: &str, ratelimit: &str) -> Self {
        let binary = std::env::var_os("DURWARD_BIN")
            .map_or_else(|| env!("CARGO_BIN_EXE_durward").into(), PathBuf::from);
        Self::program(&binary, blocks, ratelimit).await
    }

    /// [`Self::agent_with`] of this program.
    pub(crate) async fn program(binary: &Path, blocks: &str, ratelimit: &str) -> Self {
        Self::start("durward", |dir| {
            write_config(dir, blocks, ratelimit);
            let mut command = Command::new(binary);
            command.args(["run", "--config"]).arg(dir.join("agent.conf"));
            command.stdin(Stdio::null()).stdout(Stdio::null());
            command
        })
        .await
    }

    /// Starts a server that will listen at `api.sock` in the directory that it is told.
    pub(crate) async fn start(name: &'static str, command: impl FnOnce(&Path) -> Command) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let child = command(dir.path()).spawn().expect("a server");
        Self { child: Child(child), dir, name }.up().await
    }

    /// Starts the floor with the answers of `agent`.
    pub(crate) async fn floor(agent: &Self) -> Self {
        let mut client = Client::connect(&agent.socket()).await;
        let mut answers = Vec::new();
        for (name, path, message) in [("jwt", JWT, jwt_request("a")), ("x509", X509, Bytes::new())] {
            answers.push((name, client.first_message(path, &message).await));
        }
        Self::start("floor", |dir| {
            for (name, answer) in answers {
                std::fs::write(dir.join(name), answer).expect("written");
            }
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            command.env(FLOOR, dir).stdin(Stdio::null()).stdout(Stdio::null());
            command
        })
        .await
    }

    async fn up(mut self) -> Self {
        let started = Instant::now();
        while UnixStream::connect(self.socket()).await.is_err() {
            let ended = self.child.0.try_wait().expect("a state");
            assert!(
                ended.is_none() && started.elapsed() < Duration::from_secs(60),
                "{} did not start: {ended:?}",
                self.name
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Resident memory, in KiB.
    pub(crate) fn resident(&self) -> u64 {
        self.memory("VmRSS")
    }

    /// A line of its status, in KiB.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("its status");
        let line = status.lines().find(|line| line.starts_with(name)).expect("the line");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }

    /// Processor time used so far, of all threads.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("its threads");
        let nanos = tasks.flatten().filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanos.sum())
    }
}

/// `ratelimit` for a bench: nobody is limited.
pub(crate) const NO_LIMITS: &str = "gate {\n    caller { unlimited = true }\n    connection { linger = \"0\" }\n  }\n  caller { unlimited = true }\n  identity { unlimited = true }\n  node { unlimited = true }";

/// Configuration for a bench: this user's entry is `/bench`.
pub(crate) fn write_config(dir: &Path, blocks: &str, ratelimit: &str) {
    let (at, uid) = (dir.display(), nix::unistd::geteuid());
    let text = format!(
        "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n}}\n\
         plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\nissuer \"embedded\" {{ }}\n\
         ratelimit {{\n  {ratelimit}\n}}\n\
         entry \"spiffe://example.org/bench\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n{blocks}\n"
    );
    std::fs::write(dir.join("agent.conf"), text).expect("written");
}

pub(crate) fn jwt_request(audience: &str) -> Bytes {
    pb::JwtsvidRequest { audience: vec![audience.to_owned()], spiffe_id: String::new() }
        .encode_to_vec()
        .into()
}

/// One HTTP/2 connection.
#[derive(Clone)]
pub(crate) struct Client(SendRequest<Bytes>);

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).await.expect("a connection");
        let (client, connection) = h2::client::Builder::new()
            .initial_connection_window_size(1 << 20)
            .initial_window_size(1 << 20)
            .handshake(stream)
            .await
            .expect("a handshake");
        tokio::spawn(async move { drop(connection.await) });
        Self(client)
    }

    /// Calls, reads the first message, and lets a stream go.
    pub(crate) async fn first_message(&mut self, path: &str, message: &[u8]) -> Vec<u8> {
        let mut body = self.open(path, message).await;
        let mut message = Vec::new();
        loop {
            let data = body.data().await.expect("a message").expect("data");
            drop(body.flow_control().release_capacity(data.len()));
            message.extend_from_slice(&data);
            if let Some((head, body)) = message.split_first_chunk::<5>() {
                let [_, a, b, c, d] = *head;
                if body.len() >= usize::try_from(u32::from_be_bytes([a, b, c, d])).expect("64 bits") {
                    return body.to_vec();
                }
            }
        }
    }

    /// Calls, and reads to the end of the answer.
    pub(crate) async fn call(&mut self, path: &str, message: &[u8]) {
        let mut body = self.open(path, message).await;
        let mut read = 0;
        while let Some(data) = body.data().await {
            let data = data.expect("data");
            read += data.len();
            drop(body.flow_control().release_capacity(data.len()));
        }
        let trailers = body.trailers().await.expect("the end").expect("trailers");
        assert_eq!(trailers.get("grpc-status").map(|status| status.as_bytes()), Some(&b"0"[..]));
        assert!(read > 100, "an answer of {read} bytes");
    }

    /// Opens a call.
    pub(crate) async fn open(&mut self, path: &str, message: &[u8]) -> h2::RecvStream {
        let request = Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("workload.spiffe.io", "true")
            .body(())
            .expect("a request");
        let mut frame = vec![0];
        frame.extend_from_slice(&u32::try_from(message.len()).expect("a short message").to_be_bytes());
        frame.extend_from_slice(message);
        let mut ready = self.0.clone().ready().await.expect("a connection");
        let (response, mut send) = ready.send_request(request, false).expect("sent");
        send.send_data(frame.into(), true).expect("sent");
        let response = response.await.expect("an answer");
        assert!(response.headers().get("grpc-status").is_none_or(|status| status == "0"), "{response:?}");
        response.into_body()
    }
}

/// The middle one.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A row of a table for people.
pub(crate) fn row(cells: &[String]) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "| {} |", cells.join(" | ")).expect("printed");
}
