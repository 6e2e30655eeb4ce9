//! Notices that the files of the configuration change, where `watch_config` says to.
//!
//! They are looked at every two seconds, by the thread for what may wait: that sees a ConfigMap's links, files that come to
//! be, and any file system, and needs nothing of the kernel's that other users could have used up.

use std::time::Duration;

use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until},
};

use super::errands::Errands;
use crate::{
    config::{Config, Sources},
    os::clock::beat,
};

/// How often they are looked at.
const EVERY: Duration = Duration::from_secs(2);
/// How soon again after a change. It is acted upon when two looks found the same: whoever writes has finished.
const AGAIN: Duration = Duration::from_millis(500);

/// After so many looks that found a change, each another one, what is there is acted upon: whoever writes may never finish, and
/// half of a file changes nothing.
const MOST_UNLIKE: u32 = 5;

/// The files in force, and what was seen of them.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    known: Sources,
    /// Something else was found at the last look.
    found: Option<Sources>,
    /// How many looks in a row have found something else than the one before, and than what is known.
    unlike: u32,
    looking: Option<oneshot::Receiver<Sources>>,
    /// When the next look is.
    next: Instant,
    on: bool,
}

impl ConfigWatch {
    /// Of the files that `config` was read from.
    pub(super) fn of(config: &Config) -> Self {
        let (known, next) = (config.sources.clone(), beat(EVERY));
        Self { known, found: None, unlike: 0, looking: None, next, on: config.agent.watch_config }
    }

    /// These are in force now.
    pub(super) fn follow(&mut self, config: &Config) {
        if self.known != config.sources {
            self.known.clone_from(&config.sources);
            (self.found, self.unlike) = (None, 0);
            // It was of the files before.
            self.looking = None;
        }
    }

    /// Waits until they have changed. What was found is known from then on, whether a reload takes it or not. Nothing is lost
    /// when the wait is given up.
    pub(super) async fn changed(&mut self, errands: &Errands) {
        if !self.on {
            return std::future::pending().await;
        }
        loop {
            let Some(looking) = &mut self.looking else {
                sleep_until(self.next).await;
                let known = self.known.clone();
                self.looking = Some(errands.begin(move || known.now()));
                continue;
            };
            let now = looking.await;
            self.looking = None;
            let is_settled = now.is_ok_and(|now| self.is_settled(now));
            self.next = if self.found.is_some() { Instant::now() + AGAIN } else { beat(EVERY) };
            if is_settled {
                return;
            }
        }
    }

    fn is_settled(&mut self, now: Sources) -> bool {
        if now == self.known {
            (self.found, self.unlike) = (None, 0);
            return false;
        }
        let is_settled = self.found.as_ref() == Some(&now);
        self.unlike += 1;
        if is_settled || self.unlike >= MOST_UNLIKE {
            (self.known, self.found, self.unlike) = (now, None, 0);
            return true;
        }
        self.found = Some(now);
        false
    }
}
