//! The `WorkloadAttestor` blocks of `agent.conf`, and what entries may ask for.

use std::collections::HashMap;

use super::AttestSettings;
use crate::{
    hcl::{
        absent::{NOT_HERE, Off, refuse},
        section::{Section, nearest},
        tree::Place,
    },
    identity::Selector,
};

const EXTERNAL: &str = "an external plugin";

/// What the block of a plugin may hold in spire-agent beside `plugin_data`.
const OTHER_PLUGINS: [(&str, Off, &str); 3] = [
    ("plugin_cmd", Off::Text(""), EXTERNAL),
    ("plugin_args", Off::Empty, EXTERNAL),
    ("plugin_checksum", Off::Text(""), EXTERNAL),
];

/// spire-agent's attestors that this version does not have.
const ABSENT: [&str; 4] = ["docker", "slurm", "systemd", "windows"];

impl AttestSettings {
    /// Reads the `WorkloadAttestor` blocks of `plugins`.
    pub(crate) fn read(plugins: &mut Section<'_>) -> Self {
        let mut settings = Self::default();
        let mut declared: HashMap<&str, Place> = HashMap::new();
        let mut on: Vec<&str> = Vec::new();
        let mut off = None;
        for plugin in plugins.labelled("WorkloadAttestor") {
            let label = plugin.label();
            if !Self::NAMES.contains(&label) {
                absent(plugin);
            } else if let Some(first) = declared.get(label) {
                let first = plugin.problems().show(*first);
                plugin.wrong_block(format_args!("declared more than once: first at {first}"));
            } else {
                declared.insert(label, plugin.place());
                match settings.read_plugin(plugin) {
                    None => on.push(label),
                    Some(block) => off = Some(block),
                }
            }
        }
        // Where none is named, those attest that do by themselves.
        let by_default = Self::default().enabled().0;
        settings.switch(|name| match on.as_slice() {
            [] => by_default.contains(&name) && !declared.contains_key(name),
            named => named.contains(&name),
        });
        if let Some((place, key)) = off.filter(|_| settings.enabled().0.is_empty()) {
            let value = Some("false".to_owned());
            plugins.problems().add(place, &key, value, "without an attestor nobody gets an identity");
        }
        settings
    }

    /// Reads one block. Returns where it says that the attestor is off, and the key.
    fn read_plugin(&mut self, mut plugin: Section<'_>) -> Option<(Place, String)> {
        let label = plugin.label();
        if let Some(mut data) = plugin.block("plugin_data") {
            self.read_data(label, &mut data);
            data.finish();
        }
        refuse(&mut plugin, &OTHER_PLUGINS);
        if plugin.boolean("optional").is_some_and(|at| at.value) {
            self.set_optional(label);
        }
        let off = plugin.boolean("enabled").filter(|at| !at.value);
        let off = off.map(|at| (at.place, plugin.path("enabled")));
        plugin.finish();
        off
    }

    /// Whether any process could ever have this selector.
    ///
    /// # Errors
    /// Says what is wrong with it, and what is right.
    pub(crate) fn check(&self, selector: &Selector) -> Result<(), String> {
        let checked = self.check_value(selector.kind(), selector.value());
        checked.unwrap_or_else(|| {
            Err(format!("no attestor makes this selector: the attestors of this version are {}", here()))
        })
    }
}

/// Whether a plugin is used: `enabled` is not `false`.
pub(crate) fn is_enabled(plugin: &mut Section<'_>) -> bool {
    plugin.boolean("enabled").is_none_or(|at| at.value)
}

/// The attestors of this version, for a message.
fn here() -> String {
    AttestSettings::NAMES.join(" and ")
}

/// Refuses an attestor that this version does not have, unless it is off.
fn absent(mut plugin: Section<'_>) {
    let label = plugin.label();
    if is_enabled(&mut plugin) {
        let here = here();
        let what = if plugin.has("plugin_cmd") {
            format!("an external plugin {NOT_HERE}; leave it out")
        } else if ABSENT.contains(&label) {
            format!("this workload attestor {NOT_HERE}, only {here}: leave it out, or set enabled = false")
        } else {
            match nearest(label, ABSENT.iter().chain(AttestSettings::NAMES).copied()) {
                Some(near) => format!("unknown workload attestor: did you mean {near}?"),
                None => format!("unknown workload attestor; known are {here}"),
            }
        };
        plugin.wrong_block(what);
    }
}
