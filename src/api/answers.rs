//! What the streams of the Workload API send, encoded once for all whose entries are the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use zeroize::Zeroize as _;

use super::{encoded::Encoded, proto::workload as pb};
use crate::{
    identity::{Bundle, Entry, TrustDomain},
    store::{Snapshot, snapshot::BundleForm, x509_cache::Served},
};

/// The foreign trust domains whose bundles callers of these entries receive.
pub(super) fn federated<'a>(entries: impl IntoIterator<Item = &'a Arc<Entry>>) -> BTreeSet<&'a TrustDomain> {
    entries.into_iter().flat_map(|entry| &entry.federates_with).collect()
}

/// FetchX509SVID's answer: these SVIDs, which are of these entries, with the bundles that go with them. A foreign bundle
/// without an X.509 authority is left out: clients refuse an answer in which a bundle is empty, SVIDs and all.
pub(super) fn x509_svids(snapshot: &Snapshot, entries: &[Arc<Entry>], svids: &[Served]) -> Encoded {
    let own = snapshot.bundles.own.x509_der();
    let mut message = pb::X509svidResponse {
        svids: entries
            .iter()
            .zip(svids)
            .map(|(entry, Served { svid, .. })| pb::X509svid {
                spiffe_id: svid.spiffe_id.as_str().to_owned(),
                x509_svid: svid.chain.concat(),
                x509_svid_key: svid.key.to_vec(),
                bundle: own.clone(),
                hint: entry.hint.to_string(),
            })
            .collect(),
        crl: Vec::new(),
        federated_bundles: federated(entries)
            .into_iter()
            .filter_map(|td| snapshot.bundles.federated.get(td))
            .filter(|bundle| bundle.has_x509())
            .map(|bundle| (bundle.trust_domain.id_string(), bundle.x509_der()))
            .collect(),
    };
    let answer = Encoded::new(&message);
    for svid in &mut message.svids {
        svid.x509_svid_key.zeroize();
    }
    answer
}

/// FetchX509Bundles' or FetchJWTBundles' answer: the own bundle, and those of `federated` that are known. One without an
/// authority of this kind is left out: clients refuse an answer in which a bundle is empty, as a whole.
pub(super) fn bundles(snapshot: &Snapshot, form: BundleForm, federated: &[TrustDomain]) -> Encoded {
    let known = federated.iter().filter_map(|td| snapshot.bundles.federated.get(td));
    let known = known.filter(|bundle| match form {
        BundleForm::X509 => bundle.has_x509(),
        BundleForm::Jwt => !bundle.jwt_authorities.is_empty(),
    });
    let bundles = std::iter::once(&snapshot.bundles.own).chain(known);
    let by_id = |content: fn(&Bundle) -> Vec<u8>| -> BTreeMap<String, Vec<u8>> {
        bundles.map(|bundle| (bundle.trust_domain.id_string(), content(bundle))).collect()
    };
    match form {
        BundleForm::X509 => {
            Encoded::new(&pb::X509BundlesResponse { crl: Vec::new(), bundles: by_id(Bundle::x509_der) })
        }
        BundleForm::Jwt => {
            Encoded::new(&pb::JwtBundlesResponse { bundles: by_id(|bundle| bundle.jwks().into_bytes()) })
        }
    }
}
