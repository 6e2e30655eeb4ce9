//! Whether anybody can be served whom entries ask for: of each entry, what certainly keeps everybody from it whom it asks for. Pure:
//! what is known of the node is gathered elsewhere.
//!
//! What is not certain keeps nobody: an agent that says that it serves nobody may be ended for it, with all that it serves.

use std::{cmp::Ordering, fmt::Write as _, sync::Arc};

use super::way_in::{SocketWay, opens};
use crate::{
    attest::{
        Outage, Questions,
        unix::{Account, is_of_executable, is_of_supplementary_group},
    },
    identity::{Entry, Selector},
    os::namespace::MappedAccounts,
    peer::socket::Presence,
    telemetry::health::Ungiven,
};

/// What to do where processes of other users are hidden.
const UNHIDE: &str = "mount /proc with gid=, a group of the agent's user, or without hidepid for this agent";

/// Who has no PID where the agent is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Apart {
    /// Nobody whom it should serve.
    #[default]
    Nobody,
    /// Callers in other pods.
    OtherPods,
    /// As far as anybody knows, all callers: some were refused for it, and nobody was given anything.
    Everybody,
}

/// What is known of the node.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// What is shut on the way to the socket, where there is no other.
    pub(super) way: SocketWay,
    /// Who has a number in the agent's user namespace, where not everybody has.
    pub(super) mapped: Option<MappedAccounts>,
    /// What processes execute is not believed where the agent runs.
    pub(super) executables_unbelieved: bool,
    /// The one user of whose processes it is known what they execute.
    pub(super) traces_only: Option<u32>,
    /// The one user whose processes are not hidden.
    pub(super) sees_only: Option<u32>,
    /// The one user the supplementary groups of whose processes are not hidden.
    pub(super) knows_groups_only: Option<u32>,
    pub(super) apart: Apart,
    /// Attestors that can tell nothing.
    pub(super) outages: Vec<(&'static str, Outage)>,
    /// Entries come from a server: those that nobody can match here may be for another node.
    pub(super) has_server: bool,
}

/// What keeps everybody from an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// The socket is shut to them.
    Shut,
    /// They have no number here.
    NoNumber,
    /// What they execute is not believed.
    Unbelieved,
    /// What they execute is not known.
    Untraced,
    /// Their processes are hidden.
    Hidden,
    /// Their supplementary groups are.
    HiddenGroups,
    /// They are in other pods, whose processes have no PID here.
    OtherPods,
    /// Their processes have no PID here.
    Strangers,
    /// An attestor can tell nothing: the so many-th.
    Outage(usize),
    /// There is no such user or group.
    Absent,
}

impl Facts {
    /// What keeps everybody from this entry, and the selector by which that shows.
    fn keep_all_from<'a>(&self, entry: &'a Entry, questions: &Questions) -> Option<(Cause, &'a Selector)> {
        let selectors = &entry.selectors;
        let all = |is_so: &dyn Fn(&Selector) -> bool| selectors.iter().find(|it| is_so(it));
        if let Some(absent) = all(&|it| questions.nobodys(it).is_some()) {
            return Some((Cause::Absent, absent));
        }
        if let Some(of_pod) = all(&|it| it.kind() == "k8s") {
            if self.apart != Apart::Nobody {
                return Some((Cause::OtherPods, of_pod));
            }
        } else if let Some(found) = self.keep_users_from(entry, questions) {
            return Some(found);
        }
        let outage = |it: &Selector| self.outages.iter().position(|(name, _)| *name == it.kind());
        selectors.iter().find_map(|it| Some((Cause::Outage(outage(it)?), it)))
    }

    /// The same of an entry that asks for no pod: pods have the socket's directory mounted, and users of their own.
    fn keep_users_from<'a>(&self, entry: &'a Entry, questions: &Questions) -> Option<(Cause, &'a Selector)> {
        let accounts = || entry.selectors.iter().filter_map(|it| Some((it, questions.account(it)?)));
        let has_group = |gid| accounts().any(|(_, account)| account == Account::Group(gid));
        let executable = entry.selectors.iter().find(|it| is_of_executable(it));
        let further_group = entry.selectors.iter().find(|it| is_of_supplementary_group(it));
        let of_user = accounts().find_map(|(selector, account)| {
            let cause = match (account, &self.mapped) {
                (Account::User(uid), Some(mapped)) if !mapped.has_user(uid) => Cause::NoNumber,
                (Account::Group(gid), Some(mapped)) if !mapped.has_group(gid) => Cause::NoNumber,
                // A group may be root's, or the owner's, who get in.
                (Account::Group(_), _) => return None,
                (Account::User(uid), _) => {
                    let is_other = |only: Option<u32>| only.is_some_and(|only| only != uid);
                    if self.way.keeps_out(uid, has_group).is_some() {
                        Cause::Shut
                    } else if is_other(self.sees_only) {
                        Cause::Hidden
                    } else if is_other(self.knows_groups_only)
                        && let Some(group) = further_group
                    {
                        return Some((Cause::HiddenGroups, group));
                    } else if is_other(self.traces_only) {
                        return executable.map(|it| (Cause::Untraced, it));
                    } else {
                        return None;
                    }
                }
            };
            Some((cause, selector))
        });
        let unbelieved =
            || executable.filter(|_| self.executables_unbelieved).map(|it| (Cause::Unbelieved, it));
        let stranger = || entry.selectors.iter().next().filter(|_| self.apart == Apart::Everybody);
        of_user.or_else(unbelieved).or_else(|| Some((Cause::Strangers, stranger()?)))
    }

    /// Nothing is wrong with the node.
    fn are_well(&self) -> bool {
        let Self {
            way,
            mapped,
            executables_unbelieved,
            traces_only,
            sees_only,
            knows_groups_only,
            apart,
            outages,
            ..
        } = self;
        way.shut.is_empty()
            && mapped.is_none()
            && !executables_unbelieved
            && traces_only.is_none()
            && sees_only.is_none()
            && knows_groups_only.is_none()
            && *apart == Apart::Nobody
            && outages.is_empty()
    }
}

/// A cause, the first entry that has it, and how many have.
#[derive(Debug)]
struct KeptEntries {
    cause: Cause,
    entry: Arc<Entry>,
    selector: Selector,
    entries: usize,
}

/// What keeps everybody from entries, each cause once, and whether that is so of all entries.
#[derive(Debug, Default)]
pub(super) struct EntriesVerdict {
    kept: Vec<KeptEntries>,
    all: bool,
}

impl EntriesVerdict {
    /// Of these entries.
    pub(super) fn of(entries: &[Arc<Entry>], questions: &Questions, facts: &Facts) -> Self {
        let is_well = facts.are_well();
        let mut verdict = Self { kept: Vec::new(), all: true };
        for entry in entries {
            match facts.keep_all_from(entry, questions) {
                Some((Cause::Absent, _)) if facts.has_server => {}
                Some((cause, selector)) => verdict.add(cause, entry, selector),
                None => {
                    verdict.all = false;
                    if is_well {
                        return verdict;
                    }
                }
            }
        }
        verdict.all &= !verdict.kept.is_empty();
        verdict.kept.sort_by_key(|kept| kept.cause);
        verdict
    }

    fn add(&mut self, cause: Cause, entry: &Arc<Entry>, selector: &Selector) {
        match self.kept.iter_mut().find(|kept| kept.cause == cause) {
            Some(kept) => kept.entries += 1,
            None => {
                let (entry, selector) = (Arc::clone(entry), selector.clone());
                self.kept.push(KeptEntries { cause, entry, selector, entries: 1 });
            }
        }
    }

    /// Why nobody can be served at all, if that is so.
    pub(super) fn ungiven(
        &self,
        facts: &Facts,
        questions: &Questions,
        at: Option<&Presence>,
    ) -> Option<Ungiven> {
        let said = || self.kept.iter().map(|kept| kept.said(facts, questions, at)).collect::<Vec<_>>();
        let mut causes: Vec<&'static str> = self.kept.iter().map(|kept| kept.cause.text()).collect();
        causes.dedup();
        self.all.then(|| Ungiven { said: said().join("; "), causes })
    }

    /// What keeps everybody from some entries, and is said nowhere else.
    pub(super) fn of_some(&self, facts: &Facts, questions: &Questions, at: Option<&Presence>) -> Vec<String> {
        let kept = self.kept.iter().filter(|kept| !self.all && kept.cause.is_of_entries());
        kept.map(|kept| kept.said(facts, questions, at)).collect()
    }

    /// Whether all that keeps everybody from entries is known, and not just not known to be well.
    pub(super) fn is_tried(&self, facts: &Facts) -> bool {
        let is_untried = |nth: usize| matches!(facts.outages.get(nth), Some((_, Outage::Untried(_))));
        !self.kept.iter().any(|kept| matches!(kept.cause, Cause::Outage(nth) if is_untried(nth)))
    }
}

impl Cause {
    /// In a few words.
    fn text(self) -> &'static str {
        match self {
            Self::Shut => "the socket of the workload api is shut to other users",
            Self::NoNumber => "users or groups have no number in the agent's user namespace",
            Self::Unbelieved => "what callers execute is not believed in the agent's user namespace",
            Self::Untraced => "the agent has no CAP_SYS_PTRACE",
            Self::Hidden => "processes of other users are hidden (hidepid)",
            Self::HiddenGroups => "supplementary groups of other users' processes are hidden (hidepid)",
            Self::OtherPods => "callers in other pods cannot be identified (hostPID)",
            Self::Strangers => "callers are in another PID namespace",
            Self::Outage(_) => "what pods callers are in cannot be told",
            Self::Absent => "users or groups do not exist",
        }
    }

    /// Whether nothing else tells it than the entries that it concerns.
    fn is_of_entries(self) -> bool {
        match self {
            Self::Shut | Self::NoNumber | Self::Unbelieved | Self::Untraced | Self::HiddenGroups => true,
            Self::Hidden | Self::OtherPods | Self::Strangers | Self::Outage(_) | Self::Absent => false,
        }
    }
}

impl KeptEntries {
    /// In a sentence, with what to do.
    fn said(&self, facts: &Facts, questions: &Questions, at: Option<&Presence>) -> String {
        let mut said = format!("entry \"{}\" asks for {}", self.entry.spiffe_id, self.selector);
        let more = match self.entries.cmp(&2) {
            Ordering::Less => String::new(),
            Ordering::Equal => " (and 1 more entry)".to_owned(),
            Ordering::Greater => format!(" (and {} more entries)", self.entries - 1),
        };
        let (why, todo) = match self.cause {
            Cause::Shut => return said + &self.shut(facts, questions, at, &more),
            Cause::NoNumber => (
                ", which has no number in the user namespace of the agent",
                "run the agent outside of it, or map that user or group",
            ),
            Cause::Unbelieved => (
                ", but the mounts where the agent runs are not up to its user namespace, so that what is executed is not believed",
                "run the agent outside of it, or in a mount namespace of its own",
            ),
            Cause::Untraced => (
                ", but the agent has no CAP_SYS_PTRACE to see what processes of that user execute",
                "give it the capability (systemd: discover-workload-path.conf)",
            ),
            Cause::Hidden => (", whose processes are hidden from the agent", UNHIDE),
            Cause::HiddenGroups => (
                ", but what supplementary groups processes of that user are in is hidden from the agent, but for the first second of \
                 a connection",
                UNHIDE,
            ),
            Cause::OtherPods => (
                ", but callers in other pods have no PID in the PID namespace of the agent's container",
                "its pod needs hostPID: true",
            ),
            Cause::Strangers => (
                ", but all who called so far have no PID in the PID namespace of the agent",
                "run the agent in the host's (hostPID: true in its pod, --pid=host in its container)",
            ),
            Cause::Outage(nth) => {
                let why = facts.outages.get(nth).map(|(_, why)| why.to_string()).unwrap_or_default();
                return format!("{said}{more}: {why}");
            }
            Cause::Absent => {
                let why = questions.nobodys(&self.selector).unwrap_or_default();
                return format!("{said}{more}: {why}");
            }
        };
        // A String can be written to.
        let _never = write!(said, "{why}{more}; {todo}");
        said
    }

    fn shut(&self, facts: &Facts, questions: &Questions, at: Option<&Presence>, more: &str) -> String {
        let Some(Account::User(uid)) = questions.account(&self.selector) else { return String::new() };
        let (Some(shut), Some(at)) = (facts.way.keeps_out(uid, |_| false), at) else { return String::new() };
        format!(
            ", but no such process can reach the socket {}: {shut}{more}; {}, or choose another socket_path",
            at.path().display(),
            opens(shut, at)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::unistd::{Gid, Uid};

    use super::{super::way_in::Memberships, *};
    use crate::{
        attest::{AttestSettings, Attestor},
        identity::EntryIndex,
        os::pidfd::Owner,
        peer::way::Shut,
    };

    fn way(group: Option<u32>) -> SocketWay {
        let shut = Shut { path: "/a".into(), uid: 7, mode: 0o700, group };
        SocketWay { shut: vec![shut], memberships: Memberships::of(&[(5, Some(&[5])), (6, Some(&[6, 3]))]) }
    }

    fn rootless() -> Facts {
        let nobody = Owner { uid: Uid::from_raw(65_534), gid: Gid::from_raw(65_534) };
        let mapped = Some(MappedAccounts::of("0 1000 1", "0 1000 1", nobody));
        Facts { mapped, ..Facts::default() }
    }

    /// What these entries ask for, entries apart by bars: users and groups are this node's.
    fn asked(entries: &str) -> (Vec<Arc<Entry>>, Arc<Questions>) {
        let entries: Vec<_> = entries.split('|').filter(|it| !it.is_empty()).map(Entry::asking).collect();
        let mut settings = AttestSettings::default();
        settings.k8s.enabled = true;
        let attestor = Attestor::new(settings);
        let index = Arc::new(EntryIndex::new(entries.clone()));
        let _asked_until_then = attestor.prepare_for(&index);
        attestor.wait(Duration::from_secs(60));
        (entries, attestor.prepare_for(&index))
    }

    #[test]
    fn each_entry_is_judged_by_what_is_certain() {
        let well = Facts::default;
        let of_owner = || Facts { way: way(None), ..well() };
        let of_group = || Facts { way: way(Some(3)), ..well() };
        let hidden = || Facts { sees_only: Some(5), ..well() };
        let groups_hidden = || Facts { knows_groups_only: Some(5), ..well() };
        let untraced = || Facts { traces_only: Some(5), ..well() };
        let apart = |apart| Facts { apart, ..well() };
        let unbelieved = || Facts { executables_unbelieved: true, ..rootless() };
        let outage = || Facts { outages: vec![("k8s", Outage::Failing("x".to_owned()))], ..well() };
        let both = || Facts { outages: outage().outages, ..of_owner() };
        for (case, facts, selectors, want) in [
            ("nothing is wrong", well(), "unix:uid:5", None),
            ("nobody has this name", well(), "unix:user:no-such-user", Some(Cause::Absent)),
            ("nobody is in this group", well(), "unix:uid:0 unix:group:no-such-group", Some(Cause::Absent)),
            ("somebody has this name", well(), "unix:user:root", None),
            ("root, past its owner's directory", of_owner(), "unix:uid:0", None),
            ("root, by name", of_owner(), "unix:user:root", None),
            ("the owner", of_owner(), "unix:uid:7", None),
            ("another", of_owner(), "unix:uid:5", Some(Cause::Shut)),
            ("another, in a group", of_owner(), "unix:gid:3 unix:uid:5", Some(Cause::Shut)),
            ("root, in a group", of_owner(), "unix:gid:5 unix:uid:0", None),
            ("a group, which may be root's", of_owner(), "unix:gid:5", None),
            ("a further group", of_owner(), "unix:supplementary_gid:5", None),
            ("no account", of_owner(), "unix:path:/bin/web", None),
            ("a pod, which has it mounted", of_owner(), "k8s:ns:shop unix:uid:5", None),
            ("no member of the group", of_group(), "unix:uid:5", Some(Cause::Shut)),
            ("a member", of_group(), "unix:uid:6", None),
            ("of whom the database does not say", of_group(), "unix:uid:9", None),
            ("no member, in that group all the same", of_group(), "unix:gid:3 unix:uid:5", None),
            ("the agent's own user", hidden(), "unix:uid:5", None),
            ("another user", hidden(), "unix:uid:0", Some(Cause::Hidden)),
            ("a group, which may be its own", hidden(), "unix:gid:9", None),
            ("another user, whose groups are hidden", groups_hidden(), "unix:uid:0", None),
            (
                "the same, by such a group",
                groups_hidden(),
                "unix:supplementary_gid:9 unix:uid:0",
                Some(Cause::HiddenGroups),
            ),
            ("its own user, by such a group", groups_hidden(), "unix:supplementary_gid:9 unix:uid:5", None),
            ("such a group, which may be its own", groups_hidden(), "unix:supplementary_gid:9", None),
            ("its own executable", untraced(), "unix:uid:5 unix:path:/bin/web", None),
            ("another's executable", untraced(), "unix:uid:6 unix:path:/bin/web", Some(Cause::Untraced)),
            ("another user alone", untraced(), "unix:uid:6", None),
            ("anybody's executable", untraced(), "unix:path:/bin/web", None),
            ("a user without a number", rootless(), "unix:uid:5", Some(Cause::NoNumber)),
            ("one with a number", rootless(), "unix:uid:0", None),
            ("a group without", rootless(), "unix:gid:5", Some(Cause::NoNumber)),
            ("a further group without", rootless(), "unix:supplementary_gid:5", Some(Cause::NoNumber)),
            ("a group with", rootless(), "unix:gid:0", None),
            ("an executable", rootless(), "unix:path:/bin/web", None),
            ("one that is not believed", unbelieved(), "unix:path:/bin/web", Some(Cause::Unbelieved)),
            ("a digest that is not", unbelieved(), "unix:uid:0 unix:sha256:0", Some(Cause::Unbelieved)),
            ("a pod, with its processes", apart(Apart::Nobody), "k8s:ns:shop", None),
            ("a pod, without", apart(Apart::OtherPods), "k8s:ns:shop", Some(Cause::OtherPods)),
            ("a user, perhaps in this container", apart(Apart::OtherPods), "unix:uid:5", None),
            ("a user, of whom none was seen", apart(Apart::Everybody), "unix:uid:5", Some(Cause::Strangers)),
            ("a pod, and no kubelet", outage(), "k8s:ns:shop", Some(Cause::Outage(0))),
            ("no pod, and no kubelet", outage(), "unix:uid:5", None),
            ("a pod, of two causes", both(), "k8s:ns:shop unix:uid:5", Some(Cause::Outage(0))),
        ] {
            let (entries, questions) = asked(selectors);
            let found = facts.keep_all_from(&entries[0], &questions);
            assert_eq!(found.map(|(cause, _)| cause), want, "{case}");
        }
    }

    /// Causes add up; a name that nobody has looked up yet may be somebody's.
    #[test]
    fn nobody_can_be_served_where_each_entry_has_a_cause() {
        let outages = || vec![("k8s", Outage::Failing("the kubelet is away".to_owned()))];
        let of_owner = || Facts { way: way(None), outages: outages(), ..Facts::default() };
        let of_server = || Facts { has_server: true, outages: outages(), ..Facts::default() };
        let shut = "the socket of the workload api is shut to other users";
        let pods = "what pods callers are in cannot be told";
        let absent = "users or groups do not exist";
        for (case, facts, entries, want) in [
            ("no entry", of_owner(), "", None),
            ("one", of_owner(), "unix:uid:5", Some(shut.to_owned())),
            ("one of two", of_owner(), "unix:uid:5|unix:uid:0", None),
            ("one of two, the other way", of_owner(), "unix:uid:0|unix:uid:5", None),
            ("shut, and no kubelet", of_owner(), "k8s:ns:shop|unix:uid:5", Some(format!("{shut}, {pods}"))),
            (
                "shut, and no user",
                of_owner(),
                "unix:user:no-such|unix:uid:5",
                Some(format!("{shut}, {absent}")),
            ),
            ("no user", Facts::default(), "unix:user:no-such", Some(absent.to_owned())),
            ("no user, and one", Facts::default(), "unix:user:no-such|unix:uid:5", None),
            ("no kubelet, and no user", of_server(), "k8s:ns:shop|unix:user:no-such", Some(pods.to_owned())),
            ("all may be for another node", of_server(), "unix:user:no-such", None),
        ] {
            let (entries, questions) = asked(entries);
            let verdict = EntriesVerdict::of(&entries, &questions, &facts);
            let ungiven = verdict.ungiven(&facts, &questions, None);
            assert_eq!(ungiven.map(|ungiven| ungiven.causes.join(", ")), want, "{case}");
        }
        let (entries, _) = asked("unix:user:no-such");
        let verdict = EntriesVerdict::of(&entries, &Questions::default(), &Facts::default());
        assert!(!verdict.all, "nobody has looked it up");
    }

    #[test]
    fn each_cause_is_said_once_with_its_first_entry() {
        let outages = vec![("k8s", Outage::Failing("the kubelet is away".to_owned()))];
        let facts = Facts { outages, ..rootless() };
        let (entries, questions) = asked("unix:uid:5|k8s:ns:shop|unix:gid:6|unix:uid:8|k8s:ns:inn");
        let ungiven = EntriesVerdict::of(&entries, &questions, &facts).ungiven(&facts, &questions, None);
        assert_eq!(
            ungiven.unwrap().said,
            "entry \"spiffe://td/x\" asks for unix:uid:5, which has no number in the user namespace of the agent (and 2 more \
             entries); run the agent outside of it, or map that user or group; entry \"spiffe://td/x\" asks for k8s:ns:shop (and \
             1 more entry): the kubelet is away"
        );
    }
}
