//! How much may still be charged to the memory cgroups of this process before somebody in them is killed.
//!
//! Of this process's own cgroup and of those above it, whoever else is in them. What can be dropped counts as left, as in
//! [`super::cgroup`].

use std::{
    fs::File,
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::cgroup::{CgroupFiles, LONGEST, StatNames, directories, droppable, limit, number, text};

/// The most cgroups, one in the other, that are looked at.
const DEPTH: usize = 16;

/// The cgroups that bound this process's memory: its own, and those above it. Their files stay open.
#[derive(Debug)]
pub struct Headroom(Vec<BoundedCgroup>);

#[derive(Debug)]
struct BoundedCgroup {
    used: File,
    limits: Vec<File>,
    stat: File,
    names: StatNames,
    /// What `used` may be: the limit, and what can be dropped.
    most: AtomicU64,
}

impl Headroom {
    /// Of the process whose `/proc/PID/cgroup` is `membership`; cgroups are mounted at `mount`. `None` where none has
    /// a limit that can be read.
    pub fn of(membership: &Path, mount: &Path) -> Option<Self> {
        let bounded: Vec<BoundedCgroup> = directories(membership, mount)
            .into_iter()
            .flat_map(|(files, at)| at.into_iter().map(move |at| (at, files)))
            .filter_map(|(at, files)| BoundedCgroup::open(&at, &files))
            .take(DEPTH)
            .collect();
        (!bounded.is_empty()).then_some(Self(bounded))
    }

    /// Bytes that are left in the fullest of them, by what [`Headroom::look_again`] found last. Some microseconds.
    pub fn left(&self) -> u64 {
        let left = |it: &BoundedCgroup| {
            let used = number(&it.used).unwrap_or(u64::MAX);
            it.most.load(Relaxed).saturating_sub(used)
        };
        self.0.iter().map(left).min().unwrap_or(u64::MAX)
    }

    /// Looks what the limits are by now, and how much of what is used can be dropped. The kernel adds numbers up for it,
    /// which may take a while.
    pub fn look_again(&self) {
        for it in &self.0 {
            it.look_again();
        }
    }
}

impl BoundedCgroup {
    fn open(at: &Path, files: &CgroupFiles) -> Option<Self> {
        let open = |name: &str| File::open(at.join(name)).ok();
        let it = Self {
            used: open(files.used)?,
            limits: files.limits.iter().filter_map(|name| open(name)).collect(),
            stat: open("memory.stat")?,
            names: files.stat,
            most: AtomicU64::new(u64::MAX),
        };
        number(&it.used)?;
        it.look_again();
        (it.most.load(Relaxed) != u64::MAX).then_some(it)
    }

    fn look_again(&self) {
        let limits = self.limits.iter().filter_map(limit);
        let Some(limit) = limits.min() else {
            self.most.store(u64::MAX, Relaxed);
            return;
        };
        let mut bytes = [0; LONGEST];
        let stat = text(&self.stat, &mut bytes).unwrap_or_default();
        self.most.store(limit.saturating_add(droppable(stat, self.names)), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_fullest_cgroup_counts_and_what_can_be_dropped_does_not() {
        let v2 = |used: &str, max: &str, stat: &str| {
            [
                ("memory.current", used.to_owned()),
                ("memory.max", max.to_owned()),
                ("memory.stat", stat.to_owned()),
            ]
        };
        let v1 = |used: &str, max: &str, stat: &str| {
            let [(_, used), (_, max), stat] = v2(used, max, stat);
            [("memory.usage_in_bytes", used), ("memory.limit_in_bytes", max), stat]
        };
        let no_limit = "9223372036854771712\n";
        for (case, membership, files, want) in [
            ("nothing", "", vec![], None),
            ("no limit", "0::/a\n", vec![("a", v2("5\n", "max\n", ""))], None),
            ("version 1 without one", "4:memory:/a\n", vec![("memory/a", v1("5\n", no_limit, ""))], None),
            ("version 2", "0::/a\n", vec![("a", v2("5\n", "25\n", ""))], Some(20)),
            ("version 1", "4:cpu,memory:/a\n", vec![("memory/a", v1("5\n", "25\n", ""))], Some(20)),
            (
                "above it",
                "0::/a/b\n",
                vec![("a/b", v2("5\n", "25\n", "")), ("a", v2("9\n", "20\n", ""))],
                Some(11),
            ),
            ("as a container sees it", "0::/kubepods/x\n", vec![("", v2("5\n", "25\n", ""))], Some(20)),
            ("over it", "0::/a\n", vec![("a", v2("30\n", "25\n", ""))], Some(0)),
            (
                "slowed down from there on",
                "0::/a\n",
                vec![
                    ("a", v2("5\n", "25\n", "")),
                    ("a", [("memory.high", "15\n".to_owned()), ("x", String::new()), ("y", String::new())]),
                ],
                Some(10),
            ),
            (
                "files can be dropped, slabs cannot",
                "0::/a\n",
                vec![(
                    "a",
                    v2(
                        "25\n",
                        "25\n",
                        "anon 9\ninactive_file 3\nactive_file 5\nfile_dirty 1\nslab_reclaimable 9\n",
                    ),
                )],
                Some(7),
            ),
            (
                "version 1 counts those below it",
                "4:memory:/a\n",
                vec![(
                    "memory/a",
                    v1("25\n", "25\n", "inactive_file 1\ntotal_inactive_file 3\ntotal_active_file 4\n"),
                )],
                Some(7),
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("self"), membership).unwrap();
            for (below, files) in files {
                fs::create_dir_all(dir.path().join("cgroup").join(below)).unwrap();
                for (name, text) in files {
                    fs::write(dir.path().join("cgroup").join(below).join(name), text).unwrap();
                }
            }
            let headroom = Headroom::of(&dir.path().join("self"), &dir.path().join("cgroup"));
            assert_eq!(headroom.map(|it| it.left()), want, "{case}");
        }
    }

    #[test]
    fn what_is_used_counts_at_once_and_the_rest_when_it_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        for (name, text) in
            [("self", "0::/\n"), ("memory.current", "5"), ("memory.max", "25"), ("memory.stat", "")]
        {
            write(name, text);
        }
        let headroom = Headroom::of(&dir.path().join("self"), dir.path()).unwrap();
        write("memory.current", "15");
        write("memory.max", "30");
        write("memory.stat", "inactive_file 2\n");
        assert_eq!(headroom.left(), 10);
        headroom.look_again();
        assert_eq!(headroom.left(), 17);
        write("memory.max", "max");
        headroom.look_again();
        assert_eq!(headroom.left(), u64::MAX - 15, "no limit any more");
    }
}
