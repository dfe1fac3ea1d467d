//! The definition, composed of primitive ops.

use engine::{Result, Tensor};

/// Of a self-test.
const FREQUENCIES: [f64; 4] = [1.0, 0.3, 0.02, 0.0001];

/// As [`super::rope`], for positions that are given as numbers, one for each of x's T steps.
pub fn rope(x: &Tensor, rotary_dim: usize, theta: f64, positions: &[usize]) -> Result<Tensor> {
    let frequencies: Vec<f64> = (0..rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64)).collect();
    rope_scaled(x, &frequencies, 1.0, positions)
}

/// As [`super::rope_scaled`], likewise.
pub fn rope_scaled(x: &Tensor, frequencies: &[f64], factor: f64, positions: &[usize]) -> Result<Tensor> {
    let (d, half) = (x.dim(3), frequencies.len());
    let rotary_dim = 2 * half;
    if rotary_dim == 0 {
        return Ok(x.clone());
    }
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f64> = positions.iter().flat_map(|p| frequencies.iter().map(move |w| factor * f(*p as f64 * w))).collect();
        Tensor::from_vec(values, &[positions.len(), 1, half])?.cast(x.dtype())
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b, rest) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?, x.narrow(3, rotary_dim, d - rotary_dim)?);
    let (u, v) = (a.mul(&cos)?.sub(&b.mul(&sin)?)?, b.mul(&cos)?.add(&a.mul(&sin)?)?);
    Tensor::cat(&[&u, &v, &rest], 3)
}

engine::self_test!("rope", [[2, 37, 3, 40]],
    |x| Ok(vec![super::rope(&x[0], 20, 1e4, super::Positions::From(5))?]) => |x| Ok(vec![rope(&x[0], 20, 1e4, &(5..42).collect::<Vec<_>>())?]));
engine::self_test!("rope of given frequencies", [[2, 37, 3, 40]], |x| {
    let f = Tensor::from_vec(FREQUENCIES, &[4])?.to_device(x[0].device())?;
    Ok(vec![super::rope_scaled(&x[0], &f, 1.25, super::Positions::From(5))?])
} => |x| Ok(vec![rope_scaled(&x[0], &FREQUENCIES, 1.25, &(5..42).collect::<Vec<_>>())?]));
engine::self_test!("rope at given positions", [[2, 37, 3, 40]], |x| {
    let p: Vec<i64> = (0..74).map(|i| i % 37 % 20).collect();
    let p = Tensor::from_vec(p, &[2, 37])?.to_device(x[0].device())?;
    Ok(vec![super::rope(&x[0], 40, 1e4, super::Positions::Given(&p))?])
} => |x| Ok(vec![rope(&x[0], 40, 1e4, &(0..37).map(|i| i % 20).collect::<Vec<_>>())?]));
