//! The runtime and the emulator: what kernels may use, what faults are noticed, memory, graphs, messages.

use cuda::{Cuda, Gemm, Graph, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Device, Error, Meta, Op, Result, Tensor, View, run_on, run1};

cuda_source!(static SOURCE = "emulator.cu", kernels: list);
cuda_source!(static BROKEN = "broken.cu", kernels: || vec![Kernel::new(&BROKEN, "broken<float>", 32)]);

params! { struct Params { a: Ptr, b: Ptr, c: Ptr, n: u32 } }

fn axpy(d: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("axpy<{}>", cuda::kernel::cpp(d)), 64)
}
fn list() -> Vec<Kernel> {
    let product = |t: &str, kind| Kernel::new(&SOURCE, format!("product<{t}, {kind}>"), 64);
    let mut v: Vec<Kernel> = [DType::F32, DType::BF16].map(axpy).into();
    v.extend((0..4).flat_map(|kind| [product("float", kind), product("bf16", kind)]));
    v.extend((0..5).map(|kind| Kernel::new(&SOURCE, format!("fault<{kind}>"), 64)));
    v.push(Kernel::new(&SOURCE, "collectives<0>", 96));
    v
}

/// Runs a kernel on two inputs as an op; the output is f32 unless the kernel is `axpy`.
#[derive(Debug)]
struct Run {
    kernel: Kernel,
    out: Meta,
    grid: u32,
    shared: u32,
    n: u32,
}
impl Op for Run {
    fn name(&self) -> &'static str {
        "test kernel"
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![self.out.clone()])
    }
}
cuda_kernel!(Run => |op, cuda, x, y| {
    let p = Params { a: Ptr::of(&x[0])?, b: Ptr::of(&x[1])?, c: Ptr::of(&y[0])?, n: op.n };
    cuda.launch(&op.kernel, [op.grid, 1, 1], op.shared, &p)
});

fn emulator() -> Device {
    cuda::emulator().unwrap()
}
fn randn(shape: &[usize], d: DType, stream: u64) -> Tensor {
    Tensor::randn(shape, d, &Device::cpu(), 3, stream).unwrap()
}
fn named(call: &str, threads: u32) -> Kernel {
    Kernel::new(&SOURCE, call.to_string(), threads)
}
fn run(kernel: Kernel, out: &[usize], shared: u32, n: u32, a: &Tensor, b: &Tensor) -> Result<Vec<f32>> {
    let d = emulator();
    let op = Run { kernel, out: Meta::new(out, DType::F32), grid: 1, shared, n };
    run1(op, &[&a.to_device(&d)?, &b.to_device(&d)?])?.to_vec()
}

#[test]
fn an_elementwise_kernel_runs_in_both_dtypes() {
    let d = emulator();
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::BF16, 0.02)] {
        let (a, b) = (randn(&[1000], dtype, 1), randn(&[1000], dtype, 2));
        let op = Run { kernel: axpy(dtype), out: a.meta(), grid: 16, shared: 0, n: 1000 };
        let y: Vec<f32> = run1(op, &[&a.to_device(&d).unwrap(), &b.to_device(&d).unwrap()]).unwrap().to_vec().unwrap();
        let (a, b): (Vec<f32>, Vec<f32>) = (a.to_vec().unwrap(), b.to_vec().unwrap());
        assert!(y.iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| (y - (2.0 * a + b)).abs() <= tolerance * y.abs()));
    }
}

#[test]
fn tiles_multiply_in_every_transpose() {
    for (dtype, name, tolerance) in [(DType::F32, "float", 1e-5), (DType::BF16, "bf16", 1e-5)] {
        for kind in 0..4 {
            for rows in [32usize, 27] {
                let (a, b) = (randn(&[32, 32], dtype, 1), randn(&[32, 32], dtype, 2));
                let y = run(named(&format!("product<{name}, {kind}>"), 64), &[32, 16], 12 * 1024, rows as u32, &a, &b).unwrap();
                let (a, b): (Vec<f64>, Vec<f64>) = (a.to_vec().unwrap(), b.to_vec().unwrap());
                let b = |i: usize, j: usize| if i < rows { b[i * 32 + j] } else { 0.0 };
                let abt = |i: usize, j: usize| (0..32).map(|k| a[i * 32 + k] * b(j, k)).sum::<f64>();
                for i in 0..32 {
                    for j in 0..16 {
                        let rounded = |x: f64| if dtype == DType::BF16 { engine::half::bf16::from_f64(x).to_f64() } else { x };
                        let want: f64 = match kind {
                            0 => abt(i, j),
                            1 => (0..32).map(|k| a[i * 32 + k] * b(k, j)).sum(),
                            2 => (0..32).map(|k| a[k * 32 + i] * b(k, j)).sum(),
                            _ => (0..16).map(|k| rounded(abt(i, k)) * b(k, j)).sum(),
                        };
                        let slack = if kind == 3 && dtype == DType::BF16 { 0.1 } else { tolerance };
                        assert!(
                            (y[i * 16 + j] as f64 - want).abs() <= slack * want.abs().max(1.0),
                            "{name} {kind} {i} {j}: {} {want}",
                            y[i * 16 + j]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn collectives_reach_all_lanes() {
    let a = randn(&[96], DType::F32, 1);
    let y = run(named("collectives<0>", 96), &[5], 0, 0, &a, &a).unwrap();
    let a: Vec<f32> = a.to_vec().unwrap();
    assert!((y[0] - a.iter().sum::<f32>()).abs() < 1e-4);
    assert_eq!(y[1..], [a.iter().fold(f32::MIN, |m, x| m.max(*x)), 11.0, a[32], a[37]]);
}

#[test]
fn faults_of_kernels_are_noticed() {
    let a = randn(&[256], DType::F32, 1);
    let fault = |kind: u32, shared: u32| run(named(&format!("fault<{kind}>"), 64), &[64], shared, 0, &a, &a);
    let message = |r: Result<Vec<f32>>| r.unwrap_err().to_string();
    let m = message(fault(0, 0));
    assert!(m.contains("emulator.cu:fault<0>") && m.contains("ballot") && m.contains("sync"), "{m}");
    assert!(fault(1, 256).unwrap().iter().all(|x| x.is_nan()));
    let m = message(fault(2, 0));
    assert!(m.contains("past the end"), "{m}");
    assert!(fault(3, 1024).unwrap().iter().all(|x| x.is_nan()));
    let m = message(fault(4, 0));
    assert!(m.contains("shuffle_xor") && m.contains("shuffle"), "{m}");
    let m = message(fault(1, 228 * 1024));
    assert!(m.contains("shared memory") && m.contains("fault<1>"), "{m}");
}

#[test]
fn messages_say_what_to_do() {
    let a = randn(&[32], DType::F32, 1);
    let m = run(Kernel::new(&BROKEN, "broken<float>", 32), &[32], 0, 0, &a, &a).unwrap_err().to_string();
    assert!(m.contains("broken.cu") && m.contains("| ") && m.contains("no_such_name"), "{m}");
    let m = run(named("axpy<f16>", 64), &[32], 0, 0, &a, &a).unwrap_err().to_string();
    assert!(m.contains("not in its source's list"), "{m}");
    #[cfg(target_os = "linux")]
    if cuda::available().is_err() {
        assert!(cuda::device(0).unwrap_err().to_string().contains("libcuda"));
    }
    let m =
        run_on(Run { kernel: axpy(DType::F32), out: Meta::new(&[1], DType::F32), grid: 1, shared: 0, n: 1 }, &Device::cpu(), &[&a, &a]).unwrap_err();
    assert!(matches!(m, Error::NoKernel { .. }), "{m}");
}

#[test]
fn parameters_of_another_size_are_refused() {
    params! { struct Short { a: Ptr, n: u32 } }
    let d = cuda::emulator_with_memory(1 << 20).unwrap();
    let m = Cuda::of(&d).unwrap().launch(&axpy(DType::F32), [1, 1, 1], 0, &Short { a: Ptr::NULL, n: 0 }).unwrap_err().to_string();
    assert!(m.contains("32 bytes") && m.contains("16"), "{m}");
}

#[test]
fn memory_is_reused_and_its_end_is_told() {
    let d = cuda::emulator_with_memory(1 << 20).unwrap();
    let c = Cuda::of(&d).unwrap();
    let zeros = |n: usize| Tensor::from_slice(&vec![0u8; n], &[n], &d);
    let a = zeros(300_000).unwrap();
    let first = c.stats();
    assert!(first.live >= 300_000 && first.live < 350_000 && first.cached == 0);
    drop(a);
    assert_eq!((c.stats().live, c.stats().cached), (0, first.live));
    let b = zeros(299_000).unwrap();
    assert_eq!((c.stats().live, c.stats().cached), (first.live, 0));
    drop(b);
    // fits only when what is kept goes back first
    let all = zeros(900_000).unwrap();
    let m = zeros(600_000).unwrap_err().to_string();
    assert!(m.contains("600000 bytes requested") && m.contains("live") && m.contains("largest cached block"), "{m}");
    drop(all);
    c.trim();
    assert_eq!(c.stats().cached, 0);
}

#[test]
fn uploads_reuse_blocks_of_their_own() {
    let d = cuda::emulator_with_memory(1 << 20).unwrap();
    let c = Cuda::of(&d).unwrap();
    let place = |t: &Tensor| {
        #[derive(Debug)]
        struct Where;
        impl Op for Where {
            fn name(&self) -> &'static str {
                "where"
            }
            fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
                Ok(vec![Meta::new(&[1], DType::I64)])
            }
        }
        cuda_kernel!(Where => |_, cuda, x, y| {
            let bytes = Ptr::of(&x[0])?.0.to_ne_bytes();
            bytes.iter().enumerate().try_for_each(|(i, b)| cuda.fill(Ptr::of(&y[0])?.byte_add(i), *b, 1))
        });
        run1(Where, &[t]).unwrap().to_vec::<i64>().unwrap()[0]
    };
    let batch = |v: f32| Tensor::from_slice(&[v; 300], &[300], &d).unwrap();
    let first = batch(1.0);
    let at = place(&first);
    drop(first);
    // what is computed takes other blocks, though one of this size is free
    let computed = Tensor::full(2.0, &[300], DType::F32, &d).unwrap();
    assert_ne!(place(&computed), at);
    let second = batch(3.0);
    assert_eq!(place(&second), at);
    assert_eq!(second.to_vec::<f32>().unwrap(), [3.0; 300]);
    assert_eq!(computed.to_vec::<f32>().unwrap(), [2.0; 300]);
    drop((second, computed));
    assert!(c.stats().live == 0 && c.stats().cached >= 2400);
    c.trim();
    assert_eq!((c.stats().cached, c.device_memory().unwrap().0), (0, 1 << 20));
}

/// Of every element size, alone and under capture, where a constant is no upload.
#[test]
fn constants_are_filled_on_the_device() {
    let d = emulator_alone();
    for dtype in [DType::U8, DType::F16, DType::BF16, DType::U32, DType::F32, DType::I64, DType::F64] {
        for value in [0.0, 1.0, 77.0] {
            let g = Graph::capture(&d, 1, || Tensor::full(value, &[3, 5], dtype, &d)).unwrap();
            g.replay().unwrap();
            assert_eq!(g.output.to_vec::<f64>().unwrap(), [value; 15], "{dtype}");
            assert_eq!(Tensor::full(value, &[3, 5], dtype, &d).unwrap().to_vec::<f64>().unwrap(), [value; 15], "{dtype}");
        }
    }
    assert_eq!(Tensor::zeros(&[0, 3], DType::F32, &d).unwrap().to_vec::<f32>().unwrap(), []);
    assert_eq!(Tensor::from_slice(&[0f32; 0], &[0], &d).unwrap().to_vec::<f32>().unwrap(), []);
}

#[test]
fn an_upload_in_a_recording_is_an_error() {
    let d = emulator_alone();
    let a = randn(&[64], DType::F32, 1);
    let on = a.to_device(&d).unwrap();
    let mut calls = 0;
    // in the warm-up it is none
    let m = Graph::capture(&d, 2, || {
        calls += 1;
        let op = Run { kernel: axpy(DType::F32), out: on.meta(), grid: 1, shared: 0, n: 64 };
        run1(op, &[&on, &on])?;
        a.to_device(&d)
    });
    let m = m.err().unwrap().to_string();
    assert!(calls == 3 && m.contains("upload of 256 bytes") && m.contains("test kernel") && m.contains("assign()"), "{m}");
    assert_eq!(a.to_device(&d).unwrap().to_vec::<f32>().unwrap(), a.to_vec::<f32>().unwrap());
}

#[test]
fn memory_of_a_graph_is_counted_and_given_back() {
    let d = emulator_alone();
    let c = Cuda::of(&d).unwrap();
    let x = Tensor::full(1.5, &[1000], DType::F32, &d).unwrap();
    let before = c.stats();
    let g = Graph::capture(&d, 1, || x.mul(&x)?.add(&x)?.sum(&[0], false)).unwrap();
    g.replay().unwrap();
    assert!(c.stats().graphs >= 8000 && c.stats().peak > before.live, "{:?}", c.stats());
    assert_eq!(c.stats().live - before.live, 256, "the result, {:?}", c.stats());
    // a result that outlives its graph is memory like any other when it is dropped
    let y = g.output.clone();
    drop(g);
    assert_eq!((c.stats().graphs, y.item().unwrap()), (0, 3750.0));
    let cached = c.stats().cached;
    drop(y);
    assert_eq!(c.stats().cached, cached + 256);
    assert_eq!(c.stats().live, before.live);
}

#[test]
fn a_graph_repeats_what_it_captured() {
    let d = emulator_alone();
    let [a, b] = [1, 2].map(|s| randn(&[64], DType::F32, s).to_device(&d).unwrap());
    let total = Tensor::from_slice(&[0f32; 64], &[64], &d).unwrap();
    let c = Cuda::of(&d).unwrap();
    let mut step = || {
        let op = Run { kernel: axpy(DType::F32), out: a.meta(), grid: 1, shared: 0, n: 64 };
        let y = run1(op, &[&a, &b])?;
        let op = Run { kernel: axpy(DType::F32), out: a.meta(), grid: 1, shared: 0, n: 64 };
        run1(op, &[&y, &total])
    };
    let eager: Vec<f32> = step().unwrap().to_vec().unwrap();
    let g = Graph::capture(&d, 1, &mut step).unwrap();
    assert_eq!(g.nodes(), 2);
    g.replay().unwrap();
    assert_eq!(g.output.to_vec::<f32>().unwrap(), eager);
    // memory that others take meanwhile is not the graph's
    let other: Vec<Tensor> = (0..8).map(|_| Tensor::from_slice(&[7f32; 64], &[64], &d).unwrap()).collect();
    g.replay().unwrap();
    assert_eq!(g.output.to_vec::<f32>().unwrap(), eager);
    assert!(other.iter().all(|t| t.to_vec::<f32>().unwrap() == [7f32; 64]));
    drop(g);
    let m = Graph::capture(&d, 1, || step()?.to_vec::<f32>()).err().unwrap().to_string();
    assert!(m.contains("test kernel") && m.contains("download"), "{m}");
    // and the device works on
    assert_eq!(step().unwrap().to_vec::<f32>().unwrap(), eager);
    let ((), t) = c.time(|| step().map(drop)).unwrap();
    assert!(!t.is_zero());
}

fn emulator_alone() -> Device {
    cuda::emulator_with_memory(1 << 26).unwrap()
}

/// A product as an op, into its target.
#[derive(Debug)]
struct Product(Gemm);
impl Op for Product {
    fn name(&self) -> &'static str {
        "gemm"
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![Meta::new(&[self.0.batch, self.0.m, self.0.n], self.0.c_dtype)])
    }
}
fn product(g: &Product, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    cuda.gemm(&Gemm { a: Ptr::of(&x[0])?.0, b: Ptr::of(&x[1])?.0, c: Ptr::of(&y[0])?.0, ..g.0 })
}
cuda_kernel!(Product => product);

#[test]
fn products_take_every_transpose_and_accumulate() {
    let d = emulator();
    // the last two into a result, or a gradient, of more bits
    let dtypes = [DType::F64, DType::F32, DType::BF16, DType::F16].map(|d| (d, d));
    for (dtype, c_dtype) in dtypes.into_iter().chain([(DType::BF16, DType::F32), (DType::F16, DType::F32)]) {
        for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
            for (m, n, k, batch) in [(5, 7, 9, 2), (4, 3, 0, 2), (1, 6, 33, 1)] {
                let (a, b) = (
                    randn(&[batch, if ta { k } else { m }, if ta { m } else { k }], dtype, 1),
                    randn(&[if tb { n } else { k }, if tb { k } else { n }], dtype, 2),
                );
                let start = randn(&[batch, m, n], c_dtype, 3);
                let t = |x: &Tensor, yes: bool, r: usize| if yes { x.transpose(r - 2, r - 1).unwrap() } else { x.clone() };
                let f = |x: &Tensor| x.cast(DType::F64).unwrap();
                let want = f(&t(&a, ta, 3)).matmul(&f(&t(&b, tb, 2))).unwrap();
                for accumulate in [false, true] {
                    let (a, b, y) = (a.to_device(&d).unwrap(), b.to_device(&d).unwrap(), start.to_device(&d).unwrap());
                    let g = Gemm {
                        c_dtype,
                        batch,
                        a_trans: ta,
                        b_trans: tb,
                        a_ld: if ta { m } else { k.max(1) },
                        b_ld: if tb { k.max(1) } else { n },
                        b_stride: 0,
                        accumulate,
                        ..Gemm::new(dtype, (m, n, k), 0, 0, 0)
                    };
                    engine::run_in_place(Product(g), &[&y], &[&a, &b]).unwrap();
                    let want = if accumulate { want.add(&f(&start)).unwrap() } else { want.clone() };
                    let (y, want): (Vec<f64>, Vec<f64>) = (y.to_vec().unwrap(), want.to_vec().unwrap());
                    // half a unit in the last place for the rounding of the result, and little for sums in f32
                    let tolerance = match c_dtype {
                        DType::F64 => 1e-12,
                        DType::F32 => 1e-5,
                        DType::BF16 => 1.0 / 256.0 + 1e-5,
                        _ => 1.0 / 2048.0 + 1e-5,
                    };
                    let ok = y.iter().zip(&want).all(|(y, w)| (y - w).abs() <= tolerance * w.abs().max(1.0));
                    assert!(ok, "{dtype} {c_dtype} {ta} {tb} {m} {n} {k} {accumulate}");
                }
            }
        }
    }
    let c = Cuda::of(&d).unwrap();
    assert!(c.is_emulator() && c.arch() == 80);
}

/// In halves a sum of ones would stop at 256 (bf16) or 2048 (f16), and one of f16 would overflow on the way.
#[test]
fn sums_of_halves_are_f32() {
    let d = emulator();
    for dtype in [DType::BF16, DType::F16] {
        let ones = Tensor::ones(&[4096], dtype, &d).unwrap();
        let y = ones.reshape(&[1, 4096]).unwrap().matmul(&ones.reshape(&[4096, 1]).unwrap()).unwrap();
        assert_eq!(y.item().unwrap(), 4096.0);
        let big = Tensor::from_vec([6e4, 6e4, -6e4], &[1, 3]).unwrap().cast(dtype).unwrap().to_device(&d).unwrap();
        let one = Tensor::ones(&[3, 1], dtype, &d).unwrap();
        assert_eq!(big.matmul(&one).unwrap().item().unwrap(), big.narrow(1, 0, 1).unwrap().item().unwrap());
        assert_eq!(big.sum(&[0, 1], false).unwrap().item().unwrap(), big.narrow(1, 0, 1).unwrap().item().unwrap());
    }
}

#[test]
fn a_plan_lists_the_kernels_of_a_step_and_computes_nothing() {
    let d = emulator_alone();
    let c = Cuda::of(&d).unwrap();
    let w = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0], &[2, 2], &d).unwrap();
    let x = Tensor::ones(&[2, 2], DType::F32, &d).unwrap();
    let step = || -> Result<Tensor> {
        let leaf = w.requires_grad();
        let loss = x.matmul(&leaf)?.silu()?.sum_all()?;
        let g = loss.backward()?;
        engine::no_grad(|| w.assign(&w.sub(g.get(&leaf).expect("a gradient"))?))?;
        Ok(loss.detach())
    };
    let (kernels, r) = c.plan(step);
    r.unwrap();
    let calls: Vec<String> = kernels.iter().map(|k| k.call.to_string()).collect();
    assert!(["unary<float>", "unary_backward<float>", "binary<float>"].iter().all(|k| calls.iter().any(|c| c == k)), "{calls:?}");
    assert_eq!(w.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    c.prepare(&kernels).unwrap();
    assert!(step().unwrap().item().unwrap() > 0.0);
    assert_ne!(w.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    // what reads a result ends it, and the list holds what came before
    let (kernels, r) = c.plan(|| x.exp()?.to_vec::<f32>());
    let m = r.unwrap_err().to_string();
    assert!(m.contains("download") && m.contains("planned") && kernels.len() == 1, "{m} {kernels:?}");
    // and the device works on
    assert_eq!(x.to_vec::<f32>().unwrap(), [1.0; 4]);
}
