//! What an evaluation found: `eval.json`, its scalars, and a table.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file's name in a run folder.
pub const FILE: &str = "eval.json";
const FORMAT: u32 = 1;

/// Tasks that a checkpoint was evaluated by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// The form of this file: 1.
    pub format: u32,
    /// Where the checkpoint is.
    pub checkpoint: String,
    /// Steps that it was trained for, where it says.
    pub step: Option<u64>,
    /// The seed of the samples.
    pub seed: u64,
    /// Each task once.
    pub tasks: Vec<TaskReport>,
}

/// One task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Its name.
    pub task: String,
    /// Its settings.
    pub settings: serde_json::Value,
    /// Samples in all.
    pub samples: usize,
    /// What was asked, setting by setting.
    pub cells: Vec<Cell>,
    /// Accuracies by name, means over cells (see [`EvalReport::scalars`]).
    pub scalars: BTreeMap<String, f64>,
}

/// Samples of one setting; keys that a task doesn't have are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Tokens of a sample.
    pub length: usize,
    /// The part of the haystack before the needle, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Pairs of keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs: Option<usize>,
    /// The needle's difficulty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difficulty: Option<usize>,
    /// Samples.
    pub samples: usize,
    /// Answers that were asked for: of a needle one a sample, however many tokens it has; else one a label.
    pub answers: usize,
    /// Those that were right.
    pub correct: usize,
    /// `correct` over `answers`.
    pub accuracy: f64,
    /// The mean negative log-likelihood of the labels, nats; English tasks have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
}

/// A length as it is written in names: `1k` is 1024 tokens.
pub fn length_name(length: usize) -> String {
    if length > 0 && length.is_multiple_of(1024) { format!("{}k", length / 1024) } else { length.to_string() }
}

fn mean<'a>(cells: impl Iterator<Item = &'a Cell>) -> Option<f64> {
    let all: Vec<f64> = cells.map(|c| c.accuracy).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

/// What is told of a cell besides its length and depth.
fn kind(c: &Cell) -> Option<String> {
    c.pairs.map(|p| format!("pairs-{p}")).or(c.difficulty.map(|d| format!("difficulty-{d}")))
}

/// `task`, `task.LENGTH`; and where there are cells of several kinds, `task.KIND` and `task.KIND.LENGTH`.
pub(super) fn scalars(task: &str, cells: &[Cell]) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    let mut kinds: Vec<Option<String>> = cells.iter().map(kind).collect();
    kinds.sort();
    kinds.dedup();
    let groups = if kinds.len() > 1 { [vec![None], kinds].concat() } else { vec![None] };
    for group in groups {
        let of = |c: &&Cell| group.is_none() || kind(c) == group;
        let name = group.iter().fold(task.to_string(), |name, kind| format!("{name}.{kind}"));
        for length in cells.iter().filter(of).map(|c| c.length) {
            out.extend(mean(cells.iter().filter(of).filter(|c| c.length == length)).map(|a| (format!("{name}.{}", length_name(length)), a)));
        }
        out.extend(mean(cells.iter().filter(of)).map(|a| (name, a)));
    }
    out
}

impl EvalReport {
    /// An empty report.
    pub(super) fn new(seed: u64) -> EvalReport {
        EvalReport { format: FORMAT, checkpoint: String::new(), step: None, seed, tasks: vec![] }
    }
    /// All tasks' accuracies, from 0 to 1, by name: `needle` is the mean over cells, `needle.1k` over those of 1024 tokens; with several numbers of pairs or several
    /// difficulties, also `mqar.pairs-8`, `mqar.pairs-8.64`, `needle.difficulty-3`, `needle.difficulty-3.1k`.
    pub fn scalars(&self) -> BTreeMap<String, f64> {
        self.tasks.iter().flat_map(|t| t.scalars.clone()).collect()
    }
    /// Reads a report back.
    pub fn read(path: &Path) -> Result<EvalReport> {
        let text = std::fs::read(path).map_err(Error::io("reading", path))?;
        let wrong = |why: String| Error::Usage(format!("{}: {why}; remove it, or name another file by --out", path.display()));
        let r: EvalReport = serde_json::from_slice(&text).map_err(|e| wrong(format!("is no report of an evaluation: {e}")))?;
        if r.format != FORMAT {
            return Err(wrong(format!("its format is {}, this tidegate reads {FORMAT}", r.format)));
        }
        Ok(r)
    }
    /// Writes it to `path`, together with the other tasks of a report of the same checkpoint and seed that is there. A report of others is put aside; where, is returned.
    pub fn write(&self, path: &Path) -> Result<Option<PathBuf>> {
        let (mut all, mut aside) = (self.clone(), None);
        if path.is_file() {
            let old = EvalReport::read(path)?;
            if (&old.checkpoint, old.step, old.seed) == (&self.checkpoint, self.step, self.seed) {
                all.tasks = old.tasks.into_iter().filter(|t| self.tasks.iter().all(|new| new.task != t.task)).collect();
                all.tasks.extend(self.tasks.iter().cloned());
            } else {
                let step = old.step.map(|s| format!("step-{s}-")).unwrap_or_default();
                let to = path.with_extension(format!("{step}seed-{}.json", old.seed));
                std::fs::rename(path, &to).map_err(Error::io("renaming", path))?;
                aside = Some(to);
            }
        }
        let text = serde_json::to_string_pretty(&all).map_err(|e| Error::Model(format!("{}: {e}", path.display())))?;
        crate::checkpoint::write(path, format!("{text}\n").as_bytes())?;
        Ok(aside)
    }
    /// What `tidegate eval` prints: a line for each length and kind, with accuracy by quarters of depth where there are depths.
    pub fn table(&self) -> String {
        let heads = ["task", "", "length", "samples", "accuracy", "loss", "depth 0-25%", "25-50%", "50-75%", "75-100%"];
        let mut rows: Vec<Vec<String>> = vec![];
        for t in &self.tasks {
            let mut lines: Vec<(Option<String>, usize)> = vec![];
            for c in &t.cells {
                if !lines.contains(&(kind(c), c.length)) {
                    lines.push((kind(c), c.length));
                }
            }
            for (of, length) in lines {
                let cells: Vec<&Cell> = t.cells.iter().filter(|c| c.length == length && kind(c) == of).collect();
                let percent = |x: Option<f64>| x.map(|x| format!("{:.1}%", 100.0 * x)).unwrap_or_default();
                let losses: Vec<f64> = cells.iter().filter_map(|c| c.loss).collect();
                let loss = if losses.is_empty() { String::new() } else { format!("{:.3}", losses.iter().sum::<f64>() / losses.len() as f64) };
                let samples = cells.iter().map(|c| c.samples).sum::<usize>().to_string();
                let mut row = vec![t.task.clone(), of.unwrap_or_default(), length_name(length), samples, percent(mean(cells.iter().copied())), loss];
                row.extend((0..4).map(|quarter| {
                    let within = |d: f64| ((4.0 * d) as usize).min(3) == quarter;
                    percent(mean(cells.iter().copied().filter(|c| c.depth.is_some_and(within))))
                }));
                rows.push(row);
            }
        }
        crate::measure::aligned(&heads, &rows, 2)
    }
}
