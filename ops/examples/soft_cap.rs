//! A user's fused op in one file, outside the engine: soft-capping, y = c · tanh(x / c), as Gemma 2 applies it to logits (2408.00118, §2).
//!
//! Its CUDA source is soft_cap.cu, beside. Run it: `cargo run --release -p tidegate-ops --example soft_cap`. The walk-through is docs/extend.md.

use cuda::kernel::{cpp, one_of};
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::cpu::simd::Real;
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Device, Error, Meta, Op, Result, Saved, Tensor, View, gradcheck, run1, vectorized};

// 1. The contract: attributes, what comes out, what backward reads. No device, no memory.

/// y = cap · tanh(x / cap) for a float tensor of any shape.
#[derive(Debug, Clone, Copy)]
pub struct SoftCap {
    /// The bound that |y| never exceeds.
    pub cap: f64,
}

impl Op for SoftCap {
    fn name(&self) -> &'static str {
        "soft_cap"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if self.cap.is_nan() || self.cap <= 0.0 {
            return Err(Error::invalid("soft_cap", format!("cap must be positive, found {}", self.cap)));
        }
        if !x[0].dtype.is_float() {
            return Err(Error::dtype("soft_cap", "x", "a float dtype", x[0].dtype));
        }
        Ok(vec![x[0].clone()])
    }
    // dy/dx = 1 − (y/cap)²: the output is enough, the input can be freed
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], vec![0])
    }
    fn backward(&self, saved: &Saved, dy: &[Option<Tensor>], _need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None]) };
        Ok(vec![Some(run1(SoftCapBackward(*self), &[saved.output(0)?, dy])?)])
    }
}

// 2. The backward is an op like any other, with a kernel of its own.

/// dx = dy · (1 − (y/cap)²): inputs y and dy.
#[derive(Debug, Clone, Copy)]
pub struct SoftCapBackward(SoftCap);

impl Op for SoftCapBackward {
    fn name(&self) -> &'static str {
        "soft_cap_backward"
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![x[0].clone()])
    }
}

// 3. The kernels: plain loops, compiled for each vector level; f64 and f32 from one source, halves are computed in f32.

vectorized! {
    fn forward_loop[F: Real](cap: F, x: &[F], y: &mut [F]) {
        for (y, x) in y.iter_mut().zip(x) { *y = cap * (*x / cap).tanh() }
    }
    fn backward_loop[F: Real](cap: F, y: &[F], dy: &[F], dx: &mut [F]) {
        for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) { let t = *y / cap; *dx = *dy * (F::ONE - t * t) }
    }
}

fn forward<F: Real>(op: &SoftCap, x: &Inputs, y: &mut Outputs) -> Result<()> {
    forward_loop(F::from_f64(op.cap), &x.real::<F>(0)?, &mut y.real::<F>(0)?);
    Ok(())
}
fn backward<F: Real>(op: &SoftCapBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    backward_loop(F::from_f64(op.0.cap), &x.real::<F>(0)?, &x.real::<F>(1)?, &mut y.real::<F>(0)?);
    Ok(())
}

// 4. Two rows in the kernel registry, collected when the program is linked.

engine::cpu_kernel!(SoftCap => |op, x, y| engine::dispatch_real!(x.dtype(0), |F| forward::<F>(op, x, y)));
engine::cpu_kernel!(SoftCapBackward => |op, x, y| engine::dispatch_real!(x.dtype(0), |F| backward::<F>(op, x, y)));

// 5. The same two ops on CUDA: the source with all its instantiations, what a kernel is handed, and two more rows.

cuda_source!(static SOURCE = "soft_cap.cu", kernels: kernels);

params! { struct SoftCapParams { a: Ptr, dy: Ptr, out: Ptr, n: u64, cap: f32 } }

const THREADS: u32 = 256;

fn kernel(pass: &str, dtype: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("soft_cap_{pass}<{}>", cpp(dtype)), THREADS)
}
fn kernels() -> Vec<Kernel> {
    ["forward", "backward"].into_iter().flat_map(|p| [kernel(p, DType::F32), kernel(p, DType::BF16)]).collect()
}
fn launch(cuda: &Cuda, pass: &str, cap: f64, x: &[View], y: &[View]) -> Result<()> {
    let dtype = one_of("soft_cap", "x", x[0].dtype, &[DType::F32, DType::BF16])?;
    let n = y[0].layout.numel();
    let p = SoftCapParams { a: Ptr::of(&x[0])?, dy: Ptr::of_option(x.get(1))?, out: Ptr::of(&y[0])?, n: n as u64, cap: cap as f32 };
    let per_block = THREADS as usize * 16 / dtype.size();
    cuda.launch(&kernel(pass, dtype), [n.div_ceil(per_block) as u32, 1, 1], 0, &p)
}
cuda_kernel!(SoftCap => |op, cuda, x, y| launch(cuda, "forward", op.cap, x, y));
cuda_kernel!(SoftCapBackward => |op, cuda, x, y| launch(cuda, "backward", op.0.cap, x, y));

// 6. The function that people call.

/// y = cap · tanh(x / cap).
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
    run1(SoftCap { cap }, &[x])
}

// 6. The definition, from primitive ops, and one line by which `tidegate doctor` and any test of a backend find both.

fn reference(x: &Tensor, cap: f64) -> Result<Tensor> {
    x.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)
}

engine::self_test!("soft_cap", [[7, 33]], |x| Ok(vec![soft_cap(&x[0], CAP)?]) => |x| Ok(vec![reference(&x[0], CAP)?]));

const CAP: f64 = 1.5;

/// The largest RMS(difference) / RMS(reference) of the output and of the gradient that pass.
const BOUNDS: [(DType, f64); 4] = [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 0.005), (DType::F16, 0.001)];

fn main() -> Result<()> {
    let x = Tensor::randn(&[7, 33], DType::F64, &Device::cpu(), 1, 0)?;
    let report = gradcheck(|x| Ok(vec![soft_cap(&x[0], CAP)?]), std::slice::from_ref(&x), 1e-5)?;
    println!("gradient against central differences: worst error {:.1e}", report.worst);
    report.within(1e-8)?;

    // an error that leaves `main` makes the exit code 1
    let test = engine::self_tests().into_iter().find(|t| t.name == "soft_cap").expect("the row above is linked in");
    for (dtype, bound) in BOUNDS {
        let error = test.run(&Device::cpu(), dtype)?;
        println!("{dtype} against the reference in f64, output and gradient: {error:.1e}, at most {bound:.0e}");
        if error.is_nan() || error > bound {
            return Err(Error::invalid("soft_cap", format!("in {dtype} differs from its reference by {error:e}, at most {bound:e} is right")));
        }
    }

    match soft_cap(&x, -1.0) {
        Ok(_) => return Err(Error::invalid("soft_cap", "took a negative cap")),
        Err(e) => println!("a bad attribute: {e}"),
    }
    match cuda::device(0).or_else(|_| cuda::emulator()) {
        Err(e) => println!("no CUDA: {e}"),
        Ok(device) => {
            for (dtype, bound) in [(DType::F32, 1e-6), (DType::BF16, 5e-3)] {
                let error = test.run(&device, dtype)?;
                println!("{dtype} on {}: {error:.1e}, at most {bound:.0e}", device.name());
                if error.is_nan() || error > bound {
                    return Err(Error::invalid("soft_cap", format!("on {} in {dtype} differs from its reference by {error:e}", device.name())));
                }
            }
        }
    }
    Ok(())
}
