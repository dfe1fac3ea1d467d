//! Multi-query associative recall (Arora, Eyuboglu et al. 2023, 2312.04927), as `multiquery_ar` of HazyResearch/zoology has it.

use super::draw::Draw;
use super::settings::Mqar;
use super::{IGNORE, Sample};

/// `n` pairs of a key and its value stand at the beginning: `k₁ v₁ … kₙ vₙ`, keys from 1 to V/2 − 1 and values from V/2 to V − 1, each at most once. Behind them, at even
/// places, every key comes once more: after a gap of 2g tokens, g without replacement in proportion to (g + 1)^(a − 1), so that most come early. The label at
/// such a key is its value. All else is random (any of the V tokens), or 0.
pub(super) fn sample(s: &Mqar, vocab: usize, length: usize, pairs: usize, d: &mut Draw) -> Sample {
    let context = 2 * pairs;
    let keys = d.different(pairs, 1, vocab / 2);
    let values = d.different(pairs, vocab / 2, vocab);
    let space = (length - context) / 2;
    let gaps = d.weighted(pairs, (1..=space).map(|x| (x as f64).powf(s.power_a - 1.0)));
    let (mut tokens, mut labels) = (vec![0; length], vec![IGNORE; length]);
    for (i, (k, v)) in keys.iter().zip(&values).enumerate() {
        (tokens[2 * i], tokens[2 * i + 1]) = (*k, *v);
        let at = context + 2 * gaps[i];
        (tokens[at], labels[at]) = (*k, i64::from(*v));
    }
    if s.random_non_queries {
        // no key and no value is 0
        tokens.iter_mut().filter(|t| **t == 0).for_each(|t| *t = d.token(0, vocab));
    }
    Sample { tokens, labels }
}
