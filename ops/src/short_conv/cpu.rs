//! Kernels: blocks of time in parallel, each row of channels vectorised; the weight is held tap by tap.

use super::{ShortConv, ShortConvBackward, sizes};
use crate::rows::{Rows, Shared};
use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs, scratch};
use engine::{Layout, Result, cpu_kernel, dispatch_real, vectorized};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Taps of a product: what the models use.
const TAPS: usize = 4;
/// Time steps per task.
const BLOCK: usize = 64;

cpu_kernel!(ShortConv => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
cpu_kernel!(ShortConvBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

vectorized! {
    /// y = Σ_j x_j ⊙ w_j, or y += it.
    fn mix[F: Real](taps: &[(&[F], &[F])], add: bool, y: &mut [F]) {
        let n = y.len();
        if let &[(a, p), (b, q), (c, r), (d, s)] = taps {
            let (a, b, c, d, p, q, r, s) = (&a[..n], &b[..n], &c[..n], &d[..n], &p[..n], &q[..n], &r[..n], &s[..n]);
            for i in 0..n {
                let old = if add { y[i] } else { F::ZERO };
                y[i] = a[i].mul_add(p[i], b[i].mul_add(q[i], c[i].mul_add(r[i], d[i].mul_add(s[i], old))));
            }
        } else {
            if !add { y.fill(F::ZERO) }
            for (x, w) in taps { for ((y, x), w) in y.iter_mut().zip(*x).zip(*w) { *y = x.mul_add(*w, *y) } }
        }
    }
    fn silu_row[F: Real](y: &mut [F]) {
        for y in y.iter_mut() { *y = y.silu() }
    }
    /// g = dy · silu'(z)
    fn silu_back_row[F: Real](z: &[F], dy: &[F], g: &mut [F]) {
        for ((g, z), dy) in g.iter_mut().zip(z).zip(dy) { let s = z.sigmoid(); *g = *dy * s * (F::ONE + *z * (F::ONE - s)) }
    }
    /// p += x ⊙ g
    fn fma_row[F: Real](x: &[F], g: &[F], p: &mut [F]) {
        for ((p, x), g) in p.iter_mut().zip(x).zip(g) { *p = x.mul_add(*g, *p) }
    }
}

/// What a kernel reads: the input's rows, where each step's document begins, and the state before step 0.
struct Source<'a, F: Real> {
    x: Cow<'a, [F]>,
    rows: Rows,
    /// Offset in a row of the input, and the channels there.
    pieces: Vec<(usize, Range<usize>)>,
    state: Option<Cow<'a, [F]>>,
    starts: Vec<usize>,
    /// Rows (of B·T) of each packed document, or all rows.
    documents: Vec<Range<usize>>,
    t: usize,
    c: usize,
    k: usize,
}

impl<'a, F: Real> Source<'a, F> {
    fn new(op: &ShortConv, x: &'a Inputs) -> Result<Self> {
        let (b, t, c, k) = sizes(x.shape(0), x.shape(1));
        let l = x.layout(0);
        // a 4-D view is read head by head, unless its heads lie side by side
        let heads = if l.shape.len() == 4 && (l.strides[2] != l.shape[3] as isize && l.shape[2] != 1) { l.shape[2] } else { 1 };
        let stride = if heads > 1 { l.strides[2] as usize } else { 0 };
        let pieces = (0..heads).map(|h| (h * stride, h * (c / heads)..(h + 1) * (c / heads))).collect();
        let rows = Rows::new(&Layout { shape: vec![b, t, 1], strides: vec![l.strides[0], l.strides[1], 1], offset: 0 });
        let mut starts = vec![0; t];
        let mut documents: Vec<Range<usize>> = std::iter::once(0..b * t).collect();
        if op.packed {
            let cu = crate::documents::read("short_conv", x, op.inputs() - 1, t)?;
            cu.windows(2).for_each(|w| starts[w[0]..w[1]].fill(w[0]));
            documents = cu.windows(2).map(|w| w[0]..w[1]).collect();
        }
        let state = if op.state { Some(x.real::<F>(2)?) } else { None };
        Ok(Source { x: x.real::<F>(0)?, rows, pieces, state, starts, documents, t, c, k })
    }
    /// Runs of rows for the tasks. They begin anew with each document, whose share of dw is then the one it has alone.
    fn blocks(&self) -> Vec<Range<usize>> {
        let cut = |d: &Range<usize>| d.clone().step_by(BLOCK).map(|at| at..(at + BLOCK).min(d.end)).collect::<Vec<_>>();
        self.documents.iter().flat_map(cut).collect()
    }
    /// The input's channels `ch`, at offset `off` of a row, `back` steps before (b, t), if there is one.
    #[inline]
    fn past(&self, b: usize, t: usize, back: usize, off: usize, ch: &Range<usize>) -> Option<&[F]> {
        if t >= self.starts[t] + back {
            let at = self.rows.at(b * self.t + t - back) + off;
            return Some(&self.x[at..at + ch.len()]);
        }
        let at = (b * (self.k - 1) + self.k - 1 + t - back) * self.c;
        self.state.as_ref().map(|s| &s[at + ch.start..at + ch.end])
    }
}

/// `[C, K]` as `[K, C]`.
fn taps<F: Real>(w: &[F], c: usize, k: usize) -> Vec<F> {
    (0..k * c).map(|i| w[i % c * k + i / c]).collect()
}

fn convolve<'a, F: Real>(s: &'a Source<F>, w: &'a [F], b: usize, t: usize, taps: &mut Vec<(&'a [F], &'a [F])>, y: &mut [F]) {
    for (off, ch) in &s.pieces {
        taps.clear();
        for back in 0..s.k {
            if let Some(x) = s.past(b, t, back, *off, ch) {
                taps.push((x, &w[(s.k - 1 - back) * s.c..][ch.clone()]));
            }
        }
        mix(taps, false, &mut y[ch.clone()]);
    }
}

fn forward<F: Real>(op: &ShortConv, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let s = Source::<F>::new(op, x)?;
    let (c, k) = (s.c, s.k);
    let w = taps(&x.real::<F>(1)?, c, k);
    let (mut out, mut last) = (y.real::<F>(0)?, y.real::<F>(1)?);
    if c == 0 {
        return Ok(());
    }
    out.par_chunks_mut(BLOCK * c).enumerate().for_each(|(block, rows)| {
        let mut taps = vec![];
        for (i, row) in rows.chunks_mut(c).enumerate() {
            let at = block * BLOCK + i;
            convolve(&s, &w, at / s.t, at % s.t, &mut taps, row);
            if op.silu {
                silu_row(row);
            }
        }
    });
    last.fill(F::ZERO);
    for (i, row) in last.chunks_mut(c).enumerate() {
        // entry j of the state is the input K − 1 − j steps before the one that comes next
        let (b, j) = (i / (k - 1), i % (k - 1));
        let back = k - 1 - j;
        if s.t >= back {
            for (off, ch) in &s.pieces {
                if let Some(x) = s.past(b, s.t - 1, back - 1, *off, ch) {
                    row[ch.clone()].copy_from_slice(x);
                }
            }
        } else if let Some(st) = &s.state {
            let from = (b * (k - 1) + k - 1 + s.t - back) * c;
            row.copy_from_slice(&st[from..from + c]);
        }
    }
    Ok(())
}

fn backward<F: Real>(op: &ShortConvBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let s = Source::<F>::new(&op.conv, x)?;
    let (c, k, t) = (s.c, s.k, s.t);
    let n = op.conv.inputs();
    let (w, dy) = (taps(&x.real::<F>(1)?, c, k), x.real::<F>(n)?);
    let dlast = if op.state_grad { Some(x.real::<F>(n + 1)?) } else { None };
    let (mut dx, mut dw) = (y.real::<F>(0)?, y.real::<F>(1)?);
    if c == 0 {
        return Ok(());
    }
    // gradient before the activation, and each block's share of dw
    let mut before = scratch::<F>(if op.conv.silu { dy.len() } else { 0 });
    let activated = Shared::new(&mut before);
    let parts: Vec<Vec<F>> = s
        .blocks()
        .into_par_iter()
        .map(|block| {
            let (mut part, mut z, mut taps) = (vec![F::ZERO; k * c], vec![F::ZERO; c], vec![]);
            for at in block {
                let mut g = &dy[at * c..][..c];
                if op.conv.silu {
                    convolve(&s, &w, at / t, at % t, &mut taps, &mut z);
                    // SAFETY: the row belongs to this block, and so to this task alone.
                    let row = unsafe { activated.slice(at * c, c) };
                    silu_back_row(&z, g, row);
                    g = row;
                }
                for (off, ch) in &s.pieces {
                    for back in 0..k {
                        if let Some(x) = s.past(at / t, at % t, back, *off, ch) {
                            fma_row(x, &g[ch.clone()], &mut part[(k - 1 - back) * c..][ch.clone()]);
                        }
                    }
                }
            }
            part
        })
        .collect();
    let g: &[F] = if op.conv.silu { &before } else { &dy };
    let mut sum = vec![F::ZERO; k * c];
    let mut parts = parts.into_iter();
    for document in &s.documents {
        let own: Vec<Vec<F>> = parts.by_ref().take(document.len().div_ceil(BLOCK)).collect();
        let own = own.into_iter().reduce(|mut a, b| {
            a.iter_mut().zip(&b).for_each(|(a, b)| *a += *b);
            a
        });
        sum.iter_mut().zip(own.iter().flatten()).for_each(|(a, b)| *a += *b);
    }
    for ch in 0..c {
        for j in 0..k {
            dw[ch * k + j] = sum[j * c + ch];
        }
    }
    // dx[t] = Σ_back w[back] · g[t + back], while t + back is in the same document
    let into = |b: usize, t0: isize, row: &mut [F]| {
        let (mut taps, mut n) = ([(&[][..], &[][..]); TAPS], 0);
        row.fill(F::ZERO);
        for back in 0..k {
            let at = t0 + back as isize;
            if at < 0 || at >= t as isize {
                continue;
            }
            let at = at as usize;
            if t0 >= 0 && s.starts[at] as isize > t0 || t0 < 0 && s.starts[at] > 0 {
                continue;
            }
            taps[n] = (&g[(b * t + at) * c..][..c], &w[(k - 1 - back) * c..][..c]);
            n += 1;
            if n == TAPS {
                mix(&taps, true, row);
                n = 0;
            }
        }
        mix(&taps[..n], true, row);
        if let Some(d) = &dlast {
            // this input is entry j of the final state, if it is among the last K − 1 and of the last document
            let j = t0 - t as isize + k as isize - 1;
            let last = s.starts.last().map_or(0, |s| *s as isize);
            if j >= 0 && (last == 0 || t0 >= last) {
                let from = (b * (k - 1) + j as usize) * c;
                row.iter_mut().zip(&d[from..from + c]).for_each(|(r, d)| *r += *d);
            }
        }
    };
    dx.par_chunks_mut(BLOCK * c).enumerate().for_each(|(block, rows)| {
        for (i, row) in rows.chunks_mut(c).enumerate() {
            let at = block * BLOCK + i;
            into(at / t, (at % t) as isize, row);
        }
    });
    if op.conv.state {
        let mut ds = y.real::<F>(2)?;
        for (i, row) in ds.chunks_mut(c).enumerate() {
            into(i / (k - 1), (i % (k - 1)) as isize - (k as isize - 1), row);
        }
    }
    Ok(())
}
