//! Who mounted what a descriptor is on. Whoever mounts a FUSE file system answers for what is in it: owners and modes
//! there are what he says. Other file systems are mounted by root alone, as far as this process sees.
//!
//! Nothing here asks the file system itself, which may never answer.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _},
    mem::MaybeUninit,
    os::fd::AsRawFd as _,
};

use nix::errno::Errno;

/// The most that is read of the list of mounts, in bytes: some hundred thousand mounts.
const MOST_LISTED: u64 = 64 << 20;

/// The number of the mount that `file` is on, or `None` where the kernel cannot say (Linux before 5.8).
///
/// # Errors
/// What `statx(2)` says.
#[expect(unsafe_code, reason = "nix has no statx")]
pub(super) fn id(file: &File) -> io::Result<Option<u64>> {
    // What is known is enough: a FUSE file system is not asked.
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open as long as `file` is borrowed, the path is an empty string that ends with a
    // zero, and `found` is room for one `struct statx`, which the kernel fills.
    let done =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_MNT_ID, found.as_mut_ptr()) };
    match Errno::result(done) {
        Ok(_) => {}
        // A seccomp filter that does not know the call says EPERM, and then the C library, which does without, EINVAL.
        Err(Errno::ENOSYS | Errno::EPERM | Errno::EINVAL) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    // SAFETY: the room was zeroed, and every member is an integer.
    let found = unsafe { found.assume_init() };
    Ok((found.stx_mask & libc::STATX_MNT_ID != 0).then_some(found.stx_mnt_id))
}

/// The user who mounted the FUSE file system of mount `id`; `None` for every other file system.
///
/// # Errors
/// The list of mounts cannot be read.
pub(super) fn fuse_mounter(id: u64) -> io::Result<Option<u32>> {
    let mut text = String::new();
    File::open("/proc/self/mountinfo")?.take(MOST_LISTED).read_to_string(&mut text)?;
    Ok(mounter_in(&text, id))
}

/// Reads `/proc/PID/mountinfo` (proc(5)).
fn mounter_in(text: &str, id: u64) -> Option<u32> {
    let line = text.lines().find(|line| line.split(' ').next().and_then(|it| it.parse().ok()) == Some(id))?;
    // A space within a path is written as \\040, so that this hyphen is the first that stands alone.
    let mut rest = line.split_once(" - ")?.1.split(' ');
    let (kind, options) = (rest.next()?, rest.nth(1)?);
    // fuse, fuse.sshfs, fuseblk; with fusectl there is no such option.
    if !kind.starts_with("fuse") {
        return None;
    }
    options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok())
}

/// Whether a POSIX ACL may give more users access to `file` than its mode says. Unknown counts as one.
#[expect(unsafe_code, reason = "nix has no getxattr")]
pub(super) fn has_acl(file: &File) -> bool {
    // A descriptor that is open for nothing has no attributes but by the kernel's link to it.
    let Ok(link) = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return true };
    // SAFETY: both are strings that end with a zero and live through the call, and with a size of 0 nothing is written.
    let found = unsafe {
        libc::getxattr(link.as_ptr(), c"system.posix_acl_access".as_ptr(), std::ptr::null_mut(), 0)
    };
    !matches!(Errno::result(found), Err(Errno::ENODATA | Errno::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_mounts_tells_whose_fuse_is() {
        let text = "\
            22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            99 22 0:51 / /tmp/a rw,nosuid,nodev shared:7 master:2 - fuse.sshfs a@b:/ rw,user_id=1000,group_id=5,allow_other\n\
            100 22 0:52 / /mnt/r rw - fuse none rw,user_id=0,group_id=0\n\
            101 22 0:53 / /mnt/v rw - virtiofs tag rw\n\
            102 22 0:54 / /mnt/odd rw - fuse\n";
        for (id, want) in [(22, None), (99, Some(1000)), (100, Some(0)), (101, None), (102, None), (9, None)]
        {
            assert_eq!(mounter_in(text, id), want, "{id}");
        }
    }

    #[test]
    fn our_own_files_are_on_some_mount() {
        let (root, proc) = (File::open("/").unwrap(), File::open("/proc").unwrap());
        if let (Some(root), Some(proc)) = (id(&root).unwrap(), id(&proc).unwrap()) {
            assert_ne!(root, proc);
            assert_eq!(fuse_mounter(proc).unwrap(), None);
        }
    }
}
