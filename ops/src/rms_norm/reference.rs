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

engine::self_test!("rms_norm plain", [[37, 100], [100]],
    |x| Ok(vec![super::rms_norm(&x[0], &x[1], 1e-6, false)?]) => |x| Ok(vec![rms_norm(&x[0], &x[1], 1e-6, false)?]));
engine::self_test!("rms_norm", [[37, 100], [100]],
    |x| Ok(vec![super::rms_norm(&x[0], &x[1], 1e-6, true)?]) => |x| Ok(vec![rms_norm(&x[0], &x[1], 1e-6, true)?]));
engine::self_test!("rms_norm with residual", [[37, 100], [100], [37, 100]], |x| {
    let (y, h) = super::rms_norm_residual(&x[0], &x[2], &x[1], 1e-6, true)?;
    Ok(vec![y, h])
} => |x| {
    let h = x[0].add(&x[2])?;
    Ok(vec![rms_norm(&h, &x[1], 1e-6, true)?, h])
});
engine::self_test!("rms_norm gated", [[37, 100], [100], [37, 100]],
    |x| Ok(vec![super::rms_norm_gated(&x[0], &x[1], &x[2], 1e-6, NormGate::Silu)?])
    => |x| Ok(vec![rms_norm_gated(&x[0], &x[1], &x[2], 1e-6, NormGate::Silu)?]));
