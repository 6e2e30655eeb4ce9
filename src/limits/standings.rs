//! How the limits stand, for those who look: `durward limits` and `explain`, the gauges, the log.

use super::{
    admission::{Limits, caller_name, identity_name},
    ask::BucketKey,
    budget::Accounted,
    caller::CallerKey,
    method::Method,
    refusal::Stage,
    report::{BucketName, Event, Heavy, Standing},
    rule::Rule,
};
use crate::{
    identity::SpiffeId,
    telemetry::registry::{float, float_u64},
};

impl Limits {
    /// The heaviest callers and identities: those that were refused most, then those that were served most.
    pub fn heaviest(&self, n: usize) -> Vec<(Stage, Heavy)> {
        let of = |stage| move |heavy| (stage, heavy);
        let mut all: Vec<_> =
            self.ledger().callers().heaviest(n).into_iter().map(of(Stage::Caller)).collect();
        all.extend(self.ledger().identities().table.heaviest(n).into_iter().map(of(Stage::Identity)));
        all.sort_by_key(|(_, heavy)| std::cmp::Reverse(heavy.weight()));
        all.truncate(n);
        all
    }

    /// The bucket that a caller is charged to for a method, and how it stands.
    pub fn caller_standing(&self, caller: CallerKey, method: Method) -> (BucketName, Standing) {
        let plan = self.ledger().plan();
        let choice = plan.caller.choose(&caller, method);
        let key = self.ledger().caller_key(&plan, caller, method, &choice);
        (caller_name(caller, &choice), self.of_caller(choice.rule, key))
    }

    /// The bucket that an identity is charged to for a method, and how it stands.
    pub fn identity_standing(&self, id: &SpiffeId, method: Method) -> (BucketName, Standing) {
        let ledger = self.ledger();
        let plan = ledger.plan();
        let choice = plan.identity.choose(id, method);
        let key = ledger.identity_key(id, method, &choice);
        let (limit, origin) = ledger.limit(choice.rule);
        let left = |quota| ledger.identities().table.left(ledger.now(), key, quota);
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
        }
    }

    fn of_caller(&self, rule: &Rule, key: BucketKey) -> Standing {
        let ledger = self.ledger();
        let (limit, origin) = ledger.limit(rule);
        Standing::under(limit, |quota| ledger.callers().left(ledger.now(), key, quota)).of_origin(origin)
    }

    /// How many connections and calls were let in, since the start.
    pub fn served(&self) -> u64 {
        self.ledger().counters.served()
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
        self.ledger().refusing().drain(self.ledger().now())
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
