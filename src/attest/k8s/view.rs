//! One view of the node's pods, shared by all callers.
//!
//! One thread asks the kubelet, and only while somebody waits: one request at a time, none sooner than [`PAUSE`] after the
//! last, and at most [`A_SECOND`] a second, whoever waits and however many they are. A view is good for [`FRESH`]; whoever
//! is not in it waits for the next ones, as long as the settings say.
//!
//! Who waits has one of [`WAITERS`] places, shared as attestations are, and none of those of attestations: whatever the
//! kubelet does, no other caller waits for it.

use std::{
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
    metrics::KubeletMetrics,
    pods::PodList,
};
use crate::{
    limits::{AttestationSlot, Attestations, Slots},
    telemetry::{chain, registry::Registry},
};

/// How long a view is good for callers that come after it was asked for. What may change of a container that runs, its pod's
/// labels and how many containers there are, is seen so late at most.
pub(super) const FRESH: Duration = Duration::from_secs(10);
/// The time between the end of a request and the next.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests in a second, at most.
const A_SECOND: usize = 4;
/// Callers that wait for the kubelet at once, and how many of one pod.
const WAITERS: Option<NonZeroU32> = NonZeroU32::new(1024);
const WAITERS_OF_POD: Option<NonZeroU32> = NonZeroU32::new(64);
/// Stack of the thread, in bytes.
const STACK: usize = 1024 * 1024;
/// The time between two lines about the same trouble.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// What the kubelet said.
#[derive(Clone, Debug)]
pub(super) struct PodView {
    pub(super) pods: Arc<PodList>,
    /// The node that it was asked for, if that is known.
    pub(super) node: Option<Arc<str>>,
    /// When it was asked.
    pub(super) asked: Instant,
}

/// What is known of the pods.
#[derive(Clone, Debug, Default)]
struct ViewState {
    good: Option<PodView>,
    /// Of the last request, if it failed, and when that began.
    fault: Option<(Instant, Arc<KubernetesFault>)>,
}

/// The view, and the thread that asks for it. The thread ends when this is dropped, as soon as it has asked.
pub(super) struct SharedView {
    asking: Arc<Asking>,
    waiters: Arc<Slots>,
    started: Once,
}

struct Asking {
    demand: Mutex<Demand>,
    called: Condvar,
    answers: watch::Sender<ViewState>,
    /// Set before the first request, if at all.
    metrics: OnceLock<KubeletMetrics>,
}

#[derive(Default)]
struct Demand {
    place: Option<Arc<KubernetesPlace>>,
    /// So many wait.
    waiting: usize,
    over: bool,
}

/// Somebody waits: the kubelet is asked until this is dropped.
struct WantsView<'a>(&'a Asking);

/// Why there is no view that says what was looked for.
#[derive(Clone, Debug)]
pub(super) enum NoView {
    /// Too many wait already.
    Crowded,
    /// The kubelet could not be asked.
    Kubelet(Arc<KubernetesFault>),
    /// It did not answer.
    Silent,
    /// It was not in any view that came.
    NotInIt,
}

impl Default for SharedView {
    fn default() -> Self {
        let waiters = Attestations::new(WAITERS, WAITERS_OF_POD).unwrap_or_default();
        let asking = Asking {
            demand: Mutex::default(),
            called: Condvar::new(),
            answers: watch::Sender::new(ViewState::default()),
            metrics: OnceLock::new(),
        };
        Self { asking: Arc::new(asking), waiters: Arc::new(Slots::new(waiters)), started: Once::new() }
    }
}

impl SharedView {
    /// Counts requests from now on.
    pub(super) fn counted_by(&self, registry: Registry<'_>) {
        let _counted_already = self.asking.metrics.set(KubeletMetrics::new(registry));
    }

    /// What it keeps, in bytes.
    pub(super) fn kept(&self) -> usize {
        self.asking.answers.borrow().good.as_ref().map_or(0, |view| view.pods.size())
    }

    /// Asks this kubelet from the next request on.
    pub(super) fn begin(&self, place: KubernetesPlace) {
        let place = Arc::new(place);
        let mut demand = self.asking.lock();
        if demand.place.as_ref() != Some(&place) {
            demand.place = Some(place);
            drop(demand);
            // What another kubelet said is of no use.
            self.asking.answers.send_replace(ViewState::default());
        }
        self.started.call_once(|| {
            let asking = Arc::clone(&self.asking);
            let thread = thread::Builder::new().name("kubelet".to_owned()).stack_size(STACK);
            if let Err(error) = thread.spawn(move || asking.run()) {
                tracing::error!(%error, "the thread that asks the kubelet could not be started");
            }
        });
    }

    /// What `look` finds in a view that is fresh, at once, or in one of those that come within `patience`. `share` says whose places it takes, and `aside` is
    /// called before it waits.
    ///
    /// # Errors
    /// [`NoView`], or what `look` says.
    pub(super) async fn find<T, E>(
        &self,
        share: u64,
        patience: Duration,
        aside: impl FnOnce(),
        look: impl Fn(&PodView) -> Result<Option<T>, E>,
    ) -> Result<T, Result<NoView, E>> {
        let began = Instant::now();
        let fresh = |view: &PodView| began.saturating_duration_since(view.asked) < FRESH;
        let known = self.asking.answers.borrow().good.clone();
        if let Some(found) = known.filter(fresh).map(|view| look(&view)).transpose().map_err(Err)?.flatten() {
            return Ok(found);
        }
        let _place: AttestationSlot = self.waiters.take(share).map_err(|_full| Ok(NoView::Crowded))?;
        aside();
        let mut answers = self.asking.answers.subscribe();
        answers.mark_unchanged();
        let _asked = self.asking.ask();
        let mut last = NoView::Silent;
        let wait = async {
            while answers.changed().await.is_ok() {
                let ViewState { good, fault } = answers.borrow_and_update().clone();
                match (fault, good) {
                    (Some((at, fault)), _) => {
                        // One that was under way may be about something that was put right since.
                        if !fault.passes() && at >= began {
                            return Err(Ok(NoView::Kubelet(fault)));
                        }
                        last = NoView::Kubelet(fault);
                    }
                    (None, Some(view)) => {
                        if let Some(found) = look(&view).map_err(Err)? {
                            return Ok(found);
                        }
                        last = NoView::NotInIt;
                    }
                    (None, None) => {}
                }
            }
            Err(Ok(NoView::Silent))
        };
        match timeout(patience, wait).await {
            Ok(ended) => ended,
            Err(_elapsed) => Err(Ok(last)),
        }
    }
}

impl Drop for SharedView {
    fn drop(&mut self) {
        self.asking.lock().over = true;
        self.asking.called.notify_all();
    }
}

impl Drop for WantsView<'_> {
    fn drop(&mut self) {
        let mut demand = self.0.lock();
        demand.waiting = demand.waiting.saturating_sub(1);
    }
}

impl Asking {
    fn lock(&self) -> MutexGuard<'_, Demand> {
        self.demand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) -> WantsView<'_> {
        self.lock().waiting += 1;
        self.called.notify_one();
        WantsView(self)
    }

    /// Asks whenever somebody waits, until all is over.
    fn run(&self) {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| tracing::error!(%error, "the kubelet cannot be asked")).ok();
        let (mut pace, mut complaint) = (RequestPace::default(), KubeletTrouble::default());
        let mut kubelet: Option<(Arc<KubernetesPlace>, KubernetesClient)> = None;
        while let Some(place) = self.next(&pace) {
            let known = kubelet.take().filter(|(known, _)| Arc::ptr_eq(known, &place));
            let (_, asked) = kubelet.insert(
                known.unwrap_or_else(|| (Arc::clone(&place), KubernetesClient::new((*place).clone()))),
            );
            let began = Instant::now();
            pace.begins(StdInstant::now());
            let listed = match &runtime {
                Some(runtime) => list(asked, runtime),
                None => Err(KubernetesFault::Internal("it has no runtime")),
            };
            pace.ended(StdInstant::now());
            complaint.note(listed.as_ref());
            if let Some(metrics) = self.metrics.get() {
                metrics.count(listed.as_ref());
            }
            let demand = self.lock();
            // Another kubelet may be asked by now.
            if demand.place.as_ref().is_some_and(|now| Arc::ptr_eq(now, &place)) {
                self.answers.send_modify(|answers| match listed {
                    Ok(pods) => {
                        let node = place.name.as_deref().map(Arc::from);
                        *answers = ViewState {
                            good: Some(PodView { pods: Arc::new(pods), node, asked: began }),
                            fault: None,
                        };
                    }
                    Err(fault) => answers.fault = Some((began, Arc::new(fault))),
                });
            }
        }
    }

    /// Waits until somebody waits and the next request may begin. `None` when all is over.
    fn next(&self, pace: &RequestPace) -> Option<Arc<KubernetesPlace>> {
        let mut demand = self.lock();
        loop {
            if demand.over {
                return None;
            }
            let now = StdInstant::now();
            let (pause, idle) = match &demand.place {
                Some(place) if demand.waiting > 0 => match pace.next(now) {
                    Some(pause) => (pause, false),
                    None => return Some(Arc::clone(place)),
                },
                _ => (FRESH, true),
            };
            let (guard, waited) =
                self.called.wait_timeout(demand, pause).unwrap_or_else(PoisonError::into_inner);
            demand = guard;
            if idle && waited.timed_out() && demand.waiting == 0 {
                // Nobody could use it any more.
                self.answers.send_if_modified(|answers| {
                    let old = answers.good.as_ref().is_some_and(|view| view.asked.elapsed() >= FRESH);
                    if old {
                        answers.good = None;
                    }
                    false
                });
            }
        }
    }
}

fn list(kubelet: &mut KubernetesClient, runtime: &Runtime) -> Result<PodList, KubernetesFault> {
    catch_unwind(AssertUnwindSafe(|| kubelet.get(runtime, "/pods", |body| PodList::read(body))))
        .unwrap_or(Err(KubernetesFault::Internal("a mistake of its own, see the log")))
}

/// When requests began and ended.
#[derive(Debug, Default)]
struct RequestPace {
    /// The last ones, the oldest first.
    begun: [Option<StdInstant>; A_SECOND],
    ended: Option<StdInstant>,
}

impl RequestPace {
    fn begins(&mut self, now: StdInstant) {
        self.begun.rotate_left(1);
        if let Some(last) = self.begun.last_mut() {
            *last = Some(now);
        }
    }

    fn ended(&mut self, now: StdInstant) {
        self.ended = Some(now);
    }

    /// For how long the next request may not begin yet.
    fn next(&self, now: StdInstant) -> Option<Duration> {
        let oldest = self.begun.first().copied().flatten().map(|oldest| oldest + Duration::from_secs(1));
        let after = self.ended.map(|ended| ended + PAUSE);
        let pause = oldest.max(after)?.saturating_duration_since(now);
        (!pause.is_zero()).then_some(pause)
    }
}

/// What the log says of requests that fail.
#[derive(Default)]
struct KubeletTrouble {
    said: Option<(StdInstant, String)>,
}

impl KubeletTrouble {
    fn note(&mut self, listed: Result<&PodList, &KubernetesFault>) {
        match listed {
            Ok(pods) => {
                if self.said.take().is_some() {
                    tracing::info!(pods = pods.len(), "the kubelet says again which pods there are");
                } else {
                    tracing::debug!(pods = pods.len(), "the kubelet said which pods there are");
                }
            }
            Err(fault) => {
                let (error, now) = (chain(fault), StdInstant::now());
                let known = self
                    .said
                    .as_ref()
                    .is_some_and(|(at, said)| *said == error && now.duration_since(*at) < SAID_EVERY);
                if !known {
                    tracing::warn!(
                        error,
                        "the kubelet does not list its pods, so callers in pods cannot be identified"
                    );
                    self.said = Some((now, error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When each request begins if all take `took` and somebody always waits, in milliseconds.
    fn begun(took: u64, times: usize) -> Vec<u64> {
        let start = StdInstant::now();
        let (mut pace, mut now, mut begun) = (RequestPace::default(), start, Vec::new());
        for _ in 0..times {
            now += pace.next(now).unwrap_or_default();
            assert_eq!(pace.next(now), None, "after what it said");
            pace.begins(now);
            begun.push(u64::try_from((now - start).as_millis()).unwrap());
            now += Duration::from_millis(took);
            pace.ended(now);
        }
        begun
    }

    #[test]
    fn requests_are_four_a_second_and_never_close_together() {
        assert_eq!(begun(0, 6), [0, 100, 200, 300, 1000, 1100]);
        assert_eq!(begun(50, 6), [0, 150, 300, 450, 1000, 1150]);
        assert_eq!(begun(400, 4), [0, 500, 1000, 1500]);
        assert_eq!(begun(10_000, 3), [0, 10_100, 20_200]);
    }
}
