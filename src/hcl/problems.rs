//! What is wrong with a configuration, gathered while its files are read.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::tree::Place;

/// More mistakes than this are counted, not listed.
const MAX_LISTED: usize = 1000;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file it stands in.
    pub file: PathBuf,
    /// Line, from 1; 0 when the mistake is the file itself.
    pub line: u32,
    /// Column in characters, from 1; 0 when the mistake is the file itself.
    pub column: u32,
    /// The key, with the blocks around it: `agent.log_level`. Empty when the text could not be read so far.
    pub key: String,
    /// The value as written, abridged; `None` where there is none, or where it is a secret.
    pub value: Option<String>,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, key, value, message } = self;
        write!(f, "{}:", file.display())?;
        if *line > 0 {
            write!(f, "{line}:{column}:")?;
        }
        for part in [Some(key).filter(|key| !key.is_empty()), value.as_ref()].into_iter().flatten() {
            write!(f, " {part}")?;
        }
        if !key.is_empty() || value.is_some() {
            f.write_str(":")?;
        }
        write!(f, " {message}")
    }
}

/// All mistakes of a configuration: never empty, by place, one a line when shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    list: Vec<ConfigError>,
    /// How many more there were, when there were too many to list.
    left_out: usize,
}

impl ConfigErrors {
    pub(crate) fn new(list: Vec<ConfigError>, left_out: usize) -> Self {
        Self { list, left_out }
    }

    /// These, and those of the others that are not among them: by file, in the order in which they come first, and by line.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        let more: Vec<_> = others.list.into_iter().filter(|error| !self.list.contains(error)).collect();
        self.list.extend(more);
        let mut files: Vec<PathBuf> = Vec::new();
        for error in &self.list {
            if !files.contains(&error.file) {
                files.push(error.file.clone());
            }
        }
        let file = |error: &ConfigError| files.iter().position(|file| *file == error.file);
        self.list.sort_by_key(|error| (file(error), error.line, error.column));
        self.left_out = self.left_out.max(others.left_out);
        self
    }

    /// The same, with what `hint` says of a value behind what is said of it.
    #[must_use]
    pub(crate) fn with_hints(mut self, hint: impl Fn(&str) -> Option<&'static str>) -> Self {
        for error in &mut self.list {
            if let Some(hint) = error.value.as_deref().and_then(&hint) {
                error.message = format!("{}; {hint}", error.message);
            }
        }
        self
    }

    /// The mistakes, by place.
    pub fn list(&self) -> &[ConfigError] {
        &self.list
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.list.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        if self.left_out > 0 {
            write!(f, "\nand {} more", self.left_out)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Where keys are set. Where one stands makes no difference between two configurations.
#[derive(Clone, Debug, Default)]
pub struct KeyPlaces {
    keys: BTreeMap<&'static str, KeyPlace>,
    /// Of blocks of which there may be many.
    blocks: BTreeMap<&'static str, Vec<Place>>,
    files: Vec<PathBuf>,
}

/// Where a key is set: `agent.conf:4:3`, or `command line`.
#[derive(Clone, Debug)]
pub struct KeyPlace {
    pub file: PathBuf,
    /// Line, from 1; 0 where it is not in a file.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl fmt::Display for KeyPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column } = self;
        write!(f, "{}", file.display())?;
        if *line > 0 { write!(f, ":{line}:{column}") } else { Ok(()) }
    }
}

impl KeyPlaces {
    /// Where this key is set itself.
    pub fn of_key(&self, key: &str) -> Option<&KeyPlace> {
        self.keys.get(key)
    }

    /// Where the block of this name stands that is the `nth` of those that were noted, from 0.
    pub fn of_block(&self, name: &str, nth: usize) -> Option<KeyPlace> {
        let Place { file, line, column } = *self.blocks.get(name)?.get(nth)?;
        let file = self.files.get(usize::try_from(file).ok()?)?.clone();
        Some(KeyPlace { file, line, column })
    }

    /// Where this key is set; its block, where that alone is known.
    pub fn of(&self, key: &str) -> Option<&KeyPlace> {
        let block = || self.keys.get(key.rsplit_once('.')?.0);
        self.keys.get(key).or_else(block)
    }

    /// The key has another value than it is set to.
    pub(crate) fn forget(&mut self, key: &str) {
        self.keys.remove(key);
    }
}

impl PartialEq for KeyPlaces {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// The files that are read, and what was found wrong so far in all of them.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    /// Where relative paths start.
    pub(super) base: PathBuf,
    files: RefCell<Vec<PathBuf>>,
    list: RefCell<Vec<(Place, ConfigError)>>,
    left_out: Cell<usize>,
    keys: RefCell<BTreeMap<&'static str, Place>>,
    blocks: RefCell<BTreeMap<&'static str, Vec<Place>>>,
    /// Keys of all blocks, as `agent.log_level`, for those that stand in another.
    pub(super) elsewhere: &'static [&'static [&'static str]],
    #[cfg(test)]
    pub(crate) asked: RefCell<Asked>,
}

/// The keys that were asked for, whether or not they are set: the tests hold the reference against them.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// All, as `agent.log_level`.
    pub(crate) keys: std::collections::BTreeSet<String>,
    /// Those that [`settings!`](super::settings) declares, and how they change.
    pub(crate) declared: BTreeMap<&'static str, &'static str>,
    /// The least and the most that those with bounds may be set to.
    pub(crate) bounds: BTreeMap<String, [String; 2]>,
}

impl Problems {
    /// Relative paths start at `base`.
    pub(crate) fn new(base: &Path) -> Self {
        Self { base: base.to_owned(), ..Self::default() }
    }

    /// The same, which knows these keys.
    pub(crate) fn knowing(self, elsewhere: &'static [&'static [&'static str]]) -> Self {
        Self { elsewhere, ..self }
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
            let error = ConfigError {
                file: self.file(place),
                line: place.line,
                column: place.column,
                key: key.to_owned(),
                value,
                message: message.to_string(),
            };
            list.push((place, error));
        } else {
            self.left_out.set(self.left_out.get().saturating_add(1));
        }
    }

    /// Remembers where `key` is set, if it is.
    pub(crate) fn note_key(&self, key: &'static str, place: Option<Place>) {
        self.keys.borrow_mut().extend(place.map(|place| (key, place)));
    }

    /// Remembers where blocks of this name stand.
    pub(crate) fn note_blocks(&self, name: &'static str, places: Vec<Place>) {
        self.blocks.borrow_mut().insert(name, places);
    }

    /// Where `key` is set, if it is and was noted.
    pub(crate) fn noted(&self, key: &str) -> Option<Place> {
        self.keys.borrow().get(key).copied()
    }

    /// Where the keys and blocks are set that were noted.
    pub(crate) fn key_places(&self) -> KeyPlaces {
        let keys = self.keys.borrow();
        let place =
            |place: Place| KeyPlace { file: self.file(place), line: place.line, column: place.column };
        let keys = keys.iter().map(|(key, at)| (*key, place(*at))).collect();
        KeyPlaces { keys, blocks: self.blocks.borrow().clone(), files: self.files.borrow().clone() }
    }

    /// Whether something is wrong with what stands at `place`.
    pub(super) fn is_wrong(&self, place: Place) -> bool {
        self.list.borrow().iter().any(|(at, _)| *at == place)
    }

    /// What was added so far.
    #[cfg(test)]
    pub(crate) fn wrongs(&self) -> std::cell::RefMut<'_, Vec<(Place, ConfigError)>> {
        self.list.borrow_mut()
    }

    /// Whether anything is wrong so far.
    pub(crate) fn has_any(&self) -> bool {
        !self.list.borrow().is_empty()
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

    /// What was wrong, if anything was.
    pub(crate) fn into_errors(self) -> Option<ConfigErrors> {
        let mut list = self.list.take();
        if list.is_empty() {
            return None;
        }
        list.sort_by_key(|(place, _)| *place);
        let list = list.into_iter().map(|(_, error)| error).collect();
        Some(ConfigErrors::new(list, self.left_out.get()))
    }
}
