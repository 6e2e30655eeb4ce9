//! The block `plugins`, as far as it is there: the workload attestors.

use super::absent::ServerKeys;
use crate::{
    attest::{self, AttestSettings},
    hcl::{
        absent::NOT_HERE,
        section::{Labelled, Section},
    },
};

pub(super) fn read(root: &mut Section<'_>, server: &mut ServerKeys) -> AttestSettings {
    let Some(mut plugins) = root.block("plugins") else { return AttestSettings::default() };
    let attest = AttestSettings::read(&mut plugins);
    for key in ["NodeAttestor", "KeyManager"] {
        for Labelled { place, section, .. } in plugins.labelled(key) {
            server.0.push((place, section.name()));
            section.ignore();
        }
    }
    for Labelled { place, mut section, .. } in plugins.labelled("SVIDStore") {
        if attest::is_enabled(&mut section) {
            let message = format!("storing SVIDs {NOT_HERE}; leave it out");
            section.problems().add(place, &section.name(), None, message);
        }
        section.ignore();
    }
    plugins.finish();
    attest
}
