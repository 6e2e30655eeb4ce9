//! What a process executes: its path and its digest, for those whose entries ask for it.
//!
//! The path is asked first and the digest last, each only where an entry may be the process's by it, so that who has
//! nothing to gain costs nothing. Everything is done on the [`FileThreads`]; the runtime waits for them alone. What
//! could not be told is told with the reason.

use std::{path::Path, sync::Arc};

use futures_util::future::BoxFuture;

use super::{
    PATH, SHA256, UnixAttestor, UnixError, UnixSettings,
    digest::{Digests, Hashed, Hex},
    executable::{self, Executable, ExecutableError, Stamp},
    mounts::ServedBy,
    threads::{FileThreads, NotDone, TaskKind, TaskPlace},
    unlisted::UnlistedMounts,
};
use crate::{
    attest::{
        attestors::{Evidence, Findings, Untold, WorkloadAttestor as _},
        process::{ProcDir, Seen},
    },
    identity::selector::{Selector, Selectors},
    limits::processor::ProcessorShare,
};

/// What an agent lacks that may not look at the executables of other users.
pub const BLIND: &str = "the agent has no CAP_SYS_PTRACE: it cannot tell what the processes of other users execute, and calls \
                         for which an entry asks for unix:path or unix:sha256 are Unavailable; with systemd, \
                         discover-workload-path.conf gives it the capability";

/// Finds out about executables. Cheap to clone, all clones are one.
#[derive(Clone, Default)]
pub(super) struct Discovery {
    threads: Arc<FileThreads>,
    digests: Digests,
    unlisted: Arc<UnlistedMounts>,
}

impl Discovery {
    /// Gets ready for these settings. Says once what the agent lacks for them.
    pub(super) fn begin(&self, settings: &UnixSettings) {
        if !settings.discover_workload_path {
            return;
        }
        self.threads.start();
        if !*executable::MAY_TRACE {
            tracing::warn!("discover_workload_path is true, but {BLIND}");
        }
    }

    /// What the agent may use of the processor: a family gets a part of that here.
    pub(super) fn share_is(&self, share: ProcessorShare) {
        self.threads.share_is(share);
    }

    /// Adds to `findings` what the process executes. `wanted` says whether an entry may be the process's that asks for
    /// nothing but given selectors and some of these kinds.
    pub(super) async fn find(
        &self,
        settings: UnixSettings,
        seen: &Seen<'_>,
        wanted: impl Fn(&Selectors, &[&'static str]) -> bool,
        findings: &mut Findings<UnixError>,
    ) {
        let mut words: Vec<&'static str> = findings.untold.iter().map(|it| it.word).collect();
        words.extend([PATH, SHA256]);
        if !settings.discover_workload_path || !wanted(&findings.selectors, &words) {
            return;
        }
        let executable = match self.look(seen).await {
            Ok(executable) => executable,
            Err(error) => {
                findings.untold.push(Untold { word: PATH, why: error.clone().into() });
                // Who is told that there are no digests is not told why one is missing.
                if settings.hashing().is_some() {
                    findings.untold.push(Untold { word: SHA256, why: error.into() });
                }
                return;
            }
        };
        let mut add = |word: &str, value: &str| {
            findings.selectors.insert(Selector::new(UnixAttestor::NAME, format!("{word}:{value}")));
        };
        // An entry cannot name a path that is no UTF-8: without the selector nothing is lost, and a path with
        // characters replaced would be another file's.
        if let Some(path) = executable.path.to_str() {
            add(PATH, path);
        }
        let mut stamp = None;
        words.retain(|word| *word != PATH);
        if let Some(limit) = settings.hashing()
            && wanted(&findings.selectors, &words)
        {
            match self.digest(seen, &executable, limit).await {
                Ok((of, hex)) => {
                    stamp = Some(of);
                    findings.selectors.insert(Selector::new(UnixAttestor::NAME, format!("{SHA256}:{hex}")));
                }
                Err(error) => findings.untold.push(Untold { word: SHA256, why: error.into() }),
            }
        }
        let (threads, family) = (Arc::clone(&self.threads), seen.family);
        findings.evidence = Some(Box::new(SameExecutable { threads, family, executable, stamp }));
    }

    async fn look(&self, seen: &Seen<'_>) -> Result<Executable, ExecutableError> {
        seen.process.is_read();
        let place = TaskPlace { kind: TaskKind::Text, family: seen.family, device: None };
        let (family, unlisted) = (seen.family, Arc::clone(&self.unlisted));
        on_thread(&self.threads, place, &seen.dir, move |dir| Executable::of(dir, family, &unlisted)).await
    }

    async fn digest(
        &self,
        seen: &Seen<'_>,
        executable: &Executable,
        limit: u64,
    ) -> Result<(Stamp, Hex), ExecutableError> {
        let stamp = stamp(&self.threads, seen.family, executable, &seen.dir).await?;
        if stamp.size() > limit {
            let path = seen.dir.join(executable::NAME);
            return Err(ExecutableError::TooLarge { path, size: stamp.size(), limit });
        }
        if let Some(known) = self.digests.known(&stamp) {
            return Ok((stamp, known));
        }
        // A process that is gone already shall not take a place among those that wait.
        if seen.process.is_alive().is_err() {
            return Err(ExecutableError::Gone);
        }
        let (executable, process) = (executable.clone(), seen.dir.clone());
        let file = Hashed { executable, stamp, process, limit, family: seen.family };
        Ok((stamp, self.digests.make(&self.threads, file).await?))
    }
}

/// The stamp of what the process of `dir` executes.
async fn stamp(
    threads: &FileThreads,
    family: u64,
    executable: &Executable,
    dir: &Path,
) -> Result<Stamp, ExecutableError> {
    // What the kernel alone serves does not hang.
    let (kind, device) = match executable.on.served_by {
        ServedBy::Kernel => (TaskKind::Text, None),
        ServedBy::Program | ServedBy::Others => (TaskKind::Status, Some(executable.on.device)),
    };
    let executable = executable.clone();
    on_thread(threads, TaskPlace { kind, family, device }, dir, move |dir| executable.stamp(dir)).await
}

/// Looks at the process of `dir` on a thread.
async fn on_thread<T: Send + 'static>(
    threads: &FileThreads,
    place: TaskPlace,
    dir: &Path,
    look: impl FnOnce(&ProcDir) -> Result<T, ExecutableError> + Send + 'static,
) -> Result<T, ExecutableError> {
    // Opened only there: a descriptor would be one more for each who waits. Whether it is the same process says its pidfd, at
    // the end.
    let process = dir.to_owned();
    threads.run(place, move || look(&ProcDir::open(process)?)).await.unwrap_or_else(|not_done| {
        Err(match not_done {
            NotDone::Busy => ExecutableError::Busy,
            NotDone::Late => ExecutableError::Late { path: dir.join(executable::NAME) },
        })
    })
}

/// That a process executes the same file under the same path, and with the same content if there is a stamp of it.
struct SameExecutable {
    threads: Arc<FileThreads>,
    family: u64,
    executable: Executable,
    stamp: Option<Stamp>,
}

impl Evidence for SameExecutable {
    fn holds<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            let Self { threads, family, executable, stamp: of_digest } = self;
            if let Some(of_digest) = of_digest {
                return stamp(threads, *family, executable, dir).await.is_ok_and(|it| it == *of_digest);
            }
            let place = TaskPlace { kind: TaskKind::Text, family: *family, device: None };
            let executable = executable.clone();
            on_thread(threads, place, dir, move |dir| executable.is_of(dir)).await.is_ok()
        })
    }
}
