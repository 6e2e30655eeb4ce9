//! What the kernel keeps of the processes that the agent has asked after: it is charged to the agent, and held by whoever has a
//! pidfd of them too, when they have ended.

use std::{
    io::{Read as _, Write as _, stdin, stdout},
    process::Stdio,
};

use durward::os::pidfd::Pidfd;
use nix::unistd::Pid;

use super::{
    frames::Called,
    part::{Part, Role, Tally},
    storm,
};

/// Makes processes, one after the other, that make one call each, and keeps a pidfd of each that was answered: as many as there
/// are descriptors.
pub(crate) fn pin(part: &Part, tally: &mut Tally) {
    let me = std::env::current_exe().expect("this program");
    let child = Part { role: Role::Pinned, ..part.clone() };
    let mut held = Vec::new();
    while part.goes_on() {
        let mut child =
            child.command(&me).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let mut told = [b'0'];
        let said = child.stdout.as_mut().expect("a pipe").read(&mut told);
        let called = match (said, told) {
            (Ok(1), [b'0']) => Called::Answered,
            (Ok(1), [b'1']) => Called::Refused,
            (Ok(1), [b'2']) => Called::Closed,
            _ => Called::Silent,
        };
        if called == Called::Answered
            && let Ok(pidfd) = Pidfd::open(Pid::from_raw(child.id() as i32))
        {
            held.push(pidfd);
        }
        tally.count(called);
        drop(child.stdin.take());
        child.wait().expect("it ends");
    }
}

/// One of these: calls, says how it was answered, and lives until it is held.
pub(crate) fn pinned(part: &Part) -> ! {
    let called = storm::once(part);
    write!(stdout(), "{}", called as i32).expect("a pipe");
    stdout().flush().expect("a pipe");
    let _ended = stdin().read(&mut [0]);
    std::process::exit(0)
}
