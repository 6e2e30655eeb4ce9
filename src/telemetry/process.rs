//! The series that every Prometheus client library has of its own process.

use std::fmt::Write as _;

use nix::sys::resource::{Resource, getrlimit};
use procfs::process::{Process, Stat};

use super::registry::float_u64;
use crate::os::{heap, open_files::open_files};

/// The series of this process, under their usual names.
pub(super) struct ProcessSeries {
    /// Unix time, in seconds.
    started: Option<f64>,
}

impl ProcessSeries {
    pub(super) fn read() -> Self {
        let booted = procfs::boot_time_secs().ok().map(float_u64);
        let started = booted.zip(own_stat()).map(|(booted, stat)| booted + seconds(stat.starttime));
        Self { started }
    }

    pub(super) fn write(&self, text: &mut String) {
        let mut series = |kind: &str, name: &str, help: &str, value: Option<f64>| {
            // A value that cannot be read is left out: zero would be a lie.
            let Some(value) = value else { return };
            // Writing to a String cannot fail.
            write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n")
                .unwrap_or_default();
        };
        let cpu = own_stat().map(|stat| seconds(stat.utime + stat.stime));
        let resident = heap::resident().map(float_u64);
        let open = open_files().map(float_u64);
        let most = getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _hard)| float_u64(soft));
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

fn own_stat() -> Option<Stat> {
    Process::myself().and_then(|own| own.stat()).ok()
}

/// What the kernel counts in clock ticks.
fn seconds(ticks: u64) -> f64 {
    float_u64(ticks) / float_u64(procfs::ticks_per_second())
}
