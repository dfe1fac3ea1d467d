//! The backward pass. With `du` the gradient of the ungated output and `delta = rowsum(du ⊙ u)`:
//!
//! `P = exp(S − lse)`, `dV = Pᵀ·du`, `dS = P ⊙ (du·Vᵀ − delta)`, `dK = scale·dSᵀ·Q`, `dQ = scale·dS·K`.
//!
//! A task is (batch, key/value head, run of query tiles). Inside it, tiles of keys are the outer loop, so that dK and dV of a tile stay in cache, and
//! dQ of the run's queries grows in memory. Each task's dK and dV are partial sums, added up in the order of the runs at the end: the
//! number of runs depends on shapes alone, so the result doesn't depend on threads, and the memory for them is linear in T. Each document has its own
//! runs, those that it would have alone.

use super::{
    Gating, PAD, Problem, gate,
    mask::{Bands, Tile},
    view::{View, pad16},
};
use crate::rows::Shared;
use engine::{
    cpu::{
        Scratch, scratch, scratch_zeros,
        simd::{Real, dot},
        tile::{gemm, transpose},
    },
    vectorized,
};
use rayon::prelude::*;

/// Keys per tile.
const KEYS: usize = 64;
/// Columns (query times × heads of the group) per tile, about.
const COLS: usize = 64;
/// How many tasks there are about, if shapes allow.
const TASKS: usize = 32;

/// What the backward pass reads beside q, k and v.
#[derive(Clone, Copy)]
pub struct Saved<'a, F> {
    /// The ungated output `[B, T, H, Dv]`.
    pub u: View<'a>,
    /// Log-sum-exp `[B, T, H]`.
    pub lse: &'a [F],
    /// The gradient of the output `[B, T, H, Dv]`.
    pub dy: View<'a>,
}

/// The gradients, in the layouts of q, k, v and the gate, dense.
pub struct Grads<'a, F> {
    /// `[B, T, H, D]`
    pub dq: &'a mut [F],
    /// `[B, S, Hkv, D]`
    pub dk: &'a mut [F],
    /// `[B, S, Hkv, Dv]`
    pub dv: &'a mut [F],
    /// `[B, T, H]` or `[B, T, H, Dv]`
    pub dgate: Option<&'a mut [F]>,
}

/// A task's share of dK and dV: rows of keys `k0..k1`.
struct Partial<F: Real> {
    k0: usize,
    k1: usize,
    dk: Scratch<F>,
    dv: Scratch<F>,
}

/// A tile of queries, packed both ways: by rows for the products that sum over queries, transposed for those that sum over D.
struct Queries<F: Real> {
    t0: usize,
    t1: usize,
    q: Scratch<F>,
    qt: Scratch<F>,
    du: Scratch<F>,
    dut: Scratch<F>,
    dq: Scratch<F>,
    lse: Scratch<F>,
    delta: Scratch<F>,
}

/// Runs the backward pass.
#[allow(clippy::too_many_arguments)]
pub fn backward<F: Real>(p: &Problem, bands: &Bands, q: View, k: View, v: View, gating: Option<Gating>, saved: Saved<F>, grads: Grads<F>) {
    let Grads { dq, dk, dv, dgate } = grads;
    if p.b * p.t * p.h == 0 {
        dk.fill(F::ZERO);
        return dv.fill(F::ZERO);
    }
    let group = p.h / p.hkv;
    let runs = runs(p, bands, (COLS / group).max(1));
    let dq = Shared::new(dq);
    let dgate = dgate.map(Shared::new);
    let partials: Vec<Partial<F>> = (0..p.b * p.hkv * runs.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|task| {
            let (bh, run) = (task / runs.len(), runs.len() - 1 - task % runs.len());
            task_backward(p, bands, [bh / p.hkv, bh % p.hkv], &runs[run], (q, k, v), gating, saved, &dq, dgate.as_ref())
        })
        .collect();

    let per_batch = p.hkv * runs.len();
    let reduce = |at: usize, row: &mut [F], d: usize, pick: fn(&Partial<F>) -> &[F]| {
        let (b, s, hk) = (at / p.hkv / p.s, at / p.hkv % p.s, at % p.hkv);
        row.fill(F::ZERO);
        // last run first: neither k0 nor k1 grows from one to the next
        let partials = &partials[b * per_batch + hk * runs.len()..][..runs.len()];
        let from = partials.partition_point(|x| x.k0 > s);
        for x in partials[from..].iter().take_while(|x| x.k1 > s) {
            row.iter_mut().zip(&pick(x)[(s - x.k0) * d..]).for_each(|(y, x)| *y += *x);
        }
    };
    const ROWS: usize = 64;
    dk.par_chunks_mut((p.d * ROWS).max(1)).enumerate().for_each(|(i, rows)| {
        rows.chunks_exact_mut(p.d).enumerate().for_each(|(j, row)| reduce(i * ROWS + j, row, p.d, |x| &x.dk));
    });
    dv.par_chunks_mut((p.dv * ROWS).max(1)).enumerate().for_each(|(i, rows)| {
        rows.chunks_exact_mut(p.dv).enumerate().for_each(|(j, row)| reduce(i * ROWS + j, row, p.dv, |x| &x.dv));
    });
}

/// Cuts each document's query tiles into contiguous runs of about equal work. Depends on shapes alone, for a document on its own.
fn runs(p: &Problem, bands: &Bands, times: usize) -> Vec<Vec<(usize, usize)>> {
    let mut runs = vec![];
    for tiles in bands.tiles(times) {
        let work = |&(t0, t1): &(usize, usize)| {
            let (lo, hi) = bands.keys(t0, t1);
            (hi - lo).div_ceil(KEYS)
        };
        let total: usize = tiles.iter().map(work).sum();
        let want = (TASKS / (p.b * p.hkv)).clamp(1, tiles.len().max(1));
        let (mut run, mut done, mut cut) = (vec![], 0, 0);
        for tile in tiles {
            done += work(&tile);
            run.push(tile);
            if done * want >= total * (cut + 1) {
                runs.push(std::mem::take(&mut run));
                cut += 1;
            }
        }
    }
    runs
}

#[allow(clippy::too_many_arguments)]
fn task_backward<F: Real>(
    p: &Problem,
    bands: &Bands,
    [b, hk]: [usize; 2],
    run: &[(usize, usize)],
    (q, k, v): (View, View, View),
    gating: Option<Gating>,
    saved: Saved<F>,
    dq: &Shared<F>,
    dgate: Option<&Shared<F>>,
) -> Partial<F> {
    let (d, dv, group) = (p.d, p.dv, p.h / p.hkv);
    let mut tiles: Vec<Queries<F>> = run.iter().map(|tile| load(p, [b, hk], *tile, q, gating, saved, dgate)).collect();

    let (lo, hi) = bands.keys(run[0].0, run[run.len() - 1].1);
    let mut out = Partial { k0: lo, k1: hi, dk: scratch_zeros((hi - lo) * d), dv: scratch_zeros((hi - lo) * dv) };
    let ld = pad16((run[0].1 - run[0].0) * group) + PAD; // the first tile is never the smaller one
    let (mut s, mut ds) = (scratch_zeros(KEYS * ld), scratch_zeros(KEYS * ld));
    let (ldk, ldv) = (d + PAD, dv + PAD);
    let (mut kt, mut vt) = (scratch(KEYS * ldk), scratch(KEYS * ldv));
    let mut mask = Tile::default();
    for k0 in (lo..hi).step_by(KEYS) {
        let k1 = (k0 + KEYS).min(hi);
        let keys = k1 - k0;
        for j in 0..keys {
            k.row([b, k0 + j, hk], F::ONE, &mut kt[j * ldk..j * ldk + d]);
            v.row([b, k0 + j, hk], F::ONE, &mut vt[j * ldv..j * ldv + dv]);
        }
        let dkt = &mut out.dk[(k0 - lo) * d..(k1 - lo) * d];
        let dvt = &mut out.dv[(k0 - lo) * dv..(k1 - lo) * dv];
        for x in &mut tiles {
            if !mask.set(bands, (k0, k1), (x.t0, x.t1), group) {
                continue;
            }
            let cols = (x.t1 - x.t0) * group;
            let width = pad16(cols);
            let ldt = width + PAD;
            mask.by_key(keys, width, |j0, j1, a, b| {
                let at = j0 * ld + a;
                gemm(j1 - j0, b - a, d, F::ONE, &kt[j0 * ldk..], ldk, 1, &x.qt[a..], ldt, F::ZERO, &mut s[at..], ld);
                gemm(j1 - j0, b - a, dv, F::ONE, &vt[j0 * ldv..], ldv, 1, &x.dut[a..], ldt, F::ZERO, &mut ds[at..], ld);
            });
            if mask.full {
                score_grads_full(keys, width, ld, &mut s, &mut ds, &x.lse, &x.delta);
            } else {
                score_grads_masked(&mask.cols, width, ld, &mut s, &mut ds, &x.lse, &x.delta);
            }
            mask.by_key(keys, cols, |j0, j1, a, b| {
                let at = j0 * ld + a;
                gemm(j1 - j0, dv, b - a, F::ONE, &s[at..], ld, 1, &x.du[a * ldv..], ldv, F::ONE, &mut dvt[j0 * dv..], dv);
                gemm(j1 - j0, d, b - a, F::ONE, &ds[at..], ld, 1, &x.q[a * ldk..], ldk, F::ONE, &mut dkt[j0 * d..], d);
            });
            mask.by_col(keys, cols, |c0, c1, a, b| {
                gemm(c1 - c0, d, b - a, F::ONE, &ds[a * ld + c0..], 1, ld, &kt[a * ldk..], ldk, F::ONE, &mut x.dq[c0 * d..], d)
            });
        }
    }

    let scale = F::from_f64(p.scale);
    for x in &tiles {
        for (c, row) in x.dq.chunks_exact(d).enumerate() {
            let at = (b * p.t + x.t0 + c / group) * p.h + hk * group + c % group;
            // SAFETY: the row (b, t, h) belongs to this task alone.
            unsafe { dq.slice(at * d, d) }.iter_mut().zip(row).for_each(|(y, x)| *y = scale * *x);
        }
    }
    out
}

/// Packs a tile of queries: scaled q, du through the gate, delta; and writes the gate's gradient.
fn load<F: Real>(
    p: &Problem,
    [b, hk]: [usize; 2],
    (t0, t1): (usize, usize),
    q: View,
    gating: Option<Gating>,
    saved: Saved<F>,
    dgate: Option<&Shared<F>>,
) -> Queries<F> {
    let (d, dv, group) = (p.d, p.dv, p.h / p.hkv);
    let (ldq, ldu) = (d + PAD, dv + PAD);
    let cols = (t1 - t0) * group;
    let width = pad16(cols);
    let zeros = scratch_zeros;
    let mut x = Queries {
        t0,
        t1,
        q: zeros(cols * ldq),
        qt: zeros(d * (width + PAD)),
        du: zeros(cols * ldu),
        dut: zeros(dv * (width + PAD)),
        dq: zeros(cols * d),
        lse: zeros(width),
        delta: zeros(width),
    };
    let glen = gating.map_or(0, |g| if g.elementwise { dv } else { 1 });
    let (mut u, mut g, mut act) = (zeros(dv), zeros(glen), zeros(glen));
    for c in 0..cols {
        let at = [b, t0 + c / group, hk * group + c % group];
        let flat = (at[0] * p.t + at[1]) * p.h + at[2];
        q.row(at, F::from_f64(p.scale), &mut x.q[c * ldq..c * ldq + d]);
        let du = &mut x.du[c * ldu..c * ldu + dv];
        saved.dy.row(at, F::ONE, du);
        saved.u.row(at, F::ONE, &mut u);
        if let (Some(gating), Some(dgate)) = (gating, dgate) {
            gating.logits.row(at, F::ONE, &mut g);
            // SAFETY: the row (b, t, h) belongs to this task alone.
            let dg = unsafe { dgate.slice(flat * glen, glen) };
            gate::apply_backward(gating.gate, &g, &u, &mut act, du, dg);
        }
        x.delta[c] = inner(du, &u);
        x.lse[c] = saved.lse[flat];
    }
    transpose(cols, d, &x.q, ldq, &mut x.qt, width + PAD);
    transpose(cols, dv, &x.du, ldu, &mut x.dut, width + PAD);
    x
}

vectorized! {
    fn inner[F: Real](a: &[F], b: &[F]) -> F { dot(a, b) }

    /// From scores in `s` and `du·Vᵀ` in `ds`: `s := P = exp(s − lse)`, `ds := P ⊙ (ds − delta)`.
    fn score_grads_full[F: Real](keys: usize, width: usize, ld: usize, s: &mut [F], ds: &mut [F], lse: &[F], delta: &[F]) {
        for j in 0..keys {
            let (s, ds) = (&mut s[j * ld..][..width], &mut ds[j * ld..][..width]);
            for (((s, ds), lse), delta) in s.iter_mut().zip(ds).zip(lse).zip(delta) {
                *s = (*s - *lse).exp();
                *ds = *s * (*ds - *delta);
            }
        }
    }

    /// The same where key j is seen by the columns `cols[j]` only; the other cells become 0.
    fn score_grads_masked[F: Real](cols: &[(usize, usize)], width: usize, ld: usize, s: &mut [F], ds: &mut [F], lse: &[F], delta: &[F]) {
        for (j, &(a, b)) in cols.iter().enumerate() {
            let (s, ds) = (&mut s[j * ld..][..width], &mut ds[j * ld..][..width]);
            for x in [&mut *s, &mut *ds] {
                x[..a].fill(F::ZERO);
                x[b..].fill(F::ZERO);
            }
            for (((s, ds), lse), delta) in s[a..b].iter_mut().zip(&mut ds[a..b]).zip(&lse[a..b]).zip(&delta[a..b]) {
                *s = (*s - *lse).exp();
                *ds = *s * (*ds - *delta);
            }
        }
    }
}
