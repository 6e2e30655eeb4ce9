//! The files of a configuration on disk: read whole, within a bound, and only where nobody but root and the agent's user
//! could have put them.
//!
//! An entry says who is who, so whoever may write the file of one, or a directory on the way to it, may be anybody
//! ([`crate::os::trusted`]). What is checked is what was opened, not its name.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use crate::{
    identity::pem::WideText,
    os::{
        sentence::said,
        trusted::{PathError, Trust, TrustedDir},
    },
};

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
    #[error("cannot read {}: {}", path.display(), said(cause))]
    Read {
        /// What was to be read.
        path: PathBuf,
        cause: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// `entries_dir` is a link that leads nowhere.
    #[error("{} is a link to what is not there: put that back, or remove the link to have no drop-in files", .0.display())]
    DanglingLink(PathBuf),
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
    #[error("{}:{line}: is not valid UTF-8", path.display())]
    NotText {
        path: PathBuf,
        /// Where it ceases to be.
        line: usize,
    },
    /// Text, of two bytes a character or four.
    #[error("{} is {encoding}: save it as UTF-8", path.display())]
    Wide { path: PathBuf, encoding: WideText },
    /// Others could give themselves an identity.
    #[error(transparent)]
    Path(PathError),
}

/// What `error` says of `path`, where that is named before it.
pub(super) fn said_of(path: &Path, error: impl ToString) -> String {
    let said = error.to_string();
    let shown = path.display().to_string();
    if shown.is_empty() {
        return said;
    }
    if let Some(rest) = said.strip_prefix(&format!("{shown} ")) {
        return rest.to_owned();
    }
    for verb in ["cannot read", "cannot open"] {
        if let Some(cause) = said.strip_prefix(&format!("{verb} {shown}: ")) {
            return format!("{verb} it: {cause}");
        }
    }
    said.strip_prefix(&format!("supplied CA {shown}: ")).map(str::to_owned).unwrap_or(said)
}

impl FileError {
    /// The line of the file that it is about, and what it says where the file is named before it; 0 for the file itself.
    pub(super) fn within(&self, file: &Path) -> (u32, String) {
        match self {
            Self::NotText { line, .. } => {
                (u32::try_from(*line).unwrap_or(u32::MAX), "is not valid UTF-8".to_owned())
            }
            other => {
                let said = said_of(file, other);
                // A path on the way is told from `/` on.
                (0, std::path::absolute(file).map(|whole| said_of(&whole, &said)).unwrap_or(said))
            }
        }
    }

    /// As errors of a file that was asked for as `path`.
    fn of(path: &Path) -> impl FnOnce(PathError) -> Self {
        |error| match error {
            PathError::Open { cause, .. } => Self::Read { path: path.to_owned(), cause },
            PathError::Kind { path, want: "directory" } => Self::NotADirectory(path),
            PathError::Kind { .. } => Self::NotAFile(path.to_owned()),
            error => Self::Path(error),
        }
    }
}

/// Reads `agent.conf`. Where there is none, the error says what spire-agent's says.
pub(super) fn read_main(trust: Trust, path: &Path) -> Result<String, FileError> {
    read_config(trust, path).map_err(|err| match err {
        FileError::Read { path, cause } if cause.kind() == io::ErrorKind::NotFound => {
            FileError::Missing(path)
        }
        err => err,
    })
}

/// Reads the text of a configuration file.
fn read_config(trust: Trust, path: &Path) -> Result<String, FileError> {
    text(path, trust.open(path).map_err(FileError::of(path))?)
}

/// Reads a file that the configuration names.
pub(super) fn read_file(trust: Trust, path: &Path) -> Result<Vec<u8>, FileError> {
    read(path, trust.open(path).map_err(FileError::of(path))?)
}

/// Drop-in files: the path of each, and its text or why there is none.
pub type DropIns = Vec<(PathBuf, Result<String, FileError>)>;

/// Reads the drop-in files of `dir` in the order of their names; `None` when there is no such directory.
pub(super) fn read_drop_ins(trust: Trust, dir: &Path) -> Result<Option<DropIns>, FileError> {
    let failed = |cause| FileError::Read { path: dir.to_owned(), cause };
    // Sticky or not: who may put a file there may be anybody.
    let opened = match trust.directory(dir).and_then(TrustedDir::for_us_alone) {
        Ok(opened) => opened,
        Err(err) if err.is_missing() => {
            // Somebody means it to be there: what it had held would be gone without a word.
            let is_link = dir.symlink_metadata().is_ok_and(|found| found.is_symlink());
            return if is_link { Err(FileError::DanglingLink(dir.to_owned())) } else { Ok(None) };
        }
        Err(err) => return Err(FileError::of(dir)(err)),
    };
    let mut names = Vec::new();
    for name in opened.names().map_err(failed)? {
        let name = name.map_err(failed)?;
        let text = name.to_string_lossy();
        // A hidden file is an editor's, or the machinery of a ConfigMap.
        if !text.starts_with('.') && (text.ends_with(".conf") || text.ends_with(".json")) {
            names.push(name);
        }
        if names.len() > MAX_FILES {
            return Err(FileError::TooMany(dir.to_owned()));
        }
    }
    names.sort();
    let read = |name: OsString| {
        let path = dir.join(&name);
        let text = opened.open(&name).map_err(FileError::of(&path)).and_then(|file| text(&path, file));
        (path, text)
    };
    Ok(Some(names.into_iter().map(read).collect()))
}

/// More files than this are not named that are not read.
pub(super) const MOST_PASSED_OVER: usize = 16;

/// Files of `dir` that somebody may take for drop-in files, and that are none by their names: not what is hidden, an editor's
/// copy, or a README.
pub(super) fn passed_over(trust: Trust, dir: &Path) -> Vec<PathBuf> {
    let Ok(opened) = trust.directory(dir) else { return Vec::new() };
    let names = opened.names().into_iter().flatten().take(MAX_FILES).filter_map(Result::ok);
    let mut found: Vec<PathBuf> = names
        .filter(|name| {
            let name = name.to_string_lossy();
            let is_read = name.ends_with(".conf") || name.ends_with(".json");
            !(is_read || name.starts_with('.') || name.ends_with('~') || name.starts_with("README"))
        })
        .map(|name| dir.join(name))
        .collect();
    found.sort();
    found.truncate(MOST_PASSED_OVER);
    found
}

fn text(path: &Path, file: File) -> Result<String, FileError> {
    let bytes = read(path, file)?;
    if let Some(encoding) = WideText::of(&bytes) {
        return Err(FileError::Wide { path: path.to_owned(), encoding });
    }
    String::from_utf8(bytes).map_err(|err| {
        let valid = err.as_bytes().get(..err.utf8_error().valid_up_to()).unwrap_or_default();
        let line = valid.iter().filter(|byte| **byte == b'\n').count().saturating_add(1);
        FileError::NotText { path: path.to_owned(), line }
    })
}

fn read(path: &Path, file: File) -> Result<Vec<u8>, FileError> {
    let failed = |cause| FileError::Read { path: path.to_owned(), cause };
    let found = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(found.min(MAX_LEN)).unwrap_or_default());
    // One byte more than may be: the file may have grown since.
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX).max(found);
    if length > MAX_LEN { Err(FileError::TooLong { path: path.to_owned(), length }) } else { Ok(bytes) }
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
                    "DIR/writable belongs to user UID and has mode 0666: nobody else may write to it (chmod go-w DIR/writable, or choose another place)",
                ),
            ),
            ("bytes", Err("DIR/bytes:3: is not valid UTF-8")),
            ("huge", Err("DIR/huge has 67108865 bytes, and can have at most 67108864")),
            ("pipe", Err("DIR/pipe is not a regular file")),
            ("", Err("DIR/ is not a regular file")),
        ] {
            let got = read_main(Trust::own(), &at(name)).map_err(|err| err.to_string());
            let uid = nix::unistd::geteuid().to_string();
            let here = |err: &str| err.replace("DIR", dir.path().to_str().unwrap()).replace("UID", &uid);
            let want = want.map(str::to_owned).map_err(here);
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn drop_ins_come_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let names = |dir: &Path| -> Result<Option<String>, String> {
            let read = read_drop_ins(Trust::own(), dir)
                .map_err(|err| err.to_string().replace(dir.to_str().unwrap(), "DIR"))?;
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
        fs::write(dir.path().join("web.hcl"), "").unwrap();
        assert_eq!(passed_over(Trust::own(), dir.path()), [dir.path().join("web.hcl")]);
        for mode in [0o777, 0o1777, 0o775] {
            chmod(dir.path(), mode);
            let refused = names(dir.path()).unwrap_err();
            assert!(refused.contains("(chmod go-w DIR, or choose"), "{mode:o}: {refused}");
        }
        chmod(dir.path(), 0o755);
        assert_eq!(names(&dir.path().join("README")), Err("DIR is not a directory".to_owned()));
    }
}
