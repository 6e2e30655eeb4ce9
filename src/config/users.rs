//! The users of this node that a configuration names, from its user database (nsswitch.conf).
//!
//! A directory server that hangs must not make a start or a reload hang: each name is waited for so long, all of them
//! together not much longer, and after the first that is not answered no more is asked.

use std::{
    cell::{Cell, OnceCell},
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    limits::{Families, pattern::NoAnswer},
    os::accounts::{self, AccountName},
};

/// How long one name is waited for.
const EACH_WITHIN: Duration = Duration::from_secs(2);

/// How long all names of a configuration are waited for, from the first on.
const ALL_WITHIN: Duration = Duration::from_secs(10);

/// The longest `/etc/subuid` that is read, in bytes.
const MAX_SUBUID: u64 = 1024 * 1024;

/// The users of this node, as one configuration asks for them.
#[derive(Debug, Default)]
pub(super) struct NodeUsers {
    until: OnceCell<Instant>,
    /// One was not answered.
    away: Cell<bool>,
}

impl NodeUsers {
    /// The UID of a user, or that there is no such user.
    pub(super) fn uid(&self, name: &str) -> Result<Option<u32>, NoAnswer> {
        if self.away.get() {
            return Err(NoAnswer);
        }
        let now = Instant::now();
        let until = (*self.until.get_or_init(|| now + ALL_WITHIN)).min(now + EACH_WITHIN);
        let name = AccountName::User(name.into());
        match accounts::by(until, move || name.number()) {
            Some(Ok(uid)) => Ok(uid),
            // It says at once that it cannot: of another user it may know more.
            Some(Err(_errno)) => Err(NoAnswer),
            None => {
                self.away.set(true);
                Err(NoAnswer)
            }
        }
    }

    /// Whose subordinate UIDs are whose (subuid(5)). Without the file nobody has any.
    pub(super) fn families(&self, path: &Path) -> Families {
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(MAX_SUBUID).read_to_string(&mut text));
        match read {
            Ok(_) => {
                let unknown = Cell::new(0_u32);
                let families = Families::parse(&text, |name| {
                    self.uid(name).unwrap_or_else(|NoAnswer| {
                        unknown.set(unknown.get() + 1);
                        None
                    })
                });
                if unknown.get() > 0 {
                    let path = path.display();
                    tracing::warn!(
                        %path,
                        users = unknown.get(),
                        "the user database does not say who these users are: they are not counted together with their \
                         subordinate UIDs"
                    );
                }
                families
            }
            Err(err) => {
                if err.kind() != io::ErrorKind::NotFound {
                    let path = path.display();
                    tracing::warn!(%path, error = %err, "cannot read the subordinate UIDs of users");
                }
                Families::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_has_root() {
        let users = NodeUsers::default();
        // While another test has the one thread hang, there is no answer.
        while users.uid("root") != Ok(Some(0)) {
            users.away.set(false);
            std::thread::yield_now();
        }
        assert_eq!(users.uid("no such user"), Ok(None));
        users.away.set(true);
        assert_eq!(users.uid("root"), Err(NoAnswer), "once one is not answered, nobody waits for the next");
        assert_eq!(users.families(Path::new("/no/such/file")), Families::default());
    }
}
