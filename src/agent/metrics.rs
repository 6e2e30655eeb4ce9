//! The series of the agent as a whole: its version, its reloads, its log.

use metrics::{Counter, Gauge};

use super::meter::ChargedMemory;

use crate::{
    limits::{
        gate_standings::MemoryStanding,
        room::{Room, Short},
    },
    os::clock::Clock,
    telemetry::registry::{By, Label as _, Registry, float_u64, labels, unix_time},
};

labels! {
    /// How a reload ended.
    pub(super) enum ReloadResult, "result" {
        /// The new configuration is in force.
        Ok = "ok",
        /// The old one stays.
        Error = "error",
    }
}

labels! {
    /// What of memory is told.
    pub(super) enum MemoryOf, "kind" {
        /// What the agent may use; 0 for no bound.
        Budget = "budget",
        /// What counts as used: the larger of what is reckoned and what is measured.
        Used = "used",
        /// What connections hold, as it is reckoned.
        Held = "held",
        /// What is charged to the agent's cgroup, if it is alone in it.
        Cgroup = "cgroup",
        /// Of this, the kernel's part.
        Kernel = "kernel",
    }
}

/// How memory stands, in bytes.
#[derive(Debug)]
pub(super) struct MemoryMetrics(By<MemoryOf, Gauge>);

impl MemoryMetrics {
    /// Registers every series.
    pub(super) fn new(make: Registry<'_>) -> Self {
        Self(make.gauges("durward_memory_bytes", "Memory: the budget, what is used of it, and by what."))
    }

    /// Sets them.
    pub(super) fn set(&self, standing: MemoryStanding, charged: Option<ChargedMemory>) {
        let MemoryStanding { budget, held, used, .. } = standing;
        let ChargedMemory { used: cgroup, kernel } = charged.unwrap_or_default();
        for (of, bytes) in [
            (MemoryOf::Budget, budget),
            (MemoryOf::Used, used),
            (MemoryOf::Held, held),
            (MemoryOf::Cgroup, cgroup),
            (MemoryOf::Kernel, kernel),
        ] {
            self.0.with(of, |gauge| gauge.set(float_u64(bytes)));
        }
    }
}

/// Whether the processor is short.
#[derive(Debug)]
pub(super) struct ProcessorMetrics(Gauge);

impl ProcessorMetrics {
    /// Registers the series.
    pub(super) fn new(make: Registry<'_>) -> Self {
        Self(make.gauge(
            "durward_processor_short",
            "1 while the agent uses or waits for more of the processor than it may, and defaults refuse; else 0.",
            &[],
        ))
    }

    /// Sets it.
    pub(super) fn set(&self, room: &Room) {
        self.0.set(if room.is_short(Short::Processor) { 1.0 } else { 0.0 });
    }
}

/// The series of the agent as a whole.
pub(super) struct AgentMetrics {
    clock: Clock,
    reloads: By<ReloadResult, Counter>,
    reload_ok: Gauge,
    reload_time: Gauge,
    pub(super) log_lines_lost: Counter,
    pub(super) panics: Counter,
}

impl AgentMetrics {
    /// Registers every series.
    pub(super) fn new(make: Registry<'_>, clock: Clock) -> Self {
        make.gauge(
            "durward_build_info",
            "Always 1; the label tells the version that runs.",
            &[("version", env!("CARGO_PKG_VERSION"))],
        )
        .set(1.0);
        Self {
            clock,
            reloads: By::new(|result: ReloadResult| {
                let (name, help) = ("durward_reloads_total", "Reloads of the configuration.");
                let labels = [(ReloadResult::KEY, result.text())];
                match result {
                    ReloadResult::Ok => make.counter_once_used(name, help, &labels),
                    ReloadResult::Error => make.counter(name, help, &labels),
                }
            }),
            reload_ok: make.gauge(
                "durward_last_reload_successful",
                "1 when the last reload was taken, or none was asked for; 0 when it was refused.",
                &[],
            ),
            reload_time: make.gauge(
                "durward_last_reload_timestamp_seconds",
                "When the configuration in force was loaded, as a Unix time.",
                &[],
            ),
            panics: make.counter(
                "durward_panics_total",
                "Panics: defects of the agent, each told in the log.",
                &[],
            ),
            log_lines_lost: make.counter(
                "durward_log_lines_lost_total",
                "Log lines dropped because nobody took them from the agent in time.",
                &[],
            ),
        }
    }

    /// The configuration was loaded at start.
    pub(super) fn loaded(&self) {
        self.reload_ok.set(1.0);
        self.reload_time.set(unix_time(self.clock.now()));
    }

    /// A reload ended.
    pub(super) fn reloaded(&self, result: ReloadResult) {
        self.reloads.with(result, |counter| counter.increment(1));
        match result {
            ReloadResult::Ok => self.loaded(),
            ReloadResult::Error => self.reload_ok.set(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[tokio::test(start_paused = true)]
    async fn tells_of_reloads() {
        let clock = Clock::starting_at(UNIX_EPOCH + Duration::from_secs(1_000_000));
        let metrics = Metrics::default();
        let agent = AgentMetrics::new(metrics.registry(), clock);
        let has = |line: &str| metrics.render().lines().any(|l| l == line);
        agent.loaded();
        assert!(has("durward_last_reload_successful 1"));
        agent.reloaded(ReloadResult::Error);
        assert!(has("durward_last_reload_successful 0"));
        assert!(has(r#"durward_reloads_total{result="error"} 1"#));
        assert!(has("durward_last_reload_timestamp_seconds 1000000"), "of the one in force");
        agent.reloaded(ReloadResult::Ok);
        assert!(has("durward_last_reload_successful 1"));
        assert!(has(r#"durward_reloads_total{result="ok"} 1"#));
    }
}
