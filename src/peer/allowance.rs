//! How many connections may be accepted while the kernel still keeps what others left behind.
//!
//! An accepted socket is a file, an inode and a name to the kernel, charged to the cgroup of whoever accepts it. They are
//! freed only after a grace period of RCU from the close on, which takes the longer the busier the processors are: who
//! connects and closes as fast as it goes fills a small cgroup, and has the agent killed. Only an accept takes memory, a
//! close never does, so it is accepts that are counted: to each grace period so many that what they leave fits in a quarter
//! of what the cgroups have left; what was left in the period before may be there still. With room for more nothing is
//! counted out, since the queue of those who wait to be accepted is short, and full is an error for whoever connects without
//! waiting.
//!
//! A thread that does nothing else waits for grace periods, one after the other as long as somebody is accepted meanwhile.
//! Where the kernel does not tell of them, it waits for a time.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::os::{headroom::Headroom, membarrier::KEPT_OF_FILE};

/// The most accepts to a grace period while what they leave may not fit.
const MOST: u64 = 4096;
/// And the fewest: the door never shuts.
const LEAST: u64 = 64;
/// What is left in a period may take one part in so many of what the cgroups have left.
const PART: u64 = 4;
/// How many may be accepted before it is looked again what is left.
const LOOK: u64 = 256;
/// How old may be what is known of the limits and of what can be dropped.
const KNOWN_FOR: Duration = Duration::from_millis(250);
/// A grace period that takes longer than this does not shut the door: [`LEAST`] more are accepted each time.
const AT_LATEST: Duration = Duration::from_millis(100);
/// What the thread may need of a stack, in bytes.
const STACK: usize = 64 * 1024;

/// Waits for a grace period.
pub(super) type GracePeriod = fn();

/// How many connections may be accepted.
#[derive(Debug)]
pub(super) struct Allowance {
    headroom: Arc<Headroom>,
    /// To the thread, which ends with it. Full while it has something to do.
    ask: SyncSender<()>,
    ended: watch::Receiver<u64>,
    /// Accepted since a period ended, as far as that matters.
    taken: u64,
    /// To a period; `None` for no bound.
    most: Option<u64>,
    unlooked: u64,
    asked: Instant,
    spent: Option<Instant>,
}

impl Allowance {
    /// Starts the thread, which waits with `period`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(headroom: Headroom, period: GracePeriod) -> io::Result<Self> {
        let headroom = Arc::new(headroom);
        let (ask, asked) = sync_channel(1);
        let (ends, ended) = watch::channel(0);
        let looked_at = Arc::clone(&headroom);
        let work = move || wait_for_periods(&asked, &ends, &looked_at, period);
        thread::Builder::new().name("grace-periods".to_owned()).stack_size(STACK).spawn(work)?;
        Ok(Self {
            headroom,
            ask,
            ended,
            taken: 0,
            most: None,
            unlooked: LOOK,
            asked: Instant::now(),
            spent: None,
        })
    }

    /// How many of the next `run` may be accepted; with none, [`Allowance::more`] is to be waited for.
    pub(super) fn of(&mut self, run: usize, now: Instant) -> usize {
        if self.ended.has_changed().unwrap_or(false) {
            self.ended.mark_unchanged();
            self.begin();
        }
        if self.unlooked >= LOOK {
            self.unlooked = 0;
            let fits = self.headroom.left() / PART / KEPT_OF_FILE;
            self.most = (fits < MOST).then_some(fits.max(LEAST));
        }
        let may = self.most.map_or(run, |most| {
            usize::try_from(most.saturating_sub(self.taken)).unwrap_or(usize::MAX).min(run)
        });
        // The first of a period has the thread wait for its end.
        let begins = self.most.is_some() && self.taken == 0;
        if begins || may == 0 || now.duration_since(self.asked) >= KNOWN_FOR {
            self.asked = now;
            let _has_something_to_do = self.ask.try_send(()).is_err();
        }
        self.spent = (may == 0).then_some(now);
        may
    }

    /// So many were accepted.
    pub(super) fn took(&mut self, accepted: usize) {
        let accepted = u64::try_from(accepted).unwrap_or(u64::MAX);
        self.taken = self.taken.saturating_add(accepted);
        self.unlooked = self.unlooked.saturating_add(accepted);
    }

    /// Whether none may be accepted.
    pub(super) fn is_spent(&self) -> bool {
        self.spent.is_some()
    }

    /// Waits until more may be accepted, once it is spent. May be dropped while it waits.
    pub(super) async fn more(&mut self) {
        let Some(since) = self.spent else { return std::future::pending().await };
        tokio::select! {
            Ok(()) = self.ended.changed() => self.begin(),
            () = sleep_until(since + AT_LATEST) => self.taken = self.taken.saturating_sub(LEAST),
        }
        self.spent = None;
    }

    /// A period has ended.
    fn begin(&mut self) {
        self.taken = 0;
        self.unlooked = LOOK;
    }
}

/// What the thread does, until the allowance is dropped.
fn wait_for_periods(
    asked: &Receiver<()>,
    ended: &watch::Sender<u64>,
    headroom: &Headroom,
    period: GracePeriod,
) {
    let mut known: Option<Instant> = None;
    while asked.recv().is_ok() {
        let now = Instant::now();
        if known.is_none_or(|since| now.duration_since(since) >= KNOWN_FOR) {
            headroom.look_again();
            known = Some(now);
        }
        period();
        ended.send_modify(|periods| *periods = periods.wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::os::membarrier::{by_time, grace_period};

    const RUN: usize = 64;
    const MIB: u64 = 1 << 20;

    /// A cgroup in `at` of which so much is left.
    fn leave(at: &Path, left: u64) {
        let files = [("self", "0::/\n"), ("memory.max", "1073741824"), ("memory.stat", "")];
        for (name, text) in files {
            fs::write(at.join(name), text).unwrap();
        }
        fs::write(at.join("memory.current"), ((1 << 30) - left).to_string()).unwrap();
    }

    fn start(at: &Path, period: GracePeriod) -> Allowance {
        Allowance::start(Headroom::of(&at.join("self"), at).unwrap(), period).unwrap()
    }

    /// Takes all there are, up to `most`, without a wait.
    fn take(allowance: &mut Allowance, most: usize) -> usize {
        let mut taken = 0;
        while taken < most {
            let run = allowance.of(RUN, Instant::now());
            if run == 0 {
                break;
            }
            allowance.took(run);
            taken += run;
        }
        taken
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_as_fit_are_taken_to_a_period_by_the_kernel_and_by_time() {
        let ways: [(&str, GracePeriod); 2] = [("as the kernel tells", grace_period), ("by time", by_time)];
        for (case, period) in ways {
            let dir = tempfile::tempdir().unwrap();
            leave(dir.path(), 64 * MIB);
            let mut allowance = start(dir.path(), period);
            assert_eq!(take(&mut allowance, 100_000), 100_032, "{case}: there is room");
            assert!(!allowance.is_spent());
            for (left, most) in [(3 * MIB, 512), (0, 64), (6 * MIB, 1024)] {
                leave(dir.path(), left);
                // What was taken before counts, so that nobody is until a period has ended.
                take(&mut allowance, 100_000);
                assert!(allowance.is_spent());
                // Time stands still meanwhile, as the test never rests: only a period's end brings more.
                while !allowance.ended.has_changed().unwrap() {
                    thread::yield_now();
                }
                allowance.more().await;
                let taken = take(&mut allowance, 100_000);
                // A period may have ended on the way.
                assert!(taken.is_multiple_of(most) && taken > 0, "{case}: {taken} of {most}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_period_without_an_end_does_not_shut_the_door() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path(), 0);
        let (ask, _asked) = sync_channel(1);
        let (_ends, ended) = watch::channel(0);
        let headroom = Arc::new(Headroom::of(&dir.path().join("self"), dir.path()).unwrap());
        let asked = Instant::now();
        let mut allowance =
            Allowance { headroom, ask, ended, taken: 0, most: None, unlooked: LOOK, asked, spent: None };
        for _ in 0..3 {
            assert_eq!(take(&mut allowance, 1000), 64);
            allowance.more().await;
        }
        assert_eq!(asked.elapsed(), 3 * AT_LATEST);
    }
}
