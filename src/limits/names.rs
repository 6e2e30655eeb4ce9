//! What the kernel keeps of the processes that callers have shown, and who holds it.
//!
//! For each process that the agent asks after, the kernel makes names: of its pidfd, and of its `/proc/PID` where that is read. They
//! are charged to the agent. It drops them by itself; but whoever has opened the same holds them for as long as it likes, and the
//! agent pays for them when the process has ended and its connection is closed. The kernel says how much it keeps, and not for whom.
//!
//! Of pidfds it can be found out once a connection has ended ([`pins`](crate::peer::pins)): a family holds those of its processes
//! that somebody has open. Of `/proc/PID` it cannot: what is kept beyond that is held by the families whose processes were
//! read, by how many were of late, and no more than these can have left. What nobody can have left is nobody's.
//! They hold it as they hold what their connections take: who holds more than its share gets no further connection while memory is
//! short.
//!
//! Nobody says when a name is let go. What was found stays found as long as the kernel keeps as much, and else fades.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{
    accounts::Accounts,
    caller::CallerKey,
    holding::{HeldNames, OF_PROCESS},
};

/// What the kernel keeps of a pidfd that somebody holds, in bytes. Measured: 0.9 KiB.
const OF_PIDFD: u64 = 1024;
/// Of what is found beyond what is kept one part in so many is forgotten by each look, of which there are four a second: what is kept
/// is no exact number, and less for a moment is not less.
const PINNED_FADES: u64 = 256;
const READ_FADES: u64 = 64;
/// Less is nothing.
const LITTLE: u64 = 1024;

/// What the kernel keeps of names, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeptOfNames {
    /// As far as nothing else can be it, whatever connections hold.
    pub least: u64,
    /// As far as it can be.
    pub most: u64,
}

impl Accounts {
    /// The kernel keeps so much of names now.
    pub(super) fn names_are(&mut self, KeptOfNames { least, most }: KeptOfNames) {
        let sum = |of: fn(&HeldNames) -> &AtomicU64| -> u64 {
            self.groups
                .values()
                .map(|account| of(&account.held.names).load(Relaxed))
                .fold(0, u64::saturating_add)
        };
        let (pinned, read) = (sum(|names| &names.pinned), sum(|names| &names.read));
        let of_pinned = pinned.min(most);
        let of_read = read.min(least.saturating_sub(of_pinned));
        self.read_kept = least.saturating_sub(of_pinned);
        for account in self.groups.values() {
            let names = &account.held.names;
            let own =
                [(&names.pinned, of_pinned, pinned, PINNED_FADES), (&names.read, of_read, read, READ_FADES)];
            let before = names.pinned.load(Relaxed);
            let holds = own.map(|(own, held, all, fades)| part(held, fade(own, held, all, fades), all));
            names.forgotten.fetch_add(before.saturating_sub(names.pinned.load(Relaxed)), Relaxed);
            fade(&names.in_vain, of_read, read, READ_FADES);
            account.held.set_names(holds.iter().sum(), &self.node);
        }
    }

    /// A process of a caller is looked at in `/proc`, with a connection or without.
    pub(super) fn reads_process(&mut self, caller: CallerKey, group: u64, pid: i32) {
        if let Some(account) = self.remembered(caller, group) {
            account.held.names.reads_process(pid);
        }
    }

    /// A process of a user was read to find out whom to charge for its connection, which is not let in yet.
    pub(super) fn reads_in_vain(&mut self, user: CallerKey, group: u64) {
        if let Some(account) = self.remembered(user, group) {
            account.held.names.in_vain.fetch_add(OF_PROCESS, Relaxed);
        }
    }

    /// It is let in.
    pub(super) fn read_not_in_vain(&self, group: u64) {
        if let Some(account) = self.groups.get(&group) {
            let less = |in_vain: u64| Some(in_vain.saturating_sub(OF_PROCESS));
            let _before = account.held.names.in_vain.fetch_update(Relaxed, Relaxed, less);
        }
    }

    /// Bytes of names, at most, that the kernel keeps of processes of a user that were read in vain.
    pub(super) fn read_in_vain(&self, group: u64) -> u64 {
        let in_vain = self.groups.get(&group).map_or(0, |account| account.held.names.in_vain.load(Relaxed));
        in_vain.min(self.read_kept)
    }

    /// Somebody holds the names of so many processes of a caller; of so many it is not known.
    pub(super) fn found_names(&mut self, caller: CallerKey, group: u64, held: u64, unknown: u64) {
        if let Some(account) = self.remembered(caller, group) {
            let names = &account.held.names;
            names.pinned.fetch_add(held.saturating_mul(OF_PIDFD), Relaxed);
            names.read.fetch_add(unknown.saturating_mul(OF_PIDFD), Relaxed);
        }
    }

    /// Of how many processes of which groups, since this was last asked, what was found is forgotten.
    pub(super) fn names_forgotten(&mut self) -> HashMap<u64, u64, ahash::RandomState> {
        let mut forgotten = std::mem::take(&mut self.forgotten);
        for (group, account) in &self.groups {
            let bytes = account.held.names.forgotten.load(Relaxed);
            let whole = bytes - bytes % OF_PIDFD;
            if whole > 0 {
                account.held.names.forgotten.fetch_sub(whole, Relaxed);
                *forgotten.entry(*group).or_default() += whole;
            }
        }
        forgotten.values_mut().for_each(|bytes| *bytes = bytes.div_ceil(OF_PIDFD));
        forgotten
    }

    /// Bytes of names that somebody holds.
    pub(super) fn names_held(&self) -> u64 {
        self.groups.values().map(|account| account.held.names.bytes()).fold(0, u64::saturating_add)
    }

    /// Whether somebody may hold names.
    pub(super) fn may_hold_names(&self) -> bool {
        self.groups.values().any(|account| account.held.names.pinned.load(Relaxed) > 0)
    }
}

/// Forgets a part of what is `own`, where of `all` that were found no more than so many bytes are held. Returns what it was.
fn fade(own: &AtomicU64, held: u64, all: u64, fades: u64) -> u64 {
    let before = own.load(Relaxed);
    let goes = part(all.saturating_sub(held), before, all).div_ceil(fades);
    own.fetch_sub(if before <= LITTLE && held < all { before } else { goes }, Relaxed);
    before
}

/// What of `all` goes to one who has `own` of `whole`.
pub(crate) fn part(all: u64, own: u64, whole: u64) -> u64 {
    let part = u128::from(all) * u128::from(own) / u128::from(whole.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::limits::{holding::NodeHeld, since_start::SinceStart};

    const KIB: u64 = 1024;

    fn accounts() -> Accounts {
        Accounts::new(Arc::new(NodeHeld::new(Arc::default(), SinceStart::default())))
    }

    fn read(accounts: &mut Accounts, uid: u32, pids: std::ops::Range<i32>) {
        pids.for_each(|pid| accounts.reads_process(CallerKey::Uid(uid), uid.into(), pid));
    }

    fn pin(accounts: &mut Accounts, uid: u32, processes: u64) {
        accounts.found_names(CallerKey::Uid(uid), uid.into(), processes, 0);
    }

    fn held(accounts: &Accounts) -> [u64; 3] {
        [1, 2, 3].map(|uid| accounts.of_group(uid).bytes / KIB)
    }

    fn exactly(kib: u64) -> KeptOfNames {
        KeptOfNames { least: kib * KIB, most: kib * KIB }
    }

    #[test]
    fn names_are_held_by_those_whose_processes_they_are_of() {
        let mut accounts = accounts();
        accounts.names_are(exactly(1000));
        assert_eq!(held(&accounts), [0, 0, 0], "nobody can have left any");
        pin(&mut accounts, 1, 300);
        read(&mut accounts, 2, 1..101);
        accounts.names_are(exactly(1000));
        assert_eq!(held(&accounts), [300, 200, 0], "no more than they can have left");
        accounts.names_are(exactly(400));
        assert_eq!(held(&accounts), [300, 100, 0], "who is known to hold some does");
        accounts.names_are(KeptOfNames { least: 0, most: 400 * KIB });
        assert_eq!(held(&accounts), [300, 0, 0]);
        accounts.names_are(exactly(150));
        assert_eq!(held(&accounts), [150, 0, 0]);
        assert_eq!(accounts.names_held(), accounts.node.bytes());
    }

    /// Whoever connects while others hold names, whatever is measured meanwhile.
    #[test]
    fn names_do_not_change_hands() {
        let mut accounts = accounts();
        pin(&mut accounts, 1, 5000);
        for at in 0..100 {
            // Two processes that connect in turn, again and again.
            read(&mut accounts, 2, 70..72);
            read(&mut accounts, 2, 78..80);
            accounts.names_are(exactly(if at % 2 == 0 { 5000 } else { 500 }));
        }
        accounts.names_are(exactly(5000));
        let [first, second, _] = held(&accounts);
        assert!(first > 3900, "{first}");
        assert!(second <= 8, "{second}");
    }

    #[test]
    fn what_was_read_in_vain_counts_until_the_kernel_keeps_less() {
        let mut accounts = accounts();
        for pid in 1..101 {
            accounts.reads_process(CallerKey::Pod([1; 16]), 1, pid);
            accounts.reads_in_vain(CallerKey::Uid(2), 2);
        }
        for _ in 0..10 {
            accounts.read_not_in_vain(2);
        }
        for _ in 0..1000 {
            accounts.names_are(exactly(200));
        }
        assert_eq!((held(&accounts), accounts.read_in_vain(2)), ([200, 0, 0], 90 * OF_PROCESS));
        for _ in 0..1000 {
            accounts.names_are(exactly(20));
        }
        assert_eq!(held(&accounts), [20, 0, 0]);
        assert!(accounts.read_in_vain(2) <= 20 * KIB, "{}", accounts.read_in_vain(2));
    }

    /// One process that tries again and again, and keeps nothing, has nobody of its user refused.
    #[test]
    fn what_was_read_in_vain_is_no_more_than_the_kernel_keeps() {
        let mut accounts = accounts();
        for (kept, want) in [(0, 0), (50, 50), (0, 0), (5000, 2000)] {
            accounts.names_are(exactly(kept));
            for _ in 0..1000 {
                accounts.reads_process(CallerKey::Pod([1; 16]), 1, 7);
                accounts.reads_in_vain(CallerKey::Uid(2), 2);
            }
            assert!(accounts.read_in_vain(2) >= want * KIB, "{kept} KiB");
            assert!(kept > 2000 || accounts.read_in_vain(2) == want * KIB, "{kept} KiB");
        }
    }

    /// What is forgotten may be found once more: whoever has let go of a name may hold it again.
    #[test]
    fn what_fades_is_forgotten_process_by_process() {
        let mut accounts = accounts();
        pin(&mut accounts, 1, 4000);
        pin(&mut accounts, 2, 1000);
        accounts.names_are(exactly(5000));
        assert!(accounts.names_forgotten().is_empty());
        let mut forgotten = [0; 3];
        for _ in 0..10_000 {
            accounts.names_are(exactly(1000));
            for (group, processes) in accounts.names_forgotten() {
                forgotten[usize::try_from(group).unwrap()] += processes;
            }
        }
        let [_, first, second] = forgotten;
        assert!((3190..=3210).contains(&first) && (790..=810).contains(&second), "{forgotten:?}");
    }

    #[test]
    fn what_is_let_go_is_forgotten_in_the_end() {
        let mut accounts = accounts();
        pin(&mut accounts, 1, 5000);
        read(&mut accounts, 3, 1..2000);
        for _ in 0..10_000 {
            accounts.names_are(KeptOfNames::default());
        }
        accounts.forget_paid();
        assert!(!accounts.may_hold_names());
        assert!(accounts.groups.is_empty(), "{:?}", accounts.groups);
        assert_eq!(accounts.node.bytes(), 0);
    }
}
