//! `quickstart`
use super::{Failure, terminal::Terminal};
#[derive(clap::Args, Clone, Debug)]
pub(super) struct QuickstartArgs {
    #[arg(long, value_name = "DIR")]
    dir: Option<std::path::PathBuf>,
    #[arg(long)]
    exit_after_fetch: bool,
    #[arg(long)]
    trust_domain: Option<String>,
}
#[derive(Debug, thiserror::Error)]
pub(super) enum QuickstartError {}
pub(super) fn run(args: &QuickstartArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let _ = (args, terminal, super::socket::Chosen::Own);
    Err(Failure::Agent(anyhow::anyhow!("quickstart is not built yet")))
}
