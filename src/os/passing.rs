//! What may come with the bytes of a Unix socket: descriptors, and the name of their writer.
//!
//! A descriptor that nobody takes is closed by the kernel in the thread that reads or closes the socket, and its
//! sender chooses how long that takes (a TCP socket with SO_LINGER, a file of FUSE). Linux 6.16 lets a socket refuse
//! them (`SO_PASSRIGHTS`): whoever sends one gets EPERM. A connection has what the listener had when it was made.

use std::os::fd::{AsFd, AsRawFd as _};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};

/// `SO_PASSRIGHTS` where the kernel's asm-generic/socket.h holds; neither nix nor libc has it.
#[cfg(not(any(target_arch = "sparc", target_arch = "sparc64")))]
const SO_PASSRIGHTS: libc::c_int = 83;
#[cfg(any(target_arch = "sparc", target_arch = "sparc64"))]
const SO_PASSRIGHTS: libc::c_int = 0x5c;

/// Whether descriptors can be passed to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// They cannot: whoever sends one gets EPERM.
    Barred,
    /// They can.
    Possible,
    /// They can, and on this kernel (before Linux 6.16) nothing bars them.
    Always,
}

impl Passing {
    /// How it stands with `socket` now.
    pub fn of(socket: &impl AsFd) -> Self {
        match passrights(socket) {
            Ok(0) => Self::Barred,
            Ok(_) => Self::Possible,
            Err(_unknown) => Self::Always,
        }
    }

    /// Bars them from now on, where the kernel can. What was sent before stays in the queue.
    pub fn bar(socket: &impl AsFd) -> Self {
        match set_passrights(socket, 0) {
            Ok(()) => Self::Barred,
            Err(_unknown) => Self::Always,
        }
    }

    /// Lets them pass again: for tests of what older kernels do.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn allow(socket: &impl AsFd) -> Result<(), Errno> {
        match set_passrights(socket, 1) {
            Err(Errno::ENOPROTOOPT) => Ok(()),
            done => done,
        }
    }
}

/// Makes ready a socket that is about to listen, or that has just been taken over or accepted: the writer of each byte
/// is named from now on, and descriptors are barred where the kernel can.
///
/// # Errors
/// The writers cannot be named: nothing may be read from the socket then.
pub fn prepare(socket: &impl AsFd) -> Result<Passing, Errno> {
    setsockopt(socket, sockopt::PassCred, &true)?;
    Ok(Passing::bar(socket))
}

#[expect(unsafe_code, reason = "neither nix nor libc has SO_PASSRIGHTS")]
fn set_passrights(socket: &impl AsFd, value: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the descriptor is borrowed and so open; the kernel reads a `c_int` of ours, whose size it is told, and keeps
    // nothing of it.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const value).cast(),
            size_of_c_int(),
        )
    };
    Errno::result(answer).map(drop)
}

#[expect(unsafe_code, reason = "neither nix nor libc has SO_PASSRIGHTS")]
fn passrights(socket: &impl AsFd) -> Result<libc::c_int, Errno> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_c_int();
    // SAFETY: the descriptor is borrowed and so open; the kernel writes no more than `len` bytes into a `c_int` of ours, and
    // the length into `len`; both outlive the call, and every bit pattern is valid for them.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    Errno::result(answer).map(|_zero| value)
}

fn size_of_c_int() -> libc::socklen_t {
    const { assert!(size_of::<libc::c_int>() == 4) };
    4
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_says_what_it_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let before = Passing::of(&listener);
        let prepared = prepare(&listener).unwrap();
        assert_eq!(nix::sys::socket::getsockopt(&listener, sockopt::PassCred), Ok(true));
        assert_eq!(Passing::of(&listener), prepared);
        match before {
            Passing::Always => assert_eq!(prepared, Passing::Always, "before Linux 6.16"),
            before => assert_eq!((before, prepared), (Passing::Possible, Passing::Barred)),
        }
        Passing::allow(&listener).unwrap();
        assert_eq!(Passing::of(&listener), before);
    }
}
