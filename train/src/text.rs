//! Tokens as text: bytes as they are, or by a tokenizer; and text as it comes, token by token.

mod caught;
pub mod chat;
mod check;
pub mod stops;
pub mod tokenizer;

use crate::Result;
use std::sync::Arc;
use tokenizer::Tokenizer;

/// How tokens are text.
#[derive(Clone, Debug)]
pub enum Codec {
    /// A token is a byte of UTF-8.
    Bytes,
    /// By a `tokenizer.json`.
    Tokenizer(Arc<Tokenizer>),
}

impl Codec {
    /// Text as tokens. Special tokens that the text spells out are themselves.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Codec::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Codec::Tokenizer(t) => t.encode(text),
        }
    }
    /// The same of a text that stands alone, as transformers reads a prompt: with the tokens that its tokenizer puts before and after it.
    pub fn encode_alone(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Codec::Bytes => self.encode(text),
            Codec::Tokenizer(t) => t.encode_alone(text),
        }
    }
    /// A decoder at the beginning of a text.
    pub fn decoder(&self) -> Decoder {
        match self {
            Codec::Bytes => Decoder::default(),
            Codec::Tokenizer(t) => Decoder { by: Some(t.clone()), ..Decoder::default() },
        }
    }
    /// Tokens as text.
    pub fn decode(&self, tokens: &[u32]) -> String {
        whole(self.decoder(), tokens)
    }
}

/// Turns tokens into text piece by piece: a character comes out when its last byte is in, and what is no UTF-8 becomes U+FFFD, exactly as
/// `String::from_utf8_lossy` has it for the whole. The default takes byte tokens.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a character.
    open: Vec<u8>,
    by: Option<Arc<Tokenizer>>,
    /// For a tokenizer whose tokens are no bytes: the tokens told last, and those after them; and how many of them are told.
    window: (Vec<u32>, usize),
}

/// After as many tokens without a whole character, none will come: a character has at most four bytes.
const MOST_OPEN: usize = 8;

impl Decoder {
    /// The text that `token` completes; a token that stands for nothing becomes U+FFFD.
    pub fn push(&mut self, token: u32) -> String {
        let Some(tokenizer) = self.by.clone() else {
            return match u8::try_from(token) {
                Ok(byte) => self.byte(byte),
                Err(_) => self.finish() + "\u{fffd}",
            };
        };
        match tokenizer.bytes(token) {
            None => self.finish() + "\u{fffd}",
            Some(bytes) if tokenizer.is_byte_level() => bytes.iter().map(|&b| self.byte(b)).collect(),
            Some(_) => {
                self.window.0.push(token);
                self.told(&tokenizer, false)
            }
        }
    }
    fn byte(&mut self, byte: u8) -> String {
        self.open.push(byte);
        let mut out = String::new();
        // as a byte ends a character or breaks the one that was open, and in that case may itself begin or be one, twice is enough
        while let Err(e) = std::str::from_utf8(&self.open) {
            let Some(broken) = e.error_len() else { return out };
            out.push('\u{fffd}');
            self.open.drain(..e.valid_up_to() + broken);
        }
        out += &String::from_utf8_lossy(&self.open);
        self.open.clear();
        out
    }
    /// What the window's new tokens add to those before them, when that ends with a whole character or must be told.
    fn told(&mut self, tokenizer: &Tokenizer, must: bool) -> String {
        let (ids, old) = &self.window;
        let (before, all) = (tokenizer.decode(&ids[..*old]), tokenizer.decode(ids));
        if all.ends_with('\u{fffd}') && !must && ids.len() - old < MOST_OPEN {
            return String::new();
        }
        let new = all.strip_prefix(&before).unwrap_or_default().to_string();
        let kept = ids[*old..].to_vec();
        self.window = (kept.clone(), kept.len());
        new
    }
    /// What is left: U+FFFD, if a character was begun.
    pub fn finish(&mut self) -> String {
        let mut out = String::from_utf8_lossy(&std::mem::take(&mut self.open)).into_owned();
        if let Some(tokenizer) = self.by.clone()
            && self.window.1 < self.window.0.len()
        {
            out += &self.told(&tokenizer, true);
        }
        self.window = Default::default();
        out
    }
}

fn whole(mut decoder: Decoder, tokens: &[u32]) -> String {
    let mut out: String = tokens.iter().map(|&t| decoder.push(t)).collect();
    out += &decoder.finish();
    out
}

/// Byte tokens as text.
pub fn text(tokens: &[u32]) -> String {
    whole(Decoder::default(), tokens)
}

/// Text for a terminal: control characters, which a model that knows little writes too, do nothing there.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_same_text_as_the_whole() {
        assert_eq!(text(&[72, 300, 0xc3]), "H\u{fffd}\u{fffd}");
        assert_eq!(text(&[0xe2, 300, 0x82]), "\u{fffd}\u{fffd}\u{fffd}");
        let mut d = Decoder::default();
        let pieces: Vec<String> = "é日x".bytes().map(|b| d.push(b.into())).collect();
        assert_eq!(pieces, ["", "é", "", "", "日", "x"]);
        // every sequence of four of the bytes that matter: ASCII, continuations, first bytes of two, three and four, and bytes that never occur
        let bytes = [0x41u8, 0x80, 0x90, 0xa0, 0xbf, 0xc0, 0xc3, 0xe0, 0xe2, 0xed, 0xf0, 0xf1, 0xf4, 0xff];
        for i in 0..bytes.len().pow(4) {
            let sequence: Vec<u8> = (0..4).map(|place| bytes[i / bytes.len().pow(place) % bytes.len()]).collect();
            let tokens: Vec<u32> = sequence.iter().map(|&b| b.into()).collect();
            assert_eq!(text(&tokens), String::from_utf8_lossy(&sequence), "{sequence:x?}");
        }
    }

    #[test]
    fn control_characters_do_nothing() {
        assert_eq!(harmless("a\x1b[31mb\r\n\tc\u{9b}\x07é"), "a\u{fffd}[31mb\u{fffd}\n\tc\u{fffd}\u{fffd}é");
    }
}
