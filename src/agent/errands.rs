//! The thread for what may wait: reading the configuration, starting, opening the log anew.
//!
//! The thread that answers signals, probes and the watchdog does none of it: a disk, a name service or a pipe can
//! keep one waiting for as long as it likes. There is one thread for it, from the start on, so that no shortage of
//! threads keeps it from being done. One errand waits for the other; one that never ends keeps the next from
//! beginning, and nothing else.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{SyncSender, sync_channel},
};

use tokio::sync::oneshot;

/// How many errands may wait: more than are ever asked for at once.
const WAITING: usize = 4;

type Errand = Box<dyn FnOnce() + Send>;

/// Runs errands, in the order in which they were given. Clones share a thread, which ends with the last of them, or with the
/// process.
#[derive(Clone, Debug)]
pub(super) struct Errands(SyncSender<Errand>);

impl Errands {
    pub(super) fn new() -> io::Result<Self> {
        let (give, taken) = sync_channel::<Errand>(WAITING);
        std::thread::Builder::new().name("errands".to_owned()).spawn(move || {
            for errand in taken {
                // A defect in one is told by its sender's end, and does not keep the next from being done.
                drop(catch_unwind(AssertUnwindSafe(errand)));
            }
        })?;
        Ok(Self(give))
    }

    /// Has `errand` done. What it gives comes at once when it is done, and an error when it panicked, or when too many
    /// were waiting.
    pub(super) fn begin<T: Send + 'static>(
        &self,
        errand: impl FnOnce() -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (done, receiver) = oneshot::channel();
        let errand = Box::new(move || {
            // Nobody may want to know any more.
            drop(done.send(errand()));
        });
        drop(self.0.try_send(errand));
        receiver
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use super::*;

    #[tokio::test]
    async fn errands_are_done_one_after_the_other_whatever_becomes_of_one() {
        let errands = Errands::new().unwrap();
        let gate = Arc::new(Barrier::new(2));
        let held = Arc::clone(&gate);
        let first = errands.begin(move || {
            held.wait();
            1
        });
        let broken = errands.begin(|| -> u8 { panic!("a defect") });
        let third = errands.begin(|| 3);
        gate.wait();
        assert_eq!(first.await, Ok(1));
        broken.await.unwrap_err();
        assert_eq!(third.await, Ok(3));
    }

    #[tokio::test]
    async fn one_that_hangs_keeps_a_bounded_number_waiting() {
        let errands = Errands::new().unwrap();
        let gate = Arc::new(Barrier::new(2));
        let held = Arc::clone(&gate);
        let first = errands.begin(move || held.wait().is_leader());
        let mut waiting: Vec<_> = (0..100).map(|n| errands.begin(move || n)).collect();
        // One too many has been given up at once.
        waiting.pop().unwrap().await.unwrap_err();
        gate.wait();
        first.await.unwrap();
        assert_eq!(waiting.remove(0).await, Ok(0));
    }
}
