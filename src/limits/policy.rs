//! Which rule holds for a key, and whose bucket it is charged to.
//!
//! Three layers, the most specific wins: the stage's default, then its rule for the method, then the override
//! that matches the key. Of several overrides that match, the one whose pattern says more wins
//! ([`CallerPattern`] and [`IdPattern`](super::id_pattern::IdPattern)
//! state the order); of two with the same pattern, the one that names the method. Two overrides that could both
//! be meant are an error when they are put together. An override is whole: it takes nothing from the layers
//! below, but for its rule if it only shares a bucket.
//!
//! Patterns are matched at each call and allocate nothing; there may be [`MAX_OVERRIDES`] in a stage.

use std::{cmp::Ordering, sync::Arc};

use super::{
    caller_pattern::CallerPattern,
    method::{Method, PerMethod},
    pattern::Pattern,
    rule::Rule,
};

/// The most overrides in one stage: each call may look at all of them.
pub const MAX_OVERRIDES: usize = 1024;

/// Which methods an override is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Methods {
    /// All.
    #[default]
    All,
    /// These.
    Only(PerMethod<bool>),
}

impl Methods {
    /// These methods.
    pub fn only(methods: &[Method]) -> Self {
        let mut these = PerMethod::all(false);
        methods.iter().for_each(|method| these.set(*method, true));
        Self::Only(these)
    }

    fn has(self, method: Method) -> bool {
        match self {
            Self::All => true,
            Self::Only(these) => *these.get(method),
        }
    }

    fn meets(self, other: Self) -> bool {
        Method::ALL.into_iter().any(|method| self.has(method) && other.has(method))
    }
}

/// Whether the keys that an override matches have a bucket each, and under which rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Share<R> {
    /// Each key its own, under this rule.
    Each(R),
    /// One for all of them; with a mask, one for each text in the places of its `{names}`. Without a rule that
    /// of the method, or the default, holds.
    Together(Option<R>),
}

/// A rule for the keys that match.
#[derive(Clone, Debug, PartialEq)]
pub struct Override<P, R = Rule> {
    pattern: P,
    methods: Methods,
    share: Share<R>,
}

impl<P: Pattern, R> Override<P, R> {
    /// For the keys of `pattern`, in calls of `methods`.
    ///
    /// # Errors
    /// [`MaskWithoutShare`] when the pattern has names, and nothing is shared.
    pub fn new(pattern: P, methods: Methods, share: Share<R>) -> Result<Self, MaskWithoutShare> {
        if pattern.has_names() && matches!(share, Share::Each(_)) {
            return Err(MaskWithoutShare);
        }
        Ok(Self { pattern, methods, share })
    }

    /// The keys it is for.
    pub fn pattern(&self) -> &P {
        &self.pattern
    }

    /// Sorts by pattern, and of equal ones the one that names its methods first.
    fn compare(&self, other: &Self) -> Ordering {
        let all = |it: &Self| it.methods == Methods::All;
        self.pattern.compare(&other.pattern).then(all(self).cmp(&all(other)))
    }

    fn contradicts(&self, other: &Self) -> bool {
        self.compare(other).is_eq() && self.methods.meets(other.methods) && self.pattern.meets(&other.pattern)
    }
}

/// A pattern with a `{name}` whose keys have a bucket each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("has a {{name}}, which makes SPIFFE IDs share a bucket: set share = true, or write *")]
pub struct MaskWithoutShare;

/// Overrides of which none contradicts another, sorted so that the first that matches is the one that is meant.
#[derive(Clone, Debug, PartialEq)]
pub struct Overrides<P, R = Rule>(Vec<Override<Arc<P>, R>>);

impl<P, R> Default for Overrides<P, R> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<P, R> Overrides<P, R> {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl<P: Pattern, R> Overrides<P, R> {
    /// Puts these together.
    ///
    /// # Errors
    /// [`OverridesError`] when there are too many, or either of two could be meant.
    pub fn new(mut overrides: Vec<Override<P, R>>) -> Result<Self, OverridesError> {
        if overrides.len() > MAX_OVERRIDES {
            return Err(OverridesError::TooMany(overrides.len()));
        }
        for (second, it) in overrides.iter().enumerate() {
            if let Some(first) = overrides.iter().take(second).position(|other| it.contradicts(other)) {
                return Err(OverridesError::Conflict { first, second });
            }
        }
        overrides.sort_by(Override::compare);
        let shared = |Override { pattern, methods, share }: Override<P, R>| Override {
            pattern: Arc::new(pattern),
            methods,
            share,
        };
        Ok(Self(overrides.into_iter().map(shared).collect()))
    }

    /// The patterns, in the order in which they are looked at.
    pub fn patterns(&self) -> impl Iterator<Item = &P> {
        self.0.iter().map(|it| it.pattern.as_ref())
    }

    /// The rule for `subject`, of overrides whose keys have a bucket each and that are for every method.
    pub(super) fn rule_of(&self, subject: &P::Subject) -> Option<&R> {
        self.0.iter().find(|it| it.pattern.matches(subject)).and_then(|it| match &it.share {
            Share::Each(rule) => Some(rule),
            Share::Together(rule) => rule.as_ref(),
        })
    }
}

impl<R> Overrides<CallerPattern, R> {
    /// For callers that have a bucket each, in calls of every method.
    pub(super) fn of_callers(rules: Vec<(CallerPattern, R)>) -> Result<Self, OverridesError> {
        let each = |(pattern, rule)| Override { pattern, methods: Methods::All, share: Share::Each(rule) };
        Self::new(rules.into_iter().map(each).collect())
    }
}

/// Why overrides do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OverridesError {
    /// More than [`MAX_OVERRIDES`].
    #[error("{0} overrides must be at most {most}", most = MAX_OVERRIDES)]
    TooMany(usize),
    /// Some key matches two, and neither says more. By their places in the list.
    #[error(
        "override {second} contradicts override {first}: some callers match both, and neither is more specific"
    )]
    Conflict {
        /// The one that is there already.
        first: usize,
        /// The one that contradicts it.
        second: usize,
    },
}

/// The rules of a stage, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers<P> {
    /// For every method and key.
    pub default: Rule,
    /// For a method, in place of the default.
    pub methods: PerMethod<Option<Rule>>,
    /// For keys that match.
    pub overrides: Overrides<P>,
}

/// What holds for a call.
#[derive(Debug)]
pub(super) struct Choice<'a, P> {
    pub(super) rule: &'a Rule,
    /// The pattern whose keys share a bucket, if the key's are so.
    pub(super) shared: Option<&'a Arc<P>>,
}

impl<P> Clone for Choice<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Choice<'_, P> {}

impl<P> Layers<P> {
    /// One rule for all.
    pub fn new(default: Rule) -> Self {
        Self { default, methods: PerMethod::default(), overrides: Overrides::default() }
    }
}

impl<P: Pattern> Layers<P> {
    /// The rule that holds for `subject` and `method`, and whether it shares its bucket.
    pub(super) fn choose(&self, subject: &P::Subject, method: Method) -> Choice<'_, P> {
        let found = self.overrides.0.iter().find(|it| it.methods.has(method) && it.pattern.matches(subject));
        self.choice(found, method)
    }

    /// What holds for the bucket that all keys of `pattern` share, if they do.
    pub(super) fn of_shared(&self, pattern: &P, method: Method) -> Option<Choice<'_, P>>
    where
        P: PartialEq,
    {
        let same = |it: &&Override<Arc<P>>| it.methods.has(method) && *it.pattern == *pattern;
        let choice = self.choice(Some(self.overrides.0.iter().find(same)?), method);
        choice.shared.is_some().then_some(choice)
    }

    fn choice<'a>(&'a self, found: Option<&'a Override<Arc<P>>>, method: Method) -> Choice<'a, P> {
        let of_method = || self.methods.get(method).as_ref().unwrap_or(&self.default);
        match found.map(|it| (&it.share, &it.pattern)) {
            None => Choice { rule: of_method(), shared: None },
            Some((Share::Each(rule), _)) => Choice { rule, shared: None },
            Some((Share::Together(rule), pattern)) => {
                Choice { rule: rule.as_ref().unwrap_or_else(of_method), shared: Some(pattern) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        identity::SpiffeId,
        limits::{
            bucket::{Per, Quota},
            caller::CallerKey,
            id_pattern::IdPattern,
            rule::{Costs, Limit},
            schedule::Schedule,
        },
    };

    fn rule(rate: u32) -> Rule {
        let limit = Limit::Quota(Quota::new(f64::from(rate), Per::Second, 1000).unwrap());
        Rule::new(limit, Costs::OF_CALLERS, Schedule::default()).unwrap()
    }

    fn caller(text: &str) -> CallerPattern {
        CallerPattern::parse(text, |name| Ok((name == "build").then_some(1001))).unwrap()
    }

    fn over<P: Pattern>(pattern: P, rate: u32) -> Override<P> {
        Override::new(pattern, Methods::All, Share::Each(rule(rate))).unwrap()
    }

    const POD: &str = "0f9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6";

    #[test]
    fn the_most_specific_caller_override_wins() {
        let jwt = Methods::only(&[Method::FetchJwtSvid]);
        let jwt = Override::new(caller("uid:1000-1999"), jwt, Share::Each(rule(9))).unwrap();
        let mut layers = Layers {
            overrides: Overrides::new(vec![
                over(caller("uid:*"), 3),
                over(caller("uid:1000-1999"), 4),
                over(caller("user:build"), 6),
                over(caller("uid:1000-1099"), 5),
                over(caller("pod:*"), 7),
                over(caller(&format!("pod:{POD}")), 8),
                jwt,
            ])
            .unwrap(),
            ..Layers::new(rule(1))
        };
        layers.methods.set(Method::FetchJwtSvid, Some(rule(2)));
        let pod = CallerKey::parse_pod(POD).unwrap();
        for (case, key, method, rate) in [
            ("any uid", CallerKey::Uid(7), Method::FetchX509Svid, 3),
            ("range", CallerKey::Uid(1500), Method::FetchX509Svid, 4),
            ("range, method", CallerKey::Uid(1500), Method::FetchJwtSvid, 9),
            ("shorter range before method", CallerKey::Uid(1050), Method::FetchJwtSvid, 5),
            ("one", CallerKey::Uid(1001), Method::FetchJwtSvid, 6),
            ("any pod", CallerKey::Pod([0; 16]), Method::FetchJwtSvid, 7),
            ("pod", pod, Method::FetchJwtSvid, 8),
        ] {
            assert_eq!(*layers.choose(&key, method).rule, rule(rate), "{case}");
        }
        layers.overrides = Overrides::new(vec![over(caller("pod:*"), 7)]).unwrap();
        for (case, method, rate) in
            [("method", Method::FetchJwtSvid, 2), ("default", Method::FetchX509Svid, 1)]
        {
            assert_eq!(*layers.choose(&CallerKey::Uid(7), method).rule, rule(rate), "{case}");
        }
    }

    #[test]
    fn the_most_specific_identity_override_wins() {
        let pattern = |text: &str| IdPattern::parse(text).unwrap();
        let layers = Layers {
            overrides: Overrides::new(vec![
                over(pattern("spiffe://td/ns/**"), 2),
                over(pattern("spiffe://td/ns/*/sa/*"), 3),
                over(pattern("spiffe://td/ns/prod/sa/*"), 4),
                over(pattern("spiffe://td/ns/*/sa/batch"), 5),
                over(pattern("spiffe://td/ns/prod/sa/b*"), 6),
                over(pattern("spiffe://td/ns/prod/sa/bat*"), 7),
                over(pattern("spiffe://td/ns/prod/sa/batch-one"), 8),
            ])
            .unwrap(),
            ..Layers::new(rule(1))
        };
        for (id, rate) in [
            ("spiffe://td/other", 1),
            ("spiffe://td/ns/x", 2),
            ("spiffe://td/ns/test/sa/web", 3),
            ("spiffe://td/ns/prod/sa/web", 4),
            ("spiffe://td/ns/test/sa/batch", 5),
            ("spiffe://td/ns/prod/sa/b", 6),
            ("spiffe://td/ns/prod/sa/batch", 7),
            ("spiffe://td/ns/prod/sa/batch-one", 8),
        ] {
            let id = SpiffeId::parse(id).unwrap();
            assert_eq!(*layers.choose(&id, Method::FetchJwtSvid).rule, rule(rate), "{id}");
        }
    }

    #[test]
    fn contradictions_name_both() {
        let both = OverridesError::Conflict { first: 0, second: 1 };
        let conflicts =
            |a: &str, b: &str| Overrides::new([a, b].map(|text| over(caller(text), 1)).into()).map(drop);
        for (case, a, b, conflict) in [
            ("twice", "uid:5", "uid:5", true),
            ("by name", "uid:1001", "user:build", true),
            ("equal ranges that meet", "uid:10-19", "uid:15-24", true),
            ("equal ranges apart", "uid:10-19", "uid:20-29", false),
            ("shorter in longer", "uid:10-19", "uid:15-17", false),
            ("uids and pods", "uid:*", "pod:*", false),
        ] {
            assert_eq!(conflicts(a, b), if conflict { Err(both) } else { Ok(()) }, "{case}");
        }
        let ids = |a: &str, b: &str| {
            Overrides::new([a, b].map(|text| over(IdPattern::parse(text).unwrap(), 1)).into()).map(drop)
        };
        for (case, a, b, conflict) in [
            ("twice", "spiffe://td/a", "spiffe://td/a", true),
            ("a name is any", "spiffe://td/a/*", "spiffe://td/a/*", true),
            ("parts that meet", "spiffe://td/a*", "spiffe://td/*b", true),
            ("parts that do not", "spiffe://td/a*", "spiffe://td/b*", false),
            ("one says more", "spiffe://td/a*", "spiffe://td/*bc", false),
            ("from the left", "spiffe://td/*/b", "spiffe://td/a/*", false),
            ("other lengths", "spiffe://td/*", "spiffe://td/*/*", false),
        ] {
            assert_eq!(ids(a, b), if conflict { Err(both) } else { Ok(()) }, "{case}");
        }
    }

    #[test]
    fn overrides_that_cannot_be_meant_are_errors() {
        let many = vec![over(caller("uid:5"), 1); 1025];
        assert_eq!(Overrides::new(many), Err(OverridesError::TooMany(1025)));
        let named = || IdPattern::parse("spiffe://td/{ns}/x").unwrap();
        assert_eq!(Override::new(named(), Methods::All, Share::Each(rule(1))), Err(MaskWithoutShare));
        assert!(Override::<_, Rule>::new(named(), Methods::All, Share::Together(None)).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// If an identity matches two patterns, one says more, or the pair is a conflict.
        #[test]
        fn two_that_match_are_ordered_or_conflict(
            a in any::<IdPattern>(),
            b in any::<IdPattern>(),
            path in prop::collection::vec("[ab]{1,4}", 1..4),
        ) {
            let id = SpiffeId::parse(&format!("spiffe://td/{}", path.join("/"))).unwrap();
            if a.matches(&id) && b.matches(&id) {
                prop_assert!(a.meets(&b) && b.meets(&a));
            }
            prop_assert_eq!(a.compare(&b), b.compare(&a).reverse());
            match Overrides::new(vec![over(a.clone(), 1), over(b.clone(), 2)]) {
                Ok(overrides) => {
                    let layers = Layers { overrides, ..Layers::new(rule(9)) };
                    let first = if a.compare(&b).is_lt() { 1 } else { 2 };
                    let rate = match (a.matches(&id), b.matches(&id)) {
                        (true, true) => first,
                        (true, false) => 1,
                        (false, true) => 2,
                        (false, false) => return Ok(()),
                    };
                    prop_assert_eq!(layers.choose(&id, Method::FetchJwtSvid).rule, &rule(rate));
                }
                Err(err) => {
                    let conflict = matches!(err, OverridesError::Conflict { .. });
                    prop_assert!(conflict && a.compare(&b).is_eq(), "{err}");
                }
            }
        }
    }
}
