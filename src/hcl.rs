//! The language of `agent.conf`: HCL 1 as spire-agent reads it, or the same as JSON, as a tree of keys with their
//! places.
//!
//! Not trusted: the text, which may be wrong in any way. It never panics, and every mistake is kept with its place.
//! Absent: what a key means. Each room declares its own keys, with [`settings::settings!`].

pub(crate) mod absent;
pub(crate) mod duration;
pub(crate) mod expand;
pub(crate) mod problems;
pub(crate) mod reader;
pub(crate) mod section;
pub(crate) mod settings;
pub(crate) mod tree;
mod values;

pub use duration::{parse_duration, show_duration};
pub use problems::{ConfigError, ConfigErrors, KeyPlace, KeyPlaces};
pub use settings::RestartOnly;
