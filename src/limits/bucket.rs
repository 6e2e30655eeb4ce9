//! Token buckets, and a table of them with a hard bound.
//!
//! A bucket is kept as the moment when it would be full again (the form that ATM's GCRA has), so that a bucket that
//! is full says so without anybody knowing its quota: that moment is past. **Only such a bucket may be forgotten**:
//! a fresh one equals it, so forgetting never gives tokens back. Everything else here follows from that:
//!
//! - A table with no room looks for full buckets, a few per new key, starting where it last stopped. One that finds
//!   none charges the new key to the overflow bucket of its *parent* (whoever can invent keys), never to a stranger's,
//!   and no parent may own more than its share of the table. Keys that are known keep their buckets.
//! - The quota comes with each call. A reload changes it from one call to the next; what was spent stays spent.
//! - A call first *holds* tokens, and *settles* when it is known what it cost: nothing (it was refused further on), the
//!   price of an answer, or more than was held, which is then a debt of at most one burst. Until then nothing has moved,
//!   so a refund restores exactly what was.
//!
//! Keys stand in the table as 128 bits of a seeded hash; nobody outside can choose two that meet. Time is nanoseconds since
//! the agent started; a `now` before the latest one seen counts as that one.

use std::{num::NonZeroU32, time::Duration};

use hashbrown::HashTable;

use super::report::Heavy;

/// The highest rate, in tokens per second. Above it a bucket is no protection; say `unlimited`.
pub const MAX_RATE: f64 = 1_000_000.0;
/// The largest burst, in tokens.
pub const MAX_BURST: u32 = 1_000_000;
/// The longest that an empty bucket may take to fill: 366 days. It keeps all sums of this module far from overflow.
pub const MAX_REFILL: Duration = Duration::from_secs(366 * 86_400);

/// The unit of a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Per {
    /// Per second.
    #[default]
    Second,
    /// Per 60 seconds.
    Minute,
    /// Per 3,600 seconds.
    Hour,
    /// Per 86,400 seconds.
    Day,
}

impl Per {
    /// Parses `second`, `minute`, `hour` or `day`.
    ///
    /// # Errors
    /// [`QuotaError::Unit`] for any other text.
    pub fn parse(text: &str) -> Result<Self, QuotaError> {
        match text {
            "second" => Ok(Self::Second),
            "minute" => Ok(Self::Minute),
            "hour" => Ok(Self::Hour),
            "day" => Ok(Self::Day),
            _ => Err(QuotaError::Unit(text.into())),
        }
    }

    fn seconds(self) -> f64 {
        match self {
            Self::Second => 1.0,
            Self::Minute => 60.0,
            Self::Hour => 3_600.0,
            Self::Day => 86_400.0,
        }
    }
}

/// Why numbers make no quota.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuotaError {
    /// Zero, negative, NaN or infinite, or more than [`MAX_RATE`].
    #[error(
        "rate {0} must be above 0 and at most 1000000 per second (use \"block\" for none, \"unlimited\" for no limit)"
    )]
    Rate(f64),
    /// Zero, or more than [`MAX_BURST`].
    #[error("burst {0} must be from 1 to 1000000")]
    Burst(u32),
    /// An empty bucket would need more than [`MAX_REFILL`].
    #[error("burst {burst} at this rate takes {days} days to come back; it must be at most 366")]
    Refill {
        /// The burst.
        burst: u32,
        /// How long it takes.
        days: u64,
    },
    /// Not a unit.
    #[error("unit \"{0}\" must be second, minute, hour or day")]
    Unit(Box<str>),
}

/// How many tokens a bucket holds and how fast they come back. No part is zero, so that it always admits in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nanoseconds until one token is back.
    per_token: u64,
    burst: u32,
}

impl Quota {
    /// `rate` tokens per `per`, at most `burst` at once. Fractions of a token per unit are fine: 0.5 per minute.
    ///
    /// # Errors
    /// [`QuotaError`] when a number is outside its bounds.
    pub fn new(rate: f64, per: Per, burst: u32) -> Result<Self, QuotaError> {
        let per_second = rate / per.seconds();
        // Written so that NaN fails too.
        if !(per_second > 0.0 && per_second <= MAX_RATE) {
            return Err(QuotaError::Rate(rate));
        }
        if burst == 0 || burst > MAX_BURST {
            return Err(QuotaError::Burst(burst));
        }
        // Rounded up: never more than was asked for.
        let price = (1e9 / per_second).ceil();
        let refill = price * f64::from(burst);
        if refill > MAX_REFILL.as_secs_f64() * 1e9 {
            #[expect(clippy::as_conversions, reason = "saturates, which is what an error message may do")]
            let days = (refill / 86_400e9).ceil() as u64;
            return Err(QuotaError::Refill { burst, days });
        }
        #[expect(clippy::as_conversions, reason = "1e3 ..= 3.2e16 was checked above, and it has no fraction")]
        let per_token = price as u64;
        Ok(Self { per_token, burst })
    }

    /// `rate` tokens a second, `burst` at once; for the defaults, and for spire-agent's keys, where both are one number.
    ///
    /// # Errors
    /// [`QuotaError`] when a number is above its bound.
    pub fn per_second(rate: NonZeroU32, burst: NonZeroU32) -> Result<Self, QuotaError> {
        Self::new(f64::from(rate.get()), Per::Second, burst.get())
    }

    /// The most tokens at once.
    pub fn burst(self) -> u32 {
        self.burst
    }

    /// How long until one token is back.
    pub fn per_token(self) -> Duration {
        Duration::from_nanos(self.per_token)
    }

    /// Nanoseconds from empty to full.
    fn refill(self) -> u64 {
        self.per_token * u64::from(self.burst)
    }

    pub(super) const fn constant(per_second: u32, burst: u32) -> Self {
        #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
        let rate = per_second as u64;
        Self { per_token: 1_000_000_000 / rate, burst }
    }
}

/// How full a bucket was before and after tokens were held, for soft limits. In nanoseconds of refill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    before: u64,
    after: u64,
    refill: u64,
}

impl Level {
    /// Whether this call took the bucket from below `percent` used to it or above.
    pub fn crossed(self, percent: u8) -> bool {
        // At most 2 x 3.2e16 x 100: fits.
        let line = self.refill * u64::from(percent);
        self.before * 100 < line && self.after * 100 >= line
    }
}

/// One bucket. Full when new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it would be full again if nobody took more.
    full_at: u64,
    /// The price of a token that `full_at` was reckoned with; 0 in a new one.
    per_token: u64,
    /// Tokens of calls under way.
    held: u32,
}

impl Bucket {
    /// Whether a fresh bucket would do just as well.
    pub fn is_full(&self, now: u64) -> bool {
        self.held == 0 && self.full_at <= now
    }

    /// Tokens that could be taken now, whole ones.
    pub fn left(&self, now: u64, quota: Quota) -> u32 {
        let mut copy = *self;
        let used = copy.spent(now, quota) + u64::from(copy.held) * quota.per_token;
        let left = quota.refill().saturating_sub(used) / quota.per_token;
        u32::try_from(left).unwrap_or(quota.burst)
    }

    /// Holds `cost` tokens for a call that begins.
    ///
    /// # Errors
    /// The time after which the same would succeed, if nobody takes or settles anything meanwhile.
    pub fn hold(&mut self, now: u64, quota: Quota, cost: u32) -> Result<Level, Duration> {
        let refill = quota.refill();
        let before = self.spent(now, quota) + u64::from(self.held) * quota.per_token;
        let after = before + u64::from(cost) * quota.per_token;
        if after > refill {
            return Err(Duration::from_nanos(after - refill));
        }
        self.held += cost;
        Ok(Level { before, after, refill })
    }

    /// Ends a call: lets go of the `held` tokens and takes `cost`. No cost is a refund; a cost above what was held is
    /// a debt, of which a bucket carries at most one burst.
    pub fn settle(&mut self, now: u64, quota: Quota, held: u32, cost: u32) {
        self.held = self.held.saturating_sub(held);
        // A reload may have changed the price since the hold; tokens are tokens.
        let quota = Quota { per_token: self.per_token.max(1), burst: quota.burst };
        let spent = self.spent(now, quota) + u64::from(cost) * quota.per_token;
        self.full_at = now + spent.min(2 * quota.refill());
    }

    /// What is spent now, in nanoseconds of refill. Reckons anew when the price has changed, so that the number of
    /// tokens spent stays, and no bucket owes more than one burst beyond empty.
    fn spent(&mut self, now: u64, quota: Quota) -> u64 {
        let mut spent = self.full_at.saturating_sub(now);
        if self.per_token != quota.per_token {
            if spent > 0 {
                let tokens_to_new_price = u128::from(spent) * u128::from(quota.per_token);
                let converted = tokens_to_new_price.div_ceil(u128::from(self.per_token.max(1)));
                spent = u64::try_from(converted).unwrap_or(u64::MAX);
            }
            self.per_token = quota.per_token;
        }
        spent = spent.min(2 * quota.refill());
        self.full_at = now + spent;
        spent
    }
}

/// Whose bucket: a seeded hash of the key, and who could invent more keys like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Of everything that tells this bucket from another.
    pub hash: [u64; 2],
    /// Who is charged when there is no room for a bucket of its own.
    pub parent: u64,
}

/// Makes keys. Seeded at random once per agent.
#[derive(Debug, Default)]
pub struct Hasher([ahash::RandomState; 2]);

impl Hasher {
    /// The hash of `value`.
    pub fn hash(&self, value: impl std::hash::Hash) -> [u64; 2] {
        self.0.each_ref().map(|state| state.hash_one(&value))
    }
}

/// Which bucket a call was charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its own.
    Own,
    /// Its parent's: there was no room.
    Overflow,
    /// The one of last resort: there was no room for another parent either.
    Stray,
}

#[derive(Debug)]
struct Cell {
    hash: [u64; 2],
    parent: u64,
    bucket: Bucket,
    /// Used again since the hand last passed: such a bucket is forgotten a round later than one used once.
    again: bool,
    seen: Heavy,
}

#[derive(Debug)]
struct Parent {
    id: u64,
    owned: usize,
    overflow: Bucket,
}

/// How many cells a new key may look at to find room.
const LOOK: usize = 64;
/// How often, at most, all parents are looked through, in nanoseconds per 16,384 of capacity.
const PARENTS_PAUSE: u64 = 10_000_000;

/// Buckets by key: at most `capacity` of them, of which one parent owns at most `per_parent`.
///
/// Cells lie densely in the order they were made, so that memory follows the number of known keys; room for the rest
/// is reserved but untouched, and a decision allocates nothing (a parent never seen before may).
#[derive(Debug)]
pub struct Table {
    capacity: usize,
    per_parent: usize,
    index: HashTable<u32>,
    cells: Vec<Cell>,
    parents: HashTable<Parent>,
    stray: Bucket,
    seed: ahash::RandomState,
    hand: usize,
    latest: u64,
    parents_seen: u64,
}

impl Table {
    /// A table of `capacity` keys (at least 16), of which a parent may own `per_parent` (at least 1).
    pub fn new(capacity: usize, per_parent: usize) -> Self {
        let mut table = Self {
            capacity: 0,
            per_parent: 1,
            index: HashTable::new(),
            cells: Vec::new(),
            parents: HashTable::new(),
            stray: Bucket::default(),
            seed: ahash::RandomState::new(),
            hand: 0,
            latest: 0,
            parents_seen: 0,
        };
        table.resize(capacity, per_parent);
        table
    }

    /// Changes the bounds. A smaller table forgets nothing that is not full: it takes no new keys until it is below.
    pub fn resize(&mut self, capacity: usize, per_parent: usize) {
        self.capacity = capacity.clamp(16, 1 << 24);
        self.per_parent = per_parent.clamp(1, self.capacity);
        self.cells.reserve_exact(self.capacity.saturating_sub(self.cells.len()));
        let more = self.capacity.saturating_sub(self.index.len());
        let cells = &self.cells;
        self.index.reserve(more, |at| hash_at(cells, *at));
    }

    /// How many keys are known.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether no key is known.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Holds `cost` tokens in the bucket of `key`; `who` is asked only when the key is new.
    ///
    /// # Errors
    /// The wait, as in [`Bucket::hold`].
    pub fn hold(
        &mut self,
        now: u64,
        key: Key,
        quota: Quota,
        cost: u32,
        who: impl FnOnce() -> Heavy,
    ) -> Result<(Place, Level), Duration> {
        let now = self.tick(now);
        if let Some(cell) = self.find(key.hash) {
            cell.again = true;
            let outcome = cell.bucket.hold(now, quota, cost);
            match outcome {
                Ok(_) => cell.seen.used = cell.seen.used.saturating_add(1),
                Err(_) => cell.seen.refused = cell.seen.refused.saturating_add(1),
            }
            return outcome.map(|level| (Place::Own, level));
        }
        let mut bucket = Bucket::default();
        if !self.has_room(now, key.parent) {
            return self.hold_overflow(now, key.parent, quota, cost);
        }
        // A new bucket is full: it refuses only what costs more than its burst, and then there is nothing to keep.
        let level = bucket.hold(now, quota, cost)?;
        if !self.own_one_more(now, key.parent) {
            return self.stray.hold(now, quota, cost).map(|level| (Place::Stray, level));
        }
        let Ok(at) = u32::try_from(self.cells.len()) else {
            return self.hold_overflow(now, key.parent, quota, cost);
        };
        self.cells.push(Cell {
            hash: key.hash,
            parent: key.parent,
            bucket,
            again: false,
            seen: Heavy { used: 1, ..who() },
        });
        let cells = &self.cells;
        self.index.insert_unique(key.hash[0], at, |at| hash_at(cells, *at));
        Ok((Place::Own, level))
    }

    /// Ends a call that held tokens; see [`Bucket::settle`]. A bucket with tokens held is never forgotten, so it is there.
    pub fn settle(&mut self, now: u64, key: Key, place: Place, quota: Quota, held: u32, cost: u32) {
        let now = self.tick(now);
        let bucket = match place {
            Place::Own => self.find(key.hash).map(|cell| &mut cell.bucket),
            Place::Overflow => self.parent(key.parent).map(|parent| &mut parent.overflow),
            Place::Stray => Some(&mut self.stray),
        };
        if let Some(bucket) = bucket {
            bucket.settle(now, quota, held, cost);
        }
    }

    /// Adds to what a known key has spent, as a debt of at most one burst. A key that is not known has a full bucket, and is
    /// left in peace: this is for a cost that shows itself after the call was charged.
    pub fn charge(&mut self, now: u64, key: Key, quota: Quota, cost: u32) {
        self.settle(now, key, Place::Own, quota, 0, cost);
    }

    /// Tokens left to a key, if it is known.
    pub fn left(&mut self, now: u64, key: Key, quota: Quota) -> Option<u32> {
        let now = self.tick(now);
        self.find(key.hash).map(|cell| cell.bucket.left(now, quota))
    }

    /// The `n` keys that were refused most, then those that were served most, since each was last forgotten.
    pub fn heaviest(&self, n: usize) -> Vec<Heavy> {
        let mut top: Vec<&Heavy> = Vec::with_capacity(n.saturating_add(1).min(self.cells.len() + 1));
        for cell in &self.cells {
            let at = top.partition_point(|other| other.weight() >= cell.seen.weight());
            if at < n {
                top.insert(at, &cell.seen);
                top.truncate(n);
            }
        }
        top.into_iter().cloned().collect()
    }

    /// Forgets every full bucket and returns memory: for when memory is short. The time it takes grows with the table
    /// (about 10 ns a key).
    pub fn forget_full(&mut self, now: u64) {
        let now = self.tick(now);
        let mut at = 0;
        while let Some(cell) = self.cells.get(at) {
            if cell.bucket.is_full(now) { self.forget(now, at) } else { at += 1 }
        }
        self.parents.retain(|parent| parent.owned > 0 || !parent.overflow.is_full(now));
        let seed = &self.seed;
        self.parents.shrink_to_fit(|parent| seed.hash_one(parent.id));
    }

    fn tick(&mut self, now: u64) -> u64 {
        self.latest = self.latest.max(now);
        self.latest
    }

    fn find(&mut self, hash: [u64; 2]) -> Option<&mut Cell> {
        let cells = &mut self.cells;
        let at = *self.index.find(hash[0], |at| cell_at(cells, *at).is_some_and(|cell| cell.hash == hash))?;
        cells.get_mut(usize::try_from(at).ok()?)
    }

    fn parent(&mut self, id: u64) -> Option<&mut Parent> {
        self.parents.find_mut(self.seed.hash_one(id), |parent| parent.id == id)
    }

    /// Whether one more key of this parent may have a cell; looks for cells to forget when not.
    fn has_room(&mut self, now: u64, parent: u64) -> bool {
        let mut fits = || {
            let owned = self.parent(parent).map_or(0, |parent| parent.owned);
            self.cells.len() < self.capacity && owned < self.per_parent
        };
        if fits() {
            return true;
        }
        self.look_for_full(now);
        let owned = self.parent(parent).map_or(0, |parent| parent.owned);
        self.cells.len() < self.capacity && owned < self.per_parent
    }

    /// Moves the hand over [`LOOK`] cells and forgets the full ones among them.
    fn look_for_full(&mut self, now: u64) {
        for _ in 0..LOOK {
            if self.hand >= self.cells.len() {
                self.hand = 0;
            }
            let Some(cell) = self.cells.get_mut(self.hand) else { return };
            if !cell.bucket.is_full(now) {
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
        let hash = self.seed.hash_one(cell.parent);
        if let Ok(mut entry) = self.parents.find_entry(hash, |parent| parent.id == cell.parent) {
            let parent = entry.get_mut();
            parent.owned = parent.owned.saturating_sub(1);
            if parent.owned == 0 && parent.overflow.is_full(now) {
                entry.remove();
            }
        }
    }

    fn hold_overflow(
        &mut self,
        now: u64,
        parent: u64,
        quota: Quota,
        cost: u32,
    ) -> Result<(Place, Level), Duration> {
        if self.parent(parent).is_none() && !self.make_parent(now, parent) {
            return self.stray.hold(now, quota, cost).map(|level| (Place::Stray, level));
        }
        let bucket = self.parent(parent).map(|parent| &mut parent.overflow);
        match bucket {
            Some(bucket) => bucket.hold(now, quota, cost).map(|level| (Place::Overflow, level)),
            None => self.stray.hold(now, quota, cost).map(|level| (Place::Stray, level)),
        }
    }

    fn own_one_more(&mut self, now: u64, id: u64) -> bool {
        if self.parent(id).is_none() && !self.make_parent(now, id) {
            return false;
        }
        if let Some(parent) = self.parent(id) {
            parent.owned += 1;
        }
        true
    }

    /// Makes the record of a parent, unless there are as many as the table has room for keys.
    fn make_parent(&mut self, now: u64, id: u64) -> bool {
        if self.parents.len() >= self.capacity {
            let scale = u64::try_from(self.capacity / 16_384).unwrap_or(1).max(1);
            if now < self.parents_seen + PARENTS_PAUSE * scale {
                return false;
            }
            self.parents_seen = now;
            self.parents.retain(|parent| parent.owned > 0 || !parent.overflow.is_full(now));
            if self.parents.len() >= self.capacity {
                return false;
            }
        }
        let seed = &self.seed;
        self.parents.insert_unique(
            seed.hash_one(id),
            Parent { id, owned: 0, overflow: Bucket::default() },
            |parent| seed.hash_one(parent.id),
        );
        true
    }
}

fn cell_at(cells: &[Cell], at: u32) -> Option<&Cell> {
    cells.get(usize::try_from(at).ok()?)
}

fn hash_at(cells: &[Cell], at: u32) -> u64 {
    cell_at(cells, at).map_or(0, |cell| cell.hash[0])
}
