//! Copies of any layout, concatenation, padding, selection by index.

use super::{Nest, THREADS, around, blocks};
use crate::{Cuda, Fault, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{Assign, Cat, Contiguous, Gather, IndexSelect, Pad};
use engine::{DType, Layout, Op, Result, View};

cuda_source!(static SOURCE = "copy.cu", kernels: kernels, headers: ["prim.cuh"]);
params! {
    struct CopyParams { x: Ptr, out: Ptr, nest: Nest }
    struct TurnParams { x: Ptr, out: Ptr, rows: u64, cols: u64, x_col: i64, out_row: i64, down: u64, across: u64, nest: Nest }
    struct BlockParams { x: Ptr, out: Ptr, rows: u64, width: u64, pitch: u64, at: u64 }
    struct IndexParams { x: Ptr, index: Ptr, out: Ptr, outer: u64, n: u64, inner: u64, length: u64, fault: Fault, kind: u32, unused: u32 }
}

fn kernel(name: &str, bytes: usize) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{bytes}>"), THREADS)
}
/// The transposing copy of 2-byte elements in pairs.
fn pairs() -> Kernel {
    Kernel::new(&SOURCE, "copy_turned_pairs<0>", THREADS)
}
fn pick_kernel(bytes: usize, each: bool) -> Kernel {
    Kernel::new(&SOURCE, format!("pick<{bytes}, {each}>"), THREADS)
}
fn kernels() -> Vec<Kernel> {
    let sizes = [1, 2, 4, 8, 16];
    let plain = ["copy_nest", "copy_block"].into_iter().flat_map(|n| sizes.map(|b| kernel(n, b)));
    let turned = [1, 2, 4, 8].map(|b| kernel("copy_turned", b));
    plain.chain(turned).chain([pairs()]).chain(sizes.map(|b| pick_kernel(b, false))).chain([1, 2, 4, 8].map(|b| pick_kernel(b, true))).collect()
}

/// The largest unit, up to 16 bytes, of which all these byte counts and addresses are multiples.
fn unit(size: usize, of: &[u64]) -> usize {
    let mut bytes = 16;
    while bytes > size && of.iter().any(|n| n % bytes as u64 != 0) {
        bytes /= 2;
    }
    bytes
}

/// Sides of the tiles of a transposing copy, by elements and by pairs.
const SIDE: usize = 32;
const PAIRS_SIDE: usize = 64;

/// The axis along which the source of a merged (source, dense result) runs fastest, where that is another than the result's and both are long enough for tiles.
fn turned(shape: &[usize], source: &[isize]) -> Option<usize> {
    let last = shape.len() - 1;
    // 0: all lanes read one element
    if source[last] == 0 || source[last] == 1 || shape[last] < SIDE / 2 {
        return None;
    }
    (0..last).find(|d| source[*d] == 1 && shape[*d] >= SIDE / 2)
}

fn turn(
    op: &Contiguous,
    cuda: &Cuda,
    size: usize,
    axis: usize,
    (from, to): (Ptr, Ptr),
    (mut shape, mut strides): (Vec<usize>, Vec<Vec<isize>>),
) -> Result<()> {
    let cols = shape.pop().unwrap_or(1);
    let rows = shape.remove(axis);
    let x_col = strides[0].pop().unwrap_or(0);
    strides[1].pop();
    let out_row = strides[1].remove(axis);
    strides[0].remove(axis);
    if shape.is_empty() {
        shape.push(1);
        strides.iter_mut().for_each(|s| s.push(0));
    }
    let even = |s: isize| s % 2 == 0;
    let in_pairs = size == 2
        && (from.0 | to.0).is_multiple_of(4)
        && (rows | cols).is_multiple_of(2)
        && even(x_col)
        && even(out_row)
        && strides.iter().flatten().all(|s| even(*s));
    let (k, side) = if in_pairs { (pairs(), PAIRS_SIDE) } else { (kernel("copy_turned", size), SIDE) };
    let (down, across) = (rows.div_ceil(side), cols.div_ceil(side));
    let tiles = shape.iter().product::<usize>() * down * across;
    let nest = Nest::from_merged(op.name(), (shape, strides))?;
    let (x_col, out_row) = (x_col as i64, out_row as i64);
    let p = TurnParams { x: from, out: to, rows: rows as u64, cols: cols as u64, x_col, out_row, down: down as u64, across: across as u64, nest };
    cuda.launch(&k, [tiles.min(i32::MAX as usize) as u32, 1, 1], 0, &p)
}

pub(super) fn contiguous(op: &Contiguous, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let size = x[0].dtype.size();
    let (from, to) = (Ptr::of(&x[0])?, Ptr::of(&y[0])?);
    let (mut shape, mut strides) = Layout::merged(&[x[0].layout, y[0].layout]);
    let last = shape.len() - 1;
    if let Some(axis) = turned(&shape, &strides[0]) {
        return turn(op, cuda, size, axis, (from, to), (shape, strides));
    }
    let mut bytes = size;
    if strides[0][last] == 1 {
        // rows of whole 16 bytes are moved as such
        let mut of = vec![from.0, to.0, (shape[last] * size) as u64];
        of.extend(strides[0][..last].iter().map(|s| (*s as usize * size) as u64));
        bytes = unit(size, &of);
        shape[last] /= bytes / size;
        strides[0][..last].iter_mut().for_each(|s| *s /= (bytes / size) as isize);
    }
    let k = kernel("copy_nest", bytes);
    let nest = Nest::from_merged(op.name(), (shape, strides))?;
    cuda.launch(&k, blocks(&k, nest.n as usize, 4), 0, &CopyParams { x: from, out: to, nest })
}
cuda_kernel!(Contiguous => contiguous);

cuda_kernel!(Assign => |_, cuda, x, y| cuda.copy(Ptr::of(&x[0])?, Ptr::of(&y[0])?, y[0].layout.numel() * y[0].dtype.size()));

/// Rows of `width` bytes into rows `pitch` bytes apart, from byte `at` on.
fn block(cuda: &Cuda, from: Ptr, to: Ptr, rows: usize, width: usize, pitch: usize, at: usize) -> Result<()> {
    let b = unit(1, &[from.0, to.0, width as u64, pitch as u64, at as u64]);
    let k = kernel("copy_block", b);
    let n = |bytes: usize| (bytes / b) as u64;
    let p = BlockParams { x: from, out: to, rows: rows as u64, width: n(width), pitch: n(pitch), at: n(at) };
    cuda.launch(&k, blocks(&k, rows * width / b, 4), 0, &p)
}

fn cat(op: &Cat, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (outer, len, inner) = around(&y[0].layout.shape, op.axis);
    let inner = inner * y[0].dtype.size();
    let mut at = 0;
    for v in x {
        let width = v.layout.shape[op.axis] * inner;
        block(cuda, Ptr::of(v)?, Ptr::of(&y[0])?, outer, width, len * inner, at)?;
        at += width;
    }
    Ok(())
}
cuda_kernel!(Cat => cat);

fn pad(op: &Pad, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (outer, len, inner) = around(&y[0].layout.shape, op.axis);
    let inner = inner * y[0].dtype.size();
    let to = Ptr::of(&y[0])?;
    cuda.fill(to, 0, outer * len * inner)?;
    block(cuda, Ptr::of(&x[0])?, to, outer, x[0].layout.shape[op.axis] * inner, len * inner, op.before * inner)
}
cuda_kernel!(Pad => pad);

/// The number by which sources know an index's dtype.
pub(super) fn index_kind(d: DType) -> u32 {
    match d {
        DType::I64 => 0,
        DType::I32 => 1,
        _ => 2,
    }
}
pub(super) const OUT_OF_RANGE: &str = "an index is outside the axis that it points into";

fn pick(op: &dyn Op, cuda: &Cuda, axis: usize, each: bool, x: &[View], y: &[View]) -> Result<()> {
    let (outer, length, inner) = around(&x[0].layout.shape, axis);
    let (n, size) = (y[0].layout.shape[axis], x[0].dtype.size());
    let (from, to) = (Ptr::of(&x[0])?, Ptr::of(&y[0])?);
    let b = if each { size } else { unit(size, &[from.0, to.0, (inner * size) as u64]) };
    let k = pick_kernel(b, each);
    let p = IndexParams {
        x: from,
        index: Ptr::of(&x[1])?,
        out: to,
        outer: outer as u64,
        n: n as u64,
        inner: (inner * size / b) as u64,
        length: length as u64,
        fault: cuda.fault(op.name(), OUT_OF_RANGE)?,
        kind: index_kind(x[1].dtype),
        unused: 0,
    };
    cuda.launch(&k, blocks(&k, outer * n * inner * size / b, 4), 0, &p)
}
cuda_kernel!(IndexSelect => |op, cuda, x, y| pick(op, cuda, op.axis, false, x, y));
cuda_kernel!(Gather => |op, cuda, x, y| pick(op, cuda, op.axis, true, x, y));
