//! How series come into being: registered once, under closed sets of labels, by the room whose events they count.
//!
//! A room says its own words (`labels!`), registers its series with the [`Registry`] at start, and
//! keeps the handles. Nothing that a caller or an entry chose can become a label value, since a label's values are
//! those of an enum.

use std::{
    collections::BTreeSet,
    marker::PhantomData,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label as Pair, Level, Metadata, Recorder};

/// One of a closed set of label values.
pub trait Label: Copy + 'static {
    /// The label's name.
    const KEY: &'static str;
    /// Every value, in the order of [`Label::at`].
    const VALUES: &'static [Self];
    /// The label's value as scraped.
    fn text(self) -> &'static str;
    /// Where it stands in [`Label::VALUES`].
    fn at(self) -> usize;
}

/// Declares an enum as a set of label values: `labels! { /// Doc. Name, "key" { /// Doc. Case = "text", } }`.
/// It is `pub`, unless `pub(super) enum` or the like stands before the name.
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident, $($rest:tt)+) => {
        $crate::telemetry::registry::labels! { $(#[$doc])* pub enum $name, $($rest)+ }
    };
    ($(#[$doc:meta])* $vis:vis enum $name:ident, $key:literal {
        $($(#[$case_doc:meta])* $case:ident = $text:expr,)+
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $name { $($(#[$case_doc])* $case,)+ }

        impl $crate::telemetry::registry::Label for $name {
            const KEY: &'static str = $key;
            const VALUES: &'static [Self] = &[$(Self::$case),+];
            fn text(self) -> &'static str {
                match self { $(Self::$case => $text,)+ }
            }
            #[expect(clippy::as_conversions, reason = "the discriminant of an enum without fields")]
            fn at(self) -> usize {
                self as usize
            }
        }
    };
}
pub(crate) use labels;

/// The names of gRPC's codes as grpc-go writes them, in the order of their numbers: values of the label `code`.
pub const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// One handle for each value of a label.
#[derive(Debug)]
pub struct By<L, H> {
    handles: Box<[H]>,
    label: PhantomData<L>,
}

impl<L: Label, H> By<L, H> {
    /// Registers one for each value.
    pub fn new(register: impl Fn(L) -> H) -> Self {
        Self { handles: L::VALUES.iter().map(|value| register(*value)).collect(), label: PhantomData }
    }

    /// Acts on the handle of `value`.
    pub fn with<R>(&self, value: L, act: impl FnOnce(&H) -> R) -> R {
        act(self.handles.get(value.at()).expect("there is a handle for each value"))
    }
}

impl<L: Label, H: Default> Default for By<L, H> {
    fn default() -> Self {
        Self::new(|_| H::default())
    }
}

/// A value that goes up and down as things open and close; goes down when dropped.
#[must_use = "what it counts is counted as closed when this is dropped"]
pub struct Open(Gauge);

impl Open {
    /// Counts one more as open.
    pub fn count(gauge: &Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Open")
    }
}

/// Series that a scrape leaves out until something was counted in them, as they are written there: `name{label="value"}`.
pub(super) type Unused = Mutex<BTreeSet<String>>;

/// Registers series with their help text; used while the agent is built.
#[derive(Clone, Copy)]
pub struct Registry<'a> {
    recorder: &'a dyn Recorder,
    unused: Option<&'a Unused>,
}

const METADATA: Metadata<'static> = Metadata::new("durward", Level::INFO, None);

impl<'a> Registry<'a> {
    /// Registers with `recorder`.
    pub fn new(recorder: &'a dyn Recorder) -> Self {
        Self { recorder, unused: None }
    }

    /// The same, and in `unused` what is left out until it is used.
    pub(super) fn noting(recorder: &'a dyn Recorder, unused: &'a Unused) -> Self {
        Self { recorder, unused: Some(unused) }
    }

    /// Has a scrape leave this series out until something was counted in it: one of very many.
    fn leave_out(&self, name: &str, labels: &[(&'static str, &'static str)]) {
        let Some(unused) = self.unused else { return };
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let series =
            if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) };
        unused.lock().unwrap_or_else(PoisonError::into_inner).insert(series);
    }

    fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
        Key::from_parts(name, labels.iter().map(|(k, v)| Pair::from_static_parts(k, v)).collect::<Vec<_>>())
    }

    /// A counter.
    pub fn counter(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Counter {
        self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_counter(&Self::key(name, labels), &METADATA)
    }

    /// A counter that a scrape leaves out until something was counted: one of so many that all of them would be a burden.
    pub fn counter_once_used(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Counter {
        self.leave_out(name, labels);
        self.counter(name, help, labels)
    }

    /// A gauge.
    pub fn gauge(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Gauge {
        self.recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_gauge(&Self::key(name, labels), &METADATA)
    }

    /// A gauge that a scrape leaves out while it is 0.
    pub fn gauge_once_used(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Gauge {
        self.leave_out(name, labels);
        self.gauge(name, help, labels)
    }

    /// A histogram, of seconds; a scrape leaves it out until something was measured.
    pub fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        label: (&'static str, &'static str),
    ) -> Histogram {
        self.leave_out(name, &[label]);
        self.recorder.describe_histogram(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_histogram(&Self::key(name, &[label]), &METADATA)
    }

    /// A counter for each value of a label.
    pub fn counters<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Counter> {
        By::new(|value: L| self.counter(name, help, &[(L::KEY, value.text())]))
    }

    /// A counter for each value of a label, which a scrape leaves out until something was counted.
    pub fn counters_once_used<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Counter> {
        By::new(|value: L| self.counter_once_used(name, help, &[(L::KEY, value.text())]))
    }

    /// A gauge for each value of a label.
    pub fn gauges<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Gauge> {
        By::new(|value: L| self.gauge(name, help, &[(L::KEY, value.text())]))
    }

    /// A histogram for each value of a label.
    pub fn histograms<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Histogram> {
        By::new(|value: L| self.histogram(name, help, (L::KEY, value.text())))
    }
}

/// A count as metrics have it.
pub fn float(count: usize) -> f64 {
    float_u64(u64::try_from(count).unwrap_or(u64::MAX))
}

/// A count as metrics have it.
#[expect(clippy::as_conversions, reason = "there is no From; a count above 2^53 may be off by one")]
pub fn float_u64(count: u64) -> f64 {
    count as f64
}

/// A time as metrics have it: seconds since 1970.
pub fn unix_time(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
