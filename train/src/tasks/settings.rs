//! The settings of tasks: the section `[tasks]` of a run's configuration.

use super::{Point, Task};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Tasks as part of a run's text, and each task's settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The part of all windows that are generated tasks, from 0 to 1; the rest is text.
    pub share: f64,
    /// How often each task is drawn.
    pub mix: Mix,
    /// Multi-query associative recall.
    pub mqar: Mqar,
    /// A single needle.
    pub needle: Needle,
    /// Selective copying.
    #[serde(rename = "selective-copy")]
    pub selective_copy: SelectiveCopy,
    /// Induction.
    pub induction: Induction,
}

/// Weights of tasks in a mixture; they need not sum to 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mix {
    /// Of `mqar`.
    pub mqar: f64,
    /// Of `needle`.
    pub needle: f64,
    /// Of `selective-copy`.
    #[serde(rename = "selective-copy")]
    pub selective_copy: f64,
    /// Of `induction`.
    pub induction: f64,
}

/// Settings of `mqar`; lists are drawn from evenly, and what does not fit (4 tokens for each pair) is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mqar {
    /// Tokens V: keys are 1 to V/2 − 1, values V/2 to V − 1. Not set: the model's vocabulary.
    pub vocab: Option<usize>,
    /// Pairs of a key and its value.
    pub pairs: Vec<usize>,
    /// Tokens of a sample, even.
    pub length: Vec<usize>,
    /// Exponent a of the gaps' density, which is in proportion to gap^(a − 1).
    pub power_a: f64,
    /// Whether the places between queries are random tokens; else they are 0.
    pub random_non_queries: bool,
}

/// What a needle lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filler {
    /// Random tokens.
    #[default]
    Random,
    /// The run's own text.
    Text,
}

/// Settings of `needle`; lists are drawn from evenly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Needle {
    /// Tokens V: 0 is the marker, keys are 1 to V/2 − 1, values V/2 to V − 1. Not set: the model's vocabulary.
    pub vocab: Option<usize>,
    /// 1: a short value in a repeated pattern; 2: a short value in `filler`; 3: a long value in `filler`.
    pub difficulty: Vec<usize>,
    /// Tokens of a sample.
    pub length: Vec<usize>,
    /// The haystack of difficulties 2 and 3.
    pub filler: Filler,
    /// Tokens of the pattern that difficulty 1 repeats.
    pub pattern: usize,
    /// Tokens of a short value.
    pub value: usize,
    /// Tokens of a long value.
    pub long_value: usize,
}

/// Settings of `selective-copy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SelectiveCopy {
    /// Tokens V: V − 1 asks for the copy, V − 2 is blank.
    pub vocab: usize,
    /// Tokens to copy.
    pub tokens: usize,
    /// Tokens of a sample, drawn from evenly.
    pub length: Vec<usize>,
}

/// Settings of `induction`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Induction {
    /// Tokens V: V − 1 is the special one.
    pub vocab: usize,
    /// Tokens of a sample, drawn from evenly.
    pub length: Vec<usize>,
}

impl Default for Mqar {
    /// The smallest setting of figure 2 of 2312.04927, with the model's vocabulary.
    fn default() -> Self {
        Mqar { vocab: None, pairs: vec![4], length: vec![64], power_a: 0.01, random_non_queries: true }
    }
}
impl Default for Needle {
    fn default() -> Self {
        Needle { vocab: None, difficulty: vec![2], length: vec![128], filler: Filler::Random, pattern: 16, value: 1, long_value: 8 }
    }
}
impl Default for SelectiveCopy {
    /// As 2403.17844 has it.
    fn default() -> Self {
        SelectiveCopy { vocab: 16, tokens: 16, length: vec![256] }
    }
}
impl Default for Induction {
    /// As 2312.00752 has it.
    fn default() -> Self {
        Induction { vocab: 16, length: vec![256] }
    }
}

impl Needle {
    /// Tokens of the value at a difficulty.
    pub(super) fn value_at(&self, difficulty: usize) -> usize {
        if difficulty == 3 { self.long_value } else { self.value }
    }
}

impl Settings {
    /// Tasks with a weight, and that.
    pub fn weights(&self) -> Vec<(Task, f64)> {
        let m = &self.mix;
        let all = [(Task::Mqar, m.mqar), (Task::Needle, m.needle), (Task::SelectiveCopy, m.selective_copy), (Task::Induction, m.induction)];
        all.into_iter().filter(|w| w.1 != 0.0).collect()
    }
    /// Whether a run reads nothing but tasks that need no text.
    pub fn alone(&self) -> bool {
        self.share >= 1.0 && !(self.mix.needle > 0.0 && self.reads_text(Task::Needle))
    }
    /// Whether samples of a task are made with text.
    pub fn reads_text(&self, task: Task) -> bool {
        task == Task::Needle && self.needle.filler == Filler::Text && self.needle.difficulty.iter().any(|d| *d > 1)
    }
    /// The lengths of a token-level task's samples.
    pub fn lengths(&self, task: Task) -> &[usize] {
        match task {
            Task::Mqar => &self.mqar.length,
            Task::Needle => &self.needle.length,
            Task::SelectiveCopy => &self.selective_copy.length,
            Task::Induction => &self.induction.length,
            Task::Niah(_) => &[],
        }
    }
    /// The same, to set them.
    pub fn lengths_mut(&mut self, task: Task) -> Option<&mut Vec<usize>> {
        match task {
            Task::Mqar => Some(&mut self.mqar.length),
            Task::Needle => Some(&mut self.needle.length),
            Task::SelectiveCopy => Some(&mut self.selective_copy.length),
            Task::Induction => Some(&mut self.induction.length),
            Task::Niah(_) => None,
        }
    }
    /// The settings of samples of `length` tokens, each as likely in training; none where none fits.
    pub fn points(&self, task: Task, length: usize) -> Vec<Point> {
        let point = Point { length, pairs: None, difficulty: None, depth: None };
        match task {
            Task::Mqar => self.mqar.pairs.iter().filter(|p| p.saturating_mul(4) <= length).map(|p| Point { pairs: Some(*p), ..point }).collect(),
            Task::Needle => {
                let fits = |d: &&usize| self.needle.value_at(**d).saturating_mul(2).saturating_add(4) <= length;
                self.needle.difficulty.iter().filter(fits).map(|d| Point { difficulty: Some(*d), ..point }).collect()
            }
            Task::SelectiveCopy | Task::Induction => vec![point],
            Task::Niah(_) => vec![],
        }
    }
    /// The tokens that a task uses, of a model's vocabulary.
    pub(super) fn vocab(&self, task: Task, model: usize) -> usize {
        match task {
            Task::Mqar => self.mqar.vocab.unwrap_or(model),
            Task::Needle => self.needle.vocab.unwrap_or(model),
            Task::SelectiveCopy => self.selective_copy.vocab,
            Task::Induction => self.induction.vocab,
            Task::Niah(_) => model,
        }
    }

    /// What is wrong with a run's section `tasks`, for a model with `vocab` tokens and windows of `seq_len`.
    pub fn validate(&self, vocab: usize, seq_len: usize) -> Result<()> {
        let wrong =
            |key: &str, expected: &str, found: &dyn std::fmt::Display| Err(Error::Usage(format!("tasks.{key}: expected {expected}, found {found}")));
        if !(0.0..=1.0).contains(&self.share) {
            return wrong("share", "a part of all windows, from 0 to 1", &self.share);
        }
        let weights = self.weights();
        if let Some((task, w)) = weights.iter().find(|(_, w)| !(w.is_finite() && *w > 0.0)) {
            return wrong(&format!("mix.{task}"), "a weight: a finite number, not negative", w);
        }
        if self.share == 0.0 {
            return Ok(());
        }
        if weights.is_empty() {
            let all: Vec<&str> = Task::GENERATED.iter().map(|t| t.name()).collect();
            return Err(Error::Usage(format!("tasks.share is {}, and tasks.mix names no task; give one of {} a weight", self.share, all.join(", "))));
        }
        for (task, _) in weights {
            self.check(task, vocab)?;
            if let Some(l) = self.lengths(task).iter().find(|l| **l > seq_len) {
                return wrong(&format!("{task}.length"), &format!("at most data.seq_len, {seq_len}"), l);
            }
        }
        Ok(())
    }

    /// What is wrong with a token-level task's settings, for a model with `vocab` tokens.
    pub fn check(&self, task: Task, vocab: usize) -> Result<()> {
        let wrong = |key: &str, expected: String, found: &dyn std::fmt::Display| {
            Err(Error::Usage(format!("tasks.{task}.{key}: expected {expected}, found {found}")))
        };
        let used = self.vocab(task, vocab);
        if used > vocab {
            return wrong("vocab", format!("at most the model's vocabulary of {vocab}"), &used);
        }
        let counts = match task {
            Task::Mqar => vec![("pairs", self.mqar.pairs.clone())],
            Task::Needle => {
                let n = &self.needle;
                vec![("difficulty", n.difficulty.clone()), ("pattern", vec![n.pattern]), ("value", vec![n.value]), ("long_value", vec![n.long_value])]
            }
            Task::SelectiveCopy => vec![("tokens", vec![self.selective_copy.tokens])],
            _ => vec![],
        };
        for (key, list) in counts.iter().map(|(k, l)| (*k, &l[..])).chain([("length", self.lengths(task))]) {
            if list.is_empty() || list.contains(&0) {
                return wrong(key, "one number or more, each at least 1".into(), &format!("{list:?}"));
            }
        }
        for length in self.lengths(task) {
            if *length > 1 << 30 {
                return wrong("length", "at most 2^30 tokens".into(), length);
            }
            if self.points(task, *length).is_empty() {
                let least = match task {
                    Task::Mqar => self.mqar.pairs.iter().min().unwrap_or(&1).saturating_mul(4),
                    _ => self.needle.value.min(self.needle.long_value).saturating_mul(2).saturating_add(4),
                };
                return wrong("length", format!("at least {least}, which the smallest of its samples takes"), length);
            }
        }
        match task {
            Task::Mqar => {
                if let Some(l) = self.mqar.length.iter().find(|l| !l.is_multiple_of(2)) {
                    return wrong("length", "even numbers".into(), l);
                }
                let most = *self.mqar.pairs.iter().max().unwrap_or(&1);
                if (used / 2).saturating_sub(1) < most {
                    return wrong("vocab", format!("at least {}, so that {most} keys differ", most.saturating_add(1).saturating_mul(2)), &used);
                }
                if !(self.mqar.power_a.is_finite() && self.mqar.power_a > 0.0) {
                    return wrong("power_a", "a positive number".into(), &self.mqar.power_a);
                }
            }
            Task::Needle => {
                if let Some(d) = self.needle.difficulty.iter().find(|d| **d > 3) {
                    return wrong("difficulty", "1, 2 or 3".into(), d);
                }
                if used < 4 {
                    return wrong("vocab", "at least 4: a marker, a key, two values".into(), &used);
                }
            }
            Task::SelectiveCopy => {
                let least = self.selective_copy.tokens.saturating_mul(2).saturating_add(2);
                if let Some(l) = self.selective_copy.length.iter().find(|l| **l < least) {
                    return wrong("length", format!("at least {least}: twice the tokens to copy, and 2"), l);
                }
                if used < 4 {
                    return wrong("vocab", "at least 4: two tokens to copy, blank, and what asks".into(), &used);
                }
            }
            Task::Induction => {
                if let Some(l) = self.induction.length.iter().find(|l| **l < 4) {
                    return wrong("length", "at least 4".into(), l);
                }
                if used < 3 {
                    return wrong("vocab", "at least 3".into(), &used);
                }
            }
            Task::Niah(_) => {}
        }
        Ok(())
    }
}
