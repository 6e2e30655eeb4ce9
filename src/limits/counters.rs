//! What the limits count. Labels come from the closed sets of this file: never a UID, a pod or a SPIFFE ID.

use metrics::{Counter, Gauge, Key, KeyName, Label, Level, Metadata, Recorder};

use super::{SoftLimits, bucket, method::Method};

/// Where on its way a connection or call was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// At accept.
    Gate,
    /// Before attestation.
    Caller,
    /// After attestation.
    Identity,
    /// By what all share: connections, attestations in flight, the bucket of a method.
    Node,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 4] = [Self::Gate, Self::Caller, Self::Identity, Self::Node];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Caller => "caller",
            Self::Identity => "identity",
            Self::Node => "node",
        }
    }
}

/// What kind of key was charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// A user.
    Uid,
    /// A pod.
    Pod,
    /// A SPIFFE ID.
    SpiffeId,
    /// A bucket that an override shares out: one of many callers or identities.
    Shared,
    /// There was no room for a bucket of its own: that of its parent.
    Overflow,
    /// All callers of the node together.
    Node,
}

impl KeyType {
    /// Every type.
    pub const ALL: [Self; 6] =
        [Self::Uid, Self::Pod, Self::SpiffeId, Self::Shared, Self::Overflow, Self::Node];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Uid => "uid",
            Self::Pod => "pod",
            Self::SpiffeId => "spiffe_id",
            Self::Shared => "shared",
            Self::Overflow => "overflow",
            Self::Node => "node",
        }
    }
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The bucket has too few tokens: of calls, or at the gate of new connections.
    Rate,
    /// The settings say `block`.
    Blocked,
    /// As many connections are open as may be.
    Connections,
    /// As many attestations are under way as may be.
    InFlight,
    /// Memory is short.
    Memory,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Rate, Self::Blocked, Self::Connections, Self::InFlight, Self::Memory];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Blocked => "blocked",
            Self::Connections => "connections",
            Self::InFlight => "in_flight",
            Self::Memory => "memory",
        }
    }
}

/// How a decision ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Allowed,
    Refused(Reason),
    WouldRefuse(Reason),
}

/// The method label of the gate, which knows none yet.
const CONNECT: &str = "connect";

const ALLOWED: &str = "durward_rate_limit_allowed_total";
const EXCEEDED: &str = "durward_rate_limit_exceeded_total";
const WOULD_EXCEED: &str = "durward_rate_limit_would_exceed_total";
const SOFT: &str = "durward_rate_limit_soft_limit_total";

/// Handles of every series, made once; counting touches nothing else.
pub struct Counters {
    /// By stage, method, key type and outcome.
    decisions: Box<[Counter]>,
    /// By stage and step.
    soft: Box<[Counter]>,
    pub(super) keys: [Gauge; 3],
    pub(super) connections: Gauge,
    pub(super) in_flight: Gauge,
    pub(super) accounted: Gauge,
}

/// Methods, and [`CONNECT`].
const METHODS: usize = Method::ALL.len() + 1;
const OUTCOMES: usize = 1 + 2 * Reason::ALL.len();

impl Counters {
    /// Registers every series with `recorder`. Combinations that cannot happen get a handle that does nothing.
    pub fn new(recorder: &dyn Recorder) -> Self {
        let text = KeyName::from_const_str;
        let help: [(&str, &str); 4] = [
            (ALLOWED, "Connections and calls that passed a stage of the rate limits."),
            (EXCEEDED, "Connections and calls that a stage of the rate limits refused."),
            (
                WOULD_EXCEED,
                "Connections and calls that passed because the rule runs dry, and would be refused.",
            ),
            (
                SOFT,
                "Times that a bucket went from below a soft limit to it or above; step is in percent used.",
            ),
        ];
        for (name, help) in help {
            recorder.describe_counter(text(name), None, help.into());
        }
        let methods = || Method::ALL.map(Some).into_iter().chain([None]);
        let mut decisions = Vec::with_capacity(Stage::ALL.len() * METHODS * KeyType::ALL.len() * OUTCOMES);
        for stage in Stage::ALL {
            for method in methods() {
                for key in KeyType::ALL {
                    let counter = |name, reason: Option<Reason>| {
                        if !happens(stage, method, key, reason) {
                            return Counter::noop();
                        }
                        let mut labels = vec![
                            Label::from_static_parts("method", method.map_or(CONNECT, Method::rpc)),
                            Label::from_static_parts("stage", stage.label()),
                            Label::from_static_parts("key_type", key.label()),
                        ];
                        labels.extend(reason.map(|it| Label::from_static_parts("reason", it.label())));
                        recorder.register_counter(&Key::from_parts(name, labels), &METADATA)
                    };
                    decisions.push(counter(ALLOWED, None));
                    decisions.extend(Reason::ALL.map(|reason| counter(EXCEEDED, Some(reason))));
                    decisions.extend(Reason::ALL.map(|reason| counter(WOULD_EXCEED, Some(reason))));
                }
            }
        }
        let gauge = |name, help: &'static str, labels: Vec<Label>| {
            recorder.describe_gauge(text(name), None, help.into());
            recorder.register_gauge(&Key::from_parts(name, labels), &METADATA)
        };
        let keys = |stage: Stage| {
            let labels = vec![Label::from_static_parts("stage", stage.label())];
            gauge("durward_rate_limit_keys", "Keys with a bucket in the table of a stage.", labels)
        };
        Self {
            decisions: decisions.into(),
            soft: Self::soft(recorder),
            keys: [keys(Stage::Gate), keys(Stage::Caller), keys(Stage::Identity)],
            connections: gauge("durward_rate_limit_connections", "Connections that hold a permit.", vec![]),
            in_flight: gauge("durward_rate_limit_attestations", "Calls being attested.", vec![]),
            accounted: gauge(
                "durward_memory_accounted_bytes",
                "Memory of connections, keys and cache entries as the budget reckons it.",
                vec![],
            ),
        }
    }

    fn soft(recorder: &dyn Recorder) -> Box<[Counter]> {
        let mut soft = Vec::new();
        for stage in [Stage::Gate, Stage::Caller, Stage::Identity] {
            for step in SoftLimits::STEPS {
                let labels = vec![
                    Label::from_static_parts("stage", stage.label()),
                    Label::new("step", step.to_string()),
                ];
                soft.push(recorder.register_counter(&Key::from_parts(SOFT, labels), &METADATA));
            }
        }
        soft.into()
    }

    /// Counts a decision; the gate has no method.
    pub(super) fn count(&self, stage: Stage, method: Option<Method>, key: KeyType, outcome: Outcome) {
        let reason = |reason| place(&Reason::ALL, reason);
        let outcome = match outcome {
            Outcome::Allowed => 0,
            Outcome::Refused(why) => 1 + reason(why),
            Outcome::WouldRefuse(why) => 1 + Reason::ALL.len() + reason(why),
        };
        let method = method.map_or(Method::ALL.len(), Method::index);
        let key = place(&KeyType::ALL, key);
        let at =
            ((place(&Stage::ALL, stage) * METHODS + method) * KeyType::ALL.len() + key) * OUTCOMES + outcome;
        if let Some(counter) = self.decisions.get(at) {
            counter.increment(1);
        }
    }

    /// Counts the soft limits of a bucket of `stage` that were gone over when it was paid from.
    pub(super) fn count_soft_limits(&self, limits: SoftLimits, stage: Stage, paid: Option<bucket::Level>) {
        let Some(level) = paid else { return };
        for (step, _) in limits.steps().filter(|(_, percent)| level.crossed(*percent)) {
            self.count_soft(stage, step);
        }
    }

    fn count_soft(&self, stage: Stage, step: usize) {
        if let Some(counter) = self.soft.get(place(&Stage::ALL, stage) * SoftLimits::STEPS.len() + step) {
            counter.increment(1);
        }
    }
}

const METADATA: Metadata<'static> = Metadata::new("durward", Level::INFO, None);

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

/// Where a value stands in its closed set; the sets are short and the compiler unrolls this.
fn place<T: PartialEq + Copy>(all: &[T], value: T) -> usize {
    all.iter().position(|it| *it == value).unwrap_or(all.len())
}

fn happens(stage: Stage, method: Option<Method>, key: KeyType, reason: Option<Reason>) -> bool {
    use KeyType as K;
    use Reason as R;
    let method_fits = match stage {
        Stage::Gate => method.is_none(),
        Stage::Caller => method.is_some(),
        Stage::Identity => method.is_some_and(Method::has_identity),
        Stage::Node => true,
    };
    let key_fits = match stage {
        Stage::Gate => matches!(key, K::Uid | K::Pod | K::Shared | K::Overflow),
        Stage::Caller => matches!(key, K::Uid | K::Pod | K::Shared | K::Overflow),
        Stage::Identity => matches!(key, K::SpiffeId | K::Shared | K::Overflow),
        Stage::Node => key == K::Node,
    };
    let reason_fits = match (stage, reason) {
        (_, None) => true,
        (Stage::Gate, Some(why)) => matches!(why, R::Rate | R::Blocked | R::Connections),
        (Stage::Caller, Some(why)) => matches!(why, R::Rate | R::Blocked | R::InFlight),
        (Stage::Identity, Some(why)) => matches!(why, R::Rate | R::Blocked),
        (Stage::Node, Some(why)) if method.is_none() => matches!(why, R::Connections | R::Memory),
        (Stage::Node, Some(why)) => matches!(why, R::Rate | R::InFlight),
    };
    method_fits && key_fits && reason_fits
}
