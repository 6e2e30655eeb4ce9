//! spire-agent's keys of the block `agent` that this version does not act on.

use crate::hcl::{
    absent::{Off, asked, refuse},
    section::Section,
};

const AGENT: [(&str, Off, &str); 2] = [
    ("authorized_delegates", Off::Empty, "the delegated identity API"),
    ("profiling_enabled", Off::False, "profiling"),
];

const SDS: [(&str, Off, &str); 4] = [
    ("default_svid_name", Off::Text("default"), "SDS"),
    ("default_bundle_name", Off::Text("ROOTCA"), "SDS"),
    ("default_all_bundles_name", Off::Text("ALL"), "SDS"),
    ("disable_spiffe_cert_validation", Off::False, "SDS"),
];

const EXPERIMENTAL: [(&str, Off, &str); 2] =
    [("feature_flags", Off::Empty, "any feature flag"), ("broker", Off::Missing, "the broker API")];

/// The keys of `agent` itself.
pub(super) fn agent(s: &mut Section<'_>) {
    if let Some((place, value)) = asked(s, "disable_workload_api", Off::False) {
        let message = "the Workload API is the only one in this version, and nothing would be served";
        s.wrong(place, "disable_workload_api", value, message);
    }
    // Off is what SDS is, whichever way it is written.
    s.boolean("disable_sds_api");
    if let Some(mut sds) = s.block("sds") {
        refuse(&mut sds, &SDS);
        sds.finish();
    }
    refuse(s, &AGENT);
    // These three say nothing unless profiling is enabled.
    s.integer("profiling_port", 0..=u16::MAX);
    s.integer("profiling_freq", 0..=i64::MAX);
    s.strings("profiling_names");
}

/// The keys of `agent.experimental`.
pub(super) fn experimental(s: &mut Section<'_>) {
    refuse(s, &EXPERIMENTAL);
    for key in ["named_pipe_name", "admin_named_pipe_name"] {
        if let Some((place, value)) = asked(s, key, Off::Text("")) {
            s.wrong(place, key, value, "is not supported in this platform; please use socket_path instead");
        }
    }
}
