//! The blocks `federation`: whose bundles are known.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use super::{file::said_of, input::Input, trust_domain};
use crate::{
    hcl::{
        section::Section,
        tree::{Place, quoted},
    },
    identity::{Bundle, TrustDomain, bundle::BundleError},
};

/// What the blocks say.
#[derive(Debug)]
pub(super) struct Federation {
    pub(super) bundles: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// Trust domains that have a block, whether or not their bundle could be read.
    pub(super) declared: BTreeSet<TrustDomain>,
}

impl Federation {
    pub(super) fn read(root: &mut Section<'_>, input: &Input<'_>, own: Option<&TrustDomain>) -> Self {
        let mut bundles = BTreeMap::new();
        let mut declared: BTreeMap<TrustDomain, Place> = BTreeMap::new();
        for mut section in root.labelled("federation") {
            let name = trust_domain::parse(section.label()).map_err(|err| {
                section.wrong_block(format_args!(
                    "{err}; for example: federation \"spiffe://other.example\" {{ .. }}"
                ));
            });
            let place = section.place();
            let name = name.ok().inspect(|name| {
                if Some(name) == own {
                    section.wrong_block("is the agent's own trust domain, whose bundle is the issuer's");
                }
                if let Some(first) = declared.get(name) {
                    let first = section.problems().show(*first);
                    section.wrong_block(format_args!("is a duplicate: the first is at {first}"));
                }
                declared.entry(name.clone()).or_insert(place);
            });
            if let Some((name, bundle)) = bundle(&mut section, input, name) {
                bundles.insert(name, Arc::new(bundle));
            }
            section.finish();
        }
        Self { bundles, declared: declared.into_keys().collect() }
    }
}

fn bundle(
    s: &mut Section<'_>,
    input: &Input<'_>,
    name: Option<TrustDomain>,
) -> Option<(TrustDomain, Bundle)> {
    type Parse = fn(&TrustDomain, &[u8]) -> Result<Bundle, BundleError>;
    let pem: Parse = Bundle::parse_pem;
    let parse = |text: &str| -> Option<Parse> {
        match text {
            "pem" => Some(pem),
            "spiffe" => Some(Bundle::parse_spiffe),
            _ => None,
        }
    };
    let format = s.parsed("bundle_format", parse, "must be pem or spiffe").map(|at| at.value);
    let format = format.or_else(|| (!s.has("bundle_format")).then_some(pem));
    let Some(path) = s.string("bundle_path") else {
        s.missing("bundle_path", "must be configured: bundle_path = \"/etc/durward/other.example.pem\"");
        return None;
    };
    let wrong = |message: String| s.wrong(path.place, "bundle_path", Some(quoted(path.value)), message);
    let bytes = (input.read_file)(&input.base.join(path.value));
    let bytes = bytes.map_err(|err| wrong(said_of(Path::new(path.value), err))).ok()?;
    let name = name?;
    let bundle = format?(&name, &bytes).map_err(|err| wrong(err.to_string())).ok()?;
    Some((name, bundle))
}
