//! The X.509 profile: CA certificates and X.509-SVIDs, member by member those of a SPIRE Server
//! (`pkg/server/credtemplate`, `pkg/common/x509util`) and within the SPIFFE X.509-SVID standard, section 4.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    string::{Ia5String, PrintableString},
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::{Any, FromDer as _};

use super::{
    IssuerError,
    rotation::{Term, unix},
    supplied::{SuppliedCa, dns_constraints_of, verify},
};
use crate::{
    identity::{KeyType, SpiffeId, TrustDomain, X509Svid, name_constraints::DnsConstraints},
    issuer::keys::{self, KeyPair, SignatureForm},
};

/// What others see of an X.509 authority.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct X509Authority {
    /// DER.
    pub(super) certificate: Vec<u8>,
    /// The supplied CA certificates above it, from the one that signed it to the root; empty when self-signed.
    pub(super) above: Vec<Vec<u8>>,
}

impl X509Authority {
    /// What the bundle holds of it: itself, or its root.
    pub(super) fn root(&self) -> &[u8] {
        self.above.last().unwrap_or(&self.certificate)
    }

    /// What stands between an SVID and the root, in the order of a chain.
    fn intermediates(&self) -> impl Iterator<Item = &Vec<u8>> {
        std::iter::once(&self.certificate).chain(&self.above).take(self.above.len())
    }
}

/// The CA that signs X.509-SVIDs.
pub(super) struct X509Signer {
    issuer: Issuer<'static, KeyPair>,
    pub(super) term: Term,
    intermediates: Vec<Arc<[u8]>>,
    dns_constraints: DnsConstraints,
}

impl X509Signer {
    /// A signer of an authority made here and its key. `None` when the key or the certificate is not what was
    /// made.
    pub(super) fn new(
        authority: &X509Authority,
        term: Term,
        key_type: KeyType,
        pkcs8: &[u8],
    ) -> Option<Self> {
        let key = KeyPair::from_pkcs8(key_type, SignatureForm::Certificate, pkcs8)?;
        let certificate = CertificateDer::from(authority.certificate.as_slice());
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).ok()?;
        if parsed.public_key().subject_public_key.data != key.public_key() {
            return None;
        }
        Some(Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key).ok()?,
            term,
            intermediates: authority.intermediates().map(|der| Arc::from(der.as_slice())).collect(),
            dns_constraints: dns_constraints_of(&authority.above),
        })
    }

    /// Makes a key and signs an X.509-SVID for it. It ends with the CA at the latest, for after that no bundle
    /// would verify it.
    pub(super) fn sign(
        &self,
        spiffe_id: &SpiffeId,
        dns_names: &[String],
        ttl: Duration,
        key_type: KeyType,
        now: SystemTime,
    ) -> Result<X509Svid, IssuerError> {
        let lifetime = || IssuerError::Lifetime { id: spiffe_id.clone(), ttl };
        let term = Term::new(now, ttl, Some(self.term.not_after)).ok_or_else(lifetime)?;
        let key = KeyPair::generate(key_type, SignatureForm::Certificate)?;

        let mut subject = name("SPIRE");
        if let Some(first) = dns_names.first() {
            subject.push(DnType::CommonName, text(first));
        }
        let mut names = Vec::with_capacity(1 + dns_names.len());
        names.push(uri(spiffe_id.as_str())?);
        for dns_name in dns_names {
            let permitted = self.dns_constraints.permit(dns_name);
            permitted.map_err(|found| IssuerError::DnsNotPermitted { name: dns_name.clone(), found })?;
            let encoded = Ia5String::try_from(dns_name.as_str());
            names.push(SanType::DnsName(encoded.map_err(|_unsaid| IssuerError::DnsName(dns_name.clone()))?));
        }

        let mut params = params(term, random_serial()?, &key)?;
        params.distinguished_name = subject;
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
            KeyUsagePurpose::KeyAgreement,
        ];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;

        let certificate = params.signed_by(&key, &self.issuer).map_err(IssuerError::Certificate)?;
        let mut chain = Vec::with_capacity(1 + self.intermediates.len());
        chain.push(Arc::from(&**certificate.der()));
        chain.extend(self.intermediates.iter().cloned());
        Ok(X509Svid {
            spiffe_id: spiffe_id.clone(),
            chain,
            key: key.pkcs8()?,
            not_before: term.not_before,
            not_after: term.not_after,
        })
    }
}

/// Signs an SVID with a CA that was just made, and verifies it to the root as a peer would: whatever makes verifiers
/// refuse a supplied chain (path length, name constraints, a signature that is not its issuer's) shows here.
pub(super) fn try_out(
    authority: &X509Authority,
    term: Term,
    key_type: KeyType,
    pkcs8: &[u8],
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<Result<(), webpki::Error>, IssuerError> {
    let signer =
        X509Signer::new(authority, term, key_type, pkcs8).ok_or(IssuerError::Crypto("use the key"))?;
    let id = SpiffeId::parse(&format!("{}/trial", trust_domain.id_string()));
    let Ok(id) = id else { return Ok(Ok(())) };
    let svid = signer.sign(&id, &[], Duration::from_secs(60), KeyType::EcP256, now)?;
    Ok(verify(&svid.chain, authority.root(), now))
}

/// Who signs a CA certificate.
pub(super) enum CaIssuer<'a> {
    /// The CA itself.
    Itself,
    /// A CA of the admin's.
    Supplied(&'a SuppliedCa),
}

/// Makes the certificate of a CA with `key`, DER.
pub(super) fn ca_certificate(
    trust_domain: &TrustDomain,
    term: Term,
    key: &KeyPair,
    issuer: CaIssuer<'_>,
) -> Result<Vec<u8>, IssuerError> {
    let serial = random_serial()?;
    let mut subject = name("SPIFFE");
    // Two CAs of one trust domain must differ in their names, or verifiers pick the wrong one.
    subject.push(DnType::CustomDnType(SERIAL_NUMBER_ATTRIBUTE.to_vec()), text(&serial.to_string()));

    let mut params = params(term, serial, key)?;
    params.distinguished_name = subject;
    params.subject_alt_names = vec![uri(&trust_domain.id_string())?];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    match issuer {
        CaIssuer::Itself => Ok(params.self_signed(key).map_err(IssuerError::Certificate)?.der().to_vec()),
        CaIssuer::Supplied(supplied) => {
            params.use_authority_key_identifier_extension = supplied.key_identifier.is_some();
            let mut stand_in = CertificateParams::default();
            stand_in.distinguished_name = name("issuer");
            stand_in.key_identifier_method =
                KeyIdMethod::PreSpecified(supplied.key_identifier.clone().unwrap_or_default());
            let issuer = Issuer::from_params(&stand_in, &supplied.key);
            let template = params.signed_by(key, &issuer).map_err(IssuerError::Certificate)?;
            issued_by(template.der(), &supplied.subject, &supplied.key)?
                .ok_or(IssuerError::Crypto("put a certificate together"))
        }
    }
}

/// The same certificate with `issuer` as the issuer's name, signed anew. rcgen can only write names with one value
/// per attribute type, which those of corporate CAs (`DC=example, DC=com`) are not; and a verifier compares names
/// byte by byte. `None` when the template is no certificate.
fn issued_by(template: &[u8], issuer: &[u8], key: &KeyPair) -> Result<Option<Vec<u8>>, IssuerError> {
    let Some((before, after, algorithm)) = around_issuer(template) else { return Ok(None) };
    let signed = element(SEQUENCE, &[before, issuer, after]);
    let signature = element(BIT_STRING, &[&[0], &key.sign(&signed)?]);
    Ok(Some(element(SEQUENCE, &[&signed, algorithm, &signature])))
}

/// What stands before and after the issuer's name in the signed part of a certificate, and the signature's algorithm.
fn around_issuer(certificate: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let next = |der| {
        let (rest, element) = Any::from_der(der).ok()?;
        let len = der.len().checked_sub(rest.len())?;
        Some((element.data, der.get(..len)?, rest))
    };
    let (contents, _, _) = next(certificate)?;
    let (signed, _, rest) = next(contents)?;
    let (_, algorithm, _) = next(rest)?;
    // Version, serial number, algorithm; then the name.
    let (_, _, rest) = next(signed)?;
    let (_, _, rest) = next(rest)?;
    let (_, _, from_name) = next(rest)?;
    let (_, _, after) = next(from_name)?;
    let before = signed.get(..signed.len().checked_sub(from_name.len())?)?;
    Some((before, after, algorithm))
}

const SEQUENCE: u8 = 0x30;
const BIT_STRING: u8 = 0x03;

/// A DER element of these parts.
fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let bytes = len.to_be_bytes();
    let digits: Vec<u8> = bytes.iter().copied().skip_while(|byte| *byte == 0).collect();
    let mut der = vec![tag];
    match (digits.as_slice(), u8::try_from(digits.len())) {
        ([], _) => der.push(0),
        ([short @ 0..0x80], _) => der.push(*short),
        (long, count) => {
            // At most eight: a usize has no more.
            der.push(0x80 | count.unwrap_or(0));
            der.extend_from_slice(long);
        }
    }
    for part in parts {
        der.extend_from_slice(part);
    }
    der
}

/// id-at-serialNumber.
const SERIAL_NUMBER_ATTRIBUTE: [u64; 4] = [2, 5, 4, 5];

/// What all certificates share. The key identifier is SHA-1 of the public key's bits (RFC 5280, section 4.2.1.2,
/// method 1): a name, which nothing rests on.
fn params(term: Term, serial: u128, key: &KeyPair) -> Result<CertificateParams, IssuerError> {
    let identifier = digest(&SHA1_FOR_LEGACY_USE_ONLY, key.der_bytes());
    let mut params = CertificateParams::default();
    params.not_before = moment(term.not_before)?;
    params.not_after = moment(term.not_after)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial.to_be_bytes()));
    params.key_identifier_method = KeyIdMethod::PreSpecified(identifier.as_ref().to_vec());
    Ok(params)
}

/// Uniform in 1 .. 2^128 - 1.
fn random_serial() -> Result<u128, IssuerError> {
    loop {
        let serial = u128::from_be_bytes(keys::random()?);
        if serial != 0 {
            return Ok(serial);
        }
    }
}

fn name(organization: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CountryName, text("US"));
    name.push(DnType::OrganizationName, text(organization));
    name
}

/// A PrintableString where the text allows it, else UTF-8, as Go writes names.
fn text(text: &str) -> DnValue {
    PrintableString::try_from(text)
        .map_or_else(|_| DnValue::Utf8String(text.to_owned()), DnValue::PrintableString)
}

fn uri(text: &str) -> Result<SanType, IssuerError> {
    // SPIFFE IDs are ASCII by construction.
    Ia5String::try_from(text).map(SanType::URI).map_err(IssuerError::Certificate)
}

/// The last second that a certificate can name: 9999-12-31 23:59:59 (RFC 5280, section 4.1.2.5.2).
const LAST_SECOND: i64 = 253_402_300_799;

fn moment(time: SystemTime) -> Result<OffsetDateTime, IssuerError> {
    unix(time)
        .and_then(|seconds| i64::try_from(seconds).ok())
        .filter(|seconds| *seconds <= LAST_SECOND)
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(IssuerError::Time { time })
}
