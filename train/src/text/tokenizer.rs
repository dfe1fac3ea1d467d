//! `tokenizer.json`, as the Hugging Face library `tokenizers` reads and writes it.

use super::caught::caught;
use super::check::check;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;
use tokenizers::DecoderWrapper;

/// The file's name in a folder of tokens and in a run folder.
pub const FILE: &str = "tokenizer.json";
/// What ends a document, by the names that published vocabularies give it.
pub const ENDS: [&str; 6] = ["<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>"];
/// One past the largest token that is allowed: larger ones are a damaged file, not a vocabulary.
const MOST: u32 = 1 << 24;

/// A tokenizer, as its file has it; truncation and padding, which some files ask for, are left out.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: Vec<u8>,
    /// What each token is: its bytes where tokens are bytes, else its name.
    tokens: Vec<Option<Box<[u8]>>>,
    byte_level: bool,
}

/// No vocabulary takes more bytes; large ones take some ten million.
const LARGEST: u64 = 1 << 28;

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer of {} tokens", self.tokens.len())
    }
}

/// The byte that a character of a byte-level vocabulary stands for: printable characters of Latin-1 for themselves, the other bytes, in
/// their order, for those from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let own = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        b if own(b) => u8::try_from(b).ok(),
        n => (0..256u32).filter(|&b| !own(b)).nth(n.checked_sub(256)? as usize).and_then(|b| u8::try_from(b).ok()),
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. A file that is cut off, or no tokenizer, or a byte-level one that lacks a byte, is an error that says so.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let n = std::fs::metadata(path).map_err(Error::io("reading", path))?.len();
        if n > LARGEST {
            return Err(Error::data(path, format!("has {n} bytes; a tokenizer.json has at most {LARGEST}: it is something else, or damaged")));
        }
        let json = std::fs::read(path).map_err(Error::io("reading", path))?;
        Tokenizer::from_json(json, path)
    }
    /// A tokenizer from the text of its file; `path` is for messages.
    pub fn from_json(json: Vec<u8>, path: &Path) -> Result<Tokenizer> {
        let wrong = |m: String| Error::data(path, m);
        let value: Value = serde_json::from_slice(&json).map_err(|e| match e.classify() {
            serde_json::error::Category::Eof => wrong(format!("is cut off after {} bytes: {e}; copy it again", json.len())),
            _ => wrong(format!("is no tokenizer.json: {e}")),
        })?;
        if !value["model"].is_object() {
            return Err(wrong(
                "is no tokenizer.json: it has no object `model` (sentencepiece's tokenizer.model and tiktoken's ranks are other formats)".into(),
            ));
        }
        check(&value).map_err(&wrong)?;
        drop(value);
        let unread = |e: String| wrong(format!("is no tokenizer.json that can be read: {e}"));
        let inner = caught(|| tokenizers::Tokenizer::from_bytes(&json)).map_err(|e| unread(format!("the library `tokenizers` failed: {e}")))?;
        let mut inner = inner.map_err(|e| unread(e.to_string()))?;
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?.with_padding(None);
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let vocabulary = inner.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&id| id.saturating_add(1));
        // a name takes more than a byte; small files may have gaps all the same
        let most = u32::try_from(json.len()).unwrap_or(MOST).clamp(1 << 20, MOST);
        if size == 0 || size > most {
            return Err(wrong(format!(
                "expected tokens from 0 to at most {} in {} bytes, found {} with the largest {}",
                most - 1,
                json.len(),
                vocabulary.len(),
                size.max(1) - 1
            )));
        }
        let mut tokens: Vec<Option<Box<[u8]>>> = vec![None; size as usize];
        let added = inner.get_added_tokens_decoder();
        for (name, id) in vocabulary {
            let bytes: Option<Vec<u8>> = if byte_level && !added.contains_key(&id) { name.chars().map(byte_of).collect() } else { None };
            tokens[id as usize] = Some(bytes.unwrap_or_else(|| name.into_bytes()).into());
        }
        if byte_level {
            let single: std::collections::HashSet<u8> = tokens.iter().flatten().filter(|b| b.len() == 1).map(|b| b[0]).collect();
            if let Some(missing) = (0..=255u8).find(|b| !single.contains(b)) {
                return Err(wrong(format!("is a byte-level vocabulary without the byte 0x{missing:02x}: text that holds it would be lost")));
            }
        }
        Ok(Tokenizer { inner, json, tokens, byte_level })
    }
    /// The same tokenizer, which takes special tokens that a text spells out for text like any other.
    pub fn literal(mut self) -> Tokenizer {
        self.inner.set_encode_special_tokens(true);
        self
    }
    /// The file.
    pub fn json(&self) -> &[u8] {
        &self.json
    }
    /// One past the largest token.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
    /// Whether every token is a string of bytes, and text the bytes of its tokens.
    pub fn is_byte_level(&self) -> bool {
        self.byte_level
    }
    /// What a token is: its bytes if the tokenizer is byte-level, else its name. None if there is no such token.
    pub fn bytes(&self, token: u32) -> Option<&[u8]> {
        self.tokens.get(token as usize)?.as_deref()
    }
    /// The token's name in the file.
    pub fn name(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
    /// The token of this name.
    pub fn token(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }
    /// The token that ends documents: by its name the first of [`ENDS`] that there is, else the only special token.
    pub fn end(&self) -> Option<u32> {
        let special = || {
            let added = self.inner.get_added_tokens_decoder();
            let mut special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
            special.next().filter(|_| special.next().is_none())
        };
        ENDS.iter().find_map(|name| self.token(name)).or_else(special)
    }
    /// Text as tokens, without any that the file would put before or after it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, false)
    }
    /// Text as tokens, with those that the file puts before and after a text that stands alone, such as a first one that says so.
    pub fn encode_alone(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, true)
    }
    fn tokens(&self, text: &str, alone: bool) -> Result<Vec<u32>> {
        let wrong = |e: String| Error::Model(format!("tokenizer: {e}"));
        // where a file says what can't be, the library finds out here
        let encoding = caught(|| self.inner.encode_fast(text, alone)).map_err(wrong)?.map_err(|e| wrong(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
    /// Whether some of the text is missing in its tokens; where a normalizer changes text, that can't be told.
    pub fn loses(&self, text: &str, tokens: &[u32]) -> bool {
        let told: usize = tokens.iter().map(|&t| self.bytes(t).map_or(0, <[u8]>::len)).sum();
        self.byte_level && self.inner.get_normalizer().is_none() && told < text.len()
    }
    /// Tokens as text, by the file's decoder.
    pub(super) fn decode(&self, tokens: &[u32]) -> String {
        caught(|| self.inner.decode(tokens, false)).map(Result::unwrap_or_default).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
