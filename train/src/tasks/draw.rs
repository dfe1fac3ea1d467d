//! Random numbers of one sample, one after another.

use crate::rng;

/// A stream of random numbers that is a function of (seed, stream, index).
#[derive(Clone, Debug)]
pub struct Draw {
    seed: u64,
    at: u64,
}

impl Draw {
    /// The numbers of sample `index`; `stream` (see [`rng::stream`]) keeps uses of one seed apart.
    pub fn new(seed: u64, stream: u64, index: u64) -> Draw {
        Draw { seed: rng::bits(seed, stream, index), at: 0 }
    }
    fn next(&mut self) -> u64 {
        self.at += 1;
        self.bits()
    }
    fn bits(&self) -> u64 {
        rng::bits(self.seed, rng::stream::TASKS, self.at)
    }
    /// 128 random bits.
    pub(super) fn wide(&mut self) -> u128 {
        u128::from(self.next()) << 64 | u128::from(self.next())
    }
    /// An integer below `n` (0 when `n` is 0 or 1).
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.at += 1;
        rng::below(self.seed, rng::stream::TASKS, self.at, n as u64) as usize
    }
    /// An integer from `from` to `to - 1`.
    pub(super) fn token(&mut self, from: usize, to: usize) -> u32 {
        (from + self.below(to - from)) as u32
    }
    /// A number above 0 and below 1.
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.next() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }
    /// One of `all`, which is not empty.
    pub(super) fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
    /// `n` different integers from `from` to `to - 1`, in random order; there must be as many.
    pub(super) fn different(&mut self, n: usize, from: usize, to: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (from as u32..to as u32).collect();
        for i in 0..n {
            let other = i + self.below(all.len() - i);
            all.swap(i, other);
        }
        all.truncate(n);
        all
    }
    /// `n` different indices, drawn one after another, each in proportion to the weights (above 0) of those that are left (Efraimidis & Spirakis 2006).
    pub(super) fn weighted(&mut self, n: usize, weights: impl Iterator<Item = f64>) -> Vec<usize> {
        let mut keys: Vec<(f64, usize)> = weights.enumerate().map(|(i, w)| (-self.uniform().ln() / w, i)).collect();
        keys.sort_by(|a, b| a.0.total_cmp(&b.0));
        keys.iter().take(n).map(|k| k.1).collect()
    }
}
