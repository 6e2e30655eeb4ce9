//! How the limits stand, for those who look: `durward limits` and `explain`, the gauges, the log.

use super::{
    admission::{Limits, caller_name},
    ask::BucketKey,
    bucket::Quota,
    budget::Accounted,
    caller::CallerKey,
    identity_stage::identity_name,
    ledger::LimitNow,
    method::Method,
    refusal::Stage,
    report::{BucketName, Event, Heavy, Standing, WhatIsRefused},
    rule::{Limit, Rule},
    settings::NodeQuota,
    shares::Taking,
};
use crate::{
    identity::SpiffeId,
    telemetry::registry::{float, float_u64},
};

impl Limits {
    /// The heaviest callers and identities, and what all callers share where it refuses: those that were refused most,
    /// then those that were served most.
    pub fn heaviest(&self, n: usize) -> Vec<(Stage, Heavy)> {
        let of = |stage| move |heavy| (stage, heavy);
        let mut all: Vec<_> =
            self.ledger().callers().heaviest(n).into_iter().map(of(Stage::Caller)).collect();
        all.extend(self.ledger().identities().table.heaviest(n).into_iter().map(of(Stage::Identity)));
        all.extend(Method::ALL.into_iter().filter_map(|method| self.of_node(method)).map(of(Stage::Node)));
        let unknown = [
            (Stage::Caller, self.ledger().callers().unknown()),
            (Stage::Identity, self.ledger().identities().table.unknown()),
        ];
        all.extend(
            unknown
                .into_iter()
                .filter_map(|(stage, calls)| Some((stage, Heavy::without_bucket("all methods", calls)?))),
        );
        all.sort_by_key(|(_, heavy)| std::cmp::Reverse(heavy.weight()));
        all.truncate(n);
        all
    }

    /// What all callers did in the bucket of a method, if some were refused.
    fn of_node(&self, method: Method) -> Option<Heavy> {
        let takings = self.ledger().node(method)?.1.takings();
        let sum = |of: fn(&Taking) -> u32| takings.iter().map(of).fold(0, u32::saturating_add);
        let (used, refused) = (sum(|it| it.used), sum(|it| it.refused));
        (refused > 0).then(|| Heavy {
            name: BucketName::Node,
            what: method.rpc(),
            used,
            refused,
            most: 0,
            takings,
        })
    }

    /// Who takes from the bucket of this name, where several callers do.
    pub fn takings(&self, name: &BucketName, method: Method) -> Vec<Taking> {
        let ledger = self.ledger();
        let plan = ledger.plan();
        match name {
            BucketName::Caller(_) | BucketName::WithoutBucket => Vec::new(),
            BucketName::Callers(pattern) => {
                let Some(choice) = plan.caller.of_shared(pattern, method) else { return Vec::new() };
                // The caller does not matter where the bucket is shared.
                let key = ledger.caller_key(&plan, CallerKey::Uid(0), method, &choice);
                ledger.callers().takings(key.hash)
            }
            BucketName::Identity(id) | BucketName::Masked(id, _) => {
                let key = ledger.identity_key(id, method, &plan.identity.choose(id, method));
                ledger.identities().table.takings(key.hash)
            }
            BucketName::Node => ledger.node(method).map(|(_, bucket)| bucket.takings()).unwrap_or_default(),
        }
    }

    /// The bucket that all callers are charged to for a method, and how it stands; `None` where there is no limit.
    pub fn node_standing(&self, method: Method) -> Option<(BucketName, Standing)> {
        let (NodeQuota { quota, origin }, bucket) = self.ledger().node(method)?;
        let left = bucket.left(self.ledger().now(), quota, self.ledger().plan().since.node);
        Some((BucketName::Node, Standing::Tokens { left, quota, origin }))
    }

    /// The bucket that a caller is charged to for a method, and how it stands.
    pub fn caller_standing(&self, caller: CallerKey, method: Method) -> (BucketName, Standing) {
        let plan = self.ledger().plan();
        let choice = plan.caller.choose(&caller, method);
        let key = self.ledger().caller_key(&plan, caller, method, &choice);
        let now = self.ledger().now();
        let name = match self.ledger().limit(choice.rule, plan.since.caller, now).limit {
            Limit::Quota(quota) if choice.shared.is_none() && self.is_in_overflow(key, quota) => {
                BucketName::WithoutBucket
            }
            _ => caller_name(caller, &choice),
        };
        (name, self.of_caller(choice.rule, key))
    }

    /// The bucket that an identity is charged to for a method, and how it stands.
    pub fn identity_standing(&self, id: &SpiffeId, method: Method) -> (BucketName, Standing) {
        let ledger = self.ledger();
        let plan = ledger.plan();
        let choice = plan.identity.choose(id, method);
        let key = ledger.identity_key(id, method, &choice);
        let now = ledger.now();
        let LimitNow { limit, origin, since } = ledger.limit(choice.rule, plan.since.identity, now);
        let left = |quota| ledger.identities().table.left(now, key, quota, since);
        let standing = Standing::under(limit, left).of_origin(origin);
        (identity_name(id, &choice), standing)
    }

    /// How the bucket of a name that [`Limits::heaviest`] told stands; `None` when a reload has taken it away.
    pub fn standing(&self, name: &BucketName, method: Method) -> Option<Standing> {
        match name {
            BucketName::Caller(caller) => Some(self.caller_standing(*caller, method).1),
            BucketName::Identity(id) | BucketName::Masked(id, _) => {
                Some(self.identity_standing(id, method).1)
            }
            BucketName::Callers(pattern) => {
                let plan = self.ledger().plan();
                let choice = plan.caller.of_shared(pattern, method)?;
                // The caller does not matter where the bucket is shared.
                let key = self.ledger().caller_key(&plan, CallerKey::Uid(0), method, &choice);
                Some(self.of_caller(choice.rule, key))
            }
            BucketName::Node => Some(self.node_standing(method)?.1),
            BucketName::WithoutBucket => None,
        }
    }

    /// Whether the bucket of this name refuses nobody, and counts whom it would.
    pub fn is_dry_run(&self, name: &BucketName, method: Method) -> bool {
        let plan = self.ledger().plan();
        plan.dry
            || match name {
                BucketName::Caller(caller) => plan.caller.choose(caller, method).rule.dry_run,
                BucketName::Callers(pattern) => {
                    plan.caller.of_shared(pattern, method).is_some_and(|choice| choice.rule.dry_run)
                }
                BucketName::Identity(id) | BucketName::Masked(id, _) => {
                    plan.identity.choose(id, method).rule.dry_run
                }
                BucketName::Node => plan.node_dry,
                BucketName::WithoutBucket => false,
            }
    }

    fn is_in_overflow(&self, key: BucketKey, quota: Quota) -> bool {
        let ledger = self.ledger();
        ledger.callers().is_in_overflow(ledger.now(), key, quota)
    }

    fn of_caller(&self, rule: &Rule, key: BucketKey) -> Standing {
        let ledger = self.ledger();
        let now = ledger.now();
        let LimitNow { limit, origin, since } = ledger.limit(rule, ledger.plan().since.caller, now);
        Standing::under(limit, |quota| ledger.callers().left(now, key, quota, since)).of_origin(origin)
    }

    /// How many connections and calls were let in, since the start.
    pub fn served(&self) -> u64 {
        self.ledger().counters.served()
    }

    /// Waits until somebody connects or calls, whatever becomes of it. For one at a time; who waited in vain may be told once
    /// of what came before.
    pub async fn stirred(&self) {
        self.ledger().counters.stirred().await;
    }

    /// How many calls are being attested.
    pub fn attestations(&self) -> u32 {
        self.ledger().slots.in_use()
    }

    /// How many calls wait: for tokens, for room, or to be attested.
    pub fn waiting(&self) -> u32 {
        self.ledger().places.in_use()
    }

    /// What is worth a log line since this was last asked; ask about once a second. Bounded, however many are
    /// refused.
    pub fn events(&self) -> Vec<Event> {
        let mut events = self.ledger().refusing().drain(self.ledger().now());
        for event in &mut events {
            if let Event::Refusing {
                what: WhatIsRefused { name, method: Some(method), .. }, takings, ..
            } = event
            {
                *takings = self.takings(name, *method);
            }
        }
        events
    }

    /// How many callers' and identities' buckets are known. Also sets the gauges.
    pub fn keys(&self) -> (usize, usize) {
        let ledger = self.ledger();
        let (callers, identities) = (ledger.callers().len(), ledger.identities().table.len());
        for (gauge, keys) in ledger.counters.keys.iter().skip(1).zip([callers, identities]) {
            gauge.set(float(keys));
        }
        ledger.counters.in_flight.set(f64::from(ledger.slots.in_use()));
        ledger.counters.waiting.set(f64::from(ledger.places.in_use()));
        (callers, identities)
    }

    /// Forgets every full bucket: for when memory is short.
    pub fn shrink(&self) {
        let now = self.ledger().now();
        self.ledger().callers().forget_full(now);
        self.ledger().identities().table.forget_full(now);
    }

    /// Sets the gauge of accounted memory.
    pub fn account(&self, accounted: Accounted) {
        self.ledger().counters.accounted.set(float_u64(accounted.bytes()));
    }
}
