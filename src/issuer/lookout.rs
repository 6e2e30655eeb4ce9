//! Who waits for an entry that the issuer may not know of yet: it looks for newer ones while anybody does, once for all of
//! them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::{Notify, watch};

/// The looks of an issuer, and how many wait for them.
#[derive(Debug)]
pub struct Lookouts {
    waiting: AtomicUsize,
    came: Notify,
    /// How long a caller may wait.
    patience: watch::Sender<Duration>,
    /// The number of the look that began last. Looks come one after the other.
    begun: watch::Sender<u64>,
    /// The number of the last one that found out what there is.
    done: watch::Sender<u64>,
}

impl Lookouts {
    /// None waits, and each may for so long.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience: watch::Sender::new(patience),
            waiting: AtomicUsize::new(0),
            came: Notify::new(),
            begun: watch::Sender::new(0),
            done: watch::Sender::new(0),
        }
    }

    /// Who begins to wait from now on may for so long.
    pub fn set_patience(&self, patience: Duration) {
        self.patience.send_replace(patience);
    }

    /// Waits, from this moment on, for a look that begins later.
    pub fn wait(self: &Arc<Self>) -> Lookout {
        self.waiting.fetch_add(1, SeqCst);
        self.came.notify_one();
        let (patience, since) = (*self.patience.borrow(), *self.begun.borrow());
        Lookout { of: Arc::clone(self), patience, since }
    }

    /// Comes back as soon as anybody waits.
    pub async fn wanted(&self) {
        loop {
            let came = self.came.notified();
            if self.waiting.load(SeqCst) > 0 {
                return;
            }
            came.await;
        }
    }

    /// A look begins: its number.
    pub fn begin(&self) -> u64 {
        let mut number = 0;
        self.begun.send_modify(|begun| {
            *begun += 1;
            number = *begun;
        });
        number
    }

    /// The look of this number found out what there is, and that was published.
    pub fn done(&self, number: u64) {
        self.done.send_replace(number);
    }
}

/// Somebody who waits, for as long as this lives.
#[derive(Debug)]
pub struct Lookout {
    of: Arc<Lookouts>,
    patience: Duration,
    since: u64,
}

impl Lookout {
    /// For how long a caller is to wait.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Whether a look that began after this wait did has found out what there is.
    pub fn has_looked(&self) -> bool {
        *self.of.done.borrow() > self.since
    }

    /// Waits until [`Lookout::has_looked`], however long that takes.
    pub async fn looked(&self) {
        let mut done = self.of.done.subscribe();
        // The sender lives as long as this.
        if done.wait_for(|done| *done > self.since).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.of.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn only_a_later_look_counts() {
        let looks = Arc::new(Lookouts::new(Duration::ZERO));
        assert!(looks.wanted().now_or_never().is_none(), "nobody waits");
        let before = looks.begin();
        let one = looks.wait();
        looks.wanted().await;
        looks.done(before);
        assert!(!one.has_looked(), "that look may have missed it");
        assert!(one.looked().now_or_never().is_none());
        let failed = looks.begin();
        let another = looks.wait();
        looks.done(looks.begin());
        assert!(one.has_looked() && failed < looks.begin());
        one.looked().await;
        drop(one);
        looks.wanted().await;
        drop(another);
        assert!(looks.wanted().now_or_never().is_none());
    }
}
