//! What FetchX509SVID answered, taken apart and verified.
//!
//! Nothing that the agent says is shown before it holds: the chain must lead to the bundle that came with it, the
//! leaf must be an X.509-SVID by the SPIFFE standard (X509-SVID, sections 2 to 4: one URI SAN, no CA, no signing of
//! certificates), it must name the SPIFFE ID of the message, and the private key must be the leaf's. The private key
//! is zeroised on drop and leaves this type only as PEM for a file.

use std::{collections::BTreeMap, time::SystemTime};

use base64::Engine as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, public_key::PublicKey,
};
use zeroize::Zeroizing;

use super::{client::since_epoch, terminal::clean};
use crate::{
    api::proto::workload as pb,
    identity::{SpiffeId, name_constraints, spiffe_id::SpiffeIdError},
};

/// The identities of one answer, verified.
#[derive(Debug)]
pub(super) struct X509Answer {
    /// In the agent's order; the first is the default.
    pub(super) svids: Vec<VerifiedSvid>,
    /// By the ID of the foreign trust domain, as it was sent.
    pub(super) federated: BTreeMap<String, Vec<Certificate>>,
}

/// An X.509-SVID that its bundle verifies.
pub(super) struct VerifiedSvid {
    pub(super) spiffe_id: SpiffeId,
    pub(super) hint: String,
    pub(super) leaf: Certificate,
    pub(super) intermediates: Vec<Certificate>,
    pub(super) bundle: Vec<Certificate>,
    /// PKCS#8 DER.
    key: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for VerifiedSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedSvid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
    }
}

/// A certificate and what is shown of it.
#[derive(Debug)]
pub(super) struct Certificate {
    pub(super) der: Vec<u8>,
    pub(super) not_before: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
    /// `ec-p256`, `rsa-2048`, or what else it is.
    pub(super) key_type: String,
    /// As text, such as `C=US, O=SPIFFE`; not cleaned.
    pub(super) subject: String,
}

/// Why an answer is not shown. The texts are spire-agent's where it has one.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("workload response contains no svids")]
    NoSvids,
    #[error("failed to parse bundle for federated domain {0:?}: {1}")]
    Federated(String, CertificateError),
    #[error("failed to parse svid entry {at} for spiffe id {id:?}: {cause}")]
    Parse { at: usize, id: String, cause: PartError },
    #[error("{id:?} SVID failed verification against bundle: {cause}")]
    Verify { id: String, cause: VerifyError },
}

/// Which part of an SVID cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum PartError {
    #[error("spiffe id: {0}")]
    Id(SpiffeIdError),
    #[error("certificates: {0}")]
    Chain(CertificateError),
    #[error("failed to parse private key: {0}")]
    Key(rustls::Error),
    #[error("the private key does not belong to the certificate")]
    OtherKey,
    #[error("failed to parse trust bundle: {0}")]
    Bundle(CertificateError),
}

/// Why bytes are no certificates.
#[derive(Debug, thiserror::Error)]
pub(super) enum CertificateError {
    #[error("no certificates found")]
    None,
    #[error("certificate #{0} is malformed")]
    Malformed(usize),
}

/// Which rule of the SPIFFE X.509-SVID standard is broken.
#[derive(Debug, thiserror::Error)]
pub(super) enum VerifyError {
    #[error("leaf certificate: {0}")]
    Leaf(&'static str),
    #[error("leaf certificate names {0:?}")]
    OtherId(String),
    #[error("{0}")]
    Path(webpki::Error),
    /// Of a chain that webpki does not follow.
    #[error("{}: {why}", clean(subject))]
    Limited { subject: String, why: String },
}

impl X509Answer {
    /// Takes `response` apart and verifies every SVID in it.
    ///
    /// # Errors
    /// The first thing that does not hold: then nothing of the answer is used.
    pub(super) fn verify(response: pb::X509svidResponse, now: SystemTime) -> Result<Self, AnswerError> {
        if response.svids.is_empty() {
            return Err(AnswerError::NoSvids);
        }
        let federated = response
            .federated_bundles
            .into_iter()
            .map(|(id, der)| match certificates(&der) {
                Ok(bundle) => Ok((id, bundle)),
                Err(err) => Err(AnswerError::Federated(id, err)),
            })
            .collect::<Result<_, _>>()?;
        let svids = response
            .svids
            .into_iter()
            .enumerate()
            .map(|(at, svid)| {
                let id = svid.spiffe_id.clone();
                let svid = VerifiedSvid::parse(svid).map_err(|cause| AnswerError::Parse {
                    at,
                    id: id.clone(),
                    cause,
                })?;
                svid.check(now).map_err(|cause| AnswerError::Verify { id, cause })?;
                Ok(svid)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { svids, federated })
    }
}

impl VerifiedSvid {
    fn parse(svid: pb::X509svid) -> Result<Self, PartError> {
        let key = Zeroizing::new(svid.x509_svid_key);
        let spiffe_id = SpiffeId::parse(&svid.spiffe_id).map_err(PartError::Id)?;
        let mut chain = certificates(&svid.x509_svid).map_err(PartError::Chain)?.into_iter();
        let leaf = chain.next().ok_or(PartError::Chain(CertificateError::None))?;
        let bundle = certificates(&svid.bundle).map_err(PartError::Bundle)?;

        let pkcs8 = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.as_slice()));
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&pkcs8).map_err(PartError::Key)?;
        let ours = signer.public_key();
        if ours.as_deref() != leaf.parsed(|cert| cert.public_key().raw.to_vec()).as_deref() {
            return Err(PartError::OtherKey);
        }
        Ok(Self { spiffe_id, hint: svid.hint, leaf, intermediates: chain.collect(), bundle, key })
    }

    /// The rules for a leaf first, as go-spiffe has them, then the path to the bundle.
    fn check(&self, now: SystemTime) -> Result<(), VerifyError> {
        self.leaf
            .parsed(|cert| check_leaf(cert, &self.spiffe_id))
            .unwrap_or(Err(VerifyError::Leaf("malformed")))?;

        let roots: Vec<CertificateDer<'_>> = self.bundle.iter().map(Certificate::as_der).collect();
        let anchors = roots
            .iter()
            .map(webpki::anchor_from_trusted_cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(VerifyError::Path)?;
        let intermediates: Vec<CertificateDer<'_>> =
            self.intermediates.iter().map(Certificate::as_der).collect();
        let der = self.leaf.as_der();
        let leaf = webpki::EndEntityCert::try_from(&der).map_err(VerifyError::Path)?;
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &intermediates,
            UnixTime::since_unix_epoch(since_epoch(now)),
            webpki::KeyUsage::client_auth(),
            None,
            None,
        )
        .map(drop)
        .or_else(|error| match error {
            // webpki refuses every chain with constraints on URIs, right or wrong.
            webpki::Error::NameConstraintViolation => self.check_limited(error, now),
            error => Err(VerifyError::Path(error)),
        })
    }

    /// The path to the bundle below constraints on URIs: one certificate after the other, as it was sent.
    fn check_limited(&self, error: webpki::Error, now: SystemTime) -> Result<(), VerifyError> {
        let sent = std::iter::once(&self.leaf).chain(&self.intermediates);
        let mut chain: Vec<_> = sent.filter_map(Certificate::parse).collect();
        let roots: Vec<_> = self.bundle.iter().filter_map(Certificate::parse).collect();
        let signs = |below: &X509Certificate<'_>, above: &X509Certificate<'_>| {
            below.issuer().as_raw() == above.subject().as_raw()
                && name_constraints::is_signed_by(below, above)
        };
        let Some(root) = roots.into_iter().find(|root| chain.last().is_some_and(|last| signs(last, root)))
        else {
            return Err(VerifyError::Path(webpki::Error::UnknownIssuer));
        };
        chain.push(root);
        if !name_constraints::are_on_uris(&chain) {
            return Err(VerifyError::Path(error));
        }
        let now = OffsetDateTime::from(now);
        for (at, certificate) in chain.iter().enumerate() {
            let wrong =
                |why: String| Err(VerifyError::Limited { subject: certificate.subject().to_string(), why });
            let validity = certificate.validity();
            if now < validity.not_before.to_datetime() || now > validity.not_after.to_datetime() {
                return wrong("is not valid now".to_owned());
            }
            if let Some(oid) = name_constraints::unread_extension(certificate) {
                return wrong(format!("has the critical extension {oid}, which is not known"));
            }
            if chain.get(at + 1).is_some_and(|above| !signs(certificate, above)) {
                return wrong("was not signed by the certificate that follows it".to_owned());
            }
            let Some(below) = at.checked_sub(1) else { continue };
            let constraints = certificate.basic_constraints().ok().flatten().map(|extension| extension.value);
            let allowed = constraints.filter(|it| it.ca).map(|it| it.path_len_constraint);
            if !allowed.is_some_and(|most| {
                most.is_none_or(|most| below <= usize::try_from(most).unwrap_or(usize::MAX))
            }) {
                return wrong("may not have issued the certificate before it".to_owned());
            }
            if let Err(found) = name_constraints::permit(certificate, &self.spiffe_id.trust_domain()) {
                return wrong(format!("has the name constraint {found}"));
            }
        }
        Ok(())
    }

    /// The chain as PEM: the leaf, then intermediates.
    pub(super) fn chain_pem(&self) -> String {
        pem_of(std::iter::once(&self.leaf).chain(&self.intermediates))
    }

    /// The private key as PEM, for a file that its owner alone may read.
    pub(super) fn key_pem(&self) -> Zeroizing<String> {
        pem("PRIVATE KEY", &self.key)
    }
}

/// X509-SVID standard: section 2 (one URI SAN), 4.1 (no CA), 4.3 (key usage), 4.4 (extended key usage).
fn check_leaf(cert: &X509Certificate<'_>, id: &SpiffeId) -> Result<(), VerifyError> {
    let san = cert
        .subject_alternative_name()
        .map_err(|_err| VerifyError::Leaf("malformed subject alternative name"))?;
    let mut uris = san.iter().flat_map(|san| &san.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(VerifyError::Leaf("must hold exactly one URI"));
    };
    if uri != id.as_str() {
        return Err(VerifyError::OtherId(uri.to_owned()));
    }
    if cert.is_ca() {
        return Err(VerifyError::Leaf("must not be a CA"));
    }
    let usage = cert.key_usage().map_err(|_err| VerifyError::Leaf("malformed key usage"))?;
    if let Some(usage) = usage {
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(VerifyError::Leaf("must not be allowed to sign certificates or revocation lists"));
        }
        if !usage.value.digital_signature() {
            return Err(VerifyError::Leaf("must be allowed to make digital signatures"));
        }
    }
    Ok(())
}

impl Certificate {
    fn as_der(&self) -> CertificateDer<'_> {
        CertificateDer::from(self.der.as_slice())
    }

    /// The parsed form; `None` cannot happen, since these bytes were parsed before.
    fn parse(&self) -> Option<X509Certificate<'_>> {
        X509Certificate::from_der(&self.der).ok().map(|(_, cert)| cert)
    }

    /// Runs `read` on the parsed form.
    fn parsed<T>(&self, read: impl FnOnce(&X509Certificate<'_>) -> T) -> Option<T> {
        self.parse().map(|cert| read(&cert))
    }
}

/// Reads certificates that stand one after the other.
fn certificates(der: &[u8]) -> Result<Vec<Certificate>, CertificateError> {
    let mut found = Vec::new();
    let mut rest = der;
    while !rest.is_empty() {
        let malformed = CertificateError::Malformed(found.len());
        let Ok((tail, cert)) = X509Certificate::from_der(rest) else { return Err(malformed) };
        found.push(Certificate {
            der: cert.as_raw().to_vec(),
            not_before: cert.validity().not_before.to_datetime(),
            not_after: cert.validity().not_after.to_datetime(),
            key_type: key_type(&cert),
            subject: cert.subject().to_string(),
        });
        rest = tail;
    }
    if found.is_empty() { Err(CertificateError::None) } else { Ok(found) }
}

/// In SPIRE's words (`workload_x509_svid_key_type`).
fn key_type(cert: &X509Certificate<'_>) -> String {
    match cert.public_key().parsed() {
        Ok(PublicKey::EC(point)) => format!("ec-p{}", point.key_size()),
        Ok(PublicKey::RSA(key)) => format!("rsa-{}", key.key_size()),
        _ => cert.public_key().algorithm.algorithm.to_id_string(),
    }
}

/// Certificates as PEM, one after the other.
pub(super) fn pem_of<'a>(certificates: impl IntoIterator<Item = &'a Certificate>) -> String {
    certificates.into_iter().map(|cert| pem("CERTIFICATE", &cert.der).as_str().to_owned()).collect()
}

/// RFC 7468, with lines of 64 characters. By hand, since the crates for PEM leave copies of the key behind: here every
/// buffer is zeroised.
pub(super) fn pem(label: &str, der: &[u8]) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(der.len() * 3 / 2 + 2 * label.len() + 64));
    out.push_str(&format!("-----BEGIN {label}-----\n"));
    // 48 bytes are 64 characters.
    for line in der.chunks(48) {
        let line = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(line));
        out.push_str(&line);
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    /// The answer for `spiffe://example.org/web`, of a chain that `edit` has changed: the leaf, an intermediate, the root.
    fn answer(edit: impl Fn(&mut [rcgen::CertificateParams; 3])) -> pb::X509svidResponse {
        let hour = Duration::from_secs(3600);
        let params = |name: &str, is_ca| {
            let mut params = rcgen::CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            (params.not_before, params.not_after) = ((now() - hour).into(), (now() + hour).into());
            params.is_ca = is_ca;
            params
        };
        let ca = || rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let mut leaf = params("leaf", rcgen::IsCa::ExplicitNoCa);
        leaf.subject_alt_names = vec![rcgen::SanType::URI("spiffe://example.org/web".try_into().unwrap())];
        let mut all = [leaf, params("below", ca()), params("root", ca())];
        all[2].custom_extensions = vec![permitting("example.org")];
        edit(&mut all);
        let [leaf, below, root] = all;
        let key = || rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertifiedIssuer::self_signed(root, key()).unwrap();
        let below = rcgen::CertifiedIssuer::signed_by(below, key(), &root).unwrap();
        let leaf_key = key();
        let leaf = leaf.signed_by(&leaf_key, &below).unwrap();
        let svid = pb::X509svid {
            spiffe_id: "spiffe://example.org/web".to_owned(),
            x509_svid: [&**leaf.der(), &**below.der()].concat(),
            x509_svid_key: leaf_key.serialize_der(),
            bundle: root.der().to_vec(),
            hint: String::new(),
        };
        pb::X509svidResponse { svids: vec![svid], ..pb::X509svidResponse::default() }
    }

    /// Critical name constraints that permit this URI alone.
    fn permitting(uri: &str) -> rcgen::CustomExtension {
        let uri = uri.as_bytes();
        let length = u8::try_from(uri.len()).unwrap();
        let head = [0x30, length + 6, 0xa0, length + 4, 0x30, length + 2, 0x86, length];
        let mut extension = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 30], [&head, uri].concat());
        extension.set_criticality(true);
        extension
    }

    #[test]
    fn below_constraints_on_uris_the_rest_is_looked_at_all_the_same() {
        type Edit = fn(&mut [rcgen::CertificateParams; 3]);
        let cases: [(&str, Edit, Option<&str>); 7] = [
            ("right", |_| {}, None),
            ("none", |all| all[2].custom_extensions.clear(), None),
            (
                "of another domain",
                |all| all[2].custom_extensions = vec![permitting("example.com")],
                Some("CN=root: has the name constraint permitted URI \"example.com\""),
            ),
            ("expired", |all| all[1].not_after = now().into(), None),
            (
                "expired before",
                |all| all[1].not_after = (now() - Duration::from_secs(1)).into(),
                Some("CertExpired"),
            ),
            ("not a CA", |all| all[1].is_ca = rcgen::IsCa::ExplicitNoCa, Some("EndEntityUsedAsCa")),
            (
                "none below it",
                |all| all[2].is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0)),
                Some("CN=root: may not have issued the certificate before it"),
            ),
        ];
        for (case, edit, want) in cases {
            let verified =
                X509Answer::verify(answer(edit), now()).map(drop).map_err(|error| error.to_string());
            match (verified, want) {
                (Ok(()), None) => {}
                (Err(said), Some(want)) => assert!(said.contains(want), "{case}: {said}"),
                (verified, _) => panic!("{case}: {verified:?}"),
            }
        }
        // Of another root of the same name.
        let mut forged = answer(|_| {});
        forged.svids[0].bundle = answer(|_| {}).svids.remove(0).bundle;
        assert!(X509Answer::verify(forged, now()).is_err());
    }
}
