//! Whose processes are slow to read, and how much of the processor that may take.
//!
//! The kernel writes all supplementary groups of a process, up to 65,536, each time its `status` is read: 16 ms, and there
//! is no asking how many there are. One that connected with more than are attested is known by its socket. One that has
//! more by now, or whose first thread has, is found out by reading it: then the processes of its family are read beside the
//! threads that serve for a while ([`OF_LATE`]), one process at a time, and after one that was slow there is a rest. So a
//! read in vain stops a thread that serves once in that while for each family, and all others together take about a hundredth of
//! a core.
//!
//! A thread of the lowest priority would be no better: a kernel that is not preempted in its own code (PREEMPT_NONE, as servers
//! have it) lets nobody else run on that processor until the file is written, whoever reads.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::error::{AttestError, ProcReadError};
use crate::limits::patience::FOR_ATTESTATION;

/// How long a family is known for a process with too many groups, from the last on.
const OF_LATE: Duration = Duration::from_secs(30);
/// The most families that are known for it.
const MOST: usize = 1024;
/// Of each, so many processes are read or wait for it.
const PLACES: u8 = 4;
/// How long one waits for its turn at most: as long as an attestation may.
const PATIENCE: Duration = FOR_ATTESTATION;
/// The rest after a slow read is so many times as long, and so long at most: who waits for the next is to have it.
const REST: u32 = 99;
const LONGEST_REST: Duration = Duration::from_millis(1_800);

#[derive(Debug)]
struct SlowFamily {
    until: Instant,
    places: u8,
}

/// Reads what may be slow to read.
#[derive(Debug)]
pub(super) struct LongReads {
    families: Mutex<HashMap<u64, SlowFamily>>,
    /// There are some.
    any: AtomicBool,
    turn: Arc<Semaphore>,
}

impl Default for LongReads {
    fn default() -> Self {
        Self { families: Mutex::default(), any: AtomicBool::new(false), turn: Arc::new(Semaphore::new(1)) }
    }
}

/// A place of a family, until it is dropped.
struct ReadPlace {
    reads: Arc<LongReads>,
    family: u64,
}

impl Drop for ReadPlace {
    fn drop(&mut self) {
        if let Some(known) = self.reads.families().get_mut(&self.family) {
            known.places = known.places.saturating_sub(1);
        }
    }
}

impl LongReads {
    /// Has `read` read a process of `family`: at once, on this thread, or in its turn where it may be slow. It is told to
    /// `stand_aside` before it waits for that.
    ///
    /// # Errors
    /// What `read` says; [`AttestError::ManyGroups`] where its turn does not come soon enough.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        family: u64,
        patience: Duration,
        stand_aside: impl FnOnce(),
        read: impl FnOnce() -> Result<T, ProcReadError> + Send + 'static,
    ) -> Result<T, AttestError> {
        let Some(place) = self.place(family) else {
            let outcome = read();
            self.learn(family, &outcome);
            return Ok(outcome?);
        };
        let place = place?;
        stand_aside();
        let turn = timeout(patience.min(PATIENCE), Arc::clone(&self.turn).acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return Err(AttestError::ManyGroups) };
        let (tell, told) = oneshot::channel();
        // A task of its own: its turn lasts as long as the read and the rest do, whether anybody still waits or not.
        drop(tokio::spawn(async move {
            let timed = move || {
                let began = std::time::Instant::now();
                (read(), began.elapsed())
            };
            if let Ok((outcome, took)) = spawn_blocking(timed).await {
                let slow = place.reads.learn(family, &outcome);
                drop(place);
                let _nobody_waits = tell.send(outcome);
                if slow {
                    sleep(took.saturating_mul(REST).min(LONGEST_REST)).await;
                }
            }
            drop(turn);
        }));
        Ok(told.await.map_err(|_ended| AttestError::ManyGroups)??)
    }

    /// A place for a process of `family`, if that is known; and there may be none.
    fn place(self: &Arc<Self>, family: u64) -> Option<Result<ReadPlace, AttestError>> {
        if !self.any.load(Relaxed) {
            return None;
        }
        let mut families = self.families();
        let known = families.get_mut(&family).filter(|known| Instant::now() < known.until)?;
        if known.places >= PLACES {
            return Some(Err(AttestError::ManyGroups));
        }
        known.places += 1;
        Some(Ok(ReadPlace { reads: Arc::clone(self), family }))
    }

    /// Whether the process had too many groups. Its family is known for it then.
    fn learn<T>(&self, family: u64, outcome: &Result<T, ProcReadError>) -> bool {
        if !matches!(outcome, Err(ProcReadError::TooManyGroups)) {
            return false;
        }
        let now = Instant::now();
        let mut families = self.families();
        if families.len() >= MOST && !families.contains_key(&family) {
            families.retain(|_, known| known.places > 0 || now < known.until);
            if families.len() >= MOST
                && let Some(first) = families.iter().min_by_key(|(_, known)| known.until).map(|(of, _)| *of)
            {
                families.remove(&first);
            }
        }
        families.entry(family).or_insert(SlowFamily { until: now, places: 0 }).until = now + OF_LATE;
        self.any.store(true, Relaxed);
        true
    }

    fn families(&self) -> MutexGuard<'_, HashMap<u64, SlowFamily>> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    fn too_many() -> Result<(), ProcReadError> {
        Err(ProcReadError::TooManyGroups)
    }

    #[tokio::test(start_paused = true)]
    async fn slow_processes_are_read_in_turn_and_nobody_elses_wait() {
        let reads = Arc::new(LongReads::default());
        let stays = || panic!("it has a place still");
        let err = reads.read(1, SOON, stays, too_many).await.unwrap_err();
        assert!(matches!(err, AttestError::Status(ProcReadError::TooManyGroups)), "{err}");

        // One is read, as long as the test likes, and its caller has gone: its turn is still its own.
        let (go_on, wait) = mpsc::channel::<()>();
        let (began, begins) = oneshot::channel();
        let of_first = Arc::clone(&reads);
        let first = tokio::spawn(async move {
            let slow = move || {
                began.send(()).unwrap();
                wait.recv().unwrap();
                too_many()
            };
            of_first.read(1, SOON, || (), slow).await
        });
        begins.await.unwrap();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let aside = Arc::new(AtomicBool::new(false));
        let mut waiting: Vec<_> = (1..PLACES)
            .map(|_| {
                let reads = Arc::clone(&reads);
                let aside = Arc::clone(&aside);
                let stand_aside = move || aside.store(true, Relaxed);
                tokio::spawn(async move { reads.read(1, Duration::MAX, stand_aside, || Ok("served")).await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(aside.load(Relaxed), "who waits leaves its place to others");
        let crowded = reads.read(1, SOON, stays, || Ok(())).await.unwrap_err();
        assert!(matches!(crowded, AttestError::ManyGroups), "no place: {crowded}");
        assert_eq!(reads.read(2, SOON, stays, || Ok("at once")).await.unwrap(), "at once", "another family");

        go_on.send(()).unwrap();
        for served in waiting.drain(..) {
            assert_eq!(served.await.unwrap().unwrap(), "served", "who waits, and has few groups");
        }
        tokio::time::advance(OF_LATE).await;
        let here = std::thread::current().id();
        let read = move || Ok(std::thread::current().id() == here);
        assert!(reads.read(1, SOON, stays, read).await.unwrap(), "it is known for it no longer");
    }

    /// However often one that has too many groups by now asks, reading it takes a hundredth of the time; and the next has its turn
    /// then, whoever waits.
    #[tokio::test(start_paused = true)]
    async fn slow_reads_take_a_hundredth_of_the_time() {
        let reads = Arc::new(LongReads::default());
        let slow = || {
            let _in_the_kernel = nix::poll::poll(&mut [], 3u16);
            too_many()
        };
        reads.read(1, SOON, || (), slow).await.unwrap_err();
        let (began, mut read) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(20) {
            match reads.read(1, Duration::MAX, || (), slow).await.unwrap_err() {
                AttestError::ManyGroups => panic!("it would have had its turn"),
                _too_many => read += 1,
            }
        }
        assert!((10..=70).contains(&read), "of 3 ms each, in 20 s: {read}");
    }

    #[tokio::test]
    async fn no_more_families_are_known_than_may_be() {
        let reads = Arc::new(LongReads::default());
        for family in 0..u64::try_from(MOST).unwrap() + 10 {
            reads.read(family, SOON, || (), too_many).await.unwrap_err();
        }
        assert_eq!(reads.families().len(), MOST);
    }
}
