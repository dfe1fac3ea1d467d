//! The forward pass of a few queries behind many keys, as in decoding: keys and values are read once, where they lie, by tasks of [`PIECE`] keys each,
//! whose sums are then put together in order.

use super::{
    Gating, Problem,
    forward::{Outputs, finish},
    mask::Bands,
    view::View,
};
use engine::{
    cpu::simd::{Real, dot, max, sum},
    vectorized,
};
use rayon::prelude::*;

/// Queries times heads of a key/value head up to which this is taken.
pub const COLS: usize = 16;
/// Keys of a task; the cut does not depend on the number of threads.
const PIECE: usize = 512;
/// Keys whose scores are formed at a time.
const BLOCK: usize = 64;

/// Of one column (query and head): the largest score, the sum of the exponentials above it, the values weighted by them.
struct Part<F> {
    max: Vec<F>,
    sum: Vec<F>,
    acc: Vec<F>,
}

impl<F: Real> Part<F> {
    fn new(cols: usize, dv: usize) -> Part<F> {
        Part { max: vec![F::NEG_INFINITY; cols], sum: vec![F::ZERO; cols], acc: vec![F::ZERO; cols * dv] }
    }
}

/// As [`forward`](super::forward::forward), which see.
pub fn forward<F: Real>(p: &Problem, bands: &Bands, q: View, k: View, v: View, gating: Option<Gating>, out: &Outputs<F>) {
    let group = p.h / p.hkv;
    let cols = p.t * group;
    let (lo, hi) = bands.keys(0, p.t);
    let pieces = (hi - lo).div_ceil(PIECE).max(1);
    let task = |i: usize| -> Part<F> {
        let (bh, piece) = (i / pieces, i % pieces);
        let (b, hk) = (bh / p.hkv, bh % p.hkv);
        let mut queries = vec![F::ZERO; cols * p.d];
        for (c, row) in queries.chunks_exact_mut(p.d).enumerate() {
            q.row([b, c / group, hk * group + c % group], F::from_f64(p.scale), row);
        }
        let (mut part, mut scores) = (Part::new(cols, p.dv), [F::ZERO; BLOCK]);
        let (mut buf, from) = (vec![F::ZERO; BLOCK * p.d.max(p.dv)], lo + piece * PIECE);
        let end = (from + PIECE).min(hi);
        let mut all = vec![F::ZERO; cols * BLOCK];
        for k0 in (from..end).step_by(BLOCK) {
            let n = BLOCK.min(end - k0);
            let (keys, ldk) = k.rows(b, k0, n, hk, p.d, &mut buf);
            for (c, q) in queries.chunks_exact(p.d).enumerate() {
                inner(q, keys, ldk, &mut all[c * BLOCK..][..n]);
            }
            let (values, ldv) = v.rows(b, k0, n, hk, p.dv, &mut buf);
            for c in 0..cols {
                // the part of the block that this query sees
                let (a, e) = (bands.lo[c / group].clamp(k0, k0 + n) - k0, bands.hi[c / group].clamp(k0, k0 + n) - k0);
                if a < e {
                    scores[..e - a].copy_from_slice(&all[c * BLOCK + a..c * BLOCK + e]);
                    let acc = &mut part.acc[c * p.dv..][..p.dv];
                    weigh(&mut scores[..e - a], &values[a * ldv..], ldv, &mut part.max[c], &mut part.sum[c], acc);
                }
            }
        }
        part
    };
    let n = p.b * p.hkv * pieces;
    let parts: Vec<Part<F>> = if (hi - lo) * p.b * p.hkv < PIECE { (0..n).map(task).collect() } else { (0..n).into_par_iter().map(task).collect() };
    for (bh, parts) in parts.chunks(pieces).enumerate() {
        let mut whole = Part::new(cols, p.dv);
        for c in 0..cols {
            let top = parts.iter().fold(F::NEG_INFINITY, |m, x| m.max(x.max[c]));
            let acc = &mut whole.acc[c * p.dv..][..p.dv];
            for x in parts.iter().filter(|x| x.sum[c] > F::ZERO) {
                let s = (x.max[c] - top).exp();
                whole.sum[c] += s * x.sum[c];
                acc.iter_mut().zip(&x.acc[c * p.dv..]).for_each(|(y, x)| *y = s.mul_add(*x, *y));
            }
            whole.max[c] = top;
        }
        finish(p, (bh / p.hkv, bh % p.hkv), 0, gating, &mut whole.acc, &whole.max, &whole.sum, out);
    }
}

vectorized! {
    /// `s[j] = <q, row j>`
    fn inner[F: Real](q: &[F], rows: &[F], ld: usize, s: &mut [F]) {
        for (j, s) in s.iter_mut().enumerate() { *s = dot(q, &rows[j * ld..][..q.len()]) }
    }

    /// A step of the online softmax: `acc` and `total` shrink to the new maximum, and take up the values weighted by `exp(s − max)`.
    fn weigh[F: Real](s: &mut [F], values: &[F], ld: usize, top: &mut F, total: &mut F, acc: &mut [F]) {
        let m = (*top).max(max(s));
        let shrink = (*top - m).exp();
        for s in s.iter_mut() { *s = (*s - m).exp() }
        *total = total.mul_add(shrink, sum(s));
        *top = m;
        let dv = acc.len();
        let (wide, tail) = acc.as_chunks_mut::<32>();
        for (c, y) in wide.iter_mut().enumerate() {
            let mut x = *y;
            for x in &mut x { *x *= shrink }
            for (j, s) in s.iter().enumerate() {
                let row = &values[j * ld + c * 32..][..32];
                for i in 0..32 { x[i] = s.mul_add(row[i], x[i]) }
            }
            *y = x;
        }
        let at = dv - tail.len();
        for y in tail.iter_mut() { *y *= shrink }
        for (j, s) in s.iter().enumerate() {
            for (y, v) in tail.iter_mut().zip(&values[j * ld + at..]) { *y = s.mul_add(*v, *y) }
        }
    }
}
