//! The waiting of one call: for tokens or room, and for a place among the attestations.
//!
//! A call that waits has a place ([`Ledger::places`]); without one it is refused at once. It tries again when its tokens
//! should be there, those of its caller one after the other, and when there is room. It is over in time, whatever happens
//! ([`patience`](super::patience)), and when its caller goes away it leaves nothing behind.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{
    attempt::Attempt,
    ledger::Ledger,
    patience::{FOR_ATTESTATION, FOR_ROOM, Patience},
    refusal::Refusal,
    slots::AttestationSlot,
};

/// How long a call has waited, and may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitOfCall {
    /// In nanoseconds since the limits were made.
    pub(super) arrived: u64,
    pub(super) patience: Patience,
    /// What it has waited for tokens and for a place among the attestations, in nanoseconds.
    for_tokens: u64,
    for_attestation: u64,
}

impl WaitOfCall {
    /// Of a call that came at `now`.
    pub(super) fn new(now: u64, patience: Patience) -> Self {
        Self { arrived: now, patience, for_tokens: 0, for_attestation: 0 }
    }

    /// Waits until the tokens should be there that this refusal was for, or there is room: a call that is the `nth` of
    /// its caller for those before it too. Says what the next try is.
    pub(super) async fn for_tokens(&mut self, ledger: &Ledger, refusal: &Refusal, nth: u32) -> Attempt {
        let began = ledger.now();
        let left = self.left(began).min(FOR_ROOM.saturating_sub(Duration::from_nanos(self.for_tokens)));
        let after = refusal.turn(nth);
        let attempt = tokio::select! {
            () = ledger.room.returns() => Attempt::Again,
            () = sleep(after.min(left)) => if after < left { Attempt::Again } else { Attempt::Last },
        };
        self.for_tokens += ledger.now().saturating_sub(began);
        attempt
    }

    /// Waits for a place among the attestations; `None` when it was too long.
    pub(super) async fn for_attestation(&mut self, ledger: &Ledger, group: u64) -> Option<AttestationSlot> {
        let began = ledger.now();
        let left =
            self.left(began).min(FOR_ATTESTATION.saturating_sub(Duration::from_nanos(self.for_attestation)));
        let slot = timeout(left, ledger.slots.wait(group)).await.ok();
        self.for_attestation += ledger.now().saturating_sub(began);
        slot
    }

    /// What is left of what the caller gave, whatever it waits for.
    pub(super) fn patience_left(&self, now: u64) -> Duration {
        self.left(now)
    }

    fn left(&self, now: u64) -> Duration {
        self.patience.left(Duration::from_nanos(now.saturating_sub(self.arrived)))
    }
}
