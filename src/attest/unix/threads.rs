//! Threads for what a caller's file can make wait.
//!
//! Whatever asks about an executable runs here and never on a thread of the runtime. There are [`THREADS`] and [`READERS`] of
//! them from the start; none is added. A task is done in steps, and whoever waits for it is told no later than at its deadline,
//! whatever the file system does. A step that takes longer than [`STUCK`] hangs: nothing can end it, so it holds its
//! thread, but no longer counts among those that run, and how many may hang is bounded by family and by file system.
//! So those whose file system is away wait for themselves, and the rest go on.
//!
//! Places are shared as attestations are ([`Slots`]): whoever has few is not refused for who has many. Families take
//! turns; of one family's tasks the smallest is next, so that a huge file delays nobody else's and no small one.
//!
//! A family that spent its part of the processor waits ([`SpentTime`]). Threads that read files have a low priority, so that
//! they take it from nobody who serves; the others have not, since what they do is short and on the way of calls: on a busy node
//! these would wait for it a second. A thread that serves must never wait for one of low priority: it leaves its tasks in
//! the [`Inbox`], which is locked for a moment only, and not while somebody looks for what is next.
//!
//! Time is the machine's, not the runtime's: what is waited for here are threads.

use std::{
    future::poll_fn,
    num::NonZeroU32,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError},
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use super::spent::SpentTime;
use crate::{
    limits::{AttestationSlot, Attestations, Slots, processor::ProcessorShare},
    os::{clock::thread_time, priority::lower_this_thread},
};

/// Threads that ask, those that hang included.
const THREADS: usize = 24;
/// And threads that read files.
const READERS: usize = 10;
/// Threads that only read what the kernel tells.
const FOR_TEXT: usize = 4;
/// Their stack, in bytes: what they call is shallow.
const STACK: usize = 256 * 1024;
/// A step that takes longer hangs.
const STUCK: Duration = Duration::from_secs(2);
/// Threads of one family that ask file systems, those that hang included; and as many that do not.
const OF_FAMILY: usize = 5;
/// Steps on one file system that may hang before none is begun there.
const OF_DEVICE: usize = 2;
/// Tasks of all families, waiting or running.
const PLACES: Option<NonZeroU32> = NonZeroU32::new(256);
/// Tasks of one family, if nobody else has any.
const PLACES_OF_FAMILY: Option<NonZeroU32> = NonZeroU32::new(128);
/// How often it is looked for who has waited too long.
const LOOK: Duration = Duration::from_millis(250);

/// How long somebody waits for a task, its wait for a thread included.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What kind of work a task is. Each has so many threads at most, but for those that hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TaskKind {
    /// Reads what the kernel tells of a process.
    Text,
    /// Asks a file system about a file.
    Status,
    /// Reads a file, which takes long.
    Content,
}

impl TaskKind {
    fn at_once(self) -> usize {
        match self {
            Self::Text => THREADS,
            Self::Status => 4,
            // Half of a small node's processors, and no more of a large one's.
            Self::Content => 2,
        }
    }
}

/// For whom a task is done, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskPlace {
    pub(super) kind: TaskKind,
    /// The caller and whoever shares its places.
    pub(super) family: u64,
    /// The file system that it asks, unless it asks none.
    pub(super) device: Option<u64>,
}

/// Whether a task is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TaskStep {
    Again,
    Done,
}

/// Something to do in steps, each of which takes a moment unless the file system hangs.
pub(super) trait FileTask: Send {
    /// How much is left, in bytes: the smallest of a family is next.
    fn left(&self) -> u64;
    /// Whether anybody waits for it.
    fn is_wanted(&self) -> bool;
    /// Whether it holds a file open, so that to let go of it may hang as well.
    fn is_begun(&self) -> bool;
    /// Does a part of it. Whoever waits is answered before it says that it is done.
    fn step(&mut self) -> TaskStep;
}

/// Why a task was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotDone {
    /// Too many wait already.
    Busy,
    /// It was not done by its deadline.
    Late,
}

/// Resolves when a task was given up, or is done.
#[derive(Clone, Debug)]
pub(super) struct GivenUp(watch::Receiver<()>);

impl GivenUp {
    /// What `answered` gives; `None` when the task was given up, or is done without it. An answer that is there counts,
    /// whatever else is seen first.
    pub(super) async fn or<T>(mut self, answered: impl Future<Output = T>) -> Option<T> {
        let mut answered = pin!(answered);
        tokio::select! {
            biased;
            answer = answered.as_mut() => return Some(answer),
            // Nothing is ever sent: the sender goes.
            () = async { while self.0.changed().await.is_ok() {} } => {}
        }
        // The task may have been done, and gone, after the one was looked at and before the other was.
        poll_fn(|context| {
            Poll::Ready(match answered.as_mut().poll(context) {
                Poll::Ready(answer) => Some(answer),
                Poll::Pending => None,
            })
        })
        .await
    }
}

/// A place that was taken for a task.
pub(super) struct TaskTicket {
    place: TaskPlace,
    hold: TaskHold,
}

impl TaskTicket {
    pub(super) fn given_up(&self) -> GivenUp {
        let sender = self.hold.waited_for.as_ref();
        GivenUp(sender.map_or_else(|| watch::Sender::new(()).subscribe(), watch::Sender::subscribe))
    }
}

/// The threads. They end when this is dropped, as soon as what they do ends.
pub(super) struct FileThreads {
    shared: Arc<SharedTasks>,
    started: Once,
}

struct SharedTasks {
    /// Only these threads lock it. Before the inbox, where both are locked.
    tasks: Mutex<Tasks>,
    inbox: Mutex<Inbox>,
    /// A task may begin, or all is over. Goes with the inbox.
    work: Condvar,
    /// The same, for those that read files.
    reading: Condvar,
    /// There is something to watch over, or all is over. Goes with the inbox.
    watched: Condvar,
    places: Arc<Slots>,
    patience: Duration,
    stuck: Duration,
}

/// What these threads are told.
#[derive(Default)]
struct Inbox {
    came: Vec<(TaskPlace, Box<dyn FileTask>, TaskHold)>,
    share: ProcessorShare,
    /// How often it was said that a task may begin.
    calls: u64,
    /// Whether the one who watches waits to be called.
    unwatched: bool,
    over: bool,
}

#[derive(Default)]
struct Tasks {
    waiting: Vec<WaitingTask>,
    running: Vec<RunningTask>,
    /// The number of the last turn or task.
    number: u64,
    spent: SpentTime,
}

struct WaitingTask {
    number: u64,
    place: TaskPlace,
    task: Box<dyn FileTask>,
    /// The lowest is next.
    turn: u64,
    hold: TaskHold,
}

impl WaitingTask {
    fn is_wanted(&self) -> bool {
        self.hold.waited_for.is_some() && self.task.is_wanted()
    }
}

struct RunningTask {
    number: u64,
    place: TaskPlace,
    since: Instant,
    hold: TaskHold,
}

/// What a task has until it is over.
struct TaskHold {
    deadline: Instant,
    /// `None` once it was given up.
    waited_for: Option<watch::Sender<()>>,
    _slot: AttestationSlot,
}

impl Default for FileThreads {
    fn default() -> Self {
        Self::with(PATIENCE, STUCK)
    }
}

impl FileThreads {
    fn with(patience: Duration, stuck: Duration) -> Self {
        let places = Attestations::new(PLACES, PLACES_OF_FAMILY).unwrap_or_default();
        let shared = SharedTasks {
            tasks: Mutex::default(),
            inbox: Mutex::default(),
            work: Condvar::new(),
            reading: Condvar::new(),
            watched: Condvar::new(),
            places: Arc::new(Slots::new(places)),
            patience,
            stuck,
        };
        Self { shared: Arc::new(shared), started: Once::new() }
    }

    /// Starts the threads, unless they are there.
    pub(super) fn start(&self) {
        self.started.call_once(|| {
            let mut failed = None;
            for n in 0..=THREADS + READERS {
                let shared = Arc::clone(&self.shared);
                let thread = thread::Builder::new().name("executables".to_owned()).stack_size(STACK);
                let run = move || match n {
                    0 => shared.watch(),
                    1..=THREADS => shared.work(false),
                    _ => {
                        lower_this_thread();
                        shared.work(true);
                    }
                };
                failed = thread.spawn(run).err().or(failed);
            }
            if let Some(error) = failed {
                tracing::warn!(%error, "not all threads that look at executables could be started");
            }
        });
    }

    /// Does `look` on a thread and waits for what it gives.
    ///
    /// # Errors
    /// [`NotDone`].
    pub(super) async fn run<T: Send + 'static>(
        &self,
        place: TaskPlace,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NotDone> {
        let (answer, answered) = oneshot::channel();
        let ticket = self.take(place)?;
        let given_up = ticket.given_up();
        self.begin(ticket, Box::new(OneStep { look: Some(look), answer: Some(answer) }));
        // The sender goes unused only in a panic.
        given_up.or(answered).await.and_then(Result::ok).ok_or(NotDone::Late)
    }

    /// A place for a task.
    ///
    /// # Errors
    /// [`NotDone::Busy`].
    pub(super) fn take(&self, place: TaskPlace) -> Result<TaskTicket, NotDone> {
        let slot = self.shared.places.take(place.family).map_err(|_full| NotDone::Busy)?;
        let deadline = Instant::now() + self.shared.patience;
        Ok(TaskTicket {
            place,
            hold: TaskHold { deadline, waited_for: Some(watch::Sender::new(())), _slot: slot },
        })
    }

    /// Has a task done. The answer is the task's own doing; it may come together with the end of [`GivenUp`], and counts
    /// first ([`GivenUp::or`]).
    pub(super) fn begin(&self, ticket: TaskTicket, task: Box<dyn FileTask>) {
        self.start();
        let TaskTicket { place, hold } = ticket;
        let mut inbox = self.shared.inbox();
        let begins = self.shared.who_does(place.kind == TaskKind::Content);
        inbox.came.push((place, task, hold));
        inbox.calls += 1;
        let unwatched = std::mem::take(&mut inbox.unwatched);
        drop(inbox);
        if unwatched {
            self.shared.watched.notify_one();
        }
        begins.notify_one();
    }

    /// What the agent may use of the processor, from now on: a family spends a part of that here.
    pub(super) fn share_is(&self, share: ProcessorShare) {
        self.shared.inbox().share = share;
    }
}

impl Drop for FileThreads {
    fn drop(&mut self) {
        // What still waits goes with the last thread.
        self.shared.inbox().over = true;
        self.shared.work.notify_all();
        self.shared.reading.notify_all();
        self.shared.watched.notify_all();
    }
}

impl SharedTasks {
    fn lock(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what came. Returns the tasks and how often it was called so far; `None` when all is over.
    fn take_in(&self) -> Option<(MutexGuard<'_, Tasks>, u64)> {
        let mut tasks = self.lock();
        let mut inbox = self.inbox();
        if inbox.over {
            return None;
        }
        let (came, share, calls) = (std::mem::take(&mut inbox.came), inbox.share, inbox.calls);
        drop(inbox);
        tasks.spent.share_is(share);
        for (place, task, hold) in came {
            tasks.add(place, task, hold);
        }
        Some((tasks, calls))
    }

    /// Where those wait that read files, or those that do not.
    fn who_does(&self, reading: bool) -> &Condvar {
        if reading { &self.reading } else { &self.work }
    }

    /// Waits until it is said more than `calls` times that a task may begin, or all is over.
    fn wait(&self, reads: bool, calls: u64) {
        let inbox = self.inbox();
        let waits = |inbox: &mut Inbox| inbox.calls == calls && !inbox.over;
        drop(self.who_does(reads).wait_while(inbox, waits));
    }

    /// What one thread does, which reads files or does all else.
    fn work(&self, reads: bool) {
        while let Some((mut tasks, calls)) = self.take_in() {
            let unwanted = tasks.unwanted();
            if !unwanted.is_empty() {
                // Not under the lock: what a task does when it goes is its own.
                drop(tasks);
                drop(unwanted);
                continue;
            }
            let Some(WaitingTask { number, place, mut task, turn: _, hold }) = tasks.next(reads, self.stuck)
            else {
                drop(tasks);
                self.wait(reads, calls);
                continue;
            };
            let is_wanted = hold.waited_for.is_some() && task.is_wanted();
            tasks.running.push(RunningTask { number, place, since: Instant::now(), hold });
            drop(tasks);
            let before = thread_time();
            // After a panic the task is dropped, and whoever waits is told that it was not done.
            let again = catch_unwind(AssertUnwindSafe(move || {
                // To let go of it is a part of the step, as it may hang.
                (is_wanted && task.step() == TaskStep::Again).then_some(task)
            }));
            let spent = thread_time().saturating_sub(before);
            let mut tasks = self.lock();
            tasks.spent.spend(place.family, spent, Instant::now());
            tasks.ended(number, again.ok().flatten());
            drop(tasks);
            // What could not begin beside this step may begin, here or on another thread.
            self.inbox().calls += 1;
            self.work.notify_one();
            self.reading.notify_one();
        }
    }

    /// What the thread does that watches over the others: it gives up what is late, and wakes them when a step turns
    /// out to hang, or a family may spend more.
    fn watch(&self) {
        while let Some((mut tasks, _)) = self.take_in() {
            tasks.give_up_late(Instant::now());
            let any_waits = !tasks.waiting.is_empty();
            let idle = !any_waits && tasks.running.iter().all(|it| it.hold.waited_for.is_none());
            let mut inbox = self.inbox();
            drop(tasks);
            if idle && inbox.came.is_empty() {
                inbox.unwatched = true;
                drop(self.watched.wait_while(inbox, |inbox| inbox.unwatched && !inbox.over));
                continue;
            }
            if any_waits {
                inbox.calls += 1;
                self.work.notify_all();
                self.reading.notify_all();
            }
            drop(self.watched.wait_timeout_while(inbox, LOOK, |inbox| !inbox.over));
        }
    }
}

impl Tasks {
    /// Takes out what nobody waits for. What has a file open is let go of in its turn.
    fn unwanted(&mut self) -> Vec<WaitingTask> {
        self.waiting.extract_if(.., |it| !it.task.is_begun() && !it.is_wanted()).collect()
    }

    fn add(&mut self, place: TaskPlace, task: Box<dyn FileTask>, hold: TaskHold) {
        self.number += 1;
        let number = self.number;
        // Who has a task already is in the line; who comes goes to its end.
        let of_family = self.waiting.iter().find(|it| it.place.family == place.family);
        let turn = of_family.map_or(number, |it| it.turn);
        self.waiting.push(WaitingTask { number, place, task, turn, hold });
    }

    /// Takes the task that is to be done next, of those that read files or of the others.
    fn next(&mut self, reads: bool, stuck: Duration) -> Option<WaitingTask> {
        let now = Instant::now();
        let hangs = |it: &RunningTask| now.saturating_duration_since(it.since) >= stuck;
        let may_begin = |place: &TaskPlace| {
            let running = |is: &dyn Fn(&RunningTask) -> bool| self.running.iter().filter(|it| is(it)).count();
            let same_kind = |it: &RunningTask| it.place.kind == place.kind && !hangs(it);
            let same_family = |it: &RunningTask| it.place.family == place.family;
            let asks_files = |it: &RunningTask| it.place.kind != TaskKind::Text;
            let asks = place.kind != TaskKind::Text;
            let asks_about = |it: &RunningTask| it.place.kind == TaskKind::Status;
            running(&|it| same_family(it) && asks_files(it) == asks) < OF_FAMILY
                && (place.kind == TaskKind::Content) == reads
                && !(asks && !reads && running(&asks_about) >= THREADS - FOR_TEXT)
                && running(&same_kind) < place.kind.at_once()
                && !(reads && running(&|it| same_kind(it) && same_family(it)) > 0)
                && (place.device.is_none()
                    || running(&|it| it.place.device == place.device && hangs(it)) < OF_DEVICE)
        };
        // To let go of a file costs next to nothing.
        let may_spend = |it: &WaitingTask| !it.is_wanted() || self.spent.may_spend(it.place.family, now);
        let ready = self.waiting.iter().enumerate().filter(|(_, it)| may_begin(&it.place) && may_spend(it));
        // What is short goes before what is long, whoever's it is; the long ones take turns.
        let first = |it: &WaitingTask| match it.place.kind {
            TaskKind::Text | TaskKind::Status => (0, it.turn, 0, it.number),
            TaskKind::Content if it.is_wanted() => (1, it.turn, it.task.left(), it.number),
            // To let go of a file is short.
            TaskKind::Content => (1, it.turn, 0, it.number),
        };
        let (at, _) = ready.min_by_key(|(_, it)| first(it))?;
        let next = self.waiting.swap_remove(at);
        self.number += 1;
        let turn = self.number;
        for it in self.waiting.iter_mut().filter(|it| it.place.family == next.place.family) {
            it.turn = turn;
        }
        Some(next)
    }

    /// A step has ended; `again` is the task, unless it is done.
    fn ended(&mut self, number: u64, again: Option<Box<dyn FileTask>>) {
        let Some(at) = self.running.iter().position(|it| it.number == number) else { return };
        let RunningTask { place, hold, .. } = self.running.swap_remove(at);
        if let Some(task) = again {
            self.number += 1;
            let of_family = self.waiting.iter().find(|it| it.place.family == place.family);
            let turn = of_family.map_or(self.number, |it| it.turn);
            self.waiting.push(WaitingTask { number, place, task, turn, hold });
        }
    }

    /// Tells those who have waited too long.
    fn give_up_late(&mut self, now: Instant) {
        let waiting = self.waiting.iter_mut().map(|it| &mut it.hold);
        for hold in waiting.chain(self.running.iter_mut().map(|it| &mut it.hold)) {
            if hold.deadline <= now {
                hold.waited_for = None;
            }
        }
    }
}

/// A task of one step.
struct OneStep<F, T> {
    look: Option<F>,
    answer: Option<oneshot::Sender<T>>,
}

impl<T: Send, F: FnOnce() -> T + Send> FileTask for OneStep<F, T> {
    fn left(&self) -> u64 {
        0
    }

    fn is_wanted(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| !answer.is_closed())
    }

    fn is_begun(&self) -> bool {
        false
    }

    fn step(&mut self) -> TaskStep {
        if let (Some(look), Some(answer)) = (self.look.take(), self.answer.take()) {
            // Whoever asked may have gone meanwhile.
            drop(answer.send(look()));
        }
        TaskStep::Done
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc,
        task::{Context, Waker},
    };

    use super::{super::spent::BURST, *};
    use crate::os::priority::nice;

    /// So long nothing here takes that is not held up.
    const PLENTY: Duration = Duration::from_secs(60);
    /// Steps that hang do so after this.
    const SOON: Duration = Duration::from_millis(20);

    fn place(kind: TaskKind, family: u64, device: u64) -> TaskPlace {
        TaskPlace { kind, family, device: Some(device) }
    }

    /// Waits until `is`, which threads bring about.
    fn until(is: impl Fn() -> bool) {
        let began = Instant::now();
        while !is() {
            assert!(began.elapsed() < PLENTY, "it never was");
            thread::yield_now();
        }
    }

    /// A task that says what it is, and waits at each step until it may go on or nobody keeps it waiting.
    struct Told {
        name: &'static str,
        left: u64,
        steps: usize,
        says: mpsc::Sender<&'static str>,
        go: Option<mpsc::Receiver<()>>,
    }

    impl FileTask for Told {
        fn left(&self) -> u64 {
            self.left
        }

        fn is_wanted(&self) -> bool {
            true
        }

        fn is_begun(&self) -> bool {
            false
        }

        fn step(&mut self) -> TaskStep {
            self.says.send(self.name).unwrap();
            if let Some(go) = &self.go {
                let _goes_on = go.recv().is_ok();
            }
            self.steps -= 1;
            if self.steps == 0 { TaskStep::Done } else { TaskStep::Again }
        }
    }

    #[tokio::test]
    async fn families_take_turns_and_the_smallest_of_each_is_next() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        let (says, said) = mpsc::channel();
        let begin = |family, name, left, steps, go| {
            let ticket = threads.take(place(TaskKind::Content, family, 0)).unwrap();
            threads.begin(ticket, Box::new(Told { name, left, steps, says: says.clone(), go }));
        };
        // Two run at a time: one of them to the end of this test, one until all others wait.
        let (stay, stays) = mpsc::channel();
        let (go, goes) = mpsc::channel();
        begin(8, "stays", 1, 1, Some(stays));
        begin(9, "goes", 1, 1, Some(goes));
        let mut first = [said.recv_timeout(PLENTY).unwrap(), said.recv_timeout(PLENTY).unwrap()];
        first.sort_unstable();
        assert_eq!(first, ["goes", "stays"]);
        for (family, name, left, steps) in
            [(1, "a30", 30, 1), (1, "a10", 10, 1), (2, "b99", 99, 3), (1, "a20", 20, 1), (3, "c50", 50, 1)]
        {
            begin(family, name, left, steps, None);
        }
        assert!(said.try_recv().is_err(), "no more than two at a time");
        drop(go);
        let rest: Vec<_> = (0..7).map(|_| said.recv_timeout(PLENTY).unwrap()).collect();
        assert_eq!(rest, ["a10", "b99", "c50", "a20", "b99", "a30", "b99"]);
        drop(stay);
    }

    #[tokio::test]
    async fn who_spent_its_part_of_the_processor_waits_and_others_do_not() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        threads.share_is(ProcessorShare::cores(ProcessorShare::LEAST).unwrap());
        let text = |family| TaskPlace { kind: TaskKind::Text, family, device: None };
        assert_eq!(threads.run(text(1), || ()).await, Ok(()));
        until(|| threads.shared.lock().running.is_empty());
        assert!(threads.shared.lock().spent.knows(1), "it is counted");
        threads.shared.lock().spent.spend(1, 100 * BURST, Instant::now());
        let mut again = Box::pin(threads.run(text(1), || 5));
        let mut waits =
            async || poll_fn(|context| Poll::Ready(again.as_mut().poll(context).is_pending())).await;
        assert!(waits().await);
        // Its turn is before theirs.
        for family in 2..20 {
            assert_eq!(threads.run(text(family), || 6).await, Ok(6), "{family}");
        }
        assert!(waits().await);
    }

    /// A node that is busy must not keep callers waiting for what is short.
    #[tokio::test]
    async fn those_that_read_files_have_a_low_priority_and_the_others_not() {
        let threads = FileThreads::default();
        let ours = nice();
        for (kind, lower) in [(TaskKind::Text, 0), (TaskKind::Status, 0), (TaskKind::Content, 10)] {
            let of_thread = threads.run(place(kind, 1, 8), nice).await.unwrap();
            assert_eq!(of_thread, (ours + lower).min(19), "{kind:?}");
        }
    }

    /// Who serves is not held up by those that look for what is next, and may get no processor while they do.
    #[tokio::test]
    async fn a_task_is_left_while_tasks_are_looked_through() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        let looking = threads.shared.lock();
        let text = TaskPlace { kind: TaskKind::Text, family: 1, device: None };
        let mut run = Box::pin(threads.run(text, || 5));
        let left = run.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(left.is_pending(), "and not done");
        drop(looking);
        assert_eq!(run.await, Ok(5));
    }

    #[tokio::test]
    async fn what_hangs_holds_only_its_own() {
        let threads = Arc::new(FileThreads::with(PLENTY, SOON));
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        let hangs: Vec<_> = (0..20)
            .map(|n| {
                let (threads, released) = (Arc::clone(&threads), Arc::clone(&released));
                // Half of one family, half of ten.
                let family = if n % 2 == 0 { 1 } else { 100 + n };
                tokio::spawn(async move {
                    let wait = move || drop(released.lock().map(|it| it.recv()));
                    threads.run(place(TaskKind::Status, family, 7), wait).await
                })
            })
            .collect();
        let hang = |tasks: &Tasks| {
            let now = Instant::now();
            tasks.running.iter().filter(|it| now.duration_since(it.since) > SOON).count()
        };
        while hang(&threads.shared.lock()) < OF_DEVICE {
            tokio::task::yield_now().await;
        }
        for family in [2, 3, 4] {
            for kind in [TaskKind::Text, TaskKind::Status, TaskKind::Content] {
                assert_eq!(threads.run(place(kind, family, 8), || 5).await, Ok(5), "{family} {kind:?}");
            }
        }
        let most = threads.shared.lock().running.len();
        assert!(most <= OF_DEVICE + TaskKind::Status.at_once(), "{most} threads of one file system");
        let text = TaskPlace { kind: TaskKind::Text, family: 1, device: None };
        assert_eq!(threads.run(text, || 6).await, Ok(6), "what asks no file system, even of the family");

        drop(release);
        for hang in hangs {
            assert_eq!(hang.await.unwrap(), Ok(()), "served after all");
        }
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_his_patience() {
        let threads = FileThreads::with(SOON, PLENTY);
        let (release, released) = mpsc::channel::<()>();
        let running = place(TaskKind::Text, 1, 7);
        assert_eq!(threads.run(running, move || released.recv().is_ok()).await, Err(NotDone::Late));
        assert_eq!(threads.shared.lock().running.len(), 1, "nothing can end it");
        drop(release);
        until(|| threads.shared.lock().running.is_empty());
        assert_eq!(threads.run(running, || 5).await, Ok(5), "its thread is back");
    }

    #[tokio::test]
    async fn places_have_a_bound_and_a_share() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        let take = |family| threads.take(place(TaskKind::Content, family, 0));
        let mut taken = Vec::new();
        while let Ok(ticket) = take(1) {
            taken.push(ticket);
        }
        assert_eq!(u32::try_from(taken.len()).ok(), PLACES_OF_FAMILY.map(NonZeroU32::get));
        assert_eq!(take(1).err(), Some(NotDone::Busy));
        let others: Vec<_> = (2..30).map(|family| take(family).unwrap()).collect();
        drop(taken);
        take(1).unwrap();
        drop(others);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_done() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        let (release, released) = mpsc::channel::<()>();
        let (says, said) = mpsc::channel();
        let ticket = threads.take(place(TaskKind::Content, 1, 0)).unwrap();
        threads.begin(ticket, Box::new(Told { name: "first", left: 1, steps: 1, says, go: Some(released) }));
        said.recv_timeout(PLENTY).unwrap();
        let mut behind = Box::pin(threads.run(place(TaskKind::Content, 1, 0), || panic!("nobody waits")));
        let waits = poll_fn(|context| Poll::Ready(behind.as_mut().poll(context).is_pending()));
        assert!(waits.await);
        until(|| threads.shared.lock().waiting.len() == 1);
        drop(behind);
        drop(release);
        until(|| threads.shared.lock().waiting.is_empty() && threads.shared.lock().running.is_empty());
    }

    #[tokio::test]
    async fn an_answer_counts_that_comes_between_two_looks() {
        let (task, gone) = watch::channel(());
        let mut task = Some(task);
        // Pending when it is looked at; before anything else is, the task has answered and is over.
        let answered = poll_fn(|_| match task.take() {
            Some(_) => Poll::Pending,
            None => Poll::Ready(5),
        });
        assert_eq!(GivenUp(gone).or(answered).await, Some(5));
        let (_, gone) = watch::channel(());
        assert_eq!(GivenUp(gone).or(std::future::pending::<()>()).await, None);
    }

    #[tokio::test]
    async fn a_panic_is_an_end_and_takes_no_thread() {
        let threads = FileThreads::with(PLENTY, PLENTY);
        for _ in 0..2 * THREADS {
            let panics = || panic!("as tests do");
            let failed: Result<(), _> = threads.run(place(TaskKind::Text, 1, 0), panics).await;
            assert_eq!(failed, Err(NotDone::Late));
        }
        assert_eq!(threads.run(place(TaskKind::Text, 1, 0), || 5).await, Ok(5));
    }

    #[test]
    fn threads_end_with_their_owner() {
        let threads = FileThreads::default();
        threads.start();
        let shared = Arc::downgrade(&threads.shared);
        drop(threads);
        until(|| shared.strong_count() == 0);
    }
}
