//! Training text: byte-level from any UTF-8 file or folder, or token shards, with document boundaries and a held-out tail.

mod load;
mod sampler;
mod shard;
#[cfg(test)]
mod tests;

pub use sampler::{Batch, EvalWindows, Packing, Sampler};
pub use shard::{HEADER_BYTES, MAGIC_U16, MAGIC_U32, write_shard};

use crate::{Error, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The repository's own text, inside the program, so that `tidegate train quickstart` works from any folder.
pub static MOBY_DICK: &[u8] = include_bytes!("../../../data/moby-dick.txt");
/// The path under which configurations name [`MOBY_DICK`].
pub const MOBY_DICK_PATH: &str = "data/moby-dick.txt";

/// Where tokens lie.
#[derive(Debug)]
enum Store {
    Static(&'static [u8]),
    Bytes(Vec<u8>),
    /// A memory-mapped token shard; `start` is the first token's byte offset.
    Shard {
        map: memmap2::Mmap,
        start: usize,
        wide: bool,
    },
}

/// A stream of tokens with document boundaries.
#[derive(Debug)]
pub struct Corpus {
    store: Store,
    len: usize,
    /// Start of every document after the first (bytes); shards find theirs by `eot`.
    starts: Vec<usize>,
    eot: Option<u32>,
    path: PathBuf,
}

impl Corpus {
    /// Opens a UTF-8 text file, a `.jsonl` file (one object with a `text` field a line, each a document), a folder of them (each file a
    /// document, sorted by path), or a `.bin` token shard (see [`write_shard`]). [`MOBY_DICK_PATH`] falls back to the copy inside the program.
    ///
    /// `eot` is the end-of-text token that ends documents in a shard whose header doesn't say; it has no meaning for text.
    pub fn open(path: &Path, eot: Option<u32>) -> Result<Corpus> {
        if path == Path::new(MOBY_DICK_PATH) && !path.exists() {
            return Ok(Corpus { store: Store::Static(MOBY_DICK), len: MOBY_DICK.len(), starts: vec![], eot: None, path: path.into() });
        }
        let corpus = match path.extension().and_then(|e| e.to_str()) {
            Some("bin") if path.is_file() => shard::open(path, eot)?,
            _ => load::open(path)?,
        };
        if corpus.len < 2 {
            let n = corpus.len;
            return Err(Error::data(path, format!("holds {n} tokens; at least 2 are needed: is this the right file?")));
        }
        Ok(corpus)
    }

    /// A corpus from text in memory, one document an element.
    pub fn from_documents<S: AsRef<str>>(documents: &[S]) -> Corpus {
        let (mut bytes, mut starts) = (Vec::new(), Vec::new());
        for d in documents.iter().map(AsRef::as_ref).filter(|d| !d.is_empty()) {
            if !bytes.is_empty() {
                starts.push(bytes.len());
            }
            bytes.extend_from_slice(d.as_bytes());
        }
        Corpus { len: bytes.len(), store: Store::Bytes(bytes), starts, eot: None, path: PathBuf::from("memory") }
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Whether a token is a byte of text (else an id of a shard).
    pub fn is_bytes(&self) -> bool {
        !matches!(self.store, Store::Shard { .. })
    }
    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Whether this is the repository's own Moby-Dick, byte for byte.
    pub fn is_moby_dick(&self) -> bool {
        match &self.store {
            Store::Static(_) => true,
            Store::Bytes(b) => b.as_slice() == MOBY_DICK,
            Store::Shard { .. } => false,
        }
    }

    /// Appends the tokens of `range` to `out`.
    pub fn read(&self, range: Range<usize>, out: &mut Vec<u32>) {
        match &self.store {
            Store::Static(b) => out.extend(b[range].iter().map(|&b| u32::from(b))),
            Store::Bytes(b) => out.extend(b[range].iter().map(|&b| u32::from(b))),
            Store::Shard { map, start, wide: false } => {
                let bytes = &map[start + 2 * range.start..start + 2 * range.end];
                out.extend(bytes.chunks_exact(2).map(|c| u32::from(u16::from_le_bytes([c[0], c[1]]))));
            }
            Store::Shard { map, start, wide: true } => {
                let bytes = &map[start + 4 * range.start..start + 4 * range.end];
                out.extend(bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])));
            }
        }
    }

    /// Starts of documents strictly inside `range`, whose tokens are `tokens`.
    fn document_starts(&self, range: Range<usize>, tokens: &[u32]) -> Vec<usize> {
        if let Some(eot) = self.eot {
            let inside = tokens.len().saturating_sub(1);
            return tokens[..inside].iter().enumerate().filter(|&(_, &t)| t == eot).map(|(i, _)| range.start + i + 1).collect();
        }
        let first = self.starts.partition_point(|&s| s <= range.start);
        self.starts[first..].iter().copied().take_while(|&s| s < range.end).collect()
    }

    /// Splits by position: the last `held_out` of the tokens are never trained on. Returns (training, held-out).
    pub fn split(&self, held_out: f64) -> (Range<usize>, Range<usize>) {
        let cut = (self.len as f64 * (1.0 - held_out)) as usize;
        let cut = cut.clamp(1, self.len);
        (0..cut, cut..self.len)
    }
}
