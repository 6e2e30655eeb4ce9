//! The block `issuer`: who signs, and for how long.

use std::time::Duration;

use super::{agent::AgentSettings, input::Input, server::ServerBlock};
use crate::{
    hcl::{
        section::{At, Section},
        settings::{KeyChanges, Shown},
        show_duration,
        tree::quoted,
    },
    identity::{TrustDomain, name_constraints::DnsConstraints},
    issuer::{
        IssuerChoice,
        embedded::{EmbeddedSettings, IssuerSettings, dns_constraints},
        server::{
            ServerSettings,
            settings::{JoinSettings, KeyManagerSettings, NodeAttestorSettings, SyncSettings},
        },
    },
    store::CacheSettings,
};

/// Who signs: one of the two, and what is said of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Signer {
    /// `issuer "embedded"`.
    Embedded(IssuerSettings),
    /// `agent.server_address`, and what goes with it.
    Server(Box<JoinedServer>),
}

/// What the configuration says of the SPIRE Server that is joined.
#[derive(Clone, Debug, PartialEq)]
pub struct JoinedServer {
    pub join: JoinSettings,
    pub sync: SyncSettings,
    pub node_attestor: NodeAttestorSettings,
    pub key_manager: KeyManagerSettings,
}

impl Signer {
    /// By what this node is known to the SPIRE Server; `None` where there is none. A token comes before whatever is listed.
    pub fn node_attestor(&self) -> Option<&'static str> {
        match self {
            Self::Embedded(_) => None,
            Self::Server(joined) if joined.join.token().is_some() => {
                Some(NodeAttestorSettings::JoinToken.name())
            }
            Self::Server(joined) => Some(joined.node_attestor.name()),
        }
    }

    /// What the issuer is told, with what it needs of other blocks.
    pub(super) fn choice(
        &self,
        trust_domain: &TrustDomain,
        agent: &AgentSettings,
        caches: &CacheSettings,
    ) -> IssuerChoice {
        let (trust_domain, data_dir) = (trust_domain.clone(), agent.data_dir.clone());
        let svid_key_type = agent.svid_key_type;
        match self {
            Self::Embedded(issuer) => IssuerChoice::Embedded(EmbeddedSettings {
                trust_domain,
                data_dir,
                svid_key_type,
                issuer: issuer.clone(),
            }),
            Self::Server(joined) => {
                let JoinedServer { join, sync, node_attestor, key_manager } = (**joined).clone();
                IssuerChoice::Server(Box::new(ServerSettings {
                    trust_domain,
                    data_dir,
                    svid_key_type,
                    availability_target: caches.availability_target,
                    prefetch: caches.x509_svids.count(),
                    join,
                    sync,
                    node_attestor,
                    key_manager,
                }))
            }
        }
    }

    /// What a supplied CA says of the DNS names of entries. That its file cannot be read is said where it is needed.
    pub(super) fn dns_constraints(&self, input: &Input<'_>) -> DnsConstraints {
        let Self::Embedded(IssuerSettings { ca_cert_path: Some(path), .. }) = self else {
            return DnsConstraints::default();
        };
        (input.read_file)(path).map(|pem| dns_constraints(&pem)).unwrap_or_default()
    }

    /// Adds what is another in `next`.
    pub(super) fn compare(&self, next: &Self, changes: &mut KeyChanges) {
        match (self, next) {
            (Self::Embedded(old), Self::Embedded(new)) => old.compare(new, changes),
            (Self::Server(old), Self::Server(new)) => {
                let JoinedServer { join, sync, node_attestor, key_manager } = &**old;
                join.compare(&new.join, changes);
                sync.compare(&new.sync, changes);
                node_attestor.compare(&new.node_attestor, changes);
                key_manager.compare(&new.key_manager, changes);
            }
            _ => changes.needs_restart("issuer", self, next),
        }
    }
}

impl Shown for Signer {
    fn shown(&self) -> String {
        match self {
            Self::Embedded(_) => "\"embedded\"".to_owned(),
            Self::Server(joined) => format!("the SPIRE Server at {}", joined.join.address),
        }
    }
}

/// The lifetime of a CA, which no SVID of it can outlive.
#[derive(Clone, Debug)]
pub(super) struct CaTtl {
    ttl: Duration,
    /// Where it is set, for messages.
    whence: String,
}

impl CaTtl {
    /// Refuses a lifetime that is longer.
    pub(super) fn bounds(&self, section: &Section<'_>, key: &str, ttl: At<Duration>) {
        if ttl.value > self.ttl {
            let Self { ttl: most, whence } = self;
            let message =
                format!("must be at most ca_ttl, which is {} ({whence})", quoted(&show_duration(*most)));
            section.wrong(ttl.place, key, Some(quoted(&show_duration(ttl.value))), message);
        }
    }
}

/// Reads who signs, and refuses what contradicts it. `None` where nobody does, which was reported; the lifetime of a CA
/// is the default one where the CA is not here.
pub(super) fn read(
    root: &mut Section<'_>,
    server: ServerBlock,
    has_plugins: bool,
) -> (Option<Signer>, CaTtl) {
    let mut embedded: Option<Section<'_>> = None;
    let mut other = false;
    for section in root.labelled("issuer") {
        if ["spire", "server", "spire-server", "spire_server"].contains(&section.label()) {
            other = true;
            section.wrong_block(
                "a SPIRE Server is joined without this block: agent { server_address = \"..\" server_port = 8081 }",
            );
            continue;
        }
        if section.label() != "embedded" {
            // Read as what it must be, so that its other mistakes are told too.
            section.wrong_block("unknown issuer: must be \"embedded\"");
        }
        if let Some(first) = &mut embedded {
            first.merge(section);
        } else {
            embedded = Some(section);
        }
    }
    let elsewhere = || CaTtl { ttl: IssuerSettings::default().ca_ttl, whence: "by default".to_owned() };
    if let Some(embedded) = embedded {
        let place = root.problems().show(embedded.place());
        for (at, key) in &server.asked {
            let message = format!(
                "is for a SPIRE Server, and contradicts issuer \"embedded\" at {place}: take one of them out"
            );
            root.problems().add(*at, key, None, message);
        }
        let (settings, ca_ttl) = read_embedded(embedded);
        return (Some(Signer::Embedded(settings)), ca_ttl);
    }
    if !server.is_meant() {
        if !other {
            root.missing(
                "issuer",
                "section must be configured, so that the agent knows who signs: issuer \"embedded\" { } for a CA on this node, or \
                 a SPIRE Server: agent { server_address = \"..\" server_port = 8081 }",
            );
        }
        return (None, elsewhere());
    }
    server.check(root.problems(), has_plugins);
    let joined = |node_attestor, key_manager| {
        Signer::Server(Box::new(JoinedServer {
            join: server.join,
            sync: server.sync,
            node_attestor,
            key_manager,
        }))
    };
    let signer = server.node_attestor.zip(server.key_manager).map(|(attestor, keys)| joined(attestor, keys));
    (signer, elsewhere())
}

fn read_embedded(mut s: Section<'_>) -> (IssuerSettings, CaTtl) {
    let settings = IssuerSettings::read(&mut s);
    let ca_ttl = CaTtl { ttl: settings.ca_ttl, whence: s.whence("ca_ttl") };
    for (key, value) in [
        ("default_x509_svid_ttl", settings.default_x509_svid_ttl),
        ("default_jwt_svid_ttl", settings.default_jwt_svid_ttl),
    ] {
        if let Some(place) = s.set_at(key) {
            ca_ttl.bounds(&s, key, At { value, place });
        }
    }
    let (cert, key) = (("ca_cert_path", &settings.ca_cert_path), ("ca_key_path", &settings.ca_key_path));
    for ((set, path), (other, _)) in [(cert, key), (key, cert)] {
        if let (Some(path), Some(place)) = (path, s.set_at(set))
            && !s.has(other)
        {
            let message = format!("{other} must be set too: a CA is a certificate and its key");
            s.wrong(place, set, Some(quoted(&path.to_string_lossy())), message);
        }
    }
    s.finish();
    (settings, ca_ttl)
}
