//! Keys of spire-agent's that this version does not act on.
//!
//! They are taken one by one, and refused as soon as they ask for something: a setting that silently does nothing is
//! worse than one that is refused. Their off value, which is how people write "not used", passes.

use super::{
    section::Section,
    tree::{Place, quoted},
};

/// The end of the message about each.
pub(crate) const NOT_HERE: &str = "is not in this version";

/// The type of a key, with the value that asks for nothing.
#[derive(Clone, Copy)]
pub(crate) enum Off {
    False,
    True,
    /// A text; an empty one is always off.
    Text(&'static str),
    /// A list.
    Empty,
    /// A block.
    Missing,
}

/// Takes `key`. Returns where it asks for something, and the value as a message shows it.
pub(crate) fn asked(
    section: &mut Section<'_>,
    key: &'static str,
    off: Off,
) -> Option<(Place, Option<String>)> {
    let (place, asks, shown) = match off {
        Off::False | Off::True => {
            let at = section.boolean(key)?;
            (at.place, at.value == matches!(off, Off::False), at.value.to_string())
        }
        Off::Text(off) => {
            let at = section.string(key)?;
            (at.place, !at.value.is_empty() && at.value != off, quoted(at.value))
        }
        Off::Empty => {
            let at = section.strings(key)?;
            (at.place, !at.value.is_empty(), "[ .. ]".to_owned())
        }
        Off::Missing => return section.block(key).map(|block| (block.place(), None)),
    };
    asks.then_some((place, Some(shown)))
}

/// Refuses each key of `keys` that asks for something. The last part of each names what is not there.
pub(crate) fn refuse(section: &mut Section<'_>, keys: &[(&'static str, Off, &str)]) {
    for (key, off, what) in keys {
        if let Some((place, value)) = asked(section, key, *off) {
            let right = if matches!(off, Off::False) { "leave it false" } else { "leave it out" };
            section.wrong(place, key, value, format!("{what} {NOT_HERE}; {right}"));
        }
    }
}
