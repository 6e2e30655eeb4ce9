//! How much of its answers a connection may leave unread: who makes one waits until it fits.
//!
//! A peer that asks and never reads pins what was made for it. No peer is kept from sending for that: who reads slowly needs
//! its WINDOW_UPDATEs read. But a further answer is made only while those that are unsent, and those in the making as they
//! are reckoned, leave room for it in [`UNSENT`], or when there are none. Who waits is served in the order of arrival.

use std::collections::VecDeque;

use crate::limits::budget::{ANSWER_AT_FIRST, ANSWER_AT_LEAST, UNSENT};

/// The answers of one connection. What is done in which order is up to its user; the time plays no part.
#[derive(Debug)]
pub(super) struct Unsent {
    /// What their parts take that have not left.
    held: u64,
    /// What those are reckoned at that are being made.
    reckoned: u64,
    /// What the next one is reckoned at: as much as the largest of late.
    next: u64,
    waiting: VecDeque<usize>,
}

impl Default for Unsent {
    fn default() -> Self {
        Self { held: 0, reckoned: 0, next: ANSWER_AT_FIRST, waiting: VecDeque::new() }
    }
}

impl Unsent {
    fn fits(&self) -> bool {
        let under_way = self.held.saturating_add(self.reckoned);
        under_way == 0 || under_way.saturating_add(self.next) <= UNSENT
    }

    fn reckon(&mut self) -> u64 {
        self.reckoned += self.next;
        self.next
    }

    /// Begins an answer if it fits and nobody waits for that. Returns what it is reckoned at, to be given back to
    /// [`Self::end`].
    pub(super) fn begin(&mut self) -> Option<u64> {
        (self.waiting.is_empty() && self.fits()).then(|| self.reckon())
    }

    /// Who cannot begin waits, until [`Self::next`] names it.
    pub(super) fn wait(&mut self, who: usize) {
        self.waiting.push_back(who);
    }

    /// It waits no more.
    pub(super) fn leave(&mut self, who: usize) {
        self.waiting.retain(|waiting| *waiting != who);
    }

    /// Whoever has waited longest, if its answer fits, with what it is reckoned at. To be asked again until there is none,
    /// whenever something has ended.
    pub(super) fn next(&mut self) -> Option<(usize, u64)> {
        if !self.fits() {
            return None;
        }
        let who = self.waiting.pop_front()?;
        Some((who, self.reckon()))
    }

    /// An answer was made, or will not be for now.
    pub(super) fn end(&mut self, reckoned: u64) {
        self.reckoned -= reckoned;
    }

    /// A part was made that takes so much.
    pub(super) fn made(&mut self, bytes: u64) {
        self.held += bytes;
        self.next = bytes.max(self.next - self.next / 8).clamp(ANSWER_AT_LEAST, UNSENT);
    }

    /// It has left.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.held -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    #[test]
    fn answers_are_reckoned_by_the_last_ones() {
        let mut unsent = Unsent::default();
        let at_first: Vec<u64> = std::iter::from_fn(|| unsent.begin()).collect();
        assert_eq!(at_first, [ANSWER_AT_FIRST; 4]);
        for reckoned in at_first {
            unsent.end(reckoned);
            unsent.made(600);
            unsent.sent(600);
        }
        for _ in 0..16 {
            unsent.made(600);
            unsent.sent(600);
        }
        let later: Vec<u64> = std::iter::from_fn(|| unsent.begin()).collect();
        assert_eq!(later, [ANSWER_AT_LEAST; 16], "small ones go side by side");
        for reckoned in later {
            unsent.end(reckoned);
        }
        unsent.made(200_000);
        assert_eq!(unsent.begin(), None, "one that is larger than all there may be is alone");
        unsent.sent(200_000);
        assert_eq!((unsent.begin(), unsent.begin()), (Some(UNSENT), None));
    }

    proptest! {
        /// Whatever is begun, made and sent in whatever order: nothing is begun that does not fit, the first that waits is
        /// the first to go, and when all has left somebody can begin.
        #[test]
        fn what_does_not_fit_waits_its_turn(events in vec((0u8..5, any::<Index>(), 0u64..90_000), 0..200)) {
            let mut unsent = Unsent::default();
            let (mut making, mut parts, mut waits) = (Vec::new(), Vec::new(), VecDeque::new());
            for (nth, (kind, index, bytes)) in events.into_iter().enumerate() {
                let under_way = unsent.held + unsent.reckoned;
                match kind {
                    0 | 1 => match unsent.begin() {
                        Some(reckoned) => {
                            prop_assert!(waits.is_empty());
                            prop_assert!(under_way == 0 || under_way + reckoned <= UNSENT);
                            making.push(reckoned);
                        }
                        None => {
                            prop_assert!(under_way > 0 || !waits.is_empty());
                            unsent.wait(nth);
                            waits.push_back(nth);
                        }
                    },
                    2 if !making.is_empty() => {
                        unsent.end(making.swap_remove(index.index(making.len())));
                        unsent.made(bytes);
                        parts.push(bytes);
                    }
                    3 if !parts.is_empty() => unsent.sent(parts.swap_remove(index.index(parts.len()))),
                    4 if !waits.is_empty() => {
                        let who = waits.remove(index.index(waits.len())).unwrap();
                        unsent.leave(who);
                    }
                    _ => {}
                }
                while let Some((who, reckoned)) = unsent.next() {
                    prop_assert_eq!(Some(who), waits.pop_front());
                    making.push(reckoned);
                }
                prop_assert!(!unsent.fits() || waits.is_empty(), "nobody waits for nothing");
            }
            for reckoned in making {
                unsent.end(reckoned);
            }
            for bytes in parts {
                unsent.sent(bytes);
            }
            prop_assert_eq!((unsent.held, unsent.reckoned), (0, 0));
            prop_assert_eq!(unsent.next().map(|(who, _)| who), waits.pop_front());
        }
    }
}
