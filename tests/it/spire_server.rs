//! A SPIRE Server of the tests' own: the real messages over real TLS, and whatever lie a test wants of it.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use durward::issuer::server::proto::{
    agent::{
        AttestAgentRequest, AttestAgentResponse, PostStatusRequest, PostStatusResponse, RenewAgentRequest,
        RenewAgentResponse, attest_agent_request, attest_agent_response,
    },
    bundle::{GetBundleRequest, GetFederatedBundleRequest},
    entry::{
        EntryRevision, GetAuthorizedEntriesRequest, GetAuthorizedEntriesResponse,
        SyncAuthorizedEntriesRequest, SyncAuthorizedEntriesResponse,
    },
    svid::{
        BatchNewX509svidRequest, BatchNewX509svidResponse, NewJwtsvidRequest, NewJwtsvidResponse,
        batch_new_x509svid_response,
    },
    types,
};
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs::{default_provider, kx_group},
    server::WebPkiClientVerifier,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::server::Connected};

/// Generated code, which is compared with what makes it elsewhere.
macro_rules! generated {
    ($($path:literal $name:ident;)+) => {
        $(
            #[path = $path]
            #[rustfmt::skip]
            #[expect(
                clippy::allow_attributes,
                clippy::allow_attributes_without_reason,
                clippy::as_conversions,
                clippy::clone_on_ref_ptr,
                unreachable_pub,
                unused_qualifications,
                reason = "generated"
            )]
            mod $name;
        )+
    };
}

generated! {
    "spire_api/agent.rs" agent_api;
    "spire_api/bundle.rs" bundle_api;
    "spire_api/entry.rs" entry_api;
    "spire_api/svid.rs" svid_api;
}

/// How the server answers those who ask for their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Right,
    /// It never answers.
    Silent,
    /// There is always one revision more.
    Endless,
    /// An answer of 100 MiB.
    Huge,
}

/// Which SVID an agent is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    Right,
    OtherKey,
    OtherTrustDomain,
    NoAgent,
    Expired,
    OtherCa,
}

/// How the server presents itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    Right,
    OtherId,
    OtherCa,
    NoAlpn,
    /// It agrees on HTTP/2, says this instead, and closes.
    Says(&'static [u8]),
    /// It speaks HTTP/2, and answers with a page.
    Web,
    /// It has no key exchange but those of before.
    Classical,
    /// It has the one of the two that is offered second, and no other.
    Nist,
}

/// What the server does and has done.
pub(crate) struct Course {
    pub(crate) tokens: BTreeSet<String>,
    pub(crate) given: Given,
    pub(crate) ttl: Duration,
    pub(crate) reattestable: bool,
    /// The reason of each answer to an agent.
    pub(crate) denial: Option<i32>,
    /// Whether every attestation is that of a banned agent.
    pub(crate) banned: bool,
    /// How many further bundles are not given.
    pub(crate) bundles_fail: u32,
    pub(crate) attested: u32,
    pub(crate) renewed: u32,
    pub(crate) entries: Vec<types::Entry>,
    /// Whether it signs no X.509-SVID, and how often it was asked in vain.
    pub(crate) signs_nothing: bool,
    pub(crate) asked_in_vain: u32,
    /// How many certificates the chain of a workload has whose path begins with `/long`.
    pub(crate) chain: usize,
    /// The trust domains whose bundles were asked for.
    pub(crate) federated: BTreeSet<String>,
    pub(crate) manner: Manner,
    /// How often entries were asked for.
    pub(crate) syncs: u32,
    /// How many tokens were signed, how many are being signed, and of these the most at once.
    pub(crate) signed: u32,
    pub(crate) signing: u32,
    pub(crate) most_signing: u32,
}

/// A server that serves until it is dropped.
pub(crate) struct FakeSpireServer {
    pub(crate) address: SocketAddr,
    pub(crate) ca: Arc<TestCa>,
    pub(crate) course: Arc<Mutex<Course>>,
    serving: JoinHandle<()>,
}

/// A CA of trust domain example.org.
pub(crate) struct TestCa {
    pub(crate) pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub(crate) fn new() -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri("spiffe://example.org")];
        let certificate = params.self_signed(&key).unwrap();
        Arc::new(Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    fn signed(&self, id: &str, key: &KeyPair) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(id)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl FakeSpireServer {
    pub(crate) async fn start(face: Face) -> Self {
        Self::start_with(face, TestCa::new()).await
    }

    pub(crate) async fn start_with(face: Face, ca: Arc<TestCa>) -> Self {
        Self::start_for(face, ca, Duration::MAX).await
    }

    /// One that says GOAWAY on every connection after `age`.
    pub(crate) async fn start_for(face: Face, ca: Arc<TestCa>, age: Duration) -> Self {
        let course = Arc::new(Mutex::new(Course {
            tokens: BTreeSet::new(),
            given: Given::Right,
            ttl: Duration::from_secs(3600),
            reattestable: false,
            denial: None,
            banned: false,
            bundles_fail: 0,
            attested: 0,
            renewed: 0,
            entries: Vec::new(),
            signs_nothing: false,
            asked_in_vain: 0,
            chain: 1,
            federated: BTreeSet::new(),
            manner: Manner::Right,
            syncs: 0,
            signed: 0,
            signing: 0,
            most_signing: 0,
        }));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(tls(face, &ca));
        let (sender, incoming) = tokio::sync::mpsc::channel(8);
        let accepting = async move {
            while let Ok((stream, _)) = listener.accept().await {
                match (face, acceptor.accept(stream).await) {
                    (_, Err(_)) => {}
                    (Face::Says(words), Ok(mut stream)) => {
                        drop(stream.write_all(words).await);
                        drop(stream.shutdown().await);
                    }
                    (Face::Web, Ok(stream)) => drop(tokio::spawn(show_page(stream))),
                    (_, Ok(stream)) => {
                        drop(sender.send(Ok::<_, std::io::Error>(Accepted(stream))).await);
                    }
                }
            }
        };
        let service = Api { ca: Arc::clone(&ca), course: Arc::clone(&course) };
        let mut server = tonic::transport::Server::builder();
        if age < Duration::MAX {
            server = server.max_connection_age(age);
        }
        let serving = server
            .add_service(agent_api::agent_server::AgentServer::new(service.clone()))
            .add_service(bundle_api::bundle_server::BundleServer::new(service.clone()))
            .add_service(entry_api::entry_server::EntryServer::new(service.clone()))
            .add_service(svid_api::svid_server::SvidServer::new(service))
            // With a signal, if one that never comes, connections end with the server.
            .serve_with_incoming_shutdown(
                tokio_stream::wrappers::ReceiverStream::new(incoming),
                std::future::pending(),
            );
        let serving = tokio::spawn(async move {
            tokio::select! {
                () = accepting => {}
                served = serving => served.unwrap(),
            }
        });
        Self { address, ca, course, serving }
    }

    pub(crate) fn course(&self) -> std::sync::MutexGuard<'_, Course> {
        self.course.lock().unwrap()
    }
}

impl Drop for FakeSpireServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn show_page(stream: TlsStream<TcpStream>) {
    let mut web = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_, mut answer))) = web.accept().await {
        let page = http::Response::builder().header("content-type", "text/html").body(()).unwrap();
        let mut body = answer.send_response(page, false).unwrap();
        body.send_data("<html></html>".into(), true).unwrap();
    }
}

fn tls(face: Face, ca: &Arc<TestCa>) -> Arc<ServerConfig> {
    let key = KeyPair::generate().unwrap();
    let id = match face {
        Face::OtherId => "spiffe://example.org/somebody/else",
        _ => "spiffe://example.org/spire/server",
    };
    let certificate = match face {
        Face::OtherCa => TestCa::new().signed(id, &key),
        _ => ca.signed(id, &key),
    };
    let mut roots = RootCertStore::empty();
    roots.add(ca.der.clone()).unwrap();
    let mut provider = default_provider();
    match face {
        Face::Classical => provider.kx_groups = vec![kx_group::X25519, kx_group::SECP256R1],
        Face::Nist => provider.kx_groups = vec![kx_group::SECP256R1MLKEM768],
        _ => {}
    }
    let provider = Arc::new(provider);
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![certificate], key)
        .unwrap();
    if face != Face::NoAlpn {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
    Arc::new(config)
}

/// A TLS stream as tonic takes it.
struct Accepted(TlsStream<TcpStream>);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[derive(Clone)]
struct Api {
    ca: Arc<TestCa>,
    course: Arc<Mutex<Course>>,
}

impl Api {
    fn svid(&self, csr: &[u8], token: &str) -> types::X509svid {
        let (given, ttl) = {
            let course = self.course.lock().unwrap();
            (course.given, course.ttl)
        };
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let id = match given {
            Given::OtherTrustDomain => format!("spiffe://other.org/spire/agent/join_token/{token}"),
            Given::NoAgent => "spiffe://example.org/workload".to_owned(),
            _ => format!("spiffe://example.org/spire/agent/join_token/{token}"),
        };
        request.params.subject_alt_names = vec![uri(&id)];
        request.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        #[expect(clippy::disallowed_methods, reason = "a server has a clock of its own")]
        let now = SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(3600)).into();
        request.params.not_after = match given {
            Given::Expired => now - Duration::from_secs(60),
            _ => now + ttl,
        }
        .into();
        if given != Given::Expired && ttl < Duration::from_secs(3600) {
            request.params.not_before = (now - Duration::from_secs(10)).into();
        }
        let certificate = match given {
            Given::OtherKey => self.ca.signed(&id, &KeyPair::generate().unwrap()),
            Given::OtherCa => request.signed_by(&TestCa::new().issuer).unwrap().der().clone(),
            _ => request.signed_by(&self.ca.issuer).unwrap().der().clone(),
        };
        types::X509svid { cert_chain: vec![certificate.to_vec()], ..Default::default() }
    }

    fn denied(&self) -> Result<(), Status> {
        let Some(reason) = self.course.lock().unwrap().denial else { return Ok(()) };
        let detail = types::PermissionDeniedDetails { reason };
        let details = tonic_types::pb::Status {
            code: Code::PermissionDenied.into(),
            message: String::new(),
            details: vec![prost_types::Any {
                type_url: "type.googleapis.com/spire.api.types.PermissionDeniedDetails".to_owned(),
                value: detail.encode_to_vec(),
            }],
        };
        Err(Status::with_details(Code::PermissionDenied, "denied", details.encode_to_vec().into()))
    }
}

#[tonic::async_trait]
impl agent_api::agent_server::Agent for Api {
    type AttestAgentStream = tokio_stream::Once<Result<AttestAgentResponse, Status>>;

    async fn attest_agent(
        &self,
        request: Request<Streaming<AttestAgentRequest>>,
    ) -> Result<Response<Self::AttestAgentStream>, Status> {
        let first = request.into_inner().message().await?.and_then(|it| it.step);
        let Some(attest_agent_request::Step::Params(params)) = first else {
            return Err(Status::invalid_argument("no parameters"));
        };
        let data = params.data.unwrap();
        let with_token = data.r#type == "join_token";
        let token = if with_token { String::from_utf8(data.payload).unwrap() } else { data.r#type };
        if self.course.lock().unwrap().banned {
            return Err(Status::permission_denied("failed to attest: agent is banned"));
        }
        if with_token && !self.course.lock().unwrap().tokens.remove(&token) {
            let text = "failed to attest: join token does not exist or has already been used";
            return Err(Status::invalid_argument(text));
        }
        let svid = self.svid(&params.params.unwrap().csr, &token);
        let mut course = self.course.lock().unwrap();
        course.attested += 1;
        let result = attest_agent_response::Result { svid: Some(svid), reattestable: course.reattestable };
        let step = Some(attest_agent_response::Step::Result(result));
        Ok(Response::new(tokio_stream::once(Ok(AttestAgentResponse { step }))))
    }

    async fn renew_agent(
        &self,
        request: Request<RenewAgentRequest>,
    ) -> Result<Response<RenewAgentResponse>, Status> {
        self.denied()?;
        let svid = self.svid(&request.into_inner().params.unwrap().csr, "renewed");
        self.course.lock().unwrap().renewed += 1;
        Ok(Response::new(RenewAgentResponse { svid: Some(svid) }))
    }

    async fn post_status(
        &self,
        _: Request<PostStatusRequest>,
    ) -> Result<Response<PostStatusResponse>, Status> {
        self.denied()?;
        Ok(Response::new(PostStatusResponse {}))
    }
}

#[tonic::async_trait]
impl bundle_api::bundle_server::Bundle for Api {
    async fn get_bundle(&self, _: Request<GetBundleRequest>) -> Result<Response<types::Bundle>, Status> {
        {
            let mut course = self.course.lock().unwrap();
            if course.bundles_fail > 0 {
                course.bundles_fail -= 1;
                return Err(Status::internal("no bundle"));
            }
        }
        Ok(Response::new(types::Bundle {
            trust_domain: "example.org".to_owned(),
            x509_authorities: vec![types::X509Certificate { asn1: self.ca.der.to_vec(), tainted: false }],
            ..Default::default()
        }))
    }

    async fn get_federated_bundle(
        &self,
        request: Request<GetFederatedBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        let trust_domain = request.into_inner().trust_domain;
        self.course.lock().unwrap().federated.insert(trust_domain.clone());
        // What another trust domain says of itself.
        let mib = match trust_domain.as_str() {
            "good.org" => 0,
            "large.org" => 2,
            "huge.org" => 20,
            _ => return Err(Status::not_found("no such bundle")),
        };
        let padding = types::JwtKey { key_id: "x".repeat(mib << 20), ..Default::default() };
        Ok(Response::new(types::Bundle {
            trust_domain,
            x509_authorities: vec![types::X509Certificate { asn1: self.ca.der.to_vec(), tainted: false }],
            jwt_authorities: vec![padding],
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl entry_api::entry_server::Entry for Api {
    type SyncAuthorizedEntriesStream =
        tokio_stream::wrappers::ReceiverStream<Result<SyncAuthorizedEntriesResponse, Status>>;

    async fn get_authorized_entries(
        &self,
        _: Request<GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        self.denied()?;
        let mut course = self.course.lock().unwrap();
        course.syncs += 1;
        Ok(Response::new(GetAuthorizedEntriesResponse { entries: course.entries.clone() }))
    }

    async fn sync_authorized_entries(
        &self,
        _: Request<Streaming<SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        self.denied()?;
        let (manner, entries) = {
            let mut course = self.course.lock().unwrap();
            course.syncs += 1;
            (course.manner, course.entries.clone())
        };
        let (sender, answers) = tokio::sync::mpsc::channel(1);
        drop(tokio::spawn(async move {
            match manner {
                Manner::Silent => sender.closed().await,
                Manner::Right => {
                    let all = SyncAuthorizedEntriesResponse { entries, ..Default::default() };
                    drop(sender.send(Ok(all)).await);
                }
                Manner::Endless => {
                    for number in 0.. {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        let revision =
                            EntryRevision { id: format!("{number}"), revision_number: 1, created_at: 1 };
                        let page = SyncAuthorizedEntriesResponse {
                            entry_revisions: vec![revision],
                            more: true,
                            ..Default::default()
                        };
                        if sender.send(Ok(page)).await.is_err() {
                            break;
                        }
                    }
                }
                Manner::Huge => {
                    let entry = types::Entry { hint: "x".repeat(100 << 20), ..Default::default() };
                    let all = SyncAuthorizedEntriesResponse { entries: vec![entry], ..Default::default() };
                    drop(sender.send(Ok(all)).await);
                }
            }
        }));
        Ok(Response::new(tokio_stream::wrappers::ReceiverStream::new(answers)))
    }
}

impl Api {
    fn entry(&self, id: &str) -> Result<types::Spiffeid, Status> {
        let course = self.course.lock().unwrap();
        let found = course.entries.iter().find(|entry| entry.id == id);
        found
            .and_then(|entry| entry.spiffe_id.clone())
            .ok_or_else(|| Status::not_found("entry not found or not authorized"))
    }
}

#[tonic::async_trait]
impl svid_api::svid_server::Svid for Api {
    async fn batch_new_x509svid(
        &self,
        request: Request<BatchNewX509svidRequest>,
    ) -> Result<Response<BatchNewX509svidResponse>, Status> {
        self.denied()?;
        {
            let mut course = self.course.lock().unwrap();
            if course.signs_nothing {
                course.asked_in_vain += 1;
                return Err(Status::unavailable("the key is away"));
            }
        }
        let sign = |params: &durward::issuer::server::proto::svid::NewX509svidParams| {
            let id = match self.entry(&params.entry_id) {
                Ok(id) => id,
                Err(error) => {
                    let status =
                        types::Status { code: error.code().into(), message: error.message().to_owned() };
                    return batch_new_x509svid_response::Result { status: Some(status), svid: None };
                }
            };
            let mut request =
                CertificateSigningRequestParams::from_der(&params.csr.as_slice().into()).unwrap();
            request.params.subject_alt_names = vec![uri(&format!("spiffe://{}{}", id.trust_domain, id.path))];
            request.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let mut chain = vec![request.signed_by(&self.ca.issuer).unwrap().der().to_vec()];
            if id.path.starts_with("/long") {
                chain.resize(self.course.lock().unwrap().chain, self.ca.der.to_vec());
            }
            let svid = types::X509svid { cert_chain: chain, id: Some(id), ..Default::default() };
            batch_new_x509svid_response::Result { status: Some(types::Status::default()), svid: Some(svid) }
        };
        let results = request.into_inner().params.iter().map(sign).collect();
        Ok(Response::new(BatchNewX509svidResponse { results }))
    }

    async fn new_jwtsvid(
        &self,
        request: Request<NewJwtsvidRequest>,
    ) -> Result<Response<NewJwtsvidResponse>, Status> {
        let NewJwtsvidRequest { entry_id, audience } = request.into_inner();
        let id = self.entry(&entry_id)?;
        {
            let mut course = self.course.lock().unwrap();
            course.signing += 1;
            course.most_signing = course.most_signing.max(course.signing);
        }
        tokio::time::sleep(SIGNS_WITHIN).await;
        let mut course = self.course.lock().unwrap();
        course.signing -= 1;
        course.signed += 1;
        #[expect(clippy::disallowed_methods, reason = "a server has a clock of its own")]
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let issued_at = i64::try_from(now.as_secs()).unwrap();
        let sub = format!("spiffe://{}{}", id.trust_domain, id.path);
        let claims = serde_json::json!({ "sub": sub, "aud": audience, "exp": issued_at + 300 }).to_string();
        // Whoever validates it looks at the signature, and nobody does here.
        let token = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        let svid = types::Jwtsvid {
            token,
            id: Some(id),
            issued_at,
            expires_at: issued_at + 300,
            hint: String::new(),
        };
        Ok(Response::new(NewJwtsvidResponse { svid: Some(svid) }))
    }
}

/// How long it takes to sign a token.
const SIGNS_WITHIN: Duration = Duration::from_millis(20);

/// An entry for the user that runs the test.
pub(crate) fn entry(name: &str) -> types::Entry {
    entry_of(name, nix::unistd::geteuid().as_raw())
}

/// An entry for this user.
pub(crate) fn entry_of(name: &str, uid: u32) -> types::Entry {
    types::Entry {
        id: name.to_owned(),
        spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".to_owned(), path: format!("/{name}") }),
        selectors: vec![types::Selector { r#type: "unix".to_owned(), value: format!("uid:{uid}") }],
        revision_number: 1,
        created_at: 1,
        ..Default::default()
    }
}
