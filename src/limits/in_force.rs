//! What is set about limits, in words for an admin: the rules that somebody wrote, and where the memory budget comes from.

use super::{
    beyond_budget::{BeyondBudget, MEMORY_LIMIT, RESERVE},
    bucket::Quota,
    budget::{BudgetFrom, MemoryBounds},
    gate_plan::{GatePlan, newcomers_within},
    gate_settings::{GatePlaces, GateRule},
    method::Method,
    policy::Layers,
    rule::{Limit, Origin, Rule},
    settings::LimitSettings,
};

/// The most lines about limits that are told.
const MOST: usize = 32;

/// Limits in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsInForce {
    /// One line for each limit that somebody set, bounded.
    pub set: Vec<String>,
    /// Where the memory budget comes from.
    pub budget_from: &'static str,
    /// Thousandths of a core that the agent may use before defaults bind.
    pub millicores: u64,
    /// Nothing is refused: what would be is counted.
    pub dry_run: bool,
    /// What is set and cannot be had.
    pub wrong: Vec<BeyondBudget>,
    /// Why fewer callers than should be are sure to be served.
    pub fewer_served: Vec<BeyondBudget>,
}

impl LimitsInForce {
    /// Notes why fewer callers than should be are sure to be served by this plan, where it is so.
    pub fn note_fewer_served(&mut self, plan: &GatePlan) {
        let sure = |callers| format!("only {callers} callers that hold nothing are sure to be served");
        let of_descriptors = plan.fewer_have_descriptors().map(|callers| {
            let sure = sure(callers);
            format!("there are few descriptors (LimitNOFILE, or ulimit -n): when they run short, {sure}")
        });
        let of_memory = plan.fewer_fit().map(|callers| {
            format!(
                "the memory budget, {} bytes, is small: when it runs short, {}",
                plan.budget,
                sure(callers)
            )
        });
        let told = |why| BeyondBudget { key: RESERVE, value: plan.asked_reserve.into(), why };
        self.fewer_served = of_descriptors.into_iter().chain(of_memory).map(told).collect();
    }
}

impl LimitSettings {
    /// What is set here, where memory has these bounds; `set_at` is where a key is set.
    pub fn in_force(
        &self,
        bounds: MemoryBounds,
        set_at: impl Fn(&'static str) -> Option<String>,
    ) -> LimitsInForce {
        let mut set = Vec::new();
        self.gate_lines(&mut set);
        layer_lines("caller", &self.caller, &mut set);
        layer_lines("identity", &self.identity, &mut set);
        for method in Method::ALL {
            if let Some(quota) = self.node.quotas.get(method)
                && quota.origin == Origin::Set
            {
                set.push(format!("node, {}: {}", method.rpc(), quota_text(quota.quota)));
            }
        }
        let more = set.len().saturating_sub(MOST);
        if more > 0 {
            set.truncate(MOST);
            set.push(format!("and {more} more"));
        }
        let budget = self.memory.budget(bounds);
        let above = self.memory.above(bounds).zip(bounds.cgroup).map(|(value, cgroup)| {
            let why = format!("is above the {cgroup} bytes of the agent's cgroup, which count");
            BeyondBudget { key: MEMORY_LIMIT, value, why }
        });
        let mut wrong: Vec<BeyondBudget> =
            above.into_iter().chain(self.reserve_beyond(budget.bytes)).collect();
        // Of a budget that somebody set, or of a cgroup, it is an error.
        if budget.from == BudgetFrom::Machine {
            let beyond = self.beyond(budget.bytes, "the budget, a part of the machine's memory,", set_at);
            wrong.extend(beyond.into_iter().map(|BeyondBudget { key, value, why }| {
                let why = format!("{why}, or set {MEMORY_LIMIT} (until then what fits counts)");
                BeyondBudget { key, value, why }
            }));
        }
        LimitsInForce {
            set,
            budget_from: budget.from.text(),
            millicores: self.node.cpu.millicores(),
            dry_run: self.dry_run,
            wrong,
            fewer_served: Vec::new(),
        }
    }

    /// Says how many of the callers of a reserve that somebody set are kept places for, where that is not all of them.
    fn reserve_beyond(&self, budget: u64) -> Option<BeyondBudget> {
        let places = self.gate.places;
        let reserve = places.reserve();
        let of_connections = places.connections().map_or(reserve, |all| places.reserve_of(all));
        let in_memory = newcomers_within(budget);
        if reserve <= GatePlaces::RESERVE || reserve <= of_connections.min(in_memory) {
            return None;
        }
        let why = if in_memory < of_connections {
            format!("an eighth of the memory budget has room for {in_memory}, which count")
        } else {
            format!("at most half of gate.connections are kept: {of_connections} count")
        };
        Some(BeyondBudget { key: RESERVE, value: reserve.into(), why })
    }

    fn gate_lines(&self, set: &mut Vec<String>) {
        let mut tell = |whose: &str, rule: &GateRule| {
            if let Some(connections) = rule.connections {
                set.push(format!("gate, {whose}: {connections} connections"));
            }
            if let Some(rate) = rule.rate {
                set.push(format!("gate, {whose}: {} new connections", limit_text(rate)));
            }
        };
        tell("each caller", self.gate.rules.default_rule());
        let overrides = self.gate.rules.override_count();
        if overrides > 0 {
            set.push(format!("gate: {}", overrides_text(overrides)));
        }
        if let Some(connections) = self.gate.places.connections() {
            set.push(format!("gate, all callers: {connections} connections"));
        }
    }
}

fn layer_lines<P>(stage: &str, layers: &Layers<P>, set: &mut Vec<String>) {
    let mut tell = |what: &str, rule: &Rule| {
        let dry = if rule.dry_run { ", dry run" } else { "" };
        let windows = match rule.schedule().values().count() {
            0 => String::new(),
            1 => "1 schedule".to_owned(),
            windows => format!("{windows} schedules"),
        };
        match (rule.origin(), windows.is_empty()) {
            (Origin::Set, true) => set.push(format!("{stage}, {what}: {}{dry}", limit_text(rule.limit()))),
            (Origin::Set, false) => {
                set.push(format!("{stage}, {what}: {}, {windows}{dry}", limit_text(rule.limit())));
            }
            (Origin::ByDefault, false) => set.push(format!("{stage}, {what}: {windows}{dry}")),
            (Origin::ByDefault, true) => {}
        }
    };
    tell("each method", &layers.default);
    for method in Method::ALL {
        if let Some(rule) = layers.methods.get(method) {
            tell(method.rpc(), rule);
        }
    }
    let overrides = layers.overrides.len();
    if overrides > 0 {
        set.push(format!("{stage}: {}", overrides_text(overrides)));
    }
}

fn overrides_text(number: usize) -> String {
    if number == 1 { "1 override".to_owned() } else { format!("{number} overrides") }
}

/// A limit in words.
pub(super) fn limit_text(limit: Limit) -> String {
    match limit {
        Limit::Quota(quota) => quota_text(quota),
        Limit::Unlimited => "unlimited".to_owned(),
        Limit::Exempt => "exempt".to_owned(),
        Limit::Block => "blocked".to_owned(),
    }
}

/// In the largest unit that says it in a number of at least one, or by the day.
fn quota_text(quota: Quota) -> String {
    let (seconds, unit) = [(1, "a second"), (60, "a minute"), (3600, "an hour")]
        .into_iter()
        .find(|(seconds, _)| quota.millis_per(*seconds) >= 1000)
        .unwrap_or((86_400, "a day"));
    let thousandths = quota.millis_per(seconds);
    let (whole, part) = (thousandths / 1000, thousandths % 1000);
    let rate = if part == 0 { whole.to_string() } else { format!("{whole}.{part:03}") };
    format!("{rate} {unit}, {} at once", quota.burst())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{
        bucket::Per,
        budget::MemoryLimit,
        caller_pattern::CallerPattern,
        rule::Costs,
        schedule::{Moment, Schedule, Window},
        settings::NodeQuota,
    };

    #[test]
    fn of_two_budgets_the_lower_one_counts_and_the_other_is_told() {
        let mut settings = LimitSettings::default();
        settings.memory.limit = MemoryLimit::bytes(64 << 20).unwrap();
        for (cgroup, from, wrong) in [
            (None, "ratelimit.memory.limit", 0),
            (Some(64 << 20), "ratelimit.memory.limit", 0),
            (Some(24 << 20), "the memory limit of its cgroup", 1),
        ] {
            let told = settings.in_force(MemoryBounds { cgroup, machine: Some(1 << 30) }, |_| None);
            assert_eq!((told.budget_from, told.wrong.len()), (from, wrong), "{cgroup:?} {:?}", told.wrong);
        }
    }

    #[test]
    fn a_reserve_of_which_less_counts_is_told() {
        for (connections, reserve, budget, wrong) in [
            (None, None, Some(8 << 20), None),
            (None, Some(76), Some(24 << 20), None),
            (None, Some(500), None, None),
            (
                None,
                Some(500),
                Some(24 << 20),
                Some("an eighth of the memory budget has room for 76, which count"),
            ),
            (Some(800), Some(500), None, Some("at most half of gate.connections are kept: 400 count")),
            (
                Some(800),
                Some(500),
                Some(24 << 20),
                Some("an eighth of the memory budget has room for 76, which count"),
            ),
        ] {
            let mut settings = LimitSettings::default();
            settings.gate.places = GatePlaces::new(connections, reserve).unwrap();
            let want: Vec<BeyondBudget> = wrong
                .map(|why| BeyondBudget { key: RESERVE, value: 500, why: why.to_owned() })
                .into_iter()
                .collect();
            // A machine with room for all of it.
            let bounds = MemoryBounds { cgroup: budget, machine: Some(64 << 30) };
            let wrong = settings.in_force(bounds, |_| None).wrong;
            assert_eq!(wrong, want, "{connections:?}, {reserve:?}, {budget:?}");
        }
    }

    #[test]
    fn what_is_set_is_told_and_what_is_not_is_not() {
        let mut settings = LimitSettings::default();
        let in_force = |settings: &LimitSettings| settings.in_force(MemoryBounds::default(), |_| None);
        let nothing = in_force(&settings);
        let from = "a part of the machine's memory";
        assert_eq!((nothing.set, nothing.budget_from, nothing.millicores), (vec![], from, 500));
        let quota = |rate, per, burst| Quota::new(rate, per, burst).unwrap();
        let rule = |limit| Rule::new(limit, Costs::ONE, Schedule::default()).unwrap();
        settings.caller = Layers::<CallerPattern>::new(rule(Limit::Quota(quota(20.0, Per::Second, 40))));
        settings.caller.methods.set(Method::Other, Some(rule(Limit::Block)));
        let node = NodeQuota::set(quota(30.0, Per::Minute, 60));
        settings.node.quotas.set(Method::FetchJwtSvid, Some(node));
        let told = in_force(&settings);
        assert_eq!(
            told.set,
            [
                "caller, each method: 20 a second, 40 at once",
                "caller, Other: blocked",
                "node, FetchJWTSVID: 30 a minute, 60 at once",
            ]
        );

        // A schedule alone, around which the default holds.
        let window = |hour| {
            let moment = |hour| Moment { hour: Some(hour), ..Moment::default() };
            (Window::new(moment(hour), moment(hour + 1)).unwrap(), Limit::Block)
        };
        let mut settings = LimitSettings::default();
        let usual = settings.caller.default.limit();
        let schedule = Schedule::new(vec![window(1), window(4)]).unwrap();
        let rule = Rule::new(usual, Costs::ONE, schedule).unwrap().of_origin(Origin::ByDefault);
        settings.caller = Layers::<CallerPattern>::new(rule);
        assert_eq!(in_force(&settings).set, ["caller, each method: 2 schedules"]);
    }
}
