//! Descriptors that go from one process to another over a Unix socket (`SCM_RIGHTS`): what one agent hands to the next.
//!
//! Only between processes of one user that have seen who is there: whoever takes a descriptor has to close it, and its
//! sender chooses how long that takes. From callers none is ever taken ([`receive`](super::receive)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// The most descriptors of a message.
pub const MOST_DESCRIPTORS: usize = 4;
/// The most that the kernel passes with one (unix(7)): all of them are taken, so that those that are too many can be closed.
const SCM_MAX_FD: usize = 253;

/// Sends a short message with descriptors, without waiting. They stay open here.
///
/// # Errors
/// What the kernel says; `WriteZero` when the message did not fit.
pub fn send(socket: &impl AsFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[] } else { rights.as_slice() };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(message)], control, flags, None)?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what is there, as `read` does, and the descriptors that come with it, which are closed on exec. Waits as long as
/// the socket says.
///
/// # Errors
/// What the kernel says; `InvalidData` when descriptors are lost: there were more than [`MOST_DESCRIPTORS`], or this process
/// has no room for them. Of the latter some may stay open, unknown to anybody: it is an error to end with.
#[expect(unsafe_code, reason = "descriptors arrive as numbers")]
pub fn receive(socket: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut parts = [IoSliceMut::new(into)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    let lost = || io::Error::new(io::ErrorKind::InvalidData, "descriptors were lost on their way");
    for message in received.cmsgs().map_err(|_truncated| lost())? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else in it knows their
            // numbers; each is owned once.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    if received.flags.contains(MsgFlags::MSG_CTRUNC) || descriptors.len() > MOST_DESCRIPTORS {
        return Err(lost());
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_message_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "text").unwrap();
        let file = File::open(&path).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let mut buffer = [0; 16];

        send(&one, b"none", &[]).unwrap();
        let (len, none) = receive(&other, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], none.len()), (&b"none"[..], 0));

        send(&one, b"two", &[file.as_fd(), file.as_fd()]).unwrap();
        let (len, two) = receive(&other, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], two.len()), (&b"two"[..], 2));
        let mut text = String::new();
        File::from(two.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");

        let many = vec![file.as_fd(); 2 * MOST_DESCRIPTORS];
        send(&one, b"many", &many).unwrap();
        let lost = receive(&other, &mut buffer).unwrap_err();
        assert_eq!(lost.kind(), io::ErrorKind::InvalidData);

        drop(one);
        assert_eq!(receive(&other, &mut buffer).unwrap().0, 0, "the end");
    }
}
