//! What operators count: every series is registered at start, and the request path only touches handles it holds.
//!
//! Each room registers its own. Names are `durward_*` in base units (seconds, bytes), counters end in `_total`.
//! Labels come from closed enums ([`registry`](super::registry)): nothing that a caller or an entry chose (SPIFFE
//! ID, UID, PID, selector, trust domain) can become one, so the number of series is fixed when the agent starts.
//!
//! There is no global recorder: the agent has one [`Metrics`] and a test has its own. The exporter keeps every
//! sample of a histogram (16 bytes) until somebody drains it, so [`Metrics::keep_up`] must run, scraped or not.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::time::Instant;

use crate::os::clock::sleep_to_beat;

use super::{
    process::ProcessSeries,
    registry::{Registry, Unused},
    spire_names::SpireNames,
};

/// Upper bounds in seconds. From a cached answer (tens of microseconds) to an RSA key made on a busy node.
const BUCKETS: [f64; 15] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// How often samples are drained. At 50,000 calls per second this is 0.8 MB of samples at most.
const UPKEEP: Duration = Duration::from_secs(1);

/// How long a text is good for, whoever asks and how often.
const GOOD_FOR: Duration = Duration::from_secs(1);

/// Every series of the agent. Made once per agent; tests make as many as they like.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    process: ProcessSeries,
    /// Its names for what is counted, where they are wanted too.
    spire_names: Option<SpireNames>,
    unused: Unused,
    /// Each sets what is counted elsewhere.
    ask: Mutex<Vec<Box<dyn Fn() + Send>>>,
    /// What was made last, and when. Held while it is made: who asks meanwhile gets that one too.
    latest: Mutex<Option<(Instant, Bytes)>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets(&BUCKETS)
            .expect("the list of buckets is not empty")
            .build_recorder();
        Self {
            handle: recorder.handle(),
            recorder,
            process: ProcessSeries::read(),
            spire_names: None,
            unused: Unused::default(),
            ask: Mutex::default(),
            latest: Mutex::default(),
        }
    }
}

impl Metrics {
    /// The same, by these names too.
    #[must_use]
    pub fn named_as_well(self, names: Option<SpireNames>) -> Self {
        Self { spire_names: names, ..self }
    }

    /// Where a room registers its series.
    pub fn registry(&self) -> Registry<'_> {
        Registry::noting(&self.recorder, &self.unused)
    }

    /// Calls `ask` before each rendering, to set what is counted elsewhere. It must not block, nor call this.
    pub fn before_render(&self, ask: impl Fn() + Send + 'static) {
        self.ask.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(ask));
    }

    /// Moves the samples of the histograms into their buckets every second, for ever; see the module's top.
    pub async fn keep_up(&self) {
        loop {
            self.handle.run_upkeep();
            sleep_to_beat(UPKEEP).await;
        }
    }

    /// What [`Metrics::render`] gives, without series that are there for a combination of labels that has not happened, made
    /// once a second at most: scraping costs the node the same, whoever does it.
    #[must_use]
    pub fn latest(&self) -> Bytes {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match &*latest {
            Some((made, text)) if now.duration_since(*made) < GOOD_FOR => text.clone(),
            _ => {
                let unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner);
                let text = Bytes::from(without(&unused, &self.render()));
                *latest = Some((now, text.clone()));
                text
            }
        }
    }

    /// Everything in Prometheus' text format (version 0.0.4). Reads `/proc/self`; takes about a millisecond.
    #[must_use]
    pub fn render(&self) -> String {
        for ask in self.ask.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            ask();
        }
        let mut text = self.handle.render();
        if let Some(names) = &self.spire_names {
            names.write(&mut text);
        }
        self.process.write(&mut text);
        text
    }
}

/// `text` without those series of `unused` in which nothing was counted.
fn without(unused: &BTreeSet<String>, text: &str) -> String {
    // A histogram's lines are left out together: by its count, and without the bound of the bucket.
    let series = |line: &str| -> Option<(String, bool)> {
        let Some((name, rest)) = line.split_once('{') else {
            let (name, value) = line.split_once(' ').filter(|(name, _)| *name != "#")?;
            return Some((name.to_owned(), value == "0"));
        };
        let (labels, value) = rest.rsplit_once("} ")?;
        let labels = labels.split(",le=").next().unwrap_or_default();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let plain = format!("{name}{{{labels}}}");
        let of_histogram = base.map(|base| format!("{base}{{{labels}}}")).filter(|it| unused.contains(it));
        Some((of_histogram.unwrap_or(plain), value == "0"))
    };
    let mut empty = BTreeSet::new();
    for line in text.lines() {
        let counts = |line: &str| {
            line.split('{').next().is_some_and(|name| !name.ends_with("_bucket") && !name.ends_with("_sum"))
        };
        if let Some((series, true)) = series(line).filter(|_| counts(line))
            && unused.contains(&series)
        {
            empty.insert(series);
        }
    }
    let kept = text.lines().filter(|line| series(line).is_none_or(|(series, _)| !empty.contains(&series)));
    kept.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{os::clock::Clock, telemetry::registry::unix_time};

    /// The value of the series of this name, which has no labels.
    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in:\n{text}")).parse().unwrap()
    }

    #[test]
    fn asks_for_what_is_counted_elsewhere() {
        let metrics = Metrics::default();
        let counter = metrics.registry().counter("durward_elsewhere_total", "Counted elsewhere.", &[]);
        metrics.before_render(move || counter.absolute(3));
        assert_eq!(value(&metrics.render(), "durward_elsewhere_total"), 3.0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_never_used_is_not_scraped() {
        let metrics = Metrics::default();
        let registry = metrics.registry();
        let at = |which| [("which", which)];
        let rare = ["a", "b"].map(|it| registry.counter_once_used("durward_rare_total", "Rare.", &at(it)));
        let _kept = registry.counter("durward_kept_total", "Kept.", &at("a"));
        let seconds = ["a", "b"].map(|it| registry.histogram("durward_seconds", "Measured.", ("which", it)));
        rare[1].increment(1);
        seconds[1].record(0.02);
        let text = String::from_utf8(metrics.latest().to_vec()).unwrap();
        for (line, there) in [
            (r#"durward_rare_total{which="a"} 0"#, false),
            (r#"durward_rare_total{which="b"} 1"#, true),
            (r#"durward_kept_total{which="a"} 0"#, true),
            (r#"durward_seconds_count{which="a"} 0"#, false),
            (r#"durward_seconds_bucket{which="a",le="0.001"} 0"#, false),
            (r#"durward_seconds_bucket{which="b",le="0.001"} 0"#, true),
            (r#"durward_seconds_count{which="b"} 1"#, true),
        ] {
            assert_eq!(text.lines().any(|got| got == line), there, "{line} in:\n{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_text_is_made_once_a_second() {
        let metrics = Metrics::default();
        let made = metrics.registry().counter("durward_made_total", "Texts that were made.", &[]);
        metrics.before_render(move || made.increment(1));
        for second in 1..=3 {
            for _ in 0..1000 {
                let text = metrics.latest();
                assert_eq!(
                    value(std::str::from_utf8(&text).unwrap(), "durward_made_total"),
                    f64::from(second)
                );
            }
            tokio::time::advance(GOOD_FOR).await;
        }
    }

    #[test]
    fn tells_of_its_process() {
        let text = Metrics::default().render();
        let started = value(&text, "process_start_time_seconds");
        let now = unix_time(Clock::SYSTEM.now());
        assert!(started > 1.6e9 && started <= now + 1.0, "started at {started}");
        assert!(value(&text, "process_resident_memory_bytes") > 1e6);
        let (open, most) = (value(&text, "process_open_fds"), value(&text, "process_max_fds"));
        assert!(open >= 3.0 && open <= most, "{open} of {most}");
        assert!(value(&text, "process_cpu_seconds_total") >= 0.0);
    }
}
