//! Arg-max, the k largest, sorting.

use super::{ALL, THREADS, blocks};
use crate::kernel::cpp;
use crate::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{ArgMax, Sort, TopK};
use engine::{DType, Error, Result, View};

cuda_source!(static SOURCE = "sort.cu", kernels: kernels, headers: ["prim.cuh"]);
params! {
    struct PickParams { x: Ptr, values: Ptr, index: Ptr, rows: u64, cols: u64, k: u32, unused: u32 }
    struct SortParams {
        x: Ptr, keys: Ptr, places: Ptr, values: Ptr, index: Ptr, rows: u64, cols: u64, padded: u64, descending: u32, k: u32, j: u32, out_cols: u32,
    }
}

/// Elements that a block sorts in shared memory.
const TILE: usize = 1024;
/// The largest k for which passing k times over a row is worth it.
const FEW: usize = 64;
/// Elements of a short row that a lane has.
const PER_LANE: [usize; 2] = [4, 16];

fn typed(name: &str, d: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{}>", cpp(d)), THREADS)
}
fn fixed(call: &'static str) -> Kernel {
    Kernel::new(&SOURCE, call, THREADS)
}
fn values_kernel(bytes: usize) -> Kernel {
    Kernel::new(&SOURCE, format!("sort_values<{bytes}>"), THREADS)
}
/// A warp for each row of at most 32 · `per_lane` elements.
fn short_kernel(d: DType, per_lane: usize) -> Kernel {
    Kernel::new(&SOURCE, format!("top_short<{}, {per_lane}>", cpp(d)), THREADS)
}
/// Of the kernels above, the one for a row: none if it is too long, takes more than one choice a lane, or its keys are of 64 bits.
fn short(d: DType, cols: usize, k: usize) -> Option<Kernel> {
    let per_lane = PER_LANE.into_iter().find(|n| cols <= 32 * n).filter(|_| k <= 32 && d.size() <= 4)?;
    Some(short_kernel(d, per_lane))
}
fn kernels() -> Vec<Kernel> {
    let short = ALL.into_iter().filter(|d| d.size() <= 4).flat_map(|d| PER_LANE.map(|n| short_kernel(d, n)));
    let typed = ["top", "sort_keys"].into_iter().flat_map(|n| ALL.map(|d| typed(n, d)));
    let fixed = ["sort_pass<0>", "sort_tile<true>", "sort_tile<false>"].map(fixed);
    typed.chain(short).chain(fixed).chain([1, 2, 4, 8].map(values_kernel)).collect()
}

fn top(op: &'static str, cuda: &Cuda, k: usize, x: &View, values: Option<&View>, index: &View) -> Result<()> {
    let (rows, cols) = (x.layout.shape[0], x.layout.shape[1]);
    check(op, cols)?;
    let p = PickParams {
        x: Ptr::of(x)?,
        values: Ptr::of_option(values)?,
        index: Ptr::of(index)?,
        rows: rows as u64,
        cols: cols as u64,
        k: k as u32,
        unused: 0,
    };
    if let Some(kernel) = short(x.dtype, cols, k) {
        let rows_of_block = THREADS as usize / 32;
        return cuda.launch(&kernel, [if k == 0 { 0 } else { rows.div_ceil(rows_of_block) as u32 }, 1, 1], 0, &p);
    }
    cuda.launch(&typed("top", x.dtype), [if k == 0 { 0 } else { rows as u32 }, 1, 1], 0, &p)
}
fn check(op: &'static str, cols: usize) -> Result<()> {
    if cols < 1 << 31 {
        Ok(())
    } else {
        Err(Error::invalid(op, format!("rows of {cols} elements are too long for CUDA, where the limit is 2³¹ − 1")))
    }
}

fn sort(op: &'static str, cuda: &Cuda, descending: bool, k: usize, x: &View, y: &[View]) -> Result<()> {
    let (rows, cols) = (x.layout.shape[0], x.layout.shape[1]);
    check(op, cols)?;
    if rows * k == 0 {
        return Ok(());
    }
    let padded = cols.next_power_of_two();
    let all = rows * padded;
    let (_keys, keys) = cuda.scratch(all * 8)?;
    let (_places, places) = cuda.scratch(all * 4)?;
    let mut p = SortParams {
        x: Ptr::of(x)?,
        keys,
        places,
        values: Ptr::of(&y[0])?,
        index: Ptr::of(&y[1])?,
        rows: rows as u64,
        cols: cols as u64,
        padded: padded as u64,
        descending: descending as u32,
        k: 0,
        j: 0,
        out_cols: k as u32,
    };
    let init = typed("sort_keys", x.dtype);
    cuda.launch(&init, blocks(&init, all, 4), 0, &p)?;
    let tiles = [all.div_ceil(TILE.min(padded)) as u32, 1, 1];
    cuda.launch(&fixed("sort_tile<true>"), tiles, 0, &p)?;
    let mut size = 2 * TILE;
    while size <= padded {
        let mut stride = size / 2;
        while stride >= TILE {
            (p.k, p.j) = (size as u32, stride as u32);
            let pass = fixed("sort_pass<0>");
            cuda.launch(&pass, blocks(&pass, all / 2, 1), 0, &p)?;
            stride /= 2;
        }
        cuda.launch(&fixed("sort_tile<false>"), tiles, 0, &p)?;
        size *= 2;
    }
    let last = values_kernel(x.dtype.size());
    cuda.launch(&last, blocks(&last, rows * k, 4), 0, &p)
}

cuda_kernel!(ArgMax => |_, cuda, x, y| top("argmax", cuda, 1, &x[0], None, &y[0]));
cuda_kernel!(TopK => |op, cuda, x, y| {
    if op.k <= FEW { top("topk", cuda, op.k, &x[0], Some(&y[0]), &y[1]) } else { sort("topk", cuda, true, op.k, &x[0], y) }
});
cuda_kernel!(Sort => |op, cuda, x, y| sort("sort", cuda, op.descending, x[0].layout.shape[1], &x[0], y));
