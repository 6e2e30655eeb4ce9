//! How often this process may do what it does once for all: write a line in the log that calls can cause, ask a
//! server. And how often it may write one for each caller.
//!
//! governor's limiter fits where there is one of it and nobody asks what is left; what is kept by key, lent and
//! given back is a [`Bucket`](super::bucket::Bucket).

use std::{
    collections::HashMap,
    hash::Hash,
    num::{NonZeroU32, NonZeroU64},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use tokio::time::Instant;

use super::caller::CallerKey;

/// How many lines of one kind there are in a minute, and at once.
const LINES_A_MINUTE: u32 = 60;

/// Paces what happens at one place. The default is for a line in the log: 60 a minute.
#[derive(Debug)]
pub struct Pace<C: Clock = DefaultClock> {
    limiter: RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<C::Instant>>,
    left_out: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        let lines = NonZeroU32::new(LINES_A_MINUTE).unwrap_or(NonZeroU32::MIN);
        Self::by_clock(lines, DefaultClock::default())
    }
}

impl<C: Clock> Pace<C> {
    fn by_clock(times: NonZeroU32, clock: C) -> Self {
        let limiter = RateLimiter::direct_with_clock(governor::Quota::per_minute(times), clock);
        Self { limiter, left_out: AtomicU64::new(0) }
    }

    /// Has `line` say what happened, unless it is too soon; it is told how often it was too soon since the last line.
    pub fn say(&self, line: impl FnOnce(Option<NonZeroU64>)) {
        if self.limiter.check().is_ok() {
            line(NonZeroU64::new(self.left_out.swap(0, Ordering::Relaxed)));
        } else {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How many pairs of a caller and a reason are told apart.
const COMPLAINTS: usize = 256;
/// The time between two lines about the same, and how long nothing must have happened for it to be over.
const A_WHILE: Duration = Duration::from_secs(60);

/// What went wrong for whom, as the log has it: by caller and reason, one line at once, one a minute while it goes
/// on, and one when it is over. There are [`COMPLAINTS`] pairs of them at most; what comes beyond is one line a minute for
/// all. That bounds the lines to `2 x COMPLAINTS + 1` a minute, whoever calls and how often.
#[derive(Debug)]
pub struct Complaints<R>(Mutex<ComplaintTable<R>>);

#[derive(Debug)]
struct ComplaintTable<R> {
    listed: HashMap<(CallerKey, R), Going>,
    unlisted: u64,
    unlisted_told: Option<Instant>,
}

/// Something that goes on.
#[derive(Debug)]
struct Going {
    count: u64,
    /// Of these, so many stand in a line.
    told: u64,
    told_at: Instant,
    last: Instant,
}

/// What there is to tell when it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled<R> {
    /// It has not happened for a minute.
    Over {
        caller: CallerKey,
        reason: R,
        /// How often it did before.
        count: u64,
    },
    /// So much happened to callers that found the table full, since this was last said.
    Unlisted { count: u64 },
}

impl<R> Default for Complaints<R> {
    fn default() -> Self {
        Self(Mutex::new(ComplaintTable { listed: HashMap::new(), unlisted: 0, unlisted_told: None }))
    }
}

impl<R: Copy + Eq + Hash> Complaints<R> {
    /// It happened, once more perhaps. When a line is to tell of it: how often it did since the last one.
    pub fn note(&self, caller: CallerKey, reason: R, now: Instant) -> Option<NonZeroU64> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(going) = table.listed.get_mut(&(caller, reason)) {
            going.count = going.count.saturating_add(1);
            going.last = now;
            if now.saturating_duration_since(going.told_at) < A_WHILE {
                return None;
            }
            let times = NonZeroU64::new(going.count - going.told);
            (going.told, going.told_at) = (going.count, now);
            return times;
        }
        if table.listed.len() >= COMPLAINTS {
            table.unlisted = table.unlisted.saturating_add(1);
            return None;
        }
        table.listed.insert((caller, reason), Going { count: 1, told: 1, told_at: now, last: now });
        Some(NonZeroU64::MIN)
    }

    /// Has `line` tell of it, if a line is due; it is told how often it happened since the last one, where this is not the
    /// first. For what nobody is told the end of: what is over is forgotten when there is no room for more.
    pub fn say(&self, caller: CallerKey, reason: R, line: impl FnOnce(Option<NonZeroU64>)) {
        let now = Instant::now();
        if self.is_full() {
            drop(self.settle(now));
        }
        if let Some(times) = self.note(caller, reason, now) {
            line(Some(times).filter(|times| times.get() > 1));
        }
    }

    fn is_full(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).listed.len() >= COMPLAINTS
    }

    /// What is over. Of what happened once there is nothing more to tell.
    pub fn settle(&self, now: Instant) -> Vec<Settled<R>> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |at: Instant| now.saturating_duration_since(at) >= A_WHILE;
        let gone = table.listed.extract_if(|_, going| over(going.last));
        let mut settled: Vec<_> = gone
            .filter(|(_, going)| going.count > 1)
            .map(|((caller, reason), going)| Settled::Over { caller, reason, count: going.count })
            .collect();
        if table.unlisted > 0 && table.unlisted_told.is_none_or(over) {
            settled.push(Settled::Unlisted { count: std::mem::take(&mut table.unlisted) });
            table.unlisted_told = Some(now);
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_that_tell_its_size() {
        let clock = FakeRelativeClock::default();
        let pace = Pace::by_clock(NonZeroU32::new(6).unwrap(), clock.clone());
        let mut lines = Vec::new();
        let mut flood = |times| (0..times).for_each(|_| pace.say(|left_out| lines.push(left_out)));
        flood(1000);
        clock.advance(Duration::from_secs(9));
        flood(1);
        clock.advance(Duration::from_secs(1));
        flood(2);
        // 994 of the flood, and one before its time.
        assert_eq!(lines, [[None; 6].as_slice(), &[NonZeroU64::new(995)]].concat());
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_caller_is_told_of_once_a_minute_and_at_the_end() {
        let complaints = Complaints::default();
        let (caller, start) = (CallerKey::Uid(7), Instant::now());
        let mut lines = Vec::new();
        for second in 0..150 {
            for _ in 0..10 {
                let times = complaints.note(caller, "slow", start + SECOND * second);
                lines.extend(times.map(|times| (second, times.get())));
            }
            assert_eq!(complaints.settle(start + SECOND * second), []);
        }
        assert_eq!(lines, [(0, 1), (60, 600), (120, 600)]);
        assert_eq!(complaints.settle(start + SECOND * 208), []);
        let over = Settled::Over { caller, reason: "slow", count: 1500 };
        assert_eq!(complaints.settle(start + SECOND * 209), [over]);
        assert_eq!(complaints.note(caller, "slow", start + SECOND * 210), Some(NonZeroU64::MIN));
        assert_eq!(complaints.settle(start + SECOND * 900), [], "once is over without a word");
    }

    #[tokio::test(start_paused = true)]
    async fn whom_there_was_no_room_for_is_told_of_when_others_are_over() {
        let complaints = Complaints::default();
        let told = |uid: u32| {
            let mut told = None;
            complaints.say(CallerKey::Uid(uid), "wrong", |times| told = Some(times.map(NonZeroU64::get)));
            told
        };
        let full = u32::try_from(COMPLAINTS).unwrap();
        assert_eq!((0..full).filter_map(told).collect::<Vec<_>>(), vec![None; COMPLAINTS]);
        assert_eq!([told(0), told(full)], [None, None]);
        tokio::time::advance(A_WHILE).await;
        assert_eq!([told(full), told(0)], [Some(None), Some(None)]);
        assert_eq!(told(0), None);
        tokio::time::advance(A_WHILE).await;
        assert_eq!(told(0), Some(Some(2)));
    }

    #[test]
    fn a_crowd_of_callers_is_a_bounded_number_of_lines_and_none_is_left_out() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let (mut lines, mut told) = (0, 0);
        for second in 0..180 {
            for uid in 0..10_000 {
                let times = complaints.note(CallerKey::Uid(uid), (), start + SECOND * second);
                lines += usize::from(times.is_some());
                told += times.map_or(0, NonZeroU64::get);
            }
            for settled in complaints.settle(start + SECOND * second) {
                let Settled::Unlisted { count } = settled else { panic!("{settled:?}") };
                lines += 1;
                told += count;
            }
        }
        assert_eq!(lines, 3 * (COMPLAINTS + 1));
        // All but what came after the last lines.
        assert_eq!(told, 121 * 10_000);
    }

    /// Callers that come and go have two lines each, and leave room for others after a minute.
    #[test]
    fn a_crowd_of_others_each_minute_is_no_more_lines() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let minutes = 5;
        let mut lines = 0;
        for second in 0..60 * minutes {
            lines += complaints.settle(start + SECOND * second).len();
            for uid in (0..10_000).filter(|_| second % 60 < 2) {
                let caller = CallerKey::Uid(10_000 * (second / 60) + uid);
                lines += usize::from(complaints.note(caller, (), start + SECOND * second).is_some());
            }
        }
        let most = usize::try_from(minutes).unwrap() * (2 * COMPLAINTS + 1);
        assert!((COMPLAINTS * 2..=most).contains(&lines), "{lines} lines, at most {most}");
    }
}
