//! A CA of the admin's: read from two PEM files, checked, and used to sign an intermediate that is made here.
//!
//! The files are read again for each intermediate, so that a renewed CA is taken up at the next rotation without a
//! restart. Everything a verifier would later trip over is looked for here and named: an SVID is signed for trial and
//! verified against the root before an intermediate is used. Only root and the agent's user may be able to change the files.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
};
use zeroize::Zeroize as _;

use super::{IssuerError, SuppliedCaFault, rotation::from_unix};
use crate::{
    identity::{
        TrustDomain,
        name_constraints::{self, DnsConstraints},
        pem::{check_blocks, unread_key},
    },
    issuer::{files, keys::KeyPair},
    os::trusted::Trust,
};

/// The most certificates in the file: the CA that signs, and what is above it.
const MAX_CHAIN: usize = 8;

const MAX_FILE_LEN: u64 = 1024 * 1024;

/// A CA of the admin's, ready to sign.
pub(super) struct SuppliedCa {
    pub(super) key: KeyPair,
    /// Its subject, DER.
    pub(super) subject: Vec<u8>,
    /// Its subject key identifier, if it has one.
    pub(super) key_identifier: Option<Vec<u8>>,
    /// DER, from the CA that signs to the root.
    pub(super) chain: Vec<Vec<u8>>,
    /// Whether it says which URIs may stand below it. webpki would refuse all, so these certificates were looked at here.
    pub(super) limited: bool,
    /// When the first certificate of the chain to expire does.
    pub(super) not_after: SystemTime,
}

impl SuppliedCa {
    /// Reads and checks both files, which may belong to root and the user of `trust`.
    pub(super) fn load(
        cert_path: &Path,
        key_path: &Path,
        trust: Trust,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, IssuerError> {
        let bad_cert = |fault| IssuerError::SuppliedCa { path: cert_path.to_owned(), fault };
        let bad_key = |fault| IssuerError::SuppliedCa { path: key_path.to_owned(), fault };

        let chain = read_certificates(cert_path, trust)?;
        let key = read_key(key_path, trust)?.ok_or_else(|| bad_key(SuppliedCaFault::NoKey))?;
        let parsed = parse(&chain).map_err(bad_cert)?;
        check(&parsed, trust_domain, now).map_err(bad_cert)?;
        let Some(first) = parsed.first() else {
            return Err(bad_cert(SuppliedCaFault::NoCertificate));
        };
        let limited = name_constraints::are_on_uris(&parsed);
        if limited {
            check_signatures(&parsed).map_err(bad_cert)?;
        }
        if first.public_key().subject_public_key.data != key.public_key() {
            return Err(bad_key(SuppliedCaFault::KeyMismatch));
        }
        let subject = first.subject().as_raw().to_vec();
        let key_identifier =
            first.iter_extensions().find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(identifier) => Some(identifier.0.to_vec()),
                _ => None,
            });
        let not_after = parsed.iter().filter_map(|certificate| not_after(certificate)).min().unwrap_or(now);
        Ok(Self { key, subject, key_identifier, chain, limited, not_after })
    }
}

fn read_certificates(path: &Path, trust: Trust) -> Result<Vec<Vec<u8>>, IssuerError> {
    let file = files::open_to_read(path, trust)?;
    let text = files::read_file(path, file, MAX_FILE_LEN)?;
    check_blocks(&text).map_err(|lost| IssuerError::SuppliedCa {
        path: path.to_owned(),
        fault: SuppliedCaFault::LostBlock(lost),
    })?;
    CertificateDer::pem_slice_iter(&text)
        .map(|certificate| certificate.map(|der| der.as_ref().to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|_unsaid| IssuerError::SuppliedCa {
            path: path.to_owned(),
            fault: SuppliedCaFault::NoCertificate,
        })
}

/// `None` when the file holds no key that can be used.
fn read_key(path: &Path, trust: Trust) -> Result<Option<KeyPair>, IssuerError> {
    let text = files::read_supplied_secret(path, trust, MAX_FILE_LEN)?;
    let Ok(mut der) = PrivateKeyDer::from_pem_slice(&text) else {
        return unread_key(&text).map_or(Ok(None), |lost| {
            Err(IssuerError::SuppliedCa { path: path.to_owned(), fault: SuppliedCaFault::LostBlock(lost) })
        });
    };
    let key = KeyPair::from_foreign(&der);
    der.zeroize();
    Ok(key)
}

fn parse(chain: &[Vec<u8>]) -> Result<Vec<X509Certificate<'_>>, SuppliedCaFault> {
    if chain.is_empty() {
        return Err(SuppliedCaFault::NoCertificate);
    }
    if chain.len() > MAX_CHAIN {
        return Err(SuppliedCaFault::TooLong { found: chain.len(), most: MAX_CHAIN });
    }
    (1..)
        .zip(chain)
        .map(|(index, der)| match x509_parser::parse_x509_certificate(der) {
            Ok(([], certificate)) => Ok(certificate),
            _ => Err(SuppliedCaFault::Malformed { index }),
        })
        .collect()
}

fn check(
    chain: &[X509Certificate<'_>],
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(), SuppliedCaFault> {
    for ((index, needed), certificate) in (1..).zip(1..).zip(chain) {
        check_one(index, needed, certificate, trust_domain, now)?;
        // Nobody looks at the policies of a root.
        if index < chain.len() && asks_for_a_policy(certificate, needed) {
            return Err(SuppliedCaFault::Policy { index, subject: certificate.subject().to_string() });
        }
    }
    for ((index, certificate), above) in (1..).zip(chain).zip(chain.iter().skip(1)) {
        if certificate.issuer().as_raw() != above.subject().as_raw() {
            return Err(SuppliedCaFault::Order {
                index,
                issuer: certificate.issuer().to_string(),
                next: above.subject().to_string(),
            });
        }
    }
    if let Some(last) = chain.last()
        && last.issuer().as_raw() != last.subject().as_raw()
    {
        return Err(SuppliedCaFault::NoRoot {
            subject: last.subject().to_string(),
            issuer: last.issuer().to_string(),
        });
    }
    Ok(())
}

/// Checks the certificate that stands at `index`, with `needed` CAs below it.
fn check_one(
    index: usize,
    needed: u32,
    certificate: &X509Certificate<'_>,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(), SuppliedCaFault> {
    let subject = || certificate.subject().to_string();
    let malformed = |_| SuppliedCaFault::Malformed { index };
    let constraints = certificate.basic_constraints().map_err(malformed)?;
    let Some(constraints) = constraints.map(|extension| extension.value).filter(|value| value.ca) else {
        return Err(SuppliedCaFault::NotCa { index, subject: subject() });
    };
    match certificate.key_usage().map_err(malformed)? {
        Some(usage) if usage.value.key_cert_sign() => {}
        Some(_) => return Err(SuppliedCaFault::MayNotSign { index, subject: subject() }),
        None => return Err(SuppliedCaFault::NoUsage { index, subject: subject() }),
    }
    if let Some(oid) = name_constraints::unread_extension(certificate) {
        return Err(SuppliedCaFault::Extension { index, subject: subject(), oid });
    }
    if let Some(allowed) = constraints.path_len_constraint
        && allowed < needed
    {
        return Err(SuppliedCaFault::PathLength { index, subject: subject(), allowed, needed });
    }
    let (Some(not_before), Some(not_after)) = (not_before(certificate), not_after(certificate)) else {
        return Err(SuppliedCaFault::Malformed { index });
    };
    if now < not_before || not_after <= now {
        return Err(SuppliedCaFault::NotValidNow { index, subject: subject(), not_before, not_after, now });
    }
    if let Some(usage) = certificate.extended_key_usage().map_err(malformed)?.map(|extension| extension.value)
        && !(usage.server_auth && usage.client_auth)
    {
        return Err(SuppliedCaFault::OneSide { index, subject: subject() });
    }
    name_constraints::permit(certificate, trust_domain).map_err(|found| SuppliedCaFault::NotPermitted {
        index,
        subject: subject(),
        found,
        want: trust_domain.clone(),
    })?;
    let names = certificate.subject_alternative_name().map_err(malformed)?;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        let want = trust_domain.id_string();
        if let GeneralName::URI(found) = name
            && *found != want
        {
            let found = (*found).to_owned();
            return Err(SuppliedCaFault::ForeignTrustDomain { index, subject: subject(), found, want });
        }
    }
    Ok(())
}

/// Whether a certificate with `needed` CAs below it, and an SVID below them, lets none of these pass without a policy, which
/// they have not. Go refuses them then, be this extension critical or not.
fn asks_for_a_policy(certificate: &X509Certificate<'_>, needed: u32) -> bool {
    certificate.iter_extensions().any(|extension| match extension.parsed_extension() {
        ParsedExtension::PolicyConstraints(constraints) => {
            constraints.require_explicit_policy.is_some_and(|skipped| skipped <= needed.saturating_add(1))
        }
        _ => false,
    })
}

/// Each certificate of `chain` signed the one before it; the last, itself.
fn check_signatures(chain: &[X509Certificate<'_>]) -> Result<(), SuppliedCaFault> {
    let above = chain.iter().skip(1).chain(chain.last());
    for (index, (certificate, above)) in (1..).zip(chain.iter().zip(above)) {
        if !name_constraints::is_signed_by(certificate, above) {
            return Err(SuppliedCaFault::Signature {
                index,
                subject: certificate.subject().to_string(),
                above: above.subject().to_string(),
            });
        }
    }
    Ok(())
}

/// What the certificates of a file, as far as they can be read, say of DNS names.
pub fn dns_constraints(pem: &[u8]) -> DnsConstraints {
    let certificates = CertificateDer::pem_slice_iter(pem).take(MAX_CHAIN);
    dns_constraints_of(&certificates.map_while(Result::ok).collect::<Vec<_>>())
}

/// The same of a chain.
pub(super) fn dns_constraints_of(chain: &[impl AsRef<[u8]>]) -> DnsConstraints {
    let parsed =
        chain.iter().map_while(|der| Some(x509_parser::parse_x509_certificate(der.as_ref()).ok()?.1));
    DnsConstraints::of(&parsed.collect::<Vec<_>>())
}

fn not_before(certificate: &X509Certificate<'_>) -> Option<SystemTime> {
    // What began before 1970 began long enough ago.
    from_unix(u64::try_from(certificate.validity().not_before.timestamp()).unwrap_or(0))
}

fn not_after(certificate: &X509Certificate<'_>) -> Option<SystemTime> {
    from_unix(u64::try_from(certificate.validity().not_after.timestamp()).ok()?)
}

/// Verifies an SVID's chain to `root` as a TLS peer would.
pub(super) fn verify(chain: &[impl AsRef<[u8]>], root: &[u8], now: SystemTime) -> Result<(), webpki::Error> {
    let certificates: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_ref())).collect();
    let Some((leaf, intermediates)) = certificates.split_first() else {
        return Err(webpki::Error::BadDer);
    };
    let root = CertificateDer::from(root);
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (leaf, anchors) = (EndEntityCert::try_from(leaf)?, [anchor_from_trusted_cert(&root)?]);
    // A workload is both.
    [KeyUsage::client_auth(), KeyUsage::server_auth()].into_iter().try_for_each(|usage| {
        let now = UnixTime::since_unix_epoch(since_1970);
        leaf.verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, intermediates, now, usage, None, None)
            .map(drop)
    })
}
