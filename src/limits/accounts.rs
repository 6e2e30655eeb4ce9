//! Who has connections, since when, and what they hold.
//!
//! Whoever can be many callers (a *family*, [`Families`](super::Families)) is one wherever something is shared, and has one
//! account for it: a *group*. A caller without a family is a group alone. There are no more accounts than connections, and
//! [`KEPT`] of those that have none, were answered too much in vain, or hold [names](super::names): forgotten, they would get
//! back what they took.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use super::{
    budget::connection_with,
    caller::{CallerKey, WhoHolds},
    holding::{GroupHeld, HeldSums, Holding, NodeHeld, Notice},
    room::Short,
    shortage::Cut,
    tally::Tally,
    waste::Waste,
};

/// Groups without a connection that are remembered for what they owe or hold. What further ones owe is owed by whoever comes new.
const KEPT: usize = 1024;
/// What a last connection may hold, whatever the share is: as many streams as one may have open by default.
const LAST: u64 = connection_with(100);
/// What is still held so many nanoseconds after a connection was closed is held for as long as its peer likes.
const ENDS_WITHIN: u64 = 1_000_000_000;

/// What groups are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Bytes that are held.
    Bytes,
    /// Connections that are open.
    Connections,
}

impl Weight {
    /// What there is too little of when groups are compared by it.
    fn short(self) -> Short {
        match self {
            Self::Bytes => Short::Memory,
            Self::Connections => Short::Descriptors,
        }
    }

    fn of(self, holding: &Holding) -> u64 {
        match self {
            Self::Bytes => holding.bytes(),
            Self::Connections => 1,
        }
    }
}

/// How connections are made to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shed {
    /// Those above their share are told to come back.
    SendAway,
    /// They are closed.
    CloseAboveShare,
    /// They are, and the newest of others if that is not enough.
    Close,
}

impl Shed {
    fn notice(self) -> Notice {
        match self {
            Self::SendAway => Notice::ComeBack,
            Self::CloseAboveShare | Self::Close => Notice::Close,
        }
    }
}

/// What becomes of a connection without which its group would hold less than its share, and with which it holds more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Straddling {
    Stays,
    /// Somebody below its share was refused for what others hold.
    Goes,
}

/// What a group is brought down to.
#[derive(Clone, Copy, Debug)]
struct DownTo {
    by: Weight,
    /// By connections without which it has its share.
    level: u64,
    /// By one more.
    whole: u64,
    share: u64,
    notice: Notice,
}

/// A connection that was told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToldToGo {
    /// Whose it is.
    pub caller: CallerKey,
    /// What there was too little of.
    pub short: Short,
    /// What of it that caller holds, those of its family with it: bytes, or connections.
    pub held: u64,
    /// What its share was.
    pub share: u64,
    pub notice: Notice,
}

/// Where a connection stands, until it ends.
#[derive(Debug)]
pub(super) struct OpenPlace {
    caller: CallerKey,
    group: u64,
    order: u64,
}

impl OpenPlace {
    /// Whose it is.
    pub(super) fn caller(&self) -> CallerKey {
        self.caller
    }
}

/// What a group holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeldByGroup {
    /// Connections.
    pub(super) open: u32,
    pub(super) bytes: u64,
    /// Of these, what the kernel keeps of the names of its processes.
    pub(super) names: u64,
}

#[derive(Debug)]
pub(super) struct GroupAccount {
    /// In the order in which they came.
    open: BTreeMap<u64, (CallerKey, Arc<Holding>)>,
    pub(super) held: Arc<GroupHeld>,
    /// Who connected last.
    last: CallerKey,
}

impl GroupAccount {
    /// One that owes until then.
    fn owing(caller: CallerKey, until: u64) -> Self {
        let held = GroupHeld::owing(Waste::full_at(until));
        Self { open: BTreeMap::new(), held: Arc::new(held), last: caller }
    }

    fn open(&self) -> u32 {
        u32::try_from(self.open.len()).unwrap_or(u32::MAX)
    }

    /// Whether it has no connection.
    pub(super) fn has_none(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether it has none, and nothing that it is remembered for.
    fn is_over(&self, now: u64) -> bool {
        self.has_none() && self.held.waste.owes_until() <= now && self.held.names.are_nothing()
    }

    /// Of its callers the one with the lowest number, and how many others there are. Without a connection, the last that had one.
    fn holder(&self) -> WhoHolds {
        let callers: HashSet<CallerKey, ahash::RandomState> =
            self.open.values().map(|(caller, _)| *caller).collect();
        let number = |caller: &CallerKey| match caller {
            CallerKey::Uid(uid) => *uid,
            CallerKey::Pod(_) => u32::MAX,
        };
        let caller = callers.iter().copied().min_by_key(number).unwrap_or(self.last);
        WhoHolds { caller, others: u32::try_from(callers.len().saturating_sub(1)).unwrap_or(u32::MAX) }
    }

    fn weight(&self, by: Weight) -> u64 {
        match by {
            Weight::Bytes => self.held.bytes(),
            Weight::Connections => u64::from(self.open()),
        }
    }

    /// What stays when those have gone that were told `notice` or more. Those that are closed, and whose peers do not read what
    /// they were sent, go when these like.
    fn staying(&self, by: Weight, notice: Notice, now: u64) -> u64 {
        let over = now.checked_sub(ENDS_WITHIN);
        let stays = |holding: &Holding| over.is_some_and(|over| holding.is_over_since(over));
        let leaves = |holding: &Holding| holding.notice() >= Some(notice) && !stays(holding);
        let leaving = self.open.values().filter(|(_, holding)| leaves(holding));
        self.weight(by).saturating_sub(leaving.map(|(_, holding)| by.of(holding)).sum())
    }

    /// Which go of those that may, where so much is `left`; that follows. The newest first of those without which the group has
    /// its share. If that is not enough, the lightest of the others goes too: one is enough then, and whatever has room beside what is
    /// left stays after all. So does a last one, unless it alone holds more than [`LAST`].
    fn going(&self, left: &mut u64, lines: DownTo, may: impl Fn(&Holding) -> bool) -> BTreeSet<u64> {
        let DownTo { by, level, whole, share, notice } = lines;
        let mut goes = BTreeSet::new();
        for (order, (_, holding)) in self.open.iter().rev().filter(|(_, (_, holding))| may(holding)) {
            if *left <= level {
                break;
            }
            let after = left.saturating_sub(by.of(holding));
            if after >= share {
                goes.insert(*order);
                *left = after;
            }
        }
        if *left <= whole {
            return goes;
        }
        let others = self.open.iter().filter(|(order, (_, holding))| may(holding) && !goes.contains(order));
        let one = others.map(|(order, (_, holding))| (by.of(holding), Reverse(*order))).min();
        let Some((weight, Reverse(order))) = one else { return goes };
        goes.insert(order);
        *left = left.saturating_sub(weight);
        let weight_of = |order: &u64| self.open.get(order).map_or(0, |(_, holding)| by.of(holding));
        goes.retain(|order| {
            let with = left.saturating_add(weight_of(order));
            if with <= whole {
                *left = with;
            }
            with > whole
        });
        let staying = self.open.iter().filter(|(_, (_, holding))| holding.notice() < Some(notice)).count();
        let last = goes.iter().map(|order| (weight_of(order), *order)).min();
        if let Some((weight, order)) = last.filter(|(weight, _)| staying <= goes.len() && *weight <= LAST) {
            goes.remove(&order);
            *left = left.saturating_add(weight);
        }
        goes
    }
}

/// All that are open.
#[derive(Debug)]
pub(super) struct Accounts {
    callers: Tally<CallerKey>,
    pub(super) groups: HashMap<u64, GroupAccount, ahash::RandomState>,
    /// Groups without a connection.
    kept: usize,
    /// What is owed by those for whom there was no room.
    owed_until: u64,
    /// What the kernel keeps of names that nobody was found to hold.
    pub(super) read_kept: u64,
    /// Bytes of those that groups were found to hold that were forgotten with the groups.
    pub(super) forgotten: HashMap<u64, u64, ahash::RandomState>,
    next: u64,
    pub(super) node: Arc<NodeHeld>,
}

impl Accounts {
    pub(super) fn new(node: Arc<NodeHeld>) -> Self {
        Self {
            callers: Tally::default(),
            groups: HashMap::default(),
            kept: 0,
            owed_until: 0,
            read_kept: 0,
            forgotten: HashMap::default(),
            next: 0,
            node,
        }
    }

    /// Connections of a caller.
    pub(super) fn open_of(&self, caller: &CallerKey) -> u32 {
        self.callers.of(caller)
    }

    /// Connections of a caller, and the bytes that they hold.
    pub(super) fn of_caller(&self, caller: &CallerKey) -> (u32, u64) {
        let open = self.groups.values().flat_map(|account| account.open.values());
        let own = open.filter(|(of, _)| of == caller);
        (self.open_of(caller), own.map(|(_, holding)| holding.bytes()).sum())
    }

    /// What a group holds.
    pub(super) fn of_group(&self, group: u64) -> HeldByGroup {
        self.groups.get(&group).map_or_else(HeldByGroup::default, |account| HeldByGroup {
            open: account.open(),
            bytes: account.held.bytes(),
            names: account.held.names.bytes(),
        })
    }

    /// Takes one in, which holds so many bytes at once.
    pub(super) fn add(&mut self, caller: CallerKey, group: u64, bytes: u64) -> (OpenPlace, Arc<Holding>) {
        let order = self.next;
        self.next += 1;
        self.callers.add(caller);
        let of_group = account(&mut self.groups, &mut self.kept, group, caller, self.owed_until);
        self.kept -= usize::from(of_group.has_none());
        of_group.last = caller;
        let holding = Arc::new(Holding::in_sums(HeldSums {
            group: Arc::clone(&of_group.held),
            node: Arc::clone(&self.node),
        }));
        holding.hold(bytes);
        of_group.open.insert(order, (caller, Arc::clone(&holding)));
        (OpenPlace { caller, group, order }, holding)
    }

    /// The account of a group that may have no connection; `None` where no more can be remembered.
    pub(super) fn remembered(&mut self, caller: CallerKey, group: u64) -> Option<&mut GroupAccount> {
        let fits = self.kept < KEPT || self.groups.contains_key(&group);
        fits.then(|| account(&mut self.groups, &mut self.kept, group, caller, self.owed_until))
    }

    /// Lets one go.
    pub(super) fn take(&mut self, place: &OpenPlace) {
        self.callers.take(place.caller);
        let Some(account) = self.groups.get_mut(&place.group) else { return };
        account.open.remove(&place.order);
        if !account.has_none() {
            return;
        }
        let until = account.held.waste.owes_until();
        if !account.is_over(self.node.now()) && self.kept < KEPT {
            self.kept += 1;
            return;
        }
        // Of the names nobody else can be told apart by then.
        account.held.set_names(0, &self.node);
        let pinned = account.held.names.pinned.load(Relaxed);
        if pinned > 0 {
            *self.forgotten.entry(place.group).or_default() += pinned;
        }
        self.groups.remove(&place.group);
        self.owed_until = self.owed_until.max(until);
    }

    /// Forgets the groups without a connection that owe and hold nothing any more.
    pub(super) fn forget_paid(&mut self) {
        let now = self.node.now();
        if self.kept > 0 {
            self.groups.retain(|_, account| !account.is_over(now));
            self.kept = self.groups.values().filter(|account| account.has_none()).count();
        }
    }

    /// Groups that have a connection.
    pub(super) fn groups(&self) -> usize {
        self.groups.len() - self.kept
    }

    /// Whether a group has more connections than this.
    pub(super) fn any_above(&self, connections: u32) -> bool {
        self.groups.values().any(|account| account.open() > connections)
    }

    /// Who holds most bytes, a family as one: with their connections, and these bytes.
    pub(super) fn heaviest(&self, n: usize) -> Vec<(WhoHolds, u32, u64)> {
        let mut all: Vec<(u64, u32, &GroupAccount)> = self
            .groups
            .values()
            .map(|account| (account.held.bytes(), account.open(), account))
            .filter(|(bytes, open, _)| (*bytes, *open) > (0, 0))
            .collect();
        all.sort_by_key(|(bytes, open, _)| Reverse((*bytes, *open)));
        all.truncate(n);
        all.into_iter().map(|(bytes, open, account)| (account.holder(), open, bytes)).collect()
    }

    /// Who has the connections of a group, or holds what is left of them; `None` of one that is not known.
    pub(super) fn holder(&self, group: u64) -> Option<WhoHolds> {
        Some(self.groups.get(&group)?.holder())
    }

    /// The highest weight that groups can have, each of them at most, so that they weigh `target` together.
    pub(super) fn level(&self, by: Weight, target: u64) -> u64 {
        level(self.groups.values().map(|account| account.weight(by)), target)
    }

    /// Tells connections of the groups that weigh more than `level` to go, the newest of each first, and so many that no
    /// group weighs less than `share` then, but for one that is [`Straddling`] and goes. By [`Shed::Close`] further ones go, the
    /// newest of all first, until no more than the target is left: a crowd of callers with a connection each does not take them
    /// all with it. Those that were told before count as gone.
    pub(super) fn shed(
        &self,
        by: Weight,
        cut: Cut,
        share: u64,
        how: Shed,
        straddling: Straddling,
    ) -> Vec<ToldToGo> {
        let Cut { level, target } = cut;
        let notice = how.notice();
        let whole = match (straddling, how) {
            (Straddling::Goes, Shed::SendAway | Shed::CloseAboveShare) => level.max(share),
            // By the other one as many go as have to, in any case.
            (Straddling::Stays, _) | (_, Shed::Close) => u64::MAX,
        };
        let (mut told, mut below_share) = (Vec::new(), Vec::new());
        let (mut all_left, mut all_goes, now) = (0_u64, 0_u64, self.node.now());
        for account in self.groups.values() {
            let held = account.weight(by);
            let mut left = account.staying(by, notice, now);
            all_left = all_left.saturating_add(left);
            if left <= level {
                continue;
            }
            let may = |holding: &Holding| holding.notice() < Some(notice);
            let before = left;
            let goes = account.going(&mut left, DownTo { by, level, whole, share, notice }, may);
            all_goes = all_goes.saturating_add(before.saturating_sub(left));
            for (order, (caller, holding)) in account.open.iter().rev() {
                let one = ToldToGo { caller: *caller, short: by.short(), held, share, notice };
                if goes.contains(order) {
                    told.push((one, holding));
                } else if how == Shed::Close && left > level && may(holding) {
                    let weight = by.of(holding);
                    left = left.saturating_sub(weight);
                    below_share.push((*order, weight, (one, holding)));
                }
            }
        }
        below_share.sort_unstable_by_key(|(order, ..)| Reverse(*order));
        for (_, weight, one) in below_share {
            if all_left.saturating_sub(all_goes) <= target {
                break;
            }
            all_goes = all_goes.saturating_add(weight);
            told.push(one);
        }
        told.into_iter()
            .map(|(told, holding)| {
                holding.tell(notice);
                told
            })
            .collect()
    }

    /// Tells connections to come back that so many others want, but for those that are on their way: the newest of all groups that
    /// have more than `share`, and so many of each that it has that still.
    pub(super) fn make_way(&self, wanted: u32, share: u32) -> Vec<ToldToGo> {
        let notice = Notice::ComeBack;
        let (mut leaving, mut goes) = (0, Vec::new());
        for account in self.groups.values().filter(|account| account.open() > share) {
            let (held, least) =
                (account.weight(Weight::Connections), usize::try_from(share).unwrap_or(usize::MAX));
            let told =
                |told: Option<Notice>| account.open.values().filter(|(_, it)| it.notice() == told).count();
            leaving += told(Some(notice));
            let newest = account.open.iter().rev().filter(|(_, (_, it))| it.notice().is_none());
            goes.extend(
                newest.take(told(None).saturating_sub(least)).map(|(order, one)| (*order, one, held)),
            );
        }
        goes.sort_unstable_by_key(|(order, ..)| Reverse(*order));
        goes.truncate(usize::try_from(wanted).unwrap_or(usize::MAX).saturating_sub(leaving));
        let (short, share) = (Weight::Connections.short(), u64::from(share));
        goes.into_iter()
            .map(|(_, (caller, holding), held)| {
                holding.tell(notice);
                ToldToGo { caller: *caller, short, held, share, notice }
            })
            .collect()
    }

    /// Closes connections that were told to come back at `before` or earlier and have not gone, of groups that weigh more than
    /// `share`: the newest first, and so many that none weighs less then, but for one where that is more than `level` still.
    pub(super) fn close_told(&self, by: Weight, level: u64, share: u64, before: u64) -> Vec<ToldToGo> {
        let (notice, now) = (Notice::Close, self.node.now());
        let lines = DownTo { by, level: share, whole: level.max(share), share, notice };
        let mut told = Vec::new();
        for account in self.groups.values() {
            let held = account.weight(by);
            let mut left = account.staying(by, notice, now);
            let goes = account.going(&mut left, lines, |holding| holding.stays_since(before));
            for (caller, holding) in goes.iter().rev().filter_map(|order| account.open.get(order)) {
                holding.tell(notice);
                told.push(ToldToGo { caller: *caller, short: by.short(), held, share, notice });
            }
        }
        told
    }
}

/// The account of a group. A new one has no connection, and owes until then.
fn account<'a>(
    groups: &'a mut HashMap<u64, GroupAccount, ahash::RandomState>,
    kept: &mut usize,
    group: u64,
    caller: CallerKey,
    owed_until: u64,
) -> &'a mut GroupAccount {
    groups.entry(group).or_insert_with(|| {
        *kept += 1;
        GroupAccount::owing(caller, owed_until)
    })
}

/// The highest number that `numbers` can be cut down to, each of them, so that their sum is at most `target`.
pub(super) fn level(numbers: impl Iterator<Item = u64> + Clone, target: u64) -> u64 {
    let (mut level, mut below) = (0, 0_u64);
    let mut above = numbers.clone().filter(|number| *number > 0).count();
    // Those below the level leave more to the others, so it rises, each time past one of them at least.
    while let Some(part) =
        u64::try_from(above).ok().and_then(|above| target.saturating_sub(below).checked_div(above))
    {
        if part <= level {
            return level;
        }
        level = part;
        below = numbers.clone().filter(|number| *number <= level).sum();
        above = numbers.clone().filter(|number| *number > level).count();
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::since_start::SinceStart;

    fn accounts() -> Accounts {
        Accounts::new(Arc::new(NodeHeld::new(Arc::default(), SinceStart::default())))
    }

    #[test]
    fn the_level_is_what_all_can_have() {
        for (case, numbers, target, want) in [
            ("nobody", &[][..], 0, u64::MAX),
            ("all fit", &[1, 2, 3], 6, u64::MAX),
            ("one is above", &[1, 2, 30], 13, 10),
            ("two are above", &[5, 100, 200], 25, 10),
            ("all are above", &[100, 200, 300], 30, 10),
            ("nothing is left", &[100, 200], 0, 0),
        ] {
            assert_eq!(level(numbers.iter().copied(), target), want, "{case}");
        }
    }

    proptest! {
        #[test]
        fn what_is_cut_down_to_the_level_fits_and_no_higher_one_does(
            numbers in prop::collection::vec(0..1_000_u64, 0..40),
            target in 0..20_000_u64,
        ) {
            let level = level(numbers.iter().copied(), target);
            let cut = |level: u64| numbers.iter().map(|number| (*number).min(level)).sum::<u64>();
            prop_assert!(cut(level) <= target);
            prop_assert!(level == u64::MAX || cut(level + 1) > target);
        }

        /// Sums are what connections say, whatever comes and goes, and nothing is left in the end.
        #[test]
        fn sums_are_those_of_the_connections(moves in prop::collection::vec((0..4_u32, 0..3_u8, 0..50_u64), 0..200)) {
            let mut accounts = accounts();
            let mut open: Vec<(u32, OpenPlace, Arc<Holding>)> = Vec::new();
            for (uid, what, bytes) in moves {
                match what {
                    0 => {
                        // Two UIDs to a family.
                        let (place, holding) = accounts.add(CallerKey::Uid(uid), u64::from(uid / 2), bytes);
                        open.push((uid, place, holding));
                    }
                    1 => if let Some((_, _, holding)) = open.iter().rfind(|it| it.0 == uid) {
                        holding.hold(bytes);
                    },
                    _ => if let Some(at) = open.iter().position(|it| it.0 == uid) {
                        accounts.take(&open.swap_remove(at).1);
                    },
                }
                let sum = |group: u64| -> u64 {
                    open.iter().filter(|it| u64::from(it.0 / 2) == group).map(|it| it.2.bytes()).sum()
                };
                prop_assert_eq!([0, 1].map(|group| accounts.of_group(group).bytes), [sum(0), sum(1)]);
                prop_assert_eq!(accounts.node.bytes(), sum(0) + sum(1));
                let own: u64 = open.iter().filter(|it| it.0 == 1).map(|it| it.2.bytes()).sum();
                prop_assert_eq!(accounts.of_caller(&CallerKey::Uid(1)).1, own);
                // A family is one of those that hold most.
                let has = |uid| open.iter().any(|it| it.0 == uid);
                let holder = match (has(0), has(1)) {
                    (false, false) => None,
                    (true, true) => Some(WhoHolds { caller: CallerKey::Uid(0), others: 1 }),
                    (first, _) => Some(WhoHolds { caller: CallerKey::Uid(if first { 0 } else { 1 }), others: 0 }),
                };
                let told = accounts.heaviest(9).into_iter().find(|it| Some(it.0) == holder);
                prop_assert_eq!(told.map_or(0, |it| it.2), sum(0));
                prop_assert_eq!(accounts.holder(0), holder);
            }
            for (_, place, holding) in open {
                accounts.take(&place);
                drop(holding);
            }
            prop_assert!(accounts.callers.len() == 0 && accounts.groups.is_empty());
            prop_assert_eq!(accounts.node.bytes(), 0);
        }
    }

    /// Seven small connections are less than five large ones, and nobody is told below the level.
    #[test]
    fn who_holds_most_bytes_is_told_newest_first_and_not_below_the_level() {
        let mut accounts = accounts();
        let mut open = |uid, group, bytes| accounts.add(CallerKey::Uid(uid), group, bytes);
        let neighbour: Vec<_> = (0..7).map(|_| open(1, 1, 30)).collect();
        let heavy: Vec<_> = (0..5).map(|n| open(100 + n, 2, 200)).collect();
        let level = accounts.level(Weight::Bytes, 810);
        assert_eq!(level, 600);
        // The neighbour's 210 stay as they are.
        let cut = |level| Cut { level, target: 210 + level };
        let told = accounts.shed(Weight::Bytes, cut(level), level, Shed::SendAway, Straddling::Stays);
        let callers: Vec<_> = told.iter().map(|told| told.caller).collect();
        assert_eq!(callers, [CallerKey::Uid(104), CallerKey::Uid(103)], "a family is one, the newest go");
        assert_eq!(told[0].held, 1000);
        assert_eq!(
            accounts.shed(Weight::Bytes, cut(level), level, Shed::SendAway, Straddling::Stays),
            [],
            "they are on their way"
        );
        assert!(neighbour.iter().all(|(_, holding)| holding.notice().is_none()));
        // 350 could only be reached from below: what is for crowds alone does that.
        assert_eq!(accounts.shed(Weight::Bytes, cut(350), 350, Shed::SendAway, Straddling::Stays).len(), 1);
        assert_eq!(
            accounts.shed(Weight::Bytes, cut(350), 350, Shed::CloseAboveShare, Straddling::Stays).len(),
            3,
            "the same"
        );
        assert_eq!(accounts.shed(Weight::Bytes, cut(350), 350, Shed::Close, Straddling::Stays).len(), 1);
        assert_eq!(
            accounts.shed(Weight::Connections, cut(3), 3, Shed::SendAway, Straddling::Stays).len(),
            4,
            "of the neighbour's seven"
        );
        assert_eq!(heavy[0].1.notice(), None);
    }

    /// More callers than there are places, with one each: no share is below one, and not all of them go.
    #[test]
    fn of_a_crowd_the_newest_go_and_no_more_than_have_to() {
        let mut accounts = accounts();
        let crowd: Vec<_> = (0..380).map(|n| accounts.add(CallerKey::Uid(n), u64::from(n), 1)).collect();
        let level = accounts.level(Weight::Connections, 315);
        assert_eq!(level, 0);
        let told =
            accounts.shed(Weight::Connections, Cut { level, target: 379 }, 8, Shed::Close, Straddling::Stays);
        let want = ToldToGo {
            caller: CallerKey::Uid(379),
            short: Short::Descriptors,
            held: 1,
            share: 8,
            notice: Notice::Close,
        };
        assert_eq!(told, [want]);
        assert_eq!(
            accounts.shed(Weight::Connections, Cut { level, target: 379 }, 8, Shed::Close, Straddling::Stays),
            []
        );
        drop(crowd);
    }

    /// One that was told to come back and stays is closed while others want what it has: not at once, and not below the share.
    #[tokio::test(start_paused = true)]
    async fn who_was_told_to_go_and_stays_is_closed() {
        let mut accounts = accounts();
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        let open: Vec<_> = (0..6).map(|_| accounts.add(CallerKey::Uid(1), 1, 10)).collect();
        let few: Vec<_> = (0..2).map(|_| accounts.add(CallerKey::Uid(2), 2, 10)).collect();
        for (_, holding) in few.iter().chain(&open[..5]) {
            holding.tell(Notice::ComeBack);
        }
        let now = accounts.node.now();
        let close = |before| accounts.close_told(Weight::Connections, 3, 3, before).len();
        assert_eq!(close(now - 1), 0, "they may still go");
        assert_eq!(close(now), 3);
        let notices: Vec<_> = open.iter().map(|(_, holding)| holding.notice()).collect();
        let (told, closed) = (Some(Notice::ComeBack), Some(Notice::Close));
        assert_eq!(notices, [told, told, closed, closed, closed, None]);
        assert!(few.iter().all(|(_, holding)| holding.notice() == told), "who has its share keeps it");
        assert_eq!(close(now), 0, "they are on their way");
    }

    /// What one group loses that is above its share by less than a connection, while somebody below its share is refused: one
    /// that is enough, the lightest; what fits beside the rest stays, and so does a last one, unless it is a large one.
    #[test]
    fn who_is_above_its_share_by_a_part_of_a_connection_gives_that_up() {
        const KIB: u64 = 1 << 10;
        for (case, held, share, level, goes) in [
            ("at the level", &[400, 400, 400][..], 1_000, 1_200, &[][..]),
            ("above it", &[400, 400, 400], 1_000, 1_100, &[2]),
            ("the lightest", &[500, 300, 900], 1_000, 1_100, &[0, 1]),
            ("the newest go first, if they are enough", &[900, 50, 100, 100], 1_000, 1_050, &[3]),
            ("small ones are no use, and stay", &[1_300, 40, 40], 600, 650, &[0]),
            ("the last one", &[620], 400, 450, &[]),
            ("the last of two", &[620, 610], 400, 450, &[0]),
            ("a last one that is large", &[900], 400, 450, &[0]),
            ("two of them", &[700, 900], 400, 450, &[0, 1]),
        ] {
            let mut accounts = accounts();
            let open: Vec<_> =
                held.iter().map(|held| accounts.add(CallerKey::Uid(1), 1, held * KIB)).collect();
            let neighbour = accounts.add(CallerKey::Uid(2), 2, share * KIB / 2);
            let cut = Cut { level: level * KIB, target: 0 };
            let shed =
                || accounts.shed(Weight::Bytes, cut, share * KIB, Shed::SendAway, Straddling::Goes).len();
            let with = |told: Notice| -> Vec<usize> {
                (0..open.len()).filter(|nth| open[*nth].1.notice() == Some(told)).collect()
            };
            shed();
            assert_eq!(with(Notice::ComeBack), goes, "{case}");
            assert_eq!(shed(), 0, "{case}: that is enough");
            accounts.close_told(Weight::Bytes, level * KIB, share * KIB, u64::MAX);
            assert_eq!(with(Notice::Close), goes, "{case}: they do not go");
            assert_eq!(neighbour.1.notice(), None, "{case}");
        }
    }

    /// What the kernel keeps of closed connections, until their peers read it, is held: for that others go.
    #[tokio::test(start_paused = true)]
    async fn what_closed_connections_hold_is_held() {
        let mut accounts = accounts();
        let open: Vec<_> = (0..6).map(|_| accounts.add(CallerKey::Uid(1), 1, 100)).collect();
        let shed = || {
            let cut = Cut { level: 400, target: 0 };
            accounts.shed(Weight::Bytes, cut, 300, Shed::CloseAboveShare, Straddling::Goes).len()
        };
        assert_eq!((shed(), shed()), (2, 0), "they are on their way");
        tokio::time::advance(std::time::Duration::from_millis(1_000)).await;
        assert_eq!((shed(), shed()), (2, 0), "what they hold stays");
        let told: Vec<_> = open.iter().map(|(_, holding)| holding.notice().is_some()).collect();
        assert_eq!(told, [false, false, true, true, true, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_answered_too_much_in_vain_gets_nothing_back_by_leaving() {
        let mut accounts = accounts();
        let (place, holding) = accounts.add(CallerKey::Uid(1), 1, 1);
        let wait = (0..9_000).map(|_| holding.wasted()).fold(None, |_, wait| wait).unwrap();
        accounts.take(&place);
        drop(holding);
        accounts.forget_paid();
        let (place, holding) = accounts.add(CallerKey::Uid(1), 1, 1);
        assert_eq!(holding.waits(), Some(wait));
        accounts.take(&place);
        tokio::time::advance(std::time::Duration::from_secs(60)).await;
        accounts.forget_paid();
        assert!(accounts.groups.is_empty() && accounts.kept == 0);

        // With no room for those who owe, it is owed by whoever comes.
        let many: Vec<_> = (0..=1024).map(|n| accounts.add(CallerKey::Uid(n), u64::from(n), 1)).collect();
        for (place, holding) in &many {
            for _ in 0..600 {
                let _wait = holding.wasted();
            }
            accounts.take(place);
        }
        assert_eq!(accounts.groups.len(), KEPT);
        assert!(accounts.add(CallerKey::Uid(9_999), 9_999, 1).1.waits().is_some());
    }
}
