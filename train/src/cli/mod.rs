//! The command line: `tidegate train | generate | eval | doctor`.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed at run time, 2 wrong usage.

mod doctor;
mod train;

use crate::config::{MOST_TOKENS, RunConfig};
use crate::data::Corpus;
use crate::learner::{Hybrid, Trained};
use crate::progress::say;
use crate::trainer::{Learner, Sampling, evaluate};
use crate::{Error, Result, checkpoint, presets};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Hybrid mixture-of-experts language models with gated attention and gated delta rules, trained from scratch.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model: from a preset, or from a TOML file
    Train(train::Args),
    /// Continue a text with a trained model
    Generate(Generate),
    /// Score held-out text in bits per byte
    Eval(Eval),
    /// Show the machine, and test every operation on it
    Doctor,
}

#[derive(Debug, clap::Args)]
struct Generate {
    /// A run folder, or one checkpoint
    run: PathBuf,
    /// How the text begins
    #[arg(long, default_value = "The whale ")]
    prompt: String,
    /// How many tokens to write
    #[arg(long, default_value_t = 400)]
    tokens: usize,
    /// Below 1 sharpens the distribution; 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw from this many likeliest tokens only (0: all)
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draw: the same seed writes the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
struct Eval {
    /// A run folder, or one checkpoint
    run: PathBuf,
    /// Score all of this file or folder, instead of the held-out part of the run's own data
    #[arg(long)]
    data: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    let done = match cli.command {
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate(&args),
        Command::Eval(args) => eval(&args),
        Command::Doctor => doctor::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// A line of results. A reader that has seen enough is no error; a full disk is.
fn out(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Output(e)),
        _ => Ok(()),
    }
}

/// The run folder that a path means: itself, or the one a checkpoint lies in, wherever the path is relative to.
fn run_of(path: &Path) -> PathBuf {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let above = whole.parent().filter(|p| p.file_name().is_some_and(|n| n == "checkpoints")).and_then(Path::parent);
    match above {
        Some(run) if whole.join(checkpoint::MODEL).is_file() => run.to_path_buf(),
        _ => path.to_path_buf(),
    }
}

/// What can't be read is passed over in favour of what was written before it, and named.
fn skip(path: &Path, e: &Error) {
    say(&format!("skipped {}: {e}", path.display()));
}

/// The newest whole checkpoint that `path` means, and where it is.
fn open(path: &Path) -> Result<(PathBuf, Trained<Hybrid>)> {
    checkpoint::first_whole(&checkpoint::candidates(path)?, skip, Hybrid::open)
}

fn generate(args: &Generate) -> Result<()> {
    let wrong = |m: String| Err(Error::Usage(m));
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return wrong(format!("--temperature: expected a number, not negative, found {}", args.temperature));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return wrong(format!("--top-p: expected a probability above 0, at most 1, found {}", args.top_p));
    }
    if args.prompt.is_empty() {
        return wrong("--prompt: expected at least one byte of text to continue".into());
    }
    if args.tokens > MOST_TOKENS {
        return wrong(format!("--tokens: expected at most {MOST_TOKENS}, found {}", args.tokens));
    }
    let (path, mut model) = open(&args.run)?;
    let vocab = model.vocab_size();
    // Where no state says what it was trained on, the size of a vocabulary of bytes tells.
    let trained_on = checkpoint::read_state(&path).ok().and_then(|s| s.corpus);
    if vocab < 256 || !trained_on.map_or(vocab == 256, |c| c.bytes) {
        let p = path.display();
        return wrong(format!(
            "{p}: its {vocab} tokens are not the 256 bytes of text, and tidegate has no tokenizer to write them with; `eval` scores it"
        ));
    }
    let prompt: Vec<u32> = args.prompt.bytes().map(u32::from).collect();
    let how = Sampling { tokens: args.tokens, temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    // The prompt and what follows are decoded as one, since a character may straddle the two.
    let mut all = prompt.clone();
    all.extend(model.sample(&prompt, &how)?);
    out(&crate::trainer::text(&all))
}

fn eval(args: &Eval) -> Result<()> {
    let (path, mut model) = open(&args.run)?;
    let config: RunConfig = match checkpoint::read_info(&run_of(&path)) {
        Ok(info) => info.config,
        // A checkpoint from elsewhere: only the windows' size is missing.
        Err(_) if args.data.is_some() => presets::quickstart(),
        Err(e) => return Err(e),
    };
    let corpus = Corpus::open(args.data.as_deref().unwrap_or(&config.data.path), config.data.eot)?;
    let range = if args.data.is_some() { 0..corpus.len() } else { corpus.split(config.data.held_out).1 };
    let Some((bits, count)) = evaluate(&mut model, &corpus, range, &config, 0)? else {
        return Err(Error::Usage("nothing was held out in this run; name a text with --data".into()));
    };
    out(&result_line(&corpus, bits, count))
}

/// The line a run or an evaluation ends with.
fn result_line(corpus: &Corpus, bits: f64, count: usize) -> String {
    let unit = if corpus.is_bytes() { ("bits per byte", "bytes") } else { ("bits per token", "tokens") };
    // Measured over the whole file with the compressors' highest levels.
    let yardstick = if corpus.is_moby_dick() { " (compressors on the whole text: gzip -9 3.23, bzip2 -9 2.47, xz -9e 2.65)" } else { "" };
    format!("held out: {bits:.4} {} over {count} {}{yardstick}", unit.0, unit.1)
}
