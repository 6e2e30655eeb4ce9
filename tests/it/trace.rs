//! Which files a running agent opens for its callers: the system calls of all its threads, seen from outside with
//! ptrace(2). Where this process may trace nobody, this is left out, and says so.

use std::{
    collections::BTreeSet,
    fs,
    io::IoSliceMut,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use durward::api::proto::workload as pb;
use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        socket::{getsockopt, sockopt},
        uio::{RemoteIoVec, process_vm_readv},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, getpid},
};
use tonic::Code;

use crate::{
    frames::{Called, FETCH_JWT, call, jwt_request, message},
    support::{Process, client, entry, request, write_config},
};

const FETCH_WIT: &str = "/SpiffeWorkloadAPI/FetchWITSVID";
const PATIENCE: Duration = Duration::from_secs(60);
/// How the client of a trace says that it is done. The agent never sees it.
const DONE: Signal = Signal::SIGUSR1;

/// What the agent did, as far as this is about it.
#[derive(Debug, PartialEq, Eq)]
enum Did {
    /// It opened, or tried to.
    Open(PathBuf),
    /// It asked the kernel who is at the other end of a connection: once for each, at accept.
    AskWho,
}

/// The threads that are traced by this one.
struct Trace {
    agent: Pid,
    threads: BTreeSet<Pid>,
    did: Vec<Did>,
}

/// Runs `calls` while the agent is traced. Returns what that did meanwhile; `None` where it may not be traced.
fn traced<R: Send>(agent: Pid, calls: impl FnOnce() -> R + Send) -> Option<(Vec<Did>, R)> {
    let mut trace = Trace { agent, threads: BTreeSet::new(), did: Vec::new() };
    if let Err(error) = trace.begin() {
        println!("ptrace: {error}: what the agent opens was not looked at");
        return None;
    }
    thread::scope(|scope| {
        let (begin, begun) = mpsc::channel();
        let calls = scope.spawn(move || {
            // Sent also when the calls fail, or the trace would go on for ever.
            let _done = Done(agent);
            begun.recv().unwrap();
            calls()
        });
        trace.run(begin);
        trace.end();
        Some((trace.did, calls.join().unwrap()))
    })
}

struct Done(Pid);

impl Drop for Done {
    fn drop(&mut self) {
        kill(self.0, DONE).unwrap();
    }
}

impl Trace {
    /// Attaches to every thread. Those that the agent starts later are attached to by the kernel.
    fn begin(&mut self) -> nix::Result<()> {
        let options =
            Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
        loop {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.agent)).unwrap();
            let ids = tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap());
            let new: Vec<Pid> = ids.map(Pid::from_raw).filter(|id| !self.threads.contains(id)).collect();
            if new.is_empty() {
                return Ok(());
            }
            for thread in new {
                match ptrace::seize(thread, options) {
                    Ok(()) => ptrace::interrupt(thread).unwrap(),
                    // It has ended.
                    Err(Errno::ESRCH) => continue,
                    Err(error) if self.threads.is_empty() => return Err(error),
                    // Started meanwhile by one that is traced: so is this.
                    Err(Errno::EPERM) => {}
                    Err(error) => panic!("{thread}: {error}"),
                }
                self.threads.insert(thread);
            }
        }
    }

    /// Follows all threads until the client is done. It may `begin` once each of them has been stopped, and so will stop at
    /// each of its calls; those that come later are traced from their first call on.
    fn run(&mut self, begin: mpsc::Sender<()>) {
        let mut begin = Some(begin);
        let mut followed = BTreeSet::new();
        loop {
            let (thread, signal) = match self.wait() {
                WaitStatus::PtraceSyscall(thread) => {
                    let info = ptrace::syscall_info(thread).unwrap();
                    if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
                        self.look(thread);
                    }
                    (thread, None)
                }
                WaitStatus::Stopped(thread, DONE) => {
                    ptrace::detach(thread, None).unwrap();
                    self.threads.remove(&thread);
                    return;
                }
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                WaitStatus::PtraceEvent(thread, ..) => (thread, None),
                other => {
                    assert_ne!(other.pid(), Some(self.agent), "the agent ended: {other:?}");
                    continue;
                }
            };
            followed.insert(thread);
            if self.threads.is_subset(&followed)
                && let Some(begin) = begin.take()
            {
                begin.send(()).unwrap();
            }
            ptrace::syscall(thread, signal).unwrap();
        }
    }

    /// Lets all threads go; the agent runs on as if nothing had been.
    fn end(&mut self) {
        for thread in &self.threads {
            let _ended: nix::Result<()> = ptrace::interrupt(*thread);
        }
        while !self.threads.is_empty() {
            let status = self.wait();
            let signal = if let WaitStatus::Stopped(_, signal) = status { Some(signal) } else { None };
            let thread = status.pid().unwrap();
            if self.threads.remove(&thread) {
                ptrace::detach(thread, signal).unwrap();
            }
        }
    }

    /// The next thread that stopped or ended. Children of other threads, which are other tests', are left to them.
    fn wait(&mut self) -> WaitStatus {
        let status = waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).unwrap();
        match status {
            WaitStatus::PtraceEvent(thread, _, event) if event == libc::PTRACE_EVENT_CLONE => {
                let new = ptrace::getevent(thread).unwrap();
                self.threads.insert(Pid::from_raw(i32::try_from(new).unwrap()));
            }
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                self.threads.remove(&thread);
            }
            _ => {}
        }
        status
    }

    /// Looks at the call that `thread` is about to make.
    fn look(&mut self, thread: Pid) {
        // The number of the call and its six arguments: the same text on every processor.
        let text = fs::read_to_string(format!("/proc/{thread}/syscall")).unwrap();
        let mut fields = text.split_whitespace();
        let number: i64 = fields.next().unwrap().parse().unwrap();
        let hex = |field: &str| u64::from_str_radix(field.strip_prefix("0x").unwrap(), 16).unwrap();
        let arguments: Vec<u64> = fields.map(hex).collect();
        let int = |at: usize| u32::try_from(arguments[at] & 0xffff_ffff).unwrap().cast_signed();
        let (directory, path) = match number {
            libc::SYS_openat | libc::SYS_openat2 => (int(0), arguments[1]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => (libc::AT_FDCWD, arguments[0]),
            libc::SYS_getsockopt if [int(1), int(2)] == [libc::SOL_SOCKET, libc::SO_PEERCRED] => {
                return self.did.push(Did::AskWho);
            }
            _ => return,
        };
        let directory = match directory {
            libc::AT_FDCWD => format!("/proc/{thread}/cwd"),
            descriptor => format!("/proc/{thread}/fd/{descriptor}"),
        };
        let path = text_of(thread, usize::try_from(path).unwrap());
        self.did.push(Did::Open(fs::read_link(directory).unwrap().join(path)));
    }
}

/// The text that stands in the memory of `thread` at `address`.
fn text_of(thread: Pid, address: usize) -> String {
    const PAGE: usize = 4096;
    let mut bytes = [0; 2 * PAGE];
    // The page behind it may not be there.
    let first = RemoteIoVec { base: address, len: PAGE - address % PAGE };
    let second = RemoteIoVec { base: address + first.len, len: PAGE };
    let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &[first, second]).unwrap();
    let text = bytes[..read].split(|byte| *byte == 0).next().unwrap();
    String::from_utf8(text.to_vec()).unwrap()
}

/// The files under /proc that were opened for callers, and how many callers there were. The agent looks at itself meanwhile.
fn for_callers(agent: Pid, did: Vec<Did>) -> (Vec<PathBuf>, usize) {
    let callers = did.iter().filter(|did| **did == Did::AskWho).count();
    let opened = did.into_iter().filter_map(|did| match did {
        Did::Open(path) => {
            let own = path.starts_with("/proc/self") || path.starts_with(format!("/proc/{agent}"));
            (path.starts_with("/proc") && !own).then_some(path)
        }
        Did::AskWho => None,
    });
    (opened.collect(), callers)
}

/// A call of each kind that ends before attestation, and connections until the gate has closed some. Returns how many
/// connections that were.
fn refused(socket: &Path) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = client(socket).await;
        let mut wit =
            async || client.fetch_witsvid(request(pb::WitsvidRequest::default())).await.unwrap_err().code();
        for _ in 0..5 {
            assert_eq!(wit().await, Code::Unimplemented);
        }
        assert_eq!(wit().await, Code::ResourceExhausted);
        let nothing = pb::ValidateJwtsvidRequest::default();
        let status = client.validate_jwtsvid(request(nothing)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    });
    let (mut connections, mut passed, mut closed) = (1, 0, 0);
    while closed < 5 {
        match call(socket, FETCH_WIT, &message(&[]), PATIENCE) {
            Called::Refused => passed += 1,
            Called::Closed => closed += 1,
            other => panic!("{other:?}"),
        }
        connections += 1;
    }
    assert!(passed > 10, "{passed}");
    connections
}

#[test]
fn without_kubernetes_no_file_of_a_caller_is_opened_before_attestation() {
    let (socket, _other) = UnixStream::pair().unwrap();
    if getsockopt(&socket, sockopt::PeerPidfd).is_err() {
        println!("before Linux 6.5 a caller's start time is read at accept: this was left out");
        return;
    }
    let own = |file: &str| PathBuf::from(format!("/proc/{}/{file}", getpid()));
    for (mode, looks) in [("off", false), ("auto", false), ("on", true)] {
        let dir = tempfile::tempdir().unwrap();
        let blocks = format!(
            "agent {{\n  kubernetes {{ mode = \"{mode}\" }}\n}}\n{}\
             ratelimit {{\n  gate {{\n    caller {{ rate = 1 per = \"day\" burst = 30 }}\n  }}\n\
             caller {{\n    method \"FetchWITSVID\" {{ rate = 1 per = \"day\" burst = 5 }}\n  }}\n}}\n",
            entry("/web", "")
        );
        write_config(dir.path(), &blocks);
        let mut agent = Process::spawn(dir.path());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(runtime.block_on(agent.serving(dir.path())));
        let socket = dir.path().join("api.sock");

        // Connections are accepted in their order, so those of the start are when a later one is answered.
        let served = || call(&socket, FETCH_JWT, &jwt_request("served"), PATIENCE);
        assert_eq!(served(), Called::Answered, "{mode}");

        // A call that is served is attested; where pods are looked for it shows that what is opened is seen.
        let Some((did, called)) = traced(agent.pid(), served) else { return };
        assert_eq!(called, Called::Answered, "{mode}");
        // Nothing else there is asked for by an entry.
        let expected = if looks { vec![own("cgroup")] } else { vec![] };
        assert_eq!(for_callers(agent.pid(), did), (expected, 1), "{mode}: served");

        let Some((did, connections)) = traced(agent.pid(), || refused(&socket)) else { return };
        let expected = if looks { vec![own("cgroup"); connections] } else { vec![] };
        assert_eq!(for_callers(agent.pid(), did), (expected, connections), "{mode}: refused");
    }
}
