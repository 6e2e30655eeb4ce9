//! What the machine has of memory.

use std::{fs, path::Path};

use nix::sys::sysinfo::sysinfo;

/// In bytes, as `meminfo` (`/proc/meminfo`) has it: a container may have one that says what is there for it. Where that cannot
/// be read, as the kernel says it. `None` where neither does.
pub fn memory(meminfo: &Path) -> Option<u64> {
    let said = fs::read_to_string(meminfo).ok().and_then(|text| total(&text));
    said.or_else(|| sysinfo().ok().map(|said| said.ram_total()))
}

fn total(meminfo: &str) -> Option<u64> {
    let said = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = said.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_is_read() {
        for (case, text, want) in [
            (
                "as Linux writes it",
                "MemTotal:       24684084 kB\nMemFree:        1 kB\n",
                Some(24_684_084 << 10),
            ),
            ("not the first line", "Other: 5 kB\nMemTotal: 7 kB", Some(7 << 10)),
            ("no unit", "MemTotal: 7\n", None),
            ("no number", "MemTotal: much kB\n", None),
            ("more than there can be", "MemTotal: 18446744073709551615 kB\n", None),
            ("nothing", "", None),
        ] {
            assert_eq!(total(text), want, "{case}");
        }
        let (here, nowhere) = (memory(Path::new("/proc/meminfo")), memory(Path::new("/nowhere")));
        assert!(here > Some(1 << 20) && nowhere > Some(1 << 20), "{here:?} {nowhere:?}");
    }
}
