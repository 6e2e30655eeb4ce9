//! The groups of whoever is at the other end of a Unix socket.

use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;

/// Of more groups it is not asked.
const MOST_GROUPS: usize = 4096;

/// The supplementary groups of the process that connected, as they were then (`SO_PEERGROUPS`, Linux 4.13). `None` where the
/// kernel does not say, or they are more than [`MOST_GROUPS`].
#[expect(unsafe_code, reason = "nix has no SO_PEERGROUPS")]
pub fn peer_groups(socket: &impl AsFd) -> Option<Vec<u32>> {
    let mut groups = vec![0_u32; MOST_GROUPS];
    let mut len = libc::socklen_t::try_from(size_of_val(groups.as_slice())).ok()?;
    // SAFETY: the kernel writes no more than `len` bytes of whole GIDs, which the vector has, and how many they are; the
    // descriptor is borrowed for the call.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    groups.truncate(usize::try_from(len).ok()? / size_of::<u32>());
    (answer == 0).then_some(groups)
}

/// How many supplementary groups the process that connected had then. `None` where the kernel does not say. It copies none
/// of them.
#[expect(unsafe_code, reason = "nix has no SO_PEERGROUPS")]
pub fn peer_group_count(socket: &impl AsFd) -> Option<usize> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: the kernel writes no group, as there is room for none, and to `len` how much room they need; the descriptor is
    // borrowed for the call.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    let said = answer == 0 || Errno::last() == Errno::ERANGE;
    said.then(|| usize::try_from(len).ok()).flatten().map(|len| len / size_of::<u32>())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::unistd::getgroups;

    use super::*;

    #[test]
    fn a_peer_has_the_groups_that_it_connected_with() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own: Vec<u32> = getgroups().unwrap().into_iter().map(|gid| gid.as_raw()).collect();
        assert_eq!(peer_group_count(&ours), Some(own.len()));
        assert_eq!(peer_groups(&ours), Some(own));
        assert_eq!(peer_group_count(&std::fs::File::open("/dev/null").unwrap()), None);
        assert_eq!(peer_groups(&std::fs::File::open("/dev/null").unwrap()), None);
    }
}
