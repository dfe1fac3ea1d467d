//! `tidegate generate`: text from one prompt, from many side by side, or in conversation.

use super::{codec_of, open, out, put, run_of, whole};
use crate::config::MOST_TOKENS;
use crate::learner::{Hybrid, go_on};
use crate::progress::say;
use crate::text::chat::{Message, Template};
use crate::text::stops::Stops;
use crate::text::{Codec, Decoder, harmless};
use crate::trainer::{Learner, Sampling};
use crate::{Error, Result, checkpoint};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  tidegate generate runs/quickstart --prompt \"The whale \"
  tidegate generate runs/quickstart --prompts prompts.txt --stop \"\\n\" --json
  tidegate generate Qwen3-0.6B --chat                       reads what you say from the terminal";

#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true, after_help = EXAMPLES)]
pub(super) struct Args {
    /// A run folder, or one checkpoint
    run: PathBuf,
    /// How the text begins; may be repeated for several texts [default: "The whale ", or with --chat what you type]
    #[arg(long)]
    prompt: Vec<String>,
    /// A file of prompts: one a line, or in a .jsonl file one a line as {"prompt": …}
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
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

/// What text is made with.
struct Writer<'a> {
    model: &'a Hybrid,
    codec: &'a Codec,
    /// Tokens that end a text.
    ends: Vec<u32>,
    stops: Vec<String>,
    how: Sampling,
}

/// A text as it comes.
struct Text {
    decoder: Decoder,
    stops: Stops,
    tokens: usize,
    text: String,
    ended: &'static str,
}

impl Text {
    /// After a prompt, since a character may straddle the two; and the prompt as it reads.
    fn after(w: &Writer, prompt: &[u32]) -> (Text, String) {
        let mut decoder = w.codec.decoder();
        let reads = prompt.iter().map(|&t| decoder.push(t)).collect();
        (Text { decoder, stops: Stops::new(&w.stops), tokens: 0, text: String::new(), ended: "length" }, reads)
    }
    /// What a token adds for certain, and whether the text goes on.
    fn push(&mut self, w: &Writer, token: u32) -> (String, bool) {
        if w.ends.contains(&token) {
            self.ended = "end";
            return (String::new(), false);
        }
        self.tokens += 1;
        let piece = self.decoder.push(token);
        let more = self.stops.push(&piece);
        self.text += &more;
        if self.stops.found() {
            self.ended = "stop";
        }
        (more, !self.stops.found())
    }
    /// What was held back.
    fn finish(&mut self) -> String {
        let mut more = String::new();
        if !self.stops.found() {
            let piece = self.decoder.finish();
            more = self.stops.push(&piece) + &self.stops.finish();
        }
        self.text += &more;
        more
    }
}

/// A bar for prompts that take their time, on a terminal.
fn bar(tokens: usize) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() && tokens > nn::CHUNK { ProgressBar::new(tokens as u64) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("reading {percent:>3}% [{bar:16}] {pos} of {len} tokens  {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn show(text: &str) -> Result<bool> {
    if std::io::stdout().is_terminal() { put(&harmless(text)) } else { put(text) }
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
    let prompts = match &args.prompts {
        Some(file) => read_prompts(file)?,
        None if args.prompt.is_empty() && !args.chat => vec!["The whale ".into()],
        None => args.prompt.clone(),
    };
    let (path, model) = open(&args.run, &args.place)?;
    let codec = codec_of(&path, model.vocab_size())?;
    let template = if args.chat { Some(template_of(&path)?) } else { None };
    let (tokens, top_k) = (args.tokens as usize, args.top_k as usize);
    let how = Sampling { tokens, temperature: args.temperature, top_k, top_p: args.top_p, seed: args.seed };
    let stops = args.stop.iter().map(|s| s.replace("\\n", "\n").replace("\\t", "\t")).collect();
    let writer = Writer { model: model.net(), codec: &codec, ends: ends(&path, &codec)?, stops, how };
    let done = match (&template, prompts.len()) {
        (Some(template), 0) => talk(&writer, template, args.system.as_deref()),
        (None, 1) if !args.json => stream(&writer, &prompts[0]),
        _ => several(&writer, &prompts, args, template.as_ref()),
    };
    done.map_err(|e| match e {
        Error::NonFinite(m) => Error::NonFinite(format!("{}: {m}: its training has diverged; use an older checkpoint", path.display())),
        e => e,
    })
}

/// The prompts of a file, one a line.
fn read_prompts(file: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).map_err(Error::io("reading", file))?;
    let jsonl = file.extension().is_some_and(|e| e == "jsonl");
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(i, line)| {
        if !jsonl {
            return Ok(line.to_string());
        }
        let value: Value = serde_json::from_str(line).map_err(|e| Error::data(file, format!("line {}: is no JSON: {e}", i + 1)))?;
        let prompt = value.as_str().or(value["prompt"].as_str()).filter(|p| !p.is_empty());
        let wrong = || Error::data(file, format!("line {}: expected {{\"prompt\": \"some text\"}}, found {line}", i + 1));
        prompt.map(String::from).ok_or_else(wrong)
    });
    let prompts = prompts.collect::<Result<Vec<String>>>()?;
    if prompts.is_empty() {
        return Err(Error::data(file, "holds no prompt: expected one a line"));
    }
    Ok(prompts)
}

/// The chat template that a checkpoint or its run carries.
fn template_of(path: &Path) -> Result<Template> {
    let found = Template::open(path);
    let run = run_of(path);
    if matches!(found, Err(Error::Usage(_))) && run != path { Template::open(&run).or(found) } else { found }
}

/// What ends a text: what the folder says, else the end of text that its run or its tokenizer names. No byte of a text is one.
pub(super) fn ends(path: &Path, codec: &Codec) -> Result<Vec<u32>> {
    let Codec::Tokenizer(t) = codec else { return Ok(vec![]) };
    for name in ["generation_config.json", "config.json"] {
        let file = path.join(name);
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::data(&file, format!("is no JSON: {e}")))?;
        let ids = match &value["eos_token_id"] {
            Value::Null => continue,
            Value::Array(all) => all.clone(),
            one => vec![one.clone()],
        };
        let ids: Option<Vec<u32>> = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect();
        return ids.ok_or_else(|| Error::data(&file, format!("`eos_token_id` must be a token or a list of them, found {}", value["eos_token_id"])));
    }
    let own = checkpoint::read_info(&run_of(path)).ok().and_then(|info| info.config.data.eot);
    Ok(own.or(t.end()).into_iter().collect())
}

/// A prompt's tokens, of which there must be one.
fn encode(w: &Writer, text: &str) -> Result<Vec<u32>> {
    let tokens = w.codec.encode(text)?;
    if tokens.is_empty() { Err(Error::Usage(format!("--prompt: the tokenizer makes no token of {text:?}"))) } else { Ok(tokens) }
}

/// How fast it went, for a person who watches.
fn pace(read: usize, first: f64, written: usize, all: f64) {
    if std::io::stderr().is_terminal() {
        let rate = |n: usize, s: f64| n as f64 / s.max(1e-9);
        say(&format!("read {read} tokens at {:.0} a second, wrote {written} at {:.1} a second", rate(read, first), rate(written, all - first)));
    }
}

/// One text, as it comes.
fn stream(w: &Writer, prompt: &str) -> Result<()> {
    let prompt = encode(w, prompt)?;
    let (mut text, reads) = Text::after(w, &prompt);
    if !show(&reads)? {
        return Ok(());
    }
    let (start, bar, mut first) = (Instant::now(), bar(prompt.len()), None);
    let read = |n| if n < prompt.len() { bar.set_position(n as u64) } else { bar.finish_and_clear() };
    let done = w.model.write(std::slice::from_ref(&prompt), &w.how, read, |_, token| {
        first.get_or_insert_with(|| start.elapsed());
        let (more, on) = text.push(w, token);
        Ok(show(&more)? && on)
    });
    bar.finish_and_clear();
    // what was written stays a whole line, whatever comes after it
    show(&(text.finish() + "\n"))?;
    done?;
    pace(prompt.len(), first.unwrap_or_default().as_secs_f64(), text.tokens, start.elapsed().as_secs_f64());
    Ok(())
}

/// Several texts side by side, each told when it is done.
fn several(w: &Writer, prompts: &[String], args: &Args, template: Option<&Template>) -> Result<()> {
    let batch = args.batch as usize;
    for (group, some) in prompts.chunks(batch).enumerate() {
        let said = |p: &String| match template {
            Some(t) => t.render(&conversation(args.system.as_deref(), p)).and_then(|text| encode(w, &text)),
            None => encode(w, p),
        };
        let ids = some.iter().map(said).collect::<Result<Vec<_>>>()?;
        let (mut texts, read): (Vec<Text>, Vec<String>) = ids.iter().map(|p| Text::after(w, p)).unzip();
        let total = ids.iter().map(Vec::len).sum();
        let bar = bar(total);
        // the same prompt again is another text
        let how = Sampling { seed: w.how.seed.wrapping_add((group * batch) as u64), ..w.how };
        let done = w.model.write(&ids, &how, |n| bar.set_position(n as u64), |i, token| Ok(texts[i].push(w, token).1));
        bar.finish_and_clear();
        done?;
        for (i, text) in texts.iter_mut().enumerate() {
            text.finish();
            let (n, prompt) = (group * batch + i, &some[i]);
            let line = if args.json {
                json!({ "index": n, "prompt": prompt, "text": text.text, "tokens": text.tokens, "ended": text.ended }).to_string()
            } else {
                let reads = if template.is_some() { "" } else { &read[i] };
                format!("=== {} of {}: {:?}\n{reads}{}", n + 1, prompts.len(), prompt, text.text)
            };
            if !show(&(line + "\n"))? {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn conversation(system: Option<&str>, first: &str) -> Vec<Message> {
    let mut all: Vec<Message> = system.map(|s| Message { role: "system", content: s.into() }).into_iter().collect();
    all.push(Message { role: "user", content: first.into() });
    all
}

/// A conversation with what comes from stdin, a line at a time.
fn talk(w: &Writer, template: &Template, system: Option<&str>) -> Result<()> {
    let asks = std::io::stdin().is_terminal();
    let mut messages: Vec<Message> = vec![];
    let mut context = nn::Generator::new(w.model.model());
    let mut read: Vec<u32> = vec![];
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if asks && !put("> ")? {
            return Ok(());
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(Error::io("reading", Path::new("stdin")))?;
        if line.trim().is_empty() {
            continue;
        }
        match messages.is_empty() {
            true => messages = conversation(system, &line),
            false => messages.push(Message { role: "user", content: line }),
        }
        let ids = encode(w, &template.render(&messages)?)?;
        // a template may leave out what was said before, such as thoughts; a state can't be taken back to there
        if !(ids.len() > read.len() && ids.starts_with(&read)) {
            context = nn::Generator::new(w.model.model());
            read.clear();
        }
        let (new, bar) = (&ids[read.len()..], bar(ids.len() - read.len()));
        let mut logits = vec![];
        for piece in new.chunks(nn::CHUNK) {
            logits = context.feed(piece)?;
            bar.inc(piece.len() as u64);
        }
        bar.finish_and_clear();
        let (mut text, _) = Text::after(w, &ids);
        let mut drawn = vec![];
        let done = go_on(&mut context, vec![logits], &w.how, |_, token| {
            drawn.push(token);
            let (more, on) = text.push(w, token);
            Ok(show(&more)? && on)
        });
        let goes_on = show(&(text.finish() + "\n"))?;
        done?;
        if !goes_on {
            return Ok(());
        }
        read = ids;
        read.extend(&drawn[..drawn.len().saturating_sub(1)]);
        messages.push(Message { role: "assistant", content: std::mem::take(&mut text.text) });
    }
    if asks { out("") } else { Ok(()) }
}
