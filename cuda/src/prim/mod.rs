//! The primitive ops' kernels: one Rust file and one source for each family. What is common: views as loop nests, and launches by the number of elements.

mod cast;
mod copy;
mod elementwise;
mod index;
mod matmul;
mod reduce;
mod softmax;
mod sort;

use crate::kernel::Plain;
use crate::{FastDiv, Kernel};
use engine::{DType, Error, Layout, Result};

/// Axes that a view may have after neighbouring ones were merged.
const MAX_DIMS: usize = 8;
/// Threads of a block of the elementwise kernels.
const THREADS: u32 = 256;

const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];
const ALL: [DType; 8] = [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::I32, DType::U32, DType::U8];

/// Up to three views of one shape, as prim.cuh reads them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Nest {
    n: u64,
    dims: u32,
    wide: u32,
    size: [FastDiv; MAX_DIMS],
    length: [u64; MAX_DIMS],
    stride: [[i64; MAX_DIMS]; 3],
}
// SAFETY: repr(C), plain numbers.
unsafe impl Plain for Nest {}

impl Nest {
    /// The views, read in row-major order of their common shape.
    fn new(op: &'static str, views: &[&Layout]) -> Result<Nest> {
        let dense = Layout::contiguous(&views[0].shape);
        Self::from_merged(op, Layout::merged(&[views, &[&dense]].concat()))
    }
    fn from_merged(op: &'static str, (shape, strides): (Vec<usize>, Vec<Vec<isize>>)) -> Result<Nest> {
        if shape.len() > MAX_DIMS {
            return Err(Error::invalid(op, format!("views of more than {MAX_DIMS} axes that can't be merged are not supported on CUDA: {shape:?}")));
        }
        let n: usize = shape.iter().product();
        let wide = n >= 1 << 31;
        let mut nest = Nest {
            n: n as u64,
            dims: shape.len() as u32,
            wide: wide as u32,
            size: [FastDiv::new(1); MAX_DIMS],
            length: [1; MAX_DIMS],
            stride: [[0; MAX_DIMS]; 3],
        };
        for (d, len) in shape.iter().enumerate() {
            nest.size[d] = FastDiv::new(*len);
            nest.length[d] = *len as u64;
            for (k, s) in strides.iter().take(3).enumerate() {
                nest.stride[k][d] = s[d] as i64;
            }
        }
        Ok(nest)
    }
}

/// Blocks for `n` elements, `per` to a thread of a kernel.
fn blocks(k: &Kernel, n: usize, per: usize) -> [u32; 3] {
    [n.div_ceil(per * k.threads as usize).min(u32::MAX as usize) as u32, 1, 1]
}

/// (product before the axis, its length, product after it)
fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}
