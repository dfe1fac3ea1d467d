//! The delta rule's CUDA kernels, emulated, against the CPU op in f64 on the same rounded inputs.

use engine::{DType, Device, Tensor};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule, delta_rule_step};

/// The GPU where there is one, else the emulator, unless there is no C++ compiler here.
fn device() -> Option<Device> {
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}"));
    gpu.or_else(|_| cuda::emulator()).map_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")).ok()
}
fn randn(shape: &[usize], stream: u64) -> Tensor {
    Tensor::randn(shape, DType::F64, &Device::cpu(), 11, stream).unwrap()
}
/// RMS(a − b) / RMS(b).
fn ratio(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let (a, b): (Vec<f64>, Vec<f64>) = (a.to_vec().unwrap(), b.to_vec().unwrap());
    let d: f64 = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum();
    let r: f64 = b.iter().map(|y| y * y).sum();
    let e = if d == 0.0 { 0.0 } else { (d / r.max(1e-300)).sqrt() };
    if e.is_nan() { f64::INFINITY } else { e }
}

struct Case {
    op: DeltaRule,
    /// q, k, v, log_decay, beta, initial state.
    x: [Tensor; 6],
    decay: bool,
    beta: bool,
    state: bool,
    /// Whether the final state has a gradient.
    last: bool,
    cu: Option<Tensor>,
    /// q, k and v as views whose rows lie apart, unaligned.
    strided: bool,
    beta_in_f32: bool,
}

/// (B, T, Hk, Hv, Dk, Dv) and the strength of the decay, with everything given.
fn case([b, t, hk, hv, dk, dv]: [usize; 6], decay: f64) -> Case {
    let pos = |s: u64| randn(&[b, t, hv], s).sigmoid().unwrap();
    let g = pos(4).affine(-decay, -decay * 0.1).unwrap();
    let x = [
        randn(&[b, t, hk, dk], 1),
        randn(&[b, t, hk, dk], 2),
        randn(&[b, t, hv, dv], 3),
        g,
        pos(5).affine(1.5, 0.0).unwrap(),
        randn(&[b, hv, dk, dv], 6),
    ];
    Case { op: DeltaRule::gated_delta_net(), x, decay: true, beta: true, state: true, last: true, cu: None, strided: false, beta_in_f32: false }
}
const NAMES: [&str; 8] = ["o", "final state", "dq", "dk", "dv", "dg", "dbeta", "dstate"];

impl Case {
    fn dtypes(&self, d: DType) -> [DType; 6] {
        [d, d, d, DType::F32, if self.beta_in_f32 { DType::F32 } else { d }, DType::F32]
    }
    /// Inputs as `d` holds them.
    fn rounded(&self, d: DType) -> [Tensor; 6] {
        let dtypes = self.dtypes(d);
        std::array::from_fn(|i| self.x[i].cast(dtypes[i]).unwrap())
    }
    /// Outputs and gradients, on the CPU, named by their place in [`NAMES`].
    fn run(&self, x: [Tensor; 6], device: &Device) -> Vec<(usize, Tensor)> {
        let apart = |x: &Tensor| {
            let d = x.dim(3);
            if self.strided { Tensor::cat(&[&x.narrow(3, 0, 1).unwrap(), x, x], 3).unwrap().narrow(3, 1, d).unwrap() } else { x.clone() }
        };
        let v: Vec<Tensor> = x.iter().map(|x| x.to_device(device).unwrap().requires_grad()).collect();
        let cu = self.cu.as_ref().map(|c| c.to_device(device).unwrap());
        let given = |yes: bool, i: usize| yes.then_some(&v[i]);
        let ins = DeltaRuleInputs {
            log_decay: given(self.decay, 3),
            beta: given(self.beta, 4),
            initial_state: given(self.state, 5),
            cu_seqlens: cu.as_ref(),
        };
        let (o, s) = delta_rule(self.op, &apart(&v[0]), &apart(&v[1]), &apart(&v[2]), ins).unwrap();
        let part = |y: &Tensor, stream| {
            let d = if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let w = randn(y.shape(), stream).cast(DType::BF16).unwrap().cast(d).unwrap().to_device(device).unwrap();
            y.cast(d).unwrap().mul(&w).unwrap().sum_all().unwrap()
        };
        let mut loss = part(&o, 21);
        if self.last {
            loss = loss.add(&part(&s, 22)).unwrap();
        }
        let grads = loss.backward().unwrap();
        let here = |t: &Tensor| t.detach().to_device(&Device::cpu()).unwrap();
        let asked = [true, true, true, self.decay, self.beta, self.state];
        let gs = (0..6).filter(|i| asked[*i]).map(|i| (2 + i, here(grads.get(&v[i]).unwrap())));
        [(0, here(&o)), (1, here(&s))].into_iter().chain(gs).collect()
    }
    #[track_caller]
    fn agrees(&self, what: &str, dtypes: &[DType]) {
        let Some(device) = device() else { return };
        for d in dtypes {
            for (i, e) in self.errors(what, *d, &device) {
                let bound = if *d == DType::F32 { 1e-5 } else { [0.005, 0.005, 0.008, 0.008, 0.008, 0.02, 0.02, 0.008][i] };
                assert!(e <= bound, "{what}, {d}, {}: {e:e} > {bound}", NAMES[i]);
            }
        }
    }
    /// Of each output and gradient.
    fn errors(&self, what: &str, d: DType, device: &Device) -> Vec<(usize, f64)> {
        let x = self.rounded(d);
        let want = self.run(x.each_ref().map(|x| x.cast(DType::F64).unwrap()), &Device::cpu());
        let found = self.run(x, device);
        assert_eq!(found.len(), want.len());
        let errors: Vec<(usize, f64)> = found.iter().zip(&want).map(|((i, a), (_, b))| (*i, ratio(a, b))).collect();
        errors.iter().for_each(|(i, e)| println!("{what} {d} {}: {e:.1e}", NAMES[*i]));
        errors
    }
}
const BOTH: [DType; 2] = [DType::F32, DType::BF16];

/// One test at a time: the emulator is shared, and a fault that one test provokes is reported at the next download, whoever makes it.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}

#[test]
fn the_whole_family() {
    let _alone = alone();
    for (erase, decay, qk_l2norm) in [(true, true, true), (true, false, false), (false, true, false), (false, false, true)] {
        let mut c = case([1, 70, 1, 2, 20, 12], 0.3);
        if !qk_l2norm {
            // the recurrence itself is unstable for beta |k|² > 2
            c.x[1] = c.x[1].affine(0.15, 0.0).unwrap();
        }
        (c.op.erase, c.op.qk_l2norm, c.decay) = (erase, qk_l2norm, decay);
        c.agrees(&format!("erase {erase}, decay {decay}, norm {qk_l2norm}"), &BOTH);
    }
}

#[test]
fn head_dims_up_to_256_and_512() {
    let _alone = alone();
    for (dk, dv) in [(60, 100), (128, 192), (192, 36), (256, 256), (200, 400), (64, 512)] {
        case([1, 67, 1, 1, dk, dv], 0.1).agrees(&format!("Dk {dk}, Dv {dv}"), &BOTH);
    }
    let Some(device) = device() else { return };
    for (dk, dv) in [(257, 8), (8, 513)] {
        let wide = case([1, 3, 1, 1, dk, dv], 0.1).x.map(|x| x.cast(DType::F32).unwrap().to_device(&device).unwrap());
        let e = delta_rule(DeltaRule::gated_delta_net(), &wide[0], &wide[1], &wide[2], DeltaRuleInputs::default()).unwrap_err();
        assert!(e.to_string().contains("at most 256 for keys and 512 for values"), "{e}");
    }
}

#[test]
fn plain_calls_of_batches_and_views() {
    let _alone = alone();
    for (t, strided, beta) in [(33, true, false), (130, false, true)] {
        let c = case([2, t, 2, 2, 17, 24], 0.2);
        Case { strided, beta, beta_in_f32: true, state: false, last: false, ..c }.agrees(&format!("T {t}"), &BOTH);
    }
    let mut c = case([1, 40, 2, 2, 32, 32], 0.2);
    c.x[1] = c.x[1].affine(0.15, 0.0).unwrap();
    (c.op.scale, c.op.qk_l2norm, c.last) = (Some(0.7), false, false);
    c.agrees("a scale, one value head a key head", &BOTH);
}

#[test]
fn packed_documents() {
    let _alone = alone();
    for (i, bounds) in [vec![0i32, 0, 9, 74, 74, 75, 150, 150], vec![0, 150]].into_iter().enumerate() {
        let mut c = case([1, 150, 1, 2, 24, 20], 0.3);
        c.x[5] = randn(&[bounds.len() - 1, 2, 24, 20], 9);
        let n = bounds.len();
        let wide: Vec<i64> = bounds.iter().map(|b| i64::from(*b)).collect();
        let cu = if i == 0 { Tensor::from_vec(bounds, &[n]) } else { Tensor::from_vec(wide, &[n]) };
        c.cu = Some(cu.unwrap());
        c.agrees("packed", &BOTH);
    }
    let Some(device) = device() else { return };
    let c = case([1, 20, 1, 1, 8, 8], 0.3);
    let on = |x: &Tensor| x.cast(DType::F32).unwrap().to_device(&device).unwrap();
    for bad in [[0i64, 12, 5, 20], [0, 3, 900, 20], [-4, 3, 9, 20], [0, 3, 9, 19]] {
        let cu = Tensor::from_vec(bad, &[4]).unwrap().to_device(&device).unwrap();
        let ins = DeltaRuleInputs { cu_seqlens: Some(&cu), ..Default::default() };
        let (_, state) = delta_rule(c.op, &on(&c.x[0]), &on(&c.x[1]), &on(&c.x[2]), ins).unwrap();
        let e = state.to_vec::<f32>().unwrap_err();
        assert!(e.to_string().contains("cu_seqlens must rise from 0 to the packed length"), "{e}");
    }
}

/// The four members of the family: (erase, decay).
const FAMILY: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];
/// 11 chunks in f32, 6 in bf16, the last one ragged.
const LONG: usize = 329;

#[test]
fn pieces_of_a_sequence() {
    let _alone = alone();
    for (erase, decay) in FAMILY {
        for (pieces, b, bare) in [(2, 2, false), (3, 1, true), (6, 1, false)] {
            let c = case([b, LONG, 1, 2, 20, 36], 0.05);
            let mut c = Case { decay, state: !bare, last: !bare, ..c };
            (c.op.erase, c.op.pieces) = (erase, Some(pieces));
            // up to 2; less where nothing is forgotten, as so long a sequence in bf16 goes beyond the bounds there, uncut as well (see the next test)
            c.x[4] = c.x[4].affine(if decay { 2.0 } else { 0.7 } / 1.5, 0.0).unwrap();
            c.agrees(&format!("{pieces} pieces, erase {erase}, decay {decay}"), &BOTH);
        }
    }
}

/// What is never forgotten, with β up to 2, reaches the last piece through all maps; the first piece's gradients, through all of theirs.
#[test]
fn pieces_cost_no_digits() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let mut c = case([1, LONG, 1, 1, 24, 20], 1.0);
    c.decay = false;
    c.x[4] = c.x[4].affine(2.0 / 1.5, 0.0).unwrap();
    let mut errors = |pieces, d| {
        c.op.pieces = Some(pieces);
        c.errors(&format!("{pieces} pieces, β up to 2"), d, &device)
    };
    for ((i, whole), (_, cut)) in errors(1, DType::BF16).into_iter().zip(errors(3, DType::BF16)) {
        assert!(cut <= 1.25 * whole && whole < 0.02, "{}: {whole:e} uncut, {cut:e} cut", NAMES[i]);
    }
    assert!(errors(4, DType::F32).into_iter().all(|(_, e)| e <= 1e-5));
}

#[test]
fn pieces_of_wide_heads() {
    let _alone = alone();
    for (dk, dv, erase) in [(64, 64, true), (128, 100, true), (192, 72, true), (200, 8, false), (256, 130, true), (192, 384, true)] {
        let mut c = case([1, 4 * 64 + 1, 1, 1, dk, dv], 0.1);
        (c.op.erase, c.op.pieces) = (erase, Some(4));
        c.agrees(&format!("4 pieces, Dk {dk}, Dv {dv}"), &BOTH);
    }
}

#[test]
fn pieces_under_decays_of_every_strength() {
    let _alone = alone();
    let always = |_: usize| -20.0;
    let at_times = |i: usize| if i % 50 < 2 { -20.0 } else { -1e-3 };
    let one_reset = |i: usize| if i == 130 { f64::NEG_INFINITY } else { -0.02 };
    let decays: [&dyn Fn(usize) -> f64; 4] = [&always, &at_times, &one_reset, &|_| -1e-5];
    for (i, decay) in decays.into_iter().enumerate() {
        for erase in [true, false] {
            let mut c = case([1, LONG, 1, 1, 24, 20], 1.0);
            c.x[3] = Tensor::from_vec((0..LONG).map(decay).collect::<Vec<f64>>(), &[1, LONG, 1]).unwrap();
            (c.op.erase, c.op.pieces) = (erase, Some(5));
            c.agrees(&format!("5 pieces, decay {i}, erase {erase}"), &[DType::F32]);
        }
    }
}

#[test]
fn pieces_of_packed_documents() {
    let _alone = alone();
    let many = vec![0i32, 0, 1, 1, 300, 301, 365, 365, 600, 600];
    for (bounds, pieces) in [(many.clone(), 2), (many, 9), (vec![0, 600], 3), (vec![0, 0, 590, 600], 4), (vec![0, 200, 400, 600], 5)] {
        for erase in [true, false] {
            let n = bounds.len();
            let mut c = case([1, 600, 1, 2, 24, 20], 0.05);
            (c.op.erase, c.op.pieces) = (erase, Some(pieces));
            c.x[5] = randn(&[n - 1, 2, 24, 20], 9);
            c.cu = Some(Tensor::from_vec(bounds.clone(), &[n]).unwrap());
            c.agrees(&format!("{} documents, {pieces} pieces, erase {erase}", n - 1), &BOTH);
        }
    }
    // bounds that ask for more chunks and pieces than there is room for
    let Some(device) = device() else { return };
    let mut c = case([1, 200, 1, 1, 8, 8], 0.3);
    c.op.pieces = Some(6);
    let on = |x: &Tensor| x.cast(DType::F32).unwrap().to_device(&device).unwrap();
    for bad in [[0i64, 200, 0, 200, 0, 200], [0, 3, 900, 0, 900, 200], [-4, 3, 9, 20, 0, 200]] {
        let cu = Tensor::from_vec(bad, &[6]).unwrap().to_device(&device).unwrap();
        let ins = DeltaRuleInputs { cu_seqlens: Some(&cu), ..Default::default() };
        let (_, state) = delta_rule(c.op, &on(&c.x[0]), &on(&c.x[1]), &on(&c.x[2]), ins).unwrap();
        assert!(state.to_vec::<f32>().unwrap_err().to_string().contains("cu_seqlens must rise"));
    }
}

#[test]
fn the_number_of_pieces() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let bits = |t: usize, pieces: Option<usize>| {
        let mut c = case([1, t, 1, 1, 16, 16], 0.02);
        c.op.pieces = pieces;
        c.run(c.rounded(DType::F32), &device).into_iter().flat_map(|(_, x)| x.to_vec::<f64>().unwrap()).collect::<Vec<_>>()
    };
    // the emulator has 4 processors: 8 blocks side by side, but 48 chunks are no more than 3 pieces; with 2 the second would begin with the first's own state
    let chosen = bits(48 * 32, None);
    assert_eq!(chosen, bits(48 * 32, None));
    assert_eq!(chosen, bits(48 * 32, Some(3)));
    assert_ne!(chosen, bits(48 * 32, Some(1)), "a cut rounds in another order");
    assert_eq!(bits(31 * 32, None), bits(31 * 32, Some(1)), "a short sequence stays whole");
    assert_eq!(bits(70, Some(3)), bits(70, Some(99)), "no more pieces than chunks");
    let mut none = case([1, 8, 1, 1, 8, 8], 0.1);
    none.op.pieces = Some(0);
    let e = delta_rule(none.op, &none.x[0], &none.x[1], &none.x[2], DeltaRuleInputs::default()).unwrap_err();
    assert!(e.to_string().contains("at least 1"), "{e}");
}

#[test]
fn f32_keeps_its_digits_after_a_strong_decay() {
    let _alone = alone();
    let t = 75;
    let weak_after_strong = |i: usize| if i % 32 < 16 { -20.0 } else { -0.01 };
    let one_reset = |i: usize| if i % 32 == 1 { f64::NEG_INFINITY } else { -0.1 };
    let decays: [&dyn Fn(usize) -> f64; 3] = [&weak_after_strong, &one_reset, &|_| -1e-4];
    for (i, decay) in decays.into_iter().enumerate() {
        for erase in [true, false] {
            let mut c = case([1, t, 1, 1, 24, 20], 1.0);
            c.x[3] = Tensor::from_vec((0..t).map(decay).collect::<Vec<f64>>(), &[1, t, 1]).unwrap();
            c.op.erase = erase;
            c.agrees(&format!("decay {i}, erase {erase}"), &[DType::F32]);
        }
    }
}

#[test]
fn a_zero_key_has_a_gradient_through_its_norm() {
    let _alone = alone();
    let mut c = case([1, 5, 1, 1, 8, 4], 0.5);
    let keep = Tensor::from_vec([1.0, 0.0, 1.0, 0.0, 1.0], &[1, 5, 1, 1]).unwrap();
    c.x[0] = c.x[0].mul(&keep).unwrap();
    c.x[1] = c.x[1].mul(&keep).unwrap();
    c.agrees("zero keys", &BOTH);
}

#[test]
fn one_token_and_none() {
    let _alone = alone();
    let Some(device) = device() else { return };
    for (dk, dv, erase) in [(24, 40, true), (100, 33, false), (192, 8, true), (256, 64, true), (200, 400, true)] {
        let mut c = case([2, 1, 1, 2, dk, dv], 0.4);
        c.op.erase = erase;
        c.agrees(&format!("a step, Dk {dk}"), &BOTH);
        let x = c.rounded(DType::BF16);
        let step = |d: &Device, wide: bool| {
            let x = x.each_ref().map(|x| if wide { x.cast(DType::F64).unwrap() } else { x.clone() }.to_device(d).unwrap());
            let ins = DeltaRuleInputs { log_decay: Some(&x[3]), beta: Some(&x[4]), initial_state: Some(&x[5]), cu_seqlens: None };
            delta_rule_step(c.op, &x[0], &x[1], &x[2], ins).unwrap()
        };
        let (found, want) = (step(&device, false), step(&Device::cpu(), true));
        assert!(ratio(&found.0, &want.0) <= 0.005 && ratio(&found.1, &want.1) <= 1e-5);
    }
    let c = case([2, 0, 1, 2, 8, 8], 0.4);
    let x = c.rounded(DType::F32);
    let found = c.run(x, &device);
    assert_eq!(found[1].1.to_vec::<f64>().unwrap(), c.rounded(DType::F32)[5].to_vec::<f64>().unwrap(), "nothing happens to the state");
    assert_eq!(found[7].1.shape(), [2, 2, 8, 8]);
}

#[test]
fn the_same_bits_each_time() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let c = case([1, 66, 1, 2, 16, 16], 0.4);
    let bits = || c.run(c.rounded(DType::BF16), &device).into_iter().map(|(_, x)| x.to_vec::<f64>().unwrap()).collect::<Vec<_>>();
    assert_eq!(bits(), bits());
}
