//! The memory of this process's own cgroup: what the kernel counts against its limit, its own part included.
//!
//! The resident set is not all: sockets, what is queued in them, files and what is left of closed ones are the kernel's, and
//! are charged to the cgroup. Both versions of cgroups; where neither can be read there is nothing to say.
//!
//! What counts is what is charged, less the pages of files that are neither dirty nor on their way to a disk: the kernel drops
//! them before it kills anybody, the program's own with them. Slabs it calls reclaimable count: sockets' inodes are among them,
//! and nothing frees those of open sockets, nor sooner those of closed ones.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Component, Path, PathBuf},
};

/// The longest of the files that are read, in bytes: `memory.stat` has some 2,000 to 3,000.
pub(super) const LONGEST: usize = 8 * 1024;

/// What there is in what is charged to a cgroup, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChargedParts {
    /// What can be dropped at once.
    pub droppable: u64,
    /// The kernel's part. 0 where the kernel does not say.
    pub kernel: u64,
}

/// The cgroup that a process is in. Its files stay open.
#[derive(Debug)]
pub struct OwnCgroup {
    used: File,
    stat: File,
    /// Version 1 has it in a file of its own.
    kernel: Option<File>,
    processes: File,
    names: StatNames,
}

/// The lines of `memory.stat`.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatNames {
    files: [&'static str; 2],
    /// Of these, what cannot be dropped yet.
    busy: [&'static str; 2],
    kernel: &'static str,
}

pub(super) const V1: StatNames = StatNames {
    files: ["total_inactive_file", "total_active_file"],
    busy: ["total_dirty", "total_writeback"],
    kernel: "",
};
pub(super) const V2: StatNames = StatNames {
    files: ["inactive_file", "active_file"],
    busy: ["file_dirty", "file_writeback"],
    kernel: "kernel",
};

impl OwnCgroup {
    /// Of the process whose `/proc/PID/cgroup` is `membership`; cgroups are mounted at `mount`. A container sees its own
    /// cgroup as the root, and perhaps a path that is not there: then it is that of the mount.
    pub fn of(membership: &Path, mount: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(membership).ok()?;
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            if controllers.is_empty() {
                [mount.to_owned(), mount.join("unified")]
                    .iter()
                    .flat_map(|root| places(root, path))
                    .find_map(|at| Self::open(&at, "memory.current", None, V2))
            } else if controllers.split(',').any(|it| it == "memory") {
                places(&mount.join("memory"), path).into_iter().find_map(|at| {
                    Self::open(&at, "memory.usage_in_bytes", Some("memory.kmem.usage_in_bytes"), V1)
                })
            } else {
                None
            }
        })
    }

    fn open(at: &Path, used: &str, kernel: Option<&str>, names: StatNames) -> Option<Self> {
        let open = |name: &str| File::open(at.join(name)).ok();
        let it = Self {
            used: open(used)?,
            stat: open("memory.stat")?,
            kernel: kernel.and_then(open),
            processes: open("cgroup.procs")?,
            names,
        };
        number(&it.used).is_some().then_some(it)
    }

    /// Whether this process is in it, and no other.
    pub fn is_alone(&self) -> bool {
        let mut bytes = [0; 32];
        let own = std::process::id();
        text(&self.processes, &mut bytes).is_some_and(|all| all.trim().parse() == Ok(own))
    }

    /// What is charged to it by now, in bytes, with what the kernel could drop. It has the number ready.
    pub fn charged(&self) -> Option<u64> {
        number(&self.used)
    }

    /// What is in it. The kernel adds numbers up for it, which may take a while.
    pub fn parts(&self) -> Option<ChargedParts> {
        let mut bytes = [0; LONGEST];
        let stat = text(&self.stat, &mut bytes)?;
        let kernel = self.kernel.as_ref().and_then(number).or_else(|| line(stat, self.names.kernel));
        Some(ChargedParts { droppable: droppable(stat, self.names), kernel: kernel.unwrap_or(0) })
    }
}

/// Where a cgroup may be, the likelier one first.
fn places(root: &Path, path: &str) -> Vec<PathBuf> {
    let relative = Path::new(path.trim_start_matches('/'));
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    let own = plain.then(|| root.join(relative));
    own.into_iter().chain([root.to_owned()]).collect()
}

fn line(stat: &str, wanted: &str) -> Option<u64> {
    stat.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == wanted).then(|| number.trim().parse().ok())?
    })
}

/// What of a cgroup's memory the kernel can drop at once, in bytes.
pub(super) fn droppable(stat: &str, names: StatNames) -> u64 {
    let sum = |names: &[&str]| names.iter().filter_map(|name| line(stat, name)).fold(0, u64::saturating_add);
    sum(&names.files).saturating_sub(sum(&names.busy))
}

pub(super) fn number(file: &File) -> Option<u64> {
    text(file, &mut [0; 32])?.trim().parse().ok()
}

/// The file's text, as far as there is room for it.
pub(super) fn text<'a>(file: &File, bytes: &'a mut [u8]) -> Option<&'a str> {
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, u64::try_from(length).ok()?) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    std::str::from_utf8(bytes.get(..length)?).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_charged_is_read_in_both_versions() {
        let own = std::process::id();
        let v1_stat = "cache 1\ninactive_file 7\ntotal_inactive_file 1000\ntotal_active_file 2000\ntotal_dirty 900\ntotal_writeback 100\n";
        let v2_stat = "anon 1\nfile 2\nkernel 5000\nfile_dirty 50\nfile_writeback 0\ninactive_file 50\nactive_file 1000\nslab_reclaimable 4000\n";
        for (case, membership, files, want) in [
            (
                "v2",
                "0::/a/b\n",
                &[("a/b", "memory.current", "20000"), ("a/b", "memory.stat", v2_stat)][..],
                Some((19_000, 5000)),
            ),
            (
                "v2 of a container",
                "0::/kubepods/x\n",
                &[("", "memory.current", "20000"), ("", "memory.stat", v2_stat)],
                Some((19_000, 5000)),
            ),
            (
                "v1",
                "9:cpu:/a\n4:cpuset,memory:/a\n0::/\n",
                &[
                    ("memory/a", "memory.usage_in_bytes", "20000\n"),
                    ("memory/a", "memory.kmem.usage_in_bytes", "6000\n"),
                    ("memory/a", "memory.stat", v1_stat),
                ],
                Some((18_000, 6000)),
            ),
            (
                "old kernels say nothing of the kernel's part",
                "0::/\n",
                &[("", "memory.current", "20000\n"), ("", "memory.stat", "anon 1\n")],
                Some((20_000, 0)),
            ),
            (
                "more can be dropped than there is",
                "0::/\n",
                &[("", "memory.current", "10\n"), ("", "memory.stat", v2_stat)],
                Some((0, 5000)),
            ),
            ("out of the tree", "0::/../../etc\n", &[], None),
            ("the root of all", "0::/\n", &[("", "memory.stat", v2_stat)], None),
            ("no number", "0::/\n", &[("", "memory.current", "max\n"), ("", "memory.stat", v2_stat)], None),
            ("nothing", "", &[], None),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("cgroup");
            fs::create_dir_all(&root).unwrap();
            fs::write(dir.path().join("self"), membership).unwrap();
            for (at, file, text) in files {
                let at = root.join(at);
                fs::create_dir_all(&at).unwrap();
                fs::write(at.join(file), text).unwrap();
                fs::write(at.join("cgroup.procs"), format!("{own}\n")).unwrap();
            }
            let cgroup = OwnCgroup::of(&dir.path().join("self"), &root);
            let seen = cgroup.as_ref().and_then(|cgroup| {
                let parts = cgroup.parts()?;
                Some((cgroup.charged()?.saturating_sub(parts.droppable), parts.kernel))
            });
            assert_eq!(seen, want, "{case}");
            assert_eq!(cgroup.is_some_and(|cgroup| cgroup.is_alone()), want.is_some(), "{case}");
        }
        assert!(OwnCgroup::of(Path::new("/nowhere/at/all"), Path::new("/nowhere")).is_none());
    }

    #[test]
    fn a_cgroup_with_another_process_is_not_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        fs::write(at.join("self"), "0::/\n").unwrap();
        fs::write(at.join("memory.current"), "1\n").unwrap();
        fs::write(at.join("memory.stat"), "anon 1\n").unwrap();
        let own = std::process::id();
        for (processes, alone) in [
            (format!("{own}\n"), true),
            (format!("{own}\n7\n"), false),
            ("7\n".to_owned(), false),
            (String::new(), false),
            ("1\n".repeat(1000), false),
        ] {
            fs::write(at.join("cgroup.procs"), &processes).unwrap();
            let cgroup = OwnCgroup::of(&at.join("self"), at).unwrap();
            assert_eq!(cgroup.is_alone(), alone, "{processes:.20}");
        }
    }
}
