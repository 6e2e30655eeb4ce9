//! A person's terminal: its size, and keys one by one.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::{
    errno::Errno,
    sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr},
};

/// Rows and columns of the terminal at `fd`; `None` where there is none, or it has no size.
#[expect(unsafe_code, reason = "nix makes this call only through a macro that is unsafe too")]
pub fn size(fd: impl AsFd) -> Option<(usize, usize)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is borrowed for the call, TIOCGWINSZ writes one winsize, and `size` is one.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    Errno::result(done).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then(|| (size.ws_row.into(), size.ws_col.into()))
}

/// A terminal that gives each key as it is pressed, and does not show it. Its drop makes it as it was.
#[derive(Debug)]
pub struct KeyByKey<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> KeyByKey<'a> {
    /// `None` where `terminal` is none, or this process is not in its foreground.
    pub fn of(terminal: BorrowedFd<'a>) -> Option<Self> {
        let before = tcgetattr(terminal).ok()?;
        let foreground = nix::unistd::tcgetpgrp(terminal).ok()?;
        if foreground != nix::unistd::getpgrp() {
            return None;
        }
        let mut keys = before.clone();
        keys.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        for (index, value) in [(SpecialCharacterIndices::VMIN, 1), (SpecialCharacterIndices::VTIME, 0)] {
            // The enumeration has no other way to become an index.
            #[expect(clippy::as_conversions, reason = "as nix itself does")]
            if let Some(character) = keys.control_chars.get_mut(index as usize) {
                *character = value;
            }
        }
        tcsetattr(terminal, SetArg::TCSANOW, &keys).ok()?;
        Some(Self { terminal, before })
    }
}

impl Drop for KeyByKey<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _restored = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}
