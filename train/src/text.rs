//! Byte tokens as text, as they come.

/// Turns bytes into text piece by piece: a character comes out when its last byte is in, and what is no UTF-8 becomes U+FFFD, exactly as
/// `String::from_utf8_lossy` has it for the whole.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a character.
    open: Vec<u8>,
}

impl Decoder {
    /// The text that byte token `token` completes; a token that is no byte becomes U+FFFD.
    pub fn push(&mut self, token: u32) -> String {
        let Ok(byte) = u8::try_from(token) else {
            return self.finish() + "\u{fffd}";
        };
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
    /// What is left: U+FFFD, if a character was begun.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.open)).into_owned()
    }
}

/// Byte tokens as text.
pub fn text(tokens: &[u32]) -> String {
    let mut decoder = Decoder::default();
    let mut out: String = tokens.iter().map(|&t| decoder.push(t)).collect();
    out += &decoder.finish();
    out
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
