//! What the kernel keeps of the processes that callers have shown, and who holds it.
//!
//! For each process that the agent asks after, the kernel makes names: of its pidfd, and of its `/proc/PID` where that is read. They
//! are charged to the agent. It drops them by itself; but whoever has opened the same holds them for as long as it likes, and the
//! agent pays for them when the process has ended and its connection is closed. The kernel says how much it keeps, and
//! not for whom. So what this has grown by since the last look is held by the families whose processes connected meanwhile, by how
//! many did; and what it has shrunk by, all hold less of. They hold it as they hold what their connections take: who holds more
//! than its share gets no further connection while memory is short.

use super::{accounts::Accounts, caller::CallerKey};

/// A group without a connection is not remembered for fewer bytes.
const LITTLE: u64 = 32 * 1024;

impl Accounts {
    /// The kernel keeps so many bytes of names now.
    pub(super) fn names_are(&mut self, all: u64) {
        let shown: Vec<u32> = self.groups.values().map(|account| account.held.names.take_shown()).collect();
        let all_shown: u64 = shown.iter().map(|shown| u64::from(*shown)).sum();
        let known = self.names_held().saturating_add(self.names_of_nobody);
        let grown = all.saturating_sub(known);
        let mut held = 0_u64;
        for (account, shown) in self.groups.values().zip(shown) {
            let before = account.held.names.bytes();
            let now = if all < known {
                part(all, before, known)
            } else {
                before.saturating_add(part(grown, shown.into(), all_shown))
            };
            let now = if now < LITTLE && account.has_none() { 0 } else { now };
            account.held.set_names(now, &self.node);
            held = held.saturating_add(now);
        }
        self.names_of_nobody = all.saturating_sub(held);
    }

    /// A process of a caller was asked after, and no connection let in.
    pub(super) fn was_shown_in_vain(&mut self, caller: CallerKey, group: u64, pid: u32) {
        if let Some(account) = self.remembered(caller, group) {
            account.held.names.shows(pid);
        }
    }

    /// Bytes of names that a group holds.
    pub(super) fn names_of(&self, group: u64) -> u64 {
        self.groups.get(&group).map_or(0, |account| account.held.names.bytes())
    }

    /// Bytes of names that somebody holds.
    pub(super) fn names_held(&self) -> u64 {
        self.groups.values().map(|account| account.held.names.bytes()).fold(0, u64::saturating_add)
    }
}

/// What of `all` goes to one who has `own` of `whole`.
fn part(all: u64, own: u64, whole: u64) -> u64 {
    let part = u128::from(all) * u128::from(own) / u128::from(whole.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::limits::{accounts::OpenPlace, holding::NodeHeld, since_start::SinceStart};

    const KIB: u64 = 1024;

    fn show(accounts: &mut Accounts, uid: u32, pids: std::ops::Range<u32>) -> OpenPlace {
        let (place, holding) = accounts.add(CallerKey::Uid(uid), u64::from(uid), 0);
        pids.for_each(|pid| holding.shows(pid));
        place
    }

    fn held(accounts: &Accounts) -> [u64; 3] {
        [1, 2, 3].map(|uid| accounts.of_group(uid).1 / KIB)
    }

    #[test]
    fn what_is_kept_is_held_by_those_whose_processes_it_may_be_of() {
        let mut accounts = Accounts::new(Arc::new(NodeHeld::new(Arc::default(), SinceStart::default())));
        let _neighbour = show(&mut accounts, 3, 0..0);
        accounts.names_are(100 * KIB);
        assert_eq!(held(&accounts), [0, 0, 0], "nobody showed any");
        // The first one's connections are closed.
        let first = show(&mut accounts, 1, 1..301);
        accounts.take(&first);
        let second = show(&mut accounts, 2, 301..401);
        accounts.names_are(500 * KIB);
        assert_eq!(held(&accounts), [300, 100, 0]);
        accounts.names_are(500 * KIB);
        let _again = show(&mut accounts, 2, 400..401);
        accounts.names_are(700 * KIB);
        assert_eq!(held(&accounts), [300, 100, 0], "one process that connects again makes none");
        accounts.names_are(350 * KIB);
        assert_eq!(held(&accounts), [150, 50, 0], "all hold less");
        assert_eq!(accounts.names_held(), accounts.node.bytes());
        accounts.take(&second);
        assert_eq!(held(&accounts), [150, 50, 0], "though they have no connection");
        accounts.names_are(50 * KIB);
        accounts.forget_paid();
        assert_eq!(held(&accounts), [0, 7, 0], "little is remembered of those who have one alone");
        accounts.names_are(0);
        assert_eq!((held(&accounts), accounts.node.bytes()), ([0; 3], 0));
        for pid in 1..9 {
            accounts.was_shown_in_vain(CallerKey::Uid(1), 1, pid);
        }
        accounts.names_are(90 * KIB);
        assert_eq!(held(&accounts), [90, 0, 0], "those that were refused count");
    }
}
