//! The rules of a stage: its default, its methods and its overrides.

use std::collections::HashMap;

use super::rule::{A_LIMIT, Written, merged, method, set, written};
use crate::{
    hcl::{
        problems::Problems,
        section::Section,
        tree::{Place, quoted},
    },
    identity::TrustDomain,
    limits::{
        CallerKey, Method,
        caller_pattern::CallerPattern,
        id_pattern::IdPattern,
        pattern::{NoAnswer, Pattern, PatternError},
        policy::{Layers, MaskWithoutShare, Methods, Override, Overrides, OverridesError, Share},
        refusal::Stage,
        rule::Rule,
    },
    store::CacheSettings,
};

/// So many overrides that contradict another are named, one by one.
const MAX_CONFLICTS: usize = 16;

/// What the block is held against.
pub(in crate::config) struct Context<'a> {
    pub(in crate::config) problems: &'a Problems,
    /// `None` when it is wrong itself.
    pub(in crate::config) trust_domain: Option<&'a TrustDomain>,
    pub(in crate::config) user_id: &'a dyn Fn(&str) -> Result<Option<u32>, NoAnswer>,
    /// Whether `agent.kubernetes` says that no caller is a pod.
    pub(in crate::config) no_pods: bool,
    pub(in crate::config) caches: &'a CacheSettings,
}

/// Where a rule stands, and the full name of its block.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) place: Place,
    pub(super) name: String,
}

impl Block {
    pub(super) fn of(section: &Section<'_>) -> Self {
        Self { place: section.place(), name: section.name() }
    }
}

impl Context<'_> {
    pub(super) fn caller_pattern(&self, text: &str) -> Result<CallerPattern, PatternError> {
        match CallerPattern::parse(text, self.user_id)? {
            CallerPattern::AnyPod | CallerPattern::One(CallerKey::Pod(_)) if self.no_pods => {
                Err(PatternError::NoPods(text.into()))
            }
            pattern => Ok(pattern),
        }
    }

    pub(super) fn id_pattern(&self, text: &str) -> Result<IdPattern, PatternError> {
        // First: what is wrong with the rest of it may not be so in another trust domain.
        let named = text.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/'));
        let named = named.and_then(|(name, _path)| TrustDomain::parse(name).ok());
        match (self.trust_domain, named) {
            (Some(ours), Some(theirs)) if *ours != theirs => {
                Err(PatternError::Foreign { pattern: text.into(), trust_domain: ours.clone() })
            }
            _ => IdPattern::parse(text),
        }
    }

    /// `caller` or `identity`. Says where each of its methods stands.
    pub(super) fn stage<P: Pattern>(
        &self,
        mut block: Section<'_>,
        stage: Stage,
        layers: &mut Layers<P>,
        pattern: &dyn Fn(&str) -> Result<P, PatternError>,
    ) -> HashMap<Method, Place> {
        let s = &mut block;
        let mut base = Written::of(&layers.default);
        if let Ok(written) = written(s, stage, &base) {
            layers.default = written.rule.clone();
            base = written;
        }
        let mut named = HashMap::new();
        for mut section in merged(s.labelled("method")) {
            let method = method(&section, stage);
            if let (Ok(written), Ok(method)) = (written(&mut section, stage, &base), method) {
                named.insert(method, section.place());
                layers.methods.set(method, Some(written.rule));
            }
            section.finish();
        }
        let mut found = Vec::new();
        for it in merged(s.labelled("override")) {
            let parsed = pattern(it.label()).map_err(|err| it.wrong_block(err));
            found.extend(self.overrides(it, stage, &base, parsed.ok()));
        }
        set(&mut layers.overrides, self.together(found, |it| it.pattern().to_string(), Overrides::new));
        block.finish();
        named
    }

    /// One block for callers or identities: a rule for all methods, if it has a limit, and one for each
    /// `method` in it.
    fn overrides<P: Pattern>(
        &self,
        mut s: Section<'_>,
        stage: Stage,
        base: &Written,
        pattern: Option<P>,
    ) -> Vec<(Override<P>, Block)> {
        let shared = s.boolean("share").is_some_and(|at| at.value);
        let written_here = written(&mut s, stage, base);
        let limited = written_here.as_ref().is_ok_and(|it| it.limited);
        let has_rules = ["costs", "dry_run"].iter().any(|key| s.has(key));
        if stage == Stage::Caller && self.no_pods && s.label() == "uid:*" && !shared {
            s.wrong_block(PatternError::Everybody(s.label().into()));
        }
        if written_here.is_ok() && !limited {
            if s.has("schedule") || (has_rules && !s.has("method")) {
                s.wrong_block(format_args!("must have a limit for all the time: {A_LIMIT}"));
            } else if !shared && !s.has("method") {
                s.wrong_block(format_args!(
                    "changes nothing: it must have a limit ({A_LIMIT}), share = true, or a method"
                ));
            }
        }
        let mut rules = Vec::new();
        if let Ok(written) = &written_here
            && (limited || shared)
        {
            rules.push((Methods::All, limited.then(|| written.rule.clone()), Block::of(&s)));
        }
        let base = written_here.as_ref().unwrap_or(base);
        for mut section in merged(s.labelled("method")) {
            let method = method(&section, stage);
            let written = written(&mut section, stage, base);
            if let (Ok(written), Ok(method)) = (written, method) {
                if written.limited || limited {
                    rules.push((Methods::only(&[method]), Some(written.rule), Block::of(&section)));
                } else if written_here.is_ok() {
                    let message = "must have a limit, here or in the block around it";
                    section.wrong_block(format_args!("{message}: {A_LIMIT}"));
                }
            }
            section.finish();
        }
        let found = pattern.map_or(Ok(Vec::new()), |pattern| of_pattern(&pattern, shared, rules));
        let found = found.unwrap_or_else(|err| {
            s.wrong_block(err);
            Vec::new()
        });
        s.finish();
        found
    }

    /// Puts overrides together. Of two that contradict each other the second is named, and left out.
    pub(super) fn together<O: Clone, T>(
        &self,
        mut written: Vec<(O, Block)>,
        pattern: impl Fn(&O) -> String,
        put: impl Fn(Vec<O>) -> Result<T, OverridesError>,
    ) -> Option<T> {
        for _ in 0..MAX_CONFLICTS {
            let (at, message) = match put(written.iter().map(|(it, _)| it.clone()).collect()) {
                Ok(all) => return Some(all),
                Err(OverridesError::Conflict { first, second }) => {
                    let (other, there) = written.get(first)?;
                    let (other, there) = (quoted(&pattern(other)), self.problems.show(there.place));
                    let message = format!(
                        "contradicts {other}, at {there}: some callers match both, and neither is more specific"
                    );
                    (second, message)
                }
                Err(err @ OverridesError::TooMany(_)) => (written.len() - 1, err.to_string()),
            };
            let (_, here) = written.remove(at);
            self.problems.add(here.place, &here.name, None, message);
        }
        None
    }
}

/// An override of `pattern` for each of the rules, with the place of each.
fn of_pattern<P: Pattern>(
    pattern: &P,
    shared: bool,
    rules: Vec<(Methods, Option<Rule>, Block)>,
) -> Result<Vec<(Override<P>, Block)>, MaskWithoutShare> {
    let each = |(methods, rule, here)| {
        let share = match rule {
            Some(rule) if !shared => Share::Each(rule),
            rule => Share::Together(rule),
        };
        Ok((Override::new(pattern.clone(), methods, share)?, here))
    };
    rules.into_iter().map(each).collect()
}
