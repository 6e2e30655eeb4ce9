//! Whose processes are slow to read, and how much of the processor that may take.
//!
//! The kernel writes all supplementary groups of a process, up to 65,536, each time its `status` is read: 5 to 16 ms, all of it
//! its own, and there is no asking how many there are. One that connected with more than are attested is known by its socket. One
//! that has more by now, or whose first thread has, is found out by reading it: then the processes of its family are read beside
//! the threads that serve for a while ([`OF_LATE`]), one process at a time, and after one that was slow there is a rest. So all
//! reads in vain of known families together take about a hundredth of a core. Until that rest is over others are read beside
//! those threads too, though none waits for it: there may be many such families, and whose the next is nobody knows. So a thread
//! that serves is stopped once in a rest, by whomever. A process that people ask about is always read beside them, in a place that
//! no caller takes.
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
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
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
/// So many processes of families that are not known are read at a time beside the threads that serve.
const BESIDE: usize = 2;

#[derive(Debug)]
struct SlowFamily {
    until: Instant,
    places: u8,
}

#[derive(Debug, Default)]
struct SlowFamilies {
    known: HashMap<u64, SlowFamily>,
    /// Until when there is a rest.
    rest_until: Option<Instant>,
}

/// Reads what may be slow to read.
#[derive(Debug)]
pub(super) struct LongReads {
    families: Mutex<SlowFamilies>,
    /// There are some.
    any: AtomicBool,
    turn: Arc<Semaphore>,
    beside: Arc<Semaphore>,
    for_people: Arc<Semaphore>,
}

impl Default for LongReads {
    fn default() -> Self {
        let places = |number| Arc::new(Semaphore::new(number));
        Self {
            families: Mutex::default(),
            any: AtomicBool::new(false),
            turn: places(1),
            beside: places(BESIDE),
            for_people: places(1),
        }
    }
}

/// How a process is read.
enum ReadWay {
    /// On this thread.
    Here,
    /// Beside those that serve.
    Beside,
    /// The same, in its turn.
    InTurn(ReadPlace),
}

/// A place of a family, until it is dropped.
struct ReadPlace {
    reads: Arc<LongReads>,
    family: u64,
}

impl Drop for ReadPlace {
    fn drop(&mut self) {
        if let Some(known) = self.reads.families().known.get_mut(&self.family) {
            known.places = known.places.saturating_sub(1);
        }
    }
}

impl LongReads {
    /// Has `read` read a process of `family`: at once, on this thread, or beside it where it may be slow, in its turn if that
    /// is known of its family. It is told to `stand_aside` before it waits for that.
    ///
    /// # Errors
    /// What `read` says; [`AttestError::ManyGroups`] where its turn does not come soon enough, [`AttestError::Crowded`] where so many
    /// others are read that it has no place beside them.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        family: u64,
        patience: Duration,
        stand_aside: impl FnOnce(),
        read: impl FnOnce() -> Result<T, ProcReadError> + Send + 'static,
    ) -> Result<T, AttestError> {
        let reads = Arc::clone(self);
        let read = move || {
            let began = std::time::Instant::now();
            let outcome = read();
            let rest = reads.learn(family, &outcome, began.elapsed());
            (outcome, rest)
        };
        let mut way = self.way(family)?;
        if let ReadWay::Beside = way {
            let place = place_in(&self.beside, patience).await.ok_or(AttestError::Crowded)?;
            // Meanwhile another of its family may have been read.
            way = self.way(family)?;
            if !matches!(way, ReadWay::InTurn(_)) {
                return Ok(beside(place, move || read().0).await.ok_or(AttestError::Crowded)??);
            }
        }
        let ReadWay::InTurn(place) = way else { return Ok(read().0?) };
        stand_aside();
        let turn = place_in(&self.turn, patience).await.ok_or(AttestError::ManyGroups)?;
        let (tell, told) = oneshot::channel();
        // A task of its own: its turn lasts as long as the read and the rest do, whether anybody still waits or not.
        drop(tokio::spawn(async move {
            if let Ok((outcome, rest)) = spawn_blocking(read).await {
                drop(place);
                let _nobody_waits = tell.send(outcome);
                if !rest.is_zero() {
                    sleep(rest).await;
                }
            }
            drop(turn);
        }));
        Ok(told.await.map_err(|_ended| AttestError::ManyGroups)??)
    }

    /// Has `read` read a process that people ask about, whosever it is.
    ///
    /// # Errors
    /// What `read` says; [`AttestError::Crowded`] where others are read for people as long as an attestation may take.
    pub(super) async fn read_for_people<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, ProcReadError> + Send + 'static,
    ) -> Result<T, AttestError> {
        let place = place_in(&self.for_people, PATIENCE).await.ok_or(AttestError::Crowded)?;
        Ok(beside(place, read).await.ok_or(AttestError::Crowded)??)
    }

    /// How a process of `family` is read.
    ///
    /// # Errors
    /// [`AttestError::ManyGroups`]: it is to be read in its turn, and there are others enough who wait for that.
    fn way(self: &Arc<Self>, family: u64) -> Result<ReadWay, AttestError> {
        if !self.any.load(Relaxed) {
            return Ok(ReadWay::Here);
        }
        let (mut families, now) = (self.families(), Instant::now());
        let rests = families.rest_until.is_some_and(|until| now < until);
        match families.known.get_mut(&family).filter(|known| now < known.until) {
            None if rests => Ok(ReadWay::Beside),
            None => Ok(ReadWay::Here),
            Some(known) if known.places >= PLACES => Err(AttestError::ManyGroups),
            Some(known) => {
                known.places += 1;
                Ok(ReadWay::InTurn(ReadPlace { reads: Arc::clone(self), family }))
            }
        }
    }

    /// The rest after a read that `took` so long: none unless the process had too many groups. Its family is known for it then.
    fn learn<T>(&self, family: u64, outcome: &Result<T, ProcReadError>, took: Duration) -> Duration {
        if !matches!(outcome, Err(ProcReadError::TooManyGroups)) {
            return Duration::ZERO;
        }
        let (now, rest) = (Instant::now(), took.saturating_mul(REST).min(LONGEST_REST));
        let mut families = self.families();
        families.rest_until = families.rest_until.max(Some(now + rest));
        let known = &mut families.known;
        if known.len() >= MOST && !known.contains_key(&family) {
            known.retain(|_, known| known.places > 0 || now < known.until);
            if known.len() >= MOST
                && let Some(first) = known.iter().min_by_key(|(_, known)| known.until).map(|(of, _)| *of)
            {
                known.remove(&first);
            }
        }
        known.entry(family).or_insert(SlowFamily { until: now, places: 0 }).until = now + OF_LATE;
        self.any.store(true, Relaxed);
        rest
    }

    fn families(&self) -> MutexGuard<'_, SlowFamilies> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads beside the threads that serve. The place lasts as long as that, whether anybody still waits or not. `None` where the agent
/// ends.
async fn beside<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    read: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    spawn_blocking(move || (read(), place).0).await.ok()
}

/// One of these places, where there is one soon enough.
async fn place_in(places: &Arc<Semaphore>, patience: Duration) -> Option<OwnedSemaphorePermit> {
    timeout(patience.min(PATIENCE), Arc::clone(places).acquire_owned()).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use std::sync::{atomic::AtomicUsize, mpsc};

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
        let here = std::thread::current().id();
        let read = move || Ok(std::thread::current().id() == here);
        assert!(
            !reads.read(2, SOON, stays, read).await.unwrap(),
            "another family waits for no turn, and stops nobody"
        );

        go_on.send(()).unwrap();
        for served in waiting.drain(..) {
            assert_eq!(served.await.unwrap().unwrap(), "served", "who waits, and has few groups");
        }
        tokio::time::advance(OF_LATE).await;
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

    /// Many families, each slow for the first time: one of them stops a thread that serves, the others are read beside it, few at
    /// a time; and what one of a family turned out to be holds for those of it who wait.
    #[tokio::test(start_paused = true)]
    async fn families_that_come_after_a_slow_one_are_read_beside() {
        let reads = Arc::new(LongReads::default());
        let here = std::thread::current().id();
        let (at_once, most, stopped) =
            (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let read = |family| {
            let (reads, at_once, most, stopped) =
                (Arc::clone(&reads), Arc::clone(&at_once), Arc::clone(&most), Arc::clone(&stopped));
            tokio::spawn(async move {
                let slow = move || {
                    most.fetch_max(at_once.fetch_add(1, Relaxed) + 1, Relaxed);
                    stopped.fetch_add(usize::from(std::thread::current().id() == here), Relaxed);
                    let _in_the_kernel = nix::poll::poll(&mut [], 3u16);
                    at_once.fetch_sub(1, Relaxed);
                    too_many()
                };
                reads.read(family, PATIENCE, || (), slow).await.unwrap_err()
            })
        };
        let too_many_of = |error: &AttestError| matches!(error, AttestError::Status(_));
        let crowd: Vec<_> = (0..40).map(read).collect();
        for one in crowd {
            assert!(too_many_of(&one.await.unwrap()));
        }
        assert_eq!((stopped.load(Relaxed), most.load(Relaxed)), (1, BESIDE));

        // Twenty of one family: the first are read beside, and the others then wait for their turns, as many as may.
        let family: Vec<_> = (0..20).map(|_| read(77)).collect();
        let mut refused = 0;
        for one in family {
            refused += usize::from(!too_many_of(&one.await.unwrap()));
        }
        assert!(refused >= 20 - BESIDE - usize::from(PLACES), "{refused} found no place");
        assert_eq!(stopped.load(Relaxed), 1, "within the rest nobody is stopped");
    }

    /// What people ask about stops no thread that serves, and neither waits for callers nor takes their places.
    #[tokio::test]
    async fn what_people_ask_about_is_read_beside_all_others() {
        let reads = LongReads::default();
        let here = std::thread::current().id();
        let _taken = (reads.turn.acquire().await, reads.beside.acquire_many(2).await);
        let elsewhere = reads.read_for_people(move || Ok(std::thread::current().id() != here)).await;
        assert!(elsewhere.unwrap());
        assert!(matches!(reads.read_for_people(too_many).await, Err(AttestError::Status(_))));
        assert!(!reads.any.load(Relaxed), "whatever it was, no caller is read otherwise for it");
    }

    #[tokio::test]
    async fn no_more_families_are_known_than_may_be() {
        let reads = Arc::new(LongReads::default());
        for family in 0..u64::try_from(MOST).unwrap() + 10 {
            reads.read(family, SOON, || (), too_many).await.unwrap_err();
        }
        assert_eq!(reads.families().known.len(), MOST);
    }
}
