//! The labels of namespaces, from the API server, shared by all callers.
//!
//! One thread asks, and only for what somebody waits for: one request at a time, none sooner than [`PAUSE`] after the last,
//! or [`PAUSE_AFTER_FAULT`].
//! What it says of a namespace is good for [`FRESH`]. A namespace's name comes from the kubelet's list, so that who makes
//! namespaces makes pods run here first; all the same what is kept and asked for is bounded.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    num::NonZeroU32,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::{Duration, Instant as StdInstant},
};

use serde::{Deserialize, de::Error as _};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
    time::{Instant, timeout},
};

use super::{
    client::{KubernetesClient, KubernetesPlace},
    fault::KubernetesFault,
    pods::{Excess, PodExcess, RawLabels, ShortText},
};
use crate::{
    limits::{AttestationSlot, Attestations, Slots},
    telemetry::chain,
};

/// How long labels are good for callers that come after they were asked for.
pub(super) const FRESH: Duration = Duration::from_secs(10);
/// The time between the end of a request and the next.
const PAUSE: Duration = Duration::from_millis(50);
/// The same where it failed: whoever waits has it made again.
const PAUSE_AFTER_FAULT: Duration = Duration::from_millis(250);
/// Namespaces that are asked for at once. Who finds no place among them finds one in the next round.
const MOST_WANTED: usize = 256;
/// Namespaces that are known at once, and what is kept of them, in bytes. Beyond that all are forgotten.
const MOST_KNOWN: usize = 2048;
const MOST_KEPT: usize = 4 * 1024 * 1024;
/// Callers that wait at once, and how many of one pod.
const WAITERS: Option<NonZeroU32> = NonZeroU32::new(1024);
const WAITERS_OF_POD: Option<NonZeroU32> = NonZeroU32::new(64);
/// Stack of the thread, in bytes.
const STACK: usize = 1024 * 1024;
/// The time between two lines about the same trouble.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// A namespace, as far as selectors are made of it.
#[derive(Debug)]
pub(super) struct ListedNamespace {
    pub(super) labels: Box<[(Box<str>, Box<str>)]>,
    /// What is larger than it may be: nothing can be told of it then.
    pub(super) excess: Option<PodExcess>,
}

#[derive(Deserialize)]
struct RawNamespace {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: RawNamespaceMetadata,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawNamespaceMetadata {
    name: ShortText,
    labels: RawLabels,
}

impl ListedNamespace {
    /// Reads the namespace of this name as it comes.
    fn read(reader: impl io::Read, name: &str) -> Result<Self, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_reader(reader);
        let RawNamespace { kind, metadata } = RawNamespace::deserialize(&mut json)?;
        json.end()?;
        let mut excess = Excess::default();
        if kind != "Namespace" || *excess.text(metadata.name) != *name {
            return Err(serde_json::Error::custom("it is not the Namespace that was asked for"));
        }
        let labels = excess.labels(metadata.labels);
        Ok(Self { labels, excess: excess.0 })
    }

    /// Its size in memory, in bytes.
    fn size(&self) -> usize {
        let texts: usize = self.labels.iter().map(|(key, value)| key.len() + value.len()).sum();
        size_of::<Self>() + size_of_val(&*self.labels) + texts
    }
}

/// What the API server said of one namespace.
#[derive(Clone)]
struct KnownNamespace {
    said: Result<Arc<ListedNamespace>, Arc<KubernetesFault>>,
    /// When it was asked.
    asked: Instant,
}

/// Why the labels of a namespace are not known.
#[derive(Clone, Debug)]
pub(super) enum NoLabels {
    /// Too many wait already.
    Crowded,
    /// The API server could not be asked.
    ApiServer(Arc<KubernetesFault>),
    /// It did not answer.
    Silent,
}

/// What is known of namespaces, and the thread that asks. The thread ends when this is dropped, as soon as it has asked.
pub(super) struct NamespaceView {
    asking: Arc<AskingApiServer>,
    waiters: Arc<Slots>,
    started: Once,
}

struct AskingApiServer {
    wishes: Mutex<NamespaceWishes>,
    called: Condvar,
    /// Counts what was said.
    rounds: watch::Sender<u64>,
}

#[derive(Default)]
struct NamespaceWishes {
    place: Option<Arc<KubernetesPlace>>,
    /// Each once; the first is asked for next.
    wanted: VecDeque<Arc<str>>,
    known: BTreeMap<Arc<str>, KnownNamespace>,
    /// What all that is known takes, in bytes.
    kept: usize,
    over: bool,
}

impl Default for NamespaceView {
    fn default() -> Self {
        let waiters = Attestations::new(WAITERS, WAITERS_OF_POD).unwrap_or_default();
        let asking = AskingApiServer {
            wishes: Mutex::default(),
            called: Condvar::new(),
            rounds: watch::Sender::new(0),
        };
        Self { asking: Arc::new(asking), waiters: Arc::new(Slots::new(waiters)), started: Once::new() }
    }
}

impl NamespaceView {
    /// Asks this API server from the next request on.
    pub(super) fn begin(&self, place: KubernetesPlace) {
        let place = Arc::new(place);
        let mut wishes = self.asking.lock();
        if wishes.place.as_ref() != Some(&place) {
            // What another one said is of no use.
            wishes.forget();
            wishes.place = Some(place);
        }
        drop(wishes);
        self.started.call_once(|| {
            let asking = Arc::clone(&self.asking);
            let thread = thread::Builder::new().name("api-server".to_owned()).stack_size(STACK);
            if let Err(error) = thread.spawn(move || asking.run()) {
                tracing::error!(%error, "the thread that asks the API server could not be started");
            }
        });
    }

    /// What it keeps, in bytes.
    pub(super) fn kept(&self) -> usize {
        self.asking.lock().kept
    }

    /// The namespace of this name, if what is known of it is fresh, or as soon as it is within `patience`. `share` says whose
    /// places it takes, and `aside` is called before it waits.
    ///
    /// # Errors
    /// [`NoLabels`].
    pub(super) async fn find(
        &self,
        name: &str,
        share: u64,
        patience: Duration,
        aside: impl FnOnce(),
    ) -> Result<Arc<ListedNamespace>, NoLabels> {
        let began = Instant::now();
        if let Some(KnownNamespace { said: Ok(found), .. }) = self.asking.lock().fresh(name, began) {
            return Ok(found);
        }
        let _place: AttestationSlot = self.waiters.take(share).map_err(|_full| NoLabels::Crowded)?;
        aside();
        let mut rounds = self.asking.rounds.subscribe();
        let mut last = NoLabels::Silent;
        let wait = async {
            loop {
                // First, so that what is said after the look wakes this.
                rounds.mark_unchanged();
                match self.asking.look(name, began) {
                    Some(Ok(found)) => return Ok(found),
                    // One that was under way may be about something that was put right since; `look` left it out.
                    Some(Err(fault)) if !fault.passes() => return Err(NoLabels::ApiServer(fault)),
                    Some(Err(fault)) => last = NoLabels::ApiServer(fault),
                    None => {}
                }
                if rounds.changed().await.is_err() {
                    return Err(NoLabels::Silent);
                }
            }
        };
        match timeout(patience, wait).await {
            Ok(ended) => ended,
            Err(_elapsed) => Err(last),
        }
    }
}

impl Drop for NamespaceView {
    fn drop(&mut self) {
        self.asking.lock().over = true;
        self.asking.called.notify_all();
    }
}

impl NamespaceWishes {
    fn forget(&mut self) {
        self.known.clear();
        self.kept = 0;
    }

    /// What is known of a namespace, good for whoever began then.
    fn fresh(&self, name: &str, began: Instant) -> Option<KnownNamespace> {
        self.known.get(name).filter(|it| began.saturating_duration_since(it.asked) < FRESH).cloned()
    }

    fn learn(&mut self, name: Arc<str>, known: KnownNamespace) {
        let now = known.asked;
        let size = known.said.as_ref().map_or(0, |found| found.size()) + name.len();
        // Those that nobody could use any more go first.
        self.known.retain(|_, it| now.saturating_duration_since(it.asked) < FRESH);
        self.known.remove(&name);
        let sizes =
            self.known.iter().map(|(name, it)| it.said.as_ref().map_or(0, |it| it.size()) + name.len());
        self.kept = sizes.sum::<usize>() + size;
        if self.known.len() >= MOST_KNOWN || self.kept > MOST_KEPT {
            self.forget();
            self.kept = size;
        }
        self.known.insert(name, known);
    }
}

impl AskingApiServer {
    fn lock(&self) -> MutexGuard<'_, NamespaceWishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a namespace, for whoever waits since `began`; where that is not all, it is asked for.
    fn look(&self, name: &str, began: Instant) -> Option<Result<Arc<ListedNamespace>, Arc<KubernetesFault>>> {
        let mut wishes = self.lock();
        let known = wishes.fresh(name, began).filter(|it| it.said.is_ok() || it.asked >= began);
        let settled = match &known {
            Some(KnownNamespace { said: Err(fault), .. }) => !fault.passes(),
            Some(_) => true,
            None => false,
        };
        if !settled && wishes.wanted.len() < MOST_WANTED && !wishes.wanted.iter().any(|it| **it == *name) {
            wishes.wanted.push_back(Arc::from(name));
            self.called.notify_one();
        }
        known.map(|it| it.said)
    }

    /// Asks for whatever is wanted, until all is over.
    fn run(&self) {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| tracing::error!(%error, "the API server cannot be asked")).ok();
        let mut client: Option<(Arc<KubernetesPlace>, KubernetesClient)> = None;
        let mut trouble: Option<(StdInstant, String)> = None;
        let mut next_at = None;
        while let Some((place, name)) = self.next(next_at) {
            let known = client.take().filter(|(known, _)| Arc::ptr_eq(known, &place));
            let (_, asked_of) = client.insert(
                known.unwrap_or_else(|| (Arc::clone(&place), KubernetesClient::new((*place).clone()))),
            );
            let asked = Instant::now();
            let said = match &runtime {
                Some(runtime) => get(asked_of, runtime, &name),
                None => Err(KubernetesFault::Internal("it has no runtime")),
            };
            let pause = if said.is_ok() { PAUSE } else { PAUSE_AFTER_FAULT };
            next_at = Some(StdInstant::now() + pause);
            note(&mut trouble, said.as_ref().err());
            let mut wishes = self.lock();
            // Another one may be asked by now.
            if wishes.place.as_ref().is_some_and(|now| Arc::ptr_eq(now, &place)) {
                let said = said.map(Arc::new).map_err(Arc::new);
                wishes.learn(name, KnownNamespace { said, asked });
            }
            drop(wishes);
            self.rounds.send_modify(|rounds| *rounds = rounds.wrapping_add(1));
        }
    }

    /// Waits until something is wanted and may be asked for, at `at` or later. `None` when all is over.
    fn next(&self, at: Option<StdInstant>) -> Option<(Arc<KubernetesPlace>, Arc<str>)> {
        let mut wishes = self.lock();
        loop {
            if wishes.over {
                return None;
            }
            let pause = at.map_or(Duration::ZERO, |at| at.saturating_duration_since(StdInstant::now()));
            let wait = match wishes.place.clone() {
                Some(place) if pause.is_zero() => match wishes.wanted.pop_front() {
                    Some(name) => return Some((place, name)),
                    None => FRESH,
                },
                Some(_) => pause,
                None => FRESH,
            };
            let (guard, waited) =
                self.called.wait_timeout(wishes, wait).unwrap_or_else(PoisonError::into_inner);
            wishes = guard;
            if wait == FRESH && waited.timed_out() {
                // Nobody could use it any more.
                wishes.forget();
            }
        }
    }
}

fn get(
    client: &mut KubernetesClient,
    runtime: &Runtime,
    name: &str,
) -> Result<ListedNamespace, KubernetesFault> {
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !is_name {
        return Err(KubernetesFault::Internal("the pod's namespace has no name that Kubernetes allows"));
    }
    let path = format!("/api/v1/namespaces/{name}");
    let get = || client.get(runtime, &path, |body| ListedNamespace::read(body, name));
    catch_unwind(AssertUnwindSafe(get))
        .unwrap_or(Err(KubernetesFault::Internal("a mistake of its own, see the log")))
}

/// Says in the log that the API server does not answer, and not again each time.
fn note(said: &mut Option<(StdInstant, String)>, fault: Option<&KubernetesFault>) {
    let Some(fault) = fault else {
        if said.take().is_some() {
            tracing::info!("the API server says again which labels namespaces have");
        }
        return;
    };
    let (error, now) = (chain(fault), StdInstant::now());
    let known =
        said.as_ref().is_some_and(|(at, text)| *text == error && now.duration_since(*at) < SAID_EVERY);
    if !known {
        tracing::warn!(error, "the API server does not say which labels a namespace has");
        *said = Some((now, error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(bytes: usize, asked: Instant) -> KnownNamespace {
        let labels = [("".into(), "x".repeat(bytes).into())].into();
        KnownNamespace { said: Ok(Arc::new(ListedNamespace { labels, excess: None })), asked }
    }

    #[test]
    fn a_namespace_is_read_if_it_is_the_one_that_was_asked_for() {
        let read = |text: &str| ListedNamespace::read(text.as_bytes(), "shop");
        let labels = |text| read(text).map(|it| it.labels.into_vec()).map_err(|error| error.to_string());
        let team: Vec<(Box<str>, Box<str>)> = vec![("team".into(), "blue".into())];
        for (case, text, want) in [
            (
                "labels",
                r#"{"kind":"Namespace","metadata":{"name":"shop","labels":{"team":"blue"}}}"#,
                Ok(team),
            ),
            ("no labels", r#"{"kind":"Namespace","metadata":{"name":"shop"}}"#, Ok(vec![])),
            ("null", r#"{"kind":"Namespace","metadata":{"name":"shop","labels":null}}"#, Ok(vec![])),
            ("another", r#"{"kind":"Namespace","metadata":{"name":"bank"}}"#, Err("it is not the Namespace")),
            (
                "another kind",
                r#"{"kind":"Status","metadata":{"name":"shop"}}"#,
                Err("it is not the Namespace"),
            ),
            ("a list", r#"[]"#, Err("it is not the Namespace")),
            ("cut", r#"{"kind":"Namesp"#, Err("EOF")),
        ] {
            match (labels(text), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{case}"),
                (Err(got), Err(want)) => assert!(got.contains(want), "{case}: {got}"),
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }
        let huge = format!(
            r#"{{"kind":"Namespace","metadata":{{"name":"shop","labels":{{"a":"{}"}}}}}}"#,
            "x".repeat(2000)
        );
        assert_eq!(read(&huge).unwrap().excess, Some(PodExcess::Text));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_is_bounded_and_grows_old() {
        let mut wishes = NamespaceWishes::default();
        for n in 0..5000 {
            wishes.learn(n.to_string().into(), known(10, Instant::now()));
            assert!(wishes.known.len() <= MOST_KNOWN, "{n}");
        }
        for n in 0..100 {
            wishes.learn(n.to_string().into(), known(100 * 1024, Instant::now()));
            assert!(wishes.kept <= MOST_KEPT, "{n}: {}", wishes.kept);
        }
        assert!(wishes.fresh("99", Instant::now()).is_some());
        tokio::time::advance(FRESH).await;
        assert!(wishes.fresh("99", Instant::now()).is_none());
        wishes.learn("later".into(), known(10, Instant::now()));
        assert_eq!(wishes.known.len(), 1, "what is old is forgotten");
    }
}
