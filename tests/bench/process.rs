//! A part of a bench that is a process of its own: it says that it is there, waits until all are, and says what it saw.

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::Command,
};

use serde::{Serialize, de::DeserializeOwned};

/// What it says when it is there.
pub(crate) const READY: &str = "ready\n";

/// A part, by what it is told.
pub(crate) trait Part: Serialize + DeserializeOwned {
    /// The variable of its environment that tells it, as JSON.
    const TOLD: &str;
    /// One line of a pipe that many share, so it is short.
    type Saw: Serialize;

    /// What it does, when all are there.
    fn play(&self) -> Self::Saw;

    /// This program again, as this part. Its standard input is closed when all are there.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env(Self::TOLD, serde_json::to_string(self).expect("JSON"));
        command
    }

    /// The process of such a part ends here; any other goes on.
    fn come_if_told() {
        let Ok(told) = std::env::var(Self::TOLD) else { return };
        let part: Self = serde_json::from_str(&told).expect("a part");
        print!("{READY}");
        std::io::stdout().flush().expect("said");
        // Nothing is ever sent: it ends when all are there.
        drop(std::io::stdin().read(&mut [0]));
        println!("{}", serde_json::to_string(&part.play()).expect("JSON"));
        std::process::exit(0);
    }
}
