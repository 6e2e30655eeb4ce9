//! spire-agent's keys of the block `agent` that this version does not act on.

use crate::hcl::{
    absent::{Off, asked, refuse},
    section::Section,
    tree::Place,
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

const EXPERIMENTAL: [(&str, Off, &str); 4] = [
    ("jwt_svid_cache_hit_timeout", Off::Text("30s"), "a time to wait before a cached JWT-SVID is served"),
    ("require_pq_kem", Off::False, "post-quantum TLS"),
    ("feature_flags", Off::Empty, "any feature flag"),
    ("broker", Off::Missing, "the broker API"),
];

const AGENT_SERVER: [(&str, Off); 12] = [
    ("server_address", Off::Text("")),
    ("server_port", Off::Zero),
    ("join_token", Off::Text("")),
    ("join_token_file", Off::Text("")),
    ("trust_bundle_path", Off::Text("")),
    ("trust_bundle_url", Off::Text("")),
    ("trust_bundle_unix_socket", Off::Text("")),
    ("trust_bundle_spiffe_workload_api", Off::Text("")),
    ("trust_bundle_format", Off::Text("pem")),
    ("insecure_bootstrap", Off::False),
    ("rebootstrap_mode", Off::Text("never")),
    ("rebootstrap_delay", Off::Text("10m")),
];

const EXPERIMENTAL_SERVER: [(&str, Off); 2] =
    [("sync_interval", Off::Text("5s")), ("use_sync_authorized_entries", Off::True)];

/// What was set that only means something with a SPIRE Server behind the agent, by place and full name. Values are not
/// kept, since some are secrets.
#[derive(Debug, Default)]
pub(super) struct ServerKeys(pub(super) Vec<(Place, String)>);

impl ServerKeys {
    fn take(&mut self, section: &mut Section<'_>, keys: &[(&'static str, Off)]) {
        for (key, off) in keys {
            if let Some((place, _)) = asked(section, key, *off) {
                self.0.push((place, section.path(key)));
            }
        }
    }
}

/// The keys of `agent` itself.
pub(super) fn agent(s: &mut Section<'_>, server: &mut ServerKeys) {
    server.take(s, &AGENT_SERVER);
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
pub(super) fn experimental(s: &mut Section<'_>, server: &mut ServerKeys) {
    server.take(s, &EXPERIMENTAL_SERVER);
    refuse(s, &EXPERIMENTAL);
    for key in ["named_pipe_name", "admin_named_pipe_name"] {
        if let Some((place, value)) = asked(s, key, Off::Text("")) {
            s.wrong(place, key, value, "is not supported in this platform; please use socket_path instead");
        }
    }
}
