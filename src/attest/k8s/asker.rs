//! The answers of one service, shared by all callers, and the thread that asks for them.
//!
//! It asks while somebody waits, and for what somebody waits for: one request at a time, at the pace that the service is
//! asked at, whoever waits and however many they are. An answer is good for [`FRESH`]; whoever finds not in it what it looked
//! for waits for the next ones, as long as the settings say. Ahead of anybody it asks once, and where that fails again every
//! [`FRESH`] until there is an answer: an admin hears of a trouble before a caller does, and of its end without one.
//!
//! Who waits has one of [`WAITERS`] places, shared as attestations are, and none of those of attestations: whatever the service
//! does, no other caller waits for it. What is asked about comes from the kubelet's list; all the same what is kept and asked
//! for is bounded.

use std::{
    collections::{BTreeMap, VecDeque},
    num::NonZeroU32,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant as StdInstant},
};

use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
    time::{Instant, timeout},
};

use super::{
    client::{KubernetesClient, KubernetesPlace},
    fault::KubernetesFault,
    metrics::{RequestMetrics, RequestSeries},
    rhythm::{RequestPace, RequestRhythm},
};
use crate::{
    attest::attestors::{News, Outage},
    limits::{AttestationSlot, Attestations, Slots},
    telemetry::{chain, registry::Registry, trouble::Trouble},
};

/// How long an answer is good for callers that come after it was asked for. What may change of a container that runs (its pod's
/// labels, how many containers there are, the labels of its namespace) is seen so late at most.
pub(super) const FRESH: Duration = Duration::from_secs(10);
/// Things that are asked about at once. Who finds no place among them finds one in the next round.
const MOST_WANTED: usize = 256;
/// Things that are known at once, and what is kept of them, in bytes. Beyond that all but the last one are forgotten.
const MOST_KNOWN: usize = 2048;
const MOST_KEPT: usize = 4 * 1024 * 1024;
/// Callers that wait at once, and how many of one pod.
const WAITERS: Option<NonZeroU32> = NonZeroU32::new(1024);
const WAITERS_OF_POD: Option<NonZeroU32> = NonZeroU32::new(64);
/// Stack of the thread, in bytes.
const STACK: usize = 1024 * 1024;

/// What one service is asked.
pub(super) trait ServiceQuestion: 'static {
    /// What it is asked about.
    type Key: Ord + Clone + Send + 'static;
    type Answer: Send + Sync + 'static;

    /// The name of the thread.
    const THREAD: &'static str;
    const RHYTHM: RequestRhythm;
    const SERIES: RequestSeries;
    /// What it means that the service does not answer, for the log and the status.
    const TROUBLE: &'static str;
    /// The same of one that was not asked yet.
    const UNTRIED: &'static str;

    /// Asks once. Blocks this thread.
    ///
    /// # Errors
    /// [`KubernetesFault`].
    fn ask(
        client: &mut KubernetesClient,
        runtime: &Runtime,
        key: &Self::Key,
    ) -> Result<Self::Answer, KubernetesFault>;

    /// The size of an answer in memory, in bytes.
    fn size(answer: &Self::Answer) -> usize;

    /// How many things there are in an answer.
    fn count(answer: &Self::Answer) -> usize;
}

/// Why there is no answer that says what was looked for.
#[derive(Clone, Debug)]
pub(super) enum Unfound {
    /// Too many wait already.
    Crowded,
    /// The service could not be asked.
    Fault(Arc<KubernetesFault>),
    /// It did not answer.
    Silent,
    /// It was not in any answer that came.
    NotInIt,
}

/// What is known of one service, and the thread that asks it. The thread ends when this is dropped, as soon as it has asked.
pub(super) struct Asker<Q: ServiceQuestion> {
    asking: Arc<Asking<Q>>,
    waiters: Arc<Slots>,
    started: Once,
}

struct Asking<Q: ServiceQuestion> {
    wishes: Mutex<Wishes<Q>>,
    called: Condvar,
    /// Counts what was said.
    rounds: watch::Sender<u64>,
    /// Set before the first request, if at all.
    metrics: OnceLock<RequestMetrics>,
}

struct Wishes<Q: ServiceQuestion> {
    place: Option<Arc<KubernetesPlace>>,
    /// Nobody has looked yet whether it can be asked.
    is_new: bool,
    /// So many wait.
    waiting: usize,
    /// Each once; the first is asked for next.
    wanted: VecDeque<Q::Key>,
    known: BTreeMap<Q::Key, Known<Q::Answer>>,
    /// What all that is known takes, in bytes.
    kept: usize,
    /// What is asked for ahead of anybody, and who hears of what comes of requests.
    ahead: Option<(Q::Key, News)>,
    /// When it was last asked at this place, or could not be.
    tried: Option<Instant>,
    /// It has answered since the agent started.
    answered: bool,
    /// What came of the requests since the last answer.
    failing: Option<FailingService>,
    over: bool,
}

/// A service that does not answer.
struct FailingService {
    /// What is wrong, as the log was told.
    trouble: String,
    /// When the first of the requests that failed began.
    since: Instant,
    times: u32,
    /// Somebody has to change something.
    lasts: bool,
}

/// What the service said of one thing, each with when it was asked.
struct Known<A> {
    good: Option<(Arc<A>, Instant)>,
    /// Of the last request, if it failed.
    fault: Option<(Arc<KubernetesFault>, Instant)>,
}

/// Somebody waits until this is dropped.
struct Waits<'a, Q: ServiceQuestion>(&'a Asking<Q>);

/// What the thread does next.
struct AskerTask<K> {
    place: Arc<KubernetesPlace>,
    /// `None`: to look whether it can be asked.
    key: Option<K>,
}

impl<Q: ServiceQuestion> Default for Asker<Q> {
    fn default() -> Self {
        let waiters = Attestations::new(WAITERS, WAITERS_OF_POD).unwrap_or_default();
        let asking = Asking {
            wishes: Mutex::default(),
            called: Condvar::new(),
            rounds: watch::Sender::new(0),
            metrics: OnceLock::new(),
        };
        Self { asking: Arc::new(asking), waiters: Arc::new(Slots::new(waiters)), started: Once::new() }
    }
}

impl<Q: ServiceQuestion> Default for Wishes<Q> {
    fn default() -> Self {
        Self {
            place: None,
            is_new: false,
            waiting: 0,
            wanted: VecDeque::new(),
            known: BTreeMap::new(),
            kept: 0,
            ahead: None,
            tried: None,
            answered: false,
            failing: None,
            over: false,
        }
    }
}

impl<A> Clone for Known<A> {
    fn clone(&self) -> Self {
        Self { good: self.good.clone(), fault: self.fault.clone() }
    }
}

impl<Q: ServiceQuestion> Asker<Q> {
    /// Counts requests from now on.
    pub(super) fn counted_by(&self, registry: Registry<'_>) {
        let _counted_already = self.asking.metrics.set(RequestMetrics::new(registry, &Q::SERIES));
    }

    /// What it keeps, in bytes.
    pub(super) fn kept(&self) -> usize {
        self.asking.lock().kept
    }

    /// What was wrong when the service was last asked, or made ready for; `None` where nothing was.
    pub(super) fn trouble(&self) -> Option<String> {
        self.asking.lock().failing.as_ref().map(|failing| failing.trouble.clone())
    }

    /// Asks for `key` ahead of anybody, if that is given, and counts in `tries` what came of requests.
    pub(super) fn ask_ahead(&self, key: Option<Q::Key>, tries: &News) {
        self.asking.lock().ahead = key.map(|key| (key, Arc::clone(tries)));
        self.asking.called.notify_one();
    }

    /// Why nobody is told anything, if that is so and does not pass within a moment.
    pub(super) fn outage(&self) -> Option<Outage> {
        self.asking.lock().outage()
    }

    /// Asks at this place from the next request on.
    pub(super) fn begin(&self, place: KubernetesPlace) {
        let place = Arc::new(place);
        let mut wishes = self.asking.lock();
        if wishes.place.as_ref() != Some(&place) {
            // What another one said is of no use.
            wishes.known.clear();
            (wishes.kept, wishes.failing, wishes.tried) = (0, None, None);
            (wishes.place, wishes.is_new) = (Some(place), true);
            self.asking.called.notify_one();
        }
        drop(wishes);
        self.started.call_once(|| {
            let asking = Arc::clone(&self.asking);
            let thread = thread::Builder::new().name(Q::THREAD.to_owned()).stack_size(STACK);
            if let Err(error) = thread.spawn(move || asking.run()) {
                tracing::error!(%error, thread = Q::THREAD, "the thread that asks could not be started");
            }
        });
    }

    /// What `look` finds in an answer about `key` that is fresh, at once, or in one of those that come within `patience`; it is
    /// told when that was asked for. `share` says whose places it takes, and `aside` is called before it waits.
    ///
    /// # Errors
    /// [`Unfound`], or what `look` says.
    pub(super) async fn find<T, E>(
        &self,
        key: &Q::Key,
        share: u64,
        patience: Duration,
        aside: impl FnOnce(),
        look: impl Fn(&Q::Answer, Instant) -> Result<Option<T>, E>,
    ) -> Result<T, Result<Unfound, E>> {
        let began = Instant::now();
        let known = self.asking.known(key);
        let old_fault = known.as_ref().and_then(|known| known.fault.as_ref()).map(|(_, at)| *at);
        let good = known.and_then(|known| known.fresh(began));
        if let Some((answer, asked)) = good
            && let Some(found) = look(&answer, asked).map_err(Err)?
        {
            return Ok(found);
        }
        let _place: AttestationSlot = self.waiters.take(share).map_err(|_full| Ok(Unfound::Crowded))?;
        aside();
        let mut rounds = self.asking.rounds.subscribe();
        let _waits = self.asking.wait();
        let mut last = Unfound::Silent;
        let wait = async {
            loop {
                // First, so that what is said after the look wakes this.
                rounds.mark_unchanged();
                let known = self.asking.known(key);
                let fault = known.as_ref().and_then(|known| known.fault.clone());
                match (fault.filter(|(_, at)| old_fault != Some(*at)), known.and_then(|it| it.fresh(began))) {
                    (Some((fault, at)), _) => {
                        // One that was under way may be about something that was put right since.
                        if !fault.passes() && at >= began {
                            return Err(Ok(Unfound::Fault(fault)));
                        }
                        last = Unfound::Fault(fault);
                    }
                    (None, Some((answer, asked))) => {
                        if let Some(found) = look(&answer, asked).map_err(Err)? {
                            return Ok(found);
                        }
                        last = Unfound::NotInIt;
                    }
                    (None, None) => {}
                }
                self.asking.want(key);
                if rounds.changed().await.is_err() {
                    return Err(Ok(Unfound::Silent));
                }
            }
        };
        match timeout(patience, wait).await {
            Ok(ended) => ended,
            Err(_elapsed) => Err(Ok(last)),
        }
    }
}

impl<Q: ServiceQuestion> Drop for Asker<Q> {
    fn drop(&mut self) {
        self.asking.lock().over = true;
        self.asking.called.notify_all();
    }
}

impl<Q: ServiceQuestion> Drop for Waits<'_, Q> {
    fn drop(&mut self) {
        let mut wishes = self.0.lock();
        wishes.waiting = wishes.waiting.saturating_sub(1);
    }
}

impl<A> Known<A> {
    /// What is good for whoever began then.
    fn fresh(self, began: Instant) -> Option<(Arc<A>, Instant)> {
        self.good.filter(|(_, asked)| began.saturating_duration_since(*asked) < FRESH)
    }

    /// Whether nobody could use it who begins now.
    fn is_old(&self, now: Instant) -> bool {
        let asked =
            [self.good.as_ref().map(|(_, at)| *at), self.fault.as_ref().map(|(_, at)| *at)].into_iter();
        asked.flatten().all(|at| now.saturating_duration_since(at) >= FRESH)
    }
}

impl<Q: ServiceQuestion> Wishes<Q> {
    /// For how long it need not be asked ahead of anybody; `None` where it need not be at all.
    fn ahead_in(&self, now: Instant) -> Option<Duration> {
        let _wanted = self.ahead.as_ref()?;
        match self.tried {
            None => Some(Duration::ZERO),
            Some(tried) => self.failing.as_ref().map(|_| (tried + FRESH).saturating_duration_since(now)),
        }
    }

    /// It answered, or did not for this reason, when it was asked at this time.
    fn tried(&mut self, asked: Instant, came: Result<(), (String, Arc<KubernetesFault>)>) {
        self.tried = Some(asked);
        let Err((trouble, fault)) = came else {
            (self.answered, self.failing) = (true, None);
            return;
        };
        let before = self.failing.take();
        self.failing = Some(FailingService {
            trouble,
            since: before.as_ref().map_or(asked, |before| before.since),
            times: before.as_ref().map_or(0, |before| before.times).saturating_add(1),
            lasts: !fault.passes() || before.is_some_and(|before| before.lasts),
        });
    }

    fn outage(&self) -> Option<Outage> {
        let Some(failing) = &self.failing else {
            return (!self.answered).then_some(Outage::Untried(Q::UNTRIED));
        };
        // Callers may wait, and have it asked many times in a moment: they are served from what it said before.
        let is_long = failing.times > 1
            && self.tried.is_some_and(|tried| tried.saturating_duration_since(failing.since) >= FRESH);
        let is_outage = failing.lasts || is_long || !self.answered;
        is_outage.then(|| Outage::Failing(failing.trouble.clone()))
    }

    fn forget_old(&mut self, now: Instant) {
        self.known.retain(|_, it| !it.is_old(now));
        let good = self.known.values().filter_map(|it| it.good.as_ref());
        self.kept = good.map(|(answer, _)| Q::size(answer)).sum();
    }

    fn learn(&mut self, key: Q::Key, said: Result<Q::Answer, Arc<KubernetesFault>>, asked: Instant) {
        let old = self.known.remove(&key);
        let known = match said {
            Ok(answer) => Known { good: Some((Arc::new(answer), asked)), fault: None },
            // Whoever is in what was said before is still served from it.
            Err(fault) => Known { good: old.and_then(|old| old.good), fault: Some((fault, asked)) },
        };
        self.forget_old(asked);
        let size = known.good.as_ref().map_or(0, |(answer, _)| Q::size(answer));
        if self.known.len() >= MOST_KNOWN || self.kept + size > MOST_KEPT {
            self.known.clear();
            self.kept = 0;
        }
        self.kept += size;
        self.known.insert(key, known);
    }
}

impl<Q: ServiceQuestion> Asking<Q> {
    fn lock(&self) -> MutexGuard<'_, Wishes<Q>> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, key: &Q::Key) -> Option<Known<Q::Answer>> {
        self.lock().known.get(key).cloned()
    }

    fn wait(&self) -> Waits<'_, Q> {
        self.lock().waiting += 1;
        Waits(self)
    }

    fn want(&self, key: &Q::Key) {
        let mut wishes = self.lock();
        if wishes.wanted.len() < MOST_WANTED && !wishes.wanted.contains(key) {
            wishes.wanted.push_back(key.clone());
            self.called.notify_one();
        }
    }

    /// Asks for whatever is wanted, until all is over.
    fn run(&self) {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime
            .map_err(|error| tracing::error!(%error, thread = Q::THREAD, "the thread has no runtime"))
            .ok();
        let (mut pace, mut trouble) = (RequestPace::new(Q::RHYTHM), Trouble::default());
        let mut client: Option<(Arc<KubernetesPlace>, KubernetesClient)> = None;
        while let Some(AskerTask { place, key }) = self.next(&pace) {
            let known = client.take().filter(|(known, _)| Arc::ptr_eq(known, &place));
            let (_, client) = client.insert(
                known.unwrap_or_else(|| (Arc::clone(&place), KubernetesClient::new((*place).clone()))),
            );
            let asked = Instant::now();
            let Some(key) = key else {
                // At once, so that an admin hears of it before a caller does.
                let failed =
                    client.prepare().err().map(|fault| (told::<Q>(&mut trouble, &fault), Arc::new(fault)));
                self.end_round(&place, |wishes| {
                    if let Some(failed) = failed {
                        wishes.tried(asked, Err(failed));
                    }
                });
                continue;
            };
            pace.begins(StdInstant::now());
            let said = match &runtime {
                Some(runtime) => catch_unwind(AssertUnwindSafe(|| Q::ask(client, runtime, &key)))
                    .unwrap_or(Err(KubernetesFault::Internal("a mistake of its own, see the log"))),
                None => Err(KubernetesFault::Internal("it has no runtime")),
            };
            pace.ended(StdInstant::now(), said.is_ok());
            if let Some(metrics) = self.metrics.get() {
                metrics.count(said.as_ref().map(Q::count));
            }
            let said = said.map_err(Arc::new);
            let came = match &said {
                Ok(answer) => {
                    let (count, thread) = (Q::count(answer), Q::THREAD);
                    if trouble.ends() {
                        tracing::info!(count, thread, "the service answers again");
                    } else {
                        tracing::debug!(count, thread, "the service answered");
                    }
                    Ok(())
                }
                Err(fault) => Err((told::<Q>(&mut trouble, fault), Arc::clone(fault))),
            };
            self.end_round(&place, |wishes| {
                wishes.tried(asked, came);
                wishes.learn(key, said, asked);
            });
        }
    }

    /// Tells what came of a request at this place, if it is not another one by now.
    fn end_round(&self, place: &Arc<KubernetesPlace>, tell: impl FnOnce(&mut Wishes<Q>)) {
        let mut wishes = self.lock();
        if wishes.place.as_ref().is_some_and(|now| Arc::ptr_eq(now, place)) {
            tell(&mut wishes);
        }
        let tries = wishes.ahead.as_ref().map(|(_, tries)| Arc::clone(tries));
        drop(wishes);
        if let Some(tries) = tries {
            tries.send_modify(|tries| *tries = tries.wrapping_add(1));
        }
        self.rounds.send_modify(|rounds| *rounds = rounds.wrapping_add(1));
    }

    /// Waits until there is something to do and the next request may begin. `None` when all is over.
    fn next(&self, pace: &RequestPace) -> Option<AskerTask<Q::Key>> {
        let mut wishes = self.lock();
        loop {
            if wishes.over {
                return None;
            }
            if wishes.waiting == 0 {
                wishes.wanted.clear();
            }
            let ahead_in = wishes.ahead_in(Instant::now());
            if wishes.wanted.is_empty() && ahead_in.is_some_and(|pause| pause.is_zero()) {
                let key = wishes.ahead.as_ref().map(|(key, _)| key.clone());
                wishes.wanted.extend(key);
            }
            let (pause, idle) = match wishes.place.clone() {
                Some(place) if wishes.is_new => {
                    wishes.is_new = false;
                    return Some(AskerTask { place, key: None });
                }
                Some(place) if !wishes.wanted.is_empty() => match pace.next(StdInstant::now()) {
                    Some(pause) => (pause, false),
                    None => {
                        let key = wishes.wanted.pop_front();
                        return Some(AskerTask { place, key });
                    }
                },
                _ => (ahead_in.map_or(FRESH, |pause| pause.min(FRESH)), true),
            };
            let (guard, waited) =
                self.called.wait_timeout(wishes, pause).unwrap_or_else(PoisonError::into_inner);
            wishes = guard;
            if idle && waited.timed_out() && wishes.waiting == 0 {
                wishes.forget_old(Instant::now());
            }
        }
    }
}

/// What is wrong, in one line; the log says it when it is due.
fn told<Q: ServiceQuestion>(trouble: &mut Trouble, fault: &KubernetesFault) -> String {
    let error = chain(fault);
    let whole = format!("{}: {error}", Q::TROUBLE);
    if trouble.is_due(&error, Instant::now()) {
        tracing::warn!(error, "{}", Q::TROUBLE);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::k8s::{
        fault::{KubernetesService, ServiceAddress},
        metrics::SeriesWords,
    };

    /// Nobody is asked: what is known is told by hand.
    struct Told;

    impl ServiceQuestion for Told {
        type Key = u32;
        type Answer = Vec<u8>;

        const THREAD: &'static str = "test";
        const RHYTHM: RequestRhythm =
            RequestRhythm { a_second: 1, pause: Duration::ZERO, pause_after_fault: Duration::ZERO };
        const SERIES: RequestSeries = RequestSeries {
            requests: SeriesWords { name: "a", help: "" },
            counted: SeriesWords { name: "b", help: "" },
        };
        const TROUBLE: &'static str = "";
        const UNTRIED: &'static str = "";

        fn ask(_: &mut KubernetesClient, _: &Runtime, _: &u32) -> Result<Vec<u8>, KubernetesFault> {
            Err(KubernetesFault::Internal(""))
        }

        fn size(answer: &Vec<u8>) -> usize {
            answer.len()
        }

        fn count(answer: &Vec<u8>) -> usize {
            answer.len()
        }
    }

    fn fresh(wishes: &Wishes<Told>, key: u32, began: Instant) -> bool {
        wishes.known.get(&key).cloned().is_some_and(|it| it.fresh(began).is_some())
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_is_bounded_and_grows_old() {
        let mut wishes = Wishes::<Told>::default();
        for n in 0..5000 {
            wishes.learn(n, Ok(vec![0; 10]), Instant::now());
            assert!(wishes.known.len() <= MOST_KNOWN, "{n}");
        }
        for n in 0..100 {
            wishes.learn(n, Ok(vec![0; 100 * 1024]), Instant::now());
            assert!(wishes.kept <= MOST_KEPT, "{n}: {}", wishes.kept);
            let sizes: usize =
                wishes.known.values().filter_map(|it| it.good.as_ref()).map(|it| it.0.len()).sum();
            assert_eq!(wishes.kept, sizes, "{n}");
        }
        assert!(fresh(&wishes, 99, Instant::now()));
        tokio::time::advance(FRESH).await;
        assert!(!fresh(&wishes, 99, Instant::now()));
        wishes.learn(7, Ok(vec![0; 10]), Instant::now());
        assert_eq!((wishes.known.len(), wishes.kept), (1, 10), "what is old is forgotten");
        // One that is larger than all may be is kept alone: its own bound is where it is read.
        wishes.learn(8, Ok(vec![0; MOST_KEPT + 1]), Instant::now());
        assert_eq!(wishes.known.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_pass_is_an_outage() {
        let begin = Instant::now();
        let who = || ServiceAddress { service: KubernetesService::Kubelet, address: String::new() };
        let (none, some) = (false, true);
        // What came of requests, after so many milliseconds: whether it is an outage then.
        for (case, came) in [
            ("it answers", &[(0, "answers", none)][..]),
            ("it refuses", &[(0, "answers", none), (100, "refuses", some), (200, "answers", none)]),
            ("it is away when the agent starts", &[(0, "away", some), (10_000, "answers", none)]),
            ("it is away for a moment", &[(0, "answers", none), (9, "away", none), (19, "answers", none)]),
            (
                "callers have it asked meanwhile",
                &[(0, "answers", none), (1, "away", none), (250, "away", none), (9_999, "away", none)],
            ),
            ("it is away", &[(0, "answers", none), (1, "away", none), (10_001, "away", some)]),
            ("it refuses, and is away", &[(0, "answers", none), (1, "refuses", some), (2, "away", some)]),
        ] {
            let mut wishes = Wishes::<Told>::default();
            assert_eq!(wishes.outage(), Some(Outage::Untried("")), "{case}");
            for (after, how, is_outage) in came {
                let fault = match *how {
                    "away" => Some(KubernetesFault::Late { who: who() }),
                    "refuses" => Some(KubernetesFault::Forbidden { who: who(), said: String::new() }),
                    _ => None,
                };
                let came = fault.map_or(Ok(()), |fault| Err(((*how).to_owned(), Arc::new(fault))));
                wishes.tried(begin + Duration::from_millis(*after), came);
                let want = is_outage.then(|| Outage::Failing((*how).to_owned()));
                assert_eq!(wishes.outage(), want, "{case}: {after}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ahead_of_anybody_it_is_asked_until_it_answers() {
        let (mut wishes, fault) = (Wishes::<Told>::default(), Arc::new(KubernetesFault::Internal("")));
        assert_eq!(wishes.ahead_in(Instant::now()), None, "nobody wants it");
        wishes.ahead = Some((1, News::default()));
        for _ in 0..3 {
            assert_eq!(wishes.ahead_in(Instant::now()), Some(Duration::ZERO));
            wishes.tried(Instant::now(), Err((String::new(), Arc::clone(&fault))));
            assert_eq!(wishes.ahead_in(Instant::now()), Some(FRESH));
            tokio::time::advance(FRESH).await;
        }
        wishes.tried(Instant::now(), Ok(()));
        tokio::time::advance(FRESH * 100).await;
        assert_eq!(wishes.ahead_in(Instant::now()), None, "it has answered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_takes_nothing_from_those_who_are_in_what_was_said() {
        let mut wishes = Wishes::<Told>::default();
        let fault = || Arc::new(KubernetesFault::Internal("no"));
        wishes.learn(1, Ok(vec![0; 10]), Instant::now());
        tokio::time::advance(FRESH / 2).await;
        wishes.learn(1, Err(fault()), Instant::now());
        assert!(fresh(&wishes, 1, Instant::now()));
        assert_eq!(wishes.kept, 10);
        tokio::time::advance(FRESH / 2).await;
        wishes.learn(1, Err(fault()), Instant::now());
        assert!(!fresh(&wishes, 1, Instant::now()));
        wishes.learn(1, Ok(Vec::new()), Instant::now());
        assert!(wishes.known.get(&1).is_some_and(|it| it.fault.is_none()));
    }
}
