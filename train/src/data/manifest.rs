//! A folder of token shards: `manifest.json`, `shard-00000.bin`, …, and the `tokenizer.json` that made them.

use super::shard::{Shard, is_wide};
use super::{Corpus, Store};
use crate::checkpoint::Written;
use crate::text::Codec;
use crate::text::tokenizer::{self, Tokenizer};
use crate::{Error, Result, checkpoint};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file's name in its folder.
pub const MANIFEST: &str = "manifest.json";
/// What `format` says.
pub const FORMAT: &str = "tidegate tokens 1";

/// `manifest.json`. While the folder is being filled, `complete` is false, and the file says how far it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The form of this file: `tidegate tokens 1`.
    pub format: String,
    /// Whether all input is in the shards.
    pub complete: bool,
    /// `uint16` or `uint32`.
    pub dtype: String,
    /// One past the tokenizer's largest token.
    pub vocab_size: u32,
    /// The token that ends each document.
    pub eot: u32,
    /// Whether special tokens that the text spells out are themselves.
    pub parse_special: bool,
    /// Tokens in each shard but the last.
    pub shard_tokens: u64,
    /// Tokens in all, documents' ends among them.
    pub tokens: u64,
    /// Bytes of text in all.
    pub bytes: u64,
    /// Documents in all.
    pub documents: u64,
    /// `bytes` over `tokens`.
    pub bytes_per_token: f64,
    /// The folder's `tokenizer.json`.
    pub tokenizer: Written,
    /// The shards, in order.
    pub shards: Vec<Finished>,
    /// What was read, in order.
    pub inputs: Vec<Input>,
}

/// A shard that is whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// File name.
    pub file: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Bytes of text read up to its end, from the beginning.
    pub bytes_through: u64,
    /// Documents begun up to its end, from the beginning.
    pub documents_through: u64,
    /// Where the next begins.
    pub next: Position,
    /// The file as it was written.
    pub written: Written,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Input {
    /// Where it was.
    pub path: PathBuf,
    /// The file as it was.
    pub read: Written,
}

/// A place in the inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Which input.
    pub file: usize,
    /// Byte offset of the document in it.
    pub document: u64,
    /// Byte offset of the part of the document that is encoded at once.
    pub within: u64,
    /// Tokens of that part that lie before this place.
    pub tokens: u64,
}

/// Whether a folder holds tokens, or would if it were whole.
pub(super) fn is_here(dir: &Path) -> bool {
    let manifest = dir.join(MANIFEST);
    manifest.is_file() && (dir.join("shard-00000.bin").is_file() || read(dir).is_ok())
}

/// Reads a folder's manifest.
pub fn read(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST);
    let text = std::fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    let m: Manifest = serde_json::from_str(&text)
        .map_err(|e| Error::data(&path, format!("is damaged, or no manifest of tokens: {e}; tokenize into a new folder")))?;
    if m.format != FORMAT {
        return Err(Error::data(&path, format!("expected the format `{FORMAT}`, found `{}`", m.format)));
    }
    Ok(m)
}

/// Opens a folder of tokens as one stream.
pub(super) fn open(dir: &Path) -> Result<Corpus> {
    let m = read(dir)?;
    if !m.complete {
        let n = m.shards.len();
        return Err(Error::data(dir, format!("is not filled yet ({n} shards are whole); give its `tidegate tokenize encode` again, which goes on")));
    }
    let path = dir.join(tokenizer::FILE);
    if checkpoint::written(&path)? != m.tokenizer {
        return Err(Error::data(&path, "is not the tokenizer that made the shards beside it; put that back"));
    }
    let tokenizer = Tokenizer::open(&path)?;
    let (mut shards, mut len) = (vec![], 0);
    for finished in &m.shards {
        let path = dir.join(&finished.file);
        let s = Shard::open(&path, len)?;
        let found = (s.len as u64, s.vocab_size, s.eot);
        if found != (finished.tokens, m.vocab_size as usize, Some(m.eot)) {
            let (there, here) = (finished.tokens, found.0);
            return Err(Error::data(&path, format!("is not the shard of this folder's manifest ({there} tokens there, {here} here); copy it again")));
        }
        len += s.len;
        shards.push(s);
    }
    if len as u64 != m.tokens || m.vocab_size as usize != tokenizer.vocab_size() || m.eot >= m.vocab_size || m.dtype != dtype(m.vocab_size) {
        return Err(Error::data(&dir.join(MANIFEST), "contradicts itself; tokenize into a new folder"));
    }
    Ok(Corpus { store: Store::Shards(shards), len, eot: Some(m.eot), path: dir.into(), codec: Some(Codec::Tokenizer(Arc::new(tokenizer))) })
}

/// The name of the type that a vocabulary's tokens are written in.
pub(crate) fn dtype(vocab_size: u32) -> String {
    if is_wide(vocab_size) { "uint32".into() } else { "uint16".into() }
}
