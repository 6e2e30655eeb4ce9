//! What a block says about calls: a limit, its windows, what calls cost.

use std::collections::HashMap;

use crate::{
    hcl::{
        section::{At, Section, nearest},
        tree::{Place, abridged, quoted},
    },
    limits::{
        Method,
        bucket::{MAX_BURST, MAX_RATE, MAX_REFILL_DAYS, Per, Quota, QuotaError},
        refusal::Stage,
        rule::{CostAboveBurst, Costs, Limit, Origin, Rule},
        schedule::{MAX_WINDOWS, Moment, Schedule, ScheduleError, Window, parse_weekday},
    },
};

pub(super) const FREE: [(&str, Limit); 3] =
    [("exempt", Limit::Exempt), ("block", Limit::Block), ("unlimited", Limit::Unlimited)];

pub(super) const A_LIMIT: &str = "rate with burst, or one of exempt, block, unlimited";

/// What was wrong was said.
#[derive(Debug)]
pub(super) struct Reported;

/// A limit, and where its burst is written: `None` by default.
#[derive(Clone, Debug)]
pub(super) struct Bound {
    pub(super) limit: Limit,
    origin: Origin,
    burst: Option<(Place, String)>,
}

/// What a block says, with what it takes from the one around it.
#[derive(Clone, Debug)]
pub(super) struct Written {
    pub(super) rule: Rule,
    /// Whether the limit is its own.
    pub(super) limited: bool,
    limit: Bound,
    windows: Schedule<Bound>,
}

impl Written {
    pub(super) fn of(rule: &Rule) -> Self {
        let bound = |limit, origin| Bound { limit, origin, burst: None };
        Self {
            rule: rule.clone(),
            limited: false,
            limit: bound(rule.limit(), rule.origin()),
            windows: rule.schedule().map(|limit| bound(*limit, Origin::Set)),
        }
    }
}

/// Blocks with one label as one, in the order of the first of each.
pub(super) fn merged(blocks: Vec<Section<'_>>) -> Vec<Section<'_>> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut merged: Vec<Section<'_>> = Vec::new();
    for block in blocks {
        match seen.get(block.label()).and_then(|at| merged.get_mut(*at)) {
            Some(first) => first.merge(block),
            None => {
                seen.insert(block.label(), merged.len());
                merged.push(block);
            }
        }
    }
    merged
}

pub(super) fn set<T>(setting: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *setting = value;
    }
}

/// The method that the label of a block names.
pub(super) fn method(section: &Section<'_>, stage: Stage) -> Result<Method, Reported> {
    let wrong = |message: String| {
        section.wrong_block(message);
        Reported
    };
    let label = section.label();
    let names = Method::ALL.map(Method::rpc);
    let Some(found) = Method::ALL.into_iter().find(|method| method.rpc() == label) else {
        let near = nearest(label, names).map_or_else(String::new, |near| format!(" (did you mean {near}?)"));
        return Err(wrong(format!("unknown method{near}: must be one of {}", names.join(", "))));
    };
    if stage == Stage::Identity && !found.has_identity() {
        return Err(wrong(
            "needs no identity, and is not charged to any: limit it in caller or node".to_owned(),
        ));
    }
    Ok(found)
}

/// A limit, if the block has one: a bucket, or one of `free`.
pub(super) fn limit(s: &mut Section<'_>, free: &[(&'static str, Limit)]) -> Result<Option<Bound>, Reported> {
    let rate = s.number("rate");
    let per = s.parsed("per", |text| Per::parse(text).ok(), "must be second, minute, hour or day");
    let burst = s.integer("burst", 1..=MAX_BURST);
    let mut given: Vec<(&str, Place, Option<Limit>)> = Vec::new();
    let of_bucket = [
        ("rate", rate.map(|at| at.place)),
        ("burst", burst.map(|at| at.place)),
        ("per", per.map(|at| at.place)),
    ];
    let first = of_bucket.into_iter().find(|(key, _)| s.has(key));
    given.extend(first.map(|(key, place)| (key, place.unwrap_or_else(|| s.place()), None)));
    let mut good = true;
    for (key, limit) in free {
        match s.boolean(key) {
            Some(At { value: true, place }) => given.push((key, place, Some(*limit))),
            Some(_) => {}
            None => good &= !s.has(key),
        }
    }
    given.sort_by_key(|(_, place, _)| *place);
    if let [(first, at, _), (key, place, _), ..] = given.as_slice() {
        let others = free.iter().map(|(key, _)| *key).collect::<Vec<_>>().join(", ");
        let at = s.problems().show(*at);
        let message =
            format!("contradicts {first}, at {at}: a limit is either rate with burst, or one of {others}");
        s.wrong(*place, key, None, message);
        return Err(Reported);
    }
    if !good {
        return Err(Reported);
    }
    let Some((key, place, instead)) = given.pop() else { return Ok(None) };
    if let Some(limit) = instead {
        return Ok(Some(Bound { limit, origin: Origin::Set, burst: None }));
    }
    let missing = [("rate", "rate = 100"), ("burst", "burst = 200")].into_iter().find(|(key, _)| !s.has(key));
    if let Some((missing, example)) = missing {
        s.wrong(place, key, None, format!("must have {missing} beside it, for example {example}"));
    }
    // Of a unit that is wrong the longest: what is too much for it is too much.
    let unit = if s.has("per") { Per::Day } else { Per::Second };
    let per = per.map_or(unit, |at| at.value);
    let block = if free.len() > 1 { "block = true for none, " } else { "" };
    let limit = bucket(s, rate, per, burst, block).map_or(Limit::Unlimited, Limit::Quota);
    Ok(Some(Bound { limit, origin: Origin::Set, burst: burst.map(|at| (at.place, s.path("burst"))) }))
}

/// The bucket of these numbers; `instead` is what else a limit may be. Where one of them is wrong, which was said, it is a
/// bucket that is right in it: so the other one is held against the rest of the file.
fn bucket(
    s: &Section<'_>,
    rate: Option<At<(f64, &str)>>,
    per: Per,
    burst: Option<At<u32>>,
    instead: &str,
) -> Option<Quota> {
    let fast = |burst: Option<At<u32>>| {
        Quota::new(f64::from(MAX_BURST), Per::Second, burst.map_or(MAX_BURST, |at| at.value)).ok()
    };
    let Some(rate) = rate else { return fast(burst) };
    let (value, text) = rate.value;
    match (Quota::new(value, per, burst.map_or(1, |at| at.value)), burst) {
        (Ok(quota), Some(_)) => Some(quota),
        (Ok(_), None) => fast(None),
        (Err(QuotaError::Refill { days, .. }), burst) => {
            let message =
                format!("takes {days} days to come back at this rate; it must be at most {MAX_REFILL_DAYS}");
            if let Some(burst) = burst {
                s.wrong(burst.place, "burst", Some(burst.value.to_string()), message);
            }
            fast(burst)
        }
        (Err(QuotaError::Rate(_) | QuotaError::Burst(_) | QuotaError::Unit(_)), burst) => {
            let message = format!(
                "must be above 0 and at most {MAX_RATE} a second ({instead}unlimited = true for no limit)"
            );
            s.wrong(rate.place, "rate", Some(abridged(text)), message);
            fast(burst)
        }
    }
}

/// Everything a block says about calls.
pub(super) fn written(s: &mut Section<'_>, stage: Stage, base: &Written) -> Result<Written, Reported> {
    let limit = limit(s, &FREE);
    let windows = schedule(s);
    let (costs, costs_place) = costs(s, stage, base.rule.costs());
    let dry_run = s.boolean("dry_run");
    let mut good = dry_run.is_some() || !s.has("dry_run");
    let costs = costs?;
    // What is wrong of one hides nothing of the other.
    let (mut limit, mut windows) = (limit, windows);
    let limited = limit.as_ref().is_ok_and(Option::is_some);
    if limit.as_ref().is_ok_and(Option::is_none) {
        limit = Ok(Some(base.limit.clone()));
    }
    let own_windows = limited || windows.as_ref().is_ok_and(|windows| !windows.is_empty());
    if windows.is_ok() && !own_windows {
        windows = Ok(base.windows.clone());
    }
    let of_limit = limit.iter().flatten().map(|bound| (bound, limited));
    let of_windows = windows.iter().flat_map(Schedule::values).map(|bound| (bound, own_windows));
    for (bound, own) in of_limit.chain(of_windows) {
        let Err(CostAboveBurst { which, cost, burst }) = costs.fit(bound.limit) else { continue };
        good = false;
        match (&bound.burst, own, costs_place) {
            (Some((place, key)), true, _) => {
                let message =
                    format!("must be at least {cost}, which is what a call can cost (costs.{which})");
                s.problems().add(*place, key, Some(burst.to_string()), message);
            }
            (written, _, Some(place)) => {
                let whence = written.as_ref().map(|(place, _)| s.problems().show(*place));
                let whence = whence.unwrap_or_else(|| "by default".to_owned());
                let message =
                    format!("{which} {cost} must be at most the burst, which is {burst} ({whence})");
                s.wrong(place, "costs", None, message);
            }
            // Said where they were set.
            (_, _, None) => {}
        }
    }
    let (Some(limit), windows) = (limit?, windows?) else { return Err(Reported) };
    let rule = Rule::new(limit.limit, costs, windows.map(|it| it.limit)).map_err(|_said_above| Reported)?;
    let mut rule = rule.of_origin(limit.origin);
    rule.dry_run = dry_run.map_or(base.rule.dry_run, |at| at.value);
    if good { Ok(Written { rule, limited, limit, windows }) } else { Err(Reported) }
}

/// What calls cost, and where that is set, if it is.
fn costs(s: &mut Section<'_>, stage: Stage, base: Costs) -> (Result<Costs, Reported>, Option<Place>) {
    let Some(mut block) = s.block("costs") else { return (Ok(base), None) };
    let place = block.place();
    let mut read = |key| block.integer(key, 1..=MAX_BURST);
    let (answer, signature) = (read("answer"), read("signature"));
    let of_caller = stage == Stage::Caller;
    let failed = if of_caller { read("failed_attestation") } else { None };
    let keys = [("answer", answer), ("signature", signature), ("failed_attestation", failed)];
    let mut good = keys.iter().all(|(key, at)| at.is_some() || !block.has(key));
    let or = |at: Option<At<u32>>, base| at.map_or(base, |at| at.value);
    let least = or(answer, base.answer());
    let signature_cost = or(signature, base.signature());
    let failed_cost = if of_caller { or(failed, base.failed_attestation()) } else { least };
    for (key, at, cost) in
        [("signature", signature, signature_cost), ("failed_attestation", failed, failed_cost)]
    {
        // Each for itself, so that both are told.
        if Costs::new(least, cost, cost).is_ok() {
            continue;
        }
        good = false;
        match (at, answer) {
            (Some(at), _) => {
                let message = format!("must be at least answer, which is {least}");
                block.wrong(at.place, key, Some(cost.to_string()), message);
            }
            (None, Some(answer)) => {
                let message = format!("must be at most {key}, which is {cost} unless it is set too");
                block.wrong(answer.place, "answer", Some(least.to_string()), message);
            }
            (None, None) => {}
        }
    }
    block.finish();
    let costs = Costs::new(least, signature_cost, failed_cost).map_err(|_said_above| Reported);
    (if good { costs } else { Err(Reported) }, Some(place))
}

/// The windows of a limit, which do not overlap.
fn schedule(s: &mut Section<'_>) -> Result<Schedule<Bound>, Reported> {
    let blocks = merged(s.labelled("schedule"));
    if let Some(last) = blocks.get(MAX_WINDOWS) {
        last.wrong_block(format_args!("{} windows must be at most {MAX_WINDOWS}", blocks.len()));
        return Err(Reported);
    }
    let mut good = true;
    let mut found: Vec<(Window, Bound, &str, Place)> = Vec::new();
    for mut section in blocks {
        let (label, place) = (section.label(), section.place());
        let start = moment(&mut section, "start", 23);
        let stop = moment(&mut section, "stop", 24);
        let limit = limit(&mut section, &FREE);
        let window = match (start, stop) {
            (Ok(start), Ok(stop)) => window(&section, start, stop).ok(),
            _ => None,
        };
        if let Ok(None) = limit {
            section.wrong_block(format_args!("must say which limit holds in this window: {A_LIMIT}"));
        }
        if let Some(window) = window {
            for (other, _, other_label, at) in &found {
                if Schedule::new(vec![(*other, ()), (window, ())]).is_err() {
                    let (other, at) = (quoted(other_label), section.problems().show(*at));
                    section.wrong_block(format_args!(
                        "overlaps {other}, at {at}: one limit must hold at a time"
                    ));
                    good = false;
                }
            }
        }
        section.finish();
        match (window, limit) {
            (Some(window), Ok(Some(bound))) => found.push((window, bound, label, place)),
            _ => good = false,
        }
    }
    if !good {
        return Err(Reported);
    }
    let windows = found.into_iter().map(|(window, bound, ..)| (window, bound)).collect();
    Schedule::new(windows).map_err(|_said_above| Reported)
}

/// The window of a block, between these moments.
fn window(s: &Section<'_>, start: At<Moment>, stop: At<Moment>) -> Result<Window, Reported> {
    Window::new(start.value, stop.value).map_err(|err| {
        match &err {
            ScheduleError::Never(moment)
            | ScheduleError::Gap(moment)
            | ScheduleError::WeekdayAndDate(moment) => {
                let (at, key) =
                    if *moment == start.value { (start.place, "start") } else { (stop.place, "stop") };
                s.wrong(at, key, None, err);
            }
            _ => s.wrong_block(err),
        }
        Reported
    })
}

/// `start` or `stop`. Whether such a moment comes is for [`Window::new`] to say.
fn moment(s: &mut Section<'_>, key: &'static str, last_hour: u8) -> Result<At<Moment>, Reported> {
    let Some(mut block) = s.block(key) else {
        s.missing(key, format_args!("must be set, in UTC: {key} {{ hour = 22 }}"));
        return Err(Reported);
    };
    let mut field = |key, least: u8, most: u8| block.integer(key, least..=most).map(|at| at.value);
    let mut moment = Moment {
        second: field("second", 0, 59),
        minute: field("minute", 0, 59),
        hour: field("hour", 0, last_hour),
        day: field("day", 1, 31),
        month: field("month", 1, 12),
        weekday: None,
    };
    let weekday = block.parsed("weekday", parse_weekday, "must be a day such as monday or mon");
    moment.weekday = weekday.map(|at| at.value);
    let place = block.place();
    let fields = [
        ("second", moment.second.is_some()),
        ("minute", moment.minute.is_some()),
        ("hour", moment.hour.is_some()),
        ("day", moment.day.is_some()),
        ("month", moment.month.is_some()),
        ("weekday", moment.weekday.is_some()),
    ];
    let good = fields.iter().all(|(key, is)| *is || !block.has(key));
    block.finish();
    if good { Ok(At { value: moment, place }) } else { Err(Reported) }
}
