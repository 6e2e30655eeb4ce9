//! Refused connections that are kept a moment before they are closed.
//!
//! Connections wait to be accepted in one queue, first come, first served: a crowd that is turned away at
//! once stands in it again before anybody else has moved up.

use std::{collections::BTreeMap, os::unix::net::UnixStream};

use tokio::time::Instant;

use super::{accepted::Accepted, bounds::ConnectionBounds};

/// Connections that were refused, by when each is closed. Nothing is read from them, and the runtime does not
/// know them: a descriptor each, and a bounded number.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    /// With a number, as many may be due at one time.
    held: BTreeMap<(Instant, u32), Accepted<UnixStream>>,
    numbered: u32,
}

impl Lingering {
    /// Keeps one for as long as the bounds say, or for as long as there is room: between half of that time
    /// and one and a half, spread evenly, so that those who came together do not come back together.
    pub(super) fn keep(&mut self, stream: Accepted<UnixStream>, now: Instant, bounds: &ConnectionBounds) {
        /// 2^32 divided by the golden ratio: its multiples fall into the widest gap each time.
        const STEP: u32 = 2_654_435_769;
        let most = usize::try_from(bounds.max_lingering).unwrap_or(usize::MAX);
        if bounds.linger.is_zero() || most == 0 {
            return;
        }
        while self.held.len() >= most {
            self.held.pop_first();
        }
        self.numbered = self.numbered.wrapping_add(1);
        let part = f64::from(self.numbered.wrapping_mul(STEP)) / f64::from(u32::MAX);
        let due = now + bounds.linger.mul_f64(0.5 + part);
        self.held.insert((due, self.numbered), stream);
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.held.first_key_value().map(|((due, _), _)| *due)
    }

    pub(super) fn close(&mut self, now: Instant) {
        while self.due().is_some_and(|due| due <= now) {
            self.held.pop_first();
        }
    }
}
