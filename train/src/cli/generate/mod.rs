//! `tidegate generate`: text from one prompt, from many side by side, or in conversation.

pub(super) mod prompts;
mod talk;
mod write;

use super::{codec_of, open, whole};
use crate::config::MOST_TOKENS;
use crate::trainer::{Learner, Sampling};
use crate::{Error, Result};
use nn::State;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use write::Writer;

const EXAMPLES: &str = "\
Examples:
  tidegate generate runs/quickstart --prompt \"The whale \"
  tidegate generate runs/quickstart --prompts prompts.txt --stop \"\\n\" --json
  tidegate generate Qwen3-0.6B --chat                       reads what you say from the terminal
  tidegate generate runs/quickstart --prompt-file book.txt --tokens 0 --save-state book.state
  tidegate generate runs/quickstart --load-state book.state --prompt \"And so \"";

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true, after_help = EXAMPLES)]
pub(super) struct Args {
    /// A run folder, or one checkpoint
    run: PathBuf,
    /// How the text begins; may be repeated for several texts [default: "The whale ", with --chat what you type, with --load-state nothing]
    #[arg(long)]
    prompt: Vec<String>,
    /// A file of prompts: one a line, or in a .jsonl file one a line as {"prompt": …}
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// A file that is one prompt, as it is
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompts"])]
    prompt_file: Option<PathBuf>,
    /// Go on from what --save-state kept, of the same model: prompts follow what was read then, and may be left out
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    load_state: Option<PathBuf>,
    /// Keep what the model remembers after the prompt, before it writes; for one prompt
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    save_state: Option<PathBuf>,
    /// How many texts to write from each prompt
    #[arg(long, default_value_t = 1, value_parser = |t: &str| whole(t, 1 << 20).and_then(|n| if n > 0 { Ok(n) } else { Err("expected at least 1".to_string()) }))]
    samples: u64,
    /// Talk: prompts go through the model's chat template
    #[arg(long)]
    chat: bool,
    /// With --chat, what the conversation begins with
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// How many tokens to write at most
    #[arg(long, default_value_t = 400, value_parser = |t: &str| whole(t, MOST_TOKENS as u64))]
    tokens: u64,
    /// Below 1 sharpens the distribution; 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw from this many likeliest tokens only (0: all)
    #[arg(long, default_value_t = 0, value_parser = |t: &str| whole(t, u32::MAX.into()))]
    top_k: u64,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draw: the same seed writes the same text
    #[arg(long, default_value_t = 0, value_parser = |t: &str| whole(t, u64::MAX))]
    seed: u64,
    /// End a text before this string; \n and \t are what they usually are; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// How many of several texts are written side by side
    #[arg(long, default_value_t = 16, value_parser = |t: &str| whole(t, 4096).and_then(|n| if n > 0 { Ok(n) } else { Err("expected at least 1".to_string()) }))]
    batch: u64,
    /// Write a line of JSON for each text: prompt, text, tokens, and what ended it (stop, end or length)
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: super::PlaceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let wrong = |m: String| Err(Error::Usage(m));
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return wrong(format!("--temperature: expected a number, not negative, found {}", args.temperature));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return wrong(format!("--top-p: expected a probability above 0, at most 1, found {}", args.top_p));
    }
    if args.prompt.iter().any(String::is_empty) {
        return wrong("--prompt: expected at least one byte of text to continue".into());
    }
    if args.stop.iter().any(String::is_empty) {
        return wrong("--stop: expected at least one byte of text".into());
    }
    if args.chat && args.json && args.prompt.is_empty() && args.prompts.is_none() && args.prompt_file.is_none() {
        return wrong(
            "--json writes a line for each text, and a conversation at the terminal is none; give --prompt or --prompts, or leave --json out".into(),
        );
    }
    let prompts = match (&args.prompts, &args.prompt_file) {
        (Some(file), _) => prompts::of_file(file)?,
        (_, Some(file)) => vec![std::fs::read_to_string(file).map_err(Error::io("reading", file))?],
        _ if args.load_state.is_some() && args.prompt.is_empty() => vec![String::new()],
        _ if args.prompt.is_empty() && !args.chat => vec!["The whale ".into()],
        _ => args.prompt.clone(),
    };
    if let Some(path) = &args.save_state {
        if prompts.len() != 1 {
            return wrong(format!("--save-state keeps what was read of one prompt, found {}", prompts.len()));
        }
        check_place(path)?;
    }
    let prompts: Vec<&str> = prompts.iter().flat_map(|p| std::iter::repeat_n(p.as_str(), args.samples as usize)).collect();
    let (path, model) = open(&args.run, &args.place)?;
    let codec = codec_of(&path, model.vocab_size())?;
    let template = if args.chat { Some(prompts::template_of(&path)?) } else { None };
    let (tokens, top_k) = (args.tokens as usize, args.top_k as usize);
    let how = Sampling { tokens, temperature: args.temperature, top_k, top_p: args.top_p, seed: args.seed };
    let stops = args.stop.iter().map(|s| s.replace("\\n", "\n").replace("\\t", "\t")).collect();
    let from = args.load_state.as_ref().map(|file| State::load(file, model.net().model())).transpose()?;
    let (ends, keep) = (prompts::ends(&path, &codec)?, Cell::new(args.save_state.as_deref()));
    let writer = Writer { model: model.net(), codec: &codec, ends, stops, how, from, keep, warned: Cell::new(false) };
    let done = match (&template, prompts.len()) {
        (Some(template), 0) => talk::talk(&writer, template, args.system.as_deref()),
        (None, 1) if !args.json => write::stream(&writer, prompts[0]),
        _ => write::several(&writer, &prompts, args, template.as_ref()),
    };
    done.map_err(|e| match e {
        Error::NonFinite(m) => Error::NonFinite(format!("{}: {m}: its training has diverged; use an older checkpoint", path.display())),
        e => e,
    })
}

/// Refuses a place that can't be written to before anything is read.
fn check_place(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let why = if path.is_dir() { "is a folder; name a file in it" } else { "its folder does not exist" };
    if path.is_dir() || !folder.is_dir() { Err(Error::Usage(format!("--save-state {}: {why}", path.display()))) } else { Ok(()) }
}
