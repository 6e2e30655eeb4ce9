//! What keeps the memory of this process, which holds private keys, to itself, wherever it is started: no core dump, no
//! debugger of the same user, no program that gives it more rights.
//!
//! The kernel makes the files of such a process in `/proc` root's. Its own are still open to it.

use std::io;

use nix::{
    errno::Errno,
    sys::{
        prctl::{set_dumpable, set_no_new_privs},
        resource::{Resource, setrlimit},
    },
};

/// Why the process's memory may be seen by others.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct SecrecyError {
    what: &'static str,
    source: io::Error,
}

/// Does so for this process, for ever. To be called before it reads a key.
///
/// # Errors
/// What the kernel refused: it refuses none of this to any process, but a seccomp filter may.
pub fn keep() -> Result<(), SecrecyError> {
    // Before Linux 6.4 these are read from /proc/self/auxv once, which from here on is root's to open.
    let _known_from_here_on = (procfs::page_size(), procfs::ticks_per_second());
    let failed = |what| move |errno: Errno| SecrecyError { what, source: errno.into() };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("forbid core dumps (RLIMIT_CORE)"))?;
    set_dumpable(false).map_err(failed("close this process's memory to others (PR_SET_DUMPABLE)"))?;
    set_no_new_privs().map_err(failed("give up gaining rights (PR_SET_NO_NEW_PRIVS)"))
}
