//! The command line: `tidegate train | generate | eval | measure | convert | trace | report | tokenize | bench | doctor`.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed at run time, 2 wrong usage.

mod bench;
mod convert;
mod device;
mod doctor;
mod dry_run;
mod eval;
mod generate;
mod measure;
mod meter;
mod report;
mod study;
mod tokenize;
mod trace;
mod train;

use crate::data::Corpus;
use crate::learner::{Hybrid, Trained};
use crate::progress::say;
use crate::text::Codec;
use crate::text::tokenizer::{self, Tokenizer};
use crate::{Error, Result, checkpoint};
use clap::{Parser, Subcommand};
use device::PlaceArgs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

const EXAMPLES: &str = "\
Examples:
  tidegate train quickstart                          five minutes on Moby-Dick
  tidegate generate runs/quickstart --prompt \"The whale \"
  tidegate eval runs/quickstart

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// Hybrid mixture-of-experts language models with gated attention and gated delta rules, trained from scratch.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model: from a preset, or from a TOML file
    Train(train::Args),
    /// Continue texts with a trained model, or talk with it
    Generate(generate::Args),
    /// Score held-out text in bits per byte, or answer tasks: needles, recall, copying
    Eval(eval::Args),
    /// Measure a model's attention sinks, gates, activations, states and routers
    Measure(measure::Args),
    /// Write a model as a folder for transformers: in f32, bf16 or f16, in one file or several
    Convert(convert::Args),
    /// Write what a model computes on the way to a file: hidden states, gates, gradients
    Trace(trace::Args),
    /// Train variants of a configuration with several seeds, measure and compare them
    Study(study::Args),
    /// Write a page about a run, several runs, or a study: curves, tables, attention, gates, activations
    Report(report::Args),
    /// Train tokenizers, and turn text into tokens
    Tokenize(tokenize::Args),
    /// Time operations and training steps
    Bench(bench::Args),
    /// Show the machine, and test every operation on it
    Doctor(doctor::Args),
}

/// A number of at least 0 and at most `most`.
fn whole(text: &str, most: u64) -> std::result::Result<u64, String> {
    text.parse().ok().filter(|n| *n <= most).ok_or_else(|| format!("expected a whole number, at least 0, at most {most}"))
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
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Study(args) => study::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// Part of a line of results. False when the reader has seen enough, which is no error; a full disk is.
fn put(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::Output(e)),
        Ok(()) => Ok(true),
    }
}
/// A line of results.
fn out(text: &str) -> Result<()> {
    put(&format!("{text}\n")).map(drop)
}

/// A word as a shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_string() } else { format!("'{}'", word.replace('\'', r"'\''")) }
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
fn open(path: &Path, place: &PlaceArgs) -> Result<(PathBuf, Trained<Hybrid>)> {
    let trained_in = checkpoint::read_info(&run_of(path)).ok().and_then(|info| info.config.train.dtype);
    let place = place.open(trained_in)?.to_read();
    checkpoint::first_whole(&checkpoint::candidates(path)?, skip, |dir| {
        checkpoint::verify(dir, &[checkpoint::MODEL])?;
        Hybrid::open(dir, &place)
    })
}

/// How a checkpoint's tokens are text: by the tokenizer that it or its run keeps, else as bytes.
fn codec_of(checkpoint: &Path, vocab: usize) -> Result<Codec> {
    for dir in [checkpoint, &run_of(checkpoint)] {
        let path = dir.join(tokenizer::FILE);
        if !path.is_file() {
            continue;
        }
        let tokenizer = Tokenizer::open(&path)?;
        if tokenizer.vocab_size() > vocab {
            let n = tokenizer.vocab_size();
            return Err(Error::data(&path, format!("its {n} tokens are more than the {vocab} of the model: it is another model's")));
        }
        return Ok(Codec::Tokenizer(Arc::new(tokenizer)));
    }
    // Where no state says what it was trained on, the size of a vocabulary of bytes tells.
    let trained_on = checkpoint::read_state(checkpoint).ok().and_then(|s| s.corpus);
    if vocab < 256 || !trained_on.map_or(vocab == 256, |c| c.bytes) {
        let p = checkpoint.display();
        return Err(Error::Usage(format!(
            "{p}: its {vocab} tokens are not the 256 bytes of text, and there is no tokenizer to write them with; put its {} there (`eval` scores it without)",
            tokenizer::FILE
        )));
    }
    Ok(Codec::Bytes)
}

/// An error if a corpus's tokens are not those that a run was trained on.
fn same_tokens(run: &Path, corpus: &Corpus) -> Result<()> {
    let path = run.join(tokenizer::FILE);
    let own = std::fs::read(&path).ok();
    let (p, c) = (path.display(), corpus.path().display());
    match (own, corpus.codec()) {
        (Some(own), Some(Codec::Tokenizer(t))) if own != t.json() => {
            Err(Error::Usage(format!("the tokens of {c} are not by the model's tokenizer {p}; encode the text with that one")))
        }
        (Some(_), Some(Codec::Bytes)) => Err(Error::Usage(format!(
            "{c} is text, and the model was trained on tokens; encode it by `tidegate tokenize encode {} --tokenizer {} --out DIR`",
            quoted(&c.to_string()),
            quoted(&p.to_string())
        ))),
        (None, Some(Codec::Tokenizer(_))) if run.join("run.json").is_file() => {
            Err(Error::Usage(format!("{c} is tokens, and this run keeps no tokenizer; if those are its tokens, put their tokenizer.json there: {p}")))
        }
        _ => Ok(()),
    }
}

/// Refuses a place that can't be written to before anything is computed.
fn place_for(to: &Path) -> Result<PathBuf> {
    let folder = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let why = match to.file_name() {
        _ if to.is_dir() => "is a folder; name a file in it",
        None => "names no file",
        _ if !folder.is_dir() => "its folder does not exist",
        _ => return Ok(to.to_path_buf()),
    };
    Err(Error::Usage(format!("--out {}: {why}", to.display())))
}

/// The line a run or an evaluation of `count` tokens at the end of `range` ends with.
fn result_line(what: &str, corpus: &Corpus, range: Range<usize>, bits: f64, count: usize) -> String {
    // the first token of a corpus isn't scored
    if let Some(bytes) = corpus.text_bytes(range.end - count..range.end).filter(|&b| b > 0 && !corpus.is_bytes()) {
        let per_byte = bits * count as f64 / bytes as f64;
        return format!("{what}: {bits:.4} bits per token, {per_byte:.4} bits per byte over {count} tokens of {bytes} bytes");
    }
    let unit = if corpus.is_bytes() { ("bits per byte", "bytes") } else { ("bits per token", "tokens") };
    // Measured over the whole file with the compressors' highest levels.
    let yardstick = if corpus.is_moby_dick() { " (compressors on the whole text: gzip -9 3.23, bzip2 -9 2.47, xz -9e 2.65)" } else { "" };
    format!("{what}: {bits:.4} {} over {count} {}{yardstick}", unit.0, unit.1)
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_for_a_shell() {
        for (word, expected) in [("runs/a-1", "runs/a-1"), ("The whale ", "'The whale '"), ("", "''"), ("it's $x\n", "'it'\\''s $x\n'"), ("é", "é")]
        {
            assert_eq!(quoted(word), expected);
        }
    }
}
