//! One X.509-SVID that a SPIRE Server is asked for: the key that never leaves this node, the request for it, and what the
//! answer must be to be used.

use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, DistinguishedName, DnType, DnValue, SanType,
    string::{Ia5String, PrintableString},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

use super::intermediates::Intermediates;
use crate::{
    identity::{Bundle, KeyType, SpiffeId, X509Svid},
    issuer::keys::{KeyFault, KeyPair, SignatureForm},
};

/// The most certificates of a chain.
const LONGEST_CHAIN: usize = 16;

/// The most bytes of one.
const LARGEST_CHAIN: usize = 64 << 10;

/// Why an answered chain is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainFault {
    /// There is none, or it is too long.
    #[error("the chain must have 1 to {LONGEST_CHAIN} certificates, of {LARGEST_CHAIN} bytes at most")]
    Length,
    /// A certificate that is none.
    #[error("the chain holds something that is not a certificate")]
    NoCertificate,
    /// It is for the key of somebody else.
    #[error("the certificate is for another key")]
    OtherKey,
    /// It names somebody else, or more than one.
    #[error("the certificate names another spiffe id")]
    OtherId,
    /// It has ended.
    #[error("the certificate has expired")]
    Expired,
    /// The bundle does not verify it. It may be that the bundle is not the newest.
    #[error("the bundle does not verify the chain: {0}")]
    Untrusted(&'static str),
}

/// A key, and for whom it is.
pub(super) struct SvidRequest {
    key: KeyPair,
    spiffe_id: SpiffeId,
    csr: Vec<u8>,
}

impl SvidRequest {
    /// Makes a key and a request for it. With RSA it takes about a tenth of a second of one core.
    ///
    /// # Errors
    /// [`KeyFault`] of the cryptographic library.
    pub(super) fn new(spiffe_id: &SpiffeId, key_type: KeyType) -> Result<Self, KeyFault> {
        let key = KeyPair::generate(key_type, SignatureForm::Certificate)?;
        let csr =
            csr(spiffe_id, &key).map_err(|_unsaid| KeyFault::new("put a certificate request together"))?;
        Ok(Self { key, spiffe_id: spiffe_id.clone(), csr })
    }

    /// The request, DER.
    pub(super) fn csr(&self) -> &[u8] {
        &self.csr
    }

    /// The SVID, if this chain (DER, the leaf first) makes one of it: for this key and this identity alone, valid, and
    /// verified by `bundle` as a peer of the workload would.
    ///
    /// # Errors
    /// [`ChainFault`]: the chain is not used.
    pub(super) fn answered(
        &self,
        chain: &[Vec<u8>],
        bundle: &Bundle,
        intermediates: &Intermediates,
        now: SystemTime,
    ) -> Result<Result<X509Svid, KeyFault>, ChainFault> {
        let [leaf, ..] = chain else { return Err(ChainFault::Length) };
        if chain.len() > LONGEST_CHAIN || chain.iter().map(Vec::len).sum::<usize>() > LARGEST_CHAIN {
            return Err(ChainFault::Length);
        }
        let ([], leaf) =
            x509_parser::parse_x509_certificate(leaf).map_err(|_unsaid| ChainFault::NoCertificate)?
        else {
            return Err(ChainFault::NoCertificate);
        };
        if leaf.public_key().subject_public_key.data != self.key.public_key() {
            return Err(ChainFault::OtherKey);
        }
        if only_uri(&leaf) != Some(self.spiffe_id.as_str()) {
            return Err(ChainFault::OtherId);
        }
        let at = |moment: x509_parser::time::ASN1Time| {
            let seconds = u64::try_from(moment.timestamp()).unwrap_or(0);
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        };
        let (not_before, not_after) = (at(leaf.validity().not_before), at(leaf.validity().not_after));
        if not_after <= now {
            return Err(ChainFault::Expired);
        }
        verify(chain, bundle, now.max(not_before))?;
        Ok(self.key.pkcs8().map(|key| X509Svid {
            spiffe_id: self.spiffe_id.clone(),
            chain: intermediates.shared_by(chain),
            key,
            not_before,
            not_after,
        }))
    }
}

fn csr(spiffe_id: &SpiffeId, key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    let printable = |text| PrintableString::try_from(text).map(DnValue::PrintableString);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CountryName, printable("US")?);
    params.distinguished_name.push(DnType::OrganizationName, printable("SPIRE")?);
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(spiffe_id.as_str())?)];
    Ok(params.serialize_request(key)?.der().to_vec())
}

/// The one URI that a certificate names.
fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let names = &certificate.subject_alternative_name().ok()??.value.general_names;
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let only = uris.next()?;
    uris.next().is_none().then_some(only)
}

/// Verifies a chain to an authority of `bundle`.
fn verify(chain: &[Vec<u8>], bundle: &Bundle, now: SystemTime) -> Result<(), ChainFault> {
    let roots: Vec<CertificateDer<'_>> =
        bundle.x509_authorities.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let anchors: Vec<_> = roots.iter().filter_map(|root| anchor_from_trusted_cert(root).ok()).collect();
    let certificates: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let Some((leaf, intermediates)) = certificates.split_first() else { return Err(ChainFault::Length) };
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let leaf = EndEntityCert::try_from(leaf).map_err(|_unsaid| ChainFault::NoCertificate)?;
    leaf.verify_for_usage(
        ALL_VERIFICATION_ALGS,
        &anchors,
        intermediates,
        UnixTime::since_unix_epoch(since_1970),
        KeyUsage::client_auth(),
        None,
        None,
    )
    .map(drop)
    .map_err(|error| {
        ChainFault::Untrusted(match error {
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                "no authority of it signed it"
            }
            webpki::Error::CertExpired { .. } => "an authority in it has expired",
            webpki::Error::CertNotValidYet { .. } => "an authority in it is not valid yet",
            webpki::Error::CaUsedAsEndEntity => "it is a CA's",
            _ => "it is not a valid chain",
        })
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateSigningRequestParams, IsCa, Issuer};
    use time::OffsetDateTime;

    use super::*;
    use crate::identity::TrustDomain;

    type Signer = Issuer<'static, rcgen::KeyPair>;

    fn ca() -> (Vec<u8>, Signer) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        (der, Issuer::new(params, key))
    }

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()
    }

    /// What a server makes of the request, once `spoil` was at it.
    fn sign(request: &SvidRequest, signer: &Signer, spoil: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut asked = CertificateSigningRequestParams::from_der(&request.csr().into()).unwrap();
        asked.params.not_before = at(900_000_000);
        asked.params.not_after = at(1_100_000_000);
        spoil(&mut asked.params);
        asked.signed_by(signer).unwrap().der().to_vec()
    }

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(seconds).unwrap()
    }

    #[test]
    fn only_what_was_asked_for_is_taken() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let td = TrustDomain::parse("td").unwrap();
        let ((root, signer), (_, stranger)) = (ca(), ca());
        let bundle = Bundle::of_authorities(&td, [root], []).unwrap();
        let above = Intermediates::default();
        let uri = |text: &str| SanType::URI(Ia5String::try_from(text).unwrap());
        for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
            let request = SvidRequest::new(&id("web"), key_type).unwrap();
            let leaf = sign(&request, &signer, |_| {});
            let svid = request.answered(&[leaf], &bundle, &above, now).unwrap().unwrap();
            assert_eq!(svid.spiffe_id, id("web"));
            assert_eq!(svid.not_after, now + Duration::from_secs(100_000_000));
            assert_eq!(svid.not_before, now - Duration::from_secs(100_000_000));
        }
        let request = SvidRequest::new(&id("web"), KeyType::EcP256).unwrap();
        let other = SvidRequest::new(&id("web"), KeyType::EcP256).unwrap();
        let with_uris = |uris: &[&str]| {
            sign(&request, &signer, |params| {
                params.subject_alt_names = uris.iter().map(|it| uri(it)).collect()
            })
        };
        let untrusted = ChainFault::Untrusted("no authority of it signed it");
        for (case, chain, want) in [
            ("nothing", vec![], ChainFault::Length),
            ("too long", vec![Vec::new(); LONGEST_CHAIN + 1], ChainFault::Length),
            ("no certificate", vec![b"none".to_vec()], ChainFault::NoCertificate),
            ("another key", vec![sign(&other, &signer, |_| {})], ChainFault::OtherKey),
            ("another id", vec![with_uris(&["spiffe://td/db"])], ChainFault::OtherId),
            ("two ids", vec![with_uris(&["spiffe://td/web", "spiffe://td/db"])], ChainFault::OtherId),
            ("no id", vec![with_uris(&[])], ChainFault::OtherId),
            (
                "expired",
                vec![sign(&request, &signer, |it| it.not_after = at(1_000_000_000))],
                ChainFault::Expired,
            ),
            ("a stranger's", vec![sign(&request, &stranger, |_| {})], untrusted),
            (
                "a CA",
                vec![sign(&request, &signer, |it| it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))],
                ChainFault::Untrusted("it is a CA's"),
            ),
        ] {
            assert_eq!(request.answered(&chain, &bundle, &above, now).map(drop), Err(want), "{case}");
        }
    }
}
