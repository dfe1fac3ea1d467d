//! RULER's single needle in English (Hsieh et al. 2024, 2404.06654; NVIDIA/RULER): S-NIAH-1 to 3, with its strings, depths and scoring.

use super::draw::Draw;
use super::words::{ADJECTIVES, NOUNS};
use crate::text::Codec;
use crate::{Error, Result};

/// Tokens that a model may answer with; a prompt leaves room for them in its length.
pub const ANSWER: usize = 128;

const NOISE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Short forms that end no sentence.
const TITLES: [&str; 8] = ["Mr.", "Mrs.", "Dr.", "St.", "Capt.", "Messrs.", "vs.", "No."];

/// A needle to find.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What the value is called, and its plural: numbers, uuids.
    kind: &'static str,
    key: String,
    /// What the answer has to contain.
    pub value: String,
    /// The part of the haystack before it.
    depth: f64,
}

impl Question {
    /// Of S-NIAH-`which`: a key of two words, and a number of 7 digits (1 and 2) or a UUID, version 4 (3).
    pub fn draw(which: u8, depth: f64, d: &mut Draw) -> Question {
        let key = format!("{}-{}", d.pick(&ADJECTIVES), d.pick(&NOUNS));
        let (kind, value) = if which == 3 { ("uuid", uuid(d)) } else { ("number", (1_000_000 + d.below(9_000_000)).to_string()) };
        Question { kind, key, value, depth }
    }
    /// The prompt with a haystack of `n` of RULER's lines of noise, or of the first `n` words of a prose.
    pub fn prompt(&self, haystack: &Prose, n: usize) -> String {
        let Question { kind, key, value, depth } = self;
        let needle = format!("One of the special magic {kind}s for {key} is: {value}.");
        let context = match haystack {
            Prose::Noise => {
                let mut lines = vec![NOISE; n];
                lines.insert(((n as f64 * depth) as usize).min(n), &needle);
                lines.join("\n")
            }
            Prose::Words(words) => {
                let text: Vec<&str> = words.iter().cycle().take(n).map(String::as_str).collect();
                let ends = ends(&text);
                // the last sentence may be cut off
                let sentences = ends.len() + usize::from(ends.last() != Some(&n));
                let before = match (sentences as f64 * depth) as usize {
                    0 => 0,
                    i => ends.get(i - 1).copied().unwrap_or(n),
                };
                [&text[..before].join(" "), needle.as_str(), &text[before..].join(" ")].join(" ")
            }
        };
        format!(
            "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n\
             What is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} mentioned in the provided text is"
        )
    }
    /// Whether an answer is right, as RULER's `string_match_all` has it: it contains the value, in upper or lower case.
    pub fn is_answered_by(&self, text: &str) -> bool {
        text.to_lowercase().contains(&self.value.to_lowercase())
    }
    /// The prompt's tokens with the largest haystack for which they and an answer are at most `length` tokens. `size` is where the search begins, and what it found.
    pub fn tokens(&self, haystack: &Prose, length: usize, codec: &Codec, size: &mut usize) -> Result<Vec<u32>> {
        let made = |n: usize| codec.encode(&self.prompt(haystack, n));
        let fits = |tokens: &Vec<u32>| tokens.len() + ANSWER <= length;
        let least = made(1)?;
        if !fits(&least) {
            let need = least.len() + ANSWER;
            return Err(Error::Usage(format!("--length {length}: the shortest prompt of this task and its answer of {ANSWER} tokens take {need}")));
        }
        // as each haystack begins with the shorter ones, their tokens grow (but for a few at the ends) with them
        let (mut low, mut best, mut step) = (1, least, 1);
        let mut high = (*size).max(2);
        loop {
            let tokens = made(high)?;
            if !fits(&tokens) {
                break;
            }
            (low, best) = (high, tokens);
            high = low + step;
            step *= 2;
        }
        // down from a size that did not fit by steps that double, then by halves
        step = 1;
        while high - low > step {
            let middle = high - step;
            let tokens = made(middle)?;
            if fits(&tokens) {
                (low, best) = (middle, tokens);
                break;
            }
            high = middle;
            step *= 2;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let tokens = made(middle)?;
            if fits(&tokens) { (low, best) = (middle, tokens) } else { high = middle }
        }
        *size = low;
        Ok(best)
    }
}

fn uuid(d: &mut Draw) -> String {
    let bits = d.wide() & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// What needles are hidden in.
#[derive(Clone, Debug, PartialEq)]
pub enum Prose {
    /// RULER's lines about grass and sky, of S-NIAH-1.
    Noise,
    /// The words of a text, read round and round where it is too short.
    Words(Vec<String>),
}

impl Prose {
    /// A text's words; an error if there are none.
    pub fn of(text: &str) -> Result<Prose> {
        let words: Vec<String> = text.split_whitespace().map(String::from).collect();
        if words.is_empty() {
            return Err(Error::Usage("the text to hide needles in has no words; name another by --text".into()));
        }
        Ok(Prose::Words(words))
    }
}

/// Where sentences end in words: behind each that ends with a full stop, a question or an exclamation mark (and quotes or brackets), before one that begins with a capital letter,
/// a digit, a quote or a bracket.
fn ends(words: &[&str]) -> Vec<usize> {
    let closes = |w: &str| {
        let bare = w.trim_end_matches(['"', '\'', ')', ']', '”', '’']);
        bare.ends_with(['.', '?', '!']) && !TITLES.contains(&bare)
    };
    let opens = |w: &str| w.starts_with(|c: char| c.is_uppercase() || c.is_numeric() || "\"'([“‘".contains(c));
    (1..=words.len()).filter(|i| closes(words[i - 1]) && words.get(*i).is_none_or(|w| opens(w))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::MOBY_DICK;
    use std::collections::HashSet;

    fn question(which: u8, depth: f64) -> Question {
        Question::draw(which, depth, &mut Draw::new(1, 2, 3))
    }
    fn moby() -> Prose {
        Prose::of(&String::from_utf8_lossy(MOBY_DICK)).unwrap()
    }

    #[test]
    fn strings_are_rulers() {
        let q = Question { kind: "number", key: "quiet-otter".into(), value: "7654321".into(), depth: 0.5 };
        assert_eq!(
            q.prompt(&Prose::Noise, 2),
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n\
             The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n\
             One of the special magic numbers for quiet-otter is: 7654321.\n\
             The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n\
             What is the special magic number for quiet-otter mentioned in the provided text? \
             The special magic number for quiet-otter mentioned in the provided text is"
        );
        let prose = Prose::of("It was \"dark.\" Mr. Starbuck  slept!\nNobody, e.g. Ishmael, did. The end").unwrap();
        let at = |depth: f64, n: usize| {
            let text = Question { depth, ..q.clone() }.prompt(&prose, n);
            let context = text.split('\n').nth(1).unwrap().to_string();
            context.replace("One of the special magic numbers for quiet-otter is: 7654321.", "#")
        };
        assert_eq!(at(0.0, 12), " # It was \"dark.\" Mr. Starbuck slept! Nobody, e.g. Ishmael, did. The end");
        assert_eq!(at(0.3, 12), "It was \"dark.\" # Mr. Starbuck slept! Nobody, e.g. Ishmael, did. The end");
        assert_eq!(at(0.5, 12), "It was \"dark.\" Mr. Starbuck slept! # Nobody, e.g. Ishmael, did. The end");
        assert_eq!(at(0.8, 12), "It was \"dark.\" Mr. Starbuck slept! Nobody, e.g. Ishmael, did. # The end");
        assert_eq!(at(1.0, 12), "It was \"dark.\" Mr. Starbuck slept! Nobody, e.g. Ishmael, did. The end # ");
        assert_eq!(at(1.0, 14), "It was \"dark.\" Mr. Starbuck slept! Nobody, e.g. Ishmael, did. The end It was # ");
        assert!(q.is_answered_by(" it is 7654321.") && !q.is_answered_by("765432"));
    }

    #[test]
    fn keys_and_values_are_of_their_kind() {
        let mut all = HashSet::new();
        for i in 0..200 {
            let mut d = Draw::new(1, 2, i);
            let (number, uuid) = (Question::draw(1, 0.0, &mut d), Question::draw(3, 0.0, &mut d));
            assert!(number.value.len() == 7 && number.value.parse::<u32>().is_ok_and(|n| n >= 1_000_000));
            let parts: Vec<&str> = uuid.value.split('-').collect();
            assert_eq!(parts.iter().map(|p| p.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
            assert!(uuid.value.chars().all(|c| c == '-' || c.is_ascii_hexdigit()));
            assert!(parts[2].starts_with('4') && parts[3].starts_with(['8', '9', 'a', 'b']), "{}", uuid.value);
            assert!(uuid.is_answered_by(&format!("It's {}", uuid.value.to_uppercase())));
            all.insert((number.key, number.value, uuid.value));
        }
        assert_eq!(all.len(), 200);
        for words in [&ADJECTIVES[..], &NOUNS[..]] {
            assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
            assert!(words.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase())));
        }
    }

    #[test]
    fn haystacks_are_as_large_as_fits() {
        let moby = moby();
        let (mut sizes, mut hints) = (vec![], [0, 5, 100_000]);
        for (haystack, lengths) in [(&Prose::Noise, [600, 1024, 9000]), (&moby, [600, 1024, 9000])] {
            for length in lengths {
                for hint in &mut hints {
                    let q = question(1, 0.5);
                    let n = q.tokens(haystack, length, &Codec::Bytes, hint).unwrap().len();
                    assert!(n + ANSWER <= length, "{n} {length}");
                    assert!(q.prompt(haystack, *hint + 1).len() + ANSWER > length);
                    sizes.push(*hint);
                }
            }
        }
        assert!(sizes.chunks(3).all(|s| s[0] == s[1] && s[1] == s[2]), "{sizes:?}");
        let e = question(1, 0.5).tokens(&Prose::Noise, 500, &Codec::Bytes, &mut 0).unwrap_err().to_string();
        assert!(e.contains("--length 500") && e.contains("128 tokens take"), "{e}");
        assert!(Prose::of(" \n").is_err());
    }
}
