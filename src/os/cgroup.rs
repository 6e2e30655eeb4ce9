//! The memory of this process's own cgroup: what the kernel counts against its limit, its own part included.
//!
//! The resident set is not all: sockets, what is queued in them, files and what is left of closed ones are the kernel's, and
//! are charged to the cgroup. Both versions of cgroups; where neither can be read there is nothing to say.
//!
//! What counts is what is charged, less the pages of files that are neither dirty nor on their way to a disk: the kernel drops
//! them before it kills anybody, the program's own with them. What it calls reclaimable of its slabs is told, and not taken for
//! what can be dropped: sockets' inodes are among them, and nothing frees those of open sockets, nor sooner those of closed ones.

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
    /// Of this, the slabs that it calls reclaimable. Version 1 does not say.
    pub reclaimable: Option<u64>,
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

/// Where a version of cgroups keeps it.
#[derive(Clone, Copy, Debug)]
pub(super) struct CgroupFiles {
    pub(super) used: &'static str,
    /// The lowest counts.
    pub(super) limits: &'static [&'static str],
    /// The kernel's part, where it has a file of its own.
    kernel: Option<&'static str>,
    pub(super) stat: StatNames,
}

/// The lines of `memory.stat`.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatNames {
    files: [&'static str; 2],
    /// Of these, what cannot be dropped yet.
    busy: [&'static str; 2],
    kernel: &'static str,
    reclaimable: &'static str,
}

const V1: CgroupFiles = CgroupFiles {
    used: "memory.usage_in_bytes",
    limits: &["memory.limit_in_bytes"],
    kernel: Some("memory.kmem.usage_in_bytes"),
    stat: StatNames {
        files: ["total_inactive_file", "total_active_file"],
        busy: ["total_dirty", "total_writeback"],
        kernel: "",
        reclaimable: "",
    },
};
const V2: CgroupFiles = CgroupFiles {
    used: "memory.current",
    limits: &["memory.max", "memory.high"],
    kernel: None,
    stat: StatNames {
        files: ["inactive_file", "active_file"],
        busy: ["file_dirty", "file_writeback"],
        kernel: "kernel",
        reclaimable: "slab_reclaimable",
    },
};

/// Version 1 writes "no limit" as a number near 2^63.
const UNLIMITED: u64 = 1 << 60;

/// The directories that may be those of a process's memory cgroup and of all above it, from its own up to what is mounted;
/// one list for each place where cgroups may be mounted. `membership` is `/proc/PID/cgroup`, `mount` is `/sys/fs/cgroup`. A
/// container sees its own cgroup as the root, and perhaps a path that is not there.
pub(super) fn directories(membership: &Path, mount: &Path) -> Vec<(CgroupFiles, Vec<PathBuf>)> {
    let text = std::fs::read_to_string(membership).unwrap_or_default();
    let of_line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let (files, roots) = if controllers.is_empty() {
            (V2, vec![mount.to_owned(), mount.join("unified")])
        } else if controllers.split(',').any(|it| it == "memory") {
            (V1, vec![mount.join("memory")])
        } else {
            return None;
        };
        let relative = Path::new(path.trim_start_matches('/'));
        let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
        let relative = if plain { relative } else { Path::new("") };
        let below = |root: PathBuf| (files, relative.ancestors().map(|below| root.join(below)).collect());
        Some(roots.into_iter().map(below).collect::<Vec<_>>())
    };
    text.lines().filter_map(of_line).flatten().collect()
}

/// The lowest memory limit of a process's cgroup and of those above it, in bytes: `memory.max` and `memory.high` of version
/// 2, `memory.limit_in_bytes` of version 1. `membership` is `/proc/self/cgroup`, `mount` is `/sys/fs/cgroup`. `None` where
/// there is no limit, or nothing can be read.
pub fn lowest_limit(membership: &Path, mount: &Path) -> Option<u64> {
    let all = directories(membership, mount).into_iter();
    all.flat_map(|(files, at)| at.into_iter().map(move |at| (files, at)))
        .flat_map(|(files, at)| files.limits.iter().filter_map(move |name| File::open(at.join(name)).ok()))
        .filter_map(|file| limit(&file))
        .min()
}

/// What a file of a limit says, if it is one.
pub(super) fn limit(file: &File) -> Option<u64> {
    number(file).filter(|bytes| *bytes < UNLIMITED)
}

impl OwnCgroup {
    /// Of the process whose `/proc/PID/cgroup` is `membership`; cgroups are mounted at `mount`. A container sees its own
    /// cgroup as the root, and perhaps a path that is not there: then it is that of the mount.
    pub fn of(membership: &Path, mount: &Path) -> Option<Self> {
        // Its own, or where that is not there, what is mounted: none in between is the process's.
        directories(membership, mount).into_iter().find_map(|(files, at)| {
            [at.first(), at.last()].into_iter().flatten().find_map(|at| Self::open(at, files))
        })
    }

    fn open(at: &Path, files: CgroupFiles) -> Option<Self> {
        let open = |name: &str| File::open(at.join(name)).ok();
        let it = Self {
            used: open(files.used)?,
            stat: open("memory.stat")?,
            kernel: files.kernel.and_then(open),
            processes: open("cgroup.procs")?,
            names: files.stat,
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
        Some(ChargedParts {
            droppable: droppable(stat, self.names),
            kernel: kernel.unwrap_or(0),
            reclaimable: line(stat, self.names.reclaimable),
        })
    }
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
                Some((19_000, 5000, Some(4000))),
            ),
            (
                "v2 of a container",
                "0::/kubepods/x\n",
                &[("", "memory.current", "20000"), ("", "memory.stat", v2_stat)],
                Some((19_000, 5000, Some(4000))),
            ),
            (
                "v1",
                "9:cpu:/a\n4:cpuset,memory:/a\n0::/\n",
                &[
                    ("memory/a", "memory.usage_in_bytes", "20000\n"),
                    ("memory/a", "memory.kmem.usage_in_bytes", "6000\n"),
                    ("memory/a", "memory.stat", v1_stat),
                ],
                Some((18_000, 6000, None)),
            ),
            (
                "old kernels say nothing of the kernel's part",
                "0::/\n",
                &[("", "memory.current", "20000\n"), ("", "memory.stat", "anon 1\n")],
                Some((20_000, 0, None)),
            ),
            (
                "more can be dropped than there is",
                "0::/\n",
                &[("", "memory.current", "10\n"), ("", "memory.stat", v2_stat)],
                Some((0, 5000, Some(4000))),
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
                Some((cgroup.charged()?.saturating_sub(parts.droppable), parts.kernel, parts.reclaimable))
            });
            assert_eq!(seen, want, "{case}");
            assert_eq!(cgroup.is_some_and(|cgroup| cgroup.is_alone()), want.is_some(), "{case}");
        }
        assert!(OwnCgroup::of(Path::new("/nowhere/at/all"), Path::new("/nowhere")).is_none());
    }

    #[test]
    fn the_lowest_limit_of_all_cgroups_above_counts() {
        for (case, membership, files, want) in [
            ("v2", "0::/a/b\n", &[("a/b/memory.max", "25165824\n")][..], Some(25_165_824)),
            ("v2 no limit", "0::/a/b\n", &[("a/b/memory.max", "max\n")], None),
            (
                "v2 above is lower",
                "0::/a/b\n",
                &[("a/b/memory.max", "200\n"), ("a/memory.max", "100\n")],
                Some(100),
            ),
            ("v2 high", "0::/a\n", &[("a/memory.max", "200\n"), ("a/memory.high", "150\n")], Some(150)),
            ("v2 container", "0::/\n", &[("memory.max", "300\n")], Some(300)),
            ("v2 path of the host", "0::/kubepods/x\n", &[("memory.max", "300\n")], Some(300)),
            ("v1", "5:cpu:/a\n4:memory:/a\n", &[("memory/a/memory.limit_in_bytes", "100\n")], Some(100)),
            (
                "v1 no limit",
                "4:memory:/a\n",
                &[("memory/a/memory.limit_in_bytes", "9223372036854771712\n")],
                None,
            ),
            ("v1 joined", "4:cpu,memory:/a\n", &[("memory/a/memory.limit_in_bytes", "7\n")], Some(7)),
            (
                "hybrid",
                "4:memory:/a\n0::/a\n",
                &[("unified/a/memory.max", "50\n"), ("memory/a/memory.limit_in_bytes", "40\n")],
                Some(40),
            ),
            ("out of the tree", "0::/../../etc\n", &[("memory.max", "5\n")], Some(5)),
            ("nothing", "", &[], None),
            ("no sense", "memory\n::\n:::::\n", &[("memory.max", "x\n")], None),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("cgroup");
            fs::create_dir_all(&root).unwrap();
            fs::write(dir.path().join("self"), membership).unwrap();
            for (file, text) in files {
                let file = root.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            assert_eq!(lowest_limit(&dir.path().join("self"), &root), want, "{case}");
        }
        assert_eq!(lowest_limit(Path::new("/nowhere/at/all"), Path::new("/nowhere")), None);
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
