//! RMS normalisation of the last axis: `y = x · rsqrt(mean x² + eps) · w` (Zhang & Sennrich, 1910.07467), plain or zero-centred (`1 + w`, as Qwen3-Next),
//! with the residual addition in front, or with a gate behind (`· act(gate)`: the output norm of Gated DeltaNet, 2412.06464 §3.4).

mod cpu;
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use engine::{Error, Meta, Op, Result, Saved, Tensor, Want, run, run1};
use std::ops::RangeInclusive;

/// The activation of a gate that is multiplied after the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormGate {
    /// x·sigmoid(x): Gated DeltaNet.
    Silu,
    /// sigmoid(x): Kimi Linear, Qwen3.8.
    Sigmoid,
}

/// The op; see [`rms_norm`], [`rms_norm_residual`], [`rms_norm_gated`].
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Scale by `1 + w` instead of `w`.
    pub zero_centred: bool,
    /// A residual is added to x first, and the sum is the second output.
    pub residual: bool,
    /// A gate is multiplied after the norm.
    pub gate: Option<NormGate>,
}

impl RmsNorm {
    fn check(&self, x: &[Meta]) -> Result<()> {
        let op = "rms_norm";
        if self.residual && self.gate.is_some() {
            return Err(Error::invalid(op, "takes a residual in front or a gate behind, not both"));
        }
        let d = *x[0].shape.last().ok_or_else(|| Error::shape(op, "x", "with at least one axis", &x[0].shape))?;
        if !x[0].dtype.is_float() {
            return Err(Error::dtype(op, "x", "a float dtype", x[0].dtype));
        }
        if x[1].shape != [d] {
            return Err(Error::shape(op, "weight", format!("[{d}], the last axis of x"), &x[1].shape));
        }
        crate::dtypes::beside(op, "weight", x[0].dtype, x[1].dtype)?;
        let third = if self.residual { "residual" } else { "gate" };
        for m in &x[2..] {
            if m.shape != x[0].shape {
                return Err(Error::shape(op, third, format!("{:?}, as x", x[0].shape), &m.shape));
            }
            if m.dtype != x[0].dtype {
                return Err(Error::dtype(op, third, format!("{}, as x", x[0].dtype), m.dtype));
            }
        }
        Ok(())
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = 2 + self.residual as usize + self.gate.is_some() as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        self.check(x)?;
        Ok(if self.residual { vec![x[0].clone(), x[0].clone()] } else { vec![x[0].clone()] })
    }
    fn want(&self, i: usize) -> Want {
        if i == 1 { Want::Contiguous } else { Want::LastDimDense }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        match (self.residual, self.gate) {
            (true, _) => (vec![1], vec![1]),
            (false, Some(_)) => (vec![0, 1, 2], vec![]),
            (false, None) => (vec![0, 1], vec![]),
        }
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let back = RmsNormBackward { norm: *self, residual_grad: self.residual && dy[1].is_some() };
        let x = if self.residual { s.output(1)? } else { s.input(0)? };
        let Some(g) = &dy[0] else {
            // only the residual stream is used further on
            let h = if self.residual { dy[1].clone() } else { None };
            return Ok(if self.residual { vec![h.clone(), None, h] } else { vec![None; 2 + self.gate.is_some() as usize] });
        };
        let mut ins = vec![x, s.input(1)?, g];
        if self.gate.is_some() {
            ins.push(s.input(2)?);
        }
        if let (true, Some(h)) = (self.residual, dy.get(1).and_then(Option::as_ref)) {
            ins.push(h);
        }
        let mut out = run(back, &ins)?.into_iter();
        let (dx, dw, third) = (out.next(), out.next(), out.next());
        Ok(if self.residual {
            vec![dx.clone(), dw, dx]
        } else if self.gate.is_some() {
            vec![dx, dw, third]
        } else {
            vec![dx, dw]
        })
    }
}

/// Gradient: inputs x (after the residual), weight, dy, then the gate if gated, then the gradient of the residual sum if there is one.
/// Outputs dx, dw, and dgate if gated.
#[derive(Debug, Clone, Copy)]
pub struct RmsNormBackward {
    norm: RmsNorm,
    residual_grad: bool,
}

impl Op for RmsNormBackward {
    fn name(&self) -> &'static str {
        "rms_norm_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = 3 + self.norm.gate.is_some() as usize + self.residual_grad as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let mut y = vec![x[0].clone(), x[1].clone()];
        if self.norm.gate.is_some() {
            y.push(x[3].clone());
        }
        Ok(y)
    }
    fn want(&self, i: usize) -> Want {
        if i == 0 || i == 3 { Want::LastDimDense } else { Want::Contiguous }
    }
}

/// `y = x · rsqrt(mean x² + eps) · w` over the last axis; `1 + w` if `zero_centred`. x `[.., D]`, w `[D]`; f32 inside.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, zero_centred: bool) -> Result<Tensor> {
    run1(RmsNorm { eps, zero_centred, residual: false, gate: None }, &[x, weight])
}

/// `h = x + residual`, `y = rms_norm(h)`: returns (y, h).
pub fn rms_norm_residual(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64, zero_centred: bool) -> Result<(Tensor, Tensor)> {
    let mut v = run(RmsNorm { eps, zero_centred, residual: true, gate: None }, &[x, weight, residual])?;
    let h = v.remove(1);
    Ok((v.remove(0), h))
}

/// `y = rms_norm(x) · act(gate)`; gate logits have the shape of x and may be a strided view.
pub fn rms_norm_gated(x: &Tensor, weight: &Tensor, gate: &Tensor, eps: f64, act: NormGate) -> Result<Tensor> {
    run1(RmsNorm { eps, zero_centred: false, residual: false, gate: Some(act) }, &[x, weight, gate])
}
