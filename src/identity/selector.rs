//! Selectors: what an attestor found out about a process, as `type:value`.

use std::{cmp::Ordering, collections::BTreeSet, fmt, ops::Deref};

/// One selector, for example `unix:uid:1000`: the type is everything before the first colon, the value the rest.
/// They are ordered by type, then by value.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Selector(
    /// Both, in one piece of memory: there may be a million of them.
    Box<str>,
);

/// What was attested of a process. A set: order and repetition carry no meaning.
pub type Selectors = BTreeSet<Selector>;

/// What an entry asks for: a set as well, sorted, and never changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AskedSelectors(Box<[Selector]>);

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
    pub fn new(kind: &'static str, value: impl AsRef<str>) -> Self {
        debug_assert!(!kind.is_empty() && !kind.contains(':'), "an attestor's type is its name");
        Self([kind, ":", value.as_ref()].concat().into())
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
            _ => Ok(Self(text.into())),
        }
    }

    /// The attestor's name: `unix`.
    pub fn kind(&self) -> &str {
        self.parts().0
    }

    /// What it found: `uid:1000`.
    pub fn value(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        // There is a colon.
        self.0.split_once(':').unwrap_or_default()
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl AskedSelectors {
    /// Whether all of them are among those that were `found`. That is so of none at all.
    pub fn is_subset(&self, found: &Selectors) -> bool {
        self.0.iter().all(|selector| found.contains(selector))
    }

    /// Those that were not `found`.
    pub fn difference<'a>(&'a self, found: &'a Selectors) -> impl Iterator<Item = &'a Selector> {
        self.0.iter().filter(|selector| !found.contains(selector))
    }
}

impl Deref for AskedSelectors {
    type Target = [Selector];

    fn deref(&self) -> &[Selector] {
        &self.0
    }
}

impl FromIterator<Selector> for AskedSelectors {
    fn from_iter<T: IntoIterator<Item = Selector>>(selectors: T) -> Self {
        let mut selectors: Vec<Selector> = selectors.into_iter().collect();
        selectors.sort_unstable();
        selectors.dedup();
        Self(selectors.into())
    }
}

impl<'a> IntoIterator for &'a AskedSelectors {
    type Item = &'a Selector;
    type IntoIter = std::slice::Iter<'a, Selector>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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

    #[test]
    fn what_is_asked_for_is_a_set_in_the_order_of_types() {
        let parse = |text: &str| Selector::parse(text).unwrap();
        // As one text, the second would come first.
        let sorted = ["k8s:ns:b", "k8s-x:ns:a", "unix:uid:1", "unix:uid:2"].map(parse);
        let mixed = ["unix:uid:2", "k8s-x:ns:a", "unix:uid:1", "unix:uid:2", "k8s:ns:b"].map(parse);
        let asked: AskedSelectors = mixed.into_iter().collect();
        assert_eq!(&*asked, &sorted);
        let found: Selectors = ["unix:uid:1", "k8s:ns:b"].map(parse).into();
        assert!(!asked.is_subset(&found));
        assert!(asked.difference(&found).eq(["k8s-x:ns:a", "unix:uid:2"].map(parse).iter()));
        assert!(asked.is_subset(&sorted.into()));
        assert!(AskedSelectors::default().is_subset(&found));
    }
}
