//! Sums into places that indices name.

use super::copy::{OUT_OF_RANGE, index_kind};
use super::{ALL, THREADS, around, blocks};
use crate::kernel::cpp;
use crate::{Cuda, Fault, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{IndexAdd, ScatterAdd};
use engine::{DType, Op, Result, View};

cuda_source!(static SOURCE = "index.cu", kernels: kernels, headers: ["prim.cuh"]);
params! {
    struct AddParams { x: Ptr, index: Ptr, out: Ptr, outer: u64, n: u64, inner: u64, length: u64, fault: Fault, kind: u32, unused: u32 }
}

/// Entries of the axis that a block of `index_add` has to itself.
const ROWS: usize = 32;

fn kernel(name: &str, d: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{}>", cpp(d)), THREADS)
}
fn kernels() -> Vec<Kernel> {
    ["index_add", "scatter_add", "scatter_add_places"].into_iter().flat_map(|n| ALL.map(|d| kernel(n, d))).collect()
}

/// The parameters, on a result that is set to zero.
fn prepare(op: &dyn Op, cuda: &Cuda, axis: usize, x: &[View], y: &[View]) -> Result<AddParams> {
    let (outer, n, inner) = around(&x[0].layout.shape, axis);
    let out = Ptr::of(&y[0])?;
    cuda.fill(out, 0, y[0].layout.numel() * y[0].dtype.size())?;
    Ok(AddParams {
        x: Ptr::of(&x[0])?,
        index: Ptr::of(&x[1])?,
        out,
        outer: outer as u64,
        n: n as u64,
        inner: inner as u64,
        length: y[0].layout.shape[axis] as u64,
        fault: cuda.fault(op.name(), OUT_OF_RANGE)?,
        kind: index_kind(x[1].dtype),
        unused: 0,
    })
}

fn index_add(op: &IndexAdd, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let p = prepare(op, cuda, op.axis, x, y)?;
    let k = kernel("index_add", x[0].dtype);
    // the second axis of a grid ends at 65535
    const MOST: u64 = 65535;
    for o in (0..p.outer).step_by(MOST as usize) {
        let now = (p.outer - o).min(MOST);
        let size = x[0].dtype.size();
        let skip = |p: Ptr, rows: u64| p.byte_add((o * rows) as usize * size);
        let part = AddParams { x: skip(p.x, p.n * p.inner), out: skip(p.out, p.length * p.inner), outer: now, ..p };
        cuda.launch(&k, [(p.length as usize).div_ceil(ROWS) as u32, now as u32, 1], 0, &part)?;
    }
    Ok(())
}
cuda_kernel!(IndexAdd => index_add);

fn scatter_add(op: &ScatterAdd, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let p = prepare(op, cuda, op.axis, x, y)?;
    let lines = (p.outer * p.inner) as usize;
    // a thread for each line keeps the card busy where there are many, or where they are short
    let by_line = lines >= 4096 || p.n <= 64;
    let k = kernel(if by_line { "scatter_add" } else { "scatter_add_places" }, x[0].dtype);
    cuda.launch(&k, blocks(&k, if by_line { lines } else { y[0].layout.numel() }, 1), 0, &p)
}
cuda_kernel!(ScatterAdd => scatter_add);
