//! The loop: batches in, updates, metrics, evaluations, samples and checkpoints out.

use crate::checkpoint::{RunDir, State, read_state};
use crate::config::{Budget, Optim, RunConfig};
use crate::data::{Batch, Corpus, EvalWindows};
use crate::histogram::Distribution;
use crate::metrics::{Metrics, Scalars, memory};
use crate::progress::{Line, Progress, say};
use crate::tasks::held_out::{self, Score, held_out};
use crate::tasks::{Answer, Source};
use crate::text::harmless;
use crate::{Error, Result, checkpoint};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

/// How to write text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to write.
    pub tokens: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f64,
    /// Only this many likeliest tokens (0: all).
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability (1: all).
    pub top_p: f64,
    /// Seed of the draw.
    pub seed: u64,
}

/// Makes micro-batch `i` of a step; each is asked for when its turn comes.
pub type Batches<'a> = &'a (dyn Fn(usize) -> Result<Batch> + Sync);

/// A step to take.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Its number, from 1.
    pub step: u64,
    /// Of how many micro-batches.
    pub micro: usize,
    /// Learning rate.
    pub lr: f64,
    /// The optimizer.
    pub optim: &'a Optim,
}

/// A step that was taken, or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Stepped {
    /// Each micro-batch's mean loss in nats a token.
    pub losses: Vec<f64>,
    /// The gradients' global norm before clipping; or, in words, what was not finite, for which no step was taken.
    pub grad_norm: std::result::Result<f64, String>,
}

/// What the loop asks of a model with its optimizer. All that decides its results is in its parameters, its optimizer's state, and the arguments.
pub trait Learner {
    /// Takes a step along the gradient of the mean of the micro-batches' mean losses, clipped; puts what the observer saw of the first micro-batch, of
    /// gradients and of updates into `observed`. Where a loss or the gradients are not finite, nothing is changed.
    fn step(&mut self, work: &Step, batch: Batches, observed: Option<&mut Scalars>) -> Result<Stepped>;
    /// The sums of negative log-likelihoods over batches, in nats, without gradients.
    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>>;
    /// What is answered at the labels of batches, in order, without gradients; an error where a learner knows no answers.
    fn answers(&mut self, _batches: &[Batch]) -> Result<Vec<Vec<Answer>>> {
        Err(Error::Model("this learner can not be evaluated by tasks".into()))
    }
    /// How gates are distributed over a batch, without gradients; nothing where there are none.
    fn gates(&mut self, _batch: &Batch) -> Result<Vec<Distribution>> {
        Ok(vec![])
    }
    /// Continues `prompt`; returns the new tokens.
    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>>;
    /// Where in the model the loss over `batch`, one of `micro`, or its gradient first stops being finite, in words; none if neither does.
    fn diagnose(&mut self, batch: &Batch, micro: usize) -> Option<String>;
    /// Writes `model.safetensors`, `config.json` and `optimizer.safetensors` into `dir`.
    fn save(&self, dir: &Path) -> Result<()>;
    /// Reads what [`save`](Self::save) wrote.
    fn load(&mut self, dir: &Path) -> Result<()>;
    /// One past the largest token.
    fn vocab_size(&self) -> usize;
    /// The device's memory, where it isn't the host's: bytes that tensors hold now, and the most that they held.
    fn device_memory(&self) -> Option<(u64, u64)> {
        None
    }
    /// The most operations a second that the device can do, where that is known.
    fn peak_flops(&self) -> Option<f64> {
        None
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The loop's last state.
    pub state: State,
    /// Held-out bits a token (a byte, for text; a label, for tasks alone); none when nothing was held out.
    pub held_out: Option<f64>,
    /// Held-out tokens scored.
    pub scored: usize,
    /// The tasks' scores, where there are tasks.
    pub tasks: Vec<Score>,
}

/// Batches that an evaluation hands over at once.
const TOGETHER: usize = 16;

/// Bits a token over `range` of `corpus` (all of it when `max_tokens` is 0), and the number of tokens scored. A loss that is not finite is an error.
pub fn evaluate(
    learner: &mut dyn Learner,
    corpus: &Corpus,
    range: Range<usize>,
    config: &RunConfig,
    max_tokens: usize,
) -> Result<Option<(f64, usize)>> {
    let mut windows = EvalWindows::new(range, config.data.batch, config.data.seq_len, max_tokens, config.data.packing);
    let (mut nats, mut count) = (0.0, 0);
    loop {
        let batches: Vec<Batch> = std::iter::from_fn(|| windows.next_batch(corpus)).take(TOGETHER).collect();
        if batches.is_empty() {
            break;
        }
        for batch in &batches {
            check_tokens(batch, learner.vocab_size(), corpus)?;
            count += batch.targets.len();
        }
        let sums = learner.nll(&batches)?;
        if let Some(bad) = sums.iter().position(|s| !s.is_finite()) {
            let place = learner.diagnose(&batches[bad], 1).unwrap_or_else(|| "computed again, it is finite".into());
            return Err(Error::NonFinite(format!("the held-out loss is {}: {place}", sums[bad])));
        }
        nats += sums.iter().sum::<f64>();
    }
    Ok((count > 0).then(|| (nats / std::f64::consts::LN_2 / count as f64, count)))
}

fn check_tokens(batch: &Batch, vocab: usize, corpus: &Corpus) -> Result<()> {
    let targets = batch.targets.iter().filter(|t| **t >= 0).map(|t| *t as u64);
    match batch.tokens.iter().map(|t| u64::from(*t)).chain(targets).find(|t| *t >= vocab as u64) {
        Some(t) => Err(Error::data(corpus.path(), format!("token {t} is outside the model's vocabulary of {vocab}; raise model.vocab_size"))),
        None => Ok(()),
    }
}

/// Reads a checkpoint into `learner`; the state is for [`train`] to go on from. Files that are not as they were written are an error.
pub fn load(learner: &mut dyn Learner, from: &Path) -> Result<State> {
    let state = read_state(from)?;
    checkpoint::verify(from, &[checkpoint::MODEL, checkpoint::OPTIMIZER])?;
    learner.load(from)?;
    Ok(state)
}

/// Trains `learner` on `corpus` until the budget is used, from the beginning or from a state that was [loaded](load).
pub fn train(learner: &mut dyn Learner, corpus: &Corpus, config: &RunConfig, run: &RunDir, from: Option<State>) -> Result<Summary> {
    let source = Source::new(corpus, config)?;
    let held_out = corpus.split(config.data.held_out).1;
    let state = State { version: 1, corpus: Some(corpus.fingerprint()), ..from.unwrap_or_default() };
    for aside in run.set_aside(state.step)? {
        say(&format!("a later checkpoint is now {}; delete it if it isn't wanted", aside.display()));
    }
    let mut metrics = Metrics::open(run.path(), state.step)?;
    if config.train.tensorboard {
        metrics = metrics.with_events(run.path(), state.step)?;
    }
    let progress = Progress::new(config.train.log_every);
    let (first, budget) = (state, config.budget()?);
    let mut work = Loop { learner, corpus, config, run, source, held_out, budget, first, began: Instant::now(), state, metrics, progress };
    let held_out_end = work.held_out.end;
    let result = work.run();
    work.progress.finish();
    result?;
    let last = work.score(0);
    let (last, tasks) = work.stopping(last)?;
    if let Some((bits, count)) = last {
        let mut fields = vec![("final", true.into()), ("held_out_bits", bits.into()), ("held_out_tokens", count.into())];
        let of_text = held_out_end.checked_sub(count).filter(|_| config.tasks.share < 1.0);
        let bytes = of_text.and_then(|start| corpus.text_bytes(start..held_out_end)).filter(|&b| b > 0);
        fields.extend(bytes.map(|b| ("held_out_bits_per_byte", (bits * count as f64 / b as f64).into())));
        work.metrics.write(work.state.step, &fields, &held_out::scalars(&tasks))?;
        work.histograms()?;
    }
    work.metrics.sync()?;
    Ok(Summary { state: work.state, held_out: last.map(|l| l.0), scored: last.map_or(0, |l| l.1), tasks })
}

struct Loop<'a> {
    learner: &'a mut dyn Learner,
    corpus: &'a Corpus,
    config: &'a RunConfig,
    run: &'a RunDir,
    source: Source<'a>,
    held_out: Range<usize>,
    budget: Budget,
    /// Where this process began.
    first: State,
    began: Instant,
    state: State,
    metrics: Metrics,
    progress: Progress,
}

impl Loop<'_> {
    fn used(&self, s: &State) -> f64 {
        self.budget.progress(s.step, s.tokens, s.seconds)
    }
    fn seconds(&self) -> f64 {
        self.first.seconds + self.began.elapsed().as_secs_f64()
    }

    fn run(&mut self) -> Result<()> {
        let (eval, keep) = (self.config.eval.every, self.config.checkpoint.every);
        let mut saved = self.first.step;
        while self.used(&self.state) < 1.0 {
            let before = self.used(&self.state);
            self.step()?;
            let (step, after) = (self.state.step, self.used(&self.state));
            if eval > 0 && step.is_multiple_of(eval) && after < 1.0 {
                let done = self.evaluate();
                self.stopping(done)?;
            }
            let shown = |used: f64| (used.min(1.0) * self.config.sample.count as f64).floor();
            if shown(after) > shown(before) {
                let done = self.sample();
                self.stopping(done)?;
            }
            self.state.seconds = self.seconds();
            if keep > 0 && step.is_multiple_of(keep) {
                let done = self.save();
                self.stopping(done)?;
                saved = step;
            }
        }
        let done = if saved != self.state.step { self.save() } else { Ok(()) };
        self.stopping(done)
    }

    /// What to do when something between two steps finds numbers that are not finite: say after which step, and what helps.
    fn stopping<T>(&mut self, done: Result<T>) -> Result<T> {
        let Err(Error::NonFinite(m)) = done else { return done };
        let message = format!("after step {}: {m}; lower optim.lr, and go on from an older checkpoint by --resume if there is one", self.state.step);
        self.metrics.write(self.state.step, &[("stopped", message.as_str().into())], &Scalars::new())?;
        self.metrics.sync()?;
        Err(Error::NonFinite(message))
    }

    fn step(&mut self) -> Result<()> {
        let (t, began, step, tokens) = (&self.config.train, Instant::now(), self.state.step + 1, self.source.tokens_per_step());
        // Steps are counted to their end, so that the first has a rate and the last has the final one; of time, only the past is known.
        let part = self.budget.progress(step, self.state.tokens + tokens, self.state.seconds);
        let lr = self.config.optim.lr * self.config.schedule().factor(part);
        let mut scalars = Scalars::new();
        let observe = t.observe_every > 0 && step.is_multiple_of(t.observe_every);
        let (corpus, vocab, source, done) = (self.corpus, self.learner.vocab_size(), &self.source, self.state.step);
        let batch = |micro: usize| {
            let batch = source.batch(done, micro as u64)?;
            check_tokens(&batch, vocab, corpus)?;
            Ok(batch)
        };
        let work = Step { step, micro: t.accumulate, lr, optim: &self.config.optim };
        let Stepped { losses, grad_norm } = self.learner.step(&work, &batch, observe.then_some(&mut scalars))?;
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        let updated = match losses.iter().position(|l| !l.is_finite()) {
            Some(micro) => Err((format!("the loss is {}", losses[micro]), micro)),
            None => grad_norm.map_err(|m| (m, 0)),
        };
        let grad_norm = match updated {
            Ok(norm) => norm,
            Err((what, micro)) => {
                let mut places = (micro..t.accumulate).map(|m| -> Result<Option<String>> { Ok(self.learner.diagnose(&batch(m)?, t.accumulate)) });
                let place = places.find_map(Result::transpose).transpose()?;
                let place = place.unwrap_or_else(|| "each micro-batch alone gives finite numbers, their sum does not".into());
                let clip = if self.config.optim.clip > 0.0 { "lower optim.clip" } else { "clip gradients, as by optim.clip=1" };
                let message = format!("step {step}: {what}: {place}; lower optim.lr (now {lr:.2e}), or {clip}");
                let fields = [("loss", loss.into()), ("lr", lr.into()), ("stopped", message.as_str().into())];
                self.metrics.write(step, &fields, &scalars)?;
                self.metrics.sync()?;
                return Err(Error::NonFinite(message));
            }
        };
        let s = &mut self.state;
        (s.step, s.tokens) = (step, s.tokens + tokens);
        s.seconds = self.first.seconds + self.began.elapsed().as_secs_f64();
        // The mean over about 50 steps, without the bias of its beginning.
        s.ema += (1.0 / step as f64).max(0.02) * (loss - s.ema);
        let (memory, peak) = memory();
        let tokens_per_s = tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
        let mfu = self.learner.peak_flops().map(|peak| tokens_per_s * self.config.model.flops_per_token(self.config.data.seq_len) / peak);
        let on_device = self.learner.device_memory();
        let mut fields = vec![
            ("loss", loss.into()),
            ("lr", lr.into()),
            ("grad_norm", grad_norm.into()),
            ("tokens", self.state.tokens.into()),
            ("tokens_per_s", tokens_per_s.into()),
            ("seconds", self.state.seconds.into()),
            ("memory", memory.into()),
            ("memory_peak", peak.into()),
        ];
        fields.extend(mfu.map(|mfu| ("mfu", mfu.into())));
        if let Some((now, peak)) = on_device {
            fields.extend([("device_memory", now.into()), ("device_memory_peak", peak.into())]);
        }
        self.metrics.write(step, &fields, &scalars)?;
        let used = self.used(&self.state);
        let eta = (self.state.seconds - self.first.seconds) / (used - self.used(&self.first)).max(1e-12) * (1.0 - used);
        self.progress.step(&Line {
            step,
            progress: used,
            loss: self.state.ema,
            lr,
            grad_norm,
            tokens_per_s,
            mfu,
            memory: on_device.map_or(memory, |d| d.1),
            eta,
        });
        Ok(())
    }

    /// Bits a held-out token (of text, at most `max_tokens` of it; a label, where there are tasks alone), how many were scored, and the tasks' scores.
    fn score(&mut self, max_tokens: usize) -> Result<(Option<(f64, usize)>, Vec<Score>)> {
        let tasks = held_out(self.learner, &self.source)?;
        if self.config.tasks.share >= 1.0 {
            return Ok((held_out::bits(&tasks), tasks));
        }
        Ok((evaluate(self.learner, self.corpus, self.held_out.clone(), self.config, max_tokens)?, tasks))
    }

    fn evaluate(&mut self) -> Result<()> {
        let step = self.state.step;
        let (text, tasks) = self.score(self.config.eval.tokens)?;
        let fields = text.iter().flat_map(|(bits, count)| [("held_out_bits", (*bits).into()), ("held_out_tokens", (*count).into())]);
        let fields: Vec<(&str, Value)> = fields.collect();
        if fields.is_empty() && tasks.is_empty() {
            return Ok(());
        }
        self.metrics.write(step, &fields, &held_out::scalars(&tasks))?;
        self.histograms()?;
        let unit = match self.config.tasks.share {
            1.0 => ("bits per label", "labels"),
            _ if self.corpus.is_bytes() => ("bits per byte", "tokens"),
            _ => ("bits per token", "tokens"),
        };
        let text = text.map(|(bits, count)| format!("{bits:.3} {} ({count} {})", unit.0, unit.1));
        let tasks = Some(held_out::said(&tasks)).filter(|t| !t.is_empty());
        let said: Vec<String> = text.into_iter().chain(tasks).collect();
        self.progress.say(&format!("step {step:>6}  held out: {}", said.join("; ")));
        Ok(())
    }

    /// The gates over the first held-out batch, for TensorBoard. An evaluation reads many: one more is cheap, and no step waits for counts.
    fn histograms(&mut self) -> Result<()> {
        if !self.metrics.has_events() {
            return Ok(());
        }
        let d = &self.config.data;
        let text = EvalWindows::new(self.held_out.clone(), d.batch, d.seq_len, d.batch * d.seq_len, d.packing).next_batch(self.corpus);
        let first = match text {
            None => self.source.fresh().next().transpose()?.map(|f| f.1),
            text => text,
        };
        match first {
            Some(batch) => self.metrics.histograms(self.state.step, &self.learner.gates(&batch)?),
            None => Ok(()),
        }
    }

    fn sample(&mut self) -> Result<()> {
        let (c, step) = (&self.config.sample, self.state.step);
        // tokens of a shard that lies alone are no text
        let Some(codec) = self.corpus.codec() else { return Ok(()) };
        let seed = self.config.seed ^ step;
        let how = Sampling { tokens: c.tokens, temperature: c.temperature, top_k: c.top_k, top_p: 1.0, seed };
        let written = codec.decode(&self.learner.sample(&codec.encode(&c.prompt)?, &how)?);
        self.metrics.write(step, &[("sample", format!("{}{written}", c.prompt).into())], &Scalars::new())?;
        self.progress.say(&harmless(&format!("--- step {step}\n{}{written}\n---", c.prompt)));
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.run.save(&self.state, self.config.checkpoint.keep, |dir| self.learner.save(dir)).map(drop)
    }
}

#[cfg(test)]
#[path = "trainer_tests.rs"]
mod tests;
