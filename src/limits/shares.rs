//! Who takes how much of a bucket that several callers share: an identity's, a mask's, the node's.
//!
//! First come, first served would give a shared bucket to whoever shouts. So half of it is kept for those who took less
//! than their fair share, which is the limit divided by the callers that asked of late: each has a share of its own
//! beside the bucket, a bucket of that size. A call passes while its caller's share has tokens, or while more than half of
//! the bucket is left. It is the one bucket that is paid from, so that no more passes than its limit; and a
//! caller that is alone has all of it.
//!
//! A share is a promise, and the bucket has to keep it. So a share is reckoned in the time that the bucket takes to refill: of
//! `n` callers each pays `n` times what a token costs, and all shares together refill as fast as the bucket. Who joins is
//! promised no more than the bucket has. Others may be promised the same of it: those who do not come for it leave it. Where a limit
//! passes calls by their shares alone ([`Shortfall::PassOwn`]), who joins begins with all of its part.
//!
//! [`MOST_TAKERS`] have a share each; the others are parted at random into [`PARTIES`], which have a share each. Of the buckets
//! of a table each has room for [`FEW_TAKERS`], and they have [`FURTHER`] beyond that together. A family is one taker
//! ([`Families`](super::caller::Families)).

use std::{collections::HashMap, time::Duration};

use super::{
    apart::{KeptApart, QuotaChange},
    bucket::{Bucket, LONGEST, Quota, Shortfall, price},
    caller::CallerKey,
    refusal::Remainder,
};

/// Callers with a share of their own in one bucket.
const MOST_TAKERS: usize = 256;
/// So many for certain in each bucket of a table.
const FEW_TAKERS: usize = 16;
/// So many beyond these in all buckets of a table: about a megabyte.
const FURTHER: usize = 8 * 1024;
/// How long it is taken to be known how many are active, in nanoseconds.
const COUNTED_FOR: u64 = 10_000_000;
/// Shares of those together that have none of their own: few of them meet one that shouts.
const PARTIES: u64 = 64;
/// Buckets whose callers are told apart. More are first come, first served.
const MOST_SHARED: usize = 1024;
/// How long a caller counts after it asked, in nanoseconds: as long as the bucket takes to fill, within these bounds.
const ACTIVE: std::ops::RangeInclusive<u64> = 10_000_000_000..=60_000_000_000;

/// Who takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taker {
    pub(super) caller: CallerKey,
    /// The caller with its family.
    pub(super) group: u64,
}

/// What one taker did in a bucket, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taking {
    /// The caller that asked last; `None` for all those together that have no share of their own.
    pub caller: Option<CallerKey>,
    /// Calls that passed.
    pub used: u32,
    /// Calls that did not.
    pub refused: u32,
}

/// Who was alone in a bucket, and what it did there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alone {
    pub(super) taker: Taker,
    pub(super) asked: u64,
    pub(super) used: u32,
    pub(super) refused: u32,
}

/// Whose a share is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ShareOf {
    Group(u64),
    Party(u64),
}

#[derive(Debug)]
struct TakerShare {
    of: ShareOf,
    /// Of the quota of the bucket. A token costs as many as there are takers.
    own: Bucket,
    /// When its taker last asked; `None` of one that is about to, for the first time.
    asked: Option<u64>,
    taking: Taking,
}

impl TakerShare {
    /// Whether it is of one taker alone.
    fn is_own(&self) -> bool {
        matches!(self.of, ShareOf::Group(_))
    }

    fn is_active(&self, now: u64, quota: Quota) -> bool {
        let active = quota.refill().clamp(*ACTIVE.start(), *ACTIVE.end());
        self.asked.is_some_and(|asked| now.saturating_sub(asked) < active) || self.own.held > 0
    }

    /// What so many tokens cost a share, in nanoseconds of refill.
    fn price(tokens: u32, quota: Quota, takers: usize) -> u64 {
        let takers = u64::try_from(takers).unwrap_or(u64::MAX);
        price(tokens, quota).saturating_mul(takers).min(LONGEST)
    }

    /// What is spent of it and held, in nanoseconds of refill.
    fn used(&self, now: u64, quota: Quota, takers: usize) -> u64 {
        let mut own = self.own;
        own.spent(now, quota).saturating_add(Self::price(self.own.held, quota, takers))
    }

    /// Its taker asks, and is counted with those that are active.
    fn is_asked(&mut self, now: u64, bucket: Bucket, ask: AskOfShare, takers: &mut usize) {
        let AskOfShare { quota, taker, short, .. } = ask;
        let joins = !self.is_active(now, quota);
        // One that is counted now counts itself: it asks.
        *takers += usize::from(joins);
        if joins && short == Shortfall::Refuse {
            // It has no more of the bucket than there is.
            let parts = u64::try_from(*takers).unwrap_or(u64::MAX);
            let there_is = bucket.unspent(now, quota).saturating_mul(parts);
            self.own.spend(now, quota, quota.refill().saturating_sub(there_is));
        }
        self.asked = Some(now);
        self.taking.caller = self.is_own().then_some(taker.caller);
    }

    /// A call has passed: its tokens are held.
    fn holds(&mut self, tokens: u32) {
        self.own.held = self.own.held.saturating_add(tokens);
        self.taking.used = self.taking.used.saturating_add(1);
    }

    /// Takes `cost` tokens of a call that is over; see [`Bucket::settle_by`].
    fn pay(&mut self, now: u64, quota: Quota, cost: u32, takers: usize, short: Shortfall) {
        let most = match short {
            Shortfall::Refuse | Shortfall::PassOwn => Self::price(quota.burst(), quota, 2 * takers),
            Shortfall::Pass => quota.refill().saturating_sub(Self::price(self.own.held, quota, takers)),
        };
        let spent = self.own.spent(now, quota);
        let after = spent.saturating_add(Self::price(cost, quota, takers));
        self.own.spend(now, quota, after.min(most));
    }

    /// When it has so many tokens, if it has not.
    fn wait(&self, now: u64, quota: Quota, cost: u32, takers: usize) -> Option<Duration> {
        let price = Self::price(cost, quota, takers);
        let after = self.used(now, quota, takers).saturating_add(price);
        let most = quota.refill().max(price);
        (after > most).then(|| Duration::from_nanos(after - most))
    }
}

/// The shares of one bucket.
#[derive(Debug)]
pub(super) struct Shares {
    all: Vec<TakerShare>,
    /// Where each is.
    index: HashMap<ShareOf, usize, ahash::RandomState>,
    /// So many takers may have a share of their own, and so many have.
    most: usize,
    owned: usize,
    /// So many were active then, and so many of those with a share of their own were not.
    active: usize,
    left: usize,
    counted: u64,
}

/// What a call asks of a bucket that is shared.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskOfShare {
    pub(super) quota: Quota,
    pub(super) cost: u32,
    pub(super) taker: Taker,
    pub(super) short: Shortfall,
}

/// A bucket has too few tokens for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooFew {
    /// When to come back.
    pub(super) wait: Duration,
    pub(super) rest: Remainder,
}

impl TooFew {
    /// Of a bucket that lacks them for so long, as must a share, where a call must leave so many tokens. Come back when it has enough
    /// and to spare, or when it has enough and the share too.
    fn of_shared(quota: Quota, cost: u32, leaves: u32, wait: Duration, share: Option<Duration>) -> Self {
        let leaves_take = quota.time_of(leaves);
        let rest = if wait <= leaves_take { Remainder::KeptForOthers } else { Remainder::Nothing };
        let with_share = share.unwrap_or_default().max(wait.saturating_sub(leaves_take));
        let can_leave = cost.saturating_add(leaves) <= quota.burst();
        Self { wait: if can_leave { wait.min(with_share) } else { with_share }, rest }
    }

    /// Or sooner, when there is something to spare.
    pub(super) fn or_in(self, sooner: Duration) -> Self {
        Self { wait: self.wait.min(sooner), ..self }
    }
}

impl From<Duration> for TooFew {
    /// Of a bucket that nobody shares.
    fn from(wait: Duration) -> Self {
        Self { wait, rest: Remainder::Nothing }
    }
}

/// Tokens that a call holds of a bucket that is shared.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldOfShare {
    /// So many of the bucket: less than it asked for where it passes without.
    pub(super) tokens: u32,
    /// Where its share is, which has all of them. It stays there while they are held.
    pub(super) at: usize,
}

/// A bucket that is shared has too few tokens for a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotHeld {
    pub(super) too_few: TooFew,
    /// Where the share is.
    at: usize,
    /// Tokens that the call must leave in the bucket.
    leaves: u32,
}

impl Shares {
    /// For so many takers, until it may have more.
    fn of_at_most(most: usize) -> Self {
        Self { all: Vec::new(), index: HashMap::default(), most, owned: 0, active: 0, left: 0, counted: 0 }
    }

    /// One took alone until now, last when `asked` says: what its bucket has spent is of its share, up to all of that.
    pub(super) fn begin_with(&mut self, now: u64, quota: Quota, first: Alone, bucket: Bucket) {
        let Alone { taker, asked, used, refused } = first;
        let at = self.place(taker, |_| true);
        if let Some(share) = self.all.get_mut(at) {
            share.asked = Some(asked);
            share.taking = Taking { caller: Some(taker.caller), used, refused };
            let spent = quota.refill().saturating_sub(bucket.unspent(now, quota));
            share.own.spend(now, quota, spent.saturating_mul(2).min(quota.refill()));
        }
    }

    /// Holds tokens of `bucket` for a call of `taker`, and of its share. Who has enough in its share may take the last ones.
    ///
    /// # Errors
    /// When there are too few.
    pub(super) fn hold(
        &mut self,
        now: u64,
        bucket: &mut Bucket,
        ask: AskOfShare,
    ) -> Result<HeldOfShare, NotHeld> {
        let AskOfShare { quota, cost, short, .. } = ask;
        let at = self.asks(now, *bucket, ask);
        let takers = self.active;
        let kept = if takers > 1 { quota.burst().div_ceil(2) } else { 0 };
        let share = self.all.get_mut(at);
        let tokens = match bucket.hold_leaving(now, quota, cost, kept) {
            Ok(()) => cost,
            Err(wait) => {
                let share_wait = share.as_ref().and_then(|share| share.wait(now, quota, cost, takers));
                let leaves = if share_wait.is_some() { kept } else { 0 };
                let wait =
                    if leaves == kept { Err(wait) } else { bucket.hold_leaving(now, quota, cost, leaves) };
                let passes = match short {
                    Shortfall::Refuse => false,
                    Shortfall::PassOwn => share_wait.is_none(),
                    Shortfall::Pass => true,
                };
                match wait {
                    Ok(()) => cost,
                    Err(_) if passes => bucket.hold_some(now, quota, cost, leaves),
                    Err(wait) => {
                        let too_few = TooFew::of_shared(quota, cost, leaves, wait, share_wait);
                        return Err(NotHeld { too_few, at, leaves });
                    }
                }
            }
        };
        if let Some(share) = share {
            share.holds(cost);
        }
        Ok(HeldOfShare { tokens, at })
    }

    /// Holds them all the same for one that lacked them: what there is.
    pub(super) fn hold_all_the_same(
        &mut self,
        now: u64,
        bucket: &mut Bucket,
        ask: AskOfShare,
        lacking: NotHeld,
    ) -> HeldOfShare {
        let NotHeld { at, leaves, .. } = lacking;
        if let Some(share) = self.all.get_mut(at) {
            share.holds(ask.cost);
        }
        HeldOfShare { tokens: bucket.hold_some(now, ask.quota, ask.cost, leaves), at }
    }

    /// A call asks. Returns where the share of its taker is.
    fn asks(&mut self, now: u64, bucket: Bucket, ask: AskOfShare) -> usize {
        let AskOfShare { quota, taker, .. } = ask;
        let is_active = |share: &TakerShare| share.is_active(now, quota);
        if self.active == 0 || now.saturating_sub(self.counted) >= COUNTED_FOR {
            self.active = self.all.iter().filter(|share| is_active(share)).count();
            self.left = self.all.iter().filter(|share| share.is_own() && !is_active(share)).count();
            self.counted = now;
        }
        let at = self.place(taker, is_active);
        if let Some(share) = self.all.get_mut(at) {
            share.is_asked(now, bucket, ask, &mut self.active);
        }
        at
    }

    /// Counts for people that a call was refused.
    pub(super) fn note_refused(&mut self, taker: Taker) {
        if let Some(share) = self.at(taker).and_then(|at| self.all.get_mut(at)) {
            share.taking.refused = share.taking.refused.saturating_add(1);
        }
    }

    /// A call that held tokens of the share at this place ends, and takes `cost`.
    pub(super) fn settle(
        &mut self,
        now: u64,
        quota: Quota,
        at: usize,
        held: u32,
        cost: u32,
        short: Shortfall,
    ) {
        let takers = self.active.max(1);
        if let Some(share) = self.all.get_mut(at) {
            share.own.held = share.own.held.saturating_sub(held);
            share.pay(now, quota, cost, takers, short);
            share.taking.used = share.taking.used.saturating_sub(u32::from(held > 0 && cost == 0));
        }
    }

    /// Where the share of a taker is, if it has one.
    pub(super) fn at(&self, taker: Taker) -> Option<usize> {
        self.find(ShareOf::Group(taker.group)).or_else(|| self.find(self.party(taker)))
    }

    /// Who takes, those first that were refused most; those together that have no share of their own.
    pub(super) fn takings(&self) -> Vec<Taking> {
        let (own, parties): (Vec<_>, Vec<_>) = self.all.iter().partition(|share| share.is_own());
        let mut takings: Vec<Taking> = own.iter().map(|share| share.taking).collect();
        let sum = |a: Taking, b: Taking| Taking {
            caller: None,
            used: a.used.saturating_add(b.used),
            refused: a.refused.saturating_add(b.refused),
        };
        takings.extend(parties.iter().map(|share| share.taking).reduce(sum));
        takings.sort_by_key(|it| std::cmp::Reverse((it.refused, it.used)));
        takings
    }

    fn find(&self, of: ShareOf) -> Option<usize> {
        self.index.get(&of).copied()
    }

    fn party(&self, taker: Taker) -> ShareOf {
        ShareOf::Party(self.index.hasher().hash_one(taker.group) % PARTIES)
    }

    /// Where the share of `taker` is; makes one, in the place of one whose taker has not asked for long, if it must.
    fn place(&mut self, taker: Taker, is_active: impl Fn(&TakerShare) -> bool) -> usize {
        let group = ShareOf::Group(taker.group);
        if let Some(at) = self.find(group) {
            return at;
        }
        let fresh = |of| TakerShare {
            of,
            own: Bucket::default(),
            asked: None,
            taking: Taking { caller: None, used: 0, refused: 0 },
        };
        // Not looked for by each call of the many that have none.
        let left = |share: &TakerShare| share.is_own() && !is_active(share);
        let free = if self.left > 0 { self.all.iter().position(left) } else { None };
        self.left = if free.is_some() { self.left - 1 } else { 0 };
        if let Some(at) = free {
            if let Some(share) = self.all.get_mut(at) {
                self.index.remove(&share.of);
                *share = fresh(group);
            }
            self.index.insert(group, at);
            return at;
        }
        let own = self.owned < self.most;
        let of = if own { group } else { self.party(taker) };
        if let Some(at) = self.find(of) {
            return at;
        }
        self.owned += usize::from(own);
        self.index.insert(of, self.all.len());
        self.all.push(fresh(of));
        self.all.len() - 1
    }
}

/// The shares of the buckets of a table, by their keys.
#[derive(Debug)]
pub(super) struct SharedBuckets {
    /// So many shares more than [`FEW_TAKERS`] may still be had.
    further: usize,
    several: HashMap<[u64; 2], Shares, ahash::RandomState>,
    /// Who takes from a bucket that only one takes from.
    alone: HashMap<[u64; 2], Taker, ahash::RandomState>,
}

impl Default for SharedBuckets {
    fn default() -> Self {
        Self { further: FURTHER, several: HashMap::default(), alone: HashMap::default() }
    }
}

impl SharedBuckets {
    /// The shares of a bucket that several take from, one more of them than before where all are had; `None` where there are too
    /// many such buckets.
    pub(super) fn of(&mut self, hash: [u64; 2]) -> Option<&mut Shares> {
        if self.several.len() >= MOST_SHARED && !self.several.contains_key(&hash) {
            return None;
        }
        let shares = self.several.entry(hash).or_insert_with(|| Shares::of_at_most(FEW_TAKERS));
        if shares.owned == shares.most && shares.most < MOST_TAKERS && self.further > 0 {
            self.further -= 1;
            shares.most += 1;
        }
        Some(shares)
    }

    /// This one is the first to take from a bucket.
    pub(super) fn is_alone(&mut self, hash: [u64; 2], taker: Taker) {
        if self.alone.len() < MOST_SHARED {
            self.alone.insert(hash, taker);
        }
    }

    /// Who was the first, now that it is alone no longer.
    pub(super) fn was_alone(&mut self, hash: [u64; 2]) -> Option<Taker> {
        self.alone.remove(&hash)
    }

    /// [`Shares::note_refused`] of a bucket, where it has some.
    pub(super) fn note_refused(&mut self, hash: [u64; 2], taker: Taker) {
        if let Some(shares) = self.several.get_mut(&hash) {
            shares.note_refused(taker);
        }
    }

    /// The shares of a bucket, where it has some.
    pub(super) fn known(&self, hash: [u64; 2]) -> Option<&Shares> {
        self.several.get(&hash)
    }

    /// The bucket is full again, and forgotten.
    pub(super) fn forget(&mut self, hash: [u64; 2]) {
        self.further += self.several.remove(&hash).map_or(0, |shares| shares.most - FEW_TAKERS);
        self.alone.remove(&hash);
    }
}

/// A bucket of the node, with its shares.
#[derive(Debug)]
pub(super) struct SharedBucket {
    bucket: Bucket,
    apart: Option<KeptApart>,
    /// When it was last asked.
    asked: u64,
    shares: Shares,
}

impl Default for SharedBucket {
    fn default() -> Self {
        Self { bucket: Bucket::default(), apart: None, asked: 0, shares: Shares::of_at_most(MOST_TAKERS) }
    }
}

impl SharedBucket {
    /// [`Shares::note_refused`].
    pub(super) fn note_refused(&mut self, taker: Taker) {
        self.shares.note_refused(taker);
    }

    /// The quota that holds now holds `since` then.
    pub(super) fn come_under(&mut self, now: u64, since: u64, quota: Quota) {
        self.bucket.come_under(now, QuotaChange { since, asked: self.asked }, quota, &mut self.apart);
    }

    /// Tokens that are left.
    pub(super) fn left(&self, now: u64, quota: Quota, since: u64) -> u32 {
        let (mut bucket, mut apart) = (self.bucket, self.apart);
        bucket.come_under(now, QuotaChange { since, asked: self.asked }, quota, &mut apart);
        bucket.left(now, quota)
    }

    /// Who takes, those first that were refused most.
    pub(super) fn takings(&self) -> Vec<Taking> {
        self.shares.takings()
    }

    /// Takes `cost` tokens of a call that is over at once.
    ///
    /// # Errors
    /// When to come back, and what is left.
    pub(super) fn take(
        &mut self,
        now: u64,
        quota: Quota,
        cost: u32,
        taker: Taker,
        short: Shortfall,
    ) -> Result<(), TooFew> {
        self.asked = self.asked.max(now);
        let ask = AskOfShare { quota, cost, taker, short };
        let held = self.shares.hold(now, &mut self.bucket, ask).map_err(|lacking| lacking.too_few)?;
        self.bucket.settle(now, quota, held.tokens, held.tokens);
        self.shares.settle(now, quota, held.at, cost, cost, short);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::bucket::Per;

    const SECOND: u64 = 1_000_000_000;

    fn taker(uid: u32) -> Taker {
        Taker { caller: CallerKey::Uid(uid), group: u64::from(uid) }
    }

    fn quota(rate: f64, burst: u32) -> Quota {
        Quota::new(rate, Per::Second, burst).unwrap()
    }

    /// How many calls of each pass: caller `n` asks every `periods[n]` ms, for a minute.
    fn passed(bucket: &mut SharedBucket, quota: Quota, periods: &[u64]) -> Vec<(u64, u64)> {
        let mut counts = vec![(0, 0); periods.len()];
        for ms in 0..60_000 {
            for (uid, (period, count)) in (0..).zip(periods.iter().zip(&mut counts)) {
                if ms % period == 0 {
                    count.0 += 1;
                    count.1 += u64::from(
                        bucket.take(SECOND + ms * 1_000_000, quota, 1, taker(uid), Shortfall::Refuse).is_ok(),
                    );
                }
            }
        }
        counts
    }

    #[test]
    fn whoever_takes_less_than_its_share_is_served_beside_those_who_shout() {
        for (case, quota, periods, polite) in [
            ("four that shout and one that does not", quota(200.0, 400), &[1, 1, 1, 1, 50][..], &[4][..]),
            ("three polite ones", quota(100.0, 100), &[1, 50, 50, 100], &[1, 2, 3]),
        ] {
            let counts = passed(&mut SharedBucket::default(), quota, periods);
            for at in polite {
                assert_eq!(counts[*at].1, counts[*at].0, "{case}: {counts:?}");
            }
            let all: u64 = counts.iter().map(|count| count.1).sum();
            let most = u64::from(quota.burst()) + 60_000_000_000 / quota.per_token + 1;
            assert!(all <= most, "{case}: {all} of {most}");
            // What the polite leave is not lost.
            assert!(
                all + u64::from(quota.burst()) >= most * 9 / 10 || quota.burst() == 1,
                "{case}: {all} of {most}"
            );
        }
    }

    /// A bucket of one token has nothing to keep: there it is half of all that each gets who asks.
    #[test]
    fn a_bucket_of_one_token_is_shared_too() {
        let counts = passed(&mut SharedBucket::default(), quota(10.0, 1), &[1, 7]);
        assert!(counts.iter().all(|count| count.1 >= 200), "{counts:?}");
    }

    /// Each of 120 callers is within what it may, and together they ask for twice what there is. One more asks for less
    /// than a 120th of it.
    #[test]
    fn in_a_crowd_too_whoever_takes_less_than_its_share_is_served() {
        let mut periods = vec![10; 120];
        periods.push(50);
        let counts = passed(&mut SharedBucket::default(), quota(5000.0, 10_000), &periods);
        let (asked, served) = counts[120];
        assert_eq!(served, asked);
        let all: u64 = counts.iter().map(|count| count.1).sum();
        assert!(all <= 10_000 + 60 * 5000 + 1, "{all}");
    }

    #[test]
    fn those_who_shout_share_alike() {
        let counts = passed(&mut SharedBucket::default(), quota(100.0, 100), &[1, 2, 1, 5]);
        let of: Vec<u64> = counts.iter().map(|count| count.1).collect();
        let (least, most) = (of.iter().min().unwrap(), of.iter().max().unwrap());
        assert!(least * 2 > *most, "{counts:?}");
    }

    #[test]
    fn who_is_alone_has_all_of_it() {
        let mut bucket = SharedBucket::default();
        let quota = quota(1.0, 100);
        for _ in 0..100 {
            bucket.take(SECOND, quota, 1, taker(1), Shortfall::Refuse).unwrap();
        }
        assert_eq!(
            bucket.take(SECOND, quota, 1, taker(1), Shortfall::Refuse),
            Err(TooFew::from(Duration::from_secs(1))),
            "nothing is kept"
        );
        bucket.shares.note_refused(taker(1));
        bucket.shares.note_refused(taker(2));
        assert_eq!(
            bucket.shares.takings(),
            [Taking { caller: Some(CallerKey::Uid(1)), used: 100, refused: 1 }]
        );
    }

    /// One took so many, and another joins: of the rest it has its part, which is what the first has not.
    #[test]
    fn who_joins_begins_with_what_there_is_for_it() {
        let (quota, short) = (quota(1.0, 60), Shortfall::Refuse);
        for (taken, joins, rest) in
            [(1, 30, 29), (20, 30, 10), (30, 30, 0), (50, 10, 0), (59, 1, 0), (60, 0, 0)]
        {
            let mut bucket = SharedBucket::default();
            let had = |bucket: &mut SharedBucket, uid, most| {
                (0..most).take_while(|_| bucket.take(SECOND, quota, 1, taker(uid), short).is_ok()).count()
            };
            assert_eq!(had(&mut bucket, 1, taken), taken);
            assert_eq!(had(&mut bucket, 2, 60), joins, "{taken} taken: the other one");
            assert_eq!(had(&mut bucket, 1, 60), rest, "{taken} taken: the first one");
        }
    }

    /// One shouts, and others come one after the other and ask for little: each is served, though what is kept was promised to
    /// those before it.
    #[test]
    fn who_joins_is_served_of_what_is_kept_for_those_who_ask_for_little() {
        let (quota, short) = (quota(50.0, 100), Shortfall::Refuse);
        let mut bucket = SharedBucket::default();
        let mut refused = Vec::new();
        for ms in 0..24_000_u64 {
            let now = SECOND + ms * 1_000_000;
            let _passed: bool = bucket.take(now, quota, 1, taker(1), short).is_ok();
            // Ten of them, each twice.
            if ms % 1_100 == 1_000 {
                let uid = 2 + u32::try_from(ms / 1_100 % 10).unwrap();
                if bucket.take(now, quota, 1, taker(uid), short).is_err() {
                    refused.push((ms, uid));
                }
            }
        }
        assert_eq!(refused, [(1_000, 2)], "nothing was kept before there was a second one");
        assert!(bucket.left(SECOND + 24 * SECOND, quota, 0) <= 60, "what is not kept is taken");
    }

    /// Eight ask for less than there is, one after the other.
    #[test]
    fn nobody_is_refused_where_all_together_ask_for_less_than_there_is() {
        let (quota, mut bucket) = (quota(1.0, 60), SharedBucket::default());
        for (uid, calls) in [(1, 30), (2, 4), (3, 4), (4, 4), (5, 4), (6, 4), (7, 4), (8, 4)] {
            for call in 0..calls {
                let taken = bucket.take(SECOND, quota, 1, taker(uid), Shortfall::Refuse);
                assert_eq!(taken, Ok(()), "{uid}: {call}");
            }
        }
    }

    /// One that keeps a bucket empty, or that has asked for nothing for long, has no more of it than others.
    #[test]
    fn who_joins_or_comes_back_to_an_empty_bucket_finds_a_token_when_it_is_told() {
        let (quota, short) = (quota(1.0, 60), Shortfall::Refuse);
        let mut bucket = SharedBucket::default();
        bucket.take(SECOND, quota, 1, taker(2), short).unwrap();
        let mut now = SECOND;
        let mut drain = |bucket: &mut SharedBucket, until: u64| {
            while now < until {
                let passed = bucket.take(now, quota, 1, taker(1), short).is_ok();
                now += if passed { 1 } else { 1_000_000 };
            }
        };
        for (case, at) in [("comes back", 200 * SECOND + SECOND / 2), ("joins", 300 * SECOND + SECOND / 2)] {
            drain(&mut bucket, at);
            let uid = if case == "joins" { 3 } else { 2 };
            let TooFew { wait, rest } = bucket.take(at, quota, 1, taker(uid), short).unwrap_err();
            assert_eq!(rest, Remainder::Nothing, "{case}");
            assert!(wait <= Duration::from_secs(2), "{case}: its part's time: {wait:?}");
            let then = at + u64::try_from(wait.as_nanos()).unwrap();
            drain(&mut bucket, then);
            bucket.take(then, quota, 1, taker(uid), short).unwrap();
            let mut had = 0;
            for ms in 0..20_000 {
                let at = then + ms * 1_000_000;
                had += u32::from(bucket.take(at, quota, 1, taker(uid), short).is_ok());
                drain(&mut bucket, at);
            }
            assert!((9..=11).contains(&had), "{case}: half of 20: {had}");
        }
    }

    #[test]
    fn a_crowd_has_a_bound_and_the_rest_of_it_a_share_together() {
        let mut bucket = SharedBucket::default();
        for uid in 0..1000 {
            // Refused or not.
            let _passed: bool =
                bucket.take(SECOND, quota(1.0, 100), 1, taker(uid), Shortfall::Refuse).is_ok();
        }
        let parties = usize::try_from(PARTIES).unwrap();
        assert_eq!(bucket.shares.all.len(), MOST_TAKERS + parties);
        assert_eq!(bucket.shares.index.len(), MOST_TAKERS + parties);
        assert_eq!(bucket.shares.takings().len(), MOST_TAKERS + 1, "people are told of them as one");
        // When they have gone, others have their places.
        bucket.take(SECOND + 200 * SECOND, quota(1.0, 100), 1, taker(5000), Shortfall::Refuse).unwrap();
        assert!(bucket.shares.takings().iter().any(|it| it.caller == Some(CallerKey::Uid(5000))));
    }

    /// Asks for a token of the bucket of a table, and ends at once.
    fn asks(
        buckets: &mut SharedBuckets,
        hash: [u64; 2],
        bucket: &mut Bucket,
        quota: Quota,
        uid: u32,
    ) -> bool {
        let shares = buckets.of(hash).unwrap();
        let ask = AskOfShare { quota, cost: 1, taker: taker(uid), short: Shortfall::Refuse };
        let Ok(HeldOfShare { tokens, at }) = shares.hold(SECOND, bucket, ask) else { return false };
        bucket.settle(SECOND, quota, tokens, 1);
        shares.settle(SECOND, quota, at, 1, 1, Shortfall::Refuse);
        true
    }

    /// They ask once each, one after the other, and nothing comes back meanwhile.
    #[test]
    fn nobody_of_many_is_refused_while_tokens_are_left() {
        for (callers, burst) in [(58, 60), (60, 60), (200, 200), (250, 1_000), (100, 60)] {
            let quota = Quota::new(1.0, Per::Hour, burst).unwrap();
            let (mut buckets, mut bucket) = (SharedBuckets::default(), Bucket::default());
            for uid in 0..callers {
                let there_is = bucket.left(SECOND, quota) > 0;
                let passes = asks(&mut buckets, [1, 1], &mut bucket, quota, uid);
                assert_eq!(passes, there_is, "{uid} of {callers}, {burst} tokens");
            }
        }
    }

    /// Each bucket has room for a few callers' shares, whoever has the others; and these come back with the bucket they were of.
    #[test]
    fn shares_of_a_table_have_a_bound() {
        let quota = quota(1.0, 1_000);
        let (mut buckets, callers) = (SharedBuckets::default(), u32::try_from(MOST_TAKERS + 50).unwrap());
        for at in 0..100 {
            for uid in 0..callers {
                // It passes or not.
                let _passed: bool = asks(&mut buckets, [at, at], &mut Bucket::default(), quota, uid);
            }
        }
        let had = |buckets: &SharedBuckets, at| buckets.known([at, at]).unwrap().owned;
        assert_eq!((had(&buckets, 0), had(&buckets, 99)), (MOST_TAKERS, FEW_TAKERS));
        let all: usize = (0..100).map(|at| had(&buckets, at)).sum();
        assert_eq!((all, buckets.further), (100 * FEW_TAKERS + FURTHER, 0));
        buckets.forget([0, 0]);
        for uid in 0..callers {
            let _passed: bool = asks(&mut buckets, [99, 99], &mut Bucket::default(), quota, uid);
        }
        assert_eq!(had(&buckets, 99), MOST_TAKERS);
        (0..100).for_each(|at| buckets.forget([at, at]));
        assert_eq!(buckets.further, FURTHER);
    }

    proptest! {
        /// Whoever comes and goes meanwhile: a share holds nothing when the calls have ended that it held tokens for.
        #[test]
        fn a_share_gives_back_what_it_held(
            calls in prop::collection::vec((0..200_u32, 0..20 * SECOND, 0..8_usize), 1..200),
        ) {
            let quota = quota(100.0, 50);
            let mut shares = Shares::of_at_most(FEW_TAKERS);
            let (mut now, mut open) = (SECOND, Vec::new());
            for (uid, later, ends) in calls {
                now += later;
                let ask = AskOfShare { quota, cost: 1, taker: taker(uid), short: Shortfall::Refuse };
                open.push(shares.hold(now, &mut Bucket::default(), ask).unwrap().at);
                for at in open.drain(..ends.min(open.len())) {
                    shares.settle(now, quota, at, 1, 1, Shortfall::Refuse);
                }
                let held: u32 = shares.all.iter().map(|share| share.own.held).sum();
                prop_assert_eq!(usize::try_from(held).unwrap(), open.len());
            }
        }

        /// Without room a share is paid for each call that passes by it, however many others have one: each gives at most a
        /// bucket's worth, beside the bucket itself.
        #[test]
        fn no_share_is_for_nothing(burst in 1..50_u32, uids in prop::collection::vec(0..6_u32, 1..900)) {
            let (quota, mut bucket) = (quota(10.0, burst), SharedBucket::default());
            for uid in 100..120 {
                let _ends_meanwhile = bucket.take(SECOND, quota, 1, taker(uid), Shortfall::PassOwn);
            }
            let mut passed = [0; 6];
            for uid in uids {
                let passes = bucket.take(100 * SECOND, quota, 1, taker(uid), Shortfall::PassOwn).is_ok();
                passed[usize::try_from(uid).unwrap()] += u32::from(passes);
            }
            let all: u32 = passed.iter().sum();
            prop_assert!(all <= 7 * burst && passed.iter().all(|passed| *passed <= 2 * burst), "{passed:?}");
        }

        /// Whoever joins is promised no more than the bucket has.
        #[test]
        fn who_joins_is_promised_no_more_than_there_is(
            burst in 1..50_u32,
            calls in prop::collection::vec((0..20_u32, 1..4_u32, 0..30_000_000_u64), 1..300),
        ) {
            let (quota, mut bucket, mut now) = (quota(10.0, burst), SharedBucket::default(), SECOND);
            for (uid, cost, later) in calls {
                now += later;
                let there_is = bucket.bucket.unspent(now, quota);
                let known = bucket.shares.all.len();
                let _passed: bool = bucket.take(now, quota, cost, taker(uid), Shortfall::Refuse).is_ok();
                let takers = bucket.shares.active;
                if let Some(joined) = bucket.shares.all.get(known) {
                    let promised = quota.refill().saturating_sub(joined.used(now, quota, takers));
                    prop_assert!(promised <= there_is * u64::try_from(takers).unwrap(), "{promised} of {there_is}");
                }
            }
        }

        /// Whoever asks, how, and however much it costs: no more passes than the bucket gives, and the wait is true.
        #[test]
        fn no_more_passes_than_one_bucket_gives(
            burst in 1..50_u32,
            rate in 1..100_u32,
            calls in prop::collection::vec((0..40_u32, 1..6_u32, 0..SECOND), 1..300),
        ) {
            let quota = quota(f64::from(rate), burst);
            let mut bucket = SharedBucket::default();
            let (mut now, mut given) = (SECOND, 0_u64);
            for (uid, cost, later) in calls {
                now += later;
                match bucket.take(now, quota, cost, taker(uid), Shortfall::Refuse) {
                    Ok(()) => given += u64::from(cost),
                    Err(TooFew { wait, .. }) if cost <= burst => {
                        let then = now + u64::try_from(wait.as_nanos()).unwrap();
                        // Nobody else comes: then it passes.
                        now = then;
                        prop_assert!(bucket.take(now, quota, cost, taker(uid), Shortfall::Refuse).is_ok());
                        given += u64::from(cost);
                    }
                    Err(_) => {}
                }
                let most = u64::from(burst) + (now - SECOND) / quota.per_token + 1;
                prop_assert!(given <= most, "{given} of {most}");
            }
        }
    }
}
