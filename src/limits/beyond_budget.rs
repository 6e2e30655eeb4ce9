//! What is set and can never be had within a memory budget.

use std::fmt;

use super::{
    budget::{self, Pressure},
    gate_plan::fewest_take,
    gate_settings::ConnectionSettings,
    settings::LimitSettings,
    table_size::TableSize,
};

/// A setting that asks for more than there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeyondBudget {
    /// As `ratelimit.keys`.
    pub key: &'static str,
    /// As it is set.
    pub value: u64,
    /// What it takes, and what would be right.
    pub why: String,
}

impl fmt::Display for BeyondBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.key, self.value, self.why)
    }
}

/// The keys that are looked at, as [`BeyondBudget::key`] has them.
pub const CONNECTIONS: &str = "ratelimit.gate.connections";
pub const RESERVE: &str = "ratelimit.gate.reserve";
pub const ADMIN: &str = "ratelimit.gate.admin";
pub const STREAMS: &str = "ratelimit.gate.connection.streams";
pub const KEYS: &str = "ratelimit.keys";
pub const MEMORY_LIMIT: &str = "ratelimit.memory.limit";
pub const SHRINK_CACHES_AT: &str = "ratelimit.memory.shrink_caches_at";
pub const REFUSE_NEW_AT: &str = "ratelimit.memory.refuse_new_at";

impl LimitSettings {
    /// What of these settings a budget of so many bytes can never have: `whose` is what sets it, and `set_at` where a key is
    /// set. What nobody set gives way by itself.
    pub fn beyond(
        &self,
        budget: u64,
        whose: &str,
        set_at: impl Fn(&'static str) -> Option<String>,
    ) -> Vec<BeyondBudget> {
        let mut found = Vec::new();
        let mut add = |key, value: u32, why: String| {
            if set_at(key).is_some() {
                found.push(BeyondBudget { key, value: value.into(), why });
            }
        };
        let (streams, reserve) = (self.gate.connection.streams, self.gate.places.reserve());
        let most_reserve = budget / budget::NEWCOMER;
        let of_two = most_streams(|streams| fewest_take(streams) <= budget);
        let mut of_all = None;
        if let Some(connections) = self.gate.places.connections() {
            let all = |streams| budget::connection_with(streams).saturating_mul(u64::from(connections));
            of_all = most_streams(|streams| all(streams) <= budget);
            match set_at(STREAMS) {
                Some(place) if all(streams) > budget => {
                    // With as many streams as are told to be right.
                    let most = budget / budget::connection_with(streams.min(of_two.unwrap_or(streams)));
                    // Fewer than are in reserve there cannot be.
                    let lower = most > u64::from(reserve);
                    let right = match of_all {
                        Some(fit) if lower => format!("it must be at most {most}, or streams at most {fit}"),
                        Some(fit) => format!("streams must be at most {fit}"),
                        None if lower => format!("it must be at most {most}"),
                        None => {
                            let reserve = most.saturating_sub(1).min(most_reserve);
                            format!("it must be at most {most}, and reserve at most {reserve}")
                        }
                    };
                    add(
                        CONNECTIONS,
                        connections,
                        format!(
                            "holds {} bytes with as many streams as may be open ({streams}), at {place}, and {whose} is {budget}: \
                             {right}",
                            all(streams)
                        ),
                    );
                }
                None if all(1) > budget => add(
                    CONNECTIONS,
                    connections,
                    format!(
                        "holds {} bytes with one stream each, and {whose} is {budget}: it must be at most {}",
                        all(1),
                        budget / budget::connection_with(1)
                    ),
                ),
                _ => {}
            }
        }
        if u64::from(reserve) > most_reserve {
            add(
                RESERVE,
                reserve,
                format!(
                    "is memory for {reserve} callers of {} bytes, and {whose} is {budget}: it must be at most {most_reserve}",
                    budget::NEWCOMER
                ),
            );
        }
        let (admin, most) = (self.gate.admin, budget / budget::ADMIN_SHARE / budget::ADMIN_CONNECTION);
        if u64::from(admin) > most {
            add(
                ADMIN,
                admin,
                format!(
                    "take {} bytes when all are open, and {whose} is {budget}, of which they may have an eighth: it must be at most \
                     {most}",
                    u64::from(admin) * budget::ADMIN_CONNECTION
                ),
            );
        }
        if fewest_take(streams) > budget {
            let right = of_two.map_or_else(
                || "no number of streams fits it".to_owned(),
                |fit| format!("it must be at most {}", fit.min(of_all.unwrap_or(fit))),
            );
            let each = budget::connection_at_most(streams);
            add(
                STREAMS,
                streams,
                format!(
                    "makes a connection take {each} bytes at its worst, and {whose} is {budget}, too small for two of those in \
                     half of it: {right}"
                ),
            );
        }
        let keys = self.keys.number();
        if keys > TableSize::most_within(budget) {
            add(
                KEYS,
                keys,
                format!(
                    "take {} bytes when all are known, and {whose} is {budget}, of which they may have half: it must be at most \
                     {}",
                    TableSize::bytes(keys),
                    TableSize::most_within(budget)
                ),
            );
        }
        let short_from = self.memory.lines(Pressure::ShrinkCaches, budget).0;
        if short_from <= budget::PROCESS {
            let [percent, ..] = self.memory.steps.percents();
            let least = (budget::PROCESS * 100 / budget.max(1)).saturating_add(1);
            add(
                SHRINK_CACHES_AT,
                percent.into(),
                format!(
                    "is {short_from} bytes, as {whose} is {budget}, and the agent itself takes {}: memory would always be short; \
                     it must be at least {least}",
                    budget::PROCESS
                ),
            );
        }
        let end = budget.saturating_sub(budget::spare(budget));
        let steps = [(SHRINK_CACHES_AT, Pressure::ShrinkCaches), (REFUSE_NEW_AT, Pressure::RefuseNew)];
        for ((key, step), percent) in steps.into_iter().zip(self.memory.steps.percents()) {
            let from = self.memory.lines(step, budget).0;
            if from > end {
                add(
                    key,
                    percent.into(),
                    format!(
                        "is {from} bytes, as {whose} is {budget}, and the last {} of that are for nobody: memory would run out \
                         before; it must be at most {}",
                        budget - end,
                        u128::from(end) * 100 / u128::from(budget.max(1))
                    ),
                );
            }
        }
        found
    }

    /// The same with no more keys than a budget of so many bytes has room for. Those that somebody set and that do not fit are
    /// [`LimitSettings::beyond`] it.
    #[must_use]
    pub fn within(&self, budget: u64) -> Self {
        Self { keys: self.keys.within(budget), ..self.clone() }
    }
}

/// The most streams that a connection may have, of those that may be set and fit.
fn most_streams(fit: impl Fn(u32) -> bool) -> Option<u32> {
    ConnectionSettings::STREAMS.rev().find(|streams| fit(*streams))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{GatePlaces, budget::MemorySteps};

    const BUDGET: u64 = 24 << 20;

    /// Where nobody set a budget, a number of streams is none that it cannot have.
    #[test]
    fn the_least_of_a_machine_has_room_for_all_streams() {
        assert!(fewest_take(*ConnectionSettings::STREAMS.end()) <= budget::MACHINE_LEAST);
    }

    type Change = fn(&mut LimitSettings, u32);

    fn places(connections: Option<u32>, reserve: Option<u32>) -> GatePlaces {
        GatePlaces::new(connections, reserve).unwrap()
    }

    /// The largest that fits, and one more, of each of them.
    #[test]
    fn what_fits_is_what_is_said_to_fit() {
        let set = |change: Change, value| {
            let mut settings = LimitSettings::default();
            change(&mut settings, value);
            settings
        };
        let table: [(&str, Change, u32); 5] = [
            (CONNECTIONS, |it, n| it.gate.places = places(Some(n), None), 744),
            (RESERVE, |it, n| it.gate.places = places(None, Some(n)), 614),
            (ADMIN, |it, n| it.gate.admin = n, 76),
            (STREAMS, |it, n| it.gate.connection.streams = n, 365),
            (KEYS, |it, n| it.keys = TableSize::new(n).unwrap(), 18_724),
        ];
        for (key, change, most) in table {
            let beyond = |value| {
                set(change, value).beyond(BUDGET, "it", |asked| (asked == key).then(|| "here".to_owned()))
            };
            assert_eq!(beyond(most), [], "{key}");
            let found = beyond(most + 1);
            let [BeyondBudget { key: found, value, why }] = found.as_slice() else {
                panic!("{key}: {found:?}")
            };
            assert_eq!((*found, *value), (key, u64::from(most) + 1));
            assert!(why.ends_with(&format!("it must be at most {most}")), "{why}");
            assert_eq!(set(change, most + 1).beyond(BUDGET, "it", |_| None), [], "{key}: nobody set it");
        }
        for (percent, fits) in [(16, false), (17, true)] {
            let mut settings = LimitSettings::default();
            settings.memory.steps = MemorySteps::new([percent, 85, 95]).unwrap();
            let found = settings.beyond(BUDGET, "it", |_| Some(String::new()));
            assert_eq!(found.is_empty(), fits, "{found:?}");
        }
    }

    /// What is said of streams and of connections goes together: who does both hears nothing more.
    #[test]
    fn streams_and_connections_are_told_what_fits_both() {
        let beyond = |budget, [connections, reserve, streams]: [u32; 3]| {
            let mut settings = LimitSettings::default();
            settings.gate.places = places(Some(connections), Some(reserve));
            settings.gate.connection.streams = streams;
            let found = settings.beyond(budget, "it", |_| Some("here".to_owned()));
            found.into_iter().map(|it| (it.key, it.why)).collect::<Vec<_>>()
        };
        for (budget, set, of_connections, of_streams, right) in [
            (
                64 << 20,
                [100, 64, 1024],
                "streams must be at most 104",
                "it must be at most 104",
                [100, 64, 104],
            ),
            (
                64 << 20,
                [100, 8, 1024],
                "it must be at most 10, or streams at most 104",
                "it must be at most 104",
                [10, 8, 104],
            ),
            (
                BUDGET,
                [1000, 64, 1024],
                "it must be at most 11, and reserve at most 10",
                "it must be at most 365",
                [11, 10, 365],
            ),
            (
                BUDGET,
                [4, 1, 1024],
                "it must be at most 11, or streams at most 1019",
                "it must be at most 365",
                [4, 1, 365],
            ),
        ] {
            let found = beyond(budget, set);
            let [(CONNECTIONS, connections), (STREAMS, streams)] = found.as_slice() else {
                panic!("{set:?}: {found:?}")
            };
            assert!(connections.ends_with(&format!(": {of_connections}")), "{set:?}: {connections}");
            assert!(streams.ends_with(&format!(": {of_streams}")), "{set:?}: {streams}");
            assert_eq!(beyond(budget, right), [], "{right:?}");
        }
    }

    /// The last step may lie there: other things than connections come so far. So may what nobody set.
    #[test]
    fn no_step_lies_in_what_is_nobodys() {
        for (budget, steps, beyond) in [
            (BUDGET, [70, 85, 95], &[][..]),
            (BUDGET, [86, 87, 100], &[]),
            (BUDGET, [87, 88, 100], &[REFUSE_NEW_AT]),
            (BUDGET, [96, 98, 100], &[SHRINK_CACHES_AT, REFUSE_NEW_AT]),
            (64 << 20, [90, 95, 99], &[]),
            (64 << 20, [90, 96, 99], &[REFUSE_NEW_AT]),
        ] {
            let mut settings = LimitSettings::default();
            settings.memory.steps = MemorySteps::new(steps).unwrap();
            let found = settings.beyond(budget, "it", |_| Some(String::new()));
            let keys: Vec<&str> = found.iter().map(|it| it.key).collect();
            assert_eq!(keys, beyond, "{budget}, {steps:?}: {found:?}");
            for BeyondBudget { why, .. } in &found {
                let most = if budget == BUDGET { "it must be at most 87" } else { "it must be at most 95" };
                assert!(why.ends_with(most), "{why}");
            }
            assert_eq!(settings.beyond(budget, "it", |_| None), []);
        }
    }

    #[test]
    fn keys_that_nobody_set_give_way() {
        let keys = |budget| LimitSettings::default().within(budget).keys.number();
        assert_eq!((keys(1 << 30), keys(24 << 20), keys(8 << 20)), (16_384, 16_384, 6241));
        assert_eq!(keys(1), 16, "never fewer than there must be");
    }
}
