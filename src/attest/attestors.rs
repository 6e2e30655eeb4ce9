//! What an attestor is to the rest of the agent, and what the list of them is made into.
//!
//! An attestor has one file or folder, which holds its selectors, its settings, its errors and what it reads of the
//! host. It implements [`WorkloadAttestor`] and stands in the list at the top of [`super`]; nothing else names it.

use std::{
    fmt::{self, Display},
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, Instant as StdInstant},
};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{AttestorError, AttestorName, Questions, doubt::SelectorKind, process::Seen};
use crate::{
    hcl::{
        section::{Section, nearest},
        settings::Shown,
    },
    identity::{Entry, selector::Selectors},
    limits::pace::Pace,
    telemetry::registry::Registry,
};

/// Says that an optional attestor found out nothing. Callers could cause it.
pub(super) fn found_nothing(error: &impl Display) {
    static PACE: LazyLock<Pace> = LazyLock::new(Pace::default);
    PACE.say(|left_out| tracing::debug!(%error, left_out, "an optional attestor found out nothing"));
}

/// Why an attestor can tell nothing of anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outage {
    /// It does not know yet whether it can.
    Untried(&'static str),
    /// It cannot, and what to do.
    Failing(String),
}

impl Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untried(why) => f.write_str(why),
            Self::Failing(why) => f.write_str(why),
        }
    }
}

/// Counts what attestors learnt apart from any call: after each, what was prepared for the entries may be otherwise.
pub(super) type News = Arc<watch::Sender<u64>>;

/// One source of selectors. Made once, when the agent starts; whatever it keeps between attestations is bounded.
pub(super) trait WorkloadAttestor: Sized {
    /// Its name in `plugins { WorkloadAttestor "NAME" }`, which is the type of its selectors too.
    const NAME: &'static str;
    /// Whether it attests where no block of any attestor is there.
    const BY_DEFAULT: bool;
    /// What `plugin_data` says: declared with [`settings!`](crate::hcl::settings).
    type Settings;
    /// Why it could not find something out.
    type Error;
    /// What the entries ask it for, with what is known of that ahead. The default is that of no entries.
    type Questions: Default;

    /// One that counts in `news` what it learns apart from any call.
    fn new(news: &News) -> Self;

    /// Registers series of its own, where it has any and attests: called after the first [`Self::begin`].
    fn counted_by(&self, _registry: Registry<'_>) {}

    /// What it keeps between attestations, in bytes, where that can be much.
    fn kept(&self) -> usize {
        0
    }

    /// What is missing on this host for these settings, each in one line. Blocks this thread.
    fn missing(_settings: &Self::Settings) -> Vec<String> {
        Vec::new()
    }

    /// What keeps it from telling who its callers are, as far as it is known at this moment, each in one line.
    fn troubles(&self) -> Vec<String> {
        Vec::new()
    }

    /// Has it find out whether it can tell anything, ahead of any call, where the entries ask it for something; it counts in
    /// `tries` what came of that, from now on. Does not wait for anything.
    fn ask_ahead(&self, _questions: &Self::Questions, _tries: &News) {}

    /// Why it can tell nothing of anybody, where that does not pass within a moment.
    fn outage(&self, _settings: &Self::Settings) -> Option<Outage> {
        None
    }

    /// Reads `plugin_data`, and reports what is wrong with it.
    fn read(data: &mut Section<'_>) -> Self::Settings;

    /// Whether a process could ever have a selector of this value.
    ///
    /// # Errors
    /// Says what is wrong with it, and what is right.
    fn check(value: &str, settings: &Self::Settings) -> Result<(), String>;

    /// Gets ready for these settings, which are in force from now on. Does not wait for anything.
    fn begin(&self, _settings: &Self::Settings) {}

    /// Looks what the entries ask for. Does not wait for anything.
    fn prepare_for(&self, entries: &[Arc<Entry>]) -> Self::Questions;

    /// Waits until all that was asked for was looked for once, or until `deadline`. Blocks this thread.
    fn wait(&self, deadline: StdInstant) {
        let _nothing_to_wait_for = deadline;
    }

    /// Why no process of this node has a selector of this value, for a person; `None` where one may have it.
    fn absent(questions: &Self::Questions, value: &str) -> Option<String>;

    /// The kind of a selector of this value, if [`Findings::untold`] may name it: its first word.
    fn untellable(questions: &Self::Questions, value: &str) -> Option<&'static str>;

    /// Finds out what it can of a process, as far as an entry asks for it. What may take long must not keep a thread
    /// of the runtime.
    ///
    /// # Errors
    /// It could find out nothing. Where only some kinds of selectors could not be told, it says so in its findings.
    async fn attest(
        &self,
        settings: &Self::Settings,
        questions: &Questions,
        seen: &Seen<'_>,
    ) -> Result<Findings<Self::Error>, Self::Error>;
}

/// The block of one attestor in `plugins`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestorBlock<S> {
    /// Whether it attests.
    pub enabled: bool,
    /// Whether what it cannot tell is taken for missing: a call goes on with what the others found.
    pub optional: bool,
    /// Its `plugin_data`.
    pub settings: S,
}

impl<S> AttestorBlock<S> {
    /// The settings, where it attests.
    pub(super) fn in_use(&self) -> Option<&S> {
        self.enabled.then_some(&self.settings)
    }
}

/// What one attestor found.
pub(super) struct Findings<E> {
    pub(super) selectors: Selectors,
    /// What must still hold when these are used again for a later call of the same connection.
    pub(super) evidence: Option<Box<dyn Evidence>>,
    pub(super) untold: Vec<Untold<E>>,
    /// How old that is which they rest on, where it was not read for them.
    pub(super) age: Option<Duration>,
}

/// Whether a process has selectors of this kind could not be told. A call fails for this reason if an entry asks for
/// one and all its other selectors are there; no other call suffers.
pub(super) struct Untold<E> {
    /// As [`WorkloadAttestor::untellable`] names it. None of its selectors are among those that were found.
    pub(super) word: &'static str,
    pub(super) why: E,
}

/// The attestors that attest, as a message shows them.
#[derive(PartialEq, Eq)]
pub(super) struct EnabledAttestors(pub(super) Vec<&'static str>);

impl Shown for EnabledAttestors {
    fn shown(&self) -> String {
        self.0.join(", ")
    }
}

/// What is said of a selector of a kind that the attestor does not know.
pub(super) fn no_such_kind(attestor: &str, kind: &str, kinds: &[&'static str]) -> String {
    nearest(kind, kinds.iter().copied()).map_or_else(
        || format!("no attestor makes this selector; those of {attestor} are {}", kinds.join(", ")),
        |near| format!("no attestor makes this selector: did you mean {attestor}:{near}?"),
    )
}

/// Why nobody has a selector of this attestor.
pub(super) fn not_in_use(attestor: &str) -> String {
    format!(
        "no attestor makes this selector: add WorkloadAttestor \"{attestor}\" {{ plugin_data {{ }} }} to plugins"
    )
}

/// What findings rest on, as far as it may change while the process lives.
pub(super) trait Evidence: Send + Sync {
    /// Whether it is certainly as it was; `dir` is the `/proc/PID` of the process.
    fn holds<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, bool>;
}

/// What all attestors found of one process.
#[derive(Default)]
pub(super) struct Attestation {
    pub(super) selectors: Selectors,
    pub(super) evidence: Vec<Box<dyn Evidence>>,
    pub(super) untold: Vec<(SelectorKind, AttestorError)>,
    pub(super) said: Vec<AttestorSaid>,
}

/// What one attestor came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttestorSaid {
    pub attestor: AttestorName,
    /// How many selectors it found.
    pub selectors: usize,
    pub took: Duration,
    /// How old that is which they rest on, where it was not read for them.
    pub age: Option<Duration>,
}

/// Makes of the list of attestors what the rest of the agent sees: their names, their settings, their errors, and all
/// of them as one.
macro_rules! attestors {
    ($($(#[$doc:meta])* $case:ident, $field:ident: $attestor:ty, $settings:ty, $error:ty;)+) => {
        $crate::telemetry::registry::labels! {
            /// Who attests.
            AttestorName, "attestor" { $($(#[$doc])* $case = <$attestor as WorkloadAttestor>::NAME,)+ }
        }

        /// The settings of every attestor.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct AttestSettings { $($(#[$doc])* pub $field: AttestorBlock<$settings>,)+ }

        impl Default for AttestSettings {
            fn default() -> Self {
                Self {
                    $($field: AttestorBlock {
                        enabled: <$attestor as WorkloadAttestor>::BY_DEFAULT,
                        optional: false,
                        settings: <$settings>::default(),
                    },)+
                }
            }
        }

        impl AttestSettings {
            /// Every attestor's name.
            pub(crate) const NAMES: &'static [&'static str] = &[$(<$attestor as WorkloadAttestor>::NAME),+];

            /// Adds the keys that are others in `next`.
            pub(crate) fn compare(&self, next: &Self, changes: &mut $crate::hcl::settings::KeyChanges) {
                changes.needs_restart("plugins.WorkloadAttestor", &self.enabled(), &next.enabled());
                $(
                    let (old, new) = (&self.$field, &next.$field);
                    changes.reloads("plugins.WorkloadAttestor.optional", &old.optional, &new.optional);
                    old.settings.compare(&new.settings, changes);
                )+
            }

            /// What is missing on this host for those that attest, each in one line. Blocks this thread.
            pub fn missing(&self) -> Vec<String> {
                let mut all = Vec::new();
                $(if let Some(settings) = self.$field.in_use() { all.extend(<$attestor>::missing(settings)); })+
                all
            }

            fn enabled(&self) -> EnabledAttestors {
                let mut enabled = Vec::new();
                $(enabled.extend(self.$field.enabled.then_some(<$attestor as WorkloadAttestor>::NAME));)+
                EnabledAttestors(enabled)
            }

            /// Whether this one attests.
            fn uses(&self, attestor: AttestorName) -> bool {
                match attestor { $(AttestorName::$case => self.$field.enabled,)+ }
            }

            /// Switches each on or off.
            fn switch(&mut self, is_on: impl Fn(&str) -> bool) {
                $(self.$field.enabled = is_on(<$attestor as WorkloadAttestor>::NAME);)+
            }

            fn set_optional(&mut self, attestor: &str) {
                $(if attestor == <$attestor as WorkloadAttestor>::NAME { self.$field.optional = true; })+
            }

            /// Whether what this attestor cannot tell is taken for missing.
            fn is_optional(&self, attestor: &str) -> bool {
                false $(|| attestor == <$attestor as WorkloadAttestor>::NAME && self.$field.optional)+
            }

            fn read_data(&mut self, attestor: &str, data: &mut Section<'_>) {
                $(if attestor == <$attestor as WorkloadAttestor>::NAME {
                    self.$field.settings = <$attestor>::read(data);
                })+
            }

            fn check_value(&self, attestor: &str, value: &str) -> Option<Result<(), String>> {
                $(if attestor == <$attestor as WorkloadAttestor>::NAME {
                    let Some(settings) = self.$field.in_use() else { return Some(Err(not_in_use(attestor))) };
                    return Some(<$attestor>::check(value, settings));
                })+
                None
            }
        }

        /// Why one attestor could not find out what it should.
        #[derive(Debug, thiserror::Error)]
        pub enum AttestorError { $($(#[$doc])* #[error(transparent)] $case(#[from] $error),)+ }

        impl AttestorError {
            fn attestor(&self) -> AttestorName {
                match self { $(Self::$case(_) => AttestorName::$case,)+ }
            }

            fn class(&self) -> (Blame, AttestFault) {
                match self { $(Self::$case(error) => error.class(),)+ }
            }
        }

        /// What the entries of one snapshot ask for, what is known of that ahead of any call, and the settings that it is
        /// found out by. Never edited. The default is that of no entries, with the default settings.
        #[derive(Debug, Default)]
        pub struct Questions {
            /// No two have the same, but for the default, which has 0.
            number: u64,
            settings: Arc<AttestSettings>,
            $($field: <$attestor as WorkloadAttestor>::Questions,)+
            doubts: Doubts,
        }

        impl Questions {
            /// The kind of a selector that may stay untold.
            fn untellable(&self, selector: &Selector) -> Option<SelectorKind> {
                $(if selector.kind() == <$attestor as WorkloadAttestor>::NAME {
                    let word = <$attestor>::untellable(&self.$field, selector.value())?;
                    return Some(SelectorKind { attestor: <$attestor as WorkloadAttestor>::NAME, word });
                })+
                None
            }

            /// Why no process of this node has this selector, which an entry asks for; `None` where one may have it.
            pub fn absent(&self, selector: &Selector) -> Option<String> {
                $(if selector.kind() == <$attestor as WorkloadAttestor>::NAME {
                    if !self.settings.$field.enabled {
                        return Some(not_in_use(selector.kind()));
                    }
                    return <$attestor>::absent(&self.$field, selector.value());
                })+
                None
            }
        }

        struct Attestors { $($field: $attestor,)+ }

        impl Attestors {
            fn new(news: &News) -> Self {
                Self { $($field: <$attestor as WorkloadAttestor>::new(news),)+ }
            }

            fn counted_by(&self, registry: Registry<'_>) {
                $(self.$field.counted_by(registry);)+
            }

            fn kept(&self) -> usize {
                0 $(+ self.$field.kept())+
            }

            fn troubles(&self) -> Vec<String> {
                let mut all = Vec::new();
                $(all.extend(self.$field.troubles());)+
                all
            }

            fn ask_ahead(&self, questions: &Questions, tries: &News) {
                $(if questions.settings.$field.enabled { self.$field.ask_ahead(&questions.$field, tries); })+
            }

            /// Those that can tell nothing, by name, of those that must.
            fn outages(&self, settings: &AttestSettings) -> Vec<(&'static str, Outage)> {
                let mut all = Vec::new();
                $(if let Some(in_use) = settings.$field.in_use().filter(|_| !settings.$field.optional) {
                    let outage = self.$field.outage(in_use);
                    all.extend(outage.map(|outage| (<$attestor as WorkloadAttestor>::NAME, outage)));
                })+
                all
            }

            fn begin(&self, settings: &AttestSettings) {
                $(if let Some(settings) = settings.$field.in_use() { self.$field.begin(settings); })+
            }

            fn wait(&self, deadline: std::time::Instant) {
                $(self.$field.wait(deadline);)+
            }

            fn prepare_for(&self, entries: &[Arc<Entry>], settings: Arc<AttestSettings>, number: u64) -> Questions {
                let mut questions = Questions {
                    number,
                    settings,
                    $($field: self.$field.prepare_for(entries),)+
                    doubts: Doubts::default(),
                };
                questions.doubts = Doubts::of(entries, |selector| questions.untellable(selector));
                questions
            }

            /// Asks all of them, side by side; the first failure ends it.
            async fn attest(
                &self,
                questions: &Questions,
                seen: &Seen<'_>,
                since: Instant,
            ) -> Result<Attestation, AttestorError> {
                let ($($field,)+) = tokio::try_join!($(async {
                    let block = &questions.settings.$field;
                    let Some(settings) = block.in_use() else { return Ok(None) };
                    let findings = match self.$field.attest(settings, questions, seen).await {
                        Ok(findings) => findings,
                        Err(error) if block.optional => {
                            $crate::attest::attestors::found_nothing(&error);
                            return Ok(None);
                        }
                        Err(error) => return Err(error.into()),
                    };
                    let Findings { selectors, evidence, untold, age } = findings;
                    let attestor = <$attestor as WorkloadAttestor>::NAME;
                    let kind = |word| SelectorKind { attestor, word };
                    let untold: Vec<_> = untold
                        .into_iter()
                        .map(|Untold { word, why }| (kind(word), AttestorError::from(why)))
                        .collect();
                    let said = AttestorSaid {
                        attestor: AttestorName::$case,
                        selectors: selectors.len(),
                        took: since.elapsed(),
                        age,
                    };
                    Ok::<_, AttestorError>(Some((said, selectors, evidence, untold)))
                }),+)?;
                let mut all = Attestation::default();
                for (said, mut selectors, evidence, untold) in [$($field),+].into_iter().flatten() {
                    all.selectors.append(&mut selectors);
                    all.evidence.extend(evidence);
                    all.untold.extend(untold);
                    all.said.push(said);
                }
                Ok(all)
            }
        }
    };
}
pub(super) use attestors;
