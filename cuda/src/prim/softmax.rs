//! Softmax, its logarithm, and the gradient.

use super::FLOATS;
use crate::kernel::cpp;
use crate::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{Softmax, SoftmaxBackward};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "softmax.cu", kernels: kernels, headers: ["prim.cuh"]);
params! { struct SoftmaxParams { x: Ptr, dy: Ptr, out: Ptr, rows: u64, cols: u64, log: u32, unused: u32 } }

const THREADS: u32 = 256;
/// Rows shorter than this are a warp's.
const SHORT: usize = 1024;

fn kernel(name: &str, d: DType, warp: bool) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{}, {warp}>", cpp(d)), THREADS)
}
fn kernels() -> Vec<Kernel> {
    let names = ["softmax", "softmax_backward"].into_iter();
    names.flat_map(|n| FLOATS.into_iter().flat_map(move |d| [false, true].map(|w| kernel(n, d, w)))).collect()
}

fn launch(cuda: &Cuda, name: &str, log: bool, x: &[View], y: &[View]) -> Result<()> {
    let (rows, cols) = (x[0].layout.shape[0], x[0].layout.shape[1]);
    let (x0, dy, out) = (Ptr::of(&x[0])?, Ptr::of_option(x.get(1))?, Ptr::of(&y[0])?);
    let p = SoftmaxParams { x: x0, dy, out, rows: rows as u64, cols: cols as u64, log: log as u32, unused: 0 };
    let warp = cols < SHORT;
    let blocks = if cols == 0 { 0 } else if warp { rows.div_ceil(THREADS as usize / 32) } else { rows };
    cuda.launch(&kernel(name, x[0].dtype, warp), [blocks as u32, 1, 1], 0, &p)
}
cuda_kernel!(Softmax => |op, cuda, x, y| launch(cuda, "softmax", op.log, x, y));
cuda_kernel!(SoftmaxBackward => |op, cuda, x, y| {
    // the op takes any shape; rows are those of a matrix
    let (c, rows) = (x[0].layout.shape.last().copied().unwrap_or(1), x[0].layout.numel());
    let matrix = engine::Layout::contiguous(&[rows / c.max(1), c]);
    fn flat<'a>(v: &View<'a>, layout: &'a engine::Layout) -> View<'a> {
        View { buf: v.buf, layout, dtype: v.dtype }
    }
    let at = |v: &View| engine::Layout { offset: v.layout.offset, ..matrix.clone() };
    let (l0, l1, ly) = (at(&x[0]), at(&x[1]), at(&y[0]));
    launch(cuda, "softmax_backward", op.log, &[flat(&x[0], &l0), flat(&x[1], &l1)], &[flat(&y[0], &ly)])
});
