use super::*;
use crate::testing::{close, randn, strided};
use engine::{DType, gradcheck};

#[test]
fn gradients_of_every_form() {
    for shape in [vec![3, 7], vec![2, 3, 33], vec![1, 1]] {
        let d = *shape.last().unwrap();
        let (x, w, g) = (randn(&shape, 1), randn(&[d], 2), randn(&shape, 3));
        for centred in [false, true] {
            gradcheck(|v| Ok(vec![rms_norm(&v[0], &v[1], 1e-6, centred)?]), &[x.clone(), w.clone()], 1e-5).unwrap().within(1e-6).unwrap();
            let f = |v: &[Tensor]| rms_norm_residual(&v[0], &v[2], &v[1], 1e-6, centred).map(|(y, h)| vec![y, h]);
            gradcheck(f, &[x.clone(), w.clone(), g.clone()], 1e-5).unwrap().within(1e-6).unwrap();
        }
        for act in [NormGate::Silu, NormGate::Sigmoid] {
            gradcheck(|v| Ok(vec![rms_norm_gated(&v[0], &v[1], &v[2], 1e-6, act)?]), &[x.clone(), w.clone(), g.clone()], 1e-5)
                .unwrap()
                .within(1e-6)
                .unwrap();
            let centred = RmsNorm { eps: 1e-6, zero_centred: true, residual: false, gate: Some(act) };
            gradcheck(|v| Ok(vec![run1(centred, &[&v[0], &v[1], &v[2]])?]), &[x.clone(), w.clone(), g.clone()], 1e-5).unwrap().within(1e-6).unwrap();
        }
    }
}

#[test]
fn agrees_with_primitives_in_f32_and_bf16_and_on_views() {
    let (x, w) = (randn(&[5, 300], 1), randn(&[300], 2));
    let want = reference::rms_norm(&x, &w, 1e-6, true).unwrap();
    for (d, tol) in [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 5e-3)] {
        let y = rms_norm(&x.cast(d).unwrap(), &w.cast(d).unwrap(), 1e-6, true).unwrap();
        close(&y, &want, tol);
    }
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
fn bad_arguments() {
    assert!(rms_norm(&randn(&[2, 3], 1), &randn(&[4], 2), 1e-6, false).is_err());
    let both = RmsNorm { eps: 1e-6, zero_centred: false, residual: true, gate: Some(NormGate::Silu) };
    let x = randn(&[2, 3], 1);
    assert!(run(both, &[&x, &randn(&[3], 2), &x, &x]).is_err(), "the gate would be ignored");
    assert!(rms_norm_gated(&randn(&[2, 3], 1), &randn(&[3], 2), &randn(&[2, 4], 2), 1e-6, NormGate::Silu).is_err());
}
