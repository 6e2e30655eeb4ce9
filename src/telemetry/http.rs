//! The two small HTTP/1 listeners for operators: Prometheus' endpoint and the health checks.
//!
//! Whoever can connect may read them, so they tell counts and one word, never who called. A connection is good
//! for one request. What was accepted keeps its place until it is answered or its time is over; nobody who
//! comes later takes it away. So there are places for more than one user can hold ([`MOST_PLACES`]), and each
//! is cheap: a descriptor and a small task, no byte of a head that is not complete. The time for a head is
//! short, and shorter while places are ([`HEAD_WITHIN`]). At a Unix socket, where the kernel tells who is there, one
//! user has a part of the places at most. What loops may take of the processor is bounded too (`http/pace.rs`).
//!
//! A listener that is configured and cannot be bound is an error at start: a probe that silently does not exist
//! is worse than an agent that says why it did not start. No TLS here.
//!
//! # Decisions
//! Not hyper: it holds 8 KiB for a connection from its first byte on, which is what a thousand halves of a request
//! would cost each; of HTTP/1 a probe needs one line (`http/page.rs`).

mod pace;
mod page;

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::net::UnixListener,
    },
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;
use nix::{
    errno::Errno,
    sys::socket::{Backlog, MsgFlags, listen, recv, send, setsockopt, shutdown, sockopt},
};
use tokio::{
    io::{Interest, Ready},
    net,
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use self::{
    pace::{Intake, Scraper, ScraperTurns},
    page::{AskedPage, MOST_HEAD, Page, RequestHead, TEXT},
};
use super::{health::HealthState, metrics::Metrics};

/// The most connections of a listener: twice what one local user may hold without being in anybody's way.
pub const MOST_PLACES: usize = 2048;
/// A process that may have few descriptors spends one part in so many of them on each listener.
const DESCRIPTOR_SHARE: u64 = 8;
/// And one part of its memory in so many, at so many bytes each: a task, a socket, an inode.
const MEMORY_SHARE: u64 = 8;
const PLACE: u64 = 5 * 1024;
/// But so many in any case.
const LEAST_PLACES: usize = 16;
/// At a Unix socket one user has one part in so many of the places.
const USER_SHARE: usize = 8;
/// For the head of the request, from accept on.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// The same, for who comes when half of the places are taken.
const HEAD_WITHIN_CROWDED: Duration = Duration::from_secs(1);
/// For taking the answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// For closing after the answer, while what else was sent is thrown away: closed before, the answer could be lost.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// How much is thrown away, in bytes.
const MOST_THROWN_AWAY: usize = 256 * 1024;
/// What the kernel keeps of what was sent here, in bytes (it doubles that): a head, and no more.
const RECEIVE_BUFFER: usize = 2 * MOST_HEAD;
/// And of an answer that is not read (it doubles that too).
const SEND_BUFFER: usize = 4 * 1024;
/// Connections that wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// The most addresses of a name that are listened at.
const MOST_ADDRESSES: usize = 16;
/// After a failed accept (no descriptors): long enough not to spin, short enough not to miss a scrape.
const AFTER_ACCEPT_ERROR: Duration = Duration::from_secs(1);

/// How many connections each listener may hold in a process that may have `nofile` descriptors and `memory` bytes.
pub fn places(nofile: u64, memory: u64) -> usize {
    let places = (nofile / DESCRIPTOR_SHARE).min(memory / MEMORY_SHARE / PLACE);
    usize::try_from(places).unwrap_or(MOST_PLACES).clamp(LEAST_PLACES, MOST_PLACES)
}

/// Why a listener could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for {what} on {host}:{port}")]
pub struct HttpError {
    what: &'static str,
    host: String,
    port: u16,
    source: io::Error,
}

impl HttpError {
    /// Whether somebody else listens there.
    pub fn is_taken(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }
}

/// What a listener answers.
#[derive(Clone, Debug)]
pub enum Routes {
    /// The metrics, at every path, as spire-agent's endpoint.
    Metrics(Arc<Metrics>),
    /// The health checks.
    Health {
        state: Arc<HealthState>,
        /// Path of the liveness check; spire-agent's is `/live`.
        live_path: String,
        /// Path of the readiness check; spire-agent's is `/ready`.
        ready_path: String,
    },
}

impl Routes {
    /// What is answered there.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Metrics(_) => "metrics",
            Self::Health { .. } => "health checks",
        }
    }

    fn page(&self, asked: AskedPage<'_>) -> Page {
        match self {
            Self::Metrics(metrics) => match asked.method {
                "GET" | "HEAD" => {
                    Page::new(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics.latest())
                }
                _ => Page {
                    more: "allow: GET, HEAD\r\n",
                    ..Page::new(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n")
                },
            },
            // Any method, as spire-agent: some probes send POST.
            Self::Health { state, live_path, ready_path } => {
                let good = match asked.path {
                    path if path == live_path => state.live(),
                    path if path == ready_path => state.ready(),
                    _ => return Page::new(StatusCode::NOT_FOUND, TEXT, "not found\n"),
                };
                let status = if good { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
                Page::new(status, "application/json", state.body())
            }
        }
    }

    /// RequestHead and body of the answer to what was sent so far; `None` while more is to come.
    fn answer(&self, sent: &[u8]) -> Option<(String, Bytes)> {
        let (page, bodiless) = match RequestHead::read(sent) {
            RequestHead::Begun => return None,
            RequestHead::Complete(asked) => (self.page(asked), asked.method == "HEAD"),
            RequestHead::Malformed => (Page::refusal(StatusCode::BAD_REQUEST), false),
            RequestHead::TooLarge => (Page::refusal(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE), false),
        };
        Some((page.head(), if bodiless { Bytes::new() } else { page.body }))
    }
}

/// A bound listener; nobody is answered until [`HttpListener::serve`].
#[derive(Debug)]
pub struct HttpListener {
    at: BoundAt,
    routes: Routes,
    places: usize,
    free: Arc<Semaphore>,
}

/// How many connections a listener holds.
#[derive(Clone, Debug)]
pub struct HeldPlaces {
    places: usize,
    free: Arc<Semaphore>,
}

impl HeldPlaces {
    /// What they take by now, in bytes, with the place of the one that comes next.
    pub fn bytes(&self) -> u64 {
        let held = self.places.saturating_sub(self.free.available_permits());
        u64::try_from(held).unwrap_or(u64::MAX).saturating_mul(PLACE)
    }
}

#[derive(Debug)]
enum BoundAt {
    /// At each address of its name.
    Tcp(Vec<TcpListener>),
    /// And what removes the socket when it is dropped.
    Unix(UnixListener, Box<dyn Any + Send + Sync>),
}

/// Binds every address of `host` that this machine has: whoever listens at one that is left out would answer in the agent's
/// place.
fn bind(host: &str, port: u16) -> io::Result<Vec<TcpListener>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let mut addresses = if bare.eq_ignore_ascii_case("localhost") {
        // By its addresses (RFC 6761, section 6.3): a container may have nothing that knows the name.
        let addresses = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        addresses.map(|address| SocketAddr::new(address, port)).to_vec()
    } else {
        (bare, port).to_socket_addrs()?.collect()
    };
    addresses.sort();
    addresses.dedup();
    let several = addresses.len() > 1;
    let (mut bound, mut absent) = (Vec::new(), None);
    for address in addresses.into_iter().take(MOST_ADDRESSES) {
        match TcpListener::bind(address) {
            Ok(listener) => bound.push(listener),
            Err(error) if is_absent(&error) => absent = Some(error),
            Err(error) if several => {
                return Err(io::Error::new(error.kind(), format!("{address}: {error}")));
            }
            Err(error) => return Err(error),
        }
    }
    match absent {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}

/// Whether the machine has no such address, or none of its kind.
fn is_absent(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT))
}

/// Whether this process could listen there now.
///
/// # Errors
/// As `bind(2)` says, or there is no such host.
pub fn can_bind(host: &str, port: u16) -> io::Result<()> {
    bind(host, port).map(drop)
}

impl HttpListener {
    /// Binds `host` (a name or an address, IPv6 with or without brackets) and `port`; of a name, every address
    /// that the machine has. It holds at most `places` connections.
    ///
    /// # Errors
    /// [`HttpError`], for the agent not to start with.
    pub fn bind(host: &str, port: u16, routes: Routes, places: usize) -> Result<Self, HttpError> {
        let bound = bind(host, port).and_then(|listeners| {
            for listener in &listeners {
                listener.set_nonblocking(true)?;
                // Connections inherit the buffers; the standard library's backlog is short.
                setsockopt(listener, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
                setsockopt(listener, sockopt::SndBuf, &SEND_BUFFER)?;
                listen(listener, Backlog::new(BACKLOG)?)?;
            }
            Ok(listeners)
        });
        let listeners =
            bound.map_err(|source| HttpError { what: routes.what(), host: host.to_owned(), port, source })?;
        Ok(Self::new(BoundAt::Tcp(listeners), routes, places))
    }

    /// The same at a Unix socket that listens and does not block. `place` is kept as long as the listener.
    pub fn at_socket(
        listener: UnixListener,
        place: impl Send + Sync + 'static,
        routes: Routes,
        places: usize,
    ) -> Self {
        Self::new(BoundAt::Unix(listener, Box::new(place)), routes, places)
    }

    fn new(at: BoundAt, routes: Routes, places: usize) -> Self {
        Self { at, routes, places, free: Arc::new(Semaphore::new(places)) }
    }

    /// How many connections it holds, from now on.
    pub fn held(&self) -> HeldPlaces {
        HeldPlaces { places: self.places, free: Arc::clone(&self.free) }
    }

    /// Answers for ever. Dropping the future closes the listener and every connection.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket; never later.
    pub async fn serve(self) -> io::Result<Infallible> {
        let Self { at, routes, places, free } = self;
        let (mut listener, _place) = match at {
            BoundAt::Tcp(listeners) => {
                let listeners = listeners.into_iter().map(net::TcpListener::from_std);
                (Listening::Tcp(listeners.collect::<io::Result<_>>()?), None)
            }
            BoundAt::Unix(listener, place) => {
                (Listening::Unix(net::UnixListener::from_std(listener)?), Some(place))
            }
        };
        let shares = UserPlaces { held: Arc::default(), most: (places / USER_SHARE).max(1) };
        let mut visits = JoinSet::new();
        let (mut intake, mut turns) = (Intake::new(Instant::now()), ScraperTurns::default());
        loop {
            while visits.try_join_next().is_some() {}
            // Who comes while there is no place waits in the kernel's queue. The semaphore is never closed.
            let place = Arc::clone(&free).acquire_owned().await;
            let accepted = listener.accept().await;
            // A probe is in the same queue as a loop, and waits a moment for each of its connections.
            if matches!(accepted, Ok(Visitor::Tcp(..))) {
                let wait = intake.took(Instant::now());
                if !wait.is_zero() {
                    sleep(wait).await;
                }
            }
            let (stream, share) = match accepted.map(|stream| (shares.take(&stream), stream)) {
                Ok((Ok(share), stream)) => (stream, share),
                Ok((Err(TooMany), _)) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for {}", routes.what());
                    sleep(AFTER_ACCEPT_ERROR).await;
                    continue;
                }
            };
            let crowded = free.available_permits() < places / 2;
            let within = if crowded { HEAD_WITHIN_CROWDED } else { HEAD_WITHIN };
            // Health is a few bytes, and a supervisor's question that nobody may delay.
            let turn = match (&routes, stream.scraper()) {
                (Routes::Metrics(_), Some(scraper)) => turns.take(scraper, Instant::now()),
                _ => Some(Duration::ZERO),
            };
            let Some(turn) = turn else { continue };
            let routes = routes.clone();
            visits.spawn(async move {
                let _held = (place, share);
                if !turn.is_zero() {
                    sleep(turn).await;
                }
                // A broken or slow peer is its own affair, and logging each would be its lever.
                drop(stream.visit(&routes, within).await);
            });
        }
    }
}

/// A listener that the runtime watches.
#[derive(Debug)]
enum Listening {
    Tcp(VecDeque<net::TcpListener>),
    Unix(net::UnixListener),
}

impl Listening {
    async fn accept(&mut self) -> io::Result<Visitor> {
        match self {
            Self::Tcp(listeners) => {
                // Each in its turn, or one at which many come would keep those at the others waiting.
                if let Some(first) = listeners.pop_front() {
                    listeners.push_back(first);
                }
                let accepted = poll_fn(|cx| {
                    let each = listeners.iter().map(|listener| listener.poll_accept(cx));
                    each.into_iter().find(Poll::is_ready).unwrap_or(Poll::Pending)
                });
                accepted.await.map(|(stream, from)| Visitor::Tcp(stream, from.ip()))
            }
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Visitor::Unix(stream)),
        }
    }
}

/// How many places each user holds who came to a Unix socket: never more users than there are places.
struct UserPlaces {
    held: Arc<Mutex<HashMap<u32, usize>>>,
    most: usize,
}

/// A place that is charged to a user, until this is dropped.
struct UserPlace {
    held: Arc<Mutex<HashMap<u32, usize>>>,
    uid: u32,
}

/// The user holds all that it may.
struct TooMany;

impl UserPlaces {
    /// Charges the user of `stream`; nobody where the kernel does not say who it is, which is so over TCP.
    fn take(&self, stream: &Visitor) -> Result<Option<UserPlace>, TooMany> {
        let Visitor::Unix(stream) = stream else { return Ok(None) };
        let Ok(peer) = nix::sys::socket::getsockopt(stream, sockopt::PeerCredentials) else {
            return Ok(None);
        };
        let uid = peer.uid();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let of_user = held.entry(uid).or_default();
        if *of_user >= self.most {
            return Err(TooMany);
        }
        *of_user += 1;
        Ok(Some(UserPlace { held: Arc::clone(&self.held), uid }))
    }
}

impl Drop for UserPlace {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_user) = held.get_mut(&self.uid) {
            *of_user -= 1;
            if *of_user == 0 {
                held.remove(&self.uid);
            }
        }
    }
}

/// Somebody who came to ask.
#[derive(Debug)]
enum Visitor {
    Tcp(net::TcpStream, IpAddr),
    Unix(net::UnixStream),
}

impl Visitor {
    fn scraper(&self) -> Option<Scraper> {
        match self {
            Self::Tcp(_, address) => Some(Scraper::at(*address)),
            Self::Unix(stream) => stream.peer_cred().ok().map(|peer| Scraper::User(peer.uid())),
        }
    }

    async fn visit(self, routes: &Routes, within: Duration) -> io::Result<()> {
        let (head, body) = timeout(within, self.asks(routes)).await??;
        timeout(ANSWER_WITHIN, async {
            self.send(head.as_bytes()).await?;
            self.send(&body).await
        })
        .await??;
        shutdown(self.descriptor().as_raw_fd(), nix::sys::socket::Shutdown::Write)?;
        timeout(CLOSE_WITHIN, self.throw_away()).await?
    }

    /// Waits for the head of a request, which stays where it is, and says what to answer.
    async fn asks(&self, routes: &Routes) -> io::Result<(String, Bytes)> {
        loop {
            let ready = self.ready(Interest::READABLE).await?;
            let answer = self.attempt(Interest::READABLE, || {
                let mut sent = [0; MOST_HEAD];
                let length = self.receive(&mut sent, MsgFlags::MSG_PEEK)?;
                routes
                    .answer(sent.get(..length).unwrap_or_default())
                    .ok_or_else(|| io::ErrorKind::WouldBlock.into())
            });
            match answer {
                // What is not complete by now never will be.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.ready(Interest::WRITABLE).await?;
            let sent = self.attempt(Interest::WRITABLE, || {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                Ok(send(self.descriptor().as_raw_fd(), bytes, flags)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => bytes = bytes.get(sent?..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    /// Reads until the peer closes, or has sent too much to wait for that.
    async fn throw_away(&self) -> io::Result<()> {
        let mut left = MOST_THROWN_AWAY;
        while left > 0 {
            self.ready(Interest::READABLE).await?;
            let thrown =
                self.attempt(Interest::READABLE, || self.receive(&mut [0; MOST_HEAD], MsgFlags::empty()));
            match thrown {
                Ok(0) => break,
                Ok(length) => left = left.saturating_sub(length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(&self, into: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        Ok(recv(self.descriptor().as_raw_fd(), into, flags | MsgFlags::MSG_DONTWAIT)?)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream, _) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        match self {
            Self::Tcp(stream, _) => stream.ready(interest).await,
            Self::Unix(stream) => stream.ready(interest).await,
        }
    }

    /// Does what may not be possible yet; then the runtime waits for that it is.
    fn attempt<T>(&self, interest: Interest, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self {
            Self::Tcp(stream, _) => stream.try_io(interest, act),
            Self::Unix(stream) => stream.try_io(interest, act),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
        net::{TcpStream, UnixStream},
    };

    use super::*;
    use crate::telemetry::health::Probe;

    /// A served listener, and its address. It ends with the test's runtime.
    fn served(routes: Routes, places: usize) -> SocketAddr {
        let listener = HttpListener::bind("127.0.0.1", 0, routes, places).unwrap();
        let BoundAt::Tcp(bound) = &listener.at else { panic!("{listener:?}") };
        let address = bound[0].local_addr().unwrap();
        drop(tokio::spawn(listener.serve()));
        address
    }

    fn health(state: &Arc<HealthState>) -> Routes {
        let (live_path, ready_path) = ("/live".to_owned(), "/ready".to_owned());
        Routes::Health { state: Arc::clone(state), live_path, ready_path }
    }

    async fn ask_on(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        ask_on(TcpStream::connect(address).await.unwrap(), request).await
    }

    /// Status, content type and body.
    fn parts(answer: &str) -> (&str, &str, &str) {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
        let kind = head.lines().find_map(|l| l.strip_prefix("content-type: ")).unwrap_or_default();
        (head.split(' ').nth(1).unwrap_or_default(), kind, body)
    }

    #[tokio::test]
    async fn health_answers_as_spire_agents() {
        const UP: &str = "{\"agent\":{}}\n";
        const DOWN: &str = "{\"agent\":{\"make_new_x509_err\":\"workload api is unavailable\"}}\n";
        let state = Arc::new(HealthState::default());
        let address = served(health(&state), 16);
        for (case, probe, live, ready, body) in [
            ("starting", Probe::Starting, "200", "500", "{\"agent\":null}\n"),
            ("healthy", Probe::Healthy, "200", "200", UP),
            ("unavailable", Probe::Unavailable, "500", "500", DOWN),
            ("expired", Probe::Expired, "200", "500", DOWN),
            ("draining", Probe::Draining, "200", "500", DOWN),
        ] {
            state.set(probe);
            let answer = ask(address, "GET /live HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert_eq!(parts(&answer), (live, "application/json", body), "{case}, live");
            // Its body is of no interest, and must not take the answer away.
            let post = format!(
                "POST /ready?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n{}",
                "x".repeat(9000)
            );
            let answer = ask(address, &post).await;
            assert_eq!(parts(&answer), (ready, "application/json", body), "{case}, ready");
        }
        let answer = ask(address, "GET /other HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(parts(&answer).0, "404");
    }

    #[tokio::test]
    async fn metrics_at_every_path_for_readers_only() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())), 16);
        for path in ["/", "/metrics", "/any/thing?at=all"] {
            let answer = ask(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
            let (status, kind, body) = parts(&answer);
            assert_eq!((status, kind), ("200", "text/plain; version=0.0.4; charset=utf-8"), "{path}");
            assert!(body.contains("\nprocess_start_time_seconds "), "{path}: {body}");
            assert!(answer.contains(&format!("content-length: {}\r\n", body.len())), "{answer}");
            assert!(answer.contains(" GMT\r\n"), "{answer}");
        }
        let answer = ask(address, "HEAD /metrics HTTP/1.0\r\n\r\n").await;
        assert_eq!((parts(&answer).0, parts(&answer).2), ("200", ""));
        let answer = ask(address, "DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(parts(&answer).0, "405");
        assert!(answer.contains("allow: GET, HEAD"), "{answer}");
    }

    #[tokio::test]
    async fn hostile_peers_get_little() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())), 16);
        for (case, request, status) in [
            ("no HTTP", "\x16\x03\x01\x02\x00\r\n\r\n".to_owned(), "400"),
            ("a huge head", format!("GET / HTTP/1.1\r\nHost: {}\r\n", "a".repeat(9000)), "431"),
            ("many headers", format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40)), "431"),
            (
                "a second request",
                "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
                "200",
            ),
        ] {
            let answer = ask(address, &request).await;
            assert_eq!(parts(&answer).0, status, "{case}: {answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{case}");
        }
    }

    /// Whoever asks again and again takes no more of the processor than that; whoever asks now and then does not wait.
    #[tokio::test(start_paused = true)]
    async fn who_loops_is_given_the_metrics_at_a_pace() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())), 16);
        let began = Instant::now();
        for n in 0..220 {
            let answer = ask(address, "GET /metrics HTTP/1.1\r\n\r\n").await;
            assert_eq!(parts(&answer).0, "200", "{n}");
        }
        assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_loops_is_taken_in_at_a_pace() {
        let address = served(health(&Arc::default()), 16);
        let began = Instant::now();
        for n in 0..700 {
            let answer = ask(address, "GET /live HTTP/1.1\r\n\r\n").await;
            assert_eq!(parts(&answer).0, "200", "{n}");
        }
        assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
    }

    /// A head that comes byte by byte, and one whose sender says no more but keeps the connection half open.
    #[tokio::test]
    async fn a_head_may_come_in_pieces() {
        let address = served(health(&Arc::default()), 16);
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.set_nodelay(true).unwrap();
        let (last, rest) = b"GET /live HTTP/1.1\r\n\r\n".split_last().unwrap();
        for byte in rest {
            slow.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        slow.write_all(&[*last]).await.unwrap();
        slow.shutdown().await.unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await.unwrap();
        assert_eq!(parts(&answer).0, "200");

        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET /live HTTP/1.1\r\n").await.unwrap();
        half.shutdown().await.unwrap();
        let closed = half.read(&mut [0]).await;
        assert!(matches!(closed, Ok(0) | Err(_)), "it is not waited for: {closed:?}");
    }

    /// Memory is reckoned with the connections that are held.
    #[tokio::test(start_paused = true)]
    async fn what_connections_take_is_told() {
        let listener = HttpListener::bind("127.0.0.1", 0, health(&Arc::default()), 16).unwrap();
        let held = listener.held();
        let BoundAt::Tcp(bound) = &listener.at else { panic!("{listener:?}") };
        let address = bound[0].local_addr().unwrap();
        assert_eq!(held.bytes(), 0);
        drop(tokio::spawn(listener.serve()));
        // Without an await, at which time would pass.
        let mut silent: Vec<_> = (0..3).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        for (bytes, keep) in [(4 * PLACE, 1), (2 * PLACE, 0)] {
            while held.bytes() != bytes {
                tokio::task::yield_now().await;
            }
            silent.truncate(keep);
        }
    }

    /// Nobody's place is taken away: who comes when there is none waits for one, the others are served.
    #[tokio::test(start_paused = true)]
    async fn a_place_is_kept_until_its_time_is_over() {
        let state = Arc::default();
        let address = served(health(&state), 4);
        let mut silent = Vec::new();
        for _ in 0..4 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        silent[0].write_all(b"GET /live HTTP/1.1\r\n").await.unwrap();
        let next = tokio::spawn(ask(address, "GET /live HTTP/1.1\r\n\r\n"));
        silent[0].write_all(b"\r\n").await.unwrap();
        let mut answer = String::new();
        silent[0].read_to_string(&mut answer).await.unwrap();
        assert_eq!(parts(&answer).0, "200", "the first is served, whoever came later");
        assert_eq!(parts(&next.await.unwrap()).0, "200");
        for silent in &mut silent[1..] {
            assert_eq!(silent.read(&mut [0]).await.unwrap(), 0, "and is closed in time");
        }
    }

    #[tokio::test]
    async fn one_user_has_a_part_of_the_places_of_a_unix_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("health.sock");
        let bound = UnixListener::bind(&path).unwrap();
        bound.set_nonblocking(true).unwrap();
        let listener = HttpListener::at_socket(bound, (), health(&Arc::default()), 16);
        drop(tokio::spawn(listener.serve()));
        let connect = || UnixStream::connect(&path);
        let held = [connect().await.unwrap(), connect().await.unwrap()];
        let mut third = connect().await.unwrap();
        assert_eq!(third.read(&mut [0]).await.unwrap(), 0, "it is closed");
        for stream in held {
            let answer = ask_on(stream, "GET /live HTTP/1.1\r\n\r\n").await;
            assert_eq!(parts(&answer).0, "200");
        }
        // A place is free as soon as the agent has seen that its holder is gone.
        let mut last = String::new();
        while !last.starts_with("HTTP/1.1 200") {
            let mut stream = connect().await.unwrap();
            // It may be closed before it has asked.
            if stream.write_all(b"GET /live HTTP/1.1\r\n\r\n").await.is_ok() {
                drop(stream.read_to_string(&mut last).await);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_does_not_stay() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())), 16);
        let mut silent = TcpStream::connect(address).await.unwrap();
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    }

    #[test]
    fn places_are_a_part_of_the_descriptors_and_of_memory() {
        for (nofile, mib, want) in [
            (65_536, u64::MAX >> 20, MOST_PLACES),
            (20_000, 256, MOST_PLACES),
            (1024, 256, 128),
            (u64::MAX, 24, 614),
            (65_536, 0, LEAST_PLACES),
        ] {
            assert_eq!(places(nofile, mib << 20), want, "{nofile} {mib}");
        }
    }

    #[test]
    fn a_taken_port_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let routes = || Routes::Metrics(Arc::new(Metrics::default()));
        let error = HttpListener::bind("127.0.0.1", port, routes(), 16).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot listen for metrics on 127.0.0.1:{port}"));
        HttpListener::bind("no such host.invalid", 1, routes(), 16).unwrap_err();
        // A machine may have no IPv6 at all; then there is nothing to bracket.
        if TcpListener::bind("[::1]:0").is_ok() {
            let bound = HttpListener::bind("[::1]", 0, routes(), 16).unwrap();
            assert!(matches!(bound.at, BoundAt::Tcp(at) if at[0].local_addr().unwrap().is_ipv6()));
            // Half of a name would leave the other half to somebody else.
            let error = HttpListener::bind("localhost", port, routes(), 16).unwrap_err();
            assert!(error.source.to_string().starts_with(&format!("127.0.0.1:{port}: ")), "{error:?}");
            drop(taken);
            let bound = HttpListener::bind("localhost", port, routes(), 16).unwrap();
            assert!(matches!(bound.at, BoundAt::Tcp(at) if at.len() == 2));
        }
    }
}
