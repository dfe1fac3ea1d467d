//! Memory-mapped token shards.

use super::{Corpus, Store, map};
use crate::{Error, Result};
use std::io::Write;
use std::path::Path;

/// First word of a shard of 16-bit tokens (llm.c's GPT-2 shards).
pub const MAGIC_U16: u32 = 20240520;
/// First word of a shard of 32-bit tokens (llm.c's Llama-3 shards).
pub const MAGIC_U32: u32 = 20240801;
/// Length of the header.
pub const HEADER_BYTES: usize = 1024;

pub(super) fn open(path: &Path, eot: Option<u32>) -> Result<Corpus> {
    let file = std::fs::File::open(path).map_err(Error::io("reading", path))?;
    let size = file.metadata().map_err(Error::io("reading", path))?.len() as usize;
    if size == 0 {
        return Err(Error::data(path, "is empty: there are no tokens in it"));
    }
    let map = map(path, &file)?;
    let word = |i: usize| u32::from_le_bytes([map[4 * i], map[4 * i + 1], map[4 * i + 2], map[4 * i + 3]]);
    let magic = if size >= 4 { word(0) } else { 0 };
    let (start, wide, len, eot) = if magic == MAGIC_U16 || magic == MAGIC_U32 {
        let wide = magic == MAGIC_U32;
        if size < HEADER_BYTES {
            return Err(Error::data(path, format!("truncated: the header is {HEADER_BYTES} bytes, the file {size}")));
        }
        let width = if wide { 4 } else { 2 };
        let (claimed, found) = (u64::from(word(2)), ((size - HEADER_BYTES) / width) as u64);
        if claimed > found {
            return Err(Error::data(path, format!("truncated: the header promises {claimed} tokens, the file holds {found}; copy it again")));
        }
        let own = word(4).checked_sub(1);
        (HEADER_BYTES, wide, claimed as usize, own.or(eot))
    } else {
        if !size.is_multiple_of(2) {
            return Err(Error::data(
                path,
                format!("{size} bytes are no whole number of 16-bit tokens and there is no header: truncated, or not a shard"),
            ));
        }
        (0, false, size / 2, eot)
    };
    Ok(Corpus { store: Store::Shard { map, start, wide }, len, eot, path: path.into() })
}

/// Writes a token shard. The header is 256 little-endian 32-bit words: magic ([`MAGIC_U16`] or [`MAGIC_U32`], which says the width of a
/// token), version (1 or 7), the number of tokens, the vocabulary size (0: not said), the end-of-text token plus one (0: none), zeros. The
/// tokens follow, little-endian. The first three words are llm.c's, whose shards open as they are; so do nanoGPT's headerless `uint16` files.
pub fn write_shard(path: &Path, tokens: &[u32], vocab_size: u32, eot: Option<u32>) -> Result<()> {
    let wide = vocab_size > 1 << 16 || (vocab_size == 0 && tokens.iter().any(|&t| t > 0xffff));
    let n = u32::try_from(tokens.len()).map_err(|_| Error::data(path, "a shard holds at most 2^32 - 1 tokens; write several"))?;
    if let Some(t) = tokens.iter().find(|&&t| vocab_size > 0 && t >= vocab_size) {
        return Err(Error::data(path, format!("token {t} is outside the vocabulary of {vocab_size}")));
    }
    let mut header = [0u32; HEADER_BYTES / 4];
    header[..5].copy_from_slice(&[if wide { MAGIC_U32 } else { MAGIC_U16 }, if wide { 7 } else { 1 }, n, vocab_size, eot.map_or(0, |t| t + 1)]);
    let mut bytes: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
    for &t in tokens {
        if wide {
            bytes.extend_from_slice(&t.to_le_bytes());
        } else {
            bytes.extend_from_slice(&(t as u16).to_le_bytes());
        }
    }
    let mut f = std::fs::File::create(path).map_err(Error::io("writing", path))?;
    f.write_all(&bytes).map_err(Error::io("writing", path))
}
