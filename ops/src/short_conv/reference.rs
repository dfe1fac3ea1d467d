//! The definition, composed of primitive ops: shifted copies of a padded input.

use engine::{DType, Result, Tensor};

/// As [`super::short_conv`] for x `[B, T, C]` and weight `[C, K]`, from a state to the next.
pub fn short_conv_from(x: &Tensor, weight: &Tensor, silu: bool, state: &Tensor) -> Result<(Tensor, Tensor)> {
    let (t, before) = (x.dim(1), state.dim(1));
    let all = Tensor::cat(&[&state.cast(x.dtype())?, x], 1)?;
    Ok((short_conv(&all, weight, silu, None)?.narrow(1, before, t)?, all.narrow(1, t, before)?))
}

/// As [`super::short_conv`] for x `[B, T, C]` and weight `[C, K]`, without states.
pub fn short_conv(x: &Tensor, weight: &Tensor, silu: bool, cu_seqlens: Option<&Tensor>) -> Result<Tensor> {
    if let Some(cu) = cu_seqlens {
        let document = |w: &[i64]| short_conv(&x.narrow(1, w[0] as usize, (w[1] - w[0]) as usize)?, weight, silu, None);
        let parts = cu.to_vec::<i64>()?.windows(2).filter(|w| w[0] < w[1]).map(document).collect::<Result<Vec<_>>>()?;
        return Tensor::cat(&parts.iter().collect::<Vec<_>>(), 1);
    }
    let (t, c, k) = (x.dim(1), weight.dim(0), weight.dim(1));
    let padded = x.pad(1, k - 1, 0)?;
    let mut y = x.affine(0.0, 0.0)?;
    for j in 0..k {
        y = y.add(&padded.narrow(1, j, t)?.mul(&weight.narrow(1, j, 1)?.reshape(&[c])?)?)?;
    }
    if silu { y.silu() } else { Ok(y) }
}

/// Three documents, one of them empty.
fn cu(x: &Tensor) -> Result<Tensor> {
    Tensor::from_vec([0i64, 40, 40, 43, 77], &[5])?.to_device(x.device())
}
engine::self_test!("short_conv", [[2, 77, 40], [40, 4]],
    |x| Ok(vec![super::short_conv(&x[0], &x[1], true, None, None)?.0]) => |x| Ok(vec![short_conv(&x[0], &x[1], true, None)?]));
engine::self_test!("short_conv packed", [[1, 77, 40], [40, 4]],
    |x| Ok(vec![super::short_conv(&x[0], &x[1], true, None, Some(&cu(&x[0])?))?.0]) => |x| Ok(vec![short_conv(&x[0], &x[1], true, Some(&cu(&x[0])?))?]));
engine::self_test!("short_conv with state", [[2, 77, 40], [40, 4], [2, 3, 40]], |x| {
    // the state is wide whatever x is
    let state = x[2].cast(if x[2].dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
    let (y, last) = super::short_conv(&x[0], &x[1], true, Some(&state), None)?;
    Ok(vec![y, last])
} => |x| {
    let (y, last) = short_conv_from(&x[0], &x[1], true, &x[2])?;
    Ok(vec![y, last])
});
