//! `tidegate study`: variants of a configuration, trained with several seeds, measured and compared.

use super::device::PlaceArgs;
use super::out;
use crate::study::{Plan, StudyFile, shipped};
use crate::{Result, report, study};
use std::path::{Path, PathBuf};

const NOTES: &str = "\
A study is a TOML file: a base configuration, variants of it, seeds, a budget, columns for its table (docs/studies.md). Run again, it goes on where it was
stopped; arms that are done are not trained again.

Examples:
  tidegate study --list
  tidegate study gate-positions --set data.path=text/ --set train.tokens=2000000
  tidegate study my-study.toml --only baseline,mine --seeds 1
  tidegate study gate-positions --dry-run";

#[derive(Debug, clap::Args)]
#[command(after_help = NOTES, arg_required_else_help = true)]
pub(super) struct Args {
    /// A study that comes with tidegate, or a TOML file
    what: Option<String>,
    /// Show the studies that come with tidegate
    #[arg(long)]
    list: bool,
    /// Where the study is kept [default: studies/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Set one value for all variants, as in --set train.tokens=1000000; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Train only these variants now; more than one with commas
    #[arg(long, value_name = "VARIANT", value_delimiter = ',')]
    only: Vec<String>,
    /// Train only with these seeds now; more than one with commas
    #[arg(long, value_name = "SEED", value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Show what would be trained, and do nothing else
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.list {
        for s in shipped() {
            let file = StudyFile::parse(s.text, s.name)?;
            out(&format!("{:<16} {}", s.name, file.title))?;
        }
        return Ok(());
    }
    let what = args.what.as_deref().unwrap_or_default();
    let (name, file) = StudyFile::open(what)?;
    let whole = Plan::new(&name, file, &args.set)?;
    let plan = whole.clone().only(&args.only, &args.seeds)?;
    if args.dry_run {
        return dry_run(&plan);
    }
    let dir = args.out.clone().unwrap_or_else(|| Path::new("studies").join(&name));
    let results = study::run(&plan, &whole, &dir, |arm| args.place.open(arm.resolved.config.train.dtype))?;
    out(results.markdown().trim_end())?;
    let page = report::write(std::slice::from_ref(&dir), None)?;
    out(&format!("{}: {}, table.md, {}", dir.display(), study::FILE, page.file_name().unwrap_or_default().display()))
}

/// The arms, their sizes, and what they cost together.
fn dry_run(plan: &Plan) -> Result<()> {
    let mut flops = 0.0;
    for arm in &plan.arms {
        let c = &arm.resolved.config;
        let (total, active) = c.model.parameters();
        let step = (c.data.seq_len * c.data.batch * c.train.accumulate) as f64;
        let tokens = match (c.train.tokens, c.train.steps, c.train.minutes) {
            (Some(t), _, _) => Some((t as f64 / step).ceil() * step),
            (_, Some(s), _) => Some(s as f64 * step),
            _ => None,
        };
        let budget = match (tokens, c.train.minutes) {
            (Some(t), _) => format!("{t:.0} tokens"),
            (None, m) => format!("{} minutes", m.unwrap_or_default()),
        };
        flops += tokens.unwrap_or(0.0) * c.model.flops_per_token(c.data.seq_len);
        out(&format!("{:<28} seed {:<3} {total} parameters, {active} active; {budget}", plan.variant(arm).name, arm.seed))?;
    }
    let work = if flops > 0.0 { format!(", {:.1} TFLOP together", flops / 1e12) } else { String::new() };
    out(&format!("{} arms{work}", plan.arms.len()))
}
