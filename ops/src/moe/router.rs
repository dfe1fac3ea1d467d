//! The router's logits: in f32 from tokens in bf16, as rounding them would choose other experts.

use crate::cuda::blocks;
use cuda::kernel::one_of;
use cuda::memory::CudaBuffer;
use cuda::{Cuda, FastDiv, Gemm, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::cpu::gemm::{gemm, gemm_few};
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Error, Meta, Op, Result, Saved, Tensor, View, cpu_kernel, run, run1};
use std::ops::RangeInclusive;

/// `x Wᵀ` of x `[N, H]` in bf16 and W `[E, H]` in f32, in f32.
#[derive(Debug)]
pub struct RouterLogits;

impl Op for RouterLogits {
    fn name(&self) -> &'static str {
        "router_logits"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "router_logits";
        let [n, h] = x[0].shape[..] else { return Err(Error::shape(op, "x", "[tokens, hidden]", &x[0].shape)) };
        let [e, hh] = x[1].shape[..] else { return Err(Error::shape(op, "weight", "[experts, hidden]", &x[1].shape)) };
        if hh != h {
            return Err(Error::shape(op, "weight", format!("[experts, {h}]"), &x[1].shape));
        }
        for (m, name, dtype) in [(&x[0], "x", DType::BF16), (&x[1], "weight", DType::F32)] {
            if m.dtype != dtype {
                return Err(Error::dtype(op, name, dtype.to_string(), m.dtype));
            }
        }
        Ok(vec![Meta::new(&[n, e], DType::F32)])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0, 1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; 2]) };
        Ok(run(RouterLogitsBackward, &[s.input(0)?, s.input(1)?, dy])?.into_iter().map(Some).collect())
    }
}

/// Gradients of x (bf16) and W (f32); inputs: both, dy.
#[derive(Debug)]
pub struct RouterLogitsBackward;

impl Op for RouterLogitsBackward {
    fn name(&self) -> &'static str {
        "router_logits_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x[..2].to_vec())
    }
}

/// Router logits `[N, E]` of x `[N, H]` by W `[E, H]`, `x Wᵀ` computed and given in f32 (f64 for f64).
pub fn router_logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let wide = crate::dtypes::sums(x.dtype());
    let weight = weight.cast(wide)?;
    if x.dtype() == DType::BF16 { run1(RouterLogits, &[x, &weight]) } else { x.cast(wide)?.linear(&weight) }
}

/// (N, H, E)
fn sizes(x: &[usize], weight: &[usize]) -> (usize, usize, usize) {
    (x[0], x[1], weight[0])
}

cpu_kernel!(RouterLogits => |_, x, y| {
    let (n, h, e) = sizes(x.shape(0), x.shape(1));
    gemm_few(n, e, h, 1.0, &x.real::<f32>(0)?, (h, 1), &x.real::<f32>(1)?, (1, h), 0.0, &mut y.real::<f32>(0)?, e);
    Ok(())
});
cpu_kernel!(RouterLogitsBackward => on_cpu);

fn on_cpu(_: &RouterLogitsBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (n, h, e) = sizes(x.shape(0), x.shape(1));
    let (v, w, dy) = (x.real::<f32>(0)?, x.real::<f32>(1)?, x.real::<f32>(2)?);
    let (mut dx, mut dw) = (y.real::<f32>(0)?, y.real::<f32>(1)?);
    gemm(n, h, e, 1.0, &dy, (e, 1), &w, (h, 1), 0.0, &mut dx, h);
    gemm(e, h, n, 1.0, &dy, (1, e), &v, (h, 1), 0.0, &mut dw, h);
    Ok(())
}

cuda_source!(static ROUTER = "router.cu", kernels: || vec![kernel("split"), kernel("add_parts")]);

params! {
    struct SplitParams { x: Ptr, parts: Ptr, cols: FastDiv, n: u32, slots: u32, which: u32 }
    struct AddParams { parts: Ptr, y: Ptr, cols: FastDiv, n: u32 }
}

const THREADS: u32 = 256;
const NAME: &str = "router_logits";

fn kernel(name: &str) -> Kernel {
    Kernel::new(&ROUTER, format!("{name}<0>"), THREADS)
}

/// The parts `which` of a matrix in f32 `[rows, cols]`, as bf16 `[rows, which, cols]`.
fn split(cuda: &Cuda, x: Ptr, [rows, cols]: [usize; 2], which: &[u32]) -> Result<(CudaBuffer, Ptr)> {
    let n = rows * cols;
    let (held, parts) = cuda.scratch(2 * which.len() * n)?;
    let bits = which.iter().enumerate().map(|(i, part)| part << (2 * i)).sum();
    let p = SplitParams { x, parts, cols: FastDiv::new(cols), n: n as u32, slots: which.len() as u32, which: bits };
    cuda.launch(&kernel("split"), [blocks(NAME, n, THREADS as usize)?, 1, 1], 0, &p)?;
    Ok((held, parts))
}

/// y `[rows, cols]` = the sum of the three parts of `[rows, 3, cols]`.
fn add_parts(cuda: &Cuda, parts: Ptr, [rows, cols]: [usize; 2], y: Ptr) -> Result<()> {
    let n = rows * cols;
    let p = AddParams { parts, y, cols: FastDiv::new(cols), n: n as u32 };
    cuda.launch(&kernel("add_parts"), [blocks(NAME, n, THREADS as usize)?, 1, 1], 0, &p)
}

/// The sizes, and whether nothing is to be summed: outputs are then zero.
fn checked(x: &[View], y: &[View], cuda: &Cuda) -> Result<Option<(usize, usize, usize)>> {
    one_of(NAME, "x", x[0].dtype, &[DType::BF16])?;
    let (n, h, e) = sizes(&x[0].layout.shape, &x[1].layout.shape);
    if n * h * e == 0 {
        return y.iter().try_for_each(|y| super::cuda::zero(cuda, y)).map(|()| None);
    }
    if [n, h].iter().any(|m| 3 * e * m > i32::MAX as usize) {
        return Err(Error::invalid(NAME, format!("takes up to 2³¹ / 3 logits and weights on CUDA, found {n} tokens, {e} experts and width {h}")));
    }
    Ok(Some((n, h, e)))
}

cuda_kernel!(RouterLogits => |_, cuda, x, y| {
    let Some((n, h, e)) = checked(x, y, cuda)? else { return Ok(()) };
    let (_w, w) = split(cuda, Ptr::of(&x[1])?, [1, e * h], &[0, 1, 2])?;
    let (_z, z) = cuda.scratch(4 * n * 3 * e)?;
    cuda.gemm(&Gemm { b_trans: true, b_ld: h, c_dtype: DType::F32, ..Gemm::new(DType::BF16, (n, 3 * e, h), Ptr::of(&x[0])?.0, w.0, z.0) })?;
    add_parts(cuda, z, [n, e], Ptr::of(&y[0])?)
});
cuda_kernel!(RouterLogitsBackward => on_cuda);

/// dW as the logits, with dy's three parts. dx is rounded to bf16, so that the products of first and second parts are enough for it: one product over a depth
/// of three times the experts.
fn on_cuda(_: &RouterLogitsBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let Some((n, h, e)) = checked(x, y, cuda)? else { return Ok(()) };
    let (_d, d) = split(cuda, Ptr::of(&x[2])?, [n, e], &[2, 1, 0, 0])?;
    let (_w, w) = split(cuda, Ptr::of(&x[1])?, [1, e * h], &[0, 0, 1])?;
    let dx = Gemm { a_ld: 4 * e, ..Gemm::new(DType::BF16, (n, h, 3 * e), d.byte_add(2 * e).0, w.0, Ptr::of(&y[0])?.0) };
    cuda.gemm(&dx)?;
    let (_z, z) = cuda.scratch(4 * 3 * e * h)?;
    let dw = Gemm::new(DType::BF16, (3 * e, h, n), d.0, Ptr::of(&x[0])?.0, z.0);
    cuda.gemm(&Gemm { a_trans: true, a_ld: 4 * e, c_dtype: DType::F32, ..dw })?;
    add_parts(cuda, z, [1, e * h], Ptr::of(&y[1])?)
}
