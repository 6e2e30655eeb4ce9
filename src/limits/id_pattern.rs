//! Patterns of SPIFFE IDs, place by place. Matching allocates nothing.

use std::{borrow::Cow, cmp::Ordering, fmt};

use super::pattern::{Pattern, PatternError};
use crate::identity::{SpiffeId, TrustDomain};

/// One place between slashes. In the order of how much it says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Segment {
    /// This text.
    Literal(Box<str>),
    /// A text with `*` in it, each for any number of characters.
    Glob(Box<str>),
    /// `*`: any text.
    Any,
    /// `{name}`: any text, and a shared bucket is one for each.
    Name(Box<str>),
    /// `**`, at the end only: one or more further places.
    Rest,
}

impl Segment {
    /// The first number says the kind, the second how many characters are given.
    fn says(&self) -> (u8, usize) {
        match self {
            Self::Literal(_) => (3, 0),
            Self::Glob(glob) => (2, glob.bytes().filter(|b| *b != b'*').count()),
            Self::Any | Self::Name(_) => (1, 0),
            Self::Rest => (0, 0),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Literal(literal) => **literal == *text,
            Self::Glob(glob) => glob_matches(glob.as_bytes(), text.as_bytes()),
            Self::Any | Self::Name(_) | Self::Rest => true,
        }
    }

    fn as_glob(&self) -> &str {
        match self {
            Self::Literal(text) | Self::Glob(text) => text,
            Self::Any | Self::Name(_) | Self::Rest => "*",
        }
    }

    fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Literal(text) | Self::Glob(text) => Cow::Borrowed(text),
            Self::Any => Cow::Borrowed("*"),
            Self::Name(name) => Cow::Owned(format!("{{{name}}}")),
            Self::Rest => Cow::Borrowed("**"),
        }
    }
}

/// SPIFFE IDs, as `spiffe://example.org/ns/*/sa/batch`: one pattern per place between slashes, the trust domain
/// written out.
///
/// A place is a text; or a text with `*` for any characters; or `*` alone; or, last, `**` for one or more
/// places. With [`Share::Together`](super::policy::Share::Together) the pattern is a *mask*: identities that
/// match share one bucket, or one for each text in the places written `{name}`. Which of two says more is seen
/// at the first place where they differ in kind, from the left: a text, then text with `*` (of two, the one
/// that gives more characters), then `*` or `{name}`, then `**`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdPattern {
    trust_domain: TrustDomain,
    segments: Box<[Segment]>,
}

impl IdPattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// [`PatternError::Id`] when no SPIFFE ID can match, or every one of the trust domain would.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let bad = |why| PatternError::Id { pattern: text.into(), why };
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| bad("it must begin with spiffe://"))?;
        let (name, path) =
            rest.split_once('/').ok_or_else(|| bad("it must have a path: spiffe://example.org/..."))?;
        let trust_domain = TrustDomain::parse(name)
            .map_err(|_why| bad("the trust domain must be written out, in lower case"))?;
        let mut segments = Vec::new();
        for segment in path.split('/') {
            if segments.last() == Some(&Segment::Rest) {
                return Err(bad("** must be the last place"));
            }
            segments.push(Self::segment(segment).map_err(bad)?);
        }
        if segments == [Segment::Rest] {
            return Err(bad("it matches every identity: set the default or the method in its place"));
        }
        Ok(Self { trust_domain, segments: segments.into() })
    }

    fn segment(text: &str) -> Result<Segment, &'static str> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if let Some(name) = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
            let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            return fits.then(|| Segment::Name(name.into())).ok_or("a {name} must be letters, digits and _");
        }
        match text {
            "" => Err("it matches nothing: a place between slashes cannot be empty"),
            "." | ".." => Err("it matches nothing: a place cannot be a dot or two"),
            "*" => Ok(Segment::Any),
            "**" => Ok(Segment::Rest),
            text if text.contains("**") => Err("** must stand alone, as the last place"),
            text if !text.bytes().all(|b| plain(b) || b == b'*') => Err(
                "it matches nothing: a place is letters, digits, dots, dashes, underscores, and * for any of them",
            ),
            text if text.contains('*') => Ok(Segment::Glob(text.into())),
            text => Ok(Segment::Literal(text.into())),
        }
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The texts of `id` in the places of the pattern's names.
    pub(super) fn names<'a>(&'a self, id: &'a SpiffeId) -> impl Iterator<Item = &'a str> {
        let path = id.path().strip_prefix('/').unwrap_or_default();
        self.segments
            .iter()
            .zip(path.split('/'))
            .filter(|(segment, _)| matches!(segment, Segment::Name(_)))
            .map(|(_, text)| text)
    }

    /// The pattern with the texts of `id` in the places of its names.
    pub(super) fn write_masked(&self, id: &SpiffeId, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = id.path().strip_prefix('/').unwrap_or_default();
        f.write_str(&self.trust_domain.id_string())?;
        for (segment, text) in self.segments.iter().zip(path.split('/')) {
            match segment {
                Segment::Name(_) => write!(f, "/{text}")?,
                segment => write!(f, "/{}", segment.text())?,
            }
        }
        Ok(())
    }
}

impl Pattern for IdPattern {
    type Subject = SpiffeId;

    fn matches(&self, id: &SpiffeId) -> bool {
        if !id.is_member_of(&self.trust_domain) {
            return false;
        }
        let Some(path) = id.path().strip_prefix('/') else { return false };
        let mut texts = path.split('/');
        for segment in &self.segments {
            let Some(text) = texts.next() else { return false };
            if *segment == Segment::Rest {
                return true;
            }
            if !segment.matches(text) {
                return false;
            }
        }
        texts.next().is_none()
    }

    fn meets(&self, other: &Self) -> bool {
        fn meet(a: &[Segment], b: &[Segment]) -> bool {
            match (a, b) {
                ([], []) => true,
                ([Segment::Rest], [_, ..]) | ([_, ..], [Segment::Rest]) => true,
                ([a, more_a @ ..], [b, more_b @ ..]) => {
                    globs_meet(a.as_glob().as_bytes(), b.as_glob().as_bytes()) && meet(more_a, more_b)
                }
                ([], [_, ..]) | ([_, ..], []) => false,
            }
        }
        self.trust_domain == other.trust_domain && meet(&self.segments, &other.segments)
    }

    fn compare(&self, other: &Self) -> Ordering {
        let says = |pattern: &Self| pattern.segments.iter().map(Segment::says).collect::<Vec<_>>();
        says(other).cmp(&says(self))
    }

    fn has_names(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment, Segment::Name(_)))
    }
}

impl fmt::Display for IdPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.trust_domain.id_string())?;
        self.segments.iter().try_for_each(|segment| write!(f, "/{}", segment.text()))
    }
}

/// Whether `text` has the form of `glob`, where `*` stands for any bytes. Remembers the last `*` only: what an
/// earlier one takes more, the last one can take in its place.
fn glob_matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(byte) = text.get(t) {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, t));
                g += 1;
            }
            Some(wanted) if wanted == byte => {
                g += 1;
                t += 1;
            }
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                g = at + 1;
                t = taken + 1;
            }
        }
    }
    glob.iter().skip(g).all(|b| *b == b'*')
}

/// Whether some text of one byte or more has the form of both.
fn globs_meet(a: &[u8], b: &[u8]) -> bool {
    // Row by row over `a`: whether what is left of `a` and what is left of `b` can be the same text.
    let ends = |glob: &[u8]| glob.iter().all(|b| *b == b'*');
    let mut below: Vec<bool> = (0..=b.len()).map(|j| ends(b.get(j..).unwrap_or_default())).collect();
    for i in (0..a.len()).rev() {
        let left = a.get(i).copied().unwrap_or_default();
        let mut row = vec![false; b.len() + 1];
        for j in (0..=b.len()).rev() {
            let under = |at: usize| below.get(at).copied().unwrap_or_default();
            let beside = row.get(j + 1).copied().unwrap_or_default();
            let meets = match (left, b.get(j).copied()) {
                (b'*', None) => under(j),
                (b'*', Some(_)) => under(j) || beside,
                (_, Some(b'*')) => beside || under(j),
                (left, Some(right)) => left == right && under(j + 1),
                (_, None) => false,
            };
            if let Some(cell) = row.get_mut(j) {
                *cell = meets;
            }
        }
        below = row;
    }
    below.first().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn identities_are_matched_place_by_place() {
        for (case, pattern, id, matches) in [
            ("literal", "spiffe://td/a/b", "spiffe://td/a/b", true),
            ("shorter", "spiffe://td/a/b", "spiffe://td/a", false),
            ("longer", "spiffe://td/a", "spiffe://td/a/b", false),
            ("other trust domain", "spiffe://td/a", "spiffe://td2/a", false),
            ("any place", "spiffe://td/ns/*/sa/batch", "spiffe://td/ns/prod/sa/batch", true),
            ("any place is one", "spiffe://td/ns/*/sa/batch", "spiffe://td/ns/a/b/sa/batch", false),
            ("part", "spiffe://td/web-*", "spiffe://td/web-1", true),
            ("part may be empty", "spiffe://td/web*", "spiffe://td/web", true),
            ("two parts", "spiffe://td/a*b*c", "spiffe://td/aXbbYc", true),
            ("two parts, not", "spiffe://td/a*b*c", "spiffe://td/aXbbY", false),
            ("backtrack", "spiffe://td/*ab", "spiffe://td/aabab", true),
            ("rest", "spiffe://td/ns/**", "spiffe://td/ns/a/b/c", true),
            ("rest is not nothing", "spiffe://td/ns/**", "spiffe://td/ns", false),
            ("name", "spiffe://td/ns/{ns}/**", "spiffe://td/ns/a/sa/b", true),
            ("no path", "spiffe://td/*", "spiffe://td", false),
            ("case counts", "spiffe://td/Web", "spiffe://td/web", false),
        ] {
            let pattern = IdPattern::parse(pattern).unwrap();
            assert_eq!(pattern.matches(&SpiffeId::parse(id).unwrap()), matches, "{case}");
        }
    }

    #[test]
    fn patterns_that_match_nothing_or_everything_are_errors() {
        for (case, text) in [
            ("everything", "spiffe://td/**"),
            ("no scheme", "td/a"),
            ("no path", "spiffe://td"),
            ("empty path", "spiffe://td/"),
            ("empty place", "spiffe://td/a//b"),
            ("end", "spiffe://td/a/"),
            ("trust domain pattern", "spiffe://*/a"),
            ("capital trust domain", "spiffe://TD/a"),
            ("dots", "spiffe://td/a/.."),
            ("rest inside", "spiffe://td/**/a"),
            ("rest in a place", "spiffe://td/a**"),
            ("space", "spiffe://td/a b"),
            ("percent", "spiffe://td/%41"),
            ("half a name", "spiffe://td/{ns"),
            ("name in a place", "spiffe://td/x{ns}"),
            ("empty name", "spiffe://td/{}"),
        ] {
            assert!(matches!(IdPattern::parse(text), Err(PatternError::Id { .. })), "{case}");
        }
    }

    fn segment() -> impl Strategy<Value = String> {
        prop_oneof![2 => "[ab*]{1,4}", 1 => Just("*".to_owned()), 1 => "[ab]{1,3}"]
            .prop_filter("** is another thing", |text| !text.contains("**"))
    }

    impl Arbitrary for IdPattern {
        type Parameters = ();
        type Strategy = BoxedStrategy<Self>;

        fn arbitrary_with((): ()) -> BoxedStrategy<Self> {
            let all = (prop::collection::vec(segment(), 1..3), any::<bool>());
            all.prop_filter_map("matches all", |(places, rest)| {
                let rest = if rest { "/**" } else { "" };
                Self::parse(&format!("spiffe://td/{}{rest}", places.join("/"))).ok()
            })
            .boxed()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Globs meet when some text matches both: tried with every text of up to five letters.
        #[test]
        fn globs_meet_when_a_text_matches_both(a in "[ab*]{1,4}", b in "[ab*]{1,4}") {
            let mut texts = vec![String::new()];
            for _ in 0..5 {
                let longer: Vec<String> = texts.iter().flat_map(|text| ["a", "b"].map(|c| format!("{text}{c}"))).collect();
                texts.extend(longer);
            }
            // What two globs have in common is at most as long as both together.
            let both = texts.iter().any(|text| {
                glob_matches(a.as_bytes(), text.as_bytes()) && glob_matches(b.as_bytes(), text.as_bytes())
            });
            if both {
                prop_assert!(globs_meet(a.as_bytes(), b.as_bytes()));
            } else if a.len() + b.len() <= 5 {
                prop_assert!(!globs_meet(a.as_bytes(), b.as_bytes()));
            }
        }

        #[test]
        fn a_pattern_is_its_own_text(pattern in any::<IdPattern>()) {
            prop_assert_eq!(IdPattern::parse(&pattern.to_string()).unwrap(), pattern);
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,40}") {
            let _ = IdPattern::parse(&text).is_ok();
            let _ = IdPattern::parse(&format!("spiffe://td/{text}")).is_ok();
        }
    }
}
