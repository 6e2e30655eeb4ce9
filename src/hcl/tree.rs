//! A configuration text as a tree in which everything knows its place.
//!
//! HCL and JSON become the same tree, so that nothing behind it knows which one was read. A block with labels is
//! nested objects, as in HCL 1: `entry "x" { .. }` is `entry { x { .. } }`. Keys may stand several times; whether
//! that is a repeated block or a mistake is known where the key is read ([`super::section`]).

/// Where something stands. The file is a number that [`super::problems::Problems`] turns into a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Which file, in the order of reading.
    pub(crate) file: u32,
    /// From 1.
    pub(crate) line: u32,
    /// In characters, from 1.
    pub(crate) column: u32,
}

/// A value and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a key may be set to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// A block, or a JSON object.
    Object(Vec<Member>),
    List(Vec<Node>),
    String(Box<str>),
    /// As written: it may yet be taken as text.
    Number(Box<str>),
    Bool(bool),
    Null,
}

/// One key of an object, with what it is set to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Member {
    pub(crate) key: Box<str>,
    pub(crate) place: Place,
    pub(crate) node: Node,
}

impl Member {
    /// Whether it is set to anything.
    pub(crate) fn is_set(&self) -> bool {
        self.node.value != Value::Null
    }
}

impl Node {
    /// The nodes of a list, or this one: JSON repeats a block as a list of objects.
    pub(super) fn each(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => std::slice::from_ref(self),
        }
    }
}

impl Value {
    /// What it is, for "must be a string, not .."
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Object(_) => "a block",
            Self::List(_) => "a list",
            Self::String(_) => "a string",
            Self::Number(_) => "a number",
            Self::Bool(_) => "a boolean",
            Self::Null => "null",
        }
    }

    /// The value as a message shows it: short, on one line.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Object(_) => "{ .. }".to_owned(),
            Self::List(_) => "[ .. ]".to_owned(),
            Self::String(text) => quoted(text),
            Self::Number(text) => abridged(text),
            Self::Bool(value) => value.to_string(),
            Self::Null => "null".to_owned(),
        }
    }
}

/// `text` in quotes, on one line, abridged when it is long.
pub(crate) fn quoted(text: &str) -> String {
    format!("\"{}\"", abridged(text).escape_debug().to_string().replace("\\'", "'"))
}

/// The beginning of `text`, when it is long.
pub(crate) fn abridged(text: &str) -> String {
    const LONGEST: usize = 80;
    if text.chars().nth(LONGEST).is_none() {
        return text.to_owned();
    }
    text.chars().take(LONGEST - 2).chain("..".chars()).collect()
}
