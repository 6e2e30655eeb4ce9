//! Bundles as a SPIRE Server tells them.
//!
//! What it says of its own trust domain is believed, since it was known by its SPIFFE ID; but an answer that names another
//! trust domain, or would trust nobody, is a mistake and changes nothing.

use std::time::{Duration, SystemTime};

use prost::Message as _;
use x509_parser::prelude::FromDer as _;

use super::proto::types::{self as pb, BundleMask};
use crate::identity::{
    Bundle, Tainted, TrustDomain,
    bundle::{BundleError, JwtAuthority, JwtPublicKey, MAX_LEN},
};

/// The parts of a bundle that are asked for.
pub(super) const BUNDLE_MASK: BundleMask =
    BundleMask { x509_authorities: true, jwt_authorities: true, refresh_hint: false, sequence_number: false };

/// Why an answer is no bundle.
#[derive(Debug, thiserror::Error)]
pub(super) enum BundleFault {
    /// It is of another trust domain than it was asked for.
    #[error("the bundle is of trust domain {got:?}, not of {asked}")]
    OtherTrustDomain { asked: TrustDomain, got: String },
    /// It has no X.509 authority: nobody could be verified, the server neither.
    #[error("the bundle has no x.509 authority")]
    Empty,
    /// It is larger than any bundle may be that is read here.
    #[error("the bundle has {0} bytes, and can have at most {MAX_LEN}")]
    TooLarge(usize),
    /// One of its authorities is none.
    #[error(transparent)]
    Authority(#[from] BundleError),
}

/// A bundle, and what of it is tainted.
#[derive(Debug)]
pub(super) struct ToldBundle {
    pub(super) bundle: Bundle,
    pub(super) tainted: Tainted,
}

/// Reads a bundle that was asked for. JWT keys of unknown kinds are passed over.
///
/// # Errors
/// [`BundleFault`]: it makes no sense.
pub(super) fn read(told: pb::Bundle, asked: &TrustDomain) -> Result<ToldBundle, BundleFault> {
    let length = told.encoded_len();
    if length > MAX_LEN {
        return Err(BundleFault::TooLarge(length));
    }
    let pb::Bundle { trust_domain, x509_authorities, jwt_authorities, .. } = told;
    if TrustDomain::parse(&trust_domain).ok().as_ref() != Some(asked) {
        return Err(BundleFault::OtherTrustDomain { asked: asked.clone(), got: trust_domain });
    }
    let tainted = Tainted::new(
        x509_authorities.iter().filter(|it| it.tainted).map(|it| &*it.asn1),
        jwt_authorities.iter().filter(|it| it.tainted).map(|it| &*it.key_id),
    );
    let certificates = x509_authorities.iter().flat_map(|authority| apart(&authority.asn1));
    let keys = jwt_authorities.into_iter().filter_map(|key| {
        let pb::JwtKey { public_key, key_id, expires_at, .. } = key;
        let seconds = u64::try_from(expires_at).ok().filter(|seconds| *seconds > 0);
        let not_after =
            seconds.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        let key = JwtPublicKey::from_spki(&public_key).ok()?;
        (!key_id.is_empty()).then(|| JwtAuthority { kid: key_id.into(), key, not_after })
    });
    let bundle = Bundle::of_authorities(asked, certificates, keys)?;
    if bundle.x509_authorities.is_empty() {
        return Err(BundleFault::Empty);
    }
    Ok(ToldBundle { bundle, tainted })
}

/// Certificates that stand one after the other. What is none is one of them, for an error to name.
pub(super) fn apart(der: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut rest = der;
    while !rest.is_empty() {
        match x509_parser::asn1_rs::Any::from_der(rest) {
            Ok((after, _)) if after.len() < rest.len() => {
                found.push(rest.get(..rest.len() - after.len()).unwrap_or(rest).to_vec());
                rest = after;
            }
            _ => {
                found.push(rest.to_vec());
                break;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ca() -> Vec<u8> {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn told(certificates: &[Vec<u8>]) -> pb::Bundle {
        let certificate = |asn1: &Vec<u8>| pb::X509Certificate { asn1: asn1.clone(), tainted: false };
        pb::Bundle {
            trust_domain: "td".to_owned(),
            x509_authorities: certificates.iter().map(certificate).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_bundle_is_whole_or_it_is_none() {
        let td = TrustDomain::parse("td").unwrap();
        let (one, two) = (ca(), ca());
        let other = pb::Bundle { trust_domain: "other".to_owned(), ..told(std::slice::from_ref(&one)) };
        let key = pb::JwtKey { public_key: b"of an unknown kind".to_vec(), ..Default::default() };
        let unknown = pb::Bundle { jwt_authorities: vec![key], ..told(std::slice::from_ref(&one)) };
        let huge = pb::JwtKey { key_id: "x".repeat(MAX_LEN), ..Default::default() };
        let huge = pb::Bundle { jwt_authorities: vec![huge], ..told(std::slice::from_ref(&one)) };
        for (case, told, want) in [
            ("one", told(std::slice::from_ref(&one)), Some(1)),
            ("two", told(&[one.clone(), two.clone()]), Some(2)),
            ("the same twice", told(&[one.clone(), one.clone()]), Some(1)),
            ("two in one", told(&[[one.clone(), two].concat()]), Some(2)),
            ("a key of an unknown kind", unknown, Some(1)),
            ("more than a bundle", huge, None),
            ("none", told(&[]), None),
            ("no certificate", told(&[b"none".to_vec()]), None),
            ("one and no certificate", told(&[one, b"none".to_vec()]), None),
            ("another trust domain", other, None),
        ] {
            let got = read(told, &td);
            let count = got.as_ref().ok().map(|told| told.bundle.x509_authorities.len());
            assert_eq!(count, want, "{case}: {got:?}");
        }
    }

    #[test]
    fn what_is_tainted_is_told_and_stays_in_the_bundle() {
        let td = TrustDomain::parse("td").unwrap();
        let mut tainted = told(&[ca(), ca()]);
        assert!(read(tainted.clone(), &td).unwrap().tainted.is_empty());
        tainted.jwt_authorities =
            vec![pb::JwtKey { key_id: "k".to_owned(), tainted: true, ..Default::default() }];
        let read = read(tainted, &td).unwrap();
        assert!(!read.tainted.is_empty());
        assert_eq!(read.bundle.x509_authorities.len(), 2);
    }
}
