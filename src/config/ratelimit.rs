//! `ratelimit`: from blocks to [`limits::Settings`](Settings).
//!
//! A limit is written in one way everywhere: `rate`, `per` and `burst`, or one of `exempt`, `block` and `unlimited`. What
//! a block does not say about costs and dry run is as in the block around it, and a `method` without a limit of its own
//! takes that one too; in [`Settings`] each rule is whole. Blocks with one label are read as one, across all
//! files, so whatever is set in two places is an error that names both.
//!
//! Everything is held against its bounds where it stands, so that each mistake has its place; [`Settings::check`] has the
//! last word, over the overrides against each other above all.

use std::{collections::HashMap, num::NonZeroU32, time::Duration};

use crate::{
    hcl::{
        section::{At, Labelled, Problems, Section, nearest},
        show_duration,
        tree::{Place, abridged, quoted},
    },
    identity::TrustDomain,
    limits::{
        CallerKey, ConnectionSettings, GateRule, GateSettings, Method, NodeSettings, RejectionStatus,
        Settings, SettingsError, SoftLimits,
        bucket::{MAX_BURST, Per, Quota, QuotaError},
        budget::{self, MemoryLimit},
        policy::{
            CallerPattern, Costs, IdPattern, Layers, Limit, Methods, Override, Pattern, PolicyError, Rule,
            Share,
        },
        schedule::{MAX_WINDOWS, Moment, Schedule, ScheduleError, Weekday, Window},
    },
};

/// spire-agent's keys, which limit the calls for an identity.
const SPIRE_KEYS: [(&str, Method); 6] = [
    ("fetch_x509_svid", Method::FetchX509Svid),
    ("fetch_jwt_svid", Method::FetchJwtSvid),
    ("fetch_x509_bundles", Method::FetchX509Bundles),
    ("fetch_jwt_bundles", Method::FetchJwtBundles),
    ("stream_secrets", Method::StreamSecrets),
    ("fetch_secrets", Method::FetchSecrets),
];

const FREE: [(&str, Limit); 3] =
    [("exempt", Limit::Exempt), ("block", Limit::Block), ("unlimited", Limit::Unlimited)];
/// What all share can be without a limit, and no more.
const FREE_OF_NODE: [(&str, Limit); 1] = [("unlimited", Limit::Unlimited)];

const A_LIMIT: &str = "rate with burst, or one of exempt, block, unlimited";

/// More callers' connections than this are a mistake: a process has fewer descriptors.
const MAX_CONNECTIONS: i64 = 1_000_000;
/// So many overrides that contradict another are named, one by one.
const MAX_CONFLICTS: usize = 16;

/// A key of spire-agent that is set.
#[derive(Clone, Debug)]
pub(super) struct SpireKey {
    /// With the blocks around it.
    name: String,
    place: Place,
    method: Method,
    /// Calls a second, and at once; 0 for no limit.
    limit: u32,
}

/// Reads spire-agent's keys, in its `experimental.ratelimit` or in `ratelimit`.
pub(super) fn spire_keys(s: &mut Section<'_>) -> Vec<SpireKey> {
    let mut keys = Vec::new();
    for (key, method) in SPIRE_KEYS {
        if let Some(at) = s.integer(key, 0..=i64::from(MAX_BURST)) {
            keys.push(SpireKey { name: s.path(key), place: at.place, method, limit: to_u32(at.value) });
        }
    }
    keys
}

/// What was wrong was said.
#[derive(Debug)]
struct Reported;

/// A limit, and where its burst is written: `None` by default.
#[derive(Clone, Debug)]
struct Bound {
    limit: Limit,
    burst: Option<(Place, String)>,
}

/// What a block says, with what it takes from the one around it.
#[derive(Clone, Debug)]
struct Written {
    limit: Bound,
    /// Whether the limit is its own.
    limited: bool,
    windows: Vec<(Window, Bound)>,
    costs: Costs,
    dry_run: bool,
}

impl Written {
    fn of(rule: &Rule) -> Self {
        let limit = Bound { limit: rule.limit, burst: None };
        Self { limit, limited: false, windows: Vec::new(), costs: rule.costs, dry_run: rule.dry_run }
    }

    fn bounds(&self) -> impl Iterator<Item = &Bound> {
        std::iter::once(&self.limit).chain(self.windows.iter().map(|(_, bound)| bound))
    }

    fn rule(&self, kind: Kind) -> Rule {
        let mut costs = self.costs;
        if kind == Kind::Identity {
            // Never charged to an identity. Kept below every burst, so that a small one is no error.
            let bursts = self.bounds().filter_map(|bound| match bound.limit {
                Limit::Quota(quota) => Some(quota.burst()),
                Limit::Unlimited | Limit::Exempt | Limit::Block => None,
            });
            costs.failed_attestation = bursts.fold(costs.failed_attestation, u32::min).max(costs.answer);
        }
        Rule {
            limit: self.limit.limit,
            costs,
            dry_run: self.dry_run,
            schedule: Schedule::new(self.windows.iter().map(|(window, it)| (*window, it.limit)).collect()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Caller,
    Identity,
}

/// Where overrides stand, by the text that [`Override::place`] holds.
type Places = HashMap<Box<str>, (Place, String)>;

/// What the block is held against.
pub(super) struct Context<'a> {
    pub(super) problems: &'a Problems,
    /// `None` when it is wrong itself.
    pub(super) trust_domain: Option<&'a TrustDomain>,
    pub(super) user_id: &'a dyn Fn(&str) -> Option<u32>,
    /// Whether `agent.kubernetes` says that no caller is a pod.
    pub(super) no_pods: bool,
}

impl Context<'_> {
    /// Reads the block, if there is one; `spire` are the keys of `experimental.ratelimit`.
    pub(super) fn settings(&self, block: Option<Section<'_>>, mut spire: Vec<SpireKey>) -> Settings {
        let mut settings = Settings::default();
        let mut places = Places::new();
        let mut methods = HashMap::new();
        let mut place = Place::default();
        if let Some(mut block) = block {
            place = block.place();
            let s = &mut block;
            whole(s, &mut settings);
            for key in spire_keys(s) {
                match spire.iter().find(|first| first.method == key.method) {
                    Some(first) => self.contradicts(&key, &first.name, first.place),
                    None => spire.push(key),
                }
            }
            if let Some(gate) = s.block("gate") {
                self.gate(gate, &mut settings.gate, &mut places);
            }
            if let Some(caller) = s.block("caller") {
                let pattern = |text: &str| self.caller_pattern(text);
                self.stage(caller, Kind::Caller, &mut settings.caller, &pattern, &mut places);
            }
            if let Some(identity) = s.block("identity") {
                let pattern = |text: &str| self.id_pattern(text);
                methods = self.stage(identity, Kind::Identity, &mut settings.identity, &pattern, &mut places);
            }
            if let Some(block) = s.block("node") {
                node(block, &mut settings.node);
            }
            if let Some(block) = s.block("memory") {
                memory(block, &mut settings.memory);
            }
            block.finish();
        }
        for key in spire {
            match methods.get(&key.method) {
                Some(first) => {
                    let name = format!("ratelimit.identity.method {}", quoted(key.method.rpc()));
                    self.contradicts(&key, &name, *first);
                }
                None => {
                    settings.identity.methods.push((key.method, as_spire(&key, &settings.identity.default)))
                }
            }
        }
        self.check(&mut settings, place, &places);
        settings
    }

    fn contradicts(&self, key: &SpireKey, other: &str, place: Place) {
        let message = format!(
            "contradicts {other}, at {}: both limit {}, take one of them out",
            self.problems.show(place),
            key.method.rpc()
        );
        self.problems.add(key.place, &key.name, Some(key.limit.to_string()), message);
    }

    fn caller_pattern(&self, text: &str) -> Result<CallerPattern, PolicyError> {
        match CallerPattern::parse(text, self.user_id)? {
            CallerPattern::AnyPod | CallerPattern::One(CallerKey::Pod(_)) if self.no_pods => {
                Err(PolicyError::NoPods(text.into()))
            }
            pattern => Ok(pattern),
        }
    }

    fn id_pattern(&self, text: &str) -> Result<IdPattern, PolicyError> {
        let pattern = IdPattern::parse(text)?;
        match self.trust_domain {
            Some(ours) if pattern.trust_domain() != ours => {
                Err(PolicyError::Foreign { pattern: text.into(), trust_domain: ours.clone() })
            }
            _ => Ok(pattern),
        }
    }

    fn gate(&self, mut block: Section<'_>, gate: &mut GateSettings, places: &mut Places) {
        let s = &mut block;
        let connections = s.integer("connections", 2..=MAX_CONNECTIONS);
        let reserve = s.integer("reserve", 0..=MAX_CONNECTIONS);
        let most = connections.map_or(i64::MAX, |at| at.value);
        match (connections, reserve) {
            (_, Some(reserve)) if reserve.value >= most => {
                let message = format!("must be below connections, which is {most}");
                s.wrong(reserve.place, "reserve", Some(reserve.value.to_string()), message);
            }
            (Some(connections), None) if most <= i64::from(gate.reserve) => {
                let message = format!("must be above reserve, which is {} by default", gate.reserve);
                s.wrong(connections.place, "connections", Some(most.to_string()), message);
            }
            _ => {
                gate.connections = connections.and_then(|at| NonZeroU32::new(to_u32(at.value)));
                set(&mut gate.reserve, reserve.map(|at| to_u32(at.value)));
            }
        }
        set(&mut gate.admin, s.integer("admin", 1..=1024).map(|at| to_u32(at.value)));
        if let Some(block) = s.block("connection") {
            connection(block, &mut gate.connection);
        }
        if let Some(mut caller) = s.block("caller") {
            let rule = gate_rule(&mut caller, &gate.default);
            set(&mut gate.default, rule.ok());
            caller.finish();
        }
        for Labelled { label, place, mut section } in merged(s.labelled("override")) {
            let empty = !["connections", "rate", "per", "burst", "exempt", "block", "unlimited", "dry_run"]
                .iter()
                .any(|key| section.has(key));
            if empty {
                let message = format!("changes nothing: it must have connections, or a limit: {A_LIMIT}");
                self.problems.add(place, &section.name(), None, message);
            }
            let rule = gate_rule(&mut section, &gate.default);
            if self.no_pods && label == "uid:*" {
                self.problems.add(place, &section.name(), None, PolicyError::Everybody(label.into()));
            }
            let pattern = self
                .caller_pattern(label)
                .map_err(|err| self.problems.add(place, &section.name(), None, err));
            if let (Ok(rule), Ok(pattern), false) = (rule, pattern, empty) {
                gate.overrides.push(Override {
                    pattern,
                    methods: Methods::All,
                    rule: Some(rule),
                    share: Share::Each,
                    place: self.note(places, place, section.name()),
                });
            }
            section.finish();
        }
        block.finish();
    }

    /// `caller` or `identity`. Says where each of its methods stands.
    fn stage<P: Pattern>(
        &self,
        mut block: Section<'_>,
        kind: Kind,
        layers: &mut Layers<P>,
        pattern: &dyn Fn(&str) -> Result<P, PolicyError>,
        places: &mut Places,
    ) -> HashMap<Method, Place> {
        let s = &mut block;
        let mut base = Written::of(&layers.default);
        if let Ok(written) = written(s, kind, &base) {
            layers.default = written.rule(kind);
            base = written;
        }
        let mut named = HashMap::new();
        for Labelled { label, place, mut section } in merged(s.labelled("method")) {
            let method = method(&section, label, place, kind);
            if let (Ok(written), Ok(method)) = (written(&mut section, kind, &base), method) {
                named.insert(method, place);
                layers.methods.push((method, written.rule(kind)));
            }
            section.finish();
        }
        for it in merged(s.labelled("override")) {
            let parsed =
                pattern(it.label).map_err(|err| self.problems.add(it.place, &it.section.name(), None, err));
            let found = self.overrides(it, kind, &base, parsed.ok(), places);
            layers.overrides.extend(found);
        }
        block.finish();
        named
    }

    /// One block for callers or identities: a rule for all methods, if it has a limit, and one for each `method` in it.
    fn overrides<P: Pattern>(
        &self,
        block: Labelled<'_>,
        kind: Kind,
        base: &Written,
        pattern: Option<P>,
        places: &mut Places,
    ) -> Vec<Override<P>> {
        let Labelled { place, section: mut s, label: it_label } = block;
        let share = s.boolean("share").is_some_and(|at| at.value);
        let share = if share { Share::Together } else { Share::Each };
        let written_here = written(&mut s, kind, base);
        let limited = written_here.as_ref().is_ok_and(|it| it.limited);
        let has_rules = ["costs", "dry_run"].iter().any(|key| s.has(key));
        let wrong = |message: String| self.problems.add(place, &s.name(), None, message);
        if kind == Kind::Caller && self.no_pods && it_label == "uid:*" && share == Share::Each {
            wrong(PolicyError::Everybody(it_label.into()).to_string());
        }
        if pattern.as_ref().is_some_and(Pattern::has_names) && share == Share::Each {
            wrong("has a {name}, which says what shares a bucket: set share = true, or write *".to_owned());
        }
        if written_here.is_ok() && !limited {
            if s.has("schedule") || (has_rules && !s.has("method")) {
                wrong(format!("must have a limit for all the time: {A_LIMIT}"));
            } else if share == Share::Each && !s.has("method") {
                wrong(format!(
                    "changes nothing: it must have a limit ({A_LIMIT}), share = true, or a method"
                ));
            }
        }
        let mut rules = Vec::new();
        if let Ok(written) = &written_here
            && (limited || share == Share::Together)
        {
            rules.push((Methods::All, limited.then(|| written.rule(kind)), place, s.name()));
        }
        let base = written_here.as_ref().unwrap_or(base);
        for Labelled { label, place, mut section } in merged(s.labelled("method")) {
            let method = method(&section, label, place, kind);
            let written = written(&mut section, kind, base);
            if let (Ok(written), Ok(method)) = (written, method) {
                if written.limited || limited {
                    let rule = Some(written.rule(kind));
                    rules.push((Methods::only(&[method]), rule, place, section.name()));
                } else if written_here.is_ok() {
                    let message = format!("must have a limit, here or in the block around it: {A_LIMIT}");
                    self.problems.add(place, &section.name(), None, message);
                }
            }
            section.finish();
        }
        s.finish();
        let Some(pattern) = pattern else { return Vec::new() };
        if pattern.has_names() && share == Share::Each {
            return Vec::new();
        }
        let each = |(methods, rule, place, name)| Override {
            pattern: pattern.clone(),
            methods,
            rule,
            share,
            place: self.note(places, place, name),
        };
        rules.into_iter().map(each).collect()
    }

    fn note(&self, places: &mut Places, place: Place, name: String) -> Box<str> {
        let text: Box<str> = self.problems.show(place).into();
        places.insert(text.clone(), (place, name));
        text
    }

    /// What only shows when everything is there: overrides that contradict each other.
    fn check(&self, settings: &mut Settings, place: Place, places: &Places) {
        for _ in 0..MAX_CONFLICTS {
            let err = match settings.check(self.trust_domain) {
                Ok(()) => return,
                Err(err) => err,
            };
            let SettingsError::Policy {
                source: PolicyError::Conflict { first, first_pattern, second, .. },
                ..
            } = &err
            else {
                return self.problems.add(place, "ratelimit", None, err);
            };
            let Some((at, name)) = places.get(second) else {
                return self.problems.add(place, "ratelimit", None, err);
            };
            let message = format!(
                "contradicts {}, at {first}: some match both, and neither says more",
                quoted(first_pattern)
            );
            self.problems.add(*at, name, None, message);
            settings.gate.overrides.retain(|it| it.place != *second);
            settings.caller.overrides.retain(|it| it.place != *second);
            settings.identity.overrides.retain(|it| it.place != *second);
        }
    }
}

/// The keys that hold for all stages.
fn whole(s: &mut Section<'_>, settings: &mut Settings) {
    set(&mut settings.dry_run, s.boolean("dry_run").map(|at| at.value));
    let status = |text: &str| match text {
        "resource_exhausted" => Some(RejectionStatus::ResourceExhausted),
        "unavailable" => Some(RejectionStatus::Unavailable),
        _ => None,
    };
    let status = s.parsed("rejection_status", status, "must be resource_exhausted or unavailable");
    set(&mut settings.rejection_status, status.map(|at| at.value));
    let keys = s.integer("keys", 16..=1 << 24);
    set(&mut settings.keys, keys.and_then(|at| usize::try_from(at.value).ok()));
    let mut steps = Vec::new();
    for At { value: text, place } in s.strings("soft_limits").map(|list| list.value).unwrap_or_default() {
        match text.parse().ok().filter(|step| SoftLimits::STEPS.contains(step)) {
            Some(step) if steps.contains(&step) => {
                s.wrong(place, "soft_limits", Some(abridged(text)), "is there twice");
            }
            Some(step) => steps.push(step),
            None => {
                let known = SoftLimits::STEPS.map(|step| step.to_string()).join(", ");
                let message = format!("must be one of {known} (percent of a burst)");
                s.wrong(place, "soft_limits", Some(abridged(text)), message);
            }
        }
    }
    set(&mut settings.soft_limits, SoftLimits::new(&steps).ok());
}

/// As spire-agent has it: so many calls a second, so many at once, each costs the same; 0 is no limit.
fn as_spire(key: &SpireKey, default: &Rule) -> Rule {
    let number = NonZeroU32::new(key.limit);
    let quota = number.and_then(|number| Quota::per_second(number, number).ok());
    let costs = Costs { answer: 1, signature: 1, failed_attestation: 1 };
    let limit = quota.map_or(Limit::Unlimited, Limit::Quota);
    Rule { costs, dry_run: default.dry_run, ..Rule::new(limit) }
}

/// Blocks with one label as one, in the order of the first of each.
fn merged(blocks: Vec<Labelled<'_>>) -> Vec<Labelled<'_>> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut merged: Vec<Labelled<'_>> = Vec::new();
    for block in blocks {
        match seen.get(block.label).and_then(|at| merged.get_mut(*at)) {
            Some(first) => first.section.merge(block.section),
            None => {
                seen.insert(block.label, merged.len());
                merged.push(block);
            }
        }
    }
    merged
}

fn set<T>(setting: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *setting = value;
    }
}

/// For numbers whose range was checked.
fn to_u32(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The method that a label names.
fn method(section: &Section<'_>, label: &str, place: Place, kind: Kind) -> Result<Method, Reported> {
    let wrong = |message: String| {
        section.problems().add(place, &section.name(), None, message);
        Reported
    };
    let names = Method::ALL.map(Method::rpc);
    let Some(found) = Method::ALL.into_iter().find(|method| method.rpc() == label) else {
        let near = nearest(label, names).map_or_else(String::new, |near| format!(" (did you mean {near}?)"));
        return Err(wrong(format!("unknown method{near}: must be one of {}", names.join(", "))));
    };
    if kind == Kind::Identity && !found.has_identity() {
        return Err(wrong(
            "needs no identity, and is not charged to any: limit it in caller or node".to_owned(),
        ));
    }
    Ok(found)
}

/// A limit, if the block has one: a bucket, or one of `free`.
fn limit(s: &mut Section<'_>, free: &[(&'static str, Limit)]) -> Result<Option<Bound>, Reported> {
    let rate = s.number("rate");
    let per = s.parsed("per", |text| Per::parse(text).ok(), "must be second, minute, hour or day");
    let burst = s.integer("burst", 1..=i64::from(MAX_BURST));
    let mut given: Vec<(&str, Place, Option<Limit>)> = Vec::new();
    let of_bucket = [
        ("rate", rate.map(|at| at.place)),
        ("burst", burst.map(|at| at.place)),
        ("per", per.map(|at| at.place)),
    ];
    let first = of_bucket.into_iter().find_map(|(key, place)| place.map(|place| (key, place, None)));
    given.extend(first);
    let mut good = of_bucket.into_iter().all(|(key, place)| place.is_some() || !s.has(key));
    for (key, limit) in free {
        match s.boolean(key) {
            Some(At { value: true, place }) => given.push((key, place, Some(*limit))),
            Some(_) => {}
            None => good &= !s.has(key),
        }
    }
    given.sort_by_key(|(_, place, _)| *place);
    if let [(first, at, _), (key, place, _), ..] = given.as_slice() {
        let others = free.iter().map(|(key, _)| *key).collect::<Vec<_>>().join(", ");
        let at = s.problems().show(*at);
        let message =
            format!("contradicts {first}, at {at}: a limit is either rate with burst, or one of {others}");
        s.wrong(*place, key, None, message);
        return Err(Reported);
    }
    if !good {
        return Err(Reported);
    }
    let Some((key, place, instead)) = given.pop() else { return Ok(None) };
    if let Some(limit) = instead {
        return Ok(Some(Bound { limit, burst: None }));
    }
    let (Some(rate), Some(burst)) = (rate, burst) else {
        let missing = if rate.is_none() { "rate = 100" } else { "burst = 200" };
        s.wrong(place, key, None, format!("must have the other half of a bucket beside it: {missing}"));
        return Err(Reported);
    };
    let (value, text) = rate.value;
    let quota = Quota::new(value, per.map_or(Per::Second, |at| at.value), to_u32(burst.value));
    match quota {
        Ok(quota) => {
            let burst = Some((burst.place, s.path("burst")));
            Ok(Some(Bound { limit: Limit::Quota(quota), burst }))
        }
        Err(QuotaError::Refill { days, .. }) => {
            let message = format!("takes {days} days to come back at this rate; it must be at most 366");
            s.wrong(burst.place, "burst", Some(burst.value.to_string()), message);
            Err(Reported)
        }
        Err(QuotaError::Rate(_) | QuotaError::Burst(_) | QuotaError::Unit(_)) => {
            let block = if free.len() > 1 { "block = true for none, " } else { "" };
            let message = format!(
                "must be above 0 and at most 1000000 a second ({block}unlimited = true for no limit)"
            );
            s.wrong(rate.place, "rate", Some(abridged(text)), message);
            Err(Reported)
        }
    }
}

/// Everything a block says about calls.
fn written(s: &mut Section<'_>, kind: Kind, base: &Written) -> Result<Written, Reported> {
    let limit = limit(s, &FREE);
    let windows = schedule(s);
    let (costs, costs_place) = costs(s, kind, base.costs);
    let dry_run = s.boolean("dry_run");
    let good = dry_run.is_some() || !s.has("dry_run");
    let (limit, windows, costs) = (limit?, windows?, costs?);
    let limited = limit.is_some();
    let mut good = good;
    let (cost, what) = match kind {
        Kind::Caller if costs.failed_attestation >= costs.signature => {
            (costs.failed_attestation, "failed_attestation")
        }
        Kind::Caller | Kind::Identity => (costs.signature, "signature"),
    };
    let own = limit.iter().chain(windows.iter().map(|(_, bound)| bound));
    let own: Vec<(Bound, bool)> = own.map(|bound| (bound.clone(), true)).collect();
    let base_windows = if limited || !windows.is_empty() { Vec::new() } else { base.windows.clone() };
    let taken = (!limited).then(|| base.limit.clone()).into_iter();
    let taken = taken.chain(base_windows.iter().map(|(_, bound)| bound.clone())).map(|bound| (bound, false));
    for (bound, own) in own.into_iter().chain(taken) {
        let Limit::Quota(quota) = bound.limit else { continue };
        if cost <= quota.burst() {
            continue;
        }
        good = false;
        match (&bound.burst, own, costs_place) {
            (Some((place, key)), true, _) => {
                let message =
                    format!("must be at least {cost}, which is what a call can cost (costs.{what})");
                s.problems().add(*place, key, Some(quota.burst().to_string()), message);
            }
            (burst, _, Some(place)) => {
                let whence =
                    burst.as_ref().map_or_else(|| "by default".to_owned(), |it| s.problems().show(it.0));
                let message =
                    format!("{what} {cost} must be at most the burst, which is {} ({whence})", quota.burst());
                s.wrong(place, "costs", None, message);
            }
            // Said where they were set.
            (_, _, None) => {}
        }
    }
    if !good {
        return Err(Reported);
    }
    Ok(Written {
        limit: limit.unwrap_or_else(|| base.limit.clone()),
        limited,
        windows: if base_windows.is_empty() { windows } else { base_windows },
        costs,
        dry_run: dry_run.map_or(base.dry_run, |at| at.value),
    })
}

/// What calls cost, and where that is set, if it is.
fn costs(s: &mut Section<'_>, kind: Kind, base: Costs) -> (Result<Costs, Reported>, Option<Place>) {
    let Some(mut block) = s.block("costs") else { return (Ok(base), None) };
    let place = block.place();
    let mut read = |key| block.integer(key, 1..=i64::from(MAX_BURST)).map(|at| at.map(to_u32));
    let answer = read("answer");
    let signature = read("signature");
    let failed = if kind == Kind::Caller { read("failed_attestation") } else { None };
    let or = |at: Option<At<u32>>, base| at.map_or(base, |at| at.value);
    let costs = Costs {
        answer: or(answer, base.answer),
        signature: or(signature, base.signature),
        failed_attestation: or(failed, base.failed_attestation),
    };
    let keys = [("answer", answer), ("signature", signature), ("failed_attestation", failed)];
    let mut good = keys.iter().all(|(key, at)| at.is_some() || !block.has(key));
    let mut above_answer = |key: &str, at: Option<At<u32>>, value: u32| {
        if value >= costs.answer {
            return;
        }
        good = false;
        match (at, answer) {
            (Some(at), _) => {
                let message = format!("must be at least answer, which is {}", costs.answer);
                block.wrong(at.place, key, Some(value.to_string()), message);
            }
            (None, Some(answer)) => {
                let message = format!("must be at most {key}, which is {value} unless it is set too");
                block.wrong(answer.place, "answer", Some(answer.value.to_string()), message);
            }
            (None, None) => {}
        }
    };
    above_answer("signature", signature, costs.signature);
    if kind == Kind::Caller {
        above_answer("failed_attestation", failed, costs.failed_attestation);
    }
    block.finish();
    (if good { Ok(costs) } else { Err(Reported) }, Some(place))
}

/// The windows of a limit, which do not overlap.
fn schedule(s: &mut Section<'_>) -> Result<Vec<(Window, Bound)>, Reported> {
    let blocks = merged(s.labelled("schedule"));
    if let Some(last) = blocks.get(MAX_WINDOWS) {
        let message = format!("{} windows must be at most {MAX_WINDOWS}", blocks.len());
        s.problems().add(last.place, &last.section.name(), None, message);
        blocks.into_iter().for_each(|block| block.section.ignore());
        return Err(Reported);
    }
    let mut good = true;
    let mut found: Vec<(Window, Bound, &str, Place)> = Vec::new();
    for Labelled { label, place, mut section } in blocks {
        let start = moment(&mut section, "start", 23);
        let stop = moment(&mut section, "stop", 24);
        let limit = limit(&mut section, &FREE);
        let wrong = |place: Place, key: Option<&str>, message: String| {
            let name = key.map_or_else(|| section.name(), |key| section.path(key));
            section.problems().add(place, &name, None, message);
        };
        let window = match (start, stop) {
            (Ok(start), Ok(stop)) => Window::new(start.value, stop.value)
                .map_err(|err| match err {
                    ScheduleError::Never(moment)
                    | ScheduleError::Gap(moment)
                    | ScheduleError::WeekdayAndDate(moment)
                        if moment == start.value =>
                    {
                        wrong(start.place, Some("start"), err.to_string());
                    }
                    ScheduleError::Never(_) | ScheduleError::Gap(_) | ScheduleError::WeekdayAndDate(_) => {
                        wrong(stop.place, Some("stop"), err.to_string());
                    }
                    err => wrong(place, None, err.to_string()),
                })
                .ok(),
            _ => None,
        };
        if let Ok(None) = limit {
            wrong(place, None, format!("must say what holds in this window: {A_LIMIT}"));
        }
        if let Some(window) = window {
            for (other, _, other_label, at) in &found {
                if Schedule::new(vec![(*other, ()), (window, ())]).check().is_err() {
                    let at = section.problems().show(*at);
                    wrong(
                        place,
                        None,
                        format!("overlaps {}, at {at}: one limit must hold at a time", quoted(other_label)),
                    );
                    good = false;
                }
            }
        }
        section.finish();
        match (window, limit) {
            (Some(window), Ok(Some(bound))) => found.push((window, bound, label, place)),
            _ => good = false,
        }
    }
    if good {
        Ok(found.into_iter().map(|(window, bound, ..)| (window, bound)).collect())
    } else {
        Err(Reported)
    }
}

/// `start` or `stop`. Whether such a moment comes is for [`Window::new`] to say.
fn moment(s: &mut Section<'_>, key: &'static str, last_hour: u8) -> Result<At<Moment>, Reported> {
    let Some(mut block) = s.block(key) else {
        s.missing(key, format_args!("must be set, in UTC: {key} {{ hour = 22 }}"));
        return Err(Reported);
    };
    let mut field = |key, least: u8, most: u8| {
        let at = block.integer(key, i64::from(least)..=i64::from(most));
        at.and_then(|at| u8::try_from(at.value).ok())
    };
    let mut moment = Moment {
        second: field("second", 0, 59),
        minute: field("minute", 0, 59),
        hour: field("hour", 0, last_hour),
        day: field("day", 1, 31),
        month: field("month", 1, 12),
        weekday: None,
    };
    let weekday = block.parsed("weekday", Weekday::parse, "must be a day such as monday or mon");
    moment.weekday = weekday.map(|at| at.value);
    let place = block.place();
    let fields = [
        ("second", moment.second.is_some()),
        ("minute", moment.minute.is_some()),
        ("hour", moment.hour.is_some()),
        ("day", moment.day.is_some()),
        ("month", moment.month.is_some()),
        ("weekday", moment.weekday.is_some()),
    ];
    let good = fields.iter().all(|(key, is)| *is || !block.has(key));
    block.finish();
    if good { Ok(At { value: moment, place }) } else { Err(Reported) }
}

/// What one caller may at the gate; what is not said is as in `base`.
fn gate_rule(s: &mut Section<'_>, base: &GateRule) -> Result<GateRule, Reported> {
    let connections = s.integer("connections", 1..=MAX_CONNECTIONS);
    let rate = limit(s, &FREE);
    let dry_run = s.boolean("dry_run");
    let good = (connections.is_some() || !s.has("connections")) && (dry_run.is_some() || !s.has("dry_run"));
    let rate = rate?.map_or(base.rate, |bound| bound.limit);
    if let (Some(at), Limit::Exempt | Limit::Block | Limit::Unlimited) = (connections, rate) {
        let message = "is not looked at beside exempt, block or unlimited: take one of them out";
        s.wrong(at.place, "connections", Some(at.value.to_string()), message);
        return Err(Reported);
    }
    if !good {
        return Err(Reported);
    }
    let connections = connections.and_then(|at| NonZeroU32::new(to_u32(at.value)));
    Ok(GateRule {
        connections: connections.or(base.connections),
        rate,
        dry_run: dry_run.map_or(base.dry_run, |at| at.value),
    })
}

fn connection(mut block: Section<'_>, settings: &mut ConnectionSettings) {
    let s = &mut block;
    let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
    let value = |at: Option<At<Duration>>| at.map(|at| at.value);
    let handshake = s.duration("handshake_timeout", Duration::from_millis(100)..=Duration::from_secs(300));
    set(&mut settings.handshake_timeout, value(handshake));
    if let Some(At { value, place }) = s.duration("idle_timeout", Duration::ZERO..=24 * hour) {
        if !value.is_zero() && value < second {
            let message = "must be 0 (it may stay for ever), or from 1s to 24h";
            s.wrong(place, "idle_timeout", Some(format!("\"{}\"", show_duration(value))), message);
        } else {
            settings.idle_timeout = Some(value).filter(|value| !value.is_zero());
        }
    }
    set(&mut settings.stall_timeout, value(s.duration("stall_timeout", second..=hour)));
    set(&mut settings.linger, value(s.duration("linger", Duration::ZERO..=second)));
    let number = |at: Option<At<i64>>| at.map(|at| to_u32(at.value));
    set(&mut settings.streams, number(s.integer("streams", 1..=1024)));
    set(&mut settings.header_bytes, number(s.integer("header_bytes", 1024..=16_384)));
    set(&mut settings.resets, number(s.integer("resets", 1..=1024)));
    block.finish();
}

fn node(mut block: Section<'_>, node: &mut NodeSettings) {
    let s = &mut block;
    let quota = |s: &mut Section<'_>| {
        let bound = limit(s, &FREE_OF_NODE).ok().flatten()?;
        Some(if let Limit::Quota(quota) = bound.limit { Some(quota) } else { None })
    };
    set(&mut node.default, quota(s));
    set(&mut node.dry_run, s.boolean("dry_run").map(|at| at.value));
    let number = |at: Option<At<i64>>| at.and_then(|at| NonZeroU32::new(to_u32(at.value)));
    let all = s.integer("attestations", 1..=65_536);
    let each = s.integer("attestations_per_caller", 1..=65_536);
    set(&mut node.attestations, number(all));
    match each {
        Some(each) if each.value > i64::from(node.attestations.get()) => {
            let message = format!("must be at most attestations, which is {}", node.attestations);
            s.wrong(each.place, "attestations_per_caller", Some(each.value.to_string()), message);
        }
        Some(_) => set(&mut node.attestations_per_caller, number(each)),
        None => node.attestations_per_caller = node.attestations_per_caller.min(node.attestations),
    }
    for Labelled { label, place, mut section } in merged(s.labelled("method")) {
        let method = method(&section, label, place, Kind::Caller);
        let found = limit(&mut section, &FREE_OF_NODE);
        if let Ok(None) = found {
            let message = "must have a limit: rate with burst, or unlimited";
            section.problems().add(place, &section.name(), None, message);
        }
        if let (Ok(method), Ok(Some(bound))) = (method, found) {
            let quota = if let Limit::Quota(quota) = bound.limit { Some(quota) } else { None };
            node.methods.push((method, quota));
        }
        section.finish();
    }
    block.finish();
}

fn memory(mut block: Section<'_>, memory: &mut budget::Settings) {
    let s = &mut block;
    let right = "must be \"auto\", or bytes from 8 MiB to 1 TiB: \"24MiB\" (also KiB, GiB), or 25165824";
    let limit = s.parsed("limit", parse_memory, right);
    set(&mut memory.limit, limit.map(|at| at.value));
    let usual = *memory;
    let mut step = |key| s.integer(key, 1..=100);
    let steps = [
        ("shrink_caches_at", step("shrink_caches_at"), usual.shrink_caches_at),
        ("refuse_new_at", step("refuse_new_at"), usual.refuse_new_at),
        ("close_heaviest_at", step("close_heaviest_at"), usual.close_heaviest_at),
    ];
    let steps = steps.map(|(key, at, usual)| {
        let value = at.and_then(|at| u8::try_from(at.value).ok()).unwrap_or(usual);
        (key, at.map(|at| at.place), value)
    });
    let mut rising = true;
    for pair in steps.windows(2) {
        let [(low_key, low_place, low), (key, place, high)] = pair else { continue };
        if low < high {
            continue;
        }
        rising = false;
        if let Some(place) = place {
            s.wrong(*place, key, Some(high.to_string()), format!("must be above {low_key}, which is {low}"));
        } else if let Some(place) = low_place {
            s.wrong(*place, low_key, Some(low.to_string()), format!("must be below {key}, which is {high}"));
        }
    }
    if let ([(.., shrink), (.., refuse), (.., close)], true) = (steps, rising) {
        memory.shrink_caches_at = shrink;
        memory.refuse_new_at = refuse;
        memory.close_heaviest_at = close;
    }
    block.finish();
}

fn parse_memory(text: &str) -> Option<MemoryLimit> {
    if text == "auto" {
        return Some(MemoryLimit::Cgroup);
    }
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let found =
        units.into_iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?.trim_end(), shift)));
    let (digits, shift) = found.unwrap_or((text, 0));
    // `parse` would take a plus sign.
    let number: u64 = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))?;
    let bytes = number.checked_mul(1 << shift)?;
    (8 << 20..=1 << 40).contains(&bytes).then_some(MemoryLimit::Bytes(bytes))
}
