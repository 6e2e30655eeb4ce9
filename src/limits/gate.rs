//! The gate at accept: who may hold how many connections, and open how many anew.
//!
//! A connection costs descriptors and memory before anything was asked for, so the first decision is made here. What an
//! admin set is asked first: blocked; the caller's open connections; its rate of new ones. Then what all share, of which a
//! part (the reserve) is kept for callers that hold no connection, or one, and a smaller one for those with a few: however much
//! others hold, there is a place, and memory for a call, for the next that comes
//! ([`lent_places`](super::lent_places), [`lent_memory`](super::lent_memory)). While descriptors, memory or the processor are
//! short, whoever has its share of what is short gets no more. Whoever can be many callers (a user with subordinate UIDs)
//! counts as one for all that. Admin connections have places of their own.
//!
//! A decision is a look-up: it waits for nobody, so no caller's connection stands behind another's. What connections hold
//! is told to their [`Holding`]; who holds how much is in [`accounts`](super::accounts), and never forgotten.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::time::timeout;

use super::{
    accounts::{Accounts, OpenPlace, Shed, Straddling, ToldToGo, Weight},
    admission::Limits,
    ask::{Ask, BucketKey, Hasher, HeldTokens},
    attempt::Attempt,
    bucket::{Quota, Shortfall},
    budget::{self, Pressure},
    caller::CallerKey,
    counters::Decision,
    gate_plan::GatePlan,
    gate_settings::GateRule,
    holding::{Holding, NodeHeld, Notice},
    ledger::{Ledger, PARENT_PARTS},
    lent_memory::LentMemory,
    lent_places::{KeptFor, LentPlace, LentPlaces, Vacancy},
    names::KeptOfNames,
    out_of_room::AllOutOfRoom,
    patience::FOR_ROOM,
    refusal::{ChargedAs, ConnectionRefusal, RejectionStatus, Stage},
    report::BucketName,
    room::{Room, Short},
    rule::Limit,
    shortage::Shortage,
    table::{ChargedTo, Table, nothing_to_spare},
};

/// Who holds fewer connections counts as holding none: one that calls anew for each call has left its last one,
/// and the agent may not have seen that yet.
const FEW: u32 = 2;
/// While something is short, shares are reckoned anew after so many nanoseconds, if somebody comes.
const SHARES_LAST: u64 = 50_000_000;
/// After somebody below its part of the places was refused, those that have theirs get no more for so many nanoseconds: it asks
/// again sooner.
const KEPT_FOR: u64 = 200_000_000;
/// Who was told to come back has so long for it before it is closed, while somebody below its share is refused: that one waits
/// longer.
const LEAVES_WITHIN: Duration = Duration::from_millis(150);
/// The most that are told of between two looks whose places others got.
const MOST_TOLD: usize = 256;

#[derive(Debug)]
pub(super) struct GateState {
    pub(super) rates: Table,
    pub(super) accounts: Accounts,
    pub(super) total: u32,
    admin: u32,
    /// Connections that were let in on memory that is set aside.
    lent: LentMemory,
    pub(super) bytes: Shortage,
    pub(super) connections: Shortage,
    /// Connections on places that are kept.
    places: LentPlaces,
    wanted: WantedPlaces,
    /// When shares were reckoned last.
    looked: u64,
    pub(super) out_of_room: AllOutOfRoom,
    /// Who was told to go since the watch last asked: never more than connections.
    told: Vec<ToldToGo>,
}

/// Places that others have who hold more than theirs.
#[derive(Debug, Default)]
struct WantedPlaces {
    /// How many were refused for that since these were last told to go.
    refused: u32,
    /// What each would have, if all had the same.
    each: u32,
    /// Until then whoever has that gets no more.
    until: u64,
}

#[derive(Debug)]
pub(super) struct SharedGate {
    pub(super) plan: ArcSwap<GatePlan>,
    hasher: Hasher,
    state: Mutex<GateState>,
    pub(super) node: Arc<NodeHeld>,
    /// Connections that were refused for want of processor time, since this was last asked.
    pub(super) wanting: AtomicU64,
    pub(super) ledger: Arc<Ledger>,
}

/// The gate. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Gate {
    pub(super) shared: Arc<SharedGate>,
}

/// A connection that was let in; its place is free again when this is dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct ConnectionPermit {
    shared: Arc<SharedGate>,
    /// `None` for the admin socket.
    place: Option<OpenPlace>,
    /// By what quota it paid a token of its caller's rate.
    paid: Option<Quota>,
    /// Whose it is counted as, once it is certain that it is let in.
    charged_as: Option<ChargedAs>,
    /// It was counted, or is not to be.
    counted: AtomicBool,
    holding: Arc<Holding>,
}

/// A connection that is being decided.
#[derive(Clone, Copy)]
pub(super) struct Arriving<'a> {
    pub(super) plan: &'a GatePlan,
    pub(super) rule: &'a GateRule,
    pub(super) caller: CallerKey,
    group: u64,
    open: u32,
    /// Connections of the caller and its family, and the bytes that they hold.
    pub(super) group_open: u32,
    pub(super) group_bytes: u64,
    /// Of these, what the kernel keeps of the names of its processes.
    group_names: u64,
    of_family: bool,
    pub(super) now: u64,
    attempt: Attempt,
}

/// How a connection is let in.
#[derive(Clone, Copy)]
struct LetIn {
    /// Only because it is a rehearsal.
    rehearsed: bool,
    /// On memory that is set aside.
    reserved: bool,
    paid: Option<Quota>,
    charged_as: ChargedAs,
    place: Vacancy,
    /// As often as it may, as far as nobody set that; or there is processor time for it.
    in_time: bool,
}

impl Gate {
    /// A gate that decides with `plan`. It counts and tells through `limits`.
    pub fn new(plan: GatePlan, limits: &Limits) -> Self {
        let node = Arc::new(NodeHeld::new(Arc::clone(limits.room()), limits.ledger().time));
        let state = GateState {
            rates: Table::new(plan.keys, PARENT_PARTS),
            accounts: Accounts::new(Arc::clone(&node)),
            total: 0,
            admin: 0,
            lent: LentMemory::default(),
            bytes: Shortage::default(),
            connections: Shortage::default(),
            places: LentPlaces::default(),
            wanted: WantedPlaces::default(),
            looked: 0,
            out_of_room: AllOutOfRoom::default(),
            told: Vec::new(),
        };
        let shared = SharedGate {
            plan: ArcSwap::from_pointee(plan),
            hasher: Hasher::default(),
            state: Mutex::new(state),
            node,
            wanting: AtomicU64::new(0),
            ledger: Arc::clone(limits.ledger()),
        };
        shared.take_over(&mut shared.state());
        Self { shared: Arc::new(shared) }
    }

    /// Decides with another plan. Connections that are open stay.
    pub fn reload(&self, plan: GatePlan) {
        let mut state = self.shared.state();
        state.rates.resize(plan.keys, PARENT_PARTS);
        self.shared.plan.store(Arc::new(plan));
        self.shared.take_over(&mut state);
    }

    /// Looks how short memory and descriptors are, where `measured` bytes are used by the process, and `reckoned` by what
    /// is no connection. The larger of what is reckoned and what is measured counts.
    pub fn look(&self, measured: Option<u64>, reckoned: u64) -> Pressure {
        let shared = &self.shared;
        let mut state = shared.state();
        // What admin connections take is set aside for them, and not taken from the others once more.
        let of_admin = u64::from(state.admin) * budget::ADMIN_CONNECTION;
        let of_admin = of_admin.min(shared.plan.load().admin_bytes());
        let unseen = measured.unwrap_or(0).saturating_sub(shared.node.bytes()).saturating_sub(of_admin);
        state.bytes.other = unseen.max(reckoned);
        shared.look(&mut state);
        state.accounts.forget_paid();
        state.bytes.pressure()
    }

    /// Reckons shares anew whenever much more is held than when they were last reckoned, and tells those to go for whom somebody
    /// below its share was refused; for ever. Whoever does not go is closed while that one waits.
    pub async fn follow(&self) {
        loop {
            let outdated = self.shared.node.outdated();
            if self.shared.state().tells_to_go() {
                drop(timeout(LEAVES_WITHIN, outdated).await);
            } else {
                outdated.await;
            }
            self.shared.look(&mut self.shared.state());
            // The watch's next look is a quarter of a second away; whom it did not tell itself it still tells of.
            let told = self.shed_now();
            self.shared.state().told.extend(told);
        }
    }

    /// Tells those who hold more than their share to go, as far as memory or descriptors are so short: the newest of their
    /// connections, and not what is below their share. While somebody below its share is refused for that, a connection of which
    /// a part is goes too, and whoever does not go is closed. Returns who was told.
    pub fn shed(&self) -> Vec<ToldToGo> {
        let mut told = std::mem::take(&mut self.shared.state().told);
        told.extend(self.shed_now());
        told
    }

    fn shed_now(&self) -> Vec<ToldToGo> {
        let mut state = self.shared.state();
        let GateState { accounts, bytes, connections, wanted: places_wanted, .. } = &mut *state;
        let (mut told, now) = (Vec::new(), self.shared.node.now());
        let before = now.checked_sub(nanos(LEAVES_WITHIN));
        for (by, shortage) in [(Weight::Bytes, bytes), (Weight::Connections, connections)] {
            if std::mem::take(&mut shortage.wanted) {
                shortage.wanted_until = now.saturating_add(nanos(FOR_ROOM));
            }
            let wanted = now < shortage.wanted_until;
            let shed = match shortage.pressure() {
                Pressure::None | Pressure::ShrinkCaches => continue,
                Pressure::RefuseNew if shortage.is_nearly_out() => Shed::CloseAboveShare,
                Pressure::RefuseNew => Shed::SendAway,
                Pressure::CloseHeaviest => Shed::Close,
            };
            let share = shortage.share();
            let Some(cut) = shortage.cut_to(|target| accounts.level(by, target)) else { continue };
            if wanted && let Some(before) = before {
                told.extend(accounts.close_told(by, cut.level, share, before));
            }
            let straddling = if wanted { Straddling::Goes } else { Straddling::Stays };
            told.extend(accounts.shed(by, cut, share, shed, straddling));
        }
        let refused = std::mem::take(&mut places_wanted.refused);
        if refused > 0 {
            let each = u64::from(places_wanted.each);
            if let Some(before) = before {
                told.extend(accounts.close_told(Weight::Connections, each, each, before));
            }
            told.extend(accounts.make_way(refused, places_wanted.each));
        }
        told
    }

    /// Lets a connection of `caller` in, or not; at once.
    ///
    /// # Errors
    /// [`ConnectionRefusal`]: close it.
    pub fn open(&self, caller: CallerKey) -> Result<ConnectionPermit, ConnectionRefusal> {
        self.open_on(caller, Attempt::Only)
    }

    /// The same for one that may be asked for again: until the last time a refusal for want of room is neither counted nor told.
    ///
    /// # Errors
    /// [`ConnectionRefusal`]: close it, or ask again, if it [is soft](ConnectionRefusal::is_soft).
    pub fn open_on(
        &self,
        caller: CallerKey,
        attempt: Attempt,
    ) -> Result<ConnectionPermit, ConnectionRefusal> {
        let shared = &self.shared;
        let plan = shared.plan.load();
        let now = shared.ledger.now();
        let mut state = shared.state();
        let arriving = shared.arriving(&plan, caller, now, attempt, &mut state);
        let group_open = arriving.group_open;
        let taken = state.taken();
        state.places.settle(taken, plan.for_anybody());
        if !state.is_last(&plan, shared.node.bytes()) {
            state.lent.give_back();
        } else if group_open == 0 && state.lent.connections() >= plan.reserved() {
            state.take_back(now);
        }
        let decided = shared.decide(&arriving, &mut state);
        if decided
            .is_err_and(|refusal| state.wants(&arriving, refusal) | state.wants_its_part(&arriving, refusal))
        {
            shared.node.wake();
        }
        let LetIn { rehearsed, reserved, paid, charged_as, place: vacancy, in_time } = match decided {
            Ok(let_in) => let_in,
            Err(refusal) if !attempt.is_last() && refusal.is_soft() => {
                shared.want(refusal);
                return Err(refusal);
            }
            Err(refusal) => {
                shared.note_refused(&arriving, refusal, &mut state);
                drop(state);
                shared.refused(refusal, caller, now);
                return Err(refusal);
            }
        };
        let counters = &shared.ledger.counters;
        counters.let_in();
        let group = arriving.group;
        let (place, holding) = state.accounts.add(caller, group, budget::PARKED);
        if in_time {
            holding.let_first_in();
        }
        if reserved {
            state.lent.lend(now, caller, &holding, plan.reserved());
        }
        state.give(vacancy, LentPlace { since: now, caller, group, holding: Arc::downgrade(&holding) });
        state.total += 1;
        drop(state);
        let charged_as = (!rehearsed).then_some(charged_as);
        let counted = AtomicBool::new(false);
        Ok(ConnectionPermit {
            shared: Arc::clone(shared),
            place: Some(place),
            paid,
            charged_as,
            counted,
            holding,
        })
    }

    /// The process with this number, of a `user`, was read in `/proc` to find out that it is this caller's.
    pub fn was_asked_after(&self, user: CallerKey, caller: CallerKey, pid: i32) {
        let [of_user, group] = [user, caller].map(|caller| self.family_of(caller));
        let mut state = self.shared.state();
        state.accounts.reads_process(caller, group, pid);
        state.accounts.reads_in_vain(user, of_user);
    }

    /// It is let in.
    pub fn asked_after_is_let_in(&self, user: CallerKey) {
        let of_user = self.family_of(user);
        self.shared.state().accounts.read_not_in_vain(of_user);
    }

    /// Whether somebody may hold some.
    pub fn may_hold_names(&self) -> bool {
        self.shared.state().accounts.may_hold_names()
    }

    /// Of processes of a caller whose connections have ended somebody holds the names of so many, and of so many it is not known.
    pub fn found_names(&self, caller: CallerKey, held: u64, unknown: u64) {
        let group = self.family_of(caller);
        self.shared.state().accounts.found_names(caller, group, held, unknown);
    }

    /// Of how many processes of which families what was found is forgotten since this was last asked.
    pub fn names_forgotten(&self) -> HashMap<u64, u64, ahash::RandomState> {
        self.shared.state().accounts.names_forgotten()
    }

    /// Whether further processes of `user` may be read before they are let in: not while memory is short, and the kernel keeps as
    /// much of those that were read in vain as makes a part of it that only one who holds something has.
    pub fn may_show_processes(&self, user: CallerKey) -> bool {
        if !self.room().is_short(Short::Memory) {
            return true;
        }
        let group = self.family_of(user);
        let state = self.shared.state();
        state.accounts.read_in_vain(group) < state.bytes.whole / budget::SHARES
    }

    /// The kernel keeps so many bytes of the [names](super::names) of callers' processes.
    pub fn names_are(&self, kept: KeptOfNames) {
        self.shared.state().accounts.names_are(kept);
    }

    /// One that was let in begins to speak, and found memory for it: it is counted as let in. Whoever says nothing is when it ends.
    pub fn has_begun(&self, permit: &ConnectionPermit) {
        permit.count();
    }

    /// Refuses one after all that was let in and finds no memory now that it begins to speak: told and counted as one that finds
    /// none at once. The token that it paid is its caller's again.
    pub fn refuse_begun(&self, permit: &ConnectionPermit) -> ConnectionRefusal {
        let Some(caller) = permit.place.as_ref().map(OpenPlace::caller) else {
            return ConnectionRefusal::AdminConnections;
        };
        permit.counted.store(true, Relaxed);
        self.refuse_outright(caller, |it, state| {
            state.rates.take_back(it.now, self.shared.key(it.plan, caller), permit.paid);
            let holds_share = it.group_bytes >= state.bytes.share();
            if holds_share { ConnectionRefusal::Memory } else { ConnectionRefusal::MemoryTaken }
        })
    }

    /// Refuses one of a `user` of whose processes no more [may be read](Self::may_show_processes).
    pub fn refuse_unread(&self, user: CallerKey) -> ConnectionRefusal {
        self.refuse_outright(user, |_it, _state| ConnectionRefusal::MemoryTaken)
    }

    /// Refuses one without asking whether there is room, and counts and tells it.
    fn refuse_outright(
        &self,
        caller: CallerKey,
        why: impl FnOnce(&Arriving<'_>, &mut GateState) -> ConnectionRefusal,
    ) -> ConnectionRefusal {
        let shared = &self.shared;
        let plan = shared.plan.load();
        let now = shared.ledger.now();
        let mut state = shared.state();
        let it = shared.arriving(&plan, caller, now, Attempt::Last, &mut state);
        let refusal = why(&it, &mut state);
        shared.note_refused(&it, refusal, &mut state);
        drop(state);
        shared.refused(refusal, caller, now);
        refusal
    }

    /// Lets a connection to the admin socket in: these have places of their own.
    ///
    /// # Errors
    /// [`ConnectionRefusal::AdminConnections`] when they are taken.
    pub fn open_admin(&self) -> Result<ConnectionPermit, ConnectionRefusal> {
        let mut state = self.shared.state();
        if state.admin >= self.shared.plan.load().admin {
            return Err(ConnectionRefusal::AdminConnections);
        }
        state.admin += 1;
        drop(state);
        let shared = Arc::clone(&self.shared);
        let counted = AtomicBool::new(true);
        Ok(ConnectionPermit {
            shared,
            place: None,
            paid: None,
            charged_as: None,
            counted,
            holding: Arc::default(),
        })
    }

    /// Whether there is room.
    pub fn room(&self) -> &Arc<Room> {
        self.shared.node.room()
    }

    /// When `caller` may come back that was refused for this, if that is known: when its rate of connections allows one more.
    /// When others leave is not; nor, where the processor is short, how many of a crowd wait for the same token.
    pub fn wait(&self, caller: CallerKey, why: ConnectionRefusal) -> Option<Duration> {
        if !matches!(why, ConnectionRefusal::CallerRate | ConnectionRefusal::OverflowRate) {
            return None;
        }
        let shared = &self.shared;
        let plan = shared.plan.load();
        let Limit::Quota(quota) = plan.rule(&caller).limit() else { return None };
        let key = shared.key(&plan, caller);
        shared.state().rates.wait(shared.ledger.now(), key, quota)
    }

    /// What callers are told that a limit refuses which an admin set.
    pub fn rejection_status(&self) -> RejectionStatus {
        self.shared.plan.load().status
    }

    /// What a caller and its family have in common, and nobody else.
    pub fn family_of(&self, caller: CallerKey) -> u64 {
        self.shared.plan.load().families.group(caller)
    }
}

impl SharedGate {
    pub(super) fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn key(&self, plan: &GatePlan, caller: CallerKey) -> BucketKey {
        BucketKey { hash: self.hasher.hash(caller), parent: plan.families.parent(caller) }
    }

    /// Takes over what the plan says of memory and descriptors.
    fn take_over(&self, state: &mut GateState) {
        let plan = self.plan.load();
        state.bytes.steps = plan.memory;
        state.bytes.whole = plan.budget;
        state.bytes.spare = budget::spare(plan.budget).saturating_add(plan.admin_bytes());
        state.bytes.reserved = plan.reserved_bytes();
        state.bytes.least = plan.budget / budget::SHARES;
        state.connections.whole = u64::from(plan.most);
        state.connections.reserved = u64::from(plan.most - plan.for_anybody());
        state.places.keep(plan.reserve, plan.kept_for_few());
        state.connections.firm = true;
        state.connections.least = plan.least_connections();
        self.look(state);
    }

    /// Reckons anew how short memory and descriptors are, and the shares.
    fn look(&self, state: &mut GateState) {
        let GateState { accounts, bytes, connections, total, .. } = state;
        bytes.wanted |= self.node.was_wanted();
        bytes.look(self.node.bytes(), |target| accounts.level(Weight::Bytes, target));
        connections.look(u64::from(*total), |target| accounts.level(Weight::Connections, target));
        let (short_from, room_below) = bytes.bounds();
        self.node.bound(short_from, room_below);
        let bounds @ [_, tight, ..] = bytes.last_bounds();
        let part = tight / u64::try_from(accounts.groups()).unwrap_or(u64::MAX).max(1);
        self.node.close(bounds, bytes.least, part);
        self.node.set_share(bytes.is_short().then(|| bytes.share()), bytes.look_from());
        self.node.room().set(Short::Descriptors, connections.is_short());
        state.looked = self.ledger.now();
    }

    /// One that comes, with what its caller holds. Shares are reckoned anew where they are too old for it.
    fn arriving<'a>(
        &self,
        plan: &'a GatePlan,
        caller: CallerKey,
        now: u64,
        attempt: Attempt,
        state: &mut GateState,
    ) -> Arriving<'a> {
        let aged = now.saturating_sub(state.looked) >= SHARES_LAST && self.node.room().is_short_of_places();
        if aged || state.is_outdated(self.node.bytes()) {
            self.look(state);
        }
        let group = plan.families.group(caller);
        let held = state.accounts.of_group(group);
        Arriving {
            plan,
            rule: plan.rule(&caller),
            caller,
            group,
            open: state.accounts.open_of(&caller),
            group_open: held.open,
            group_bytes: held.bytes,
            group_names: held.names,
            of_family: plan.families.of(caller).is_some(),
            now,
            attempt,
        }
    }

    /// Asks all questions of the module's documentation.
    fn decide(&self, it: &Arriving<'_>, state: &mut GateState) -> Result<LetIn, ConnectionRefusal> {
        let mut rehearsed = false;
        let mut rehearse = |refusal| {
            self.count(refusal, it.caller, Decision::WouldRefuse);
            rehearsed = true;
        };
        // First what is the caller's own; then, once that lets it pass, what all share.
        let held = match self.decide_own(it, state) {
            Err(refusal) if it.plan.dry || it.rule.dry_run => {
                rehearse(refusal);
                None
            }
            decided => decided?,
        };
        let decided = match self.decide_node(it, state) {
            // A rehearsal ends where descriptors do: what cannot be taken is not taken.
            Err(refusal) if it.plan.dry && state.total < it.plan.most => {
                rehearse(refusal);
                Ok((false, Vacancy::Beside))
            }
            decided => decided,
        };
        let in_full = |it: &HeldTokens| it.tokens > 0 && matches!(it.place, ChargedTo::Own(_));
        let paid = held.filter(|it| decided.is_ok() && in_full(it)).map(|it| it.quota);
        if let Some(held) = held {
            let level = state.rates.settle_held(&held, u32::from(decided.is_ok()));
            if decided.is_ok() {
                self.ledger.counters.count_soft_limits(it.plan.soft, Stage::Gate, level);
            }
        }
        let own = it.caller.charged_as();
        let charged_as = held.map_or(own, |it| it.place.charged_as(own));
        let in_time = !rehearsed && (it.rule.rate.is_none() || !self.node.room().is_short(Short::Processor));
        decided.map(|(reserved, place)| LetIn { rehearsed, reserved, paid, charged_as, place, in_time })
    }

    /// What is the caller's own. Holds a token of its rate, if it has one; who passes without is counted in the same way.
    fn decide_own(
        &self,
        it: &Arriving<'_>,
        state: &mut GateState,
    ) -> Result<Option<HeldTokens>, ConnectionRefusal> {
        let Arriving { plan, rule, caller, open, group_open, of_family, now, attempt, .. } = *it;
        let quota = match rule.limit() {
            Limit::Block => return Err(ConnectionRefusal::Blocked),
            Limit::Exempt => return Ok(None),
            Limit::Unlimited => None,
            Limit::Quota(quota) => Some(quota),
        };
        let key = self.key(plan, caller);
        if let Some(most) = rule.connections
            && (open >= most.get() || of_family && group_open >= plan.connections_of_family(most.get()))
        {
            let who = || (BucketName::Caller(caller), "connections");
            state.rates.note_refused_anybody(now, key, quota.unwrap_or(Quota::NOTHING_TAKEN), who);
            state.rates.note_asked(now, key, attempt);
            return Err(ConnectionRefusal::CallerConnections);
        }
        let Some(quota) = quota else { return Ok(None) };
        let ask = Ask { key, quota, since: now, cost: 1, taker: None, attempt };
        // What nobody set only says who comes first.
        let short = match rule.rate {
            None if !self.node.room().is_short(Short::Processor) => Shortfall::Pass,
            _ => Shortfall::Refuse,
        };
        let who = || (BucketName::Caller(caller), "connections");
        match state.rates.hold_by(now, &ask, short, nothing_to_spare, who) {
            Ok(held) => Ok(Some(held)),
            Err(_lack) if rule.rate.is_none() => Err(ConnectionRefusal::Processor),
            // One that is refused has no bucket where the table has no room for it.
            Err(_lack) if !state.rates.knows(key) => Err(ConnectionRefusal::OverflowRate),
            Err(_lack) => Err(ConnectionRefusal::CallerRate),
        }
    }

    /// What all share. Returns whether it takes memory that is set aside for those who hold nothing, and its place.
    fn decide_node(
        &self,
        it: &Arriving<'_>,
        state: &GateState,
    ) -> Result<(bool, Vacancy), ConnectionRefusal> {
        let Arriving { plan, rule, group_open, group_bytes, group_names, .. } = *it;
        let exempt = rule.limit() == Limit::Exempt;
        // Who has few connections may hold what earlier ones left.
        let newcomer = group_open < FEW && group_names < plan.budget / budget::SHARES || exempt;
        let place = state.vacancy(it, exempt).ok_or(ConnectionRefusal::NodeConnections)?;
        let room = self.node.room();
        if !newcomer
            && room.is_short(Short::Descriptors)
            && u64::from(group_open) >= state.connections.share()
        {
            return Err(ConnectionRefusal::Descriptors);
        }
        let left = state.bytes.left(self.node.bytes());
        let last = state.is_last(plan, self.node.bytes());
        if newcomer {
            // Half of the places is for those who have none.
            let places = if group_open == 0 { plan.reserved() } else { plan.reserved() / 2 };
            if !last || exempt || state.lent.connections() < places {
                return Ok((last, place));
            }
            if group_open == 0 {
                return Err(ConnectionRefusal::MemoryTaken);
            }
        }
        // Half of what is set aside is for those, too, who hold less than anybody's least share.
        let little = group_bytes < plan.budget / budget::SHARES;
        if room.is_short(Short::Memory) && group_bytes >= state.bytes.share() {
            return Err(ConnectionRefusal::Memory);
        }
        if last && !(little && left >= plan.reserved_bytes() / 2) {
            return Err(ConnectionRefusal::MemoryTaken);
        }
        Ok((false, place))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl GateState {
    /// Whether something is so short that callers are told to go for it.
    fn tells_to_go(&self) -> bool {
        self.bytes.pressure().max(self.connections.pressure()) >= Pressure::RefuseNew
    }

    /// Whether nothing is left beside what is set aside.
    fn is_last(&self, plan: &GatePlan, held: u64) -> bool {
        self.bytes.left(held) < plan.reserved_bytes() + budget::NEWCOMER
    }

    /// Places that are taken, but for those of connections that are being closed for others.
    fn taken(&self) -> u32 {
        self.total.saturating_sub(self.places.leaving())
    }

    /// A place for one that asks, whatever else it lacks.
    fn vacancy(&self, it: &Arriving<'_>, exempt: bool) -> Option<Vacancy> {
        let Arriving { plan, group_open, now, .. } = *it;
        let part = match group_open {
            _ if exempt => Some(KeptFor::Nothing),
            0 => Some(KeptFor::Nothing),
            1 => Some(KeptFor::One),
            few if u64::from(few) < plan.least_connections() => Some(KeptFor::Few),
            _ => None,
        };
        if part.is_none_or(|part| part == KeptFor::Few)
            && now < self.wanted.until
            && group_open >= self.wanted.each
        {
            return None;
        }
        if self.taken() < plan.for_anybody() {
            return Some(Vacancy::Beside);
        }
        let (part, each) = (part?, self.each_may_have(plan));
        let may_lose =
            |group| part != KeptFor::Few || self.accounts.of_group(group).open > each.max(group_open);
        self.places.vacancy(part, now, it.group, may_lose)
    }

    /// How many places each has that anybody may have, if all who have some have the same.
    fn each_may_have(&self, plan: &GatePlan) -> u32 {
        plan.for_anybody() / u32::try_from(self.accounts.groups()).unwrap_or(u32::MAX).max(1)
    }

    /// Gives a connection its place. Whoever had it goes.
    fn give(&mut self, vacancy: Vacancy, one: LentPlace) {
        let part = match vacancy {
            Vacancy::Beside => return,
            Vacancy::Free(part) => part,
            Vacancy::Lent(part, at) => {
                if let Some(LentPlace { caller, group, holding, .. }) = self.places.take_back(part, at)
                    && let Some(holding) = holding.upgrade()
                {
                    holding.tell(Notice::Close);
                    let held = u64::from(self.accounts.of_group(group).open);
                    let (short, share, notice) =
                        (Short::Descriptors, self.connections.share(), Notice::Close);
                    if self.told.len() < MOST_TOLD {
                        self.told.push(ToldToGo { caller, short, held, share, notice });
                    }
                }
                part
            }
        };
        self.places.lend(part, one);
    }

    /// Takes memory that is set aside back from who has had it longest, if that is long enough.
    fn take_back(&mut self, now: u64) {
        if let Some((caller, holding)) = self.lent.take_back(now) {
            self.told.push(ToldToGo {
                caller,
                short: Short::Memory,
                held: holding.bytes(),
                share: self.bytes.share(),
                notice: Notice::Close,
            });
        }
    }

    /// Whether shares were reckoned when much less was held.
    fn is_outdated(&self, held: u64) -> bool {
        self.bytes.is_outdated(held) || self.connections.is_outdated(u64::from(self.total))
    }

    /// Whether others are to go for one that was refused, because they hold more than their share and it holds less. Notes it.
    fn wants(&mut self, it: &Arriving<'_>, refusal: ConnectionRefusal) -> bool {
        let (shortage, held) = match refusal {
            ConnectionRefusal::MemoryTaken => (&mut self.bytes, it.group_bytes),
            ConnectionRefusal::NodeConnections => (&mut self.connections, u64::from(it.group_open)),
            _ => return false,
        };
        let wants = held < shortage.share();
        shortage.wanted |= wants;
        wants
    }

    /// The same of one that has a few connections, and less than it had if all had the same.
    fn wants_its_part(&mut self, it: &Arriving<'_>, refusal: ConnectionRefusal) -> bool {
        if refusal != ConnectionRefusal::NodeConnections || it.group_open < FEW {
            return false;
        }
        let each = self.each_may_have(it.plan);
        let known = it.now < self.wanted.until;
        let wants = it.group_open < each && (known || self.accounts.any_above(each));
        if wants {
            let WantedPlaces { refused, .. } = self.wanted;
            self.wanted = WantedPlaces { refused: refused + 1, each, until: it.now + KEPT_FOR };
        }
        wants
    }
}

impl ConnectionPermit {
    /// What the connection holds, to be told by whoever serves it.
    pub fn holding(&self) -> &Arc<Holding> {
        &self.holding
    }

    /// Counts it as let in, unless that was done.
    fn count(&self) {
        if let Some(charged_as) = self.charged_as
            && !self.counted.swap(true, Relaxed)
        {
            self.shared.ledger.counters.count(Stage::Gate, None, charged_as, Decision::Allowed);
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.count();
        let mut state = self.shared.state();
        let Some(place) = &self.place else {
            state.admin = state.admin.saturating_sub(1);
            return;
        };
        state.total = state.total.saturating_sub(1);
        state.lent.gone(&self.holding);
        state.places.gone(&self.holding);
        state.accounts.take(place);
    }
}

#[cfg(test)]
impl Gate {
    /// One with what holds by default, a thousand descriptors, and this budget.
    pub(crate) fn of_defaults(budget: u64) -> Self {
        use crate::{limits::LimitSettings, os::clock::Clock, telemetry::registry::Registry};

        let settings = LimitSettings::default();
        let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder));
        Self::new(GatePlan::new(&settings, 1_000, budget).unwrap(), &limits)
    }
}
