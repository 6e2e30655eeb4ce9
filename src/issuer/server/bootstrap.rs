//! What the server is known by at first: while nothing is known of it from before.

mod download;

use std::time::Duration;

use tokio::time::timeout;

use super::{
    error::ServerError,
    other_agent,
    reading::SlowReads,
    settings::{TrustBundleFormat, TrustSource},
    tls::ServerTrust,
};
use crate::identity::{Bundle, TrustDomain, bundle::MAX_LEN};

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
    slow: &SlowReads,
) -> Result<ServerTrust, ServerError> {
    let failed = |place: String| move |fault: String| ServerError::TrustSource { place, fault };
    let fetched = match source {
        TrustSource::Insecure => {
            tracing::warn!("Insecure bootstrap enabled; skipping server certificate verification");
            return Ok(ServerTrust::Anyone);
        }
        TrustSource::File { path, format } => {
            let place = path.display().to_string();
            let most = u64::try_from(MAX_LEN).unwrap_or(u64::MAX);
            let text = slow.file(path, most).await.map_err(failed(place.clone()))?;
            (place, text.to_vec(), format)
        }
        TrustSource::Url { url, socket: Some(socket), format } => {
            let url = with_circumstances(url, trust_domain, told);
            let place = format!("{url} at {}", socket.display());
            let text = in_time(download::over_socket(&url, socket)).await.map_err(failed(place.clone()))?;
            (place, text, format)
        }
        TrustSource::Url { url, socket: None, format } => {
            let text = in_time(download::over_tls(url, slow)).await.map_err(failed(url.to_owned()))?;
            (url.to_owned(), text, format)
        }
        TrustSource::WorkloadApi(socket) => {
            let place = format!("the Workload API at {}", socket.display());
            let roots = other_agent::roots(socket, trust_domain).await.map_err(failed(place))?;
            return Ok(ServerTrust::Roots(roots.into()));
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

async fn in_time<T>(fetch: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let late = || format!("no answer after {} s", LONGEST_FETCH.as_secs());
    timeout(LONGEST_FETCH, fetch).await.unwrap_or_else(|_late| Err(late()))
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
