//! The block `plugins`, as far as it is there: the unix attestor.

use super::absent::{NOT_HERE, Off, ServerKeys, asked, refuse};
use crate::{
    attest,
    hcl::{
        section::{Labelled, Section, nearest},
        tree::Place,
    },
};

const EXTERNAL: &str = "an external plugin";

/// What an attestor's block of spire-agent may hold and this version does not act on.
const PLUGIN: [(&str, Off, &str); 4] = [
    ("plugin_data_file", Off::Text(""), "reading plugin_data from another file"),
    ("plugin_cmd", Off::Text(""), EXTERNAL),
    ("plugin_args", Off::Empty, EXTERNAL),
    ("plugin_checksum", Off::Text(""), EXTERNAL),
];

pub(super) fn read(root: &mut Section<'_>, server: &mut ServerKeys) -> attest::unix::Settings {
    let Some(mut plugins) = root.block("plugins") else { return attest::unix::Settings::default() };
    let mut unix = None;
    for plugin in plugins.labelled("WorkloadAttestor") {
        match (plugin.label, &unix) {
            ("unix", None) => unix = Some((plugin.place, read_unix(plugin.section))),
            ("unix", Some((first, _))) => declared_twice(plugin, *first),
            _ => workload_attestor(plugin),
        }
    }
    for key in ["NodeAttestor", "KeyManager"] {
        for Labelled { place, section, .. } in plugins.labelled(key) {
            server.0.push((place, section.name()));
            section.ignore();
        }
    }
    for Labelled { place, mut section, .. } in plugins.labelled("SVIDStore") {
        if is_enabled(&mut section) {
            let message = format!("storing SVIDs {NOT_HERE}; leave it out");
            section.problems().add(place, &section.name(), None, message);
        }
        section.ignore();
    }
    plugins.finish();
    unix.map(|(_, settings)| settings).unwrap_or_default()
}

fn read_unix(mut plugin: Section<'_>) -> attest::unix::Settings {
    let mut settings = attest::unix::Settings::default();
    if let Some(mut data) = plugin.block("plugin_data") {
        if let Some(at) = data.boolean("discover_workload_path") {
            settings.discover_workload_path = at.value;
        }
        if let Some(at) = data.integer("workload_size_limit", i64::MIN..=i64::MAX) {
            settings.workload_size_limit = at.value;
        }
        data.finish();
    }
    refuse(&mut plugin, &PLUGIN);
    if let Some((place, value)) = asked(&mut plugin, "enabled", Off::True) {
        let message =
            "unix is the only workload attestor in this version: without it nobody gets an identity";
        plugin.wrong(place, "enabled", value, message);
    }
    plugin.finish();
    settings
}

fn is_enabled(plugin: &mut Section<'_>) -> bool {
    plugin.boolean("enabled").is_none_or(|at| at.value)
}

fn declared_twice(plugin: Labelled<'_>, first: Place) {
    let Labelled { place, section, .. } = plugin;
    let message = format!("declared more than once: first at {}", section.problems().show(first));
    section.problems().add(place, &section.name(), None, message);
    section.ignore();
}

/// Any attestor but `unix`.
fn workload_attestor(plugin: Labelled<'_>) {
    let Labelled { label, place, mut section } = plugin;
    let known = ["docker", "k8s", "slurm", "systemd", "windows"];
    if is_enabled(&mut section) {
        let what = if section.has("plugin_cmd") {
            format!("an external plugin {NOT_HERE}; leave it out")
        } else if known.contains(&label) {
            format!("this workload attestor {NOT_HERE}, unix is; leave it out, or set enabled = false")
        } else {
            match nearest(label, known.into_iter().chain(["unix"])) {
                Some(near) => format!("unknown workload attestor: did you mean {near}?"),
                None => "unknown workload attestor; known is unix".to_owned(),
            }
        };
        section.problems().add(place, &section.name(), None, what);
    }
    section.ignore();
}
