//! Everything that is set about limits. Each part checks itself when it is made, so all settings there are can
//! be put in force; what depends on the machine is asked by [`GatePlan::new`](super::gate_plan::GatePlan::new).

use super::{
    bucket::Quota,
    budget::MemorySettings,
    caller::Families,
    caller_pattern::CallerPattern,
    gate_settings::GateSettings,
    id_pattern::IdPattern,
    method::PerMethod,
    policy::Layers,
    processor::ProcessorShare,
    refusal::RejectionStatus,
    rule::{Costs, Limit, Origin, Rule},
    slots::Attestations,
    table_size::TableSize,
};

/// What the `ratelimit` block says. All of it reloads; what was spent stays spent.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitSettings {
    pub gate: GateSettings,
    /// Calls of a caller, before attestation. Default: 100 a second, 200 at once, for each method.
    pub caller: Layers<CallerPattern>,
    /// Calls for an identity, after attestation. One identity may be many callers, so the default is twice the
    /// caller's: 200 a second, 400 at once, for each method.
    pub identity: Layers<IdPattern>,
    pub node: NodeSettings,
    /// How many keys have a bucket, in the table of each stage. Default 16,384.
    pub keys: TableSize,
    /// Everything is decided and counted as `would_exceed`, and nothing is refused. Default off.
    pub dry_run: bool,
    /// What a refused caller is told. Default [`RejectionStatus::ResourceExhausted`].
    pub rejection_status: RejectionStatus,
    /// When a bucket counts as nearly used up. Default: none.
    pub soft_limits: SoftLimits,
    /// How much memory the agent may use. Default: from its cgroup.
    pub memory: MemorySettings,
    /// Which callers are one user's: from the node's `/etc/subuid`, not from the block. Default: none.
    pub families: Families,
}

impl Default for LimitSettings {
    fn default() -> Self {
        let quota = |rate, burst| Limit::Quota(Quota::constant(rate, burst));
        Self {
            gate: GateSettings::default(),
            caller: Layers::new(Rule::usual(quota(100, 200), Costs::OF_CALLERS)),
            identity: Layers::new(Rule::usual(quota(200, 400), Costs::OF_IDENTITIES)),
            node: NodeSettings::default(),
            keys: TableSize::default(),
            dry_run: false,
            rejection_status: RejectionStatus::default(),
            soft_limits: SoftLimits::default(),
            memory: MemorySettings::default(),
            families: Families::default(),
        }
    }
}

/// What all callers of the node share. Refusals by it are load shedding, always [`RejectionStatus::Unavailable`].
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSettings {
    /// Calls that passed all else; `None` for no limit. Default: 5,000 a second, 10,000 at once, for each method.
    pub quotas: PerMethod<Option<NodeQuota>>,
    /// Refusals by these buckets are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
    /// Calls being attested at once, and as many updates of streams.
    pub attestations: Attestations,
    /// How much of the processor the agent may use before what nobody set binds. Default: half a core.
    pub cpu: ProcessorShare,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            quotas: PerMethod::all(Some(NodeQuota {
                quota: Quota::constant(5_000, 10_000),
                origin: Origin::ByDefault,
            })),
            dry_run: false,
            attestations: Attestations::default(),
            cpu: ProcessorShare::default(),
        }
    }
}

/// A bucket that all callers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeQuota {
    pub quota: Quota,
    pub origin: Origin,
}

impl NodeQuota {
    /// An admin's word.
    pub fn set(quota: Quota) -> Self {
        Self { quota, origin: Origin::Set }
    }
}

/// Steps in percent of a bucket, at which going over one is counted: a bit for each of [`SoftLimits::STEPS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoftLimits(u8);

impl SoftLimits {
    /// The steps there are, and their metric label. A closed set for that.
    pub(super) const STEPS: [(u8, &str); 8] =
        [(50, "50"), (60, "60"), (70, "70"), (75, "75"), (80, "80"), (90, "90"), (95, "95"), (100, "100")];
    /// The least of the steps there are.
    pub(super) const LEAST: u8 = Self::STEPS[0].0;

    /// These steps.
    ///
    /// # Errors
    /// [`SoftLimitError`] for the first that there is not.
    pub fn new(steps: &[u8]) -> Result<Self, SoftLimitError> {
        let mut set = Self::default();
        for step in steps {
            let at = Self::STEPS.iter().position(|(known, _)| known == step).ok_or(SoftLimitError(*step))?;
            set.0 |= 1 << at;
        }
        Ok(set)
    }

    /// Every step there is, as text: `50, 60`.
    pub fn known() -> String {
        Self::STEPS.map(|(_, text)| text).join(", ")
    }

    /// The steps that are set, with their place in [`SoftLimits::STEPS`].
    pub(super) fn steps(self) -> impl Iterator<Item = (usize, u8)> {
        let all = Self::STEPS.iter().enumerate();
        all.filter(move |(at, _)| self.0 & 1 << at != 0).map(|(at, (step, _))| (at, *step))
    }
}

/// A soft limit that there is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("soft limit {0} must be one of {known} (percent of a burst)", known = SoftLimits::known())]
pub struct SoftLimitError(u8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::schedule::Schedule;

    #[test]
    fn the_defaults_are_in_order() {
        let settings = LimitSettings::default();
        for rule in [settings.caller.default, settings.identity.default] {
            let made = Rule::new(rule.limit(), rule.costs(), Schedule::default());
            assert_eq!(made.map(|made| made.of_origin(Origin::ByDefault)), Ok(rule));
        }
        for costs in [Costs::OF_CALLERS, Costs::OF_IDENTITIES] {
            let made = Costs::new(costs.answer(), costs.signature(), costs.failed_attestation());
            assert_eq!(made, Ok(costs));
        }
        assert_eq!(Attestations::new(None, None), Ok(Attestations::default()));
        assert!(SoftLimits::new(&[80, 81]).is_err());
        assert_eq!(SoftLimits::new(&[]), Ok(SoftLimits::default()));
    }
}
