//! Selectors: what an attestor found out about a process, as `type:value`.

use std::{collections::BTreeSet, fmt};

/// One selector, for example `unix:uid:1000`: the type is everything before the first colon, the value the rest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    kind: Box<str>,
    value: Box<str>,
}

/// What was attested of a process, or what an entry asks for. A set: order and repetition carry no meaning.
pub type Selectors = BTreeSet<Selector>;

/// Why a text is no selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// There is no colon.
    #[error("selector must be of the form type:value")]
    NoColon,
    /// Nothing stands before the first colon.
    #[error("selector type cannot be empty")]
    NoType,
    /// Nothing stands after the first colon.
    #[error("selector value cannot be empty")]
    NoValue,
}

impl Selector {
    /// A selector of a type that is known not to be empty and to hold no colon, as attestors make them.
    pub fn new(kind: &'static str, value: impl Into<Box<str>>) -> Self {
        debug_assert!(!kind.is_empty() && !kind.contains(':'), "an attestor's type is its name");
        Self { kind: kind.into(), value: value.into() }
    }

    /// Parses `type:value`; the value may hold further colons.
    ///
    /// # Errors
    /// [`SelectorError`] when a part is missing.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let (kind, value) = text.split_once(':').ok_or(SelectorError::NoColon)?;
        match (kind, value) {
            ("", _) => Err(SelectorError::NoType),
            (_, "") => Err(SelectorError::NoValue),
            _ => Ok(Self { kind: kind.into(), value: value.into() }),
        }
    }

    /// The attestor's name: `unix`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What it found: `uid:1000`.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.value)
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_splits_at_the_first_colon() {
        for (text, want) in [
            ("unix:uid:1000", Ok(("unix", "uid:1000"))),
            ("k8s:pod-label:a:b", Ok(("k8s", "pod-label:a:b"))),
            ("unix", Err(SelectorError::NoColon)),
            ("", Err(SelectorError::NoColon)),
            (":uid:1", Err(SelectorError::NoType)),
            ("unix:", Err(SelectorError::NoValue)),
        ] {
            let got = Selector::parse(text);
            assert_eq!(got.as_ref().map(|s| (s.kind(), s.value())).map_err(|e| *e), want, "{text}");
        }
    }
}
