//! A run's batches: windows of text, of generated tasks, or of both.

use super::draw::Draw;
use super::{Haystack, IGNORE, Task, draw};
use crate::config::RunConfig;
use crate::data::{Batch, Corpus, Part, Sampler};
use crate::rng::stream;
use crate::{Error, Result};
use std::ops::Range;

/// Held-out windows' tokens where `eval.tokens` doesn't say.
const FRESH_TOKENS: usize = 1 << 16;

/// What a run trains on: a function of its configuration, the step and the micro-batch.
///
/// Of all windows, one after another, evenly spread ones are tasks, as many as [`share`](super::Settings::share) says. The others are those of the text's [`Sampler`], none left out.
/// A window of a task holds samples of one length, as many as fit, and padding; nothing crosses from one to another, since the whole micro-batch is one packed row.
pub struct Source<'a> {
    config: &'a RunConfig,
    corpus: &'a Corpus,
    /// None where there are tasks alone.
    text: Option<Sampler>,
}

impl<'a> Source<'a> {
    /// The batches of a run; an error if the text is too short for one.
    pub fn new(corpus: &'a Corpus, config: &'a RunConfig) -> Result<Source<'a>> {
        let d = &config.data;
        let train = corpus.split(d.held_out).0;
        let text = |range: Range<usize>| Sampler::new(corpus, range, config.seed, d.batch, d.seq_len, config.train.accumulate, d.packing);
        Ok(Source { text: if config.tasks.share < 1.0 { Some(text(train)?) } else { None }, config, corpus })
    }
    /// Tokens that a step reads.
    pub fn tokens_per_step(&self) -> u64 {
        (self.config.data.batch * self.config.data.seq_len * self.config.train.accumulate) as u64
    }
    /// Micro-batch `micro` of step `step`.
    pub fn batch(&self, step: u64, micro: u64) -> Result<Batch> {
        let (share, d) = (self.config.tasks.share, &self.config.data);
        if let (Some(text), true) = (&self.text, share == 0.0) {
            return Ok(text.batch(self.corpus, step, micro));
        }
        let first = (step * self.config.train.accumulate as u64 + micro) * d.batch as u64;
        let parts = (first..first + d.batch as u64).map(|i| {
            let tasks = |i: u64| (i as f64 * share).floor() as u64;
            match &self.text {
                Some(text) if tasks(i + 1) == tasks(i) => Ok(Part::of(self.corpus, &text.at(i - tasks(i)), d.packing)),
                _ => Ok(self.window(stream::TASKS, i, self.corpus.split(d.held_out).0)?.1),
            }
        });
        Ok(Batch::packed(parts.collect::<Result<Vec<_>>>()?))
    }
    /// Windows of tasks that no step trains on, the same at each call: a micro-batch at a time, with the task of each window.
    pub fn fresh(&self) -> impl Iterator<Item = Result<(Vec<Task>, Batch)>> {
        let d = &self.config.data;
        let tokens = if self.config.eval.tokens == 0 { FRESH_TOKENS } else { self.config.eval.tokens };
        let (rows, batches) = (d.batch as u64, if self.config.tasks.share > 0.0 { tokens.div_ceil(d.seq_len * d.batch) } else { 0 });
        let (train, held_out) = self.corpus.split(d.held_out);
        let range = if held_out.is_empty() { train } else { held_out };
        (0..batches as u64).map(move |b| {
            let windows = (b * rows..(b + 1) * rows).map(|i| self.window(stream::FRESH, i, range.clone())).collect::<Result<Vec<_>>>()?;
            let (tasks, parts): (Vec<Task>, Vec<Part>) = windows.into_iter().unzip();
            Ok((tasks, Batch::packed(parts)))
        })
    }

    /// The [fresh](Self::fresh) windows one after another, as a text of tokens, for what looks at a model while it reads.
    pub fn tokens(&self) -> Result<Corpus> {
        let windows = self.fresh().map(|f| Ok(f?.1.tokens)).collect::<Result<Vec<_>>>()?;
        Ok(Corpus::of_tokens(windows.concat(), self.config.model.vocab_size))
    }

    /// A window of a task, with text for haystacks from `range`.
    fn window(&self, stream: u64, index: u64, range: Range<usize>) -> Result<(Task, Part)> {
        let (s, vocab, time) = (&self.config.tasks, self.config.model.vocab_size, self.config.data.seq_len);
        let mut d = Draw::new(self.config.seed, stream, index);
        let weights = s.weights();
        let mut at = d.uniform() * weights.iter().map(|w| w.1).sum::<f64>();
        let drawn = weights.iter().find(|w| {
            at -= w.1;
            at < 0.0
        });
        let task = drawn.or(weights.last()).ok_or_else(|| Error::Usage("tasks.mix names no task".into()))?.0;
        let length = *d.pick(s.lengths(task));
        let points = s.points(task, length);
        let text = Haystack { corpus: self.corpus, range };
        let mut part = Part { tokens: Vec::with_capacity(time), targets: Vec::with_capacity(time), starts: vec![] };
        for _ in 0..time / length {
            let point = d.pick(&points);
            let sample = draw(task, s, vocab, Some(&text), point, &mut d)?;
            part.starts.push(part.tokens.len());
            part.tokens.extend(sample.tokens);
            part.targets.extend(sample.labels);
        }
        if part.tokens.len() < time {
            part.starts.push(part.tokens.len());
            part.tokens.resize(time, 0);
            part.targets.resize(time, IGNORE);
        }
        Ok((task, part))
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
