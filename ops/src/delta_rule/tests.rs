use super::*;
use crate::testing::{close, randn, ratio, strided};
use engine::gradcheck;

/// The definition, token by token.
#[allow(clippy::needless_range_loop)]
fn recurrent(op: DeltaRule, q: &Tensor, k: &Tensor, v: &Tensor, g: Option<&Tensor>, beta: Option<&Tensor>, h0: Option<&Tensor>) -> (Tensor, Tensor) {
    let [b, t, hk, hv, dk, dv] = sizes(q.shape(), v.shape());
    let vec = |x: &Tensor| x.to_vec::<f64>().unwrap();
    let (qv, kv, vv) = (vec(q), vec(k), vec(v));
    let (gv, bv) = (g.map(vec), beta.map(vec));
    let mut state = h0.map(vec).unwrap_or_else(|| vec![0.0; b * hv * dk * dv]);
    let mut o = vec![0.0; b * t * hv * dv];
    let norm = |x: &[f64]| -> Vec<f64> {
        let r = if op.qk_l2norm { 1.0 / (x.iter().map(|x| x * x).sum::<f64>() + L2_EPS).sqrt() } else { 1.0 };
        x.iter().map(|x| x * r).collect()
    };
    let scale = op.scale.unwrap_or((dk as f64).powf(-0.5));
    for bi in 0..b {
        for h in 0..hv {
            let s = &mut state[(bi * hv + h) * dk * dv..][..dk * dv];
            for ti in 0..t {
                let kh = (bi * t + ti) * hk + h / (hv / hk);
                let (q, k) = (norm(&qv[kh * dk..][..dk]), norm(&kv[kh * dk..][..dk]));
                let at = (bi * t + ti) * hv + h;
                let v = &vv[at * dv..][..dv];
                let (alpha, beta) = (gv.as_ref().map_or(1.0, |g| g[at].exp()), bv.as_ref().map_or(1.0, |b| b[at]));
                s.iter_mut().for_each(|x| *x *= alpha);
                for j in 0..dv {
                    let held: f64 = if op.erase { (0..dk).map(|i| k[i] * s[i * dv + j]).sum() } else { 0.0 };
                    for i in 0..dk {
                        s[i * dv + j] += beta * k[i] * (v[j] - held);
                    }
                    o[at * dv + j] = scale * (0..dk).map(|i| q[i] * s[i * dv + j]).sum::<f64>();
                }
            }
        }
    }
    (Tensor::from_vec(o, &[b, t, hv, dv]).unwrap(), Tensor::from_vec(state, &[b, hv, dk, dv]).unwrap())
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    h0: Tensor,
}
fn case(b: usize, t: usize, hk: usize, hv: usize, dk: usize, dv: usize, decay: f64) -> Case {
    let pos = |s: u64| randn(&[b, t, hv], s).sigmoid().unwrap();
    Case {
        q: randn(&[b, t, hk, dk], 1),
        k: randn(&[b, t, hk, dk], 2),
        v: randn(&[b, t, hv, dv], 3),
        g: pos(4).affine(-decay, -decay * 0.1).unwrap(),
        beta: pos(5).affine(2.0, 0.0).unwrap(),
        h0: randn(&[b, hv, dk, dv], 6),
    }
}
fn rule(erase: bool) -> DeltaRule {
    DeltaRule { erase, ..DeltaRule::gated_delta_net() }
}

#[test]
fn chunkwise_is_recurrent() {
    for t in [1, 63, 64, 65, 75, 500, 1000, 2048] {
        let (hk, hv, dk, dv) = if t > 600 { (1, 1, 16, 8) } else { (2, 4, 12, 20) };
        for decay in [1e-4, 1.0, 20.0] {
            let c = case(1, t, hk, hv, dk, dv, decay);
            let zeroed = Tensor::cat(
                &[&c.k.narrow(1, 0, t / 2).unwrap(), &c.k.narrow(1, t / 2, t - t / 2).unwrap().affine(if t == 75 { 0.0 } else { 1.0 }, 0.0).unwrap()],
                1,
            )
            .unwrap();
            for (erase, with_decay) in [(true, true), (true, false), (false, true), (false, false)] {
                let g = with_decay.then_some(&c.g);
                let x = DeltaRuleInputs { log_decay: g, beta: Some(&c.beta), initial_state: Some(&c.h0), cu_seqlens: None };
                let (o, h) = delta_rule(rule(erase), &c.q, &zeroed, &c.v, x).unwrap();
                let (wo, wh) = recurrent(rule(erase), &c.q, &zeroed, &c.v, g, Some(&c.beta), Some(&c.h0));
                close(&o, &wo, 1e-9);
                close(&h, &wh, 1e-9);
            }
        }
    }
}

#[test]
fn gradients_of_the_whole_family() {
    for (t, hk, hv, dk, dv, decay) in [(3, 1, 2, 3, 2, 0.5), (70, 1, 1, 3, 2, 0.05), (66, 1, 1, 2, 3, 8.0)] {
        let c = case(1, t, hk, hv, dk, dv, decay);
        for (erase, with_decay) in [(true, true), (true, false), (false, true), (false, false)] {
            for l2 in [true, false] {
                // without the norm keys are kept short: the recurrence itself is unstable for β |k|² > 2
                let k = if l2 { c.k.clone() } else { c.k.affine(0.4, 0.0).unwrap() };
                let op = DeltaRule { qk_l2norm: l2, ..rule(erase) };
                let f = |v: &[Tensor]| {
                    let x =
                        DeltaRuleInputs { log_decay: with_decay.then_some(&v[4]), beta: Some(&v[3]), initial_state: Some(&v[5]), cu_seqlens: None };
                    delta_rule(op, &v[0], &v[1], &v[2], x).map(|(o, h)| vec![o, h])
                };
                let leaves = [c.q.clone(), k, c.v.clone(), c.beta.clone(), c.g.clone(), c.h0.clone()];
                gradcheck(f, &leaves, 1e-5).unwrap().within(1e-6).unwrap();
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_composed_reference() {
    let c = case(1, 75, 2, 4, 6, 5, 0.4);
    let h0 = randn(&[3, 4, 6, 5], 9);
    let cu = Tensor::from_vec([0i64, 9, 9, 75], &[4]).unwrap();
    for (erase, cu) in [(true, None), (true, Some(&cu)), (false, None), (false, Some(&cu))] {
        let h = if cu.is_some() { &h0 } else { &c.h0 };
        let leaves: Vec<Tensor> = [&c.q, &c.k, &c.v, &c.g, &c.beta, h].map(|x| x.detach().requires_grad()).into();
        let x = DeltaRuleInputs { log_decay: Some(&leaves[3]), beta: Some(&leaves[4]), initial_state: Some(&leaves[5]), cu_seqlens: cu };
        let both = |(o, s): (Tensor, Tensor)| {
            let loss = o.mul(&randn(o.shape(), 21)).unwrap().sum(&[0, 1, 2, 3], false).unwrap();
            let loss = loss.add(&s.mul(&randn(s.shape(), 22)).unwrap().sum(&[0, 1, 2, 3], false).unwrap()).unwrap();
            let g = loss.backward().unwrap();
            let grads: Vec<Tensor> = leaves.iter().map(|x| g.get(x).unwrap().clone()).collect();
            ([o.detach(), s.detach()], grads)
        };
        let ours = both(delta_rule(rule(erase), &leaves[0], &leaves[1], &leaves[2], x).unwrap());
        let plain = both(reference::delta_rule(rule(erase), &leaves[0], &leaves[1], &leaves[2], x).unwrap());
        ours.0.iter().zip(&plain.0).chain(ours.1.iter().zip(&plain.1)).for_each(|(a, b)| close(a, b, 1e-10));
    }
}

/// o, the final state and every gradient.
fn whole(op: DeltaRule, x: [&Tensor; 6], with_decay: bool, cu_seqlens: Option<&Tensor>, dy: [&Tensor; 2]) -> Vec<Tensor> {
    let v = x.map(Tensor::requires_grad);
    let ins = DeltaRuleInputs { log_decay: with_decay.then_some(&v[3]), beta: Some(&v[4]), initial_state: Some(&v[5]), cu_seqlens };
    let (o, s) = delta_rule(op, &v[0], &v[1], &v[2], ins).unwrap();
    let part = |y: &Tensor, d: &Tensor| y.mul(&d.cast(y.dtype()).unwrap()).unwrap().cast(DType::F64).unwrap().sum_all().unwrap();
    let g = part(&o, dy[0]).add(&part(&s, dy[1])).unwrap().backward().unwrap();
    let grads = v.iter().enumerate().filter(|(i, _)| *i != 3 || with_decay).map(|(_, v)| g.get(v).unwrap().clone());
    [o.detach(), s.detach()].into_iter().chain(grads).collect()
}

#[test]
fn f32_keeps_its_digits_after_a_strong_decay() {
    let t = 75;
    let weak_after_strong = |i: usize| if i % 32 < 16 { -20.0 } else { -0.01 };
    let one_reset = |i: usize| if i % 32 == 1 { f64::NEG_INFINITY } else { -0.1 };
    let decays: [&dyn Fn(usize) -> f64; 5] = [&weak_after_strong, &one_reset, &|_| -20.0, &|_| -1e-4, &|_| -1.0];
    for (i, decay) in decays.into_iter().enumerate() {
        let c = case(1, t, 1, 2, 24, 20, 1.0);
        let g = Tensor::from_vec((0..2 * t).map(|i| decay(i / 2)).collect::<Vec<f64>>(), &[1, t, 2]).unwrap();
        let dy = [&randn(&[1, t, 2, 20], 21), &randn(&[1, 2, 24, 20], 22)];
        for (erase, with_decay) in [(true, true), (true, false), (false, true), (false, false)] {
            let run = |d: DType| {
                let x = [&c.q, &c.k, &c.v, &g, &c.beta, &c.h0].map(|x| x.cast(DType::F32).unwrap().cast(d).unwrap());
                whole(rule(erase), x.each_ref(), with_decay, None, dy)
            };
            for (j, (a, b)) in run(DType::F32).iter().zip(&run(DType::F64)).enumerate() {
                assert!(ratio(a, b) <= 1e-5, "decay {i}, erase {erase}, decay {with_decay}, result {j}: {:e}", ratio(a, b));
            }
        }
    }
}

#[test]
fn a_zero_key_has_a_gradient_through_its_norm() {
    let c = case(1, 5, 1, 1, 3, 2, 0.5);
    let k = c.k.mul(&Tensor::from_vec([1.0, 0.0, 1.0, 0.0, 1.0], &[1, 5, 1, 1]).unwrap()).unwrap();
    let x = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), initial_state: Some(&c.h0), cu_seqlens: None };
    // the norm bends within 1e-3 of zero: the step is small against that
    let f = |v: &[Tensor]| delta_rule(rule(true), &c.q, &v[0], &c.v, x).map(|(o, h)| vec![o, h]);
    gradcheck(f, &[k], 1e-7).unwrap().within(1e-6).unwrap();
}

#[test]
fn packed_documents_are_separate_documents() {
    let c = case(1, 203, 2, 2, 8, 8, 0.3);
    let cu = Tensor::from_vec([0i32, 65, 65, 70, 203], &[5]).unwrap();
    let h0 = randn(&[4, 2, 8, 8], 9);
    let dy = [&randn(&[1, 203, 2, 8], 21), &randn(&[4, 2, 8, 8], 22)];
    let packed = whole(rule(true), [&c.q, &c.k, &c.v, &c.g, &c.beta, &h0], true, Some(&cu), dy);
    for (i, (a, n)) in [(0, 65), (65, 0), (65, 5), (70, 133)].into_iter().enumerate() {
        let (cut, state) = (|x: &Tensor| x.narrow(1, a, n).unwrap(), |x: &Tensor| x.narrow(0, i, 1).unwrap());
        let x = [cut(&c.q), cut(&c.k), cut(&c.v), cut(&c.g), cut(&c.beta), state(&h0)];
        let alone = whole(rule(true), x.each_ref(), true, None, [&cut(dy[0]), &state(dy[1])]);
        for (j, (alone, packed)) in alone.iter().zip(&packed).enumerate() {
            let part = if j == 1 || j == 7 { state(packed) } else { cut(packed) };
            assert_eq!(alone.to_vec::<f64>().unwrap(), part.to_vec::<f64>().unwrap(), "document {i}, result {j}");
        }
    }
    let small = case(1, 7, 1, 2, 3, 2, 0.3);
    let cu = Tensor::from_vec([0i64, 3, 7], &[3]).unwrap();
    let f = |v: &[Tensor]| {
        let x = DeltaRuleInputs { log_decay: Some(&v[3]), beta: Some(&v[4]), initial_state: None, cu_seqlens: Some(&cu) };
        delta_rule(rule(true), &v[0], &v[1], &v[2], x).map(|(o, h)| vec![o, h])
    };
    gradcheck(f, &[small.q, small.k, small.v, small.g, small.beta], 1e-5).unwrap().within(1e-6).unwrap();
}

#[test]
fn f32_and_bf16_stay_close_and_views_are_read_in_place() {
    let c = case(2, 130, 2, 4, 32, 32, 0.2);
    let run = |d: DType| {
        let cast = |x: &Tensor, d: DType| x.cast(d).unwrap().requires_grad();
        let s = if d == DType::F64 { DType::F64 } else { DType::F32 };
        let v = [cast(&c.q, d), cast(&c.k, d), cast(&c.v, d), cast(&c.g, s), cast(&c.beta, d)];
        let x = DeltaRuleInputs { log_decay: Some(&v[3]), beta: Some(&v[4]), ..Default::default() };
        let (o, _) = delta_rule(rule(true), &v[0], &v[1], &v[2], x).unwrap();
        let g = o.backward_with(&randn(o.shape(), 8).cast(d).unwrap()).unwrap();
        let mut all = vec![o.detach()];
        all.extend(v.iter().map(|v| g.get(v).unwrap().clone()));
        all
    };
    let want = run(DType::F64);
    for (a, b) in run(DType::F32).iter().zip(&want) {
        close(a, b, 1e-5);
    }
    // o, dq, dk, dv, dg, dbeta: the field's bounds
    for ((a, b), tol) in run(DType::BF16).iter().zip(&want).zip([0.005, 0.008, 0.008, 0.008, 0.02, 0.02]) {
        assert!(ratio(a, b) <= tol, "{} > {tol}", ratio(a, b));
    }
    let x = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), ..Default::default() };
    let (o, _) = delta_rule(rule(true), &strided(&c.q), &strided(&c.k), &strided(&c.v), x).unwrap();
    assert_eq!(o.to_vec::<f64>().unwrap(), want[0].to_vec::<f64>().unwrap());
}

#[test]
fn stepping_is_the_whole_and_thread_counts_do_not_matter() {
    let c = case(1, 70, 1, 2, 8, 8, 0.3);
    let all = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), ..Default::default() };
    let (o, h) = delta_rule(rule(true), &c.q, &c.k, &c.v, all).unwrap();
    let mut s = c.h0.affine(0.0, 0.0).unwrap();
    for t in 0..70 {
        let at = |x: &Tensor| x.narrow(1, t, 1).unwrap();
        let x = DeltaRuleInputs { log_decay: Some(&at(&c.g)), beta: Some(&at(&c.beta)), initial_state: Some(&s), cu_seqlens: None };
        let (ot, st) = delta_rule_step(rule(true), &at(&c.q), &at(&c.k), &at(&c.v), x).unwrap();
        close(&ot, &at(&o), 1e-10);
        s = st;
    }
    close(&s, &h, 1e-10);
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let dy = [&randn(&[1, 70, 2, 8], 21), &randn(&[1, 2, 8, 8], 22)];
    let many = || whole(rule(true), [&c.q, &c.k, &c.v, &c.g, &c.beta, &c.h0], true, None, dy);
    let bits = |x: Vec<Tensor>| x.iter().map(|x| x.to_vec::<f64>().unwrap()).collect::<Vec<_>>();
    assert_eq!(bits(one.install(many)), bits(many()));
}

#[test]
fn bad_arguments() {
    let c = case(1, 4, 2, 3, 4, 4, 0.3);
    assert!(delta_rule(rule(true), &c.q, &c.k, &c.v, DeltaRuleInputs::default()).is_err(), "3 value heads for 2 key heads");
    let c = case(1, 4, 2, 2, 4, 4, 0.3);
    let bad = randn(&[1, 3, 2], 1);
    assert!(delta_rule(rule(true), &c.q, &c.k, &c.v, DeltaRuleInputs { beta: Some(&bad), ..Default::default() }).is_err());
    assert!(delta_rule(rule(true), &c.q, &c.k, &c.v.cast(DType::F32).unwrap(), DeltaRuleInputs::default()).is_err());
    let (no_heads, no_width) = (c.v.narrow(2, 0, 0).unwrap(), c.q.narrow(3, 0, 0).unwrap());
    assert!(delta_rule(rule(true), &c.q, &c.k, &no_heads, DeltaRuleInputs::default()).is_err());
    assert!(delta_rule(rule(true), &no_width, &no_width, &c.v, DeltaRuleInputs::default()).is_err());
    let one = |x: &Tensor| x.narrow(1, 0, 1).unwrap();
    let step = |q: &Tensor, x| delta_rule_step(rule(true), q, &one(&c.k), &one(&c.v), x).unwrap_err();
    assert!(step(&one(&c.q), DeltaRuleInputs::default()).to_string().contains("needs the state"));
    let state = DeltaRuleInputs { initial_state: Some(&c.h0), ..Default::default() };
    assert!(matches!(step(&one(&c.q).requires_grad(), state), Error::NoGrad { .. }));
    let empty = c.q.narrow(1, 0, 0).unwrap();
    assert_eq!(delta_rule(rule(true), &empty, &empty, &empty, DeltaRuleInputs::default()).unwrap().0.shape(), [1, 0, 2, 4]);
}
