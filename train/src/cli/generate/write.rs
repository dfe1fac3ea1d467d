//! Texts as they are written: one as it comes, or many side by side.

use super::super::put;
use super::Args;
use super::prompts::conversation;
use crate::learner::{Hybrid, go_on};
use crate::progress::say;
use crate::text::chat::Template;
use crate::text::stops::Stops;
use crate::text::{Codec, Decoder, harmless};
use crate::trainer::Sampling;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use nn::{Caches, Generator, LayerType, State};
use serde_json::json;
use std::cell::Cell;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

/// What text is made with.
pub(super) struct Writer<'a> {
    pub model: &'a Hybrid,
    pub codec: &'a Codec,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    pub stops: Vec<String>,
    pub how: Sampling,
    /// What was read before any prompt.
    pub from: Option<State>,
    /// Where what is remembered after the first prompt is kept.
    pub keep: Cell<Option<&'a Path>>,
    /// Whether it was said that a text is longer than the model is meant for.
    pub warned: Cell<bool>,
}

impl Writer<'_> {
    /// Reads prompts, each on top of what was read before, and keeps the first if that is wanted; what to go on with, and the logits after each.
    fn read(&self, prompts: &[Vec<u32>], bar: &ProgressBar) -> Result<(Generator<'_>, Vec<Vec<f64>>)> {
        let before = self.from.as_ref().map_or(0, |s| s.tokens.len());
        prompts.iter().for_each(|p| self.warn(before + p.len()));
        let read = self.model.read(prompts, self.from.as_ref(), |n| bar.set_position(n as u64));
        bar.finish_and_clear();
        let (mut contexts, mut logits) = read?;
        if let (Some(path), Some(prompt)) = (self.keep.take(), prompts.first()) {
            let tokens = self.from.iter().flat_map(|s| &s.tokens).chain(prompt).copied().collect();
            let state = State { tokens, logits: logits.swap_remove(0), caches: contexts.swap_remove(0) };
            state.save(path, self.model.model())?;
            say(&format!("kept what was read, {} tokens: {}", state.tokens.len(), path.display()));
            // the first is the only one, or all are alike
            logits.push(state.logits);
            contexts.push(state.caches);
        }
        Ok((Generator::on(self.model.model(), Caches::join(contexts)?), logits))
    }

    /// Says, once, if a text of `read` tokens and what is written becomes longer than the model is meant for. Nothing is cut.
    pub fn warn(&self, read: usize) {
        let c = self.model.model().config();
        let (all, most) = (read.saturating_add(self.how.tokens), c.max_position_embeddings);
        // a window never sees far, and a delta rule knows no positions
        let turned = c.rotary_dim() > 0 && (0..c.num_hidden_layers).any(|i| c.layer_type(i) == LayerType::FullAttention);
        if turned && all > most && !self.warned.replace(true) {
            say(&format!(
                "{read} tokens to read and up to {} to write are more than the {most} that the model is meant for (`max_position_embeddings`): nothing is cut, but \
                 attention may make little of positions that it never saw; docs/long-context.md says how to stretch them",
                self.how.tokens
            ));
        }
    }
}

/// A text as it comes.
pub(super) struct Text {
    decoder: Decoder,
    stops: Stops,
    pub tokens: usize,
    pub text: String,
    pub ended: &'static str,
}

impl Text {
    /// After a prompt, since a character may straddle the two, as it may the prompt and what was read before it; and the prompt as it reads.
    pub fn after(w: &Writer, prompt: &[u32]) -> (Text, String) {
        let mut decoder = w.codec.decoder();
        w.from.iter().flat_map(|s| &s.tokens).for_each(|&t| drop(decoder.push(t)));
        let reads = prompt.iter().map(|&t| decoder.push(t)).collect();
        (Text { decoder, stops: Stops::new(&w.stops), tokens: 0, text: String::new(), ended: "length" }, reads)
    }
    /// What a token adds for certain, and whether the text goes on.
    pub fn push(&mut self, w: &Writer, token: u32) -> (String, bool) {
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
    pub fn finish(&mut self) -> String {
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
pub(super) fn bar(tokens: usize) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() && tokens > nn::CHUNK { ProgressBar::new(tokens as u64) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("reading {percent:>3}% [{bar:16}] {pos} of {len} tokens  {eta} left") {
        bar.set_style(style);
    }
    bar
}

pub(super) fn show(text: &str) -> Result<bool> {
    if std::io::stdout().is_terminal() { put(&harmless(text)) } else { put(text) }
}

/// A prompt's tokens, of which there must be one if nothing was read before. What a template makes is whole; other texts get the tokens that the tokenizer puts
/// around one that stands alone, unless they follow what was read.
pub(super) fn encode(w: &Writer, text: &str, templated: bool) -> Result<Vec<u32>> {
    let tokens = if templated || w.from.is_some() { w.codec.encode(text)? } else { w.codec.encode_alone(text)? };
    if tokens.is_empty() && w.from.is_none() { Err(Error::Usage(format!("--prompt: the tokenizer makes no token of {text:?}"))) } else { Ok(tokens) }
}

/// How fast it went, for a person who watches.
pub(super) fn pace(read: usize, first: f64, written: usize, all: f64) {
    if std::io::stderr().is_terminal() {
        let rate = |n: usize, s: f64| n as f64 / s.max(1e-9);
        say(&format!("read {read} tokens at {:.0} a second, wrote {written} at {:.1} a second", rate(read, first), rate(written, all - first)));
    }
}

/// One text, as it comes.
pub(super) fn stream(w: &Writer, prompt: &str) -> Result<()> {
    let prompt = encode(w, prompt, false)?;
    let (mut text, reads) = Text::after(w, &prompt);
    if !show(&reads)? {
        return Ok(());
    }
    let (start, bar) = (Instant::now(), bar(prompt.len()));
    let (mut context, logits) = w.read(std::slice::from_ref(&prompt), &bar)?;
    let first = start.elapsed().as_secs_f64();
    let done = go_on(&mut context, logits, &w.how, |_, token| {
        let (more, on) = text.push(w, token);
        Ok(show(&more)? && on)
    });
    // what was written stays a whole line, whatever comes after it
    show(&(text.finish() + "\n"))?;
    done?;
    pace(prompt.len(), first, text.tokens, start.elapsed().as_secs_f64());
    Ok(())
}

/// Several texts side by side, each told when it is done.
pub(super) fn several(w: &Writer, prompts: &[&str], args: &Args, template: Option<&Template>) -> Result<()> {
    let batch = args.batch as usize;
    for (group, some) in prompts.chunks(batch).enumerate() {
        let said = |p: &&str| match template {
            Some(t) => t.render(&conversation(args.system.as_deref(), p)).and_then(|text| encode(w, &text, true)),
            None => encode(w, p, false),
        };
        let ids = some.iter().map(said).collect::<Result<Vec<_>>>()?;
        let (mut texts, read): (Vec<Text>, Vec<String>) = ids.iter().map(|p| Text::after(w, p)).unzip();
        let total = ids.iter().map(Vec::len).sum();
        let (mut context, logits) = w.read(&ids, &bar(total))?;
        // the same prompt again is another text
        let how = Sampling { seed: w.how.seed.wrapping_add((group * batch) as u64), ..w.how };
        go_on(&mut context, logits, &how, |i, token| Ok(texts[i].push(w, token).1))?;
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
