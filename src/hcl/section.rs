//! Reading one block of a configuration, key by key, and gathering what is wrong.
//!
//! The way of every block: take a [`Section`] from the one around it ([`Section::block`], [`Section::labelled`]), take
//! each key with its type ([`Section::string`], [`Section::duration`] ..), then [`Section::finish`], which reports
//! every key that nobody took, with the nearest that somebody asked for. A mistake goes to [`Problems`] and the key
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

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::BTreeSet,
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

#[cfg(test)]
use std::collections::BTreeMap;

use super::{
    ConfigError, ConfigErrors,
    duration::{parse_duration, show_duration},
    tree::{Member, Node, Place, Value, abridged, quoted},
};

/// More mistakes than this are counted, not listed.
const MAX_LISTED: usize = 1000;

/// As [`ConfigError`], with a place for a path.
#[derive(Debug)]
pub(crate) struct Problem {
    place: Place,
    key: String,
    value: Option<String>,
    pub(crate) message: String,
}

/// The files that are read, and what was found wrong so far in all of them.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    /// Where relative paths start.
    base: PathBuf,
    files: RefCell<Vec<PathBuf>>,
    list: RefCell<Vec<Problem>>,
    left_out: Cell<usize>,
    /// Every key that was ever asked for, as `agent.log_level`: the tests hold the reference against it.
    #[cfg(test)]
    pub(crate) keys: RefCell<BTreeSet<String>>,
    /// Every key that [`settings!`](super::settings) declares, and how it changes.
    #[cfg(test)]
    pub(crate) declared: RefCell<BTreeMap<&'static str, &'static str>>,
    /// The least and the most that every key with bounds may be set to.
    #[cfg(test)]
    pub(crate) bounds: RefCell<BTreeMap<String, [String; 2]>>,
}

impl Problems {
    /// Relative paths start at `base`.
    pub(crate) fn new(base: &Path) -> Self {
        Self { base: base.to_owned(), ..Self::default() }
    }

    #[cfg(test)]
    pub(crate) fn declare(&self, keys: &[(&'static str, &'static str)]) {
        self.declared.borrow_mut().extend(keys.iter().copied());
    }

    /// The number that stands for `path` in a [`Place`].
    pub(crate) fn add_file(&self, path: &Path) -> u32 {
        let mut files = self.files.borrow_mut();
        files.push(path.to_owned());
        u32::try_from(files.len() - 1).unwrap_or(u32::MAX)
    }

    /// Adds a mistake. `value` is shown as it is given; leave it out for secrets.
    pub(crate) fn add(&self, place: Place, key: &str, value: Option<String>, message: impl fmt::Display) {
        let mut list = self.list.borrow_mut();
        if list.len() < MAX_LISTED {
            list.push(Problem { place, key: key.to_owned(), value, message: message.to_string() });
        } else {
            self.left_out.set(self.left_out.get().saturating_add(1));
        }
    }

    /// What was added so far.
    #[cfg(test)]
    pub(crate) fn wrongs(&self) -> std::cell::RefMut<'_, Vec<Problem>> {
        self.list.borrow_mut()
    }

    /// `agent.conf:4:3`, for a message that names a second place.
    pub(crate) fn show(&self, place: Place) -> String {
        format!("{}:{}:{}", self.file(place).display(), place.line, place.column)
    }

    fn file(&self, place: Place) -> PathBuf {
        usize::try_from(place.file)
            .ok()
            .and_then(|at| self.files.borrow().get(at).cloned())
            .unwrap_or_default()
    }

    /// `made`, when there was nothing wrong.
    pub(crate) fn into_result<T>(self, made: Option<T>) -> Result<T, ConfigErrors> {
        let mut list = self.list.take();
        if let Some(made) = made
            && list.is_empty()
        {
            return Ok(made);
        }
        list.sort_by_key(|problem| problem.place);
        let list = list.into_iter().map(|Problem { place, key, value, message }| ConfigError {
            file: self.file(place),
            line: place.line,
            column: place.column,
            key,
            value,
            message,
        });
        Err(ConfigErrors::new(list.collect(), self.left_out.get()))
    }
}

/// A value with the place where it stands, for checks that compare two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    /// Of the key.
    pub(crate) place: Place,
}

impl<T> At<T> {
    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> At<U> {
        At { value: f(self.value), place: self.place }
    }
}

/// One block under a label: the `"unix" { .. }` of `WorkloadAttestor "unix" { .. }`.
#[derive(Debug)]
pub(crate) struct Labelled<'a> {
    pub(crate) label: &'a str,
    /// Of the label.
    pub(crate) place: Place,
    pub(crate) section: Section<'a>,
}

/// The keys of one block; blocks of the same name are read as one, as in HCL 1.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    problems: &'a Problems,
    /// `agent`; empty for the whole file.
    name: Cow<'static, str>,
    /// Shown behind the name: the label of an entry.
    label: Option<&'a str>,
    place: Place,
    /// And whether it was taken.
    members: Vec<(&'a Member, bool)>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// A whole file.
    pub(crate) fn root(problems: &'a Problems, file: u32, tree: &'a Node) -> Self {
        let mut root = Self {
            problems,
            name: Cow::Borrowed(""),
            label: None,
            place: Place { file, line: 1, column: 1 },
            members: Vec::new(),
            known: Vec::new(),
        };
        root.add(&tree.value);
        root
    }

    fn add(&mut self, value: &'a Value) {
        if let Value::Object(members) = value {
            self.members.extend(members.iter().map(|member| (member, false)));
        }
    }

    /// Where mistakes go.
    pub(crate) fn problems(&self) -> &'a Problems {
        self.problems
    }

    /// Where the block begins.
    pub(crate) fn place(&self) -> Place {
        self.place
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

    /// Whether `key` was set, to whatever.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.members.iter().any(|(member, _)| member.key.eq_ignore_ascii_case(key))
    }

    /// Where `key` is set, to a value with which nothing was found wrong.
    pub(crate) fn set_at(&self, key: &str) -> Option<Place> {
        let (member, _) = self.members.iter().find(|(member, _)| member.key.eq_ignore_ascii_case(key))?;
        let is_wrong = self.problems.list.borrow().iter().any(|problem| problem.place == member.place);
        (!is_wrong).then_some(member.place)
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

    /// The members called `key`, in any case; they count as taken.
    fn all(&mut self, key: &'static str) -> Vec<&'a Member> {
        self.known.push(key);
        let called = self.members.iter_mut().filter(|(member, _)| member.key.eq_ignore_ascii_case(key));
        called
            .map(|(member, taken)| {
                *taken = true;
                *member
            })
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

    fn wrong_type<T>(&self, member: &Member, key: &str, want: &str) -> Option<T> {
        let got = member.node.value.kind();
        self.wrong(member.place, key, Some(member.node.value.shown()), format!("must be {want}, not {got}"));
        None
    }

    /// A string; a number counts as its text, as in spire-agent.
    pub(crate) fn string(&mut self, key: &'static str) -> Option<At<&'a str>> {
        let member = self.take(key)?;
        match &member.node.value {
            Value::String(text) | Value::Number(text) => Some(At { value: text, place: member.place }),
            _ => self.wrong_type(member, key, "a string"),
        }
    }

    /// A string; an empty one counts as not set.
    pub(crate) fn text(&mut self, key: &'static str) -> Option<At<String>> {
        let text = self.string(key)?;
        (!text.value.is_empty()).then(|| text.map(str::to_owned))
    }

    /// A string that `parse` understands; `None` reports `right`.
    pub(crate) fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
        right: impl fmt::Display,
    ) -> Option<At<T>> {
        let text = self.string(key)?;
        let parsed = parse(text.value);
        if parsed.is_none() {
            self.wrong(text.place, key, Some(quoted(text.value)), right);
        }
        parsed.map(|value| At { value, place: text.place })
    }

    /// A string that `parse` understands; its error says what would be right.
    pub(crate) fn checked<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<At<T>> {
        let text = self.string(key)?;
        match parse(text.value) {
            Ok(value) => Some(At { value, place: text.place }),
            Err(err) => {
                self.wrong(text.place, key, Some(quoted(text.value)), err);
                None
            }
        }
    }

    /// A path, made absolute from the working directory as spire-agent does.
    pub(crate) fn absolute(&mut self, key: &'static str) -> Option<At<PathBuf>> {
        let good = |text: &str| !text.is_empty() && !text.contains('\0');
        let text = self.parsed(key, |text| good(text).then_some(text), "must be a path")?;
        Some(text.map(|text| self.problems.base.join(text)))
    }

    /// A path with which `check`, once it is absolute, finds nothing wrong.
    pub(crate) fn absolute_that<E: fmt::Display>(
        &mut self,
        key: &'static str,
        check: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Option<At<PathBuf>> {
        let path = self.absolute(key)?;
        let wrong = check(&path.value).err();
        if let Some(err) = &wrong {
            self.wrong(path.place, key, Some(quoted(&path.value.to_string_lossy())), err);
        }
        wrong.is_none().then_some(path)
    }

    /// `true` or `false`, without quotes.
    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<At<bool>> {
        let member = self.take(key)?;
        match member.node.value {
            Value::Bool(value) => Some(At { value, place: member.place }),
            _ => self.wrong_type(member, key, "true or false, without quotes"),
        }
    }

    /// A whole number in `range`; digits in quotes count too, as in spire-agent.
    pub(crate) fn integer<T>(&mut self, key: &'static str, range: RangeInclusive<T>) -> Option<At<T>>
    where
        T: TryFrom<i64> + TryInto<i64>,
    {
        let (least, most) = range.into_inner();
        let (least, most) = (least.try_into().unwrap_or(i64::MIN), most.try_into().unwrap_or(i64::MAX));
        #[cfg(test)]
        self.problems.bounds.borrow_mut().insert(self.path(key), [least.to_string(), most.to_string()]);
        let member = self.take(key)?;
        let (Value::Number(text) | Value::String(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a whole number");
        };
        let value = parse_integer(text).filter(|value| (least..=most).contains(value));
        let value = value.and_then(|value| T::try_from(value).ok());
        if value.is_none() {
            let right = match (least, most) {
                (i64::MIN, i64::MAX) => "must be a whole number".to_owned(),
                (least, i64::MAX) => format!("must be a whole number of at least {least}"),
                (least, most) => format!("must be a whole number from {least} to {most}"),
            };
            self.wrong(member.place, key, Some(member.node.value.shown()), right);
        }
        value.map(|value| At { value, place: member.place })
    }

    /// A number, with a fraction or without, and as it was written; digits in quotes count too.
    pub(crate) fn number(&mut self, key: &'static str) -> Option<At<(f64, &'a str)>> {
        let member = self.take(key)?;
        let (Value::Number(text) | Value::String(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a number");
        };
        let value = text.parse().ok().filter(|value: &f64| value.is_finite());
        if value.is_none() {
            let right = "must be a number such as 100 or 0.5";
            self.wrong(member.place, key, Some(member.node.value.shown()), right);
        }
        value.map(|value| At { value: (value, &**text), place: member.place })
    }

    /// A duration in `range`, as Go writes it: `"1h30m"`.
    pub(crate) fn duration(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
    ) -> Option<At<Duration>> {
        #[cfg(test)]
        self.problems.bounds.borrow_mut().insert(
            self.path(key),
            [*range.start(), *range.end()].map(|bound| format!("\"{}\"", show_duration(bound))),
        );
        let member = self.take(key)?;
        let (Value::String(text) | Value::Number(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a duration in quotes such as \"1h30m\"");
        };
        let right = match parse_duration(text) {
            None => "must be a duration such as \"1h30m\", \"10s\" or \"500ms\"".to_owned(),
            Some(value) if range.contains(&value) => return Some(At { value, place: member.place }),
            Some(_) if *range.end() == Duration::MAX => {
                format!("must be at least {}", show_duration(*range.start()))
            }
            Some(_) => {
                format!("must be from {} to {}", show_duration(*range.start()), show_duration(*range.end()))
            }
        };
        self.wrong(member.place, key, Some(member.node.value.shown()), right);
        None
    }

    /// A duration in `range`, as what `make` makes of it.
    pub(crate) fn duration_as<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
        make: impl FnOnce(Duration) -> Result<T, E>,
    ) -> Option<At<T>> {
        let at = self.duration(key, range)?;
        match make(at.value) {
            Ok(value) => Some(At { value, place: at.place }),
            Err(err) => {
                self.wrong(at.place, key, Some(quoted(&show_duration(at.value))), err);
                None
            }
        }
    }

    /// A list of strings, each with its place; a number counts as its text.
    pub(crate) fn strings(&mut self, key: &'static str) -> Option<At<Vec<At<&'a str>>>> {
        let member = self.take(key)?;
        let Value::List(items) = &member.node.value else {
            return self.wrong_type(member, key, "a list of strings such as [\"a\", \"b\"]");
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            match &item.value {
                Value::String(text) | Value::Number(text) => {
                    texts.push(At { value: &**text, place: item.place });
                }
                other => {
                    let message = format!("must be a list of strings, and holds {}", other.kind());
                    self.wrong(item.place, key, Some(other.shown()), message);
                }
            }
        }
        Some(At { value: texts, place: member.place })
    }

    /// A list of strings, sorted and each once: for lists of which the order means nothing.
    pub(crate) fn texts(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let list = self.strings(key)?;
        let texts: BTreeSet<&str> = list.value.iter().map(|text| text.value).collect();
        Some(At { value: texts.into_iter().map(str::to_owned).collect(), place: list.place })
    }

    /// The objects under `key`: of every repetition, and of lists of objects, which is how JSON repeats a block.
    fn objects(&mut self, key: &'static str) -> Vec<(Place, &'a Value)> {
        let mut found = Vec::new();
        for member in self.all(key) {
            let mut object = |node: &'a Node| match &node.value {
                Value::Object(_) => found.push((member.place, &node.value)),
                other => self.wrong(
                    node.place,
                    key,
                    Some(other.shown()),
                    format!("must be a block, {key} {{ .. }}, not {}", other.kind()),
                ),
            };
            match &member.node.value {
                Value::List(items) => items.iter().for_each(&mut object),
                _ => object(&member.node),
            }
        }
        found
    }

    fn inner(&self, name: String, place: Place) -> Self {
        Self {
            problems: self.problems,
            name: Cow::Owned(name),
            label: None,
            place,
            members: Vec::new(),
            known: Vec::new(),
        }
    }

    /// The block called `key`; repetitions are read as one block.
    pub(crate) fn block(&mut self, key: &'static str) -> Option<Self> {
        let objects = self.objects(key);
        let (place, _) = objects.first()?;
        let mut section = self.inner(self.path(key), *place);
        for (_, value) in objects {
            section.add(value);
        }
        Some(section)
    }

    /// The blocks with one label called `key`, in order. Blocks with the same label stay apart: whether they are one,
    /// several or a mistake is for the caller to say.
    pub(crate) fn labelled(&mut self, key: &'static str) -> Vec<Labelled<'a>> {
        let name = self.path(key);
        let mut found = Vec::new();
        for (place, object) in self.objects(key) {
            let Value::Object(members) = object else { continue };
            if members.is_empty() {
                self.wrong(place, key, None, format!("must have a name, {key} \"name\" {{ .. }}"));
            }
            for member in members {
                let mut body = |node: &'a Node| {
                    let Value::Object(members) = &node.value else {
                        let message =
                            format!("must have a name, {key} \"name\" {{ .. }}, and a block as its value");
                        self.problems.add(member.place, &name, Some(quoted(&member.key)), message);
                        return;
                    };
                    found.push(Labelled {
                        label: &member.key,
                        place: member.place,
                        section: Section {
                            problems: self.problems,
                            // Most files with many blocks have many entries, which stand at the top.
                            name: if self.name.is_empty() {
                                Cow::Borrowed(key)
                            } else {
                                Cow::Owned(name.clone())
                            },
                            label: Some(&member.key),
                            place: member.place,
                            members: members.iter().map(|member| (member, false)).collect(),
                            known: Vec::new(),
                        },
                    });
                };
                match &member.node.value {
                    Value::List(items) => items.iter().for_each(body),
                    _ => body(&member.node),
                }
            }
        }
        found
    }

    /// Reads another block with the same label as part of this one.
    pub(crate) fn merge(&mut self, other: Self) {
        self.members.extend(other.members);
    }

    /// Ends a block that was refused as a whole: its keys are not looked at.
    #[expect(clippy::unused_self, reason = "the block is used up, as by `finish`")]
    pub(crate) fn ignore(self) {}

    /// Ends the block: every key that nobody took is reported, with the nearest one that was asked for.
    pub(crate) fn finish(self) {
        #[cfg(test)]
        self.problems.keys.borrow_mut().extend(self.known.iter().map(|key| match self.name.as_ref() {
            "" => (*key).to_owned(),
            name => format!("{name}.{key}"),
        }));
        for (member, _) in self.members.iter().filter(|(_, taken)| !taken) {
            let nearest = nearest(&member.key, self.known.iter().copied());
            let message = nearest.map_or_else(
                || format!("unknown key; known here: {}", self.known.join(", ")),
                |key| format!("unknown key: did you mean {key}?"),
            );
            self.wrong(member.place, &abridged(&member.key), None, message);
        }
    }
}

/// A whole number as written: decimal, or hexadecimal with `0x`.
fn parse_integer(text: &str) -> Option<i64> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if digits.starts_with(['+', '-']) {
        return None;
    }
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with(['+', '-']) => i64::from_str_radix(&format!("{sign}{hex}"), 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}

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
