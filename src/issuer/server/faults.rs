//! What is wrong with the server, in one place and for people: of what it is needed for, what fails, why, and since when.
//! It is gone when the same works again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::os::clock::Clock;

/// How long it is told that signing failed: nobody may have asked for it since, and then it is not known.
const SIGNING_TOLD: Duration = Duration::from_secs(600);

/// What the server is needed for. What comes first is the likely reason of what comes behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ServerUse {
    Connection,
    Sync,
    OwnSvid,
    X509Svids,
    JwtSvids,
}

impl ServerUse {
    /// What is said before the reason, where that does not say it.
    fn fails(self) -> &'static str {
        match self {
            Self::Connection | Self::OwnSvid => "",
            Self::Sync => "cannot sync with the server: ",
            Self::X509Svids => "cannot get X.509-SVIDs signed: ",
            Self::JwtSvids => "cannot get JWT-SVIDs signed: ",
        }
    }

    fn is_told_for(self) -> Duration {
        match self {
            Self::Connection | Self::Sync | Self::OwnSvid => Duration::MAX,
            Self::X509Svids | Self::JwtSvids => SIGNING_TOLD,
        }
    }
}

#[derive(Debug)]
struct ServerFault {
    why: String,
    since: SystemTime,
    seen: Instant,
}

/// What fails at the moment.
#[derive(Debug)]
pub(super) struct ServerFaults {
    clock: Clock,
    of: Mutex<BTreeMap<ServerUse, ServerFault>>,
}

impl ServerFaults {
    /// Nothing does.
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, of: Mutex::default() }
    }

    /// It failed, and not for the first time if it did before.
    pub(super) fn failed(&self, what: ServerUse, why: String) {
        let (since, seen) = (self.clock.now(), Instant::now());
        let mut of = self.lock();
        let fault = of.entry(what).or_insert(ServerFault { why: String::new(), since, seen });
        (fault.why, fault.seen) = (why, seen);
    }

    /// It works.
    pub(super) fn works(&self, what: ServerUse) {
        self.lock().remove(&what);
    }

    /// The first that fails: why, and since when.
    pub(super) fn first(&self) -> Option<(String, SystemTime)> {
        let of = self.lock();
        let (what, fault) = of.iter().find(|(what, fault)| fault.seen.elapsed() < what.is_told_for())?;
        Some((format!("{}{}", what.fails(), fault.why), fault.since))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ServerUse, ServerFault>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_that_fails_is_told_with_its_beginning_until_it_works() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let faults = ServerFaults::new(Clock::starting_at(start));
        let said =
            || faults.first().map(|(why, since)| (why, since.duration_since(start).unwrap().as_secs()));
        assert_eq!(said(), None);
        faults.failed(ServerUse::JwtSvids, "late".to_owned());
        assert_eq!(said(), Some(("cannot get JWT-SVIDs signed: late".to_owned(), 0)));
        tokio::time::advance(Duration::from_secs(5)).await;
        faults.failed(ServerUse::Sync, "late".to_owned());
        tokio::time::advance(Duration::from_secs(5)).await;
        faults.failed(ServerUse::Sync, "Internal: database".to_owned());
        assert_eq!(said(), Some(("cannot sync with the server: Internal: database".to_owned(), 5)));
        faults.failed(ServerUse::Connection, "refused".to_owned());
        assert_eq!(said(), Some(("refused".to_owned(), 10)));
        faults.works(ServerUse::Connection);
        faults.works(ServerUse::Sync);
        assert_eq!(said(), Some(("cannot get JWT-SVIDs signed: late".to_owned(), 0)));
        tokio::time::advance(SIGNING_TOLD).await;
        assert_eq!(said(), None, "nobody asked since");
        faults.failed(ServerUse::JwtSvids, "late".to_owned());
        assert!(said().is_some());
        faults.works(ServerUse::JwtSvids);
        assert_eq!(said(), None);
    }
}
