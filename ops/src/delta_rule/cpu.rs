//! Kernels: one task per (sequence, value head), which walks its chunks in order and writes its own rows of the outputs.

use super::kernel::{BackWork, Chunk, ChunkGrad, Dims, Mat, Values, Work};
use super::{CHUNK, DeltaRule, DeltaRuleBackward, L2_EPS, sizes};
use crate::rows::{Rows, Shared};
use engine::cpu::simd::{Real, dot, prefetch};
use engine::cpu::{Inputs, Outputs, scratch};
use engine::{Result, cpu_kernel, dispatch_real, vectorized};
use rayon::prelude::*;
use std::borrow::Cow;

cpu_kernel!(DeltaRule => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
cpu_kernel!(DeltaRuleBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

vectorized! {
    /// y = x · rsqrt(Σ x² + eps); returns the factor.
    fn normalise[F: Real](x: &[F], y: &mut [F]) -> F {
        let r = F::ONE / (dot(x, x) + F::from_f64(L2_EPS)).sqrt();
        for (y, x) in y.iter_mut().zip(x) { *y = *x * r }
        r
    }
    /// From dy for y = x r: dx = r (dy − y Σ dy y), which is finite at x = 0.
    fn normalise_back[F: Real](y: &[F], r: F, dy: &[F], dx: &mut [F]) {
        let s = dot(y, dy);
        for ((y, d), x) in y.iter().zip(dy).zip(dx) { *x = r * (*d - *y * s) }
    }
    fn add[F: Real](x: &[F], y: &mut [F]) { for (y, x) in y.iter_mut().zip(x) { *y += *x } }
}

/// Everything a task reads.
struct Source<'a, F: Real> {
    x: [Cow<'a, [F]>; 3],
    rows: [Rows; 3],
    decay: Option<Cow<'a, [F]>>,
    beta: Option<Cow<'a, [F]>>,
    state: Option<Cow<'a, [F]>>,
    /// (first row of B·T, length) of each sequence
    seqs: Vec<(usize, usize)>,
    hk: usize,
    hv: usize,
    l2: bool,
    dims: Dims<F>,
}

impl<'a, F: Real> Source<'a, F> {
    fn new(op: &DeltaRule, x: &'a Inputs) -> Result<Self> {
        let [b, t, hk, hv, dk, dv] = sizes(x.shape(0), x.shape(2));
        let seqs = match op.at_cu() {
            Some(i) => crate::documents::read("delta_rule", x, i, t)?.windows(2).map(|w| (w[0], w[1] - w[0])).collect(),
            None => (0..b).map(|i| (i * t, t)).collect(),
        };
        let opt = |i: Option<usize>| i.map(|i| x.real::<F>(i)).transpose();
        let scale = op.scale.unwrap_or((dk as f64).powf(-0.5));
        Ok(Source {
            x: [x.real::<F>(0)?, x.real::<F>(1)?, x.real::<F>(2)?],
            rows: [0, 1, 2].map(|i| Rows::new(x.layout(i))),
            decay: opt(op.at_decay())?,
            beta: opt(op.at_beta())?,
            state: opt(op.at_state())?,
            seqs,
            hk,
            hv,
            l2: op.qk_l2norm,
            dims: Dims { dk, dv, scale: F::from_f64(scale), erase: op.erase, decay: op.decay },
        })
    }
    fn tasks(&self) -> Vec<(usize, usize)> {
        (0..self.seqs.len()).flat_map(|s| (0..self.hv).map(move |h| (s, h))).collect()
    }
    fn empty(&self) -> Chunk<F> {
        let d = self.dims;
        Chunk { n: 0, q: Mat::new(CHUNK, d.dk), k: Mat::new(CHUNK, d.dk), v: Mat::new(CHUNK, d.dv), g: vec![], beta: vec![] }
    }
    /// First row (of B·T) and length of chunk `i` of sequence `s`.
    fn place(&self, s: usize, i: usize) -> (usize, usize) {
        let (first, len) = self.seqs[s];
        (first + i * CHUNK, CHUNK.min(len - i * CHUNK))
    }
    /// Chunk `i` of sequence `s` and value head `h`, and the factors of its L2 norms (q's, then k's).
    fn chunk(&self, s: usize, h: usize, i: usize, out: &mut Chunk<F>, norms: &mut Vec<F>) {
        let (at, n) = self.place(s, i);
        out.n = n;
        norms.clear();
        for (i, (dst, d)) in [(&mut out.q, self.dims.dk), (&mut out.k, self.dims.dk), (&mut out.v, self.dims.dv)].into_iter().enumerate() {
            let (heads, head) = if i < 2 { (self.hk, h / (self.hv / self.hk)) } else { (self.hv, h) };
            for r in 0..n {
                let src = &self.x[i][self.rows[i].at((at + r) * heads + head)..][..d];
                if i < 2 && self.l2 {
                    norms.push(normalise(src, dst.row_mut(r, d)));
                } else {
                    dst.row_mut(r, d).copy_from_slice(src);
                }
            }
        }
        let (mut sum, col) = (F::ZERO, |x: &Option<Cow<'_, [F]>>, r: usize| x.as_ref().map(|x| x[(at + r) * self.hv + h]));
        out.g.clear();
        out.beta.clear();
        for r in 0..n {
            // a log-decay of −∞ forgets everything; from −10⁴ on a ratio is 0 in any dtype, and a difference of sums stays a number
            sum += F::from_f64(-1e4).max(col(&self.decay, r).unwrap_or(F::ZERO));
            out.g.push(sum);
            out.beta.push(col(&self.beta, r).unwrap_or(F::ONE));
        }
    }
    /// Asks for the rows of a chunk while another is computed: they lie heads apart, further than the hardware looks ahead.
    fn prefetch(&self, s: usize, h: usize, i: usize) {
        let (at, n) = self.place(s, i);
        for (i, d) in [self.dims.dk, self.dims.dk, self.dims.dv].into_iter().enumerate() {
            let (heads, head) = if i < 2 { (self.hk, h / (self.hv / self.hk)) } else { (self.hv, h) };
            (at..at + n).for_each(|r| prefetch(&self.x[i][self.rows[i].at(r * heads + head)..][..d]));
        }
    }
    fn initial(&self, s: usize, h: usize) -> Mat<F> {
        let d = self.dims;
        let state = self.state.as_ref().map(|x| &x[(s * self.hv + h) * d.dk * d.dv..]);
        load(d.dk, d.dv, |i| state.map(|x| &x[i * d.dv..]))
    }
}

/// A tile whose row i begins with the first `cols` entries of `row(i)`, or of zeros.
fn load<'a, F: Real>(rows: usize, cols: usize, row: impl Fn(usize) -> Option<&'a [F]>) -> Mat<F> {
    let mut m = Mat::new(rows, cols);
    for i in 0..rows {
        match row(i) {
            Some(x) => m.row_mut(i, cols).copy_from_slice(&x[..cols]),
            None => m.row_mut(i, cols).fill(F::ZERO),
        }
    }
    m
}

/// The first `n` of a tile's rows into rows `at ..` of head `h` of a `[rows, heads, d]` output.
fn store<F: Real>(m: &Mat<F>, n: usize, at: usize, hv: usize, h: usize, d: usize, out: &Shared<F>) {
    for r in 0..n {
        // SAFETY: rows of this sequence and head, which one task alone writes.
        unsafe { out.slice(((at + r) * hv + h) * d, d) }.copy_from_slice(m.row(r, d));
    }
}

fn forward<F: Real>(op: &DeltaRule, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let s = Source::<F>::new(op, x)?;
    let (d, hv) = (s.dims, s.hv);
    let (mut o, mut last, mut factor) = (y.real::<F>(0)?, y.slice::<F>(1)?, y.slice::<F>(2)?);
    let (o, last, factor) = (Shared::new(&mut o), Shared::new(&mut last), Shared::new(&mut factor));
    s.tasks().into_par_iter().for_each(|(seq, head)| {
        let mut h = s.initial(seq, head);
        let (mut w, mut c, mut x, mut norms) = (Work::new(d), s.empty(), Values::new(d), vec![]);
        let (mut a, mut out) = (Mat::new(CHUNK, CHUNK), Mat::new(CHUNK, d.dv));
        let chunks = s.seqs[seq].1.div_ceil(CHUNK);
        for i in 0..chunks {
            s.chunk(seq, head, i, &mut c, &mut norms);
            if i + 1 < chunks {
                s.prefetch(seq, head, i + 1);
            }
            let (at, n) = s.place(seq, i);
            w.open(d, &c);
            if d.erase {
                w.factor(d, &c, &mut a);
                for r in 0..n {
                    // SAFETY: as in `store`.
                    let row = unsafe { factor.slice(((at + r) * hv + head) * CHUNK, CHUNK) };
                    row[..n].copy_from_slice(a.row(r, n));
                    row[n..].fill(F::ZERO);
                }
            }
            let before = (i > 0 || s.state.is_some()).then_some(&h);
            w.values(d, &c, &a, before, &mut x);
            w.output(d, &c, before, &x.v, &mut out);
            store(&out, n, at, hv, head, d.dv, &o);
            w.advance(d, &c, &x.v, &mut h);
        }
        store(&h, d.dk, (seq * hv + head) * d.dk, 1, 0, d.dv, &last);
    });
    Ok(())
}

fn backward<F: Real>(op: &DeltaRuleBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let rule = &op.rule;
    let s = Source::<F>::new(rule, x)?;
    let (d, hk, hv) = (s.dims, s.hk, s.hv);
    let base = rule.inputs();
    let (factor, d_o) = (x.slice::<F>(base)?, x.real::<F>(base + 1)?);
    let d_last = if op.state_grad { Some(x.slice::<F>(base + 2)?) } else { None };
    let (mut gq, mut gk, mut gv) = (y.real::<F>(0)?, y.real::<F>(1)?, y.real::<F>(2)?);
    let mut opt = |i: Option<usize>| i.map(|i| y.real::<F>(i)).transpose();
    let (mut gg, mut gb, mut gs) = (opt(rule.at_decay())?, opt(rule.at_beta())?, opt(rule.at_state())?);
    // value heads that share a key head write side by side, and are added afterwards in order
    let shared = |n: usize| scratch::<F>(if hk == hv { 0 } else { n / hk * hv });
    let (mut wide_q, mut wide_k) = (shared(gq.len()), shared(gk.len()));
    let each = if hk == hv { [Shared::new(&mut gq), Shared::new(&mut gk)] } else { [Shared::new(&mut wide_q), Shared::new(&mut wide_k)] };
    let out_v = Shared::new(&mut gv);
    let [out_g, out_b, out_s] = [&mut gg, &mut gb, &mut gs].map(|o| o.as_mut().map(|o| Shared::new(o)));
    s.tasks().into_par_iter().for_each(|(seq, head)| {
        let chunks = s.seqs[seq].1.div_ceil(CHUNK);
        let (mut w, mut bw) = (Work::new(d), BackWork::new(d));
        let read = |src: &[F], width: usize, i: usize, cols: usize, out: &mut Mat<F>| {
            let (at, n) = s.place(seq, i);
            (0..n).for_each(|r| out.row_mut(r, cols).copy_from_slice(&src[((at + r) * hv + head) * width..][..cols]));
        };
        let (mut a, mut go) = (Mat::new(CHUNK, CHUNK), Mat::new(CHUNK, d.dv));
        // forwards again, for the state before each chunk and its V'
        let mut h = s.initial(seq, head);
        let mut kept = Vec::with_capacity(chunks);
        for i in 0..chunks {
            let (mut c, mut norms, mut x) = (s.empty(), vec![], Values::new(d));
            s.chunk(seq, head, i, &mut c, &mut norms);
            if i + 1 < chunks {
                s.prefetch(seq, head, i + 1);
            }
            if d.erase {
                read(factor, CHUNK, i, c.n, &mut a);
            }
            w.decays(&c);
            w.values(d, &c, &a, (i > 0 || s.state.is_some()).then_some(&h), &mut x);
            let mut before = Mat::new(d.dk, d.dv);
            before.copy(&h);
            if i + 1 < chunks {
                w.advance(d, &c, &x.v, &mut h);
            }
            kept.push((c, norms, before, x));
        }
        let d_last = d_last.map(|x| &x[(seq * hv + head) * d.dk * d.dv..]);
        let mut dh = load(d.dk, d.dv, |i| d_last.map(|x| &x[i * d.dv..]));
        let mut grad = ChunkGrad { q: Mat::new(CHUNK, d.dk), k: Mat::new(CHUNK, d.dk), v: Mat::new(CHUNK, d.dv), g: vec![], beta: vec![] };
        for (i, (c, norms, before, x)) in kept.into_iter().enumerate().rev() {
            if d.erase && i + 1 < chunks {
                read(factor, CHUNK, i, c.n, &mut a);
            }
            read(&d_o, d.dv, i, d.dv, &mut go);
            if i > 0 {
                let (at, n) = s.place(seq, i - 1);
                for r in at..at + n {
                    prefetch(&d_o[(r * hv + head) * d.dv..][..d.dv]);
                    if d.erase {
                        prefetch(&factor[(r * hv + head) * CHUNK..][..CHUNK]);
                    }
                }
            }
            let sides = [i + 1 < chunks || d_last.is_some(), i > 0 || s.state.is_some()];
            bw.chunk(&mut w, d, &c, &a, sides[1].then_some(&before), &x, &go, &mut dh, sides, &mut grad);
            let (at, n) = s.place(seq, i);
            for (j, (y, g)) in [(&c.q, &grad.q), (&c.k, &grad.k)].into_iter().enumerate() {
                if !s.l2 {
                    store(g, n, at, hv, head, d.dk, &each[j]);
                    continue;
                }
                for r in 0..n {
                    // SAFETY: as in `store`.
                    let out = unsafe { each[j].slice(((at + r) * hv + head) * d.dk, d.dk) };
                    normalise_back(y.row(r, d.dk), norms[j * n + r], g.row(r, d.dk), out);
                }
            }
            store(&grad.v, n, at, hv, head, d.dv, &out_v);
            // g_i is the sum of log-decays up to i, so theirs are sums backwards
            let mut sum = F::ZERO;
            for r in (0..n).rev() {
                sum += grad.g[r];
                for (out, x) in [(&out_g, sum), (&out_b, grad.beta[r])] {
                    if let Some(out) = out {
                        // SAFETY: as in `store`.
                        let row = unsafe { out.slice((at + r) * hv + head, 1) };
                        row[0] = x;
                    }
                }
            }
        }
        if let Some(out) = &out_s {
            store(&dh, d.dk, (seq * hv + head) * d.dk, 1, 0, d.dv, out);
        }
    });
    if hk != hv && d.dk > 0 {
        for (out, wide) in [(&mut gq, &wide_q), (&mut gk, &wide_k)] {
            let width = hv / hk * d.dk;
            out.par_chunks_mut(d.dk).zip(wide.par_chunks(width)).with_min_len(64).for_each(|(o, w)| {
                o.copy_from_slice(&w[..d.dk]);
                w[d.dk..].chunks(d.dk).for_each(|w| add(w, o));
            });
        }
    }
    Ok(())
}
