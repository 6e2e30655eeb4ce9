//! A bundle from a URL: of the web, or of who listens at a Unix socket.

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use http::{StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    client::conn::http1,
    rt::{Read, Write},
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{MAX_LEN, SlowReads};

/// How many addresses of a host are tried, and how long each may take.
const MOST_ADDRESSES: usize = 4;
const LONGEST_TRY: Duration = Duration::from_secs(5);

/// How often a server may send to another place.
const MOST_REDIRECTS: usize = 5;

/// From whoever listens at `socket`.
pub(super) async fn over_socket(url: &str, socket: &Path) -> Result<Vec<u8>, String> {
    let url: Uri = url.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    let stream = UnixStream::connect(socket).await.map_err(|error| error.to_string())?;
    match download(&url, stream).await? {
        Downloaded::Bundle(text) => Ok(text),
        Downloaded::Elsewhere(status, _) => Err(refused(status)),
    }
}

/// From a server of the web, for whose name an authority of the system vouches. Where it sends to another place, that is
/// asked, over TLS alone.
pub(super) async fn over_tls(url: &str, slow: &SlowReads) -> Result<Vec<u8>, String> {
    let tls = slow.wait("the system's certificate authorities", system_roots).await?;
    let mut url: Uri = url.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    for _ in 0..=MOST_REDIRECTS {
        let host = url.host().ok_or("the URL names no host")?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|error| error.to_string())?;
        let stream = connect(host, url.port_u16().unwrap_or(443), slow).await?;
        let stream = TlsConnector::from(Arc::clone(&tls)).connect(name, stream).await;
        let stream = stream.map_err(|error| format!("TLS fails: {error}"))?;
        match download(&url, stream).await? {
            Downloaded::Bundle(text) => return Ok(text),
            Downloaded::Elsewhere(status, place) => {
                url = elsewhere(&url, &place).ok_or_else(|| refused(status))?;
            }
        }
    }
    Err(format!("it redirects more than {MOST_REDIRECTS} times"))
}

/// TLS by the certificates that the system trusts, where OpenSSL would look for them. Reads files.
fn system_roots() -> Result<Arc<ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (taken, _malformed) = roots.add_parsable_certificates(found.certs);
    if taken == 0 {
        let why = found.errors.first().map_or_else(|| "none were found".to_owned(), ToString::to_string);
        return Err(format!("cannot read the system's certificate authorities: {why}"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

async fn connect(host: String, port: u16, slow: &SlowReads) -> Result<TcpStream, String> {
    let what = format!("the name server, for {host}");
    let looked_up = slow.wait(&what, move || {
        let found = (host.as_str(), port).to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        Ok(found.take(MOST_ADDRESSES).collect::<Vec<SocketAddr>>())
    });
    let mut failed = "the host has no address".to_owned();
    for address in looked_up.await? {
        match timeout(LONGEST_TRY, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = format!("{address}: {error}"),
            Err(_late) => failed = format!("{address} does not answer"),
        }
    }
    Err(failed)
}

/// What a server gives.
enum Downloaded {
    Bundle(Vec<u8>),
    Elsewhere(StatusCode, String),
}

async fn download<S>(url: &Uri, stream: S) -> Result<Downloaded, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    TokioIo<S>: Read + Write,
{
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // Ends with the sender.
    drop(tokio::spawn(connection));
    let path = url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let request = http::Request::get(path)
        .header(header::HOST, url.authority().map_or("localhost", http::uri::Authority::as_str))
        .header(header::USER_AGENT, concat!("durward/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    if status.is_redirection() {
        let place = response.headers().get(header::LOCATION).and_then(|place| place.to_str().ok());
        return Ok(Downloaded::Elsewhere(status, place.unwrap_or_default().to_owned()));
    }
    if status != StatusCode::OK {
        return Err(refused(status));
    }
    let body = Limited::new(response.into_body(), MAX_LEN).collect().await;
    Ok(Downloaded::Bundle(body.map_err(|error| error.to_string())?.to_bytes().to_vec()))
}

fn refused(status: StatusCode) -> String {
    format!("error downloading trust bundle: {status}")
}

/// Where a server sends to, if that is a place of the web over TLS.
fn elsewhere(from: &Uri, place: &str) -> Option<Uri> {
    let to: Uri = if place.starts_with('/') && !place.starts_with("//") {
        format!("https://{}{place}", from.authority()?).parse().ok()?
    } else {
        place.parse().ok()?
    };
    (to.scheme_str() == Some("https") && to.host().is_some()).then_some(to)
}
