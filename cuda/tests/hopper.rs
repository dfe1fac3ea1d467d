//! wgmma in the emulator: products of every layout of the operands against plain sums, and the faults that it has to notice.

use cuda::{Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Device, Meta, Op, Result, Tensor, run1};

cuda_source!(static SOURCE = "hopper.cu", kernels: list);
params! { struct Params { a: Ptr, b: Ptr, c: Ptr, depth: u32 } }

fn kernel(n: usize, [a, b]: [bool; 2], registers: bool, wrong: u32) -> Kernel {
    Kernel::new(&SOURCE, format!("product<{n}, {}, {}, {registers}, {wrong}>", a as u8, b as u8), 128).hopper()
}
fn layouts() -> impl Iterator<Item = ([bool; 2], bool)> {
    [([false, false], false), ([false, true], false), ([true, false], false), ([true, true], false), ([false, false], true), ([false, true], true)]
        .into_iter()
}
fn faults() -> impl Iterator<Item = Kernel> {
    (1..5).map(|wrong| kernel(64, [false, false], false, wrong))
}
fn list() -> Vec<Kernel> {
    [64, 128, 256].into_iter().flat_map(|n| layouts().map(move |(t, registers)| kernel(n, t, registers, 0))).chain(faults()).collect()
}

#[derive(Debug)]
struct Run {
    kernel: Kernel,
    n: usize,
    depth: usize,
}
impl Op for Run {
    fn name(&self) -> &'static str {
        "test kernel"
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![Meta::new(&[64, self.n], DType::F32)])
    }
}
cuda_kernel!(Run => |op, cuda, x, y| {
    let p = Params { a: Ptr::of(&x[0])?, b: Ptr::of(&x[1])?, c: Ptr::of(&y[0])?, depth: op.depth as u32 };
    cuda.launch(&op.kernel, [1, 1, 1], (2 * 128 * (64 + op.n)) as u32, &p)
});

fn devices() -> Vec<Device> {
    let gpu = cuda::device(0).ok().filter(|d| cuda::Cuda::of(d).is_ok_and(|c| c.arch() == 90));
    cuda::hopper_emulator().into_iter().chain(gpu).collect()
}

#[test]
fn products_of_every_layout() {
    let depth = 192;
    let randn = |shape: &[usize], s| Tensor::randn(shape, DType::BF16, &Device::cpu(), 3, s).unwrap();
    for d in devices() {
        for n in [64, 128, 256] {
            for (t, registers) in layouts() {
                let a = randn(&if t[0] { [depth, 64] } else { [64, depth] }, 1);
                let b = randn(&if t[1] { [depth, n] } else { [n, depth] }, 2);
                let op = Run { kernel: kernel(n, t, registers, 0), n, depth };
                let y: Vec<f64> = run1(op, &[&a.to_device(&d).unwrap(), &b.to_device(&d).unwrap()]).unwrap().to_vec().unwrap();
                let (a, b): (Vec<f64>, Vec<f64>) = (a.to_vec().unwrap(), b.to_vec().unwrap());
                for i in 0..64 {
                    for j in 0..n {
                        let at = |k: usize| if t[0] { a[k * 64 + i] } else { a[i * depth + k] };
                        let bt = |k: usize| if t[1] { b[k * n + j] } else { b[j * depth + k] };
                        let want: f64 = (0..depth).map(|k| at(k) * bt(k)).sum();
                        let found = y[i * n + j];
                        assert!((found - want).abs() <= 1e-4, "{} {n} {t:?} {registers} at {i}, {j}: {found}, want {want}", d.name());
                    }
                }
            }
        }
    }
}

#[test]
fn faults_are_noticed() {
    let Ok(d) = cuda::hopper_emulator() else { return println!("SKIPPED: the emulator needs a host C++ compiler") };
    let [a, b] = [1, 2].map(|s| Tensor::randn(&[64, 64], DType::BF16, &d, 3, s).unwrap());
    for (kernel, says) in faults().zip(["fence_async", "wgmma_fence", "overwritten", "not waited for"]) {
        let m = run1(Run { kernel, n: 64, depth: 64 }, &[&a, &b]).unwrap_err().to_string();
        assert!(m.contains(says), "{says}: {m}");
    }
}
