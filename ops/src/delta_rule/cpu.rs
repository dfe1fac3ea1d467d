//! Kernels: one task per (sequence, value head), which walks its chunks in order; results are interleaved into `[B, T, H, D]` afterwards.

use super::kernel::{BackWork, Chunk, ChunkGrad, Dims, Work};
use super::{CHUNK, DeltaRule, DeltaRuleBackward, L2_EPS, sizes};
use crate::rows::Rows;
use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{Result, cpu_kernel, dispatch_real, vectorized};
use rayon::prelude::*;
use std::borrow::Cow;

cpu_kernel!(DeltaRule => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
cpu_kernel!(DeltaRuleBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

vectorized! {
    /// x · rsqrt(Σ x² + eps); returns the factor.
    fn normalise[F: Real](x: &mut [F]) -> F {
        let mut s = F::ZERO;
        for x in x.iter() { s = x.mul_add(*x, s) }
        let r = F::ONE / (s + F::from_f64(L2_EPS)).sqrt();
        for x in x.iter_mut() { *x *= r }
        r
    }
    /// From dy for y = x r: dx = r (dy − y Σ dy y), which is finite at x = 0.
    fn normalise_back[F: Real](y: &[F], r: F, dy: &mut [F]) {
        let mut s = F::ZERO;
        for (y, d) in y.iter().zip(dy.iter()) { s = y.mul_add(*d, s) }
        for (y, d) in y.iter().zip(dy.iter_mut()) { *d = r * (*d - *y * s) }
    }
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
    /// Chunk `c` of sequence `s` and value head `h`, and the factors of its L2 norms (q's, then k's).
    fn chunk(&self, s: usize, h: usize, c: usize, out: &mut Chunk<F>, norms: &mut Vec<F>) {
        let (first, len) = self.seqs[s];
        let n = CHUNK.min(len - c * CHUNK);
        let at = first + c * CHUNK;
        out.n = n;
        norms.clear();
        for (i, (dst, d)) in [(&mut out.q, self.dims.dk), (&mut out.k, self.dims.dk), (&mut out.v, self.dims.dv)].into_iter().enumerate() {
            let (heads, head) = if i < 2 { (self.hk, h / (self.hv / self.hk)) } else { (self.hv, h) };
            dst.clear();
            for r in 0..n {
                dst.extend_from_slice(&self.x[i][self.rows[i].at((at + r) * heads + head)..][..d]);
            }
            if i < 2 && self.l2 {
                norms.extend(dst.chunks_mut(d.max(1)).map(normalise));
            }
        }
        let (mut sum, col) = (F::ZERO, |x: &Option<Cow<'_, [F]>>, r: usize| x.as_ref().map(|x| x[(at + r) * self.hv + h]));
        out.g.clear();
        out.beta.clear();
        for r in 0..n {
            sum += col(&self.decay, r).unwrap_or(F::ZERO);
            out.g.push(sum);
            out.beta.push(col(&self.beta, r).unwrap_or(F::ONE));
        }
    }
    fn initial(&self, s: usize, h: usize) -> Vec<F> {
        let n = self.dims.dk * self.dims.dv;
        match &self.state {
            Some(x) => x[(s * self.hv + h) * n..][..n].to_vec(),
            None => vec![F::ZERO; n],
        }
    }
}

fn empty<F>() -> Chunk<F> {
    Chunk { n: 0, q: vec![], k: vec![], v: vec![], g: vec![], beta: vec![] }
}

/// Copies each task's `[len, d]` into `[B·T, heads, d]`, tasks being in (sequence, head) order; heads that share a slot (`heads < hv`) are added in order.
fn interleave<F: Real>(src: &[Vec<F>], seqs: &[(usize, usize)], hv: usize, heads: usize, d: usize, out: &mut [F]) {
    if d == 0 || out.is_empty() {
        return;
    }
    let mut of_row = vec![(0, 0); out.len() / (heads * d)];
    for (s, (first, len)) in seqs.iter().enumerate() {
        for i in 0..*len {
            of_row[first + i] = (s, i);
        }
    }
    let group = hv / heads;
    const ROWS: usize = 64;
    out.par_chunks_mut(ROWS * heads * d).enumerate().for_each(|(b, rows)| {
        for (r, row) in rows.chunks_mut(heads * d).enumerate() {
            let (s, i) = of_row[b * ROWS + r];
            for (h, o) in row.chunks_mut(d).enumerate() {
                o.copy_from_slice(&src[s * hv + h * group][i * d..][..d]);
                for g in 1..group {
                    o.iter_mut().zip(&src[s * hv + h * group + g][i * d..][..d]).for_each(|(o, x)| *o += *x);
                }
            }
        }
    });
}

fn forward<F: Real>(op: &DeltaRule, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let s = Source::<F>::new(op, x)?;
    let d = s.dims;
    struct Out<F> {
        o: Vec<F>,
        a: Vec<F>,
        h: Vec<F>,
    }
    let outs: Vec<Out<F>> = s
        .tasks()
        .into_par_iter()
        .map(|(seq, head)| {
            let len = s.seqs[seq].1;
            let mut h = s.initial(seq, head);
            let (mut o, mut a) = (vec![F::ZERO; len * d.dv], if d.erase { vec![F::ZERO; len * CHUNK] } else { vec![] });
            let (mut w, mut c, mut norms) = (Work::new(d), empty(), vec![]);
            for i in 0..len.div_ceil(CHUNK) {
                s.chunk(seq, head, i, &mut c, &mut norms);
                let n = c.n;
                // the factor of a chunk of n steps is kept dense, n × n, at the start of the chunk's place
                let a = if d.erase { &mut a[i * CHUNK * CHUNK..][..n * n] } else { &mut [][..] };
                if d.erase {
                    w.factor(d, &c, a);
                }
                w.values(d, &c, a, &h);
                w.output(d, &c, &h, &mut o[i * CHUNK * d.dv..][..n * d.dv]);
                w.advance(d, &c, &mut h);
            }
            Out { o, a, h }
        })
        .collect();
    let (mut os, mut factors, mut states) = (vec![], vec![], vec![]);
    for t in outs {
        os.push(t.o);
        factors.push(t.a);
        states.push(t.h);
    }
    interleave(&os, &s.seqs, s.hv, s.hv, d.dv, &mut y.real::<F>(0)?);
    let n = d.dk * d.dv;
    let mut last = y.slice::<F>(1)?;
    if n > 0 {
        last.chunks_mut(n).zip(&states).for_each(|(o, h)| o.copy_from_slice(h));
    }
    interleave(&factors, &s.seqs, s.hv, s.hv, if d.erase { CHUNK } else { 0 }, &mut y.slice::<F>(2)?);
    Ok(())
}

fn backward<F: Real>(op: &DeltaRuleBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let rule = &op.rule;
    let s = Source::<F>::new(rule, x)?;
    let d = s.dims;
    let base = rule.inputs();
    let (factor, d_o) = (x.slice::<F>(base)?, x.real::<F>(base + 1)?);
    let d_last = if op.state_grad { Some(x.slice::<F>(base + 2)?) } else { None };
    let size = d.dk * d.dv;
    struct Out<F> {
        q: Vec<F>,
        k: Vec<F>,
        v: Vec<F>,
        g: Vec<F>,
        beta: Vec<F>,
        h: Vec<F>,
    }
    let outs: Vec<Out<F>> = s
        .tasks()
        .into_par_iter()
        .map(|(seq, head)| {
            let (first, len) = s.seqs[seq];
            let chunks = len.div_ceil(CHUNK);
            let (mut w, mut bw, mut c, mut norms) = (Work::new(d), BackWork::new(d), empty(), vec![]);
            let gather = |src: &[F], width: usize, i: usize, rows: usize, out: &mut Vec<F>| {
                out.clear();
                for r in 0..rows {
                    out.extend_from_slice(&src[((first + i * CHUNK + r) * s.hv + head) * width..][..width]);
                }
            };
            let (mut a, mut go) = (vec![], vec![]);
            // states before each chunk
            let mut h = s.initial(seq, head);
            let mut states = Vec::with_capacity(chunks * size);
            for i in 0..chunks {
                states.extend_from_slice(&h);
                if i + 1 < chunks {
                    s.chunk(seq, head, i, &mut c, &mut norms);
                    if d.erase {
                        gather(factor, CHUNK, i, c.n, &mut a);
                    }
                    w.values(d, &c, &a, &h);
                    w.advance(d, &c, &mut h);
                }
            }
            let mut dh = match d_last {
                Some(x) => x[(seq * s.hv + head) * size..][..size].to_vec(),
                None => vec![F::ZERO; size],
            };
            let z = |n: usize| vec![F::ZERO; n];
            let mut out = Out { q: z(len * d.dk), k: z(len * d.dk), v: z(len * d.dv), g: z(len), beta: z(len), h: vec![] };
            for i in (0..chunks).rev() {
                s.chunk(seq, head, i, &mut c, &mut norms);
                let n = c.n;
                if d.erase {
                    gather(factor, CHUNK, i, n, &mut a);
                }
                gather(&d_o, d.dv, i, n, &mut go);
                let mut grad = ChunkGrad { q: z(n * d.dk), k: z(n * d.dk), v: z(n * d.dv), g: z(n), beta: z(n) };
                bw.chunk(&mut w, d, &c, &a, &states[i * size..(i + 1) * size], &go, &mut dh, &mut grad);
                // running sum backwards: g_i is the sum of log-decays up to i
                let mut sum = F::ZERO;
                for g in grad.g.iter_mut().rev() {
                    sum += *g;
                    *g = sum;
                }
                if s.l2 {
                    for (j, (y, g)) in [(&c.q, &mut grad.q), (&c.k, &mut grad.k)].into_iter().enumerate() {
                        for r in 0..n {
                            normalise_back(&y[r * d.dk..(r + 1) * d.dk], norms[j * n + r], &mut g[r * d.dk..(r + 1) * d.dk]);
                        }
                    }
                }
                let at = i * CHUNK;
                out.q[at * d.dk..][..n * d.dk].copy_from_slice(&grad.q);
                out.k[at * d.dk..][..n * d.dk].copy_from_slice(&grad.k);
                out.v[at * d.dv..][..n * d.dv].copy_from_slice(&grad.v);
                out.g[at..at + n].copy_from_slice(&grad.g);
                out.beta[at..at + n].copy_from_slice(&grad.beta);
            }
            out.h = dh;
            out
        })
        .collect();
    let mut parts: [Vec<Vec<F>>; 6] = Default::default();
    for t in outs {
        for (p, v) in parts.iter_mut().zip([t.q, t.k, t.v, t.g, t.beta, t.h]) {
            p.push(v);
        }
    }
    interleave(&parts[0], &s.seqs, s.hv, s.hk, d.dk, &mut y.real::<F>(0)?);
    interleave(&parts[1], &s.seqs, s.hv, s.hk, d.dk, &mut y.real::<F>(1)?);
    interleave(&parts[2], &s.seqs, s.hv, s.hv, d.dv, &mut y.real::<F>(2)?);
    if let Some(i) = rule.at_decay() {
        interleave(&parts[3], &s.seqs, s.hv, s.hv, 1, &mut y.real::<F>(i)?);
    }
    if let Some(i) = rule.at_beta() {
        interleave(&parts[4], &s.seqs, s.hv, s.hv, 1, &mut y.real::<F>(i)?);
    }
    if let Some(i) = rule.at_state() {
        let mut out = y.slice::<F>(i)?;
        if size > 0 {
            out.chunks_mut(size).zip(&parts[5]).for_each(|(o, h)| o.copy_from_slice(h));
        }
    }
    Ok(())
}
