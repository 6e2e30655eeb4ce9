//! systemd's journal, to which a service's standard output and error go: how severe a line is stands before it
//! (sd-daemon(3)), so that `journalctl -p err` finds the errors.

use std::os::fd::AsFd;

use nix::sys::stat::fstat;

/// Before a line that tells of an error, a warning, what happened, and what only somebody who searches wants to know.
pub const ERROR: &str = "<3>";
pub const WARNING: &str = "<4>";
pub const INFORMATION: &str = "<6>";
pub const DEBUG: &str = "<7>";

/// Whether what is written there goes to the journal. systemd names its stream by device and inode; what was redirected
/// since is another.
pub fn is_at(to: impl AsFd) -> bool {
    #[expect(clippy::disallowed_methods, reason = "the variable is the way to know it (systemd.exec(5))")]
    let named = std::env::var("JOURNAL_STREAM");
    let (Ok(named), Ok(stat)) = (named, fstat(to)) else { return false };
    named == format!("{}:{}", stat.st_dev, stat.st_ino)
}
