//! Asks the kubelet for the node's pods. Blocks the thread that asks, at most until [`FETCH`] is over; looking up the
//! kubelet's name may take longer where the resolver does.
//!
//! Not trusted before its certificate was verified: whoever answers. After that what it says of the node's pods is true,
//! but not that it is well-formed, short, or comes at all.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _},
    sync::Arc,
    time::{Duration, Instant as StdInstant},
};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::CertificateError;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    runtime::Runtime,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    body::{BodyExcess, BodyFault, BodyParts, BoundedBody, TextBounds},
    material::{KnownBy, Material, MaterialFault, ShownAs},
    pods::PodList,
};
use crate::telemetry::chain;

/// How long one request may take, from connecting to the last byte.
pub(super) const FETCH: Duration = Duration::from_secs(10);
/// The largest list that is read, in bytes: of 500 usual pods it is some 3 MiB.
pub(super) const LARGEST_LIST: usize = 32 * 1024 * 1024;
/// What is kept of a connection that was not read yet, in bytes.
const READ_AHEAD: usize = 64 * 1024;
/// What is shown of the text of a refusal, in bytes.
const SHOWN: usize = 300;
/// What the list is read through, in bytes.
const BUFFER: usize = 8 * 1024;

/// Where the kubelet is, and how it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KubeletPlace {
    /// The node's name; `None` for this host.
    pub(super) node: Option<String>,
    pub(super) port: u16,
    /// `None` for the port that says everything to everybody.
    pub(super) secure: Option<(ShownAs, KnownBy)>,
    pub(super) reload_interval: Duration,
}

impl KubeletPlace {
    fn host(&self) -> String {
        match &self.node {
            Some(node) if self.secure.is_some() => node.clone(),
            _ => Ipv4Addr::LOCALHOST.to_string(),
        }
    }

    fn address(&self) -> String {
        let (host, port) = (self.host(), self.port);
        match host.parse() {
            Ok(IpAddr::V6(host)) => format!("[{host}]:{port}"),
            _ => format!("{host}:{port}"),
        }
    }

    /// The agent as the kubelet sees it, in messages.
    fn shown_as(&self) -> String {
        match &self.secure {
            Some((ShownAs::Token(path), _)) => format!("the token of {}", path.display()),
            Some((ShownAs::Certificate { certificate, .. }, _)) => {
                format!("the certificate of {}", certificate.display())
            }
            Some((ShownAs::Anonymous, _)) | None => "anonymous requests".to_owned(),
        }
    }
}

/// Why the kubelet did not say which pods there are.
#[derive(Debug, thiserror::Error)]
pub enum KubeletFault {
    /// What to show it, or to know it by, cannot be read.
    #[error(transparent)]
    Material(#[from] MaterialFault),
    /// Nobody is there.
    #[error("cannot reach the kubelet at {address}")]
    Unreachable { address: String, source: io::Error },
    /// It did not answer in time.
    #[error("the kubelet at {address} did not answer within {} s", FETCH.as_secs())]
    Late { address: String },
    /// Its certificate is signed by somebody else.
    #[error(
        "the kubelet at {address} shows a certificate that no CA of {ca} has signed: name the kubelet's CA in \
         kubelet_ca_path, or set skip_kubelet_verification = true ({why})"
    )]
    UnknownCa { address: String, ca: String, why: String },
    /// Its certificate is for another name.
    #[error(
        "the kubelet at {address} shows a certificate that is not for that name: set node_name to a name that it is \
         for, or skip_kubelet_verification = true ({why})"
    )]
    OtherName { address: String, why: String },
    /// Another failure of TLS.
    #[error("no TLS connection with the kubelet at {address}")]
    Tls { address: String, source: io::Error },
    /// It does not know the agent.
    #[error("the kubelet at {address} does not accept {shown_as} (401): {right}")]
    Unauthenticated { address: String, shown_as: String, right: &'static str },
    /// It knows the agent, which may not ask.
    #[error(
        "the kubelet at {address} does not let the agent see its pods (403): allow its service account get on \
         nodes/proxy, or on nodes/pods where the cluster has that{said}"
    )]
    Forbidden { address: String, said: String },
    /// It sends the agent elsewhere, which is not followed.
    #[error(
        "the kubelet at {address} answers with a redirect ({status}), which is not followed: is that its port?"
    )]
    Redirect { address: String, status: u16 },
    /// Any other answer.
    #[error("unexpected status code on pods response of {address}: {status}{said}")]
    Status { address: String, status: u16, said: String },
    /// It answers something else.
    #[error("the answer of {address} is {found:?} and no list of pods: is that the kubelet's port?")]
    NotJson { address: String, found: String },
    /// The list is larger than is read.
    #[error("the list of pods of {address} is not read: {excess}")]
    Large { address: String, excess: BodyExcess },
    /// The connection broke.
    #[error("the connection to the kubelet at {address} broke")]
    Broken { address: String, source: hyper::Error },
    /// The list cannot be understood.
    #[error("cannot understand the list of pods of {address}: {why}")]
    Malformed { address: String, why: String },
    /// The agent itself failed.
    #[error("the agent cannot ask the kubelet: {0}")]
    Internal(&'static str),
}

impl KubeletFault {
    /// Whether to ask again shortly may help: it does not where somebody has to change something.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Late { .. } | Self::Broken { .. } | Self::Tls { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            Self::Material(_)
            | Self::UnknownCa { .. }
            | Self::OtherName { .. }
            | Self::Unauthenticated { .. }
            | Self::Forbidden { .. }
            | Self::Redirect { .. }
            | Self::NotJson { .. }
            | Self::Large { .. }
            | Self::Malformed { .. }
            | Self::Internal(_) => false,
        }
    }

    /// Whether files that were read anew may help.
    fn may_be_stale(&self) -> bool {
        matches!(
            self,
            Self::UnknownCa { .. } | Self::OtherName { .. } | Self::Unauthenticated { .. } | Self::Tls { .. }
        )
    }
}

/// Asks one kubelet.
pub(super) struct Kubelet {
    place: KubeletPlace,
    /// With when it was read.
    material: Option<(Material, StdInstant)>,
    /// The files are to be read again before the next request.
    stale: bool,
    /// An open connection, which was made with this material.
    open: Option<KubeletConnection>,
}

/// A connection that may take another request.
type KubeletConnection = http1::SendRequest<Empty<Bytes>>;

impl Kubelet {
    pub(super) fn new(place: KubeletPlace) -> Self {
        Self { place, material: None, stale: false, open: None }
    }

    /// Asks for the pods.
    ///
    /// # Errors
    /// [`KubeletFault`].
    pub(super) fn list(&mut self, runtime: &Runtime) -> Result<PodList, KubeletFault> {
        let material = self.material()?;
        let listed = self.ask(runtime, material.as_ref());
        self.stale = listed.as_ref().is_err_and(KubeletFault::may_be_stale);
        listed
    }

    fn material(&mut self) -> Result<Option<Material>, KubeletFault> {
        let Some((shown_as, known_by)) = &self.place.secure else { return Ok(None) };
        let now = StdInstant::now();
        let fresh = self
            .material
            .as_ref()
            .filter(|(_, at)| !self.stale && now.duration_since(*at) < self.place.reload_interval);
        if let Some((material, _)) = fresh {
            return Ok(Some(material.clone()));
        }
        // Who it is, and who the agent is, is looked at anew as well.
        self.open = None;
        match (Material::read(shown_as, known_by), &mut self.material) {
            (Ok(read), kept) => *kept = Some((read, now)),
            (Err(fault), None) => return Err(fault.into()),
            (Err(fault), Some((_, at))) => {
                let error = chain(&fault);
                tracing::warn!(error, "the kubelet is asked with what was read before");
                *at = now;
            }
        }
        Ok(self.material.as_ref().map(|(material, _)| material.clone()))
    }

    /// Asks on the connection that is open, or on another one where the kubelet has closed that.
    fn ask(&mut self, runtime: &Runtime, material: Option<&Material>) -> Result<PodList, KubeletFault> {
        let until = Instant::now() + FETCH;
        let authorization = material.and_then(|material| material.authorization.as_ref());
        let address = self.place.address();
        if let Some(mut open) = self.open.take().filter(|open| !open.is_closed()) {
            let answer =
                runtime.block_on(async { timeout_at(until, send(&mut open, &address, authorization)).await });
            // Late, it is no better on another connection; closed, it was closed before it was asked.
            match answer {
                Err(_elapsed) => return Err(KubeletFault::Late { address }),
                Ok(Ok(answer)) => return self.read(runtime, open, answer, until),
                Ok(Err(_closed)) => {}
            }
        }
        let (open, answer) = self.ask_anew(runtime, material, until)?;
        self.read(runtime, open, answer, until)
    }

    /// Asks on a connection of its own.
    fn ask_anew(
        &self,
        runtime: &Runtime,
        material: Option<&Material>,
        until: Instant,
    ) -> Result<(KubeletConnection, http::Response<Incoming>), KubeletFault> {
        let address = self.place.address();
        let to: Vec<SocketAddr> = (self.place.host(), self.place.port)
            .to_socket_addrs()
            .map_err(|source| KubeletFault::Unreachable { address: address.clone(), source })?
            .collect();
        runtime.block_on(async {
            let answer = timeout_at(until, async {
                let mut open = self.connect(&address, &to, material).await?;
                let authorization = material.and_then(|material| material.authorization.as_ref());
                let answer = send(&mut open, &address, authorization).await?;
                Ok((open, answer))
            });
            answer.await.unwrap_or_else(|_elapsed| Err(KubeletFault::Late { address: address.clone() }))
        })
    }

    /// Reads the list, and keeps the connection if it was one.
    fn read(
        &mut self,
        runtime: &Runtime,
        open: KubeletConnection,
        answer: http::Response<Incoming>,
        until: Instant,
    ) -> Result<PodList, KubeletFault> {
        let address = self.place.address();
        let late = || KubeletFault::Late { address: address.clone() };
        let (head, body) = answer.into_parts();
        if body.size_hint().lower() > u64::try_from(LARGEST_LIST).unwrap_or(u64::MAX) {
            return Err(KubeletFault::Large { address, excess: BodyExcess::Length(LARGEST_LIST) });
        }
        let mut body = BoundedBody::new(ListBody { runtime, body, until }, TextBounds::new(LARGEST_LIST));
        if head.status != StatusCode::OK {
            return Err(self.refused(address, head.status, &mut body));
        }
        let found = head.headers.get(header::CONTENT_TYPE).map(|found| found.to_str().unwrap_or("?"));
        if let Some(found) = found.filter(|found| !found.starts_with("application/json")) {
            return Err(KubeletFault::NotJson { address, found: shown(found.as_bytes()) });
        }
        let listed = PodList::read(io::BufReader::with_capacity(BUFFER, &mut body));
        match (listed, body.fault) {
            (Ok(pods), _) => {
                self.open = Some(open);
                Ok(pods)
            }
            (Err(_), Some(BodyFault::Excess(excess))) => Err(KubeletFault::Large { address, excess }),
            (Err(_), Some(BodyFault::Parts(PartFault::Late))) => Err(late()),
            (Err(_), Some(BodyFault::Parts(PartFault::Broken(source)))) => {
                Err(KubeletFault::Broken { address, source })
            }
            (Err(error), None) => {
                Err(KubeletFault::Malformed { address, why: shown(error.to_string().as_bytes()) })
            }
        }
    }

    async fn connect(
        &self,
        address: &str,
        to: &[SocketAddr],
        material: Option<&Material>,
    ) -> Result<KubeletConnection, KubeletFault> {
        let unreachable = |source| KubeletFault::Unreachable { address: address.to_owned(), source };
        let stream = TcpStream::connect(to).await.map_err(unreachable)?;
        let Some(Material { tls, .. }) = material else {
            return handshake(stream, address).await;
        };
        let name = ServerName::try_from(self.place.host())
            .map_err(|error| unreachable(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        let stream = stream.map_err(|source| self.tls_fault(address, source))?;
        handshake(stream, address).await
    }

    fn tls_fault(&self, address: &str, source: io::Error) -> KubeletFault {
        let address = address.to_owned();
        let inner = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(rustls::Error::InvalidCertificate(wrong)) = inner else {
            return KubeletFault::Tls { address, source };
        };
        let why = wrong.to_string();
        match wrong {
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                KubeletFault::OtherName { address, why }
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => KubeletFault::Tls { address, source },
            _ => {
                let ca = match &self.place.secure {
                    Some((_, KnownBy::Ca { file, .. })) => file.display().to_string(),
                    _ => String::new(),
                };
                KubeletFault::UnknownCa { address, ca, why }
            }
        }
    }

    fn refused(
        &self,
        address: String,
        status: StatusCode,
        body: &mut BoundedBody<ListBody<'_>>,
    ) -> KubeletFault {
        let mut said = [0; SHOWN];
        let n = io::Read::read(body, &mut said).unwrap_or(0);
        let said = match shown(said.get(..n).unwrap_or_default()) {
            said if said.is_empty() => said,
            said => format!(": {said}"),
        };
        match status {
            StatusCode::UNAUTHORIZED => {
                let right = match &self.place.secure {
                    Some((ShownAs::Token(_), _)) => {
                        "it must be one of this cluster's, and the kubelet must take tokens \
                         (authentication.webhook.enabled in its configuration)"
                    }
                    Some((ShownAs::Certificate { .. }, _)) => {
                        "it must be signed by the kubelet's client CA (authentication.x509.clientCAFile)"
                    }
                    Some((ShownAs::Anonymous, _)) | None => {
                        "name a token or a certificate, or let the kubelet take anonymous requests \
                         (authentication.anonymous.enabled)"
                    }
                };
                KubeletFault::Unauthenticated { address, shown_as: self.place.shown_as(), right }
            }
            StatusCode::FORBIDDEN => KubeletFault::Forbidden { address, said },
            status if status.is_redirection() => KubeletFault::Redirect { address, status: status.as_u16() },
            status => KubeletFault::Status { address, status: status.as_u16(), said },
        }
    }
}

async fn handshake(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    address: &str,
) -> Result<KubeletConnection, KubeletFault> {
    let broken = |source| KubeletFault::Broken { address: address.to_owned(), source };
    let handshake = http1::Builder::new().max_buf_size(READ_AHEAD).handshake(TokioIo::new(stream));
    let (sender, connection) = handshake.await.map_err(broken)?;
    // It runs whenever this thread waits for an answer or its body, and ends with the sender.
    tokio::spawn(connection);
    Ok(sender)
}

async fn send(
    open: &mut KubeletConnection,
    address: &str,
    authorization: Option<&http::HeaderValue>,
) -> Result<http::Response<Incoming>, KubeletFault> {
    let broken = |source| KubeletFault::Broken { address: address.to_owned(), source };
    open.ready().await.map_err(broken)?;
    let mut request = Request::builder()
        .uri("/pods")
        .header(header::HOST, address)
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, concat!("durward/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|_unsaid| KubeletFault::Internal("no request can be made"))?;
    if let Some(authorization) = authorization {
        request.headers_mut().insert(header::AUTHORIZATION, authorization.clone());
    }
    open.send_request(request).await.map_err(broken)
}

/// A text of somebody else's, for a message: one line, without control characters, and short.
fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text.get(..SHOWN).unwrap_or(text));
    text.split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The parts of a body, each waited for on this thread.
struct ListBody<'r> {
    runtime: &'r Runtime,
    body: Incoming,
    until: Instant,
}

enum PartFault {
    Late,
    Broken(hyper::Error),
}

impl BodyParts for ListBody<'_> {
    type Part = Bytes;
    type Fault = PartFault;

    fn next(&mut self) -> Result<Option<Bytes>, PartFault> {
        loop {
            let Self { runtime, body, until } = self;
            let frame = runtime.block_on(async { timeout_at(*until, body.frame()).await });
            match frame {
                Err(_elapsed) => return Err(PartFault::Late),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(PartFault::Broken(error)),
                // Trailers are no part of it.
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(part) if !part.is_empty() => return Ok(Some(part)),
                    Ok(_) | Err(_) => {}
                },
            }
        }
    }
}
