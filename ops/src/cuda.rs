//! What the fused ops share on CUDA; the device's half is `ops.cuh`.

use cuda::kernel::{Plain, cpp, one_of};
use cuda::{Cuda, FastDiv, Kernel, Ptr, Source, params};
use engine::{DType, Error, Layout, Result, View};

/// Leading axes of a strided tensor that a kernel can take, once merged.
const MAX_AXES: usize = 7;

/// `Rows` of ops.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    axes: u32,
    wide: u32,
    size: [FastDiv; MAX_AXES],
    stride: [i64; MAX_AXES],
}
// SAFETY: plain numbers.
unsafe impl Plain for Rows {}

impl Rows {
    /// The rows of a view whose last axis is dense.
    pub fn new(op: &'static str, l: &Layout) -> Result<Rows> {
        let n = l.shape.len().saturating_sub(1);
        let mut axes: Vec<(usize, i64)> = vec![];
        for (d, s) in l.shape[..n].iter().zip(&l.strides).filter(|(d, _)| **d != 1) {
            match axes.last_mut() {
                Some(outer) if outer.1 == *s as i64 * *d as i64 => *outer = (outer.0 * d, *s as i64),
                _ => axes.push((*d, *s as i64)),
            }
        }
        if axes.is_empty() {
            axes.push((1, 0));
        }
        if axes.len() > MAX_AXES {
            return Err(Error::invalid(
                op,
                format!("takes views of up to {MAX_AXES} axes that can't be merged before the last on CUDA, found {l:?}; use contiguous()"),
            ));
        }
        let rows: usize = axes.iter().map(|a| a.0).product();
        let mut r =
            Rows { axes: axes.len() as u32, wide: (rows > i32::MAX as usize) as u32, size: [FastDiv::new(1); MAX_AXES], stride: [0; MAX_AXES] };
        for (i, (d, s)) in axes.into_iter().enumerate() {
            (r.size[i], r.stride[i]) = (FastDiv::new(d), s);
        }
        Ok(r)
    }
}

/// Whether every row of these views starts at a multiple of `to` bytes, so that a kernel may move so many at once.
pub(crate) fn aligned(to: usize, views: &[&View]) -> Result<bool> {
    for v in views {
        let n = v.layout.shape.len().saturating_sub(1);
        let leading = v.layout.shape[..n].iter().zip(&v.layout.strides).filter(|(d, _)| **d > 1);
        let even = leading.map(|(_, s)| *s as usize * v.dtype.size()).all(|bytes| bytes % to == 0);
        if !even || Ptr::of(v)?.0 % to as u64 != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The dtypes that the fused kernels are written for.
pub(crate) const FLOATS: [DType; 2] = [DType::F32, DType::BF16];
/// With a parameter beside it: of the same dtype, or f32.
pub(crate) const PAIRS: [(DType, DType); 3] = [(DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::BF16, DType::F32)];

/// The dtype of an input, if kernels are written for it.
pub(crate) fn float(op: &'static str, arg: &str, v: &View) -> Result<DType> {
    one_of(op, arg, v.dtype, &FLOATS)
}

/// `n` items in blocks of `per`, as the first number of a grid.
pub(crate) fn blocks(op: &'static str, n: usize, per: usize) -> Result<u32> {
    let b = n.div_ceil(per.max(1));
    if b > i32::MAX as usize { Err(Error::invalid(op, format!("{n} items are more than a launch can take"))) } else { Ok(b as u32) }
}

params! { struct ColumnsParams { parts: Ptr, out: Ptr, rows: u32, cols: u32 } }

/// `sum_columns` of a source that includes ops.cuh.
pub(crate) fn columns_kernel(source: &'static Source, dtype: DType) -> Kernel {
    Kernel::new(source, format!("sum_columns<{}>", cpp(dtype)), 1024)
}

/// out `[cols]` = the sum of the rows of parts `[rows, cols]` (f32), in an order that depends on the shape alone.
pub(crate) fn sum_columns(cuda: &Cuda, source: &'static Source, parts: Ptr, rows: usize, cols: usize, out: &View) -> Result<()> {
    let p = ColumnsParams { parts, out: Ptr::of(out)?, rows: rows as u32, cols: cols as u32 };
    cuda.launch(&columns_kernel(source, out.dtype), [blocks("sum_columns", cols, 32)?, 1, 1], 0, &p)
}
