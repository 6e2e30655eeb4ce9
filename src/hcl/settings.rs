//! Settings that are stated once: [`settings!`] makes a struct of them that knows how to read and to compare itself.

use std::{fmt, path::PathBuf, time::Duration};

use super::{duration::show_duration, tree::quoted};

/// Declares the settings of one block of `agent.conf`, one key a line, and nothing about a key stands anywhere else.
///
/// ```text
/// settings! {
///     /// `agent.listener`.
///     pub struct ListenerSettings in "agent.listener" {
///         /// How long calls in flight may go on after SIGTERM.
///         "drain_timeout" drain_timeout: Duration = Duration::from_secs(5),
///             duration(Duration::ZERO..=MAX_DRAIN), reloads;
///     }
/// }
/// ```
///
/// A line is the key, the field with its type and its default (which may name fields above it), the method of
/// [`Section`](super::section::Section) that reads it, with its bounds, and whether it `reloads` or `needs_restart`.
/// What the method gives becomes the field by [`From`]. The struct gets
///
/// * [`Default`], and documentation that names key and default;
/// * `KEYS`, their full names;
/// * `read(&mut Section)`, which reports what is wrong and then takes the default;
/// * `compare(&self, next, &mut KeyChanges)`.
///
/// A key must also have its paragraph in `conf/agent.conf`: a test holds that file against the lines here.
macro_rules! settings {
    (
        $(#[$about:meta])*
        $visibility:vis struct $name:ident in $block:literal {
            $(
                $(#[$doc:meta])*
                $key:literal $field:ident: $type:ty = $default:expr, $read:ident($($bound:expr),*), $change:ident;
            )*
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        $visibility struct $name {
            $(
                $(#[$doc])*
                #[doc = concat!("\n\n`", $block, ".", $key, "`. Default: `", stringify!($default), "`.")]
                pub $field: $type,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                $(let $field: $type = $default;)*
                Self { $($field),* }
            }
        }

        impl $name {
            /// The full names of the keys.
            pub(crate) const KEYS: &'static [&'static str] = &[$(concat!($block, ".", $key)),*];

            /// Reads the keys; each that is not set or wrong has its default.
            pub(crate) fn read(section: &mut $crate::hcl::section::Section<'_>) -> Self {
                #[cfg(test)]
                section
                    .problems()
                    .asked
                    .borrow_mut()
                    .declared
                    .extend([$((concat!($block, ".", $key), stringify!($change))),*]);
                $(
                    let read = section.$read($key, $($bound),*);
                    section.problems().note_key(concat!($block, ".", $key), read.as_ref().map(|at| at.place));
                    let $field = read.map_or_else(|| $default, |at| <$type>::from(at.value));
                )*
                Self { $($field),* }
            }

            /// Adds the keys that are others in `next`.
            pub(crate) fn compare(&self, next: &Self, changes: &mut $crate::hcl::settings::KeyChanges) {
                $(changes.$change(concat!($block, ".", $key), &self.$field, &next.$field);)*
            }
        }
    };
}

pub(crate) use settings;

/// The keys that differ between two configurations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyChanges {
    pub(crate) restart: Vec<RestartOnly>,
    pub(crate) live: Vec<&'static str>,
}

impl KeyChanges {
    /// Adds `key`, whose change takes effect at once, if it differs.
    pub(crate) fn reloads<T: PartialEq>(&mut self, key: &'static str, old: &T, new: &T) {
        if old != new {
            self.live.push(key);
        }
    }

    /// Adds `key`, which is only read at start, if it differs.
    pub(crate) fn needs_restart<T: PartialEq + Shown>(&mut self, key: &'static str, old: &T, new: &T) {
        if old != new {
            self.restart.push(RestartOnly { key, old: old.shown(), new: new.shown() });
        }
    }
}

/// A key that was changed, but is only read at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartOnly {
    /// The key with the blocks around it: `agent.socket_path`.
    pub key: &'static str,
    /// The value in force.
    pub old: String,
    /// The value in the file.
    pub new: String,
}

impl RestartOnly {
    /// What is said of it behind its name.
    pub(crate) fn what(&self) -> String {
        let Self { key: _, old, new } = self;
        format!("cannot be changed from {old} to {new} by a reload: restart the agent")
    }
}

impl fmt::Display for RestartOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.what())
    }
}

/// A value as the message about a refused reload shows it.
pub(crate) trait Shown {
    fn shown(&self) -> String;
}

impl Shown for bool {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Shown for u16 {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Shown for Duration {
    fn shown(&self) -> String {
        show_duration(*self)
    }
}

impl Shown for PathBuf {
    fn shown(&self) -> String {
        format!("{self:?}")
    }
}

impl Shown for String {
    fn shown(&self) -> String {
        quoted(self)
    }
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or_else(|| "not set".to_owned(), T::shown)
    }
}
