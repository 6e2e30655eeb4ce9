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
    /// The value as written, abridged; `None` where there is none, or where it is a secret.
    pub value: Option<String>,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, key, value, message } = self;
        write!(f, "{}:", file.display())?;
        if *line > 0 {
            write!(f, "{line}:{column}:")?;
        }
        for part in [Some(key).filter(|key| !key.is_empty()), value.as_ref()].into_iter().flatten() {
            write!(f, " {part}")?;
        }
        if !key.is_empty() || value.is_some() {
            f.write_str(":")?;
        }
        write!(f, " {message}")
    }
}

/// All mistakes of a configuration: never empty, by place, one a line when shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    list: Vec<ConfigError>,
    left_out: usize,
}

impl ConfigErrors {
    pub(crate) fn new(list: Vec<ConfigError>, left_out: usize) -> Self {
        Self { list, left_out }
    }

    /// The mistakes, by place.
    pub fn list(&self) -> &[ConfigError] {
        &self.list
    }

    /// How many more there were, when there were too many to list.
    pub fn left_out(&self) -> usize {
        self.left_out
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.list.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        if self.left_out > 0 {
            write!(f, "\nand {} more", self.left_out)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
