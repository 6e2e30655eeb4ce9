//! A stream of whole states: the first at once, a further one when, and only when, what would be sent has changed.
//!
//! Who called is not who is sent the next state: a process becomes another user, drops groups, executes another program.
//! So it is attested again right before, and where that cannot be done nothing is sent. What a stream keeps meanwhile is
//! what it sent, its entries, and some hundred bytes.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use futures_util::stream;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until},
};
use tonic::{Code, Status};

use super::{encoded::Encoded, journal::OpenCall, status::RequestError};
use crate::{
    attest::Blame,
    store::{Change, audited::AuditedProcess},
};

/// The response stream of a Workload API call.
pub type Updates = Pin<Box<dyn tokio_stream::Stream<Item = Result<Encoded, Status>> + Send>>;

/// How long after a fault of the issuer the state is asked for again, if nothing changes before.
const RETRY: Duration = Duration::from_secs(5);

/// How long after a process could not be attested it is looked at again; twice as long after each further failure.
const ATTEST_RETRY: Duration = Duration::from_secs(1);

/// The longest time between two such looks.
const MAX_ATTEST_RETRY: Duration = Duration::from_secs(60);

/// How many streams make an update at the same time.
const AT_ONCE: usize = 16;

/// What a stream sends now.
pub(super) trait Update: Send + 'static {
    /// The message for the newest snapshot if the process is what it was when it was last attested: to see whether
    /// there is anything to send, and never to be sent. `None` where that cannot be told without attesting it, or
    /// without making something.
    fn expected(&self) -> Option<Encoded>;

    /// The process that called, for the log.
    fn connected(&self) -> AuditedProcess;

    /// The message for what the process is now, which is attested first, in the newest snapshot.
    fn now(&mut self) -> impl Future<Output = Result<Encoded, RequestError>> + Send;

    /// A message is about to be sent.
    fn is_sent(&self, _message: &Encoded) {}

    /// Whether the process is still there, and of the user and group that connected: asked right before a message is
    /// sent, as making it may have taken a while.
    fn is_alive(&self) -> Result<(), RequestError>;

    /// Whether the connection that it is on has to end. The stream is polled when this changes.
    fn is_sent_away(&self) -> bool;
}

/// Where streams wait to make an update, first come first served.
///
/// Ten thousand of them learn of a change at the same moment. Each takes some tens of microseconds, and calls are
/// answered in between. A stream that waits here is polled when its turn comes, though its peer may have no room for
/// more: hyper asks a body for its next part first, and for room when it has one.
#[derive(Debug)]
pub(super) struct UpdateQueue(Semaphore);

impl Default for UpdateQueue {
    fn default() -> Self {
        Self(Semaphore::new(AT_ONCE))
    }
}

impl UpdateQueue {
    /// Runs what `work` begins when it is its turn. The turn ends as soon as it has to wait for something else: who
    /// takes long (a key, a digest) keeps nobody from theirs.
    async fn run<F: Future + Unpin>(&self, work: impl FnOnce() -> F) -> F::Output {
        // It is never closed.
        let mut turn = self.0.acquire().await.ok();
        let mut work = pin!(work());
        poll_fn(|cx| {
            let polled = work.as_mut().poll(cx);
            turn = None;
            polled
        })
        .await
    }
}

struct Stream<S: Update> {
    state: S,
    open: OpenCall,
    queue: Arc<UpdateQueue>,
    changes: watch::Receiver<Change>,
    sent: Encoded,
    /// What to send next, when that is known already.
    first: bool,
    code: Code,
}

impl<S: Update> Drop for Stream<S> {
    fn drop(&mut self) {
        // A defect ends it for its client as an error of the agent's.
        let code = if std::thread::panicking() { Code::Internal } else { self.code };
        self.open.ended(code);
    }
}

/// Sends `first`, then follows `changes`, which must have been subscribed before `first` was made.
///
/// Before anything more is sent, the process is attested again: what it was when it called, it need not be any more.
///
/// A fault on our side does not end the stream: what was sent stays valid, and it is tried again after a while. A
/// refusal does: the caller has no identity any more, or is no more who called.
pub(super) fn updates<S: Update>(
    state: S,
    open: OpenCall,
    mut changes: watch::Receiver<Change>,
    first: Encoded,
    queue: Arc<UpdateQueue>,
) -> Updates {
    // A stream that was opened while the agent drains ends after its first message, as the others did.
    if *changes.borrow() == Change::Draining {
        changes.mark_changed();
    }
    let stream = Stream { state, open, queue, changes, sent: first, first: true, code: Code::Ok };
    Box::pin(stream::unfold(Some(stream), |stream| async {
        let mut stream = stream?;
        match stream.next().await {
            Ok(message) => Some((Ok(message), Some(stream))),
            Err(error) => {
                stream.code = error.code();
                Some((Err(error.into()), None))
            }
        }
    }))
}

/// A stream that could not be sent what it should be.
#[derive(Clone, Copy)]
struct Behind {
    again_at: Instant,
    wait: Duration,
    /// It is tried again at the next change too. A process that cannot be attested is not: there may be several
    /// changes a second, and its caller chose how many streams it has.
    follows_changes: bool,
}

impl Behind {
    /// When to try again, after what went before; `None` where that is of no use.
    fn after(error: &RequestError, before: Option<Self>) -> Option<Self> {
        let (wait, follows_changes) = match error {
            RequestError::X509Svid(_) | RequestError::Crowded | RequestError::NoMemory => (RETRY, true),
            RequestError::Attestation(cause) if cause.blame() != Blame::Refusal => {
                let before = before.filter(|before| !before.follows_changes);
                let wait = before.map_or(ATTEST_RETRY, |before| (before.wait * 2).min(MAX_ATTEST_RETRY));
                (wait, false)
            }
            _ => return None,
        };
        Some(Self { again_at: Instant::now() + wait, wait, follows_changes })
    }

    fn waits(&self) -> bool {
        !self.follows_changes && Instant::now() < self.again_at
    }
}

impl<S: Update> Stream<S> {
    async fn next(&mut self) -> Result<Encoded, RequestError> {
        if std::mem::take(&mut self.first) {
            self.state.is_sent(&self.sent);
            return Ok(self.sent.clone());
        }
        let mut behind: Option<Behind> = None;
        loop {
            let again_at = behind.map(|behind| behind.again_at);
            let changed = tokio::select! {
                changed = self.changes.changed() => changed,
                () = sleep_until(again_at.unwrap_or_else(Instant::now)), if again_at.is_some() => Ok(()),
                () = sent_away(&mut self.state) => return Err(RequestError::SentAway),
            };
            // The sender lives as long as the store, and the store as long as this state.
            if changed.is_err() || *self.changes.borrow_and_update() == Change::Draining {
                return Err(RequestError::Draining);
            }
            if behind.is_some_and(|behind| behind.waits()) {
                continue;
            }
            match self.update().await {
                Ok(None) => behind = None,
                Ok(Some(message)) => {
                    self.state.is_sent(&message);
                    self.sent = message.clone();
                    return Ok(message);
                }
                Err(error) => {
                    let Some(next) = Behind::after(&error, behind) else {
                        self.open.is_refused(self.state.connected(), &error);
                        return Err(error);
                    };
                    if behind.replace(next).is_none() {
                        self.open.is_behind(self.state.connected(), &error);
                    }
                }
            }
        }
    }

    /// What to send, if it is something else than what was sent. The future that makes it is boxed while it runs: an
    /// open stream would hold the room for it all the time.
    async fn update(&mut self) -> Result<Option<Encoded>, RequestError> {
        let Self { state, queue, sent, .. } = self;
        // Every renewal of any SVID wakes every stream: a process is only looked at if there is something for it.
        if state.expected().is_some_and(|message| message == *sent) {
            return Ok(None);
        }
        let message = queue.run(|| Box::pin(state.now())).await?;
        if message == *sent {
            return Ok(None);
        }
        state.is_alive()?;
        Ok(Some(message))
    }
}

async fn sent_away(state: &mut impl Update) {
    poll_fn(move |_| if state.is_sent_away() { Poll::Ready(()) } else { Poll::Pending }).await;
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
    };

    use bytes::Bytes;
    use futures_util::FutureExt as _;
    use nix::unistd::{Gid, Pid, Uid};
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::{
        api::{call::Opening, journal::Journal},
        attest::AttestError,
        issuer::MintError,
        limits::{CallerKey, Method},
        store::NoIdentity,
        telemetry::{LogSettings, log::Log, metrics::Metrics},
    };

    /// What one look at the state finds.
    #[derive(Clone, Copy, Debug)]
    enum Found {
        /// What was sent, and so the process is not looked at.
        Same,
        /// Something else, which the process may have.
        Text(&'static str),
        /// Something else, and when it is made the process has ended.
        TooLate,
        /// Other entries, of which the process has the same as before.
        SameInTheEnd,
        NoKey,
        NotAttested(fn() -> AttestError),
        NoIdentity,
    }

    /// Finds one after the other, and is not looked at more often than the test says.
    struct Scripted {
        finds: Arc<Mutex<VecDeque<Found>>>,
        sent: &'static str,
        ended: bool,
        sent_away: Arc<AtomicBool>,
    }

    fn encoded(text: &'static str) -> Encoded {
        Bytes::from_static(text.as_bytes()).into()
    }

    impl Update for Scripted {
        fn connected(&self) -> AuditedProcess {
            AuditedProcess { caller: CallerKey::Uid(1), uid: 1, gid: 1, pid: 7 }
        }

        fn expected(&self) -> Option<Encoded> {
            let mut finds = self.finds.lock().unwrap();
            match finds.front().expect("another look") {
                Found::Same => {
                    finds.pop_front();
                    Some(encoded(self.sent))
                }
                Found::SameInTheEnd => None,
                _ => Some(encoded("not attested for this")),
            }
        }

        async fn now(&mut self) -> Result<Encoded, RequestError> {
            // As an attestation that waits.
            tokio::task::yield_now().await;
            match self.finds.lock().unwrap().pop_front().unwrap() {
                Found::Text(text) => self.sent = text,
                Found::TooLate => (self.sent, self.ended) = ("for somebody else", true),
                Found::Same | Found::SameInTheEnd => {}
                Found::NoKey => return Err(RequestError::X509Svid(MintError::Late)),
                Found::NotAttested(why) => return Err(why().into()),
                Found::NoIdentity => return Err(NoIdentity.into()),
            }
            Ok(encoded(self.sent))
        }

        fn is_alive(&self) -> Result<(), RequestError> {
            if self.ended { Err(AttestError::Gone.into()) } else { Ok(()) }
        }

        fn is_sent_away(&self) -> bool {
            self.sent_away.load(Relaxed)
        }
    }

    /// A stream that was sent its first message, and what it finds from now on.
    struct Opened {
        sender: watch::Sender<Change>,
        stream: Updates,
        finds: Arc<Mutex<VecDeque<Found>>>,
        generation: u64,
        sent_away: Arc<AtomicBool>,
    }

    impl Opened {
        async fn new(queue: &Arc<UpdateQueue>) -> Self {
            let (sender, changes) = watch::channel(Change::Generation(1));
            let (finds, sent_away) = (Arc::default(), Arc::<AtomicBool>::default());
            let state = Scripted {
                finds: Arc::clone(&finds),
                sent: "first",
                ended: false,
                sent_away: Arc::clone(&sent_away),
            };
            let journal = Arc::new(Journal::new(Metrics::default().registry(), Arc::default()));
            let open = journal.opened(Opening { method: Method::FetchX509Svid, ends: None });
            let mut stream = updates(state, open, changes, encoded("first"), Arc::clone(queue));
            assert_eq!(stream.next().await.unwrap().unwrap(), encoded("first"));
            Self { sender, stream, finds, generation: 1, sent_away }
        }

        fn change(&mut self) {
            self.generation += 1;
            self.sender.send_replace(Change::Generation(self.generation));
        }

        /// What it sends within so long: a text, the code it ends with, or nothing.
        async fn within(&mut self, time: Duration) -> Option<Result<Encoded, Code>> {
            let next = tokio::time::timeout(time, self.stream.next()).await.ok()?;
            Some(next.unwrap().map_err(|status| status.code()))
        }

        /// Each is found, and nothing is left to find.
        async fn find(&mut self, found: &[Found], time: Duration) -> Option<Result<Encoded, Code>> {
            self.finds.lock().unwrap().extend(found);
            self.change();
            let sent = self.within(time).await;
            assert_eq!(self.finds.lock().unwrap().len(), 0, "all was looked at");
            sent
        }
    }

    fn busy() -> AttestError {
        AttestError::Crowded
    }

    fn unknown() -> AttestError {
        AttestError::Unknown { source: std::io::ErrorKind::Other.into() }
    }

    fn changed() -> AttestError {
        AttestError::IdentityChanged { pid: Pid::from_raw(7), uid: Uid::from_raw(1), gid: Gid::from_raw(1) }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_change_brings() {
        use Found::*;
        const ENDS: Option<Result<Encoded, Code>> = Some(Err(Code::Unavailable));
        let text = |text| Some(Ok(encoded(text)));
        let wait = 10 * MAX_ATTEST_RETRY;
        for (case, finds, sent) in [
            ("nothing", &[Same][..], None),
            ("something", &[Text("second")], text("second")),
            ("other entries, but none for it", &[SameInTheEnd], None),
            ("no key, tried again", &[NoKey, NoKey, Text("second")], text("second")),
            ("no key, and then nothing new", &[NoKey, Same], None),
            ("busy, tried again", &[NotAttested(busy), NotAttested(busy), Text("second")], text("second")),
            ("the kernel does not say, tried again", &[NotAttested(unknown), Text("second")], text("second")),
            ("busy, and then nothing new", &[NotAttested(busy), SameInTheEnd], None),
            ("another user", &[NotAttested(changed)], ENDS),
            ("busy, then another user", &[NotAttested(busy), NotAttested(changed)], ENDS),
            ("it ended", &[NotAttested(|| AttestError::Gone)], ENDS),
            ("it ended while the message was made", &[TooLate], ENDS),
            ("no identity any more", &[NoIdentity], Some(Err(Code::PermissionDenied))),
        ] {
            let mut opened = Opened::new(&Arc::default()).await;
            assert_eq!(opened.find(finds, wait).await, sent, "{case}");
            match sent {
                Some(Err(_)) => assert!(opened.stream.next().await.is_none(), "{case}"),
                _ => assert_eq!(opened.find(&[Text("third")], wait).await, text("third"), "{case}: lives on"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_caller_and_the_log_are_told_that_it_must_connect_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.log");
        let settings = LogSettings { file: Some(file.clone()), ..LogSettings::default() };
        let (subscriber, log) = Log::build(&settings).unwrap();
        let _guard = tracing::subscriber::set_default(subscriber);
        let mut opened = Opened::new(&Arc::default()).await;
        opened.finds.lock().unwrap().push_back(Found::NotAttested(changed));
        opened.change();
        let status = opened.stream.next().await.unwrap().unwrap_err();
        assert!(status.message().contains("it must connect again"), "{status}");
        assert!(log.flush(Duration::from_secs(60)));
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains("process 7 changed its user or group after it connected as 1:1"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_cannot_be_attested_is_looked_at_ever_less_often() {
        let mut opened = Opened::new(&Arc::default()).await;
        assert_eq!(opened.find(&[Found::NotAttested(busy)], Duration::from_millis(1)).await, None);
        let mut wait = ATTEST_RETRY;
        for _ in 0..8 {
            // However often something changes.
            for _ in 0..5 {
                opened.change();
                assert_eq!(opened.within(wait / 6).await, None);
            }
            assert_eq!(opened.find(&[Found::NotAttested(busy)], wait / 5).await, None);
            wait = (wait * 2).min(MAX_ATTEST_RETRY);
        }
        opened.sender.send_replace(Change::Draining);
        assert_eq!(opened.within(Duration::ZERO).await, Some(Err(Code::Unavailable)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_a_stream() {
        let mut opened = Opened::new(&Arc::default()).await;
        opened.sender.send_replace(Change::Draining);
        assert_eq!(opened.within(Duration::ZERO).await, Some(Err(Code::Unavailable)));
        assert!(opened.stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_connection_has_to_end_says_so() {
        let mut opened = Opened::new(&Arc::default()).await;
        assert_eq!(opened.within(RETRY).await, None);
        opened.sent_away.store(true, Relaxed);
        let status = opened.stream.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().ends_with("connect again"), "{status}");
        assert!(opened.stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_few_run_at_once_and_who_waits_keeps_nobody_from_their_turn() {
        let queue = Arc::new(UpdateQueue::default());
        let mut waiting: Vec<_> = (0..2 * AT_ONCE)
            .map(|_| Box::pin(queue.run(|| Box::pin(std::future::pending::<()>()))))
            .collect();
        for work in &mut waiting {
            assert!(work.now_or_never().is_none());
        }
        assert_eq!(queue.run(|| Box::pin(async { 7 })).now_or_never(), Some(7));

        // Within their turns: as many as may, and the next when one of them is done.
        let turns: Vec<_> = (0..AT_ONCE).map(|_| queue.0.try_acquire().unwrap()).collect();
        let mut next = pin!(queue.run(|| Box::pin(async { 7 })));
        assert!(next.as_mut().now_or_never().is_none());
        drop(turns);
        assert_eq!(next.await, 7);
    }

    #[tokio::test]
    async fn an_open_stream_has_no_room_for_its_updates() {
        let mut opened = Opened::new(&Arc::default()).await;
        let stream = &*opened.stream;
        let size = size_of_val(stream);
        assert!(size <= 736, "{size} bytes for each open stream");
        opened.sender.send_replace(Change::Draining);
        opened.stream.next().await.unwrap().unwrap_err();
    }
}
