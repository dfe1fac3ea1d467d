//! Attention patterns: whole rows of probabilities, for looking at.

use super::{Problem, forward::pack, mask::Bands, view::View};
use engine::{
    cpu::{simd::Real, tile::gemm},
    vectorized,
};
use rayon::prelude::*;

/// Writes `softmax(scale·q kᵀ + mask)`, `[B, H, T, S]`.
pub fn pattern<F: Real>(p: &Problem, bands: &Bands, q: View, k: View, y: &mut [F]) {
    let group = p.h / p.hkv;
    let packed = pack::<F>(p, k, p.d, p.d);
    y.par_chunks_mut(p.s.max(1)).enumerate().for_each(|(i, row)| {
        let (b, h, t) = (i / p.t / p.h, i / p.t % p.h, i % p.t);
        let mut x = vec![F::ZERO; p.d];
        q.row([b, t, h], F::from_f64(p.scale), &mut x);
        let (lo, hi) = (bands.lo[t], bands.hi[t]);
        row.fill(F::ZERO);
        let keys = &packed[((b * p.hkv + h / group) * p.s + lo) * p.d..];
        // keys are the rows of the product, the query its only column
        gemm(hi - lo, 1, p.d, F::ONE, keys, p.d, 1, &x, 1, F::ZERO, &mut row[lo..hi], 1);
        softmax(&mut row[lo..hi]);
    });
}

vectorized! {
    fn softmax[F: Real](x: &mut [F]) {
        let max = x.iter().fold(F::NEG_INFINITY, |m, x| m.max(*x));
        x.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: F = x.iter().copied().sum();
        x.iter_mut().for_each(|x| *x = *x / sum);
    }
}
