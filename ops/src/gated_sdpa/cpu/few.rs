//! The forward pass of a few queries behind many keys, as in decoding: keys and values are read once, where they lie, by tasks of [`PIECE`] keys each,
//! whose sums are then put together in order.

use super::{
    Gating, Problem,
    forward::{Outputs, finish},
    mask::Bands,
    view::View,
};
use engine::{
    cpu::simd::{Real, dot, max, prefetch, sum},
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

/// The block that comes next, of all heads, from `at` on: it is asked for row by row while the first head of another is computed with; all at once, it
/// would be waited for.
fn next<'a, F: Real>(x: View<'a>, at: [usize; 3], head: usize, end: usize) -> &'a [F] {
    if head == 0 && at[1] < end { x.there(at).unwrap_or(&[]) } else { &[] }
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
            for (hk, part) in parts.iter_mut().enumerate() {
                let (keys, ldk) = k.rows(b, k0, n, hk, p.d, &mut buf);
                let mut coming = next(k, [b, k0 + n, 0], hk, hi);
                for (q, s) in queries[hk * cols * p.d..].chunks_exact(p.d).zip(scores.chunks_exact_mut(BLOCK)) {
                    inner(q, keys, ldk, std::mem::take(&mut coming), &mut s[..n]);
                }
                let (values, ldv) = v.rows(b, k0, n, hk, p.dv, &mut buf);
                let mut coming = next(v, [b, k0 + n, 0], hk, hi);
                // the part of the block that a column's query sees
                let seen = |c: usize| (bands.lo[c / group].clamp(k0, k0 + n) - k0, bands.hi[c / group].clamp(k0, k0 + n) - k0);
                let mut c = 0;
                while c < cols {
                    let (a, e) = seen(c);
                    let two = c + 1 < cols && seen(c + 1) == (a, e);
                    if a < e {
                        let (s, t) = scores[c * BLOCK..].split_at_mut(BLOCK);
                        let shrink = shift(&mut s[a..e], &mut part.max[c], &mut part.sum[c]);
                        let (y, z) = part.acc[c * p.dv..].split_at_mut(p.dv);
                        let (values, coming) = (&values[a * ldv..], std::mem::take(&mut coming));
                        if two {
                            let t = &mut t[a..e];
                            let other = shift(t, &mut part.max[c + 1], &mut part.sum[c + 1]);
                            add([&s[a..e], t], [shrink, other], values, ldv, coming, [y, &mut z[..p.dv]]);
                        } else {
                            add([&s[a..e]], [shrink], values, ldv, coming, [y]);
                        }
                    }
                    c += 1 + usize::from(two);
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
    /// `s[j] = <q, row j>`, while as many rows of `next` are asked for, of all heads.
    fn inner[F: Real](q: &[F], rows: &[F], ld: usize, next: &[F], s: &mut [F]) {
        let mut done = 0;
        let (q16, rest) = q.as_chunks::<16>();
        if rest.is_empty() {
            let mut quarters = [[F::ZERO; 4]; 16];
            for s in s.as_chunks_mut::<16>().0 {
                for four in 0..4 {
                    let first = done + four * 4;
                    if let Some(x) = next.get(first * ld..(first + 4) * ld) { prefetch(x) }
                    let lanes = four_rows(q16, &rows[first * ld..], ld);
                    for r in 0..4 {
                        let (out, lanes) = (&mut quarters[four * 4 + r], &lanes[r]);
                        for i in 0..4 { out[i] = (lanes[i] + lanes[i + 8]) + (lanes[i + 4] + lanes[i + 12]) }
                    }
                }
                for (s, x) in s.iter_mut().zip(&quarters) { *s = (x[0] + x[2]) + (x[1] + x[3]) }
                done += 16;
            }
        }
        for (j, s) in s.iter_mut().enumerate().skip(done) { *s = dot(q, &rows[j * ld..][..q.len()]) }
    }

    /// A step of the online softmax: scores become `exp(s − max)` for the new maximum, and what was weighted by the old one shrinks by what is returned.
    fn shift[F: Real](s: &mut [F], top: &mut F, total: &mut F) -> F {
        let m = (*top).max(max(s));
        let shrink = (*top - m).exp();
        for s in s.iter_mut() { *s = (*s - m).exp() }
        *total = total.mul_add(shrink, sum(s));
        *top = m;
        shrink
    }

    /// `acc = shrink·acc + Σ s[j]·row j` for N columns, while as many rows of `next` are asked for, of all heads.
    fn add[F: Real, const N: usize](s: [&[F]; N], shrink: [F; N], rows: &[F], ld: usize, next: &[F], acc: [&mut [F]; N]) {
        let (n, dv) = (s[0].len(), acc[0].len());
        let at = dv / 32 * 32;
        for at in (0..at).step_by(32) {
            let mut x = [[F::ZERO; 32]; N];
            for c in 0..N {
                let y = &acc[c][at..][..32];
                for i in 0..32 { x[c][i] = shrink[c] * y[i] }
            }
            for j in 0..n {
                if at == 0 && let Some(x) = next.get(j * ld..(j + 1) * ld) { prefetch(x) }
                let row = &rows[j * ld + at..][..32];
                for c in 0..N {
                    let s = s[c][j];
                    for i in 0..32 { x[c][i] = s.mul_add(row[i], x[c][i]) }
                }
            }
            for c in 0..N { acc[c][at..][..32].copy_from_slice(&x[c]) }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            let tail = &mut acc[at..];
            for y in tail.iter_mut() { *y *= shrink[c] }
            for (j, s) in s[c].iter().enumerate() {
                for (y, v) in tail.iter_mut().zip(&rows[j * ld + at..]) { *y = s.mul_add(*v, *y) }
            }
        }
    }
}

/// The products of `q` with four rows, each in sixteen lanes. Written so that LLVM keeps the lanes in vectors: any path that handles a rest here makes it
/// spill them.
#[inline(always)]
fn four_rows<F: Real>(q: &[[F; 16]], rows: &[F], ld: usize) -> [[F; 16]; 4] {
    let n = q.len() * 16;
    let r: [&[[F; 16]]; 4] =
        [rows[..n].as_chunks().0, rows[ld..][..n].as_chunks().0, rows[2 * ld..][..n].as_chunks().0, rows[3 * ld..][..n].as_chunks().0];
    let mut lanes = [[F::ZERO; 16]; 4];
    for (c, q) in q.iter().enumerate() {
        for k in 0..4 {
            let x = &r[k][c];
            for i in 0..16 {
                lanes[k][i] = q[i].mul_add(x[i], lanes[k][i]);
            }
        }
    }
    lanes
}
