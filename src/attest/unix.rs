//! The `unix` attestor: a process's user, its groups, and the file that it executes.
//!
//! Trusted: the lines of `status` and the links that the kernel writes. Not trusted: the process's name, its
//! executable's path and content.
//!
//! The path is the one the process sees in its own mount namespace, as SPIRE's is, and the digest is of the file that the
//! kernel executes, whatever its path says. Both are told only where nobody but the node's root chooses what is mounted
//! ([`executable`]): whoever may make containers may choose the path.
//!
//! A name is another's word for a number, and is looked up ahead, for the entries that ask for it ([`names`]): whoever
//! has the number has the name. SPIRE asks for the name of the number, which is one: here a process also has the other
//! names of its number, and of two users with one name only the first in the database has it.

mod digest;
mod discovery;
mod display;
mod executable;
pub mod mounts;
mod names;
mod questions;
mod spent;
mod threads;
mod unlisted;

use std::{sync::Arc, time::Instant};

pub use self::{
    discovery::BLIND,
    executable::ExecutableError,
    questions::{Account, UnixQuestions},
};
use self::{discovery::Discovery, names::Names};

use super::{
    AttestFault, Blame, Questions,
    attestors::{Findings, News, Untold, WorkloadAttestor, no_such_kind},
    process::{Extent, Seen},
    status::ProcStatus,
};
use crate::{
    hcl::{section::Section, settings::settings},
    identity::{
        Entry,
        selector::{Selector, Selectors},
    },
    limits::processor::ProcessorShare,
};

/// Whether this process may look at what the processes of other users execute: it has `CAP_SYS_PTRACE`.
pub fn may_look_at_executables() -> bool {
    *executable::MAY_TRACE
}

/// Whether this selector is of what a process executes.
pub fn is_of_executable(selector: &Selector) -> bool {
    selector.kind() == NAME && questions::executable(selector.value()).is_some()
}

/// Whether this selector is of a process's supplementary groups.
pub fn is_of_supplementary_group(selector: &Selector) -> bool {
    let word = selector.value().split(':').next();
    selector.kind() == NAME && word.is_some_and(|word| questions::GROUP_KINDS.contains(&word))
}

/// Its name, which is the type of its selectors.
const NAME: &str = "unix";
const PATH: &str = "path";
const SHA256: &str = "sha256";

/// What its selectors are of, in the order that messages name them.
const KINDS: [&str; 8] =
    ["uid", "user", "gid", "group", "supplementary_gid", "supplementary_group", "path", "sha256"];

settings! {
    /// What spire-agent's attestor of this name can be told.
    #[derive(Copy)]
    pub struct UnixSettings in "plugins.WorkloadAttestor \"unix\".plugin_data" {
        /// Whether `unix:path` and `unix:sha256` are found out.
        "discover_workload_path" discover_workload_path: bool = false, boolean(), reloads;
        /// The largest executable to hash, in bytes; 0 for any, negative never to hash.
        "workload_size_limit" workload_size_limit: i64 = 268_435_456, integer(i64::MIN..=i64::MAX), reloads;
    }
}

impl UnixSettings {
    /// The size up to which executables are hashed, in bytes; `None` where none is.
    fn hashing(self) -> Option<u64> {
        match (self.discover_workload_path, self.workload_size_limit) {
            (false, _) | (true, ..0) => None,
            (true, 0) => Some(u64::MAX),
            (true, bytes @ 1..) => u64::try_from(bytes).ok(),
        }
    }
}

/// Why it could not find out who a process is.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// The user database does not answer.
    #[error("the user database does not answer for a name that an entry asks for")]
    NoNames,
    /// `/proc` does not show the process to the agent.
    #[error("/proc hides the supplementary groups of the caller's processes from the agent (hidepid)")]
    HiddenGroups,
    /// What it executes cannot be told.
    #[error(transparent)]
    Executable(#[from] ExecutableError),
}

impl UnixError {
    /// Whose doing it is, and how it is counted.
    pub(super) fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::NoNames => (Blame::Fault, AttestFault::Busy),
            // The log had it when that was found.
            Self::HiddenGroups => (Blame::Crowd, AttestFault::Unreadable),
            Self::Executable(error) => error.class(),
        }
    }
}

/// What it keeps between attestations.
pub(super) struct UnixAttestor {
    names: Names,
    discovery: Discovery,
}

impl UnixAttestor {
    /// What the agent may use of the processor, of which looking at files is a part.
    pub(super) fn share_is(&self, share: ProcessorShare) {
        self.discovery.share_is(share);
    }
}

impl WorkloadAttestor for UnixAttestor {
    const NAME: &'static str = NAME;
    const BY_DEFAULT: bool = true;
    type Settings = UnixSettings;
    type Error = UnixError;
    type Questions = UnixQuestions;

    fn new(news: &News) -> Self {
        Self { names: Names::of_node(Arc::clone(news)), discovery: Discovery::default() }
    }

    fn read(data: &mut Section<'_>) -> UnixSettings {
        UnixSettings::read(data)
    }

    fn check(value: &str, settings: &UnixSettings) -> Result<(), String> {
        let (kind, of) = value.split_once(':').unwrap_or((value, ""));
        if !KINDS.contains(&kind) {
            return Err(no_such_kind(NAME, kind, &KINDS));
        }
        // The last one stands for "no change" in setuid(2), so nobody has it.
        let is_number =
            || of.parse::<u32>().is_ok_and(|number| number < u32::MAX && number.to_string() == of);
        let is_sha256 = || of.len() == 64 && of.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match kind {
            _ if of.is_empty() => Err(format!("must have a value, as unix:{kind}:VALUE")),
            "uid" | "gid" | "supplementary_gid" if !is_number() => {
                Err(format!("must be a number from 0 to {}, as unix:{kind}:1000", u32::MAX - 1))
            }
            "path" | "sha256" if !settings.discover_workload_path => {
                let key = "discover_workload_path = true in plugins.WorkloadAttestor \"unix\".plugin_data";
                Err(format!("unix:{kind} needs {key}"))
            }
            "path" if !of.starts_with('/') => {
                Err("must be an absolute path, as unix:path:/usr/bin/web".to_owned())
            }
            "sha256" if !is_sha256() => Err("must be 64 lower-case hexadecimal digits".to_owned()),
            _ => Ok(()),
        }
    }

    fn begin(&self, settings: &UnixSettings) {
        self.discovery.begin(settings);
    }

    fn prepare_for(&self, entries: &[Arc<Entry>]) -> UnixQuestions {
        UnixQuestions::of(entries, &self.names)
    }

    fn wait(&self, deadline: Instant) {
        let untold = self.names.wait(deadline);
        if untold > 0 {
            tracing::warn!(
                names = untold,
                "the user database does not answer: calls of processes that may have these names are Unavailable for a minute"
            );
        }
    }

    fn absent(questions: &UnixQuestions, value: &str) -> Option<String> {
        questions.absent(value)
    }

    fn untellable(questions: &UnixQuestions, value: &str) -> Option<&'static str> {
        questions.untellable(value)
    }

    async fn attest(
        &self,
        settings: &UnixSettings,
        questions: &Questions,
        seen: &Seen<'_>,
    ) -> Result<Findings<UnixError>, UnixError> {
        let own = self.names.own();
        let untold = questions.unix.unanswered(&own, &seen.status);
        let unanswered = untold.map(|word| Untold { word, why: UnixError::NoNames });
        let hidden = questions::GROUP_KINDS.iter().filter(|_| seen.groups_are_hidden);
        let hidden = hidden.map(|word| Untold { word, why: UnixError::HiddenGroups });
        let mut findings = Findings {
            selectors: selectors(&seen.status, &questions.unix),
            evidence: None,
            untold: hidden.chain(unanswered).collect(),
            age: None,
        };
        let all = seen.extent() == Extent::All;
        let wanted = |found: &Selectors, words: &[_]| all || questions.may_ask(NAME, found, words);
        self.discovery.find(*settings, seen, wanted, &mut findings).await;
        if all {
            display::add(&seen.status, &questions.unix, &mut findings.selectors).await;
        }
        Ok(findings)
    }
}

/// The selectors of a process: its user and its group, and what else entries ask for.
fn selectors(status: &ProcStatus, questions: &UnixQuestions) -> Selectors {
    let mut found = Selectors::new();
    found.extend(questions.of_user(status.uid).iter().cloned());
    found.extend(questions.of_group(status.gid).iter().cloned());
    let mut add = |what: &str, value: &str| {
        found.insert(Selector::new(NAME, format!("{what}:{value}")));
    };
    add("uid", &status.uid.to_string());
    add("gid", &status.gid.to_string());
    if questions.ask_for_groups() {
        for gid in &status.groups {
            let (names, by_number) = questions.of_supplementary_group(*gid);
            found.extend(names.iter().cloned());
            found.extend(by_number.then(|| Selector::new(NAME, format!("supplementary_gid:{gid}"))));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::{names::tests::FakeDatabase, *};
    use crate::os::accounts::AccountName;

    impl UnixAttestor {
        /// With a user database that answers so.
        pub(in crate::attest) fn knowing(
            news: &News,
            answer: impl Fn(&AccountName) -> Result<Option<u32>, Errno> + Send + Sync + 'static,
        ) -> Self {
            let database = Box::new(FakeDatabase::new(answer));
            Self { names: Names::of(database, Arc::clone(news)), ..Self::new(news) }
        }
    }

    #[test]
    fn settings_say_what_is_hashed() {
        for (discover, limit, want) in [
            (false, 0, None),
            (false, 10, None),
            (true, 0, Some(u64::MAX)),
            (true, 1, Some(1)),
            (true, i64::MAX, Some(i64::MAX.unsigned_abs())),
            (true, -1, None),
            (true, i64::MIN, None),
        ] {
            let settings = UnixSettings { discover_workload_path: discover, workload_size_limit: limit };
            assert_eq!(settings.hashing(), want, "{settings:?}");
        }
    }
}
