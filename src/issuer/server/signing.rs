//! X.509-SVIDs by a SPIRE Server: what is asked for is gathered, and signed in batches.
//!
//! Who waits for one comes before what is made ahead, in batches of their own, so that nobody waits for five hundred others.
//! The server signs so many a second for a node and keeps the rest waiting; they are asked for no faster than that. A batch
//! that fails is followed by a smaller one. What nobody waits for any more is not asked for.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, oneshot, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};

use super::{
    calls::{CallFault, Calls},
    error::ServerError,
    faults::{ServerFaults, ServerUse},
    intermediates::Intermediates,
    proto::{
        svid::{NewX509svidParams, batch_new_x509svid_response::Result as Answer},
        types::Status,
    },
    request::{ChainFault, SvidRequest},
};
use crate::{
    identity::{Entry, KeyType, X509Svid},
    issuer::{Lookouts, MintError, SvidKind, World, metrics::IssuerMetrics},
    os::clock::Clock,
    telemetry::chain,
};

/// The most in one batch: a SPIRE Server refuses more.
const MOST_IN_BATCH: usize = 500;
/// The most in one batch of those that are made ahead: a caller that comes meanwhile waits behind it at the server.
const MOST_AHEAD: usize = 200;
/// How many a second are asked for, a little less than a SPIRE Server signs for one node.
const A_SECOND: u32 = 450;
/// How many batches that somebody waits for are under way at once. Of others there is one.
const BATCHES: usize = 4;
/// How many threads make keys or verify chains at once.
const WORKERS: usize = 2;
/// How long the server may take for a batch.
const WITHIN: Duration = Duration::from_secs(10);
/// How long a chain that the bundle does not verify waits for a newer bundle.
const NEWER_BUNDLE_WITHIN: Duration = Duration::from_secs(3);

/// An SVID that is asked for.
#[derive(Debug)]
struct Order {
    entry: Arc<Entry>,
    answer: oneshot::Sender<Result<X509Svid, MintError>>,
    ordered: Instant,
}

/// An SVID that will be there, or why not.
pub(super) type Ordered = oneshot::Receiver<Result<X509Svid, MintError>>;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Somebody waits for it.
    Awaited,
    /// It is made ahead.
    Ahead,
}

#[derive(Debug, Default)]
struct OrderBook {
    awaited: VecDeque<Order>,
    ahead: VecDeque<Order>,
}

/// Has X.509-SVIDs signed.
#[derive(Debug)]
pub(super) struct X509Signing {
    calls: Arc<dyn Calls>,
    clock: Clock,
    metrics: Arc<IssuerMetrics>,
    world: watch::Receiver<Arc<World>>,
    lookouts: Arc<Lookouts>,
    key_type: Mutex<KeyType>,
    book: Mutex<OrderBook>,
    ordered: Notify,
    workers: Arc<Semaphore>,
    /// The most in the next batch.
    limit: Mutex<usize>,
    intermediates: Arc<Intermediates>,
    faults: Arc<ServerFaults>,
}

impl X509Signing {
    pub(super) fn new(
        calls: Arc<dyn Calls>,
        clock: Clock,
        metrics: Arc<IssuerMetrics>,
        world: watch::Receiver<Arc<World>>,
        lookouts: Arc<Lookouts>,
        key_type: KeyType,
        faults: Arc<ServerFaults>,
    ) -> Self {
        Self {
            calls,
            clock,
            metrics,
            world,
            lookouts,
            key_type: Mutex::new(key_type),
            book: Mutex::default(),
            ordered: Notify::new(),
            workers: Arc::new(Semaphore::new(WORKERS)),
            limit: Mutex::new(MOST_IN_BATCH),
            intermediates: Arc::default(),
            faults,
        }
    }

    /// Keys that are made from now on are of this type.
    pub(super) fn set_key_type(&self, key_type: KeyType) {
        *lock(&self.key_type) = key_type;
    }

    /// Orders an SVID for each of `entries`, in their order.
    pub(super) fn order(&self, entries: &[Arc<Entry>], urgency: Urgency) -> Vec<Ordered> {
        let mut book = lock(&self.book);
        let queue = match urgency {
            Urgency::Awaited => &mut book.awaited,
            Urgency::Ahead => &mut book.ahead,
        };
        let mut receivers = Vec::with_capacity(entries.len());
        for entry in entries {
            let (answer, receiver) = oneshot::channel();
            queue.push_back(Order { entry: Arc::clone(entry), answer, ordered: Instant::now() });
            receivers.push(receiver);
        }
        drop(book);
        self.ordered.notify_one();
        receivers
    }

    /// Has signed what is ordered, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let (mut awaited, mut ahead) = (JoinSet::new(), JoinSet::new());
        let mut pace = Pacing::new(Instant::now());
        loop {
            let ordered = self.ordered.notified();
            let Some((urgency, batch)) = self.next_batch(awaited.len() < BATCHES, ahead.is_empty()) else {
                tokio::select! {
                    () = ordered => {}
                    Some(ended) = awaited.join_next() => say_if_early(ended),
                    Some(ended) = ahead.join_next() => say_if_early(ended),
                }
                continue;
            };
            pace.take(batch.len()).await;
            let signing = Arc::clone(&self);
            let running = match urgency {
                Urgency::Awaited => &mut awaited,
                Urgency::Ahead => &mut ahead,
            };
            running.spawn(async move { signing.sign(batch).await });
        }
    }

    fn next_batch(&self, room: bool, room_ahead: bool) -> Option<(Urgency, Vec<Order>)> {
        let limit = *lock(&self.limit);
        let mut book = lock(&self.book);
        let OrderBook { awaited, ahead } = &mut *book;
        for (urgency, queue, room, most) in [
            (Urgency::Awaited, awaited, room, limit),
            (Urgency::Ahead, ahead, room_ahead, limit.min(MOST_AHEAD)),
        ] {
            queue.retain(|order| !order.answer.is_closed());
            if room && !queue.is_empty() {
                let most = most.min(queue.len());
                return Some((urgency, queue.drain(..most).collect()));
            }
        }
        None
    }

    async fn sign(&self, orders: Vec<Order>) {
        let key_type = *lock(&self.key_type);
        let made = self.work(move || {
            let made = orders.into_iter().filter_map(|order| match request(&order, key_type) {
                Ok(request) => Some((order, request)),
                Err(error) => {
                    fail(order, error);
                    None
                }
            });
            made.collect::<Vec<_>>()
        });
        let Some(requested) = made.await else { return };
        let params = requested.iter().map(|(order, request)| NewX509svidParams {
            entry_id: order.entry.id.to_string(),
            csr: request.csr().to_vec(),
        });
        let params: Vec<_> = params.collect();
        let asked = params.len();
        let mut answers = self.calls.sign_x509(params, Instant::now() + WITHIN).await;
        if answers.as_ref().is_ok_and(|answers| answers.len() != asked) {
            answers =
                Err(CallFault::Svid("the number of results differs from the number of x509-svids requested"));
        }
        self.adapt(asked, &answers);
        match &answers {
            Ok(_) => self.faults.works(ServerUse::X509Svids),
            Err(error) => self.faults.failed(ServerUse::X509Svids, chain(error)),
        }
        match answers {
            Ok(answers) => {
                let answered = requested.into_iter().zip(answers).map(|((o, r), answer)| (o, r, answer));
                self.hand_out(answered.collect()).await;
            }
            Err(error) => {
                let error = Arc::new(error);
                for (order, _) in requested {
                    self.metrics.signing_failed(SvidKind::X509);
                    fail(
                        order,
                        MintError::Issuer { retry_after: None, source: Box::new(Arc::clone(&error)) },
                    );
                }
            }
        }
    }

    /// Half of a batch that failed is tried next, twice of one that did not.
    fn adapt<T>(&self, asked: usize, answers: &Result<T, CallFault>) {
        let mut limit = lock(&self.limit);
        *limit = match answers {
            Ok(_) => (*limit * 2).min(MOST_IN_BATCH),
            Err(_) => (asked / 2).clamp(1, *limit),
        };
    }

    async fn hand_out(&self, answered: Vec<Answered>) {
        let mut left = self.check(answered, LastTry::No).await;
        if left.is_empty() {
            return;
        }
        // An authority that is newer than the bundle: the server tells of it when it is asked.
        let lookout = self.lookouts.wait();
        drop(timeout(NEWER_BUNDLE_WITHIN, lookout.looked()).await);
        left = self.check(left, LastTry::Yes).await;
        debug_assert!(left.is_empty(), "all were answered");
    }

    /// Hands out what is as it should be, and says of the rest why not. Gives back what a newer bundle may verify.
    async fn check(&self, answered: Vec<Answered>, last: LastTry) -> Vec<Answered> {
        let bundle = Arc::clone(&self.world.borrow().bundles.own);
        let now = self.clock.now();
        let (metrics, intermediates) = (Arc::clone(&self.metrics), Arc::clone(&self.intermediates));
        let checked = self.work(move || {
            let mut left = Vec::new();
            for (order, request, answer) in answered {
                let made = match chain_of(&answer) {
                    Ok(chain) => match request.answered(chain, &bundle, &intermediates, now) {
                        Err(ChainFault::Untrusted(_)) if last == LastTry::No => {
                            left.push((order, request, answer));
                            continue;
                        }
                        Err(fault) => Err(of_no_use(Box::new(fault))),
                        Ok(Err(fault)) => Err(of_no_use(Box::new(fault))),
                        Ok(Ok(svid)) => Ok(svid),
                    },
                    Err(error) => Err(error),
                };
                match &made {
                    Ok(_) => metrics.signed(SvidKind::X509, order.ordered.elapsed()),
                    Err(_) => metrics.signing_failed(SvidKind::X509),
                }
                // Nobody may wait for it any more.
                drop(order.answer.send(made));
            }
            left
        });
        checked.await.unwrap_or_default()
    }

    /// Does what takes long on a thread of its own.
    async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        // It is never closed.
        let permit = Arc::clone(&self.workers).acquire_owned().await;
        let working = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        match working.await {
            Ok(done) => Some(done),
            Err(panic) => {
                tracing::error!(%panic, "work on x509-svids ended early");
                None
            }
        }
    }
}

type Answered = (Order, SvidRequest, Answer);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastTry {
    No,
    Yes,
}

fn say_if_early(ended: Result<(), JoinError>) {
    if let Err(panic) = ended {
        tracing::error!(%panic, "the signing of a batch of x509-svids ended early");
    }
}

fn request(order: &Order, key_type: KeyType) -> Result<SvidRequest, MintError> {
    SvidRequest::new(&order.entry.spiffe_id, key_type).map_err(|fault| of_no_use(Box::new(fault)))
}

/// The chain, or what the server says of this one entry.
fn chain_of(answer: &Answer) -> Result<&[Vec<u8>], MintError> {
    let Status { code, message } = answer.status.clone().unwrap_or_default();
    if code != 0 {
        let status = tonic::Status::new(tonic::Code::from_i32(code), message);
        let error = ServerError::of("BatchNewX509SVID", &status);
        return Err(of_no_use(Box::new(error)));
    }
    let svid = answer.svid.as_ref();
    svid.map(|svid| svid.cert_chain.as_slice())
        .ok_or_else(|| of_no_use(Box::new(CallFault::Svid("a result has no x509-svid"))))
}

fn of_no_use(source: Box<dyn std::error::Error + Send + Sync>) -> MintError {
    MintError::Entry { retry_after: None, source }
}

fn fail(order: Order, error: MintError) {
    // Nobody may wait for it any more.
    drop(order.answer.send(Err(error)));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what is asked for below [`A_SECOND`], in bursts of as many.
#[derive(Debug)]
struct Pacing {
    /// When all that was taken is made up for.
    even: Instant,
}

impl Pacing {
    fn new(now: Instant) -> Self {
        Self { even: now }
    }

    /// Waits until `count` may be asked for.
    async fn take(&mut self, count: usize) {
        let burst = Duration::from_secs(1);
        let costs = burst / A_SECOND * u32::try_from(count).unwrap_or(A_SECOND);
        self.even = self.even.max(Instant::now()) + costs;
        if let Some(from) = self.even.checked_sub(burst.max(costs)) {
            sleep_until(from).await;
        }
    }
}
