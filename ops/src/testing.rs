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

#[test]
fn every_op_passes_its_self_test() {
    for t in engine::self_tests() {
        let e = t.run(&Device::cpu(), DType::F32).unwrap();
        assert!(e <= 1e-5, "{}: {e:e}", t.name);
        println!("{}: {e:.1e}", t.name);
    }
}
