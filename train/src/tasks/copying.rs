//! Selective copying and induction.

use super::draw::Draw;
use super::settings::{Induction, SelectiveCopy};
use super::{IGNORE, Sample};

/// Selective copying of MAD (Poli et al. 2024, 2403.17844; after Gu & Dao 2023, 2312.00752 §4.1.1): n tokens of 0 to V − 3 with blanks (V − 2) before each, all blanks spread
/// evenly over the n places; then V − 1, and n blanks at which the n tokens are asked for in order.
pub(super) fn selective(s: &SelectiveCopy, length: usize, d: &mut Draw) -> Sample {
    let (n, blank, asks) = (s.tokens, (s.vocab - 2) as u32, (s.vocab - 1) as u32);
    let data: Vec<u32> = (0..n).map(|_| d.token(0, s.vocab - 2)).collect();
    let mut before = vec![0; n];
    (0..length - 2 * n - 1).for_each(|_| before[d.below(n)] += 1);
    let mut tokens = Vec::with_capacity(length);
    for (token, blanks) in data.iter().zip(before) {
        tokens.extend(std::iter::repeat_n(blank, blanks));
        tokens.push(*token);
    }
    tokens.push(asks);
    tokens.extend(std::iter::repeat_n(blank, n));
    let mut labels = vec![IGNORE; length - n];
    labels.extend(data.iter().map(|t| i64::from(*t)));
    Sample { tokens, labels }
}

/// Induction heads of Gu & Dao 2023 (2312.00752 §4.1.2 and appendix E.1): random tokens of 0 to V − 2, and among them once, at a random place, the special token V − 1. It comes again
/// at the end, where the token is asked for that followed it.
pub(super) fn induction(s: &Induction, length: usize, d: &mut Draw) -> Sample {
    let special = (s.vocab - 1) as u32;
    let mut tokens: Vec<u32> = (0..length).map(|_| d.token(0, s.vocab - 1)).collect();
    let at = d.below(length - 2);
    (tokens[at], tokens[length - 1]) = (special, special);
    let mut labels = vec![IGNORE; length];
    labels[length - 1] = i64::from(tokens[at + 1]);
    Sample { tokens, labels }
}
