//! Kernels: experts in parallel, each on its contiguous run of the sorted tokens.

use super::{Moe, MoeBackward, sizes};
use engine::cpu::gemm::{NARROW_ROWS, gemm, gemm_few, gemm_narrow};
use engine::cpu::simd::{Real, dot};
use engine::cpu::{Inputs, Outputs, Scratch, convert, scratch};
use engine::half::bf16;
use engine::{DType, Result, cpu_kernel, dispatch_real, vectorized};
use rayon::prelude::*;
use std::borrow::Cow;

cpu_kernel!(Moe => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
cpu_kernel!(MoeBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

vectorized! {
    fn swiglu[F: Real](gu: &[F], i: usize, act: &mut [F]) {
        for (a, r) in act.chunks_mut(i).zip(gu.chunks(2 * i)) {
            for ((a, g), u) in a.iter_mut().zip(&r[..i]).zip(&r[i..]) { *a = g.silu() * *u }
        }
    }
    /// From dact (already weighted) to the gradient of the projections.
    fn swiglu_back[F: Real](gu: &[F], dact: &[F], i: usize, dgu: &mut [F]) {
        for ((d, r), o) in dact.chunks(i).zip(gu.chunks(2 * i)).zip(dgu.chunks_mut(2 * i)) {
            let (og, ou) = o.split_at_mut(i);
            for ((((d, g), u), og), ou) in d.iter().zip(&r[..i]).zip(&r[i..]).zip(og.iter_mut()).zip(ou.iter_mut()) {
                let s = g.sigmoid();
                *ou = *d * *g * s;
                *og = *d * *u * s * (F::ONE + *g * (F::ONE - s));
            }
        }
    }
    /// Softmax of each row, its k largest (the first among equals), and their weights.
    fn choose[F: Real](norm: bool, e: usize, k: usize, probs: &mut [F], expert: &mut [usize], weight: &mut [F], total: &mut [F]) {
        for p in probs.chunks_mut(e) {
            let m = p.iter().fold(F::NEG_INFINITY, |m, x| m.max(*x));
            for x in p.iter_mut() { *x = (*x - m).exp() }
            let r = F::ONE / p.iter().copied().sum();
            for x in p.iter_mut() { *x *= r }
        }
        for (((p, expert), weight), total) in probs.chunks(e).zip(expert.chunks_mut(k)).zip(weight.chunks_mut(k)).zip(total) {
            for j in 0..k {
                let mut best = usize::MAX;
                for i in 0..e {
                    if (best == usize::MAX || p[i] > p[best]) && !expert[..j].contains(&i) { best = i }
                }
                expert[j] = best;
                weight[j] = p[best];
            }
            if norm {
                *total = weight.iter().copied().sum();
                for w in weight.iter_mut() { *w = *w / *total }
            }
        }
    }
    fn axpy[F: Real](s: F, x: &[F], y: &mut [F]) { for (y, x) in y.iter_mut().zip(x) { *y = s.mul_add(*x, *y) } }
    /// <a, b>; then a and c are scaled by s.
    fn weigh[F: Real](s: F, a: &mut [F], b: &[F], c: &mut [F]) -> F {
        let inner = dot(a, b);
        for a in a.iter_mut() { *a *= s }
        for c in c.iter_mut() { *c *= s }
        inner
    }
}

/// Where each token goes. Slot = token·k + choice.
struct Routing<F> {
    probs: Vec<F>,
    /// Expert and weight of each slot, and the sum that the weights were divided by, per token.
    expert: Vec<usize>,
    weight: Vec<F>,
    total: Vec<F>,
    /// Slots sorted by expert (stable), the place of each slot, and each expert's run.
    order: Vec<usize>,
    place: Vec<usize>,
    runs: Vec<std::ops::Range<usize>>,
}

/// Tokens of a routing task.
const TOKENS: usize = 64;

fn route<F: Real>(op: &Moe, logits: &[F], e: usize) -> Routing<F> {
    let (n, k) = (logits.len() / e.max(1), op.top_k);
    let mut r = Routing {
        probs: logits.to_vec(),
        expert: vec![0; n * k],
        weight: vec![F::ZERO; n * k],
        total: vec![F::ONE; n],
        order: vec![0; n * k],
        place: vec![0; n * k],
        runs: vec![],
    };
    let slots = r.expert.par_chunks_mut(TOKENS * k).zip(r.weight.par_chunks_mut(TOKENS * k));
    let tasks = slots.zip(r.total.par_chunks_mut(TOKENS)).zip(r.probs.par_chunks_mut(TOKENS * e.max(1)));
    tasks.for_each(|(((expert, weight), total), probs)| choose(op.norm_topk, e, k, probs, expert, weight, total));
    let mut count = vec![0; e];
    r.expert.iter().for_each(|x| count[*x] += 1);
    let mut next = vec![];
    let mut at = 0;
    for c in count {
        next.push(at);
        r.runs.push(at..at + c);
        at += c;
    }
    for (slot, x) in r.expert.iter().enumerate() {
        r.order[next[*x]] = slot;
        r.place[slot] = next[*x];
        next[*x] += 1;
    }
    r
}

/// Splits a `[slots, width]` buffer into the experts' runs.
fn by_expert<'a, F>(mut buf: &'a mut [F], runs: &[std::ops::Range<usize>], width: usize) -> Vec<&'a mut [F]> {
    runs.iter()
        .map(|r| {
            let (head, tail) = std::mem::take(&mut buf).split_at_mut(r.len() * width);
            buf = tail;
            head
        })
        .collect()
}

/// y[token] = Σ over its slots, in order, of factor(slot) · rows[place of slot].
fn combine<F: Real>(r: &Routing<F>, k: usize, h: usize, rows: &[F], factor: impl Fn(usize) -> F + Sync, y: &mut [F]) {
    y.par_chunks_mut(TOKENS * h).enumerate().for_each(|(b, ys)| {
        for (i, y) in ys.chunks_mut(h).enumerate() {
            y.fill(F::ZERO);
            for j in 0..k {
                let slot = (b * TOKENS + i) * k + j;
                axpy(factor(slot), &rows[r.place[slot] * h..][..h], y);
            }
        }
    });
}

fn gather<F: Real>(r: &Routing<F>, k: usize, h: usize, x: &[F], run: &std::ops::Range<usize>) -> Scratch<F> {
    let mut out = scratch(run.len() * h);
    for (p, o) in run.clone().zip(out.chunks_mut(h)) {
        o.copy_from_slice(&x[r.order[p] / k * h..][..h]);
    }
    out
}

/// Tokens up to which, outside recording, experts multiply without packing.
const FEW: usize = 64;

/// All experts' weights `[E, out, in]`.
enum Weights<'a, F: Real> {
    Wide(Cow<'a, [F]>),
    /// Those of an expert are widened when it is used: others cost nothing.
    Narrow(&'a [bf16]),
}

impl<'a, F: Real> Weights<'a, F> {
    fn of(x: &'a Inputs, i: usize) -> Result<Weights<'a, F>> {
        Ok(if x.dtype(i) == DType::BF16 { Weights::Narrow(x.slice(i)?) } else { Weights::Wide(x.real(i)?) })
    }
    /// `y [n, out] = x [n, in] · W[expert]ᵀ`; `few` as it is decoded.
    fn times(&self, expert: usize, few: bool, [n, out, inner]: [usize; 3], x: &[F], y: &mut [F]) {
        let own = expert * out * inner..(expert + 1) * out * inner;
        let product = if few { gemm_few::<F> } else { gemm::<F> };
        let mut with = |w: &[F]| product(n, out, inner, F::ONE, x, (inner, 1), w, (1, inner), F::ZERO, y, out);
        match self {
            Weights::Wide(w) => with(&w[own]),
            Weights::Narrow(w) if few && n <= NARROW_ROWS => gemm_narrow(n, out, inner, x, inner, &w[own], inner, y, out),
            Weights::Narrow(w) => {
                let mut wide = scratch(own.len());
                convert(&w[own], &mut wide);
                with(&wide);
            }
        }
    }
}

fn forward<F: Real>(op: &Moe, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (_, h, e, i) = sizes(x.shape(0), x.shape(2));
    let (v, w1, w2) = (x.real::<F>(0)?, Weights::<F>::of(x, 4)?, Weights::<F>::of(x, 5)?);
    let r = route(op, &x.real::<F>(1)?, e);
    let (mut out, mut counts, mut hidden) = (y.real::<F>(0)?, y.slice::<i64>(1)?, y.slice::<F>(2)?);
    counts.iter_mut().zip(&r.runs).for_each(|(c, r)| *c = r.len() as i64);
    if out.is_empty() || i == 0 {
        out.fill(F::ZERO);
        return Ok(());
    }
    let mut rows = scratch(r.order.len() * h);
    // where a few tokens are decoded, speed; else a token's bits are the same whatever others its experts have
    let few = r.total.len() <= FEW && !engine::grad_enabled();
    let gus = by_expert(&mut hidden, &r.runs, 2 * i);
    let ys = by_expert(&mut rows, &r.runs, h);
    gus.into_par_iter().zip(ys).enumerate().for_each(|(ex, (gu, ye))| {
        let n = r.runs[ex].len();
        if n == 0 {
            return;
        }
        let xe = gather(&r, op.top_k, h, &v, &r.runs[ex]);
        w1.times(ex, few, [n, 2 * i, h], &xe, gu);
        let mut act = scratch(n * i);
        swiglu(gu, i, &mut act);
        w2.times(ex, few, [n, h, i], &act, ye);
    });
    combine(&r, op.top_k, h, &rows, |s| r.weight[s], &mut out);
    Ok(())
}

fn backward<F: Real>(op: &MoeBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let op = &op.0;
    let (_, h, e, i) = sizes(x.shape(0), x.shape(2));
    let k = op.top_k;
    let (v, w1, w2, gu, dy) = (x.real::<F>(0)?, x.real::<F>(2)?, x.real::<F>(3)?, x.slice::<F>(4)?, x.real::<F>(5)?);
    let r = route(op, &x.real::<F>(1)?, e);
    let (mut dx, mut dlogits, mut dw1, mut dw2) = (y.real::<F>(0)?, y.real::<F>(1)?, y.real::<F>(2)?, y.real::<F>(3)?);
    if dx.is_empty() || i == 0 {
        [&mut dx, &mut dlogits, &mut dw1, &mut dw2].into_iter().for_each(|d| d.fill(F::ZERO));
        return Ok(());
    }
    let slots = r.order.len();
    let (mut rows, mut dweight) = (scratch(slots * h), vec![F::ZERO; slots]);
    let tasks = by_expert(&mut rows, &r.runs, h).into_par_iter().zip(by_expert(&mut dweight, &r.runs, 1));
    let tasks = tasks.zip(dw1.par_chunks_mut(2 * i * h)).zip(dw2.par_chunks_mut(h * i)).enumerate();
    tasks.for_each(|(ex, (((dxe, dwt), dw1), dw2))| {
        let run = &r.runs[ex];
        let n = run.len();
        if n == 0 {
            dw1.fill(F::ZERO);
            dw2.fill(F::ZERO);
            return;
        }
        let (w1, w2, gu) = (&w1[ex * 2 * i * h..][..2 * i * h], &w2[ex * h * i..][..h * i], &gu[run.start * 2 * i..run.end * 2 * i]);
        let (xe, mut ge) = (gather(&r, k, h, &v, run), gather(&r, k, h, &dy, run));
        let (mut act, mut dact, mut dgu) = (scratch(n * i), scratch(n * i), scratch(n * 2 * i));
        swiglu(gu, i, &mut act);
        gemm(n, i, h, F::ONE, &ge, (h, 1), w2, (i, 1), F::ZERO, &mut dact, i);
        for (j, p) in run.clone().enumerate() {
            let w = r.weight[r.order[p]];
            // <dy, act downᵀ> = <dy down, act>: the expert's output is not needed
            dwt[j] = weigh(w, &mut dact[j * i..(j + 1) * i], &act[j * i..(j + 1) * i], &mut ge[j * h..(j + 1) * h]);
        }
        gemm(h, i, n, F::ONE, &ge, (1, h), &act, (i, 1), F::ZERO, dw2, i);
        swiglu_back(gu, &dact, i, &mut dgu);
        gemm(2 * i, h, n, F::ONE, &dgu, (1, 2 * i), &xe, (h, 1), F::ZERO, dw1, h);
        gemm(n, h, 2 * i, F::ONE, &dgu, (2 * i, 1), w1, (h, 1), F::ZERO, dxe, h);
    });
    combine(&r, k, h, &rows, |_| F::ONE, &mut dx);
    dlogits.par_chunks_mut(e).with_min_len(TOKENS).enumerate().for_each(|(t, d)| {
        d.fill(F::ZERO);
        let slots = t * k..(t + 1) * k;
        let dw = |s: usize| dweight[r.place[s]];
        let mean: F = if op.norm_topk { slots.clone().map(|s| dw(s) * r.weight[s]).sum() } else { F::ZERO };
        let p = &r.probs[t * e..(t + 1) * e];
        let mut inner = F::ZERO;
        for s in slots.clone() {
            let dp = (dw(s) - mean) / r.total[t];
            d[r.expert[s]] = dp;
            inner += dp * p[r.expert[s]];
        }
        d.iter_mut().zip(p).for_each(|(d, p)| *d = *p * (*d - inner));
    });
    Ok(())
}
