//! When a connection is read no more for a while: its caller was given too many answers that were no work to conserve, or
//! it asks for much at once while there is no room.
//!
//! How many are too many is its caller's bucket ([`Holding::wasted`]). A connection that was given a few of them is read on
//! meanwhile, so that whoever errs now and then beside others of its user who do nothing else notices nothing.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::limits::holding::Holding;

/// So many of them a second are never too many for one connection.
const FEW: u32 = 10;
/// The longest time until the bucket is asked again.
const AT_A_TIME: Duration = Duration::from_secs(1);
/// How long a connection is held up while memory is out.
const A_MOMENT: Duration = Duration::from_millis(50);
/// After pauses for too many of them, without anything between, for so long the connection has to go.
const ENOUGH: Duration = Duration::from_secs(10);

/// The pauses of one connection. Written by the tasks of its requests and its own.
#[derive(Debug)]
pub(super) struct Pauses {
    holding: Arc<Holding>,
    paused: AtomicBool,
    course: Mutex<PauseCourse>,
}

#[derive(Clone, Copy, Debug, Default)]
struct PauseCourse {
    /// When the second began in which so many were given.
    second: Option<Instant>,
    given: u32,
    /// Until when nothing is read.
    until: Option<Instant>,
    /// Since when there was no time to speak of between two pauses for too many of them, and when the last of these ends.
    since: Option<Instant>,
    last: Option<Instant>,
}

impl PauseCourse {
    /// One more was given. Returns whether they are still few.
    fn few(&mut self, now: Instant) -> bool {
        if self.second.is_none_or(|second| now >= second + Duration::from_secs(1)) {
            (self.second, self.given) = (Some(now), 0);
        }
        self.given = self.given.saturating_add(1);
        self.given <= FEW
    }

    fn pause(&mut self, now: Instant, wait: Duration) {
        if !self.follows(now) {
            self.since = Some(now);
        }
        self.last = self.last.max(Some(now + wait.min(AT_A_TIME)));
        self.until = self.until.max(self.last);
    }

    /// Whether what comes now comes close behind the last pause.
    fn follows(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now < last + AT_A_TIME)
    }

    /// Whether such pauses have gone on for too long.
    fn is_enough(&self, now: Instant) -> bool {
        self.follows(now) && self.since.is_some_and(|since| now >= since + ENOUGH)
    }
}

impl Pauses {
    /// None yet; the bucket is that of `holding`.
    pub(super) fn new(holding: Arc<Holding>) -> Self {
        Self { holding, paused: AtomicBool::new(false), course: Mutex::default() }
    }

    /// Too many were given from then until then.
    #[cfg(test)]
    pub(super) fn wasted_all_the_time(&self, from: Instant, until: Instant) {
        self.course(|course| {
            (course.since, course.last, course.until) = (Some(from), Some(until), Some(until));
        });
        self.paused.store(true, Relaxed);
    }

    fn course<R>(&self, f: impl FnOnce(&mut PauseCourse) -> R) -> R {
        f(&mut self.course.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An answer was given that was no work to conserve, or frames came that ask for none: perhaps a pause begins.
    pub(super) fn wasted(&self, now: Instant) {
        let wait = self.holding.wasted();
        self.course(|course| {
            if !course.few(now)
                && let Some(wait) = wait
            {
                course.pause(now, wait);
                self.paused.store(true, Relaxed);
            }
        });
    }

    /// It asks for more than is answered at once, without room on the node, or than there is memory for: nothing further is read
    /// for a moment, be it a WINDOW_UPDATE. What it has not sent takes nothing here. That is no fault of its own.
    pub(super) fn rest(&self, now: Instant) {
        self.course(|course| course.until = course.until.max(Some(now + A_MOMENT)));
        self.paused.store(true, Relaxed);
    }

    /// Whether nothing is read now.
    pub(super) fn paused(&self) -> bool {
        self.paused.load(Relaxed)
    }

    /// When to call [`Self::go_on`], in a pause.
    pub(super) fn until(&self) -> Option<Instant> {
        self.paused().then(|| self.course(|course| course.until)).flatten()
    }

    /// Ends a pause whose time is over, unless the caller's bucket is still empty. Returns whether pauses have gone on for
    /// so long that the connection has to go.
    pub(super) fn go_on(&self, now: Instant) -> bool {
        if !self.paused() {
            return false;
        }
        self.course(|course| {
            if course.until.is_none_or(|until| now >= until) {
                match self.holding.waits() {
                    Some(wait) => course.pause(now, wait),
                    None => self.paused.store(false, Relaxed),
                }
            }
            course.is_enough(now)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{CallerKey, Gate};

    /// Who only ever asks for what is refused is read no more, and has to go in the end; who stops is read again.
    #[tokio::test(start_paused = true)]
    async fn who_only_ever_errs_has_to_go() {
        let gate = Gate::of_defaults(64 << 20);
        for (case, errs_for, goes) in [("stops", 8, false), ("goes on", 12, true)] {
            let permit = gate.open(CallerKey::Uid(1)).unwrap();
            let pauses = Pauses::new(Arc::clone(permit.holding()));
            let began = Instant::now();
            let mut has_to_go = false;
            while began.elapsed() < Duration::from_secs(60) && !has_to_go {
                for _ in 0..100 {
                    if began.elapsed() < Duration::from_secs(errs_for) && !pauses.paused() {
                        pauses.wasted(Instant::now());
                    }
                }
                tokio::time::advance(Duration::from_millis(1)).await;
                has_to_go = pauses.go_on(Instant::now());
            }
            assert_eq!(has_to_go, goes, "{case}");
            assert!(goes || !pauses.paused(), "{case}");
        }
    }

    /// Whoever waits for memory beside others, and erred for a moment some time ago, errs no more for that.
    #[tokio::test(start_paused = true)]
    async fn who_only_waits_for_room_never_has_to_go() {
        let gate = Gate::of_defaults(64 << 20);
        let permit = gate.open(CallerKey::Uid(1)).unwrap();
        let pauses = Pauses::new(Arc::clone(permit.holding()));
        while !pauses.paused() {
            pauses.wasted(Instant::now());
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60) {
            pauses.rest(Instant::now());
            tokio::time::advance(A_MOMENT / 2).await;
            assert!(!pauses.go_on(Instant::now()), "{:?}", began.elapsed());
            assert!(pauses.paused(), "{:?}", began.elapsed());
        }
    }

    #[test]
    fn pauses_follow_each_other_until_it_is_enough() {
        let start = Instant::now();
        let mut course = PauseCourse::default();
        assert_eq!((0..FEW + 3).filter(|_| course.few(start)).count(), usize::try_from(FEW).unwrap());
        let mut now = start + Duration::from_secs(1);
        assert!(course.few(now), "another second");
        for nth in 0..20 {
            course.pause(now, Duration::from_secs(60));
            assert_eq!(course.until, Some(now + AT_A_TIME), "{nth}");
            assert_eq!(course.since, Some(start + Duration::from_secs(1)), "{nth}");
            now += AT_A_TIME + Duration::from_millis(900);
        }
        now += AT_A_TIME;
        course.pause(now, Duration::from_millis(5));
        assert_eq!((course.until, course.since), (Some(now + Duration::from_millis(5)), Some(now)));
        course.pause(now, Duration::from_millis(3));
        assert_eq!(course.until, Some(now + Duration::from_millis(5)), "the longer of two");
    }
}
