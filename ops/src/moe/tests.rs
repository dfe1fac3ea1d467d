use super::*;
use crate::testing::{close, randn};
use engine::gradcheck;

fn inputs(n: usize, h: usize, e: usize, i: usize) -> [Tensor; 4] {
    [randn(&[n, h], 1), randn(&[n, e], 2), randn(&[e, 2 * i, h], 3), randn(&[e, h, i], 4)]
}

#[test]
fn matches_its_reference_and_its_gradient() {
    for (n, h, e, i, k) in [(5, 4, 3, 2, 1), (7, 3, 4, 3, 2), (1, 4, 8, 2, 2), (6, 3, 3, 2, 3)] {
        for norm_topk in [true, false] {
            let op = Moe { top_k: k, norm_topk };
            let [x, l, w1, w2] = inputs(n, h, e, i);
            let (y, counts) = moe(op, &x, &l, &w1, &w2).unwrap();
            close(&y, &reference::moe(op, &x, &l, &w1, &w2).unwrap(), 1e-12);
            assert_eq!(counts.to_vec::<i64>().unwrap().iter().sum::<i64>() as usize, n * k);
            gradcheck(|v| Ok(vec![moe(op, &v[0], &v[1], &v[2], &v[3])?.0]), &[x, l, w1, w2], 1e-5).unwrap().within(1e-6).unwrap();
        }
    }
}

#[test]
fn f32_and_bf16_and_threads() {
    let [x, l, w1, w2] = inputs(300, 32, 8, 16);
    let op = Moe { top_k: 2, norm_topk: true };
    let want = reference::moe(op, &x, &l, &w1, &w2).unwrap();
    for (d, tol) in [(DType::F32, 1e-5), (DType::BF16, 0.01)] {
        let c = |t: &Tensor| t.cast(d).unwrap();
        let y = moe(op, &c(&x), &l.cast(DType::F32).unwrap(), &c(&w1), &c(&w2)).unwrap().0;
        close(&y, &want, tol);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let alone = one.install(|| moe(op, &c(&x), &l.cast(DType::F32).unwrap(), &c(&w1), &c(&w2)).unwrap().0);
        assert_eq!(alone.to_vec::<f32>().unwrap(), y.to_vec::<f32>().unwrap());
    }
}

#[test]
fn losses() {
    let (a, b) = (randn(&[9, 4], 1), randn(&[9, 4], 2));
    gradcheck(|v| Ok(vec![router_z_loss(&[&v[0], &v[1]])?]), &[a.clone(), b.clone()], 1e-5).unwrap().within(1e-7).unwrap();
    gradcheck(|v| Ok(vec![load_balancing_loss(&[&v[0], &v[1]], 2)?]), &[a, b], 1e-5).unwrap().within(1e-7).unwrap();
    // every expert chosen equally often with equal probability: top_k
    let even = Tensor::from_vec((0..16).map(|i| if i % 5 == 0 { 1.0 } else { 0.0 }).collect::<Vec<f64>>(), &[4, 4]).unwrap();
    assert!((load_balancing_loss(&[&even], 1).unwrap().item().unwrap() - 1.0).abs() < 1e-12);
}

#[test]
fn bad_arguments() {
    let [x, l, w1, w2] = inputs(5, 4, 3, 2);
    assert!(moe(Moe { top_k: 4, norm_topk: true }, &x, &l, &w1, &w2).is_err());
    assert!(moe(Moe { top_k: 1, norm_topk: true }, &x, &l.narrow(1, 0, 2).unwrap(), &w1, &w2).is_err());
    assert!(load_balancing_loss(&[&l], 0).is_err());
    let none = x.narrow(0, 0, 0).unwrap();
    assert_eq!(moe(Moe { top_k: 1, norm_topk: true }, &none, &l.narrow(0, 0, 0).unwrap(), &w1, &w2).unwrap().0.shape(), [0, 4]);
}
