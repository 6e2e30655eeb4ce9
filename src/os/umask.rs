//! A umask for one act: the umask belongs to the whole process, and other threads make files meanwhile.

use std::thread;

use nix::{
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
};

/// Does `act` in a thread that has a umask of its own, which is zero. The thread shares all else with the process.
///
/// `None` when there is no such thread: a seccomp filter (as Docker's, without `CAP_SYS_ADMIN`) forbids
/// `unshare(2)`, or threads are short.
pub fn zero<T: Send>(act: &(impl Fn() -> T + Sync)) -> Option<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("umask".to_owned()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_FS).ok()?;
            umask(Mode::empty());
            Some(act())
        });
        thread.ok()?.join().ok().flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_thread_sees_it() {
        let read = || {
            let line = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            line.lines().find_map(|line| line.strip_prefix("Umask:\t").map(str::to_owned)).unwrap()
        };
        let before = read();
        if let Some(inside) = zero(&read) {
            assert_eq!(inside, "0000");
        }
        assert_eq!(read(), before);
    }
}
