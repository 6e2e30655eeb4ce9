//! The map of the house in `src/lib.rs`, held against the imports; and that one thing has one name.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::tidy::{generated, rust};

/// The rooms, from top to bottom, as the table in `src/lib.rs` has them.
fn rooms() -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let rooms: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("//! | [`")?.split_once('`'))
        .map(|(room, _)| room.to_owned())
        .collect();
    let mut declared: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let mut told: Vec<&str> = rooms.iter().map(String::as_str).collect();
    declared.sort_unstable();
    told.sort_unstable();
    assert_eq!(declared, told, "the map tells of every module of src/lib.rs, and of no other");
    rooms
}

/// A file of the crate: its module path, and its code without comments, strings and tests.
struct Source {
    name: String,
    module: Vec<String>,
    code: String,
}

fn sources() -> Vec<Source> {
    rust("src")
        .into_iter()
        .filter(|(name, _)| !generated(name) && name != "src/main.rs" && name != "src/lib.rs")
        .map(|(name, text)| {
            let path = name.trim_start_matches("src/").trim_end_matches(".rs");
            let module = path.split('/').map(str::to_owned).collect();
            Source { code: code(&text), module, name }
        })
        .collect()
}

/// Without comments, strings, and what is compiled for tests only.
fn code(text: &str) -> String {
    let mut lines = Vec::new();
    let mut in_tests = false;
    let mut after_cfg = false;
    for line in text.lines() {
        if in_tests {
            in_tests = line != "}";
        } else if after_cfg && line.starts_with("mod ") {
            in_tests = line.ends_with('{');
        } else {
            let mut parts = line.split('"');
            let mut kept = parts.next().unwrap_or_default().to_owned();
            // Every other part is within quotes.
            for part in parts.skip(1).step_by(2) {
                kept.push_str(part);
            }
            lines.push(kept.split("//").next().unwrap_or_default().to_owned());
        }
        after_cfg = line == "#[cfg(test)]";
    }
    lines.join("\n")
}

/// Words and the marks between them, in order.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let length = if first.is_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let (token, left) = rest.split_at(length);
        if !token.trim().is_empty() {
            tokens.push(token);
        }
        rest = left;
    }
    tokens
}

/// Every path that begins at `tokens`, `{a, b::c}` spread out, and how many tokens it took.
fn spread(tokens: &[&str], before: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let mut path = before.to_vec();
    let mut at = 0;
    loop {
        match tokens.get(at) {
            Some(&"{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| *token != "}") {
                    at += spread(&tokens[at..], &path, paths).max(1);
                    if tokens.get(at) == Some(&",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            Some(word) if word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                path.push((*word).to_owned());
                at += 1;
            }
            _ => break,
        }
        if tokens.get(at) != Some(&"::") {
            break;
        }
        at += 1;
    }
    if tokens.get(at) == Some(&"as") {
        at += 2;
    }
    paths.push(path);
    at
}

/// Every path that the code names from `crate`, `super` or `self`, from the crate's root on.
fn paths(source: &Source) -> Vec<Vec<String>> {
    let tokens = tokens(&source.code);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let begins = ["crate", "super", "self"].contains(&tokens[at]) && tokens.get(at + 1) == Some(&"::");
        at += if begins && at.checked_sub(1).is_none_or(|before| tokens[before] != "::") {
            spread(&tokens[at..], &[], &mut found)
        } else {
            1
        };
    }
    found.into_iter().map(|path| from_root(&source.module, &path)).collect()
}

fn from_root(module: &[String], path: &[String]) -> Vec<String> {
    let mut root = module.to_vec();
    for word in path {
        match word.as_str() {
            "crate" => root.clear(),
            "super" => drop(root.pop()),
            "self" => {}
            word => root.push(word.to_owned()),
        }
    }
    root
}

#[test]
fn paths_are_read_as_the_compiler_does() {
    let source = Source {
        name: String::new(),
        module: ["a", "b"].map(str::to_owned).to_vec(),
        code: code(
            "use super::{c::{self, D}, e as f};\nuse crate::g::{h, i::J};\n// crate::no\nlet x = \"crate::no\";\n\
             pub(super) fn k() { super::super::l::m(self::n::<u8>()) }\n#[cfg(test)]\nmod tests {\n    use crate::no;\n}\n",
        ),
    };
    let found: Vec<String> = paths(&source).iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a::c", "a::c::D", "a::e", "g::h", "g::i::J", "l::m", "a::b::n"]);
}

#[test]
fn a_room_uses_only_rooms_below_it() {
    let rooms = rooms();
    let place = |room: &str| rooms.iter().position(|it| it == room);
    let mut wrong = BTreeSet::new();
    for source in sources() {
        let own = place(&source.module[0]).expect("a room of the map");
        for path in paths(&source) {
            if path.first().and_then(|room| place(room)).is_some_and(|other| other < own) {
                wrong.insert(format!("{} uses {}", source.name, path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a file passes on from its parts (`pub use part::Thing`), by the path it then has, with the path it is
/// declared at.
fn passed_on(sources: &[Source]) -> BTreeMap<Vec<String>, Vec<String>> {
    let mut all = BTreeMap::new();
    for source in sources {
        let tokens = tokens(&source.code);
        for (at, pair) in tokens.windows(2).enumerate() {
            if ["pub", ")"].contains(&pair[0]) && pair[1] == "use" {
                let mut paths = Vec::new();
                spread(&tokens[at + 2..], &[], &mut paths);
                for path in paths {
                    let name = path.last().into_iter().cloned();
                    let here = source.module.iter().cloned().chain(name).collect();
                    all.insert(here, from_root(&source.module, &path));
                }
            }
        }
    }
    all
}

/// Who takes something that a file passes on uses the part that declares it. A file and its parts may use
/// each other: what it declares itself is for all of them.
#[test]
fn no_two_files_of_a_room_use_each_other() {
    let sources = sources();
    let passed_on = passed_on(&sources);
    let files: BTreeMap<&[String], &str> = sources.iter().map(|s| (&*s.module, s.name.as_str())).collect();
    let mut uses: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for source in &sources {
        for path in paths(source) {
            let known = (1..=path.len()).rev().find_map(|length| passed_on.get(&path[..length]));
            let path = known.unwrap_or(&path);
            // The longest beginning of it that is a file.
            let module =
                (1..=path.len()).rev().map(|length| &path[..length]).find(|it| files.contains_key(it));
            let Some(module) = module else { continue };
            if !source.module.starts_with(module) && !module.starts_with(&source.module) {
                uses.entry(&source.name).or_default().insert(files[module]);
            }
        }
    }
    let reaches = |from: &str| {
        let mut reached = BTreeSet::new();
        let mut left: Vec<&str> = uses.get(from).into_iter().flatten().copied().collect();
        while let Some(next) = left.pop() {
            if reached.insert(next) {
                left.extend(uses.get(next).into_iter().flatten());
            }
        }
        reached
    };
    let circles: Vec<&str> = uses.keys().copied().filter(|file| reaches(file).contains(file)).collect();
    assert!(circles.is_empty(), "these use each other, or each other's users: {circles:#?}");
}

#[test]
fn one_thing_has_one_name() {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        // The name of a set of labels is the first word in its macro.
        let mut in_labels = false;
        for line in source.code.lines() {
            let line = if in_labels { line.trim_start() } else { line };
            let words =
                ["pub(super) ", "pub(crate) ", "pub "].iter().find_map(|pub_| line.strip_prefix(pub_));
            let words = words.unwrap_or(line);
            let declared = ["struct ", "enum ", "union ", "trait ", "type "]
                .iter()
                .find_map(|kind| words.strip_prefix(kind))
                .or_else(|| Some(words).filter(|words| in_labels && !words.is_empty()));
            in_labels = line.starts_with("labels! {") || in_labels && declared.is_none();
            if let Some(declared) = declared {
                let name = declared.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
                names.entry(name.to_owned()).or_default().push(source.name.clone());
            }
        }
    }
    names.retain(|_, places| places.len() > 1);
    assert!(names.is_empty(), "{names:#?}");
}
