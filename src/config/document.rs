//! A whole configuration: its blocks, in all files, and what they say about each other.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    agent::{AgentBlock, AgentSettings},
    endpoints,
    entries::{Entries, EntryRules},
    federation::Federation,
    file,
    input::{ExpandEnv, Given, Input},
    issuer::{self, Signer},
    keys::KEYS,
    plugin_files, ratelimit,
    server::ServerBlock,
    sources::Sources,
    users::NodeUsers,
};
use crate::{
    attest::{self, AttestSettings},
    hcl::{ConfigError, ConfigErrors, KeyPlaces, absent::NOT_HERE, problems::Problems, section::Section},
    identity::{Bundle, Entry, EntryIndex, TrustDomain},
    issuer::IssuerInput,
    limits::LimitSettings,
    os::trusted::Trust,
    peer::{KubernetesSettings, ListenerSettings, cgroup::KubernetesMode},
    store::{CacheSettings, Policy},
    telemetry::{AuditSettings, HealthSettings, HostPort, LogSettings, SpireNameSettings},
};

/// Everything the agent is told, checked. Each key is documented in `conf/agent.conf`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `agent.trust_domain`. Required. Restart to change.
    pub trust_domain: TrustDomain,
    /// `agent`: sockets, directories, keys.
    pub agent: AgentSettings,
    /// `agent.log_*`.
    pub log: LogSettings,
    /// `audit`: where it is written who was given what.
    pub audit: AuditSettings,
    /// `agent`: what callers are given.
    pub policy: Policy,
    /// `agent`: what is kept.
    pub caches: CacheSettings,
    /// `agent.listener`.
    pub listener: ListenerSettings,
    /// `agent.kubernetes`.
    pub kubernetes: KubernetesSettings,
    /// `issuer "embedded"`, or `agent.server_address` and what goes with it.
    pub issuer: Signer,
    /// `entry`, of `agent.conf` first, then of the drop-in files in the order of their names. Unique by
    /// [`Entry::id`]. Reloads.
    pub entries: Vec<Arc<Entry>>,
    /// `federation`. Never holds the own trust domain. Reloads.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// What federated bundles lack, though their blocks name them, in words.
    pub federation_gaps: Vec<String>,
    /// Files among the drop-in files that are not read, since their names end otherwise. At most 16.
    pub passed_over: Vec<PathBuf>,
    /// Where the drop-in files were looked for.
    pub drop_ins: DropInDir,
    /// `plugins.WorkloadAttestor`. Reloads.
    pub attest: AttestSettings,
    /// `telemetry.Prometheus`: host and port. Default: none. Restart to change.
    pub prometheus: Option<HostPort>,
    /// `telemetry.Prometheus.socket_path`, absolute. Default: none. Restart to change.
    pub metrics_socket: Option<PathBuf>,
    /// `telemetry`: spire-agent's names of series.
    pub spire_names: SpireNameSettings,
    /// `health_checks`.
    pub health: HealthSettings,
    /// `ratelimit`, and whose subordinate UIDs are whose. Reloads, and keeps what was spent.
    pub ratelimit: LimitSettings,
    /// The files that it was read from; none where the text was at hand.
    pub sources: Sources,
    /// Where in these files the keys are set that are known by name.
    pub set_at: KeyPlaces,
}

/// A directory of drop-in files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DropInDir {
    path: PathBuf,
    /// How many files were read; `None` where there is no such directory.
    files: Option<usize>,
}

impl DropInDir {
    /// What is wrong with a reload of `next`, where this was in force: a directory whose files were read is gone. That may be
    /// a volume that is not mounted, and nobody says that its entries are not wanted any more.
    ///
    /// # Errors
    /// In words, with what to do.
    pub fn check_still_there(&self, next: &Self) -> Result<(), String> {
        match (self.files, next.files) {
            (Some(files @ 1..), None) if self.path == next.path => Err(format!(
                "{} is gone, and held {files} drop-in {} at the last load: put it back, or make it again, empty, to do without \
                 what they said",
                self.path.display(),
                if files == 1 { "file" } else { "files" }
            )),
            _ => Ok(()),
        }
    }
}

/// A configuration with mistakes.
#[derive(Debug)]
pub struct Flawed {
    pub errors: ConfigErrors,
    /// What it says otherwise, with a default for each value that is wrong; `None` where too little can be read.
    pub rest: Option<Box<Config>>,
}

impl Config {
    /// Reads `path`, the drop-in files and the bundle files that it names, and checks all of it.
    ///
    /// Relative paths, here and in the file, start at the working directory, as in spire-agent.
    ///
    /// # Errors
    /// Every mistake that was found, in all files.
    pub fn load(path: &Path, expand_env: ExpandEnv<'_>) -> Result<Self, ConfigErrors> {
        Self::load_as(Trust::own(), path, expand_env, &[]).map_err(|flawed| flawed.errors)
    }

    /// The same, with files of these owners, and with these keys in place of those in the file.
    ///
    /// # Errors
    /// Every mistake that was found, in all files.
    pub fn load_as(
        trust: Trust,
        path: &Path,
        expand_env: ExpandEnv<'_>,
        given: &[Given],
    ) -> Result<Self, Flawed> {
        // Looked at before they are read: what changes meanwhile is seen.
        let sources = RefCell::new(Sources::default());
        let see = |path: &Path| sources.borrow_mut().add(trust, path);
        // No working directory (it was removed): only absolute paths are of use then.
        let base = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        see(&base.join(path));
        let text = file::read_main(trust, path).map_err(|err| {
            let (line, message) = err.within(path);
            let (file, column) = (path.to_owned(), line.min(1));
            let error = ConfigError { file, line, column, key: String::new(), value: None, message };
            Flawed { errors: ConfigErrors::new(vec![error], 0), rest: None }
        })?;
        let users = NodeUsers::default();
        let passed_over = RefCell::new(Vec::new());
        let drop_ins = RefCell::new(DropInDir::default());
        let mut config = Self::check(&Input {
            path,
            text: &text,
            base: &base,
            expand_env,
            given,
            drop_ins: &|dir| {
                see(dir);
                *passed_over.borrow_mut() = file::passed_over(trust, dir);
                let read = file::read_drop_ins(trust, dir)?;
                *drop_ins.borrow_mut() =
                    DropInDir { path: dir.to_owned(), files: read.as_ref().map(Vec::len) };
                Ok(read)
            },
            user_id: &|name| users.uid(name),
            read_file: &|path| {
                see(path);
                file::read_file(trust, path)
            },
        })?;
        config.sources = sources.into_inner();
        config.passed_over = passed_over.into_inner();
        config.drop_ins = drop_ins.into_inner();
        config.ratelimit.families = users.families(Path::new("/etc/subuid"));
        Ok(config)
    }

    /// Checks a configuration whose text is at hand. Touches nothing but what `input` reaches.
    ///
    /// # Errors
    /// Every mistake that was found, in all files.
    pub fn parse(input: &Input<'_>) -> Result<Self, ConfigErrors> {
        Self::check(input).map_err(|flawed| flawed.errors)
    }

    fn check(input: &Input<'_>) -> Result<Self, Flawed> {
        let problems = Problems::new(input.base).knowing(KEYS);
        let mut config = read(input, &problems);
        if let Some(config) = &mut config {
            config.set_at = problems.key_places();
        }
        match (config, problems.into_errors()) {
            (Some(config), None) => Ok(config),
            (rest, errors) => {
                let errors = errors.unwrap_or_else(|| ConfigErrors::new(Vec::new(), 0));
                let errors = errors.with_hints(|value| input.unexpanded(value));
                Err(Flawed { errors, rest: rest.map(Box::new) })
            }
        }
    }

    /// Which files beside it are not read, and why not.
    pub fn passed_over_warnings(&self) -> impl Iterator<Item = String> {
        self.passed_over
            .iter()
            .map(|path| format!("{} is not read: its name must end in .conf or .json", path.display()))
    }

    /// For how long an SVID that is made by this may be valid at most; a SPIRE Server decides that itself.
    pub fn longest_svid_ttl(&self) -> Option<Duration> {
        let Signer::Embedded(issuer) = &self.issuer else { return None };
        let of_entries = self.entries.iter().flat_map(|entry| [entry.x509_svid_ttl, entry.jwt_svid_ttl]);
        let by_default = [issuer.default_x509_svid_ttl, issuer.default_jwt_svid_ttl];
        of_entries.flatten().chain(by_default).max()
    }

    /// The longest that a setting of these could be.
    pub fn longest_possible_svid_ttl(&self) -> Option<Duration> {
        let Signer::Embedded(issuer) = &self.issuer else { return None };
        Some(issuer.ca_ttl)
    }

    /// What the issuer is told.
    pub fn issuer_input(&self) -> IssuerInput {
        IssuerInput {
            choice: self.issuer.choice(&self.trust_domain, &self.agent, &self.caches),
            index: Arc::new(EntryIndex::new(self.entries.clone())),
            federated: self.federated.clone(),
        }
    }
}

/// Reads and checks everything. `None` when what cannot be left out is missing, which was reported.
fn read(input: &Input<'_>, problems: &Problems) -> Option<Config> {
    let file = problems.add_file(input.path);
    let mut main = input.tree(problems, file, input.text)?;
    input.lay_over(problems, &mut main);
    plugin_files::lay_in(input, problems, &mut main);
    let mut root = Section::root(problems, file, &main);
    problems.note_key("health_checks", root.set_at("health_checks"));
    let mut agent = AgentBlock::read(&mut root, input.kept().as_ref());
    let mut server = std::mem::take(&mut agent.server);
    let own = agent.trust_domain.as_ref();
    let has_plugins = root.has("plugins");
    let attest = plugins(&mut root, &mut server);
    let endpoints = endpoints::read(&mut root, &agent.settings);
    let joins = !root.has("issuer") && server.is_meant();
    let audit = endpoints::audit(&mut root, &agent.settings, &agent.log);
    let (issuer, ca_ttl) = issuer::read(&mut root, server, has_plugins);
    let mut limits = root.block("ratelimit");
    let federation = Federation::read(&mut root, input, own);
    let dns_constraints = issuer.as_ref().map(|issuer| issuer.dns_constraints(input)).unwrap_or_default();
    let rules = EntryRules {
        trust_domain: own,
        federated: &federation.declared,
        ca_ttl,
        attest: &attest,
        dns_constraints,
    };
    let mut entries = Entries::new(rules, problems);
    entries.read(own_entries(&mut root, joins));
    if joins {
        for section in root.labelled("federation") {
            section.wrong_block(
                "bundles of other trust domains come from the SPIRE Server: create them there, with spire-server bundle set \
                 or federation create",
            );
        }
    }
    let no_pods = agent.kubernetes.mode == KubernetesMode::Off;
    if no_pods && attest.k8s.enabled {
        let right =
            "cannot be off with WorkloadAttestor \"k8s\", which would find nobody in a pod: leave it out";
        root.missing("agent.kubernetes.mode", right);
    }
    root.finish();

    let drop_ins = input.drop_in_trees(problems, agent.entries_dir.as_ref());
    for (file, tree) in &drop_ins {
        let mut root = Section::root(problems, *file, tree);
        entries.read(own_entries(&mut root, joins));
        match (&mut limits, root.block("ratelimit")) {
            (Some(limits), Some(more)) => limits.merge(more),
            (None, more) => limits = more,
            (Some(_), None) => {}
        }
        root.finish();
    }
    let entries = entries.finish();
    let context = ratelimit::Context {
        problems,
        trust_domain: own,
        user_id: input.user_id,
        no_pods,
        caches: &agent.caches,
    };
    let ratelimit = context.settings(limits, agent.spire_limits);
    // Another stands in for one that is wrong, so that the places are looked at all the same: with a mistake nobody goes by it.
    let stand_in = || TrustDomain::parse("example.org").ok().filter(|_| problems.has_any());
    Some(Config {
        trust_domain: agent.trust_domain.or_else(stand_in)?,
        agent: agent.settings,
        log: agent.log,
        audit,
        policy: agent.policy,
        caches: agent.caches,
        listener: agent.listener,
        kubernetes: agent.kubernetes,
        issuer: issuer?,
        entries,
        federated: federation.bundles,
        federation_gaps: federation.gaps,
        passed_over: Vec::new(),
        drop_ins: DropInDir::default(),
        attest,
        prometheus: endpoints.prometheus,
        metrics_socket: endpoints.metrics_socket,
        spire_names: endpoints.spire_names,
        health: endpoints.health,
        ratelimit,
        sources: Sources::default(),
        set_at: KeyPlaces::default(),
    })
}

/// The blocks `entry`; none, and an error for each, where they are a server's.
fn own_entries<'a>(root: &mut Section<'a>, joins: bool) -> Vec<Section<'a>> {
    let blocks = root.labelled("entry");
    if !joins {
        return blocks;
    }
    for block in blocks {
        block.wrong_block(
            "entries come from the SPIRE Server: create it there, with spire-server entry create",
        );
    }
    Vec::new()
}

/// Reads the block `plugins`, as far as it is there: the workload attestors, and what a server needs.
fn plugins(root: &mut Section<'_>, server: &mut ServerBlock) -> AttestSettings {
    let Some(mut plugins) = root.block("plugins") else { return AttestSettings::default() };
    let attest = AttestSettings::read(&mut plugins);
    server.read_plugins(&mut plugins);
    for mut store in plugins.labelled("SVIDStore") {
        if attest::is_enabled(&mut store) {
            store.wrong_block(format_args!("storing SVIDs {NOT_HERE}; leave it out"));
        }
    }
    plugins.finish();
    attest
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;
    use crate::{
        config::{FileError, diff},
        hcl::show_duration,
    };

    const EMBEDDED: &str = include_str!("../../conf/agent.conf");
    const JOINED: &str = include_str!("../../conf/agent-with-server.conf");
    const REFERENCES: [&str; 2] = [EMBEDDED, JOINED];
    const BUNDLE: &str = r#"{"keys": [{"use": "jwt-svid", "kid": "a", "kty": "EC", "crv": "P-256",
        "x": "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY", "y": "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"}]}"#;

    const NODE_BY_CERTIFICATE: &str = "plugins { NodeAttestor \"x509pop\" { plugin_data { private_key_path = \"k\" certificate_path = \"c\" } } }";
    const NODE_BY_KUBERNETES: &str =
        "plugins { NodeAttestor \"k8s_psat\" { plugin_data { cluster = \"c\" } } }";
    const PLUGINS: &str =
        "plugins { KeyManager \"memory\" { } } agent { trust_domain = \"a\" server_address = \"s\"
        server_port = 1 insecure_bootstrap = true }";

    fn problems() -> Problems {
        Problems::new(Path::new("/"))
    }

    fn parse(text: &str, problems: &Problems) -> Config {
        let input = Input {
            path: Path::new("agent.conf"),
            text,
            base: Path::new("/"),
            expand_env: ExpandEnv::No,
            given: &[],
            drop_ins: &|_| Ok(Some(Vec::new())),
            user_id: &|name| Ok((name == "build").then_some(1000)),
            read_file: &|path| match path.to_str() {
                Some("/etc/durward/other.example.json") => Ok(BUNDLE.into()),
                _ => Err(FileError::Missing(path.to_owned())),
            },
        };
        let config = read(&input, problems);
        let result = std::mem::take(&mut *problems.wrongs()).into_iter().map(|(_, error)| error.message);
        assert_eq!(result.collect::<Vec<_>>(), [""; 0], "{text}");
        config.unwrap()
    }

    /// The least that says what a reference says, and its lines that are no comments.
    fn defaults(reference: &str) -> Config {
        let stated = |line: &&str| !line.trim_start().starts_with('#');
        let joined: Vec<&str> = reference.lines().filter(stated).collect();
        let text = match reference {
            JOINED => joined.join("\n"),
            _ => "agent { trust_domain = \"example.org\" } issuer \"embedded\" { }".to_owned(),
        };
        parse(&text, &problems())
    }

    /// Runs of lines for which `take` gives a text, each with the comment above it, as (comment, lines to change).
    fn runs(reference: &str, take: fn(&str) -> Option<String>) -> Vec<(String, BTreeMap<usize, String>)> {
        let mut runs: Vec<(String, BTreeMap<usize, String>)> = Vec::new();
        let (mut comment, mut open) = (String::new(), false);
        for (at, line) in reference.lines().enumerate() {
            match take(line) {
                Some(text) if open => drop(runs.last_mut().unwrap().1.insert(at, text)),
                Some(text) => {
                    runs.push((comment.clone(), BTreeMap::from([(at, text)])));
                    open = true;
                }
                None => {
                    open = false;
                    if line.trim().is_empty() {
                        comment.clear();
                    } else {
                        comment.push_str(line);
                    }
                }
            }
        }
        runs
    }

    /// The reference with these lines. What only one of may be there gives way to an example of it.
    fn changed(reference: &str, lines: &BTreeMap<usize, String>) -> String {
        let gives_way = |line: &str| {
            let exclude = |word: &str, by: &str| {
                line.trim_start().starts_with(word)
                    && lines.values().any(|line| line.trim_start().starts_with(by))
            };
            exclude("NodeAttestor", "NodeAttestor")
                || exclude("trust_bundle_path", "trust_bundle_url")
                || exclude("trust_bundle_path", "trust_bundle_spiffe")
        };
        let line = |(at, line): (usize, &str)| match lines.get(&at) {
            Some(instead) => instead.clone() + "\n",
            None if gives_way(line) => "\n".to_owned(),
            None => line.to_owned() + "\n",
        };
        reference.lines().enumerate().map(line).collect()
    }

    #[test]
    fn the_references_are_the_defaults() {
        for reference in REFERENCES {
            assert_eq!(parse(reference, &problems()), defaults(reference));
            let shown = runs(reference, |line| {
                let setting = line.trim_start().strip_prefix("# ")?;
                let (key, _) = setting.split_once(" = ")?;
                key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_').then(|| setting.to_owned())
            });
            assert!(shown.len() > 7, "{shown:?}");
            for (_, lines) in &shown {
                for (at, setting) in lines {
                    let alone = BTreeMap::from([(*at, setting.clone())]);
                    let got = parse(&changed(reference, &alone), &problems());
                    assert_eq!(got, defaults(reference), "{setting}");
                }
            }
        }
    }

    #[test]
    fn the_examples_are_no_defaults_and_reload_as_they_say() {
        for reference in REFERENCES {
            let examples = runs(reference, |line| Some(line.trim_start().strip_prefix("#+ ")?.to_owned()));
            assert!(examples.len() >= 5, "{examples:?}");
            // Of the ways to say one thing, each by itself.
            let apart = |lines: &BTreeMap<usize, String>| -> Vec<BTreeMap<usize, String>> {
                let ways = ["join_token", "trust_bundle_url"];
                if lines.len() > 1 && lines.values().all(|line| ways.iter().any(|way| line.starts_with(way)))
                {
                    lines.iter().map(|(at, line)| BTreeMap::from([(*at, line.clone())])).collect()
                } else {
                    vec![lines.clone()]
                }
            };
            for (comment, lines) in examples
                .iter()
                .flat_map(|(comment, lines)| apart(lines).into_iter().map(move |lines| (comment, lines)))
            {
                let changes = diff(&defaults(reference), &parse(&changed(reference, &lines), &problems()));
                assert!(!changes.is_empty(), "{lines:?}");
                let reloads = comment.contains("Reloads");
                assert!(reloads != comment.contains("Restart to change."), "{comment}");
                assert_eq!(changes.restart.is_empty(), reloads, "{comment}");
            }
        }
    }

    /// The comment above each key, by its full name. A line counts whether or not it is commented out.
    fn comments() -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut blocks: Vec<&str> = Vec::new();
        let mut comment = String::new();
        for line in REFERENCES.iter().flat_map(|text| text.lines()).map(str::trim) {
            let (example, prose) = (line.strip_prefix("#+ "), line.strip_prefix("# "));
            let setting = example.or(prose).unwrap_or(line).trim();
            if let Some((block, _)) = setting.split_once(" {")
                && prose.is_none()
            {
                found.insert([&blocks.join("."), block].join("."), comment.clone());
                let opens = !setting.ends_with('}');
                blocks.extend(opens.then_some(block));
            } else if let Some((_, _)) = setting.split_once(" = ") {
                for key in setting.split(" = ").filter_map(|text| text.rsplit(' ').next()) {
                    found.insert([&blocks.join("."), key].join("."), comment.clone());
                }
            } else if setting.trim() == "}" {
                blocks.pop();
            } else if line.is_empty() {
                comment.clear();
            }
            comment.push_str(prose.unwrap_or_default());
        }
        found
    }

    #[test]
    fn each_declared_key_is_in_the_reference_and_changes_as_it_says() {
        let problems = problems();
        let x509pop = NODE_BY_CERTIFICATE.to_owned() + PLUGINS;
        let k8s_psat = NODE_BY_KUBERNETES.to_owned() + PLUGINS;
        for text in [EMBEDDED, JOINED, &x509pop, &k8s_psat] {
            parse(text, &problems);
        }
        let asked = problems.asked.borrow();
        assert!(asked.declared.len() > 25, "{:?}", asked.declared);
        let comments = comments();
        for (key, change) in &asked.declared {
            let comment = comments.get(*key).unwrap_or_else(|| panic!("{key} is not in the reference"));
            let said = (comment.contains("Reloads"), comment.contains("Restart to change."));
            assert_eq!(said, (*change == "reloads", *change == "needs_restart"), "{key}: {comment}");
            let free = [
                "0".to_owned(),
                i64::MIN.to_string(),
                i64::MAX.to_string(),
                format!("\"{}\"", show_duration(Duration::MAX)),
            ];
            for bound in asked.bounds.get(*key).into_iter().flatten().filter(|bound| !free.contains(bound)) {
                assert!(comment.contains(bound.as_str()), "{key}, {bound}: {comment}");
            }
        }
    }

    #[test]
    fn every_key_is_in_the_reference() {
        let problems = problems();
        let text = format!(
            "{EMBEDDED} agent {{ sds {{ }} experimental {{ }} }} telemetry {{ Prometheus {{ port = 1 }} }}
            plugins {{ SVIDStore \"x\" {{ enabled = false }} }}
            entry \"spiffe://example.org/a\" {{ selectors = [\"unix:uid:1\"] }}
            ratelimit {{ caller {{ override \"uid:7\" {{ share = true rate = 1 burst = 9 costs {{ answer = 1 }}
                method \"FetchJWTSVID\" {{ schedule \"s\" {{ start {{ hour = 1 }} stop {{ hour = 2 }} block = true }} }} }} }}
                gate {{ override \"uid:7\" {{ connections = 1 }} }}
                node {{ method \"FetchJWTSVID\" {{ unlimited = true }} }} }}
            federation \"o\" {{ bundle_path = \"/etc/durward/other.example.json\" bundle_format = \"spiffe\" }}"
        );
        parse(&text, &problems);
        let keys = &problems.asked.borrow().keys;
        assert!(keys.contains("agent.trust_domain") && keys.contains("entry.selectors"), "{keys:?}");
        let words: BTreeSet<&str> = REFERENCES
            .iter()
            .flat_map(|text| text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
            .collect();
        let missing: Vec<&String> =
            keys.iter().filter(|key| !words.contains(key.rsplit('.').next().unwrap_or_default())).collect();
        assert_eq!(missing, [""; 0]);
    }
}
