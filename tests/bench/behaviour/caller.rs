//! A caller: a process that does what it is told over its control socket, reads whatever arrives on its connections, and
//! reports each SVID with who it is.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Write as _},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        socket::{
            ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, recvmsg, sendmsg, setsockopt, shutdown,
            sockopt,
        },
    },
    unistd::{Gid, Uid, getegid, geteuid, getgroups, getpid, seteuid, setgroups, setresgid, setresuid},
};
use serde::{Deserialize, Serialize};

use super::{
    PATIENCE,
    action::{Action, Guise, Leave, Passed, WayBack},
    calls::{VALIDATE, call, make_noise, threads},
    connection::{Connection, first_stream},
    frames::{PING, PREFACE, frame},
    now,
    oracle::{Entry, GROUPS, Got, Ids, PROGRAMS},
};

/// What a caller's process begins with, as JSON in its environment.
pub(crate) const PART: &str = "DURWARD_BEHAVIOUR_PART";
/// Connections of one caller, and what it keeps beside them.
const MOST: usize = 12;
/// The first of the groups that no entry asks for, and of the users who only validate.
const FIRST_GROUP: u32 = 734_001;
const FIRST_USER: u32 = 733_001;
/// The longest message on a control socket.
const LONGEST: usize = 100_000;
/// How long the closing of a lingering socket lasts, in seconds.
const LINGER: i32 = 60;

#[derive(Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) control: RawFd,
    /// What it inherited and has no use for.
    pub(crate) close: Option<RawFd>,
    pub(crate) dir: PathBuf,
    pub(crate) program: usize,
    pub(crate) guise: Option<Guise>,
    pub(crate) connections: Vec<Connection>,
    /// Who it was, until when.
    pub(crate) past: Vec<(Ids, u64)>,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Report {
    Done,
    Got(Got),
    /// The agent ended the connection of this place.
    Ended(usize),
    /// It told a client to connect anew, by GOAWAY.
    ComeBack,
    /// The connection that comes with it is for another caller.
    Given(Box<Connection>, usize),
    /// After how many microseconds it was answered with an SVID, or why it was not.
    Asked(u64, Option<String>),
}

/// A message, and the descriptor that came with it.
type Message = (Vec<u8>, Option<RawFd>);

/// Receives a message. `None`: the end.
pub(crate) fn receive(control: RawFd, flags: MsgFlags) -> Result<Option<Message>, Errno> {
    let mut bytes = vec![0; LONGEST * 2];
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<()>(control, &mut parts, Some(&mut space), flags)?;
    let mut passed = None;
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            passed = fds.first().copied();
        }
    }
    let length = received.bytes;
    bytes.truncate(length);
    Ok((length > 0).then_some((bytes, passed)))
}

pub(crate) fn transmit(control: RawFd, message: &impl Serialize, passed: Option<RawFd>) -> Result<(), Errno> {
    let bytes = serde_json::to_vec(message).expect("JSON");
    let fds: Vec<RawFd> = passed.into_iter().collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(control, &[IoSlice::new(&bytes)], rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

pub(crate) struct Caller {
    part: Part,
    children: Vec<Child>,
    /// Other ends of sockets that linger.
    kept: Vec<TcpStream>,
}

impl Caller {
    /// A caller's process ends here; any other goes on.
    pub(crate) fn run_if_told() {
        let Ok(part) = std::env::var(PART) else { return };
        let part: Part = serde_json::from_str(&part).expect("a part");
        part.close.into_iter().for_each(|fd| _ = nix::unistd::close(fd));
        let mut caller = Self { part, children: Vec::new(), kept: Vec::new() };
        if let Some(guise) = caller.part.guise.take() {
            caller.part.connections.iter_mut().for_each(|it| it.next = first_stream());
            caller.become_other(&guise);
        }
        loop {
            match receive(caller.part.control, MsgFlags::empty()) {
                Ok(Some((told, passed))) => {
                    let action = serde_json::from_slice(&told).expect("an action");
                    caller.act(action, passed);
                    caller.report(&Report::Done, None);
                }
                Ok(None) => std::process::exit(0),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => std::process::exit(1),
            }
            caller.read();
            caller.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        }
    }

    fn ids(&self) -> Ids {
        // Those that an entry may ask for.
        let groups = getgroups().expect("groups").into_iter().map(Gid::as_raw);
        let groups = groups.filter(|gid| GROUPS.contains(gid)).collect();
        let program = PROGRAMS[self.part.program].to_owned();
        Ids { uid: geteuid().as_raw(), gid: getegid().as_raw(), groups, program }
    }

    fn report(&self, report: &Report, passed: Option<RawFd>) {
        // Nobody is there to hear it any more.
        if transmit(self.part.control, report, passed).is_err() {
            std::process::exit(0);
        }
    }

    fn read(&mut self) {
        let mut at = 0;
        while at < self.part.connections.len() {
            let was_told = self.part.connections[at].told_to_go;
            let ended = self.part.connections[at].reads && self.read_one(at, MsgFlags::MSG_DONTWAIT).1;
            if self.part.connections[at].told_to_go && !was_told {
                self.report(&Report::ComeBack, None);
            }
            if ended {
                self.part.connections.remove(at).close();
                self.report(&Report::Ended(at), None);
            } else {
                at += 1;
            }
        }
    }

    /// How many SVIDs arrived, and whether that is the end.
    fn read_one(&mut self, at: usize, flags: MsgFlags) -> (usize, bool) {
        let connection = &mut self.part.connections[at];
        let (arrived, ended) = connection.read(flags);
        let (first_wrote, ids) = (connection.first_wrote, self.ids());
        let count = arrived.len();
        for svid in arrived {
            let entry = Entry::named(&svid.name);
            let was = |ids: &Ids| entry.is_some_and(|entry| entry.fits(ids));
            let past = self.part.past.iter().rev().find(|(ids, _)| was(ids)).map(|(_, until)| *until);
            let entitled = if was(&ids) { Some(now()) } else { past };
            let (name, made, called) = (svid.name, svid.made, svid.called);
            self.report(
                &Report::Got(Got { name, made, called, first_wrote, entitled, ids: ids.clone() }),
                None,
            );
        }
        (count, ended)
    }

    fn connection(&mut self, at: usize) -> Option<&mut Connection> {
        let all = &mut self.part.connections;
        let at = at.checked_rem(all.len())?;
        all.get_mut(at)
    }

    fn act(&mut self, action: Action, passed: Option<RawFd>) {
        match action {
            Action::Open { deaf } => self.open(deaf),
            Action::Become(guise) => self.become_other(&guise),
            Action::Fork { at, guise } => self.fork(at, guise, passed.expect("a control socket")),
            Action::Exec { program } => self.exec(program),
            Action::Take(mut connection) => {
                connection.fd = passed.expect("a connection");
                connection.next = first_stream();
                self.part.connections.push(*connection);
                self.bound();
            }
            Action::Close { at } => {
                if let Some(at) = at.checked_rem(self.part.connections.len()) {
                    self.part.connections.remove(at).close();
                }
            }
            Action::Give { at, to } => {
                let Some(connection) = self.connection(at) else { return };
                let mut handed = connection.handed_over();
                let fd = handed.fd;
                handed.shortened_if(LONGEST);
                self.report(&Report::Given(Box::new(handed), to), Some(fd));
            }
            Action::Storm { times, what } => self.storm(times, what),
            Action::Users { first, users } => self.validate_as(first, users),
            Action::Leave(leave) => {
                self.report(&Report::Done, None);
                if matches!(leave, Leave::Killed) {
                    kill(getpid(), Signal::SIGKILL).expect("the end");
                }
                std::process::exit(0)
            }
            Action::Ask => self.ask(),
            Action::Pass { at, what, times } => {
                let Some(fd) = self.connection(at).map(|it| it.fd) else { return };
                let sent = (0..times).filter(|_| self.pass(fd, what)).count();
                if let Some(connection) = self.connection(at).filter(|_| sent > 0) {
                    connection.first_wrote.get_or_insert_with(now);
                }
            }
            Action::Call { .. }
            | Action::Burst { .. }
            | Action::Finish { .. }
            | Action::Noise { .. }
            | Action::Stall { .. }
            | Action::Listen { .. }
            | Action::Threads { .. }
            | Action::Shut { .. } => self.act_on_one(&action),
        }
    }

    fn act_on_one(&mut self, action: &Action) {
        let (Action::Call { at, .. }
        | Action::Burst { at, .. }
        | Action::Finish { at }
        | Action::Noise { at, .. }
        | Action::Stall { at }
        | Action::Listen { at }
        | Action::Threads { at }
        | Action::Shut { at, .. }) = *action
        else {
            return;
        };
        let Some(connection) = self.connection(at) else { return };
        match *action {
            Action::Call { method, cut, .. } => call(connection, method, cut),
            Action::Burst { method, times, .. } => (0..times).for_each(|_| call(connection, method, None)),
            Action::Finish { .. } => {
                if let Some((rest, stream)) = connection.rest.take() {
                    connection.write(rest, Some(stream));
                }
            }
            Action::Noise { noise, .. } => make_noise(connection, noise),
            Action::Stall { .. } => connection.reads = false,
            Action::Listen { .. } => {
                connection.reads = true;
                connection.listen();
            }
            Action::Threads { .. } => threads(connection),
            Action::Shut { how, .. } => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][how];
                _ = shutdown(connection.fd, how);
            }
            _ => {}
        }
    }

    /// The oldest go.
    fn bound(&mut self) {
        if self.part.connections.len() > MOST {
            self.part.connections.remove(0).close();
        }
        if self.kept.len() > MOST {
            self.kept.remove(0);
        }
    }

    fn open(&mut self, deaf: bool) {
        self.part.connections.extend(Connection::open(&self.part.dir.join("api.sock"), deaf));
        self.bound();
    }

    /// One who cannot stays who it is.
    fn become_other(&mut self, guise: &Guise) {
        let before = self.ids();
        // Each may fail, and what it is then is asked of the kernel.
        if seteuid(Uid::from_raw(0)).is_ok() {
            let more = FIRST_GROUP..FIRST_GROUP + guise.more_groups;
            let groups: Vec<Gid> = guise.groups.iter().copied().chain(more).map(Gid::from_raw).collect();
            let [uid, gid] = [guise.uid, guise.gid];
            let (real, saved) = match guise.way_back {
                WayBack::Saved => (uid, 0),
                WayBack::Real => (0, uid),
                WayBack::Lost => (uid, uid),
            };
            _ = setgroups(&groups);
            _ = setresgid(Gid::from_raw(gid), Gid::from_raw(gid), Gid::from_raw(gid));
            _ = setresuid(Uid::from_raw(real), Uid::from_raw(uid), Uid::from_raw(saved));
        }
        self.was(before);
    }

    fn was(&mut self, ids: Ids) {
        self.part.past.push((ids, now()));
        if self.part.past.len() > 32 {
            self.part.past.remove(0);
        }
    }

    fn fork(&mut self, at: usize, guise: Guise, control: RawFd) {
        let (own, dir, program) = (self.part.control, self.part.dir.clone(), self.part.program);
        let mut connections: Vec<Connection> =
            self.connection(at).map(Connection::handed_over).into_iter().collect();
        connections.iter_mut().for_each(|it| it.shortened_if(LONGEST));
        let part = Part {
            control,
            close: (own != 0).then_some(own),
            dir,
            program,
            guise: Some(guise),
            connections,
            past: Vec::new(),
        };
        // For a moment this process is root, so that its child can become who it is to be.
        let ids = self.ids();
        let raised = seteuid(Uid::from_raw(0)).is_ok();
        self.children.extend(self.command(&part, program).stdin(Stdio::null()).spawn());
        if raised {
            seteuid(Uid::from_raw(ids.uid)).expect("its own");
        }
        _ = nix::unistd::close(control);
    }

    fn command(&self, part: &Part, program: usize) -> Command {
        let mut command = Command::new(self.part.dir.join(PROGRAMS[program]));
        command.env(PART, serde_json::to_string(part).expect("JSON"));
        command
    }

    /// Goes on as another program, with all connections.
    fn exec(&mut self, program: usize) {
        let mut connections = std::mem::take(&mut self.part.connections);
        connections.iter_mut().for_each(|it| it.shortened_if(LONGEST / MOST));
        let (control, dir, mut past) =
            (self.part.control, self.part.dir.clone(), std::mem::take(&mut self.part.past));
        past.push((self.ids(), now()));
        let part = Part { control, close: None, dir, program, guise: None, connections, past };
        self.report(&Report::Done, None);
        let error = self.command(&part, program).exec();
        eprintln!("a caller cannot execute {}: {error}", PROGRAMS[program]);
        std::process::exit(1);
    }

    /// Connections that are closed at once, some with something passed.
    fn storm(&mut self, times: usize, what: Option<Passed>) {
        let path = self.part.dir.join("api.sock");
        for nth in 0..times {
            let Ok(mut stream) = UnixStream::connect(&path) else { break };
            drop(stream.write_all(&PREFACE[..nth.min(PREFACE.len())]));
            what.into_iter().for_each(|what| _ = self.pass(stream.as_raw_fd(), what));
        }
    }

    /// One user after the other, as far as this process may become root.
    fn validate_as(&self, first: u32, users: u32) {
        let (ids, path) = (self.ids(), self.part.dir.join("api.sock"));
        for uid in FIRST_USER + first..FIRST_USER + first + users {
            if seteuid(Uid::from_raw(0)).is_err() {
                return;
            }
            _ = seteuid(Uid::from_raw(uid));
            if let Some(mut connection) = Connection::open(&path, false) {
                call(&mut connection, VALIDATE, None);
                connection.close();
            }
        }
        _ = seteuid(Uid::from_raw(0));
        seteuid(Uid::from_raw(ids.uid)).expect("its own");
    }

    fn ask(&mut self) {
        let began = Instant::now();
        let mut failed = Some("no connection".to_owned());
        if let Some(opened) = Connection::open(&self.part.dir.join("api.sock"), false) {
            self.part.connections.push(opened);
            let at = self.part.connections.len() - 1;
            call(&mut self.part.connections[at], 0, None);
            let (mut count, mut ended) = (0, false);
            // A call that has ended has no stream any more.
            while count == 0 && !ended && self.part.connections[at].waits() && began.elapsed() < PATIENCE {
                (count, ended) = self.read_one(at, MsgFlags::empty());
            }
            let asked = self.part.connections.remove(at);
            let end = if ended { "the connection was closed" } else { "it was open" };
            failed = (count == 0).then(|| format!("{end}, and there came {:?}", asked.last));
            asked.close();
        }
        let micros = u64::try_from(began.elapsed().as_micros()).expect("a short time");
        self.report(&Report::Asked(micros, failed), None);
    }

    /// Passes a descriptor to the agent and keeps none of it. Whether that was possible.
    fn pass(&mut self, connection: RawFd, what: Passed) -> bool {
        let Ok(passed) = self.passed(connection, what) else { return false };
        let number = passed.as_ref().map_or(connection, OwnedFd::as_raw_fd);
        let rights = [ControlMessage::ScmRights(&[number])];
        let bytes = frame(PING, 0, 0, &[0; 8]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(connection, &[IoSlice::new(&bytes)], &rights, flags, None).is_ok();
        if let Some(socket) = passed.as_ref().filter(|_| !sent && matches!(what, Passed::Lingering)) {
            _ = setsockopt(socket, sockopt::Linger, &linger(0));
        }
        // Should the agent have closed its own already, this is the close that lingers.
        std::thread::spawn(move || drop(passed));
        self.bound();
        sent
    }

    /// `None` is the connection.
    fn passed(&mut self, connection: RawFd, what: Passed) -> std::io::Result<Option<OwnedFd>> {
        Ok(Some(match what {
            Passed::Itself => return Ok(None),
            Passed::Pipe => std::io::pipe()?.0.into(),
            Passed::File => File::open(self.part.dir.join(PROGRAMS[0]))?.into(),
            Passed::Nested => {
                let (one, other) = UnixStream::pair()?;
                let fds = [other.as_raw_fd(), connection];
                let rights = [ControlMessage::ScmRights(&fds)];
                sendmsg::<()>(one.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::MSG_DONTWAIT, None)?;
                other.into()
            }
            Passed::Lingering => {
                let listener = TcpListener::bind(("127.0.0.1", 0))?;
                let mut socket = TcpStream::connect(listener.local_addr()?)?;
                self.kept.push(listener.accept()?.0);
                socket.set_nonblocking(true)?;
                while socket.write(&[0; 64 * 1024]).is_ok() {}
                socket.set_nonblocking(false)?;
                setsockopt(&socket, sockopt::Linger, &linger(LINGER))?;
                socket.into()
            }
        }))
    }
}

fn linger(seconds: i32) -> libc::linger {
    libc::linger { l_onoff: 1, l_linger: seconds }
}
