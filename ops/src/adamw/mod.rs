//! AdamW with decoupled weight decay (Loshchilov & Hutter, 1711.05101, Algorithm 2), in place on f32 masters; and the sum of squares for clipping.
//! [`adamw_many`] and [`global_norm`] do both for all parameters at once, without a number that the host would have to wait for.

mod cuda;
mod many;
pub mod reference;
#[cfg(test)]
mod tests;

pub use many::{AdamWMany, GlobalNorm, adamw_many, global_norm};

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

/// What an update multiplies by.
#[derive(Debug, Clone, Copy)]
struct Rates<F> {
    beta: [F; 2],
    one_minus_beta: [F; 2],
    /// Learning rate over the first moment's bias correction; the reciprocal of the second's.
    lr: F,
    unbias: F,
    eps: F,
    keep: F,
    scale: F,
}

/// The learning rate and the reciprocals of both bias corrections.
fn schedule(lr: f64, beta: [f64; 2], step: u64) -> [f64; 3] {
    let unbias = |b: f64| 1.0 / (1.0 - b.powf(step as f64));
    [lr, unbias(beta[0]), unbias(beta[1])]
}

impl<F: Real> Rates<F> {
    fn new(beta: [f64; 2], eps: f64, decay: f64, [lr, first, second]: [f64; 3], scale: f64) -> Self {
        let f = F::from_f64;
        Rates {
            beta: beta.map(f),
            one_minus_beta: beta.map(|b| f(1.0 - b)),
            lr: f(lr * first),
            unbias: f(second),
            eps: f(eps),
            keep: f(1.0 - lr * decay),
            scale: f(scale),
        }
    }
}

impl AdamW {
    fn rates<F: Real>(&self) -> Rates<F> {
        let beta = [self.beta1, self.beta2];
        Rates::new(beta, self.eps, self.weight_decay, schedule(self.lr, beta, self.step), self.grad_scale)
    }
}

vectorized! {
    fn update[F: Real](r: &Rates<F>, p: &mut [F], m: &mut [F], v: &mut [F], g: &[F]) {
        let ([b1, b2], [a1, a2]) = (r.beta, r.one_minus_beta);
        for (((p, m), v), g) in p.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
            let g = *g * r.scale;
            *m = b1.mul_add(*m, a1 * g);
            *v = b2.mul_add(*v, a2 * g * g);
            *p = *p * r.keep - r.lr * *m / ((*v * r.unbias).sqrt() + r.eps);
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
    update_all(&op.rates(), &mut p, &mut m, &mut v, &g);
    Ok(())
}
fn update_all<F: Real>(r: &Rates<F>, p: &mut [F], m: &mut [F], v: &mut [F], g: &[F]) {
    let chunks = p.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK)).zip(g.par_chunks(BLOCK));
    chunks.for_each(|(((p, m), v), g)| update(r, p, m, v, g));
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
    y.slice::<f64>(0)?[0] = squares_of::<F>(x, 0)?;
    Ok(())
}
fn squares_of<F: Real>(x: &Inputs, i: usize) -> Result<f64> {
    let parts: Vec<f64> = x.real::<F>(i)?.par_chunks(BLOCK).map(|c| squares(c)).collect();
    Ok(parts.iter().sum())
}

/// Σ x² as an f64 scalar; has no backward.
pub fn sum_of_squares(x: &Tensor) -> Result<Tensor> {
    run1(SumOfSquares, &[x])
}
