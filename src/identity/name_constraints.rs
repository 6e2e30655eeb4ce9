//! Name constraints in chains of certificates: on URIs, which SPIFFE IDs are, and on DNS names, which SVIDs can have too.
//!
//! webpki refuses every certificate below a constraint on URIs, right or wrong; Go and OpenSSL read them. So where a chain has
//! one, what webpki would have looked at is looked at with what is here: the constraints, what nobody else understands, the
//! signatures.

use std::net::IpAddr;

use webpki::ALL_VERIFICATION_ALGS;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, GeneralSubtree, NameConstraints, ParsedExtension},
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

/// The critical extension of a certificate that not all verifiers know: webpki knows the fewest.
pub fn unread_extension(certificate: &X509Certificate<'_>) -> Option<String> {
    let unread = certificate.iter_extensions().find(|extension| {
        let is_known = matches!(
            extension.parsed_extension(),
            ParsedExtension::BasicConstraints(_)
                | ParsedExtension::KeyUsage(_)
                | ParsedExtension::ExtendedKeyUsage(_)
                | ParsedExtension::SubjectAlternativeName(_)
                | ParsedExtension::NameConstraints(_)
                | ParsedExtension::CRLDistributionPoints(_)
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

/// What a chain says of the DNS names in certificates below it. Each of its certificates has to let a name pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConstraints(Vec<DnsSubtrees>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct DnsSubtrees {
    /// Which certificate of the chain says it.
    whose: String,
    /// None: whatever is not excluded.
    permitted: Vec<String>,
    excluded: Vec<String>,
}

impl DnsConstraints {
    /// Those of the chain, whose first certificate is number 1.
    pub fn of(chain: &[X509Certificate<'_>]) -> Self {
        let names = |subtrees: &Option<Vec<GeneralSubtree<'_>>>| -> Vec<String> {
            let names = subtrees.iter().flatten().filter_map(|subtree| match &subtree.base {
                GeneralName::DNSName(base) => Some(base.to_ascii_lowercase()),
                _ => None,
            });
            names.collect()
        };
        let all = (1..).zip(chain).filter_map(|(index, certificate)| {
            let constraints = of(certificate)?;
            let permitted = names(&constraints.permitted_subtrees);
            let excluded = names(&constraints.excluded_subtrees);
            let whose = format!("certificate {index} ({})", certificate.subject());
            let says_something = !permitted.is_empty() || !excluded.is_empty();
            says_something.then_some(DnsSubtrees { whose, permitted, excluded })
        });
        Self(all.collect())
    }

    /// Whether a certificate below the chain can have this DNS name, in lower case.
    ///
    /// # Errors
    /// The constraint that keeps it out, and whose it is, in words.
    pub fn permit(&self, name: &str) -> Result<(), String> {
        for DnsSubtrees { whose, permitted, excluded } in &self.0 {
            if let Some(base) = excluded.iter().find(|base| is_excluded_dns(base, name)) {
                return Err(format!("excluded DNS {base:?} of {whose}"));
            }
            if !permitted.is_empty() && !permitted.iter().any(|base| is_below(base, name)) {
                return Err(format!("permitted DNS {} of {whose}", shown(permitted)));
            }
        }
        Ok(())
    }
}

/// As many of them as fit into a line.
fn shown(names: &[String]) -> String {
    const MOST: usize = 3;
    let first: Vec<_> = names.iter().take(MOST).map(|name| format!("{name:?}")).collect();
    let more = names.len().saturating_sub(MOST);
    if more == 0 { first.join(", ") } else { format!("{} and {more} more", first.join(", ")) }
}

/// RFC 5280, section 4.2.1.10: a name fits that is the constraint, or has labels more to the left. With a dot in front, which
/// that section has for URIs alone, Go, OpenSSL and webpki want at least one more.
fn is_below(base: &str, name: &str) -> bool {
    match name.strip_suffix(base) {
        Some(before) if base.starts_with('.') => !before.is_empty(),
        Some(before) => before.is_empty() || base.is_empty() || before.ends_with('.'),
        None => false,
    }
}

/// A wildcard is kept out by what it stands for, too.
fn is_excluded_dns(base: &str, name: &str) -> bool {
    let stands_for = |rest: &str| base.split_once('.').is_some_and(|(_label, above)| above == rest);
    is_below(base, name) || name.strip_prefix("*.").is_some_and(stands_for)
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

    #[test]
    fn dns_names_fit_where_go_openssl_and_webpki_agree() {
        for (base, name, permitted, excluded) in [
            ("svc.local", "svc.local", true, true),
            ("svc.local", "web.svc.local", true, true),
            ("svc.local", "a.web.svc.local", true, true),
            ("svc.local", "*.svc.local", true, true),
            ("svc.local", "websvc.local", false, false),
            ("svc.local", "local", false, false),
            ("svc.local", "web", false, false),
            (".svc.local", "svc.local", false, false),
            (".svc.local", "web.svc.local", true, true),
            ("web.svc.local", "*.svc.local", false, true),
            ("a.web.svc.local", "*.svc.local", false, false),
            ("", "web", true, true),
        ] {
            let found = (is_below(base, name), is_excluded_dns(base, name));
            assert_eq!(found, (permitted, excluded), "{base:?} {name:?}");
        }
    }
}
