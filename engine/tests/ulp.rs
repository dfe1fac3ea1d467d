//! How far the f32 vector functions are from the exact values, in units in the last place (ULP) of the exact value's f32 neighbourhood.
//!
//! `TIDEGATE_EXHAUSTIVE=1` goes through all 2³² floats instead of every 1009th (four minutes on two cores).

use engine::{Result, Tensor};
use rayon::prelude::*;

/// The distance of f32 neighbours around `y`; that of the subnormals below the smallest normal number.
fn ulp(y: f64) -> f64 {
    let e = (y.abs().to_bits() >> 52) as i32 - 1023;
    2f64.powi(e.clamp(-126, 127) - 23)
}

type Function = fn(&Tensor) -> Result<Tensor>;
type Exact = fn(f64) -> f64;

/// The largest error over every `stride`-th float in ULP (of `least` where that is more), and where it is.
fn worst(f: Function, exact: Exact, least: f64) -> (f64, f32) {
    let stride = if std::env::var("TIDEGATE_EXHAUSTIVE").is_ok() { 1 } else { 1009 };
    let block = 1u64 << 20;
    let all = (0..(1u64 << 32).div_ceil(block * stride)).into_par_iter().map(|i| {
        let bits = (0..block).map(|j| (i * block + j) * stride).take_while(|b| *b < 1 << 32);
        let xs: Vec<f32> = bits.map(|b| f32::from_bits(b as u32)).filter(|x| !x.is_nan()).collect();
        if xs.is_empty() {
            return (0.0, 0.0);
        }
        let ys = f(&Tensor::from_slice(&xs, &[xs.len()], &engine::Device::cpu()).unwrap()).unwrap().to_vec::<f32>().unwrap();
        let each = xs.iter().zip(&ys).map(|(x, y)| {
            let want = exact(f64::from(*x));
            let off = (f64::from(*y) - want).abs();
            // what rounds to infinity or to zero is right there
            let right = f64::from(want as f32) == f64::from(*y) || (want.is_nan() && y.is_nan());
            let e = if right { 0.0 } else { off / ulp(want).max(least) };
            (if e.is_nan() { f64::INFINITY } else { e }, *x)
        });
        each.fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
    });
    all.reduce(|| (0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
}

#[test]
fn vector_functions_are_within_their_stated_error() {
    let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
    let silu = |x: f64| if x < -200.0 { x * 0.0 } else { x / (1.0 + (-x).exp()) };
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    // at −∞, which is left out, silu is NaN
    // where sigmoid is subnormal, silu has only sigmoid's few bits: counted in units of 128 times the smallest subnormal
    let functions: [(&str, Function, Exact, f64, f64); 5] = [
        ("exp", Tensor::exp, f64::exp, 0.0, 1.1),
        ("sigmoid", Tensor::sigmoid, sigmoid, 0.0, 2.5),
        ("silu", Tensor::silu, silu, 128.0 * 2f64.powi(-149), 3.4),
        ("softplus", Tensor::softplus, softplus, 0.0, 3.8),
        ("tanh", Tensor::tanh, f64::tanh, 0.0, 1.7),
    ];
    let mut wrong = vec![];
    for (name, f, exact, least, bound) in functions {
        let (e, x) = worst(f, exact, least);
        println!("{name}: {e:.2} ULP at {x:e}");
        if e > bound {
            wrong.push(format!("{name}: {e:.2} ULP at {x:e}, stated {bound}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
