//! `tidegate train`.

use super::device::PlaceArgs;
use super::dry_run;
use super::{out, quoted, result_line, run_of, same_tokens, skip};
use crate::checkpoint::{self, RunDir, RunInfo, State};
use crate::config::{Change, Layers, Precision, Resolved, RunConfig};
use crate::data::Corpus;
use crate::learner::{Hybrid, Network, Trained};
use crate::progress::say;
use crate::tasks::{Source, held_out};
use crate::text::Codec;
use crate::text::tokenizer;
use crate::{Error, Result, composed, groups, presets, trainer};
use engine::DType;
use std::path::{Path, PathBuf};

/// Keys that decide which text a step sees.
const ORDER: [&str; 7] = ["seed", "data.path", "data.held_out", "data.seq_len", "data.batch", "train.accumulate", "tasks.share"];
/// Keys of the model, or beginnings of keys, that no parameter depends on: how positions are told apart, and how many there are.
const POSITIONS: [&str; 4] = ["model.rope_theta", "model.rope_scaling.", "model.max_position_embeddings", "model.sliding_window"];

const EXAMPLES: &str = "\
Examples:
  tidegate train quickstart
  tidegate train quickstart --set train.minutes=0.5 --run-dir runs/try
  tidegate train quickstart --set data.path=my.txt --set optim.lr=1e-3
  tidegate train my.toml --print-config
  tidegate train quickstart --from Qwen3-0.6B/ --set data.path=tokens/ --set optim.lr=2e-5
  tidegate train qwen3-15a2b --dry-run --set model.attention_gate.granularity=headwise
  tidegate train --run-dir runs/try --resume

The budget is one of train.minutes, train.tokens and train.steps, and the learning rate's schedule follows it. Runs of as many tokens or steps are
equal bit for bit, resumed or not, on any number of threads (RAYON_NUM_THREADS); runs by the clock are not.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A preset (quickstart, smoke, gated-deltanet-1.3b, qwen3-15a2b and others: docs/training.md) or a TOML file; may be left out with --resume
    what: Option<String>,
    /// Set one value, as in --set train.minutes=0.5; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the run is kept [default: runs/NAME, then runs/NAME-2, …]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Begin with the parameters, and the model, of a run, a checkpoint or a folder of transformers; short for --set train.from=DIR
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    from: Option<PathBuf>,
    /// Go on with the run folder's newest checkpoint, or with the one named here
    #[arg(long, value_name = "auto|CHECKPOINT", num_args = 0..=1, default_missing_value = "auto")]
    resume: Option<String>,
    #[command(flatten)]
    place: PlaceArgs,
    /// On a GPU, launch kernels one by one instead of replaying each step as a whole; for debugging
    #[arg(long)]
    no_replay: bool,
    /// Show every value and where it came from, and do nothing else
    #[arg(long)]
    print_config: bool,
    /// Show parameters, memory and operations, and do nothing else: for models of any size, on any machine
    #[arg(long)]
    dry_run: bool,
    /// At the end, print how long each op's kernels ran
    #[arg(long)]
    profile: bool,
}

impl Args {
    /// `--set`s, and `--dtype` and `--from`, which are some too.
    fn sets(&self) -> Vec<String> {
        let dtype = self.place.dtype.map(|d| format!("train.dtype={}", DType::from(d)));
        let from = self.from.as_ref().map(|dir| format!("train.from={}", dir.display()));
        self.set.iter().cloned().chain(dtype).chain(from).collect()
    }
}

/// The TOML file that `what` means, unless it means a preset.
fn file(what: &str) -> Option<&Path> {
    let path = Path::new(what);
    (!presets::NAMES.contains(&what) && (path.extension().is_some_and(|e| e == "toml") || path.is_file())).then_some(path)
}

/// The name that a run of `what` has when nobody gives it another.
fn stem(what: &str) -> &str {
    file(what).and_then(Path::file_stem).and_then(|s| s.to_str()).unwrap_or(what)
}

/// The preset or file, with `--set`s on top; where parameters are from elsewhere, their model is in place of the preset's.
pub(super) fn layers(what: &str, set: &[String]) -> Result<Layers> {
    let own = layers_on(what, set, None)?;
    let from = own.text("train.from");
    if from.is_empty() { Ok(own) } else { layers_on(what, set, Some(&from)) }
}

fn layers_on(what: &str, set: &[String], from: Option<&str>) -> Result<Layers> {
    let text = |e: Error| match e {
        Error::Usage(m) if Path::new(what).exists() && Path::new(what).extension().is_none_or(|e| e != "toml") => Error::Usage(format!(
            "{m}\n(a text or a folder of them to train on is named so: tidegate train quickstart --set data.path={})",
            quoted(what)
        )),
        e => e,
    };
    let begin = |preset: &RunConfig| -> Result<Layers> {
        let mut layers = Layers::preset(preset)?;
        if let Some(from) = from {
            let dir = checkpoint::candidates(Path::new(from)).map_err(|e| Error::Usage(format!("train.from: {e}")))?.remove(0);
            layers.model(&nn::Decoder::config_of(&dir)?, from)?;
        }
        Ok(layers)
    };
    let mut layers = match file(what) {
        None => begin(&presets::by_name(what).map_err(text)?)?,
        Some(path) => {
            let mut preset = presets::by_name(&Layers::base_of(path).map_err(text)?.unwrap_or_else(|| "quickstart".into()))?;
            preset.name = stem(what).to_string();
            let mut layers = begin(&preset)?;
            layers.file(path)?;
            layers
        }
    };
    layers.set(set)?;
    Ok(layers)
}

/// A run that goes on keeps its own configuration, so that it ends as it began. Its file, where one is named, is read again, and lies under what
/// `--set` gives now and gave before.
fn layers_of_run(dir: &Path, info: &RunInfo, args: &Args) -> Result<Layers> {
    let mut layers = Layers::of(&info.config, info.origins.clone())?;
    if let Some(what) = &args.what {
        let own = [&info.origins.base, &info.config.name];
        if !own.iter().any(|o| *o == stem(what)) {
            let (d, own) = (dir.display(), own[0]);
            return Err(Error::Usage(format!("run folder {d} holds a run of `{own}`, not of `{what}`; choose another by --run-dir")));
        }
        if let Some(path) = file(what) {
            layers.file(path)?;
        }
    }
    layers.set(&args.sets())?;
    Ok(layers)
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

/// The checkpoints that `--resume CHECKPOINT` names, newest first.
fn named(args: &Args) -> Result<Option<Vec<PathBuf>>> {
    let Some(path) = args.resume.as_deref().filter(|r| *r != "auto") else { return Ok(None) };
    checkpoint::candidates(Path::new(path)).map(Some).map_err(|e| match &args.what {
        None => Error::Usage(format!("--resume {path}: {e}. What to train stands before it, as in `tidegate train quickstart --resume`")),
        Some(_) => e,
    })
}

/// What a run is to do.
struct Plan {
    resolved: Resolved,
    dir: PathBuf,
    /// Against the configuration that the run folder holds.
    changes: Vec<Change>,
    /// The checkpoints to go on from, if any were named.
    from: Option<Vec<PathBuf>>,
    resuming: bool,
    /// Whether the command line itself says what to train on.
    chooses_data: bool,
}

fn plan(args: &Args) -> Result<Plan> {
    let (resuming, from) = (args.resume.is_some(), named(args)?);
    let dir = match (&args.run_dir, &from, &args.what) {
        (Some(dir), _, _) => dir.clone(),
        (None, Some(from), _) => run_of(args.resume.as_deref().filter(|p| Path::new(p).join("run.json").is_file()).map_or(&from[0], Path::new)),
        (None, None, Some(what)) => default_dir(&layers(what, &args.sets())?.resolve()?.config.name, resuming),
        (None, None, None) => {
            return Err(Error::Usage("train what? Name a preset (quickstart, smoke) or a TOML file, as in `tidegate train quickstart`".into()));
        }
    };
    let own = if resuming && dir.join("run.json").is_file() { Some(checkpoint::read_info(&dir)?) } else { None };
    let resolved = match (&own, &args.what) {
        (Some(info), _) => layers_of_run(&dir, info, args)?,
        (None, Some(what)) => layers(what, &args.sets())?,
        (None, None) => {
            let d = dir.display();
            return Err(Error::Usage(format!("train what? {d} holds no run yet; name a preset or a TOML file, as in `tidegate train quickstart`")));
        }
    }
    .resolve()?;
    let changes = own.map_or(Ok(vec![]), |info| resolved.changes(&info.config))?;
    let chooses_data = args.set.iter().any(|s| s.trim_start().starts_with("data.path"));
    Ok(Plan { resolved, dir, changes, from, resuming, chooses_data })
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut plan = plan(args)?;
    if args.print_config {
        let config = &plan.resolved.config;
        return out(&format!("# {}\n\n{}", size(config), plan.resolved.to_toml().trim_end()));
    }
    if args.dry_run {
        return out(&dry_run::report(&plan.resolved.config));
    }
    let corpus = Corpus::of_run(&plan.resolved.config)?;
    if !corpus.is_bytes() {
        plan.resolved.config.data.eot = corpus.end();
    }
    if args.profile {
        engine::profile::start();
    }
    let place = args.place.open(plan.resolved.config.train.dtype)?;
    plan.resolved.config.train.dtype = Some(if place.compute == DType::BF16 { Precision::BF16 } else { Precision::F32 });
    go(&plan, &corpus, &place, !args.no_replay)?;
    if args.profile {
        out(engine::profile::stop().to_string().trim_end())?;
    }
    Ok(())
}

/// How large a model is, and what a token costs in training.
fn size(config: &RunConfig) -> String {
    let ((total, active), t) = (config.model.parameters(), config.data.seq_len);
    let mega = config.model.flops_per_token(t) / 1e6;
    format!("{total} parameters, {active} of them active for a token; {mega:.1} MFLOP a token, forward and backward, at {t} tokens a window")
}

/// Everything that can be wrong is found before the run folder is touched.
fn go(plan: &Plan, corpus: &Corpus, place: &nn::Placement, replays: bool) -> Result<()> {
    let (config, dir) = (&plan.resolved.config, plan.dir.display());
    if let Some(c) = plan.changes.iter().find(|c| c.key.starts_with("model.") && !POSITIONS.iter().any(|p| c.key.starts_with(p))) {
        return Err(Error::Usage(format!("{c}: a run keeps its model; begin another in a folder of its own by --run-dir, without --resume")));
    }
    let elsewhere = Some(config.train.from.as_path()).filter(|p| !p.as_os_str().is_empty());
    if let Some(path) = elsewhere.filter(|_| !plan.resuming) {
        let dir = checkpoint::candidates(path)?.remove(0);
        [dir.as_path(), &run_of(&dir)].into_iter().try_for_each(|holder| same_tokens(holder, corpus))?;
    }
    let (vocab, least) = (config.model.vocab_size, corpus.vocab_size());
    if vocab < least {
        let why = if corpus.is_bytes() { "text is bytes".into() } else { format!("{} has as many tokens", corpus.path().display()) };
        return Err(Error::Usage(format!(
            "model.vocab_size: expected at least {least}, as {why}, found {vocab}; add --set model.vocab_size={least}"
        )));
    }
    if plan.resuming {
        same_tokens(&plan.dir, corpus)?;
    }
    Source::new(corpus, config)?;
    let mut model = Hybrid::create(&config.model, config.seed, place)?.replays(replays);
    if let Some(path) = elsewhere.filter(|_| !plan.resuming) {
        model.begin_from(path)?;
    }
    let frozen = groups::frozen(&model.net().params(), &config.optim.freeze)?;
    let run = RunDir::open(&plan.dir, plan.resuming)?;
    let from = restore(plan, &mut model, corpus)?;
    if let Some(path) = elsewhere.filter(|_| plan.resuming && from.is_none()) {
        model.begin_from(path)?;
    }
    let command: Vec<String> = std::env::args().collect();
    if let Some(Codec::Tokenizer(t)) = corpus.codec() {
        checkpoint::write(&plan.dir.join(tokenizer::FILE), t.json())?;
    }
    run.write_config(&plan.resolved, &command, &model.net().config_json()?)?;

    let (n, unit) = (corpus.len(), if corpus.is_bytes() { "bytes" } else { "tokens" });
    say(&format!("{}: {}", config.name, size(config)));
    let (path, last) = (corpus.path().display(), corpus.split(config.data.held_out).1.len());
    let last = if last > 0 { format!("the last {last} held out") } else { "nothing held out".into() };
    let share = config.tasks.share;
    let tasks: Vec<String> = config.tasks.weights().iter().map(|w| w.0.to_string()).collect();
    let mut data: Vec<String> = if corpus.is_empty() { vec![] } else { vec![format!("data {path}: {n} {unit}, {last}")] };
    data.extend((share > 0.0).then(|| format!("tasks in {:.0}% of the windows: {}", 100.0 * share, tasks.join(", "))));
    say(&format!("{}; run folder {dir}", data.join("; ")));
    if frozen[0] > 0 {
        say(&format!("frozen: {} tensors of {} parameters", frozen[0], frozen[1]));
    }
    composed::note(config, place)?.into_iter().chain(composed::idle_window(config)).for_each(|note| say(&note));
    for c in &plan.changes {
        let order = if ORDER.contains(&c.key.as_str()) { " (from here on the text comes in another order)" } else { "" };
        say(&format!("changed  {c}{order}"));
    }
    if from.is_some() && config.train.minutes.is_some() {
        say("the budget is in minutes and the learning rate follows the clock: this run will not equal an uninterrupted one bit for bit");
    }
    let done = trainer::train(&mut model, corpus, config, &run, from)?;
    let (s, per_s) = (done.state, done.state.tokens as f64 / done.state.seconds.max(1e-9));
    let giga = per_s * config.model.flops_per_token(config.data.seq_len) / 1e9;
    let rate = format!("{per_s:.0} tokens/s ({giga:.0} GFLOP/s)");
    out(&format!("trained {} steps, {} tokens, {:.1} s, {rate}: {dir}", s.step, s.tokens, s.seconds))?;
    if !done.tasks.is_empty() {
        let (bits, labels) = held_out::bits(&done.tasks).unwrap_or_default();
        out(&format!("held-out tasks: {}; {bits:.4} bits per label over {labels} labels", held_out::said(&done.tasks)))?;
    }
    if let Some(bits) = done.held_out.filter(|_| share < 1.0) {
        out(&result_line("held out", corpus, corpus.split(config.data.held_out).1, bits, done.scored))?;
    }
    if corpus.codec().is_some() {
        // as this program was called, so that the line can be typed where it was built and not installed, too
        let me = command.first().map_or("tidegate", String::as_str);
        let prompt = if config.sample.prompt.is_empty() { String::new() } else { format!(" --prompt {}", quoted(&config.sample.prompt)) };
        out(&format!("write with it: {} generate {}{prompt}", quoted(me), quoted(&plan.dir.display().to_string())))?;
    }
    Ok(())
}

/// Loads the checkpoint to go on from, the newest that is whole, if this run goes on and there is any.
fn restore(plan: &Plan, model: &mut Trained<Hybrid>, corpus: &Corpus) -> Result<Option<State>> {
    let found = match &plan.from {
        Some(from) => from.clone(),
        None if plan.resuming => checkpoint::checkpoints(&plan.dir)?.into_iter().rev().map(|c| c.1).collect(),
        None => return Ok(None),
    };
    if found.is_empty() {
        say("no checkpoint yet: beginning at the beginning");
        return Ok(None);
    }
    let (path, state) = checkpoint::first_whole(&found, skip, |c| trainer::load(model, c))?;
    say(&format!("resuming {}", path.display()));
    let now = corpus.fingerprint();
    match state.corpus {
        Some(then) if then != now && !plan.chooses_data => {
            let (p, then, now) = (corpus.path().display(), then.tokens, now.tokens);
            Err(Error::data(
                corpus.path(),
                format!(
                    "is not what this run was trained on ({then} tokens then, {now} now); put that text back, or, to go on with this, add --set data.path={p}"
                ),
            ))
        }
        _ => Ok(Some(state)),
    }
}
