use super::*;
use crate::testing::{bits, check, close, fails, narrow, randn, upstream, whole};
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
fn narrow_types_stay_within_bounds_and_threads_do_not_matter() {
    let [x, l, w1, w2] = inputs(300, 32, 8, 16);
    // with router logits of two digits more: rounding them must not choose other experts
    for norm_topk in [true, false] {
        let op = Moe { top_k: 2, norm_topk };
        let f = |v: &[Tensor]| Ok(vec![moe(op, &v[0], &v[1], &v[2], &v[3])?.0]);
        let leaves = [&x, &l, &w1, &w2].map(Tensor::clone);
        for wide in [&[][..], &[1]] {
            narrow("moe", f, |v| Ok(vec![reference::moe(op, &v[0], &v[1], &v[2], &v[3])?]), &leaves, wide, &[0.005, 0.008, 0.008, 0.008, 0.008]);
        }
        for d in [DType::F32, DType::BF16] {
            let on = |threads: usize| -> Vec<Vec<u64>> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let leaves = leaves.each_ref().map(|x| x.cast(d).unwrap());
                pool.install(|| whole(f, &leaves, upstream).iter().map(bits).collect())
            };
            assert_eq!(on(1), on(3));
        }
    }
}

#[test]
fn weights_kept_in_f32_get_gradients_that_are_not_rounded() {
    let op = Moe { top_k: 2, norm_topk: true };
    let rounded = inputs(300, 32, 8, 16).map(|x| x.cast(DType::BF16).unwrap());
    let run = |v: &[Tensor], reference: bool| {
        let f =
            |v: &[Tensor]| Ok(vec![if reference { reference::moe(op, &v[0], &v[1], &v[2], &v[3])? } else { moe(op, &v[0], &v[1], &v[2], &v[3])?.0 }]);
        whole(f, v, upstream)
    };
    let wide = |i: usize| rounded[i].cast(DType::F32).unwrap();
    let got = run(&[rounded[0].clone(), wide(1), wide(2), wide(3)], false);
    let narrow = run(&[rounded[0].clone(), wide(1), rounded[2].clone(), rounded[3].clone()], false);
    let want = run(&rounded.each_ref().map(|x| x.cast(DType::F64).unwrap()), true);
    assert_eq!(bits(&got[0]), bits(&narrow[0]));
    for i in [3, 4] {
        assert_eq!(got[i].dtype(), DType::F32);
        close(&got[i], &want[i], 1e-5);
        assert_eq!(bits(&got[i].cast(DType::BF16).unwrap()), bits(&narrow[i]));
    }
    fails(moe(op, &wide(0), &wide(1), &rounded[2], &wide(3)), "moe: gate_up_proj must be f32 as the input, or f32, found bf16");
}

#[test]
fn a_token_does_not_see_the_others() {
    let op = Moe { top_k: 2, norm_topk: true };
    for d in [DType::F32, DType::BF16] {
        let [x, l, w1, w2] = inputs(300, 32, 8, 16).map(|x| x.cast(d).unwrap());
        let run =
            |x: &Tensor, l: &Tensor, dy: &Tensor| whole(|v| Ok(vec![moe(op, &v[0], &v[1], &w1, &w2)?.0]), &[x.clone(), l.clone()], |_, _| dy.clone());
        let dy = upstream(0, &x);
        let together = run(&x, &l, &dy);
        for (from, n) in [(0, 1), (1, 63), (64, 66), (130, 170)] {
            let cut = |x: &Tensor| x.narrow(0, from, n).unwrap();
            for (i, (alone, together)) in run(&cut(&x), &cut(&l), &cut(&dy)).iter().zip(&together).enumerate() {
                assert_eq!(bits(alone), bits(&cut(together)), "{d} result {i}, tokens from {from}");
            }
        }
    }
}

#[test]
fn router_logits_are_in_f32() {
    let (x, w) = (randn(&[30, 40], 1), randn(&[6, 40], 2));
    check(|v| Ok(vec![router_logits(&v[0], &v[1])?]), &[x.clone(), w.clone()]);
    let f = |v: &[Tensor]| Ok(vec![router_logits(&v[0], &v[1])?]);
    narrow("router_logits", f, |v| Ok(vec![reference::router_logits(&v[0], &v[1])?]), &[x.clone(), w.clone()], &[1], &[1e-6, 0.003, 1e-6]);
    let x = x.cast(DType::BF16).unwrap();
    assert_eq!(router_logits(&x, &w.cast(DType::BF16).unwrap()).unwrap().dtype(), DType::F32);
    let w = w.cast(DType::F32).unwrap();
    fails(router_logits(&x, &w.narrow(1, 0, 39).unwrap()), "router_logits: weight must have shape [experts, 40], found [6, 39]");
    fails(router_logits(&x.reshape(&[3, 10, 40]).unwrap(), &w), "router_logits: x must have shape [tokens, hidden], found [3, 10, 40]");
}

#[test]
fn the_shared_expert_is_gated() {
    let x = [randn(&[30, 40], 1), randn(&[30, 40], 2), randn(&[30, 1], 3)];
    let f = |v: &[Tensor]| Ok(vec![add_shared(&v[0], &v[1], &v[2])?]);
    check(f, &x);
    narrow("add_shared", f, |v| Ok(vec![reference::add_shared(&v[0], &v[1], &v[2])?]), &x, &[], &[0.003; 4]);
    fails(add_shared(&x[0], &x[1], &x[0]), "add_shared: gate must have shape [30, 1], found [30, 40]");
    fails(add_shared(&x[0], &x[1].cast(DType::F32).unwrap(), &x[2]), "add_shared: s must be a float dtype, as y, found f32");
}

#[test]
fn losses() {
    let (a, b) = (randn(&[9, 4], 1), randn(&[9, 4], 2));
    gradcheck(|v| Ok(vec![router_z_loss(&[&v[0], &v[1]])?]), &[a.clone(), b.clone()], 1e-5).unwrap().within(1e-7).unwrap();
    gradcheck(|v| Ok(vec![load_balancing_loss(&[&v[0], &v[1]], 2)?]), &[a.clone(), b.clone()], 1e-5).unwrap().within(1e-7).unwrap();
    for k in [1, 4] {
        check(|v| Ok(vec![load_balancing_loss(&[&v[0]], k)?]), std::slice::from_ref(&a));
    }
    let both = |v: &[Tensor]| Ok(vec![load_balancing_loss(&[&v[0], &v[1]], 2)?, router_z_loss(&[&v[0], &v[1]])?]);
    let composed = |v: &[Tensor]| {
        let all = Tensor::cat(&[&v[0], &v[1]], 0)?;
        Ok(vec![reference::load_balancing_loss(&all, 2)?, reference::router_z_loss(&all)?])
    };
    narrow("router losses", both, composed, &[a, b], &[], &[1e-5, 1e-5, 0.008, 0.008]);
    // every expert chosen equally often with equal probability: top_k
    let even = Tensor::from_vec((0..16).map(|i| if i % 5 == 0 { 1.0 } else { 0.0 }).collect::<Vec<f64>>(), &[4, 4]).unwrap();
    assert!((load_balancing_loss(&[&even], 1).unwrap().item().unwrap() - 1.0).abs() < 1e-12);
}

#[test]
fn bad_arguments_are_named() {
    let [x, l, w1, w2] = inputs(5, 4, 3, 2);
    let top = |top_k| Moe { top_k, norm_topk: true };
    let run = |x: &Tensor, l: &Tensor, w1: &Tensor, w2: &Tensor| moe(top(1), x, l, w1, w2);
    for k in [0, 4] {
        fails(moe(top(k), &x, &l, &w1, &w2), &format!("moe: top_k must be from 1 to the 3 experts, found {k}"));
        fails(load_balancing_loss(&[&l], k), &format!("load_balancing_loss: top_k must be from 1 to the 3 experts, found {k}"));
    }
    fails(run(&w1, &l, &w1, &w2), "moe: x must have shape [tokens, hidden], found [3, 4, 4]");
    fails(run(&x, &l.narrow(1, 0, 2).unwrap(), &w1, &w2), "moe: router_logits must have shape [5, 3], found [5, 2]");
    fails(run(&x, &l, &x, &w2), "moe: gate_up_proj must have shape [experts, 2I, hidden], found [5, 4]");
    fails(run(&x, &l, &w1.narrow(1, 0, 3).unwrap(), &w2), "moe: gate_up_proj must have shape [experts, 2I, 4], found [3, 3, 4]");
    fails(run(&x, &l, &w1, &w1), "moe: down_proj must have shape [3, 4, 2], found [3, 4, 4]");
    fails(run(&x.cast(DType::I64).unwrap(), &l, &w1, &w2), "moe: x must be a float dtype, found i64");
    fails(run(&x, &l, &w1, &w2.cast(DType::F32).unwrap()), "moe: down_proj must be f64 as the input, or f64, found f32");
    fails(run(&x, &l.cast(DType::F32).unwrap(), &w1, &w2), "moe: router_logits must be f64 as the input, or f64, found f32");
    fails(router_z_loss(&[]), "router_z_loss: needs the router logits of at least one layer");
    let experts = |n: usize, e: usize| run(&randn(&[n, 4], 1), &randn(&[n, e], 2), &randn(&[e, 4, 4], 3), &randn(&[e, 4, 2], 4));
    fails(experts(5, 0), "moe: top_k must be from 1 to the 0 experts, found 1");
    assert_eq!(experts(0, 3).unwrap().0.shape(), [0, 4]);
}
