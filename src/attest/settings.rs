//! The `WorkloadAttestor` blocks of `agent.conf`, and what entries may ask for.

use std::collections::HashMap;

use super::AttestSettings;
use crate::{
    hcl::{
        absent::{NOT_HERE, Off, asked, refuse},
        section::{Section, nearest},
        tree::Place,
    },
    identity::Selector,
};

const EXTERNAL: &str = "an external plugin";

/// What the block of a plugin may hold in spire-agent beside `plugin_data`.
const OTHER_PLUGINS: [(&str, Off, &str); 4] = [
    ("plugin_data_file", Off::Text(""), "reading plugin_data from another file"),
    ("plugin_cmd", Off::Text(""), EXTERNAL),
    ("plugin_args", Off::Empty, EXTERNAL),
    ("plugin_checksum", Off::Text(""), EXTERNAL),
];

/// spire-agent's attestors that this version does not have.
const ABSENT: [&str; 5] = ["docker", "k8s", "slurm", "systemd", "windows"];

impl AttestSettings {
    /// Reads the `WorkloadAttestor` blocks of `plugins`.
    pub(crate) fn read(plugins: &mut Section<'_>) -> Self {
        let mut settings = Self::default();
        let mut declared: HashMap<&str, Place> = HashMap::new();
        for plugin in plugins.labelled("WorkloadAttestor") {
            let label = plugin.label();
            if !Self::NAMES.contains(&label) {
                absent(plugin);
            } else if let Some(first) = declared.get(label) {
                let first = plugin.problems().show(*first);
                plugin.wrong_block(format_args!("declared more than once: first at {first}"));
            } else {
                declared.insert(label, plugin.place());
                settings.read_plugin(plugin);
            }
        }
        settings
    }

    fn read_plugin(&mut self, mut plugin: Section<'_>) {
        if let Some(mut data) = plugin.block("plugin_data") {
            self.read_data(plugin.label(), &mut data);
            data.finish();
        }
        refuse(&mut plugin, &OTHER_PLUGINS);
        if let Some((place, value)) = asked(&mut plugin, "enabled", Off::True) {
            let message = format!("{}: without it nobody gets an identity", only());
            plugin.wrong(place, "enabled", value, message);
        }
        plugin.finish();
    }

    /// Whether any process could ever have this selector.
    ///
    /// # Errors
    /// Says what is wrong with it, and what is right.
    pub(crate) fn check(&self, selector: &Selector) -> Result<(), String> {
        let checked = self.check_value(selector.kind(), selector.value());
        checked.unwrap_or_else(|| Err(format!("nobody attests this: {}", only())))
    }
}

/// Whether a plugin is used: `enabled` is not `false`.
pub(crate) fn is_enabled(plugin: &mut Section<'_>) -> bool {
    plugin.boolean("enabled").is_none_or(|at| at.value)
}

fn only() -> String {
    format!("{} is the only workload attestor in this version", AttestSettings::NAMES.join(", "))
}

/// Refuses an attestor that this version does not have, unless it is off.
fn absent(mut plugin: Section<'_>) {
    let label = plugin.label();
    if is_enabled(&mut plugin) {
        let here = AttestSettings::NAMES.join(", ");
        let what = if plugin.has("plugin_cmd") {
            format!("an external plugin {NOT_HERE}; leave it out")
        } else if ABSENT.contains(&label) {
            format!("this workload attestor {NOT_HERE}, {here} is; leave it out, or set enabled = false")
        } else {
            match nearest(label, ABSENT.iter().chain(AttestSettings::NAMES).copied()) {
                Some(near) => format!("unknown workload attestor: did you mean {near}?"),
                None => format!("unknown workload attestor; known is {here}"),
            }
        };
        plugin.wrong_block(what);
    }
}
