//! Names of users and groups, from the agent's own user database (NSS).
//!
//! A lookup may ask a directory server and hang, so none ever runs on a runtime thread: misses go to the blocking
//! pool, at most [`WORKERS`] at a time, and a caller waits at most [`PATIENCE`] for all of its names. What was found
//! is believed for [`LIFETIME`]; that there is no such name likewise. That there is no such name is no error, as in
//! SPIRE: the selector is missing, and the numeric one beside it is there. That the database does not answer is
//! something else: what was known before is believed for [`RETRY`] more, and where nothing was, whoever asked is told.
//!
//! Absent on purpose: waking up to refresh. What nobody asks for is not asked again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    unistd::{Gid, Group, Uid, User},
};
use tokio::{sync::Semaphore, time::Instant};

use crate::attest::kept::{Kept, KeptAnswers};

/// How long a name, or its absence, is believed.
const LIFETIME: Duration = Duration::from_secs(60);
/// How long a lookup that failed is not repeated.
const RETRY: Duration = Duration::from_secs(5);
/// How long an attestation waits for its names.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lookups at a time, those that hang included.
const WORKERS: usize = 4;
/// Names kept, of users and groups together.
const CAPACITY: usize = 2048;

/// Whose name is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum NameId {
    /// A user's.
    User(u32),
    /// A group's.
    Group(u32),
}

/// A user or group database.
pub(super) type Database = dyn Fn(NameId) -> Result<Option<String>, Errno> + Send + Sync;

/// The cached names. Cheap to clone, all clones are one.
#[derive(Clone)]
pub(super) struct Names {
    known: Arc<Mutex<KnownNames>>,
    workers: Arc<Semaphore>,
    database: Arc<Database>,
    patience: Duration,
}

/// The database did not say whether there is a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unanswered;

/// A name, or that there is none.
pub(super) type NameAnswer = Result<Option<Arc<str>>, Unanswered>;

type KnownNames = KeptAnswers<NameId, NameAnswer>;

impl Names {
    /// Names from the system's database.
    pub(super) fn of_system() -> Self {
        Self::new(Arc::new(system), PATIENCE)
    }

    /// Names from this database; a caller waits for it so long at most.
    pub(super) fn new(database: Arc<Database>, patience: Duration) -> Self {
        let workers = Arc::new(Semaphore::new(WORKERS));
        let known = Arc::new(Mutex::new(KeptAnswers::new(CAPACITY)));
        Self { known, workers, database, patience }
    }

    /// The names of `ids`, in their order.
    pub(super) async fn find(&self, ids: &[NameId]) -> Vec<NameAnswer> {
        let (mut names, missing) = self.known(ids);
        if !missing.is_empty() {
            let found = self.look_up(missing).await;
            for (id, name) in ids.iter().zip(&mut names) {
                if name.is_err()
                    && let Some(found) = found.get(id)
                {
                    name.clone_from(found);
                }
            }
        }
        names
    }

    /// What is known now, without waiting, and what is not.
    fn known(&self, ids: &[NameId]) -> (Vec<NameAnswer>, Vec<NameId>) {
        let now = Instant::now();
        let mut table = self.table();
        let mut missing = Vec::new();
        let names = ids
            .iter()
            .map(|id| match believed(&mut table, *id, now) {
                Some(name) => name,
                None => {
                    missing.push(*id);
                    Err(Unanswered)
                }
            })
            .collect();
        (names, missing)
    }

    async fn look_up(&self, missing: Vec<NameId>) -> HashMap<NameId, NameAnswer> {
        let deadline = Instant::now() + self.patience;
        let names = self.clone();
        let asked = missing.clone();
        let job = async move {
            let Ok(worker) = Arc::clone(&names.workers).acquire_owned().await else { return HashMap::new() };
            let batch = tokio::task::spawn_blocking(move || {
                // The worker goes back when the lookup returns, not when the caller gives up: a database that
                // hangs holds at most WORKERS threads.
                let found = names.ask(asked, deadline);
                drop(worker);
                found
            });
            batch.await.unwrap_or_default()
        };
        match tokio::time::timeout_at(deadline, job).await {
            Ok(found) => found,
            Err(_late) => {
                tracing::debug!(ids = missing.len(), "user or group lookup takes too long");
                self.give_up(missing)
            }
        }
    }

    /// Asks for each, as long as somebody waits. Runs on a blocking thread.
    fn ask(&self, ids: Vec<NameId>, deadline: Instant) -> HashMap<NameId, NameAnswer> {
        let mut found = HashMap::with_capacity(ids.len());
        for id in ids {
            let now = Instant::now();
            // Another caller may have found it while this one waited for its worker.
            let known = believed(&mut self.table(), id, now);
            let name = match known {
                Some(name) => name,
                None if now > deadline => break,
                None => match (self.database)(id) {
                    Ok(name) => {
                        let name = Ok(name.map(Arc::from));
                        let until = Instant::now() + LIFETIME;
                        self.table().keep(id, Kept::until(until, name.clone()));
                        name
                    }
                    Err(errno) => {
                        tracing::debug!(?id, %errno, "user or group lookup failed");
                        put_off(&mut self.table(), id, Instant::now())
                    }
                },
            };
            found.insert(id, name);
        }
        found
    }

    /// Takes what a late batch has found so far, and lets nobody wait for the rest of it for a while.
    fn give_up(&self, ids: Vec<NameId>) -> HashMap<NameId, NameAnswer> {
        let now = Instant::now();
        let mut table = self.table();
        let mut answer = |id| believed(&mut table, id, now).unwrap_or_else(|| put_off(&mut table, id, now));
        ids.into_iter().map(|id| (id, answer(id))).collect()
    }

    fn table(&self) -> MutexGuard<'_, KnownNames> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn believed(table: &mut KnownNames, id: NameId, now: Instant) -> Option<NameAnswer> {
    table.find(id).and_then(|kept| kept.believed(now)).cloned()
}

/// Believes what was found the last time, however long ago that is, until the lookup that failed is repeated.
fn put_off(table: &mut KnownNames, id: NameId, now: Instant) -> NameAnswer {
    let last = table.find(id).map_or(Err(Unanswered), |kept| kept.last().clone());
    table.keep(id, Kept::until(now + RETRY, last.clone()));
    last
}

fn system(id: NameId) -> Result<Option<String>, Errno> {
    match id {
        NameId::User(uid) => User::from_uid(Uid::from_raw(uid)).map(|user| user.map(|user| user.name)),
        NameId::Group(gid) => Group::from_gid(Gid::from_raw(gid)).map(|group| group.map(|group| group.name)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A database that counts: every answer names the ID and how often it was asked.
    fn counting() -> Names {
        let asked = Mutex::new(HashMap::<NameId, u32>::new());
        let database = move |id| {
            let mut asked = asked.lock().unwrap();
            let times = asked.entry(id).and_modify(|n| *n += 1).or_insert(1);
            match id {
                NameId::User(404) => Ok(None),
                NameId::User(500) if *times == 1 => Err(Errno::EIO),
                NameId::User(501) if *times == 2 => Err(Errno::EIO),
                NameId::User(n) => Ok(Some(format!("user{n}.{times}"))),
                NameId::Group(n) => Ok(Some(format!("group{n}.{times}"))),
            }
        };
        Names::new(Arc::new(database), PATIENCE)
    }

    /// `?` for one that the database does not tell.
    fn text(name: &NameAnswer) -> Option<&str> {
        name.as_ref().map_or(Some("?"), Option::as_deref)
    }

    async fn one(names: &Names, id: NameId) -> Option<String> {
        let found = names.find(&[id]).await;
        assert_eq!(found.len(), 1);
        text(&found[0]).map(str::to_owned)
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_believed_for_its_lifetime() {
        let names = counting();
        let mixed = [NameId::User(1), NameId::Group(1), NameId::User(404), NameId::User(1)];
        let want = [Some("user1.1"), Some("group1.1"), None, Some("user1.1")];
        let found: Vec<_> = names.find(&mixed).await;
        assert_eq!(found.iter().map(text).collect::<Vec<_>>(), want);

        tokio::time::advance(LIFETIME - Duration::from_millis(10)).await;
        assert_eq!(one(&names, NameId::User(1)).await.as_deref(), Some("user1.1"), "still believed");
        tokio::time::advance(Duration::from_millis(20)).await;
        assert_eq!(one(&names, NameId::User(1)).await.as_deref(), Some("user1.2"), "asked again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_no_answer_and_is_tried_again_soon() {
        let names = counting();
        assert_eq!(one(&names, NameId::User(500)).await.as_deref(), Some("?"), "failed");
        assert_eq!(one(&names, NameId::User(500)).await.as_deref(), Some("?"), "not asked at once again");
        tokio::time::advance(RETRY).await;
        assert_eq!(one(&names, NameId::User(500)).await.as_deref(), Some("user500.2"));

        assert_eq!(one(&names, NameId::User(501)).await.as_deref(), Some("user501.1"));
        tokio::time::advance(LIFETIME).await;
        assert_eq!(
            one(&names, NameId::User(501)).await.as_deref(),
            Some("user501.1"),
            "what was known holds"
        );
        tokio::time::advance(RETRY).await;
        assert_eq!(one(&names, NameId::User(501)).await.as_deref(), Some("user501.3"));
    }

    #[tokio::test]
    async fn the_tables_have_a_bound() {
        let names = counting();
        let many: Vec<_> = (0..4000).flat_map(|n| [NameId::User(n), NameId::Group(n)]).collect();
        let found = names.find(&many).await;
        let told = found.iter().filter(|name| matches!(name, Ok(Some(_)))).count();
        assert_eq!(told, 2 * 4000 - 2, "all but user 404 and user 500");
        assert_eq!(names.table().len(), CAPACITY);
    }

    #[tokio::test]
    async fn a_database_that_hangs_holds_no_caller_and_few_threads() {
        let (release, hung) = mpsc::channel::<()>();
        let (hung, entered) = (Mutex::new(hung), Arc::new(Mutex::new(0)));
        let count = Arc::clone(&entered);
        let database = move |id| {
            *count.lock().unwrap() += 1;
            let gone = hung.lock().unwrap().recv(); // until the test lets go of its end
            assert!(gone.is_err());
            Ok(Some(format!("{id:?}")))
        };
        let names = Names::new(Arc::new(database), Duration::from_millis(20));
        for uid in 0..16 {
            assert_eq!(one(&names, NameId::User(uid)).await.as_deref(), Some("?"), "no answer");
        }
        assert!(*entered.lock().unwrap() <= WORKERS, "threads that hang");
        drop(release);
        // All workers come back once the database answers.
        let back = names.workers.acquire_many(u32::try_from(WORKERS).unwrap()).await;
        assert!(back.is_ok());
    }

    #[tokio::test]
    async fn root_has_a_name_in_the_systems_database() {
        let found =
            Names::of_system().find(&[NameId::User(0), NameId::Group(0), NameId::User(u32::MAX - 7)]).await;
        assert_eq!(found.iter().map(text).collect::<Vec<_>>(), [Some("root"), Some("root"), None]);
    }
}
