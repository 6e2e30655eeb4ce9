//! What is wrong with a configuration, gathered while its files are read.

use std::{
    cell::{Cell, RefCell},
    fmt,
    path::{Path, PathBuf},
};

use super::{ConfigError, ConfigErrors, tree::Place};

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
    pub(super) base: PathBuf,
    files: RefCell<Vec<PathBuf>>,
    list: RefCell<Vec<Problem>>,
    left_out: Cell<usize>,
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
    pub(crate) declared: std::collections::BTreeMap<&'static str, &'static str>,
    /// The least and the most that those with bounds may be set to.
    pub(crate) bounds: std::collections::BTreeMap<String, [String; 2]>,
}

impl Problems {
    /// Relative paths start at `base`.
    pub(crate) fn new(base: &Path) -> Self {
        Self { base: base.to_owned(), ..Self::default() }
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

    /// Whether something is wrong with what stands at `place`.
    pub(super) fn is_wrong(&self, place: Place) -> bool {
        self.list.borrow().iter().any(|problem| problem.place == place)
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
