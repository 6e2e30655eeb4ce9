//! Which rule holds for a key, and whose bucket it is charged to.
//!
//! Three layers, the most specific wins: the stage's default, then its rule for the method, then the override that matches
//! the key. Of several overrides that match, the one whose pattern says more wins ([`CallerPattern`] and
//! [`IdPattern`] state the order); of two with the same pattern, the one that names the method. Two overrides that could
//! both be meant are an error that names both, when the settings are read; so is a pattern that matches nothing or everything.
//! An override is whole: it takes nothing from the layers below, but for its rule if it has none and only shares a bucket.
//!
//! Patterns are matched at each call and allocate nothing; there may be [`MAX_OVERRIDES`] in a stage.

use std::{borrow::Cow, fmt, ops::RangeInclusive, sync::Arc};

use super::{
    bucket::Quota,
    caller::CallerKey,
    method::Method,
    schedule::{Schedule, ScheduleError},
};
use crate::identity::{SpiffeId, TrustDomain};

/// The most overrides in one stage: each call may look at all of them.
pub const MAX_OVERRIDES: usize = 1024;

/// What may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// As much as a bucket of this size gives.
    Quota(Quota),
    /// All; it still counts for what is shared by the node.
    Unlimited,
    /// All; it is charged to nobody, the node included.
    Exempt,
    /// Nothing.
    Block,
}

/// What calls cost, in tokens. Charged to the caller's bucket and to the identity's alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// A call that is answered from memory; held when the call begins. At least 1.
    pub answer: u32,
    /// A call for which something was signed, in place of `answer`. At least `answer`.
    pub signature: u32,
    /// A call whose caller could not be attested, in place of `answer`; the caller's bucket alone. At least `answer`.
    pub failed_attestation: u32,
}

impl Default for Costs {
    fn default() -> Self {
        Self { answer: 1, signature: 2, failed_attestation: 5 }
    }
}

/// What holds for a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// What may pass, outside of the windows.
    pub limit: Limit,
    /// What calls cost.
    pub costs: Costs,
    /// Refusals are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
    /// Windows of time in which another limit holds. UTC.
    pub schedule: Schedule<Limit>,
}

impl Rule {
    /// This limit at all times, at the usual costs.
    pub fn new(limit: Limit) -> Self {
        Self { limit, costs: Costs::default(), dry_run: false, schedule: Schedule::default() }
    }

    fn limits(&self) -> impl Iterator<Item = Limit> {
        std::iter::once(self.limit).chain(self.schedule.values().copied())
    }

    /// Costs must be ordered, and no call may cost more than a bucket ever holds.
    fn check(&self, place: &str) -> Result<(), PolicyError> {
        let Costs { answer, signature, failed_attestation } = self.costs;
        if answer == 0 || signature < answer || failed_attestation < answer {
            return Err(PolicyError::Costs { place: place.into(), costs: self.costs });
        }
        for limit in self.limits() {
            let Limit::Quota(quota) = limit else { continue };
            let cost = signature.max(failed_attestation);
            if cost > quota.burst() {
                return Err(PolicyError::CostAboveBurst { place: place.into(), cost, burst: quota.burst() });
            }
        }
        self.schedule.check().map_err(|source| PolicyError::Schedule { place: place.into(), source })
    }
}

/// Which methods an override is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Methods {
    /// All.
    #[default]
    All,
    /// These.
    Only([bool; Method::ALL.len()]),
}

impl Methods {
    /// These methods.
    pub fn only(methods: &[Method]) -> Self {
        Self::Only(Method::ALL.map(|method| methods.contains(&method)))
    }

    fn has(self, method: Method) -> bool {
        match self {
            Self::All => true,
            Self::Only(these) => these.get(method.index()).is_some_and(|it| *it),
        }
    }

    fn meets(self, other: Self) -> bool {
        Method::ALL.into_iter().any(|method| self.has(method) && other.has(method))
    }
}

/// Whether the keys that an override matches have a bucket each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// Each key its own.
    #[default]
    Each,
    /// One for all of them; with a mask, one for each text in the places of its `{names}`.
    Together,
}

/// A rule for the keys that match. Two that say the same are equal, wherever they were written.
#[derive(Clone, Debug)]
pub struct Override<P, R = Rule> {
    /// The keys.
    pub pattern: P,
    /// The methods. The gate knows none, and does not look at this.
    pub methods: Methods,
    /// What holds. `None` takes the rule of the method or the default: an override that only shares a bucket.
    pub rule: Option<R>,
    /// How many buckets.
    pub share: Share,
    /// Where it was written, for errors: `agent.conf:12`.
    pub place: Box<str>,
}

impl<P: PartialEq, R: PartialEq> PartialEq for Override<P, R> {
    fn eq(&self, other: &Self) -> bool {
        let Self { pattern, methods, rule, share, place: _ } = self;
        *pattern == other.pattern && *methods == other.methods && *rule == other.rule && *share == other.share
    }
}

/// The rules of a stage, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers<P> {
    /// For every method and key.
    pub default: Rule,
    /// For a method.
    pub methods: Vec<(Method, Rule)>,
    /// For keys that match.
    pub overrides: Vec<Override<P>>,
}

impl<P> Layers<P> {
    /// One limit for all.
    pub fn new(limit: Limit) -> Self {
        Self { default: Rule::new(limit), methods: Vec::new(), overrides: Vec::new() }
    }
}

/// Why settings make no policy.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// Not one of the forms of [`CallerPattern`].
    #[error("\"{0}\" names no caller: it must be uid:N, uid:N-M, uid:*, user:NAME, pod:UID or pod:*")]
    Caller(Box<str>),
    /// The range is empty, or holds every UID.
    #[error("\"{0}\" must be a range from a lower to a higher UID, and not of all: that is uid:*")]
    Range(Box<str>),
    /// (uid_t)-1: the number that the kernel says "no user" with.
    #[error("\"{0}\" is nobody: 4294967295 is not a UID that a process can have")]
    Nobody(Box<str>),
    /// Pods are not looked for.
    #[error("\"{0}\" matches nothing: agent.kubernetes has mode = \"off\", so no caller is a pod")]
    NoPods(Box<str>),
    /// Pods are not looked for.
    #[error(
        "\"{0}\" matches every caller, as agent.kubernetes has mode = \"off\": set the limit in the block around it"
    )]
    Everybody(Box<str>),
    /// The node has no such user.
    #[error("there is no user \"{0}\" on this node")]
    User(Box<str>),
    /// Not one of the forms of [`IdPattern`].
    #[error("\"{pattern}\" is no pattern of SPIFFE IDs: {why}")]
    Id {
        /// The pattern.
        pattern: Box<str>,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The pattern is of another trust domain than the agent's.
    #[error("\"{pattern}\" matches nothing: the trust domain is {trust_domain}")]
    Foreign {
        /// The pattern.
        pattern: Box<str>,
        /// The trust domain of the agent.
        trust_domain: TrustDomain,
    },
    /// `{name}` in a pattern whose keys have a bucket each.
    #[error("{place}: \"{pattern}\" has a {{name}}, which says what shares a bucket: set share, or write *")]
    MaskWithoutShare {
        /// Where.
        place: Box<str>,
        /// The pattern.
        pattern: Box<str>,
    },
    /// Neither a rule nor a shared bucket.
    #[error("{place}: \"{pattern}\" changes nothing: it must have a limit, or share a bucket")]
    Empty {
        /// Where.
        place: Box<str>,
        /// The pattern.
        pattern: Box<str>,
    },
    /// Two overrides could both be meant.
    #[error(
        "{second}: \"{second_pattern}\" contradicts \"{first_pattern}\" ({first}): some callers or identities match both, and neither says more"
    )]
    Conflict {
        /// Where the first is.
        first: Box<str>,
        /// Its pattern.
        first_pattern: Box<str>,
        /// Where the second is.
        second: Box<str>,
        /// Its pattern.
        second_pattern: Box<str>,
    },
    /// Two rules for one method.
    #[error("{0} has two rules")]
    MethodTwice(&'static str),
    /// More than [`MAX_OVERRIDES`].
    #[error("{0} overrides must be at most 1024")]
    TooMany(usize),
    /// Out of order.
    #[error(
        "{place}: {costs:?}: answer must be at least 1, and signature and failed_attestation at least answer"
    )]
    Costs {
        /// Where.
        place: Box<str>,
        /// What.
        costs: Costs,
    },
    /// Such a call would be refused for ever.
    #[error("{place}: a cost of {cost} must be at most the burst, which is {burst}")]
    CostAboveBurst {
        /// Where.
        place: Box<str>,
        /// The highest cost.
        cost: u32,
        /// The burst.
        burst: u32,
    },
    /// A window is wrong.
    #[error("{place}: {source}")]
    Schedule {
        /// Where.
        place: Box<str>,
        /// Why.
        source: ScheduleError,
    },
}

/// What tells keys apart. Sealed by being used here only.
pub trait Pattern: Clone + fmt::Display {
    /// A key.
    type Key: ?Sized;
    /// Whether the key is meant.
    fn matches(&self, key: &Self::Key) -> bool;
    /// Whether some key is meant by both.
    fn meets(&self, other: &Self) -> bool;
    /// Sorts the pattern that says more before the one that says less.
    fn compare(&self, other: &Self) -> std::cmp::Ordering;
    /// Whether it has places that part a shared bucket.
    fn has_names(&self) -> bool {
        false
    }
}

/// Callers. From the one that says most to the one that says least: `uid:1000` (also written `user:build`) and `pod:UID`;
/// `uid:1000-1999`, the shorter range before the longer; `uid:*` and `pod:*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallerPattern {
    /// One UID, or one pod.
    One(CallerKey),
    /// A range of UIDs, of two or more and not of all.
    Uids(RangeInclusive<u32>),
    /// Every UID: all callers that are no pod.
    AnyUid,
    /// Every pod.
    AnyPod,
}

impl CallerPattern {
    /// Parses one of the forms. `user` resolves the name of a user of this node to its UID.
    ///
    /// # Errors
    /// [`PolicyError`] when the text has another form or means nobody.
    pub fn parse(text: &str, user: impl FnOnce(&str) -> Option<u32>) -> Result<Self, PolicyError> {
        let none = || PolicyError::Caller(text.into());
        let (kind, value) = text.split_once(':').ok_or_else(none)?;
        // Digits alone: `parse` would take a plus sign.
        let number = |digits: &str| {
            let plain = digits.bytes().all(|b| b.is_ascii_digit());
            digits.parse::<u32>().ok().filter(|_| plain).ok_or_else(none)
        };
        match (kind, value) {
            ("uid", "*") => Ok(Self::AnyUid),
            ("pod", "*") => Ok(Self::AnyPod),
            ("uid", value) => match value.split_once('-') {
                None => match number(value)? {
                    u32::MAX => Err(PolicyError::Nobody(text.into())),
                    uid => Ok(Self::One(CallerKey::Uid(uid))),
                },
                Some((from, to)) => match (number(from)?, number(to)?) {
                    (from, to) if from > to || (from, to) == (0, u32::MAX) => {
                        Err(PolicyError::Range(text.into()))
                    }
                    (from, to) if from == to => Ok(Self::One(CallerKey::Uid(from))),
                    (from, to) => Ok(Self::Uids(from..=to)),
                },
            },
            ("user", name) => {
                let uid = user(name).ok_or_else(|| PolicyError::User(name.into()))?;
                Ok(Self::One(CallerKey::Uid(uid)))
            }
            ("pod", uid) => CallerKey::parse_pod(uid).map(Self::One).ok_or_else(none),
            _ => Err(none()),
        }
    }

    /// How many it matches; the fewer, the more it says.
    fn width(&self) -> u64 {
        match self {
            Self::One(_) => 1,
            Self::Uids(range) => 1 + u64::from(range.end() - range.start()),
            Self::AnyUid | Self::AnyPod => u64::MAX,
        }
    }

    fn uids(&self) -> Option<(u32, u32)> {
        match self {
            Self::One(CallerKey::Uid(uid)) => Some((*uid, *uid)),
            Self::Uids(range) => Some((*range.start(), *range.end())),
            Self::AnyUid => Some((0, u32::MAX)),
            Self::One(CallerKey::Pod(_)) | Self::AnyPod => None,
        }
    }
}

impl Pattern for CallerPattern {
    type Key = CallerKey;

    fn matches(&self, key: &CallerKey) -> bool {
        match (self, key) {
            (Self::One(one), key) => one == key,
            (Self::Uids(range), CallerKey::Uid(uid)) => range.contains(uid),
            (Self::AnyUid, CallerKey::Uid(_)) | (Self::AnyPod, CallerKey::Pod(_)) => true,
            (Self::Uids(_) | Self::AnyUid, CallerKey::Pod(_)) | (Self::AnyPod, CallerKey::Uid(_)) => false,
        }
    }

    fn meets(&self, other: &Self) -> bool {
        match (self.uids(), other.uids()) {
            (Some((from, to)), Some((other_from, other_to))) => from <= other_to && other_from <= to,
            (None, None) => self == other || *self == Self::AnyPod || *other == Self::AnyPod,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    fn compare(&self, other: &Self) -> std::cmp::Ordering {
        self.width().cmp(&other.width())
    }
}

impl fmt::Display for CallerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(key) => write!(f, "{key}"),
            Self::Uids(range) => write!(f, "uid:{}-{}", range.start(), range.end()),
            Self::AnyUid => f.write_str("uid:*"),
            Self::AnyPod => f.write_str("pod:*"),
        }
    }
}

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

/// SPIFFE IDs, as `spiffe://example.org/ns/*/sa/batch`: one pattern per place between slashes, the trust domain written out.
///
/// A place is a text; or a text with `*` for any characters; or `*` alone; or, last, `**` for one or more places. With
/// [`Share::Together`] the pattern is a *mask*: identities that match share one bucket, or one for each text in
/// the places written `{name}`. Which of two says more is seen at the first place where they differ in kind, from the left: a text, then
/// text with `*` (of two, the one that gives more characters), then `*` or `{name}`, then `**`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdPattern {
    trust_domain: TrustDomain,
    segments: Box<[Segment]>,
}

impl IdPattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// [`PolicyError::Id`] when no SPIFFE ID can match, or every one of the trust domain would.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let bad = |why| PolicyError::Id { pattern: text.into(), why };
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
    type Key = SpiffeId;

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

    fn compare(&self, other: &Self) -> std::cmp::Ordering {
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

/// Whether `text` has the form of `glob`, where `*` stands for any bytes. Remembers the last `*` only: what an earlier one
/// takes more, the last one can take in its place.
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

/// The rules of a stage, checked and in the order in which they are looked at.
#[derive(Clone, Debug)]
pub struct Policy<P> {
    default: Rule,
    methods: [Option<Rule>; Method::ALL.len()],
    overrides: Vec<Override<Arc<P>>>,
}

/// What holds for a call.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a, P> {
    /// The rule.
    pub rule: &'a Rule,
    /// The pattern whose keys share a bucket, if the key's are so.
    pub shared: Option<&'a Arc<P>>,
}

impl<P: Pattern> Policy<P> {
    /// Checks the layers and sorts their overrides.
    ///
    /// # Errors
    /// [`PolicyError`] names the first thing that cannot be meant, and its place.
    pub fn new(layers: &Layers<P>) -> Result<Self, PolicyError> {
        layers.default.check("the default")?;
        let mut methods = [const { None }; Method::ALL.len()];
        for (method, rule) in &layers.methods {
            rule.check(method.rpc())?;
            if let Some(slot) = methods.get_mut(method.index())
                && slot.replace(rule.clone()).is_some()
            {
                return Err(PolicyError::MethodTwice(method.rpc()));
            }
        }
        for it in &layers.overrides {
            it.rule.as_ref().map_or(Ok(()), |rule| rule.check(&it.place))?;
        }
        let overrides = arrange(&layers.overrides)?;
        Ok(Self { default: layers.default.clone(), methods, overrides })
    }

    /// The rule that holds for `key` and `method`, and whether it shares its bucket.
    pub fn choose(&self, key: &P::Key, method: Method) -> Choice<'_, P> {
        let of_method = self.methods.get(method.index()).and_then(Option::as_ref).unwrap_or(&self.default);
        match self.overrides.iter().find(|it| it.methods.has(method) && it.pattern.matches(key)) {
            None => Choice { rule: of_method, shared: None },
            Some(it) => Choice {
                rule: it.rule.as_ref().unwrap_or(of_method),
                shared: (it.share == Share::Together).then_some(&it.pattern),
            },
        }
    }
}

impl<P: PartialEq> Policy<P> {
    /// The rule of the bucket that all keys of `pattern` share, if they do.
    pub(super) fn of_shared(&self, pattern: &P, method: Method) -> Option<Choice<'_, P>> {
        let of_method = self.methods.get(method.index()).and_then(Option::as_ref).unwrap_or(&self.default);
        let same = |it: &&Override<Arc<P>>| {
            it.share == Share::Together && it.methods.has(method) && *it.pattern == *pattern
        };
        let it = self.overrides.iter().find(same)?;
        Some(Choice { rule: it.rule.as_ref().unwrap_or(of_method), shared: Some(&it.pattern) })
    }
}

/// Checks overrides against each other, and sorts them so that the first that matches is the one that is meant.
///
/// # Errors
/// [`PolicyError`] for one that means nothing, or two of which either could be meant.
pub(super) fn arrange<P: Pattern, R: Clone>(
    overrides: &[Override<P, R>],
) -> Result<Vec<Override<Arc<P>, R>>, PolicyError> {
    if overrides.len() > MAX_OVERRIDES {
        return Err(PolicyError::TooMany(overrides.len()));
    }
    for (at, it) in overrides.iter().enumerate() {
        let (place, pattern) = (|| it.place.clone(), || it.pattern.to_string().into());
        if it.rule.is_none() && it.share == Share::Each {
            return Err(PolicyError::Empty { place: place(), pattern: pattern() });
        }
        if it.pattern.has_names() && it.share == Share::Each {
            return Err(PolicyError::MaskWithoutShare { place: place(), pattern: pattern() });
        }
        for other in overrides.iter().take(at) {
            if rank(it, other).is_eq() && it.methods.meets(other.methods) && it.pattern.meets(&other.pattern)
            {
                return Err(PolicyError::Conflict {
                    first: other.place.clone(),
                    first_pattern: other.pattern.to_string().into(),
                    second: place(),
                    second_pattern: pattern(),
                });
            }
        }
    }
    let mut sorted: Vec<&Override<P, R>> = overrides.iter().collect();
    sorted.sort_by(|a, b| rank(a, b));
    let shared = |it: &Override<P, R>| Override {
        pattern: Arc::new(it.pattern.clone()),
        methods: it.methods,
        rule: it.rule.clone(),
        share: it.share,
        place: it.place.clone(),
    };
    Ok(sorted.into_iter().map(shared).collect())
}

/// The order of overrides: by pattern, and of equal ones the one that names its methods first.
fn rank<P: Pattern, R>(a: &Override<P, R>, b: &Override<P, R>) -> std::cmp::Ordering {
    a.pattern.compare(&b.pattern).then((a.methods == Methods::All).cmp(&(b.methods == Methods::All)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::{
        bucket::Per,
        schedule::{Moment, Window},
    };

    fn rule(rate: u32) -> Rule {
        Rule::new(Limit::Quota(Quota::new(f64::from(rate), Per::Second, 1000).unwrap()))
    }

    fn caller(text: &str) -> CallerPattern {
        CallerPattern::parse(text, |name| (name == "build").then_some(1001)).unwrap()
    }

    fn over<P>(pattern: P, rate: u32, place: &str) -> Override<P> {
        Override {
            pattern,
            methods: Methods::All,
            rule: Some(rule(rate)),
            share: Share::Each,
            place: place.into(),
        }
    }

    const POD: &str = "0f9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6";

    #[test]
    fn callers_are_written_in_six_ways() {
        let parse = |text: &str| CallerPattern::parse(text, |name| (name == "build").then_some(1001));
        let pod = format!("pod:{POD}");
        for (case, text, want) in [
            ("uid", "uid:1000", Ok("uid:1000")),
            ("range", "uid:1000-1999", Ok("uid:1000-1999")),
            ("range of one", "uid:7-7", Ok("uid:7")),
            ("any uid", "uid:*", Ok("uid:*")),
            ("user", "user:build", Ok("uid:1001")),
            ("pod", &*pod, Ok(&*pod)),
            ("any pod", "pod:*", Ok("pod:*")),
            ("root", "uid:0", Ok("uid:0")),
            ("highest", "uid:4294967294", Ok("uid:4294967294")),
            ("no user", "uid:4294967295", Err(PolicyError::Nobody("uid:4294967295".into()))),
            ("too high", "uid:4294967296", Err(PolicyError::Caller("uid:4294967296".into()))),
            ("negative", "uid:-1", Err(PolicyError::Caller("uid:-1".into()))),
            ("plus", "uid:+1", Err(PolicyError::Caller("uid:+1".into()))),
            ("empty", "uid:", Err(PolicyError::Caller("uid:".into()))),
            ("falling range", "uid:5-4", Err(PolicyError::Range("uid:5-4".into()))),
            ("all", "uid:0-4294967295", Err(PolicyError::Range("uid:0-4294967295".into()))),
            ("nobody", "user:nobody-here", Err(PolicyError::User("nobody-here".into()))),
            ("other", "gid:5", Err(PolicyError::Caller("gid:5".into()))),
            ("bare", "1000", Err(PolicyError::Caller("1000".into()))),
            ("half a pod", "pod:0f9c", Err(PolicyError::Caller("pod:0f9c".into()))),
        ] {
            assert_eq!(parse(text).map(|it| it.to_string()), want.map(str::to_owned), "{case}");
        }
    }

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
            assert!(matches!(IdPattern::parse(text), Err(PolicyError::Id { .. })), "{case}");
        }
    }

    #[test]
    fn the_most_specific_caller_override_wins() {
        let mut jwt = over(caller("uid:1000-1999"), 9, "9");
        jwt.methods = Methods::only(&[Method::FetchJwtSvid]);
        let layers = Layers {
            default: rule(1),
            methods: vec![(Method::FetchJwtSvid, rule(2))],
            overrides: vec![
                over(caller("uid:*"), 3, "3"),
                over(caller("uid:1000-1999"), 4, "4"),
                over(caller("user:build"), 6, "6"),
                over(caller("uid:1000-1099"), 5, "5"),
                over(caller("pod:*"), 7, "7"),
                over(caller(&format!("pod:{POD}")), 8, "8"),
                jwt,
            ],
        };
        let policy = Policy::new(&layers).unwrap();
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
            assert_eq!(*policy.choose(&key, method).rule, rule(rate), "{case}");
        }
        let policy =
            Policy::new(&Layers { overrides: vec![over(caller("pod:*"), 7, "7")], ..layers }).unwrap();
        for (case, method, rate) in
            [("method", Method::FetchJwtSvid, 2), ("default", Method::FetchX509Svid, 1)]
        {
            assert_eq!(*policy.choose(&CallerKey::Uid(7), method).rule, rule(rate), "{case}");
        }
    }

    #[test]
    fn the_most_specific_identity_override_wins() {
        let pattern = |text: &str| IdPattern::parse(text).unwrap();
        let layers = Layers {
            default: rule(1),
            methods: vec![],
            overrides: vec![
                over(pattern("spiffe://td/ns/**"), 2, "2"),
                over(pattern("spiffe://td/ns/*/sa/*"), 3, "3"),
                over(pattern("spiffe://td/ns/prod/sa/*"), 4, "4"),
                over(pattern("spiffe://td/ns/*/sa/batch"), 5, "5"),
                over(pattern("spiffe://td/ns/prod/sa/b*"), 6, "6"),
                over(pattern("spiffe://td/ns/prod/sa/bat*"), 7, "7"),
                over(pattern("spiffe://td/ns/prod/sa/batch-one"), 8, "8"),
            ],
        };
        let policy = Policy::new(&layers).unwrap();
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
            assert_eq!(*policy.choose(&id, Method::FetchJwtSvid).rule, rule(rate), "{id}");
        }
    }

    #[test]
    fn contradictions_name_both_places() {
        let conflicts = |a: &str, b: &str| {
            let mut overrides = vec![];
            for (text, place) in [(a, "a.conf:1"), (b, "b.conf:2")] {
                overrides.push(over(caller(text), 1, place));
            }
            Policy::new(&Layers { overrides, ..Layers::new(Limit::Unlimited) })
                .err()
                .map(|err| err.to_string())
        };
        for (case, a, b, conflict) in [
            ("twice", "uid:5", "uid:5", true),
            ("by name", "uid:1001", "user:build", true),
            ("equal ranges that meet", "uid:10-19", "uid:15-24", true),
            ("equal ranges apart", "uid:10-19", "uid:20-29", false),
            ("shorter in longer", "uid:10-19", "uid:15-17", false),
            ("uids and pods", "uid:*", "pod:*", false),
        ] {
            let text = conflicts(a, b);
            assert_eq!(text.is_some(), conflict, "{case}");
            assert!(text.is_none_or(|text| text.contains("a.conf:1") && text.contains("b.conf:2")), "{case}");
        }
        let ids = |a: &str, b: &str| {
            let overrides =
                [(a, "a"), (b, "b")].map(|(text, place)| over(IdPattern::parse(text).unwrap(), 1, place));
            Policy::new(&Layers { overrides: overrides.into(), ..Layers::new(Limit::Unlimited) })
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
            let conflicts = matches!(ids(a, b), Err(PolicyError::Conflict { .. }));
            assert_eq!(conflicts, conflict, "{case}");
        }
    }

    #[test]
    fn rules_that_cannot_be_meant_are_errors() {
        let usual = || Layers::<CallerPattern>::new(Limit::Unlimited);
        let costs = |answer, signature, failed_attestation| Layers {
            default: Rule {
                costs: Costs { answer, signature, failed_attestation },
                ..Rule::new(Limit::Quota(Quota::constant(1, 5)))
            },
            ..usual()
        };
        let hours = |from, to| {
            let at = |hour| Moment { hour: Some(hour), ..Moment::default() };
            (Window::new(at(from), at(to)).unwrap(), Limit::Block)
        };
        let overlap =
            Rule { schedule: Schedule::new(vec![hours(1, 3), hours(2, 4)]), ..Rule::new(Limit::Unlimited) };
        let mut empty = over(caller("uid:5"), 1, "here");
        empty.rule = None;
        for (case, layers, fits) in [
            ("usual", usual(), true),
            ("costs", costs(1, 2, 5), true),
            ("free", costs(0, 2, 5), false),
            ("a signature for less", costs(2, 1, 5), false),
            ("a failure for less", costs(2, 2, 1), false),
            ("a failure above the burst", costs(1, 2, 6), false),
            ("windows overlap", Layers { default: overlap, ..usual() }, false),
            ("method twice", Layers { methods: vec![(Method::FetchJwtSvid, rule(1)); 2], ..usual() }, false),
            ("changes nothing", Layers { overrides: vec![empty], ..usual() }, false),
            ("too many", Layers { overrides: vec![over(caller("uid:5"), 1, "x"); 1025], ..usual() }, false),
        ] {
            assert_eq!(Policy::new(&layers).is_ok(), fits, "{case}");
        }
        let named = over(IdPattern::parse("spiffe://td/{ns}/x").unwrap(), 1, "here");
        let layers = Layers { overrides: vec![named], ..Layers::new(Limit::Unlimited) };
        assert!(matches!(Policy::new(&layers), Err(PolicyError::MaskWithoutShare { .. })));
    }

    fn segment() -> impl Strategy<Value = String> {
        prop_oneof![2 => "[ab*]{1,4}", 1 => Just("*".to_owned()), 1 => "[ab]{1,3}"]
            .prop_filter("** is another thing", |text| !text.contains("**"))
    }

    fn pattern() -> impl Strategy<Value = IdPattern> {
        (prop::collection::vec(segment(), 1..3), any::<bool>()).prop_filter_map("all", |(places, rest)| {
            let rest = if rest { "/**" } else { "" };
            IdPattern::parse(&format!("spiffe://td/{}{rest}", places.join("/"))).ok()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// If an identity matches two patterns, one says more, or the pair is a conflict.
        #[test]
        fn two_that_match_are_ordered_or_conflict(
            a in pattern(),
            b in pattern(),
            path in prop::collection::vec("[ab]{1,4}", 1..4),
        ) {
            let id = SpiffeId::parse(&format!("spiffe://td/{}", path.join("/"))).unwrap();
            if a.matches(&id) && b.matches(&id) {
                prop_assert!(a.meets(&b) && b.meets(&a));
            }
            prop_assert_eq!(a.compare(&b), b.compare(&a).reverse());
            let layers = Layers {
                overrides: vec![over(a.clone(), 1, "a"), over(b.clone(), 2, "b")],
                ..Layers::new(Limit::Unlimited)
            };
            match Policy::new(&layers) {
                Ok(policy) => {
                    let first = if a.compare(&b).is_lt() { 1 } else { 2 };
                    let rate = match (a.matches(&id), b.matches(&id)) {
                        (true, true) => first,
                        (true, false) => 1,
                        (false, true) => 2,
                        (false, false) => return Ok(()),
                    };
                    prop_assert_eq!(policy.choose(&id, Method::FetchJwtSvid).rule, &rule(rate));
                }
                Err(err) => {
                    let conflict = matches!(err, PolicyError::Conflict { .. });
                    prop_assert!(conflict && a.compare(&b).is_eq(), "{err}");
                }
            }
        }

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
        fn a_pattern_is_its_own_text(pattern in pattern()) {
            prop_assert_eq!(IdPattern::parse(&pattern.to_string()).unwrap(), pattern);
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,40}") {
            let _ = IdPattern::parse(&text).is_ok();
            let _ = IdPattern::parse(&format!("spiffe://td/{text}")).is_ok();
            let _ = CallerPattern::parse(&text, |_| None).is_ok();
        }
    }
}
