//! Name constraints on URIs in chains of certificates.
//!
//! webpki refuses every certificate below such a constraint, right or wrong; Go and OpenSSL read them. So where a chain has
//! one, what webpki would have looked at is looked at with what is here: the constraints, what nobody else understands, the
//! signatures.

use std::net::IpAddr;

use webpki::ALL_VERIFICATION_ALGS;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, NameConstraints, ParsedExtension},
};

use super::TrustDomain;

/// Whether a certificate of the chain says which URIs may stand in those below it.
pub fn are_on_uris(chain: &[X509Certificate<'_>]) -> bool {
    chain.iter().filter_map(of).any(|constraints| {
        let all =
            [&constraints.permitted_subtrees, &constraints.excluded_subtrees].into_iter().flatten().flatten();
        all.into_iter().any(|subtree| matches!(subtree.base, GeneralName::URI(_)))
    })
}

/// The critical extension of a certificate that verifiers do not know.
pub fn unread_extension(certificate: &X509Certificate<'_>) -> Option<String> {
    let unread = certificate.iter_extensions().find(|extension| {
        let is_known = !matches!(
            extension.parsed_extension(),
            ParsedExtension::UnsupportedExtension { .. } | ParsedExtension::ParseError { .. }
        );
        extension.critical && !is_known
    });
    unread.map(|extension| extension.oid.to_string())
}

/// Whether the SPIFFE IDs of `trust_domain` may stand below `certificate`.
///
/// # Errors
/// The constraint that keeps them out, or that not all verifiers know, in words.
pub fn permit(certificate: &X509Certificate<'_>, trust_domain: &TrustDomain) -> Result<(), String> {
    of(certificate).map_or(Ok(()), |constraints| check(constraints, trust_domain.name()))
}

fn of<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a NameConstraints<'a>> {
    certificate.name_constraints().ok().flatten().map(|extension| extension.value)
}

/// The constraint that does not let `host` pass, as Go and OpenSSL both have it (RFC 5280, section 4.2.1.10): `example.org`
/// is that host, `.example.org` every one below it.
fn check(constraints: &NameConstraints<'_>, host: &str) -> Result<(), String> {
    let (mut permitted, mut refused) = (false, None);
    for subtree in constraints.permitted_subtrees.iter().flatten() {
        match &subtree.base {
            GeneralName::URI(base) if is_permitted(base, host) => permitted = true,
            GeneralName::URI(base) => refused = Some(format!("permitted URI {base:?}")),
            other => is_known(other)?,
        }
    }
    if let Some(refused) = refused.filter(|_| !permitted) {
        return Err(refused);
    }
    for subtree in constraints.excluded_subtrees.iter().flatten() {
        match &subtree.base {
            GeneralName::URI(base) if is_excluded(base, host) => {
                return Err(format!("excluded URI {base:?}"));
            }
            GeneralName::URI(_) => {}
            other => is_known(other)?,
        }
    }
    Ok(())
}

/// Constraints on names that an SVID has not, or has only where an entry says so, bind elsewhere.
fn is_known(base: &GeneralName<'_>) -> Result<(), String> {
    match base {
        GeneralName::DNSName(_) | GeneralName::IPAddress(_) | GeneralName::RFC822Name(_) => Ok(()),
        other => Err(format!("{other}")),
    }
}

fn is_permitted(base: &str, host: &str) -> bool {
    let (base, host) = (base.to_ascii_lowercase(), host.to_ascii_lowercase());
    // Go matches no address against names.
    if host.parse::<IpAddr>().is_ok() {
        return false;
    }
    if base.starts_with('.') { host.len() > base.len() && host.ends_with(&base) } else { host == base }
}

fn is_excluded(base: &str, host: &str) -> bool {
    let (base, host) = (base.to_ascii_lowercase(), host.to_ascii_lowercase());
    let base = base.trim_start_matches('.');
    let below = host.strip_suffix(base).is_some_and(|before| before.is_empty() || before.ends_with('.'));
    below || base.is_empty() || host.parse::<IpAddr>().is_ok()
}

/// Whether the key of `above` signed `certificate`.
pub fn is_signed_by(certificate: &X509Certificate<'_>, above: &X509Certificate<'_>) -> bool {
    let key = &above.public_key().subject_public_key.data;
    let (text, signature) = (certificate.tbs_certificate.as_ref(), &certificate.signature_value.data);
    ALL_VERIFICATION_ALGS.iter().any(|how| how.verify_signature(key, text, signature).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_matched_as_both_go_and_openssl_do() {
        for (base, host, permitted, excluded) in [
            ("example.org", "example.org", true, true),
            ("EXAMPLE.org", "example.org", true, true),
            ("example.org", "a.example.org", false, true),
            (".example.org", "a.example.org", true, true),
            (".example.org", "a.b.example.org", true, true),
            (".example.org", "example.org", false, true),
            ("example.org", "badexample.org", false, false),
            (".example.org", "badexample.org", false, false),
            ("", "example.org", false, true),
            ("spiffe://example.org", "example.org", false, false),
            ("10.0.0.1", "10.0.0.1", false, true),
        ] {
            let found = (is_permitted(base, host), is_excluded(base, host));
            assert_eq!(found, (permitted, excluded), "{base:?} {host:?}");
        }
    }
}
