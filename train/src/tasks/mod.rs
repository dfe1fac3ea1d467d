//! Generated tasks: to train on, as part of a run's windows or all of them, and to evaluate any model by.
//!
//! A sample is a function of (seed, index) and the settings. `docs/tasks.md` says what each task is, and after which paper.

mod copying;
mod draw;
mod evaluate;
mod follow;
pub mod held_out;
mod mqar;
mod needle;
mod niah;
mod report;
mod score;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod words;

pub use draw::Draw;
pub use evaluate::{Options, check, evaluate};
pub use follow::{check_passage, follow};
pub use niah::{ANSWER, Prose};
pub use report::{Cell, EvalReport, FILE, TaskReport, length_name};
pub use score::Answer;
pub(crate) use score::answers;
pub use settings::{Filler, Induction, Mix, Mqar, Needle, SelectiveCopy, Settings};
pub use stream::Source;

use crate::data::Corpus;
use crate::{Error, Result, rng};
use std::fmt;
use std::ops::Range;

/// The label of a position where nothing is asked.
pub const IGNORE: i64 = ops::linear_cross_entropy::IGNORE;

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Multi-query associative recall.
    Mqar,
    /// A single needle, in tokens.
    Needle,
    /// Selective copying.
    SelectiveCopy,
    /// Induction heads.
    Induction,
    /// RULER's single needle 1, 2 or 3, in English.
    Niah(u8),
}

impl Task {
    /// The tasks made of tokens, which can be trained on.
    pub const GENERATED: [Task; 4] = [Task::Mqar, Task::Needle, Task::SelectiveCopy, Task::Induction];
    /// All tasks.
    pub const ALL: [Task; 7] = [Task::Mqar, Task::Needle, Task::SelectiveCopy, Task::Induction, Task::Niah(1), Task::Niah(2), Task::Niah(3)];

    /// What it is called where it is asked for.
    pub fn name(self) -> &'static str {
        match self {
            Task::Mqar => "mqar",
            Task::Needle => "needle",
            Task::SelectiveCopy => "selective-copy",
            Task::Induction => "induction",
            Task::Niah(1) => "niah-1",
            Task::Niah(2) => "niah-2",
            Task::Niah(_) => "niah-3",
        }
    }
    /// The task of that name.
    pub fn by_name(name: &str) -> Result<Task> {
        Task::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| {
            let names = || Task::ALL.iter().map(|t| t.name());
            let hint = nn::nearest(name, names()).map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            Error::Usage(format!("no task is called `{name}`{hint}; the tasks are {}", names().collect::<Vec<_>>().join(", ")))
        })
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is fixed of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Its tokens.
    pub length: usize,
    /// Of `mqar`: pairs.
    pub pairs: Option<usize>,
    /// Of `needle`: its difficulty.
    pub difficulty: Option<usize>,
    /// Of `needle`: the part of the haystack before it, from 0 to 1; none: drawn.
    pub depth: Option<f64>,
}

/// Tokens, and what is asked at each: a token, or [`IGNORE`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What is read.
    pub tokens: Vec<u32>,
    /// What should follow, by position.
    pub labels: Vec<i64>,
}

impl Sample {
    /// How many labels there are.
    pub fn asked(&self) -> usize {
        self.labels.iter().filter(|l| **l != IGNORE).count()
    }
}

/// Text to hide needles in: a range of a corpus.
#[derive(Clone, Debug)]
pub struct Haystack<'a> {
    /// The text.
    pub corpus: &'a Corpus,
    /// The part of it that may be used.
    pub range: Range<usize>,
}

/// Sample `index` of a token-level task for a model with `vocab` tokens: a function of all that is given. `text` is what `needle` may be hidden in.
///
/// # Errors
///
/// Settings that [`Settings::check`] refuses; a point that is none of [`Settings::points`]; text that is missing.
pub fn generate(task: Task, settings: &Settings, vocab: usize, text: Option<&Haystack>, point: &Point, seed: u64, index: u64) -> Result<Sample> {
    let mut own = settings.clone();
    own.lengths_mut(task).ok_or_else(|| Error::Usage(format!("{task} is made of English, not of tokens")))?.splice(.., [point.length]);
    own.check(task, vocab)?;
    if !settings.points(task, point.length).contains(&Point { depth: None, ..*point }) || point.depth.is_some_and(|d| !(0.0..=1.0).contains(&d)) {
        return Err(Error::Usage(format!("{task}: its settings have no samples with {point:?}")));
    }
    draw(task, settings, vocab, text, point, &mut Draw::new(seed, rng::stream::SAMPLES, index))
}

/// The same, of settings and a point that are checked, with random numbers from anywhere.
fn draw(task: Task, settings: &Settings, vocab: usize, text: Option<&Haystack>, point: &Point, d: &mut Draw) -> Result<Sample> {
    let (vocab, length) = (settings.vocab(task, vocab), point.length);
    match task {
        Task::Mqar => Ok(mqar::sample(&settings.mqar, vocab, length, point.pairs.unwrap_or(1), d)),
        Task::Needle => needle::sample(&settings.needle, vocab, text, point, d),
        Task::SelectiveCopy => Ok(copying::selective(&settings.selective_copy, length, d)),
        Task::Induction => Ok(copying::induction(&settings.induction, length, d)),
        Task::Niah(_) => Err(Error::Usage(format!("{task} is made of English, not of tokens"))),
    }
}
