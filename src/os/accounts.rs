//! Users and groups of this node, as its databases name them (nsswitch.conf).
//!
//! A lookup may ask a directory server and hang for as long as that likes, so none is made on a thread that others
//! need. Who asks once in a while hands a lookup to the one thread that is kept for that, and stops waiting at a
//! deadline ([`by`]). While that thread hangs, everybody who asks it is told that there is no answer.

use std::{
    ffi::{CStr, CString},
    fs,
    mem::MaybeUninit,
    os::unix::fs::MetadataExt as _,
    path::Path,
    ptr,
    sync::{
        Arc, OnceLock,
        mpsc::{SyncSender, sync_channel},
    },
    time::Instant,
};

use libc::{c_char, c_int};
use nix::{
    errno::Errno,
    unistd::{Uid, User, getgrouplist},
};

/// The node's own users.
pub const PASSWD: &str = "/etc/passwd";
/// The node's own groups.
pub const GROUP: &str = "/etc/group";

/// The databases' own files, which show when they change.
const FILES: [&str; 3] = [PASSWD, GROUP, "/etc/nsswitch.conf"];

/// A longer name is nobody's: no system has a larger LOGIN_NAME_MAX.
const MAX_NAME_LEN: usize = 256;

/// How much room the texts of a user or group have at first, and at most: a group's members are among them.
const ROOM: usize = 16 << 10;
const MOST_ROOM: usize = 1 << 20;

/// So many lookups wait for the thread at most.
const QUEUE: usize = 8;

/// How the databases' own files look: device, inode, size, and times of change and modification of each, `None` where there is
/// none. Another database, as a directory server's, does not show in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesStamp(Vec<Option<[i128; 5]>>);

impl FilesStamp {
    /// As they look now.
    pub fn now() -> Self {
        Self::of(&FILES.map(Path::new))
    }

    /// The same of these files.
    pub fn of(files: &[&Path]) -> Self {
        let stamp = |path: &&Path| {
            let meta = fs::metadata(path).ok()?;
            let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            Some([
                meta.dev().into(),
                meta.ino().into(),
                meta.len().into(),
                time(meta.ctime(), meta.ctime_nsec()),
                time(meta.mtime(), meta.mtime_nsec()),
            ])
        };
        Self(files.iter().map(stamp).collect())
    }
}

/// The name of a user or of a group. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccountName {
    /// A user's.
    User(Arc<str>),
    /// A group's.
    Group(Arc<str>),
}

/// The number of a user or of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountNumber {
    /// A UID.
    User(u32),
    /// A GID.
    Group(u32),
}

impl AccountName {
    /// `user` or `group`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Group(_) => "group",
        }
    }

    /// The name alone.
    pub fn text(&self) -> &str {
        match self {
            Self::User(name) | Self::Group(name) => name,
        }
    }

    /// Its number, or that nobody has this name. **May hang.** Where the database answers with another name (one in
    /// other letters, where they do not matter), the number is the answer all the same.
    ///
    /// # Errors
    /// The database cannot say.
    pub fn number(&self) -> Result<Option<u32>, Errno> {
        if self.text().len() > MAX_NAME_LEN {
            return Ok(None);
        }
        let Ok(name) = CString::new(self.text()) else { return Ok(None) };
        let (found, file) = match self {
            Self::User(_) => (user_named(&name), PASSWD),
            Self::Group(_) => (group_named(&name), GROUP),
        };
        let found = match found {
            // As in a container without the file: nobody is known by a name there.
            Err(Errno::ENOENT | Errno::ESRCH) if !Path::new(file).exists() => None,
            found => found?,
        };
        // With -1 the kernel says "no user".
        Ok(found.filter(|number| *number != u32::MAX))
    }
}

impl AccountNumber {
    /// The name of it, or that it has none. **May hang.**
    ///
    /// # Errors
    /// The database cannot say.
    pub fn name(self) -> Result<Option<String>, Errno> {
        match self {
            Self::User(uid) => user_numbered(uid),
            Self::Group(gid) => group_numbered(gid),
        }
    }
}

/// The groups that the databases put this user in, its first one included; `None` where there is no such user. **May hang.**
///
/// # Errors
/// The databases cannot say.
pub fn groups_of(uid: u32) -> Result<Option<Vec<u32>>, Errno> {
    let user = match User::from_uid(Uid::from_raw(uid)) {
        Err(Errno::ENOENT | Errno::ESRCH) if !Path::new(PASSWD).exists() => None,
        found => found?,
    };
    let Some(user) = user else { return Ok(None) };
    let name = CString::new(user.name).map_err(|_nul| Errno::EINVAL)?;
    let groups = getgrouplist(&name, user.gid)?;
    Ok(Some(groups.into_iter().map(|gid| gid.as_raw()).collect()))
}

#[expect(unsafe_code, reason = "nix tells errno, and not what the call returns")]
fn user_named(name: &CStr) -> Result<Option<u32>, Errno> {
    // SAFETY: what it is given is as `found` promises, and the name ends in NUL.
    let call = |user, room, size, found| unsafe { libc::getpwnam_r(name.as_ptr(), user, room, size, found) };
    found(call, |user: &libc::passwd| user.pw_uid)
}

#[expect(unsafe_code, reason = "nix tells errno, and not what the call returns")]
fn group_named(name: &CStr) -> Result<Option<u32>, Errno> {
    // SAFETY: what it is given is as `found` promises, and the name ends in NUL.
    let call =
        |group, room, size, found| unsafe { libc::getgrnam_r(name.as_ptr(), group, room, size, found) };
    found(call, |group: &libc::group| group.gr_gid)
}

#[expect(unsafe_code, reason = "nix tells errno, and not what the call returns")]
fn user_numbered(uid: u32) -> Result<Option<String>, Errno> {
    // SAFETY: what it is given is as `found` promises.
    let call = |user, room, size, found| unsafe { libc::getpwuid_r(uid, user, room, size, found) };
    // SAFETY: a record that was found has a name, which ends in NUL.
    let name = |user: &libc::passwd| unsafe { CStr::from_ptr(user.pw_name) }.to_string_lossy().into_owned();
    found(call, name)
}

#[expect(unsafe_code, reason = "nix tells errno, and not what the call returns")]
fn group_numbered(gid: u32) -> Result<Option<String>, Errno> {
    // SAFETY: what it is given is as `found` promises.
    let call = |group, room, size, found| unsafe { libc::getgrgid_r(gid, group, room, size, found) };
    // SAFETY: a record that was found has a name, which ends in NUL.
    let name = |group: &libc::group| unsafe { CStr::from_ptr(group.gr_name) }.to_string_lossy().into_owned();
    found(call, name)
}

/// What is read of the record that `call` finds, if it finds one. It is given a place for a record, room for its texts with
/// the size of that, and a place for where the record is; all of them are its own until it returns.
#[expect(unsafe_code, reason = "the record is written by the C library")]
fn found<T, R>(
    call: impl Fn(*mut T, *mut c_char, usize, *mut *mut T) -> c_int,
    read: impl Fn(&T) -> R,
) -> Result<Option<R>, Errno> {
    let mut room = vec![0; ROOM];
    loop {
        let mut record = MaybeUninit::<T>::uninit();
        let mut found = ptr::null_mut();
        match call(record.as_mut_ptr(), room.as_mut_ptr(), room.len(), &raw mut found) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: the call says that it has written the record, whose texts are in the room.
            0 => return Ok(Some(read(unsafe { record.assume_init_ref() }))),
            libc::ERANGE if room.len() < MOST_ROOM => room.resize(room.len() * 2, 0),
            errno => return Err(Errno::from_raw(errno)),
        }
    }
}

/// What `lookup` gives, if it does by `deadline`. Blocks this thread until then.
pub fn by<T: Send + 'static>(deadline: Instant, lookup: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (answer, answered) = sync_channel(1);
    hand_in(deadline, move || drop(answer.send(lookup())))?;
    answered.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
}

/// What `lookup` gives, if it does by `deadline`.
pub async fn awaited_by<T: Send + 'static>(
    deadline: Instant,
    lookup: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    hand_in(deadline, move || drop(answer.send(lookup())))?;
    tokio::time::timeout_at(deadline.into(), answered).await.ok()?.ok()
}

type Lookup = (Instant, Box<dyn FnOnce() + Send>);

/// `None` where the thread has too much to do, or could not be made.
fn hand_in(deadline: Instant, lookup: impl FnOnce() + Send + 'static) -> Option<()> {
    static THREAD: OnceLock<Option<SyncSender<Lookup>>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (sender, lookups) = sync_channel::<Lookup>(QUEUE);
        let look_up = move || {
            for (deadline, lookup) in lookups {
                // Nobody waits any more otherwise.
                if Instant::now() < deadline {
                    lookup();
                }
            }
        };
        std::thread::Builder::new().name("accounts".to_owned()).spawn(look_up).ok().map(|_thread| sender)
    });
    thread.as_ref()?.try_send((deadline, Box::new(lookup))).ok()
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, time::Duration};

    use super::*;

    #[test]
    fn root_is_zero_and_strange_names_are_nobodys() {
        assert_eq!(AccountName::User("root".into()).number(), Ok(Some(0)));
        assert_eq!(AccountName::Group("root".into()).number(), Ok(Some(0)));
        assert_eq!(AccountNumber::User(0).name(), Ok(Some("root".to_owned())));
        for name in
            ["", "0", "root\0x", "root:x", "ro\not", "\u{202e}root", "+", "-root", &"r".repeat(100_000)]
        {
            assert_eq!(AccountName::User(name.into()).number(), Ok(None), "{name:?}");
            assert_eq!(AccountName::Group(name.into()).number(), Ok(None), "{name:?}");
        }
    }

    #[test]
    fn a_user_is_in_its_first_group_and_who_does_not_exist_in_none() {
        assert!(groups_of(0).unwrap().unwrap().contains(&0));
        assert_eq!(groups_of(3_999_999_999), Ok(None));
    }

    #[tokio::test]
    async fn nobody_waits_beyond_a_deadline() {
        let soon = || Instant::now() + Duration::from_millis(20);
        let late = || Instant::now() + Duration::from_secs(600);
        assert_eq!(by(late(), || 7), Some(7));
        let (let_go, held) = channel::<()>();
        assert_eq!(by(soon(), move || held.recv().is_err()), None, "it hangs");
        assert_eq!(awaited_by(soon(), || 7).await, None, "the one behind it");
        for _ in 0..QUEUE + 2 {
            // The first few find a place, the others are told at once.
            assert_eq!(by(soon(), || unreachable!("nobody waits for it")), None);
        }
        drop(let_go);
        // It answers again, once it has left out those that nobody waits for.
        while awaited_by(late(), || 7).await != Some(7) {
            tokio::task::yield_now().await;
        }
    }
}
