//! Training text: byte-level from any UTF-8 file or folder, or token shards, with document boundaries and a held-out tail.

mod load;
mod sampler;
mod shard;
#[cfg(test)]
mod tests;
mod text;

pub use sampler::{Batch, EvalWindows, Packing, Sampler};
pub use shard::{HEADER_BYTES, MAGIC_U16, MAGIC_U32, write_shard};

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use text::{Bytes, Text};

/// The repository's own text, inside the program, so that `tidegate train quickstart` works from any folder.
pub static MOBY_DICK: &[u8] = include_bytes!("../../../data/moby-dick.txt");
/// The path under which configurations name [`MOBY_DICK`].
pub const MOBY_DICK_PATH: &str = "data/moby-dick.txt";

/// Where tokens lie.
#[derive(Debug)]
enum Store {
    Text(Text),
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
    /// The token that ends a shard's documents.
    eot: Option<u32>,
    path: PathBuf,
}

/// What tells one corpus from another, kept in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Length.
    pub tokens: u64,
    /// Of the tokens and the documents' starts; of long corpora, of 4096 blocks evenly spread.
    pub hash: u64,
    /// Whether a token is a byte of text.
    pub bytes: bool,
}

/// Maps a file.
fn map(path: &Path, file: &std::fs::File) -> Result<memmap2::Mmap> {
    // SAFETY: the mapping is only ever read as bytes, for which every content is valid; like every program that maps its data, we rely on
    // nobody truncating the file during the run.
    unsafe { memmap2::Mmap::map(file) }.map_err(Error::io("mapping", path))
}

impl Corpus {
    /// Opens a UTF-8 text file, a `.jsonl` file (one object with a `text` field a line, each a document), a folder of them (each file a
    /// document, sorted by path), or a `.bin` token shard (see [`write_shard`]). [`MOBY_DICK_PATH`] falls back to the copy inside the program.
    ///
    /// `eot` is the end-of-text token that ends documents in a shard whose header doesn't say; it has no meaning for text.
    pub fn open(path: &Path, eot: Option<u32>) -> Result<Corpus> {
        if path == Path::new(MOBY_DICK_PATH) && !path.exists() {
            return Ok(Corpus::of_documents([Bytes::Static(MOBY_DICK)], path));
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
        Corpus::of_documents(documents.iter().map(|d| Bytes::Owned(d.as_ref().into())), Path::new("memory"))
    }
    fn of_documents(documents: impl IntoIterator<Item = Bytes>, path: &Path) -> Corpus {
        let mut text = Text::default();
        documents.into_iter().for_each(|d| text.push(d));
        Corpus { len: text.len(), store: Store::Text(text), eot: None, path: path.into() }
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
        matches!(&self.store, Store::Text(text) if text.is(MOBY_DICK))
    }
    /// Tells this corpus from others; reads at most 64 MiB of it.
    pub fn fingerprint(&self) -> Fingerprint {
        const BLOCK: usize = 4096;
        let blocks = self.len.div_ceil(BLOCK);
        let read = blocks.min(4096);
        let mut buffer = Vec::with_capacity(BLOCK);
        let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a
        let mut take = |word: u64| hash = (hash ^ word).wrapping_mul(0x100_0000_01b3);
        for i in 0..read {
            let start = (i as u128 * blocks as u128 / read as u128) as usize * BLOCK;
            buffer.clear();
            self.read(start..self.len.min(start + BLOCK), &mut buffer);
            buffer.iter().for_each(|&t| take(t.into()));
        }
        if let Store::Text(text) = &self.store {
            text.starts().iter().for_each(|&s| take(s as u64));
        }
        Fingerprint { tokens: self.len as u64, hash, bytes: self.is_bytes() }
    }

    /// Appends the tokens of `range` to `out`.
    pub fn read(&self, range: Range<usize>, out: &mut Vec<u32>) {
        match &self.store {
            Store::Text(text) => text.read(range).for_each(|part| out.extend(part.iter().map(|&b| u32::from(b)))),
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
        match (&self.store, self.eot) {
            (Store::Text(text), _) => {
                let starts = text.starts();
                let first = starts.partition_point(|&s| s <= range.start);
                starts[first..].iter().copied().take_while(|&s| s < range.end).collect()
            }
            (Store::Shard { .. }, None) => vec![],
            (Store::Shard { .. }, Some(eot)) => {
                let inside = tokens.len().saturating_sub(1);
                tokens[..inside].iter().enumerate().filter(|&(_, &t)| t == eot).map(|(i, _)| range.start + i + 1).collect()
            }
        }
    }

    /// Splits by position: the last `held_out` of the tokens are never trained on. Returns (training, held-out).
    pub fn split(&self, held_out: f64) -> (Range<usize>, Range<usize>) {
        let cut = (self.len as f64 * (1.0 - held_out)) as usize;
        let cut = cut.clamp(1, self.len);
        (0..cut, cut..self.len)
    }
}
