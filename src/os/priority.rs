//! How the kernel ranks threads that want a processor.

/// By so many steps a thread is lowered. Each step is a fifth less of a processor that others want, too: ten leave a tenth.
const STEPS: libc::c_int = 10;

/// Lowers the priority of the calling thread, and of no other: of a processor that the other threads of this process want as well
/// it gets a tenth of what one of them gets. Nobody needs a privilege for it; where a filter bars it, nothing changes.
#[expect(unsafe_code, reason = "nix has no nice")]
pub fn lower_this_thread() {
    // SAFETY: the call takes an integer, and touches no memory of ours. On Linux it is about the calling thread alone.
    let _priority_by_now = unsafe { libc::nice(STEPS) };
}

/// The nice value of the calling thread: proc_pid_stat(5).
#[cfg(test)]
pub fn nice() -> i32 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, after_name) = stat.rsplit_once(')').unwrap();
    after_name.split_ascii_whitespace().nth(16).unwrap().parse().unwrap()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn one_thread_is_lowered_and_no_other() {
        let before = nice();
        let lowered = thread::spawn(|| {
            lower_this_thread();
            nice()
        });
        assert_eq!(lowered.join().unwrap(), (before + STEPS).min(19));
        assert_eq!(nice(), before);
    }
}
