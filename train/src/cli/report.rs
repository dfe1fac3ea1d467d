//! `tidegate report`.

use super::{out, run_of};
use crate::{Result, report};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  tidegate report runs/quickstart                        writes runs/quickstart/report.html
  tidegate report runs/gated runs/plain --out both.html  compares any number of runs
  tidegate report studies/gate-positions                 a study: tables, curves with seeds, its arms' measures

A report is one HTML file that needs no network. Runs whose configurations differ in the seed alone share a colour and have a mean.
What `tidegate measure RUN` wrote is shown, too.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Run folders, or one study's folder
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The file to write [default: report.html in the folder; for several runs, in the current one]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let paths: Vec<PathBuf> = args.paths.iter().map(|p| run_of(p)).collect();
    let written = report::write(&paths, args.out.as_deref())?;
    out(&format!("{}", written.display()))
}
