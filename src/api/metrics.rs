//! The series of calls.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};
use tonic::Code;

use crate::{
    limits::Method,
    telemetry::registry::{By, GRPC_CODES, Label, Open, Registry},
};

/// The methods whose refusals and errors are there from the start, with 0.
const EVERYDAY: [Method; 5] = [
    Method::FetchX509Svid,
    Method::FetchX509Bundles,
    Method::FetchJwtSvid,
    Method::FetchJwtBundles,
    Method::ValidateJwtSvid,
];
/// And which of them.
const REFUSALS_AND_ERRORS: [&str; 4] = ["PermissionDenied", "ResourceExhausted", "Internal", "Unavailable"];

/// The series of calls. All methods are cheap and never block.
pub(super) struct ApiMetrics {
    calls: By<Method, Box<[Counter]>>,
    seconds: By<Method, Histogram>,
    open: By<Method, Gauge>,
}

impl ApiMetrics {
    /// Registers every series.
    pub(super) fn new(make: Registry<'_>) -> Self {
        let counter = |method: Method, code| {
            let name = "durward_calls_total";
            let help = "Requests that ended, by gRPC code; a stream counts when it ends. Other is what is no method of the \
                        Workload API.";
            let labels = [(Method::KEY, method.text()), ("code", code)];
            // To validate a token takes no identity.
            let is_there = (method, code) != (Method::ValidateJwtSvid, "PermissionDenied");
            if is_there && EVERYDAY.contains(&method) && REFUSALS_AND_ERRORS.contains(&code) {
                make.counter(name, help, &labels)
            } else {
                make.counter_once_used(name, help, &labels)
            }
        };
        Self {
            calls: By::new(|method| GRPC_CODES.iter().map(|code| counter(method, code)).collect()),
            seconds: make.histograms(
                "durward_call_duration_seconds",
                "Time from a call's arrival to its answer, or to the first message of a stream.",
            ),
            open: By::new(|method: Method| {
                let (name, help) = ("durward_streams_open", "Calls that are being served now.");
                let labels = [(Method::KEY, method.text())];
                if EVERYDAY.contains(&method) {
                    make.gauge(name, help, &labels)
                } else {
                    make.gauge_once_used(name, help, &labels)
                }
            }),
        }
    }

    /// A Workload API call was answered, or a stream's first message (or its refusal) was.
    pub(super) fn call_answered(&self, method: Method, took: Duration) {
        self.seconds.with(method, |histogram| histogram.record(took));
    }

    /// A call, a stream or another request ended.
    pub(super) fn call_ended(&self, method: Method, code: Code) {
        let Ok(at) = usize::try_from(i32::from(code)) else { return };
        self.calls.with(method, |codes| {
            if let Some(counter) = codes.get(at) {
                counter.increment(1);
            }
        });
    }

    /// A call or stream is open while the answer is kept.
    pub(super) fn stream_opened(&self, method: Method) -> Open {
        self.open.with(method, Open::count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::telemetry::metrics::Metrics;

    fn samples(metrics: &Metrics) -> BTreeMap<String, String> {
        let text = metrics.render();
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|l| l.rsplit_once(' '));
        samples.map(|(series, value)| (series.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn counts_calls_and_streams() {
        let metrics = Metrics::default();
        let calls = ApiMetrics::new(metrics.registry());
        calls.call_ended(Method::FetchJwtSvid, Code::Ok);
        calls.call_ended(Method::FetchJwtSvid, Code::PermissionDenied);
        calls.call_answered(Method::FetchJwtSvid, Duration::from_micros(300));
        let stream = calls.stream_opened(Method::FetchX509Svid);
        let got = samples(&metrics);
        for (series, want) in [
            (r#"durward_calls_total{method="FetchJWTSVID",code="OK"}"#, "1"),
            (r#"durward_calls_total{method="FetchJWTSVID",code="PermissionDenied"}"#, "1"),
            (r#"durward_calls_total{method="FetchX509SVID",code="OK"}"#, "0"),
            (r#"durward_call_duration_seconds_bucket{method="FetchJWTSVID",le="0.00025"}"#, "0"),
            (r#"durward_call_duration_seconds_bucket{method="FetchJWTSVID",le="0.0005"}"#, "1"),
            (r#"durward_call_duration_seconds_count{method="FetchX509SVID"}"#, "0"),
            (r#"durward_streams_open{method="FetchX509SVID"}"#, "1"),
        ] {
            assert_eq!(got.get(series).map(String::as_str), Some(want), "{series} in {got:#?}");
        }
        drop(stream);
        assert_eq!(samples(&metrics)[r#"durward_streams_open{method="FetchX509SVID"}"#], "0");
    }

    #[test]
    fn the_series_are_the_same_however_much_happens() {
        let metrics = Metrics::default();
        let calls = ApiMetrics::new(metrics.registry());
        let before: Vec<String> = samples(&metrics).into_keys().collect();
        for method in Method::ALL {
            for code in 0..20 {
                calls.call_ended(method, Code::from_i32(code));
            }
            calls.call_answered(method, Duration::from_secs(1));
            drop(calls.stream_opened(method));
        }
        assert_eq!(before, samples(&metrics).into_keys().collect::<Vec<_>>());
    }
}
