//! The waker of a connection's task, as HTTP/2 is given it.
//!
//! What is answered on the task of its connection wakes that very task. The runtime would put it behind all others, and
//! wake another thread to look for it: dearer than the answer. Here it is polled once more instead.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicU8,
            Ordering::{AcqRel, Acquire, Release},
        },
    },
    task::{Context, Poll, Wake, Waker},
};

/// So many times what wakes itself is polled before others may run, with room on the node.
pub(super) const ROUNDS: u32 = 4;

/// Nobody polls: the task is to be woken.
const RESTS: u8 = 0;
/// It is being polled.
const POLLED: u8 = 1;
/// It is being polled, and was woken since that began.
const WOKEN: u8 = 2;

/// Polls what its own work wakes.
#[derive(Debug)]
pub(super) struct TaskWaker {
    inner: Arc<WakeState>,
    waker: Waker,
}

#[derive(Debug)]
struct WakeState {
    state: AtomicU8,
    /// Of the task, which stays the same.
    task: OnceLock<Waker>,
}

impl TaskWaker {
    /// For use on one task.
    pub(super) fn new() -> Self {
        let inner = Arc::new(WakeState { state: AtomicU8::new(RESTS), task: OnceLock::new() });
        Self { waker: Waker::from(Arc::clone(&inner)), inner }
    }

    /// Polls until `poll` is ready, or pending without having been woken meanwhile, up to `rounds` times.
    pub(super) fn poll<R>(
        &self,
        cx: &Context<'_>,
        rounds: u32,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<R>,
    ) -> Poll<R> {
        let task = self.inner.task.get_or_init(|| cx.waker().clone());
        let state = &self.inner.state;
        for _ in 0..rounds {
            state.store(POLLED, Release);
            let polled = poll(&mut Context::from_waker(&self.waker));
            if state.compare_exchange(POLLED, RESTS, AcqRel, Acquire).is_ok() || polled.is_ready() {
                return polled;
            }
        }
        if state.swap(RESTS, AcqRel) == WOKEN {
            task.wake_by_ref();
        }
        Poll::Pending
    }
}

impl Wake for WakeState {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let polled = self.state.compare_exchange(POLLED, WOKEN, AcqRel, Acquire);
        if polled == Err(RESTS)
            && let Some(task) = self.task.get()
        {
            task.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn what_wakes_itself_is_polled_again_and_the_task_is_woken_for_the_rest() {
        for (wakes_itself, polls, woken) in [(0, 1, 0), (1, 2, 0), (3, 4, 0), (4, 4, 1), (100, 4, 1)] {
            let task = Arc::new(Counted::default());
            let waker = TaskWaker::new();
            let mut polled = 0;
            let poll =
                waker.poll(&Context::from_waker(&Arc::clone(&task).into()), ROUNDS, |cx| -> Poll<()> {
                    polled += 1;
                    if polled <= wakes_itself {
                        cx.waker().wake_by_ref();
                        cx.waker().wake_by_ref();
                    }
                    Poll::Pending
                });
            assert!(poll.is_pending());
            assert_eq!((polled, task.0.load(SeqCst)), (polls, woken), "{wakes_itself}");
            waker.waker.wake_by_ref();
            assert_eq!(
                task.0.load(SeqCst),
                woken + 1,
                "{wakes_itself}: whoever wakes it while it rests wakes the task"
            );
        }
    }

    #[test]
    fn no_wake_of_another_thread_is_lost() {
        let task = Arc::new(Counted::default());
        let waker = TaskWaker::new();
        let (wanted, seen) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        std::thread::scope(|threads| {
            let (theirs, wanted_there) = (waker.waker.clone(), Arc::clone(&wanted));
            threads.spawn(move || {
                for _ in 0..20_000 {
                    wanted_there.fetch_add(1, SeqCst);
                    theirs.wake_by_ref();
                }
            });
            let mut before = 0;
            while seen.load(SeqCst) < 20_000 {
                let poll =
                    waker.poll(&Context::from_waker(&Arc::clone(&task).into()), ROUNDS, |_| -> Poll<()> {
                        seen.store(wanted.load(SeqCst), SeqCst);
                        Poll::Pending
                    });
                assert!(poll.is_pending());
                // As a runtime would: it polls again once it was woken, and only then.
                while seen.load(SeqCst) < 20_000 && task.0.load(SeqCst) == before {
                    std::thread::yield_now();
                }
                before = task.0.load(SeqCst);
            }
        });
    }
}
