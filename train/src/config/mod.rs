//! The configuration of a run: typed, with a TOML overlay and `--set a.b=c` on top.

mod overlay;
#[cfg(test)]
mod tests;

pub(crate) use overlay::plain;
pub use overlay::{Change, Layers, Origins, Resolved};

use crate::data::Packing;
use crate::schedule::{Schedule, Shape};
use crate::tasks::Settings;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The longest text that is written at once: each token costs more time than the one before.
pub const MOST_TOKENS: usize = 1 << 20;

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The preset or file that this started from.
    pub name: String,
    /// Seed of initial values and of the order of the data.
    pub seed: u64,
    /// The model.
    pub model: nn::ModelConfig,
    /// The text.
    pub data: Data,
    /// Generated tasks among the text.
    #[serde(default)]
    pub tasks: Settings,
    /// Budget and step.
    pub train: Train,
    /// The optimizer.
    pub optim: Optim,
    /// Held-out evaluation.
    pub eval: Eval,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// Samples of text during the run.
    pub sample: Sample,
}

/// The text and how it is cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A UTF-8 text file, `.jsonl`, a folder of them, or a `.bin` token shard. It may be empty where a run reads tasks alone.
    pub path: PathBuf,
    /// The part at the end that is never trained on.
    pub held_out: f64,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Windows in a micro-batch.
    pub batch: usize,
    /// How windows become rows.
    pub packing: Packing,
    /// The end-of-text token of a shard whose header doesn't name one.
    pub eot: Option<u32>,
}

/// The budget, of which exactly one is set, and what a step is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Budget in minutes of training, which go on being counted over a resume. The learning rate then follows the clock, so no two runs are equal
    /// bit for bit, a resumed one and its uninterrupted twin among them; under a budget in tokens or steps they are.
    pub minutes: Option<f64>,
    /// Budget in tokens.
    pub tokens: Option<u64>,
    /// Budget in optimizer steps.
    pub steps: Option<u64>,
    /// Micro-batches whose gradients are added up for a step.
    pub accumulate: usize,
    /// The run, checkpoint or folder of transformers whose parameters training begins with; empty: drawn by the seed.
    #[serde(default)]
    pub from: PathBuf,
    /// The precision of activations and products; parameters are f32 always. Where it is not set, the device decides at the start: f32 on the CPU,
    /// bf16 on a GPU.
    pub dtype: Option<Precision>,
    /// Steps between observations of gates, routers and states (0: never).
    pub observe_every: u64,
    /// Steps between lines on a terminal that is none.
    pub log_every: u64,
    /// Whether TensorBoard's event files are written beside `metrics.jsonl`.
    #[serde(default = "yes")]
    pub tensorboard: bool,
}

/// What older runs, which don't say, go on with.
fn yes() -> bool {
    true
}

/// A precision to compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// The upper half of those.
    BF16,
}

impl From<Precision> for engine::DType {
    fn from(p: Precision) -> Self {
        match p {
            Precision::F32 => engine::DType::F32,
            Precision::BF16 => engine::DType::BF16,
        }
    }
}

/// AdamW (Loshchilov & Hutter 2019) and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// The peak learning rate.
    pub lr: f64,
    /// Shape after warm-up.
    pub schedule: Shape,
    /// The part of the budget that warms up.
    pub warmup: f64,
    /// The part of the budget that decays, for `wsd`.
    pub decay: f64,
    /// The last learning rate, as a part of the peak.
    pub end: f64,
    /// First moment's decay.
    pub beta1: f64,
    /// Second moment's decay.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
    /// Patterns of names that don't decay (see [`crate::groups::decays`]); vectors never do.
    pub no_decay: Vec<String>,
    /// Patterns of names that stay as they begin (see [`crate::groups::matches`]); their gradients are no part of the norm.
    #[serde(default)]
    pub freeze: Vec<String>,
    /// The gradient's global norm is clipped to this (0: not).
    pub clip: f64,
}

/// Held-out evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Steps between evaluations during the run (0: only at the end).
    pub every: u64,
    /// Held-out tokens that those score (0: all). The one at the end scores all.
    pub tokens: usize,
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between checkpoints (0: only at the end).
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

/// Samples of text during the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// How many are shown, evenly over the budget (0: none).
    pub count: u64,
    /// Tokens in each.
    pub tokens: usize,
    /// What they begin with.
    pub prompt: String,
    /// Sampling temperature.
    pub temperature: f64,
    /// Only this many likeliest tokens are sampled from (0: all).
    pub top_k: usize,
}

/// A run's budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Minutes of training.
    Minutes(f64),
    /// Tokens.
    Tokens(u64),
    /// Optimizer steps.
    Steps(u64),
}

impl Budget {
    /// The part of the budget that is used after `steps` steps, `tokens` tokens in all, and `seconds` of training.
    pub fn progress(self, steps: u64, tokens: u64, seconds: f64) -> f64 {
        match self {
            Budget::Minutes(m) => seconds / (60.0 * m),
            Budget::Tokens(t) => tokens as f64 / t as f64,
            Budget::Steps(s) => steps as f64 / s as f64,
        }
    }
}

impl RunConfig {
    /// The budget in force.
    pub fn budget(&self) -> Result<Budget> {
        let t = &self.train;
        match (t.minutes, t.tokens, t.steps) {
            (Some(m), None, None) => Ok(Budget::Minutes(m)),
            (None, Some(t), None) => Ok(Budget::Tokens(t)),
            (None, None, Some(s)) => Ok(Budget::Steps(s)),
            _ => Err(Error::Usage("exactly one of train.minutes, train.tokens and train.steps sets a run's budget".into())),
        }
    }
    /// The schedule.
    pub fn schedule(&self) -> Schedule {
        Schedule { shape: self.optim.schedule, warmup: self.optim.warmup, decay: self.optim.decay, end: self.optim.end }
    }
    /// Checks ranges that types can't express.
    pub fn validate(&self) -> Result<()> {
        let wrong =
            |key: &str, expected: &str, found: &dyn std::fmt::Display| Err(Error::Usage(format!("{key}: expected {expected}, found {found}")));
        match self.budget()? {
            Budget::Minutes(m) if !(m.is_finite() && m > 0.0) => return wrong("train.minutes", "a positive number", &m),
            Budget::Tokens(0) => return wrong("train.tokens", "a positive number", &0),
            Budget::Steps(0) => return wrong("train.steps", "a positive number", &0),
            _ => {}
        }
        self.model.validate().map_err(|e| Error::Usage(format!("model: {e}")))?;
        let (d, o) = (&self.data, &self.optim);
        self.tasks.validate(self.model.vocab_size, d.seq_len)?;
        for (key, v) in [
            ("data.seq_len", d.seq_len),
            ("data.batch", d.batch),
            ("train.accumulate", self.train.accumulate),
            ("checkpoint.keep", self.checkpoint.keep),
        ] {
            if v == 0 {
                return wrong(key, "at least 1", &v);
            }
        }
        // A step's token count also indexes packed sequences as u32, and times the number of steps the text as u64.
        let step = d.seq_len.checked_mul(d.batch).and_then(|n| n.checked_mul(self.train.accumulate));
        if step.is_none_or(|n| n > 1 << 30) {
            let found = format!("{} x {} x {}", d.seq_len, d.batch, self.train.accumulate);
            return wrong("data.seq_len x data.batch x train.accumulate", "at most 2^30 tokens a step", &found);
        }
        if self.sample.count > 0 && self.sample.prompt.is_empty() {
            return wrong("sample.prompt", "at least one byte of text (or sample.count = 0)", &"an empty text");
        }
        if self.sample.tokens > MOST_TOKENS {
            return wrong("sample.tokens", &format!("at most {MOST_TOKENS}"), &self.sample.tokens);
        }
        if self.name.is_empty() || self.name.starts_with('.') || self.name.contains(['/', '\\']) {
            return wrong("name", "a name for the run's folder: not empty, no slash, no dot in front", &format!("`{}`", self.name));
        }
        if !(0.0..1.0).contains(&d.held_out) {
            return wrong("data.held_out", "at least 0 and below 1", &d.held_out);
        }
        for (key, v) in [("optim.warmup", o.warmup), ("optim.decay", o.decay), ("optim.end", o.end)] {
            if !(0.0..=1.0).contains(&v) {
                return wrong(key, "a part of the budget, from 0 to 1", &v);
            }
        }
        for (key, v) in [("optim.beta1", o.beta1), ("optim.beta2", o.beta2)] {
            if !(0.0..1.0).contains(&v) {
                return wrong(key, "at least 0 and below 1", &v);
            }
        }
        for (key, v) in [
            ("optim.lr", o.lr),
            ("optim.weight_decay", o.weight_decay),
            ("optim.clip", o.clip),
            ("optim.eps", o.eps),
            ("sample.temperature", self.sample.temperature),
        ] {
            if !(v.is_finite() && v >= 0.0) {
                return wrong(key, "a finite number, not negative", &v);
            }
        }
        Ok(())
    }
}
