//! Memory-mapped token shards.

use super::{Corpus, Store, map};
use crate::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// First word of a shard of 16-bit tokens (llm.c's GPT-2 shards).
pub const MAGIC_U16: u32 = 20240520;
/// First word of a shard of 32-bit tokens (llm.c's Llama-3 shards).
pub const MAGIC_U32: u32 = 20240801;
/// Length of the header.
pub const HEADER_BYTES: usize = 1024;

/// A mapped shard, in a stream of them.
#[derive(Debug)]
pub(super) struct Shard {
    map: memmap2::Mmap,
    /// The first token's byte offset.
    start: usize,
    wide: bool,
    /// The first token's place in the stream.
    pub at: usize,
    pub len: usize,
    /// By the header; 0 where it doesn't say.
    pub vocab_size: usize,
    pub eot: Option<u32>,
}

impl Shard {
    /// Maps a shard whose first token is the stream's token `at`.
    pub fn open(path: &Path, at: usize) -> Result<Shard> {
        let file = File::open(path).map_err(Error::io("reading", path))?;
        let size = file.metadata().map_err(Error::io("reading", path))?.len() as usize;
        if size == 0 {
            return Err(Error::data(path, "is empty: there are no tokens in it"));
        }
        let map = map(path, &file)?;
        let word = |i: usize| u32::from_le_bytes([map[4 * i], map[4 * i + 1], map[4 * i + 2], map[4 * i + 3]]);
        let magic = if size >= 4 { word(0) } else { 0 };
        if magic != MAGIC_U16 && magic != MAGIC_U32 {
            if !size.is_multiple_of(2) {
                return Err(Error::data(
                    path,
                    format!("{size} bytes are no whole number of 16-bit tokens and there is no header: truncated, or not a shard"),
                ));
            }
            return Ok(Shard { map, start: 0, wide: false, at, len: size / 2, vocab_size: 0, eot: None });
        }
        let wide = magic == MAGIC_U32;
        if size < HEADER_BYTES {
            return Err(Error::data(path, format!("truncated: the header is {HEADER_BYTES} bytes, the file {size}")));
        }
        let width = if wide { 4 } else { 2 };
        let (claimed, found) = (u64::from(word(2)), ((size - HEADER_BYTES) / width) as u64);
        if claimed > found {
            return Err(Error::data(path, format!("truncated: the header promises {claimed} tokens, the file holds {found}; copy it again")));
        }
        let (vocab_size, eot) = (word(3) as usize, word(4).checked_sub(1));
        Ok(Shard { map, start: HEADER_BYTES, wide, at, len: claimed as usize, vocab_size, eot })
    }
    /// Appends the tokens from `from` to `to`, counted in this shard.
    pub fn read(&self, from: usize, to: usize, out: &mut Vec<u32>) {
        if self.wide {
            let bytes = &self.map[self.start + 4 * from..self.start + 4 * to];
            out.extend(bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])));
        } else {
            let bytes = &self.map[self.start + 2 * from..self.start + 2 * to];
            out.extend(bytes.chunks_exact(2).map(|c| u32::from(u16::from_le_bytes([c[0], c[1]]))));
        }
    }
}

pub(super) fn open(path: &Path, eot: Option<u32>) -> Result<Corpus> {
    let shard = Shard::open(path, 0)?;
    Ok(Corpus { len: shard.len, eot: shard.eot.or(eot), store: Store::Shards(vec![shard]), path: path.into(), codec: None })
}

/// Whether tokens of a vocabulary need more than 16 bits.
pub(crate) fn is_wide(vocab_size: u32) -> bool {
    vocab_size > 1 << 16
}

/// Writes a shard token by token, beside its place, and puts it there when it is whole.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    file: BufWriter<File>,
    path: PathBuf,
    len: u32,
    vocab_size: u32,
    wide: bool,
    eot: Option<u32>,
}

impl ShardWriter {
    /// Begins a shard that will be `path`.
    pub fn create(path: &Path, vocab_size: u32, wide: bool, eot: Option<u32>) -> Result<ShardWriter> {
        let file = File::create(beside(path)).map_err(Error::io("writing", path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES]).map_err(Error::io("writing", path))?;
        Ok(ShardWriter { file, path: path.into(), len: 0, vocab_size, wide, eot })
    }
    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len as usize
    }
    /// Adds tokens. One that is outside the vocabulary, where its size is given, is an error.
    pub fn write(&mut self, tokens: &[u32]) -> Result<()> {
        let n = u32::try_from(tokens.len()).ok().and_then(|n| self.len.checked_add(n));
        self.len = n.ok_or_else(|| Error::data(&self.path, "a shard holds at most 2^32 - 1 tokens; write several"))?;
        for &t in tokens {
            if self.vocab_size > 0 && t >= self.vocab_size {
                return Err(Error::data(&self.path, format!("token {t} is outside the vocabulary of {}", self.vocab_size)));
            }
            let done = if self.wide { self.file.write_all(&t.to_le_bytes()) } else { self.file.write_all(&(t as u16).to_le_bytes()) };
            done.map_err(Error::io("writing", &self.path))?;
        }
        Ok(())
    }
    /// Writes the header, syncs, and renames.
    pub fn finish(mut self) -> Result<()> {
        let mut header = [0u32; HEADER_BYTES / 4];
        let (magic, version) = if self.wide { (MAGIC_U32, 7) } else { (MAGIC_U16, 1) };
        header[..5].copy_from_slice(&[magic, version, self.len, self.vocab_size, self.eot.map_or(0, |t| t + 1)]);
        let bytes: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut done = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&bytes)?;
            self.file.flush()?;
            self.file.get_ref().sync_all()?;
            std::fs::rename(beside(&self.path), &self.path)
        };
        done().map_err(Error::io("writing", &self.path))
    }
}

/// Where a shard lies until it is whole.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Writes a token shard. The header is 256 little-endian 32-bit words: magic ([`MAGIC_U16`] or [`MAGIC_U32`], which says the width of a
/// token), version (1 or 7), the number of tokens, the vocabulary size (0: not said), the end-of-text token plus one (0: none), zeros. The
/// tokens follow, little-endian. The first three words are llm.c's, whose shards open as they are; so do nanoGPT's headerless `uint16` files.
pub fn write_shard(path: &Path, tokens: &[u32], vocab_size: u32, eot: Option<u32>) -> Result<()> {
    let wide = is_wide(vocab_size) || (vocab_size == 0 && tokens.iter().any(|&t| t > 0xffff));
    let mut writer = ShardWriter::create(path, vocab_size, wide, eot)?;
    writer.write(tokens)?;
    writer.finish()
}
