//! Who may hold what: the entries of the agent, and the judgement over each SVID that reaches a process.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Users and groups of the callers: far from any that a node has.
pub(crate) const USERS: [u32; 6] = [730_001, 730_002, 730_003, 730_004, 730_005, 730_006];
pub(crate) const GROUPS: [u32; 3] = [731_001, 731_002, 731_003];
/// Copies of this program that callers execute.
pub(crate) const PROGRAMS: [&str; 2] = ["caller-a", "caller-b"];

/// For how long X.509-SVIDs are valid, in milliseconds: short, so that streams are sent new ones all the time.
pub(crate) const X509_TTL: u64 = 4_000;
/// What was on its way when somebody lost a right may still arrive: made at most so many milliseconds after that. It covers
/// that times in SVIDs are whole seconds, and that attestation is believed for a second.
const GRACE: u64 = 2_500;

/// Who a process is, as attestation sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) program: String,
}

/// An entry: its SPIFFE ID's path, and what a process must be to have it.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    uid: Option<u32>,
    gid: Option<u32>,
    group: Option<u32>,
    program: Option<&'static str>,
    /// Of the parts of the configuration that come and go, the one that it belongs to; 0 for those that stay.
    part: u8,
}

/// How many configurations there are: each of the parts 1, 2 and 4 is there or not.
pub(crate) const CONFIGURATIONS: usize = 8;
/// All parts: what it starts with, so that whatever is made once for a part is there before the callers.
pub(crate) const EVERYTHING: u8 = 7;
/// The part with entries for programs, and `discover_workload_path`.
const PATHS: u8 = 4;

const NOBODY: Entry = Entry { name: "", uid: None, gid: None, group: None, program: None, part: 0 };

/// Users 4 and 5 have none of their own.
const ENTRIES: [Entry; 10] = [
    Entry { name: "u0", uid: Some(USERS[0]), ..NOBODY },
    Entry { name: "u1", uid: Some(USERS[1]), ..NOBODY },
    Entry { name: "u2g0", uid: Some(USERS[2]), gid: Some(GROUPS[0]), ..NOBODY },
    Entry { name: "g1", gid: Some(GROUPS[1]), ..NOBODY },
    Entry { name: "s2", group: Some(GROUPS[2]), ..NOBODY },
    Entry { name: "u3", uid: Some(USERS[3]), part: 1, ..NOBODY },
    Entry { name: "u0t", uid: Some(USERS[0]), part: 2, ..NOBODY },
    Entry { name: "p1", program: Some(PROGRAMS[1]), part: PATHS, ..NOBODY },
    Entry { name: "u1p1", uid: Some(USERS[1]), program: Some(PROGRAMS[1]), part: PATHS, ..NOBODY },
    Entry { name: NEIGHBOUR, ..NOBODY },
];

/// The entry of the polite neighbour.
pub(crate) const NEIGHBOUR: &str = "neighbour";

/// The neighbour's user: this one where the fuzzer cannot become others.
pub(crate) fn neighbour() -> u32 {
    let own = nix::unistd::geteuid();
    if own.is_root() { 732_001 } else { own.as_raw() }
}

impl Entry {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        ENTRIES.iter().find(|entry| entry.name == name)
    }

    fn uid(&self) -> Option<u32> {
        if self.name == NEIGHBOUR { Some(neighbour()) } else { self.uid }
    }

    /// Whether it is there in this configuration.
    pub(crate) fn is_in(&self, configuration: u8) -> bool {
        self.part == 0 || self.part & configuration != 0
    }

    /// Whether a process that is `ids` may have it.
    pub(crate) fn fits(&self, ids: &Ids) -> bool {
        self.uid().is_none_or(|uid| uid == ids.uid)
            && self.gid.is_none_or(|gid| gid == ids.gid)
            && self.group.is_none_or(|gid| ids.groups.contains(&gid))
            && self.program.is_none_or(|program| program == ids.program)
    }

    /// Whether attestation may have found it out up to a second before.
    fn is_kept(&self) -> bool {
        self.group.is_some() || self.program.is_some()
    }

    fn text(&self, dir: &Path) -> String {
        let of = |kind: &str, id: Option<u32>| id.map(|id| format!("\"unix:{kind}:{id}\""));
        let program = self.program.map(|it| format!("\"unix:path:{}\"", dir.join(it).display()));
        let selectors =
            [of("uid", self.uid()), of("gid", self.gid), of("supplementary_gid", self.group), program];
        format!(
            "entry \"spiffe://example.org/{}\" {{\n  selectors = [{}]\n  x509_svid_ttl = \"{}s\"\n}}\n",
            self.name,
            selectors.into_iter().flatten().collect::<Vec<_>>().join(", "),
            X509_TTL / 1_000,
        )
    }
}

/// The text of `agent.conf`, of an agent that lives in `dir`.
pub(crate) fn configuration(dir: &Path, configuration: u8, health_port: u16) -> String {
    let at = dir.display();
    let paths = configuration & PATHS != 0;
    let mut text = format!(
        "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n  \
         listener {{ drain_timeout = \"2s\" }}\n}}\nissuer \"embedded\" {{ }}\n\
         plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ discover_workload_path = {paths} workload_size_limit = -1 }}\n  }}\n}}\n\
         telemetry {{ Prometheus {{ socket_path = \"{at}/metrics.sock\" }} }}\n\
         health_checks {{ listener_enabled = true bind_address = \"127.0.0.1\" bind_port = {health_port} }}\n"
    );
    ENTRIES
        .iter()
        .filter(|entry| entry.is_in(configuration))
        .for_each(|entry| text.push_str(&entry.text(dir)));
    text
}

/// An SVID that reached a process. Times are in milliseconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Got {
    /// The path of its SPIFFE ID.
    pub(crate) name: String,
    /// When it was made.
    pub(crate) made: u64,
    /// When the process had written the whole call that it answers, if it did.
    pub(crate) called: Option<u64>,
    /// When the process first wrote on the connection, if it did.
    pub(crate) first_wrote: Option<u64>,
    /// When the process was last somebody who may have it, if ever.
    pub(crate) entitled: Option<u64>,
    pub(crate) ids: Ids,
}

/// What is to be said of it.
pub(crate) enum Verdict {
    Theirs,
    /// It was handed a connection and only reads what others ask for on it: no kernel shows that.
    OnlyReads,
    Wrong(String),
}

impl Got {
    /// `in_force`: when the entry was last there, if ever.
    pub(crate) fn judge(&self, in_force: Option<u64>) -> Verdict {
        let Some(entry) = Entry::named(&self.name) else {
            return Verdict::Wrong("there is no such entry".into());
        };
        let wrong = |what: &str, last: Option<u64>, slack: u64| {
            let called = self.called.filter(|called| last.is_none_or(|last| last + slack < *called));
            if called.is_none() && last.is_some_and(|last| last + GRACE >= self.made) {
                return None;
            }
            let Some(last) = last else { return Some(Verdict::Wrong(format!("{what} never"))) };
            let when = match called {
                Some(called) => format!("{} ms before the call was written", called.saturating_sub(last)),
                None => format!("{} ms before it was made", self.made.saturating_sub(last)),
            };
            Some(Verdict::Wrong(format!("{what} last {when}")))
        };
        // Entries come and go while a call is under way, and the fuzzer hears of it later.
        if let Some(verdict) = wrong("the entry was there", in_force, GRACE) {
            return verdict;
        }
        let slack = if entry.is_kept() { GRACE } else { 0 };
        let Some(verdict) = wrong("the process was entitled to it", self.entitled, slack) else {
            return Verdict::Theirs;
        };
        match (self.called, self.first_wrote) {
            (Some(_), _) => verdict,
            (None, None) => Verdict::OnlyReads,
            // On its way to whom it was for, when this one wrote.
            (None, Some(wrote)) if self.made <= wrote + GRACE => Verdict::OnlyReads,
            (None, Some(_)) => verdict,
        }
    }
}
