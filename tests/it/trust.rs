//! By what a SPIRE Server is known at first, where that is no file: a URL, a URL over a Unix socket, another Workload API.

use std::sync::{Arc, Mutex};

use durward::{
    api::proto::workload as pb,
    identity::{Bundle, TrustDomain},
    issuer::server::settings::TrustBundleFormat,
    os::clock::Clock,
};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    joining::{directory, has_kept, kept, opened, serving, settings, trouble, until, write_config},
    spire_server::{Face, FakeSpireServer},
    support::Process,
};

/// Reads the head of a request, and answers it with what `answer` makes of its path.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: impl Fn(&str) -> String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap_or_default();
    drop(stream.write_all(answer(path).as_bytes()).await);
    drop(stream.shutdown().await);
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// A server of the web for `localhost`, and the certificate that vouches for it.
async fn web(answers: impl Fn(&str) -> String + Send + Sync + 'static) -> (u16, String) {
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&ca_key).unwrap().pem();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf =
        CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                answer(stream, &answers).await;
            }
        }
    }));
    (port, pem)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_of_the_web_is_believed_where_the_system_vouches_for_the_place() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let bundle = Bundle::parse_pem(&trust_domain, server.ca.pem.as_bytes()).unwrap();
    let json = bundle.to_spiffe_json(None).unwrap();
    let (port, web_ca) = web(move |path| match path {
        "/old" => "HTTP/1.1 302 Found\r\nLocation: /bundle\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "/plain" => {
            "HTTP/1.1 302 Found\r\nLocation: http://localhost/\r\nContent-Length: 0\r\n\r\n".to_owned()
        }
        "/bundle" => ok(&json),
        _ => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
    })
    .await;
    for (path, vouched, want) in [
        ("none", true, "error downloading trust bundle: 404 Not Found"),
        ("plain", true, "error downloading trust bundle: 302 Found"),
        ("bundle", false, "TLS fails"),
        ("old", true, ""),
    ] {
        let dir = directory();
        let more = format!(
            "trust_bundle_url = \"https://localhost:{port}/{path}\"\n trust_bundle_format = \"spiffe\"\n join_token = \"once\""
        );
        write_config(dir.path(), &server, &more);
        let vouches = dir.path().join("web.pem");
        std::fs::write(&vouches, if vouched { &web_ca } else { &server.ca.pem }).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
        command.arg("run").arg("--config").arg(dir.path().join("agent.conf"));
        command.env("SSL_CERT_FILE", vouches).env_remove("SSL_CERT_DIR");
        let log = dir.path().join("log");
        let _agent = Process::of(command, &log);
        let said = || std::fs::read_to_string(&log).unwrap();
        if want.is_empty() {
            until("attested", || kept(dir.path()).contains("\"svid\":[")).await;
        } else {
            until(path, || said().contains(want)).await;
            assert!(!has_kept(dir.path()), "{path}");
            until("counted", || kept(dir.path()).contains("\"connection_attempts\":2")).await;
        }
    }
    assert_eq!(server.course().attested, 1);
}

#[tokio::test]
async fn who_listens_at_a_socket_is_told_why_it_is_asked() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let socket = dir.path().join("bundles.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let asked = Arc::new(Mutex::new(String::new()));
    let (pem, heard) = (server.ca.pem.clone(), Arc::clone(&asked));
    let answering = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            answer(stream, |path| {
                path.clone_into(&mut heard.lock().unwrap());
                ok(&pem)
            })
            .await;
        }
    });
    let mut settings = settings(dir.path(), server.address.port(), "", "once");
    settings.join.trust_bundle_path = None;
    settings.join.trust_bundle_url = Some("http://localhost/bundle?x=1".to_owned());
    settings.join.trust_bundle_unix_socket = Some(socket);
    settings.join.trust_bundle_format = TrustBundleFormat::Pem;
    let own = opened(settings, Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    assert!(serving(&own).await.ends_with("/once"));
    let asked = asked.lock().unwrap().clone();
    for part in
        ["/bundle?x=1&", "spiffe-trust-domain=example.org", "spire-attest-mode=bootstrap", "attempts=1&"]
    {
        assert!(asked.contains(part), "{asked}");
    }
    assert!(!asked.contains("0001-01-01"), "{asked}");
    assert!(kept(dir.path()).contains("\"connection_attempts\":0"), "it has begun");
    running.abort();
    answering.abort();
}

/// Another agent of this node: it answers each call with this message, to which a client has said that it is one.
async fn other_agent(listener: UnixListener, message: Vec<u8>) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509Bundles");
            assert_eq!(request.headers()["workload.spiffe.io"], "true");
            let head = http::Response::builder().header("content-type", "application/grpc");
            let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
            let len = u32::try_from(message.len()).unwrap();
            let framed = [&[0], len.to_be_bytes().as_slice(), &message].concat();
            body.send_data(framed.into(), false).unwrap();
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            body.send_trailers(trailers).unwrap();
        }
    }
}

#[tokio::test]
async fn another_agents_bundle_of_this_trust_domain_is_believed_and_no_other() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let der = Bundle::parse_pem(&trust_domain, server.ca.pem.as_bytes()).unwrap().x509_der();
    for (id, want) in
        [("spiffe://other.org", "it returns no bundle of example.org"), ("spiffe://example.org", "")]
    {
        let dir = directory();
        let socket = dir.path().join("other.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let bundles = [(id.to_owned(), der.clone())].into();
        let message = pb::X509BundlesResponse { bundles, ..Default::default() }.encode_to_vec();
        let serving_other = tokio::spawn(other_agent(listener, message));
        let mut settings = settings(dir.path(), server.address.port(), "", "once");
        settings.join.trust_bundle_path = None;
        settings.join.trust_bundle_workload_api = Some(socket);
        let own = opened(settings, Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        if want.is_empty() {
            assert!(serving(&own).await.ends_with("/once"));
        } else {
            let why = trouble(&own).await;
            assert!(why.contains(want), "{why}");
        }
        running.abort();
        serving_other.abort();
    }
}
