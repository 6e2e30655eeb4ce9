//! How long threads waited for a processor.

use std::{fs, fs::File, os::unix::fs::FileExt as _, path::Path, time::Duration};

/// What a line of `schedstat` has at most, in bytes: three numbers.
const LINE: usize = 64;
/// The most threads that are looked at.
const MOST: usize = 64;

/// Threads of this process, each with its file open.
#[derive(Debug)]
pub struct RunDelay(Vec<File>);

impl RunDelay {
    /// Of the threads that there are now whose name begins so. Where the kernel keeps no such figures, there are none.
    pub fn of_threads(name: &str) -> Self {
        let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Self(Vec::new()) };
        let is_called =
            |task: &Path| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name));
        let tasks = tasks.filter_map(|task| Some(task.ok()?.path())).filter(|task| is_called(task));
        Self(tasks.filter_map(|task| File::open(task.join("schedstat")).ok()).take(MOST).collect())
    }

    /// How long they were ready to run and did not, all of them, from their start.
    pub fn total(&self) -> Duration {
        let of = |file: &File| {
            let mut line = [0; LINE];
            let read = file.read_at(&mut line, 0).ok()?;
            let text = str::from_utf8(line.get(..read)?).ok()?;
            // Nanoseconds on a processor, nanoseconds of waiting, how often (proc_pid_schedstat of the kernel's documentation).
            text.split_ascii_whitespace().nth(1)?.parse().ok()
        };
        Duration::from_nanos(self.0.iter().filter_map(of).fold(0, u64::saturating_add))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn threads_are_found_by_their_name() {
        let (go, wait) = mpsc::channel::<()>();
        let name = "delayed-thread";
        let thread = thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || wait.recv().unwrap_err()).unwrap();
        while fs::metadata("/proc/self/schedstat").is_ok() && RunDelay::of_threads(name).0.is_empty() {
            thread::yield_now();
        }
        let delay = RunDelay::of_threads(name);
        assert!(delay.0.len() <= 1);
        assert!(delay.total() < Duration::from_secs(3600), "of one thread that has just begun");
        assert!(RunDelay::of_threads("no thread has this name").0.is_empty());
        drop(go);
        thread.join().unwrap();
    }
}
