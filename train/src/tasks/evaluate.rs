//! A model's answers to tasks, by length, depth, pairs and difficulty.

use super::niah::{ANSWER, Prose, Question};
use super::report::{Cell, EvalReport, TaskReport, scalars};
use super::score::{Answer, read};
use super::{Draw, Haystack, Point, Sample, Settings, Task, draw};
use crate::learner::go_on;
use crate::rng::{self, stream};
use crate::text::Codec;
use crate::trainer::Sampling;
use crate::{Error, Result};
use nn::{Caches, Decoder, Generator, ModelConfig};
use serde_json::{Value, json};

/// What to evaluate by.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Settings of the token-level tasks.
    pub settings: Settings,
    /// Tokens of samples; none: as the settings say, 1024 for English.
    pub lengths: Vec<usize>,
    /// Depths of needles, evenly from 0 to 1 (one: ½); none: 10, and 40 for English.
    pub depths: Option<usize>,
    /// Samples of each cell; none: 200, of needles 50, in English 1.
    pub samples: Option<usize>,
    /// Seed of the samples.
    pub seed: u64,
    /// What needles of tokens may be hidden in.
    pub text: Option<Haystack<'a>>,
    /// What `niah-2` and `niah-3` are hidden in.
    pub prose: Option<&'a Prose>,
    /// How tokens are text, which English needs.
    pub codec: Option<&'a Codec>,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// Whether samples may be longer than the model's `max_position_embeddings`.
    pub beyond: bool,
}

impl Options<'_> {
    /// Everything as it is when nobody says more.
    pub fn new(settings: Settings) -> Options<'static> {
        let (lengths, ends) = (vec![], vec![]);
        Options { settings, lengths, depths: None, samples: None, seed: 1, text: None, prose: None, codec: None, ends, beyond: false }
    }
}

/// Tokens that are read side by side.
const TOGETHER: usize = 8192;
/// Tokens of English prompts that are kept side by side.
const KEPT: usize = 1 << 15;

/// A task's cells.
struct Planned {
    task: Task,
    settings: Settings,
    points: Vec<Point>,
    samples: usize,
}

/// Evaluates a model by tasks. Every sample is a function of the seed, its cell and its number alone. `progress` is told how many of how many tokens were read. `checkpoint`
/// and `step` are left for the caller to fill in.
///
/// # Errors
///
/// Settings or lengths without samples; samples longer than the model is meant to read, unless [`Options::beyond`]; English without a codec; logits that are not numbers.
pub fn evaluate(model: &Decoder, tasks: &[Task], o: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<EvalReport> {
    let planned = tasks.iter().map(|t| plan(model.config(), *t, o, o.text.is_some())).collect::<Result<Vec<_>>>()?;
    let total: u64 = planned.iter().flat_map(|p| p.points.iter().map(|c| (c.length * p.samples) as u64)).sum();
    let mut report = EvalReport::new(o.seed);
    let mut done = 0;
    for p in planned {
        let mut cells = vec![];
        let mut size = 0;
        for point in &p.points {
            let mut more = |samples: usize| {
                done += (samples * point.length) as u64;
                progress(done, total);
            };
            cells.push(match p.task {
                Task::Niah(which) => english(model, which, point, p.samples, &mut size, o, &mut more)?,
                _ => tokens(model, &p, point, o, &mut more)?,
            });
        }
        let samples = p.points.len() * p.samples;
        report.tasks.push(TaskReport { task: p.task.to_string(), settings: shown(&p, o)?, samples, scalars: scalars(p.task.name(), &cells), cells });
    }
    Ok(report)
}

/// The names of the scalars that [`evaluate`] gives of models of a configuration, or what is wrong with asking that. `text` is whether there is some to hide needles in.
///
/// # Errors
///
/// As [`evaluate`].
pub fn check(config: &ModelConfig, tasks: &[Task], o: &Options, text: bool) -> Result<Vec<String>> {
    let names = |t: &Task| {
        let p = plan(config, *t, o, text)?;
        let cells: Vec<Cell> = p.points.iter().map(|c| cell(c, p.samples, 1, 0, None)).collect();
        Ok(scalars(t.name(), &cells).into_keys())
    };
    Ok(tasks.iter().map(names).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// A task's settings for the report.
fn shown(p: &Planned, o: &Options) -> Result<Value> {
    let failed = |e: serde_json::Error| Error::Model(format!("{}: {e}", p.task));
    Ok(match p.task {
        Task::Niah(1) => json!({ "haystack": "noise", "answer": ANSWER }),
        Task::Niah(_) => json!({ "haystack": "prose", "answer": ANSWER }),
        task => {
            let vocab = p.settings.vocab(task, usize::MAX);
            let mut v = serde_json::to_value(&p.settings).map_err(failed)?[task.name()].take();
            if vocab < usize::MAX {
                v["vocab"] = vocab.into();
            }
            if p.settings.reads_text(task) {
                v["text"] = o.text.as_ref().map(|t| t.corpus.path().display().to_string()).into();
            }
            v
        }
    })
}

/// `n` depths evenly from 0 to 1; the middle, if it is one.
fn depths(n: usize) -> Vec<f64> {
    if n == 1 { vec![0.5] } else { (0..n).map(|i| i as f64 / (n - 1) as f64).collect() }
}

fn plan(c: &ModelConfig, task: Task, o: &Options, text: bool) -> Result<Planned> {
    let english = matches!(task, Task::Niah(_));
    let mut settings = o.settings.clone();
    let mut lengths = if o.lengths.is_empty() && english { vec![1024] } else { o.lengths.clone() };
    if let Some(own) = settings.lengths_mut(task) {
        if lengths.is_empty() {
            lengths = own.clone();
        }
        own.clone_from(&lengths);
        if let Task::Mqar | Task::Needle = task {
            let vocab = settings.vocab(task, c.vocab_size);
            settings.mqar.vocab = if task == Task::Mqar { Some(vocab) } else { settings.mqar.vocab };
            settings.needle.vocab = if task == Task::Needle { Some(vocab) } else { settings.needle.vocab };
        }
        settings.check(task, c.vocab_size)?;
    }
    for (name, n) in [("--samples", o.samples), ("--depths", o.depths)] {
        if n == Some(0) {
            return Err(Error::Usage(format!("{name}: expected at least 1, found 0")));
        }
    }
    if let Some(l) = lengths.iter().find(|l| **l > c.max_position_embeddings && !o.beyond) {
        let most = c.max_position_embeddings;
        return Err(Error::Usage(format!(
            "--task {task}: samples of {l} tokens are longer than the {most} that the model is meant to read (max_position_embeddings); --beyond reads them all the same"
        )));
    }
    if english && o.codec.is_none() {
        return Err(Error::Usage(format!("--task {task} is in English, and the model has no tokenizer")));
    }
    if task == Task::Niah(2) || task == Task::Niah(3) {
        o.prose.ok_or_else(|| Error::Usage(format!("--task {task} hides its needle in prose, and there is none; name a text by --text")))?;
    }
    if settings.reads_text(task) && !text {
        return Err(Error::Usage(format!("--task {task} hides its needle in text, and there is none; name one by --text")));
    }
    let mut points = vec![];
    for length in lengths {
        let plain = [Point { length, pairs: None, difficulty: None, depth: None }];
        let own = settings.points(task, length);
        for point in if english { &plain[..] } else { &own } {
            let n = o.depths.unwrap_or(if english { 40 } else { 10 });
            match task {
                Task::Needle | Task::Niah(_) => points.extend(depths(n).into_iter().map(|d| Point { depth: Some(d), ..*point })),
                _ => points.push(*point),
            }
        }
    }
    let samples = o.samples.unwrap_or(match task {
        Task::Niah(_) => 1,
        Task::Needle => 50,
        _ => 200,
    });
    Ok(Planned { task, settings, points, samples })
}

/// The random numbers of a cell's sample.
fn numbers(seed: u64, task: Task, point: &Point, sample: usize) -> Draw {
    let of = |x: Option<usize>| x.map_or(0, |x| x as u64 + 1);
    let depth = point.depth.map_or(0, |d| d.to_bits());
    let name = task.name().bytes().fold(0, |h, b| rng::bits(h, stream::SAMPLES, b.into()));
    let cell = [point.length as u64, of(point.pairs), of(point.difficulty), depth].into_iter().fold(name, |h, x| rng::bits(h, stream::SAMPLES, x));
    Draw::new(seed ^ cell, stream::SAMPLES, sample as u64)
}

fn tokens(model: &Decoder, p: &Planned, point: &Point, o: &Options, progress: &mut dyn FnMut(usize)) -> Result<Cell> {
    let vocab = model.config().vocab_size;
    let together = (TOGETHER / point.length).max(1);
    let (mut answers, mut correct, mut labels, mut nats) = (0, 0, 0, 0.0);
    for first in (0..p.samples).step_by(together) {
        let count = together.min(p.samples - first);
        let make = |i: usize| draw(p.task, &p.settings, vocab, o.text.as_ref(), point, &mut numbers(o.seed, p.task, point, i));
        let samples: Vec<Sample> = (first..first + count).map(make).collect::<Result<_>>()?;
        for got in read(model, &samples)? {
            labels += got.len();
            nats += got.iter().map(|a| a.nll).sum::<f64>();
            let right = |a: &&Answer| a.right;
            let whole = p.task == Task::Needle;
            answers += if whole { 1 } else { got.len() };
            correct += if whole { usize::from(got.iter().all(|a| a.right)) } else { got.iter().filter(right).count() };
        }
        progress(count);
    }
    Ok(cell(point, p.samples, answers, correct, Some(nats / labels as f64)))
}

fn cell(point: &Point, samples: usize, answers: usize, correct: usize, loss: Option<f64>) -> Cell {
    let Point { length, pairs, difficulty, depth } = *point;
    Cell { length, depth, pairs, difficulty, samples, answers, correct, accuracy: correct as f64 / answers as f64, loss }
}

/// A needle in English: a prompt is read in pieces, several are answered side by side, each by the likeliest tokens, until its answer is right, has ended, or is as long as it may be.
fn english(
    model: &Decoder,
    which: u8,
    point: &Point,
    samples: usize,
    size: &mut usize,
    o: &Options,
    progress: &mut dyn FnMut(usize),
) -> Result<Cell> {
    let codec = o.codec.ok_or_else(|| Error::Usage("English needs a tokenizer".into()))?;
    let haystack = if which == 1 { &Prose::Noise } else { o.prose.ok_or_else(|| Error::Usage("there is no prose".into()))? };
    let together = (KEPT / point.length).clamp(1, 8);
    let mut correct = 0;
    for first in (0..samples).step_by(together) {
        let questions: Vec<Question> = (first..samples.min(first + together))
            .map(|i| Question::draw(which, point.depth.unwrap_or(0.5), &mut numbers(o.seed, Task::Niah(which), point, i)))
            .collect();
        let (mut contexts, mut logits) = (vec![], vec![]);
        for q in &questions {
            let mut context = Generator::new(model);
            logits.push(context.feed(&q.tokens(haystack, point.length, codec, size)?)?);
            contexts.push(context.into_caches());
            progress(1);
        }
        let how = Sampling { tokens: ANSWER, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
        let mut texts: Vec<_> = questions.iter().map(|_| (codec.decoder(), String::new())).collect();
        go_on(&mut Generator::on(model, Caches::join(contexts)?), logits, &how, |i, token| {
            let (decoder, text) = &mut texts[i];
            if o.ends.contains(&token) {
                return Ok(false);
            }
            *text += &decoder.push(token);
            Ok(!questions[i].is_answered_by(text))
        })?;
        correct += questions.iter().zip(&mut texts).filter_map(|(q, (d, t))| q.is_answered_by(&(t.clone() + &d.finish())).then_some(())).count();
    }
    Ok(cell(point, samples, samples, correct, None))
}

#[cfg(test)]
#[path = "evaluate_tests.rs"]
mod tests;
