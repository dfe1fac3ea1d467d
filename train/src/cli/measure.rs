//! `tidegate measure`: what a checkpoint's attention, gates, activations and states look like, in numbers.

use super::device::PlaceArgs;
use super::{codec_of, open, out, place_for, put, run_of, same_tokens};
use crate::data::Corpus;
use crate::measure::{FILE, Options, check_names, measure};
use crate::progress::say;
use crate::tasks::Source;
use crate::{Error, Result, checkpoint};
use std::path::PathBuf;

/// Tokens in a window for a model that no run folder says the training length of.
const SEQ_LEN: usize = 1024;

const NOTES: &str = "\
The measures are attention (first-token share, sinks, entropy), activations (massive ones, and spikes before attention), gates, sdpa_output (before and after the
gate), delta (half-lives, \u{3b2}, the state's norm and rank), value_output_rank, router, logit_lens, loss_by_position, and trace (gates along a text).
docs/measures.md says what each is, by which formula and paper, and where it is in the file.

Examples:
  tidegate measure runs/quickstart
  tidegate measure checkpoint/ --data text.txt --seq-len 2048 --only attention,gates --out measures.json";

#[derive(Debug, clap::Args)]
#[command(after_help = NOTES)]
pub(super) struct Args {
    /// A run folder, or one checkpoint, transformers' too
    model: PathBuf,
    /// Measure on this file or folder, instead of the held-out part of the run's own data
    #[arg(long, value_name = "TEXT")]
    data: Option<PathBuf>,
    /// Tokens that each pass over the text reads, at most, but for one window
    #[arg(long, value_name = "N", default_value_t = 1 << 15)]
    tokens: usize,
    /// Tokens in a window [default: as the run was trained, else 1024]
    #[arg(long, value_name = "T")]
    seq_len: Option<usize>,
    /// Tokens of the windows that the loss by position is taken in [default: 8 times the window, as far as the text reaches]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Take only these measures, and the loss; more than one with commas [default: all that the model has something of]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// The text to follow gates along, token by token [default: the first 200 tokens of what is measured on]
    #[arg(long, value_name = "TEXT")]
    trace_text: Option<String>,
    /// Where to write [default: measures.json in a run folder that was named, else here]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    place: PlaceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    check_names(&args.only)?;
    if args.tokens == 0 {
        return Err(Error::Usage("--tokens 0: expected at least one window's".into()));
    }
    if args.trace_text.is_some() && !args.only.is_empty() && !args.only.iter().any(|n| n == "trace") {
        return Err(Error::Usage("--trace-text is given, and `trace` is not among --only's".into()));
    }
    let run = run_of(&args.model);
    let info = checkpoint::read_info(&run);
    let to = match &args.out {
        Some(to) => place_for(to)?,
        // a run folder's are of its newest checkpoint
        None if info.is_ok() && run == args.model => run.join(FILE),
        None => FILE.into(),
    };
    let (path, opened) = open(&args.model, &args.place)?;
    let model = opened.net().model();
    let config = match (info, &args.data) {
        (Ok(info), _) => Some(info.config),
        (Err(_), Some(_)) => None,
        (Err(e), None) => return Err(Error::Usage(format!("{e}; name a text to measure on with --data"))),
    };
    let eot = config.as_ref().and_then(|c| c.data.eot);
    let data = args.data.clone().or_else(|| config.as_ref().map(|c| c.data.path.clone())).unwrap_or_default();
    // where nothing but tasks was trained on, they are what there is to look at
    let alone = config.as_ref().filter(|c| args.data.is_none() && c.tasks.alone());
    let corpus = match alone {
        Some(c) => Source::new(&Corpus::of_run(c)?, c)?.tokens()?,
        None => Corpus::open(&data, eot)?,
    };
    same_tokens(&run_of(&path), &corpus)?;
    let codec = codec_of(&path, model.config().vocab_size);
    // text is read byte by byte, which is nonsense to a model of other tokens; shards may well be of the right ones, of whatever text
    let codec = if corpus.is_bytes() { Some(codec?) } else { corpus.codec().cloned().or(codec.ok()) };
    let trained_on = checkpoint::read_state(&path).ok();
    if args.data.is_none() && alone.is_none() && trained_on.is_some_and(|s| s.corpus.is_some_and(|then| then != corpus.fingerprint())) {
        say(&format!("{} has changed since this run was trained on it: its last part may not be the one that was held out", data.display()));
    }
    let range = match &config {
        Some(c) if args.data.is_none() && alone.is_none() => corpus.split(c.data.held_out).1,
        _ => 0..corpus.len(),
    };
    if range.is_empty() {
        return Err(Error::Usage("nothing was held out in this run; name a text with --data".into()));
    }
    let options = Options {
        context: args.context,
        tokens: args.tokens,
        seq_len: args.seq_len.or_else(|| config.as_ref().map(|c| c.data.seq_len)).unwrap_or(SEQ_LEN),
        only: args.only.clone(),
        trace_text: args.trace_text.clone(),
        codec,
    };
    let mut m = measure(model, &corpus, range, &options).map_err(|e| hint(e, &options, args))?;
    m.checkpoint = path.display().to_string();
    m.step = trained_on.map(|s| s.step);
    m.write(&to)?;
    let step = m.step.map(|s| format!(", step {s}")).unwrap_or_default();
    put(&format!("{}{step}\n{}\n", m.checkpoint, m.table()))?;
    out(&to.display().to_string())
}

/// What to do about a text that is too short.
fn hint(e: Error, options: &Options, args: &Args) -> Error {
    match e {
        Error::Data { path, message } if message.contains("too short") => {
            let more = if args.data.is_none() { " (--data)" } else { "" };
            Error::Data { path, message: format!("{message}: --seq-len is {}{more}", options.seq_len) }
        }
        e => e,
    }
}

#[cfg(test)]
mod tests {
    use crate::measure::NAMES;

    #[test]
    fn the_help_names_all_measures() {
        for name in NAMES {
            assert!(super::NOTES.contains(name), "{name}");
        }
    }
}
