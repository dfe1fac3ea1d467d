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
/// Keys of a task, in which all heads are done; the cut does not depend on the number of threads.
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
    // all heads of a piece in one task: they lie side by side
    let task = |i: usize| -> Vec<Part<F>> {
        let (b, piece) = (i / pieces, i % pieces);
        let mut queries = vec![F::ZERO; p.hkv * cols * p.d];
        for (c, row) in queries.chunks_exact_mut(p.d).enumerate() {
            let (hk, c) = (c / cols, c % cols);
            q.row([b, c / group, hk * group + c % group], F::from_f64(p.scale), row);
        }
        let mut parts: Vec<Part<F>> = (0..p.hkv).map(|_| Part::new(cols, p.dv)).collect();
        let (mut buf, mut scores) = (vec![F::ZERO; BLOCK * p.d.max(p.dv)], vec![F::ZERO; cols * BLOCK]);
        let from = lo + piece * PIECE;
        let end = (from + PIECE).min(hi);
        for k0 in (from..end).step_by(BLOCK) {
            let n = BLOCK.min(end - k0);
            // the values come while the scores are formed; the keys of the next block, while these values are summed
            v.ahead::<F>(b, k0, n);
            k.ahead::<F>(b, k0 + n, BLOCK.min(end - k0 - n));
            for (hk, part) in parts.iter_mut().enumerate() {
                let (keys, ldk) = k.rows(b, k0, n, hk, p.d, &mut buf);
                for (q, s) in queries[hk * cols * p.d..].chunks_exact(p.d).zip(scores.chunks_exact_mut(BLOCK)) {
                    inner(q, keys, ldk, &mut s[..n]);
                }
                let (values, ldv) = v.rows(b, k0, n, hk, p.dv, &mut buf);
                for (c, s) in scores.chunks_exact_mut(BLOCK).enumerate() {
                    // the part of the block that this query sees
                    let (a, e) = (bands.lo[c / group].clamp(k0, k0 + n) - k0, bands.hi[c / group].clamp(k0, k0 + n) - k0);
                    if a < e {
                        let acc = &mut part.acc[c * p.dv..][..p.dv];
                        weigh(&mut s[a..e], &values[a * ldv..], ldv, &mut part.max[c], &mut part.sum[c], acc);
                    }
                }
            }
        }
        parts
    };
    let n = p.b * pieces;
    let parts: Vec<Vec<Part<F>>> = if n == 1 { vec![task(0)] } else { (0..n).into_par_iter().map(task).collect() };
    for (b, parts) in parts.chunks(pieces).enumerate() {
        for hk in 0..p.hkv {
            let mut whole = Part::new(cols, p.dv);
            for c in 0..cols {
                let top = parts.iter().fold(F::NEG_INFINITY, |m, x| m.max(x[hk].max[c]));
                let acc = &mut whole.acc[c * p.dv..][..p.dv];
                for x in parts.iter().map(|x| &x[hk]).filter(|x| x.sum[c] > F::ZERO) {
                    let s = (x.max[c] - top).exp();
                    whole.sum[c] += s * x.sum[c];
                    acc.iter_mut().zip(&x.acc[c * p.dv..]).for_each(|(y, x)| *y = s.mul_add(*x, *y));
                }
                whole.max[c] = top;
            }
            finish(p, (b, hk), 0, gating, &mut whole.acc, &whole.max, &whole.sum, out);
        }
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
