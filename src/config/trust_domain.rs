//! The name of a trust domain, as admins write it.

use crate::identity::{SpiffeId, TrustDomain};

/// Parses `example.org` or `spiffe://example.org`. go-spiffe takes a path along; here it is an error, since that is a
/// workload's name in a wrong place.
pub(super) fn parse(text: &str) -> Result<TrustDomain, String> {
    if text.contains(":/") && SpiffeId::parse(text).is_ok_and(|id| !id.path().is_empty()) {
        return Err("a trust domain has no path".to_owned());
    }
    TrustDomain::parse(text).map_err(|err| err.to_string())
}
