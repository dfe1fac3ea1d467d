//! Measures of a checkpoint: where attention looks, what gates let through, how large activations become, what a state holds. `docs/measures.md` lists
//! them with their definitions and sources.

mod more_types;
mod numbers;
mod scalars;
mod types;

pub use types::*;

use crate::{Error, Result};
use std::path::Path;

/// The measures' file name in a run folder.
pub const FILE: &str = "measures.json";
/// The version of the format.
pub const FORMAT: u32 = 1;

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
