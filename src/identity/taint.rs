//! Authorities that are still in the bundle and must not be relied on any more: what they signed is made anew, and they are
//! taken out when that was done everywhere.

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;
use x509_parser::prelude::ParsedExtension;

/// The tainted authorities of the own trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tainted {
    /// Key identifiers of X.509 authorities.
    x509: BTreeSet<Box<[u8]>>,
    /// Key IDs of JWT authorities.
    jwt: BTreeSet<Box<str>>,
}

impl Tainted {
    /// Of these CA certificates (DER) and key IDs. A certificate without a key identifier signs nothing that names it, and is
    /// passed over.
    pub fn new<'a>(
        certificates: impl IntoIterator<Item = &'a [u8]>,
        kids: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let x509 = certificates.into_iter().filter_map(|der| key_identifier(der, Whose::Own)).collect();
        Self { x509, jwt: kids.into_iter().map(Box::from).collect() }
    }

    /// Whether nothing is tainted.
    pub fn is_empty(&self) -> bool {
        self.x509.is_empty() && self.jwt.is_empty()
    }

    /// Whether a certificate of this chain (DER, the leaf first) was signed by a tainted authority.
    pub fn signed_x509(&self, chain: &[impl AsRef<[u8]>]) -> bool {
        !self.x509.is_empty()
            && chain
                .iter()
                .filter_map(|der| key_identifier(der.as_ref(), Whose::Signer))
                .any(|signer| self.x509.contains(&signer))
    }

    /// Whether this token was signed by a tainted authority.
    pub fn signed_jwt(&self, token: &str) -> bool {
        !self.jwt.is_empty() && kid(token).is_some_and(|kid| self.jwt.contains(&*kid))
    }
}

/// The key ID in the header of a token.
pub fn kid(token: &str) -> Option<String> {
    let (header, _) = token.split_once('.')?;
    let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
    Some(header.get("kid")?.as_str()?.to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Own,
    Signer,
}

fn key_identifier(der: &[u8], whose: Whose) -> Option<Box<[u8]>> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    certificate.extensions().iter().find_map(|extension| match (whose, extension.parsed_extension()) {
        (Whose::Own, ParsedExtension::SubjectKeyIdentifier(key)) => Some(key.0.into()),
        (Whose::Signer, ParsedExtension::AuthorityKeyIdentifier(key)) => {
            key.key_identifier.as_ref().map(|key| key.0.into())
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    fn ca() -> (Vec<u8>, Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        (der, Issuer::new(params, key))
    }

    #[test]
    fn what_a_tainted_authority_signed_is_seen() {
        let ((tainted, signer), (other, _)) = (ca(), ca());
        let mut params = CertificateParams::default();
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&KeyPair::generate().unwrap(), &signer).unwrap().der().to_vec();
        let token = |header: &str| format!("{}.e30.c2ln", URL_SAFE_NO_PAD.encode(header));
        for (case, taint, x509, jwt) in [
            ("none", Tainted::default(), false, false),
            ("its own", Tainted::new([&*tainted], ["one"]), true, true),
            ("another", Tainted::new([&*other], ["two"]), false, false),
        ] {
            assert_eq!(taint.signed_x509(std::slice::from_ref(&leaf)), x509, "{case}");
            assert_eq!(taint.signed_jwt(&token(r#"{"alg":"ES256","kid":"one"}"#)), jwt, "{case}");
            assert!(!taint.signed_jwt(&token("{}")) && !taint.signed_jwt("no token"), "{case}");
            assert!(!taint.signed_x509(&[b"no certificate".to_vec()]), "{case}");
        }
    }
}
