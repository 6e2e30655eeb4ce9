//! The `unix` attestor: a process's user, its groups, and the file that it executes.
//!
//! Trusted: the lines of `status` and the links that the kernel writes. Not trusted: the process's name, its
//! executable's path and content.
//!
//! The path is the one the process sees in its own mount namespace, as SPIRE's is, and the digest is of the file that the
//! kernel executes, whatever its path says. Both are told only where nobody but the node's root chooses what is mounted
//! ([`executable`]): whoever may make containers may choose the path.

mod digest;
mod discovery;
mod executable;
pub mod mounts;
mod names;
mod threads;

use std::sync::Arc;

pub use self::executable::ExecutableError;
use self::{
    discovery::Discovery,
    names::{NameId, Names},
};
use super::{
    AttestFault, Blame, Questions,
    attestors::{Findings, Untold, WorkloadAttestor},
    process::{Extent, Seen},
    status::ProcStatus,
};
use crate::{
    hcl::{section::nearest, settings::settings},
    identity::{
        Entry,
        selector::{Selector, Selectors},
    },
};

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
    /// The user database does not answer, and there are entries that ask for names.
    #[error("the user database does not say what the caller's user or one of its groups is called")]
    NoNames,
    /// What it executes cannot be told.
    #[error(transparent)]
    Executable(#[from] ExecutableError),
}

impl UnixError {
    /// Whose doing it is, and how it is counted.
    pub(super) fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::NoNames => (Blame::Fault, AttestFault::Busy),
            Self::Executable(error) => error.class(),
        }
    }
}

/// What entries ask for.
#[derive(Debug, Default)]
pub struct UnixQuestions {
    /// The kinds of selectors that may stay untold, as far as an entry asks for one: [`NAMES`], [`PATH`], [`SHA256`].
    asked: Vec<&'static str>,
}

impl UnixQuestions {
    /// Whether an entry asks for a selector of this kind.
    fn ask_for(&self, word: &str) -> bool {
        self.asked.contains(&word)
    }
}

/// What it keeps between attestations.
pub(super) struct UnixAttestor {
    names: Names,
    discovery: Discovery,
}

impl Default for UnixAttestor {
    fn default() -> Self {
        Self { names: Names::of_system(), discovery: Discovery::default() }
    }
}

impl WorkloadAttestor for UnixAttestor {
    const NAME: &'static str = "unix";
    type Settings = UnixSettings;
    type Error = UnixError;
    type Questions = UnixQuestions;

    fn check(value: &str, settings: &UnixSettings) -> Result<(), String> {
        let (kind, of) = value.split_once(':').unwrap_or((value, ""));
        if !KINDS.contains(&kind) {
            return Err(nearest(kind, KINDS).map_or_else(
                || format!("nobody attests this; unix attests {}", KINDS.join(", ")),
                |near| format!("nobody attests this: did you mean unix:{near}?"),
            ));
        }
        let is_number = || of.parse::<u32>().is_ok_and(|number| number.to_string() == of);
        let is_sha256 = || of.len() == 64 && of.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match kind {
            _ if of.is_empty() => Err(format!("must have a value, as unix:{kind}:VALUE")),
            "uid" | "gid" | "supplementary_gid" if !is_number() => {
                Err(format!("must be a number from 0 to {}, as unix:{kind}:1000", u32::MAX))
            }
            "path" | "sha256" if !settings.discover_workload_path => {
                let key = "discover_workload_path = true in plugins.WorkloadAttestor \"unix\".plugin_data";
                Err(format!("unix:{kind} is only found out with {key}"))
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
        let mut questions = UnixQuestions::default();
        let selectors = entries.iter().flat_map(|entry| &entry.selectors);
        for word in selectors.filter(|it| it.kind() == Self::NAME).filter_map(|it| kind(it.value())) {
            if !questions.ask_for(word) {
                questions.asked.push(word);
            }
        }
        questions
    }

    fn untellable(_questions: &UnixQuestions, value: &str) -> Option<&'static str> {
        kind(value)
    }

    async fn attest(
        &self,
        settings: &UnixSettings,
        questions: &Questions,
        seen: &Seen<'_>,
    ) -> Result<Findings<UnixError>, UnixError> {
        let mut untold = Vec::new();
        let names: Result<Vec<_>, _> = self.names.find(&ids(&seen.status)).await.into_iter().collect();
        if names.is_err() && questions.unix.ask_for(NAMES) {
            untold.push(Untold { word: NAMES, why: UnixError::NoNames });
        }
        let names = names.unwrap_or_default();
        let mut findings = Findings { selectors: selectors(&seen.status, names), evidence: None, untold };
        let all = seen.extent() == Extent::All;
        let wanted = |found: &Selectors, words: &[_]| all || questions.may_ask(Self::NAME, found, words);
        self.discovery.find(*settings, seen, wanted, &mut findings).await;
        Ok(findings)
    }
}

const NAMES: &str = "user";
const PATH: &str = "path";
const SHA256: &str = "sha256";

/// The kind of a selector that may stay untold; names are one.
fn kind(value: &str) -> Option<&'static str> {
    match value.split(':').next() {
        Some("user" | "group" | "supplementary_group") => Some(NAMES),
        Some("path") => Some(PATH),
        Some("sha256") => Some(SHA256),
        _ => None,
    }
}

/// Whose names the selectors of a process need, in the order that [`selectors`] takes them.
fn ids(status: &ProcStatus) -> Vec<NameId> {
    let of_process = [NameId::User(status.uid), NameId::Group(status.gid)];
    of_process.into_iter().chain(status.groups.iter().map(|gid| NameId::Group(*gid))).collect()
}

/// The selectors of a process; `names` are those of [`ids`].
fn selectors(
    status: &ProcStatus,
    names: Vec<Option<Arc<str>>>,
) -> Selectors {
    let mut found = Selectors::new();
    let mut names = names.into_iter();
    let mut add = |what: &str, value: &str| {
        found.insert(Selector::new(UnixAttestor::NAME, format!("{what}:{value}")));
    };
    let mut both = |what: &str, number: u32, named: &str| {
        add(what, &number.to_string());
        if let Some(name) = names.next().flatten() {
            add(named, &name);
        }
    };
    both("uid", status.uid, "user");
    both("gid", status.gid, "group");
    for gid in &status.groups {
        both("supplementary_gid", *gid, "supplementary_group");
    }
    found
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    impl UnixAttestor {
        /// With a user database that does not answer.
        pub(in crate::attest) fn nameless() -> Self {
            let names = Names::new(Arc::new(|_| Err(nix::errno::Errno::EIO)), Duration::from_secs(2));
            Self { names, ..Self::default() }
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
