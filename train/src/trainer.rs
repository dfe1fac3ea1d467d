//! The loop: batches in, updates, metrics, evaluations, samples and checkpoints out.

use crate::checkpoint::{RunDir, State, read_state};
use crate::config::{Budget, Optim, RunConfig};
use crate::data::{Batch, Corpus, EvalWindows, Sampler};
use crate::metrics::{Metrics, Scalars, memory};
use crate::progress::{Line, Progress};
use crate::{Error, Result};
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

/// What the loop asks of a model with its optimizer. All that decides its results is in its parameters, its optimizer's state, and the arguments.
pub trait Learner {
    /// Forward and backward of a step's micro-batches, side by side where there are threads: adds the gradient of the mean of their mean losses to
    /// the gradients held, in the order of the micro-batches, puts what the observer saw of the first into `observed`, and returns each mean loss in
    /// nats a token.
    fn step(&mut self, batches: &[Batch], observed: Option<&mut Scalars>) -> Result<Vec<f64>>;
    /// Clips the gradients held, takes optimizer step number `step` (from 1), drops the gradients. Returns the gradients' global norm before
    /// clipping. A norm that is not finite is an error that names the first parameter, and nothing is changed.
    fn update(&mut self, step: u64, lr: f64, optim: &Optim) -> Result<f64>;
    /// The sums of negative log-likelihoods over batches, in nats, without gradients.
    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>>;
    /// Continues `prompt`; returns the new tokens.
    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>>;
    /// Where in the model a loss over `batch` first stops being finite, in words.
    fn diagnose(&mut self, batch: &Batch) -> String;
    /// Writes `model.safetensors`, `config.json` and `optimizer.safetensors` into `dir`.
    fn save(&self, dir: &Path) -> Result<()>;
    /// Reads what [`save`](Self::save) wrote.
    fn load(&mut self, dir: &Path) -> Result<()>;
    /// One past the largest token.
    fn vocab_size(&self) -> usize;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The loop's last state.
    pub state: State,
    /// Held-out bits a token (a byte, for text); none when nothing was held out.
    pub held_out: Option<f64>,
    /// Held-out tokens scored.
    pub scored: usize,
}

/// Batches that an evaluation hands over at once.
const TOGETHER: usize = 16;

/// Bits a token over `range` of `corpus` (all of it when `max_tokens` is 0), and the number of tokens scored.
pub fn evaluate(
    learner: &mut dyn Learner,
    corpus: &Corpus,
    range: std::ops::Range<usize>,
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
        nats += learner.nll(&batches)?.iter().sum::<f64>();
    }
    Ok((count > 0).then(|| (nats / std::f64::consts::LN_2 / count as f64, count)))
}

fn check_tokens(batch: &Batch, vocab: usize, corpus: &Corpus) -> Result<()> {
    match batch.tokens.iter().chain(&batch.targets).find(|&&t| t as usize >= vocab) {
        Some(t) => Err(Error::data(corpus.path(), format!("token {t} is outside the model's vocabulary of {vocab}; raise model.vocab_size"))),
        None => Ok(()),
    }
}

/// Trains `learner` on `corpus` until the budget is used, from `resume`'s checkpoint if there is one.
pub fn train(learner: &mut dyn Learner, corpus: &Corpus, config: &RunConfig, run: &RunDir, resume: Option<&Path>) -> Result<Summary> {
    let budget = config.budget()?;
    let (d, t) = (&config.data, &config.train);
    let (training, held_out) = corpus.split(d.held_out);
    let sampler = Sampler::new(corpus, training, config.seed, d.batch, d.seq_len, t.accumulate, d.packing)?;
    let mut state = State { version: 1, ..State::default() };
    if let Some(checkpoint) = resume {
        learner.load(checkpoint)?;
        state = read_state(checkpoint)?;
    }
    let mut metrics = Metrics::open(run.path(), state.step)?;
    let mut progress = Progress::new(t.log_every);
    let result = steps(learner, corpus, config, run, budget, &sampler, &held_out, &mut state, &mut metrics, &mut progress);
    progress.finish();
    result?;
    let last = evaluate(learner, corpus, held_out, config, 0)?;
    if let Some((bits, count)) = last {
        let fields = [("final", true.into()), ("held_out_bits", bits.into()), ("held_out_tokens", count.into())];
        metrics.write(state.step, &fields, &Scalars::new())?;
    }
    metrics.sync()?;
    Ok(Summary { state, held_out: last.map(|l| l.0), scored: last.map_or(0, |l| l.1) })
}

#[allow(clippy::too_many_arguments)] // one loop, cut from its set-up so that the bar is taken away whatever happens
fn steps(
    learner: &mut dyn Learner,
    corpus: &Corpus,
    config: &RunConfig,
    run: &RunDir,
    budget: Budget,
    sampler: &Sampler,
    held_out: &std::ops::Range<usize>,
    state: &mut State,
    metrics: &mut Metrics,
    progress: &mut Progress,
) -> Result<()> {
    let (t, schedule, tokens) = (&config.train, config.schedule(), sampler.tokens_per_step());
    let (before, start) = (state.seconds, Instant::now());
    let (mut last_saved, first) = (None, state.step);
    let progress_at = |s: &State| budget.progress(s.step, tokens, s.seconds);
    while progress_at(state) < 1.0 {
        let (began, part) = (Instant::now(), progress_at(state));
        let step = state.step + 1;
        // Steps are counted to their end, so that the first has a rate and the last has the final one; of time, only the past is known.
        let lr = config.optim.lr * schedule.factor(budget.progress(step, tokens, state.seconds));
        let mut scalars = Scalars::new();
        let batches: Vec<Batch> = (0..t.accumulate as u64).map(|micro| sampler.batch(corpus, state.step, micro)).collect();
        for batch in &batches {
            check_tokens(batch, learner.vocab_size(), corpus)?;
        }
        let observed = (t.observe_every > 0 && step.is_multiple_of(t.observe_every)).then_some(&mut scalars);
        let losses = learner.step(&batches, observed)?;
        if let Some((l, batch)) = losses.iter().zip(&batches).find(|(l, _)| !l.is_finite()) {
            let place = learner.diagnose(batch);
            return Err(Error::NonFinite(format!("step {step}: the loss is {l}: {place}; lower optim.lr (now {lr:.2e}) or optim.clip")));
        }
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        let grad_norm = learner.update(step, lr, &config.optim).map_err(|e| match e {
            Error::NonFinite(m) => Error::NonFinite(format!("step {step}: {m}; lower optim.lr (now {lr:.2e}) or optim.clip")),
            e => e,
        })?;
        state.step = step;
        state.tokens += tokens;
        state.seconds = before + start.elapsed().as_secs_f64();
        // The mean over about 50 steps, without the bias of its beginning.
        let weight = (1.0 / step as f64).max(0.02);
        state.ema += weight * (loss - state.ema);
        let (rss, peak) = memory();
        let tokens_per_s = tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
        let used = progress_at(state);
        metrics.write(
            step,
            &[
                ("loss", loss.into()),
                ("lr", lr.into()),
                ("grad_norm", grad_norm.into()),
                ("tokens", state.tokens.into()),
                ("tokens_per_s", tokens_per_s.into()),
                ("seconds", state.seconds.into()),
                ("memory", rss.into()),
                ("memory_peak", peak.into()),
            ],
            &scalars,
        )?;
        let done_here = used - budget.progress(first, tokens, before);
        let eta = (state.seconds - before) / done_here.max(1e-12) * (1.0 - used);
        progress.step(&Line { step, progress: used, loss: state.ema, lr, grad_norm, tokens_per_s, memory: rss, eta });

        let ends = used >= 1.0;
        if config.eval.every > 0
            && step.is_multiple_of(config.eval.every)
            && !ends
            && let Some((bits, count)) = evaluate(learner, corpus, held_out.clone(), config, config.eval.tokens)?
        {
            metrics.write(step, &[("held_out_bits", bits.into()), ("held_out_tokens", count.into())], &Scalars::new())?;
            let unit = if corpus.is_bytes() { "bits per byte" } else { "bits per token" };
            progress.say(&format!("step {step:>6}  held out: {bits:.3} {unit} ({count} tokens)"));
        }
        let c = config.sample.count as f64;
        if (used.min(1.0) * c).floor() > (part * c).floor() && corpus.is_bytes() {
            let how = Sampling {
                tokens: config.sample.tokens,
                temperature: config.sample.temperature,
                top_k: config.sample.top_k,
                top_p: 1.0,
                seed: config.seed ^ step,
            };
            let prompt: Vec<u32> = config.sample.prompt.bytes().map(u32::from).collect();
            let written = text(&learner.sample(&prompt, &how)?);
            metrics.write(step, &[("sample", format!("{}{written}", config.sample.prompt).into())], &Scalars::new())?;
            progress.say(&format!("--- step {step}\n{}{written}\n---", config.sample.prompt));
        }
        state.seconds = before + start.elapsed().as_secs_f64();
        if config.checkpoint.every > 0 && step.is_multiple_of(config.checkpoint.every) {
            metrics.sync()?;
            run.save(state, config.checkpoint.keep, |dir| learner.save(dir))?;
            last_saved = Some(step);
        }
    }
    if last_saved != Some(state.step) && state.step > first {
        metrics.sync()?;
        run.save(state, config.checkpoint.keep, |dir| learner.save(dir))?;
    }
    Ok(())
}

/// Byte tokens as text.
pub fn text(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().map(|&t| t as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[path = "trainer_tests.rs"]
mod tests;
