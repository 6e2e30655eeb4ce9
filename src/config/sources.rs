//! The files that a configuration was read from, to see when they change.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::Metadata,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::os::trusted::{Trust, TrustedDir};

/// More files of a directory than this are not looked at: a reload refuses as many.
const MAX_FILES: usize = 10_000;

/// Files, and directories of drop-in files, each with what it was when it was last looked at. The same when nothing changed,
/// through any links: a ConfigMap's files change when one link above them does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(BTreeMap<PathBuf, u64>);

impl Sources {
    /// Looks at one, before it is read.
    pub(super) fn add(&mut self, trust: Trust, path: &Path) {
        self.0.insert(path.to_owned(), look(trust, path));
    }

    /// The same ones, looked at now by an agent of this user. May take as long as a disk does.
    #[must_use]
    pub fn now(&self) -> Self {
        let trust = Trust::own();
        Self(self.0.keys().map(|path| (path.clone(), look(trust, path))).collect())
    }
}

/// What a file is now, or each file of a directory that a configuration may be in. Nothing is asked that others could have
/// put there.
fn look(trust: Trust, path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    match trust.open(path) {
        Ok(file) => stamp(file.metadata(), &mut hasher),
        Err(_) => match trust.directory(path) {
            Ok(dir) => look_within(&dir, &mut hasher),
            Err(error) => error.is_missing().hash(&mut hasher),
        },
    }
    hasher.finish()
}

fn look_within(dir: &TrustedDir, to: &mut DefaultHasher) {
    let wanted =
        |name: &OsString| Path::new(name).extension().is_some_and(|end| end == "conf" || end == "json");
    let names = dir.names().into_iter().flatten().take(MAX_FILES).filter_map(Result::ok).filter(wanted);
    let mut names: Vec<OsString> = names.collect();
    names.sort();
    for name in names {
        name.hash(to);
        match dir.open(&name) {
            Ok(file) => stamp(file.metadata(), to),
            Err(error) => error.to_string().hash(to),
        }
    }
}

fn stamp(of: io::Result<Metadata>, to: &mut DefaultHasher) {
    if let Ok(is) = of {
        let times = (is.mtime(), is.mtime_nsec(), is.ctime(), is.ctime_nsec());
        (is.dev(), is.ino(), is.size(), is.mode(), is.uid(), is.gid(), times).hash(to);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

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
            sources.add(Trust::own(), &at(name));
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
