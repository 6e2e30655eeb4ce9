//! The series that every Prometheus client library has of its own process.

use std::{fmt::Write as _, fs};

use super::registry::{float, float_u64};

/// The series that every Prometheus client library has of its own process, under their usual names.
pub(super) struct Process {
    /// Unix time, in seconds.
    started: Option<f64>,
    ticks_per_second: f64,
}

impl Process {
    pub(super) fn read() -> Self {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
        let ticks_per_second = ticks.and_then(|t| u32::try_from(t).ok()).map_or(100.0, f64::from);
        let booted = fs::read_to_string("/proc/stat")
            .ok()
            .and_then(|stat| stat.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse::<f64>().ok()));
        // Field 22 of stat(5); the fields are counted from the third, after the name in brackets.
        let started = own_stat().and_then(|stat| stat.get(19).copied());
        let started = booted.zip(started).map(|(booted, ticks)| booted + ticks / ticks_per_second);
        Self { started, ticks_per_second }
    }

    pub(super) fn write(&self, text: &mut String) {
        let mut series = |kind: &str, name: &str, help: &str, value: Option<f64>| {
            // A value that cannot be read is left out: zero would be a lie.
            let Some(value) = value else { return };
            // Writing to a String cannot fail.
            write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n")
                .unwrap_or_default();
        };
        // Fields 14 and 15 of stat(5): ticks in user and in kernel mode.
        let cpu = own_stat().and_then(|stat| Some((stat.get(11)? + stat.get(12)?) / self.ticks_per_second));
        let resident = fs::read_to_string("/proc/self/status").ok().and_then(|status| {
            let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
            Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
        });
        // One of them is the directory being read.
        let open = fs::read_dir("/proc/self/fd").ok().map(|fds| float(fds.count().saturating_sub(1)));
        let most = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok();
        let most = most.map(|(soft, _hard)| float_u64(soft));
        series(
            "gauge",
            "process_start_time_seconds",
            "When the process started, as a Unix time.",
            self.started,
        );
        series("counter", "process_cpu_seconds_total", "CPU time used, in user and kernel mode.", cpu);
        series("gauge", "process_resident_memory_bytes", "Memory that is in RAM.", resident);
        series("gauge", "process_open_fds", "Open file descriptors.", open);
        series("gauge", "process_max_fds", "The most file descriptors that may be open.", most);
    }
}

/// The numbers of `/proc/self/stat` from the fourth field on, with the third (a letter) as zero.
fn own_stat() -> Option<Vec<f64>> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name may hold spaces and brackets; the last bracket ends it.
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_ascii_whitespace().map(|field| field.parse().unwrap_or_default()).collect())
}
