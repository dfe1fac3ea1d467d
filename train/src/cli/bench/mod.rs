//! `tidegate bench ops | step | decode`: how long the fused ops, whole training steps and decoding take on a device.

mod cases;
mod clock;
mod decode;
mod ops;
mod step;
mod table;

pub(super) use clock::Clock;

use super::device::PlaceArgs;
use crate::{Error, Result};
use clap::Subcommand;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time fused ops, forward and forward with backward
    Ops(ops::Args),
    /// Time whole training steps of a preset or a TOML file
    Step(step::Args),
    /// Time reading prompts and decoding with a preset's or a TOML file's model
    Decode(decode::Args),
}

/// What all benches take.
#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    place: PlaceArgs,
    /// How often the work is timed [default: as often as fits about two seconds, 5 to 100 times]
    #[arg(long, value_name = "N", value_parser = |t: &str| super::whole(t, 1_000_000).and_then(|n| if n > 0 { Ok(n) } else { Err("expected at least 1".to_string()) }))]
    reps: Option<u64>,
    /// Write the results as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Common {
    fn reps(&self) -> Option<usize> {
        self.reps.map(|n| n as usize)
    }
    fn write(&self, json: &serde_json::Value) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        std::fs::write(path, format!("{json:#}\n")).map_err(Error::io("writing", path))
    }
    /// A bench may take minutes: a file that can't be written is found before.
    fn check(&self) -> Result<()> {
        let folder = |p: &Path| p.parent().filter(|f| !f.as_os_str().is_empty()).map_or(PathBuf::from("."), Path::to_path_buf);
        match &self.json {
            Some(p) if p.is_dir() => Err(Error::Usage(format!("--json {}: is a folder; name a file", p.display()))),
            Some(p) if !folder(p).is_dir() => Err(Error::Usage(format!("--json {}: there is no folder {}", p.display(), folder(p).display()))),
            _ => Ok(()),
        }
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Ops(args) => ops::run(args),
        What::Step(args) => step::run(args),
        What::Decode(args) => decode::run(args),
    }
}
