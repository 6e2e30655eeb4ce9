//! The two small HTTP/1 listeners for operators: Prometheus' endpoint and the health checks.
//!
//! Whoever can connect may read them, so they tell counts and one word, never who called. A peer here can do
//! little: one request per connection, [`MOST_CONNECTIONS`] connections, small buffers, and ten seconds for
//! everything. A listener that is configured and cannot be bound is an error at start: a probe that silently
//! does not exist is worse than an agent that says why it did not start. No TLS here.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::{AbortHandle, JoinSet};

use super::{health::HealthState, metrics::Metrics};

/// The next one takes the place of the oldest: a health check must not wait behind those who say nothing.
const MOST_CONNECTIONS: usize = 16;
/// For one connection, from accept to close.
const DEADLINE: Duration = Duration::from_secs(10);
/// For the head of the request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// The least that hyper takes, and far more than a scraper sends.
const BUFFER: usize = 8 * 1024;
/// After a failed accept (no descriptors): long enough not to spin, short enough not to miss a scrape.
const AFTER_ACCEPT_ERROR: Duration = Duration::from_secs(1);

/// Why a listener could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for {what} on {host}:{port}")]
pub struct HttpError {
    what: &'static str,
    host: String,
    port: u16,
    source: std::io::Error,
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
    fn what(&self) -> &'static str {
        match self {
            Self::Metrics(_) => "metrics",
            Self::Health { .. } => "health checks",
        }
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        match self {
            Self::Metrics(metrics) => match *request.method() {
                Method::GET | Method::HEAD => {
                    respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics.render())
                }
                _ => {
                    let mut refusal =
                        respond(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", "use GET\n");
                    refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
                    refusal
                }
            },
            // Any method, as spire-agent: some probes send POST.
            Self::Health { state, live_path, ready_path } => {
                let path = request.uri().path();
                let good = match path {
                    _ if path == live_path => state.live(),
                    _ if path == ready_path => state.ready(),
                    _ => return respond(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "not found\n"),
                };
                let status = if good { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
                respond(status, "application/json", state.body())
            }
        }
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A bound listener; nobody is answered until [`HttpListener::serve`].
#[derive(Debug)]
pub struct HttpListener {
    listener: TcpListener,
    routes: Routes,
}

impl HttpListener {
    /// Binds `host` (a name or an address, IPv6 with or without brackets) and `port`; the first address of a name
    /// that can be bound is taken.
    ///
    /// # Errors
    /// [`HttpError`], for the agent not to start with.
    pub fn bind(host: &str, port: u16, routes: Routes) -> Result<Self, HttpError> {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let listener = TcpListener::bind((bare, port))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|source| HttpError { what: routes.what(), host: host.to_owned(), port, source })?;
        Ok(Self { listener, routes })
    }

    /// Answers for ever. Dropping the future closes the listener and every connection.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket; never later.
    pub async fn serve(self) -> std::io::Result<Infallible> {
        let Self { listener, routes } = self;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let mut connections = JoinSet::new();
        let mut oldest_first: VecDeque<AbortHandle> = VecDeque::with_capacity(MOST_CONNECTIONS);
        loop {
            while connections.try_join_next().is_some() {}
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for {}", routes.what());
                    tokio::time::sleep(AFTER_ACCEPT_ERROR).await;
                    continue;
                }
            };
            oldest_first.retain(|connection| !connection.is_finished());
            if oldest_first.len() >= MOST_CONNECTIONS
                && let Some(oldest) = oldest_first.pop_front()
            {
                oldest.abort();
            }
            let routes = routes.clone();
            oldest_first.push_back(connections.spawn(async move {
                let service = service_fn(move |request| {
                    let response = routes.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .keep_alive(false)
                    .max_buf_size(BUFFER)
                    .max_headers(32)
                    .serve_connection(TokioIo::new(stream), service);
                // A broken or slow peer is its own affair, and logging each would be its lever.
                drop(tokio::time::timeout(DEADLINE, connection).await);
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::telemetry::health::Probe;

    /// A served listener, and its address. It ends with the test's runtime.
    fn served(routes: Routes) -> SocketAddr {
        let listener = HttpListener::bind("127.0.0.1", 0, routes).unwrap();
        let address = listener.listener.local_addr().unwrap();
        drop(tokio::spawn(listener.serve()));
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
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
        let address = served(Routes::Health {
            state: Arc::clone(&state),
            live_path: "/live".to_owned(),
            ready_path: "/ready".to_owned(),
        });
        for (case, probe, live, ready, body) in [
            ("starting", Probe::Starting, "200", "500", "{\"agent\":null}\n"),
            ("healthy", Probe::Healthy, "200", "200", UP),
            ("unavailable", Probe::Unavailable, "500", "500", DOWN),
            ("draining", Probe::Draining, "200", "500", DOWN),
        ] {
            state.set(probe);
            let answer = ask(address, "GET /live HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert_eq!(parts(&answer), (live, "application/json", body), "{case}, live");
            let answer =
                ask(address, "POST /ready?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
            assert_eq!(parts(&answer), (ready, "application/json", body), "{case}, ready");
        }
        let answer = ask(address, "GET /other HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(parts(&answer).0, "404");
    }

    #[tokio::test]
    async fn metrics_at_every_path_for_readers_only() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())));
        for path in ["/", "/metrics", "/any/thing?at=all"] {
            let answer = ask(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
            let (status, kind, body) = parts(&answer);
            assert_eq!((status, kind), ("200", "text/plain; version=0.0.4; charset=utf-8"), "{path}");
            assert!(body.contains("\nprocess_start_time_seconds "), "{path}: {body}");
        }
        let answer = ask(address, "HEAD /metrics HTTP/1.0\r\n\r\n").await;
        assert_eq!((parts(&answer).0, parts(&answer).2), ("200", ""));
        let answer = ask(address, "DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(parts(&answer).0, "405");
        assert!(answer.contains("allow: GET, HEAD"), "{answer}");
    }

    #[tokio::test]
    async fn hostile_peers_get_little() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())));
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

    /// Silent connections take every place; the oldest of them gives its place to who comes, the others keep theirs.
    #[tokio::test]
    async fn nobody_waits_behind_silent_connections() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())));
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(parts(&answer).0, "200");
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0, "the oldest is closed");
        let last = silent.last_mut().unwrap();
        last.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        last.read_to_string(&mut answer).await.unwrap();
        assert_eq!(parts(&answer).0, "200", "the latest is still served");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_does_not_stay() {
        let address = served(Routes::Metrics(Arc::new(Metrics::default())));
        let mut silent = TcpStream::connect(address).await.unwrap();
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    }

    #[test]
    fn an_agent_that_drains_stays_so() {
        let state = HealthState::default();
        for (probe, then) in [
            (Probe::Healthy, Probe::Healthy),
            (Probe::Unavailable, Probe::Unavailable),
            (Probe::Draining, Probe::Draining),
            (Probe::Healthy, Probe::Draining),
        ] {
            state.set(probe);
            assert_eq!(state.get(), then);
        }
    }

    #[test]
    fn a_taken_port_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let routes = || Routes::Metrics(Arc::new(Metrics::default()));
        let error = HttpListener::bind("127.0.0.1", port, routes()).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot listen for metrics on 127.0.0.1:{port}"));
        HttpListener::bind("no such host.invalid", 1, routes()).unwrap_err();
        // A machine may have no IPv6 at all; then there is nothing to bracket.
        if TcpListener::bind("[::1]:0").is_ok() {
            let bound = HttpListener::bind("[::1]", 0, routes()).unwrap();
            assert!(bound.listener.local_addr().unwrap().is_ipv6());
        }
    }
}
