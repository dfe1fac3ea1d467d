//! Kernels: one task per (sequence, value head), which walks its chunks in order and writes its own rows of the outputs.

use super::kernel::{BackWork, CHUNK, Chunk, ChunkGrad, Dims, Mat, Work};
use super::{DeltaRule, DeltaRuleBackward, L2_EPS, sizes};
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
    /// Those of q, k and v that are asked for (in `part`) of chunk `i` of sequence `s` and value head `h`, and the factors of q's and k's L2 norms.
    fn chunk(&self, s: usize, h: usize, i: usize, part: std::ops::Range<usize>, out: &mut Chunk<F>, norms: &mut [[F; CHUNK]; 2]) {
        let (at, n) = self.place(s, i);
        out.n = n;
        for i in part {
            let (dst, d) = [(&mut out.q, self.dims.dk), (&mut out.k, self.dims.dk), (&mut out.v, self.dims.dv)].into_iter().nth(i).unwrap();
            let (heads, head) = if i < 2 { (self.hk, h / (self.hv / self.hk)) } else { (self.hv, h) };
            for r in 0..n {
                let src = &self.x[i][self.rows[i].at((at + r) * heads + head)..][..d];
                if i < 2 && self.l2 {
                    norms[i][r] = normalise(src, dst.row_mut(r, d));
                } else {
                    dst.row_mut(r, d).copy_from_slice(src);
                }
            }
        }
        let (mut sum, col) = (0f64, |x: &Option<Cow<'_, [F]>>, r: usize| x.as_ref().map(|x| x[(at + r) * self.hv + h]));
        out.g.clear();
        out.beta.clear();
        for r in 0..n {
            // a log-decay of −∞ forgets everything; from −10⁴ on a ratio is 0 in any dtype, and a difference of sums stays a number
            sum += col(&self.decay, r).map_or(0.0, |g| g.to_f64().max(-1e4));
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
    let (mut o, mut last, mut kept) = (y.real::<F>(0)?, y.slice::<F>(1)?, y.slice::<F>(2)?);
    let (o, last, kept) = (Shared::new(&mut o), Shared::new(&mut last), Shared::new(&mut kept));
    s.tasks().into_par_iter().for_each(|(seq, head)| {
        let mut h = s.initial(seq, head);
        let (mut w, mut c, mut norms) = (Work::new(d), s.empty(), [[F::ZERO; CHUNK]; 2]);
        let (mut a, mut v_new, mut out) = (Mat::new(CHUNK, CHUNK), Mat::new(CHUNK, d.dv), Mat::new(CHUNK, d.dv));
        let chunks = s.seqs[seq].1.div_ceil(CHUNK);
        for i in 0..chunks {
            s.chunk(seq, head, i, 0..3, &mut c, &mut norms);
            if i + 1 < chunks {
                s.prefetch(seq, head, i + 1);
            }
            let (at, n) = s.place(seq, i);
            w.open(d, &c);
            let before = (i > 0 || s.state.is_some()).then_some(&h);
            w.values(d, &c, before, &mut a, &mut out, &mut v_new);
            if d.erase {
                store(&v_new, n, at, hv, head, d.dv, &kept);
            }
            w.output(d, &c, before, &v_new, &mut out);
            store(&out, n, at, hv, head, d.dv, &o);
            w.advance(d, &c, &v_new, &mut h);
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
    let (v_new, d_o) = (x.slice::<F>(base)?, x.real::<F>(base + 1)?);
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
        let read = |src: &[F], i: usize, out: &mut Mat<F>| {
            let (at, n) = s.place(seq, i);
            (0..n).for_each(|r| out.row_mut(r, d.dv).copy_from_slice(&src[((at + r) * hv + head) * d.dv..][..d.dv]));
        };
        let fetch = |c: &Chunk<F>, i: usize, out: &mut Mat<F>| {
            if d.erase { read(v_new, i, out) } else { c.written(d, out) }
        };
        let (mut c, mut norms) = (s.empty(), [[F::ZERO; CHUNK]; 2]);
        let (mut x, mut go) = (Mat::new(CHUNK, d.dv), Mat::new(CHUNK, d.dv));
        // forwards again, for the state before each chunk
        let mut states = vec![s.initial(seq, head)];
        for i in 0..chunks.saturating_sub(1) {
            s.chunk(seq, head, i, 1..if d.erase { 2 } else { 3 }, &mut c, &mut norms);
            fetch(&c, i, &mut x);
            w.decays(&c);
            let mut h = Mat::new(d.dk, d.dv);
            h.copy(&states[i]);
            w.advance(d, &c, &x, &mut h);
            states.push(h);
        }
        let d_last = d_last.map(|x| &x[(seq * hv + head) * d.dk * d.dv..]);
        let mut dh = load(d.dk, d.dv, |i| d_last.map(|x| &x[i * d.dv..]));
        let mut grad = ChunkGrad { q: Mat::new(CHUNK, d.dk), k: Mat::new(CHUNK, d.dk), v: Mat::new(CHUNK, d.dv), g: vec![], beta: vec![] };
        for i in (0..chunks).rev() {
            let before = states.pop();
            s.chunk(seq, head, i, 0..3, &mut c, &mut norms);
            fetch(&c, i, &mut x);
            read(&d_o, i, &mut go);
            if i > 0 {
                s.prefetch(seq, head, i - 1);
                let (at, n) = s.place(seq, i - 1);
                for r in at..at + n {
                    prefetch(&d_o[(r * hv + head) * d.dv..][..d.dv]);
                    if d.erase {
                        prefetch(&v_new[(r * hv + head) * d.dv..][..d.dv]);
                    }
                }
            }
            let sides = [i + 1 < chunks || d_last.is_some(), i > 0 || s.state.is_some()];
            bw.chunk(&mut w, d, &c, before.as_ref().filter(|_| sides[1]), &x, &go, &mut dh, sides, &mut grad);
            let (at, n) = s.place(seq, i);
            for (j, (y, g)) in [(&c.q, &grad.q), (&c.k, &grad.k)].into_iter().enumerate() {
                if !s.l2 {
                    store(g, n, at, hv, head, d.dk, &each[j]);
                    continue;
                }
                for r in 0..n {
                    // SAFETY: as in `store`.
                    let out = unsafe { each[j].slice(((at + r) * hv + head) * d.dk, d.dk) };
                    normalise_back(y.row(r, d.dk), norms[j][r], g.row(r, d.dk), out);
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
