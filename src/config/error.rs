//! What is wrong with a configuration: all of it, sorted by place.

use std::{fmt, path::PathBuf};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file it stands in.
    pub file: PathBuf,
    /// Line, from 1; 0 when the mistake is the file itself.
    pub line: u32,
    /// Column in characters, from 1; 0 when the mistake is the file itself.
    pub column: u32,
    /// The key, with the blocks around it: `agent.log_level`. Empty when the text could not be read so far.
    pub key: String,
    /// The value where it helps, what is wrong with it, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, key, message } = self;
        write!(f, "{}:", file.display())?;
        if *line > 0 {
            write!(f, "{line}:{column}:")?;
        }
        match key.as_str() {
            "" => write!(f, " {message}"),
            key if message.starts_with(['"', '[', '{']) => write!(f, " {key} {message}"),
            key => write!(f, " {key}: {message}"),
        }
    }
}

/// All mistakes of a configuration: never empty. One a line when shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The mistakes, in the order in which they are shown.
    pub(super) fn new(list: Vec<ConfigError>) -> Self {
        Self(list)
    }

    /// The mistakes, by place.
    pub fn list(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
