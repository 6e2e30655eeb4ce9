//! `ratelimit`: from blocks to [`LimitSettings`].
//!
//! A limit is written in one way everywhere: `rate`, `per` and `burst`, or one of `exempt`, `block` and
//! `unlimited`. What a block does not say about costs and dry run is as in the block around it, and a `method`
//! without a limit of its own takes that one too; in [`LimitSettings`] each rule is whole. Blocks with one
//! label are read as one, across all files, so whatever is set in two places is an error that names both.
//!
//! What is right is for the constructors in [`limits`](crate::limits) to say. They are asked here with what was
//! read, so that each mistake is told with its place.

mod rule;
mod stage;

use std::{collections::HashMap, num::NonZeroU32, time::Duration};

pub(super) use self::stage::Context;
use self::{
    rule::{A_LIMIT, FREE, Reported, limit, merged, method, set},
    stage::Block,
};
use crate::{
    hcl::{
        section::{At, Section},
        show_duration,
        tree::{Place, abridged, quoted},
    },
    limits::{
        Attestations, AttestationsError, ConnectionSettings, GatePlaces, GateRule, GateRules, GateSettings,
        LimitSettings, Method, NodeQuota, NodeSettings, RejectionStatus, SoftLimits, TableSize,
        beyond_budget::{self, BeyondBudget},
        bucket::{MAX_BURST, Quota},
        budget::{MemoryLimit, MemorySettings, MemorySteps, MemoryStepsError},
        gate_settings::{GatePlacesError, MAX_CONNECTIONS},
        method::PerMethod,
        pattern::PatternError,
        processor::ProcessorShare,
        refusal::Stage,
        rule::{Costs, Limit, Rule},
        schedule::Schedule,
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

/// What all share can be without a limit, and no more.
const FREE_OF_NODE: [(&str, Limit); 1] = [("unlimited", Limit::Unlimited)];

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
        if let Some(at) = s.integer(key, 0..=MAX_BURST) {
            keys.push(SpireKey { name: s.path(key), place: at.place, method, limit: at.value });
        }
    }
    keys
}

impl Context<'_> {
    /// Reads the block, if there is one; `spire` are the keys of `experimental.ratelimit`.
    pub(super) fn settings(&self, block: Option<Section<'_>>, mut spire: Vec<SpireKey>) -> LimitSettings {
        let mut settings = LimitSettings::default();
        let mut methods = HashMap::new();
        if let Some(mut block) = block {
            let s = &mut block;
            whole(s, &mut settings);
            for key in spire_keys(s) {
                match spire.iter().find(|first| first.method == key.method) {
                    Some(first) => self.contradicts(&key, &first.name, first.place),
                    None => spire.push(key),
                }
            }
            if let Some(gate) = s.block("gate") {
                self.gate(gate, &mut settings.gate);
            }
            if let Some(caller) = s.block("caller") {
                let pattern = |text: &str| self.caller_pattern(text);
                self.stage(caller, Stage::Caller, &mut settings.caller, &pattern);
            }
            if let Some(identity) = s.block("identity") {
                let pattern = |text: &str| self.id_pattern(text);
                methods = self.stage(identity, Stage::Identity, &mut settings.identity, &pattern);
            }
            if let Some(block) = s.block("node") {
                node(block, &mut settings.node);
            }
            if let Some(block) = s.block("memory") {
                memory(block, &mut settings.memory);
            }
            if let Some(budget) = settings.memory.limit.in_bytes() {
                self.within(budget, &settings);
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
                    settings.identity.methods.set(key.method, as_spire(&key, &settings.identity.default));
                }
            }
        }
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

    /// Says what can never be had within `budget` bytes, which somebody set.
    fn within(&self, budget: u64, settings: &LimitSettings) {
        let set_at = |key| self.problems.noted(key).map(|place| self.problems.show(place));
        let of_caches = self.caches.beyond(budget, "ratelimit.memory.limit", set_at);
        for BeyondBudget { key, value, why } in
            settings.beyond(budget, "memory.limit", set_at).into_iter().chain(of_caches)
        {
            if let Some(place) = self.problems.noted(key) {
                self.problems.add(place, key, Some(value.to_string()), why);
            }
        }
    }

    fn gate(&self, mut block: Section<'_>, gate: &mut GateSettings) {
        let s = &mut block;
        let most = places(s, gate);
        s.problems().note_key(beyond_budget::ADMIN, s.set_at("admin"));
        set(&mut gate.admin, s.integer("admin", GateSettings::ADMIN).map(|at| at.value));
        if let Some(block) = s.block("connection") {
            connection(block, &mut gate.connection);
        }
        let mut default = GateRule::default();
        if let Some(mut caller) = s.block("caller") {
            let rule = gate_rule(&mut caller, &default, most);
            set(&mut default, rule.ok());
            caller.finish();
        }
        let mut overrides = Vec::new();
        for mut section in merged(s.labelled("override")) {
            let empty = !["connections", "rate", "per", "burst", "exempt", "block", "unlimited", "dry_run"]
                .iter()
                .any(|key| section.has(key));
            if empty {
                let message =
                    format_args!("changes nothing: it must have connections, or a limit: {A_LIMIT}");
                section.wrong_block(message);
            }
            let rule = gate_rule(&mut section, &default, most);
            let label = section.label();
            if self.no_pods && label == "uid:*" {
                section.wrong_block(PatternError::Everybody(label.into()));
            }
            let pattern = self.caller_pattern(label).map_err(|err| section.wrong_block(err));
            if let (Ok(rule), Ok(pattern), false) = (rule, pattern, empty) {
                overrides.push(((pattern, rule), Block::of(&section)));
            }
            section.finish();
        }
        let rules = |overrides| GateRules::new(default.clone(), overrides);
        set(&mut gate.rules, self.together(overrides, |(pattern, _)| pattern.to_string(), rules));
        block.finish();
    }
}

/// The keys that hold for all stages.
fn whole(s: &mut Section<'_>, settings: &mut LimitSettings) {
    set(&mut settings.dry_run, s.boolean("dry_run").map(|at| at.value));
    let status = |text: &str| match text {
        "resource_exhausted" => Some(RejectionStatus::ResourceExhausted),
        "unavailable" => Some(RejectionStatus::Unavailable),
        _ => None,
    };
    let status = s.parsed("rejection_status", status, "must be resource_exhausted or unavailable");
    set(&mut settings.rejection_status, status.map(|at| at.value));
    s.problems().note_key(beyond_budget::KEYS, s.set_at("keys"));
    let keys = s.integer("keys", TableSize::RANGE);
    set(&mut settings.keys, keys.and_then(|at| TableSize::new(at.value).ok()));
    let mut steps = Vec::new();
    for At { value: text, place } in s.strings("soft_limits").map(|list| list.value).unwrap_or_default() {
        match text.parse().ok().filter(|step| SoftLimits::new(&[*step]).is_ok()) {
            Some(step) if steps.contains(&step) => {
                s.wrong(place, "soft_limits", Some(abridged(text)), "is listed twice");
            }
            Some(step) => steps.push(step),
            None => {
                let message = format!("must be one of {} (percent of a burst)", SoftLimits::known());
                s.wrong(place, "soft_limits", Some(abridged(text)), message);
            }
        }
    }
    set(&mut settings.soft_limits, SoftLimits::new(&steps).ok());
}

/// As spire-agent has it: so many calls a second, so many at once, each costs the same; 0 is no limit.
fn as_spire(key: &SpireKey, default: &Rule) -> Option<Rule> {
    let number = NonZeroU32::new(key.limit);
    let quota = number.and_then(|number| Quota::per_second(number, number).ok());
    let limit = quota.map_or(Limit::Unlimited, Limit::Quota);
    let mut rule = Rule::new(limit, Costs::ONE, Schedule::default()).ok()?;
    rule.dry_run = default.dry_run;
    Some(rule)
}

/// What one caller may at the gate; what is not said is as in `base`. All callers together may have `most` connections, if
/// that is set.
fn gate_rule(s: &mut Section<'_>, base: &GateRule, most: Option<u32>) -> Result<GateRule, Reported> {
    let connections = s.integer("connections", 1..=MAX_CONNECTIONS);
    if let (Some(At { value, place }), Some(most)) = (connections, most)
        && value > most
    {
        let message = format!("must be at most gate.connections, which is {most} for all callers");
        s.wrong(place, "connections", Some(value.to_string()), message);
        return Err(Reported);
    }
    let rate = limit(s, &FREE);
    let dry_run = s.boolean("dry_run");
    let good = (connections.is_some() || !s.has("connections")) && (dry_run.is_some() || !s.has("dry_run"));
    let rate = rate?.map(|bound| bound.limit).or(base.rate);
    if let (Some(at), Some(Limit::Exempt | Limit::Block)) = (connections, rate) {
        let message = "has no effect beside exempt or block: take one of them out";
        s.wrong(at.place, "connections", Some(at.value.to_string()), message);
        return Err(Reported);
    }
    if !good {
        return Err(Reported);
    }
    let connections = connections.and_then(|at| NonZeroU32::new(at.value));
    Ok(GateRule {
        connections: connections.or(base.connections),
        rate,
        dry_run: dry_run.map_or(base.dry_run, |at| at.value),
    })
}

/// How many connections there are for all. Returns the number, if it is written.
fn places(s: &mut Section<'_>, gate: &mut GateSettings) -> Option<u32> {
    s.problems().note_key(beyond_budget::CONNECTIONS, s.set_at("connections"));
    s.problems().note_key(beyond_budget::RESERVE, s.set_at("reserve"));
    let connections = s.integer("connections", GatePlaces::LEAST..=MAX_CONNECTIONS);
    let reserve = s.integer("reserve", 0..=MAX_CONNECTIONS);
    let value = |at: Option<At<u32>>| at.map(|at| at.value);
    match GatePlaces::new(value(connections), value(reserve)) {
        Ok(places) => gate.places = places,
        Err(GatePlacesError::Reserve { reserve: kept, connections: all }) => match (connections, reserve) {
            (_, Some(at)) => {
                let message = format!("must be below connections, which is {all}");
                s.wrong(at.place, "reserve", Some(kept.to_string()), message);
            }
            (Some(at), None) => {
                let message = format!("must be above reserve, which is {kept} by default");
                s.wrong(at.place, "connections", Some(all.to_string()), message);
            }
            (None, None) => {}
        },
        // Said when it was read.
        Err(GatePlacesError::Number(_)) => {}
    }
    value(connections)
}

fn connection(mut block: Section<'_>, settings: &mut ConnectionSettings) {
    use ConnectionSettings as C;
    let s = &mut block;
    let value = |at: Option<At<Duration>>| at.map(|at| at.value);
    set(&mut settings.handshake_timeout, value(s.duration("handshake_timeout", C::HANDSHAKE_TIMEOUT)));
    let (least, most) = C::IDLE_TIMEOUT.into_inner();
    if let Some(At { value, place }) = s.duration("idle_timeout", Duration::ZERO..=most) {
        if !value.is_zero() && value < least {
            let (least, most) = (show_duration(least), show_duration(most));
            let message = format!("must be 0 (it may stay for ever), or from {least} to {most}");
            s.wrong(place, "idle_timeout", Some(format!("\"{}\"", show_duration(value))), message);
        } else {
            settings.idle_timeout = Some(value).filter(|value| !value.is_zero());
        }
    }
    set(&mut settings.stall_timeout, value(s.duration("stall_timeout", C::STALL_TIMEOUT)));
    set(&mut settings.linger, value(s.duration("linger", C::LINGER)));
    let value = |at: Option<At<u32>>| at.map(|at| at.value);
    s.problems().note_key(beyond_budget::STREAMS, s.set_at("streams"));
    set(&mut settings.streams, value(s.integer("streams", C::STREAMS)));
    set(&mut settings.header_bytes, value(s.integer("header_bytes", C::HEADER_BYTES)));
    set(&mut settings.resets, value(s.integer("resets", C::STREAMS)));
    block.finish();
}

/// A bucket that all share, or none.
fn shared_bucket(s: &mut Section<'_>) -> Result<Option<Option<NodeQuota>>, Reported> {
    let bound = limit(s, &FREE_OF_NODE)?;
    Ok(bound.map(|bound| match bound.limit {
        Limit::Quota(quota) => Some(NodeQuota::set(quota)),
        Limit::Unlimited | Limit::Exempt | Limit::Block => None,
    }))
}

fn node(mut block: Section<'_>, node: &mut NodeSettings) {
    let s = &mut block;
    if let Ok(Some(default)) = shared_bucket(s) {
        node.quotas = PerMethod::all(default);
    }
    set(&mut node.dry_run, s.boolean("dry_run").map(|at| at.value));
    cpu(s, &mut node.cpu);
    let all = s.integer("attestations", 1..=Attestations::MOST);
    let each = s.integer("attestations_per_caller", 1..=Attestations::MOST);
    let value = |at: Option<At<u32>>| at.and_then(|at| NonZeroU32::new(at.value));
    match (Attestations::new(value(all), value(each)), each) {
        (Ok(attestations), _) => node.attestations = attestations,
        (Err(AttestationsError::OfOneCaller { all, per_caller }), Some(each)) => {
            let message = format!("must be at most attestations, which is {all}");
            s.wrong(each.place, "attestations_per_caller", Some(per_caller.to_string()), message);
        }
        // Said when it was read.
        (Err(AttestationsError::TooMany(_) | AttestationsError::OfOneCaller { .. }), _) => {}
    }
    for mut section in merged(s.labelled("method")) {
        let method = method(&section, Stage::Node);
        match (method, shared_bucket(&mut section)) {
            (_, Ok(None)) => section.wrong_block("must have a limit: rate with burst, or unlimited"),
            (Ok(method), Ok(Some(quota))) => node.quotas.set(method, quota),
            (Err(Reported), Ok(Some(_))) | (_, Err(Reported)) => {}
        }
        section.finish();
    }
    block.finish();
}

/// How much of the processor the agent may use.
fn cpu(s: &mut Section<'_>, share: &mut ProcessorShare) {
    let Some(At { value: (cores, text), place }) = s.number("cpu") else { return };
    match ProcessorShare::cores(cores) {
        Some(cores) => *share = cores,
        None => {
            let none = if cores == 0.0 { "is a cpu share of nothing: it " } else { "" };
            let message =
                format!("{none}must be from {} to {} cores", ProcessorShare::LEAST, ProcessorShare::MOST);
            s.wrong(place, "cpu", Some(abridged(text)), message);
        }
    }
}

fn memory(mut block: Section<'_>, memory: &mut MemorySettings) {
    let s = &mut block;
    let (least, most) = MemoryLimit::RANGE.into_inner();
    let right = format!(
        "must be \"auto\", or bytes from {} MiB to {} TiB: \"24MiB\" (also KiB, GiB, TiB), or 25165824",
        least >> 20,
        most >> 40
    );
    let limit = s.parsed("limit", parse_memory, right);
    s.problems().note_key(beyond_budget::MEMORY_LIMIT, s.set_at("limit"));
    set(&mut memory.limit, limit.map(|at| at.value));
    let keys = ["shrink_caches_at", "refuse_new_at", "close_heaviest_at"];
    s.problems().note_key(beyond_budget::SHRINK_CACHES_AT, s.set_at("shrink_caches_at"));
    s.problems().note_key(beyond_budget::REFUSE_NEW_AT, s.set_at("refuse_new_at"));
    let written = keys.map(|key| s.integer(key, MemorySteps::RANGE));
    let mut percents = memory.steps.percents();
    for (percent, at) in percents.iter_mut().zip(written) {
        set(percent, at.map(|at| at.value));
    }
    match MemorySteps::new(percents) {
        Ok(steps) => memory.steps = steps,
        Err(MemoryStepsError::Falling { step }) => {
            let steps: Vec<_> = keys.into_iter().zip(written).zip(percents).collect();
            let before = step.checked_sub(1).and_then(|before| steps.get(before));
            if let (Some(((low_key, low_at), low)), Some(((key, at), high))) = (before, steps.get(step)) {
                if let Some(at) = at {
                    let message = format!("must be above {low_key}, which is {low}");
                    s.wrong(at.place, key, Some(high.to_string()), message);
                } else if let Some(at) = low_at {
                    let message = format!("must be below {key}, which is {high}");
                    s.wrong(at.place, low_key, Some(low.to_string()), message);
                }
            }
        }
        // Said when it was read.
        Err(MemoryStepsError::Range(_)) => {}
    }
    block.finish();
}

fn parse_memory(text: &str) -> Option<MemoryLimit> {
    if text == "auto" {
        return Some(MemoryLimit::AUTO);
    }
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let found =
        units.into_iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?.trim_end(), shift)));
    let (digits, shift) = found.unwrap_or((text, 0));
    // `parse` would take a plus sign.
    let number: u64 = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))?;
    MemoryLimit::bytes(number.checked_mul(1 << shift)?)
}
