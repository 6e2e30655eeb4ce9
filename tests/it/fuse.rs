//! A file system of one program, served by a thread of the test over `/dev/fuse`. It may stop answering.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

const NAME: &str = "program";
const ROOT: u64 = 1;
const PROGRAM: u64 = 2;

const ANSWERS: u8 = 0;
const SILENT: u8 = 1;
const OVER: u8 = 2;

/// A mounted file system that shows a copy of one program. It ends when this is dropped.
pub(crate) struct Fuse {
    dir: PathBuf,
    mood: Arc<AtomicU8>,
    server: Option<thread::JoinHandle<()>>,
}

impl Fuse {
    /// Mounts one at `dir` that shows `program`, or says why a test must do without.
    pub(crate) fn mount(dir: &Path, program: &Path) -> Option<Self> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                println!("left out: /dev/fuse: {error}");
                return None;
            }
        };
        fcntl(&device, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let mounted = Command::new("mount")
            .args(["-i", "-t", "fuse.test", "-o", &options, "test"])
            .arg(dir)
            .output()
            .unwrap();
        fcntl(&device, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        if !mounted.status.success() {
            println!("left out: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        let mood = Arc::new(AtomicU8::new(ANSWERS));
        let content = fs::read(program).unwrap();
        let of_server = Arc::clone(&mood);
        let server = thread::spawn(move || serve(device, &of_server, &content));
        Some(Self { dir: dir.to_owned(), mood, server: Some(server) })
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    /// From now on nobody is answered: whoever asks waits.
    pub(crate) fn fall_silent(&self) {
        self.mood.store(SILENT, Ordering::SeqCst);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.mood.store(OVER, Ordering::SeqCst);
        // It closes the device, and with it ends whoever waits.
        drop(self.server.take().map(thread::JoinHandle::join));
        drop(Command::new("umount").arg("-l").arg(&self.dir).status());
    }
}

fn serve(mut device: File, mood: &AtomicU8, content: &[u8]) {
    let mut request = vec![0; 1 << 20];
    loop {
        let mood = || mood.load(Ordering::SeqCst);
        while poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20u8)) == Ok(0) {
            if mood() == OVER {
                return;
            }
        }
        let Ok(n) = device.read(&mut request) else { return };
        if mood() == ANSWERS
            && let Some(answer) = answer(&request[..n], content)
        {
            // Whoever asked may have been killed meanwhile.
            drop(device.write(&answer));
        }
    }
}

/// What `linux/fuse.h` wants for a request.
fn answer(request: &[u8], content: &[u8]) -> Option<Vec<u8>> {
    let u32_at = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
    let (operation, unique, node) = (u32_at(4), u64_at(8), u64_at(16));
    let body = match operation {
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return None,
        // LOOKUP
        1 if request[40..].strip_suffix(b"\0") == Some(NAME.as_bytes()) => {
            let mut body = words(&[PROGRAM, 0, 0, 0, 0]);
            body.extend(attributes(PROGRAM, content));
            Ok(body)
        }
        // GETATTR
        3 => {
            let mut body = words(&[0, 0]);
            body.extend(attributes(node, content));
            Ok(body)
        }
        // OPEN, OPENDIR
        14 | 27 => Ok(words(&[0, 0])),
        // READ
        15 => {
            let from = usize::try_from(u64_at(48)).unwrap().min(content.len());
            let to = content.len().min(from + usize::try_from(u32_at(56)).unwrap());
            Ok(content[from..to].to_vec())
        }
        // RELEASE, FLUSH, RELEASEDIR, ACCESS
        18 | 25 | 29 | 34 => Ok(Vec::new()),
        // INIT: version 7.31, no extras, 128 KiB at a time
        26 => {
            let mut body = [7u32, 31, 0, 0, 0, 131_072, 0].map(u32::to_ne_bytes).concat();
            body.resize(64, 0);
            Ok(body)
        }
        // No such file; no such request.
        1 => Err(2),
        _ => Err(38),
    };
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap();
    let mut answer = length.to_ne_bytes().to_vec();
    answer.extend(i32::to_ne_bytes(error));
    answer.extend(unique.to_ne_bytes());
    answer.extend(body);
    Some(answer)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn attributes(node: u64, content: &[u8]) -> Vec<u8> {
    let (mode, links) = if node == ROOT { (0o040_755, 2) } else { (0o100_755, 1) };
    let size = u64::try_from(content.len()).unwrap();
    let mut attributes = words(&[node, size, size / 512, 0, 0, 0]);
    let rest: [u32; 10] = [0, 0, 0, mode, links, 0, 0, 0, 4096, 0];
    attributes.extend(rest.map(u32::to_ne_bytes).concat());
    attributes
}
