//! Keys of spire-agent's that this version does not act on.
//!
//! They are taken one by one, and refused as soon as they ask for something: a setting that silently does nothing is
//! worse than one that is refused. Their off value, which is how people write "not used", passes.

use super::{
    section::{At, Section},
    tree::quoted,
};

/// The end of every such message.
pub(crate) const NOT_HERE: &str = "is not in this version";

/// Refuses a boolean that asks for what is not there.
pub(crate) fn must_be_off(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(At { value: true, place }) = section.boolean(key) {
        section.wrong(place, key, Some("true".to_owned()), format!("{what} {NOT_HERE}; leave it false"));
    }
}

/// Refuses a text other than `off` (empty is always off).
pub(crate) fn must_be_text(section: &mut Section<'_>, key: &'static str, off: &str, what: &str) {
    if let Some(text) = section.string(key)
        && !text.value.is_empty()
        && text.value != off
    {
        section.wrong(text.place, key, Some(quoted(text.value)), format!("{what} {NOT_HERE}; leave it out"));
    }
}

/// Refuses a list that holds anything.
pub(crate) fn must_be_empty(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(list) = section.strings(key)
        && !list.value.is_empty()
    {
        section.wrong(list.place, key, Some("[ .. ]".to_owned()), format!("{what} {NOT_HERE}; leave it out"));
    }
}

/// Refuses a block that is there.
pub(crate) fn must_be_absent(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(block) = section.block(key) {
        section.wrong(block.place(), key, None, format!("{what} {NOT_HERE}; leave it out"));
    }
}
