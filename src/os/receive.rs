//! Bytes of a Unix socket together with what the kernel says of their writer, and without ever taking, or closing, a
//! descriptor that was passed with them.
//!
//! The kernel never puts bytes of two writers into one answer. Where descriptors can be passed, the queue is looked at
//! first: what comes with them is left where it is, since a descriptor that is taken must be closed by somebody, and
//! one that is not taken is closed by the kernel, at once and in this thread.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::{
    errno::Errno,
    unistd::{Gid, Pid, Uid},
};
use tokio::io::ReadBuf;

/// Who wrote bytes, as the kernel recorded it then (`SCM_CREDENTIALS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenBy {
    /// Its process; 0 when that is in a PID namespace that this process cannot see into.
    pub pid: Pid,
    /// Its real user, where `SO_PEERCRED` has the effective one.
    pub uid: Uid,
    /// Its real group.
    pub gid: Gid,
}

/// What was received.
#[derive(Clone, Copy, Debug)]
pub enum Received {
    /// So many bytes, which are initialized behind those that the buffer is filled with; 0 at the end of the stream.
    Bytes {
        len: usize,
        /// `None` without `SO_PASSCRED`.
        writer: Option<WrittenBy>,
    },
    /// Among the next bytes are some with descriptors. They stay in the queue.
    Descriptors,
}

/// Whether to look before bytes are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// No: no descriptor can be among them.
    TakeAtOnce,
    /// Yes. That is a second system call.
    LookFirst,
}

/// Receives up to `most` bytes of what is there, without waiting. The socket must have `SO_PASSCRED`.
///
/// # Errors
/// `WouldBlock` when nothing is there, or what the kernel says.
pub fn receive(
    socket: BorrowedFd<'_>,
    into: &mut ReadBuf<'_>,
    most: usize,
    care: Care,
) -> io::Result<Received> {
    match care {
        Care::TakeAtOnce => take(socket, into, most),
        Care::LookFirst => {
            let seen = call(socket, spare(into, most), libc::MSG_PEEK)?;
            if seen.cut_short {
                return Ok(Received::Descriptors);
            }
            // No more than was seen: what has come behind it may hold what must not be taken.
            if seen.len == 0 {
                Ok(Received::Bytes { len: 0, writer: None })
            } else {
                take(socket, into, seen.len)
            }
        }
    }
}

#[expect(unsafe_code, reason = "the buffer cannot know what the kernel has written into it")]
fn take(socket: BorrowedFd<'_>, into: &mut ReadBuf<'_>, most: usize) -> io::Result<Received> {
    let got = call(socket, spare(into, most), 0)?;
    // SAFETY: the kernel has written so many bytes to the beginning of the unfilled part, which `call` was given.
    unsafe { into.assume_init(got.len) };
    Ok(if got.cut_short {
        Received::Descriptors
    } else {
        Received::Bytes { len: got.len, writer: got.writer }
    })
}

#[expect(unsafe_code, reason = "the unfilled part of the buffer may be uninitialized")]
fn spare<'b>(into: &'b mut ReadBuf<'_>, most: usize) -> &'b mut [MaybeUninit<u8>] {
    // SAFETY: nobody un-initializes a byte of it: the kernel is all that writes to it.
    let spare = unsafe { into.unfilled_mut() };
    let len = spare.len().min(most);
    spare.get_mut(..len).unwrap_or_default()
}

/// The answer of one call.
struct Answer {
    len: usize,
    writer: Option<WrittenBy>,
    /// There was more than the name of the writer: descriptors.
    cut_short: bool,
}

/// Room for the name of the writer and for nothing else: a message of `SCM_CREDENTIALS`, as `cmsg(3)` lays it out.
#[repr(C, align(8))]
struct ControlBuffer {
    head: libc::cmsghdr,
    writer: libc::ucred,
}

fn call(socket: BorrowedFd<'_>, into: &mut [MaybeUninit<u8>], flags: libc::c_int) -> io::Result<Answer> {
    loop {
        match recvmsg(socket, into, flags) {
            Err(Errno::EINTR) => {}
            answer => return Ok(answer?),
        }
    }
}

#[expect(unsafe_code, reason = "nix's recvmsg writes to initialized memory alone")]
fn recvmsg(
    socket: BorrowedFd<'_>,
    into: &mut [MaybeUninit<u8>],
    flags: libc::c_int,
) -> Result<Answer, Errno> {
    // SAFETY: structures of integers and pointers, for which all zeros is a valid value.
    let (mut control, mut message) =
        unsafe { (std::mem::zeroed::<ControlBuffer>(), std::mem::zeroed::<libc::msghdr>()) };
    let mut bytes = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = length(size_of::<ControlBuffer>());
    // SAFETY: the descriptor is borrowed and so open. `message` points to one `iovec`, that to a slice which is borrowed
    // mutably for as long as the call takes, and `control` is ours; of each the kernel is told the size. Every bit
    // pattern is valid for what it writes.
    let answer = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut message,
            flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    let len = usize::try_from(Errno::result(answer)?).unwrap_or(0);
    let named =
        control.head.cmsg_level == libc::SOL_SOCKET && control.head.cmsg_type == libc::SCM_CREDENTIALS;
    let ControlBuffer { writer: libc::ucred { pid, uid, gid }, .. } = control;
    Ok(Answer {
        len,
        writer: named.then(|| WrittenBy {
            pid: Pid::from_raw(pid),
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
        }),
        cut_short: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Its type differs among C libraries.
fn length<N: TryFrom<usize> + Default>(bytes: usize) -> N {
    N::try_from(bytes).unwrap_or_default()
}
