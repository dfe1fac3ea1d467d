use super::{reference::linear_cross_entropy as reference, *};
use crate::testing::{close, fails, narrow, randn};
use engine::gradcheck;

fn targets(n: usize, v: usize) -> Tensor {
    Tensor::from_vec((0..n).map(|i| if i % 7 == 3 { IGNORE } else { (i * 13 % v) as i64 }).collect::<Vec<_>>(), &[n]).unwrap()
}

#[test]
fn gradient_and_reference() {
    for (n, h, v) in [(9, 5, 11), (1, 3, 2), (70, 4, 40_000)] {
        let (x, w, t) = (randn(&[n, h], 1), randn(&[v, h], 2), targets(n, v));
        let want = reference(&x, &w, &t).unwrap();
        close(&linear_cross_entropy(&x, &w, &t).unwrap(), &want, 1e-12);
        let grads = |f: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
            let (x, w) = (x.requires_grad(), w.requires_grad());
            let g = f(&x, &w).affine(2.0, 0.0).unwrap().backward().unwrap();
            [g.get(&x).unwrap().clone(), g.get(&w).unwrap().clone()]
        };
        let ours = grads(&|x, w| linear_cross_entropy(x, w, &t).unwrap());
        let theirs = grads(&|x, w| reference(x, w, &t).unwrap());
        close(&ours[0], &theirs[0], 1e-12);
        close(&ours[1], &theirs[1], 1e-12);
        let small = linear_cross_entropy(&x.cast(DType::F32).unwrap(), &w.cast(DType::F32).unwrap(), &t).unwrap();
        close(&small, &want, 1e-5);
    }
    let (x, w, t) = (randn(&[9, 5], 1), randn(&[11, 5], 2), targets(9, 11));
    gradcheck(|v| Ok(vec![linear_cross_entropy(&v[0], &v[1], &t)?]), &[x.clone(), w.clone()], 1e-5).unwrap().within(1e-7).unwrap();
    for leaf in [&x, &w] {
        let only =
            |v: &[Tensor]| Ok(vec![if std::ptr::eq(leaf, &x) { linear_cross_entropy(&v[0], &w, &t)? } else { linear_cross_entropy(&x, &v[0], &t)? }]);
        gradcheck(only, std::slice::from_ref(leaf), 1e-5).unwrap().within(1e-7).unwrap();
    }
    let op = LinearCrossEntropy { train: [true, false] };
    assert_eq!(op.infer(&[x.meta(), w.meta(), t.meta()]).unwrap().len(), 3, "the weight's gradient is not computed");
    assert!(matches!(linear_cross_entropy_per_token(&x.requires_grad(), &w, &t), Err(Error::NoGrad { .. })));
    let per = linear_cross_entropy_per_token(&x, &w, &t).unwrap().to_vec::<f64>().unwrap();
    assert_eq!(per[3], 0.0);
    assert!((per.iter().sum::<f64>() / 8.0 - reference(&x, &w, &t).unwrap().item().unwrap()).abs() < 1e-12);
}

#[test]
fn narrow_types_stay_within_bounds() {
    for (n, h, v) in [(77, 40, 70), (130, 24, 500)] {
        let t = targets(n, v);
        let leaves = [randn(&[n, h], 1), randn(&[v, h], 2).affine(0.2, 0.0).unwrap()];
        let f = |v: &[Tensor]| Ok(vec![linear_cross_entropy(&v[0], &v[1], &t)?]);
        narrow("linear_cross_entropy", f, |v| Ok(vec![reference(&v[0], &v[1], &t)?]), &leaves, &[], &[1e-5, 0.008, 0.008]);
    }
}

#[test]
fn bad_arguments_are_named() {
    let (x, w) = (randn(&[2, 3], 1), randn(&[4, 3], 2));
    let t = |v: [i64; 2]| Tensor::from_vec(v, &[2]).unwrap();
    let loss = |x: &Tensor, w: &Tensor, t: &Tensor| linear_cross_entropy(x, w, t);
    let ok = t([1, 2]);
    fails(loss(&randn(&[2, 3, 1], 1), &w, &ok), "linear_cross_entropy: x must have shape [tokens, hidden], found [2, 3, 1]");
    fails(loss(&x.cast(DType::I64).unwrap(), &w, &ok), "linear_cross_entropy: x must be a float dtype, found i64");
    fails(loss(&x, &randn(&[4, 2], 2), &ok), "linear_cross_entropy: weight must have shape [vocabulary, 3], found [4, 2]");
    fails(loss(&x, &w.cast(DType::F32).unwrap(), &ok), "linear_cross_entropy: weight must be f64, as x, found f32");
    fails(loss(&x, &w, &ok.cast(DType::I32).unwrap()), "linear_cross_entropy: targets must be i64[2], found i32[2]");
    fails(loss(&x, &w, &t([1, 4])), "linear_cross_entropy: target 4 at position 1 is neither in 0..4 nor -100");
    fails(loss(&x, &w, &t([IGNORE; 2])), "linear_cross_entropy: none of the 2 targets counts");
    fails(loss(&x, &randn(&[0, 3], 2), &ok), "linear_cross_entropy: target 1 at position 0 is neither in 0..0 nor -100");
    fails(loss(&x, &randn(&[0, 3], 2), &t([IGNORE; 2])), "linear_cross_entropy: none of the 2 targets counts");
}
