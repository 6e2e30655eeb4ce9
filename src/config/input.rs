//! A configuration before it is read: texts, and how to reach what they name.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
};

use super::file::{DropIns, FileError};
use crate::{
    hcl::{
        expand,
        problems::Problems,
        reader,
        section::At,
        tree::{Member, Node, Place, Value, quoted},
    },
    identity::TrustDomain,
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

/// A key of `agent` that the command line sets, in place of the file.
#[derive(Clone)]
pub struct Given {
    key: &'static str,
    value: Value,
    over: Over,
}

/// What becomes of a value in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    /// It is replaced.
    Replaces,
    /// It stays where this node has a CA of its own, and is replaced where it joins a server.
    Yields,
    /// It must be the same.
    Demands,
}

impl Given {
    /// `key` is this text.
    pub fn text(key: &'static str, text: &str) -> Self {
        Self { key, value: Value::String(text.into()), over: Over::Replaces }
    }

    /// `key` is true.
    pub fn yes(key: &'static str) -> Self {
        Self { key, value: Value::Bool(true), over: Over::Replaces }
    }

    /// The trust domain has this name, unless the file names another one and a CA for it.
    pub fn trust_domain(name: &str) -> Self {
        Self { over: Over::Yields, ..Self::text("trust_domain", name) }
    }

    /// The trust domain is the one of an agent that runs: another is a mistake.
    pub fn running(trust_domain: &TrustDomain) -> Self {
        Self { over: Over::Demands, ..Self::text("trust_domain", trust_domain.name()) }
    }
}

/// Shows no value: some are secrets.
impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Given").field("key", &self.key).finish_non_exhaustive()
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
    /// What the command line sets.
    pub given: &'a [Given],
    /// Reads the drop-in files of a directory, in the order of their names; `None` when there is no such directory.
    pub drop_ins: &'a dyn Fn(&Path) -> Result<Option<DropIns>, FileError>,
    /// The UID of a user of this node, or that there is no such user.
    pub user_id: &'a dyn Fn(&str) -> Result<Option<u32>, NoAnswer>,
    /// Reads a file that the configuration names: a bundle, or what a plugin is told.
    pub read_file: &'a dyn Fn(&Path) -> Result<Vec<u8>, FileError>,
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

    /// The trust domain that must stay.
    pub(super) fn kept(&self) -> Option<TrustDomain> {
        let demand = self.given.iter().find(|given| given.over == Over::Demands)?;
        if let Value::String(name) = &demand.value { TrustDomain::parse(name).ok() } else { None }
    }

    /// What is said of a value that holds a variable which is not replaced.
    pub(super) fn unexpanded(&self, value: &str) -> Option<&'static str> {
        let name = value.split_once('$').map(|(_, after)| after.trim_start_matches('{'));
        let is_name =
            name.is_some_and(|name| name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'));
        let reads = matches!(self.expand_env, ExpandEnv::No);
        (reads && is_name).then_some("variables are replaced with --expand-env only")
    }

    /// Puts what the command line sets in place of what `agent` says in the file.
    pub(super) fn lay_over(&self, problems: &Problems, main: &mut Node) {
        if self.given.is_empty() {
            return;
        }
        let Value::Object(blocks) = &mut main.value else { return };
        let file = problems.add_file(Path::new("command line"));
        let has_ca = blocks.iter().any(|block| block.key.eq_ignore_ascii_case("issuer"));
        let mut added = Vec::new();
        for (Given { key, value, over }, column) in self.given.iter().zip(1..) {
            if *over == Over::Demands {
                continue;
            }
            let mut objects =
                blocks.iter_mut().filter(|block| block.key.eq_ignore_ascii_case("agent")).flat_map(members);
            let is_key = |member: &Member| member.key.eq_ignore_ascii_case(key) && member.is_set();
            if *over == Over::Yields && has_ca && objects.any(|members| members.iter().any(is_key)) {
                continue;
            }
            objects.for_each(|members| members.retain(|member| !is_key(member)));
            let place = Place { file, line: 0, column };
            added.push(Member { key: (*key).into(), place, node: Node { place, value: value.clone() } });
        }
        if added.is_empty() {
            return;
        }
        let place = blocks.first().map_or(Place { file, line: 0, column: 0 }, |block| block.place);
        blocks.push(Member { key: "agent".into(), place, node: Node { place, value: Value::Object(added) } });
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
                Err(err) => {
                    let (line, message) = err.within(&path);
                    problems.add(Place { file, line, column: line.min(1) }, "", None, message);
                }
            }
        }
        trees
    }
}

/// The members of each object that a block stands for.
pub(super) fn members(block: &mut Member) -> Vec<&mut Vec<Member>> {
    let nodes = match &mut block.node.value {
        Value::List(items) => items.iter_mut().map(|node| &mut node.value).collect(),
        value => vec![value],
    };
    let mut found = Vec::new();
    for value in nodes {
        if let Value::Object(members) = value {
            found.push(members);
        }
    }
    found
}
