//! The block `issuer`: who signs, and for how long.

use std::time::Duration;

use super::absent::ServerKeys;
use crate::{
    hcl::{
        absent::NOT_HERE,
        section::{At, Section},
        show_duration,
        tree::quoted,
    },
    issuer::embedded::IssuerSettings,
};

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

/// Reads the block, and refuses what contradicts it.
pub(super) fn read(root: &mut Section<'_>, server: &ServerKeys) -> (IssuerSettings, CaTtl) {
    let mut embedded: Option<Section<'_>> = None;
    let mut other = false;
    for section in root.labelled("issuer") {
        if section.label() != "embedded" {
            other = true;
            let message = match section.label() {
                "spire" | "server" | "spire-server" | "spire_server" => {
                    format!("the SPIRE Server issuer {NOT_HERE}: issuer \"embedded\" {{ }} is")
                }
                _ => "unknown issuer: must be \"embedded\"".to_owned(),
            };
            section.wrong_block(message);
        } else if let Some(first) = &mut embedded {
            first.merge(section);
        } else {
            embedded = Some(section);
        }
    }
    for (place, key) in &server.0 {
        let message = embedded.as_ref().map_or_else(
            || {
                format!(
                    "the SPIRE Server issuer {NOT_HERE}: take this out and write issuer \"embedded\" {{ }}"
                )
            },
            |embedded| {
                let place = root.problems().show(embedded.place());
                format!(
                    "is for a SPIRE Server, and contradicts issuer \"embedded\" at {place}: take one of them out"
                )
            },
        );
        root.problems().add(*place, key, None, message);
    }
    if embedded.is_none() && server.0.is_empty() && !other {
        root.missing("issuer", "who signs must be said: issuer \"embedded\" { }");
    }
    embedded.map_or_else(
        || {
            let settings = IssuerSettings::default();
            let ca_ttl = CaTtl { ttl: settings.ca_ttl.get(), whence: "by default".to_owned() };
            (settings, ca_ttl)
        },
        read_embedded,
    )
}

fn read_embedded(mut s: Section<'_>) -> (IssuerSettings, CaTtl) {
    let settings = IssuerSettings::read(&mut s);
    let ca_ttl = CaTtl { ttl: settings.ca_ttl.get(), whence: s.whence("ca_ttl") };
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
