//! The definition, composed of primitive ops.

use super::NormGate;
use engine::{Result, Tensor};

/// As [`super::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, zero_centred: bool) -> Result<Tensor> {
    let r = x.square()?.mean(&[x.rank() - 1], true)?.affine(1.0, eps)?.rsqrt()?;
    x.mul(&r)?.mul(&weight.affine(1.0, f64::from(u8::from(zero_centred)))?)
}

/// As [`super::rms_norm_gated`].
pub fn rms_norm_gated(x: &Tensor, weight: &Tensor, gate: &Tensor, eps: f64, act: NormGate) -> Result<Tensor> {
    let gate = match act {
        NormGate::Silu => gate.silu()?,
        NormGate::Sigmoid => gate.sigmoid()?,
    };
    rms_norm(x, weight, eps, false)?.mul(&gate)
}
