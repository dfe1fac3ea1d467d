//! The fused ops' CUDA kernels, emulated, against the CPU ops in f64: all attributes, ragged tails, packed documents, strided inputs.

use cuda::Graph;
use engine::{DType, Device, Grads, Result, Tensor};
use ops::adamw::{AdamW, AdamWMany, GlobalNorm, adamw, adamw_many, global_norm};
use ops::linear_cross_entropy::{IGNORE, linear_cross_entropy, linear_cross_entropy_per_token};
use ops::moe::{Moe, add_shared, load_balancing_loss, moe, router_logits, router_z_loss};
use ops::rms_norm::{NormGate, RmsNorm, rms_norm, rms_norm_gated, rms_norm_residual};
use ops::rope::{Positions, norm_rope, rope, rope_scaled};
use ops::short_conv::short_conv;
use ops::swiglu::swiglu;
use std::sync::{Mutex, MutexGuard};

/// The GPU where there is one, else the emulator, unless there is no C++ compiler here.
fn device() -> Option<Device> {
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}"));
    gpu.or_else(|_| cuda::emulator()).map_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")).ok()
}
/// One test at a time on a GPU: a wrong index shows at the next download, and a capture is the whole device's.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    cuda::device(0).is_ok().then(|| ALONE.lock().unwrap_or_else(|e| e.into_inner()))
}
fn randn(shape: &[usize], stream: u64) -> Tensor {
    Tensor::randn(shape, DType::F64, &Device::cpu(), 11, stream).unwrap()
}
/// The same values as a view whose rows lie apart, three elements into its buffer.
fn strided(x: &Tensor) -> Result<Tensor> {
    let axis = x.rank() - 1;
    let d = x.dim(axis);
    Tensor::cat(&[&x.narrow(axis, 0, d.min(3))?, x, x], axis)?.narrow(axis, d.min(3), d)
}
fn master(x: &Tensor) -> Result<Tensor> {
    x.cast(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
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

type F<'a> = &'a dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// Float outputs, and the gradients of a weighted sum of them.
fn outcome(f: F, x: &[Tensor]) -> (Vec<Tensor>, Vec<Option<Tensor>>) {
    let x: Vec<Tensor> = x.iter().map(Tensor::requires_grad).collect();
    let y = f(&x).unwrap();
    let mut sum: Option<Tensor> = None;
    for (i, y) in y.iter().enumerate().filter(|(_, y)| y.is_tracked()) {
        let wide = master(y).unwrap();
        let weight = randn(y.shape(), 100 + i as u64).cast(DType::BF16).unwrap().cast(wide.dtype()).unwrap().to_device(y.device()).unwrap();
        let part = wide.mul(&weight).unwrap().sum_all().unwrap();
        sum = Some(sum.map_or(part.clone(), |s| s.add(&part).unwrap()));
    }
    let mut grads = Grads::new();
    sum.inspect(|s| s.backward_into(&mut grads).unwrap());
    let here = |t: &Tensor| t.detach().to_device(&Device::cpu()).unwrap();
    (y.iter().map(here).collect(), x.iter().map(|x| grads.get(x).map(here)).collect())
}

/// Compares in f32 and bf16, from inputs that are rounded first; `f` may cast them on.
#[track_caller]
fn agree(what: &str, inputs: &[Tensor], f: F) {
    let Some(device) = device() else { return };
    agree_on(&device, &[(DType::F32, 1e-5, 1e-5), (DType::BF16, 0.005, 0.008)], what, inputs, f);
    // what has kernels of its own for Hopper
    let hopper = cuda::hopper_emulator();
    if let (true, Ok(device)) = (cuda::Cuda::of(&device).is_ok_and(cuda::Cuda::is_emulator), hopper) {
        agree_on(&device, &[(DType::BF16, 0.005, 0.008)], &format!("{what}, Hopper"), inputs, f);
    }
}
#[track_caller]
fn agree_on(device: &Device, bounds: &[(DType, f64, f64)], what: &str, inputs: &[Tensor], f: F) {
    for &(dtype, bound, grad_bound) in bounds {
        let x: Vec<Tensor> = inputs.iter().map(|x| x.cast(dtype).unwrap()).collect();
        let (want, want_grads) = outcome(f, &x.iter().map(|x| x.cast(DType::F64).unwrap()).collect::<Vec<_>>());
        let (found, grads) = outcome(f, &x.iter().map(|x| x.to_device(device).unwrap()).collect::<Vec<_>>());
        for (i, (y, w)) in found.iter().zip(&want).enumerate() {
            let e = ratio(y, w);
            assert!(e <= bound, "{what}, {dtype}: output {i}: {e:e} > {bound}");
        }
        for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
            let e = match (g, w) {
                (Some(g), Some(w)) => ratio(g, w),
                (None, None) => 0.0,
                _ => panic!("{what}, {dtype}: gradient {i} is there on one device only"),
            };
            assert!(e <= grad_bound, "{what}, {dtype}: gradient {i}: {e:e} > {grad_bound}");
        }
    }
}

#[test]
fn rms_norm_of_every_form() {
    let _alone = alone();
    // a vector a thread of teams of every size, several, more than fit registers; ragged rows of all lengths; rows that a team takes in turn
    for (shape, masters) in [
        (vec![3, 5, 64], true),
        (vec![150, 24], true),
        (vec![45, 7], false),
        (vec![7, 200], true),
        (vec![9, 300], true),
        (vec![5, 1104], false),
        (vec![3, 8200], true),
    ] {
        let d = shape[shape.len() - 1];
        let x = [randn(&shape, 1), randn(&[d], 2), randn(&shape, 3)];
        let w = move |v: &[Tensor]| if masters { master(&v[1]) } else { Ok(v[1].clone()) };
        for centred in [false, true] {
            agree(&format!("{shape:?}"), &x[..2], &|v| Ok(vec![rms_norm(&strided(&v[0])?, &w(v)?, 1e-5, centred)?]));
        }
        agree(&format!("residual {shape:?}"), &x, &|v| {
            let (y, h) = rms_norm_residual(&v[0], &strided(&v[2])?, &w(v)?, 1e-5, true)?;
            Ok(vec![y, h])
        });
        agree(&format!("residual, sum unused {shape:?}"), &x, &|v| Ok(vec![rms_norm_residual(&v[0], &v[2], &w(v)?, 1e-5, false)?.0]));
        for act in [NormGate::Silu, NormGate::Sigmoid] {
            agree(&format!("{act:?} {shape:?}"), &x, &|v| Ok(vec![rms_norm_gated(&v[0], &w(v)?, &strided(&v[2])?, 1e-5, act)?]));
        }
        let centred = RmsNorm { eps: 1e-5, zero_centred: true, residual: false, gate: Some(NormGate::Silu) };
        agree(&format!("centred gate {shape:?}"), &x, &|v| Ok(vec![engine::run1(centred, &[&v[0], &w(v)?, &v[2]])?]));
    }
    agree("no rows", &[randn(&[0, 8], 1), randn(&[8], 2)], &|v| Ok(vec![rms_norm(&v[0], &v[1], 1e-5, false)?]));
    agree("transposed", &[randn(&[3, 5, 2, 8], 1), randn(&[8], 2)], &|v| Ok(vec![rms_norm(&v[0].permute(&[2, 0, 1, 3])?, &v[1], 1e-5, false)?]));
}

#[test]
fn swiglu_of_whole_and_ragged_vectors() {
    let _alone = alone();
    for shape in [[3, 5, 14], [1, 2, 128], [0, 3, 4], [2, 3, 2]] {
        agree(&format!("{shape:?}"), &[randn(&shape, 1)], &|v| Ok(vec![swiglu(&v[0])?]));
    }
}

#[test]
fn rope_of_parts_far_out_and_after_a_norm() {
    let _alone = alone();
    for (d, rotary) in [(40, 20), (40, 0), (40, 40), (64, 32), (128, 128), (6, 4)] {
        agree(&format!("{rotary} of {d}"), &[randn(&[2, 5, 3, d], 1)], &|v| {
            Ok(vec![rope(&strided(&v[0])?, rotary, 1e4, Positions::From(1_000_000))?])
        });
    }
    for dtype in [DType::I32, DType::I64] {
        let p = Tensor::from_vec([0i64, 1, 2, 0, 7, 8, 1_000_000, 1_000_001], &[2, 4]).unwrap().cast(dtype).unwrap();
        agree("positions", &[randn(&[2, 4, 3, 16], 1), randn(&[16], 2)], &|v| {
            let p = p.to_device(v[0].device())?;
            Ok(vec![norm_rope(&v[0], &v[1], 1e-6, true, 8, 1e4, Positions::Given(&p))?])
        });
        // frequencies that are given, with a factor, and a whole vector and none
        for half in [4, 3] {
            let f = Tensor::from_vec((0..half).map(|i| 0.9f64.powi(7 * i)).collect::<Vec<_>>(), &[half as usize]).unwrap();
            agree("frequencies", &[randn(&[2, 4, 3, 16], 1)], &|v| {
                let (f, p) = (f.to_device(v[0].device())?, p.to_device(v[0].device())?);
                Ok(vec![rope_scaled(&v[0], &f, 1.3, Positions::Given(&p))?, rope_scaled(&v[0], &f, 1.3, Positions::From(70_000))?])
            });
        }
    }
}

#[test]
fn short_conv_of_every_form() {
    let _alone = alone();
    for (b, t, c, k) in [(2, 9, 5, 4), (1, 1, 3, 4), (2, 75, 40, 2), (1, 3, 300, 1), (1, 66, 3, 7), (1, 0, 4, 4)] {
        let x = [randn(&[b, t, c], 1), randn(&[c, k], 2), randn(&[b, k - 1, c], 3)];
        for silu in [false, true] {
            let what = format!("{:?} silu {silu}", (b, t, c, k));
            let both = |(y, s): (Tensor, Tensor)| Ok(vec![y, s]);
            agree(&what, &x[..2], &|v| both(short_conv(&strided(&v[0])?, &v[1], silu, None, None)?));
            agree(&format!("{what}, state"), &x, &|v| both(short_conv(&v[0], &master(&v[1])?, silu, Some(&master(&v[2])?), None)?));
        }
    }
    // heads that lie apart, whole vectors and not
    for d in [8, 6] {
        agree("heads", &[randn(&[2, 7, 3, d], 1), randn(&[3 * d, 1, 4], 2)], &|v| Ok(vec![short_conv(&strided(&v[0])?, &v[1], true, None, None)?.0]));
    }
    // documents shorter than the window, empty ones, boundaries of runs
    for (cu, dtype) in [(vec![0i64, 2, 2, 3, 32, 77], DType::I64), (vec![0, 40, 76, 77, 77], DType::I32), (vec![0, 77], DType::I64)] {
        let cu = Tensor::from_vec(cu.clone(), &[cu.len()]).unwrap().cast(dtype).unwrap();
        for k in [4, 5] {
            agree("packed", &[randn(&[1, 77, 6], 1), randn(&[6, k], 2)], &|v| {
                let (y, s) = short_conv(&v[0], &v[1], true, None, Some(&cu.to_device(v[0].device())?))?;
                Ok(vec![y, s])
            });
        }
    }
    let Some(device) = device() else { return };
    let on = |t: Tensor| t.to_device(&device).unwrap();
    for bad in [[0i64, 5, 4, 7], [1, 2, 3, 7], [0, 2, 3, 6]] {
        let (x, w) = (on(randn(&[1, 7, 3], 1).cast(DType::F32).unwrap()), on(randn(&[3, 4], 2).cast(DType::F32).unwrap()));
        let y = short_conv(&x, &w, true, None, Some(&on(Tensor::from_vec(bad, &[4]).unwrap()))).unwrap().0;
        let e = y.to_vec::<f32>().unwrap_err().to_string();
        assert!(e.contains("cu_seqlens"), "{bad:?}: {e}");
    }
}

#[test]
fn adamw_of_one_and_of_many() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let sizes: Vec<Vec<usize>> = (0..53)
        .map(|i| {
            if i == 7 {
                vec![2, 4100]
            } else if i == 9 {
                vec![0]
            } else {
                vec![i * 7 % 13 + 1, 3]
            }
        })
        .collect();
    let run = |on: &Device| -> Vec<Tensor> {
        let like = |stream: u64, d: DType, scale: f64| -> Vec<Tensor> {
            let one = |(i, s): (usize, &Vec<usize>)| randn(s, stream + i as u64).affine(scale, 0.0).unwrap().cast(d).unwrap().to_device(on).unwrap();
            sizes.iter().enumerate().map(one).collect()
        };
        let (p, m, v, shadows) = (like(0, DType::F32, 1.0), like(0, DType::F32, 0.0), like(0, DType::F32, 0.0), like(0, DType::BF16, 1.0));
        fn refs(t: &[Tensor]) -> Vec<&Tensor> {
            t.iter().collect()
        }
        let mut out = vec![];
        for step in 1..=2 {
            let (f, h) = (like(100 * step, DType::F32, 1.0), like(100 * step, DType::BF16, 1.0));
            let g: Vec<&Tensor> = f.iter().zip(&h).enumerate().map(|(i, (f, h))| if i % 3 == 0 { h } else { f }).collect();
            let (norm, c) = global_norm(GlobalNorm { max_norm: 1.0, scale: 0.5 }, &g).unwrap();
            let weight_decay = (0..sizes.len()).map(|i| i as f64 * 0.01).collect();
            let op = AdamWMany { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, shadows: true };
            let schedule = op.schedule(0.1, step, on).unwrap();
            adamw_many(op.clone(), &refs(&p), &refs(&m), &refs(&v), &refs(&shadows), &schedule, &c, &g).unwrap();
            out.extend([norm, c]);
            // what is not finite changes nothing
            let bad = f[0].affine(1.0, f64::INFINITY).unwrap();
            let c = global_norm(GlobalNorm { max_norm: 1.0, scale: 1.0 }, &[&bad]).unwrap().1;
            adamw_many(op, &refs(&p), &refs(&m), &refs(&v), &refs(&shadows), &schedule, &c, &g).unwrap();
            let one = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
            adamw(one, &p[7], &m[7], &v[7], &h[7]).unwrap();
        }
        out.into_iter().chain(p).chain(m).chain(v).chain(shadows).collect()
    };
    let (found, want) = (run(&device), run(&Device::cpu()));
    for (i, (a, b)) in found.iter().zip(&want).enumerate() {
        let e = ratio(&a.to_device(&Device::cpu()).unwrap(), b);
        assert!(e <= if b.dtype() == DType::BF16 { 1e-3 } else { 1e-6 }, "{i}: {e:e}");
    }
}

#[test]
fn moe_with_empty_experts_and_several_tiles() {
    let _alone = alone();
    // (tokens, width, experts, width of an expert, choices)
    for (n, h, e, i, k) in [(5, 4, 3, 2, 1), (7, 3, 40, 3, 2), (6, 8, 3, 16, 3), (140, 136, 2, 72, 2), (0, 8, 3, 4, 2), (37, 16, 70, 8, 5)] {
        let x = [randn(&[n, h], 1), randn(&[n, e], 2), randn(&[e, 2 * i, h], 3), randn(&[e, h, i], 4)];
        for norm_topk in [true, false] {
            let op = Moe { top_k: k, norm_topk };
            let what = format!("{:?} {norm_topk}", (n, h, e, i, k));
            agree(&what, &x, &|v| {
                let logits = if norm_topk { master(&v[1])? } else { v[1].clone() };
                let (y, counts) = moe(op, &v[0], &logits, &v[2], &v[3])?;
                Ok(vec![y, counts])
            });
        }
    }
    // a router that knows one expert alone
    let one = randn(&[130, 4], 2).affine(0.01, 0.0).unwrap();
    let lift = Tensor::from_vec([0.0, 2.0, 0.0, 0.0], &[4]).unwrap();
    let x = [randn(&[130, 8], 1), one.add(&lift).unwrap(), randn(&[4, 16, 8], 3), randn(&[4, 8, 8], 4)];
    agree("one expert", &x, &|v| Ok(vec![moe(Moe { top_k: 1, norm_topk: false }, &v[0], &v[1], &v[2], &v[3])?.0]));
    agree("losses", &[randn(&[9, 4], 1), randn(&[9, 4], 2)], &|v| {
        Ok(vec![router_z_loss(&[&v[0], &v[1]])?, load_balancing_loss(&[&v[0], &v[1]], 2)?])
    });
}

/// Several tiles of rows, columns and depth, none of them whole, on fewer blocks than tiles; experts of very different sizes, one without rows.
#[test]
fn moe_on_hopper_takes_ragged_tiles() {
    let _alone = alone();
    let Ok(device) = cuda::hopper_emulator() else { return println!("SKIPPED: nothing is emulated") };
    for (n, h, i, k) in [(330, 328, 152, 2), (150, 72, 264, 3)] {
        let lift = Tensor::from_vec([0.0, 2.0, -1.0, 0.0, -1e3], &[5]).unwrap();
        let logits = randn(&[n, 5], 2).add(&lift).unwrap();
        let x = [randn(&[n, h], 1), logits, randn(&[5, 2 * i, h], 3), randn(&[5, h, i], 4)];
        agree_on(&device, &[(DType::BF16, 0.005, 0.008)], &format!("{:?}", (n, h, i, k)), &x, &|v| {
            let (y, counts) = moe(Moe { top_k: k, norm_topk: true }, &v[0], &v[1], &v[2], &v[3])?;
            Ok(vec![y, counts])
        });
    }
}

/// The gradients of weights in f32 are those of the same weights in bf16 before rounding.
#[test]
fn moe_gives_gradients_of_f32_weights_unrounded() {
    let _alone = alone();
    let devices = [device(), cuda::hopper_emulator().ok()];
    for device in devices.into_iter().flatten() {
        for (n, h, i) in [(330, 136, 72), (40, 15, 7)] {
            let x = [randn(&[n, h], 1), randn(&[n, 5], 2), randn(&[5, 2 * i, h], 3), randn(&[5, h, i], 4)];
            let run = |weights: DType| {
                let on = |(i, x): (usize, &Tensor)| {
                    let x = x.cast(DType::BF16).unwrap().cast(if i < 2 { DType::BF16 } else { weights }).unwrap();
                    x.to_device(&device).unwrap()
                };
                let x: Vec<Tensor> = x.iter().enumerate().map(on).collect();
                outcome(&|v| Ok(vec![moe(Moe { top_k: 2, norm_topk: true }, &v[0], &v[1], &v[2], &v[3])?.0]), &x)
            };
            let ((y, wide), (y16, narrow)) = (run(DType::F32), run(DType::BF16));
            let values = |x: &Tensor| x.to_vec::<f64>().unwrap();
            assert_eq!(values(&y[0]), values(&y16[0]));
            for j in 2..4 {
                let (wide, narrow) = (wide[j].as_ref().unwrap(), narrow[j].as_ref().unwrap());
                assert_eq!([wide.dtype(), narrow.dtype()], [DType::F32, DType::BF16]);
                assert_eq!(values(&wide.cast(DType::BF16).unwrap()), values(narrow), "{:?} gradient {j}", (n, h, i));
                assert_ne!(values(wide), values(narrow));
            }
        }
    }
}

/// By products in bf16 the logits and the weight's gradient are as near as a product in f32 is, and x's gradient is the exact one's rounding but for ties.
#[test]
fn router_logits_are_those_of_f32() {
    let _alone = alone();
    let Some(device) = device() else { return };
    // tensor cores cut sums off where f32 rounds
    let bound = if cuda::Cuda::of(&device).unwrap().is_emulator() { 1e-6 } else { 2e-6 };
    for (n, h, e) in [(300, 256, 72), (70, 40, 5), (1, 8, 1), (0, 8, 3)] {
        let (x, w) = (randn(&[n, h], 1).cast(DType::BF16).unwrap(), randn(&[e, h], 2).cast(DType::F32).unwrap());
        let dy = randn(&[n, e], 3).cast(DType::F32).unwrap();
        let run = |device: &Device, wide: bool| {
            let at = |x: &Tensor| if wide { x.cast(DType::F64) } else { x.to_device(device) }.unwrap().requires_grad();
            let (x, w, dy) = (at(&x), at(&w), at(&dy).detach());
            let y = router_logits(&x, &w).unwrap();
            let grads = y.mul(&dy).unwrap().sum_all().unwrap().backward().unwrap();
            let here = |t: &Tensor| t.detach().to_device(&Device::cpu()).unwrap();
            [here(&y), here(grads.get(&x).unwrap()), here(grads.get(&w).unwrap())]
        };
        let ([y, dx, dw], [want_y, want_dx, want_dw]) = (run(&device, false), run(&Device::cpu(), true));
        assert_eq!([y.dtype(), dx.dtype(), dw.dtype()], [DType::F32, DType::BF16, DType::F32]);
        for (what, got, want) in [("logits", y, want_y), ("weight", dw, want_dw)] {
            let error = ratio(&got, &want);
            assert!(error <= bound, "{:?} {what}: {error:e}", (n, h, e));
        }
        let values = |x: &Tensor| x.cast(DType::BF16).unwrap().to_vec::<f64>().unwrap();
        let other = values(&dx).iter().zip(values(&want_dx)).filter(|(a, b)| **a != *b).count();
        assert!(100 * other <= n * h, "{:?}: {other} of {} elements", (n, h, e), n * h);
    }
}

#[test]
fn shared_expert_of_ragged_rows() {
    let _alone = alone();
    for (n, h) in [(37, 264), (9, 7), (3, 1), (0, 8)] {
        let x = [randn(&[n, h], 1), randn(&[n, h], 2), randn(&[n, 1], 3)];
        agree(&format!("{:?}", (n, h)), &x, &|v| Ok(vec![add_shared(&strided(&v[0])?, &v[1], &v[2])?]));
    }
}

fn targets(n: usize, v: usize) -> Tensor {
    Tensor::from_vec((0..n).map(|i| if i % 7 == 3 { IGNORE } else { (i * 13 % v) as i64 }).collect::<Vec<_>>(), &[n]).unwrap()
}

#[test]
fn linear_cross_entropy_over_blocks_of_rows() {
    let _alone = alone();
    // logits that a block holds, by halves of its registers and all, and more
    for (n, h, v) in [(37, 40, 70), (50, 5, 301), (1, 3, 2), (3, 8, 5000), (3, 2, 16390), (3, 2, 32771)] {
        let t = targets(n, v);
        let x = [randn(&[n, h], 1), randn(&[v, h], 2)];
        let what = format!("{:?}", (n, h, v));
        let loss = |x: &Tensor, w: &Tensor| linear_cross_entropy(x, w, &t.to_device(x.device())?);
        agree(&what, &x, &|v| Ok(vec![loss(&v[0], &v[1])?]));
        agree(&format!("{what}, x alone"), &x, &|v| Ok(vec![loss(&v[0], &v[1].detach())?]));
        agree(&format!("{what}, weight alone"), &x, &|v| Ok(vec![loss(&v[0].detach(), &v[1])?]));
        agree(&format!("{what}, per token"), &x, &|v| {
            Ok(vec![linear_cross_entropy_per_token(&v[0].detach(), &v[1].detach(), &t.to_device(v[0].device())?)?])
        });
    }
    let Some(device) = device() else { return };
    let on = |t: Tensor| t.to_device(&device).unwrap();
    let (x, w) = (on(randn(&[2, 3], 1).cast(DType::F32).unwrap()), on(randn(&[4, 3], 2).cast(DType::F32).unwrap()));
    for (bad, message) in [([1, 4], "neither in the vocabulary"), ([1, -1], "neither in the vocabulary"), ([IGNORE; 2], "no target counts")] {
        let e = linear_cross_entropy(&x, &w, &on(Tensor::from_vec(bad, &[2]).unwrap())).unwrap().item().unwrap_err().to_string();
        assert!(e.contains(message), "{e}");
    }
}

/// A step through all of them can be captured: none waits for the device. Its replay gives the same bits.
#[test]
fn nothing_waits_for_the_device() {
    let _alone = alone();
    // an emulator of its own: while one is captured, no other thread may use it
    let device = cuda::device(0).or_else(|_| cuda::emulator_with_memory(64 << 20));
    let Ok(device) = device.inspect_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")) else { return };
    let on = |t: Tensor| t.cast(DType::BF16).unwrap().to_device(&device).unwrap();
    let (n, h, e, i, v) = (9, 16, 3, 8, 24);
    let [x, conv, norm, router, w1, w2, head] = [vec![1, n, h], vec![h, 4], vec![h], vec![n, e], vec![e, 2 * i, h], vec![e, h, i], vec![v, h]]
        .map(|s| on(randn(&s, s.len() as u64)).requires_grad());
    let (targets, cu) = (targets(n, v).to_device(&device).unwrap(), Tensor::from_vec([0i64, 4, 9], &[3]).unwrap().to_device(&device).unwrap());
    let master = on(randn(&[v, h], 9)).cast(DType::F32).unwrap();
    let (m, s) = (master.affine(0.0, 0.0).unwrap(), master.affine(0.0, 0.0).unwrap());
    let op = AdamWMany { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: vec![0.1], shadows: false };
    let schedule = op.schedule(0.1, 1, &device).unwrap();
    let step = || -> Result<Vec<Tensor>> {
        let y = short_conv(&x, &conv, true, None, Some(&cu))?.0;
        let y = norm_rope(&y.reshape(&[1, n, 1, h])?, &norm, 1e-6, true, 8, 1e4, Positions::From(0))?.reshape(&[n, h])?;
        let y = moe(Moe { top_k: 2, norm_topk: true }, &y, &router, &w1, &w2)?.0;
        let loss = linear_cross_entropy(&y, &head, &targets)?;
        let grads = loss.backward()?;
        let g: Vec<&Tensor> = [&x, &conv, &norm, &router, &w1, &w2, &head].map(|t| grads.get(t).unwrap()).to_vec();
        let (norm, coefficient) = global_norm(GlobalNorm { max_norm: 0.1, scale: 1.0 }, &g)?;
        adamw_many(op.clone(), &[&master], &[&m], &[&s], &[], &schedule, &coefficient, &[g[6]])?;
        Ok(g.into_iter().cloned().chain([loss.detach(), norm]).collect())
    };
    let eager: Vec<Vec<f64>> = step().unwrap().iter().map(|t| t.to_vec().unwrap()).collect();
    let graph = Graph::capture(&device, 1, step).unwrap();
    graph.replay().unwrap();
    let replayed: Vec<Vec<f64>> = graph.output.iter().map(|t| t.to_vec().unwrap()).collect();
    assert_eq!(eager, replayed);
    assert!(eager.iter().flatten().all(|x| x.is_finite()));
}
