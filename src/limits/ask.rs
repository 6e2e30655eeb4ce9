//! What a call asks of a table of buckets: whose, how much, and on whose behalf. And what it holds there.

use super::{
    attempt::Attempt,
    bucket::{Quota, Shortfall},
    refusal::ChargedAs,
    shares::Taker,
};

/// Whose bucket: a seeded hash of the key, and who could invent more keys like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BucketKey {
    /// Of everything that tells this bucket from another.
    pub(super) hash: [u64; 2],
    /// Who is charged when there is no room for a bucket of its own.
    pub(super) parent: u64,
}

/// Makes keys. Seeded at random once per agent.
#[derive(Debug, Default)]
pub(super) struct Hasher([ahash::RandomState; 2]);

impl Hasher {
    /// The hash of `value`.
    pub(super) fn hash(&self, value: impl std::hash::Hash) -> [u64; 2] {
        self.0.each_ref().map(|state| state.hash_one(&value))
    }
}

/// What a call asks of a bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) key: BucketKey,
    pub(super) quota: Quota,
    /// Since when that quota holds, as far as it is known.
    pub(super) since: u64,
    /// Tokens.
    pub(super) cost: u32,
    /// Who asks, where several callers share the bucket.
    pub(super) taker: Option<Taker>,
    /// Of the one who asks: it counts once.
    pub(super) attempt: Attempt,
}

/// Which bucket a call was charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChargedTo {
    /// Its own, which was here; it may have moved since, which is seen.
    Own(u32),
    /// Its parent's: there was no room.
    Overflow,
    /// The one of last resort: there was no room for another parent either.
    Stray,
}

impl ChargedTo {
    /// As whom the one is charged whose own bucket is this, or would be.
    pub(super) fn charged_as(self, own: ChargedAs) -> ChargedAs {
        match self {
            Self::Own(_) => own,
            Self::Overflow | Self::Stray => ChargedAs::Overflow,
        }
    }
}

/// Tokens held in a bucket of a table, and what it takes to pay them: it goes with each call.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldTokens {
    pub(super) key: BucketKey,
    pub(super) quota: Quota,
    /// Tokens that were asked for.
    pub(super) cost: u32,
    pub(super) place: ChargedTo,
    /// So many of what was asked: less where a call passes without.
    pub(super) tokens: u32,
    /// Where its caller's share is, if callers have shares.
    pub(super) share: Option<usize>,
    pub(super) short: Shortfall,
    /// The same for the bucket itself, which may have had fewer.
    pub(super) of_bucket: Shortfall,
}

impl HeldTokens {
    /// All that was asked for is held, by nobody's share.
    pub(super) fn all(ask: &Ask, place: ChargedTo, short: Shortfall) -> Self {
        let Ask { key, quota, cost, .. } = *ask;
        Self { key, quota, cost, place, tokens: cost, share: None, short, of_bucket: short }
    }
}
