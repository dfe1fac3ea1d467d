//! The CUDA kernels of `gated_sdpa`, emulated (and on the GPU where there is one), against the CPU op in f64: every attribute, ragged tails, packed
//! documents, strided inputs, every head dim.

use engine::{DType, Device, Result, Tensor};
use ops::gated_sdpa::{Activation, Attention, Gate, attention_pattern, gated_sdpa};

#[derive(Clone, Debug)]
struct Case {
    b: usize,
    /// T, S.
    t: [usize; 2],
    /// H, Hkv.
    h: [usize; 2],
    /// D, Dv.
    d: [usize; 2],
    a: Attention,
    /// How it acts, and whether element-wise.
    gate: Option<(Gate, bool)>,
    cu: Option<Vec<i64>>,
}

const GATES: [(Activation, bool, bool); 8] = [
    (Activation::Sigmoid, false, true),
    (Activation::Sigmoid, false, false),
    (Activation::Silu, true, true),
    (Activation::Silu, true, false),
    (Activation::NsSigmoid, false, true),
    (Activation::NsSigmoid, true, false),
    (Activation::Identity, false, false),
    (Activation::Silu, false, true),
];
fn gate(i: usize) -> Option<(Gate, bool)> {
    let (activation, additive, elementwise) = GATES[i];
    Some((Gate { activation, additive }, elementwise))
}
const CAUSAL: Attention = Attention { causal: true, window: None, scale: None };
fn causal(window: usize) -> Attention {
    Attention { window: Some(window), ..CAUSAL }
}
fn full(window: Option<usize>) -> Attention {
    Attention { causal: false, window, scale: Some(0.2) }
}

fn case(b: usize, t: [usize; 2], h: [usize; 2], d: [usize; 2], a: Attention, gate: Option<(Gate, bool)>) -> Case {
    Case { b, t, h, d, a, gate, cu: None }
}

fn devices() -> Vec<Device> {
    let emulators = [cuda::emulator(), cuda::hopper_emulator()].map(|e| e.inspect_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")));
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("SKIPPED: nothing runs on a GPU: {e}"));
    emulators.into_iter().flatten().chain(gpu).collect()
}

impl Case {
    /// q, k, v and perhaps the gate, rounded to the dtype.
    fn leaves(&self, dtype: DType) -> Vec<Tensor> {
        let ([t, s], [h, hkv], [d, dv]) = (self.t, self.h, self.d);
        let make = |shape: &[usize], stream| Tensor::randn(shape, DType::F64, &Device::cpu(), 7, stream).unwrap().cast(dtype).unwrap();
        let mut x = vec![make(&[self.b, t, h, d], 0), make(&[self.b, s, hkv, d], 1), make(&[self.b, s, hkv, dv], 2)];
        match self.gate {
            Some((_, true)) => x.push(make(&[self.b, t, h, dv], 3)),
            Some((_, false)) => x.push(make(&[self.b, t, h], 3)),
            None => {}
        }
        x
    }
    fn cu(&self, wide: bool) -> Option<Tensor> {
        let n = self.cu.as_ref()?.len();
        let cu = Tensor::from_vec(self.cu.clone()?, &[n]).unwrap();
        Some(if wide { cu } else { cu.cast(DType::I32).unwrap() })
    }
    /// The output, and the gradients of all leaves, back on the CPU in f64.
    fn both(&self, x: &[Tensor], device: &Device) -> Result<Vec<Tensor>> {
        let x: Vec<Tensor> = x.iter().map(|x| x.to_device(device).map(|x| x.requires_grad())).collect::<Result<_>>()?;
        let cu = self.cu(self.t[0].is_multiple_of(2)).map(|c| c.to_device(device)).transpose()?;
        let y = gated_sdpa(&x[0], &x[1], &x[2], self.gate.map(|g| (&x[3], g.0)), cu.as_ref(), self.a)?;
        let dy = Tensor::randn(y.shape(), DType::F64, &Device::cpu(), 8, 0)?.cast(DType::BF16)?.cast(y.dtype())?.to_device(device)?;
        let grads = y.backward_with(&dy)?;
        let mut out = vec![y.detach()];
        out.extend(x.iter().map(|x| grads.get(x).unwrap().clone()));
        out.iter().map(|x| x.to_device(&Device::cpu())?.cast(DType::F64)).collect()
    }
    /// Compares with f64 on the CPU; what the largest errors of output, dq dk dv, dgate are.
    fn compare(&self, dtype: DType, device: &Device) -> [f64; 3] {
        let x = self.leaves(dtype);
        let exact: Vec<Tensor> = x.iter().map(|x| x.cast(DType::F64).unwrap()).collect();
        let got = self.both(&x, device).unwrap_or_else(|e| panic!("{self:?} {dtype}: {e}"));
        let want = self.both(&exact, &Device::cpu()).unwrap();
        let bounds = if dtype == DType::F32 { [1e-5; 3] } else { [0.005, 0.008, 0.02] };
        let mut worst = [0f64; 3];
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (e, kind) = (ratio(got, want), i.div_ceil(3));
            assert!(e <= bounds[kind], "{self:?} {dtype}, output {i} (o, dq, dk, dv, dgate): RMS ratio {e:e}");
            worst[kind] = worst[kind].max(e);
        }
        worst
    }
}

fn ratio(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
    assert_eq!(a.len(), b.len());
    let (mut diff, mut base) = (0.0, 1e-300);
    for (a, b) in a.iter().zip(&b) {
        diff += (a - b) * (a - b);
        base += b * b;
    }
    (diff / base).sqrt()
}

fn compare_all(cases: &[Case], dtypes: &[DType]) {
    for device in devices() {
        for dtype in dtypes {
            let mut worst = [0f64; 3];
            for c in cases {
                let e = c.compare(*dtype, &device);
                worst = [0, 1, 2].map(|i| worst[i].max(e[i]));
            }
            println!("{} {dtype}: o {:.1e}, dq dk dv {:.1e}, dgate {:.1e}", device.name(), worst[0], worst[1], worst[2]);
        }
    }
}
const BOTH: [DType; 2] = [DType::F32, DType::BF16];

#[test]
fn every_gate() {
    let cases: Vec<Case> = (0..GATES.len()).map(|i| case(2, [39, 45], [4, 2], [32, 32], CAUSAL, gate(i))).collect();
    compare_all(&cases, &BOTH);
}

#[test]
fn masks_and_tails() {
    let cases = [
        case(1, [150, 150], [2, 2], [32, 32], full(None), gate(0)),
        case(1, [150, 170], [3, 1], [32, 32], causal(40), gate(0)),
        case(1, [140, 140], [1, 1], [32, 32], full(Some(20)), None),
        case(1, [3, 200], [2, 1], [32, 32], CAUSAL, gate(1)),
        case(1, [130, 130], [2, 1], [32, 32], Attention { scale: Some(-0.3), ..CAUSAL }, None),
        case(1, [20, 20], [2, 1], [32, 32], Attention { scale: Some(0.0), ..CAUSAL }, None),
        case(1, [33, 33], [1, 1], [32, 32], causal(2), gate(0)),
    ];
    compare_all(&cases, &BOTH);
}

#[test]
fn packed_documents() {
    let packed = |t: usize, cu: &[i64], h, a| Case { cu: Some(cu.to_vec()), ..case(1, [t, t], h, [32, 32], a, gate(0)) };
    let cases = [
        packed(150, &[0, 1, 40, 40, 140, 150], [4, 2], CAUSAL),
        packed(149, &[0, 70, 149], [2, 2], full(None)),
        packed(150, &[0, 60, 150], [2, 1], causal(33)),
        packed(40, &[0, 0, 40, 40], [2, 1], CAUSAL),
    ];
    compare_all(&cases, &BOTH);
}

/// One query against many keys, in several blocks with their results joined; and a window that leaves the first keys out.
#[test]
fn decoding() {
    let cases = [
        case(2, [1, 77], [4, 2], [32, 32], CAUSAL, gate(0)),
        case(1, [1, 1100], [4, 2], [32, 32], CAUSAL, gate(1)),
        case(1, [5, 800], [4, 1], [32, 24], CAUSAL, None),
        case(1, [2, 900], [2, 1], [32, 32], causal(600), gate(2)),
        case(1, [40, 900], [1, 1], [32, 32], full(None), gate(0)),
    ];
    compare_all(&cases, &BOTH);
}

#[test]
fn every_head_dim_in_bf16() {
    let dims = [[64, 64], [96, 96], [128, 128], [192, 128], [192, 192], [256, 256]];
    compare_all(&dims.map(|d| case(1, [70, 75], [2, 1], d, CAUSAL, gate(0))), &[DType::BF16]);
    compare_all(&[case(1, [2, 75], [2, 1], [256, 256], CAUSAL, gate(0))], &[DType::BF16]);
}

#[test]
fn every_head_dim_in_f32() {
    let dims = [[64, 64], [128, 96], [192, 192], [256, 256]];
    compare_all(&dims.map(|d| case(1, [36, 40], [2, 1], d, CAUSAL, gate(0))), &[DType::F32]);
}

/// The variant for Hopper has tiles of 128 rows and keys: several of each, cut by every mask, ragged, with the gate's kinds, at both of its head dims.
#[test]
fn tiles_of_hopper() {
    let packed = |t: usize, cu: &[i64], h, a| Case { cu: Some(cu.to_vec()), ..case(1, [t, t], h, [64, 64], a, gate(0)) };
    let cases = [
        case(1, [300, 300], [1, 1], [128, 128], CAUSAL, gate(0)),
        case(1, [70, 700], [2, 2], [128, 128], full(None), gate(1)),
        case(2, [90, 333], [4, 2], [64, 64], CAUSAL, gate(2)),
        case(1, [260, 420], [2, 1], [64, 64], causal(150), gate(3)),
        case(1, [200, 200], [1, 1], [64, 64], full(Some(30)), None),
        case(1, [130, 140], [2, 2], [40, 56], CAUSAL, gate(4)),
        case(1, [130, 140], [2, 1], [72, 128], CAUSAL, gate(6)),
        case(1, [200, 230], [2, 1], [64, 64], Attention { scale: Some(-0.3), ..CAUSAL }, gate(5)),
        packed(300, &[0, 1, 140, 140, 290, 300], [2, 1], CAUSAL),
        packed(290, &[0, 130, 290], [2, 2], full(None)),
    ];
    compare_all(&cases, &[DType::BF16]);
}

/// Rows that are not whole vectors.
#[test]
fn odd_head_dims() {
    compare_all(&[case(1, [37, 41], [2, 1], [20, 13], CAUSAL, gate(0)), case(1, [20, 20], [2, 1], [5, 18], CAUSAL, gate(3))], &BOTH);
}

/// Views of one projection, dense in the last axis alone, aligned and not.
#[test]
fn strided_inputs() {
    for device in devices() {
        for (dtype, at) in [(DType::F32, 32), (DType::BF16, 32), (DType::BF16, 35)] {
            let qg = Tensor::randn(&[2, 40, 4, 80], DType::F32, &Device::cpu(), 1, 0).unwrap().cast(dtype).unwrap();
            let kv = Tensor::randn(&[2, 45, 4, 32], DType::F32, &Device::cpu(), 1, 1).unwrap().cast(dtype).unwrap();
            let run = |dense: bool| -> Vec<Vec<f64>> {
                let (qg, kv) = (qg.to_device(&device).unwrap().requires_grad(), kv.to_device(&device).unwrap().requires_grad());
                let views = [(&qg, 3, 0, 32), (&kv, 2, 0, 2), (&kv, 2, 2, 2), (&qg, 3, at, 32)];
                let x = views.map(|(x, axis, from, n)| {
                    let x = x.detach().narrow(axis, from, n).unwrap();
                    if dense { x.to_device(&Device::cpu()).unwrap().contiguous().unwrap().to_device(&device).unwrap() } else { x }.requires_grad()
                });
                let y = gated_sdpa(&x[0], &x[1], &x[2], Some((&x[3], Gate::default())), None, CAUSAL).unwrap();
                let dy = Tensor::randn(&[2, 40, 4, 50], DType::F32, &Device::cpu(), 2, 0).unwrap().cast(dtype).unwrap().to_device(&device).unwrap();
                let grads = y.backward_with(&dy.narrow(3, at - 30, 32).unwrap()).unwrap();
                let host = |x: &Tensor| x.to_device(&Device::cpu()).unwrap().cast(DType::F64).unwrap().to_vec::<f64>().unwrap();
                std::iter::once(host(&y.detach())).chain(x.iter().map(|x| host(grads.get(x).unwrap()))).collect()
            };
            assert!(run(false) == run(true), "{dtype}, gate at column {at}");
        }
    }
}

#[test]
fn extreme_inputs_stay_finite() {
    for device in devices() {
        for dtype in BOTH {
            let c = case(1, [40, 40], [2, 1], [32, 32], CAUSAL, gate(0));
            let mut x = c.leaves(DType::F64);
            x[0] = x[0].affine(1e4, 0.0).unwrap();
            x[3] = x[3].affine(0.0, -300.0).unwrap();
            let x: Vec<Tensor> = x.iter().map(|x| x.cast(dtype).unwrap()).collect();
            for (i, y) in c.both(&x, &device).unwrap().iter().enumerate() {
                assert!(y.to_vec::<f64>().unwrap().iter().all(|x| x.is_finite()), "{dtype}, output {i}");
            }
        }
    }
}

#[test]
fn patterns() {
    let cases = [
        case(2, [39, 45], [4, 2], [32, 32], CAUSAL, None),
        case(1, [40, 40], [2, 1], [20, 32], full(Some(9)), None),
        case(1, [9, 100], [2, 2], [7, 32], causal(40), None),
        Case { cu: Some(vec![0, 1, 30, 70]), ..case(1, [70, 70], [2, 1], [32, 32], CAUSAL, None) },
    ];
    for device in devices() {
        for c in &cases {
            for dtype in BOTH {
                let x = c.leaves(dtype);
                let at = |x: &[Tensor], device: &Device| {
                    let on: Vec<Tensor> = x.iter().map(|x| x.to_device(device).unwrap()).collect();
                    let cu = c.cu(false).map(|c| c.to_device(device).unwrap());
                    let p = attention_pattern(&on[0], &on[1], cu.as_ref(), c.a).unwrap();
                    p.to_device(&Device::cpu()).unwrap().cast(DType::F64).unwrap()
                };
                let exact: Vec<Tensor> = x.iter().map(|x| x.cast(DType::F64).unwrap()).collect();
                let e = ratio(&at(&x, &device), &at(&exact, &Device::cpu()));
                assert!(e < 2e-6, "{c:?} {dtype}: {e:e}");
            }
        }
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let c = case(1, [100, 120], [4, 2], [32, 32], CAUSAL, gate(0));
    for device in devices() {
        let run = || c.both(&c.leaves(DType::BF16), &device).unwrap().iter().map(|x| x.to_vec::<f64>().unwrap()).collect::<Vec<_>>();
        assert!(run() == run());
    }
}

#[test]
fn empty_inputs_give_empty_outputs() {
    for device in devices() {
        for (b, t) in [(0, [4, 4]), (1, [0, 4]), (1, [0, 0])] {
            let c = case(b, t, [2, 1], [32, 32], CAUSAL, gate(0));
            let y = c.both(&c.leaves(DType::F32), &device).unwrap();
            assert_eq!(y[0].numel(), 0);
            assert!(y[2].to_vec::<f64>().unwrap().iter().all(|x| *x == 0.0));
        }
    }
}

#[test]
fn what_is_not_supported_is_an_error() {
    let fails = |r: Result<Vec<Tensor>>, words: &str| {
        let e = r.expect_err(words).to_string();
        assert!(e.contains(words), "{e:?} lacks {words:?}");
    };
    // an emulator of its own: what a kernel tells comes to whoever waits for the device next
    if let Ok(device) = cuda::emulator_with_memory(1 << 20) {
        let c = case(1, [4, 4], [1, 1], [264, 8], CAUSAL, None);
        fails(c.both(&c.leaves(DType::F32), &device), "at most 256");
        let c = case(1, [4, 4], [1, 1], [8, 8], CAUSAL, None);
        fails(c.both(&c.leaves(DType::F64), &device), "bf16 or f32");
        for cu in [vec![0, 3], vec![1, 4], vec![0, 3, 2, 4], vec![-1, 4], vec![0, 9, 4]] {
            let c = Case { cu: Some(cu), ..c.clone() };
            fails(c.both(&c.leaves(DType::F32), &device), "cu_seqlens must rise");
        }
        let c = Case { cu: Some(vec![4]), ..c };
        fails(c.both(&c.leaves(DType::F32), &device), "cu_seqlens must have shape [documents + 1], found [1]");
    }
}
