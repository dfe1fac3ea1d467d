//! Measures of a checkpoint: where attention looks, what gates let through, how large activations become, what a state holds. `docs/measures.md` lists
//! them with their definitions and sources.

mod activations;
mod attention;
mod delta;
mod gates;
mod hybrid;
mod keys;
mod losses;
mod more_types;
mod names;
mod numbers;
mod pass;
mod passage;
mod ranks;
mod router;
mod scalars;
mod sdpa;
mod spikes;
mod stable;
mod svd;
mod table;
mod types;
mod watch;

pub use names::{NAMES, check_names, had_by};
pub use pass::measure;
pub use passage::{Passage, PassageLayer, passage};
pub use spikes::{Found, Spikes, losses, series, spikes};
pub use stable::{RISE, StableLr, Trial, WORSE, max_stable_lr, rise};
pub(crate) use table::aligned;
pub use types::*;

use crate::text::Codec;
use crate::{Error, Result};
use std::path::Path;

/// The measures' file name in a run folder.
pub const FILE: &str = "measures.json";
/// The file name of what became of a needle.
pub const PASSAGE: &str = "passage.json";
/// The version of the format.
pub const FORMAT: u32 = 1;

/// How to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most tokens that each pass over the text reads (but one window is read in any case).
    pub tokens: usize,
    /// Tokens in a window: the training length.
    pub seq_len: usize,
    /// Tokens of the windows that the loss by position is taken in, if the text has as many; none: 8 times the training length.
    pub context: Option<usize>,
    /// Names of [`NAMES`]; none for all that the model has something of.
    pub only: Vec<String>,
    /// The text that gates are traced along; none for the first 200 tokens of what is measured on.
    pub trace_text: Option<String>,
    /// How tokens are text, where the corpus doesn't know.
    pub codec: Option<Codec>,
}

impl Options {
    /// All measures over 32768 tokens, in windows of `seq_len`.
    pub fn new(seq_len: usize) -> Options {
        Options { tokens: 1 << 15, seq_len, context: None, only: vec![], trace_text: None, codec: None }
    }
}

impl Measures {
    /// Reads a `measures.json`.
    pub fn read(path: &Path) -> Result<Measures> {
        let text = std::fs::read(path).map_err(Error::io("reading", path))?;
        let wrong = |why: String| Error::Usage(format!("{}: {why}; write it anew with `tidegate measure`", path.display()));
        let m: Measures = serde_json::from_slice(&text).map_err(|e| wrong(format!("is no file of measures: {e}")))?;
        if m.format != FORMAT {
            return Err(wrong(format!("its format is {}, this tidegate reads {FORMAT}", m.format)));
        }
        Ok(m)
    }
    /// Writes it as a whole: a reader finds the one before, or this.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Model(format!("{}: {e}", path.display())))?;
        crate::checkpoint::write(path, format!("{text}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests;
