//! Whose a namespace is: the request that nix does not have.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::stat::{fstat, stat};

    use super::*;

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
