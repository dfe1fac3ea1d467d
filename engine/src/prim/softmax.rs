//! Softmax and log-softmax.

use super::{GRAIN, float, for_chunks};
use crate::cpu::simd::{Real, dot, max, sum};
use crate::cpu::{Inputs, Outputs};
use crate::{Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch_real, run1, vectorized};
use std::ops::RangeInclusive;

vectorized! {
    fn softmax_row[F: Real](x: &[F], y: &mut [F], log: bool) {
        let m = max(x);
        let m = if m == F::NEG_INFINITY { F::ZERO } else { m };
        for (y, x) in y.iter_mut().zip(x) { *y = (*x - m).exp() }
        let sum = sum(y);
        if log {
            let lse = m + sum.ln();
            for (y, x) in y.iter_mut().zip(x) { *y = *x - lse }
        } else {
            let r = F::ONE / sum;
            for y in y.iter_mut() { *y *= r }
        }
    }
    fn backward_row[F: Real](y: &[F], dy: &[F], dx: &mut [F], log: bool) {
        let dot = if log { sum(dy) } else { dot(y, dy) };
        for ((d, y), g) in dx.iter_mut().zip(y).zip(dy) { *d = if log { *g - y.exp() * dot } else { *y * (*g - dot) } }
    }
}

/// Softmax (or its logarithm) along the last axis of a matrix, in f32 for halves.
#[derive(Debug)]
pub struct Softmax {
    /// The logarithm.
    pub log: bool,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax" } else { "softmax" }
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float(self.name(), "x", &x[0])?;
        if x[0].shape.len() != 2 {
            return Err(Error::shape(self.name(), "x", "[rows, columns]", &x[0].shape));
        }
        Ok(vec![x[0].clone()])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], vec![0])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| run1(SoftmaxBackward { log: self.log }, &[s.output(0)?, d])).transpose()?])
    }
}
cpu_kernel!(Softmax => |op, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));

fn forward<F: Real>(op: &Softmax, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out, c) = (x.real::<F>(0)?, y.real::<F>(0)?, x.shape(0)[1].max(1));
    for_chunks(&mut out, GRAIN.div_ceil(c) * c, |at, o| {
        o.chunks_mut(c).enumerate().for_each(|(i, o)| softmax_row(&v[at + i * c..at + (i + 1) * c], o, op.log))
    });
    Ok(())
}

/// Gradient of [`Softmax`]: inputs y and dy.
#[derive(Debug)]
pub struct SoftmaxBackward {
    /// Of the logarithm.
    pub log: bool,
}

impl Op for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if x[0] == x[1] { Ok(vec![x[0].clone()]) } else { Err(Error::invalid(self.name(), format!("y is {}, dy is {}", x[0], x[1]))) }
    }
}
cpu_kernel!(SoftmaxBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

fn backward<F: Real>(op: &SoftmaxBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, g, mut out, c) = (x.real::<F>(0)?, x.real::<F>(1)?, y.real::<F>(0)?, x.shape(0)[1].max(1));
    for_chunks(&mut out, GRAIN.div_ceil(c) * c, |at, o| {
        o.chunks_mut(c).enumerate().for_each(|(i, o)| {
            let r = at + i * c..at + (i + 1) * c;
            backward_row(&v[r.clone()], &g[r], o, op.log)
        })
    });
    Ok(())
}

impl Tensor {
    /// Softmax along `axis`.
    pub fn softmax(&self, axis: usize) -> Result<Tensor> {
        self.along("softmax", axis, |t| run1(Softmax { log: false }, &[t]))
    }
    /// Logarithm of the softmax along `axis`.
    pub fn log_softmax(&self, axis: usize) -> Result<Tensor> {
        self.along("log_softmax", axis, |t| run1(Softmax { log: true }, &[t]))
    }
}
