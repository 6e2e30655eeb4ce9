//! Asks the kubelet or the API server. Blocks the thread that asks, at most until [`FETCH`] is over; looking up a name may
//! take longer where the resolver does.
//!
//! Not trusted before its certificate was verified: whoever answers. After that what it says is true, but not that it is
//! well-formed, short, or comes at all.

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
    fault::{FETCH, KubernetesFault, KubernetesService, ServiceAddress},
    material::{KnownBy, Material, ShownAs},
};
use crate::telemetry::chain;

/// What is kept of a connection that was not read yet, in bytes.
const READ_AHEAD: usize = 64 * 1024;
/// What is shown of the text of a refusal, in bytes.
const SHOWN: usize = 300;
/// What the list is read through, in bytes.
const BUFFER: usize = 8 * 1024;

/// Where a service is, and how it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KubernetesPlace {
    pub(super) service: KubernetesService,
    /// What it is asked by: the node's name, or the API server's; `None` for this host.
    pub(super) name: Option<String>,
    pub(super) port: u16,
    /// `None` for the port that says everything to everybody.
    pub(super) secure: Option<(ShownAs, KnownBy)>,
    pub(super) reload_interval: Duration,
}

impl KubernetesPlace {
    fn host(&self) -> String {
        match &self.name {
            Some(name) if self.secure.is_some() => name.clone(),
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

    fn whom(&self) -> ServiceAddress {
        ServiceAddress { service: self.service, address: self.address() }
    }

    /// The agent as the service sees it, in messages.
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

/// The text of an answer. It is read byte by byte, so that it must be a type of its own.
pub(super) type AnswerText<'a, 'r> = io::BufReader<&'a mut BoundedBody<AnswerBody<'r>>>;

/// Asks one service.
pub(super) struct KubernetesClient {
    place: KubernetesPlace,
    /// With when it was read.
    material: Option<(Material, StdInstant)>,
    /// The files are to be read again before the next request.
    stale: bool,
    /// An open connection, which was made with this material.
    open: Option<KubernetesConnection>,
}

/// A connection that may take another request.
type KubernetesConnection = http1::SendRequest<Empty<Bytes>>;

impl KubernetesClient {
    pub(super) fn new(place: KubernetesPlace) -> Self {
        Self { place, material: None, stale: false, open: None }
    }

    /// What it is asked by, if that is a name.
    pub(super) fn name(&self) -> Option<&str> {
        self.place.name.as_deref()
    }

    /// Reads what the agent shows itself with and knows the service by. Asks nobody.
    ///
    /// # Errors
    /// [`KubernetesFault::Material`].
    pub(super) fn prepare(&mut self) -> Result<(), KubernetesFault> {
        self.material().map(drop)
    }

    /// Asks for what is at this path, and reads it with `read`.
    ///
    /// # Errors
    /// [`KubernetesFault`].
    pub(super) fn get<T>(
        &mut self,
        runtime: &Runtime,
        path: &str,
        read: impl FnOnce(AnswerText<'_, '_>) -> serde_json::Result<T>,
    ) -> Result<T, KubernetesFault> {
        let material = self.material()?;
        let until = Instant::now() + FETCH;
        let got = self
            .ask(runtime, material.as_ref(), path, until)
            .and_then(|(open, answer)| self.read(runtime, open, answer, until, read));
        self.stale = got.as_ref().is_err_and(KubernetesFault::may_be_stale);
        got
    }

    fn material(&mut self) -> Result<Option<Material>, KubernetesFault> {
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
        let read = Material::read(shown_as, known_by, self.place.service.material());
        match (read, &mut self.material) {
            (Ok(read), kept) => *kept = Some((read, now)),
            (Err(fault), None) => return Err(fault.into()),
            (Err(fault), Some((_, at))) => {
                let error = chain(&fault);
                tracing::warn!(error, "{} is still asked with what was read before", self.place.service);
                *at = now;
            }
        }
        Ok(self.material.as_ref().map(|(material, _)| material.clone()))
    }

    /// Asks on the connection that is open, or on another one where that was closed.
    fn ask(
        &mut self,
        runtime: &Runtime,
        material: Option<&Material>,
        path: &str,
        until: Instant,
    ) -> Result<(KubernetesConnection, http::Response<Incoming>), KubernetesFault> {
        let whom = self.place.whom();
        let request = || request(&whom, path, material);
        if let Some(mut open) = self.open.take().filter(|open| !open.is_closed()) {
            let request = request()?;
            let answer = runtime.block_on(async { timeout_at(until, send(&mut open, request)).await });
            // Late, it is no better on another connection; closed, it was closed before it was asked.
            match answer {
                Err(_elapsed) => return Err(KubernetesFault::Late { who: whom }),
                Ok(Ok(answer)) => return Ok((open, answer)),
                Ok(Err(_closed)) => {}
            }
        }
        let to: Vec<SocketAddr> = (self.place.host(), self.place.port)
            .to_socket_addrs()
            .map_err(|source| KubernetesFault::Unreachable { who: whom.clone(), source })?
            .collect();
        let request = request()?;
        runtime.block_on(async {
            let answer = timeout_at(until, async {
                let mut open = self.connect(&whom, &to, material).await?;
                let broken = |source| KubernetesFault::Broken { who: whom.clone(), source };
                let answer = send(&mut open, request).await.map_err(broken)?;
                Ok((open, answer))
            });
            answer.await.unwrap_or_else(|_elapsed| Err(KubernetesFault::Late { who: whom.clone() }))
        })
    }

    /// Reads the answer, and keeps the connection if it was what was asked for.
    fn read<T>(
        &mut self,
        runtime: &Runtime,
        open: KubernetesConnection,
        answer: http::Response<Incoming>,
        until: Instant,
        read: impl FnOnce(AnswerText<'_, '_>) -> serde_json::Result<T>,
    ) -> Result<T, KubernetesFault> {
        let largest = self.place.service.largest_answer();
        let who = self.place.whom();
        let (head, body) = answer.into_parts();
        if body.size_hint().lower() > u64::try_from(largest).unwrap_or(u64::MAX) {
            return Err(KubernetesFault::Large { who, excess: BodyExcess::Length(largest) });
        }
        let mut body = BoundedBody::new(AnswerBody { runtime, body, until }, TextBounds::new(largest));
        if head.status != StatusCode::OK {
            return Err(self.refused(who, head.status, &mut body));
        }
        let found = head.headers.get(header::CONTENT_TYPE).map(|found| found.to_str().unwrap_or("?"));
        if let Some(found) = found.filter(|found| !found.starts_with("application/json")) {
            return Err(KubernetesFault::NotJson { who, found: shown(found.as_bytes()) });
        }
        let got = read(io::BufReader::with_capacity(BUFFER, &mut body));
        match (got, body.fault) {
            (Ok(got), _) => {
                self.open = Some(open);
                Ok(got)
            }
            (Err(_), Some(BodyFault::Excess(excess))) => Err(KubernetesFault::Large { who, excess }),
            (Err(_), Some(BodyFault::Parts(PartFault::Late))) => Err(KubernetesFault::Late { who }),
            (Err(_), Some(BodyFault::Parts(PartFault::Broken(source)))) => {
                Err(KubernetesFault::Broken { who, source })
            }
            (Err(error), None) => {
                Err(KubernetesFault::Malformed { who, why: shown(error.to_string().as_bytes()) })
            }
        }
    }

    async fn connect(
        &self,
        who: &ServiceAddress,
        to: &[SocketAddr],
        material: Option<&Material>,
    ) -> Result<KubernetesConnection, KubernetesFault> {
        let unreachable = |source| KubernetesFault::Unreachable { who: who.clone(), source };
        let stream = TcpStream::connect(to).await.map_err(unreachable)?;
        let Some(Material { tls, .. }) = material else {
            return handshake(stream, who).await;
        };
        let name = ServerName::try_from(self.place.host())
            .map_err(|error| unreachable(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        let stream = stream.map_err(|source| self.tls_fault(who, source))?;
        handshake(stream, who).await
    }

    fn tls_fault(&self, who: &ServiceAddress, source: io::Error) -> KubernetesFault {
        let who = who.clone();
        let inner = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(rustls::Error::InvalidCertificate(wrong)) = inner else {
            return KubernetesFault::Tls { who, source };
        };
        let why = wrong.to_string();
        match wrong {
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                KubernetesFault::OtherName { who, why }
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => KubernetesFault::Tls { who, source },
            _ => {
                let ca = match &self.place.secure {
                    Some((_, KnownBy::Ca { file, .. })) => file.display().to_string(),
                    _ => String::new(),
                };
                KubernetesFault::UnknownCa { who, ca, why }
            }
        }
    }

    fn refused(
        &self,
        who: ServiceAddress,
        status: StatusCode,
        body: &mut BoundedBody<AnswerBody<'_>>,
    ) -> KubernetesFault {
        let mut said = [0; SHOWN];
        let n = io::Read::read(body, &mut said).unwrap_or(0);
        let said = match shown(said.get(..n).unwrap_or_default()) {
            said if said.is_empty() => said,
            said => format!(": {said}"),
        };
        match status {
            StatusCode::UNAUTHORIZED => {
                let right = match &self.place.secure {
                    _ if self.place.service == KubernetesService::ApiServer => {
                        "it must be the token of a service account of this cluster"
                    }
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
                KubernetesFault::Unauthenticated { who, shown_as: self.place.shown_as(), right }
            }
            StatusCode::FORBIDDEN => KubernetesFault::Forbidden { who, said },
            status if status.is_redirection() => KubernetesFault::Redirect { who, status: status.as_u16() },
            status => KubernetesFault::Status { who, status: status.as_u16(), said },
        }
    }
}

async fn handshake(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    who: &ServiceAddress,
) -> Result<KubernetesConnection, KubernetesFault> {
    let broken = |source| KubernetesFault::Broken { who: who.clone(), source };
    let handshake = http1::Builder::new().max_buf_size(READ_AHEAD).handshake(TokioIo::new(stream));
    let (sender, connection) = handshake.await.map_err(broken)?;
    // It runs whenever this thread waits for an answer or its body, and ends with the sender.
    tokio::spawn(connection);
    Ok(sender)
}

fn request(
    whom: &ServiceAddress,
    path: &str,
    material: Option<&Material>,
) -> Result<Request<Empty<Bytes>>, KubernetesFault> {
    let mut request = Request::builder()
        .uri(path)
        .header(header::HOST, &whom.address)
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, concat!("durward/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|_unsaid| KubernetesFault::Internal("no request can be made"))?;
    if let Some(authorization) = material.and_then(|material| material.authorization.as_ref()) {
        request.headers_mut().insert(header::AUTHORIZATION, authorization.clone());
    }
    Ok(request)
}

async fn send(
    open: &mut KubernetesConnection,
    request: Request<Empty<Bytes>>,
) -> Result<http::Response<Incoming>, hyper::Error> {
    open.ready().await?;
    open.send_request(request).await
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
pub(super) struct AnswerBody<'r> {
    runtime: &'r Runtime,
    body: Incoming,
    until: Instant,
}

pub(super) enum PartFault {
    Late,
    Broken(hyper::Error),
}

impl BodyParts for AnswerBody<'_> {
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
