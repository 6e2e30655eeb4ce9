//! What one connection makes the agent hold, in bytes, and what it is told when that is too much.
//!
//! Whoever serves a connection says here what it takes and gives back; the sums for its caller, its caller's family and the
//! node follow at once. What each thing costs is reckoned in [`budget`](super::budget).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::Notify;

/// What a connection is told, from the side of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// To open another one: what is open here ends soon.
    ComeBack,
    /// Nothing: it is closed.
    Close,
}

/// A sum of bytes that several add to.
#[derive(Debug, Default)]
pub struct HeldBytes(AtomicU64);

impl HeldBytes {
    /// Bytes that are held.
    pub fn bytes(&self) -> u64 {
        self.0.load(Relaxed)
    }

    fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Relaxed);
    }

    fn take(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Relaxed);
    }
}

/// What one connection holds.
#[derive(Debug, Default)]
pub struct Holding {
    own: HeldBytes,
    /// Of its caller, its family and the node.
    sums: Vec<Arc<HeldBytes>>,
    told: AtomicU8,
    notify: Notify,
}

impl Holding {
    /// One that adds to these sums too.
    pub fn in_sums(sums: Vec<Arc<HeldBytes>>) -> Self {
        let mut holding = Self::default();
        holding.sums = sums;
        holding
    }

    /// So many bytes more are held.
    pub fn hold(&self, bytes: u64) {
        self.own.add(bytes);
        for sum in &self.sums {
            sum.add(bytes);
        }
    }

    /// So many are held no longer: at most what was.
    pub fn release(&self, bytes: u64) {
        self.own.take(bytes);
        for sum in &self.sums {
            sum.take(bytes);
        }
    }

    /// Bytes that the connection holds.
    pub fn bytes(&self) -> u64 {
        self.own.bytes()
    }

    /// Counts an answer that was no work to conserve: a refusal, or an error that the caller made. Returns how long its
    /// connection is to be read no more.
    pub fn wasted(&self) -> Option<Duration> {
        None
    }

    /// Tells the connection. What it was told before is only ever surpassed.
    pub fn tell(&self, notice: Notice) {
        let before = self.told.fetch_max(notice.number(), Relaxed);
        if before < notice.number() {
            self.notify.notify_one();
        }
    }

    /// Waits until the connection is told more than `before`. For one task.
    pub async fn told(&self, before: Option<Notice>) -> Notice {
        loop {
            let notified = self.notify.notified();
            match Notice::of(self.told.load(Relaxed)) {
                Some(notice) if Some(notice) > before => return notice,
                Some(_) | None => notified.await,
            }
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let left = self.bytes();
        for sum in &self.sums {
            sum.take(left);
        }
    }
}

impl Notice {
    fn number(self) -> u8 {
        match self {
            Self::ComeBack => 1,
            Self::Close => 2,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::ComeBack, Self::Close].into_iter().find(|notice| notice.number() == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sums_follow_and_a_notice_is_surpassed_only() {
        let sum = Arc::new(HeldBytes::default());
        let holding = Holding::in_sums(vec![Arc::clone(&sum)]);
        holding.hold(100);
        holding.release(40);
        assert_eq!((holding.bytes(), sum.bytes()), (60, 60));
        holding.tell(Notice::Close);
        holding.tell(Notice::ComeBack);
        assert_eq!(holding.told(None).await, Notice::Close);
        assert_eq!(holding.told(Some(Notice::ComeBack)).await, Notice::Close);
        drop(holding);
        assert_eq!(sum.bytes(), 0);
    }
}
