//! All parameters at once: the norm of their gradients, the coefficient that clips it, and the update, with nothing that the host has to wait for.

use super::{Rates, squares_of, update_all};
use crate::dtypes::sums as master;
use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Device, Error, Meta, Op, Result, Tensor, cpu_kernel, dispatch_real, run, run_in_place};
use std::ops::RangeInclusive;

/// The norm of several tensors together, `scale · √Σx²`, and what to multiply them by so that it is at most `max_norm`:
/// `scale · min(1, max_norm / (norm + 1e-6))` (as torch clips), not a number where the norm isn't finite. Both are f64 scalars; sums are in f64.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GlobalNorm {
    /// The bound; 0 for none.
    pub max_norm: f64,
    /// The tensors are multiplied by this first (one over the number of accumulated gradients).
    pub scale: f64,
}

impl Op for GlobalNorm {
    fn name(&self) -> &'static str {
        "global_norm"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        1..=usize::MAX
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        match x.iter().find(|m| !m.dtype.is_float()) {
            Some(m) => Err(Error::dtype("global_norm", "x", "a float dtype", m.dtype)),
            None => Ok(vec![Meta::new(&[], DType::F64); 2]),
        }
    }
    fn differentiable(&self) -> bool {
        false
    }
}
cpu_kernel!(GlobalNorm => |op, x, y| {
    let squares = (0..x.len()).map(|i| dispatch_real!(x.dtype(i), |F| squares_of::<F>(x, i))).sum::<Result<f64>>()?;
    let norm = op.scale * squares.sqrt();
    y.slice::<f64>(0)?[0] = norm;
    let clip = if op.max_norm > 0.0 && norm > op.max_norm { op.max_norm / (norm + 1e-6) } else { 1.0 };
    y.slice::<f64>(1)?[0] = if norm.is_finite() { clip * op.scale } else { f64::NAN };
    Ok(())
});

/// (norm, coefficient) of float tensors of any shapes, f64 scalars on their device; see [`GlobalNorm`].
pub fn global_norm(op: GlobalNorm, x: &[&Tensor]) -> Result<(Tensor, Tensor)> {
    let mut y = run(op, x)?;
    let coefficient = y.remove(1);
    Ok((y.remove(0), coefficient))
}

/// One update of many parameters in place, as [`AdamW`](super::AdamW) does one. What changes from step to step comes as tensors: the schedule (see
/// [`AdamWMany::schedule`]) and the coefficient that gradients are multiplied by. A coefficient that isn't finite leaves everything as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWMany {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of each parameter.
    pub weight_decay: Vec<f64>,
    /// Whether copies of the new parameters in bf16 are written too.
    pub shadows: bool,
}

impl AdamWMany {
    /// What step number `step` (from 1) reads, f64 `[3]`: the learning rate, and the reciprocals of both bias corrections, `1 / (1 − βᵢ^step)`.
    pub fn schedule(&self, lr: f64, step: u64, device: &Device) -> Result<Tensor> {
        if step == 0 {
            return Err(Error::invalid("adamw_many", "steps count from 1, found 0"));
        }
        Tensor::from_slice(&super::schedule(lr, [self.beta1, self.beta2], step), &[3], device)
    }
}

impl Op for AdamWMany {
    fn name(&self) -> &'static str {
        "adamw_many"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=usize::MAX
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let (op, n) = ("adamw_many", x.len() - 2);
        if x[0] != Meta::new(&[3], DType::F64) || x[1] != Meta::new(&[], DType::F64) {
            return Err(Error::invalid(op, format!("the schedule must be f64[3] and the coefficient f64[], found {} and {}", x[0], x[1])));
        }
        if n != self.weight_decay.len() {
            return Err(Error::invalid(op, format!("was given {} weight decays for {n} gradients", self.weight_decay.len())));
        }
        if let Some(m) = x[2..].iter().find(|m| !m.dtype.is_float()) {
            return Err(Error::dtype(op, "a gradient", "a float dtype", m.dtype));
        }
        let each = |d: fn(DType) -> DType| x[2..].iter().map(move |m| Meta::new(&m.shape, d(m.dtype)));
        let shadows = if self.shadows { n } else { 0 };
        Ok(each(master).chain(each(master)).chain(each(master)).chain(each(|_| DType::BF16).take(shadows)).collect())
    }
}
cpu_kernel!(AdamWMany => |op, x, y| {
    let (schedule, coefficient) = (x.slice::<f64>(0)?, x.slice::<f64>(1)?[0]);
    let schedule = [schedule[0], schedule[1], schedule[2]];
    if coefficient.is_finite() {
        (0..op.weight_decay.len()).try_for_each(|i| dispatch_real!(x.dtype(2 + i), |F| one::<F>(op, i, schedule, coefficient, x, y)))?;
    }
    Ok(())
});

fn one<F: Real>(op: &AdamWMany, i: usize, schedule: [f64; 3], coefficient: f64, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let n = op.weight_decay.len();
    let (g, mut p, mut m, mut v) = (x.real::<F>(2 + i)?, y.slice::<F>(i)?, y.slice::<F>(n + i)?, y.slice::<F>(2 * n + i)?);
    update_all(&Rates::new([op.beta1, op.beta2], op.eps, op.weight_decay[i], schedule, coefficient), &mut p, &mut m, &mut v, &g);
    if op.shadows {
        y.real::<F>(3 * n + i)?.copy_from_slice(&p);
    }
    Ok(())
}

/// Updates `params` and both moments `m` and `v` in place: all f32 (f64 for f64 gradients), of the gradients' shapes; and, if the op says so, their
/// bf16 `shadows`. `schedule` f64 `[3]` and `coefficient` f64 `[]` (from [`global_norm`]) are on the same device.
#[allow(clippy::too_many_arguments)]
pub fn adamw_many(
    op: AdamWMany,
    params: &[&Tensor],
    m: &[&Tensor],
    v: &[&Tensor],
    shadows: &[&Tensor],
    schedule: &Tensor,
    coefficient: &Tensor,
    grads: &[&Tensor],
) -> Result<()> {
    run_in_place(op, &[params, m, v, shadows].concat(), &[&[schedule, coefficient], grads].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::randn;

    fn op(shadows: bool) -> AdamWMany {
        AdamWMany { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: vec![0.0, 0.1], shadows }
    }

    #[test]
    fn gradients_that_are_not_finite_change_nothing() {
        let (p, q) = (randn(&[5], 1).cast(DType::F32).unwrap(), randn(&[3, 2], 2).cast(DType::F32).unwrap());
        let zeros = |t: &Tensor| t.affine(0.0, 0.0).unwrap();
        let (m, v) = ([zeros(&p), zeros(&q)], [zeros(&p), zeros(&q)]);
        let shadows = [p.cast(DType::BF16).unwrap(), zeros(&q).cast(DType::BF16).unwrap()];
        let step = |g: &Tensor, h: &Tensor| {
            let (norm, c) = global_norm(GlobalNorm { max_norm: 1.0, scale: 1.0 }, &[g, h]).unwrap();
            let schedule = op(true).schedule(0.1, 1, &Device::cpu()).unwrap();
            let (m, v, s) = ([&m[0], &m[1]], [&v[0], &v[1]], [&shadows[0], &shadows[1]]);
            adamw_many(op(true), &[&p, &q], &m, &v, &s, &schedule, &c, &[g, h]).unwrap();
            (norm.item().unwrap(), c.item().unwrap())
        };
        let other = q.affine(1.0, 0.0).unwrap();
        let before = p.to_vec::<f32>().unwrap();
        let bad = step(&zeros(&p).affine(1.0, f64::INFINITY).unwrap(), &other);
        assert!(bad.0.is_infinite() && bad.1.is_nan());
        assert_eq!(p.to_vec::<f32>().unwrap(), before);
        let (norm, c) = step(&p.affine(3.0, 1.0).unwrap(), &other);
        assert!(norm > 1.0 && (norm * c - 1.0).abs() < 1e-5);
        let after = p.to_vec::<f32>().unwrap();
        assert_ne!(after, before);
        for (t, s) in [(&p, &shadows[0]), (&q, &shadows[1])] {
            assert_eq!(t.cast(DType::BF16).unwrap().to_vec::<f32>().unwrap(), s.to_vec::<f32>().unwrap());
        }
    }

    #[test]
    fn bad_arguments() {
        let (g, c) = (Meta::new(&[5], DType::F32), Meta::new(&[], DType::F64));
        let s = Meta::new(&[3], DType::F64);
        assert_eq!(op(true).infer(&[s.clone(), c.clone(), g.clone(), g.clone()]).unwrap().len(), 8);
        assert!(op(false).infer(&[s.clone(), c.clone(), g.clone()]).is_err(), "two decays for one gradient");
        assert!(op(false).infer(&[c.clone(), c, g.clone(), g]).is_err());
        assert!(op(false).schedule(0.1, 0, &Device::cpu()).is_err());
        assert!(GlobalNorm { max_norm: 1.0, scale: 1.0 }.infer(&[Meta::new(&[5], DType::I64)]).is_err());
    }
}
