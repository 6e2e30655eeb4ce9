//! A rotation that calls wait for: after a jump of the clock, or a long sleep of the machine, what signs is not valid.

use std::time::Duration;

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout_at},
};

/// The shortest time between two rotations, whoever asks for one.
const PAUSE: Duration = Duration::from_millis(250);

/// Brings calls that need a rotation together with the one task that does it.
#[derive(Debug)]
pub(super) struct Repair {
    needed: Notify,
    /// How many were done, well or not.
    done: watch::Sender<u64>,
}

impl Default for Repair {
    fn default() -> Self {
        Self { needed: Notify::new(), done: watch::Sender::new(0) }
    }
}

impl Repair {
    /// Waits until a rotation that is begun from now on has been tried, until the deadline at most.
    pub(super) async fn tried(&self, deadline: Instant) {
        let mut done = self.done.subscribe();
        self.needed.notify_one();
        // An error would mean that the issuer is gone, and this with it.
        let _in_time = timeout_at(deadline, done.changed()).await.is_ok();
    }

    /// Waits until a call needs one.
    pub(super) async fn needed(&self) {
        self.needed.notified().await;
    }

    /// One was tried that began at this moment. Waits until the next may begin.
    pub(super) async fn pause(&self, began: Instant) {
        self.done.send_modify(|count| *count += 1);
        sleep_until(began + PAUSE).await;
    }
}
