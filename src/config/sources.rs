//! The files that a configuration was read from, to see when they change.

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// More files of a directory than this are not looked at: a reload refuses as many.
const MAX_FILES: usize = 10_000;

/// Files, and directories of drop-in files, each with what it was when it was last looked at. The same when nothing changed,
/// through any links: a ConfigMap's files change when one link above them does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(BTreeMap<PathBuf, u64>);

impl Sources {
    /// Looks at one, before it is read.
    pub(super) fn add(&mut self, path: &Path) {
        self.0.insert(path.to_owned(), look(path));
    }

    /// The same ones, looked at now. May take as long as a disk does.
    #[must_use]
    pub fn now(&self) -> Self {
        Self(self.0.keys().map(|path| (path.clone(), look(path))).collect())
    }
}

/// What a file is now, or each file of a directory that a configuration may be in.
fn look(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    stamp(path, &mut hasher);
    let mut files: Vec<PathBuf> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .take(MAX_FILES)
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|end| end == "conf" || end == "json"))
        .collect();
    files.sort();
    for file in &files {
        file.hash(&mut hasher);
        stamp(file, &mut hasher);
    }
    hasher.finish()
}

fn stamp(path: &Path, to: &mut DefaultHasher) {
    match fs::metadata(path) {
        // When a directory changed says nothing: others than these files may be in it.
        Ok(is) if is.is_dir() => (is.dev(), is.ino()).hash(to),
        Ok(is) => {
            let times = (is.mtime(), is.mtime_nsec(), is.ctime(), is.ctime_nsec());
            (is.dev(), is.ino(), is.size(), is.mode(), is.uid(), is.gid(), times).hash(to);
        }
        Err(error) => (error.kind() == io::ErrorKind::NotFound).hash(to),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_changes_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("agent.conf"), version).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/agent.conf", at("agent.conf")).unwrap();
        fs::create_dir(at("entries.d")).unwrap();
        let mut sources = Sources::default();
        for name in ["agent.conf", "entries.d", "none.json"] {
            sources.add(&at(name));
        }
        let mut change = |case: &str, seen: bool, act: &dyn Fn()| {
            act();
            let now = sources.now();
            assert_eq!(now != sources, seen, "{case}");
            sources = now;
        };
        change("nothing", false, &|| {});
        change("a link above the file", true, &|| {
            symlink("2", at("new")).unwrap();
            fs::rename(at("new"), at("..data")).unwrap();
        });
        change("what is not read", false, &|| fs::write(at("entries.d/README"), "").unwrap());
        change("a drop-in file comes", true, &|| fs::write(at("entries.d/a.conf"), "").unwrap());
        change("it changes", true, &|| fs::write(at("entries.d/a.conf"), "x").unwrap());
        change("it goes", true, &|| fs::remove_file(at("entries.d/a.conf")).unwrap());
        change("what was not there comes", true, &|| fs::write(at("none.json"), "").unwrap());
    }
}
