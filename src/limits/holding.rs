//! What one connection makes the agent hold, in bytes, and what it is told when that is too much.
//!
//! Whoever serves a connection says here what it takes and gives back; the sums for its caller, its family with it, and the
//! node follow at once, and whether memory is short with them. What each thing costs is reckoned in
//! [`budget`](super::budget). No lock: a call goes through here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    budget::NEWCOMER,
    caller::NthCall,
    room::{Room, Short},
    since_start::SinceStart,
    waste::{AllWaste, Waste},
};

/// What a connection is told, from the side of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// To open another one: what is open here ends soon.
    ComeBack,
    /// Nothing: it is closed.
    Close,
}

/// A sum of bytes that several add to.
#[derive(Debug, Default)]
struct HeldBytes(AtomicU64);

impl HeldBytes {
    /// Bytes that are held.
    fn bytes(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Returns what they are then.
    fn add(&self, bytes: u64) -> u64 {
        self.0.fetch_add(bytes, Relaxed).saturating_add(bytes)
    }

    fn take(&self, bytes: u64) -> u64 {
        self.0.fetch_sub(bytes, Relaxed).saturating_sub(bytes)
    }
}

/// Memory is out when one part in so many is held beyond where it begins to be short.
const WELL_BEYOND: u64 = 8;

/// However many are refused, those who look are woken for it once in so many nanoseconds.
const WAKE_AGAIN: u64 = 50_000_000;

/// What a family holds at most that begins: a connection and a call, beside its last one, whose end was not seen yet.
const BEGINS: u64 = 2 * NEWCOMER;
/// The share of one, where it is not known yet.
const UNRECKONED: u64 = u64::MAX;

/// What all connections hold together, and from where on that is too much.
#[derive(Debug)]
pub(super) struct NodeHeld {
    held: HeldBytes,
    /// From so many bytes on memory is short, and below so many there is room again.
    short_from: AtomicU64,
    room_below: AtomicU64,
    /// Whoever holds more has more than its share; [`UNRECKONED`] when nobody knew that it would be asked.
    share: AtomicU64,
    /// From so many bytes on shares are to be reckoned anew.
    look_from: AtomicU64,
    /// What is held when only those grow who have no more than their share, when only those do who have less than the least
    /// share there is, when only those do who begin, when nobody does, that least share, and the part of each.
    most_from: AtomicU64,
    tight_from: AtomicU64,
    full_from: AtomicU64,
    spent_from: AtomicU64,
    least: AtomicU64,
    part: AtomicU64,
    /// Somebody below its share found no memory, and when those who look were last woken for such a thing.
    wanted: AtomicBool,
    woken: AtomicU64,
    look: Notify,
    room: Arc<Room>,
    waste: AllWaste,
    time: SinceStart,
}

impl NodeHeld {
    /// Nothing, and there is no bound.
    pub(super) fn new(room: Arc<Room>, time: SinceStart) -> Self {
        Self {
            held: HeldBytes::default(),
            short_from: AtomicU64::new(u64::MAX),
            room_below: AtomicU64::new(u64::MAX),
            share: AtomicU64::new(UNRECKONED),
            look_from: AtomicU64::new(u64::MAX),
            most_from: AtomicU64::new(u64::MAX),
            tight_from: AtomicU64::new(u64::MAX),
            full_from: AtomicU64::new(u64::MAX),
            spent_from: AtomicU64::new(u64::MAX),
            least: AtomicU64::new(0),
            part: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
            woken: AtomicU64::new(0),
            look: Notify::new(),
            room,
            waste: AllWaste::default(),
            time,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.held.bytes()
    }

    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// Nanoseconds since the limits were made.
    pub(super) fn now(&self) -> u64 {
        self.time.now()
    }

    /// Sets from where on memory is short, and below what there is room again.
    pub(super) fn bound(&self, short_from: u64, room_below: u64) {
        self.short_from.store(short_from, Relaxed);
        self.room_below.store(room_below, Relaxed);
        self.grew(self.bytes());
        self.fell(self.bytes());
    }

    /// Sets what one may hold while memory is short, and from where on that is to be reckoned anew.
    pub(super) fn set_share(&self, bytes: Option<u64>, look_from: u64) {
        let share = bytes.map_or(UNRECKONED, |bytes| bytes.min(UNRECKONED - 1));
        self.share.store(share, Relaxed);
        self.look_from.store(look_from, Relaxed);
    }

    /// Sets from where on those who have more than their share hold no more, from where on those who have `least` do not, from
    /// where on only those do who begin, and from where on nobody does: see [`Holding::try_hold`]. `part` is what each
    /// had if all who hold something had the same, which is less than `least` where those are more than there are least shares.
    pub(super) fn close(&self, bounds: [u64; 4], least: u64, part: u64) {
        let [most_from, tight_from, full_from, spent_from] = bounds;
        self.most_from.store(most_from, Relaxed);
        self.tight_from.store(tight_from, Relaxed);
        self.full_from.store(full_from, Relaxed);
        self.spent_from.store(spent_from, Relaxed);
        self.least.store(least, Relaxed);
        self.part.store(part, Relaxed);
    }

    /// Whether one who holds `bytes` may keep what was just added to them, where all hold `all`.
    fn fits(&self, all: u64, bytes: u64) -> bool {
        let mostly = if self.is_above_share(bytes) { &self.most_from } else { &self.tight_from };
        all < mostly.load(Relaxed)
    }

    /// The same for a connection that begins, of one who held `before`.
    fn fits_first(&self, all: u64, before: u64, bytes: u64) -> bool {
        self.fits(all, bytes)
            || before <= self.least.load(Relaxed) && all < self.full_from.load(Relaxed)
            || bytes <= BEGINS && all < self.spent_from.load(Relaxed)
    }

    /// The same for more of a connection that holds `own` with it. What it asks further can wait; what begins on another cannot,
    /// and comes first.
    fn fits_further(&self, all: u64, bytes: u64, own: u64) -> bool {
        let least = self.least.load(Relaxed).min(self.part.load(Relaxed));
        self.fits(all, bytes)
            || bytes <= least && all < self.full_from.load(Relaxed)
            || own <= NEWCOMER && bytes <= BEGINS && all < self.spent_from.load(Relaxed)
    }

    /// Somebody below its share was refused for what others hold: wakes those who look.
    pub(super) fn wake(&self) {
        let now = self.now();
        if now.saturating_sub(self.woken.load(Relaxed)) >= WAKE_AGAIN {
            self.woken.store(now, Relaxed);
            self.look.notify_one();
        }
    }

    /// One whose family holds `bytes` found no memory.
    fn found_none(&self, bytes: u64) {
        if !self.is_above_share(bytes) {
            self.wanted.store(true, Relaxed);
            self.wake();
        }
    }

    /// Whether somebody below its share found no memory since this was last asked.
    pub(super) fn was_wanted(&self) -> bool {
        self.wanted.swap(false, Relaxed)
    }

    /// Waits until shares are to be reckoned anew, or somebody was refused for what others hold. For one task.
    pub(super) async fn outdated(&self) {
        self.look.notified().await;
    }

    /// Whether one that holds so much has more than its share.
    fn is_above_share(&self, bytes: u64) -> bool {
        match self.share.load(Relaxed) {
            // Whoever holds the greater part is heaviest, whatever the shares are.
            UNRECKONED => bytes > self.bytes() / 2,
            share => bytes > share,
        }
    }

    fn grew(&self, to: u64) {
        if to >= self.look_from.load(Relaxed) {
            self.look_from.store(u64::MAX, Relaxed);
            self.look.notify_one();
        }
        if to >= self.short_from.load(Relaxed) && !self.room.is_short(Short::Memory) {
            self.room.set(Short::Memory, true);
        }
    }

    fn fell(&self, to: u64) {
        if to < self.room_below.load(Relaxed) && self.room.is_short(Short::Memory) {
            self.room.set(Short::Memory, false);
        }
    }
}

/// What all connections of a caller hold, those of its family with them, and what they were answered in vain.
#[derive(Debug, Default)]
pub(super) struct GroupHeld {
    held: HeldBytes,
    /// Large answers in the making.
    making: AtomicU32,
    pub(super) waste: Waste,
    pub(super) names: HeldNames,
}

impl GroupHeld {
    /// Nothing yet, but for what they owe.
    pub(super) fn owing(waste: Waste) -> Self {
        Self { waste, ..Self::default() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.held.bytes()
    }

    /// Of the names that the kernel keeps, so many bytes are held by these callers, of all that `node` sums up.
    pub(super) fn set_names(&self, bytes: u64, node: &NodeHeld) {
        let before = self.names.bytes.swap(bytes, Relaxed);
        let (more, less) = (bytes.saturating_sub(before), before.saturating_sub(bytes));
        self.held.add(more);
        node.grew(node.held.add(more));
        self.held.take(less);
        node.fell(node.held.take(less));
    }
}

/// What the kernel keeps of `/proc/PID` and files in it that somebody has open, at most, in bytes.
pub(super) const OF_PROCESS: u64 = 2048;

/// What the kernel keeps of the [names](super::names) of a family's processes, in bytes.
#[derive(Debug, Default)]
pub(super) struct HeldNames {
    bytes: AtomicU64,
    /// What it may be at most: of names that somebody holds, and of processes that were read.
    pub(super) pinned: AtomicU64,
    pub(super) read: AtomicU64,
    /// What was forgotten of those that somebody held.
    pub(super) forgotten: AtomicU64,
    /// Of processes that were read to find out whom to charge, and were not let in.
    pub(super) in_vain: AtomicU64,
    lately: [[AtomicI32; 2]; 8],
}

impl HeldNames {
    /// Bytes that are held for it.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// The process with this number was looked at in `/proc`: once more than lately is nothing.
    pub(super) fn reads_process(&self, pid: i32) {
        let set = usize::try_from(pid).unwrap_or(0) % self.lately.len();
        let Some([last, before]) = self.lately.get(set) else { return };
        if last.load(Relaxed) != pid {
            let second = last.swap(pid, Relaxed);
            if before.swap(second, Relaxed) != pid {
                self.read.fetch_add(OF_PROCESS, Relaxed);
            }
        }
    }

    /// Whether it may never be anything.
    pub(super) fn are_nothing(&self) -> bool {
        [&self.bytes, &self.pinned, &self.read, &self.in_vain].iter().all(|bytes| bytes.load(Relaxed) == 0)
    }
}

/// What a connection adds to.
#[derive(Clone, Debug)]
pub(super) struct HeldSums {
    pub(super) group: Arc<GroupHeld>,
    pub(super) node: Arc<NodeHeld>,
}

/// What one connection holds.
#[derive(Debug, Default)]
pub struct Holding {
    own: HeldBytes,
    /// `None` where nobody sums it up.
    sums: Option<HeldSums>,
    /// It was let in on what is set aside, of which a connection and a call are its own.
    on_reserve: AtomicBool,
    /// What kind of place at the gate it has; the gate's own affair.
    place: AtomicU8,
    /// A call was made on it.
    called: AtomicBool,
    /// See [`NthCall::FirstLetIn`].
    lets_first_in: AtomicBool,
    told: AtomicU8,
    /// When it was told that.
    told_at: AtomicU64,
    notify: Notify,
}

impl Holding {
    /// One that adds to these sums too.
    pub(super) fn in_sums(sums: HeldSums) -> Self {
        let mut holding = Self::default();
        holding.sums = Some(sums);
        holding
    }

    /// It was let in on what is set aside.
    pub(super) fn put_on_reserve(&self) {
        self.on_reserve.store(true, Relaxed);
    }

    /// Whether it has a place that is set aside.
    pub(super) fn is_on_reserve(&self) -> bool {
        self.on_reserve.load(Relaxed)
    }

    /// It no longer has. Returns whether it had.
    pub(super) fn take_from_reserve(&self) -> bool {
        self.on_reserve.swap(false, Relaxed)
    }

    /// What the gate marked it with.
    pub(super) fn place_mark(&self) -> u8 {
        self.place.load(Relaxed)
    }

    /// Marks it. Returns what it was marked with.
    pub(super) fn mark_place(&self, mark: u8) -> u8 {
        self.place.swap(mark, Relaxed)
    }

    /// So many bytes more are held.
    pub fn hold(&self, bytes: u64) {
        self.own.add(bytes);
        if let Some(HeldSums { group, node }) = &self.sums {
            group.held.add(bytes);
            node.grew(node.held.add(bytes));
        }
    }

    /// Counts what need not be granted, if it fits: `false`, and nothing is counted, where memory is about to run out and the
    /// caller's family has the least share there is, or its part where that is less; one with a connection and a call gets what is
    /// set aside for it beyond that. The look four times a second comes too late for a thousand connections that all ask for more.
    #[must_use]
    pub fn try_hold(&self, bytes: u64) -> bool {
        self.try_with(bytes, |node, group| node.fits_further(node.bytes(), group.bytes(), self.bytes()))
    }

    /// The same of a connection that begins, for what HTTP/2 takes with its first request: whoever held no more than the least share
    /// before gets it, however many others do.
    #[must_use]
    pub fn try_begin(&self, bytes: u64) -> bool {
        self.try_with(bytes, |node, group| {
            let held = group.bytes();
            node.fits_first(node.bytes(), held.saturating_sub(bytes), held)
        })
    }

    fn try_with(&self, bytes: u64, may: impl FnOnce(&NodeHeld, &GroupHeld) -> bool) -> bool {
        self.hold(bytes);
        let fits = self.sums.as_ref().is_none_or(|HeldSums { group, node, .. }| may(node, group))
            || self.is_on_reserve() && self.bytes() <= NEWCOMER;
        if !fits {
            self.release(bytes);
            if let Some(HeldSums { group, node, .. }) = &self.sums {
                node.found_none(group.bytes());
            }
        }
        fits
    }

    /// The process of this number, which it is of, is looked at in `/proc`.
    pub fn reads_process(&self, pid: i32) {
        if let Some(HeldSums { group, .. }) = &self.sums {
            group.names.reads_process(pid);
        }
    }

    /// Whether [`Self::try_begin`] would count so much now.
    pub fn could_begin(&self, bytes: u64) -> bool {
        let fits = |HeldSums { group, node, .. }: &HeldSums| {
            let before = group.bytes();
            node.fits_first(node.bytes().saturating_add(bytes), before, before.saturating_add(bytes))
        };
        self.sums.as_ref().is_none_or(fits)
            || self.is_on_reserve() && self.bytes().saturating_add(bytes) <= NEWCOMER
    }

    /// Whether its caller's family holds no more than one that begins.
    pub fn begins(&self) -> bool {
        self.sums.as_ref().is_none_or(|HeldSums { group, .. }| group.bytes() <= BEGINS)
    }

    /// So many are held no longer: at most what was.
    pub fn release(&self, bytes: u64) {
        self.own.take(bytes);
        self.take_from_sums(bytes);
    }

    /// Holds so many bytes as long as what is returned is kept.
    pub fn keep(self: &Arc<Self>, bytes: u64) -> KeptBytes {
        self.hold(bytes);
        KeptBytes { bytes, holding: Arc::clone(self) }
    }

    /// The same, if it fits: [`Self::try_hold`].
    pub fn try_keep(self: &Arc<Self>, bytes: u64) -> Option<KeptBytes> {
        self.try_hold(bytes).then(|| KeptBytes { bytes, holding: Arc::clone(self) })
    }

    /// Holds what an answer takes while it is made, if it fits. Each family may make one as long as nobody has to be cut, so
    /// that it gets what is its own, however large that is.
    pub fn try_make(self: &Arc<Self>, bytes: u64) -> Option<AnswerInTheMaking> {
        let making = AnswerInTheMaking(self.keep(bytes));
        let fits = self.sums.as_ref().is_none_or(|HeldSums { group, node, .. }| {
            let is_only = group.making.fetch_add(1, Relaxed) == 0;
            let all = node.bytes();
            node.fits_further(all, group.bytes(), self.bytes())
                || is_only && all < node.full_from.load(Relaxed)
        });
        fits.then_some(making)
    }

    fn take_from_sums(&self, bytes: u64) {
        if let Some(HeldSums { group, node }) = &self.sums {
            group.held.take(bytes);
            node.fell(node.held.take(bytes));
        }
    }

    /// Bytes that the connection holds.
    pub fn bytes(&self) -> u64 {
        self.own.bytes()
    }

    /// Whether its caller, with its family, holds more than its share while memory is short. Where there is room
    /// nobody does.
    pub fn is_above_share(&self) -> bool {
        self.sums.as_ref().is_some_and(|HeldSums { group, node, .. }| {
            node.room.is_short(Short::Memory) && node.is_above_share(group.bytes())
        })
    }

    /// A call begins on it. Returns how that stands to it.
    pub fn begins_call(&self) -> NthCall {
        match (self.called.swap(true, Relaxed), self.lets_first_in.load(Relaxed)) {
            (true, _) => NthCall::Further,
            (false, true) => NthCall::FirstLetIn,
            (false, false) => NthCall::First,
        }
    }

    /// Its first call was let in with it.
    pub(super) fn let_first_in(&self) {
        self.lets_first_in.store(true, Relaxed);
    }

    /// Whether descriptors are short.
    pub fn is_short_of_descriptors(&self) -> bool {
        self.sums.as_ref().is_some_and(|HeldSums { node, .. }| node.room.is_short(Short::Descriptors))
    }

    /// Whether there is room on the node.
    pub fn has_room(&self) -> bool {
        self.sums.as_ref().is_none_or(|HeldSums { node, .. }| node.room.is_there())
    }

    /// Whether there is room, and would be for a while: then much is read at once.
    pub fn has_plenty(&self) -> bool {
        self.sums.as_ref().is_none_or(|HeldSums { node, .. }| {
            node.room.is_there() && node.bytes() < node.room_below.load(Relaxed)
        })
    }

    /// Whether memory is so short that nothing may wait in it, whoever holds the rest: with more than [`SHARES`] callers all
    /// may be below their shares.
    ///
    /// [`SHARES`]: super::budget::SHARES
    pub fn is_out_of_memory(&self) -> bool {
        self.sums.as_ref().is_some_and(|HeldSums { node, .. }| {
            let short_from = node.short_from.load(Relaxed);
            node.bytes() > short_from.saturating_add(short_from / WELL_BEYOND)
        })
    }

    /// Counts an answer that was no work to conserve: a refusal, an error that the caller made, or some frames that ask for
    /// nothing. Returns how long its
    /// connection is to be read no more.
    pub fn wasted(&self) -> Option<Duration> {
        self.sums.as_ref().and_then(|HeldSums { group, node, .. }| group.waste.note(&node.waste, node.now()))
    }

    /// How long its connection is still to be read no more; counts nothing.
    pub fn waits(&self) -> Option<Duration> {
        self.sums.as_ref().and_then(|HeldSums { group, node, .. }| group.waste.wait(node.now()))
    }

    /// Tells the connection. What it was told before is only ever surpassed.
    pub fn tell(&self, notice: Notice) {
        if self.notice() < Some(notice) {
            let now = self.sums.as_ref().map_or(0, |sums| sums.node.now());
            self.told_at.store(now, Relaxed);
        }
        let before = self.told.fetch_max(notice.number(), Relaxed);
        if before < notice.number() {
            self.notify.notify_one();
        }
    }

    /// What it was told.
    pub fn notice(&self) -> Option<Notice> {
        Notice::of(self.told.load(Relaxed))
    }

    /// Whether it was told to come back at that time or before.
    pub(super) fn stays_since(&self, at: u64) -> bool {
        self.notice() == Some(Notice::ComeBack) && self.told_at.load(Relaxed) <= at
    }

    /// Whether it was closed at that time or before.
    pub(super) fn is_over_since(&self, at: u64) -> bool {
        self.notice() == Some(Notice::Close) && self.told_at.load(Relaxed) <= at
    }

    /// Waits until the connection is told more than `before`. For one task.
    pub async fn told(&self, before: Option<Notice>) -> Notice {
        loop {
            let notified = self.notify.notified();
            match self.notice() {
                Some(notice) if Some(notice) > before => return notice,
                Some(_) | None => notified.await,
            }
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.take_from_sums(self.bytes());
    }
}

impl Notice {
    fn number(self) -> u8 {
        match self {
            Self::ComeBack => 1,
            Self::Close => 2,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::ComeBack, Self::Close].into_iter().find(|notice| notice.number() == number)
    }
}

/// Bytes that a connection holds as long as this is there.
#[derive(Debug)]
pub struct KeptBytes {
    bytes: u64,
    holding: Arc<Holding>,
}

impl KeptBytes {
    /// Holds so many from now on, and no longer what was held before.
    pub fn set(&mut self, bytes: u64) {
        if bytes != self.bytes {
            self.holding.hold(bytes);
            self.holding.release(std::mem::replace(&mut self.bytes, bytes));
        }
    }
}

impl Drop for KeptBytes {
    fn drop(&mut self) {
        self.holding.release(self.bytes);
    }
}

/// A large answer that is being made, as long as this is there.
#[derive(Debug)]
pub struct AnswerInTheMaking(KeptBytes);

impl Drop for AnswerInTheMaking {
    fn drop(&mut self) {
        if let Some(HeldSums { group, .. }) = &self.0.holding.sums {
            group.making.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sums_follow_and_a_notice_is_surpassed_only() {
        let node = Arc::new(NodeHeld::new(Arc::default(), SinceStart::default()));
        let group = Arc::<GroupHeld>::default();
        let holding = Holding::in_sums(HeldSums { group: Arc::clone(&group), node: Arc::clone(&node) });
        holding.hold(100);
        holding.release(40);
        assert_eq!((holding.bytes(), group.bytes(), node.bytes()), (60, 60, 60));
        holding.tell(Notice::Close);
        holding.tell(Notice::ComeBack);
        assert_eq!(holding.told(None).await, Notice::Close);
        assert_eq!(holding.told(Some(Notice::ComeBack)).await, Notice::Close);
        drop(holding);
        assert_eq!((group.bytes(), node.bytes()), (0, 0));
    }

    /// However large what is a caller's own is, it gets it, one answer after the other; several at once it gets where there is
    /// memory.
    #[test]
    fn each_family_may_make_one_large_answer_where_memory_is_about_to_run_out() {
        let node = Arc::new(NodeHeld::new(Arc::default(), SinceStart::default()));
        let of_family =
            || Arc::new(Holding::in_sums(HeldSums { group: Arc::default(), node: Arc::clone(&node) }));
        // In units in which nobody is one who begins.
        node.close([85, 85, 95, 0], 1, 1);
        let (one, another) = (of_family(), of_family());
        let in_room = [one.try_make(10).unwrap(), one.try_make(10).unwrap()];
        another.hold(60);
        assert!(one.try_make(10).is_none(), "a third of the same beyond the line");
        let made = another.try_make(10).expect("one of another");
        assert!(another.try_make(1).is_none());
        drop(in_room);
        assert_eq!(node.bytes(), 70);
        one.hold(15);
        assert!(one.try_make(11).is_none(), "nobody, where callers would be cut for it");
        assert!(one.try_make(5).is_some(), "one that fits");
        drop(made);
        assert_eq!(node.bytes(), 75);
    }

    /// Who holds next to nothing has a connection and a call, where all others hold all that they may.
    #[test]
    fn what_is_set_aside_is_for_those_who_begin() {
        let node = Arc::new(NodeHeld::new(Arc::default(), SinceStart::default()));
        let of_family = || Holding::in_sums(HeldSums { group: Arc::default(), node: Arc::clone(&node) });
        let (full, spent) = (100 * BEGINS, 103 * BEGINS);
        node.close([full, full, full, spent], 0, 0);
        let other = of_family();
        other.hold(full);
        assert!(!other.try_hold(1));
        let begins: Vec<Holding> = (0..5).map(|_| of_family()).collect();
        let fits: Vec<bool> = begins.iter().map(|one| one.try_begin(BEGINS)).collect();
        assert_eq!(fits, [true, true, false, false, false], "as long as there is some of it");
        assert!(!begins[0].try_hold(1), "no more than that");
    }

    /// Shortness comes and goes with the sums, at once, and not at one line.
    #[tokio::test]
    async fn memory_is_short_as_soon_as_the_sums_say_so() {
        let room = Arc::<Room>::default();
        let node = Arc::new(NodeHeld::new(Arc::clone(&room), SinceStart::default()));
        let group = Arc::<GroupHeld>::default();
        let holding = Holding::in_sums(HeldSums { group: Arc::clone(&group), node: Arc::clone(&node) });
        node.bound(70, 65);
        node.set_share(Some(50), 69);
        holding.hold(69);
        node.outdated().await;
        assert!(room.is_there() && !holding.is_above_share());
        holding.hold(1);
        assert!(room.is_short(Short::Memory) && holding.is_above_share());
        holding.release(5);
        assert!(room.is_short(Short::Memory));
        holding.release(15);
        assert!(room.is_there() && !holding.is_above_share());
        node.bound(50, 45);
        assert!(room.is_short(Short::Memory), "what is left of the budget shrank");
        drop(holding);
        assert!(room.is_there());
    }
}
