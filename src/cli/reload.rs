//! `reload`: has the agent read its configuration again, and ends with what came of it.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Failure,
    admin::AdminArgs,
    argv::process_id,
    call_error::CallError,
    terminal::{Terminal, clean},
};
use crate::api::proto::admin as pb;

/// `reload`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ReloadArgs {
    #[command(flatten)]
    admin: AdminArgs,

    /// Without an admin socket, send SIGHUP to this process
    ///
    /// Only the agent's log then shows the result.
    #[arg(long, value_name = "PID", value_parser = process_id)]
    or_signal: Option<i32>,
}

/// Why the agent goes on with what it had.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    /// Its configuration has mistakes, or changes what only a restart can.
    #[error("not reloaded, the old configuration stays in force:\n{0}")]
    Refused(String),
    /// There is no such process, or it is somebody else's.
    #[error("cannot send SIGHUP to process {pid}: {cause}")]
    Signal { pid: i32, cause: nix::errno::Errno },
}

/// Runs `reload`.
pub(super) async fn reload(args: &ReloadArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let question = pb::ReloadRequest {};
    let asked = args.admin.call(terminal, question, async |mut api, request| api.reload(request).await).await;
    let told = match (asked, args.or_signal) {
        (Err(Failure::Call(CallError::Connect { .. })), Some(pid)) => {
            kill(Pid::from_raw(pid), Signal::SIGHUP).map_err(|cause| ReloadError::Signal { pid, cause })?;
            return Ok(terminal.print("Sent SIGHUP: the agent's log shows the result.\n")?);
        }
        (asked, _) => asked?,
    };
    if told.error.is_empty() {
        terminal.print(&describe(&told))?;
        terminal.warn(&told.warnings);
        Ok(())
    } else {
        // A mistake is on a line of its own, and no word of it may drive a terminal.
        let error: Vec<String> = told.error.lines().map(clean).collect();
        Err(ReloadError::Refused(error.join("\n")).into())
    }
}

/// What a reload that went well changed.
pub(super) fn describe(told: &pb::ReloadResponse) -> String {
    let pb::ReloadResponse { entries_added, entries_removed, entries_changed, bundles_changed, .. } = told;
    let counts = [entries_added, entries_removed, entries_changed, bundles_changed];
    if counts.iter().all(|count| **count == 0) && told.settings_changed.is_empty() {
        return "Reloaded: nothing changed.\n".to_owned();
    }
    let mut out = format!(
        "Reloaded: entries {entries_added} added, {entries_removed} removed, {entries_changed} changed; \
         bundles {bundles_changed} changed.\n"
    );
    if !told.settings_changed.is_empty() {
        let settings: Vec<String> = told.settings_changed.iter().map(|key| clean(key)).collect();
        out.push_str(&format!("Settings changed: {}.\n", settings.join(", ")));
    }
    out
}
