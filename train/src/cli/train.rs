//! `tidegate train`.

use super::{out, result_line, run_of};
use crate::checkpoint::{self, RunDir};
use crate::config::{Layers, Resolved};
use crate::data::Corpus;
use crate::learner::Hybrid;
use crate::{Error, Result, presets, trainer};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A preset (quickstart, smoke) or a TOML file; may be left out with --resume
    what: Option<String>,
    /// Set one value, as in --set train.minutes=0.5; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the run is kept [default: runs/NAME, then runs/NAME-2, …]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Go on with the run folder's newest checkpoint, or with the one named here
    #[arg(long, value_name = "auto|CHECKPOINT", num_args = 0..=1, default_missing_value = "auto")]
    resume: Option<String>,
    /// Show every value and where it came from, and do nothing else
    #[arg(long)]
    print_config: bool,
    /// At the end, print how long each op's kernels ran
    #[arg(long)]
    profile: bool,
}

/// The preset or file, with `--set`s on top.
fn layers(what: &str) -> Result<Layers> {
    let path = Path::new(what);
    if !presets::NAMES.contains(&what) && (path.extension().is_some_and(|e| e == "toml") || path.is_file()) {
        let base = Layers::base_of(path)?.unwrap_or_else(|| "quickstart".into());
        let mut preset = presets::by_name(&base)?;
        preset.name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("run").to_string();
        let mut layers = Layers::preset(&preset)?;
        layers.file(path)?;
        return Ok(layers);
    }
    Layers::preset(&presets::by_name(what)?)
}

/// `runs/NAME`, or the first of `runs/NAME-2`, … that is free (the last that is not, to resume).
fn default_dir(name: &str, resume: bool) -> PathBuf {
    let dir = |i: u32| Path::new("runs").join(if i == 1 { name.to_string() } else { format!("{name}-{i}") });
    let taken = (1u32..).take_while(|&i| dir(i).exists()).last();
    match taken {
        Some(last) if resume => dir(last),
        Some(last) => dir(last + 1),
        None => dir(1),
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let from = args.resume.as_deref().filter(|r| *r != "auto").map(|r| checkpoint::find(Path::new(r))).transpose()?;
    let named = args.run_dir.clone().or_else(|| from.as_deref().map(run_of));
    let resuming = args.resume.is_some();
    // A resumed run keeps its own configuration, so that it goes on as it began; what the command line sets is laid on top.
    let dir = match (&named, &args.what) {
        (Some(dir), _) => Some(dir.clone()),
        (None, Some(what)) => Some(default_dir(layers(what)?.resolve()?.config.name.as_str(), resuming)),
        (None, None) => None,
    };
    let own = dir.as_ref().filter(|_| resuming).filter(|d| d.join("run.json").is_file()).map(|d| checkpoint::read_info(d)).transpose()?;
    let mut layered = match (&own, &args.what) {
        (Some(info), what) => {
            if let Some(name) = what.as_deref().filter(|w| Path::new(w).file_stem().and_then(|s| s.to_str()) != Some(&info.config.name)) {
                let (d, own) = (dir.as_deref().unwrap_or(Path::new("")).display(), &info.config.name);
                return Err(Error::Usage(format!("run folder {d} holds a run of `{own}`, not of `{name}`; choose another by --run-dir")));
            }
            Layers::preset(&info.config)?
        }
        (None, Some(what)) => layers(what)?,
        (None, None) => {
            return Err(Error::Usage("train what? Name a preset (quickstart, smoke) or a TOML file, as in `tidegate train quickstart`".into()));
        }
    };
    layered.set(&args.set)?;
    let resolved = layered.resolve()?;
    if args.print_config {
        out(resolved.to_toml().trim_end());
        return Ok(());
    }
    let dir = dir.unwrap_or_else(|| default_dir(&resolved.config.name, resuming));
    if args.profile {
        engine::profile::start();
    }
    go(&resolved, &dir, resuming, from)?;
    if args.profile {
        out(engine::profile::stop().to_string().trim_end());
    }
    Ok(())
}

fn go(resolved: &Resolved, dir: &Path, resuming: bool, from: Option<PathBuf>) -> Result<()> {
    let config = &resolved.config;
    let corpus = Corpus::open(&config.data.path, config.data.eot)?;
    let mut model = Hybrid::create(&config.model, config.seed)?;
    let run = RunDir::open(dir, resuming)?;
    let from = from.or(if resuming { checkpoint::checkpoints(dir)?.pop().map(|c| c.1) } else { None });
    let command: Vec<String> = std::env::args().collect();
    run.write_config(resolved, &command, &model.net().config_json()?)?;
    let say = |text: String| drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{text}\n")));
    let bytes = corpus.len();
    let unit = if corpus.is_bytes() { "bytes" } else { "tokens" };
    say(format!("{}: {} parameters", config.name, model.parameters()));
    say(format!(
        "data {}: {bytes} {unit}, the last {:.0}% held out; run folder {}",
        corpus.path().display(),
        100.0 * config.data.held_out,
        dir.display()
    ));
    match &from {
        Some(c) => say(format!("resuming {}", c.display())),
        None if resuming => say("no checkpoint yet: beginning at the beginning".into()),
        None => {}
    }
    let done = trainer::train(&mut model, &corpus, config, &run, from.as_deref())?;
    let (s, per_s) = (done.state, done.state.tokens as f64 / done.state.seconds.max(1e-9));
    out(&format!("trained {} steps, {} tokens, {:.1} s, {per_s:.0} tokens/s: {}", s.step, s.tokens, s.seconds, dir.display()));
    if let Some(bits) = done.held_out {
        out(&result_line(&corpus, bits, done.scored));
    }
    if corpus.is_bytes() {
        out(&format!("write with it: tidegate generate {} --prompt \"{}\"", dir.display(), config.sample.prompt));
    }
    Ok(())
}
