//! Whose a namespace is, whom the agent's own user namespace has no number for, and whose processes `/proc` shows.

use std::{
    fs,
    ops::Range,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::stat::{fstat, stat},
    unistd::{Gid, Uid},
};

use super::pidfd::Owner;

/// What the kernel says of every user, and of every group, that this process's user namespace has no number for
/// (user_namespaces(7)); `None` in a namespace that has one for all. It may also be the number of somebody: `nobody` on most
/// systems.
pub fn unmapped() -> Option<Owner> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let partial = |path: &str| read(path).is_some_and(|map| !maps_all(&map));
    if !partial("/proc/self/uid_map") && !partial("/proc/self/gid_map") {
        return None;
    }
    // The kernel's default, where these cannot be read.
    let overflow = |path: &str| read(path).and_then(|text| text.trim().parse().ok()).unwrap_or(65_534);
    Some(Owner {
        uid: Uid::from_raw(overflow("/proc/sys/kernel/overflowuid")),
        gid: Gid::from_raw(overflow("/proc/sys/kernel/overflowgid")),
    })
}

/// The users and groups that this process's user namespace has a number for, those of [`unmapped`] excepted, which say nothing.
#[derive(Clone, Debug)]
pub struct MappedAccounts {
    users: Vec<Range<u64>>,
    groups: Vec<Range<u64>>,
    unmapped: Owner,
}

impl MappedAccounts {
    /// Those of this process; `None` where all have one, or the maps cannot be read.
    pub fn own() -> Option<Self> {
        let unmapped = unmapped()?;
        let read = |path: &str| fs::read_to_string(path).ok();
        Some(Self::of(&read("/proc/self/uid_map")?, &read("/proc/self/gid_map")?, unmapped))
    }

    /// Those of these maps.
    pub fn of(uid_map: &str, gid_map: &str, unmapped: Owner) -> Self {
        Self { users: numbers_in(uid_map), groups: numbers_in(gid_map), unmapped }
    }

    pub fn has_user(&self, uid: u32) -> bool {
        uid != self.unmapped.uid.as_raw() && has_number(&self.users, uid)
    }

    pub fn has_group(&self, gid: u32) -> bool {
        gid != self.unmapped.gid.as_raw() && has_number(&self.groups, gid)
    }
}

fn numbers_in(map: &str) -> Vec<Range<u64>> {
    let inside = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        let (first, count) = (numbers.next()??, numbers.nth(1)??);
        Some(first..first.saturating_add(count))
    });
    inside.collect()
}

fn has_number(numbers: &[Range<u64>], id: u32) -> bool {
    numbers.iter().any(|numbers| numbers.contains(&u64::from(id)))
}

/// Whether what is mounted where this process is, is up to the root of its own user namespace, as far as can be told.
pub fn owns_its_mounts() -> bool {
    let Ok(mounts) = fs::File::open("/proc/self/ns/mnt") else { return true };
    match owning_user_namespace(mounts) {
        Ok(owner) => match (fstat(&owner), stat("/proc/self/ns/user")) {
            (Ok(owner), Ok(own)) => (owner.st_dev, owner.st_ino) == (own.st_dev, own.st_ino),
            _ => true,
        },
        // It is neither ours nor below ours.
        Err(errno) => errno != Errno::EPERM,
    }
}

/// Whether a map (lines of first number inside, first outside, how many) has all there are.
fn maps_all(map: &str) -> bool {
    let lengths = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    lengths.sum::<u64>() >= u64::from(u32::MAX)
}

/// The user namespace that a namespace belongs to: whoever is root in there rules it (`NS_GET_USERNS`, Linux 4.9).
/// `namespace` is an open file of `/proc/PID/ns`.
///
/// # Errors
/// `EPERM` when it is neither the caller's own nor below it, `ENOTTY` on older kernels and for other files.
#[expect(unsafe_code, reason = "nix has no NS_GET_USERNS")]
pub fn owning_user_namespace(namespace: impl AsFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the request takes no argument and touches no memory of ours; the descriptor is borrowed for the call.
    let answer = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), libc::NS_GET_USERNS) };
    let fd = Errno::result(answer)?;
    // SAFETY: the call succeeded, so `fd` is an open descriptor that the kernel just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Why what `/proc` says of a PID is not about the process that the kernel means by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProcFault {
    /// It is not mounted here.
    #[error(
        "there is no /proc, so no caller is served: mount it (mount -t proc proc /proc), or give it to the agent's container"
    )]
    Missing,
    /// It was mounted for another PID namespace, where the same numbers are other processes.
    #[error(
        "/proc is of another PID namespace than the agent, and says of a caller what is another process's, so no caller is \
         served: mount the agent's own (mount -t proc proc /proc, or unshare --mount-proc), or run the agent in the PID \
         namespace of this one"
    )]
    Foreign,
}

/// Whether `/proc` shows the processes of this process's PID namespace by the numbers that they have in it.
///
/// # Errors
/// [`ProcFault`].
pub fn proc_is_ours() -> Result<(), ProcFault> {
    let own = std::process::id().to_string();
    match fs::read_link("/proc/self") {
        Ok(named) if named.as_os_str() == own.as_str() => {}
        Ok(_) => return Err(ProcFault::Foreign),
        // A process that has no number in the namespace of a /proc is not to be found in it.
        Err(_) if fs::exists("/proc/version").unwrap_or(false) => return Err(ProcFault::Foreign),
        Err(_) => return Err(ProcFault::Missing),
    }
    // By chance the numbers may be the same. A kernel without PID namespaces has no such line.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_one_number(&status) { Ok(()) } else { Err(ProcFault::Foreign) }
}

/// Whether the namespace of the `/proc` that has this status is the process's own: else its numbers in those below follow.
fn has_one_number(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NStgid:"));
    numbers.is_none_or(|numbers| numbers.split_whitespace().count() == 1)
}

/// Whether this process is in a PID namespace below the first, which has a number of its own in the kernel
/// (`PROC_PID_INIT_INO`). Processes outside of it have no PID here.
pub fn pid_namespace_is_inner() -> bool {
    const INITIAL: u64 = 0xEFFF_FFFC;
    stat("/proc/self/ns/pid").is_ok_and(|it| it.st_ino != INITIAL)
}

/// Whether the first process of the PID namespace is in the same cgroups as this one, as the first of a container is with the
/// others in it.
pub fn first_process_is_in_own_cgroup() -> bool {
    let of = |process: &str| fs::read(format!("/proc/{process}/cgroup")).ok();
    of("self").is_some_and(|own| of("1") == Some(own))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_map_has_the_users_of_its_lines() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        let nobody = Owner { uid: Uid::from_raw(65_534), gid: Gid::from_raw(65_533) };
        for (id, is_user, is_group) in [
            (0, true, false),
            (5, true, true),
            (65_533, true, false),
            (65_534, false, false),
            (65_536, true, false),
            (65_537, false, false),
            (u32::MAX, false, false),
        ] {
            let mapped = MappedAccounts::of(map, "5 5 1", nobody);
            assert_eq!((mapped.has_user(id), mapped.has_group(id)), (is_user, is_group), "{id}");
        }
        for (map, id) in [("", 0), ("0", 0), ("x y z", 0), ("5 5 0", 5)] {
            assert!(!has_number(&numbers_in(map), id), "{map}");
        }
        assert!(MappedAccounts::own().is_none_or(|mapped| mapped.has_user(0)));
        assert!(has_number(&numbers_in("0 0 4294967295"), 7));
    }

    #[test]
    fn a_process_has_one_number_in_its_own_namespace() {
        for (case, status, want) in [
            ("its own", "Name:\tx\nTgid:\t7\nNStgid:\t7\nNSpid:\t7\n", true),
            ("that above", "Name:\tx\nTgid:\t7\nNStgid:\t7\t7\nNSpid:\t7\t7\n", false),
            ("a kernel without", "Name:\tx\nTgid:\t7\n", true),
        ] {
            assert_eq!(has_one_number(status), want, "{case}");
        }
        assert_eq!(proc_is_ours(), Ok(()), "where the tests run");
    }

    #[test]
    fn a_map_of_all_leaves_nobody_out() {
        for (case, map, want) in [
            ("the node's own", "         0          0 4294967295\n", true),
            ("one user", "         0       1000          1\n", false),
            ("of a rootless container", "0 1000 1\n1 100000 65536\n", false),
            ("all in two parts", "0 0 1000\n1000 1000 4294966295\n", true),
            ("not written yet", "", false),
        ] {
            assert_eq!(maps_all(map), want, "{case}");
        }
    }

    #[test]
    fn our_mount_namespace_belongs_to_a_user_namespace_and_other_files_to_none() {
        let ours = stat("/proc/self/ns/user").unwrap();
        match owning_user_namespace(File::open("/proc/self/ns/mnt").unwrap()) {
            Ok(owner) => assert_eq!(fstat(&owner).unwrap().st_dev, ours.st_dev, "both are namespaces"),
            Err(errno) => {
                assert_eq!(errno, Errno::EPERM, "the tests run in a user namespace below its owner")
            }
        }
        assert_eq!(owning_user_namespace(File::open("/dev/null").unwrap()).unwrap_err(), Errno::ENOTTY);
    }
}
