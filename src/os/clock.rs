//! Wall time, which tests can move together with tokio's, or set.
//!
//! The validity of SVIDs is wall time, which is read here only; sleeps and timeouts are monotonic, by tokio's
//! `Instant`. What is done every now and then is done at a [`beat`].

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use nix::time::{ClockId, clock_gettime};

/// Where the present comes from.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    /// Wall time is this epoch plus what tokio's clock says has passed.
    Tokio(SystemTime, tokio::time::Instant),
    /// The system's clock and so many seconds.
    Set(&'static AtomicI64),
}

impl Clock {
    /// The system's clock.
    pub const SYSTEM: Self = Self(Source::System);

    /// A clock that starts at `epoch` and moves with tokio's, which `tokio::time::advance` moves.
    pub fn starting_at(epoch: SystemTime) -> Self {
        Self(Source::Tokio(epoch, tokio::time::Instant::now()))
    }

    /// The system's clock, off by as many seconds as `offset` says: to set it while an agent runs, as
    /// somebody may do with the system's, and nothing else moves.
    pub fn set_by(offset: &'static AtomicI64) -> Self {
        Self(Source::Set(offset))
    }

    /// Now.
    #[expect(clippy::disallowed_methods, reason = "the one reader of wall time")]
    pub fn now(self) -> SystemTime {
        match self.0 {
            Source::System => SystemTime::now(),
            Source::Tokio(epoch, started) => epoch + started.elapsed(),
            Source::Set(offset) => {
                let seconds = offset.load(Ordering::Relaxed);
                let off = Duration::from_secs(seconds.unsigned_abs());
                if seconds < 0 { SystemTime::now() - off } else { SystemTime::now() + off }
            }
        }
    }
}

/// How often the clock is looked at while something is due later.
const LOOK: Duration = Duration::from_secs(10);

/// Sleeps until the clock says `due`. Looks again at least every 10 seconds: a monotonic sleep stands still while
/// the machine is suspended, and does not see the clock being set.
pub async fn sleep_until(clock: Clock, due: SystemTime) {
    while let Ok(left) = due.duration_since(clock.now()) {
        if left.is_zero() {
            break;
        }
        if left <= LOOK {
            tokio::time::sleep(left).await;
        } else {
            sleep_to_beat(LOOK).await;
        }
    }
}

/// The next moment that is a whole number of `every` away from the first one that was asked for: so soon at most. Of two periods
/// of which one is a multiple of the other, each moment of the longer one is one of the shorter. So a processor that sleeps is
/// woken once for all that is to be done then, and not for each of it.
pub fn beat(every: Duration) -> tokio::time::Instant {
    static FIRST: LazyLock<tokio::time::Instant> = LazyLock::new(tokio::time::Instant::now);
    let now = tokio::time::Instant::now();
    let gone = now.saturating_duration_since(*FIRST).as_nanos();
    let since = gone.checked_rem(every.as_nanos()).and_then(|since| u64::try_from(since).ok());
    now + every.saturating_sub(since.map_or(Duration::ZERO, Duration::from_nanos))
}

/// Sleeps until the next [`beat`].
pub async fn sleep_to_beat(every: Duration) {
    tokio::time::sleep_until(beat(every)).await;
}

/// Processor time that all threads of this process have used, from its start.
pub fn processor_time() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    // There is such a clock wherever there are processes.
    used.map(Duration::from).unwrap_or_default()
}

/// Processor time that the calling thread has used, from its start.
pub fn thread_time() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    used.map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn beats_fall_together() {
        let (short, long) = (Duration::from_millis(250), Duration::from_secs(1));
        for pause in [0, 1, 130, 249, 250, 251, 700] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let now = tokio::time::Instant::now();
            let (soon, late) = (beat(short), beat(long));
            assert!(now < soon && soon <= now + short && soon <= late && late <= now + long, "{pause}");
            assert_eq!((late - soon).as_nanos() % short.as_nanos(), 0, "{pause}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_beat_is_never_this_one() {
        for _ in 0..3 {
            let at = beat(Duration::from_secs(1));
            tokio::time::sleep_until(at).await;
            assert!(beat(Duration::from_secs(1)) > at);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wakes_when_due() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = Clock::starting_at(born);
        sleep_until(clock, born + Duration::from_secs(1800)).await;
        assert_eq!(clock.now(), born + Duration::from_secs(1800));
        sleep_until(clock, born).await;
        assert_eq!(clock.now(), born + Duration::from_secs(1800), "the past is due at once");
    }

    #[test]
    fn is_set_forward_and_back() {
        static OFFSET: AtomicI64 = AtomicI64::new(0);
        let clock = Clock::set_by(&OFFSET);
        for offset in [0, 86_400, -86_400] {
            let before = Clock::SYSTEM.now();
            OFFSET.store(offset, Ordering::Relaxed);
            let set = clock.now();
            let off = Duration::from_secs(86_400);
            let system = if offset > 0 {
                set - off
            } else if offset < 0 {
                set + off
            } else {
                set
            };
            assert!(before <= system && system <= Clock::SYSTEM.now(), "{offset}");
        }
    }
}
