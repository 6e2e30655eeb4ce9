//! What is said of a SPIRE Server: keys of `agent`, and the plugins `NodeAttestor` and `KeyManager`.

use crate::{
    attest::is_enabled,
    hcl::{
        absent::{NOT_HERE, Off, refuse},
        problems::Problems,
        section::{Section, nearest},
        settings::KeyChanges,
        tree::Place,
    },
    issuer::server::settings::{
        DiskKeySettings, JoinSettings, K8sPsatSettings, KeyManagerSettings, NodeAttestorSettings,
        RebootstrapMode, SyncSettings, X509PopSettings,
    },
};

const NODE_ATTESTORS: [&str; 3] = ["join_token", "x509pop", "k8s_psat"];
const KEY_MANAGERS: [&str; 2] = ["disk", "memory"];

/// spire-agent's node attestors that this version does not have.
const ABSENT_ATTESTORS: [&str; 7] =
    ["aws_iid", "azure_imds", "azure_msi", "gcp_iit", "http_challenge", "sshpop", "tpm_devid"];

const EXTERNAL: &str = "an external plugin";

/// What the block of a plugin may hold in spire-agent beside `plugin_data`.
const OTHER_KEYS: [(&str, Off, &str); 3] = [
    ("plugin_cmd", Off::Text(""), EXTERNAL),
    ("plugin_args", Off::Empty, EXTERNAL),
    ("plugin_checksum", Off::Text(""), EXTERNAL),
];

/// What the configuration says of a server, whether or not one is to be joined.
#[derive(Debug, Default)]
pub(super) struct ServerBlock {
    pub(super) join: JoinSettings,
    pub(super) sync: SyncSettings,
    /// `None` where there is none of use, which [`ServerBlock::check`] or the reading reports.
    pub(super) node_attestor: Option<NodeAttestorSettings>,
    pub(super) key_manager: Option<KeyManagerSettings>,
    /// What was set that only means something with a server, by place and full name. Values are not kept, since some
    /// are secrets.
    pub(super) asked: Vec<(Place, String)>,
    /// Where the block `agent` begins.
    agent: Place,
    /// Keys of which a value was found wrong, and reported.
    wrong: Vec<&'static str>,
    /// How many plugins of the two types are in use; what is wrong with one was reported.
    counts: [usize; 2],
}

impl ServerBlock {
    /// Reads the keys of `agent` itself.
    pub(super) fn read_agent(s: &mut Section<'_>) -> Self {
        let join = JoinSettings::read(s);
        let mut block = Self { agent: s.place(), ..Self::default() };
        let mut changes = KeyChanges::default();
        JoinSettings::default().compare(&join, &mut changes);
        block.note(s, &changes);
        let wrong = |key: &&str| s.has(key) && s.set_at(key).is_none();
        block.wrong = ["server_address", "server_port", "trust_bundle_path", "trust_bundle_url"]
            .into_iter()
            .chain(["trust_bundle_spiffe_workload_api", "trust_bundle_unix_socket"])
            .filter(wrong)
            .collect();
        block.join = join;
        block
    }

    /// Reads the keys of `agent.experimental`.
    pub(super) fn read_experimental(&mut self, s: &mut Section<'_>) {
        self.sync = SyncSettings::read(s);
        let mut changes = KeyChanges::default();
        SyncSettings::default().compare(&self.sync, &mut changes);
        self.note(s, &changes);
    }

    fn note(&mut self, s: &Section<'_>, changes: &KeyChanges) {
        let keys = changes.restart.iter().map(|changed| changed.key).chain(changes.live.iter().copied());
        for key in keys {
            let bare = key.rsplit('.').next().unwrap_or(key);
            self.asked.extend(s.set_at(bare).map(|place| (place, key.to_owned())));
        }
    }

    /// Reads the blocks `NodeAttestor` and `KeyManager` of `plugins`.
    pub(super) fn read_plugins(&mut self, plugins: &mut Section<'_>) {
        for (plugin, nth) in self.in_use(plugins, "NodeAttestor", &NODE_ATTESTORS, 0) {
            let read = node_attestor(plugin);
            if nth == 0 {
                self.node_attestor = read;
            }
        }
        for (plugin, nth) in self.in_use(plugins, "KeyManager", &KEY_MANAGERS, 1) {
            plugin.problems().note_key("plugins.KeyManager", Some(plugin.place()));
            let read = key_manager(plugin);
            if nth == 0 {
                self.key_manager = read;
            }
        }
    }

    /// The plugins of a type that are not switched off, and that are here, each with its number. What is wrong with
    /// others is reported.
    fn in_use<'a>(
        &mut self,
        plugins: &mut Section<'a>,
        plugin_type: &'static str,
        known: &[&'static str],
        count: usize,
    ) -> Vec<(Section<'a>, usize)> {
        let mut used: Vec<(Section<'a>, usize)> = Vec::new();
        let mut number = 0_usize;
        for mut plugin in plugins.labelled(plugin_type) {
            if !is_enabled(&mut plugin) {
                continue;
            }
            self.asked.push((plugin.place(), plugin.name()));
            let label = plugin.label();
            let first = used.iter().find(|(first, _)| first.label() == label);
            if let Some((first, _)) = first {
                let first = plugin.problems().show(first.place());
                plugin.wrong_block(format_args!("declared more than once: first at {first}"));
            } else if known.contains(&label) {
                used.push((plugin, number));
                number += 1;
            } else {
                plugin.wrong_block(unknown(&plugin, plugin_type, known));
                number += 1;
            }
        }
        if let Some(counted) = self.counts.get_mut(count) {
            *counted = number;
        }
        used
    }

    /// Whether a server is named, rightly or not.
    pub(super) fn is_named(&self) -> bool {
        !self.join.address.is_empty() || self.wrong.contains(&"server_address")
    }

    /// Whether anything was said of a server.
    pub(super) fn is_meant(&self) -> bool {
        self.is_named() || !self.asked.is_empty()
    }

    /// Reports what is missing to join a server, and what contradicts itself.
    pub(super) fn check(&self, problems: &Problems, has_plugins: bool) {
        let wrong = |key: &str, message: String| {
            let key = format!("agent.{key}");
            let set = self.asked.iter().find(|(_, asked)| *asked == key);
            problems.add(set.map_or(self.agent, |(place, _)| *place), &key, None, message);
        };
        let join = &self.join;
        if !self.is_named() {
            wrong(
                "server_address",
                "must be configured: server_address = \"spire-server.example.org\"".to_owned(),
            );
        }
        if join.port == 0 && !self.wrong.contains(&"server_port") {
            wrong("server_port", "must be configured: server_port = 8081".to_owned());
        }
        if !join.join_token.secret().is_empty() && join.join_token_file.is_some() {
            let message = "only one of join_token or join_token_file can be specified, not both";
            wrong("join_token_file", message.to_owned());
        }
        self.check_trust(&wrong);
        if !has_plugins {
            problems.add(
                Place { line: 1, column: 1, ..self.agent },
                "plugins",
                None,
                "section must be configured",
            );
            return;
        }
        for (plugin_type, count) in ["NodeAttestor", "KeyManager"].into_iter().zip(self.counts) {
            if count != 1 {
                let key = format!("plugins.{plugin_type}");
                let set = self.asked.iter().rev().find(|(_, asked)| asked.starts_with(&key));
                let place = set.map_or(Place { line: 1, column: 1, ..self.agent }, |(place, _)| *place);
                let message = format!(
                    "plugin type {plugin_type:?} constraint not satisfied: expected exactly 1 but got {count}"
                );
                problems.add(place, &key, None, message);
            }
        }
    }

    /// That there is one source of trust, and that its parts fit.
    fn check_trust(&self, wrong: &impl Fn(&str, String)) {
        let join = &self.join;
        let sources = [
            ("insecure_bootstrap", join.insecure_bootstrap),
            ("trust_bundle_url", join.trust_bundle_url.is_some()),
            ("trust_bundle_path", join.trust_bundle_path.is_some()),
            ("trust_bundle_spiffe_workload_api", join.trust_bundle_workload_api.is_some()),
        ];
        let set: Vec<&str> = sources
            .iter()
            .filter(|(_, is_set)| *is_set)
            .map(|(key, _)| *key)
            .chain(self.wrong.iter().copied())
            .collect();
        let sources_of =
            |set: &[&str]| set.iter().filter(|key| sources.iter().any(|(source, _)| source == *key)).count();
        match set.as_slice() {
            ["insecure_bootstrap", "trust_bundle_url", "trust_bundle_path", ..] => wrong(
                "insecure_bootstrap",
                "only one of insecure_bootstrap, trust_bundle_url, or trust_bundle_path can be specified, not the \
                 three options"
                    .to_owned(),
            ),
            set if sources_of(set) == 0 => wrong(
                "trust_bundle_path",
                "trust_bundle_path, trust_bundle_url, or trust_bundle_spiffe_workload_api must be configured unless \
                 insecure_bootstrap is set"
                    .to_owned(),
            ),
            [first, second, ..] if sources_of(&[*first, *second]) == 2 => {
                wrong(second, format!("only one of {first} or {second} can be specified, not both"));
            }
            _ => {}
        }
        if join.trust_bundle_unix_socket.is_some() {
            if join.trust_bundle_workload_api.is_some() {
                let message =
                    "trust_bundle_unix_socket can not be used with trust_bundle_spiffe_workload_api";
                wrong("trust_bundle_unix_socket", message.to_owned());
            } else if join.trust_bundle_url.is_none() {
                let message = "if trust_bundle_unix_socket is specified, so must be trust_bundle_url";
                wrong("trust_bundle_unix_socket", message.to_owned());
            }
        }
        let over_socket = join.trust_bundle_unix_socket.is_some();
        if let Some(Err(message)) = join.trust_bundle_url.as_deref().map(|url| check_url(url, over_socket)) {
            wrong("trust_bundle_url", message);
        }
        let is_bound =
            join.token().is_some() || matches!(self.node_attestor, Some(NodeAttestorSettings::JoinToken));
        if is_bound && join.rebootstrap_mode == RebootstrapMode::Always {
            let message = "\"always\" needs a node that can attest again, and with a join token it cannot: set \"auto\" or \"never\", \
                           or attest by x509pop or k8s_psat";
            wrong("rebootstrap_mode", message.to_owned());
        }
        if join.insecure_bootstrap && join.rebootstrap_mode != RebootstrapMode::Never {
            let message = "insecure_bootstrap option can not be used with rebootstrapping";
            wrong("insecure_bootstrap", message.to_owned());
        }
    }
}

/// That trust can be fetched from there: over TLS, or from whoever listens at a Unix socket of this node.
fn check_url(text: &str, over_socket: bool) -> Result<(), String> {
    let url: http::Uri = text.parse().map_err(|err| format!("unable to parse trust bundle URL: {err}"))?;
    if url.authority().is_none_or(|authority| authority.host().is_empty()) {
        return Err("must name a host: https://host/path".to_owned());
    }
    match (over_socket, url.scheme_str()) {
        (false, Some("https")) => Ok(()),
        (false, _) => Err("trust bundle URL must start with https://".to_owned()),
        (true, Some("http")) => {
            let reserved =
                |key: &&str| url.query().unwrap_or_default().split('&').any(|part| part.starts_with(*key));
            match ["spiffe-", "spire-"].iter().find(|key| reserved(key)) {
                Some(key) => Err(format!("trust_bundle_url query params can not start with {key}")),
                None => Ok(()),
            }
        }
        (true, _) => {
            Err("trust bundle URL must start with http:// when used with trust bundle unix socket".to_owned())
        }
    }
}

/// Why a plugin cannot be used that is not among `known`.
fn unknown(plugin: &Section<'_>, plugin_type: &str, known: &[&'static str]) -> String {
    let label = plugin.label();
    let here = known.join(", ");
    if plugin.has("plugin_cmd") {
        return format!("an external plugin {NOT_HERE}, only {here}");
    }
    let absent: &[&str] = if plugin_type == "NodeAttestor" { &ABSENT_ATTESTORS } else { &[] };
    if absent.contains(&label) {
        return format!("this node attestor {NOT_HERE}, only {here}");
    }
    match nearest(label, absent.iter().chain(known).copied()) {
        Some(near) => format!("unknown {plugin_type}: did you mean {near}?"),
        None => format!("unknown {plugin_type}: known are {here}"),
    }
}

/// Reads the `plugin_data` of a plugin, which may be left out.
fn plugin_data<T: Default>(plugin: &mut Section<'_>, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
    plugin.block("plugin_data").map_or_else(T::default, |mut data| {
        let made = read(&mut data);
        data.finish();
        made
    })
}

fn node_attestor(mut plugin: Section<'_>) -> Option<NodeAttestorSettings> {
    let read = match plugin.label() {
        "x509pop" => x509pop(&mut plugin).map(NodeAttestorSettings::X509Pop),
        "k8s_psat" => k8s_psat(&mut plugin).map(NodeAttestorSettings::K8sPsat),
        _ => {
            plugin_data(&mut plugin, |_| ());
            Some(NodeAttestorSettings::JoinToken)
        }
    };
    refuse(&mut plugin, &OTHER_KEYS);
    plugin.finish();
    read
}

fn x509pop(plugin: &mut Section<'_>) -> Option<X509PopSettings> {
    let read = plugin_data(plugin, X509PopSettings::read);
    if read.workload_api.is_some() {
        return Some(read);
    }
    for (key, value) in [("private_key_path", &read.private_key), ("certificate_path", &read.certificate)] {
        if value.is_none() {
            plugin.wrong_block(format_args!(
                "plugin_data needs {key}, or spiffe_endpoint_socket instead of files"
            ));
        }
    }
    (read.private_key.is_some() && read.certificate.is_some()).then_some(read)
}

fn k8s_psat(plugin: &mut Section<'_>) -> Option<K8sPsatSettings> {
    let read = plugin_data(plugin, K8sPsatSettings::read);
    if read.cluster.is_empty() {
        plugin.wrong_block("missing required cluster block: plugin_data { cluster = \"..\" }");
        return None;
    }
    Some(read)
}

fn key_manager(mut plugin: Section<'_>) -> Option<KeyManagerSettings> {
    let read = if plugin.label() == "disk" {
        let disk = plugin_data(&mut plugin, DiskKeySettings::read);
        if disk.directory.is_none() {
            plugin.wrong_block("directory must be configured: plugin_data { directory = \"..\" }");
        }
        disk.directory.map(KeyManagerSettings::Disk)
    } else {
        plugin_data(&mut plugin, |_| ());
        Some(KeyManagerSettings::Memory)
    };
    refuse(&mut plugin, &OTHER_KEYS);
    plugin.finish();
    read
}
