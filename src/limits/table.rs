//! Buckets by key, with a hard bound.
//!
//! - A table with no room looks for full buckets, a few per new key, starting where it last stopped. One that
//!   finds none charges the new key to its [parent](super::parents), never to a stranger, and no parent may own
//!   more than its share of the table. Keys that came back keep their buckets for a while, full or not.
//! - What a key has spent while it had no bucket of its own it has spent when it gets one. (In an overflow each
//!   quota has a bucket, so a quota that a reload brings begins with a full one there.)
//!
//! Keys stand in the table as 128 bits of a seeded hash; nobody outside can choose two that meet. Time is
//! nanoseconds since the agent started; a `now` before the latest one seen counts as that one.

use std::time::Duration;

use hashbrown::HashTable;

pub(super) use super::ask::ChargedTo;
use super::{
    apart::{ApartByKey, QuotaChange},
    ask::{Ask, BucketKey, HeldTokens},
    attempt::Attempt,
    bucket::{Bucket, Level, Quota, Shortfall},
    cells::{Cell, NOBODY, SEVERAL, Taken, cell, find, hash_at, seconds},
    parents::Parents,
    report::{BucketName, Heavy},
    shares::{Alone, AskOfShare, SharedBuckets, Shares, Taker, Taking, TooFew},
    table_size::TableSize,
};

/// Whose cell it is, for people.
type Who = (BucketName, &'static str);

/// Where tokens are held, how many, and where the caller's share is, if it has one.
type HeldAt = (ChargedTo, u32, Option<usize>);

/// How many cells a new key may look at to find room.
const LOOK: usize = 64;
/// How many it looks at where there is room, once this part of the table is taken: so that a table which a
/// flood has filled once shrinks to those who call, and memory follows.
const LOOK_EARLY: usize = 4;
const EARLY: usize = 8;
/// How long the bucket of a key that came back is kept although it is full, about a minute: else a flood of new
/// keys that leaves no room would find a polite key forgotten between two calls, and leave no room for it
/// either. [`REGULARS`] of the table may be kept like this; who came back first stays.
const REGULAR: u32 = 56;
/// The part of the table that regulars may have.
const REGULARS: usize = 2;

/// Buckets by key: at most `capacity` of them.
///
/// Cells lie densely in the order they were made, so that memory follows the number of known keys; room for the
/// rest is reserved but untouched, and a decision allocates nothing (a parent never seen before may).
#[derive(Debug)]
pub(super) struct Table {
    capacity: usize,
    index: HashTable<u32>,
    cells: Vec<Cell>,
    /// Of each cell, in the same order.
    names: Vec<Who>,
    parents: Parents,
    /// Of the buckets that several callers take from.
    shared: SharedBuckets,
    /// Of buckets that another quota made smaller.
    apart: ApartByKey,
    seed: ahash::RandomState,
    hand: usize,
    /// Cells of regulars.
    regulars: usize,
    latest: u64,
    /// Calls of keys that are not known: those that passed, and those that were refused.
    unknown: (u32, u32),
}

impl Table {
    /// A table of which a parent may own one part in `parts`.
    pub(super) fn new(size: TableSize, parts: usize) -> Self {
        let mut table = Self {
            capacity: 0,
            index: HashTable::new(),
            cells: Vec::new(),
            names: Vec::new(),
            parents: Parents::default(),
            shared: SharedBuckets::default(),
            apart: ApartByKey::default(),
            seed: ahash::RandomState::new(),
            hand: 0,
            regulars: 0,
            latest: 0,
            unknown: (0, 0),
        };
        table.resize(size, parts);
        table
    }

    /// Changes the bounds. A smaller table forgets nothing that is not full: it takes no new keys until it is
    /// below.
    pub(super) fn resize(&mut self, size: TableSize, parts: usize) {
        self.capacity = size.keys();
        self.parents.resize(self.capacity, (self.capacity / parts).max(1));
        self.cells.reserve_exact(self.capacity.saturating_sub(self.cells.len()));
        self.names.reserve_exact(self.capacity.saturating_sub(self.names.len()));
        let more = self.capacity.saturating_sub(self.index.len());
        let cells = &self.cells;
        self.index.reserve(more, |at| hash_at(cells, *at));
    }

    /// How many keys are known.
    pub(super) fn len(&self) -> usize {
        self.cells.len()
    }

    /// Holds tokens in a bucket; `who` is asked only when its key is new.
    ///
    /// # Errors
    /// The wait, as in [`Bucket::hold`].
    pub(super) fn hold(
        &mut self,
        now: u64,
        ask: &Ask,
        who: impl FnOnce() -> Who,
    ) -> Result<ChargedTo, Duration> {
        match self.hold_by(now, ask, Shortfall::Refuse, nothing_to_spare, who) {
            Ok(held) => Ok(held.place),
            Err(TooFew { wait, .. }) => Err(wait),
        }
    }

    /// [`Table::hold`] of a call that may be one that passes without tokens: as `short` says, or where a known key has too few
    /// and something is to `spare`, which else says when it will be.
    ///
    /// # Errors
    /// The wait, as [`Table::hold`], and what is left; none with [`Shortfall::Pass`].
    pub(super) fn hold_by(
        &mut self,
        now: u64,
        ask: &Ask,
        short: Shortfall,
        spare: impl FnOnce() -> Result<(), Duration>,
        who: impl FnOnce() -> Who,
    ) -> Result<HeldTokens, TooFew> {
        let now = self.tick(now);
        let mut spared = false;
        let spare = || spare().inspect(|()| spared = true);
        let (place, tokens, share) = match self.hold_known(now, ask, short, spare) {
            Some(outcome) => outcome?,
            None => self.hold_new(now, ask, short, who).map(|(place, tokens)| (place, tokens, None))?,
        };
        // Who asks for nothing is only noted.
        let passed = u32::from(ask.cost > 0 && !matches!(place, ChargedTo::Own(_)));
        self.unknown.0 = self.unknown.0.saturating_add(passed);
        let short = if spared { Shortfall::Pass } else { short };
        // Tokens that were not there are no debt of the bucket. A share had all of them, and pays.
        let of_bucket = if tokens < ask.cost { Shortfall::Pass } else { short };
        let Ask { key, quota, cost, .. } = *ask;
        Ok(HeldTokens { key, quota, cost, place, tokens, share, short, of_bucket })
    }

    /// In the bucket of a key that is known.
    fn hold_known(
        &mut self,
        now: u64,
        ask: &Ask,
        short: Shortfall,
        spare: impl FnOnce() -> Result<(), Duration>,
    ) -> Option<Result<HeldAt, TooFew>> {
        let Ask { key, quota, cost, .. } = *ask;
        let room_for_regulars = self.regulars < self.capacity / REGULARS;
        let mark = ask.taker.map(|taker| (taker, self.mark(taker)));
        let Self { index, cells, shared, apart, .. } = self;
        let at = find(index, cells, key.hash)?;
        let cell = cells.get_mut(usize::try_from(at).ok()?)?;
        let asked = cell.last_used();
        let change = QuotaChange { since: ask.since, asked };
        apart.bring_under(key.hash, &mut cell.bucket, now, change, quota);
        cell.is_asked(now, ask.attempt);
        let becomes_regular = room_for_regulars && !cell.regular;
        cell.regular |= becomes_regular;
        self.regulars += usize::from(becomes_regular);
        let shares = mark.and_then(|(taker, mark)| {
            let shares = match cell.taken_by(mark) {
                Taken::First => {
                    shared.is_alone(key.hash, taker);
                    None
                }
                Taken::Again => None,
                Taken::Second => {
                    let first = shared.was_alone(key.hash);
                    let shares = shared.of(key.hash)?;
                    if let Some(taker) = first {
                        let first = Alone { taker, asked, used: cell.used, refused: cell.refused };
                        shares.begin_with(now, quota, first, cell.bucket);
                    }
                    Some(shares)
                }
                Taken::Several => shared.of(key.hash),
            }?;
            Some((shares, AskOfShare { quota, cost, taker, short }))
        });
        let bucket = &mut cell.bucket;
        let outcome = match shares {
            Some((shares, ask)) => shares
                .hold(now, bucket, ask)
                .or_else(|lacking| match spare() {
                    Ok(()) => Ok(shares.hold_all_the_same(now, bucket, ask, lacking)),
                    Err(sooner) => Err(lacking.too_few.or_in(sooner)),
                })
                .map(|held| (held.tokens, Some(held.at))),
            None => match bucket.hold_leaving(now, quota, cost, 0) {
                Ok(()) => Ok((cost, None)),
                Err(_) if short == Shortfall::Pass => Ok((bucket.hold_some(now, quota, cost, 0), None)),
                Err(wait) => match spare() {
                    Ok(()) => Ok((bucket.hold_some(now, quota, cost, 0), None)),
                    Err(sooner) => Err(TooFew::from(wait).or_in(sooner)),
                },
            },
        };
        cell.used = cell.used.saturating_add(u32::from(outcome.is_ok()));
        Some(outcome.map(|(tokens, share)| (ChargedTo::Own(at), tokens, share)))
    }

    /// In a bucket of its own for a key that is not known, or in its parent's.
    fn hold_new(
        &mut self,
        now: u64,
        ask: &Ask,
        short: Shortfall,
        who: impl FnOnce() -> Who,
    ) -> Result<(ChargedTo, u32), Duration> {
        let Ask { key, quota, cost, taker, .. } = *ask;
        let Some(at) = self.has_room(now, key.parent).then(|| u32::try_from(self.cells.len()).ok()).flatten()
        else {
            return self.parents.hold(now, key.parent, quota, cost, short);
        };
        // Where the key was charged while there was no room, it may have spent all that was spent there. Nobody
        // gets a second burst by coming out of the overflow.
        let mut bucket = Bucket::default();
        self.parents.bequeath(now, key.parent, quota, &mut bucket);
        let held = match bucket.hold(now, quota, cost) {
            Err(_) if short == Shortfall::Pass => bucket.hold_some(now, quota, cost, 0),
            held => held.map(|()| cost)?,
        };
        if !self.parents.own_one_more(now, key.parent) {
            return self.parents.hold_stray(now, quota, cost, short);
        }
        (bucket.asked, bucket.most) = (1, 1);
        self.cells.push(Cell {
            hash: key.hash,
            parent: key.parent,
            bucket,
            used: 1,
            refused: 0,
            again: false,
            regular: false,
            seen: seconds(now),
            taker: taker.map_or(NOBODY, |taker| self.mark(taker)),
        });
        self.names.push(who());
        if let Some(taker) = taker {
            self.shared.is_alone(key.hash, taker);
        }
        let cells = &self.cells;
        self.index.insert_unique(key.hash[0], at, |at| hash_at(cells, *at));
        Ok((ChargedTo::Own(at), held))
    }

    /// A mark of a taker, small enough for a cell. Two that meet are taken for one, until a third comes.
    fn mark(&self, taker: Taker) -> u16 {
        let [low, high, ..] = self.seed.hash_one(taker.group).to_le_bytes();
        u16::from_le_bytes([low, high]).clamp(NOBODY + 1, SEVERAL - 1)
    }

    /// Ends a call that held tokens, and takes `cost`; see [`Bucket::settle`]. A bucket with tokens held is never
    /// forgotten, so it is there.
    ///
    /// It counts as ended at the latest time that the table was told. That is not before it began, and saves a
    /// look at the clock; the tokens begin to flow back no sooner than if they had been taken at once.
    pub(super) fn settle(&mut self, held: &Ask, place: ChargedTo, cost: u32) -> Option<Level> {
        self.settle_held(&HeldTokens::all(held, place, Shortfall::Refuse), cost)
    }

    /// [`Table::settle`] of what [`Table::hold_by`] gave.
    pub(super) fn settle_held(&mut self, held: &HeldTokens, cost: u32) -> Option<Level> {
        let now = self.latest;
        let HeldTokens { key, quota, cost: asked, place, tokens, share, short, of_bucket } = *held;
        let refund = u32::from(asked > 0 && cost == 0);
        let Self { index, cells, shared, parents, unknown, .. } = self;
        let bucket = match place {
            ChargedTo::Own(at) => cell(index, cells, key.hash, at).map(|cell| {
                cell.used = cell.used.saturating_sub(refund);
                if cell.taker == SEVERAL
                    // What was held before there were shares is of none.
                    && let Some(at) = share
                    && let Some(shares) = shared.of(key.hash)
                {
                    shares.settle(now, quota, at, asked, cost, short);
                }
                &mut cell.bucket
            }),
            ChargedTo::Overflow | ChargedTo::Stray => {
                unknown.0 = unknown.0.saturating_sub(refund);
                parents.bucket(key.parent, place, quota)
            }
        };
        bucket.map(|bucket| bucket.settle_by(now, quota, tokens, cost, of_bucket))
    }

    /// What a key was let pass for is refused after all: it counts as none that passed, and a token that it paid comes back.
    pub(super) fn take_back(&mut self, now: u64, key: BucketKey, paid: Option<Quota>) {
        let now = self.tick(now);
        if let Some(cell) = self.find(key.hash) {
            cell.used = cell.used.saturating_sub(1);
            if let Some(quota) = paid {
                cell.bucket.give_back_one(now, quota);
            }
        }
    }

    /// How often a key was refused since it became known.
    pub(super) fn refused(&mut self, key: BucketKey) -> u32 {
        self.find(key.hash).map_or(0, |cell| cell.refused)
    }

    /// Adds to what a known key has spent, as a debt of at most one burst. A key that is not known has a full
    /// bucket, and is left in peace: this is for a cost that shows itself after the call was charged.
    pub(super) fn charge(&mut self, now: u64, ask: &Ask, short: Shortfall) -> Option<Level> {
        self.tick(now);
        let nothing = Ask { cost: 0, ..*ask };
        let share = ask.taker.and_then(|taker| self.shared.known(ask.key.hash)?.at(taker));
        let held = HeldTokens { share, ..HeldTokens::all(&nothing, ChargedTo::Own(u32::MAX), short) };
        self.settle_held(&held, ask.cost)
    }

    /// Charges a call that is over, known key or not. Where there are too few tokens, its bucket owes them.
    pub(super) fn charge_late(
        &mut self,
        now: u64,
        ask: &Ask,
        short: Shortfall,
        who: impl FnOnce() -> Who,
    ) -> Option<Level> {
        let held = self.hold_by(now, ask, Shortfall::Pass, nothing_to_spare, who).ok()?;
        self.settle_held(&HeldTokens { short, of_bucket: short, ..held }, ask.cost)
    }

    /// Counts for people that a key was refused, whatever for: it becomes known, if there is room, with a
    /// bucket of this quota that nothing is taken from.
    pub(super) fn note_refused_anybody(
        &mut self,
        now: u64,
        key: BucketKey,
        quota: Quota,
        who: impl FnOnce() -> Who,
    ) {
        if !self.knows(key) {
            let ask = Ask { key, quota, since: 0, cost: 0, taker: None, attempt: Attempt::Only };
            if let Ok(place) = self.hold(now, &ask, who) {
                self.settle(&ask, place, 0);
            }
            if let Some(cell) = self.find(key.hash) {
                // Nothing was let pass.
                (cell.used, cell.bucket.asked, cell.bucket.most) = (0, 0, 0);
            }
        }
        self.note_refused(key, None);
    }

    /// Counts for people that a known key asked for something that its bucket was not asked for.
    pub(super) fn note_asked(&mut self, now: u64, key: BucketKey, attempt: Attempt) {
        let now = self.tick(now);
        if let Some(cell) = self.find(key.hash) {
            cell.is_asked(now, attempt);
        }
    }

    /// Whether a key has a bucket of its own.
    pub(super) fn knows(&self, key: BucketKey) -> bool {
        find(&self.index, &self.cells, key.hash).is_some()
    }

    /// How many calls passed that were of keys without a bucket of their own, and how many were refused.
    pub(super) fn unknown(&self) -> (u32, u32) {
        self.unknown
    }

    /// Counts for people that a call was refused. One that had to wait and then passed was not.
    pub(super) fn note_refused(&mut self, key: BucketKey, taker: Option<Taker>) {
        if let Some(cell) = self.find(key.hash) {
            cell.again = true;
            cell.refused = cell.refused.saturating_add(1);
            if let Some(taker) = taker {
                self.shared.note_refused(key.hash, taker);
            }
        } else {
            self.unknown.1 = self.unknown.1.saturating_add(1);
        }
    }

    /// Tokens left to a key, if it is known, or in what it would be charged to.
    pub(super) fn left(&mut self, now: u64, key: BucketKey, quota: Quota, since: u64) -> Option<u32> {
        let now = self.tick(now);
        let bucket = self.bucket_under(now, key, quota, since);
        Some(bucket.or_else(|| self.overflow_of(now, key, quota))?.left(now, quota))
    }

    /// Whether a key has no bucket of its own, and what it would be charged to, or begin with, is not full.
    pub(super) fn is_in_overflow(&mut self, now: u64, key: BucketKey, quota: Quota) -> bool {
        let now = self.tick(now);
        !self.knows(key) && self.overflow_of(now, key, quota).is_some()
    }

    /// What a key without a bucket of its own would be charged to, or begin with, where that is not full.
    fn overflow_of(&mut self, now: u64, key: BucketKey, quota: Quota) -> Option<Bucket> {
        let mut bucket = Bucket::default();
        self.parents.bequeath(now, key.parent, quota, &mut bucket);
        (!bucket.is_full(now)).then_some(bucket)
    }

    /// The bucket of a key that is known, as it is under this quota.
    fn bucket_under(&mut self, now: u64, key: BucketKey, quota: Quota, since: u64) -> Option<Bucket> {
        let cell = self.find(key.hash)?;
        let (mut bucket, change) = (cell.bucket, QuotaChange { since, asked: cell.last_used() });
        let mut apart = self.apart.of(key.hash, &bucket).copied();
        bucket.come_under(now, change, quota, &mut apart);
        Some(bucket)
    }

    /// How long until a key that is known has a token, or one that is not has one where it would be charged.
    pub(super) fn wait(&mut self, now: u64, key: BucketKey, quota: Quota) -> Option<Duration> {
        let now = self.tick(now);
        let bucket = self.bucket_under(now, key, quota, now);
        bucket.or_else(|| self.overflow_of(now, key, quota))?.try_hold(now, quota, 1).err()
    }

    /// The `n` keys that were refused most, then those that were served most, since each was last forgotten.
    pub(super) fn heaviest(&self, n: usize) -> Vec<Heavy> {
        let weight = |cell: &Cell| (cell.refused, cell.used);
        let mut top: Vec<(&Cell, &Who)> = Vec::with_capacity(n.min(self.cells.len()).saturating_add(1));
        for (cell, who) in self.cells.iter().zip(&self.names) {
            let at = top.partition_point(|(other, _)| weight(other) >= weight(cell));
            if at < n {
                top.insert(at, (cell, who));
                top.truncate(n);
            }
        }
        let heavy = |(cell, (name, what)): (&Cell, &Who)| Heavy {
            name: name.clone(),
            what,
            used: cell.used,
            refused: cell.refused,
            most: u32::from(cell.bucket.most),
            takings: self.takings(cell.hash),
        };
        top.into_iter().map(heavy).collect()
    }

    /// Who takes from a bucket, where several do.
    pub(super) fn takings(&self, hash: [u64; 2]) -> Vec<Taking> {
        self.shared.known(hash).map(Shares::takings).unwrap_or_default()
    }

    /// Forgets every full bucket and returns memory: for when memory is short. The time it takes grows with the
    /// table (about 10 ns a key).
    pub(super) fn forget_full(&mut self, now: u64) {
        let now = self.tick(now);
        let mut at = 0;
        while let Some(cell) = self.cells.get(at) {
            let is_full = cell.bucket.is_full_with(now, self.apart.of(cell.hash, &cell.bucket));
            if is_full { self.forget(now, at) } else { at += 1 }
        }
        self.parents.shrink(now);
        self.apart.shrink();
    }

    fn tick(&mut self, now: u64) -> u64 {
        self.latest = self.latest.max(now);
        self.latest
    }

    fn find(&mut self, hash: [u64; 2]) -> Option<&mut Cell> {
        let at = find(&self.index, &self.cells, hash)?;
        self.cells.get_mut(usize::try_from(at).ok()?)
    }

    /// Whether one more key of this parent may have a cell; looks for cells to forget when not.
    fn has_room(&mut self, now: u64, parent: u64) -> bool {
        if self.cells.len() >= self.capacity / EARLY {
            self.look_for_full(now, LOOK_EARLY);
        }
        if self.fits(parent) {
            return true;
        }
        self.look_for_full(now, LOOK);
        self.fits(parent)
    }

    fn fits(&self, parent: u64) -> bool {
        self.cells.len() < self.capacity && self.parents.may_own_more(parent)
    }

    /// Moves the hand over so many cells and forgets the full ones among them.
    fn look_for_full(&mut self, now: u64, cells: usize) {
        for _ in 0..cells {
            if self.hand >= self.cells.len() {
                self.hand = 0;
            }
            let Self { cells, apart, .. } = self;
            let Some(cell) = cells.get_mut(self.hand) else { return };
            let kept = apart.of(cell.hash, &cell.bucket);
            let stays = cell.regular && seconds(now).saturating_sub(cell.seen) < REGULAR;
            if stays || !cell.bucket.is_full_with(now, kept) {
                self.hand += 1;
            } else if cell.again {
                cell.again = false;
                self.hand += 1;
            } else {
                self.forget(now, self.hand);
            }
        }
    }

    /// Takes a cell out; the last one moves into its place.
    fn forget(&mut self, now: u64, at: usize) {
        let Some(hash) = self.cells.get(at).map(|cell| cell.hash) else { return };
        let last = self.cells.len() - 1;
        let is = |place: u32, wanted: usize| usize::try_from(place).is_ok_and(|place| place == wanted);
        if let Ok(entry) = self.index.find_entry(hash[0], |place| is(*place, at)) {
            entry.remove();
        }
        if let (Some(moved), Ok(to)) = (self.cells.get(last).map(|cell| cell.hash), u32::try_from(at))
            && last != at
            && let Some(place) = self.index.find_mut(moved[0], |place| is(*place, last))
        {
            *place = to;
        }
        let cell = self.cells.swap_remove(at);
        if cell.taker != NOBODY {
            self.shared.forget(cell.hash);
        }
        self.apart.forget(cell.hash, &cell.bucket);
        self.regulars -= usize::from(cell.regular);
        drop(self.names.swap_remove(at));
        self.parents.own_one_less(now, cell.parent);
    }
}

/// For who is let pass by tokens alone.
pub(super) fn nothing_to_spare() -> Result<(), Duration> {
    Err(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::{bucket::Per, caller::CallerKey};

    const SECOND: u64 = 1_000_000_000;

    fn quota(rate: f64, burst: u32) -> Quota {
        Quota::new(rate, Per::Second, burst).unwrap()
    }

    fn a_table(keys: u32, parts: usize) -> Table {
        Table::new(TableSize::new(keys).unwrap(), parts)
    }

    /// A call that shares its bucket with nobody.
    fn ask(key: BucketKey, quota: Quota, cost: u32) -> Ask {
        Ask { key, quota, since: 0, cost, taker: None, attempt: Attempt::Only }
    }

    fn heavy(uid: u32) -> Who {
        (BucketName::Caller(CallerKey::Uid(uid)), "test")
    }

    /// Whoever took alone until a second came has had that, of its share too, and is named.
    #[test]
    fn who_was_alone_has_a_share_as_well() {
        let quota = quota(0.001, 40);
        let key = BucketKey { hash: [1; 2], parent: 1 };
        // Callers in turn, and how many calls each makes.
        for (case, calls, want) in [
            ("one that takes little, one that shouts", &[(1, 1), (2, 60), (1, 5)][..], &[1, 20, 5][..]),
            ("one that shouts comes first", &[(1, 30), (2, 10), (1, 10)], &[30, 10, 0]),
            ("it has taken all", &[(1, 60), (2, 1)], &[40, 0]),
        ] {
            let mut table = a_table(16, 1);
            let mut call = |uid| {
                let taker = Taker { caller: CallerKey::Uid(uid), group: uid.into() };
                let ask = Ask { taker: Some(taker), ..ask(key, quota, 1) };
                let held = table.hold_by(SECOND, &ask, Shortfall::Refuse, nothing_to_spare, || heavy(0));
                match held {
                    Ok(held) => drop(table.settle_held(&held, 1)),
                    Err(_) => table.note_refused(key, Some(taker)),
                }
                held.is_ok()
            };
            let passed: Vec<usize> =
                calls.iter().map(|(uid, calls)| (0..*calls).filter(|_| call(*uid)).count()).collect();
            assert_eq!(passed, want, "{case}");
            let heaviest = table.heaviest(1);
            let takings = &heaviest[0].takings;
            let sum = |count: fn(&Taking) -> u32| takings.iter().map(count).sum::<u32>();
            assert_eq!(
                (heaviest[0].used, heaviest[0].refused),
                (sum(|it| it.used), sum(|it| it.refused)),
                "{case}"
            );
            for uid in [1, 2] {
                let asked: usize = calls.iter().filter(|(who, _)| *who == uid).map(|(_, calls)| calls).sum();
                let told = takings.iter().find(|it| it.caller == Some(CallerKey::Uid(uid))).unwrap();
                assert_eq!(usize::try_from(told.used + told.refused).unwrap(), asked, "{case}: {uid}");
            }
        }
    }

    /// What a smaller quota keeps apart is forgotten when it is back, and not before.
    #[test]
    fn a_key_is_known_while_tokens_of_it_are_kept_apart() {
        let mut table = a_table(16, 1);
        let key = BucketKey { hash: [1; 2], parent: 1 };
        let (large, small) = (quota(1.0, 100), quota(10.0, 5));
        let take = |table: &mut Table, now, quota, since| {
            let ask = Ask { since, ..ask(key, quota, 1) };
            let held = table.hold(now, &ask, || heavy(1));
            held.inspect(|place| {
                table.settle(&ask, *place, 1);
            })
        };
        assert!((0..100).all(|_| take(&mut table, 1, large, 0).is_ok()));
        let changed = 10 * SECOND;
        take(&mut table, changed, small, changed).unwrap_err();
        take(&mut table, changed + SECOND, small, changed).unwrap();
        assert_eq!(table.left(changed + 2 * SECOND, key, small, changed), Some(5));
        let back = changed + 4 * SECOND;
        assert_eq!(
            table.left(back, key, large, back),
            Some(18),
            "all but what was spent and is not back yet"
        );
        table.forget_full(back);
        assert_eq!((table.len(), table.apart.len()), (1, 1));
        take(&mut table, back, large, back).unwrap();
        assert_eq!(table.apart.len(), 0, "it is of the bucket again");
        take(&mut table, back, small, back).unwrap_err();
        table.forget_full(back + 90 * SECOND);
        assert_eq!((table.len(), table.apart.len()), (0, 0));
    }

    /// Methods with other quotas than each other's share no bucket, in an overflow neither: the smaller would
    /// forgive what the larger has spent.
    #[test]
    fn quotas_are_not_mixed_in_an_overflow() {
        let (many, few) = (quota(1.0, 200), quota(0.1, 5));
        let mut table = a_table(16, 16);
        let key = |number| BucketKey { hash: [number; 2], parent: 1 };
        table.hold(0, &ask(key(1), many, 1), || heavy(1)).unwrap();
        let mut take = |quota: Quota, number| {
            let held = table.hold(0, &ask(key(number), quota, 1), || heavy(2));
            held.inspect(|place| {
                assert_eq!(*place, ChargedTo::Overflow);
                table.settle(&ask(key(number), quota, 1), *place, 1);
            })
            .is_ok()
        };
        let (mut of_many, mut of_few) = (0, 0);
        for round in 0..1000 {
            of_many += u32::from(take(many, 10 + round));
            of_few += u32::from(take(few, 5000 + round));
        }
        assert_eq!((of_many, of_few), (200, 5));
    }

    /// After a flood the table shrinks to those who call.
    #[test]
    fn a_table_shrinks_to_those_who_call() {
        let mut table = a_table(1024, 1);
        let quota = quota(10.0, 10);
        let mut call = |now, number: u64| {
            let key = BucketKey { hash: [number; 2], parent: number };
            let place = table.hold(now, &ask(key, quota, 1), || heavy(1)).unwrap();
            table.settle(&ask(key, quota, 1), place, 1);
            table.len()
        };
        for number in 0..1024 {
            call(0, number);
        }
        let known: Vec<usize> = (0..1000).map(|nth| call(SECOND * (1 + nth), 10_000 + nth)).collect();
        assert!(known[999] <= 1024 / EARLY + 2, "{}", known[999]);
    }

    #[test]
    fn a_cost_above_the_burst_never_passes() {
        let quota = quota(1.0, 10);
        let mut table = a_table(16, 1);
        let key = BucketKey { hash: [1, 1], parent: 1 };
        for now in [0, SECOND, 100 * SECOND] {
            assert!(table.hold(now, &ask(key, quota, 11), || heavy(1)).is_err());
        }
        assert!(table.len() == 0, "nothing is kept of it");
    }

    #[test]
    fn the_heaviest_come_first() {
        let mut table = a_table(64, 1);
        for (uid, calls) in [(1, 3), (2, 30), (3, 12), (4, 1)] {
            for _ in 0..calls {
                let key = BucketKey { hash: [u64::from(uid); 2], parent: 0 };
                let ask = ask(key, quota(1.0, 10), 1);
                match table.hold(0, &ask, || heavy(uid)) {
                    Ok(place) => drop(table.settle(&ask, place, 1)),
                    Err(_wait) => table.note_refused(key, None),
                }
            }
        }
        let seen: Vec<_> =
            table.heaviest(3).iter().map(|it| (it.name.to_string(), it.used, it.refused)).collect();
        assert_eq!(seen, [("uid:2".into(), 10, 20), ("uid:3".into(), 10, 2), ("uid:1".into(), 3, 0)]);
        assert_eq!(table.heaviest(0), []);
    }

    #[test]
    fn a_known_key_takes_the_memory_that_is_accounted() {
        let index = 2 * (size_of::<u32>() + 1);
        let parent = 2 * Parents::EACH;
        let bytes = u64::try_from(size_of::<Cell>() + size_of::<Who>() + index + parent).unwrap();
        assert_eq!(size_of::<Cell>(), 64);
        assert!(bytes <= crate::limits::budget::KEY, "{bytes}");
    }

    /// One step of a game against a small table.
    #[derive(Clone, Debug)]
    enum Move {
        /// A call of the key under test: held, and ended after some more moves with this outcome.
        Call { cost: u32, later: bool, refund: bool },
        /// Calls of `count` other keys from `first` on, of some parent.
        Flood { parent: u64, first: u32, count: u32, cost: u32 },
        /// Time passes.
        Wait(u64),
        /// A clock that is wrong.
        Back(u64),
        /// All calls under way end.
        End,
    }

    fn moves(parents: u64) -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            4 => (1..4_u32, any::<bool>(), any::<bool>())
                .prop_map(|(cost, later, refund)| Move::Call { cost, later, refund }),
            3 => (0..parents, 0..1_000_000_u32, 1..80_u32, 1..4_u32)
                .prop_map(|(parent, first, count, cost)| Move::Flood { parent, first, count, cost }),
            3 => (0..4 * SECOND).prop_map(Move::Wait),
            1 => (0..4 * SECOND).prop_map(Move::Back),
            1 => Just(Move::End),
        ];
        prop::collection::vec(one, 1..80)
    }

    const MINE: BucketKey = BucketKey { hash: [u64::MAX, 7], parent: 3 };

    fn flood_key(parent: u64, number: u32) -> BucketKey {
        // The low half of the hash is what the index looks at: let keys meet there.
        BucketKey { hash: [u64::from(number % 97), u64::from(number)], parent }
    }

    /// A call of each of these keys, paid at once where it passes.
    fn flood(table: &mut Table, now: u64, quota: Quota, cost: u32, keys: impl Iterator<Item = BucketKey>) {
        for key in keys {
            if let Ok(place) = table.hold(now, &ask(key, quota, cost), || heavy(0)) {
                table.settle(&ask(key, quota, cost), place, cost);
            }
        }
    }

    /// Plays the game; gives what the key under test took and when.
    fn play(moves: Vec<Move>, quota: Quota) -> Vec<(u64, u32)> {
        let mut table = a_table(16, 4);
        // The latest time that the table was told: it cannot know of others.
        let (mut now, mut latest) = (SECOND, 0);
        let mut taken = Vec::new();
        let mut open: Vec<(ChargedTo, u32, bool)> = Vec::new();
        for step in moves {
            let mut ended = Vec::new();
            if !matches!(step, Move::Wait(_) | Move::Back(_)) {
                latest = latest.max(now);
                table.charge(now, &ask(flood_key(0, u32::MAX), quota, 0), Shortfall::Refuse);
            }
            match step {
                Move::Call { cost, later, refund } => {
                    if let Ok(place) = table.hold(now, &ask(MINE, quota, cost), || heavy(0)) {
                        if later {
                            open.push((place, cost, refund))
                        } else {
                            ended.push((place, cost, refund))
                        }
                    }
                }
                Move::Flood { parent, first, count, cost } => {
                    flood(&mut table, now, quota, cost, (first..first + count).map(|n| flood_key(parent, n)));
                }
                Move::Wait(time) => now += time,
                Move::Back(time) => now = now.saturating_sub(time),
                Move::End => ended.append(&mut open),
            }
            for (place, cost, refund) in ended {
                table.settle(&ask(MINE, quota, cost), place, if refund { 0 } else { cost });
                if !refund {
                    taken.push((latest, cost));
                }
            }
            assert!(table.len() <= 16 && table.parents.len() <= 16);
        }
        taken
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// Whatever others do, and in whatever order: in no span of time more than the burst and what flowed in.
        #[test]
        fn never_more_than_burst_and_rate(moves in moves(40), burst in 3..12_u32) {
            let quota = quota(2.0, burst);
            let taken = play(moves, quota);
            for (at, (from, _)) in taken.iter().enumerate() {
                let mut sum = 0;
                for (to, cost) in taken.iter().skip(at) {
                    sum += u64::from(*cost);
                    let allowed = quota.refill() + (to - from);
                    prop_assert!(sum * quota.per_token <= allowed, "{sum} tokens from {from} to {to}");
                }
            }
        }

        /// A caller within its quota passes each time, known to the table or forgotten meanwhile, while others
        /// flood it with keys of fewer parents than the table has room for.
        #[test]
        fn a_polite_key_is_never_refused(moves in moves(15)) {
            let quota = quota(2.0, 3);
            let mut table = a_table(16, 4);
            let mut now = SECOND;
            let mine = BucketKey { parent: 99, ..MINE };
            for step in moves {
                match step {
                    Move::Flood { parent, first, count, cost } => {
                        flood(&mut table, now, quota, cost, (first..first + count).map(|n| flood_key(parent, n)));
                    }
                    // Three tokens, and the time in which they come back.
                    Move::Call { cost, .. } => {
                        let held = table.hold(now, &ask(mine, quota, cost), || heavy(0));
                        prop_assert!(held.is_ok(), "{held:?}");
                        let place = held.unwrap();
                        prop_assert!(place != ChargedTo::Stray);
                        table.settle(&ask(mine, quota, cost), place, cost);
                        now += u64::from(cost) * quota.per_token;
                    }
                    Move::Wait(time) => now += time,
                    Move::Back(_) | Move::End => {}
                }
            }
        }

        /// A polite caller that came back once is never refused, however many parents the keys of a flood have.
        #[test]
        fn a_regular_is_never_refused(moves in moves(1000)) {
            let quota = quota(2.0, 3);
            let mut table = a_table(16, 4);
            let mut now = SECOND;
            let mine = BucketKey { parent: 5000, ..MINE };
            for _ in 0..2 {
                let place = table.hold(now, &ask(mine, quota, 1), || heavy(0)).unwrap();
                table.settle(&ask(mine, quota, 1), place, 1);
            }
            now += 2 * quota.per_token;
            for step in moves {
                match step {
                    Move::Flood { parent, first, count, cost } => {
                        // Each of a parent of its own.
                        let key = |n| BucketKey { parent: parent.wrapping_mul(31) ^ u64::from(n), ..flood_key(parent, n) };
                        flood(&mut table, now, quota, cost, (first..first + count).map(key));
                    }
                    Move::Call { cost, .. } => {
                        let held = table.hold(now, &ask(mine, quota, cost), || heavy(0));
                        prop_assert!(matches!(held, Ok(ChargedTo::Own(_))), "{held:?}");
                        table.settle(&ask(mine, quota, cost), held.unwrap(), cost);
                        now += u64::from(cost) * quota.per_token;
                    }
                    // Never as long as a regular may be away.
                    Move::Wait(time) => now += time / 4,
                    Move::Back(_) | Move::End => {}
                }
                prop_assert_eq!(table.regulars, table.cells.iter().filter(|cell| cell.regular).count());
                prop_assert!(table.regulars <= 8);
            }
        }

        /// After the wait that was told, the same call passes.
        #[test]
        fn the_wait_is_true(moves in moves(40), cost in 1..4_u32) {
            let quota = quota(2.0, 3);
            let mut table = a_table(16, 4);
            let mut now = SECOND;
            for step in moves {
                match step {
                    Move::Call { cost, .. } => {
                        if let Ok(place) = table.hold(now, &ask(MINE, quota, cost), || heavy(0)) {
                            table.settle(&ask(MINE, quota, cost), place, cost);
                        }
                    }
                    Move::Flood { parent, first, count, cost } => {
                        flood(&mut table, now, quota, cost, (first..first + count).map(|n| flood_key(parent, n)));
                    }
                    Move::Wait(time) => now += time,
                    Move::Back(_) | Move::End => {}
                }
            }
            if let Err(wait) = table.hold(now, &ask(MINE, quota, cost), || heavy(0)) {
                let wait = u64::try_from(wait.as_nanos()).unwrap();
                prop_assert!(wait > 0);
                let early = table.hold(now + wait - 1, &ask(MINE, quota, cost), || heavy(0));
                prop_assert!(early.is_err(), "a nanosecond less is too early");
                let held = table.hold(now + wait, &ask(MINE, quota, cost), || heavy(0));
                prop_assert!(held.is_ok(), "{held:?}");
            }
        }

        /// A call that is refused further on leaves the bucket as if it had never come, whenever it ends.
        #[test]
        fn a_refund_restores_exactly(
            before in prop::collection::vec((0..SECOND, 1..3_u32), 0..10),
            during in prop::collection::vec((0..SECOND, 1..3_u32), 0..10),
            cost in 1..4_u32,
        ) {
            let quota = quota(2.0, 60);
            let (mut with, mut without) = (Bucket::default(), Bucket::default());
            let mut now = 0;
            let spend = |bucket: &mut Bucket, now, cost| {
                let held = bucket.hold(now, quota, cost);
                bucket.settle(now, quota, if held.is_ok() { cost } else { 0 }, if held.is_ok() { cost } else { 0 });
            };
            for (wait, cost) in before {
                now += wait;
                spend(&mut with, now, cost);
                spend(&mut without, now, cost);
            }
            prop_assert!(with.hold(now, quota, cost).is_ok());
            for (wait, cost) in during {
                now += wait;
                spend(&mut with, now, cost);
                spend(&mut without, now, cost);
            }
            with.settle(now, quota, cost, 0);
            without.settle(now, quota, 0, 0);
            prop_assert_eq!(with, without);
            prop_assert!(with.left(now, quota) <= quota.burst());
        }

        /// The table agrees with itself: each key it knows is found, and parents own what they own.
        #[test]
        fn the_index_and_the_cells_agree(calls in prop::collection::vec((0..8_u64, 0..200_u32, 0..SECOND), 0..300)) {
            let quota = quota(2.0, 3);
            let mut table = a_table(16, 4);
            let mut now = SECOND;
            for (parent, number, wait) in calls {
                now += wait / 4;
                let key = flood_key(parent, number);
                if let Ok(place) = table.hold(now, &ask(key, quota, 1), || heavy(number)) {
                    table.settle(&ask(key, quota, 1), place, 1);
                }
                prop_assert_eq!(table.index.len(), table.cells.len());
                let hashes: Vec<_> = table.cells.iter().map(|cell| (cell.hash, cell.parent)).collect();
                for (hash, parent) in &hashes {
                    prop_assert!(table.find(*hash).is_some_and(|cell| cell.hash == *hash));
                    let owned = hashes.iter().filter(|(_, other)| other == parent).count();
                    prop_assert_eq!(table.parents.owned(*parent), owned);
                    prop_assert!(owned <= 4);
                }
            }
            now += 100 * SECOND;
            table.forget_full(now);
            prop_assert!(table.len() == 0 && table.index.is_empty() && table.parents.len() == 0);
        }
    }
}
