use super::*;
use crate::testing::{check, close, fails, narrow, randn, strided};
use engine::DType;

#[test]
fn gradients_of_every_form() {
    for shape in [vec![3, 7], vec![2, 3, 33], vec![1, 1]] {
        let d = *shape.last().unwrap();
        let (x, w, g) = (randn(&shape, 1), randn(&[d], 2), randn(&shape, 3));
        let three = [x.clone(), w.clone(), g];
        for centred in [false, true] {
            check(|v| Ok(vec![rms_norm(&v[0], &v[1], 1e-6, centred)?]), &[x.clone(), w.clone()]);
            check(|v| Ok(vec![rms_norm(&strided(&v[0]), &v[1], 1e-6, centred)?]), &[x.clone(), w.clone()]);
            let both = |v: &[Tensor]| rms_norm_residual(&v[0], &v[2], &v[1], 1e-6, centred);
            check(|v| both(v).map(|(y, h)| vec![y, h]), &three);
            check(|v| Ok(vec![both(v)?.0]), &three);
            check(|v| Ok(vec![both(v)?.1]), &three);
            for act in [NormGate::Silu, NormGate::Sigmoid] {
                let op = RmsNorm { eps: 1e-6, zero_centred: centred, residual: false, gate: Some(act) };
                check(|v| Ok(vec![run1(op, &[&v[0], &v[1], &v[2]])?]), &three);
                check(|v| Ok(vec![run1(op, &[&strided(&v[0]), &v[1], &strided(&v[2])])?]), &three);
            }
        }
    }
}

#[test]
fn narrow_types_stay_within_bounds() {
    let leaves = [randn(&[77, 100], 1), randn(&[100], 2), randn(&[77, 100], 3)];
    for wide in [&[][..], &[1]] {
        for centred in [false, true] {
            let plain = |v: &[Tensor]| Ok(vec![rms_norm(&v[0], &v[1], 1e-6, centred)?]);
            let composed = |v: &[Tensor]| Ok(vec![reference::rms_norm(&v[0], &v[1], 1e-6, centred)?]);
            narrow("rms_norm", plain, composed, &leaves[..2], wide, &[0.005, 0.008, 0.008]);
            let residual = |v: &[Tensor]| rms_norm_residual(&v[0], &v[2], &v[1], 1e-6, centred).map(|(y, h)| vec![y, h]);
            let composed = |v: &[Tensor]| {
                let h = v[0].add(&v[2])?;
                Ok(vec![reference::rms_norm(&h, &v[1], 1e-6, centred)?, h])
            };
            narrow("rms_norm with residual", residual, composed, &leaves, wide, &[0.005, 0.005, 0.008, 0.008, 0.008]);
        }
        for act in [NormGate::Silu, NormGate::Sigmoid] {
            let gated = |v: &[Tensor]| Ok(vec![rms_norm_gated(&v[0], &v[1], &v[2], 1e-6, act)?]);
            let composed = |v: &[Tensor]| Ok(vec![reference::rms_norm_gated(&v[0], &v[1], &v[2], 1e-6, act)?]);
            narrow("rms_norm gated", gated, composed, &leaves, wide, &[0.005, 0.008, 0.008, 0.008]);
        }
    }
}

#[test]
fn agrees_with_primitives_in_f64_and_on_views() {
    let (x, w) = (randn(&[5, 300], 1), randn(&[300], 2));
    let want = reference::rms_norm(&x, &w, 1e-6, true).unwrap();
    close(&rms_norm(&x, &w, 1e-6, true).unwrap(), &want, 1e-13);
    close(&rms_norm(&strided(&x), &w, 1e-6, true).unwrap(), &want, 1e-13);
    let gate = randn(&[5, 300], 3);
    for act in [NormGate::Silu, NormGate::Sigmoid] {
        let want = reference::rms_norm_gated(&x, &w, &gate, 1e-6, act).unwrap();
        close(&rms_norm_gated(&x, &w, &gate, 1e-6, act).unwrap(), &want, 1e-13);
    }
    let zero = rms_norm(&x.affine(0.0, 0.0).unwrap().requires_grad(), &w, 1e-6, true).unwrap();
    assert!(zero.to_vec::<f64>().unwrap().iter().all(|v| *v == 0.0));
}

#[test]
fn bad_arguments_are_named() {
    let (x, w) = (randn(&[2, 3], 1), randn(&[3], 2));
    let scalar = x.sum_all().unwrap();
    fails(rms_norm(&scalar, &w, 1e-6, false), "rms_norm: x must have shape with at least one axis, found []");
    fails(rms_norm(&x.cast(DType::I64).unwrap(), &w, 1e-6, false), "rms_norm: x must be a float dtype, found i64");
    fails(rms_norm(&x, &randn(&[4], 2), 1e-6, false), "rms_norm: weight must have shape [3], the last axis of x, found [4]");
    fails(rms_norm(&x, &w.cast(DType::F32).unwrap(), 1e-6, false), "rms_norm: weight must be f64 as the input, or f64, found f32");
    let other = randn(&[2, 4], 2);
    fails(rms_norm_residual(&x, &other, &w, 1e-6, false), "rms_norm: residual must have shape [2, 3], as x, found [2, 4]");
    fails(rms_norm_gated(&x, &w, &other, 1e-6, NormGate::Silu), "rms_norm: gate must have shape [2, 3], as x, found [2, 4]");
    fails(rms_norm_gated(&x, &w, &x.cast(DType::F32).unwrap(), 1e-6, NormGate::Silu), "rms_norm: gate must be f64, as x, found f32");
    let both = RmsNorm { eps: 1e-6, zero_centred: false, residual: true, gate: Some(NormGate::Silu) };
    fails(run(both, &[&x, &w, &x, &x]), "rms_norm: takes a residual in front or a gate behind, not both");
    for shape in [[0, 3], [2, 0]] {
        let (x, w) = (randn(&shape, 1).requires_grad(), randn(&[shape[1]], 2).requires_grad());
        let y = rms_norm(&x, &w, 1e-6, false).unwrap();
        assert_eq!(y.shape(), shape);
        assert!(y.sum_all().unwrap().backward().unwrap().get(&w).unwrap().to_vec::<f64>().unwrap().iter().all(|g| *g == 0.0));
    }
}
