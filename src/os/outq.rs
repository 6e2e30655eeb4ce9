//! What the kernel keeps of what was written to a socket.

use std::os::fd::{AsFd, AsRawFd as _};

/// How much the kernel keeps for what was written to a Unix socket and its peer has not read: in bytes of its memory, which are
/// more than were written (`SIOCOUTQ`, unix(7)). 0 where it does not say.
#[expect(unsafe_code, reason = "nix has no SIOCOUTQ")]
pub fn unread_by_peer(socket: &impl AsFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int to where it is told, and that is one; the descriptor is borrowed for the call.
    let answer = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if answer == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn what_is_not_read_takes_more_than_was_written_until_it_is() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread_by_peer(&ours), 0);
        for _ in 0..10 {
            ours.write_all(&[1; 100]).unwrap();
        }
        assert!((1_000..20_000).contains(&unread_by_peer(&ours)), "{}", unread_by_peer(&ours));
        theirs.read_exact(&mut [0; 1_000]).unwrap();
        assert_eq!(unread_by_peer(&ours), 0);
        assert_eq!(unread_by_peer(&std::fs::File::open("/dev/null").unwrap()), 0);
    }
}
