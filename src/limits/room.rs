//! Whether there is room: then what is limited by default refuses nobody.
//!
//! Room is short while one of [`Short`] is. Who finds out says so here ([`Room::set`]); who decides asks.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

use tokio::sync::Notify;

use super::processor::ProcessorUse;
use crate::telemetry::registry::labels;

labels! {
    /// Of what there is no room.
    Short, "kind" {
        /// Bytes of the memory budget.
        Memory = "memory",
        /// Descriptors of the process, or connections, where their number is set.
        Descriptors = "descriptors",
        /// The processor time that the agent may use.
        Processor = "processor",
    }
}

/// Whether there is room. There is at first.
#[derive(Debug, Default)]
pub struct Room {
    short: AtomicU8,
    returned: Notify,
    /// Of the processor, for people: lately, and when it became short.
    lately: UseOfProcessor,
    when_short: UseOfProcessor,
}

/// In thousandths of a core.
#[derive(Debug, Default)]
struct UseOfProcessor {
    ran: AtomicU32,
    waited: AtomicU32,
}

impl UseOfProcessor {
    fn set(&self, to: ProcessorUse) {
        self.ran.store(to.ran, Relaxed);
        self.waited.store(to.waited, Relaxed);
    }

    fn get(&self) -> ProcessorUse {
        ProcessorUse { ran: self.ran.load(Relaxed), waited: self.waited.load(Relaxed) }
    }
}

impl Room {
    /// Whether nothing is short.
    pub fn is_there(&self) -> bool {
        self.short.load(Relaxed) == 0
    }

    /// Whether this is short.
    pub fn is_short(&self, of: Short) -> bool {
        self.short.load(Relaxed) & of.bit() != 0
    }

    /// Whether something is short that connections hold.
    pub(super) fn is_short_of_places(&self) -> bool {
        self.is_short(Short::Memory) || self.is_short(Short::Descriptors)
    }

    /// Whether processor time is short, and nothing else.
    pub(super) fn lacks_processor_alone(&self) -> bool {
        self.short.load(Relaxed) == Short::Processor.bit()
    }

    /// Says whether this is short.
    pub fn set(&self, of: Short, short: bool) {
        if short {
            self.short.fetch_or(of.bit(), Relaxed);
        } else if self.short.fetch_and(!of.bit(), Relaxed) == of.bit() {
            self.returned.notify_waiters();
        }
    }

    /// Says what was used of the processor lately.
    pub fn set_processor_use(&self, lately: ProcessorUse) {
        self.lately.set(lately);
    }

    /// Says by what it becomes short.
    pub fn processor_is_short_by(&self, lately: ProcessorUse) {
        self.when_short.set(lately);
    }

    /// What that was; nothing while nobody calls.
    pub fn processor_use(&self) -> ProcessorUse {
        self.lately.get()
    }

    /// What it was when processor time became short last.
    pub fn processor_use_when_short(&self) -> ProcessorUse {
        self.when_short.get()
    }

    /// Waits until there is room.
    pub async fn returns(&self) {
        loop {
            let returned = self.returned.notified();
            if self.is_there() {
                return;
            }
            returned.await;
        }
    }
}

impl Short {
    fn bit(self) -> u8 {
        match self {
            Self::Memory => 1,
            Self::Descriptors => 2,
            Self::Processor => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn room_is_short_while_one_thing_is() {
        let room = Room::default();
        assert!(room.is_there());
        room.set(Short::Memory, true);
        room.set(Short::Processor, true);
        room.set(Short::Memory, false);
        assert!(!room.is_there() && room.is_short(Short::Processor) && !room.is_short(Short::Memory));
        let (returned, ()) = tokio::join!(room.returns(), async { room.set(Short::Processor, false) });
        assert!(room.is_there());
        returned
    }
}
