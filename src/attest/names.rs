//! Names of users and groups, from the agent's own user database (NSS).
//!
//! A lookup may ask a directory server and hang, so none ever runs on a runtime thread: misses go to the blocking
//! pool, at most [`WORKERS`] at a time, and a caller waits at most [`PATIENCE`] for all of its names. What was found
//! is believed for [`LIFETIME`]; that there is no such name likewise, and a failure for [`RETRY`]. As in SPIRE a
//! name that cannot be found is no error: the selector is missing, and the numeric one beside it is there.
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

/// How long a name, or its absence, is believed.
const LIFETIME: Duration = Duration::from_secs(60);
/// How long a lookup that failed is not repeated.
const RETRY: Duration = Duration::from_secs(5);
/// How long an attestation waits for its names.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lookups at a time, those that hang included.
const WORKERS: usize = 4;
/// Names kept, of users and of groups each.
const CAPACITY: usize = 1024;

/// Whose name is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Id {
    /// A user's.
    User(u32),
    /// A group's.
    Group(u32),
}

/// A user or group database.
pub(super) type Database = dyn Fn(Id) -> Result<Option<String>, Errno> + Send + Sync;

/// The cached names. Cheap to clone, all clones are one.
#[derive(Clone)]
pub(super) struct Names {
    tables: Arc<Mutex<Tables>>,
    workers: Arc<Semaphore>,
    database: Arc<Database>,
    patience: Duration,
}

#[derive(Default)]
struct Tables {
    users: HashMap<u32, Known>,
    groups: HashMap<u32, Known>,
}

#[derive(Clone)]
struct Known {
    name: Option<Arc<str>>,
    until: Instant,
}

impl Names {
    /// Names from the system's database.
    pub(super) fn of_system() -> Self {
        Self::new(Arc::new(system), PATIENCE)
    }

    fn new(database: Arc<Database>, patience: Duration) -> Self {
        let workers = Arc::new(Semaphore::new(WORKERS));
        Self { tables: Arc::default(), workers, database, patience }
    }

    /// The names of `ids`, in their order; `None` for what has none, or whose name could not be found in time.
    pub(super) async fn find(&self, ids: &[Id]) -> Vec<Option<Arc<str>>> {
        let (mut names, missing) = self.known(ids);
        if !missing.is_empty() {
            let found = self.look_up(missing).await;
            for (id, name) in ids.iter().zip(&mut names) {
                if name.is_none() {
                    *name = found.get(id).cloned().flatten();
                }
            }
        }
        names
    }

    /// What is known now, without waiting, and what is not.
    fn known(&self, ids: &[Id]) -> (Vec<Option<Arc<str>>>, Vec<Id>) {
        let now = Instant::now();
        let tables = self.tables();
        let mut missing = Vec::new();
        let names = ids
            .iter()
            .map(|id| match tables.get(*id, now) {
                Some(known) => known.name.clone(),
                None => {
                    missing.push(*id);
                    None
                }
            })
            .collect();
        (names, missing)
    }

    async fn look_up(&self, missing: Vec<Id>) -> HashMap<Id, Option<Arc<str>>> {
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
                tracing::debug!(ids = missing.len(), "user or group lookup takes too long; names left out");
                self.give_up(missing)
            }
        }
    }

    /// Asks for each, as long as somebody waits. Runs on a blocking thread.
    fn ask(&self, ids: Vec<Id>, deadline: Instant) -> HashMap<Id, Option<Arc<str>>> {
        let mut found = HashMap::with_capacity(ids.len());
        for id in ids {
            let now = Instant::now();
            // Another caller may have found it while this one waited for its worker.
            let known = self.tables().get(id, now).cloned();
            let name = match known {
                Some(known) => known.name,
                None if now > deadline => break,
                None => {
                    let answer = (self.database)(id);
                    let now = Instant::now();
                    let (name, until) = match answer {
                        Ok(name) => (name.map(Arc::from), now + LIFETIME),
                        Err(errno) => {
                            tracing::debug!(?id, %errno, "user or group lookup failed; name left out");
                            (None, now + RETRY)
                        }
                    };
                    self.tables().insert(id, Known { name: name.clone(), until }, now);
                    name
                }
            };
            found.insert(id, name);
        }
        found
    }

    /// Takes what a late batch has found so far, and lets nobody wait for the rest of it for a while.
    fn give_up(&self, ids: Vec<Id>) -> HashMap<Id, Option<Arc<str>>> {
        let now = Instant::now();
        let mut tables = self.tables();
        ids.into_iter()
            .map(|id| match tables.get(id, now).cloned() {
                Some(known) => (id, known.name),
                None => {
                    tables.insert(id, Known { name: None, until: now + RETRY }, now);
                    (id, None)
                }
            })
            .collect()
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn get(&self, id: Id, now: Instant) -> Option<&Known> {
        let known = match id {
            Id::User(uid) => self.users.get(&uid),
            Id::Group(gid) => self.groups.get(&gid),
        };
        known.filter(|known| now < known.until)
    }

    fn insert(&mut self, id: Id, known: Known, now: Instant) {
        let (table, number) = match id {
            Id::User(uid) => (&mut self.users, uid),
            Id::Group(gid) => (&mut self.groups, gid),
        };
        if table.len() >= CAPACITY && !table.contains_key(&number) {
            table.retain(|_, known| now < known.until);
            // Still full: forget all. To look a name up again costs microseconds where it matters, and a process
            // with a thousand groups may not make others scan for a victim.
            if table.len() >= CAPACITY {
                table.clear();
            }
        }
        table.insert(number, known);
    }
}

fn system(id: Id) -> Result<Option<String>, Errno> {
    match id {
        Id::User(uid) => User::from_uid(Uid::from_raw(uid)).map(|user| user.map(|user| user.name)),
        Id::Group(gid) => Group::from_gid(Gid::from_raw(gid)).map(|group| group.map(|group| group.name)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A database that counts: every answer names the ID and how often it was asked.
    fn counting() -> Names {
        let asked = Mutex::new(HashMap::<Id, u32>::new());
        let database = move |id| {
            let mut asked = asked.lock().unwrap();
            let times = asked.entry(id).and_modify(|n| *n += 1).or_insert(1);
            match id {
                Id::User(404) => Ok(None),
                Id::User(500) if *times == 1 => Err(Errno::EIO),
                Id::User(n) => Ok(Some(format!("user{n}.{times}"))),
                Id::Group(n) => Ok(Some(format!("group{n}.{times}"))),
            }
        };
        Names::new(Arc::new(database), PATIENCE)
    }

    async fn one(names: &Names, id: Id) -> Option<String> {
        let found = names.find(&[id]).await;
        assert_eq!(found.len(), 1);
        found.into_iter().next().flatten().map(|name| name.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_believed_for_its_lifetime() {
        let names = counting();
        let mixed = [Id::User(1), Id::Group(1), Id::User(404), Id::User(1)];
        let want = [Some("user1.1"), Some("group1.1"), None, Some("user1.1")];
        let found: Vec<_> = names.find(&mixed).await;
        assert_eq!(found.iter().map(Option::as_deref).collect::<Vec<_>>(), want);

        tokio::time::advance(LIFETIME - Duration::from_millis(10)).await;
        assert_eq!(one(&names, Id::User(1)).await.as_deref(), Some("user1.1"), "still believed");
        tokio::time::advance(Duration::from_millis(20)).await;
        assert_eq!(one(&names, Id::User(1)).await.as_deref(), Some("user1.2"), "asked again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_leaves_the_name_out_and_is_tried_again_soon() {
        let names = counting();
        assert_eq!(one(&names, Id::User(500)).await, None, "failed");
        assert_eq!(one(&names, Id::User(500)).await, None, "not asked at once again");
        tokio::time::advance(RETRY).await;
        assert_eq!(one(&names, Id::User(500)).await.as_deref(), Some("user500.2"));
    }

    #[tokio::test]
    async fn the_tables_have_a_bound() {
        let names = counting();
        let many: Vec<_> = (0..4000).flat_map(|n| [Id::User(n), Id::Group(n)]).collect();
        let found = names.find(&many).await;
        assert_eq!(found.iter().flatten().count(), 2 * 4000 - 2, "all but user 404 and user 500");
        let tables = names.tables();
        assert!((1..=CAPACITY).contains(&tables.users.len()), "{}", tables.users.len());
        assert!((1..=CAPACITY).contains(&tables.groups.len()), "{}", tables.groups.len());
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
            assert_eq!(one(&names, Id::User(uid)).await, None, "left out");
        }
        assert!(*entered.lock().unwrap() <= WORKERS, "threads that hang");
        drop(release);
        // All workers come back once the database answers.
        let back = names.workers.acquire_many(u32::try_from(WORKERS).unwrap()).await;
        assert!(back.is_ok());
    }

    #[tokio::test]
    async fn root_has_a_name_in_the_systems_database() {
        let found = Names::of_system().find(&[Id::User(0), Id::Group(0), Id::User(u32::MAX - 7)]).await;
        assert_eq!(
            found.iter().map(Option::as_deref).collect::<Vec<_>>(),
            [Some("root"), Some("root"), None]
        );
    }
}
