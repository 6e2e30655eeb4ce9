//! SPIFFE IDs and trust domains as the SPIFFE-ID standard, section 2, has them.
//!
//! The text of every refusal is that of go-spiffe (`spiffeid/errors`), which people grep for. Input is bytes from
//! strangers: at most [`MAX_LEN`] of them are looked at, and a value of these types is valid by construction.

use std::{fmt, sync::Arc};

/// The longest SPIFFE ID, in bytes (SPIFFE-ID standard, section 2.3: "MUST support up to 2048 bytes and SHOULD
/// NOT generate longer").
pub const MAX_LEN: usize = 2048;

/// The longest trust domain name, in bytes (SPIFFE-ID standard, section 2.1).
pub const MAX_TRUST_DOMAIN_LEN: usize = 255;

const SCHEME: &str = "spiffe://";

/// Why a text is no SPIFFE ID or no trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// The text has no characters.
    #[error("cannot be empty")]
    Empty,
    /// More than [`MAX_LEN`] bytes, or a trust domain of more than [`MAX_TRUST_DOMAIN_LEN`].
    #[error("cannot be longer than {0} bytes")]
    TooLong(usize),
    /// Not `spiffe://`, in lower case.
    #[error("scheme is missing or invalid")]
    Scheme,
    /// Nothing between `spiffe://` and the path.
    #[error("trust domain is missing")]
    NoTrustDomain,
    /// A character that a trust domain cannot hold; ports and user names end here too.
    #[error(
        "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"
    )]
    TrustDomainCharacter,
    /// A character that a path cannot hold; queries, fragments and percent-encoding end here too.
    #[error("path segment characters are limited to letters, numbers, dots, dashes, and underscores")]
    PathCharacter,
    /// Two slashes in a row.
    #[error("path cannot contain empty segments")]
    EmptySegment,
    /// A segment that is `.` or `..`.
    #[error("path cannot contain dot segments")]
    DotSegment,
    /// A slash at the end.
    #[error("path cannot have a trailing slash")]
    TrailingSlash,
    /// The ID of a workload needs a path (X.509-SVID standard, section 2).
    #[error("path cannot be empty for a workload")]
    NoPath,
}

/// The name of a trust domain, such as `example.org`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses `example.org`, or `spiffe://example.org` (and, as go-spiffe does, an ID with a path: its trust
    /// domain is meant).
    ///
    /// # Errors
    /// [`SpiffeIdError`] when the text is neither.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::NoTrustDomain);
        }
        if text.contains(":/") {
            return SpiffeId::parse(text).map(|id| id.trust_domain());
        }
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }

    /// The bare name: `example.org`.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The trust domain as a SPIFFE ID without a path: `spiffe://example.org`, the key of bundle maps.
    pub fn id_string(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// A SPIFFE ID, such as `spiffe://example.org/ns/prod/sa/web`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// Parses an ID; the path may be absent.
    ///
    /// # Errors
    /// [`SpiffeIdError`] says which rule the text breaks first.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::Empty);
        }
        if text.len() > MAX_LEN {
            return Err(SpiffeIdError::TooLong(MAX_LEN));
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (name, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        check_trust_domain(name)?;
        check_path(path)?;
        Ok(Self(text.into()))
    }

    /// Parses the ID of a workload: as [`SpiffeId::parse`], and the path must be there.
    ///
    /// # Errors
    /// [`SpiffeIdError`] says which rule the text breaks first.
    pub fn parse_workload(text: &str) -> Result<Self, SpiffeIdError> {
        let id = Self::parse(text)?;
        if id.path().is_empty() { Err(SpiffeIdError::NoPath) } else { Ok(id) }
    }

    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain it belongs to.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    /// The name of the trust domain it belongs to.
    pub fn trust_domain_name(&self) -> &str {
        self.parts().0
    }

    /// Whether it belongs to `trust_domain`.
    pub fn is_member_of(&self, trust_domain: &TrustDomain) -> bool {
        self.trust_domain_name() == trust_domain.name()
    }

    /// The path with its leading slash, or an empty text.
    pub fn path(&self) -> &str {
        self.parts().1
    }

    /// The trust domain, and the path with its slash.
    fn parts(&self) -> (&str, &str) {
        let rest = self.0.get(SCHEME.len()..).unwrap_or_default();
        rest.split_at_checked(rest.find('/').unwrap_or(rest.len())).unwrap_or_default()
    }

    /// Whether the path is `/spire` or below it, which SPIRE keeps for servers and agents.
    pub fn is_reserved(&self) -> bool {
        let path = self.path();
        path == "/spire" || path.starts_with("/spire/")
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    if name.is_empty() {
        return Err(SpiffeIdError::NoTrustDomain);
    }
    if name.len() > MAX_TRUST_DOMAIN_LEN {
        return Err(SpiffeIdError::TooLong(MAX_TRUST_DOMAIN_LEN));
    }
    let fits = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_');
    if name.bytes().all(fits) { Ok(()) } else { Err(SpiffeIdError::TrustDomainCharacter) }
}

fn check_path(path: &str) -> Result<(), SpiffeIdError> {
    let Some(inner) = path.strip_prefix('/') else { return Ok(()) };
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let mut segments = inner.split('/').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "" if segments.peek().is_none() => return Err(SpiffeIdError::TrailingSlash),
            "" => return Err(SpiffeIdError::EmptySegment),
            "." | ".." => return Err(SpiffeIdError::DotSegment),
            _ if !segment.bytes().all(fits) => return Err(SpiffeIdError::PathCharacter),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parse_says_which_rule_is_broken() {
        use SpiffeIdError as E;
        let long = format!("spiffe://td/{}", "a".repeat(MAX_LEN));
        let long_td = "a".repeat(256);
        for (case, text, want) in [
            ("plain", "spiffe://example.org/web", Ok("/web")),
            ("no path", "spiffe://example.org", Ok("")),
            ("all characters", "spiffe://a-b_c.9/A-Z_a.z/0", Ok("/A-Z_a.z/0")),
            ("three dots are a name", "spiffe://td/...", Ok("/...")),
            ("empty", "", Err(E::Empty)),
            ("no scheme", "example.org/web", Err(E::Scheme)),
            ("other scheme", "https://example.org", Err(E::Scheme)),
            ("capital scheme", "SPIFFE://example.org", Err(E::Scheme)),
            ("one slash", "spiffe:/example.org", Err(E::Scheme)),
            ("no trust domain", "spiffe://", Err(E::NoTrustDomain)),
            ("no trust domain, path", "spiffe:///web", Err(E::NoTrustDomain)),
            ("capital trust domain", "spiffe://Example.org/web", Err(E::TrustDomainCharacter)),
            ("port", "spiffe://example.org:80/web", Err(E::TrustDomainCharacter)),
            ("user", "spiffe://user@example.org/web", Err(E::TrustDomainCharacter)),
            ("query before path", "spiffe://example.org?q", Err(E::TrustDomainCharacter)),
            ("query", "spiffe://example.org/web?q", Err(E::PathCharacter)),
            ("percent", "spiffe://example.org/%41", Err(E::PathCharacter)),
            ("not ascii", "spiffe://example.org/wéb", Err(E::PathCharacter)),
            ("nul", "spiffe://example.org/w\0b", Err(E::PathCharacter)),
            ("empty segment", "spiffe://example.org//web", Err(E::EmptySegment)),
            ("dot", "spiffe://example.org/./web", Err(E::DotSegment)),
            ("dot dot", "spiffe://example.org/a/..", Err(E::DotSegment)),
            ("trailing slash", "spiffe://example.org/web/", Err(E::TrailingSlash)),
            ("only a slash", "spiffe://example.org/", Err(E::TrailingSlash)),
            ("too long", long.as_str(), Err(E::TooLong(2048))),
        ] {
            assert_eq!(SpiffeId::parse(text).as_ref().map(SpiffeId::path).map_err(|e| *e), want, "{case}");
        }
        assert_eq!(TrustDomain::parse(&long_td), Err(E::TooLong(255)));
        assert_eq!(TrustDomain::parse("spiffe://td/x").unwrap().name(), "td");
        assert_eq!(TrustDomain::parse(""), Err(E::NoTrustDomain));
        assert_eq!(SpiffeId::parse_workload("spiffe://td"), Err(E::NoPath));
    }

    #[test]
    fn spire_keeps_its_own_space() {
        for (text, want) in [
            ("spiffe://td/spire", true),
            ("spiffe://td/spire/agent/x", true),
            ("spiffe://td/spires", false),
            ("spiffe://td/x/spire", false),
        ] {
            assert_eq!(SpiffeId::parse(text).unwrap().is_reserved(), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_is_its_own_text(text in "(spiffe://)?[a-zA-Z0-9./_@:-]{0,40}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert_eq!(format!("{}{}", id.trust_domain().id_string(), id.path()), text);
            }
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,64}") {
            let _ = SpiffeId::parse(&text).is_ok();
            let _ = TrustDomain::parse(&text).is_ok();
        }
    }
}
