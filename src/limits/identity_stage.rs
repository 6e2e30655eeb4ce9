//! The identity stage: the buckets of the SPIFFE IDs that a call is answered with, and the node's after them.
//!
//! All of them are charged, or none: tokens are held first, and taken when the last one has let the call pass.

use std::{sync::Arc, time::Duration};

use super::{
    ask::Ask,
    attempt::Attempt,
    bucket::Quota,
    counters::Decision,
    id_pattern::IdPattern,
    ledger::{CallPlan, CallToSpare, Identities, Ledger, LimitNow, Question, Scarcity},
    method::Method,
    policy::Choice,
    refusal::{ChargedAs, Reason, Refusal, Stage},
    report::BucketName,
    rule::Limit,
    shares::TooFew,
};
use crate::identity::SpiffeId;

/// What a call is decided with at the identity stage.
pub(super) struct IdentityCall<'a> {
    pub(super) plan: &'a CallPlan,
    pub(super) caller_exempt: bool,
    pub(super) attempt: Attempt,
}

pub(super) fn identity_name(id: &SpiffeId, choice: &Choice<'_, IdPattern>) -> BucketName {
    match choice.shared {
        Some(mask) => BucketName::Masked(id.clone(), Arc::clone(mask)),
        None => BucketName::Identity(id.clone()),
    }
}

impl Ledger {
    /// The buckets of the identities, and the node's: all of them, or none.
    pub(super) fn charge_identities<'a: 'p, 'p>(
        &self,
        of: &IdentityCall<'p>,
        call: &mut CallToSpare,
        ids: impl Iterator<Item = &'a SpiffeId>,
    ) -> Result<(), Refusal> {
        let IdentityCall { plan, caller_exempt, attempt } = *of;
        let CallToSpare { method, taker, now, .. } = *call;
        let mut guard = self.identities();
        let identities = &mut *guard;
        identities.held.clear();
        // Without an identity (a verifier that need not have one) the node alone is charged.
        let (mut node_counts, mut nobody) = (false, true);
        // Of several that refuse, the one that no waiting helps with, or that is to be waited for longest.
        let mut longest: Option<(Scarcity, &SpiffeId, Choice<'_, IdPattern>)> = None;
        for id in ids {
            nobody = false;
            let choice = plan.identity.choose(id, method);
            let limit = self.limit(choice.rule, plan.since.identity, now);
            node_counts |= limit.limit != Limit::Exempt;
            let Some(lack) = self.charge_identity(of, call, identities, id, &choice, limit) else { continue };
            let retry_after = self.wait_by(choice.rule, limit.limit, lack.retry_after);
            let lack = Scarcity { retry_after, ..lack };
            if plan.dry || choice.rule.dry_run {
                let decision = Decision::WouldRefuse(lack.reason);
                self.counters.count(Stage::Identity, Some(method), lack.charged_as, decision);
                identities.table.note_refused(self.identity_key(id, method, &choice), Some(taker));
            } else if longest.as_ref().is_none_or(|(longest, ..)| longest.is_before(&lack)) {
                longest = Some((lack, id, choice));
            }
        }
        let done = match longest {
            Some((lack, id, choice)) => {
                let question = Question { plan, stage: Stage::Identity, method, dry: false, attempt };
                let name = || Some(identity_name(id, &choice).charged_as(lack.charged_as));
                self.refuse(&question, lack, name).map_err(|refusal| {
                    if attempt.ends(&refusal) {
                        let (key, table) = (self.identity_key(id, method, &choice), &mut identities.table);
                        if refusal.reason == Reason::Blocked {
                            // It takes no tokens, and has no bucket but this.
                            let who = || (identity_name(id, &choice), method.rpc());
                            table.note_refused_anybody(now, key, Quota::NOTHING_TAKEN, who);
                        } else {
                            table.note_refused(key, Some(taker));
                        }
                    }
                    Refusal { spiffe_id: Some(id.clone()), ..refusal }
                })
            }
            None if (node_counts || nobody) && !caller_exempt => self.charge_node(plan, call, attempt),
            None => Ok(()),
        };
        self.settle_identities(plan, method, identities, done.is_ok());
        done
    }

    /// One identity's bucket: holds its tokens, or says why it refuses.
    fn charge_identity<'a>(
        &self,
        of: &IdentityCall<'a>,
        call: &mut CallToSpare,
        identities: &mut Identities,
        id: &'a SpiffeId,
        choice: &Choice<'a, IdPattern>,
        LimitNow { limit, origin, since }: LimitNow,
    ) -> Option<Scarcity> {
        let caller_exempt = of.caller_exempt;
        let CallToSpare { method, taker, now, nth, .. } = *call;
        let own = if choice.shared.is_some() { ChargedAs::Shared } else { ChargedAs::SpiffeId };
        let quota = limit.quota();
        let each = quota.map_or(Duration::ZERO, |quota| quota.time_of(choice.rule.costs().answer()));
        let lacking = |reason, TooFew { wait: retry_after, rest }| {
            Some(Scarcity { charged_as: own, reason, retry_after, each, origin, rest, quota })
        };
        let quota = match limit {
            // Exempt is from every bucket; what is blocked is blocked.
            Limit::Quota(quota) if !caller_exempt => quota,
            Limit::Exempt | Limit::Unlimited | Limit::Quota(_) => {
                self.counters.count(Stage::Identity, Some(method), own, Decision::Allowed);
                return None;
            }
            Limit::Block => return lacking(Reason::Blocked, Duration::MAX.into()),
        };
        let key = self.identity_key(id, method, choice);
        let Identities { table, held } = identities;
        if held.iter().any(|(other, _)| other.key.hash == key.hash) {
            return None;
        }
        let cost = choice.rule.costs().answer();
        let ask = Ask { key, quota, since, cost, taker: Some(taker), attempt: of.attempt };
        let short = self.shortfall_of(nth, origin);
        let who = || (identity_name(id, choice), method.rpc());
        match table.hold_by(now, &ask, short, || self.spare(call, origin), who) {
            Ok(tokens) => {
                held.push((tokens, tokens.place.charged_as(own)));
                None
            }
            Err(lack) => {
                // One that is refused has no bucket where the table has no room for it.
                let charged_as = if table.knows(key) { own } else { ChargedAs::Overflow };
                lacking(Reason::Rate, lack).map(|lack| Scarcity { charged_as, ..lack })
            }
        }
    }

    /// Pays what is held, or gives it back.
    fn settle_identities(&self, plan: &CallPlan, method: Method, identities: &mut Identities, passed: bool) {
        let Identities { table, held } = identities;
        for (it, charged_as) in held.drain(..) {
            let paid = table.settle_held(&it, if passed { it.cost } else { 0 });
            if passed {
                self.counters.count(Stage::Identity, Some(method), charged_as, Decision::Allowed);
                self.counters.count_soft_limits(plan.soft, Stage::Identity, paid);
            }
        }
    }
}
