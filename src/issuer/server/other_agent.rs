//! The Workload API of another agent of this node, of which this one takes an SVID or a bundle.
//!
//! Whoever listens at its socket is believed, as with any other client of it; but not with this agent's memory or time.

use std::{collections::HashMap, path::Path, time::Duration};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tonic::{
    Request, Status,
    client::Grpc,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use zeroize::Zeroizing;

use super::{bundles::apart, error::shown};
use crate::identity::{Bundle, TrustDomain};

/// The longest that it may take.
const LONGEST_CALL: Duration = Duration::from_secs(20);

/// The largest answer, in bytes.
const LONGEST_ANSWER: usize = 4 << 20;

/// An SVID of this node at the other agent.
pub(super) struct TakenSvid {
    /// DER, the leaf first.
    pub(super) chain: Vec<Vec<u8>>,
    /// PKCS#8 DER.
    pub(super) key: Zeroizing<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AskedOther {}

#[derive(Clone, PartialEq, prost::Message)]
struct SvidsAnswer {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<SvidAnswer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SvidAnswer {
    #[prost(bytes = "vec", tag = "2")]
    chain: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct BundlesAnswer {
    #[prost(map = "string, bytes", tag = "2")]
    bundles: HashMap<String, Vec<u8>>,
}

/// The default SVID: the first.
///
/// # Errors
/// Why there is none, in words.
pub(super) async fn svid(socket: &Path) -> Result<TakenSvid, String> {
    let answer: SvidsAnswer = ask(socket, "/SpiffeWorkloadAPI/FetchX509SVID").await?;
    let mut svids = answer.svids.into_iter();
    let first = svids.next();
    // The others' keys are none of this agent's business.
    svids.for_each(|other| drop(Zeroizing::new(other.key)));
    let SvidAnswer { chain, key } = first.ok_or("it returns no SVID")?;
    Ok(TakenSvid { chain: apart(&chain), key: Zeroizing::new(key) })
}

/// The authorities of a trust domain, DER.
///
/// # Errors
/// Why there are none, in words.
pub(super) async fn roots(socket: &Path, trust_domain: &TrustDomain) -> Result<Vec<Vec<u8>>, String> {
    let answer: BundlesAnswer = ask(socket, "/SpiffeWorkloadAPI/FetchX509Bundles").await?;
    let of_domain = |id: &str| TrustDomain::parse(id).is_ok_and(|found| found == *trust_domain);
    let bundle = answer.bundles.into_iter().find(|(id, _)| of_domain(id));
    let (_, der) = bundle.ok_or_else(|| format!("it returns no bundle of {trust_domain}"))?;
    let bundle = Bundle::of_authorities(trust_domain, apart(&der), []).map_err(|error| error.to_string())?;
    Ok(bundle.x509_authorities)
}

async fn ask<T: prost::Message + Default + 'static>(socket: &Path, path: &'static str) -> Result<T, String> {
    let late = || format!("no answer after {} s", LONGEST_CALL.as_secs());
    timeout(LONGEST_CALL, first_answer(socket, path)).await.unwrap_or_else(|_late| Err(late()))
}

async fn first_answer<T: prost::Message + Default + 'static>(
    socket: &Path,
    path: &'static str,
) -> Result<T, String> {
    let refused = |status: Status| format!("{:?}: {}", status.code(), shown(status.message()));
    let mut grpc = Grpc::new(connect(socket).await?).max_decoding_message_size(LONGEST_ANSWER);
    grpc.ready().await.map_err(|error| error.to_string())?;
    let mut request = Request::new(AskedOther {});
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let codec = tonic_prost::ProstCodec::<AskedOther, T>::default();
    let answers = grpc.server_streaming(request, PathAndQuery::from_static(path), codec).await;
    let answer = answers.map_err(refused)?.into_inner().message().await.map_err(refused)?;
    answer.ok_or_else(|| "it ends without an answer".to_owned())
}

async fn connect(socket: &Path) -> Result<Channel, String> {
    let stream = UnixStream::connect(socket).await.map_err(|error| error.to_string())?;
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: http::Uri| {
        let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
        std::future::ready(stream.take().ok_or_else(gone))
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connector).await.map_err(|error| error.to_string())
}
