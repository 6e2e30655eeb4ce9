//! The groups of whoever is at the other end of a Unix socket.

use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;

/// Of more groups it is not asked.
const MOST_GROUPS: usize = 4096;
/// So many are few.
const FEW: usize = 32;

/// The supplementary groups that a process connected with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectedGroups {
    /// All of them, as they are few.
    Few(Box<[u32]>),
    /// How many they are.
    Many(usize),
}

impl ConnectedGroups {
    /// How many they are.
    pub fn number(&self) -> usize {
        match self {
            Self::Few(groups) => groups.len(),
            Self::Many(number) => *number,
        }
    }
}

/// The supplementary groups of the process that connected, as they were then (`SO_PEERGROUPS`, Linux 4.13). `None` where the
/// kernel does not say, or they are more than [`MOST_GROUPS`].
pub fn peer_groups(socket: &impl AsFd) -> Option<Vec<u32>> {
    let mut groups = vec![0; MOST_GROUPS];
    let number = read_peer_groups(socket, &mut groups)?;
    (number <= MOST_GROUPS).then(|| {
        groups.truncate(number);
        groups
    })
}

/// The same, or how many they are, of which none is copied then.
pub fn connected_groups(socket: &impl AsFd) -> Option<ConnectedGroups> {
    let mut groups = [0; FEW];
    let number = read_peer_groups(socket, &mut groups)?;
    Some(groups.get(..number).map_or(ConnectedGroups::Many(number), |few| ConnectedGroups::Few(few.into())))
}

/// Writes them into `groups` where all have room there. Returns how many they are.
#[expect(unsafe_code, reason = "nix has no SO_PEERGROUPS")]
fn read_peer_groups(socket: &impl AsFd, groups: &mut [u32]) -> Option<usize> {
    let mut len = libc::socklen_t::try_from(size_of_val(groups)).ok()?;
    // SAFETY: the kernel writes no more than `len` bytes of whole GIDs, which the slice has, and to `len` how many bytes they
    // are; the descriptor is borrowed for the call.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
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
        let connected = connected_groups(&ours).unwrap();
        assert_eq!(connected.number(), own.len());
        if own.len() <= FEW {
            assert_eq!(connected, ConnectedGroups::Few(own.clone().into()));
        }
        let number = read_peer_groups(&ours, &mut [u32::MAX; 0]);
        assert_eq!(number, Some(own.len()), "without room they are counted");
        assert_eq!(peer_groups(&ours), Some(own));
        assert_eq!(connected_groups(&std::fs::File::open("/dev/null").unwrap()), None);
        assert_eq!(peer_groups(&std::fs::File::open("/dev/null").unwrap()), None);
    }
}
