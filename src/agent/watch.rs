//! What the agent does every quarter of a second, and while nobody calls every second: looks how much memory it uses and acts on
//! it, and says in the log who is being refused.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    meter::MemoryMeter,
    short_processor::{ShortProcessor, ShortTold},
};
use crate::{
    api::Journal,
    attest::Attestor,
    limits::{
        self, ConnectionRefusal, Limits, Method, ToldToGo,
        budget::{Accounted, Pressure},
        holding::Notice,
        out_of_room::OutOfRoom,
        pace::{Complaints, Settled},
        processor::cores_text,
        refusal::{Reason, Stage},
        report::{BucketName, Event, WhatIsRefused, foremost},
        room::Short,
        rule::Origin,
        shares::Taking,
    },
    os::heap::{self, ResidentSet},
    store::{JwtCache, Store, X509Cache},
    telemetry::{http::HeldPlaces, registry::Label as _},
};

/// Caches that were emptied are emptied again after so many quarters of a second, or when memory is shorter than then, and
/// not at each look: what is made anew costs its caller a signature.
const TICKS_PER_SHRINK: u32 = 40;

/// Log lines about refusals and the gauges are worth a look this often.
const TICKS_PER_REPORT: u32 = 4;
/// So many quarters of a second are between two looks while nobody calls.
const TICKS_IN_QUIET: u32 = 4;

/// The heap is given back once it has grown by so much, in bytes, and grows no more: what entries came in, and what their SVIDs
/// were made with, is several times what stays of them.
const GROWN: u64 = 1 << 20;

/// When the heap is given back.
#[derive(Debug, Default)]
struct HeapGrowth {
    /// As it was when it was last given back, or smaller since.
    kept: u64,
    /// As it was a second ago.
    before: u64,
}

impl HeapGrowth {
    /// Whether a heap of this size is to be given back. To be asked once a second.
    fn is_over(&mut self, now: u64) -> bool {
        self.kept = self.kept.min(now);
        let is_over = now <= self.before && now >= self.kept + GROWN;
        self.before = now;
        is_over
    }
}

/// What is looked after.
pub(super) struct Watch {
    pub(super) limits: Limits,
    pub(super) gate: limits::Gate,
    pub(super) attestor: Arc<Attestor>,
    pub(super) x509: Arc<X509Cache>,
    pub(super) jwt: Arc<JwtCache>,
    pub(super) store: Arc<Store>,
    pub(super) journal: Arc<Journal>,
    /// Of the HTTP listeners.
    pub(super) http: Vec<HeldPlaces>,
    pub(super) meter: MemoryMeter,
    pub(super) complaints: Complaints<&'static str>,
}

impl Watch {
    /// Looks for ever.
    pub(super) async fn run(self) {
        let mut pressure = Pressure::None;
        let mut tick = 0_u32;
        // When, and how short memory was.
        let mut emptied: Option<(u32, Pressure)> = None;
        let mut growth = HeapGrowth::default();
        let mut processor = ShortProcessor::default();
        let mut ticks = 1;
        loop {
            let emptied_at = emptied.map_or(Pressure::None, |(at, then)| {
                if tick.wrapping_sub(at) < TICKS_PER_SHRINK { then } else { Pressure::None }
            });
            let mut resident = heap::resident_set();
            if self.relieve(&mut pressure, emptied_at, &mut resident) {
                emptied = Some((tick, pressure));
            }
            let before = tick;
            tick = tick.wrapping_add(ticks);
            if tick / TICKS_PER_REPORT != before / TICKS_PER_REPORT {
                self.report();
                self.tell_of_processor(&mut processor);
                let without_files = |set: Option<ResidentSet>| set.map_or(0, |set| set.without_files);
                if growth.is_over(without_files(resident)) {
                    heap::trim();
                    growth.kept = without_files(heap::resident_set());
                }
            }
            ticks = if self.meter.next_look().await { TICKS_IN_QUIET } else { 1 };
        }
    }

    /// Does what the budget asks for. Each step does what those before it do; caches are emptied when memory
    /// is shorter than `emptied_at`. What is `resident` is looked at again where it has changed by that. Returns whether they were.
    fn relieve(
        &self,
        pressure: &mut Pressure,
        emptied_at: Pressure,
        resident: &mut Option<ResidentSet>,
    ) -> bool {
        let look = |resident| self.gate.look(self.measured(resident), self.accounted().bytes());
        let mut now = look(*resident);
        let empty = now > emptied_at;
        if empty {
            self.jwt.clear();
            self.x509.shrink();
            self.store.forget_answers();
            self.limits.shrink();
        }
        if now >= Pressure::ShrinkCaches {
            heap::trim();
            // What shrinking gave back counts.
            *resident = heap::resident_set();
            now = look(*resident);
        }
        for told in self.gate.shed() {
            self.tell_of(&told);
        }
        if now != *pressure {
            let memory = self.gate.memory();
            let (used, held, budget) = (memory.used, memory.held, memory.budget);
            match now {
                Pressure::None => {
                    tracing::info!(used, held, budget, "memory limit: memory is within the budget again")
                }
                Pressure::ShrinkCaches => tracing::info!(
                    used,
                    held,
                    budget,
                    "memory limit: memory is short, so caches are emptied and callers that hold their share get no more"
                ),
                Pressure::RefuseNew => tracing::warn!(
                    used,
                    held,
                    budget,
                    "memory limit: memory is short, so callers that hold more than their share are told to come back"
                ),
                Pressure::CloseHeaviest => {
                    tracing::warn!(
                        used,
                        held,
                        budget,
                        "memory limit: memory runs out, so connections of the callers that hold most are closed"
                    );
                }
            }
            *pressure = now;
        }
        empty
    }

    /// What the process uses by now, whatever it was reckoned at: its own pages, and where it is alone in a cgroup what is
    /// charged to that, if it is more. Those of its program are charged to whoever read them first, and dropped before
    /// anybody is killed.
    fn measured(&self, resident: Option<ResidentSet>) -> Option<u64> {
        let own = resident?.without_files;
        Some(self.meter.charged().map_or(own, |charged| charged.used.max(own)))
    }

    /// Says who was told to go, and for what it holds.
    fn tell_of(&self, told: &ToldToGo) {
        let ToldToGo { caller, short, held, share, notice } = *told;
        let what = match notice {
            Notice::ComeBack => "told to come back",
            Notice::Close => "closed",
        };
        let Some(times) = self.complaints.note(self.gate.head(caller), what, Instant::now()) else { return };
        let caller = self.gate.holder(caller);
        let limit = if short == Short::Memory { "memory limit" } else { "connection limit" };
        if held > share {
            tracing::warn!(
                caller = %caller,
                held,
                share,
                connections = times,
                what,
                "{limit}: caller holds more than its share, and its newest connections are ended"
            );
        } else {
            tracing::warn!(
                caller = %caller,
                held,
                connections = times,
                what,
                "{limit}: more callers came than there is room for, and connections are ended for others"
            );
        }
    }

    /// Says when the processor begins to be short, and when it no longer is.
    fn tell_of_processor(&self, processor: &mut ShortProcessor) {
        let cores = self.gate.processor_share().text();
        let lately = self.limits.room().processor_use_when_short();
        match processor.look(self.limits.room().is_short(Short::Processor), Instant::now()) {
            Some(ShortTold::Began) => tracing::warn!(
                cores,
                used = cores_text(lately.ran),
                waited = cores_text(lately.waited),
                "processor limit: the agent uses or waits for more of the processor than it may, so what holds by default binds"
            ),
            Some(ShortTold::Ended { lasted }) => {
                let seconds = lasted.as_secs();
                tracing::info!(cores, seconds, "processor limit: the agent has processor time again");
            }
            None => {}
        }
    }

    /// Says who was refused for want of room.
    fn tell_of_refusal(&self, refused: &OutOfRoom) {
        let OutOfRoom { caller, head, refusal, held, share } = *refused;
        let short_of = match refusal {
            ConnectionRefusal::Descriptors => self.gate.places(),
            refusal => refusal.text(),
        };
        if self.complaints.note(head, short_of, Instant::now()).is_none() {
            return;
        }
        let caller = self.gate.holder(caller);
        let limit = match refusal {
            ConnectionRefusal::Memory | ConnectionRefusal::MemoryTaken => "memory limit",
            ConnectionRefusal::Processor => {
                tracing::warn!(
                    caller = %caller,
                    short_of,
                    held,
                    rate = self.gate.rate_of(refused.caller),
                    "processor limit: caller connects more often than its rate, and is refused until there is processor time"
                );
                return;
            }
            _ => "connection limit",
        };
        // Where nobody has reckoned it, anybody may have all.
        let share_told = (share < u64::MAX).then_some(share);
        if share_told.is_none() {
            tracing::warn!(
                caller = %caller,
                short_of,
                held,
                "{limit}: caller gets no further connection, as what is left is kept for callers that hold next to nothing"
            );
        } else if held >= share {
            tracing::warn!(
                caller = %caller,
                short_of,
                held,
                share = share_told,
                "{limit}: caller holds its share, and gets no further connection until there is room"
            );
        } else {
            tracing::warn!(
                caller = %caller,
                short_of,
                held,
                share = share_told,
                "{limit}: caller holds less than its share, and gets no connection while others leave no room"
            );
        }
    }

    /// The key of a bucket. A family is one: of what the node is short of, those who have connections, and else those who are
    /// refused.
    fn key_text(&self, stage: Stage, name: &BucketName, with_family: bool) -> String {
        match name {
            BucketName::Caller(caller) if stage == Stage::Node => self.gate.holder(*caller).to_string(),
            name if with_family => format!("{name} and others of its range"),
            name => name.to_string(),
        }
    }

    fn accounted(&self) -> Accounted {
        let (callers, identities) = self.limits.keys();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Accounted {
            held: 0,
            keys: count(callers + identities + self.gate.keys()),
            jwt_svids: count(self.jwt.len()),
            x509_svids: count(self.x509.counts().cached),
            attestors: count(self.attestor.kept_bytes()),
            http: self.http.iter().map(HeldPlaces::bytes).sum(),
        }
    }

    fn report(&self) {
        self.journal.settle();
        for refused in self.gate.out_of_room() {
            self.tell_of_refusal(&refused);
        }
        for settled in self.complaints.settle(Instant::now()) {
            match settled {
                Settled::Over { caller, reason, count } => {
                    let caller = self.gate.holder(caller);
                    tracing::info!(caller = %caller, reason, count, "caller has room again");
                }
                Settled::Unlisted { count } => {
                    tracing::warn!(
                        count,
                        "more callers hold their share of memory or connections than are listed one by one"
                    );
                }
            }
        }
        for event in self.limits.events() {
            match event {
                Event::Refusing { what, with_family, times, takings } => {
                    let rate = what.rate();
                    let WhatIsRefused { stage, name, method, reason, origin, .. } = what;
                    let told = |count: fn(&Taking) -> u32| {
                        Some(foremost(&takings, count)).filter(|told| !told.is_empty())
                    };
                    let (takes, goes_without) = (told(|it| it.used), told(|it| it.refused));
                    // Of bytes: what it holds with its family, and what it may.
                    let (held, share) = match (reason, &name) {
                        (Reason::Memory, BucketName::Caller(caller)) => {
                            let held = self.gate.held_by(*caller);
                            (Some(held.family.unwrap_or(held.own).1), self.gate.shares().bytes)
                        }
                        _ => (None, None),
                    };
                    let by_default = (reason == Reason::Rate).then_some(origin == Origin::ByDefault);
                    // Nothing else makes a default refuse a call.
                    let short_of = by_default.is_some_and(|it| it).then(|| Short::Processor.text());
                    let limit = limit_by(reason);
                    let key = self.key_text(stage, &name, with_family);
                    let (stage, reason, method) = (stage.text(), reason.text(), method.map(Method::rpc));
                    tracing::warn!(
                        stage,
                        key,
                        method,
                        reason,
                        times,
                        rate,
                        by_default,
                        short_of,
                        held,
                        share,
                        takes,
                        goes_without,
                        "{limit}: caller is being refused"
                    );
                }
                Event::RefusalEnded { what, with_family, count } => {
                    let key = self.key_text(what.stage, &what.name, with_family);
                    let limit = limit_by(what.reason);
                    tracing::info!(
                        stage = what.stage.text(),
                        key,
                        method = what.method.map(Method::rpc),
                        reason = what.reason.text(),
                        count,
                        "{limit}: caller is no longer refused"
                    );
                }
                Event::RefusalsUnlisted { count } => {
                    tracing::warn!(count, "rate limit: more is being refused than is listed one by one");
                }
            }
        }
        self.limits.account(Accounted { held: self.gate.memory().held, ..self.accounted() });
    }
}

/// What a line about refusals begins with.
fn limit_by(reason: Reason) -> &'static str {
    if reason == Reason::Memory { "memory limit" } else { "rate limit" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heap_is_given_back_when_it_has_grown_and_grows_no_more() {
        let mut growth = HeapGrowth { kept: 2 << 20, before: 2 << 20 };
        for (case, kib, want) in [
            ("as it was", 2048, false),
            ("a little more", 2900, false),
            ("that stays", 2900, false),
            ("much more", 9000, false),
            ("and more", 9500, false),
            ("no more", 9500, true),
        ] {
            assert_eq!(growth.is_over(kib << 10), want, "{case}");
        }
        growth.kept = 5 << 20;
        for (case, kib, want) in [
            ("less", 5 << 10, false),
            ("once is enough", 5 << 10, false),
            ("fell by itself", 3 << 10, false),
            ("grows from there", 4500, false),
            ("no more", 4400, true),
        ] {
            assert_eq!(growth.is_over(kib << 10), want, "{case}");
        }
    }
}
