//! The forward pass: one task per (batch, key/value head, tile of queries), an online softmax over the tiles of keys that the tile sees.
//!
//! Scores are computed transposed, `Sᵀ = K·Qᵀ`, keys down and queries across. Then K needs no transposing, the softmax of each query is a column, so
//! that maxima and sums are plain vector operations, and `P·V` reads P by columns, as the product allows. The heads that share a
//! key/value head stand side by side as columns of the same tile.

use super::{
    Gating, PAD, Problem, few, gate,
    mask::{Bands, Tile},
    view::{View, pad16},
};
use crate::rows::Shared;
use engine::{
    cpu::{
        Scratch, scratch, scratch_zeros,
        simd::Real,
        tile::{gemm, transpose},
    },
    vectorized,
};
use rayon::prelude::*;

/// Keys per tile.
const KEYS: usize = 64;
/// Columns (query times × heads of the group) per tile, about.
const COLS: usize = 64;

/// Runs the forward pass: `o [B, T, H, Dv]`, `u` likewise when there is a gate (the ungated output), `lse [B, T, H]`.
#[allow(clippy::too_many_arguments)]
pub fn forward<F: Real>(
    p: &Problem,
    bands: &Bands,
    q: View,
    k: View,
    v: View,
    gating: Option<Gating>,
    o: &mut [F],
    u: Option<&mut [F]>,
    lse: &mut [F],
) {
    if o.is_empty() {
        return lse.fill(F::NEG_INFINITY);
    }
    let out = Outputs { o: Shared::new(o), u: u.map(Shared::new), lse: Shared::new(lse) };
    let group = p.h / p.hkv;
    if p.s > p.t && p.t * group <= few::COLS {
        return few::forward(p, bands, q, k, v, gating, &out);
    }
    let (ldk, ldv) = (p.d + PAD, p.dv + PAD);
    let packed_k = pack::<F>(p, k, p.d, ldk);
    let packed_v = pack::<F>(p, v, p.dv, ldv);
    let tiles = bands.tiles((COLS / group).max(1)).concat();
    (0..p.b * p.hkv * tiles.len()).into_par_iter().with_max_len(1).for_each(|task| {
        // the last tiles see most keys under a causal mask: they start first
        let (bh, tile) = (task / tiles.len(), tiles.len() - 1 - task % tiles.len());
        let (b, hk) = (bh / p.hkv, bh % p.hkv);
        let (t0, t1) = tiles[tile];
        let cols = (t1 - t0) * group;
        let width = pad16(cols);
        let ld = width + PAD;

        let mut qrow = scratch(cols * p.d);
        for (c, row) in qrow.chunks_exact_mut(p.d).enumerate() {
            q.row([b, t0 + c / group, hk * group + c % group], F::from_f64(p.scale), row);
        }
        let mut qt = scratch_zeros(p.d * ld);
        transpose(cols, p.d, &qrow, p.d, &mut qt, ld);

        let mut s = scratch_zeros(KEYS * ld);
        let mut acc = scratch_zeros(cols * p.dv);
        let (mut max, mut sum, mut alpha) = (vec![F::NEG_INFINITY; width], vec![F::ZERO; width], vec![F::ONE; width]);
        let mut mask = Tile::default();
        let (lo, hi) = bands.keys(t0, t1);
        for k0 in (lo..hi).step_by(KEYS) {
            let k1 = (k0 + KEYS).min(hi);
            if !mask.set(bands, (k0, k1), (t0, t1), group) {
                continue;
            }
            let kt = &packed_k[(bh * p.s + k0) * ldk..];
            let vt = &packed_v[(bh * p.s + k0) * ldv..];
            mask.by_key(k1 - k0, width, |j0, j1, a, b| {
                gemm(j1 - j0, b - a, p.d, F::ONE, &kt[j0 * ldk..], ldk, 1, &qt[a..], ld, F::ZERO, &mut s[j0 * ld + a..], ld)
            });
            if mask.full {
                softmax_full(&mut s, ld, k1 - k0, &mut max, &mut sum, &mut alpha);
            } else {
                softmax_masked(&mut s, ld, &mask.cols, &mut max, &mut sum, &mut alpha);
            }
            rescale(&alpha[..cols], &mut acc);
            mask.by_col(k1 - k0, cols, |c0, c1, a, b| {
                gemm(c1 - c0, p.dv, b - a, F::ONE, &s[a * ld + c0..], 1, ld, &vt[a * ldv..], ldv, F::ONE, &mut acc[c0 * p.dv..], p.dv)
            });
        }

        finish(p, (b, hk), t0, gating, &mut acc, &max, &sum, &out);
    });
}

/// Where the results go.
pub struct Outputs<'a, F> {
    o: Shared<'a, F>,
    u: Option<Shared<'a, F>>,
    lse: Shared<'a, F>,
}

/// Writes the results of the queries from `t0` on, of which this task has all: `acc [cols, Dv]` is divided by the sums, and gated.
#[allow(clippy::too_many_arguments)]
pub fn finish<F: Real>(
    p: &Problem,
    (b, hk): (usize, usize),
    t0: usize,
    gating: Option<Gating>,
    acc: &mut [F],
    max: &[F],
    sum: &[F],
    out: &Outputs<F>,
) {
    let group = p.h / p.hkv;
    let glen = gating.map_or(0, |g| if g.elementwise { p.dv } else { 1 });
    let (mut grow, mut act) = (vec![F::ZERO; glen], vec![F::ZERO; glen]);
    for (c, x) in acc.chunks_exact_mut(p.dv.max(1)).enumerate() {
        let (t, h) = (t0 + c / group, hk * group + c % group);
        let at = (b * p.t + t) * p.h + h;
        let inv = F::ONE / sum[c];
        x.iter_mut().for_each(|x| *x *= inv);
        // SAFETY: the row (b, t, h) belongs to this task alone.
        let (o, l) = unsafe { (out.o.slice(at * p.dv, p.dv), out.lse.slice(at, 1)) };
        l[0] = max[c] + sum[c].ln();
        match &gating {
            Some(g) => {
                g.logits.row([b, t, h], F::ONE, &mut grow);
                gate::apply(g.gate, &grow, x, &mut act, o);
                if let Some(u) = &out.u {
                    // SAFETY: as above.
                    unsafe { u.slice(at * p.dv, p.dv) }.copy_from_slice(x);
                }
            }
            None => o.copy_from_slice(x),
        }
    }
}

/// `[B, S, Hkv, D]` to `[B, Hkv, S, ld]`, dense per head.
pub fn pack<F: Real>(p: &Problem, x: View, d: usize, ld: usize) -> Scratch<F> {
    let mut out = scratch(p.b * p.hkv * p.s * ld);
    out.par_chunks_mut((ld * KEYS).max(1)).enumerate().for_each(|(i, chunk)| {
        for (j, row) in chunk.chunks_exact_mut(ld).enumerate() {
            let at = i * KEYS + j;
            x.row([at / p.s / p.hkv, at % p.s, at / p.s % p.hkv], F::ONE, &mut row[..d]);
        }
    });
    out
}

vectorized! {
    /// One step of the online softmax over all columns of `s [keys, max.len()]`: new maxima, `s := exp(s − max)`, sums, and the factor `alpha` by
    /// which what was accumulated before shrinks.
    fn softmax_full[F: Real](s: &mut [F], ld: usize, keys: usize, max: &mut [F], sum: &mut [F], alpha: &mut [F]) {
        for (c, ((max, sum), alpha)) in max.chunks_exact_mut(16).zip(sum.chunks_exact_mut(16)).zip(alpha.chunks_exact_mut(16)).enumerate() {
            let mut m = [F::ZERO; 16];
            m.copy_from_slice(max);
            for j in 0..keys {
                let row = &s[j * ld + c * 16..][..16];
                for i in 0..16 {
                    m[i] = m[i].max(row[i]);
                }
            }
            let mut total = [F::ZERO; 16];
            for j in 0..keys {
                let row = &mut s[j * ld + c * 16..][..16];
                for i in 0..16 {
                    let e = (row[i] - m[i]).exp();
                    row[i] = e;
                    total[i] += e;
                }
            }
            for i in 0..16 {
                alpha[i] = (max[i] - m[i]).exp();
                sum[i] = sum[i].mul_add(alpha[i], total[i]);
                max[i] = m[i];
            }
        }
    }

    /// The same where key j is seen by the columns `cols[j]` only; cells that are masked become 0 and never reach the exponential.
    fn softmax_masked[F: Real](s: &mut [F], ld: usize, cols: &[(usize, usize)], max: &mut [F], sum: &mut [F], alpha: &mut [F]) {
        alpha.copy_from_slice(max);
        for (j, &(a, b)) in cols.iter().enumerate() {
            max[a..b].iter_mut().zip(&s[j * ld + a..j * ld + b]).for_each(|(m, s)| *m = m.max(*s));
        }
        for ((alpha, max), sum) in alpha.iter_mut().zip(max.iter()).zip(sum.iter_mut()) {
            // a column that has seen no key yet has nothing to shrink
            *alpha = if *max == F::NEG_INFINITY { F::ONE } else { (*alpha - *max).exp() };
            *sum *= *alpha;
        }
        for (j, &(a, b)) in cols.iter().enumerate() {
            let row = &mut s[j * ld..j * ld + max.len()];
            row[..a].fill(F::ZERO);
            row[b..].fill(F::ZERO);
            for ((s, m), sum) in row[a..b].iter_mut().zip(&max[a..b]).zip(&mut sum[a..b]) {
                *s = (*s - *m).exp();
                *sum += *s;
            }
        }
    }

    /// Multiplies row c of `acc` by `alpha[c]`.
    fn rescale[F: Real](alpha: &[F], acc: &mut [F]) {
        let n = acc.len() / alpha.len();
        for (c, alpha) in alpha.iter().enumerate() {
            if *alpha != F::ONE {
                acc[c * n..(c + 1) * n].iter_mut().for_each(|x| *x *= *alpha);
            }
        }
    }
}
