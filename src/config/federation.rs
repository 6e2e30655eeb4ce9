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
    identity::{
        Bundle, TrustDomain,
        bundle::{BundleError, PassedOver},
    },
};

/// What the blocks say.
#[derive(Debug)]
pub(super) struct Federation {
    pub(super) bundles: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// Trust domains that have a block, whether or not their bundle could be read.
    pub(super) declared: BTreeSet<TrustDomain>,
    /// What bundles lack.
    pub(super) gaps: Vec<String>,
}

impl Federation {
    pub(super) fn read(root: &mut Section<'_>, input: &Input<'_>, own: Option<&TrustDomain>) -> Self {
        let (mut bundles, mut gaps, mut places) = (BTreeMap::new(), Vec::new(), Vec::new());
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
            if let Some((name, bundle, gap)) = bundle(&mut section, input, name) {
                places.extend(gap.as_ref().map(|_| place));
                gaps.extend(gap);
                bundles.insert(name, Arc::new(bundle));
            }
            section.finish();
        }
        // Of those that lack something.
        root.problems().note_blocks("federation", places);
        Self { bundles, declared: declared.into_keys().collect(), gaps }
    }
}

/// What a SPIFFE bundle lacks, though its block names it, in words.
fn gap(bundle: &Bundle, passed_over: PassedOver) -> Option<String> {
    let name = &bundle.trust_domain;
    let lack = if !bundle.has_x509() {
        Some(format!("bundle has no X.509 authority: X.509-SVIDs of {name} are not trusted"))
    } else if bundle.jwt_authorities.is_empty() {
        Some(format!("bundle has no JWT authority: JWT-SVIDs of {name} are not trusted"))
    } else {
        None
    };
    if passed_over.is_empty() {
        return lack;
    }
    let lack = lack.unwrap_or_else(|| format!("bundle of {name} is used in part"));
    Some(format!("{lack}; {passed_over}"))
}

fn bundle(
    s: &mut Section<'_>,
    input: &Input<'_>,
    name: Option<TrustDomain>,
) -> Option<(TrustDomain, Bundle, Option<String>)> {
    type Parse = fn(&TrustDomain, &[u8]) -> Result<(Bundle, Option<String>), BundleError>;
    let pem: Parse = |name, text| Ok((Bundle::parse_pem(name, text)?, None));
    let spiffe: Parse = |name, text| {
        let (bundle, passed_over) = Bundle::parse_spiffe_telling(name, text)?;
        let gap = gap(&bundle, passed_over);
        Ok((bundle, gap))
    };
    let parse = |text: &str| -> Option<Parse> {
        match text {
            "pem" => Some(pem),
            "spiffe" => Some(spiffe),
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
    let (bundle, gap) = format?(&name, &bytes).map_err(|err| wrong(err.to_string())).ok()?;
    Some((name, bundle, gap))
}
