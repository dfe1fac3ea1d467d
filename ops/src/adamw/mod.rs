//! AdamW with decoupled weight decay (Loshchilov & Hutter, 1711.05101, Algorithm 2), in place on f32 masters; and the sum of squares for clipping.

pub mod reference;
#[cfg(test)]
mod tests;

use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Error, Meta, Op, Result, Tensor, cpu_kernel, dispatch_real, run_in_place, run1, vectorized};
use rayon::prelude::*;

/// Elements per task.
const BLOCK: usize = 32 * 1024;

/// The hyperparameters of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: p ← p − lr·weight_decay·p.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping, accumulation).
    pub grad_scale: f64,
}

impl Op for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if self.step == 0 {
            return Err(Error::invalid("adamw", "steps count from 1, found 0"));
        }
        if !x[0].dtype.is_float() {
            return Err(Error::dtype("adamw", "the gradient", "a float dtype", x[0].dtype));
        }
        // masters and moments are f32 whatever the gradient's dtype
        let m = Meta::new(&x[0].shape, crate::dtypes::sums(x[0].dtype));
        Ok(vec![m.clone(), m.clone(), m])
    }
}

vectorized! {
    fn update[F: Real](op: &AdamW, p: &mut [F], m: &mut [F], v: &mut [F], g: &[F]) {
        let (b1, b2) = (F::from_f64(op.beta1), F::from_f64(op.beta2));
        let (a1, a2) = (F::from_f64(1.0 - op.beta1), F::from_f64(1.0 - op.beta2));
        let lr = F::from_f64(op.lr / (1.0 - op.beta1.powf(op.step as f64)));
        let r = F::from_f64(1.0 / (1.0 - op.beta2.powf(op.step as f64)));
        let (eps, keep, s) = (F::from_f64(op.eps), F::from_f64(1.0 - op.lr * op.weight_decay), F::from_f64(op.grad_scale));
        for (((p, m), v), g) in p.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
            let g = *g * s;
            *m = b1.mul_add(*m, a1 * g);
            *v = b2.mul_add(*v, a2 * g * g);
            *p = *p * keep - lr * *m / ((*v * r).sqrt() + eps);
        }
    }
    fn squares[F: Real](x: &[F]) -> f64 {
        let mut acc = [0f64; 8];
        let (body, tail) = x.as_chunks::<8>();
        for c in body { for (a, x) in acc.iter_mut().zip(c) { let x = x.to_f64(); *a += x * x } }
        for (a, x) in acc.iter_mut().zip(tail) { let x = x.to_f64(); *a += x * x }
        acc.iter().sum()
    }
}

cpu_kernel!(AdamW => |op, x, y| dispatch_real!(x.dtype(0), |F| kernel::<F>(op, x, y)));

fn kernel<F: Real>(op: &AdamW, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (g, mut p, mut m, mut v) = (x.real::<F>(0)?, y.slice::<F>(0)?, y.slice::<F>(1)?, y.slice::<F>(2)?);
    p.par_chunks_mut(BLOCK)
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .zip(g.par_chunks(BLOCK))
        .for_each(|(((p, m), v), g)| update(op, p, m, v, g));
    Ok(())
}

/// One update in place: `param`, `m` and `v` (first and second moment) are f32 (f64 for f64 gradients) of the gradient's shape.
pub fn adamw(op: AdamW, param: &Tensor, m: &Tensor, v: &Tensor, grad: &Tensor) -> Result<()> {
    run_in_place(op, &[param, m, v], &[grad])
}

/// Σ x² as an f64 scalar, summed in f64 over fixed blocks.
#[derive(Debug, Clone, Copy)]
pub struct SumOfSquares;

impl Op for SumOfSquares {
    fn name(&self) -> &'static str {
        "sum_of_squares"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if x[0].dtype.is_float() {
            Ok(vec![Meta::new(&[], DType::F64)])
        } else {
            Err(Error::dtype("sum_of_squares", "x", "a float dtype", x[0].dtype))
        }
    }
    fn differentiable(&self) -> bool {
        false
    }
}
cpu_kernel!(SumOfSquares => |_, x, y| dispatch_real!(x.dtype(0), |F| sum_kernel::<F>(x, y)));

fn sum_kernel<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let parts: Vec<f64> = x.real::<F>(0)?.par_chunks(BLOCK).map(|c| squares(c)).collect();
    y.slice::<f64>(0)?[0] = parts.iter().sum();
    Ok(())
}

/// Σ x² as an f64 scalar; has no backward.
pub fn sum_of_squares(x: &Tensor) -> Result<Tensor> {
    run1(SumOfSquares, &[x])
}
