//! The kernel against the token-by-token reference in every member of the family, gradients against central differences, exactness and errors.

use super::*;
use crate::testing::{bits, check, close, fails, narrow, randn, ratio, strided, upstream, whole};
use engine::{DType, gradcheck};

/// (erase, decay): Gated DeltaNet, DeltaNet, Mamba2's dual, linear attention.
const FAMILY: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

type Rule = fn(DeltaRule, &Tensor, &Tensor, &Tensor, DeltaRuleInputs) -> Result<(Tensor, Tensor)>;

/// A way of calling the op: which inputs follow q, k and v.
#[derive(Clone, Copy, Debug)]
struct Form {
    op: DeltaRule,
    decay: bool,
    beta: bool,
    state: bool,
}

/// Every optional input but the decay's, which the family's member decides.
fn member((erase, decay): (bool, bool)) -> Form {
    Form { op: DeltaRule { erase, ..DeltaRule::gated_delta_net() }, decay, beta: true, state: true }
}

impl Form {
    /// q, k, v, then what else there is.
    fn leaves(&self, c: &Case) -> Vec<Tensor> {
        let mut x = vec![c.q.clone(), c.k.clone(), c.v.clone()];
        x.extend([(self.decay, &c.g), (self.beta, &c.beta), (self.state, &c.h0)].into_iter().filter(|x| x.0).map(|x| x.1.clone()));
        x
    }
    /// Of the leaves, those that stay in f32 beside halves.
    fn wide(&self) -> Vec<usize> {
        [(self.decay, 3), (self.state, self.inputs() - 1)].into_iter().filter(|x| x.0).map(|x| x.1).collect()
    }
    fn inputs(&self) -> usize {
        3 + self.decay as usize + self.beta as usize + self.state as usize
    }
    /// o and the final state.
    fn run(&self, rule: Rule, x: &[Tensor], cu_seqlens: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut rest = x[3..].iter();
        let mut next = |given: bool| if given { rest.next() } else { None };
        let ins = DeltaRuleInputs { log_decay: next(self.decay), beta: next(self.beta), initial_state: next(self.state), cu_seqlens };
        rule(self.op, &x[0], &x[1], &x[2], ins).map(|(o, s)| vec![o, s])
    }
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    h0: Tensor,
}

/// β up to 2, log-decays from −1.1·decay to −0.1·decay.
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

fn cast(x: &[Tensor], d: DType) -> Vec<Tensor> {
    x.iter().map(|x| x.cast(d).unwrap()).collect()
}

/// Outputs and gradients of the kernel in f64 and in f32 against the reference in f64, from the same numbers.
fn against_the_reference(form: Form, c: &Case, words: &str) {
    let x = cast(&form.leaves(c), DType::F32);
    let exact = cast(&x, DType::F64);
    let want = whole(|v| form.run(reference::delta_rule, v, None), &exact, upstream);
    for (x, bound) in [(exact, 1e-9), (x, 1e-5)] {
        let got = whole(|v| form.run(delta_rule, v, None), &x, upstream);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let e = ratio(got, want);
            assert!(e <= bound, "{words} {} {form:?} result {i}: {e:e} > {bound:e}", x[0].dtype());
        }
    }
}

#[test]
fn chunkwise_is_recurrent_in_both_directions() {
    for t in [1, 63, 64, 65, 75, 500, 1000, 2048] {
        let (hk, hv, dk, dv) = if t > 100 { (1, 1, 16, 8) } else { (2, 4, 12, 20) };
        for decay in [1e-4, 1.0, 18.0] {
            let c = case(1, t, hk, hv, dk, dv, decay);
            for m in FAMILY.into_iter().filter(|m| m.1 || decay == 1.0) {
                against_the_reference(member(m), &c, &format!("T {t} decay {decay}"));
            }
        }
    }
}

/// The norm's slope at a zero key is 1000, so that such keys are kept apart from the others, whose errors they would hide.
#[test]
fn zero_keys_write_nothing_and_have_finite_gradients() {
    let t = 75;
    let c = case(1, t, 1, 2, 12, 20, 1.0);
    let some: Vec<f64> = (0..t).map(|i| if i % 3 == 1 || i > 40 { 0.0 } else { 1.0 }).collect();
    for (m, mask) in FAMILY.into_iter().flat_map(|m| [(m, some.clone()), (m, vec![0.0; t])]) {
        let k = c.k.mul(&Tensor::from_vec(mask, &[1, t, 1, 1]).unwrap()).unwrap();
        let c = Case { k, q: c.q.clone(), v: c.v.clone(), g: c.g.clone(), beta: c.beta.clone(), h0: c.h0.clone() };
        against_the_reference(member(m), &c, "zero keys");
        let f = member(m);
        for d in [DType::BF16, DType::F16] {
            let x: Vec<Tensor> =
                f.leaves(&c).iter().enumerate().map(|(i, x)| x.cast(if f.wide().contains(&i) { DType::F32 } else { d }).unwrap()).collect();
            for y in whole(|v| f.run(delta_rule, v, None), &x, upstream) {
                assert!(y.to_vec::<f32>().unwrap().iter().all(|x| x.is_finite()), "{d} {m:?}");
            }
        }
    }
    // the norm bends within 1e-3 of zero: the step is small against that
    let c = case(1, 5, 1, 1, 3, 2, 0.5);
    let k = c.k.mul(&Tensor::from_vec([1.0, 0.0, 1.0, 0.0, 1.0], &[1, 5, 1, 1]).unwrap()).unwrap();
    let x = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), initial_state: Some(&c.h0), cu_seqlens: None };
    let f = |v: &[Tensor]| delta_rule(DeltaRule::gated_delta_net(), &c.q, &v[0], &c.v, x).map(|(o, h)| vec![o, h]);
    gradcheck(f, &[k], 1e-7).unwrap().within(1e-6).unwrap();
}

#[test]
fn f32_keeps_its_digits_after_a_strong_decay() {
    let t = 75;
    let weak_after_strong = |i: usize| if i % 32 < 16 { -20.0 } else { -0.01 };
    let one_reset = |i: usize| if i % 32 == 1 { f64::NEG_INFINITY } else { -0.1 };
    let decays: [&dyn Fn(usize) -> f64; 5] = [&weak_after_strong, &one_reset, &|_| -20.0, &|_| -1e-4, &|_| -1.0];
    for (i, decay) in decays.into_iter().enumerate() {
        let g = Tensor::from_vec((0..2 * t).map(|i| decay(i / 2)).collect::<Vec<f64>>(), &[1, t, 2]).unwrap();
        let c = Case { g, ..case(1, t, 1, 2, 24, 20, 1.0) };
        for m in FAMILY.into_iter().filter(|m| m.1) {
            let x = cast(&member(m).leaves(&c), DType::F32);
            let run = |x: &[Tensor]| whole(|v| member(m).run(delta_rule, v, None), x, upstream);
            for (j, (a, b)) in run(&x).iter().zip(&run(&cast(&x, DType::F64))).enumerate() {
                assert!(ratio(a, b) <= 1e-5, "decay {i}, {m:?}, result {j}: {:e}", ratio(a, b));
            }
            if i != 1 {
                against_the_reference(member(m), &c, &format!("decay {i}"));
            }
        }
    }
}

#[test]
fn gradients_of_the_whole_family() {
    for (t, hk, hv, dk, dv, decay) in [(3, 1, 2, 3, 2, 0.5), (70, 1, 1, 3, 2, 0.05), (66, 1, 1, 2, 3, 8.0)] {
        let c = case(1, t, hk, hv, dk, dv, decay);
        // without the norm keys are kept short: the recurrence itself is unstable for β |k|² > 2
        let short = Case { k: c.k.affine(0.4, 0.0).unwrap(), ..case(1, t, hk, hv, dk, dv, decay) };
        for m in FAMILY {
            for (qk_l2norm, c) in [(true, &c), (false, &short)] {
                let form = Form { op: DeltaRule { qk_l2norm, ..member(m).op }, ..member(m) };
                check(|v| form.run(delta_rule, v, None), &form.leaves(c));
            }
        }
    }
    let c = case(2, 35, 1, 2, 3, 2, 0.3);
    for m in FAMILY {
        let all = member(m);
        let scaled = Form { op: DeltaRule { scale: Some(0.7), ..all.op }, ..all };
        for form in [scaled, Form { beta: false, ..all }, Form { state: false, ..all }, Form { beta: false, state: false, ..all }] {
            check(|v| form.run(delta_rule, v, None), &form.leaves(&c));
            check(|v| Ok(vec![form.run(delta_rule, v, None)?.remove(0)]), &form.leaves(&c));
            check(|v| Ok(vec![form.run(delta_rule, v, None)?.remove(1)]), &form.leaves(&c));
        }
        // packed, each document from its own state
        let cu = Tensor::from_vec([0i64, 3, 3, 35], &[4]).unwrap();
        let c = Case { h0: randn(&[3, 2, 3, 2], 9), ..case(1, 35, 1, 2, 3, 2, 0.3) };
        for form in [all, Form { state: false, ..all }] {
            check(|v| form.run(delta_rule, v, Some(&cu)), &form.leaves(&c));
        }
    }
}

#[test]
fn packed_documents_equal_separate_ones_to_the_bit() {
    let bounds = [0, 1, 64, 64, 128, 193, 323];
    let (t, n) = (323, bounds.len() - 1);
    let cu = Tensor::from_vec(bounds.map(|b| b as i32), &[n + 1]).unwrap();
    for (hk, hv) in [(2, 2), (1, 3)] {
        let c = Case { h0: randn(&[n, hv, 8, 12], 9), ..case(1, t, hk, hv, 8, 12, 0.3) };
        for (m, state) in FAMILY.into_iter().flat_map(|m| [(m, true), (m, false)]) {
            let form = Form { state, ..member(m) };
            for d in [DType::F32, DType::BF16, DType::F64] {
                let dtype = |i: usize| if form.wide().contains(&i) { crate::dtypes::sums(d) } else { d };
                let x: Vec<Tensor> = form.leaves(&c).iter().enumerate().map(|(i, x)| x.cast(dtype(i)).unwrap()).collect();
                let dy = [upstream(0, &c.v), upstream(1, &c.h0)];
                let packed = whole(|v| form.run(delta_rule, v, Some(&cu)), &x, |i, _| dy[i].clone());
                // outputs, then gradients: of both, the state is the last
                let is_state = |i: usize| i == 1 || state && i == form.inputs() + 1;
                for (j, w) in bounds.windows(2).enumerate() {
                    let part = |x: &Tensor, state: bool| if state { x.narrow(0, j, 1).unwrap() } else { x.narrow(1, w[0], w[1] - w[0]).unwrap() };
                    let own: Vec<Tensor> = x.iter().enumerate().map(|(i, x)| part(x, is_state(i + 2))).collect();
                    let alone = whole(|v| form.run(delta_rule, v, None), &own, |i, _| part(&dy[i], i == 1));
                    for (i, (alone, packed)) in alone.iter().zip(&packed).enumerate() {
                        assert_eq!(bits(alone), bits(&part(packed, is_state(i))), "{form:?} {d} document {w:?} result {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn narrow_types_stay_within_the_fields_bounds() {
    for d in [60, 64, 100, 128] {
        for m in FAMILY {
            for state in [true, false] {
                let form = Form { state, ..member(m) };
                let leaves = form.leaves(&case(1, 130, 1, 2, d, d, 0.2));
                // o and the state; dq, dk, dv; the decay's, β's and the initial state's
                let mut bounds = vec![0.005, 0.005, 0.008, 0.008, 0.008];
                bounds.extend([(form.decay, 0.02), (true, 0.02), (state, 0.008)].into_iter().filter(|b| b.0).map(|b| b.1));
                let name = format!("delta_rule {m:?} D {d}");
                narrow(&name, |v| form.run(delta_rule, v, None), |v| form.run(reference::delta_rule, v, None), &leaves, &form.wide(), &bounds);
            }
        }
    }
}

#[test]
fn views_are_read_in_place() {
    let c = case(2, 70, 2, 4, 32, 24, 0.2);
    let x = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), ..Default::default() };
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| bits(&delta_rule(DeltaRule::gated_delta_net(), q, k, v, x).unwrap().0);
    assert_eq!(run(&strided(&c.q), &strided(&c.k), &strided(&c.v)), run(&c.q, &c.k, &c.v));
}

#[test]
fn stepping_is_the_whole_and_thread_counts_do_not_matter() {
    let c = case(1, 70, 1, 2, 8, 8, 0.3);
    let op = DeltaRule::gated_delta_net();
    let all = DeltaRuleInputs { log_decay: Some(&c.g), beta: Some(&c.beta), ..Default::default() };
    let (o, h) = delta_rule(op, &c.q, &c.k, &c.v, all).unwrap();
    let mut s = c.h0.affine(0.0, 0.0).unwrap();
    for t in 0..70 {
        let at = |x: &Tensor| x.narrow(1, t, 1).unwrap();
        let x = DeltaRuleInputs { log_decay: Some(&at(&c.g)), beta: Some(&at(&c.beta)), initial_state: Some(&s), cu_seqlens: None };
        let (ot, st) = delta_rule_step(op, &at(&c.q), &at(&c.k), &at(&c.v), x).unwrap();
        close(&ot, &at(&o), 1e-10);
        s = st;
    }
    close(&s, &h, 1e-10);
    let on = |threads: usize| -> Vec<Vec<u64>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let form = member((true, true));
        pool.install(|| whole(|v| form.run(delta_rule, v, None), &form.leaves(&c), upstream).iter().map(bits).collect())
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn bad_arguments_are_named() {
    let c = case(1, 4, 2, 2, 4, 3, 0.3);
    let op = DeltaRule::gated_delta_net();
    let none = DeltaRuleInputs::default();
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| delta_rule(op, q, k, v, none);
    let f32 = |x: &Tensor| x.cast(DType::F32).unwrap();
    fails(run(&randn(&[4, 2, 4], 1), &c.k, &c.v), "delta_rule: q must have shape [B, T, H, D], found [4, 2, 4]");
    fails(run(&c.q, &randn(&[1, 4, 2, 5], 1), &c.v), "delta_rule: k must have shape [1, 4, 2, 4] as q, found [1, 4, 2, 5]");
    fails(run(&c.q, &c.k, &randn(&[1, 4, 3, 3], 1)), "delta_rule: v must have shape [1, 4, a multiple of 2 heads, Dv], found [1, 4, 3, 3]");
    fails(run(&c.q, &c.k, &randn(&[1, 5, 2, 3], 1)), "delta_rule: v must have shape [1, 4, a multiple of 2 heads, Dv], found [1, 5, 2, 3]");
    fails(run(&c.q, &c.k, &f32(&c.v)), "delta_rule: v must be a float dtype, the same for q, k and v, found f32");
    fails(run(&c.q, &c.k, &c.v.narrow(2, 0, 0).unwrap()), "delta_rule: v must have shape [1, 4, a multiple of 2 heads, Dv], found [1, 4, 0, 3]");
    let (no_heads, no_width) = (c.q.narrow(2, 0, 0).unwrap(), c.q.narrow(3, 0, 0).unwrap());
    fails(run(&no_heads, &no_heads, &c.v), "delta_rule: q must have shape [B, T, H > 0, D > 0], found [1, 4, 0, 4]");
    fails(run(&no_width, &no_width, &c.v), "delta_rule: q must have shape [B, T, H > 0, D > 0], found [1, 4, 2, 0]");

    let with = |x: DeltaRuleInputs| delta_rule(op, &c.q, &c.k, &c.v, x);
    let bad = randn(&[1, 3, 2], 1);
    fails(with(DeltaRuleInputs { beta: Some(&bad), ..none }), "delta_rule: beta must have shape [1, 4, 2], found [1, 3, 2]");
    fails(with(DeltaRuleInputs { log_decay: Some(&bad), ..none }), "delta_rule: log_decay must have shape [1, 4, 2], found [1, 3, 2]");
    fails(with(DeltaRuleInputs { log_decay: Some(&f32(&c.g)), ..none }), "delta_rule: log_decay must be f64, found f32");
    fails(with(DeltaRuleInputs { beta: Some(&f32(&c.g)), ..none }), "delta_rule: beta must be f64 as the input, or f64, found f32");
    let state = randn(&[1, 2, 3, 4], 1);
    fails(with(DeltaRuleInputs { initial_state: Some(&state), ..none }), "initial_state must be f64[1, 2, 4, 3], found f64[1, 2, 3, 4]");
    let packed = |cu: &Tensor| with(DeltaRuleInputs { cu_seqlens: Some(cu), ..none });
    let cu = |v: &[i32]| Tensor::from_vec(v, &[v.len()]).unwrap();
    fails(packed(&randn(&[2], 1)), "delta_rule: cu_seqlens must be i32 or i64, found f64");
    fails(packed(&cu(&[4])), "delta_rule: cu_seqlens must have shape [documents + 1], found [1]");
    for bad in [&[0, 3][..], &[1, 4], &[0, 3, 2, 4], &[-1, 4]] {
        fails(packed(&cu(bad)), &format!("delta_rule: cu_seqlens must rise from 0 to the packed length 4, found {bad:?}"));
    }
    let two = case(2, 4, 2, 2, 4, 3, 0.3);
    let x = DeltaRuleInputs { cu_seqlens: Some(&cu(&[0, 4])), ..none };
    fails(delta_rule(op, &two.q, &two.k, &two.v, x), "delta_rule: cu_seqlens needs batch 1 (all documents packed into one row), found batch 2");

    let one = |x: &Tensor| x.narrow(1, 0, 1).unwrap();
    let step = |q: &Tensor, x| delta_rule_step(op, q, &one(&c.k), &one(&c.v), x);
    fails(step(&c.q, none), "delta_rule_step: q must have shape [B, 1, H, D]: one token, found [1, 4, 2, 4]");
    fails(step(&one(&c.q), none), "delta_rule_step: needs the state to go on from");
    let state = DeltaRuleInputs { initial_state: Some(&c.h0), ..none };
    assert!(matches!(step(&one(&c.q).requires_grad(), state), Err(Error::NoGrad { .. })));
    let empty = c.q.narrow(1, 0, 0).unwrap();
    assert_eq!(run(&empty, &empty, &empty).unwrap().0.shape(), [1, 0, 2, 4]);
}
