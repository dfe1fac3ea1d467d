//! What the ops' tests share.

use engine::{DType, Device, Tensor};

pub fn randn(shape: &[usize], stream: u64) -> Tensor {
    Tensor::randn(shape, DType::F64, &Device::cpu(), 11, stream).unwrap()
}

/// RMS(a − b) / RMS(b).
pub fn ratio(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
    assert_eq!(a.len(), b.len());
    let d: f64 = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum();
    let r: f64 = b.iter().map(|y| y * y).sum();
    if d == 0.0 { 0.0 } else { (d / r.max(1e-300)).sqrt() }
}

#[track_caller]
pub fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
    let e = ratio(a, b);
    assert!(e <= tolerance, "RMS ratio {e:e} > {tolerance:e}");
}

/// The same values as a strided view with a dense last axis.
pub fn strided(x: &Tensor) -> Tensor {
    let axis = x.rank() - 1;
    let d = x.shape()[axis];
    Tensor::cat(&[x, x], axis).unwrap().narrow(axis, d, d).unwrap()
}

/// Mixed dtypes fail at the forward, or have a backward.
#[test]
fn mixed_dtypes_are_refused_at_once() {
    use crate::{delta_rule, moe, rms_norm, short_conv};
    let (f64, f32, bf16) = (DType::F64, DType::F32, DType::BF16);
    for (x, p) in [(f32, f64), (f64, f32), (bf16, f64), (f32, DType::I64), (bf16, f32), (bf16, bf16)] {
        let leaf = |shape: &[usize], stream, d: DType| {
            let t = randn(shape, stream).cast(d).unwrap();
            if d.is_float() { t.requires_grad() } else { t }
        };
        let (v, w) = (leaf(&[1, 4, 2, 3], 1, x), |shape: &[usize], stream| leaf(shape, stream, p));
        let with = delta_rule::DeltaRuleInputs { beta: Some(&w(&[1, 4, 2], 2)), ..Default::default() };
        let experts = [leaf(&[2, 4, 3], 3, x), leaf(&[2, 3, 2], 4, x)];
        let top1 = moe::Moe { top_k: 1, norm_topk: true };
        let results = [
            rms_norm::rms_norm(&v, &w(&[3], 2), 1e-6, false),
            short_conv::short_conv(&v, &w(&[6, 2], 2), true, None, None).map(|y| y.0),
            delta_rule::delta_rule(delta_rule::DeltaRule::gated_delta_net(), &v, &v, &v, with).map(|y| y.0),
            moe::moe(top1, &v.reshape(&[8, 3]).unwrap(), &w(&[8, 2], 2), &experts[0], &experts[1]).map(|y| y.0),
        ];
        for (i, y) in results.into_iter().enumerate() {
            assert_eq!(y.is_ok(), x == bf16 && (p == f32 || p == bf16), "op {i}: {x} with {p}");
            if let Ok(y) = y {
                y.sum_all().unwrap().backward().unwrap();
            }
        }
    }
}

#[test]
fn every_op_passes_its_self_test() {
    for t in engine::self_tests() {
        let e = t.run(&Device::cpu(), DType::F32).unwrap();
        assert!(e <= 1e-5, "{}: {e:e}", t.name);
        println!("{}: {e:.1e}", t.name);
    }
}
