//! One needle's way through a model.

use super::needle::MARKER;
use super::{Haystack, Point, Settings, Task, generate};
use crate::measure::{Passage, passage};
use crate::{Error, Result};
use nn::{Decoder, ModelConfig};

/// The part of the haystack that stands before the needle.
const DEPTH: f64 = 0.25;

/// What becomes of the needle of one sample of `length` tokens with random or text as haystack (difficulty 2; else the first that the settings have), a quarter of which
/// stands before it. Up to the question's key, behind which the value should follow.
///
/// # Errors
///
/// As [`generate`] and [`passage`].
pub fn follow(model: &Decoder, settings: &Settings, text: Option<&Haystack>, length: usize, seed: u64) -> Result<Passage> {
    let vocab = model.config().vocab_size;
    let own = one(settings, length);
    let point = Point { length, pairs: None, difficulty: own.needle.difficulty.first().copied(), depth: Some(DEPTH) };
    let sample = generate(Task::Needle, &own, vocab, text, &point, seed, 0)?;
    let (needle, asked) = sample.needle().ok_or_else(|| Error::Model("a sample without a needle".into()))?;
    passage(model, &sample.tokens[..=asked], needle)
}

/// What is wrong with following a needle through `length` tokens in models of a configuration; samples with text need `text`.
///
/// # Errors
///
/// Settings that have no such sample; text that is missing; more tokens than the model is meant to read, unless `beyond`.
pub fn check_passage(config: &ModelConfig, settings: &Settings, text: bool, length: usize, beyond: bool) -> Result<()> {
    let own = one(settings, length);
    own.check(Task::Needle, config.vocab_size)?;
    let most = config.max_position_embeddings;
    if length > most && !beyond {
        return Err(Error::Usage(format!(
            "--passage {length}: that is longer than the {most} tokens that the model is meant to read (max_position_embeddings); --beyond reads them all the same"
        )));
    }
    if own.reads_text(Task::Needle) && !text {
        return Err(Error::Usage("a passage's needle lies in text (needle.filler), and there is none; name one by --text".into()));
    }
    Ok(())
}

/// The settings of one needle in `length` tokens.
fn one(settings: &Settings, length: usize) -> Settings {
    let mut own = settings.clone();
    own.needle.difficulty.sort_by_key(|d| *d != 2);
    own.needle.difficulty.truncate(1);
    own.needle.length = vec![length];
    own
}

impl super::Sample {
    /// Of a sample of `needle`: where the needle stands, and the token behind which its value is asked for.
    fn needle(&self) -> Option<(std::ops::Range<usize>, usize)> {
        let values = self.asked();
        let asked = self.tokens.len().checked_sub(values)?;
        let start = self.tokens.iter().position(|t| *t == MARKER)?;
        Some((start..start + 2 + values, asked))
    }
}
