//! Rotary position embedding (Su et al., 2104.09864) on the first `rotary_dim` entries of a head, in the rotate-half form.
//!
//! With `θ_i = base^(−2i/rotary_dim)` and position p: `y_i = x_i cos pθ_i − x_{i+r/2} sin pθ_i`, `y_{i+r/2} = x_{i+r/2} cos pθ_i + x_i sin pθ_i`.
//! Ways to stretch a context (YaRN, 2309.00071, and others) have other θ_i, and multiply what is rotated by a factor.

mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::rms_norm::rms_norm;
use crate::rows::Rows;
use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Error, Meta, Op, Result, Saved, Tensor, Want, cpu_kernel, dispatch_real, run1, vectorized};
use rayon::prelude::*;
use std::ops::RangeInclusive;

/// The op; see [`rope`].
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    /// Leading entries of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Base of the frequencies, where they are not given.
    pub theta: f64,
    /// What is rotated is multiplied by it.
    pub factor: f64,
    /// Position of the first step, where no positions are given.
    pub offset: usize,
    /// A second input: positions `[B, T]` (i32 or i64).
    pub positions: bool,
    /// The last input: θ_i, f64 `[rotary_dim / 2]`.
    pub frequencies: bool,
    /// Rotate backwards: the gradient.
    pub inverse: bool,
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = 1 + self.positions as usize + self.frequencies as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let [b, t, _, d] = x[0].shape[..] else { return Err(Error::shape("rope", "x", "[B, T, H, D]", &x[0].shape)) };
        if !x[0].dtype.is_float() {
            return Err(Error::dtype("rope", "x", "a float dtype", x[0].dtype));
        }
        if self.rotary_dim > d || !self.rotary_dim.is_multiple_of(2) {
            return Err(Error::invalid("rope", format!("rotary_dim must be even and at most head_dim {d}, found {}", self.rotary_dim)));
        }
        if self.theta.is_nan() || self.theta <= 0.0 || self.theta.is_infinite() {
            return Err(Error::invalid("rope", format!("theta must be a positive number, found {}", self.theta)));
        }
        if !self.factor.is_finite() {
            return Err(Error::invalid("rope", format!("factor must be finite, found {}", self.factor)));
        }
        let half = self.rotary_dim / 2;
        if let Some(f) = x.last().filter(|f| self.frequencies && (f.shape != [half] || f.dtype != DType::F64)) {
            return Err(Error::invalid("rope", format!("frequencies must be f64[{half}], found {f}")));
        }
        if self.positions && (x[1].shape != [b, t] || !matches!(x[1].dtype, DType::I32 | DType::I64)) {
            return Err(Error::invalid("rope", format!("positions must be i32 or i64[{b}, {t}], found {}", x[1])));
        }
        Ok(vec![x[0].clone()])
    }
    fn want(&self, i: usize) -> Want {
        if i == 0 { Want::LastDimDense } else { Want::Contiguous }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        ((1..*self.arity().end()).collect(), vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; need.len()]) };
        // the transpose of a rotation is the rotation back
        let op = Rope { inverse: !self.inverse, ..*self };
        let given = (1..need.len()).map(|i| s.input(i)).collect::<Result<Vec<_>>>()?;
        let mut out = vec![None; need.len()];
        out[0] = Some(run1(op, &[&[dy], &given[..]].concat())?);
        Ok(out)
    }
}

vectorized! {
    fn rotate[F: Real](x: &[F], cos: &[F], sin: &[F], y: &mut [F]) {
        let h = cos.len();
        let (a, b) = (&x[..h], &x[h..2 * h]);
        let (ya, rest) = y.split_at_mut(h);
        for i in 0..h {
            ya[i] = a[i] * cos[i] - b[i] * sin[i];
            rest[i] = b[i] * cos[i] + a[i] * sin[i];
        }
        rest[h..].copy_from_slice(&x[2 * h..]);
    }
}

cpu_kernel!(Rope => |op, x, y| dispatch_real!(x.dtype(0), |F| kernel::<F>(op, x, y)));

fn kernel<F: Real>(op: &Rope, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out) = (x.real::<F>(0)?, y.real::<F>(0)?);
    let [b, t, h, d] = x.shape(0)[..] else { return Ok(()) };
    if out.is_empty() {
        return Ok(());
    }
    let rows = Rows::new(x.layout(0));
    let half = op.rotary_dim / 2;
    let positions: Vec<i64> = match op.positions {
        true if x.dtype(1) == DType::I32 => x.slice::<i32>(1)?.iter().map(|p| *p as i64).collect(),
        true => x.slice::<i64>(1)?.to_vec(),
        false => (0..t as i64).map(|p| p + op.offset as i64).collect(),
    };
    // angles in f64: at position 10⁶ an f32 angle is off by a twentieth of a radian
    let sign = if op.inverse { -1.0 } else { 1.0 };
    let mut table = vec![F::ZERO; positions.len() * 2 * half];
    if half > 0 {
        let freq: Vec<f64> = match op.frequencies {
            true => x.slice::<f64>(x.len() - 1)?.to_vec(),
            false => (0..half).map(|i| op.theta.powf(-2.0 * i as f64 / op.rotary_dim as f64)).collect(),
        };
        table.par_chunks_mut(2 * half).zip(&positions).for_each(|(row, p)| {
            let (cos, sin) = row.split_at_mut(half);
            for i in 0..half {
                let a = *p as f64 * freq[i];
                (cos[i], sin[i]) = (F::from_f64(op.factor * a.cos()), F::from_f64(op.factor * sign * a.sin()));
            }
        });
    }
    let per_batch = positions.len() / t / b.max(1) > 0 && op.positions;
    out.par_chunks_mut(h * d).enumerate().for_each(|(bt, o)| {
        let p = if per_batch { bt } else { bt % t };
        let (cos, sin) = table[p * 2 * half..(p + 1) * 2 * half].split_at(half);
        for (i, o) in o.chunks_mut(d).enumerate() {
            rotate(&v[rows.at(bt * h + i)..][..d], cos, sin, o);
        }
    });
    Ok(())
}

/// Where positions come from.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// offset, offset + 1, …
    From(usize),
    /// `[B, T]` (i32 or i64): packed documents restart.
    Given(&'a Tensor),
}

/// Rotates the first `rotary_dim` entries of each head of x `[B, T, H, D]` (a strided view is fine if its last axis is dense).
pub fn rope(x: &Tensor, rotary_dim: usize, theta: f64, positions: Positions) -> Result<Tensor> {
    let op = |offset, given| Rope { rotary_dim, theta, factor: 1.0, offset, positions: given, frequencies: false, inverse: false };
    match positions {
        Positions::From(n) => run1(op(n, false), &[x]),
        Positions::Given(p) => run1(op(0, true), &[x, p]),
    }
}

/// [`rope`] with frequencies of your own: θ_i in `frequencies`, f64 `[rotary_dim / 2]` on x's device. What is rotated is multiplied by `factor`.
pub fn rope_scaled(x: &Tensor, frequencies: &Tensor, factor: f64, positions: Positions) -> Result<Tensor> {
    let rotary_dim = 2 * frequencies.numel();
    let op = |offset, given| Rope { rotary_dim, theta: 1.0, factor, offset, positions: given, frequencies: true, inverse: false };
    match positions {
        Positions::From(n) => run1(op(n, false), &[x, frequencies]),
        Positions::Given(p) => run1(op(0, true), &[x, p, frequencies]),
    }
}

/// [`rope`] after an RMS norm of each head with weight `[D]` (zero-centred: scaled by `1 + w`).
pub fn norm_rope(x: &Tensor, weight: &Tensor, eps: f64, zero_centred: bool, rotary_dim: usize, theta: f64, positions: Positions) -> Result<Tensor> {
    rope(&rms_norm(x, weight, eps, zero_centred)?, rotary_dim, theta, positions)
}
