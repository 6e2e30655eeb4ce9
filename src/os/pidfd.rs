//! What the kernel says about a process by its pidfd: the calls that nix does not have.
//!
//! A pidfd names one process for ever; a PID names whoever has the number now. Nothing here reads /proc. What is
//! absent: `SO_PEERPIDFD`, which nix has.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{Arc, OnceLock},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Gid, Pid, Uid},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The effective user and group of a process now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Effective UID, in the agent's user namespace.
    pub uid: Uid,
    /// Effective GID, in the agent's user namespace.
    pub gid: Gid,
}

/// A descriptor that names one process for ever.
#[derive(Debug)]
pub struct Pidfd {
    fd: Arc<OwnedFd>,
    /// Made by the first who waits; `None` when epoll takes no more (fs.epoll.max_user_watches).
    watch: OnceLock<Option<AsyncFd<Arc<OwnedFd>>>>,
}

impl Pidfd {
    /// Takes a pidfd that the kernel gave.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), watch: OnceLock::new() }
    }

    /// A pidfd of the process that has this PID now (`pidfd_open(2)`, Linux 5.3).
    ///
    /// # Errors
    /// `ESRCH` when there is none, `ENOSYS` on older kernels, `EMFILE` and `ENFILE` without descriptors left.
    #[expect(unsafe_code, reason = "nix has no pidfd_open")]
    pub fn open(pid: Pid) -> Result<Self, Errno> {
        // SAFETY: pidfd_open(pid_t, unsigned int) takes two integers and touches no memory of ours.
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = i32::try_from(Errno::result(answer)?).map_err(|_too_big| Errno::EBADF)?;
        // SAFETY: the call succeeded, so `fd` is an open descriptor that the kernel just made, and nobody else
        // has it.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The descriptor, which is closed with the last of all who have it.
    pub(crate) fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Whether the process has ended, as a zombie too: a pidfd turns readable then, and stays so, reaped or not.
    ///
    /// # Errors
    /// What `poll(2)` says.
    pub fn poll_exited(&self) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
    }

    /// [`Self::poll_exited`], where a process that cannot be asked after has ended.
    pub fn has_exited(&self) -> bool {
        self.poll_exited().unwrap_or(true)
    }

    /// Waits until the process has ended. The first call registers the descriptor with epoll.
    pub async fn exited(&self) {
        let watch = self.watch.get_or_init(|| self.register());
        while !self.has_exited() {
            match watch {
                Some(watch) => match watch.readable().await {
                    Ok(mut ready) => {
                        if !self.has_exited() {
                            ready.clear_ready();
                        }
                    }
                    // The runtime is going away, and this task with it.
                    Err(_shutdown) => return std::future::pending().await,
                },
                // Not watched: look each second.
                None => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    #[expect(unsafe_code, reason = "tokio asks for a promise that the descriptor stays open")]
    fn register(&self) -> Option<AsyncFd<Arc<OwnedFd>>> {
        let fd = Arc::clone(&self.fd);
        // SAFETY: the registration owns a share of the descriptor, so that it is open, and the same, for as long
        // as the registration lives; an `OwnedFd` never changes its number.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.ok()
    }

    /// Who owns the process now (`PIDFD_GET_INFO`, Linux 6.13), or `None` where the kernel cannot say.
    ///
    /// # Errors
    /// `ESRCH` when the process was reaped.
    #[expect(unsafe_code, reason = "nix has no PIDFD_GET_INFO")]
    pub fn owner(&self) -> Result<Option<Owner>, Errno> {
        /// `PIDFD_INFO_CREDS` of linux/pidfd.h: asks for the credentials, and says in the answer that they are
        /// there.
        const CREDENTIALS: u64 = 1 << 1;
        // SAFETY: a structure of integers, for which all zeros is a valid value.
        let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
        info.mask = CREDENTIALS;
        // SAFETY: the size of the structure is part of the request's number, so the kernel writes no more than
        // `info`, which is ours alone and lives through the call; every bit pattern is valid for its integers.
        let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
        match Errno::result(answer) {
            Ok(_zero) if info.mask & CREDENTIALS != 0 => {
                Ok(Some(Owner { uid: Uid::from_raw(info.euid), gid: Gid::from_raw(info.egid) }))
            }
            // Older kernels: a pidfd that is no file of pidfs says ENOTTY, an unknown request EINVAL.
            Ok(_) | Err(Errno::ENOTTY | Errno::EINVAL | Errno::ENOSYS) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use nix::unistd::{getegid, geteuid};

    use super::*;

    #[test]
    fn a_living_process_has_our_owner_and_a_reaped_one_has_none() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let pidfd = Pidfd::open(pid).unwrap();
        assert_eq!(pidfd.poll_exited(), Ok(false));
        match pidfd.owner() {
            Ok(Some(owner)) => assert_eq!(owner, Owner { uid: geteuid(), gid: getegid() }),
            other => assert_eq!(other, Ok(None), "a kernel before 6.13 cannot say"),
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(pidfd.owner(), Err(Errno::ESRCH) | Ok(None)));
        assert!(pidfd.has_exited());
        assert_eq!(Pidfd::open(pid).unwrap_err(), Errno::ESRCH);
    }
}
