//! What the limits count. Labels come from closed sets ([`refusal`](super::refusal)): never a UID, a pod or a
//! SPIFFE ID.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use metrics::{Counter, Gauge};
use tokio::sync::Notify;

use super::{
    bucket::Level,
    method::Method,
    refusal::{ChargedAs, ConnectionRefusal, Reason, Stage},
    settings::SoftLimits,
};
use crate::telemetry::registry::{Label, Registry};

/// How a stage decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Allowed,
    Refused(Reason),
    WouldRefuse(Reason),
}

/// The method label of the gate, which knows none yet.
const CONNECT: &str = "connect";
/// Methods, and [`CONNECT`].
const METHODS: usize = Method::ALL.len() + 1;
const REASONS: usize = Reason::VALUES.len();
/// Of each decision: allowed, and refused and only rehearsed for each reason.
const DECISIONS: usize = 1 + 2 * REASONS;

const ALLOWED: (&str, &str) =
    ("durward_rate_limit_allowed_total", "Connections and calls that passed a stage of the rate limits.");
const EXCEEDED: (&str, &str) =
    ("durward_rate_limit_exceeded_total", "Connections and calls that a stage of the rate limits refused.");
const WOULD_EXCEED: (&str, &str) = (
    "durward_rate_limit_would_exceed_total",
    "Connections and calls that passed because the rule runs dry, and would be refused.",
);
const SOFT: (&str, &str) = (
    "durward_rate_limit_soft_limit_total",
    "Times that a bucket went from below a soft limit to it or above; step is in percent used.",
);
const KEYS: (&str, &str) = ("durward_rate_limit_keys", "Keys with a bucket in the table of a stage.");

/// Handles of every series, made once; counting touches nothing else.
pub(super) struct Counters {
    /// By stage, method, kind of key and decision.
    decisions: Box<[Counter]>,
    /// By stage and step.
    soft: Box<[Counter]>,
    /// Of the gate, the callers and the identities.
    pub(super) keys: [Gauge; 3],
    pub(super) in_flight: Gauge,
    pub(super) waiting: Gauge,
    pub(super) accounted: Gauge,
    /// Connections that were let in, and calls that were.
    served: AtomicU64,
    /// Somebody sleeps until the next decision.
    awaited: AtomicBool,
    stirred: Notify,
}

impl Counters {
    /// Registers every series. Combinations that cannot happen get a handle that does nothing.
    pub(super) fn new(registry: Registry<'_>) -> Self {
        let mut decisions =
            Vec::with_capacity(Stage::VALUES.len() * METHODS * ChargedAs::VALUES.len() * DECISIONS);
        let methods = || Method::ALL.map(Some).into_iter().chain([None]);
        for &stage in Stage::VALUES {
            for (method, &key) in
                methods().flat_map(|method| ChargedAs::VALUES.iter().map(move |key| (method, key)))
            {
                let counter = |(name, help), reason: Option<Reason>| {
                    if !happens(stage, method, key, reason) {
                        return Counter::noop();
                    }
                    let mut labels = vec![
                        (Method::KEY, method.map_or(CONNECT, Method::rpc)),
                        (Stage::KEY, stage.text()),
                        (ChargedAs::KEY, key.text()),
                    ];
                    labels.extend(reason.map(|reason| (Reason::KEY, reason.text())));
                    if shown_at_zero(method, key, name) {
                        registry.counter(name, help, &labels)
                    } else {
                        registry.counter_once_used(name, help, &labels)
                    }
                };
                decisions.push(counter(ALLOWED, None));
                decisions.extend(Reason::VALUES.iter().map(|reason| counter(EXCEEDED, Some(*reason))));
                decisions.extend(Reason::VALUES.iter().map(|reason| counter(WOULD_EXCEED, Some(*reason))));
            }
        }
        let stages = [Stage::Gate, Stage::Caller, Stage::Identity];
        let soft = stages.into_iter().flat_map(|stage| {
            SoftLimits::STEPS.map(|(_, step)| {
                registry.counter_once_used(SOFT.0, SOFT.1, &[(Stage::KEY, stage.text()), ("step", step)])
            })
        });
        Self {
            decisions: decisions.into(),
            soft: soft.collect(),
            keys: stages.map(|stage| registry.gauge(KEYS.0, KEYS.1, &[(Stage::KEY, stage.text())])),
            in_flight: registry.gauge("durward_rate_limit_attestations", "Calls being attested.", &[]),
            waiting: registry.gauge(
                "durward_rate_limit_waiting",
                "Calls that wait for tokens, for room, or to be attested.",
                &[],
            ),
            accounted: registry.gauge(
                "durward_memory_accounted_bytes",
                "Memory of connections, keys and cache entries as the budget reckons it.",
                &[],
            ),
            served: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
            stirred: Notify::new(),
        }
    }

    /// Waits for the next decision. One at a time can.
    pub(super) async fn stirred(&self) {
        self.awaited.store(true, Relaxed);
        self.stirred.notified().await;
    }

    /// How many connections and calls were let in.
    pub(super) fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    /// A connection was let in, which is counted once it is certain that it stays so.
    pub(super) fn let_in(&self) {
        self.stir();
        self.served.fetch_add(1, Relaxed);
    }

    /// Wakes who sleeps until the next decision.
    fn stir(&self) {
        // Written only where somebody waits: every call comes by here.
        if self.awaited.load(Relaxed) && self.awaited.swap(false, Relaxed) {
            self.stirred.notify_one();
        }
    }

    /// Counts a decision; the gate has no method.
    pub(super) fn count(&self, stage: Stage, method: Option<Method>, key: ChargedAs, decision: Decision) {
        self.stir();
        if stage == Stage::Caller && decision == Decision::Allowed {
            self.served.fetch_add(1, Relaxed);
        }
        let decision = match decision {
            Decision::Allowed => 0,
            Decision::Refused(reason) => 1 + reason.at(),
            Decision::WouldRefuse(reason) => 1 + REASONS + reason.at(),
        };
        let method = method.map_or(Method::ALL.len(), Method::at);
        let at =
            ((stage.at() * METHODS + method) * ChargedAs::VALUES.len() + key.at()) * DECISIONS + decision;
        if let Some(counter) = self.decisions.get(at) {
            counter.increment(1);
        }
    }

    /// Counts the soft limits of a bucket of `stage` that were gone over when it was paid from.
    pub(super) fn count_soft_limits(&self, limits: SoftLimits, stage: Stage, paid: Option<Level>) {
        // As most are.
        let Some(level) = paid.filter(|level| !level.is_below(SoftLimits::LEAST)) else { return };
        for (step, _) in limits.steps().filter(|(_, percent)| level.crossed(*percent)) {
            if let Some(counter) = self.soft.get(stage.at() * SoftLimits::STEPS.len() + step) {
                counter.increment(1);
            }
        }
    }
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

/// Whether a scrape has this series before anything was counted: refusals by each stage and for each reason, for the methods
/// that every workload calls.
fn shown_at_zero(method: Option<Method>, key: ChargedAs, name: &str) -> bool {
    let everyday = matches!(method, None | Some(Method::FetchX509Svid | Method::FetchJwtSvid));
    let plain = matches!(key, ChargedAs::Uid | ChargedAs::SpiffeId | ChargedAs::Node);
    name == EXCEEDED.0 && everyday && plain
}

/// Whether a connection can be refused by this stage and for this reason.
fn of_connections(stage: Stage, reason: Reason) -> bool {
    ConnectionRefusal::VALUES.iter().any(|refusal| refusal.by_stage() == Some((stage, reason)))
}

fn happens(stage: Stage, method: Option<Method>, key: ChargedAs, reason: Option<Reason>) -> bool {
    use ChargedAs as K;
    use Reason as R;
    let method_fits = match stage {
        Stage::Gate => method.is_none(),
        Stage::Caller => method.is_some(),
        Stage::Identity => method.is_some_and(Method::has_identity),
        Stage::Node => true,
    };
    let key_fits = match stage {
        Stage::Gate | Stage::Caller => matches!(key, K::Uid | K::Pod | K::Shared | K::Overflow),
        Stage::Identity => matches!(key, K::SpiffeId | K::Shared | K::Overflow),
        Stage::Node => key == K::Node,
    };
    let reason_fits = match (stage, reason) {
        (_, None) => true,
        (_, Some(why)) if method.is_none() => of_connections(stage, why),
        // It knows no method.
        (Stage::Gate, Some(_)) => false,
        (Stage::Caller, Some(why)) => matches!(why, R::Rate | R::Blocked | R::InFlight),
        (Stage::Identity, Some(why)) => matches!(why, R::Rate | R::Blocked),
        (Stage::Node, Some(why)) => matches!(why, R::Rate | R::InFlight | R::Memory),
    };
    method_fits && key_fits && reason_fits
}
