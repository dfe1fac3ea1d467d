//! SwiGLU (Shazeer, 2002.05202): `y = silu(gate) · up`, where one projection holds `[gate | up]` in its last axis.

mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch_real, run1, vectorized};
use rayon::prelude::*;
use std::ops::RangeInclusive;

/// Rows × width per task.
const BLOCK: usize = 16 * 1024;

/// The op; see [`swiglu`].
#[derive(Debug, Clone, Copy)]
pub struct SwiGlu;

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let mut y = x[0].clone();
        if !y.dtype.is_float() {
            return Err(Error::dtype("swiglu", "x", "a float dtype", y.dtype));
        }
        match y.shape.last_mut() {
            Some(d) if *d % 2 == 0 => *d /= 2,
            _ => return Err(Error::shape("swiglu", "x", "[.., 2I], gate first", &x[0].shape)),
        }
        Ok(vec![y])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| run1(SwiGluBackward, &[s.input(0)?, d])).transpose()?])
    }
}

/// Gradient: inputs `[gate | up]` and dy.
#[derive(Debug, Clone, Copy)]
pub struct SwiGluBackward;

impl Op for SwiGluBackward {
    fn name(&self) -> &'static str {
        "swiglu_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![x[0].clone()])
    }
}

vectorized! {
    fn row[F: Real](gate: &[F], up: &[F], y: &mut [F]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) { *y = g.silu() * *u }
    }
    fn back_row[F: Real](gate: &[F], up: &[F], dy: &[F], dg: &mut [F], du: &mut [F]) {
        for ((((g, u), d), dg), du) in gate.iter().zip(up).zip(dy).zip(dg.iter_mut()).zip(du.iter_mut()) {
            let s = g.sigmoid();
            *du = *d * *g * s;
            *dg = *d * *u * s * (F::ONE + *g * (F::ONE - s));
        }
    }
}

cpu_kernel!(SwiGlu => |_, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(x, y)));
cpu_kernel!(SwiGluBackward => |_, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(x, y)));

fn forward<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out) = (x.real::<F>(0)?, y.real::<F>(0)?);
    let d = (x.shape(0)[x.shape(0).len() - 1] / 2).max(1);
    let per = (BLOCK / d).max(1);
    out.par_chunks_mut(per * d).zip(v.par_chunks(per * 2 * d)).for_each(|(o, v)| {
        for (o, v) in o.chunks_mut(d).zip(v.chunks(2 * d)) {
            row(&v[..d], &v[d..], o);
        }
    });
    Ok(())
}

fn backward<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, dy, mut out) = (x.real::<F>(0)?, x.real::<F>(1)?, y.real::<F>(0)?);
    let d = (x.shape(0)[x.shape(0).len() - 1] / 2).max(1);
    let per = (BLOCK / d).max(1);
    out.par_chunks_mut(per * 2 * d).zip(v.par_chunks(per * 2 * d)).zip(dy.par_chunks(per * d)).for_each(|((o, v), g)| {
        for ((o, v), g) in o.chunks_mut(2 * d).zip(v.chunks(2 * d)).zip(g.chunks(d)) {
            let (dg, du) = o.split_at_mut(d);
            back_row(&v[..d], &v[d..], g, dg, du);
        }
    });
    Ok(())
}

/// `silu(x[.., ..I]) · x[.., I..]` for x `[.., 2I]`, gate first as transformers fuses it.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    run1(SwiGlu, &[gate_up])
}
