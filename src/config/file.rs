//! The files of a configuration on disk: read whole, within a bound, and only where not everybody may write.
//!
//! An entry says who is who, so whoever may write the file of one may be anybody. What is checked is the file that
//! was opened, not its name. A read-only mount (a Kubernetes ConfigMap has mode 0777) is as good as a safe mode.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, sys::statvfs::FsFlags, sys::statvfs::fstatvfs};

/// The largest file that is read, in bytes.
const MAX_LEN: u64 = 64 << 20;

/// More drop-in files than this are a mistake.
const MAX_FILES: usize = 10_000;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is none.
    #[error("could not find config file {}: please use the -config flag", .0.display())]
    Missing(PathBuf),
    /// The system did not let us.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        cause: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// `entries_dir` is something else.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// Too large to be meant.
    #[error("{} has {length} bytes, and can have at most {MAX_LEN}", path.display())]
    TooLong { path: PathBuf, length: u64 },
    /// Too many to be meant.
    #[error("{} holds more than {MAX_FILES} files", .0.display())]
    TooMany(PathBuf),
    /// Not text.
    #[error("{}:{line}: is not UTF-8 text", path.display())]
    NotText {
        path: PathBuf,
        /// Where it ceases to be.
        line: usize,
    },
    /// Everybody may write it.
    #[error(
        "{} has mode {mode:04o}: everybody could give themselves an identity; make it {right:04o} or stricter",
        path.display()
    )]
    WorldWritable {
        path: PathBuf,
        mode: u32,
        /// The mode that is right.
        right: u32,
    },
}

/// Reads `agent.conf`. Where there is none, the error says what spire-agent's says.
pub(super) fn read_main(path: &Path) -> Result<String, FileError> {
    read_config(path).map_err(|err| match err {
        FileError::Read { path, cause } if cause.kind() == io::ErrorKind::NotFound => {
            FileError::Missing(path)
        }
        err => err,
    })
}

/// Reads the text of a configuration file.
fn read_config(path: &Path) -> Result<String, FileError> {
    let (file, meta) = open(path)?;
    refuse_world_writable(path, &file, &meta, 0o644)?;
    let bytes = read(path, file, &meta)?;
    String::from_utf8(bytes).map_err(|err| {
        let valid = err.as_bytes().get(..err.utf8_error().valid_up_to()).unwrap_or_default();
        let line = valid.iter().filter(|byte| **byte == b'\n').count().saturating_add(1);
        FileError::NotText { path: path.to_owned(), line }
    })
}

/// Reads a bundle.
pub(super) fn read_bundle(path: &Path) -> Result<Vec<u8>, FileError> {
    let (file, meta) = open(path)?;
    refuse_world_writable(path, &file, &meta, 0o644)?;
    read(path, file, &meta)
}

/// Drop-in files: the path of each, and its text or why there is none.
pub type DropIns = Vec<(PathBuf, Result<String, FileError>)>;

/// Reads the drop-in files of `dir` in the order of their names; `None` when there is no such directory.
pub(super) fn read_drop_ins(dir: &Path) -> Result<Option<DropIns>, FileError> {
    let failed = |cause| FileError::Read { path: dir.to_owned(), cause };
    let opened = match File::open(dir) {
        Ok(opened) => opened,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(failed(err)),
    };
    let meta = opened.metadata().map_err(failed)?;
    if !meta.is_dir() {
        return Err(FileError::NotADirectory(dir.to_owned()));
    }
    refuse_world_writable(dir, &opened, &meta, 0o755)?;
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let text = name.to_string_lossy();
        // A hidden file is an editor's, or the machinery of a ConfigMap.
        if !text.starts_with('.') && (text.ends_with(".conf") || text.ends_with(".json")) {
            paths.push(dir.join(&name));
        }
        if paths.len() > MAX_FILES {
            return Err(FileError::TooMany(dir.to_owned()));
        }
    }
    paths.sort();
    let read = |path: PathBuf| {
        let text = read_config(&path);
        (path, text)
    };
    Ok(Some(paths.into_iter().map(read).collect()))
}

/// Opens without waiting: a pipe without a writer would keep us forever.
fn open(path: &Path) -> Result<(File, Metadata), FileError> {
    let failed = |cause: io::Error| FileError::Read { path: path.to_owned(), cause };
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_file() { Ok((file, meta)) } else { Err(FileError::NotAFile(path.to_owned())) }
}

fn read(path: &Path, file: File, meta: &Metadata) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len().min(MAX_LEN)).unwrap_or_default());
    // One byte more than may be: the file may have grown since.
    let mut file = file.take(MAX_LEN + 1);
    file.read_to_end(&mut bytes).map_err(|cause| FileError::Read { path: path.to_owned(), cause })?;
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX).max(meta.len());
    if length > MAX_LEN { Err(FileError::TooLong { path: path.to_owned(), length }) } else { Ok(bytes) }
}

fn refuse_world_writable(path: &Path, file: &File, meta: &Metadata, right: u32) -> Result<(), FileError> {
    let mode = meta.mode() & 0o7777;
    if mode & 0o002 == 0 {
        return Ok(());
    }
    // Unknown counts as writable.
    let read_only = fstatvfs(file).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY));
    if read_only { Ok(()) } else { Err(FileError::WorldWritable { path: path.to_owned(), mode, right }) }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_no_safe_text_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("good"), "a = 1").unwrap();
        fs::write(at("writable"), "a = 1").unwrap();
        chmod(&at("writable"), 0o666);
        fs::write(at("bytes"), b"a\nb\n\xff").unwrap();
        File::create(at("huge")).unwrap().set_len(MAX_LEN + 1).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (name, want) in [
            ("good", Ok("a = 1")),
            ("none", Err("could not find config file DIR/none: please use the -config flag")),
            (
                "writable",
                Err(
                    "DIR/writable has mode 0666: everybody could give themselves an identity; make it 0644 or stricter",
                ),
            ),
            ("bytes", Err("DIR/bytes:3: is not UTF-8 text")),
            ("huge", Err("DIR/huge has 67108865 bytes, and can have at most 67108864")),
            ("pipe", Err("DIR/pipe is not a regular file")),
            ("", Err("DIR/ is not a regular file")),
        ] {
            let got = read_main(&at(name)).map_err(|err| err.to_string());
            let want =
                want.map(str::to_owned).map_err(|err| err.replace("DIR", dir.path().to_str().unwrap()));
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn drop_ins_come_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let names = |dir: &Path| -> Result<Option<String>, String> {
            let read =
                read_drop_ins(dir).map_err(|err| err.to_string().replace(dir.to_str().unwrap(), "DIR"))?;
            let name = |(path, text): &(PathBuf, Result<String, FileError>)| {
                format!(
                    "{}{}",
                    path.file_name().unwrap().to_str().unwrap(),
                    if text.is_ok() { "" } else { "!" }
                )
            };
            Ok(read.map(|all| all.iter().map(name).collect::<Vec<_>>().join(" ")))
        };
        assert_eq!(names(&dir.path().join("none")), Ok(None));
        for name in ["20-b.conf", "10-a.json", "x.conf~", ".hidden.conf", "README"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("30.conf")).unwrap();
        assert_eq!(names(dir.path()), Ok(Some("10-a.json 20-b.conf 30.conf!".to_owned())));
        chmod(dir.path(), 0o777);
        let refused =
            "DIR has mode 0777: everybody could give themselves an identity; make it 0755 or stricter";
        assert_eq!(names(dir.path()), Err(refused.to_owned()));
        assert_eq!(names(&dir.path().join("README")), Err("DIR is not a directory".to_owned()));
    }
}
