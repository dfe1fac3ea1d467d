//! Kernels against the definition, gradients against central differences, promises about determinism and errors.

use super::{reference::Sizes, *};
use crate::testing::{bits, fails, narrow};
use engine::{DType, Device, gradcheck};

/// One way of calling the op.
#[derive(Clone, Debug)]
struct Case {
    n: Sizes,
    a: Attention,
    cu: Option<Vec<usize>>,
    gate: Option<(Gate, bool)>,
}

/// Every gate: what its logits go through, added or multiplied, for each head or each element.
const GATES: usize = 16;

fn gate(i: usize) -> Option<(Gate, bool)> {
    let activation = [Activation::Sigmoid, Activation::Silu, Activation::NsSigmoid, Activation::Identity][i / 4];
    Some((Gate { activation, additive: i % 4 / 2 == 1 }, i.is_multiple_of(2)))
}

fn sizes(b: usize, [t, s]: [usize; 2], [h, hkv]: [usize; 2], [d, dv]: [usize; 2]) -> Sizes {
    Sizes { b, t, s, h, hkv, d, dv }
}

fn causal(window: Option<usize>) -> Attention {
    Attention { causal: true, window, scale: None }
}

fn full(window: Option<usize>) -> Attention {
    Attention { causal: false, window, scale: Some(0.3) }
}

impl Case {
    fn new(n: Sizes, a: Attention, gate: Option<(Gate, bool)>) -> Case {
        Case { n, a, cu: None, gate }
    }

    /// q, k, v and perhaps the gate; the scores' spread is that of trained models.
    fn leaves(&self, dtype: DType) -> Vec<Tensor> {
        let n = &self.n;
        let make = |shape: &[usize], stream| Tensor::randn(shape, dtype, &Device::cpu(), 7, stream).unwrap();
        let mut x = vec![make(&[n.b, n.t, n.h, n.d], 0), make(&[n.b, n.s, n.hkv, n.d], 1), make(&[n.b, n.s, n.hkv, n.dv], 2)];
        match self.gate {
            Some((_, true)) => x.push(make(&[n.b, n.t, n.h, n.dv], 3)),
            Some((_, false)) => x.push(make(&[n.b, n.t, n.h], 3)),
            None => {}
        }
        x
    }

    fn cu(&self) -> Option<Tensor> {
        self.cu.as_ref().map(|c| Tensor::from_vec(c.iter().map(|x| *x as i32).collect::<Vec<_>>(), &[c.len()]).unwrap())
    }

    fn run(&self, x: &[Tensor]) -> Result<Tensor> {
        gated_sdpa(&x[0], &x[1], &x[2], self.gate.map(|g| (&x[3], g.0)), self.cu().as_ref(), self.a)
    }

    fn reference(&self, x: &[Tensor]) -> Vec<f64> {
        let x: Vec<Vec<f64>> = x.iter().map(|x| x.cast(DType::F64).unwrap().to_vec().unwrap()).collect();
        let gate = self.gate.map(|g| (&x[3][..], g.0));
        reference::gated_sdpa(&self.n, &self.a, self.cu.as_deref(), &x[0], &x[1], &x[2], gate)
    }

    /// The output and the gradients of all leaves.
    fn both(&self, x: &[Tensor]) -> Vec<Tensor> {
        let x: Vec<Tensor> = x.iter().map(|x| x.detach().requires_grad()).collect();
        let y = self.run(&x).unwrap();
        let dy = Tensor::randn(y.shape(), DType::F64, &Device::cpu(), 8, 0).unwrap().cast(y.dtype()).unwrap();
        let grads = y.backward_with(&dy).unwrap();
        let mut out = vec![y.detach()];
        out.extend(x.iter().map(|x| grads.get(x).unwrap().clone()));
        out
    }
}

fn ratio(x: &Tensor, want: &[f64]) -> f64 {
    let x: Vec<f64> = x.cast(DType::F64).unwrap().to_vec().unwrap();
    assert_eq!(x.len(), want.len());
    let (mut diff, mut base) = (0.0, 0.0);
    for (x, w) in x.iter().zip(want) {
        assert!(x.is_finite());
        diff += (x - w) * (x - w);
        base += w * w;
    }
    (diff / base).sqrt()
}

/// Small ragged shapes, every attribute.
fn small() -> Vec<Case> {
    let mut cases: Vec<Case> = (0..GATES).map(|i| Case::new(sizes(2, [5, 7], [4, 2], [3, 5]), causal(None), gate(i))).collect();
    cases.push(Case::new(sizes(1, [7, 7], [3, 1], [4, 4]), full(None), gate(0)));
    cases.push(Case::new(sizes(1, [6, 9], [2, 2], [3, 2]), causal(Some(3)), gate(0)));
    cases.push(Case::new(sizes(1, [6, 9], [2, 1], [3, 2]), full(Some(2)), gate(1)));
    cases.push(Case::new(sizes(1, [1, 9], [4, 2], [5, 3]), causal(None), gate(0)));
    cases.push(Case::new(sizes(2, [4, 4], [2, 2], [3, 3]), causal(None), None));
    for a in [causal(None), causal(Some(3)), full(None)] {
        cases.push(Case { cu: Some(vec![0, 3, 3, 8, 9]), ..Case::new(sizes(1, [9, 9], [2, 1], [3, 3]), a, gate(0)) });
    }
    cases
}

/// Shapes of several tiles.
fn large() -> Vec<Case> {
    let mut cases: Vec<Case> = (0..GATES).map(|i| Case::new(sizes(1, [130, 150], [4, 2], [24, 40]), causal(None), gate(i))).collect();
    cases.push(Case::new(sizes(2, [200, 200], [2, 2], [16, 16]), full(None), gate(0)));
    cases.push(Case::new(sizes(1, [300, 333], [6, 1], [32, 16]), causal(Some(70)), gate(0)));
    cases.push(Case::new(sizes(1, [300, 300], [1, 1], [17, 33]), full(Some(20)), gate(0)));
    cases.push(Case::new(sizes(1, [3, 700], [2, 1], [32, 32]), causal(None), gate(0)));
    cases.push(Case::new(sizes(1, [1, 1000], [8, 2], [32, 32]), causal(None), None));
    cases.push(Case::new(sizes(1, [5, 600], [2, 2], [16, 16]), full(Some(100)), gate(1)));
    cases.push(Case::new(sizes(2, [2, 1300], [6, 2], [40, 72]), causal(Some(1100)), gate(0)));
    cases.push(Case::new(sizes(1, [90, 90], [80, 1], [16, 16]), causal(None), gate(1)));
    for a in [causal(None), causal(Some(33)), full(None)] {
        cases.push(Case { cu: Some(vec![0, 1, 70, 70, 200, 290]), ..Case::new(sizes(1, [290, 290], [4, 2], [16, 24]), a, gate(0)) });
    }
    cases
}

#[test]
fn gradients_match_central_differences() {
    for c in small() {
        let report = gradcheck(|x| Ok(vec![c.run(x)?]), &c.leaves(DType::F64), 1e-5).unwrap();
        report.within(1e-7).unwrap_or_else(|e| panic!("{c:?}: {e}"));
    }
}

#[test]
fn outputs_match_the_definition() {
    for c in small().into_iter().chain(large()) {
        let x = c.leaves(DType::F64);
        assert!(ratio(&c.run(&x).unwrap(), &c.reference(&x)) < 1e-12, "{c:?} f64");
        let x = c.leaves(DType::F32);
        let error = ratio(&c.run(&x).unwrap(), &c.reference(&x));
        assert!(error < 1e-5, "{c:?} f32: {error:e}");
    }
}

#[test]
fn large_gradients_match_central_differences_along_a_direction() {
    for c in large() {
        let x = c.leaves(DType::F64);
        let got = c.both(&x);
        let dy: Vec<f64> = Tensor::randn(got[0].shape(), DType::F64, &Device::cpu(), 8, 0).unwrap().to_vec().unwrap();
        for i in 0..x.len() {
            let step = Tensor::randn(x[i].shape(), DType::F64, &Device::cpu(), 9, i as u64).unwrap();
            let at = |eps: f64| -> f64 {
                let mut x = x.clone();
                let moved: Vec<f64> = x[i].to_vec::<f64>().unwrap().iter().zip(step.to_vec::<f64>().unwrap()).map(|(x, d)| x + eps * d).collect();
                x[i] = Tensor::from_vec(moved, x[i].shape()).unwrap();
                c.reference(&x).iter().zip(&dy).map(|(y, d)| y * d).sum()
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            let auto: f64 = got[i + 1].to_vec::<f64>().unwrap().iter().zip(step.to_vec::<f64>().unwrap()).map(|(g, d)| g * d).sum();
            assert!((numeric - auto).abs() <= 1e-6 * numeric.abs().max(1.0), "{c:?} leaf {i}: {auto} for {numeric}");
        }
    }
}

#[test]
fn narrow_types_stay_within_the_fields_bounds() {
    for c in large() {
        let composed = |x: &[Tensor]| {
            let cu = c.cu().map(|cu| cu.cast(DType::I64)).transpose()?;
            Ok(vec![reference::composed(&x[0], &x[1], &x[2], c.gate.map(|g| (&x[3], g.0)), cu.as_ref(), c.a)?])
        };
        // a head-wise gate's gradient is judged like the decay's of the delta rule: a sum over Dv of products with the rounded u
        let mut bounds = vec![0.005, 0.008, 0.008, 0.008];
        bounds.extend(c.gate.map(|(_, elementwise)| if elementwise { 0.008 } else { 0.02 }));
        narrow(&format!("{c:?}"), |x| Ok(vec![c.run(x)?]), composed, &c.leaves(DType::F64), &[], &bounds);
    }
}

#[test]
fn views_of_one_projection_are_read_in_place() {
    let c = Case::new(sizes(2, [70, 70], [4, 2], [16, 16]), causal(None), gate(0));
    let x = c.leaves(DType::F32);
    // q and gate lie side by side per head, k and v one after the other
    let qg = Tensor::randn(&[2, 70, 4, 32], DType::F32, &Device::cpu(), 1, 0).unwrap();
    let kv = Tensor::randn(&[2, 70, 4, 16], DType::F32, &Device::cpu(), 1, 1).unwrap();
    let views = [qg.narrow(3, 0, 16).unwrap(), kv.narrow(2, 0, 2).unwrap(), kv.narrow(2, 2, 2).unwrap(), qg.narrow(3, 16, 16).unwrap()];
    let dense: Vec<Tensor> = views.iter().map(|x| x.contiguous().unwrap()).collect();
    assert_eq!(views[0].shape(), x[0].shape());
    for (a, b) in c.both(&views).iter().zip(c.both(&dense)) {
        assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap());
    }
}

/// As in a cache with room for more, and as in one projection.
#[test]
fn a_few_queries_read_keys_where_they_lie() {
    let c = Case::new(sizes(1, [1, 130], [4, 2], [16, 16]), causal(None), None);
    let x = c.leaves(DType::F32);
    let kv = Tensor::randn(&[1, 150, 4, 16], DType::F32, &Device::cpu(), 1, 1).unwrap().narrow(1, 20, 130).unwrap();
    let views = [x[0].clone(), kv.narrow(2, 0, 2).unwrap(), kv.narrow(2, 2, 2).unwrap()];
    let dense: Vec<Tensor> = views.iter().map(|x| x.contiguous().unwrap()).collect();
    assert_eq!(c.run(&views).unwrap().to_vec::<f32>().unwrap(), c.run(&dense).unwrap().to_vec::<f32>().unwrap());
}

#[test]
fn one_thread_gives_the_same_bits_as_many() {
    let on = |threads: usize, c: &Case| -> Vec<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| c.both(&c.leaves(DType::F32)).iter().map(|x| x.to_vec().unwrap()).collect())
    };
    for c in large() {
        assert_eq!(on(1, &c), on(5, &c), "{c:?}");
    }
}

#[test]
fn packed_documents_equal_separate_ones_to_the_bit() {
    let cu = vec![0, 1, 64, 64, 128, 193, 323, 340, 1000];
    let t = *cu.last().unwrap();
    let mut cases: Vec<Case> = (0..GATES).map(|i| Case::new(sizes(1, [t, t], [4, 2], [16, 24]), causal(None), gate(i))).collect();
    for a in [causal(Some(70)), full(None), full(Some(20))] {
        cases.push(Case::new(sizes(1, [t, t], [6, 2], [20, 16]), a, gate(0)));
    }
    cases.push(Case::new(sizes(1, [t, t], [1, 1], [16, 16]), causal(None), None));
    for c in cases {
        for dtype in [DType::F32, DType::BF16] {
            let x = c.leaves(dtype);
            let packed = Case { cu: Some(cu.clone()), ..c.clone() }.both(&x);
            for w in cu.windows(2) {
                let cut = |x: &Tensor| x.narrow(1, w[0], w[1] - w[0]).unwrap();
                let x: Vec<Tensor> = x.iter().map(|x| cut(x).requires_grad()).collect();
                let y = c.run(&x).unwrap();
                let dy = Tensor::randn(packed[0].shape(), DType::F64, &Device::cpu(), 8, 0).unwrap().cast(dtype).unwrap();
                let grads = y.backward_with(&cut(&dy).contiguous().unwrap()).unwrap();
                let alone = std::iter::once(&y).chain(x.iter().map(|x| grads.get(x).unwrap()));
                for (i, (alone, packed)) in alone.zip(&packed).enumerate() {
                    assert!(bits(alone) == bits(&cut(packed)), "{c:?} {dtype} document {w:?} result {i}");
                }
            }
        }
    }
}

#[test]
fn closed_gates_and_huge_scores_stay_finite() {
    let c = Case::new(sizes(1, [80, 80], [2, 1], [8, 8]), causal(None), gate(0));
    let mut x = c.leaves(DType::F32);
    x[0] = x[0].mul(&Tensor::full(1e4, &[1], DType::F32, &Device::cpu()).unwrap()).unwrap();
    x[3] = Tensor::full(-200.0, x[3].shape(), DType::F32, &Device::cpu()).unwrap();
    for y in c.both(&x) {
        assert!(y.to_vec::<f32>().unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn patterns_match_the_definition() {
    for c in small().into_iter().chain(large()) {
        let x = c.leaves(DType::F32);
        let wide: Vec<Vec<f64>> = x.iter().map(|x| x.cast(DType::F64).unwrap().to_vec().unwrap()).collect();
        let p = attention_pattern(&x[0], &x[1], c.cu().as_ref(), c.a).unwrap();
        assert_eq!(p.shape(), [c.n.b, c.n.h, c.n.t, c.n.s]);
        assert!(ratio(&p, &reference::pattern(&c.n, &c.a, c.cu.as_deref(), &wide[0], &wide[1])) < 1e-5, "{c:?}");
    }
}

#[test]
fn empty_inputs_give_empty_outputs() {
    for n in [sizes(0, [4, 4], [2, 1], [3, 3]), sizes(1, [0, 4], [2, 1], [3, 3]), sizes(1, [0, 0], [2, 1], [3, 3])] {
        let c = Case::new(n, causal(None), gate(0));
        let y = c.both(&c.leaves(DType::F32));
        assert_eq!(y[0].numel(), 0);
        assert!(y[2].to_vec::<f32>().unwrap().iter().all(|x| *x == 0.0));
    }
}

#[test]
fn bad_inputs_are_named() {
    let x = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::cpu()).unwrap();
    let i = |v: &[i32]| Tensor::from_vec(v, &[v.len()]).unwrap();
    let (q, k) = (x(&[1, 4, 4, 8]), x(&[1, 4, 2, 8]));
    let (wide, a) = (k.cast(DType::F64).unwrap(), Attention::default());
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| gated_sdpa(q, k, v, None, None, a);
    fails(run(&x(&[4, 4, 8]), &k, &k), "gated_sdpa: q must have shape [B, T, H, D], found [4, 4, 8]");
    fails(run(&q.cast(DType::I64).unwrap(), &k, &k), "gated_sdpa: q must be a float type, found i64");
    for shape in [[1, 3, 2, 8], [1, 4, 3, 8], [1, 4, 0, 8], [2, 4, 2, 8], [1, 4, 2, 7]] {
        let want = format!("gated_sdpa: k must have shape [1, at least 4, a divisor of 4, 8 > 0], for q [1, 4, 4, 8], found {shape:?}");
        fails(run(&q, &x(&shape), &x(&shape)), &want);
    }
    let no_width = x(&[1, 4, 2, 0]);
    fails(run(&x(&[1, 4, 4, 0]), &no_width, &k), "gated_sdpa: k must have shape [1, at least 4, a divisor of 4, 0 > 0]");
    fails(run(&q, &wide, &k), "gated_sdpa: k must be f32, as q, found f64");
    fails(run(&q, &k, &x(&[4, 2, 8])), "gated_sdpa: v must have shape [1, 4, 2, Dv], found [4, 2, 8]");
    fails(run(&q, &k, &x(&[1, 5, 2, 8])), "gated_sdpa: v must have shape [1, 4, 2, Dv > 0], as k, found [1, 5, 2, 8]");
    fails(run(&q, &k, &no_width), "gated_sdpa: v must have shape [1, 4, 2, Dv > 0], as k, found [1, 4, 2, 0]");
    fails(run(&q, &k, &wide), "gated_sdpa: v must be f32, as q, found f64");

    let gated = |g: &Tensor| gated_sdpa(&q, &k, &k, Some((g, Gate::default())), None, a);
    fails(gated(&x(&[1, 4, 3])), "gated_sdpa: gate must have shape [1, 4, 4] or [1, 4, 4, 8], found [1, 4, 3]");
    fails(gated(&x(&[1, 4, 4]).cast(DType::F64).unwrap()), "gated_sdpa: gate must be f32, as q, found f64");
    let with = |a: Attention| gated_sdpa(&q, &k, &k, None, None, a);
    fails(with(Attention { window: Some(0), ..a }), "gated_sdpa: window must be at least 1 (a query sees itself), found 0");
    fails(with(Attention { scale: Some(f64::NAN), ..a }), "gated_sdpa: scale must be finite, found Some(NaN)");

    let packed = |q: &Tensor, k: &Tensor, cu: &Tensor| gated_sdpa(q, k, k, None, Some(cu), a);
    fails(packed(&q, &k, &x(&[2])), "gated_sdpa: cu_seqlens must be i32 or i64, found f32");
    fails(packed(&q, &k, &i(&[4])), "gated_sdpa: cu_seqlens must have shape [documents + 1], found [1]");
    for cu in [&[0, 3][..], &[1, 4], &[0, 3, 2, 4], &[-1, 4]] {
        fails(packed(&q, &k, &i(cu)), &format!("gated_sdpa: cu_seqlens must rise from 0 to the packed length 4, found {cu:?}"));
    }
    let two = x(&[2, 4, 2, 8]);
    fails(packed(&two, &two, &i(&[0, 4])), "gated_sdpa: cu_seqlens needs batch 1 (all documents packed into one row), found batch 2");
    let longer = x(&[1, 5, 2, 8]);
    fails(packed(&q, &longer, &i(&[0, 4])), "gated_sdpa: packed documents need as many keys as queries, found T = 4, S = 5");

    let pattern = |k: &Tensor, cu: Option<&Tensor>| attention_pattern(&q, k, cu, a);
    fails(pattern(&x(&[1, 4, 2, 7]), None), "attention_pattern: k must have shape");
    fails(pattern(&k, Some(&i(&[0, 5]))), "attention_pattern: cu_seqlens must rise from 0 to the packed length 4, found [0, 5]");
    fails(pattern(&longer, Some(&i(&[0, 4]))), "attention_pattern: packed documents need as many keys as queries, found T = 4, S = 5");
}

/// Shapes that no memory holds, from views of one element, are errors.
#[test]
fn enormous_inputs_are_errors() {
    let one = Tensor::zeros(&[1, 1, 1, 1], DType::F32, &Device::cpu()).unwrap();
    let huge = |shape: &[usize]| one.expand(shape).unwrap();
    let a = Attention::default();
    let wide = huge(&[1, 1, 1, 1 << 50]);
    assert!(gated_sdpa(&wide, &wide, &one, None, None, a).is_err(), "D");
    assert!(gated_sdpa(&one, &one, &wide, None, None, a).is_err(), "Dv");
    let long = huge(&[1, 1 << 50, 1, 1]);
    assert!(gated_sdpa(&long, &long, &long, None, None, a).is_err(), "T");
}
