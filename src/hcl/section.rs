//! Reading one block of a configuration, key by key.
//!
//! The way of every block: take a [`Section`] from the one around it ([`Section::block`], [`Section::labelled`]), take
//! each key with its type ([`Section::string`], [`Section::duration`] ..), then [`Section::finish`], which reports
//! every key that nobody took, with the nearest that somebody asked for; of a block that is refused as a whole no key is
//! looked at, and it is dropped. A mistake goes to [`Problems`] and the key
//! then counts as not set, so that one run finds them all; whoever needs a key asks with [`Section::has`] before
//! reporting it missing.
//!
//! ```text
//! if let Some(mut block) = root.block("listener") {
//!     let timeout = block.duration("handshake_timeout", MIN..=MAX);    // Option<At<Duration>>
//!     if let (Some(a), Some(b)) = (timeout, other) && a.value > b.value {
//!         block.wrong(a.place, "handshake_timeout", Some(shown), "must be below ..");
//!     }
//!     block.finish();
//! }
//! ```

use std::{borrow::Cow, fmt};

use super::{
    problems::Problems,
    tree::{Member, Node, Place, Value, abridged, quoted},
};

/// A value with the place where it stands, for checks that compare two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) place: Place,
}

impl<T> At<T> {
    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> At<U> {
        At { value: f(self.value), place: self.place }
    }
}

/// The keys of one block; blocks of the same name are read as one, as in HCL 1.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    problems: &'a Problems,
    /// `agent`; empty for the whole file.
    name: Cow<'static, str>,
    /// Shown behind the name: the SPIFFE ID of an entry.
    label: Option<&'a str>,
    place: Place,
    /// And whether it was taken.
    members: Vec<(&'a Member, bool)>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    fn new(
        problems: &'a Problems,
        name: Cow<'static, str>,
        label: Option<&'a str>,
        place: Place,
        members: &'a [Member],
    ) -> Self {
        let mut section = Self { problems, name, label, place, members: Vec::new(), known: Vec::new() };
        section.add(members);
        section
    }

    /// A whole file.
    pub(crate) fn root(problems: &'a Problems, file: u32, tree: &'a Node) -> Self {
        let members = if let Value::Object(members) = &tree.value { members.as_slice() } else { &[] };
        Self::new(problems, Cow::Borrowed(""), None, Place { file, line: 1, column: 1 }, members)
    }

    fn add(&mut self, members: &'a [Member]) {
        self.members.extend(members.iter().map(|member| (member, false)));
    }

    /// Where mistakes go.
    pub(crate) fn problems(&self) -> &'a Problems {
        self.problems
    }

    /// Where the block begins: its label, if it has one.
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// The `unix` of `WorkloadAttestor "unix" { .. }`; empty for a block without a label.
    pub(crate) fn label(&self) -> &'a str {
        self.label.unwrap_or_default()
    }

    /// The full name of `key`: `agent.log_level`.
    pub(crate) fn path(&self, key: &str) -> String {
        match (self.name.as_ref(), self.label) {
            ("", _) => key.to_owned(),
            (name, None) => format!("{name}.{key}"),
            (name, Some(label)) => format!("{name} {}.{key}", quoted(label)),
        }
    }

    /// The full name of the block itself.
    pub(crate) fn name(&self) -> String {
        match self.label {
            None => self.name.clone().into_owned(),
            Some(label) => format!("{} {}", self.name, quoted(label)),
        }
    }

    /// Reports what is wrong with `key`, which stands at `place`.
    pub(crate) fn wrong(&self, place: Place, key: &str, value: Option<String>, message: impl fmt::Display) {
        self.problems.add(place, &self.path(key), value, message);
    }

    /// Reports what is wrong with the block as a whole.
    pub(crate) fn wrong_block(&self, message: impl fmt::Display) {
        self.problems.add(self.place, &self.name(), None, message);
    }

    /// Whether `key` was set, to whatever. JSON's `null` sets nothing, as with spire-agent.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.members.iter().any(|(member, _)| member.key.eq_ignore_ascii_case(key) && member.is_set())
    }

    /// Where `key` is set, to a value with which nothing was found wrong.
    pub(crate) fn set_at(&self, key: &str) -> Option<Place> {
        let is_set = |member: &Member| member.key.eq_ignore_ascii_case(key) && member.is_set();
        let (member, _) = self.members.iter().find(|(member, _)| is_set(member))?;
        (!self.problems.is_wrong(member.place)).then_some(member.place)
    }

    /// Where `key` is set, for a message that names a second place; `by default` when it is not.
    pub(crate) fn whence(&self, key: &str) -> String {
        self.set_at(key).map_or_else(|| "by default".to_owned(), |place| self.problems.show(place))
    }

    /// Reports `key` as missing, unless it is there (and then its mistake was reported already).
    pub(crate) fn missing(&self, key: &str, message: impl fmt::Display) {
        if !self.has(key) {
            self.wrong(self.place, key, None, message);
        }
    }

    /// The members called `key`, in any case, that are set; all count as taken.
    fn all(&mut self, key: &'static str) -> Vec<&'a Member> {
        self.known.push(key);
        let called = self.members.iter_mut().filter(|(member, _)| member.key.eq_ignore_ascii_case(key));
        called
            .map(|(member, taken)| {
                *taken = true;
                *member
            })
            .filter(|member| member.is_set())
            .collect()
    }

    /// The one member called `key`. Twice is a mistake: spire-agent would take the last, and nobody would know.
    pub(crate) fn take(&mut self, key: &'static str) -> Option<&'a Member> {
        let all = self.all(key);
        let (first, more) = all.split_first()?;
        for again in more {
            let message = format!("set twice: first at {}", self.problems.show(first.place));
            self.wrong(again.place, key, Some(again.node.value.shown()), message);
        }
        Some(first)
    }

    /// The members of each object under `key`: of every repetition, and of lists of objects, which is how JSON repeats
    /// a block.
    fn objects(&mut self, key: &'static str) -> Vec<(Place, &'a [Member])> {
        let mut found = Vec::new();
        for member in self.all(key) {
            for node in member.node.each() {
                match &node.value {
                    Value::Object(members) => found.push((member.place, members.as_slice())),
                    other => self.wrong(
                        node.place,
                        key,
                        Some(other.shown()),
                        format!("must be a block, {key} {{ .. }}, not {}", other.kind()),
                    ),
                }
            }
        }
        found
    }

    /// The block called `key`; repetitions are read as one block.
    pub(crate) fn block(&mut self, key: &'static str) -> Option<Self> {
        let mut objects = self.objects(key).into_iter();
        let (place, members) = objects.next()?;
        let mut section = Self::new(self.problems, Cow::Owned(self.path(key)), None, place, members);
        objects.for_each(|(_, members)| section.add(members));
        Some(section)
    }

    /// The blocks with one label called `key`, in order. Blocks with the same label stay apart: whether they are one,
    /// several or a mistake is for the caller to say.
    pub(crate) fn labelled(&mut self, key: &'static str) -> Vec<Self> {
        let path = self.path(key);
        // Most files with many blocks have many entries, which stand at the top.
        let name = if self.name.is_empty() { Cow::Borrowed(key) } else { Cow::Owned(path.clone()) };
        let mut found = Vec::new();
        for (place, labels) in self.objects(key) {
            if labels.is_empty() {
                self.wrong(place, key, None, format!("must have a name, {key} \"name\" {{ .. }}"));
            }
            for Member { key: label, place, node } in labels {
                for node in node.each() {
                    let members = match &node.value {
                        Value::Object(members) => members.as_slice(),
                        Value::Null => &[],
                        _ => {
                            let message = format!(
                                "must have a name, {key} \"name\" {{ .. }}, and a block as its value"
                            );
                            self.problems.add(*place, &path, Some(quoted(label)), message);
                            continue;
                        }
                    };
                    found.push(Self::new(self.problems, name.clone(), Some(label), *place, members));
                }
            }
        }
        found
    }

    /// Reads another block with the same label as part of this one.
    pub(crate) fn merge(&mut self, other: Self) {
        self.members.extend(other.members);
    }

    /// Ends the block: every key that nobody took is reported, with the nearest one that was asked for.
    pub(crate) fn finish(self) {
        #[cfg(test)]
        self.problems.asked.borrow_mut().keys.extend(self.known.iter().map(|key| match self.name.as_ref() {
            "" => (*key).to_owned(),
            name => format!("{name}.{key}"),
        }));
        for (member, _) in self.members.iter().filter(|(_, taken)| !taken) {
            self.wrong(member.place, &abridged(&member.key), None, self.unknown(&member.key));
        }
    }

    /// What is said of a key that nobody took.
    fn unknown(&self, written: &str) -> String {
        if let Some(key) = nearest(written, self.known.iter().copied()) {
            return format!("unknown key: did you mean {key}?");
        }
        let others = self.problems.elsewhere.iter().copied().flatten();
        let named =
            |key: &&&str| key.rsplit('.').next().is_some_and(|last| last.eq_ignore_ascii_case(written));
        if let Some(key) = others.into_iter().find(named) {
            return format!("unknown key here: did you mean {key}?");
        }
        if self.known.len() > MOST_LISTED {
            return "unknown key; conf/agent.conf has all that are known (man agent.conf)".to_owned();
        }
        if self.known.is_empty() {
            return "unknown key; no key is known here".to_owned();
        }
        // A block may be asked for twice.
        let mut known = Vec::new();
        for key in &self.known {
            if !known.contains(key) {
                known.push(*key);
            }
        }
        format!("unknown key; known here: {}", known.join(", "))
    }
}

/// Where a block knows more keys than these, they are not listed.
const MOST_LISTED: usize = 12;

/// The one of `known` that `written` was probably meant to be.
pub(crate) fn nearest<'k>(written: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // The distance takes the product of the lengths.
    if written.len() > 64 {
        return None;
    }
    let written = written.to_ascii_lowercase();
    let near = |key: &str| strsim::osa_distance(&written, &key.to_ascii_lowercase());
    let (distance, key) = known.into_iter().map(|key| (near(key), key)).min()?;
    (distance <= 1 + key.len() / 4).then_some(key)
}
