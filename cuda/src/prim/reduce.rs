//! Sums and maxima along either axis of a matrix, and the running sum.

use super::FLOATS;
use crate::kernel::cpp;
use crate::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{CumSum, MaxReduce, Sum};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "reduce.cu", kernels: kernels, headers: ["prim.cuh"]);
params! {
    struct ReduceParams { x: Ptr, out: Ptr, rows: u64, cols: u64, part: u64 }
    struct ScanParams { x: Ptr, out: Ptr, rows: u64, cols: u64, reverse: u32, unused: u32 }
}

const THREADS: u32 = 256;
/// Elements of a row that one block takes where rows are few.
const PART: usize = 16 * 1024;
/// Rows shorter than this are reduced by a warp.
const SHORT: usize = 1024;

/// What sums are kept in.
fn wide(d: DType) -> DType {
    if d == DType::F64 { DType::F64 } else { DType::F32 }
}
fn rows_kernel(name: &str, from: DType, to: DType, maximum: bool) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{}, {}, {maximum}>", cpp(from), cpp(to)), THREADS)
}
fn columns_kernel(from: DType, to: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("sum_columns<{}, {}>", cpp(from), cpp(to)), THREADS)
}
fn scan_kernel(d: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("cumsum<{}>", cpp(d)), THREADS)
}
fn kernels() -> Vec<Kernel> {
    let mut v = vec![];
    for d in FLOATS {
        // in one go, and in two by way of the wide type
        let pairs = if d == wide(d) { vec![(d, d)] } else { vec![(d, d), (d, wide(d)), (wide(d), d)] };
        for (from, to) in pairs {
            v.extend([false, true].map(|m| rows_kernel("reduce_rows", from, to, m)));
            v.push(columns_kernel(from, to));
        }
        v.extend([false, true].map(|m| rows_kernel("reduce_short_rows", d, d, m)));
        v.push(scan_kernel(d));
    }
    v
}

fn reduce_rows(cuda: &Cuda, maximum: bool, x: &View, y: &View) -> Result<()> {
    let (rows, cols, d) = (x.layout.shape[0], x.layout.shape[1], x.dtype);
    let p = ReduceParams { x: Ptr::of(x)?, out: Ptr::of(y)?, rows: rows as u64, cols: cols as u64, part: cols.max(1) as u64 };
    if cols <= SHORT {
        let k = rows_kernel("reduce_short_rows", d, d, maximum);
        return cuda.launch(&k, [rows.div_ceil(THREADS as usize / 32) as u32, 1, 1], 0, &p);
    }
    // a grid of rows in two axes
    let (gy, gz) = (rows.min(65535), rows.div_ceil(65535));
    let parts = if rows >= 128 { 1 } else { cols.div_ceil(PART) };
    if parts == 1 {
        return cuda.launch(&rows_kernel("reduce_rows", d, d, maximum), [1, gy as u32, gz as u32], 0, &p);
    }
    let w = wide(d);
    let (_hold, partial) = cuda.scratch(rows * parts * w.size())?;
    let first = ReduceParams { out: partial, part: PART as u64, ..p };
    cuda.launch(&rows_kernel("reduce_rows", d, w, maximum), [parts as u32, gy as u32, gz as u32], 0, &first)?;
    let second = ReduceParams { x: partial, cols: parts as u64, part: parts as u64, ..p };
    cuda.launch(&rows_kernel("reduce_rows", w, d, maximum), [1, gy as u32, gz as u32], 0, &second)
}

fn sum_columns(cuda: &Cuda, x: &View, y: &View) -> Result<()> {
    let (rows, cols, d) = (x.layout.shape[0], x.layout.shape[1], x.dtype);
    let p = ReduceParams { x: Ptr::of(x)?, out: Ptr::of(y)?, rows: rows as u64, cols: cols as u64, part: rows.max(1) as u64 };
    let across = cols.div_ceil(32);
    // few columns: rows are divided as well, so that there are about 1024 blocks, of 64 rows at least
    let part = rows.div_ceil((1024 / across.max(1)).max(1)).max(64);
    let parts = rows.div_ceil(part).max(1);
    if parts == 1 {
        return cuda.launch(&columns_kernel(d, d), [across as u32, 1, 1], 0, &p);
    }
    let w = wide(d);
    let (_hold, partial) = cuda.scratch(parts * cols * w.size())?;
    let first = ReduceParams { out: partial, part: part as u64, ..p };
    cuda.launch(&columns_kernel(d, w), [across as u32, parts as u32, 1], 0, &first)?;
    let second = ReduceParams { x: partial, rows: parts as u64, part: parts as u64, ..p };
    cuda.launch(&columns_kernel(w, d), [across as u32, 1, 1], 0, &second)
}

cuda_kernel!(Sum => |op, cuda, x, y| if op.leading { sum_columns(cuda, &x[0], &y[0]) } else { reduce_rows(cuda, false, &x[0], &y[0]) });
cuda_kernel!(MaxReduce => |_, cuda, x, y| reduce_rows(cuda, true, &x[0], &y[0]));

fn cumsum(op: &CumSum, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (rows, cols) = (x[0].layout.shape[0], x[0].layout.shape[1]);
    let p = ScanParams { x: Ptr::of(&x[0])?, out: Ptr::of(&y[0])?, rows: rows as u64, cols: cols as u64, reverse: op.reverse as u32, unused: 0 };
    cuda.launch(&scan_kernel(x[0].dtype), [if cols == 0 { 0 } else { rows.min(1 << 20) as u32 }, 1, 1], 0, &p)
}
cuda_kernel!(CumSum => cumsum);
