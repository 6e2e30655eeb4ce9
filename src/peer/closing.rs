//! Threads that close sockets in which callers have left descriptors.
//!
//! The kernel closes those in the thread that closes the socket, and whoever sent them chooses how long that takes: as
//! long as SO_LINGER says, as long as a server of FUSE does not answer, as long as a huge file is freed. So it happens
//! here, and nothing else does. A close that takes too long is interrupted; one that cannot be keeps its thread, and
//! its caller's family has no more than [`SHARE`] of them. What comes behind it waits, at the place it had at the gate,
//! which bounds it. Nothing here is waited for, the agent's end neither.
//!
//! Absent on Linux 6.16 and newer, where the agent's own socket takes no descriptors.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Bound::{Excluded, Unbounded},
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use crate::os::interrupt::Interrupts;

/// How many threads there are.
const THREADS: usize = 8;
/// How many of them one family may have.
const SHARE: usize = 2;
/// What a thread may need of a stack, in bytes.
const STACK: usize = 64 * 1024;
/// How many sockets without a place at the gate may wait before no more connections are accepted.
const PLACELESS: usize = 256;
/// How long a close may take before it is interrupted, and how often it then is. Where others of the same family
/// wait behind it, it is given less, so that a crowd of them is through soon.
const PATIENCE: Duration = Duration::from_millis(100);
const LEAST_PATIENCE: Duration = Duration::from_millis(1);

/// What holds a place at the gate, until it is dropped.
pub(super) type HeldPlace = Box<dyn Send>;

/// The threads. Once this is dropped they end, each when what it can close is closed.
#[derive(Debug)]
pub(super) struct Closers(Arc<ClosingQueue>);

#[derive(Debug, Default)]
struct ClosingQueue {
    state: Mutex<ClosingState>,
    changed: Condvar,
}

/// Written by whoever hands something over, and by the threads.
#[derive(Debug, Default)]
struct ClosingState {
    /// By family; without those that have nothing here.
    lines: BTreeMap<u64, ClosingLine>,
    /// The family that was served last.
    last: u64,
    /// Sockets without a place, waiting or being closed.
    placeless: usize,
    ended: bool,
}

#[derive(Debug, Default)]
struct ClosingLine {
    waiting: VecDeque<Leftover>,
    /// Threads that close for it.
    busy: usize,
}

/// A socket that may hold descriptors.
struct Leftover {
    socket: OwnedFd,
    place: Option<HeldPlace>,
}

impl std::fmt::Debug for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.socket.fmt(f)
    }
}

impl Closers {
    /// Starts the threads.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start() -> io::Result<Self> {
        let closers = Self(Arc::default());
        for _ in 0..THREADS {
            let queue = Arc::clone(&closers.0);
            thread::Builder::new().name("closer".to_owned()).stack_size(STACK).spawn(move || queue.work())?;
        }
        Ok(closers)
    }

    /// Closes `socket` soon, and then gives its place back. Never blocks.
    pub(super) fn close(&self, socket: OwnedFd, family: u64, place: Option<HeldPlace>) {
        let mut state = self.0.lock();
        state.placeless += usize::from(place.is_none());
        state.lines.entry(family).or_default().waiting.push_back(Leftover { socket, place });
        drop(state);
        self.0.changed.notify_one();
    }

    /// Whether so many sockets without a place wait that no more can be taken.
    pub(super) fn are_full(&self) -> bool {
        self.0.lock().placeless >= PLACELESS
    }

    /// The family with the most sockets here.
    pub(super) fn longest(&self) -> Option<u64> {
        let state = self.0.lock();
        let longest = state.lines.iter().max_by_key(|(_, line)| line.waiting.len() + line.busy);
        longest.map(|(family, _)| *family)
    }
}

impl Drop for Closers {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl ClosingQueue {
    fn lock(&self) -> MutexGuard<'_, ClosingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let interrupts = Interrupts::of_this_thread();
        if let Err(error) = &interrupts {
            tracing::warn!(%error, "closing what callers leave behind cannot be interrupted");
        }
        while let Some((family, Leftover { socket, place }, behind)) = self.next() {
            let behind = u32::try_from(behind).unwrap_or(u32::MAX).saturating_add(1);
            let patience = (PATIENCE / behind).max(LEAST_PATIENCE);
            match &interrupts {
                Ok(interrupts) => interrupts.during(patience, LEAST_PATIENCE, || drop(socket)),
                Err(_) => drop(socket),
            }
            self.done(family, place);
        }
    }

    /// Waits for a socket that may be closed: its family, itself, and how many of the family wait behind it. `None`
    /// at the end.
    fn next(&self) -> Option<(u64, Leftover, usize)> {
        let mut state = self.lock();
        loop {
            if let Some(next) = state.next() {
                return Some(next);
            }
            if state.ended {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, family: u64, place: Option<HeldPlace>) {
        let mut state = self.lock();
        state.placeless -= usize::from(place.is_none());
        if let Some(line) = state.lines.get_mut(&family) {
            line.busy -= 1;
            if line.busy == 0 && line.waiting.is_empty() {
                state.lines.remove(&family);
            }
        }
        drop(state);
        // Whoever waits may have waited for the family's share.
        self.changed.notify_one();
        drop(place);
    }
}

impl ClosingState {
    /// Takes what is next: families in turn.
    fn next(&mut self) -> Option<(u64, Leftover, usize)> {
        let later = (Excluded(self.last), Unbounded);
        let may = |line: &ClosingLine| line.busy < SHARE && !line.waiting.is_empty();
        let mut lines = self.lines.range(later).chain(self.lines.range(..=self.last));
        let (family, _) = lines.find(|(_, line)| may(line))?;
        let family = *family;
        let line = self.lines.get_mut(&family)?;
        let leftover = line.waiting.pop_front()?;
        line.busy += 1;
        self.last = family;
        Some((family, leftover, line.waiting.len()))
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream, sync::mpsc};

    use super::*;

    /// Sockets whose family's threads are all held up wait; those of others do not.
    #[test]
    fn a_family_has_its_share_and_families_take_turns() {
        let mut state = ClosingState::default();
        let leave = |state: &mut ClosingState, family: u64| {
            let socket = UnixStream::pair().unwrap().0.into();
            state.lines.entry(family).or_default().waiting.push_back(Leftover { socket, place: None });
        };
        for family in [7, 7, 7, 7, 9, 8] {
            leave(&mut state, family);
        }
        let mut order = Vec::new();
        while let Some((family, _, behind)) = state.next() {
            order.push((family, behind));
        }
        assert_eq!(order, [(7, 3), (8, 0), (9, 0), (7, 2)]);
        state.lines.get_mut(&7).unwrap().busy -= 1;
        assert_eq!(state.next().map(|(family, _, behind)| (family, behind)), Some((7, 1)));
        assert!(state.next().is_none());
    }

    #[test]
    fn a_place_is_given_back_once_its_socket_is_closed() {
        let closers = Closers::start().unwrap();
        let (tell, told) = mpsc::channel::<()>();
        let (socket, mut other) = UnixStream::pair().unwrap();
        closers.close(socket.into(), 1, Some(Box::new(tell)));
        assert_eq!(told.recv(), Err(mpsc::RecvError), "nothing holds it any more");
        assert_eq!(other.read(&mut [0]).unwrap(), 0, "it is closed");
        assert!(!closers.are_full());
    }
}
