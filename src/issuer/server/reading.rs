//! What the agent has to wait for in a thread: files of others (tokens, keys, bundles), and the name server.

use std::{io::Read as _, path::Path, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};
use zeroize::Zeroizing;

use crate::os::trusted::Trust;

/// How many threads wait at once. One that never gets its answer (a file system of the network) keeps its place, and takes
/// no more threads.
const AT_ONCE: usize = 2;

/// The longest that one is waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Waits for what may hang, in few threads. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub(super) struct SlowReads(Arc<Semaphore>);

impl Default for SlowReads {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl SlowReads {
    /// Reads a file, of at most so many bytes, that others may not have put there, as it is at this moment.
    ///
    /// # Errors
    /// In words for an admin, which name the file.
    pub(super) async fn file(&self, path: &Path, most: u64) -> Result<Zeroizing<Vec<u8>>, String> {
        let of = path.to_owned();
        self.wait(&path.display().to_string(), move || read_now(&of, most, Trust::own())).await
    }

    /// What `work` gives, which is called in a thread. `what` is waited for, for people.
    ///
    /// # Errors
    /// That of the work, or it takes too long.
    pub(super) async fn wait<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let late = || format!("{what}: no answer after {} s", LONGEST_WAIT.as_secs());
        let waiting = async {
            let place = Arc::clone(&self.0).acquire_owned().await.map_err(|_closed| late())?;
            let working = tokio::task::spawn_blocking(move || {
                let _until_it_has_its_answer = place;
                work()
            });
            working.await.unwrap_or_else(|_panicked| Err(format!("{what}: reading failed")))
        };
        timeout(LONGEST_WAIT, waiting).await.unwrap_or_else(|_late| Err(late()))
    }
}

/// As [`SlowReads::file`], in this thread, for the user of `trust`.
pub(super) fn read_now(path: &Path, most: u64, trust: Trust) -> Result<Zeroizing<Vec<u8>>, String> {
    let file = trust.open(path).map_err(|error| error.to_string())?;
    let failed = |error| format!("cannot read {}: {error}", path.display());
    let len = file.metadata().map_err(failed)?.len();
    if len > most {
        return Err(format!("{} has {len} bytes, more than the {most} that are read", path.display()));
    }
    let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(len).unwrap_or(0) + 1));
    file.take(most).read_to_end(&mut text).map_err(failed)?;
    if text.is_empty() { Err(format!("{} is empty", path.display())) } else { Ok(text) }
}
