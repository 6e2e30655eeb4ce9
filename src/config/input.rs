//! A configuration before it is read: texts, and how to reach what they name.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use super::file::{DropIns, FileError};
use crate::{
    hcl::{
        expand,
        problems::Problems,
        reader,
        section::At,
        tree::{Node, Place, quoted},
    },
    limits::pattern::NoAnswer,
};

/// Whether `$VAR` and `${VAR}` are replaced in the whole text before it is read (`-expandEnv`).
#[derive(Clone, Copy)]
pub enum ExpandEnv<'a> {
    /// The text is read as it is.
    No,
    /// The function gives a variable's value; `None` is replaced by nothing.
    With(&'a dyn Fn(&str) -> Option<String>),
}

impl ExpandEnv<'_> {
    fn apply(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::No => Cow::Borrowed(text),
            Self::With(value_of) => Cow::Owned(expand::expand(text, value_of)),
        }
    }
}

/// A configuration before it is read: the text, and how to reach the files that it names.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The path of `agent.conf`, for messages and for `entries.d` beside it.
    pub path: &'a Path,
    /// Its text: HCL, or JSON.
    pub text: &'a str,
    /// The working directory, where relative paths start.
    pub base: &'a Path,
    /// Whether variables are replaced, here and in the drop-in files.
    pub expand_env: ExpandEnv<'a>,
    /// Reads the drop-in files of a directory, in the order of their names; `None` when there is no such directory.
    pub drop_ins: &'a dyn Fn(&Path) -> Result<Option<DropIns>, FileError>,
    /// The UID of a user of this node, or that there is no such user.
    pub user_id: &'a dyn Fn(&str) -> Result<Option<u32>, NoAnswer>,
    /// Reads a bundle file.
    pub read_bundle: &'a dyn Fn(&Path) -> Result<Vec<u8>, FileError>,
}

impl Input<'_> {
    /// The text of a file as a tree; what cannot be read is reported.
    pub(super) fn tree(&self, problems: &Problems, file: u32, text: &str) -> Option<Node> {
        match reader::read(file, &self.expand_env.apply(text)) {
            Ok(tree) => Some(tree),
            Err(err) => {
                problems.add(err.place, "", None, err.message);
                None
            }
        }
    }

    /// The trees of the drop-in files in `dir` (or in `entries.d`), each with the number of its file.
    pub(super) fn drop_in_trees(&self, problems: &Problems, dir: Option<&At<PathBuf>>) -> Vec<(u32, Node)> {
        const KEY: &str = "agent.entries_dir";
        let beside = self.path.with_file_name("entries.d");
        let place = dir.map(|dir| dir.place).unwrap_or_default();
        let files = match (self.drop_ins)(dir.map_or(&beside, |dir| &dir.value)) {
            Ok(files) => files,
            Err(err) => {
                problems.add(place, KEY, None, err);
                return Vec::new();
            }
        };
        if let (None, Some(dir)) = (&files, dir) {
            let value = quoted(&dir.value.to_string_lossy());
            problems.add(place, KEY, Some(value), "there is no such directory");
        }
        let mut trees = Vec::new();
        for (path, text) in files.into_iter().flatten() {
            let file = problems.add_file(&path);
            match text {
                Ok(text) => trees.extend(self.tree(problems, file, &text).map(|tree| (file, tree))),
                Err(err) => problems.add(Place { file, line: 0, column: 0 }, "", None, err),
            }
        }
        trees
    }
}
