//! A rule: what may pass, what it costs, and when another limit holds. Checked when it is made.

use super::{bucket::Quota, schedule::Schedule};

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

impl Limit {
    /// Of a bucket, if it has one.
    pub(super) fn quota(self) -> Option<Quota> {
        match self {
            Self::Quota(quota) => Some(quota),
            Self::Unlimited | Self::Exempt | Self::Block => None,
        }
    }
}

/// Whose word a limit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An admin wrote it: it refuses at once, exact to the bucket, whether there is room or not.
    Set,
    /// It holds because nothing else was written: it refuses only where there is no [`room`](super::room), after a wait.
    ByDefault,
}

/// What calls cost, in tokens. Charged to the caller's bucket and to the identity's alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    answer: u32,
    signature: u32,
    failed_attestation: u32,
}

impl Costs {
    /// Of calls of a caller: 1, 2 and 5 tokens.
    pub const OF_CALLERS: Self = Self { answer: 1, signature: 2, failed_attestation: 5 };
    /// Of calls for an identity: 1 and 2 tokens. A failed attestation has no identity to charge.
    pub const OF_IDENTITIES: Self = Self { answer: 1, signature: 2, failed_attestation: 1 };

    /// Of calls as spire-agent counts them: 1 token each.
    pub const ONE: Self = Self { answer: 1, signature: 1, failed_attestation: 1 };

    /// Costs of a call that is answered from memory (at least 1), of one for which something was signed, and of
    /// one whose caller could not be attested (at least as much as an answer). Each is charged in place of the
    /// others.
    ///
    /// # Errors
    /// [`CostsError`] names the first that is too low.
    pub fn new(answer: u32, signature: u32, failed_attestation: u32) -> Result<Self, CostsError> {
        for (which, cost, least) in [
            ("answer", answer, 1),
            ("signature", signature, answer),
            ("failed_attestation", failed_attestation, answer),
        ] {
            if cost < least {
                return Err(CostsError { which, cost, least });
            }
        }
        Ok(Self { answer, signature, failed_attestation })
    }

    /// Of a call that is answered from memory; held when the call begins.
    pub fn answer(self) -> u32 {
        self.answer
    }

    /// Of a call for which something was signed.
    pub fn signature(self) -> u32 {
        self.signature
    }

    /// Of a call whose caller could not be attested, or has no identity; the caller's bucket alone pays it.
    pub fn failed_attestation(self) -> u32 {
        self.failed_attestation
    }

    /// Whether a bucket of `limit` ever holds as much as the dearest call costs.
    ///
    /// # Errors
    /// [`CostAboveBurst`]: such a call would be refused for ever.
    pub fn fit(self, limit: Limit) -> Result<(), CostAboveBurst> {
        let (which, cost) = if self.failed_attestation > self.signature {
            ("failed_attestation", self.failed_attestation)
        } else {
            ("signature", self.signature)
        };
        match limit {
            Limit::Quota(quota) if cost > quota.burst() => {
                Err(CostAboveBurst { which, cost, burst: quota.burst() })
            }
            _ => Ok(()),
        }
    }
}

/// A cost that is too low.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{which} {cost} must be at least {least}: no call may cost less than an answer, and none may be free"
)]
pub struct CostsError {
    /// `answer`, `signature` or `failed_attestation`.
    pub which: &'static str,
    pub cost: u32,
    /// What it must be at least.
    pub least: u32,
}

/// A cost that a bucket never holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{which} {cost} must be at most the burst, which is {burst}")]
pub struct CostAboveBurst {
    /// `signature` or `failed_attestation`.
    pub which: &'static str,
    pub cost: u32,
    /// The burst of the bucket.
    pub burst: u32,
}

/// What holds for a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    limit: Limit,
    costs: Costs,
    schedule: Schedule<Limit>,
    /// Of the limit outside of the windows; these are always set.
    origin: Origin,
    /// Refusals are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
}

impl Rule {
    /// This limit, and in the windows of the schedule another, at these costs. An admin's word.
    ///
    /// # Errors
    /// [`CostAboveBurst`] when one of the limits cannot pay for a call.
    pub fn new(limit: Limit, costs: Costs, schedule: Schedule<Limit>) -> Result<Self, CostAboveBurst> {
        std::iter::once(&limit).chain(schedule.values()).try_for_each(|limit| costs.fit(*limit))?;
        Ok(Self { limit, costs, schedule, origin: Origin::Set, dry_run: false })
    }

    /// For the defaults, which a test holds against [`Rule::new`].
    pub(super) fn usual(limit: Limit, costs: Costs) -> Self {
        let schedule = Schedule::default();
        Self { limit, costs, schedule, origin: Origin::ByDefault, dry_run: false }
    }

    /// The same, where its limit is of this origin.
    #[must_use]
    pub fn of_origin(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    /// The limit outside of the windows.
    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// Whose word the limit outside of the windows is.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// What calls cost.
    pub fn costs(&self) -> Costs {
        self.costs
    }

    /// The windows of time, UTC, in which another limit holds.
    pub fn schedule(&self) -> &Schedule<Limit> {
        &self.schedule
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::schedule::{Moment, Window};

    #[test]
    fn rules_that_cannot_be_meant_are_errors() {
        for (case, costs, fits) in [
            ("usual", (1, 2, 5), true),
            ("free", (0, 2, 5), false),
            ("a signature for less", (2, 1, 5), false),
            ("a failure for less", (2, 2, 1), false),
        ] {
            assert_eq!(Costs::new(costs.0, costs.1, costs.2).is_ok(), fits, "{case}");
        }
        let five = Limit::Quota(Quota::constant(1, 5));
        let at = |hour| Moment { hour: Some(hour), ..Moment::default() };
        let night = || Schedule::new(vec![(Window::new(at(1), at(3)).unwrap(), five)]).unwrap();
        for (case, limit, failed, schedule, fits) in [
            ("at the burst", five, 5, Schedule::default(), true),
            ("above the burst", five, 6, Schedule::default(), false),
            ("no bucket", Limit::Block, 6, Schedule::default(), true),
            ("above the burst of a window", Limit::Unlimited, 6, night(), false),
            ("at the burst of a window", Limit::Unlimited, 5, night(), true),
        ] {
            let made = Rule::new(limit, Costs::new(1, 2, failed).unwrap(), schedule);
            let want = CostAboveBurst { which: "failed_attestation", cost: 6, burst: 5 };
            assert_eq!(made.map(drop), if fits { Ok(()) } else { Err(want) }, "{case}");
        }
    }
}
