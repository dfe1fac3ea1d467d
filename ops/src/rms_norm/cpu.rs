//! Kernels: rows in parallel by fixed blocks; the weight's gradient is summed per block, then over blocks in order.

use super::{NormGate, RmsNorm, RmsNormBackward};
use crate::rows::Rows;
use engine::cpu::simd::{Real, dot};
use engine::cpu::{Inputs, Outputs};
use engine::{Result, cpu_kernel, dispatch_real, vectorized};
use rayon::prelude::*;

/// Elements per task.
const BLOCK: usize = 16 * 1024;

cpu_kernel!(RmsNorm => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
cpu_kernel!(RmsNormBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

vectorized! {
    fn add_row[F: Real](a: &[F], b: &[F], y: &mut [F]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) { *y = *a + *b }
    }
    fn norm_row[F: Real](x: &[F], w: &[F], centre: F, eps: F, y: &mut [F]) {
        let r = F::ONE / (dot(x, x) / F::from_f64(x.len() as f64) + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) { *y = *x * r * (centre + *w) }
    }
    fn gate_row[F: Real](silu: bool, gate: &[F], y: &mut [F]) {
        if silu { for (y, g) in y.iter_mut().zip(gate) { *y *= g.silu() } } else { for (y, g) in y.iter_mut().zip(gate) { *y *= g.sigmoid() } }
    }
    /// dgate from the normed row, and dy·act(gate) into `t`.
    fn gate_back_row[F: Real](silu: bool, x: &[F], w: &[F], centre: F, gate: &[F], dy: &[F], eps: F, t: &mut [F], dgate: &mut [F]) {
        let r = F::ONE / (dot(x, x) / F::from_f64(x.len() as f64) + eps).sqrt();
        for i in 0..t.len().min(x.len()).min(w.len()).min(gate.len()).min(dy.len()).min(dgate.len()) {
            let s = gate[i].sigmoid();
            let (a, d) = if silu { (gate[i] * s, s * (F::ONE + gate[i] * (F::ONE - s))) } else { (s, s * (F::ONE - s)) };
            dgate[i] = dy[i] * x[i] * r * (centre + w[i]) * d;
            t[i] = dy[i] * a;
        }
    }
    /// With x̂ = x·r: dx = r (g − x̂ mean(g x̂)) for g = dy·w; dw += dy·x̂.
    fn back_row[F: Real](x: &[F], w: &[F], centre: F, dy: &[F], eps: F, g: &mut [F], dx: &mut [F], dw: &mut [F]) {
        let n = F::from_f64(x.len() as f64);
        let r = F::ONE / (dot(x, x) / n + eps).sqrt();
        for ((g, dy), w) in g.iter_mut().zip(dy).zip(w) { *g = *dy * (centre + *w) }
        let m = dot(g, x) * r * r / n;
        for ((dx, g), x) in dx.iter_mut().zip(g.iter()).zip(x) { *dx = r * (*g - *x * m) }
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) { *dw = (*dy * *x).mul_add(r, *dw) }
    }
}

fn forward<F: Real>(op: &RmsNorm, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, w, mut out) = (x.real::<F>(0)?, x.real::<F>(1)?, y.real::<F>(0)?);
    let third = if x.len() > 2 { Some((x.real::<F>(2)?, Rows::new(x.layout(2)))) } else { None };
    let rows = Rows::new(x.layout(0));
    let d = w.len().max(1);
    let per = (BLOCK / d).max(1);
    let (centre, eps) = (if op.zero_centred { F::ONE } else { F::ZERO }, F::from_f64(op.eps));
    if op.residual {
        let (res, rr) = third.as_ref().expect("checked by infer");
        let mut sum = y.real::<F>(1)?;
        sum.par_chunks_mut(per * d).zip(out.par_chunks_mut(per * d)).enumerate().for_each(|(t, (h, o))| {
            for (i, (h, o)) in h.chunks_mut(d).zip(o.chunks_mut(d)).enumerate() {
                let at = t * per + i;
                add_row(&v[rows.at(at)..][..d], &res[rr.at(at)..][..d], h);
                norm_row(h, &w, centre, eps, o);
            }
        });
        return Ok(());
    }
    out.par_chunks_mut(per * d).enumerate().for_each(|(t, o)| {
        for (i, o) in o.chunks_mut(d).enumerate() {
            let at = t * per + i;
            norm_row(&v[rows.at(at)..][..d], &w, centre, eps, o);
            if let (Some((g, gr)), Some(act)) = (&third, op.gate) {
                gate_row(act == NormGate::Silu, &g[gr.at(at)..][..d], o);
            }
        }
    });
    Ok(())
}

fn backward<F: Real>(op: &RmsNormBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, w, dy, mut dx, mut dw) = (x.real::<F>(0)?, x.real::<F>(1)?, x.real::<F>(2)?, y.real::<F>(0)?, y.real::<F>(1)?);
    let rows = Rows::new(x.layout(0));
    let d = w.len().max(1);
    let per = (BLOCK / d).max(1);
    let (centre, eps) = (if op.norm.zero_centred { F::ONE } else { F::ZERO }, F::from_f64(op.norm.eps));
    let partial: Vec<Vec<F>> = if let Some(act) = op.norm.gate {
        let (gate, gr, mut dg) = (x.real::<F>(3)?, Rows::new(x.layout(3)), y.real::<F>(2)?);
        dx.par_chunks_mut(per * d)
            .zip(dg.par_chunks_mut(per * d))
            .enumerate()
            .map(|(t, (dx, dg))| {
                let (mut sum, mut a, mut b) = (vec![F::ZERO; d], vec![F::ZERO; d], vec![F::ZERO; d]);
                for (i, (dx, dg)) in dx.chunks_mut(d).zip(dg.chunks_mut(d)).enumerate() {
                    let at = t * per + i;
                    let row = &v[rows.at(at)..][..d];
                    gate_back_row(act == NormGate::Silu, row, &w, centre, &gate[gr.at(at)..][..d], &dy[at * d..][..d], eps, &mut a, dg);
                    back_row(row, &w, centre, &a, eps, &mut b, dx, &mut sum);
                }
                sum
            })
            .collect()
    } else {
        let extra = if op.residual_grad { Some(x.real::<F>(3)?) } else { None };
        let er = if op.residual_grad { Some(Rows::new(x.layout(3))) } else { None };
        dx.par_chunks_mut(per * d)
            .enumerate()
            .map(|(t, dx)| {
                let (mut sum, mut g) = (vec![F::ZERO; d], vec![F::ZERO; d]);
                for (i, dx) in dx.chunks_mut(d).enumerate() {
                    let at = t * per + i;
                    back_row(&v[rows.at(at)..][..d], &w, centre, &dy[at * d..][..d], eps, &mut g, dx, &mut sum);
                    if let (Some(e), Some(er)) = (&extra, &er) {
                        g.copy_from_slice(dx);
                        add_row(&g, &e[er.at(at)..][..d], dx);
                    }
                }
                sum
            })
            .collect()
    };
    dw.fill(F::ZERO);
    partial.iter().for_each(|p| dw.iter_mut().zip(p).for_each(|(a, b)| *a += *b));
    Ok(())
}
