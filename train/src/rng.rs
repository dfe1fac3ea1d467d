//! Counter-based random numbers: every number is a pure function of (seed, stream, counter), so nothing has to be saved in a checkpoint.

/// Streams keep uses of one seed apart.
pub mod stream {
    /// The order in which windows of the text are visited.
    pub const ORDER: u64 = 1;
    /// The offset of each epoch's windows.
    pub const OFFSET: u64 = 2;
    /// Windows of generated tasks that are trained on, and the numbers of each.
    pub const TASKS: u64 = 3;
    /// Windows of generated tasks that a run is evaluated by.
    pub const FRESH: u64 = 4;
    /// Samples of generated tasks that a model is evaluated by.
    pub const SAMPLES: u64 = 5;
}

/// 64 random bits for (seed, stream, counter).
pub fn bits(seed: u64, stream: u64, counter: u64) -> u64 {
    let w = engine::rng::philox(seed, stream, counter);
    u64::from(w[0]) | u64::from(w[1]) << 32
}

/// A random integer below `n` (0 when `n` is 0 or 1).
pub fn below(seed: u64, stream: u64, counter: u64, n: u64) -> u64 {
    ((u128::from(bits(seed, stream, counter)) * u128::from(n)) >> 64) as u64
}

/// The image of `i` under a random permutation of `0..n`, without a table: a four-round Feistel network on the next even number of bits,
/// walked along its cycle until it falls below `n`.
pub fn permute(seed: u64, key: u64, n: u64, i: u64) -> u64 {
    debug_assert!(i < n);
    if n < 2 {
        return i;
    }
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half) - 1;
    let mut x = i;
    loop {
        let (mut l, mut r) = (x >> half, x & mask);
        for round in 0..4 {
            (l, r) = (r, l ^ (bits(seed, stream::ORDER, bits(key, round, r)) & mask));
        }
        x = (l << half) | r;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutation_is_one() {
        for n in [1u64, 2, 3, 5, 64, 65, 1000] {
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let p = permute(7, 3, n, i) as usize;
                assert!(!seen[p], "{n}: {p} twice");
                seen[p] = true;
            }
        }
        let a: Vec<u64> = (0..100).map(|i| permute(1, 0, 100, i)).collect();
        let b: Vec<u64> = (0..100).map(|i| permute(1, 1, 100, i)).collect();
        assert_ne!(a, b);
        let displacement: u64 = a.iter().enumerate().map(|(i, &p)| p.abs_diff(i as u64)).sum();
        assert!(displacement > 2000, "a random permutation of 100 moves items by 33 on average, found {displacement} / 100");
    }

    #[test]
    fn below_is_even() {
        let mut count = [0; 10];
        for i in 0..10_000 {
            count[below(3, 9, i, 10) as usize] += 1;
        }
        assert!(count.iter().all(|&c| (850..1150).contains(&c)), "{count:?}");
    }
}
