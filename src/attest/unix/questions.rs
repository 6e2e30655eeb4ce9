//! What entries ask of the unix attestor, and the numbers of the names among it.
//!
//! Made for the entries of one snapshot and never edited: an answer that changes makes another one.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use ahash::RandomState;

use super::names::{AskedNames, NameAnswer, Names, OwnAccounts};
use crate::{
    attest::status::ProcStatus,
    identity::{Entry, selector::Selector},
    os::accounts::AccountName,
};

/// The selectors of each number.
type ByNumber = HashMap<u32, Vec<Selector>, RandomState>;

/// A user or a group that an entry asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Account {
    User(u32),
    Group(u32),
}

/// What entries ask for.
#[derive(Debug, Default)]
pub struct UnixQuestions {
    answers: HashMap<AccountName, NameAnswer, RandomState>,
    users: ByNumber,
    groups: ByNumber,
    supplementary_groups: ByNumber,
    supplementary_gids: HashSet<u32, RandomState>,
    /// The kinds of the names that are not answered.
    unanswered: BTreeSet<&'static str>,
    /// Until when these may be anybody's.
    doubted_until: Option<Instant>,
    /// Has the names looked up while these questions are asked.
    _asked: Option<AskedNames>,
}

impl UnixQuestions {
    /// What these entries ask for, with what `names` knows of it.
    pub(super) fn of(entries: &[Arc<Entry>], names: &Names) -> Self {
        let mut questions = Self::default();
        let mut named: BTreeSet<&Selector> = BTreeSet::new();
        let selectors = entries.iter().flat_map(|entry| &entry.selectors);
        for selector in selectors.filter(|selector| selector.kind() == super::NAME) {
            if let Some(number) = selector.value().strip_prefix("supplementary_gid:") {
                questions.supplementary_gids.extend(number.parse::<u32>());
            } else if name(selector.value()).is_some() {
                named.insert(selector);
            }
        }
        let asked: BTreeSet<AccountName> = named.iter().filter_map(|it| Some(name(it.value())?.1)).collect();
        let asked = names.ask(asked.into_iter().collect());
        questions.answers = asked.answers().map(|(name, answer)| (name.clone(), answer)).collect();
        questions.doubted_until = asked.doubted_until();
        questions._asked = Some(asked);
        for selector in named {
            let Some((word, name)) = name(selector.value()) else { continue };
            match questions.answers.get(&name) {
                Some(NameAnswer::Number(number)) => {
                    let by_number = match word {
                        USER => &mut questions.users,
                        GROUP => &mut questions.groups,
                        _ => &mut questions.supplementary_groups,
                    };
                    by_number.entry(*number).or_default().push(selector.clone());
                }
                Some(NameAnswer::Unanswered) => drop(questions.unanswered.insert(word)),
                Some(NameAnswer::Nobody) | None => {}
            }
        }
        questions
    }

    /// The names that entries ask for and that this user has.
    pub(super) fn of_user(&self, uid: u32) -> &[Selector] {
        self.users.get(&uid).map_or(&[], Vec::as_slice)
    }

    /// The names that entries ask for and that a process of this group has.
    pub(super) fn of_group(&self, gid: u32) -> &[Selector] {
        self.groups.get(&gid).map_or(&[], Vec::as_slice)
    }

    /// The same of a supplementary group, and whether an entry asks for its number.
    pub(super) fn of_supplementary_group(&self, gid: u32) -> (&[Selector], bool) {
        let names = self.supplementary_groups.get(&gid).map_or(&[][..], Vec::as_slice);
        (names, self.supplementary_gids.contains(&gid))
    }

    /// Whether an entry asks for a supplementary group that there may be.
    pub(in crate::attest) fn ask_for_groups(&self) -> bool {
        !(self.supplementary_groups.is_empty() && self.supplementary_gids.is_empty())
            || self.unanswered.contains(SUPPLEMENTARY_GROUP)
    }

    /// The kinds of the names that the database said nothing of, and that a process may have. Whose number stands in the
    /// node's own files, or has a name that was told, has no other; and nobody is kept waiting for ever.
    pub(super) fn unanswered(
        &self,
        own: &OwnAccounts,
        status: &ProcStatus,
    ) -> impl Iterator<Item = &'static str> {
        let doubted = self.doubted_until.is_some_and(|until| Instant::now() < until);
        self.unanswered.iter().copied().filter(move |word| {
            if !doubted {
                return false;
            }
            let is_of_node = match *word {
                USER => own.has_user(status.uid) || !self.of_user(status.uid).is_empty(),
                GROUP => own.has_group(status.gid) || !self.of_group(status.gid).is_empty(),
                _ => status.groups.iter().all(|gid| own.has_group(*gid)),
            };
            let of_kind = |name: &AccountName| (*word == USER) == matches!(name, AccountName::User(_));
            let mut missing = self.answers.iter().filter(|(_, answer)| **answer == NameAnswer::Unanswered);
            !is_of_node || missing.any(|(name, _)| of_kind(name) && own.has(name))
        })
    }

    /// Whether an entry asks for a name of this selector.
    pub(super) fn ask_for_name(&self, value: &str) -> bool {
        name(value).is_some_and(|(_, name)| self.answers.contains_key(&name))
    }

    /// The kind of a selector that may stay untold.
    pub(super) fn untellable(&self, value: &str) -> Option<&'static str> {
        if let Some(word) = executable(value) {
            return Some(word);
        }
        if value.starts_with("supplementary_gid:") {
            return Some(SUPPLEMENTARY_GID);
        }
        let (word, name) = name(value)?;
        match self.answers.get(&name)? {
            NameAnswer::Unanswered => Some(word),
            // It is as good as its number.
            NameAnswer::Number(_) if word == SUPPLEMENTARY_GROUP => Some(SUPPLEMENTARY_GID),
            NameAnswer::Number(_) | NameAnswer::Nobody => None,
        }
    }

    /// Whom a selector asks for, as far as it is known.
    pub(in crate::attest) fn account(&self, value: &str) -> Option<Account> {
        let (word, text) = value.split_once(':')?;
        let of = if matches!(word, "uid" | USER) { Account::User } else { Account::Group };
        match word {
            "uid" | "gid" | "supplementary_gid" => text.parse().ok().map(of),
            _ => match self.answers.get(&name(value)?.1)? {
                NameAnswer::Number(number) => Some(of(*number)),
                NameAnswer::Nobody | NameAnswer::Unanswered => None,
            },
        }
    }

    /// Whether the database has said nothing of the name in this selector.
    pub(in crate::attest) fn is_unanswered(&self, value: &str) -> bool {
        name(value).is_some_and(|(_, name)| self.answers.get(&name) == Some(&NameAnswer::Unanswered))
    }

    /// Why no process has the selector.
    pub(super) fn absent(&self, value: &str) -> Option<String> {
        let (_, name) = name(value)?;
        let word = name.word();
        match self.answers.get(&name)? {
            NameAnswer::Number(_) => None,
            NameAnswer::Nobody => Some(format!(
                "there is no such {word} on this node: add it, correct the name, or ask for its number, as unix:{}",
                if word == USER { "uid:1000" } else { "gid:1000" }
            )),
            NameAnswer::Unanswered => {
                Some(format!("the user database of this node does not say whether there is such a {word}"))
            }
        }
    }
}

const USER: &str = "user";
const GROUP: &str = "group";
const SUPPLEMENTARY_GROUP: &str = "supplementary_group";
const SUPPLEMENTARY_GID: &str = "supplementary_gid";
/// The kinds that are of supplementary groups.
pub(super) const GROUP_KINDS: [&str; 2] = [SUPPLEMENTARY_GID, SUPPLEMENTARY_GROUP];

/// The kind of a selector of an executable.
pub(super) fn executable(value: &str) -> Option<&'static str> {
    match value.split(':').next() {
        Some("path") => Some(super::PATH),
        Some("sha256") => Some(super::SHA256),
        _ => None,
    }
}

/// The kind of a selector that names a user or a group, and whom.
fn name(value: &str) -> Option<(&'static str, AccountName)> {
    let (word, name) = value.split_once(':')?;
    match word {
        "user" => Some((USER, AccountName::User(name.into()))),
        "group" => Some((GROUP, AccountName::Group(name.into()))),
        "supplementary_group" => Some((SUPPLEMENTARY_GROUP, AccountName::Group(name.into()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::{attestors::News, unix::names::tests::FakeDatabase};

    fn status(uid: u32, gid: u32, groups: &[u32]) -> ProcStatus {
        ProcStatus { uid, gid, groups: groups.to_vec() }
    }

    /// A directory server that is away is in doubt for its own users, and for nobody of the node's.
    #[test]
    fn who_stands_in_the_files_of_the_node_is_nobody_else() {
        let names = Names::of(
            Box::new(FakeDatabase::new(|_: &AccountName| Err(nix::errno::Errno::EIO))),
            News::default(),
        );
        let entries =
            ["unix:user:far", "unix:group:farm", "unix:supplementary_group:farm"].map(Entry::asking);
        let questions = UnixQuestions::of(&entries, &names);
        let words =
            |own: &OwnAccounts, status: &ProcStatus| questions.unanswered(own, status).collect::<Vec<_>>();
        let own = OwnAccounts::of(&[], &[0, 1000], &[0, 4, 1000]);
        for (case, status, want) in [
            ("of the node", status(1000, 1000, &[4]), &[][..]),
            ("no groups", status(1000, 1000, &[]), &[]),
            ("a user of the server's", status(70_000, 1000, &[4]), &["user"]),
            ("a group of the server's", status(1000, 70_000, &[4]), &["group"]),
            ("one of its groups", status(1000, 1000, &[4, 70_000]), &["supplementary_group"]),
        ] {
            assert_eq!(words(&own, &status), want, "{case}");
        }
        let own = OwnAccounts::of(&[AccountName::User("far".into())], &[0, 1000], &[0]);
        assert_eq!(
            words(&own, &status(1000, 0, &[])),
            ["user"],
            "a name of the node's own that is not answered"
        );
    }
}
