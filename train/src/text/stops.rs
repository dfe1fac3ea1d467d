//! Strings that end a text.

/// Finds strings in a text that comes piece by piece, and holds back what may be the beginning of one.
#[derive(Debug, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl Stops {
    /// Of these strings; empty ones are passed over.
    pub fn new(stops: &[String]) -> Stops {
        Stops { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), ..Stops::default() }
    }
    /// Whether one was found: the text ended before it.
    pub fn found(&self) -> bool {
        self.found
    }
    /// The text that is certain after this piece: before the first of the strings, and without what may become one.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held += piece;
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins = |tail: &str| self.stops.iter().any(|s| s.starts_with(tail));
        let from = self.held.char_indices().map(|(at, _)| at).find(|at| begins(&self.held[*at..])).unwrap_or(self.held.len());
        let rest = self.held.split_off(from);
        std::mem::replace(&mut self.held, rest)
    }
    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In pieces of every length, with stops that overlap, that begin like one another, and that hold several bytes a character.
    #[test]
    fn a_text_ends_before_the_first_of_them_however_it_is_cut() {
        for (text, stops, want) in [
            ("one two three", vec!["two"], "one "),
            ("aaab", vec!["aab"], "a"),
            ("aaa", vec!["aab"], "aaa"),
            ("x<|im_", vec!["<|im_end|>"], "x<|im_"),
            ("x<|im_end|>y", vec!["<|im_end|>", "<|im"], "x"),
            ("日本語。終", vec!["。終"], "日本語"),
            ("日本語。", vec!["。終"], "日本語。"),
            ("abc", vec![], "abc"),
            ("abc", vec!["", "c"], "ab"),
            ("abcabd", vec!["abd", "cab"], "ab"),
        ] {
            let stops: Vec<String> = stops.into_iter().map(String::from).collect();
            let chars: Vec<char> = text.chars().collect();
            for n in 1..=chars.len() {
                let mut s = Stops::new(&stops);
                let mut got: String = chars.chunks(n).map(|c| s.push(&c.iter().collect::<String>())).collect();
                got += &s.finish();
                assert_eq!((got.as_str(), s.found()), (want, want != text), "{text:?} by {stops:?} in pieces of {n}");
            }
        }
    }
}
