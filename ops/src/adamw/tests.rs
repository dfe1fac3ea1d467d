use super::*;
use crate::testing::{close, fails, randn};
use engine::Device;

const OP: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };

/// Masters and moments are f32 whatever the gradient's dtype, so that f32's bound holds for all of them.
#[test]
fn follows_the_algorithm_for_gradients_of_every_dtype() {
    let n = 70_000;
    for (d, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 1e-5), (DType::F16, 1e-5)] {
        let master = crate::dtypes::sums(d);
        let p = randn(&[n], 1).cast(master).unwrap();
        let (m, v) = (p.affine(0.0, 0.0).unwrap(), p.affine(0.0, 0.0).unwrap());
        let zeros = || Tensor::zeros(&[n], DType::F64, &Device::cpu()).unwrap();
        let start = p.cast(DType::F64).unwrap().affine(1.0, 0.0).unwrap();
        let mut want = [start.clone(), zeros(), zeros()];
        for step in 1..=3u64 {
            let g = randn(&[n], 10 + step).cast(d).unwrap();
            let op = AdamW { step, ..OP };
            adamw(op, &p, &m, &v, &g).unwrap();
            want = reference::adamw(op, &want[0], &want[1], &want[2], &g.cast(DType::F64).unwrap()).unwrap();
        }
        for (got, want) in [&p, &m, &v].into_iter().zip(&want) {
            assert_eq!(got.dtype(), master);
            close(got, want, tolerance);
        }
        // what was added, apart from what it was added to
        let moved = |p: &Tensor| p.cast(DType::F64).unwrap().sub(&start).unwrap();
        close(&moved(&p), &moved(&want[0]), tolerance);
    }
}

#[test]
fn sums_squares() {
    for (d, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-12), (DType::BF16, 1e-12), (DType::F16, 1e-12)] {
        let x = randn(&[100_003], 1).cast(d).unwrap();
        let want: f64 = x.to_vec::<f64>().unwrap().iter().map(|x| x * x).sum();
        assert!((sum_of_squares(&x).unwrap().item().unwrap() / want - 1.0).abs() < tolerance, "{d}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let x = |shape: &[usize], d| randn(shape, 1).cast(d).unwrap();
    let p = x(&[3], DType::F32);
    fails(adamw(AdamW { step: 0, ..OP }, &p, &p, &p, &p), "adamw: steps count from 1, found 0");
    fails(adamw(OP, &p, &p, &p, &x(&[3], DType::I64)), "adamw: the gradient must be a float dtype, found i64");
    fails(adamw(OP, &p, &p, &x(&[4], DType::F32), &p), "adamw: in-place target 2 must be a contiguous f32[3], found f32[4]");
    fails(adamw(OP, &x(&[3], DType::BF16), &p, &p, &p), "adamw: in-place target 0 must be a contiguous f32[3], found bf16[3]");
    fails(sum_of_squares(&x(&[3], DType::I64)), "sum_of_squares: x must be a float dtype, found i64");
    let none = || x(&[0], DType::F32);
    adamw(OP, &none(), &none(), &none(), &none()).unwrap();
    assert_eq!(sum_of_squares(&none()).unwrap().item().unwrap(), 0.0);
}
