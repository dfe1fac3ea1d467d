//! Training text: byte-level from any UTF-8 file or folder, or token shards, with document boundaries and a held-out tail.

mod load;
pub(crate) mod manifest;
mod sampler;
mod shard;
#[cfg(test)]
mod tests;
mod text;

pub(crate) use load::{bytes, files, is_jsonl, line, utf8};
pub use manifest::{Finished, Input, MANIFEST, Manifest, Position};
pub(crate) use sampler::Part;
pub use sampler::{Batch, EvalWindows, Packing, Sampler};
pub(crate) use shard::ShardWriter;
pub use shard::{HEADER_BYTES, MAGIC_U16, MAGIC_U32, write_shard};

use crate::config::RunConfig;
use crate::text::Codec;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use shard::Shard;
use std::ops::Range;
use std::path::{Path, PathBuf};
pub(crate) use text::Bytes;
use text::Text;

/// The repository's own text, inside the program, so that `tidegate train quickstart` works from any folder.
pub static MOBY_DICK: &[u8] = include_bytes!("../../../data/moby-dick.txt");
/// The path under which configurations name [`MOBY_DICK`].
pub const MOBY_DICK_PATH: &str = "data/moby-dick.txt";

/// Where tokens lie.
#[derive(Debug)]
enum Store {
    Text(Text),
    /// Token shards, one after the other.
    Shards(Vec<Shard>),
    /// Generated tokens, and one past the largest that there may be.
    Tokens(Vec<u32>, usize),
}

/// A stream of tokens with document boundaries.
#[derive(Debug)]
pub struct Corpus {
    store: Store,
    len: usize,
    /// The token that ends a shard's documents.
    eot: Option<u32>,
    path: PathBuf,
    /// How the tokens are text, where that is known.
    codec: Option<Codec>,
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
    /// document, sorted by path), a `.bin` token shard (see [`write_shard`]), or a folder of shards with their [`Manifest`].
    /// [`MOBY_DICK_PATH`] falls back to the copy inside the program.
    ///
    /// `eot` is the end-of-text token that ends documents in a shard whose header doesn't say; it has no meaning for text.
    pub fn open(path: &Path, eot: Option<u32>) -> Result<Corpus> {
        if path == Path::new(MOBY_DICK_PATH) && !path.exists() {
            return Ok(Corpus::of_documents([Bytes::Static(MOBY_DICK)], path));
        }
        if path.as_os_str().is_empty() {
            return Err(Error::Usage("data.path is empty: name a text; only a run of tasks alone (tasks.share = 1), none of which is among text (tasks.needle.filler), reads none".into()));
        }
        let corpus = match path.extension().and_then(|e| e.to_str()) {
            Some("bin") if path.is_file() => shard::open(path, eot)?,
            _ if manifest::is_here(path) => manifest::open(path)?,
            _ => load::open(path)?,
        };
        if corpus.len < 2 {
            let n = corpus.len;
            return Err(Error::data(path, format!("holds {n} tokens; at least 2 are needed: is this the right file?")));
        }
        Ok(corpus)
    }

    /// What a run reads: its text, or nothing where it reads tasks alone.
    pub fn of_run(config: &RunConfig) -> Result<Corpus> {
        if config.tasks.alone() {
            return Ok(Corpus::of_tokens(vec![], 0));
        }
        Corpus::open(&config.data.path, config.data.eot)
    }

    /// A corpus from tokens in memory, below `vocab_size`.
    pub(crate) fn of_tokens(tokens: Vec<u32>, vocab_size: usize) -> Corpus {
        Corpus { len: tokens.len(), store: Store::Tokens(tokens, vocab_size), eot: None, path: "generated tasks".into(), codec: None }
    }
    /// A corpus from text in memory, one document an element.
    pub fn from_documents<S: AsRef<str>>(documents: &[S]) -> Corpus {
        Corpus::of_documents(documents.iter().map(|d| Bytes::Owned(d.as_ref().into())), Path::new("memory"))
    }
    fn of_documents(documents: impl IntoIterator<Item = Bytes>, path: &Path) -> Corpus {
        let mut text = Text::default();
        documents.into_iter().for_each(|d| text.push(d));
        Corpus { len: text.len(), store: Store::Text(text), eot: None, path: path.into(), codec: Some(Codec::Bytes) }
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
        matches!(self.store, Store::Text(_))
    }
    /// How the tokens are text; none for a shard that lies alone.
    pub fn codec(&self) -> Option<&Codec> {
        self.codec.as_ref()
    }
    /// The token that ends documents; none for text.
    pub fn end(&self) -> Option<u32> {
        self.eot
    }
    /// One past the largest token that there may be: 256 for text, else as the shards say; 0 if they don't.
    pub fn vocab_size(&self) -> usize {
        match &self.store {
            Store::Text(_) => 256,
            Store::Shards(shards) => shards.iter().map(|s| s.vocab_size).max().unwrap_or(0),
            Store::Tokens(_, vocab_size) => *vocab_size,
        }
    }
    /// Bytes of text that the tokens of `range` are, where that is known; documents' ends are none.
    pub fn text_bytes(&self, range: Range<usize>) -> Option<u64> {
        const BLOCK: usize = 1 << 20;
        let Codec::Tokenizer(tokenizer) = self.codec.as_ref()? else { return Some(range.len() as u64) };
        let (mut decoder, mut sum, mut buffer) = (Codec::Tokenizer(tokenizer.clone()).decoder(), 0, vec![]);
        for start in range.clone().step_by(BLOCK) {
            buffer.clear();
            self.read(start..range.end.min(start + BLOCK), &mut buffer);
            for &t in buffer.iter().filter(|&&t| Some(t) != self.eot) {
                let n = if tokenizer.is_byte_level() { tokenizer.bytes(t).map_or(0, <[u8]>::len) } else { decoder.push(t).len() };
                sum += n as u64;
            }
        }
        Some(sum + decoder.finish().len() as u64)
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
            Store::Tokens(tokens, _) => out.extend_from_slice(&tokens[range]),
            Store::Shards(shards) => {
                let first = shards.partition_point(|s| s.at + s.len <= range.start);
                for s in shards[first..].iter().take_while(|s| s.at < range.end) {
                    s.read(range.start.max(s.at) - s.at, range.end.min(s.at + s.len) - s.at, out);
                }
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
            (_, None) => vec![],
            (_, Some(eot)) => {
                let inside = tokens.len().saturating_sub(1);
                tokens[..inside].iter().enumerate().filter(|&(_, &t)| t == eot).map(|(i, _)| range.start + i + 1).collect()
            }
        }
    }

    /// Splits by position: the last `held_out` of the tokens are never trained on. Returns (training, held-out).
    pub fn split(&self, held_out: f64) -> (Range<usize>, Range<usize>) {
        let cut = (self.len as f64 * (1.0 - held_out)) as usize;
        let cut = cut.clamp(self.len.min(1), self.len);
        (0..cut, cut..self.len)
    }
}
