//! What the server is known by at first: while nothing is known of it from before.

use std::{io::Read as _, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use super::{
    error::ServerError,
    settings::{TrustBundleFormat, TrustSource},
    tls::ServerTrust,
};
use crate::{
    identity::{Bundle, TrustDomain, bundle::MAX_LEN},
    os::trusted::Trust,
};

/// The longest that a source may take.
const LONGEST_FETCH: Duration = Duration::from_secs(30);

/// What a source is told of the reason that it is asked, as spire-agent does over a Unix socket.
#[derive(Clone, Debug)]
pub(super) struct Circumstances {
    /// `bootstrap` or `rebootstrap`.
    pub(super) mode: &'static str,
    /// How often it was tried before.
    pub(super) attempts: i64,
    /// RFC 3339: since when.
    pub(super) since: String,
    pub(super) server_address: String,
    pub(super) server_port: u16,
}

/// Asks a source for the authorities of the trust domain.
///
/// # Errors
/// [`ServerError::TrustSource`]: it is not there, or what it gives is no bundle.
pub(super) async fn trust(
    source: TrustSource<'_>,
    trust_domain: &TrustDomain,
    told: &Circumstances,
) -> Result<ServerTrust, ServerError> {
    let failed = |place: String| move |fault: String| ServerError::TrustSource { place, fault };
    let fetched = match source {
        TrustSource::Insecure => {
            tracing::warn!("Insecure bootstrap enabled; skipping server certificate verification");
            return Ok(ServerTrust::Anyone);
        }
        TrustSource::File { path, format } => {
            let text = in_time(read(path)).await.map_err(failed(path.display().to_string()))?;
            (path.display().to_string(), text, format)
        }
        TrustSource::Url { url, socket: Some(socket), format } => {
            let url = with_circumstances(url, trust_domain, told);
            let place = format!("{url} at {}", socket.display());
            let text = in_time(over_socket(&url, socket)).await.map_err(failed(place.clone()))?;
            (place, text, format)
        }
        TrustSource::Url { url, socket: None, .. } => {
            return Err(failed(url.to_owned())(
                "https:// is not supported yet: use trust_bundle_path".to_owned(),
            ));
        }
        TrustSource::WorkloadApi(path) => {
            let place = path.display().to_string();
            return Err(failed(place)(
                "another Workload API is not supported yet: use trust_bundle_path".to_owned(),
            ));
        }
    };
    let (place, text, format) = fetched;
    let bundle = match format {
        TrustBundleFormat::Pem => Bundle::parse_pem(trust_domain, &text),
        TrustBundleFormat::Spiffe => Bundle::parse_spiffe(trust_domain, &text),
    };
    let bundle = bundle.map_err(|error| failed(place.clone())(error.to_string()))?;
    if bundle.x509_authorities.is_empty() {
        return Err(failed(place)("no certificates found in trust bundle".to_owned()));
    }
    Ok(ServerTrust::Roots(bundle.x509_authorities.into()))
}

async fn in_time(fetch: impl Future<Output = Result<Vec<u8>, String>>) -> Result<Vec<u8>, String> {
    let late = || format!("no answer after {} s", LONGEST_FETCH.as_secs());
    timeout(LONGEST_FETCH, fetch).await.unwrap_or_else(|_late| Err(late()))
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    let path = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || {
        let file = Trust::own().open(&path).map_err(|error| error.to_string())?;
        let most = u64::try_from(MAX_LEN).unwrap_or(u64::MAX);
        let mut text = Vec::new();
        file.take(most + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
        Ok(text)
    });
    reading.await.unwrap_or_else(|_panicked| Err("reading failed".to_owned()))
}

/// The URL with spire-agent's parameters behind those that it has.
fn with_circumstances(url: &str, trust_domain: &TrustDomain, told: &Circumstances) -> String {
    let Circumstances { mode, attempts, since, server_address, server_port } = told;
    let mark = if url.contains('?') { '&' } else { '?' };
    let plain = |text: &str| text.replace(':', "%3A").replace('+', "%2B");
    format!(
        "{url}{mark}spiffe-trust-domain={}&spire-attest-mode={mode}&spire-attest-start-time={}&\
         spire-connection-attempts={attempts}&spire-server-address={}&spire-server-port={server_port}",
        trust_domain.name(),
        plain(since),
        plain(server_address),
    )
}

async fn over_socket(url: &str, socket: &Path) -> Result<Vec<u8>, String> {
    let shown = |error: &dyn std::error::Error| error.to_string();
    let url: http::Uri = url.parse().map_err(|error| http::uri::InvalidUri::to_string(&error))?;
    let stream = UnixStream::connect(socket).await.map_err(|error| shown(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| shown(&error))?;
    drop(tokio::spawn(connection));
    let path = url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let request = http::Request::get(path)
        .header(http::header::HOST, url.authority().map_or("localhost", http::uri::Authority::as_str))
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|error| shown(&error))?;
    let response = sender.send_request(request).await.map_err(|error| shown(&error))?;
    if response.status() != http::StatusCode::OK {
        return Err(format!("error downloading trust bundle: {}", response.status()));
    }
    let body =
        Limited::new(response.into_body(), MAX_LEN).collect().await.map_err(|error| error.to_string())?;
    Ok(body.to_bytes().to_vec())
}
