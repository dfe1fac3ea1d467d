//! Batches as a pure function of (seed, step, micro-batch), and held-out windows.

use super::Corpus;
use crate::{Error, Result, rng};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How windows of text become rows of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// `[B, T]` windows; a window may run over a document's end.
    #[default]
    Windows,
    /// One packed row `[1, B * T]` whose `cu_seqlens` start anew at each window and at each document, so that neither attention nor a
    /// recurrent state crosses a boundary.
    Documents,
}

/// Tokens and the tokens that follow them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Inputs, `rows * time`, row by row.
    pub tokens: Vec<u32>,
    /// What should follow each input, -100 where nothing is asked. Of text that is the next token; at a document's end, the next document's first.
    pub targets: Vec<i64>,
    /// Number of rows.
    pub rows: usize,
    /// Length of a row.
    pub time: usize,
    /// Starts of the sequences in a packed row, and its length at the end; none for plain windows.
    pub cu_seqlens: Option<Vec<u32>>,
}

impl Batch {
    /// Windows behind one another in one row, apart from each other.
    pub(crate) fn packed(parts: impl IntoIterator<Item = Part>) -> Batch {
        let (mut tokens, mut targets, mut cu) = (vec![], vec![], vec![]);
        for p in parts {
            cu.extend(p.starts.iter().map(|s| (tokens.len() + s) as u32));
            tokens.extend(p.tokens);
            targets.extend(p.targets);
        }
        cu.push(tokens.len() as u32);
        Batch { rows: 1, time: tokens.len(), tokens, targets, cu_seqlens: Some(cu) }
    }
    /// How many positions ask for something.
    pub fn asked(&self) -> usize {
        self.targets.iter().filter(|t| **t >= 0).count()
    }
}

/// A window of a packed row.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub tokens: Vec<u32>,
    pub targets: Vec<i64>,
    /// Where sequences begin in it: at 0, and further on.
    pub starts: Vec<usize>,
}

impl Part {
    /// A window of a corpus.
    pub fn of(corpus: &Corpus, w: &Range<usize>, packing: Packing) -> Part {
        let mut tokens = Vec::with_capacity(w.len() + 1);
        corpus.read(w.start..w.end + 1, &mut tokens);
        let targets = tokens[1..].iter().map(|t| i64::from(*t)).collect();
        tokens.truncate(w.len());
        let mut starts = vec![0];
        if packing == Packing::Documents {
            starts.extend(corpus.document_starts(w.clone(), &tokens).iter().map(|s| s - w.start));
        }
        Part { tokens, targets, starts }
    }
}

fn batch(corpus: &Corpus, windows: &[Range<usize>], packing: Packing) -> Batch {
    let time = windows.first().map_or(0, |w| w.len());
    let packed = Batch::packed(windows.iter().map(|w| Part::of(corpus, w, packing)));
    match packing {
        Packing::Windows => Batch { rows: windows.len(), time, cu_seqlens: None, ..packed },
        Packing::Documents => packed,
    }
}

/// Training batches: a pure function of (seed, step, micro-batch).
///
/// Each epoch cuts the text into disjoint windows of `time` tokens from an offset of its own, and visits them in an order of its own, so
/// that every token is seen once an epoch (but for less than a window at each end) and windows begin everywhere over the epochs.
#[derive(Clone, Debug)]
pub struct Sampler {
    range: Range<usize>,
    seed: u64,
    rows: usize,
    time: usize,
    micro: u64,
    packing: Packing,
}

impl Sampler {
    /// A sampler of `micro` batches of `rows` windows of `time` tokens a step, from `range` of `corpus`.
    pub fn new(corpus: &Corpus, range: Range<usize>, seed: u64, rows: usize, time: usize, micro: usize, packing: Packing) -> Result<Sampler> {
        if rows == 0 || time == 0 || micro == 0 {
            return Err(Error::Usage(format!("a step needs at least one row, token and micro-batch; found {rows} x {time} x {micro}")));
        }
        if range.len() < time + 1 {
            let n = range.len();
            return Err(Error::data(corpus.path(), format!("{n} tokens to train on, a window needs {}: lower `data.seq_len`", time + 1)));
        }
        Ok(Sampler { range, seed, rows, time, micro: micro as u64, packing })
    }

    fn offsets(&self) -> u64 {
        self.time.min(self.range.len() - self.time) as u64
    }
    /// Windows in an epoch.
    pub fn windows_per_epoch(&self) -> u64 {
        (self.range.len() as u64 - self.offsets()) / self.time as u64
    }
    /// Tokens a step trains on.
    pub fn tokens_per_step(&self) -> u64 {
        (self.rows * self.time) as u64 * self.micro
    }
    /// The window of row `row` of micro-batch `micro` of step `step`; its targets are one token further.
    pub fn window(&self, step: u64, micro: u64, row: u64) -> Range<usize> {
        self.at((step * self.micro + micro) * self.rows as u64 + row)
    }
    /// Window `i` since the beginning.
    pub(crate) fn at(&self, i: u64) -> Range<usize> {
        let n = self.windows_per_epoch();
        let (epoch, i) = (i / n, i % n);
        let offset = rng::below(self.seed, rng::stream::OFFSET, epoch, self.offsets());
        let start = self.range.start + offset as usize + rng::permute(self.seed, epoch, n, i) as usize * self.time;
        start..start + self.time
    }
    /// Micro-batch `micro` of step `step`.
    pub fn batch(&self, corpus: &Corpus, step: u64, micro: u64) -> Batch {
        let windows: Vec<_> = (0..self.rows as u64).map(|r| self.window(step, micro, r)).collect();
        batch(corpus, &windows, self.packing)
    }
}

/// Consecutive windows of held-out text: each token of the range is a target exactly once. The token before the range (the last that was
/// trained on) is the first input; at the very start of a corpus the first token has no context and isn't scored.
#[derive(Clone, Debug)]
pub struct EvalWindows {
    next: usize,
    end: usize,
    rows: usize,
    time: usize,
    packing: Packing,
}

impl EvalWindows {
    /// Windows over `range`, at most `max_tokens` of it when that is not 0.
    pub fn new(range: Range<usize>, rows: usize, time: usize, max_tokens: usize, packing: Packing) -> EvalWindows {
        let first = range.start.max(1);
        let end = if max_tokens > 0 { range.end.min(first.saturating_add(max_tokens)) } else { range.end };
        EvalWindows { next: first - 1, end: end.saturating_sub(1).max(first - 1), rows: rows.max(1), time: time.max(1), packing }
    }
    /// The next batch: full windows, then what is left in one shorter row.
    pub fn next_batch(&mut self, corpus: &Corpus) -> Option<Batch> {
        let left = self.end - self.next;
        if left == 0 {
            return None;
        }
        let (rows, time) = if left >= self.time { ((left / self.time).min(self.rows), self.time) } else { (1, left) };
        let windows: Vec<_> = (0..rows).map(|r| self.next + r * time..self.next + (r + 1) * time).collect();
        self.next += rows * time;
        Some(batch(corpus, &windows, self.packing))
    }
}

#[cfg(test)]
pub(super) fn packed(corpus: &Corpus, windows: &[Range<usize>]) -> Batch {
    batch(corpus, windows, Packing::Documents)
}
