//! The output projection and its cross-entropy in one: `loss = mean_t (logsumexp(W x_t) − (W x_t)[target_t])`, without ever holding a batch's logits.
//!
//! Rows are taken in blocks. Where a gradient is needed it is computed in the same pass, while a block's probabilities are at hand: computing the
//! logits again in the backward would cost a third more.

mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use engine::cpu::gemm::gemm;
use engine::cpu::simd::{Real, max, sum};
use engine::cpu::{Inputs, Outputs, scratch};
use engine::{DType, Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch_real, grad_enabled, run, vectorized};
use rayon::prelude::*;
use std::ops::RangeInclusive;

/// Target of a position that does not count.
pub const IGNORE: i64 = -100;

/// The op; see [`linear_cross_entropy`].
#[derive(Debug, Clone, Copy)]
pub struct LinearCrossEntropy {
    /// Compute the gradients of x and of the weight along with the loss.
    pub train: [bool; 2],
}

impl Op for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "linear_cross_entropy";
        let [n, h] = x[0].shape[..] else { return Err(Error::shape(op, "x", "[tokens, hidden]", &x[0].shape)) };
        if x[1].shape.len() != 2 || x[1].shape[1] != h {
            return Err(Error::shape(op, "weight", format!("[vocabulary, {h}]"), &x[1].shape));
        }
        if !x[0].dtype.is_float() {
            return Err(Error::dtype(op, "x", "a float dtype", x[0].dtype));
        }
        if x[1].dtype != x[0].dtype {
            return Err(Error::dtype(op, "weight", format!("{}, as x", x[0].dtype), x[1].dtype));
        }
        if x[2].shape != [n] || x[2].dtype != DType::I64 {
            return Err(Error::invalid(op, format!("targets must be i64[{n}], found {}", x[2])));
        }
        let d = crate::dtypes::sums(x[0].dtype);
        let mut y = vec![Meta::new(&[], d), Meta::new(&[n], d)];
        y.extend((0..2).filter(|i| self.train[*i]).map(|i| x[i].clone()));
        Ok(y)
    }
    fn hidden(&self) -> usize {
        self.train.iter().filter(|t| **t).count()
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], (2..2 + self.hidden()).collect())
    }
    fn differentiable(&self) -> bool {
        self.hidden() > 0
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if dy[1].is_some() {
            return Err(Error::NoGrad { op: "linear_cross_entropy (per-token losses)" });
        }
        let Some(g) = &dy[0] else { return Ok(vec![None; 3]) };
        let times = |i: usize| -> Result<Option<Tensor>> {
            if !need[i] {
                return Ok(None);
            }
            let t = s.output(if self.train[0] { 2 + i } else { 2 })?;
            Ok(Some(t.mul(&g.cast(t.dtype())?)?))
        };
        Ok(vec![times(0)?, times(1)?, None])
    }
}
cpu_kernel!(LinearCrossEntropy => |op, x, y| dispatch_real!(x.dtype(0), |F| kernel::<F>(op, x, y)));

vectorized! {
    /// Turns a row of logits into its loss, and into (softmax − onehot) · s if a gradient is wanted.
    fn loss_row[F: Real](z: &mut [F], target: usize, s: F, grad: bool) -> F {
        let m = max(z);
        let hit = z[target];
        for z in z.iter_mut() { *z = (*z - m).exp() }
        let sum = sum(z);
        if grad {
            let r = s / sum;
            for z in z.iter_mut() { *z *= r }
            z[target] -= s;
        }
        m + sum.ln() - hit
    }
}

fn kernel<F: Real>(op: &LinearCrossEntropy, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, w, targets) = (x.real::<F>(0)?, x.real::<F>(1)?, x.slice::<i64>(2)?);
    let (n, h, vocab) = (x.shape(0)[0], x.shape(0)[1], x.shape(1)[0]);
    if let Some((i, t)) = targets.iter().enumerate().find(|(_, t)| **t != IGNORE && !(0..vocab as i64).contains(t)) {
        return Err(Error::invalid("linear_cross_entropy", format!("target {t} at position {i} is neither in 0..{vocab} nor {IGNORE}")));
    }
    let counted = targets.iter().filter(|t| **t != IGNORE).count();
    if counted == 0 {
        return Err(Error::invalid("linear_cross_entropy", format!("none of the {n} targets counts: all are {IGNORE}, or there are none")));
    }
    let (mut total, mut losses) = (y.slice::<F>(0)?, y.slice::<F>(1)?);
    let mut dx = if op.train[0] { Some(y.real::<F>(2)?) } else { None };
    let mut dw = if op.train[1] { Some(y.real::<F>(1 + op.hidden())?) } else { None };
    if let Some(dw) = &mut dw {
        dw.fill(F::ZERO);
    }
    // about 8 MiB of f32 logits at a time, in whole tiles of rows
    let rows = ((1 << 21) / vocab).clamp(64, 1024);
    let mut z = scratch(rows.min(n) * vocab);
    let share = F::from_f64(1.0 / counted as f64);
    for at in (0..n).step_by(rows) {
        let m = rows.min(n - at);
        let z = &mut z[..m * vocab];
        gemm(m, vocab, h, F::ONE, &v[at * h..], (h, 1), &w, (1, h), F::ZERO, z, vocab);
        z.par_chunks_mut(16 * vocab).zip(losses[at..at + m].par_chunks_mut(16)).enumerate().for_each(|(b, (z, l))| {
            for (i, (z, l)) in z.chunks_mut(vocab).zip(l.iter_mut()).enumerate() {
                let t = targets[at + b * 16 + i];
                *l = if t == IGNORE {
                    z.fill(F::ZERO);
                    F::ZERO
                } else {
                    loss_row(z, t as usize, share, op.hidden() > 0)
                };
            }
        });
        if let Some(dx) = &mut dx {
            gemm(m, h, vocab, F::ONE, z, (vocab, 1), &w, (h, 1), F::ZERO, &mut dx[at * h..(at + m) * h], h);
        }
        if let Some(dw) = &mut dw {
            gemm(vocab, h, m, F::ONE, z, (1, vocab), &v[at * h..], (h, 1), F::ONE, dw, h);
        }
    }
    total[0] = F::from_f64(losses.iter().map(|l| l.to_f64()).sum::<f64>() / counted as f64);
    Ok(())
}

/// Mean cross-entropy in nats of x `[N, H]` projected by `weight [V, H]`, against targets i64 `[N]` ([`IGNORE`] does not count).
/// A scalar in f32 (f64 for f64), differentiable in x and weight.
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let train = [x, weight].map(|t| grad_enabled() && t.is_tracked());
    Ok(run(LinearCrossEntropy { train }, &[x, weight, targets])?.remove(0))
}

/// The loss of each position, `[N]` in nats (0 where ignored); has no backward.
pub fn linear_cross_entropy_per_token(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    Ok(run(LinearCrossEntropy { train: [false; 2] }, &[x, weight, targets])?.remove(1))
}
