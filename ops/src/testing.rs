//! What the ops' tests share.

use engine::{DType, Device, Result, Tensor, gradcheck};

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

/// A random output gradient that every float dtype holds exactly.
pub fn upstream(i: usize, y: &Tensor) -> Tensor {
    randn(y.shape(), 90 + i as u64).cast(DType::BF16).unwrap()
}

/// The outputs of `f`, then the gradients of all leaves from the output gradients `dy`.
pub fn whole(f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>, leaves: &[Tensor], dy: impl Fn(usize, &Tensor) -> Tensor) -> Vec<Tensor> {
    let x: Vec<Tensor> = leaves.iter().map(|x| x.detach().requires_grad()).collect();
    let mut all = f(&x).unwrap();
    let part = |(i, y): (usize, &Tensor)| y.mul(&dy(i, y).cast(y.dtype()).unwrap()).unwrap().cast(DType::F64).unwrap().sum_all().unwrap();
    let loss = all.iter().enumerate().map(part).reduce(|a, b| a.add(&b).unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    all.iter_mut().for_each(|y| *y = y.detach());
    all.extend(x.iter().map(|x| grads.get(x).unwrap().clone()));
    all
}

/// Runs `f` in f32, bf16 and f16 against `reference` in f64 on the same rounded numbers. Each output and gradient must be within its bound for halves,
/// or within 1e-5 in f32. The leaves of `wide` stay in f32 beside halves.
#[track_caller]
pub fn narrow(
    name: &str,
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    reference: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    leaves: &[Tensor],
    wide: &[usize],
    bounds: &[f64],
) {
    for d in [DType::F32, DType::BF16, DType::F16] {
        let dtype = |i: usize| if wide.contains(&i) { DType::F32 } else { d };
        let x: Vec<Tensor> = leaves.iter().enumerate().map(|(i, x)| x.cast(dtype(i)).unwrap()).collect();
        let exact: Vec<Tensor> = x.iter().map(|x| x.cast(DType::F64).unwrap()).collect();
        let (got, want) = (whole(&f, &x, upstream), whole(&reference, &exact, upstream));
        assert_eq!([got.len(), want.len()], [bounds.len(); 2], "{name}");
        for (i, ((got, want), bound)) in got.iter().zip(&want).zip(bounds).enumerate() {
            let (e, bound) = (ratio(got, want), if d == DType::F32 { 1e-5 } else { *bound });
            assert!(e <= bound, "{name} {d} result {i}: {e:e} > {bound:e}");
        }
        got[bounds.len() - leaves.len()..].iter().zip(&x).for_each(|(g, x)| assert_eq!(g.dtype(), x.dtype(), "{name}"));
    }
}

/// Autograd against central differences.
#[track_caller]
pub fn check(f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>, leaves: &[Tensor]) {
    gradcheck(f, leaves, 1e-5).unwrap().within(1e-6).unwrap();
}

/// An error that holds all of `words`: the op, the argument, what it should be and what it is.
#[track_caller]
pub fn fails<T>(result: Result<T>, words: &str) {
    let e = result.err().expect(words).to_string();
    assert!(e.contains(words), "{e:?} lacks {words:?}");
}

/// The bits of every element.
pub fn bits(x: &Tensor) -> Vec<u64> {
    x.to_vec::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
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
