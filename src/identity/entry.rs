//! A registration entry: which process (by its selectors) is which workload (by its SPIFFE ID).

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use super::{AskedSelectors, SpiffeId, TrustDomain};

/// The identity of an entry, which also orders answers: entries are served sorted by it, byte by byte, and the
/// first is the caller's default (SPIRE: `pkg/agent/manager/cache`). From a SPIRE Server it is the server's; the
/// embedded issuer makes it from the entry's name, so that it stays the same over restarts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(Arc<str>);

impl EntryId {
    /// Takes the text as it is.
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// The longest hint, in bytes (SPIFFE Workload API standard, section 5.2.1: longer ones should not be supported).
pub const MAX_HINT_LEN: usize = 1024;

/// What an entry asks for beside its identity. None of it is the usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryAttributes {
    /// Its X.509-SVID is made when somebody asks for it, and not ahead (`disable_x509_svid_prefetch`).
    pub x509_on_demand: bool,
    /// Each answer has a JWT-SVID of its own, with an ID (`jwt_svid_include_jti`).
    pub jwt_each_anew: bool,
}

/// A registration entry. What is invalid (foreign trust domain, reserved path, no selector, hint too long, lifetime
/// of zero) was refused where it was read; see `config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Identity and place in the order.
    pub id: EntryId,
    /// Whom the SVIDs name.
    pub spiffe_id: SpiffeId,
    /// All of these must have been attested. An entry without any matches nobody.
    pub selectors: AskedSelectors,
    /// Lifetime of X.509-SVIDs; `None` takes the issuer's default (1 hour).
    pub x509_svid_ttl: Option<Duration>,
    /// Lifetime of JWT-SVIDs; `None` takes the issuer's default (5 minutes).
    pub jwt_svid_ttl: Option<Duration>,
    /// Tells the workload what the identity is for; empty for none.
    pub hint: Box<str>,
    /// DNS names of the X.509-SVID; the first also becomes the common name of its subject.
    pub dns_names: Vec<String>,
    /// Foreign trust domains whose bundles its callers receive.
    pub federates_with: BTreeSet<TrustDomain>,
    /// Which of two entries with the same hint is older and keeps it: place in the configuration, or the server's
    /// `created_at` (seconds).
    pub created_at: i64,
    /// Grows when the entry changes: an SVID made of an older revision is made again.
    pub revision: i64,
    /// What else it asks for.
    pub attributes: EntryAttributes,
}

#[cfg(test)]
impl Entry {
    /// An entry that asks for these selectors, apart by spaces, and for nothing else. For tests.
    pub(crate) fn asking(selectors: &str) -> Arc<Self> {
        Arc::new(Self {
            id: EntryId::new(selectors),
            spiffe_id: SpiffeId::parse("spiffe://td/x").unwrap(),
            selectors: selectors.split_whitespace().map(|it| super::Selector::parse(it).unwrap()).collect(),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            hint: Box::default(),
            dns_names: Vec::new(),
            federates_with: BTreeSet::new(),
            created_at: 0,
            revision: 0,
            attributes: EntryAttributes::default(),
        })
    }
}
