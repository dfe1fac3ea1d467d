//! Launches on CUDA; the algorithm is at the head of swiglu.cu.

use super::{SwiGlu, SwiGluBackward};
use crate::cuda::{FLOATS, aligned, blocks, float};
use cuda::kernel::cpp;
use cuda::{Cuda, FastDiv, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "swiglu.cu", kernels: kernels, headers: ["../ops.cuh"]);

params! { struct SwiGluParams { x: Ptr, dy: Ptr, out: Ptr, n: u64, per_row: FastDiv, width: u32, wide: u32, many: u32 } }

const THREADS: u32 = 256;

fn kernel(pass: &str, dtype: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("swiglu_{pass}<{}>", cpp(dtype)), THREADS).min_blocks(4)
}
fn kernels() -> Vec<Kernel> {
    ["forward", "backward"].into_iter().flat_map(|p| FLOATS.map(|d| kernel(p, d))).collect()
}

fn launch(cuda: &Cuda, pass: &str, x: &[View], y: &[View]) -> Result<()> {
    let dtype = float("swiglu", "x", &x[0])?;
    let width = x[0].layout.shape.last().map_or(0, |d| d / 2);
    if width == 0 {
        return Ok(());
    }
    let per_row = width.div_ceil(16 / dtype.size());
    let n = x[0].layout.numel() / (2 * width) * per_row;
    let views: Vec<&View> = x.iter().chain(y).collect();
    let wide = (width * dtype.size()).is_multiple_of(16) && aligned(16, &views)?;
    let p = SwiGluParams {
        x: Ptr::of(&x[0])?,
        dy: Ptr::of_option(x.get(1))?,
        out: Ptr::of(&y[0])?,
        n: n as u64,
        per_row: FastDiv::new(per_row),
        width: width as u32,
        wide: wide as u32,
        many: (n > i32::MAX as usize) as u32,
    };
    cuda.launch(&kernel(pass, dtype), [blocks("swiglu", n, THREADS as usize)?, 1, 1], 0, &p)
}
cuda_kernel!(SwiGlu => |_, cuda, x, y| launch(cuda, "forward", x, y));
cuda_kernel!(SwiGluBackward => |_, cuda, x, y| launch(cuda, "backward", x, y));
