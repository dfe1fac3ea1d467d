//! Counter-based random numbers: Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//! A number is a function of (seed, stream, index), so that a resume needs no state and every device draws the same.

use rayon::prelude::*;
use std::ops::Range;

/// Four 32-bit words for one counter value.
pub fn philox(seed: u64, stream: u64, index: u64) -> [u32; 4] {
    let (mut c, mut k) = ([index as u32, (index >> 32) as u32, stream as u32, (stream >> 32) as u32], [seed as u32, (seed >> 32) as u32]);
    for _ in 0..10 {
        let (a, b) = (0xD251_1F53u64 * c[0] as u64, 0xCD9E_8D57u64 * c[2] as u64);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// 53 random bits as a number in [0, 1).
fn unit(a: u32, b: u32) -> f64 {
    (((a as u64) << 21) ^ (b as u64 >> 11)) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The numbers of a range of indices; one counter value makes two. Many are drawn by several threads: each is a function of its index.
fn draw(seed: u64, stream: u64, of: Range<usize>, two: impl Fn([u32; 4]) -> [f64; 2] + Sync) -> Vec<f64> {
    const PART: usize = 1 << 14;
    let mut all = vec![0.0; of.len()];
    all.par_chunks_mut(PART).enumerate().for_each(|(i, part)| {
        let start = of.start + i * PART;
        let counters = start as u64 / 2..(start + part.len()).div_ceil(2) as u64;
        let numbers = counters.flat_map(|i| two(philox(seed, stream, i))).skip(start % 2);
        part.iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
    });
    all
}

/// `n` numbers uniform in [0, 1).
pub fn uniform(seed: u64, stream: u64, n: usize) -> Vec<f64> {
    uniform_of(seed, stream, 0..n)
}

/// `n` standard normal numbers (Box–Muller).
pub fn normal(seed: u64, stream: u64, n: usize) -> Vec<f64> {
    normal_of(seed, stream, 0..n)
}

/// A range of what [`uniform`] gives.
pub(crate) fn uniform_of(seed: u64, stream: u64, of: Range<usize>) -> Vec<f64> {
    draw(seed, stream, of, |w| [unit(w[0], w[1]), unit(w[2], w[3])])
}

/// A range of what [`normal`] gives.
pub(crate) fn normal_of(seed: u64, stream: u64, of: Range<usize>) -> Vec<f64> {
    draw(seed, stream, of, |w| {
        let (r, t) = ((-2.0 * (1.0 - unit(w[0], w[1])).ln()).sqrt(), std::f64::consts::TAU * unit(w[2], w[3]));
        [r * t.cos(), r * t.sin()]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_known_answers_of_random123() {
        assert_eq!(philox(0, 0, 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox(u64::MAX, u64::MAX, u64::MAX), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(philox(0x299f31d0_a4093822, 0x03707344_13198a2e, 0x85a308d3_243f6a88), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn moments_are_right_and_streams_differ() {
        let v = normal(7, 1, 100_001);
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64;
        assert!(v.len() == 100_001 && mean.abs() < 0.02 && (var - 1.0).abs() < 0.02);
        let u = uniform(7, 2, 1000);
        assert!(u.iter().all(|x| (0.0..1.0).contains(x)) && u != uniform(7, 3, 1000));
        assert_eq!(uniform(7, 2, 10), u[..10]);
        assert_eq!(uniform_of(7, 2, 3..10), u[3..10]);
        assert_eq!(normal_of(7, 1, 501..700), v[501..700]);
    }
}
