//! What stands above the leaf in the chains of a server: with an upstream CA the same certificates in each of them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

/// The most that are known: one chain of the longest, or those of several servers.
const MOST: usize = 16;

/// The certificates that came last above a leaf, DER, so that each is kept once and not once for every SVID.
#[derive(Debug, Default)]
pub(super) struct Intermediates(Mutex<VecDeque<Arc<[u8]>>>);

impl Intermediates {
    /// The same chain (the leaf first), with what is known above its leaf in the place of copies.
    pub(super) fn shared_by(&self, chain: &[Vec<u8>]) -> Vec<Arc<[u8]>> {
        let Some((leaf, above)) = chain.split_first() else { return Vec::new() };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let above = above.iter().map(|der| {
            if let Some(known) = known.iter().find(|known| ***known == **der) {
                return Arc::clone(known);
            }
            let new: Arc<[u8]> = der.as_slice().into();
            if known.len() == MOST {
                known.pop_front();
            }
            known.push_back(Arc::clone(&new));
            new
        });
        std::iter::once(leaf.as_slice().into()).chain(above).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_share_what_is_above_their_leaves_and_few_are_known() {
        let known = Intermediates::default();
        let chain = |leaf: u8, above: &[u8]| {
            let chain: Vec<_> =
                std::iter::once(leaf).chain(above.iter().copied()).map(|it| vec![it]).collect();
            let shared = known.shared_by(&chain);
            assert!(shared.iter().map(|der| &**der).eq(chain.iter().map(Vec::as_slice)), "{chain:?}");
            shared
        };
        let (one, other) = (chain(1, &[100, 101]), chain(1, &[100, 101]));
        let same: Vec<_> = one.iter().zip(&other).map(|(one, other)| Arc::ptr_eq(one, other)).collect();
        assert_eq!(same, [false, true, true], "a leaf is nobody else's");

        for above in 0..200 {
            drop(chain(1, &[above, 201]));
        }
        assert_eq!(known.0.lock().unwrap().len(), MOST);
        assert!(!Arc::ptr_eq(&one[1], &chain(1, &[100])[1]), "it was long ago");
        assert!(known.shared_by(&[]).is_empty());
    }
}
