//! A single needle in tokens: RULER's S-NIAH-1 to 3 (Hsieh et al. 2024, 2404.06654) without the English, for models of a few million parameters.

use super::draw::Draw;
use super::settings::{Filler, Needle};
use super::{Haystack, IGNORE, Point, Sample};
use crate::{Error, Result};

/// Stands before the needle and before the question, as "the special magic number" does in the English form.
pub(super) const MARKER: u32 = 0;
/// The seed of the pattern, which is one and the same for all samples, as RULER's sentence about grass is.
const PATTERN: u64 = 0x7469_6465;

/// `filler, 0 k v₁ … vₙ, filler, 0 k v₁ … vₙ₋₁` with the labels v₁ … vₙ at the last n tokens: a key from 1 to V/2 − 1, its value from V/2 to V − 1, of n tokens that are drawn with
/// replacement. Of the filler's tokens, a part `depth` stands before the needle (drawn evenly where it isn't given). Filler is, by difficulty,
///
/// 1. a pattern of few tokens again and again, the same in all samples: the haystack holds nothing new;
/// 2. tokens of 1 to V − 1 drawn evenly, keys and values of the needle's kind among them; or text, in which a token 0 becomes 1;
/// 3. the same, with a long value.
pub(super) fn sample(s: &Needle, vocab: usize, text: Option<&Haystack>, point: &Point, d: &mut Draw) -> Result<Sample> {
    let difficulty = point.difficulty.unwrap_or(2);
    let n = s.value_at(difficulty);
    let key = d.token(1, vocab / 2);
    let value: Vec<u32> = (0..n).map(|_| d.token(vocab / 2, vocab)).collect();
    let size = point.length - 2 * n - 3;
    let before = match point.depth {
        Some(part) => (part * size as f64).round() as usize,
        None => d.below(size + 1),
    };
    let hay: Vec<u32> = match (difficulty, s.filler) {
        (1, _) => {
            let mut pattern = Draw::new(PATTERN, 0, 0);
            let pattern: Vec<u32> = (0..s.pattern.min(size)).map(|_| pattern.token(1, vocab)).collect();
            pattern.into_iter().cycle().take(size).collect()
        }
        (_, Filler::Random) => (0..size).map(|_| d.token(1, vocab)).collect(),
        (_, Filler::Text) => {
            let text = text.ok_or_else(|| Error::Usage("tasks.needle.filler is `text`, and there is no text: name one by data.path".into()))?;
            text.read(size, vocab, d)?
        }
    };
    let question = [&[MARKER, key][..], &value].concat();
    let mut tokens = [&hay[..before], &question, &hay[before..], &question].concat();
    tokens.pop();
    let mut labels = vec![IGNORE; tokens.len()];
    let asked = labels.len() - n;
    labels[asked..].iter_mut().zip(&value).for_each(|(l, v)| *l = i64::from(*v));
    Ok(Sample { tokens, labels })
}

impl Haystack<'_> {
    /// `n` tokens of the text from a random place on, round and round, without the marker.
    fn read(&self, n: usize, vocab: usize, d: &mut Draw) -> Result<Vec<u32>> {
        let (corpus, range) = (self.corpus, &self.range);
        if range.is_empty() {
            return Err(Error::data(corpus.path(), "there is no text to hide a needle in"));
        }
        let (mut out, mut at) = (Vec::with_capacity(n), range.start + d.below(range.len()));
        while out.len() < n {
            let end = range.end.min(at + n - out.len());
            corpus.read(at..end, &mut out);
            at = range.start;
        }
        match out.iter().find(|t| **t as usize >= vocab) {
            Some(t) => Err(Error::data(corpus.path(), format!("token {t} is outside the needle task's vocabulary of {vocab}"))),
            None => {
                out.iter_mut().filter(|t| **t == MARKER).for_each(|t| *t = 1);
                Ok(out)
            }
        }
    }
}
